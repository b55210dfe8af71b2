"""Visual words of tiles: against patch-by-patch arithmetic, under stains that they should not see, and at their job."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from histossl.cli.main import main
from histossl.core import hdf5
from histossl.core.errors import FileFormatError, SettingsError
from histossl.encoders.augment import STAINS
from histossl.encoders.patch_kmeans import PATCH, SCALES, STEP, PatchKMeansSettings, learn_patch_kmeans
from histossl.encoders.pretrain_tiles import TileTrainSettings, pretrain_tiles
from histossl.encoders.tile_encoder import load_encoder
from histossl.encoders.tile_stream import StreamPlan, TileSource
from histossl.execution.workers import Workers
from histossl.study.folder import Study
from histossl.wsi.geometry import Region
from histossl.wsi.synth import SynthSettings, paint_region, write_slide
from histossl.wsi.synth.recipe import plan

SMALL = PatchKMeansSettings(count=8, tiles=32, patches=2000)


class Given:
    """A stream of tiles that lie here."""

    def __init__(self, tiles: np.ndarray, settings: PatchKMeansSettings) -> None:
        self.tiles, self.plan = torch.from_numpy(tiles), StreamPlan(1, len(tiles), 1, settings.seed)

    def __call__(self, step: int) -> torch.Tensor:
        return self.tiles


def painted(slides: int, each: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles of 64 px at 1 µm in the middle of patches of three kinds of tissue, their kinds, their slides."""
    found = []
    for slide in range(slides):
        settings = SynthSettings(width=3072, height=3584, patch_um=192.0, seed=seed + slide, patient=seed + slide)
        drawn, rng = plan(settings), np.random.default_rng(seed + slide)
        for kind in range(3):
            for row, column in rng.permutation(np.argwhere(drawn.whole & (drawn.kinds == kind)))[:each]:
                found.append((paint_region(settings, Region(column * 192 + 64, row * 192 + 64, 64, 64)), kind, slide))
    tiles, kinds, of = zip(*found, strict=True)
    return np.stack(tiles), np.array(kinds), np.array(of)


@pytest.fixture(scope="module")
def tiles():
    return painted(6, 4, 70)


@pytest.fixture(scope="module")
def words(tiles):
    return learn_patch_kmeans(Given(tiles[0], SMALL), SMALL)


def rgb(amounts: np.ndarray) -> torch.Tensor:
    """(H, W, 2) amounts of hematoxylin and eosin -> (1, 3, H, W) in [0, 1]."""
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    return torch.from_numpy(np.exp(-amounts @ unit[:2])).permute(2, 0, 1)[None].float()


def test_features_are_what_every_patch_says_by_itself(words):
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.05, 1.0, (40, 44, 2))
    expected = []
    for stain in (0, 1):
        for scale in SCALES:
            k, h, w = len(expected), 40 // scale, 44 // scale
            plane = amounts[: h * scale, : w * scale, stain].reshape(h, scale, w, scale).mean((1, 3))
            said = []
            for y in range(0, h - PATCH + 1, STEP):
                for x in range(0, w - PATCH + 1, STEP):
                    patch = plane[y : y + PATCH, x : x + PATCH].ravel()
                    patch = (patch - patch.mean()) / (patch.std() + float(words.floors[k]))
                    seen = words.filters[k].numpy().reshape(-1, PATCH**2) @ patch - words.shifts[k].numpy()
                    far = np.linalg.norm(words.centres[k].numpy() - seen, axis=1)
                    said.append(np.maximum(far.mean() - far, 0))
            expected.append(np.mean(said, 0))
    np.testing.assert_allclose(words(rgb(amounts))[0], np.concatenate(expected), atol=2e-3)


def test_an_even_tint_and_the_strength_of_a_stain_hardly_matter_and_texture_does(words):
    rng = np.random.default_rng(1)
    fine, coarse = rng.uniform(0.2, 0.6, (2, 56, 56, 2))
    coarse = np.repeat(np.repeat(coarse[::8, ::8], 8, 0), 8, 1)
    of = {name: words(rgb(a))[0] for name, a in (("fine", fine), ("tinted", fine + 0.2), ("coarse", coarse))}
    strong = words(rgb(fine * 1.3))[0]
    other = (of["fine"] - of["coarse"]).norm()
    assert (of["fine"] - of["tinted"]).norm() < 0.01 * other
    assert (of["fine"] - strong).norm() < 0.25 * other


def test_words_know_tissue_better_than_a_random_network(tiles, words):
    """Nearest class mean of one half of the slides, each stained in its own way, asked of the other half."""
    pictures, kinds, slides = tiles
    shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    right = {}
    for name, encoder in (("words", words), ("random", load_encoder("random", precision="float32"))):
        x = np.concatenate([np.asarray(encoder(part)) for part in shown.split(24)])
        x = (x - x.mean(0)) / x.std(0).clip(1e-6)
        hits = []
        for half in (0, 1):
            known = slides % 2 == half
            means = np.stack([x[known & (kinds == k)].mean(0) for k in range(3)])
            guessed = np.linalg.norm(x[~known, None] - means, axis=2).argmin(1)
            hits.append(np.mean(guessed == kinds[~known]))
        right[name] = np.mean(hits)
    assert right["words"] > max(0.7, right["random"])


def test_glass_says_nothing_but_glass_and_the_same_seed_says_the_same(words, tiles):
    white = words(torch.ones(2, 3, 40, 40))
    assert torch.isfinite(white).all()
    torch.testing.assert_close(white[0], white[1])
    again, other = (learn_patch_kmeans(Given(tiles[0], s), s) for s in (SMALL, replace(SMALL, seed=1)))
    assert all(torch.equal(a, b) for a, b in zip(words.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(words.centres, other.centres)
    blank = learn_patch_kmeans(Given(np.full((4, 40, 40, 3), 255, np.uint8), SMALL), SMALL)
    assert torch.isfinite(blank(torch.rand(1, 3, 40, 40))).all()


def test_small_tiles_and_settings_out_of_range_are_refused(words):
    with pytest.raises(SettingsError, match="27 x 40 px are too small"):
        words(torch.rand(1, 3, 40, 27))
    for wrong in ({"count": 1}, {"tiles": 1}, {"count": 9, "patches": 8}):
        with pytest.raises(SettingsError):
            PatchKMeansSettings(**wrong)
    with pytest.raises(SettingsError, match="words or moco"):
        TileTrainSettings(method="dino")


def test_damaged_words_are_refused(tmp_path, words):
    from safetensors.torch import save_file

    state = words.state_dict()
    for wrong in ({"centres": state["centres"]}, {**state, "floors": torch.ones(2)}, {"centres": torch.zeros(3)}):
        save_file({k: v.contiguous() for k, v in wrong.items()}, tmp_path / "w.safetensors")
        with pytest.raises(FileFormatError, match="damaged visual words"):
            load_encoder(str(tmp_path / "w.safetensors"))

    torch.save(torch.ones(3), tmp_path / "w.pth")
    with pytest.raises(FileFormatError, match="holds a Tensor, no weights by name"):
        load_encoder(f"pickle:{tmp_path / 'w.pth'}")


@pytest.mark.slow
def test_a_run_learns_its_own_words_and_another_study_takes_them(tmp_path, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    for k in range(3):
        write_slide(slides / f"s{k}.tiff", SynthSettings(width=448, height=448, seed=k))
    flags = ["--tile.px=48", "--tile.mpp=1.3", "--workers=1"]
    small = [f"--tile-encoder.joint.words.{name}" for name in ("count=8", "tiles=24", "patches=1000")]
    assert main(["inspect", str(slides), "--out", str(tmp_path / "a"), *flags]) == 0
    views = ["--encode.views=2", "--encode.tiles=8", "--device=cpu", "--workers=1"]
    assert main(["encode", str(tmp_path / "a"), *views, *small]) == 0
    about = json.loads((tmp_path / "a/tile-encoder/config.json").read_text())
    assert about["architecture"] == "visual words, contrast and colour"
    assert about["slides"] == ["s0", "s1", "s2"]
    features = hdf5.read_features(tmp_path / "a/features/s0.h5")
    assert features.shape[1] == 64
    assert np.isfinite(features).all()

    assert main(["encoder", "pretrain", str(slides), "-o", str(tmp_path / "own"), *flags, "--device=cpu", *small]) == 0
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "own", tmp_path / "a/tile-encoder")
    ]
    assert weights[0] == weights[1]
    assert main(["inspect", str(slides), "--out", str(tmp_path / "b"), *flags]) == 0
    assert main(["encode", str(tmp_path / "b"), "--encoder", str(tmp_path / "own"), *views]) == 0
    np.testing.assert_array_equal(hdf5.read_features(tmp_path / "b/features/s0.h5"), features)
    assert "was trained on tiles" not in capsys.readouterr().err
    assert (
        main(["inspect", str(slides), "--out", str(tmp_path / "c"), "--tile.px=48", "--tile.mpp=2", "--workers=1"]) == 0
    )
    assert main(["encode", str(tmp_path / "c"), "--encoder", str(tmp_path / "own"), *views]) == 0
    assert "was trained on tiles of 1.3 µm per pixel, these are of 2" in " ".join(capsys.readouterr().err.split())


def test_a_run_joins_others_that_encode_already(tmp_path):
    write_slide(tmp_path / "s.tiff", SynthSettings(width=448, height=448))
    study = tmp_path / "study"
    flags = ["--tile.px=48", "--tile.mpp=1.3", "--workers=1"]
    assert main(["inspect", str(tmp_path / "s.tiff"), "--out", str(study), *flags]) == 0
    command = ["encode", str(study), "--encode.views=2", "--encode.tiles=8", "--device=cpu", "--workers=1"]
    small = [f"--tile-encoder.joint.words.{name}" for name in ("count=8", "tiles=24", "patches=1000")]
    with Study(study).share(print):
        ended = subprocess.run(
            [sys.executable, "-m", "histossl", *command, *small], timeout=120, capture_output=True, text=True
        )
    assert ended.returncode == 0, ended.stderr
    assert "waiting" not in ended.stderr
    assert (study / "features/s.h5").exists()


def test_a_slide_that_cannot_be_read_costs_itself_alone(tmp_path):
    write_slide(tmp_path / "good.tiff", SynthSettings(width=448, height=448))
    (tmp_path / "study").mkdir()
    flags = ["--tile.px=48", "--tile.mpp=1.3", "--workers=1"]
    assert main(["inspect", str(tmp_path), "--out", str(tmp_path / "study"), *flags]) == 0
    from histossl.wsi.tiles import TileSpec

    whole = TileSource("good", tmp_path / "good.tiff", 1.0, TileSpec(px=48, mpp=1.3), tmp_path / "study/tiles/good.h5")
    (tmp_path / "bad.tiff").write_bytes((tmp_path / "good.tiff").read_bytes()[:3000])
    bad = replace(whole, slide_id="bad", path=tmp_path / "bad.tiff")
    with Workers(1) as workers:
        unread = pretrain_tiles(
            [bad, whole], TileTrainSettings("words", words=SMALL), tmp_path / "e", tmp_path / "logs", workers, "cpu"
        )
    assert set(unread) == {"bad"}
    assert load_encoder(str(tmp_path / "e")).dim == 6 * 8
