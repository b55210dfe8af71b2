"""Finds the picture of a TIFF that is the slide, and the pages that are its levels.

A file may begin with a macro, a label or a preview, hold its pyramid the wrong way round, or keep its levels in
SubIFDs. The slide is the largest picture; its levels are the pages that show the same, smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Size
from histossl.wsi.safe_xml import OmeImage, ome_images

_APART, _ALIKE = 8.0, 0.5  # of 255, and a correlation: levels of one picture differ less, and correlate more
_PATCH = 8  # least number of pixels of a level that are compared


@dataclass(frozen=True)
class Picture:
    """A picture of a TIFF.

    Attributes:
        number: from 1, in the order of the file.
        size: of its first level.
        levels: pages of each level, the largest first: one page, or one per colour.
        name: its name in the file.
        image: its description in OME-XML, or None.
    """

    number: int
    size: Size
    levels: tuple[tuple[Any, ...], ...]
    name: str = ""
    image: OmeImage | None = field(default=None, compare=False)

    @property
    def page(self) -> Any:
        """Its first page."""
        return self.levels[0][0]

    @property
    def depth(self) -> int:
        """Values per pixel."""
        return len(self.levels[0]) * self.page.samplesperpixel

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"#{self.number}{name} of {self.size.width} x {self.size.height}"


def pictures_of(tiff: tifffile.TiffFile) -> list[Picture]:
    """List the pictures of a TIFF; pages that are smaller levels of a picture are part of it.

    Args:
        tiff: the open file.

    Returns:
        The pictures in the order of the file.
    """
    found = _stated(tiff) or _of_pages(tiff)
    taken: set[int] = set()
    whole = []
    for picture in sorted(found, key=lambda p: -p.size.width * p.size.height):
        if picture.number in taken:
            continue
        levels = list(picture.levels)
        for other in found:
            if other.number not in taken and other is not picture and _is_level(other, picture):
                levels += other.levels
                taken.add(other.number)
        taken.add(picture.number)
        levels.sort(key=lambda pages: -pages[0].imagewidth)
        whole.append(replace(picture, levels=tuple(levels)))
    return sorted(whole, key=lambda picture: picture.number)


def _stated(tiff: Any) -> list[Picture]:
    """The pictures as OME-XML names them, or as the planes of one colour picture; none where neither is stated."""
    images = ome_images(tiff.ome_metadata or "") if tiff.is_ome else []
    found = []
    for series in tiff.series if images or _planes(tiff.series[0]) else ():
        if not _planes(series) and series.axes not in ("YX", "YXS", "SYX"):
            continue
        levels = tuple(
            tuple(level.pages[k].aspage() for k in range(len(level.pages) if _planes(series) else 1))
            for level in series.levels
            if level.axes == series.axes
        )
        page = levels[0][0]
        listed = [image for image in images if any(page.index in pages for pages in image.ifds)]
        own = listed or images[series.index : series.index + 1]
        image = own[0] if own else None
        size = Size(page.imagewidth, page.imagelength)
        found.append(Picture(len(found) + 1, size, levels, image.name if image else "", image))
    return found


def _planes(series: Any) -> bool:
    """Whether the pages of a series are the colours of one picture; four grey ones are channels of fluorescence."""
    coloured = series.keyframe.photometric == tifffile.PHOTOMETRIC.RGB
    count = series.shape[0] if series.axes == "CYX" else 0
    return (count == 3 or (count == 4 and coloured)) and len(series.pages) == count


def _of_pages(tiff: tifffile.TiffFile) -> list[Picture]:
    found = []
    for number, page in enumerate(tiff.pages, 1):
        page = page.aspage()
        if not page.imagewidth or not page.imagelength:
            continue
        below = [sub for sub in page.pages or () if _smaller(sub, page)] if page.subifds else []
        levels = ((page,), *((sub,) for sub in below))
        found.append(Picture(number, Size(page.imagewidth, page.imagelength), levels, _title(page)))
    return found


def _title(page: Any) -> str:
    text = (page.description or "").strip()
    return text if 0 < len(text) <= 24 and text.isprintable() and "=" not in text else ""


def _smaller(page: Any, whole: Any) -> bool:
    """Whether a page has the shape of another, and is smaller by one factor both ways."""
    if page.samplesperpixel != whole.samplesperpixel or page.dtype != whole.dtype:
        return False
    if page.imagewidth >= whole.imagewidth:
        return False
    across, down = whole.imagewidth / page.imagewidth, whole.imagelength / page.imagelength
    # A level's sides are rounded, so that small ones give the factor less exactly.
    return abs(across - down) <= max(across, down) * 1.01 / min(page.imagewidth, page.imagelength) + 1e-9


def _is_level(other: Picture, picture: Picture) -> bool:
    """Whether a picture is a smaller level of another: of its shape, and shows the same."""
    if len(other.levels[0]) != len(picture.levels[0]) or not _smaller(other.page, picture.page):
        return False
    if not (other.page.is_tiled and picture.page.is_tiled):
        return False
    if other.page.subfiletype & 1:  # the page is marked as a smaller level
        return True
    try:
        return _shows_the_same(other.page, picture.page)
    except (ValueError, OSError, RuntimeError, TypeError, IndexError):
        return False


def _shows_the_same(small: Any, large: Any) -> bool:
    """Compare two tiles of the large page with the same regions of the small one: the fullest, and the middle one."""
    across, down = -(-large.imagewidth // large.tilewidth), -(-large.imagelength // large.tilelength)
    counts = large.databytecounts[: across * down]
    return all(_agrees(small, large, index) for index in {int(np.argmax(counts)), down // 2 * across + across // 2})


def _agrees(small: Any, large: Any, index: int) -> bool:
    row, column = divmod(index, -(-large.imagewidth // large.tilewidth))
    tile = _tile(large, index)
    x, y = column * large.tilewidth, row * large.tilelength
    width, height = min(tile.shape[1], large.imagewidth - x), min(tile.shape[0], large.imagelength - y)
    scale = small.imagewidth / large.imagewidth
    left, top = round(x * scale), round(y * scale)
    right, bottom = max(left + 1, round((x + width) * scale)), max(top + 1, round((y + height) * scale))
    if min(right - left, bottom - top) < _PATCH:
        return True  # too small to distinguish them
    size = (right - left) // 2, (bottom - top) // 2  # coarser than both, so that their filters matter less
    a, b = (_shrunk(part, size) for part in (_region(small, left, top, right, bottom), tile[:height, :width]))
    if large.dtype == np.uint16:
        a, b = (part * (255 / max(1.0, float(a.max()), float(b.max()))) for part in (a, b))
    if np.abs(a - b).mean() < _APART:
        return True
    if not (a.std() and b.std()):
        return False
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) > _ALIKE


def _tile(page: Any, index: int) -> NDArray[Any]:
    """The first colours of a tile."""
    handle = page.parent.filehandle
    handle.seek(page.dataoffsets[index])
    data = handle.read(page.databytecounts[index])
    tile = page.decode(data, index, jpegtables=page.jpegtables)[0]
    if tile is None:
        return np.zeros((page.tilelength, page.tilewidth, page.samplesperpixel), page.dtype)
    return tile[0]


def _region(page: Any, left: int, top: int, right: int, bottom: int) -> NDArray[Any]:
    wide, high = page.tilewidth, page.tilelength
    across = -(-page.imagewidth // wide)
    rows = [
        np.concatenate([_tile(page, row * across + column) for column in range(left // wide, -(-right // wide))], 1)
        for row in range(top // high, -(-bottom // high))
    ]
    picture = np.concatenate(rows)
    return picture[top - top // high * high :, left - left // wide * wide :][: bottom - top, : right - left]


def _shrunk(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    grey = pixels.astype(np.float32).mean(axis=2)
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX), np.float32)


def chosen(path: Path, pictures: Sequence[Picture], number: int | None) -> tuple[Picture, str]:
    """Choose the picture that is the slide.

    Args:
        path: the file, for messages.
        pictures: the pictures of the file.
        number: number of the picture that the user wants, or None.

    Returns:
        The picture, and a note about the others, "" where there are none.

    Raises:
        SlideError: there is no picture of that number, or two could be the slide.
    """
    listed = ", ".join(map(str, pictures[:6])) + (f" and {len(pictures) - 6} more" if len(pictures) > 6 else "")
    if number is not None:
        found = [picture for picture in pictures if picture.number == number]
        if not found:
            raise SlideError(path, f"has no picture #{number}", f"it has {listed}")
        return found[0], ""
    coloured = [picture for picture in pictures if picture.depth >= 3] or list(pictures)
    largest = max(coloured, key=lambda picture: picture.size.width * picture.size.height)
    equal = [picture for picture in coloured if picture.size == largest.size]
    if len(equal) > 1:
        what = f"holds a stack of {len(equal)} pages, or {len(equal)} pictures, of {largest.size.width} x "
        what += f"{largest.size.height}: {listed}"
        hint = f"say which by its number behind the path, here or in slides.csv: {path.name}#{equal[0].number}; "
        raise SlideError(path, what, f"{hint}channels of one picture: save it as RGB with 8 bits a channel")
    others = [picture for picture in pictures if picture is not largest]
    channels = "its 3 channels are read as red, green and blue" if len(largest.levels[0]) == 3 else ""
    if not others:
        return largest, channels
    rest = ", ".join(map(str, others[:4])) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    note = f"of its {len(pictures)} pictures the largest is read, {largest}; the others: {rest}"
    return largest, f"{note}; {channels}" if channels else note
