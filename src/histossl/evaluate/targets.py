"""A target and its slides: what is predicted, in which fold each slide is tested, which slides are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.errors import LabelError
from histossl.evaluate.labels import Labels
from histossl.evaluate.outcomes import followed
from histossl.evaluate.splits import draw_patients, draw_shots, grouped_folds, site_folds
from histossl.evaluate.survival_score import Times, times_of

if TYPE_CHECKING:
    from histossl.evaluate.settings import ProbeSettings

MANY = 20  # more different values than this are not classes


@dataclass(frozen=True)
class Task:
    """One target.

    Attributes:
        target: its name.
        rows: (n,) int, the slides that have it, by their rows in the embeddings.
        slides: (n,) text.
        patients: (n,) text.
        sites: (n,) text, or None where the site of some slide is not known.
        names: (classes,) text, sorted; None where the target is a number or survival.
        truth: (n,) int class, (n,) float, or (n, 2) float of survival: time and event.
        strata: (n,) int, what folds and draws are balanced by: the classes, or fifths of the patients' mean values; of
            survival thirds of the times of events, and those without an event.
        folds: (repeats, n) int, the fold in which each slide is tested.
        times: of survival, when it is predicted and scored.
        unit: of survival, the unit of the time.
    """

    target: str
    rows: NDArray[np.int64]
    slides: NDArray
    patients: NDArray
    sites: NDArray | None
    names: NDArray | None
    truth: NDArray
    strata: NDArray[np.int64]
    folds: NDArray[np.int16]
    times: Times | None = None
    unit: str = ""

    @property
    def kind(self) -> str:
        """What is predicted: classes, numbers or survival."""
        return "classes" if self.names is not None else "numbers" if self.times is None else "survival"

    @property
    def outputs(self) -> int:
        """The length of a prediction: the number of classes; 1; or 1, the risk, and the number of times."""
        return len(self.names) if self.names is not None else 1 if self.times is None else 1 + len(self.times.all)

    def balance(self) -> str:
        """The classes and their sizes, or the range of the numbers, as text."""
        if self.times is not None:
            ends = f"{int(self.truth[:, 1].sum())} with an event"
            at = ", ".join(f"{time:g}" for time in self.times.horizons)
            unit = self.unit or "(no column says the unit)"
            return f"{ends}, followed to {self.truth[:, 0].max():g} {unit}, AUROC at {at}"
        if self.names is None:
            return f"numbers from {self.truth.min():g} to {self.truth.max():g}"
        counts = np.bincount(self.truth, minlength=len(self.names))
        return ", ".join(f"{name} {count}" for name, count in zip(self.names, counts, strict=True))


def make_task(target: str, ids: Sequence[str], labels: Labels, settings: ProbeSettings) -> Task:
    """Find the slides of a target and assign them to folds.

    Args:
        target: name of the target.
        ids: slides that have a vector, in the order of the vectors.
        labels: the labels.
        settings: kind of task, folds, repeats, and what is held out.

    Returns:
        The task.

    Raises:
        LabelError: too few patients, sites or classes, see `grouped_folds` and `site_folds`; words where numbers are
            needed; too many different words.
    """
    column = labels.table[target].dropna()
    rows = np.flatnonzero(pd.Index(ids).isin(column.index))
    slides = np.asarray(ids, dtype=object)[rows]
    patients = labels.table["patient_id"].loc[slides].to_numpy(dtype=str)
    known = [labels.sites.get(slide, "") for slide in slides]
    sites = np.array(known, dtype=str) if known and all(known) else None
    try:
        values = column.loc[slides].to_numpy(dtype=str)
        names, truth, strata, times = _described(target, values, patients, labels, settings)
        if names is not None:
            _check_classes(names[truth], patients, slides, labels, settings)
        if times is not None:
            _check_outcomes(values, patients, slides, labels)
        if settings.hold_out == "sites" or settings.site_remedy != "none":
            _all_known(slides, known)
        if settings.hold_out == "sites":
            assert sites is not None
            folds = site_folds(strata, patients, sites, settings.folds, settings.repeats, settings.seed)
        else:
            folds = grouped_folds(
                strata, patients, settings.folds, settings.repeats, settings.seed, settings.mixed_patients
            )
    except LabelError as error:
        raise LabelError(f"{target}: {error.what}", error.hint) from error
    return Task(
        target, rows, slides, patients, sites, names, truth, strata, folds, times, labels.outcomes.get(target, "")
    )


def _described(
    target: str, values: NDArray, patients: NDArray, labels: Labels, settings: ProbeSettings
) -> tuple[NDArray | None, NDArray, NDArray[np.int64], Times | None]:
    """The names of the classes, the truth, the strata and the times of a target, as `Task` has them."""
    if target in labels.outcomes:
        truth = followed(values)
        return None, truth, _thirds(truth, patients, settings.folds), times_of(truth, settings.horizons)
    names, found = _truth(values, settings.task)
    if names is None:
        return None, found, _fifths(found, patients, settings.folds), None
    return names, found, found, None


def _truth(values: NDArray, task: str) -> tuple[NDArray | None, NDArray]:
    """The classes by name and each slide's, or None and each slide's number."""
    names, classes = np.unique(values, return_inverse=True)
    numbers = _numbers(values)
    many = len(names) > min(MANY, len(values) // 2)
    if task == "numbers" and numbers is None:
        raise LabelError(f"{str(names[0])!r} is no number", "--probe.task classes")
    if numbers is not None and (task == "numbers" or (task == "auto" and many)):
        if np.ptp(numbers) == 0:
            raise LabelError(f"all slides have the value {numbers[0]:g}", "a probe needs values that differ")
        return None, numbers
    if len(names) > max(MANY, len(values) // 2):
        raise LabelError(f"{len(names)} different values on {len(values)} slides", "give it as classes")
    return names, classes


def _check_classes(
    classes: NDArray, patients: NDArray, slides: NDArray, labels: Labels, settings: ProbeSettings
) -> None:
    """Refuse what `grouped_folds` refuses, with the rows of the file in the message."""
    of_patient: dict[str, dict[str, list[str]]] = {}
    for slide, patient, name in zip(slides, patients, classes, strict=True):
        of_patient.setdefault(str(patient), {}).setdefault(str(name), []).append(slide)
    mixed = {patient: found for patient, found in of_patient.items() if len(found) > 1}
    if mixed and not settings.mixed_patients:
        some = "; ".join(
            f"{patient!r} has " + " and ".join(f"{name!r} in {labels.where(rows)}" for name, rows in found.items())
            for patient, found in list(mixed.items())[:3]
        )
        more = f"; and {len(mixed) - 3} more" if len(mixed) > 3 else ""
        raise LabelError(
            f"{len(mixed)} patients have slides of different classes: {some}{more}",
            "correct them, or if the label is one of the slide and not of the patient: --probe.mixed-patients true",
        )
    names = list(map(str, np.unique(classes)))
    if len(names) < 2:
        raise LabelError(f"all {len(slides)} slides are {names[0]!r}", "a probe needs two classes or more")
    for name in names if settings.hold_out == "patients" else ():
        count = len(np.unique(patients[classes == name]))
        if count < settings.folds:
            way_out = f"--probe.folds {count}" if count >= 2 else "label more patients, or leave that class out"
            rows = labels.where(list(slides[classes == name]))
            raise LabelError(f"{settings.folds} folds, but class {name!r} has {count} patients ({rows})", way_out)


def _check_outcomes(values: NDArray, patients: NDArray, slides: NDArray, labels: Labels) -> None:
    """Refuse patients with two outcomes."""
    of_patient: dict[str, dict[str, list[str]]] = {}
    for slide, patient, value in zip(slides, patients, values, strict=True):
        of_patient.setdefault(str(patient), {}).setdefault(str(value), []).append(slide)
    torn = {patient: found for patient, found in of_patient.items() if len(found) > 1}
    if torn:
        some = "; ".join(
            f"{patient!r} has " + " and ".join(f"{value} in {labels.where(rows)}" for value, rows in found.items())
            for patient, found in list(torn.items())[:3]
        )
        raise LabelError(f"{len(torn)} patients have two outcomes: {some}", "a patient has one time and one event")


def _thirds(truth: NDArray, patients: NDArray, folds: int) -> NDArray[np.int64]:
    """(n,) 0 without an event, else 1 and the third of the time; fewer where a part has fewer patients than folds."""
    names, first, patient = np.unique(patients, return_index=True, return_inverse=True)
    time, event = truth[first].T
    happened, censored = int(event.sum()), int((1 - event).sum())
    if happened < folds:
        what = f"{folds} folds, but {happened} of {len(names)} patients have an event"
        raise LabelError(what, f"--probe.folds {happened}" if happened > 1 else "survival needs patients with an event")
    parts = min(3, happened // folds)
    order = np.argsort(np.argsort(np.where(event > 0, time, np.inf), kind="stable"))
    stratum = np.where(event > 0, 1 + order * parts // happened, 0 if censored >= folds else parts)
    if len(np.unique(stratum)) < 2:
        raise LabelError(
            f"{len(names)} patients are too few for {folds} folds", "fewer --probe.folds, or more patients"
        )
    return stratum[patient] - stratum.min()


def _numbers(values: NDArray) -> NDArray[np.float64] | None:
    try:
        numbers = values.astype(np.float64)
    except ValueError:
        return None
    return numbers if len(numbers) and np.isfinite(numbers).all() else None


def _fifths(numbers: NDArray, patients: NDArray, folds: int) -> NDArray[np.int64]:
    """(n,) the patient's fifth of the values; fewer parts where a fifth would have fewer patients than folds."""
    patient = np.unique(patients, return_inverse=True)[1]
    means = np.bincount(patient, numbers) / np.bincount(patient)
    parts = min(5, len(means) // folds)
    if parts < 1:
        raise LabelError(f"{folds} folds, but {len(means)} patients", "fewer --probe.folds, or label more patients")
    return (np.argsort(np.argsort(means, kind="stable")) * parts // len(means))[patient]


def _all_known(slides: NDArray, sites: Sequence[str]) -> None:
    lost = [slide for slide, site in zip(slides, sites, strict=True) if not site]
    if lost:
        some = ", ".join(map(repr, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise LabelError(f"no site is known of {some}", "add a column site to the table of labels")


def numbers_of_labels(task: Task, settings: ProbeSettings) -> list[str]:
    """The numbers of labels at which the probe is scored.

    Args:
        task: the target with its folds.
        settings: `shots` and what they count.

    Returns:
        The numbers of `settings.shots` that every fold can give, as text, and "all".
    """
    fewest = min(
        len(np.unique(task.patients[trains])) if settings.shots_of == "patients" else int(trains.sum())
        for fold_of in task.folds
        for trains in (fold_of != fold for fold in range(settings.folds))
    )
    least = len(np.unique(task.strata))
    return [*(str(n) for n in sorted(set(settings.shots)) if least <= n < fewest), "all"]


def labelled(task: Task, repeat: int, fold: int, n: str, settings: ProbeSettings) -> NDArray[np.int64]:
    """The slides that train where `fold` is tested.

    Args:
        task: the target with its folds.
        repeat: index of the repeat.
        fold: index of the fold that is tested.
        n: number of labels, as of `numbers_of_labels`, or "all".
        settings: seed, and what `n` counts.

    Returns:
        Indices into the slides of the task: all of the other folds, or a random draw of them.
    """
    pool = np.flatnonzero(task.folds[repeat] != fold)
    if n == "all":
        return pool
    rng = np.random.default_rng([settings.seed, repeat, fold, int(n)])
    if settings.shots_of == "patients":
        return pool[draw_patients(task.strata[pool], task.patients[pool], int(n), rng)]
    return pool[draw_shots(task.strata[pool], int(n), rng)]
