"""Batch norms over the occupied sites of maps."""

from __future__ import annotations

from torch import Tensor, nn

from histossl.training.distributed import is_distributed, norm_together


class SiteNorm(nn.BatchNorm1d):
    """Batch norm over the sites of all processes; with fewer than two sites, training uses the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise rows.

        Args:
            input: (N, C) floating, of this process.

        Returns:
            (N, C).
        """
        if self.training and is_distributed():
            return norm_together(self, input)
        if self.training and len(input) < 2:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
            )
        return super().forward(input)


class OneScale(SiteNorm):
    """Brings rows to mean 0 and their columns' mean variance to 1: columns keep their proportions.

    Args:
        columns: numbers of a row.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(columns, affine=False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise rows.

        Args:
            input: (N, C) floating, of this process.

        Returns:
            (N, C).
        """
        found = super().forward(input)
        assert self.running_var is not None
        variance = self.running_var.detach()
        proportions = ((variance + self.eps) / (variance.mean() + self.eps)).sqrt()
        return found * proportions.to(found.dtype)
