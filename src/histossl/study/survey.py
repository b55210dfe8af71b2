"""Surveys a slide: its row of slides.csv, the coordinates of its tiles, and a picture to check them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from histossl.core import atomic
from histossl.core.config import fingerprint
from histossl.core.errors import SlideError
from histossl.wsi import tile_files
from histossl.wsi.areas import SlideAreas, restrict, write_inside
from histossl.wsi.content import content_of
from histossl.wsi.slide import open_slide, slide_state
from histossl.wsi.stain_norm import look_of
from histossl.wsi.tiles import TileSpec, qc_picture, tile_grid
from histossl.wsi.tissue import TissueSettings, find_tissue


@dataclass(frozen=True)
class SurveyJob:
    """What a worker needs to survey one slide: paths and settings, never open files.

    Attributes:
        slide_id: name of the slide and of its outputs.
        path: the file of the slide.
        mpp: the user's value (slides.csv), or None to read it from the file.
        mpp_default: value for a file that has none, or None.
        tissue, tile: how tissue is found and tiles are placed.
        tiles_path, qc_path: the files to write.
        content: fingerprint of the file when it was last surveyed, or "".
        areas: the user's areas that tiles are laid in; None lays them on all tissue.
        mask_path: the picture of them and of the tissue inside to write; None writes none.
    """

    slide_id: str
    path: Path
    mpp: float | None
    mpp_default: float | None
    tissue: TissueSettings
    tile: TileSpec
    tiles_path: Path
    qc_path: Path
    content: str = ""
    areas: SlideAreas | None = None
    mask_path: Path | None = None


@dataclass(frozen=True)
class SlideSurvey:
    """The result of a survey: cells of the slide's row in slides.csv."""

    mpp: float
    width: int
    height: int
    tiles: int
    made: str
    note: str = ""
    content: str = ""
    artefacts: str = ""
    stains: str = ""


def inspect_fingerprint(tissue: TissueSettings, tile: TileSpec) -> str:
    """The fingerprint of every setting that tiles depend on.

    Args:
        tissue: how tissue is found.
        tile: size and distance of the tiles.

    Returns:
        The fingerprint.
    """
    return fingerprint(tissue, tile)


def survey_fingerprint(state: str, mpp: float, laying: str, areas: SlideAreas | None = None) -> str:
    """The fingerprint of a slide's tiles.

    Args:
        state: the state of the file, see `slide_state`.
        mpp: the µm per pixel that are used.
        laying: the `inspect_fingerprint` of the settings.
        areas: the user's areas; their files count by content.

    Returns:
        The fingerprint; without areas the same as in studies that know none.

    Raises:
        LabelError: a file of areas cannot be read.
    """
    return fingerprint(state, mpp, laying, *([areas.made] if areas else []))


def survey_slide(job: SurveyJob) -> SlideSurvey:
    """Open a slide, find its tissue, place its tiles, and write both products, whole or absent.

    Args:
        job: the slide, its settings and the paths of its products.

    Returns:
        What its row of slides.csv holds.

    Raises:
        SlideError: the slide cannot be opened, has no usable mpp, holds no tile of tissue, its areas do not fit it, or
            it is changed while it is read.
        LabelError: a file of areas cannot be read.
    """
    state = slide_state(job.path)
    with open_slide(job.path, job.mpp, job.mpp_default) as slide:
        mask = find_tissue(slide, job.tissue)
        if job.areas:
            mask = restrict(mask, slide, job.areas)
            if job.mask_path:
                write_inside(job.mask_path, mask)
        grid = tile_grid(slide, mask, job.tile)
        picture = Image.fromarray(qc_picture(slide, mask, grid))
        with atomic.whole_buffer(job.qc_path) as file:
            picture.save(file, format="JPEG", quality=85)
        if not len(grid.xy):
            told = "; ".join(filter(None, [mask.ink_note, str(grid.artefacts)]))
            inked = f" ({told})" if told else ""
            hint = f"see {job.qc_path.name}; lower --tile.min-tissue or --tile.px"
            raise SlideError(job.path, f"no tile of tissue found{inked}", hint)
        if slide_state(job.path) != state:
            raise SlideError(job.path, "was changed while it was read", "run again once it is copied")
        made = survey_fingerprint(state, slide.mpp, inspect_fingerprint(job.tissue, job.tile), job.areas)
        look = look_of(slide, mask)
        with tile_files.new_tile_file(job.tiles_path, job.slide_id, grid, made, state) as file:
            tile_files.write_look(file, look)
        content = content_of(job.path)
        changed = "its file is another one than when it was first inspected: are patient_id and mpp still true?"
        drawn = job.areas.note if job.areas else ""
        remarks = [*slide.notes, mask.ink_note, drawn, changed if job.content not in ("", content) else ""]
        note = "; ".join(filter(None, remarks))
        about = slide.mpp, slide.size.width, slide.size.height, len(grid.xy), made, note, content
        return SlideSurvey(*about, str(grid.artefacts), str(look or ""))
