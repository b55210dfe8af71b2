"""`histossl view`: serves the viewer; its flags are made from the parameters."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from histossl.core.console import say
from histossl.core.errors import SettingsError, StudyError
from histossl.study.folder import Study

if TYPE_CHECKING:
    from types import FrameType

    import uvicorn

    from histossl.view.app import Viewer
    from histossl.view.guard import App


def view(
    study: Path,
    nuclei: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    browser: bool = False,
    read_only: bool = False,
) -> int:
    """Look at a study in a browser: a map of the cohort, each slide at all magnifications, its overlays; label slides.

    The server listens on this machine only; the address contains a secret, without which every request is refused. If
    this machine is remote, `ssh -L PORT:127.0.0.1:PORT` forwards the page to yours. Ctrl-C ends the server.

    Args:
        study: the folder of the study.
        nuclei: the folder that `histossl nuclei segment` wrote; by default the study's subfolder `nuclei`.
        host: host to listen on; any other than 127.0.0.1 lets other machines connect, unencrypted.
        port: port to listen on; 0 takes a free one.
        browser: open the page in the browser of this machine, through a file that only you can read: the address is
            then on no command line.
        read_only: write no labels into slides.csv; so it is anyway where other machines may connect.

    Returns:
        0, the exit code.

    Raises:
        StudyError: there is no such study, or it has no slides.
        SettingsError: there is no such folder of nuclei, or the host and port cannot be used.
    """
    from histossl.view.app import Viewer
    from histossl.view.guard import LOOPBACK

    if not study.is_dir():
        raise StudyError(f"{study}: there is no such folder", "give the folder of a study")
    if nuclei is not None and not nuclei.is_dir():
        raise SettingsError(
            f"{nuclei}: there is no such folder", "give the folder that `histossl nuclei segment` wrote"
        )
    opened = Study(study)
    for line in opened.linked:
        say(line, "yellow")
    shut = read_only or host not in LOOPBACK
    viewer = Viewer(opened, nuclei or study / "nuclei", processes=True, read_only=shut)
    token = secrets.token_urlsafe(24)
    listening = _listen(host, port)
    address = f"http://{_literal(host)}:{listening.getsockname()[1]}/{token}/"
    say(f"{len(viewer.cohort)} slides; open this address, and keep it to yourself; Ctrl-C ends it")
    say(address, "green")
    stopped = threading.Event()
    try:
        server = _server(viewer.guarded(token, host), viewer, stopped)
        with _redirect_page(address) if browser else nullcontext() as page:
            if page is not None:
                webbrowser.open(page.as_uri())
            server.run(sockets=[listening])
    finally:
        viewer.close()
        if stopped.is_set():
            _end_at_once()
    return 0


def _server(app: App, viewer: Viewer, stopped: threading.Event) -> uvicorn.Server:
    """A server that gives up what is being read as soon as Ctrl-C is heard, instead of waiting for it."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            stopped.set()
            threading.Thread(target=viewer.stop, daemon=True).start()  # a signal's handler may not wait for locks
            super().handle_exit(sig, frame)

    # No access log: it would hold the secret.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    return Server(config)


@contextmanager
def _redirect_page(address: str) -> Iterator[Path]:
    """A page that leads to an address, readable by this user alone, while the block lasts."""
    handle, name = tempfile.mkstemp(prefix="histossl-", suffix=".html")  # mode 0600
    try:
        with open(handle, "w", encoding="ascii") as file:
            file.write(
                '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
                f'<meta http-equiv="refresh" content="0;url={address}"><a href="{address}">histossl view</a>\n'
            )
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _end_at_once() -> None:
    """End the program without what Python would yet do: wait for a thread that computes a map, and unload all modules.

    The latter alone takes a second of a core.
    """
    atexit._run_exitfuncs()
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(130)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # By its protocol asyncio knows TCP, and sends small answers at once (TCP_NODELAY) instead of after 40 ms.
        listening = socket.socket(family, kind, socket.IPPROTO_TCP)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)  # before the address is printed, so that an immediate connection is not refused
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"cannot listen on {host} port {port} ({error})", "leave --port out to take a free one"
        ) from error
    return listening


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host
