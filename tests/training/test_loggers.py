"""MLflow and Weights & Biases get the rows of log.csv, in one run, also where a training was killed and resumed."""

from __future__ import annotations

import csv
import itertools
import struct

import pytest
import torch
from torch import nn

from histossl.core.errors import SettingsError
from histossl.training import loggers
from histossl.training.loggers import VARIABLE, Loggers
from histossl.training.loop import Schedule, fit


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, batch):
        loss = ((batch @ self.weight - batch.sum(1)) ** 2).mean()
        return loss, {"size": batch.abs().mean()}


def batch_of(step: int):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))


SCHEDULE = Schedule(steps=12, rate=0.1, warmup=2, checkpoints=3)


class Killed(BaseException):
    pass


def killed_and_resumed(folder):
    steps = itertools.count()

    def dying(step):
        if next(steps) == 8:
            raise Killed
        return batch_of(step)

    with pytest.raises(Killed):
        fit(Line(), dying, SCHEDULE, folder, "made")
    fit(Line(), batch_of, SCHEDULE, folder, "made")
    with (folder / "log.csv").open(encoding="utf-8") as file:
        return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow  # makes the tables of its database
def test_mlflow_has_the_rows_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs histossl[mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs histossl[mlflow]")
    monkeypatch.setenv(VARIABLE, "mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = killed_and_resumed(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("histossl").experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("loss", "size", "rate"):
        found = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)}
        assert found == pytest.approx({int(row["step"]): row[name] for row in rows})


def test_wandb_has_the_rows_in_one_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs histossl[wandb]")
    monkeypatch.setenv(VARIABLE, "wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    rows = killed_and_resumed(tmp_path)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert len({path.name for path in files}) == 1  # of the same run
    found = {}
    for path in files:
        found |= history(path)
    assert found == pytest.approx({int(row["step"]): row["loss"] for row in rows})


def history(path):
    """Step -> loss in a file of an offline run: after 7 bytes, records in blocks as LevelDB logs have them."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "loss" in items:
                found[int(record.history.step.num)] = float(items["loss"])
            whole = b""
    return found


def test_unknown_and_missing_loggers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mlflow, comet")
    with pytest.raises(SettingsError, match="names 'comet'; there are mlflow and wandb"):
        Loggers(tmp_path)

    def missing(folder, run):
        raise ImportError

    monkeypatch.setitem(loggers.KINDS, "wandb", missing)
    monkeypatch.setenv(VARIABLE, "wandb")
    with pytest.raises(SettingsError, match=r"wandb, which is missing; pip install 'histossl\[wandb\]'"):
        Loggers(tmp_path)


def test_a_logger_that_fails_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    class Full:
        errors = (OSError,)

        def write(self, row):
            raise OSError("no space")

        def close(self, whole):
            raise AssertionError("it was left out")

    monkeypatch.setitem(loggers.KINDS, "mlflow", lambda folder, run: Full())
    monkeypatch.setenv(VARIABLE, "mlflow")
    fit(Line(), batch_of, SCHEDULE, tmp_path, "made")
    with (tmp_path / "log.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert capsys.readouterr().err.count("mlflow takes no rows any more") == 1
