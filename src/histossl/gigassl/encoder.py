"""The slide encoder: the tiles of a slide in, one vector out.

ResNet-18's fourth stage as a sparse network over the map of tiles, then the mean over sites (Lazard et al., CVPR
workshops 2023). Two rivals that see no neighbours stand behind the same call: a residual MLP with the mean, and the
same with gated attention (Ilse et al., ICML 2018).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
from histossl.gigassl.encoder_settings import BEFORE, EncoderSettings
from histossl.gigassl.layers import GatedAttention, Stage, from_dense, view_sum
from histossl.gigassl.neighbours import Neighbours
from histossl.gigassl.norms import OneScale, SiteNorm
from histossl.gigassl.parts import CONTRASTED, KINDS, Parts
from histossl.gigassl.prototypes import Counted, Prototypes, shared_out
from histossl.gigassl.sites import site_indices, tiles_under
from histossl.gigassl.sparse import Grid, SparseConv, SparseMap, occupied, view_mean

FORMAT = "histossl slide encoder 1"
TRAINED, UNTRAINED = "model.safetensors", "untrained.safetensors"
WIDTH = 256  # of the map that the stage works on: ResNet-18's third stage


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
            self.norm = _norm(chosen) if chosen.inlet != "plain" else None
            width = WIDTH if chosen.linear else chosen.in_dim
            self.linear = SparseConv(chosen.in_dim, width, 1) if chosen.in_dim != width else None
            self.stage = (
                Neighbours(width, chosen.dim)
                if chosen.arch == "neighbours"
                else Stage(width, chosen.dim, spatial=chosen.arch == "sparse")
            )
            self.attention = GatedAttention(chosen.dim) if chosen.arch == "attention" else None
            self.tile_norm = _norm(chosen) if chosen.tile_mean else None
            self.prototypes = (
                Prototypes(chosen.in_dim, chosen.prototypes, chosen.scales, not chosen.normalise)
                if chosen.prototypes
                else None
            )
            self.stage_prototypes = (
                Prototypes(chosen.dim, chosen.prototypes, chosen.stage_scales, whiten=False)
                if "stage prototypes" in chosen.parts
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
        """The prototypes in a slide, of which the last parts of its vector are made; None where there are none.

        Args:
            features: (N, in_dim) of all tiles of the slide; views would hide which tiles are rare, and where.
            positions: (N, 2) in tile units.
        """
        if self.prototypes is None:
            return None
        site_of_tile, tiles = self._placed(features, positions, np.zeros(len(features), np.int64), 1)
        words, total = self.prototypes(tiles), self.prototypes.total
        if self.stage_prototypes is not None:
            words = torch.cat([words, total + self.stage_prototypes(self._both_sides(tiles))], 1)
            total += self.stage_prototypes.total
        return Counted(site_of_tile, words, total)

    def fit_prototypes(
        self, slides: Iterable[tuple[Tensor, NDArray]], seed: int = 0, tiles_of: SlideEncoder | None = None
    ) -> None:
        """Find the prototypes of a cohort; nothing where there are none to find.

        Args:
            slides: of each slide some tiles, (n, in_dim) features and (n, 2) positions, un-augmented.
            seed: of the clusters.
            tiles_of: an encoder that has found those of the tiles, which are taken from it.
        """
        if self.prototypes is not None:
            maps = [self._placed(f, p, np.zeros(len(f), np.int64), 1)[1] for f, p in slides]
            if tiles_of is None or tiles_of.prototypes is None:
                self.prototypes.fit(maps, seed)
            else:
                self.prototypes.load_state_dict(tiles_of.prototypes.state_dict())
            if self.stage_prototypes is not None:
                self.stage_prototypes.fit([self._both_sides(tiles) for tiles in maps], seed)

    @torch.no_grad()
    def _both_sides(self, tiles: SparseMap) -> SparseMap:
        """What the stage of the arch `neighbours` says of each site: (S, dim), of the tile and of those around it."""
        assert isinstance(self.stage, Neighbours)
        seen = self._let_in(tiles)
        return tiles.with_features(torch.cat(self.stage.sides(seen), 1))

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


def _norm(settings: EncoderSettings) -> SiteNorm:
    """Of the tiles' features."""
    return OneScale(settings.in_dim) if settings.inlet == "scaled" else SiteNorm(settings.in_dim, affine=False)


def _even(grid: Grid) -> Tensor:
    """(S,): one over the number of sites of the view that each site is on."""
    return (1 / grid.counts)[grid.views]
