"""How long a call takes, beside the engine's own commands on the same container, all in one run and interleaved.

    python -m tests.bench docker [CALLS]

Interleaved, because the load of the machine changes; and only the ratios say anything about another machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import anyio

from sandbox_runner import LABEL, Config, DockerConfig, PackageConfig, Runner, open_runner


async def command(*argv: str) -> None:
    """Run a command of the engine to its end; the test of time starts and ends with the process."""
    await anyio.run_process(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def execute(runner: Runner, session: str | None) -> None:
    """One call through the library."""
    result = await runner.execute("1 + 1", session=session)
    assert result.value == "2", result


async def measure(engine: str, calls: int) -> dict[str, list[float]]:
    """Milliseconds that each way took, each time."""
    config = Config(docker=DockerConfig(command=engine, image="host"), package=PackageConfig(preinstalled=()))
    async with open_runner(config) as runner:
        session = f"bench-{runner.owner}"
        await execute(runner, session)
        assert runner.engine is not None
        assert runner.image is not None
        name = (
            await runner.engine.run("ps", f"--filter=label={LABEL}.owner={runner.owner}", "--format={{.Names}}")
        ).strip()
        sandbox = runner.engine.sandbox_arguments("NAME", runner.image, config, {})
        flags = [flag for flag in sandbox[: sandbox.index("--")] if not flag.startswith(("--name=", "--interactive"))]
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "a call on a warm session": lambda: execute(runner, session),
            f"{engine} exec … python3 -c pass": lambda: command(engine, "exec", name, "python3", "-c", "pass"),
            f"{engine} run … python3 -c pass": lambda: command(
                engine, *flags, "--", runner.image.name if runner.image else "", "-c", "pass"
            ),
            "a transient call, nothing kept ready": lambda: execute(runner, None),
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(calls):
            for way, go in ways.items():
                started = time.perf_counter()
                await go()
                taken[way].append(1000 * (time.perf_counter() - started))
        await runner.close_session(session)
    return taken


def report(taken: dict[str, list[float]]) -> None:
    """A table of medians and 95th percentiles, and how many calls on a warm session each median would be."""
    base = statistics.median(next(iter(taken.values())))
    print(f"{'':40}{'median':>12}{'p95':>12}{'ratio':>9}")
    for way, times in taken.items():
        median, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(f"{way:40}{median:9.1f} ms{p95:9.1f} ms{median / base:9.0f}")


if __name__ == "__main__":
    report(anyio.run(measure, sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 50))
