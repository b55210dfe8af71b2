"""How fast a stage goes, and what holds it up."""

from __future__ import annotations

import time

_MEMORY = 30.0  # seconds after which what was counts for a third


class Throughput:
    """Counts tiles and seconds, the last half minute's above all.

    Args:
        device: that the network runs on, as it is told to people.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._then = time.monotonic()
        self._tiles = self._seconds = self._waited = self._read = self._cpu = 0.0

    def add(self, tiles: int, waited: float, read: float, cpu: float) -> None:
        """Count a step.

        Args:
            tiles: that it has encoded.
            waited: seconds for the batch.
            read: seconds by the clock that reading it took in a worker.
            cpu: seconds of the processor that reading it took in a worker.
        """
        now = time.monotonic()
        passed, self._then = now - self._then, now
        left = max(0.0, 1 - passed / _MEMORY)
        added = (tiles, passed, waited, read, cpu)
        kept = (self._tiles, self._seconds, self._waited, self._read, self._cpu)
        self._tiles, self._seconds, self._waited, self._read, self._cpu = (
            left * old + new for old, new in zip(kept, added, strict=True)
        )

    @property
    def rate(self) -> float:
        """Tiles a second."""
        return self._tiles / self._seconds if self._seconds else 0.0

    @property
    def limit(self) -> str:
        """What the others wait for: the network's device, the decoding of tiles, or the disk."""
        if self._waited < 0.3 * self._seconds:
            return f"the {self._device} limits"
        return "the disk limits" if self._cpu < 0.5 * self._read else "decoding limits: try more --workers"
