"""Artefacts: painted over synthetic and real tissue, found by kind, and left out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.artefacts import KINDS, LIMITS, tile_scores, with_pixels
from histossl.wsi.density import opened
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import (
    PAINTED,
    Artefact,
    SynthSettings,
    artefacts_of,
    draw_artefacts,
    paint_artefacts,
    paint_region,
)
from histossl.wsi.tiles import TileSpec, qc_picture, tile_grid
from histossl.wsi.tissue import TissueSettings, find_tissue

PX = 224
SEED = 1  # of the shapes: three layers, 100 µm wide; a wide stroke


def scored(rgb, mpp=1.0):
    """Places of the tiles of a picture, and their scores."""
    slide = picture_slide(rgb, mpp)
    grid = tile_grid(slide, find_tissue(slide, TissueSettings(pens=False)), TileSpec(PX, mpp))
    tiles = np.stack([rgb[y : y + PX, x : x + PX] for x, y in grid.xy])
    assert grid.artefacts is not None
    return grid.xy, with_pixels(grid.artefacts.scores, tile_scores(tiles, mpp))


@pytest.fixture(scope="module")
def tissue(data_dir):
    """(2400, 2400, 3) at 1 µm: real fields of one patient. Painted fat has the walls of bubbles, and no grain to blur."""
    files = sorted((data_dir / "cohort" / "lymphoma" / "slides").glob("sj-05-6124-R4*"))[:16]
    fields = [np.asarray(Image.open(file).convert("RGB").reduce(2)) for file in files]
    rows = [np.concatenate(fields[k : k + 4], 1) for k in range(0, 16, 4)]
    return np.tile(np.concatenate(rows), (2, 2, 1))[:2400, :2400]


@pytest.mark.parametrize("kind", PAINTED)
def test_a_painted_artefact_is_found_where_it_is(tissue, kind):
    size = {"fold": 1200, "blur": 600, "bubble": 400, "dirt": 150}.get(kind, 1500)
    painted, (cover,) = paint_artefacts(tissue, 1.0, [Artefact(kind, 1250.0, 1150.0, size, 0.4, SEED)])
    xy, scores = scored(painted)
    shares = np.array([cover[y : y + PX, x : x + PX].mean() for x, y in xy])
    k = KINDS.index(kind)
    found = scores[:, k] >= LIMITS[k]
    assert found[shares >= 1.3 * LIMITS[k]].mean() >= 0.8
    assert found[shares == 0].mean() <= 0.02
    others = [KINDS.index(other) for other in PAINTED if other != kind]
    assert (scores[:, others] >= LIMITS[others]).any(1).mean() < 0.03  # as of clean tissue


def test_a_fold_is_painted_on_tissue_alone():
    settings = SynthSettings(1200, 1000, seed=2)
    clean = paint_region(settings, Region(0, 0, 1200, 1000))
    painted, (cover,) = paint_artefacts(clean, 1.0, [Artefact("fold", 560.0, 120.0, 1200, 1.5, SEED)])
    assert cover.any()
    changed = (np.abs(painted.astype(int) - clean) > 12).any(2)
    assert (changed & ~ndimage.binary_dilation(cover, iterations=6)).mean() < 1e-3


def test_clean_tissue_has_no_artefacts(tissue):
    _, scores = scored(tissue)
    assert len(scores) > 50
    assert (scores >= LIMITS).any(1).mean() < 0.03


def of_kind(rgb, kind):
    """(h, w) where the overview of a picture of 4 µm per pixel is of a kind."""
    return find_tissue(picture_slide(rgb, 4.0), TissueSettings(pens=False, mpp=4.0)).kinds == 1 + KINDS.index(kind)


def grained(density):
    """A picture of optical densities, with the grain of cells."""
    grain = 1 + 0.25 * ndimage.gaussian_filter(np.random.default_rng(0).normal(size=density.shape[:2]), 1)[..., None]
    return np.clip(256 * 10 ** -(density * grain) - 1, 0, 255).astype(np.uint8)


EOSIN = np.array([0.12, 0.4, 0.25])


def test_a_rim_that_stains_more_and_more_is_no_fold():
    """The same density at its end, over the same length: a fold has a step beside it."""
    away = np.abs(np.arange(600) - 300) * 4.0  # µm from a line
    soft, step = 1 + 1.2 * np.exp(-((away / 130) ** 2)), np.where(away < 50, 2.2, 1)
    wide = np.where(np.abs(np.arange(600) - 300) < 150, 1, 0)[:, None]
    found = [of_kind(grained((1 + (rise[None] - 1) * wide)[..., None] * EOSIN), "fold").mean() for rise in (soft, step)]
    assert found[0] == 0
    assert found[1] > 0.005


def test_a_band_of_another_colour_is_no_fold():
    """Epithelium on connective tissue: more of hematoxylin, not more of both."""
    band = (np.abs(np.arange(600) - 300) * 4.0 < 50)[None, :, None] & (np.abs(np.arange(600) - 300) < 150)[
        :, None, None
    ]
    epithelium, layers = np.array([0.5, 0.75, 0.45]), 2.2 * EOSIN
    assert not of_kind(grained(np.where(band, epithelium, EOSIN)), "fold").any()
    assert of_kind(grained(np.where(band, layers, EOSIN)), "fold").any()


def test_folds_that_cross_are_all_found():
    """Three in a row, the second the palest: together they are no even band."""
    width, height = 1536, 1792
    form = SynthSettings(width, height, seed=10001, patient=10001, composition=1, arrangement=1, lesion=0)
    clean = paint_region(form, Region(0, 0, width, height))
    painted, covers = paint_artefacts(clean, 1.0, artefacts_of(replace(form, artefacts=("fold",) * 3)))
    kinds = find_tissue(picture_slide(painted, 1.0), TissueSettings(pens=False)).kinds
    found = np.asarray(Image.fromarray(kinds == 1 + KINDS.index("fold")).resize((width, height)))
    assert min(found[cover].mean() for cover in covers) > 0.5


@pytest.mark.parametrize(
    ("x", "y", "fold"),
    [
        (408, 1200, Artefact("fold", 600.0, 704.0, 566, 1.12, 510711971)),
        (0, 632, Artefact("fold", 112.0, 600.0, 1256, 2.49, 613919456)),
    ],
)
def test_a_fold_is_followed_to_its_ends_and_past_fat(x, y, fold):
    """Fat cuts both into a band and pieces that are too short to be told alone."""
    form = SynthSettings(2400, 2400, seed=2006, patient=2006, composition=0, arrangement=1, lesion=1)
    painted, (cover,) = paint_artefacts(paint_region(form, Region(x, y, 1200, 1200)), 1.0, [fold])
    kinds = find_tissue(picture_slide(painted, 1.0), TissueSettings(pens=False)).kinds
    found = np.asarray(Image.fromarray(kinds == 1 + KINDS.index("fold")).resize((1200, 1200)))
    assert found[cover].mean() > 0.8  # .6 of it are in the bands alone
    assert found[~cover].mean() < 0.02


def test_a_heap_of_dust_on_dark_tissue_is_no_fold():
    """Specks of 70 µm side by side, and a band as opaque that is longer."""
    y, x = (np.mgrid[:600, :600] - 300) * 4.0
    heap = np.any([np.hypot(y, x - middle) < 35 for middle in (-60, 0, 60)], 0)
    band = (np.abs(y) < 35) & (np.abs(x) < 300)
    dark = np.array([0.55, 0.6, 0.5]) * (y < 1100)[..., None]  # below is glass
    found = [of_kind(grained(np.where(where[..., None], 1.25, dark)), "fold").any() for where in (heap, band)]
    assert found == [False, True]


def test_what_lies_between_two_bubbles_is_none(tissue):
    """They touch each other, and the border cuts both, so that their rims enclose tissue between them."""
    bubbles = [Artefact("bubble", x, 380.0, 400, 0.0, SEED) for x in (800.0, 1580.0)]
    painted, covers = paint_artefacts(tissue, 1.0, bubbles)
    cover = covers.any(0)
    kinds = find_tissue(picture_slide(painted, 1.0)).kinds == 1 + KINDS.index("bubble")
    found = np.asarray(Image.fromarray(kinds).resize(cover.shape[::-1]))
    assert found[cover].mean() > 0.95
    between = np.zeros_like(cover)
    between[:380, 800:1580] = True
    between &= ~ndimage.binary_dilation(cover, iterations=40)
    assert between.sum() > 10_000
    assert found[between].mean() < 0.05


@pytest.mark.parametrize("apart", [240, 420, 640])
def test_bubbles_that_overlap_are_found_whole(tissue, apart):
    """Where rims cross, the largest parts of either bubble are crescents, which do not bulge."""
    bubbles = [Artefact("bubble", x, 1150.0, 400, 0.0, SEED) for x in (1000.0, 1000.0 + apart)]
    painted, covers = paint_artefacts(tissue, 1.0, bubbles)
    kinds = find_tissue(picture_slide(painted, 1.0)).kinds == 1 + KINDS.index("bubble")
    found, cover = np.asarray(Image.fromarray(kinds).resize((2400, 2400))), covers.any(0)
    assert found[cover].mean() > 0.95
    assert found[~ndimage.binary_dilation(cover, iterations=16)].mean() < 0.01


def test_dark_tissue_that_hangs_on_a_rim_is_no_bubble():
    """A net of black lines around one side of a ring: a part of the rim, by its width, and full of small holes."""
    y, x = np.mgrid[:600, :600] * 4.0
    ring = np.abs(np.hypot(y - 1200, x - 1200) - 400) < 16
    net = ((y % 48 < 12) | (x % 48 < 12)) & (x > 1500) & (x < 2200) & (abs(y - 1200) < 300)
    net &= np.hypot(y - 1200, x - 1200) > 400
    found = of_kind(grained(np.where((ring | net)[..., None], 1.0, EOSIN)), "bubble")
    disc = np.hypot(y - 1200, x - 1200) < 400
    assert found[disc].mean() > 0.95
    assert not found[np.hypot(y - 1200, x - 1200) > 500].any()
    holes = np.hypot(y % 400 - 200, x % 400 - 200) < 100  # as large as small bubbles
    alone = ((y % 48 < 12) | (x % 48 < 12)) & (x > 1200) & ~holes
    assert not of_kind(grained(np.where(alone[..., None], 1.0, EOSIN)), "bubble").any()


def test_a_faint_rim_over_dark_tissue_is_found(data_dir):
    """Nuclei there are nearly as dark as the rim, which is in pieces where only what is far darker counts."""
    file = data_dir / "nuclei/monuseg-train/images/TCGA-DK-A2I6-01A-01-TS1.png"
    field = np.asarray(Image.open(file).convert("RGB").reduce(4))
    field = np.pad(field, ((0, 1600 - len(field)), (0, 1600 - field.shape[1]), (0, 0)), "symmetric")
    painted, (cover,) = paint_artefacts(field, 1.0, [Artefact("bubble", 800.0, 784.0, 409, 2.5, 1509554944)])
    for rgb, most in ((painted, 1.0), (field, 0.0)):
        kinds = find_tissue(picture_slide(rgb, 1.0)).kinds == 1 + KINDS.index("bubble")
        found = np.asarray(Image.fromarray(kinds).resize((1600, 1600)))
        assert found[cover].mean() == pytest.approx(most, abs=0.05)


@pytest.mark.parametrize(("radius", "dirt"), [(5, False), (10, True)])
def test_dark_nuclei_are_no_dirt_and_specks_are(radius, dirt):
    """Twenty discs as black as each other: what counts is how large each of them is."""
    y, x = np.mgrid[:PX, :PX]
    near = np.hypot(x % 44 - 22, y % 56 - 28)
    tile = np.where(near < radius, 30, 190).astype(np.uint8)[None, ..., None].repeat(3, 3)
    score = tile_scores(tile, 1.0)[0, 1]
    assert (score >= LIMITS[KINDS.index("dirt")]) == dirt
    if dirt:
        assert score == pytest.approx((near < radius).mean(), rel=0.25)


@pytest.mark.parametrize(
    ("colour", "dirt"),
    [
        ((24, 20, 16), True),  # brown and black dust
        ((18, 18, 18), True),
        ((10, 7, 8), True),  # dust on dark tissue
        ((30, 12, 28), False),  # layers of dark tissue: two of H&E, and of nuclei alone
        ((16, 14, 36), False),
        ((30, 24, 30), False),  # the rim of a bubble over dark tissue
    ],
)
def test_what_lets_blue_pass_is_no_dirt(colour, dirt):
    """H&E absorbs green most; dirt does not. Some of what is dark at once may be nuclei that it touches."""
    tile = np.full((1, PX, PX, 3), (190, 120, 170), np.uint8)
    tile[0, 60:100, 60:100] = colour
    if dirt:
        tile[0, 60:100, 100:110] = (30, 12, 34)
    noisy = tile + np.random.default_rng(0).normal(0, 3, tile.shape)
    found = tile_scores(np.clip(np.rint(noisy), 0, 255).astype(np.uint8), 1.0)[0, 1] >= LIMITS[KINDS.index("dirt")]
    assert found == dirt


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 6), st.integers(0, 99))
def test_opened_is_the_grey_opening(rows, columns, half, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    assert np.array_equal(opened(values, 2 * half + 1), ndimage.grey_opening(values, 2 * half + 1))


def test_regions_of_a_slide_with_artefacts_agree():
    settings = SynthSettings(1200, 1000, seed=2, artefacts=("fold", "blur", "bubble", "dirt", "pen-blue"))
    whole = paint_region(settings, Region(0, 0, 1200, 1000))
    clean = paint_region(SynthSettings(1200, 1000, seed=2), Region(0, 0, 1200, 1000))
    assert len(artefacts_of(settings)) == 5
    assert 0.05 < (whole != clean).any(2).mean() < 0.9
    for x, y in itertools.product((0, 411), (0, 377)):
        part = paint_region(settings, Region(x, y, 300, 250))
        assert np.array_equal(part, whole[y : y + 250, x : x + 300])


def test_the_picture_that_is_painted_over_stays():
    clean = np.full((200, 200, 3), 200, np.uint8)
    far, near = (Artefact("pen-blue", at, at, 100, 0.0, SEED) for at in (9000.0, 100.0))
    painted, covers = paint_artefacts(clean, 1.0, [far, near])
    assert (clean == 200).all()
    assert not covers[0].any()
    assert (painted != clean).any(2)[covers[1]].all()


def test_unknown_kinds_are_refused():
    with pytest.raises(SettingsError, match="smudge"):
        TissueSettings(drop=("smudge",))
    with pytest.raises(SettingsError, match="smudge"):
        draw_artefacts(["smudge"], np.zeros((1, 2)), np.random.default_rng(0))


def test_the_qc_picture_has_a_colour_a_kind(tissue):
    painted, _ = paint_artefacts(tissue, 1.0, [Artefact("fold", 1250.0, 1150.0, 1200, 0.4, SEED)])
    slide = picture_slide(painted, 1.0)
    mask = find_tissue(slide)
    picture = qc_picture(slide, mask, tile_grid(slide, mask, TileSpec()))
    with_it, without = (np.isin(mask.kinds, k).mean() for k in (1 + KINDS.index("fold"), 1 + KINDS.index("pen-red")))
    assert with_it > 0.005
    assert without == 0
    red, _, blue = np.moveaxis(picture.astype(int), -1, 0)
    assert (red - blue > 60).mean() > 0.003  # orange, of which H&E has nothing
    clean = picture_slide(tissue, 1.0)
    without_fold = qc_picture(clean, find_tissue(clean), tile_grid(clean, find_tissue(clean), TileSpec()))
    assert (without_fold[..., 0].astype(int) - without_fold[..., 2] > 60).mean() < 0.001


def test_fat_is_coloured_only_where_it_is_dropped():
    slide = picture_slide(paint_region(SynthSettings(1600, 1600, seed=3), Region(0, 0, 1600, 1600)), 1.0)
    mask = find_tissue(slide)
    grid, fat = tile_grid(slide, mask, TileSpec()), mask.kinds == 1 + KINDS.index("empty")
    assert 0.005 < fat.mean() < 0.3
    alone = replace(mask, kinds=np.where(fat, mask.kinds, 0).astype(np.uint8))
    bare = qc_picture(slide, replace(mask, kinds=np.zeros_like(mask.kinds)), grid)
    np.testing.assert_array_equal(qc_picture(slide, alone, grid), bare)
    coloured = qc_picture(slide, replace(alone, drop=("empty",)), grid)
    assert (coloured != bare).any(2).mean() > 0.5 * fat.mean()


@pytest.mark.parametrize("name", ["TCGA-CR-7395-01A-01-TS1.svs", "CPTAC-C3L-00601-26.tiff"])
def test_real_slides_show_few(data_dir, name):
    """Looked at: edges of the tissue are dense, which is a few tiles. (Epidermis is taken for folds: no skin here.)"""
    with open_slide(data_dir / "slides" / name, mpp_default=1.0) as slide:
        grid = tile_grid(slide, find_tissue(slide), TileSpec())
    assert grid.artefacts is not None
    assert (grid.artefacts.scores[:, : KINDS.index("blood")] >= LIMITS[: KINDS.index("blood")]).any(1).mean() < 0.08


@pytest.mark.parametrize(("name", "told"), [("monusac-A9K0_3.svs", 1.0), ("monusac-A9K0_1.svs", 0.0)])
def test_a_real_field_of_blood_is_blood(data_dir, name, told):
    with open_slide(data_dir / "slides" / name, mpp_default=1.0) as slide:
        kinds = find_tissue(slide).kinds
    assert (kinds == 1 + KINDS.index("blood")).mean() == pytest.approx(told, abs=0.01)
