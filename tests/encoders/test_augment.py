"""The composed augmentation against the same steps, one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from histossl.core.errors import SettingsError
from histossl.encoders.augment import (
    LUMA,
    Augmentation,
    AugmentSettings,
    augment,
    blend,
    draw_augmentation,
    saturate,
    scale_rgb,
    to_float,
    turn_hue,
)

STILL = np.eye(2, 3, dtype=np.float32)
PLAIN = np.eye(3, 4, dtype=np.float32)


@pytest.fixture
def tiles() -> torch.Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3))
    return torch.from_numpy(noise.astype(np.uint8))


def test_nothing_drawn_changes_nothing(tiles):
    out = augment(tiles, Augmentation(PLAIN, STILL, 0.0))
    assert out.shape == (2, 3, 12, 20)
    torch.testing.assert_close(out, to_float(tiles), atol=1e-5, rtol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_colours_equal_the_steps_one_by_one(tiles):
    x = tiles.numpy() / 255
    grey = (x @ LUMA)[..., None]
    stepwise = 1.2 * x
    stepwise = 0.7 * stepwise + 0.3 * 0.7
    luma = (stepwise @ LUMA)[..., None]
    stepwise = 0.6 * stepwise + 0.4 * luma
    colour = (saturate(0.6) @ blend(0.7, 0.7) @ scale_rgb(1.2))[:3].astype(np.float32)
    out = augment(tiles, Augmentation(colour, STILL, 0.0)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(out, stepwise.clip(0, 1), atol=1e-5)
    gone = augment(tiles, Augmentation(saturate(0)[:3].astype(np.float32), STILL, 0.0)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gone, np.repeat(grey, 3, axis=-1), atol=1e-5)


def test_hue_turns_around_and_keeps_greys():
    third = turn_hue(1 / 3)[:3, :3]
    np.testing.assert_allclose(third @ [1, 0, 0], [0, 1, 0], atol=1e-12)  # red becomes green
    np.testing.assert_allclose(np.linalg.matrix_power(turn_hue(0.2), 5), np.eye(4), atol=1e-12)
    np.testing.assert_allclose(turn_hue(0.13)[:3, :3] @ [0.4, 0.4, 0.4], [0.4, 0.4, 0.4], atol=1e-12)


def test_geometry_equals_affine_grid(tiles):
    affine = np.array([[0.6, -0.3, 0.1], [0.2, 0.7, -0.15]], np.float32)
    x = to_float(tiles)
    grid = F.affine_grid(torch.from_numpy(affine).expand(2, 2, 3), [2, 3, 12, 20], align_corners=False)
    expected = F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)
    torch.testing.assert_close(augment(tiles, Augmentation(PLAIN, affine, 0.0)), expected, atol=1e-5, rtol=0)


def test_mirror_is_a_mirror(tiles):
    mirror = np.array([[-1, 0, 0], [0, 1, 0]], np.float32)
    out = augment(tiles, Augmentation(PLAIN, mirror, 0.0))
    torch.testing.assert_close(out, to_float(tiles).flip(3), atol=1e-5, rtol=0)


def test_blur_equals_scipy(tiles):
    from scipy.ndimage import gaussian_filter

    out = augment(tiles, Augmentation(PLAIN, STILL, 0.8)).permute(0, 2, 3, 1).numpy()
    expected = gaussian_filter(tiles.numpy() / 255.0, (0, 0.8, 0.8, 0), truncate=2 / 0.8, mode="reflect")
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_all_tiles_share_one_augmentation(tiles):
    same = tiles[:1].expand(3, -1, -1, -1)
    out = augment(same, draw_augmentation(AugmentSettings(), np.random.default_rng(3)))
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


def test_drawn_augmentations_stay_in_their_domain():
    rng = np.random.default_rng(0)
    mirrored, grey, blurred = 0, 0, 0
    for _ in range(400):
        t = draw_augmentation(AugmentSettings(rotate=False), rng)
        area = abs(np.linalg.det(t.affine[:, :2]))
        assert 0.45 <= area <= 1.0 + 1e-6
        assert (np.abs(t.affine[:, 2]) + np.abs(np.diag(t.affine)) <= 1 + 1e-6).all()  # the crop lies inside the tile
        mirrored += np.linalg.det(t.affine[:, :2]) < 0
        grey += np.linalg.matrix_rank(t.colour[:, :3], tol=1e-4) == 1
        blurred += t.sigma > 0
        assert t.sigma == 0 or 0.1 <= t.sigma <= 1
    assert 160 < mirrored < 240
    assert 50 < grey < 115
    assert 160 < blurred < 240


def test_the_same_generator_draws_the_same():
    one, two = (draw_augmentation(AugmentSettings(), np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one.colour, two.colour)
    assert np.array_equal(one.affine, two.affine)
    assert one.sigma == two.sigma


@pytest.mark.parametrize("wrong", [{"crop": 0}, {"flip": 1.5}, {"hue": 0.7}, {"brightness": -0.1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        AugmentSettings(**wrong)
