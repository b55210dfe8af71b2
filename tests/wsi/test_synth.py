"""Synthetic slides: the same whichever way they are painted, true to their truth, and with the classes they promise."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import cache
from itertools import product

import numpy as np
import openslide
import pandas as pd
import pytest
import shapely
import tiffslide
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, find_objects, gaussian_filter

from histossl.core.errors import SettingsError
from histossl.wsi.geometry import Region
from histossl.wsi.synth import (
    FACTORS,
    KINDS,
    NUCLEI,
    SynthSettings,
    nuclei_in,
    paint_region,
    write_slide,
    write_truth,
)
from histossl.wsi.synth.recipe import plan

SMALL = SynthSettings(width=900, height=700, seed=4)
FINE = SynthSettings(width=1500, height=1100, mpp=0.5, seed=8, lesion=1, lesion_share=0.2)
LARGE_UNITS = SynthSettings(width=800, height=1000, mpp=1.0, patch_um=150, seed=2, composition=1)


def everything(settings: SynthSettings) -> Region:
    return Region(0, 0, settings.width, settings.height)


@cache
def painted(settings: SynthSettings) -> tuple[np.ndarray, np.ndarray]:
    return paint_region(settings, everything(settings)), nuclei_in(settings, everything(settings))[0]


@pytest.fixture(scope="module")
def fine() -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    return *painted(FINE), nuclei_in(FINE, everything(FINE))[1]


# ---- painting


@pytest.mark.parametrize("settings", [FINE, LARGE_UNITS], ids=["fine", "large-units"])
@examples(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_region_shows_the_same_slide(settings, data):
    whole, labels = painted(settings)
    x = data.draw(st.integers(0, settings.width - 2))
    y = data.draw(st.integers(0, settings.height - 2))
    width = data.draw(st.integers(1, min(180, settings.width - x)))
    height = data.draw(st.integers(1, min(160, settings.height - y)))
    region = Region(x, y, width, height)
    here = slice(y, y + height), slice(x, x + width)
    np.testing.assert_array_equal(paint_region(settings, region), whole[here])
    mine, table = nuclei_in(settings, region)
    np.testing.assert_array_equal(mine, labels[here])
    assert table.id.tolist() == [n for n in np.unique(mine) if n]


def test_beyond_the_slide_lies_glass():
    outside = paint_region(SMALL, Region(-90, -40, 80, 30)).astype(float)
    assert outside.shape == (30, 80, 3)
    assert outside.mean() > 225
    assert outside.std((0, 1)).max() < 8


def test_fractional_regions_are_refused():
    with pytest.raises(SettingsError, match="whole pixels"):
        paint_region(SMALL, Region(0.5, 0, 10, 10))


def test_a_cell_does_not_see_the_kinds_of_its_neighbours():
    from histossl.wsi.synth.paint import paint
    from histossl.wsi.synth.shapes import form_of, in_cell
    from histossl.wsi.synth.write import _world

    world = _world(FINE)
    i, j = np.argwhere(plan(FINE).whole)[len(np.argwhere(plan(FINE).whole)) // 2]
    form = form_of(world, int(i), int(j))
    x0, y0 = round(form.x / FINE.mpp) - 150, round(form.y / FINE.mpp) - 150
    inside = np.array(
        [
            [
                in_cell(form.sides, (c + x0 + 0.5) * FINE.mpp - form.x, (r + y0 + 0.5) * FINE.mpp - form.y) > 0
                for c in range(300)
            ]
            for r in range(300)
        ]
    )
    assert 1000 < inside.sum() < 90_000
    for own in range(len(KINDS)):
        seen = []
        for other in range(len(KINDS)):
            kinds = np.where(world.kinds >= 0, other, world.kinds).astype(np.int8)
            kinds[i, j] = own
            seen.append(paint(world._replace(kinds=kinds), x0, y0, 300, 300)[inside])
        for pixels in seen[1:]:
            np.testing.assert_array_equal(pixels, seen[0])


def test_the_lattice_of_patches_does_not_show():
    """Brightness folded at the side of a patch varies no more than at sides that mean nothing."""

    def folded(period: int) -> float:
        columns = np.arange(shown.shape[1]) % period
        return float(np.std([np.nanmean(shown[:, columns == k]) for k in range(period)]))

    excess = []
    for seed in range(4):
        settings = SynthSettings(seed=seed, patient=seed)
        image = paint_region(settings, everything(settings)).mean(2)
        shown = np.where(gaussian_filter(image, 20) < 215, image - gaussian_filter(image, 60), np.nan)
        excess.append(folded(64) / np.mean([folded(period) for period in (53, 57, 59, 61, 67, 71, 73)]))
    assert np.mean(excess) < 2, "patches in columns give 5 and more"


def test_another_seed_is_another_slide_and_another_patient_another_stain():
    region = Region(200, 300, 200, 100)
    first = paint_region(SMALL, region)
    assert (paint_region(dataclasses.replace(SMALL, seed=5), region) != first).mean() > 0.5
    stains = [plan(dataclasses.replace(SMALL, patient=k)).stain for k in range(3)]
    assert np.abs(stains[0] - stains[1]).max() > 1e-3
    assert np.abs(stains[1] - stains[2]).max() > 1e-3


def test_the_lattice_of_a_huge_slide_is_painted_anywhere():
    huge = SynthSettings(width=100_000, height=80_000, mpp=0.5, seed=1)
    made = plan(huge)
    assert made.depth.size < 200_000
    i, j = np.argwhere(made.whole)[-1]
    labels, table = nuclei_in(huge, Region(int(j) * 128, int(i) * 128, 128, 128))
    assert len(table) > 3
    assert labels.max() > 2**20


# ---- truth


def test_nuclei_are_darker_in_hematoxylin_than_what_surrounds_them(fine):
    image, labels, _ = fine
    stain = plan(FINE).stain
    density = -np.log((image.astype(float) + 1) / 256)
    hematoxylin = density.reshape(-1, 3) @ np.linalg.pinv(np.vstack([stain[:2], np.cross(*stain[:2])]))[:, 0]
    hematoxylin = gaussian_filter(hematoxylin.reshape(labels.shape), 0.7)
    found = 0
    darker = 0
    for n, box in enumerate(find_objects(labels), 1):
        if box is None:
            continue
        box = tuple(slice(max(0, s.start - 4), s.stop + 4) for s in box)
        inside = labels[box] == n
        ring = np.logical_xor(*(binary_dilation(inside, iterations=k) for k in (4, 2)))
        ring &= labels[box] == 0
        if ring.sum() > 8:
            found += 1
            darker += hematoxylin[box][inside].mean() > hematoxylin[box][ring].mean() + 0.2
    assert found > 300
    assert darker / found > 0.99


def test_nuclei_have_plausible_sizes_and_unique_ids(fine):
    _, labels, table = fine
    assert table.id.is_unique
    assert set(table.type) == set(NUCLEI)
    assert labels.dtype == np.int32
    areas = dict(zip(*np.unique(labels[labels > 0], return_counts=True), strict=True))
    um2 = table.id.map(areas) * FINE.mpp**2
    assert um2.median() == pytest.approx(35, rel=0.35)
    assert um2.between(5, 220).all()
    by_type = um2.groupby(table.type).median()
    assert by_type["lymphocyte"] < by_type["tumour"] < by_type["atypical"]
    # Every nucleus lies where the table says: its middle is on it.
    at = labels[table.y.astype(int), table.x.astype(int)]
    assert (at == table.id).mean() > 0.99


def test_truth_is_geojson_of_the_painted_nuclei(tmp_path, fine):
    _, labels, table = fine
    assert write_truth(tmp_path / "t.geojson", FINE) == len(table)
    features = json.loads((tmp_path / "t.geojson").read_text(encoding="utf-8"))["features"]
    kinds = dict(zip(table.id, table.type, strict=True))
    agreement = []
    areas = dict(zip(*np.unique(labels[labels > 0], return_counts=True), strict=True))
    assert sorted(f["properties"]["id"] for f in features) == table.id.tolist()
    lost = [1 - areas[f["properties"]["id"]] / shapely.geometry.shape(f["geometry"]).area for f in features]
    assert np.mean(np.array(lost) > 0.3) < 0.01, "nuclei hide each other"
    for feature in features[::7]:
        name = feature["properties"]["id"]
        polygon = shapely.geometry.shape(feature["geometry"])
        assert polygon.is_valid
        assert feature["properties"]["objectType"] == "detection"
        assert feature["properties"]["classification"]["name"] == kinds[name]
        x0, y0, x1, y1 = (int(v) for v in polygon.bounds)
        y, x = np.mgrid[y0 : y1 + 2, x0 : x1 + 2]
        drawn = shapely.contains_xy(polygon, x + 0.5, y + 0.5)
        mine = labels[y0 : y1 + 2, x0 : x1 + 2] == name
        agreement.append((drawn & mine).sum() / (drawn | mine).sum())
    assert np.mean(agreement) > 0.93


# ---- files


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_slide(tmp_path / f"{name}.tiff", SMALL)
    first = (tmp_path / "a.tiff").read_bytes()
    assert first == (tmp_path / "b.tiff").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.tiff", "b.tiff"]


def test_other_tools_open_the_slide_with_its_mpp_and_levels(tmp_path):
    settings = SynthSettings(width=2111, height=1300, mpp=0.37, seed=3, quality=0)
    path = tmp_path / "s.tiff"
    write_slide(path, settings)
    sizes = ((2111, 1300), (1055, 650), (527, 325), (263, 162))
    level0 = paint_region(settings, everything(settings))
    for slide in (openslide.OpenSlide(path), tiffslide.TiffSlide(path)):
        kind = "openslide" if isinstance(slide, openslide.OpenSlide) else "tiffslide"
        assert tuple(tuple(size) for size in slide.level_dimensions) == sizes
        assert float(slide.properties[f"{kind}.mpp-x"]) == pytest.approx(0.37, rel=1e-4)
        assert float(slide.properties[f"{kind}.mpp-y"]) == pytest.approx(0.37, rel=1e-4)
        seen = np.asarray(slide.read_region((500, 400), 0, (700, 300)).convert("RGB"))
        np.testing.assert_array_equal(seen, level0[400:700, 500:1200])
        half = np.asarray(slide.read_region((0, 0), 1, sizes[1]).convert("RGB")).astype(float)
        mean = level0[:1300, :2110].astype(float).reshape(650, 2, 1055, 2, 3).mean((1, 3))
        assert np.abs(half - mean).max() <= 0.5
        slide.close()


def test_jpeg_slides_stay_near_what_was_painted(tmp_path):
    write_slide(tmp_path / "s.tiff", SMALL)
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        seen = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(float)
    assert np.abs(seen - paint_region(SMALL, everything(SMALL))).mean() < 6


def test_a_failed_slide_leaves_nothing(tmp_path, monkeypatch):
    import histossl.wsi.synth.write as write

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(write, "paint_region", fail)
    with pytest.raises(OSError, match="disk full"):
        write_slide(tmp_path / "s.tiff", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_memory_does_not_grow_with_the_slide(tmp_path):
    program = (
        "import resource, sys\n"
        "from histossl.wsi.synth import SynthSettings, write_slide\n"
        "for width, height in ((1500, 1200), (1500, 1200), (6000, 5000)):\n"
        "    write_slide(sys.argv[1], SynthSettings(width, height, mpp=0.5))\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s.tiff")], capture_output=True, text=True, check=True
    )
    _, small, large = (int(line) / 1024 for line in done.stdout.split())
    assert large - small < 30, "MiB; the pixels of the large slide alone are 86"


def test_the_package_is_cheap_to_import():
    program = (
        "import sys, histossl.wsi.synth; print([m for m in ('torch', 'numba', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- classes


def _counts(settings: SynthSettings) -> np.ndarray:
    made = plan(settings)
    return np.bincount(made.kinds[made.whole], minlength=len(KINDS))


def _alike(settings: SynthSettings) -> float:
    """Share of neighbouring whole patches that are of one kind, over what chance gives."""
    made = plan(settings)
    kinds, whole = made.kinds, made.whole
    pairs = [
        (kinds[1:] == kinds[:-1])[whole[1:] & whole[:-1]],
        (kinds[:, 1:] == kinds[:, :-1])[whole[:, 1:] & whole[:, :-1]],
    ]
    share = _counts(settings) / whole.sum()
    return float(np.concatenate(pairs).mean() / (share**2).sum())


@pytest.mark.parametrize(("seed", "composition", "lesion"), [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)])
def test_arrangement_changes_neighbours_and_nothing_else(seed, composition, lesion):
    scattered = SynthSettings(width=2000, height=1800, seed=seed, composition=composition, lesion=lesion)
    clustered = dataclasses.replace(scattered, arrangement=1)
    np.testing.assert_array_equal(_counts(scattered), _counts(clustered))
    np.testing.assert_array_equal(plan(scattered).kinds >= 0, plan(clustered).kinds >= 0)
    np.testing.assert_array_equal(plan(scattered).stain, plan(clustered).stain)
    assert _alike(scattered) == pytest.approx(1, abs=0.25 if not lesion else 0.45)
    assert _alike(clustered) > 2


def test_composition_shifts_the_shares():
    shares = {
        c: np.mean([_counts(SynthSettings(seed=s, patient=s, composition=c)) for s in range(20)], 0) for c in (0, 1)
    }
    shares = {c: v / v.sum() for c, v in shares.items()}
    gland, lymphoid, adipose = (KINDS.index(k) for k in ("gland", "lymphoid", "adipose"))
    assert shares[0][gland] - shares[1][gland] > 0.06
    assert shares[1][lymphoid] - shares[0][lymphoid] > 0.06
    assert abs(shares[1][adipose] - shares[0][adipose]) < 0.03


def test_the_lesion_is_one_small_compact_focus():
    for seed in range(8):
        with_it, without = (SynthSettings(seed=seed, lesion=k) for k in (1, 0))
        made, lesion = plan(with_it), KINDS.index("lesion")
        at = np.argwhere(made.kinds == lesion)
        assert len(at) == round(0.04 * made.whole.sum())
        assert np.linalg.norm(at - at.mean(0), axis=1).max() < 2.2 * np.sqrt(len(at))
        assert not (plan(without).kinds == lesion).any()
        np.testing.assert_array_equal(made.whole, plan(without).whole)


def test_stain_and_tissue_do_not_know_the_class():
    base = SynthSettings(seed=12, patient=3)
    for factors in product((0, 1), repeat=3):
        other = plan(dataclasses.replace(base, **dict(zip(FACTORS, factors, strict=True))))
        np.testing.assert_array_equal(other.stain, plan(base).stain)
        np.testing.assert_array_equal(other.habit, plan(base).habit)
        np.testing.assert_array_equal(other.depth, plan(base).depth)


def test_a_cohort_has_balanced_independent_factors_by_patient(tmp_path):
    from histossl.wsi.synth.cohort import _cohort

    made = _cohort(48, SMALL, 1)
    patients = {s.patient: tuple(getattr(s, f) for f in FACTORS) for s in made}
    assert len(patients) == 24
    assert len({s.seed for s in made}) == 48
    assert all(patients[s.patient] == tuple(getattr(s, f) for f in FACTORS) for s in made)
    combinations, counts = np.unique(list(patients.values()), axis=0, return_counts=True)
    assert len(combinations) == 8
    assert (counts == 3).all()
    few = np.array([[getattr(s, f) for f in FACTORS] for s in _cohort(12, SMALL, 2)])
    assert (few.mean(0) == 0.5).all()


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"mpp": 0.0}, {"mpp": float("nan")}, {"lesion": 2}, {"quality": 101}, {"patch_um": 1.0}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SynthSettings(**wrong)
