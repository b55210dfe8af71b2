"""Who trains and who is tested: never the same patient."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import StratifiedKFold

from histossl.errors import LabelError


def grouped_folds(
    classes: np.ndarray, patients: np.ndarray, folds: int, repeats: int, seed: int, mixed_patients: bool = False
) -> np.ndarray:
    """Deal the patients into folds, class by class, several times over.

    Patients are dealt, not slides: each fold then holds the same number of patients of every class, to within one, and
    so no class can be missing from a fold (scikit-learn's StratifiedGroupKFold balances slides and does not promise
    that). A patient with slides of several classes is dealt as one of the rarest of them.

    Args:
        classes: (N,) integer class of each slide, 0 ≤ class < number of classes.
        patients: (N,) patient of each slide; any type that sorts.
        folds: number of folds, ≥ 2.
        repeats: number of times to deal anew.
        seed: the deal; repeat r of one seed is always the same.
        mixed_patients: whether slides of one patient may have different classes.

    Returns:
        (repeats, N) int16: the fold in which each slide is tested; it trains in all the others.

    Raises:
        LabelError: one class only, a class with fewer patients than folds, or a patient with contradicting labels.
    """
    names, patient = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), int(classes.max()) + 1), bool)  # patients × classes
    has[patient, classes] = True
    mixed = np.flatnonzero(has.sum(axis=1) > 1)
    if np.count_nonzero(has.any(axis=0)) < 2:
        raise LabelError("all slides are of one class", "a probe needs two classes or more")
    if len(mixed) and not mixed_patients:
        some = ", ".join(repr(str(name)) for name in names[mixed[:5]])
        more = f" and {len(mixed) - 5} more" if len(mixed) > 5 else ""
        raise LabelError(
            f"{len(mixed)} patients have slides of different classes: {some}{more}",
            "correct them, or if the label is one of the slide and not of the patient: --probe.mixed_patients true",
        )
    stratum = np.where(has, has.sum(axis=0), len(names) + 1).argmin(axis=1)
    fewest = min(int(has.sum(axis=0)[has.any(axis=0)].min()), int(np.bincount(stratum).max()))
    if fewest < folds:
        way_out = f"--probe.folds {fewest}" if fewest >= 2 else "label more patients, or leave that class out"
        raise LabelError(f"{folds} folds, but the rarest class has {fewest} of {len(names)} patients", way_out)

    fold_of = np.empty((repeats, len(names)), np.int16)
    seeds = np.random.SeedSequence(seed).generate_state(repeats)
    for repeat in range(repeats):
        fold_of[repeat] = _deal(stratum, folds, int(seeds[repeat]))
        if mixed_patients and any(np.ptp(fold_of[repeat, of_class]) == 0 for of_class in has.T if of_class.any()):
            raise LabelError("one fold holds all patients of a class", "fewer --probe.folds, or another --probe.seed")
    return fold_of[:, patient]


def _deal(stratum: np.ndarray, folds: int, seed: int) -> np.ndarray:
    fold_of = np.empty(len(stratum), np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a stratum of mixed patients may be smaller than the folds are many
        deal = StratifiedKFold(folds, shuffle=True, random_state=seed).split(stratum, stratum)
        for fold, (_, held_out) in enumerate(deal):
            fold_of[held_out] = fold
    return fold_of


def draw_shots(classes: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n slides to be labelled, in the proportions of the classes and at least one of each.

    Args:
        classes: (N,) integer class of each slide that may be drawn.
        n: how many to draw, number of classes ≤ n ≤ N.
        rng: the draw.

    Returns:
        (n,) sorted int64 indices into `classes`.
    """
    found, sizes = np.unique(classes, return_counts=True)
    if not len(found) <= n <= len(classes):
        raise ValueError(f"cannot draw {n} of {len(classes)} slides of {len(found)} classes")
    share = np.ones(len(found), int)
    for _ in range(n - len(found)):  # to whom the next slide is owed most
        owed = np.where(share < sizes, sizes * n / len(classes) - share, -np.inf)
        share[owed.argmax()] += 1
    drawn = [rng.choice(np.flatnonzero(classes == c), k, replace=False) for c, k in zip(found, share, strict=True)]
    return np.sort(np.concatenate(drawn))
