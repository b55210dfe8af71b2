"""The training loop: its rate, its weight decay, and that a killed run ends as an undisturbed one."""

from __future__ import annotations

import csv
import itertools
import math

import pytest
import torch
from torch import nn

from histossl.core.errors import StudyError, TrainingError
from histossl.training.loop import Schedule, end_of_training, fit, lowest, nothing_moves, optimiser, outcome_of, rate_at


class Line(nn.Module):
    """Least squares with a batch norm, so that buffers matter too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))

    def forward(self, batch):
        x, y = batch
        loss = ((self.layers(x)[:, 0] - y) ** 2).mean()
        return loss, {"size": x.abs().mean().detach()}


def batch_of(step: int):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step))
    return x, x @ torch.tensor([1.0, -2.0, 3.0])


SCHEDULE = Schedule(steps=60, rate=0.1, warmup=6, weight_decay=0.01, checkpoints=10)


def test_it_learns_and_logs(tmp_path):
    task = Line()
    fit(task, batch_of, SCHEDULE, tmp_path, "made")
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1]["loss"]) < 0.1 * float(rows[0]["loss"])
    assert list((tmp_path / "tensorboard").iterdir())
    expected = torch.stack([batch_of(step)[0].abs().mean() for step in range(10)]).mean()
    assert float(rows[0]["size"]) == pytest.approx(float(expected), rel=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 9, 10, 37, 59])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, at):
    whole, resumed = Line(), Line()
    fit(whole, batch_of, SCHEDULE, tmp_path / "a", "made")

    class Dying(Line):
        steps = 0

        def forward(self, batch):
            if self.steps == at:
                raise Killed
            self.steps += 1
            return super().forward(batch)

    with pytest.raises(Killed):
        fit(Dying(), batch_of, SCHEDULE, tmp_path / "b", "made")
    fit(resumed, batch_of, SCHEDULE, tmp_path / "b", "made")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert (tmp_path / "a" / "log.csv").read_bytes() == (tmp_path / "b" / "log.csv").read_bytes()
    again = Line()
    fit(again, batch_of, SCHEDULE, tmp_path / "b", "made")  # nothing left to do: the checkpoint is the result
    assert torch.equal(again.layers[1].weight, whole.layers[1].weight)
    end_of_training(tmp_path / "b")
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(Line(), batch_of, Schedule(2, 0.1, 0), tmp_path, "one")
    with pytest.raises(StudyError, match="other settings or slides"):
        fit(Line(), batch_of, Schedule(2, 0.1, 0), tmp_path, "two")
    end_of_training(tmp_path)
    fit(Line(), batch_of, Schedule(2, 0.1, 0), tmp_path, "one", about={"rate": 0.1, "view": {"tiles": 5}})
    with pytest.raises(StudyError, match=r"\(view\.tiles: 5 -> 7\)"):
        fit(Line(), batch_of, Schedule(2, 0.1, 0), tmp_path, "two", about={"rate": 0.1, "view": {"tiles": 7}})
    (tmp_path / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(StudyError, match="not a checkpoint"):
        fit(Line(), batch_of, Schedule(2, 0.1, 0), tmp_path, "one")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match="loss at step"):
        fit(Line(), lambda step: (torch.full((4, 3), math.inf), torch.zeros(4)), Schedule(3, 0.1, 0), tmp_path, "x")


def test_the_rate_rises_then_falls_along_a_cosine():
    s = Schedule(steps=110, rate=2.0, warmup=10)
    assert [rate_at(k, s) for k in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate_at(10, s) == pytest.approx(2.0)
    assert rate_at(60, s) == pytest.approx(1.0)
    assert rate_at(110, s) == pytest.approx(0.0)
    assert all(rate_at(k, s) > rate_at(k + 1, s) for k in range(10, 109))


def log_of(losses, ranks=None) -> list[dict[str, str]]:
    rows = [{"step": str(2 * k), "loss": repr(loss)} for k, loss in enumerate(losses, 1)]
    return [row | {"effective_rank": repr(r)} for row, r in zip(rows, ranks, strict=True)] if ranks else rows


WATCHED = Schedule(steps=200, rate=1.0, warmup=20, checkpoints=2, patience=0.1)  # windows of ten rows


def test_training_ends_early_once_neither_loss_nor_rank_moves():
    falling, flat = [5 - 0.1 * k for k in range(40)], [2.0 + 0.02 * (-1) ** k for k in range(30)]
    assert not nothing_moves(log_of(falling), WATCHED)
    assert not nothing_moves(log_of(falling[:30] + flat[:15]), WATCHED)
    assert nothing_moves(log_of(falling[:30] + flat), WATCHED)
    rising = [3.0 + 0.1 * k for k in range(60)]
    assert not nothing_moves(log_of(falling[:30] + flat, rising), WATCHED)
    assert nothing_moves(log_of(falling[:30] + flat, [3.0] * 60), WATCHED)
    assert not nothing_moves(log_of(flat[:29]), WATCHED)  # the rate still rises in the first ten rows
    assert nothing_moves(log_of(flat), WATCHED)
    assert not nothing_moves(log_of(flat), Schedule(200, 1.0, 20, checkpoints=2))


def test_the_rate_falls_to_zero_from_where_the_training_is_ended():
    rates = [rate_at(k, WATCHED, ending=100) for k in range(WATCHED.end(100) + 1)]
    assert len(rates) == 111
    assert rates[:101] == [rate_at(k, WATCHED) for k in range(101)]
    assert rates[110] == 0
    assert all(before > after for before, after in itertools.pairwise(rates[100:]))
    assert WATCHED.end(None) == WATCHED.end(195) == 200


def test_the_best_weights_are_kept_only_where_the_last_have_fallen_behind():
    falling = [5 - 0.04 * k for k in range(100)]
    assert lowest(log_of(falling), WATCHED) == outcome_of(log_of(falling), WATCHED).kept == 200
    noise = falling[:90] + [falling[89] + 0.02] * 10
    assert outcome_of(log_of(noise), WATCHED).kept == 200
    near_zero = [0.1 - 0.005 * k for k in range(100)]
    assert outcome_of(log_of(near_zero[:90] + [near_zero[89] + 0.02] * 10), WATCHED).kept == 200
    collapsed = falling[:60] + [4.8] * 40
    outcome = outcome_of(log_of(collapsed), WATCHED)
    assert (outcome.steps, outcome.best, outcome.kept) == (200, 120, 120)


def test_weights_of_the_lowest_loss_come_back(tmp_path):
    """Up to step 40 the line can be learned, then its points are taken away and only noise is left."""
    noise = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 50
    spoilt = lambda step: batch_of(step) if step < 40 else (batch_of(step)[0], noise)  # noqa: E731
    schedule = Schedule(steps=80, rate=0.1, warmup=0, checkpoints=4)
    best, last, until = Line(), Line(), Line()
    outcome = fit(best, spoilt, schedule, tmp_path / "best", "made", best=True)
    assert outcome.steps == 80
    assert 20 < outcome.best == outcome.kept <= 40
    assert fit(last, spoilt, schedule, tmp_path / "last", "made").kept == 80

    def no_further(step: int):
        if step == outcome.best + 1:  # it is read a step ahead
            raise Killed
        return batch_of(step)

    with pytest.raises(Killed):
        fit(until, no_further, schedule, tmp_path / "until", "made")
    for name, value in torch.load(tmp_path / "until" / "checkpoint.pt")["task"].items():
        assert torch.equal(value, best.state_dict()[name]), name
    assert not torch.equal(best.layers[1].weight, last.layers[1].weight)
    end_of_training(tmp_path / "best")
    assert not list((tmp_path / "best").glob("*.pt"))


def test_only_matrices_decay():
    task = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    groups = optimiser(task, SCHEDULE).param_groups
    assert {p.ndim for p in groups[0]["params"]} == {2, 4}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.01, 0.0)
    assert sum(len(g["params"]) for g in groups) == len(list(task.parameters()))
