"""Folds: slides that train and slides that test never share a patient, and on request never a site."""

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
    """Distribute the patients over folds, class by class, several times.

    Patients are distributed, not slides: the number of patients of a class then differs by at most one between folds,
    and no class can be missing from a fold (scikit-learn's StratifiedGroupKFold balances slides and does not ensure
    that). A patient with slides of several classes counts for the rarest of them.

    Args:
        classes: (N,) integer class of each slide, 0 ≤ class < number of classes.
        patients: (N,) patient of each slide; any type that sorts.
        folds: number of folds, ≥ 2.
        repeats: number of independent distributions.
        seed: of the distributions; repeat r of one seed is always the same.
        mixed_patients: whether slides of one patient may have different classes.

    Returns:
        (repeats, N) int16: the fold in which each slide is tested; it trains in all others.

    Raises:
        LabelError: there is only one class; a class has fewer patients than folds; slides of a patient have different
            classes without `mixed_patients`; or with it, one fold has all patients of a class.
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
            "correct them; if labels belong to slides and not to patients: --probe.mixed-patients true",
        )
    stratum = _rarest(has)
    fewest = min(int(has.sum(axis=0)[has.any(axis=0)].min()), int(np.bincount(stratum).max()))
    if fewest < folds:
        way_out = f"--probe.folds {fewest}" if fewest >= 2 else "label more patients, or leave that class out"
        raise LabelError(f"{folds} folds, but the rarest class has {fewest} of {len(names)} patients", way_out)

    fold_of = np.empty((repeats, len(names)), np.int16)
    seeds = np.random.SeedSequence(seed).generate_state(repeats)
    for repeat in range(repeats):
        fold_of[repeat] = _stratified_folds(stratum, folds, int(seeds[repeat]))
        if mixed_patients and any(np.ptp(fold_of[repeat, of_class]) == 0 for of_class in has.T if of_class.any()):
            raise LabelError("one fold holds all patients of a class", "fewer --probe.folds, or another --probe.seed")
    return fold_of[:, patient]


def _rarest(has: np.ndarray) -> np.ndarray:
    """The class of each patient (patients,) that fewest patients have, from (patients, classes) bool."""
    return np.where(has, has.sum(axis=0), len(has) + 1).argmin(axis=1)


def site_folds(
    strata: np.ndarray, patients: np.ndarray, sites: np.ndarray, folds: int, repeats: int, seed: int
) -> np.ndarray:
    """Distribute whole sites over folds; sites that share a patient stay together.

    The largest sites are placed first, each into the fold that has least of the site's classes. With as many folds as
    sites every site is left out once; the repeats then differ only in the labels that are drawn for few-label training.

    Args:
        strata: (N,) integer class of each slide.
        patients: (N,) patient of each slide.
        sites: (N,) site of each slide.
        folds: number of folds, ≥ 2.
        repeats: number of independent distributions.
        seed: of the distributions.

    Returns:
        (repeats, N) int16: the fold in which each slide is tested.

    Raises:
        LabelError: there are fewer sites than folds, all slides of a class are at one site or in one fold, or every
            site has slides of a single class.
    """
    names, site = np.unique(sites, return_inverse=True)
    patient = np.unique(patients, return_inverse=True)[1]
    # int32, because connected_components of SciPy 1.11 gives wrong results for other types, without an error.
    site, patient = site.astype(np.int32), patient.astype(np.int32)
    edges = coo_array((np.ones(len(site)), (site, len(names) + patient)), shape=(len(names) + patient.max() + 1,) * 2)
    unit = np.unique(connected_components(edges, directed=False)[1][site], return_inverse=True)[1]
    if unit.max() + 1 < folds:
        way_out = f"--probe.folds {unit.max() + 1}" if unit.max() else "leave whole patients out instead"
        raise LabelError(f"{folds} folds, but {unit.max() + 1} sites that share no patient", way_out)
    counts = np.zeros((unit.max() + 1, int(strata.max()) + 1))
    np.add.at(counts, (unit, strata), 1)
    if ((counts > 0).sum(axis=1) < 2).all():
        raise LabelError("every site has slides of one class only", "site and class cannot be distinguished here")
    alone = np.flatnonzero((counts > 0).sum(axis=0) == 1)
    if len(alone):
        of = ", ".join(repr(str(name)) for name in names[np.unique(site[strata == alone[0]])][:3])
        raise LabelError(
            f"all slides of a class are at {of}, so no other site has slides to train on",
            "leave that class out, or leave whole patients out instead: --probe.hold-out patients",
        )
    share = counts / counts.sum(axis=0)
    found = np.empty((repeats, len(counts)), np.int16)
    for repeat, number in enumerate(np.random.SeedSequence(seed).generate_state(repeats)):
        order = np.random.default_rng(int(number)).permutation(len(counts))
        held = np.zeros((folds, counts.shape[1]))
        for k in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
            # An empty fold has the fewest slides of every class, so that no fold stays empty.
            found[repeat, k] = np.lexsort([held.sum(axis=1), held @ share[k]])[0]
            held[found[repeat, k]] += share[k]
        if ((held > 0).sum(axis=0) < 2).any():
            raise LabelError("one fold holds all sites of a class", "other --probe.folds, or another --probe.seed")
    return found[:, unit]


def _stratified_folds(stratum: np.ndarray, folds: int, seed: int) -> np.ndarray:
    fold_of = np.empty(len(stratum), np.int16)
    with warnings.catch_warnings():
        # A stratum of mixed patients may have fewer patients than there are folds, of which scikit-learn warns.
        warnings.simplefilter("ignore", UserWarning)
        deal = StratifiedKFold(folds, shuffle=True, random_state=seed).split(stratum, stratum)
        for fold, (_, held_out) in enumerate(deal):
            fold_of[held_out] = fold
    return fold_of


def draw_shots(classes: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n slides as training labels, in the proportions of the classes and at least one of each.

    Args:
        classes: (N,) integer class of each slide that may be drawn.
        n: number of slides, number of classes ≤ n ≤ N.
        rng: source of the draw.

    Returns:
        (n,) sorted int64 indices into `classes`.

    Raises:
        ValueError: n is out of its range.
    """
    found, sizes = np.unique(classes, return_counts=True)
    if not len(found) <= n <= len(classes):
        raise ValueError(f"cannot draw {n} of {len(classes)} slides of {len(found)} classes")
    share = np.ones(len(found), int)
    for _ in range(n - len(found)):  # the next slide goes to the class that is furthest below its proportion
        owed = np.where(share < sizes, sizes * n / len(classes) - share, -np.inf)
        share[owed.argmax()] += 1
    drawn = [rng.choice(np.flatnonzero(classes == c), k, replace=False) for c, k in zip(found, share, strict=True)]
    return np.sort(np.concatenate(drawn))


def draw_patients(classes: np.ndarray, patients: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n patients, with all of their slides, in the proportions of the classes and at least one slide of each.

    Args:
        classes: (N,) integer class of each slide that may be drawn.
        patients: (N,) patient of each slide.
        n: number of patients, number of classes ≤ n ≤ number of all patients.
        rng: source of the draw.

    Returns:
        Sorted int64 indices into `classes`, all slides of the drawn patients.

    Raises:
        LabelError: 100 draws had no slide of some class, which can happen where patients have several classes.
        ValueError: n is out of its range.
    """
    names, patient = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), int(classes.max()) + 1), bool)
    has[patient, classes] = True
    for _ in range(100):
        rows = np.flatnonzero(np.isin(patient, draw_shots(_rarest(has), n, rng)))
        if len(np.unique(classes[rows])) == len(np.unique(classes)):
            return rows
    raise LabelError(f"no {n} patients found with slides of all classes", "larger --probe.shots")
