"""Special stains on real structure: tissue is found as on H&E, and ink is still told from it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

import histossl as hs
from histossl.wsi.geometry import Region
from histossl.wsi.tissue import TissueMask, TissueSettings, find_tissue

MPP = 8.0
SLIDES = ("CPTAC-C3L-00601-26.tiff", "TCGA-CR-7395-01A-01-TS1.svs")
DYES = {  # optical density in R, G, B
    "hematoxylin": (0.65, 0.70, 0.29),
    "eosin": (0.07, 0.99, 0.11),
    "fast red": (0.21, 0.85, 0.48),
    "pas": (0.18, 0.95, 0.25),
    "aniline blue": (0.80, 0.593, 0.089),
    "scarlet": (0.10, 0.75, 0.65),
    "alcian blue": (0.874, 0.458, 0.158),
    "congo red": (0.10, 0.80, 0.55),
    "dab": (0.27, 0.57, 0.78),
    "light green": (0.75, 0.25, 0.61),
}
STAINS = {  # what takes hematoxylin's place, and what takes eosin's, in two kinds of areas
    "PAS": ("hematoxylin", "pas", "pas"),
    "Masson": ("hematoxylin", "aniline blue", "scarlet"),
    "Masson, collagen alone": ("hematoxylin", "aniline blue", "aniline blue"),
    "Goldner": ("hematoxylin", "light green", "scarlet"),
    "Alcian blue in the nuclei's place": ("alcian blue", "fast red", "fast red"),
    "Alcian blue": ("fast red", "alcian blue", "alcian blue"),
    "Congo red": ("hematoxylin", "congo red", "congo red"),
    "DAB": ("hematoxylin", "dab", "eosin"),
    "DAB everywhere": ("dab", "dab", "dab"),
}
PENS = {"blue": (30, 60, 180), "green": (20, 120, 60), "black": (25, 25, 27)}


def dye(name: str) -> np.ndarray:
    return np.array(DYES[name]) / np.linalg.norm(DYES[name])


@functools.cache
def concentrations(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of hematoxylin and eosin, 0 on glass; the picture; and the tissue of H&E."""
    with hs.open_slide(path, mpp_default=1.0) as slide:
        picture = slide.read(Region.whole(slide.size), MPP)
    tissue = find_tissue(hs.picture_slide(picture, MPP)).mask
    density = -np.log10(np.clip(picture, 8, None) / np.percentile(picture.reshape(-1, 3), 99, axis=0))
    amounts = np.clip(density @ np.linalg.pinv(np.stack([dye("hematoxylin"), dye("eosin")])), 0, None)
    return amounts * ndimage.binary_dilation(tissue, iterations=2)[..., None], picture, tissue


def stained(path: str, stain: str) -> tuple[np.ndarray, np.ndarray]:
    """The slide in another stain, and its tissue as H&E shows it."""
    amounts, picture, tissue = concentrations(path)
    nuclei, one, other = (dye(name) for name in STAINS[stain])
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=tissue.shape), 10)
    part = 1 / (1 + np.exp(-3 * field / field.std()))[..., None]
    density = amounts[..., :1] * nuclei + amounts[..., 1:] * (part * one + (1 - part) * other)
    glass = np.where((amounts.max(2) > 0)[..., None], np.percentile(picture.reshape(-1, 3), 99, axis=0), picture)
    return np.clip(glass * 10**-density, 0, 255).astype(np.uint8), tissue


def found(picture: np.ndarray, settings: TissueSettings | None = None) -> TissueMask:
    return find_tissue(hs.picture_slide(picture, MPP), settings)


@pytest.mark.parametrize("stain", STAINS)
@pytest.mark.parametrize("name", SLIDES)
def test_tissue_of_special_stains_is_found_whole(data_dir, name, stain):
    picture, tissue = stained(str(data_dir / "slides" / name), stain)
    result = found(picture)
    assert (result.mask & tissue).sum() / (result.mask | tissue).sum() >= 0.95
    assert result.ink < 0.02
    assert not result.ink_note


@pytest.mark.parametrize("pen", PENS)
@pytest.mark.parametrize("stain", ["PAS", "Masson", "Alcian blue", "DAB"])
def test_ink_over_special_stains_is_no_tissue(data_dir, stain, pen):
    picture, tissue = stained(str(data_dir / "slides" / SLIDES[1]), stain)
    stroke = Image.new("L", picture.shape[1::-1])
    width, height = stroke.size
    ImageDraw.Draw(stroke).line([(20, height - 40), (width * 2 // 3, height // 3)], fill=255, width=30)
    inked = np.asarray(stroke) > 0
    colours = np.random.default_rng(1).normal(PENS[pen], 3, picture.shape).clip(0, 255)
    result = found(np.where(inked[..., None], colours, picture).astype(np.uint8))
    assert result.mask[inked].mean() < 0.05
    assert result.mask[tissue & ~np.asarray(ndimage.binary_dilation(inked, iterations=8), bool)].mean() > 0.97


@pytest.mark.parametrize("name", ["aniline blue", "alcian blue", "congo red", "light green", "dab", "pas"])
def test_an_uneven_piece_of_one_dye_is_tissue(name):
    """Structure without a slide at hand: densities vary by a third within some 40 µm."""
    rng = np.random.default_rng(0)
    blobs = ndimage.gaussian_filter(rng.normal(size=(400, 500)), 2.5)
    amount = np.zeros(blobs.shape)
    amount[80:320, 100:400] = (0.5 * (1 + blobs / blobs.std() / 3)).clip(0)[80:320, 100:400]
    picture = np.clip(245 * 10 ** -(amount[..., None] * dye(name)) + rng.normal(0, 1.5, (400, 500, 3)), 0, 255)
    result = found(picture.astype(np.uint8))
    assert (result.mask & (amount > 0)).sum() / (result.mask | (amount > 0)).sum() > 0.93
    assert result.ink < 0.02


@pytest.mark.parametrize("name", ["aniline blue", "alcian blue", "dab", "pas"])
def test_a_piece_of_one_dye_with_nothing_but_grain_is_tissue(name):
    rng = np.random.default_rng(0)
    amount = np.zeros((750, 750))
    amount[100:650, 100:650] = 0.35 + 0.08 * rng.normal(size=(550, 550))
    picture = np.clip(245 * 10 ** -(amount.clip(0)[..., None] * dye(name)) + rng.normal(0, 1.5, (750, 750, 3)), 0, 255)
    result = find_tissue(hs.picture_slide(picture.astype(np.uint8), 4.0))
    assert result.ink < 0.02
    assert result.mask.mean() == pytest.approx((550 / 750) ** 2, rel=0.05)
