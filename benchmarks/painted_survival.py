"""Survival on a painted cohort, where the true hazard is known: the probe's C-index beside that of the hazard itself.

    histossl synth COHORT --slides 1000 --seed 31 --width 1024 --height 1024 --sites independent
    histossl run COHORT/slides --out STUDY --tile.px 64 --tile.mpp 1.0 --encode.views 0 --pretrain.epochs 12
    python benchmarks/painted_survival.py COHORT STUDY

One outcome of each patient says little of a method: `--fresh 20` draws it anew 20 times from the known hazard.
What vectors know of the sites of the same cohort says `histossl sites STUDY --labels COHORT/labels.csv`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from lifelines.utils import concordance_index

from histossl.evaluate.labels import Labels, read_labels
from histossl.evaluate.patients import combine, patients_of
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.settings import ProbeSettings
from histossl.evaluate.sources import Source, read_source
from histossl.evaluate.splits import grouped_folds
from histossl.evaluate.steady import steady
from histossl.evaluate.survival import fit_survival
from histossl.evaluate.survival_score import concordance, times_of
from histossl.evaluate.targets import make_task
from histossl.wsi.synth.recipe import HAZARDS, draw_outcomes


def survival(cohort: Path, source: Source, factors: pd.DataFrame, settings: ProbeSettings) -> None:
    """Harrell's C of the probe and of the true hazard, on the same pairs: within the same folds."""
    labels = read_labels(cohort / "survival.csv", source.ids, ("os",), source.patients)
    result = probe_with_rivals(source, labels, settings)
    columns = ["embedding", "c_index", "low", "high", "uno_c", "ibs"]
    print(result.survival[columns].round(4).to_string(index=False))
    task = make_task(labels.targets[0], source.ids, labels, replace(settings, unit="slide"))
    if settings.unit == "patient":
        first = np.unique(task.patients, return_index=True)[1]
        people = Labels(labels.table.loc[task.slides[first]].set_index("patient_id", drop=False), labels.targets,
                        outcomes=labels.outcomes)  # fmt: skip
        task = make_task(labels.targets[0], sorted(people.table.index), people, settings)
        factors = factors.drop_duplicates("patient_id").set_index("patient_id")
    told = factors.loc[list(task.slides)]
    hazard = sum(HAZARDS[f] * (told[f] == told[f].max()).to_numpy(float) for f in HAZARDS)
    patient = np.unique(task.patients, return_inverse=True)[1]
    weights = np.ones((1, patient.max() + 1))
    c = [concordance(hazard, task.truth, fold, patient, weights, task.truth[:, 1])[0] for fold in task.folds]
    whole = concordance_index(task.truth[:, 0], -hazard, task.truth[:, 1])
    print(
        f"unit {settings.unit}: C-index of the true hazard {np.mean(c):.4f} within folds, {whole:.4f} over all",
        flush=True,
    )


def fresh_outcomes(source: Source, labels: Labels, draws: int, people: int, seed: int) -> None:
    """One outcome a patient, drawn anew so many times: how far the probe falls short on average, and what steady adds.

    Of `people` patients, drawn anew, too; 0 takes all. Steady sees their slides alone, as in a study of so many.
    Standard errors are over the draws.
    """
    patients, factors = patients_of(source, labels), labels.table
    names, groups = np.unique(patients, return_inverse=True)
    told = factors.drop_duplicates("patient_id").set_index("patient_id").loc[names]
    hazard = sum(HAZARDS[f] * (told[f] == told[f].max()).to_numpy(float) for f in HAZARDS)
    for name, values in source.vectors.items():
        found = []
        for draw in range(draws):
            rng = np.random.default_rng([seed, draw, 4])
            truth, kept = draw_outcomes(hazard, rng), np.sort(rng.permutation(len(names))[: people or None])
            slides, of = np.isin(groups, kept), np.searchsorted(kept, groups)
            plain = combine(values[slides], of[slides]).astype(np.float64)
            both = plain, steady(values[slides], of[slides])(plain)
            folds = grouped_folds(truth[kept, 1].astype(np.int64), names[kept], 5, 1, draw)[0]
            risks = [hazard[kept], *(out_of_fold(x, truth[kept], names[kept], folds) for x in both)]
            about = truth[kept], folds, np.arange(len(kept)), np.ones((1, len(kept))), truth[kept, 1]
            found.append([concordance(risk, *about)[0] for risk in risks])
        true, c, steadied = np.array(found).T
        print(
            f"{len(kept)} patients, {draws} draws, {name}: C-index {c.mean():.4f}, steady {steadied.mean():.4f}, true"
        )
        print(f"  {true.mean():.4f}; short by {told_of(true - c)}, steady {told_of(true - steadied)}, ", end="")
        print(f"gained {told_of(steadied - c)}", flush=True)


def told_of(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ({values.std(ddof=1) / len(values) ** 0.5:.4f})"


def out_of_fold(x: np.ndarray, truth: np.ndarray, patients: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(n,) log hazard ratios by the probe's models of the other folds."""
    risk = np.empty(len(x))
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        about = truth[train], patients[train], x[test], ProbeSettings(), times_of(truth, ())
        risk[test] = fit_survival(x[train], *about)[0][:, 0]
    return risk


def many_labels(source: Source, labels: Labels, draws: int, seed: int) -> None:
    """The same with each patient's outcome drawn many times from its hazard: what vectors hold, however few people."""
    people, factors = patients_of(source, labels), labels.table
    names, groups = np.unique(people, return_inverse=True)
    told = factors.drop_duplicates("patient_id").set_index("patient_id").loc[names]
    hazard = sum(HAZARDS[f] * (told[f] == told[f].max()).to_numpy(float) for f in HAZARDS)
    rng = np.random.default_rng([seed, 3])
    rows = np.repeat(np.arange(len(names)), draws)
    truth = draw_outcomes(hazard[rows], rng)
    strata = np.unique(told[list(HAZARDS)].to_numpy(str), axis=0, return_inverse=True)[1]
    folds = grouped_folds(strata, names, 5, 1, seed)[0]
    ones, times = np.ones((1, len(names))), times_of(truth, ())
    # So many rows of a patient weigh so much more than the penalty.
    settings = ProbeSettings(seed=seed, alphas=tuple(draws * alpha for alpha in ProbeSettings().alphas))
    for name, values in source.vectors.items():
        x, found = steady(values, groups)(combine(values, groups)), []
        for fold in range(5):
            train, test = np.flatnonzero(folds[rows] != fold), np.flatnonzero(folds[rows] == fold)
            about = truth[train], rows[train], x[rows[test]], settings, times
            risk = fit_survival(x[rows[train]], *about)[0][:, 0]
            same = truth[test], folds[rows[test]], rows[test], ones, truth[test, 1]
            found.append([concordance(values, *same)[0] for values in (risk, hazard[rows[test]])])
        c, true = np.mean(found, axis=0)
        start = f"{draws} outcomes of each of {len(names)} patients"
        print(f"{start}: C-index {c:.4f} of {name}, {true:.4f} of the true hazard", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--bootstraps", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=0, help="only draw one outcome a patient anew so many times")
    parser.add_argument("--people", type=int, default=0, help="of so many patients; 0 takes all")
    parser.add_argument("--vectors", nargs="+", default=(), help="names of the vectors; all by default")
    args = parser.parse_args()
    settings = ProbeSettings(shots=(), repeats=args.repeats, bootstraps=args.bootstraps, seed=args.seed)
    source = read_source(args.study)
    if args.vectors:
        source = replace(source, vectors={name: source.vectors[name] for name in args.vectors})
    labels = read_labels(args.cohort / "labels.csv", source.ids, (), source.patients)
    factors = labels.table
    if args.fresh:
        return fresh_outcomes(source, labels, args.fresh, args.people, args.seed)
    many_labels(source, labels, args.draws, args.seed)
    for unit in ("patient", "slide"):
        survival(args.cohort, source, factors, replace(settings, unit=unit, parts=("all",)))


if __name__ == "__main__":
    main()
