"""`histossl view`: serves the viewer; its flags are made from the parameters."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from pathlib import Path

from histossl.core.console import say
from histossl.core.errors import SettingsError, StudyError
from histossl.study.folder import Study


def view(study: Path, nuclei: Path | None = None, host: str = "127.0.0.1", port: int = 0, browser: bool = False) -> int:
    """Look at a study in a browser: a map of the cohort, each slide at all magnifications, and its overlays.

    The server listens on this machine only; the address contains a secret, without which every request is refused. If
    this machine is remote, `ssh -L PORT:127.0.0.1:PORT` forwards the page to yours. Ctrl-C ends the server.

    Args:
        study: the folder of the study.
        nuclei: the folder that `histossl nuclei segment` wrote; by default the study's subfolder `nuclei`.
        host: host to listen on; any other than 127.0.0.1 lets other machines connect, unencrypted.
        port: port to listen on; 0 takes a free one.
        browser: open the page in the browser of this machine.

    Returns:
        0, the exit code.

    Raises:
        StudyError: there is no such study, or it has no slides.
        SettingsError: there is no such folder of nuclei, or the host and port cannot be used.
    """
    import uvicorn

    from histossl.view.app import Viewer

    if not study.is_dir():
        raise StudyError(f"{study}: there is no such folder", "give the folder of a study")
    if nuclei is not None and not nuclei.is_dir():
        raise SettingsError(
            f"{nuclei}: there is no such folder", "give the folder that `histossl nuclei segment` wrote"
        )
    viewer = Viewer(Study(study), nuclei or study / "nuclei")
    token = secrets.token_urlsafe(24)
    listening = _listen(host, port)
    address = f"http://{_literal(host)}:{listening.getsockname()[1]}/{token}/"
    say(f"{len(viewer.cohort)} slides; open this address, and keep it to yourself; Ctrl-C ends it")
    say(address, "green")
    if browser:
        webbrowser.open(address)
    # No access log: it would contain the secret.
    config = uvicorn.Config(viewer.guarded(token, host), log_level="warning", access_log=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
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
