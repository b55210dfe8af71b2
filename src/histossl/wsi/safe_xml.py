"""Reads XML from files of unknown origin; the parser refuses document types, so that no entity is expanded."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat


class XmlRefused(Exception):
    """A text is not XML, or declares a document type."""


@dataclass
class OmeImage:
    """An image as OME-XML describes it.

    Attributes:
        name: of the image.
        pixels: attributes of its Pixels element.
        ifds: ranges of the pages of the file that hold it, counted from 0, where stated.
    """

    name: str = ""
    pixels: dict[str, str] = field(default_factory=dict)
    ifds: list[range] = field(default_factory=list)


def elements(text: str) -> list[tuple[str, dict[str, str]]]:
    """List all elements of an XML text in order; character references are resolved.

    Args:
        text: the XML.

    Returns:
        (name without namespace, attributes) of each element.

    Raises:
        XmlRefused: the text is not well-formed, or declares a document type.
    """
    found: list[tuple[str, dict[str, str]]] = []
    parser = expat.ParserCreate("utf-8")

    def refuse(*_: object) -> None:
        raise XmlRefused("declares a document type")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda name, attributes: found.append((name.rpartition(":")[2], attributes))
    try:
        parser.Parse(text.strip("\0 \r\n\t").encode("utf-8", "replace"), True)
    except expat.ExpatError as error:
        raise XmlRefused(str(error)) from error
    return found


def ome_images(text: str) -> list[OmeImage]:
    """List the images of an OME-XML description.

    Args:
        text: the description of the first page.

    Returns:
        The images in order; none where the text is not OME-XML.
    """
    if "<" not in text or "OME" not in text:
        return []
    try:
        parsed = elements(text)
    except XmlRefused:
        return []
    images: list[OmeImage] = []
    for name, attributes in parsed:
        if name == "Image":
            images.append(OmeImage(attributes.get("Name", "")))
        elif name == "Pixels" and images:
            images[-1].pixels = attributes
        elif name == "TiffData" and images:
            first, count = _count(attributes.get("IFD", "0")), _count(attributes.get("PlaneCount", "1"))
            if first is not None:
                images[-1].ifds.append(range(first, first + (1 if count is None else count)))
    return images


def _count(text: str) -> int | None:
    """A number of at most nine digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
