"""A small hub on this machine: what huggingface_hub asks of one to make a repository, fill it and fetch it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> path -> bytes; every request in `asked`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        files = sorted(self.repos[name].items())
        return hashlib.sha1(b"".join(n.encode() + data for n, data in files)).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def _say(self, status: int, content: bytes, kind: str = "application/json", **more: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **more}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, found: object, status: int = 200, **more: str) -> None:
        self._say(status, json.dumps(found).encode(), **more)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.server.asked.append(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            about = json.loads(body)
            name = "/".join(filter(None, (about.get("organization"), about["name"])))
            self.server.repos.setdefault(name, {})
            self.server.private[name] = bool(about.get("private") or about.get("visibility") == "private")
            return self._json({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.server.commit(name)
        return self._json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.server.address}/{name}/commit/{oid}",
                "hookOutput": "",
            }
        )

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repos.get(name)
        if files is None:
            return self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        oid = self.server.commit(name)
        if parts[0] != "api":
            file = "/".join(parts[4:])
            if file not in files:
                return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            return self._say(200, files[file], "application/octet-stream", ETag=etag, X_Repo_Commit=oid)
        if "tree" in parts:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            return self._json(tree)
        return self._json(
            {
                "id": name,
                "modelId": name,
                "sha": oid,
                "private": True,
                "tags": [],
                "siblings": [{"rfilename": n} for n in files],
            }
        )

    do_HEAD = do_GET


@contextmanager
def local_hub():
    """A hub that runs while the block does."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
