"""The number of steps of a training and its learning rate; it imports no torch, since settings make it."""

from __future__ import annotations

from dataclasses import dataclass

STILL, COOLING = 0.005, 0.05  # see `Schedule.patience`


@dataclass(frozen=True)
class Schedule:
    """The number of steps and the learning rate.

    Attributes:
        steps: optimiser steps in all, unless training ends early.
        rate: Adam's highest learning rate.
        warmup: steps of linear rise to it; after them the rate falls to zero by a cosine.
        weight_decay: weight decay of matrices and kernels only, decoupled (AdamW).
        checkpoints: steps between two checkpoints, and between two rows of the log.
        patience: window of early stopping, as a share of the steps; 0 never stops early. The means of the loss, and of
            the effective rank where it is measured, are compared between the last window and the one before it. Once
            no mean differs by more than `STILL` of the first value, the rate falls to zero within `COOLING` of the
            steps, and training ends. The decision uses the log alone, so a resumed run ends at the same step.
        plain: Adam as older papers use it: at a constant rate, weight decay added to the gradients of all weights.
    """

    steps: int
    rate: float
    warmup: int
    weight_decay: float = 0.0
    checkpoints: int = 20
    patience: float = 0.0
    plain: bool = False

    def end(self, ending: int | None) -> int:
        """The step at which training ends.

        Args:
            ending: the step at which early stopping began; None where it has not.

        Returns:
            Number of steps, at most `steps`.
        """
        return self.steps if ending is None else min(self.steps, ending + max(1, round(COOLING * self.steps)))
