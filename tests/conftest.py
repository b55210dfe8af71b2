"""Fixtures shared by all tests: where the real data lies, if it does; which test files a system cannot run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

# Tests run in a process a core: more threads in each would only wait for one another. Before torch and numpy start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What exists on POSIX systems only. Tests that kill, fork or bound processes use it on purpose.
POSIX_ONLY = re.compile(
    r"\bos\.(fork|geteuid|killpg|mkfifo)\b|\bsignal\.SIGKILL\b|(?m:^import (fcntl|resource)$)|support.killing"
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real slides and labels; see `real_data`."""
    return real_data(os.environ)


def real_data(environment: Mapping[str, str]) -> Path:
    """HISTOSSL_DATA, by default ../shared/data beside the project.

    A test that asks for it skips where there is none. With HISTOSSL_REQUIRE_DATA=1, as .ci/run sets it, it fails.
    """
    path = Path(environment.get("HISTOSSL_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        reason = f"no real data at {path} (set HISTOSSL_DATA to a folder of it)"
        if environment.get("HISTOSSL_REQUIRE_DATA") == "1":
            pytest.fail(f"{reason}; HISTOSSL_REQUIRE_DATA=1 insists on it")
        pytest.skip(reason)
    return path


def needs_posix(path: Path) -> bool:
    """Whether a test file cannot be collected, or would fail, on Windows."""
    return POSIX_ONLY.search(path.read_text(encoding="utf-8")) is not None


def posix_files() -> list[Path]:
    return [path for path in sorted(Path(__file__).parent.rglob("test_*.py")) if needs_posix(path)]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if sys.platform == "win32" and collection_path.is_file() and collection_path.suffix == ".py":
        return needs_posix(collection_path) or None
    return None


def pytest_report_header() -> str | None:
    if sys.platform == "win32":
        return "left out, as they need a POSIX system: " + ", ".join(path.name for path in posix_files())
    return None
