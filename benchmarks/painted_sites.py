"""Sites and survival on a painted cohort: what remedies do where the truth is known, and Cox against the true hazard.

    histossl synth COHORT --slides 360 --seed 20 --sites
    histossl run COHORT/slides --out STUDY --tile.px 64 --tile.mpp 1.0 --encode.views 0 --pretrain.epochs 12
    python benchmarks/painted_sites.py COHORT STUDY

Three laboratories stain and scan the painted slides, independently of the labels. The confounded cohort is chosen from
it: of laboratories 1 and 2 the patients of one class, and so few of the other that they are a tenth.
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
from histossl.evaluate.site_effects import site_effects
from histossl.evaluate.sources import Source, read_source
from histossl.evaluate.splits import grouped_folds
from histossl.evaluate.survival import fit_survival
from histossl.evaluate.survival_score import concordance, times_of
from histossl.evaluate.targets import make_task
from histossl.wsi.synth.recipe import HAZARDS


def confounded(labels: Labels, target: str, rng: np.random.Generator) -> Labels:
    """Labels of laboratories 1 and 2 alone, a class of which each has few of."""
    table = labels.table
    people = table.assign(site=[labels.sites[name] for name in table.index]).drop_duplicates("patient_id")
    first, second = sorted(people[target].unique())
    kept = []
    for site, common in (("laboratory 1", first), ("laboratory 2", second)):
        here = people[people["site"] == site]
        rare = here.loc[here[target] != common, "patient_id"].to_numpy()
        most = here.loc[here[target] == common, "patient_id"].to_numpy()
        kept += [*most, *rng.permutation(rare)[: max(2, round(len(most) / 9))]]
    return replace(labels, table=table[table["patient_id"].isin(kept)], targets=(target,), chosen=True)


def only(source: Source, names: list[str]) -> Source:
    rows = [source.ids.index(name) for name in names]
    return replace(source, ids=tuple(names), vectors={k: v[rows] for k, v in source.vectors.items()})


def sites(source: Source, labels: Labels, settings: ProbeSettings) -> None:
    shown = ["target", "remedy", "site_auroc", "purity", "expected_purity", "robustness"]
    shown += ["auroc", "low", "high", "auroc_new_sites"]
    found, said = site_effects(source, labels, settings)
    print(*said, sep="\n")
    print(found[shown].round(3).to_string(index=False), flush=True)


def survival(cohort: Path, source: Source, factors: pd.DataFrame, settings: ProbeSettings) -> None:
    """Harrell's C of the probe and of the true hazard, on the same pairs: within the same folds."""
    labels = read_labels(cohort / "survival.csv", source.ids, (), source.patients)
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


def many_labels(source: Source, factors: pd.DataFrame, draws: int, seed: int) -> None:
    """The same with each patient's outcome drawn many times from its hazard: what vectors hold, however few people."""
    people = patients_of(source)
    names, groups = np.unique(people, return_inverse=True)
    told = factors.drop_duplicates("patient_id").set_index("patient_id").loc[names]
    hazard = sum(HAZARDS[f] * (told[f] == told[f].max()).to_numpy(float) for f in HAZARDS)
    rng = np.random.default_rng([seed, 3])
    rows = np.repeat(np.arange(len(names)), draws)
    event, contact = rng.exponential(60 / np.exp(hazard[rows])), rng.uniform(6, 120, len(rows))
    truth = np.column_stack([np.maximum(np.minimum(event, contact), 0.1), event <= contact])
    strata = np.unique(told[list(HAZARDS)].to_numpy(str), axis=0, return_inverse=True)[1]
    folds = grouped_folds(strata, names, 5, 1, seed)[0]
    ones, times = np.ones((1, len(names))), times_of(truth, ())
    # So many rows of a patient weigh so much more than the penalty.
    settings = ProbeSettings(seed=seed, alphas=tuple(draws * alpha for alpha in ProbeSettings().alphas))
    for name, values in source.vectors.items():
        x, found = combine(values, groups).astype(np.float64), []
        for fold in range(5):
            train, test = np.flatnonzero(folds[rows] != fold), np.flatnonzero(folds[rows] == fold)
            about = truth[train], rows[train], x[rows[test]], settings, times
            risk = fit_survival(x[rows[train]], *about)[0][:, 0]
            same = truth[test], folds[rows[test]], rows[test], ones, truth[test, 1]
            found.append([concordance(values, *same)[0] for values in (risk, hazard[rows[test]])])
        c, true = np.mean(found, axis=0)
        told_of = f"{draws} outcomes of each of {len(names)} patients"
        print(f"{told_of}: C-index {c:.4f} of {name}, {true:.4f} of the true hazard", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--bootstraps", type=int, default=1000)
    parser.add_argument("--targets", nargs="*", default=["composition", "lesion", "arrangement"])
    args = parser.parse_args()
    settings = ProbeSettings(shots=(), repeats=args.repeats, bootstraps=args.bootstraps, seed=args.seed)
    source = read_source(args.study)
    name, values = next(iter(source.vectors.items()))
    labels = read_labels(args.cohort / "labels.csv", source.ids, (), source.patients)
    factors = labels.table
    many_labels(source, factors, args.draws, args.seed)
    for unit in ("patient", "slide"):
        survival(args.cohort, source, factors, replace(settings, unit=unit, parts=("all",)))
    alone = replace(source, vectors={name: values})
    sites(alone, replace(labels, targets=tuple(args.targets)), settings)
    torn = confounded(labels, "composition", np.random.default_rng(args.seed))
    sites(only(alone, [name for name in alone.ids if name in torn.table.index]), torn, settings)


if __name__ == "__main__":
    main()
