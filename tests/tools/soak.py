"""What four clients do in half an hour while things around them are killed; after that nothing may be left.

    python -m tests.tools.soak docker [MINUTES] [--seed NUMBER] [--image IMAGE]

Each client is a server process of its own and speaks lines with it, as real clients do. Two workers of each make calls
of all kinds (CALLS), while something is done to servers, the engine's command lines and containers (EVENTS). Of every
call it is known what it must come to; of every session, which numbers its counter may have. Its state may be lost only
where the soak did that, or its code in the very first call, or memory ran out: else it is restored, to what it was as
many calls ago as is told. The first server is never killed: its memory and its descriptors have to stay level. At the
end no container, no process and no volume of the soak's may be left; they are known by the volume that containers have,
and by LOGNAME in the environment of processes, as the engine may be in use by others.

All that is random follows from the seed, though not in which order the tasks run. Each violation is told at once and
again at the end; `trace.log`, in the folder that is named first, has every call. The exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
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
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sandbox_runner
from sandbox_runner import Config, DockerConfig, FilesConfig, PackageConfig, PoolConfig, SessionConfig

ROOT = Path(__file__).parents[2]
CLIENTS = 4
WORKERS = 2  # of each client: calls that it makes at the same time
SESSIONS = 12  # of all clients
IDLE_TIMEOUT = 50.0
PATIENCE = 120.0  # seconds for an answer of any kind; more is a violation
HANDOVER = 30.0  # seconds that a session may be said to be in use after its server was killed
BETWEEN_EVENTS = 5.0  # seconds, on average
AFTERMATH = 10.0  # seconds in which a call may still meet what an event hit before
WARM_UP = 5  # minutes until the first server has to stay level
GROWTH = {"MB": 32, "descriptors": 40}  # that are allowed nevertheless: what it keeps of outputs comes and goes
GIVEN = 700_000  # bytes of the file on the host
SENT = 3_000_000  # bytes that the web server on the host sends
PAGE = os.sysconf("SC_PAGE_SIZE")
STILL, NEW = "Still running: the call", "(new: there was no session of this name"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of call, and what it must come to."""

    weights: tuple[int, int]  # without a session, and in one
    code: str
    status: str = "ok"
    words: tuple[str, ...] = ()
    images: int = 0
    timeout: float | None = None
    stop: str = ""  # "cancel" after a moment, or "interrupt" once it is said to be running
    loses: bool = False  # the session's variables
    files: tuple[str, ...] | None = None  # of the host's, that it is given
    resource: str = ""  # what is read afterwards in a session: an address, or a pattern of one in the result


# Every call begins with this, on two lines. TOKEN stands for something that no other call has.
COUNT = "count = globals().get('count', 0) + 1\nprint('count', count, 'TOKEN', flush=True)\n"
PLOT = """import matplotlib.pyplot as plt
for i in range(4):
    plt.plot([0, i])
    plt.title(f'TOKEN {i}')
    plt.show()
print('end TOKEN')"""
FETCH = "import urllib.request\nprint(len(urllib.request.urlopen('http://localhost:PORT/').read()), 'TOKEN')"
LONG = "import time\nfor i in range(6):\n    print('step', i, flush=True)\n    time.sleep(1)\nprint('end TOKEN')"
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import time\nwhile True:\n    try: time.sleep(60)\n    except KeyboardInterrupt: pass"
MUCH = "for _ in range(500): print('x' * 999)\nprint('end TOKEN')"
MEMORY = "data = bytearray(1 << 30)\nfor i in range(0, 1 << 30, 4096): data[i] = 1"
WRITE, READ = "_ = open('a.txt', 'w').write('TOKEN')", "print(len(open('given.txt').read()), 'TOKEN')"
KEPT = r"resource (session://\S+);"

CLEAN_UP = Kind((0, 3), "")  # of the session
CALLS = {
    "count": Kind((20, 40), "print(sum(range(100_000)), 'TOKEN')", words=("4999950000 TOKEN",)),
    "error": Kind((5, 6), "raise ValueError('TOKEN')", "error", ("line 3", "ValueError: TOKEN")),
    "plot": Kind((5, 5), PLOT, words=("end TOKEN",), images=4),
    "much": Kind((2, 4), MUCH, words=("characters left out", "end TOKEN"), resource=KEPT),
    "file": Kind((3, 3), WRITE, words=("a.txt",), resource="session://SESSION/files/a.txt"),
    "given": Kind((3, 3), READ, words=(f"{GIVEN} TOKEN",), files=("given.txt",)),
    "fetch": Kind((5, 5), FETCH, words=(f"{SENT} TOKEN",)),
    "long": Kind((1, 6), LONG, words=("step 0", "step 5", "end TOKEN")),
    "timeout": Kind((2, 4), "while True: pass", "timeout", timeout=1),
    "interrupt": Kind((0, 4), SLEEP, "cancelled", stop="interrupt"),
    "cancel": Kind((3, 6), SLEEP, stop="cancel"),
    "crash": Kind((2, 2), "import os; os._exit(3)", "died", ("exit status 3",), loses=True),
    "stubborn": Kind((0, 1), STUBBORN, "timeout", timeout=1, loses=True),
    "memory": Kind((1, 1), MEMORY, "out_of_memory", ("needed more memory",), loses=True),
    "clean up": CLEAN_UP,
}
EVENTS = {  # weight, what it is done to, and how
    "server killed": (4, "server", "SIGKILL"),
    "server terminated": (1, "server", "SIGTERM"),
    "server's input closed": (1, "server", "eof"),
    "command line killed": (6, "command line", "kill"),
    "container killed": (2, "container", "kill"),
    "container removed": (2, "container", "rm --force"),
    "container paused": (4, "session", "pause"),
}
ENDS = {"SIGKILL": -9, "SIGTERM": 143, "eof": 0}  # of a server, and the status that it must end with


@dataclasses.dataclass
class Event:
    """Something that is done to the servers, or behind their backs."""

    kind: str
    victim: str
    ended: float = math.inf
    excused: bool = False  # whether a call has been excused by it


@dataclasses.dataclass
class Session:
    """What is known of a session: its counter is from `low` to `high`, and 0 if there is none."""

    name: str
    owner: int  # the client that may use it
    low: int = 0
    high: int = 0
    known: int = 0  # how many calls until now have each told their count
    used: float = dataclasses.field(default_factory=time.monotonic)
    settled: float = dataclasses.field(default_factory=time.monotonic)  # when the last call that told its count began
    busy: bool = False  # whether one of our workers is at it
    left: Kind | None = None  # the call whose end was not told: its code may be running
    orphaned: bool = False  # whether its server ended since it was used


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client was told."""

    status: str
    text: str
    images: tuple[int, ...] = ()  # hashes of their data
    state: str | None = None  # of the session

    @classmethod
    def of(cls, message: dict[str, Any]) -> Answer:
        """Read the answer to a tool call: results with images have no data beside their text."""
        if "result" not in message:
            return cls("refused", json.dumps(message.get("error")))
        blocks, data = message["result"]["content"], message["result"].get("structuredContent") or {}
        text = "\n".join(one.get("text") or one.get("resource", {}).get("text") or one.get("uri", "") for one in blocks)
        images = tuple(hash(block["data"]) for block in blocks if block["type"] == "image")
        default = "failed" if message["result"].get("isError") else "running" if STILL in text else "ok"
        return cls(data.get("status", default), text, images, data.get("session_state"))

    def problem(self, kind: Kind, token: str) -> str:
        """Say what is wrong with it, in a word; nothing if it is as it should be."""
        if self.status != kind.status and not (self.images and kind.images):
            return f"not {kind.status}"
        if not len(self.images) == len(set(self.images)) == kind.images:
            return f"not {kind.images} different images"
        if "killed because memory ran out" in self.text:
            return "none of its processes was killed"
        words = kind.words if kind.timeout or kind.stop else (*kind.words, " TOKEN")
        missing = [one for one in words if one.replace("TOKEN", token) not in self.text]
        saved = re.search(r"Saved for the user as (\S+) \(", self.text)
        if saved and STILL not in self.text and token not in Path(saved[1]).read_text(encoding="utf-8"):
            missing.append("token in the file")
        return f"{missing} missing" if missing else ""

    def is_excusable(self, kind: Kind) -> bool:
        """Tell whether it is what a kill makes of a call: an exception, if its connection was cut."""
        # What a killed command line had not passed on yet is left out; the call ends as it should nevertheless.
        gaps = "bytes left out" in self.text or "Files left out: a.txt" in self.text
        return self.status in ("died", "failed") or gaps or (self.status == "error" and "PORT" in kind.code)


class ServerGoneError(Exception):
    """The server ended before it answered, or nothing was sent, as another client has the session now."""


class Client:
    """One client, and its server: a new one whenever that ends."""

    def __init__(self, index: int, soak: Soak) -> None:
        self.index, self.soak = index, soak
        self.process: Any = None
        self.ready = asyncio.Event()
        self.ends = ""  # how, if the server is to end
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}

    def __str__(self) -> str:
        return f"server {self.index}"

    async def run(self) -> None:
        """Have a server, until the soak is over."""
        while not self.soak.over:
            with (self.soak.folder / f"server-{self.index}.log").open("ab") as log:
                options: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": log, "limit": 4 << 20, "cwd": ROOT}
                options |= {"env": self.soak.environment(self.index), "start_new_session": True}
                command = (sys.executable, "-m", "python_docker_mcp")
                self.process = await asyncio.create_subprocess_exec(*command, **options)
            self.ends = ""
            hello = asyncio.create_task(self._shake_hands())
            while line := await self.process.stdout.readline():
                future = self._pending.get((message := json.loads(line)).get("id"))
                if future and not future.done():
                    future.set_result(message)
            hello.cancel()
            self.ready.clear()
            with self.soak.noting_violations(f"the end of {self}"):
                status = await asyncio.wait_for(self.process.wait(), PATIENCE)
                assert status == ENDS.get(self.ends), f"status {status} after {self.ends or 'nothing'}"
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(ServerGoneError())
            for session in self.soak.sessions:  # any client goes on with them
                if session.owner == self.index:
                    session.owner, session.orphaned = self.soak.random.randrange(CLIENTS), True

    async def _shake_hands(self) -> None:
        about = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "soak", "version": "1"}}
        with contextlib.suppress(ServerGoneError):
            await self.request("initialize", about)
            await self._send(method="notifications/initialized")
            self.ready.set()

    async def _send(self, **message: Any) -> None:
        try:
            self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            await self.process.stdin.drain()
        except (OSError, RuntimeError):  # the latter, once its input was closed
            raise ServerGoneError from None

    async def request(self, method: str, params: dict[str, Any], cancel_after: float = math.inf) -> Any:
        """Ask, and wait for the answer, or cancel. Raises ServerGoneError; TimeoutError, which is a violation."""
        number = next(self._numbers)
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(id=number, method=method, params=params)
            return await asyncio.wait_for(future, min(cancel_after, PATIENCE))
        except TimeoutError:
            if cancel_after > PATIENCE:
                raise
            await self._send(method="notifications/cancelled", params={"requestId": number, "reason": "soak"})
            return {"error": "cancelled"}
        finally:
            del self._pending[number]

    async def call(self, tool: str, session: Session | None, cancel_after: float = math.inf, **more: Any) -> Answer:
        """Call a tool; arguments that are None are left out. Raises ServerGoneError."""
        await asyncio.wait_for(self.ready.wait(), PATIENCE)
        if session and session.owner != self.index:
            raise ServerGoneError
        arguments = {"session_id": session.name if session else None, **more}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        started, answer = time.monotonic(), Answer("unknown", "the server ended")
        try:
            message = await self.request("tools/call", {"name": tool, "arguments": arguments}, cancel_after)
            answer = Answer.of(message)
        finally:
            self.soak.trace(f"client {self.index}: {tool} {arguments} in {time.monotonic() - started:.1f} s: {answer}")
        if "error" in message and self.ends:  # the SDK says so of a closed connection
            raise ServerGoneError
        return answer

    async def stop(self, how: str) -> None:
        """End the server in one of the ways there are, and wait until it has ended."""
        self.ready.clear()
        self.ends = how
        self.process.stdin.close() if how == "eof" else self.process.send_signal(signal.Signals[how])
        await self.process.wait()


class Worker:
    """Makes one call after the other, and judges what comes of it."""

    def __init__(self, client: Client, number: int) -> None:
        self.client, self.soak = client, client.soak
        self.random = random.Random(f"{client.soak.seed} {client.index} {number}")

    async def run(self) -> None:
        """Make calls until the time is over."""
        while time.monotonic() < self.soak.end:
            with self.soak.noting_violations(f"client {self.client.index}"), contextlib.suppress(ServerGoneError):
                await (self._in_session() if self.random.random() < 0.6 else self._transient())
            await asyncio.sleep(self.random.uniform(0, 1))

    def _choose(self, place: int, name: str = "") -> tuple[Kind, str, dict[str, Any]]:
        """Choose what to call: its kind, the token in its code, and the arguments."""
        name = name or self.random.choices(list(CALLS), [kind.weights[place] for kind in CALLS.values()])[0]
        kind, token = CALLS[name], f"{self.random.randrange(16**8):08x}"
        self.soak.done[f"{'session' if place else 'transient'} {name}"] += 1
        code = (COUNT + kind.code).replace("TOKEN", token).replace("PORT", str(self.soak.port))
        moment = self.random.uniform(0, 2) if kind.stop == "cancel" else math.inf
        return kind, token, {"code": code, "timeout": kind.timeout, "files": kind.files, "cancel_after": moment}

    async def _transient(self) -> None:
        """Make a call without a session: it counts on from the number that it is given, if any."""
        kind, token, arguments = self._choose(0)
        started, state = time.monotonic(), self.random.choice([None, {"count": 7}])
        answer = await self.client.call("execute-transient", None, state=state, **arguments)
        problem = "" if kind.stop else answer.problem(kind, token)
        if not problem and state and kind.status == "ok" and not kind.stop and '"count": 8' not in answer.text:
            problem = "another state"
        if problem and answer.is_excusable(kind) and self.soak.excuse(started):
            self.soak.done["(transient calls lost to a kill)"] += 1
        else:
            assert not problem, f"transient {token}: {problem}: {answer}"

    async def _in_session(self) -> None:
        """Make a call in one of our sessions that nobody uses, or in a new one if there are few."""
        mine = [one for one in self.soak.sessions if one.owner == self.client.index and not one.busy]
        if len(self.soak.sessions) < SESSIONS and (not mine or self.random.random() < 0.2):
            mine = [Session(f"soak-{self.soak.id}-{self.random.randrange(16**6):06x}", self.client.index)]
            self.soak.sessions += mine
        if mine:
            session = self.random.choice(mine)
            session.busy = True
            try:
                await self._call(session)
            except (AssertionError, TimeoutError):  # what it counts is not known any more
                self.soak.sessions.remove(session)
                raise
            finally:
                session.busy = False

    async def _call(self, session: Session) -> None:
        """Make a call, or wait for the end of one whose server did not tell it any more, or interrupt that."""
        started, before, risk = time.monotonic(), (session.low, session.high), self.soak.risk(session)
        if session.left:
            kind, token, arguments = session.left, "", {"code": "", "interrupt": bool(session.left.stop) or None}
        else:
            kind, token, arguments = self._choose(1, "count" if session.orphaned else "")
            if kind is CLEAN_UP:
                return await self._clean_up(session)
            # This is what is known if the server ends: the call's end may have been told, and the session be lost.
            session.low, session.high = 0 if risk or kind.loses else session.low, session.high + 1
        known, session.known, session.left = session.known, 0, kind
        answer = await self._use(session, kind, arguments)
        session.left = None
        if risk and answer.status == "failed":
            return None
        if not token or kind.stop != "cancel":
            session.known = known + 1 if token and f" {token}" in answer.text else 0
            self._judge(session, kind, token, answer, before, started)
            if token and kind.resource and answer.status == "ok" and STILL not in answer.text:  # else it is in parts
                await self._read_resource(session, kind.resource, token, answer.text)
        session.used = time.monotonic()
        return None

    async def _use(self, session: Session, kind: Kind, arguments: dict[str, Any]) -> Answer:
        """Call in a session, again while the server that it had is said to use it; return all that is told of it."""
        whole, deadline = Answer("", ""), time.monotonic() + HANDOVER
        while True:
            answer = await self.client.call("execute-persistent", session, **arguments)
            if answer.status == "failed" and "being used by another program" in answer.text:
                assert time.monotonic() < deadline, f"{session.name} stays in use by a server that ended: {answer}"
                await asyncio.sleep(0.5)
                continue
            text, images = whole.text + answer.text, whole.images + answer.images
            whole = dataclasses.replace(answer, text=text, images=images)
            if answer.status != "running":
                return whole
            arguments = {"code": "", "interrupt": bool(kind.stop) or None}

    def _judge(
        self, session: Session, kind: Kind, token: str, answer: Answer, before: tuple[int, int], started: float
    ) -> None:
        """Compare what came of a call with what should have; without a token, only what the session's state is now."""
        (low, high), risk, reason = before, self.soak.risk(session), ""
        told = f"{session.name} {token}, counter before {before}: {answer}"
        found = re.search(rf"count (\d+) {token}", answer.text) if token else None
        count = int(found[1]) if found else 0
        anew = NEW in answer.text or "had been lost before" in answer.text
        behind = int((re.findall(r"before this call and the (\d+) before it", answer.text) or [0])[-1])
        if (kind.loses and (not low or not found)) or (kind.stop and not token):
            reason = "its code"
        elif (kind.timeout or kind.stop) and self.soak.is_hit(session, started, "session"):
            reason = "paused while it was to be stopped"
        elif kind.status == answer.status == "out_of_memory":  # the copy goes first
            reason = "memory ran out"
        if answer.state != "restored":  # what is told then is how the call before ended, which nobody waited for
            low = max(0, low - behind)
        if low < count <= high + 1:
            session.low = session.high = count
            self.soak.done["state kept: its server ended"] += session.orphaned and count > 1
        elif count or anew:
            assert count <= 1, f"a wrong count: {told}"
            assert anew or answer.status not in ("ok", "error"), f"begun anew, which was not said: {told}"
            assert risk or (not count and (low == 0 or self.soak.excuse(session.used))), f"why was it lost? {told}"
            self.soak.done[f"state lost: {risk}"] += bool(risk)
            session.low, session.high = count, 1  # this call may have counted, or not
        if answer.state == "restored":
            if token and not (kind.loses or risk):
                assert self.soak.excuse(started), f"restored, and its code did not need that: {told}"
            low, high = (count - 1, count - 1) if count else before
            session.low = max(0, low - behind)
            session.high = session.low if behind < session.known else high  # each of these calls has counted
            self.soak.done["state restored" + (", some calls behind" if behind else "")] += 1
        elif answer.state == "lost":
            if not (reason or risk):
                assert session.high <= 1, f"lost, and nobody did that: {told}"
                assert self.soak.excuse(started), f"lost in its first call, and nobody did that: {told}"
            self.soak.done[f"state lost: {reason or risk or 'in its first call'}"] += 1
            session.low, session.high = 0, 0
        if found:
            session.settled, session.orphaned = started, False
        problem = answer.problem(kind, token) if token else "no end" if answer.status in ("failed", "refused") else ""
        if problem and answer.is_excusable(kind) and (risk or self.soak.excuse(started)):
            self.soak.done[f"(session calls that {answer.status} by a kill)"] += 1
        else:
            assert not problem, f"{problem}: {told}"

    async def _read_resource(self, session: Session, address: str, token: str, text: str) -> None:
        """Read what a result pointed at."""
        started, kept = time.monotonic(), re.search(KEPT, text)
        assert kept or address != KEPT, f"{session.name}: the output {token} is not said to be kept"
        address = f"{kept[1]}?offset=499900&length=1000" if kept else address.replace("SESSION", session.name)
        message = await self.client.request("resources/read", {"uri": address})
        if token not in message.get("result", {}).get("contents", [{}])[0].get("text", ""):
            excused = self.soak.risk(session) or self.client.ends or self.soak.excuse(started)
            assert excused, f"{address} does not hold {token}: {str(message)[:500]}"

    async def _clean_up(self, session: Session) -> None:
        """End a session, and sometimes begin another one under its name."""
        started, absent = time.monotonic(), session.low == 0 or self.soak.risk(session)
        session.low = 0  # if the server ends before it answers
        answer = await self.client.call("cleanup-session", session)
        if answer.status != "ok" and not ("There is no session" in answer.text and absent):
            paused = self.soak.is_hit(session, started, "session")  # and looked for by a server that had lost it
            assert paused or self.soak.excuse(started), f"{session.name} could not be ended: {answer}"
        self.soak.sessions.remove(session)
        if answer.status == "ok" and self.random.random() < 0.3:
            self.soak.sessions.append(Session(session.name, session.owner))


async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a request of code with many bytes, unless the connection is cut."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {SENT}\r\n\r\n".encode() + bytes(SENT))
        await writer.drain()
    writer.close()


class Soak:
    """What all of them share, and what is done to them."""

    def __init__(self, command: str, minutes: float, seed: int, image: str) -> None:
        self.command, self.seed, self.image = command, seed, image
        self.random = random.Random(f"{seed} events")
        self.id = secrets.token_hex(4)
        self.volume = f"python-docker-mcp-soak-{self.id}"
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        self.clients = [Client(index, self) for index in range(CLIENTS)]
        self.sessions: list[Session] = []
        self.events: list[Event] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.violations: list[str] = []
        self.sizes: list[dict[str, int]] = []  # of the server that is never killed, each minute
        self.started, self.over = time.monotonic(), False
        self.end = self.started + 60 * minutes
        self.port = 0  # of a web server on the host, which code fetches from
        (self.folder / "in").mkdir()
        (self.folder / "in/given.txt").write_text("x" * GIVEN, encoding="utf-8")
        self._trace = (self.folder / "trace.log").open("w", encoding="utf-8", buffering=1)
        print(f"seed {seed}, {minutes:g} minutes, folder {self.folder}, volume {self.volume}", flush=True)

    def environment(self, index: int) -> dict[str, str]:
        """Return a server's environment, with its configuration: every second one uses sandboxes again."""
        allowed = f"localhost:{self.port}"
        config = Config(
            docker=DockerConfig(command=self.command, image=self.image, timeout=90, network_allow=(allowed,)),
            session=SessionConfig(idle_timeout=IDLE_TIMEOUT, answer_within=2),
            package=PackageConfig(volume=self.volume),
            files=FilesConfig(str(self.folder / "out") if index >= CLIENTS // 2 else None, (str(self.folder / "in"),)),
            pool=PoolConfig(size=4, max_age=60, reuse=bool(index % 2)),
        )
        file = self.folder / f"config-{index}.yaml"
        if not file.exists():  # else a server may be reading it
            file.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON_DOCKER_MCP_")}
        return {**ours, "PYTHON_DOCKER_MCP_CONFIG": str(file), "LOGNAME": self.volume}

    def trace(self, words: str) -> None:
        """Write a line to the trace."""
        self._trace.write(f"{time.monotonic() - self.started:8.2f} {words[:3000]!r}\n")

    @contextlib.contextmanager
    def noting_violations(self, where: str) -> Iterator[None]:
        """Note what is not as it must be, and go on."""
        try:
            yield
        except (AssertionError, TimeoutError) as error:
            words = f"VIOLATION after {time.monotonic() - self.started:.1f} s: {where}: {error!r}"[:1500]
            self.violations.append(words)
            self.trace(words)
            print(words, flush=True)

    def excuse(self, since: float) -> bool:
        """Tell whether a kill can be to blame for what came of a call begun then; each for one call."""
        for event in self.events:
            if (
                event.ended > since - AFTERMATH
                and not event.excused
                and EVENTS[event.kind][1] in ("command line", "container")
            ):
                event.excused = True
                return True
        return False

    def is_hit(self, session: Session, since: float, what: str) -> str:
        """Tell what has been done since then to the session, or to its container, whichever that is."""
        name = sandbox_runner.session_container(session.name)
        hits = [one.kind for one in self.events if one.victim == name and one.ended > since]
        return next((kind for kind in hits if EVENTS[kind][1] == what), "")

    def risk(self, session: Session) -> str:
        """Say why a session may have lost its state, if it may."""
        idle = "not used for long" if time.monotonic() - session.used > IDLE_TIMEOUT - 10 else ""
        return self.is_hit(session, session.settled, "container") or idle

    async def engine(self, *arguments: str) -> str:
        """Return what a command of the engine prints: what it is about may be gone."""
        process = await asyncio.create_subprocess_exec(self.command, *arguments, stdout=PIPE, stderr=DEVNULL)
        return (await asyncio.wait_for(process.communicate(), PATIENCE))[0].decode()

    async def containers(self, *options: str) -> list[str]:
        """Return the names of our containers, in whatever state."""
        form = "--format={{.Names}}"
        return (await self.engine("ps", "--all", f"--filter=volume={self.volume}", *options, form)).split()

    def processes(self) -> dict[int, list[str]]:
        """Return the arguments of the servers and of what they have started, by process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                if f"LOGNAME={self.volume}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return found

    async def disturb(self) -> None:
        """Have one event after the other until the time is over: something is done to one of those that it can hit."""
        while time.monotonic() < self.end:
            await asyncio.sleep(min(self.random.expovariate(1 / BETWEEN_EVENTS), 4 * BETWEEN_EVENTS))
            kind = self.random.choices(list(EVENTS), [weight for weight, _, _ in EVENTS.values()])[0]
            _, what, how = EVENTS[kind]
            victims: list[Any] = await self.containers() if what == "container" else []
            if what == "server":  # the first one is spared
                victims = [client for client in self.clients[1:] if client.ready.is_set() and not client.ends]
            elif what == "command line":
                lines = [(pid, line) for pid, line in self.processes().items() if Path(line[0]).name == self.command]
                victims = [pid for pid, line in lines if line[1] in ("run", "exec")]
            elif what == "session":
                # Not where a new connection may be on its way: a pause amid an `exec` hangs Docker 20.10 (in runc).
                settled = [one for one in self.sessions if not one.orphaned and one.high > 1]
                victims = [sandbox_runner.session_container(one.name) for one in settled]
            if victims:
                victim = self.random.choice(victims)
                self.events.append(event := Event(kind, str(victim)))
                self.trace(f"EVENT {kind}: {victim}")
                with self.noting_violations(kind), contextlib.suppress(ProcessLookupError):
                    if what == "server":
                        await victim.stop(how)
                    elif what == "command line":
                        os.kill(victim, signal.SIGKILL)
                    else:
                        await self.engine(*how.split(), victim)
                    if how == "pause":
                        await asyncio.sleep(self.random.uniform(0.2, 4))
                        await self.engine("unpause", victim)
                event.ended = time.monotonic()
                self.trace(f"EVENT {kind}: {victim} done")

    async def report(self) -> None:
        """Tell once a minute how it goes."""
        while time.monotonic() < self.end:
            await asyncio.sleep(max(0.0, min(60, self.end - time.monotonic())))
            folder = Path(f"/proc/{self.clients[0].process.pid}")
            pages = int((folder / "statm").read_text().split()[1])
            self.sizes.append({"MB": pages * PAGE >> 20, "descriptors": len(list((folder / "fd").iterdir()))})
            print(
                f"{(time.monotonic() - self.started) / 60:5.1f} min: {self.done.total()} calls, {len(self.events)} "
                f"events, {len(self.sessions)} sessions, {len(await self.containers())} containers, "
                f"{len(self.processes())} processes; server 0: {self.sizes[-1]}; {len(self.violations)} violations",
                flush=True,
            )

    async def run(self) -> None:
        """Do all of it; violations are left in `violations`."""
        self.port = (await asyncio.start_server(send, "127.0.0.1", 0)).sockets[0].getsockname()[1]
        async with asyncio.TaskGroup() as servers:
            for client in self.clients:
                servers.create_task(client.run())
            async with asyncio.TaskGroup() as tasks:
                for number, client in enumerate(self.clients * WORKERS):
                    tasks.create_task(Worker(client, number).run())
                tasks.create_task(self.disturb())
                tasks.create_task(self.report())
            self.over = True
            for client, how in zip(self.clients, itertools.cycle(("eof", "SIGTERM")), strict=False):
                if client.process.returncode is None and not client.ends:
                    await client.stop(how)
        await self.look_around()

    async def look_around(self) -> None:
        """Look whether anything is left, and whether the first server stayed level."""
        deadline = time.monotonic() + IDLE_TIMEOUT + PATIENCE
        while (names := await self.containers()) and time.monotonic() < deadline:
            await asyncio.sleep(1)
        if names and not await self.containers("--filter=status=running"):
            print(f"{len(names)} never ran, as their command line was killed too soon; pruning", flush=True)
            config = sandbox_runner.load_config(environ=self.environment(0))
            async with sandbox_runner.open_runner(config) as runner:
                await runner.launcher.prune()
        left: dict[str, Any] = {"containers": await self.containers(), "processes": self.processes()}
        await self.engine("volume", "rm", self.volume)
        left["volumes"] = (await self.engine("volume", "ls", "--quiet", f"--filter=name={self.volume}")).split()
        for file in self.folder.glob("server-*.log"):
            left[str(file)] = re.findall("Traceback|no supervisor sends", file.read_text(errors="replace"))
        for what, there in left.items():
            with self.noting_violations("at the end"):
                assert not there, f"{what}: {there}"
        for unit, limit in GROWTH.items():
            sizes = [size[unit] for size in self.sizes]
            growth = statistics.median(sizes[-3:]) - statistics.median(sizes[: WARM_UP + 2][-3:])
            with self.noting_violations("the server that was never killed"):
                assert growth <= limit, f"it has grown by {growth:.0f} {unit}: {sizes}"

    def summary(self) -> None:
        """Print what was done, and what was wrong."""
        for counts in (collections.Counter(event.kind for event in self.events), self.done):
            print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count))
        print(f"{len(self.violations)} violations (seed {self.seed})", *self.violations, sep="\n")


def main() -> None:
    """Run a soak."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.soak", description="A soak on a real engine.")
    parser.add_argument("engine", choices=("docker", "podman"))
    parser.add_argument("minutes", nargs="?", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--image", default=DockerConfig.image, help="the base image; `host` makes one")
    options = parser.parse_args()
    soak = Soak(options.engine, options.minutes, options.seed, options.image)
    asyncio.run(soak.run())
    soak.summary()
    if soak.violations:
        sys.exit(1)
    shutil.rmtree(soak.folder)


if __name__ == "__main__":
    main()
