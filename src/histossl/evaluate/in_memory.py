"""Vectors and labels that are in memory: `probe`, `predict`, `search`, `patient_folds`, `read_embeddings`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from histossl.core.argument_names import names_arguments
from histossl.core.config import from_dict
from histossl.core.embeddings import anndata_of, lent_patients
from histossl.core.errors import FileFormatError, LabelError
from histossl.core.tables import cell
from histossl.evaluate.area_labels import areas_of, with_slides
from histossl.evaluate.classes import known_name
from histossl.evaluate.fitted import keep_probe, load_probe
from histossl.evaluate.labels import PATIENT_COLUMNS, SITE_COLUMNS, SLIDE_COLUMNS, Labels
from histossl.evaluate.patients import combine, labels_for, of_area, patients_of
from histossl.evaluate.predict import predict_source
from histossl.evaluate.rivals import probe_with_rivals
from histossl.evaluate.search import nearest
from histossl.evaluate.settings import ProbeResult, ProbeSettings
from histossl.evaluate.sources import Source, read_source
from histossl.evaluate.splits import grouped_folds

if TYPE_CHECKING:
    from anndata import AnnData

Vectors = Any  # AnnData, DataFrame, array, or a path: what `slide_vectors` takes


@names_arguments
def probe(
    vectors: AnnData | pd.DataFrame | NDArray | str | Path,
    labels: pd.DataFrame | pd.Series | ArrayLike | str | Path,
    *,
    patients: Mapping[str, str] | pd.Series | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> ProbeResult:
    """Measure how well vectors predict a label: a linear model, on whole patients held out, with intervals.

    Args:
        vectors: AnnData of `embed` or `read_embeddings` (its baselines are compared with it); a DataFrame of numbers
            with slide ids as index; an array (N, d); or the path of a study or of a file that `read_embeddings` reads.
        labels: a DataFrame with the columns slide_id (or slide ids as index), optionally patient_id and site, and one
            or more of labels; a Series with slide ids as index; N labels in the order of the vectors; the name of a
            column of obs; or the path of a CSV.
        patients: slide_id -> patient, where neither vectors nor labels name them. A slide without a patient counts as
            a patient of its own.
        out: a folder for the probe fitted on all labelled slides, which `predict` applies to new ones; None keeps none.
        **settings: of `ProbeSettings`, such as `targets=("grade",)`, `folds=5`, `repeats=5`, `shots=()`.

    Returns:
        Tables of scores with intervals, out-of-fold predictions, and an audit.

    Raises:
        LabelError: labels do not fit the slides, or there are too few patients of a class.
        FileFormatError: the vectors are not finite, or not one row a slide.
        SettingsError: an unknown setting or one out of range.
    """
    if isinstance(settings.get("targets"), str):
        settings["targets"] = (settings["targets"],)
    chosen, source = from_dict(ProbeSettings, settings), slide_vectors(vectors)
    source = of_area(source, chosen.area)
    if patients is not None:
        source = replace(source, patients=_patients_of(source, patients))
    if isinstance(labels, str) and labels in getattr(getattr(vectors, "obs", None), "columns", ()):
        labels = vectors.obs[labels]  # type: ignore[union-attr]
    table = _labels(labels, source, chosen)
    result = probe_with_rivals(source, table, chosen)
    if out is not None:
        keep_probe(source, table, chosen, Path(out))
    return result


@names_arguments
def predict(
    fitted: str | Path,
    vectors: AnnData | pd.DataFrame | NDArray | str | Path,
    *,
    coverage: float = 0.9,
    patients: Mapping[str, str] | pd.Series | None = None,
) -> pd.DataFrame:
    """What a kept probe says of new slides, and whether to trust it; never a diagnosis.

    Args:
        fitted: the folder of the probe, of `probe(..., out=folder)`; or a study after `histossl probe`.
        vectors: as of `probe`, of the same encoders as those that the probe was fitted on.
        coverage: the share of new patients like the known ones whose true class is in the set.
        patients: slide_id -> patient, where the vectors do not name them.

    Returns:
        One row a slide and target, see `Predictions.table`.

    Raises:
        FileFormatError: no probe is kept there, or the vectors are of other encoders.
        SettingsError: `coverage` is out of range.
    """
    folder, source = Path(getattr(fitted, "folder", fitted)), slide_vectors(vectors)
    if patients is not None:
        source = replace(source, patients=_patients_of(source, patients))
    kept = load_probe(folder / "probe" if (folder / "probe").is_dir() else folder)
    return predict_source(kept, source, coverage).table


@names_arguments
def search(
    vectors: AnnData | pd.DataFrame | NDArray | str | Path,
    slide: str | int,
    top: int = 10,
    *,
    patients: Mapping[str, str] | pd.Series | None = None,
) -> pd.DataFrame:
    """The slides most similar to a slide, those of its own patient left out.

    Args:
        vectors: as of `probe`.
        slide: the slide's id, or the row of its vector.
        top: how many.
        patients: slide_id -> patient, where the vectors do not name them; a slide without one is only itself left out.

    Returns:
        `slide_id`, `patient_id` ("" where unknown) and `similarity` in [-1, 1], the most similar first: the cosine of
        vectors whose features are standardised over the cohort.

    Raises:
        FileFormatError: there is no such slide.
    """
    source = slide_vectors(vectors)
    known = source.patients if patients is None else _patients_of(source, patients)
    ids = list(source.ids)
    row = slide if isinstance(slide, int | np.integer) else ids.index(slide) if slide in ids else -1
    if not 0 <= row < len(ids):
        raise FileFormatError(f"there is no slide {slide!r}", f"the slides are called {', '.join(ids[:5])}, ...")
    groups = np.array([known.get(name) or f"slide {name}" for name in ids], dtype=object)
    hits = nearest(next(iter(source.vectors.values())), groups, int(row), top)
    found = [(ids[hit.row], known.get(ids[hit.row], ""), hit.similarity) for hit in hits]
    return pd.DataFrame(found, columns=pd.Index(["slide_id", "patient_id", "similarity"]))


@names_arguments
def patient_vectors(
    vectors: AnnData | pd.DataFrame | NDArray | str | Path,
    *,
    patients: Mapping[str, str] | pd.Series | None = None,
    weights: str | Mapping[str, float] | pd.Series | None = None,
) -> AnnData:
    """Vectors of patients: the weighted mean of the vectors of a patient's slides.

    Args:
        vectors: as of `probe`.
        patients: slide_id -> patient, where the vectors do not name them; a slide without one is its own patient.
        weights: slide_id -> weight, 0 or more: slides of weight 0 are left out; or the name of a column of obs that
            holds the weights, such as "tiles"; None weights a patient's slides equally.

    Returns:
        X: (patients, d) float32; obs: index the patients, `slides`, how many were combined; obsm: further vectors.

    Raises:
        FileFormatError: a slide has no weight, or a weight that is negative or not finite.
    """
    from anndata import AnnData

    source = slide_vectors(vectors)
    source = source if patients is None else replace(source, patients=_patients_of(source, patients))
    given = _weights_of(vectors, weights) if isinstance(weights, str) else {} if weights is None else dict(weights)
    share = np.array([given.get(name, np.nan) if given else 1.0 for name in source.ids], np.float64)
    bad = [name for name, weight in zip(source.ids, share, strict=True) if not 0 <= weight < np.inf]
    if bad:
        what = f"{len(bad)} slides have no weight that is 0 or more: {', '.join(map(repr, bad[:3]))}"
        raise FileFormatError(what, "weight every slide; 0 leaves it out")
    kept = np.flatnonzero(share > 0)
    names, groups = np.unique(patients_of(source)[kept], return_inverse=True)
    means = {name: combine(values[kept], groups, share[kept]) for name, values in source.vectors.items()}
    (_, first), *others = means.items()
    obsm: dict[str, Any] = {name.replace(" ", "_"): values for name, values in others}
    return AnnData(X=first, obs=pd.DataFrame({"slides": np.bincount(groups)}, index=pd.Index(names)), obsm=obsm)


@names_arguments
def patient_folds(labels: ArrayLike, patients: ArrayLike, folds: int = 5, *, seed: int = 0) -> NDArray[np.int16]:
    """Folds for a cross-validation of your own: no patient is in two of them, every class is in each.

    Args:
        labels: (N,) class of each slide.
        patients: (N,) patient of each slide.
        folds: how many, 2 or more.
        seed: seed of the distribution of patients.

    Returns:
        (N,) int16, the fold in which each slide is tested; for scikit-learn `PredefinedSplit(patient_folds(y, p))`.

    Raises:
        LabelError: one class only, a class with fewer patients than folds, or a patient with two classes.
    """
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]
    return grouped_folds(classes, np.asarray(patients).astype(str), folds, 1, seed)[0]


@names_arguments
def read_embeddings(path: str | Path) -> AnnData:
    """Read vectors of slides, from a file or folder of any supported kind, as AnnData.

    Args:
        path: a study; .h5ad; a folder of <slide_id>.h5 as TRIDENT writes them; .npy with ids.npy beside it; .csv or
            .parquet with the column slide_id.

    Returns:
        X: (slides, d) float32; obs: one row per slide, index slide_id; obsm: further vectors, such as the baselines.

    Raises:
        FileFormatError: nothing of that kind is there, or it is damaged.
    """
    from anndata import AnnData

    path = Path(getattr(path, "folder", path))
    file = path / "embeddings.h5ad" if path.is_dir() else path
    source = read_source(path)
    if file.suffix == ".h5ad":
        return anndata_of(file)
    columns = {"patient_id": source.patients, "site": source.sites}
    values_of = {name: [of.get(slide, "") for slide in source.ids] for name, of in columns.items() if of}
    (_, first), *others = source.vectors.items()
    further: dict[str, Any] = {name.replace(" ", "_"): values for name, values in others}
    return AnnData(X=first, obs=pd.DataFrame(values_of, index=pd.Index(source.ids)), obsm=further)


def slide_vectors(vectors: Vectors) -> Source:
    """Turn any form of vectors that `probe` accepts into one source.

    Args:
        vectors: a path or a study, AnnData, a DataFrame of numbers with the slides as index, or an array (slides, d).

    Returns:
        The vectors, and what is known of the slides; slides of an array are called "0", "1", ...

    Raises:
        FileFormatError: `vectors` is none of these.
    """
    if isinstance(vectors, str | Path) or hasattr(vectors, "folder"):
        return read_source(Path(getattr(vectors, "folder", vectors)))
    if hasattr(vectors, "obs") and hasattr(vectors, "obsm"):
        return _of_anndata(vectors)
    if isinstance(vectors, pd.DataFrame):
        ids, values = tuple(map(str, vectors.index)), vectors.to_numpy()
    else:
        values = np.asarray(vectors)
        ids = tuple(str(k) for k in range(len(values))) if values.ndim else ()
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        what = f"vectors of shape {values.shape} and {values.dtype}"
        raise FileFormatError(what, "pass (slides, numbers): AnnData, a DataFrame of numbers, an array, or a path")
    return Source(ids, {"vectors": values.astype(np.float32)})


def _of_anndata(data: AnnData) -> Source:
    dense = data.X.toarray() if hasattr(data.X, "toarray") else np.asarray(data.X)  # type: ignore[union-attr]
    about = data.uns.get("histossl")
    found = {str(about["name"]) if about is not None else "vectors": dense.astype(np.float32)}
    if about is not None:  # the obsm of other tools may hold anything
        found |= {str(name).replace("_", " "): np.asarray(values, np.float32) for name, values in data.obsm.items()}
    ids = tuple(map(str, data.obs_names))
    columns = {str(name).lower(): data.obs[name].astype(str).tolist() for name in data.obs.columns}

    def values_of(names: Sequence[str]) -> dict[str, str]:
        values = next((columns[name] for name in names if name in columns), [])
        return {name: value for name, value in zip(ids, values, strict=False) if known_name(value)}

    lent, stages = lent_patients(about or {}), json.loads(str(about["settings"])) if about is not None else {}
    people, places, areas = values_of(PATIENT_COLUMNS), values_of(SITE_COLUMNS), areas_of(ids, columns)
    people, lent = with_slides(areas, people, lent)
    parts = tuple(map(str, data.var["part"])) if "part" in data.var else ()
    return Source(ids, found, patients=people, sites=places, lent=lent, stages=stages, parts=parts, areas=areas)


def _weights_of(vectors: Vectors, column: str) -> dict[Any, float]:
    obs = vectors.obs if hasattr(vectors, "obs") else read_embeddings(getattr(vectors, "folder", vectors)).obs
    if column not in obs:
        raise FileFormatError(f"no column {column!r} of weights", f"there are {', '.join(map(str, obs.columns))}")
    return dict(zip(map(str, obs.index), obs[column].astype(float), strict=True))


def _patients_of(source: Source, patients: Mapping[str, str] | pd.Series) -> dict[str, str]:
    given = {str(name): str(patient) for name, patient in patients.items()}
    return source.patients | {name: given[name] for name in source.ids if name in given}


def _labels(labels: Any, source: Source, chosen: ProbeSettings) -> Labels:
    """Labels in memory, written to a file and read back, so that they pass the same checks as those of a file."""
    if isinstance(labels, str | Path):
        return labels_for(source, labels, chosen)
    table = _label_table(labels, source)
    with tempfile.TemporaryDirectory(prefix="histossl-") as place:
        path = Path(place) / "labels.csv"
        table.map(cell).to_csv(path, index=False)
        found = labels_for(source, path, chosen)
    return replace(found, lines={})  # these rows are not those of a file of the user


def _label_table(labels: Any, source: Source) -> pd.DataFrame:
    if isinstance(labels, pd.DataFrame):
        table = labels.copy()
        if not any(str(column).lower() in SLIDE_COLUMNS for column in table.columns):
            table.insert(0, "slide_id", table.index.astype(str))
        return table
    name, values = "label", np.asarray(labels)
    if isinstance(labels, pd.Series):
        name = name if labels.name is None else str(labels.name)
        if not isinstance(labels.index, pd.RangeIndex):  # which a Series has that was made without slide ids
            return pd.DataFrame({"slide_id": labels.index.astype(str), name: values})
    if values.shape != (len(source.ids),):
        what = f"labels of shape {values.shape} for {len(source.ids)} slides"
        raise LabelError(what, "pass one for each slide, or a Series with slide ids as index")
    return pd.DataFrame({"slide_id": source.ids, name: values})
