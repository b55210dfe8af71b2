"""The user's areas: painted exactly, matched by name, checked against the slide, and obeyed by every stage."""

from __future__ import annotations

import gzip
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image

import histossl as hs
from histossl.cli.main import main
from histossl.core.errors import SettingsError, SlideError
from histossl.core.tables import read_rows
from histossl.study.survey import survey_fingerprint
from histossl.wsi.areas import AreaFolder, AreaSettings, SlideAreas, restrict
from histossl.wsi.slide import Slide
from histossl.wsi.tissue import TissueMask

WIDTH, HEIGHT, MPP = 1600, 1000, 2.0


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """(1000, 1600, 3): tissue from x 200 to 1400 and y 100 to 900."""
    rng = np.random.default_rng(0)
    picture = np.full((HEIGHT, WIDTH, 3), 244, np.uint8)
    picture[100:900, 200:1400] = np.clip(rng.normal((190, 110, 170), 25, (800, 1200, 3)), 0, 255)
    return picture


@pytest.fixture
def slide(picture: np.ndarray) -> Slide:
    return hs.picture_slide(picture, MPP, "a.png")


def annotation(shape, kind: str | None = None, **about) -> dict:
    named = {"classification": {"name": kind}} if kind else {}
    properties = {"objectType": "annotation", **named, **about}
    return {"type": "Feature", "geometry": shapely.geometry.mapping(shape), "properties": properties}


def write(path: Path, *features: dict) -> Path:
    text = json.dumps({"type": "FeatureCollection", "features": list(features)})
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def inside(slide, *files: Path, **settings) -> np.ndarray:
    """What is left of a slide that is all tissue."""
    everything = TissueMask(np.ones((HEIGHT // 4, WIDTH // 4), bool), slide.size)
    return restrict(everything, slide, SlideAreas(files, AreaSettings(**settings))).mask


def truth(shape, mask: np.ndarray) -> np.ndarray:
    y, x = (np.indices(mask.shape) + 0.5) * np.array([HEIGHT / mask.shape[0], WIDTH / mask.shape[1]])[:, None, None]
    return shapely.contains_xy(shape, x, y)


BOX = shapely.box(300, 200, 700, 600)
DONUT = shapely.Point(800, 500).buffer(300).difference(shapely.Point(820, 480).buffer(120))
BOWTIE = shapely.Polygon([(300, 200), (900, 700), (900, 200), (300, 700)])
MANY = shapely.MultiPolygon([shapely.box(x, 300, x + 60, 700) for x in range(300, 1200, 150)])


@pytest.mark.parametrize("shape", [BOX, DONUT, MANY], ids=["box", "hole", "multipolygon"])
@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz"])
def test_outlines_are_painted_where_they_lie(slide, tmp_path, shape, ending):
    mask = inside(slide, write(tmp_path / f"a{ending}", annotation(shape)))
    assert (mask != truth(shape, mask)).mean() < 1e-3


def write_table(path: Path, **areas) -> Path:
    """As geopandas writes a GeoParquet or a GeoPackage, a row for each area with its class."""
    blobs, kinds = [shapely.to_wkb(shape) for shape in areas.values()], list(areas)
    if path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        about = {"primary_column": "shape", "columns": {"shape": {"encoding": "WKB"}}, "version": "1.0.0"}
        table = pa.table({"id": range(len(kinds)), "classification": kinds, "shape": blobs})
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(about)}), path)
        return path
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE gpkg_geometry_columns (table_name TEXT, column_name TEXT)")
        file.execute("INSERT INTO gpkg_geometry_columns VALUES ('my areas', 'geom')")
        file.execute('CREATE TABLE "my areas" (fid INTEGER, geom BLOB, class TEXT)')
        for k, (blob, kind) in enumerate(zip(blobs, kinds, strict=True)):
            head = (
                b"GP\0" + (bytes([0b0000001]) if k % 2 else bytes([0b0000011])) + bytes(4) + bytes(0 if k % 2 else 32)
            )
            file.execute('INSERT INTO "my areas" VALUES (?, ?, ?)', (k, head + blob, kind))
        file.commit()
    return path


@pytest.mark.parametrize("ending", [".parquet", ".gpkg"])
def test_tables_of_geopandas_say_the_same_as_geojson(slide, tmp_path, ending):
    shapes = {"tumour": BOX, "margin": DONUT, "exclude": shapely.box(350, 250, 400, 300)}
    mask = inside(slide, write_table(tmp_path / f"a{ending}", **shapes))
    same = inside(slide, write(tmp_path / "a.geojson", *(annotation(shape, kind) for kind, shape in shapes.items())))
    np.testing.assert_array_equal(mask, same)
    alone = inside(slide, tmp_path / f"a{ending}", include=("margin",), exclude=())
    assert (alone != truth(DONUT, alone)).mean() < 1e-3


@pytest.mark.parametrize("ending", [".parquet", ".gpkg"])
def test_tables_that_are_none_are_refused(slide, tmp_path, ending):
    (tmp_path / f"a{ending}").write_bytes(b"PAR1 SQLite no")
    with pytest.raises(SlideError, match=r"is no Geo(Parquet|Package) of areas"):
        inside(slide, tmp_path / f"a{ending}")
    (tmp_path / f"a{ending}").unlink()
    with pytest.raises(SlideError, match="holds no area"):
        inside(slide, write_table(tmp_path / f"a{ending}"))


def test_a_ring_that_crosses_itself_is_both_of_its_parts(slide, tmp_path):
    mask = inside(slide, write(tmp_path / "a.geojson", annotation(BOWTIE)))
    whole = truth(shapely.make_valid(BOWTIE), mask)
    assert whole.mean() > 0.05
    assert (mask != whole).mean() < 1e-3


def test_overlapping_areas_of_several_files_count_once_and_exclusion_wins(slide, tmp_path):
    one = write(tmp_path / "a.geojson", annotation(BOX, "tumour"), annotation(DONUT, "Exclude"))
    other = write(tmp_path / "a-2.geojson", annotation(shapely.box(500, 300, 1000, 800), "margin"))
    mask = inside(slide, one, other)
    wanted = BOX.union(shapely.box(500, 300, 1000, 800)).difference(DONUT)
    assert (mask != truth(wanted, mask)).mean() < 1e-3
    alone = inside(slide, one, other, include=("Tumour",), exclude=())
    assert (alone != truth(BOX, alone)).mean() < 1e-3


def test_areas_that_are_only_cut_out_leave_the_rest_of_the_slide(slide, tmp_path):
    mask = inside(slide, write(tmp_path / "a.geojson", annotation(BOX, "Ignore*")))
    assert (mask != ~truth(BOX, mask)).mean() < 1e-3


def test_cells_points_and_missing_cores_are_no_areas(slide, tmp_path):
    cell = annotation(shapely.box(0, 0, 1600, 1000), objectType="cell")
    core = annotation(shapely.box(0, 0, 1600, 1000), objectType="tmaCore", isMissing=True)
    mask = inside(slide, write(tmp_path / "a.geojson", annotation(BOX), cell, core, annotation(shapely.Point(5, 5))))
    assert (mask != truth(BOX, mask)).mean() < 1e-3


@pytest.mark.parametrize("scale", [1, 0.25, 0.1])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_mask_images_of_any_scale_say_the_same_as_outlines(slide, tmp_path, scale, ending):
    full = np.zeros((HEIGHT, WIDTH), np.uint8)
    full[200:600, 300:700] = 255
    size = round(WIDTH * scale), round(HEIGHT * scale)
    Image.fromarray(full).resize(size, Image.Resampling.NEAREST).save(tmp_path / f"a{ending}")
    mask = inside(slide, tmp_path / f"a{ending}")
    assert (mask != truth(BOX, mask)).mean() < 2e-3


def test_values_of_a_mask_image_are_its_classes(slide, tmp_path):
    values = np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8)
    values[:, 100:200], values[:, 200:400] = 1, 2
    Image.fromarray(values).save(tmp_path / "a.png")
    assert inside(slide, tmp_path / "a.png").mean() == pytest.approx(300 / 800, abs=2e-3)
    assert inside(slide, tmp_path / "a.png", include=("2",)).mean() == pytest.approx(200 / 800, abs=2e-3)
    assert inside(slide, tmp_path / "a.png", exclude=("2",)).mean() == pytest.approx(100 / 800, abs=2e-3)


def test_tiles_are_kept_by_the_share_of_their_area_inside(slide, tmp_path):
    path = write(tmp_path / "a.geojson", annotation(DONUT))
    mask = TissueMask(np.ones((HEIGHT // 4, WIDTH // 4), bool), slide.size)
    for least in (0.2, 0.5, 0.9):
        spec = hs.TileSpec(64, MPP, min_tissue=least)
        kept = {tuple(xy) for xy in hs.tile_grid(slide, mask, spec, areas=[path]).xy.tolist()}
        for x, y in hs.tile_grid(slide, mask, spec).xy.tolist():
            share = DONUT.intersection(shapely.box(x, y, x + 64, y + 64)).area / 64**2
            if abs(share - least) > 0.03:
                assert ((x, y) in kept) == (share > least)


UNUSABLE = {
    "is of another slide": ([annotation(shapely.box(5000, 5000, 9000, 9000))], "100% of its areas lie outside"),
    "is in another unit": ([annotation(shapely.box(0.1, 0.1, 0.6, 0.7))], "within the first pixel"),
    "is empty": ([], "holds no area"),
    "holds points alone": ([annotation(shapely.Point(400, 400))], "holds no area"),
    "lies on glass": ([annotation(shapely.box(10, 10, 150, 90))], "no tissue inside"),
    "has no coordinates": ([{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": 3}}], "no GeoJSON"),
    "has NaN": ([annotation(shapely.box(300, 200, 700, 600)) | {"geometry": {
        "type": "Polygon", "coordinates": [[[float("nan"), 1], [2, 3], [4, 9], [float("nan"), 1]]]}}], "a.geojson"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_areas_that_do_not_fit_are_refused_with_the_reason(slide, tmp_path, what):
    features, told = UNUSABLE[what]
    path = write(tmp_path / "a.geojson", *features)
    with pytest.raises(SlideError, match=told) as caught:
        restrict(hs.find_tissue(slide), slide, SlideAreas((path,)))
    assert str(caught.value).startswith("a.png: ")
    assert "a.geojson" in str(caught.value)


def test_areas_in_micrometres_are_recognised(picture, tmp_path):
    """A small piece at the right: in µm its outline lies on the glass at the left."""
    moved = np.full_like(picture, 244)
    moved[600:900, 1200:1500] = picture[200:500, 300:600]
    slide = hs.picture_slide(moved, 0.5, "a.png")
    path = write(tmp_path / "a.geojson", annotation(shapely.box(600, 300, 750, 450)))
    with pytest.raises(SlideError, match="in µm"):
        restrict(hs.find_tissue(slide), slide, SlideAreas((path,)))


def test_a_class_that_is_not_there_is_named_with_those_that_are(slide, tmp_path):
    path = write(tmp_path / "a.geojson", annotation(BOX, "margin"))
    with pytest.raises(SlideError, match="no area of the class tumour, only margin"):
        inside(slide, path, include=("tumour",))


def test_a_mask_of_another_shape_is_refused(slide, tmp_path):
    Image.new("L", (400, 400), 255).save(tmp_path / "a.png")
    with pytest.raises(SlideError, match="another shape"):
        inside(slide, tmp_path / "a.png")
    (tmp_path / "b.png").write_text("none")
    with pytest.raises(SlideError, match="no mask image"):
        inside(slide, tmp_path / "b.png")


@pytest.mark.slow
def test_a_hundred_thousand_polygons_take_seconds(slide, tmp_path):
    places = np.random.default_rng(0).integers(0, [WIDTH - 8, HEIGHT - 8], (100_000, 2)).tolist()
    ring = np.array([(0, 0), (6, 0), (8, 4), (4, 8), (0, 6), (0, 0)])
    parts = [[(ring + place).tolist()] for place in places]
    about = {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": parts}, "properties": {}}
    path = write(tmp_path / "a.geojson", about)
    start = time.process_time()
    assert inside(slide, path).mean() > 0.5
    assert time.process_time() - start < 30


def test_files_belong_to_the_slide_with_the_longest_name(tmp_path):
    names = (
        "a.geojson",
        "A-margin.geojson",
        "a-1.geojson.gz",
        "a-1_2.png",
        "b.svs.tif",
        "ab.json",
        "note.txt",
        "._a.png",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"")
    given, strangers = AreaFolder(tmp_path, AreaSettings()).of(["a", "a-1", "b", "c"])
    found = {name: sorted(path.name for path in areas.files) for name, areas in given.items()}
    assert found == {"a": ["A-margin.geojson", "a.geojson"], "a-1": ["a-1.geojson.gz", "a-1_2.png"], "b": ["b.svs.tif"]}
    assert strangers == ["ab.json"]


def test_folders_without_areas_and_unknown_choices_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="holds no areas"):
        AreaFolder(tmp_path, AreaSettings())
    with pytest.raises(SettingsError, match="no folder"):
        AreaFolder(tmp_path / "none", AreaSettings())
    with pytest.raises(SettingsError, match="missing"):
        AreaSettings(missing="ask")


def test_without_areas_fingerprints_are_what_they_were(tmp_path):
    path = write(tmp_path / "a.geojson", annotation(BOX))
    areas = SlideAreas((path,))
    plain, drawn = survey_fingerprint("1 2", 0.5, "x"), survey_fingerprint("1 2", 0.5, "x", areas)
    assert plain == survey_fingerprint("1 2", 0.5, "x", None) != drawn
    write(path, annotation(DONUT))
    assert survey_fingerprint("1 2", 0.5, "x", areas) != drawn


@pytest.fixture
def slides(picture: np.ndarray, tmp_path: Path) -> Path:
    (tmp_path / "slides").mkdir()
    (tmp_path / "areas").mkdir()
    for name in ("a", "b"):
        Image.fromarray(picture).save(tmp_path / "slides" / f"{name}.png", dpi=(25400 / MPP, 25400 / MPP))
    write(tmp_path / "areas" / "a.geojson", annotation(BOX, "tumour"))
    return tmp_path / "slides"


@pytest.mark.parametrize(("missing", "code", "states"), [
    ("refuse", 1, {"a": "inspected", "b": "failed"}),
    ("whole", 0, {"a": "inspected", "b": "inspected"}),
    ("skip", 0, {"a": "inspected"}),
])  # fmt: skip
def test_inspect_lays_tiles_inside_areas_alone(slides, missing, code, states):
    out, areas = slides.parent / "out", slides.parent / "areas"
    command = ["inspect", str(slides), "--out", str(out), "--tile.px", "50", "--tile.mpp", "2", "--workers", "1"]
    command += ["--areas", str(areas), "--area.missing", missing]
    assert main(command) == code
    rows = {row["slide_id"]: row for row in read_rows(out / "slides.csv")}
    assert {name: row["status"] for name, row in rows.items()} == states
    assert rows["a"]["tiles"] == "64"
    if missing == "refuse":
        assert "--area.missing" in rows["b"]["error"]
    if missing == "skip":  # an area that was drawn anew is laid anew
        write(areas / "a.geojson", annotation(shapely.box(300, 200, 700, 400), "tumour"))
        assert main(command) == 0
        assert next(row["tiles"] for row in read_rows(out / "slides.csv")) == "32"
