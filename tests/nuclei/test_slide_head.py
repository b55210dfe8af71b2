"""The last layer that is fitted to each slide: its optimum, its area, and what it gains on real tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from histossl.nuclei.metrics import score
from histossl.nuclei.network import NucleusNet
from histossl.nuclei.pseudo_labels import sure_nuclei
from histossl.nuclei.segmenter import NucleiSegmenter, load_method
from histossl.nuclei.settings import SegmentSettings
from histossl.nuclei.slide_head import SlideHead, fit_head
from histossl.nuclei.stain_survey import survey
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region

SYNTH = SynthSettings(width=900, height=700, mpp=0.4, seed=3)
WIDTHS = (4, 6, 8)


@pytest.fixture(scope="module")
def maps() -> list[torch.Tensor]:
    """The maps of a small untrained network on noise, (1, C, 48, 64) at full resolution."""
    x = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 4
    with torch.inference_mode():
        return NucleusNet(WIDTHS, seed=1).eval().maps(x)


def random_head(seed: int, width: float) -> SlideHead:
    generator = torch.Generator().manual_seed(seed)
    kernels = [torch.randn(2, c, 1, 1, generator=generator) * width for c in (4, 6, 8, 4)]
    return SlideHead(tuple(kernels), torch.zeros(2))


def test_a_head_weighs_the_interpolated_maps(maps: list[torch.Tensor]) -> None:
    head = random_head(2, 1)
    last, half, quarter, full = maps

    def twice(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    whole = torch.cat([last, twice(half), twice(twice(quarter)), full], 1)
    expected = F.conv2d(whole, torch.cat(head.kernels, 1))
    torch.testing.assert_close(head(maps), expected, atol=1e-4, rtol=1e-4)


def test_the_fit_finds_the_head_that_made_the_targets(maps: list[torch.Tensor]) -> None:
    made = random_head(3, 4)(maps).sigmoid()[0].numpy()
    target = np.concatenate([made, np.ones_like(made[:1])])
    with torch.inference_mode():
        # A layer that says nucleus where the targets do, so that the area has no reason to move.
        share = (made[0] > 0.5).mean()
        own = _layer_of_share(maps[0], float(share))
        found = fit_head(own, [(maps, target)], target[0].size, 100_000)(maps).sigmoid()[0].numpy()
    assert np.corrcoef(found[0].ravel(), made[0].ravel())[0, 1] > 0.99
    assert np.corrcoef(found[1].ravel(), made[1].ravel())[0, 1] > 0.99
    assert abs((found[0] > 0.5).mean() - share) < 0.03


def _layer_of_share(last: torch.Tensor, share: float) -> nn.Conv2d:
    """A last layer that calls `share` of the pixels nucleus."""
    layer = nn.Conv2d(last.shape[1], 2, 1)
    nn.init.ones_(layer.weight)
    threshold = torch.quantile(last.sum(1).flatten(), 1 - share).item()
    nn.init.constant_(layer.bias, -threshold)  # type: ignore[arg-type]
    return layer


@pytest.mark.parametrize(("taught", "own", "least", "most"), [(0.02, 0.3, 0.29, 0.31), (0.6, 0.3, 0.34, 0.37)])
def test_the_area_stays_near_that_of_the_network(
    maps: list[torch.Tensor], taught: float, own: float, least: float, most: float
) -> None:
    """Few sure nuclei do not make it less, many false ones no more than a fifth more."""
    values = random_head(5, 4)(maps)[0, 0]
    nucleus = (values > torch.quantile(values.flatten(), 1 - taught)).float().numpy()
    target = np.stack([nucleus, nucleus, np.ones_like(nucleus)])
    with torch.inference_mode():
        found = fit_head(_layer_of_share(maps[0], own), [(maps, target)], nucleus.size, 100_000)(maps)[0, 0]
    assert least <= float((found > 0).float().mean()) <= most


def test_without_sure_nuclei_the_layer_is_that_of_the_network(maps: list[torch.Tensor]) -> None:
    own = nn.Conv2d(4, 2, 1)
    target = (torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(1)) > 0.5).float().numpy()
    with torch.inference_mode():
        found = fit_head(own, [(maps, target)], target[0].size, 0)(maps)
        torch.testing.assert_close(found, own(maps[0]), atol=1e-2, rtol=0)


def test_a_slide_with_hardly_any_sure_nucleus_keeps_the_layer_of_the_network() -> None:
    method = load_method("general", "cpu")
    for side, fitted in ((400, True), (100, False)):
        known = survey(picture_slide(paint_region(SYNTH, Region(0, 0, side, side)), 0.4), method.mpp)
        assert known.stains is not None
        sure = sure_nuclei(known.fields, known.stains, method.mpp)
        assert (method.prepare(known.fields, known.stains, sure) is not None) == fitted
        assert method.prepare(known.fields, known.stains, None) is None


def test_nuclei_do_not_depend_on_the_tiles_with_a_fitted_layer() -> None:
    picture = paint_region(SYNTH, Region(0, 0, 900, 700))
    found = []
    for tile in (160, 1024):
        nuclei = NucleiSegmenter(running=SegmentSettings(tile=tile), device="cpu").segment(picture, 0.4)
        found.append({row.tobytes() for row in nuclei.measures})
    assert len(found[0]) > 50
    assert found[0] == found[1]


def test_the_fit_gains_on_real_tissue(data_dir: Path) -> None:
    names = sorted((data_dir / "nuclei/monuseg-train/images").glob("*.png"))[::6]
    fitted, plain = NucleiSegmenter.load("general", device="cpu"), NucleiSegmenter.load("general", device="cpu")
    plain.method.prepare = lambda *_: None  # type: ignore[method-assign, union-attr]
    gains = []
    for name in names:
        picture = np.asarray(Image.open(name).convert("RGB"))
        truth = np.asarray(Image.open(name.parents[1] / "labels" / name.name)).astype(np.int32)
        after, before = (score(one.predict(picture, 0.25), truth) for one in (fitted, plain))
        gains.append((after.dice - before.dice, after.aji - before.aji, after.pq - before.pq))
    assert (np.mean(gains, 0) > 0).all(), gains
