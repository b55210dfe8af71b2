"""The viewer: what it shows is what stands, it stays within bounds, and nothing but the study gets out of it."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histossl.embeddings import write_embeddings
from histossl.errors import FileFormatError, SettingsError, StudyError
from histossl.evaluate.search import nearest
from histossl.geometry import Region, Size
from histossl.nuclei.export import write_geojson, write_parquet
from histossl.nuclei.instances import MEASURES, Nuclei
from histossl.slide import open_slide
from histossl.store import read_tiles_of
from histossl.study import COLUMNS, Study
from histossl.survey import SurveyJob, survey_slide
from histossl.tiles import TileSpec
from histossl.tissue import TissueSettings
from histossl.view.app import Viewer
from histossl.view.commands import view
from histossl.view.guard import HEADERS, known_host
from histossl.view.outlines import read_outlines
from histossl.view.pyramid import SIDE, NoTile, Pyramid
from histossl.view.reading import Kept, Place, Shelf

TOKEN = "t0ken"
SECRET = "what nobody may read"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    def picture(self):
        return np.asarray(Image.open(io.BytesIO(self.body)))


async def asked(app, address, method="GET", host="127.0.0.1:1", gone=None) -> Answer:
    """Ask as a server hands a request on; `gone` is an event upon which the client leaves."""
    path = unquote(address.partition("?")[0], errors="surrogateescape")
    head = [(b"host", host.encode())] if host is not None else []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": head,
        "http_version": "1.1",
    }
    sent, over = [], gone or asyncio.Event()
    first = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        for message in first:
            return message
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    headers = [(name.decode().lower(), value.decode()) for name, value in sent[0].get("headers", ())]
    assert len(dict(headers)) == len(headers), "a header is sent twice"
    return Answer(sent[0]["status"], dict(headers), b"".join(m.get("body", b"") for m in sent[1:]))


def ask(app, address, **more) -> Answer:
    return asyncio.run(asked(app, address, **more))


def squares(n: int, size: Size, seed: int = 0) -> Nuclei:
    """n crooked squares of 6 to 14 pixels, all over a slide."""
    rng = np.random.default_rng(seed)
    corner = np.array([[-1, -1], [1, -1.0], [1.0, 1], [-1, 1]])
    middle = rng.uniform(10, [size.width - 10, size.height - 10], (n, 2))
    points = middle[:, None] + corner * rng.uniform(3, 7, (n, 1, 1)) + rng.uniform(-1, 1, (n, 4, 2))
    measures = np.zeros((n, len(MEASURES)), np.float32)
    measures[:, :2] = middle
    return Nuclei(points.reshape(-1, 2).astype(np.float32), np.arange(n + 1, dtype=np.int64) * 4, measures)


def painted(seed: int) -> np.ndarray:
    """(900, 700, 3) a round pink tissue on bright glass."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:900, :700]
    tissue = ((y - 450) / 360) ** 2 + ((x - 350) / 280) ** 2 < 1
    picture = np.where(tissue[..., None], [200, 120, 170], [243, 242, 244]) + rng.normal(0, 6, (900, 700, 1))
    return picture.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study of six slides with vectors, predictions and nuclei, one slide that is none, and secrets beside it."""
    root = tmp_path_factory.mktemp("view")
    slides, study = root / "cohort" / "slides", Study(root / "study")
    slides.mkdir(parents=True)
    rows = []
    for k in range(6):
        name = f"slide-{k}"
        path = slides / f"{name}.tiff"
        tifffile.imwrite(path, painted(k), tile=(256, 256), photometric="rgb", resolution=(1e4, 1e4), resolutionunit=3)
        job = SurveyJob(name, path, None, None, TissueSettings(), TileSpec(64), study.tiles(name), study.qc(name))
        rows.append(
            {"slide_id": name, "path": str(path), "status": "inspected"}
            | {n: str(v) for n, v in vars(survey_slide(job)).items()}
        )
    (slides / "zz-no-slide.svs").write_text(SECRET)
    rows.append(
        {"slide_id": "zz-no-slide", "path": str(slides / "zz-no-slide.svs"), "status": "failed", "error": "is none"}
    )
    study.write_slides(rows)
    out = study.folder
    for place in (root, root / "cohort", out):
        for name in ("secret.txt", "secret.geojson", "secret.html", "secret.jpg", "secret.js", "secret.h5"):
            (place / name).write_text(SECRET)
    rows = [dict.fromkeys(COLUMNS, "") | row | {"ward": f"<b>{k % 2}</b>"} for k, row in enumerate(rows)]
    study.write_slides(rows)
    rng = np.random.default_rng(0)
    good = [row for row in rows if row["status"] != "failed"][:5]  # the sixth has no vector
    write_embeddings(study.embeddings, good, {"giga-ssl": rng.normal(size=(5, 8))}, {}, "made")
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["target", "embedding", "slide_id", "patient_id", "truth", "predicted", "p(a)", "p(b)"])
        for k, row in enumerate(good):
            writer.writerow(["kind", "giga-ssl", row["slide_id"], "", "ab"[k % 2], "a", "0.75", "0.25"])
            writer.writerow(["kind", "mean pooling", row["slide_id"], "", "ab"[k % 2], "b", "", ""])
    xy = read_tiles_of(study.tiles("slide-0")).xy
    heat = pd.DataFrame(
        {"x": xy[:, 0], "y": xy[:, 1], "looked_at": 1.0, "share(a)": np.arange(len(xy)), "share(b)": 0.5}
    )
    (out / "heatmaps" / "kind").mkdir(parents=True)
    heat.to_csv(out / "heatmaps" / "kind" / "slide-0.csv", index_label="tile")
    (out / "nuclei").mkdir()
    write_geojson(out / "nuclei" / f"{good[0]['slide_id']}.geojson", [squares(300, Size(700, 900))], 1.0)
    return out


@pytest.fixture(scope="module")
def viewer(folder) -> Viewer:
    return Viewer(Study(folder), folder / "nuclei", threads=3)


@pytest.fixture(scope="module")
def app(viewer):
    return viewer.guarded(TOKEN)


# ---- what is shown


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_the_tiles_of_every_level_cover_the_slide_and_nothing_twice(width, height):
    pyramid = Pyramid(Size(width, height))
    assert pyramid.step(pyramid.last) == 1
    assert 2 ** (pyramid.last) >= max(width, height)
    for level in range(pyramid.last + 1):
        step = pyramid.step(level)
        columns, rows = (-(-length // (SIDE * step)) for length in (width, height))
        regions = [[pyramid.region(level, i, j) for i in range(columns)] for j in range(rows)]
        assert all(a.x + a.width == b.x for row in regions for a, b in itertools.pairwise(row))
        assert all(a.y + a.height == b.y for a, b in itertools.pairwise(row[0] for row in regions))
        last = regions[-1][-1]
        assert 0 <= last.x + last.width - width < step
        assert 0 <= last.y + last.height - height < step
        for column, row in ((columns, 0), (0, rows)):
            with pytest.raises(NoTile):
                pyramid.region(level, column, row)
    with pytest.raises(NoTile):
        pyramid.step(pyramid.last + 1)


def test_the_tiles_show_the_slide(app, viewer):
    facts = ask(app, f"/{TOKEN}/slides/1/facts.json").json()
    size = Size(facts["width"], facts["height"])
    assert (size.width, size.height, facts["mpp"], facts["side"]) == (700, 900, 1.0, SIDE)
    last = Pyramid(size).last
    whole = np.full((1024, 1024, 3), 255, np.uint8)
    for row in range(2):
        for column in range(2):
            tile = ask(app, f"/{TOKEN}/slides/1/tiles/{last}/{column}_{row}.jpg")
            assert tile.headers["content-type"] == "image/jpeg"
            shown = tile.picture()
            whole[row * SIDE :, column * SIDE :][: shown.shape[0], : shown.shape[1]] = shown
    with open_slide(viewer.cohort.rows[1]["path"]) as slide:
        truth = slide.read(Region.whole(slide.size), slide.mpp)
        half = slide.read(Region(0, 0, 700, 900), 2.0)
    assert (whole[900:] == 255).all()
    assert np.abs(whole[:900, :700].astype(int) - truth).mean() < 4  # JPEG
    small = ask(app, f"/{TOKEN}/slides/1/tiles/{last - 1}/0_0.jpg").picture()
    assert small.shape == (450, 350, 3)
    assert np.abs(small.astype(int) - half).mean() < 4
    assert max(ask(app, f"/{TOKEN}/slides/1/thumbnail.jpg").picture().shape) == 320


def test_the_cohort_is_that_of_the_study(app, viewer, folder):
    cohort = ask(app, f"/{TOKEN}/cohort.json").json()
    names = [row["slide_id"] for row in Study(folder).slides()]
    assert cohort["names"] == names
    assert list(cohort["failed"]) == ["6"]
    assert cohort["columns"]["kind"] == ["a", "b", "a", "b", "a", "", ""]
    assert cohort["columns"]["ward"][1] == "<b>1</b>"
    assert "path" not in cohort["columns"]
    assert set(cohort["maps"]) == {"pca"}
    places = ask(app, f"/{TOKEN}/maps/pca.json").json()["places"]
    assert [place is None for place in places] == [False] * 5 + [True] * 2
    words = ask(app, f"/{TOKEN}/slides/1/words.json").json()
    hits = nearest(viewer.cohort.vectors, viewer.cohort.patients, 1, 8)
    assert [one["slide"] for one in words["neighbours"]] == [hit.row for hit in hits]
    assert [(p["embedding"], p["predicted"], p["shares"]) for p in words["predictions"]] == [
        ("giga-ssl", "a", {"a": 0.75, "b": 0.25}),
        ("mean pooling", "b", {}),
    ]
    assert str(folder) not in json.dumps(words)


def test_a_slide_that_cannot_be_read_says_why_and_the_others_go_on(app):
    answer = ask(app, f"/{TOKEN}/slides/6/facts.json")
    assert answer.status == 409
    assert "zz-no-slide.svs" in answer.json()["error"]
    assert ask(app, f"/{TOKEN}/slides/6").status == 200
    assert ask(app, f"/{TOKEN}/slides/6/thumbnail.jpg").status == 204
    assert ask(app, f"/{TOKEN}/slides/6/nuclei.json").status == 404
    assert ask(app, f"/{TOKEN}/slides/5/facts.json").status == 200


def test_tissue_and_tiles_are_those_of_the_study(app, folder, viewer):
    rings = ask(app, f"/{TOKEN}/slides/0/tissue.json").json()
    area = sum(abs(np.cross(ring[:-1], ring[1:]).sum()) / 2 for ring in (np.array(r) for r in rings))
    assert 0.1 * 700 * 900 < area < 700 * 900
    data = ask(app, f"/{TOKEN}/slides/0/tiles.bin").body
    assert np.frombuffer(data, "<f4", 2).tolist() == [64, 64]
    count = int(viewer.cohort.rows[0]["tiles"])
    assert len(data) == 8 + 8 * count
    assert ask(app, f"/{TOKEN}/slides/0/facts.json").json()["overlays"]["heat"] == ["kind: a", "kind: b"]
    heat = ask(app, f"/{TOKEN}/slides/0/heat/0.bin").body
    assert heat[: len(data)] == data
    assert np.frombuffer(heat, "<f4", -1, len(data)).tolist() == list(range(count))
    assert ask(app, f"/{TOKEN}/slides/0/heat/2.bin").status == 404
    assert ask(app, f"/{TOKEN}/slides/1/facts.json").json()["overlays"] == {
        "tissue": True,
        "tiles": True,
        "heat": [],
        "nuclei": False,
    }


# ---- nuclei


def unpacked(data: bytes, cell: int, side: int, columns: int) -> list[np.ndarray]:
    count = int(np.frombuffer(data, "<u4", 1)[0])
    sizes = np.frombuffer(data, "<u2", count, 4)
    steps = np.frombuffer(data, "<i2", -1, 4 + 2 * count).reshape(-1, 2)
    corner = np.array([cell % columns, cell // columns]) * side
    return np.split(steps / 4 + corner, np.cumsum(sizes)[:-1])


def test_the_cells_hold_every_nucleus_once_where_it_is(app):
    about = ask(app, f"/{TOKEN}/slides/0/nuclei.json").json()
    assert (about["count"], sum(about["cells"].values())) == (300, 300)
    found = []
    for cell, count in about["cells"].items():
        part = unpacked(
            ask(app, f"/{TOKEN}/slides/0/nuclei/{cell}.bin").body, int(cell), about["side"], about["columns"]
        )
        assert len(part) == count
        found += part
    truth = squares(300, Size(700, 900))
    middles = truth.points.reshape(-1, 4, 2).mean(1)
    for ring in found:
        gap = np.abs(middles - ring[:-1].mean(0)).max(1)  # closed: the first point stands twice
        assert gap.min() < 0.3
        middles[gap.argmin()] = np.inf
    assert ask(app, f"/{TOKEN}/slides/0/nuclei/999999.bin").body == bytes(4)
    picture = ask(app, f"/{TOKEN}/slides/0/nuclei.png")
    assert (picture.headers["content-type"], picture.picture().shape[2]) == ("image/png", 4)


@pytest.mark.parametrize("ending", [".geojson", ".geojson.gz", ".parquet", "qupath"])
def test_nuclei_are_the_same_from_every_kind_of_file(tmp_path, ending):
    size, nuclei = Size(3000, 2000), squares(900, Size(3000, 2000), 3)
    write_geojson(tmp_path / "ours.geojson", [nuclei], 0.5)
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
        write_parquet(path, [nuclei], 0.5)
    elif ending == "qupath":
        path = tmp_path / "a.geojson"
        path.write_text(json.dumps(json.loads((tmp_path / "ours.geojson").read_text()), indent=2))
    else:
        write_geojson(path, [nuclei], 0.5)
    one, other = read_outlines(tmp_path / "ours.geojson", size), read_outlines(path, size)
    assert len(other) == 900
    np.testing.assert_array_equal(one.cell, other.cell)
    np.testing.assert_allclose(one.middles, other.middles, atol=2)
    assert (np.diff(other.cell) >= 0).all()


def test_damaged_and_empty_files_of_nuclei(tmp_path):
    size = Size(100, 100)
    write_geojson(tmp_path / "none.geojson", [], 0.5)
    empty = read_outlines(tmp_path / "none.geojson", size)
    assert (len(empty), empty.about()["cells"]) == (0, {})
    assert Image.open(io.BytesIO(empty.density())).mode == "RGBA"
    write_geojson(tmp_path / "cut.geojson", [squares(3, size)], 0.5)
    whole = (tmp_path / "cut.geojson").read_text()
    (tmp_path / "cut.geojson").write_text(whole[: len(whole) - 300])
    (tmp_path / "odd.parquet").write_text("no")
    (tmp_path / "odd.geojson.gz").write_bytes(b"\x1f\x8b12")
    for name in ("cut.geojson", "odd.parquet", "odd.geojson.gz"):
        with pytest.raises((FileFormatError, Exception), match=name.split(".")[0]):
            read_outlines(tmp_path / name, size)


# ---- bounds


def test_what_is_kept_stays_within_its_room():
    kept = Kept(1000)
    for k in range(50):
        kept.put(k, bytes(100))
        kept.get(0)
    assert len(kept) == 1000
    assert kept.get(0) is not None  # asked for all the time
    assert kept.get(1) is None
    kept.put(0, bytes(5000))
    assert len(kept) <= 1000


def test_fifty_requests_at_once_open_no_more_slides_than_there_are_threads(folder, monkeypatch):
    viewer = Viewer(Study(folder), folder / "nuclei", threads=3, room=1)
    import histossl.view.reading as reading

    opened, closed = [], []

    def counting(path, *more):
        slide = open_slide(path, *more)
        monkeypatch.setattr(slide, "close", lambda close=slide.close: (closed.append(path), close()))
        opened.append(path)
        return slide

    monkeypatch.setattr(reading, "open_slide", counting)

    async def fifty():
        return await asyncio.gather(*(asked(viewer.app(), f"/slides/1/tiles/10/{k % 2}_0.jpg") for k in range(50)))

    assert {answer.status for answer in asyncio.run(fifty())} == {200}
    assert 1 <= len(opened) <= 3
    viewer.close()
    assert sorted(opened) == sorted(closed)


def test_idle_slides_are_closed_when_there_are_many(tmp_path):
    for k in range(5):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{k}.png")
    shelf = Shelf(room=3 * 100 * 100 * 3)
    held = []
    for k in range(5):
        with shelf.slide(Place(k, tmp_path / f"{k}.png", 1.0)) as slide:
            held.append(slide)
    with shelf.slide(Place(4, tmp_path / "4.png", 1.0)) as again:
        assert again is held[4]
    with shelf.slide(Place(0, tmp_path / "0.png", 1.0)) as anew:
        assert anew is not held[0]


def test_who_goes_away_before_its_turn_is_not_served(folder):
    viewer = Viewer(Study(folder), folder / "nuclei", threads=1)
    hold, made = threading.Event(), []
    viewer.readers.submit(hold.wait)

    async def leave():
        gone = asyncio.Event()
        waits = asyncio.ensure_future(asked(viewer.app(), "/slides/0/tiles/10/0_0.jpg", gone=gone))
        await asyncio.sleep(0.05)
        assert viewer.waiting == 1
        gone.set()
        return await waits

    viewer.shelf.slide = lambda place: made.append(place)
    assert asyncio.run(leave()).status == 404
    hold.set()
    viewer.close()
    assert (made, viewer.waiting) == ([], 0)


def test_there_is_no_end_of_requests_that_wait(folder, monkeypatch):
    monkeypatch.setattr("histossl.view.app._WAITING", 0)
    viewer = Viewer(Study(folder), folder / "nuclei", threads=1)
    assert ask(viewer.app(), "/slides/0/thumbnail.jpg").status == 503
    viewer.close()


# ---- who may ask


def test_nothing_is_answered_without_the_token_or_under_another_name(app):
    for address in (
        "/",
        "/cohort.json",
        "/t0ke/",
        "/t0kenx/",
        "//",
        f"/x/{TOKEN}/",
        "/slides/0",
        "/static/view.css",
        "/é/",
    ):
        answer = ask(app, address)
        assert (answer.status, b"histossl view" in answer.body) == (403, True), address
    assert ask(app, f"/{TOKEN}/").status == 200
    assert ask(app, f"/{TOKEN}").headers["location"] == f"/{TOKEN}/"
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", None, "[::1", "localhost.evil", "0x7f.1"):
        assert ask(app, f"/{TOKEN}/", host=host).status == 400, host
    for host in ("localhost", "localhost:9", "127.0.0.1:8000", "[::1]:80", "LOCALHOST:1"):
        assert ask(app, f"/{TOKEN}/", host=host).status == 200, host
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(app, f"/{TOKEN}/", method=method).status == 405


def test_asked_to_listen_to_others_it_knows_its_addresses_and_no_foreign_names():
    assert known_host("192.168.1.7:80", "0.0.0.0")
    assert known_host("station.lab:80", "station.lab")
    assert not known_host("evil.example", "0.0.0.0")


def test_every_answer_carries_the_headers(app):
    for address in (
        "/",
        f"/{TOKEN}/",
        f"/{TOKEN}/nothing",
        f"/{TOKEN}/static/slide.js",
        f"/{TOKEN}/slides/0/thumbnail.jpg",
    ):
        assert HEADERS.items() <= ask(app, address).headers.items()
    page = ask(app, f"/{TOKEN}/")
    assert page.headers["cache-control"] == "no-store"
    assert "unsafe" not in HEADERS["content-security-policy"]


def test_the_pages_load_nothing_from_elsewhere(viewer):
    for name, content in viewer.files.items():
        if name.endswith((".html", ".css")) or (name.endswith(".js") and "openseadragon" not in name):
            text = content.decode()
            assert "//" not in text.replace("// ", "").replace("//\n", ""), name
            assert "innerHTML" not in text
            assert " on" not in [part[:3] for part in text.split("<")] if name.endswith(".html") else True


WORDS = r""".. . %2e%2e %2e%2e%2f %252e%252e %5c..%5c %00 / // \ ~ slides static maps tiles nuclei heat secret
secret.txt secret.geojson secret.js secret.jpg secret.h5 study etc/passwd 0 1 6 7 -1 1e3 1_0.jpg 999999999 ٣ %ff é
facts.json words.json tiles.bin nuclei.json thumbnail.jpg view.css file: http: ?a=.. pca.json null"""
ALPHABET = [*WORDS.split(), "9" * 5000, "\ud800", " ", "\n"]


@given(st.lists(st.sampled_from(ALPHABET), max_size=7), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_address_gets_at_what_is_not_the_study_s(app, parts, apart):
    answer = ask(app, f"/{TOKEN}/" + ("/" if apart else "").join(parts))
    assert answer.status in (200, 204, 404, 405, 409), parts
    assert SECRET.encode() not in answer.body
    assert HEADERS.items() <= answer.headers.items()


@pytest.mark.parametrize(
    "tile", ["11/0_0", "10/2_0", "10/0_2", "0/1_0", "999999999/0_0", "10/999999999_0", "10/-1_0", "10/0_0.5"]
)
def test_there_are_no_tiles_beyond_the_slide(app, tile):
    assert ask(app, f"/{TOKEN}/slides/0/tiles/{tile}.jpg").status == 404
    assert ask(app, f"/{TOKEN}/slides/7/tiles/10/0_0.jpg").status == 404


def test_a_table_with_paths_for_names_opens_no_other_file(folder, tmp_path):
    study = Study(tmp_path / "sent")
    (study.folder / "nuclei").mkdir()
    (tmp_path / "secret.geojson").write_text(SECRET)
    names = ["../secret", "../../secret", str(tmp_path / "secret"), "..", "caf\udce9", "<script>alert(1)</script>", ""]
    real = Study(folder).slides()[0]
    study.write_slides([real | {"slide_id": name} for name in names])
    viewer = Viewer(study, study.folder / "nuclei")
    for k in range(len(names)):
        for what in (
            "facts.json",
            "words.json",
            "nuclei.json",
            "nuclei.png",
            "nuclei/0.bin",
            "tiles.bin",
            "thumbnail.jpg",
        ):
            answer = ask(viewer.app(), f"/slides/{k}/{what}")
            assert answer.status in (200, 204, 404, 409)
            assert SECRET.encode() not in answer.body
        assert ask(viewer.app(), f"/slides/{k}/nuclei.json").status == 404
    assert ask(viewer.app(), "/cohort.json").json()["names"] == names
    viewer.close()


def test_the_command_says_what_is_missing(tmp_path):
    with pytest.raises(StudyError, match="no such folder"):
        view(tmp_path / "none")
    with pytest.raises(StudyError, match="no slides"):
        view(tmp_path)
    with pytest.raises(SettingsError, match="no such folder"):
        view(tmp_path, nuclei=tmp_path / "none")
