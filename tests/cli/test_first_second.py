"""What a command was given is looked at in its first second: before torch and scikit-learn, which take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from histossl.cli.commands import COMMANDS
from histossl.cli.config_command import config, settings_of
from histossl.cli.main import main, parse
from histossl.cli.study_commands import run
from histossl.core.errors import SettingsError

HEAVY = ("torch", "sklearn", "numba", "skimage", "matplotlib", "anndata")
WRONG = {
    "run nowhere --out o": "there is no folder",
    "run slides --out o --labels nosuch.csv": "nosuch.csv",
    "run slides --out o --labels labels.csv --probe.targets grade": "no target 'grade'",
    "run slides --out o --encoder UNI": "did you mean timm:hf-hub:MahmoodLab/UNI",
    "run slides --out o --encoder torchscript:nosuch.pt": "no such file",
    "run slides --out o --encoder weights.pth": "is a pickle",
    "run slides --out o --device gpu": "unknown device",
    "run slides --out o --areas nosuch": "no folder of areas",
    "run slides --out o --tile.px many": "--tile.px is 'many'; it must be a whole number",
    "run slides --out o --pretrain.start nosuch.safetensors": "no file nosuch.safetensors",
    "run slides --out o --probe.shots a": "it must be a whole number, or several with commas between them",
    "run slides more --out o": "one argument too many",
    "run slides": "missing: --out",
    "encode study --encoder UNI": "no tile encoder at UNI",
    "pretrain study --device gpu": "unknown device",
    "probe study --labels nosuch.csv": "nosuch.csv",
    "probe v.csv --labels labels.csv --out o --splits nosuch": "there is no nosuch",
    "probe v.csv --labels labels.csv --out o --against nosuch": "there is no nosuch",
    "sites v.csv --labels nosuch.csv": "nosuch.csv",
    "search v.csv a --labels nosuch.csv": "nosuch.csv",
    "heatmap study --labels nosuch.csv": "nosuch.csv",
    "audit nosuch.csv labels.csv --vectors nowhere": "there is no nowhere",
    "predict study nowhere --out o": "there is no nowhere",
    "encoder pretrain nowhere --out o": "there is no folder",
    "nuclei segment nowhere --out o": "there is no nowhere",
    "nuclei segment slides --out o --model nosuch": "there is no model nosuch",
    "nuclei segment slides --out o --device gpu": "unknown device",
    "nuclei train nowhere --out o": "there is no nowhere",
}
LOOKS = """
import contextlib, io, json, sys
from histossl.cli.main import main
for line in sys.stdin.read().splitlines():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        from histossl.core import console
        console.console.file = said
        code = main(line.split())
    print(json.dumps([line, code, " ".join(said.getvalue().split()), [m for m in %r if m in sys.modules]]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """Command -> exit code, what it said, and the heavy modules that it had imported by then; in one process."""
    import json

    folder = tmp_path_factory.mktemp("first")
    (folder / "slides").mkdir()
    (folder / "slides" / "a.png").write_bytes(b"")
    (folder / "labels.csv").write_text("slide_id,patient_id,label\na,p,x\n")
    (folder / "v.csv").write_text("slide_id,v0\na,1\n")
    (folder / "weights.pth").write_bytes(b"x")
    (folder / "study").mkdir()
    (folder / "study" / "slides.csv").write_text("slide_id,path,patient_id,mpp,width,height,tiles,status,error\n")
    found = subprocess.run(
        [sys.executable, "-c", LOOKS % (HEAVY,)], input="\n".join(WRONG), cwd=folder, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return {line: more for line, *more in map(json.loads, found.stdout.splitlines())}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_is_told_before_anything_heavy_is_imported(answers, line):
    code, said, heavy = answers[line]
    assert code == 2
    assert WRONG[line] in said
    assert not heavy
    assert "<class" not in said


def test_config_writes_yaml_that_changes_nothing_and_explains_each_setting(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    assert main(["config", "run", "--dump", str(file)]) == 0
    plain = ["S", "--out=o"]
    assert parse("run", run, [*plain, f"--config={file}"]) == parse("run", run, plain)
    lines = file.read_text(encoding="utf-8").splitlines()
    for line, above in zip(lines[1:], lines, strict=False):
        assert line.endswith(":") or line.lstrip().startswith("#") or above.lstrip().startswith("# "), line
    with pytest.raises(SettingsError, match="stands already"):
        config("run", file)
    with pytest.raises(SettingsError, match="no command"):
        config("rum")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_settings(name):
    text = "\n".join(settings_of(name))
    assert len(text) == 0 or isinstance(yaml.safe_load(text), dict)


def test_a_changed_setting_of_a_file_counts(tmp_path: Path):
    file = tmp_path / "run.yaml"
    config("run", file)
    file.write_text(file.read_text(encoding="utf-8").replace("px: 224", "px: 112"), encoding="utf-8")
    assert parse("run", run, ["S", "--out=o", f"--config={file}"])["tile"].px == 112
