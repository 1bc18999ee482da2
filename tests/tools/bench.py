"""Time what a client waits for, beside an older checkout and the engine's own commands: all in one run, interleaved.

    python -m tests.tools.bench docker [--only warm --only session] [--beside FOLDER] [--rounds 20] [--json FILE]

FOLDER is a second checkout of this project, such as `git worktree add FOLDER COMMIT` makes. The servers are used as a
client uses them, by JSON lines over their standard streams; `docker run` and `docker exec` get the same image and the
same limits. Whatever is compared takes turns, round by round, because the load of the machine changes: only the ratios
say anything about another machine. Less is better in every row. Each row is told by the function below that takes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from sandbox_runner import session_container

HERE = Path(__file__).resolve().parents[2]
PAUSE = 0.25  # seconds, for a container to have its share of the CPU back after what uses that up
BURST = 10  # calls in a row where it says "back to back"
WARM = 2  # sandboxes that a server keeps ready, by default
MEGABYTE = 1 << 20
PLOT = """
import matplotlib.pyplot as plt
for number in range({count}):
    figure, axes = plt.subplots()
    axes.plot(range(100 + number))
    axes.set_title(f"figure {{number}}")
"""


@dataclass(frozen=True)
class Row:
    """A line of the table: the figures of each that was measured, by name ("this", "beside", "docker run", …)."""

    what: str
    unit: str
    figures: dict[str, list[float]]


def interleave(
    rounds: int, before: Callable[[], object], ways: Mapping[str, Callable[[], object]], times: int = 1
) -> dict[str, list[float]]:
    """Return the milliseconds that each way took, each time; `before` goes ahead of each turn, and does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:  # so that none always comes after the same other one
            before()
            for _ in range(times):
                started = time.perf_counter()
                ways[name]()
                taken[name].append(1000 * (time.perf_counter() - started))
    return taken


class Server:
    """A server of a checkout as its client has it: a process of its own, with a session. The handshake is done."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.session = ""  # the id of its session, once there has been a call in it
        self._numbers = itertools.count()
        # The folder comes first in sys.path, and bytecode is written, as an installed program has its own.
        command = [sys.executable, "-m", "python_docker_mcp", "--config", str(config)]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, cwd=folder, env=environment)
        client = {"name": "bench", "version": "1"}
        self.request("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=client)
        self._say({"method": "notifications/initialized"})

    def _say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self.process.stdin.flush()

    def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Make a request, and wait for its result."""
        assert self.process.stdout
        self._say({"id": next(self._numbers), "method": method, "params": params})
        for line in self.process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "id" in answer:
                result: dict[str, Any] = answer.get("result", {"isError": True})
                if result.get("isError"):
                    raise RuntimeError(f"a call failed: {json.dumps(answer)[:1000]}")
                return result
        raise EOFError("the server ended")

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool."""
        return self.request("tools/call", name=tool, arguments=arguments)

    def fresh(self, code: str = "print(1)") -> None:
        """Run code in a fresh sandbox."""
        self.call("execute-transient", code=code)

    def within(self, code: str = "print(1)", **more: Any) -> dict[str, Any]:
        """Run code in its session."""
        self.session = self.session or f"bench-{secrets.token_hex(8)}"
        return self.call("execute-persistent", code=code, session_id=self.session, **more)

    def draw(self, count: int) -> None:
        """Draw so many figures in its session, and have them returned."""
        content = self.within(PLOT.format(count=count))["content"]
        if sum(block["type"] == "image" for block in content) != count:
            raise RuntimeError(f"not {count} pictures: {json.dumps(content)[:1000]}")

    def end_session(self) -> None:
        """End its session, for the next call to begin another one."""
        if self.session:
            self.call("cleanup-session", session_id=self.session)
        self.session = ""

    def sandboxes(self) -> dict[str, list[str]]:
        """Return the command that started each container, by the name that it had: both are with its children."""
        found: dict[str, list[str]] = {}
        for child in children(self.process.pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8").split("\0")
                found |= {word.removeprefix("--name="): words for word in words if word.startswith("--name=")}
        return found

    def close(self) -> None:
        """End it and its session."""
        try:
            self.end_session()
        finally:
            self.process.communicate()  # closes its standard input


def children(process: int) -> list[int]:
    """Return the processes that a process has started; it may be gone by now."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="utf-8").split())
    return found


@dataclass
class Bench:
    """One run on one engine: what all rows share."""

    engine: str
    checkouts: dict[str, Path]  # "this", and "beside" if there is another one
    rounds: int
    few: int  # rounds of what takes seconds
    folder: Path  # for what it writes
    _pids: dict[str, int] = field(default_factory=dict)
    _timeouts: Iterator[int] = field(default_factory=lambda: itertools.count(1800 + secrets.randbelow(10_000)))

    def server(self, name: str, **settings: dict[str, Any]) -> Server:
        """Start a server of a checkout, with settings other than the default."""
        own = {"idle_timeout": next(self._timeouts)}  # so that none has a use for what another leaves behind
        file = self.folder / f"{own['idle_timeout']}.yaml"
        file.write_text(json.dumps({"docker": {"command": self.engine}, "session": own, **settings}))  # YAML as well
        return Server(self.checkouts[name], file)

    @contextmanager
    def servers(self, **settings: dict[str, Any]) -> Iterator[dict[str, Server]]:
        """Start a server of each checkout, and wait until it is warm."""
        with ExitStack() as closing:
            servers = {}
            for name in self.checkouts:
                servers[name] = self.server(name, **settings)
                closing.callback(servers[name].close)
                servers[name].fresh()  # makes the image, if need be
            self.settle(servers)
            yield servers

    def settle(self, servers: Mapping[str, Server]) -> None:
        """Wait until all have their ready sandboxes, which have imported what they are to preload."""
        time.sleep(PAUSE)  # what the last call leaves behind is seen to after that
        deadline = time.monotonic() + 120
        for server in servers.values():
            # A supervisor forks its worker when it is done with preloading, and then goes through a call with it.
            while len(names := server.sandboxes()) != WARM + bool(server.session) or not all(
                children(self.process_of(name)) for name in names
            ):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{WARM} sandboxes do not get ready: there are {', '.join(names)}")
                time.sleep(0.05)
        time.sleep(PAUSE)

    def renew(self, servers: Mapping[str, Server], begin: bool = False) -> None:
        """End the sessions, begin others if asked to, and wait until the servers do nothing."""
        for server in servers.values():
            server.end_session()
            if begin:
                server.within()
        self.settle(servers)

    def run(self, argv: Sequence[str], code: str) -> None:
        """Run code by the command that started a sandbox, but for what makes it one, lest it be taken for one."""
        end = argv.index("--")
        flags = [word for word in argv[:end] if not word.startswith(("--label=", "--name=", "--interactive"))]
        subprocess.run([*flags, *argv[end : end + 2], "-c", code], stdin=DEVNULL, stdout=DEVNULL, check=True)

    def exec(self, session: str, code: str = "print(1)", data: bytes = b"") -> None:
        """Run code by the engine's `exec` in the container of a session, with data for its standard input."""
        command = [self.engine, "exec", "--interactive", session_container(session), "python3", "-c", code]
        subprocess.run(command, input=data, stdout=PIPE, check=True)

    def ask(self, *arguments: str) -> int:
        """Return the number that a command of the engine prints; 0 if it fails."""
        return int(subprocess.run([self.engine, *arguments], capture_output=True, check=False).stdout or 0)

    def process_of(self, container: str) -> int:
        """Return the host's id of a container's process 1; 0 if there is none. It is kept, as names change."""
        if not self._pids.get(container):
            self._pids[container] = self.ask("inspect", "--format={{.State.Pid}}", container)
        return self._pids[container]

    def memory_of(self, container: str) -> float:
        """Return the megabytes charged to a container, but for the files that the kernel may drop from its cache."""
        for line in Path(f"/proc/{self.process_of(container)}/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            file = Path(f"/sys/fs/cgroup/{'memory' if controllers else ''}{path}/memory.stat")
            if controllers in ("", "memory") and file.exists():
                stat = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
                return int(stat.get("anon") or stat["total_rss"]) / MEGABYTE
        raise RuntimeError(f"the memory of the container {container} is not to be found in /sys/fs/cgroup")


def warm(bench: Bench) -> Iterator[Row]:
    """Time calls in fresh sandboxes, when each server has its two ready and does nothing; and `run` of the engine."""
    with bench.servers() as servers:
        argv = next(iter(servers["this"].sandboxes().values()))
        for code, rounds in (("print(1)", bench.rounds), ("import pandas", bench.few)):
            ways = {name: partial(server.fresh, code) for name, server in servers.items()}
            own = {f"{bench.engine} run": partial(bench.run, argv, code)}
            taken = interleave(rounds, partial(bench.settle, servers), ways | own)
            yield Row(f"`{code}` in a fresh sandbox", "ms", taken)


def session(bench: Bench) -> Iterator[Row]:
    """Time calls of `print(1)` in a session: the first one, one after a pause and some without; and `exec`."""
    with bench.servers() as servers:
        ways: dict[str, Callable[[], object]] = {name: server.within for name, server in servers.items()}
        yield Row("first call of a session", "ms", interleave(bench.few, partial(bench.renew, servers), ways))
        bench.renew(servers, begin=True)
        pause, own = partial(time.sleep, PAUSE), partial(bench.exec, servers["this"].session)
        taken = interleave(bench.rounds, pause, ways)
        taken |= interleave(
            bench.few, pause, {f"{bench.engine} exec": own}
        )  # later: it uses up the CPU of that session
        yield Row("call in a session, after a pause", "ms", taken)
        yield Row(f"call in a session, {BURST} back to back", "ms", interleave(bench.few, pause, ways, BURST))


def plots(bench: Bench) -> Iterator[Row]:
    """Time the first call of a session if it draws a figure, and later ones that draw five, all returned as PNG."""
    with bench.servers() as servers:
        one = {name: partial(server.draw, 1) for name, server in servers.items()}
        five = {name: partial(server.draw, 5) for name, server in servers.items()}
        yield Row("first plot of a session", "ms", interleave(bench.few, partial(bench.renew, servers), one))
        bench.renew(servers, begin=True)
        yield Row("five plots in a call", "ms", interleave(bench.few, partial(bench.settle, servers), five))


def files(bench: Bench) -> Iterator[Row]:
    """Time a file of 50 MB into and out of a session, beside as many bytes through the pipe of `exec`."""
    inputs, outputs, content = bench.folder / "in", bench.folder / "out", os.urandom(50 * MEGABYTE)
    inputs.mkdir()
    (inputs / "large").write_bytes(content)
    with bench.servers(files={"inputs": [str(inputs)], "output": str(outputs)}) as servers:
        bench.renew(servers, begin=True)
        saved = [outputs / server.session / "large" for server in servers.values()]

        def pause() -> None:
            for file in saved:  # for to replace one, a file system may first write its blocks out
                file.unlink(missing_ok=True)
            time.sleep(PAUSE)

        touch = "import os; os.utime('large')"  # what was changed is copied out
        read = f"import sys\nwhile sys.stdin.buffer.read({MEGABYTE}): pass"
        write = f"import sys\nfor _ in range(50): sys.stdout.buffer.write(bytes({MEGABYTE}))"
        ways = {name: partial(server.within, "1", files=["large"]) for name, server in servers.items()}
        own = partial(bench.exec, servers["this"].session)
        taken = interleave(bench.few, pause, ways)
        taken |= interleave(bench.few, pause, {f"{bench.engine} exec": partial(own, read, content)})
        yield Row("50 MB into a session", "ms", taken)
        ways = {name: partial(server.within, touch) for name, server in servers.items()}
        taken = interleave(bench.few, pause, ways)
        taken |= interleave(bench.few, pause, {f"{bench.engine} exec": partial(own, write)})
        yield Row("50 MB out of a session", "ms", taken)


def start(bench: Bench) -> Iterator[Row]:
    """Time a new server until it answers `initialize`, and until it has answered a call made right then."""
    taken: dict[str, dict[str, list[float]]] = {what: {} for what in ("`initialize`", "the first call")}
    for number in range(bench.few + 1):
        for name in list(bench.checkouts)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            server = bench.server(name)
            initialized = time.perf_counter()
            server.fresh()
            called = time.perf_counter()
            server.close()
            time.sleep(2)  # its containers end meanwhile
            if number:  # the very first start writes the bytecode, and may make the image
                for what, end in zip(taken, (initialized, called), strict=True):
                    taken[what].setdefault(name, []).append(1000 * (end - started))
    for what, times in taken.items():
        yield Row(f"server start to the answer to {what}", "ms", times)


def size(bench: Bench) -> Iterator[Row]:
    """Look at the memory of what is idle, and at the image; how long that is made is the package index's affair."""
    taken: dict[str, dict[str, list[float]]] = {}
    with bench.servers() as servers:
        for name, server in servers.items():
            sandbox, argv = next(iter(server.sandboxes().items()))
            ready = bench.memory_of(sandbox)
            server.within()
            bench.settle(servers)
            status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
            image = bench.ask("image", "inspect", "--format={{.Size}}", argv[argv.index("--") + 1])
            for what, figure in (
                ("memory of the server", int(status.partition("VmRSS:")[2].split()[0]) / 1024),
                ("memory of a ready sandbox", ready),
                ("memory of a session after a call", bench.memory_of(session_container(server.session))),
                ("image", image / MEGABYTE),
            ):
                taken.setdefault(what, {})[name] = [figure]
    for what, figures in taken.items():
        yield Row(what, "MB", figures)


ROWS = {row.__name__: row for row in (warm, session, plots, files, start, size)}


def cells(figures: Sequence[float]) -> list[str]:
    """Write median and 95th percentile, within what was measured; nothing if nothing was."""
    if not figures:
        return ["", ""]
    tail = statistics.quantiles(figures, n=20, method="inclusive")[-1] if len(figures) > 1 else figures[0]
    return [f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}" for figure in (statistics.median(figures), tail)]


def table(rows: Sequence[Row], engine: str, checkouts: Sequence[str]) -> str:
    """Write all that was measured; the last columns are of the engine's own command, where there is one for that."""
    ratio = ["new/old"] if len(checkouts) > 1 else []
    columns = [cell for name in checkouts for cell in (name, "p95")]
    lines = [["row", "unit", *columns, *ratio, f"by {engine}", "p95", ""]]
    for row in rows:
        line = [row.what, row.unit, *(cell for name in checkouts for cell in cells(row.figures[name]))]
        if ratio:
            new, old = (statistics.median(row.figures[name]) for name in checkouts)
            line.append(f"{new / old:.2f}")
        own = next((name for name in row.figures if name not in checkouts), "")
        lines.append([*line, *cells(row.figures.get(own, [])), own.partition(" ")[2]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help="docker or podman")
    parser.add_argument("--only", action="append", choices=list(ROWS), help="rows to take; may be given repeatedly")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout, to measure in turns with this")
    parser.add_argument("--rounds", type=int, default=20, help="how often to take a figure (a slow one: a quarter)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args()
    checkouts = {"this": HERE} | ({"beside": options.beside.resolve()} if options.beside else {})
    if missing := [str(path) for path in checkouts.values() if not (path / "python_docker_mcp.py").exists()]:
        parser.error(f"there is no python_docker_mcp.py in {', '.join(missing)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    about = f"{options.engine}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.engine, checkouts, options.rounds, max(3, options.rounds // 4), Path(folder))
        try:
            for name in options.only or ROWS:
                print(f"measuring {name} …", file=sys.stderr)
                rows.extend(ROWS[name](bench))
        finally:  # what was measured until something failed is told nevertheless
            print(f"{about}\n\n{table(rows, options.engine, list(checkouts))}")
    if options.json:
        everything = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
