"""One vector and every part of it, on slides composed of real tiles with known truth.

    python benchmarks/real_tiles.py STUDY [STUDY ...] --labels LABELS [LABELS ...] [--draws 20]

Each STUDY is embedded, each LABELS the table of its slides (one LABELS serves all): `slide_id`, `patient_id`, `fold`
(slides of different folds share no source tile), and the columns of --tasks. A plain logistic regression (L2,
C = 10, balanced classes) on rows of length 1 and on standardised rows; the better of the two is given, for every vector
alike. AUROC with 25, 50 and all labels, and the squared correlation (R²) that a ridge regression reaches of `fraction`
where there is one.
Beside the vector: each part alone, mean pooling, the like-for-like rival of which no weight was trained, and the vector
without its stage. Then the vector minus either of these, with a 95 % interval from resampled patients. Last, of several
studies, such as of several seeds of training, the mean and standard deviation over them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from histossl.evaluate.rivals import parts_alone
from histossl.evaluate.sources import read_source

TASKS = ["composition", "needle", "arrangement", "fraction"]
SHOTS = (25, 50, 0)  # 0: all labels of the other folds


def rows_of(values: np.ndarray, train: np.ndarray, way: str) -> np.ndarray:
    """Of length 1, or standardised by those that train."""
    if way == "unit":
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return StandardScaler().fit(values[train]).transform(values)


def drawn(classes: np.ndarray, rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """As many of either class."""
    if not count:
        return rows
    each = [rng.permutation(rows[classes[rows] == c]) for c in np.unique(classes[rows])]
    return np.concatenate([part[: count // len(each) + (k < count % len(each))] for k, part in enumerate(each)])


def predicted(values: np.ndarray, truth: np.ndarray, strata: np.ndarray, fold: np.ndarray, count: int, draw: int,
              way: str, numbers: bool) -> np.ndarray:  # fmt: skip
    """(N,) out-of-fold scores."""
    found = np.empty(len(values))
    for f in np.unique(fold):
        test, rng = fold == f, np.random.default_rng([draw, count, int(f)])
        train = drawn(strata, np.flatnonzero(~test), count, rng)
        x = rows_of(values, train, way)
        if numbers:
            scale = np.sqrt((x[train] ** 2).sum(1).mean())
            model = RidgeCV(np.logspace(-3, 2, 11)).fit(x[train] / scale, truth[train])
            found[test] = model.predict(x[test] / scale)
        else:
            model = LogisticRegression(C=10, class_weight="balanced", max_iter=1000).fit(x[train], truth[train])
            found[test] = model.decision_function(x[test])
    return found


def within_folds(scores: np.ndarray, truth: np.ndarray, fold: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean over the folds of the AUROC: scores of different models have no common zero."""
    found = []
    for f in np.unique(fold):
        rows = np.flatnonzero(fold == f)
        rows = rows if weight is None else np.repeat(rows, weight[rows])
        if len(np.unique(truth[rows])) == 2:
            found.append(roc_auc_score(truth[rows], scores[rows]))
    return float(np.mean(found))


def judged(vectors: dict[str, np.ndarray], table: pd.DataFrame, tasks: list[str], draws: int) -> list[dict]:
    """A row a vector, task and number of labels: the better of the two ways, and the scores of its draws."""
    found, fold = [], table.fold.to_numpy()
    for task in tasks:
        numbers = table[task].nunique() > 2
        truth = table[task].to_numpy(float if numbers else int)
        strata = (truth > np.median(truth)).astype(int) if numbers else truth
        for name, values in vectors.items():
            for count in SHOTS:
                ways = {}
                for way in ("unit", "standard"):
                    scores = [
                        predicted(values, truth, strata, fold, count, d, way, numbers)
                        for d in range(draws if count else 1)
                    ]
                    figure = [r2_score(truth, s) if numbers else within_folds(s, truth, fold) for s in scores]
                    ways[way] = float(np.mean(figure)), scores
                best = max(ways, key=lambda way: ways[way][0])
                found.append({"task": task, "vector": name, "labels": count or "all", "way": best,
                              "figure": ways[best][0], "scores": ways[best][1]})  # fmt: skip
    return found


def explained(scores: np.ndarray, truth: np.ndarray, fold: np.ndarray, weight: np.ndarray | None = None) -> float:
    """R² over all folds."""
    return float(r2_score(truth, scores, sample_weight=weight))


def ahead(rows: list[dict], table: pd.DataFrame, task: str, labels: int | str, pair: tuple[str, str]) -> str:
    """The first of a pair minus the second, AUROC or R², with its interval from resampled patients."""
    one, other = (
        next(r["scores"] for r in rows if (r["task"], r["vector"], r["labels"]) == (task, name, labels))
        for name in pair
    )
    numbers = table[task].nunique() > 2
    truth, fold = table[task].to_numpy(float if numbers else int), table.fold.to_numpy()
    figure = explained if numbers else within_folds
    patient, rng, drawn_ones = np.unique(table.patient_id, return_inverse=True)[1], np.random.default_rng(0), []
    for _ in range(200):
        weight = np.bincount(rng.integers(patient.max() + 1, size=patient.max() + 1), minlength=patient.max() + 1)
        both = [np.mean([figure(s, truth, fold, weight[patient]) for s in scores[:3]]) for scores in (one, other)]
        drawn_ones.append(both[0] - both[1])
    middle = np.mean([figure(a, truth, fold) - figure(b, truth, fold) for a, b in zip(one, other, strict=True)])
    low, high = np.percentile(drawn_ones, [2.5, 97.5])
    return f"{task}, {labels} labels: {middle:+.3f} ({low:+.3f} to {high:+.3f})"


def measured(study: Path, labels: Path, tasks: list[str], draws: int) -> tuple[pd.DataFrame, list[str]]:
    """Figures, a row a vector and a column a task and number of labels; then what training and the stage are worth."""
    source = read_source(study)
    table = pd.read_csv(labels, dtype={"slide_id": str, "patient_id": str}).set_index("slide_id")
    table = table.loc[list(source.ids)]
    vectors = source.vectors | (parts_alone(source, ("all",)) if source.parts else {})
    first = next(iter(vectors))
    if "stage" in source.parts:
        rest = np.flatnonzero(np.array(source.parts) != "stage")
        vectors["without its stage"] = vectors[first][:, rest]
    rows = judged(vectors, table, tasks, draws)
    shown = pd.DataFrame(rows).drop(columns=["scores", "way"])
    shown = shown.pivot(index="vector", columns=["task", "labels"], values="figure").loc[list(vectors)]
    lines = []
    for rival in (name for name in ("untrained encoder", "without its stage") if name in vectors):
        lines.append(f"minus {rival}:")
        for task in tasks:
            lines += ["  " + ahead(rows, table, task, count or "all", (first, rival)) for count in SHOTS]
    return shown, lines


def main() -> None:
    """Print a table of every study, then what training is worth in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, nargs="+", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    labels_of = options.labels * len(options.studies) if len(options.labels) == 1 else options.labels
    figures = []
    for study, labels in zip(options.studies, labels_of, strict=True):
        shown, lines = measured(study, labels, options.tasks, options.draws)
        print(f"{study}: {options.draws} draws", shown.round(3).to_string(), *lines, sep="\n", flush=True)
        figures.append(shown)
    if len(figures) > 1:
        every = pd.concat(figures, keys=range(len(figures))).groupby(level=1, sort=False)
        print(f"mean over {len(figures)} studies:", every.mean().round(3).to_string(), sep="\n")
        print("standard deviation:", every.std().round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
