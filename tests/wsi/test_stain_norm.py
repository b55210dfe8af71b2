"""Stain vectors of slides, and tiles in the colours of other slides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import histossl as hs
from histossl.core.errors import SettingsError
from histossl.encoders.encode import EncodeSettings
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.tile_encoder import load_encoder
from histossl.execution.workers import SerialExecutor, ThreadExecutor
from histossl.study.encode_stage import encode_study
from histossl.study.folder import Study
from histossl.study.inspect_stage import find_slides, inspect_slides
from histossl.wsi.stain import Stains
from histossl.wsi.stain_norm import METHODS, Change, Look, look_from, look_of, usual_look
from histossl.wsi.tissue import TissueSettings

TILE = hs.TileSpec(64, 1.0)


def unit(*values: float) -> np.ndarray:
    return np.array(values) / np.linalg.norm(values)


ONE = unit(0.65, 0.70, 0.29), unit(0.09, 0.95, 0.28)
OTHER = unit(0.55, 0.76, 0.34), unit(0.20, 0.88, 0.43)


def amounts(seed: int = 0, side: int = 400) -> np.ndarray:
    """(side, side, 2) of nuclei on a ground of eosin, with glass around."""
    rng = np.random.default_rng(seed)
    nuclei = ndimage.gaussian_filter(rng.normal(size=(side, side)), 3)
    found = np.stack([1.2 * (nuclei > 1.3 * nuclei.std()), 0.5 + 0.1 * rng.normal(size=(side, side))], 2)
    found[..., 1] *= found[..., 0] == 0
    inside = np.zeros((side, side, 1))
    inside[40:-40, 40:-40] = 1
    return found.clip(0) * inside


def painted(amount: np.ndarray, vectors, white: float = 245.0, strength=(1.0, 1.0)) -> np.ndarray:
    density = amount * np.array(strength) @ np.stack(vectors)
    return np.clip(np.rint((white + 1) * 10**-density - 1), 0, 255).astype(np.uint8)


def look(vectors, strength=(1.0, 1.0), white=245.0) -> Look:
    h, e = (tuple(map(float, vector)) for vector in vectors)
    return Look(Stains(h, e, (white,) * 3, 1.0), strength, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def known(picture: np.ndarray) -> Look:
    slide = hs.picture_slide(picture, 1.0)
    found = look_of(slide, hs.find_tissue(slide))
    assert found is not None
    return found


def test_the_same_tissue_in_other_stains_is_the_other_picture():
    amount = amounts()
    change = Change("macenko", look(ONE), look(OTHER, (1.4, 0.8), 230.0))
    found = change(painted(amount, ONE)[None])[0].astype(int)
    apart = np.abs(found - painted(amount, OTHER, 230.0, (1.4, 0.8)))
    assert np.quantile(apart, 0.99) <= 2
    assert apart.max() <= 6  # of 256 steps the darkest say little


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_in_its_own_colours_stays_as_it_is(method):
    picture = painted(amounts(), ONE)
    own = known(picture)
    np.testing.assert_array_equal(Change(method, own, own)(picture[None])[0], picture)


def test_estimated_vectors_are_those_that_painted():
    for vectors in (ONE, OTHER):
        found = known(painted(amounts(), vectors))
        for estimated, true in zip((found.stains.hematoxylin, found.stains.eosin), vectors, strict=True):
            assert np.dot(estimated, true) > 0.995
        assert found.strength == pytest.approx((1.2, 0.72), rel=0.1)
        assert look_from(found.numbers()).numbers() == found.numbers()


@pytest.mark.parametrize("method", METHODS)
def test_colours_come_nearer_to_the_target(method):
    one, other = painted(amounts(1), ONE), painted(amounts(2), OTHER, 230.0, (0.8, 1.2))
    changed = Change(method, known(one), known(other))(one[None])[0]
    inside = np.s_[60:-60, 60:-60]
    before, after = (np.abs(p[inside].mean((0, 1)) - other[inside].mean((0, 1))).max() for p in (one, changed))
    assert after < 0.25 * before


def test_the_median_has_unit_vectors_and_no_order():
    looks = [known(painted(amounts(k), vectors)) for k, vectors in enumerate((ONE, OTHER, ONE))]
    middle = usual_look(looks)
    assert np.linalg.norm(middle.stains.hematoxylin) == pytest.approx(1, abs=1e-3)
    assert middle.numbers() == usual_look(looks[::-1]).numbers()
    assert np.dot(middle.stains.eosin, ONE[1]) > 0.99


def test_grey_and_empty_slides_have_no_stains():
    for picture in (np.full((300, 300, 3), 244, np.uint8), painted(amounts(), ONE).mean(2, keepdims=True).repeat(3, 2)):
        slide = hs.picture_slide(picture.astype(np.uint8), 1.0)
        assert look_of(slide, hs.find_tissue(slide)) is None


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stains") / "slides"
    folder.mkdir()
    for k, vectors in enumerate((ONE, OTHER, ONE)):
        Image.fromarray(painted(amounts(k), vectors)).save(folder / f"s{k}.png", dpi=(25400, 25400))
    return folder


ENCODER = load_encoder("random", 0, "cpu", "float32")


def test_encoding_in_the_colours_of_a_slide(slides):
    plain, one = (hs.encode(slides, ENCODER, TILE, stain=stain) for stain in ("none", "s0"))
    np.testing.assert_array_equal(plain["s0"].features, one["s0"].features)
    assert np.abs(plain["s1"].features - one["s1"].features).max() > 0.01
    assert plain.made != one.made
    with pytest.raises(SettingsError, match="no slide is called so"):
        hs.encode(slides, ENCODER, TILE, stain="s9")
    with pytest.raises(SettingsError, match="stain_method"):
        EncodeSettings(stain_method="vahadane")


def test_a_study_keeps_the_target_that_it_began_with(slides, tmp_path):
    study, settings = Study(tmp_path / "out"), EncodeSettings(views=0, stain="median")

    def go(folder: Path) -> dict[str, str]:
        with study.share(lambda holder: None):
            found = find_slides(study.folder, folder)
            inspect_slides(study, found, None, TissueSettings(), TILE, SerialExecutor())
            encode_study(
                study, ENCODER, settings, lambda jobs: encode_slides(jobs, ENCODER, settings, ThreadExecutor())
            )
        return {row["slide_id"]: row["stains"] + row["status"] for row in study.slides()}

    rows = go(slides)
    assert rows["s0"].startswith("H 0.6")
    assert rows["s0"].endswith("encoded")
    target = json.loads((study.folder / "settings.json").read_text())["encode"]["stain_target"]
    (tmp_path / "more").mkdir()
    for k, colours in ((7, (OTHER, (2.0, 2.0))), (8, None)):
        picture = painted(amounts(k), ONE).mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)
        picture = picture if colours is None else painted(amounts(k), colours[0], strength=colours[1])
        Image.fromarray(picture).save(tmp_path / "more" / f"s{k}.png", dpi=(25400, 25400))
    rows = go(tmp_path / "more")
    assert rows["s7"].endswith("encoded")
    assert rows["s8"] == "failed"  # it is grey
    assert json.loads((study.folder / "settings.json").read_text())["encode"]["stain_target"] == target
