"""Overlays of a slide: tissue, areas, tiles, nuclei, and the share of each tile in a probe's score."""

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
from histossl.view.artefact_layers import artefact_layers, artefact_scores
from histossl.view.cohort import Cohort
from histossl.view.outlines import Outlines, find_outlines, read_outlines
from histossl.view.reading import SlideCache
from histossl.wsi import tile_files
from histossl.wsi.areas import read_inside
from histossl.wsi.geometry import Size
from histossl.wsi.tissue import TissueSettings, find_tissue

_OUTLINE_BYTES = 512 * 2**20  # of outlines kept in memory


class Overlays:
    """The overlays of a study's slides.

    Call it from one thread only: it keeps outlines without a lock, and some overlays take much time and memory.

    Args:
        study: the study that the slides belong to.
        cohort: the slides of the same study.
        shelf: opens the slides.
        nuclei: folder of `<slide_id>.geojson`, `.geojson.gz` or `.parquet`.
    """

    def __init__(self, study: Study, cohort: Cohort, shelf: SlideCache, nuclei: Path) -> None:
        self.study, self.cohort, self.shelf, self.nuclei = study, cohort, shelf, nuclei
        self._outlines: OrderedDict[int, Outlines] = OrderedDict()

    def there(self, slide: int) -> dict[str, Any]:
        """Which overlays a slide has.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            `tissue`, `areas`, `tiles` and `nuclei` as booleans; `heat`, the names of the heatmaps and of the artefacts
            in the order of `heat`.

        Raises:
            FileFormatError: the tile file cannot be read.
        """
        return {
            "tissue": self.cohort.mpp(slide) is not None,
            "areas": self._drawn(slide) is not None,
            "tiles": self._tile_file(slide) is not None,
            "heat": [*(said for said, _, _ in self._heatmaps(slide)), *(said for said, _ in self._artefacts(slide))],
            "nuclei": self._nuclei_file(slide) is not None,
        }

    def tissue(self, slide: int) -> bytes:
        """The outlines of the tissue, found with the settings of `inspect`; where areas were drawn, inside of them.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            JSON: a list of rings, each a list of [x, y] in level-0 pixels.

        Raises:
            SlideError: the slide cannot be read.
        """
        saved = self.study.settings().get("inspect", {}).get("tissue")
        settings = from_dict(TissueSettings, saved) if saved else TissueSettings()
        drawn = self._drawn(slide)
        with self.shelf.slide(self.cohort.place(slide)) as opened:
            mask = find_tissue(opened, settings).mask if drawn is None else read_inside(drawn)[1]
            return _outlined(mask, opened.size)

    def areas(self, slide: int) -> bytes | None:
        """The outlines of the areas that the user drew.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            JSON as of `tissue`; None where tiles lie on all tissue.

        Raises:
            SlideError: the slide cannot be opened.
            LabelError: the picture of the areas is damaged.
        """
        drawn = self._drawn(slide)
        if drawn is None:
            return None
        with self.shelf.slide(self.cohort.place(slide)) as opened:
            return _outlined(read_inside(drawn)[0], opened.size)

    def tiles(self, slide: int) -> bytes | None:
        """The tiles of a slide.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            Little-endian: float32 stride and extent in level-0 pixels, then int32 x, y of each tile's top-left corner;
            None where the slide has no tiles in level-0 pixels.

        Raises:
            FileFormatError: the tile file cannot be read.
        """
        path = self._tile_file(slide)
        if path is None:
            return None
        tiles = tile_files.read_tiles_of(path)
        return _packed(tiles.stride, tiles.extent, tiles.xy)

    def heat(self, slide: int, number: int) -> bytes | None:
        """One of the heatmaps of a slide, or the shares of its tiles that an artefact covers.

        Args:
            slide: index of the slide in the cohort.
            number: index of the heatmap, as `there` lists them.

        Returns:
            The bytes of `tiles`, then the float32 share of each tile in the score; None where there is no such heatmap.

        Raises:
            FileFormatError: the heatmap or the tile file cannot be read.
        """
        maps, tiles = self._heatmaps(slide), self._tile_file(slide)
        shown = self._artefacts(slide) if number >= len(maps) else []
        if 0 <= number - len(maps) < len(shown):
            laid, scores = artefact_scores(self._judged_file(slide), shown[number - len(maps)][1])
            return _packed(laid.stride, laid.extent, laid.xy) + scores.astype("<f4").tobytes()
        if number >= len(maps) or tiles is None:
            return None
        _, path, column = maps[number]
        try:
            table = pd.read_csv(path)
            xy, shares = table[["x", "y"]].to_numpy(np.float64), table[column].to_numpy(np.float64)
        except (OSError, ValueError, KeyError) as error:
            raise FileFormatError(f"{path.name}: no heatmap ({error})", "run `histossl heatmap` again") from error
        grid = tile_files.read_tiles_of(tiles)
        return _packed(grid.stride, grid.extent, xy) + np.nan_to_num(shares).astype("<f4").tobytes()

    def nuclei_about(self, slide: int) -> bytes | None:
        """What a page needs before it requests cells of nuclei.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            JSON of `Outlines.about`; None where the slide has no nuclei.

        Raises:
            SlideError: the slide cannot be opened.
            FileFormatError: the nuclei cannot be read.
        """
        return self._of_nuclei(slide, lambda found: json.dumps(found.about()).encode())

    def nuclei_cell(self, slide: int, cell: int) -> bytes | None:
        """The outlines of one cell.

        Args:
            slide: index of the slide in the cohort.
            cell: number of the cell, as in `Outlines.cell`.

        Returns:
            The bytes of `Outlines.packed`; None where the slide has no nuclei.

        Raises:
            SlideError: the slide cannot be opened.
            FileFormatError: the nuclei cannot be read.
        """
        return self._of_nuclei(slide, lambda found: found.packed(cell))

    def nuclei_density(self, slide: int) -> bytes | None:
        """A picture of the density of nuclei.

        Args:
            slide: index of the slide in the cohort.

        Returns:
            The PNG of `Outlines.density`; None where the slide has no nuclei.

        Raises:
            SlideError: the slide cannot be opened.
            FileFormatError: the nuclei cannot be read.
        """
        return self._of_nuclei(slide, Outlines.density)

    def _of_nuclei(self, slide: int, answer: Callable[[Outlines], bytes]) -> bytes | None:
        if slide not in self._outlines:
            path = self._nuclei_file(slide)
            if path is None:
                return None
            with self.shelf.slide(self.cohort.place(slide)) as opened:
                size = opened.size
            self._outlines[slide] = read_outlines(path, size)
            while len(self._outlines) > 1 and sum(o.nbytes for o in self._outlines.values()) > _OUTLINE_BYTES:
                self._outlines.popitem(last=False)
        self._outlines.move_to_end(slide)
        return answer(self._outlines[slide])

    def _nuclei_file(self, slide: int) -> Path | None:
        path = find_outlines(self.nuclei, self.cohort.rows[slide]["slide_id"]) if self._named(slide) else None
        return path if path and within(path, self.nuclei) else None

    def _tile_file(self, slide: int) -> Path | None:
        """The file of a slide's tiles, if their coordinates are in level-0 pixels."""
        name = self.cohort.rows[slide]["slide_id"]
        paths = (self.study.tiles(name), self.study.features(name)) if self._named(slide) else ()
        path = next((path for path in paths if within(path, self.study.folder)), None)
        return None if path is None or tile_files.read_tiles_of(path).in_um else path

    def _drawn(self, slide: int) -> Path | None:
        """The picture of the areas that a slide's tiles lie in."""
        given = self.study.settings().get("inspect", {}).get("areas") is not None and self._named(slide)
        path = self.study.area_mask(self.cohort.rows[slide]["slide_id"]) if given else None
        return path if path and within(path, self.study.folder) else None

    def _judged_file(self, slide: int) -> Path:
        """The file that knows most of the artefacts of a slide's tiles; only where there are tiles."""
        name = self.cohort.rows[slide]["slide_id"]
        features = self.study.features(name)
        return features if within(features, self.study.folder) else self.study.tiles(name)

    def _artefacts(self, slide: int) -> list[tuple[str, int]]:
        return artefact_layers(self._judged_file(slide)) if self._tile_file(slide) is not None else []

    def _heatmaps(self, slide: int) -> list[tuple[str, Path, str]]:
        """(target and class, file, column) of each heatmap that `histossl heatmap` wrote."""
        found, heatmaps = [], self.study.folder / "heatmaps"
        if not self._named(slide) or not heatmaps.is_dir():
            return found
        for folder in sorted(path for path in heatmaps.iterdir() if path.is_dir()):
            path = folder / f"{self.cohort.rows[slide]['slide_id']}.csv"
            if within(path, self.study.folder):
                with path.open(newline="", encoding="utf-8") as file:
                    head = next(csv.reader(file), [])
                shares = [name for name in head if name.startswith("share(")] if {"x", "y"} <= set(head) else []
                found += [(f"{folder.name}: {name[6:-1]}", path, name) for name in shares]
        return found

    def _named(self, slide: int) -> bool:
        """Whether a slide's name is a plain file name: names from slides.csv are not trusted as paths."""
        name = self.cohort.rows[slide]["slide_id"]
        return Path(name).name == name and not {"\0", "\\"} & set(name)


def within(path: Path, folder: Path) -> bool:
    """Whether a file exists inside a folder, with links resolved: a study from elsewhere may link to any file.

    Args:
        path: the file.
        folder: the folder that must hold it.

    Returns:
        True where it is a file and lies in the folder or below.
    """
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _outlined(mask: NDArray[np.bool_], size: Size) -> bytes:
    """JSON of the outlines of a mask of a slide: rings of [x, y] in level-0 pixels."""
    from skimage.measure import approximate_polygon, find_contours

    # The border closes the rings at the edge; the 0.5 moves from pixel centres to pixel corners.
    around = np.pad(mask, 1).astype(np.float32)
    scale = np.array([size.width / mask.shape[1], size.height / mask.shape[0]])
    rings = [approximate_polygon(ring, 0.5)[:, ::-1] - 0.5 for ring in find_contours(around, 0.5)]
    lists = [np.clip(ring * scale, 0, [size.width, size.height]).round(1).tolist() for ring in rings]
    return json.dumps(lists, separators=(",", ":")).encode()


def _packed(stride: float, extent: float, xy: NDArray) -> bytes:
    return np.array([stride, extent], "<f4").tobytes() + np.rint(xy).astype("<i4").tobytes()


def slide_facts(cohort: Cohort, overlays: Overlays, shelf: SlideCache, slide: int) -> dict[str, Any]:
    """What the page of a slide needs first, read from the slide itself.

    Args:
        cohort: the slides of the study.
        overlays: of the same study.
        shelf: opens the slide.
        slide: index of the slide in the cohort.

    Returns:
        Name, size in level-0 pixels, mpp in µm per pixel or None, vendor, and `Overlays.there`.

    Raises:
        SlideError: the slide cannot be opened.
        FileFormatError: the tile file cannot be read.
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
    """What the study knows of a slide; the slide is not opened.

    Args:
        cohort: the slides of the study.
        slide: index of the slide in the cohort.

    Returns:
        Name, row of the table, file name, labels, predictions, similar slides, and the indices of the next and the
        previous slide.
    """
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
