"""What the server costs, beside the engine's own commands and the SDK's least server: all in one run, interleaved.

    python -m tests.tools.bench docker [--rows warm,session] [--rounds 50] [--json FILE] [--plot FILE.png]

The server is used as a client uses it, by JSON lines over its standard streams. `docker run` and `docker exec` get the
same image, the same flags and the same share of CPU. Whatever is compared takes turns, round by round, because the
load of the machine changes; only the ratios say anything about another machine. Each row is a function below that
tells how it measures. What is not for a client to see (a stream of 20 MB) is measured through the library.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import http.server
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import yaml

from sandbox_runner import (
    HEAD_START,
    Config,
    DockerConfig,
    Engine,
    Image,
    derive_image,
    find_engine,
    open_runner,
    session_container,
)

NOOP_SERVER = (sys.executable, str(Path(__file__).with_name("noop_server.py")))
PAUSE = 0.25  # seconds, for a container to have its share of the CPU back after what uses that up
AT_ONCE = 8  # calls at a time where it says "at once"
MEGABYTE = 1 << 20
LINK = 2.5e9 / 8  # bytes a second, of a fast link to the internet
IDLE = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit()); signal.pause()"
FIGURE = """
figure = plt.figure()
axes = figure.add_subplot()
axes.plot(range(100))
axes.set_title("figure")
"""


# ── what a row gives ──


@dataclass(frozen=True)
class Beside:
    """Something that our own figure is compared with, and how many times that it may come to."""

    name: str
    figures: list[float]
    at_most: float | None = None  # of our median divided by this one
    at_least: float | None = None


@dataclass(frozen=True)
class Measured:
    """Our figure, each time it was taken, and what it is compared with."""

    what: str
    unit: str
    figures: list[float]
    beside: tuple[Beside, ...] = ()
    at_most: float | None = None  # for a figure that is a target by itself


def interleave(rounds: int, before: Callable[[], object], **ways: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds that each way took, each time. `before` goes ahead of each, and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            before()
            started = time.perf_counter()
            way()
            taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def p95(figures: Sequence[float]) -> float:
    """The 95th percentile, within what was measured."""
    return statistics.quantiles(figures, n=20, method="inclusive")[-1] if len(figures) > 1 else figures[0]


# ── what is measured ──


class Server:
    """An MCP server as its client has it: a process of its own, spoken to in JSON lines. The handshake is done."""

    def __init__(self, command: Sequence[str], bench: Bench | None = None) -> None:
        self.bench = bench
        self.sessions: set[str] = set()
        self._numbers = itertools.count()
        # An installed program has its bytecode, too.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        client = {"name": "bench", "version": "1"}
        self.request("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=client)
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def say(self, message: dict[str, Any]) -> None:
        """Send a message."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            message: dict[str, Any] = json.loads(line)
            if "id" in message:
                return message
        raise EOFError("the server ended")

    def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Make a request, and wait for its result."""
        self.say({"jsonrpc": "2.0", "id": next(self._numbers), "method": method, "params": params})
        return self._result(self.hear())

    @staticmethod
    def _result(answer: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = answer.get("result", {"isError": True})
        if result.get("isError"):
            raise RuntimeError(f"a call failed: {json.dumps(answer)[:1000]}")
        return result

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool."""
        self.sessions |= {arguments["session_id"]} if "session_id" in arguments else set()
        return self.request("tools/call", name=tool, arguments=arguments)

    def transient(self, code: str = "print(1)") -> dict[str, Any]:
        """Run code in a fresh sandbox."""
        return self.call("execute-transient", code=code)

    def persistent(self, session: str, code: str = "print(1)") -> dict[str, Any]:
        """Run code in a session."""
        return self.call("execute-persistent", code=code, session_id=session)

    def calls_at_once(self, calls: int, at_once: int) -> float:
        """Calls a second, of so many transient ones, the next one being sent whenever one is answered."""
        params = {"name": "execute-transient", "arguments": {"code": "print(1)"}}
        started = time.perf_counter()
        for number in range(calls + at_once):
            if number >= at_once:
                self._result(self.hear())
            if number < calls:
                self.say({"jsonrpc": "2.0", "id": next(self._numbers), "method": "tools/call", "params": params})
        return calls / (time.perf_counter() - started)

    def sandboxes(self) -> list[str]:
        """The names of the containers that it has started: they are in the command lines of its children."""
        names = []
        for child in children(self.process.pid):
            with suppressed_loss():
                words = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8").split("\0")
                names += [word.removeprefix("--name=") for word in words if word.startswith("--name=")]
        return names

    def settle(self, ready: int) -> None:
        """Wait until so many sandboxes, and no more, are there and have imported what they are to preload."""
        assert self.bench is not None
        time.sleep(2 * HEAD_START)  # what the last call leaves behind is seen to after that
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            names = self.sandboxes()
            # A supervisor forks its worker when it is done with that, and then goes through a call with it.
            if len(names) == ready and all(children(self.bench.process_of(name)) for name in names):
                time.sleep(HEAD_START)
                return
            time.sleep(0.05)
        raise TimeoutError(f"{ready} sandboxes do not get ready: {self.sandboxes()}")

    def memory(self, line: str = "VmRSS") -> float:
        """Megabytes that it has resident; with VmHWM the most it had since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(status.partition(f"{line}:")[2].split()[0]) / 1024

    def forget_peak(self) -> None:
        """Have the kernel start VmHWM anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="utf-8")

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it and its sessions."""
        if self.process.poll() is None:
            for session in self.sessions:
                self.call("cleanup-session", session_id=session)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    with suppressed_loss():
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found


@contextmanager
def suppressed_loss() -> Iterator[None]:
    """A process may be gone by the time it is looked at."""
    with suppress(FileNotFoundError, ProcessLookupError):
        yield


@dataclass
class Bench:
    """One run on one engine: what all rows share."""

    engine: Engine
    image: Image
    rounds: int
    folder: Path
    closing: ExitStack = field(default_factory=ExitStack)  # what the current row has opened
    _pids: dict[str, int] = field(default_factory=dict)
    _servers: Iterator[int] = field(default_factory=lambda: itertools.count(secrets.randbelow(10_000)))

    @property
    def few(self) -> int:
        """Rounds of what takes seconds."""
        return max(3, self.rounds // 10)

    def server(self, **settings: dict[str, Any]) -> Server:
        """Our server, with settings other than the default; it is closed at the end of the row."""
        server = Server(self.command(**settings), self)
        self.closing.callback(server.close)
        return server

    def command(self, **settings: dict[str, Any]) -> list[str]:
        """The command that starts our server."""
        file = self.folder / f"{secrets.token_hex(8)}.yaml"
        own = {"idle_timeout": 1800 + next(self._servers)}  # so that none has a use for what another leaves behind
        everything = {"docker": {"command": self.engine.command}, "session": own, **settings}
        file.write_text(yaml.safe_dump(everything), encoding="utf-8")
        return [sys.executable, "-m", "python_docker_mcp", "--config", str(file)]

    def noop(self) -> Server:
        """The least server."""
        server = Server(NOOP_SERVER)
        self.closing.callback(server.close)
        return server

    def run_command(self, code: str, *more: str, name: str = "") -> list[str]:
        """`docker run` of Python code with all the limits of a sandbox; no labels, so that nobody takes it for one."""
        name = name or f"bench-{secrets.token_hex(8)}"
        argv = self.engine.sandbox_arguments(name, self.image, Config(), {})
        flags = [flag for flag in argv[: argv.index("--")] if not flag.startswith(("--label=", "--interactive"))]
        return [self.engine.command, *flags, *more, "--", self.image.name, "-c", code]

    def run(self, code: str = "print(1)") -> None:
        """Run code by `docker run`."""
        subprocess.run(self.run_command(code), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

    def exec(self, session: str, code: str = "print(1)") -> None:
        """Run code by `docker exec` in the container of a session."""
        argv = [self.engine.command, "exec", session_container(session), "python3", "-c", code]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)

    def runs_at_once(self, calls: int, at_once: int) -> float:
        """Calls a second, of so many by `docker run`, by callers that each make the next one when one has ended."""
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(at_once) as callers:
            for call in [callers.submit(self.run) for _ in range(calls)]:
                call.result()
        return calls / (time.perf_counter() - started)

    @contextmanager
    def pipe(self, code: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a container of its own, as `docker run -i` attaches it."""
        argv = self.run_command(code, "--interactive")
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            yield process
            process.kill()

    @contextmanager
    def bare_pipe(self, make: str, data: bytes) -> Iterator[dict[str, Callable[[], None]]]:
        """The two ways of the same many bytes by such a pipe: `out` of what `make` calls `data` there, `into` it."""
        code = f"""
import sys
{make}
print("ready", flush=True)
for line in sys.stdin.buffer:
    if line == b"out\\n":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        sys.stdin.buffer.read({len(data)})
        print("done", flush=True)
"""
        with self.pipe(code) as process:
            assert read_line(process) == b"ready\n"

            def out() -> None:
                write(process, b"out\n")
                left = len(data)
                assert process.stdout is not None
                while left:
                    left -= len(process.stdout.read(min(left, MEGABYTE)))

            def into() -> None:
                write(process, b"in\n" + data)
                assert read_line(process) == b"done\n"

            yield {"out": out, "into": into}

    @contextmanager
    def echo(self) -> Iterator[Callable[[], None]]:
        """A line to a process in a container and back: what the engine takes for it, whatever one makes of it."""
        with self.pipe("import os\nwhile data := os.read(0, 65536): os.write(1, data)") as process:

            def send_and_receive() -> None:
                write(process, b"x" * 200 + b"\n")
                read_line(process)

            send_and_receive()
            yield send_and_receive

    def process_of(self, container: str) -> int:
        """The host's id of a container's process 1; 0 if there is none."""
        if not self._pids.get(container):
            argv = [self.engine.command, "inspect", "--format={{.State.Pid}}", container]
            answer = subprocess.run(argv, capture_output=True, text=True, check=False)
            self._pids[container] = int(answer.stdout) if answer.returncode == 0 else 0
        return self._pids[container]

    def memory_of(self, container: str) -> float:
        """Megabytes that the kernel has charged to a container, but for the files that it may drop from its cache."""
        for line in Path(f"/proc/{self.process_of(container)}/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            folder = Path(f"/sys/fs/cgroup/{'memory' if controllers else ''}{path}")
            if controllers in ("", "memory") and (folder / "memory.stat").exists():
                lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                stat = dict(line.split() for line in lines)
                return int(stat.get("anon") or stat["total_rss"]) / MEGABYTE
        raise RuntimeError(f"the memory of the container {container} is not to be found in /sys/fs/cgroup")


# ── the rows ──

Row = Callable[[Bench], Iterator[Measured]]
ROWS: dict[str, Row] = {}


def row(function: Row) -> Row:
    """Make a function one of the rows, by its name."""
    ROWS[function.__name__] = function
    return function


@row
def handshake(bench: Bench) -> Iterator[Measured]:
    """From starting the server's process to the answer to `initialize`, with the engine looked for meanwhile."""

    def start(command: Sequence[str]) -> None:
        started.append(Server(command))

    def end() -> None:
        while started:
            started.pop().close()

    started: list[Server] = []
    commands = {"ours": bench.command(pool={"warm": 0}), "noop": NOOP_SERVER}
    for command in commands.values():
        start(command)  # writes the bytecode
    taken = interleave(bench.rounds, end, **{name: functools.partial(start, commands[name]) for name in commands})
    end()
    beside = Beside("least server of the SDK", taken["noop"], at_most=1.1)
    yield Measured("spawn to answered handshake", "ms", taken["ours"], (beside,))


@row
def warm(bench: Bench) -> Iterator[Measured]:
    """A transient call of `print(1)`, each in a fresh sandbox, when the pool is full and does nothing."""
    server, noop = bench.server(), bench.noop()
    with bench.echo() as echo:
        taken = interleave(
            bench.rounds,
            functools.partial(server.settle, 2),
            ours=server.transient,
            noop=functools.partial(noop.call, "noop"),
            echo=echo,
            run=bench.run,
        )
    beside = (
        Beside("no-op tool", taken["noop"], at_most=3),
        Beside(f"{bench.engine.kind} run", taken["run"], at_most=1 / 50),
        Beside(f"echo over a pipe of `{bench.engine.kind} run -i`", taken["echo"]),
    )
    yield Measured("warm `execute-transient` of `print(1)`", "ms", taken["ours"], beside)


@row
def session(bench: Bench) -> Iterator[Measured]:
    """A call of `print(1)` in a session; llm-sandbox has a session open as well, and runs a new Python in it."""
    server, noop, name = bench.server(), bench.noop(), unique("session")
    server.settle(2)
    server.persistent(name)  # takes one of the two
    server.settle(3)
    with bench.echo() as echo, llm_sandbox(bench) as (called, others):
        taken = interleave(
            bench.rounds,
            functools.partial(time.sleep, 2 * HEAD_START),  # for the engine to be done with what went before
            ours=functools.partial(server.persistent, name),
            noop=functools.partial(noop.call, "noop"),
            echo=echo,
            exec=functools.partial(bench.exec, name),
            **others,
        )
    beside = (
        Beside("no-op tool", taken["noop"], at_most=2.5),
        Beside(f"{bench.engine.kind} exec", taken["exec"], at_most=1 / 25),
        Beside(f"echo over a pipe of `{bench.engine.kind} run -i`", taken["echo"]),
        Beside(called, taken.get("llm", [])),
    )
    yield Measured("`execute-persistent` of `print(1)`", "ms", taken["ours"], beside)


@contextmanager
def llm_sandbox(bench: Bench) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """A call in an open session of llm-sandbox, on the same image, with the same CPU and memory; or why there is none.

    Its files are copied into the container, which a read-only root refuses: so it has a root that can be written.
    """
    if bench.engine.kind != "docker" or not importlib.util.find_spec("llm_sandbox"):
        why = "not installed" if bench.engine.kind == "docker" else "tried with Docker only"
        yield f"llm-sandbox ({why})", {}
        return
    from llm_sandbox import SandboxSession

    limits = DockerConfig()
    settings = {
        "entrypoint": ["python3", "-c", IDLE],
        "nano_cpus": int(1e9 * limits.cpu_limit),
        "mem_limit": limits.memory_limit,
        "network_mode": "none",
    }
    with SandboxSession(
        image=bench.image.name,
        workdir="/tmp",
        skip_environment_setup=True,
        keep_template=True,
        runtime_configs=settings,
    ) as opened:
        yield (
            f"llm-sandbox {importlib.metadata.version('llm-sandbox')}",
            {"llm": functools.partial(opened.run, "print(1)")},
        )


@row
def pandas(bench: Bench) -> Iterator[Measured]:
    """`import pandas` in a fresh sandbox of a pool that does nothing else, beside a container made for it."""
    server = bench.server()
    taken = interleave(
        bench.few,
        functools.partial(server.settle, 2),
        ours=functools.partial(server.transient, "import pandas"),
        run=functools.partial(bench.run, "import pandas"),
    )
    beside = Beside(f"{bench.engine.kind} run", taken["run"], at_most=1 / 50)
    yield Measured("`import pandas`, warm, fresh sandbox", "ms", taken["ours"], (beside,))


@row
def figure(bench: Bench) -> Iterator[Measured]:
    """A figure drawn in a session and returned as PNG in base64, beside a bare process that does just that.

    Both have Matplotlib imported. The bare one is a loop in a container with the same CPU share, over its pipe.
    """
    server, name = bench.server(), unique("figure")
    server.settle(2)
    server.persistent(name, "import matplotlib.pyplot as plt")
    server.settle(3)
    bare = f"""
import base64, io, sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
for line in sys.stdin:
{textwrap.indent(FIGURE, "    ")}
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    plt.close(figure)
    print(base64.b64encode(image.getvalue()).decode(), flush=True)
"""
    with bench.pipe(bare) as process:

        def draw_bare() -> None:
            write(process, b"go\n")
            assert b"iVBOR" in read_line(process)

        def draw() -> None:
            assert "image" in {block["type"] for block in server.persistent(name, FIGURE)["content"]}

        for first in (draw_bare, draw):  # imports what it needs only now
            first()
        taken = interleave(bench.rounds, functools.partial(time.sleep, PAUSE), ours=draw, bare=draw_bare)
    beside = Beside("bare process in a container", taken["bare"], at_most=1.2)
    yield Measured("figure drawn and returned as PNG", "ms", taken["ours"], (beside,))


@row
def at_once(bench: Bench) -> Iterator[Measured]:
    """Calls a second of `print(1)` by eight callers, each making the next call when one is answered, for a while.

    With `pool.reuse` each call has a process of its own, forked from one that has imported what is to be preloaded:
    to fork and bury it costs the kernel the more the more that is. So there is a row without.
    """
    reusing = {
        "reuse": bench.server(pool={"reuse": True, "warm": AT_ONCE}),
        "bare": bench.server(pool={"reuse": True, "warm": AT_ONCE, "preload": []}),
    }
    rates: dict[str, list[float]] = {"reuse": [], "bare": [], "fresh": [], "run": []}
    for server in reusing.values():
        server.settle(AT_ONCE)
    for _ in range(bench.few):
        for name, server in reusing.items():
            rates[name].append(server.calls_at_once(50 * AT_ONCE, AT_ONCE))
        rates["run"].append(bench.runs_at_once(5 * AT_ONCE, AT_ONCE))
        fresh = bench.server()
        fresh.settle(2)
        rates["fresh"].append(fresh.calls_at_once(5 * AT_ONCE, AT_ONCE))
        fresh.close()  # else it would go on making sandboxes ready, after such a burst
    what = f"{AT_ONCE} `{bench.engine.kind} run` at once"
    beside = Beside(what, rates["run"], at_least=25)
    yield Measured(f"{AT_ONCE} calls at once, `pool.reuse`", "calls/s", rates["reuse"], (beside,))
    yield Measured(f"{AT_ONCE} calls at once, `pool.reuse`, nothing preloaded", "calls/s", rates["bare"], (beside,))
    beside = Beside(what, rates["run"], at_least=1)
    yield Measured(f"{AT_ONCE} calls at once, fresh containers", "calls/s", rates["fresh"], (beside,))


@row
def sessions(bench: Bench) -> Iterator[Measured]:
    """A call in a session of a server that has 64 open, beside one that has one."""
    settings = {"pool": {"warm": 0, "preload": []}}
    many, one = bench.server(**settings), bench.server(**settings)
    names = [unique("many") for _ in range(64)]
    for name in names:
        many.persistent(name)
    alone = unique("one")
    one.persistent(alone)
    turn = itertools.cycle(names)
    taken = interleave(
        10 * bench.rounds,
        lambda: None,
        ours=lambda: many.persistent(next(turn)),
        one=functools.partial(one.persistent, alone),
    )
    beside = Beside("with one open", taken["one"], at_most=1.2)
    yield Measured("call in one of 64 open sessions", "ms", taken["ours"], (beside,))


@row
def recovery(bench: Bench) -> Iterator[Measured]:
    """From a new server's handshake to the first answer in a session whose server was killed."""
    name = unique("recovery")
    command = bench.command(pool={"warm": 0})
    servers = [Server(command)]
    servers[-1].persistent(name, "x = 1")

    def restart() -> None:
        servers[-1].kill()
        servers.append(Server(command))

    taken = interleave(
        bench.few * 2,
        restart,
        ours=lambda: servers[-1].persistent(name, "assert x == 1"),
        exec=functools.partial(bench.exec, name),
    )
    servers[-1].call("cleanup-session", session_id=name)
    for server in servers:
        server.sessions.clear()
        server.close()
    beside = Beside(f"{bench.engine.kind} exec", taken["exec"], at_most=2)
    yield Measured("first answer of a recovered session", "ms", taken["ours"], (beside,))


@row
def restore(bench: Bench) -> Iterator[Measured]:
    """A call in a session that can be restored, beside one in a session that can't; and what the copy takes."""
    servers = {
        "ours": bench.server(),
        "without": bench.server(session={"restore": False, "idle_timeout": 7200 + secrets.randbelow(10_000)}),
    }
    names = {which: unique(which) for which in servers}
    for server in servers.values():
        server.settle(2)
    start = "import numpy as np, pandas as pd\n"
    for held, more in (("", ""), (" with 50 MB", "df = pd.DataFrame(np.ones((65_536, 100)))\n")):
        for which, server in servers.items():
            server.persistent(names[which], start + more)
            server.settle(3)
        sizes = {which: [bench.memory_of(session_container(name))] for which, name in names.items()}
        yield Measured(f"idle session{held}", "MB", sizes["ours"], (Beside("without a copy", sizes["without"]),))
        for how, pause in (("after a pause", 0.2), ("back to back", 0.0)):
            ways = {which: functools.partial(server.persistent, names[which]) for which, server in servers.items()}
            taken = interleave(bench.rounds, functools.partial(time.sleep, pause), **ways)
            beside = Beside("without a copy", taken["without"], at_most=1.05 if pause else 2.5)
            yield Measured(f"call in a session{held}, {how}", "ms", taken["ours"], (beside,))


@row
def memory(bench: Bench) -> Iterator[Measured]:
    """Growth of the server's resident memory in 10,000 calls, half of them in a session; the first 500 not counted."""
    server, name = bench.server(pool={"reuse": True}), unique("memory")

    def make_calls(count: int) -> None:
        for _ in range(count // 2):
            server.persistent(name)
            server.transient()

    make_calls(500)
    before = server.memory()
    make_calls(10_000)
    yield Measured("server memory, growth in 10,000 calls", "MB", [server.memory() - before], at_most=5)


@row
def flood(bench: Bench) -> Iterator[Measured]:
    """The most that the server's resident memory grows by while a call prints 1 GB."""
    server, name = bench.server(), unique("flood")
    server.settle(2)
    server.persistent(name)
    server.settle(3)
    server.forget_peak()
    before = server.memory()
    code = f"text = ('x' * 79 + '\\n') * {MEGABYTE // 80}\nfor _ in range(1024): _ = sys.stdout.write(text)"
    server.call("execute-persistent", code=f"import sys\n{code}", session_id=name, timeout=300)
    growth = server.memory("VmHWM") - before
    yield Measured("server memory, growth during 1 GB of output", "MB", [growth], at_most=20)


@row
def idle(bench: Bench) -> Iterator[Measured]:
    """Anonymous memory of a ready sandbox that preloads nothing, less that of a Python that waits for a signal."""
    server = bench.server(pool={"warm": 1, "preload": []})
    server.settle(1)
    name = f"bench-{secrets.token_hex(8)}"
    with subprocess.Popen(bench.run_command(IDLE, name=name), stdin=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: bench.process_of(name) != 0)
            wait_until(
                lambda: "State:\tS" in Path(f"/proc/{bench.process_of(name)}/status").read_text(encoding="utf-8")
            )
            ours, bare = bench.memory_of(server.sandboxes()[0]), bench.memory_of(name)
        finally:
            subprocess.run([bench.engine.command, "rm", "--force", name], capture_output=True, check=False)
            process.wait()
    yield Measured("idle sandbox beyond an idle Python", "MB", [ours - bare], at_most=15)


@row
def streams(bench: Bench) -> Iterator[Measured]:
    """Megabytes a second of 20 MB of text out of a container, beside a bare pipe of `docker run -i`.

    Through the library, as it streams: a result for a model has less room.
    """
    make = "lines = ''.join(f\"{number:07} {'some text of a line' * 3}\\n\" for number in range(20 * 2**20 // 66))"
    names: dict[str, str] = {}
    exec(make, names)
    data = names["lines"].encode()
    with bench.bare_pipe(f"{make}; data = lines.encode()", data) as ways:
        taken = anyio.run(through_library, bench, make, len(data), ways["out"])
    rates = {name: [1000 * len(data) / MEGABYTE / time for time in times] for name, times in taken.items()}
    beside = Beside(f"bare pipe of `{bench.engine.kind} run -i`", rates["bare"], at_least=0.5)
    yield Measured("20 MB of output", "MB/s", rates["output"], (beside,))


@row
def files(bench: Bench) -> Iterator[Measured]:
    """Megabytes a second of a file of 50 MB into and out of a session, beside a bare pipe; and what memory it takes."""
    size = 50 * MEGABYTE
    content = os.urandom(size)
    with tempfile.TemporaryDirectory() as folder, bench.bare_pipe(f"data = bytes({size})", content) as ways:
        inputs, output = Path(folder, "in"), Path(folder, "out")
        inputs.mkdir()
        (inputs / "large").write_bytes(content)
        server, name = bench.server(files={"inputs": [str(inputs)], "output": str(output)}), unique("files")
        saved = output / name / "large"
        server.settle(2)
        server.persistent(name)
        server.settle(3)
        server.forget_peak()
        before = server.memory()

        def into() -> None:
            server.call("execute-persistent", code="1", session_id=name, files=["large"])

        def out() -> None:
            server.call("execute-persistent", code="import os; os.utime('large')", session_id=name)

        def pause() -> None:
            time.sleep(PAUSE)
            saved.unlink(missing_ok=True)  # for to replace it, a file system may first write its blocks out

        taken = interleave(bench.few * 2, pause, into=into, pipe_into=ways["into"], out=out, pipe_out=ways["out"])
        growth = server.memory("VmHWM") - before
        out()
        assert saved.read_bytes() == content
    rates = {way: [1000 * 50 / time for time in times] for way, times in taken.items()}
    pipe = f"bare pipe of `{bench.engine.kind} run -i`"
    for what, way in (("a file of 50 MB into a session", "into"), ("a file of 50 MB out of a session", "out")):
        yield Measured(what, "MB/s", rates[way], (Beside(pipe, rates[f"pipe_{way}"], at_least=0.5),))
    yield Measured("server memory, growth during that", "MB", [growth], at_most=20)


class Sender(http.server.BaseHTTPRequestHandler):
    """Sends 50 MB to whoever asks: at once or, by the path /link, no faster than a link of LINK bytes a second."""

    def do_GET(self) -> None:
        """Send them."""
        self.send_response(200)
        self.send_header("Content-Length", str(50 * MEGABYTE))
        self.end_headers()
        part, rate = (MEGABYTE // 8, LINK) if self.path == "/link" else (50 * MEGABYTE, math.inf)
        started = time.perf_counter()
        for sent in range(0, 50 * MEGABYTE, part):
            time.sleep(max(0.0, started + sent / rate - time.perf_counter()))
            self.wfile.write(bytes(part))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@row
def download(bench: Bench) -> Iterator[Measured]:
    """Megabytes a second of a download by the proxy, beside the same with the host's network, and beside a bare pipe.

    By the proxy none is faster than that pipe, over which it comes, so a server behind a fast link is compared as well.
    """
    sender = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sender)
    threading.Thread(target=sender.serve_forever, daemon=True).start()
    address = f"localhost:{sender.server_port}"
    fetch = f"assert len(urllib.request.urlopen('http://{address}/' + path).read()) == {50 * MEGABYTE}"
    argv = bench.engine.sandbox_arguments("NAME", bench.image, Config(docker=DockerConfig(network_disabled=False)), {})
    flags = [flag for flag in argv[: argv.index("--")] if not flag.startswith(("--label=", "--name="))]
    loop = (
        "import sys, urllib.request\nfor line in sys.stdin:\n    path = line.strip()\n"
        f"    {fetch}\n    print('done', flush=True)"
    )
    command = [bench.engine.command, *flags, "--network=host", "--", bench.image.name, "-c", loop]
    try:
        with (
            bench.bare_pipe("data = b''", bytes(50 * MEGABYTE)) as ways,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process,
        ):
            server, name = (
                bench.server(docker={"command": bench.engine.command, "network_allow": [address]}),
                unique("net"),
            )
            server.settle(2)
            server.persistent(name, "import urllib.request")
            server.settle(3)
            server.forget_peak()
            before = server.memory()

            def direct(path: str) -> None:
                write(process, f"{path}\n".encode())
                assert read_line(process) == b"done\n"

            def ours(path: str) -> None:
                server.persistent(name, f"path = {path!r}\n{fetch}")

            taken = interleave(
                bench.few * 2,
                functools.partial(time.sleep, PAUSE),
                ours=functools.partial(ours, ""),
                direct=functools.partial(direct, ""),
                pipe=ways["into"],
                ours_by_link=functools.partial(ours, "link"),
                link=functools.partial(direct, "link"),
            )
            growth = server.memory("VmHWM") - before
            process.kill()
    finally:
        sender.shutdown()
        sender.server_close()
    rates = {way: [1000 * 50 / time for time in times] for way, times in taken.items()}
    beside = (
        Beside(f"`{bench.engine.kind} run --network=host`", rates["direct"], at_least=0.5),
        Beside(f"bare pipe of `{bench.engine.kind} run -i`", rates["pipe"], at_least=0.5),
    )
    yield Measured("a download of 50 MB", "MB/s", rates["ours"], beside)
    by_link = dataclasses.replace(beside[0], figures=rates["link"])
    yield Measured(f"the same by a link of {LINK * 8 / 1e9:g} Gbit/s", "MB/s", rates["ours_by_link"], (by_link,))
    yield Measured("server memory, growth during that", "MB", [growth], at_most=20)


async def through_library(bench: Bench, make: str, size: int, bare: Callable[[], None]) -> dict[str, list[float]]:
    """Milliseconds that the output of what `make` calls `lines` took, and as much by a bare pipe."""
    taken: dict[str, list[float]] = {}
    async with open_runner(Config(docker=DockerConfig(command=bench.engine.command))) as runner:
        name = unique("streams")
        await runner.execute(make, session=name)
        got = 0

        async def count(item: Any) -> None:
            nonlocal got
            got += len(item.text)

        for _ in range(bench.rounds // 2):
            got = 0
            async with timed(taken, "output"):
                await runner.execute("print(lines, end='')", session=name, on_output=count, keep_output=False)
            assert got == size, got
            async with timed(taken, "bare"):
                bare()
        await runner.close_session(name)
    return taken


# ── small things ──


def unique(name: str) -> str:
    """A session's id that nobody else has."""
    return f"bench-{name}-{secrets.token_hex(4)}"


@asynccontextmanager
async def timed(taken: dict[str, list[float]], name: str) -> AsyncIterator[None]:
    """Add the milliseconds that the block takes, after a pause."""
    await anyio.sleep(PAUSE)
    started = time.perf_counter()
    yield
    taken.setdefault(name, []).append(1000 * (time.perf_counter() - started))


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    """A line of a process whose pipe has no buffer here."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        piece = process.stdout.read(MEGABYTE)
        if not piece:
            raise EOFError(f"the bare process ended after {line[-200:]!r}")
        line += piece
    return line


def write(process: subprocess.Popen[bytes], data: bytes) -> None:
    """Write all of it, as such a pipe takes a part at a time."""
    assert process.stdin is not None
    left = memoryview(data)
    while left:
        left = left[process.stdin.write(left) :]


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again until it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what is waited for does not happen")
        time.sleep(0.05)


# ── report ──


def verdict(measured: Measured) -> Iterator[tuple[str, ...]]:
    """The lines of the table: what, our figure, what is beside it and its figure, ratio, target, whether it is met."""
    first = (measured.what, show(measured.figures, measured.unit))
    if measured.at_most is not None:
        met = statistics.median(measured.figures) < measured.at_most
        yield *first, "", "", "", f"< {measured.at_most:g} {measured.unit}", "met" if met else "missed"
    for beside in measured.beside:
        if not beside.figures:
            yield *first, beside.name, "", "", "", ""
            continue
        share = statistics.median(measured.figures) / statistics.median(beside.figures)
        target, met = "", True
        if beside.at_most is not None:
            target, met = f"≤ {ratio(beside.at_most)}", share <= beside.at_most
        if beside.at_least is not None:
            target, met = f"≥ {ratio(beside.at_least)}", share >= beside.at_least
        yield (
            *first, beside.name, show(beside.figures, measured.unit), ratio(share), target,
            ("met" if met else "missed") if target else "",
        )  # fmt: skip
        first = ("", "")


def show(figures: Sequence[float], unit: str) -> str:
    """Median and, if there are enough figures for it, 95th percentile."""
    tail = f" ({readable(p95(figures))})" if len(figures) >= 20 else ""
    return f"{readable(statistics.median(figures))}{tail} {unit}"


def readable(figure: float) -> str:
    """Three digits, and no exponent."""
    return f"{figure:.0f}" if figure >= 1000 else f"{figure:.3g}"


def ratio(value: float) -> str:
    """A ratio as a person would say it."""
    return f"1/{1 / value:.3g}" if 0 < value < 0.3 else f"{value:.3g}"


def table(outcomes: Sequence[Measured]) -> str:
    """All that was measured, in Markdown that can be read as it is."""
    head = ("what", "median (p95)", "beside it", "median (p95)", "ratio", "target", "")
    lines = [head, *(line for measured in outcomes for line in verdict(measured))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]])


def plot(outcomes: Sequence[Measured], title: str, file: Path) -> None:
    """Draw how far each figure is from its target, and the times behind them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    times = [
        (f"{measured.what}: {name}", figures, is_ours)
        for measured in outcomes
        if measured.unit == "ms"
        for name, figures, is_ours in [
            ("this server", measured.figures, True),
            *((beside.name, beside.figures, False) for beside in measured.beside if beside.figures),
        ]
    ][::-1]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.32 * len(times)), layout="constrained")
    medians = [statistics.median(figures) for _, figures, _ in times]
    tails = [max(0.0, p95(figures) - median) for (_, figures, _), median in zip(times, medians, strict=True)]
    colours = ["#1d63ed" if is_ours else "#c2c8d2" for *_, is_ours in times]
    bars = axes.barh(
        [name for name, *_ in times], medians, xerr=[[0.0] * len(tails), tails], color=colours, ecolor="#777"
    )
    axes.bar_label(bars, [f" {readable(median)} ms" for median in medians], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds: median, and up to the 95th percentile")
    axes.set_title(textwrap.fill(title, 100), fontsize=9)
    axes.margins(x=0.15, y=0.01)
    figure.savefig(file, dpi=110)


# ── program ──


def describe(bench: Bench) -> str:
    """Machine and versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mcp", "anyio", "pydantic"))
    return (
        f"{bench.engine.kind} {bench.engine.version}, image {bench.image.origin}; {os.cpu_count()} cores, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, {versions}"
    )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="docker or podman")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=50, help="how often to take each figure (what is slow: a tenth)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the times, as PNG")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}")
    engine = anyio.run(find_engine, options.engine)
    image = anyio.run(derive_image, engine, Config(docker=DockerConfig(command=options.engine)), print)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    outcomes: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(engine, image, options.rounds, Path(folder))
        print(describe(bench))
        try:
            for name in options.rows:
                print(f"measuring {name} …", file=sys.stderr)
                with bench.closing:
                    outcomes += ROWS[name](bench)
        finally:  # what was measured until something failed is told nevertheless
            print(table(outcomes))
    if options.json:
        everything = {"about": describe(bench), "measured": [dataclasses.asdict(measured) for measured in outcomes]}
        options.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if options.plot:
        plot(outcomes, describe(bench), options.plot)


if __name__ == "__main__":
    main()
