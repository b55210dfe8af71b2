"""The wheel holds all that the program needs, and runs in an environment that has nothing else of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="no hatchling (pip install hatchling)")
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_it_holds_every_file_of_the_package_and_the_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "src" / "histossl"
    files = {f"histossl/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name and "/." not in name}
    assert files <= names
    assert {name for name in names if not name.startswith(("histossl/", "histossl-"))} == set()
    for name in ("LICENSE", "NOTICE"):
        assert any(other.endswith(f"licenses/{name}") for other in names)
    assert {f"histossl/nuclei/general/{name}" for name in ("model.safetensors", "config.json", "README.md")} <= names
    assert "histossl/view/static/openseadragon.LICENSE.txt" in names


def ran(wheel: Path, tmp_path: Path, code: str, *flags: str) -> str:
    """What Python code writes where the package is the wheel's, unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    begin = "import sys; sys.path.insert(0, sys.argv[1])\n"
    begin += "import histossl; assert histossl.__file__.startswith(sys.argv[1])\n"
    command = [sys.executable, *flags, "-c", begin + code, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_says_what_it_can_do_where_nothing_else_is_installed(wheel, tmp_path):
    code = "from histossl.cli.main import main; sys.exit(main(['--help']) + main(['--version']))"
    said = ran(wheel, tmp_path, code, "-S", "-I")
    assert "usage: histossl COMMAND" in said
    assert said.splitlines()[-1].startswith("histossl 0.")


def test_its_pages_find_their_files(wheel, tmp_path):
    code = (
        "from pathlib import Path; from histossl.study.folder import Study; from histossl.view.app import Viewer\n"
        "study = Study('study'); study.write_slides([{'slide_id': 'a', 'path': 'a'}])\n"
        "print(sorted(Viewer(study, Path('none')).files))\n"
        "from histossl.view.report.page import ReportInput, write_report; import pandas\n"
        "write_report(Path('r.html'), ReportInput('t', pandas.DataFrame({'slide_id': ['a']})))"
    )
    assert "'slide.html'" in ran(wheel, tmp_path, code)
    assert (tmp_path / "r.html").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_installed_into_a_bare_environment_it_goes_from_slides_to_vectors_and_nuclei(wheel, tmp_path):
    """With its dependencies from the index, and nothing that tests or extras bring."""
    place = tmp_path / "bare"
    venv.create(place, with_pip=True)
    pip = [place / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True)

    def histossl(*words: object) -> str:
        # Neither this checkout nor the environment of the tests is seen from there.
        command = [place / "bin" / "histossl", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
        assert done.returncode == 0, done.stderr
        return done.stdout

    installed = subprocess.run([place / "bin" / "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"pytest", "torchvision", "kornia", "timm", "pyarrow"} & set(installed.lower().split())
    assert histossl("--version").startswith("histossl 0.")
    assert "torch" in histossl("doctor")
    histossl("synth", "cohort", "--slides=4", "--width=320", "--height=256", "--seed=3")
    small = "--tile.px=64 --encode.views=2 --encode.tiles=16 --pretrain.epochs=2 --workers=1 --device=cpu"
    histossl("run", "cohort/slides", "--out", "study", *small.split())
    assert (tmp_path / "study" / "report.html").stat().st_size > 20_000
    assert (tmp_path / "study" / "embeddings.h5ad").exists()
    histossl("nuclei", "segment", "cohort/slides", "--out", "found", "--model=prior", "--workers=1")
    assert len(list((tmp_path / "found").glob("*.geojson"))) == 4
