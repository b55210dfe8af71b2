"""Labels written from the viewer: into slides.csv and nowhere else, whole or not at all, by nobody without the token."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import numpy as np
import pytest

from histossl.cli.view_command import view
from histossl.core import atomic
from histossl.core.embeddings import write_embeddings
from histossl.core.errors import LabelError, StudyError
from histossl.evaluate.labels import read_labels
from histossl.study.folder import Study
from histossl.view.app import Viewer
from support.viewed import TOKEN, asked, folder  # noqa: F401 - a fixture


@pytest.fixture
def study(folder, tmp_path) -> Study:
    """The study of the viewer's tests, its table and vectors alone."""
    study = Study(tmp_path / "study")
    for name in ("slides.csv", "embeddings.h5ad", "predictions.csv"):
        shutil.copy(folder / name, study.folder)
    return study


@pytest.fixture
def viewer(study):
    viewer = Viewer(study, study.folder / "nuclei", threads=2)
    yield viewer
    viewer.close()


def post(app, content, address="/labels", **more):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    heads = [(b"content-type", b"application/json")] if "headers" not in more else more.pop("headers")
    return asyncio.run(asked(app, address, method="POST", body=body, headers=heads, **more))


def column(study: Study, name: str) -> list[str | None]:
    return [row.get(name) for row in study.slides()]


def test_labels_are_written_kept_beside_and_undone(study, viewer):
    before = study.table.read_bytes()
    rows = study.slides()
    answer = post(viewer.app(), {"column": "grade", "labels": {"1": "high", "4": "=low", "6": " x "}})
    assert answer.status == 200
    assert column(study, "grade") == ["", "high", "", "", "=low", "", "x"]
    assert [{k: v for k, v in row.items() if k != "grade"} for row in study.slides()] == rows
    backup = study.folder / answer.json()["backup"]
    assert backup.read_bytes() == before
    again = post(viewer.app(), {"column": "grade", "labels": {"1": "low", "2": "low"}}).json()
    assert again["before"] == {"1": "high", "2": ""}
    assert post(viewer.app(), {"column": "grade", "labels": again["before"]}).status == 200
    assert column(study, "grade") == ["", "high", "", "", "=low", "", "x"]
    assert [path.name for path in study.folder.glob("*.bak")] == [backup.name], "one copy, of the table before all"
    shown = asyncio.run(asked(viewer.app(), "/cohort.json")).json()
    assert shown["columns"]["grade"] == column(study, "grade")
    assert "grade" not in [*shown["technical"], *shown["reserved"]]


def test_a_table_that_cannot_be_written_stays_as_it_was(study, viewer, monkeypatch):
    before = study.table.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    answer = post(viewer.app(), {"column": "grade", "labels": {"1": "high"}})
    assert answer.status == 409
    assert "No space left" in answer.json()["error"]
    assert study.table.read_bytes() == before
    assert "grade" not in viewer.cohort.columns
    assert [path for path in study.folder.iterdir() if atomic.is_part(path.name)] == []


@pytest.mark.parametrize(
    ("column", "labels", "told"),
    [
        ("mpp", {"0": "1"}, "not for labels"),
        ("Patient_ID", {"0": "1"}, "not for labels"),
        ("kind", {"0": "a"}, "not for labels"),  # of the probe's labels
        ("", {"0": "a"}, "needs a name"),
        (" grade", {"0": "a"}, "needs a name"),
        ("WARD", {"0": "a"}, "there is a column 'ward'"),
        ("grade", {"0": "n/a"}, "unknown"),
        ("grade", {"0": "a\nb"}, "printed"),
        ("gr\u202eade", {"0": "a"}, "printed"),
        ("grade", {"0": "x" * 65}, "at most 64"),
        ("grade", {"0": "\ud800"}, "printed"),
    ],
)
def test_what_is_no_label_is_refused(study, viewer, column, labels, told):
    before = study.table.read_bytes()
    answer = post(viewer.app(), {"column": column, "labels": labels})
    assert answer.status == 409
    assert told in answer.json()["error"]
    assert study.table.read_bytes() == before
    assert not list(study.folder.glob("*.bak"))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b'{"column": "g"}', b'{"column": 1, "labels": {"0": "a"}}',
        b'{"column": "g", "labels": {}}', b'{"column": "g", "labels": {"0": 1}}', b'{"column": "g", "labels": ["a"]}',
        b'{"column": "g", "labels": {"7": "a"}}', b'{"column": "g", "labels": {"-1": "a"}}', b"\xff\xfe",
        b'{"column": "g", "labels": {"0": "a", "00": "b"}}', b'{"column": "g", "labels": {"1e0": "a"}}',
        b'{"column": "g", "labels": {"' + b"9" * 5000 + b'": "a"}}',
    ],
)  # fmt: skip
def test_what_is_no_request_for_labels_changes_nothing(study, viewer, body):
    before = study.table.read_bytes()
    assert post(viewer.app(), body).status == 400
    assert study.table.read_bytes() == before


def test_only_the_page_itself_may_write(study, viewer):
    before, guarded = study.table.read_bytes(), viewer.guarded(TOKEN)
    asked_for = {"column": "grade", "labels": {"1": "high"}}
    kind, host = (b"content-type", b"application/json"), "127.0.0.1:1"
    assert post(guarded, asked_for).status == 403  # no token
    assert post(guarded, asked_for, "/t0kem/labels").status == 403
    address = f"/{TOKEN}/labels"
    assert post(guarded, asked_for, address, host="evil.example").status == 400
    foreign = [
        [kind, (b"origin", b"http://evil.example")],
        [kind, (b"origin", b"null")],
        [kind, (b"sec-fetch-site", b"cross-site")],
        [(b"content-type", b"text/plain")],  # which a form of another page could send
        [],
    ]
    for heads in foreign:
        assert post(guarded, asked_for, address, host=host, headers=heads).status in (403, 415), heads
    assert post(guarded, b" " * (5 * 2**20), address).status == 413
    assert study.table.read_bytes() == before
    own = [kind, (b"origin", b"http://127.0.0.1:1"), (b"sec-fetch-site", b"same-origin")]
    assert post(guarded, asked_for, address, host=host, headers=own).status == 200


def test_a_read_only_study_is_not_written(study, monkeypatch):
    before = study.table.read_bytes()
    for how in ("asked", "folder", "table"):
        if how != "asked":
            shut = {"folder": study.folder, "table": study.table}[how]
            monkeypatch.setattr(os, "access", lambda path, mode, shut=shut: path != shut)
        viewer = Viewer(study, study.folder, read_only=how == "asked")
        assert asyncio.run(asked(viewer.app(), "/cohort.json")).json()["readonly"] is True
        answer = post(viewer.app(), {"column": "grade", "labels": {"1": "high"}})
        assert answer.status == 409
        assert "read-only" in answer.json()["error"]
        viewer.close()
    assert study.table.read_bytes() == before


@pytest.mark.parametrize(("more", "shut"), [({}, False), ({"read_only": True}, True), ({"host": "0.0.0.0"}, True)])
def test_who_listens_to_others_writes_nothing(study, monkeypatch, more, shut):
    import uvicorn

    from histossl.view import app

    made = []
    real = app.Viewer.__init__

    def init(self, *args, **named):
        made.append(named["read_only"])
        real(self, *args, **named)

    monkeypatch.setattr(app.Viewer, "__init__", init)
    monkeypatch.setattr(uvicorn.Server, "run", lambda _, sockets: [one.close() for one in sockets])
    view(study.folder, **more)
    assert made == [shut]


def test_a_table_that_others_changed_or_use_is_not_written(study, viewer):
    rows = study.slides()
    study.write_slides([row | {"ward": "new"} for row in rows])
    before = study.table.read_bytes()
    with pytest.raises(StudyError, match="has changed"):
        viewer.labels.labelling.write("ward", {1: "x"})
    study.write_slides(rows[1:])
    with pytest.raises(StudyError, match="has changed"):
        viewer.labels.labelling.write("grade", {0: "x"})
    study.write_slides([*rows, rows[0]])
    with pytest.raises(StudyError, match="has changed"):
        viewer.labels.labelling.write("grade", {0: "x"})
    study.table.write_bytes(before)
    with study.lock(), pytest.raises(StudyError, match="another run is using it"):
        Viewer(study, study.folder).labels.labelling.write("grade", {1: "x"})
    assert study.table.read_bytes() == before
    assert viewer.labels.labelling.write("grade", {1: "x"}) == {1: ""}
    assert column(study, "ward") == ["new"] * 7, "what others wrote stays"


def test_the_labels_are_probed_at_once_and_serve_the_probe(tmp_path):
    study, rng = Study(tmp_path / "study"), np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    vectors = rng.normal(size=(60, 8)) + 2 * truth[:, None]
    rows = [
        dict.fromkeys(study.columns, "")
        | {"slide_id": f"s{k}", "path": f"s{k}.svs", "width": "9", "height": "9", "tiles": "1"}
        for k in range(61)
    ]
    study.write_slides(rows)
    write_embeddings(study.embeddings, rows[1:], {"giga-ssl": vectors}, {}, "made")  # the first has no vector
    viewer = Viewer(study, study.folder)
    labels = {str(k + 1): ("low", "high")[truth[k]] for k in range(20)}
    assert post(viewer.app(), {"column": "grade", "labels": labels}).status == 200
    found = asyncio.run(asked(viewer.app(), "/probe.json?column=grade")).json()
    assert found["classes"] == ["high", "low"]
    assert sum(found["counts"]) == found["patients"] == 20
    assert found["auroc"][1] <= found["auroc"][0] <= found["auroc"][2]
    assert found["auroc"][0] > 0.9
    assert found["predicted"][0] is None
    right = np.mean([found["predicted"][k + 1] == ("low", "high")[truth[k]] for k in range(60)])
    assert right > 0.9
    assert len(found["next"]) == 10
    assert min(found["next"]) > 20
    assert asyncio.run(asked(viewer.app(), "/probe.json?column=none")).status == 404
    assert asyncio.run(asked(viewer.app(), "/probe.json")).status == 404
    viewer.cohort.columns["many"] = [str(k) for k in range(61)]
    with pytest.raises(LabelError, match="different labels"):
        viewer.labels.labelling.probe("many")
    viewer.close()
    table = read_labels(study.table, [f"s{k}" for k in range(1, 61)], ("grade",)).table["grade"].dropna()
    assert table.to_dict() == {f"s{slide}": text for slide, text in labels.items()}, "`probe` reads the same"
