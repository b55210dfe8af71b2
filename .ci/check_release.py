"""Whether a tag may be released: `python .ci/check_release.py v1.2.3`; exits with 1 and says why where it may not.

The tag, the version of the package and the newest section of the changelog must be the same, the section must have a
date, and nothing may be left under "Unreleased".
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
RELEASE = re.compile(r"\[([^\]]+)\] - \d{4}-\d{2}-\d{2}")


def sections(changelog: str) -> list[tuple[str, str]]:
    """The `## ` sections of a changelog, newest first: heading and text."""
    _, *parts = HEADING.split(changelog)
    return [(heading.strip(), text.strip()) for heading, text in zip(parts[::2], parts[1::2], strict=True)]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What speaks against releasing the tree at `root` under the name `tag`; empty where nothing does."""
    found = []
    version = VERSION.search((root / "src" / "histossl" / "__init__.py").read_text(encoding="utf-8"))[1]
    if tag != f"v{version}":
        found.append(f"the tag {tag} is not v{version}, the version in src/histossl/__init__.py")
    history = sections((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    if history and history[0][0] == "[Unreleased]" and history.pop(0)[1]:
        found.append("CHANGELOG.md has entries under [Unreleased]: move them to a section of this version")
    newest = history[0][0] if history else ""
    release = RELEASE.fullmatch(newest)
    if release is None:
        found.append(f"CHANGELOG.md's newest section is '{newest}', not '[{version}] - YYYY-MM-DD'")
    elif release[1] != version:
        found.append(f"CHANGELOG.md's newest section is of {release[1]}, the package is {version}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_release.py TAG")
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
