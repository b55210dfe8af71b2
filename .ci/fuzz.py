"""Feeds changed files to every reader for some minutes, guided by coverage (atheris, Linux).

    python .ci/fuzz.py [MINUTES]

Ends with an error at the first file that makes a reader raise anything but an error of ours, take over 20 seconds, or
take over 4 GB; the file is then kept as crash-*, timeout-* or oom-*. Its first byte chooses the file of the corpus in
tests/data/fuzz whose reader and ending it gets: `python .ci/fuzz.py crash-...` runs it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]
PACKAGES = ["histossl.core", "histossl.evaluate.labels", "histossl.evaluate.sources", "histossl.evaluate.split_files"]
PACKAGES += ["histossl.nuclei.geojson", "histossl.wsi.safe_xml"]

with atheris.instrument_imports(include=PACKAGES):
    from support.fuzz import CORPUS, tried

NAMES = sorted(path.name for path in CORPUS.iterdir())


def main(argument: str) -> None:
    """Run for so many minutes, or one file again."""
    with tempfile.TemporaryDirectory() as folder:
        place, seeds = Path(folder), Path(folder) / "seeds"
        seeds.mkdir()
        for k, name in enumerate(NAMES):
            data = (CORPUS / name).read_bytes()
            (seeds / name).write_bytes(bytes([k]) + data)
            tried(name, data, place)  # imports what its reader needs, which may take longer than an input may

        def one(data: bytes) -> None:
            if data:
                tried(NAMES[data[0] % len(NAMES)], data[1:], place)

        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"]
        minutes = argument.replace(".", "").isdigit()
        what = [f"-max_total_time={round(60 * float(argument))}", str(seeds)] if minutes else [argument]
        atheris.Setup([sys.argv[0], *limits, *what], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "10")
