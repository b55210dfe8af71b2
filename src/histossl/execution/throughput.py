"""How fast a stage runs, and what limits it."""

from __future__ import annotations

import time

_MEMORY = 30.0  # seconds, time constant of the moving averages


class Throughput:
    """Moving averages of tiles and seconds, over about the last half minute.

    Args:
        device: name of the device that the network runs on, for messages.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._then = time.monotonic()
        self._tiles = self._seconds = self._waited = self._read = self._cpu = 0.0

    def add(self, tiles: int, waited: float, read: float, cpu: float) -> None:
        """Count a step.

        Args:
            tiles: number of tiles that it encoded.
            waited: seconds that it waited for the batch.
            read: seconds that reading the batch took in a worker, by the clock.
            cpu: seconds of processor time of the same.
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
        """Tiles per second."""
        return self._tiles / self._seconds if self._seconds else 0.0

    @property
    def limit(self) -> str:
        """The bottleneck: the network's device, the decoding of tiles, or the disk."""
        # Reading that spends most of its time off the processor waits for the disk.
        if self._waited < 0.3 * self._seconds:
            return f"the {self._device} limits"
        return "the disk limits" if self._cpu < 0.5 * self._read else "decoding limits: try more --workers"
