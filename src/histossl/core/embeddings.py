"""embeddings.h5ad: the vectors of all slides in one file, as scanpy and every AnnData tool reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.errors import READ_ERRORS, FileFormatError
from histossl.core.hdf5 import check_tree, write_h5ad
from histossl.core.tables import Row

if TYPE_CHECKING:
    from anndata import AnnData

NUMBERS = {"mpp": "float64", "width": "int64", "height": "int64", "tiles": "int64"}


@dataclass(frozen=True)
class Embeddings:
    """Vectors of slides.

    Attributes:
        slides: one row a slide, index slide_id, the columns of slides.csv.
        vectors: name -> (N, d) float32; the first is the slide vectors themselves (X), the others are baselines.
        settings: of every stage that made them.
        fingerprint: of all that made them.
        parts: of every number of the slide vectors, the name of its part; empty where nobody says.
    """

    slides: pd.DataFrame
    vectors: dict[str, NDArray[np.float32]]
    settings: dict[str, Any]
    fingerprint: str
    parts: tuple[str, ...] = ()


def embeddings_table(
    slides: Sequence[Row],
    vectors: Mapping[str, NDArray],
    settings: dict[str, Any],
    made: str,
    parts: Sequence[str] = (),
) -> AnnData:
    """Slide vectors in memory as AnnData.

    Args:
        slides: N rows with `slide_id`, as of slides.csv.
        vectors: name -> (N, d) floats.
        settings: settings of every stage that made the vectors.
        made: fingerprint of everything that made the vectors.
        parts: name of the part of every number of X, which becomes the column `part` of var; empty where unknown.

    Returns:
        X: the first of `vectors`; obsm: the others; obs: the slides; uns: settings and fingerprint.
    """
    from anndata import AnnData

    obs = (
        pd.DataFrame(slides)
        .set_index("slide_id")
        .drop(columns=["status", "error", "made", "note", "content", "artefacts", "stains"], errors="ignore")
    )
    if "area" in obs and (obs["area"] == "").all():
        obs = obs.drop(columns="area")
    elif "area" in obs:  # the part of the name before the last @, which areas' own names do not hold
        ids = [(row["slide_id"], row.get("area")) for row in slides]
        obs["slide"] = [(name.rpartition("@")[0] if area else "") or name for name, area in ids]
    obs = obs.replace({"mpp": {"": "nan"}})  # features may come without
    obs = obs.astype({name: kind for name, kind in NUMBERS.items() if name in obs})
    names = list(vectors)
    baselines: dict[str, Any] = {n.replace(" ", "_"): np.asarray(vectors[n], np.float32) for n in names[1:]}
    return AnnData(
        X=np.asarray(vectors[names[0]], np.float32),
        obs=obs,
        var=pd.DataFrame({"part": list(parts)}, index=pd.Index([str(k) for k in range(len(parts))])) if parts else None,
        obsm=baselines,
        uns={
            "histossl": {
                "name": names[0],
                "settings": json.dumps(settings, sort_keys=True, ensure_ascii=False),
                "fingerprint": made,
            }
        },
    )


def write_embeddings(
    path: Path,
    slides: Sequence[Row],
    vectors: Mapping[str, NDArray],
    settings: dict[str, Any],
    made: str,
    parts: Sequence[str] = (),
) -> None:
    """Write what `embeddings_table` makes as an AnnData file, whole or absent.

    Args:
        path: the file to write.
        slides: rows of slides.csv, one per slide, in the order of the vectors.
        vectors: name -> (slides, d) float32; the first becomes X, the others obsm.
        settings: settings that made the vectors.
        made: fingerprint of the vectors.
        parts: name of the part of every number of X; empty where unknown.
    """
    data = embeddings_table(slides, vectors, settings, made, parts)
    write_h5ad(path, data)


def write_labels(path: Path, patients: Mapping[str, str], labels: pd.DataFrame) -> None:
    """Add patients and labels to the slides of an AnnData file of ours, in place of those of an earlier call.

    A file that has them already stays as it is, to the byte.

    Args:
        path: the file, as `write_embeddings` wrote it.
        patients: slide -> patient, of slides of which `slides.csv` names none.
        labels: index slide_id, one column a target: text, None where a slide has no label. Columns of numbers become
            numbers, all others categories; a name that the slides already use becomes `label_NAME`.
    """
    data = anndata_of(path)
    about = data.uns["histossl"]
    obs = pd.DataFrame(data.obs).drop(columns=[name for name in _listed(about, "labels") if name in data.obs])
    own = obs["patient_id"].astype(str).mask(obs.index.isin(_listed(about, "patients_of_labels")), "")
    lent = [name for name, patient in own.items() if not patient.strip() and patients.get(str(name))]
    obs["patient_id"] = [patients[name] if name in set(lent) else own[name] for name in obs.index]
    names = {name: f"label_{name}" if name in obs else name for name in map(str, labels.columns)}
    for name, title in names.items():
        values = labels[name].reindex(obs.index)
        numbers = np.asarray(pd.to_numeric(values, errors="coerce"), float)
        words = np.isnan(numbers) & values.notna().to_numpy()
        obs[title] = pd.Categorical(values) if words.any() else numbers
    texts = {"labels": json.dumps(list(names.values())), "patients_of_labels": json.dumps(lent)}
    same = obs.astype(str).equals(pd.DataFrame(data.obs).astype(str))
    if same and all(str(about.get(key)) == text for key, text in texts.items()):
        return
    data.obs = obs
    about |= texts
    write_h5ad(path, data)


def lent_patients(about: Mapping[str, Any]) -> frozenset[str]:
    """The slides whose patient `write_labels` took from labels.

    Args:
        about: the entry `histossl` of the file's `uns`.
    """
    return frozenset(_listed(about, "patients_of_labels"))


def _listed(about: Mapping[str, Any], key: str) -> list[str]:
    return [str(name) for name in json.loads(str(about.get(key, "[]")))]


def anndata_of(path: Path) -> AnnData:
    """AnnData's own reader, of a file that somebody else may have written.

    Args:
        path: the .h5ad file.

    Raises:
        FileFormatError: it leads to other files or in a circle, or claims to be far larger than it is.
        ValueError: an element is of an unknown kind.
        Exception: any other of READ_ERRORS.
    """
    from anndata import read_h5ad
    from anndata._io.specs.registry import IORegistryError  # exported nowhere

    check_tree(path)
    try:
        return read_h5ad(path)
    except IORegistryError as error:
        raise ValueError(str(error)) from error


def read_embeddings(path: Path) -> Embeddings:
    """Read what `write_embeddings` wrote.

    Args:
        path: the .h5ad file.

    Returns:
        The table of slides, the vectors by name, the settings and the fingerprint.

    Raises:
        FileFormatError: the file is absent, truncated, not such a file, or leads to other files or in a circle.
    """
    try:
        data = anndata_of(path)
        about = data.uns["histossl"]
        vectors = {str(about["name"]): np.asarray(data.X)}
        vectors |= {str(name).replace("_", " "): np.asarray(values) for name, values in data.obsm.items()}
        parts = tuple(map(str, data.var["part"])) if "part" in data.var else ()
        settings, made = json.loads(about["settings"]), str(about["fingerprint"])
        return Embeddings(pd.DataFrame(data.obs), vectors, settings, made, parts)
    except READ_ERRORS as error:
        what = f"{path}: not a file of slide vectors ({str(error)[:200]})"
        raise FileFormatError(what, "run `histossl embed` first") from error
