"""The server for a team: who gets in, what one user can see of another's, and what a restart costs.

Most tests use the fake engine; those marked `engine` try the same on real ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
import mcp_types
import pytest
import trustme
import yaml
from conftest import PATIENCE, ROOT, FakeEngine, text_of, wait_until
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from test_readme import blocks

import python_docker_mcp
from python_docker_mcp import Tokens, team_of
from sandbox_runner import Config, ConfigError, FilesConfig, HttpConfig, PoolConfig, SecretConfig, open_runner

ERAS = ("legacy", "auto")
TEAM = "A server for a team"  # the README's chapter
SECRET = {"api": SecretConfig("api.example.com", "Authorization: Bearer ${API_KEY}")}


class TeamServer:
    """A server over HTTP, in a process of its own, with a token for each of these users."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        users: tuple[str, ...] = ("alice", "bob"),
        door: socket.socket | None = None,
        options: tuple[str, ...] = (),
        without: str = "",
    ) -> None:
        self.without = without  # a piece of code that takes a defence away, or slows something down
        self.door = door
        self.options = options
        self.users = users
        config = dataclasses.replace(config, http=dataclasses.replace(config.http, tokens=str(folder / "tokens")))
        self.file = folder / "config.yaml"
        self.file.write_text(yaml.safe_dump(plain(dataclasses.asdict(config))), encoding="utf-8")
        self.log = folder / "log"
        self.tokens = {user: Tokens.new() for user in users}
        hashes = {hashlib.sha256(token.encode()).hexdigest(): user for user, token in self.tokens.items()}
        Tokens(config.http.tokens).write(hashes)
        self.start()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "python_docker_mcp", *arguments, "--config", str(self.file)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    def start(self) -> None:
        """Start it, and wait until it listens: on a new port or, as systemd does it, on a socket that stays open."""
        program = f"import python_docker_mcp as p\n{self.without}\np.main()"
        settings = ["--config", str(self.file), *self.options, "--http"]
        command = [sys.executable, "-c", program, "serve", *settings]
        if self.door:
            descriptor, port = self.door.fileno(), self.door.getsockname()[1]
            passing = (
                f"import os, sys; os.dup2({descriptor}, 3)\n"
                "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.executable, sys.argv[1:])"
            )
            command = [sys.executable, "-c", passing, *command, f"127.0.0.1:{port}"]
        else:
            command.append("127.0.0.1:0")
        passed = [self.door.fileno()] if self.door else []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, pass_fds=passed)
        wait_until(lambda: "serving http" in self.log.read_text() or self.process.poll() is not None)
        found = re.search(r"serving (https?://\S+)/mcp", self.log.read_text())
        assert found, self.log.read_text()
        self.address = found[1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def http(self, user: str | None, **headers: str) -> httpx2.AsyncClient:
        """A client of HTTP's, with the user's token."""
        known = {"Authorization": f"Bearer {self.tokens[user]}"} if user else {}
        return httpx2.AsyncClient(headers={**known, **headers}, timeout=PATIENCE)

    @asynccontextmanager
    async def client(self, user: str, era: str = "auto") -> AsyncIterator[Client]:
        """A client of MCP's, as this user."""
        async with self.http(user) as http:
            transport = streamable_http_client(f"{self.address}/mcp", http_client=http)
            async with Client(transport, mode=era) as client:
                yield client


def plain(value: Any) -> Any:
    """What YAML can hold of a configuration."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., TeamServer]]:
    """Starts servers, which end with the test."""
    servers: list[TeamServer] = []

    def start(config: Config, name: str = "server", **keywords: Any) -> TeamServer:
        folder = tmp_path / name
        folder.mkdir()
        servers.append(TeamServer(config, folder, **keywords))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture
def team(settings: Config, serve: Callable[..., TeamServer]) -> TeamServer:
    """A server with the fake engine."""
    return serve(settings)


async def run(client: Client, code: str, session: str | None = "study", **arguments: Any) -> mcp_types.CallToolResult:
    """A call, in a session unless there is none."""
    tool = "execute-persistent" if session else "execute-transient"
    given = {"session_id": session} if session else {}
    result = await client.call_tool(tool, {"code": code, **given, **arguments})
    assert isinstance(result, mcp_types.CallToolResult)
    return result


async def said(client: Client, code: str, session: str | None = "study", **arguments: Any) -> str:
    """What a model reads of a call."""
    return text_of(await run(client, code, session, **arguments))


# ── whose is what ──


class Things:
    """What one user has, and another one tries to get at."""

    def __init__(self, server: TeamServer, owner: Client, other: Client, told: str) -> None:
        self.server = server
        self.owner, self.other = owner, other
        self.output = found(r"session://study/output/\d+", told)
        self.address = found(rf"{server.address}/files/\S+/secret\.txt", told)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[0]


@asynccontextmanager
async def things(server: TeamServer, era: str = "auto") -> AsyncIterator[Things]:
    """Have the first user make things, and code run."""
    owner, other = server.users
    async with server.client(owner, era) as alice, server.client(other, era) as bob:
        told = await said(alice, "secret = 'of alice'\nopen('secret.txt', 'w').write(secret)\nprint('a' * 40_000)")
        async with anyio.create_task_group() as tasks:
            begun = anyio.Event()

            async def wait() -> None:
                async def on_progress(progress: float, total: float | None, message: str | None) -> None:  # noqa: ARG001
                    if message == "on":
                        begun.set()

                code = "import time\nslow = 'of alice'\nprint('on', flush=True)\ntime.sleep(3600)"
                arguments = {"code": code, "session_id": "slow", "timeout": 1000}
                await alice.call_tool("execute-persistent", arguments, progress_callback=on_progress)

            tasks.start_soon(wait)
            await begun.wait()
            yield Things(server, alice, bob, told)
            await alice.call_tool("cleanup-session", {"session_id": "slow"})
        assert "Value: 'of alice'" in await said(alice, "secret"), "it is as it was"


async def use_a_session(its: Things) -> None:
    for name in ("study", "slow"):
        assert "NameError" in await said(its.other, {"study": "secret"}.get(name, name), name)
    for name in ("study", "slow"):
        await its.other.call_tool("cleanup-session", {"session_id": name})


async def stop_code(its: Things) -> None:
    assert "nothing was running" in await said(its.other, "", "slow", interrupt=True)
    await its.other.call_tool("cleanup-session", {"session_id": "slow"})


async def end_a_session(its: Things) -> None:
    """The same words tell of somebody else's and of none."""
    for name in ("study", "studi"):
        end = await its.other.call_tool("cleanup-session", {"session_id": name})
        assert text_of(end).startswith(f"There is no session '{name}', so there is nothing to clean up")


async def name_it_as_the_engine_does(its: Things) -> None:
    for inner in (f"{its.server.users[0]}~study", f"{its.server.users[1]}~study", "~study"):
        assert "can't be a session_id" in await said(its.other, "1", inner)
        with pytest.raises(MCPError, match="There is no session"):
            await its.other.read_resource(f"session://{inner}/files/secret.txt")


async def list_sessions(its: Things) -> None:
    assert text_of(await its.other.call_tool("list-sessions", {})) == "There are no sessions."
    listed = text_of(await its.owner.call_tool("list-sessions", {}))
    assert ("- study: idle" in listed, "- slow: running" in listed) == (True, True), listed


async def list_resources(its: Things) -> None:
    assert [item.uri for item in (await its.other.list_resources()).resources] == []
    listed = {item.uri for item in (await its.owner.list_resources()).resources}
    assert {"session://study/files/secret.txt", its.output} <= listed


async def read_a_file(its: Things) -> None:
    with pytest.raises(MCPError, match="There is no session 'study'"):
        await its.other.read_resource("session://study/files/secret.txt")


async def read_an_output(its: Things) -> None:
    with pytest.raises(MCPError, match="is not kept any more"):
        await its.other.read_resource(its.output)


async def change_an_address(its: Things) -> None:
    """Whoever has an address may get that file, and nothing else."""
    owner, other = its.server.users
    async with its.server.http(other) as http:
        assert (await http.get(its.address)).text == "of alice"
        for old, new in ((f"/{owner}/", f"/{other}/"), ("/study/", "/slow/"), ("secret.txt", "other.txt")):
            assert (await http.get(its.address.replace(old, new))).status_code == 403
        assert (await http.get(re.sub(r"/\d{10}/", "/9999999999/", its.address))).status_code == 403
        assert (await http.put(its.address, content=b"x")).status_code == 403


async def fill_the_quota(its: Things) -> None:
    """What one has does not count for another, and errors name one's own only."""
    for number in range(4):
        assert "Value: 1" in await said(its.other, "1", f"mine-{number}")
    full = await said(its.other, "1", "one-too-many")
    assert re.search(
        r"^There are 4 sessions already, .*sessions_per_user\): mine-0, mine-1, mine-2, mine-3\. End", full
    )
    assert "Value: 1" in await said(its.owner, "1", "another")
    for name in (f"mine-{number}" for number in range(4)):
        await its.other.call_tool("cleanup-session", {"session_id": name})
    await its.owner.call_tool("cleanup-session", {"session_id": "another"})


async def install_into_a_session(its: Things) -> None:
    told = await its.other.call_tool("install-package", {"package_name": "no-such-package-here", "session_id": "slow"})
    assert "still running" not in text_of(told)
    await its.other.call_tool("cleanup-session", {"session_id": "slow"})


async def hear_of_a_call(its: Things) -> None:
    """Progress and output go to who made the call, and neither code nor output to the log."""
    heard: dict[str, list[str]] = {"loud": [], "quiet": []}

    async def call(client: Client, session: str, code: str) -> None:
        async def on_progress(progress: float, total: float | None, message: str | None) -> None:  # noqa: ARG001
            heard[session].append(message or "")

        arguments = {"code": code, "session_id": session}
        await client.call_tool("execute-persistent", arguments, progress_callback=on_progress)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, its.owner, "loud", "import time; print('of alice', flush=True); time.sleep(1)")
        tasks.start_soon(call, its.other, "quiet", "import time; print('of bob', flush=True); time.sleep(1)")
    assert ("of alice" in heard["loud"], "of bob" in heard["quiet"]) == (True, True), heard
    assert ("of bob" in heard["loud"], "of alice" in heard["quiet"]) == (False, False), heard
    log = its.server.log.read_text()
    assert f"{its.server.users[0]}: execute-persistent, session loud" in log
    assert "of alice" not in log
    await its.owner.call_tool("cleanup-session", {"session_id": "loud"})
    await its.other.call_tool("cleanup-session", {"session_id": "quiet"})


async def install_for_everybody(its: Things) -> None:
    refused = await its.other.call_tool("install-package", {"package_name": "six"})
    assert "packages are installed for a session" in text_of(refused)


TOGETHER = "member = p.Team.member\np.Team.member = lambda team, _: member(team, 'everybody')"
UNSIGNED = "p.Team.proof = lambda *_: 'x' * 40"
FOR_ALL = "p.Service.installs_for_all = property(lambda _: True, lambda *_: None)"
ATTACKS = (  # and the program with which it succeeds, as the wall against it is taken away there
    (use_a_session, TOGETHER),
    (stop_code, TOGETHER),
    (end_a_session, TOGETHER),
    (list_resources, TOGETHER),
    (list_sessions, TOGETHER),
    (read_a_file, TOGETHER),
    (read_an_output, TOGETHER),
    (install_into_a_session, TOGETHER),
    (fill_the_quota, TOGETHER),
    (change_an_address, UNSIGNED),
    (install_for_everybody, FOR_ALL),
)


async def try_all(server: TeamServer, era: str = "auto") -> None:
    async with things(server, era) as its:
        for attack, _ in ATTACKS:
            await attack(its)
        await name_it_as_the_engine_does(its)
        await hear_of_a_call(its)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_nothing_of_one_user_is_seen_changed_or_counted_by_another(team: TeamServer, era: str) -> None:
    await try_all(team, era)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize(("attack", "without"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
async def test_each_wall_between_users_is_what_keeps_them_apart(
    settings: Config, serve: Callable[..., TeamServer], attack: Callable[[Things], Awaitable[None]], without: str
) -> None:
    soon = dataclasses.replace(settings.session, answer_within=2.0)  # for a call that waits for another one's code
    server = serve(dataclasses.replace(settings, session=soon), without=without)
    succeeded: list[BaseException] = []
    with contextlib.suppress(BaseExceptionGroup, AssertionError):  # where the attack has done harm
        async with things(server) as its:
            try:
                await attack(its)
            except (AssertionError, pytest.fail.Exception) as error:
                succeeded.append(error)
    assert succeeded


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_users_are_kept_apart_on_real_engines(
    config: Config, serve: Callable[..., TeamServer], session: str
) -> None:
    server = serve(config, users=(f"alice-{session}", f"bob-{session}"))
    await try_all(server)
    sessions = [line.split()[0] for line in server.command("ps").stdout.splitlines() if session in line]
    assert {name.partition("~")[0] for name in sessions} == {server.users[0]}
    server.stop()
    assert server.command("rm", *sessions).returncode == 0


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_full_server_says_nothing_of_other_users(settings: Config, serve: Callable[..., TeamServer]) -> None:
    server = serve(dataclasses.replace(settings, session=dataclasses.replace(settings.session, max=2)))
    async with server.client("alice") as alice, server.client("bob") as bob:
        await said(alice, "1", "a")
        assert "Value: 1" in await said(bob, "1", "b")
        full = await said(bob, "1", "c")
        assert full == (
            "The server has all sessions that it may (session.max): end one of yours (b), or try again later."
        )
        await alice.call_tool("cleanup-session", {"session_id": "a"})
        assert "Value: 1" in await said(bob, "1", "c")


# ── who gets in ──

CALL = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
HEADERS = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}


async def post(server: TeamServer, user: str | None, where: str = "", body: Any = None, **headers: str) -> Any:
    async with server.http(user) as http:
        content = {"content": body} if isinstance(body, bytes) else {"json": body or CALL}
        known = {
            **HEADERS,
            "Content-Type": "application/json",
            **{key.replace("_", "-"): one for key, one in headers.items()},
        }
        return await http.post(f"{server.address}/mcp{where}", headers=known, **content)


@pytest.mark.slow
@pytest.mark.anyio
async def test_bad_requests_have_an_answer_each(team: TeamServer) -> None:
    good = await post(team, "alice")
    assert (good.status_code, "execute-transient" in good.text) == (200, True)
    token = team.tokens["alice"]
    assert (await post(team, None)).status_code == 401
    assert (await post(team, None, Authorization="Bearer pdmcp_x")).status_code == 401
    assert (await post(team, None, Authorization=token)).status_code == 401
    for where in (f"?token={token}", f"?access_token={token}", f"?x={token}"):
        refused = await post(team, None, where)
        assert (refused.status_code, "ends up in logs" in refused.text) == (400, True)
    refused = await post(team, "alice", Host="mcp.evil.example:8443")
    assert (refused.status_code, "by the name 'mcp.evil.example:8443'" in refused.text) == (421, True)
    assert (await post(team, "alice", "/")).status_code == 200
    assert "the endpoint is /mcp" in (await post(team, "alice", "/../")).text
    async with team.http("alice") as http:
        assert (await http.get(f"{team.address}/mcp", headers=HEADERS)).status_code == 405
    assert (await post(team, "alice", Origin="https://evil.example")).status_code == 403
    assert (await post(team, "alice", Origin=team.address)).status_code == 200
    assert (await post(team, "alice", body=b" " * (8 << 20))).status_code != 413
    assert (await post(team, "alice", body=b" " * ((8 << 20) + 1))).status_code == 413
    assert "Traceback" not in team.log.read_text()
    with anyio.fail_after(PATIENCE):
        host, port = urllib.parse.urlsplit(team.address).netloc.split(":")
        async with await anyio.connect_tcp(host, int(port)) as stream:
            twice = f"Authorization: Bearer {token}\r\nAuthorization: Bearer {team.tokens['bob']}\r\n"
            await stream.send(f"GET /mcp HTTP/1.1\r\nHost: {host}\r\n{twice}\r\n".encode())
            assert b"400 Bad Request" in await stream.receive()


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_state_of_four_megabytes_passes(team: TeamServer) -> None:
    async with team.client("alice") as client:
        result = await run(client, "len(x)", None, state={"x": "y" * ((4 << 20) - 100)})
        assert "Value: 4194204" in text_of(result)


@pytest.mark.slow
@pytest.mark.anyio
async def test_removing_a_user_is_revoking_the_token_and_a_call_under_way_ends(team: TeamServer) -> None:
    async with team.client("alice") as client, anyio.create_task_group() as tasks:
        await client.list_tools()  # else the client would do that after the call
        ends: list[str] = []

        async def call() -> None:
            ends.append(await said(client, "import time; time.sleep(1); 6 * 7"))

        tasks.start_soon(call)
        await anyio.sleep(0.3)
        assert team.command("token", "remove", "alice").returncode == 0
        assert (await post(team, "alice")).status_code == 401
        assert (await post(team, "bob")).status_code == 200
    assert "Value: 42" in ends[0]
    team.tokens["alice"] = team.command("token", "add", "alice").stdout.strip()
    assert (await post(team, "alice")).status_code == 200


@pytest.mark.slow
@pytest.mark.anyio
async def test_files_and_folders_that_break_while_it_runs_cost_an_answer_only(
    settings: Config, serve: Callable[..., TeamServer], tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("in the way")
    server = serve(dataclasses.replace(settings, files=FilesConfig(output=str(tmp_path / "out" / "{user}"))))
    async with server.client("alice") as client:
        assert "The folders of alice (files.inputs, files.output) can't be made" in await said(client, "1")
        (tmp_path / "out").unlink()
        assert "Value: 1" in await said(client, "1")
        tokens = server.file.parent / "tokens"
        tokens.write_text("half a li")
        assert (await post(server, "alice")).status_code == 401
    assert "has a line that is not NAME and SHA-256" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("host", "http", "others", "problem"),
    [
        ("0.0.0.0", HttpConfig(), {}, "can be reached from other machines, and there is no token"),
        ("0.0.0.0", HttpConfig(), {"users": True}, "say by which name"),
        ("127.0.0.1", HttpConfig(), {"users": True, "files": FilesConfig(output="/srv/out")}, "would be everybody's"),
        ("127.0.0.1", HttpConfig(), {"users": True, "pool": PoolConfig(reuse=True)}, "pool.reuse"),
        ("10.1.2.3", HttpConfig(public_url="https://x.example"), {"with_tokens": False}, "there is no token"),
        ("127.0.0.1", HttpConfig(public_url="https://x.example"), {"with_tokens": False}, "so it needs tokens"),
        ("127.0.0.1", HttpConfig(), {"users": True, "secrets": SECRET}, "secrets.api: say whose it is"),
        ("127.0.0.1", HttpConfig(), {"secrets": SECRET}, "secrets: over HTTP they belong to users who have a token"),
        ("127.0.0.1", HttpConfig(), {"secrets": SECRET, "with_tokens": False}, "secrets: over HTTP they belong to"),
    ],
)  # fmt: skip
async def test_a_server_that_would_let_in_others_does_not_start(
    settings: Config, tmp_path: Path, host: str, http: HttpConfig, others: dict[str, Any], problem: str
) -> None:
    http = dataclasses.replace(http, tokens=str(tmp_path / "tokens"))
    if others.pop("users", False):
        Tokens(http.tokens).write({"0" * 64: "alice"})
    with_tokens = others.pop("with_tokens", True)
    async with open_runner(dataclasses.replace(settings, http=http, **others)) as runner:
        with pytest.raises(ConfigError, match=re.escape(problem)):
            team_of(runner, host, 8700, with_tokens)


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_users_are_told_of_their_own_secrets(
    settings: Config, serve: Callable[..., TeamServer], monkeypatch: pytest.MonkeyPatch, era: str
) -> None:
    monkeypatch.setenv("API_KEY", "a-secret-value")
    secrets = {"api": dataclasses.replace(SECRET["api"], users=("alice",))}
    server = serve(dataclasses.replace(settings, secrets=secrets))
    for user, knows in (("alice", True), ("bob", False)):
        async with server.client(user, era) as client:
            described = str([tool.description for tool in (await client.list_tools()).tools])
            assert ("api.example.com with a credential that is added outside" in described) is knows
            assert "api.example.com" not in str(client.instructions)
    assert "a-secret-value" not in server.log.read_text()


def test_the_commands_for_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"http: {{tokens: {tmp_path}/there/tokens}}", encoding="utf-8")

    def command(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as end:
            python_docker_mcp.main(["token", *arguments, "--config", str(file)])
        told = capsys.readouterr()
        return end.value.code, told.out, told.err

    status, token, _ = command("add", "alice")
    assert (status, bool(re.fullmatch(r"pdmcp_[\w-]{43}\n", token))) == (0, True)
    tokens = Tokens(str(tmp_path / "there" / "tokens"))
    assert tokens.file.stat().st_mode & 0o777 == 0o600
    assert token.strip() not in tokens.file.read_text()
    assert (tokens.user(token.strip()), tokens.user(token.strip() + "x"), tokens.user("")) == ("alice", None, None)
    assert command("add", "alice")[::2] == (1, "python-docker-mcp: alice has a token already: remove that first\n")
    assert command("add", "bob.b@example.com")[0] == 0
    assert command("list")[:2] == (0, "alice\nbob.b@example.com\n")
    for name in ("Alice", "a~b", "../a", ""):
        assert command("add", *([name] if name else []))[0] == 2
    assert command("remove", "carol")[0] == 1
    assert command("remove", "alice")[:2] == (0, "")
    assert tokens.user(token.strip()) is None
    tokens.file.write_text("alice\n", encoding="utf-8")
    status, _, problem = command("list")
    assert (status, "has a line that is not NAME and SHA-256" in problem) == (2, True)
    tokens.file.chmod(0o666)
    assert "can be written by others" in command("list")[2]


@pytest.mark.slow
@pytest.mark.anyio
async def test_without_tokens_one_is_made_up_for_this_host(settings: Config, serve: Callable[..., TeamServer]) -> None:
    server = serve(settings, users=())
    token = re.search(r"made up for this run: (\S+)", server.log.read_text())
    assert token
    server.tokens["me"] = token[1]
    assert (await post(server, None)).status_code == 401
    async with server.client("me") as client:
        assert "Value: 42" in await said(client, "6 * 7")


# ── files of users far away ──


@pytest.mark.slow
@pytest.mark.anyio
async def test_files_go_up_and_down_by_signed_addresses(settings: Config, serve: Callable[..., TeamServer]) -> None:
    server = serve(dataclasses.replace(settings, files=FilesConfig(limit="4m")))
    data = os.urandom(3 << 20)
    async with server.client("alice") as client, server.http(None) as http:
        place = re.search(r"curl -T FILE '(\S+)'", await said(client, "1"))
        assert place
        assert (await http.put(f"{place[1]}sales%20%C3%BC.csv", content=data)).status_code == 201
        text = await said(
            client, "data = open('sales ü.csv', 'rb').read()\nopen('back.bin', 'wb').write(data[::-1])\nlen(data)"
        )
        assert f"Value: {3 << 20}" in text
        assert "sales" not in text, "what was sent is not what the code wrote"
        back = re.search(r"http://\S+/back\.bin", text)
        assert back
        answer = await http.get(back[0])
        assert answer.content == data[::-1]
        assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''back.bin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        for name, status in (("", 400), (".hidden", 400), ("a/b", 400), ("%2e%2e", 400), ("big", 413)):
            content = bytes((4 << 20) + 1) if name == "big" else b"x"
            assert (await http.put(place[1] + name, content=content)).status_code == status, name
        for old, new in ((r"bin$", "bi"), ("/study/", "/studi/"), (r"/\d{10}/", "/9999999999/")):
            changed = re.sub(old, new, back[0])
            assert (await http.get(changed)).status_code == 403
        assert f"curl -T FILE '{server.address}" in await said(client, "open('missing.csv')")
        await client.call_tool("cleanup-session", {"session_id": "study"})
        gone = await http.get(back[0])
        assert (gone.status_code, "There is no session 'study'" in gone.text) == (404, True)
        assert (await http.put(place[1] + "x", content=b"x")).status_code == 409
        assert server.command("token", "remove", "alice").returncode == 0
        assert (await http.get(back[0])).status_code == 410


@pytest.mark.slow
@pytest.mark.anyio
async def test_files_are_saved_in_a_folder_for_each_user(
    settings: Config, serve: Callable[..., TeamServer], tmp_path: Path
) -> None:
    files = FilesConfig(output=str(tmp_path / "out" / "{user}"), inputs=(str(tmp_path / "in" / "{user}"),))
    server = serve(dataclasses.replace(settings, files=files))
    for user in ("alice", "bob"):
        async with server.client(user) as client:
            await said(client, "open('a.txt', 'w').write('x')")
            (tmp_path / "in" / user / "own.txt").write_text(user)
            assert f"Value: '{user}'" in await said(client, "open('own.txt').read()", files=["own.txt"])
            other = {"alice": "bob", "bob": "alice"}[user]
            (tmp_path / "in" / other).mkdir(exist_ok=True)
            (tmp_path / "in" / other / f"of-{other}.txt").write_text("x")
            for folder in ("", f"../{other}/", str(tmp_path / "in" / other) + "/"):
                asked = f"{folder}of-{other}.txt"
                assert "Value" not in await said(client, "1", files=[asked])
    saved = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.txt"))
    assert saved == ["alice/study/a.txt", "bob/study/a.txt"]


# ── turns, health and restarts ──


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_user_with_many_queued_calls_does_not_keep_another_waiting(
    settings: Config, serve: Callable[..., TeamServer]
) -> None:
    server = serve(dataclasses.replace(settings, http=HttpConfig(calls_per_user=2)))
    async with server.client("alice") as alice, server.client("bob") as bob, anyio.create_task_group() as tasks:
        ended: list[str] = []

        async def call(client: Client, who: str) -> None:
            result = await run(client, "import time; time.sleep(0.2)", None)
            ended.append(who if not result.is_error else text_of(result))

        for _ in range(20):
            tasks.start_soon(call, alice, "alice")
        await anyio.sleep(0.3)
        await call(bob, "bob")
        assert ended.count("alice") < 18
    assert (ended.count("alice"), ended.count("bob")) == (20, 1)


async def check_restart(server: TeamServer) -> None:
    """End a server while it has calls under way, and go on with the next one."""
    ends: dict[str, str] = {}
    async with server.client(server.users[0]) as alice, anyio.create_task_group() as tasks:

        async def call(name: str, code: str, session: str | None = "study") -> None:
            ends[name] = await said(alice, code, session)

        await said(alice, "x = 41")
        tasks.start_soon(call, "in a session", "import time; time.sleep(4)\nx += 1\nx")
        tasks.start_soon(call, "on its own", "import time; time.sleep(2)\n'done'", None)
        await anyio.sleep(1)
        server.process.send_signal(signal.SIGTERM)
    assert "Still running" in ends["in a session"]
    assert "Value: 'done'" in ends["on its own"]
    assert await anyio.to_thread.run_sync(server.process.wait, PATIENCE) == 0
    server.start()
    async with server.client(server.users[0]) as alice:
        assert "Value: 42" in await said(alice, "")
        assert "Value: 42" in await said(alice, "x")
        await alice.call_tool("cleanup-session", {"session_id": "study"})
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_restart_loses_nothing(team: TeamServer) -> None:
    await check_restart(team)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_restart_loses_nothing_on_real_engines(
    config: Config, serve: Callable[..., TeamServer], session: str
) -> None:
    await check_restart(serve(config, users=(f"alice-{session}",)))


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize(("era", "end"), [("legacy", "Value: 42"), ("auto", "KeyboardInterrupt")])
async def test_a_lost_connection_cancels_only_where_the_protocol_says_so(team: TeamServer, era: str, end: str) -> None:
    slow = "import time\ntry:\n    time.sleep(2)\n    how = 42\n"
    slow += "except BaseException as end:\n    how = str(type(end))\nhow"
    with anyio.move_on_after(PATIENCE) as soon:
        async with team.client("alice", era) as client:
            await said(client, "1")
            soon.deadline = anyio.current_time() + 0.7
            await said(client, slow)
    await anyio.sleep(2)
    async with team.client("alice", era) as client:
        text = await said(client, "how")
        assert end.partition(": ")[2] in text or end in text, text
        assert ("whose connection was lost" in text) == (era == "legacy"), text
        assert "whose connection was lost" not in await said(client, "how")


@pytest.mark.slow
@pytest.mark.anyio
async def test_health_tells_what_is_known(team: TeamServer) -> None:
    async with team.http(None) as http:
        assert (await http.get(f"{team.address}/health")).status_code == 200
        async with team.client("alice") as alice, anyio.create_task_group() as tasks:
            tasks.start_soon(functools.partial(said, alice, "import time; time.sleep(1.5)", None))
            await anyio.sleep(0.5)
            team.process.send_signal(signal.SIGTERM)
            await anyio.sleep(0.3)
            answer = await http.get(f"{team.address}/health")
            assert (answer.status_code, answer.text) == (503, "stopping\n")


# ── several machines, behind the proxies that the README sets up ──


@dataclasses.dataclass
class Proxy:
    """nginx or HAProxy, with the README's settings, in front of two servers."""

    program: str
    folder: Path
    nodes: tuple[str, str]  # HOST:PORT
    port: int

    def settings(self, authority: trustme.CA) -> list[str]:
        """Write the settings; return the command that runs the proxy."""
        pem = self.folder / "python.example.com.pem"
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
        text = blocks(self.program, TEAM)[0]
        for old, new in (
            ("10.0.0.11:8700", self.nodes[0]),
            ("10.0.0.12:8700", self.nodes[1]),
            ("listen 443", f"listen 127.0.0.1:{self.port}"),
            ("bind :443", f"bind 127.0.0.1:{self.port}"),
            ("/etc/ssl/python.example.com.key", str(pem)),
            ("/etc/ssl/python.example.com.pem", str(pem)),
        ):
            text = text.replace(old, new)
        file = self.folder / f"{self.program}.conf"
        if self.program == "haproxy":
            file.write_text(text, encoding="utf-8")
            return ["haproxy", "-db", "-f", str(file)]
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        own = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in kinds)
        main = f"daemon off; pid {self.folder}/pid; error_log stderr;\nevents {{}}\n"
        file.write_text(f"{main}http {{ access_log off;\n{own}{text}}}\n", encoding="utf-8")
        return ["nginx", "-p", str(self.folder), "-c", str(file)]

    @contextlib.contextmanager
    def running(self, authority: trustme.CA) -> Iterator[None]:
        process = subprocess.Popen(self.settings(authority))
        try:
            wait_until(lambda: listens(self.port))
            yield
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return int(door.getsockname()[1])


@pytest.fixture
def doors() -> Iterator[list[socket.socket]]:
    """Listening sockets that stay open while servers are restarted."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64)) for _ in range(2)]


@pytest.mark.engine
@pytest.mark.anyio
async def test_two_machines_behind_a_proxy_and_one_is_restarted_under_load(
    config: Config,
    settings: Config,
    docker: FakeEngine,
    serve: Callable[..., TeamServer],
    tmp_path: Path,
    session: str,
    doors: list[socket.socket],
) -> None:
    """One has a real engine, the other the fake one. Each user stays on one of them, and no call in a session fails.

    The proxies take turns with the engines, as neither knows of the other.
    """
    program = "haproxy" if "podman" in str(config.docker.command) else "nginx"
    port = free_port()
    authority = trustme.CA()
    users = tuple(f"user{number}-{session}" for number in range(12))
    nodes = []
    known = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != os.path.dirname(docker.command)]
    real = dataclasses.replace(
        config,
        docker=dataclasses.replace(
            config.docker, command=shutil.which(config.docker.command or "", path=os.pathsep.join(known))
        ),
    )
    for letter, its, door in zip("ab", (real, settings), doors, strict=True):
        http = HttpConfig(public_url=f"https://127.0.0.1:{port}/{letter}")
        nodes.append(serve(dataclasses.replace(its, http=http), letter, users=users, door=door))
    for node in nodes[1:]:
        node.tokens = nodes[0].tokens
        shutil.copy(nodes[0].file.parent / "tokens", node.file.parent / "tokens")
    places = [f"127.0.0.1:{door.getsockname()[1]}" for door in doors]
    proxy = Proxy(program, tmp_path, (places[0], places[1]), port)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    front = nodes[0]
    done: dict[str, int] = dict.fromkeys(users, 0)
    stop = anyio.Event()
    with proxy.running(authority):

        @asynccontextmanager
        async def client(user: str) -> AsyncIterator[Client]:
            headers = {"Authorization": f"Bearer {front.tokens[user]}"}
            async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE, verify=trust) as http:
                transport = streamable_http_client(f"https://127.0.0.1:{port}/mcp", http_client=http)
                async with Client(transport) as one:
                    yield one

        async def work(user: str) -> None:
            """Count, each time as a new client; an answer that the code still runs is followed by the wait for it."""
            while not stop.is_set():
                async with client(user) as one:
                    text = await said(one, "import time; n = globals().get('n', 0) + 1; time.sleep(0.2); n")
                    while "Still running" in text:
                        text = await said(one, "")
                done[user] += 1
                assert f"Value: {done[user]}" in text, text

        async with anyio.create_task_group() as tasks:
            for user in users:
                tasks.start_soon(work, user)
            with anyio.fail_after(PATIENCE):
                while min(done.values()) < 2:
                    await anyio.sleep(0.05)
            for node in nodes:
                await anyio.to_thread.run_sync(node.stop)  # in a thread: clients go on meanwhile
                await anyio.to_thread.run_sync(node.start)
                before = dict(done)
                with anyio.fail_after(PATIENCE):
                    while any(done[user] < before[user] + 2 for user in users):
                        await anyio.sleep(0.05)
            stop.set()

        listings = [node.command("ps").stdout for node in nodes]
        assert all(session in listing for listing in listings), "each has some of them"
        user = next(user for user in users if f"{user}~" in listings[0])
        async with client(user) as one, httpx2.AsyncClient(verify=trust) as web:
            text = await said(one, "open('a.txt', 'w').write('x' * 1000)")
            place = re.search(rf"https://127.0.0.1:{port}/a/files/{user}/\S+/a.txt", text)
            assert place, text
            assert (await web.get(place[0])).text == "x" * 1000
        for user in users:
            async with client(user) as one:
                assert "has ended" in text_of(await one.call_tool("cleanup-session", {"session_id": "study"}))


# Accepting a connection takes asyncio two steps, here with a pause between them.
SLOW_TO_ACCEPT = """
import asyncio
real = asyncio.SelectorEventLoop._accept_connection2
async def late(*given, **more):
    await asyncio.sleep(0.05)
    await real(*given, **more)
asyncio.SelectorEventLoop._accept_connection2 = late
"""


@pytest.mark.slow
def test_no_connection_is_reset_when_a_server_with_a_socket_of_systemds_is_restarted(
    settings: Config, serve: Callable[..., TeamServer], doors: list[socket.socket]
) -> None:
    server = serve(settings, door=doors[0], without=SLOW_TO_ACCEPT)
    place = doors[0].getsockname()
    all_ask = threading.Barrier(9)
    is_over = threading.Event()

    def ask() -> int:
        """Ask again and again how the server is, each time by a new connection."""
        all_ask.wait(PATIENCE)
        count = 0
        while not is_over.is_set():
            with socket.create_connection(place, timeout=PATIENCE) as one:
                one.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                assert one.recv(100).startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")), "an answer"
                count += 1
        return count

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask) for _ in range(8)]
        try:
            all_ask.wait(PATIENCE)
            time.sleep(0.2)  # so that they are in the midst of it
            server.stop()
            server.start()
        finally:
            is_over.set()
        assert all(one.result() for one in asked)


def listens(port: int) -> bool:
    """Whether something accepts connections on this port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_the_readme_tells_clients_and_systemd_what_the_server_takes() -> None:
    told = [json.loads(text) for text in blocks("json", TEAM)]
    vscode, cursor, remote = (next(iter((one.get("servers") or one.get("mcpServers")).values())) for one in told)
    for client in (vscode, cursor):
        assert client["url"].endswith(python_docker_mcp.PATH)
        assert client["headers"]["Authorization"].startswith("Bearer ")
    assert remote["args"][:2] == ["-y", "mcp-remote"]
    assert remote["args"][-1].replace("${AUTH}", remote["env"]["AUTH"]).startswith("Authorization:Bearer ")
    commands = [line.partition(" #")[0] for text in blocks("sh", TEAM) for line in text.splitlines()]
    started = re.findall(r"(?m)^ExecStart=/\S+/(.*)", "\n".join(blocks("ini", TEAM)))
    for command in [command for command in commands if command.startswith("python-docker-mcp")] + started:
        options = python_docker_mcp._parser().parse_args(command.split()[1:])
        assert options.command in (python_docker_mcp._serve_http, python_docker_mcp._token)
    assert "--transport http" in commands[-1]
    assert '--header "Authorization: Bearer ' in commands[-1]


NPM_CACHE = str(Path.home() / ".npm")  # of the real home, not of a test's
CONFORMANCE = "@modelcontextprotocol/conformance@0.2.0-alpha.12"


@pytest.mark.engine  # as npx is there where engines are
@pytest.mark.parametrize("revision", ["2026-07-28", "2025-11-25"])
def test_the_official_conformance_suite_finds_only_what_is_not_offered(
    settings: Config, serve: Callable[..., TeamServer], tmp_path: Path, revision: str
) -> None:
    server = serve(settings, users=(), options=("--no-token",))
    known = yaml.safe_load((ROOT / "tests" / "data" / "conformance.yaml").read_text(encoding="utf-8"))
    expected = tmp_path / "expected.yaml"
    expected.write_text(yaml.safe_dump({"server": known["both"] + known.get(revision, [])}), encoding="utf-8")
    suite = ["npx", "-y", "-p", "node@22", "-p", CONFORMANCE, "conformance", "server", "--requirements", revision]
    run = subprocess.run(
        [*suite, "--url", f"{server.address}/mcp", "--expected-failures", str(expected)],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
        env={**os.environ, "npm_config_cache": NPM_CACHE},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.anyio
async def test_thousands_of_half_open_requests_are_refused_and_cost_nothing_afterwards(team: TeamServer) -> None:
    port = urllib.parse.urlsplit(team.address).port
    python_docker_mcp.allow_open_files()
    with contextlib.ExitStack() as stack:
        for _ in range(python_docker_mcp.CONNECTIONS + 100):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            half.sendall(b"POST /mcp HTTP/1.1\r\nHost: ")
        assert (await post(team, "alice")).status_code == 503
    with anyio.fail_after(PATIENCE):
        while (await post(team, "alice")).status_code == 503:
            await anyio.sleep(0.1)  # until it has seen that they are closed
    async with team.client("alice") as client:
        assert "Value: 42" in await said(client, "6 * 7")
    assert "Traceback" not in team.log.read_text()
