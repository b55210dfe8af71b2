"""`histossl inspect`, apart from the other commands of a study, so that it starts without torch and scikit-learn."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

from histossl.cli.first_look import exit_code, say_waiting
from histossl.core import answers
from histossl.core.console import say
from histossl.execution.cluster import open_workers
from histossl.study.folder import Study
from histossl.study.inspect_stage import find_slides, inspect_slides
from histossl.study.qc_sheet import write_sheet
from histossl.wsi.areas import AreaSettings
from histossl.wsi.named_areas import open_areas
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings


def inspect(
    slides: Path,
    out: Path | None = None,
    areas: Path | None = None,
    mpp_default: float | None = None,
    area: AreaSettings = AreaSettings(),
    tissue: TissueSettings = TissueSettings(),
    tile: TileSpec = TileSpec(),
    sheet: Path | None = None,
    workers: int | None = None,
    timeout: float = 900,
    scheduler: str = "",
    slurm: str = "",
) -> int:
    """A table of the slides and what is wrong with them; with --out also slides.csv and a QC picture a slide.

    Args:
        slides: a folder of slides, or one slide.
        out: the folder of the study; without it nothing stays.
        areas: a folder of outlines or masks of the areas that count, named as the slides; or grid, which finds the
            cores of tissue microarrays.
        mpp_default: µm per pixel of slides that carry none.
        area: which of the areas count, and what happens to slides without any.
        tissue: how tissue is found.
        tile: how tiles are laid.
        sheet: a PNG of all slides with their tissue and tiles, those that look wrong first.
        workers: processes that read slides.
        timeout: seconds that a worker process may take for a slide before it is killed, and the slide given up.
        scheduler: work on the Dask cluster at this address, such as tcp://host:8786, instead of on this machine alone.
        slurm: work in so many SLURM jobs, as JOBS or JOBS:NAME; see docs/scale.md.
    """
    drawn = open_areas(areas, area)
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        found = find_slides(Path(str(folder)), slides)  # before the folder of the study is made
        study = Study(Path(str(folder)))
        with study.share(say_waiting), open_workers(workers, timeout, scheduler, slurm) as pool:
            failed = inspect_slides(study, found, mpp_default, tissue, tile, pool, drawn)
        show_slides(study)
        if sheet is not None and (left := write_sheet(study, sheet)):
            say(f"note: {left} slides without anything odd are not in {sheet}", "yellow")
    return exit_code(failed)


def show_slides(study: Study) -> None:
    """Show slides.csv as a table; without the notes where there are none.

    Args:
        study: the study.
    """
    rows = study.slides()
    names = {"slide_id": "slide", "mpp": "mpp", "width": "width", "height": "height", "tiles": "tiles"}
    names |= {"error": "what is wrong"} | ({"note": "note"} if any(row.get("note") for row in rows) else {})
    shown = [{title: row.get(name, "") for name, title in names.items()} for row in rows]
    answers.give_rows("slides", shown, {"what is wrong": "red", "note": "yellow"})
