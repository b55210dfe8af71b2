"""The published method against loops written from the paper."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from histossl.core.errors import SettingsError, TrainingError
from histossl.nuclei.patch_contrast import (
    Choice,
    PatchContrast,
    _agreement,
    _cleaned,
    _disc,
    choose,
    learn_patch_contrast,
)
from histossl.nuclei.patch_sampling import (
    SIMILARITIES,
    ConfidenceNet,
    PatchContrastSettings,
    PatchContrastTask,
    Similarity,
    attended,
    draw_places,
    patch_loss,
)
from histossl.nuclei.segmenter import load_method
from histossl.nuclei.stain_survey import survey
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region

SMALL = PatchContrastSettings(crop=70, patch=20, stride=10, places=6, batch=2, channels=3, epochs=2, runs=2)


def test_the_network_has_the_published_size_and_reach() -> None:
    network = ConfidenceNet()
    assert sum(p.numel() for p in network.parameters()) == 7372
    x = torch.rand(1, 3, 201, 221, requires_grad=True)
    network.eval()(x)[0, :, 100, 110].sum().backward()
    assert x.grad is not None
    rows, columns = np.nonzero(x.grad.abs().sum((0, 1)).numpy())
    assert (rows.min(), rows.max()) == (100 - 83, 100 + 83)
    assert (columns.min(), columns.max()) == (110 - 83, 110 + 83)


def test_places_follow_entropy_and_confidence() -> None:
    torch.manual_seed(0)
    confidence = torch.full((1, 2, 70, 90), 0.5)
    confidence[:, 0, :, :40] = 0.98  # sure and positive on the left
    confidence[:, 1, :, 50:] = 0.02  # sure and negative on the right
    settings = PatchContrastSettings(crop=70, patch=20, stride=10, places=400)
    rows, columns, positive = draw_places(confidence, settings, torch.rand(2, 1, 2, 400))
    assert int(rows.max()) <= 50
    assert int(columns.max()) <= 70
    assert (columns[0, 0] < 40).float().mean() > 0.9
    assert positive[0, 0][columns[0, 0] <= 20].float().mean() > 0.9
    assert positive[0, 1][columns[0, 1] >= 50].float().mean() < 0.1


def test_attended_patches_are_image_times_confidence() -> None:
    image, confidence = torch.rand(2, 3, 40, 50), torch.rand(2, 3, 40, 50)
    rows, columns = torch.randint(0, 20, (2, 3, 4)), torch.randint(0, 30, (2, 3, 4))
    found = attended(image, confidence, rows, columns, 20)
    for b in range(2):
        for c in range(3):
            for n in range(4):
                y, x = int(rows[b, c, n]), int(columns[b, c, n])
                want = image[b, :, y : y + 20, x : x + 20] * confidence[b, c, y : y + 20, x : x + 20]
                torch.testing.assert_close(found[c, b * 4 + n], want)


@pytest.mark.parametrize("kind", ["mse", "cross_entropy", "kl"])
def test_similarities_equal_their_formulas(kind: str) -> None:
    patches = torch.rand(4, 3, 5, 5) * 0.9 + 0.05
    found = Similarity(kind)(patches)
    for i in range(4):
        for j in range(4):
            a, b = patches[i].flatten(), patches[j].flatten()
            if kind == "mse":
                want = -((a - b) ** 2).mean()
            elif kind == "cross_entropy":
                want = (a * b.log() + (1 - a) * (1 - b).log()).mean()
            else:
                p, q = a / a.sum(), b / b.sum()
                want = -(p * (p / q).log()).sum()
            assert float(found[i, j]) == pytest.approx(float(want), abs=1e-5)


def test_every_similarity_prefers_a_patch_to_noise() -> None:
    torch.manual_seed(1)
    patches = torch.rand(5, 3, 16, 16) * 0.9 + 0.05
    patches[1] = (patches[0] + torch.randn(3, 16, 16) * 0.01).clamp(0.01, 0.99)
    for kind in SIMILARITIES:
        found = Similarity(kind)(patches)
        assert found.shape == (5, 5)
        assert torch.isfinite(found).all()
        if kind != "cosine":  # untrained features tell little
            assert found[0, 1] > found[0, 2:].max()


def test_the_loss_equals_a_triple_loop() -> None:
    torch.manual_seed(2)
    channels, count = 3, 5
    similarity = torch.randn(channels * count, channels * count, dtype=torch.float64)
    positive = torch.rand(channels, count) < 0.5
    positive[:, 0], positive[:, 1] = True, False
    flat = [(c, n) for c in range(channels) for n in range(count)]
    terms: dict[str, list[float]] = {"within": [], "between": []}
    for i, (ci, ni) in enumerate(flat):
        for j, (cj, nj) in enumerate(flat):
            if ci != cj or not positive[ci, ni] or not positive[cj, nj]:
                continue
            own = [math.exp(similarity[i, k]) for k, (c, n) in enumerate(flat) if c == ci and not positive[c, n]]
            far = [math.exp(similarity[i, k]) for k, (c, n) in enumerate(flat) if c != ci and positive[c, n]]
            terms["within"].append(math.log(sum(own)) - float(similarity[i, j]))
            terms["between"].append(math.log(sum(far)) - float(similarity[i, j]))
    want = np.mean(terms["within"]) + 0.7 * np.mean(terms["between"])
    assert float(patch_loss(similarity, positive, 0.7)) == pytest.approx(want, rel=1e-6)


def test_a_channel_of_one_kind_does_not_break_the_batch() -> None:
    similarity = torch.randn(8, 8, requires_grad=True)
    loss = patch_loss(similarity, torch.tensor([[True] * 4, [False] * 4]))
    loss.backward()
    assert torch.isfinite(loss)
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


def test_learning_repeats_and_chooses_by_hematoxylin(tmp_path: Path) -> None:
    picture = paint_region(SynthSettings(width=300, height=240, mpp=0.25, seed=1), Region(0, 0, 300, 240))
    known = survey(picture_slide(picture, 0.25), 0.25)
    assert known.stains is not None
    models = [learn_patch_contrast(known.fields, SMALL, tmp_path / str(k), "cpu") for k in range(2)]
    a, b = (model.confidence(picture, known.stains, 0.5) for model in models)
    np.testing.assert_array_equal(a, b)
    assert a.shape == (2, 240, 300)
    assert 0 <= models[0].choice.channel < 3
    models[0].save(tmp_path / "model")
    again = load_method(str(tmp_path / "model"))
    np.testing.assert_array_equal(again.confidence(picture, known.stains, 0.5), a)
    assert (tmp_path / "0" / "1" / "log.csv").exists()
    with pytest.raises(TrainingError):
        learn_patch_contrast([picture[:60, :60]], SMALL, tmp_path / "small", "cpu")


def test_settings_out_of_range_are_errors() -> None:
    with pytest.raises(SettingsError):
        PatchContrastSettings(similarity="colour")
    with pytest.raises(SettingsError):
        PatchContrastSettings(patch=301)
    loss, gauges = PatchContrastTask(SMALL)((torch.rand(2, 3, 70, 70), torch.rand(2, 2, 3, 6)))
    assert loss.isfinite()
    assert set(gauges) == {"separation", "positive"}


def test_the_channel_of_hematoxylin_is_taken_either_way_round() -> None:
    picture = paint_region(SynthSettings(width=900, height=800, mpp=0.25, seed=1), Region(300, 300, 200, 240))
    known = survey(picture_slide(picture, 0.25), 0.25)
    assert known.stains is not None

    class Red(ConfidenceNet):
        """Channel 1 is bright where red passes, which is where no hematoxylin is."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            flat = torch.full_like(image[:, :1], 0.5)
            return torch.cat([flat, image[:, :1], flat], 1)

    found = choose(Red(3), SMALL, [picture])
    assert (found.channel, found.inverted) == (1, True)
    assert found.agreement > 0.8


def test_cleaning_before_a_threshold_is_cleaning_after_it() -> None:
    rng = np.random.default_rng(4)
    values = ndimage.gaussian_filter(rng.random((60, 80)), 1.5).astype(np.float32)
    for threshold in np.quantile(values, [0.2, 0.5, 0.8]):
        mask = ndimage.binary_opening(np.pad(values > threshold, 4), _disc(3))
        mask = ndimage.binary_closing(mask, _disc(1))[4:-4, 4:-4]
        np.testing.assert_array_equal(_cleaned(values, SMALL) > threshold, mask)


def test_agreement_finds_the_best_of_all_thresholds() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 12, 400).astype(np.float32)
    mask = values + rng.normal(0, 3, 400) > 7
    tried = {t: 2 * ((values > t) & mask).sum() / ((values > t).sum() + mask.sum()) for t in np.arange(-1.0, 12)}
    threshold, dice = _agreement(values, mask)
    assert dice == pytest.approx(max(tried.values()))
    assert tried[threshold] == pytest.approx(dice)


def test_a_saved_model_runs_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    PatchContrast(SMALL, ConfidenceNet(SMALL.channels), Choice(1, True)).save(tmp_path)
    for device in ("cpu", "meta"):
        found = PatchContrast.load(tmp_path, device)
        assert {weight.device.type for weight in found.network.parameters()} == {device}
    with pytest.raises(SettingsError, match="unknown device 'gpu'"):
        PatchContrast.load(tmp_path, "gpu")
