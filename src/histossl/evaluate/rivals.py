"""Rivals of the first embedding, on the same labels and folds: other poolings, neighbours, trained networks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

import histossl
from histossl.core.atomic import whole
from histossl.core.config import fingerprint
from histossl.core.errors import FileFormatError, SettingsError
from histossl.core.fingerprints import fingerprint_of
from histossl.core.hdf5 import read_features
from histossl.core.npy import read_npy
from histossl.evaluate.labels import Labels
from histossl.evaluate.part_weights import weighed_parts
from histossl.evaluate.patients import by_patient, steady_maps
from histossl.evaluate.probe import probe
from histossl.evaluate.settings import NEIGHBOURS, TRAINED, ProbeResult, ProbeSettings, Recipe, Rival
from histossl.evaluate.site_remedies import remedied
from histossl.evaluate.sources import Source

POOLED = {"mean": "mean pooling", "deviation": "mean and deviation", "max": "max pooling"}


def probe_with_rivals(source: Source, labels: Labels, settings: ProbeSettings, keep: Path | None = None) -> ProbeResult:
    """Probe the vectors of a source beside the rivals that `settings.rivals` names.

    - `parts`: the probe with a weight for each part of the first vectors, chosen by inner folds (`weighed_parts`);
    - `knn`: the 10 nearest labelled slides by the first vectors, cosine of standardised features, weighted by distance;
    - `mean`, `deviation`, `max`: the probe on the mean, on mean and standard deviation, or on the maximum, of the
      tiles' features; those that the source already has are not made twice;
    - `attention`, `sparse`, `finetune`: networks trained on the labels, see `histossl.evaluate.mil`.

    Args:
        source: from `read_source`.
        labels: from `read_labels`.
        settings: of the probe.
        keep: a folder for what each trained network predicted: what is there is not trained again, so that an
            interrupted run resumes.

    Returns:
        As of `probe`.

    Raises:
        SettingsError: the features of the tiles, or the pretrained encoder, are not there.
        LabelError, FileFormatError: see `probe`.
    """
    wanted = [name for name in dict.fromkeys(settings.rivals) if POOLED.get(name) not in source.vectors]
    needing = [name for name in wanted if name in (*POOLED, *TRAINED)]
    lost = [name for name in source.ids if name not in source.tiles] if needing else []
    if lost:
        what = f"{', '.join(needing)} need features of tiles, and {len(lost)} slides have none, first {lost[0]!r}"
        raise SettingsError(f"probe.rivals: {what}", "probe the folder of the study that encoded them")
    vectors: dict[str, NDArray[np.float32]] = dict(source.vectors)
    vectors |= parts_alone(source, settings.parts)
    if pooled := [name for name in wanted if name in POOLED]:
        vectors |= _pooled(source, pooled)
    source = replace(source, vectors=vectors)
    labels = replace(labels, sites={**source.sites, **labels.sites})
    members, maps = {name: [name] for name in source.ids}, steady_maps(source, labels, settings)
    if settings.unit == "patient":
        source, labels, members = by_patient(source, labels, settings.combine)
    rivals: dict[str, Rival] = {}
    sites = np.array([labels.sites.get(name, "") for name in source.ids])
    if "knn" in wanted:
        first = next(iter(source.vectors))
        rivals[f"{first}, {NEIGHBOURS} nearest"] = neighbours(source.vectors[first], sites, settings.site_remedy)
    if "parts" in wanted:
        first, ids = next(iter(source.vectors)), list(source.ids)
        patients = labels.table["patient_id"].reindex(ids).fillna(dict(zip(ids, ids, strict=True)))
        name, rival = weighed_parts(source.vectors[first], source.parts, list(patients), settings, sites)
        rivals[f"{first}, {name}"] = rival
    rivals |= _trained(source, [name for name in wanted if name in TRAINED], members, keep)
    found = probe(source.vectors, source.ids, labels, settings, rivals, source.seen, maps)
    return found if settings.unit == "slide" else _counted(found, members)


def _trained(
    source: Source, wanted: Sequence[str], members: Mapping[str, Sequence[str]], keep: Path | None
) -> dict[str, Rival]:
    """The networks that are trained on labels; `members` names the slides of each row."""
    if not wanted:
        return {}
    from histossl.evaluate.mil import read_bags, trained_rival

    if "finetune" in wanted and source.encoder is None:
        raise SettingsError("probe.rivals: finetune needs a pretrained slide encoder", "probe a study that has one")
    bags = read_bags([[source.tiles[slide] for slide in members[name]] for name in source.ids])
    rivals = {TRAINED[name]: trained_rival(name, bags, source.encoder) for name in wanted}
    if keep is None:
        return rivals
    made = {TRAINED[name]: _made(name, source, members) for name in wanted}
    return {title: cached_rival(rival, made[title], source.ids, keep) for title, rival in rivals.items()}


def _counted(found: ProbeResult, members: Mapping[str, Sequence[str]]) -> ProbeResult:
    """The result with the numbers of slides, not of patients, as `n_slides`."""
    pairs = found.predictions[["target", "slide_id"]].drop_duplicates()
    slides = {str(t): sum(len(members[n]) for n in rows["slide_id"]) for t, rows in pairs.groupby("target")}
    every = (found.table, found.numbers, found.survival)
    tables = [t.assign(n_slides=[slides[name] for name in t["target"]]) if len(t) else t for t in every]
    return replace(found, table=tables[0], numbers=tables[1], survival=tables[2])


def parts_alone(source: Source, wanted: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Parts of the first vectors of a source, each as vectors of its own.

    Args:
        source: from `read_source`.
        wanted: names of parts, or `all`.

    Raises:
        SettingsError: a part that is not there, or a file that does not name the parts.
    """
    if not wanted:
        return {}
    first, values = next(iter(source.vectors.items()))
    known = list(dict.fromkeys(source.parts))
    chosen = known if "all" in wanted else list(dict.fromkeys(wanted))
    lost = [name for name in chosen if name not in known]
    if lost or not known:
        there = f"there are {', '.join(known)}" if known else "its file names no parts: embed the study again"
        raise SettingsError(f"probe.parts: {first} has no part {', '.join(map(repr, lost or wanted))}", there)
    at = np.array(source.parts)
    return {f"{first}: {name}": values[:, at == name] for name in chosen}


def cached_rival(rival: Rival, made: str, ids: Sequence[str], folder: Path) -> Rival:
    """A rival that trains once for the same slides, truth and seed.

    Args:
        rival: the method whose predictions are cached.
        made: fingerprint of everything else that its predictions depend on.
        ids: the slides, by row.
        folder: where predictions are kept, one array per training.

    Returns:
        The cached method.
    """

    def predict(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        sides = [[ids[int(row)] for row in rows] for rows in (train, test)]
        path = folder / f"{fingerprint(made, *sides, truth.tolist(), seed)}.npy"
        if path.exists():
            return np.array(read_npy(path, "remove it"))
        found = rival(train, truth, test, seed)
        with whole(path) as part:
            np.save(part, found)
        return found

    return predict


def _made(kind: str, source: Source, members: Mapping[str, Sequence[str]]) -> str:
    """The fingerprint of all that predictions of a trained rival depend on, except the labels."""
    encoder = ""
    if kind == "finetune" and source.encoder is not None:
        with (source.encoder / "model.safetensors").open("rb") as file:
            encoder = hashlib.file_digest(file, "sha256").hexdigest()
    tiles = {name: fingerprint_of(file) or _stamp(file) for name, file in source.tiles.items()}
    several = [dict(members)] if any(len(slides) > 1 for slides in members.values()) else []
    return fingerprint(kind, Recipe(), histossl.__version__, encoder, tiles, *several)


def _stamp(file: Path) -> list[int]:
    """A stamp that changes with a file of another tool."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns]


def neighbours(values: NDArray, sites: NDArray | None = None, remedy: str = "none") -> Rival:
    """Nearest neighbours: classes by their vote, numbers by their mean.

    Args:
        values: (N, d), one row per slide.
        sites: (N,) the site of each slide, for the remedy.
        remedy: as of `remedied`, fitted on all slides but those that are tested.

    Returns:
        A method of the probe.
    """

    def predict(train: NDArray, truth: NDArray, test: NDArray, seed: int) -> NDArray[np.float64]:
        if truth.ndim == 2:
            raise SettingsError("probe.rivals: knn predicts classes and numbers, not survival", "leave knn out")
        rows = values if sites is None else remedied(values, sites, remedy, np.delete(np.arange(len(values)), test))
        scaler = StandardScaler().fit(rows[train])
        x, x_test = scaler.transform(rows[train]), scaler.transform(rows[test])
        how = {"n_neighbors": min(NEIGHBOURS, len(train)), "weights": "distance", "metric": "cosine"}
        if truth.dtype.kind == "f":
            return KNeighborsRegressor(**how).fit(x, truth).predict(x_test)[:, None]
        return KNeighborsClassifier(**how).fit(x, truth).predict_proba(x_test)

    return predict


def _pooled(source: Source, wanted: list[str]) -> Mapping[str, NDArray[np.float32]]:
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in wanted}
    for slide in source.ids:
        features = read_features(source.tiles[slide])
        mean = features.mean(axis=0)
        made = {"mean": mean, "deviation": np.concatenate([mean, features.std(axis=0)]), "max": features.max(axis=0)}
        for name, found in rows.items():
            found.append(made[name])
    try:
        return {POOLED[name]: np.stack(values) for name, values in rows.items()}
    except ValueError as error:
        raise FileFormatError("slides have features of different lengths", "encode all with one encoder") from error
