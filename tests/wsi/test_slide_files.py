"""Every kind of file gives the same pixels, or a one-line reason why not; damaged ones, too."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import tifffile
from PIL import Image

from histossl.core.errors import SettingsError, SlideError
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import find_slides, open_slide
from support.pictures import (
    HEIGHT,
    WIDTH,
    picture,
    whole,
    write_tiff,
)


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
    names = ["a.jpg", "cmyk.tif", "jpeg.tif"]
    if int(PIL.__version__.split(".")[0]) >= 13:  # earlier ones cannot read it themselves
        names.append("ycc.tif")
    for name in names:
        assert np.abs(whole(tmp_path / name, mpp=0.5).astype(int) - picture()).mean() < 3, name


# --- mpp ----------------------------------------------------------------------------------------------------------


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
