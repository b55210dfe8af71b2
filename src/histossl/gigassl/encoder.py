"""The slide encoder: the tiles of a slide in, one vector out.

ResNet-18's fourth stage as a sparse network over the map of tiles, then the mean over sites (Lazard et al., CVPR
workshops 2023). Two rivals that see no neighbours stand behind the same call: a residual MLP with the mean, and the
same with gated attention (Ilse et al., ICML 2018).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from histossl.core.atomic import whole_folder
from histossl.core.config import from_dict, to_dict
from histossl.core.errors import FileFormatError, SettingsError
from histossl.gigassl.layers import GatedAttention, Stage, from_dense, view_sum
from histossl.gigassl.neighbours import Neighbours
from histossl.gigassl.parts import CONTRASTED, KINDS, Parts
from histossl.gigassl.prototypes import RUNS, Counted, Prototypes, shared_out
from histossl.gigassl.sites import site_indices, tiles_under
from histossl.gigassl.sparse import Grid, SiteNorm, SparseConv, SparseMap, occupied, view_mean

FORMAT = "histossl slide encoder 1"
TRAINED, UNTRAINED = "model.safetensors", "untrained.safetensors"
BEFORE = {"scales": [0, 2, 4], "normalise": False}
"""Settings that slide encoders were made with before these could be chosen."""
WIDTH = 256  # of the map that the stage works on: ResNet-18's third stage


@dataclass(frozen=True)
class EncoderSettings:
    """What a slide encoder is made of.

    Attributes:
        in_dim: length of a tile's vector; other than 256 passes a linear layer first.
        dim: length of what the stage gives to the slide's vector.
        inlet: "plain" takes the tiles as they are, as the paper does; "standard" brings each of their features to
            mean 0 and variance 1; "centred" first takes away the mean of the view, and with it the stain and most of a
            shared augmentation, so that the stage sees in what the tiles differ.
        tile_mean: append the mean of the tiles themselves, `in_dim` numbers, standardised: what they are made of, which
            no training can then lose.
        prototypes: append the shares (their roots) of as many typical tiles and, at two larger scales, typical
            neighbourhoods, of each clustering, so that what is rare is not lost in a mean; see `Prototypes`. 0: none.
        scales: how often tiles are averaged with their neighbours (3x3) before prototypes are looked for, one entry for
            each set of clusterings: 0 is tiles themselves, 1 about 3x3 of them, 2 about 5x5; ascending.
        normalise: bring the parts of the slide's vector to one scale over the cohort, see `Parts`; otherwise they stand
            behind one another as they are.
        arch: "neighbours" (learns what neighbouring tiles share, see `Neighbours`), or one that learns by a contrast of
            slides: "sparse" (sees neighbours), "mlp" or "attention" (see tiles one by one).
        hard_border: as in published weights, row 0 and column 0 are the edge of the world; otherwise the result does
            not depend on where a slide's coordinates begin.
        linear: whether tiles of another length than 256 pass a linear layer first, or the stage takes them as they are.
        spacing: sites from a tile to its neighbour; the published code has 4 on slides scanned at 40x.
    """

    in_dim: int = 256
    dim: int = 128
    inlet: str = "centred"
    tile_mean: bool = True
    prototypes: int = 64
    scales: tuple[int, ...] = (1, 2)
    normalise: bool = True
    arch: str = "sparse"
    hard_border: bool = False
    spacing: float = 1.0
    linear: bool = True

    def __post_init__(self) -> None:
        if self.arch not in ("neighbours", "sparse", "mlp", "attention"):
            raise SettingsError(
                f"no slide encoder is called {self.arch!r}", "take neighbours, sparse, mlp or attention"
            )
        if self.inlet not in ("plain", "standard", "centred"):
            raise SettingsError(f"no inlet is called {self.inlet!r}", "take plain, standard or centred")
        if self.in_dim < 1 or self.dim < 1:
            raise SettingsError(f"in_dim and dim must be positive, got {self.in_dim} and {self.dim}")
        if self.arch == "neighbours" and self.dim % 2:
            raise SettingsError(f"encoder.dim of the arch neighbours must be even, got {self.dim}")
        if self.prototypes < 0:
            raise SettingsError(f"encoder.prototypes must not be negative, got {self.prototypes}")
        if not self.scales or list(self.scales) != sorted(set(self.scales)) or self.scales[0] < 0:
            raise SettingsError(f"encoder.scales must ascend from 0 or more, got {self.scales}")
        if not 0 < self.spacing < np.inf:
            raise SettingsError(f"encoder.spacing must be positive, got {self.spacing}")

    @property
    def contrasted_dim(self) -> int:
        """Length of the part of the slide's vector that takes part in the contrast, and comes first."""
        return self.dim + self.in_dim * self.tile_mean

    @property
    def vector_dim(self) -> int:
        """Length of the slide's vector."""
        return sum(self.parts.values())

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of every number of the slide's vector, the name of its part."""
        return tuple(name for name, length in self.parts.items() for _ in range(length))

    @property
    def parts(self) -> dict[str, int]:
        """Names of the parts of the slide's vector, in order, and their lengths."""
        lengths = {"stage": self.dim, "mean": self.in_dim * self.tile_mean}
        lengths["prototypes"] = len(self.scales) * RUNS * self.prototypes
        return {name: length for name, length in lengths.items() if length}


class SlideEncoder(nn.Module):
    """Tiles and their places in, slide vectors out.

    Args:
        settings: what to build.
        seed: of the initial weights; the global generator is neither used nor moved.

    Attributes:
        about: what `load` found of the training: its settings, the slides, fingerprints; empty before any training.
        rival: what `load` found beside it: the like-for-like encoder of which no weight was trained.
    """

    def __init__(self, settings: EncoderSettings | None = None, seed: int = 0) -> None:
        super().__init__()
        self.settings = chosen = settings or EncoderSettings()
        self.about: dict[str, Any] = {}
        self.rival: tuple[SlideEncoder, ...] = ()  # a tuple, so that it is no part of this module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.norm = SiteNorm(chosen.in_dim, affine=False) if chosen.inlet != "plain" else None
            width = WIDTH if chosen.linear else chosen.in_dim
            self.linear = SparseConv(chosen.in_dim, width, 1) if chosen.in_dim != width else None
            self.stage = (
                Neighbours(width, chosen.dim)
                if chosen.arch == "neighbours"
                else Stage(width, chosen.dim, spatial=chosen.arch == "sparse")
            )
            self.attention = GatedAttention(chosen.dim) if chosen.arch == "attention" else None
            self.tile_norm = SiteNorm(chosen.in_dim, affine=False) if chosen.tile_mean else None
            self.prototypes = (
                Prototypes(chosen.in_dim, chosen.prototypes, chosen.scales, not chosen.normalise)
                if chosen.prototypes
                else None
            )
            kinds = KINDS if chosen.arch == "neighbours" else CONTRASTED
            self.parts = Parts(chosen.parts, kinds) if chosen.normalise else None

    def __repr__(self) -> str:
        chosen, weights = self.settings, sum(p.numel() for p in self.parameters())
        trained = f"trained on {len(self.about['slides'])} slides" if self.about.get("slides") else "not trained"
        return (
            f"SlideEncoder({chosen.arch}, tiles of {chosen.in_dim} numbers -> slides of {chosen.vector_dim}, "
            f"{weights:,} weights, {trained})"
        )

    def forward(self, features: Tensor, positions: Tensor | NDArray, views: Tensor | NDArray, size: int) -> Tensor:
        """Slide vectors of a batch of views.

        Args:
            features: (N, in_dim) floating, on the encoder's device.
            positions: (N, 2) (row, column) in tile units, on the CPU: neighbouring tiles are 1 apart. Tiles on one
                site are averaged.
            views: (N,) integers, on the CPU: the view of each tile.
            size: number of views.

        Returns:
            (size, settings.contrasted_dim), zeros for a view without tiles.

        Raises:
            SettingsError: the tiles' vectors are not `in_dim` long.
            ValueError: positions are not finite.
        """
        _, tiles = self._placed(features, positions, views, size)
        last = self._looked_at(tiles)
        parts = [view_sum(last.features * self._weights(last)[:, None], last.grid)]
        if self.tile_norm is not None:
            parts.append(self.tile_norm(tiles.mean()) * (tiles.grid.counts > 0)[:, None])
        return torch.cat(parts, 1)

    def tile_shares(
        self, features: Tensor, positions: Tensor | NDArray, views: Tensor | NDArray, size: int, directions: Tensor
    ) -> Tensor:
        """What every tile gives to a linear score of its slide's vector; in evaluation mode, exactly.

        A slide's vector is a sum over sites; each site's part goes to the tiles under it, in equal parts.

        Args:
            features: (N, in_dim) of the tiles of all views.
            positions: (N, 2) in tile units.
            views: (N,) int64, the view of each tile.
            size: number of views.
            directions: (contrasted_dim, C), the weights of C scores.

        Returns:
            (N, C); the sum over the tiles of a view is its vector times `directions`.
        """
        site_of_tile, tiles = self._placed(features, positions, views, size)
        last = self._looked_at(tiles)
        scores = last.features @ directions[: self.settings.dim] * self._weights(last)[:, None]
        under, sites = tiles_under(site_of_tile.cpu().numpy(), tiles.grid, self.stage.pairs(tiles.grid))
        shares = shared_out(scores, under.to(scores.device), sites.to(scores.device), len(features))
        if self.tile_norm is not None:
            scores = self.tile_norm(tiles.features) @ directions[self.settings.dim :] * _even(tiles.grid)[:, None]
            every = torch.arange(len(features), device=scores.device)
            shares = shares + shared_out(scores, every, site_of_tile, len(features))
        return shares

    def counted(self, features: Tensor, positions: Tensor | NDArray) -> Counted | None:
        """The prototypes in a slide, of which the last part of its vector is made; None where there are none.

        Args:
            features: (N, in_dim) of all tiles of the slide; views would hide which tiles are rare, and where.
            positions: (N, 2) in tile units.
        """
        if self.prototypes is None:
            return None
        site_of_tile, tiles = self._placed(features, positions, np.zeros(len(features), np.int64), 1)
        return Counted(site_of_tile, self.prototypes(tiles), self.prototypes.total)

    def fit_prototypes(self, slides: Iterable[tuple[Tensor, NDArray]], seed: int = 0) -> None:
        """Find the prototypes of a cohort; nothing where there are none to find.

        Args:
            slides: of each slide some tiles, (n, in_dim) features and (n, 2) positions, un-augmented.
            seed: of the clusters.
        """
        if self.prototypes is not None:
            maps = [self._placed(f, p, np.zeros(len(f), np.int64), 1)[1] for f, p in slides]
            self.prototypes.fit(maps, seed)

    def whole(self, mean: Tensor, counted: Counted | None) -> Tensor:
        """A slide's vector, before its length is made 1: (vector_dim,), of the mean over views and what was counted.

        Args:
            mean: (contrasted_dim,) of `forward`, on the CPU.
            counted: of `counted`.
        """
        found = self.joined(mean, counted)
        return found if self.parts is None else self.parts(found)

    @staticmethod
    def joined(mean: Tensor, counted: Counted | None) -> Tensor:
        """As `whole`, before the parts are brought to one scale.

        Args:
            mean: (contrasted_dim,), on the CPU.
            counted: of `counted`.

        Returns:
            (vector_dim,).
        """
        return mean if counted is None else torch.cat([mean, counted.roots.cpu()])

    def _placed(
        self, features: Tensor, positions: Tensor | NDArray, views: Tensor | NDArray, size: int
    ) -> tuple[Tensor, SparseMap]:
        """The site of each tile, and the map of their means."""
        if features.ndim != 2 or features.shape[1] != self.settings.in_dim:
            raise SettingsError(
                f"this slide encoder takes tiles of {self.settings.in_dim} numbers, got {tuple(features.shape)}",
                "use features of the tile encoder that it was trained on",
            )
        spaced = np.asarray(positions) * self.settings.spacing
        sites = site_indices(spaced, np.asarray(views), self.settings.hard_border)
        grid, site_of_tile, counts = occupied(sites, size, features.device)
        return site_of_tile, SparseMap(view_mean(features.to(self.stage.dtype), site_of_tile, counts), grid)

    def moments(self, features: Tensor, positions: Tensor | NDArray, views: Tensor | NDArray, size: int) -> Tensor:
        """What the loss of the arch `neighbours` is made of, see `Neighbours.moments`.

        Args:
            features: as `forward` takes them.
            positions: likewise.
            views: likewise.
            size: number of views.

        Returns:
            (M,) float32.
        """
        assert isinstance(self.stage, Neighbours)
        return self.stage.moments(self._let_in(self._placed(features, positions, views, size)[1]))

    def _looked_at(self, tiles: SparseMap) -> SparseMap:
        """The map that is pooled."""
        return self.stage(self._let_in(tiles))

    def _let_in(self, tiles: SparseMap) -> SparseMap:
        """The map that the stage sees."""
        rows = tiles.centred() if self.settings.inlet == "centred" else tiles.features
        if self.norm is not None:
            rows = self.norm(rows)
        if self.linear is not None:
            rows = self.linear(rows, tiles.grid.itself)
        return tiles.with_features(rows)

    def _weights(self, last: SparseMap) -> Tensor:
        """(S,) of the sites, summing to 1 over a view."""
        return _even(last.grid).to(last.features.dtype) if self.attention is None else self.attention(last)

    def load_dense(self, state: Mapping[str, Tensor]) -> None:
        """Start from the fourth stage of a dense ResNet-18.

        Args:
            state: its weights by name, with or without `layer4.` before the names.

        Raises:
            FileFormatError: the weights are of another network.
            SettingsError: this encoder is not of the sparse kind with 512 outputs.
        """
        if self.settings.arch != "sparse" or self.settings.dim != 512:
            raise SettingsError("only a sparse encoder with dim 512 can start from ResNet-18's fourth stage")
        self.stage.load_state_dict(from_dense(state))

    def save(self, folder: Path, about: Mapping[str, Any] | None = None, untrained: SlideEncoder | None = None) -> None:
        """Write model.safetensors and config.json into `folder`, whole or not at all.

        Args:
            folder: of the encoder.
            about: kept in config.json.
            untrained: its rival that nothing was trained of, kept beside it in untrained.safetensors.
        """
        with whole_folder(folder) as part:
            for name, encoder in ((TRAINED, self), (UNTRAINED, untrained)):
                if encoder is not None:  # an OSError where the disk is full, as of any file
                    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
                    (part / name).write_bytes(save(state))
            config = {"format": FORMAT, "settings": to_dict(self.settings), "about": dict(about or {})}
            (part / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    @classmethod
    def load(cls, folder: Path, weights: str = TRAINED) -> SlideEncoder:
        """The encoder that `save` wrote.

        Args:
            folder: of the encoder.
            weights: the file in it, `TRAINED` or `UNTRAINED`.

        Returns:
            The encoder on the CPU, in evaluation mode; a trained one with its rival where there is one.

        Raises:
            FileFormatError: a file is missing, cut short, or of something else.
        """
        folder = Path(folder)
        hint = "give the folder that pretraining wrote, with model.safetensors and config.json"
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            if not isinstance(config, dict) or config.get("format") != FORMAT:
                raise FileFormatError(f"{folder / 'config.json'} does not describe a slide encoder", hint)
            encoder = cls(from_dict(EncoderSettings, BEFORE | config["settings"]))
            encoder.load_state_dict(load_file(folder / weights))
            encoder.about = dict(config.get("about") or {})
            if weights == TRAINED and (folder / UNTRAINED).exists():
                encoder.rival = (cls.load(folder, UNTRAINED),)
        except (OSError, ValueError, KeyError, SettingsError, SafetensorError, RuntimeError) as error:
            raise FileFormatError(f"no slide encoder can be read from {folder}: {error}", hint) from error
        return encoder.eval()


def _even(grid: Grid) -> Tensor:
    """(S,): one over the number of sites of the view that each site is on."""
    return (1 / grid.counts)[grid.views]


def made_before(folder: Path) -> str:
    """What is old about a slide encoder.

    Args:
        folder: of the encoder.

    Returns:
        A clause for a message; empty where nothing is old, or the folder holds no encoder.
    """
    try:
        settings = json.loads((Path(folder) / "config.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if not isinstance(settings, dict) or "normalise" in settings:
        return ""
    return "it was made by an earlier version: the parts of its vectors are not brought to one scale"
