"""What four clients do in half an hour while things around them are killed; after that nothing may be left.

    python -m tests.tools.soak docker [MINUTES] [--seed NUMBER] [--image IMAGE]

Each client is a server process of its own and speaks lines with it, as real clients do. Two workers of each make calls
of all kinds, with and without a session, while a third party kills servers, the engine's command lines and containers,
and pauses containers. Of every call it is known what it must come to; of every session, which numbers its counter may
have; and its state may be lost only where the soak did that, or its code in the very first call, or memory ran out:
else it is restored, to what it was as many calls ago as is told. Now and then the program for one run is read slowly,
and must pass on every byte. The first server is never killed: its memory has to stay level. At the end no container, no
command line and no volume of the soak's may be left.

All that is random follows from the seed, though not in which order the tasks run. A line a minute tells how it goes,
each violation is told at once and again at the end, and `trace.log`, in the folder that is named first, has every call.
The exit status is 1 if there was a violation.

What belongs to the soak is known by its volume (containers) and by the LOGNAME in the environment (command lines): the
engine may be in use by others.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.server
import itertools
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from sandbox_runner import (
    PROXY_PORT,
    Config,
    DockerConfig,
    FilesConfig,
    PackageConfig,
    PoolConfig,
    SessionConfig,
    load_config,
    open_runner,
    session_container,
)

ROOT = Path(__file__).parents[2]
CLIENTS = 4
WORKERS = 2  # of each client: calls that it makes at the same time
SESSIONS = 12  # of all clients
IDLE_TIMEOUT = 60.0
ANSWER_WITHIN = 2.0
PATIENCE = 120.0  # seconds for an answer of any kind; more is a violation
HANDOVER = 30.0  # seconds that a session may be said to be in use after its server was killed
PAUSE = 1.0  # seconds at most between two calls of a worker
BETWEEN_BLOWS = 5.0  # seconds, on average
AFTERMATH = 10.0  # seconds in which a call may still meet what a blow hit before
WARM_UP = 5  # minutes until the memory of a server has to stay level
GROWTH = 32 << 10  # kB that it may grow by nevertheless: what it keeps of outputs comes and goes


# ── what is called ──


@dataclass(frozen=True)
class Kind:
    """A kind of call, and what it must come to. TOKEN in the code stands for something that no other call has."""

    weight: int
    code: str
    status: str = "ok"
    words: tuple[str, ...] = ("TOKEN",)
    images: int = 0
    timeout: float | None = None
    loses: bool = False  # a session's variables
    cancel: bool = False  # the call is cancelled after a moment
    interrupt: bool = False  # it is interrupted once it is said to be running
    resource: str | None = None  # what is read afterwards
    stops: bool = False  # whether it is stopped, which takes its time while the container is paused
    saves: bool = False  # whether it writes TOKEN into a file
    files: tuple[str, ...] | None = None  # of the host's, that it is given
    fetches: bool = False  # whether it fails when its connection is cut

    @property
    def excusable(self) -> tuple[str, ...]:
        """What it may come to when something was killed."""
        return ("died", "failed", "error") if self.fetches else ("died", "failed")


MEMORY = "data = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): data[i] = 1"
PLOT = """import matplotlib.pyplot as plt
for i in range(4):
    plt.plot([0, i])
    plt.title(f'TOKEN {i}')
    plt.show()
print('TOKEN')"""
PLOTTED = Kind(5, PLOT, images=4)
# The first call keeps 60 MB; the next ones change all of that, which a sleeping copy shares, and need 40 MB beside it.
HOLD = """held = globals().get('held') or bytearray(60 << 20)
for i in range(0, len(held), 4096): held[i] = (held[i] + 1) % 256
more = bytearray(40 << 20)
for i in range(0, len(more), 4096): more[i] = 1
del more
print(len(held) >> 20, 'MB', 'TOKEN')"""
MUCH = "for _ in range(500): print('x' * 999)\nprint('TOKEN')"
STUBBORN = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
LONG = "import time\nfor i in range(6):\n    print('step', i, flush=True)\n    time.sleep(1)\nprint('TOKEN')"
SLEEP = "import time; time.sleep(60)"
GIVEN = 700_000  # bytes of the file on the host
FILE = Kind(3, "open('a.txt', 'w').write('TOKEN')", words=("a.txt",), saves=True)
SENT = 3_000_000  # bytes that the web server on the host sends
FETCH = Kind(
    4,
    f"import urllib.request\nprint(len(urllib.request.urlopen('http://localhost:PORT/{SENT}').read()), 'TOKEN')",
    words=(f"{SENT} TOKEN",),
    fetches=True,
)
# Connections that are opened and closed at once, more than the proxy has places for; then many downloads.
MANY = f"""import concurrent.futures, socket, urllib.request
for _ in range(3):
    opened = [socket.create_connection(('127.0.0.1', {PROXY_PORT})) for _ in range(200)]
    for one in opened: one.close()
def get(_): return len(urllib.request.urlopen('http://localhost:PORT/1000').read())
with concurrent.futures.ThreadPoolExecutor(50) as pool: print(sum(pool.map(get, range(300))), 'TOKEN')"""
CONNECT = Kind(2, MANY, words=("300000 TOKEN",), fetches=True)
SLOWLY = 0.02  # how often the program for one run is read slowly, of all that a worker does
LINES = 7000  # of a thousand characters, that it prints then
BURST = 0.04  # how often calls in a session follow one another without a pause, until its process crashes
GET = Kind(3, "print(len(open('given.txt').read()), 'TOKEN')", words=(f"{GIVEN} TOKEN",), files=("given.txt",))

TRANSIENT = {
    "sum": Kind(20, "print(sum(range(100_000)), 'TOKEN')", words=("4999950000 TOKEN",)),
    "error": Kind(5, "x = 1\nraise ValueError('TOKEN')", "error", ("line 2", "ValueError: TOKEN")),
    "timeout": Kind(2, "while True: pass", "timeout", (), timeout=1, stops=True),
    "plot": PLOTTED,
    "much": Kind(2, MUCH, words=("characters left out", "TOKEN")),
    "file": FILE,
    "given": GET,
    "fetch": FETCH,
    "connect": CONNECT,
    "crash": Kind(2, "import os; os._exit(3)", "died", ("exit status 3",)),
    "memory": Kind(1, MEMORY, "out_of_memory", ("needed more memory",)),
    "cancel": Kind(3, SLEEP, cancel=True),
}
SESSION = {
    "count": Kind(40, "print('TOKEN')"),
    "error": Kind(6, "raise ValueError('TOKEN')", "error", ("line 3", "ValueError: TOKEN")),
    "timeout": Kind(4, "while True: pass", "timeout", (), timeout=1, stops=True),
    "plot": PLOTTED,
    "hold": Kind(5, HOLD, words=("60 MB TOKEN",)),
    "much": Kind(4, MUCH, words=("characters left out", "TOKEN"), resource="output"),
    "file": dataclasses.replace(FILE, resource="file"),
    "given": GET,
    "fetch": FETCH,
    "connect": CONNECT,
    "long": Kind(6, LONG, words=("step 0", "step 5", "TOKEN")),
    "interrupt": Kind(4, SLEEP, "cancelled", (), interrupt=True, stops=True),
    "cancel": Kind(6, SLEEP, cancel=True, stops=True),
    "crash": Kind(1, "import os; os._exit(3)", "died", ("exit status 3",), loses=True),
    "stubborn": Kind(1, STUBBORN, "timeout", (), timeout=1, loses=True),
    "memory": Kind(1, MEMORY, "out_of_memory", ("needed more memory",), loses=True),
}
# Every call in a session begins with this, on two lines.
COUNT = "count = globals().get('count', 0) + 1\nprint('count', count, 'TOKEN', flush=True)\n"
NEW = "(new: there was no session of this name"
CLEAN_UP = 3  # weight, beside those above


@dataclass
class Session:
    """What is known of a session."""

    name: str
    owner: int  # the client that may use it
    counts: set[int] = field(default_factory=lambda: {0})  # what its counter may be; 0 if there is none
    known: int = 0  # how many calls until now have each told their count
    holds: bool = False  # whether it holds so much memory that, with what else it did, it may not be restorable
    used: float = field(default_factory=time.monotonic)
    busy: bool = False  # whether one of our workers is at it
    goes_on: bool = False  # whether code of a call whose end was not told may be running
    risk: str | None = None  # why its state may be lost
    risk_until: float = math.inf  # calls begun later put an end to that
    orphaned: bool = False  # whether its server ended since it was used
    loses: bool = False  # whether its last call's code loses the variables
    imports: bool = False  # whether its last call imports something, which must not be interrupted in the middle

    def may_be_lost(self) -> str | None:
        """Why it may have lost its state, if it may."""
        if self.risk is None and time.monotonic() - self.used > IDLE_TIMEOUT - 10:
            return "not used for long"
        return self.risk


@dataclass(frozen=True)
class Answer:
    """What a client was told."""

    status: str
    text: str
    images: tuple[int, ...]  # hashes of their data
    state: str | None  # of the session

    @classmethod
    def of(cls, message: dict[str, Any]) -> Answer:
        """Read the answer to a tool call. Results with images have no data beside their text."""
        if "result" not in message:
            return cls("refused", json.dumps(message.get("error")), (), None)
        blocks, data = message["result"]["content"], message["result"].get("structuredContent") or {}
        texts = [block.get("text") or block.get("resource", {}).get("text") or block.get("uri", "") for block in blocks]
        images = tuple(hash(block["data"]) for block in blocks if block["type"] == "image")
        running = any("Still running: the call" in text for text in texts)
        default = "failed" if message["result"].get("isError") else "running" if running else "ok"
        return cls(data.get("status", default), "\n".join(texts), images, data.get("session_state"))

    @property
    def behind(self) -> int:
        """How many calls before the one that it was restored in are missing, too."""
        told = re.findall(r"before this call and the (\d+) before it", self.text)
        return int(told[-1]) if told else 0


class ServerGoneError(Exception):
    """The server ended before it answered."""


class HandedOnError(ServerGoneError):
    """The session was given to another client, while this one had no server: nothing was sent."""


# ── the clients ──


class Client:
    """One client, and its server: a new one whenever that ends."""

    def __init__(self, index: int, soak: Soak) -> None:
        self.index = index
        self.soak = soak
        self.process: anyio.abc.Process | None = None
        self.ready = anyio.Event()
        self.expected: set[int] | None = None  # exit statuses, if the server is to end
        self.starts = 0
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[anyio.Event, list[dict[str, Any]]]] = {}

    async def run(self) -> None:
        """Have a server, until the soak is over."""
        while not self.soak.over:
            with (self.soak.folder / f"server-{self.index}.log").open("ab") as errors:
                self.process = await anyio.open_process(
                    [sys.executable, "-m", "python_docker_mcp"],
                    stderr=errors,
                    env=self.soak.environment(self.index),
                    cwd=ROOT,
                    start_new_session=True,
                )
            self.starts += 1
            self.soak.trace(f"server {self.index} starts")
            self.expected = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._shake_hands)
                await self._read(self.process)
                tasks.cancel_scope.cancel()
            await self._end(self.process)

    async def _shake_hands(self) -> None:
        about = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "soak", "version": "1"}}
        with contextlib.suppress(ServerGoneError):
            await self.request("initialize", about)
            await self._send(method="notifications/initialized")
            self.ready.set()

    async def _read(self, process: anyio.abc.Process) -> None:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        with contextlib.suppress(anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            while True:
                message = json.loads(await lines.receive_until(b"\n", 4 << 20))
                if event := self._pending.get(message.get("id", 0)):
                    event[1].append(message)
                    event[0].set()

    async def _end(self, process: anyio.abc.Process) -> None:
        """Look how the server ended, and hand its sessions on."""
        self._forget_ready()
        with anyio.move_on_after(PATIENCE) as patience:
            status = await process.wait()
        await process.aclose()
        self.soak.trace(f"server {self.index} ended: {process.returncode}")
        if patience.cancelled_caught:
            self.soak.violation(f"server {self.index} did not end after it had closed its output")
        elif self.expected is None or status not in self.expected:
            self.soak.violation(f"server {self.index} ended with status {status}, expected {self.expected}")
        for event, _ in self._pending.values():
            event.set()
        self.soak.hand_on(self)

    def _forget_ready(self) -> None:
        if self.ready.is_set():  # else some wait for it already
            self.ready = anyio.Event()

    async def _send(self, **message: Any) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise ServerGoneError from None

    async def request(self, method: str, params: dict[str, Any], cancel_after: float = math.inf) -> dict[str, Any]:
        """Ask, and wait for the answer, or cancel. Raises ServerGoneError; TimeoutError, which is a violation."""
        number = next(self._ids)
        event, messages = self._pending[number] = anyio.Event(), []
        try:
            await self._send(id=number, method=method, params=params)
            with anyio.move_on_after(cancel_after), anyio.fail_after(PATIENCE):
                await event.wait()
                if not messages:
                    raise ServerGoneError
                return messages[0]
            await self._send(method="notifications/cancelled", params={"requestId": number, "reason": "soak"})
            return {"error": "cancelled"}
        finally:
            del self._pending[number]

    async def call(
        self, tool: str, cancel_after: float = math.inf, *, session: Session | None = None, **arguments: Any
    ) -> Answer:
        """Call a tool; arguments that are None are left out. Raises ServerGoneError, HandedOnError."""
        with anyio.fail_after(PATIENCE):
            await self.ready.wait()
        if session:
            if session.owner != self.index:
                raise HandedOnError
            arguments["session_id"] = session.name
        given = {name: value for name, value in arguments.items() if value is not None}
        self.soak.calls += 1
        started = time.monotonic()
        try:
            message = await self.request("tools/call", {"name": tool, "arguments": given}, cancel_after)
        except ServerGoneError:
            self.soak.trace(f"client {self.index}: {tool} {given}: the server ended")
            raise
        if "error" in message and self.expected:  # the SDK says so of a closed connection
            self.soak.trace(f"client {self.index}: {tool} {given}: {message}, as the server ends")
            raise ServerGoneError
        answer = Answer.of(message)
        self.soak.trace(f"client {self.index}: {tool} {given} in {time.monotonic() - started:.1f} s: {answer}")
        return answer

    async def stop(self, how: str) -> None:
        """End the server in one of the ways there are, and wait until it has ended."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        self._forget_ready()
        self.expected = {"kill": {-9}, "term": {143}, "eof": {0}}[how]
        if how == "eof":
            await process.stdin.aclose()
        else:
            process.send_signal({"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])
        await process.wait()

    def memory(self) -> int:
        """Resident kB of its server; 0 if there is none."""
        with contextlib.suppress(OSError, AttributeError, TypeError):
            assert self.process is not None
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
            return int(found[1]) if found else 0
        return 0


class Worker:
    """Makes one call after the other, and judges what comes of it."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.soak = client.soak
        self.random = random.Random(f"{client.soak.seed} {client.index} {number}")

    async def run(self) -> None:
        """Make calls until the time is over."""
        while time.monotonic() < self.soak.end:
            try:
                if self.random.random() < SLOWLY:
                    await self._read_slowly()
                elif self.random.random() < 0.4:
                    await self._transient()
                else:
                    await self._persistent()
            except TimeoutError:
                self.soak.violation(f"client {self.client.index} was not answered within {PATIENCE:g} seconds")
            except ServerGoneError:
                pass
            await anyio.sleep(self.random.uniform(0, PAUSE))

    def _choose(self, kinds: dict[str, Kind]) -> tuple[str, Kind, str]:
        name = self.random.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]
        return name, kinds[name], f"{self.random.randrange(16**8):08x}"

    # ── without a session ──

    async def _transient(self) -> None:
        name, kind, token = self._choose(TRANSIENT)
        state = {"seen": self.random.randrange(100)} if name == "sum" else None
        code = self.soak.filled(kind.code, token) + ("\nseen += 1" if state else "")
        started = time.monotonic()
        moment = self.random.uniform(0, 2) if kind.cancel else math.inf
        more: dict[str, Any] = {"state": state, "timeout": kind.timeout, "files": kind.files}
        answer = await self.client.call("execute-transient", moment, code=code, **more)
        self.soak.kinds[f"transient {name}"] += 1
        if kind.cancel:
            return
        problem = wrong(kind, answer, token)
        if not problem and kind.saves:
            problem = unsaved(answer, token)
            if problem and "Files left out: a.txt" in answer.text and self.soak.excuse(started):
                problem = ""
        if problem and answer.status in kind.excusable and self.soak.excuse(started):
            self.soak.kinds["(transient calls lost to a kill)"] += 1
        elif problem:
            self.soak.violation(f"transient {name} {token}: {problem}: {answer}")
        elif state and f'"seen": {state["seen"] + 1}' not in answer.text:
            self.soak.violation(f"transient {name} {token}: the state is not what it should be: {answer}")

    async def _read_slowly(self) -> None:
        """Leave the output of the program for one run in its pipe, for longer than its code may take; then read it."""
        token = f"{self.random.randrange(16**8):08x}"
        code = f"for i in range({LINES}): print(f'{{i:06}} {{i % 10}}', 'x' * 990)\nprint('{token}')"
        wanted = "".join(f"{i:06} {i % 10} {'x' * 990}\n" for i in range(LINES)) + f"{token}\n"
        command = [sys.executable, "sandbox_runner.py", "--timeout", "10", "-c", code]
        environment, started = self.soak.environment(self.client.index), time.monotonic()
        with (self.soak.folder / "server-slow.log").open("ab") as errors, anyio.fail_after(PATIENCE):
            async with await anyio.open_process(command, stderr=errors, env=environment, cwd=ROOT) as process:
                assert process.stdout is not None
                await anyio.sleep(self.random.uniform(2, 20))
                got = b"".join([piece async for piece in process.stdout]).decode()
                status = await process.wait()
        self.soak.trace(f"slow reader {token}: {len(got)} characters, status {status}, since {started:.1f}")
        self.soak.kinds["read slowly"] += 1
        if (status or got != wanted) and not (status in (125, 137) and self.soak.excuse(started)):
            same = next((at for at, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(got))
            self.soak.violation(f"slow reader {token}: status {status}; {len(got)} characters, the first {same} right")

    # ── in a session ──

    async def _persistent(self) -> None:
        session = await self._take()
        if session is None:
            return await self._transient()
        try:
            if session.goes_on:
                await self._catch_up(session)
            if self.random.random() < CLEAN_UP / sum(kind.weight for kind in SESSION.values()):
                await self._clean_up(session)
            elif self.random.random() < BURST:
                for name in [*["count"] * self.random.randrange(1, 8), "crash"]:
                    await self._call(session, {name: SESSION[name]})
            else:
                await self._call(session)
        finally:
            session.busy = False
        return None

    async def _take(self) -> Session | None:
        """One of our sessions that nobody uses, or a new one if there are few."""
        mine = [one for one in self.soak.sessions if one.owner == self.client.index and not one.busy]
        if mine and (len(self.soak.sessions) >= SESSIONS or self.random.random() < 0.8):
            session = self.random.choice(mine)
            session.busy = True
            return session
        if len(self.soak.sessions) >= SESSIONS:
            return None
        name = f"soak-{self.soak.id}-{self.random.randrange(16**6):06x}"
        session = Session(name, self.client.index, busy=True)
        if self.random.random() < 0.3:
            token = f"{self.random.randrange(16**8):08x}"
            answer = await self.client.call("execute-persistent", code=COUNT.replace("TOKEN", token))
            found = re.search(r"Session: ([\w.-]+)", answer.text)
            if not found or "(new" not in answer.text or f"count 1 {token}" not in answer.text:
                if answer.status != "running" and not self.soak.excuse(session.used):
                    self.soak.violation(f"no new session: {answer}")
            else:
                session.name, session.counts, session.used = found[1], {1}, time.monotonic()
        self.soak.sessions.append(session)
        return session

    async def _use(self, session: Session, code: str, *rest: Any, **more: Any) -> Answer:
        """A call in a session, again if it is said that another program uses it: that is one that has just ended."""
        deadline = time.monotonic() + HANDOVER
        while True:
            answer = await self.client.call("execute-persistent", *rest, session=session, code=code, **more)
            if "being used by another program" not in answer.text or answer.status != "failed":
                return answer
            self.soak.kinds["(said to be in use by a killed server)"] += 1
            if time.monotonic() > deadline:
                self.soak.violation(f"{session.name} stays in use by a server that ended {HANDOVER:g} s ago")
            await anyio.sleep(0.5)

    async def _catch_up(self, session: Session) -> None:
        """Wait for the end of a call whose server did not tell it any more, or interrupt it."""
        stop = not session.imports and self.random.random() < 0.5
        started = time.monotonic()
        while True:
            answer = await self._use(session, "", interrupt=stop or None)
            self.soak.kinds["session wait"] += 1
            if answer.status != "running":
                break
        session.goes_on = False
        if NEW in answer.text or "had been lost before" in answer.text:
            self._begin_anew(session, answer)
        elif answer.state == "restored":
            session.counts |= reaching_back(session.counts, answer.behind)
        elif answer.state == "lost":
            self._lose(
                session, answer, time.monotonic(), "its code, its server gone" if stop or session.loses else None
            )
        elif answer.status in ("failed", "refused") and not self.soak.excuse(started):
            self.soak.violation(f"{session.name}: what was left running has no end: {answer}")
        if answer.status != "failed":
            session.used = time.monotonic()

    async def _call(self, session: Session, kinds: dict[str, Kind] = SESSION) -> None:
        name, kind, token = self._choose(kinds)
        started = time.monotonic()
        before = set(session.counts)
        reason = session.may_be_lost()
        session.goes_on, session.imports, session.loses = True, bool(kind.images), kind.loses
        session.holds |= kind.code == HOLD
        session.counts = before | {count + 1 for count in before}
        if session.orphaned and kind.cancel:
            name, kind = "count", SESSION["count"]
        code = self.soak.filled(COUNT + kind.code, token)
        moment = self.random.uniform(0, 1.5) if kind.cancel else math.inf
        self.soak.kinds[f"session {name}"] += 1
        try:
            answer = await self._use(session, code, moment, timeout=kind.timeout, files=kind.files)
            text, images = answer.text, answer.images
            while answer.status == "running":
                self.soak.kinds["session wait"] += 1
                answer = await self._use(session, "", interrupt=kind.interrupt or None)
                text, images = text + answer.text, images + answer.images
        except ServerGoneError:
            # The end of the call may have been told in the very moment in which the server died.
            session.known = 0
            session.counts |= reaching_back(before, max(before)) if reason or kind.loses else set()
            raise
        session.goes_on = False
        session.known = session.known + 1 if f" {token}" in text and not kind.cancel else 0
        if reason and (kind.cancel or answer.status == "failed"):
            session.counts |= {0, 1}
            return
        if not kind.cancel:
            whole = dataclasses.replace(answer, text=text, images=images)
            self._judge(session, name, kind, token, whole, before, started)
            if answer.status == "ok" and kind.resource and "Still running" not in text:  # else it is in several parts
                await self._read_resource(session, kind.resource, token, text)
        session.used = time.monotonic()

    def _judge(
        self, session: Session, name: str, kind: Kind, token: str, answer: Answer, before: set[int], started: float
    ) -> None:
        """Compare what came of a call with what should have."""
        found = re.search(rf"count (\d+) {token}", answer.text)
        if answer.state != "restored":  # what is told then is how the call before ended, which nobody waited for
            before = before | reaching_back(before, answer.behind)
        if found:
            self._compare(session, int(found[1]), before, answer)
        elif NEW in answer.text or "had been lost before" in answer.text:
            self._begin_anew(session, answer)
        if answer.state == "restored":
            self.soak.fates[f"restored: {name}" + (", some calls behind" if answer.behind else "")] += 1
            session.counts = reaching_back({int(found[1]) - 1} if found else before, answer.behind)
            if answer.behind < session.known:  # each of these calls has counted
                session.counts = {min(session.counts)}
            if not (kind.loses or session.risk or self.soak.excuse(started)):
                self.soak.violation(f"{session.name} is restored, and its code did not need that: {answer}")
        if answer.state == "lost":
            paused = kind.stops and self.soak.has_paused(session, started)
            first = kind.loses and (0 in before or not found or session.holds)
            reason = "its code" if first else "paused while it was to be stopped" if paused else None
            if kind.status == answer.status == "out_of_memory":  # the copy goes first
                reason = "memory ran out"
            self._lose(session, answer, started, reason)
        if session.risk and started > session.risk_until and found:
            session.risk = None
        if found and session.orphaned:
            session.orphaned = False
        problem = wrong(kind, answer, token) or ("" if found or kind.timeout or kind.interrupt else "no counter")
        if not problem and kind.saves and "Still running" not in answer.text:
            problem = unsaved(answer, token)
            if problem and "Files left out: a.txt" in answer.text and (session.risk or self.soak.excuse(started)):
                problem = ""
        # What a killed command line had not passed on yet is left out; the call ends as it should nevertheless.
        says_gap = answer.status == kind.status and "bytes left out" in answer.text
        if problem and (answer.status in kind.excusable or says_gap) and (session.risk or self.soak.excuse(started)):
            self.soak.kinds[f"(session calls that {answer.status} by a kill)"] += 1
        elif problem:
            self.soak.violation(f"{session.name} {name} {token}, counter before {before}: {problem}: {answer}")

    def _compare(self, session: Session, count: int, before: set[int], answer: Answer) -> None:
        """Whether the counter is one that it may be; a session that began anew must have said so."""
        reason = session.may_be_lost()
        if count - 1 in before:
            if session.orphaned and count > 1:
                self.soak.fates["kept: its server ended"] += 1
        elif count == 1 and reason:
            self.soak.fates[f"lost: {reason}"] += 1
            told = "had been lost before" in answer.text or NEW in answer.text
            if not told and answer.status in ("ok", "error"):
                self.soak.violation(f"{session.name} began anew and did not say so: {answer}")
        else:
            self.soak.violation(f"{session.name} counts {count} after {before}: {answer}")
        session.counts = {count}

    def _begin_anew(self, session: Session, answer: Answer) -> None:
        """There is no such session any more, it is said."""
        if reason := session.may_be_lost():
            self.soak.fates[f"lost: {reason}"] += 1
        elif 0 not in session.counts and not self.soak.excuse(session.used):
            self.soak.violation(f"{session.name} counts {session.counts}, and is said to be new: {answer}")
        session.counts = {0, 1}  # this call may have counted, or not

    def _lose(self, session: Session, answer: Answer, started: float, reason: str | None) -> None:
        """The state is said to be lost."""
        if reason := reason or session.may_be_lost():
            self.soak.fates[f"lost: {reason}"] += 1
        elif session.counts - {0, 1} or not self.soak.excuse(started):
            self.soak.violation(f"{session.name} is lost, and nobody did that: {answer}")
        session.counts, session.holds = {0}, False

    async def _read_resource(self, session: Session, what: str, token: str, text: str) -> None:
        """Read what a result pointed at."""
        kept = re.search(r"resource (session://\S+);", text)
        address = f"session://{session.name}/files/a.txt"
        if what == "output":
            if not kept:
                return self.soak.violation(f"{session.name}: the output {token} is not said to be kept")
            address = f"{kept[1]}?offset=499900&length=1000"
        started = time.monotonic()
        message = await self.client.request("resources/read", {"uri": address})
        self.soak.kinds["resource read"] += 1
        contents = message.get("result", {}).get("contents", [{}])[0].get("text", "")
        if token not in contents and not (session.risk or self.soak.excuse(started)):
            self.soak.violation(f"{address} does not hold {token}: {str(message)[:500]}")
        return None

    async def _clean_up(self, session: Session) -> None:
        """End a session, and sometimes begin another one under its name."""
        started = time.monotonic()
        counts, session.counts = session.counts, session.counts | {0}  # if the server ends before it answers
        try:
            answer = await self.client.call("cleanup-session", session=session)
        except HandedOnError:
            session.counts = counts
            raise
        self.soak.kinds["session clean-up"] += 1
        absent = "There is no session" in answer.text and (0 in counts or session.may_be_lost())
        if answer.status != "ok" and not absent and not self.soak.excuse(started):
            self.soak.violation(f"{session.name} could not be ended: {answer}")
        self.soak.sessions.remove(session)
        if answer.status == "ok" and self.random.random() < 0.3:
            self.soak.sessions.append(Session(session.name, session.owner))


def reaching_back(counts: set[int], calls: int) -> set[int]:
    """What a counter may be that had one of these, if up to so many calls are undone."""
    return {count - undone for count in counts for undone in range(calls + 1) if undone <= count}


def unsaved(answer: Answer, token: str) -> str:
    """What is wrong with the file that a call wrote: where it is saved it holds the token, or else the result does."""
    saved = re.search(r"Saved for the user as (\S+) \(", answer.text)
    content = Path(saved[1]).read_text(encoding="utf-8") if saved else answer.text
    return "" if token in content else f"the file does not hold {token}, but {content[:100]}"


def wrong(kind: Kind, answer: Answer, token: str) -> str:
    """What is wrong with an answer, in a word; nothing if it is as it should be."""
    if answer.status != kind.status and not (answer.images and kind.images):
        return f"not {kind.status}"
    if not len(answer.images) == len(set(answer.images)) == kind.images:
        return f"not {kind.images} different images"
    if "killed because memory ran out" in answer.text:
        return "none of its processes was killed"
    missing = [words for words in kind.words if words.replace("TOKEN", token) not in answer.text]
    return f"{missing} missing" if missing else ""


# ── the blows ──


@dataclass
class Blow:
    """Something that was done to the servers, or behind their backs."""

    kind: str
    victim: str
    started: float = field(default_factory=time.monotonic)
    ended: float = math.inf
    excused: bool = False  # whether a call has been excused by it

    @property
    def is_kill(self) -> bool:
        """Whether it was meant for a container or its command line, and could cost a call."""
        return self.kind in ("command line killed", "container killed", "container removed")


class Killer:
    """Does all that must do no harm."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.random = random.Random(f"{soak.seed} killer")
        self._ways: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "server killed": (4, lambda: self._server("kill")),
            "server terminated": (1, lambda: self._server("term")),
            "server's input closed": (1, lambda: self._server("eof")),
            "command line killed": (6, self._command_line),
            "container killed": (2, lambda: self._container(["kill"])),
            "container removed": (2, lambda: self._container(["rm", "--force"])),
            "container paused": (4, self._pause),
        }

    async def run(self) -> None:
        """One blow after the other until the time is over."""
        while time.monotonic() < self.soak.end:
            await anyio.sleep(min(self.random.expovariate(1 / BETWEEN_BLOWS), 4 * BETWEEN_BLOWS))
            kind = self.random.choices(list(self._ways), [weight for weight, _ in self._ways.values()])[0]
            await self._ways[kind][1]()

    @contextlib.contextmanager
    def _blow(self, kind: str, victim: str) -> Iterator[None]:
        self.soak.trace(f"BLOW {kind}: {victim}")
        self.soak.kills[kind] += 1
        blow = Blow(kind, victim)
        self.soak.blows.append(blow)
        try:
            yield
        finally:
            blow.ended = time.monotonic()
            self.soak.trace(f"BLOW {kind}: {victim} done")

    async def _server(self, how: str) -> None:
        client = self.random.choice(self.soak.clients[1:])
        if client.process and client.process.returncode is None and client.expected is None and client.ready.is_set():
            words = {"kill": "server killed", "term": "server terminated", "eof": "server's input closed"}
            with self._blow(words[how], f"server {client.index}"):
                await client.stop(how)

    async def _command_line(self) -> None:
        if found := [(pid, line) for pid, line in self.soak.command_lines() if line[1] in ("run", "exec")]:
            pid, line = self.random.choice(found)
            name = next((one for one in line if "python-docker-mcp-" in one), "?")
            with self._blow("command line killed", f"{pid} {line[1]} {name}"), contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _victim(self, risk: str) -> tuple[str, Session | None] | None:
        names = await self.soak.containers()
        if not names:
            return None
        name = self.random.choice(names)
        session = next((one for one in self.soak.sessions if session_container(one.name) == name), None)
        if session:
            session.risk, session.risk_until = risk, math.inf
        return name, session

    async def _container(self, command: list[str]) -> None:
        kind = "container killed" if command == ["kill"] else "container removed"
        if found := await self._victim(kind):
            name, session = found
            with self._blow(kind, name):
                await self.soak.engine(*command, name)
            if session:
                session.risk_until = time.monotonic()

    async def _pause(self) -> None:
        # Not where a new connection may be on its way: a pause in the middle of an `exec` hangs Docker 20.10 (in runc).
        settled = [one for one in self.soak.sessions if not one.orphaned and max(one.counts) > 1]
        if settled:
            name = session_container(self.random.choice(settled).name)
            with self._blow("container paused", name):
                await self.soak.engine("pause", name)
                await anyio.sleep(self.random.uniform(0.2, 4))
                await self.soak.engine("unpause", name)


# ── the whole ──


class Web(http.server.BaseHTTPRequestHandler):
    """Sends code what it fetches."""

    def do_GET(self) -> None:
        """Send as many bytes as the path says, unless the connection is cut."""
        with contextlib.suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", self.path[1:])
            self.end_headers()
            self.wfile.write(bytes(int(self.path[1:])))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Soak:
    """What all of them share."""

    def __init__(self, command: str, minutes: float, seed: int, image: str) -> None:
        self.command = command
        self.minutes = minutes
        self.seed = seed
        self.id = secrets.token_hex(4)
        self.image = image
        self.volume = f"python-docker-mcp-soak-{self.id}"
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        self.clients = [Client(index, self) for index in range(CLIENTS)]
        self.sessions: list[Session] = []
        self.blows: list[Blow] = []
        self.calls = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.kills: collections.Counter[str] = collections.Counter()
        self.fates: collections.Counter[str] = collections.Counter()
        self.violations: list[str] = []
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        self.over = False
        self.memory: list[tuple[float, int]] = []  # minutes, and kB of the server that is never killed
        self.web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
        self.web.socket.listen(1024)
        threading.Thread(target=self.web.serve_forever, daemon=True).start()
        (self.folder / "in").mkdir()
        (self.folder / "in/given.txt").write_text("x" * GIVEN, encoding="utf-8")
        self._trace = (self.folder / "trace.log").open("w", encoding="utf-8")

    def filled(self, code: str, token: str) -> str:
        """The code with what differs from call to call, and from run to run."""
        return code.replace("TOKEN", token).replace("PORT", str(self.web.server_port))

    def environment(self, index: int) -> dict[str, str]:
        """A server's environment, with its configuration: every second one uses sandboxes again."""
        allowed = f"localhost:{self.web.server_port}"
        config = Config(
            docker=DockerConfig(command=self.command, image=self.image, timeout=90, network_allow=(allowed,)),
            session=SessionConfig(idle_timeout=IDLE_TIMEOUT, answer_within=ANSWER_WITHIN),
            package=PackageConfig(volume=self.volume),
            files=FilesConfig(str(self.folder / "out") if index >= CLIENTS // 2 else None, (str(self.folder / "in"),)),
            pool=PoolConfig(size=4, max_age=60, reuse=bool(index % 2)),
        )
        file = self.folder / f"config-{index}.yaml"
        if not file.exists():  # else a server may be reading it
            file.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON_DOCKER_MCP_")}
        return {**ours, "PYTHON_DOCKER_MCP_CONFIG": str(file), "LOGNAME": self.volume}

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def trace(self, words: str) -> None:
        """Write a line to the trace."""
        self._trace.write(f"{self.now():8.2f} {words[:3000]!r}\n")
        self._trace.flush()

    def violation(self, words: str) -> None:
        """Something that must not be."""
        self.trace(f"VIOLATION {words}")
        self.violations.append(f"{self.now():.1f} s: {words[:1500]}")
        print(f"VIOLATION {self.violations[-1]}", flush=True)

    def excuse(self, since: float) -> bool:
        """Whether a kill can be to blame for what came of a call begun then; each for one call."""
        for blow in self.blows:
            if blow.ended > since - AFTERMATH and blow.is_kill and not blow.excused:
                blow.excused = True
                return True
        return False

    def has_paused(self, session: Session, since: float) -> bool:
        """Whether the session's container has been paused since then."""
        name = session_container(session.name)
        return any(blow.victim == name and blow.ended > since and not blow.is_kill for blow in self.blows)

    def hand_on(self, client: Client) -> None:
        """Give the sessions of a server that has ended to any client."""
        for session in self.sessions:
            if session.owner == client.index and not self.over:
                session.owner = random.Random(f"{self.seed} {session.name} {client.starts}").randrange(CLIENTS)
                session.orphaned = True

    # ── the engine ──

    async def engine(self, *arguments: str) -> str:
        """What a command of the engine prints. What it is about may be gone."""
        with anyio.move_on_after(PATIENCE):
            done = await anyio.run_process([self.command, *arguments], stderr=subprocess.DEVNULL, check=False)
            return done.stdout.decode()
        self.violation(f"`{self.command} {' '.join(arguments)}` did not end")
        return ""

    async def containers(self, *options: str) -> list[str]:
        """The names of our containers, in whatever state."""
        return (
            await self.engine("ps", "--all", f"--filter=volume={self.volume}", *options, "--format={{.Names}}")
        ).split()

    def command_lines(self) -> list[tuple[int, list[str]]]:
        """The engine's command lines that servers of ours have started: process ids and arguments."""
        found = []
        mark = f"LOGNAME={self.volume}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                line = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                if Path(line[0]).name == self.command and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((int(folder.name), line))
        return found

    # ── the story ──

    async def run(self) -> None:
        """All of it; violations are left in `violations`."""
        print(f"seed {self.seed}, {self.minutes:g} minutes, folder {self.folder}, volume {self.volume}", flush=True)
        async with anyio.create_task_group() as servers:
            for client in self.clients:
                servers.start_soon(client.run)
            async with anyio.create_task_group() as tasks:
                for client in self.clients:
                    for number in range(WORKERS):
                        tasks.start_soon(Worker(client, number).run)
                tasks.start_soon(Killer(self).run)
                tasks.start_soon(self._report)
            self.over = True
            for client, how in zip(self.clients, itertools.cycle(("eof", "term")), strict=False):
                if client.process and client.process.returncode is None and client.expected is None:
                    await client.stop(how)
        await self._look_around()

    async def _report(self) -> None:
        done = 0
        for minute in itertools.count(1):
            await anyio.sleep(max(0.0, min(self.started + 60 * minute, self.end) - time.monotonic()))
            self.memory.append((self.now() / 60, self.clients[0].memory()))
            kills = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
            memory = " ".join(f"{client.memory() / 1024:.0f}" for client in self.clients)
            print(
                f"{self.now() / 60:5.1f} min: {self.calls} calls, {(self.calls - done) / 60:.1f}/s; {kills}; "
                f"{len(self.sessions)} sessions, {len(await self.containers())} containers, "
                f"{len(self.command_lines())} command lines; servers' MB {memory}; {len(self.violations)} violations",
                flush=True,
            )
            done = self.calls
            if time.monotonic() >= self.end:
                return

    async def _look_around(self) -> None:
        """Whether anything is left, and how the memory went."""
        deadline = time.monotonic() + IDLE_TIMEOUT + PATIENCE
        print(f"servers have ended; containers: {len(await self.containers())}", flush=True)
        while (names := await self.containers()) and time.monotonic() < deadline:
            await anyio.sleep(1)
        if names and not await self.containers("--filter=status=running"):
            print(f"{len(names)} never ran, as their command line was killed too soon; pruning", flush=True)
            async with open_runner(load_config(environ=self.environment(0))) as runner:
                await runner.launcher.prune()
            names = await self.containers()
        if names:
            told = await self.engine("ps", "--all", f"--filter=volume={self.volume}", "--format={{.Names}} {{.Status}}")
            self.violation(f"containers are left: {told.splitlines()}")
        print(f"containers at the end: {len(names)}, {self.now() / 60 - self.minutes:.1f} min later", flush=True)
        lines = self.command_lines()
        if lines:
            self.violation(f"command lines are left: {lines}")
        print(f"command lines at the end: {len(lines)}", flush=True)
        for file in sorted(self.folder.glob("server-*.log")):
            told = file.read_text(encoding="utf-8", errors="replace")
            for words in sorted(set(re.findall("Traceback|no supervisor sends", told))):
                self.violation(f"a server wrote {words!r}: {file}")
        self._judge_memory()
        await self.engine("volume", "rm", self.volume)
        if volumes := await self.engine("volume", "ls", "--quiet", f"--filter=name={self.volume}"):
            self.violation(f"volumes are left: {volumes.split()}")

    def _judge_memory(self) -> None:
        early = [size for minute, size in self.memory if minute <= WARM_UP + 2][-3:]
        late = [size for _, size in self.memory[-3:]]
        growth = statistics.median(late) - statistics.median(early)
        print(f"server 0: {statistics.median(early) / 1024:.1f} MB, in the end {growth / 1024:+.1f} MB", flush=True)
        if growth > GROWTH:
            self.violation(f"the server that was never killed has grown by {growth / 1024:.1f} MB")

    def summary(self) -> None:
        """What was done, and what was wrong."""
        for title, counts in (("calls", self.kinds), ("kills", self.kills), ("sessions' states", self.fates)):
            print(f"\n{title}:")
            for kind, count in sorted(counts.items()):
                print(f"{count:8} {kind}")
        print(f"\n{len(self.violations)} violations (seed {self.seed})")
        for violation in self.violations:
            print(f"- {violation}")


def main() -> None:
    """Run a soak."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.soak", description="A soak on a real engine.")
    parser.add_argument("engine", choices=("docker", "podman"))
    parser.add_argument("minutes", nargs="?", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--image", default=DockerConfig.image, help="the base image; `host` makes one")
    options = parser.parse_args()
    soak = Soak(options.engine, options.minutes, options.seed, options.image)
    anyio.run(soak.run)
    soak.summary()
    if soak.violations:
        sys.exit(1)
    shutil.rmtree(soak.folder)


if __name__ == "__main__":
    main()
