"""Who trains and who is tested: never the same patient, and where asked never the same site."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedKFold

from histossl.core.errors import LabelError


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
    stratum = _rarest(has)
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


def _rarest(has: np.ndarray) -> np.ndarray:
    """(patients,): of the classes that a patient has, (patients, classes) bool, the one that fewest patients have."""
    return np.where(has, has.sum(axis=0), len(has) + 1).argmin(axis=1)


def site_folds(
    strata: np.ndarray, patients: np.ndarray, sites: np.ndarray, folds: int, repeats: int, seed: int
) -> np.ndarray:
    """Deal whole sites into folds; sites that share a patient stay together, so that neither is on both sides.

    The largest are dealt first, each to the fold with the least of what the site has; with as many folds as sites every
    site is left out once, and the repeats differ in nothing but the few labels that are drawn.

    Args:
        strata: (N,) integer class of each slide.
        patients: (N,) patient of each slide.
        sites: (N,) site of each slide.
        folds: number of folds, ≥ 2.
        repeats: number of times to deal anew.
        seed: the deal.

    Returns:
        (repeats, N) int16: the fold in which each slide is tested.

    Raises:
        LabelError: fewer sites than folds, a class that only one fold has, or no site with two classes.
    """
    names, site = np.unique(sites, return_inverse=True)
    patient = np.unique(patients, return_inverse=True)[1]
    # Of int32, since with others the connected_components of SciPy 1.11 is wrong without a word.
    site, patient = site.astype(np.int32), patient.astype(np.int32)
    edges = coo_array((np.ones(len(site)), (site, len(names) + patient)), shape=(len(names) + patient.max() + 1,) * 2)
    unit = np.unique(connected_components(edges, directed=False)[1][site], return_inverse=True)[1]
    if unit.max() + 1 < folds:
        way_out = f"--probe.folds {unit.max() + 1}" if unit.max() else "leave whole patients out instead"
        raise LabelError(f"{folds} folds, but {unit.max() + 1} sites that share no patient", way_out)
    counts = np.zeros((unit.max() + 1, int(strata.max()) + 1))
    np.add.at(counts, (unit, strata), 1)
    if ((counts > 0).sum(axis=1) < 2).all():
        raise LabelError("every site has slides of one class only", "site and class cannot be told apart here")
    alone = np.flatnonzero((counts > 0).sum(axis=0) == 1)
    if len(alone):
        of = ", ".join(repr(str(name)) for name in names[np.unique(site[strata == alone[0]])][:3])
        raise LabelError(
            f"all slides of a class are at {of}, so no other site can teach it",
            "leave that class out, or leave whole patients out instead: --probe.hold_out patients",
        )
    share = counts / counts.sum(axis=0)
    found = np.empty((repeats, len(counts)), np.int16)
    for repeat, number in enumerate(np.random.SeedSequence(seed).generate_state(repeats)):
        order = np.random.default_rng(int(number)).permutation(len(counts))
        held = np.zeros((folds, counts.shape[1]))
        for k in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
            # An empty fold has the least of everything, so that none stays empty.
            found[repeat, k] = np.lexsort([held.sum(axis=1), held @ share[k]])[0]
            held[found[repeat, k]] += share[k]
        if ((held > 0).sum(axis=0) < 2).any():
            raise LabelError("one fold holds all sites of a class", "other --probe.folds, or another --probe.seed")
    return found[:, unit]


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


def draw_patients(classes: np.ndarray, patients: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n patients of whom all slides are labelled, in the proportions of the classes and some slide of each.

    Args:
        classes: (N,) integer class of each slide that may be drawn.
        patients: (N,) patient of each slide.
        n: how many patients to draw, number of classes ≤ n ≤ number of patients.
        rng: the draw.

    Returns:
        Sorted int64 indices into `classes`.

    Raises:
        LabelError: patients who have slides of several classes, and no draw was found that holds all classes.
    """
    names, patient = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), int(classes.max()) + 1), bool)
    has[patient, classes] = True
    for _ in range(100):
        rows = np.flatnonzero(np.isin(patient, draw_shots(_rarest(has), n, rng)))
        if len(np.unique(classes[rows])) == len(np.unique(classes)):
            return rows
    raise LabelError(f"no {n} patients found who have all classes between them", "larger --probe.shots")
