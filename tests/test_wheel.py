"""The wheel holds all that the program needs, and runs in an environment that has nothing else of ours."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
    assert any(name.endswith("licenses/LICENSE") for name in names)
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
    code = "from histossl.cli import main; sys.exit(main(['--help']) + main(['--version']))"
    said = ran(wheel, tmp_path, code, "-S", "-I")
    assert "usage: histossl COMMAND" in said
    assert said.splitlines()[-1].startswith("histossl 0.")


def test_its_pages_find_their_files(wheel, tmp_path):
    code = (
        "from pathlib import Path; from histossl.study import Study; from histossl.view.app import Viewer\n"
        "study = Study('study'); study.write_slides([{'slide_id': 'a', 'path': 'a'}])\n"
        "print(sorted(Viewer(study, Path('none')).files))\n"
        "from histossl.report.page import ReportInput, write_report; import pandas\n"
        "write_report(Path('r.html'), ReportInput('t', pandas.DataFrame({'slide_id': ['a']})))"
    )
    assert "'slide.html'" in ran(wheel, tmp_path, code)
    assert (tmp_path / "r.html").stat().st_size > 5000
