"""Slides: every file kind gives the same pixels, at its true mpp, or a one-line reason why not."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histossl.errors import SettingsError, SlideError
from histossl.geometry import Region, Size
from histossl.slide import find_slides, open_slide

HEIGHT, WIDTH = 300, 420
CENTIMETRE = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}  # 0.5 µm
APERIO = "Aperio Image Library v12\r\n900x700 [0,0 900x700] (128x128) JPEG/RGB Q=70|AppMag = 40|{}Filename = 7"


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = 128 + 90 * np.sin(x / 9.0), 128 + 90 * np.cos(y / 7.0), 128 + 60 * np.sin((x + 2 * y) / 30)
    return np.stack(waves, 2).astype(np.uint8)


def ramp(height: int, width: int, down: int = 1) -> np.ndarray:
    """Values that a level with this downsample shows of a plane x/4 + y/5, at pixel centres."""
    y, x = (np.mgrid[: height // down, : width // down] + 0.5) * down
    return np.rint(np.stack([x / 4, y / 5, (x + y) / 8], 2)).astype(np.uint8)


def write_tiff(path: Path, image: np.ndarray, **options) -> Path:
    tifffile.imwrite(path, image, **{"photometric": "rgb", **CENTIMETRE, **options})
    return path


def write_pyramid(path: Path, levels: list[np.ndarray]) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for k, level in enumerate(levels):
            tiff.write(level, tile=(64, 64), photometric="rgb", subfiletype=int(k > 0), **CENTIMETRE)
    return path


def write_ome_pyramid(path: Path, levels: list[np.ndarray]) -> Path:
    sizes = {"PhysicalSizeX": 500, "PhysicalSizeY": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(
            levels[0], tile=(64, 64), photometric="rgb", subifds=len(levels) - 1, metadata={"axes": "YXS", **sizes}
        )
        for level in levels[1:]:
            tiff.write(level, tile=(64, 64), photometric="rgb", subfiletype=1)
    return path


def whole(path: Path, **mpp: float) -> np.ndarray:
    with open_slide(path, **mpp) as slide:
        return slide.read(Region.whole(slide.size), slide.mpp)


# --- the six real slides ------------------------------------------------------------------------------------------

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
    import openslide

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
        monkeypatch.setattr("histossl.slide._BLOCK", 50)
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
            "import sys, resource; from histossl.slide import open_slide\n"
            "s = open_slide(sys.argv[1], mpp=0.5); t = s.thumbnail(1000); assert t.shape[1] == 1000 and t.std() > 5\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, str(path)])))
    assert peaks[1] < 1.1 * peaks[0]


def test_slides_are_read_without_torch():
    code = "import sys, histossl.tiles; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- kinds of files -----------------------------------------------------------------------------------------------


def _alpha(image: np.ndarray) -> np.ndarray:
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[:, :100] = 0
    return np.dstack([image, alpha])


FILES = {
    "strips.tif": lambda p, i: write_tiff(p, i, rowsperstrip=16),
    "tiles.tif": lambda p, i: write_tiff(p, i, tile=(64, 128)),
    "zstd tiles.tif": lambda p, i: write_tiff(p, i, tile=(64, 128), compression="zstd"),
    "lzw.tif": lambda p, i: write_tiff(p, i, compression="lzw", predictor=True),
    "big.tif": lambda p, i: write_tiff(p, i, bigtiff=True),
    "motorola.tif": lambda p, i: write_tiff(p, i, byteorder=">"),
    "16 bit strips.tif": lambda p, i: write_tiff(p, i.astype(np.uint16) * 257, rowsperstrip=16),
    "16 bit tiles.tif": lambda p, i: write_tiff(p, i.astype(np.uint16) * 257, tile=(64, 128)),
    "planes.tif": lambda p, i: write_tiff(p, np.moveaxis(i, 2, 0), planarconfig="separate"),
    "planes.ome.tif": lambda p, i: write_tiff(
        p, np.moveaxis(i, 2, 0), photometric="minisblack", tile=(64, 128), metadata={"axes": "CYX"}
    ),
    "imagej.tif": lambda p, i: tifffile.imwrite(p, i, imagej=True, resolution=(2, 2), metadata={"unit": "um"}),
    "a.png": lambda p, i: Image.fromarray(i).save(p, dpi=(50800, 50800)),
    "opaque.png": lambda p, i: Image.fromarray(np.dstack([i, np.full_like(i[..., 0], 255)])).save(p),
    "名前 'with' \"quotes\".png": lambda p, i: Image.fromarray(i).save(p),
    "-dash.TIF": lambda p, i: write_tiff(p, i),
}


@pytest.mark.parametrize("name", FILES)
def test_all_kinds_of_files_give_the_same_pixels(tmp_path, name):
    FILES[name](tmp_path / name, picture())
    with open_slide(tmp_path / name, mpp_default=0.5) as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        assert slide.size == Size(WIDTH, HEIGHT)
        np.testing.assert_array_equal(slide.read(Region.whole(slide.size), slide.mpp), picture())


@pytest.mark.parametrize("options", [{}, {"tile": (64, 128)}])
def test_transparency_is_white(tmp_path, options):
    path = write_tiff(tmp_path / "a.tif", _alpha(picture()), extrasamples=["unassalpha"], **options)
    Image.fromarray(_alpha(picture())).save(tmp_path / "a.png")
    for file in (path, tmp_path / "a.png"):
        pixels = whole(file, mpp=0.5)
        assert (pixels[:, :100] == 255).all()
        np.testing.assert_array_equal(pixels[:, 100:], picture()[:, 100:])


@pytest.mark.parametrize("options", [{}, {"tile": (64, 128)}])
def test_grey_is_grey(tmp_path, options):
    grey = picture()[..., 0]
    path = write_tiff(tmp_path / "a.tif", grey, photometric="minisblack", **options)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    negative = write_tiff(tmp_path / "b.tif", 255 - grey, photometric="miniswhite")
    for file in (path, tmp_path / "sixteen.png", negative):
        np.testing.assert_array_equal(whole(file, mpp=0.5), np.stack([grey] * 3, 2))


def test_lossy_pictures_are_near_the_truth(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg", quality=95, dpi=(50800, 50800))
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(picture()).convert("YCbCr").save(tmp_path / "ycc.tif")
    write_tiff(tmp_path / "jpeg.tif", picture(), compression="jpeg", tile=(64, 64))
    for name in ("a.jpg", "cmyk.tif", "ycc.tif", "jpeg.tif"):
        assert np.abs(whole(tmp_path / name, mpp=0.5).astype(int) - picture()).mean() < 3, name


# --- mpp ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.svs", b"hello, I am no slide", "no slide or picture"),
        ("page.tiff", b"<html>404</html>" * 50, "no slide or picture"),
        ("empty.svs", b"", "empty"),
        ("header.tif", b"II*\0" + bytes(40), "no slide or picture"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "no slide or picture"),
    ],
)
def test_what_is_no_slide_says_so_in_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=f"^{name}: .*{reason}") as caught:
        open_slide(tmp_path / name, mpp_default=0.5)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_says_so(tmp_path):
    (tmp_path / "folder.svs").mkdir()
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    (tmp_path / "gone.svs").symlink_to("nowhere.svs")
    os.mkfifo(tmp_path / "pipe.svs")
    for name, reason in {
        "folder": "folder",
        "loop": "opened",
        "gone": "opened",
        "pipe": "pipe",
        "no": "opened",
    }.items():
        with pytest.raises(SlideError, match=rf"{name}\.svs: .*{reason}"):
            open_slide(tmp_path / f"{name}.svs", mpp_default=0.5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_says_so(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture())
    path.chmod(0)
    with pytest.raises(SlideError, match="Permission denied"):
        open_slide(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["strips.tif", "tiles.tif", "zstd tiles.tif", "planes.ome.tif", "a.png", "a.jpg"])
def test_a_file_cut_short_is_an_error(tmp_path, name, part):
    path = tmp_path / name
    FILES.get(name, FILES["a.png"])(path, picture())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(SlideError, match="cut short"):
        whole(path, mpp=0.5)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "CPTAC-C3L-00601-26.tiff"])
def test_a_real_slide_cut_short_is_refused_when_it_is_opened(data_dir, tmp_path, name):
    content = (data_dir / "slides" / name).read_bytes()
    path = tmp_path / name
    for part in (0.5, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(SlideError, match="cut short"):
            open_slide(path, mpp=0.5)


def test_one_damaged_tile_does_not_spoil_the_others(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture(), tile=(128, 128), compression="jpeg")
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[1], tiff.pages.first.databytecounts[1]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        with pytest.raises(SlideError, match=r"cannot be read near x 12\d, y \d "):
            slide.read(Region(130, 5, 90, 60), 0.5)
        assert np.abs(slide.read(Region(5, 5, 90, 60), 0.5).astype(int) - picture()[5:65, 5:95]).mean() < 3


def test_a_picture_too_large_for_memory_is_refused(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 50000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    empty = itertools.repeat(b"", 50000 // 200)
    tifffile.imwrite(
        tmp_path / "bomb.tif", empty, shape=(50000, 60000, 3), dtype=np.uint8, rowsperstrip=200, compression="zstd"
    )
    for name in ("bomb.png", "bomb.tif"):
        with pytest.raises(SlideError, match=r"too many.*pyramid"):
            open_slide(tmp_path / name, mpp=0.5)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (np.zeros((40, 60, 3), np.float32), {}),
        (np.zeros((5, 40, 60), np.uint8), {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "ome": True}),
        (np.zeros((7, 40, 60, 3), np.uint8), {}),
    ],
)
def test_what_is_no_colour_picture_says_so(tmp_path, image, options):
    path = write_tiff(tmp_path / "a.tif", image, **options)
    with pytest.raises(SlideError, match=r"holds .*8 bits a channel"):
        open_slide(path)


@pytest.mark.parametrize("name", ["strips.tif", "tiles.tif", "lzw.tif", "a.png", "a.jpg"])
def test_damage_anywhere_gives_pixels_or_a_slide_error(tmp_path, name):
    path = tmp_path / name
    FILES.get(name, FILES["a.png"])(path, picture(60, 90))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(60):
        damaged = bytearray(content)
        # Where the headers are most of all.
        for place in rng.integers(0, min(len(content), 400), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with open_slide(path, mpp=0.5) as slide:
                assert slide.read(Region(0, 0, 90, 60), 0.5).shape == (60, 90, 3)
        except SlideError:
            errors += 1
    assert errors > 5


# --- a folder of slides -------------------------------------------------------------------------------------------


def test_slides_are_found_by_extension_in_all_folders(tmp_path):
    names = [
        "b.svs", "A/c.NDPI", "A/deep/d.tiff", "A/e.jpg", "-f.png", "名.tif",
        ".hidden.svs", "._b.svs", ".cache/g.svs", "notes.txt", "labels.csv", "h.svs.part",
        "vms/slide.vms", "vms/slide-0.jpg", "vms/slide-macro.jpg",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "A" / "up").symlink_to(tmp_path)
    uid = b"\x20\x00\x0e\x00UI\x04\x00"
    for k, series in enumerate((b"1.2.3", b"1.2.3", b"1.2.4")):
        (tmp_path / f"{k}.dcm").write_bytes(bytes(128) + b"DICM" + uid + series)
    found = [str(path.relative_to(tmp_path)) for path in find_slides(tmp_path)]
    assert sorted(found) == sorted([*names[:6], "vms/slide.vms", "0.dcm", "2.dcm"])
    assert found == [str(path) for path in sorted(map(Path, found))]


def test_a_folder_that_is_not_there_is_an_error_and_an_empty_one_is_empty(tmp_path):
    assert find_slides(tmp_path) == []
    with pytest.raises(SettingsError, match="no folder"):
        find_slides(tmp_path / "nowhere")
