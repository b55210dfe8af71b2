"""`histossl demo`: all stages on synthetic slides, in minutes."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import time
import urllib.request
from pathlib import Path

from histossl.cli.inspect_command import inspect
from histossl.cli.results_commands import heatmap, report
from histossl.cli.study_commands import run
from histossl.core import atomic
from histossl.core.console import begin_stage, say
from histossl.core.errors import SlideError
from histossl.encoders.settings import EncodeSettings
from histossl.evaluate.settings import ProbeSettings
from histossl.gigassl.pretrain_settings import PretrainSettings
from histossl.wsi.synth import write_cohort
from histossl.wsi.tiles import TileSpec

REAL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
_REAL_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"


def demo(out: Path = Path("out/demo"), slides: int = 48, real: bool = False) -> int:
    """Paint a cohort with three known labels, train without them, and score which vectors predict them.

    The slides have 1.6 x 1.8 mm and tiles of 64 µm. Each slide has three independent labels; `arrangement` shows only
    in which tiles are neighbours; and each patient has an outcome, whose hazard depends on two of them. The last stage
    writes report.html.

    Args:
        out: the folder of the study; the slides are written to its subfolder `cohort`.
        slides: number of slides to paint, four or more.
        real: instead fetch OpenSlide's test slide (CC0, 2 MB), and look for its tissue and nuclei; one slide is too few
            to learn a vector from.

    Returns:
        The exit code of the last command.
    """
    if real:
        return _on_a_real_slide(out)
    start = time.monotonic()
    cohort = out / "cohort"
    if not (cohort / "survival.csv").exists():
        shutil.rmtree(cohort, ignore_errors=True)
        write_cohort(cohort, slides=slides)
    code = run(
        cohort / "slides",
        out=out,
        labels=cohort / "survival.csv",
        tile=TileSpec(px=64, mpp=1.0),
        encode=EncodeSettings(views=4, tiles=256),
        pretrain=PretrainSettings(epochs=150),
        probe=ProbeSettings(shots=(25,)),
    )
    # Two slides of either arrangement: the report opens with what the classifier looks at.
    shown, explained = ("slide-001", "slide-004"), ProbeSettings(targets=("arrangement",))
    heatmap(out, labels=cohort / "labels.csv", slides=shown, probe=explained)
    report(out)
    say(f"the demo took {time.monotonic() - start:.0f} s; open {out / 'report.html'}", "green")
    return code


def _on_a_real_slide(out: Path) -> int:
    from histossl.cli.nuclei_commands import segment  # imports what the painted demo does without

    slide = fetched(REAL, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "histossl")
    begin_stage("1/2 inspect", str(slide))
    code = inspect(slide, out=out)
    begin_stage("2/2 nuclei segment")
    code = max(code, segment([slide], out=out / "nuclei"))
    say(f"tissue and tiles: {out / 'qc' / f'{slide.stem}.jpg'}; nuclei, for QuPath: {out / 'nuclei'}", "green")
    say(f"next: histossl view {out}", "green")
    return code


def fetched(address: str, folder: Path) -> Path:
    """Fetch the real slide, once; what arrives must be the slide that this program knows.

    Args:
        address: of the file.
        folder: where it is kept.

    Returns:
        The file in the folder.

    Raises:
        SlideError: there is no network, or another file arrived; nothing is kept.
    """
    path = folder / address.rpartition("/")[2]
    if path.is_file() and _is_real(path.read_bytes()):
        return path
    elsewhere = f"fetch {address} elsewhere and put it into {folder}, or paint slides: `histossl demo`"
    say(f"fetching {address}")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            data = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise SlideError(path, f"cannot be fetched ({error})", elsewhere) from error
    if not _is_real(data):
        raise SlideError(path, f"{address} sent another file ({len(data):,} bytes)", elsewhere)
    with atomic.whole(path) as part:
        part.write_bytes(data)
    return path


def _is_real(data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == _REAL_SHA256
