"""Augmentations of tiles: all colour changes are one matrix, all geometric changes one resampling.

For slide encoders, all tiles of a view share one augmentation; for tile encoders, every tile has its own.

The domain is that of Giga-SSL (Lazard et al., CVPRW 2023; numbers from its public code): resized crop, flip, rotation,
colour jitter, grayscale, blur. Three things differ from a chain of library operations, so that all colour operations
are one affine map: contrast is relative to a fixed grey instead of each tile's own mean, hue rotates about the grey
axis of RGB instead of in HSV, and values are clipped once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from histossl.encoders.settings import AugmentSettings, TileAugmentSettings
from histossl.training.device import sent

# Rows: hematoxylin, eosin, residual; optical densities of red, green, blue (Ruifrok and Johnston, 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
LUMA = np.array([0.299, 0.587, 0.114])
TISSUE_GREY = 0.7  # the mean grey of stained tissue in a bright field


@dataclass(frozen=True)
class Augmentation:
    """One augmentation, which is applied to every tile of a view.

    Attributes:
        colour: (3, 4) affine map of RGB in [0, 1]; the last column is the offset.
        affine: (2, 3) from output to input positions in [-1, 1], (x, y), as `torch.nn.functional.affine_grid` takes it.
        sigma: of the Gaussian blur in pixels, 0 for none.
    """

    colour: NDArray[np.float32]
    affine: NDArray[np.float32]
    sigma: float


def draw_augmentation(settings: AugmentSettings, rng: np.random.Generator) -> Augmentation:
    """Draw an augmentation from the domain.

    Args:
        settings: of the domain.
        rng: source of the draw; the same state gives the same augmentation.

    Returns:
        The augmentation.
    """
    colour, affine = _draw_colour(settings, rng), _draw_affine(settings, rng)
    sigma = rng.uniform(0.1, 1.0) if rng.random() < settings.blur else 0.0
    return Augmentation(colour.astype(np.float32), affine.astype(np.float32), float(sigma))


def _draw_colour(s: AugmentSettings, rng: np.random.Generator) -> NDArray:
    steps = []
    if rng.random() < s.jitter:
        b, c, f = (1 + rng.uniform(-r, r) for r in (s.brightness, s.contrast, s.saturation))
        steps = [scale_rgb(b), blend(c, TISSUE_GREY), saturate(f), turn_hue(rng.uniform(-s.hue, s.hue))]
        rng.shuffle(steps)
    if rng.random() < s.grayscale:
        steps.append(saturate(0.0))
    total = np.eye(4)
    for step in steps:
        total = step @ total
    return total[:3]


def scale_rgb(factor: float) -> NDArray:
    """A change of brightness.

    Args:
        factor: 1 changes nothing, 0 is black.

    Returns:
        (4, 4) map of (r, g, b, 1).
    """
    return np.diag([factor, factor, factor, 1.0])


def blend(factor: float, grey: float) -> NDArray:
    """A change of contrast.

    Args:
        factor: 1 changes nothing, 0 is plain grey.
        grey: the value that stays, in [0, 1].

    Returns:
        (4, 4) map of (r, g, b, 1).
    """
    out = scale_rgb(factor)
    out[:3, 3] = (1 - factor) * grey
    return out


def saturate(factor: float) -> NDArray:
    """A change of saturation.

    Args:
        factor: 1 changes nothing, 0 is grayscale by the Rec. 601 luma.

    Returns:
        (4, 4) map of (r, g, b, 1).
    """
    out = np.eye(4)
    out[:3, :3] = factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))
    return out


def turn_hue(turn: float) -> NDArray:
    """A change of hue: a rotation about the grey axis, which keeps greys but not the luma of colours.

    Args:
        turn: share of the full circle.

    Returns:
        (4, 4) map of (r, g, b, 1).
    """
    angle = 2 * math.pi * turn
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    out = np.eye(4)
    out[:3, :3] += math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return out


def _draw_affine(s: AugmentSettings, rng: np.random.Generator) -> NDArray:
    area, aspect = rng.uniform(s.crop, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    half = np.minimum(1.0, [math.sqrt(area * aspect), math.sqrt(area / aspect)])
    centre = rng.uniform(-1, 1, 2) * (1 - half)
    angle = rng.uniform(0, 2 * math.pi) if s.rotate else 0.0
    mirror = -1.0 if rng.random() < s.flip else 1.0
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    # The crop lies in the tile and is turned about its centre; `augment` mirrors the tile where a corner leaves it.
    return np.column_stack([turn @ np.diag(half) @ np.diag([mirror, 1.0]), centre])


def augment(tiles: Tensor, t: Augmentation, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply one augmentation to a batch of tiles: one resampling, then one convolution for colours and blur.

    Args:
        tiles: (B, H, W, 3) uint8.
        t: the augmentation, the same for all tiles.
        dtype: of the convolution and the result: that of the encoder.

    Returns:
        (B, 3, H, W) in [0, 1], channels-last in memory.
    """
    b, h, w, _ = tiles.shape
    kernel = sent(torch.from_numpy(colour_blur_kernel(t)), tiles.device).to(dtype)
    margin = kernel.shape[-1] // 2
    x = tiles.permute(0, 3, 1, 2).float()  # bfloat16 would round the interpolated values
    x = F.grid_sample(
        x, _grid(t, h, w, margin, tiles.device).expand(b, -1, -1, -1), "bilinear", "reflection", align_corners=False
    )
    x = x.to(dtype, memory_format=torch.channels_last)
    offset = sent(torch.from_numpy(t.colour[:, 3]), tiles.device).to(dtype)
    return F.conv2d(x, kernel.to(memory_format=torch.channels_last), offset).clamp_(0, 1)


def colour_blur_kernel(t: Augmentation) -> NDArray[np.float32]:
    """Combine colour and blur to the kernel of one convolution.

    Args:
        t: the augmentation; the offset of its colour map is not part of the kernel.

    Returns:
        (3, 3, 5, 5), or (3, 3, 1, 1) without blur, float32, for values in [0, 255].
    """
    spot = np.ones((1, 1))
    if t.sigma > 0:
        line = np.exp(-(np.arange(-2, 3) ** 2) / (2 * t.sigma**2))
        spot = np.outer(line, line) / line.sum() ** 2
    return (t.colour[:, :3, None, None] * spot / 255).astype(np.float32)


def _grid(t: Augmentation, h: int, w: int, margin: int, device: torch.device) -> Tensor:
    """Input position of each output pixel; with `margin` pixels on every side, so that the blur has real neighbours."""
    y = (torch.arange(-margin, h + margin, device=device) * 2 + 1) / h - 1
    x = (torch.arange(-margin, w + margin, device=device) * 2 + 1) / w - 1
    affine = sent(torch.from_numpy(t.affine), device)
    ones = torch.ones(1, 1, device=device)
    points = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None], ones), dim=-1)
    return (points @ affine.T)[None]


def to_float(tiles: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert tiles without augmentation.

    Args:
        tiles: (B, H, W, 3) uint8.
        dtype: of the result.

    Returns:
        (B, 3, H, W) in [0, 1], channels-last in memory.
    """
    return tiles.permute(0, 3, 1, 2).to(dtype).div_(255)


def draw_tile_augmentations(s: TileAugmentSettings, count: int, px: int, rng: np.random.Generator) -> NDArray:
    """Draw an augmentation for each of some tiles.

    Args:
        s: the domain.
        count: number of tiles.
        px: side of the tiles in pixels.
        rng: source of the draws.

    Returns:
        (count, 31) float32: the affine maps of positions (6), of optical density (12) and of colour (12), and the
        strength of the blur in [0, 1].
    """
    return np.stack([_draw_one(s, px, rng) for _ in range(count)]).astype(np.float32)


def _draw_one(s: TileAugmentSettings, px: int, rng: np.random.Generator) -> NDArray:
    half = min(1.0, view_side(s, px) / px * s.zoom ** rng.uniform(-1, 1))
    centre = rng.uniform(-1, 1, 2) * (1 - half)
    turn = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), rng.integers(4)) @ np.diag([rng.choice([-1, 1]), 1])
    affine = np.column_stack([half * turn, centre])
    factors = np.diag(1 + rng.uniform(-s.stain, s.stain, 3))
    # Densities are amounts of stain times `STAINS`: to amounts, scaled, and back; transposed for pixels as columns.
    density = np.column_stack([(np.linalg.inv(STAINS) @ factors @ STAINS).T, rng.uniform(-s.tint, s.tint, 3)])
    chain = AugmentSettings(
        jitter=s.jitter, brightness=s.colour, contrast=s.colour, saturation=s.colour, hue=s.colour / 4,
        grayscale=s.grayscale,
    )  # fmt: skip
    blur = rng.random() if rng.random() < s.blur else 0.0
    return np.concatenate([affine.ravel(), density.ravel(), _draw_colour(chain, rng).ravel(), [blur]])


def view_side(s: TileAugmentSettings, px: int) -> int:
    """The side of a view.

    Args:
        s: the domain.
        px: side of the tiles in pixels.

    Returns:
        Pixels, at least 1.
    """
    return min(s.view, max(1, px * 3 // 4))


def augment_each(tiles: Tensor, drawn: Tensor, side: int) -> Tensor:
    """Apply its own augmentation to every tile.

    Args:
        tiles: (B, H, W, 3) uint8.
        drawn: (B, 31) float32, from `draw_tile_augmentations`.
        side: of the views in pixels.

    Returns:
        (B, 3, side, side) float32 in [0, 1], channels-last in memory.
    """
    affine, density, colour = (drawn[:, a:b].unflatten(1, (-1, n)) for a, b, n in ((0, 6, 3), (6, 18, 4), (18, 30, 4)))
    grid = F.affine_grid(affine, [len(tiles), 3, side, side], align_corners=False)
    x = F.grid_sample(tiles.permute(0, 3, 1, 2).float(), grid, "bilinear", "reflection", align_corners=False)
    x = x.flatten(2)
    # To optical density and back with 1 added to each value, since the logarithm of 0 is infinite.
    od = torch.baddbmm(density[:, :, 3:], density[:, :, :3], torch.log((x + 1) / 256), beta=-1)
    x = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], od.exp_().mul_(256 / 255).sub_(1 / 255).clamp_(0, 1))
    x = x.clamp_(0, 1).unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)
    spot = torch.tensor([1.0, 2.0, 1.0], device=x.device)  # sigma 0.7; applied twice, sigma 1
    kernel = (spot[:, None] * spot / 16).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, groups=3)
    soft = F.conv2d(F.pad(soft, (1, 1, 1, 1), "reflect"), kernel, groups=3)
    return torch.lerp(x, soft, drawn[:, 30, None, None, None])
