"""Commands in any order, on a study that somebody disturbs between them: an exit code, never a traceback."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from histossl.cli.main import main
from histossl.wsi.synth import write_cohort

ONE = ["--workers=1", "--device=cpu"]
FAST = [
    "--tile.px=64",
    "--tile.mpp=1.0",
    "--encode.views=2",
    "--encode.tiles=8",
    "--pretrain.epochs=1",
    "--encoder=random",
]
PROBE = ["--probe.folds=2", "--probe.repeats=1", "--probe.bootstraps=100"]


def commands(cohort: Path, out: Path, rng: random.Random) -> dict[str, list[str]]:
    slides, labels, study = str(cohort / "slides"), ["--labels", str(cohort / "labels.csv")], str(out)
    px = rng.choice(["--tile.px=64", "--tile.px=64", "--tile.px=48"])
    return {
        "run": ["run", slides, "--out", study, *labels, *FAST, *PROBE, *ONE],
        "inspect": ["inspect", slides, "--out", study, px, "--tile.mpp=1.0", "--workers=1"],
        "encode": ["encode", study, "--encoder=random", *FAST[2:4], *ONE],
        "pretrain": ["pretrain", study, "--pretrain.epochs=1", f"--pretrain.seed={rng.randint(0, 1)}", "--device=cpu"],
        "embed": ["embed", study, "--device=cpu"],
        "probe": ["probe", study, *rng.choice([labels, ["--labels", str(cohort / "none.csv")]]), *PROBE],
        "report": ["report", study],
        "status": ["status", study],
        "audit": ["audit", study],
        "search": ["search", study, rng.choice(["slide-0", "no such slide"])],
        "heatmap": ["heatmap", study, *labels, *PROBE, "--device=cpu"],
        "predict": ["predict", study, slides, "--out", str(out.parent / "new"), *ONE],
        "export": ["export", study, str(out.parent / "model"), f"--what={rng.choice(['slide-encoder', 'probe'])}"],
        "sites": ["sites", study, *labels],
        "convert": ["features", "convert", str(out / "features"), "--out", str(out.parent / "converted"), "--to=clam"],
    }


def _cut(study: Path, rng: random.Random) -> None:
    files = sorted(path for path in study.rglob("*") if path.is_file())
    if files:
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(data[: rng.randint(0, len(data))])


def _remove(study: Path, rng: random.Random) -> None:
    found = sorted(study.rglob("*"))
    if found:
        path = rng.choice(found)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(study: Path, rng: random.Random) -> None:
    files = sorted(path for path in study.rglob("*") if path.is_file())
    if len(files) > 1:
        one, other = rng.sample(files, 2)
        shutil.copyfile(one, other)


def _folder_for_a_file(study: Path, rng: random.Random) -> None:
    files = sorted(path for path in study.rglob("*") if path.is_file())
    if files:
        path = rng.choice(files)
        path.unlink()
        path.mkdir()


DISTURBANCES: list[Callable[[Path, random.Random], None]] = [_cut, _remove, _replace, _folder_for_a_file]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, slides=4, width=256, height=224, seed=1)
    return folder


def any_order(cohort: Path, folder: Path, seed: int, moves: int) -> Counter[int]:
    """The exit codes of commands in a random order; after every second command something is disturbed."""
    rng, out, codes = random.Random(seed), folder / "study", Counter()
    done: list[str] = []
    for move in range(moves):
        name, command = rng.choice(list(commands(cohort, out, rng).items()))
        done.append(name)
        code = main(command)
        assert code in (0, 1, 2), done
        codes[code] += 1
        if move % 2 and out.is_dir():
            disturb = rng.choice(DISTURBANCES)
            done.append(disturb.__name__)
            disturb(out, rng)
    return codes


def test_a_few_commands_in_any_order(cohort, tmp_path):
    assert main(commands(cohort, tmp_path / "study", random.Random(0))["run"]) in (0, 2)  # too few slides for a probe
    assert any_order(cohort, tmp_path, seed=0, moves=8).total() == 8


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_commands_in_any_order(cohort, tmp_path, seed):
    if seed % 2:
        main(commands(cohort, tmp_path / "study", random.Random(seed))["run"])
    any_order(cohort, tmp_path, seed, moves=30)
