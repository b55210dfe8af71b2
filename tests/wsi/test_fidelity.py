"""Slides as scanners really write them: many levels, levels that are not what they say, blank macros, little tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import histossl as hs
from histossl.core.errors import SlideError
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.tissue import TissueSettings

WIDTH, HEIGHT, MPP = 3072, 2048, 1.0
PIECE = (slice(500, 1300), slice(800, 2000))  # rows, columns of tissue


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    found = np.full((HEIGHT, WIDTH, 3), 243, np.uint8)
    small = rng.normal((190, 110, 170), 25, (200, 300, 3)).clip(0, 255).astype(np.uint8)
    found[PIECE] = small.repeat(4, 0).repeat(4, 1)
    return found


def write(path: Path, levels: list[np.ndarray], more: list[np.ndarray] = (), stated=None) -> Path:
    """A tiled pyramid whose levels state a resolution, and further pages that are no level."""
    with tifffile.TiffWriter(path) as tiff:
        for k, level in enumerate(levels):
            mpp = MPP * levels[0].shape[1] / level.shape[1] if stated is None else stated[k]
            about = {"tile": (256, 256), "photometric": "rgb", "metadata": None, "subfiletype": int(k > 0)}
            tiff.write(level, resolution=(1e4 / mpp,) * 2, resolutionunit="CENTIMETER", **about)
        for page in more:
            tiff.write(page, photometric="rgb", metadata=None, subfiletype=1, rowsperstrip=page.shape[0])
    return path


def resized(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX))


def mask_of(path: Path) -> np.ndarray:
    with open_slide(path) as slide:
        return hs.find_tissue(slide).mask


def share(mask: np.ndarray) -> float:
    """Intersection over union with the painted piece."""
    truth = np.zeros((HEIGHT, WIDTH), bool)
    truth[PIECE] = True
    whole = np.asarray(Image.fromarray(mask).resize((WIDTH, HEIGHT)))
    return (truth & whole).sum() / (truth | whole).sum()


def test_ten_levels_show_one_picture(picture, tmp_path):
    levels = [resized(picture, max(1, WIDTH >> k), max(1, HEIGHT >> k)) for k in range(10)]
    path = write(tmp_path / "a.tif", levels)
    with open_slide(path) as slide:
        assert len(slide.levels) == 10
        for k in range(6):
            found = slide.read(Region.whole(slide.size), MPP * 2**k).astype(int)
            assert np.abs(found - levels[k]).mean() < 3, k
        assert slide.thumbnail(64).shape[:2] == (43, 64)
    assert share(mask_of(path)) > 0.96


@pytest.mark.parametrize("stated", [None, (MPP, 4 * MPP, 4 * MPP)], ids=["odd size", "and a false resolution"])
def test_levels_that_are_not_what_they_say_show_tissue_where_it_is(picture, tmp_path, stated):
    """A level of 1,500 pixels is said to be half of 3,072; its pixels are larger than stated."""
    levels = [picture, resized(picture, 1500, 1000), resized(picture, 700, 470)]
    path = write(tmp_path / "a.tif", levels, stated=stated)
    assert share(mask_of(path)) > 0.96
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(MPP, rel=1e-3)
        for mpp in (2.0, 2.1, 4.0):
            found = slide.read(Region(800, 500, 1200, 800), mpp).astype(int)
            assert (np.abs(found - 243).max(2) > 12).mean() > 0.97, mpp  # tissue alone
            edge = slide.read(Region(400, 500, 380, 800), mpp).astype(int)
            assert np.abs(edge - 243).max() < 12, mpp  # glass alone


@pytest.mark.parametrize("macro", [np.full((300, 700, 3), 255, np.uint8), np.zeros((300, 700, 3), np.uint8)])
def test_a_blank_macro_changes_nothing(picture, tmp_path, macro):
    levels = [picture, resized(picture, WIDTH // 4, HEIGHT // 4)]
    plain, with_it = write(tmp_path / "a.tif", levels), write(tmp_path / "b.tif", levels, [macro])
    np.testing.assert_array_equal(mask_of(plain), mask_of(with_it))


def test_tissue_smaller_than_a_tile_is_told_and_can_be_had(tmp_path):
    rng = np.random.default_rng(0)
    picture = np.full((1200, 1500, 3), 243, np.uint8)
    picture[500:620, 700:840] = rng.normal((190, 110, 170), 25, (120, 140, 3)).clip(0, 255)
    path = write(tmp_path / "a.tif", [picture])

    def survey(least: float):
        spec = hs.TileSpec(224, MPP, min_tissue=least)
        places = tmp_path / "t.h5", tmp_path / "q.jpg"
        return survey_slide(SurveyJob("a", path, None, None, TissueSettings(), spec, *places))

    with pytest.raises(SlideError, match=r"no tile of tissue found.*min-tissue"):
        survey(0.5)
    assert survey(0.05).tiles >= 1


@pytest.mark.parametrize("border", [0, 40], ids=["black", "dark grey"])
def test_black_borders_of_a_scanner_are_no_tissue(picture, tmp_path, border):
    framed = picture.copy()
    framed[:300], framed[:, :250], framed[:, -200:] = border, border, border
    mask = mask_of(write(tmp_path / "a.tif", [framed, resized(framed, WIDTH // 4, HEIGHT // 4)]))
    assert share(mask) > 0.95


def test_two_scenes_are_both_found(picture, tmp_path):
    both = np.concatenate([picture, np.full((HEIGHT, 900, 3), 243, np.uint8), picture[:, ::-1]], 1)
    mask = mask_of(write(tmp_path / "a.tif", [both, resized(both, both.shape[1] // 4, HEIGHT // 4)]))
    halves = mask[:, : mask.shape[1] // 2], mask[:, mask.shape[1] // 2 :]
    assert all(half.sum() > 0.45 * mask.sum() for half in halves)
