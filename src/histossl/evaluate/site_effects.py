"""How much vectors know of the site where a slide was made, and what takes it out of them without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from histossl.core.errors import LabelError
from histossl.core.names import listed
from histossl.evaluate.audit import confounding
from histossl.evaluate.labels import Labels
from histossl.evaluate.probe import probe
from histossl.evaluate.settings import NEIGHBOURS, ProbeSettings
from histossl.evaluate.site_remedies import REMEDIES, remedied
from histossl.evaluate.sources import Source
from histossl.evaluate.summary import NEW_SITES
from histossl.evaluate.targets import make_task


def site_effects(source: Source, labels: Labels, settings: ProbeSettings) -> tuple[pd.DataFrame, list[str]]:
    """Measure what vectors know of site and label, as they are and after each remedy.

    Args:
        source: of the vectors; the first embedding is measured.
        labels: of the slides; targets with classes only.
        settings: of the probes.

    Returns:
        One row a target and remedy, which is fitted on the training patients of each fold: `site_auroc` with
        `site_low`, `site_high`: sites told by a linear model from the vectors of patients held out, .5 where it knows
        nothing of them; `purity`: share of the nearest training slides that are of the slide's own site, and
        `expected_purity`, what it would be if they were drawn among those of its own class; `robustness`: among the
        nearest that share either the class or the site and not both, the share of those with the class (PathoROB);
        `auroc` with `low`, `high` of the label with patients held out, and `auroc_new_sites`, the same with whole sites
        held out, empty where that is impossible. And one sentence a target on confounding.

    Raises:
        LabelError: fewer than two sites with enough patients, or no target with classes.
    """
    sites = {**source.sites, **labels.sites}
    labels = replace(labels, sites=sites)
    plain = replace(settings, shots=(), rivals=(), parts=(), hold_out="patients")
    name = next(iter(source.vectors))
    rows, notes = [], []
    for target in labels.targets:
        task = make_task(target, source.ids, labels, plain)
        if task.names is None or task.sites is None:
            why = "has no classes" if task.names is None else "has slides whose site is unknown"
            raise LabelError(
                f"{target} {why}", "add a column site to the labels, or name another column with --probe.targets"
            )
        notes.append(f"{target}: {confounding(task.names[task.truth], task.sites)}")
        one = replace(labels, targets=(target,), chosen=True)
        values, slides = source.vectors[name][task.rows], list(task.slides)
        for how, title in REMEDIES.items():
            settings = replace(plain, site_remedy=how)
            row = {"target": target, "embedding": name, "remedy": title}
            row |= _site_auroc(values, slides, task.patients, task.sites, settings)
            row |= neighbourhood(values, task.truth, task.sites, task.folds, how)
            found = probe({name: values}, slides, one, settings).table.set_index("embedding")
            row |= {figure: found.loc[name, figure] for figure in ("auroc", "low", "high")}
            rows.append(row | {"auroc_new_sites": found["auroc"].get(f"{name}{NEW_SITES}", float("nan"))})
    return pd.DataFrame(rows), notes


def _site_auroc(
    values: NDArray, slides: list[str], patients: NDArray, sites: NDArray, settings: ProbeSettings
) -> dict[str, float]:
    """How well sites are told, of the sites that have a patient for each fold."""
    names = np.unique(sites)
    enough = [name for name in names if len(np.unique(patients[sites == name])) >= settings.folds]
    kept = np.flatnonzero(np.isin(sites, enough))
    if len(enough) < 2:
        count = {name: len(np.unique(patients[sites == name])) for name in names}
        told = listed(
            (f"{name} ({count[name]})" for name in sorted(count, key=lambda name: -count[name])), 3, quote=False
        )
        what = f"two sites with {settings.folds} patients or more are needed; the sites and their patients: {told}"
        raise LabelError(what, "fewer --probe.folds, or more patients a site")
    ids = [slides[k] for k in kept]
    table = pd.DataFrame({"patient_id": patients[kept], "site": sites[kept]}, index=pd.Index(ids))
    # A patient may have slides of several sites.
    labels = Labels(table, ("site",), sites=dict(zip(ids, map(str, sites[kept]), strict=True)))
    found = probe({"v": values[kept]}, ids, labels, replace(settings, mixed_patients=True)).table
    return {f"site_{figure}": float(found[figure].iloc[0]) for figure in ("auroc", "low", "high")}


def neighbourhood(
    values: NDArray, classes: NDArray, sites: NDArray, folds: NDArray, how: str = "none"
) -> dict[str, float]:
    """Sites and classes among the training slides that are nearest to those held out.

    Args:
        values: (N, d) vectors.
        classes: (N,) the class of each slide.
        sites: (N,) its site.
        folds: (repeats, N) int, the fold in which each slide is held out.
        how: the remedy, fitted on the slides that train.

    Returns:
        `purity`, `expected_purity` and `robustness` in [0, 1], see `site_effects`; nan where nothing can be counted.
    """
    same_class, same_site, expected = [], [], []
    for fold_of in folds:
        for fold in np.unique(fold_of):
            train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            x = remedied(values, sites, how, train)
            scaler = StandardScaler().fit(x[train])
            index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), metric="cosine")
            index.fit(scaler.transform(x[train]))
            near = train[index.kneighbors(scaler.transform(x[test]), return_distance=False)]
            same_class.append((classes[near] == classes[test, None]).ravel())
            same_site.append((sites[near] == sites[test, None]).ravel())
            alike = classes[train] == classes[test, None]
            own = (alike & (sites[train] == sites[test, None])).sum(axis=1)
            expected.append(own[alike.any(axis=1)] / alike.sum(axis=1)[alike.any(axis=1)])
    same_class, same_site = np.concatenate(same_class), np.concatenate(same_site)
    right, wrong = (same_class & ~same_site).sum(), (~same_class & same_site).sum()
    return {
        "purity": float(same_site.mean()),
        "expected_purity": float(np.concatenate(expected).mean()),
        "robustness": float(right / (right + wrong)) if right + wrong else float("nan"),
    }
