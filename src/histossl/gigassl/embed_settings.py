"""How a slide's vector is made."""

from __future__ import annotations

from dataclasses import dataclass

from histossl.core.errors import SettingsError


@dataclass(frozen=True)
class EmbedSettings:
    """How a slide's vector is made.

    Args:
        views: R, random views of un-augmented tiles that are averaged; 0 is one pass over all tiles, and so is any R
            where a view holds all tiles of a slide.
        seed: of the views.
        precision: float32, bfloat16 or auto (bfloat16 where the hardware multiplies it natively): the latter two are
            faster there, and vectors differ between machines in the third digit.
    """

    views: int = 50
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.views < 0:
            raise SettingsError(f"embed.views must not be negative, got {self.views}")
        if self.precision not in ("float32", "bfloat16", "auto"):
            raise SettingsError(f"embed.precision is {self.precision!r}", "it must be float32, bfloat16 or auto")
