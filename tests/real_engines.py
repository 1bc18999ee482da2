"""What tests need that look at real engines behind the runner's back, or run programs on them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio
import anyio.abc
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

import sandbox_runner
from sandbox_runner import LABEL, Runner

PATIENCE = 60  # seconds; the end of what would otherwise wait for ever, and no measure of anything
T = TypeVar("T")

# What code in a sandbox does to wait for the test, and how the test lets it go on: see `let_go`.
WAIT = "while not __import__('os').path.exists('/tmp/go'): __import__('time').sleep(0.01)\n"


class Engine:
    """The engine's own command line, for looking and meddling behind the runner's back."""

    def __init__(self, command: str) -> None:
        self.command = command

    async def __call__(self, *arguments: str) -> str:
        """Run a command and return what it prints."""
        with anyio.fail_after(PATIENCE):
            done = await anyio.run_process([self.command, *arguments], check=False)
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, [self.command, *arguments])
            error.add_note(done.stderr.decode())
            raise error
        return done.stdout.decode()

    def kill_at_once(self, name: str) -> None:
        """Kill a container while the event loop stands still, so that nobody can notice."""
        subprocess.run([self.command, "kill", name], check=True, capture_output=True)

    async def containers_of(self, runner: Runner) -> list[str]:
        """The names of the containers that this very runner has started."""
        return (
            await self("ps", "-a", f"--filter=label={LABEL}.owner={runner.launcher.owner}", "--format={{.Names}}")
        ).split()

    async def container_of(self, runner: Runner) -> str:
        """The name of the only container of this runner."""
        (name,) = await self.containers_of(runner)
        return name

    async def inspect(self, name: str) -> Any:
        """What the engine knows about a container."""
        (about,) = json.loads(await self("inspect", name))
        return about

    async def let_go(self, name: str) -> None:
        """Tell the code in a container to go on."""
        # The container may be gone before the engine can say how this went; without the file the code would not go on.
        with contextlib.suppress(subprocess.CalledProcessError):
            await self("exec", "--user=65534:65534", name, "python3", "-c", "open('/tmp/go', 'w')")

    async def clients_of(self, runner: Runner) -> list[int]:
        """The process ids of the engine's command lines that started this runner's containers, and still run."""
        return clients(self.command, f"--label={LABEL}.owner={runner.launcher.owner}")

    async def is_gone(self, name: str, runner: Runner | None = None) -> bool:
        """Whether the container is gone, and with it the engine's command lines that were busy with it.

        One that becomes a session's is renamed; then its command line is known by its `runner`, if that has no other.
        That runner has noticed too: a call that comes before that dies with the container.
        """
        if runner and any(sandbox.name == name and not sandbox.gone.is_set() for sandbox in runner.held()):
            return False
        marks = [name, f"--name={name}", *([f"--label={LABEL}.owner={runner.launcher.owner}"] if runner else [])]
        return name not in (await self("ps", "-a", "--format={{.Names}}")).split() and not clients(self.command, *marks)


def prune_at_once(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Have what never ran pruned without a pause, if it is in the set that is returned; others may just be starting."""
    names: set[str] = set()
    complete = sandbox_runner.Engine.leftovers

    async def leftovers(engine: sandbox_runner.Engine) -> dict[str, str]:
        return {name: version for name, version in (await complete(engine)).items() if name in names}

    monkeypatch.setattr(sandbox_runner, "PRUNE_PAUSE", 0)
    monkeypatch.setattr(sandbox_runner.Engine, "leftovers", leftovers)
    return names


def remove_volume(command: str, name: str) -> None:
    """Remove a volume as soon as no container uses it any more: sandboxes that are being ended may still do."""
    end = time.monotonic() + PATIENCE
    while subprocess.run([command, "volume", "rm", name], capture_output=True, check=False).returncode:
        if subprocess.run([command, "volume", "inspect", name], capture_output=True, check=False).returncode:
            return  # there is none
        assert time.monotonic() < end, f"something uses the volume {name}"
        time.sleep(0.1)


def host_processes() -> Iterator[tuple[int, int, list[str]]]:
    """Process id, parent's id and command line of every process of this host."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")


def clients(command: str, *marks: str) -> list[int]:
    """The process ids of the engine's command lines that have one of these arguments."""
    return [pid for pid, _, line in host_processes() if Path(line[0]).name == command and not {*marks}.isdisjoint(line)]


async def eventually(condition: Callable[[], Awaitable[T]]) -> T:
    """Poll until the condition holds, and return what it gave."""
    with anyio.fail_after(PATIENCE):
        while not (value := await condition()):
            await anyio.sleep(0.1)  # each look may be a command, which takes as long of a processor
    return value


class Program:
    """A `sandbox_runner.py` in a process of its own."""

    def __init__(self, process: anyio.abc.Process, command: str) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.command = command
        self.stdout = BufferedByteReceiveStream(process.stdout)
        self.stderr = BufferedByteReceiveStream(process.stderr)

    async def says(self, line: str) -> None:
        """Wait for a line on its standard output; it has to be the next one."""
        with anyio.fail_after(PATIENCE):
            assert (await self.stdout.receive_until(b"\n", 1 << 20)).decode() == line

    async def container(self) -> str:
        """The name of the container that it is busy with."""

        async def find() -> str | None:
            for _, parent, line in host_processes():
                if parent == self.process.pid and Path(line[0]).name == self.command:
                    for name in line:
                        if name.removeprefix("--name=").startswith("python-docker-mcp-"):
                            return name.removeprefix("--name=")
            return None

        found = await eventually(find)
        assert found is not None
        return found

    async def end(self) -> tuple[int, str, str]:
        """Wait until it has ended: exit status, and the rest of its outputs."""
        rest = {}

        async def read(name: str, stream: BufferedByteReceiveStream) -> None:
            rest[name] = b"".join([data async for data in stream]).decode()

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read, "stdout", self.stdout)
                tasks.start_soon(read, "stderr", self.stderr)
            return await self.process.wait(), rest["stdout"], rest["stderr"]


class CommandLine(Protocol):
    """Starts a Program with these arguments."""

    def __call__(self, *arguments: str) -> AbstractAsyncContextManager[Program]: ...


async def run(command_line: CommandLine, *arguments: str) -> tuple[int, str, str]:
    """Run the command line to its end: exit status, standard output and standard error."""
    async with command_line(*arguments) as program:
        return await program.end()
