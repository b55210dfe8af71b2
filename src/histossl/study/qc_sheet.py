"""One picture of a cohort: the QC pictures of all slides, the suspicious ones first."""

from __future__ import annotations

import math
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from histossl.core import atomic
from histossl.core.errors import StudyError
from histossl.core.tables import Row, number
from histossl.study.folder import Study

_SIDE, _TEXT, _GAP = 300, 48, 8  # pixels of a picture's longer side, of the lines under it, and between pictures
_MOST = 400  # slides; more would make a picture that nobody opens


def write_sheet(study: Study, path: Path) -> int:
    """Write the QC pictures of a study's slides into one PNG.

    Failed slides come first, then those with a note, then the others; within each those of which artefacts cover most,
    and among equals those with the least of their area in tiles, see `trust`.

    Args:
        study: an inspected study.
        path: the PNG.

    Returns:
        The number of slides that are left out, beyond the first 400.

    Raises:
        StudyError: there is no slide.
    """
    rows = sorted(study.slides(), key=trust)
    if not rows:
        raise StudyError(f"{study.folder}: no slides, so no sheet")
    shown = rows[:_MOST]
    across = math.ceil(math.sqrt(len(shown)))
    width, height = _SIDE + _GAP, _SIDE + _TEXT + _GAP
    sheet = Image.new("RGB", (across * width + _GAP, math.ceil(len(shown) / across) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, row in enumerate(shown):
        x, y = _GAP + k % across * width, _GAP + k // across * height
        if study.qc(row["slide_id"]).is_file():
            with Image.open(study.qc(row["slide_id"])) as picture:
                picture.thumbnail((_SIDE, _SIDE))
                sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
        colour = "firebrick" if row["status"] == "failed" else "darkorange" if row["note"] else "black"
        draw.rectangle((x - 2, y - 2, x + _SIDE + 1, y + _SIDE + _TEXT), outline=colour)
        told = row["error"] or row["note"] or row.get("artefacts", "")
        tiles = f"{row['tiles'] or 'no'} tile{'s' * (row['tiles'] != '1')}"
        lines = (row["slide_id"], f"{tiles}, mpp {row['mpp'] or 'unknown'}", told)
        for line, text in enumerate(lines):
            draw.text((x + 2, y + _SIDE + line * 15), _cut(text, draw, font), colour, font)
    with atomic.whole_buffer(path) as file:
        sheet.save(file, format="PNG")
    return len(rows) - len(shown)


def trust(row: Row) -> tuple[int, int, float, str]:
    """A key that puts suspicious slides first.

    Args:
        row: of slides.csv.

    Returns:
        Small for slides that failed, then for those with a note; among these for those of which artefacts cover more,
        in tenths (fat and glass are none), and then for those with less of their area in tiles.
    """
    shares = re.findall(r"([a-z-]+) ([01]\.\d+)", row.get("artefacts", ""))
    spoilt = round(10 * sum(float(share) for kind, share in shares if kind != "empty"))
    state = 0 if row["status"] == "failed" else 1 if row.get("note") else 2
    try:
        share = number(row["tiles"]) / (number(row["width"]) * number(row["height"]) * number(row["mpp"]) ** 2)
    except (ValueError, ZeroDivisionError):
        share = 0.0
    return state, -spoilt, share, row["slide_id"]


def _cut(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits under a picture."""
    text = " ".join(text.split())[:120]
    while len(text) > 1 and draw.textlength(text, font) > _SIDE - 4:
        text = text.rstrip("…")[:-1] + "…"
    return text
