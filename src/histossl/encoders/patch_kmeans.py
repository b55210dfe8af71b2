"""Tiles without labels in, a tile encoder out, in seconds: how much of which small patch of stain a tile holds.

Coates, Lee and Ng (AISTATS 2011): patches of an equal contrast, whitened, and k-means over them; a patch says of each
centre by how much it is nearer than the mean of all. We differ where tissue does: patches are of the amount of one
stain (fixed hematoxylin and eosin, Ruifrok and Johnston 2001) at several sizes, and are averaged over the whole tile,
since tissue has no top. Contrast is taken out before anything is learned, and with it most of the stain that tells one
laboratory's slides, or one patient's, from another's.
"""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from histossl.core.errors import SettingsError
from histossl.encoders.augment import STAINS
from histossl.encoders.settings import SCALES, PatchKMeansSettings
from histossl.encoders.tile_stream import TileStream

PATCH = 7
"""Pixels of a patch's side: 3.5, 7 and 14 µm at 0.5 µm a pixel, from a piece of chromatin to a nucleus and its ring."""
STEP = 2  # pixels between patches
PARTS = 24  # principal axes of patches that are kept: the finest of the 49 are noise and JPEG
MILD = 0.1  # of the mean variance, added before whitening, so that faint axes are not blown up
CACHED = 3000  # patches whose distances to all words stay in a processor's cache
FLOOR = 0.3  # of the usual contrast, added before contrast is taken out, so that glass does not become tissue


class PatchKMeans(nn.Module):
    """(B, 3, H, W) RGB in [0, 1] -> (B, 6 count): of hematoxylin and eosin, each at three sizes, what patches are like.

    Args:
        count: words of each stain and size.
    """

    filters: Tensor
    shifts: Tensor
    floors: Tensor
    centres: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        kinds = 2 * len(SCALES)
        self.register_buffer("filters", torch.zeros(kinds, PARTS, 1, PATCH, PATCH))
        self.register_buffer("shifts", torch.zeros(kinds, PARTS))
        self.register_buffer("floors", torch.ones(kinds))
        self.register_buffer("centres", torch.zeros(kinds, count, PARTS))
        inverse = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))[:, :2]
        self.register_buffer("unmixing", torch.from_numpy(inverse.T.astype(np.float32)), persistent=False)
        self.unmixing: Tensor
        self.dim = kinds * count

    def planes(self, tiles: Tensor) -> list[Tensor]:
        """The amounts of each stain at each size.

        Args:
            tiles: (B, 3, H, W) RGB in [0, 1].

        Returns:
            A plane (B, 1, H // size, W // size) float32 for each size of hematoxylin, then for each of eosin.

        Raises:
            SettingsError: the tiles are smaller than the largest patch.
        """
        least = PATCH * max(SCALES)
        if min(tiles.shape[2:]) < least:
            what = f"tiles of {tiles.shape[3]} x {tiles.shape[2]} px are too small for visual words"
            raise SettingsError(what, f"--tile.px {least} or more, or --encoder random")
        amounts = torch.einsum("sc,bchw->bshw", self.unmixing, -torch.log(tiles.float().clamp(min=1 / 256)))
        sizes = [amounts if scale == 1 else _box_means(amounts, scale, scale) for scale in SCALES]
        return [size[:, stain : stain + 1] for stain in (0, 1) for size in sizes]

    def forward(self, tiles: Tensor) -> Tensor:
        """The features of tiles.

        Args:
            tiles: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, 6 count) float32.

        Raises:
            SettingsError: the tiles are smaller than the largest patch.
        """
        return self.described(tiles)[0]

    def described(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """What words say of tiles, and what they divide out.

        Args:
            tiles: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, 6 count) words, and (B, 36) plain numbers: means and deviations of the three channels' densities, then
            of every stain and size the mean and deviation of the patches' means, the mean and deviation of the
            logarithm of their contrasts, and the mean of their contrasts.
        """
        density = -torch.log(tiles.float().clamp(min=1 / 256))
        found, plain = [], list(_mean_and_deviation(density))
        for k, plane in enumerate(self.planes(tiles)):
            mean, square = _box_means(torch.cat([plane, plane * plane], 1), PATCH, STEP).split(1, 1)
            deviation = (square - mean * mean).clamp_(min=0).sqrt_()
            contrast = deviation + self.floors[k]
            means, deviations = _mean_and_deviation(torch.cat([mean, contrast.log()], 1))
            plain += [means, deviation.mean((2, 3)), deviations]
            patches = F.conv2d(plane, self.filters[k], stride=STEP).div_(contrast).flatten(2)
            found.append(_nearness(patches, self.centres[k] + self.shifts[k]))
        return torch.cat(found, 1), torch.cat(plain, 1)


def _mean_and_deviation(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, h, w) -> (B, C) and (B, C)."""
    mean = maps.mean((2, 3), keepdim=True)
    return mean[..., 0, 0], (maps - mean).square_().mean((2, 3)).sqrt_()


def _box_means(maps: Tensor, side: int, step: int) -> Tensor:
    """(B, C, h, w) -> the means of boxes `side` wide, `step` apart; two matrix products are faster than pooling."""
    # While a graph is made, tensors have no values, and none of them may stay in the cache.
    boxes = _boxes.__wrapped__ if torch.compiler.is_exporting() else _boxes
    rows, columns = (boxes(n, side, step, maps.device) for n in maps.shape[2:])
    return rows @ maps @ columns.T


@functools.lru_cache(maxsize=64)
def _boxes(length: int, side: int, step: int, device: torch.device) -> Tensor:
    """(boxes, length): the weights of the means of boxes along one axis."""
    start = torch.arange((length - side) // step + 1, device=device)[:, None] * step
    place = torch.arange(length, device=device)
    return ((start <= place) & (place < start + side)).float() / side


def _nearness(patches: Tensor, centres: Tensor) -> Tensor:
    """(B, PARTS, n) patches -> (B, count): by how much each word is nearer than the mean of all, on average."""
    found, lengths = [], (centres * centres).sum(1, keepdim=True)
    # So few at once that the distances to all words stay in the processor's cache. A graph for ONNX takes all tiles at
    # once, since it has no number of them.
    for part in [patches] if torch.compiler.is_exporting() else patches.split(max(1, CACHED // patches.shape[2])):
        squares = torch.baddbmm((part * part).sum(1, keepdim=True), (-2 * centres).expand(part.shape[0], -1, -1), part)
        far = squares.add_(lengths).clamp_(min=0).sqrt_()
        mean = far.mean(1, keepdim=True)
        found.append(mean.mean(2) - torch.minimum(far, mean).mean(2))
    return torch.cat(found)


def learn_patch_kmeans(stream: TileStream, settings: PatchKMeansSettings) -> PatchKMeans:
    """Learn visual words from the tiles of a stream.

    Args:
        stream: made with `settings.plan()`.
        settings: of the words.

    Returns:
        The words, on the CPU.

    Raises:
        SettingsError: the tiles are too small.
        TrainingError: tiles cannot be read.
    """
    words, rng = PatchKMeans(settings.count), np.random.default_rng([settings.seed, 3])
    drawn: list[list[NDArray[np.float32]]] = [[] for _ in words.floors]
    each = -(-settings.patches // (stream.plan.steps * stream.plan.batch))
    for step in range(stream.plan.steps):
        tiles = stream(step).permute(0, 3, 1, 2).float() / 255
        for kept, plane in zip(drawn, words.planes(tiles), strict=True):
            kept.append(_patches(plane[:, 0].numpy(), each, rng))
    for k, kept in enumerate(drawn):
        _learn(words, k, np.concatenate(kept), settings.seed)
    return words


def _patches(planes: NDArray[np.float32], each: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(B, h, w) -> (B each, PATCH²), patches at random places."""
    windows = np.lib.stride_tricks.sliding_window_view(planes, (PATCH, PATCH), (1, 2))
    size = len(planes), each
    tile = np.arange(len(planes))[:, None]
    found = windows[tile, rng.integers(windows.shape[1], size=size), rng.integers(windows.shape[2], size=size)]
    return found.reshape(-1, PATCH**2)


def _learn(words: PatchKMeans, k: int, patches: NDArray[np.float32], seed: int) -> None:
    """Contrast, axes and words of one stain and size."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():  # sums of several threads come in no fixed order
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different patches than words: of tiles of glass
        flat = patches.astype(np.float64) - patches.mean(1, dtype=np.float64, keepdims=True)
        contrast = flat.std(1)
        floor = max(FLOOR * float(np.median(contrast)), 1e-4)
        flat /= contrast[:, None] + floor
        mean = flat.mean(0)
        values, axes = np.linalg.eigh(np.cov((flat - mean).T))
        scale = 1 / np.sqrt(values[-PARTS:] + max(MILD * values.mean(), 1e-12))
        whitening = (axes[:, -PARTS:] * scale).T
        whitening -= whitening.mean(1, keepdims=True)  # of a patch without its mean as of the patch
        rows = (flat - mean) @ whitening.T
        found = KMeans(len(words.centres[k]), n_init=1, max_iter=30, random_state=seed)  # type: ignore[arg-type]
        found.fit(rows.astype(np.float32))
    words.floors[k] = floor
    words.filters[k] = torch.from_numpy(whitening.reshape(PARTS, 1, PATCH, PATCH).astype(np.float32))
    words.shifts[k] = torch.from_numpy((whitening @ mean).astype(np.float32))
    words.centres[k] = torch.from_numpy(np.asarray(found.cluster_centers_, np.float32))
