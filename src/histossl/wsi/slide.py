"""A slide: its size, its mpp, and the picture of any of its regions at any mpp.

OpenSlide reads what it can, tiffslide what OpenSlide refuses, and plain pictures (PNG, JPEG, TIFF) are slides of one
level. An open slide stays in its process: workers open their own.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SettingsError, SlideError
from histossl.wsi.content import chosen_picture
from histossl.wsi.folders import EXTENSIONS, look_for_slides
from histossl.wsi.geometry import Region, Size
from histossl.wsi.mpp import MPP_RANGE, RANGE_TEXT, objective, stated_mpp, usable
from histossl.wsi.readers import FILE_ERRORS, READERS, Level, Reader, Refused, check_tiff, describe_error
from histossl.wsi.zarr_reader import zarr_metadata

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EXTENSIONS", "MPP_RANGE", "Level", "Slide", "find_slides", "open_slide", "slide_state"]

_BLOCK = 2048
"""Side in level pixels of what one step of a read decodes: bounds the memory of a thumbnail of a one-level slide."""

_SHOWN = (
    8192  # pixels of the coarsest level's longer side; above it a notebook shows no thumbnail, which would take long
)

_LARGEST = 10**6  # pixels of a side; a glass slide of 75 mm has less than 10**6 at the finest mpp that is in use


class Slide:
    """An open slide; make one with `open_slide`, and close it or use it in a `with`.

    Attributes:
        path: the file.
        size: of level 0, in pixels.
        mpp: µm per level-0 pixel.
        levels: finest first; the first has downsample 1.
        vendor: as the reader names it, such as "aperio" or "generic-tiff"; "plain" for pictures.
        properties: all of the file's metadata, as text, under the reader's names.
        objective: the objective's magnification, or None.
    """

    def __init__(self, path: Path, reader: Reader, mpp: float) -> None:
        self.path = path
        self.mpp = mpp
        self.levels = reader.levels
        self.size = reader.levels[0].size
        self.vendor = reader.vendor
        self.properties = reader.properties
        self.objective = objective(reader.properties)
        self._reader = reader

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on how the file was interpreted, a sentence each; those of plain pictures exist after a read."""
        return tuple(getattr(self._reader, "notes", ()))

    def read(self, region: Region, mpp: float) -> NDArray[np.uint8]:
        """Read the picture of a region at `mpp`.

        It is resampled from the nearest finer level by a triangle filter as wide as a pixel of the picture (so it does
        not alias), true to the fraction of a pixel: a pixel does not depend on where the region's edges fall, so parts
        of a region equal the parts of its picture to within rounding, wherever the parts fall on its pixels. At the
        slide's own mpp and at whole pixels it is the slide's pixels.

        Args:
            region: level-0 pixels; may reach beyond the slide.
            mpp: µm per pixel of the picture, any positive number.

        Returns:
            (H, W, 3) uint8 RGB with (H, W) = `region.pixels(mpp, self.mpp)`, stretched to cover the region exactly;
            white outside of the slide and where it is transparent.

        Raises:
            SlideError: the file is damaged there.
        """
        size = region.pixels(mpp, self.mpp)
        step_x, step_y = region.width / size.width, region.height / size.height
        level = self._level_for(min(step_x, step_y))
        down = self.levels[level].downsample
        step_x, step_y = step_x / down, step_y / down
        picture = np.full((*size.shape, 3), 255, np.uint8)
        columns = _inside(region.x / down, step_x, size.width, self.levels[level].size.width)
        rows = _inside(region.y / down, step_y, size.height, self.levels[level].size.height)
        for top, bottom in _blocks(*rows, step_y):
            for left, right in _blocks(*columns, step_x):
                x, y = region.x / down + left * step_x, region.y / down + top * step_y
                box = (x, y, x + (right - left) * step_x, y + (bottom - top) * step_y)
                picture[top:bottom, left:right] = self._resampled(level, box, Size(right - left, bottom - top))
        return picture

    def thumbnail(self, longest: int = 2048) -> NDArray[np.uint8]:
        """Read the whole slide as a small picture.

        Args:
            longest: longer side in pixels; smaller slides keep their size.

        Returns:
            (h, w, 3) uint8 RGB.
        """
        side = max(self.size.width, self.size.height)
        return self.read(Region.whole(self.size), self.mpp * max(1.0, side / longest))

    def plot(self, ax: Axes | None = None, longest: int = 1024) -> Axes:
        """Draw the whole slide with a scale bar.

        Args:
            ax: matplotlib axes to draw on; None makes new ones.
            longest: pixels of the picture's longer side.

        Returns:
            The axes, in level-0 pixels: tiles and nuclei are drawn on the same ones.

        Raises:
            SlideError: the slide cannot be read.
        """
        from histossl.wsi.plot import draw_picture

        return draw_picture(self.thumbnail(longest), self.size, self.mpp, self.path.name, ax)

    def close(self) -> None:
        """Close the file and free all memory."""
        self._reader.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({self.path.name!r}, {self.size.width} x {self.size.height}, mpp {self.mpp:g}, {self.vendor})"

    def _repr_html_(self) -> str | None:
        """What a notebook shows: a thumbnail, unless it would take long, and one line."""
        coarsest = self.levels[-1].size
        if max(coarsest.width, coarsest.height) > _SHOWN:
            return None
        try:
            picture = self.thumbnail(256)
        except (SlideError, *FILE_ERRORS):  # closed already
            return None
        packed = io.BytesIO()
        Image.fromarray(picture).save(packed, "JPEG", quality=85)
        data = base64.b64encode(packed.getvalue()).decode()
        return f'<img alt="" src="data:image/jpeg;base64,{data}"><br><code>{html.escape(repr(self))}</code>'

    def _level_for(self, downsample: float) -> int:
        # A level of 4.0003 serves a picture at 4: the 1 % is far less than the filter's own blur.
        finer = [k for k, level in enumerate(self.levels) if level.downsample <= downsample * 1.01]
        return max(finer, key=lambda k: self.levels[k].downsample, default=0)

    def _resampled(self, level: int, box: tuple[float, float, float, float], size: Size) -> NDArray[np.uint8]:
        """The box (x0, y0, x1, y1) of a level, in its pixels, as a picture of `size`."""
        margin_x = math.ceil(max(1.0, (box[2] - box[0]) / size.width)) + 1
        margin_y = math.ceil(max(1.0, (box[3] - box[1]) / size.height)) + 1
        bounds = self.levels[level].size
        left, right = max(0, math.floor(box[0]) - margin_x), min(bounds.width, math.ceil(box[2]) + margin_x)
        top, bottom = max(0, math.floor(box[1]) - margin_y), min(bounds.height, math.ceil(box[3]) + margin_y)
        try:
            source, x, y = self._reader.read(level, left, top, right - left, bottom - top)
        except FILE_ERRORS as error:
            where = f"x {left * self.levels[level].downsample:.0f}, y {top * self.levels[level].downsample:.0f}"
            raise SlideError(
                self.path, f"cannot be read near {where} ({describe_error(error)})", "the file is damaged or cut short"
            ) from error
        # Pillow takes no box beyond its picture, and the last pixel may reach half of itself beyond the slide.
        before = max(0, math.ceil(x - box[0])), max(0, math.ceil(y - box[1]))
        after = (
            max(0, math.ceil(box[2] - x - source.shape[1]) + 1),
            max(0, math.ceil(box[3] - y - source.shape[0]) + 1),
        )
        if any(before + after):
            source = np.pad(source, ((before[1], after[1]), (before[0], after[0]), (0, 0)), mode="edge")
        x, y = x - before[0], y - before[1]
        return np.asarray(
            Image.fromarray(source).resize(
                (size.width, size.height),
                Image.Resampling.BILINEAR,
                box=(box[0] - x, box[1] - y, box[2] - x, box[3] - y),
            )
        )


def _inside(start: float, step: float, count: int, length: int) -> tuple[int, int]:
    """The range of picture pixels whose centres lie inside a level that is `length` long."""
    first = math.ceil(-start / step - 0.5)
    last = math.ceil((length - start) / step - 0.5)
    return min(max(0, first), count), min(max(0, last), count)


def _blocks(start: int, stop: int, step: float) -> Iterator[tuple[int, int]]:
    side = max(1, int(_BLOCK / step) - 2)
    for first in range(start, stop, side):
        yield first, min(stop, first + side)


def open_slide(path: str | Path, mpp: float | None = None, mpp_default: float | None = None) -> Slide:
    """Open a slide of any kind that OpenSlide, tiffslide, tifffile or Pillow reads.

    Args:
        path: the file.
        mpp: µm per level-0 pixel; overrides the file.
        mpp_default: used only where the file has none.

    Returns:
        The open slide; close it, or use it in a `with`.

    Raises:
        SlideError: there is no such file, none of the readers takes it, it carries no mpp and none is given, or its mpp
            (or the one given for it) lies outside of MPP_RANGE.
        SettingsError: `mpp_default` lies outside of MPP_RANGE.
    """
    path = Path(path)
    if mpp_default is not None and not usable(mpp_default):
        raise SettingsError(f"a default mpp of {mpp_default:g} is no slide's", f"it must lie in {RANGE_TEXT}")
    if mpp is not None and not usable(mpp):
        raise SlideError(path, f"an mpp of {mpp:g} is no slide's", f"correct it in slides.csv: {RANGE_TEXT}")
    _check_file(path)
    reader = _reader(path)
    try:
        size = reader.levels[0].size
        if not (0 < size.width <= _LARGEST and 0 < size.height <= _LARGEST):
            raise SlideError(path, f"says that it has {size.width} x {size.height} pixels", "the file is damaged")
        return Slide(path, reader, mpp or stated_mpp(path, reader.properties, mpp_default))
    except SlideError:
        reader.close()
        raise


def slide_state(path: Path) -> str:
    """The size and the modification time of a slide's file, which change when somebody replaces it.

    Args:
        path: the slide, with or without the number of a picture.

    Returns:
        "<bytes> <nanoseconds>".

    Raises:
        SlideError: the file is gone or cannot be reached.
    """
    try:
        file = chosen_picture(path)[0]
        stat = os.stat(zarr_metadata(file) or file)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from error
    return f"{stat.st_size} {stat.st_mtime_ns}"


def find_slides(folder: str | Path) -> list[Path]:
    """List the slides in a folder and all folders below it.

    See `look_for_slides`, which also reports the other files.

    Args:
        folder: the folder to search.

    Returns:
        The paths of the slides, sorted.

    Raises:
        SettingsError: there is no such folder.
    """
    return look_for_slides(folder).slides


def _check_file(path: Path) -> None:
    path = chosen_picture(path)[0]
    if zarr_metadata(path) is not None:
        return
    if path.is_dir():
        raise SlideError(path, "is a folder, not a slide")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block forever
            raise SlideError(path, "is no file but a pipe or a device")
        with path.open("rb") as handle:
            empty = not handle.read(1)
    except OSError as error:
        raise SlideError(path, f"cannot be opened ({error.strerror})", f"check {path}") from error
    if empty:
        raise SlideError(path, "is empty", "copy the file again")
    with suppress(*FILE_ERRORS):  # not a TIFF after all: the readers report it
        check_tiff(path)


def _reader(path: Path) -> Reader:
    """The first reader that takes the file."""
    reasons: dict[str, str] = {}
    for name, kind in READERS.items():
        try:
            return kind(path)
        except Refused as error:
            reasons[name] = str(error)
        except SlideError:
            raise
        except FILE_ERRORS as error:
            reasons[name] = describe_error(error)
    details = [f"{name}: {text}" for name, text in reasons.items() if text]
    raise SlideError(
        path,
        f"is no slide or picture that {', '.join(READERS)} can read" + (f" ({'; '.join(details)})" if details else ""),
        "the file is damaged, cut short, or of another kind",
    )
