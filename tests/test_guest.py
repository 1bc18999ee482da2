"""The guest: its parts in this process, and the whole of it in a pid namespace."""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import errno
import functools
import itertools
import json
import os
import random
import re
import resource
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from conftest import FakeEngine, code_objects, wait_until
from hypothesis import given
from hypothesis import strategies as st
from pytest_subprocess.exceptions import ProcessNotRegisteredError

import sandbox_runner
from sandbox_runner import (
    DATA_LIMIT,
    GUEST_MODULES,
    GUEST_SOURCE,
    LINE_LIMIT,
    NOT_TO_PROCESS_1,
    REFUSED_CALLS,
    Channel,
    Config,
    DockerConfig,
    Engine,
    Image,
    ImportPolicy,
    RunningCall,
    clip,
    collect_state,
    filter_program,
    plug,
    refuse_input,
    rich_forms,
    shipment,
)

# ── the guards ──


def test_a_command_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ProcessNotRegisteredError):
        subprocess.run(["ls"], check=False)


def test_a_supervisor_does_not_run_in_this_process() -> None:
    refused: Any = (sandbox_runner.kill_all_others, sandbox_runner.Supervisor.run)
    for function in refused:
        with pytest.raises(AssertionError, match="never in this process"):
            function(None)


def test_the_fake_engine_runs_nothing_that_is_not_process_1_of_another_pid_namespace() -> None:
    guard = runpy.run_path(str(Path(__file__).with_name("fake_docker")))["GUARD"]
    program = [sys.executable, "-c", "print('it ran')"]
    for namespace in ("pid:[1]", os.readlink("/proc/self/ns/pid")):
        refused = subprocess.run(
            [sys.executable, "-IS", "-c", guard, "name", namespace, *program],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "a supervisor must not run here" in refused.stderr


# ── what is shipped ──

NEWER_BUILTINS = {
    "aiter",
    "anext",
    "BaseExceptionGroup",
    "ExceptionGroup",
    "EncodingWarning",
    "PythonFinalizationError",
}


def names(code: types.CodeType, *operations: str) -> set[str]:
    """The names that these operations of a code object's bytecode have for argument."""
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname in operations}


@pytest.mark.parametrize("source", [GUEST_SOURCE, sandbox_runner.INSTALLER_SOURCE], ids=["guest", "installer"])
def test_what_is_shipped_refers_to_nothing_outside_itself(source: str) -> None:
    module = compile(source, "shipped", "exec", dont_inherit=True)
    defined = names(module, "STORE_NAME") | set(vars(builtins)) - NEWER_BUILTINS | {"__name__"}
    for code in code_objects(module):
        local = names(code, "STORE_NAME") if code is not module else set()  # the body of a class
        foreign = names(code, "LOAD_GLOBAL", "LOAD_NAME") - defined - local - {"__module__", "__qualname__"}
        assert not foreign, f"{code.co_qualname} needs {foreign}"


def test_the_plug_refers_to_nothing_but_builtins() -> None:
    assert not names(plug.__code__, "LOAD_GLOBAL") - set(vars(builtins))
    assert not plug.__code__.co_freevars


def test_the_plug_knows_the_address_that_the_supervisor_listens_on() -> None:
    assert sandbox_runner.PLUG_ADDRESS in plug.__code__.co_consts


def test_the_guest_imports_what_it_uses_from_the_standard_library_and_no_more() -> None:
    used = set().union(*(names(code, "LOAD_GLOBAL", "LOAD_NAME") for code in code_objects(compile_guest())))
    assert set(GUEST_MODULES) - used == set()
    assert set(GUEST_MODULES) <= sys.stdlib_module_names


def test_the_guest_keeps_the_line_numbers_of_the_file() -> None:
    functions = {code.co_name: code.co_firstlineno for code in code_objects(compile_guest())}
    for function in (clip, collect_state, sandbox_runner.supervise):
        assert functions[function.__name__] == function.__code__.co_firstlineno


def compile_guest() -> types.CodeType:
    return compile(GUEST_SOURCE, "guest", "exec", dont_inherit=True)


# ── channel ──


@pytest.fixture
def channel() -> Iterator[Channel]:
    """A channel to itself."""
    loop = Channel(*os.pipe())
    yield loop
    for fd in (loop.reader, loop.writer):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_frames_arrive_whole_and_in_order_however_they_are_cut(channel: Channel) -> None:
    received = []
    for byte in b'{"n":1}\n{"n":"\xc3\xa9"}\n{"data":3}\n{\n\xff{"data":0}\n{}\n{"n":3}\n':
        os.write(channel.writer, bytes([byte]))
        received += list(channel.receive())
    assert received == [{"n": 1}, {"n": "é"}, {"data": b"{\n\xff"}, {"data": b""}, {}, {"n": 3}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"print\n", "Expecting value"),
        (b"\xff\n", "decode"),
        (b"[1]\n", "not an object"),
        (b"[" * 60_000 + b"\n", "nested too deeply"),
        (b'{"data":-1}\n', "with -1 bytes of data"),
        (b'{"data":true}\n', "with True bytes of data"),
        (b'{"data":"1"}\n', "with 1 bytes of data"),
        (b'{"data":4194305}\n', "with 4194305 bytes of data"),
    ],
)
def test_a_line_that_is_no_frame_is_refused(channel: Channel, line: bytes, message: str) -> None:
    os.write(channel.writer, line)
    with pytest.raises(ValueError, match=message):
        list(channel.receive())


def test_a_line_without_end_is_refused(channel: Channel) -> None:
    def write_and_read() -> None:
        os.write(channel.writer, b"x" * 50_000)
        assert list(channel.receive()) == []

    for _ in range(LINE_LIMIT // 50_000):
        write_and_read()
    with pytest.raises(ValueError, match="longer than"):
        write_and_read()


def test_the_end_of_a_channel_is_an_error_of_its_own(channel: Channel) -> None:
    os.close(channel.writer)
    with pytest.raises(EOFError, match="closed"):
        list(channel.receive())


def test_frames_for_somebody_who_has_gone_are_dropped(channel: Channel) -> None:
    os.close(channel.reader)
    channel.send({"id": "a"})
    assert not channel.outbox.size


def test_data_up_to_the_limit_goes_in_one_frame_and_more_is_refused(channel: Channel) -> None:
    channel.set_blocking(False)
    data = os.urandom(DATA_LIMIT)
    channel.send({"id": "a", "kind": "state", "n": 1, "data": data})
    frames: list[dict[str, Any]] = []
    while channel.outbox.size or not frames:
        channel.flush()
        frames += channel.receive()
    assert frames == [{"id": "a", "kind": "state", "n": 1, "data": data}]
    channel.send({"id": "a", "data": b"x" * (DATA_LIMIT + 1)})
    with pytest.raises(ValueError, match=f"a frame with {DATA_LIMIT + 1} bytes of data"):
        list(channel.receive())


def test_what_a_full_pipe_does_not_take_waits_in_the_outbox(channel: Channel) -> None:
    channel.set_blocking(False)
    frames = [{"n": number, "data": b"x" * 50_000} for number in range(5)]
    for frame in frames:
        channel.send(frame)
    assert channel.outbox.size
    received: list[dict[str, Any]] = []
    while len(received) < 5:
        received += channel.receive()
        channel.flush()
    assert received == frames


def test_more_frames_than_are_written_at_once_come_in_their_order_and_are_counted(channel: Channel) -> None:
    channel.set_blocking(False)
    frames: list[dict[str, Any]] = [
        {"n": number, "data": b"x" * (number % 7 * 3000)} for number in range(5 * sandbox_runner.PARTS_WRITTEN)
    ]
    for frame in frames:
        channel.queue(frame)
    size = channel.outbox.size
    assert size == sum(len(sandbox_runner.head(frame)) + len(frame["data"]) for frame in frames)
    received: list[dict[str, Any]] = []
    while channel.outbox.size:
        channel.flush()
        assert channel.outbox.size < size
        size = channel.outbox.size
        received += channel.receive()
    while len(received) < len(frames):
        received += channel.receive()
    assert received == frames


def test_reading_a_non_blocking_channel_that_has_nothing_yields_nothing(channel: Channel) -> None:
    channel.set_blocking(False)
    assert list(channel.receive()) == []


# ── call ──


def make_call(limit: int | None) -> RunningCall:
    request: Any = {"id": "a", "timeout": 30.0, "output_limit": limit}
    return RunningCall(request, 2.0)


@given(st.integers(0, 60), st.lists(st.text(max_size=30), max_size=30))
def test_output_passes_up_to_the_limit_then_only_its_end_is_kept_and_the_rest_counted(
    limit: int, pieces: list[str]
) -> None:
    pieces = [piece.encode("utf-8", "ignore").decode() for piece in pieces]
    call = make_call(limit)
    head = "".join(call.admit("stdout", piece) for piece in pieces).encode()
    tail = b"".join(data for _, data in call.tail)
    whole = "".join(pieces).encode()
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert len(head) + len(tail) <= limit
    assert len(head) + len(tail) + call.omitted == len(whole)


def test_all_output_passes_where_there_is_no_limit() -> None:
    call = make_call(None)
    assert all(call.admit("stdout", "x" * 1_000_000) == "x" * 1_000_000 for _ in range(20))
    assert not call.omitted


def test_the_tail_remembers_which_stream_it_came_from() -> None:
    call = make_call(8)
    passed = [call.admit("stdout", "1234567"), call.admit("stderr", "abc"), call.admit("stdout", "z")]
    assert passed == ["123456", "", ""]
    assert list(call.tail) == [("stderr", b"c"), ("stdout", b"z")]
    assert call.omitted == 3


def test_a_call_is_interrupted_for_one_reason_only() -> None:
    call = make_call(None)
    before = call.next_due()
    assert call.interrupt("timeout")
    assert not call.interrupt("cancelled")
    assert call.stopped_for == "timeout"
    assert call.next_due() < before


# ── functions ──


@pytest.mark.parametrize("length", [0, 99, 100])
def test_text_within_the_limit_is_not_clipped(length: int) -> None:
    assert clip("x" * length, 100) == "x" * length


def test_clipped_text_keeps_head_and_tail_and_tells_how_much_went() -> None:
    assert clip("a" * 100 + "b" * 100, 99) == "a" * 66 + "\n[… 101 characters left out …]\n" + "b" * 33


def cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def aliased() -> list[Any]:
    inner: list[Any] = []
    return [inner, inner]


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (-1.5, -1.5),
        (10**300, 10**300),
        ("é\0\n", "é\0\n"),
        ([], []),
        ((1, (2,)), [1, [2]]),
        ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        (aliased(), [[], []]),
        (nested(64), nested(64)),
    ],
)
def test_variables_that_json_can_hold_are_kept(value: Any, kept: Any) -> None:
    text, left_out = collect_state({"x": value})
    assert json.loads(text) == {"x": kept}
    assert left_out == {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "nan is not JSON"),
        ([1, {"a": float("-inf")}], "-inf is not JSON"),
        ({1, 2}, "set is not JSON"),
        (b"", "bytes is not JSON"),
        (1j, "complex is not JSON"),
        ("\ud800", "text with lone surrogates"),
        ({"\ud800": 1}, "text with lone surrogates"),
        ({1: 2}, "a key is int, not text"),
        (cycle(), "contains itself"),
        (nested(65), "nested more than 64 deep"),
        (1 << 5000, "an integer of 5001 bits"),
    ],
)
def test_variables_that_json_can_not_hold_are_named_with_the_reason(value: Any, reason: str) -> None:
    assert collect_state({"x": value, "y": 1}) == (b'{"y":1}', {"x": reason})


def test_state_leaves_out_modules_functions_classes_and_underscored_names_without_a_word() -> None:
    assert collect_state({"os": os, "f": clip, "C": RunningCall, "_x": 1, "__y": 2, "print": print}) == (b"{}", {})


def test_state_leaves_out_what_is_under_a_name_that_no_json_has() -> None:
    assert collect_state({5: 1, "\ud800": 2, "x": 1}) == (  # type: ignore[dict-item]  # as in globals()[5] = 1
        b'{"x":1}',
        {"\\ud800": "its name has lone surrogates"},
    )


def test_state_that_is_too_large_leaves_out_what_does_not_fit() -> None:
    text, left_out = collect_state({"small": 1, "large": "x" * 100, "other": 2}, 40)
    assert json.loads(text) == {"small": 1, "other": 2}
    assert left_out == {"large": "too large: 100 characters"}
    assert "too large" in collect_state({"long": [0] * 100}, 40)[1]["long"], "found out before it is encoded"
    nested = [[[0] * 15] * 15] * 15
    assert collect_state({"nested": nested}, 40)[1] == {"nested": "too large: 15 values"}, "and before all is looked at"


def test_state_names_at_most_a_hundred_variables_that_are_left_out() -> None:
    assert len(collect_state({f"x{number}": set() for number in range(200)})[1]) == 100


class Shown:
    """Has two forms, one of which fails."""

    def _repr_html_(self) -> str:
        return "<b>x</b>"

    def _repr_png_(self) -> bytes:
        return b"\x89PNG"

    def _repr_svg_(self) -> str:
        raise ValueError

    def _repr_latex_(self) -> None:
        return None

    def _repr_markdown_(self) -> tuple[str, dict[str, str]]:
        return "*x*", {}


class Bundled:
    def _repr_mimebundle_(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"text/plain": "no", "application/json": "{}", "x/number": 1}, {}


class Hostile:
    def __getattr__(self, name: str) -> Any:
        return lambda: {"not": "text"}


@pytest.mark.parametrize(
    ("value", "forms"),
    [
        (1, {}),
        (Shown, {}),
        (Shown(), {"text/html": "<b>x</b>", "image/png": "iVBORw==", "text/markdown": "*x*"}),
        (Bundled(), {"application/json": "{}"}),
    ],
)
def test_rich_forms_are_those_that_can_be_made(value: Any, forms: dict[str, str]) -> None:
    assert rich_forms(value) == forms


def test_rich_forms_are_texts_even_of_values_that_answer_to_every_name() -> None:
    assert all(isinstance(form, str) for form in rich_forms(Hostile()).values())


def test_input_says_what_to_do_instead() -> None:
    with pytest.raises(EOFError, match=r"input\(\) can't be answered .* put the value into the code"):
        refuse_input("name?")


@pytest.mark.parametrize(("allowed", "blocked", "module"), [(["math"], [], "os"), ([], ["os"], "os.path")])
def test_the_refusal_of_a_module_names_the_setting(allowed: list[str], blocked: list[str], module: str) -> None:
    refusal = str(ImportPolicy(allowed, blocked, "/app").refusal(module))
    assert refusal == "module 'os' may not be imported: the setting " + (
        "blocked_modules names it" if blocked else "allowed_modules permits only math"
    )


# ── frames ──


def test_the_supervisors_table_of_the_workers_frames_is_what_their_types_say() -> None:
    told = {}
    for frame in get_args(sandbox_runner.FromWorker):
        schema = pydantic.TypeAdapter(frame).json_schema()
        needed, known = set(schema["required"]), set(schema["properties"])
        told[schema["properties"]["kind"]["const"]] = (needed - {"kind", "id"}, known - needed)
    assert told == sandbox_runner.WORKER_FIELDS


# ── the filter of system calls ──

X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003
ALLOWED = None


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int | None:
    """What a filter answers to a system call, found as the kernel does: an error number, or None if it may pass."""
    steps = list(struct.iter_unpack("HBBI", program))
    values = (*arguments, *[0] * 6)[:6]
    data = dict(enumerate(struct.pack("IIQ6Q", number, architecture, 0, *values)))
    place = accumulator = 0
    while True:
        code, if_so, if_not, constant = steps[place]
        place += 1
        if code == 0x06:
            return ALLOWED if constant == 0x7FFF0000 else constant - 0x00050000
        if code == 0x20:
            accumulator = int.from_bytes(bytes(data[constant + byte] for byte in range(4)), sys.byteorder)
        elif code == 0x54:
            accumulator &= constant
        else:
            true = {0x15: accumulator == constant, 0x35: accumulator >= constant}[code]
            place += if_so if true else if_not


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", X86_64), ("aarch64", AARCH64)])
def test_the_filter_refuses_what_its_table_names_and_no_other_call(machine: str, architecture: int) -> None:
    program = filter_program(machine)
    assert program is not None
    refused = {numbers[machine == "aarch64"]: reason for _, *numbers, reason in REFUSED_CALLS}
    to_process_1 = {numbers[machine == "aarch64"] for _, *numbers in NOT_TO_PROCESS_1}
    names = ("clone", "socket", "socketpair", "setsockopt", "ioctl", "setrlimit", "prlimit64", "mmap", "memfd_create")
    numbers = (56, 41, 53, 54, 16, 160, 302, 9, 319)
    if machine == "aarch64":
        numbers = (220, 198, 199, 208, 29, 164, 261, 222, 279)
    judged = dict(zip(names, numbers, strict=True))
    ask = functools.partial(verdict, program, architecture)
    for number in range(600):
        if number not in judged.values():
            answer = errno.EPERM if number in to_process_1 else refused.get(number, ALLOWED)
            assert ask(number, 1) == answer
            other = 2**32 - 1  # every process but the first, for kill
            assert ask(number, other) == refused.get(number, ALLOWED)
    for call in (judged["socket"], judged["socketpair"]):
        for family, kind, protocol in itertools.product(range(45), (1, 2, 3, 5), (0, 1, 6, 17, 132, 136, 262)):
            allowed = family == 1 or (family, protocol) == (16, 0)
            allowed |= family in (2, 10) and (kind, protocol) in ((1, 0), (1, 6), (2, 0), (2, 17))
            reason = errno.EPROTONOSUPPORT if family in (2, 10) else errno.EAFNOSUPPORT
            flags = socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            assert ask(call, family, kind, protocol) == (ALLOWED if allowed else reason)
            assert ask(call, family, kind | flags, protocol) == (ALLOWED if allowed else reason)
    thread, vfork, fork = 0x3D0F00, 0x4111, 0x1200011  # as glibc starts them
    assert {ask(judged["clone"], flags) for flags in (thread, vfork, fork)} == {ALLOWED}
    for namespace in (0x10000000, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000):
        assert ask(judged["clone"], namespace | 17) == errno.EPERM
    for level, option in itertools.product((0, 1, 6, 17, 41), range(120)):
        answer = errno.ENOPROTOOPT if (level, option) in sandbox_runner.REFUSED_OPTIONS else ALLOWED
        assert ask(judged["setsockopt"], 3, level, option) == answer
    for control in (*range(0x5400, 0x5430), *range(0x8930, 0x89B0)):
        answer = errno.EPERM if control in sandbox_runner.REFUSED_CONTROLS else ALLOWED
        assert ask(judged["ioctl"], 0, control) == answer
    for kind in range(16):
        limit = 1 << 40  # an address whose lower half is zero
        assert ask(judged["setrlimit"], kind, limit) == (0 if kind == resource.RLIMIT_CORE else ALLOWED)
        assert ask(judged["prlimit64"], 0, kind, limit) == (0 if kind == resource.RLIMIT_CORE else ALLOWED)
        assert ask(judged["prlimit64"], 0, kind, 0, limit) == ALLOWED
        assert ask(judged["prlimit64"], 1, kind, 0, limit) == errno.EPERM
    for flags in (0, 0x22, 0x22 | 21 << 26):
        assert ask(judged["mmap"], 0, 1 << 21, 3, flags) == ALLOWED
        assert ask(judged["mmap"], 0, 1 << 21, 3, flags | 0x40000) == errno.ENOMEM
    assert [ask(judged["memfd_create"], 1 << 40, flags) for flags in (1, 2, 3, 4, 5)] == [ALLOWED] * 3 + [
        errno.EINVAL
    ] * 2


def test_the_filter_refuses_calls_of_another_kind_of_program() -> None:
    program = filter_program("x86_64")
    assert program is not None
    for number in (1, 20, 425):
        assert verdict(program, I386, number) == errno.ENOSYS
        assert verdict(program, X86_64, number | 1 << 30) == errno.ENOSYS


def test_the_filter_knows_the_numbers_that_this_system_has() -> None:
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text()))  # those of aarch64
    for name, _, number, *_ in (*REFUSED_CALLS, *NOT_TO_PROCESS_1):
        assert numbers.get(name, str(sandbox_runner.NO_CALL)) == str(number)


def test_a_kind_of_machine_whose_numbers_are_not_known_gets_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine="riscv64"))
    assert sandbox_runner.filter_system_calls() == "their numbers are not known for riscv64"


# ── the whole guest ──


def pythons() -> dict[str, str]:
    """Every Python from 3.8 on that is found: pyenv's, those on PATH under their version, and this one."""
    found: dict[str, str] = {}
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for path in sorted(root.glob("versions/3.*/bin/python3")):
        version = path.parents[1].name.split(".")[:2]
        if version[1].isdigit():
            found[".".join(version)] = str(path)
    for minor in range(8, 20):
        path_found = shutil.which(f"python3.{minor}")
        if path_found and "shims" not in path_found:
            found.setdefault(f"3.{minor}", path_found)
    found[f"3.{sys.version_info.minor}"] = sys.executable
    return {version: path for version, path in sorted(found.items()) if int(version.split(".")[1]) >= 8}


PYTHONS = pythons()


class Told:
    """What the guest told about one call."""

    def __init__(self, frames: list[dict[str, Any]]) -> None:
        self.frames = frames
        self.done = frames[-1]
        self.stdout = self._text("stdout")
        self.stderr = self._text("stderr")
        self.earlier = self._text("earlier")
        self.shown = [json.loads(frame["data"]) for frame in frames if frame["kind"] == "display"]

    def _text(self, kind: str) -> str:
        return b"".join(frame["data"] for frame in self.frames if frame["kind"] == kind).decode("utf-8", "replace")

    @property
    def status(self) -> str:
        """How it ended."""
        return str(self.done["status"])

    @property
    def lost(self) -> bool:
        """Whether the worker that ran the code is gone."""
        return bool(self.done["state"] != "preserved")

    @property
    def value(self) -> str | None:
        """The value of the last expression."""
        return self.done.get("value")

    @property
    def exception(self) -> dict[str, Any]:
        """What the code raised."""
        assert self.done["exception"]["type"], self.done
        return dict(self.done["exception"])


class Guest:
    """The guest as process 1 of a pid namespace, and the host's end of the channel."""

    numbers = itertools.count()

    def __init__(self, docker: FakeEngine, python: str, home: Path, **settings: Any) -> None:
        docker.script(python=python)
        self.home = home
        self.settings = {
            "owner": "us",
            "digest": "d",
            "working_dir": str(home),
            "cpus": 1,
            "memory_limit": 192 << 20,
            "restores": False,
            "writable_folders": [],
            "idle_timeout": 60.0,
            "adoption_time": 60.0,
            "grace": 0.6,
        }
        self.settings |= {
            "allowed_modules": [],
            "blocked_modules": [],
            "preload": [],
            "packages": "/packages/x",
            "has_proxy": False,
            "certificates": ("", False),
            "authority": "",
            **settings,
        }
        engine = Engine(docker.command, "docker", "20.10.24")
        config = Config(docker=DockerConfig(working_dir=str(home)))
        name = f"guest-{next(self.numbers)}"
        self.record = docker.folder / "containers" / name
        arguments = engine.sandbox_arguments(name, Image("image", "id", "present"), config, {})
        self.process = subprocess.Popen([docker.command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin
        assert self.process.stdout
        self.channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())
        self.frames = self._receive()
        self.prepared = 0  # how often it has told that it is
        self.begun: list[str] = []  # the calls of which it has told that they begin
        try:
            shipped = shipment(GUEST_SOURCE, "supervise", self.settings)
            while shipped:
                shipped = shipped[os.write(self.channel.writer, shipped) :]
            self.greeting = next(self.frames)
        except BaseException:
            self.close()
            raise

    def take(self) -> list[dict[str, Any]]:
        """Wait for what the guest says next; return the frames but those that are counted here."""
        readable, *_ = select.select([self.channel.reader], [], [], 20)
        assert readable, "the guest says nothing"
        frames = []
        for frame in self.channel.receive():
            if frame["kind"] == "prepared":
                self.prepared += 1
            elif frame["kind"] == "begun":
                self.begun.append(frame["id"])
            else:
                frames.append(frame)
        return frames

    def _receive(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.take()

    def worker(self) -> list[str]:
        """The processes that the supervisor has forked and not buried."""
        (supervisor,) = children(ast.literal_eval(self.record.read_text())["pid"])
        return children(supervisor)

    def start(self, code: str, state: str = "", **fields: Any) -> str:
        """Send a request, ahead of it the state; the call's id."""
        call_id = f"call-{next(self.numbers)}"
        request = {"op": "run", "id": call_id, "data": code.encode(), "session": "s", "final": False}
        request |= {"timeout": 20.0, "filename": None, "argv": [], "output_limit": 1 << 20, "packages": None}
        request |= {"state_limit": 4 << 20, **fields}
        if state:
            self.channel.send({"op": "state", "id": call_id, "data": state.encode()})
        self.channel.send(request)
        return str(request["id"])

    def wait(self, call_id: str) -> Told:
        """All frames up to the call's end."""
        frames = [next(self.frames)]
        while frames[-1]["kind"] != "done":
            frames.append(next(self.frames))
        assert {frame["id"] for frame in frames} == {call_id}
        return Told(frames)

    def read(self, path: str) -> dict[str, Any]:
        """The first piece of a file."""
        self.channel.send({"op": "read", "id": "r", "path": path, "offset": 0})
        return next(self.frames)

    def run(self, code: str, **fields: Any) -> Told:
        """Run code to its end."""
        return self.wait(self.start(code, **fields))

    def close(self) -> None:
        """Let the guest see the end of file, or kill it."""
        if self.process.poll() is not None:  # it has ended by itself, or this is the second time
            for stream in (self.process.stdin, self.process.stdout):
                assert stream
                stream.close()
            return
        self.channel.send({"op": "end"})
        try:
            self.process.communicate(timeout=5)
        except (subprocess.TimeoutExpired, ValueError):
            self.process.kill()
            self.process.communicate()


def children(process: str) -> list[str]:
    """The ids of a process' children."""
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


RENEW = "display.__func__.__globals__['os']._exit(0)"  # has the next call meet a new worker, under any import policy
MakeGuest = Callable[..., Guest]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of the guest on this Python or, if asked to, on the oldest and the newest that are found."""
    if "python" in metafunc.fixturenames:
        chosen = [f"3.{sys.version_info.minor}"]
        if metafunc.config.getoption("--other-pythons"):
            found = sorted(PYTHONS, key=lambda version: int(version.partition(".")[2]))
            chosen = list(dict.fromkeys([found[0], found[-1]]))
        metafunc.parametrize("python", chosen, indirect=True, scope="module")


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest) -> str:
    """A Python that is found here."""
    return PYTHONS[request.param]


@pytest.fixture(scope="module")
def guests() -> Iterator[dict[str, Guest]]:
    """The guests that wait for the next test, by what makes them different."""
    waiting: dict[str, Guest] = {}
    yield waiting
    for guest in waiting.values():
        guest.close()


@pytest.fixture
def make_guest(
    make_fake_engine: Callable[[str], FakeEngine],
    guests: dict[str, Guest],
    python: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MakeGuest]:
    """Makes guests with a worker that nobody used before, in a working directory of its own."""
    made: dict[str, Guest] = {}

    def make(**settings: Any) -> Guest:
        key = json.dumps([python, settings])
        if key not in guests:
            home = tmp_path_factory.mktemp("home")
            guests[key] = Guest(make_fake_engine("docker"), python, home, **settings)
        made[key] = guests.pop(key)
        return made[key]

    yield make
    for key, guest in made.items():
        with contextlib.suppress(AssertionError, EOFError, StopIteration):
            if guest.process.poll() is None and guest.run(RENEW).status == "died":
                for path in guest.home.iterdir():  # the folder itself is the new worker's already
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                guests[key] = guest
                continue
        guest.close()


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    """A guest without an import policy."""
    return make_guest()


def test_the_guest_tells_which_python_it_runs_on(guest: Guest, python: str) -> None:
    said = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout
    assert guest.run("import platform; platform.python_version()").value == repr(said.split()[1])


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("1\n2 + 3", "5"),
        ("x = 'a'\nx", "'a'"),
        ("x = 1", None),
        ("None", None),
        ("2 + 3;", None),
        ("", None),
        ("# only a comment", None),
        ("def f():\n    return 1\n\nf()", "1"),
        ("[y for y in range(3) if y]  # comment", "[1, 2]"),
        ("__name__", "'__main__'"),
        ("import sys\nsys.modules['__main__'].__dict__ is globals()", "True"),
        ("if __name__ == '__main__':\n    x = 3\nx", "3"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A", "True"),
        ("import asyncio\nawait asyncio.sleep(0, 7)", "7"),
        ("import asyncio\nx = await asyncio.sleep(0, 8)\nx", "8"),
        ("async def numbers():\n    yield 1\n    yield 2\n[x async for x in numbers()]", "[1, 2]"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)", "A(x=1)"),
        ("import typing\nclass A:\n    x: 'B'\nclass B: pass\ntyping.get_type_hints(A)['x'] is B", "True"),
        ("import inspect\ndef f():\n    return 1\ninspect.getsource(f)", r"'def f():\n    return 1\n'"),
        ("import inspect\nclass A:\n    x = 1\ninspect.getsource(A)", r"'class A:\n    x = 1\n'"),
        (
            "x = 'a\u2028b\x0c\x85'\nimport inspect\ndef f():\n    return 1\ninspect.getsource(f)",
            r"'def f():\n    return 1\n'",
        ),
    ],
)
def test_the_value_is_that_of_the_last_expression(guest: Guest, code: str, value: str | None) -> None:
    told = guest.run(code)
    assert (told.status, told.value) == ("ok", value), told.done


AT_WORK = """
import asyncio, multiprocessing, os, pty, socket, subprocess, sys, threading
from concurrent.futures import ProcessPoolExecutor
def double(x):
    return 2 * x
seen = []
thread = threading.Thread(target=lambda: seen.append("thread"))
thread.start()
thread.join()
for close_fds in (True, False):  # the latter by vfork, or posix_spawn
    seen.append(subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True, close_fds=close_fds).stdout)
with multiprocessing.get_context("fork").Pool(2) as pool:
    seen.append(pool.map(double, [1, 2]))
seen.append(os.system("exit 3") >> 8)
async def main():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(2)", stdout=-1)
    seen.append((await process.communicate())[0])
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    server.close()
    return await asyncio.get_running_loop().run_in_executor(None, double, 4)
seen.append(await main())
seen.append(len(socket.if_nameindex()))
[end.close() for end in socket.socketpair()]
seen
"""


def test_threads_children_pools_and_sockets_go_on_working_under_the_filter(guest: Guest) -> None:
    told = guest.run(AT_WORK)
    assert told.value == repr(["thread", b"1\n", b"1\n", [2, 4], 3, b"2\n", 8, 1]), told.done
    status = guest.run("print(open('/proc/self/status').read())").stdout
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)


def test_a_value_is_bounded_and_its_length_told(guest: Guest) -> None:
    told = guest.run("'x' * 1_000_000")
    assert told.done["value_length"] == 1_000_002
    assert told.value is not None
    assert len(told.value) < 33_000


def test_a_value_without_a_repr_is_described(guest: Guest) -> None:
    told = guest.run("import math\nmath.factorial(3000)")
    assert (told.status, told.value) == ("ok", f"41493596034378540855…{'0' * 20} (an int with 9,131 digits)") or (
        sys.version_info[:2] != (3, 11) and told.value and told.value.startswith("41493596034378540855")
    )
    told = guest.run("-(10 ** 5000)")
    assert told.status == "ok"
    told = guest.run("class A:\n    def __repr__(self): raise ValueError('no')\nA()")
    assert (told.status, told.value) == ("ok", "<A object, whose repr raised ValueError: no>")
    assert guest.run("display(A())\n[A()]").shown == [{"text/plain": "<A object, whose repr raised ValueError: no>"}]


EXITS = ["None", "0", "3", "-1", "256", "257", "2**31", "2**63", "-2**63", "10**5000", "True", "False", "'text'", "''"]
EXITS += ["1.0", "[]", "(1, 2)", "type('I', (int,), {'__eq__': None, '__and__': lambda *_: 'x'})(5)", "object"]
EXITS += ["type('S', (str,), {'__str__': lambda self: 1 / 0})('x')", "type('E', (), {'__getattr__': 1 / 1})()"]


@pytest.mark.parametrize("code", EXITS)
def test_code_exits_with_the_status_that_python_itself_would_make_of_it(guest: Guest, python: str, code: str) -> None:
    script = f"import sys\nsys.exit({code})"
    expected = subprocess.run([python, "-c", script], capture_output=True, check=False).returncode
    guest.run("x = 1")
    told = guest.run(script)
    assert (told.done["exit_code"], told.status) == (expected, "error" if expected else "ok")
    told = guest.run(f"import os\nchild = os.fork()\nif not child: sys.exit({code})\nos.waitpid(child, 0)[1] >> 8")
    assert told.value == str(expected)
    assert guest.run("x").value == "1"


def test_unittest_main_ends_the_call_and_not_the_session(guest: Guest) -> None:
    guest.run("x = 1")
    told = guest.run(
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail()\nunittest.main(argv=['x'])"
    )
    assert (told.status, told.done["exit_code"], told.lost) == ("error", 1, False)
    assert "FAILED (failures=1)" in told.stderr
    assert guest.run("x").value == "1"


FIGURE = """
class Figure:
    number = 3
    def savefig(self, *_, **__):
        raise ValueError("Expected end\\nof text")
Figure.__module__ = "matplotlib.figure"
"""


@pytest.mark.parametrize("use", ["display(Figure())", "Figure()", "display(Figure()); 1 / 0"])
def test_a_figure_that_can_not_be_drawn_costs_a_note_and_nothing_else(guest: Guest, use: str) -> None:
    told = guest.run(f"{FIGURE}\nopen('file', 'w').write('x')\ny = 2\n{use}", state='{"x": 1}')
    assert told.status == ("error" if "/" in use else "ok")
    assert told.shown == [{"text/plain": "[figure 3 could not be drawn: ValueError: Expected end of text]"}]
    assert told.done["files"] == [["file", 1]]
    assert [json.loads(frame["data"]) for frame in told.frames if frame["kind"] == "state"] == [{"x": 1, "y": 2}]


@pytest.mark.parametrize("separator", ["\u2028", "\x0c", "\x85", "\x1c", "\r", "\r\n"])
def test_lines_are_counted_as_python_counts_them(guest: Guest, separator: str) -> None:
    code = f"x = '''a{separator}b'''\n\nwrong = 1 / 0\nlast = 1"
    told = guest.run(code)
    assert told.exception["line"] == 3 + separator.startswith("\r")
    assert "wrong = 1 / 0\n" in told.exception["traceback"]


def test_each_call_starts_with_the_real_streams_and_says_so_once(guest: Guest) -> None:
    told = guest.run("import io, sys\nsys.stdout = io.StringIO()\nsys.stderr = None\nraise ValueError")
    assert told.exception["type"] == "ValueError"
    told = guest.run("print('visible')\nprint('too', file=sys.stderr)")
    assert (told.stdout, told.stderr) == ("visible\n", "too\n")
    assert told.shown == [
        {"text/plain": "[sys.stdout was left replaced by a StringIO object; it is the real one again]"}
    ]
    assert guest.run("print('visible')").shown == []
    guest.run(
        "class Trap:\n    def __getattribute__(self, _): raise KeyboardInterrupt\nsys.stdout, sys.stderr = True, Trap()"
    )
    assert (guest.run("1").value, guest.run("1").shown) == ("1", [])


@pytest.mark.parametrize("spoil", ["del sys.stdout, sys.stderr", "sys.stdout = sys.stderr = io.StringIO()"])
def test_what_was_written_before_the_streams_went_is_told_with_its_call(guest: Guest, spoil: str) -> None:
    told = guest.run(f"import io, sys\nprint('before', end='')\n{spoil}\nNone")
    assert (told.status, told.stdout) == ("ok", "before")
    assert guest.run("print('after')").stdout == "after\n"


@pytest.mark.parametrize("spoil", ["os.close(1)", "os.dup2(os.open('log', os.O_CREAT | os.O_WRONLY), 1)"])
def test_descriptors_of_the_streams_are_restored_too(guest: Guest, spoil: str) -> None:
    guest.run(f"import os, subprocess, sys\n{spoil}\nx = 1")
    told = guest.run("print(x)\nsubprocess.run([sys.executable, '-c', 'print(2)'])\nNone")
    assert (told.stdout, told.status) == ("1\n2\n", "ok")
    assert told.shown == [
        {"text/plain": "[descriptor 1 was left closed or redirected; it is the real sys.stdout again]"}
    ]
    assert guest.run("print('visible')").shown == []


@pytest.mark.parametrize(
    "replacement",
    [
        "Tee(sys.stdout)",
        "io.TextIOWrapper(sys.stdout.buffer)",
        "open(1, 'w', closefd=False)",
        "codecs.getwriter('utf-8')(sys.stdout.buffer)",
    ],
)
def test_a_stream_that_passes_on_to_the_real_one_stays(guest: Guest, replacement: str) -> None:
    guest.run(
        "import codecs, io, sys\nclass Tee:\n    def __init__(self, real): self.real, self.text = real, ''\n"
        "    def write(self, text): self.text += text; return self.real.write(text)\n"
        f"    def flush(self): self.real.flush()\nmine = sys.stdout = {replacement}"
    )
    told = guest.run("print('hi')\nsys.stdout is mine")
    assert (told.stdout, told.value, told.shown) == ("hi\n", "True", [])


def test_variables_functions_imports_and_future_features_stay_for_the_next_call(guest: Guest) -> None:
    guest.run("from __future__ import annotations\nimport math\nx = 41\ndef f(y: undefined): return y + 1")
    assert guest.run("def g(y: undefined): return f(y) + math.floor(_)\n").status == "ok"
    guest.run("1.5")
    assert guest.run("g(x)").value == "43"


def test_awaiting_uses_one_event_loop_for_all_calls(guest: Guest) -> None:
    guest.run(
        "import asyncio\nasync def late(): return 5\ntask = asyncio.ensure_future(late())\nawait asyncio.sleep(0)"
    )
    assert guest.run("await task").value == "5"


# ── failures ──


def test_a_traceback_shows_source_lines_and_only_the_users_frames(guest: Guest) -> None:
    told = guest.run("import json\ndef f(text):\n    return json.loads(text)\n\nf('{')")
    assert told.status == "error"
    assert told.exception["type"] == "JSONDecodeError"
    assert told.exception["line"] == 3
    files = re.findall(r'File "(.*?)", line (\d+), in (\S+)', told.exception["traceback"])
    assert files == [("<call 1>", "5", "<module>"), ("<call 1>", "3", "f")]
    assert "    return json.loads(text)\n" in told.exception["traceback"]
    assert told.exception["traceback"].startswith("Traceback (most recent call last):\n")


def test_a_traceback_reaches_into_functions_of_earlier_calls_and_into_causes(guest: Guest) -> None:
    guest.run(
        "def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise KeyError('k') from e"
    )
    told = guest.run("\nf()")
    assert told.exception["line"] == 2
    assert "    1 / 0\n" in told.exception["traceback"]
    assert "was the direct cause of" in told.exception["traceback"]
    assert "sandbox_runner" not in told.exception["traceback"]


@pytest.mark.parametrize(
    ("code", "line", "kind"),
    [
        ("1\n2\n3 / 0", 3, "ZeroDivisionError"),
        ("1\n3 / 0\n2", 2, "ZeroDivisionError"),
        ("x = (1,\n     nothing,\n     3)", 2, "NameError"),
        ("1\n2\nx = = 1", 3, "SyntaxError"),
        ("if True:\nx", 2, "IndentationError"),
        ("1\nreturn 5", 2, "SyntaxError"),
        ("\n\nimport nothing_of_that_name", 3, "ModuleNotFoundError"),
        ("\nexec('1/0')", 2, "ZeroDivisionError"),
        ("\neval('1 +')", 2, "SyntaxError"),
        ("import asyncio\nawait asyncio.sleep(0)\nawait nothing", 3, "NameError"),
    ],
)
def test_an_error_on_line_n_is_reported_there(guest: Guest, code: str, line: int, kind: str) -> None:
    told = guest.run(code)
    assert (told.exception["type"], told.exception["line"]) == (kind, line)
    assert guest.run("1").value == "1"


def test_an_error_in_a_named_script_has_its_name(guest: Guest) -> None:
    told = guest.run("import sys\nprint(sys.argv, __file__)\n1/0", filename="script.py", argv=["one"])
    assert told.stdout == f"['script.py', 'one'] {guest.home}/script.py\n"
    assert 'File "script.py", line 3, in <module>\n    1/0\n' in told.exception["traceback"]


def test_a_module_that_is_missing_is_named(guest: Guest) -> None:
    assert guest.run("import nothing.of_that_name").exception["missing"] == "nothing"


def test_an_exception_whose_text_can_not_be_had_is_reported_all_the_same(guest: Guest) -> None:
    told = guest.run("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E")
    assert told.exception["type"] == "E"
    assert told.exception["message"] == "(its str() raised ValueError)"


def test_endless_recursion_is_an_ordinary_error(guest: Guest) -> None:
    told = guest.run("def f():\n    return f()\nf()")
    assert (told.exception["type"], told.exception["line"]) == ("RecursionError", 2)
    assert len(told.exception["traceback"]) < 17_000


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "stderr"),
    [
        ("raise SystemExit", "ok", 0, ""),
        ("import sys; sys.exit(0)", "ok", 0, ""),
        ("import sys; sys.exit(3)", "error", 3, ""),
        ("import sys; sys.exit('bye')", "error", 1, "bye\n"),
        ("class E:\n    def __str__(self): raise ValueError\nraise SystemExit(E())", "error", 1, ""),
        ("exit(4)", "error", 4, ""),
    ],
)
def test_system_exit_is_told_with_its_code_and_ends_nothing(
    guest: Guest, code: str, status: str, exit_code: int, stderr: str
) -> None:
    guest.run("x = 1")
    told = guest.run(code)
    assert (told.status, told.done["exit_code"], told.stderr) == (status, exit_code, stderr)
    assert guest.run("x").value == "1"


# ── output ──


def test_stdout_and_stderr_are_kept_apart(guest: Guest) -> None:
    told = guest.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('é', end='')")
    assert (told.stdout, told.stderr) == ("out\né", "err\n")


def test_output_comes_while_the_code_runs(guest: Guest) -> None:
    call = guest.start("import os, time\nprint('here')\nwhile not os.path.exists('go'): time.sleep(0.002)\n'gone'")
    assert next(guest.frames)["data"] == b"here\n"
    (guest.home / "go").touch()
    assert guest.wait(call).value == "'gone'"


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')",
        "import os; os.system('echo out; echo err >&2')",
        "import subprocess; subprocess.run('echo out; echo err >&2', shell=True)",
        "import os, sys; sys.stdout.write('out\\n'); sys.stderr.write('err\\n'); x = os.fork() or os._exit(0)",
        "import ctypes, os; c = ctypes.CDLL(None); c.printf(b'out\\n'); c.fflush(None); os.write(2, b'err\\n')",
        "import sys, logging; sys.stdout.buffer.write(b'out\\n'); logging.warning('err') or sys.stdout.flush()",
    ],
)
def test_output_is_caught_whoever_writes_it(guest: Guest, code: str) -> None:
    told = guest.run(code)
    assert told.stdout == "out\n"
    assert told.stderr.endswith("err\n")


def test_bytes_that_are_not_utf8_become_replacement_characters(guest: Guest) -> None:
    told = guest.run("import os\nfor piece in (b'a\\xff\\xfe', b'\\xc3', b'\\xa9', b'\\xe2\\x82'): os.write(1, piece)")
    assert told.stdout == "a\ufffd\ufffdé\ufffd"


def test_a_lone_surrogate_can_be_printed(guest: Guest) -> None:
    assert guest.run("print('\\ud800')").stdout == "\\ud800\n"


def test_a_warning_is_shown_once(guest: Guest) -> None:
    told = guest.run("import warnings\nfor _ in range(3):\n    warnings.warn('careful')")
    assert told.stderr.count("<call 1>:3: UserWarning: careful") == 1
    assert told.stderr.count("UserWarning") == 1


@functools.cache
def numbers_in_lines() -> str:
    """What the code below prints."""
    return "".join(f"{number}\n" for number in range(1_500_000))


@pytest.mark.slow
def test_output_beyond_the_limit_leaves_head_tail_and_a_count(guest: Guest) -> None:
    written = numbers_in_lines()
    told = guest.run("print('\\n'.join(map(str, range(1_500_000))))", output_limit=100_000)
    omitted = [frame["bytes"] for frame in told.frames if frame["kind"] == "omitted"]
    assert len(written) > 10_000_000
    assert len(told.stdout) <= 100_000
    assert len(told.stdout) + sum(omitted) == len(written)
    head, tail = told.stdout[:5_000], told.stdout[-5_000:]
    assert (written.startswith(head), written.endswith(tail), len(omitted)) == (True, True, 1)


def test_shown_values_come_in_the_order_of_the_output(guest: Guest) -> None:
    told = guest.run(
        "class A:\n    def __repr__(self): return 'A'\n    def _repr_html_(self): return '<a>'\n"
        "print(1)\ndisplay(A())\nprint(2)\nA()"
    )
    assert [frame["kind"] for frame in told.frames] == ["stdout", "display", "stdout", "display", "done"]
    assert told.shown == [{"text/plain": "A", "text/html": "<a>"}, {"text/html": "<a>"}]
    assert [frame["is_value"] for frame in told.frames if frame["kind"] == "display"] == [False, True]
    assert told.value == "A"


# ── state ──


def test_state_goes_in_and_comes_out_with_the_names_of_what_stays_behind(guest: Guest) -> None:
    told = guest.run("import math\ny = x + [2]\nz = {1}\ndef f(): pass", state='{"x": [1]}', final=True)
    assert told.frames[-2]["kind"] == "state"
    assert json.loads(told.frames[-2]["data"]) == {"x": [1], "y": [1, 2]}
    assert told.frames[-2]["left_out"] == {"z": "set is not JSON"}


def test_state_comes_out_even_if_the_code_fails(guest: Guest) -> None:
    told = guest.run("y = 1\n1 / 0", state="{}")
    assert (told.status, json.loads(told.frames[-2]["data"])) == ("error", {"y": 1})


def test_state_of_megabytes_goes_both_ways(guest: Guest) -> None:
    rows = [[number, "é"] for number in range(30_000)]
    told = guest.run("y = len(x)", state=json.dumps({"x": rows}))
    assert json.loads(told.frames[-2]["data"]) == {"x": rows, "y": 30_000}


def test_the_state_of_a_call_that_was_never_made_is_not_the_next_ones(guest: Guest) -> None:
    guest.channel.send({"op": "state", "id": "cancelled", "data": b'{"x": 1}'})
    told = guest.run("sorted(globals().keys() & {'x', 'y'})", state="{}")
    assert told.value == "[]"


def test_what_a_call_leaves_is_removed_if_that_is_wanted(guest: Guest) -> None:
    for code, status in (("open('f', 'w').close(); x = 1", "ok"), ("x = 1; open('f', 'w').close(); 1 / 0", "error")):
        told = guest.run(code)
        assert (told.status, told.done["files"]) == (status, [["f", 0]])
        guest.channel.send({"op": "recycle", "id": "now"})
        recycled = next(guest.frames)
        assert (recycled, list(guest.home.iterdir())) == ({"kind": "recycled", "id": "now", "clean": True}, [])
        assert guest.run("x").exception["type"] == "NameError"
    guest.run("open('f', 'w').close(); x = 1")
    assert guest.run("x").value == "1", "nobody asked for that to be removed"
    assert [path.name for path in guest.home.iterdir()] == ["f"]
    assert guest.prepared <= 1, "to tell that costs a call more than all else that is done after it"


def test_a_sandbox_acknowledges_each_call(make_guest: MakeGuest) -> None:
    guest = make_guest(idle_timeout=50.0)
    calls = [guest.start("1")]
    guest.wait(calls[0])
    calls.append(guest.start("2"))
    guest.wait(calls[1])
    assert guest.begun == calls


def test_a_sandbox_that_has_imported_what_was_replaced_since_refuses_its_first_call(
    make_guest: MakeGuest, tmp_path: Path
) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "alpha.py").write_text(f"version = {version}")
    (tmp_path / "shared").symlink_to("1")
    guest = make_guest(packages=str(tmp_path), preload=["alpha"])
    while not guest.prepared:  # it would import what is there by then
        assert not guest.take()
    (tmp_path / "shared").unlink()
    (tmp_path / "shared").symlink_to("2")
    call = guest.start("import alpha; alpha.version", session=None)
    assert next(guest.frames) == {"id": call, "kind": "unfit"}
    (tmp_path / "shared").unlink()
    (tmp_path / "shared").symlink_to("1")
    assert guest.run("import alpha; alpha.version", session=None).value == "1"


def test_the_first_calls_code_is_numbered_1(guest: Guest) -> None:
    told = guest.run("import linecache\nassert sum('<call' in name for name in linecache.cache) == 1\n1 / 0")
    assert told.exception["type"] == "ZeroDivisionError"
    assert '"<call 1>"' in told.exception["traceback"]
    assert (told.stdout, told.shown, told.earlier) == ("", [], "")


def test_a_transient_call_ends_as_a_script_does_with_its_threads_and_exit_handlers(guest: Guest) -> None:
    told = guest.run(
        "import atexit, threading\natexit.register(print, 'bye')\n"
        "event = threading.Event()\nthreading.Thread(target=lambda: (event.wait(), print('thread'))).start()\n"
        "threading.Timer(0.01, event.set).start()\nprint('end')",
        final=True,
    )
    assert told.stdout == "end\nthread\nbye\n"


# ── time, interruption and death ──


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import asyncio; await asyncio.sleep(60)",
        "import os; os.system('sleep 60')",
        "import os; os.system('sleep 60')\nwhile True: pass",  # takes a second interruption
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); signal.pause()",
        "import threading; threading.Event().wait()",
    ],
)
def test_a_time_out_keeps_the_state_of_code_that_can_be_interrupted(make_guest: MakeGuest, code: str) -> None:
    guest = make_guest(grace=3.0)  # the interruption is meant, and not how long a busy machine takes for it
    guest.run("x = 1")
    told = guest.run(code, timeout=0.1)
    assert (told.status, told.lost) == ("timeout", False)
    assert guest.run("x").value == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: signal.pause()",
    ],
)
def test_a_time_out_loses_the_state_of_code_that_can_not_be_interrupted_and_says_so(guest: Guest, code: str) -> None:
    guest.run("x = 1")
    told = guest.run(code, timeout=0.1)
    assert (told.status, told.lost, told.done["exit_code"]) == ("timeout", True, -9)
    assert guest.run("x").exception["type"] == "NameError"


def test_an_interruption_that_the_host_asks_for_is_told_as_such(guest: Guest) -> None:
    call = guest.start("x = 1\nprint('on')\nwhile True: pass")
    assert next(guest.frames)["data"] == b"on\n"
    guest.channel.send({"op": "interrupt", "id": call})
    told = guest.wait(call)
    assert (told.status, told.lost, told.exception["type"]) == ("cancelled", False, "KeyboardInterrupt")
    assert guest.run("x").value == "1"


def test_an_interruption_of_another_call_does_nothing(guest: Guest) -> None:
    call = guest.start("print('on')\nimport os, time\nwhile not os.path.exists('go'): time.sleep(0.002)")
    assert next(guest.frames)["data"] == b"on\n"
    guest.channel.send({"op": "interrupt", "id": "call-of-yesterday"})
    (guest.home / "go").touch()
    assert guest.wait(call).status == "ok"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; os._exit(3)", 3),
        ("import ctypes; ctypes.string_at(0)", -11),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os; os.close(3)", 70),
    ],
)
def test_code_that_ends_its_own_process_loses_the_state_and_the_next_call_works(
    guest: Guest, code: str, exit_code: int
) -> None:
    guest.run("x = 1")
    told = guest.run(f"print('last words')\n{code}")
    assert (told.status, told.lost, told.done["exit_code"]) == ("died", True, exit_code)
    assert told.stdout == "last words\n"
    assert guest.run("'x' in globals()").value == "False"


def test_why_the_variables_were_lost_between_calls_is_told_once(guest: Guest) -> None:
    guest.run(
        "import os, threading, time\ndef f():\n    while not os.path.exists('go'): time.sleep(0.002)\n    os._exit(5)\n"
        "threading.Thread(target=f).start()"
    )
    worker = guest.worker()
    (guest.home / "go").touch()
    wait_until(lambda: guest.worker() not in (worker, []))
    assert guest.run("1").done["lost_before"] == "exit status 5"
    assert guest.run("1").done["lost_before"] is None


def test_a_child_forked_by_the_code_ends_with_its_script_and_reports_nothing(guest: Guest) -> None:
    told = guest.run(
        "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('parent' if pid else 'child')\npid > 0"
    )
    assert (told.stdout, told.value) == ("child\nparent\n", "True")
    assert guest.run("pid > 0").value == "True"


def test_processes_left_by_the_code_live_as_long_as_its_state_does(guest: Guest) -> None:
    guest.run("import subprocess\nchild = subprocess.Popen(['sleep', '60'], start_new_session=True)")
    assert guest.run("child.poll()").value is None
    guest.run("import os; os._exit(0)")
    count = "import os\nlen([name for name in os.listdir('/proc') if name.isdigit()])"
    assert guest.run(count).value == "2"  # supervisor and worker


def test_what_threads_write_after_a_call_is_told_with_the_next(guest: Guest) -> None:
    guest.run(
        "import os, threading, time\ndef f():\n    while not os.path.exists('go'): time.sleep(0.002)\n"
        "    print('late')\n    open('done', 'w').close()\nthreading.Thread(target=f).start()"
    )
    (guest.home / "go").touch()
    wait_until((guest.home / "done").exists)
    told = guest.run("print('next')")
    assert (told.earlier, told.stdout) == ("late\n", "next\n")


# ── what the code can not do ──


@pytest.mark.parametrize("code", ["open('/proc/1/mem')", "open('/proc/1/environ')", "open('/proc/1/fd/3', 'wb')"])
def test_the_code_can_not_look_into_the_supervisor(guest: Guest, code: str) -> None:
    assert guest.run(code).exception["type"] == "PermissionError"


def test_the_code_can_not_stop_the_supervisor(guest: Guest) -> None:
    told = guest.run(
        "import os, signal\nfor name in ('INT', 'TERM', 'HUP', 'KILL', 'STOP', 'CHLD', 'SEGV'):\n"
        "    try: os.kill(1, getattr(signal, 'SIG' + name))\n    except PermissionError: pass\n'alive'"
    )
    assert told.value == "'alive'"


def test_the_code_has_no_descriptors_but_its_own(guest: Guest) -> None:
    told = guest.run(
        "import os\nsorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:6], len(os.listdir('/proc/self/fd'))"
    )
    assert told.value == "([0, 1, 2, 3, 4, 5], 8)"  # and the one that the folder is read through


def test_a_forged_frame_of_another_call_is_passed_over(guest: Guest) -> None:
    told = guest.run('import os\nos.write(3, b\'{"id":"other","kind":"done","status":"ok"}\\n\')\nprint(\'real\')')
    assert (told.status, told.stdout) == ("ok", "real\n")


@pytest.mark.parametrize(
    "frame",
    [
        b"nonsense\n",
        b"[]\n",
        b"[" * 10_000 + b"\n",
        b"x" * (LINE_LIMIT + 70_000),
        b'{"data":1e6}\n',
    ],
)
def test_code_that_breaks_the_protocol_loses_its_process(guest: Guest, frame: bytes) -> None:
    (guest.home / "frame").write_bytes(frame)
    code = "import os\ndata = open('frame', 'rb').read()\nwhile data: data = data[os.write(3, data):]\nwhile True: pass"
    told = guest.run(code)
    assert (told.status, told.lost) == ("died", True)
    assert told.done["message"].startswith("the code broke the protocol between worker and supervisor: ")
    assert guest.run("1").value == "1"


def test_a_forged_kind_of_frame_is_not_passed_on(guest: Guest) -> None:
    code = 'import os\nos.write(3, b\'{"id":"ID","kind":"ready"}\\n\')\nwhile True: pass'
    call = f"call-{next(guest.numbers)}"
    guest.start(code.replace("ID", call), id=call)
    told = guest.wait(call)
    assert told.status == "died"
    assert "a frame of kind 'ready'" in told.done["message"]


# ── import policy ──


@pytest.mark.parametrize(
    "code",
    [
        "import os",
        "import os.path",
        "from os import path",
        "__import__('os')",
        "__import__('o' + 's')",
        "exec('import os')",
        "exec('import os', {})",
        "exec('import os', {'__name__': 'json', '__builtins__': __builtins__})",
        "eval('__import__(\"os\")')",
        "import importlib; importlib.import_module('o' + 's')",
        "import importlib; importlib.__import__('o' + 's')",
        "from importlib import import_module as f; f('o' + 's')",
        "import importlib; importlib.import_module('os.' + 'path')",
        "import builtins; builtins.__import__('o' + 's')",
    ],
)
def test_a_blocked_module_is_refused_by_every_ordinary_route(make_guest: MakeGuest, code: str) -> None:
    told = make_guest(blocked_modules=["os"]).run(f"\n{code}")
    assert told.exception["type"] == "ImportError"
    assert told.exception["message"] == "module 'os' may not be imported: the setting blocked_modules names it"
    assert told.exception["line"] == 2
    assert "sandbox_runner" not in told.exception["traceback"]


def test_a_module_of_the_users_own_keeps_to_the_policy_too(make_guest: MakeGuest) -> None:
    guest = make_guest(blocked_modules=["os"])
    (guest.home / "own.py").write_text("x = 1\nimport os\n")
    told = guest.run("import own")
    assert told.exception["message"].startswith("module 'os' may not be imported")


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import datetime; datetime.datetime.strptime('2024', '%Y').year", "2024"),
        ("import random; random.Random(1).random() < 1", "True"),
        ("import json; json.loads('[1]')", "[1]"),
        ("import re; re.sub('a', 'b', 'a')", "'b'"),
        ("import collections; collections.Counter('aa')['a']", "2"),
        ("import math; math.pi > 3", "True"),
        ("print('é'.encode('cp1252').decode('cp1252'))", None),
        ("from __future__ import annotations", None),
    ],
)
def test_allowed_modules_work_although_their_own_imports_are_not_allowed(
    make_guest: MakeGuest, code: str, value: str | None
) -> None:
    allowed = ["math", "datetime", "random", "json", "re", "collections"]
    blocked = ["os", "sys", "subprocess", "shutil", "pathlib"]
    guest = make_guest(allowed_modules=allowed, blocked_modules=blocked)
    told = guest.run(code)
    assert (told.status, told.value) == ("ok", value), told.done
    assert "allowed_modules permits only collections, datetime" in guest.run("import csv").exception["message"]


# ── the guest and its host ──


def test_a_guest_without_session_ends_with_its_host(
    make_fake_engine: Callable[[str], FakeEngine], python: str, tmp_path: Path
) -> None:
    guest = Guest(make_fake_engine("docker"), python, tmp_path)
    guest.run("1", session=None, final=True)
    guest.process.communicate(timeout=20)  # closes its standard input
    assert guest.process.returncode == 0


@pytest.mark.slow
def test_a_guest_that_was_never_used_waits_a_while_for_another_host(
    make_fake_engine: Callable[[str], FakeEngine], python: str, tmp_path: Path
) -> None:
    docker = make_fake_engine("docker")
    guest = Guest(docker, python, tmp_path, adoption_time=0.5)
    with guest.process:
        assert guest.process.stdin
        guest.process.stdin.close()
        for _ in range(3):  # the first may still be taken by the socket of a host that is just ending
            assert next(guest.frames) == {"kind": "farewell"}
        assert docker.containers() != []
        guest.process.wait(timeout=20)
    wait_until(lambda: docker.containers() == [])


def test_a_session_that_nobody_comes_back_to_ends_by_itself(
    make_fake_engine: Callable[[str], FakeEngine], python: str, tmp_path: Path
) -> None:
    docker = make_fake_engine("docker")
    guest = Guest(docker, python, tmp_path, idle_timeout=0.05)
    guest.run("1")
    guest.process.kill()
    guest.process.communicate()
    wait_until(lambda: docker.containers() == [])


# ── code as it comes ──

FENCED = "```python\nx = 1\n{}\n```"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (FENCED.format("print(x)"), "1\n"),
        ("\n~~~\nprint(2)\n~~~\n", "2\n"),
        ("```\nprint(3)", "3\n"),
        ("```py\na = 4\n```\nThen print it:\n```\nprint(a)\n```", "4\n"),
        ("\ufeffprint(5)", "5\n"),
        ("    y = 6\n    if y:\n        print(y)\n", "6\n"),
        ("\tprint('''a\n\tb''')", "a\nb\n"),
        (
            FENCED.format("!echo $x {x} {x:2} ${HOME+y} '{\"x\": 1}' {print} {no}"),
            '1 1 {x:2} y {"x": 1} {print} {no}\n',
        ),
        ("!echo 'it'\"'\"'s'\nprint(7)", "it's\n7\n"),
        ("!echo a \\\n  b\nprint(8)", "a b\n8\n"),
        ("for i in (1, 2):\n    !echo {i}", "1\n2\n"),
        ("def f(here):\n    !echo $here\nf(9)", "9\n"),
        ("lines = !echo a; echo b\nprint(lines)", "['a', 'b']\n"),
        ("%matplotlib inline\n%load_ext autoreload\n%autoreload 2\nprint(10)", "10\n"),
        ("%%sh\necho $((5 + 6))", "11\n"),
        ("%%script sh\necho 12", "12\n"),
        ("%%writefile a.txt\nline\n", ""),
        ("%%python\nprint(15)", "15\n"),
        ("print(17 if 5\n%3 else 0)", "17\n"),
        ("s = '''\n!ls\n%time\n```\n'''\nprint(len(s))", "15\n"),
    ],
)
def test_code_runs_as_it_comes(guest: Guest, code: str, output: str) -> None:
    told = guest.run(code)
    assert told.status == "ok", told.done
    assert (told.stdout, told.stderr) == (output, "")


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        (FENCED.format("1 / 0"), 3, "division by zero"),
        ("    x = 1\n    1 / 0", 2, "division by zero"),
        ("\ufeff\n1 / 0", 2, "division by zero"),
        ("!true\n1 / 0", 2, "division by zero"),
        ("!true \\\n  x\n1 / 0", 3, "division by zero"),
        (FENCED.format("y = ="), 3, "invalid syntax"),
        ("x = 1\n%sql select", 2, "%sql is a magic of IPython that is not available here: write it in Python"),
        ("%%sql\nselect", 1, "%%sql is a magic of IPython that is not available here: write it in Python"),
        ("def broken(:\n    !ls", 1, "invalid syntax"),
        ("x = 1\nx != !ls", 2, "invalid syntax"),
        (
            "!pip install -q nonesuch==1 'other>=2' 2>/dev/null | tail",
            1,
            "code can't install packages: pip install nonesuch==1 other>=2",
        ),
        ("x = 1\n%pip install -r requirements.txt", 2, "code can't install packages: pip install -r requirements.txt"),
        ("!{sys.executable} -m pip install nonesuch", 1, "code can't install packages: pip install nonesuch"),
        ("breakpoint()", 1, "a debugger can't be answered in the sandbox; print what you need to see"),
        ("import pdb\npdb.set_trace()", 2, "a debugger can't be answered in the sandbox; print what you need to see"),
        ("input('name? ')", 1, "input() can't be answered in the sandbox; put the value into the code instead"),
        (
            "import getpass\ngetpass.getpass()",
            2,
            "input() can't be answered in the sandbox; put the value into the code instead",
        ),
    ],
)
def test_an_error_is_on_the_line_that_was_sent(guest: Guest, code: str, line: int, message: str) -> None:
    told = guest.run(code)
    assert (told.exception["message"].split(" (")[0], told.exception["line"]) == (message, line)
    assert told.stdout == ""


def test_a_shell_line_that_fails_is_told_and_ends_nothing(guest: Guest) -> None:
    told = guest.run("!exit 3\n!nonesuch\nx = !nonesuch\nprint(x)")
    assert (told.status, told.stdout) == ("ok", "[]\n")
    absent = "[exit status 127: there is no such command in this image]"
    assert [bundle["text/plain"] for bundle in told.shown] == ["[exit status 3]", absent, absent]
    assert "nonesuch" in told.stderr


def test_a_shell_line_is_stopped_with_its_call_and_streams(guest: Guest) -> None:
    call = guest.start("x = 1\n!echo begun; sleep 50\nprint('never')", timeout=60)
    first = next(guest.frames)
    assert (first["kind"], first["data"]) == ("stdout", b"begun\n")
    guest.channel.send({"op": "interrupt", "id": call})
    told = guest.wait(call)
    assert (told.status, told.lost) == ("cancelled", False)
    assert guest.run("!echo $x").stdout == "1\n"


def test_a_shell_line_obeys_the_import_policy(make_guest: MakeGuest) -> None:
    guest = make_guest(blocked_modules=["subprocess"])
    assert "blocked_modules" in guest.run("!echo hi").exception["message"]


INSTALLS = r"""
import os, sys
os.makedirs("lib/there-2.0.dist-info")
open("lib/there-2.0.dist-info/METADATA", "w").write("Name: there\nVersion: 2.0\n")
sys.path.append("lib")
!pip install there && echo $((40 + 2)); echo 43
%pip install -U 'There[more]>1' there==2.0 2> /dev/null
!pip list | tail -1 > list.txt
!python3 -m pip install -q there>=1 | tail
%pip install there==3
"""


def test_packages_that_are_there_need_no_installation(guest: Guest) -> None:
    told = guest.run(INSTALLS)
    assert told.stdout.startswith("42\n43\n")
    assert "there==2.0\n" in told.stdout
    notes = [bundle["text/plain"] for bundle in told.shown]
    assert notes == [
        "[installed already: there]",
        "[installed already: There[more]>1, there==2.0]",
        "[installed already: there>=1]",
    ]
    assert told.exception["message"] == "code can't install packages: pip install there==3"


def test_magics_that_time_tell_the_time_and_keep_the_value(guest: Guest) -> None:
    told = guest.run("async def f(): return 5\n%time x = 3\n%time await f() + x")
    assert told.value == "8"
    assert re.fullmatch(r"(CPU time: \S+ \S+, wall time: \S+ \S+\n){2}", told.stdout)
    told = guest.run("%%time\nx += 1\nx")
    assert (told.value, told.stdout.count("wall time")) == ("4", 1)
    for code in ("%timeit -n 10 -r 3 x + 1", "%%timeit -n 10 -r 3 y = x\ny + 1"):
        pattern = r"\S+ \S+ ± \S+ \S+ per loop \(mean ± std. dev. of 3 runs, 10 loops each\)\n"
        assert re.fullmatch(pattern, guest.run(code).stdout)


def test_files_are_written_and_displays_made_by_magics(guest: Guest) -> None:
    guest.run("%%writefile script.py\nprint('ran')\n")
    guest.run("%%writefile -a script.py\nprint('more')")
    assert guest.run("!cat script.py").stdout == "print('ran')\nprint('more')\n"
    assert guest.run("%%html\n<b>").shown == [{"text/html": "<b>\n"}]


# ── IPython, where it is not installed ──


def test_ipythons_display_works_without_ipython(guest: Guest) -> None:
    told = guest.run(
        "from IPython.display import HTML, JSON, SVG, Image, Latex, Markdown, clear_output, display\n"
        "from IPython import get_ipython\nfrom IPython.core.display import HTML as Old\n"
        "open('a.png', 'wb').write(b'\\x89PNG\\r\\n\\x1a\\n' + bytes(20))\n"
        "handle = display(HTML('<b>'), display_id='x')\nhandle.update(Markdown('*m*'))\nclear_output(wait=True)\n"
        "display(JSON({'a': [1]}), Latex('$x$'), SVG('<svg/>'), Image('a.png'), Image(url='https://x/y.png'))\n"
        "display({'text/html': '<i>'}, raw=True)\nprint(get_ipython())"
    )
    assert told.status == "ok", told.done
    assert told.stdout == "None\n"
    png = "iVBORw0KGgoAAAAAAAAAAAAAAAAAAAAAAAAAAA=="
    forms = [{mime: form for mime, form in bundle.items() if mime != "text/plain"} for bundle in told.shown]
    assert forms == [
        {"text/html": "<b>"},
        {"text/markdown": "*m*"},
        {"application/json": '{"a": [1]}'},
        {"text/latex": "$x$"},
        {"image/svg+xml": "<svg/>"},
        {"image/png": png},
        {"text/html": '<img src="https://x/y.png">'},
        {"text/html": "<i>"},
    ]


def test_the_real_ipython_is_preferred_and_displays_as_ours(guest: Guest) -> None:
    told = guest.run(
        "import os, sys\nos.makedirs('lib/IPython/core')\nopen('lib/IPython/__init__.py', 'w').write('real = True')\n"
        "open('lib/IPython/core/__init__.py', 'w').close()\n"
        "open('lib/IPython/core/display_functions.py', 'w').write('def display(*values): print(values)')\n"
        "open('lib/IPython/display.py', 'w').write('from IPython.core.display_functions import *')\n"
        "sys.path.insert(0, 'lib')\nimport IPython\nfrom IPython.display import display\ndisplay(7)\nIPython.real"
    )
    assert (told.value, told.stdout, told.shown) == ("True", "", [{"text/plain": "7"}])


# ── libraries and limits ──


def test_code_counts_as_many_processors_as_it_may_use(guest: Guest) -> None:
    told = guest.run(
        "import multiprocessing, os\n(os.cpu_count(), multiprocessing.cpu_count(), len(os.sched_getaffinity(0)))"
    )
    assert told.value == "(1, 1, 1)"


SPAWN = "pool = multiprocessing.get_context('spawn').Pool(1)\ntry:\n    print(pool.{})\nfinally:\n    pool.terminate()"


def test_processes_are_forked_and_others_are_refused_what_they_can_not_find(guest: Guest) -> None:
    told = guest.run(
        "import functools, math, multiprocessing, multiprocessing.pool\ndef f(x): return x + 1\n"
        "with multiprocessing.Pool(1) as pool: print(pool.map(f, [1]))\n"
        "multiprocessing.get_start_method()"
    )
    assert (told.stdout, told.value) == ("[2]\n", "'fork'")
    for use in ("map(f, [1])", "apply(functools.partial(f, 1))", "starmap(f, [(1,)])", "imap(f, [1])"):
        told = guest.run(SPAWN.format(use))
        assert told.exception["message"].startswith("processes started by spawn can't find f, which this code defined")
    assert guest.run(SPAWN.format("map(math.sqrt, [4])")).stdout == "[2.0]\n"
    told = guest.run(
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "with multiprocessing.pool.ThreadPool(1) as pool: print(pool.map(f, [1]))"
    )
    assert told.stdout == "[2]\n"


# ── pictures ──

LIBRARY = """
import os, sys
def library(name, text):
    path = "lib/" + name.replace(".", "/") + ".py"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write(text)
sys.path.insert(0, "lib")
PNG = b"\\x89PNG\\r\\n\\x1a\\n"
"""


def test_pictures_that_a_call_saves_are_shown_once(guest: Guest) -> None:
    told = guest.run(
        f"{LIBRARY}\nfor name in 'edcba': open(f'{{name}}.png', 'wb').write(PNG + name.encode())\n"
        "open('no.png', 'w').write('text')\nopen('big.png', 'wb').write(PNG + bytes(3 << 20))\n"
        "open('same.png', 'wb').write(PNG + b'shown')\n"
        "class Picture:\n    def _repr_png_(self): return PNG + b'shown'\ndisplay(Picture())"
    )
    notes = [bundle["text/plain"] for bundle in told.shown if bundle["text/plain"][0] == "["]
    assert notes == [*(f"[saved as {name}.png]" for name in "edcb"), "[2 more pictures were saved, and are not shown]"]
    assert len([bundle for bundle in told.shown if "image/png" in bundle]) == 5
    assert guest.run("open('a.png', 'rb').read()[:0]").shown == []
    assert [bundle["text/plain"] for bundle in guest.run("open('a.png', 'ab').write(b'more')\nNone").shown] == [
        "[saved as a.png]",
        "a.png",
    ]


IMAGE = """
class Image:
    def save(self, path): open(path, "wb").write(b"\\x89PNG\\r\\n\\x1a\\n1")
    def _repr_png_(self): return b"\\x89PNG2"
    def show(self):
        from PIL import ImageShow
        return ImageShow.show(self)
"""


def test_an_image_is_shown_by_its_show_and_not_again_as_a_file(guest: Guest) -> None:
    told = guest.run(
        f"{LIBRARY}\nlibrary('PIL.ImageShow', 'def show(image, **_): raise OSError')\nlibrary('PIL.Image', {IMAGE!r})\n"
        "from PIL.Image import Image\nimage = Image()\nimage.save('a.png')\nimage.show()\nImage().save('b.png')"
    )
    assert told.value is None
    assert [bundle["text/plain"][:15] for bundle in told.shown] == ["<PIL.Image.Imag", "[saved as b.png", "b.png"]


# ── restoring a session ──

CRASHES = {
    "ends its process": "import os; os._exit(3)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "aborts": "import os; os.abort()",
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "becomes another program": "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 4'])",
    "ignores the interruption": "import time\nwhile True:\n    try: time.sleep(9)\n    except KeyboardInterrupt: pass",
    "breaks the protocol": "import os; os.write(3, b'nonsense\\n'); __import__('time').sleep(60)",
    "kills all that it can": "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: pass\nos._exit(1)",
}
VARIABLES = """
import os, random, sys
x, numbers = 1, [1, 2, 3]
def f(y): return x + y
class A: z = 5
random.seed(7); random.random()
os.makedirs("folder"); os.chdir("folder")
log = open("log", "w+")
open("before", "w").write("kept")
"""
SAME = "(x, numbers, f(1), A.z, random.random(), os.getcwd()[-6:], log.write('more'), sorted(os.listdir('.')))"


@pytest.fixture
def restoring(make_guest: MakeGuest) -> Iterator[Guest]:
    """A guest that restores sessions; it is of no use to other tests."""
    guest = make_guest(restores=True, unique=next(Guest.numbers))
    yield guest
    guest.close()


def copy_of(guest: Guest) -> str:
    """The id of the worker's sleeping copy, once it is there and the intermediate process is gone."""
    wait_until(lambda: len(guest.worker()) == 2)
    return guest.worker()[1]


@pytest.mark.slow
@pytest.mark.parametrize("crash", [name for name in CRASHES if name != "kills all that it can"])
def test_a_call_that_crashes_costs_its_session_nothing_again_and_again(restoring: Guest, crash: str) -> None:
    restoring.run(VARIABLES)
    for _ in range(2):
        copy_of(restoring)
        told = restoring.run(f"x = 2; numbers.clear(); open('after', 'w').close()\n{CRASHES[crash]}", timeout=1)
        assert (told.done["state"], told.lost, told.done["lost_before"]) == ("restored", True, None)
        assert told.status == ("timeout" if "interruption" in crash else "died")
    expected = random.Random(7)
    assert expected.random() < 1
    told = restoring.run(SAME)
    assert told.value == repr((1, [1, 2, 3], 2, 5, expected.random(), "folder", 4, ["after", "before", "log"]))
    assert told.done["state"] == "preserved"
    assert told.done["lost_before"] is None


def test_code_does_not_notice_the_copy(restoring: Guest) -> None:
    restoring.run("import os, signal\nheard = []\nsignal.signal(signal.SIGCHLD, lambda *_: heard.append(1))")
    copy = copy_of(restoring)
    assert restoring.run("try: os.wait()\nexcept ChildProcessError: print('none')\nheard").stdout == "none\n"
    assert restoring.run("heard").value == "[]"
    assert restoring.run("sorted(map(int, os.listdir('/proc/self/fd')))[:4]").value == "[0, 1, 2, 3]"
    wait_until(lambda: copy not in restoring.worker())

    def held() -> list[str]:
        with contextlib.suppress(OSError):  # it is on its way
            descriptors = Path(f"/proc/{copy_of(restoring)}/fd").iterdir()
            return sorted(os.readlink(path).partition(":")[0] for path in descriptors)
        return []

    wait_until(lambda: held() == ["/dev/null"] * 7 + ["socket"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "x = bytearray(80 << 20)",
        "import subprocess; p = subprocess.Popen(['/bin/sh', '-c', 'while :; do :; done'])",
        "import os; ends = os.pipe()",
        "import socket; s = socket.socket()",
        "import mmap; shared = mmap.mmap(-1, 4096)",
        "import asyncio\ntask = asyncio.ensure_future(asyncio.sleep(60))\nawait asyncio.sleep(0)",
    ],
)
def test_no_copy_is_made_where_it_would_not_be_a_true_one(restoring: Guest, code: str) -> None:
    restoring.run("x = 1")
    copy = copy_of(restoring)
    restoring.run(code)
    wait_until(lambda: copy not in restoring.worker())
    told = restoring.run("import os; os._exit(3)")
    assert (told.done["state"], told.status) == ("lost", "died")
    restoring.run("x = 1")
    copy_of(restoring)


def test_a_session_that_has_used_asyncio_can_do_so_after_it_was_restored(restoring: Guest) -> None:
    restoring.run("import asyncio\nasync def f(x):\n    await asyncio.sleep(0.01)\n    return x\nawait f(1)")
    copy_of(restoring)
    assert restoring.run("import os; os._exit(3)").done["state"] == "restored"
    copy_of(restoring)
    assert restoring.run("import gc; gc.collect()\nawait asyncio.gather(f(1), f(2))").value == "[1, 2]"
    assert restoring.run("await f(3)").value == "3"


def test_who_kills_the_copy_loses_only_what_it_was_for(restoring: Guest) -> None:
    restoring.run("x = 1")
    os.kill(int(copy_of(restoring)), 9)
    assert restoring.run("x += 1; x").value == "2"
    copy_of(restoring)
    told = restoring.run(CRASHES["kills all that it can"])
    assert told.done["state"] == "lost", told.done
    assert restoring.run("'x' in globals()").value == "False"


def test_a_worker_that_dies_between_calls_is_restored_without_a_word(restoring: Guest) -> None:
    restoring.run("x = 1")
    copy = copy_of(restoring)
    os.kill(int(restoring.worker()[0]), 9)
    wait_until(lambda: copy in restoring.worker()[:1])
    told = restoring.run("x")
    assert (told.value, told.done["lost_before"]) == ("1", None)


def test_what_a_killed_call_left_running_is_gone(restoring: Guest) -> None:
    restoring.run("import os, subprocess")
    copy_of(restoring)
    told = restoring.run(
        "command = ['/bin/sh', '-c', 'while :; do :; done']\n"
        "[subprocess.Popen(command, start_new_session=True) for _ in 'abc']\nos._exit(1)"
    )
    assert told.done["state"] == "restored"
    copy_of(restoring)
    assert len(restoring.worker()) == 2


def test_code_can_not_forge_a_copy_with_a_key_that_it_does_not_know(restoring: Guest) -> None:
    told = restoring.run(
        "import array, json, os, socket\n"
        "with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s, socket.socket() as other:\n"
        "    s.setblocking(False)\n"
        "    for key in (None, '', 0, 'x' * 32):\n"
        "        for said in (json.dumps({'key': key, 'process': 7}), 'x', '[]', '7', json.dumps({'key': key})):\n"
        "            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [other.fileno()] * 3))\n"
        "            try: s.sendmsg([said.encode()], [rights], 0, '\\0python-docker-mcp-copy')\n"
        "            except BlockingIOError: pass\n"
        "os._exit(3)"
    )
    assert told.done["state"] == "lost", told.done
    assert restoring.run("1").value == "1"


@pytest.mark.parametrize(
    "change",
    [
        "os.fork = None",
        "os.fork = lambda: 0",
        "os.waitid = os.listdir = None",
        "sys.modules['random'] = 7",
        "signal.signal = signal.getitimer = None",
        "os.register_at_fork(before=lambda: 1 / 0, after_in_child=lambda: 1 / 0)",
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)); resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))",
    ],
)
def test_whatever_code_does_to_what_copies_need_the_next_call_is_told_truly(restoring: Guest, change: str) -> None:
    restoring.run(f"import os, random, resource, signal, sys\nx = 1\n{change}")
    told = restoring.run("x", timeout=1)
    assert told.status != "ok" or told.value == "1"
    was_there = told.value == "1"
    told = restoring.run("import os; os._exit(3)", timeout=1)
    after = restoring.run("'x' in globals()")
    assert after.status != "ok" or (after.value == "True") == (was_there and told.done["state"] != "lost")


@pytest.mark.slow
@pytest.mark.parametrize("process", ["1 << 70", "2.5", "-1", "1", "[]", "None", "os.getpid()"])
def test_who_steals_the_key_of_a_copy_can_not_end_the_supervisor(restoring: Guest, process: str) -> None:
    restoring.run(
        "import array, json, os, socket, sys\n"
        "def steal():\n"
        "    key = sys._getframe(1).f_locals['key']\n"
        "    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s, open('/dev/null') as other:\n"
        "        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [other.fileno()] * 3))\n"
        f"        said = json.dumps({{'key': key, 'process': {process}}}).encode()\n"
        "        s.sendmsg([said], [rights], 0, '\\0python-docker-mcp-copy')\n"
        "    open('stolen', 'w').close()\n"
        "os.register_at_fork(before=steal)"
    )
    wait_until((restoring.home / "stolen").exists)
    assert restoring.run("import os; os._exit(3)").status == "died"
    assert restoring.run("6 * 7").value == "42"


def test_a_session_is_not_restored_where_that_is_switched_off(guest: Guest) -> None:
    guest.run("x = 1")
    assert guest.run("import os; os._exit(3)").done["state"] == "lost"


# ── what a call leaves ──


def test_each_call_has_working_streams_whatever_the_last_one_did_to_them(guest: Guest) -> None:
    for spoil in (
        "import io, sys; sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8'); print('mine')",
        "import sys; sys.stdout.detach(); sys.stderr.detach()",
        "import sys; sys.__stdout__.close(); sys.stdin.close()",
        "import os; os.close(0); os.close(1)",
        "exit()",
        "import sys; del sys.stdout, sys.stdin",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout = sys.stderr = None",
        "import sys\nclass Tee:\n    def write(self, text): sys.__stdout__.write(text)\nsys.stdout = Tee()",
    ):
        assert guest.run(f"x = 1\n{spoil}").status == "ok", spoil
        told = guest.run("import sys; print('out'); print('err', file=sys.stderr); x, sys.stdin.read()")
        assert (told.stdout, told.stderr, told.value) == ("out\n", "err\n", "(1, '')"), spoil
        guest.run("del x")


def test_what_python_writes_to_its_two_streams_comes_in_the_order_in_which_it_was_written(guest: Guest) -> None:
    told = guest.run(
        "import logging, sys\nlogging.basicConfig(level=logging.INFO)\n"
        "for n in range(20):\n    print('out', n)\n    print('err', n, file=sys.stderr)\n    logging.info(n)"
    )
    written = b"".join(frame["data"] for frame in told.frames if frame["kind"] in ("stdout", "stderr")).decode()
    assert written == "".join(f"out {n}\nerr {n}\nINFO:root:{n}\n" for n in range(20))


def test_timers_and_handlers_that_a_call_leaves_can_not_end_an_idle_session(guest: Guest) -> None:
    told = guest.run(
        "import os, signal, threading\nx = 1\ndef late(*_): raise TimeoutError('late')\n"
        "signal.signal(signal.SIGALRM, late)\nsignal.signal(signal.SIGUSR1, late)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.02)"
    )
    assert told.shown == [{"text/plain": "[a timer that the code left running was stopped]"}]
    os.kill(int(guest.worker()[0]), signal.SIGUSR1)
    told = guest.run("import time; time.sleep(0.05); x, signal.getsignal(signal.SIGUSR1) is late")
    assert (told.value, told.done["lost_before"]) == ("(1, True)", None)


def test_threads_that_send_signals_to_the_idle_worker_end_nothing(guest: Guest) -> None:
    guest.run(
        "import _thread, signal, threading, time\nx = 1\ndef late(*_): raise TimeoutError('late')\n"
        "signal.signal(signal.SIGUSR1, late)\ndef disturb():\n    for _ in range(20):\n        time.sleep(0.005)\n"
        "        _thread.interrupt_main(); signal.raise_signal(signal.SIGUSR1)\n"
        "t = threading.Thread(target=disturb); t.start()"
    )
    wait_until(lambda: len(os.listdir(f"/proc/{guest.worker()[0]}/task")) == 1)
    told = guest.run("x")
    assert (told.value, told.done["lost_before"]) == ("1", None), told.done


def test_what_an_interrupted_loop_has_printed_is_told_once(guest: Guest) -> None:
    code = (
        "import os, signal, threading\n"
        "threading.Timer(0.0004, os.kill, (os.getpid(), signal.SIGINT)).start()\nn = 0\n"
        "while True:\n    print(n); n += 1"
    )
    for _ in range(20):
        told = guest.run(code)
        assert told.exception["type"] == "KeyboardInterrupt"
        numbers = list(map(int, told.stdout.split()))
        assert numbers == list(range(len(numbers)))


def test_handlers_that_raise_at_any_moment_cost_calls_and_never_the_session(guest: Guest) -> None:
    storm = (
        "import _thread, signal, threading, time\nkept = 1\ndef late(*_): raise TimeoutError('late')\n"
        "signal.signal(signal.SIGUSR1, late)\ndef disturb():\n    for _ in range(60):\n        time.sleep(0.0002)\n"
        "        _thread.interrupt_main(); signal.raise_signal(signal.SIGUSR1)\n"
        "threading.Thread(target=disturb).start()"
    )
    for _ in range(10):
        for code in (storm, "display(1); display(2)"):
            assert guest.run(code).done["lost_before"] is None
        wait_until(lambda: len(os.listdir(f"/proc/{guest.worker()[0]}/task")) == 1)
        assert guest.run("kept").done["lost_before"] is None
    assert guest.run("kept").value == "1"


def test_what_follows_the_code_is_not_the_codes_time(guest: Guest) -> None:
    told = guest.run("import atexit, time; atexit.register(time.sleep, 0.6)\n1", timeout=0.4, final=True)
    assert (told.status, told.value) == ("ok", "1")


def test_variables_are_encoded_only_as_far_as_anyone_wants_them(guest: Guest) -> None:
    told = guest.run("x = 1\nrows = [[n] * 10 for n in range(50_000)]\ntext = 'y' * 5000", state="{}", state_limit=4000)
    (state,) = [frame for frame in told.frames if frame["kind"] == "state"]
    assert json.loads(state["data"]) == {"x": 1}
    assert state["left_out"] == {"rows": "too large: 50000 values", "text": "too large: 5000 characters"}


def test_our_own_work_leaves_no_trace_in_the_codes_logs_and_warnings(guest: Guest) -> None:
    told = guest.run(
        "import logging, sys, types, warnings\n"
        "logging.basicConfig(level=logging.DEBUG)\nwarnings.simplefilter('error')\n"
        "image = types.ModuleType('PIL.Image')\ndef open(*_):\n    logging.debug('chunk'); warnings.warn('old')\n"
        "image.open = open\npil = types.ModuleType('PIL'); pil.Image = image\n"
        "sys.modules.update({'PIL': pil, 'PIL.Image': image})\n"
        "class Picture:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n\\x1a\\n'\ndisplay(Picture())\n"
        "logging.root.manager.disable"
    )
    assert (told.stderr, told.value, told.status) == ("", "0", "ok")
    assert "image/png" in told.shown[0]
    told = guest.run("!pip install sandbox-nonesuch")
    assert told.exception["type"] == "ModuleNotFoundError"
    guest.run("warnings.resetwarnings()")


def test_names_of_modules_count_as_installed_where_they_are(guest: Guest) -> None:
    assert guest.run("!pip install json").shown == [{"text/plain": "[installed already: json]"}]
    assert guest.run("!pip install json==9").exception["message"] == "code can't install packages: pip install json==9"


def test_in_a_burst_of_calls_a_copy_is_made_now_and_then_and_its_age_is_told(restoring: Guest) -> None:
    restoring.run("n = 0")
    copy_of(restoring)
    for _ in range(5):
        restoring.run("n += 1")
    told = restoring.run("n += 100; import os; os._exit(3)")
    behind = told.done["behind"]
    assert told.done["state"] == "restored"
    assert restoring.run("n").value == str(5 - behind), "it is as old as it says"


def test_children_of_the_code_find_what_is_installed(make_guest: MakeGuest, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    (folder / "bin").mkdir(parents=True)
    (folder / "humble.py").write_text("print('imported')")
    (folder / "dataclasses.py").write_text("1 / 0  # as of an old backport: the standard library's comes first")
    (folder / "bin/humble").write_text("#!/bin/sh\necho run\n")
    (folder / "bin/humble").chmod(0o755)
    guest = make_guest(packages=str(tmp_path), unique=next(Guest.numbers))
    guest.channel.send({"op": "use", "id": "q", "session": "s", "packages": str(folder)})
    assert next(guest.frames) == {"id": "q", "kind": "used", "stale": []}
    told = guest.run(
        "import os, subprocess, sys, tempfile\n"
        "run = lambda *command: print(subprocess.run(command, capture_output=True, text=True).stdout, end='')\n"
        "run(sys._base_executable, '-c', 'import dataclasses, humble')\nrun('humble')"
    )
    assert told.stdout == "imported\nrun\n"
    guest.close()


def test_what_is_cleared_is_gone_at_once_or_when_something_else_is_shown(guest: Guest) -> None:
    loop = "from IPython.display import clear_output, display\nfor n in range(30):\n    "
    for show in ("print(n)", "display(n)"):
        told = guest.run(f"{loop}clear_output(wait=True)\n    {show}")
        assert [frame["kind"] for frame in told.frames].count("clear") == 30
        last = [frame["kind"] for frame in told.frames][-3:]
        assert last == ["clear", "stdout" if "print" in show else "display", "done"]
    told = guest.run(f"{loop}print(n, end='')\n    clear_output(wait=True)")
    assert [frame["kind"] for frame in told.frames][-2:] == ["stdout", "done"], "the last one stays"
    told = guest.run("from IPython.display import clear_output\nprint(1)\nclear_output()")
    assert [frame["kind"] for frame in told.frames] == ["stdout", "clear", "done"]
    assert guest.run("print(2)").stdout == "2\n"


# ── what a process keeps from call to call ──

WORK = "import asyncio\nasync def work(seconds=0.02):\n    await asyncio.sleep(seconds)\n    return 42\n"
WARN = "import warnings\nwarnings.warn('careful')"


@pytest.mark.parametrize(
    ("calls", "value"),
    [
        ((f"{WORK}task = asyncio.create_task(work())", "task.result()"), "42"),
        ((f"{WORK}task = asyncio.get_event_loop().create_task(work())", "task.result()"), "42"),
        ((f"{WORK}task = asyncio.ensure_future(work())", "asyncio.run(work()), task.result()"), "(42, 42)"),
        ((f"{WORK}task = asyncio.create_task(work(1.3))", "await task"), "42"),
        ((f"{WORK}asyncio.run(work())", "asyncio.get_event_loop().run_until_complete(work())"), "42"),
        (
            (
                ("import asyncio, contextvars\nv = contextvars.ContextVar('v', default=0)\n"
                "await asyncio.sleep(0)\ntoken = v.set(5)"),
                "v.get()",
            ),
            "5",
        ),
        (
            (
                "import contextvars\nv = contextvars.ContextVar('v', default=0)\ntoken = v.set(5)",
                "v.reset(token)\nv.get()",
            ),
            "0",
        ),
        (("import gettext\ngettext.install('x')\n_('a')", "_('hello')", "5", "_('b')"), "'b'"),
        (("6 * 7", "_ + 1"), "43"),
        (
            (
                "import importlib\nopen('rules.py', 'w').write('RATE = 1')\nimport rules",
                "open('rules.py', 'w').write('RATE = 2')\nimportlib.reload(rules).RATE",
            ),
            "2",
        ),
        (
            ("%time 1\nclass Tank:\n    size = 1\n", "import inspect\ninspect.getsource(Tank)"),
            "'class Tank:\\n    size = 1\\n'",
        ),
    ],
)  # fmt: skip
def test_what_goes_on_in_the_process_goes_on_from_call_to_call(guest: Guest, calls: Sequence[str], value: str) -> None:
    *before, last = [guest.run(code) for code in calls]
    assert {told.status for told in before} == {"ok"}, [told.exception for told in before]
    assert last.value == value, last.exception


def test_a_warning_comes_anew_in_each_call_and_once_in_each(guest: Guest) -> None:
    for _ in range(2):
        assert guest.run(f"for _ in range(2):\n    {WARN.replace(chr(10), '; ')}").stderr.count("careful\n") == 1


@pytest.mark.slow
def test_a_task_that_fails_or_is_not_done_is_told_of_once(guest: Guest) -> None:
    told = guest.run("import asyncio\nasync def bad(): raise ValueError('boom')\ntask = asyncio.create_task(bad())")
    (note,) = told.shown
    assert note["text/plain"].startswith("[a task has failed: Traceback")
    assert note["text/plain"].endswith("ValueError: boom]")
    assert "sandbox" not in note["text/plain"]
    told = guest.run("event = asyncio.Event()\ntask = asyncio.create_task(event.wait())")
    assert told.shown == [{"text/plain": "[a task is not done: it goes on when later code awaits something]"}]
    assert guest.run("1").shown == []
    assert guest.run("event.set(); await task").value == "True"


@pytest.mark.slow
def test_a_script_that_awaits_does_not_wait_for_servers_that_it_leaves_running(guest: Guest) -> None:
    code = (
        "import asyncio\nasync def handle(reader, writer):\n    writer.write(await reader.readline())\n"
        "server = await asyncio.start_unix_server(handle, 'door')\n"
        "task = asyncio.create_task(server.serve_forever())\n"
        "reader, writer = await asyncio.open_unix_connection('door')\n"
        "writer.write(b'hello\\n')\nprint((await reader.readline()).decode(), end='')"
    )
    told = guest.run(code, session=None, final=True, timeout=15.0)
    assert (told.status, told.stdout) == ("ok", "hello\n"), told.exception


@pytest.mark.slow
def test_in_a_script_tasks_run_to_their_end(guest: Guest) -> None:
    code = f"{WORK}async def slow():\n    await work(1.2)\n    print('done')\nasyncio.create_task(slow())"
    assert guest.run(code, session=None, final=True).stdout == "done\n"


# ── code as models write it ──


@pytest.mark.parametrize(
    ("code", "output", "value"),
    [
        (">>> rate = 2\n>>> for i in range(2):\n...     print(i * rate)\n...\n0\n2\n>>> rate", "0\n2\n", "2"),
        ("In [1]: x = 2\n\nIn [2]: for i in range(2):\n   ...:     print(i * x)\n   ...:\n0\n2", "0\n2\n", None),
        (r"import math\nvalues = [9]\nprint(math.sqrt(values[0]), \"a\\nb\")\nvalues", "3.0 a\nb\n", "[9]"),
        ('%%writefile "a b.txt"\nhello', "", None),
        ("%%bash\necho hi", "hi\n", None),
        ("from IPython import display\ndisplay.clear_output(wait=True)\ndisplay.display(5)", "", None),
        ("import IPython\nIPython.display.display(IPython.display.Code('x = 1'))", "", None),
        ("from IPython.display import *\nHTML, Math, Video('clip.mp4')", "", None),
        ("from IPython.core.display import display, HTML, Video\nVideo('a.mp4')", "", "[Video: a.mp4]"),
    ],
)  # fmt: skip
def test_code_is_taken_as_models_send_it(guest: Guest, code: str, output: str, value: str | None) -> None:
    told = guest.run(code)
    assert told.status == "ok", told.exception
    assert told.stdout == output
    assert value is None or told.value == value


def test_newlines_that_are_escaped_in_code_with_one_more_meaning_are_not_guessed_at(guest: Guest) -> None:
    told = guest.run(r"import math\nprint('a\nb')")
    assert told.exception["type"] == "SyntaxError"


def test_autoreload_says_what_takes_its_place(guest: Guest) -> None:
    told = guest.run("%load_ext autoreload\n%autoreload 2")
    (note,) = told.shown
    assert "importlib.reload(module)" in note["text/plain"]


# ── pages, and pictures of all kinds ──


def test_a_long_page_or_picture_is_saved_for_the_user_and_named(guest: Guest) -> None:
    told = guest.run(
        "from IPython.display import HTML, JSON\ndisplay(HTML('<p>' + 'x' * 10_000), HTML('<b>short</b>'))\n"
        "JSON({'a': list(range(5000))})"
    )
    long, short = told.shown
    assert long == {"text/plain": "<HTML of 9 kB: saved as page-1.html, which a browser shows>"}
    assert short["text/html"] == "<b>short</b>"
    assert told.value == "<JSON of 28 kB: saved as data-1.json>"
    assert (guest.home / "page-1.html").read_text() == "<p>" + "x" * 10_000
    assert json.loads((guest.home / "data-1.json").read_text()) == {"a": list(range(5000))}
    assert [path for path, _ in told.done["files"]] == ["data-1.json", "page-1.html"]


def test_of_what_tells_more_as_text_no_page_is_saved(guest: Guest) -> None:
    told = guest.run(
        "class Table:\n    def _repr_html_(self): return '<td>' * 10_000\n    def __repr__(self): return 'a b'\nTable()"
    )
    assert (told.value, told.done["files"]) == ("a b", [])


@pytest.mark.parametrize("way", ["figure", "figure.show()", "show(figure)", "display(figure)"])
def test_an_interactive_figure_is_a_page_for_the_user_and_data_for_programs(guest: Guest, way: str) -> None:
    guest.run(
        "import os, sys\nos.makedirs('lib/plotly/io')\nsys.path.insert(0, 'lib')\n"
        "open('lib/plotly/__init__.py', 'w').write('')\n"
        "open('lib/plotly/io/_renderers.py', 'w').write('def show(figure): raise OSError')\n"
        "open('lib/plotly/io/__init__.py', 'w').write('from plotly.io._renderers import show')\n"
        "open('lib/plotly/figure.py', 'w').write('''\n"
        "class Figure:\n"
        "    def to_html(self, include_plotlyjs): return '<html>' + include_plotlyjs\n"
        "    def to_json(self): return '{\"data\": []}'\n"
        "    def show(self):\n"
        "        import plotly.io\n"
        "        plotly.io.show(self)\n''')\n"
        "from plotly.figure import Figure\nfrom plotly.io import show\nfigure = Figure()\n"
        "for name in os.listdir(): name.endswith('.html') and os.remove(name)"
    )
    told = guest.run(way)
    text = "<interactive figure of plotly: saved as figure-1.html, which a browser shows>"
    (forms,) = told.shown
    assert forms.pop("text/plain", told.value) == text
    assert forms == {"application/vnd.plotly.v1+json": '{"data": []}'}
    assert (guest.home / "figure-1.html").read_text() == "<html>cdn"


def test_pages_of_a_loop_are_bounded(guest: Guest) -> None:
    told = guest.run("for _ in range(25): display({'text/html': 'x' * 10_000}, raw=True)")
    assert len(list(guest.home.glob("page-*.html"))) == 20
    assert told.shown[-1] == {"text/plain": "<HTML of 9 kB: not saved, as a call may save 20 of them>"}


def test_files_that_nobody_can_have_are_named(guest: Guest) -> None:
    folder = guest.run("import os; print(os.environ['TMPDIR'], end='')").stdout
    (note,) = guest.run("open(f'{os.environ[\"TMPDIR\"]}/of-mine.csv', 'w').write('1')").shown
    assert note["text/plain"] == f"[of-mine.csv in {folder} can't be read from outside: write files to {guest.home}]"
    assert guest.run("1").shown == []


def test_what_needs_a_screen_says_so_at_once(guest: Guest) -> None:
    guest.run(
        "import os, sys\nos.makedirs('lib')\nsys.path.insert(0, 'lib')\n"
        "open('lib/tkinter.py', 'w').write('class Tk:\\n    def __init__(self): raise OSError')\nimport tkinter"
    )
    told = guest.run("tkinter.Tk()")
    assert told.exception["message"].startswith("there is no screen, no keyboard and no mouse here")
