"""How much vectors know of the site where a slide was made, and what takes it out of them without labels."""

from __future__ import annotations

from collections.abc import Mapping
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
from histossl.evaluate.sources import Source
from histossl.evaluate.targets import make_task

REMEDIES = {"none": "as they are", "centre": "centred by site", "scale": "centred and scaled by site"}
SHRINK = 10.0  # slides of the cohort that a site's variance is averaged with


def remedied(values: NDArray, sites: NDArray, how: str) -> NDArray[np.float32]:
    """Take the means, or means and deviations, of the sites out of vectors; no label is used.

    Args:
        values: (N, d) vectors.
        sites: (N,) the site of each slide.
        how: none; centre: every site gets the mean of the cohort; scale: and its deviations, as ComBat does, a site's
            variance being averaged with that of the cohort within sites, as if that were 10 slides more.

    Returns:
        (N, d) float32.
    """
    x = np.asarray(values, np.float64)
    if how == "none":
        return x.astype(np.float32)
    names, site = np.unique(sites, return_inverse=True)
    counts = np.bincount(site)
    means = np.stack([x[site == k].mean(axis=0) for k in range(len(names))])
    rest = x - means[site]
    if how == "scale":
        within = (rest**2).mean(axis=0)
        own = np.stack([(rest[site == k] ** 2).sum(axis=0) for k in range(len(names))])
        shrunk = (own + SHRINK * within) / (counts[:, None] + SHRINK)
        rest *= np.sqrt(np.divide(within, shrunk, out=np.ones_like(shrunk), where=shrunk > 0))[site]
    return (rest + x.mean(axis=0)).astype(np.float32)


def remedied_source(source: Source, sites: Mapping[str, str], how: str) -> Source:
    """A source whose vectors are all `remedied`.

    Args:
        source: of the vectors.
        sites: slide -> site.
        how: as of `remedied`.

    Returns:
        The source with other vectors.

    Raises:
        LabelError: the site of a slide is not known.
    """
    if how == "none":
        return source
    lost = [name for name in source.ids if not sites.get(name)]
    if lost:
        what = f"no site is known of {len(lost)} slides: {listed(lost, 3)}"
        raise LabelError(what, "add a column site to the table of labels, and a row for each slide")
    of = np.array([sites[name] for name in source.ids])
    return replace(source, vectors={name: remedied(values, of, how) for name, values in source.vectors.items()})


def site_effects(source: Source, labels: Labels, settings: ProbeSettings) -> tuple[pd.DataFrame, list[str]]:
    """Measure what vectors know of site and label, as they are and after each remedy.

    Args:
        source: of the vectors; the first embedding is measured.
        labels: of the slides; targets with classes only.
        settings: of the probes.

    Returns:
        One row a target and remedy: `site_auroc` with `site_low`, `site_high`: sites told from the vectors of patients
        held out, .5 where they know nothing of it, and less after a remedy, whose means are of these patients too;
        `purity`: share of the nearest slides of other patients that are of the slide's own site, and `expected_purity`,
        what it would be if they were drawn among those of its own class; `robustness`: among the nearest that share
        either the class or the site and not both, the share of those with the class (PathoROB); `auroc` with `low`,
        `high` of the label with patients held out, and `auroc_new_sites`, the same with whole sites held out, empty
        where that is impossible. And one sentence a target on confounding.

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
            why = "has no classes" if task.names is None else "has slides without a site"
            raise LabelError(f"{target} {why}", "name another with --probe.targets, or add a column site")
        notes.append(f"{target}: {confounding(task.names[task.truth], task.sites)}")
        one = replace(labels, targets=(target,), chosen=True)
        for how, title in REMEDIES.items():
            values = remedied(source.vectors[name][task.rows], task.sites, how)
            row = {"target": target, "embedding": name, "remedy": title}
            row |= _site_auroc(values, list(task.slides), task.patients, task.sites, plain)
            row |= neighbourhood(values, task.truth, task.sites, task.patients)
            found = probe({name: values}, list(task.slides), one, plain).table.iloc[0]
            row |= {figure: found[figure] for figure in ("auroc", "low", "high")}
            rows.append(row | {"auroc_new_sites": _new_sites(values, list(task.slides), one, task.sites, plain)})
    return pd.DataFrame(rows), notes


def _site_auroc(
    values: NDArray, slides: list[str], patients: NDArray, sites: NDArray, settings: ProbeSettings
) -> dict[str, float]:
    """How well sites are told, of the sites that have a patient for each fold."""
    names = np.unique(sites)
    enough = [name for name in names if len(np.unique(patients[sites == name])) >= settings.folds]
    kept = np.flatnonzero(np.isin(sites, enough))
    if len(enough) < 2:
        what = f"{len(enough)} sites have {settings.folds} patients or more"
        raise LabelError(what, "fewer --probe.folds, or more patients a site")
    ids = [slides[k] for k in kept]
    table = pd.DataFrame({"patient_id": patients[kept], "site": sites[kept]}, index=pd.Index(ids))
    # A patient may have slides of several sites.
    found = probe({"v": values[kept]}, ids, Labels(table, ("site",)), replace(settings, mixed_patients=True)).table
    return {f"site_{figure}": float(found[figure].iloc[0]) for figure in ("auroc", "low", "high")}


def _new_sites(values: NDArray, slides: list[str], labels: Labels, sites: NDArray, settings: ProbeSettings) -> float:
    folds = min(settings.folds, len(np.unique(sites)))
    try:
        found = probe({"v": values}, slides, labels, replace(settings, hold_out="sites", folds=folds)).table
    except LabelError:
        return float("nan")
    return float(found["auroc"].iloc[0])


def neighbourhood(values: NDArray, classes: NDArray, sites: NDArray, patients: NDArray) -> dict[str, float]:
    """Sites and classes among the nearest slides of other patients.

    Args:
        values: (N, d) vectors.
        classes: (N,) the class of each slide.
        sites: (N,) its site.
        patients: (N,) its patient.

    Returns:
        `purity`, `expected_purity` and `robustness` in [0, 1], see `site_effects`; nan where nothing can be counted.
    """
    x = StandardScaler().fit_transform(np.asarray(values, np.float64))
    most = np.unique(patients, return_counts=True)[1].max() + NEIGHBOURS
    near = NearestNeighbors(n_neighbors=min(most, len(x)), metric="cosine").fit(x).kneighbors(return_distance=True)[1]
    same_class, same_site, expected = [], [], []
    for k in range(len(x)):
        others = near[k][(patients[near[k]] != patients[k]) & (near[k] != k)][:NEIGHBOURS]
        same_class.append(classes[others] == classes[k])
        same_site.append(sites[others] == sites[k])
        alike = (classes == classes[k]) & (patients != patients[k])
        expected.append((sites[alike] == sites[k]).mean() if alike.any() else np.nan)
    same_class, same_site = np.concatenate(same_class), np.concatenate(same_site)
    right, wrong = (same_class & ~same_site).sum(), (~same_class & same_site).sum()
    return {
        "purity": float(same_site.mean()) if len(same_site) else float("nan"),
        "expected_purity": float(np.nanmean(expected)),
        "robustness": float(right / (right + wrong)) if right + wrong else float("nan"),
    }
