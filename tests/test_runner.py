"""The runner, from `execute` through real pipes to a guest that really runs, with a fake engine in between."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from conftest import GREETING, WAIT_FOR_GO, FakeEngine, Hears, client, go, leave_without_a_word, until
from pytest_subprocess import FakeProcess

import sandbox_runner
from sandbox_runner import (
    Config,
    DockerConfig,
    Engine,
    EngineError,
    Image,
    ImageError,
    Omitted,
    PoolConfig,
    RequestError,
    Result,
    Rich,
    Runner,
    Sandbox,
    SessionConfig,
    SessionError,
    Text,
    find_engine,
    host_image_name,
    joined,
    last_line,
    open_runner,
    run_command,
)

pytestmark = pytest.mark.anyio

STUBBORN = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on')\nwhile True: signal.pause()"


@pytest.fixture
async def runner(settings: Config) -> AsyncIterator[Runner]:
    """A runner on the fake engine; no test has longer than half a minute."""
    with anyio.fail_after(30):
        async with open_runner(settings) as opened:
            yield opened


# ── calls ──


async def test_a_result_tells_output_value_and_cost(runner: Runner) -> None:
    result = await runner.execute("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")
    assert (result.status, result.value, result.stdout, result.stderr) == ("ok", "42", "out\n", "err\n")
    assert (result.session, result.state, result.exception, result.message) == (None, None, None, None)
    assert result.wall > 0
    assert result.memory is not None
    assert result.memory > 1 << 20


async def test_a_failure_of_the_code_is_a_result_and_no_exception(runner: Runner) -> None:
    result = await runner.execute("1\nimport sklearn.base")
    assert result.status == "error"
    assert result.exception is not None
    assert (result.exception.type, result.exception.line) == ("ModuleNotFoundError", 2)
    assert result.exception.missing == "sklearn"


@pytest.mark.slow
async def test_transient_calls_share_nothing_and_leave_no_container(runner: Runner, docker: FakeEngine) -> None:
    await runner.execute("x = 1")
    assert (await runner.execute("'x' in globals()")).value == "False"
    await until(lambda: not docker.containers())


async def test_a_session_keeps_variables_functions_and_imports(runner: Runner) -> None:
    assert (await runner.execute("import math\ndef add(a, b): return a + b", session="s")).state == "preserved"
    result = await runner.execute("add(math.floor(2.5), 3)", session="s")
    assert (result.value, result.session, result.state) == ("5", "s", "preserved")


@pytest.mark.slow
async def test_a_thousand_calls_on_a_session_cost_no_engine_command(runner: Runner, docker: FakeEngine) -> None:
    await runner.execute("x = 0", session="s")
    before = docker.log()
    for _ in range(1000):
        await runner.execute("x += 1", session="s")
    assert (await runner.execute("x", session="s")).value == "1000"
    assert docker.log() == before


@pytest.mark.slow
async def test_state_goes_in_and_comes_out(runner: Runner) -> None:
    result = await runner.execute("y = x + 1\nz = {1}", state={"x": 41})
    assert result.variables == {"x": 41, "y": 42}
    assert result.variables_left_out == {"z": "set is not JSON"}
    assert (await runner.execute("y = 1", state={})).variables == {"y": 1}
    texts = {"long": "é\n" * 65536, "short": "é\n", "longer": "\\" * 3 * 65536}
    result = await runner.execute("longest = long + longer", state=texts)
    assert list((result.variables or {}).items()) == [*texts.items(), ("longest", texts["long"] + texts["longer"])]
    assert (await runner.execute("y = 1")).variables is None


@pytest.mark.slow
async def test_a_call_and_its_state_are_written_together(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = sandbox_runner.Sandbox.write

    async def writes(self: sandbox_runner.Sandbox, data: bytes) -> None:
        written.append(len(data))
        await write(self, data)

    await runner.execute("1", session="s")
    monkeypatch.setattr(sandbox_runner.Sandbox, "write", writes)
    assert (await runner.execute("x", session="s", state={"x": 1})).value == "1"
    assert len(written) == 1
    assert (await runner.execute("len(x)", session="s", state={"x": 3_000_000 * "x"})).value == "3000000"
    assert len(written) == 1 + 1
    await runner.close_session("s")


async def test_output_is_passed_on_while_the_code_runs(runner: Runner, settings: Config) -> None:
    class Go(Hears):
        async def __call__(self, item: Text | Rich | Omitted) -> None:
            await super().__call__(item)
            go(settings)

    hears = Go()
    result = await runner.execute(f"{WAIT_FOR_GO}print('off')", on_output=hears)
    assert hears.text == result.stdout == "on\noff\n"


@pytest.mark.slow
async def test_output_is_kept_within_its_limit_unless_it_is_only_streamed(settings: Config) -> None:
    small = dataclasses.replace(settings, docker=dataclasses.replace(settings.docker, output_limit="1k"))
    async with open_runner(small) as runner:
        kept = await runner.execute("print('x' * 100_000)")
        assert [type(item) for item in kept.output] == [Text, Omitted, Text]
        assert len(kept.stdout) == 1024
        hears = Hears()
        streamed = await runner.execute("print('x' * 100_000)", on_output=hears, keep_output=False)
        assert (len(hears.text), streamed.output) == (100_001, ())


async def test_a_script_has_its_name_and_arguments(runner: Runner, settings: Config) -> None:
    result = await runner.execute("import sys\n(sys.argv, __file__)", filename="a.py", arguments=["b"])
    assert result.value == f"(['a.py', 'b'], '{settings.docker.working_dir}/a.py')"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"code": "x" * (256 << 10) + "x"}, "The code is 262145 bytes long; the limit is 262144."),
        ({"code": "'\ud800'"}, "The code has lone surrogates"),
        ({"session": ""}, "'' can't be a session's id: use 1 to 128 letters"),
        ({"session": "../x"}, "'../x' can't be a session's id"),
        ({"session": "x" * 129}, "can't be a session's id"),
        ({"timeout": 0}, "A timeout of 0 seconds can't be: give a number above zero."),
        ({"timeout": float("nan")}, "A timeout of nan seconds can't be"),
        ({"timeout": float("inf")}, "A timeout of inf seconds can't be"),
        (
            {"state": {"a b": 1}},
            "state: 'a b' can't be the name of a variable: use an identifier that does not start with two underscores.",
        ),
        (
            {"state": {"__name__": 1}},
            "state: '__name__' can't be the name of a variable: use an identifier that does not start with two",
        ),
        ({"state": {"x": {1}}}, "state: the variable x can't be passed: set is not JSON."),
        ({"state": {"x": float("nan")}}, "state: the variable x can't be passed: nan is not JSON."),
    ],
)
async def test_an_argument_that_can_not_be_is_refused_before_anything_starts(
    runner: Runner, docker: FakeEngine, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        await runner.execute(**{"code": "", **arguments})
    assert says in str(caught.value)
    assert docker.log() == []


# ── order ──


async def test_calls_on_one_session_queue_in_order(runner: Runner, settings: Config) -> None:
    ended: list[str] = []
    hears = Hears()

    async def call(name: str, code: str, on_output: Hears | None = None) -> None:
        result = await runner.execute(code, session="s", on_output=on_output)
        ended.append(f"{name} {result.value}")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "first", f"x = 1\n{WAIT_FOR_GO}x", hears)
        await hears.first.wait()
        tasks.start_soon(call, "second", "x += 1\nx")
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(call, "third", "x += 1\nx")
        await anyio.wait_all_tasks_blocked()
        go(settings)
    assert ended == ["first 1", "second 2", "third 3"]


@pytest.mark.slow
async def test_different_sessions_run_at_the_same_time(runner: Runner) -> None:
    async with anyio.create_task_group() as tasks:
        hears = Hears()
        tasks.start_soon(lambda: runner.execute(WAIT_FOR_GO, session="a", on_output=hears))
        await hears.first.wait()
        result = await runner.execute("open('go', 'w').close()\n'went'", session="b")
    assert result.value == "'went'"


# ── interruption, time-out and death ──


async def test_a_call_is_cancelled_in_the_middle_and_the_session_used_again(runner: Runner) -> None:
    await runner.execute("x = 1", session="s")
    hears = Hears()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: runner.execute("x = 2\nprint('on')\nwhile True: pass", session="s", on_output=hears))
        await hears.first.wait()
        tasks.cancel_scope.cancel()
    result = await runner.execute("x", session="s")
    assert (result.value, result.lost_before) == ("2", None)


@pytest.mark.slow
@pytest.mark.parametrize("is_noticed", [False, True], ids=["at once", "once the connection's end is noticed"])
async def test_a_cancelled_call_whose_client_is_killed_at_that_moment_stops_nevertheless(
    runner: Runner, is_noticed: bool
) -> None:
    await runner.execute("x = 1", session="s")
    sandbox = runner.sessions["s"].sandbox
    assert sandbox
    hears = Hears()
    code = "x = 2\nprint('on')\nwhile True: pass"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: runner.execute(code, session="s", on_output=hears, timeout=5))
        await hears.first.wait()
        os.kill(client(runner, "s"), signal.SIGKILL)
        tasks.cancel_scope.cancel()
    if is_noticed:
        await sandbox.gone.wait()
    result = await runner.execute("x", session="s", timeout=5)
    assert (result.status, result.value, result.lost_before, result.unread) == ("ok", "2", None, None)


@pytest.mark.slow
async def test_a_call_that_is_cancelled_while_it_looks_for_its_session_leaves_no_plug(
    settings: Config, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "ATTACH_TIMEOUT", 0.5)
    async with open_runner(settings) as first:
        await first.execute("1", session="s")
    async with open_runner(settings) as runner:
        docker.script(exec={"hang": True})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: runner.execute("1", session="s"))
            await until(lambda: bool(docker.log("exec")))
            tasks.cancel_scope.cancel()
        await until(lambda: not docker.commands("exec"))


@pytest.mark.slow
async def test_cancelling_code_that_does_not_stop_costs_the_session_only_that_call(runner: Runner) -> None:
    await runner.execute("x = 1", session="s")
    hears = Hears()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: runner.execute(STUBBORN, session="s", on_output=hears))
        await hears.first.wait()
        tasks.cancel_scope.cancel()
    result = await runner.execute("'x' in globals()", session="s")
    assert (result.value, result.lost_before) == ("True", None)


async def test_a_call_that_waits_in_the_queue_can_be_cancelled(runner: Runner, settings: Config) -> None:
    hears = Hears()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: runner.execute(f"{WAIT_FOR_GO}x = 1", session="s", on_output=hears))
        await hears.first.wait()
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(lambda: runner.execute("x = 2", session="s"))
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        go(settings)
    assert (await runner.execute("x", session="s")).value == "1"


async def test_an_interrupt_is_answered_with_a_result(runner: Runner) -> None:
    interrupt = anyio.Event()

    class Stop(Hears):
        async def __call__(self, _item: Text | Rich | Omitted) -> None:
            interrupt.set()

    result = await runner.execute(
        "x = 1\nprint('on')\nwhile True: pass", session="s", interrupt=interrupt, on_output=Stop()
    )
    assert (result.status, result.state, result.stdout) == ("cancelled", "preserved", "on\n")
    assert result.exception is not None
    assert (result.exception.type, result.exception.missing) == ("KeyboardInterrupt", None)


@pytest.mark.slow
async def test_a_time_out_keeps_the_variables_of_a_session_if_the_code_stops(runner: Runner) -> None:
    result = await runner.execute("x = 1\nwhile True: pass", session="s", timeout=0.2)
    assert (result.status, result.state) == ("timeout", "preserved")
    assert result.message == "the code did not end within 0.2 seconds"
    assert (await runner.execute("x", session="s")).value == "1"


@pytest.mark.slow
async def test_a_time_out_loses_them_if_it_does_not_and_the_next_call_works(runner: Runner) -> None:
    result = await runner.execute(STUBBORN, session="s", timeout=0.2)
    assert (result.status, result.state) == ("timeout", "lost")
    assert (await runner.execute("1", session="s")).value == "1"


@pytest.mark.slow
async def test_a_sandbox_that_does_not_answer_is_removed(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "INTERRUPT_GRACE", 0.1)
    monkeypatch.setattr(sandbox_runner, "HOST_PATIENCE", 0.1)
    docker.script(run={"program": hostile("")})
    result = await runner.execute("1", session="s", timeout=0.1)
    assert (result.status, result.state) == ("timeout", "lost")
    assert result.message is not None
    assert result.message.startswith("the sandbox itself did not answer for 0.1 seconds, and was removed")
    assert docker.containers() == []
    docker.script(run={})
    assert (await runner.execute("1", session="s")).value == "1"


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("import os; os._exit(3)", 3, "the code ended its own process with exit status 3"),
        ("import ctypes; ctypes.string_at(0)", -11, "by SIGSEGV, a crash in native code"),
        ("import os; os.kill(os.getpid(), 9)", -9, "the process that ran the code was killed by SIGKILL"),
    ],
)
async def test_code_that_ends_its_process_is_told_how(runner: Runner, code: str, exit_code: int, message: str) -> None:
    result = await runner.execute(code, session="s")
    assert (result.status, result.state, result.exit_code) == ("died", "lost", exit_code)
    assert result.message is not None
    assert message in result.message
    assert (await runner.execute("1", session="s")).value == "1"


async def test_killing_the_command_line_under_a_running_call_does_not_lose_its_result(
    runner: Runner, settings: Config
) -> None:
    await runner.execute("x = 1", session="s")
    results: list[Result] = []
    hears = Hears()

    async def call() -> None:
        results.append(await runner.execute(f"{WAIT_FOR_GO}print('off')\nx", session="s", on_output=hears))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await hears.first.wait()
        cut = runner.sessions["s"].sandbox
        os.kill(client(runner, "s"), signal.SIGKILL)
        await until(lambda: runner.sessions["s"].sandbox not in (cut, None))
        go(settings)
    (result,) = results
    assert (result.status, result.state, result.value) == ("ok", "preserved", "1")
    assert result.stdout == hears.text == "on\noff\n"
    assert (await runner.execute("x", session="s")).value == "1"


async def test_killing_the_command_line_of_an_idle_session_loses_nothing(runner: Runner) -> None:
    await runner.execute("x = 1", session="s")
    os.kill(client(runner, "s"), signal.SIGKILL)
    result = await runner.execute("x", session="s")
    assert (result.value, result.state, result.lost_before) == ("1", "preserved", None)


@pytest.mark.slow
async def test_a_container_that_is_killed_between_calls_is_replaced_and_told_of(
    runner: Runner, docker: FakeEngine
) -> None:
    await runner.execute("x = 1", session="s")
    sandbox = runner.sessions["s"].sandbox
    assert sandbox
    docker.run("kill", sandbox.name)
    await sandbox.gone.wait()
    result = await runner.execute("'x' in globals()", session="s")
    assert (result.value, result.lost_before) == ("False", "its container ended")


@pytest.mark.slow
async def test_a_container_that_is_killed_under_a_call_is_told_of(runner: Runner, docker: FakeEngine) -> None:
    class Kill(Hears):
        async def __call__(self, _item: Text | Rich | Omitted) -> None:
            docker.run("kill", *docker.containers())

    result = await runner.execute(f"{WAIT_FOR_GO}", session="s", on_output=Kill())
    assert (result.status, result.state, result.stdout) == ("died", "lost", "on\n")
    assert result.message == "the container ended during the call (its process ended with exit status 137)"
    assert (await runner.execute("1", session="s")).value == "1"


@pytest.mark.slow
async def test_a_session_gets_its_name_though_its_last_container_went_only_while_it_was_asked_for(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(rename={"exit": 1, "stderr": "the name is already in use"})
    results: list[Result] = []

    async def call() -> None:
        results.append(await runner.execute("1 + 1", session="s"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await until(lambda: ["container", "inspect"] in [line[:2] for line in docker.log()])
        docker.script(rename={})
    assert [result.value for result in results] == ["2"]


async def test_a_session_whose_name_the_engine_never_gives_out_is_refused_with_the_next_step(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "ATTACH_TIMEOUT", 0.5)
    docker.script(rename={"exit": 1, "stderr": "that name is in use"})
    said = "The session 's' can't be started: `docker rename` failed: that name is in use: try again, or use another"
    with pytest.raises(EngineError, match=said):
        await runner.execute("1", session="s")
    await until(lambda: not docker.containers())


async def test_a_session_that_could_not_get_its_name_is_claimed_by_the_next_call(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(rename={"hang": True})
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: runner.execute("x = 1", session="s"))
        await until(lambda: bool(docker.log("rename")))
        tasks.cancel_scope.cancel()
    docker.script(rename={})
    await runner.execute("x = 2", session="s")
    await until(lambda: docker.containers() == [sandbox_runner.session_container("s")])


async def test_a_call_that_fails_does_not_disturb_one_that_waits_for_the_image(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    derive = sandbox_runner.derive_image

    async def while_another_fails(*arguments: Any) -> Image:
        image = await derive(*arguments)
        runner.launcher.engine = runner.launcher.image = None  # as whoever could not start a sandbox leaves it
        return image

    monkeypatch.setattr(sandbox_runner, "derive_image", while_another_fails)
    assert (await runner.execute("1 + 1")).value == "2"


async def test_a_container_that_does_not_start_is_an_error_in_the_engines_words(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(
        run={"exit": 125, "stderr": "docker: Error response from daemon: no space left.\nSee 'docker run'.\n"}
    )
    with pytest.raises(EngineError) as caught:
        await runner.execute("1", session="s")
    assert str(caught.value).startswith("A sandbox could not be started: ")
    docker.script(run={})
    assert (await runner.execute("1", session="s")).value == "1"


async def test_an_image_without_python_is_an_error_in_the_engines_words(runner: Runner, docker: FakeEngine) -> None:
    docker.script(run={"exit": 127, "stderr": 'exec: "python3": executable file not found in $PATH\n'})
    with pytest.raises(EngineError, match=r'could not be started: exec: "python3": executable file not found'):
        await runner.execute("1")


@pytest.mark.parametrize(
    "said",
    [
        "Error: OCI runtime error: crun: the requested cgroup controller `cpu` is not available",
        "NanoCPUs can not be set, as your kernel does not support CPU CFS scheduler or the cgroup is not mounted.",
    ],
)
async def test_a_rootless_engine_without_controllers_is_told_with_what_to_do(
    runner: Runner, docker: FakeEngine, said: str
) -> None:
    docker.script(run={"exit": 125, "stderr": f"{said}\n"})
    with pytest.raises(EngineError, match=r"could not be started: .*\. A rootless engine needs cgroup version 2"):
        await runner.execute("1")


# ── calls that go on after they were answered ──


async def test_a_call_that_takes_long_is_answered_with_what_there_is_and_goes_on(
    runner: Runner, settings: Config
) -> None:
    answers = [await runner.execute(f"{WAIT_FOR_GO}print('off')\n7", session="s", answer_within=0.3)]
    answers.append(await runner.execute("", session="s", answer_within=0.01))
    assert [(answer.status, answer.state) for answer in answers] == [("running", None)] * 2
    go(settings)
    answers.append(await runner.execute("", session="s"))
    assert (answers[-1].status, answers[-1].value, answers[-1].state) == ("ok", "7", "preserved")
    assert "".join(answer.stdout for answer in answers) == "on\noff\n"
    idle = await runner.execute("", session="s")
    assert (idle.status, idle.message) == ("ok", "there was no code to run, and none running to wait for")


async def answers_until(runner: Runner, text: str) -> str:
    """What the session `s` has written, at least up to this text."""
    written = ""
    while text not in written:
        answer = await runner.execute("", session="s", answer_within=0.05)
        assert answer.status == "running"
        written += answer.stdout
    return written


async def test_a_call_whose_caller_does_not_wait_at_all_is_made_all_the_same(runner: Runner) -> None:
    await runner.execute("x = 6", session="s")
    for number in range(3):
        answer = await runner.execute(f"x * {number}", session="s", answer_within=0)
        with anyio.fail_after(20):
            if answer.status == "running":  # else it has come in this very turn of the loop
                answer = await runner.execute("", session="s")
        assert answer.value == str(6 * number)


async def test_code_that_goes_on_can_be_interrupted_and_keeps_its_variables(runner: Runner) -> None:
    stop = anyio.Event()
    await runner.execute(f"x = 1\n{WAIT_FOR_GO}", session="s", answer_within=0.01)
    await answers_until(runner, "on")
    stop.set()
    result = await runner.execute("", session="s", interrupt=stop)
    assert (result.status, result.state) == ("cancelled", "preserved")
    assert (await runner.execute("x", session="s")).value == "1"


async def test_an_interruption_that_comes_before_the_code_has_begun_counts(runner: Runner) -> None:
    stop = anyio.Event()
    stop.set()
    begun = await runner.execute(WAIT_FOR_GO, session="s", answer_within=0)
    assert begun.status == "running"
    assert (await runner.execute("", session="s", interrupt=stop)).status == "cancelled"


@pytest.mark.slow
async def test_while_code_goes_on_nothing_else_runs_in_its_session(runner: Runner, settings: Config) -> None:
    await runner.execute(WAIT_FOR_GO, session="s", answer_within=0.3)
    words = "In the session 's' the code of an earlier call is still running: wait for it by a call with empty code"
    with pytest.raises(SessionError, match=words):
        await runner.execute("1", session="s", answer_within=5)
    with pytest.raises(SessionError, match=words):
        await runner.install("requests", session="s")
    go(settings)
    assert (await runner.execute("", session="s")).status == "ok"


async def test_the_next_call_tells_the_end_of_one_that_nobody_waited_for(runner: Runner, settings: Config) -> None:
    first = await runner.execute(f"{WAIT_FOR_GO}print('off')\nx = 1\n1 / 0", session="s", answer_within=0.3)
    go(settings)
    result = await runner.execute("x", session="s")  # one without answer_within waits for its turn
    assert (result.value, result.lost_before) == ("1", None)
    assert result.unread is not None
    assert (result.unread.status, first.stdout + result.unread.stdout) == ("error", "on\noff\n")
    assert (await runner.execute("x", session="s")).unread is None


async def test_who_stops_waiting_for_code_that_goes_on_does_not_stop_the_code(runner: Runner, settings: Config) -> None:
    await runner.execute(f"{WAIT_FOR_GO}x = 1", session="s", answer_within=0.01)
    with anyio.move_on_after(0.05) as patience:
        await runner.execute("", session="s")
    assert patience.cancelled_caught
    go(settings)
    assert (await runner.execute("", session="s")).status == "ok"
    assert (await runner.execute("x", session="s")).value == "1"


@pytest.mark.slow
async def test_code_that_goes_on_does_so_when_its_host_leaves_and_the_next_one_gets_the_rest(settings: Config) -> None:
    async with open_runner(settings) as first:
        await first.execute(f"{WAIT_FOR_GO}print('off')\n7", session="s", answer_within=0.01)
        assert await answers_until(first, "on") == "on\n"
    async with open_runner(settings) as second:
        still = await second.execute("", session="s", answer_within=0.1)
        go(settings)
        rest = await second.execute("", session="s")
        await second.close_session("s")
    assert (still.status, rest.status, rest.value) == ("running", "ok", "7")
    assert still.output == (Omitted(3),)  # the first host was told these, and perhaps passed them on
    assert rest.stdout == "off\n"


@pytest.mark.slow
async def test_what_keeps_a_call_from_beginning_is_told_to_who_waits_for_it(runner: Runner, docker: FakeEngine) -> None:
    docker.script(run={"exit": 125, "stderr": "no space left on device\n"})
    with pytest.raises(EngineError, match="no space left on device"):
        await runner.execute("1", session="s", answer_within=20)
    docker.script(run={"hang": True})
    assert (await runner.execute("2", session="s", answer_within=0.05)).status == "running"
    await runner.close_session("s")
    docker.script(run={})
    await until(lambda: not docker.containers())
    assert (await runner.execute("3", session="t", answer_within=20)).value == "3"


@pytest.mark.parametrize(("code", "kept"), [("x = 1", True), ("import os; os._exit(3)", False)])
async def test_who_plugs_into_a_session_is_told_whether_its_last_call_left_the_variables(
    runner: Runner, code: str, kept: bool
) -> None:
    assert ((await runner.execute(code, session="s")).state == "preserved") == kept
    sandbox = runner.sessions["s"].sandbox
    assert sandbox
    os.kill(client(runner, "s"), signal.SIGKILL)
    await sandbox.gone.wait()
    await runner.execute("1", session="s")
    again = runner.sessions["s"].sandbox
    assert again
    assert again is not sandbox
    assert again.greeting
    assert (again.greeting["state"] == "preserved") == kept


# ── hostile sandboxes ──


DONE: dict[str, Any] = {
    "kind": "done",
    "status": "ok",
    "state": "preserved",
    "lost_before": None,
    "behind": 0,
    "wall": 0.1,
    "cpu": 0,
    "oom_kills": 0,
}
DONE |= {"memory": None, "files": [], "files_left_out": {}, "stale": []}


def hostile(answer: str) -> str:
    """A program that greets as the supervisor does, then answers a request as it likes."""
    return (
        "import json, os, sys\n"
        "def say(said, data=None):\n"
        "    if data is not None: said['data'] = len(data)\n"
        "    data = (said if isinstance(said, bytes) else json.dumps(said).encode() + b'\\n') + (data or b'')\n"
        "    while data: data = data[os.write(1, data):]\n"
        f"say({GREETING})\n"
        f"done = {DONE}\n"
        "for line in sys.stdin.buffer:\n"
        '    if b\'{"op":"run"\' in line:\n'
        "        me = json.loads(line[line.index(b'{\"op\":\"run\"'):])['id']\n"
        "        done['id'] = me\n"
        f"        {answer or 'pass'}\n"
    )


async def test_a_program_that_keeps_to_the_protocol_is_believed(runner: Runner, docker: FakeEngine) -> None:
    docker.script(run={"program": hostile("say({**done, 'id': 'x'}); say({**done, 'value': '1', 'value_length': 1})")})
    assert (await runner.execute("1")).value == "1"


@pytest.mark.slow
@pytest.mark.parametrize("session", [None, "s"])
async def test_the_end_of_a_sandbox_that_did_not_take_a_call_does_not_end_the_call(
    settings: Config, docker: FakeEngine, session: str | None
) -> None:
    """It once did, if it came while the code ran in the next sandbox: on a busy host, after an install."""
    config = dataclasses.replace(settings, pool=PoolConfig(warm=1, size=2))
    docker.script(
        run={"program": hostile("say({'id': me, 'kind': 'unfit'}); import time; time.sleep(1.5); sys.exit()")}
    )
    async with open_runner(config, warm=True) as runner:
        await until(lambda: bool(runner.pool.ready))
        docker.script(run={})
        result = await runner.execute("import time\ntime.sleep(3)\n42", session=session)
        assert (result.status, result.value) == ("ok", "42"), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "say(b'x' * (2 << 20) + b'\\n')",
        "say(b'no json\\n')",
        "say(b'and I stay\\n'); import time; time.sleep(1000)",
        "say(b'\\xff\\n')",
        "say(b'[]\\n')",
        "say(b'[' * 100_000 + b'\\n')",
        "say({'id': me})",
        "say({'id': me, 'kind': 'nonsense'})",
        "say({'id': me, 'kind': 'stdout', 'data': '5'})",
        "say({'id': me, 'kind': 'stdout'})",
        "say({'id': me, 'kind': 'stdout'}, b'\\xff')",
        "say({'id': me, 'kind': 'stdout', 'data': -1})",
        "say({'id': me, 'kind': 'stdout', 'data': 5 << 20})",
        "say({'id': me, 'kind': 'omitted', 'bytes': '5'})",
        "say({'id': me, 'kind': 'state', 'left_out': {'x': 1}}, b'{}')",
        "say({'id': me, 'kind': 'text', 'name': 5}, b'text')",
        "say({'id': me, 'kind': 'done'})",
        "say({**done, 'status': 'great'})",
        "say({**done, 'wall': float('nan')})",
        "say({**done, 'wall': -1})",
        "say({**done, 'lost': 'no'})",
        "say({**done, 'value': 5})",
        "say({**done, 'exception': {'type': 'E'}})",
        "[say({'id': me, 'kind': 'stdout'}, b'x' * 900_000) for _ in range(20)]",
    ],
)
async def test_what_no_supervisor_sends_ends_the_sandbox_and_nothing_else(
    runner: Runner, docker: FakeEngine, answer: str
) -> None:
    docker.script(run={"program": hostile(answer)})
    result = await runner.execute("1", session="s")
    assert (result.status, result.state) == ("died", "lost")
    assert result.message is not None
    assert result.message.startswith("the container ended during the call (it sent what no supervisor sends: ")
    await until(lambda: not docker.containers())


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        "say({'id': me, 'kind': 'state', 'left_out': {}}, b'{\"x\": \"\\xff\"}')",
        "say({'id': me, 'kind': 'display', 'is_value': False}, b'no json')",
        "say({'id': me, 'kind': 'display', 'is_value': False}, b'[' * 100_000)",
        "say({'id': me, 'kind': 'display', 'is_value': False}, b'{\"a\": 1}')",
        "say({'id': me, 'kind': 'state', 'left_out': {}}, b'[]')",
    ],
)
async def test_data_that_is_not_what_our_worker_makes_costs_itself_and_not_the_sandbox(
    runner: Runner, docker: FakeEngine, answer: str
) -> None:
    docker.script(run={"program": hostile(f"{answer}; say({{**done}})")})
    result = await runner.execute("1", session="s")
    assert (result.status, result.state, result.message) == ("ok", "preserved", None)
    assert result.output or result.variables_left_out


@pytest.mark.slow
async def test_a_session_whose_sandbox_was_given_up_has_a_new_one_in_the_next_call(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(run={"program": hostile("say(b'no json\\n')")})
    assert (await runner.execute("1", session="s")).state == "lost"
    docker.script(run={})
    assert (await runner.execute("1", session="s")).value == "1"


@pytest.mark.slow
@pytest.mark.parametrize("greeting", ["nonsense", '{"kind": 5}', '{"kind": "ready", "unread": 5}', '{"kind": "ready"}'])
async def test_a_sandbox_that_does_not_greet_as_ours_do_is_refused(
    runner: Runner, docker: FakeEngine, greeting: str
) -> None:
    docker.script(run={"program": f"print({greeting!r}, flush=True)\nimport sys\nsys.stdin.read()"})
    with pytest.raises(EngineError, match="A sandbox could not be started"):
        await runner.execute("1")
    await until(lambda: not docker.containers())


# ── sessions and other hosts ──


@pytest.mark.slow
async def test_a_session_is_found_again_by_the_next_runner(docker: FakeEngine, settings: Config) -> None:
    async with open_runner(settings) as first:
        await first.execute("x = 1", session="s")
    async with open_runner(settings) as second:
        (info,) = await second.launcher.list_sandboxes()
        assert (info.session, info.attached, info.busy, info.owner) == ("s", False, False, first.launcher.owner)
        result = await second.execute("x", session="s")
        assert (result.value, result.state, result.lost_before) == ("1", "preserved", None)
        assert await second.close_session("s")
    await until(lambda: docker.containers() == [])  # it ended by a plug: no client of its own was waited for


@pytest.mark.slow
async def test_a_session_in_use_by_another_program_is_left_alone(runner: Runner, settings: Config) -> None:
    await runner.execute("x = 1", session="s")
    async with open_runner(settings) as other:
        with pytest.raises(SessionError, match="The session 's' is being used by another program on this host"):
            await other.execute("x = 2", session="s")
        with pytest.raises(SessionError, match="used by another program"):
            await other.close_session("s")
        (info,) = await other.launcher.list_sandboxes()
        assert (info.session, info.attached, info.owner) == ("s", True, runner.launcher.owner)
    assert (await runner.execute("x", session="s")).value == "1"


@pytest.mark.slow
async def test_the_end_of_a_call_whose_host_was_killed_is_told_to_the_next(settings: Config) -> None:
    code = f"{WAIT_FOR_GO}print('off')\nx = 5\n7"
    program = (
        "import anyio\nfrom sandbox_runner import *\n"
        "async def show(item): print(item.text, end='', flush=True)\n"
        "async def main():\n"
        f"    async with open_runner({settings!r}) as runner:\n"
        f"        await runner.execute({code!r}, session='s', on_output=show)\n"
        "anyio.run(main)"
    )
    folder = str(Path(sandbox_runner.__file__).parent)
    with anyio.fail_after(30):
        async with await anyio.open_process(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": folder}, stderr=None
        ) as host:
            assert host.stdout
            assert await host.stdout.receive() == b"on\n"
            host.kill()
        async with open_runner(settings) as runner:
            while (await runner.launcher.list_sandboxes())[
                0
            ].attached:  # what is told to a host that has just died is lost
                await anyio.sleep(0.01)
            go(settings)
            result = await runner.execute("x", session="s")
    assert (result.value, result.lost_before) == ("5", None)
    assert result.unread is not None
    assert (result.unread.status, result.unread.value) == ("ok", "7")
    assert result.unread.output == (Omitted(3), Text("stdout", "off\n"))


@pytest.mark.slow
async def test_closing_a_session_ends_its_container(runner: Runner, docker: FakeEngine) -> None:
    await runner.execute("x = 1", session="s")
    assert await runner.close_session("s")
    assert docker.containers() == []
    assert not await runner.close_session("s")
    assert (await runner.execute("'x' in globals()", session="s")).value == "False"


@pytest.mark.slow
async def test_an_error_inside_open_runner_comes_out_as_it_is(settings: Config) -> None:
    async def fail() -> None:
        async with open_runner(settings) as runner:
            await runner.execute("1", session="s")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with open_runner(settings) as runner:
        assert await runner.close_session("s")


# ── engines ──

NOT_RUNNING = json.dumps({"Client": {"ApiVersion": "1.41", "Version": "20.10.24"}, "Server": None})
OLD = json.dumps({"Client": {"ApiVersion": "1.40"}, "Server": {"Version": "19.03.1"}})
OLD_PODMAN = json.dumps({"Client": {"APIVersion": "3.0.1", "Version": "3.0.1"}})


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (
            {"stdout": NOT_RUNNING, "stderr": "Cannot connect to the Docker daemon at unix:///x.\n", "exit": 1},
            "is installed, but its engine does not answer: start Docker Desktop, .* It said: Cannot connect to",
        ),
        (
            {"stdout": NOT_RUNNING, "stderr": "Got permission denied while trying to connect\n", "exit": 1},
            r"may not be used by this user: add the user to the group docker .* It said: Got permission denied",
        ),
        ({"stdout": OLD}, "is docker 19.03.1, which is too old: version 20 or later is needed"),
        ({"stdout": OLD_PODMAN}, "is podman 3.0.1, which is too old: version 4 or later is needed"),
        (
            {"hang": True},
            "does not answer: `docker version` did not end within 0.3 seconds: .* Restart the engine it belongs to",
        ),
        ({"stdout": "a shim", "exit": 0}, ".* does not answer: .* It said: exit status 0"),
        ({"stdout": "{}", "exit": 3}, ".* does not answer: .* It said: exit status 3"),
        ({"stdout": "[]"}, ".* does not answer"),
        ({"stdout": '{"Client": null}'}, ".* does not answer"),
    ],
)
async def test_an_engine_that_can_not_be_used_is_told_in_one_sentence(
    docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, version: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(sandbox_runner, "ANSWER_TIMEOUT", 0.3 if "hang" in version else 30)
    docker.script(version=version)
    with pytest.raises(EngineError, match=f"^{docker.command} {says}"):
        await find_engine(docker.command)


@pytest.mark.slow
async def test_engines_that_hang_are_asked_side_by_side_and_told_of_once(
    docker: FakeEngine,
    make_fake_engine: Callable[[str], FakeEngine],
    settings: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    podman = make_fake_engine("podman")
    monkeypatch.setenv("PATH", f"{docker.folder}:{podman.folder}")
    monkeypatch.setattr(sandbox_runner, "USUAL_PLACES", [])
    monkeypatch.setattr(sandbox_runner, "ANSWER_TIMEOUT", 1)
    config = dataclasses.replace(settings, docker=dataclasses.replace(settings.docker, command=None))
    for engine in (docker, podman):
        engine.script(version={"hang": True})
    failures: list[str] = []

    async def call(opened: Runner) -> None:
        with pytest.raises(EngineError, match=r"`docker version` did not end within 1 seconds: the engine hangs"):
            await opened.execute("1")
        failures.append("told")

    async with open_runner(config) as opened:
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(call, opened)
            await until(lambda: bool(docker.commands("version") and podman.commands("version")))
        assert len(failures) == 5
        assert len(docker.log("version")) == 1, "each of them waited for itself, one after the other"
        podman.script(version={})
        docker.script(version={})
        assert (await opened.execute("6 * 7")).value == "42"


@pytest.mark.slow
async def test_an_engine_that_begins_to_hang_is_told_of_before_a_sandbox_is_given_up(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "DOUBT_AFTER", 0.3)
    monkeypatch.setattr(sandbox_runner, "ANSWER_TIMEOUT", 0.5)
    assert (await runner.execute("1")).value == "1"
    docker.script(run={"hang": True}, version={"hang": True}, kill={"hang": True}, rm={"hang": True})
    with pytest.raises(EngineError, match=r"`docker version` did not end within 0\.5 seconds: the engine hangs"):
        await runner.execute("2")
    await until(lambda: not docker.commands("run"))
    docker.script(run={}, version={}, kill={}, rm={})
    assert (await runner.execute("3")).value == "3"


@pytest.mark.slow
async def test_an_engine_that_stands_still_with_its_containers_is_told_of_and_costs_a_session_nothing(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DOUBT_AFTER", "PONG_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 0.4)
    await runner.execute("x = 41", session="s")
    (container,) = docker.containers()
    docker.run("pause", container)
    verbs = ("version", "ps", "exec", "kill", "rm", "container_inspect", "run")
    docker.script(**{verb: {"hang": True} for verb in verbs})
    with pytest.raises(EngineError, match=r"`docker version` did not end within 0\.4 seconds: the engine hangs"):
        await runner.execute("x += 1", session="s")
    docker.script(**{verb: {} for verb in verbs})
    docker.run("unpause", container)
    result = await runner.execute("x", session="s")
    assert (result.value, result.lost_before) in (("41", None), ("42", None)), result
    assert docker.containers() == [container]


@pytest.mark.slow
async def test_an_engine_that_stands_still_in_the_middle_of_a_call_is_told_of_and_the_call_goes_on_when_it_does(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, settings: Config
) -> None:
    for name in ("DOUBT_AFTER", "PONG_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 0.4)
    verbs = ("version", "ps", "exec", "kill", "rm", "container_inspect", "run")

    class Pause(Hears):
        async def __call__(self, _item: Text | Rich | Omitted) -> None:
            docker.run("pause", *docker.containers())
            docker.script(**{verb: {"hang": True} for verb in verbs})

    with pytest.raises(EngineError, match="the engine hangs"):
        await runner.execute(f"{WAIT_FOR_GO}7", session="s", on_output=Pause())
    for name in ("DOUBT_AFTER", "PONG_TIMEOUT", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 10.0)  # a busy machine may answer late, and that is not this test's
    docker.script(**{verb: {} for verb in verbs})
    docker.run("unpause", *docker.containers())
    go(settings)
    result = await runner.execute("", session="s")
    assert (result.status, result.value, result.state) == ("ok", "7", "preserved")


@pytest.mark.slow
async def test_code_that_is_silent_for_long_is_not_taken_for_a_sandbox_that_is(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Sandbox.ask

    async def ask_until_the_end(sandbox: Sandbox, question: Any) -> Any:
        assert sandbox.call
        answer = await ask(sandbox, question)
        await sandbox.call.ended.wait()
        return answer

    monkeypatch.setattr(sandbox_runner, "DOUBT_AFTER", 0.05)
    monkeypatch.setattr(Sandbox, "ask", ask_until_the_end)
    hears = Hears()
    result = await runner.execute("import time\ntime.sleep(0.4); print('off')", session="s", on_output=hears)
    assert (result.status, result.stdout, hears.text) == ("ok", "off\n", "off\n")


@pytest.mark.slow
@pytest.mark.parametrize("session", [None, "s"])
async def test_a_sandbox_that_ends_while_it_is_asked_whether_it_is_there_is_told_as_any_other_end(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, session: str | None
) -> None:
    monkeypatch.setattr(sandbox_runner, "DOUBT_AFTER", 0.2)
    asked, ask = anyio.Event(), Sandbox.ask

    async def heard(sandbox: Sandbox, question: Any) -> Any:
        asked.set()
        return await ask(sandbox, question)

    async def end_it() -> None:
        await hears.first.wait()
        (container,) = docker.containers()
        docker.run("pause", container)
        await asked.wait()
        docker.run("rm", "--force", container)

    monkeypatch.setattr(Sandbox, "ask", heard)
    hears = Hears()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_it)
        result = await runner.execute("print('on', flush=True)\nwhile True: pass", session=session, on_output=hears)
    assert (result.status, result.stdout) == ("died", "on\n")


@pytest.mark.slow
async def test_a_session_is_not_said_to_have_ended_nor_a_package_to_be_coming_by_an_engine_that_hangs(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DOUBT_AFTER", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 0.4)
    await runner.execute("x = 41", session="s")
    (container,) = docker.containers()
    docker.run("pause", container)
    docker.script(version={"hang": True}, run={"hang": True}, kill={"hang": True})
    with pytest.raises(EngineError, match="the engine hangs"):
        await runner.install("alpha")
    with pytest.raises(EngineError, match="the engine hangs"):
        await runner.close_session("s")
    docker.script(version={}, run={}, kill={})
    docker.run("unpause", container)
    assert (await runner.execute("1")).value == "1"
    await runner.close_session("s")
    await until(lambda: not docker.containers())


@pytest.mark.slow
async def test_code_that_is_silent_for_long_is_left_alone(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DOUBT_AFTER", "ANSWER_TIMEOUT"):
        monkeypatch.setattr(sandbox_runner, name, 0.2)
    await runner.execute("x = 41", session="s")
    docker.script(version={"hang": True})  # which nobody needs to ask, as the sandbox answers
    assert (await runner.execute("import time; time.sleep(1); x", session="s")).value == "41"


async def test_a_lock_is_one_programs_at_a_time_and_none_where_there_is_no_place_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    waits = anyio.Event()
    order: list[str] = []

    async def other() -> None:
        async with sandbox_runner.file_lock("x", waits.set) as has_waited:
            order.append(f"other {has_waited}")

    async with anyio.create_task_group() as tasks, sandbox_runner.file_lock("x", waits.set) as has_waited:
        tasks.start_soon(other)
        await waits.wait()
        order.append(f"first {has_waited}")
    assert order == ["first False", "other True"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    async with sandbox_runner.file_lock("x", waits.set) as has_waited:
        assert not has_waited


async def test_no_engine_at_all_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox_runner, "USUAL_PLACES", [])
    with pytest.raises(EngineError, match=r"^No container engine was found: install Docker \(https://docs"):
        await find_engine()
    with pytest.raises(EngineError, match=r"^docker\.command is 'dokcer', but there is no such program"):
        await find_engine("dokcer")


async def test_an_engine_is_found_in_the_usual_places_when_path_is_short(
    docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sandbox_runner, "USUAL_PLACES", [str(docker.folder)])
    assert (await find_engine()).command == docker.command


def test_an_engine_finds_its_helpers_beside_it_and_where_it_really_is(
    docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/bin")
    link = tmp_path / "docker"
    link.symlink_to(docker.command)
    assert sandbox_runner.path_for(str(link)) == f"/bin:{tmp_path}:{docker.folder}"


async def test_podman_is_taken_if_docker_does_not_answer(
    docker: FakeEngine, make_fake_engine: Callable[[str], FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    podman = make_fake_engine("podman")
    monkeypatch.setenv("PATH", f"{docker.folder}:{podman.folder}:{os.environ['PATH']}")
    assert (await find_engine()).kind == "docker"
    docker.script(version={"stdout": NOT_RUNNING, "exit": 1})
    assert await find_engine() == Engine(podman.command, "podman", "4.3.1")


async def test_a_command_named_docker_may_be_podman(docker: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(docker.folder))
    monkeypatch.setattr(sandbox_runner, "USUAL_PLACES", [])
    docker.script(version={"stdout": json.dumps({"Client": {"APIVersion": "4.3.1", "Version": "4.3.1"}})})
    assert (await find_engine()).kind == "podman"


async def test_an_engine_that_was_down_is_looked_for_again(runner: Runner, docker: FakeEngine) -> None:
    docker.script(version={"stdout": NOT_RUNNING, "exit": 1})
    with pytest.raises(EngineError):
        await runner.execute("1")
    docker.script(version={})
    assert (await runner.execute("1")).value == "1"


async def test_engine_commands_get_what_they_need_of_the_environment_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///somewhere")
    for secret in ("AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(secret, "http://user:password@proxy")
    show = "import os; print(*sorted(os.environ.items()))"
    _, output, _ = await run_command([sys.executable, "-c", show], 20)
    assert "DOCKER_HOST" in output
    assert "password" not in output


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ""),
        ("a\nb\n\n", "b"),
        ("pulling\rdone\r", "done"),
        ("x\x1b[31mred\x07", "x [31mred"),
        ("word " * 200, "word " * 58 + "word …"),
        ("docker: no such network.\n\nRun 'docker run --help' for more information\n", "docker: no such network."),
        ("docker: no such network.\nSee 'docker run --help'.\n", "docker: no such network."),
        ("See 'docker run --help'.", "See 'docker run --help'."),
        ("Get http://me:secret@proxy:1/v2: refused", "Get http://***@proxy:1/v2: refused"),
    ],
)
def test_the_last_line_that_an_engine_says_is_made_fit_to_show(text: str, line: str) -> None:
    assert last_line(text) == line


# ── image ──


async def image(runner: Runner) -> Image:
    await runner.execute("1")
    assert runner.launcher.image
    return runner.launcher.image


def with_image(runner: Runner, name: str) -> None:
    config = runner.launcher.config
    runner.launcher.config = dataclasses.replace(config, docker=dataclasses.replace(config.docker, image=name))


async def test_an_image_that_is_there_is_used_without_pulling(runner: Runner, docker: FakeEngine) -> None:
    assert ((await image(runner)).name, (await image(runner)).origin) == (DockerConfig.image, "present")
    assert docker.log("pull") == []


async def test_an_image_that_is_not_there_is_pulled(runner: Runner, docker: FakeEngine) -> None:
    docker.script(images=[], pull={"exit": 0, "stderr": "Pulling fs layer\n"})
    with_image(runner, "python:3.13")
    assert (await image(runner)).origin == "pulled"
    assert docker.log("pull") == [["pull", "python:3.13"]]
    assert "python:3.13" in docker.log("run")[0]


async def test_an_image_that_can_not_be_pulled_is_told_with_the_engines_reason(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(images=[])
    with_image(runner, "example.org/none:1")
    with pytest.raises(
        ImageError, match=r"^The image example.org/none:1 is not here and can't be pulled: .*manifest unknown"
    ):
        await runner.execute("1")
    assert docker.log("run") == []


async def test_the_default_image_is_replaced_by_one_from_this_python_that_is_there_already(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(images=[host_image_name()])
    assert (await image(runner)).name == host_image_name()
    assert docker.log("pull") == docker.log("import") == []


@pytest.mark.slow
async def test_the_default_image_that_can_not_be_pulled_is_made_from_this_python(
    runner: Runner, docker: FakeEngine, tripwire: FakeProcess
) -> None:
    tripwire.pass_command(["ldd", tripwire.any()])
    docker.script(images=[])
    assert (await image(runner)).origin == "made from this host's Python"
    assert docker.log("import")[0][-2:] == ["-", host_image_name()]


async def test_an_image_that_can_not_be_made_is_told_with_the_engines_reason(
    runner: Runner, docker: FakeEngine, tripwire: FakeProcess
) -> None:
    tripwire.pass_command(["ldd", tripwire.any()])
    docker.script(images=[], **{"import": {"exit": 1, "stderr": "no space left on device\n"}})
    with_image(runner, "host")
    with pytest.raises(ImageError, match=r"can't be made from this host's Python: .*no space left on device"):
        await runner.execute("1")


# ── the engine's command line ──


def arguments(kind: Any, **docker: Any) -> list[str]:
    engine = Engine("/bin/x", kind, "1")
    config = Config(docker=DockerConfig(**docker))
    image = Image("IMAGE", "sha256:0123456789abcdef", "present")
    return engine.sandbox_arguments("NAME", image, config, {"owner": "OWNER"})


@pytest.mark.parametrize("kind", ["docker", "podman"])
@pytest.mark.parametrize(
    "flag",
    [
        "--interactive",
        "--rm",
        "--pull=never",
        "--name=NAME",
        "--label=python-docker-mcp.sandbox.owner=OWNER",
        "--network=none",
        "--read-only",
        "--memory=268435456",
        "--memory-swap=268435456",
        "--cpus=0.5",
        "--pids-limit=256",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--ulimit=core=1:1",
        "--workdir=/app",
        "--env=HTTPS_PROXY=",
        "--entrypoint=python3",
    ],
)
def test_every_sandbox_is_locked_down(kind: str, flag: str) -> None:
    options = arguments(kind)
    assert flag in options[: options.index("--")]


def test_the_image_comes_after_all_options() -> None:
    options = arguments("docker", image="x")
    assert options[options.index("--") + 1 : -1] == ["IMAGE", "-I", "-c"]


def test_root_and_working_directory_are_writable_only_within_limits() -> None:
    mounts = [flag for flag in arguments("docker", disk_limit="1m", working_dir="/w") if flag.startswith("--tmpfs=")]
    assert [mount.partition("=")[2].partition(":")[0] for mount in mounts] == ["/tmp", "/w"]
    assert all("size=1048576" in mount and "nosuid" in mount and "nodev" in mount for mount in mounts)


def test_podman_is_told_what_docker_does_not_know() -> None:
    only_podman = {"--read-only-tmpfs=false", "--http-proxy=false", "--sig-proxy=false"}
    assert only_podman <= set(arguments("podman"))
    assert not only_podman & set(arguments("docker"))


@pytest.mark.parametrize(
    ("setting", "flag"), [({"network_disabled": False}, "--network=none"), ({"read_only": False}, "--read-only")]
)
def test_a_restriction_that_is_switched_off_is_not_there(setting: dict[str, bool], flag: str) -> None:
    assert flag not in arguments("docker", **setting)


def test_a_mount_that_has_gone_or_become_another_since_is_the_engine_s_error(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    config = Config(DockerConfig(mounts=(f"{folder}:/data",)))
    folder.rmdir()
    with pytest.raises(EngineError, match=r"A sandbox can't be started: .* does not exist on this host\.$"):
        Engine("/bin/x", "docker", "1").sandbox_arguments("NAME", Image("i", "id", "x"), config, {})
    folder.symlink_to("/")
    with pytest.raises(EngineError, match=r"A sandbox can't be started: .* it is the host's root"):
        Engine("/bin/x", "docker", "1").sandbox_arguments("NAME", Image("i", "id", "x"), config, {})


def test_runtime_and_mounts_are_passed_on(tmp_path: Path) -> None:
    options = arguments("docker", runtime="runsc", mounts=(f"{tmp_path}:/data",))
    assert "--runtime=runsc" in options
    assert any(option.startswith(f"--mount=type=bind,source={tmp_path},target=/data,r") for option in options)


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [
        ("docker", "all", ['--gpus="all"']),
        ("docker", "device=0,GPU-1a2b", ['--gpus="device=0,GPU-1a2b"']),
        ("podman", "all", ["--device=nvidia.com/gpu=all"]),
        ("podman", "device=0,1:0", ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=1:0"]),
        ("docker", None, []),
        ("podman", None, []),
    ],
)
def test_gpus_are_asked_for_as_each_engine_wants_it(engine: Any, gpus: str | None, expected: list[str]) -> None:
    options = arguments(engine, gpus=gpus)
    assert [option for option in options if option.startswith(("--gpus", "--device"))] == expected
    assert ("--env=NVIDIA_DRIVER_CAPABILITIES=compute,utility" in options) is bool(gpus)


# ── output ──


def test_neighbouring_pieces_of_a_stream_are_joined() -> None:
    rich = Rich({"text/plain": "x"})
    pieces: list[Text | Rich | Omitted] = [
        Text("stdout", "a"),
        Text("stdout", "b"),
        rich,
        rich,
        Text("stderr", "c"),
        Omitted(1),
        Text("stderr", "d"),
    ]
    assert joined(pieces) == (Text("stdout", "ab"), rich, rich, Text("stderr", "c"), Omitted(1), Text("stderr", "d"))


@pytest.mark.slow
async def test_more_sessions_than_allowed_are_refused_with_the_list_of_those_there_are(settings: Config) -> None:
    config = dataclasses.replace(settings, session=SessionConfig(max=2))
    async with open_runner(config) as runner:
        for name in ("one", "two"):
            await runner.execute("x = 1", session=name)
        with pytest.raises(SessionError, match=r"2 sessions already.*one, two.*End one of them first"):
            await runner.execute("1", session="three")
        assert (await runner.execute("x", session="one")).value == "1"
        await runner.close_session("one")
        assert (await runner.execute("3", session="three")).value == "3"
        for name in ("two", "three"):
            await runner.close_session(name)


@pytest.mark.slow
async def test_a_session_whose_code_is_running_does_not_make_room(settings: Config) -> None:
    config = dataclasses.replace(settings, session=SessionConfig(max=1, evict=True))
    async with open_runner(config) as runner:
        begun = await runner.execute(WAIT_FOR_GO, session="one", answer_within=0.01)
        while "on" not in begun.stdout:
            begun = await runner.execute("", session="one", answer_within=0.05)
        with pytest.raises(SessionError, match="1 sessions already"):
            await runner.execute("1", session="two")
        go(settings)
        assert (await runner.execute("", session="one")).status == "ok"
        assert (await runner.execute("2", session="two")).value == "2"
        await runner.close_session("two")


@pytest.mark.slow
async def test_if_that_is_allowed_the_longest_idle_session_makes_room_and_its_next_call_is_told(
    settings: Config,
) -> None:
    config = dataclasses.replace(settings, session=SessionConfig(max=2, evict=True))
    async with open_runner(config) as runner:
        for name in ("one", "two"):
            await runner.execute("x = 1", session=name)
        await runner.execute("x", session="one")
        await runner.execute("1", session="three")
        assert (await runner.execute("x", session="one")).value == "1"
        told = await runner.execute("1", session="two")
        assert "make room" in (told.lost_before or "")
        for name in ("one", "two", "three"):
            await runner.close_session(name)


@pytest.mark.slow
async def test_a_pool_that_is_full_lets_calls_wait_for_their_turn(settings: Config) -> None:
    status: list[str] = []
    config = dataclasses.replace(settings, pool=PoolConfig(size=1))
    async with open_runner(config, warm=True, on_status=status.append) as runner, anyio.create_task_group() as tasks:
        values: list[str | None] = []

        async def run(number: int) -> None:
            values.append((await runner.execute(f"import time; time.sleep(0.05); {number}")).value)

        for number in range(4):
            tasks.start_soon(run, number)
        with anyio.fail_after(30):
            while len(values) < 4:
                await anyio.sleep(0.01)
    assert values == ["0", "1", "2", "3"]  # in the order of coming
    assert any("pool.size" in line for line in status)


@pytest.mark.parametrize("same", [True, False])
async def test_a_ready_sandbox_whose_host_was_killed_is_adopted_if_it_is_as_the_next_host_makes_them(
    settings: Config, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    config = dataclasses.replace(settings, pool=PoolConfig(size=1, warm=1, preload=("json",)))
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "leave", leave_without_a_word)
        async with open_runner(config, warm=True) as first:
            await until(lambda: bool(first.pool.ready and first.pool.ready[0].prepared.is_set()))
            left = first.pool.ready[0].name
    assert docker.containers() == [left]
    if not same:
        config = dataclasses.replace(config, docker=dataclasses.replace(config.docker, memory_limit="100m"))
    async with open_runner(config, warm=True) as second:
        await until(lambda: len(second.pool.ready) == 1)
        assert (second.pool.ready[0].name == left) == same
        assert (await second.execute("40 + 2")).value == "42"
    await until(lambda: docker.containers() == ([] if same else [left]))


async def test_a_sandbox_used_again_has_nothing_of_its_last_use(settings: Config, docker: FakeEngine) -> None:
    config = dataclasses.replace(settings, pool=PoolConfig(size=1, warm=0, reuse=True))
    async with open_runner(config) as runner:
        leave = "import builtins, os, sys; builtins.left = 1; os.environ['LEFT'] = 'x'; sys.path.append('left'); x = 1"
        await runner.execute(f"{leave}; open('left', 'w').close()")
        with anyio.fail_after(30):
            look = (
                "import builtins, os, sys; 'left' in [*vars(builtins), *sys.path, *os.listdir()], 'LEFT' in os.environ"
            )
            result = await runner.execute(f"{look}, 'x' in globals()")
    assert result.value == "(False, False, False)", result
    assert len(docker.log("run")) == 1, "it was not used again"


@pytest.mark.slow
@pytest.mark.parametrize("session", [None, "s"])
async def test_a_ready_sandbox_that_was_killed_behind_our_back_costs_a_call_nothing(
    settings: Config, docker: FakeEngine, session: str | None
) -> None:
    config = dataclasses.replace(settings, pool=PoolConfig(warm=1))
    async with open_runner(config, warm=True) as runner:
        await until(lambda: bool(runner.pool.ready and not runner.pool.ready[0].answers))
        docker.run("kill", runner.pool.ready[0].name)  # and this loop has no time to notice
        result = await runner.execute("open('ran', 'x').close(); 6 * 7", session=session)
        assert (result.status, result.value, result.lost_before) == ("ok", "42", None), result
        assert result.is_new == (session is not None)


async def test_a_call_that_began_is_not_made_again(settings: Config, docker: FakeEngine) -> None:
    async with open_runner(settings) as runner:
        hears = Hears()
        results: list[Result] = []

        async def call() -> None:
            results.append(await runner.execute("print('on')\nwhile True: pass", on_output=hears))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await hears.first.wait()
            docker.run("kill", docker.containers()[0])
        assert results[0].status == "died"
        assert len(docker.log("run")) == 1


@pytest.mark.slow
async def test_ready_sandboxes_are_renewed_before_they_are_too_old_until_nobody_makes_calls(
    settings: Config, docker: FakeEngine
) -> None:
    config = dataclasses.replace(
        settings,
        pool=PoolConfig(warm=2, max_age=1),
        session=SessionConfig(idle_timeout=1.5),
    )
    async with open_runner(config, warm=True) as runner:
        pool = runner.pool
        await until(lambda: len(pool.ready) == 2)
        first = {sandbox.name for sandbox in pool.ready}
        seen = 99
        with anyio.fail_after(20):
            while first & {sandbox.name for sandbox in pool.ready}:
                seen = min(seen, len(pool.ready))
                await anyio.sleep(0.005)
        assert seen >= 1, "there was none for a while"
        assert (await runner.execute("6 * 7")).value == "42"
        await until(lambda: not docker.containers())  # nobody has made a call for a while
        assert not pool.ready
        assert (await runner.execute("6 * 7", session="s")).value == "42"
        await until(lambda: len(pool.ready) == 2)
        end = anyio.current_time() + 3  # twice what they would be kept for without a call
        while anyio.current_time() < end:
            await runner.execute("1", session="s")  # which takes none of them
            await anyio.sleep(0.1)
        assert pool.ready


@pytest.mark.slow
async def test_the_engine_is_not_busied_with_a_sandboxs_successor_or_end_while_its_call_is_answered(
    settings: Config, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "HEAD_START", 1.0)
    config = dataclasses.replace(settings, pool=PoolConfig(warm=1))
    async with open_runner(config, warm=True) as runner:
        await until(lambda: bool(runner.pool.ready))
        used = docker.containers()
        await runner.execute("1")
        assert (docker.containers(), len(docker.log("run"))) == (used, 1)
        await until(lambda: len(docker.containers()) == 1 and docker.containers() != used)


@pytest.mark.slow
async def test_calls_wait_for_a_sandbox_that_is_being_cleaned_rather_than_for_a_new_one(
    settings: Config, docker: FakeEngine
) -> None:
    config = dataclasses.replace(settings, pool=PoolConfig(warm=1, reuse=True))
    async with open_runner(config, warm=True) as runner, anyio.create_task_group() as tasks:
        await runner.execute("0")
        await until(lambda: 0 < runner.pool.count == len(runner.pool.ready))  # none is being made or cleaned
        before = len(docker.log("run"))
        for _ in range(5):
            await runner.execute("1")
        assert len(docker.log("run")) == before
        at_once: list[str | None] = []

        async def call() -> None:
            at_once.append((await runner.execute("2")).value)

        for _ in range(2):
            tasks.start_soon(call)
    assert at_once == ["2", "2"]
    assert len(docker.log("run")) <= before + 1, "one more for two at once"


@pytest.mark.slow
async def test_who_leaves_starts_no_successors_of_the_sandboxes_that_end_with_that(settings: Config) -> None:
    config = dataclasses.replace(settings, pool=PoolConfig(warm=4))
    async with open_runner(config, warm=True) as runner:
        await until(lambda: len(runner.pool.ready) == 4)
        successors: list[Sequence[str]] = []

        async def create(preload: Sequence[str], _: object) -> Sandbox:
            successors.append(preload)
            raise EngineError("Nobody needs it.")

        runner.pool.create = create
    assert successors == []


async def test_nothing_is_made_ready_while_calls_wait_for_new_sandboxes() -> None:
    class Stub:
        created = math.inf
        gone = prepared = anyio.Event()

    created: list[Sequence[str]] = []
    go = anyio.Event()

    async def create(preload: Sequence[str], _: object) -> Any:
        created.append(preload)
        await go.wait()
        return Stub()

    async with anyio.create_task_group() as tasks:
        pool = sandbox_runner.Pool(create, PoolConfig(warm=2, preload=("numpy",)), tasks, 60)
        for _ in range(3):
            tasks.start_soon(pool.lease)
        await anyio.wait_all_tasks_blocked()
        pool.keep_warm()
        await anyio.wait_all_tasks_blocked()
        assert created == [()] * 3
        go.set()
        await anyio.wait_all_tasks_blocked()
        assert created == [(), (), (), ("numpy",), ("numpy",)]
        tasks.cancel_scope.cancel()


async def test_state_that_is_refused_costs_a_session_nothing(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    await runner.execute("x = 1", session="s")
    monkeypatch.setattr(sandbox_runner, "STATE_LIMIT", 10)
    with pytest.raises(RequestError, match="the limit is 10"):
        await runner.execute("x = 2", session="s", state={"y": "much too long"})
    assert (await runner.execute("x", session="s")).value == "1"
    await runner.close_session("s")


# ── what a call must not cost ──


@pytest.mark.slow
async def test_a_caller_that_takes_output_slowly_holds_the_code_back_and_loses_nothing(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "INTERRUPT_GRACE", 0.1)
    monkeypatch.setattr(sandbox_runner, "HOST_PATIENCE", 0.1)
    received = 0

    async def on_output(item: object) -> None:
        nonlocal received
        if not received:
            await anyio.sleep(4)  # twice what the code may take
        assert isinstance(item, Text)
        received += len(item.text)

    code = "for n in range(20_000): print('x' * 999)\n'done'"
    result = await runner.execute(code, timeout=2, on_output=on_output, keep_output=False)
    assert (result.status, result.value, received) == ("ok", "'done'", 20_000_000)


async def test_an_error_that_ended_an_earlier_call_is_told_as_its_own_and_the_new_code_runs(
    runner: Runner, docker: FakeEngine
) -> None:
    docker.script(down="Cannot connect to the Docker daemon")
    with pytest.raises(EngineError):
        await runner.execute("1", session="s")  # at once, as somebody waits for it
    docker.script(down=None)
    entry = runner.sessions["s"]
    failed = entry.call = sandbox_runner.Call(sandbox_runner.Request("1", "s"))
    failed.fail(EngineError("The engine has failed."))  # as while it was placed, after it was answered as running
    result = await runner.execute("6 * 7", session="s")
    assert (result.status, result.value) == ("ok", "42")
    assert result.unread is not None
    assert (result.unread.status, result.unread.message) == ("died", "it could not be run: The engine has failed")


@pytest.mark.slow
async def test_of_sessions_that_have_ended_little_is_kept(
    runner: Runner, docker: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "ENDED_SESSIONS", 3)
    for number in range(6):
        await runner.execute("print('x' * 100_000)", session=f"s{number}")
        sandbox = runner.sessions[f"s{number}"].sandbox
        assert sandbox
        assert sandbox.call is None, "its output was told, and is not kept as long as the session"
        docker.run("kill", sandbox_runner.session_container(f"s{number}"))
        await until(sandbox.gone.is_set)
    await runner.execute("1", session="last")
    assert list(runner.sessions) == ["s3", "s4", "s5", "last"]
    assert runner.living() == {"last"}


async def test_interrupting_where_nothing_runs_says_so(runner: Runner) -> None:
    await runner.execute("x = 1", session="s")
    stop = anyio.Event()
    stop.set()
    result = await runner.execute("", session="s", interrupt=stop)
    assert (result.status, result.message, result.exception) == ("ok", "nothing was running", None)
    assert (await runner.execute("x", session="s")).value == "1"


@pytest.mark.slow
async def test_an_install_neither_runs_a_call_nor_costs_an_unread_one(
    runner: Runner, settings: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "packages").mkdir()

    async def install(*_: object) -> sandbox_runner.Outcome:
        return sandbox_runner.Outcome(True, folder=str(tmp_path / "packages"), installed=(("x", "1"),))

    monkeypatch.setattr(runner.launcher, "install", install)
    answer = await runner.execute(f"y = 1\n{WAIT_FOR_GO}print('off')", session="s", answer_within=0)
    assert answer.status == "running"
    with pytest.raises(SessionError, match="the code of an earlier call is still running"):
        await runner.install("x", session="s")
    go(settings)
    entry = runner.sessions["s"]
    assert entry.call
    await until(entry.call.ended.is_set)
    assert (await runner.install("x", session="s")).ok
    result = await runner.execute("y", session="s")
    assert result.unread
    assert result.unread.stdout.endswith("off\n")
    assert (result.value, result.earlier, result.lost_before) == ("1", "", None)


async def test_a_session_of_another_version_is_told_at_once_not_harmed_and_can_be_ended(
    runner: Runner, docker: FakeEngine, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_runner, "PROTOCOL", 3)
        async with open_runner(settings) as older:
            await older.execute("x = 1", session="old")
    for _ in range(2):
        with pytest.raises(SessionError, match="'old' was begun by another version of this server"):
            await runner.execute("x", session="old")
    assert docker.containers() == [sandbox_runner.session_container("old")]
    (info,) = await runner.launcher.list_sandboxes()
    assert not info.is_known
    assert await runner.close_session("old")
    await until(lambda: not docker.containers())
