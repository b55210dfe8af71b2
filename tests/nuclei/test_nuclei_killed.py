"""`nuclei segment` and `pretrain`, killed at random moments, end with the bytes of a run that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from histossl.wsi.synth import SynthSettings, write_slide
from support.features import FAST, trident
from support.killing import child, digest, kill_at_random


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Each without its output."""
    slides, features = tmp_path_factory.mktemp("slides"), tmp_path_factory.mktemp("features")
    for k in range(2):
        write_slide(slides / f"s{k}.tiff", SynthSettings(width=384, height=256 + 64 * k, seed=k))
    for k in range(4):
        trident(features, f"s{k}")
    segment = ["nuclei", "segment", str(slides), "--model", "prior", "--workers=1", "--device=cpu", "-o"]
    return {"segment": segment, "pretrain": ["pretrain", str(features), *FAST, "--pretrain.batch=4", "--out"]}


def killed(command: list[str], folder: Path, rounds: int) -> int:
    left_alone, out = folder / "left alone", folder / "out"
    process = child([*command, str(left_alone)])
    process.join()
    assert process.exitcode == 0
    wanted = digest(left_alone)
    assert len(wanted) > 2
    return kill_at_random(lambda: child([*command, str(out)]), out, wanted, rounds, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["segment", "pretrain"])
def test_killed_two_hundred_times(commands, tmp_path, name):
    assert killed(commands[name], tmp_path, 200) > 5


def test_segment_killed_at_random_moments(commands, tmp_path):
    killed(commands["segment"], tmp_path, 3)
