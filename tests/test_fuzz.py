"""Whatever comes in: frames in both directions, arguments of tools, ids, package names, and engines that misbehave.

Made by hypothesis; `tools/fuzz_frames.py`, whose functions these tests use, finds more by itself if it gets the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import anyio
import anyio.abc
import mcp_types as types
import pytest
from conftest import GREETING, PATIENCE, FakeEngine
from fuzz_frames import CALL, FRAMES, REPORT, VALUES, as_host, as_supervisor, finish, lines_from, tamed, wire
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mcp import Client
from mcp.shared.exceptions import MCPError
from odd_code import PRELUDE, collect

import sandbox_runner
from python_docker_mcp import TOOLS, Tool, make_server, parse, parse_address, render
from sandbox_runner import (
    LINE_LIMIT,
    Call,
    Channel,
    Config,
    DockerConfig,
    Engine,
    EngineError,
    Image,
    Network,
    PackageConfig,
    PoolConfig,
    ProtocolError,
    Request,
    RequestError,
    Result,
    Sandbox,
    SessionConfig,
    find_engine,
    open_runner,
    parse_object,
    parse_requirement,
    session_container,
)

pytestmark = pytest.mark.anyio


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
any_text = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates, too
some_value = st.sampled_from(VALUES) | any_json
fields = sorted({name for frame in FRAMES for name in frame})


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Lines that are frames, or nearly."""
    lines = b""
    for _ in range(draw(st.integers(1, 6))):
        wrong = st.dictionaries(st.sampled_from(fields), some_value, max_size=3)
        lines += wire({**draw(st.sampled_from(FRAMES)), **draw(wrong)})
    return lines


lines = st.binary(max_size=200) | frames() | st.binary(max_size=60).map(lines_from)


# ── from the sandbox to the host ──


def test_what_is_right_is_believed() -> None:
    """Otherwise the tests below would test nothing."""
    result = as_host(b"".join(wire(frame) for frame in FRAMES))
    assert result is not None
    assert (result.status, result.value, result.stdout) == ("ok", "1", "a")
    assert ([file.path for file in result.files], result.files_left_out) == (["a"], {"b": "why"})
    assert [frame["kind"] for frame in as_supervisor(wire(REPORT), True)] == ["done"]


@settings(max_examples=60)
@given(lines)
def test_what_a_sandbox_sends_is_a_result_that_can_be_shown_or_a_breach_of_the_protocol(data: bytes) -> None:
    as_host(data)


JSON_LIKE = st.text('[]{}",:\\0a \n', max_size=80) | any_json.map(json.dumps)


@given(JSON_LIKE)
def test_data_within_frames_is_a_json_object_or_refused(text: str) -> None:
    try:
        value = parse_object(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return
    json.dumps(value, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    ["[" * 1_000_000, '{"":' * 300 + "1" + "}" * 300, "1" * 1_000_000, '{"x": NaN}', '{"x": "\\ud800"}', "[]", "\xff"],
    ids=["deep", "nested", "long number", "not a number", "surrogate", "array", "no JSON"],
)
def test_data_that_is_meant_to_harm_its_reader_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_object(text.encode("latin-1"))


@pytest.mark.parametrize(
    "frame",
    [
        {"kind": "display", "data": b"{}", "is_value": False},
        {"kind": "omitted", "bytes": 1},
        {"kind": "state", "data": b"{}", "left_out": {}},
    ],
    ids=lambda frame: f"{frame['kind']}{len(frame.get('data', b''))}",
)
def test_frames_that_cost_nothing_to_send_can_not_fill_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch, frame: dict[str, Any]
) -> None:
    monkeypatch.setattr(sandbox_runner, "PIECES_LIMIT", 1000)
    monkeypatch.setattr(sandbox_runner, "CALL_LIMIT", 1_000_000)
    call = Call(Request("", output_limit=1000))

    def flood() -> None:
        for number in range(3000):
            part: Any = {**frame, "path": str(number)}
            finish(call.take(part))

    with pytest.raises(ProtocolError) if "data" in frame else contextlib.nullcontext():
        flood()
    assert len(call.output.pieces()) <= 1001


def test_output_that_comes_in_the_smallest_pieces_is_kept_in_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_runner, "PIECES_LIMIT", 100)
    call = Call(Request("", output_limit=1 << 20))
    for _ in range(20_000):
        finish(call.take({"id": CALL, "kind": "stdout", "data": b"x"}))
    assert call.tell().stdout == "x" * 20_000
    call = Call(Request("", output_limit=1 << 20))
    streams: list[sandbox_runner.Stdio] = ["stdout", "stderr"]
    for number in range(1000):
        finish(call.take({"id": CALL, "kind": streams[number % 2], "data": b"x"}))
    *kept, omitted = call.output.pieces()
    assert len(kept) == 100
    assert isinstance(omitted, sandbox_runner.Omitted)
    assert omitted.bytes == 900


class Container:
    """Stands in for the process of `docker run`: says what it is told to say, then ends."""

    pid = 0
    returncode = 0
    stdin = None

    def __init__(self, said: bytes, piece: int) -> None:
        put, self.stdout = anyio.create_memory_object_stream[bytes](1 << 20)
        errors, self.stderr = anyio.create_memory_object_stream[bytes]()
        for start in range(0, len(said), piece):
            put.send_nowait(said[start : start + piece])
        put.close()
        errors.close()

    def kill(self) -> None:
        """Nothing to kill."""

    async def wait(self) -> int:
        """Nothing to wait for."""
        return 0

    async def aclose(self) -> None:
        """Close what was made."""
        self.stdout.close()
        self.stderr.close()


class NoEngine(Engine):
    """Has nothing to remove."""

    async def remove(self, name: str) -> None:
        """It is gone."""


greetings = st.dictionaries(st.sampled_from(sorted(GREETING)), some_value, max_size=2).map(
    lambda wrong: json.dumps({**GREETING, **wrong}).encode() + b"\n"
)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(lines | greetings, max_size=4).map(b"".join), st.integers(1, 5000))
@example(json.dumps({**GREETING, "unread": "x"}).encode() + b"\n", 1)
def test_whatever_a_container_says_a_call_ends_with_a_result(said: bytes, piece: int) -> None:
    async def run() -> Call:
        container: Any = Container(said, piece)
        call = Call(Request("1", "s", output_limit=1 << 16), CALL)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                sandbox = Sandbox(NoEngine("docker", "docker", "20"), "name", container, container.stdout, Network(()))
                call.place()
                sandbox.call = call
                tasks.start_soon(sandbox.serve, None)
                await call.wait(sandbox_runner.DOUBT_AFTER)
        return call

    call = anyio.run(run)
    if call.ended.is_set():
        result = call.tell()
        assert result.status in get_args(sandbox_runner.Status)
        assert result.session == "s"
    else:
        assert not call.is_placed, "it waits for another connection, which may find it"


async def serve(said: list[dict[str, Any]]) -> Sandbox:
    """A sandbox that has said this."""
    container: Any = Container(b"".join(json.dumps(frame).encode() + b"\n" for frame in said), 65536)
    sandbox = Sandbox(NoEngine("docker", "docker", "20"), "name", container, container.stdout, Network(()))
    await sandbox.serve(None)
    return sandbox


async def test_a_sandbox_that_greets_again_and_again_is_given_up() -> None:
    sandbox = await serve([{**GREETING, "unread": f"call-{number}"} for number in range(100)])
    assert sandbox.fault == "a second greeting"
    assert not sandbox.answers


async def test_a_sandbox_can_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    await serve([GREETING, *({"kind": "note", "text": f"{number}\n\x1b[2J" + "x" * 1000} for number in range(500))])
    remarks = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(remarks) == sandbox_runner.NOTES_LOGGED
    assert all(len(remark) < 400 and remark.isprintable() for remark in remarks)


async def test_a_sandbox_can_not_say_that_it_has_a_session_of_any_name() -> None:
    sandbox = await serve([{**GREETING, "session": "\x1b[2J"}])
    assert "String should match pattern" in str(sandbox.fault)


# ── from the worker to the supervisor ──


@pytest.mark.slow
@settings(max_examples=60)
@given(lines, st.booleans())
def test_what_a_worker_sends_is_passed_on_as_its_own_or_ends_it(data: bytes, attached: bool) -> None:
    as_supervisor(data, attached)


def test_what_a_worker_sends_while_nobody_is_attached_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_runner, "BACKLOG_LIMIT", 100_000)
    for name, data in (("x" * 1000, b""), ("x", b"x" * 1000)):
        frame = wire({"id": CALL, "kind": "state", "left_out": {name: ""}, "data": data})
        assert 50 < len(as_supervisor(frame * 1000, attached=False)) < 100


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5))
def test_a_channel_yields_objects_or_says_what_is_wrong(pieces: list[bytes]) -> None:
    channel = Channel(*os.pipe())
    try:
        for piece in pieces:
            os.write(channel.writer, piece)
            for frame in channel.receive():
                assert isinstance(frame, dict)
                assert isinstance(frame.get("data", b""), bytes)
            assert len(channel.inbox) <= LINE_LIMIT + 65536
    except ValueError:
        pass
    finally:
        channel.close()


class Knocking:
    """A listener with one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def accept(self) -> tuple[socket.socket, None]:
        """The connection."""
        return self.connection, None


@settings(max_examples=50)
@given(st.binary(max_size=100) | any_json.map(lambda value: json.dumps(value).encode()), st.integers(0, 3))
def test_a_knock_by_anybody_but_the_plug_changes_nothing_and_no_knock_stops_the_supervisor(
    message: bytes, descriptors: int
) -> None:
    for is_plug in (False, True):
        with tamed(attached=True) as supervisor, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox_runner, "PLUG_UID", os.getuid() if is_plug else os.getuid() + 1)
            before = supervisor.host.channel, supervisor.host.owner, supervisor.host.plug
            ours, theirs = socket.socketpair()
            with ours, open(os.devnull, "rb+", buffering=0) as null:
                socket.send_fds(ours, [message or b" "], [null.fileno()] * descriptors)
                listener: Any = Knocking(theirs)
                supervisor.door.admit(listener)
            assert (supervisor.host.channel, supervisor.host.owner, supervisor.host.plug) == before


# ── arguments of tools ──

arguments = st.dictionaries(
    st.sampled_from(["code", "state", "session_id", "timeout", "files", "package_name"]) | any_text,
    some_value | any_text,
)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.sampled_from(sorted(TOOLS)) | any_text, arguments)
@example("execute-transient", {"code": "x", "state": "\ud800"})
@example("execute-transient", {"code": "x", "files": "\ud800"})
def test_arguments_are_a_call_or_a_sentence_on_what_is_wrong(name: str, given_: dict[str, Any]) -> None:
    try:
        tool = parse(name, given_)
    except (RequestError, MCPError) as error:
        said = str(error)
    else:
        assert isinstance(tool, Tool)
        said = ""
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("tool", "given_"),
    [
        ("execute-transient", {"code": "x", "timeout": 10**400}),
        ("execute-transient", {"code": "\ud800"}),
        ("execute-transient", {"code": "x", "\ud800": 1}),
        ("install-package", {"package_name": "a" + " " * 1_000_000 + "!"}),
        ("cleanup-session", {"session_id": "x\n"}),
        ("execute-persistent", {"code": "x", "session_id": "../../etc"}),
        ("execute-persistent", {"code": "x", "session_id": "--privileged " * 100_000}),
    ],
)
async def test_arguments_that_look_right_and_are_not_are_refused(
    docker: FakeEngine, tmp_path: Path, tool: str, given_: dict[str, Any]
) -> None:
    with anyio.fail_after(PATIENCE):
        async with open_runner(settings_for(docker, tmp_path)) as runner, Client(make_server(runner)) as client:
            try:
                result = await client.call_tool(tool, given_)
            except (MCPError, ValueError):  # the latter: the client itself can't put it into a message
                pass
            else:
                assert result.is_error
    assert not docker.log("run")


def settings_for(docker: FakeEngine, tmp_path: Path) -> Config:
    """Settings for the fake engine."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return Config(
        docker=DockerConfig(command=docker.command, working_dir=str(work)),
        session=SessionConfig(idle_timeout=60),
        package=PackageConfig(preinstalled=()),
        pool=PoolConfig(enabled=False),
    )


not_code = st.none() | st.integers() | st.lists(st.integers()) | st.just(" ") | st.just("\ud800")
calls = st.tuples(
    st.sampled_from(sorted(TOOLS)),
    st.fixed_dictionaries(
        {"code": not_code},
        optional={"session_id": some_value | any_text, "state": some_value, "package_name": st.just("-r x") | not_code},
    ),
)


@pytest.fixture
async def client(docker: FakeEngine, tmp_path: Path) -> AsyncIterator[Client]:
    """A client of a server in this process."""
    with anyio.fail_after(PATIENCE):
        async with open_runner(settings_for(docker, tmp_path)) as runner, Client(make_server(runner)) as client:
            yield client


@pytest.mark.slow
async def test_the_server_answers_every_call_with_a_result_or_an_error_of_the_protocol(client: Client) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    @settings(max_examples=60, database=None)
    @given(calls)
    def collect(call: tuple[str, dict[str, Any]]) -> None:
        asked.append(call)

    collect()
    for tool, given_ in asked:
        try:
            result = await client.call_tool(tool, given_)
        except (MCPError, ValueError):  # the latter: the client itself can't put it into a message
            continue
        assert isinstance(result, types.CallToolResult)
        assert result.is_error or not str(given_.get("code")).strip(), "only a call without code may go well"
    alive = await client.call_tool("execute-transient", {"code": "6 * 7"})
    assert not alive.is_error


address = st.text(":/?#[]@sesion.files%output&=0123456789\ud800é", max_size=40).map(lambda rest: f"session://{rest}")


@given(address | any_text)
def test_addresses_of_resources_are_read_or_refused(uri: str) -> None:
    try:
        _, session, kind, rest, offset, length = parse_address(uri)
    except RequestError:
        return
    assert isinstance(session, str)
    assert kind in ("files", "output")
    assert rest
    assert offset >= 0
    assert length is None or length > 0


# ── what code makes of its own call ──


@pytest.mark.slow
async def test_odd_code_may_spoil_its_call_and_not_its_session(docker: FakeEngine, tmp_path: Path) -> None:
    codes = collect(150)
    with anyio.fail_after(PATIENCE):
        async with open_runner(settings_for(docker, tmp_path)) as runner:
            await runner.execute("kept = 41", session="s")
            for code in codes:
                result = await runner.execute(code, session="s", state={})
                assert (result.status in ("ok", "error"), result.state) == (True, "preserved"), told(code, result)
                json.dumps(result.as_dict(), allow_nan=False).encode()
                render(result).model_dump_json()
                result = await runner.execute("kept + 1", session="s")
                assert (result.value, result.lost_before) == ("42", None), told(code, result)


def told(code: str, result: Result) -> str:
    """What matters of a finding."""
    return f"\n{code.removeprefix(PRELUDE)}\n{result.status} {result.message} {result.exception} {result.lost_before}"


# ── what of a user's ever becomes part of a command ──


@pytest.mark.slow
@given(any_text | st.from_regex(r"-{0,2}[a-z]{1,3}[\s\[\]<>=~!@;:/.,-]{0,3}[a-z0-9.*]{0,3}", fullmatch=True))
def test_a_requirement_is_never_an_option_a_path_or_an_address(text: str) -> None:
    try:
        name, requirement = parse_requirement(text)
    except RequestError:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.*+!_,<>=~\[\]-]*", requirement)
    assert not requirement.startswith("-")


@given(st.from_regex(sandbox_runner.SESSION_ID, fullmatch=True))
def test_a_sessions_id_is_no_part_of_a_command(session: str) -> None:
    assert re.fullmatch(r"python-docker-mcp-session-[0-9a-f]{24}", session_container(session))


@given(st.sampled_from(["image", "runtime", "working_dir"]), any_text | st.from_regex(r"[-/]{0,2}[a-z]+[ =,:]?[a-z]*"))
def test_settings_are_refused_or_stay_in_their_place_on_the_command_line(name: str, text: str) -> None:
    def command(docker: DockerConfig) -> list[str]:
        engine = Engine("docker", "docker", "20")
        return engine.sandbox_arguments("NAME", Image(docker.image, "id", ""), Config(docker=docker), {})

    try:
        docker = DockerConfig(**{name: text})  # type: ignore[arg-type]
    except ValueError:
        return
    usual = command(DockerConfig(runtime="x"))
    changed = command(dataclasses.replace(docker, runtime=docker.runtime or "x"))
    assert [flag.partition("=")[0] for flag in changed if flag[0] == "-"] == [
        flag.partition("=")[0] for flag in usual if flag[0] == "-"
    ]
    assert changed[changed.index("--") + 1] == docker.image


# ── engines that misbehave ──


@pytest.mark.slow
async def test_an_engine_whose_command_disappears_is_told_in_one_sentence(docker: FakeEngine, tmp_path: Path) -> None:
    config = settings_for(docker, tmp_path)
    with anyio.fail_after(PATIENCE):
        async with open_runner(config) as runner:
            assert (await runner.execute("6 * 7", session="s")).value == "42"
            os.rename(docker.command, f"{docker.command}.away")
            try:
                assert (await runner.execute("6 * 7", session="s")).value == "42"  # needs none
                with pytest.raises(EngineError, match=r"can't be run: No such file or directory\. Reinstall it, or"):
                    await runner.execute("6 * 7")
            finally:
                os.rename(f"{docker.command}.away", docker.command)
            assert (await runner.execute("6 * 7")).value == "42"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["kill", "rm"])
async def test_an_engine_that_hangs_when_a_container_is_to_be_removed_keeps_nobody_waiting_for_ever(
    docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    engine = await find_engine(docker.command)
    monkeypatch.setattr(sandbox_runner, "REMOVE_TIMEOUT", 0.5)
    docker.script(**{verb: {"hang": True}})
    with anyio.fail_after(PATIENCE):
        await engine.remove("name")
    assert [call[0] for call in docker.log()][1:] == ["kill", "rm"][: 1 if verb == "kill" else 2]
    docker.script(**{verb: {}})


@pytest.mark.parametrize("said", ["\x00\x1b[2J\n--privileged\n", "x" * 100_000, "{}", ""])
async def test_an_engine_that_prints_garbage_is_not_believed(docker: FakeEngine, tmp_path: Path, said: str) -> None:
    docker.script(ps={"stdout": said}, container_inspect={"stdout": said})
    with anyio.fail_after(PATIENCE):
        async with open_runner(settings_for(docker, tmp_path)) as runner:
            assert await runner.launcher.list_sandboxes() == []
            assert (await runner.execute("6 * 7", session="s")).value == "42"


@pytest.mark.slow
async def test_an_engine_that_says_more_than_anybody_can_read_is_cut_short(docker: FakeEngine) -> None:
    docker.script(version={"stdout": "x" * (3 << 20), "stderr": "y" * (3 << 20), "exit": 1})
    with pytest.raises(EngineError) as caught:
        await find_engine(docker.command)
    assert len(str(caught.value)) < 1000
