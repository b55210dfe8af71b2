"""A vector for each area of a slide: from the user's files to the probe; and the cores of microarrays."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import read_h5ad
from PIL import Image

import histossl as hs
from histossl.cli.main import main
from histossl.core.embeddings import embeddings_table
from histossl.core.errors import LabelError, SlideError, StudyError
from histossl.core.tables import read_rows
from histossl.execution.workers import SerialExecutor
from histossl.study.folder import Study
from histossl.study.inspect_stage import find_slides, inspect_slides
from histossl.study.new_slides import embed_new_slides
from histossl.wsi.areas import AreaFolder, AreaSettings, SlideAreas
from histossl.wsi.cores import find_cores
from histossl.wsi.named_areas import CoreGrid, NameJob, area_ids, name_areas, open_areas
from histossl.wsi.tile_files import read_tiles_of
from histossl.wsi.tissue import TissueSettings

WIDTH, HEIGHT, MPP = 800, 500, 2.0
LEFT, RIGHT = shapely.box(80, 60, 380, 440), shapely.box(400, 60, 720, 440)
TILE = hs.TileSpec(28, 4.0)  # 56 level-0 pixels


def draw(path: Path, **areas) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shape),
            "properties": {"objectType": "annotation", "classification": {"name": name.replace("_", " ")}},
        }
        for name, shape in areas.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def make(folder: Path, count: int) -> Path:
    """Slides of tissue, an area each in their left and right halves."""
    (folder / "slides").mkdir()
    (folder / "areas").mkdir()
    for k in range(count):
        rng = np.random.default_rng(k)
        picture = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
        colour = (190, 110, 170) if k % 2 else (150, 90, 180)
        picture[50:450, 70:730] = np.clip(rng.normal(colour, 25, (400, 660, 3)), 0, 255)
        Image.fromarray(picture).save(folder / "slides" / f"s{k}.png", dpi=(25400 / MPP, 25400 / MPP))
        draw(folder / "areas" / f"s{k}.geojson", Tumor=LEFT, Margin=RIGHT)
    return folder


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    return make(tmp_path, 3)


def inspect(folder: Path, areas: str = "", tile: hs.TileSpec = TILE, **settings) -> int:
    """As `histossl inspect`, in this process."""
    drawn = open_areas(Path(areas or folder / "areas"), AreaSettings(each=True, **settings))
    study, found = Study(folder / "out"), find_slides(folder / "out", folder / "slides")
    with study.share(lambda holder: None):
        return inspect_slides(study, found, None, TissueSettings(), tile, SerialExecutor(), drawn)


@pytest.mark.slow
def test_each_area_goes_the_whole_way(tmp_path):
    slides = make(tmp_path, 6)
    out = slides / "out"
    laid = ["--tile.px", "28", "--tile.mpp", "4", "--workers", "1", "--areas", str(slides / "areas")]
    assert main(["inspect", str(slides / "slides"), "--out", str(out), *laid, "--area.each"]) == 0
    rows = {row["slide_id"]: row for row in read_rows(out / "slides.csv")}
    assert list(rows)[:2] == ["s0@Tumor", "s0@Margin"]
    assert {row["area"] for row in rows.values()} == {"Tumor", "Margin"}
    assert main(["encode", str(out), "--encoder", "random", "--encode.views", "0", "--workers", "1"]) == 0
    assert main(["pretrain", str(out), "--pretrain.epochs", "1", "--pretrain.view.tiles", "8"]) == 0
    assert main(["embed", str(out), "--embed.views", "2"]) == 0
    found = read_h5ad(out / "embeddings.h5ad")
    assert found.obs["slide"].tolist() == [f"s{k}" for k in range(6) for _ in range(2)]
    assert found.obs["area"].tolist() == ["Tumor", "Margin"] * 6
    assert len(np.unique(found.X, axis=0)) == 12
    table = pd.DataFrame({"slide_id": [f"s{k}" for k in range(6)], "label": list("ababab")})
    table.to_csv(slides / "labels.csv", index=False)
    probe = ["probe", str(out), "--labels", str(slides / "labels.csv"), "--probe.folds", "2", "--probe.repeats", "2"]
    assert main([*probe, "--probe.shots", "", "--probe.bootstraps", "100"]) == 0
    predicted = pd.read_csv(out / "predictions.csv")
    assert set(predicted["slide_id"]) == set(rows)
    assert (predicted.groupby("patient_id")["slide_id"].nunique() == 2).all()  # both areas are of one patient
    new = ["predict", str(out), str(slides / "slides"), "--out", str(slides / "new"), "--workers", "1"]
    assert main([*new, "--areas", str(slides / "areas")]) == 0
    again = read_h5ad(slides / "new" / "embeddings.h5ad")
    np.testing.assert_allclose(again.X, found.X, atol=1e-5)
    assert set(pd.read_csv(slides / "new" / "predicted.csv")["slide_id"]) == set(rows)
    assert main([*probe, "--probe.shots", "", "--probe.bootstraps", "100", "--probe.area", "tumor"]) == 0
    assert set(pd.read_csv(out / "predictions.csv")["slide_id"]) == {f"s{k}@Tumor" for k in range(6)}


@pytest.mark.parametrize(("told", "given", "what"), [
    ({"each": True}, None, "drawn by hand; draw those of the new slides"),
    ({"each": True}, "grid", "lie in drawn areas; give a folder"),
    ({"cores": True, "each": True}, "areas", "lie in the cores of microarrays; give grid"),
    (None, "areas", "lie on all tissue"),
])  # fmt: skip
def test_new_slides_without_areas_of_their_kind_are_refused(slides, told, given, what):
    stages = {"inspect": {"areas": told}, "encode": {"encoder": {"name": "random"}}}
    with pytest.raises(StudyError, match=what):
        embed_new_slides(slides, stages, slides / "slides", Study(slides / "new"), areas=given and Path(given))


def test_encode_lays_tiles_within_areas_first_as_inspect_does(slides, tmp_path):
    study, other, areas = tmp_path / "study", tmp_path / "other", slides / "areas"
    flags = ["--tile.px", "28", "--tile.mpp", "4", "--workers", "1"]
    assert main(["inspect", f"{slides / 'slides'}", "--out", f"{study}", *flags]) == 0
    whole = len(read_tiles_of(Study(study).tiles("s0")).xy)
    chosen = ["--areas", f"{areas}", "--area.include", "Tumor"]
    encode = ["encode", f"{study}", "--encoder", "random", "--encode.views", "0", "--workers", "1"]
    assert main([*encode, *chosen]) == 0
    assert main(["inspect", f"{slides / 'slides'}", "--out", f"{other}", *flags, *chosen]) == 0
    laid, same = (read_tiles_of(Study(folder).tiles("s0")).xy for folder in (study, other))
    assert 0 < len(laid) < whole
    np.testing.assert_array_equal(laid, same)
    with h5py.File(Study(study).features("s0")) as file:
        np.testing.assert_array_equal(file["coords"][:].reshape(-1, 2), laid)
    # What was encoded is never thrown away.
    assert main([*encode, "--areas", f"{areas}", "--area.include", "Margin"]) == 2
    np.testing.assert_array_equal(read_tiles_of(Study(study).tiles("s0")).xy, laid)


def test_encode_chooses_no_slides_by_their_areas(slides, tmp_path, capsys):
    study, flags = tmp_path / "study", ["--tile.px", "28", "--tile.mpp", "4", "--workers", "1"]
    assert main(["inspect", f"{slides / 'slides'}", "--out", f"{study}", *flags]) == 0
    laid = read_tiles_of(Study(study).tiles("s0")).xy
    skipping = ["--areas", f"{slides / 'areas'}", "--area.missing", "skip"]
    assert main(["encode", f"{study}", "--encoder", "random", *skipping]) == 2
    assert "inspect" in capsys.readouterr().err
    np.testing.assert_array_equal(read_tiles_of(Study(study).tiles("s0")).xy, laid)


def test_the_tiles_of_an_area_lie_in_it(slides):
    assert inspect(slides) == 0
    for name, box in (("Tumor", LEFT), ("Margin", RIGHT)):
        tiles = read_tiles_of(slides / "out" / "tiles" / f"s1@{name}.h5")
        assert len(tiles.xy) > 10
        for x, y in tiles.xy.tolist():
            assert box.intersection(shapely.box(x, y, x + 56, y + 56)).area >= 0.46 * 56**2


def test_rows_of_areas_keep_what_users_wrote_and_areas_that_go_are_named(slides):
    assert inspect(slides) == 0
    table = slides / "out" / "slides.csv"
    rows = read_rows(table)
    for row in rows:
        row["patient_id"], row["hospital"] = "someone", "north"
    pd.DataFrame(rows).to_csv(table, index=False)
    draw(slides / "areas" / "s1.geojson", Tumor=LEFT, Lymph_node=RIGHT)
    (slides / "slides" / "s2.png").unlink()
    assert inspect(slides) == 3  # the margin that is no longer drawn, and two areas of the slide that is gone
    after = {row["slide_id"]: row for row in read_rows(table)}
    assert {row["patient_id"] for row in after.values()} == {"someone"}
    assert {row["hospital"] for row in after.values()} == {"north"}
    assert after["s1@Lymph node"]["status"] == after["s0@Margin"]["status"] == "inspected"
    assert "no longer name Margin" in after["s1@Margin"]["error"]
    assert "no longer there" in after["s2@Tumor"]["error"]
    assert after["s2@Tumor"]["tiles"]


def test_areas_of_a_slide_that_differ_in_what_users_wrote_are_refused(slides):
    assert inspect(slides) == 0
    rows = read_rows(slides / "out" / "slides.csv")
    rows[0]["patient_id"], rows[1]["patient_id"] = "p", "q"
    pd.DataFrame(rows).to_csv(slides / "out" / "slides.csv", index=False)
    with pytest.raises(StudyError, match="the areas of s0 differ in patient_id"):
        inspect(slides)


def test_slides_without_areas_are_whole_beside_areas(slides):
    (slides / "areas" / "s0.geojson").unlink()
    assert inspect(slides, missing="whole", include=("tumor",)) == 0
    rows = {row["slide_id"]: row["area"] for row in read_rows(slides / "out" / "slides.csv")}
    assert rows == {"s0": ""} | {f"s{k}@Tumor": "Tumor" for k in (1, 2)}


def test_overlapping_areas_are_told(slides):
    draw(slides / "areas" / "s0.geojson", Tumor=LEFT, Margin=shapely.box(230, 60, 720, 440))
    assert inspect(slides) == 0
    notes = {row["slide_id"]: row["note"] for row in read_rows(slides / "out" / "slides.csv")}
    assert "50% with Margin" in notes["s0@Tumor"]
    assert "31% with Tumor" in notes["s0@Margin"]
    assert "shares" not in notes["s1@Tumor"]


def test_names_in_files_are_no_paths():
    ids = area_ids("a", ["../../x", "Tumor: in", "tumor/in", "", "a@b"])
    assert list(ids.values()) == ["a@x", "a@Tumor- in", "a@tumor-in", "a@area", "a@a-b"]
    assert list(area_ids("a", ["x/y", "x:y"]).values()) == ["a@x-y", "a@x-y-2"]


def test_values_of_masks_are_areas_and_soft_masks_are_refused(slides):
    values = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    values[30:220, 40:190], values[30:220, 200:360] = 1, 2
    path = slides / "areas" / "m.png"
    Image.fromarray(values).save(path)
    job = NameJob(slides / "slides" / "s0.png", SlideAreas((path,), AreaSettings(each=True)))
    assert list(name_areas(job)) == ["1", "2"]
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(path)
    with pytest.raises(SlideError, match="199 values"):
        name_areas(job)


def test_labels_name_areas_or_slides(tmp_path):
    slides = make(tmp_path, 6)
    settings = AreaSettings(each=True)
    cohort = hs.encode(slides / "slides", "random", TILE, areas=slides / "areas", area=settings, workers=0)
    assert len(cohort) == 12
    vectors = np.stack([cohort[name].features.mean(0) for name in cohort])
    data = embeddings_table(cohort.rows, {"mean": vectors}, {}, "x")
    labels = pd.DataFrame(
        {
            "slide_id": [f"s{k}" for k in range(6) for _ in range(2)],
            "area": ["tumor", "margin"] * 6,
            "label": list("abbaabbaabba"),
        }
    )
    quick = {"folds": 2, "repeats": 1, "shots": (), "bootstraps": 100}
    result = hs.probe(data, labels, mixed_patients=True, **quick)
    truth = result.predictions.set_index("slide_id")["truth"]
    assert truth["s0@Tumor"] == "a"
    assert truth["s0@Margin"] == "b"
    assert hs.probe(data, labels, area="Margin", **quick).table["n_slides"].iloc[0] == 6
    with pytest.raises(LabelError, match="no vector is of the area 'stroma'"):
        hs.probe(data, labels, area="stroma", **quick)


def array(rows: int, columns: int, angle: float = 0.0, absent=(), broken=()) -> tuple[np.ndarray, dict]:
    """A microarray at 8 µm: cores of .6 mm, .75 mm apart, and (row, column) -> centre."""
    rng, pitch, radius = np.random.default_rng(rows), 94, 37
    width, height = (columns + 2) * pitch, (rows + 2) * pitch
    picture = rng.normal(243, 1, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    centres = {}
    for row, column in np.ndindex(rows, columns):
        if (row, column) in absent:
            continue
        u, v = (column - (columns - 1) / 2) * pitch, (row - (rows - 1) / 2) * pitch
        cx, cy = width / 2 + np.cos(angle) * u - np.sin(angle) * v, height / 2 + np.sin(angle) * u + np.cos(angle) * v
        cx, cy = cx + rng.normal(0, 3), cy + rng.normal(0, 3)
        disc = (x - cx) ** 2 + (y - cy) ** 2 < (radius * rng.uniform(0.9, 1.05)) ** 2
        if (row, column) in broken:
            disc &= (np.abs(x - cx + y - cy) > 10) & (x - cx > -25)
        picture[disc] = rng.normal((190, 110, 170), 25, (int(disc.sum()), 3))
        centres[row, column] = cx, cy
    return picture.clip(0, 255).astype(np.uint8), centres


@pytest.mark.parametrize(
    ("rows", "columns", "angle", "absent", "broken"),
    [(3, 4, -0.08, (), ()), (5, 7, 0.06, {(0, 0), (2, 3)}, {(1, 1), (3, 4)}), (1, 6, 0.0, (), ())],
)
def test_cores_are_found_and_named_by_row_and_column(rows, columns, angle, absent, broken):
    picture, centres = array(rows, columns, angle, absent, broken)
    slide = hs.picture_slide(picture, 8.0)
    found = {core.name: core for core in find_cores(slide, hs.find_tissue(slide))}
    assert set(found) == {f"{'ABCDEF'[row]}-{column + 1}" for row, column in centres}
    for (row, column), (x, y) in centres.items():
        core = found[f"{'ABCDEF'[row]}-{column + 1}"]
        assert np.hypot(core.x - x, core.y - y) < (12 if (row, column) in broken else 4)
        assert 37 < core.radius < 48


def test_a_slide_without_cores_is_refused(tmp_path):
    picture = np.full((400, 600, 3), 244, np.uint8)
    picture[50:350, 60:500] = np.random.default_rng(0).normal((190, 110, 170), 25, (300, 440, 3)).clip(0, 255)
    slide = hs.picture_slide(picture, 8.0)
    with pytest.raises(SlideError, match="no cores found"):
        find_cores(slide, hs.find_tissue(slide))


def test_grid_cuts_a_microarray_into_rows(tmp_path):
    picture, _ = array(2, 3)
    (tmp_path / "slides").mkdir()
    Image.fromarray(picture).save(tmp_path / "slides" / "tma.png", dpi=(25400 / 8, 25400 / 8))
    assert inspect(tmp_path, "grid", hs.TileSpec(20, 8.0)) == 0
    rows = {row["slide_id"]: row for row in read_rows(tmp_path / "out" / "slides.csv")}
    assert list(rows) == ["tma@A-1", "tma@A-2", "tma@A-3", "tma@B-1", "tma@B-2", "tma@B-3"]
    assert all(int(row["tiles"]) >= 5 for row in rows.values())
    drawn = json.loads((tmp_path / "out" / "areas" / "tma.geojson").read_text())
    assert len(drawn["features"]) == 6
    before = (tmp_path / "out" / "slides.csv").read_bytes()
    assert inspect(tmp_path, "grid", hs.TileSpec(20, 8.0)) == 0
    assert (tmp_path / "out" / "slides.csv").read_bytes() == before


def test_a_folder_called_grid_has_another_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("grid").mkdir()
    draw(Path("grid/a.geojson"), Tumor=LEFT)
    assert isinstance(open_areas(Path("grid"), AreaSettings()), CoreGrid)
    assert isinstance(open_areas(tmp_path / "grid", AreaSettings()), AreaFolder)
