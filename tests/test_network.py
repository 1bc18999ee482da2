"""Network by name: what is let through, how it is parsed and relayed; and the whole of it on real engines."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import ipaddress
import json
import select
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio
import h11
import pytest
import trustme
from conftest import Hears, until
from hypothesis import example, given
from hypothesis import strategies as st

import sandbox_runner
from python_docker_mcp import hint_on, instructions, render
from sandbox_runner import (
    Config,
    Connection,
    Credentials,
    DockerConfig,
    ExceptionInfo,
    Flows,
    HostRule,
    Network,
    PackageConfig,
    Proxy,
    RefusedError,
    Result,
    head_for_server,
    host_name,
    is_public,
    open_runner,
    read_request,
    server_name,
    target_of,
)

pytestmark = pytest.mark.anyio

BIG = 20 << 20  # bytes of the file /big


# ── the rules ──


@pytest.mark.parametrize(
    ("rule", "host", "port", "usual", "allowed"),
    [
        ("example.com", "example.com", 443, 443, True),
        ("example.com", "example.com", 80, 80, True),
        ("example.com", "example.com", 80, 443, False),
        ("example.com", "example.com", 8443, 443, False),
        ("example.com:8443", "example.com", 8443, 443, True),
        ("example.com:8443", "example.com", 443, 443, False),
        ("example.com", "www.example.com", 443, 443, False),
        ("example.com", "notexample.com", 443, 443, False),
        ("example.com", "example.com.evil.net", 443, 443, False),
        ("*.example.com", "www.example.com", 443, 443, True),
        ("*.example.com", "a.b.example.com", 443, 443, True),
        ("*.example.com", "example.com", 443, 443, False),
        ("*.example.com", "evilexample.com", 443, 443, False),
        ("*.example.com:8443", "www.example.com", 8443, 443, True),
        ("EXAMPLE.com.", "example.com", 443, 443, True),
        ("bücher.example", "xn--bcher-kva.example", 443, 443, True),
        ("*", "example.com", 443, 443, True),
        ("*", "example.com", 22, 443, False),
        ("*", "127.0.0.1", 443, 443, False),
        ("*", "::1", 443, 443, False),
        ("127.0.0.1:8000", "127.0.0.1", 8000, 443, True),
        ("[::1]:8000", "::1", 8000, 443, True),
        ("10.0.0.1", "10.0.0.1", 443, 443, True),
    ],
)
def test_a_rule_allows_what_it_names_and_nothing_else(
    rule: str, host: str, port: int, usual: int, allowed: bool
) -> None:
    assert HostRule.parse(rule).allows(host, port, usual) is allowed


@pytest.mark.parametrize(
    "text",
    ["", "*.", "*.*", "a*.com", "**", "http://example.com", "example.com/x", "exa mple.com", "a@b.com", "a%41.com",
     "a\0b",
     "example.com:", "example.com:0", "example.com:65536", "example..com", ".example.com", "-a.com", "a_b.com", "1.2.3",
     "0x7f000001", "[::1", "x" * 64 + ".com", ".".join(["a" * 60] * 5), "💥" * 70],
)  # fmt: skip
def test_what_names_no_host_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a host such as example\.com"):
        HostRule.parse(text)
    with pytest.raises(ValueError, match=r"^docker\.network_allow: "):
        DockerConfig(network_allow=(text,))


def test_a_list_of_hosts_is_refused_where_all_can_be_reached() -> None:
    with pytest.raises(ValueError, match=r"^docker\.network_allow: it has no meaning while"):
        DockerConfig(network_allow=("example.com",), network_disabled=False)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("192.0.2.1", False), ("::1", False),
        ("::", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False), ("2001:0:0:0:0:0:80ff:fffe", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


# ── requests ──


async def parsed(data: bytes) -> tuple[str, int, str | None]:
    """What a request asks for."""
    connection = Connection(1, nowhere, lambda: False)
    connection.take({"kind": "passed", "flow": 1, "data": data, "credit": 0, "ended": True})
    request, _ = await read_request(connection)
    return target_of(request)


async def nowhere(_: Any) -> None:
    """Stands in for a sandbox that takes everything."""


def get(target: str, host: str = "example.com", more: str = "") -> bytes:
    """A request to a proxy."""
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode("latin-1")


def connect(target: str) -> bytes:
    """A request for a tunnel."""
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("latin-1")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (connect("example.com:443"), ("example.com", 443, None)),
        (connect("EXAMPLE.COM.:443"), ("example.com", 443, None)),
        (connect("[::1]:8443"), ("::1", 8443, None)),
        (get("http://example.com"), ("example.com", 80, "/")),
        (get("http://example.com/a?b=c"), ("example.com", 80, "/a?b=c")),
        (get("http://example.com?b"), ("example.com", 80, "/?b")),
        (get("http://example.com:81/", "example.com:81"), ("example.com", 81, "/")),
    ],
)
async def test_a_request_is_understood(data: bytes, expected: tuple[str, int, str | None]) -> None:
    assert await parsed(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        get("/"), get("https://example.com/"), get("ftp://example.com/"), get("http://user:pw@example.com/"),
        get("http://example.com@evil.net/"), get("http://example.com%00.evil.net/"), get("http://example.com\\@evil.net/"),
        get("http://example.com:0/"), get("http://example.com:99999/"), get("http://2130706433/"), get("http://0x7f.1/"),
        get("http://127.1/"), get("http://0177.0.0.1/"), get("http://example.com/", "evil.net"), get("http://exämple.com/"),
        get("http://example.com/", more="Host: evil.net\r\n"), get("http://[::1%25lo]/"),
        get("http:///etc/passwd"), get("http://example.com/\x7f"), connect("example.com"), connect("example.com:http"),
        connect("a@example.com:443"), connect("example.com:443/x"), connect("2130706433:443"), connect("0:443"),
        b"GET http://example.com/ HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"nonsense\r\n\r\n", b"\0" * 100,
        b"GET http://example.com/ HTTP/1.1\nHost: example.com\nContent-Length: 1\nContent-Length: 2\n\n",
        b"POST http://example.com/ HTTP/1.1\r\nHost: example.com\r\nTransfer-Encoding: gzip\r\n\r\n",
        get("http://example.com/" + "x" * 20_000),
    ],
)  # fmt: skip
async def test_a_request_that_could_be_understood_in_two_ways_is_refused(data: bytes) -> None:
    with pytest.raises((RefusedError, anyio.EndOfStream)) as caught:
        await parsed(data)
    if isinstance(caught.value, RefusedError):
        assert caught.value.args[0] == 400
        assert caught.value.args[1].startswith("that is no request to a proxy: ")


@given(
    st.binary(max_size=200) | st.text(max_size=60).map(lambda text: get(f"http://{text}/".encode().decode("latin-1")))
)
@example(connect("127.0.0.1:443"))
def test_whatever_comes_is_a_request_or_refused(data: bytes) -> None:
    async def parse() -> None:
        with contextlib.suppress(RefusedError, anyio.EndOfStream):
            host, port, _ = await parsed(data)
            assert host_name(host) == host
            assert 0 < port < 65536

    anyio.run(parse)


def head(*lines: str) -> bytes:
    """What becomes of the head of a request."""
    http = h11.Connection(h11.SERVER)
    http.receive_data("\r\n".join(["POST http://a.com/x HTTP/1.1", "Host: a.com", *lines, "", ""]).encode())
    request = http.next_event()
    assert isinstance(request, h11.Request)
    return head_for_server(request, "/x")


def test_what_is_meant_for_the_proxy_is_not_passed_on() -> None:
    start, end = b"POST /x HTTP/1.1\r\nhost: a.com\r\n", b"connection: close\r\n\r\n"
    assert head("Proxy-Authorization: Basic eDp5", "Proxy-Connection: keep-alive", "Keep-Alive: 5") == start + end
    assert head("Connection: X-Secret, close", "X-Secret: 1", "Y: 2") == start + b"y: 2\r\n" + end
    both = head("Transfer-Encoding: chunked", "Content-Length: 5")
    assert both == start + b"transfer-encoding: chunked\r\n" + end


def hello(name: str | None) -> bytes:
    """The first bytes of TLS."""
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


def test_the_name_in_a_client_hello_is_found() -> None:
    assert server_name(hello("Example.com")) == "example.com"
    assert server_name(hello(None)) == ""
    assert server_name(hello("example.com")[:50]) is None
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000)):
        with pytest.raises(ValueError, match="no TLS ClientHello"):
            server_name(data)


@given(st.binary(max_size=600))
def test_whatever_comes_is_a_client_hello_or_not(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert server_name(data) in (None, "")


# ── both ends of the pipe, in this process ──


class Both:
    """The supervisor's end and the host's, without a sandbox between them."""

    def __init__(self, network: Network, tasks: anyio.abc.TaskGroup) -> None:
        self.tasks = tasks
        self.call: Any = None
        self.gone = anyio.Event()
        self.name = "sandbox"
        self.user = ""
        sandbox: Any = self
        self.proxy = Proxy(network, sandbox)
        self.flows = Flows(self._tell, {})
        self.flows.listen()
        assert self.flows.listener
        self.port = self.flows.listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.to_sandbox = 0  # bytes that the host has sent
        self.has_servers = False  # whether this process' loopback is the code's, too, with servers of its own

    def _tell(self, frame: Any) -> None:
        self.proxy.take(frame, self.tasks)

    async def write(self, data: bytes) -> None:
        frame, _, rest = data.partition(b"\n")
        fields = json.loads(frame)
        self.to_sandbox += len(rest)
        fields["data"] = rest
        if fields["op"] == "dial" and not self.has_servers:
            fields["port"] = 1  # where nobody is
        (self.flows.dial if fields["op"] == "dial" else self.flows.receive)(fields)

    async def run(self) -> None:
        """Do what a supervisor's loop does for connections, until it is cancelled."""
        try:
            while True:
                rests = self.flows.resting(congested=False, attached=True)
                writers = self.flows.writers()
                readers = [fd for fd in self.flows.sources if fd not in rests]
                readable, writable, _ = select.select(readers, list(writers), [], 0)
                for fd in writable:
                    self.flows.flush(writers[fd])
                for fd in readable:
                    if fd in self.flows.sources:
                        self.flows.sources[fd]()
                await anyio.sleep(0 if readable or writable else 0.001)
        finally:
            self.flows.close_all()
            assert self.flows.listener
            self.flows.listener.close()


@contextlib.asynccontextmanager
async def proxied(*allowed: str, config: Config | None = None) -> AsyncIterator[Both]:
    """A proxy that lets code reach these hosts, and those that have a secret by the configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox_runner, "PROXY_PORT", 0)
        for variable in sandbox_runner.PROXIES:
            patch.delenv(variable, raising=False)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                both = Both(Network(allowed, Credentials(config or Config())), tasks)
                tasks.start_soon(both.run)
                try:
                    yield both
                finally:
                    tasks.cancel_scope.cancel()
        await anyio.sleep(0.02)  # for the event loop to close sockets


class Server(http.server.ThreadingHTTPServer):
    """A server that says nothing of clients that turn away."""

    def handle_error(self, *_: object) -> None:
        """Say nothing."""


def encrypt(server: Server, folder: Path, *names: str) -> Path:
    """Have a server speak TLS, by these names; the bundle that a client has to trust for that."""
    authority = trustme.CA()
    bundle = folder / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return bundle


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with a table, or a large file; or tells how long what it was sent is."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        if self.path == "/late":
            time.sleep(1)
        body = bytes(BIG) if self.path == "/big" else b"x,y\n1,2\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_POST(self) -> None:
        """Read what is sent, in chunks or not."""
        if self.headers.get("transfer-encoding"):
            size = 0
            while part := int(self.rfile.readline(), 16):
                size += len(self.rfile.read(part))
                self.rfile.readline()
        else:
            size = len(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{size} {self.headers.get('x-own')}".encode())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclasses.dataclass(frozen=True)
class Servers:
    """An HTTP server and an HTTPS server on this host, with the certificate authority of the latter."""

    plain: int
    secure: int
    bundle: Path

    @property
    def allowed(self) -> tuple[str, str]:
        """The rules that allow both."""
        return f"localhost:{self.plain}", f"localhost:{self.secure}"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers that run while the tests do."""
    running = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
    bundle = encrypt(running[1], tmp_path_factory.mktemp("tls"), "localhost")
    for server in running:
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
    yield Servers(running[0].server_port, running[1].server_port, bundle)
    for server in running:
        server.shutdown()
        server.server_close()


class NotFetchedError(Exception):
    """The proxy, or a server, answered with an error: its first line, and what it said."""


async def fetched(both: Both, servers: Servers, url: str, data: Any = None, **headers: str) -> bytes:
    """What urllib gets by the proxy."""

    def fetch() -> bytes:
        context = ssl.create_default_context(cafile=str(servers.bundle))
        proxies = urllib.request.ProxyHandler({"http": both.address, "https": both.address})
        opener = urllib.request.build_opener(proxies, urllib.request.HTTPSHandler(context=context))
        request = urllib.request.Request(url, data, headers)
        try:
            with opener.open(request, timeout=20) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise NotFetchedError(f"{error.code}: {error.reason}", error.read().decode()) from None

    return await anyio.to_thread.run_sync(fetch)


async def test_requests_and_tunnels_reach_their_servers(servers: Servers) -> None:
    async with proxied(*servers.allowed) as both:
        for url in (f"http://localhost:{servers.plain}/a.csv", f"https://localhost:{servers.secure}/a.csv"):
            assert await fetched(both, servers, url) == b"x,y\n1,2\n"
            assert await fetched(both, servers, url.replace("a.csv", "big")) == bytes(BIG)
            assert await fetched(both, servers, url, bytes(700_000), **{"X-Own": "1"}) == b"700000 1"
            chunks = (bytes(size) for size in (1, 300_000, 5))
            assert await fetched(both, servers, url, chunks) == b"300006 None"
        await until(lambda: not both.flows.open and not both.proxy.open)


@pytest.mark.slow
async def test_an_answer_that_comes_late_is_waited_for_unless_its_place_is_wanted(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "CONNECTION_IDLE", 0.3)
    monkeypatch.setattr(sandbox_runner, "CONNECTIONS_AT_ONCE", 1)
    urls = [f"http://localhost:{servers.plain}/late", f"https://localhost:{servers.secure}/late"]
    cut: list[str] = []

    async def is_cut(url: str) -> None:
        with pytest.raises(http.client.RemoteDisconnected):
            await fetched(both, servers, url)
        cut.append(url)

    async with proxied(*servers.allowed) as both:
        for url in urls:
            assert await fetched(both, servers, url) == b"x,y\n1,2\n"
        for url in urls:
            await until(lambda: not both.proxy.open)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(is_cut, url)
                await until(lambda: bool(both.proxy.open))
                assert await fetched(both, servers, urls[0].replace("late", "a.csv")) == b"x,y\n1,2\n"
        assert cut == urls


async def test_what_is_not_allowed_is_refused_in_a_sentence_and_the_call_tells_it(servers: Servers) -> None:
    async with proxied("example.com", "localhost:1") as both:
        both.call = Call()
        for url, said in (
            (f"http://localhost:{servers.plain}/", f"localhost:{servers.plain} was refused: docker.network_allow has"),
            ("http://169.254.169.254/latest/meta-data", "169.254.169.254 was refused: docker.network_allow has"),
            ("http://other.example/", "other.example was refused: docker.network_allow has example.com, localhost:1"),
        ):
            with pytest.raises(NotFetchedError) as caught:
                await fetched(both, servers, url)
            assert caught.value.args[0].startswith(f"403: {said}")
            assert caught.value.args[1].startswith(said)
        with pytest.raises(urllib.error.URLError, match=r"Tunnel connection failed: 403 other\.example was refused"):
            await fetched(both, servers, "https://other.example/")
        assert len(both.call.refused) == 3
        with pytest.raises(NotFetchedError, match="can't be reached"):
            await fetched(both, servers, "http://localhost:1/")


class Call:
    """What the proxy knows of a call."""

    def __init__(self) -> None:
        self.refused: dict[str, None] = {}
        self.request = Call.Request()

    class Request:
        """Its request."""

        key = "s"


def resolver(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Have names resolve to these addresses, one list after the other; the addresses that are connected to."""
    left, reached = list(answers), []

    async def getaddrinfo(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in left.pop(0)]

    async def connect_tcp(address: str, port: int) -> Any:
        reached.append(f"{address}:{port}")
        raise ConnectionRefusedError("nobody is there")

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    return reached


async def test_a_name_is_looked_up_once_and_only_what_was_checked_is_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(["example.com"])
    rule = network.rules[0]
    reached = resolver(
        monkeypatch, ["93.184.216.34", "93.184.216.35"], ["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], []
    )
    with pytest.raises(RefusedError, match="can't be reached"):
        await network.connect("example.com", 443, rule, "https")
    assert reached == ["93.184.216.34:443", "93.184.216.35:443"], (
        "the second answer, of a rebinding server, is not asked for"
    )
    for address in ("127.0.0.1", "10.0.0.1"):
        with pytest.raises(RefusedError, match=f"example.com was refused: its name leads to {address}, which is not"):
            await network.connect("example.com", 443, rule, "https")
    with pytest.raises(RefusedError, match="can't be reached"):
        await network.connect("example.com", 443, rule, "https")
    assert len(reached) == 2


async def tunnel(both: Both, target: str, first: bytes) -> bytes:
    """What comes back by a tunnel when this is sent through it, until it is closed."""
    async with await anyio.connect_tcp("127.0.0.1", both.port) as stream:
        await stream.send(connect(target))
        assert (await stream.receive()).startswith(b"HTTP/1.1 200 ")
        await stream.send(first)
        answer = b""
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                answer += await stream.receive()
        return answer


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"SSH-2.0-x\r\n", hello("evil.example"), hello(None)]
)
async def test_nothing_but_tls_to_the_host_asked_for_goes_through_a_tunnel(servers: Servers, first: bytes) -> None:
    async with proxied(*servers.allowed) as both:
        assert await tunnel(both, f"localhost:{servers.plain}", first) == b""


async def test_a_connection_carries_one_request(servers: Servers) -> None:
    """A second one, which might be for another host, goes nowhere."""
    async with proxied(*servers.allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port) as stream:
        target = f"localhost:{servers.plain}"
        one = get(f"http://{target}/a.csv", target)
        await stream.send(one + one.replace(b"a.csv", b"big"))
        answer = b""
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                answer += await stream.receive()
        assert answer.count(b"HTTP/1.1 200") == 1
        assert answer.endswith(b"x,y\n1,2\n")


async def test_what_comes_after_a_refusal_is_no_request(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    async with proxied(*servers.allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port) as stream:
        caplog.set_level("INFO", "python_docker_mcp.network")
        target = f"localhost:{servers.plain}"
        await stream.send(get("http://other.example/", "other.example"))
        assert (await stream.receive()).startswith(b"HTTP/1.1 403 ")
        await until(lambda: not both.proxy.open)
        late: Any = {"kind": "passed", "flow": 1, "data": get(f"http://{target}/", target), "credit": 0, "ended": False}
        both.proxy.take(late, both.tasks)
        assert not both.proxy.open
        await anyio.sleep(0.05)
    assert "passed" not in caplog.text
    (line,) = [record.getMessage() for record in caplog.records if record.name == "python_docker_mcp.network"]
    assert "other.example:80: other.example was refused" in line


async def test_a_slow_reader_holds_back_a_fast_sender(servers: Servers) -> None:
    async with proxied(*servers.allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port) as stream:
        target = f"localhost:{servers.plain}"
        await stream.send(get(f"http://{target}/big", target))
        before = -1
        while both.to_sandbox != before:
            before = both.to_sandbox
            await anyio.sleep(0.1)
        in_buffers = BIG // 2  # what the kernel's buffers of two connections take
        assert both.to_sandbox < in_buffers
        assert both.flows.open[1].outbox.size <= sandbox_runner.TAKEN_AHEAD
        size = 0
        while size < BIG:
            size += len(await stream.receive())


async def test_small_pieces_are_not_held_back(servers: Servers) -> None:
    """Or each that comes soon after another, as in a stream or a handshake, would wait 40 ms for its turn."""
    async with proxied(*servers.allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port):
        await until(lambda: bool(both.flows.open))
        assert both.flows.open[1].connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_client_is_told_that_its_connection_is_not_used_again(servers: Servers) -> None:
    async with proxied(*servers.allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port) as stream:
        target = f"localhost:{servers.plain}"
        await stream.send(get(f"http://{target}/a.csv", target))
        answer = b""
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                answer += await stream.receive()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.lower().count(b"\r\nconnection: close") == 1
    assert body == b"x,y\n1,2\n"


@pytest.mark.slow
async def test_connections_past_the_bounds_wait_for_their_turn_and_are_refused_when_it_does_not_come(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "CONNECTIONS_AT_ONCE", 2)
    url = f"http://localhost:{servers.plain}/a.csv"
    async with proxied(*servers.allowed) as both:
        idle = [await anyio.connect_tcp("127.0.0.1", both.port) for _ in range(2)]
        await until(lambda: len(both.proxy.open) == 2)
        monkeypatch.setattr(sandbox_runner, "TURN_TIMEOUT", 0.05)
        with pytest.raises(
            NotFetchedError, match=r"503: 2 connections are open, and none was closed for 0\.05 seconds"
        ):
            await fetched(both, servers, url)
        monkeypatch.setattr(sandbox_runner, "TURN_TIMEOUT", 60)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(fetched, both, servers, url)
            await until(lambda: len(both.proxy.open) > 2)
            await idle.pop().aclose()
        await idle.pop().aclose()


@pytest.mark.slow
async def test_500_small_downloads_by_100_threads_all_succeed_and_the_event_loop_answers_meanwhile(
    servers: Servers,
) -> None:
    url = f"http://localhost:{servers.plain}/a.csv"
    turns = 0
    async with proxied(*servers.allowed) as both:

        async def fetch_many() -> None:
            for _ in range(5):
                assert await fetched(both, servers, url) == b"x,y\n1,2\n"

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(fetch_many)
                while both.proxy.last < 500:
                    assert len(both.proxy.open) <= sandbox_runner.FLOWS_OPEN + sandbox_runner.CONNECTIONS_AT_ONCE
                    await anyio.sleep(0.01)
                    turns += 1
        assert turns > 30


async def test_a_server_of_the_codes_own_is_reached_by_the_name_localhost_where_the_hosts_is_allowed(
    servers: Servers,
) -> None:
    """Here the loopback of the sandbox and of the host are the same: only the ports tell them apart."""
    own = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=own.serve_forever, daemon=True).start()
    async with proxied(f"localhost:{servers.plain}") as both:
        both.has_servers = True
        for port in (own.server_address[1], servers.plain):
            for _ in range(3):
                assert await fetched(both, servers, f"http://localhost:{port}/a.csv") == b"x,y\n1,2\n"
        await until(lambda: not both.proxy.open and not both.flows.open)
    await anyio.to_thread.run_sync(own.shutdown)
    own.server_close()


def open_and_close(port: int) -> None:
    """Open many connections at once, then close them."""
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for one in opened:
        one.close()


@pytest.mark.slow
async def test_no_number_of_connections_that_are_opened_and_closed_is_a_breach_of_the_protocol(
    servers: Servers,
) -> None:
    url = f"http://localhost:{servers.plain}/a.csv"
    async with proxied(*servers.allowed) as both:
        for _ in range(600):
            await (await anyio.connect_tcp("127.0.0.1", both.port)).aclose()
        for _ in range(6):  # frames of many of them come in one read
            await anyio.to_thread.run_sync(open_and_close, both.port)
        assert await fetched(both, servers, url) == b"x,y\n1,2\n"
        await until(lambda: not both.proxy.open)


async def test_more_than_was_credited_is_a_breach_of_the_protocol() -> None:
    connection = Connection(1, nowhere, lambda: False)
    frame: Any = {"kind": "passed", "flow": 1, "data": bytes(sandbox_runner.SENT_AHEAD), "credit": 0, "ended": False}
    connection.take(frame)
    frame["data"] = b"x"
    with pytest.raises(sandbox_runner.ProtocolError, match="more of a connection than was credited"):
        connection.take(frame)


class Upstream(http.server.BaseHTTPRequestHandler):
    """A proxy as companies have it, which wants a password, and knows where names lead."""

    seen: ClassVar[list[str]] = []
    leads: ClassVar[dict[str, tuple[str, int]]] = {}  # by the name and port that is asked for

    def do_GET(self) -> None:
        """Answer in the place of the server."""
        self.seen.append(f"{self.path} {self.headers['proxy-authorization']}")
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"up")

    def do_CONNECT(self) -> None:
        """Connect, and pass bytes both ways."""
        self.seen.append(f"{self.path} {self.headers['proxy-authorization']}")
        self.send_response(200 if self.path in self.leads else 403)
        self.end_headers()
        if self.path not in self.leads:
            return
        with socket.create_connection(self.leads[self.path]) as there:
            ends = [self.connection, there]
            while True:
                for ready in select.select(ends, [], [], 5)[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    ends[1 - ends.index(ready)].sendall(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def upstream(monkeypatch: pytest.MonkeyPatch, leads: dict[str, tuple[str, int]]) -> Iterator[None]:
    """Have this server go by such a proxy."""
    Upstream.leads, Upstream.seen = leads, []
    proxy = Server(("127.0.0.1", 0), Upstream)
    threading.Thread(target=partial(proxy.serve_forever, 0.01), daemon=True).start()
    try:
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.server_port}")
        yield
    finally:
        proxy.shutdown()
        proxy.server_close()


async def test_where_this_server_has_a_proxy_that_is_used(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxied("localhost.example", "other.example", *servers.allowed) as both:
        with upstream(monkeypatch, {"localhost.example:443": ("127.0.0.1", servers.secure)}):
            assert await fetched(both, servers, "http://localhost.example/a?b") == b"up"
            with pytest.raises(urllib.error.URLError, match=r"certificate is not valid for 'localhost\.example'"):
                await fetched(both, servers, "https://localhost.example/")
            with pytest.raises(urllib.error.URLError, match=r"502 other\.example:443 was refused by this server's own"):
                await fetched(both, servers, "https://other.example/")
            assert await fetched(both, servers, f"http://localhost:{servers.plain}/") == b"x,y\n1,2\n"
    password = "Basic bWU6cEBzcw=="
    assert Upstream.seen == [
        f"http://localhost.example:80/a?b {password}",
        f"localhost.example:443 {password}",
        f"other.example:443 {password}",
    ]


# ── each rule, with and without it ──


@dataclasses.dataclass(frozen=True)
class Hole:
    """A way out that one rule closes: what code sends, and what takes the rule away."""

    does: str
    sends: tuple[str, ...]  # one after the other; PLAIN and SECURE stand for the servers' ports
    without: Callable[[pytest.MonkeyPatch], None]
    allowed: str = "localhost:PLAIN"
    gets: str = "x,y"  # shows that it got through
    twice: bool = False  # whether the rule on public addresses would hold it, too


def replace(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Put something else in the place of a function of the library's."""
    owner, _, attribute = name.rpartition(".")
    target = getattr(sandbox_runner, owner) if owner else sandbox_runner
    return lambda patch: patch.setattr(target, attribute, value)


async def any_first_bytes(_: Any, __: str, first: bytes) -> bytes:
    """Stands in for `read_hello`, and wants no TLS."""
    return first


def no_host_check(request: h11.Request) -> tuple[str, int, str | None]:
    """Stands in for `target_of`, and believes the Host header."""
    (host,) = [value.decode() for key, value in request.headers if key == b"host"]
    return host.partition(":")[0], int(host.partition(":")[2]), "/a.csv"


GET = "GET http://{0}/a.csv HTTP/1.1\r\nHost: {0}\r\n\r\n"
TUNNEL = "CONNECT localhost:PLAIN HTTP/1.1\r\nHost: x\r\n\r\n"
HOLES = [
    Hole("a host that is not listed", (GET.format("localhost:PLAIN"),),
         replace("HostRule.allows", lambda *_: True), "example.com", twice=True),
    Hole("another port of a host that is listed", (GET.format("localhost:PLAIN"),),
         replace("HostRule.allows", lambda rule, host, *_: host == rule.name), "localhost"),
    Hole("a name that leads into this network", (GET.format("inside.example:PLAIN"),),
         replace("is_public", lambda _: True), "inside.example:PLAIN"),
    Hole("an address in decimal", (GET.format("2130706433:PLAIN"),),
         replace("host_name", lambda text: {"2130706433": "inside.example"}.get(text, text)), "inside.example:PLAIN",
         twice=True),
    Hole("a name that only ends like those of a rule", (GET.format("inside.example:PLAIN"),),
         replace("HostRule.allows", lambda rule, host, *_: host.endswith(rule.name)), "*.side.example:PLAIN",
         twice=True),
    Hole("TLS for another host through a tunnel",
         (TUNNEL.replace("PLAIN", "SECURE"), hello("evil.example").decode("latin-1")),
         replace("read_hello", any_first_bytes), "localhost:SECURE", gets="\x16\x03\x03"),
    Hole("no TLS through a tunnel", (TUNNEL, "GET /a.csv HTTP/1.1\r\nHost: x\r\n\r\n"),
         replace("read_hello", any_first_bytes)),
    Hole("a Host that is not the target's", ("GET http://other.example/ HTTP/1.1\r\nHost: localhost:PLAIN\r\n\r\n",),
         replace("target_of", no_host_check)),
    Hole("a password for the proxy", (GET.format("localhost:PLAIN").replace("GET", "POST").replace(
         "\r\n\r\n", "\r\nContent-Length: 0\r\nX-Own: 7\r\nConnection: x-own\r\n\r\n"),),
         lambda patch: patch.setattr(sandbox_runner, "head_for_server", head_as_it_is), gets="0 7"),
]  # fmt: skip


def head_as_it_is(request: h11.Request, target: str, _: str) -> bytes:
    """Stands in for `head_for_server`, and drops nothing."""
    lines = [b"%s %s HTTP/1.1" % (request.method, target.encode()), *(b"%s: %s" % field for field in request.headers)]
    return b"\r\n".join([*lines, b"", b""])


async def require_rule(
    hole: Hole, servers: Servers, attempt: Callable[[str, Sequence[bytes], bytes], Awaitable[bool]]
) -> None:
    """See that an attempt fails, and that it gets through without the rule. It is given what is allowed, too."""
    look_up = anyio.getaddrinfo

    async def inside(host: str, port: int, **more: Any) -> Any:
        return await look_up("127.0.0.1" if host == "inside.example" else host, port, **more)

    def filled(text: str) -> str:
        return text.replace("PLAIN", str(servers.plain)).replace("SECURE", str(servers.secure))

    what = (filled(hole.allowed), [filled(text).encode("latin-1") for text in hole.sends], hole.gets.encode("latin-1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio, "getaddrinfo", inside)
        assert not await attempt(*what)
        hole.without(patch)
        if hole.twice:
            patch.setattr(sandbox_runner, "is_public", lambda _: True)
        assert await attempt(*what)


@pytest.mark.slow
@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole.does)
async def test_each_rule_holds_something_that_nothing_else_holds(servers: Servers, hole: Hole) -> None:
    async def attempt(allowed: str, sends: Sequence[bytes], gets: bytes) -> bool:
        async with proxied(allowed) as both, await anyio.connect_tcp("127.0.0.1", both.port) as stream:
            for data in sends:
                await stream.send(data)
            answer = b""
            with anyio.move_on_after(2), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while gets not in answer:
                    answer += await stream.receive()
            return gets in answer

    await require_rule(hole, servers, attempt)


# ── what is said ──


def test_a_model_is_told_which_hosts_there_are_and_what_was_refused() -> None:
    config = Config(docker=DockerConfig(network_allow=("example.com", "*.example.org")))
    assert "no network but HTTP and HTTPS to example.com, *.example.org." in instructions(config)
    error = ExceptionInfo("gaierror", "[Errno -3] Temporary failure in name resolution", 1, "")
    hint = hint_on(Result("error", exception=error), "", config) or ""
    assert hint.startswith("Code here has no network but HTTP and HTTPS to example.com, *.example.org")
    assert "trust_env=True" in hint
    error = ExceptionInfo(
        "URLError", "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", 1, ""
    )
    assert "package.ca_bundle" in (hint_on(Result("error", exception=error), "", config) or "")
    said = render(Result("ok", refused=("a.example was refused: docker.network_allow has example.com",)))
    assert "Note: a.example was refused: docker.network_allow has example.com." in str(said.content)


# ── on real engines ──


@pytest.fixture
def networked(config: Config, servers: Servers) -> Config:
    """Settings for a real engine, with two hosts to be reached, and the certificate authority of one."""
    docker = dataclasses.replace(config.docker, network_allow=servers.allowed)
    return dataclasses.replace(
        config, docker=docker, package=PackageConfig(preinstalled=(), ca_bundle=str(servers.bundle))
    )


FETCH = """
import csv, os, urllib.request
if not os.path.exists('table.csv'):
    urllib.request.urlretrieve('URL/a.csv', 'table.csv')
list(csv.DictReader(open('table.csv')))
"""


@pytest.mark.engine
@pytest.mark.in_turns
async def test_code_fetches_a_data_set_caches_it_and_reads_it(
    networked: Config, servers: Servers, session: str
) -> None:
    async with open_runner(networked) as runner:
        for url in (f"http://localhost:{servers.plain}", f"https://localhost:{servers.secure}"):
            for name in (session, None):
                result = await runner.execute(FETCH.replace("URL", url), session=name)
                assert (result.value, [file.path for file in result.files][:1]) in (
                    ("[{'x': '1', 'y': '2'}]", ["table.csv"]), ("[{'x': '1', 'y': '2'}]", [])
                ), result  # fmt: skip
        result = await runner.execute("urllib.request.urlopen('https://example.com')", session=session)
        assert result.exception is not None
        assert "403 example.com was refused: docker.network_allow has localhost:" in result.exception.message
        assert len(result.refused) == 1
        result = await runner.execute("import socket\nsocket.create_connection(('1.1.1.1', 80), 3)", session=session)
        assert result.exception is not None
        assert result.exception.type == "OSError"
        await runner.close_session(session)


INDEX = """
import re, sys, urllib.parse, urllib.request
for wheel in ('idna-3.10', 'certifi-2024.8.30', 'charset_normalizer-3.4.0', 'urllib3-2.2.3', 'requests-2.32.3'):
    page = f"https://pypi.org/simple/{wheel.partition('-')[0].replace('_', '-')}/"
    with urllib.request.urlopen(page) as answer:
        links = re.findall('href="([^"#]+)', answer.read().decode())
    link = next(link for link in links if link.endswith(f'/{wheel}-py3-none-any.whl'))
    sys.path.insert(0, urllib.request.urlretrieve(urllib.parse.urljoin(page, link), f'{wheel}.whl')[0])
import requests
answer = requests.get('https://pypi.org/simple/six/')
answer.status_code, 'six-1.16.0-py2.py3-none-any.whl' in answer.text, requests.__version__
"""


@pytest.mark.engine
@pytest.mark.in_turns
async def test_the_real_package_index_by_urllib_and_by_requests_that_comes_from_it(
    config: Config, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ("pypi.org", "files.pythonhosted.org")
    docker = dataclasses.replace(config.docker, network_allow=hosts)
    mirrored = any(not ipaddress.ip_address(socket.gethostbyname(host)).is_global for host in hosts)
    leads = {f"{host}:443": (host, 443) for host in hosts}
    with upstream(monkeypatch, leads) if mirrored else contextlib.nullcontext():  # as no rule lets them through itself
        async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
            result = await runner.execute(INDEX, session=session, timeout=120)
            assert result.value == "(200, True, '2.32.3')", result
            await runner.close_session(session)


ATTEMPT = """
import socket
sock, answer = socket.create_connection(('127.0.0.1', 3128)), b''
sock.settimeout(2)
for data in SENDS:
    sock.sendall(data)
try:
    while GETS not in answer and (data := sock.recv(65536)):
        answer += data
except OSError:
    pass
GETS in answer
"""


@pytest.mark.engine
async def test_code_in_a_sandbox_gets_through_no_hole(networked: Config, servers: Servers, session: str) -> None:
    async def attempt(allowed: str, sends: Sequence[bytes], gets: bytes) -> bool:
        docker = dataclasses.replace(networked.docker, network_allow=(allowed,))
        async with open_runner(dataclasses.replace(networked, docker=docker)) as runner:
            code = ATTEMPT.replace("SENDS", repr(sends)).replace("GETS", repr(gets))
            result = await runner.execute(code, session=session)
            assert result.status == "ok", result
            return result.value == "True"

    for hole in HOLES:
        await require_rule(hole, servers, attempt)
    async with open_runner(networked) as runner:
        await runner.close_session(session)


@pytest.mark.engine
async def test_an_interrupt_closes_connections_output_is_prompt_meanwhile_and_a_detached_session_has_none(
    networked: Config, servers: Servers, session: str
) -> None:
    slow = (
        "import socket, time\nsock = socket.create_connection(('127.0.0.1', 3128))\n"
        f"sock.sendall({get(f'http://localhost:{servers.plain}/big', f'localhost:{servers.plain}')!r})\n"
        "print('on', len(sock.recv(100)), flush=True)\nwhile True: time.sleep(0.05)"
    )
    rest = "n = 0\nwhile data := sock.recv(1 << 20): n += len(data)\nn"
    async with open_runner(networked) as runner:
        hears, stop = Hears(), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: runner.execute(slow, session=session, on_output=hears, interrupt=stop, timeout=60))
            await hears.first.wait()
            stop.set()
        result = await runner.execute(rest, session=session)
        assert int(result.value or BIG) < BIG, "the rest never came"
        code = "sock = socket.create_connection(('127.0.0.1', 3128)); sock.sendall(b'GET ')"
        assert (await runner.execute(code, session=session)).status == "ok"
    async with open_runner(networked) as runner:
        result = await runner.execute("sock.recv(100)", session=session)
        assert result.value == "b''", "the connection ended with its host"
        result = await runner.execute(FETCH.replace("URL", f"http://localhost:{servers.plain}"), session=session)
        assert result.value == "[{'x': '1', 'y': '2'}]", "and the next host makes new ones"
        await runner.close_session(session)


@pytest.mark.engine
async def test_a_session_goes_by_the_list_of_the_server_that_has_it(
    networked: Config, config: Config, servers: Servers, session: str
) -> None:
    fetch = FETCH.replace("URL", f"http://localhost:{servers.plain}").replace("table.csv", "other.csv")
    async with open_runner(networked) as runner:
        assert (await runner.execute("kept = 41", session=session)).status == "ok"
    async with open_runner(config) as runner:
        result = await runner.execute(fetch, session=session)
        assert result.refused == (f"localhost:{servers.plain} was refused: docker.network_allow has no hosts",)
        assert (await runner.execute("kept + 1", session=session)).value == "42"
        await runner.close_session(session)


@pytest.mark.engine
async def test_without_a_list_there_is_no_proxy(config: Config) -> None:
    async with open_runner(config) as runner:
        code = "import os, socket\nprint([n for n in os.environ if 'proxy' in n and os.environ[n]])\n"
        result = await runner.execute(f"{code}socket.create_connection(('127.0.0.1', 3128))")
        assert result.stdout == "[]\n"
        assert result.exception is not None
        assert result.exception.type == "ConnectionRefusedError"
