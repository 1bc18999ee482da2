"""A package index of the tests' own, on loopback, with a handful of packages in it."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any


def wheel(
    name: str, version: str, code: str = "", requires: tuple[str, ...] = (), extras: tuple[str, ...] = ()
) -> bytes:
    """A wheel with one module, which says its version and then what `code` says."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    metadata += [f"Provides-Extra: {extra}\n" for extra in extras]
    metadata += [f"Requires-Dist: {requirement}\n" for requirement in requires]
    files = {
        f"{name}.py": f"__version__ = {version!r}\n{code}",
        f"{info}/METADATA": "".join(metadata),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return content.getvalue()


class Index:
    """A package index (PEP 503) on loopback, over plain HTTP or with a certificate from an authority of its own."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append(self.path)
                name = self.path.strip("/").rpartition("/")[2]
                body = index.files.get(name) if "/files/" in self.path else index.page(name)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Type", "application/octet-stream" if "/files/" in self.path else "text/html")
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body or b"")

            do_HEAD = do_GET  # uv asks so before it takes only a part of a wheel

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.scheme = "https" if context else "http"
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where the index is."""
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}/simple"

    def add(self, name: str, version: str, **about: Any) -> None:
        """Offer a package."""
        self.files[f"{name}-{version}-py3-none-any.whl"] = wheel(name, version, **about)

    def page(self, name: str) -> bytes | None:
        """The links to the files of a project."""
        found = [file for file in self.files if file.partition("-")[0].lower().replace("_", "-") == name]
        links = (
            f'<a href="/files/{file}#sha256={hashlib.sha256(self.files[file]).hexdigest()}">{file}</a>'
            for file in found
        )
        return f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>".encode() if found else None

    def downloads(self) -> list[str]:
        """The files that were fetched."""
        return [path.rpartition("/")[2] for path in self.requests if "/files/" in path]

    def close(self) -> None:
        """Stop listening."""
        self.server.shutdown()
        self.server.server_close()


@functools.cache
def installer_wheel(name: str) -> tuple[str, bytes]:
    """The wheel of uv or pip, from the index that this machine uses."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "python-docker-mcp-tests"
    if not list(folder.glob(f"{name}-*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:  # another process may be at it, too
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={fresh}", name]
            subprocess.run(command, check=True, capture_output=True)
            for file in Path(fresh).iterdir():
                file.replace(folder / file.name)
    file = next(iter(folder.glob(f"{name}-*.whl")))
    return file.name, file.read_bytes()


def fill(index: Index) -> None:
    """Put packages, and the installers themselves, into an index."""
    for name in ("uv", "pip"):
        file, content = installer_wheel(name)
        index.files[file] = content
    index.add("alpha", "1.0")
    index.add("alpha", "2.0")
    index.add("beta", "1.0", requires=("alpha<2", "gamma; extra == 'more'"), extras=("more",))
    index.add("gamma", "3.1")
    index.add("loud", "1.0", code="import socket, os\n")
