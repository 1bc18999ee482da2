"""What all tests share: the real engines, the fake one, and the guards that keep unit tests to themselves.

Tests marked `engine` run once on each real engine, through the fixture `engine_command`. All others may start nothing
but plain Pythons and the fake engine (see `fake_docker`), which gives what runs "in a container" its own pid namespace.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import marshal
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import hypothesis
import mcp_types
import pytest
import real_engines
from mcp import Client
from pytest_subprocess import FakeProcess
from real_engines import CommandLine, Program

import python_docker_mcp
import sandbox_runner
from sandbox_runner import (
    Config,
    DockerConfig,
    Omitted,
    PackageConfig,
    PoolConfig,
    Rich,
    Runner,
    SessionConfig,
    Text,
    open_runner,
)

ROOT = Path(__file__).parents[1]
ENGINES = ("docker", "podman")
PATIENCE = real_engines.PATIENCE

# A busy machine makes slow what is quick: no test may fail for that.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --engine."""
    parser.addoption(
        "--engine",
        action="append",
        choices=ENGINES,
        help="run the tests marked `engine` on this engine, and fail if it is not there; may be given more than once "
        "(default: on those that answer; if CI is set, on all)",
    )
    parser.addoption("--runtime", help="run the containers of Docker's with this runtime, such as runsc")
    parser.addoption(
        "--other-pythons", action="store_true", help="try the guest on the oldest and the newest Python found"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses an engine once for each of them."""
    if "engine_command" in metafunc.fixturenames:
        engines = dict.fromkeys(metafunc.config.getoption("--engine") or ENGINES)
        metafunc.parametrize("engine_command", list(engines), indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have the engines take turns with the tests that are marked so: the first is for one, the second for the other."""
    engines = list(dict.fromkeys(config.getoption("--engine") or ENGINES))
    numbers: dict[str, int] = {}
    left_out = []
    for item in items:
        if item.get_closest_marker("in_turns") and isinstance(item, pytest.Function):
            engine = item.callspec.params["engine_command"]
            test = item.nodeid.replace(f"[{engine}", "[")
            if engines[numbers.setdefault(test, len(numbers)) % len(engines)] != engine:
                left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def engine_command(request: pytest.FixtureRequest) -> str:
    """The command of a real engine that answers."""
    command = str(request.param)
    if problem := why_unusable(command):
        if request.config.getoption("--engine") or os.environ.get("CI"):
            pytest.fail(problem, pytrace=False)
        pytest.skip(problem)
    return command


@cache
def why_unusable(command: str) -> str | None:
    """What is wrong with a real engine; None if it answers."""
    try:
        answer = subprocess.run([command, "version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command} can't be used: {error}"
    return f"{command} can't be used: {answer.stderr.strip()}" if answer.returncode else None


@pytest.fixture
def config(engine_command: str, request: pytest.FixtureRequest) -> Config:
    """Settings for a real engine, with the image that needs no registry and nothing preinstalled in it."""
    runtime = request.config.getoption("--runtime") if engine_command == "docker" else None
    docker = DockerConfig(command=engine_command, image="host", runtime=runtime)
    return Config(docker=docker, package=PackageConfig(preinstalled=()))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop that tests marked `anyio` run on."""
    return "asyncio"


@pytest.fixture
def session() -> str:
    """An id that no other test uses."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def engine(engine_command: str) -> real_engines.Engine:
    """The engine's own command line."""
    return real_engines.Engine(engine_command)


@pytest.fixture
def command_line(config: Config, engine_command: str, tmp_path: Path) -> CommandLine:
    """`python sandbox_runner.py …`, or an operator's command, with the same settings as the runners of the test."""
    settings = tmp_path / "config.yaml"
    settings.write_text(json.dumps(dataclasses.asdict(config)))

    @asynccontextmanager
    async def start(*arguments: str) -> AsyncIterator[Program]:
        module = python_docker_mcp if arguments[0] in python_docker_mcp.COMMANDS else sandbox_runner
        async with await anyio.open_process(
            [sys.executable, str(module.__file__), *arguments],
            env={**os.environ, "PYTHON_DOCKER_MCP_CONFIG": str(settings)},
            start_new_session=True,
        ) as process:
            yield Program(process, engine_command)

    return start


# ── without an engine ──


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeProcess]:
    """What may be started: the fake engine and plain Pythons."""
    with FakeProcess.context() as registered:
        registered.keep_last_process(True)
        for program in (rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/.*/(docker|podman)", r"(.*/)?python[\d.]*"):
            registered.pass_command([registered.regex(program), registered.any()])  # type: ignore[list-item]  # they forgot
        for engine in ENGINES:  # asked for before it is known that a test is one of those that may start more
            registered.pass_command([engine, "version"])
        yield registered


@pytest.fixture(autouse=True)
def tripwire(
    request: pytest.FixtureRequest, processes: FakeProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeProcess]:
    """Refuse every command of a unit test that is not registered, and whatever must not run in this process."""

    def refuse(*_: object) -> None:
        raise AssertionError("the guest kills all that it may: it must run in a pid namespace, never in this process")

    monkeypatch.setattr(sandbox_runner, "kill_all_others", refuse)
    monkeypatch.setattr(sandbox_runner.Supervisor, "run", refuse)
    processes.allow_unregistered(request.node.get_closest_marker("engine") is not None)
    registered = dict(processes.definitions)
    yield processes
    processes.definitions.clear()
    processes.definitions.update(registered)


@cache
def compiled(name: str) -> types.CodeType:
    """A program of this folder, which would have to be compiled each time that it is started."""
    file = Path(__file__).with_name(name)
    return compile(file.read_text(encoding="utf-8"), str(file), "exec")


class FakeEngine:
    """A folder with the executable `docker` or `podman`, and with what that knows and writes."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.command = str(folder / kind)
        self._script: dict[str, Any] = {}
        (folder / "containers").mkdir(parents=True)
        (folder / "code").write_bytes(marshal.dumps(compiled("fake_docker")))
        Path(self.command).write_text(
            f"#!{sys.executable} -IS\nimport marshal\n"
            f"with open({str(folder / 'code')!r}, 'rb') as file:\n    code = marshal.load(file)\nexec(code)\n",
            encoding="utf-8",
        )
        Path(self.command).chmod(0o755)
        self.script(images=[DockerConfig.image])

    def script(self, **answers: Any) -> None:
        """Say how the engine's verbs answer from now on; see `fake_docker`."""
        self._script.update(answers)
        written = self.folder / "script.new"
        written.write_text(repr(self._script), encoding="utf-8")
        written.replace(self.folder / "script")  # at once: a command may be reading it

    def log(self, verb: str | None = None) -> list[list[str]]:
        """The arguments of each call so far, or of each with this verb."""
        file = self.folder / "log"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        calls: list[list[str]] = [ast.literal_eval(line) for line in lines]
        return [call for call in calls if verb in (None, call[0])]

    def run(self, *arguments: str) -> str:
        """What a command prints."""
        return subprocess.run([self.command, *arguments], capture_output=True, text=True, check=True).stdout

    def containers(self) -> list[str]:
        """The names of the containers that run, without a command."""
        return [file.name for file in (self.folder / "containers").iterdir() if self._is_alive(file)]

    def commands(self, verb: str) -> list[int]:
        """The process ids of the commands with this verb that have not ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                line = (folder / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
                if self.command in line and verb == line[line.index(self.command) + 1]:
                    found.append(int(folder.name))
        return found

    @staticmethod
    def _is_alive(file: Path) -> bool:
        try:
            record = ast.literal_eval(file.read_text(encoding="utf-8"))
            return record["process"] in Path(f"/proc/{record['pid']}/cmdline").read_text(encoding="utf-8").split("\0")
        except (OSError, SyntaxError):
            return False

    def close(self) -> None:
        """Remove the containers that are left."""
        for name in self.containers():
            with contextlib.suppress(OSError, SyntaxError):  # it may end by itself
                record = self.folder / "containers" / name
                os.kill(ast.literal_eval(record.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
        while self.containers():
            time.sleep(0.001)


@pytest.fixture(scope="session")
def make_fake_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], FakeEngine]]:
    """Makes fake engines; fails if this machine can't seal off what they run."""
    made: list[FakeEngine] = []

    def make(kind: str) -> FakeEngine:
        engine = FakeEngine(tmp_path_factory.mktemp("engine") / "bin", kind)
        if not made:
            check = subprocess.run([engine.command, "check"], capture_output=True, text=True, check=False)
            if check.returncode:
                pytest.fail(
                    "these tests need Linux with util-linux 2.38 or later and user namespaces (on "
                    "Ubuntu as root, or with kernel.apparmor_restrict_unprivileged_userns=0): in there the guest kills "
                    f"all that it may. {check.stderr.strip()}",
                    pytrace=False,
                )
            (engine.folder / "log").unlink()  # a test's log starts with what the test does
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def docker(
    make_fake_engine: Callable[[str], FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeEngine]:
    """A fake Docker, first on PATH, in a home without configuration; the guest has less patience."""
    engine = make_fake_engine("docker")
    monkeypatch.setenv("PATH", f"{engine.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in (*sandbox_runner.ENVIRONMENT, "PYTHON_DOCKER_MCP_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sandbox_runner, "INTERRUPT_GRACE", 0.6)
    monkeypatch.setattr(sandbox_runner, "WRITABLE_FOLDERS", ())  # none of this machine's are to be emptied
    yield engine
    engine.close()


@pytest.fixture
def settings(docker: FakeEngine, tmp_path: Path) -> Config:
    """Settings for the fake engine, with a working directory of the test's own and nothing prepared beforehand."""
    (tmp_path / "work").mkdir()
    return Config(
        docker=DockerConfig(command=docker.command, working_dir=str(tmp_path / "work")),
        session=SessionConfig(idle_timeout=60),
        package=PackageConfig(preinstalled=()),
        pool=PoolConfig(enabled=False),
    )


@asynccontextmanager
async def connected(config: Config, mode: str = "auto") -> AsyncIterator[Client]:
    """A client of a server in this process."""
    with anyio.fail_after(PATIENCE):
        async with open_runner(config) as runner, Client(python_docker_mcp.make_server(runner), mode=mode) as client:
            yield client


def text_of(result: mcp_types.CallToolResult) -> str:
    """All text of a result."""
    return "\n".join(block.text for block in result.content if isinstance(block, mcp_types.TextContent))


# ── what code in a sandbox does for a test, and how that is waited for ──

WAIT_FOR_GO = "import os, time\nprint('on')\nwhile not os.path.exists('go'): time.sleep(0.002)\n"


class Hears:
    """An `on_output` that tells when the first output came."""

    def __init__(self) -> None:
        self.first = anyio.Event()
        self.text = ""

    async def __call__(self, item: Text | Rich | Omitted) -> None:
        if isinstance(item, Text):
            self.text += item.text
        self.first.set()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    with anyio.fail_after(20):
        while not condition():
            await anyio.sleep(0.005)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does, outside an event loop."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def go(settings: Config) -> None:
    """Let code end that does WAIT_FOR_GO."""
    Path(settings.docker.working_dir, "go").touch()


def client(runner: Runner, session: str) -> int:
    """The process id of the engine's command line behind a session."""
    sandbox = runner.sessions[session].sandbox
    assert sandbox
    return sandbox.client.pid


async def leave_without_a_word(_: Runner) -> None:
    """Stands in for a host that is killed."""


# ── of any use ──

GREETING: dict[str, Any] = {
    "kind": "ready",
    "session": None,
    "attached": True,
    "owner": "",
    "unread": None,
    "packages": None,
}
GREETING |= {"busy": False, "age": 0, "idle": 0, "memory": None, "told": 0, "state": "preserved", "ran": 0, "left": 0}


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code object, and all within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)
