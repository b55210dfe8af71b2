"""Tiles: equal micrometres on every slide, wholly inside, tissue counted exactly, in one order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histossl.core.errors import SettingsError
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import Slide, open_slide
from histossl.wsi.tiles import TileSpec, qc_picture, tile_grid
from histossl.wsi.tissue import TissueMask


class Bare(Slide):
    """A slide without pixels: a grid needs its size and mpp."""

    def __init__(self, width: int, height: int, mpp: float) -> None:
        self.path, self.size, self.mpp = Path("bare.svs"), Size(width, height), mpp


def full(slide: Slide, height: int = 30, width: int = 40) -> TissueMask:
    return TissueMask(np.ones((height, width), bool), slide.size)


sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
specs = st.builds(
    lambda px, mpp, part, least: TileSpec(px, mpp, int(part * px), least),
    st.integers(20, 300), st.floats(0.2, 2), st.floats(0, 0.7), st.floats(0, 1),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(sizes, st.floats(0.2, 1.5), specs)
def test_tiles_lie_inside_the_slide_on_one_grid(size, mpp, spec):
    slide = Bare(*size, mpp)
    grid = tile_grid(slide, full(slide), spec)
    assert grid.extent == pytest.approx(spec.px * spec.mpp / mpp)
    assert grid.stride == pytest.approx((spec.px - spec.overlap) * spec.mpp / mpp)
    assert grid.xy.dtype == grid.ij.dtype == np.int64
    np.testing.assert_array_equal(grid.xy, np.rint(grid.ij[:, ::-1] * grid.stride))
    assert [tuple(ij) for ij in grid.ij] == sorted({tuple(ij) for ij in grid.ij})
    for k, length in enumerate((slide.size.width, slide.size.height)):
        ends = grid.xy[:, k] + grid.extent
        if grid.extent <= length:
            assert (ends <= length + 1e-5).all()
            assert ends.max() + grid.stride > length - 1  # and no place is left for another
        else:
            assert (grid.xy[:, k] == 0).all()
    assert grid.region(0) == next(grid.regions()) == Region(0, 0, grid.extent, grid.extent)
    assert len(list(grid.regions())) == len(grid)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(40, 400), st.integers(40, 400), st.floats(0.3, 1.2), specs)
def test_tissue_is_counted_exactly(data, width, height, mpp, spec):
    """Against the mask enlarged to level-0 pixels, 8 to each, and summed."""
    slide = Bare(width, height, mpp)
    rows, columns = data.draw(st.integers(1, 15)), data.draw(st.integers(1, 15))
    mask = np.random.default_rng(rows + 100 * columns).random((rows, columns)) < 0.6
    grid = tile_grid(slide, TissueMask(mask, slide.size), spec)
    kept = {tuple(ij) for ij in grid.ij.tolist()}
    everything = tile_grid(slide, TissueMask(np.ones_like(mask), slide.size), spec)
    for ij, (x, y) in zip(everything.ij.tolist(), everything.xy, strict=True):
        fine = (np.arange(8 * 400) + 0.5) / 8
        across = fine[(fine >= x) & (fine < min(x + grid.extent, width))] * columns / width
        down = fine[(fine >= y) & (fine < min(y + grid.extent, height))] * rows / height
        part = mask[np.ix_(down.astype(int), across.astype(int))].mean()
        if abs(part - spec.min_tissue) > 0.03:
            assert (tuple(ij) in kept) == (part > spec.min_tissue)


def test_a_finer_and_a_coarser_scan_give_tiles_of_the_same_micrometres(tmp_path):
    """One section, scanned at 0.23 and at 0.27 µm: the same tiles, and the same pictures in them."""
    y, x = np.mgrid[:4000:2.0, :5000:2.0]  # µm * 10
    section = np.stack([128 + 100 * np.sin(x / 110), 128 + 100 * np.cos(y / 90), 128 + 60 * np.sin((x + y) / 300)], 2)
    section = Image.fromarray(section.astype(np.uint8))
    grids, tiles = [], []
    for mpp in (0.23, 0.27):
        size = round(500 / mpp), round(400 / mpp)
        section.resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{mpp}.png")
        with open_slide(tmp_path / f"{mpp}.png", mpp=mpp) as slide:
            grid = tile_grid(slide, full(slide), TileSpec(64, 1.0, min_tissue=0.5))
            grids.append(grid)
            tiles.append(np.stack([slide.read(region, 1.0) for region in grid.regions()]).astype(int))
    np.testing.assert_array_equal(grids[0].ij, grids[1].ij)
    assert len(grids[0]) == 7 * 6
    np.testing.assert_allclose(grids[0].xy * 0.23, grids[1].xy * 0.27, atol=0.26)
    assert grids[0].extent * 0.23 == pytest.approx(grids[1].extent * 0.27) == pytest.approx(64)
    assert tiles[0].shape == (42, 64, 64, 3)
    assert np.abs(tiles[0] - tiles[1]).max() < 12
    assert np.abs(tiles[0][0] - tiles[0][1]).mean() > 20


def test_x_is_the_column_and_y_the_row():
    slide = Bare(width=1000, height=300, mpp=1.0)
    mask = np.zeros((30, 100), bool)
    mask[20:, 70:80] = True
    grid = tile_grid(slide, TissueMask(mask, slide.size), TileSpec(100, 1.0))
    assert grid.ij.tolist() == [[2, 7]]
    assert grid.xy.tolist() == [[700, 200]]


def test_overlapping_tiles_share_pixels():
    slide = Bare(1000, 700, 0.5)
    grid = tile_grid(slide, full(slide), TileSpec(100, 1.0, overlap=25))
    assert (grid.stride, grid.extent) == (150, 200)
    assert len(grid) == 6 * 4


@pytest.mark.parametrize("min_tissue", [0, 0.5, 1])
def test_without_tissue_there_are_no_tiles(min_tissue):
    slide = Bare(1000, 700, 0.5)
    grid = tile_grid(slide, TissueMask(np.zeros((7, 10), bool), slide.size), TileSpec(min_tissue=min_tissue))
    assert len(grid) == 0
    assert grid.xy.shape == grid.ij.shape == (0, 2)


def test_a_slide_smaller_than_a_tile_has_one_that_ends_in_white(tmp_path):
    Image.new("RGB", (120, 70), (150, 80, 140)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=1.0) as slide:
        grid = tile_grid(slide, full(slide), TileSpec(100, 1.0, min_tissue=1))
        assert grid.xy.tolist() == [[0, 0]]
        tile = slide.read(grid.region(0), 1.0)
    assert (tile[:70] == (150, 80, 140)).all()
    assert (tile[70:] == 255).all()


def test_enlarged_tiles_are_warned_of(caplog):
    slide = Bare(1000, 700, 1.0)
    tile_grid(slide, full(slide), TileSpec(100, 1.0))
    assert not caplog.records
    tile_grid(slide, full(slide), TileSpec(100, 0.5))
    assert "bare.svs" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"px": 0}, {"mpp": 0.0}, {"mpp": 1000.0}, {"mpp": float("nan")}, {"overlap": -1}, {"overlap": 224},
        {"min_tissue": -0.1}, {"min_tissue": 1.1}, {"min_tissue": float("nan")},
    ],
)  # fmt: skip
def test_specs_out_of_range_are_refused(values):
    with pytest.raises(SettingsError, match=str(next(iter(values.values())))):
        TileSpec(**values)


@pytest.mark.parametrize("px", [600, 100, 14])
def test_the_picture_shows_kept_tiles_left_out_tissue_and_the_slide(tmp_path, px):
    colour = np.array((180, 90, 150))
    picture = np.full((1500, 2000, 3), 255, np.uint8)
    picture[:, :1250] = colour
    Image.fromarray(picture).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=1.0) as slide:
        mask = TissueMask(np.arange(200)[None].repeat(150, 0) < 125, slide.size)
        grid = tile_grid(slide, mask, TileSpec(px, 1.0, min_tissue=0.9))
        shown = qc_picture(slide, mask, grid, longest=1000)
    assert shown.shape == (750, 1000, 3)
    assert (shown[:, 640:] == 255).all()
    edge = grid.xy[:, 0].max() + px  # the last tile's right edge, level 0
    inside = shown[: 1500 // px * px // 2 - 4, : edge // 2 - 4].astype(int)
    # Most of what was kept looks as it does on the slide, however many tiles there are; their frames can be seen.
    plain = (np.abs(inside - colour).max(2) < 30).mean()
    assert plain > 0.6
    assert (inside != colour).any(axis=2).mean() > 0.003
    outline = np.abs(shown[300, 600:650].astype(int) - (0, 120, 40)).sum(1)
    assert outline.min() < 60
    if edge < 1200:
        between = shown[20, edge // 2 + 6 : 610].astype(int)
        assert (between.mean(0) > colour + 20).all()


def test_a_picture_of_no_tiles_is_pale(tmp_path):
    Image.new("RGB", (120, 70), (150, 80, 140)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=1.0) as slide:
        mask = TissueMask(np.zeros((7, 12), bool), slide.size)
        shown = qc_picture(slide, mask, tile_grid(slide, mask, TileSpec(30, 1.0)))
    assert shown.shape == (70, 120, 3)
    assert (shown == shown[0, 0]).all()
    assert shown[0, 0, 1] > 160
