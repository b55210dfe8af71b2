"""What a slide is made of, in the words of its cohort: the shares of typical tiles and of typical neighbourhoods.

A mean forgets what is rare: a lesion of four tiles in a hundred moves it less than the stain does. A cluster that the
lesion falls into keeps it apart, and its share of the slide is a number of its own: a bag of visual words (Csurka et
al., ECCV workshops 2004) at several scales. The clusters are found by k-means over the cohort, without labels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from histossl.gigassl.encoder_settings import RUNS
from histossl.gigassl.sparse import Grid, SparseMap

SPREAD_FROM = 25_000  # tiles at most that the axes are found from: their number is no more than a few thousand
AXES = 128  # principal axes of the tiles, whitened, in which clusters are looked for: what is rare varies little


class Prototypes(nn.Module):
    """Which prototypes the sites of a map are nearest to.

    Args:
        in_dim: length of a tile's vector.
        count: K, prototypes a clustering.
        scales: how often tiles are averaged with their neighbours (3x3) before, once for each set of clusterings.
        each: whether every number of a tile is first brought to variance 1; otherwise their scales are meant.
        whiten: whether clusters are looked for along whitened principal axes; otherwise in the numbers as they are.
    """

    axes: Tensor
    centres: Tensor

    def __init__(
        self, in_dim: int, count: int, scales: tuple[int, ...] = (1, 2), each: bool = False, whiten: bool = True
    ) -> None:
        super().__init__()
        self.scales, self.each, self.whiten = scales, each, whiten
        axes = min(AXES, in_dim) if whiten else in_dim
        self.register_buffer("axes", torch.zeros(in_dim, axes))
        self.register_buffer("centres", torch.zeros(len(scales), RUNS, count, axes))

    def forward(self, tiles: SparseMap) -> Tensor:
        """The nearest prototype of each clustering.

        Args:
            tiles: a map of S sites with (S, in_dim) features.

        Returns:
            (S, clusterings) int64, numbered through all clusterings.
        """
        found = []
        for rows, runs in zip(self.seen(tiles), self.centres, strict=True):
            for centres in runs:
                nearest = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
                found.append(nearest + len(found) * len(centres))
        return torch.stack(found, 1)

    @property
    def total(self) -> int:
        """Prototypes of all clusterings."""
        return self.centres[..., 0].numel()

    def seen(self, tiles: SparseMap) -> list[Tensor]:
        """In what a site, with its neighbours, differs from the mean of its map, at each scale.

        Args:
            tiles: a map of S sites with (S, in_dim) features.

        Returns:
            (S, axes) float32 for each scale.
        """
        rows = tiles.centred().float() @ self.axes
        found = []
        for times in range(max(self.scales) + 1):
            if times:
                rows = neighbourhood_mean(rows, tiles.grid)
            if times in self.scales:
                found.append(rows)
        return found

    @torch.no_grad()
    def fit(self, maps: Sequence[SparseMap], seed: int = 0) -> None:
        """Find the prototypes of a cohort.

        Args:
            maps: some tiles of each slide where they lie, un-augmented.
            seed: of the k-means.
        """
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        self.axes.copy_(self._axes_of(maps))
        scales = [torch.cat(rows).cpu().numpy() for rows in zip(*map(self.seen, maps), strict=True)]
        count = self.centres.shape[2]
        for rows, runs in zip(scales, self.centres, strict=True):
            # Prototypes that a small cohort has no use for lie where no tile comes.
            runs.fill_(1e6)
            for run, centres in enumerate(runs):
                with threadpool_limits(1), warnings.catch_warnings():  # sums of several threads come in no fixed order
                    warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different places than prototypes
                    found = KMeans(min(count, len(rows)), n_init=1, max_iter=30, random_state=seed * RUNS + run)  # type: ignore[arg-type]
                    found.fit(rows)
                centres[: found.n_clusters] = torch.from_numpy(np.asarray(found.cluster_centers_, np.float32))

    def _axes_of(self, maps: Sequence[SparseMap]) -> Tensor:
        """(in_dim, axes) in which clusters are looked for."""
        if not self.whiten:
            return torch.eye(*self.axes.shape)
        step = -(-sum(len(m.grid) for m in maps) // SPREAD_FROM)
        some = torch.cat([m.centred()[::step].float().cpu() for m in maps])
        return _whitening(some, self.axes.shape[1], self.each)


@dataclass(frozen=True)
class Counted:
    """The prototypes found in a slide.

    Attributes:
        site_of_tile: (N,) int64.
        words: (S, clusterings) int64, the prototypes of each site.
        total: prototypes of all clusterings.
    """

    site_of_tile: Tensor
    words: Tensor
    total: int

    @functools.cached_property
    def roots(self) -> Tensor:
        """(total,) float32: by prototype the root of its share of the sites; their squares add up to 1 a clustering.

        Roots, as of counts, so that a share that grows from nothing to a hundredth weighs like one that grows from a
        tenth to an eighth.
        """
        counts = _counts(self.words.flatten(), self.total)
        return (counts.float() / max(1, len(self.words))).sqrt()

    def tile_shares(self, directions: Tensor) -> Tensor:
        """(N, C): what every tile gives to C linear scores of the roots, `roots @ directions`.

        Of a root all sites of the prototype give an equal part, and of a site all its tiles.

        Args:
            directions: (total, C).
        """
        each = directions / self.roots.clamp(min=1e-12)[:, None] / len(self.words)
        scores = torch.stack([each[column] for column in self.words.T]).sum(0)
        every = torch.arange(len(self.site_of_tile), device=scores.device)
        return shared_out(scores, every, self.site_of_tile, len(every))


def shared_out(scores: Tensor, tiles: Tensor, sites: Tensor, count: int) -> Tensor:
    """Hand each site's scores (S, C) to the tiles under it in equal parts, (count, C).

    Args:
        scores: (S, C) by site.
        tiles: (P,) int64, the tile of each pair of a tile and a site above it.
        sites: (P,) int64, the site of each pair.
        count: number of tiles.
    """
    under = _counts(sites, len(scores)).to(scores.dtype)
    return scores.new_zeros(count, scores.shape[1]).index_add(0, tiles, (scores / under[:, None])[sites])


def neighbourhood_mean(rows: Tensor, grid: Grid) -> Tensor:
    """The mean of each site's row and the rows of its occupied neighbours in the 3x3 around it.

    Args:
        rows: (S, C), a row a site.
        grid: of the S sites.

    Returns:
        (S, C).
    """
    pairs = grid.neighbours
    sums = rows.index_add(0, pairs.target, rows.index_select(0, pairs.source))
    counts = _counts(pairs.target, len(rows)) + 1
    return sums / counts[:, None]


def _counts(numbers: Tensor, size: int) -> Tensor:
    """(size,) int64: how often each number occurs. Unlike `torch.bincount`, it does not wait for the GPU."""
    return numbers.new_zeros(size).index_add_(0, numbers, torch.ones_like(numbers))


def _whitening(centred: Tensor, count: int, each: bool) -> Tensor:
    """(D, count): the principal axes of rows (N, D), whose scores have variance 1; so have, if `each`, the features."""
    spread = centred.std(0).clamp(min=1e-6)
    if not each:
        spread = spread.square().mean().sqrt().expand_as(spread)
    scaled = centred / spread
    values, vectors = torch.linalg.eigh((scaled.T @ scaled / max(1, len(scaled) - 1)).double())
    # Where there are fewer tiles than axes the last ones hold rounding alone, which must not be blown up.
    top, axes = values.flip(0)[:count], vectors.flip(1)[:, :count]
    top = top.clamp(min=max(1e-12, 1e-5 * float(top[0])))
    # The sign of an axis is nobody's choice: its largest entry is positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (axes / top.sqrt() / spread[:, None].double()).float()
