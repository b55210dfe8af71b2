"""What is measured of nuclei, counted, and shown: oracles and invariances."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

from histossl.cli import nuclei_commands as commands
from histossl.cli import nuclei_score
from histossl.cli.nuclei_commands import ExportSettings
from histossl.core.errors import LabelError
from histossl.nuclei.export import write_anndata, write_geojson
from histossl.nuclei.instances import MEASURES, Nuclei, concatenate, outline_instances
from histossl.nuclei.maps import density_map, write_density, write_sheet
from histossl.nuclei.morphology import diameters, spreads
from histossl.nuclei.strata import found_nuclei, grouped
from histossl.nuclei.usual import USUAL, doubt_about_mpp, usual_size
from histossl.wsi.array_slide import picture_slide
from histossl.wsi.geometry import Region, Size
from histossl.wsi.synth import SynthSettings, paint_region
from histossl.wsi.tissue import TissueMask


def at(points: np.ndarray, area: float = 40.0) -> Nuclei:
    """Square nuclei around places (N, 2)."""
    corners = np.array([[-2, -2], [2, -2], [2, 2], [-2, 2]], np.float32)
    measures = np.zeros((len(points), len(MEASURES)), np.float32)
    measures[:, :2], measures[:, 2] = points, area
    return Nuclei(
        (points[:, None] + corners).reshape(-1, 2).astype(np.float32), np.arange(len(points) + 1) * 4, measures
    )


def test_diameters_of_a_rectangle_and_of_a_disc() -> None:
    shapes = np.array([shapely.box(3, 5, 3 + 8, 5 + 6), shapely.Point(20, 20).buffer(5, 64)])
    found = diameters(shapes)
    assert found[0] == pytest.approx([10, 6])
    assert found[1] == pytest.approx([10, 10], rel=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_diameters_do_not_depend_on_the_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = np.round(rng.uniform(0, 20, (12, 2)) * 64) / 64
    shapes = [shapely.convex_hull(shapely.MultiPoint(points + offset)) for offset in ((0, 0), (512, 96))]
    assert diameters(np.array(shapes[:1])).tobytes() == diameters(np.array(shapes[1:])).tobytes()


def test_spreads_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    names, values = rng.integers(0, 5, 400).astype(np.int32), rng.normal(size=400).astype(np.float32)
    for k, row in enumerate(spreads(names, values, 5)):
        mine = values[names == k].astype(np.float64)
        assert row == pytest.approx([mine.mean(), mine.std(), mine.min(), mine.max()])


def test_measures_of_a_disc() -> None:
    y, x = np.mgrid[:41, :41]
    labels = (np.hypot(y - 20, x - 20) <= 12).astype(np.int32)
    stain = np.stack([np.where(y < 20, 0.5, 0.7), np.full(y.shape, 0.2)], -1).astype(np.float32)
    nuclei = outline_instances(labels, labels.astype(np.float32) * 0.9, stain, 0.5)
    row = dict(zip(MEASURES, nuclei.measures[0].tolist(), strict=True))
    assert row["max_diameter_um"] == pytest.approx(12.3, abs=0.4)
    assert row["min_diameter_um"] == pytest.approx(12, abs=0.5)
    assert 0.85 < row["circularity"] <= 1
    assert (row["hematoxylin_min"], row["hematoxylin_max"]) == pytest.approx((0.5, 0.7))
    assert row["hematoxylin_std"] == pytest.approx(0.1, abs=0.01)
    assert row["eosin_std"] == pytest.approx(0, abs=1e-6)


def test_the_density_map_counts_every_nucleus() -> None:
    rng = np.random.default_rng(0)
    size = Size(1000, 640)
    nuclei = at(rng.uniform(0, 1, (500, 2)) * (size.width, size.height))
    mask = TissueMask(np.ones((32, 50), bool), size)
    density = density_map([nuclei.chosen(np.arange(500) < 200), nuclei.chosen(np.arange(500) >= 200)], mask, 0.5, 100)
    assert density.shape == (4, 5)
    area = np.array([0.1, 0.1, 0.1, 0.02])[:, None] * 0.1  # mm²: the lowest row is cut
    assert (density * area).sum() == pytest.approx(500)


def test_no_tissue_is_no_density(tmp_path: Path) -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, :5] = True
    density = density_map([at(np.array([[100.0, 100.0]]))], TissueMask(mask, Size(400, 400)), 0.5)
    assert np.isnan(density[:, 1]).all()
    assert density[0, 0] == pytest.approx(100)  # one in 100 µm squared
    write_density(tmp_path / "d.tif", density)
    import tifffile

    np.testing.assert_array_equal(tifffile.imread(tmp_path / "d.tif"), density)


def test_a_sheet_shows_nuclei_at_the_edge_too_and_none(tmp_path: Path) -> None:
    slide = picture_slide(np.full((60, 90, 3), 200, np.uint8), 0.5)
    for name, nuclei in (("a", at(np.array([[2.0, 3.0], [88.0, 59.0], [45.0, 30.0]]))), ("b", concatenate([]))):
        write_sheet(tmp_path / f"{name}.jpg", slide, nuclei, np.random.default_rng(0))
        assert (tmp_path / f"{name}.jpg").stat().st_size > 500


def test_anndata_holds_the_measures(tmp_path: Path) -> None:
    import anndata

    nuclei = at(np.array([[10.0, 20.0], [30.0, 40.0]]))
    write_anndata(tmp_path / "n.h5ad", nuclei, 0.25, "a slide")
    data = anndata.read_h5ad(tmp_path / "n.h5ad")
    assert data.obsm["spatial"].tolist() == [[10, 20], [30, 40]]
    assert data[:, "area_um2"].X.ravel().tolist() == [40, 40]
    assert data.uns["mpp"] == 0.25
    write_anndata(tmp_path / "none.h5ad", concatenate([]), 0.25, "a slide")
    assert anndata.read_h5ad(tmp_path / "none.h5ad").n_obs == 0


def test_found_nuclei_by_hand() -> None:
    truth = np.zeros((10, 20), np.int32)
    truth[1:5, 1:5], truth[1:5, 8:12], truth[6:9, 1:4] = 7, 3, 5
    prediction = np.zeros_like(truth)
    prediction[1:5, 1:5], prediction[1:5, 10:14] = 1, 2
    density = np.where(truth == 5, 0.2, 0.4).astype(np.float32)
    found = found_nuclei(prediction, truth, 0.5, density)
    assert found.iou.tolist() == pytest.approx([1 / 3, 0, 1])  # in the order of ids 3, 5, 7
    assert found.covered.tolist() == pytest.approx([0.5, 0, 1])
    assert found.area.tolist() == pytest.approx([4, 2.25, 4])
    assert found.darkness.tolist() == pytest.approx([1, 0.5, 1])
    groups = {(g.low, g.nuclei): (g.recall, g.missed) for g in grouped([found], "darkness")}
    assert groups == {(0.4, 1): (0, 1), (1.0, 2): (0.5, 0)}
    assert sum(g.nuclei for g in grouped([found, found], "area")) == 6


def test_found_nuclei_of_empty_images_and_bad_ones() -> None:
    nothing = np.zeros((5, 5), np.int32)
    assert len(found_nuclei(nothing, nothing, 0.5).iou) == 0
    assert grouped([found_nuclei(nothing, nothing, 0.5)], "area") == []
    full = np.ones((5, 5), np.int32)
    assert found_nuclei(full, full, 0.5).iou.tolist() == [1]
    assert found_nuclei(nothing, full, 0.5).iou.tolist() == [0]
    with pytest.raises(LabelError, match="differ in size"):
        found_nuclei(nothing, np.zeros((5, 6), np.int32), 0.5)
    with pytest.raises(LabelError, match="area or darkness"):
        grouped([], "colour")


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_an_mpp_that_is_wrong_by_two_is_said_with_the_right_one(factor: float) -> None:
    nuclei = at(np.zeros((50, 2)), USUAL * factor)
    usual = usual_size([nuclei.chosen(np.arange(50) < 10), nuclei.chosen(np.arange(50) >= 10)])
    assert usual == pytest.approx(USUAL * factor)
    right = 0.25 / factor**0.5
    assert f"{right:.2g} would" in doubt_about_mpp(usual, 0.25)


def test_usual_nuclei_and_few_nuclei_are_no_matter() -> None:
    assert doubt_about_mpp(usual_size([at(np.zeros((50, 2)))]), 0.25) == ""
    assert doubt_about_mpp(usual_size([at(np.zeros((5, 2)), 500)]), 0.25) == ""
    assert doubt_about_mpp(usual_size([]), 0.25) == ""


def test_the_command_writes_maps_sheets_and_tables_and_scores_beside_them(tmp_path: Path) -> None:
    picture = paint_region(SynthSettings(width=900, height=700, mpp=0.4, seed=3), Region(0, 0, 400, 300))
    Image.fromarray(picture).save(tmp_path / "a.png")
    write = ExportSettings(h5ad=True, density=True, sheet=True)
    settings = {"model": "prior", "mpp_default": 0.4, "workers": 1, "write": write}
    assert commands.segment([tmp_path / "a.png"], out=tmp_path / "o", **settings) == 0
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert {"a.h5ad", "a-density.tif", "a-sheet.jpg", "a.geojson"} <= names
    features = json.loads((tmp_path / "o" / "a.geojson").read_text("utf-8"))["features"]
    assert {"Area µm^2", "Length µm", "Max diameter µm", "Hematoxylin: Std.Dev."} <= set(
        features[0]["properties"]["measurements"]
    )
    (tmp_path / "truth").mkdir()
    shutil.copy(tmp_path / "o" / "a.tif", tmp_path / "truth" / "a.tif")
    assert nuclei_score.score(tmp_path / "o", tmp_path / "truth") == 0


def test_outlines_on_both_sides_are_scored_in_the_size_of_their_image(tmp_path: Path, capsys) -> None:
    picture = np.full((90, 120, 3), 230, np.uint8)
    picture[20:30, 20:30], picture[50:60, 70:80] = 60, 120
    Image.fromarray(picture).save(tmp_path / "a.png")
    nuclei = at(np.array([[25.0, 25.0], [75.0, 55.0]]))
    write_geojson(tmp_path / "a.geojson", [nuclei], 0.5)
    given = {"by": "area,darkness", "images": tmp_path / "a.png", "mpp": 0.5}
    assert nuclei_score.score(tmp_path / "a.geojson", tmp_path / "a.geojson", **given) == 0
    assert "darkness / median" in capsys.readouterr().out
