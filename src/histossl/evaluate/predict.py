"""A fitted probe and vectors of new slides in; probabilities, conformal sets, and what they resemble out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.errors import SettingsError
from histossl.evaluate.conformal import calibrated, conformal_limit, nearest_patients, share_beyond, strangeness
from histossl.evaluate.fitted import FittedProbe, FittedTarget, check_vectors, log_probabilities
from histossl.evaluate.patients import combine, patients_of, slide_weights
from histossl.evaluate.sources import Source

UNLIKE = 0.05  # a share of known patients as far off that is worth a word


@dataclass(frozen=True)
class Neighbour:
    """A known patient near a new slide.

    Attributes:
        patient: its name.
        distance: see `nearest_patients`.
        labels: target -> its label, of the slide that is nearest; empty where it has none.
    """

    patient: str
    distance: float
    labels: dict[str, str]


@dataclass(frozen=True)
class Predictions:
    """What a probe says of new slides.

    Attributes:
        table: one row a slide and target: `slide_id`, `target`, `predicted`; of classes `p(CLASS)`, calibrated, and
            `set`, the classes that conform, parted by " | "; of numbers `low` and `high`; of survival `predicted` is
            the log hazard ratio and `rank` its rank among the known slides, in [0, 1]; `coverage` of set or interval,
            empty where there is none; `unlike`, the share of patients that lie as far off; `nearest`, the most similar
            known patients and their labels.
        neighbours: of every slide its nearest known patients.
        known: of the new slides, those that the probe was fitted with.
        members: of every row its slides: itself, or those of the patient.
    """

    table: pd.DataFrame
    neighbours: dict[str, list[Neighbour]]
    known: tuple[str, ...]
    members: dict[str, list[str]]


def predict_source(probe: FittedProbe, source: Source, coverage: float = 0.9) -> Predictions:
    """Apply a probe to the first vectors of a source; those of a patient are combined where the probe is of patients.

    Args:
        probe: the probe.
        source: of vectors of the encoders that the probe was fitted on.
        coverage: as of `predict_vectors`.

    Returns:
        The predictions; `patient_id` beside `slide_id`, where patients are known.

    Raises:
        FileFormatError: the vectors are of another encoder, see `check_vectors`.
        SettingsError: `coverage` is out of range.
        LabelError: slides are weighted by their numbers of tiles, and those of one are not known.
    """
    check_vectors(probe, source)
    values, patients = next(iter(source.vectors.values())), patients_of(source)
    if probe.settings.unit == "patient":
        names, groups = np.unique(patients, return_inverse=True)
        values = combine(values, groups, slide_weights(source, probe.settings.combine))
        found = predict_vectors(probe, names.tolist(), values, coverage)
        slides = {str(n): [source.ids[k] for k in np.flatnonzero(groups == g)] for g, n in enumerate(names)}
        return replace(found, members=slides)
    found = predict_vectors(probe, source.ids, values, coverage)
    of = dict(zip(source.ids, patients, strict=True))
    people = pd.Series([of[name] for name in found.table["slide_id"]])
    found.table.insert(1, "patient_id", people)
    return found


def predict_vectors(probe: FittedProbe, ids: Sequence[str], vectors: NDArray, coverage: float = 0.9) -> Predictions:
    """Apply a probe to vectors of new slides, made as those that it was fitted on, see `check_vectors`.

    Args:
        probe: the probe.
        ids: m slides, or patients where the probe is one of patients.
        vectors: (m, d) finite.
        coverage: of the conformal sets, in (0, 1): that share of new patients like the known ones has its true class
            in its set. It holds over all patients together, not for each class.

    Returns:
        The predictions.

    Raises:
        SettingsError: `coverage` is out of range.
    """
    if not 0 < coverage < 1:
        raise SettingsError(f"coverage is {coverage}", "it lies between 0 and 1, such as 0.9")
    patients, distances = nearest_patients(vectors, probe.vectors, probe.patients)
    on = probe.unlearned
    away = distances if on.all() else nearest_patients(vectors[:, on], probe.vectors[:, on], probe.patients)[1]
    far = share_beyond(probe.strange, probe.patients, strangeness(away))
    labels = _labels_of_patients(probe)
    near = {}
    for name, people, away in zip(ids, patients.tolist(), distances.tolist(), strict=True):
        told = [{target: known.get(patient, "") for target, known in labels.items()} for patient in people]
        near[name] = [Neighbour(*one) for one in zip(people, away, told, strict=True)]
    parts = []
    for one in probe.targets:
        told = {name: "; ".join(f"{n.patient} ({n.labels[one.target] or '?'})" for n in near[name]) for name in ids}
        found = pd.DataFrame({"slide_id": list(ids), "target": one.target} | _predicted(probe, one, vectors, coverage))
        parts.append(found.assign(unlike=far, nearest=[told[name] for name in ids]))
    table = pd.concat(parts, ignore_index=True)
    last = ["coverage", "unlike", "nearest"]
    table = table.reindex(columns=[name for name in table.columns if name not in last] + last)
    known = set(probe.ids)
    return Predictions(table, near, tuple(name for name in ids if name in known), {name: [name] for name in ids})


def _predicted(probe: FittedProbe, one: FittedTarget, vectors: NDArray, coverage: float) -> dict[str, object]:
    """The columns of a target."""
    scores, patients = one.score(vectors), probe.patients[one.rows]
    asked: dict[str, object] = {"coverage": coverage}
    if one.kind == "survival":
        known = np.sort(one.score(probe.vectors[one.rows])[:, 0])
        return {"predicted": scores[:, 0], "rank": np.searchsorted(known, scores[:, 0]) / len(known), "coverage": None}
    if one.kind == "numbers":
        limit = conformal_limit(np.abs(one.held_out[:, 0] - one.truth), patients, coverage)
        return {"predicted": scores[:, 0], "low": scores[:, 0] - limit, "high": scores[:, 0] + limit} | asked
    p = calibrated(log_probabilities(scores), one.slope, one.offsets)
    held_out = calibrated(log_probabilities(one.held_out), one.slope, one.offsets)
    against = 1 - held_out[np.arange(len(held_out)), one.truth.astype(int)]
    kept, names = 1 - p <= conformal_limit(against, patients, coverage), np.array(one.names)
    columns = {"predicted": names[p.argmax(axis=1)]}
    columns |= {f"p({name})": p[:, k] for k, name in enumerate(one.names)}
    return columns | {"set": [" | ".join(names[row]) for row in kept]} | asked


def _labels_of_patients(probe: FittedProbe) -> dict[str, dict[str, str]]:
    """Target -> patient -> its labels, of several slides those that differ."""
    found: dict[str, dict[str, str]] = {}
    for one in probe.targets:
        told: dict[str, dict[str, None]] = {}
        for patient, text in zip(probe.patients[one.rows].tolist(), one.labels(), strict=True):
            told.setdefault(patient, {})[text] = None
        found[one.target] = {patient: " and ".join(texts) for patient, texts in told.items()}
    return found
