"""What lies over a slide: its tissue, its tiles, its nuclei, and what its tiles give to a probe."""

from __future__ import annotations

import csv
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histossl.core.config import from_dict
from histossl.core.errors import FileFormatError
from histossl.study.folder import Study
from histossl.view.cohort import Cohort
from histossl.view.outlines import Outlines, find_outlines, read_outlines
from histossl.view.reading import SlideCache
from histossl.wsi import tile_files
from histossl.wsi.geometry import Size
from histossl.wsi.tissue import TissueSettings, find_tissue

_ROOM = 512 * 2**20  # bytes of outlines at hand


class Overlays:
    """What can be shown over the slides of a study; called from one thread, since some of it takes long and much.

    Args:
        study: of the slides.
        cohort: the same study's slides.
        shelf: opens them.
        nuclei: folder of `<slide_id>.geojson`, `.geojson.gz` or `.parquet`.
    """

    def __init__(self, study: Study, cohort: Cohort, shelf: SlideCache, nuclei: Path) -> None:
        self.study, self.cohort, self.shelf, self.nuclei = study, cohort, shelf, nuclei
        self._outlines: OrderedDict[int, Outlines] = OrderedDict()

    def there(self, slide: int) -> dict[str, Any]:
        """Which overlays a slide has; of heatmaps their names, in the order of `heat`."""
        return {
            "tissue": self.cohort.mpp(slide) is not None,
            "tiles": self._tile_file(slide) is not None,
            "heat": [said for said, _, _ in self._heatmaps(slide)],
            "nuclei": self._nuclei_file(slide) is not None,
        }

    def tissue(self, slide: int) -> bytes:
        """JSON: the outlines of the tissue, lists of [x, y] in level-0 pixels; found as `inspect` found it.

        Raises:
            SlideError: the slide cannot be read.
        """
        from skimage.measure import approximate_polygon, find_contours

        told = self.study.settings().get("inspect", {}).get("tissue")
        settings = from_dict(TissueSettings, told) if told else TissueSettings()
        with self.shelf.slide(self.cohort.place(slide)) as opened:
            found = find_tissue(opened, settings)
        mask = np.pad(found.mask, 1).astype(np.float32)
        height, width = found.mask.shape
        scale = np.array([found.size.width / width, found.size.height / height])
        rings = [approximate_polygon(ring, 0.5)[:, ::-1] - 0.5 for ring in find_contours(mask, 0.5)]
        lists = [np.clip(ring * scale, 0, [found.size.width, found.size.height]).round(1).tolist() for ring in rings]
        return json.dumps(lists, separators=(",", ":")).encode()

    def tiles(self, slide: int) -> bytes | None:
        """float32 stride and extent in level-0 pixels, then int32 x, y of each tile's corner; little-endian.

        None where no tiles stand.

        Raises:
            FileFormatError: they cannot be read.
        """
        path = self._tile_file(slide)
        if path is None:
            return None
        tiles = tile_files.read_tiles_of(path)
        return _packed(tiles.stride, tiles.extent, tiles.xy)

    def heat(self, slide: int, number: int) -> bytes | None:
        """As `tiles`, and behind it float32 of each tile's share of a score: one of the heatmaps that stand.

        Raises:
            FileFormatError: it cannot be read.
        """
        maps, tiles = self._heatmaps(slide), self._tile_file(slide)
        if number >= len(maps) or tiles is None:
            return None
        _, path, column = maps[number]
        try:
            table = pd.read_csv(path)
            xy, shares = table[["x", "y"]].to_numpy(np.float64), table[column].to_numpy(np.float64)
        except (OSError, ValueError, KeyError) as error:
            raise FileFormatError(f"{path.name}: no heatmap ({error})", "run `histossl heatmap` again") from error
        laid = tile_files.read_tiles_of(tiles)
        return _packed(laid.stride, laid.extent, xy) + np.nan_to_num(shares).astype("<f4").tobytes()

    def nuclei_about(self, slide: int) -> bytes | None:
        """JSON of `Outlines.about`, None where no nuclei stand."""
        return self._of_nuclei(slide, lambda found: json.dumps(found.about()).encode())

    def nuclei_cell(self, slide: int, cell: int) -> bytes | None:
        """`Outlines.packed`, None where no nuclei stand."""
        return self._of_nuclei(slide, lambda found: found.packed(cell))

    def nuclei_density(self, slide: int) -> bytes | None:
        """`Outlines.density`, None where no nuclei stand."""
        return self._of_nuclei(slide, Outlines.density)

    def _of_nuclei(self, slide: int, answer: Callable[[Outlines], bytes]) -> bytes | None:
        if slide not in self._outlines:
            path = self._nuclei_file(slide)
            if path is None:
                return None
            with self.shelf.slide(self.cohort.place(slide)) as opened:
                size = opened.size
            self._outlines[slide] = read_outlines(path, size)
            while len(self._outlines) > 1 and sum(o.nbytes for o in self._outlines.values()) > _ROOM:
                self._outlines.popitem(last=False)
        self._outlines.move_to_end(slide)
        return answer(self._outlines[slide])

    def _nuclei_file(self, slide: int) -> Path | None:
        path = find_outlines(self.nuclei, self.cohort.rows[slide]["slide_id"]) if self._named(slide) else None
        return path if path and within(path, self.nuclei) else None

    def _tile_file(self, slide: int) -> Path | None:
        """Where a slide's tiles lie, if their places are in level-0 pixels."""
        name = self.cohort.rows[slide]["slide_id"]
        rooms = (self.study.tiles, self.study.features) if self._named(slide) else ()
        path = next((path for path in (room(name) for room in rooms) if within(path, self.study.folder)), None)
        return None if path is None or tile_files.read_tiles_of(path).in_um else path

    def _heatmaps(self, slide: int) -> list[tuple[str, Path, str]]:
        """(target and class, file, column) of what `histossl heatmap` wrote."""
        found, room = [], self.study.folder / "heatmaps"
        if not self._named(slide) or not room.is_dir():
            return found
        for folder in sorted(path for path in room.iterdir() if path.is_dir()):
            path = folder / f"{self.cohort.rows[slide]['slide_id']}.csv"
            if within(path, self.study.folder):
                with path.open(newline="", encoding="utf-8") as file:
                    head = next(csv.reader(file), [])
                shares = [name for name in head if name.startswith("share(")] if {"x", "y"} <= set(head) else []
                found += [(f"{folder.name}: {name[6:-1]}", path, name) for name in shares]
        return found

    def _named(self, slide: int) -> bool:
        """Whether a slide's name can be a file's: a table that somebody sent may hold anything."""
        name = self.cohort.rows[slide]["slide_id"]
        return Path(name).name == name and not {"\0", "\\"} & set(name)


def within(path: Path, folder: Path) -> bool:
    """Whether a file is there and in a folder, links followed: a study that somebody sent may link to anything."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _packed(stride: float, extent: float, xy: NDArray) -> bytes:
    return np.array([stride, extent], "<f4").tobytes() + np.rint(xy).astype("<i4").tobytes()


def slide_facts(cohort: Cohort, overlays: Overlays, shelf: SlideCache, slide: int) -> dict[str, Any]:
    """All that the page of a slide begins with.

    Raises:
        SlideError: the slide cannot be opened.
    """
    row = cohort.rows[slide]
    with shelf.slide(cohort.place(slide)) as opened:
        size: Size = opened.size
        vendor = opened.vendor
    return {
        "name": row["slide_id"],
        "width": size.width,
        "height": size.height,
        "mpp": cohort.mpp(slide),
        "vendor": vendor,
        "overlays": overlays.there(slide),
    }


def slide_words(cohort: Cohort, slide: int) -> dict[str, Any]:
    """What is known of a slide without opening it."""
    row = cohort.rows[slide]
    labels = {name: values[slide] for name, values in cohort.columns.items() if name not in row and values[slide]}
    return {
        "name": row["slide_id"],
        "row": {name: value for name, value in row.items() if name not in ("path", "made") and value},
        "file": Path(row["path"]).name,
        "labels": labels,
        "predictions": cohort.predictions.get(slide, []),
        "neighbours": cohort.neighbours(slide),
        "next": (slide + 1) % len(cohort),
        "previous": (slide - 1) % len(cohort),
    }
