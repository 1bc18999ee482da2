"""What code finds in a sandbox, in each way in which a sandbox comes to be, on real Docker and real Podman.

The settings are those that users have, on a volume without packages. The only difference is the image, which is made
from this host's Python where no registry can be reached.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from real_engines import eventually, remove_volume

from sandbox_runner import (
    Config,
    DockerConfig,
    PackageConfig,
    PoolConfig,
    Result,
    Rich,
    Runner,
    open_runner,
)

pytestmark = [pytest.mark.engine, pytest.mark.in_turns, pytest.mark.anyio]

Execute = Callable[[str], Awaitable[Result]]

# Code, how many pictures come back, and its value or a part of what it prints. A `display` counts as printed.
PLOT = "import matplotlib.pyplot as plt\n"
BEHAVIOURS = [
    (
        f"{PLOT}for n in range(4):\n    plt.plot([n, 1, n])\n    plt.title(n)\n    plt.show()\nlen(plt.get_fignums())",
        4,
        "0",
    ),
    (f"{PLOT}for n in range(3):\n    plt.figure()\n    plt.bar([1, 2], [n, 1])\nlen(plt.get_fignums())", 3, "3"),
    (f"{PLOT}plt.plot([1, 2])\nplt.show()\nplt.bar([1, 2], [3, 4])\nplt.show()\nplt.pie([1, 2])", 3, ""),
    (f"import matplotlib\nmatplotlib.use('Agg')\n{PLOT}for n in 1, 2:\n    plt.plot([n])\n    plt.show()", 2, ""),
    (f"import matplotlib\nmatplotlib.use('TkAgg')\n{PLOT}for n in 1, 2:\n    plt.plot([n])\n    plt.show()", 2, ""),
    (f"{PLOT}plt.switch_backend('agg')\nfor n in 1, 2:\n    plt.plot([n])\n    plt.show()", 2, ""),
    (
        f"{PLOT}plt.ion()\nax = plt.gca()\nfor n in range(3):\n    ax.plot([n, 1])\n    plt.pause(0.01)\nplt.ioff()",
        1,
        "",
    ),
    (
        f"{PLOT}fig, axes = plt.subplots(2, 2)\nfor ax in axes.flat: ax.plot([1, 2])\nfig.tight_layout()\nfig.show()",
        1,
        "",
    ),
    (
        f"{PLOT}plt.plot([1, 2])\nplt.savefig('a.png')\nplt.show()\nimport os; os.path.getsize('a.png') > 5000",
        1,
        "True",
    ),
    (
        f"{PLOT}plt.plot([1, 2])\nplt.show()\nplt.savefig('b.png')\nimport os; os.path.getsize('b.png') > 5000",
        1,
        "True",
    ),
    (
        "import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': [3, 1]}).plot()\npd.Series([1, 2]).plot(kind='bar')",
        1,
        "Axes",
    ),
    (
        f"{PLOT}import pandas as pd\ndf = pd.DataFrame([[1, 2], [3, 1]])\nfor n in df:\n    df[n].plot(); plt.show()",
        2,
        "",
    ),
    ("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': [3, 1]}).hist()\nNone", 1, ""),
    (
        f"{PLOT}for n in 1, 2:\n    fig = plt.figure(n)\n    fig.gca().plot([n, 1])\n    display(fig)",
        2,
        "",
    ),
    (f"{PLOT}fig, ax = plt.subplots()\nax.plot([1, 2])\nfig", 1, "Figure"),
    ("from matplotlib.figure import Figure\nfig = Figure()\nfig.subplots().plot([1, 2])\nfig", 1, "Figure"),
    (f"{PLOT}plt.ion()\nfig, ax = plt.subplots()\nplt.show()\nfor n in range(3): ax.plot([n, 1])\nplt.ioff()", 1, ""),
    (f"{PLOT}line, = plt.plot([1, 2])\nplt.show(block=False)\nline.set_ydata([2, 1])\nNone", 2, ""),
    (f"{PLOT}for n in 1, 2:\n    plt.plot([n, 1])\n    plt.show(block=False)", 2, ""),
    (f"{PLOT}plt.subplots()\nplt.show()\nplt.cla()", 0, ""),
    (f"{PLOT}plt.gca().table([['a', 'b']])\nplt.show()\nplt.figtext(0.5, 0.5, 'text')\nplt.show()", 2, ""),
    (
        f"{PLOT}for n in range(6):\n    plt.plot([n, 1])\n    plt.savefig(f'{{9 - n}}.png')\n    plt.close()",
        4,
        "[2 more pictures",
    ),
    ("import sys\nsys.stdout.close()\nprint('still there')", 0, "still there"),
    ("import numpy as np\nint(np.arange(5).sum())", 0, "10"),
    ("import os, sys\nsys.path[0] == os.getcwd(), os.getcwd()", 0, "(True, '/app')"),
    ("x = 41\nx + 1", 0, "42"),
    ("__name__", 0, "'__main__'"),
    ("import sys; sys.stdin.read()", 0, "''"),
    ("import subprocess\nsubprocess.run(['sh', '-c', 'echo from a child'])\nNone", 0, "from a child"),
    (
        "from multiprocessing import Pool\ndef f(x): return x * x\nwith Pool(2) as p: found = p.map(f, [1, 2])\nfound",
        0,
        "[1, 4]",
    ),
    ("import asyncio\nawait asyncio.sleep(0.01)\n'slept'", 0, "slept"),
    ("import tempfile, os\nwith tempfile.NamedTemporaryFile() as f: found = os.path.exists(f.name)\nfound", 0, "True"),
    ("import random, numpy as np\n(random.random(), np.random.rand()) != (0, 0)", 0, "True"),
    ("import threading\nthreading.active_count()", 0, "1"),
    ("import logging\nlogging.getLogger().handlers, logging.getLogger('PIL').level", 0, "([], 0)"),
    ("import warnings\nwarnings.warn('attention')", 0, "UserWarning: attention"),
]


def pictures(result: Result) -> list[str]:
    """The pictures of a result, in base64."""
    return [item.forms["image/png"] for item in result.output if isinstance(item, Rich) and "image/png" in item.forms]


def told(result: Result) -> str:
    """What a result shows as text."""
    shown = [item.forms.get("text/plain", "") for item in result.output if isinstance(item, Rich)]
    return "\n".join([result.stdout, result.stderr, *shown, result.value or ""])


# ── the ways ──


@pytest.fixture(scope="module")
async def default(engine_command: str) -> AsyncIterator[Config]:
    """The default settings, with a volume that is empty."""
    volume = f"python-docker-mcp-test-{secrets.token_hex(4)}"
    yield Config(docker=DockerConfig(command=engine_command, image="host"), package=PackageConfig(volume=volume))
    remove_volume(engine_command, volume)


async def until_warm(runner: Runner) -> None:
    """Wait until a sandbox is ready that has imported what it is to import."""

    async def is_warm() -> bool:
        return any(sandbox.prepared.is_set() and not sandbox.gone.is_set() for sandbox in runner.pool.ready)

    await eventually(is_warm)


@asynccontextmanager
async def in_session(runner: Runner) -> AsyncIterator[Execute]:
    """Calls in a session of their own."""
    name = f"test-{secrets.token_hex(6)}"

    async def execute(code: str) -> Result:
        return await runner.execute(code, session=name, timeout=60)

    yield execute
    await runner.close_session(name)


@asynccontextmanager
async def warm(config: Config) -> AsyncIterator[Execute]:
    """In a session that begins in a sandbox of the pool: process 1 has imported the modules."""
    async with open_runner(config, warm=True) as runner:
        await until_warm(runner)
        async with in_session(runner) as execute:
            yield execute


@asynccontextmanager
async def once(config: Config) -> AsyncIterator[Execute]:
    """Each call in a sandbox of the pool that nobody has used."""
    async with open_runner(config, warm=True) as runner:

        async def execute(code: str) -> Result:
            await until_warm(runner)
            return await runner.execute(code, timeout=60)

        yield execute


@asynccontextmanager
async def installed(config: Config) -> AsyncIterator[Execute]:
    """The same, but a package is installed for all: workers have imported the modules."""
    volume = f"{config.package.volume}-filled"
    config = dataclasses.replace(config, package=dataclasses.replace(config.package, volume=volume))
    try:
        async with open_runner(config) as runner:
            assert (await runner.install("humanize")).ok
        async with warm(config) as execute:
            yield execute
    finally:
        remove_volume(str(config.docker.command), volume)


@asynccontextmanager
async def cold(config: Config) -> AsyncIterator[Execute]:
    """In a sandbox that is made for the call, without a pool."""
    async with open_runner(config) as runner, in_session(runner) as execute:
        yield execute


@asynccontextmanager
async def reused(config: Config) -> AsyncIterator[Execute]:
    """Each call in the one sandbox that is there, cleaned after the call before it."""
    async with open_runner(
        dataclasses.replace(config, pool=PoolConfig(reuse=True, warm=1, size=1)), warm=True
    ) as runner:

        async def execute(code: str) -> Result:
            return await runner.execute(code, timeout=60)

        await until_warm(runner)
        await execute(f"{PLOT}plt.plot([1, 2])\nprint('before')\nopen('left.txt', 'w').close()")
        yield execute


@asynccontextmanager
async def woken(config: Config) -> AsyncIterator[Execute]:
    """In a session whose worker has ended, and whose copy goes on."""
    async with warm(config) as execute:
        await execute(f"{PLOT}kept = 1")
        ended = await execute("import os\nos._exit(3)")
        assert ended.state == "restored", ended
        assert (await execute("kept")).value == "1"
        yield execute


@asynccontextmanager
async def taken_over(config: Config) -> AsyncIterator[Execute]:
    """In a session that another server began."""
    name = f"test-{secrets.token_hex(6)}"
    async with open_runner(config, warm=True) as runner:
        await until_warm(runner)
        await runner.execute(f"{PLOT}kept = 1", session=name)
    async with open_runner(config) as runner:
        assert (await runner.execute("kept", session=name)).value == "1"

        async def execute(code: str) -> Result:
            return await runner.execute(code, session=name, timeout=60)

        yield execute
        await runner.close_session(name)


WAYS = [warm, once, installed, cold, reused, woken, taken_over]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_code_finds_the_same_in_a_sandbox_however_that_came_to_be(
    default: Config, way: Callable[[Config], object]
) -> None:
    wrong: list[str] = []
    async with way(default) as execute:  # type: ignore[attr-defined]  # each is a context manager
        # Where users are most of the time all are tried, elsewhere some: a sandbox for each call takes seconds.
        for code, count, shown in BEHAVIOURS[:: 4 if way is once else 1 if way in (warm, installed) else 2]:
            result = await execute(code)
            found = pictures(result)
            if result.status != "ok" or len(found) != count or len(set(found)) != count or shown not in told(result):
                wrong.append(
                    f"{code}\n→ {result.status}, {len(found)} pictures for {count}: {told(result)!r} {result.exception}"
                )
    assert not wrong, "\n\n".join(wrong)
