"""OME-Zarr: the same pixels, mpp, tissue and tiles as a TIFF of the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import histossl as hs
from histossl.core.errors import SlideError
from histossl.wsi.content import content_of
from histossl.wsi.folders import look_for_slides
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide, slide_state
from histossl.wsi.synth import SynthSettings, paint_region

zarr = pytest.importorskip("zarr")
WIDTH, HEIGHT, MPP = 900, 700, 0.5


@pytest.fixture(scope="module")
def levels() -> list[np.ndarray]:
    first = paint_region(SynthSettings(WIDTH, HEIGHT, seed=4), Region(0, 0, WIDTH, HEIGHT))
    return [first, *(np.asarray(Image.fromarray(first).reduce(step)) for step in (2, 4))]


def write(path: Path, levels: list[np.ndarray], version: str = "0.5", order: str = "cyx", unit: str = "micrometer"):
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for k, level in enumerate(levels):
        pixels = level.transpose(["yxc".index(name) for name in order if name in "yxc"])
        pixels = pixels.reshape(
            [1 if name in "tz" else pixels.shape[[n for n in order if n in "yxc"].index(name)] for name in order]
        )
        group.create_array(str(k), data=pixels, chunks=tuple(min(128, side) for side in pixels.shape))
        scale = [MPP * 2**k if name in "xy" else 1.0 for name in order]
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"x": "space", "y": "space", "z": "space", "c": "channel", "t": "time"}
    axes = [{"name": n, "type": kinds[n]} | ({"unit": unit} if n in "xyz" and unit else {}) for n in order]
    about = {"multiscales": [{"version": version, "axes": axes, "datasets": datasets}]}
    group.attrs.update({"ome": {"version": "0.5", **about}} if version == "0.5" else about)
    return path


@pytest.mark.parametrize(("version", "order"), [("0.5", "cyx"), ("0.4", "tczyx"), ("0.4", "yxc")])
def test_the_same_pixels_as_of_a_tiff(tmp_path, levels, version, order):
    path = write(tmp_path / "a.ome.zarr", levels, version, order)
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        for k, level in enumerate(levels):
            about = {"tile": (128, 128), "photometric": "rgb", "metadata": None, "subfiletype": int(k > 0)}
            tiff.write(level, resolution=(1e4 / (MPP * 2**k),) * 2, resolutionunit="CENTIMETER", **about)
    with open_slide(path) as ours, open_slide(tmp_path / "b.tif") as other:
        assert ours.size == other.size
        assert ours.mpp == pytest.approx(other.mpp, rel=1e-4)
        assert len(ours.levels) == len(other.levels) == 3
        for region, mpp in (
            (Region(101, 57, 300, 211), MPP),
            (Region(0, 0, 800, 600), 2 * MPP),
            (Region(-40, 500, 300, 300), 4 * MPP),
        ):
            np.testing.assert_array_equal(ours.read(region, mpp), other.read(region, mpp))
        masks = [hs.find_tissue(slide).mask for slide in (ours, other)]
        assert masks[0].any()
        np.testing.assert_array_equal(*masks)


def test_a_folder_of_zarr_is_one_slide(tmp_path, levels):
    write(tmp_path / "in" / "a.zarr", levels[1:])
    write(tmp_path / "in" / "b.ome.zarr", [255 - level for level in levels[1:]])
    found = look_for_slides(tmp_path)
    assert [path.name for path in found.slides] == ["a.zarr", "b.ome.zarr"]
    assert len({content_of(path) for path in found.slides}) == 2
    (tmp_path / "in" / "a.zarr").rename(tmp_path / "c.zarr")
    assert content_of(tmp_path / "c.zarr") != content_of(found.slides[1])
    assert slide_state(tmp_path / "c.zarr")


def test_what_is_no_picture_is_told(tmp_path, levels):
    labels = zarr.open_group(tmp_path / "l.zarr", mode="w", zarr_format=2)
    labels.attrs["labels"] = ["nuclei"]
    with pytest.raises(SlideError, match="without a picture"):
        open_slide(tmp_path / "l.zarr")
    deep = [level.astype(np.uint16) for level in levels]
    with pytest.raises(SlideError, match="uint16"):
        open_slide(write(tmp_path / "d.zarr", deep))
    with pytest.raises(SlideError, match="5 c"):
        open_slide(write(tmp_path / "f.zarr", [level[..., [0, 1, 2, 0, 1]] for level in levels]))
    with pytest.raises(SlideError, match="mpp"):
        open_slide(write(tmp_path / "u.zarr", levels, unit=""))
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(SlideError, match="is a folder"):
        open_slide(tmp_path / "empty.zarr")
    outside = write(tmp_path / "o.zarr", levels)
    group = zarr.open_group(outside)
    about = dict(group.attrs["ome"])
    about["multiscales"][0]["datasets"][0]["path"] = "../d.zarr/0"
    group.attrs["ome"] = about
    with pytest.raises(SlideError, match="outside of its folder"):
        open_slide(outside)
