"""constraints.txt: one version of everything that pyproject.toml asks for, on every system and Python."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
EXTRAS = re.search(r"^LOCKED := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
PYTHONS = [kind.rpartition(" ")[2] for kind in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", kind)]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_every_dependency_has_one_version_that_is_allowed(system, python):
    here = {"sys_platform": system, "python_version": python, "python_full_version": f"{python}.0"}
    here |= {
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    pinned: dict[str, list[str]] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(here):
            [only] = pin.specifier
            assert only.operator == "=="
            pinned.setdefault(pin.name.lower().replace("_", "-"), []).append(only.version)
    assert all(len(versions) == 1 for versions in pinned.values())
    extras = chain.from_iterable(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)
    for asked in map(Requirement, chain(PROJECT["dependencies"], extras)):
        [version] = pinned[asked.name.lower().replace("_", "-")]
        assert version in asked.specifier, asked


def test_no_pin_names_a_place():
    assert len(PINS) > 100
    assert not [pin for pin in PINS if pin.url or pin.extras]
