"""CPU seconds of every stage of `histossl run`, each as a command of its own with all its workers.

    python benchmarks/stage_seconds.py [SLIDES] [SIDE]

SLIDES painted slides, 100 by default, of SIDE x SIDE px at 0.5 µm, 2,048 by default; they are painted into
out/benchmarks/stages once. All settings are the defaults but 8 views a slide instead of 50, and 20 epochs.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from histossl.wsi.synth import write_cohort

ROOT = Path("out/benchmarks/stages")


def spent(words: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds on the clock) of a command and all its children."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "histossl", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return busy, time.perf_counter() - start


def main(slides: int, side: int) -> None:
    """Print the table."""
    cohort = ROOT / f"{slides}-{side}"
    if not (cohort / "labels.csv").exists():
        write_cohort(cohort, slides=slides, width=side, height=side, seed=1)
    study = str(cohort / "study")
    shutil.rmtree(study, ignore_errors=True)
    stages = {
        "inspect": ["inspect", str(cohort / "slides"), "--out", study],
        "encode": ["encode", study, "--encode.views=8"],
        "pretrain": ["pretrain", study, "--pretrain.epochs=20"],
        "embed": ["embed", study],
        "probe": ["probe", study, "--labels", str(cohort / "labels.csv")],
        "report": ["report", study],
        "status": ["status", study],
    }
    for name, words in stages.items():
        busy, seconds = spent(words)
        print(f"{name:<9} {busy:7.1f} CPU s, {seconds:7.1f} s on the clock", flush=True)


if __name__ == "__main__":
    main(*(int(word) for word in (*sys.argv[1:], *("100", "2048")[len(sys.argv) - 1 :])))
