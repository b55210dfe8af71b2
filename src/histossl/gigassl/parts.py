"""The parts of a slide's vector, brought to one scale over a cohort without labels, so that none drowns another.

What a part says of slides lies along few directions: its principal axes over the cohort. The rest is noise of which
slides, cells and patches happened to be there, and in a part of hundreds of numbers there is more of it than of
anything else: with 25 labelled slides it decides. So every part is centred over the cohort, seen along its first
principal axes only, evened out among these by a power of their variance, and given a fixed share of the whole. Of
prototypes, axes count less, or not at all, that differ no more than chance (Horn's parallel analysis, Psychometrika
1965): how many do follows the cohort. The result stays in the part's own
columns, whatever a user then does with single columns. All of it is one affine map a part, found once and kept with the
encoder: a new slide is embedded alone, and a tile's share in a linear score stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

LEAST = 4  # axes that stay where there are as many: few slides do not tell chance from the rest


@dataclass(frozen=True)
class Kind:
    """How one part of the vector is brought to scale.

    Attributes:
        weight: root mean square length of the part over the cohort.
        axes: principal axes that are kept, at most.
        power: the variances along them are divided by this power of themselves: 0 leaves them, 1 makes them equal.
        standard: whether the columns are first brought to variance 1, as of counts; otherwise they share one scale.
        beyond: what axes that differ no more than chance are multiplied by: 0 leaves them out, and 1 asks of none.
    """

    weight: float
    axes: int
    power: float
    standard: bool
    beyond: float = 1.0


KINDS = {
    "stage": Kind(1.0, 16, 0.5, False),
    "mean": Kind(0.5, 32, 0.5, False),
    "prototypes": Kind(0.6, 24, 0.0, True, beyond=0.5),
    "stage prototypes": Kind(0.9, 32, 0.5, True, beyond=0.0),
}
"""Chosen on slides composed of real lung tiles, lymphomas and painted slides, see docs/ablation.md."""

CONTRASTED = KINDS | {
    "stage": Kind(0.15, 16, 0.5, False),
    "mean": Kind(1.0, 32, 0.5, False),
    "prototypes": Kind(0.75, 24, 0.0, True, beyond=0.5),
}
"""The same where the stage learns by a contrast of slides: it then adds next to nothing to the mean of the tiles."""


class Part(nn.Module):
    """An affine map of one part, (N, dim) -> (N, dim), through at most `kind.axes` directions; as it is until `fit`.

    Args:
        dim: numbers of the part.
        kind: how it is brought to scale.
    """

    centre: Tensor
    down: Tensor
    up: Tensor
    fitted: Tensor

    def __init__(self, dim: int, kind: Kind) -> None:
        super().__init__()
        self.kind, rank = kind, min(kind.axes, dim)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("down", torch.zeros(dim, rank))
        self.register_buffer("up", torch.zeros(rank, dim))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Encoders may have been made with another number of axes."""
        axes = state_dict.get(prefix + "up")
        if axes is not None and axes.shape[1:] == self.centre.shape:
            self.up, self.down = torch.empty_like(axes), torch.empty_like(axes.T)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, rows: Tensor) -> Tensor:
        """Bring rows of a part to the scale of the cohort; before `fit` they stay as they are.

        Args:
            rows: (N, dim).

        Returns:
            (N, dim) float32 on the CPU once fitted; else `rows`.
        """
        if not self.fitted:
            return rows
        # On the CPU and in double precision: a slide's bytes depend neither on the device nor on its company.
        rows, centre, down, up = (x.cpu().double() for x in (rows, self.centre, self.down, self.up))
        return (((rows - centre) @ down) @ up).float()

    def directions(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of scores of the mapped part, as weights of the part itself.

        Args:
            weights: (dim, C) of C scores.

        Returns:
            (dim, C) weights and the constants (C,) that are added to the scores.
        """
        if not self.fitted:
            return weights, weights.new_zeros(weights.shape[1])
        weights, centre, down, up = (x.cpu().double() for x in (weights, self.centre, self.down, self.up))
        back = down @ (up @ weights)
        return back, -(centre @ back)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Find centre, axes and scale of a cohort; the map gives zeros where the slides do not differ.

        Args:
            rows: (N, dim), a row a slide.
        """
        rows = rows.double().cpu()
        centred = rows - rows.mean(0)
        spread = centred.std(0, correction=0)
        # A column that differs by rounding alone says nothing.
        varies = spread > 1e-5 * rows.abs().amax(0).clamp(min=1e-6)
        unit = spread if self.kind.standard else spread.square().mean().sqrt().expand_as(spread)
        scale = torch.where(varies, 1 / unit.clamp(min=1e-12), 0)
        _, lengths, axes = torch.linalg.svd(centred * scale, full_matrices=False)
        least = 1e-4 * lengths[0].clamp(min=1e-12)
        kept = min(self.down.shape[1], int((lengths > least).sum()), len(rows) - 1)
        certain = kept
        if self.kind.beyond != 1 and kept > LEAST:
            certain = max(LEAST, min(kept, int((lengths > by_chance(centred * scale)).sum())))
            kept = kept if self.kind.beyond else certain
        self.centre.copy_(rows.mean(0))
        self.down.zero_()
        self.up.zero_()
        self.fitted.fill_(True)
        if kept:
            axes, variances = axes[:kept].T, lengths[:kept].square() / len(rows)
            axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # nobody's choice otherwise
            gains = variances ** (-self.kind.power / 2)
            gains[certain:] *= self.kind.beyond
            gains = gains * self.kind.weight / (variances * gains.square()).sum().sqrt()
            self.down[:, :kept] = axes * scale[:, None] * gains
            self.up[:kept] = axes.T


def by_chance(rows: Tensor, times: int = 5) -> Tensor:
    """The largest singular value that rows have if no column goes with another: each column is shuffled by itself.

    Args:
        rows: (N, dim), centred.
        times: that they are shuffled; the mean is taken.

    Returns:
        ().
    """
    chance = torch.Generator().manual_seed(0)
    found = []
    for _ in range(times):
        order = torch.rand(rows.shape, generator=chance, dtype=torch.float64).argsort(0)
        found.append(torch.linalg.matrix_norm(rows.gather(0, order), 2))
    return torch.stack(found).mean()


class Parts(nn.Module):
    """The map of a whole vector, part by part.

    Args:
        lengths: name of each part, in order, and its numbers.
        kinds: how each is brought to scale.
    """

    def __init__(self, lengths: dict[str, int], kinds: dict[str, Kind]) -> None:
        super().__init__()
        self.lengths = lengths
        self.maps = nn.ModuleDict({name: Part(length, kinds[name]) for name, length in lengths.items()})

    def forward(self, rows: Tensor) -> Tensor:
        """Bring vectors to the scale of the cohort, part by part.

        Args:
            rows: (N, d) or (d,), the parts side by side in the order of `lengths`.

        Returns:
            The same shape.
        """
        pieces = rows.split(list(self.lengths.values()), -1)
        return torch.cat([part(piece) for part, piece in zip(self._parts(), pieces, strict=True)], -1)

    def _parts(self) -> list[Part]:
        return [cast(Part, self.maps[name]) for name in self.lengths]

    def directions(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of scores of the mapped vectors, as weights of the vectors before the map.

        Args:
            weights: (d, C) of C scores.

        Returns:
            (d, C) weights and the constants (C,) that are added to the scores.
        """
        pieces = weights.split(list(self.lengths.values()))
        found = [part.directions(piece) for part, piece in zip(self._parts(), pieces, strict=True)]
        return torch.cat([back for back, _ in found]), torch.stack([offset for _, offset in found]).sum(0)

    def fit(self, rows: Tensor) -> None:
        """Find the map of every part.

        Args:
            rows: (N, d), the cohort's vectors, a row a slide.
        """
        for part, piece in zip(self._parts(), rows.split(list(self.lengths.values()), -1), strict=True):
            part.fit(piece)
