"""Who may ask the viewer: nothing but the study gets out of it, and that only to who holds the token."""

from __future__ import annotations

import asyncio
import inspect
import shutil

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histossl.cli.view_command import view
from histossl.study.folder import Study
from histossl.view.app import Viewer
from histossl.view.guard import HEADERS, known_host
from support.viewed import SECRET, TOKEN, app, ask, folder, viewer  # noqa: F401 - fixtures


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


def test_it_listens_on_this_machine_alone_unless_asked_with_a_new_secret_each_time(folder, monkeypatch, capsys):
    heard: list[str] = []

    def run(_, sockets):
        for one in sockets:
            heard.append(one.getsockname()[0])
            one.close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    addresses = []
    for more in ({}, {}, {"host": "0.0.0.0"}):
        assert view(folder, **more) == 0
        addresses += [word for word in "".join(capsys.readouterr()).split() if word.startswith("http://")]
    assert heard == ["127.0.0.1", "127.0.0.1", "0.0.0.0"]
    secrets = {address.split("/")[3] for address in addresses}
    assert len(secrets) == 3
    assert min(map(len, secrets)) >= 32
    assert inspect.signature(view).parameters["browser"].default is False


def test_sockets_that_stay_open_are_closed_at_once(app):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "websocket", "path": f"/{TOKEN}/", "headers": []}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_no_page_of_others_frames_guesses_or_reads_an_answer(app):
    headers = ask(app, f"/{TOKEN}/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"  # or the secret would go along
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    for what in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[what] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"


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


def test_links_out_of_the_study_are_not_followed(folder, tmp_path):
    """A study that somebody sent may link its files to any of the reader's."""
    mine, sent = Study(folder), Study(tmp_path / "sent")
    real = mine.slides()[0]
    name, whole = real["slide_id"], mine.slides()[6] | {"slide_id": real["slide_id"]}
    kinds = {
        "nuclei.json": (folder / "nuclei" / f"{name}.geojson", sent.folder / "nuclei" / f"{name}.geojson"),
        "tiles.bin": (mine.tiles(name), sent.tiles(name)),
        "heat/0.bin": (folder / "heatmaps" / "kind" / f"{name}.csv", sent.folder / "heatmaps" / "k" / f"{name}.csv"),
        "thumbnail.jpg": (mine.qc(name), sent.qc(name)),
    }
    for link in (False, True):
        for there, here in kinds.values():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.unlink(missing_ok=True)
            here.symlink_to(there) if link else shutil.copy(there, here)
        for what in kinds:
            sent.write_slides(
                [whole if what == "thumbnail.jpg" else real]
            )  # the picture is for slides that cannot be read
            viewer = Viewer(sent, sent.folder / "nuclei")
            assert (ask(viewer.app(), f"/slides/0/{what}").status == 200) is not link, what
            viewer.close()


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
    names[4] = "café"  # no path of the table has that byte, so a spreadsheet wrote it, in Windows-1252
    assert ask(viewer.app(), "/cohort.json").json()["names"] == names
    viewer.close()
