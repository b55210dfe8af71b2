"""The µm per pixel of a slide: read wherever it stands, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from histossl.core.errors import SettingsError, SlideError
from histossl.wsi.slide import open_slide
from support.pictures import (
    APERIO,
    picture,
    write_tiff,
)


def _stated(tmp_path: Path, **options) -> Path:
    return write_tiff(tmp_path / "a.tif", picture(64, 96), **{"tile": (32, 32), "metadata": None, **options})


def _ome(x: object, y: object, unit: str) -> str:
    sizes = f'PhysicalSizeX="{x}" PhysicalSizeY="{y}" PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels DimensionOrder="XYCZT" ID="Pixels:0" Type="uint8" '
        f'SizeC="3" SizeT="1" SizeX="96" SizeY="64" SizeZ="1" {sizes}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>'
    )


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({}, 0.5),
        ({"resolution": (101600, 101600), "resolutionunit": "INCH"}, 0.25),
        ({"description": APERIO.format("MPP = 0.2520|")}, 0.252),  # goes before the tags
        ({"description": _ome(250, 250, "nm").encode()}, 0.25),
        ({"description": _ome(0.27, 0.27, "µm").encode()}, 0.27),
        ({"description": "ImageJ=1.53\nunit=micron\n", "resolution": (4, 4), "resolutionunit": "NONE"}, 0.25),
        ({"resolution": (20000, 19800)}, 0.5025),  # one per cent is no distortion
    ],
)
def test_mpp_is_read_wherever_it_stands(tmp_path, options, mpp):
    with open_slide(_stated(tmp_path, **options), mpp_default=7.0) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)
    with open_slide(tmp_path / "a.tif", mpp=0.4, mpp_default=7.0) as slide:
        assert slide.mpp == 0.4


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": (72, 72), "resolutionunit": "INCH"},
        {"resolution": (1, 1), "resolutionunit": "NONE"},
        {"resolution": (0, 0)},
        {"description": APERIO.format(""), "resolution": (72, 72), "resolutionunit": "INCH"},
    ],
)
def test_a_printers_resolution_is_no_mpp(tmp_path, options):
    path = _stated(tmp_path, **options)
    with pytest.raises(SlideError, match=r"a\.tif: carries no mpp.*slides\.csv.*--mpp-default"):
        open_slide(path)
    with open_slide(path, mpp_default=0.3) as slide:
        assert slide.mpp == 0.3


def test_plain_pictures_state_mpp_by_their_dpi(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(picture()).save(tmp_path / name, dpi=(50800, 50800))
        with open_slide(tmp_path / name) as slide:
            assert slide.mpp == pytest.approx(0.5, rel=1e-4)
        Image.fromarray(picture()).save(tmp_path / name, dpi=(96, 96))
        with pytest.raises(SlideError, match="no mpp"):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("value", ["0", "-0.25", "nan", "1000"])
def test_a_vendors_mpp_out_of_range_is_an_error(tmp_path, value):
    path = _stated(tmp_path, description=_ome(value, value, "µm").encode())
    with pytest.raises(SlideError, match=rf"{value}.*0\.05 to 10.*slides\.csv"):
        open_slide(path, mpp_default=0.5)
    with open_slide(path, mpp=0.25) as slide:
        assert slide.mpp == 0.25


def test_an_aperio_mpp_out_of_range_is_an_error(tmp_path):
    with pytest.raises(SlideError, match=r"(MPP|mpp).* says 1000"):
        open_slide(_stated(tmp_path, description=APERIO.format("MPP = 1000|")), mpp_default=0.5)


def test_a_vendors_mpp_out_of_range_is_an_error_where_the_tags_say_the_same(tmp_path):
    tags = {"resolution": (10, 10), "resolutionunit": "CENTIMETER"}
    for text in (APERIO.format("MPP = 1000|"), _ome("1000", "1000", "µm").encode()):
        with pytest.raises(SlideError, match="says 1000"):
            open_slide(_stated(tmp_path, description=text, **tags), mpp_default=0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 1000.0])
def test_a_given_mpp_out_of_range_is_an_error(tmp_path, value):
    path = _stated(tmp_path)
    with pytest.raises(SlideError, match=rf"{value:g}"):
        open_slide(path, mpp=value)
    with pytest.raises(SettingsError, match=rf"{value:g}"):
        open_slide(path, mpp_default=value)


def test_pixels_that_are_not_square_are_refused(tmp_path):
    with pytest.raises(SlideError, match="not square"):
        open_slide(_stated(tmp_path, resolution=(20000, 10000)))


def test_the_objective_is_told_and_not_used(tmp_path):
    path = _stated(tmp_path, description=APERIO.format(""), resolution=(1, 1), resolutionunit="NONE")
    with pytest.raises(SlideError, match=r"40x, suggests about 0\.25"):
        open_slide(path)
    with open_slide(path, mpp_default=1.0) as slide:
        assert (slide.objective, slide.mpp, slide.vendor) == (40, 1.0, "aperio")


# --- bad files ----------------------------------------------------------------------------------------------------
