"""The whole way, on real Docker and real Podman: the same tests on both, through the library and the command line.

Others may use the engines at the same time. So nothing here looks at "all containers": a container is known by its
name, or by the label with the id of the runner that made it, and only those are ever touched.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc
import pytest
from conftest import PATIENCE
from odd_code import collect
from real_engines import WAIT, CommandLine, Engine, clients, eventually, host_processes, run

import sandbox_runner
from sandbox_runner import (
    LABEL,
    Config,
    DockerConfig,
    EngineError,
    ImageError,
    Omitted,
    PackageConfig,
    PoolConfig,
    RequestError,
    Result,
    Rich,
    Runner,
    SessionConfig,
    SessionError,
    Text,
    open_runner,
)

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


STUBBORN = """
import time
greeting = "begun"
while True:
    try:
        print(greeting, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        greeting = "never mind"
"""


# ── helpers ──


@pytest.fixture
def config(config: Config) -> Config:
    """The bare image, and sessions that are gone in some minutes whatever becomes of the test."""
    return dataclasses.replace(config, session=SessionConfig(idle_timeout=300), package=PackageConfig(preinstalled=()))


@pytest.fixture
async def runner(config: Config, session: str) -> AsyncIterator[Runner]:
    """A runner; the session of the test is closed after it."""
    async with open_runner(config) as runner:
        yield runner
        await runner.close_session(session)


# ── what a call tells ──


async def test_a_call_tells_what_was_printed_and_the_value_of_its_last_expression(runner: Runner) -> None:
    result = await runner.execute("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")
    assert (result.status, result.stdout, result.stderr, result.value) == ("ok", "out\n", "err\n", "42")


async def test_an_error_on_line_3_is_reported_on_line_3(runner: Runner) -> None:
    result = await runner.execute("def invert(x):\n    # a comment\n    return 1 / x\n\ninvert(0)")
    assert result.status == "error"
    assert result.exception is not None
    assert (result.exception.type, result.exception.line) == ("ZeroDivisionError", 3)
    assert "return 1 / x" in result.exception.traceback
    assert "sandbox_runner" not in result.exception.traceback


ODDITIES = [  # code, how its call ends, a part of what is told of it; the session's variables are kept, whatever it is
    ("import sys; sys.exit(True)", "error", "exit_code=1"),
    ("import sys; sys.exit(10 ** 5000)", "error", "exit_code=255"),
    (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail()\nunittest.main(argv=['x'])",
        "error",
        "exit_code=1",
    ),
    ("import math; math.factorial(3000)", "ok", "an int with 9,131 digits"),
    (
        "class A:\n    def __repr__(self): raise ValueError('no')\nA()",
        "ok",
        "<A object, whose repr raised ValueError: no>",
    ),
    ("raise ModuleNotFoundError('m', name=5)", "error", "missing=None"),
    ("raise SyntaxError('m', ('<call 1>', True, 'x', 5))", "error", "SyntaxError"),
    ("x = 'a\u2028b'\n\nwrong = 1 / 0", "error", "wrong = 1 / 0"),
    ("import inspect\nclass B:\n    y = 1\ninspect.getsource(B)", "ok", "y = 1"),
    ("import io, sys; sys.stdout = io.StringIO()", "ok", ""),
    ("print('visible')", "ok", "visible"),
    ("import sys; sys.setprofile(lambda *_: 1 / 0)", "error", ""),
    ("import asyncio\nasync def f(): raise KeyboardInterrupt\nawait f()", "error", "KeyboardInterrupt"),
]


async def test_odd_code_is_told_as_it_is_and_costs_no_variables(runner: Runner, session: str) -> None:
    await runner.execute("kept = 41", session=session)
    for code, status, told in ODDITIES:
        result = await runner.execute(code, session=session, state={})
        assert (result.status, result.state) == (status, "preserved"), result
        assert told in repr(result), result
        assert (await runner.execute("kept + 1", session=session)).value == "42", code


async def test_code_that_nobody_thought_of_costs_no_variables_either(runner: Runner, session: str) -> None:
    await runner.execute("kept = 41", session=session)
    for code in collect(60):
        result = await runner.execute(code, session=session, state={})
        assert (result.status in ("ok", "error"), result.state) == (True, "preserved"), (code, result)
        assert (await runner.execute("kept + 1", session=session)).value == "42", code


async def test_a_call_without_session_gets_a_fresh_container(runner: Runner) -> None:
    await runner.execute("open('/tmp/left', 'w').close()\nleft = 1")
    result = await runner.execute("import os\nos.path.exists('/tmp/left'), 'left' in globals()")
    assert result.value == "(False, False)"


async def test_output_is_streamed_while_the_code_runs(runner: Runner, engine: Engine) -> None:
    async def let_go(item: Text | Rich | Omitted) -> None:
        if item == Text("stdout", "begun\n"):
            await engine.let_go(await engine.container_of(runner))

    with anyio.fail_after(PATIENCE):
        result = await runner.execute(f"print('begun', flush=True)\n{WAIT}'went on'", on_output=let_go)
    assert result.value == "'went on'"


async def test_10_mb_of_output_are_streamed_whole(runner: Runner) -> None:
    received = bytearray()

    async def keep(item: Text | Rich | Omitted) -> None:
        assert isinstance(item, Text)
        received.extend(item.text.encode())

    result = await runner.execute("for n in range(1_000_000): print(f'{n:9d}')", on_output=keep, keep_output=False)
    assert result.status == "ok"
    assert received == b"".join(b"%9d\n" % n for n in range(1_000_000))


async def test_of_10_mb_of_output_a_result_keeps_head_and_tail_within_the_limit(config: Config) -> None:
    limited = dataclasses.replace(config, docker=dataclasses.replace(config.docker, output_limit="1m"))
    async with open_runner(limited) as runner:
        result = await runner.execute("for n in range(1_000_000): print(f'{n:9d}')")
    assert result.status == "ok"
    head, gap, tail = result.output
    assert isinstance(head, Text)
    assert isinstance(gap, Omitted)
    assert isinstance(tail, Text)
    assert len(head.text) + len(tail.text) <= 1 << 20
    assert len(head.text) + gap.bytes + len(tail.text) == 10_000_000
    assert head.text.startswith("        0\n        1\n")
    assert tail.text.endswith("   999998\n   999999\n")


async def test_3_mb_of_state_go_in_and_come_out_and_what_is_too_much_is_named(runner: Runner) -> None:
    text = "0123456789abcdef" * (3 << 16)
    result = await runner.execute("size = len(text)\ntext = text[::-1]\nmore = text * 2", state={"text": text})
    assert result.status == "ok"
    assert result.variables == {"text": text[::-1], "size": 3 << 20}
    assert result.variables_left_out["more"].startswith("too large: 6291")
    with pytest.raises(RequestError, match=r"state comes to 6291\d+ bytes; the limit is 4194304: use a session, or a"):
        await runner.execute("1", state={"text": text * 2})


# ── how calls end, and that the next one works ──


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "state"),
    [
        pytest.param("1 + 1", "ok", None, "preserved", id="ends"),
        pytest.param("1 / 0", "error", None, "preserved", id="raises"),
        pytest.param("raise SystemExit(3)", "error", 3, "preserved", id="exits"),
        pytest.param("import time\ntime.sleep(60)", "timeout", None, "preserved", id="sleeps too long"),
        pytest.param("while True: pass", "timeout", None, "preserved", id="loops for ever"),
        pytest.param(STUBBORN, "timeout", -signal.SIGKILL, "restored", id="ignores the interruption"),
        pytest.param("b'x' * (1 << 30)", "out_of_memory", -signal.SIGKILL, "restored", id="needs too much memory"),
        pytest.param("import os\nos._exit(3)", "died", 3, "restored", id="ends its process"),
        pytest.param("import ctypes\nctypes.string_at(0)", "died", -signal.SIGSEGV, "restored", id="crashes"),
        pytest.param("import os\nos.kill(os.getpid(), 9)", "died", -signal.SIGKILL, "restored", id="kills itself"),
        pytest.param(
            "import os, time\nos.fork() or os.kill(-1, 9)\ntime.sleep(60)",
            "died",
            -signal.SIGKILL,
            "lost",
            id="has a child that kills all it can",
        ),
        pytest.param(
            "import os\nos.execv('/bin/sh', ['sh', '-c', 'exit 4'])", "died", 4, "restored", id="becomes another"
        ),
    ],
)
async def test_a_session_works_on_after_code_that(
    runner: Runner, session: str, code: str, status: str, exit_code: int | None, state: str
) -> None:
    await runner.execute("kept = 41", session=session)
    result = await runner.execute(code, session=session, timeout=0.5 if status == "timeout" else 30)
    assert (result.status, result.exit_code, result.state) == (status, exit_code, state)
    result = await runner.execute("globals().get('kept')", session=session)
    assert (result.status, result.value) == ("ok", None if state == "lost" else "41")


async def test_a_child_of_the_code_that_runs_out_of_memory_is_told_of_and_costs_no_variables(
    runner: Runner, session: str
) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'b\"x\" * (1 << 30)']).returncode"
    result = await runner.execute(code, session=session)
    assert (result.status, result.value, result.oom_kills, result.state) == ("ok", "-9", 1, "preserved")
    result = await runner.execute("code = 1\ncode", session=session)
    assert (result.status, result.value, result.oom_kills) == ("ok", "1", 0)


async def test_an_interrupted_call_tells_so_and_its_session_keeps_its_variables(runner: Runner, session: str) -> None:
    interrupt = anyio.Event()

    async def on_output(_: object) -> None:
        interrupt.set()

    code = "kept = 41\nprint('begun', flush=True)\nimport time\ntime.sleep(60)"
    result = await runner.execute(code, session=session, on_output=on_output, interrupt=interrupt)
    assert (result.status, result.state) == ("cancelled", "preserved")
    assert result.exception is not None
    assert result.exception.type == "KeyboardInterrupt"
    assert result.exception.line in (2, 3, 4), "wherever it was when its output was heard of"
    assert (await runner.execute("kept + 1", session=session)).value == "42"


async def cancel_once_begun(runner: Runner, code: str, session: str | None) -> None:
    """Make a call, and cancel the task that awaits it when the code's first output has come."""
    with anyio.CancelScope() as scope:

        async def on_output(_: object) -> None:
            scope.cancel()

        await runner.execute(code, session=session, on_output=on_output)
    assert scope.cancelled_caught


async def test_cancelling_the_task_stops_the_code_and_the_session_keeps_its_variables(
    runner: Runner, session: str
) -> None:
    await cancel_once_begun(runner, "kept = 41\nprint('begun', flush=True)\nimport time\ntime.sleep(60)", session)
    result = await runner.execute("kept + 1", session=session)
    assert (result.value, result.lost_before) == ("42", None)


@pytest.mark.parametrize("restore", [True, False])
async def test_variables_lost_in_a_cancelled_call_are_told_of_by_the_next_one(
    config: Config, session: str, restore: bool
) -> None:
    settings = dataclasses.replace(config, session=dataclasses.replace(config.session, restore=restore))
    async with open_runner(settings) as runner:
        await runner.execute("kept = 41", session=session)
        await cancel_once_begun(runner, STUBBORN, session)
        result = await runner.execute("'kept' in globals()", session=session)
        assert (result.value, result.lost_before is None) == (str(restore), restore)
        await runner.close_session(session)


@pytest.mark.parametrize(("megabytes", "state"), [(50, "restored"), (100, "lost")])
async def test_what_fits_into_the_memory_without_a_copy_fits_with_one(
    runner: Runner, session: str, megabytes: int, state: str
) -> None:
    await runner.execute(f"x = bytearray({megabytes} << 20)", session=session)
    for number in range(3):
        code = f"for at in range(0, len(x), 1024): x[at] = {number}\nx[0]"
        result = await runner.execute(code, session=session)
        assert (result.status, result.value, result.state) == ("ok", str(number), "preserved")
    ended = await runner.execute("import os; os._exit(3)", session=session)
    assert ended.state == state
    result = await runner.execute("x[0] if 'x' in globals() else None", session=session)
    assert result.value == (str(max(0, 2 - ended.behind)) if state == "restored" else None)


async def test_a_copy_costs_no_memory_whatever_a_session_holds_and_its_next_call_needs(
    config: Config, session: str
) -> None:
    """What runs without copies runs with them, at steps of 8 MB around the end of the memory."""
    ended: dict[bool, dict[tuple[int, int], str]] = {}
    for restore in (False, True):
        settings = dataclasses.replace(config, session=dataclasses.replace(config.session, restore=restore))
        ended[restore] = {}
        async with open_runner(settings) as runner:
            for holds in (8, 40, 80):
                for needs in range(200 - holds, 256 - holds, 8):
                    name = f"{session}-{restore}-{holds}"
                    await runner.execute(f"x = globals().get('x') or bytearray({holds} << 20)", session=name)
                    code = f"for at in range(0, len(x), 4096): x[at] ^= 1\nlen(b'x' * ({needs} << 20))"
                    result = await runner.execute(code, session=name)
                    ended[restore][holds, needs] = result.status
                    assert result.oom_kills == (result.status == "out_of_memory"), "no copy is told of as the code's"
                await runner.close_session(name)
    assert {*ended[True].values()} == {"ok", "out_of_memory"}
    worse = {size: end for size, end in ended[True].items() if ended[False][size] == "ok" and end != "ok"}
    assert not worse, ended


async def test_a_session_is_restored_after_its_host_was_killed_and_again_right_after_that(
    config: Config, command_line: CommandLine, session: str
) -> None:
    async with command_line("--session", session, "-c", f"x = 1\nprint('begun', flush=True)\n{WAIT}") as program:
        await program.says("begun")
        program.process.kill()
    async with open_runner(config) as runner:
        await (Engine(config.docker.command or "docker")).let_go(sandbox_runner.session_container(session))
        assert (await runner.execute("x", session=session)).value == "1"
        for _ in range(3):
            result = await runner.execute("x = 2\nimport os; os._exit(3)", session=session)
            assert (result.status, result.state) == ("died", "restored")
        assert (await runner.execute("x", session=session)).value == "1"
        await runner.close_session(session)


async def test_nothing_is_left_of_a_cancelled_transient_call(runner: Runner, engine: Engine) -> None:
    with anyio.CancelScope() as scope:
        names: list[str] = []

        async def on_output(_: object) -> None:
            names.append(await engine.container_of(runner))
            scope.cancel()

        await runner.execute(STUBBORN, on_output=on_output)
    (name,) = names
    await eventually(lambda: engine.is_gone(name))


# ── sessions ──


async def test_1000_calls_on_one_session(runner: Runner, session: str) -> None:
    await runner.execute("n = 0", session=session)
    for _ in range(999):
        result = await runner.execute("n += 1", session=session)
        assert result.status == "ok"
    assert (await runner.execute("n", session=session)).value == "999"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder of the host, for a mount: the code, which is somebody else there, may write to it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o777)
    return tmp_path / "folder"


async def test_20_sessions_run_at_the_same_time(config: Config, session: str, folder: Path) -> None:
    mounted = dataclasses.replace(config.docker, mounts=(f"{folder}:/shared",))
    waiting = 0

    async def on_output(_: object) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 20:  # none has ended yet: all are there at once
            (folder / "go").touch()

    values = []
    async with open_runner(dataclasses.replace(config, docker=mounted)) as runner:

        async def one(number: int) -> None:
            code = f"number = {number}\nprint('here', flush=True)\n{WAIT.replace('/tmp', '/shared')}number"
            name = f"{session}-{number}"
            result = await runner.execute(code, session=name, on_output=on_output, timeout=PATIENCE)
            values.append(result.value)
            await runner.close_session(name)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(one, number)
    assert sorted(values, key=str) == sorted(map(str, range(20)))


async def test_calls_on_one_session_queue(runner: Runner, session: str) -> None:
    async def add(number: int) -> None:
        await runner.execute(f"seen = [*globals().get('seen', []), {number}]", session=session)

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(add, number)
    assert (await runner.execute("sorted(seen)", session=session)).value == "[0, 1, 2, 3, 4]"


async def test_a_session_outlives_its_runner(config: Config, session: str) -> None:
    async with open_runner(config) as runner:
        await runner.execute("def add(a, b): return a + b", session=session)
    async with open_runner(config) as runner:
        result = await runner.execute("add(40, 2)", session=session)
        assert (result.value, result.state, result.lost_before) == ("42", "preserved", None)
    async with open_runner(config) as runner:
        assert (await runner.execute("add(1, 2)", session=session)).value == "3"
        assert await runner.close_session(session)


async def test_a_session_is_there_for_the_next_command(command_line: CommandLine, session: str) -> None:
    assert await run(command_line, "--session", session, "-c", "x = 41") == (0, "", "")
    assert await run(command_line, "--session", session, "-c", "x + 1") == (0, "42\n", "")
    assert (await run(command_line, "rm", session))[0] == 0


async def test_a_session_survives_the_sigkill_of_its_host(
    runner: Runner, session: str, command_line: CommandLine, engine: Engine
) -> None:
    await run(command_line, "--session", session, "-c", "x = 41")
    async with command_line(
        "--session", session, "-c", f"print('begun', flush=True)\n{WAIT}x += 1\n'unread'"
    ) as program:
        await program.says("begun")
        name = await program.container()
        program.process.kill()
    await engine.let_go(name)  # only now that its host is dead does the code come to its end
    result = await runner.execute("x", session=session)
    assert result.unread is not None
    assert (result.unread.status, result.unread.value) == ("ok", "'unread'")
    assert (result.value, result.lost_before) == ("42", None)


async def test_a_session_survives_the_sigkill_of_the_host_that_started_it(
    runner: Runner, session: str, command_line: CommandLine, engine: Engine
) -> None:
    async with command_line("--session", session, "-c", f"x = 41\nprint('begun', flush=True)\n{WAIT}x += 1") as program:
        await program.says("begun")
        mine = [pid for pid, parent, _ in host_processes() if parent == program.process.pid]
        program.process.kill()

    async def are_gone() -> bool:
        return not {*mine} & {pid for pid, *_ in host_processes()}

    assert mine
    await eventually(are_gone)  # Podman's client may take the container along
    await engine.let_go(sandbox_runner.session_container(session))
    result = await runner.execute("x", session=session)
    assert (result.value, result.lost_before) == ("42", None)


async def test_a_session_survives_the_sigkill_of_the_client_that_started_it(
    runner: Runner, session: str, engine: Engine
) -> None:
    await runner.execute("x = 41", session=session)
    (client,) = await engine.clients_of(runner)
    os.kill(client, signal.SIGKILL)
    result = await runner.execute("x + 1", session=session)
    assert (result.value, result.state, result.lost_before) == ("42", "preserved", None)


async def test_a_session_survives_the_sigkill_of_the_client_that_plugged_into_it(
    config: Config, runner: Runner, session: str, engine: Engine
) -> None:
    async with open_runner(config) as first:
        await first.execute("x = 41", session=session)
        name = await engine.container_of(first)
    await runner.execute("x += 1", session=session)
    (client,) = clients(engine.command, name)
    os.kill(client, signal.SIGKILL)
    result = await runner.execute("x", session=session)
    assert (result.value, result.state, result.lost_before) == ("42", "preserved", None)


async def test_two_programs_can_not_use_one_session_at_once(
    config: Config, runner: Runner, session: str, command_line: CommandLine, engine: Engine
) -> None:
    await runner.execute("x = 1", session=session)
    async with open_runner(config) as second:
        with pytest.raises(SessionError, match="another program"):
            await second.execute("x", session=session)
        with pytest.raises(SessionError, match="another program"):
            await second.close_session(session)
        assert await engine.containers_of(second) == []
    status, _, errors = await run(command_line, "--session", session, "-c", "x")
    assert status == 125
    assert "another program" in errors
    assert (await runner.execute("x", session=session)).value == "1"


async def test_a_container_removed_behind_our_back_is_told_of_and_replaced(
    runner: Runner, session: str, engine: Engine
) -> None:
    await runner.execute("x = 1", session=session)
    name = await engine.container_of(runner)
    await engine("rm", "-f", name)
    await eventually(lambda: engine.is_gone(name, runner))
    result = await runner.execute("'x' in globals()", session=session)
    assert (result.status, result.value) == ("ok", "False")
    assert result.lost_before is not None


async def test_a_ready_sandbox_that_is_killed_just_before_a_call_costs_it_nothing(
    config: Config, session: str, engine: Engine
) -> None:
    pool = PoolConfig(warm=1, preload=())
    async with open_runner(dataclasses.replace(config, pool=pool), warm=True) as runner:
        for name in (None, session):

            async def find() -> list[str]:
                return [sandbox.name for sandbox in runner.pool.ready if not sandbox._answers]

            (ready,) = await eventually(find)
            engine.kill_at_once(ready)
            result = await runner.execute("6 * 7", session=name)
            assert (result.status, result.value, result.lost_before) == ("ok", "42", None), result
        await runner.close_session(session)


async def test_ready_sandboxes_are_renewed_while_calls_come_and_lapse_when_none_do(
    config: Config, engine: Engine
) -> None:
    settings = dataclasses.replace(
        config, pool=PoolConfig(warm=1, max_age=5, preload=()), session=SessionConfig(idle_timeout=8)
    )
    async with open_runner(settings, warm=True) as runner:

        async def names() -> set[str]:
            return {sandbox.name for sandbox in runner.pool.ready}

        first = await eventually(names)

        async def is_renewed() -> bool:
            found = await names()
            assert found, "there was none for a while"
            return not first & found

        await eventually(is_renewed)

        async def is_lapsed() -> bool:
            return not await engine.containers_of(runner)

        await eventually(is_lapsed)
        assert (await runner.execute("6 * 7")).value == "42"
        await eventually(names)


async def test_an_engine_that_hangs_is_told_of_and_used_again_when_it_answers(
    config: Config, engine_command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a command of ours in between: what hangs is the answer of the real one."""
    gate, settings = behind_a_gate(config, engine_command, tmp_path)
    monkeypatch.setattr(sandbox_runner, "ANSWER_TIMEOUT", 2)
    async with open_runner(settings, warm=True) as runner:
        with pytest.raises(EngineError, match="did not end within 2 seconds: the engine hangs"):
            await runner.execute("6 * 7")
        gate.touch()
        assert (await runner.execute("6 * 7")).value == "42"


async def test_an_engine_that_stands_still_with_its_containers_costs_a_session_nothing(
    config: Config,
    engine: Engine,
    engine_command: str,
    session: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    gate, settings = behind_a_gate(config, engine_command, tmp_path)
    gate.touch()
    for name in ("DOUBT_AFTER", "PONG_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 2)
    async with open_runner(settings) as runner:
        await runner.execute("x = 41", session=session)
        container = await engine.container_of(runner)
        await engine("pause", container)
        gate.unlink()
        with pytest.raises(EngineError, match="did not end within 2 seconds: the engine hangs"):
            await runner.execute("x += 1", session=session)
        gate.touch()
        await engine("unpause", container)
        result = await runner.execute("x", session=session)
        assert (result.value, result.lost_before) in (("41", None), ("42", None)), result
        await runner.close_session(session)


def behind_a_gate(config: Config, engine_command: str, folder: Path) -> tuple[Path, Config]:
    """A command that does what the engine's own does, but only while a file is there; the file, and such settings."""
    gate, command = folder / "gate", folder / engine_command
    real = shutil.which(engine_command)
    command.write_text(f'#!/bin/sh\nwhile [ ! -e {gate} ]; do sleep 0.1; done\nexec {real} "$@"\n')
    command.chmod(0o755)
    return gate, dataclasses.replace(config, docker=dataclasses.replace(config.docker, command=str(command)))


async def test_a_call_whose_container_is_removed_tells_that_it_died(
    runner: Runner, session: str, engine: Engine
) -> None:
    async def remove(_: object) -> None:
        await engine("rm", "-f", await engine.container_of(runner))

    with anyio.fail_after(PATIENCE):
        result = await runner.execute(f"print('begun', flush=True)\n{WAIT}", session=session, on_output=remove)
    assert (result.status, result.stdout, result.state) == ("died", "begun\n", "lost")
    assert (await runner.execute("1 + 1", session=session)).value == "2"


async def test_a_call_goes_on_after_a_pause_of_its_container(runner: Runner, session: str, engine: Engine) -> None:
    async def pause(_: object) -> None:
        name = await engine.container_of(runner)
        await engine("pause", name)
        assert (await engine.inspect(name))["State"]["Status"] == "paused"
        await engine("unpause", name)
        await engine.let_go(name)

    result = await runner.execute(f"print('begun', flush=True)\n{WAIT}1 + 1", session=session, on_output=pause)
    assert (result.status, result.value, result.state) == ("ok", "2", "preserved")


async def test_a_container_that_stays_paused_is_given_up_and_replaced(
    runner: Runner, session: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "HOST_PATIENCE", 0.5)
    await runner.execute("x = 1", session=session)
    name = await engine.container_of(runner)
    await engine("pause", name)
    result = await runner.execute("x", session=session, timeout=0.5)
    assert (result.status, result.state) == ("timeout", "lost")
    await eventually(lambda: engine.is_gone(name, runner))
    result = await runner.execute("'x' in globals()", session=session)
    assert (result.status, result.value) == ("ok", "False")


async def test_a_session_that_is_not_used_ends_by_itself(config: Config, session: str, engine: Engine) -> None:
    brief = dataclasses.replace(config, session=SessionConfig(idle_timeout=0.5))
    async with open_runner(brief) as runner:
        await runner.execute("x = 1", session=session)
        name = await engine.container_of(runner)
        await eventually(lambda: engine.is_gone(name, runner))
        result = await runner.execute("'x' in globals()", session=session)
        assert result.value == "False"
        assert result.lost_before is not None
        name = await engine.container_of(runner)
    await eventually(lambda: engine.is_gone(name, runner))  # nor does it need a host to end


async def test_sessions_are_listed_and_removed_by_the_command_line(
    runner: Runner, session: str, command_line: CommandLine, engine: Engine
) -> None:
    await runner.execute("x = 1", session=session)
    name = await engine.container_of(runner)
    (listed,) = [info for info in json.loads((await run(command_line, "ps", "--json"))[1]) if info["name"] == name]
    assert (listed["session"], listed["attached"], listed["busy"]) == (session, True, False)
    assert (listed["owner"], listed["age"] > 0, listed["memory"] > 0) == (runner.launcher.owner, True, True)
    (row,) = [line for line in (await run(command_line, "ps"))[1].splitlines() if name in line]
    assert row.split()[:4] == [session, "idle,", "in", "use"]  # how wide the columns are depends on the other rows
    assert (await run(command_line, "rm", session))[0] == 125  # it is in use
    assert await runner.close_session(session)
    assert await engine.is_gone(name, runner)
    status, _, errors = await run(command_line, "rm", session)
    assert status == 1
    assert f"there is no session {session!r}" in errors


# ── nothing is left ──


async def test_the_exit_status_is_the_code_s_own_and_nothing_is_left(command_line: CommandLine, engine: Engine) -> None:
    async with command_line("-c", f"import sys\nprint('begun', flush=True)\n{WAIT}sys.exit(3)") as program:
        await program.says("begun")
        name = await program.container()
        await engine.let_go(name)
        assert await program.end() == (3, "", "")
    await eventually(lambda: engine.is_gone(name))


async def test_ctrl_c_interrupts_the_code_and_nothing_is_left(command_line: CommandLine, engine: Engine) -> None:
    async with command_line("-c", f"print('begun', flush=True)\n{WAIT}") as program:
        await program.says("begun")
        name = await program.container()
        program.process.send_signal(signal.SIGINT)
        status, output, errors = await program.end()
        assert (status, output) == (130, "")
        assert errors.endswith("KeyboardInterrupt\n")
    await eventually(lambda: engine.is_gone(name))


async def test_a_second_ctrl_c_leaves_and_nothing_is_left(command_line: CommandLine, engine: Engine) -> None:
    async with command_line("-c", STUBBORN) as program:
        await program.says("begun")
        name = await program.container()
        program.process.send_signal(signal.SIGINT)
        await program.says("never mind")
        program.process.send_signal(signal.SIGINT)
        assert (await program.end())[0] == 130
    await eventually(lambda: engine.is_gone(name))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
async def test_a_signal_that_ends_the_host_leaves_nothing(
    command_line: CommandLine, engine: Engine, number: signal.Signals, status: int
) -> None:
    async with command_line("-c", f"print('begun', flush=True)\n{WAIT}") as program:
        await program.says("begun")
        name = await program.container()
        program.process.send_signal(number)
        assert (await program.end())[0] == status
    await eventually(lambda: engine.is_gone(name))


async def test_a_runner_that_is_left_leaves_nothing_but_sessions(
    config: Config, session: str, engine: Engine, command_line: CommandLine
) -> None:
    async with open_runner(config) as runner:
        await runner.execute("x = 1", session=session)
        name = await engine.container_of(runner)
        await runner.execute("1 + 1")
        await runner.execute("1 / 0")

    async def only_the_session_is_left() -> bool:
        return await engine.containers_of(runner) == [name]

    await eventually(only_the_session_is_left)
    assert (await run(command_line, "rm", session))[0] == 0
    await eventually(lambda: engine.is_gone(name, runner))


async def test_the_command_line_ends_with_the_statuses_of_a_shell(command_line: CommandLine) -> None:
    async def status(*arguments: str) -> int:
        return (await run(command_line, *arguments))[0]

    assert await status("-c", "1 / 0") == 1
    assert await status("--timeout", "0.5", "-c", "while True: pass") == 124
    assert await status("-c", "b'x' * (1 << 30)") == 137
    assert await status("-c", "import ctypes\nctypes.string_at(0)") == 128 + signal.SIGSEGV


async def test_a_script_gets_its_arguments_and_its_json_tells_everything(
    command_line: CommandLine, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('hello')\nsys.argv")
    status, output, _ = await run(command_line, "--json", str(script), "one", "--two")
    assert status == 0
    told = json.loads(output)
    assert (told["status"], told["stdout"], told["value"]) == ("ok", "hello\n", "['script.py', 'one', '--two']")
    assert told["image"]["origin"] == "made from this host's Python"


# ── the walls, as the engine sees them ──


async def test_every_container_has_the_full_set_of_limits(
    config: Config, session: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "https_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "http://user:secret@proxy.invalid:1")
    monkeypatch.setenv("TEST_API_KEY", "secret")
    async with open_runner(config) as runner:
        result = await runner.execute("import os\ndict(os.environ)", session=session)
        about = await engine.inspect(await engine.container_of(runner))
        await runner.close_session(session)
    host = about["HostConfig"]
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert (host["Memory"], host["MemorySwap"]) == (256 << 20, 256 << 20)
    assert host["NanoCpus"] == 500_000_000
    assert host["PidsLimit"] == 256
    assert host["ShmSize"] == 64 << 20
    assert host["Privileged"] is False
    assert not host["CapAdd"]
    assert host["CapDrop"] == ["ALL"] or about["EffectiveCaps"] in ([], None)  # Podman lists them one by one
    assert "no-new-privileges" in host["SecurityOpt"]
    assert host["LogConfig"]["Type"] == "none"
    assert host["IpcMode"] in ("private", "shareable")  # Podman 4 calls its own by the latter name
    assert host["AutoRemove"] is True
    assert host["RestartPolicy"]["Name"] in ("", "no")
    assert all(bind.startswith("python-docker-mcp-packages:/packages:ro") for bind in host["Binds"] or [])
    assert not host["Devices"]
    assert sorted(host["Tmpfs"]) == ["/app", "/tmp"]
    for options in host["Tmpfs"].values():
        assert {"nosuid", "nodev", f"size={64 << 20}"} <= set(options.split(","))
    limits = {limit["Name"].lower().removeprefix("rlimit_"): limit["Hard"] for limit in host["Ulimits"]}
    assert (limits["core"], limits["nofile"]) == (1, 1024)
    user, group = map(int, about["Config"]["User"].split(":"))
    assert (user in sandbox_runner.OWN_USERS, group) == (True, 65534)
    assert about["Config"]["Hostname"] == "sandbox"
    variables = dict(variable.split("=", 1) for variable in about["Config"]["Env"])
    assert {name: value for name, value in variables.items() if "proxy" in name.lower() and value} == {}
    assert "TEST_API_KEY" not in variables
    assert "secret" not in str(about)
    assert "secret" not in str(result.value)


async def test_settings_arrive_at_the_engine(config: Config, session: str, engine: Engine) -> None:
    docker = dataclasses.replace(
        config.docker, memory_limit="100m", cpu_limit=0.25, pids_limit=50, disk_limit="10m", working_dir="/work"
    )
    async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
        result = await runner.execute("import os\nopen('file', 'w').close()\nos.getcwd()", session=session)
        assert result.value == "'/work'"
        host = (await engine.inspect(await engine.container_of(runner)))["HostConfig"]
        await runner.close_session(session)
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (100 << 20, 100 << 20, 250_000_000)
    assert host["PidsLimit"] == 50
    assert sorted(host["Tmpfs"]) == ["/tmp", "/work"]
    assert all(f"size={10 << 20}" in options for options in host["Tmpfs"].values())


# ── mounts and images ──


async def evaluate(runner: Runner, code: str, session: str | None = None) -> str:
    """The value of code that has to end well."""
    result = await runner.execute(code, session=session)
    assert (result.status, result.exception) == ("ok", None), result
    assert result.value is not None
    return result.value


async def test_mounts_are_read_only_unless_asked_otherwise(config: Config, folder: Path) -> None:
    (folder / "data.txt").write_text("data")
    mounts = (f"{folder}:/input", f"{folder}:/output:rw")
    code = """
def write(path):
    try:
        open(path, "w").write("from inside")
    except OSError as error:
        return error.strerror
open("/input/data.txt").read(), write("/input/data.txt"), write("/output/new.txt")
"""
    async with open_runner(
        dataclasses.replace(config, docker=dataclasses.replace(config.docker, mounts=mounts))
    ) as runner:
        assert await evaluate(runner, code) == repr(("data", "Read-only file system", None))
    assert (folder / "new.txt").read_text() == "from inside"


UNREACHABLE = "127.0.0.1:1/nobody/nothing:1"  # a registry at a port where nothing listens


async def test_an_image_that_can_not_be_had_is_named_with_what_to_do(config: Config) -> None:
    docker = dataclasses.replace(config.docker, image=UNREACHABLE)
    async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
        with pytest.raises(ImageError) as caught:
            await runner.execute("1")
    assert str(caught.value).startswith(f"The image {UNREACHABLE} is not here and can't be pulled: ")
    assert "set docker.image" in str(caught.value)


async def test_without_a_registry_the_default_image_is_made_from_this_host_s_python(
    config: Config, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "python_docker_mcp")
    made = f"python-docker-mcp-test:{secrets.token_hex(6)}"
    monkeypatch.setattr(sandbox_runner, "host_image_name", lambda: made)
    monkeypatch.setattr(DockerConfig, "image", UNREACHABLE)  # the default that can't be pulled
    docker = dataclasses.replace(config.docker, image=UNREACHABLE)
    results: list[Result] = []
    names: list[str] = []
    try:
        for _ in range(2):
            async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
                results.append(await runner.execute("import sys, sqlite3, ssl, ctypes, zoneinfo\nsys.version_info[:3]"))
                assert runner.launcher.image is not None
                assert (runner.launcher.image.name, runner.launcher.image.origin) == (
                    made,
                    "made from this host's Python",
                )
                names += await engine.containers_of(runner)  # if it has not ended it already
        for name in names:
            await eventually(functools.partial(engine.is_gone, name))
    finally:
        await engine("rmi", "-f", made)
    assert [result.value for result in results] == [repr(sys.version_info[:3])] * 2
    assert sum("making an image from this host's own Python" in record.message for record in caplog.records) == 1


async def test_a_sandbox_used_again_has_neither_files_nor_processes_nor_shared_memory_of_its_last_use(
    config: Config,
) -> None:
    dirty = (
        "import ctypes, os, subprocess, sys\n"
        "for folder in ('/tmp', '.', '/dev/shm'):\n"
        "    os.makedirs(folder + '/a/b')\n"
        "    open(folder + '/a/b/c', 'w').write('x')\n"
        "os.chmod('/tmp/a', 0)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], start_new_session=True)\n"
    )
    look = (
        "import os\n"
        "def is_ours(pid):\n"  # not another runner's that looks at the sandbox
        "    try: os.kill(pid, 0)\n"
        "    except OSError: return False\n"
        "    return pid not in (1, os.getpid())\n"
        "folders = ('/tmp', '.', '/dev/shm')\n"
        "kept = [path for folder in folders for path in os.listdir(folder) if path != '.matplotlib']\n"
        "(kept, [name for name in os.listdir('/proc') if name.isdigit() and is_ours(int(name))])"
    )
    pool = PoolConfig(warm=0, preload=(), reuse=True)
    async with open_runner(dataclasses.replace(config, pool=pool)) as runner:
        assert (await runner.execute(dirty)).status == "ok"
        with anyio.fail_after(30):
            while not runner.pool.ready:
                await anyio.sleep(0.01)
        name = runner.pool.ready[0].name
        assert (await runner.execute(look)).value == "([], [])"
        with anyio.fail_after(30):
            while not runner.pool.ready:
                await anyio.sleep(0.01)
        assert runner.pool.ready[0].name == name
        # System V shared memory can't be removed from outside of who made it: such a sandbox is not used again.
        await runner.execute("import ctypes; ctypes.CDLL(None).shmget(5, 4096, 0o1600)")
        with anyio.fail_after(30):
            while runner.pool.count:
                await anyio.sleep(0.01)


@pytest.mark.parametrize(
    "message",
    [
        "os.setxattr('/tmp', 'user.note', b'42')",
        "os.setxattr('/app', 'user.note', b'42')",
        "os.chmod('/tmp', 0o1770)",
        "os.chmod('/app', 0o700)",
        "os.utime('/tmp', (42, 42))",
        "os.utime('/app', (42, 42))",
        "fd = libc.mq_open(b'/note', os.O_CREAT | os.O_RDWR, 0o600, None)",
        "open('/dev/shm/note', 'w').write('42')",
        "libc.semget(42, 1, 0o1600)",
        "libc.msgget(42, 0o1600)",
    ],
)
async def test_no_message_reaches_the_next_caller_of_a_sandbox(config: Config, message: str) -> None:
    leave = f"import os, ctypes\nlibc = ctypes.CDLL(None)\ntry: {message}\nexcept OSError: pass"
    look = (
        "import os\n"
        "folders = [os.stat(folder) for folder in ('/tmp', '/app')]\n"
        "names = [os.listxattr(folder) for folder in ('/tmp', '/app')]\n"
        "kept = [[name for name in os.listdir(folder) if name != '.matplotlib'] for folder in WRITABLE]\n"
        "ids = [len(open(f'/proc/sysvipc/{kind}').readlines()) for kind in ('shm', 'sem', 'msg')]\n"
        "(names, kept, ids, [oct(about.st_mode) for about in folders], [about.st_mtime > 42 for about in folders])"
    ).replace("WRITABLE", "('/tmp', '/app', '/dev/shm', '/dev/mqueue')")
    async with open_runner(dataclasses.replace(config, pool=PoolConfig(warm=0, preload=(), reuse=True))) as runner:
        fresh = (await runner.execute(look)).value
        with anyio.fail_after(30):
            while not runner.pool.ready:
                await anyio.sleep(0.01)
        assert fresh is not None
        assert (await runner.execute(leave)).status == "ok"
        assert (await runner.execute(look)).value == fresh


async def test_a_sandbox_is_used_again_however_often_others_look_at_it(config: Config) -> None:
    pool = PoolConfig(warm=0, preload=(), reuse=True)
    async with (
        open_runner(dataclasses.replace(config, pool=pool)) as runner,
        open_runner(config) as other,
        anyio.create_task_group() as tasks,
    ):

        async def look() -> None:
            while True:
                await other.launcher.list_sandboxes()

        tasks.start_soon(look)
        when_started = "open('/proc/1/stat').read().split()[21]"
        seen = {(await runner.execute(when_started)).value for _ in range(30)}
        tasks.cancel_scope.cancel()
    assert len(seen) == 1


async def test_a_container_that_never_ran_is_pruned_and_no_other_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "PRUNE_PAUSE", 0)
    async with open_runner(config) as runner:
        await runner.execute("1")
        assert runner.launcher.engine is not None
        assert runner.launcher.image is not None
        ours, other = (f"python-docker-mcp-{os.urandom(8).hex()}" for _ in range(2))
        labels = [f"--label={LABEL}=1", f"--label={LABEL}.owner=x", f"--label={LABEL}.settings=x"]
        await runner.launcher.engine.run("create", f"--name={ours}", *labels, runner.launcher.image.name, "true")
        await runner.launcher.engine.run("create", f"--name={other}", runner.launcher.image.name, "true")
        try:
            assert ours in await runner.launcher.prune()
            assert await runner.launcher.engine.inspect("container", ours, "{{.State.Status}}") is None
            assert await runner.launcher.engine.inspect("container", other, "{{.State.Status}}") == "created"
        finally:
            await runner.launcher.engine.run("rm", other)
