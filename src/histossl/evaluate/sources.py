"""Vectors of slides from wherever they stand: a study, AnnData, TRIDENT's folders, Giga-SSL's arrays, a table."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.embeddings import read_embeddings
from histossl.core.errors import FileFormatError, file_errors
from histossl.core.hdf5 import check_tree, dataset_of, open_h5
from histossl.evaluate.labels import EMPTY, PATIENT_COLUMNS, SITE_COLUMNS, SLIDE_COLUMNS
from histossl.evaluate.pickled import read_pickled_vectors


@dataclass(frozen=True)
class Source:
    """Vectors of slides, and what is known of the slides.

    Attributes:
        ids: N unique slide ids, the order of the rows.
        vectors: name -> (N, d) float32; the first is the one to be judged, the others are its rivals.
        patients: slide id -> patient, "" where unknown; empty where nobody says.
        sites: slide id -> where the slide was made; empty where nobody says.
        paths: slide id -> the slide's file, where known; it need not be there any more.
        pictures: slide id -> a picture of the slide that stands already.
        tiles: slide id -> the HDF5 file of the features of its tiles, where it stands.
        encoder: the folder of the slide encoder that made the vectors, where it stands.
        seen: the slides that the slide encoder was trained on, without labels; None where unknown.
    """

    ids: tuple[str, ...]
    vectors: dict[str, NDArray[np.float32]]
    patients: dict[str, str] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    tiles: dict[str, Path] = field(default_factory=dict)
    encoder: Path | None = None
    seen: frozenset[str] | None = None


def read_source(path: Path, pickles: bool = False) -> Source:
    """Read vectors of slides, by what lies at `path`.

    - the folder of a study, or an `.h5ad` file: X and, of ours, the baselines in obsm;
    - a folder of `<slide_id>.h5` with `features` (d,) or (1, d), as TRIDENT writes slide features; where these are
      features of tiles, (n, d) or (1, n, d), their mean and, as a rival, mean and standard deviation;
    - `embeddings.npy` (N, d) beside `ids.npy` (N,) text, as Giga-SSL publishes them, or the folder of both;
    - `.csv` or `.parquet`: a column slide_id, optionally patient_id and site, all further columns numbers;
    - with `pickles` also the `.npy` files of a dictionary, slide -> vector, that Giga-SSL's authors publish later.

    Raises:
        FileFormatError: nothing of that kind is there, or it is damaged; slides named twice; vectors not finite.
    """
    path = Path(path)
    if pickles and path.suffix == ".npy" and not (path.parent / "ids.npy").exists():
        found = read_pickled_vectors(path)
        values = np.stack(list(found.values())) if found else np.empty((0, 0), np.float32)
        return _checked(path, Source(tuple(found), {path.stem: values}))
    kinds: dict[str, Callable[[Path], Source]] = {".h5ad": _anndata, ".npy": _arrays, ".csv": _table}
    kinds |= {".parquet": _table}
    if path.is_dir():
        read = _study if (path / "embeddings.h5ad").exists() else _arrays if (path / "ids.npy").exists() else _folder
    elif path.suffix.lower() in kinds:
        read = kinds[path.suffix.lower()]
    else:
        what = "no vectors of slides" if path.exists() else "is not there"
        raise FileFormatError(f"{path}: {what}", "give a study, .h5ad, .csv, .parquet, a folder of .h5, embeddings.npy")
    return _checked(path, read(path))


def side_by_side(source: Source, other: Source, name: str) -> Source:
    """The vectors of a source, then the first of another; the slides must be the same.

    Args:
        source: what is to be judged; what it knows of the slides is kept.
        other: the rival.
        name: what to call the rival's vectors where the source has some of that name.

    Raises:
        FileFormatError: they are not of the same slides; names some.
    """
    title, values = next(iter(other.vectors.items()))
    lost = [slide for slide in source.ids if slide not in set(other.ids)]
    if lost or len(other.ids) != len(source.ids):
        extra = [slide for slide in other.ids if slide not in set(source.ids)]
        what = f"{len(lost)} slides only in the first, {lost[:3]}, {len(extra)} only in the second, {extra[:3]}"
        near = difflib.get_close_matches(lost[0], extra, 1) if lost else []
        hint = f"is {lost[0]!r} the same as {near[0]!r}?" if near else "compare vectors of the same slides"
        raise FileFormatError(f"the two files have different slides: {what}", hint)
    row = {slide: k for k, slide in enumerate(other.ids)}
    title = title if title not in source.vectors else f"{title} ({name})"
    if title in source.vectors:
        raise FileFormatError(f"both files call their vectors {title!r}", "rename one of the files")
    return replace(source, vectors={**source.vectors, title: values[[row[slide] for slide in source.ids]]})


def _checked(path: Path, source: Source) -> Source:
    if not source.ids:
        raise FileFormatError(f"{path}: no slide in it")
    twice = pd.Index(source.ids)[pd.Index(source.ids).duplicated()]
    if len(twice):
        raise FileFormatError(f"{path}: slide {twice[0]!r} is there twice", "keep one row a slide")
    for name, values in source.vectors.items():
        if values.ndim != 2 or len(values) != len(source.ids):
            raise FileFormatError(f"{path}: {name} has shape {values.shape} for {len(source.ids)} slides")
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise FileFormatError(f"{path}: {name} of {len(bad)} slides is not finite, first {source.ids[bad[0]]!r}")
    return source


def _study(folder: Path) -> Source:
    return _anndata(folder / "embeddings.h5ad")


def _anndata(path: Path) -> Source:
    from anndata import read_h5ad

    check_tree(path)
    with file_errors(path, "give an AnnData file with a row a slide"):
        ours = "histossl" in (data := read_h5ad(path)).uns
    if ours:
        found = read_embeddings(path)
        slides, vectors = found.slides, found.vectors
    else:
        dense = data.X.toarray() if hasattr(data.X, "toarray") else np.asarray(data.X)  # type: ignore[union-attr]
        slides, vectors = pd.DataFrame(data.obs), {path.stem: dense.astype(np.float32)}
    ids = [str(name) for name in slides.index]
    columns = {str(name).lower(): slides[name].astype(str).tolist() for name in slides.columns}
    patients = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    sites = next((columns[name] for name in SITE_COLUMNS if name in columns), ())
    rooms = {
        room: {n: path.parent / room / f"{n}{end}" for n in ids} for room, end in (("qc", ".jpg"), ("features", ".h5"))
    }
    standing = {room: {n: file for n, file in files.items() if file.is_file()} for room, files in rooms.items()}
    encoder = path.parent / "slide-encoder"
    return Source(
        tuple(ids),
        vectors,
        patients=dict(zip(ids, patients, strict=True)) if patients else {},
        sites={name: site for name, site in zip(ids, sites, strict=False) if site.lower() not in EMPTY},
        paths={name: Path(place) for name, place in zip(ids, columns.get("path", ()), strict=False) if place},
        pictures=standing["qc"],
        tiles=standing["features"],
        encoder=encoder if encoder.is_dir() else None,
        seen=_seen(encoder / "config.json"),
    )


def _seen(config: Path) -> frozenset[str] | None:
    if not config.exists():
        return None
    try:
        return frozenset(map(str, json.loads(config.read_text(encoding="utf-8"))["about"]["slides"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(folder: Path) -> Source:
    files = sorted(folder.glob("*.h5"))
    if not files:
        raise FileFormatError(f"{folder}: no vectors of slides", "give a study, or a folder of <slide_id>.h5")
    features = {file.stem: _features(file) for file in files}
    lengths = {name: rows.shape[1] for name, rows in features.items()}
    odd = [name for name, length in lengths.items() if length != next(iter(lengths.values()))]
    if odd:
        raise FileFormatError(
            f"{folder}: {odd[0]} has {lengths[odd[0]]} numbers a vector, others have not", "part them"
        )
    if all(len(rows) == 1 for rows in features.values()):
        return Source(tuple(features), {folder.name: np.concatenate(list(features.values()))})
    mean = np.stack([rows.mean(axis=0) for rows in features.values()])
    deviation = np.stack([rows.std(axis=0) for rows in features.values()])
    vectors = {"mean pooling": mean, "mean and deviation": np.hstack([mean, deviation])}
    return Source(tuple(features), vectors, tiles={file.stem: file for file in files})


def _features(path: Path) -> NDArray[np.float32]:
    """(1, d) of a slide, or (n, d) of its tiles."""
    with open_h5(path) as file, file_errors(path, "make it anew"):
        name = "feats" if file.get("features", getlink=True) is None and file.get("feats", getlink=True) else "features"
        values = np.asarray(dataset_of(file, name, path)[:], np.float32)
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim not in (1, 2) or not values.size:
        raise FileFormatError(f"{path}: `features` has shape {values.shape}, not (d,) or (tiles, d)")
    return np.atleast_2d(values)


def _arrays(path: Path) -> Source:
    folder = path if path.is_dir() else path.parent
    place = folder / "embeddings.npy" if path.is_dir() else path
    try:
        values = np.load(place, allow_pickle=False)
        ids = np.load(folder / "ids.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        # Objects in an array are pickles, which run whatever they hold.
        hint = "it needs embeddings.npy (N, d) and ids.npy (N,) of text (save ids with np.save(..., ids.astype(str))); "
        hint += "a dictionary of vectors is a pickle, and is read where it is asked for: --pickles true"
        raise FileFormatError(f"{folder}: not arrays of vectors and ids ({error})", hint) from error
    if ids.ndim != 1 or values.dtype.kind not in "fiu":
        raise FileFormatError(f"{folder}: {ids.shape} ids, embeddings of {values.dtype}", "(N,) text and (N, d) floats")
    return Source(tuple(str(name) for name in ids), {place.stem: values.astype(np.float32)})


def _table(path: Path) -> Source:
    names = (*SLIDE_COLUMNS, *PATIENT_COLUMNS, *SITE_COLUMNS)
    try:
        if path.suffix.lower() == ".csv":
            heads = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns
            text = {head: str for head in heads if str(head).lower() in names}
            table = pd.read_csv(path, dtype=text, keep_default_na=True, encoding="utf-8-sig")  # type: ignore[arg-type]
        else:
            table = pd.read_parquet(path)
            # pandas keeps a named index apart from the columns; slide ids often are one.
            table = table.reset_index() if table.index.name is not None else table
    except ImportError as error:
        raise FileFormatError(f"{path}: Parquet cannot be read here", "pip install pyarrow, or save a CSV") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: not a table ({error})") from error
    lowered = {str(name).lower(): name for name in reversed(list(table.columns))}
    slide = next((lowered[name] for name in SLIDE_COLUMNS if name in lowered), None)
    patient = next((lowered[name] for name in PATIENT_COLUMNS if name in lowered), None)
    if slide is None:
        raise FileFormatError(f"{path}: no column slide_id", "name the column of slides slide_id")
    site = next((lowered[name] for name in SITE_COLUMNS if name in lowered), None)
    numbers = table.drop(columns=[name for name in (slide, patient, site) if name is not None])
    words = [str(name) for name in numbers.columns if not pd.api.types.is_numeric_dtype(numbers[name])]
    if words or numbers.empty:
        raise FileFormatError(f"{path}: columns without numbers: {', '.join(words[:5]) or 'all'}", "drop them")
    ids = [str(name).strip() for name in table[slide]]
    patients = {} if patient is None else dict(zip(ids, table[patient].fillna("").astype(str), strict=True))
    known = {} if site is None else dict(zip(ids, table[site].fillna("").astype(str), strict=True))
    sites = {name: place for name, place in known.items() if place}
    return Source(tuple(ids), {path.stem: numbers.to_numpy(np.float32)}, patients, sites)
