"""The log of a training: log.csv, TensorBoard, and the loggers of other tools that the environment names."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar
from torch import Tensor

from histossl.core import atomic
from histossl.training.loggers import Loggers


class Log:
    """Writes means over the steps since the last row to log.csv, to TensorBoard, and to `Loggers`.

    Args:
        folder: of log.csv, and of the folder `tensorboard`.
        start: the step at which training resumes; later rows of an interrupted run are dropped.
        writes: whether this process writes; the others only keep the rows in memory.
    """

    def __init__(self, folder: Path, start: int, writes: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.csv"
        self.board = _Board(folder / "tensorboard", start) if writes else None
        self.others = Loggers(folder) if writes else None
        self.rows = self._kept(start)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def _kept(self, start: int) -> list[dict[str, str]]:
        if not start or not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one step; they stay on the device, since copying each would stall it.

        Args:
            values: name -> scalar.
        """
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.count += 1

    def write(self, step: int, rate: float, more: Mapping[str, Tensor]) -> dict[str, float]:
        """Write one row: the means over the steps since the last row.

        Args:
            step: number of steps done.
            rate: learning rate of this step.
            more: name -> scalar, measured once at this step.

        Returns:
            The row: `step`, `rate`, the means, and `more`.
        """
        row = {"step": step, "rate": rate, **{name: float(value) / self.count for name, value in self.sums.items()}}
        row |= {name: float(value) for name, value in more.items()}
        self.sums, self.count = {}, 0
        self.rows.append({name: repr(value) for name, value in row.items()})
        if self.board is None:
            return row
        with atomic.whole(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        self.board.write(row)
        if self.others is not None:
            self.others.write(row)
        return row

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush TensorBoard's file, and end the runs of other tools."""
        try:
            if self.board is not None:
                self.board.close()
        finally:
            if self.others is not None:
                self.others.close(whole=kind is None)


class _Board:
    """TensorBoard's file of a training.

    Not tensorboardX's `SummaryWriter`: its thread ends in a traceback where the disk is full, and what is added after
    that waits for ever.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventsWriter(str(folder / "events"))
        self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))  # hides later rows of an earlier run

    def write(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._add(step=int(row["step"]), summary=scalar(name, value))
        self.events.flush()

    def close(self) -> None:
        self.events.close()

    def _add(self, **what: object) -> None:
        self.events.write_event(Event(wall_time=time.time(), **what))
