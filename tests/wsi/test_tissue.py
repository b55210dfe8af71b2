"""Tissue: found on pale, dark, pen-marked and multi-piece slides and on fields without glass, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from histossl.core.errors import SettingsError
from histossl.wsi.density import blurred, optical_density, within
from histossl.wsi.slide import Slide, find_slides, open_slide
from histossl.wsi.tissue import TissueSettings, find_tissue

HEIGHT, WIDTH = 650, 900  # at 4 µm per pixel: 2.6 by 3.6 mm
MPP = 4.0
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # hematoxylin and eosin, optical density in R, G, B
GLASS = (243, 243, 244)
PENS = {
    "blue": (30, 60, 180),
    "dark blue": (25, 30, 90),
    "green": (20, 120, 60),
    "light green": (120, 200, 120),
    "teal": (20, 130, 130),
    "black": (25, 25, 27),
    "red": (210, 30, 45),
}


def pieces(*ellipses: tuple[float, float, float, float]) -> np.ndarray:
    """(H, W) bool of ellipses (centre row, centre column, radii), as parts of the height and of the width."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    shape = np.zeros((HEIGHT, WIDTH), bool)
    for row, column, tall, wide in ellipses:
        shape |= ((y / HEIGHT - row) / tall) ** 2 + ((x / WIDTH - column) / wide) ** 2 < 1
    return shape


PIECE = pieces((0.55, 0.6, 0.33, 0.25))


def paint(tissue: np.ndarray, strength: float = 1.0, glass=GLASS, seed: int = 0, noise: float = 1.5) -> np.ndarray:
    """H&E on the tissue: eosin everywhere, hematoxylin in blobs, and a camera's noise."""
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.random(tissue.shape), 1.5)
    blobs = np.clip((blobs - blobs.mean()) / blobs.std(), 0, 3)
    density = 0.25 * blobs[..., None] * STAINS[0] + 0.25 * STAINS[1]
    picture = np.array(glass) * 10 ** -(strength * density * tissue[..., None])
    return np.clip(np.rint(picture + rng.normal(0, noise, picture.shape)), 0, 255).astype(np.uint8)


def slide_of(folder: Path, picture: np.ndarray, mpp: float = MPP) -> Slide:
    Image.fromarray(picture).save(folder / "slide.png", compress_level=0)
    return open_slide(folder / "slide.png", mpp=mpp)


def found(folder: Path, picture: np.ndarray, mpp: float = MPP, settings: TissueSettings | None = None) -> np.ndarray:
    """The mask at the size of the picture."""
    with slide_of(folder, picture, mpp) as slide:
        tissue = find_tissue(slide, settings)
    assert tissue.size == slide.size
    assert tissue.mask.dtype == bool
    height, width = picture.shape[:2]
    return np.asarray(Image.fromarray(tissue.mask).resize((width, height), Image.Resampling.NEAREST))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("strength", [0.2, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("glass", [GLASS, (255, 255, 255), (245, 238, 222), (222, 229, 240), (75, 75, 74)])
def test_pale_and_dark_tissue_is_found_on_all_glass(tmp_path, strength, glass):
    mask = found(tmp_path, paint(PIECE, strength, glass))
    assert overlap(mask, PIECE) > 0.93


def test_all_pieces_are_found_and_no_dust(tmp_path):
    truth = pieces((0.2, 0.2, 0.12, 0.1), (0.3, 0.7, 0.2, 0.15), (0.75, 0.3, 0.15, 0.2), (0.8, 0.8, 0.04, 0.04))
    picture = paint(truth)
    rng = np.random.default_rng(1)
    for y, x in zip(rng.integers(0, HEIGHT - 3, 60), rng.integers(0, WIDTH - 3, 60), strict=True):
        if not truth[y - 20 : y + 20, x - 20 : x + 20].any():
            picture[y : y + 2, x : x + 2] = 90
    mask = found(tmp_path, picture)
    assert ndimage.label(mask)[1] == 4
    assert overlap(mask, truth) > 0.9


def test_small_holes_belong_to_the_tissue_and_large_ones_do_not(tmp_path):
    small, large = pieces((0.55, 0.5, 0.02, 0.015)), pieces((0.55, 0.7, 0.14, 0.08))
    mask = found(tmp_path, paint(PIECE & ~small & ~large))
    assert mask[small].all()
    assert mask[ndimage.binary_erosion(large, iterations=8)].sum() == 0


@pytest.mark.parametrize("pen", PENS)
def test_pen_marks_are_no_tissue(tmp_path, pen):
    picture = Image.fromarray(paint(PIECE))
    ink = Image.new("L", picture.size)
    draw = ImageDraw.Draw(ink)
    draw.line([(40, 60), (400, 30), (820, 90)], fill=235, width=50, joint="curve")
    draw.line([(60, 500), (560, 330)], fill=235, width=50)  # over the tissue
    colour = Image.fromarray(
        np.clip(np.random.default_rng(2).normal(PENS[pen], 4, (HEIGHT, WIDTH, 3)), 0, 255).astype("u1")
    )
    picture.paste(colour, mask=ink)
    inked = np.asarray(ink) > 0
    mask = found(tmp_path, np.asarray(picture))
    assert mask[inked].mean() < 0.02
    assert overlap(mask, PIECE & ~inked) > 0.85
    unaware = found(tmp_path, np.asarray(picture), settings=TissueSettings(pens=False))
    assert unaware[inked].mean() > 0.2


@pytest.mark.parametrize("colour", [(255, 255, 255), GLASS, (240, 236, 226), (128, 128, 128), (60, 60, 62), (2, 2, 2)])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_an_empty_slide_has_no_tissue(tmp_path, colour, noise):
    picture = paint(np.zeros((HEIGHT, WIDTH), bool), glass=colour, noise=noise)
    assert not found(tmp_path, picture).any()
    assert not found(tmp_path, picture[:150, :220], mpp=0.5).any()


def test_nothing_is_taken_for_ink_where_there_is_nothing(tmp_path):
    Image.fromarray(np.full((400, 400, 3), 245, np.uint8)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", 8.0) as slide:
        assert not find_tissue(slide).ink_note


def test_a_scanners_margin_is_no_tissue(tmp_path):
    picture = paint(PIECE)
    picture[:, :80] = 4
    picture[-40:] = 128
    mask = found(tmp_path, picture)
    assert not mask[:-60, :60].any()
    assert overlap(mask[:-60], PIECE[:-60]) > 0.9


@pytest.mark.parametrize("glass", [GLASS, (196, 203, 192)])
@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_a_field_that_is_all_tissue_is_all_tissue(tmp_path, glass, strength):
    picture = paint(np.ones((HEIGHT, WIDTH), bool), strength, glass)
    assert found(tmp_path, picture).all()
    assert found(tmp_path, picture[:190, :260], mpp=0.5).all()


def test_grey_tissue_is_known_by_its_texture(tmp_path):
    grey = paint(np.ones((HEIGHT, WIDTH), bool)).mean(2, keepdims=True).repeat(3, axis=2).astype(np.uint8)
    assert found(tmp_path, grey[:190, :260], mpp=0.5).all()


def test_mirrored_slides_have_mirrored_tissue(tmp_path):
    picture = paint(PIECE)
    mask = found(tmp_path, picture)
    np.testing.assert_array_equal(found(tmp_path, picture[:, ::-1]), mask[:, ::-1])
    np.testing.assert_array_equal(found(tmp_path, picture[::-1]), mask[::-1])
    assert (found(tmp_path, np.swapaxes(picture, 0, 1)) != mask.T).mean() < 1e-3  # rows are filtered before columns


def test_tissue_does_not_depend_on_the_scanners_mpp(tmp_path):
    picture = paint(PIECE)
    finer = np.asarray(Image.fromarray(picture).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC))
    mask = found(tmp_path, picture)
    assert overlap(found(tmp_path, finer, mpp=MPP / 2)[::2, ::2], mask) > 0.98


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (3, 2000), (40, 7)])
def test_slides_of_a_few_pixels_do_no_harm(tmp_path, height, width):
    white = np.full((height, width, 3), 255, np.uint8)
    assert not found(tmp_path, white).any()
    assert found(tmp_path, np.full_like(white, (190, 90, 160))).all()


@pytest.mark.parametrize("values", [{"mpp": 0}, {"blur": -1}, {"threshold": float("nan")}, {"hole": -1}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(SettingsError, match=next(iter(values))):
        TissueSettings(**values)


# --- real slides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("CMU-1-Small-Region.svs", 0.35, 0.5),
        ("CPTAC-C3L-00601-26.tiff", 0.28, 0.36),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.55, 0.72),
        ("monusac-A9K0_1.svs", 0.9, 1.0),
        ("monusac-A9K0_2.svs", 0.9, 1.0),
        ("monusac-A9K0_3.svs", 0.9, 1.0),  # blood, red as red ink
    ],
)
def test_real_slides(data_dir, name, least, most):
    """The bounds are read off the slides by eye."""
    with open_slide(data_dir / "slides" / name, mpp_default=1.0) as slide:
        assert least <= find_tissue(slide).mask.mean() <= most


def test_real_fields_without_glass_are_kept_whole(data_dir):
    paths = find_slides(data_dir / "cohort" / "lymphoma" / "slides")[::40]
    assert len(paths) > 8
    for path in paths:
        with open_slide(path, mpp_default=0.5) as slide:
            assert find_tissue(slide).mask.mean() > 0.97, path.name


@pytest.mark.parametrize("shape", [(300, 211), (97, 260, 3)])
def test_a_wide_window_is_laid_over_blocks(shape):
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    values[:40] += 3
    wanted = ndimage.gaussian_filter(values, 90, mode="nearest", axes=(0, 1))
    np.testing.assert_allclose(blurred(values, 90), wanted, atol=0.05 * values.max())


@pytest.mark.parametrize("distance", [0.7, 1.0, 1.5, 5.7, 8.0, 8.5])
def test_a_mask_is_widened_by_a_distance(distance):
    """Row by row or by all distances: what lies as near, and nothing else."""
    for share in (0.0, 0.01, 0.3):
        mask = np.random.default_rng(1).random((41, 67)) < share
        near = ndimage.distance_transform_edt(~mask) <= distance if mask.any() else mask
        np.testing.assert_array_equal(within(mask, distance), near)


def test_whole_numbers_have_the_densities_of_fractions():
    rgb = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    glass = np.array([240, 200, 250], np.float32)
    np.testing.assert_array_equal(optical_density(rgb, glass), optical_density(rgb.astype(np.float32), glass))
