"""Coverage-guided fuzzing of the frames in both directions, and of what code may send to the proxy.

    python -m tests.tools.fuzz_frames [SECONDS]

It needs atheris (the dependency group `fuzz`). The first byte of an input chooses who gets it. `test_fuzz` takes the
same functions for frames through inputs that are made, not found, and `test_network` does so for the proxy's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

import python_docker_mcp
import sandbox_runner
from sandbox_runner import (
    FROM_SANDBOX,
    Call,
    Channel,
    Connection,
    ProtocolError,
    RefusedError,
    Request,
    Result,
    RunningCall,
    Supervisor,
    host_name,
    read_request,
    server_name,
    target_of,
)

CALL = "c"  # the id of the call that is running
DONE: dict[str, Any] = {
    "id": CALL,
    "kind": "done",
    "status": "ok",
    "state": "preserved",
    "lost_before": None,
    "behind": 0,
    "wall": 0.5,
    "cpu": 0.25,
    "memory": 1024,
    "oom_kills": 0,
    "value": "1",
    "value_length": 1,
    "exit_code": 0,
    "message": None,
    "files": [["a", 1]],
    "files_left_out": {"b": "why"},
    "stale": [],
    "exception": {"type": "E", "message": "m", "line": 1, "traceback": "t", "missing": None},
}
HOST_ONLY = (
    "state",
    "lost_before",
    "behind",
    "wall",
    "oom_kills",
    "message",
    "files",
    "files_left_out",
)  # what the supervisor adds
REPORT = {name: value for name, value in DONE.items() if name not in HOST_ONLY}
FRAMES: list[dict[str, Any]] = [
    {"id": CALL, "kind": "stdout", "data": b"a"},
    {"id": CALL, "kind": "stderr", "data": b"b"},
    {"id": CALL, "kind": "display", "data": b'{"text/plain": "x", "image/png": "aGk="}', "is_value": True},
    {"id": CALL, "kind": "state", "data": b'{"x": [1, {"y": null}], "t": null}', "left_out": {"z": "too large"}},
    {"id": CALL, "kind": "omitted", "bytes": 5},
    {"id": CALL, "kind": "earlier", "data": b"e"},
    DONE,
    REPORT,
]
VALUES: list[Any] = [None, True, False, 0, -1, 7, 1 << 70, 10**400, 0.5, -0.5, math.nan, math.inf, "", "x", "\u00e9"]
VALUES += ["\ud800", "\x1b[2J\n", CALL, "ok", "error", "timeout", "done", "begun", "aGk=", "a", "{}", "[]", "null"]
VALUES += ["1e999", '{"text/plain": 1}', '{"image/png": "aGk="}', '{"x": NaN}', "[" * 70, [], {}, [[]], [["a", 1]]]
VALUES += [{"a": 1}, {"a": "b"}, {"type": "SyntaxError", "message": "", "line": -9, "traceback": "", "missing": None}]
VALUES += [{"type": "E", "message": "", "line": 1 << 70, "traceback": "\ud800", "missing": ""}]
VALUES += [["x"], [None], [["a", "b"]]]

REQUESTS = [
    b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"GET http://example.com:80/a?b HTTP/1.1\r\nHost: example.com:80\r\nConnection: x\r\n\r\n",
    b"POST http://[::1]:8000/ HTTP/1.1\r\nHost: [::1]:8000\r\nTransfer-Encoding: chunked\r\n\r\n",
    bytes.fromhex("16030100300100002c0303") + bytes(32) + bytes.fromhex("000002130101000001000000"),
]


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


def wire(frame: dict[str, Any]) -> bytes:
    """A frame as it travels, or what is nearly one: its data may be anything."""
    data = frame.get("data")
    return sandbox_runner.head(frame) + data if isinstance(data, bytes) else json.dumps(frame).encode() + b"\n"


def unwire(data: bytes) -> Iterator[dict[str, Any]]:
    """The frames that these bytes are."""
    while data:
        line, _, data = data.partition(b"\n")
        frame = json.loads(line)
        if "data" in frame:
            frame["data"], data = data[: frame["data"]], data[frame["data"] :]
        yield frame


class Said(anyio.abc.ByteReceiveStream):
    """What a sandbox has said, in one piece; reading it never waits."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def receive(self, max_bytes: int = 65536) -> bytes:  # noqa: ARG002  # all of it
        """All there is."""
        if not self.data:
            raise anyio.EndOfStream
        data, self.data = self.data, b""
        return data

    async def aclose(self) -> None:
        """Nothing to close."""


def as_host(data: bytes) -> Result | None:
    """What the host makes of what a sandbox says, up to the end of a call: shown in every way there is."""
    call = Call(Request("", "s", output_limit=1 << 16), CALL)
    stream = BufferedByteReceiveStream(Said(data))

    async def take_next() -> None:
        frame: Any = await sandbox_runner.receive(stream, FROM_SANDBOX)
        if frame.get("id") == CALL:
            await call.take(frame)

    try:
        while not call.ended.is_set():
            finish(take_next())
    except (ProtocolError, anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound):
        return None
    result = call.tell()
    hint = python_docker_mcp.hint_on(result, "1 +\n!pip", sandbox_runner.Config())
    json.dumps(result.as_dict())
    python_docker_mcp.render(result, hint=hint).model_dump_json()
    python_docker_mcp.Shelf().add(result, ())
    assert sandbox_runner.exit_status(result) >= 0
    for item in result.output:
        sandbox_runner.plain_text(item)
    return result


class TamedSupervisor(Supervisor):
    """One that has no worker: it can be told what a worker would say, and kills nothing."""

    def __init__(self, attached: bool) -> None:
        settings = {
            "owner": "us",
            "idle_timeout": 60.0,
            "preload": [],
            "packages": "/nowhere",
            "writable_folders": [],
            "grace": 2.0,
            "working_dir": "/nowhere",
            "cpus": 1,
            "memory_limit": 192 << 20,
            "restores": False,
            "has_proxy": False,
            "certificates": ("", False),
            "authority": "",
        }
        super().__init__(settings)
        self.told, theirs = os.pipe()
        for fd in (self.told, theirs):
            os.set_blocking(fd, False)
        if attached:
            self.host.channel = Channel(os.open(os.devnull, os.O_RDONLY), theirs)
        else:
            os.close(theirs)
        ours, self.mouth = socket.socketpair()
        fd = ours.detach()
        self.worker.control = Channel(fd, fd)
        self.worker.control.set_blocking(False)
        self.mouth.setblocking(False)
        self.sources[fd] = self.from_worker
        self.abandoned: str | None = None
        request: Any = {"id": CALL, "timeout": 60, "output_limit": 1000}
        self.call = RunningCall(request, 2.0)

    def _abandon(self, message: str | None) -> None:
        assert message
        self.abandoned = message
        assert self.worker.control is not None
        self.sources.pop(self.worker.control.reader, None)

    def close(self) -> None:
        """Close what is open."""
        self.mouth.close()
        self.worker.copy.address.close()
        os.close(self.told)
        if self.worker.kills.events >= 0:
            os.close(self.worker.kills.events)
        for channel in (self.host.channel, self.worker.control):
            if channel:
                channel.close()


@contextlib.contextmanager
def tamed(attached: bool) -> Iterator[TamedSupervisor]:
    """A supervisor without worker, in the middle of a call."""
    supervisor = TamedSupervisor(attached)
    try:
        yield supervisor
    finally:
        supervisor.close()


def as_supervisor(data: bytes, attached: bool) -> list[dict[str, Any]]:
    """What the supervisor tells the host when a worker sends this: frames of its call."""
    with tamed(attached) as supervisor:
        control = supervisor.worker.control
        assert control is not None
        for start in range(0, len(data), 4096):
            supervisor.mouth.send(data[start : start + 4096])
            if control.reader in supervisor.sources:
                supervisor.from_worker()
        told: list[Any] = list(supervisor.host.backlog)
        if supervisor.host.channel:
            sent = b""
            with contextlib.suppress(BlockingIOError):
                sent = os.read(supervisor.told, 1 << 20)  # more than a pipe holds
            told = list(unwire(sent + b"".join(supervisor.host.channel.outbox.parts)))
    for frame in told:
        assert frame["id"] == CALL
        assert frame["kind"] in ("display", "state", "done", "omitted", "stdout", "stderr")
        assert frame["kind"] != "done" or (frame["status"] in ("ok", "error") and frame["state"] == "preserved")
    ended = told if told and told[-1]["kind"] == "done" else [*told, DONE]
    as_host(b"".join(map(wire, ended)))  # it may find that a field can't be
    return told


def as_proxy(data: bytes) -> None:
    """See what the proxy makes of the first bytes of a connection, and of a tunnel: a name of a host, or a refusal."""

    async def pass_on(_: Any) -> None:
        pass

    async def parse() -> None:
        connection = Connection(1, pass_on, lambda: False)
        connection.take({"kind": "passed", "flow": 1, "data": data, "credit": 0, "ended": True})
        with contextlib.suppress(RefusedError, anyio.EndOfStream):
            host, port, _ = target_of((await read_request(connection))[0])
            assert host_name(host) == host
            assert 0 < port < 65536

    anyio.run(parse)
    with contextlib.suppress(ValueError):
        name = server_name(data)
        assert not name or "\n" not in name


def lines_from(data: bytes) -> bytes:
    """Frames that are right but for some of their fields; each three bytes say which, and what is there instead."""
    lines = b""
    for start in range(0, len(data) - 2, 3):
        kind, field, value = data[start : start + 3]
        frame = dict(FRAMES[kind % len(FRAMES)])
        if field % 4:  # else it is as it should be
            frame[list(frame)[field // 4 % len(frame)]] = VALUES[value % len(VALUES)]
        lines += wire(frame)
    return lines


def one_input(data: bytes) -> None:
    """What is done with each input: its first byte says as what it is taken, and who gets it."""
    if not data:
        return
    lines = lines_from(data[1:]) if data[0] & 1 else data[1:]
    if data[0] & 8:
        as_proxy(data[1:])
    elif data[0] & 2:
        as_host(lines)
    else:
        as_supervisor(lines, attached=bool(data[0] & 4))


def main() -> None:
    """Fuzz for some seconds (a minute, unless told otherwise); a finding ends it with its traceback and status 77."""
    import atheris

    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as corpus:
        text = [wire(frame) for frame in FRAMES]
        for number, lines in enumerate([*text, b"".join(text), b"".join(reversed(text))]):
            for direction in (0, 2, 4):
                Path(corpus, f"{number}-{direction}").write_bytes(bytes([direction]) + lines)
        for direction in (1, 3, 5):
            Path(corpus, f"made-{direction}").write_bytes(bytes([direction, *range(60)]))
        for number, first in enumerate(REQUESTS):
            Path(corpus, f"request-{number}").write_bytes(bytes([8]) + first)
        words = {word for frame in FRAMES for item in frame.items() for word in map(str, item) if len(word) < 40}
        dictionary = Path(corpus, "words")
        dictionary.write_text("".join(f'"{json.dumps(word)[1:-1]}"\n' for word in sorted(words) if word.isascii()))
        for owner in (Call, Channel, Supervisor):
            for name, value in list(vars(owner).items()):
                if isinstance(value, type(main)):
                    setattr(owner, name, atheris.instrument_func(value))
        for name in (
            "target_of",
            "host_name",
            "server_name",
            "parse_object",
            "check_worker_frame",
            "joined",
        ):
            setattr(sandbox_runner, name, atheris.instrument_func(getattr(sandbox_runner, name)))
        options = [sys.argv[0], f"-max_total_time={seconds}", f"-dict={dictionary}", "-max_len=8192", corpus]
        atheris.Setup(options, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
