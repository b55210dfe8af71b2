"""The one training loop: a task that gives its loss, a batch for every step, a rate for every step."""

from __future__ import annotations

import csv
import logging
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from histossl import store
from histossl.console import progress_bar
from histossl.errors import StudyError, TrainingError


@dataclass(frozen=True)
class Schedule:
    """How long, how fast.

    Attributes:
        steps: optimiser steps in all.
        rate: Adam's highest learning rate.
        warmup: steps of linear rise to it; a cosine leads from there to zero.
        weight_decay: on matrices and kernels only, decoupled (AdamW).
        checkpoints: steps between two checkpoints; the log is written as often.
    """

    steps: int
    rate: float
    warmup: int
    weight_decay: float = 0.0
    checkpoints: int = 20


def rate_at(step: int, schedule: Schedule) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine to zero."""
    if step < schedule.warmup:
        return schedule.rate * (step + 1) / schedule.warmup
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def optimiser(task: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW; batch norms and biases do not decay."""
    decaying = [p for p in task.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in task.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.rate)


def fit(
    task: nn.Module,
    batch_of: Callable[[int], Any],
    schedule: Schedule,
    logs: Path,
    fingerprint: str,
    device: str = "cpu",
    precision: str = "float32",
) -> None:
    """Train `task` in place; a run that was killed goes on from its last checkpoint and ends with the same bytes.

    Args:
        task: forward(batch) -> (loss, gauges): a scalar and a dictionary of scalars to log.
        batch_of: step -> batch, a pure function, so that a resumed run sees what an undisturbed one would have seen;
            called one step ahead in a thread. Tensors in it move to the device.
        schedule: how long and how fast.
        logs: a folder for log.csv, TensorBoard's files and checkpoint.pt, which goes when training is over.
        fingerprint: of all that makes this run; a checkpoint of another one is refused.
        device: cpu or cuda.
        precision: float32 or bfloat16 (weights stay float32, products are rounded).

    Raises:
        TrainingError: a loss is not finite.
        StudyError: the checkpoint is of other settings.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces what was asked for
    mixed = "bf16-mixed" if precision == "bfloat16" else "32-true"
    fabric = Fabric(accelerator="cuda" if device.startswith("cuda") else "cpu", devices=1, precision=mixed)
    adam = optimiser(task, schedule)
    checkpoint = logs / "checkpoint.pt"
    start = _resume(checkpoint, task, adam, fingerprint)
    model, opt = fabric.setup(task, adam)
    log = Log(logs, start)
    model.train()
    with ThreadPoolExecutor(1) as ahead, progress_bar("training", schedule.steps, start) as bar:
        coming = ahead.submit(batch_of, start) if start < schedule.steps else None
        for step in range(start, schedule.steps):
            assert coming is not None
            batch = coming.result()
            coming = ahead.submit(batch_of, min(step + 1, schedule.steps - 1))
            for group in opt.param_groups:
                group["lr"] = rate_at(step, schedule)
            loss, gauges = model(fabric.to_device(batch))
            fabric.backward(loss)
            opt.step()
            opt.zero_grad(set_to_none=True)
            log.add({"loss": loss.detach(), **gauges})
            bar.advance(1)
            if (step + 1) % schedule.checkpoints == 0 or step + 1 == schedule.steps:
                row = log.write(step + 1, rate_at(step, schedule))
                if not math.isfinite(row["loss"]):
                    raise TrainingError(f"the loss of step {step + 1} is {row['loss']}", "lower the rate")
                bar.say(f"loss {row['loss']:.3f}")
                _save(checkpoint, task, adam, step + 1, fingerprint)
    log.close()


def end_of_training(logs: Path) -> None:
    """Drop the checkpoint, once what was trained stands."""
    (logs / "checkpoint.pt").unlink(missing_ok=True)


def _save(path: Path, task: nn.Module, adam: torch.optim.Optimizer, step: int, fingerprint: str) -> None:
    state = {"task": task.state_dict(), "optimiser": adam.state_dict(), "step": step, "fingerprint": fingerprint}
    with store.whole(path) as part:
        torch.save(state, part)


def _resume(path: Path, task: nn.Module, adam: torch.optim.Optimizer, fingerprint: str) -> int:
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise StudyError(f"{path}: not a checkpoint ({error})", "remove it to start training anew") from error
    if state["fingerprint"] != fingerprint:
        raise StudyError(f"{path}: of a training with other settings or slides", "remove it to start training anew")
    task.load_state_dict(state["task"])
    adam.load_state_dict(state["optimiser"])
    return int(state["step"])


class Log:
    """Means over the steps since the last row, to log.csv and to TensorBoard.

    Args:
        folder: of both.
        start: the step at which training goes on; later rows of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.csv"
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.rows = self._kept(start)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def _kept(self, start: int) -> list[dict[str, str]]:
        if not start or not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) <= start]

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step; no value leaves the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.count += 1

    def write(self, step: int, rate: float) -> dict[str, float]:
        """Write the row of the steps since the last one and return it."""
        row = {"step": step, "rate": rate, **{name: float(value) / self.count for name, value in self.sums.items()}}
        self.sums, self.count = {}, 0
        self.rows.append({name: repr(value) for name, value in row.items()})
        with store.whole(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self.board.close()
