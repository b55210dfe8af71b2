"""`histossl demo --real`: the slide is fetched once, checked, and its absence is told."""

from __future__ import annotations

import functools
import hashlib
import http.server
import socket
import threading

import pytest

from histossl.cli import demo
from histossl.core.errors import SlideError

NAME = "CMU-1-Small-Region.svs"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a server shows, its address, and the paths that were asked for; its slide is the known one."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(b"a slide")
    monkeypatch.setattr(demo, "_REAL_SHA256", hashlib.sha256(b"a slide").hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/{NAME}", asked
        server.shutdown()
        thread.join()


def test_the_real_slide_is_fetched_once(served, tmp_path):
    _, address, asked = served
    for _ in range(2):
        assert demo.fetched(address, tmp_path / "cache").read_bytes() == b"a slide"
    assert len(asked) == 1


def test_a_damaged_copy_is_fetched_again(served, tmp_path):
    _, address, _ = served
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / NAME).write_bytes(b"a sli")
    assert demo.fetched(address, tmp_path / "cache").read_bytes() == b"a slide"


def test_another_file_is_refused_and_not_kept(served, tmp_path):
    folder, address, _ = served
    (folder / NAME).write_bytes(b"<html>log in</html>")
    with pytest.raises(SlideError, match="another file"):
        demo.fetched(address, tmp_path / "cache")
    assert not (tmp_path / "cache" / NAME).exists()


def test_an_absent_file_and_no_network_are_told(served, tmp_path):
    _, address, _ = served
    with pytest.raises(SlideError, match="404"):
        demo.fetched(address.replace(NAME, "none.svs"), tmp_path / "cache")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(SlideError, match=r"cannot be fetched .* elsewhere and put it into"):
            demo.fetched(f"http://127.0.0.1:{free.getsockname()[1]}/{NAME}", tmp_path / "cache")
