"""Which picture of a file is the slide, what its numbers mean, and which way up it is."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Region
from histossl.wsi.safe_xml import XmlRefused, elements, ome_images
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.values import depth_of, oriented

RGB = {"photometric": "rgb", "metadata": None, "resolutionunit": 3}


def picture(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = np.full((256, 256, 3), 245, np.uint8)
    found[32:224, 32:224] = (226, 150, 190)
    for y, x in rng.integers(32, 216, (80, 2)):
        found[y : y + 8, x : x + 8] = (95, 60, 140)
    return found


def tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    tile = picture(seed)
    return np.tile(tile, (-(-height // 256), -(-width // 256), 1))[:height, :width].copy()


FULL = tissue(768, 1024, 1)
FULL[300:330, 500:700] = (10, 90, 30)  # a place that only it has


def whole(slide: Slide) -> np.ndarray:
    return slide.read(Region.whole(slide.size), slide.mpp)


@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize("first", [True, False])
def test_a_preview_is_not_the_slide(tmp_path, tile, first):
    small = tissue(192, 256, 5)
    pages = [(small, 8.0), (FULL, 1.0)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for pixels, mpp in pages if first else pages[::-1]:
            tiff.write(pixels, resolution=(1e4 / mpp, 1e4 / mpp), tile=tile, **RGB)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.size.width, slide.size.height, slide.mpp) == (1024, 768, 1.0)
        assert np.array_equal(whole(slide), FULL)
        assert len(slide.levels) == 1  # the preview shows something else
        assert "of its 2 pictures the largest is read" in slide.notes[0]
    number = 1 if first else 2
    with open_slide(f"{tmp_path / 'a.tif'}#{number}") as slide:
        assert (slide.size.width, slide.mpp) == (256, 8.0)
        assert np.array_equal(whole(slide), small)


@pytest.mark.parametrize("order", [(4, 2, 1), (1, 2, 4), (2, 1, 4)])
def test_pages_of_a_pyramid_are_its_levels_in_any_order(tmp_path, order):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for down in order:
            tiff.write(FULL[::down, ::down], resolution=(1e4 / down,) * 2, tile=(128, 128), **RGB)
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.size.width, slide.size.height, slide.mpp) == (1024, 768, 1.0)
        assert np.array_equal(whole(slide), FULL)
        assert [round(level.downsample) for level in slide.levels] == [1, 2, 4]
        assert not slide.notes
        coarse = slide.read(Region.whole(slide.size), 4.0)
    assert np.abs(coarse.astype(int) - FULL[::4, ::4]).mean() < 1


def test_levels_in_subifds_of_a_plain_tiff_are_used(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(FULL, resolution=(1e4, 1e4), tile=(128, 128), subifds=2, **RGB)
        for down in (2, 4):
            tiff.write(FULL[::down, ::down], tile=(128, 128), subfiletype=1, photometric="rgb", metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert [round(level.downsample) for level in slide.levels] == [1, 2, 4]
        assert np.array_equal(whole(slide), FULL)


@pytest.mark.parametrize("first", ["macro", "slide"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_mpp_is_that_of_the_picture_that_is_read(tmp_path, first, stated):
    def about(name: str, mpp: float) -> dict:
        size = {f"PhysicalSize{axis}": mpp for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        return {"axes": "YXS", "Name": name} | (size if stated or name == "macro" else {})

    pages = {"macro": (tissue(300, 200), 8.0), "slide": (FULL, 0.25)}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for name in (first, *(set(pages) - {first})):
            pixels, mpp = pages[name]
            tiff.write(pixels, photometric="rgb", tile=(128, 128), metadata=about(name, mpp))
    if not stated:  # and never the macro's
        with pytest.raises(SlideError, match="carries no mpp"):
            open_slide(tmp_path / "a.ome.tif")
        return
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert (slide.size.width, slide.size.height, slide.mpp) == (1024, 768, 0.25)
        assert "'macro' of 200 x 300" in slide.notes[0]


def test_equal_pictures_are_refused_with_the_way_to_say_which(tmp_path):
    other = tissue(768, 1024, 3)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for pixels in (FULL, other):
            tiff.write(pixels, resolution=(1e4, 1e4), tile=(128, 128), **RGB)
    with pytest.raises(SlideError, match=r"a\.tif#1"):
        open_slide(tmp_path / "a.tif")
    with open_slide(f"{tmp_path / 'a.tif'}#2") as slide:
        assert np.array_equal(whole(slide), other)
    with pytest.raises(SlideError, match="no picture #3"):
        open_slide(f"{tmp_path / 'a.tif'}#3")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize("planes", [False, True])
def test_cameras_of_any_depth_show_the_same_picture(tmp_path, bits, tile, planes):
    top = 2**bits - 1
    deep = np.rint(FULL / 255 * top).astype(np.uint16)
    pixels = np.moveaxis(deep, -1, 0).copy() if planes else deep
    planar = {"planarconfig": "separate"} if planes else {}
    tifffile.imwrite(tmp_path / "a.tif", pixels, resolution=(1e4, 1e4), tile=tile, **RGB, **planar)
    with open_slide(tmp_path / "a.tif") as slide:
        assert np.abs(whole(slide).astype(int) - FULL).max() <= 1
        assert ("read as" in " ".join(slide.notes)) == (bits != 16)


def test_a_tag_says_how_deep_a_dark_picture_is(tmp_path):
    dark = np.rint(FULL / 255 * 1000).astype(np.uint16)
    tag = (281, "H", 3, (4095,) * 3, True)
    tifffile.imwrite(tmp_path / "a.tif", dark, resolution=(1e4, 1e4), extratags=[tag], **RGB)
    with open_slide(tmp_path / "a.tif") as slide:
        assert abs(int(whole(slide).max()) - 245 / 255 * 1000 / 4095 * 255) <= 1
        assert "its tags say so" in slide.notes[0]


@pytest.mark.parametrize("ending", ["png", "jp2"])
def test_pictures_of_twelve_bits_in_sixteen(tmp_path, ending):
    deep = np.rint(FULL / 255 * 4095).astype(np.uint16)
    encode = imagecodecs.png_encode if ending == "png" else lambda a: imagecodecs.jpeg2k_encode(a, level=0)
    (tmp_path / f"a.{ending}").write_bytes(encode(deep))
    with open_slide(tmp_path / f"a.{ending}", mpp=1.0) as slide:
        assert np.abs(whole(slide).astype(int) - FULL).max() <= 1


DEPTHS = [(4000, None, 12), (200, None, 8), (300, None, 10), (5000, 4095, 14), (900, 4095, 12), (60000, None, 16)]


@pytest.mark.parametrize(("highest", "stated", "bits"), [*DEPTHS, (900, 65535, 10)])
def test_the_depth_is_what_the_file_states_unless_its_values_exceed_it(highest, stated, bits):
    assert depth_of(highest, stated) == bits


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "tif", "tiled"])
def test_an_orientation_tag_is_obeyed_and_said(tmp_path, orientation, kind):
    path = Path(tmp_path / ("a.jpg" if kind == "jpg" else "a.tif"))
    if kind == "jpg":
        about = Image.Exif()
        about[274] = orientation
        Image.fromarray(FULL).save(path, exif=about, dpi=(25400, 25400), quality=100)
    else:
        tile = (128, 128) if kind == "tiled" else None
        tags = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(path, FULL, resolution=(1e4, 1e4), tile=tile, extratags=tags, **RGB)
    truth = np.asarray(Image.fromarray(FULL).transpose(WAYS[orientation]) if orientation > 1 else FULL)
    assert np.array_equal(oriented(FULL, orientation), truth)
    with open_slide(path) as slide:
        assert slide.size.shape == truth.shape[:2]
        assert np.abs(whole(slide).astype(int) - truth).mean() < 2
        assert any("orientation tag" in note for note in slide.notes) == (orientation != 1)


WAYS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


OME = (
    "<?xml version='1.0' encoding='UTF-8'?><OME xmlns='http://www.openmicroscopy.org/Schemas/OME/2016-06'>"
    "<Image ID='Image:0'><Pixels ID='Pixels:0' DimensionOrder='XYCZT' Type='uint8' SizeX='1024' SizeY='768' SizeC='3' "
    "SizeZ='1' SizeT='1' {}><Channel ID='Channel:0:0' SamplesPerPixel='3'/><TiffData IFD='0' PlaneCount='1'/></Pixels>"
    "</Image></OME>"
)


@pytest.mark.parametrize("unit", ["µm", "&#181;m", "&#xB5;m", "Âµm", "um", "micron", "micrometer", "Micrometre", "μm"])
def test_a_micrometre_is_one_however_it_is_written(tmp_path, unit):
    size = " ".join(f"PhysicalSize{axis}='0.5' PhysicalSize{axis}Unit='{unit}'" for axis in "XY")
    text = OME.format(size).encode()
    tifffile.imwrite(tmp_path / "a.ome.tif", FULL, photometric="rgb", tile=(128, 128), metadata=None, description=text)
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_pictures_without_colours_are_refused_or_said(tmp_path, ending):
    colours = Image.fromarray(picture())
    colours.convert("1").save(tmp_path / f"bits.{ending}")
    with pytest.raises(SlideError, match="holds black and white alone, not colours; save it as RGB"):
        open_slide(tmp_path / f"bits.{ending}", 1.0)
    for mode, notes in (("L", ("it holds no colours: stains cannot be told apart in it",)), ("RGB", ())):
        colours.convert(mode).save(tmp_path / f"{mode}.{ending}")
        with open_slide(tmp_path / f"{mode}.{ending}", 1.0) as slide:
            assert slide.notes == notes


def test_no_entity_is_expanded():
    bomb = '<!DOCTYPE OME [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><OME><Image Name="&b;"/></OME>'
    with pytest.raises(XmlRefused, match="document type"):
        elements(bomb)
    assert ome_images(bomb) == []
    assert ome_images("<OME><Image") == []


def test_four_grey_channels_are_no_picture_and_three_are_said(tmp_path):
    channels = np.random.default_rng(0).integers(0, 4000, (4, 64, 64)).astype(np.uint16)
    for count in (3, 4):
        about = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
        tifffile.imwrite(tmp_path / f"{count}.ome.tif", channels[:count], **about)
    with pytest.raises(SlideError, match="stack of 4 pages"):
        open_slide(tmp_path / "4.ome.tif", mpp=1.0)
    with open_slide(tmp_path / "3.ome.tif", mpp=1.0) as slide:
        assert "3 channels are read as red, green and blue" in slide.notes[0]
