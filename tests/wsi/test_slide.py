"""Slides: what is read is what stands there, to the fraction of a pixel, in bounded memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histossl.core.errors import SlideError
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import open_slide
from histossl.wsi.tiff_tiles import TiffTiles
from support.pictures import (
    HEIGHT,
    WIDTH,
    picture,
    ramp,
    write_ome_pyramid,
    write_pyramid,
    write_tiff,
)

REAL = {
    "CMU-1-Small-Region.svs": 0.499,
    "TCGA-CR-7395-01A-01-TS1.svs": None,
    "CPTAC-C3L-00601-26.tiff": None,
    "monusac-A9K0_1.svs": 0.19448,
    "monusac-A9K0_2.svs": 0.19448,
    "monusac-A9K0_3.svs": 0.19448,
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_slide_shows_what_openslide_shows(data_dir, name):
    path = data_dir / "slides" / name
    with open_slide(path, mpp_default=1.0) as slide, openslide.OpenSlide(path) as other:
        assert slide.mpp == pytest.approx(REAL[name] or 1.0)
        assert (slide.size.width, slide.size.height) == other.dimensions
        assert len(slide.levels) == other.level_count
        expected = np.asarray(other.read_region((137, 21), 0, (211, 133)).convert("RGB"))
        np.testing.assert_array_equal(slide.read(Region(137, 21, 211, 133), slide.mpp), expected)
        thumb = slide.thumbnail(180)
        assert max(thumb.shape[:2]) == 180
        last = other.read_region((0, 0), other.level_count - 1, other.level_dimensions[-1]).convert("RGB")
        expected = last.resize((thumb.shape[1], thumb.shape[0]), Image.Resampling.BOX)
        assert np.abs(thumb.astype(int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("name", REAL)
def test_tiles_read_by_themselves_are_openslides_to_the_byte(data_dir, name, monkeypatch):
    path = data_dir / "slides" / name
    with open_slide(path, mpp=0.5) as slide, openslide.OpenSlide(path) as other:
        width, height = other.dimensions
        slide.read(Region(0, 0, 9, 9), 0.5)
        monkeypatch.setattr(slide._reader, "_composed", None)  # from here on by themselves or not at all
        for x, y, w, h in [(0, 0, width // 2, 150), (width - 300, height - 160, 300, 160), (101, 55, 190, 77)]:
            expected = np.asarray(other.read_region((x, y), 0, (w, h)).convert("RGB"))
            np.testing.assert_array_equal(slide.read(Region(x, y, w, h), 0.5), expected)


def test_where_tiles_by_themselves_show_other_colours_openslide_is_believed(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(128, 128), compression="jpeg")
    monkeypatch.setattr(TiffTiles, "_decode", lambda *_: np.zeros((128, 128, 3), np.uint8))
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        expected = np.asarray(other.read_region((31, 17), 0, (200, 150)).convert("RGB"))
        np.testing.assert_array_equal(slide.read(Region(31, 17, 200, 150), 0.5), expected)


def test_an_absent_tile_is_what_openslide_makes_of_it(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(128, 128), compression="jpeg")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts = tiff.pages.first.databytecounts
        tiff.pages.first.tags["TileByteCounts"].overwrite((*counts[:1], 0, *counts[2:]))
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        try:
            shown = other.read_region((0, 0), 0, (300, 200))
        except openslide.OpenSlideError:  # before 4.0.1
            with pytest.raises(SlideError, match="cannot be read"):
                slide.read(Region(0, 0, 300, 200), 0.5)
            return
        assert shown.getchannel("A").getextrema() == (0, 255)
        white = Image.new("RGBA", shown.size, "white")
        expected = np.asarray(Image.alpha_composite(white, shown).convert("RGB"))
        np.testing.assert_array_equal(slide.read(Region(0, 0, 300, 200), 0.5), expected)
        assert (slide.read(Region(130, 2, 100, 100), 0.5) == 255).all()
        np.testing.assert_array_equal(slide.read(Region(2, 2, 100, 100), 0.5), expected[2:102, 2:102])


@pytest.mark.parametrize("name", [name for name, mpp in REAL.items() if mpp is None])
def test_a_real_slide_without_mpp_is_refused_with_the_way_out(data_dir, name):
    with pytest.raises(SlideError, match=r"no mpp.*slides\.csv.*--mpp-default"):
        open_slide(data_dir / "slides" / name)


def test_parts_of_a_real_pyramid_are_parts_of_its_picture(data_dir):
    with open_slide(data_dir / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", mpp=0.5) as slide:
        step = 2.6  # from the second level, whose downsample is no whole number
        big = slide.read(Region(1500.3, 900.7, 200 * step, 150 * step), 0.5 * step).astype(int)
        part = slide.read(Region(1500.3 + 37 * step, 900.7 + 21 * step, 120 * step, 90 * step), 0.5 * step)
        assert np.abs(big[21:111, 37:157] - part).mean() < 1.5
        assert big.std() > 10


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """One plane in every kind of file, pyramids with levels 1, 2, 4."""
    folder = tmp_path_factory.mktemp("kinds")
    levels = [ramp(HEIGHT, WIDTH, down) for down in (1, 2, 4)]
    Image.fromarray(levels[0]).save(folder / "plain.png")
    return {
        "openslide": write_pyramid(folder / "pyramid.tif", levels),
        "tiffslide": write_ome_pyramid(folder / "pyramid.ome.tif", levels),
        "plain": folder / "plain.png",
    }


@pytest.mark.parametrize("kind", ["openslide", "tiffslide", "plain"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.floats(30, 90), y=st.floats(30, 70), step=st.floats(1.0, 6.5), columns=st.integers(1, 40))
def test_reading_is_true_to_the_fraction_of_a_pixel(kinds, kind, x, y, step, columns):
    """A filter that neither shifts nor scales leaves a plane as it is: the value at a centre is the plane's there."""
    rows = max(1, columns - 5)
    with open_slide(kinds[kind], mpp=0.5) as slide:
        assert len(slide.levels) == (1 if kind == "plain" else 3)
        read = slide.read(Region(x, y, columns * step, rows * step), 0.5 * step)
    assert read.shape == (rows, columns, 3)
    centre_y, centre_x = np.mgrid[:rows, :columns] + 0.5
    centre_x, centre_y = x + centre_x * step, y + centre_y * step
    plane = np.stack([centre_x / 4, centre_y / 5, (centre_x + centre_y) / 8], 2)
    # Each level is rounded to whole values, and so is the picture.
    np.testing.assert_allclose(read, plane, atol=1.01)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), step=st.floats(0.4, 9), x=st.floats(-90, 200), y=st.floats(-90, 150))
def test_parts_are_parts_of_the_whole_wherever_they_are_cut(kinds, data, step, x, y):
    rows, columns = 41, 57
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, columns))
    with open_slide(kinds["openslide"]) as slide:
        big = slide.read(Region(x, y, columns * step, rows * step), 0.5 * step)
        region = Region(x + left * step, y + top * step, (right - left) * step, (bottom - top) * step)
        part = slide.read(region, 0.5 * step)
    np.testing.assert_allclose(part, big[top:bottom, left:right].astype(float), atol=1)


def test_large_reads_go_block_by_block_without_seams(kinds, monkeypatch):
    with open_slide(kinds["openslide"]) as slide:
        at_once = slide.read(Region(-20, -10, 500, 400), 0.5 * 1.37)
        monkeypatch.setattr("histossl.wsi.slide._BLOCK", 50)
        in_blocks = slide.read(Region(-20, -10, 500, 400), 0.5 * 1.37)
    np.testing.assert_allclose(in_blocks, at_once.astype(float), atol=1)


def test_at_its_own_mpp_a_slide_shows_its_own_pixels(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(128, 128))
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(Region(31, 17, 200, 150), 0.5), picture()[17:167, 31:231])


def test_outside_of_the_slide_is_white_and_the_edge_is_not_paler(tmp_path):
    path = tmp_path / "dark.png"
    Image.new("RGB", (70, 50), (90, 40, 110)).save(path)
    with open_slide(path, mpp=1.0) as slide:
        read = slide.read(Region(-20, -10, 120, 80), 2.0)
        inside = np.zeros((40, 60), bool)
        inside[5:30, 10:45] = True
        assert (read[~inside] == 255).all()
        assert (read[inside] == (90, 40, 110)).all()
        assert (slide.read(Region(500, 0, 30, 20), 1.0) == 255).all()
        assert (slide.read(Region(-60, -60, 30, 20), 0.3) == 255).all()


def test_reduction_does_not_alias(tmp_path):
    board = (np.indices((HEIGHT, WIDTH)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(np.stack([board] * 3, 2)).save(tmp_path / "board.png")
    with open_slide(tmp_path / "board.png", mpp=0.5) as slide:
        grey = slide.read(Region(0, 0, 400, 280), 0.5 * 4)
    assert np.abs(grey.astype(int) - 128).max() <= 3


@pytest.mark.parametrize(("step", "level"), [(1, 0), (1.9, 0), (2, 1), (3.9, 1), (4, 2), (30, 2), (0.5, 0)])
def test_the_nearest_finer_level_is_read(tmp_path, step, level):
    values = (10, 100, 200)
    levels = [np.full((256 // d, 512 // d, 3), v, np.uint8) for d, v in zip((1, 2, 4), values, strict=True)]
    with open_slide(write_pyramid(tmp_path / "levels.tif", levels)) as slide:
        assert [round(level.downsample, 6) for level in slide.levels] == [1, 2, 4]
        assert slide.levels[1].size == Size(256, 128)
        read = slide.read(Region(0, 0, 500, 200), 0.5 * step)
    assert (read == values[level]).all()


def test_a_thumbnail_never_enlarges(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture())
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.thumbnail(5000), picture())
        assert slide.thumbnail(70).shape == (50, 70, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="no ru_maxrss on Windows")
def test_memory_does_not_grow_with_the_slide(tmp_path):
    """A one-level slide is the worst case: all of its pixels pass through memory for a thumbnail."""
    tile = tifffile.TiffWriter(tmp_path / "tile.tif")
    tile.write(picture(256, 256), tile=(256, 256), compression="jpeg", photometric="rgb")
    tile.close()
    with tifffile.TiffFile(tmp_path / "tile.tif") as tiff:
        page = tiff.pages.first
        encoded = next(iter(tiff.filehandle.read_segments(page.dataoffsets, page.databytecounts)))[0]
    peaks = []
    for tiles in (9, 28):
        path = tmp_path / f"{tiles}.tif"
        shape = (tiles * 256, tiles * 256 + 256, 3)
        data = itertools.repeat(encoded, tiles * (tiles + 1))
        tifffile.imwrite(
            path, data, shape=shape, dtype=np.uint8, tile=(256, 256), compression="jpeg", photometric="rgb"
        )
        code = (
            "import sys, resource; from histossl.wsi.slide import open_slide\n"
            "s = open_slide(sys.argv[1], mpp=0.5); t = s.thumbnail(1000); assert t.shape[1] == 1000 and t.std() > 5\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, str(path)])))
    assert peaks[1] < 1.1 * peaks[0]


def test_slides_are_read_without_torch():
    code = "import sys, histossl.wsi.tiles; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- kinds of files -----------------------------------------------------------------------------------------------
