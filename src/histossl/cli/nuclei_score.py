"""`histossl nuclei score`: how well nuclei agree with ground truth."""

from __future__ import annotations

from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import shapely

from histossl.core import answers, atomic, tables
from histossl.core.console import say
from histossl.core.errors import LabelError
from histossl.nuclei import strata
from histossl.nuclei.geojson import Outlined, label_image, read_outlined
from histossl.nuclei.maps import DENSITY
from histossl.nuclei.metrics import METRICS, Scores, summarise
from histossl.nuclei.metrics import score as score_labels

_STRANGERS = 0.05  # Dice below this is that of nuclei of another picture or in another unit
_LABEL_FILES = (".tif", ".tiff", ".png", ".json", ".geojson", ".geojson.gz")


def score(
    prediction: Path,
    truth: Path,
    out: Path | None = None,
    seed: int = 0,
    *,
    by: str = "",
    images: Path | None = None,
    mpp: float = 0.25,
) -> int:
    """Dice, AJI, PQ, F1, precision and recall of nuclei against ground truth, with bootstrap intervals.

    Args:
        prediction: a label image or GeoJSON, or a folder of them.
        truth: the same, with the same names; label images (TIFF or PNG of integers) or GeoJSON in pixels.
        out: a CSV, a row an image.
        seed: seed of the bootstrap.
        by: also the recall of nuclei in groups: area, darkness, or both as area,darkness.
        images: for the darkness: the image, or the folder of images, that the labels are of, with the same names.
        mpp: for the area: µm per pixel of the labels.
    """
    kinds = strata.kinds_of(by, images)
    scores: dict[str, Scores] = {}
    found: list[strata.Found] = []
    for name, a, b in _pairs(prediction, truth):
        density = strata.density_of(images, b, name) if kinds and images else None
        pair = _read_pair(a, b, None if density is None else density.shape)
        scores[name] = score_labels(*pair)
        if scores[name].dice < _STRANGERS and all(labels.any() for labels in pair):
            what = f"SUSPECT {name}: nuclei and truth hardly overlap, Dice {scores[name].dice:.3f}"
            say(f"{what}: are both of this picture, and in its pixels rather than µm?", "yellow")
        if kinds:
            found.append(strata.found_nuclei(*pair, mpp, density))
    means = summarise(list(scores.values()), np.random.default_rng(seed))
    rows = [{"image": name} | asdict(one) for name, one in scores.items()]
    mean = {name: means[name].mean for name in METRICS}
    spread = {name: f"{means[name].low:.3f}-{means[name].high:.3f}" for name in METRICS}
    everything = {"images": rows, "mean": {name: asdict(means[name]) for name in METRICS}}
    answers.give_rows("scores", [*rows, {"image": "mean"} | mean, {"image": "95 %"} | spread], value=everything)
    for kind in kinds:
        answers.give_rows(f"by {kind}", _group_rows(strata.grouped(found, kind), kind))
    if out is not None:
        with atomic.whole(out) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = tables.writer(file)
            writer.writerow(("image", *METRICS))
            writer.writerows((tables.cell(name), *astuple(one)) for name, one in scores.items())
    return 0


def _group_rows(groups: list[strata.Group], kind: str) -> list[dict[str, object]]:
    unit = "area, µm²" if kind == "area" else "darkness / median"
    return [
        {
            unit: f"{group.low:g} to {group.high:g}" if np.isfinite(group.high) else f"from {group.low:g}",
            "nuclei": group.nuclei,
            "recall": group.recall,
            "missed": group.missed,
        }
        for group in groups
    ]


def _pairs(prediction: Path, truth: Path) -> list[tuple[str, Path, Path]]:
    for path in (prediction, truth):
        if not path.exists():
            raise LabelError(f"there is no {path}")
    if prediction.is_file() and truth.is_file():
        return [(truth.name, prediction, truth)]
    if prediction.is_file() or truth.is_file():
        raise LabelError("one of prediction and truth is a file, the other a folder", "give two files or two folders")
    a, b = _labels_in(prediction), _labels_in(truth)
    if set(a) != set(b):
        lost, extra = sorted(set(b) - set(a)), sorted(set(a) - set(b))
        details = [
            f"{len(names)} only in {path}: {', '.join(names[:3])}"
            for names, path in ((lost, truth), (extra, prediction))
            if names
        ]
        raise LabelError(f"the two folders do not match ({'; '.join(details)})", "files are matched by their names")
    return [(name, a[name], b[name]) for name in sorted(b)]


def _labels_in(folder: Path) -> dict[str, Path]:
    """Files by name without ending; of a nucleus's label image and GeoJSON the former."""
    found: dict[str, Path] = {}
    for ending in reversed(_LABEL_FILES):
        for path in folder.iterdir():
            named = path.name.endswith(ending) and not path.name.startswith(".")
            if named and not path.name.endswith(DENSITY):  # a map is no label image
                found[path.name.removesuffix(ending)] = path
    if not found:
        raise LabelError(f"{folder} holds no label images or GeoJSON", f"endings are {', '.join(_LABEL_FILES)}")
    return found


def _read_pair(prediction: Path, truth: Path, size: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both as label images: of the size of a label image, else of `size`, else as far as the outlines reach."""
    read = _read_labels(prediction), _read_labels(truth)
    sizes = [labels.shape for labels in read if isinstance(labels, np.ndarray)]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        what = f"{prediction} is {sizes[0][1]} x {sizes[0][0]} pixels, {truth} {sizes[1][1]} x {sizes[1][0]}"
        raise LabelError(what, "score label images of the same picture")
    shapes = [labels.shapes for labels in read if not isinstance(labels, np.ndarray)]
    far = np.max([shapely.total_bounds(part)[2:] for part in shapes if len(part)] or [[1, 1]], axis=0)
    height, width = sizes[0] if sizes else size or (max(1, int(np.ceil(far[1]))), max(1, int(np.ceil(far[0]))))
    a, b = (part if isinstance(part, np.ndarray) else label_image(part, height, width) for part in read)
    return a, b


def _read_labels(path: Path) -> np.ndarray | Outlined:
    if path.name.endswith((".geojson", ".geojson.gz", ".json")):
        found = read_outlined(path)
        if details := found.note():
            say(f"note: {path}: {details}", "yellow")
        return found
    from skimage.io import imread
    from skimage.measure import label as connected

    try:
        labels = np.squeeze(imread(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise LabelError(f"{path}: no label image ({error})") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        what = f"{path}: labels must be (H, W) integers, got {labels.shape} of {labels.dtype}"
        raise LabelError(what, "save a label image: 0 for background, a number for each nucleus")
    pieces = np.asarray(connected(labels, connectivity=1)).max() if len(np.unique(labels)) == 2 else 0
    if pieces > 2:
        what = f"{path}: is a mask: its {pieces} pieces have one number, {labels.max()}"
        raise LabelError(what, "give each nucleus a number of its own")
    return labels
