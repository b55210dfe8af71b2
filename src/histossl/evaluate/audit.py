"""What makes a split pretend: patients on both sides, and slides that are there twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.preprocessing import StandardScaler


def audit_line(
    slides: Sequence[str], patients: np.ndarray, labels: np.ndarray, folds: np.ndarray, vectors: Iterable[np.ndarray]
) -> str:
    """What is to be known of a split in one line: sizes, classes, patients on both sides, near-duplicates.

    Args:
        slides: N names.
        patients: (N,) patient of each slide.
        labels: (N,) class of each slide.
        folds: (repeats, N) the fold in which each slide is tested.
        vectors: (N, d) each; a pair counts where any of them finds it.
    """
    names, patient = np.unique(patients, return_inverse=True)
    one_of = np.zeros(len(names), int)
    one_of[patient] = np.arange(len(patient))
    apart = (folds != folds[:, one_of[patient]]).any(axis=0)
    straddling = len(np.unique(patient[apart]))
    pairs = sorted({pair for values in vectors for pair in near_duplicates(values)})
    pairs = [(a, b) for a, b in pairs if patient[a] != patient[b]]
    some = ", ".join(f"{slides[a]} ~ {slides[b]}" for a, b in pairs[:3])
    twins = (
        f"{len(pairs)} pairs of near-duplicate slides of different patients ({some})" if pairs else "no near-duplicates"
    )
    counts = ", ".join(f"{name} {n}" for name, n in zip(*np.unique(labels, return_counts=True), strict=True))
    return (
        f"{len(slides)} slides of {len(names)} patients ({counts}); "
        f"{straddling or 'no'} patients on both sides of a fold; {twins}"
    )


def near_duplicates(values: np.ndarray, distance: float = 0.05) -> list[tuple[int, int]]:
    """Pairs (a, b), a < b, of rows that lie this much nearer than two rows usually do: most likely one slide twice.

    Distances are between standardised vectors, as a share of the root mean square over all pairs. A cosine would
    not do: it is near 1 for any two slides that are extreme in the same direction.

    Args:
        values: (N, d); with few features (d < 16) different slides may come as near by chance.
        distance: the share, 0.05 is a twentieth of the usual distance.
    """
    x = StandardScaler().fit_transform(values).astype(np.float32)
    square = (x * x).sum(axis=1)
    limit = distance**2 * 2 * square.mean()  # Σ over all pairs |a − b|² / N² = 2 mean |a|², the mean being zero
    found = []
    for start in range(0, len(x) if limit > 0 else 0, 1024):
        block = slice(start, start + 1024)
        apart = square[block, None] + square[None, start:] - 2 * (x[block] @ x[start:].T)
        a, b = np.nonzero(apart <= limit)
        found += [(int(i + start), int(j + start)) for i, j in zip(a, b, strict=True) if i < j]
    return found
