"""Pins every dependency of pyproject.toml to the lowest version that it allows: constraints for pip, a line each.

Torch stays at the version of constraints.txt: its older CPU builds lie on no index that pip asks by itself, and what
pip would fetch instead is gigabytes of CUDA.
"""

from __future__ import annotations

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

for asked in (*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())):
    name, _, version = re.match(r"([\w-]+)(\[\w+\])?>=([\w.]+)", asked).groups()
    if name == "torch":
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        version = re.search(r"^torch==(\S+)$", pinned, re.MULTILINE)[1]
    sys.stdout.write(f"{name}=={version}\n")
