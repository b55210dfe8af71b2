"""Units and axes: (x, y) and (width, height) in level-0 pixels, arrays (row, column), and who scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histossl.wsi.geometry import Point, Region, Size, level0_length, micrometres, tile_units

lengths = st.floats(0.5, 1e5)
mpps = st.floats(0.05, 10)


def test_arrays_are_row_column_and_sizes_are_width_height():
    assert Size(width=300, height=200).shape == (200, 300)
    assert np.zeros(Region(0, 0, 300, 200).pixels(0.5, 0.25).shape).shape == (100, 150)
    assert Region.whole(Size(300, 200)) == Region(x=0, y=0, width=300, height=200)


def test_geometry_is_frozen():
    for thing, name in ((Point(1, 2), "x"), (Size(3, 2), "width"), (Region(0, 1, 3, 2), "width")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 5)


@given(lengths, lengths, mpps, mpps)
def test_a_picture_of_a_region_is_as_many_micrometres_as_the_region(width, height, mpp, slide_mpp):
    size = Region(3, -5, width, height).pixels(mpp, slide_mpp)
    for pixels, length in ((size.width, width), (size.height, height)):
        wanted = micrometres(length, slide_mpp)
        assert pixels == 1 or abs(pixels * mpp - wanted) <= mpp / 2 * (1 + 1e-9)


@given(st.integers(1, 5000), mpps, mpps)
def test_a_length_in_pixels_comes_back_as_that_many_pixels(px, mpp, slide_mpp):
    length = level0_length(px, mpp, slide_mpp)
    assert math.isclose(micrometres(length, slide_mpp), px * mpp)
    assert Region(0, 0, length, 2 * length).pixels(mpp, slide_mpp) == Size(px, 2 * px)


@pytest.mark.parametrize(("width", "height"), [(0, 2), (3, 0), (-3, 2), (3, math.nan)])
def test_a_region_without_area_is_refused(width, height):
    with pytest.raises(ValueError, match="positive"):
        Region(0, 0, width, height)


@given(st.integers(0, 50), st.integers(0, 70), st.floats(10, 1000))
def test_neighbours_in_the_grid_are_one_tile_apart(row, column, stride):
    xy = np.rint(np.array([[column, row], [column + 1, row], [column, row + 1]]) * stride)
    units = tile_units(xy, stride)
    assert units.dtype == np.float32
    np.testing.assert_array_equal(units, [[row, column], [row, column + 1], [row + 1, column]])


def test_a_corner_that_is_of_no_grid_from_the_origin_stays_where_it_is():
    np.testing.assert_allclose(tile_units(np.array([[300, 812], [724, 388]]), 424.0)[:, 0], [812 / 424, 388 / 424])


@pytest.mark.parametrize("stride", [0, -1, math.nan, math.inf])
def test_a_stride_must_be_positive(stride):
    with pytest.raises(ValueError, match="stride"):
        tile_units(np.zeros((1, 2)), stride)
