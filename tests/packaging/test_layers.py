"""The drawing holds: imports go downwards only, and the ground is light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import histossl

ROOT = Path(histossl.__file__).parent
GROUND = ("geometry", "config", "errors")


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in it."""
    found = {}
    for path in ROOT.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("histossl"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("histossl")}
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        found[name] = names
    return found


def reach(module: str, room: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for name in imports()[module])


def test_nothing_imports_the_command_line():
    assert [m for m in imports() if reach(m, "histossl.cli.main")] == ["histossl.__main__"]


def test_the_two_pillars_never_import_each_other():
    for module in imports():
        if module.startswith("histossl.gigassl"):
            assert not reach(module, "histossl.nuclei"), module
        if module.startswith("histossl.nuclei"):
            assert not reach(module, "histossl.gigassl"), module


def test_lower_rooms_know_nothing_of_higher_ones():
    high = ("stages", "commands", "study", "ledger", "cohort", "status", "report", "view", "evaluate", "demo")
    low = ("slide", "readers", "tissue", "tiles", "read", "store", "train", "losses", "augment", "scale", "encode")
    for module in (f"histossl.{name}" for name in (*GROUND, *low)):
        for room in high:
            assert not reach(module, f"histossl.{room}"), (module, room)
    for name in GROUND:
        ours = {m.split(".")[1] for m in imports()[f"histossl.{name}"]}
        assert ours <= set(GROUND), name


def test_readers_in_worker_processes_load_no_torch():
    code = "import sys, histossl.wsi.tile_reader, histossl.study.survey; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
