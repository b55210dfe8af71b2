"""Loggers of other tools beside our own log: MLflow and Weights & Biases, chosen by the environment.

The environment, since a logger changes nothing that a training makes: settings are part of what identifies a model.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from histossl.core import atomic
from histossl.core.console import say
from histossl.core.errors import SettingsError

VARIABLE = "HISTOSSL_LOG"
TAG = "histossl.run"  # by which a training that is resumed finds its run


class Logger(Protocol):
    """Takes the rows of a training's log."""

    errors: tuple[type[Exception], ...]

    def write(self, row: Mapping[str, float]) -> None:
        """Take a row: `step`, `rate`, `loss`, ...

        Args:
            row: name -> number.
        """
        ...

    def close(self, whole: bool) -> None:
        """End the run.

        Args:
            whole: whether the training came to its end.
        """
        ...


class Loggers:
    """The loggers that the environment names; one that fails is left out, with a word, and the training goes on.

    Args:
        folder: of the training's log; a training that resumes there resumes its run.

    Raises:
        SettingsError: an unknown logger, or one whose library is missing or that does not start.
    """

    def __init__(self, folder: Path) -> None:
        names = [name.strip().lower() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
        if unknown := [name for name in names if name not in KINDS]:
            raise SettingsError(f"{VARIABLE} names {unknown[0]!r}", f"there are {' and '.join(KINDS)}")
        self.open: dict[str, Logger] = {name: _started(name, folder) for name in dict.fromkeys(names)}

    def write(self, row: Mapping[str, float]) -> None:
        """Give a row to each.

        Args:
            row: `step` and further numbers by name.
        """
        self._each(lambda logger: logger.write(row))

    def close(self, whole: bool) -> None:
        """End the runs.

        Args:
            whole: whether the training came to its end.
        """
        self._each(lambda logger: logger.close(whole))

    def _each(self, what: Callable[[Logger], None]) -> None:
        for name, logger in list(self.open.items()):
            try:
                what(logger)
            except logger.errors as error:
                say(f"{name} takes no rows any more ({error}); the training goes on, log.csv has all of them", "yellow")
                del self.open[name]


class _MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, else in mlflow.db beside the log."""

    errors: tuple[type[Exception], ...]

    def __init__(self, folder: Path, run: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self.errors = (MlflowException, OSError)
        self.metric = Metric
        here = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
        try:
            self.run = self._found_or_made(os.environ.get("MLFLOW_EXPERIMENT_NAME") or "histossl", folder, run)
        except MlflowException as error:
            raise RuntimeError(str(error)) from error

    def _found_or_made(self, name: str, folder: Path, run: str) -> str:
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run}'", max_results=1)
        kept = found[0] if found else self.client.create_run(experiment, run_name=_name_of(folder), tags={TAG: run})
        self.client.update_run(kept.info.run_id, "RUNNING")
        return kept.info.run_id

    def write(self, row: Mapping[str, float]) -> None:
        import time

        now, step = int(time.time() * 1000), int(row["step"])
        self.client.log_batch(self.run, [self.metric(n, float(v), now, step) for n, v in row.items() if n != "step"])

    def close(self, whole: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if whole else "KILLED")


class _Wandb:
    """A run of Weights & Biases: offline unless WANDB_MODE says otherwise, in the folder `wandb` beside the log."""

    errors: tuple[type[Exception], ...]

    def __init__(self, folder: Path, run: str) -> None:
        import wandb

        self.errors = (wandb.Error, OSError)
        self.run: Any = wandb.init(
            dir=str(folder),
            project=os.environ.get("WANDB_PROJECT") or "histossl",
            name=_name_of(folder),
            id=run,
            resume="allow",
            reinit="create_new",
            mode=os.environ.get("WANDB_MODE") or "offline",  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False),
        )

    def write(self, row: Mapping[str, float]) -> None:
        self.run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)


KINDS: dict[str, Callable[[Path, str], Logger]] = {"mlflow": _MLflow, "wandb": _Wandb}


def _started(name: str, folder: Path) -> Logger:
    try:
        return KINDS[name](folder, _run_of(folder))
    except ImportError as error:
        raise SettingsError(f"{VARIABLE} names {name}, which is missing", f"pip install 'histossl[{name}]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingsError(f"{name} does not start: {error}", f"leave it out of {VARIABLE}, or mend it") from error


def _run_of(folder: Path) -> str:
    """What identifies the run of a training, also where it is resumed."""
    path = folder / "run.txt"
    if not path.exists():
        with atomic.whole(path) as part:
            part.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def _name_of(folder: Path) -> str:
    """Such as `STUDY/logs/slide-encoder`."""
    return "/".join(folder.resolve().parts[-3:])
