"""Fixtures shared by all tests: where the real data lies, if it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real slides and labels: HISTOSSL_DATA, by default ../shared/data beside the project."""
    path = Path(os.environ.get("HISTOSSL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        reason = f"no real data at {path} (set HISTOSSL_DATA)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
