"""The slides below a folder, and other files there that could be mistaken for slides."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from histossl.core.errors import SettingsError
from histossl.core.sidecars import is_sidecar
from histossl.wsi.dicom_reader import dicom_series
from histossl.wsi.zarr_reader import zarr_metadata

# fmt: off
EXTENSIONS = frozenset([
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm",
    ".qptiff", ".btf", ".tf2", ".tf8", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".jpx", ".bmp", ".webp", ".gif",
])
# fmt: on

_CONVERT = "convert it to a pyramidal TIFF, with QuPath, bfconvert or the scanner's own program"
_UNREAD = (
    dict.fromkeys(
        [
            ".vsi",
            ".isyntax",
            ".i2syntax",
            ".sdpc",
            ".kfb",
            ".kfbf",
            ".mds",
            ".mdsx",
            ".zvi",
            ".lif",
            ".nd2",
            ".oib",
            ".oif",
            ".ims",
            ".lsm",
            ".stk",
            ".tmap",
            ".dyqx",
            ".tron",
            ".afi",
            ".zarr",
            ".n5",
        ],
        f"is a slide of a kind that is not read; {_CONVERT}",
    )
    | dict.fromkeys(
        [
            ".zip",
            ".rar",
            ".7z",
            ".tar",
            ".tgz",
            ".gz",
            ".bz2",
            ".xz",
            ".zst",
        ],
        "is an archive; unpack it if there are slides in it",
    )
    | dict.fromkeys(
        [".part", ".partial", ".filepart", ".crdownload", ".download", ".tmp"], "is an unfinished copy; copy it again"
    )
    | dict.fromkeys(
        [
            ".heic",
            ".heif",
            ".avif",
            ".psd",
            ".xcf",
            ".jxl",
            ".jxr",
            ".dng",
            ".raw",
            ".eps",
            ".svg",
            ".tga",
            ".ppm",
            ".pgm",
            ".exr",
        ],
        "is a picture of a kind that is not read; save it as TIFF or PNG",
    )
)
# Files that accompany slides and studies, and are not slides.
NOT_SLIDES = frozenset(
    [
        ".csv",
        ".tsv",
        ".txt",
        ".md",
        ".rst",
        ".pdf",
        ".doc",
        ".docx",
        ".xls",
        ".xlsx",
        ".ods",
        ".xml",
        ".json",
        ".jsonl",
        ".geojson",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".log",
        ".html",
        ".htm",
        ".css",
        ".js",
        ".py",
        ".ipynb",
        ".r",
        ".sh",
        ".bat",
        ".qpdata",
        ".qpproj",
        ".groovy",
        ".annotations",
        ".h5",
        ".hdf5",
        ".h5ad",
        ".pt",
        ".pth",
        ".npy",
        ".npz",
        ".pkl",
        ".parquet",
        ".safetensors",
        ".ets",
        ".opt",
        ".dat",
        ".db",
        ".sqlite",
        ".lock",
        ".md5",
        ".sha256",
        ".sum",
        ".lnk",
        ".url",
        ".bak",
    ]
)
_MAGIC = (
    (b"II*\0", "a TIFF", ".tif"),
    (b"MM\0*", "a TIFF", ".tif"),
    (b"II+\0", "a BigTIFF", ".tif"),
    (b"MM\0+", "a BigTIFF", ".tif"),
    (b"\xff\xd8\xff", "a JPEG", ".jpg"),
    (b"\x89PNG", "a PNG", ".png"),
    (b"ZISRAWFILE", "a CZI", ".czi"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000", ".jp2"),
)


@dataclass(frozen=True)
class Found:
    """The result of a search for slides below a folder.

    Attributes:
        slides: files that can be read, sorted by path.
        passed: file that is not read but may be a slide -> reason, as the end of a sentence; sorted by path.
        links: link -> the slide that it leads to, which is listed under its own name.
        others: files of other kinds that are not slides, counted by their ending.
    """

    slides: list[Path]
    passed: dict[Path, str] = field(default_factory=dict)
    links: dict[Path, Path] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)


def look_for_slides(folder: str | Path, ours: Path | None = None) -> Found:
    """Search a folder and all folders below it for slides.

    Slides are recognised by their extension, in upper or lower case. Sidecars of systems are no slides, a DICOM series
    counts once, the JPEGs beside a .vms belong to that slide, and files in a folder that this program wrote are no
    slides.

    Args:
        folder: the folder; links are followed, each folder is entered once.
        ours: the folder of the study, which may not be written yet.

    Returns:
        The slides, and the files that were not read.

    Raises:
        SettingsError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SettingsError(f"there is no folder {folder}", "pass the folder that holds the slides")
    found = Found([])
    met = list(_files(folder, ours))
    real = {os.path.join(root, path.name): path for root, path in met if not path.is_symlink()}
    everything = sorted(path for _, path in met)
    vms = {file.parent for file in everything if file.suffix.lower() == ".vms"}
    series: set[bytes] = set()
    for file in everything:
        kind = file.suffix.lower()
        if kind == ".zarr" and zarr_metadata(file) is not None:
            found.slides.append(file)
        elif kind not in EXTENSIONS:
            _pass_over(file, kind, found)
        elif not (kind in (".jpg", ".jpeg") and file.parent in vms):
            target = real.get(os.path.realpath(file)) if file.is_symlink() else None
            if target is not None and target.suffix.lower() in EXTENSIONS:
                found.links[file] = target
            elif kind != ".dcm" or _is_first(file, series):
                found.slides.append(file)
    return found


def is_ours(folder: str | Path) -> bool:
    """Whether this program wrote a folder: a study, or the results of nuclei.

    Args:
        folder: the folder.

    Returns:
        True where it holds log.jsonl and slides.csv or nuclei.csv.
    """
    return os.path.exists(os.path.join(folder, "log.jsonl")) and any(
        os.path.exists(os.path.join(folder, table)) for table in ("slides.csv", "nuclei.csv")
    )


_ROOMS = (
    "areas",
    "qc",
    "tiles",
    "features",
    "views",
    "heatmaps",
    "logs",
    "tile-encoder",
    "slide-encoder",
    "model",
    "nuclei",
)


def lies_in(path: Path, study: Path) -> bool:
    """Whether a file belongs to a study: in one of the study's own subfolders or a source's.

    Args:
        path: the file, absolute.
        study: the folder of the study, absolute.

    Returns:
        True for a file of the study.
    """
    try:
        inside = path.relative_to(study).parts
    except ValueError:
        return False
    return len(inside) > 1 and (inside[0] in _ROOMS or inside[0].startswith("source-"))


def _files(folder: Path, ours: Path | None) -> Iterator[tuple[str, Path]]:
    """(real folder, file) of all files that are no sidecars and not of this program."""
    seen: set[str] = set()
    study = os.path.realpath(ours) if ours is not None else None
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        below = root != str(folder)
        if below and (real == study or is_ours(root)):
            folders[:] = []
            continue
        if real == study or is_ours(root):  # the slides are in the study's own folder
            folders[:] = [name for name in folders if name not in _ROOMS and not name.startswith("source-")]
            names = [name for name in names if name != "hits.jpg"]
        mirax = {name[:-5] for name in names if name.lower().endswith(".mrxs")}
        zarrs = [name for name in folders if name.lower().endswith((".zarr", ".n5"))]
        folders[:] = sorted(n for n in folders if not is_sidecar(n) and n not in mirax and n not in zarrs)
        yield from ((real, Path(root, name)) for name in (*names, *zarrs) if not is_sidecar(name))


def _pass_over(file: Path, kind: str, found: Found) -> None:
    """Count a file that is not read; keep the reason where it may be a slide."""
    if kind in _UNREAD:
        inner = Path(file.stem).suffix.lower()
        archive = kind in (".zip", ".rar", ".7z", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
        if archive and kind == ".gz" and inner in NOT_SLIDES:
            found.others[kind] += 1
        else:
            found.passed[file] = _UNREAD[kind]
    elif kind in NOT_SLIDES:
        found.others[kind] += 1
    else:
        what = _content(file)
        if what == "DICOM":
            found.slides.append(file)
        elif what:
            found.passed[file] = what
        else:
            found.others[kind or "no ending"] += 1


def _content(file: Path) -> str:
    """What a file of an unknown ending holds, where that is a picture."""
    try:
        if not file.is_file():
            return ""
        with file.open("rb") as handle:
            head = handle.read(132)
    except OSError:
        return ""
    if head[128:132] == b"DICM" and not file.suffix:
        return "DICOM"
    for magic, what, ending in _MAGIC:
        if head.startswith(magic):
            return f"holds {what}, but its name does not end so; rename it to end with {ending}"
    return ""


def _is_first(path: Path, series: set[bytes]) -> bool:
    """Whether a DICOM file is the first one found of its series."""
    uid = dicom_series(path) or os.fsencode(path)
    if uid in series:
        return False
    series.add(uid)
    return True
