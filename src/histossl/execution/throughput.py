"""What limits a stage."""

from __future__ import annotations

import time

_MEMORY = 30.0  # seconds, time constant of the moving averages


class Throughput:
    """Moving averages of seconds, over about the last half minute.

    Args:
        device: name of the device that the network runs on, for messages.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._then = time.monotonic()
        self._seconds = self._waited = self._read = self._cpu = 0.0

    def add(self, waited: float, read: float, cpu: float) -> None:
        """Count a step.

        Args:
            waited: seconds that it waited for the batch.
            read: seconds that reading the batch took in a worker, by the clock.
            cpu: seconds of processor time of the same.
        """
        now = time.monotonic()
        passed, self._then = now - self._then, now
        left = max(0.0, 1 - passed / _MEMORY)
        added = (passed, waited, read, cpu)
        kept = (self._seconds, self._waited, self._read, self._cpu)
        self._seconds, self._waited, self._read, self._cpu = (
            left * old + new for old, new in zip(kept, added, strict=True)
        )

    @property
    def limit(self) -> str:
        """The bottleneck: the network's device, the decoding of tiles, or the disk."""
        # Reading that spends most of its time off the processor waits for the disk.
        if self._waited < 0.3 * self._seconds:
            return f"the {self._device} limits"
        return "the disk limits" if self._cpu < 0.5 * self._read else "decoding limits: try more --workers"
