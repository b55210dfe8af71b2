"""The one training loop: a task that gives its loss, a batch for every step, a rate for every step."""

from __future__ import annotations

import csv
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from histossl.core import atomic
from histossl.core.config import differences
from histossl.core.console import progress_bar, say
from histossl.core.errors import StudyError, TrainingError
from histossl.training.distributed import make_fabric


@dataclass(frozen=True)
class Schedule:
    """How long, how fast.

    Attributes:
        steps: optimiser steps in all.
        rate: Adam's highest learning rate.
        warmup: steps of linear rise to it; a cosine leads from there to zero.
        weight_decay: on matrices and kernels only, decoupled (AdamW).
        checkpoints: steps between two checkpoints; the log is written as often.
        patience: share of the steps over which nothing may move; 0 never ends early. Once neither the loss nor the
            effective rank, where it is measured, differs between the last so many steps and as many before them by
            more than `STILL` of its first value, the rate falls to zero within `COOLING` of the steps, and that is the
            end. It looks at nothing but the log, so that a resumed run ends where an undisturbed one does.
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
        """The number of steps where nothing has moved since step `ending`."""
        return self.steps if ending is None else min(self.steps, ending + max(1, round(COOLING * self.steps)))


STILL, COOLING = 0.005, 0.05
BEHIND = 0.05  # of the first loss: by so much the last loss is clearly above the lowest
SMOOTH = 0.05  # share of a training over which its loss is averaged, to say where it was lowest


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        steps: that were done.
        best: the step at which the loss, averaged over `SMOOTH` of the training, was lowest.
        kept: the step of the weights that the task now has.
    """

    steps: int
    best: int
    kept: int


def rate_at(step: int, schedule: Schedule, ending: int | None = None) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine to zero, a faster one from step `ending`."""
    if schedule.plain:
        return schedule.rate
    if ending is not None and step >= ending:
        share = (step - ending) / (schedule.end(ending) - ending)
        return rate_at(ending, schedule) * 0.5 * (1 + math.cos(math.pi * share))
    if step < schedule.warmup:
        return schedule.rate * (step + 1) / schedule.warmup
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def optimiser(task: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW, where batch norms and biases do not decay; or Adam, where the schedule is plain."""
    if schedule.plain:
        return torch.optim.Adam(task.parameters(), lr=schedule.rate, weight_decay=schedule.weight_decay)
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
    about: dict[str, Any] | None = None,
    measure: Callable[[], dict[str, Tensor]] | None = None,
    best: bool = False,
) -> Outcome:
    """Train `task` in place; a run that was killed goes on from its last checkpoint and ends with the same bytes.

    Several processes that torchrun started train together; the first of them writes.

    Args:
        task: forward(batch) -> (loss, gauges): a scalar and a dictionary of scalars to log.
        batch_of: step -> batch, a pure function, so that a resumed run sees what an undisturbed one would have seen;
            called one step ahead in a thread. Tensors in it move to the device.
        schedule: how long and how fast.
        logs: a folder for log.csv, TensorBoard's files, checkpoint.pt and best.pt; these go when training is over.
        fingerprint: of all that makes this run; a checkpoint of another one is refused.
        device: cpu or cuda.
        precision: float32 or bfloat16 (weights stay float32, products are rounded).
        about: what the fingerprint is of, as JSON values, so that an error can say what differs.
        measure: more gauges, of the last step before each row of the log.
        best: end with the weights of the lowest loss where the last loss is clearly above it.

    Raises:
        TrainingError: a loss is not finite.
        StudyError: the checkpoint is of other settings.
    """
    fabric = make_fabric(device, "bf16-mixed" if precision == "bfloat16" else "32-true")
    adam = optimiser(task, schedule)
    run = Run(logs, fingerprint, about or {}, task, adam)
    step = run.resume()
    model, opt = fabric.setup(task, adam)
    log = Log(logs, step, writes=fabric.is_global_zero)
    model.train()
    with progress_bar("training", schedule.steps, step, shown=fabric.is_global_zero) as bar:
        for batch in _ahead(batch_of, run, schedule):
            for group in opt.param_groups:
                group["lr"] = rate_at(step, schedule, run.ending)
            loss, gauges = model(fabric.to_device(batch))
            fabric.backward(loss)
            opt.step()
            opt.zero_grad(set_to_none=True)
            log.add({"loss": loss.detach(), **gauges})
            bar.advance(1)
            step += 1
            if step % schedule.checkpoints == 0 or step == schedule.end(run.ending):
                row = log.write(step, rate_at(step, schedule, run.ending), measure() if measure else {})
                if not math.isfinite(row["loss"]):
                    raise TrainingError(f"the loss of step {step} is {row['loss']}", "lower the rate")
                bar.say(f"loss {row['loss']:.3f}")
                if run.ending is None and fabric.broadcast(nothing_moves(log.rows, schedule)):
                    run.ending = step
                if fabric.is_global_zero:
                    run.keep(step, best=best and lowest(log.rows, schedule) == step)
    log.close()
    outcome = outcome_of(log.rows, schedule) if log.rows else Outcome(step, step, step)
    if best and outcome.kept != outcome.steps and fabric.is_global_zero:
        say(f"the loss rose after step {outcome.best}: those weights are kept, of {outcome.steps} steps", "yellow")
        run.load(run.best)
    return outcome if best else replace(outcome, kept=outcome.steps)


def _ahead(batch_of: Callable[[int], Any], run: Run, schedule: Schedule) -> Iterator[Any]:
    """The batches of the steps that are left; a thread makes each while the step before it runs."""
    step = run.start
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(batch_of, step) if step < schedule.end(run.ending) else None
        while coming is not None and step < schedule.end(run.ending):
            batch = coming.result()
            step += 1
            coming = thread.submit(batch_of, min(step, schedule.steps - 1))
            yield batch


def nothing_moves(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> bool:
    """Whether to end early, from the rows of the log; see `Schedule.patience`."""
    window = round(schedule.patience * schedule.steps / schedule.checkpoints)
    if not window or len(rows) < 2 * window + schedule.warmup / schedule.checkpoints:
        return False
    for name in ("loss", "effective_rank"):
        values = [float(row[name]) for row in rows if name in row]
        before, after = values[-2 * window : -window], values[-window:]
        if values and abs(fmean(before) - fmean(after)) > STILL * abs(values[0]):
            return False
    return True


def smoothed_losses(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> list[float]:
    """The loss after each row of the log, averaged over `SMOOTH` of the training."""
    window = max(1, round(SMOOTH * schedule.steps / schedule.checkpoints))
    losses = [float(row["loss"]) for row in rows]
    return [fmean(losses[max(0, k - window) : k]) for k in range(1, len(losses) + 1)]


def lowest(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> int:
    """The step at which the smoothed loss was lowest, the first of equals."""
    losses = smoothed_losses(rows, schedule)
    return int(rows[losses.index(min(losses))]["step"])


def outcome_of(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> Outcome:
    """How a training went, from its log; the best weights are to keep where the last have fallen behind them."""
    losses, last, best = smoothed_losses(rows, schedule), int(rows[-1]["step"]), lowest(rows, schedule)
    behind = losses[-1] - min(losses) > BEHIND * abs(losses[0])
    return Outcome(last, best, best if behind else last)


def end_of_training(logs: Path) -> None:
    """Drop the checkpoints, once what was trained stands."""
    for name in ("checkpoint.pt", "best.pt"):
        (logs / name).unlink(missing_ok=True)


class Run:
    """What of a training must outlive its process.

    Args:
        logs: the folder of the checkpoints.
        fingerprint, about: of all that makes the run.
        task, adam: what is trained, and what trains it.
    """

    def __init__(
        self, logs: Path, fingerprint: str, about: dict[str, Any], task: nn.Module, adam: torch.optim.Optimizer
    ) -> None:
        self.checkpoint, self.best = logs / "checkpoint.pt", logs / "best.pt"
        self.key = {"fingerprint": fingerprint, "about": about}
        self.task, self.adam = task, adam
        self.start = 0
        self.ending: int | None = None  # the step since when nothing moves

    def keep(self, step: int, best: bool) -> None:
        """Write a checkpoint, and the best weights where these are the best so far."""
        # The best first: a run that is killed between the two goes on before it.
        if best:
            self.save(self.best, step)
        self.save(self.checkpoint, step)

    def save(self, path: Path, step: int) -> None:
        """Write where the training stands; without the optimiser in best.pt, from which none goes on."""
        state = {"task": self.task.state_dict(), "step": step, "ending": self.ending, **self.key}
        if path == self.checkpoint:
            state["optimiser"] = self.adam.state_dict()
        with atomic.whole(path) as part:
            torch.save(state, part)

    def load(self, path: Path) -> dict[str, Any]:
        """Take the weights of a file; returns all that it holds.

        Raises:
            StudyError: it is damaged, or of another run.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise StudyError(f"{path}: not a checkpoint ({error})", "remove it to start training anew") from error
        if state["fingerprint"] != self.key["fingerprint"]:
            changed = ", ".join(differences(state.get("about", {}), self.key["about"])) or "not said which"
            raise StudyError(
                f"{path}: of a training with other settings or slides ({changed})", "remove it to start training anew"
            )
        self.task.load_state_dict(state["task"])
        return state

    def resume(self) -> int:
        """Take the checkpoint where there is one; returns the step to go on from."""
        if self.checkpoint.exists():
            state = self.load(self.checkpoint)
            self.adam.load_state_dict(state["optimiser"])
            self.start, self.ending = int(state["step"]), state["ending"]
        return self.start


class Log:
    """Means over the steps since the last row, to log.csv and to TensorBoard.

    Args:
        folder: of both.
        start: the step at which training goes on; later rows of an interrupted run are dropped.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, start: int, writes: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.csv"
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start) if writes else None
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

    def write(self, step: int, rate: float, more: Mapping[str, Tensor]) -> dict[str, float]:
        """Write the row of the steps since the last one, with what was measured at their end, and return it."""
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
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        return row

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board is not None:
            self.board.close()
