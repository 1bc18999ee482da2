"""Secrets that stay outside: what is added to which requests, what is refused, and that nothing shows the value."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from test_network import Both, Call, Server, proxied

import sandbox_runner
from sandbox_runner import Authority, Config, ConfigError, Credentials, DockerConfig, Mask, PackageConfig, SecretConfig, load_config

pytestmark = pytest.mark.anyio

HOST = "api.example.com"
VALUE = "s3cr3t-Value/of+the=host"
BIG = 20 << 20  # bytes of /big


class Api(http.server.BaseHTTPRequestHandler):
    """The host that has a secret: it answers with the request as it came, and shows all that it was given."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        vars(self.server)["requests"].append(f"{self.command} {self.path}")
        body = b""
        if self.headers.get("transfer-encoding"):
            while part := int(self.rfile.readline(), 16):
                body += self.rfile.read(part)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
        if self.path == "/redirect":
            self.answer(b"", 302, Location="https://other.example/")
        elif self.path == "/big":
            self.answer(bytes(BIG))
        elif self.path == "/shown":  # in a field, and in the text, of which the value comes in two pieces
            self.send_response(200, f"OK {self.headers['authorization']}")
            self.send_header("X-Shown", self.headers["authorization"])
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            text = f"<{self.headers['authorization']}><{VALUE[:5]}>".encode()
            for piece in (text[:15], text[15:20], text[20:], b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        elif self.path == "/bare":  # until the end of the connection
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"bare")
        else:
            seen = {"method": self.command, "path": self.path, "headers": list(self.headers.items()), "body": len(body)}
            self.answer(json.dumps(seen).encode())

    do_POST = do_PUT = do_DELETE = do_HEAD = do_TRACE = do_GET

    def answer(self, body: bytes, status: int = 200, **fields: str) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclasses.dataclass(frozen=True)
class Upstream:
    """The host, on a port of this one, and the bundle with the authority of its certificate."""

    port: int
    bundle: Path
    requests: list[str]

    def config(self, **more: Any) -> Config:
        """Settings by which the host has a secret."""
        secret = SecretConfig(**{"host": HOST, "header": "Authorization: Bearer ${API_KEY}", **more})
        package = PackageConfig(preinstalled=(), ca_bundle=str(self.bundle))
        return Config(secrets={"api": secret}, package=package)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """The host, which runs while the tests do."""
    authority = trustme.CA()
    bundle = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST, "second.example.com").configure_cert(context)
    server = Server(("127.0.0.1", 0), Api)
    server.requests = []  # type: ignore[attr-defined]
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    yield Upstream(server.server_port, bundle, server.requests)  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(running: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Upstream:
    """The host, to which its name leads; the secret; and a home for the authority."""
    look_up, connect = anyio.getaddrinfo, anyio.connect_tcp

    async def getaddrinfo(host: str, port: int, **more: Any) -> Any:
        return await look_up("127.0.0.1" if host.endswith(".example.com") else host, port, **more)

    async def connect_tcp(host: str, port: int, **more: Any) -> Any:
        return await connect(host, running.port if (host, port) == ("127.0.0.1", 443) else port, **more)

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    monkeypatch.setattr(sandbox_runner, "CONFIG_PATH", tmp_path / "home/config.yaml")
    monkeypatch.setenv("API_KEY", VALUE)
    running.requests.clear()
    return running


@contextlib.asynccontextmanager
async def served(config: Config, *allowed: str) -> AsyncIterator[Code]:
    """What code has that asks by the proxy."""
    async with proxied(f"127.0.0.1:443", *allowed, config=config) as both:
        both.call = Call()
        yield Code(both, await both.proxy.network.credentials.certificate())


class Code:
    """What code does, with http.client and by hand."""

    def __init__(self, both: Both, certificate: str) -> None:
        self.both = both
        self.context = ssl.create_default_context(cadata=certificate)

    @property
    def refused(self) -> list[str]:
        """What the call tells that it was refused."""
        return list(self.both.call.refused)

    async def ask(self, url: str, data: Any = None, method: str | None = None, **fields: str) -> tuple[int, Any, str]:
        """The status, the fields and the text of an answer."""

        def fetch() -> tuple[int, Any, str]:
            proxies = urllib.request.ProxyHandler({"http": self.both.address, "https": self.both.address})
            opener = urllib.request.build_opener(
                proxies, urllib.request.HTTPSHandler(context=self.context), NoRedirect()
            )
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            request = urllib.request.Request(url, data, headers, method=method)
            try:
                with opener.open(request, timeout=20) as answer:
                    return answer.status, answer.headers, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers, error.read().decode()

        return await anyio.to_thread.run_sync(fetch)

    async def seen(self, url: str, *arguments: Any, **more: Any) -> Any:
        """The request as the host got it."""
        status, _, text = await self.ask(url, *arguments, **more)
        assert status == 200, text
        return json.loads(text)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Returns redirections."""

    def redirect_request(self, *_: Any) -> None:
        """Do nothing."""


def fields(seen: Any, name: str) -> list[str]:
    """The values of a field in a request as the host got it."""
    return [value for key, value in seen["headers"] if key.lower() == name]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_request_gets_the_credential_and_the_code_does_not(api: Upstream, scheme: str) -> None:
    async with served(api.config()) as code:
        seen = await code.seen(f"{scheme}://{HOST}/v1/x?y=1", authorization="Bearer own", X_Other="kept")
        print(seen)
        assert (seen["method"], seen["path"]) == ("GET", "/v1/x?y=1")
        assert fields(seen, "authorization") == ["Bearer " + "*" * len(VALUE)]
        assert fields(seen, "host") == [HOST]
        assert fields(seen, "x-other") == ["kept"]
        assert (await code.seen(f"{scheme}://{HOST}/", bytes(700_000)))["body"] == 700_000
        chunks = (bytes(size) for size in (1, 300_000, 5))
        assert (await code.seen(f"{scheme}://{HOST}/", chunks))["body"] == 300_006
        status, _, text = await code.ask(f"{scheme}://{HOST}/big")
        assert (status, len(text)) == (200, BIG)
        status, given, text = await code.ask(f"{scheme}://{HOST}/shown")
        assert (given["x-shown"], text) == ("Bearer " + "*" * len(VALUE), f"<Bearer {'*' * len(VALUE)}><{VALUE[:5]}>")
        assert (await code.ask(f"{scheme}://{HOST}/bare"))[2] == "bare"
        assert (await code.ask(f"{scheme}://{HOST}/", method="HEAD"))[0] == 200
        status, given, _ = await code.ask(f"{scheme}://{HOST}/redirect")
        assert (status, given["location"]) == (302, "https://other.example/")
        assert not code.refused
