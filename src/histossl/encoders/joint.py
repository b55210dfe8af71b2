"""The default tile encoder: visual words joined with contrast and colour, learned without labels in a minute.

The directions in which another stain would move a slide are projected out, and what is left is seen along its first
principal axes.

Words alone cannot tell tissues that differ in contrast; contrast alone cannot tell textures. The stain is told apart
from the tissue by staining tiles anew: what a change of stain does to the mean of some tiles of a slide are nuisance
directions (nuisance attribute projection, Solomonoff, Campbell and Boardman, ICASSP 2005), and the strongest of them
are projected out of every feature. Most of the words' numbers say the same: the few principal axes of tiles hold nearly
all variance, and evened out by the root of it they are better neighbours than hundreds of numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torch import Tensor, nn

from histossl.encoders.augment import STAINS
from histossl.encoders.patch_kmeans import PatchKMeans, learn_patch_kmeans
from histossl.encoders.settings import PLAIN, JointSettings
from histossl.encoders.tile_stream import TileStream

FEW = 4  # tiles that pass at once, so that their maps stay in the processor's cache


class Joint(nn.Module):
    """(B, 3, H, W) RGB in [0, 1] -> (B, axes): words, contrast and colour along their principal axes.

    Args:
        count: words of each stain and size.
        axes: numbers of a feature, at most.
    """

    shift: Tensor
    scale: Tensor
    axes: Tensor

    def __init__(self, count: int, axes: int) -> None:
        super().__init__()
        self.words = PatchKMeans(count)
        inside = self.words.dim + PLAIN
        self.dim = min(axes, inside)
        self.register_buffer("shift", torch.zeros(inside))
        self.register_buffer("scale", torch.ones(inside))
        self.register_buffer("axes", torch.eye(inside)[:, : self.dim].clone())

    def forward(self, tiles: Tensor) -> Tensor:
        """Features without the directions of the stain; their mean variance over the tiles learned from is 1.

        Args:
            tiles: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, dim) float32, the principal axes mixed evenly.

        Raises:
            SettingsError: the tiles are smaller than the largest patch.
        """
        return self.balanced(tiles) @ self.axes

    def balanced(self, tiles: Tensor) -> Tensor:
        """Words, then contrast and colour, both sides of variance 1; they still hold the directions of the stain.

        Args:
            tiles: (B, 3, H, W) RGB in [0, 1].

        Returns:
            (B, 6 count + 36) float32.

        Raises:
            SettingsError: the tiles are smaller than the largest patch.
        """
        return (torch.cat(self.words.described(tiles), 1) - self.shift) * self.scale

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Joint:
        """The encoder that its weights were saved of.

        Args:
            weights: its tensors by name; those of before principal axes had all numbers and the stain's directions.

        Returns:
            The encoder, in evaluation mode.

        Raises:
            KeyError, IndexError, RuntimeError: a tensor is missing or of another shape.
        """
        weights = dict(weights)
        if "stain" in weights:
            stain = weights.pop("stain")
            weights["axes"] = torch.eye(len(stain)) - stain @ stain.T
        joint = cls(weights["words.centres"].shape[1], weights["axes"].shape[1])
        joint.load_state_dict(weights)
        return joint.eval()


@torch.inference_mode()
def learn_joint(stream: TileStream, settings: JointSettings) -> Joint:
    """Learn the encoder from the tiles of a stream.

    Args:
        stream: made with `settings.words.plan()`.
        settings: of the encoder.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        SettingsError: the tiles are too small.
        TrainingError: tiles cannot be read.
    """
    joint, rng = Joint(settings.words.count, settings.axes), np.random.default_rng([settings.words.seed, 4])
    joint.words.load_state_dict(learn_patch_kmeans(stream, settings.words).state_dict())
    rows, moved = [], []
    for tiles in _slides(stream):
        plain = _encoded(joint, tiles)
        rows.append(plain)
        if settings.nuisances:
            again = restain(tiles, draw_stain(settings, rng))
            moved.append((_encoded(joint, again) - plain).mean(0))
    every = torch.cat(rows).double()
    joint.shift.copy_(every.mean(0))
    # What no tile differs in stays zero. Each side has variance 1 in all, however many numbers it has.
    spread, sides = every.std(0, correction=0), [joint.words.dim] * joint.words.dim + [PLAIN] * PLAIN
    joint.scale.copy_(torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0) / torch.tensor(sides).sqrt())
    every = (every - every.mean(0)) * joint.scale
    weights = torch.ones(every.shape[1], dtype=torch.float64)
    weights[joint.words.dim :] = settings.plain
    kept = torch.diag(weights)
    if moved:
        stain = _directions(torch.stack(moved).double() * joint.scale, settings.nuisances)
        kept = (torch.eye(len(stain)) - stain @ stain.T) @ kept
    joint.axes.copy_(kept @ _even_axes(every @ kept, joint.dim))
    return joint.eval()


def _even_axes(rows: Tensor, count: int) -> Tensor:
    """(D, count): the principal axes of rows (n, D), evened out by the root of their variance, whose mean is then 1.

    A discrete cosine transform then mixes them, which changes no distance: all columns vary alike, so that who
    standardises them does not make the narrowest axis as loud as the widest.
    """
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # Of fewer tiles than axes the last ones hold rounding alone, which must not be blown up.
    varies = values > 1e-6 * values[0].clamp(min=1e-12)
    gains = torch.where(varies, values.clamp(min=1e-30) ** -0.25, 0)
    gains = gains / (values.clamp(min=0) * gains.square()).mean().sqrt().clamp(min=1e-12)
    return _signed(vectors) * gains @ torch.from_numpy(dct(np.eye(len(gains)), norm="ortho"))


def _directions(moved: Tensor, count: int) -> Tensor:
    """(D, count) orthonormal: in which rows (n, D) are longest; zero where they have no further one."""
    values, vectors = torch.linalg.eigh(moved.T @ moved)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    return torch.where(values > 1e-9 * values[0].clamp(min=1e-12), _signed(vectors), 0)


def _signed(vectors: Tensor) -> Tensor:
    """Each column with the sign that makes its largest entry positive: the sign of an axis is nobody's choice."""
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def _slides(stream: TileStream) -> Iterator[Tensor]:
    """(n, 3, H, W) in [0, 1]: tiles of one slide after the other, no more of them than the slides have."""
    for step in range(min(stream.plan.steps, -(-stream.total // stream.plan.batch))):
        tiles = stream(step).permute(0, 3, 1, 2).float() / 255
        each = max(2, stream.plan.batch // stream.plan.slides)
        yield from tiles.split(each)


def _encoded(joint: Joint, tiles: Tensor) -> Tensor:
    return torch.cat([joint.balanced(part) for part in tiles.split(FEW)])


def draw_stain(settings: JointSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random change of stain: an affine map of optical densities.

    Args:
        settings: with the standard deviations `stain` and `tint`.
        rng: source of the numbers.

    Returns:
        (3, 4) float32: the matrix for a column of RGB densities, and what is added.
    """
    s = settings.stain
    factors = np.diag(np.exp(rng.normal(0, [s, s, s / 2])))
    mixed = (np.linalg.inv(STAINS) @ factors @ STAINS).T * np.exp(rng.normal(0, s / 2))
    return np.column_stack([mixed, rng.normal(0, settings.tint, 3)]).astype(np.float32)


def restain(tiles: Tensor, drawn: NDArray[np.float32]) -> Tensor:
    """Stain tiles anew, all in one way.

    Args:
        tiles: (B, 3, H, W) float RGB in [0, 1].
        drawn: (3, 4) of `draw_stain`.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    density = -torch.log(tiles.clamp(min=1 / 256))
    density = torch.einsum("ij,bjhw->bihw", torch.from_numpy(drawn[:, :3]), density)
    return torch.exp(-density - torch.from_numpy(drawn[:, 3])[:, None, None]).clamp_(0, 1)
