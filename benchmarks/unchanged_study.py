"""`histossl run` on a study in which nothing has changed: the seconds until it says so, and where they go.

    python benchmarks/unchanged_study.py [SLIDES]

SLIDES: painted slides of 256 x 224 px, 1,000 by default, each with 3 tiles at most; they are painted, and the study is
made, in out/benchmarks/unchanged, once. Then the same command runs again, twice, without labels. Prints the seconds on
the clock and of the processors, with all children, and the seconds of each stage as the command's own log has them.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from histossl.wsi.synth import SynthSettings, write_slide

ROOT = Path("out/benchmarks/unchanged")
FLAGS = ["--encoder=random", "--tile.px=64", "--tile.mpp=1.0", "--encode.views=2", "--encode.tiles=4"]


def study_of(slides: int) -> list[str]:
    """Paint the slides that are missing; the command that makes their study."""
    folder = ROOT / str(slides) / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(slides):
        path = folder / f"slide-{k:05d}.tiff"
        if not path.exists():
            write_slide(path, SynthSettings(width=256, height=224, seed=k))
    out = str(ROOT / str(slides) / "study")
    return [sys.executable, "-m", "histossl", "run", str(folder), "--out", out, *FLAGS, "--pretrain.epochs=1"]


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds on the clock, seconds of the processors)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def stages(out: Path, run: str) -> dict[str, float]:
    """Seconds of every stage of the last run."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["stage"]: line["seconds"] for line in lines if line.get("run") == run and "slide_id" not in line}


def main(slides: int) -> None:
    """Print the table."""
    command, out = study_of(slides), ROOT / str(slides) / "study"
    print("made anew:  {:.1f} s, {:.1f} s of the processors".format(*measured(command)))
    for _ in range(2):
        print("unchanged:  {:.1f} s, {:.1f} s of the processors".format(*measured(command)))
        last = json.loads((out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        print(f"            {stages(out, last.get('run', ''))}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
