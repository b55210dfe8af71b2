"""The viewer: what it shows is what stands, and it stays within bounds."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histossl.cli.main import main
from histossl.cli.view_command import view
from histossl.core.errors import SettingsError, StudyError
from histossl.evaluate.search import nearest
from histossl.study.folder import Study
from histossl.view.app import Viewer
from histossl.view.pyramid import SIDE, NoTile, Pyramid
from histossl.view.reading import PictureCache, SlideCache, SlideRef
from histossl.view.report.study_report import report_study
from histossl.wsi.artefacts import KINDS
from histossl.wsi.geometry import Region, Size
from histossl.wsi.slide import open_slide
from histossl.wsi.tile_files import read_artefacts
from support.viewed import TOKEN, app, ask, asked, folder, viewer  # noqa: F401 - fixtures


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


def test_patients_whom_only_the_labels_named_are_told_apart(folder, tmp_path):
    """The slides of one's own patient are no neighbours, in the viewer and in the report."""
    study = Study(tmp_path / "study")
    study.write_slides([row | {"patient_id": ""} for row in Study(folder).slides()[:5]])
    shutil.copy(folder / "embeddings.h5ad", study.embeddings)
    ids = [row["slide_id"] for row in study.slides()]
    told = [("a", ids[0]), ("a", ids[1]), ("b", ids[2]), (ids[3], ids[3]), ("", ids[4])]
    lines = [f"kind,giga-ssl,{slide},{patient},x,x" for patient, slide in told]
    head = "target,embedding,slide_id,patient_id,truth,predicted"
    (study.folder / "predictions.csv").write_text("\n".join([head, *lines]))
    assert study.patients() == {ids[0]: "a", ids[1]: "a", ids[2]: "b"}
    viewer = Viewer(study, tmp_path)
    alike = {one["slide"] for one in ask(viewer.app(), "/slides/0/words.json").json()["neighbours"]}
    assert alike == {2, 3, 4}
    assert ask(viewer.app(), "/cohort.json").json()["columns"]["patient_id"] == ["a", "a", "b", "", ""]
    viewer.close()
    report_study(study)
    page = study.report.read_text(encoding="utf-8")
    assert "5 slides of 2 patients" in " ".join(page.split())
    study.write_slides([row | {"patient_id": "c"} for row in study.slides()])
    assert set(study.patients().values()) == {"c"}  # whom slides.csv names counts more


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
    layers = ask(app, f"/{TOKEN}/slides/0/facts.json").json()["overlays"]["heat"]
    assert [name for name in layers if not name.startswith("artefact: ")] == layers[:2] == ["kind: a", "kind: b"]
    heat = ask(app, f"/{TOKEN}/slides/0/heat/0.bin").body
    assert heat[: len(data)] == data
    assert np.frombuffer(heat, "<f4", -1, len(data)).tolist() == list(range(count))
    assert ask(app, f"/{TOKEN}/slides/0/heat/{len(layers)}.bin").status == 404
    known = read_artefacts(Study(folder).tiles(viewer.cohort.rows[0]["slide_id"]))
    shown = [kind for k, kind in enumerate(KINDS) if np.nan_to_num(known.scores[:, k]).max() >= 0.01]
    assert layers[2:] == [f"artefact: {kind}" for kind in shown]
    for k, kind in enumerate(shown, 2):
        heat = ask(app, f"/{TOKEN}/slides/0/heat/{k}.bin").body
        np.testing.assert_array_equal(np.frombuffer(heat, "<f4", -1, len(data)), known.scores[:, KINDS.index(kind)])
    others = ask(app, f"/{TOKEN}/slides/1/facts.json").json()["overlays"]
    assert all(name.startswith("artefact: ") for name in others.pop("heat"))
    assert others == {"tissue": True, "areas": False, "tiles": True, "nuclei": False}


def test_areas_are_a_layer_beside_the_tissue_inside(folder, tmp_path):
    path = Path(Study(folder).slides()[0]["path"])
    drawn = {"type": "Polygon", "coordinates": [[[100, 200], [600, 200], [600, 700], [100, 700], [100, 200]]]}
    (tmp_path / "areas").mkdir()
    feature = {"type": "Feature", "geometry": drawn, "properties": {}}
    (tmp_path / "areas" / f"{path.stem}.geojson").write_text(json.dumps(feature))
    command = ["inspect", str(path), "--out", str(tmp_path / "out"), "--tile.px", "64", "--workers", "1"]
    assert main([*command, "--areas", str(tmp_path / "areas"), "--quiet"]) == 0
    viewer = Viewer(Study(tmp_path / "out"), tmp_path / "nuclei")
    try:
        assert ask(viewer.app(), "/slides/0/facts.json").json()["overlays"]["areas"]
        (ring,) = (np.array(ring) for ring in ask(viewer.app(), "/slides/0/areas.json").json())
        assert np.abs(ring.min(0) - [100, 200]).max() < 2
        assert np.abs(ring.max(0) - [600, 700]).max() < 2
        tissue = np.concatenate([np.array(ring) for ring in ask(viewer.app(), "/slides/0/tissue.json").json()])
        assert (tissue.min(0) > [98, 198]).all()
        assert (tissue.max(0) < [602, 702]).all()
        shutil.rmtree(tmp_path / "out" / "tiles")
        assert main(command) == 0  # whole again: the picture of the areas still lies there
        assert not ask(viewer.app(), "/slides/0/facts.json").json()["overlays"]["areas"]
    finally:
        viewer.close()


# ---- bounds


def test_what_is_kept_stays_within_its_capacity():
    kept = PictureCache(1000)
    for k in range(50):
        kept.put(k, bytes(100))
        kept.get(0)
    assert len(kept) == 1000
    assert kept.get(0) is not None  # asked for all the time
    assert kept.get(1) is None
    kept.put(0, bytes(5000))
    assert len(kept) <= 1000


def test_fifty_requests_at_once_open_no_more_slides_than_there_are_threads(folder, monkeypatch):
    viewer = Viewer(Study(folder), folder / "nuclei", threads=3, capacity=1)
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
    shelf = SlideCache(capacity=3 * 100 * 100 * 3)
    held = []
    for k in range(5):
        with shelf.slide(SlideRef(k, tmp_path / f"{k}.png", 1.0)) as slide:
            held.append(slide)
    with shelf.slide(SlideRef(4, tmp_path / "4.png", 1.0)) as again:
        assert again is held[4]
    with shelf.slide(SlideRef(0, tmp_path / "0.png", 1.0)) as anew:
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


def test_the_command_says_what_is_missing(tmp_path):
    with pytest.raises(StudyError, match="no such folder"):
        view(tmp_path / "none")
    with pytest.raises(StudyError, match="no slides"):
        view(tmp_path)
    with pytest.raises(SettingsError, match="no such folder"):
        view(tmp_path, nuclei=tmp_path / "none")
