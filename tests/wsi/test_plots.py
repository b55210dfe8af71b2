"""What is drawn, and where: level-0 pixels on matplotlib axes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
from matplotlib.collections import PolyCollection

import histossl as hs
from histossl.core.errors import SettingsError
from histossl.nuclei.instances import MEASURES
from histossl.wsi.geometry import Size
from histossl.wsi.tissue import TissueMask

RNG = np.random.default_rng(0)
RGB = np.full((600, 900, 3), 240, np.uint8)
RGB[100:500, 200:800] = np.array([190, 110, 170], np.uint8) + RNG.integers(0, 40, (400, 600, 1), np.uint8)


@pytest.fixture
def slide():
    yield hs.picture_slide(RGB, mpp=0.5, name="field")
    plt.close("all")


def collections(ax) -> list[PolyCollection]:
    return [found for found in ax.collections if isinstance(found, PolyCollection)]


def test_a_slide_is_a_picture_in_level_0_pixels_with_a_scale_bar(slide):
    ax = slide.plot(longest=300)
    (image,) = ax.images
    assert image.get_array().shape == (200, 300, 3)
    assert image.get_extent() == [0, 900, 600, 0]
    assert ax.get_xlim() == (0, 900)
    assert ax.get_ylim() == (600, 0)  # y points down
    assert ax.get_title() == "field"
    (bar,) = ax.lines
    assert np.ptp(bar.get_xdata()) * 0.5 == pytest.approx(50)  # µm: at most a fifth of 450
    assert [text.get_text() for text in ax.texts] == ["50 µm"]


def test_the_outline_of_tissue_lies_where_the_tissue_is():
    mask = np.zeros((60, 90), bool)
    mask[10:50, 20:80] = True
    ax = TissueMask(mask, Size(900, 600)).plot()
    (found,) = collections(ax)
    (ring,) = found.get_paths()
    assert shapely.Polygon(ring.vertices).area == pytest.approx(400 * 600, rel=0.01)
    assert ring.get_extents().bounds == pytest.approx((200, 100, 600, 400))
    plt.close("all")


def test_tissue_at_the_edge_is_closed():
    ax = TissueMask(np.ones((6, 9), bool), Size(900, 600)).plot()
    assert collections(ax)[0].get_paths()[0].get_extents().bounds == pytest.approx((0, 0, 900, 600))
    plt.close("all")


def test_tiles_are_squares_on_the_same_axes(slide):
    grid = hs.tile_grid(slide, hs.find_tissue(slide), hs.TileSpec(px=50, mpp=1.0))
    assert len(grid) > 10
    ax = slide.plot()
    assert grid.plot(ax) is ax
    (found,) = collections(ax)
    assert len(found.get_paths()) == len(grid)
    first = found.get_paths()[0].get_extents()
    assert (first.x0, first.y0, first.width, first.height) == (*grid.xy[0], 100, 100)
    assert ax.get_xlim() == (0, 900)  # drawing moves no limits


def test_tiles_take_the_colours_of_values(slide):
    grid = hs.tile_grid(slide, hs.find_tissue(slide), hs.TileSpec(px=50, mpp=1.0))
    values = RNG.random(len(grid))
    (found,) = collections(grid.plot(values=values, colour="magma"))
    np.testing.assert_array_equal(found.get_array(), values)
    assert found.get_cmap().name == "magma"
    with pytest.raises(SettingsError, match=f"for {len(grid)} tiles; give one for each tile"):
        grid.plot(values=values[:-1])


def test_nuclei_are_outlines_and_come_from_polygons():
    shapes = [shapely.box(10, 20, 30, 60), shapely.Point(100, 50).buffer(10)]
    nuclei = hs.read_nuclei(shapes)
    assert len(nuclei) == 2
    assert [shape.area for shape in nuclei.polygons()] == pytest.approx([shape.area for shape in shapes], rel=1e-4)
    assert nuclei.measures[:, :2].tolist() == [pytest.approx([20, 40]), pytest.approx([100, 50])]
    ax = nuclei.plot()
    (found,) = collections(ax)
    assert len(found.get_paths()) == 2
    assert ax.yaxis.get_inverted()
    low, high = sorted(ax.get_xlim())
    assert low <= 10
    assert high >= 110
    (filled,) = collections(nuclei.plot(values="x"))
    np.testing.assert_allclose(filled.get_array(), [20, 100])
    assert len(hs.read_nuclei([]).plot().collections[0].get_paths()) == 0
    plt.close("all")


def test_nuclei_as_a_table():
    nuclei = hs.read_nuclei(shapely.MultiPolygon([shapely.box(0, 0, 4, 9), shapely.box(10, 0, 14, 9)]).geoms)
    frame = nuclei.to_frame()
    assert list(frame.columns) == ["geometry", *MEASURES]
    assert [shape.area for shape in frame["geometry"]] == [36, 36]
    assert len(hs.read_nuclei(frame["geometry"])) == 2


def test_reprs_are_one_line(slide):
    mask = hs.find_tissue(slide)
    grid = hs.tile_grid(slide, mask, hs.TileSpec(px=50, mpp=1.0))
    assert repr(slide) == "Slide('field', 900 x 600, mpp 0.5, array)"
    assert repr(grid) == f"TileGrid({len(grid)} tiles of 50 px at mpp 1, slide of 900 x 600 at mpp 0.5)"
    assert repr(mask).startswith("TissueMask(")
    assert repr(hs.read_nuclei([shapely.box(0, 0, 1, 1)])) == "Nuclei(1 outlines)"
    assert all("\n" not in repr(value) and len(repr(value)) < 120 for value in (slide, mask, grid))


def test_a_notebook_shows_a_thumbnail_of_a_slide(slide):
    html = slide._repr_html_()
    assert html.startswith('<img alt="" src="data:image/jpeg;base64,')
    assert "900 x 600" in html


def test_a_name_is_no_markup():
    html = hs.picture_slide(RGB, mpp=0.5, name="<b>x</b>")._repr_html_()
    assert "<b>" not in html
