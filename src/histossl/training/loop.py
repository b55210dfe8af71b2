"""The training loop of all networks: a task computes its loss, functions give the batch and rate of each step."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from histossl.core import atomic
from histossl.core.config import differences
from histossl.core.console import progress_bar, say
from histossl.core.errors import StudyError, TrainingError
from histossl.training.distributed import make_fabric
from histossl.training.log import Log
from histossl.training.schedule import STILL, Schedule

# The last loss counts as worse where it exceeds the lowest by so much of the first, and by so much of the whole fall:
# a loss that begins near zero varies by more than a share of that.
BEHIND = 0.05, 0.1
SMOOTH = 0.05  # share of the steps over which the loss is averaged before its lowest value is searched


@dataclass(frozen=True)
class Outcome:
    """The result of a training.

    Attributes:
        steps: number of steps done.
        best: the step at which the loss, averaged over `SMOOTH` of the training, was lowest.
        kept: the step of the weights that the task now has.
    """

    steps: int
    best: int
    kept: int


def rate_at(step: int, schedule: Schedule, ending: int | None = None) -> float:
    """The learning rate of a step: linear warm-up, then a cosine to zero; a shorter cosine after early stopping.

    Args:
        step: from 0.
        schedule: of the training.
        ending: the step at which early stopping began; None where it has not.

    Returns:
        The rate, in [0, schedule.rate].
    """
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
    """Make the optimiser: AdamW without decay of batch norms and biases; Adam where the schedule is plain.

    Args:
        task: whose parameters are trained.
        schedule: gives the rate and the weight decay.

    Returns:
        The optimiser.
    """
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
    """Train `task` in place; a killed run resumes from its last checkpoint and ends with the same bytes.

    Several processes that torchrun started train together; rank 0 writes.

    Args:
        task: forward(batch) -> (loss, gauges): a scalar and a dictionary of scalars to log.
        batch_of: step -> batch, a pure function, so that a resumed run sees the batches of an uninterrupted one;
            called one step ahead in a thread. Tensors in it move to the device.
        schedule: steps and rate.
        logs: folder of log.csv, TensorBoard's files, checkpoint.pt and best.pt; `end_of_training` removes the last two.
        fingerprint: of everything that determines this run; a checkpoint with another one is refused.
        device: cpu or cuda.
        precision: float32 or bfloat16 (weights stay float32, products are rounded).
        about: what the fingerprint is made of, as JSON values, so that an error can name the difference.
        measure: computes more gauges, called before each row of the log is written.
        best: end with the weights of the lowest loss where the last loss is clearly above it.

    Returns:
        The number of steps done, and the step of the weights that `task` now has.

    Raises:
        TrainingError: a loss is not finite.
        StudyError: the checkpoint in `logs` is damaged or of other settings.
    """
    fabric = make_fabric(device, "bf16-mixed" if precision == "bfloat16" else "32-true")
    adam = optimiser(task, schedule)
    run = Run(logs, fingerprint, about or {}, task, adam)
    step = run.resume()
    model, opt = fabric.setup(task, adam)
    log = Log(logs, step, writes=fabric.is_global_zero)
    model.train()
    with log, progress_bar("training", schedule.steps, step, shown=fabric.is_global_zero) as bar:
        for batch in _batches_ahead(batch_of, run, schedule, fabric.device.type == "cuda"):
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
                    raise TrainingError(f"the loss at step {step} is {row['loss']}", "lower the learning rate")
                bar.say(f"loss {row['loss']:.3f}")
                if run.ending is None and fabric.broadcast(nothing_moves(log.rows, schedule)):
                    run.ending = step
                if fabric.is_global_zero:
                    run.keep(step, best=best and lowest(log.rows, schedule) == step)
    outcome = outcome_of(log.rows, schedule) if log.rows else Outcome(step, step, step)
    if best and outcome.kept != outcome.steps and fabric.is_global_zero:
        say(f"the loss rose after step {outcome.best} of {outcome.steps}: that step's weights are kept", "yellow")
        run.load(run.best)
    return outcome if best else replace(outcome, kept=outcome.steps)


def _batches_ahead(batch_of: Callable[[int], Any], run: Run, schedule: Schedule, pinned: bool) -> Iterator[Any]:
    """Batches of the remaining steps; a thread makes each one, in pinned memory if asked, while the last step runs."""

    def made(step: int) -> Any:
        batch = batch_of(step)
        return apply_to_collection(batch, Tensor, Tensor.pin_memory) if pinned else batch

    step = run.start
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(made, step) if step < schedule.end(run.ending) else None
        while coming is not None and step < schedule.end(run.ending):
            batch = coming.result()
            step += 1
            # Whether this step runs is known only after the one before it; a batch too many is dropped.
            coming = thread.submit(made, min(step, schedule.steps - 1))
            yield batch


def nothing_moves(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> bool:
    """Whether to stop early; see `Schedule.patience`.

    Args:
        rows: of the log.
        schedule: of the training.

    Returns:
        True once neither the loss nor the effective rank changes.
    """
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
    """The moving average of the loss over `SMOOTH` of the training.

    Args:
        rows: of the log.
        schedule: of the training.

    Returns:
        One value per row, over that row and those before it.
    """
    window = max(1, round(SMOOTH * schedule.steps / schedule.checkpoints))
    losses = [float(row["loss"]) for row in rows]
    return [fmean(losses[max(0, k - window) : k]) for k in range(1, len(losses) + 1)]


def lowest(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> int:
    """The step at which the smoothed loss was lowest, the first of equals.

    Args:
        rows: of the log, at least one.
        schedule: of the training.

    Returns:
        The step.
    """
    losses = smoothed_losses(rows, schedule)
    return int(rows[losses.index(min(losses))]["step"])


def outcome_of(rows: Sequence[Mapping[str, str]], schedule: Schedule) -> Outcome:
    """The result of a training, from its log: keep the best weights where the last loss is clearly higher.

    Args:
        rows: of the log, at least one.
        schedule: of the training.

    Returns:
        The outcome, as if `best` were set in `fit`.
    """
    losses, last, best = smoothed_losses(rows, schedule), int(rows[-1]["step"]), lowest(rows, schedule)
    least = max(BEHIND[0] * abs(losses[0]), BEHIND[1] * (losses[0] - min(losses)))
    return Outcome(last, best, best if losses[-1] - min(losses) > least else last)


def end_of_training(logs: Path) -> None:
    """Remove the checkpoints; call it after the trained model is written.

    Args:
        logs: the folder given to `fit`.
    """
    for name in ("checkpoint.pt", "best.pt"):
        (logs / name).unlink(missing_ok=True)


class Run:
    """The state of a training that must survive the end of its process, and its checkpoint files.

    Args:
        logs: the folder of the checkpoints.
        fingerprint: of everything that determines the run.
        about: what the fingerprint is made of.
        task: the network that is trained.
        adam: its optimiser.
    """

    def __init__(
        self, logs: Path, fingerprint: str, about: dict[str, Any], task: nn.Module, adam: torch.optim.Optimizer
    ) -> None:
        self.checkpoint, self.best = logs / "checkpoint.pt", logs / "best.pt"
        self.key = {"fingerprint": fingerprint, "about": about}
        self.task, self.adam = task, adam
        self.start = 0
        self.ending: int | None = None  # the step at which early stopping began

    def keep(self, step: int, best: bool) -> None:
        """Write a checkpoint, and the best weights too where these are the best so far.

        Args:
            step: number of steps done.
            best: whether the weights are the best so far.
        """
        # Best weights first: a run that is killed between the two resumes before this step and writes them again.
        if best:
            self.save(self.best, step)
        self.save(self.checkpoint, step)

    def save(self, path: Path, step: int) -> None:
        """Write the state of the training; best.pt has no optimiser, since no run resumes from it.

        Args:
            path: `self.checkpoint` or `self.best`.
            step: number of steps done.
        """
        state = {"task": self.task.state_dict(), "step": step, "ending": self.ending, **self.key}
        if path == self.checkpoint:
            state["optimiser"] = self.adam.state_dict()
        with atomic.whole(path) as part:
            torch.save(state, part)

    def load(self, path: Path) -> dict[str, Any]:
        """Load the weights of a checkpoint into the task.

        Args:
            path: `self.checkpoint` or `self.best`.

        Returns:
            The whole content of the file.

        Raises:
            StudyError: the file is damaged, or its fingerprint is that of another run.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise StudyError(f"{path}: not a checkpoint ({error})", "remove it to train from the start") from error
        if state["fingerprint"] != self.key["fingerprint"]:
            changed = ", ".join(differences(state.get("about", {}), self.key["about"])) or "unknown which"
            raise StudyError(
                f"{path}: written by a training with other settings or slides ({changed})",
                "remove it to train from the start",
            )
        self.task.load_state_dict(state["task"])
        return state

    def resume(self) -> int:
        """Load the checkpoint if there is one, and return the step to continue from."""
        if self.checkpoint.exists():
            state = self.load(self.checkpoint)
            self.adam.load_state_dict(state["optimiser"])
            self.start, self.ending = int(state["step"]), state["ending"]
        return self.start
