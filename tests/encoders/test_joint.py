"""Words with contrast and colour: what each is, that a stain hardly moves them, and that they come back from disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.joint import PLAIN, Joint, JointSettings, draw_stain, learn_joint, restain
from histossl.encoders.patch_kmeans import PATCH, STEP, PatchKMeansSettings
from histossl.encoders.tile_encoder import load_encoder, save_encoder
from histossl.encoders.tile_stream import StreamPlan

SMALL = JointSettings(PatchKMeansSettings(count=4, tiles=24, patches=600), nuisances=3, axes=8)


class Given:
    """A stream of tiles that lie here: six slides of four."""

    def __init__(self, tiles: np.ndarray) -> None:
        self.total = len(tiles)
        self.tiles, self.plan = torch.from_numpy(tiles), StreamPlan(1, len(tiles), 6, 0)

    def __call__(self, step: int) -> torch.Tensor:
        return self.tiles


def stained(seed: int, slides: int = 6) -> np.ndarray:
    """(4 slides, 40, 40, 3) uint8: noise of two grains, every slide darker or paler than the last."""
    rng = np.random.default_rng(seed)
    tiles = []
    for k in range(slides):
        for grain in (1, 4, 1, 4):
            amounts = np.kron(rng.uniform(0.1, 0.9, (40 // grain, 40 // grain, 1)), np.ones((grain, grain, 1)))
            tiles.append(255 * np.exp(-amounts * [0.6, 0.9, 0.4] * (0.7 + 0.1 * k)))
    return np.stack(tiles).round().astype(np.uint8)


def shown(tiles: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def joint() -> Joint:
    return learn_joint(Given(stained(0)), SMALL)


def test_contrast_and_colour_are_plain_arithmetic(joint: Joint) -> None:
    tile = shown(stained(1)[:1])
    plain = joint.words.described(tile)[1][0].double().numpy()
    density = -np.log(tile[0].double().numpy())
    np.testing.assert_allclose(plain[:3], density.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(plain[3:6], density.std((1, 2)), atol=1e-5)
    plane = joint.words.planes(tile)[0][0, 0].double().numpy()
    patches = np.lib.stride_tricks.sliding_window_view(plane, (PATCH, PATCH))[::STEP, ::STEP]
    mean, deviation = patches.mean((2, 3)), patches.std((2, 3))
    logarithm = np.log(deviation + float(joint.words.floors[0]))
    expected = [mean.mean(), logarithm.mean(), deviation.mean(), mean.std(), logarithm.std()]
    np.testing.assert_allclose(plain[6:11], expected, atol=1e-4)


def test_both_sides_weigh_the_same(joint: Joint) -> None:
    found = joint.balanced(shown(stained(0)))
    assert found.shape == (24, 6 * 4 + PLAIN)
    for side in (found[:, :24], found[:, 24:]):
        torch.testing.assert_close(side.var(0, correction=0).sum(), torch.tensor(1.0), atol=0.15, rtol=0)


def test_another_stain_moves_a_slide_less_than_without_its_directions(joint: Joint) -> None:
    without = learn_joint(Given(stained(0)), replace(SMALL, nuisances=0))
    rng, kept, all_of_it = np.random.default_rng(9), 0.0, 0.0
    for k in range(6):
        tiles = shown(stained(2)[4 * k : 4 * k + 4])
        again = restain(tiles, draw_stain(SMALL, rng))
        kept += float((joint(again) - joint(tiles)).mean(0).norm())
        all_of_it += float((without(again) - without(tiles)).mean(0).norm())
    assert kept < 0.5 * all_of_it


def test_axes_are_evened_out_by_the_root_of_their_variance_and_columns_share_them() -> None:
    without = learn_joint(Given(stained(0)), replace(SMALL, nuisances=0))
    tiles = shown(stained(0))
    covariance = torch.cov(without(tiles).double().T, correction=0)
    columns, variances = covariance.diagonal(), torch.linalg.eigvalsh(covariance).flip(0)
    torch.testing.assert_close(variances.mean(), torch.tensor(1.0, dtype=torch.float64), atol=1e-3, rtol=0)
    assert columns.max() / columns.min() < 0.5 * variances[0] / variances[-1]
    weights = torch.tensor([1.0] * 24 + [SMALL.plain] * PLAIN, dtype=torch.float64)
    inside = torch.cov((without.balanced(tiles).double() * weights).T, correction=0)
    expected = torch.linalg.eigvalsh(inside).flip(0)[:8].sqrt()
    torch.testing.assert_close(variances / variances[0], expected / expected[0], atol=1e-3, rtol=1e-3)


def test_an_encoder_of_before_the_axes_gives_what_it_gave(joint: Joint) -> None:
    stain = torch.linalg.qr(torch.randn(6 * 4 + PLAIN, 3, generator=torch.Generator().manual_seed(0)))[0]
    old = {name: value for name, value in joint.state_dict().items() if name != "axes"} | {"stain": stain}
    found, tiles = Joint.of(old), shown(stained(3)[:5])
    rows = found.balanced(tiles)
    assert found.dim == 6 * 4 + PLAIN
    torch.testing.assert_close(found(tiles), rows - (rows @ stain) @ stain.T, atol=1e-5, rtol=1e-5)


def test_the_same_tiles_give_the_same_bytes_and_a_folder_gives_the_encoder_back(joint: Joint, tmp_path: Path) -> None:
    again = learn_joint(Given(stained(0)), SMALL).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in joint.state_dict().items())
    save_encoder(joint, tmp_path / "e", {"tile": {"mpp": 1.0}})
    found = load_encoder(str(tmp_path / "e"), device="cpu")
    assert (found.dim, found.mpp, found.dtype) == (8, 1.0, torch.float32)
    tiles = shown(stained(3)[:5])
    torch.testing.assert_close(found(tiles), joint(tiles), atol=1e-5, rtol=1e-5)
    broken = {name: value for name, value in joint.state_dict().items() if name != "shift"}
    (tmp_path / "broken").mkdir()
    from safetensors.torch import save_file

    save_file(broken, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(FileFormatError, match="damaged visual words"):
        load_encoder(str(tmp_path / "broken"), device="cpu")


def test_tiles_of_glass_give_finite_features_and_settings_are_checked() -> None:
    glass = learn_joint(Given(np.full((24, 40, 40, 3), 255, np.uint8)), SMALL)
    assert torch.isfinite(glass(shown(stained(0)[:2]))).all()
    with pytest.raises(SettingsError, match="nuisances"):
        JointSettings(nuisances=-1)
    with pytest.raises(SettingsError, match="axes"):
        JointSettings(axes=0)
