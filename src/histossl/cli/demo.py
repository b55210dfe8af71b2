"""`histossl demo`: all stages on synthetic slides, in minutes."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from histossl.cli.study_commands import run
from histossl.core.console import say
from histossl.encoders.encode import EncodeSettings
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.wsi.synth import write_cohort
from histossl.wsi.tiles import TileSpec


def demo(out: Path = Path("out/demo"), slides: int = 48) -> int:
    """Paint a cohort with three known labels, train without them, and score which vectors predict them.

    The slides have 1.6 x 1.8 mm and tiles of 64 µm. Each slide has three independent labels; `arrangement` shows only
    in which tiles are neighbours. The last stage writes report.html.

    Args:
        out: the folder of the study; the slides are written to its subfolder `cohort`.
        slides: number of slides to paint.

    Returns:
        The exit code of `histossl run`.
    """
    start = time.monotonic()
    cohort = out / "cohort"
    if not (cohort / "labels.csv").exists():
        shutil.rmtree(cohort, ignore_errors=True)
        write_cohort(cohort, slides=slides)
    code = run(
        cohort / "slides",
        out=out,
        labels=cohort / "labels.csv",
        tile=TileSpec(px=64, mpp=1.0),
        encode=EncodeSettings(views=6, tiles=256),
        pretrain=PretrainSettings(epochs=150),
        probe=ProbeSettings(shots=(25,)),
    )
    say(f"the demo took {time.monotonic() - start:.0f} s; open {out / 'report.html'}", "green")
    return code
