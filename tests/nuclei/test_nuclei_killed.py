"""`nuclei segment`, killed at random moments, ends with the bytes of a run that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from histossl.wsi.synth import SynthSettings, write_slide
from support.killing import child, digest, kill_at_random


def killed(folder: Path, rounds: int) -> int:
    for k in range(2):
        (folder / "slides").mkdir(exist_ok=True)
        write_slide(folder / "slides" / f"s{k}.tiff", SynthSettings(width=384, height=256 + 64 * k, seed=k))
    command = ["nuclei", "segment", str(folder / "slides"), "--model", "prior", "--workers=1", "--device=cpu", "-o"]
    process = child([*command, str(folder / "left alone")])
    process.join()
    assert process.exitcode == 0
    wanted, out = digest(folder / "left alone"), folder / "out"
    assert len(wanted) > 2
    return kill_at_random(lambda: child([*command, str(out)]), out, wanted, rounds, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_segment_killed_two_hundred_times(tmp_path):
    assert killed(tmp_path, 200) > 5


def test_segment_killed_at_random_moments(tmp_path):
    killed(tmp_path, 2)
