"""Stains, the tree of objects, instances and outlines, on discs whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from histossl.core.errors import SlideError
from histossl.nuclei.augment import crowd
from histossl.nuclei.component_tree import TreeSettings, _components, best_objects, filled
from histossl.nuclei.instances import InstanceSettings, concatenate, label_instances, nuclei_of_tile, outline_instances
from histossl.nuclei.metrics import score
from histossl.nuclei.pseudo_labels import PseudoLabelSettings, sure_nuclei, targets
from histossl.nuclei.threshold import Prior, PriorSettings
from histossl.wsi.stain import FIXED, Stains, concentrations, estimate_stains, optical_density

STAINS = Stains((0.62, 0.70, 0.35), (0.20, 0.84, 0.50))


def paint(hematoxylin: np.ndarray, eosin: np.ndarray, stains: Stains = STAINS) -> np.ndarray:
    """(H, W, 3) uint8 of two concentrations."""
    basis = np.array([stains.hematoxylin, stains.eosin])
    density = np.stack([hematoxylin, eosin], -1) @ basis
    return np.clip(np.rint(256 * 10**-density - 1), 0, 255).astype(np.uint8)


def discs(centres: list[tuple[float, float]], radius: float, shape: tuple[int, int]) -> np.ndarray:
    """Labels of discs, centres in (row, column)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for k, (r, c) in enumerate(centres, 1):
        labels[np.hypot(y - r, x - c) <= radius] = k
    return labels


def field(seed: int = 0, shape: tuple[int, int] = (180, 240), count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """A picture at 0.5 µm of discs of 4 µm radius on eosin, and their labels."""
    rng = np.random.default_rng(seed)
    centres: list[tuple[float, float]] = []
    while len(centres) < count:
        r, c = rng.uniform(12, shape[0] - 12), rng.uniform(12, shape[1] - 12)
        if all(np.hypot(r - a, c - b) > 20 for a, b in centres):
            centres.append((r, c))
    labels = discs(centres, 8, shape)
    smooth = rng.normal(0, 0.02, shape)
    return paint(0.08 + 0.75 * (labels > 0) + smooth, 0.35 + smooth, STAINS), labels


def test_unmixing_inverts_mixing() -> None:
    rng = np.random.default_rng(1)
    amounts = rng.uniform(0.1, 0.8, (20, 30, 2))
    density = optical_density(paint(amounts[..., 0], amounts[..., 1]))
    np.testing.assert_allclose(concentrations(density, STAINS), amounts, atol=0.03)


def test_white_has_no_density_and_black_is_finite() -> None:
    picture = np.array([[[255, 255, 255], [0, 0, 0], [250, 10, 128]]], np.uint8)
    density = optical_density(picture)
    assert density[0, 0].tolist() == [0, 0, 0]
    assert np.isfinite(density).all()
    assert (density >= 0).all()


@pytest.mark.parametrize("turn", [0.0, 0.06])
def test_stains_are_found_whatever_they_are(turn: float) -> None:
    truth = Stains((0.62 + turn, 0.70 - turn, 0.35), (0.20 - turn, 0.84, 0.50 + turn))
    rng = np.random.default_rng(2)
    mostly = rng.random(40000) < 0.3
    h = np.where(mostly, rng.uniform(0.4, 1.0, 40000), rng.uniform(0, 0.02, 40000))
    e = np.where(mostly, rng.uniform(0, 0.02, 40000), rng.uniform(0.3, 0.9, 40000))
    found = estimate_stains(paint(h[:, None], e[:, None], truth)[:, 0])
    assert found is not None
    for a, b in ((found.hematoxylin, truth.hematoxylin), (found.eosin, truth.eosin)):
        cosine = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert np.degrees(np.arccos(cosine)) < 6
    assert found.has_hematoxylin
    assert not found.has_brown


def test_eosin_alone_is_no_hematoxylin_and_dab_is_brown() -> None:
    rng = np.random.default_rng(3)
    eosin = estimate_stains(paint(rng.uniform(0, 0.02, (9000, 1)), rng.uniform(0.3, 0.9, (9000, 1)))[:, 0])
    assert eosin is not None
    assert not eosin.has_hematoxylin
    dab = Stains((0.65, 0.70, 0.29), (0.27, 0.57, 0.78))
    half = rng.random((20000, 1)) < 0.5
    h, d = np.where(half, 0.7, 0.02), np.where(half, 0.02, rng.uniform(0.3, 0.9, (20000, 1)))
    found = estimate_stains(paint(h, d, dab)[:, 0])
    assert found is not None
    assert found.has_brown


def test_a_pale_slide_has_its_stains_too() -> None:
    rng = np.random.default_rng(0)
    amounts = np.where(rng.random((20_000, 1)) < 0.1, [0.22, 0.1], [0.02, 0.3]) * rng.uniform(0.8, 1.2, (20_000, 2))
    density = amounts @ np.array([FIXED.hematoxylin, FIXED.eosin])
    assert (density > 0.12).all(1).sum() < 500  # what is strongly stained in all colours
    found = estimate_stains(np.rint(256 * 10**-density - 1).clip(0, 255).astype(np.uint8))
    assert found is not None
    assert found.has_hematoxylin
    assert np.dot(found.hematoxylin, FIXED.hematoxylin) > 0.9


def test_no_stain_is_none_and_grey_is_an_error() -> None:
    assert estimate_stains(np.full((5000, 3), 255, np.uint8)) is None
    assert estimate_stains(np.zeros((5000, 3), np.uint8)) is None
    grey = np.random.default_rng(0).integers(40, 220, (5000, 1), np.uint8).repeat(3, 1)
    with pytest.raises(SlideError, match="greyscale"):
        estimate_stains(grey)


def test_fixed_vectors_are_unit() -> None:
    for vector in (FIXED.hematoxylin, FIXED.eosin):
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)


def test_every_object_has_a_contrast_of_its_own() -> None:
    shape = (60, 100)
    labels = discs([(30, 25), (30, 70)], 9, shape)
    # The pale disc is paler than the ground around the dark one: no one threshold has both.
    ground = np.linspace(0.6, 0.0, shape[1])[None].repeat(shape[0], 0)
    values = (ground + 0.3 * (labels > 0)).astype(np.float32)
    found, quality = best_objects(values, np.linspace(0.02, 0.95, 48), 0.5, TreeSettings(largest=120))
    assert len(quality) == found.max() + 1
    good = np.where(quality[found] > 0.5 * quality.max(), found, 0)
    assert score(good, labels).f1 > 0.99
    single = max(score((values > t).astype(np.int32), labels).dice for t in np.linspace(0.02, 0.95, 48))
    assert score(good, labels).dice > single + 0.2


def test_outlines_lie_where_the_slope_is_steepest() -> None:
    shares = []
    for radius in (4.5, 6.3, 9.0):
        for row, column in ((20, 20), (20.3, 20.6), (20.5, 20.5)):
            y, x = np.mgrid[:40, :40]
            soft = 1 / (1 + np.exp((np.hypot(y - row, x - column) - radius) / 0.8))
            found, quality = best_objects(soft.astype(np.float32), np.linspace(0.02, 0.98, 64), 0.5, TreeSettings())
            shares.append((found == quality.argmax()).sum() / (np.pi * radius**2))
    assert 0.9 < min(shares) < max(shares) < 1.25
    assert np.mean(shares) == pytest.approx(1, abs=0.1)  # by the slope inside alone it is 1.13


def test_what_is_not_of_the_usual_area_has_to_be_better() -> None:
    values = (discs([(30, 30)], 8, (60, 60)) > 0).astype(np.float32)
    area = values.sum() / 4
    free, usual, four = (
        best_objects(values, [0.5], 0.5, TreeSettings(usual=u, spread=1.25))[1][1] for u in (0, area, 4 * area)
    )
    assert usual == pytest.approx(free)
    assert four == pytest.approx(free * np.exp(-((np.log(4) / 1.25) ** 2) / 2), rel=1e-3)


def test_lessons_trust_what_is_as_large_as_the_others() -> None:
    _, labels = field(count=28)
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]]
    giant = np.hypot(y - 90, x - 120) <= 17  # 4.5 times as large, and as sharp
    labels[np.hypot(y - 90, x - 120) <= 27] = 0
    rgb = paint(0.08 + 0.75 * ((labels > 0) | giant), np.full(labels.shape, 0.35))
    (labelled,) = sure_nuclei([rgb], STAINS, 0.5).labels
    others = labelled.quality[np.unique(labelled.labels[labels > 0])]
    assert 0.3 < labelled.quality[labelled.labels[90, 120]] / np.median(others) < 0.7


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_objects_are_connected_disjoint_and_of_the_size_asked_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(rng.random((50, 70)), 2).astype(np.float32)
    asked = TreeSettings(smallest=3, largest=60)
    labels, quality = best_objects(values, np.linspace(values.min(), values.max(), 20), 0.5, asked)
    areas = np.bincount(labels.ravel(), minlength=len(quality))[1:] * 0.25
    assert ((areas >= 3) & (areas <= 60)).all()
    for k in range(1, len(quality)):
        assert ndimage.label(labels == k)[1] == 1


def test_touching_discs_are_parted_and_a_single_one_is_not() -> None:
    labels = discs([(30, 30), (30, 44), (30, 90)], 8, (60, 120))
    depth = np.zeros(labels.shape, np.float32)
    y, x = np.mgrid[:60, :120]
    for r, c in ((30, 30), (30, 44), (30, 90)):
        depth = np.maximum(depth, np.clip(1 - np.hypot(y - r, x - c) / 8.5, 0, 1))
    found = label_instances(np.stack([labels > 0, depth]).astype(np.float32), 0.5)
    assert found.max() == 3
    assert score(found, labels).pq > 0.9


def test_a_mask_without_depth_is_not_lost() -> None:
    confidence = np.zeros((2, 40, 60), np.float32)
    confidence[0, 10:30, 15:45] = 1
    assert label_instances(confidence, 0.5, InstanceSettings(middle=0)).max() == 1
    assert label_instances(confidence, 0.5).max() == 0  # but what has no middle is no nucleus
    assert label_instances(np.zeros((2, 40, 60), np.float32), 0.5).max() == 0


def test_outlines_measure_a_disc() -> None:
    y, x = np.mgrid[:50, :70]
    soft = np.clip(10.5 - np.hypot(y + 0.5 - 20, x + 0.5 - 40), 0, 1).astype(np.float32)
    stain = np.stack([soft * 0.7, soft * 0 + 0.2], -1)
    nuclei = outline_instances((soft > 0.5).astype(np.int32), soft, stain, 0.5)
    row = dict(zip(("x", "y", "area", "perimeter", "eccentricity", "solidity"), nuclei.measures[0, :6], strict=True))
    assert (row["x"], row["y"]) == (pytest.approx(40, abs=0.05), pytest.approx(20, abs=0.05))
    assert row["area"] == pytest.approx(np.pi * 25, rel=0.02)
    assert row["perimeter"] == pytest.approx(2 * np.pi * 5, rel=0.06)
    assert row["eccentricity"] < 0.1
    assert row["solidity"] > 0.98
    assert nuclei.measures[0, 6] == pytest.approx(0.7, abs=0.03)
    assert nuclei.measures[0, 7] == pytest.approx(0.2)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_outlines_follow_any_4_connected_shape(seed: int) -> None:
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).random((30, 44)), 1.2) > 0.5
    labels = ndimage.label(mask)[0].astype(np.int32)
    nuclei = outline_instances(labels, mask.astype(np.float32), np.zeros((30, 44, 2), np.float32), 1.0)
    shapes = nuclei.polygons()
    assert shapely.is_valid(shapes).all()
    # What is 4-connected lies in an 8-connected ground.
    ground = np.ones((3, 3))
    filled = [ndimage.binary_fill_holes(labels == k, ground) for k in range(1, labels.max() + 1)]
    for shape, inside in zip(shapes, filled, strict=True):
        r, c = np.nonzero(inside)
        assert shapely.contains_xy(shape, c + 0.5, r + 0.5).all()
        outside = ~inside
        r, c = np.nonzero(outside)
        assert not shapely.contains_xy(shape, c + 0.5, r + 0.5).any()


def test_tables_shift_choose_and_join() -> None:
    labels = discs([(15, 15), (15, 45)], 6, (30, 64))
    nuclei = outline_instances(labels, (labels > 0).astype(np.float32), np.zeros((30, 64, 2), np.float32), 0.5)
    moved = nuclei.shifted(100, 7, 2)
    assert moved.measures[1, :2].tolist() == pytest.approx([2 * 145.5, 2 * 22.5], abs=1e-3)
    second = moved.chosen(np.array([False, True]))
    assert len(second) == 1
    both = concatenate([second, second])
    assert len(both) == 2
    assert shapely.equals(*both.polygons())
    assert len(concatenate([])) == 0


def test_a_nucleus_belongs_to_one_core_only() -> None:
    rgb, labels = field()
    confidence = (np.stack([labels > 0, labels > 0]) * 255).astype(np.uint8)
    whole = nuclei_of_tile(rgb, confidence, STAINS, 0.5, InstanceSettings(), (0, 0, 240, 180), True)
    left = nuclei_of_tile(rgb, confidence, STAINS, 0.5, InstanceSettings(), (0, 0, 101, 180), True)
    right = nuclei_of_tile(rgb, confidence, STAINS, 0.5, InstanceSettings(), (101, 0, 240, 180), True)
    assert len(whole) == labels.max()
    both = concatenate([left, right])
    assert sorted(map(tuple, both.measures.tolist())) == sorted(map(tuple, whole.measures.tolist()))


def test_lessons_hold_the_discs_and_leave_doubt() -> None:
    rgb, labels = field()
    # A long dark band: dark, but no nucleus.
    rgb[2:8] = paint(np.full((6, 240), 0.8), np.full((6, 240), 0.35))
    (labelled,) = sure_nuclei([rgb], STAINS, 0.5).labels
    found = score(labelled.labels, labels)
    assert found.f1 > 0.9
    assert labelled.doubtful[3:7].mean() > 0.9
    known = targets(labelled)
    assert known.shape == (3, *labels.shape)
    assert ((known >= 0) & (known <= 1.5)).all()
    assert known[2][3:7].mean() < 0.2
    beside = np.zeros(labels.shape, bool)
    beside[90:92] = True  # dark, without a gap between it and the nuclei that it meets
    weights = targets(replace(labelled, doubtful=beside & (labelled.labels == 0)))[2, 90]
    distance = ndimage.distance_transform_cdt(labelled.labels == 0, "taxicab")[90]
    assert (weights[(distance > 0) & (distance <= 2)] == 1).all()
    assert (weights[distance > 2] == np.float32(0.1)).all()
    assert {1, 2, 3} <= set(distance)
    crowded = crowd(labelled, 40, np.random.default_rng(0))
    assert crowded.labels.max() > labelled.labels.max() + 10
    assert len(crowded.quality) == crowded.labels.max() + 1
    assert labelled.labels.max() == labels.max()  # the original is as it was


def test_prior_finds_discs() -> None:
    rgb, labels = field()
    for method in (Prior(), Prior(PriorSettings(stains="estimated"))):
        context = method.prepare([rgb], STAINS)
        found = label_instances(method.confidence(rgb, STAINS, context), 0.5, learned=False)
        assert score(found, labels).pq > 0.85


def test_lessons_of_an_empty_field_are_empty() -> None:
    rgb = paint(np.full((90, 130), 0.02), np.full((90, 130), 0.3))
    (labelled,) = sure_nuclei([rgb], STAINS, 0.5, PseudoLabelSettings()).labels
    assert labelled.labels.max() == 0
    assert crowd(labelled, 5, np.random.default_rng(0)) is labelled


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (1, 9), (9, 1), (17, 23), (40, 31)]), st.floats(0, 30))
def test_holes_are_filled_and_components_labelled_as_by_scipy(seed: int, shape: tuple[int, int], hole: float) -> None:
    rng = np.random.default_rng(seed)
    values = ndimage.gaussian_filter(rng.random(shape), rng.choice([0, 0.7, 2]))
    mask = values > np.quantile(values, rng.random())
    holes, _ = ndimage.label(~mask)  # type: ignore[misc]
    small = np.bincount(holes.ravel()) <= hole
    small[0] = False
    expected = mask | small[holes] if hole >= 1 else mask
    np.testing.assert_array_equal(filled(mask, hole), expected)
    found, count = _components(mask, hole)
    labels, number = ndimage.label(expected)  # type: ignore[misc]
    assert count == number
    np.testing.assert_array_equal(found, labels)
