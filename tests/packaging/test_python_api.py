"""`import histossl as hs`: quick, complete, documented, and the same for type checkers."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import histossl as hs

SOURCE = Path(hs.__file__)


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    told = f"{code}\nimport sys; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_nothing_else():
    before, after = loaded(""), loaded("import histossl as hs; dir(hs); hs.__all__; hs.__version__")
    ours = {name for name in after if name.startswith("histossl")}
    assert ours == {"histossl"}
    assert not {"numpy", "torch", "pandas", "matplotlib"} & after
    assert len(after - before) < 40  # typing and importlib, which take a millisecond


def test_slides_and_tiles_load_no_torch():
    names = loaded("import histossl as hs; hs.open_slide, hs.find_tissue, hs.tile_grid, hs.TileSpec, hs.picture_slide")
    assert not {"torch", "matplotlib", "sklearn", "anndata"} & names


@pytest.mark.parametrize("name", hs.__all__)
def test_every_name_is_there_and_explained(name):
    found = getattr(hs, name)
    assert name in dir(hs)
    about = inspect.getdoc(found) or ""
    assert about.partition("\n")[0].strip()
    if inspect.isclass(found):
        assert "Args:" in about or "Attributes:" in about
        return
    wanted = [p for p in inspect.signature(found).parameters if p != "self"]
    arguments = re.split(r"\n(?:Returns|Raises):", about.partition("Args:")[2])[0]
    missing = [parameter for parameter in wanted if not re.search(rf"(^|[\s*]){parameter}[,:]", arguments)]
    assert not missing
    assert "Returns:" in about or inspect.signature(found).return_annotation == "None"


def test_type_checkers_see_the_same_names():
    block = next(node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("histossl.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # which exports it
    }
    assert seen == hs._MODULES


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'open_slides'"):
        _ = hs.open_slides


def test_the_page_of_the_documentation_names_each():
    page = (SOURCE.parents[2] / "docs" / "api" / "python.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(?:hs\.)(\w+)` \|", page, re.MULTILINE)
    assert sorted(told) == sorted(hs.__all__)
