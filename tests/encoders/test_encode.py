"""Features and views against reading each tile and running the network on it alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from histossl.core import fingerprints, hdf5
from histossl.encoders import encode, forward
from histossl.encoders.augment import augment
from histossl.encoders.encode import EncodeJob, EncodeSettings, draw_plan
from histossl.encoders.encode_slides import encode_slides
from histossl.encoders.forward import encode_tiles
from histossl.encoders.tile_choice import choose_tiles
from histossl.encoders.tile_encoder import load_encoder
from histossl.execution.workers import Workers
from histossl.study.survey import SurveyJob, survey_slide
from histossl.wsi import tile_files
from histossl.wsi.geometry import Region
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, write_slide
from histossl.wsi.tiles import TileSpec
from histossl.wsi.tissue import TissueSettings

SPEC = TileSpec(px=48, mpp=1.3)
SETTINGS = EncodeSettings(views=3, tiles=10, window=4, batch=7, precision="float32")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> list[EncodeJob]:
    folder = tmp_path_factory.mktemp("encode")
    found = []
    for k, (width, height) in enumerate([(448, 384), (256, 320)]):
        path = folder / f"s{k}.tiff"
        write_slide(path, SynthSettings(width=width, height=height, seed=k))
        tiles = folder / f"tiles{k}.h5"
        survey = survey_slide(
            SurveyJob(f"s{k}", path, None, None, TissueSettings(), SPEC, tiles, folder / f"qc{k}.jpg")
        )
        found.append(
            EncodeJob(f"s{k}", path, survey.mpp, SPEC, tiles, folder / f"features{k}.h5", folder / f"views{k}")
        )
    return found


def run(jobs: list[EncodeJob], folder: Path, settings: EncodeSettings = SETTINGS) -> list:
    encoder = load_encoder("random", precision="float32")
    moved = [
        EncodeJob(j.slide_id, j.path, j.mpp, j.tile, j.tiles_path, folder / f"{j.slide_id}.h5", folder / j.slide_id)
        for j in jobs
    ]
    with Workers(1) as workers:
        steps = encode_slides(moved, encoder, settings, workers)
        return [(step.job.slide_id, step.tiles, step.error) for step in steps]


def expected_tiles(job: EncodeJob) -> torch.Tensor:
    tiles = tile_files.read_tiles_of(job.tiles_path)
    with open_slide(job.path) as slide:
        pictures = [slide.read(Region(*map(float, xy), tiles.extent, tiles.extent), SPEC.mpp) for xy in tiles.xy]
    return torch.from_numpy(np.stack(pictures))


@pytest.mark.parametrize("cached", [True, False])
def test_products_equal_one_tile_at_a_time(jobs, tmp_path, monkeypatch, cached):
    if not cached:
        monkeypatch.setattr(encode, "CACHE_BYTES", 0)
    assert all(error is None for _, _, error in run(jobs, tmp_path))
    encoder = load_encoder("random", precision="float32")
    for job in jobs:
        pictures, tiles = expected_tiles(job), tile_files.read_tiles_of(job.tiles_path)
        assert pictures.shape[1:] == (48, 48, 3)
        alone = torch.cat([encoder(p[None].permute(0, 3, 1, 2) / 255) for p in pictures])
        torch.testing.assert_close(
            torch.from_numpy(hdf5.read_features(tmp_path / f"{job.slide_id}.h5")), alone, atol=1e-3, rtol=1e-3
        )
        views = np.load(tmp_path / job.slide_id / "features.npy")
        coords = np.load(tmp_path / job.slide_id / "coords.npy")
        plain = np.load(tmp_path / job.slide_id / "plain.npy")
        assert views.shape == plain.shape == (3, min(10, len(pictures)), 256)
        for k in range(3):
            t, chosen = draw_plan(job.slide_id, k, tiles, SETTINGS)
            np.testing.assert_allclose(plain[k].astype(np.float32), alone[chosen], atol=1e-2, rtol=1e-2)
            np.testing.assert_array_equal(coords[k], tiles.xy[chosen])
            again = encoder(augment(pictures[torch.from_numpy(chosen)], t))
            np.testing.assert_allclose(views[k].astype(np.float32), again, atol=1e-2, rtol=1e-2)
        made = json.loads((tmp_path / job.slide_id / "made.json").read_text())
        assert made["stride_level0"] == tiles.stride


def test_what_computes_on_single_cores_leaves_the_cores_to_others():
    encoder, tiles = load_encoder("random", precision="float32"), torch.randint(0, 256, (5, 48, 40, 3)).byte()
    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = encode_tiles(encoder, tiles, None)
        with ThreadPoolExecutor(1) as later:
            assert (torch.get_num_threads(), later.submit(torch.get_num_threads).result()) == (3, 3)
    finally:
        torch.set_num_threads(cores)
    alone = torch.cat([encoder(one[None].permute(0, 3, 1, 2) / 255) for one in tiles])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_views_differ_from_each_other_and_between_slides(jobs):
    tiles = tile_files.read_tiles_of(jobs[0].tiles_path)
    drawn = [draw_plan(name, k, tiles, SETTINGS)[0].affine for name in ("a", "b") for k in range(3)]
    assert len({a.tobytes() for a in drawn}) == 6


def test_a_slide_that_fails_under_way_leaves_nothing_and_the_next_goes_on(jobs, tmp_path):
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(jobs[0].path.read_bytes()[:3000])
    bad = EncodeJob("bad", broken, 1.0, SPEC, jobs[0].tiles_path, tmp_path / "x.h5", tmp_path / "x")
    lost = EncodeJob("lost", jobs[0].path, 1.0, SPEC, tmp_path / "absent.h5", tmp_path / "y.h5", tmp_path / "y")
    out = run([bad, lost, jobs[1]], tmp_path)
    errors = {name: str(error) for name, _, error in out if error is not None}
    assert set(errors) == {"bad", "lost"}
    assert "does not exist" in errors["lost"]
    assert fingerprints.fingerprint_of(tmp_path / "s1.h5") == fingerprints.fingerprint_of(tmp_path / "s1")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"broken.tiff", "s1.h5", "s1"}


def test_no_views_when_none_are_asked_for(jobs, tmp_path):
    run(jobs[:1], tmp_path, EncodeSettings(views=0, precision="float32"))
    assert [p.name for p in tmp_path.iterdir()] == ["s0.h5"]


def test_a_feature_that_is_not_finite_fails_the_slide(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "augment", lambda tiles, t, dtype: torch.full((len(tiles), 3, 48, 48), torch.nan))
    (_, _, error) = next(e for e in run(jobs[:1], tmp_path) if e[2] is not None)
    assert "no finite feature" in str(error)
    assert not list(tmp_path.iterdir())


def test_tiles_of_a_view_lie_in_windows():
    ij = np.stack(np.divmod(np.arange(900), 30), axis=1)
    xy = ij[:, ::-1] * 100
    rng = np.random.default_rng(0)
    for window, low, high in ((1, 0, 60), (16, 170, 400)):
        chosen = choose_tiles(xy, 128, window, rng)
        assert len(np.unique(chosen)) == 128
        assert (np.diff(chosen) > 0).all()
        distance = np.abs(xy[chosen][:, None] - xy[chosen][None]).sum(-1)
        assert low <= (distance == 100).sum() / 2 <= high  # pairs of neighbours
    assert np.array_equal(choose_tiles(xy, 5000, 16, rng), np.arange(900))
    times = np.bincount(np.concatenate([choose_tiles(xy, 30, 1, rng) for _ in range(300)]), minlength=900)
    assert times.min() > 0  # every tile comes


def test_real_tiles_reach_the_network(data_dir, tmp_path):
    path = data_dir / "slides" / "CMU-1-Small-Region.svs"
    spec, tiles = TileSpec(px=224, mpp=1.0), tmp_path / "tiles.h5"
    survey = survey_slide(SurveyJob("cmu", path, None, None, TissueSettings(), spec, tiles, tmp_path / "qc.jpg"))
    job = EncodeJob("cmu", path, survey.mpp, spec, tiles, tmp_path / "cmu.h5", tmp_path / "cmu")
    assert all(error is None for _, _, error in run([job], tmp_path))
    import openslide

    with h5py.File(tmp_path / "cmu.h5") as file, openslide.OpenSlide(path) as slide:
        x, y = map(int, file["coords"][0])
        side = file["coords"].attrs["patch_size_level0"]
        assert side == round(224 / 0.499)
        picture = slide.read_region((x, y), 0, (side, side)).convert("RGB").resize((224, 224), 2)
        encoder = load_encoder("random", precision="float32")
        near = encoder(torch.from_numpy(np.asarray(picture).copy())[None].permute(0, 3, 1, 2) / 255)
        stored = torch.from_numpy(file["features"][:1])
        others = torch.from_numpy(file["features"][1:])
    assert (near - stored).norm() < 0.3 * (others - stored).norm(dim=1).min()
