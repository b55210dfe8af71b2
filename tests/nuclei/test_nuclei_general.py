"""The model that comes with the package, what it is adapted by, and what both do with bad input."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from histossl.cli import nuclei_commands as commands
from histossl.cli import nuclei_score
from histossl.core.errors import SettingsError, SlideError, TrainingError
from histossl.nuclei.adapt import _parted, adapt, judge, of_same_area
from histossl.nuclei.augment import paled
from histossl.nuclei.evidence import with_sure_nuclei
from histossl.nuclei.export import label_image
from histossl.nuclei.instances import MEASURES
from histossl.nuclei.metrics import score
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.pseudo_labels import PseudoLabelSettings, sure_nuclei, targets
from histossl.nuclei.segmenter import GENERAL, NucleiSegmenter, load_method, samples
from histossl.nuclei.self_training import Sample, SelfTraining
from histossl.nuclei.settings import AdaptSettings, SegmentSettings, SelfTrainingSettings
from histossl.nuclei.stain_survey import finer, survey
from histossl.nuclei.tiled_inference import segment_slide
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, nuclei_in, paint_region

SYNTH = SynthSettings(width=900, height=700, mpp=0.4, seed=3)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(400, 500, 3) of painted tissue at 0.4 µm."""
    return paint_region(SYNTH, Region(0, 0, 500, 400))


@pytest.fixture(scope="module")
def general() -> SelfTraining:
    method = load_method("general", "cpu")
    assert isinstance(method, SelfTraining)
    return method


@pytest.fixture(scope="module")
def sample(picture: np.ndarray) -> Sample:
    known = survey(picture_slide(picture, 0.4), 0.5)
    assert known.stains is not None
    return Sample(known.fields, known.stains)


def test_general_comes_with_its_card_and_is_small() -> None:
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in GENERAL.iterdir()}
    assert (GENERAL / "model.safetensors").stat().st_size < 900_000
    card = (GENERAL / "README.md").read_text("utf-8")
    for word in ("NuInsSeg", "CC BY 4.0", "benchmarks/learn_general.py", "without labels", "Limits"):
        assert word in card


def test_general_finds_painted_nuclei_at_once(picture: np.ndarray) -> None:
    truth, _ = nuclei_in(SYNTH, Region(0, 0, 500, 400))
    assert score(NucleiSegmenter(device="cpu").predict(picture, 0.4), truth).dice > 0.6


def test_small_nuclei_are_read_finer_and_measured_in_truth(picture: np.ndarray, general: SelfTraining) -> None:
    # At half its mpp the tissue looks as if its nuclei had a quarter of their area.
    slide = picture_slide(picture, 0.2)
    known = survey(slide, 0.5, support=PseudoLabelSettings())
    assert 0.25 <= known.tile_mpp < 0.5
    assert survey(picture_slide(picture, 0.6), 0.5, support=PseudoLabelSettings()).tile_mpp == 0.5
    found = [segment_slide(slide, known, general, SegmentSettings(tile=tile)) for tile in (2048, 132)]
    a, b = (set(map(bytes, part.measures)) for part in found)
    assert len(a) > 30
    assert a == b
    squares = shapely.area(found[0].polygons()) * 0.2**2
    np.testing.assert_allclose(found[0].measures[:, MEASURES.index("area_um2")], squares, rtol=1e-3)
    truth, _ = nuclei_in(SYNTH, Region(0, 0, 500, 400))
    whole = segment_slide(slide, survey(slide, 0.5), general, SegmentSettings())
    dice = [score(label_image(nuclei, slide.size), truth).dice for nuclei in (found[0], whole)]
    assert dice[0] > dice[1] + 0.05


@given(usual=st.floats(0.1, 1e4), more=st.floats(1, 100))
def test_pictures_are_the_finer_the_smaller_nuclei_are(usual: float, more: float) -> None:
    assert 0.25 <= finer(0.5, usual) <= finer(0.5, usual * more) <= 0.5
    assert finer(0.5, 0) == finer(0.5, 40) == 0.5 > finer(0.5, 20)


def test_the_command_takes_general_and_learns_nothing(picture: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert commands.segment([tmp_path / "a.png"], out=tmp_path / "o", mpp_default=0.4, workers=1) == 0
    assert not (tmp_path / "o" / "model").exists()
    assert tifffile.imread(tmp_path / "o" / "a.tif").max() > 20


@pytest.mark.parametrize("name", ["prior", "general"])
def test_a_name_goes_before_a_folder_that_is_called_the_same(
    name: str, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert commands.segment([Path("a.png")], out=Path(name), model=name, mpp_default=0.4, workers=1) == 0
    assert tifffile.imread(tmp_path / name / "a.tif").max() > 20


def test_doubt_about_hematoxylin_is_a_warning(caplog: pytest.LogCaptureFixture, picture: np.ndarray) -> None:
    # A red cast takes the red from hematoxylin.
    density = -np.log10((picture.astype(float) + 1) / 256)
    density[..., 0] *= 0.3
    red = np.clip(np.rint(10**-density * 256 - 1), 0, 255).astype(np.uint8)
    with caplog.at_level(logging.WARNING):
        known = survey(picture_slide(red, 0.4), 0.5)
    assert known.stains is not None
    assert not known.stains.has_hematoxylin
    assert "look whether" in caplog.text
    with pytest.raises(TrainingError, match="hematoxylin"):
        samples([known], 0)


def test_bad_pictures(general: SelfTraining) -> None:
    segmenter = NucleiSegmenter(device="cpu")
    segmenter.method = general
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.integers(40, 250, (128, 128, 1), np.uint8), 3, 2)
    with pytest.raises(SlideError, match="greyscale"):
        segmenter.predict(grey, 0.5)
    assert not segmenter.predict(np.full((64, 64, 3), 244, np.uint8), 0.25).any()
    small = paint_region(SYNTH, Region(0, 0, 64, 64))
    assert segmenter.predict(small, 0.4).shape == (64, 64)
    dark = np.zeros((200, 200, 3), np.uint8)  # as fluorescence: hardly anything is bright
    dark[50:60, 50:60, 2] = 200
    assert segmenter.predict(dark, 0.5).shape == (200, 200)
    low = picture_10x()
    assert segmenter.predict(low, 1.0).shape == low.shape[:2]


def picture_10x() -> np.ndarray:
    synth = replace(SYNTH, mpp=1.0)
    return paint_region(synth, Region(0, 0, 300, 200))


def test_paled_nuclei_keep_their_place_and_lose_contrast(sample: Sample) -> None:
    (labelled,) = sure_nuclei(sample.fields, sample.stains, 0.5).labels
    pale = paled(labelled, np.random.default_rng(0))
    inside = labelled.labels > 0
    assert inside.any()
    np.testing.assert_array_equal(pale.labels, labelled.labels)
    assert (pale.density <= labelled.density + 1e-6).all()
    lost = labelled.density[inside].mean() - pale.density[inside].mean()
    assert lost > 0.05
    from scipy import ndimage

    far = ~ndimage.binary_dilation(inside, iterations=5)
    np.testing.assert_allclose(pale.density[far], labelled.density[far], atol=1e-5)


def test_sure_nuclei_support_a_network_and_change_nothing_elsewhere(sample: Sample) -> None:
    (rgb,), tree = sample.fields, sure_nuclei(sample.fields, sample.stains, 0.5).tree
    (labelled,) = sure_nuclei(sample.fields, sample.stains, 0.5).labels
    sure = labelled.labels > 0
    assert sure.any()
    for level in (0.0, 0.3, 1.0):
        blank = np.full((2, *rgb.shape[:2]), level, np.float32)
        kept = blank.copy()
        raised = with_sure_nuclei(blank, rgb, sample.stains, tree, 0.5)
        np.testing.assert_array_equal(blank, kept)
        assert raised.dtype == np.float32
        np.testing.assert_array_equal(raised[:, ~sure], blank[:, ~sure])
        odds = np.e * level / (1 - level) if level < 1 else np.inf
        np.testing.assert_allclose(raised[0][sure], odds / (1 + odds) if level < 1 else 1, rtol=1e-5)
        np.testing.assert_allclose(raised[1][sure], (level + targets(labelled)[1][sure]) / 2, atol=1e-6)


def test_a_field_is_told_by_the_thresholds_of_its_slide(sample: Sample) -> None:
    """Sure nuclei of a part are those of the whole, away from the cut."""
    (rgb,), tree = sample.fields, sure_nuclei(sample.fields, sample.stains, 0.5).tree
    blank = np.full((2, *rgb.shape[:2]), 0.4, np.float32)
    whole = with_sure_nuclei(blank, rgb, sample.stains, tree, 0.5)
    part = with_sure_nuclei(blank[:, 8:, 12:], rgb[8:, 12:], sample.stains, tree, 0.5)
    np.testing.assert_array_equal(part[:, 96:-1, 96:-1], whole[:, 104:-1, 108:-1])


def test_faint_pixels_weigh_what_they_should(sample: Sample) -> None:
    settings = PseudoLabelSettings(pale=0.3, faint=0.02)
    (plain,) = sure_nuclei(sample.fields, sample.stains, 0.5).labels
    (labelled,) = sure_nuclei(sample.fields, sample.stains, 0.5, settings).labels
    assert not plain.faint.any()
    assert labelled.faint.any()
    assert not (labelled.faint & (labelled.doubtful | (labelled.labels > 0))).any()
    weights = targets(labelled, settings)[2]
    assert set(np.unique(weights[labelled.faint])) <= {np.float32(0.02), np.float32(1)}  # 1 beside a sure nucleus


def test_an_adapted_model_calls_as_much_nucleus_as_the_one_before(general: SelfTraining, sample: Sample) -> None:
    state = {name: value.clone() for name, value in general.network.state_dict().items()}
    state["head.weight"] *= 0.8
    state["head.bias"] += 1.5
    network = NucleusNet(general.settings.widths)
    network.load_state_dict(state)
    greedy = SelfTraining(general.settings, network, "cpu")
    level = of_same_area(greedy, general, [sample])
    before, without, after = (
        np.mean([one.confidence(field, sample.stains)[0] > 0.5 for field in sample.fields])
        for one in (general, greedy, level)
    )
    assert without > 1.1 * before
    assert after == pytest.approx(before, rel=0.05)


def test_an_adapted_model_that_is_no_better_is_sent_away(general: SelfTraining, sample: Sample, tmp_path: Path) -> None:
    settings = AdaptSettings(steps=2, margin=1.0)
    result = adapt([sample], general, settings, tmp_path / "logs", "cpu")
    assert not result.helped
    assert result.model is general
    taken = adapt([sample], general, replace(settings, margin=-1.0), tmp_path / "logs", "cpu")
    assert taken.helped
    assert taken.model is not general


def test_what_is_judged_was_not_learned_from(sample: Sample) -> None:
    fields = [np.full((8, 10, 3), k, np.uint8) for k in range(6)]
    samples = [Sample(fields[:2], sample.stains), Sample(fields[2:], sample.stains)]
    for held in (4, 100):
        taught, judged = _parted(samples, held)
        sizes = [sum(field.size for s in lot for field in s.fields) for lot in (taught, judged)]
        assert sum(sizes) == 6 * 240
        assert min(sizes) > 0
    seen = [int(field[0, 0, 0]) for s in _parted(samples, 4)[1] for field in s.fields]
    assert seen == [3]


def test_the_judge_prefers_a_trained_network(general: SelfTraining, sample: Sample) -> None:
    untrained = SelfTraining(SelfTrainingSettings(), NucleusNet(seed=1), "cpu")
    good, bad = (judge(model, [sample], SelfTrainingSettings()) for model in (general, untrained))
    assert good.mean > bad.mean + 0.2
    assert 0 <= good.sure <= 1
    assert 0 <= good.steady <= 1


def test_adapt_says_what_it_did_and_what_cannot_be_adapted(
    picture: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(np.full((60, 90, 3), 255, np.uint8)).save(tmp_path / "white.png")
    out, settings = tmp_path / "o", AdaptSettings(steps=2, margin=1.0)
    arguments = {"out": out, "adapt": True, "mpp_default": 0.4, "workers": 1, "adapting": settings}
    assert commands.segment([tmp_path / "a.png"], **arguments) == 0
    assert "did not help, general stands" in capsys.readouterr().err
    assert json.loads((out / "model" / "config.json").read_text())["method"] == SelfTraining.name
    assert commands.segment([tmp_path / "white.png"], **(arguments | {"out": tmp_path / "p"})) == 0
    assert "general stands as it is" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="prior cannot be adapted"):
        commands.segment([tmp_path / "a.png"], **arguments, model="prior")
    with pytest.raises(SettingsError, match="held >= 2"):
        AdaptSettings(held=1)


def test_score_by_area_and_darkness(picture: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, _ = nuclei_in(SYNTH, Region(0, 0, 500, 400))
    Image.fromarray(picture).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "t.tif", truth)
    pair = tmp_path / "t.tif", tmp_path / "t.tif"
    assert nuclei_score.score(*pair, by="area,darkness", images=tmp_path / "a.png", mpp=0.4) == 0
    told = capsys.readouterr()
    assert "darkness" in told.out + told.err
    assert "1.000" in told.out + told.err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_general_beats_the_prior_on_real_images(data_dir: Path) -> None:
    names = sorted((data_dir / "nuclei/monuseg-train/images").glob("*.png"))[::6]
    for metric in ("dice", "aji", "pq"):
        ours, theirs = (
            np.mean([getattr(_scored(NucleiSegmenter.load(model), name), metric) for name in names])
            for model in ("general", "prior")
        )
        assert ours > theirs


def _scored(segmenter: NucleiSegmenter, name: Path):
    truth = np.asarray(Image.open(name.parents[1] / "labels" / name.name)).astype(np.int32)
    return score(segmenter.predict(np.asarray(Image.open(name))[..., :3], 0.25), truth)
