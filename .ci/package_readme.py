"""The README as a package index shows it: what it links inside the repository is linked there by full address.

Relative links and pictures work in a checkout and on the forge, and nowhere else. hatchling runs this at each build.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](target) and ![text](target), with a target that is neither an address nor a place on the same page.
LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")


def with_addresses(text: str, repository: str, version: str) -> str:
    """The Markdown `text` with relative links replaced by addresses in the `repository` at the tag of `version`."""

    def address(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        return f"{picture}{words}({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return LINK.sub(address, text)


class Readme(MetadataHookInterface):
    """Gives the packages a README whose links are addresses."""

    def update(self, metadata: dict) -> None:
        """Set `readme` of the metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = with_addresses(text, metadata["urls"]["Repository"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
