"""The viewer as a process, on a study of a stranger: it answers, stays small, and ends at once."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import uvicorn

from histossl.cli import view_command
from histossl.core.errors import FileFormatError
from histossl.study.folder import Study
from histossl.view.outlines import read_outlines
from histossl.wsi.geometry import Size
from support.viewed import folder  # noqa: F401 - a fixture

SIDE = 60_000


def giant(path: Path) -> None:
    """A valid TIFF of one level, 60,000 pixels a side: all of its tiles are the same bytes of the file."""
    tile = zlib.compress(bytes(512 * 512 * 3))
    count = (-(-SIDE // 512)) ** 2
    after = 8 + len(tile)
    arrays = struct.pack("<3H", 8, 8, 8) + struct.pack(f"<{count}I", *[8] * count)
    arrays += struct.pack(f"<{count}I", *[len(tile)] * count)
    tags = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, 3, after), (259, 3, 1, 8), (262, 3, 1, 2), (277, 3, 1, 3),
            (322, 4, 1, 512), (323, 4, 1, 512), (324, 4, count, after + 6), (325, 4, count, after + 6 + 4 * count)]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, after + len(arrays)) + tile + arrays + directory)


def bomb(path: Path, size: int) -> None:
    """Nuclei that unpack to `size` bytes."""
    line = b'{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[1,1],[9,1],[9,9],[1,1]]]}},\n'
    with gzip.open(path, "wb", 9) as file:
        file.write(b'{"type":"FeatureCollection","features":[\n')
        for _ in range(size // (len(line) * 10_000)):
            file.write(line * 10_000)
        file.write(b"]}")


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory) -> Path:
    """A study with good slides, two giants of one level, a picture of 16-bit RGBA, and nuclei that are a bomb."""
    root = tmp_path_factory.mktemp("fire")
    study = Study(root / "study")
    good = Study(folder).slides()[:3]
    names = ["giant-0", "giant-1", "deep"]
    for name in names[:2]:
        giant(root / f"{name}.tiff")
    tifffile.imwrite(root / "deep.tif", np.zeros((12_000, 12_000, 4), np.uint16), compression="zlib",
                     photometric="rgb", extrasamples=["unassalpha"])  # fmt: skip
    empty = dict.fromkeys(study.columns, "")
    odd = [
        empty | {"slide_id": n, "path": str(root / f"{n}.{'tif' if n == 'deep' else 'tiff'}"), "mpp": "0.5"}
        for n in names
    ]
    study.write_slides([*good, *odd])
    (study.folder / "nuclei").mkdir()
    bomb(study.folder / "nuclei" / f"{good[1]['slide_id']}.geojson.gz", 300_000_000)
    return study.folder


class Server:
    """`histossl view` in a process of its own."""

    def __init__(self, study: Path) -> None:
        command = [sys.executable, "-m", "histossl", "view", str(study)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for line in self.process.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)(/\S+/)", line):
                self.port, self.root = int(found[1]), found[2]
                break

    def ask(self, address: str, timeout: float = 120) -> tuple[int, bytes]:
        asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        asked.request("GET", self.root + address)
        answer = asked.getresponse()
        body = answer.read()
        asked.close()
        return answer.status, body

    def leave(self, address: str) -> socket.socket:
        """Ask, and do not wait for the answer."""
        gone = socket.create_connection(("127.0.0.1", self.port))
        gone.sendall(f"GET {self.root}{address} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        return gone

    def memory(self) -> int:
        every = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(one.memory_info().rss for one in every)


@pytest.fixture(scope="module")
def server(hostile):
    server = Server(hostile)
    server.ask("slides/0/facts.json")  # its workers have started
    yield server
    server.process.kill()
    server.process.wait()


def test_slides_without_small_levels_hold_nobody_up(server):
    for k in (3, 4) * 3:
        server.leave(f"slides/{k}/thumbnail.jpg").close()
        server.leave(f"slides/{k}/tiles/3/0_0.jpg").close()
    start = time.monotonic()
    assert server.ask("slides/0/thumbnail.jpg")[0] == 200
    assert server.ask("slides/1/tiles/10/0_0.jpg")[0] == 200
    assert time.monotonic() - start < 30
    assert server.ask("slides/3/thumbnail.jpg")[0] == 204
    status, body = server.ask("slides/3/tiles/3/0_0.jpg")
    assert (status, b"million pixels" in body) == (409, True)
    assert server.ask("slides/3/tiles/16/0_0.jpg")[0] == 200  # at its own resolution it is shown


def test_bombs_end_at_a_cap_and_the_rest_goes_on(server):
    for address in ("slides/1/nuclei.json", "slides/5/tiles/5/0_0.jpg", "slides/5/facts.json"):
        status, _ = server.ask(address)
        assert status in (200, 409), address
    assert server.ask("slides/1/nuclei.json")[0] == 409
    assert server.ask("slides/0/tissue.json")[0] == 200
    assert server.memory() < 4 * 2**30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_odd_requests_and_fifty_slow_clients(server, capsys):
    rng = np.random.default_rng(0)
    slow = [server.leave("cohort.json") for _ in range(50)]
    parts = ["slides", "0", "1", "3", "9" * 12, "tiles", "thumbnail.jpg", "..", "%2e%2e", "%00", "é".encode().decode("latin-1"),
             "nuclei.json", "nuclei", "static", "view.css", "<script>", "heat", "tissue.json", "facts.json", "*", "4_4.jpg"]  # fmt: skip

    def some(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(1250):
            address = "/".join(chance.choice(parts, chance.integers(1, 6)))
            raw = f"GET {server.root}{address} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode(
                "latin-1"
            )
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as asked:
                asked.sendall(raw[: int(chance.integers(1, len(raw) + 1))] if chance.random() < 0.1 else raw)
                if chance.random() < 0.8:
                    asked.settimeout(0.05)
                    with contextlib.suppress(TimeoutError):
                        asked.recv(100)

    held = []
    for _ in range(2):
        crew = [threading.Thread(target=some, args=(int(seed),)) for seed in rng.integers(2**31, size=4)]
        for one in crew:
            one.start()
        for one in crew:
            one.join()
        assert server.ask("slides/0/thumbnail.jpg")[0] == 200
        held.append(server.memory())
    with capsys.disabled():
        print(f" {held[0] / 2**20:.0f} and {held[1] / 2**20:.0f} MiB after 5,000 and 10,000", flush=True)  # noqa: T201
    assert held[1] - held[0] < 2**26
    for one in slow:
        one.close()


def test_small_answers_come_at_once(server):
    asked = http.client.HTTPConnection("127.0.0.1", server.port)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        asked.request("GET", server.root + "static/view.css")
        asked.getresponse().read()
        times.append(time.perf_counter() - start)
    asked.close()
    assert min(times[5:]) < 0.03  # 0.044 s where the last part waits for the client's acknowledgement


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_it_whatever_it_is_reading(hostile, busy):
    server = Server(hostile)
    server.ask("slides/0/facts.json")
    clients = []
    if busy:
        clients = [server.leave(what) for what in ("slides/1/nuclei.json", "slides/5/tiles/5/0_0.jpg", "cohort.json")]
        time.sleep(0.5)
    children = psutil.Process(server.process.pid).children(recursive=True)
    begun = time.monotonic()
    os.killpg(server.process.pid, signal.SIGINT)
    screen = server.process.stderr.read()
    server.process.wait(30)
    assert time.monotonic() - begun < 20
    assert server.process.returncode in (0, 130)
    assert "Traceback" not in screen, screen
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    for one in clients:
        one.close()


def test_the_listening_socket_is_tcp_without_delay():
    with view_command._listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # by which asyncio knows what to set
        assert listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_address_is_on_no_command_line(folder, monkeypatch, capsys):
    opened: list[str] = []
    pages: list[tuple[int, str]] = []

    def browse(address: str) -> None:
        path = Path(address.removeprefix("file://"))
        opened.append(address)
        pages.append((stat.S_IMODE(path.stat().st_mode), path.read_text()))

    monkeypatch.setattr(view_command.webbrowser, "open", browse)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *given, sockets: [one.close() for one in sockets])
    assert view_command.view(folder, browser=True) == 0
    [secret] = re.findall(r"http://127.0.0.1:\d+/\S+/", capsys.readouterr().err)
    assert secret not in opened[0]
    assert pages[0][0] == 0o600
    assert secret in pages[0][1]
    assert not Path(opened[0].removeprefix("file://")).exists()


@pytest.mark.parametrize("kind", ["gz bomb", "long foreign", "cut gz"])
def test_outlines_are_read_up_to_a_cap(tmp_path, kind):
    path = tmp_path / ("a.geojson" if kind == "long foreign" else "a.geojson.gz")
    if kind == "long foreign":
        with path.open("wb") as file:
            file.truncate(2**29)
    else:
        bomb(path, 200_000_000)
    if kind == "cut gz":
        path.write_bytes(path.read_bytes()[:5000])
    before = psutil.Process().memory_info().rss
    with pytest.raises(FileFormatError, match=r"a\.geojson"):
        read_outlines(path, Size(100, 100))
    assert psutil.Process().memory_info().rss - before < 2**29
