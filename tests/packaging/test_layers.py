"""Folders are layers: imports go down only, without a cycle; the lowest are light; files and functions are short."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import histossl

ROOT = Path(histossl.__file__).parent
PILLARS = ("gigassl", "nuclei")


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in it, those for types too."""
    paths = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "histossl":
                of = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in modules else str(node.module) for name in of}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "histossl"}
        found[module] = names - {module, "histossl"}
    return found


def packages() -> dict[str, set[str]]:
    """Folder -> the folders that its modules import."""
    found: dict[str, set[str]] = {path.name: set() for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    for module, names in imports().items():
        folder = module.split(".")[1] if "." in module else ""
        if folder in found:
            found[folder] |= {name.split(".")[1] for name in names} - {folder}
    return found


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(imports()).static_order())  # raises CycleError with the cycle


def test_folders_are_layers():
    order = list(TopologicalSorter(packages()).static_order())
    assert order[0] == "core"
    assert order[-1] == "cli"


def test_the_two_pillars_never_import_each_other():
    below = packages()
    for one, other in (PILLARS, PILLARS[::-1]):
        reached, todo = set(), [one]
        while todo:
            todo += below[name := todo.pop()] - reached
            reached.add(name)
        assert other not in reached


def test_few_rooms_and_short_files():
    rooms = [path for path in ROOT.iterdir() if path.is_file() or any(path.rglob("*.py"))]
    assert len(rooms) <= 14
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                about = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                assert node.end_lineno - node.lineno + 1 - about <= 45, (path, node.name)


def test_readers_in_worker_processes_load_no_torch():
    rooms = "histossl.wsi.tile_reader, histossl.study.survey, histossl.study.import_file"
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
