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
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc
import pytest
from conftest import PATIENCE
from real_engines import WAIT, CommandLine, Engine, clients, eventually, prune_at_once, run

import sandbox_runner
from sandbox_runner import (
    LABEL,
    Config,
    DockerConfig,
    EngineError,
    Omitted,
    PackageConfig,
    PoolConfig,
    RequestError,
    Result,
    Rich,
    Runner,
    SandboxInfo,
    SessionConfig,
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


ODDITIES = [  # code, how its call ends, a part of what is told of it; the session's variables are kept, whatever it is
    ("raise ModuleNotFoundError('m', name=5)", "error", "missing=None"),
    ("raise SyntaxError('m', ('<call 1>', True, 'x', 5))", "error", "SyntaxError"),
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


async def test_a_call_without_session_gets_a_fresh_container(runner: Runner) -> None:
    await runner.execute("open('/tmp/left', 'w').close()\nleft = 1")
    result = await runner.execute("import os\nos.path.exists('/tmp/left'), 'left' in globals()")
    assert result.value == "(False, False)"


@pytest.mark.in_turns
async def test_10_mb_of_output_are_streamed_whole(runner: Runner) -> None:
    received = bytearray()

    async def keep(item: Text | Rich | Omitted) -> None:
        assert isinstance(item, Text)
        received.extend(item.text.encode())

    result = await runner.execute("for n in range(100_000): print(f'{n:99d}')", on_output=keep, keep_output=False)
    assert result.status == "ok"
    assert received == b"".join(b"%99d\n" % n for n in range(100_000))


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


async def cancel_once_begun(runner: Runner, code: str, session: str) -> None:
    """Make a call, and cancel the task that awaits it when the code's first output has come."""
    with anyio.CancelScope() as scope:

        async def on_output(_: object) -> None:
            scope.cancel()

        await runner.execute(code, session=session, on_output=on_output)
    assert scope.cancelled_caught


@pytest.mark.in_turns
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
    """What runs without copies and has 8 MB to spare runs with them, at steps of 8 MB around the end of the memory."""
    ended: dict[bool, dict[tuple[int, int], str]] = {}
    for restore in (False, True):
        settings = dataclasses.replace(config, session=dataclasses.replace(config.session, restore=restore))
        ended[restore] = {}
        async with open_runner(settings) as runner:
            for holds in (8, 80):
                for needs in range(200 - holds, 256 - holds, 8):
                    name = f"{session}-{restore}-{holds}"
                    await runner.execute(f"x = globals().get('x') or bytearray({holds} << 20)", session=name)
                    code = f"for at in range(0, len(x), 4096): x[at] ^= 1\nlen(b'x' * ({needs} << 20))"
                    result = await runner.execute(code, session=name)
                    ended[restore][holds, needs] = result.status
                    assert result.oom_kills == (result.status == "out_of_memory"), "no copy is told of as the code's"
                await runner.close_session(name)
    assert {*ended[True].values()} == {"ok", "out_of_memory"}
    for (holds, needs), end in ended[True].items():
        assert end == "ok" or ended[False].get((holds, needs + 8)) != "ok", (holds, needs, ended)


async def test_a_copy_that_does_not_end_by_itself_costs_no_memory(config: Config, session: str) -> None:
    """Its memory was once still taken when the next copy and the code needed theirs."""
    stop_copies = (
        "import os, signal, time\ntime.sleep(0.6)\n"
        "for pid in os.listdir('/proc'):\n"
        "    if pid.isdigit() and int(pid) not in (1, os.getpid()): os.kill(int(pid), signal.SIGSTOP)"
    )
    use = "for at in range(0, len(x), 4096): x[at] ^= 1"
    async with open_runner(config) as runner:
        await runner.execute(f"x = bytearray(40 << 20)\n{use}", session=session)
        for _ in range(2):
            await runner.execute(stop_copies, session=session)
            result = await runner.execute(f"{use}\nlen(b'x' * (184 << 20))", session=session)
            assert (result.status, result.oom_kills, result.state) == ("ok", 0, "preserved")
        await runner.close_session(session)


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


@pytest.mark.in_turns
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


@pytest.mark.in_turns
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


@pytest.mark.in_turns
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
    status, _, errors = await run(command_line, "rm", session)
    assert (status, "another program" in errors) == (125, True)
    assert await runner.close_session(session)
    assert await engine.is_gone(name, runner)
    status, _, errors = await run(command_line, "rm", session)
    assert status == 1
    assert f"there is no session {session!r}" in errors


# ── nothing is left ──


@pytest.mark.in_turns
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "KeyboardInterrupt\n"), (signal.SIGTERM, 143, ""), (signal.SIGKILL, -signal.SIGKILL, "")],
)
async def test_a_signal_ends_the_code_or_its_host_and_nothing_is_left(
    command_line: CommandLine, engine: Engine, number: signal.Signals, status: int, said: str
) -> None:
    async with command_line("-c", f"print('begun', flush=True)\n{WAIT}") as program:
        await program.says("begun")
        name = await program.container()
        program.process.send_signal(number)
        ended, output, errors = await program.end()
        assert (ended, output, errors.endswith(said)) == (status, "", True)
    await eventually(lambda: engine.is_gone(name))


@pytest.mark.in_turns
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
    docker = dataclasses.replace(config.docker, mounts=mounts)
    async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
        result = await runner.execute(code)
    assert (result.status, result.value) == ("ok", repr(("data", "Read-only file system", None))), result
    assert (folder / "new.txt").read_text() == "from inside"


UNREACHABLE = "127.0.0.1:1/nobody/nothing:1"  # a registry at a port where nothing listens


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


async def cleaned(runner: Runner) -> str:
    """The name of the sandbox that is kept for the next call, once it is clean."""
    with anyio.fail_after(PATIENCE):
        while not runner.pool.ready:
            await anyio.sleep(0.01)
    return runner.pool.ready[0].name


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
    pool = PoolConfig(warm=0, reuse=True)
    async with open_runner(dataclasses.replace(config, pool=pool)) as runner:
        assert (await runner.execute(dirty)).status == "ok"
        name = await cleaned(runner)
        assert (await runner.execute(look)).value == "([], [])"
        assert await cleaned(runner) == name
        # System V shared memory can't be removed from outside of who made it: such a sandbox is not used again.
        await runner.execute("import ctypes; ctypes.CDLL(None).shmget(5, 4096, 0o1600)")
        with anyio.fail_after(PATIENCE):
            while runner.pool.count:
                await anyio.sleep(0.01)


@pytest.mark.in_turns
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
    async with open_runner(dataclasses.replace(config, pool=PoolConfig(warm=0, reuse=True))) as runner:
        fresh = (await runner.execute(look)).value
        await cleaned(runner)
        assert fresh is not None
        assert (await runner.execute(leave)).status == "ok"
        assert (await runner.execute(look)).value == fresh


async def test_a_sandbox_is_used_again_however_often_others_look_at_it(config: Config) -> None:
    pool = PoolConfig(warm=0, reuse=True)
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
    to_be_pruned = prune_at_once(monkeypatch)
    async with open_runner(config) as runner:
        await runner.execute("1")
        assert runner.launcher.engine is not None
        assert runner.launcher.image is not None
        ours, other = (f"python-docker-mcp-{os.urandom(8).hex()}" for _ in range(2))
        to_be_pruned |= {ours, other}
        labels = [f"--label={LABEL}=1", f"--label={LABEL}.owner=x", f"--label={LABEL}.settings=x"]
        await runner.launcher.engine.run("create", f"--name={ours}", *labels, runner.launcher.image.name, "true")
        await runner.launcher.engine.run("create", f"--name={other}", runner.launcher.image.name, "true")
        try:
            assert ours in await runner.launcher.prune()
            assert await runner.launcher.engine.inspect("container", ours, "{{.State.Status}}") is None
            assert await runner.launcher.engine.inspect("container", other, "{{.State.Status}}") == "created"
        finally:
            await runner.launcher.engine.run("rm", other)


@pytest.mark.engine
async def test_an_engine_without_gpus_is_told_in_a_sentence_with_the_next_step(config: Config) -> None:
    for gpus in ("all", "device=0,1"):
        docker = dataclasses.replace(config.docker, gpus=gpus)
        async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
            with pytest.raises(EngineError, match=r"This engine has no GPU to give .*nvidia-ctk"):
                await runner.execute("1")


@pytest.mark.engine
@pytest.mark.in_turns
async def test_sessions_are_listed_wherever_they_are(config: Config, session: str) -> None:
    """Of another program, idle or running, and of none; the listing takes nothing over."""
    table = "import numpy as np, pandas as pd\ntable = pd.DataFrame({'a': range(3)}); grid = np.zeros((2, 5))"
    config = dataclasses.replace(config, package=PackageConfig())
    names = [f"{session}-{n}" for n in range(3)]
    async with open_runner(config) as runner, open_runner(config) as other:

        async def listed() -> dict[str | None, SandboxInfo]:
            return {info.session: info for info in await runner.list_sessions() if info.session in names}

        await other.execute(table, session=names[0])
        (info,) = (await listed()).values()
        assert dict(info.variables) == {"table": "DataFrame, 3 x 1", "grid": "ndarray, 2 x 5"}
        assert (info.attached, info.owner == other.launcher.owner, info.busy) == (True, True, False)
        await other.execute(
            "open('made', 'w').write('abc')\nimport time; time.sleep(60)", session=names[1], answer_within=0.5
        )
        await runner.execute("mine = 1", session=names[2])
        there = await listed()
        assert (there[names[1]].busy, there[names[1]].files) == (True, (1, 3))
        assert there[names[2]].owner == runner.launcher.owner
        await other.leave()
        there = await listed()
        assert [there[name].attached for name in names] == [False, False, True]
        for name in names:
            await runner.close_session(name)
        assert not await listed()
