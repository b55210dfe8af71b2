"""Whole slides: the same nuclei for every tile size, files that other tools read, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
import torch
from PIL import Image

from histossl.cli import nuclei_commands, nuclei_score
from histossl.cli.nuclei_commands import ExportSettings
from histossl.core.errors import FileFormatError, LabelError, SettingsError, SlideError, TrainingError
from histossl.nuclei import export
from histossl.nuclei.instances import Nuclei, concatenate
from histossl.nuclei.metrics import score
from histossl.nuclei.network import REACH, NucleusNet
from histossl.nuclei.nuclei_files import read_nuclei
from histossl.nuclei.partial_results import Parts
from histossl.nuclei.segmenter import NucleiSegmenter
from histossl.nuclei.self_training import Batches, Sample, SelfTraining
from histossl.nuclei.settings import SelfTrainingSettings
from histossl.nuclei.stain_survey import SegmentSettings, survey
from histossl.nuclei.threshold import Prior
from histossl.nuclei.tiled_inference import segment_slide
from histossl.wsi.areas import SlideAreas
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import open_slide
from histossl.wsi.synth import SynthSettings, nuclei_in, paint_region

SYNTH = SynthSettings(width=900, height=700, mpp=0.4, seed=3)
SHORT = SelfTrainingSettings(steps=240, batch=6, crop=64, precision="float32")
QUICK = replace(SHORT, steps=20)  # where it does not matter what was learned


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(700, 900, 3) of painted tissue at 0.4 µm."""
    return paint_region(SYNTH, Region(0, 0, 900, 700))


@pytest.fixture(scope="module")
def segmenter(picture: np.ndarray) -> NucleiSegmenter:
    """Trained for seconds on the picture."""
    return NucleiSegmenter(SHORT, device="cpu").fit([picture], 0.4)


@pytest.mark.parametrize("method", ["prior", "self-training"])
def test_nuclei_do_not_depend_on_the_tile_size(picture: np.ndarray, segmenter: NucleiSegmenter, method: str) -> None:
    finder = Prior() if method == "prior" else segmenter.method
    assert finder is not None
    slide = picture_slide(picture, 0.4)
    found = []
    for tile in (2048, 256, 132):
        settings = SegmentSettings(tile=tile)
        found.append(segment_slide(slide, survey(slide, 0.5, settings), finder, settings))
    assert len(found[0]) > 50
    assert by_place(found[0]) == by_place(found[1]) == by_place(found[2])


def by_place(nuclei: Nuclei) -> dict[tuple[float, float], tuple[bytes, bytes]]:
    """Every byte of a table, whatever the order of its rows."""
    return {
        tuple(row[:2].tolist()): (row.tobytes(), nuclei.points[a:b].tobytes())
        for row, a, b in zip(nuclei.measures, nuclei.start[:-1], nuclei.start[1:], strict=True)
    }


def test_learning_finds_painted_nuclei_and_repeats_to_the_byte(picture: np.ndarray, segmenter: NucleiSegmenter) -> None:
    truth, _ = nuclei_in(SYNTH, Region(0, 0, 900, 700))
    labels = segmenter.predict(picture, 0.4)
    assert labels.dtype == np.int32
    assert labels.shape == truth.shape
    found = score(labels, truth)
    assert found.dice > 0.6
    one, other = (NucleiSegmenter(QUICK, device="cpu").fit([picture], 0.4) for _ in range(2))
    np.testing.assert_array_equal(one.confidence(picture, 0.4), other.confidence(picture, 0.4))
    confidence = segmenter.confidence(picture, 0.4)
    assert confidence.shape == (2, 560, 720)
    assert ((confidence >= 0) & (confidence <= 1)).all()


def test_nothing_beyond_its_reach_changes_a_pixel() -> None:
    import torch

    network = NucleusNet(seed=1).eval()
    x = torch.rand(1, 3, 128, 160)
    y = x.clone()
    y[..., : 64 - REACH, :] = 0
    y[..., 64 + REACH + 1 :, :] = 1
    with torch.inference_mode():
        a, b = network(x), network(y)
        folded = network.folded()(x)
    torch.testing.assert_close(a[..., 64, :], b[..., 64, :], rtol=0, atol=0)
    torch.testing.assert_close(folded, a, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in network.parameters()) <= 50_000


def test_batches_are_a_pure_function_of_the_step(picture: np.ndarray) -> None:
    known = survey(picture_slide(picture, 0.4), 0.5)
    assert known.stains is not None
    batches = [Batches([Sample(known.fields, known.stains)], QUICK) for _ in range(2)]
    first = [batch(7) for batch in batches]
    for a, b in zip(*first, strict=True):
        assert a.shape == (6, 3, 64, 64)
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert not np.array_equal(batches[0](8)[0].numpy(), first[0][0].numpy())
    other = Batches([Sample(known.fields, known.stains)], replace(QUICK, seed=1))
    assert not np.array_equal(other(7)[0].numpy(), first[0][0].numpy())


def test_a_saved_model_is_the_same_model(picture: np.ndarray, segmenter: NucleiSegmenter, tmp_path: Path) -> None:
    segmenter.save(tmp_path / "model")
    again = NucleiSegmenter.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(again.predict(picture, 0.4), segmenter.predict(picture, 0.4))


@pytest.mark.parametrize("damage", ["cut", "version", "pickle", "absent", "config"])
def test_bad_models_are_named(segmenter: NucleiSegmenter, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    if damage != "absent":
        segmenter.save(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "version":
        config.write_text(config.read_text().replace("nuclei 1", "nuclei 99"))
    elif damage == "pickle":
        import pickle

        weights.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "config":
        config.write_text("[]")
    with pytest.raises(FileFormatError, match="model"):
        SelfTraining.load(folder)


def test_pictures_of_many_kinds(picture: np.ndarray) -> None:
    prior = NucleiSegmenter.load("prior")
    crop = picture[:300, :400]
    truth = prior.predict(crop, 0.4)
    assert truth.max() > 10
    rgba = np.concatenate([crop, np.full((300, 400, 1), 255, np.uint8)], 2)
    for same in (rgba, crop.astype(np.uint16) * 257, crop / 255):
        np.testing.assert_array_equal(prior.predict(same, 0.4), truth)
    assert prior.predict(crop[:1, :1], 0.4).shape == (1, 1)
    wide = np.full((3, 40_000, 3), 255, np.uint8)
    assert not prior.predict(wide, 0.4).any()
    for bad in (crop[..., 0], crop[..., :2], crop.astype(np.int16), crop * 1.0, crop[:0]):
        with pytest.raises(SlideError):
            prior.predict(bad, 0.4)
    with pytest.raises(SlideError, match="greyscale"):
        prior.predict(crop[..., :1].repeat(3, 2), 0.4)
    with pytest.raises(SlideError, match="mpp"):
        prior.predict(crop, 0)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (240, 238, 243), (230, 120, 160)])
def test_pictures_without_nuclei_have_none(segmenter: NucleiSegmenter, colour: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (240, 330, 3))
    picture = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    for model in (segmenter, NucleiSegmenter.load("prior")):
        assert not model.predict(picture, 0.5).any()
    with pytest.raises(TrainingError):
        NucleiSegmenter(QUICK).fit([picture], 0.5)


def test_settings_out_of_range_are_errors() -> None:
    for bad in ({"tile": 30}, {"halo": 62}, {"tile": 1022}, {"fields": 0}):
        with pytest.raises(SettingsError):
            SegmentSettings(**bad)
    for bad in ({"steps": 0}, {"turns": 3}, {"crop": 50}):
        with pytest.raises(SettingsError):
            SelfTrainingSettings(**bad)
    with pytest.raises(SettingsError):
        NucleiSegmenter().fit([np.zeros((9, 9, 3), np.uint8)], [0.5, 0.5])


def test_files_agree_with_each_other(picture: np.ndarray, tmp_path: Path) -> None:
    slide = picture_slide(picture, 0.4)
    nuclei = segment_slide(slide, survey(slide, 0.5), Prior(), SegmentSettings())
    halves = [nuclei.chosen(np.arange(len(nuclei)) < 50), nuclei.chosen(np.arange(len(nuclei)) >= 50)]
    path = tmp_path / "a.geojson"
    assert export.write_geojson(path, halves, 0.4) == len(nuclei)
    data = json.loads(path.read_text("utf-8"))
    assert data["type"] == "FeatureCollection"
    assert len(data["features"]) == len(nuclei)
    for feature in data["features"]:
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) >= 4
        assert feature["properties"]["objectType"] == "detection"
        shape = shapely.Polygon(ring)
        assert shape.is_valid
        assert shape.exterior.is_ccw
    assert len({feature["id"] for feature in data["features"]}) == len(nuclei)
    labels = export.label_image(nuclei, slide.size)
    again = export.label_image(read_nuclei(path), slide.size)
    assert score(again, labels).pq > 0.96  # outlines are simplified by a quarter of a pixel
    export.write_geojson(tmp_path / "a.geojson.gz", halves, 0.4)
    assert read_nuclei(tmp_path / "a.geojson.gz").points.tolist() == read_nuclei(path).points.tolist()
    export.write_label_tiff(tmp_path / "a.tif", nuclei, slide.size)
    read = tifffile.imread(tmp_path / "a.tif")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, labels)
    export.write_overlay(tmp_path / "a.jpg", slide, halves)
    assert Image.open(tmp_path / "a.jpg").size[0] >= 900


def test_parquet_and_zarr_hold_the_same(picture: np.ndarray, tmp_path: Path) -> None:
    parquet, zarr = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("zarr")
    slide = picture_slide(picture, 0.4)
    nuclei = segment_slide(slide, survey(slide, 0.5), Prior(), SegmentSettings())
    export.write_parquet(tmp_path / "a.parquet", [nuclei, nuclei], 0.4)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 2 * len(nuclei)
    meta = json.loads(table.schema.metadata[b"geo"])
    assert meta["columns"][meta["primary_column"]]["encoding"] == "WKB"
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    np.testing.assert_allclose(shapely.area(shapes) * 0.16, table["area_um2"], rtol=0.1, atol=1)
    assert table["id"].to_pylist() == list(range(1, 2 * len(nuclei) + 1))
    export.write_zarr(tmp_path / "a.zarr", nuclei, slide.size, 0.4)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    np.testing.assert_array_equal(group["labels/nuclei/0"][:], export.label_image(nuclei, slide.size))
    assert group["labels/nuclei"].attrs["multiscales"][0]["datasets"][0]["path"] == "0"


def test_no_nuclei_are_valid_files_too(tmp_path: Path) -> None:
    assert export.write_geojson(tmp_path / "none.geojson", [concatenate([])], 0.5) == 0
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []
    export.write_label_tiff(tmp_path / "none.tif", concatenate([]), Size(7, 5))
    assert tifffile.imread(tmp_path / "none.tif").shape == (5, 7)
    assert len(read_nuclei(tmp_path / "none.geojson")) == 0
    (tmp_path / "bad.geojson").write_text('{"features": [{"geometry": 3}]}')
    with pytest.raises(LabelError):
        read_nuclei(tmp_path / "bad.geojson")


def test_ids_go_beyond_16_bits() -> None:
    count, side = 70_000, 300
    row, column = np.divmod(np.arange(count), side)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    points = (np.stack([column, row], 1)[:, None] + corners).reshape(-1, 2).astype(np.float32)
    many = Nuclei(points, np.arange(0, 4 * count + 1, 4), np.zeros((count, 9), np.float32))
    labels = export.label_image(many, Size(side, 240))
    assert labels.max() == count
    assert (np.unique(labels) == np.arange(count + 1)).all()


def test_parts_resume_and_name_damage(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "p")
    assert parts.done() == 0
    for row in range(3):
        parts.add(row, concatenate([]))
    assert parts.done() == 3
    assert [len(part) for part in parts] == [0, 0, 0]
    parts.path(1).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(FileFormatError, match="row-00001"):
        list(parts)


def test_segment_command_from_files_to_scores(picture: np.ndarray, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    Image.fromarray(picture[:400]).save(images / "a.b.png")
    Image.fromarray(np.full((50, 70, 3), 255, np.uint8)).save(images / "white.png")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    write = ExportSettings(gzip=True)
    code = nuclei_commands.segment(
        [images], out=out, model="self", mpp_default=0.4, self_training=SHORT, write=write, workers=1
    )
    assert code == 1
    rows = (out / "nuclei.csv").read_text().splitlines()
    assert rows[0].startswith("file,status,nuclei")
    assert [line.split(",")[1] for line in rows[1:]] == ["done", "failed", "done"]
    assert rows[3].split(",")[2] == "0"
    names = {path.name for path in out.iterdir()}
    assert {"a.b.geojson.gz", "a.b.tif", "a.b-overlay.jpg", "white.tif", "model"} <= names
    assert not [name for name in names if name.startswith(".a.b")]
    truth, _ = nuclei_in(SYNTH, Region(0, 0, 900, 400))
    (tmp_path / "truth").mkdir()
    tifffile.imwrite(tmp_path / "truth" / "a.b.tif", truth)
    assert score(tifffile.imread(out / "a.b.tif"), truth).dice > 0.6
    with pytest.raises(LabelError, match="do not match"):
        nuclei_score.score(out, tmp_path / "truth")
    first = (out / "a.b.tif").read_bytes()
    assert (
        nuclei_commands.segment([images / "a.b.png"], out=out, model=str(out / "model"), mpp_default=0.4, workers=1)
        == 0
    )
    assert (out / "a.b.tif").read_bytes() == first


def test_empty_images_yield_no_nuclei_by_default(tmp_path: Path) -> None:
    Image.fromarray(np.full((60, 90, 3), 255, np.uint8)).save(tmp_path / "white.png")
    assert nuclei_commands.segment([tmp_path / "white.png"], out=tmp_path / "o", mpp_default=0.25) == 0
    assert json.loads((tmp_path / "o" / "white.geojson").read_text())["features"] == []
    assert tifffile.imread(tmp_path / "o" / "white.tif").shape == (60, 90)


def test_train_command_and_missing_mpp(picture: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(picture[:300]).save(tmp_path / "a.png")
    assert nuclei_commands.train([tmp_path / "a.png"], out=tmp_path / "m", mpp_default=0.4, self_training=QUICK) == 0
    assert SelfTraining.load(tmp_path / "m").settings == QUICK
    assert nuclei_commands.segment([tmp_path / "a.png"], out=tmp_path / "o", model="prior") == 1
    assert "no mpp" in (tmp_path / "o" / "nuclei.csv").read_text()
    with pytest.raises(SettingsError, match="several"):
        nuclei_commands.segment([tmp_path / "a.png", tmp_path / "a.png"], out=tmp_path / "o", model="prior")
    with pytest.raises(FileFormatError):
        nuclei_commands.segment([tmp_path / "a.png"], out=tmp_path / "o", model=str(tmp_path / "nowhere"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_default_beats_the_prior_on_real_images(data_dir: Path) -> None:
    names = sorted((data_dir / "nuclei/monuseg-train/images").glob("TCGA-A7-*.png"))
    pictures = [np.asarray(Image.open(name))[..., :3] for name in names]
    truths = [np.asarray(Image.open(name.parents[1] / "labels" / name.name)).astype(np.int32) for name in names]
    learned = NucleiSegmenter().fit(pictures, 0.25)
    prior = NucleiSegmenter.load("prior")
    for metric in ("dice", "aji", "pq"):
        ours, theirs = (
            np.mean([getattr(score(model.predict(p, 0.25), t), metric) for p, t in zip(pictures, truths, strict=True)])
            for model in (learned, prior)
        )
        assert ours > theirs


def test_a_real_slide_yields_nuclei(data_dir: Path) -> None:
    with open_slide(data_dir / "slides/monusac-A9K0_1.svs") as slide:
        nuclei = segment_slide(slide, survey(slide, 0.5), Prior(), SegmentSettings())
        assert len(nuclei) > 10
        assert (nuclei.measures[:, 0] < slide.size.width).all()
        assert 15 < np.median(nuclei.measures[:, 2]) < 120  # µm²


def test_gradients_in_bfloat16_are_the_same_every_time() -> None:
    network = NucleusNet()
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    seen = []
    for _ in range(6):
        # What memory holds that is given out again must not matter.
        rubbish = [torch.full((n,), float("nan")) for n in (1000, 10_000, 100_000)]
        del rubbish
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        logits.float().square().mean().backward()
        seen.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert all(torch.equal(seen[0], other) for other in seen)


def test_nuclei_are_looked_for_inside_areas_alone(picture: np.ndarray, tmp_path: Path) -> None:
    slide, area = picture_slide(picture, 0.4), shapely.box(200, 150, 600, 500)
    path = tmp_path / "image.geojson"
    path.write_text(json.dumps({"type": "Feature", "geometry": shapely.geometry.mapping(area), "properties": {}}))
    found = []
    for areas in (None, SlideAreas((path,))):
        nuclei = segment_slide(slide, survey(slide, 0.5, SegmentSettings(), areas), Prior(), SegmentSettings())
        found.append(nuclei.measures[:, :2])
    inside = shapely.contains_xy(area.buffer(-2), found[0])
    assert 10 < len(found[1]) < len(found[0])
    assert shapely.contains_xy(area.buffer(2), found[1]).all()
    assert len(found[1]) == pytest.approx(inside.sum(), rel=0.15)  # stains are those of the area
