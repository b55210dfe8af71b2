"""A study of many slides, on paper: how long status, resume and a claim take, and in how much memory.

    python benchmarks/large_study.py [SLIDES]

SLIDES: rows of slides.csv, 100,000 by default, half of them encoded, with an empty file for every product that a resume
asks after. Prints seconds and peak memory of each, every one in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_study(folder: Path, slides: int) -> None:
    """Rows, products and a log, as a run of days leaves them."""
    from histossl.execution.journal import Journal
    from histossl.study.folder import COLUMNS, Study

    study = Study(folder)
    rows = []
    for k in range(slides):
        name = f"TCGA-{k:06d}-01Z-00-DX1"
        row = dict.fromkeys(COLUMNS, "") | {"slide_id": name, "path": f"/disk/of/slides/{k % 100:02d}/{name}.svs"}
        row |= {"patient_id": f"TCGA-{k:06d}", "mpp": "0.2519", "width": "98304", "height": "76800", "tiles": "12000"}
        row |= {"status": "inspected", "made": f"{k:016x}"}
        rows.append(row)
    study.write_slides(rows)
    for room in ("features", "views", "tiles", "qc"):
        (folder / room).mkdir()
    done = rows[: slides // 2]
    ledger = Journal(study)
    for first in range(0, len(done), 1000):
        lines = [
            (row, {"status": "encoded", "made": f"{row['made']}-key", "error": ""})
            for row in done[first : first + 1000]
        ]
        ledger.write("encode", lines, tiles=12000, seconds=60.0, lost=0, limit="the CPU limits")
    for row in done:
        (folder / "features" / f"{row['slide_id']}.h5").touch()
        (folder / "views" / row["slide_id"]).touch()
    ledger.flush()


def of_status(folder: Path) -> None:
    """What `histossl status` does."""
    from histossl.study.status import status_of

    assert status_of(folder).slides["encoded"] > 0


def of_resume(folder: Path) -> None:
    """What `histossl encode` does before its first slide: which slides are left."""
    from histossl.execution.journal import Journal
    from histossl.study.folder import Study
    from histossl.study.inspect_stage import ExistingProducts

    ledger = Journal(Study(folder))
    stand = ExistingProducts(Study(folder))
    left = [
        row
        for row in ledger.rows
        if not (
            row["made"].endswith("-key")
            and stand("features", f"{row['slide_id']}.h5")
            and stand("views", row["slide_id"])
        )
    ]
    assert len(left) == len(ledger.rows) - len(ledger.rows) // 2


def of_claim(folder: Path) -> None:
    """A thousand claims, each taken, looked at by another run and let go."""
    from histossl.execution.claims import Claims

    with Claims(folder / ".claims") as claims:
        for k in range(1000):
            assert claims.take(f"slide {k}")
            claims.release(f"slide {k}")


def main(slides: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "study"
        write_study(folder, slides)
        for name in ("status", "resume", "claim"):
            subprocess.run([sys.executable, __file__, "--of", name, str(folder)], check=True, env=os.environ)


def measured(name: str, folder: Path) -> None:
    """Time one of them, without the start of Python and the imports."""
    import histossl.study.inspect_stage
    import histossl.study.status  # noqa: F401

    start, busy = time.perf_counter(), time.process_time()
    {"status": of_status, "resume": of_resume, "claim": of_claim}[name](folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    # Not getrusage: it counts what the parent held before this program was loaded.
    memory = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(f"{name:<7} {seconds:.2f} s ({cpu:.2f} s of the processor), {memory:.0f} MiB at most")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--of"]:
        measured(sys.argv[2], Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
