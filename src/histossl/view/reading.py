"""Caches of open slides and of pictures, both of bounded size; tiles and thumbnails as JPEG."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histossl.core.errors import SlideError
from histossl.view.pyramid import Pyramid
from histossl.wsi.geometry import Region
from histossl.wsi.slide import Slide, open_slide

_OPEN = 12 * 2**20  # bytes that the reader of an idle slide takes, about; it also holds a file handle
_QUALITY = 85  # of the JPEGs, of 100
_DECODED = 2**28  # pixels for one picture: seconds


@dataclass(frozen=True)
class SlideRef:
    """What is needed to open a slide.

    Attributes:
        key: number of the slide, unique in the study.
        path: its file.
        mpp: µm per level-0 pixel; None where it is unknown: the slide is shown without a scale.
    """

    key: int
    path: Path
    mpp: float | None


class SlideCache:
    """Open slides for many threads: one thread at a time uses an open slide, and few idle slides stay open.

    Args:
        capacity: bytes that idle slides may take, roughly; a plain picture counts with all of its pixels.
    """

    def __init__(self, capacity: int = 256 * 2**20) -> None:
        self._capacity = capacity
        self._idle: OrderedDict[int, tuple[int, Slide]] = OrderedDict()
        self._serial = 0
        self._guard = threading.Lock()
        self._opening: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)

    @contextmanager
    def slide(self, place: SlideRef) -> Iterator[Slide]:
        """An open slide for the duration of the block.

        Args:
            place: the slide to open.

        Yields:
            The slide; no other thread uses this handle meanwhile.

        Raises:
            SlideError: the slide cannot be opened, or read in the block; the handle is closed then.
        """
        with ExitStack() as stack:
            with self._guard:
                alone = self._opening[place.key]
            stack.enter_context(alone)
            slide = self._taken(place.key) or open_slide(place.path, place.mpp, 1.0)
            # Other threads may open more handles, except of a plain picture: each handle holds all of its pixels.
            if slide.vendor != "plain":
                stack.pop_all().close()
            try:
                yield slide
            except SlideError:
                slide.close()
                raise
            except BaseException:
                self._put(place.key, slide)
                raise
            self._put(place.key, slide)

    def close(self) -> None:
        """Close all idle slides."""
        with self._guard:
            while self._idle:
                self._idle.popitem()[1][1].close()

    def _taken(self, key: int) -> Slide | None:
        with self._guard:
            found = next((serial for serial in reversed(self._idle) if self._idle[serial][0] == key), None)
            return None if found is None else self._idle.pop(found)[1]

    def _put(self, key: int, slide: Slide) -> None:
        with self._guard:
            self._serial += 1
            self._idle[self._serial] = key, slide
            while len(self._idle) > 1 and sum(_weight(s) for _, s in self._idle.values()) > self._capacity:
                self._idle.popitem(last=False)[1][1].close()


def _weight(slide: Slide) -> int:
    return slide.size.width * slide.size.height * 3 if slide.vendor == "plain" else _OPEN


class PictureCache:
    """The latest responses, within a number of bytes; for many threads.

    Args:
        capacity: bytes that the responses may take.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._bytes = capacity, 0
        self._guard = threading.Lock()
        self._answers: OrderedDict[object, bytes] = OrderedDict()

    def get(self, key: object) -> bytes | None:
        """The response kept under a key.

        Args:
            key: any hashable value.

        Returns:
            The response, or None.
        """
        with self._guard:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: object, answer: bytes) -> None:
        """Keep a response; the least recently used ones are dropped.

        Args:
            key: any hashable value.
            answer: the body of the response.
        """
        with self._guard:
            self._bytes += len(answer) - len(self._answers.pop(key, b""))
            self._answers[key] = answer
            while self._bytes > self._capacity:
                self._bytes -= len(self._answers.popitem(last=False)[1])

    def __len__(self) -> int:
        """Bytes that are kept."""
        return self._bytes


def tile_picture(shelf: SlideCache, place: SlideRef, level: int, column: int, row: int) -> bytes:
    """A tile of a slide's pyramid.

    Args:
        shelf: opens the slide.
        place: the slide.
        level: Deep Zoom level.
        column: index of the tile from the left.
        row: index of the tile from the top.

    Returns:
        JPEG, at most `SIDE` pixels a side.

    Raises:
        NoTile: there is no such tile.
        SlideError: the slide cannot be opened, or read there.
    """
    with shelf.slide(place) as slide:
        pyramid = Pyramid(slide.size)
        region, step = pyramid.region(level, column, row), pyramid.step(level)
        _check_cost(slide, region, step)
        return jpeg(slide.read(region, slide.mpp * step))


def _check_cost(slide: Slide, region: Region, step: float) -> None:
    """Refuse a picture for which far more pixels would be decoded than it has: of a slide without smaller levels.

    Args:
        slide: open.
        region: level-0 pixels.
        step: level-0 pixels that a pixel of the picture is wide.

    Raises:
        SlideError: says how many pixels, and what to do.
    """
    down = max((level.downsample for level in slide.levels if level.downsample <= step * 1.01), default=1.0)
    pixels = region.width * region.height / down**2
    if pixels > _DECODED:
        what = f"has no smaller level: {pixels / 1e6:,.0f} million pixels would be decoded for one picture"
        raise SlideError(slide.path, what, "write it as a pyramid, such as by `vips tiffsave --pyramid --tile`")


def thumbnail(shelf: SlideCache, place: SlideRef, fallback: Path | None, longest: int = 320) -> bytes | None:
    """A small picture of a slide.

    Args:
        shelf: opens the slide.
        place: the slide.
        fallback: picture file to use where the slide cannot be read, or None.
        longest: most pixels of the longer side.

    Returns:
        JPEG; None where neither the slide nor the fallback can be read.
    """
    try:
        with shelf.slide(place) as slide:
            side = max(slide.size.width, slide.size.height)
            _check_cost(slide, Region.whole(slide.size), max(1.0, side / longest))
            return jpeg(slide.thumbnail(longest))
    except SlideError:
        if fallback is None:
            return None
        try:
            with Image.open(fallback) as picture:
                picture.thumbnail((longest, longest))
                return jpeg(np.asarray(picture.convert("RGB")))
        except OSError:
            return None


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """Encode a picture as JPEG.

    Args:
        picture: (H, W, 3) uint8 RGB.

    Returns:
        The content of a JPEG file.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
