"""Encodes slides in Python, without a study: `encode`, `read_features`, `pretrain_tiles`."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save

from histossl.core import atomic, fingerprints, hdf5
from histossl.core.argument_names import names_arguments
from histossl.core.config import fingerprint, from_dict, to_dict
from histossl.core.console import progress_bar
from histossl.core.errors import FileFormatError, SettingsError, SlideError
from histossl.core.interchange import TileFeatures, attributes_of, read_tile_features
from histossl.core.tables import Row
from histossl.encoders.encode import EncodeJob, EncodeSettings, encode_fingerprint
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.pretrain_tiles import TileTrainSettings
from histossl.encoders.pretrain_tiles import pretrain_tiles as train_tile_encoder
from histossl.encoders.tile_encoder import TileEncoder, fourth_stage, load_encoder
from histossl.encoders.tile_stream import TileSource
from histossl.execution.failures import failure_reason, give_up_on_disk
from histossl.execution.workers import ThreadExecutor, Workers
from histossl.gigassl.slide_sources import SlideSource
from histossl.study.area_rows import areas_in_memory
from histossl.study.folder import Study, slide_names
from histossl.study.import_file import check_coordinates
from histossl.study.inspect_stage import InspectSettings
from histossl.study.stain_target import SAVED, recoloured
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi.areas import AreaFolder, AreaSettings
from histossl.wsi.named_areas import CoreGrid, open_areas
from histossl.wsi.slide import find_slides
from histossl.wsi.tile_files import read_tiles_of
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

Paths = str | Path | Iterable[str | Path]


@dataclass(frozen=True, repr=False)
class CohortFeatures(Mapping[str, TileFeatures]):
    """The features of the tiles of several slides; a mapping from slide_id to arrays, which are read on access.

    `cohort["slide-001"].features` is (N, D) float32 and `.xy` (N, 2) int64, the tiles' top-left corners (x, y) in
    level-0 pixels.

    Attributes:
        rows: one row per slide, as in slides.csv: slide_id, path, mpp, width, height, tiles.
        sources: the files of the features and augmented views of each slide.
        failed: slide_id -> why that slide was left out.
        settings: settings of the stages that made the features, by stage.
        start: weights that a slide encoder may begin with, or None.
        keeps: an object that must live as long as the features: a temporary folder.
    """

    rows: tuple[Row, ...]
    sources: tuple[SlideSource, ...]
    failed: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    start: Path | None = None
    keeps: Any = None

    def __getitem__(self, slide_id: str) -> TileFeatures:
        for source in self.sources:
            if source.slide_id == slide_id:
                return read_tile_features(source.features)
        raise KeyError(slide_id)

    def __iter__(self) -> Iterator[str]:
        return (source.slide_id for source in self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        with h5py.File(self.sources[0].features, "r") as file:
            dim = file["features"].shape[-1]  # type: ignore[union-attr]
        tiles = sum(int(row["tiles"]) for row in self.rows)
        lost = f", {len(self.failed)} slides failed" if self.failed else ""
        return f"CohortFeatures({len(self)} slides, {tiles} tiles of {dim} numbers{lost})"

    @property
    def made(self) -> str:
        """The fingerprint of the features of all slides."""
        return fingerprint([[s.slide_id, str(fingerprints.fingerprint_of(s.features))] for s in self.sources])


@names_arguments
def encode(
    slides: Paths,
    encoder: str | Path | TileEncoder = "self",
    tile: TileSpec = TileSpec(),
    *,
    out: str | Path | None = None,
    tissue: TissueSettings = TissueSettings(),
    areas: str | Path | None = None,
    area: AreaSettings = AreaSettings(),
    mpp: float | None = None,
    mpp_default: float | None = None,
    workers: int = 0,
    device: str = "auto",
    **settings: Any,
) -> CohortFeatures:
    """Find the tissue of slides, place tiles on it, and turn the tiles into features. No study is needed.

    Args:
        slides: the path of a slide, a folder that is searched with its subfolders, or several paths.
        encoder: of tiles, from `load_encoder` or `pretrain_tiles`, or a name that `load_encoder` takes; "self" trains
            one on these very slides, without labels.
        tile: how tiles are placed.
        out: a folder for the features, which `read_features` opens again; what exists there is not encoded twice. None
            keeps them in a temporary folder as long as the result is in use.
        tissue: how tissue is found.
        areas: a folder of the areas that count, a GeoJSON or mask image or several a slide, named as the slide; or
            "grid" for the cores of tissue microarrays, which get a vector each.
        area: which of these areas count, whether each gets a vector, and what happens to slides without any.
        mpp: µm per level-0 pixel of all slides; overrides the files.
        mpp_default: used only for files that have none.
        workers: processes that read slides; 0 reads in a thread of this process.
        device: auto, cpu or cuda.
        **settings: of `EncodeSettings`, such as `views=50`, the number of augmented views that `pretrain` learns from;
            0, the default here, stores none, and `pretrain` then uses the plain features.

    Returns:
        The features by slide_id, which is the file's name without its ending. Slides that fail are left out with a
        warning; `failed` says why.

    Raises:
        SlideError: not one slide can be encoded.
        SettingsError: an unknown setting or one out of range, two slides of one name, or no such areas.
        FileFormatError: the encoder cannot be loaded.
    """
    chosen = from_dict(EncodeSettings, {"views": 0, **settings})
    keeps, folder = _folder(out)
    with _readers(workers) as readers:
        drawn = open_areas(None if areas is None else Path(areas), area)
        cut, failed = _lay_tiles(slides, folder, tile, tissue, (mpp, mpp_default), readers, drawn)
        cut, failed, target = recoloured(cut, failed, chosen)
        if encoder == "self":
            encoder = _trained(cut, TileTrainSettings(), folder / "tile-encoder", readers, device)
        start = None
        if not isinstance(encoder, TileEncoder):
            start = _start_of(str(encoder), folder / "fourth-stage.safetensors")
            encoder = load_encoder(encoder, chosen.seed, device, chosen.precision)
        failed |= _encode(cut, folder, encoder, chosen, readers, tissue.dropped)
    kept = [source for source in cut if source.slide_id not in failed]
    _say_failed(failed, len(kept))
    made_with = {"inspect": to_dict(InspectSettings(tissue, tile)) | ({"areas": drawn.told} if drawn else {})}
    colours = {SAVED: target.numbers()} if target else {}
    made_with["encode"] = {"encoder": encoder.identity, **to_dict(chosen), **colours}
    sources = tuple(_source(folder, source.slide_id) for source in kept)
    return CohortFeatures(_rows(sources, kept), sources, failed, made_with, start, keeps)


@names_arguments
def pretrain_tiles(
    slides: Paths,
    tile: TileSpec = TileSpec(),
    *,
    out: str | Path | None = None,
    tissue: TissueSettings = TissueSettings(),
    mpp: float | None = None,
    mpp_default: float | None = None,
    workers: int = 0,
    device: str = "auto",
    **settings: Any,
) -> TileEncoder:
    """Train a tile encoder on slides, without labels and without a download.

    Args:
        slides: the path of a slide, a folder that is searched with its subfolders, or several paths.
        tile: how tiles are placed.
        out: a folder for the encoder, which `load_encoder` reads back; None writes no file.
        tissue: how tissue is found.
        mpp: µm per level-0 pixel of all slides; overrides the files.
        mpp_default: used only for files that have none.
        workers: processes that read slides; 0 reads in a thread of this process.
        device: auto, cpu or cuda.
        **settings: of `TileTrainSettings`, such as `method="moco"`.

    Returns:
        The encoder, ready to run.

    Raises:
        SlideError: not one slide can be read.
        TrainingError: there are too few tiles.
        SettingsError: an unknown setting or one out of range.
    """
    chosen = from_dict(TileTrainSettings, settings)
    with tempfile.TemporaryDirectory(prefix="histossl-") as place, _readers(workers) as readers:
        cut, failed = _lay_tiles(slides, Path(place), tile, tissue, (mpp, mpp_default), readers)
        _say_failed(failed, len(cut))
        folder = _trained(cut, chosen, Path(out or Path(place) / "tile-encoder"), readers, device)
        return load_encoder(folder, device=device)


@names_arguments
def read_features(source: str | Path | Study | Mapping[str, TileFeatures]) -> CohortFeatures:
    """Open existing features of tiles.

    Args:
        source: a study, the `out` of `encode`, a folder of files or one file, a slide each: ours, TRIDENT's, CLAM's or
            STAMP's; or slide_id -> `TileFeatures`, arrays in memory.

    Returns:
        The features by slide_id.

    Raises:
        FileFormatError: there are no features, or a file is damaged.
    """
    if isinstance(source, CohortFeatures):
        return source
    if isinstance(source, Mapping):
        return _of_arrays(dict(source))
    path = source.folder if isinstance(source, Study) else Path(source)
    if (path / "slides.csv").exists():
        study = Study(path)
        rows = study.encoded()
        kept = tuple(SlideSource(n, study.features(n), study.views(n)) for row in rows for n in (row["slide_id"],))
        start = study.fourth_stage if study.fourth_stage.exists() else None
        return CohortFeatures(tuple(rows), kept, {}, study.settings(), start)
    files = [path] if path.is_file() else sorted((path / "features").glob("*.h5")) or sorted(path.glob("*.h5"))
    if not files:
        raise FileFormatError(f"{path}: no features of tiles", "give a study, a folder of <slide_id>.h5, or one file")
    if any(not _opens_in_place(file) for file in files):
        return _of_arrays({file.stem: read_tile_features(file) for file in files})
    own = path.is_dir() and files[0].parent.name == "features" and (path / "views").is_dir()
    sources = tuple(_source(path, f.stem) if own else SlideSource(f.stem, f, path / "no-views") for f in files)
    return CohortFeatures(_rows(sources, []), sources)


def _opens_in_place(file: Path) -> bool:
    with hdf5.open_h5(file) as found:
        return "features" in found and "coords" in found and "level0_width" in found["coords"].attrs


def _of_arrays(cohort: dict[str, TileFeatures]) -> CohortFeatures:
    """Write features in memory to files in a temporary folder, since all later stages read files."""
    if not cohort:
        raise FileFormatError("no slides with features", "pass one slide or more")
    keeps, folder = _folder(None)
    for name, given in cohort.items():
        bag = check_coordinates(given, Path(name))
        assert bag.xy is not None
        with hdf5.new_h5(folder / "features" / f"{name}.h5") as file:
            file["coords"] = bag.xy
            file["coords"].attrs.update(attributes_of(bag, "features"))
            hdf5.create_features(file, *bag.features.shape)[:] = bag.features
            file.attrs["fingerprint"] = fingerprint(name, _hash(bag.features), _hash(bag.xy), bag.stride)
    sources = tuple(_source(folder, name) for name in cohort)
    return CohortFeatures(_rows(sources, []), sources, keeps=keeps)


def _hash(values: NDArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _folder(out: str | Path | None) -> tuple[Any, Path]:
    """The object that keeps a temporary folder alive, and the folder."""
    if out is not None:
        return None, Path(out).absolute()
    keeps = tempfile.TemporaryDirectory(prefix="histossl-", ignore_cleanup_errors=True)
    return keeps, Path(keeps.name)


@contextmanager
def _readers(workers: int) -> Iterator[Workers | ThreadExecutor]:
    if workers:
        with Workers(workers) as pool:
            yield pool
    else:
        yield ThreadExecutor()


def _lay_tiles(
    slides: Paths,
    folder: Path,
    tile: TileSpec,
    tissue: TissueSettings,
    mpp: tuple[float | None, float | None],
    readers: Workers | ThreadExecutor,
    areas: AreaFolder | CoreGrid | None = None,
) -> tuple[list[TileSource], dict[str, str]]:
    """The slides with tiles, and why the others have none: slide_id -> reason."""
    given = [slides] if isinstance(slides, str | Path) else list(slides)
    paths = [file for path in map(Path, given) for file in (find_slides(path) if path.is_dir() else [path])]
    if not paths:
        raise SettingsError(f"no slides in {', '.join(map(str, given)) or 'an empty list'}", "pass slides or a folder")
    names = slide_names(paths)
    if complaint := next((complaint for _, complaint in names if complaint), ""):
        raise SettingsError(complaint)
    chosen, failed = areas_in_memory(paths, areas, mpp, tissue, folder / "areas", readers)
    jobs, cut = [], []
    for name, path, own in chosen:
        places = folder / "tiles" / f"{name}.h5", folder / f"qc/{name}.jpg"
        jobs.append(SurveyJob(name, path.absolute(), *mpp, tissue, tile, *places, areas=own))
    if not jobs:
        why = next(iter(failed.values()), "none has an area; name the files of areas as the slides")
        raise SlideError(paths[0], f"none of {len(paths)} slides can be used: {why}")
    with progress_bar("slides", len(jobs)) as bar:
        for job, answer in readers.map(survey_slide, jobs):
            if isinstance(answer, Exception):
                give_up_on_disk(answer)
                failed[job.slide_id] = failure_reason(answer, job.path)
            else:
                area = job.areas.area if job.areas else ""
                cut.append(TileSource(job.slide_id, job.path, answer.mpp, tile, job.tiles_path, area))
            bar.advance(1)
    if not cut:
        raise SlideError(jobs[0].path, f"none of {len(jobs)} slides can be used: {failed[jobs[0].slide_id]}")
    return cut, failed


def _trained(
    cut: list[TileSource], settings: TileTrainSettings, out: Path, readers: Workers | ThreadExecutor, device: str
) -> Path:
    train_tile_encoder(cut, settings, out, out.parent / "logs" / out.name, readers, device)
    return out


def _start_of(encoder: str, path: Path) -> Path | None:
    """The weights that a slide encoder may begin with, written to `path`; None where the tile encoder has none."""
    weights = fourth_stage(encoder)
    if not weights:
        path.unlink(missing_ok=True)
        return None
    with atomic.whole(path) as part:
        part.write_bytes(save(weights))
    return path


def _encode(
    cut: list[TileSource],
    folder: Path,
    encoder: TileEncoder,
    settings: EncodeSettings,
    readers: Workers | ThreadExecutor,
    drop: tuple[str, ...],
) -> dict[str, str]:
    """Features and views of slides into their files; slide_id -> why a slide has none."""
    jobs, failed, total = [], {}, 0
    for source in cut:
        name, tiles = source.slide_id, read_tiles_of(source.tiles_path)
        target = source.change.target if source.change else None
        made = encode_fingerprint(tiles.fingerprint, encoder, settings, target)
        features, views = folder / "features" / f"{name}.h5", folder / "views" / name
        products = [features, views] if settings.views else [features]
        if any(fingerprints.fingerprint_of(product) != made for product in products):
            places = (source.tiles_path, features, views)
            jobs.append(EncodeJob(name, source.path, source.mpp, source.tile, *places, drop, source.change))
            total += len(tiles.xy)
    with progress_bar("tiles", total) as bar:
        for step in encode_slides(jobs, encoder, settings, readers):
            if step.error is not None:
                give_up_on_disk(step.error)
                failed[step.job.slide_id] = failure_reason(step.error, step.job.path)
            bar.advance(step.tiles)
    if len(failed) == len(cut):
        raise SlideError(cut[0].path, f"none of {len(cut)} slides can be encoded: {failed[cut[0].slide_id]}")
    return failed


def _source(folder: Path, slide_id: str) -> SlideSource:
    """The features of a slide, and its views where they were made with these features."""
    features, views = folder / "features" / f"{slide_id}.h5", folder / "views" / slide_id
    known = fingerprints.fingerprint_of(views)
    stale = known is not None and known != fingerprints.fingerprint_of(features)
    return SlideSource(slide_id, features, folder / "no-views" / slide_id if stale else views)


def _rows(sources: Iterable[SlideSource], known: list[TileSource]) -> tuple[Row, ...]:
    """One row per slide, as in slides.csv."""
    slides, rows = {source.slide_id: source for source in known}, []
    for source in sources:
        tiles, slide = read_tiles_of(source.features), slides.get(source.slide_id)
        about = {"slide_id": source.slide_id, "path": str(slide.path) if slide else "", "patient_id": ""}
        about |= {
            "area": slide.area if slide else "",
            "mpp": repr(slide.mpp) if slide else "",
            "width": str(tiles.size.width),
        }
        rows.append(about | {"height": str(tiles.size.height), "tiles": str(len(tiles.xy))})
    return tuple(rows)


def _say_failed(failed: dict[str, str], kept: int) -> None:
    if failed:
        some = "; ".join(list(failed.values())[:3])
        warnings.warn(f"{len(failed)} of {len(failed) + kept} slides are left out: {some}", stacklevel=4)
