"""Reads vectors of slides: from a study, AnnData, TRIDENT's folders, Giga-SSL's arrays, or a table."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.embeddings import anndata_of, lent_patients, read_embeddings
from histossl.core.errors import FileFormatError, file_errors
from histossl.core.hdf5 import dataset_of, open_h5
from histossl.core.names import Known, bare, clashes, listed, row_list, spelling_notes, spellings
from histossl.core.npy import read_npy
from histossl.core.sidecars import files_of
from histossl.core.tables import EMPTY, number, read_table
from histossl.evaluate.area_labels import areas_of, with_slides
from histossl.evaluate.classes import known_name
from histossl.evaluate.columns import prefix_of, row_numbers, vector_of
from histossl.evaluate.labels import PATIENT_COLUMNS, SITE_COLUMNS, SLIDE_COLUMNS, find_column
from histossl.evaluate.pickled import read_pickled_vectors


@dataclass(frozen=True)
class Source:
    """Vectors of slides, and what is known of the slides.

    Attributes:
        ids: N unique slide ids, the order of the rows.
        vectors: name -> (N, d) float32; the first is the one to judge, the others are its rivals.
        patients: slide id -> patient, "" where unknown; empty where none is known.
        sites: slide id -> where the slide was made; empty where none is known.
        paths: slide id -> the slide's file, where known; it need not be there any more.
        pictures: slide id -> an existing picture of the slide.
        tiles: slide id -> the HDF5 file of the features of its tiles, where it exists.
        tile_counts: slide id -> number of its tiles, where known.
        encoder: the folder of the slide encoder that made the vectors, where it exists.
        parts: name of the part of every number of the first vectors; empty where unknown.
        lent: slides whose patient is known from the labels of the last probe; other labels may say otherwise.
        seen: the slides that the slide encoder was trained on, without labels; None where unknown.
        columns: names of the numbers of the first vectors, where a table names them.
        named: whether the user named these columns.
        stages: settings of the stages that made the vectors; empty where nobody says.
        notes: one line each for what was left out or not read as it is written.
        passed: one line each for files that were not read.
        areas: slide id -> its slide and its area, of vectors of areas.
    """

    ids: tuple[str, ...]
    vectors: dict[str, NDArray[np.float32]]
    patients: dict[str, str] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    tiles: dict[str, Path] = field(default_factory=dict)
    tile_counts: dict[str, int] = field(default_factory=dict)
    encoder: Path | None = None
    parts: tuple[str, ...] = ()
    lent: frozenset[str] = frozenset()
    seen: frozenset[str] | None = None
    columns: tuple[str, ...] = ()
    named: bool = False
    stages: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    areas: dict[str, tuple[str, str]] = field(default_factory=dict)


def read_source(path: Path, pickles: bool = False, columns: Sequence[str] = ()) -> Source:
    """Read vectors of slides; the kind of file or folder at `path` decides how.

    - the folder of a study, or an `.h5ad` file: X and, in ours, the baselines in obsm;
    - a folder of `<slide_id>.h5` with `features` (d,) or (1, d), as TRIDENT writes slide features; where these are
      features of tiles, (n, d) or (1, n, d), their mean and, as a rival, mean and standard deviation;
    - `embeddings.npy` (N, d) beside `ids.npy` (N,) text, as Giga-SSL publishes them, or the folder of both;
    - `.csv`, `.tsv`, `.txt` or `.parquet`: a column slide_id, optionally patient_id and site, and the columns of the
      vector: those named by `columns`, else numbered columns with the same prefix, see `vector_of`;
    - with `pickles` also the `.npy` files of a dictionary, slide -> vector, that Giga-SSL's authors publish later.

    Args:
        path: the file or folder.
        pickles: whether `.npy` files of a pickled dictionary are read; nothing in them is executed.
        columns: names of the columns of the vector in a table; empty to find them.

    Returns:
        The vectors of the slides by name of the embedding, and what is known of the slides.

    Raises:
        FileFormatError: nothing of that kind is there, or it is damaged; slides named twice; vectors not finite.
    """
    path = Path(path)
    if pickles and path.suffix == ".npy" and not (path.parent / "ids.npy").exists():
        found = read_pickled_vectors(path)
        values = np.stack(list(found.values())) if found else np.empty((0, 0), np.float32)
        return _checked(path, Source(tuple(found), {path.stem: values}))
    table = functools.partial(_table, wanted=tuple(columns))
    kinds: dict[str, Callable[[Path], Source]] = {".h5ad": _anndata, ".npy": _arrays}
    kinds |= dict.fromkeys((".csv", ".tsv", ".txt", ".parquet"), table)
    if (study := path / "embeddings.h5ad").exists():
        return _checked(path, _anndata(study))
    if path.is_dir():
        read = _arrays if (path / "ids.npy").exists() else _folder
    elif path.suffix.lower() in kinds:
        read = kinds[path.suffix.lower()]
    else:
        what = "no vectors of slides" if path.exists() else "is not there"
        raise FileFormatError(f"{path}: {what}", "give a study, .h5ad, .csv, .parquet, a folder of .h5, embeddings.npy")
    return _checked(path, read(path))


def side_by_side(source: Source, other: Source, name: str) -> Source:
    """The vectors of a source, then the first vectors of another; the slides must be the same.

    Args:
        source: the source to judge; what it knows of the slides is kept.
        other: the source of the rival.
        name: name of the rival's vectors where the source already has vectors of that name.

    Returns:
        The source with one more embedding.

    Raises:
        FileFormatError: the sources have different slides; names some.
    """
    title, values = next(iter(other.vectors.items()))
    theirs, ours = Known(other.ids), Known(source.ids)
    lost = [slide for slide in source.ids if slide not in theirs]
    if lost or len(other.ids) != len(source.ids):
        extra = [slide for slide in other.ids if slide not in ours]
        what = f"{len(lost)} slides only in the first, {lost[:3]}, {len(extra)} only in the second, {extra[:3]}"
        near = difflib.get_close_matches(lost[0], extra, 1) if lost else []
        hint = f"is {lost[0]!r} the same as {near[0]!r}?" if near else "compare vectors of the same slides"
        raise FileFormatError(f"the two files have different slides: {what}", hint)
    row = {slide: k for k, slide in enumerate(other.ids)}
    spelt = {slide: str(theirs.get(slide)) for slide in source.ids}
    title = title if title not in source.vectors else f"{title} ({name})"
    if title in source.vectors:
        raise FileFormatError(f"both files call their vectors {title!r}", "rename one of the files")
    notes = (*source.notes, *other.notes, *spelling_notes("slides of the two files", spelt))
    vectors = {**source.vectors, title: values[[row[spelt[slide]] for slide in source.ids]]}
    return replace(source, vectors=vectors, notes=notes)


def _checked(path: Path, source: Source) -> Source:
    if not source.ids:
        raise FileFormatError(f"{path}: no slide in it")
    twice = pd.Index(source.ids)[pd.Index(source.ids).duplicated()]
    if len(twice):
        some = ", ".join(repr(str(name)) for name in dict.fromkeys(twice[:3]))
        raise FileFormatError(f"{path}: slide {some} is there twice", "keep one row a slide")
    if pairs := clashes(source.ids):
        some = ", ".join(f"{a!r} and {b!r}" for a, b in pairs[:3])
        raise FileFormatError(f"{path}: slides whose names differ by their spelling alone: {some}", "rename them")
    people = spellings(patient.strip() for patient in source.patients.values())
    places = spellings(site.strip() for site in source.sites.values())
    notes = (*spelling_notes("patients", people), *spelling_notes("sites", places))
    source = replace(
        source,
        patients={slide: people[patient.strip()] for slide, patient in source.patients.items()},
        sites={slide: places[site.strip()] for slide, site in source.sites.items()},
        notes=(*source.notes, *(f"{path.name}: {what}" for what in notes)),
    )
    for name, values in source.vectors.items():
        if values.ndim != 2 or len(values) != len(source.ids):
            raise FileFormatError(f"{path}: {name} has shape {values.shape} for {len(source.ids)} slides")
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            some = ", ".join(repr(source.ids[k]) for k in bad[:3])
            what = f"{path}: {name} of {len(bad)} slides is not finite: {some}"
            raise FileFormatError(what, "make the vectors of these slides anew, or leave them out of the file")
        counting = [] if source.columns or source.encoder else row_numbers(values)
        if counting:
            what = f"{path}: number {counting[0]} of each vector of {name} counts the rows of the file"
            raise FileFormatError(what, "a row number is no feature: write the vectors without it")
    return source


def _anndata(path: Path) -> Source:
    with file_errors(path, "give an AnnData file with a row a slide"):
        return _of_anndata(path, anndata_of(path))


def _of_anndata(path: Path, data: Any) -> Source:
    if ours := "histossl" in data.uns:
        found = read_embeddings(path)
        slides, vectors, parts, stages = found.slides, found.vectors, found.parts, found.settings
    else:
        dense = data.X.toarray() if hasattr(data.X, "toarray") else np.asarray(data.X)
        slides, vectors = pd.DataFrame(data.obs), {path.stem: dense.astype(np.float32)}
        parts, stages = tuple(map(str, data.var["part"])) if "part" in data.var else (), {}
    ids = list(map(str, slides.index))
    columns = {str(name): slides[name].astype(str).tolist() for name in slides.columns}
    patient, site = (find_column(list(columns), names) for names in (PATIENT_COLUMNS, SITE_COLUMNS))
    patients = None if patient is None else [known_name(p) for p in columns[patient]]
    sites = () if site is None else columns[site]
    names = [n for n in ids if Path(n).name == n and "\\" not in n]  # others would lead out of the folder
    ends = (("qc", ".jpg"), ("features", ".h5"))
    rooms = {part: {n: path.parent / part / f"{n}{end}" for n in names} for part, end in ends}
    standing = {part: {n: file for n, file in files.items() if file.is_file()} for part, files in rooms.items()}
    encoder, areas = path.parent / "slide-encoder", areas_of(ids, columns)
    lent = lent_patients(data.uns["histossl"]) if ours else ()
    people, lent = with_slides(areas, dict(zip(ids, patients or (), strict=False)), lent)
    return Source(
        tuple(ids),
        vectors,
        people,
        sites={name: site for name, site in zip(ids, sites, strict=False) if known_name(site)},
        paths={name: Path(place) for name, place in zip(ids, columns.get("path", ()), strict=False) if place},
        pictures=standing["qc"],
        tiles=standing["features"],
        tile_counts=_counts(ids, columns.get("tiles", ())),
        encoder=encoder if encoder.is_dir() else None,
        parts=parts,
        lent=lent,
        seen=_seen(encoder / "config.json"),
        stages=stages,
        areas=areas,
    )


def _counts(ids: Sequence[str], tiles: Sequence[str]) -> dict[str, int]:
    """Slide -> number of tiles, of the slides of which it is known."""
    found = {}
    for name, text in zip(ids, tiles, strict=False):
        with suppress(ValueError, OverflowError):
            found[name] = int(number(text))
    return {name: count for name, count in found.items() if count > 0}


def _seen(config: Path) -> frozenset[str] | None:
    try:
        return frozenset(map(str, json.loads(config.read_text(encoding="utf-8"))["about"]["slides"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder(folder: Path) -> Source:
    files, others = files_of(folder, (".h5", ".hdf5"))
    if not files:
        raise FileFormatError(f"{folder}: no vectors of slides", "give a study, or a folder of <slide_id>.h5")
    passed = passed_over(folder, others)
    features = {file.stem: _features(file) for file in files}
    lengths = {name: rows.shape[1] for name, rows in features.items()}
    odd = [name for name, length in lengths.items() if length != next(iter(lengths.values()))]
    if odd:
        raise FileFormatError(
            f"{folder}: {odd[0]} has {lengths[odd[0]]} numbers a vector, others have not", "part them"
        )
    if all(len(rows) == 1 for rows in features.values()):
        return Source(tuple(features), {folder.name: np.concatenate(list(features.values()))}, passed=passed)
    mean = np.stack([rows.mean(axis=0) for rows in features.values()])
    with np.errstate(invalid="ignore"):  # what is not finite is refused with its slide
        deviation = np.stack([rows.std(axis=0) for rows in features.values()])
    vectors = {"mean pooling": mean, "mean and deviation": np.hstack([mean, deviation])}
    counts = {name: len(rows) for name, rows in features.items()}
    return Source(
        tuple(features), vectors, tiles={file.stem: file for file in files}, tile_counts=counts, passed=passed
    )


def passed_over(folder: Path, others: Sequence[Path]) -> tuple[str, ...]:
    """Note files that were not read but may hold features.

    Args:
        folder: the folder that was read.
        others: files in it that were not read.

    Returns:
        One line, or nothing where there are no such files.
    """
    kinds = (".pt", ".pth", ".npy", ".npz", ".zarr", ".h5ad", ".pkl")
    meant = [path for path in others if path.suffix.lower() in kinds]
    if not meant:
        return ()
    some = ", ".join(path.name for path in meant[:3]) + (f" and {len(meant) - 3} more" if len(meant) > 3 else "")
    return (f"{folder}: {len(meant)} files beside the .h5 were not read: {some}; histossl features convert reads .pt",)


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
    # An array of objects is a pickle, which can execute code.
    hint = "it needs embeddings.npy (N, d) and ids.npy (N,) of text (save ids with np.save(..., ids.astype(str))); "
    hint += "a dictionary of vectors is a pickle, and is read only with --pickles true"
    values, ids = read_npy(place, hint), read_npy(folder / "ids.npy", hint)
    if ids.ndim != 1 or values.dtype.kind not in "fiu":
        raise FileFormatError(f"{folder}: {ids.shape} ids, embeddings of {values.dtype}", "(N,) text and (N, d) floats")
    return Source(tuple(str(name) for name in ids), {place.stem: values.astype(np.float32)})


def _table(path: Path, wanted: Sequence[str] = ()) -> Source:
    table, notes = _parquet(path) if path.suffix.lower() == ".parquet" else _text(path)
    columns = [str(name) for name in table.columns]
    slide, patient, site = (find_column(columns, n) for n in (SLIDE_COLUMNS, PATIENT_COLUMNS, SITE_COLUMNS))
    if slide is None:
        raise FileFormatError(f"{path}: no column slide_id", "name the column of slides slide_id")
    numbers = table.drop(columns=[name for name in (slide, patient, site) if name is not None])
    words = [str(name) for name in numbers.columns if not pd.api.types.is_numeric_dtype(numbers[name])]
    if wanted:
        words = [name for name in words if name in wanted]
    elif len(words) < len(numbers.columns) and _numbered(numbers.columns):
        lost = [name for name in words if prefix_of(name) is None]
        notes += [f"{path.name}: left out of the vector: columns of text, {', '.join(lost[:3])}"] if lost else []
        words = [name for name in words if name not in lost]
    if words or numbers.empty:
        raise _without_numbers(path, table, words)
    numbers = numbers.select_dtypes("number")
    found = vector_of(path.name, numbers, wanted)
    ids = [str(name).strip() for name in table[slide]]
    patients = {} if patient is None else dict(zip(ids, _words(table[patient]), strict=True))
    known = {} if site is None else dict(zip(ids, _words(table[site]), strict=True))
    return Source(
        tuple(ids),
        {path.stem: found.values},
        patients,
        {name: place for name, place in known.items() if place},
        columns=found.columns,
        named=bool(wanted),
        notes=(*notes, *found.notes),
    )


def _numbered(columns: Iterable[object]) -> bool:
    return sum(prefix_of(str(name)) is not None for name in columns) > 1


def _words(column: Any) -> list[str]:
    """A column of names; "" where nothing is known."""
    return [known_name(text) for text in column.fillna("").astype(str)]


def _text(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """A table of text, its numbers as numbers, and notes on it."""
    found = read_table(path)
    header = list(next(iter(found.rows.values()), dict.fromkeys(found.columns)))
    names = {bare(name) for name in (*SLIDE_COLUMNS, *PATIENT_COLUMNS, *SITE_COLUMNS)}
    cells: dict[str, list] = {}
    for name in header:
        words = [row[name] for row in found.rows.values()]
        try:
            cells[name] = words if bare(name) in names else [_number_or_nan(word) for word in words]
        except ValueError:
            cells[name] = words
    if slide := find_column(found.columns, SLIDE_COLUMNS):
        lines = pd.Series({line: row[slide] for line, row in found.rows.items()}, dtype=str)
        twice = pd.Series(lines[lines.duplicated(keep=False)]).groupby(lines).groups
        some = [f"{name!r} ({row_list(list(rows))})" for name, rows in twice.items()]
        if some:
            raise FileFormatError(f"{path}: slides named twice: {listed(some, 3, False)}", "keep one row a slide")
    return pd.DataFrame(cells, index=pd.Index(list(found.rows))), [f"{path.name}: {what}" for what in found.notes]


def _number_or_nan(word: str) -> float:
    return float("nan") if word.lower() in EMPTY else number(word)


def _without_numbers(path: Path, table: pd.DataFrame, words: list[str]) -> FileFormatError:
    """The error over columns that are no numbers: names the first one's rows."""
    hint, odd = "write one number a cell, or say which columns are the vector: --columns", {}
    if not words:
        return FileFormatError(f"{path}: no columns of numbers", hint)
    for line, cell in table[words[0]].items():
        try:
            _number_or_nan(str(cell))
        except ValueError:
            odd[line] = str(cell)[:40]
    some = f"{row_list(odd)}: {listed(dict.fromkeys(odd.values()), 3)}" if odd else "all rows"
    more = f", and {listed(words[1:], 3)} too" if len(words) > 1 else ""
    return FileFormatError(f"{path}: column {words[0]!r} holds no number in {some}{more}", hint)


def _parquet(path: Path) -> tuple[pd.DataFrame, list[str]]:
    try:
        table = pd.read_parquet(path)
    except ImportError as error:
        raise FileFormatError(f"{path}: Parquet cannot be read here", "pip install pyarrow, or save a CSV") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: not a table ({error})") from error
    # pandas keeps a named index apart from the columns; slide ids often are one.
    return (table if table.index.name is None else table.reset_index()), []
