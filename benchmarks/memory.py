"""Peak memory of inspecting and encoding a large slide over that of a small one; it should not grow.

    python benchmarks/memory.py [SMALL LARGE]

Sides in level-0 pixels at 0.5 µm per pixel, 10,000 and 60,000 by default; the slides are painted once, into out/.
Counts the process and all its workers at their common peak, sampled every 20 ms.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from histossl.wsi.synth import SynthSettings, write_slide


def peak(command: list[str]) -> int:
    """The largest sum of the resident memory of a process and its descendants, in bytes."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    family, highest = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        try:
            for member in [family, *family.children(recursive=True)]:
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        highest = max(highest, total)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return highest


def main(sides: list[int]) -> None:
    """Print both peaks and their ratio."""
    peaks = []
    for side in sides:
        slides = Path("out/benchmarks") / f"memory-{side}"
        if not (slides / "s.tiff").exists():
            write_slide(slides / "s.tiff", SynthSettings(width=side, height=side, mpp=0.5, patch_um=224.0))
        with tempfile.TemporaryDirectory() as out:
            histossl = [sys.executable, "-m", "histossl"]
            inspected = peak([*histossl, "inspect", str(slides), "--out", out])
            # Views cost the same a tile as features; two of them show their memory without an hour of computing.
            encoded = peak([*histossl, "encode", out, "--encoder", "random", "--encode.views", "2", "--device", "cpu"])
        peaks.append((inspected, encoded))
        print(f"{side} x {side}: inspect {inspected / 2**20:.0f} MiB, encode {encoded / 2**20:.0f} MiB")
    for name, small, large in zip(("inspect", "encode"), *peaks, strict=True):
        print(f"{name}: {sides[-1]} over {sides[0]}, ratio {large / small:.2f}")
    print(f"both: {sides[-1]} over {sides[0]}, ratio {max(peaks[1]) / max(peaks[0]):.2f} (ceiling 1.10)")


if __name__ == "__main__":
    main([int(side) for side in sys.argv[1:3]] or [10_000, 60_000])
