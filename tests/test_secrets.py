"""Secrets that stay outside: what is added to which requests, what is refused, and that nothing shows the value."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.client
import http.server
import json
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import anyio
import pytest
from conftest import until
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from real_engines import host_processes
from test_network import Both, Call, Server, encrypt, proxied
from test_readme import all_blocks
from test_ways import WAYS

import python_docker_mcp
import sandbox_runner
from python_docker_mcp import instructions
from sandbox_runner import (
    Authority,
    Config,
    ConfigError,
    Mask,
    PackageConfig,
    SecretConfig,
    load_config,
    open_runner,
    require_secrets,
)

pytestmark = pytest.mark.anyio

HOST = "api.example.com"
HOSTS = [
    *(HOST, "second.example.com", "api.openai.com", "api.anthropic.com", "huggingface.co", "api.stripe.com"),
    *("s3.amazonaws.com", "grpc.example.com"),
]
VALUE = "s3cr3t-Value/of+the=host"
SENT = VALUE.encode()
BIG = 20 << 20  # bytes of /big
MORE = threading.Event()  # set when the first piece of /stream has come


SAID = {"role": "assistant", "content": "hi"}
FOR_LIBRARIES = {  # what their answers have to have
    "object": "list",
    "data": [],
    "name": "me",
    "choices": [{"index": 0, "finish_reason": "stop", "message": SAID}],
    "type": "user",
    "content": [{"type": "text", "text": "hi"}],
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


class Api(http.server.BaseHTTPRequestHandler):
    """The host that has a secret: it answers with the request as it came, and shows all that it was given."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        vars(self.server)["requests"].append((self.command, self.path, [*self.headers.items()]))
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
        elif self.path == "/stream":  # the second piece only after the first has come through
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            MORE.clear()
            self.wfile.write(b"9\r\ndata: 1\n\n\r\n")
            if MORE.wait(10):
                self.wfile.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
        elif self.path == "/bare":  # until the end of the connection
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"bare")
        else:
            seen = {"method": self.command, "path": self.path, "headers": list(self.headers.items()), "body": len(body)}
            self.answer(json.dumps({**seen, **FOR_LIBRARIES}).encode())

    do_POST = do_PUT = do_DELETE = do_HEAD = do_TRACE = do_GET

    def answer(self, body: bytes, status: int = 200, **fields: str) -> None:
        """Send an answer."""
        self.send_response(status)
        about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**about, **fields}.items():
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
    requests: list[tuple[str, str, list[tuple[str, str]]]]  # as they came

    def config(self, **more: Any) -> Config:
        """Settings by which the host has a secret."""
        secret = SecretConfig(**{"host": HOST, "header": "Authorization: Bearer ${API_KEY}", **more})
        package = PackageConfig(preinstalled=(), ca_bundle=str(self.bundle))
        return Config(secrets={"api": secret}, package=package)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upstream]:
    """The host, which runs while the tests do."""
    server = Server(("127.0.0.1", 0), Api)
    server.requests = []  # type: ignore[attr-defined]
    bundle = encrypt(server, tmp_path_factory.mktemp("tls"), *HOSTS)
    threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    yield Upstream(server.server_port, bundle, server.requests)  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(running: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Upstream:
    """The host, to which its name leads; the secret; and a home for the authority."""
    look_up, connect = anyio.getaddrinfo, anyio.connect_tcp

    async def getaddrinfo(host: str, port: int, **more: Any) -> Any:
        return await look_up("127.0.0.1" if host in HOSTS else host, port, **more)

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
    async with proxied("127.0.0.1:443", *allowed, config=config) as both:
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
        given = {"X_Key": "added-by-the-host", "X_Other": "kept"}
        seen = await code.seen(f"{scheme}://{HOST}/v1/x?y=1", authorization="Bearer own", **given)
        assert (seen["method"], seen["path"]) == ("GET", "/v1/x?y=1")
        assert fields(seen, "authorization") == ["Bearer " + "*" * len(VALUE)]
        assert fields({"headers": api.requests[-1][2]}, "authorization") == [f"Bearer {VALUE}"]
        assert fields(seen, "host") == [HOST]
        assert fields(seen, "x-other") == ["kept"]
        assert not fields(seen, "x-key")
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


async def test_a_connection_by_tls_carries_many_requests_and_each_is_checked(
    api: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "python_docker_mcp.network")
    async with served(api.config(methods=("GET",), paths=("/v1/*", "/bare"))) as code:

        def ask() -> list[Any]:
            client = http.client.HTTPSConnection("127.0.0.1", code.both.port, context=code.context)
            client.set_tunnel(HOST, 443)
            said = []
            for method, path in (("GET", "/v1/a"), ("GET", "/bare"), ("GET", "/v1/b"), ("DELETE", "/v1/b")):
                client.request(method, path)
                said.append((client.sock, client.getresponse().read()))
            client.close()
            return said

        said = await anyio.to_thread.run_sync(ask)
        assert len({id(sock) for sock, _ in said}) == 1
        assert [request[:2] for request in api.requests] == [("GET", "/v1/a"), ("GET", "/bare"), ("GET", "/v1/b")]
        sentence = f"DELETE /v1/b at {HOST} was refused: secrets.api.methods has GET"
        assert said[-1][1].decode().strip() == sentence
        assert code.refused == [sentence]
        assert f"network: s, {HOST}: GET /v1/a: 200, with the secret api" in caplog.text
        assert VALUE not in caplog.text
        status, _, text = await code.ask(f"https://{HOST}/v2/x")
        assert (status, text.strip()) == (403, f"GET /v2/x at {HOST} was refused: secrets.api.paths has /v1/*, /bare")


async def test_hosts_without_a_secret_have_their_own_tls_and_no_byte_is_changed(api: Upstream) -> None:
    """Even where another host has one: the code's TLS ends at the server, so nothing between could change a byte."""
    async with served(api.config(), "second.example.com") as code:
        code.context = ssl.create_default_context(cafile=str(api.bundle))  # and nothing of ours
        reached = await code.seen("https://second.example.com/", authorization="Bearer own", Accept_Encoding="gzip")
        assert fields(reached, "authorization") == ["Bearer own"]
        assert fields(reached, "accept-encoding") == ["gzip"]
        code.context = ssl.create_default_context(cadata=await code.both.proxy.network.credentials.certificate())
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            await code.ask("https://second.example.com/")


async def test_of_several_secrets_of_a_host_those_are_added_that_a_request_is_for(api: Upstream) -> None:
    def secret(**more: Any) -> SecretConfig:
        return SecretConfig(**{"host": HOST, "header": "Authorization: Bearer ${API_KEY}", **more})

    secrets = {
        "reads": secret(methods=("GET",)),
        "application": secret(header="X-Application: ${API_KEY}"),
        "second": secret(host="second.example.com", header="X-Key: ${API_KEY}"),
    }
    async with served(dataclasses.replace(api.config(), secrets=secrets)) as code:
        seen = await code.seen(f"https://{HOST}/")
        assert (len(fields(seen, "authorization")), len(fields(seen, "x-application"))) == (1, 1)
        seen = await code.seen(f"https://{HOST}/", b"x")
        assert (len(fields(seen, "authorization")), len(fields(seen, "x-application"))) == (0, 1)
        assert len(fields(await code.seen("https://second.example.com/"), "x-key")) == 1
        assert not fields(seen, "x-key")


@pytest.mark.parametrize(
    ("more", "sends", "path", "authorization"),
    [
        ({"header": "Authorization: Basic me:${API_KEY}"}, "/", "/", [f"Basic {b64encode(b'me:' + SENT).decode()}"]),
        ({"header": "Authorization: Basic ${API_KEY}"}, "/", "/", [f"Basic {VALUE}"]),
        ({"header": "Authorization: ${API_KEY}"}, "/", "/", [VALUE]),
        ({"query": "id=${API_KEY}"}, "/?q=a+b&id=own&ID=too&i%64=x&z&z", f"/?q=a+b&z&z&id={quote_plus(VALUE)}", []),
        ({"query": "key=${API_KEY}"}, "/", f"/?key={quote_plus(VALUE)}", []),
    ],
)
async def test_a_credential_is_where_its_host_wants_it_and_an_echo_of_it_is_masked(
    api: Upstream, more: dict[str, Any], sends: str, path: str, authorization: list[str]
) -> None:
    async with served(api.config(**{"header": None, **more})) as code:
        _, _, text = await code.ask(f"https://{HOST}{sends}")
        assert api.requests[-1][1] == path
        assert fields({"headers": api.requests[-1][2]}, "authorization") == authorization
        for shown in (VALUE, quote_plus(VALUE), *authorization):
            assert shown.rpartition(" ")[2] not in text
        assert "*" * 20 in text


async def test_requests_in_forms_that_are_rare_are_answered(api: Upstream) -> None:
    """Two at once, one that waits for leave to send its body, and one of an old protocol."""
    async with served(api.config()) as code:

        def send(*pieces: str) -> str:
            client = http.client.HTTPSConnection("127.0.0.1", code.both.port, context=code.context, timeout=10)
            client.set_tunnel(HOST, 443)
            client.connect()
            answer = ""
            for piece in pieces:
                client.sock.sendall(piece.encode())
                answer += client.sock.recv(100_000).decode()
            while piece := client.sock.recv(100_000).decode():
                answer += piece
            client.close()
            return answer

        last = "Connection: close\r\n"
        answer = await anyio.to_thread.run_sync(send, by_hand(path="/1") + by_hand(path="/2", more=last))
        assert answer.count("HTTP/1.1 200") == 2
        assert [request[1] for request in api.requests] == ["/1", "/2"]
        expects = by_hand("POST", more=f"Expect: 100-continue\r\nContent-Length: 5\r\n{last}")
        answer = await anyio.to_thread.run_sync(send, expects, "12345")
        assert answer.startswith("HTTP/1.1 100")
        assert '"body": 5' in answer
        assert '"path": "/v1/a"' in await anyio.to_thread.run_sync(send, by_hand().replace("1.1", "1.0"))


async def test_an_answer_comes_as_it_is_sent(api: Upstream) -> None:
    async with served(api.config()) as code:

        def follow() -> list[bytes]:
            client = http.client.HTTPSConnection("127.0.0.1", code.both.port, context=code.context, timeout=10)
            client.set_tunnel(HOST, 443)
            client.request("GET", "/stream")
            answer, seen = client.getresponse(), []
            while piece := answer.read1(1000):
                seen.append(piece)
                MORE.set()
            client.close()
            return seen

        assert await anyio.to_thread.run_sync(follow) == [b"data: 1\n\n", b"data: 2\n\n"]


async def test_a_command_prints_the_secret_once_and_is_tried_again_if_it_fails(
    api: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran, works = tmp_path / "ran", tmp_path / "works"
    script = (
        f"import pathlib, sys\nopen({str(ran)!r}, 'a').write('x')\nworks = pathlib.Path({str(works)!r})\n"
        f"if not works.exists():\n    print({VALUE!r}, file=sys.stderr)\n    sys.exit(3)\nprint(works.read_text())"
    )
    config = api.config(command=(sys.executable, "-c", script))
    monkeypatch.setattr(sandbox_runner, "RETRY_AFTER", 0)
    async with served(config) as code:
        sentence = f"secrets.api: its command {sys.executable} ended with the exit status 3: run it by hand to see why"
        await code.both.proxy.network.credentials.run_commands()
        assert sentence in caplog.text
        status, _, text = await code.ask(f"https://{HOST}/")
        assert (status, text.strip(), code.refused) == (403, sentence, [sentence])
        works.write_text(VALUE)
        for _ in range(3):
            await code.seen(f"https://{HOST}/")
        assert fields({"headers": api.requests[-1][2]}, "authorization") == [f"Bearer {VALUE}"]
    assert ran.read_text() == "xxx"
    missing = str(tmp_path / "no/python")
    async with served(api.config(command=(missing,))) as code:
        _, _, text = await code.ask(f"http://{HOST}/")
        assert text.strip() == f"secrets.api: its command {missing} can't be run: No such file or directory"


async def test_what_can_not_be_passed_on_is_told_in_a_sentence(api: Upstream) -> None:
    async with served(api.config()) as code:
        both = code.both
        for offer, said in ((["h2"], "only HTTP/1.1 is passed on, not HTTP/2 or gRPC"), (None, "does not trust")):
            context = ssl.create_default_context()
            if offer:
                context.set_alpn_protocols(offer)

            def connect(context: ssl.SSLContext = context) -> None:
                client = http.client.HTTPSConnection("127.0.0.1", both.port, context=context)
                client.set_tunnel(HOST, 443)
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    client.connect()

            await anyio.to_thread.run_sync(connect)
            await until(lambda: bool(code.refused) and said in code.refused[-1])  # noqa: B023  # it ends before the next
        for more, said in (
            ({"Upgrade": "websocket", "Connection": "Upgrade"}, "a WebSocket was refused"),
            ({"Authorization": "AWS4-HMAC-SHA256 Credential=x"}, "code signs it (AWS, boto3)"),
        ):
            assert said in (await code.ask(f"https://{HOST}/", **more))[2]
        assert not api.requests


# ── each rule, with and without it ──


def patched(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Put something in the place of a defence."""
    owner, _, attribute = name.rpartition(".")
    target = getattr(sandbox_runner, owner) if owner else sandbox_runner
    return lambda patch: patch.setattr(target, attribute, value)


def by_hand(method: str = "GET", path: str = "/v1/a", more: str = "", host: str = HOST) -> str:
    """A request that no library would send."""
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n"


def all_fields(request: Any, *_: Any) -> list[tuple[bytes, bytes]]:
    """Stands in for `own_fields`, and leaves out only what can't be there twice."""
    return [(name, value) for name, value in request.headers if name not in (b"host", b"accept-encoding")]


NOTHING = re.compile("(?!)")
READS: dict[str, Any] = {"methods": ("GET", "POST"), "paths": ("/v1/*",)}
CLEAR = patched("require_clear", lambda *_: None)
FIELDS = patched("own_fields", all_fields)


@dataclasses.dataclass(frozen=True)
class Hole:
    """What one rule holds: a request, and how to see that the host got what it should not."""

    does: str
    sends: str
    gets: Callable[[list[Any]], bool]  # of the requests that the host got
    without: Callable[[pytest.MonkeyPatch], None]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of the secret


def has(name: str, value: str) -> Callable[[list[Any]], bool]:
    """Whether the host got this field."""
    return lambda got: any((key.lower(), said) == (name, value) for *_, given in got for key, said in given)


def asked(method: str, path: str) -> Callable[[list[Any]], bool]:
    """Whether the host was asked for this."""
    return lambda got: any(request[:2] == (method, path) for request in got)


def any_request(got: list[Any]) -> bool:
    """Whether the host was asked for anything."""
    return bool(got)


HOLES = [
    Hole("a header of the code's own of that name", by_hand(more="aUTHORIZATION: mine\r\nAuthorization: too\r\n"),
         has("authorization", "mine"), FIELDS),
    Hole("one with an underscore, which some servers take for it", by_hand(more="X_API_KEY: mine\r\n"),
         has("x_api_key", "mine"), FIELDS, {"header": "X-Api-Key: ${API_KEY}"}),
    Hole("one with a hyphen, likewise", by_hand(more="X-Api-Key: mine\r\n"),
         has("x-api-key", "mine"), FIELDS, {"header": "X_API_KEY: ${API_KEY}"}),
    Hole("an answer that is compressed, in which nothing is masked", by_hand(more="Accept-Encoding: gzip\r\n"),
         has("accept-encoding", "gzip"), patched("own_fields", lambda request, *_: [*request.headers][1:])),
    Hole("a method that is not in the list", by_hand("DELETE"), asked("DELETE", "/v1/a"),
         patched("Credential.why_not", lambda *_: None), READS),
    Hole("a method in a header", by_hand("POST", more="X-HTTP-Method-Override: DELETE\r\nContent-Length: 0\r\n"),
         has("x-http-method-override", "DELETE"), FIELDS, READS),
    Hole("a path that is not in the list", by_hand(path="/v2/a"), asked("GET", "/v2/a"),
         patched("Credential.why_not", lambda *_: None), READS),
    Hole("a path in a header", by_hand(more="X-Original-URL: /v2/a\r\n"),
         has("x-original-url", "/v2/a"), FIELDS, READS),
    *(
        Hole(f"{path} as a path", by_hand(path=path), any_request, patched("UNCLEAR", NOTHING), READS)
        for path in ("/v1/../v2", "/v1/%2e%2e/v2", "/v1/..%2fv2", "/v1/..;/v2", "/v1//v2", "/v1/..\\v2", "/v1/%252e/v2",
                     "/v1/%2E./v2", "/v1/.")
    ),
    Hole("a Host that is not the connection's", by_hand(host="evil.example"), any_request, CLEAR),
    Hole("TRACE", by_hand("TRACE"), any_request, CLEAR),
    Hole("a length and chunks",
         by_hand("POST", more="Content-Length: 5\r\nTransfer-Encoding: chunked\r\n") + "0\r\n\r\n", any_request, CLEAR),
    Hole("another protocol", by_hand(more="Upgrade: websocket\r\nConnection: Upgrade\r\n"), any_request, CLEAR),
    Hole("a host that is not public", by_hand(), any_request, patched("is_public", lambda _: True), {"_allowed": ()}),
    Hole("another user's secret", by_hand(), any_request, patched("SecretConfig.is_for", lambda *_: True),
         {"users": ("alice",)}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole.does)
async def test_each_rule_holds_something_that_nothing_else_holds(
    api: Upstream, hole: Hole, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = dict(hole.more)
    allowed = more.pop("_allowed", ("127.0.0.1:443",))
    config = api.config(**more)

    async def attempt() -> bool:
        api.requests.clear()
        async with proxied(*allowed, config=config) as both:
            certificate = await both.proxy.network.credentials.certificate()
            context = ssl.create_default_context(cadata=certificate)

            def send() -> None:
                with contextlib.suppress(OSError):
                    client = http.client.HTTPSConnection("127.0.0.1", both.port, context=context, timeout=3)
                    client.set_tunnel(HOST, 443)
                    client.connect()
                    client.sock.sendall(hole.sends.encode())
                    client.sock.recv(65536)
                    client.close()

            await anyio.to_thread.run_sync(send)
        return bool(hole.gets(api.requests))

    assert not await attempt()
    hole.without(monkeypatch)
    assert await attempt()


# ── certificates ──


def verified(context: ssl.SSLContext, certificate: str, host: str) -> str:
    """How a client that trusts this certificate, and holds to every rule, takes a server: "" if it accepts it."""
    client = ssl.create_default_context(cadata=certificate)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), context.wrap_bio(up, down, server_side=True)]
    for end in ends * 3:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLCertVerificationError as error:
            return str(error.verify_message)
    return ""


def test_certificates_are_for_the_hosts_that_have_a_secret_and_no_client_takes_others(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "key", [HOST, "second.example.com"])
    for host in (HOST, "second.example.com"):
        assert verified(authority.context(host), authority.certificate, host) == ""
    assert "mismatch" in verified(authority.context(HOST), authority.certificate, "second.example.com")
    other = "other.example.com"
    assert verified(authority.context(other), authority.certificate, other) == "permitted subtree violation"
    without = Authority(tmp_path / "key", [other])
    assert verified(authority.context(other), without.certificate, other) == "", "nothing else refuses it"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_sandbox_of_an_earlier_server_trusts_the_next_one(tmp_path: Path) -> None:
    earlier, later = Authority(tmp_path / "key", [HOST]), Authority(tmp_path / "key", [HOST, "second.example.com"])
    assert verified(later.context(HOST), earlier.certificate, HOST) == ""
    assert verified(Authority(tmp_path / "other", [HOST]).context(HOST), earlier.certificate, HOST) != ""


def test_certificates_hold_where_a_clock_is_a_day_off_and_are_made_anew_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path / "key", [HOST])
    certificate = x509.load_pem_x509_certificate(authority.certificate.encode())
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(1)
    first = authority.context(HOST)
    assert authority.context(HOST) is first
    later = time.time() + 20 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    assert authority.context(HOST) is not first
    monkeypatch.undo()
    monkeypatch.setattr(sandbox_runner, "AUTHORITY_DAYS", -1)
    expired = Authority(tmp_path / "key", [HOST])
    assert "expired" in verified(expired.context(HOST), expired.certificate, HOST)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"nonsense", 0o600, "is none: remove it, and a new one is made."),
        (b"", 0o600, "is none: remove it, and a new one is made."),
        (None, 0o644, "is open to others: `chmod 600 "),
        (b"FOLDER", 0o700, "can't be read: Is a directory."),
    ],
)
def test_a_key_that_can_not_be_used_is_told_in_a_sentence(
    tmp_path: Path, content: bytes | None, mode: int, said: str
) -> None:
    file = tmp_path / "key"
    if content == b"FOLDER":
        file.mkdir()
    elif content is None:
        Authority(file, [HOST])
    else:
        file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=re.escape(f"The key {file}, by which sandboxes trust this server, {said}")):
        Authority(file, [HOST])


@given(st.lists(st.sampled_from([SENT, VALUE[:6].encode(), b"s3", b"-", b"xyz", VALUE[6:].encode()])), st.data())
def test_the_mask_is_the_same_in_whatever_pieces_an_answer_comes(parts: list[bytes], data: st.DataObject) -> None:
    text = b"".join(parts)
    mask, got, left = Mask([SENT]), b"", text
    while left:
        size = data.draw(st.integers(1, len(left)))
        piece, left = left[:size], left[size:]
        got += mask.piece(piece)
    got += mask.rest()
    assert got == text.replace(SENT, b"*" * len(VALUE))


async def test_a_host_whose_certificate_is_not_in_order_gets_nothing(
    api: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(api.config(), package=PackageConfig(preinstalled=()))  # which lacks its authority
    async with served(config) as code:
        status, _, text = await code.ask(f"http://{HOST}/")
        assert (status, text.strip()) == (502, f"{HOST} can't be reached: unable to get local issuer certificate")
        assert not api.requests
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        monkeypatch.setattr(code.both.proxy.network.credentials, "of_hosts", unverified)
        assert (await code.ask(f"http://{HOST}/"))[0] == 200, "nothing else refuses it"


# ── settings ──

ENTRY = {"host": HOST, "header": "Authorization: Bearer ${API_KEY}"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "*.example.com"}, "host in FILE: '*.example.com' is not the exact name of a host"),
        ({"host": "127.0.0.1"}, "host in FILE: '127.0.0.1' is not the exact name of a host"),
        ({"host": "https://x"}, "host in FILE: 'https://x' is not"),
        ({"header": f"Bearer {VALUE}"}, "header in FILE: it is not like"),
        ({"header": f"Authorization: Bearer {VALUE}"}, "header in FILE: it does not say where the value goes: write"),
        ({"query": "key=${API_KEY}"}, "query in FILE: there has to be either a header"),
        ({"header": None, "query": VALUE}, "query in FILE: it is not like 'appid=${API_KEY}'"),
        ({"header": [VALUE]}, "header in FILE: what is there is not accepted: it must be text"),
        ({"header": "Host: ${API_KEY}"}, "header in FILE: host is no header for a credential"),
        ({"header": "A: ${X} ${Y}", "command": ["x"]}, "header in FILE: it does not say where what the command"),
        ({"header": "A: ${API_KEY}\r\nB: x"}, "header in FILE: it is not like"),
        ({"methods": ["get"]}, "methods in FILE: 'get' is not a method such as GET"),
        ({"methods": ["TRACE"]}, "methods in FILE: 'TRACE' is not a method"),
        ({"paths": ["v1"]}, "paths in FILE: 'v1' is not a path such as /v1/*"),
        ({"paths": ["/v1/../*"]}, "paths in FILE: '/v1/../*' is not a path"),
        ({"paths": "/v1"}, "paths in FILE: what is there is not accepted: it must be a list"),
        ({"env": {"A B": "x"}}, "env in FILE: 'A B' can't be a variable"),
        ({"users": ["a b"]}, "users in FILE: 'a b' is not a user's name"),
        ({"hosts": HOST}, "There is no setting secrets.api.hosts (FILE): did you mean secrets.api.host?"),
        ({"header": None}, "header in FILE: there has to be either a header"),
    ],
)  # fmt: skip
def test_a_setting_that_can_not_be_used_is_told_and_never_quotes_a_secret(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"secrets": {"api": {**ENTRY, **change}}}))
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert said.replace("FILE", str(file)) in str(caught.value)
    assert VALUE not in str(caught.value)


def test_the_readme_s_secrets_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [one.text for one in all_blocks() if one.chapter == "Secrets"]
    file = tmp_path / "config.yaml"
    file.write_text(block)
    for name in ("OPENAI_API_KEY", "OPENWEATHER_KEY", "JIRA_TOKEN"):
        monkeypatch.setenv(name, VALUE)
    config = load_config(file, {})
    require_secrets(config)
    assert {name: secret.place()[0] for name, secret in config.secrets.items()} == {
        "openai": "authorization", "weather": "appid", "jira": "authorization", "vault": "private-token"
    }  # fmt: skip
    assert config.secrets["openai"].environment == {"OPENAI_API_KEY": "added-by-the-host"}


def test_secrets_need_a_network_that_passes_by_this_server(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"secrets": {"api": ENTRY}, "docker": {"network_disabled": False}}))
    with pytest.raises(ConfigError, match=r"they can't be used while docker\.network_disabled is false"):
        load_config(file, {})


@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ("", {}, "secrets.api: the variable API_KEY is not set where this server runs."),
        ("  ", {}, "secrets.api: the variable API_KEY is not set where this server runs."),
        ("short", {}, "secrets.api: the variable API_KEY has fewer than 8 characters."),
        (f"{VALUE}\r\nX: y", {}, "secrets.api: the variable API_KEY has characters that a header can't have."),
        (f"{VALUE}é", {}, "secrets.api: the variable API_KEY has characters that a header can't have."),
        (VALUE, {"env": {"KEY": VALUE}}, "secrets.api.env: the secret itself is there, and code would have it."),
    ],
)
@pytest.mark.parametrize("program", ["server", "doctor", "script"])
def test_a_value_that_can_not_be_used_is_told_at_the_start_by_its_name(
    tmp_path: Path,
    value: str,
    more: dict[str, Any],
    said: str,
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"secrets": {"api": {**ENTRY, **more}}}))
    monkeypatch.setenv("API_KEY", value)
    main, arguments = {
        "server": (python_docker_mcp.main, ["--config", str(file)]),
        "doctor": (python_docker_mcp.main, ["doctor", "--config", str(file)]),
        "script": (sandbox_runner.main, ["--config", str(file), "-c", "1"]),
    }[program]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert VALUE not in told
    assert "Traceback" not in told


def test_a_model_is_told_where_it_needs_no_credential(api: Upstream) -> None:
    words = f"no network but HTTP and HTTPS to {HOST} (to {HOST} with a credential that is added outside: give any text"
    assert words in instructions(api.config())
    assert api.config().for_user("bob").allowed_hosts == (HOST,)
    alices = api.config(users=("alice",))
    assert alices.for_user("alice").allowed_hosts == (HOST,)
    assert alices.for_user("bob").allowed_hosts == ()
    assert alices.for_user("bob").secrets == {}


# ── on real engines ──


def on_engine(config: Config, api: Upstream, secrets: Mapping[str, SecretConfig] | None = None) -> Config:
    """Settings for a real engine, by which hosts have a secret."""
    known = Path("/etc/ssl/certs/ca-certificates.crt")  # of the index of packages
    bundle = api.bundle.with_name("all.pem")
    bundle.write_bytes(api.bundle.read_bytes() + (known.read_bytes() if known.exists() else b""))
    return dataclasses.replace(
        config,
        secrets=api.config().secrets if secrets is None else secrets,
        docker=dataclasses.replace(config.docker, network_allow=("127.0.0.1:443",)),
        package=dataclasses.replace(config.package, ca_bundle=str(bundle)),
    )


FETCH = f"""
import json, urllib.request
given = json.load(urllib.request.urlopen('https://{HOST}/'))['headers']
[value for name, value in given if name.lower() == 'authorization']
"""
MASKED = f"['Bearer {'*' * len(VALUE)}']"


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_code_uses_what_it_does_not_have_however_its_sandbox_came_to_be(
    config: Config, api: Upstream, way: Any
) -> None:
    default = dataclasses.replace(config, package=PackageConfig())
    async with way(on_engine(default, api)) as execute:
        for code in (FETCH, FETCH.replace("https:", "http:")):
            result = await execute(code)
            assert result.value == MASKED, result
    assert all(fields({"headers": given}, "authorization") == [f"Bearer {VALUE}"] for *_, given in api.requests)


LIBRARIES = ("requests", "httpx", "openai", "anthropic", "huggingface_hub", "stripe", "boto3", "grpcio")
MESSAGE = "model='m', messages=[{'role': 'user', 'content': 'x'}]"
BUNDLE = "stripe.ca_bundle_path = os.environ['SSL_CERT_FILE']"
ROOTS = "grpc.ssl_channel_credentials(open(os.environ['SSL_CERT_FILE'], 'rb').read())"
AS_IT_IS = {  # code, and its value
    f"import requests; requests.get('https://{HOST}/').status_code": "200",
    f"requests.get('http://{HOST}/').status_code": "200",
    f"import httpx; httpx.get('https://{HOST}/').status_code": "200",
    f"async with httpx.AsyncClient() as client: print((await client.get('https://{HOST}/')).status_code)": "200",
    f"import openai; openai.OpenAI().chat.completions.create({MESSAGE}).choices[0].message.content": "'hi'",
    f"(await openai.AsyncOpenAI().chat.completions.create({MESSAGE})).choices[0].message.content": "'hi'",
    "openai.OpenAI(base_url='http://api.openai.com/v1').models.list().data": "[]",
    f"import anthropic; anthropic.Anthropic().messages.create(max_tokens=5, {MESSAGE}).content[0].text": "'hi'",
    "import huggingface_hub; huggingface_hub.whoami()['name']": "'me'",
    f"import os, stripe; {BUNDLE}; stripe.api_key = 'x'; stripe.Customer.list().data": "[]",
}
NOT_SO = {  # code, and what its call tells
    "import certifi; stripe.default_http_client = None; stripe.ca_bundle_path = certifi.where()\n"
    "stripe.Customer.list()": BUNDLE,
    "import boto3; boto3.client('s3').list_buckets()": "code signs it (AWS, boto3)",
    f"import grpc; channel = grpc.secure_channel('grpc.example.com:443', {ROOTS})\n"
    "grpc.channel_ready_future(channel).result(timeout=3)": "not HTTP/2 or gRPC",
}


def everybodys() -> dict[str, SecretConfig]:
    """Secrets of the services whose libraries are tried."""
    bearer, keys = "Authorization: Bearer ${%s}", {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    return {
        "api": SecretConfig(HOST, bearer % "API_KEY"),
        "openai": SecretConfig("api.openai.com", bearer % "OPENAI_API_KEY"),
        "anthropic": SecretConfig("api.anthropic.com", "X-Api-Key: ${ANTHROPIC_API_KEY}"),
        "hub": SecretConfig("huggingface.co", bearer % "HF_TOKEN"),
        "stripe": SecretConfig("api.stripe.com", bearer % "STRIPE_API_KEY"),
        "aws": SecretConfig("s3.amazonaws.com", bearer % "API_KEY", env={**keys, "AWS_DEFAULT_REGION": "us-east-1"}),
        "grpc": SecretConfig("grpc.example.com", bearer % "API_KEY", env={}),
    }


@pytest.mark.engine
@pytest.mark.in_turns
async def test_the_real_libraries_of_services_work_as_they_are_or_are_told_why_not(
    config: Config, api: Upstream, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN", "STRIPE_API_KEY"):
        monkeypatch.setenv(name, VALUE)
    config = on_engine(config, api, everybodys())
    docker = dataclasses.replace(config.docker, memory_limit="512m", disk_limit="128m", cpu_limit=1)
    package = dataclasses.replace(config.package, preinstalled=LIBRARIES)
    async with open_runner(dataclasses.replace(config, docker=docker, package=package)) as runner:
        for code, value in AS_IT_IS.items():
            result = await runner.execute(code, session=session, timeout=60)
            assert (result.value or result.stdout.strip(), result.refused) == (value, ()), (code, result)
        given = [pair for *_, fields in api.requests for pair in fields]
        assert "added-by-the-host" not in str(given)
        count = len(api.requests)
        for code, told in NOT_SO.items():
            result = await runner.execute(code, session=session, timeout=60)
            assert result.status == "error", (code, result)
            assert told in str(result.refused), (code, result)
        assert len(api.requests) == count
        await runner.close_session(session)


LOOK = """
import glob, os
VALUE = bytes(byte ^ 1 for byte in MADE)  # so that it is not in the code
def everywhere():
    yield repr(dict(os.environ)).encode()
    for pattern in ('/proc/[0-9]*/environ', '/proc/[0-9]*/cmdline', '/proc/[0-9]*/maps', '/proc/self/mountinfo'):
        for path in glob.glob(pattern):
            try:
                yield open(path, 'rb').read()
            except OSError:
                pass
    for folder in ('/tmp', '/app', '/dev/shm', '/etc', '/run', '/var', '/opt', '/packages', '/root', '/home'):
        for place, _, names in os.walk(folder):
            for name in names:
                try:
                    if os.path.getsize(f'{place}/{name}') < 5 << 20:
                        yield open(f'{place}/{name}', 'rb').read()
                except OSError:
                    pass
    memory = open('/proc/self/mem', 'rb', buffering=0)
    for line in open('/proc/self/maps'):
        ends, rights = line.split()[:2]
        if rights.startswith('rw') and '[v' not in line:
            start, end = (int(one, 16) for one in ends.split('-'))
            try:
                memory.seek(start)
                yield memory.read(end - start).replace(VALUE, b'', 2)  # it is here itself, and where it was made
            except OSError:
                pass
count, found = 0, 0
for data in everywhere():
    count, found = count + len(data), found + (VALUE in data)
count > 1 << 20, found
"""


@pytest.mark.engine
async def test_the_value_is_nowhere(
    config: Config, api: Upstream, session: str, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in what code can see, nor the model, nor the log, nor the engine."""
    caplog.set_level("DEBUG", "python_docker_mcp")
    caplog.set_level("DEBUG", "python_docker_mcp.network")
    config = on_engine(config, api)
    async with open_runner(config) as runner:
        told = [await runner.execute(FETCH, session=session)]
        made = repr([byte ^ 1 for byte in SENT])
        told.append(
            await runner.execute(f"print(urllib.request.urlopen('http://{HOST}/shown').read())", session=session)
        )
        result = await runner.execute(LOOK.replace("MADE", made), session=session, timeout=60)
        assert result.value == "(True, 0)", result
        name = await engine.container_of(runner)
        seen = [await engine(*line.split()) for line in (f"inspect {name}", "images --no-trunc", "ps -a --no-trunc")]
        seen += [str(line) for _, _, line in host_processes()]
        seen += [repr(told), repr(config), repr(runner), repr(vars(runner.launcher)), caplog.text]
        assert "with the secret api" in caplog.text
        assert not [text for text in seen if VALUE in text]
        await runner.close_session(session)


@pytest.mark.engine
async def test_a_session_goes_by_the_secrets_of_the_server_that_has_it(
    config: Config, api: Upstream, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = {"second": SecretConfig("second.example.com", "X-Key: ${API_KEY}")}
    begun = on_engine(config, api)
    more = dataclasses.replace(begun, secrets={**begun.secrets, **second})
    keeps = f"import ssl\nearlier = ssl.create_default_context()\n{FETCH}"
    again = f"json.load(urllib.request.urlopen('https://{HOST}/', context=earlier))['method']"
    async with open_runner(begun) as runner:
        assert (await runner.execute(keeps, session=session)).value == MASKED
        result = await runner.execute(FETCH.replace(HOST, "second.example.com"), session=session)
        assert "second.example.com was refused" in str(result.refused)
    async with open_runner(more) as runner:
        for code in (FETCH, FETCH.replace(HOST, "second.example.com")):
            assert (await runner.execute(code, session=session)).status == "ok"
        assert (await runner.execute(again, session=session)).value == "'GET'", "what it trusted before still does"
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_runner, "AUTHORITY_DAYS", -1)
        async with open_runner(begun) as runner:
            result = await runner.execute(FETCH, session=session)
            assert "certificate has expired" in str(result.exception), result
    async with open_runner(begun) as runner:
        assert (await runner.execute(FETCH, session=session)).value == MASKED
        await runner.close_session(session)


@pytest.mark.engine
async def test_a_secret_is_for_the_code_of_its_users(config: Config, api: Upstream, session: str) -> None:
    alices = {"api": dataclasses.replace(api.config().secrets["api"], users=("alice",))}
    async with open_runner(on_engine(config, api, alices)) as runner:
        for user, value in (("alice", MASKED), ("bob", None)):
            one = runner.for_user(user, 1)
            for name in (session, None):
                assert (await one.execute(FETCH, session=name)).value == value
            await one.close_session(session)
        assert (await runner.execute(FETCH)).value is None
    assert len(api.requests) == 2
