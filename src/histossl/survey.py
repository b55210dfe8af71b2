"""A slide in; its row of slides.csv, the places of its tiles and a picture to check them out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from histossl import store
from histossl.config import fingerprint
from histossl.errors import SlideError
from histossl.slide import open_slide
from histossl.tiles import TileSpec, qc_picture, tile_grid
from histossl.tissue import TissueSettings, find_tissue


@dataclass(frozen=True)
class SurveyJob:
    """What a worker needs to survey one slide: paths and settings, never open files.

    Attributes:
        slide_id: the name of its outputs.
        path: of the slide.
        mpp: the user's word (slides.csv), or None to ask the file.
        mpp_default: for a file that carries none, or None.
        tissue, tile: how tissue is found and tiles are laid.
        tiles_path, qc_path: where the results go.
    """

    slide_id: str
    path: Path
    mpp: float | None
    mpp_default: float | None
    tissue: TissueSettings
    tile: TileSpec
    tiles_path: Path
    qc_path: Path


@dataclass(frozen=True)
class Survey:
    """What was found: the numbers of the slide's row in slides.csv."""

    mpp: float
    width: int
    height: int
    tiles: int


def survey_fingerprint(path: Path, mpp: float, tissue: TissueSettings, tile: TileSpec) -> str:
    """The key of a slide's tiles: the file's size and time, the mpp in force, and every setting.

    Raises:
        SlideError: the file is gone.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise SlideError(path, f"cannot be read ({error.strerror})", "check the path and its permissions") from error
    return fingerprint(stat.st_size, stat.st_mtime_ns, mpp, tissue, tile)


def survey_slide(job: SurveyJob) -> Survey:
    """Open a slide, find its tissue, lay its tiles, write both products; whole or absent.

    Raises:
        SlideError: it cannot be opened, has no usable mpp, or holds no tile of tissue.
    """
    with open_slide(job.path, job.mpp, job.mpp_default) as slide:
        mask = find_tissue(slide, job.tissue)
        grid = tile_grid(slide, mask, job.tile)
        picture = Image.fromarray(qc_picture(slide, mask, grid))
        with store.whole(job.qc_path) as part:
            picture.save(part, format="JPEG", quality=85)
        if not len(grid.xy):
            raise SlideError(
                job.path, "no tile of tissue found", f"see {job.qc_path.name}; lower --tile.min_tissue or --tile.px"
            )
        made = survey_fingerprint(job.path, slide.mpp, job.tissue, job.tile)
        with store.new_tile_file(job.tiles_path, job.slide_id, grid, made):
            pass
        return Survey(slide.mpp, slide.size.width, slide.size.height, len(grid.xy))
