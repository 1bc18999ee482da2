"""Run Python in locked-down containers, through the `docker` command line (or Podman's).

The path from the caller to the code and back:

    caller ─ Runner ─ Sandbox ══ `docker run -i` ══ Supervisor (process 1) ─ Worker (forked, runs the code)
                      one pipe each way, for the container's whole life

A `Runner` (see `open_runner`) knows the engine, the image and the open sessions. A `Sandbox` is one container: an
attached `docker run -i --rm …` process whose standard input and output carry frames (see `Channel`) to and from a small
program inside, the *guest*. Once a sandbox is running, a call costs no engine command, only one request and the frames
that answer it.

The guest is the middle part of this file, shipped as source over the pipe. It is a supervisor, which is process 1,
holds the channel, and runs neither the user's code nor packages installed for it; and a worker, forked from the
supervisor, which runs both. So whatever the user's code does to its own process, the supervisor survives to report it:
the status of a `Result`, and whether a session's variables were kept, follow from what the worker did, not from what
it printed. After each call in a session the worker leaves a sleeping copy of itself, with which the session goes on
should the next call cost it the worker (see `Copy`).

A session outlives its host: on a farewell the supervisor detaches and waits for the next host, which plugs itself in
with one `docker exec` (see `plug`). Running code outlives the host too, and its result waits. A session that no host
returns to ends by itself, from inside, after `session.idle_timeout`. When a host is killed, a sandbox that was kept
ready and never used ends a minute later, unless the next host adopts it; any other sandbox ends at once.

    async with open_runner() as runner:
        result = await runner.execute("6 * 7")
        print(result.status, result.value)

As a program, it runs a script, a piece of code, or its standard input: `python sandbox_runner.py --help`.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import atexit
import base64
import builtins
import codecs
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import datetime
import difflib
import enum
import errno
import functools
import gc
import glob
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import linecache
import logging
import math
import os
import platform
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import urllib.request
import warnings
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, NotRequired, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import h11
import idna
import pydantic
import pydantic_core
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSStream
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__version__ = "1.0.0"
__all__ = [
    "open_runner",
    "Runner",
    "Result",
    "ExceptionInfo",
    "Text",
    "Rich",
    "Omitted",
    "Config",
    "DockerConfig",
    "SessionConfig",
    "PackageConfig",
    "FilesConfig",
    "HttpConfig",
    "PoolConfig",
    "SecretConfig",
    "FileInfo",
    "Installation",
    "load_config",
    "SandboxError",
    "ConfigError",
    "EngineError",
    "ImageError",
    "SessionError",
    "RequestError",
    "main",
]

log = logging.getLogger("python_docker_mcp")
T = TypeVar("T")


# ── results ──

# Variables are restored to what they were before a call that crashed, if there was a copy of them; else they are lost.
Variables = Literal["preserved", "restored", "lost"]
Status = Literal["ok", "error", "timeout", "cancelled", "out_of_memory", "died", "running"]


@dataclass(frozen=True)
class Text:
    """Output written by the code, or by a process it started."""

    stream: Literal["stdout", "stderr"]
    text: str


@dataclass(frozen=True)
class Rich:
    """A value shown in more than one form: MIME type to text, or to base64 for binary types."""

    forms: Mapping[str, str]
    is_value: bool = False  # whether this is the value of the last expression


@dataclass(frozen=True)
class Omitted:
    """Gap in the output, between its head and its tail, where it exceeded the limit."""

    bytes: int


@dataclass(frozen=True)
class ExceptionInfo:
    """Exception raised by the code."""

    type: str
    message: str
    line: int | None  # in this call's code
    traceback: str  # only the frames of the user's own code
    missing: str | None = None  # the module that was not found, or Python's own name that the code has overwritten


@dataclass(frozen=True)
class FileInfo:
    """A file in the working directory."""

    path: str  # relative to the working directory, with slashes
    size: int  # bytes
    saved: str | None = None  # path on the host that it was copied to


@dataclass(frozen=True)
class Result:
    """Outcome of one call. A failure of the code is a status, not an exception."""

    status: Status
    output: tuple[Text | Rich | Omitted, ...] = ()  # in order of appearance
    value: str | None = None  # repr of the last expression; None if the code does not end in one, or its value is None
    value_omitted: int = 0  # characters left out of the value
    exception: ExceptionInfo | None = None
    exit_code: int | None = None  # of SystemExit or of the ended worker; negative signal number if one killed it
    lost: bool = False  # whether the process that ran the code is gone
    message: str | None = None  # one sentence on what happened, unless the code simply ended
    session: str | None = None
    is_new: bool = False  # whether the session began with this call
    state: Variables | None = None  # fate of the session's variables; None while code runs
    lost_before: str | None = None  # reason the variables were lost between the previous call and this one, if so
    behind: int = 0  # if they were restored: how many calls right before this one are missing in them, too
    earlier: str = ""  # output since the last call from work that earlier calls left running
    unread: Result | None = None  # end of the previous call, if no caller waited for it
    variables: Mapping[str, Any] | None = None  # if `state` was given: the top-level variables that JSON can hold
    variables_left_out: Mapping[str, str] = field(default_factory=dict)  # the other variables: name to reason
    files: tuple[FileInfo, ...] = ()  # files made or changed in the working directory by the call, at most 1000
    files_left_out: Mapping[str, str] = field(default_factory=dict)  # those not among them, or not saved: to reason
    contents: Mapping[str, bytes] = field(default_factory=dict)  # of small files, if the sandbox ends with the call
    refused: tuple[str, ...] = ()  # sentences on connections that docker.network_allow does not allow
    stale: tuple[str, ...] = ()  # modules already imported when another version of them was installed
    wall: float = 0.0  # seconds
    cpu: float = 0.0  # seconds
    memory: int | None = None  # peak resident bytes of the code's process
    oom_kills: int = 0  # processes killed for lack of memory, including the code's children

    @property
    def stdout(self) -> str:
        """Text written to standard output."""
        return "".join(item.text for item in self.output if isinstance(item, Text) and item.stream == "stdout")

    @property
    def stderr(self) -> str:
        """Text written to standard error."""
        return "".join(item.text for item in self.output if isinstance(item, Text) and item.stream == "stderr")

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON, with `stdout` and `stderr`."""
        contents = {path: base64.b64encode(data).decode() for path, data in self.contents.items()}
        return {**dataclasses.asdict(self), "contents": contents, "stdout": self.stdout, "stderr": self.stderr}


@dataclass(frozen=True)
class Installation:
    """Outcome of installing a package."""

    name: str  # of the package, normalized
    ok: bool
    message: str  # in a sentence
    installed: tuple[tuple[str, str], ...] = ()  # name and version of each new package
    output: str = ""  # the part of the installer's output that matters
    needs_build: bool = False  # whether something has no wheel for this Python, and may not be built from source
    stale: tuple[str, ...] = ()  # modules that the session had imported before, in another version
    seconds: float = 0.0


# ── errors ──


class SandboxError(Exception):
    """Base of the errors a caller may catch. Its message, one or two sentences, gives the fact and the next step."""


class ConfigError(SandboxError):
    """A setting is unknown, or its value is invalid."""


class EngineError(SandboxError):
    """The container engine is missing, not running, not permitted, too old or not answering, or it refused."""


class HangError(EngineError):
    """The container engine does not answer at all."""


class HelperError(EngineError):
    """An installer's container could not be started, or ended before it reported an outcome."""


class ImageError(SandboxError):
    """The image is missing, and could not be pulled or made."""


class SessionError(SandboxError):
    """The session can't be used: another program is using it, or no session has that name."""


class VersionError(SessionError):
    """The session's container was made by another version of this program."""


class RequestError(SandboxError):
    """An argument of the call is invalid."""


# ── runner ──

CLOSING_TIME = 1.0  # seconds to wait for a session's previous call, or host, to finish before refusing a new call
ENDED_SESSIONS = 100  # whose end is kept, to be told to a next call
FIRST_CALL_ATTEMPTS = 3  # sandboxes tried for one call, while each turns out gone or unfit before the call begins
HEAD_START = 0.1  # seconds to delay engine commands in the background, so that they do not slow the call


@asynccontextmanager
async def open_runner(
    config: Config | None = None,
    *,
    warm: bool = False,
    on_status: OnStatus | None = None,
    file: str | os.PathLike[str] | None = None,
    notebooks: bool = False,
) -> AsyncIterator[Runner]:
    """Provide a Runner for an `async with`.

    It starts nothing until the first call, unless it is `warm`: then it prepares the image and a pool of sandboxes in
    the background, while calls can already be made. `on_status` is called with what takes long in the background, or
    in a call without an `on_status` of its own, and with "" when that is over. `file` is the configuration's, which no
    code may see; by default, where `load_config` would look for it. With `notebooks`, what sessions do is written into
    notebooks (see `files.notebook`).

    At the end sessions are left detached: their containers wait `session.idle_timeout` seconds for the next host.
    """
    async with open_tasks() as tasks:
        runner = Runner(config or Config(), tasks, on_status, config_file(file))
        if notebooks and runner.config.files.notebook is not False and sys.platform != "win32":
            runner.notebooks = Notebooks()
        if warm:
            tasks.start_soon(runner._warm_up)
            tasks.start_soon(runner._tidy)
        try:
            yield runner
        finally:
            with anyio.CancelScope(shield=True):
                await runner.leave()


class Runner:
    """Runs code in sandboxes, with or without a session. Made by `open_runner`; safe for many tasks at once.

    Attributes that may be looked at: `pool`, `sessions` (by name), `launcher`.
    """

    def __init__(self, config: Config, tasks: anyio.abc.TaskGroup, on_status: OnStatus | None, file: Path) -> None:
        self.config = config
        self.launcher = Launcher(config, tasks, on_status, file)
        self.pool = Pool(self.launcher.start, config.pool, tasks, config.session.idle_timeout)
        self.sessions = Sessions(self.launcher, self.pool, config)
        self.notebooks: Notebooks | None = None
        self._tasks = tasks
        self._transient: set[Sandbox] = set()

    def for_user(self, user: str, most: int) -> Runner:
        """Return a runner for one of several users, on the same engine and pool.

        Its sessions, of which there may be `most`, have names of their own: nobody else's can be named or found. In the
        folders of `files`, the user's name stands for {user}.
        """
        one = copy.copy(self)
        one.config = self.config.for_user(user)
        one.sessions = Sessions(self.launcher, self.pool, one.config, user, most, self.sessions.everybodys)
        return one

    async def execute(
        self,
        code: str,
        *,
        session: str | None = None,
        state: Mapping[str, Any] | None = None,
        state_limit: int | None = None,
        timeout: float | None = None,
        on_output: OnOutput | None = None,
        on_status: OnStatus | None = None,
        keep_output: bool = True,
        interrupt: anyio.Event | None = None,
        filename: str | None = None,
        arguments: Sequence[str] = (),
        answer_within: float | None = None,
        files: Sequence[str | os.PathLike[str] | InputFile] = (),
        output: str | os.PathLike[str] | None = None,
    ) -> Result:
        """Run code: in a fresh sandbox of its own, or in the session's.

        Args:
            code: Python source. The value of an expression at its end is returned too. If there is no code, and a call
                is going on in the session, the result is that call's.
            session: name under which variables, imports and files are kept from call to call; made if there is none.
                Calls on one session queue. Cancelling the awaiting task cancels the code.
            state: variables to start with. If given, even if empty, the result has the variables at the end.
            state_limit: bytes of JSON that those may come to, at most and by default 4 MB; larger ones are left out.
            timeout: seconds the code may take; by default `docker.timeout`.
            on_output: awaited with each piece of output as it comes.
            on_status: called with what the call waits for before its code runs, and with "" when that is over.
            keep_output: whether the result has the output, up to `docker.output_limit`; if not, all of it is streamed.
            interrupt: when set, the code is interrupted, and the result has the status `cancelled`.
            filename: name of the code in tracebacks; it also becomes `__file__`, in the working directory.
            arguments: for `sys.argv[1:]`.
            answer_within: seconds after which a call in a session returns with the status `running` and the output so
                far. The code goes on; a call without code waits for the rest, and interrupts it if `interrupt` is set.
            files: files on the host to copy into the working directory ahead of the code, under their base names.
            output: folder on the host for the files that the code writes; by default, folders in `files.output`.

        Raises:
            RequestError: an argument can't be accepted.
            ConfigError: a folder that the configuration names can't be used.
            EngineError, ImageError: there is nothing to run the code in, or the engine has stopped answering; code that
                runs in a session then goes on, and the next call tells its end.
            SessionError: another program is using the session, or a call that was not waited for is going on in it.
        """
        self.pool.touch()
        limit = size_in_bytes(self.config.docker.output_limit) if keep_output else None
        timeout = self.config.docker.timeout if timeout is None else timeout
        await self.launcher.require_paths(self.config)
        if (files or output) and sys.platform == "win32":
            raise RequestError("On Windows no files can be copied: make a folder visible by docker.mounts instead.")
        given = await anyio.to_thread.run_sync(input_files, files, self.config) if files else ()
        user = self.sessions.user
        request = Request(
            code, session, state, timeout, filename, tuple(arguments), limit, state_limit, given, output, user
        )
        call = Call(request, streams=on_output is not None)
        call.on_status = on_status or self.launcher.report
        if session is None:
            return await self._execute_transient(call, on_output, interrupt)
        self.sessions.forget_ended()
        deadline = math.inf if answer_within is None else anyio.current_time() + answer_within
        result = await self.sessions[session].execute(call, on_output, interrupt, deadline)
        self._keep(session, code, result)
        return result

    def _keep(self, session: str, code: str, result: Result) -> None:
        """Have what was done in a session written into its notebook, if there are any."""
        if self.notebooks:
            self.notebooks.take(NotebookPlace.find(self.config.files, self.sessions.user, session), code, result)
            self._tasks.start_soon(self.notebooks.write_soon)

    async def _execute_transient(self, call: Call, on_output: OnOutput | None, interrupt: anyio.Event | None) -> Result:
        reuse = False
        while True:
            sandbox = await self.pool.lease(bare=call.needs_bare, report=call.report)
            self._transient.add(sandbox)
            try:
                await sandbox.begin(call)
                async with interruptible(lambda: sandbox, interrupt):  # noqa: B023  # it is used up with the block
                    await sandbox.finish(call, on_output)
                if not call.ended.is_set():
                    if call.attempts < FIRST_CALL_ATTEMPTS:
                        continue
                    call.give_up()
                result = await bring_out(sandbox, call, self.config)
                reuse = self.config.pool.reuse and result.status in ("ok", "error")
                return result
            finally:
                if reuse:
                    self._transient.discard(sandbox)
                    self.pool.give_back(sandbox)
                else:
                    self._tasks.start_soon(self._end_soon, sandbox)

    async def _end_soon(self, sandbox: Sandbox) -> None:
        await anyio.sleep(HEAD_START)
        await sandbox.end()
        self._transient.discard(sandbox)

    async def close_session(self, name: str) -> bool:
        """End a session and everything kept for it; False if there is none of that name.

        Raises:
            SessionError: another program is using it.
            EngineError: the engine does not answer, so that it may not have ended.
        """
        Request("", name)
        return await self.sessions[name].close()

    async def list_sessions(self) -> list[SandboxInfo]:
        """Return the user's sessions on this engine, those of other programs as well, the last used first.

        Raises EngineError if there is no engine to ask.
        """
        found = []
        for info in await self.launcher.list_sandboxes(details=True):
            user, name = split_key(info.session or "")
            if name and user == self.sessions.user:
                found.append(dataclasses.replace(info, session=name))
        return sorted(found, key=lambda info: info.idle)

    async def read_file(self, session: str, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return a file in a session's working directory, or a part of it; also while code runs there.

        Raises:
            RequestError: there is no such file, or the path leaves the directory.
            SessionError: there is no such session.
        """
        return await (await self._sandbox_of(session)).files.read(path, offset, length)

    async def write_file(self, session: str, file: InputFile) -> None:
        """Put a file of the host's into a session's working directory; also while code runs there.

        Raises:
            RequestError: there is no room for it, or it has changed.
            SessionError: there is no such session.
        """
        await (await self._sandbox_of(session)).files.take_in([file])

    async def _sandbox_of(self, session: str) -> Sandbox:
        """Return a session's sandbox. Raises SessionError if there is none."""
        Request("", session)
        entry = self.sessions[session]
        if not entry.is_attached and not entry.placing:
            async with entry.lock:
                await entry.attach()
        if entry.sandbox is None or not entry.is_attached:
            raise SessionError(f"There is no session {session!r}: it has ended, with its files, or never existed.")
        return entry.sandbox

    async def install(
        self, requirement: str, *, session: str | None = None, on_status: OnStatus | None = None
    ) -> Installation:
        """Install a package: for one session (made if there is none), or for every later execution.

        It can be imported at once, in running sandboxes too, whose variables are kept. The executed code gets no
        network by this: a container of its own does the work.

        Args:
            requirement: a name, with extras and version specifiers if need be (PEP 508).
            session: the session that needs it; None for all.
            on_status: called with what is going on, and with "" when that is over.

        Raises:
            RequestError: it is not such a requirement, or the session's id can't be one.
            EngineError, ImageError, SessionError: as for `execute`.
        """
        started = time.monotonic()
        name, text = parse_requirement(requirement)
        Request("", session)
        report = on_status or self.launcher.report
        self.pool.touch()
        stale: tuple[str, ...] = ()
        if session is None:
            outcome = await self.launcher.install(name, text, None, report)
            if outcome.ok:
                self.pool.renew()
            return describe_installation(name, outcome, session, stale, time.monotonic() - started)
        entry = self.sessions[session]
        async with entry.lock:
            sandbox = await entry.open(report)
            outcome = await self.launcher.install(name, text, sandbox, report)
            if outcome.ok and outcome.folder:
                stale = await entry.use(outcome.folder, report)
        if outcome.ok:
            self._keep(session, f"%pip install {shlex.quote(text)}", Result("ok"))
        return describe_installation(name, outcome, session, stale, time.monotonic() - started)

    # ── all sandboxes ──

    @property
    def running(self) -> int:
        """The number of calls under way."""
        calls = [sandbox.call for sandbox in self.held()]
        return sum(call is not None and not call.ended.is_set() for call in calls)

    def living(self) -> set[str]:
        """Return the names of the sessions that have a sandbox here."""
        return {name for name, session in self.sessions.items() if session.is_there}

    def held(self) -> list[Sandbox]:
        """Return the sandboxes that this runner is connected to, or was."""
        sessions = [session.sandbox for session in self.sessions.of_everybody() if session.sandbox]
        return [*self._transient, *self.pool.ready, *self.pool.returning, *sessions]

    async def _warm_up(self) -> None:
        """Begin to keep sandboxes ready, first those that a killed host left, if they are as ours would be."""
        self._tasks.start_soon(self.launcher.network.credentials.run_commands)
        with contextlib.suppress(SandboxError):  # the pool will meet the same error, and log it
            engine, image = await self.launcher.prepare()
            settings = guest_settings(engine, image, self.config, self.config.pool.preload)["digest"]
            names = await engine.sandboxes(f"--filter=label={LABEL}.settings={settings}")
            unnamed = [name for name in names if not name.startswith(SESSION_CONTAINER)]
            for sandbox in await self.launcher.ask(engine, unnamed, settings=settings):
                if isinstance(sandbox, Sandbox):
                    await self.pool.adopt(sandbox)
        self.pool.keep_warm()

    async def _tidy(self) -> None:
        with contextlib.suppress(SandboxError):  # without an engine there is nothing to tidy up
            for name in await self.launcher.prune():
                log.info("removed the container %s, which never ran", name)

    async def leave(self) -> None:
        """Say farewell to everything: transient sandboxes end, sessions stay for the next host."""
        self.pool.stop()
        if self.notebooks:
            await self.notebooks.write()
        async with anyio.create_task_group() as tasks:
            for sandbox in self.held():
                tasks.start_soon(sandbox.leave)


def describe_installation(
    name: str, outcome: Outcome, session: str | None, stale: tuple[str, ...], seconds: float
) -> Installation:
    """Return what came of an installation."""
    if not outcome.ok:
        needs_build = "--no-build" in outcome.output or "--only-binary" in outcome.output
        output = shorten_installer_output(outcome.output)
        return Installation(name, False, f"{name} could not be installed", (), output, needs_build, (), seconds)
    where = f"in the session {session}" if session else "in every later execution"
    if outcome.installed:
        message = f"Installed {', '.join(' '.join(item) for item in outcome.installed)}"
        message += (
            f" for the session {session}, but not in place of what it uses" if stale else f": can be imported {where}"
        )
    elif outcome.present:
        message = f"{name} {outcome.present} is part of the image already: nothing had to be installed"
    else:
        message = f"{name} was installed already: can be imported {where}"
    return Installation(name, True, message, outcome.installed, stale=stale, seconds=seconds)


@asynccontextmanager
async def interruptible(sandbox: Callable[[], Sandbox | None], interrupt: anyio.Event | None) -> AsyncIterator[None]:
    """Interrupt the code in the sandbox when `interrupt` is set within the block."""

    async def interrupt_when_set(event: anyio.Event) -> None:
        await event.wait()
        while True:  # repeatedly, as the call may not have begun; the supervisor heeds only the first after that
            if target := sandbox():
                await target.interrupt()
            await anyio.sleep(INTERRUPT_GRACE / 4)

    if interrupt is None:
        yield
        return
    async with open_tasks() as tasks:
        tasks.start_soon(interrupt_when_set, interrupt)
        yield


@asynccontextmanager
async def open_tasks() -> AsyncIterator[anyio.abc.TaskGroup]:
    """Provide a task group that is cancelled at the end of the block, whose own error is raised as it is."""
    error: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        try:
            yield tasks
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as raised:
            error = raised
        tasks.cancel_scope.cancel()
    if error:
        raise error


# ── sessions ──


class Sessions(dict[str, "Session"]):
    """One user's sessions by name. One that is asked for is made."""

    def __init__(
        self,
        launcher: Launcher,
        pool: Pool,
        config: Config,
        user: str = "",
        most: int | None = None,
        everybodys: list[Sessions] | None = None,
    ) -> None:
        super().__init__()
        self.launcher = launcher
        self.pool = pool
        self.config = config
        self.user = user
        self.most = most  # that this user may have, or None for no such limit
        self.everybodys = [] if everybodys is None else everybodys
        self.everybodys.append(self)

    def __missing__(self, name: str) -> Session:
        """Make a session, which has no sandbox yet."""
        session = self[name] = Session(name, self)
        return session

    def forget_ended(self) -> None:
        """Keep a few of the sessions that have ended, whose next call is told why; forget those before them."""
        ended = [name for name, one in self.items() if not (one.is_there or one.is_busy or one.placing)]
        for name in ended[:-ENDED_SESSIONS]:
            del self[name]

    def of_everybody(self) -> Iterator[Session]:
        """Yield the sessions of all users."""
        for sessions in self.everybodys:
            yield from sessions.values()

    async def hand_over(self) -> None:
        """Let go of everybody's sessions in which code runs, and have its callers answered that it goes on."""
        async with anyio.create_task_group() as tasks:
            for session in self.of_everybody():
                tasks.start_soon(session.hand_over)

    async def make_room(self) -> None:
        """See that there may be one more session. Raises SessionError."""
        limits = self.config.session
        there = {name: one for name, one in self.items() if one.is_there}
        count = sum(one.is_there for one in self.of_everybody())
        setting, most = "session.max", limits.max
        if self.most is not None and len(there) >= self.most:
            setting, most = "http.sessions_per_user", self.most
        elif count < limits.max:
            return
        idle = [name for name, one in there.items() if not one.is_busy]
        if not (limits.evict and idle):
            names = textwrap.shorten(", ".join(sorted(there)), 500)
            if len(there) < most:
                own = f"end one of yours ({names}), or " if there else ""
                raise SessionError(f"The server has all sessions that it may ({setting}): {own}try again later.")
            raise SessionError(
                f"There are {len(there)} sessions already, which is the most allowed ({setting}): {names}. End one of "
                "them first."
            )
        oldest = min(idle, key=lambda name: there[name].used)
        log.info("ending the session %s, the longest idle one, to make room for another", there[oldest].key)
        await there[oldest].close()
        self[oldest].lost = f"it was ended to make room for another ({setting}: {most})"


def session_key(user: str, name: str) -> str:
    """Return the name by which a session is known on the engine: unlike one of another user's, or of nobody's."""
    return f"{user}~{name}" if user else name


def split_key(key: str) -> tuple[str, str]:
    """Return the user, or "" if there is none, and the name that make a session's key."""
    user, _, name = key.rpartition("~")
    return user, name


class Session:
    """A named sandbox that keeps its variables, and the queue of its callers.

    no sandbox ──create──> attached ──its host leaves──> detached ──attach──> attached
         ▲                    │ its container ends, or its connection is cut
         └──── not found ─────┘  (then `attach` looks for it by its name)

    Its call's stages are drawn in `Call`. A caller waits in `_pursue`; where the sandbox has to be found or made
    first, one task, `_place`, does that, whoever waits. Always: if the call is placed or has begun, `sandbox` has it.
    """

    def __init__(self, name: str, others: Sessions) -> None:
        self.name = name  # as its user calls it
        self.key = session_key(others.user, name)
        self.lock = anyio.Lock(fast_acquire=True)
        self.sandbox: Sandbox | None = None
        self.call: Call | None = None  # the last one, until its result has been told
        self.lost: str | None = None  # why the variables are gone, until a call has told it
        self.used = 0.0  # when its last call was made
        self._handed_over: Sandbox | None = None  # which was let go while code ran in it, for the next host
        self.placing: anyio.CancelScope | None = None  # of the task that finds or makes a sandbox for the call
        self._placed = anyio.Event()  # set when that task has ended
        self._is_coming = False  # whether a sandbox is being made for it, for which there is room
        self._others = others
        self._pool, self._launcher = others.pool, others.launcher

    @property
    def is_attached(self) -> bool:
        """Whether it has a sandbox that is connected."""
        return self.sandbox is not None and not self.sandbox.gone.is_set()

    @property
    def is_there(self) -> bool:
        """Whether it has a sandbox, or is about to."""
        return self._is_coming or self.is_attached

    @property
    def is_busy(self) -> bool:
        """Whether a caller is at it, or its code goes on without one."""
        return self.lock.locked() or (self.call is not None and not self.call.ended.is_set())

    # ── its calls ──

    async def execute(
        self, call: Call, on_output: OnOutput | None, interrupt: anyio.Event | None, deadline: float
    ) -> Result:
        """Run a call when those before it have ended; return its result or, at the deadline, its output so far."""
        earlier = None
        async with self.lock:
            self.used = time.monotonic()
            if not self.placing:
                await self.attach()
            if self.call:
                if not call.request.code.strip():
                    return await self._answer(on_output, call.on_status, interrupt, deadline)
                await self._require_end(can_wait=deadline == math.inf)
                if self.call:
                    earlier = await self._tell_late(self.call)
            await anyio.lowlevel.checkpoint_if_cancelled()  # from here on, the call is sent even if no caller waits
            self.call = call
            try:
                result = await self._answer(on_output, call.on_status, interrupt, deadline)
            except anyio.get_cancelled_exc_class():
                call.cancelled = True
                if self.placing:
                    self.placing.cancel()
                elif self.sandbox and call.is_placed:
                    await self.sandbox.cancel()
                raise
        if not call.request.code.strip() and result.status in ("ok", "cancelled"):
            nothing = "nothing was running" if interrupt else "there was no code to run, and none running to wait for"
            result = dataclasses.replace(result, status="ok", exception=None, message=nothing)
        return dataclasses.replace(result, unread=earlier) if earlier else result

    async def _answer(
        self,
        on_output: OnOutput | None,
        on_status: OnStatus | None,
        interrupt: anyio.Event | None,
        deadline: float,
    ) -> Result:
        """Return the result of the last call or, if it has none by the deadline, its output so far."""
        call = self.call
        assert call is not None
        call.on_status = on_status
        try:
            with anyio.CancelScope(deadline=deadline):
                async with interruptible(lambda: self.sandbox, interrupt):
                    await self._pursue(call, on_output)
            return await self._tell(call)
        finally:
            call.on_status = None

    async def _pursue(self, call: Call, on_output: OnOutput | None = None) -> None:
        """Wait until the call has ended, placing it as often as its connection ends or a sandbox does."""
        while not call.ended.is_set():
            if self.placing:
                await self._placed.wait()
            elif self.sandbox and call.is_placed:
                await self.sandbox.finish(call, on_output)
                if self.sandbox and self.sandbox is self._handed_over:
                    break
            elif call.cancelled and call.stage is Stage.NOWHERE:
                call.fail(SessionError(f"The call in the session {self.name!r} was cancelled before it began."))
            elif self.sandbox and self._takes_at_once(call):
                await self.sandbox.begin(call)
            else:
                self.placing, self._placed = anyio.CancelScope(), anyio.Event()
                self._launcher.tasks.start_soon(self._place, call, self.placing)
        if on_output:
            await call.output.pass_on(on_output)  # it may have ended while its sandbox was found

    def _takes_at_once(self, call: Call) -> bool:
        """Whether the sandbox can be sent the call as it is; to copy files takes its time, which no caller may cut."""
        return self.is_attached and call.stage is Stage.NOWHERE and not call.needs_bare and not call.request.files

    async def _place(self, call: Call, scope: anyio.CancelScope) -> None:
        """Find or make a sandbox for a call, and place it there; end the call if there is no way to."""
        failure: Exception | None = None
        with scope:
            try:
                await self._find_place(call)
            except Exception as error:  # for whoever waits for the call, not for this task's parent
                failure = error
        if scope.cancelled_caught:
            failure = SessionError(f"The session {self.name!r} was ended before the call could begin.")
        if failure:
            call.fail(failure)
        self.placing = None
        self._placed.set()

    async def _find_place(self, call: Call) -> None:
        if call.needs_bare and self.sandbox:
            self._launcher.tasks.start_soon(self.sandbox.end)
            self.sandbox = None
        else:
            await self.attach()
        if call.is_placed or call.ended.is_set():
            return  # it went on over the new connection
        if call.stage is Stage.CUT:
            message = f"the container ended during the call ({call.why_cut})"
            state: Variables = "lost"
            if self.sandbox and self.sandbox.greeting:
                message = "the connection to the container was cut, and the end of the call with it"
                state = self.sandbox.greeting["state"]
            else:
                self.lost = None  # as this call tells it
            call.end(call.died(message, state))
            return
        if self.sandbox is None and call.is_new:
            self.lost = None  # nothing had run in it
        if call.attempts >= FIRST_CALL_ATTEMPTS:
            call.give_up()
            return
        if self.sandbox is None:
            await self.create(call.report, call.needs_bare)
            call.is_new = self.lost is None
        if self.sandbox:
            await self.sandbox.begin(call)

    async def _require_end(self, *, can_wait: bool = False) -> None:
        """Wait for the end of the last call, as it may be just ending; forget one that was cancelled.

        Raises:
            SessionError: it goes on.
        """
        call = self.call
        assert call is not None
        patience = INTERRUPT_GRACE + HOST_PATIENCE if call.cancelled else None if can_wait else CLOSING_TIME
        with anyio.move_on_after(patience):
            await self._pursue(call)
        if not call.ended.is_set():
            raise SessionError(
                f"In the session {self.name!r} the code of an earlier call is still running: wait for it by a "
                "call with empty code, which can also interrupt it, or use another session."
            )
        if call.cancelled:
            with contextlib.suppress(SandboxError):  # it failed: nobody is there to be told
                result = await bring_out(self.sandbox, call, self._others.config)
                if result.state == "lost":
                    self.lost = "a call was cancelled, and its code did not stop in time"
            self.call = None

    async def _tell_late(self, call: Call) -> Result:
        """Return the end of an earlier call, to be told with the next one; also that it could not be made."""
        try:
            return await self._tell(call)
        except SandboxError as error:
            return Result("died", message=f"it could not be run: {str(error).rstrip('.')}", session=self.name)

    async def _tell(self, call: Call) -> Result:
        """Return what there is to tell of a call and, with its end, of what became of the session before it."""
        if not call.ended.is_set():
            return call.tell()
        if call.failed:
            self.call = None
        result = await bring_out(self.sandbox, call, self._others.config)
        self.call = None  # not before: if the caller goes meanwhile, the next one is told
        if self.sandbox and self.sandbox.call is call:
            self.sandbox.call = None  # else its output would be kept as long as the session
        lost, self.lost = result.lost_before or self.lost, None
        return dataclasses.replace(result, lost_before=lost, is_new=call.is_new)

    # ── its sandbox ──

    async def hand_over(self) -> None:
        """Let go of the sandbox if code runs in it. The end is told to whoever asks next, of this host or another."""
        if self.sandbox and self.call and self.call.stage is Stage.BEGUN:
            self._handed_over = self.sandbox
            await self.sandbox.leave()

    async def open(self, report: OnStatus) -> Sandbox:
        """Return the sandbox, which is made if there is none, when no call runs in it. Raises as `execute`."""
        self.used = time.monotonic()
        await self.attach()
        if self.call:
            await self._require_end()
        if not self.is_attached:
            await self.create(report)
        assert self.sandbox is not None
        return self.sandbox

    async def attach(self) -> None:
        """See that the sandbox is connected, if there is one: the one that it had, or one found by its name.

        If that already runs a call, adopt it.

        Raises:
            EngineError: it can't be found out whether there is one.
            SessionError: another program has it, or its container does not answer.
        """
        if self.is_attached:
            return
        had = self.sandbox
        self.sandbox = await self._find()  # if it can't be found out, the next call looks again
        if self.sandbox is None and had:
            idle = f"it was not used for {self._launcher.config.session.idle_timeout:g} seconds"
            self.lost = idle if had.expired.is_set() else "its container ended"
        elif self.sandbox and self.sandbox.call:
            if self.call is not self.sandbox.call:
                self.call = self.sandbox.call
            elif self.call.cancelled:
                await self.sandbox.interrupt()

    async def create(self, report: OnStatus, bare: bool = False) -> None:
        """Make a sandbox for the session or, if another program has just made one, attach to that."""
        await self._others.make_room()
        self._is_coming = True
        try:
            sandbox = await self._pool.lease(bare=bare, report=report)
        finally:
            self._is_coming = False
        self._pool.let_go(sandbox)
        self.sandbox = sandbox
        try:
            await self._claim(sandbox)
        except BaseException:
            if self.sandbox is sandbox:
                self.sandbox = None  # nothing has run in it, and no other program would find it
                with anyio.CancelScope(shield=True):
                    await sandbox.end()
            raise

    async def _claim(self, sandbox: Sandbox) -> None:
        """Give the container the name by which the session is found. An engine allows each name only once."""
        name = session_container(self.key)
        deadline = time.monotonic() + ATTACH_TIMEOUT
        while not sandbox.gone.is_set():
            try:
                await sandbox.rename(name)
                return
            except EngineError as error:
                if time.monotonic() > deadline:  # Podman 4 keeps the name of what was removed while it was renamed
                    raise type(error)(
                        f"The session {self.name!r} can't be started: {error}: try again, or use another session."
                    ) from None
            # Another program was quicker; or the session's last container is only just going, or has gone since.
            is_there = await sandbox.engine.inspect("container", name, "{{.State.Status}}")
            if is_there and (other := await self._find()):
                self.sandbox = other
                await sandbox.end()
                return
            await anyio.sleep(0.1)

    async def _find(self) -> Sandbox | None:
        """Find the session's container by its name, and plug into it; None if there is none.

        Raises:
            EngineError: it can't be found out whether there is one.
            SessionError: another program has it, or it does not answer.
        """
        engine = await self._launcher.find_engine()
        container = session_container(self.key)
        begun = time.monotonic()
        while version := (await engine.sandboxes(f"--filter=name={container}")).get(container):
            if version != str(PROTOCOL):
                raise VersionError(
                    f"The session {self.name!r} was begun by another version of this server, which this one can't "
                    "speak with: end it with cleanup-session, use another session, or go on with that version."
                )
            # Shielded: a sandbox that is plugged into tells at once what it has kept for its host, and must be held.
            with anyio.CancelScope(shield=True):
                answer = await Sandbox.plug_in(self._launcher, engine, container, session=self.key, call=self.call)
            if isinstance(answer, Sandbox):
                return answer
            waited = time.monotonic() - begun
            # A connection that has ended, ours or that of a host that has died, is one until the supervisor sees it.
            is_ours = answer is not None and answer.owner == self._launcher.owner
            if answer and answer.attached and waited > (ATTACH_TIMEOUT if is_ours else CLOSING_TIME):
                raise SessionError(
                    f"The session {self.name!r} is being used by another program on this host: wait until that has "
                    "ended, or use another session."
                )
            if answer and not answer.attached:
                if answer.session is not None:
                    return None  # another session's, whose name has the same hash
                await engine.remove(container)  # its host died before the first call
            elif not answer:
                status = await engine.inspect("container", container, "{{.State.Status}}")
                if status == "paused" or waited > ATTACH_TIMEOUT:
                    raise SessionError(
                        f"The session {self.name!r} is there, but its container {container} does not answer "
                        f"({status or 'gone'}): unpause it, or remove it with `{engine.kind} rm -f {container}`."
                    )
            await anyio.sleep(0.05)
        return None

    async def use(self, folder: str, report: OnStatus) -> tuple[str, ...]:
        """Have the session use a folder of packages; return the modules that it had imported in another version."""
        for _ in range(FIRST_CALL_ATTEMPTS):
            if not self.sandbox or self.sandbox.gone.is_set():
                await self.create(report)
            assert self.sandbox is not None
            with contextlib.suppress(anyio.EndOfStream):
                return await self.sandbox.use(self.key, folder)
            # It has ended, or had preloaded other packages than the session has now.
            self._launcher.tasks.start_soon(self.sandbox.end)
            self.sandbox = None
            await self.create(report, bare=True)
        raise SessionError(f"The session {self.name!r} ended while the package was installed: try again.")

    async def close(self) -> bool:
        """End the session and everything kept for it; return whether there was one. Raises as `close_session`."""
        was_coming = self.placing is not None
        if self.placing:
            self.placing.cancel()
            await self._placed.wait()
        if not self.is_attached:
            async with self.lock:
                try:
                    await self.attach()
                except VersionError:
                    engine = await self._launcher.find_engine()
                    await engine.remove(session_container(self.key))
                    return True
        sandbox, self.sandbox = self.sandbox, None
        if self.call:
            self.call.end(self.call.died("the session was ended"))
        if sandbox:
            await sandbox.end(must_know=True)  # even if a call is running: that ends with it
        if not self.lock.locked():
            self._others.pop(self.name, None)
        return was_coming or sandbox is not None


# ── a call ──

SESSION_ID = r"[A-Za-z0-9._-]{1,128}"
USER_NAME = r"[a-z0-9][a-z0-9._@-]{0,63}"  # one spelling for each, also where file systems ignore case
CODE_LIMIT = 256 << 10  # bytes of code in one call; less than LINE_LIMIT
SHORT_PIECE = 4096  # characters up to which neighbouring pieces are joined as they arrive
PIECES_LIMIT = 100_000  # pieces of output in one result; more than a genuine supervisor lets through
STREAM_LIMIT = 64  # pieces of output that wait for a slow caller before the sandbox has to wait
JOINED_LIMIT = 1 << 20  # characters of output up to which all neighbouring pieces are joined at the end

OnOutput = Callable[[Text | Rich | Omitted], Awaitable[None]]
OnStatus = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One call, as the caller wants it."""

    code: str
    session: str | None = None
    state: Mapping[str, Any] | None = None
    timeout: float = 30.0  # seconds
    filename: str | None = None
    arguments: Sequence[str] = ()
    output_limit: int | None = None  # bytes; None for no limit: the output is then streamed and not kept
    state_limit: int | None = None  # bytes of variables that come back if `state` is given; None for the usual limit
    files: tuple[InputFile, ...] = ()  # for the working directory, ahead of the code
    output: str | os.PathLike[str] | None = None  # folder on the host for the files that the code writes
    user: str = ""  # who the session belongs to, where there are several

    def __post_init__(self) -> None:
        """Refuse what can't be run, before anything is started for it. Raises RequestError."""
        try:
            size = len(self.code.encode())
        except UnicodeEncodeError:
            raise RequestError("The code has lone surrogates, which no Python source can have.") from None
        if size > CODE_LIMIT:
            raise RequestError(
                f"The code is {size} bytes long; the limit is {CODE_LIMIT}. Pass data in files or state."
            )
        if self.session is not None and not re.fullmatch(SESSION_ID, self.session):
            raise RequestError(
                f"{textwrap.shorten(repr(self.session), 60)} can't be a session's id: "
                "use 1 to 128 letters, digits, dots, dashes and underscores."
            )
        if not 0 < self.timeout < math.inf:
            raise RequestError(f"A timeout of {self.timeout!r} seconds can't be: give a number above zero.")
        _ = self.encoded_state

    @property
    def key(self) -> str | None:
        """The session's name on the engine."""
        return self.session and session_key(self.user, self.session)

    @functools.cached_property
    def encoded_state(self) -> bytes | None:
        """The variables as JSON. Raises RequestError if they can't be passed."""
        if self.state is None:
            return None
        variables = {}
        for name, value in self.state.items():
            if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
                raise RequestError(
                    f"state: {textwrap.shorten(repr(name), 60)} can't be the name of a variable: use an identifier "
                    "that does not start with two underscores."
                )
            try:
                variables[name] = plain(value, sys.maxsize)
            except ValueError as error:
                raise RequestError(f"state: the variable {name} can't be passed: {error}.") from None
        data = json.dumps(variables).encode()
        if len(data) > STATE_LIMIT:
            raise RequestError(
                f"state comes to {len(data)} bytes; the limit is {STATE_LIMIT}: use a session, or a file."
            )
        return data

    def frames(self, call_id: str) -> bytes:
        """Return the frames to send."""
        run: Run = {
            "op": "run",
            "id": call_id,
            "data": self.code.encode(),
            "session": self.key,
            "final": self.session is None,
            "timeout": self.timeout,
            "filename": self.filename,
            "argv": list(self.arguments),
            "output_limit": self.output_limit,
            "state_limit": self.state_limit or STATE_LIMIT,
        }
        if (state := self.encoded_state) is None:
            return encoded(run)
        give: GiveState = {"op": "state", "id": call_id, "data": state}
        return encoded(give) + encoded(run)


def encoded(frame: ToSupervisor) -> bytes:
    """Encode a frame, with its data."""
    data: Any = frame.get("data", b"")
    return head(frame) + bytes(data)


class Stage(enum.Enum):
    """Where a call is."""

    NOWHERE = "no sandbox has it"
    PLACED = "it was sent to a sandbox"
    BEGUN = "the sandbox has acknowledged it"
    CUT = "it had begun when the connection to its sandbox ended"
    ENDED = "it has its result, or an error"


class Call:
    """One call: its request, its stage, its output and variables as they come, and in the end its result.

    The reader of a sandbox's pipe drives it (see `take`), whether or not anyone waits: for code to go on without its
    caller, the caller just stops waiting. A connection that is cut does not end it: the next one goes on with it.

        NOWHERE ──place──> PLACED ──take──> BEGUN ──end, fail──> ENDED   (from every other stage, too)
           ▲                 │              │   ▲
           └───────cut───────┘           cut▼   │go_on
                                            CUT
    """

    def __init__(
        self,
        request: Request,
        call_id: str | None = None,
        *,
        streams: bool = False,
        ran: float = 0,
        is_adopted: bool = False,
    ) -> None:
        self.request = request
        self.id = call_id or secrets.token_hex(8)
        self.stage = Stage.NOWHERE
        self.ended = anyio.Event()  # set at that stage
        self.why_cut = ""  # what ended the last connection that it was placed over
        self.cancelled = False  # whether its caller has given it up, and it was told to stop
        self.needs_bare = False  # whether the sandbox that it was placed in had preloaded other packages
        self.attempts = 0  # sandboxes that it was placed in
        self.is_new = False  # whether its session began with it
        self.status = ""  # what it waits for before it is placed
        self.on_status: OnStatus | None = None
        self.deadline = math.inf  # of the event loop's clock; a sandbox that is silent after that is given up
        self.output = CallOutput(request.output_limit, streams=streams, is_adopted=is_adopted)
        self.refused: dict[str, None] = {}  # sentences on connections that were refused
        self._made = time.monotonic() - ran
        self._parts: dict[str, Any] = {}  # fields of the result that came ahead of its end
        self._outcome: Result | Exception | None = None
        self._news = anyio.Event()  # something has happened that a task may wait for

    @property
    def is_placed(self) -> bool:
        """Whether a connected sandbox has it."""
        return self.stage in (Stage.PLACED, Stage.BEGUN)

    @property
    def failed(self) -> bool:
        """Whether it ended with an error, and so has no result."""
        return isinstance(self._outcome, Exception)

    def report(self, status: str) -> None:
        """Take note of what the call waits for, "" for nothing, and tell whoever waits for it."""
        if status != self.status:
            self.status = status
            if self.on_status:
                self.on_status(status)

    # ── its stages ──

    def place(self) -> None:
        """Take note that a sandbox is being sent it."""
        self.stage, self.needs_bare = Stage.PLACED, False
        self.deadline = anyio.current_time() + self.request.timeout + INTERRUPT_GRACE + HOST_PATIENCE

    def go_on(self, told: int, left: float) -> None:
        """Go on over a new connection, after `told` bytes of output were sent over earlier ones."""
        self.stage = Stage.BEGUN
        self.deadline = anyio.current_time() + left + HOST_PATIENCE
        self.output.skip_to(told)

    def cut(self, why: str) -> None:
        """Take note that the connection to its sandbox has ended, or that the sandbox did not take it."""
        if self.stage is not Stage.ENDED:
            self.stage = Stage.CUT if self.stage is Stage.BEGUN else Stage.NOWHERE
        self.why_cut = why
        self.notify()

    def end(self, result: Result) -> None:
        """End it, unless it has ended."""
        if not self.ended.is_set():
            log.debug("call %s ended: %s after %.3f s", self.id, result.status, result.wall)
            self._end(result)

    def fail(self, error: Exception) -> None:
        """End it, unless it has ended, with an error for whoever asks for its result."""
        if not self.ended.is_set():
            self._end(error)

    def give_up(self) -> None:
        """End it because no sandbox that it was placed in lasted until it began."""
        self.end(self.died(f"{self.attempts} sandboxes ended before the code could begin"))

    def _end(self, outcome: Result | Exception) -> None:
        self._outcome, self.stage = outcome, Stage.ENDED
        self.ended.set()
        self.notify()

    def notify(self) -> None:
        """Wake the tasks that wait for news of it."""
        self._news.set()

    async def news(self) -> None:
        """Wait until something happens to it."""
        if self._news.is_set():
            self._news = anyio.Event()
        await self._news.wait()

    async def wait(self, patience: float, on_output: OnOutput | None = None) -> None:
        """Wait until it has ended, is not placed any more, or is silent for `patience`; pass on output meanwhile."""
        while True:
            if on_output:
                await self.output.pass_on(on_output)
            if not self.is_placed:
                return
            with anyio.move_on_after(patience) as silence:
                await self.news()
            if silence.cancelled_caught:
                return

    # ── its result ──

    def tell(self) -> Result:
        """Return the result or, as long as there is none, the output so far. No output is told twice.

        Raises the error that it ended with.
        """
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome:
            return self._outcome
        wall = time.monotonic() - self._made
        message = f"the call has not ended after {wall:.0f} seconds" + (f": {self.status}" if self.status else "")
        return Result("running", self.output.take(), message=message, session=self.request.session, wall=wall)

    def died(self, message: str, state: Variables = "lost") -> Result:
        """Return the result of a call whose end the sandbox can't tell."""
        session = self.request.session
        return Result("died", self.output.pieces(), message=message, session=session, state=state if session else None)

    async def take(self, frame: OfCall) -> None:
        """Enter a frame. Waits if the caller streams the output and is slow. Raises ProtocolError."""
        if frame["kind"] == "unfit":
            self.needs_bare = True
            self.cut("it had preloaded other packages")
            return
        if self.stage is Stage.PLACED:
            self.stage = Stage.BEGUN
        self.notify()  # ahead of `show`, which may wait for the caller
        if frame["kind"] == "stdout" or frame["kind"] == "stderr":
            self.output.received += len(frame["data"])
            await self.output.show(Text(frame["kind"], decoded(frame["data"])))
        elif frame["kind"] == "display":
            self.output.count(frame["data"])
            await self.output.show(Rich(forms_of(frame["data"]), frame["is_value"]))
        elif frame["kind"] == "omitted":
            await self.output.show(Omitted(frame["bytes"]))
        elif frame["kind"] == "clear":
            self.output.clear()
        elif frame["kind"] == "state":
            self.output.count(frame["data"])
            variables, left_out = {}, frame["left_out"]
            try:
                variables = parse_object(frame["data"])
            except ValueError as error:  # the user's code forged it: that costs the call its variables, and no more
                left_out = {**left_out, "(all)": str(error)}
            self._parts |= {"variables": variables, "variables_left_out": left_out}
        elif frame["kind"] == "earlier":
            self._parts["earlier"] = decoded(frame["data"])
        elif frame["kind"] == "done":
            self.end(self._conclude(frame))

    def _conclude(self, done: Done) -> Result:
        exit_code, value, session = done.get("exit_code"), done.get("value"), self.request.session
        fields = done.get("exception")
        message = done.get("message")
        lost = done["state"] != "preserved"
        if lost and done["status"] == "died":
            message = message or how_it_ended(exit_code)
        return Result(
            status=done["status"],
            output=self.output.pieces(),
            value=value,
            value_omitted=max(0, done.get("value_length", 0) - len(value)) if value else 0,
            exception=ExceptionInfo(**fields) if fields else None,
            exit_code=exit_code,
            lost=lost,
            message=message,
            session=session,
            state=done["state"] if session else None,
            lost_before=done["lost_before"],
            behind=done["behind"],
            files=tuple(FileInfo(path, size) for path, size in done["files"][:FILES_LISTED]),
            files_left_out=done["files_left_out"],
            refused=tuple(self.refused),
            stale=tuple(done.get("stale", ())),
            wall=done["wall"],
            cpu=done["cpu"],
            memory=done.get("memory"),
            oom_kills=done["oom_kills"],
            **self._parts,
        )


class CallOutput:
    """A call's output: as much as the result is to have, and what waits for a caller who takes it as it comes."""

    def __init__(self, limit: int | None, *, streams: bool, is_adopted: bool) -> None:
        self.received = 0  # bytes, of all connections
        self._limit = limit  # None: text is passed on only
        self._is_adopted = is_adopted  # whether another host began the call, whose limits are not known
        self._untold: list[Text | Rich | Omitted] = []
        self._streams = streams  # whether someone waits who takes the output as it comes
        self._stream: deque[Text | Rich | Omitted] = deque()
        self._room = anyio.Event()
        self.clear()

    def clear(self) -> None:
        """Forget the output that nobody has been told, with all that is counted of it."""
        self._untold.clear()
        self._text_left = (self._limit or 0) + LINE_LIMIT
        self._data_left = CALL_LIMIT

    def pieces(self) -> tuple[Text | Rich | Omitted, ...]:
        """Return the output that nobody has been told."""
        return joined(self._untold)

    def take(self) -> tuple[Text | Rich | Omitted, ...]:
        """Return the output that nobody has been told, which is told with that."""
        pieces, self._untold = self.pieces(), []
        return pieces

    def skip_to(self, told: int) -> None:
        """Note that `told` bytes were sent, of which some may not have come."""
        if told > self.received:
            self._keep(Omitted(told - self.received))
            self.received = told

    def listen(self, listens: bool) -> None:
        """Note whether a caller takes the output as it comes."""
        self._streams = listens
        self._room.set()

    async def pass_on(self, on_output: OnOutput) -> None:
        """Give the caller what waits for it."""
        while self._stream:
            await on_output(self._stream.popleft())
            self._room.set()

    def count(self, data: bytes) -> None:
        """Count data that the text's limit does not hold. Raises ProtocolError above what a supervisor lets through."""
        self._data_left -= len(data) + FRAME_COST
        if self._data_left < 0:
            raise ProtocolError("more data than the limit lets through")

    async def show(self, item: Text | Rich | Omitted) -> None:
        """Keep a piece, and have it passed on; wait while the caller is slow. Raises ProtocolError."""
        if isinstance(item, Text) and self._limit is not None:
            self._text_left -= len(item.text)
            if self._text_left < 0 and not self._is_adopted:
                raise ProtocolError("more output than the limit lets through")
            if self._text_left < 0:  # its own host may have let more through
                item = Omitted(bytes_of(item))
        if self._limit is not None or not isinstance(item, Text):
            self._keep(item)
        if self._streams:
            self._stream.append(item)
            while self._streams and len(self._stream) > STREAM_LIMIT:
                self._room = anyio.Event()
                await self._room.wait()

    def _keep(self, item: Text | Rich | Omitted) -> None:
        """Keep a piece of output. There may be one for each character, and an object costs more than that."""
        last = self._untold[-1] if self._untold else None
        if (
            isinstance(item, Text)
            and isinstance(last, Text)
            and item.stream == last.stream
            and len(item.text) + len(last.text) < SHORT_PIECE
        ):
            self._untold[-1] = Text(item.stream, last.text + item.text)
        elif isinstance(item, Omitted) and isinstance(last, Omitted):
            self._untold[-1] = Omitted(last.bytes + item.bytes)
        elif len(self._untold) < PIECES_LIMIT:
            self._untold.append(item)
        else:
            gap = sum(piece.bytes for piece in self._untold[PIECES_LIMIT:] if isinstance(piece, Omitted))
            self._untold[PIECES_LIMIT:] = [Omitted(gap + bytes_of(item))]


def forms_of(data: bytes) -> dict[str, str]:
    """Return the forms of a displayed value; a note if the user's code has forged them."""
    with contextlib.suppress(ValueError):
        forms = parse_object(data)
        if all(isinstance(form, str) for form in forms.values()):
            return forms
    return {"text/plain": "[a display was left out: it is not an object of texts]"}


def joined(output: Sequence[Text | Rich | Omitted]) -> tuple[Text | Rich | Omitted, ...]:
    """Join neighbouring pieces of one stream, unless the output is large: it would be there twice for a while."""
    if sum(len(item.text) for item in output if isinstance(item, Text)) > JOINED_LIMIT:
        return tuple(output)
    merged: list[Text | Rich | Omitted] = []
    for stream, items in itertools.groupby(output, lambda item: item.stream if isinstance(item, Text) else None):
        pieces = list(items)
        if stream:
            merged.append(Text(stream, "".join(item.text for item in pieces if isinstance(item, Text))))
        else:
            merged += pieces
    return tuple(merged)


def bytes_of(item: Text | Rich | Omitted) -> int:
    """Return the size of a piece of output."""
    if isinstance(item, Omitted):
        return item.bytes
    forms = (item.text,) if isinstance(item, Text) else item.forms.values()
    return sum(len(form.encode("utf-8", "replace")) for form in forms)


def how_it_ended(code: int | None) -> str:
    """Say how a process ended, from its exit status or, if negative, the signal that killed it."""
    if code is None:
        return "the process that ran the code ended"
    if code >= 0:
        return f"the code ended its own process with exit status {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        crash = name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")
        return f"the process that ran the code was killed by {name}" + (", a crash in native code" if crash else "")
    return f"the process that ran the code was killed by signal {-code}"


# ── pool ──

RENEWAL_AGE = 0.8  # fraction of `pool.max_age` at which a ready sandbox is replaced
POOL_RETRY_LIMIT = 60  # seconds, at most, between attempts to keep a sandbox ready while the engine fails


class Pool:
    """Keep sandboxes ready, and bound how many there are in all.

    A leased sandbox is the caller's until it is gone or, with `pool.reuse` and found clean, given back.
    """

    def __init__(
        self,
        create: Callable[[Sequence[str], OnStatus | None], Awaitable[Sandbox]],
        config: PoolConfig,
        tasks: anyio.abc.TaskGroup,
        idle_timeout: float,
    ) -> None:
        self.ready: deque[Sandbox] = deque()  # oldest first
        self.create = create
        self.config = config
        self._tasks = tasks
        self._creations = anyio.Semaphore(config.max_concurrent_creations)
        self._turn = anyio.Lock(fast_acquire=True)  # serves callers in the order of their coming
        self._changed = anyio.Event()  # set when a sandbox is ready or a place is free
        self.count = 0  # all sandboxes, including those being created
        self._counted: set[Sandbox] = set()
        self._coming = 0  # sandboxes being created to be kept ready
        self.returning: set[Sandbox] = set()  # sandboxes being cleaned, to be ready again
        self._wanted_now = 0  # sandboxes being created for a call that waits
        self._kept_warm = False
        self._idle_timeout = idle_timeout  # seconds without a call after which none is kept ready
        self._used_at = time.monotonic()

    async def lease(self, *, bare: bool = False, report: OnStatus | None = None) -> Sandbox:
        """Return a ready sandbox or, if there is none or it has to be `bare` (nothing preloaded), a new one.

        `report` is called with what that waits for. Raises EngineError, ImageError.
        """
        async with self._turn:
            while True:
                while self.ready and not bare:
                    sandbox = self.ready.popleft()
                    if not sandbox.gone.is_set() and time.monotonic() - sandbox.created <= self.config.max_age:
                        self._tasks.start_soon(self._fill_soon)
                        return sandbox
                    self._tasks.start_soon(sandbox.end)
                self._changed = anyio.Event()
                if self.returning and not bare:  # cleaning takes milliseconds, a new sandbox a good part of a second
                    await self._changed.wait()
                    continue
                if self.count < self.config.size:
                    self.count += 1
                    break
                if report:
                    report(f"waiting for one of {self.config.size} sandboxes to become free (pool.size)")
                await self._changed.wait()
                if report:
                    report("")
        self._wanted_now += 1
        try:
            return await self._add((), report)  # the caller would have to wait for preloading, too
        finally:
            self._wanted_now -= 1
            self._fill()

    def keep_warm(self) -> None:
        """Start keeping sandboxes ready, in the background."""
        if self.config.enabled and not self._kept_warm:
            self._tasks.start_soon(self._stay_young)
        self._kept_warm = self.config.enabled
        self._fill()

    def touch(self) -> None:
        """Note that a call, of whatever kind, has come: as long as calls come, sandboxes are kept ready."""
        was_used, self._used_at = self.is_used, time.monotonic()
        if not was_used:
            self._fill()

    def renew(self) -> None:
        """Replace the ready sandboxes at once, because other packages are installed than they have preloaded."""
        while self.ready:
            self._tasks.start_soon(self.ready.popleft().end)
        self._fill()

    async def _stay_young(self) -> None:
        """Replace ready sandboxes before they are too old, one after the other, as long as calls come."""
        while True:
            age = time.monotonic() - self.ready[0].created if self.ready else 0.0
            await anyio.sleep(max(self.config.max_age * RENEWAL_AGE - age, self.config.max_age / 50))
            if not self.ready or time.monotonic() - self.ready[0].created < self.config.max_age * RENEWAL_AGE:
                continue
            oldest = self.ready[0]
            if self.is_used and self._missing() >= 0 and self.count < self.config.size:
                self._coming += 1
                self.count += 1
                await self._prepare_one()
            if oldest in self.ready:
                self.ready.remove(oldest)
                self._tasks.start_soon(oldest.end)

    @property
    def is_used(self) -> bool:
        """Whether a call has come so lately that sandboxes are kept ready."""
        return time.monotonic() - self._used_at < self._idle_timeout

    def stop(self) -> None:
        """Stop keeping sandboxes ready: those that leave now need no successors."""
        self._kept_warm = False

    def give_back(self, sandbox: Sandbox) -> None:
        """Take a used sandbox back if nothing of its use is left in it; end it otherwise."""
        self.returning.add(sandbox)
        self._tasks.start_soon(self._take_back, sandbox)

    async def _take_back(self, sandbox: Sandbox) -> None:
        try:
            young = self.config.enabled and time.monotonic() - sandbox.created <= self.config.max_age
            if young and await sandbox.recycle():
                self._put(sandbox)
                return
        finally:
            self.returning.discard(sandbox)
            self._changed.set()
        await sandbox.end()

    async def adopt(self, sandbox: Sandbox) -> None:
        """Take in a ready sandbox that another host left, unless it is too old or the pool is full."""
        if self.count < self.config.size and time.monotonic() - sandbox.created <= self.config.max_age:
            self.count += 1
            self._own(sandbox)
            self._put(sandbox)
        else:
            await sandbox.end()

    def _put(self, sandbox: Sandbox) -> None:
        self.ready.append(sandbox)
        self._changed.set()

    def _fill(self) -> None:
        """Start making missing sandboxes ready, but not while calls wait for new ones: they need the machine now."""
        if self._kept_warm and self.is_used and not self._wanted_now:
            for _ in range(min(self._missing(), self.config.size - self.count)):
                self._coming += 1
                self.count += 1
                self._tasks.start_soon(self._prepare_one)

    def _missing(self) -> int:
        """Return how many more sandboxes should be ready; if negative, how many fewer."""
        there = self.count if self.config.reuse else len(self.ready) + self._coming  # with reuse, leased ones return
        return min(self.config.warm, self.config.size) - there

    async def _fill_soon(self) -> None:
        """Make missing sandboxes ready HEAD_START later, so that the call that took one has the machine to itself."""
        await anyio.sleep(HEAD_START)
        self._fill()

    async def _prepare_one(self) -> None:
        """Make one sandbox ready; while the engine fails, try again at growing intervals."""
        try:
            for attempt in itertools.count():
                try:
                    sandbox = await self._add(self.config.preload)
                    self._put(sandbox)
                    break
                except SandboxError as error:
                    if attempt == 0:
                        log.warning("no sandbox can be kept ready: %s", error)  # a call that needs one says so, too
                    await anyio.sleep(min(2**attempt, POOL_RETRY_LIMIT))
                    if self.count >= self.config.size:
                        break  # the place was taken meanwhile; `_fill` runs again when one becomes free
                    self.count += 1
        finally:
            self._coming -= 1

    async def _add(self, preload: Sequence[str], report: OnStatus | None = None) -> Sandbox:
        """Create a sandbox, for which a place is already counted."""
        try:
            async with self._creations:
                sandbox = await self.create(preload, report)
        except BaseException:
            self._free_place()
            raise
        self._own(sandbox)
        return sandbox

    def _own(self, sandbox: Sandbox) -> None:
        self._counted.add(sandbox)
        self._tasks.start_soon(self._watch, sandbox)

    async def _watch(self, sandbox: Sandbox) -> None:
        """Wait until a sandbox is gone, then free its place and replace it if it was ready."""
        await sandbox.gone.wait()
        self.let_go(sandbox)
        if sandbox in self.ready:
            self.ready.remove(sandbox)
        self._fill()

    def let_go(self, sandbox: Sandbox) -> None:
        """Stop counting a sandbox: it is gone, or a session's, and those are bounded by `session.max`."""
        if sandbox in self._counted:
            self._counted.remove(sandbox)
            self._free_place()
            self._fill()

    def _free_place(self) -> None:
        self.count -= 1
        self._changed.set()


# ── launcher ──

MAX_PLUGS = 8  # sandboxes asked at once; each costs the engine a process
IMAGE_RETRY_PAUSE = 600  # seconds until another attempt to complete an image that lacks its preinstalled packages
LOOK_TIMEOUT = 10  # seconds for the file system to tell of the folders that the configuration names
PRUNE_PAUSE = 75  # seconds; longer than any container takes from being created to running


class Launcher:
    """Starts sandboxes, and finds those that run. It looks for an engine and an image when it needs them.

    Attributes that may be looked at: `owner` (its id), `engine` and `image` (None until they are found).
    """

    def __init__(self, config: Config, tasks: anyio.abc.TaskGroup, on_status: OnStatus | None, file: Path) -> None:
        self.config = config
        self.file = file  # of the configuration
        self.on_status = on_status
        self.owner = f"{secrets.token_hex(8)}-{os.getpid()}"
        self.network = Network(config.docker.network_allow, Credentials(config))
        self.tasks = tasks
        self.engine: Engine | None = None
        self.image: Image | None = None
        self._finding = anyio.Lock(fast_acquire=True)
        self._failed: EngineError | None = None  # why the last search for an engine found none,
        self._failed_at = -math.inf  # and when
        self._preparing = anyio.Lock()
        self._watching: list[OnStatus] = []  # those who wait until engine and image are there
        self._retry_at = 0.0  # when to try again to complete an image
        self._may_look = anyio.CapacityLimiter(1)  # a thread that looks at folders may hang for a long time
        self._looked_at: set[Config] = set()

    async def require_paths(self, config: Config) -> None:
        """See once, before the first call, that the folders which the configuration names may be used.

        Raises ConfigError if not, or if they don't answer.
        """
        named = [place for _, place in config.files.named()] + list(config.docker.mounts)
        if config in self._looked_at or not (named or config.package.ca_bundle):
            return
        look = functools.partial(require_paths, config, self.file)
        try:
            with anyio.fail_after(LOOK_TIMEOUT):
                await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=self._may_look)
        except TimeoutError:
            raise ConfigError(
                f"A folder of the configuration did not answer within {LOOK_TIMEOUT} seconds ({', '.join(named)}): is "
                "one on a drive that is not there? Connect it, or take the folder out of the configuration."
            ) from None
        self._looked_at.add(config)

    async def find_engine(self) -> Engine:
        """Return the engine. Raises EngineError."""
        asked_at = time.monotonic()
        async with self._finding:
            if self.engine is None:
                if self._failed and self._failed_at > asked_at:
                    raise type(self._failed)(str(self._failed))  # found out while this call waited for its turn
                try:
                    self.engine = await find_engine(self.config.docker.command)
                except EngineError as error:
                    self._failed, self._failed_at = error, time.monotonic()
                    raise
                log.debug("using %s %s (%s)", self.engine.kind, self.engine.version, self.engine.command)
            return self.engine

    @property
    def failure(self) -> EngineError | None:
        """Why there is no engine to be had, as far as that is known."""
        return self._failed if self.engine is None else None

    async def prepare(self, report: OnStatus | None = None) -> tuple[Engine, Image]:
        """Return the engine and the image, which is pulled or made first if it is missing.

        Use the returned pair: another task may reset the attributes.

        Raises:
            EngineError, ImageError: there is nothing to run code in.
        """
        await self.require_paths(self.config)
        await self.find_engine()  # ahead of the queue: where there is none, no call waits for those before it
        watcher = report or self.report
        self._watching.append(watcher)
        try:
            async with self._preparing:
                engine, image = await self.find_engine(), self.image
                if not image or (image.problem and time.monotonic() > self._retry_at):
                    self._retry_at = time.monotonic() + IMAGE_RETRY_PAUSE
                    image = self.image = await derive_image(engine, self.config, self._report_to_all)
                return engine, image
        except HangError as error:
            self.engine, self._failed, self._failed_at = None, error, time.monotonic()
            raise
        finally:
            self._watching.remove(watcher)
            watcher("")

    def _report_to_all(self, status: str) -> None:
        """Tell each call that waits for engine and image what they wait for."""
        for watcher in self._watching:
            watcher(status)

    def report(self, status: str) -> None:
        """Tell what takes long in the background, or in a call whose caller does not want to know."""
        if self.on_status:
            self.on_status(status)
        elif status:
            log.info("%s", status)

    async def start(self, preload: Sequence[str], report: OnStatus | None) -> Sandbox:
        """Start a sandbox. Raises EngineError, ImageError."""
        engine, image = await self.prepare(report)
        try:
            return await Sandbox.start(self, engine, image, preload)
        except EngineError:
            self.engine = self.image = None  # look again next time: the image may have gone, or the engine changed
            raise

    async def install(self, name: str, requirement: str, sandbox: Sandbox | None, report: OnStatus) -> Outcome:
        """Have a helper container install a package, on top of what the sandbox's session has, or for all."""
        engine, image = await self.prepare(report)
        task = {
            "task": "install",
            "name": name,
            "requirement": requirement,
            "base": sandbox.packages if sandbox else None,
            "shared": sandbox is None,
            "image": image.packages.rpartition("/")[2],
        }
        helper = f"python-docker-mcp-install-{secrets.token_hex(8)}"
        report(f"installing {requirement}")
        try:
            with anyio.fail_after(INSTALL_TIMEOUT):
                async with helper_container(engine, helper, image.name, self.config.package, task, report) as outcome:
                    return outcome
        except TimeoutError:
            raise EngineError(f"Installing {name} did not end within {INSTALL_TIMEOUT} seconds; try again.") from None
        finally:
            report("")

    async def list_sandboxes(self, *, details: bool = False) -> list[SandboxInfo]:
        """Return all sandboxes on this engine as they describe themselves, if asked in detail, oldest first."""
        engine = await self.find_engine()
        names = await engine.sandboxes()
        known = [name for name, version in names.items() if version == str(PROTOCOL)]
        answers = await self.ask(engine, known, details=details, patience=STATUS_TIMEOUT)
        infos = [info for info in answers if isinstance(info, SandboxInfo)]
        if silent := set(names) - {info.name for info in infos}:
            there = await engine.sandboxes()
            infos += [SandboxInfo(name, is_known=name in known) for name in sorted(silent & set(there))]
        return sorted(infos, key=lambda info: -info.age)

    async def ask(
        self,
        engine: Engine,
        names: Sequence[str],
        *,
        settings: str | None = None,
        details: bool = False,
        patience: float | None = None,
    ) -> list[Sandbox | SandboxInfo]:
        """Ask containers to describe themselves; take over those without a host that have the digest `settings`."""
        answers: list[Sandbox | SandboxInfo] = []
        at_once = anyio.CapacityLimiter(MAX_PLUGS)

        async def ask_one(name: str) -> None:
            async with at_once:
                with contextlib.suppress(SandboxError):  # no command can be started now: then this one does not answer
                    answer = await Sandbox.plug_in(
                        self, engine, name, settings=settings, details=details, patience=patience
                    )
                    if answer:
                        answers.append(answer)

        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(ask_one, name)
        return answers

    async def prune(self) -> list[str]:
        """Remove containers that do not run and did not some time ago either; return their names.

        Running ones need nothing of the kind: unused sandboxes end by themselves.
        """
        engine = await self.find_engine()
        if not (found := set(await engine.leftovers())):
            return []
        await anyio.sleep(PRUNE_PAUSE)
        gone = sorted(found & set(await engine.leftovers()))
        for name in gone:
            await engine.run("rm", "--force", name, timeout=REMOVE_TIMEOUT)
        return gone


# ── sandbox ──

START_TIMEOUT = 60  # seconds from `docker run` to the supervisor's greeting
ATTACH_TIMEOUT = 15  # seconds from `docker exec` to the supervisor's greeting
STATUS_TIMEOUT = 5  # seconds for the same, when a sandbox is only asked for its state
DOUBT_AFTER = 6  # seconds of silence before a sandbox, and then its engine, is asked whether it is there
PONG_TIMEOUT = 3  # seconds for the sandbox to answer that question
INTERRUPT_GRACE = 2.0  # seconds between interrupting the code and killing it
HOST_PATIENCE = 10  # seconds the host waits past the supervisor's own deadline
ADOPTION_TIME = 60.0  # seconds an unused sandbox waits for a new host after its own was killed
FAREWELL_TIMEOUT = 0.5  # seconds for the supervisor to acknowledge a farewell
WRONG_ANSWER = "The session's container did not answer as it should."
NOTES_LOGGED = 100  # notes of one sandbox that are logged
QUESTIONS_AHEAD = 8  # pieces of a file asked for, or sent, before the first is there: so the pipe is never idle
PIECE_TIMEOUT = 60  # seconds for the next one to come; a slow line has to carry so many
WRITABLE_FOLDERS = ("/tmp", "/dev/shm", "/dev/mqueue")  # besides the working directory; private to the container
LABEL = "python-docker-mcp.sandbox"  # on every sandbox's container, and on no other


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox's description of itself; of one that does not answer, such as a paused one, only the name is known."""

    name: str  # of its container
    answers: bool = False
    is_known: bool = True  # whether it was made by a version of this program that this one can speak with
    session: str | None = None
    attached: bool = False  # whether a program is using it
    owner: str = ""  # that program's id, or the last one's; it ends with a dash and the process id
    busy: bool = False
    age: float = 0.0  # seconds
    idle: float = 0.0  # seconds since its last call
    memory: int | None = None  # bytes in use
    variables: Mapping[str, str] = field(default_factory=dict)  # names, with types and sizes
    files: tuple[int, int] = (0, 0)  # how many there are in the working directory, and their bytes


SESSION_CONTAINER = "python-docker-mcp-session-"
CONTAINER_NAME = re.compile(rf"{SESSION_CONTAINER}[0-9a-f]{{24}}|python-docker-mcp-[0-9a-f]{{16}}")


def session_container(session: str) -> str:
    """Return the name of a session's container: a hash, as an id is no argument for an engine."""
    return f"{SESSION_CONTAINER}{hashlib.sha256(session.encode()).hexdigest()[:24]}"


def guest_settings(engine: Engine, image: Image, config: Config, preload: Sequence[str]) -> dict[str, Any]:
    """Return a supervisor's settings, with a digest of all that distinguishes its sandbox from others."""
    settings = {
        "working_dir": config.docker.working_dir,
        "cpus": math.ceil(config.docker.cpu_limit),
        "memory_limit": size_in_bytes(config.docker.memory_limit),
        "restores": config.session.restore,
        "writable_folders": WRITABLE_FOLDERS,
        "idle_timeout": config.session.idle_timeout,
        "adoption_time": ADOPTION_TIME,
        "grace": INTERRUPT_GRACE,
        "allowed_modules": config.allowed_modules,
        "blocked_modules": config.blocked_modules,
        "preload": preload,
        "packages": image.packages,
        "has_proxy": bool(config.allowed_hosts),
        "certificates": host_certificates(config.package) if config.allowed_hosts else ("", False),
    }
    everything = [engine.sandbox_arguments("", image, config, {}), image.id, GUEST_SOURCE, settings]
    return {**settings, "digest": hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]}


class Sandbox:
    """One container, and the pipe to its supervisor. Runs one call at a time; whoever leases it sees to that."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        process: anyio.abc.Process,
        pipe: anyio.abc.ByteStream,
        network: Network,
    ) -> None:
        self.engine = engine
        self.proxy = Proxy(network, self)
        self.files = Transfer(self)
        self.name = name
        self.call: Call | None = None  # the last one
        self.gone = anyio.Event()
        self.created = time.monotonic()
        self.prepared = anyio.Event()  # set when a worker is there that has preloaded everything
        self.packages: str | None = None  # folder of the packages installed for its session
        self.expired = anyio.Event()  # set when its session was not used for too long, and ends
        self.greeting: Greeting | None = None
        self.client = process  # the engine's command line
        self._pipe = pipe
        self._errors = bytearray()
        self._greeted = anyio.Event()
        self.answers: dict[str, MemoryObjectSendStream[ToQuestion]] = {}  # by the questions' id
        self._heard = anyio.current_time()  # when the last frame was read, and taken
        self.fault: str | None = None  # what was wrong with a frame
        self._notes = 0  # so many have come

    def __repr__(self) -> str:
        return f"<Sandbox {self.name}{' (gone)' * self.gone.is_set()}>"

    @property
    def user(self) -> str:
        """Whose code runs in it, "" where there is one user."""
        if self.call:
            return self.call.request.user
        return split_key(self.greeting["session"])[0] if self.greeting and self.greeting["session"] else ""

    @classmethod
    async def start(
        cls,
        launcher: Launcher,
        engine: Engine,
        image: Image,
        preload: Sequence[str] = (),
    ) -> Sandbox:
        """Start a container and wait until its supervisor is ready; it preloads modules after that.

        Raises:
            EngineError: the engine did not start it, or it did not come up.
        """
        settings = guest_settings(engine, image, launcher.config, preload)
        name = f"python-docker-mcp-{secrets.token_hex(8)}"
        labels = {"owner": launcher.owner, "settings": settings["digest"]}
        authority = await launcher.network.credentials.certificate()
        client = await engine.spawn(*engine.sandbox_arguments(name, image, launcher.config, labels))
        sandbox = cls(engine, name, *client, launcher.network)
        told = {**settings, "owner": launcher.owner, "authority": authority}
        launcher.tasks.start_soon(sandbox.serve, None)
        try:
            with anyio.fail_after(START_TIMEOUT):
                await sandbox._come_up(shipment(GUEST_SOURCE, "supervise", told))
            if sandbox.greeting is None:
                raise EngineError(why_not_started(sandbox._last_words(), image, launcher.config.docker))
        except HangError:
            raise
        except TimeoutError:
            await sandbox.remove()
            raise EngineError(
                f"A sandbox did not come up within {START_TIMEOUT} seconds: is the host overloaded?"
            ) from None
        except BaseException:
            await sandbox.remove()
            raise
        log.debug("the sandbox %s is ready after %.3f s", name, time.monotonic() - sandbox.created)
        return sandbox

    async def _come_up(self, shipped: bytes) -> None:
        """Ship the guest, and wait for its greeting. Raises HangError if the engine does not answer meanwhile."""
        async with open_tasks() as tasks:
            tasks.start_soon(self.write, shipped)
            await wait_or_doubt(self._greeted.wait, self._require_engine)

    async def _require_engine(self) -> None:
        """Raise HangError if the engine hangs; if it answers, the sandbox may only be slow."""
        try:
            await self.engine.require_answer()
        except HangError:
            self._kill_client()  # nothing else could end it; the container, if it is there, finds no host
            raise

    async def _require_answer(self) -> None:
        """Find out whether the supervisor answers or, if it does not, the engine. Raises HangError."""
        with anyio.move_on_after(PONG_TIMEOUT):
            with contextlib.suppress(anyio.EndOfStream):  # it ends: the call learns of that as of any other end
                await self.ask({"op": "ping", "id": secrets.token_hex(8)})
            return
        await self._require_engine()

    @classmethod
    async def plug_in(
        cls,
        launcher: Launcher,
        engine: Engine,
        name: str,
        *,
        session: str | None = None,
        call: Call | None = None,
        settings: str | None = None,
        details: bool = False,
        patience: float | None = None,
    ) -> Sandbox | SandboxInfo | None:
        """Take over a sandbox without a host, if it holds `session`, or none and was made with the digest `settings`.

        If `call` is running in it, that goes on. Returns its description if it can't be taken over, None if it does not
        answer within `patience` seconds.
        """
        may_enter = bool(session or settings)
        request: PlugRequest = {
            "session": session,
            "settings": settings,
            "owner": launcher.owner,
            "details": details,
            "authority": await launcher.network.credentials.certificate() if may_enter else "",
        }
        sandbox = cls(engine, name, *await engine.spawn(*engine.plug_arguments(name)), launcher.network)
        launcher.tasks.start_soon(sandbox.serve, call)
        try:
            with anyio.move_on_after(ATTACH_TIMEOUT if patience is None else patience):
                await sandbox.write(head(request))
                await sandbox._greeted.wait()
        except BaseException:
            sandbox._kill_client()  # else this host would own a sandbox that it does not know
            raise
        if sandbox.greeting and sandbox.greeting["kind"] == "ready":
            sandbox.created -= sandbox.greeting["age"]
            log.debug("taken over: the session %s in the container %s", session, name)
            return sandbox
        sandbox._kill_client()
        return sandbox.info() if sandbox.greeting else None

    def info(self) -> SandboxInfo:
        """Return the sandbox's description of itself, from when it was started or plugged into."""
        assert self.greeting is not None
        said = self.greeting
        return SandboxInfo(
            self.name, True, True, said["session"], said["attached"], said["owner"], said["busy"], said["age"],
            said["idle"], said["memory"], said.get("variables", {}), said.get("files", (0, 0)),
        )  # fmt: skip

    # ── the pipe ──

    async def serve(self, call: Call | None) -> None:
        """Read from the container and its command line until they are gone; go on with `call` if it runs there."""
        assert self.client.stderr is not None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(keep_tail, self.client.stderr, self._errors)
                await self._read_frames(call, tasks)
                if self.fault and self.greeting and self.greeting["kind"] == "ready":
                    await self.remove()  # it is ours, and may not end by itself
                with anyio.move_on_after(FAREWELL_TIMEOUT):
                    await self.client.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._kill_client()
            with anyio.CancelScope(shield=True):
                await self.client.aclose()
                await self._pipe.aclose()
            self.gone.set()
            self._greeted.set()
            self.prepared.set()
            for answer in self.answers.values():
                answer.close()
            if self.call:
                self._lose(self.call)

    def _lose(self, call: Call) -> None:
        """Cut the call from this sandbox, which is gone; end it if no session could go on with it."""
        why = last_line(f"it sent what no supervisor sends: {self.fault}" if self.fault else self._last_words())
        if self.fault or (call.stage is Stage.BEGUN and not call.request.session):
            call.end(call.died(f"the container ended during the call ({why})"))
        call.cut(why)

    async def _read_frames(self, call: Call | None, tasks: anyio.abc.TaskGroup) -> None:
        lines = BufferedByteReceiveStream(self._pipe)
        strays = 0
        of_sandbox: dict[str, Callable[[Any], object]] = {
            "ready": lambda frame: self._greet(frame, call),
            "status": lambda frame: self._greet(frame, call),
            "farewell": lambda _: self._kill_client(),
            "passed": lambda frame: self.proxy.take(frame, tasks),
            "expired": lambda _: self.expired.set(),
            "prepared": lambda _: self.prepared.set(),
            "note": self._note,
        }
        try:
            while True:
                self._heard = anyio.current_time()
                frame: Any = await receive(lines, FROM_SANDBOX)
                if take := of_sandbox.get(frame["kind"]):
                    take(frame)
                elif answers := self.answers.get(frame["id"]):
                    answers.send_nowait(frame)
                elif self.call and frame["id"] == self.call.id and not self.call.ended.is_set():
                    await self.call.take(frame)
                    if frame["kind"] == "unfit":
                        self.call = None  # this sandbox's end must not cut it from the next one
                else:
                    strays += 1
                    if strays > 100_000:
                        raise ProtocolError("too many frames that belong to no call")
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.ClosedResourceError, anyio.BrokenResourceError):
            pass
        except (ProtocolError, anyio.DelimiterNotFound, anyio.WouldBlock) as error:
            self.fault = str(error) or "more answers than questions"
            if self.greeting:  # else it is the engine that speaks: Docker says there why a plug can't be run
                log.error("the sandbox %s is given up, it sent what no supervisor sends: %s", self.name, error)

    def _note(self, note: Note) -> None:
        """Log what the supervisor has to say, if that is not too much."""
        self._notes += 1
        if self._notes <= NOTES_LOGGED:
            log.warning("%s: %s", self.name, last_line(note["text"]))

    def _greet(self, greeting: Greeting, call: Call | None) -> None:
        """Enter the state that it is in, with the call whose end no host has been told. Raises ProtocolError."""
        if self.greeting or self.call:
            raise ProtocolError("a second greeting")
        self.packages = greeting["packages"]
        unread = greeting["unread"]
        if unread and greeting["kind"] == "ready":
            user, name = split_key(greeting["session"] or "")
            request = Request("", name or None, output_limit=BACKLOG_LIMIT, user=user)
            adopted = Call(request, unread, ran=greeting["ran"], is_adopted=True)
            self.call = call if call and call.id == unread else adopted
            self.call.go_on(greeting["told"], greeting["left"])
        self.greeting = greeting
        self._greeted.set()

    async def write(self, data: bytes) -> None:
        """Send bytes to the supervisor, if it is still there."""
        await send_quietly(self._pipe, data)

    def _kill_client(self) -> None:
        """Kill the engine's command line. The container does not depend on it."""
        with contextlib.suppress(ProcessLookupError):
            self.client.kill()

    def _last_words(self) -> str:
        said = last_line(self._errors.decode("utf-8", "replace"))
        return said or f"its process ended with exit status {self.client.returncode}"

    async def ask(self, question: Order | Use) -> ToQuestion:
        """Send a question and return its answer. Raises anyio.EndOfStream if the sandbox ends first."""
        with self.answers_to(question["id"]) as answers:
            await self.write(encoded(question))
            return await answers.receive()

    @contextmanager
    def answers_to(self, question: str) -> Iterator[MemoryObjectReceiveStream[ToQuestion]]:
        """Provide the answers to questions with this id, of which QUESTIONS_AHEAD may be unanswered at a time."""
        put, answers = anyio.create_memory_object_stream[ToQuestion](QUESTIONS_AHEAD)
        with put, answers:
            self.answers[question] = put
            if self.gone.is_set():
                put.close()
            try:
                yield answers
            finally:
                del self.answers[question]

    # ── a call ──

    async def begin(self, call: Call) -> None:
        """Place a call in this sandbox, whose last one has ended."""
        log.debug("call %s of %s in the container %s", call.id, call.request.key or "no session", self.name)
        call.attempts += 1
        if call.request.files:
            call.report(f"copying {files_in_words(len(call.request.files))} into the sandbox")
            try:
                await self.files.take_in(call.request.files)
            except SandboxError as error:
                if not self.gone.is_set():  # else another sandbox may take them
                    call.fail(error)
                    return
            call.report("")
        call.place()
        self.call = call
        if self.gone.is_set():
            self._lose(call)
        else:
            # Shielded: a caller that stops waiting just now must not leave a call placed that was never sent.
            with anyio.move_on_after(ATTACH_TIMEOUT, shield=True):
                await self.write(call.request.frames(call.id))

    async def finish(self, call: Call, on_output: OnOutput | None = None) -> None:
        """Wait until the call that was placed here has ended, or is cut from here. Give it up when it is overdue.

        It is overdue when its time is over and the sandbox is silent. It is not silent just because the caller takes
        output slowly: then this host does not read, the supervisor holds the code back, and its time does not pass.

        Raises HangError if the call is silent, and neither the supervisor nor the engine answers.
        """
        call.output.listen(on_output is not None)
        try:
            while call.is_placed:
                left = max(call.deadline, self._heard + HOST_PATIENCE) - anyio.current_time()
                if left <= 0:
                    silence = f"the sandbox itself did not answer for {HOST_PATIENCE:g} seconds"
                    message = f"{silence}, and was removed: is the host overloaded?"
                    call.end(dataclasses.replace(call.died(message), status="timeout"))
                    await self.remove()
                    return
                await call.wait(min(DOUBT_AFTER, left), on_output)
                if call.is_placed:
                    with anyio.move_on_after(left):
                        await self._require_answer()
            if on_output:
                await call.output.pass_on(on_output)  # of which some may have come with the answer
        finally:
            call.output.listen(False)

    async def interrupt(self) -> None:
        """Have the running code interrupted; how it ends is its call's result."""
        if self.call:
            await self.write(encoded({"op": "interrupt", "id": self.call.id}))

    async def cancel(self) -> None:
        """Have the code of a call stopped that no caller waits for any more, without waiting for its end."""
        with anyio.move_on_after(FAREWELL_TIMEOUT, shield=True):
            await self.interrupt()

    # ── the end ──

    async def leave(self) -> None:
        """Say farewell: a session stays, detached; anything else ends. Needs no engine command."""
        await self._part_with("farewell")

    async def end(self, must_know: bool = False) -> None:
        """End the container, in the quickest way that works.

        Raises HangError, if the caller must know, where it can't be found out whether it has ended.
        """
        await self._part_with("end")
        if must_know:
            with anyio.move_on_after(DOUBT_AFTER):
                await self.gone.wait()
                return
            await self._require_engine()
        with anyio.move_on_after(ATTACH_TIMEOUT):
            await self.gone.wait()
            return
        await self.remove()

    async def _part_with(self, word: Literal["farewell", "end"]) -> None:
        with anyio.move_on_after(FAREWELL_TIMEOUT, shield=True):
            await self.write(encoded({"op": word}))
            await self.gone.wait()

    async def use(self, session: str, packages: str) -> tuple[str, ...]:
        """Have the sandbox be this session's, with these packages; return the modules imported in another version.

        Raises anyio.EndOfStream if it can't: it has ended, or had preloaded other packages.
        """
        question: Use = {"op": "use", "id": secrets.token_hex(8), "session": session, "packages": packages}
        answer = None
        with anyio.move_on_after(ATTACH_TIMEOUT):  # threads that earlier calls left running may keep the worker busy
            answer = await self.ask(question)
        if answer and answer["kind"] == "unfit":
            raise anyio.EndOfStream
        self.packages = packages
        return tuple(answer["stale"]) if answer and answer["kind"] == "used" else ()

    async def recycle(self) -> bool:
        """Have the sandbox undo what its last call may have left; return whether nothing seems to be left."""
        with contextlib.suppress(anyio.EndOfStream), anyio.move_on_after(ATTACH_TIMEOUT):
            answer = await self.ask({"op": "recycle", "id": secrets.token_hex(8)})
            self.call = None
            return answer["kind"] == "recycled" and answer["clean"]
        return False

    async def rename(self, name: str) -> None:
        """Give the container another name. Raises EngineError if that one is taken."""
        await self.engine.run("rename", self.name, name)
        self.name = name

    async def remove(self) -> None:
        """Have the engine kill and remove the container, whatever state it is in."""
        with anyio.CancelScope(shield=True):
            await self.engine.remove(self.name)
            self._kill_client()


def why_not_started(last_words: str, image: Image, docker: DockerConfig) -> str:
    """Return why a sandbox could not be started, in the engine's words, and what to do."""
    said = f"A sandbox could not be started: {last_words.rstrip('.')}."
    if re.search("cgroup controller|cgroup is not mounted", said):
        return f"{said} {CGROUP_REMEDY}"
    if docker.gpus and re.search("device driver|nvidia|CDI", said):
        return f"{said} {GPU_REMEDY}"
    return (
        f"{said} The image {image.name} needs a python3, 3.8 or later; `python-docker-mcp doctor` looks at everything "
        "else."
    )


# ── files ──
#
# Files come in ahead of a call, and go out after it, over the sandbox's pipe: the user's own rights decide on the host,
# and no folder has to be shared with the engine. The host is not to believe the names that come out of a sandbox, nor
# what it finds in a folder that code may reach by a mount: it looks folder by folder, and follows no link.

CONTENT_LIMIT = 64 << 10  # bytes of a file whose content a result has, if it would be gone with the sandbox
CONTENTS_LIMIT = 256 << 10  # bytes of all such files


class Transfer:
    """Files on their way into a sandbox's working directory, and out of it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def read(self, path: str, offset: int, length: int | None) -> bytes:
        """Return a part of a file in the working directory, also while code runs. Raises RequestError, SessionError."""
        content = bytearray()
        async with contextlib.aclosing(self.pieces(path, offset, length)) as pieces:
            async for piece in pieces:
                content += piece["data"]
        return bytes(content[:length])

    async def pieces(self, path: str, offset: int = 0, length: int | None = None) -> AsyncGenerator[Piece]:
        """Yield the pieces of a file, to its end or to those with `length` bytes. Raises RequestError, SessionError."""
        question = secrets.token_hex(8)

        async def questions() -> AsyncGenerator[Read]:
            for place in itertools.count(offset, PIECE_SIZE):
                if length is not None and place >= offset + length:
                    return
                yield {"op": "read", "id": question, "path": path, "offset": place}

        async with contextlib.aclosing(self._exchange(question, questions())) as answers:
            async for piece in answers:
                if piece["kind"] != "file" or len(piece["data"]) > PIECE_SIZE:
                    raise SessionError(WRONG_ANSWER)
                if piece["problem"]:
                    raise RequestError(f"The file {last_line(path)!r} can't be read: {piece['problem']}.")
                yield piece
                if len(piece["data"]) < PIECE_SIZE:
                    return

    async def take_in(self, files: Sequence[InputFile]) -> None:
        """Put files of the host's into the working directory. Raises RequestError, SessionError."""
        left = sum(file.size for file in files)
        for file in files:
            question = secrets.token_hex(8)
            async with contextlib.aclosing(self._exchange(question, file.frames(question, left))) as answers:
                async for answer in answers:
                    if answer["kind"] != "written":
                        raise SessionError(WRONG_ANSWER)
                    if answer["problem"]:
                        raise RequestError(f"The file {file.name} can't be put into the sandbox: {answer['problem']}.")
            left -= file.size

    async def _exchange(self, question: str, frames: AsyncGenerator[Read | Write]) -> AsyncGenerator[ToQuestion]:
        """Send frames that are one question, some ahead of the answers, and yield those. Raises SessionError."""
        unanswered, more = 0, True
        try:
            async with contextlib.aclosing(frames):
                with self._sandbox.answers_to(question) as answers:
                    while True:
                        with anyio.fail_after(PIECE_TIMEOUT):
                            while more and unanswered < QUESTIONS_AHEAD:
                                if frame := await anext(frames, None):
                                    await self._sandbox.write(encoded(frame))
                                    unanswered += 1
                                else:
                                    more = False
                            if not unanswered:
                                return
                            answer = await answers.receive()
                        unanswered -= 1
                        yield answer
        except anyio.EndOfStream:
            raise SessionError("The session's container ended, and its files are gone.") from None
        except TimeoutError:
            raise SessionError(f"The session's container did not answer within {PIECE_TIMEOUT} seconds.") from None


@dataclass(frozen=True)
class InputFile:
    """A file on the host that a call is given."""

    name: str  # that it has in the working directory
    folder: Path  # without links in its path; none is followed below it
    path: str  # relative to the folder
    size: int = 0  # bytes

    @classmethod
    def find(cls, asked: str | os.PathLike[str], folders: Sequence[Path] | None = None) -> InputFile:
        """Find a file by its path: of the whole host or, if `folders` are given, only in these. Raises RequestError."""
        shown = textwrap.shorten(repr(os.fspath(asked)), 200)
        try:
            path = Path(asked).expanduser()
            places = [folder / path for folder in folders or [Path()]]
            place = next((place for place in places if os.path.lexists(place)), places[0])
            file, inside = place.resolve(), any(is_within(os.path.abspath(place), folder) for folder in folders or ())
        except (OSError, ValueError, RuntimeError) as error:  # a null byte, an unknown user's home, links in a circle
            raise RequestError(f"{shown} can't be the path of a file: {error}.") from None
        folder = file.parent
        if folders is not None:
            known = [folder for folder in folders if is_within(file, folder)]
            if not known:
                how = "is a link that leads out of" if inside else "is not in"
                names = " or ".join(map(str, folders))
                raise RequestError(f"{shown} {how} {names}: only files in there may be used (files.inputs).")
            folder = known[0]
        found = cls(place.name, folder, file.relative_to(folder).as_posix())
        try:
            descriptor = found.open()
        except FileNotFoundError:
            raise RequestError(f"There is no file {shown} on the host{alike(place) or '.'}") from None
        except OSError as error:
            is_folder = os.path.isdir(file)
            what = "is a folder: name the files in it" if is_folder else f"can't be read: {error.strerror or error}"
            raise RequestError(f"{shown} {what}.") from None
        try:
            return dataclasses.replace(found, size=os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def open(self) -> int:
        """Open it, and return the descriptor. Raises OSError."""
        return open_inside(str(self.folder), self.path)

    async def frames(self, question: str, needs: int) -> AsyncGenerator[Write]:
        """Yield the frames that write it in a sandbox. Raises RequestError if it has changed since it was found."""
        changed = f"The file {self.name} was changed while it was read: try again."
        try:
            descriptor = await anyio.to_thread.run_sync(self.open)
        except OSError as error:
            raise RequestError(f"The file {self.name} can't be read any more: {error.strerror or error}.") from None
        try:
            before = os.fstat(descriptor)
            for offset in range(0, self.size or 1, PIECE_SIZE):
                wanted = min(PIECE_SIZE, self.size - offset)
                data = await anyio.to_thread.run_sync(os.pread, descriptor, wanted, offset)
                now = os.fstat(descriptor)
                if len(data) < wanted or (now.st_size, now.st_mtime_ns) != (self.size, before.st_mtime_ns):
                    raise RequestError(changed)
                yield {
                    "op": "write",
                    "id": question,
                    "data": data,
                    "name": self.name,
                    "offset": offset,
                    "needs": needs,
                    "last": offset + wanted == self.size,
                }
        finally:
            os.close(descriptor)


def files_in_words(count: int) -> str:
    """Return how many files there are."""
    return "a file" if count == 1 else f"{count} files"


def alike(place: Path) -> str | None:
    """Return what a file that does not exist may have been meant to be, in words; None if nothing is like it."""
    with contextlib.suppress(OSError):
        files = [entry.name for entry in os.scandir(place.parent) if entry.is_file(follow_symlinks=False)]
        if found := difflib.get_close_matches(place.name, files, 1):
            return f": did you mean {found[0]}?"
    return None


def input_files(asked: Sequence[str | os.PathLike[str] | InputFile], config: Config) -> tuple[InputFile, ...]:
    """Find the files that a call is given, and see that the sandbox can take them all. Raises RequestError."""
    files = tuple(path if isinstance(path, InputFile) else InputFile.find(path) for path in asked)
    names = [file.name for file in files]
    if double := [name for name in names if names.count(name) > 1]:
        raise RequestError(f"Two of the files are called {double[0]}: pass them in two calls, or rename one.")
    size = sum(file.size for file in files)
    for setting, limit in (("files.limit", config.files.limit), ("docker.disk_limit", config.docker.disk_limit)):
        if size > size_in_bytes(limit):
            raise RequestError(f"The files come to {size} bytes, which is more than {setting} ({limit}) lets in.")
    return files


@dataclass(frozen=True)
class OutputFolder:
    """A folder on the host that receives the files of a call: a place that the operator chose, or a folder in it."""

    place: Path
    inner: str = ""  # one name, or nothing

    def full_path(self, path: str) -> str:
        """Return where a file of the sandbox is saved."""
        return str(self.place / self.inner / path)

    def open(self, path: str) -> PartialFile:
        """Start to save a file, making the folders that its path needs. Raises OSError."""
        *parts, name = [*([self.inner] if self.inner else []), *path.split("/")]
        if HARMFUL.search(path) or {"", ".", ".."} & {*parts, name}:
            raise OSError(errno.EINVAL, "no file can have this name")
        self.place.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
                require_spelling(part, folder)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            require_spelling(name, folder)
            return PartialFile(folder, name)
        except OSError:
            os.close(folder)
            raise


def require_spelling(name: str, folder: int) -> None:
    """Raise OSError if a file of another spelling is there that the host, such as macOS, takes for this one."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        if name not in os.listdir(folder):
            raise OSError(errno.EEXIST, "this host does not tell its name from that of another file")


class PartialFile:
    """A file on the host that is being written under another name, and then has its own at once."""

    def __init__(self, folder: int, name: str) -> None:
        """Create it. Raises OSError; otherwise the descriptor of the folder is its own, until `close`."""
        self._aside = f".python-docker-mcp-{secrets.token_hex(8)}"
        self._file = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
        self._folder = folder
        self._name = name

    def write(self, data: bytes) -> None:
        """Write the next bytes. Raises OSError."""
        while data:
            data = data[os.write(self._file, data) :]

    def keep(self) -> None:
        """Give it its name, in place of what has that now. Raises OSError, for one if that is a folder."""
        os.rename(self._aside, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def close(self) -> None:
        """Close it; unless it was kept, it is gone."""
        with contextlib.suppress(OSError):
            os.unlink(self._aside, dir_fd=self._folder)
        os.close(self._file)
        os.close(self._folder)


def output_folder(call: Call, config: FilesConfig) -> OutputFolder | None:
    """Return where a call's files are saved: in the folder that it names, or else in one for it in `files.output`."""
    session = call.request.session
    if call.request.output:
        return OutputFolder(Path(call.request.output).expanduser())
    if not config.output:
        return None
    inner = folder_name(session or f"{time.strftime('%Y-%m-%dT%H-%M-%S')}-{call.id[:4]}")
    return OutputFolder(Path(config.output).expanduser(), inner)


def folder_name(session: str) -> str:
    """Return a session's name as that of a folder: else it might be hidden, the folder itself, or the one around it."""
    return f"session{session}" if session.startswith(".") else session


async def save_file(sandbox: Sandbox, info: FileInfo, folder: OutputFolder, most: int) -> FileInfo:
    """Copy a sandbox's file to the host; return what was saved.

    Raises:
        OSError: the host can't take it; or it has more than `most` bytes, or was changed meanwhile.
        RequestError, SessionError: it can't be read.
    """
    if info.size > most:
        raise OSError(errno.EFBIG, f"its {info.size} bytes are more than files.limit has left for this call")
    file = await anyio.to_thread.run_sync(folder.open, info.path)
    try:
        size, versions = 0, set()
        async with contextlib.aclosing(sandbox.files.pieces(info.path, 0, most + 1)) as pieces:
            async for piece in pieces:
                await anyio.to_thread.run_sync(file.write, piece["data"])
                size += len(piece["data"])
                versions.add((piece["version"], piece["size"]))
        (version, stated), *others = versions
        if others or not version or stated != size or size > most:
            raise OSError(errno.EBUSY, "it was being changed while it was read")
        await anyio.to_thread.run_sync(file.keep)
        return dataclasses.replace(info, size=size, saved=folder.full_path(info.path))
    finally:
        file.close()


async def bring_out(sandbox: Sandbox | None, call: Call, config: Config) -> Result:
    """Return the result of a call that has ended with its files saved, and with a word on what happened.

    Raises the error that the call ended with.
    """
    result = call.tell()
    if sandbox and result.files:
        folder = output_folder(call, config.files)
        call.report(f"saving {files_in_words(len(result.files))}" if folder else "")
        result = await save_files(sandbox, result, folder, size_in_bytes(config.files.limit))
        call.report("")
    message = result.message
    if result.status == "out_of_memory":
        limit = config.docker.memory_limit
        limit = f"{int(limit) >> 20}m" if limit.isdigit() else limit
        needed = f"the code needed more memory than the sandbox may have ({limit})"
        message = f"{needed}; {message}" if message else needed
    elif result.status == "timeout" and not message:
        limit = f"within {call.request.timeout:g} seconds" if call.request.code else "in time"
        message = f"the code did not end {limit}"
    return dataclasses.replace(result, message=message)


async def save_files(sandbox: Sandbox, result: Result, folder: OutputFolder | None, most: int) -> Result:
    """Return the result with its files saved in the folder, `most` bytes of them, and reasons for those that are not.

    Small files that are not saved come with the result, if the sandbox ends with it.
    """
    files: list[FileInfo] = []
    left_out, contents, room = dict(result.files_left_out), {}, CONTENTS_LIMIT
    for info in result.files:
        if folder:
            try:
                info = await save_file(sandbox, info, folder, most)
                most -= info.size
            except OSError as error:
                left_out[info.path] = error.strerror or str(error)
            except SandboxError as error:
                left_out[info.path] = str(error).rstrip(".")
        files.append(info)
        if not info.saved and result.session is None and info.size <= min(CONTENT_LIMIT, room):
            with contextlib.suppress(SandboxError):
                contents[info.path] = await sandbox.files.read(info.path, 0, info.size)
                room -= len(contents[info.path])
    return dataclasses.replace(result, files=tuple(files), files_left_out=left_out, contents=contents)


# ── notebook ──
#
# What a session did, as a notebook (nbformat 4.5) that a person can read, check and run again. It is written after the
# result was returned, so that it costs no call, and by whichever program made the call.

NOTEBOOK = "session.ipynb"  # beside the files that a session writes
NOTEBOOKS_FOLDER = "notebooks"  # beside the configuration, for those that are not
NOTEBOOK_LIMIT = 8 << 20  # bytes of one; the outputs of its oldest cells are left out first
NOTEBOOKS_KEPT = 200  # in that folder
NOTEBOOK_DELAY = 0.3  # seconds after a call until it is written
NOTEBOOKS_HELD = 4  # in memory, so that they are not read again for each call
ABOUT_NOTEBOOK = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {
        "name": "python",
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "pygments_lexer": "ipython3",
    },
}
LEFT_OUT = {"output_type": "stream", "name": "stderr", "text": "[left out, as the notebook became too large]\n"}
NEW_SESSION = "*The session began anew: nothing of what is above was there any more.*"


@dataclass(frozen=True)
class NotebookPlace:
    """The file that a session's notebook is in."""

    folder: OutputFolder
    name: str

    @classmethod
    def find(cls, config: FilesConfig, user: str, session: str) -> NotebookPlace:
        """Return where a session's notebook is: beside its files if files.notebook wants so, or in our own folder."""
        if config.notebook and config.output:
            return cls(OutputFolder(Path(config.output).expanduser(), folder_name(session)), NOTEBOOK)
        own = CONFIG_PATH.with_name(NOTEBOOKS_FOLDER).expanduser()
        return cls(OutputFolder(own), f"{folder_name(session_key(user, session))}.ipynb")

    def read(self) -> list[str]:
        """Return the cells, each as JSON; none if there is no notebook, or none of ours."""
        path = self.folder.full_path(self.name)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), encoding="utf-8") as file:
                return [json.dumps(cell) for cell in json.loads(file.read(4 * NOTEBOOK_LIMIT))["cells"]]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return []

    def write(self, cells: Sequence[str]) -> None:
        """Put a notebook in the place of the one that is there. Raises OSError."""
        self.folder.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.folder.open(self.name)
        try:
            begin, end = '{"nbformat": 4, "nbformat_minor": 5, "metadata": ', ', "cells": [\n'
            file.write(f"{begin}{json.dumps(ABOUT_NOTEBOOK)}{end}{','.join(cells)}\n]}}\n".encode())
            file.keep()
        finally:
            file.close()

    def prune(self) -> None:
        """Remove the oldest notebooks of our own folder, if there are too many."""
        if self.name == NOTEBOOK:
            return
        found = sorted(self.folder.place.glob("*.ipynb"), key=lambda file: file.stat().st_mtime)
        for file in found[:-NOTEBOOKS_KEPT]:
            file.unlink(missing_ok=True)


class Notebooks:
    """Writes calls of sessions into their notebooks, one after the other."""

    def __init__(self) -> None:
        self._waiting: list[tuple[NotebookPlace, str, Result]] = []
        self._held: dict[NotebookPlace, list[str]] = {}
        self._writing = anyio.Lock(fast_acquire=True)

    def take(self, place: NotebookPlace, code: str, result: Result) -> None:
        """Have a call written soon."""
        self._waiting.append((place, code, result))

    async def write_soon(self) -> None:
        """Write all calls that wait after a moment, so that a burst of them is not slowed, and is written once."""
        await anyio.sleep(NOTEBOOK_DELAY)
        await self.write()

    async def write(self) -> None:
        """Write all calls that wait; log what can't be written."""
        async with self._writing:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._write, waiting)

    def _write(self, waiting: Sequence[tuple[NotebookPlace, str, Result]]) -> None:
        changed: dict[NotebookPlace, list[str]] = {}
        unknown = {place for place, _, _ in waiting if place not in self._held}
        for place, code, result in waiting:
            cells = self._held.pop(place, None)
            changed[place] = self._held[place] = extended(place.read() if cells is None else cells, code, result)
        for place, cells in changed.items():
            try:
                place.write(cells)
                if place in unknown:  # else there is not one more
                    place.prune()
            except OSError as error:
                log.warning("the notebook %s can't be written: %s", place.folder.full_path(place.name), error)
        while len(self._held) > NOTEBOOKS_HELD:
            del self._held[next(iter(self._held))]


def extended(cells: list[str], code: str, result: Result) -> list[str]:
    """Return a notebook's cells with a call, and within NOTEBOOK_LIMIT."""
    outputs = [*(outputs_of(result.unread) if result.unread else []), *outputs_of(result)]
    if result.is_new and cells:
        cells = [*cells, new_cell("markdown", NEW_SESSION)]
    if not code.strip():  # what a call did whose end was waited for
        last = json.loads(cells[-1]) if cells else {}
        if not outputs or last.get("cell_type") != "code":
            return cells
        cells = [*cells[:-1], json.dumps({**last, "outputs": [*last["outputs"], *outputs]})]
    else:
        count = sum('"cell_type": "code"' in cell[:40] for cell in cells) + 1
        lines = code.splitlines()
        if FENCE.match(next(filter(str.strip, lines), "")):
            code = "\n".join(inside_fences(lines)).strip("\n")  # a notebook would refuse the fences
        cells = [*cells, new_cell("code", code, execution_count=count, outputs=outputs)]
    size = sum(map(len, cells))
    for number, cell in enumerate(cells[:-1]):
        fields = json.loads(cell) if size > NOTEBOOK_LIMIT else {}
        if fields.get("outputs"):
            cells[number] = json.dumps({**fields, "outputs": [LEFT_OUT]})
            size += len(cells[number]) - len(cell)
    while size > NOTEBOOK_LIMIT and len(cells) > 1:
        size -= len(cells.pop(0))
    return cells


def new_cell(kind: Literal["code", "markdown"], source: str, **more: Any) -> str:
    """Return a cell."""
    return json.dumps({"cell_type": kind, "id": secrets.token_hex(8), "metadata": {}, "source": source, **more})


def outputs_of(result: Result) -> list[dict[str, Any]]:
    """Return what a call showed, in the forms of a notebook."""
    outputs: list[dict[str, Any]] = []
    if result.lost_before:
        outputs.append(stream("stderr", f"[the session's variables had been lost: {result.lost_before}]\n"))
    if result.earlier:
        outputs.append(stream("stdout", result.earlier))
    has_value = False
    for item in result.output:
        if isinstance(item, Text):
            outputs.append(stream(item.stream, item.text))
        elif isinstance(item, Omitted):
            outputs.append(stream("stderr", f"[{item.bytes} bytes left out]\n"))
        else:
            has_value |= item.is_value
            plain = {"text/plain": result.value} if item.is_value and result.value is not None else {}
            data = {**plain, **bundle_of(item.forms)}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    if result.value is not None and not has_value:
        value = {"text/plain": result.value}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": value})
    if error := result.exception:
        lines = error.traceback.splitlines()
        outputs.append({"output_type": "error", "ename": error.type, "evalue": error.message, "traceback": lines})
    if result.message and result.status not in ("ok", "error", "running"):
        outputs.append(stream("stderr", f"[{result.message}]\n"))
    if result.state == "lost":
        outputs.append(stream("stderr", "[the session's variables are lost]\n"))
    return outputs


def stream(name: str, text: str) -> dict[str, Any]:
    """Return output as text."""
    return {"output_type": "stream", "name": name, "text": text}


def bundle_of(forms: Mapping[str, str]) -> dict[str, Any]:
    """Return rich output; what is JSON stands there as such."""
    bundle: dict[str, Any] = dict(forms)
    for kind, text in forms.items():
        if kind == "application/json" or kind.endswith("+json"):
            with contextlib.suppress(ValueError, RecursionError):
                bundle[kind] = json.loads(text)
    return bundle


# ── network ──
#
# A sandbox has no network interface. Where docker.network_allow names hosts, the supervisor listens on its own loopback
# as an HTTP proxy would, and the proxy is here: it parses what the code asks for, decides, resolves, connects,
# and relays. TLS stays end to end. Nothing of this host's environment, cookies or credentials is added.

CONNECTIONS_AT_ONCE = 32  # of one sandbox; others wait for their turn
CONNECTIONS_A_SECOND = 100  # after as many as may be open at once; others wait, too
TURN_TIMEOUT = 60  # seconds that a connection waits until it is refused
REFUSALS_TOLD = 5  # of one call
CONNECTION_IDLE = 120  # seconds without a byte after which a connection is closed if another one waits for its place,
ANSWER_IDLE = 660  # and if none does: language models may think for ten minutes
CONNECT_TIMEOUT = 15  # seconds to resolve a name, and as many to connect
HEAD_LIMIT = 16 << 10  # bytes of a request's head, and of a TLS ClientHello
NOT_PASSED_ON = {
    b"connection",
    b"proxy-connection",
    b"keep-alive",
    b"proxy-authorization",
    b"te",
    b"trailer",
    b"upgrade",
}
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
OF_A_HOP = {b"connection", b"proxy-connection", b"keep-alive"}  # fields of an answer's head
LABEL_OF_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
traffic_log = log.getChild("network")  # a line for each connection
GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)
OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
FIRST_DIALED = 1 << 32  # number of a connection from which on this host has opened them
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedError(Exception):
    """A connection is refused: the HTTP status to answer with, and the sentence."""


def host_name(text: str) -> str:
    """Return a host's name, or an address, as it is compared. Raises ValueError for what is neither."""
    name = text.lower().removesuffix(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]") if name.startswith("[") else name))
    labels = name.split(".")
    if len(name) > 253 or not all(map(LABEL_OF_NAME.fullmatch, labels)) or re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]):
        raise ValueError(f"{text!r} is not the name of a host")
    return name


@dataclass(frozen=True)
class HostRule:
    """One entry of docker.network_allow."""

    name: str  # a name or an address; "" for every name
    subdomains: bool = False  # whether the names below it are meant, and not itself
    port: int | None = None  # None for the usual one

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Parse `name`, `*.name`, `*`, or an address, with a port after a colon if need be. Raises ValueError."""
        match = re.fullmatch(r"(\*\.)?(\*|\[[^\]]*\]|[^:*\[\]]+)(?::(\d{1,5}))?", text)
        try:
            if not match or (match[1] and match[2] == "*") or not 0 < int(match[3] or 1) < 65536:
                raise ValueError
            name = match[2] if match[2].isascii() else idna.encode(match[2], uts46=True).decode()
            return cls("" if name == "*" else host_name(name), bool(match[1]), int(match[3]) if match[3] else None)
        except (ValueError, idna.IDNAError):
            raise ValueError(f"{text!r} is not a host such as example.com, *.example.com or localhost:8080") from None

    def allows(self, host: str, port: int, usual: int) -> bool:
        """Whether it allows connections to this host and port, where `usual` is the port of this kind of request."""
        if port != (self.port or usual):
            return False
        if self.subdomains:
            return host.endswith(f".{self.name}")
        return host == self.name or (not self.name and not is_address(host))


def is_address(host: str) -> bool:
    """Whether a host, as `host_name` returns it, is an address."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's, and no other is hidden in it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner: ipaddress.IPv4Address | None = None
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast and (inner is None or is_public(str(inner)))


def server_name(hello: bytes) -> str | None:
    """Return the server's name in a TLS ClientHello, "" if there is none; None if the hello is not complete.

    Raises ValueError if it is no such thing.
    """
    found: list[str | None] = []

    def note(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> int:
        found.append(name)
        return ssl.ALERT_DESCRIPTION_ACCESS_DENIED

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = note  # called before the handshake needs a certificate
    received = ssl.MemoryBIO()
    received.write(hello)
    try:
        context.wrap_bio(received, ssl.MemoryBIO(), server_side=True).do_handshake()
    except ssl.SSLWantReadError:
        return None
    except ssl.SSLError:
        if found:
            return (found[0] or "").lower()
    raise ValueError("no TLS ClientHello")


class Network:
    """Rules on the hosts that code may reach: those of docker.network_allow, and those that have a secret."""

    def __init__(self, allowed: Sequence[str], credentials: Credentials | None = None) -> None:
        self.allowed = ", ".join(allowed) or "no hosts"
        self.rules = [HostRule.parse(text) for text in allowed]
        self.credentials = credentials or Credentials(Config())

    def rule(self, host: str, port: int, usual: int) -> HostRule:
        """Return the rule that allows a connection. Raises RefusedError."""
        for rule in self.rules:
            if rule.allows(host, port, usual):
                return rule
        where = host if port == usual else f"{host}:{port}"
        raise RefusedError(403, f"{where} was refused: docker.network_allow has {self.allowed}")

    def _lists(self, address: str, port: int, rule: HostRule) -> bool:
        """Whether an address is listed itself, with this port or with none; `rule` is the one of its name."""
        return any(one.name == address and one.port in (None, port) for one in self.rules if one is not rule)

    async def connect(self, host: str, port: int, rule: HostRule, scheme: str) -> tuple[anyio.abc.ByteStream, str]:
        """Connect to a host, or else to the proxy that this server's environment names for it; return its address, too.

        Of the host, all addresses are checked first. Raises RefusedError.
        """
        if proxy := proxy_for(host, scheme):
            return await self._connect_to_proxy(proxy, host, port, scheme), proxy
        return await self._connect_directly(host, port, rule), ""

    async def _connect_to_proxy(self, proxy: str, host: str, port: int, scheme: str) -> anyio.abc.SocketStream:
        """Connect to the server's own proxy and, for TLS, through it. It resolves the name, and checks no address."""
        parts = urllib.parse.urlsplit(proxy)
        try:
            with anyio.fail_after(CONNECT_TIMEOUT):
                stream = await anyio.connect_tcp(parts.hostname or "", parts.port or 80)
                if scheme == "https":
                    try:
                        await self._open_tunnel(stream, proxy, f"{host}:{port}")
                    except BaseException:
                        await anyio.aclose_forcefully(stream)
                        raise
            return stream
        except (OSError, anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError):
            raise RefusedError(502, f"{host} can't be reached: this server's own proxy does not answer") from None

    async def _open_tunnel(self, stream: anyio.abc.SocketStream, proxy: str, target: str) -> None:
        """Have the server's own proxy open a tunnel."""
        head = [f"CONNECT {target} HTTP/1.1", f"Host: {target}", *credentials_for(proxy), "", ""]
        await stream.send("\r\n".join(head).encode())
        answer = BufferedByteReceiveStream(stream)
        line = (await answer.receive_until(b"\r\n\r\n", HEAD_LIMIT)).partition(b"\r\n")[0].decode("latin-1")
        if answer.buffer or not re.match(r"HTTP/1\.[01] 200\b", line):
            raise RefusedError(502, f"{target} was refused by this server's own proxy: {last_line(line)}")

    async def _connect_directly(self, host: str, port: int, rule: HostRule) -> anyio.abc.SocketStream:
        addresses = [host]
        try:
            if not is_address(host):
                with anyio.fail_after(CONNECT_TIMEOUT):
                    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
                private = [one for one in addresses if not (is_public(one) or self._lists(one, port, rule))]
                if rule.name != "localhost" and private:
                    raise RefusedError(
                        403,
                        f"{host} was refused: its name leads to {private[0]}, which is not public; "
                        "docker.network_allow can list that address beside the name",
                    )
            with anyio.fail_after(CONNECT_TIMEOUT):
                for address in addresses[:-1]:
                    with contextlib.suppress(OSError):
                        return await anyio.connect_tcp(address, port)
                return await anyio.connect_tcp(addresses[-1], port)
        except (OSError, UnicodeError, IndexError) as error:
            raise RefusedError(502, f"{host} can't be reached: {error}") from None


def proxy_for(host: str, scheme: str) -> str:
    """Return the address of the proxy by which this server is to reach a host, "" if it is to connect directly."""
    if host == "localhost" or is_address(host) or urllib.request.proxy_bypass(host):
        return ""
    found = urllib.request.getproxies()
    return found.get(scheme) or found.get("all") or ""


def credentials_for(proxy: str) -> list[str]:
    """Return the header with a proxy's password, if its address has one."""
    parts = urllib.parse.urlsplit(proxy)
    if parts.username is None:
        return []
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return [f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}"]


class Connection:
    """A connection of the code's to the proxy, as the proxy has it."""

    def __init__(self, number: int, write: Callable[[Pass], Awaitable[None]], is_wanted: Callable[[], bool]) -> None:
        self.number = number
        self.is_wanted = is_wanted  # whether another one waits for its place
        self.waits: anyio.CancelScope | None = anyio.CancelScope()  # as long as it waits for its turn
        self.received = self.sent = 0  # bytes
        self.used = anyio.current_time()
        self._write = write
        self._inbox = bytearray()
        self._owed = 0  # bytes taken out of the inbox, for which the code has no new credit yet
        self._credit = TAKEN_AHEAD
        self._heard = self._ended = False
        self._news = anyio.Event()

    def take(self, frame: Passed) -> None:
        """Enter what came from the sandbox. Raises ProtocolError."""
        self.used = anyio.current_time()
        self._inbox += frame["data"]
        self._credit = min(self._credit + frame["credit"], TAKEN_AHEAD)
        self._heard, self._ended = True, self._ended or frame["ended"]
        if len(self._inbox) > SENT_AHEAD:
            raise ProtocolError("more of a connection than was credited")
        self._news.set()
        self._news = anyio.Event()

    async def is_open(self) -> bool:
        """Wait for the first frame, and return whether it was not the end."""
        while not self._heard:
            await self._news.wait()
        return not self._ended

    async def receive(self) -> bytes:
        """Return the next bytes from the code, b"" at their end. What was returned before counts as passed on."""
        owed, self._owed = self._owed, 0
        if owed:
            with anyio.CancelScope(shield=True):  # or a reader that stops waiting would cost the code its credit
                await self._pass(credit=owed)
        while not self._inbox and not self._ended:
            await self._news.wait()
        data = bytes(self._inbox)
        self._inbox.clear()
        self._owed = len(data)
        self.received += len(data)
        return data

    async def send(self, data: bytes) -> None:
        """Send bytes to the code, as fast as it takes them. Raises anyio.BrokenResourceError if it has gone."""
        while data:
            while not self._credit and not self._ended:
                await self._news.wait()
            if self._ended:
                raise anyio.BrokenResourceError
            piece, data = data[: self._credit], data[self._credit :]
            self._credit -= len(piece)
            self.sent += len(piece)
            self.used = anyio.current_time()
            await self._pass(piece)

    async def end(self) -> None:
        """Tell the code that there is no more."""
        if not self._ended:
            self._ended = True
            await self._pass(ended=True)

    async def _pass(self, data: bytes = b"", credit: int = 0, ended: bool = False) -> None:
        await self._write({"op": "pass", "flow": self.number, "data": data, "credit": credit, "ended": ended})


class ConnectionStream(anyio.abc.ByteStream):
    """A connection as a stream, whose `first` bytes have been received already."""

    def __init__(self, connection: Connection, first: bytes = b"", forget: Callable[[], object] = lambda: None) -> None:
        self._connection = connection
        self._first = first
        self._forget = forget

    async def send(self, item: bytes) -> None:
        """Send bytes. Raises anyio.BrokenResourceError if the other end has gone."""
        await self._connection.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:  # noqa: ARG002  # a frame's bytes are few enough
        """Return the next bytes. Raises anyio.EndOfStream."""
        data, self._first = self._first, b""
        if data := data or await self._connection.receive():
            return data
        raise anyio.EndOfStream

    async def send_eof(self) -> None:
        """Do nothing: the other end sees it when the connection is closed."""

    async def aclose(self) -> None:
        """Close it."""
        with anyio.move_on_after(FAREWELL_TIMEOUT, shield=True):
            await self._connection.end()
        self._forget()


class Proxy:
    """The proxy of one sandbox."""

    def __init__(self, network: Network, sandbox: Sandbox) -> None:
        self.network = network
        self._sandbox = sandbox
        self.open: dict[int, Connection] = {}
        self._places = anyio.Semaphore(CONNECTIONS_AT_ONCE)
        self._next = 0.0  # when the next one may be served, of those that come too fast
        self._dialed = 0  # connections to the code's own servers so far
        self.last = 0  # the highest number so far

    def tell(self, sentence: str) -> None:
        """Have the running call tell that it was refused something."""
        if self._sandbox.call and len(self._sandbox.call.refused) < REFUSALS_TOLD:
            self._sandbox.call.refused[sentence] = None

    def take(self, frame: Passed, tasks: anyio.abc.TaskGroup) -> None:
        """Enter a frame; serve a connection that it opens in `tasks`. Raises ProtocolError."""
        number = frame["flow"]
        if number >= FIRST_DIALED:
            if number in self.open:
                self.open[number].take(frame)
            return
        if number > self.last:
            # Those that the code has closed are gone here, too, unless they have a place: in no order are there more.
            if len(self.open) > FLOWS_OPEN + 2 * CONNECTIONS_AT_ONCE:
                raise ProtocolError("more connections than a supervisor has")
            self.last = number
            self.open[number] = Connection(number, self._pass, self._is_short)
            tasks.start_soon(self._serve, self.open[number])
        if connection := self.open.get(number):  # else it is over here, and the code does not know yet
            connection.take(frame)
            if frame["ended"] and connection.waits:
                connection.waits.cancel()
                del self.open[number]  # as the supervisor has: else those that come now would be too many

    def _is_short(self) -> bool:
        """Whether a connection waits for a place."""
        return self._places.statistics().tasks_waiting > 0

    async def _pass(self, frame: Pass) -> None:
        await self._sandbox.write(encoded(frame))

    async def _serve(self, connection: Connection) -> None:
        """Admit a connection in its turn, find its route, relay to its end, and write a line on it to the log."""
        if not await self._admit(connection):
            self.open.pop(connection.number, None)
            return
        where, verdict = "", ""
        who = (self._sandbox.call and self._sandbox.call.request.key) or self._sandbox.name
        try:
            with anyio.fail_after(CONNECTION_IDLE):
                request, http = await read_request(connection)
            host, port, path = target_of(request)
            where = f"{host}:{port}"
            if found := self.network.credentials.at(host, port, path, self._sandbox.user):
                verdict = await CredentialRoute(self.network, found, path, who, self.tell).serve(
                    connection, request, http
                )
                return
            route = await self._route(host, port, path)
            async with route.there:
                if path is None:
                    verdict = "closed, as it did not begin with TLS for that host"
                first, rest = await route.begin(connection, request, http)
                verdict = "passed"
                await relay(connection, route, first, rest)
        except RefusedError as error:
            status, verdict = error.args
            if status == 403:
                self.tell(verdict)
            with contextlib.suppress(anyio.BrokenResourceError):
                await connection.send(refusal(status, verdict))
        except (*GONE, TimeoutError):
            pass
        except Exception as error:  # it must not cost the sandbox more than this connection
            traffic_log.warning("network: %s failed: %r", where or "a request", error)
        finally:
            self._places.release()
            self.open.pop(connection.number, None)
            traffic_log.info(
                "network: %s, %s: %s; %d bytes out, %d in",
                who, where or "?", verdict or "cut", connection.received, connection.sent,
            )  # fmt: skip
            if not self._sandbox.gone.is_set():
                with anyio.move_on_after(FAREWELL_TIMEOUT, shield=True):
                    await connection.end()

    async def _route(self, host: str, port: int, path: str | None) -> Route:
        """Connect to a host, or to a server of the code's own. Raises RefusedError."""
        try:
            rule = self.network.rule(host, port, 443 if path is None else 80)
            there, proxy = await self.network.connect(host, port, rule, "https" if path is None else "http")
        except RefusedError:
            own = await self._dial(port) if host in OWN_HOSTS else None
            if own is None:
                raise
            there, proxy = own, ""  # no server of the host's is meant, but one of the code's
        return Route(host, port, path, there, proxy)

    async def _dial(self, port: int) -> anyio.abc.ByteStream | None:
        """Have the supervisor connect to a server of the code's own; return the connection, None if there is none."""
        self._dialed += 1
        number = FIRST_DIALED + self._dialed
        connection = self.open[number] = Connection(number, self._pass, self._is_short)
        await self._sandbox.write(encoded({"op": "dial", "flow": number, "port": port}))
        with anyio.fail_after(CONNECT_TIMEOUT):
            if await connection.is_open():
                return ConnectionStream(connection, forget=lambda: self.open.pop(number, None))
        del self.open[number]
        return None

    async def _admit(self, connection: Connection) -> bool:
        """Wait for a place among CONNECTIONS_AT_ONCE; return whether it was had, and the code still wants it."""
        assert connection.waits is not None
        with connection.waits, anyio.move_on_after(TURN_TIMEOUT) as late:
            await self._places.acquire()
            connection.waits = None
            now = anyio.current_time()
            self._next = max(self._next, now - CONNECTIONS_AT_ONCE / CONNECTIONS_A_SECOND) + 1 / CONNECTIONS_A_SECOND
            try:
                await anyio.sleep(max(0.0, self._next - now))
            except BaseException:
                self._places.release()
                raise
            return True
        if late.cancelled_caught:
            traffic_log.info("network: %s: a connection was refused, as it had waited too long", self._sandbox.name)
            words = f"{CONNECTIONS_AT_ONCE} connections are open, and none was closed for {TURN_TIMEOUT} seconds"
            with contextlib.suppress(anyio.BrokenResourceError):
                await connection.send(refusal(503, words))
                await connection.end()
        return False


@dataclass(frozen=True)
class Route:
    """How a connection goes on to its server, and what of its beginning is rewritten for that."""

    host: str
    port: int
    path: str | None  # None for a tunnel
    there: anyio.abc.ByteStream  # to the server, or to this server's own proxy
    proxy: str  # that one's address, or ""

    async def begin(
        self, connection: Connection, request: h11.Request, http: h11.Connection
    ) -> tuple[bytes, AsyncIterator[bytes]]:
        """Return what to send first, and all that follows it. Raises RefusedError."""
        if self.path is None:
            await connection.send(ESTABLISHED)
            return await read_hello(connection, self.host, http.trailing_data[0]), chunks_of(connection)
        target = f"http://{self.host}:{self.port}{self.path}" if self.proxy else self.path
        return head_for_server(request, target, self.proxy), body_of(connection, http, is_chunked(request))


async def relay(connection: Connection, route: Route, first: bytes, rest: AsyncIterator[bytes]) -> None:
    """Pass bytes both ways until the server has no more, the code has gone, or nothing comes for a long time."""
    there, is_tunnel = route.there, route.path is None

    async def upwards() -> None:
        await there.send(first)
        async for data in rest:
            await there.send(data)
        if is_tunnel:  # after a request, the answer is still to come
            tasks.cancel_scope.cancel()
        while await connection.receive():
            pass  # more than the one request
        tasks.cancel_scope.cancel()

    async def downwards() -> None:
        with contextlib.suppress(anyio.EndOfStream):
            answer = b"" if is_tunnel else await read_answer(there)
            while True:
                await connection.send(answer or await there.receive(PIECE_SIZE))
                answer = b""
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            for task in (upwards, downwards):
                tasks.start_soon(task)
            tasks.start_soon(close_when_idle, connection, tasks.cancel_scope)
    except* (anyio.BrokenResourceError, anyio.ClosedResourceError, h11.RemoteProtocolError):
        pass  # one of the two has gone


async def close_when_idle(connection: Connection, scope: anyio.CancelScope) -> None:
    """Cancel what serves a connection over which nothing has passed for long."""
    while anyio.current_time() < connection.used + (CONNECTION_IDLE if connection.is_wanted() else ANSWER_IDLE):
        await anyio.sleep(CONNECTION_IDLE / 10)
    scope.cancel()


async def read_request(connection: Connection) -> tuple[h11.Request, h11.Connection]:
    """Return the head of the request on a connection, and its parser. Raises RefusedError, anyio.EndOfStream."""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            data = await connection.receive()
            if not data:
                raise anyio.EndOfStream
            http.receive_data(data)
    except h11.RemoteProtocolError as error:
        raise RefusedError(400, f"that is no request to a proxy: {error}") from None
    if not isinstance(event, h11.Request):
        raise anyio.EndOfStream
    if len(event.target) + sum(len(key) + len(value) for key, value in event.headers) > HEAD_LIMIT:
        raise RefusedError(400, f"that is no request to a proxy: its head has more than {HEAD_LIMIT} bytes")
    return event, http


def target_of(request: h11.Request) -> tuple[str, int, str | None]:
    """Return host, port and, unless a tunnel is asked for, path of a request. Raises RefusedError."""
    target = request.target.decode("latin-1")
    name = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)"
    try:
        if request.method == b"CONNECT":
            match = re.fullmatch(rf"{name}:(\d{{1,5}})", target)
            path = None
        else:
            match = re.fullmatch(rf"http://{name}(?::(\d{{1,5}}))?((?:[/?][!-~]*)?)", target)
            path = match[3] if match else ""
        if not match:
            raise ValueError("its target is none that is passed on")
        host, port = host_name(match[1]), int(match[2] or 80)
        if not 0 < port < 65536:
            raise ValueError("no such port")
        if path is not None:
            (said,) = [value.decode("latin-1").lower() for key, value in request.headers if key == b"host"]
            if said not in (match[1].lower(), f"{match[1].lower()}:{port}"):
                raise ValueError("its Host is not the host of its target")
    except ValueError as error:
        raise RefusedError(400, f"that is no request to a proxy: {error}") from None
    return host, port, path if path is None or path.startswith("/") else f"/{path}"


def is_chunked(request: h11.Request) -> bool:
    """Whether a request's body comes in chunks; the only other transfer coding that there is, h11 has refused."""
    return any(key == b"transfer-encoding" for key, _ in request.headers)


def passed_on(request: h11.Request) -> list[tuple[bytes, bytes]]:
    """Return a request's fields without those that are meant for us."""
    dropped = NOT_PASSED_ON | ({b"content-length"} if is_chunked(request) else set())
    for key, value in request.headers:
        if key == b"connection":
            dropped |= {name.strip() for name in value.lower().split(b",")}
    return [(name, value) for name, value in request.headers if name not in dropped]


def head_for_server(request: h11.Request, target: str, proxy: str = "") -> bytes:
    """Return the head of a request as its server, or our own `proxy`, gets it."""
    lines = [b"%s %s HTTP/1.1" % (request.method, target.encode())]
    lines += [b"%s: %s" % field for field in passed_on(request)]
    lines += [line.encode() for line in credentials_for(proxy)]
    return b"\r\n".join([*lines, b"connection: close", b"", b""])


async def read_answer(there: anyio.abc.ByteStream) -> bytes:
    """Return the beginning of a server's answer, with a head which says that this connection is not used again.

    Whether it is belongs to each hop (RFC 9110, 7.6.1), and a client that is not told may send to one that is closing.
    """
    answer, begun = b"", 0
    while len(answer) <= HEAD_LIMIT:
        head, found, rest = answer[begun:].partition(b"\r\n\r\n")
        if not found:
            try:
                answer += await there.receive(PIECE_SIZE)
            except anyio.EndOfStream:
                break
        elif re.match(rb"HTTP/1\.[01] 1\d\d\b", head):
            begun += len(head + found)  # the answer itself is still to come
        else:
            first, *fields = head.split(b"\r\n")
            kept = [field for field in fields if field.partition(b":")[0].strip().lower() not in OF_A_HOP]
            return answer[:begun] + b"\r\n".join([first, *kept, b"connection: close"]) + found + rest
    return answer


async def chunks_of(connection: Connection) -> AsyncIterator[bytes]:
    """Yield what the code sends."""
    while data := await connection.receive():
        yield data


async def body_of(connection: Connection, http: h11.Connection, in_chunks: bool) -> AsyncIterator[bytes]:
    """Yield the body of the one request, framed anew; what comes after it is dropped. Raises RemoteProtocolError."""
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await connection.receive())
        elif isinstance(event, h11.Data):
            yield b"%x\r\n%s\r\n" % (len(event.data), event.data) if in_chunks else bytes(event.data)
    if in_chunks:
        yield b"0\r\n\r\n"


async def read_hello(connection: Connection, host: str, first: bytes) -> bytes:
    """Return the TLS ClientHello that a tunnel has to begin with. Raises RefusedError, anyio.EndOfStream."""
    hello = bytearray(first)
    try:
        with anyio.fail_after(CONNECT_TIMEOUT):
            while not hello or (name := server_name(bytes(hello))) is None:
                data = await connection.receive()
                if not data or len(hello) > HEAD_LIMIT:
                    raise anyio.EndOfStream
                hello += data
    except ValueError:
        raise anyio.EndOfStream from None
    if name != ("" if is_address(host) else host):
        raise anyio.EndOfStream
    return bytes(hello)


def refusal(status: int, sentence: str) -> bytes:
    """Return the answer to a request that is refused; most libraries show its first line."""
    text = "".join(char if " " <= char <= "~" else "?" for char in sentence)
    head = f"HTTP/1.1 {status} {text}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(text) + 1}\r\n\r\n{text}\n".encode()


# ── secrets ──
#
# Code uses a credential that it never has. Requests to a host that has a secret end here: those by http://, and those
# by TLS, for which an authority of this installation makes certificates that only sandboxes trust. Each is parsed by
# h11, checked, written anew with the credential, and sent on by TLS; in the answer, the credential is masked.

VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")  # in the header of a secret
COMMAND_TIMEOUT = 30  # seconds that the command may take which prints a secret
RETRY_AFTER = 5  # seconds after which a command that failed is run again, if a request asks for it
VALUE_LEAST = 8  # characters; a shorter value would be masked in the middle of words
AUTHORITY_FILE = "authority.key"  # beside the configuration
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 30
CLOCK_SKEW = datetime.timedelta(days=2)  # by which a sandbox's clock may be behind this host's
UNCLEAR = re.compile(r"//|/\.{1,2}([/;]|$)|\\|%2e|%2f|%5c|%25|[\x00-\x20\x7f]", re.IGNORECASE)  # in a path
MISLEADING = {  # what has servers take a request for another one; and what is answered here
    b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-original-url", b"x-rewrite-url", b"expect",
}  # fmt: skip
NEVER_SECRET = {  # fields that no secret can be in
    b"host", b"content-length", b"transfer-encoding", b"accept-encoding", *NOT_PASSED_ON, *MISLEADING,
}  # fmt: skip
UNTRUSTED = (
    "{host} was not reached: its credential is added outside, and the client does not trust the certificates for that, "
    "which are in os.environ['SSL_CERT_FILE']: name that file to it (stripe.ca_bundle_path = "
    "os.environ['SSL_CERT_FILE']), or ask by http://, which goes on as https"
)


class Credential:
    """A secret of the configuration: for which requests it is, and how its value is found."""

    def __init__(self, name: str, config: SecretConfig) -> None:
        self.name = name
        self.config = config
        self.rule = HostRule.parse(config.host)
        self.host, self.port = self.rule.name, self.rule.port or 443
        self.place, self._form = config.place()
        self._printed: str | None = None  # by the command
        self._failed = (-math.inf, "")  # when it failed last, and how
        self._running = anyio.Lock(fast_acquire=True)

    def why_not(self, method: str, path: str) -> str | None:
        """Return why it is not for such a request, None if it is. Raises RefusedError for a path of two meanings."""
        methods = self.config.methods
        if methods and method not in methods and not (method == "HEAD" and "GET" in methods):
            return f"secrets.{self.name}.methods has {', '.join(methods)}"
        if self.config.paths:
            plain = path.partition("?")[0]
            if UNCLEAR.search(plain):
                raise RefusedError(403, f"{method} at {self.host} was refused: its path could be taken for another one")
            plain = urllib.parse.unquote(plain)
            if not any(re.fullmatch(".*".join(map(re.escape, one.split("*"))), plain) for one in self.config.paths):
                return f"secrets.{self.name}.paths has {', '.join(self.config.paths)}"
        return None

    async def value(self) -> tuple[str, list[bytes]]:
        """Return what goes in the header or query, and the parts of it that are secret. Raises RefusedError."""
        printed = await self._print() if self.config.command else None
        try:
            values = self.values(printed)
        except ValueError as error:
            raise RefusedError(403, f"{error}") from None
        shown = VARIABLE.sub(lambda found: values[found[1]], self._form)
        scheme, _, pair = shown.partition(" ")
        if scheme.lower() == "basic" and ":" in pair:  # a name and a password, as encoded they have none
            shown = f"{scheme} {base64.b64encode(pair.encode()).decode()}"
        parts = {*values.values(), *map(urllib.parse.quote_plus, values.values()), shown.rpartition(" ")[2]}
        return shown, [part.encode() for part in parts]

    def values(self, printed: str | None = None) -> dict[str, str]:
        """Return what goes in the header's places. Raises ValueError, without a word of it, for what can't."""
        values = {}
        for name in VARIABLE.findall(self._form):
            value = values[name] = (os.environ.get(name, "") if printed is None else printed).strip()
            what = f"the variable {name}" if printed is None else "what its command printed"
            if not value:
                raise ValueError(f"secrets.{self.name}: {what} is not set where this server runs")
            if not re.fullmatch(r"[!-~]+( +[!-~]+)*", value):
                raise ValueError(f"secrets.{self.name}: {what} has characters that a header can't have")
            if len(value) < VALUE_LEAST:
                raise ValueError(f"secrets.{self.name}: {what} has fewer than {VALUE_LEAST} characters")
            if any(value in text for text in self.config.environment.values()):
                raise ValueError(f"secrets.{self.name}.env: the secret itself is there, and code would have it")
        return values

    async def _print(self) -> str:
        """Return what the command prints, which is run once."""
        async with self._running:
            if self._printed is None and time.monotonic() > self._failed[0] + RETRY_AFTER:
                program = self.config.command[0]
                try:
                    with anyio.fail_after(COMMAND_TIMEOUT):
                        ended = await anyio.run_process(self.config.command, stdin=subprocess.DEVNULL, check=False)
                    if ended.returncode:
                        why = f"{program} ended with the exit status {ended.returncode}: run it by hand to see why"
                    else:
                        self._printed = ended.stdout.decode("utf-8", "replace")
                        return self._printed
                except TimeoutError:
                    why = f"{program} took longer than {COMMAND_TIMEOUT} seconds"
                except OSError as error:
                    why = f"{program} can't be run: {error.strerror}"
                self._failed = time.monotonic(), f"secrets.{self.name}: its command {why}"
            if self._printed is None:
                raise RefusedError(403, self._failed[1])
            return self._printed


def require_secrets(config: Config) -> None:
    """Raise ConfigError if the value of a secret can't be used, or is not there. Of commands, this runs none."""
    for name, secret in config.secrets.items():
        if not secret.command:
            try:
                Credential(name, secret).values()
            except ValueError as error:
                raise ConfigError(f"{error}.") from None


class Credentials:
    """The secrets of a configuration, and both sides' TLS: of the sandboxes, and of the hosts that have a secret."""

    def __init__(self, config: Config) -> None:
        self._all = [Credential(name, secret) for name, secret in config.secrets.items()]
        self._package = config.package
        self._authority: Authority | None = None
        self._loading = anyio.Lock(fast_acquire=True)

    def at(self, host: str, port: int, path: str | None, user: str) -> list[Credential]:
        """Return the credentials that a user's code may use at a host; `path` is None for TLS."""
        port = 443 if path is not None and port == 80 else port
        return [one for one in self._all if (one.host, one.port) == (host, port) and one.config.is_for(user)]

    async def run_commands(self) -> None:
        """Run the commands that print secrets ahead of the first request; log what fails."""
        for one in self._all:
            try:
                await one.value()
            except RefusedError as error:
                log.warning("%s", error.args[1])

    async def certificate(self) -> str:
        """Return the authority's certificate, "" if no host has a secret. Raises ConfigError."""
        authority = await self.authority()
        return authority.certificate if authority else ""

    async def authority(self) -> Authority | None:
        """Return the authority, None if no host has a secret. Raises ConfigError if its key can't be used."""
        async with self._loading:
            if self._all and not self._authority:
                hosts = [one.host for one in self._all]
                self._authority = await anyio.to_thread.run_sync(
                    Authority, CONFIG_PATH.with_name(AUTHORITY_FILE), hosts
                )
            return self._authority

    @functools.cached_property
    def of_hosts(self) -> ssl.SSLContext:
        """How a host's certificate is verified: as this server's own programs would, or by package.ca_bundle."""
        context = ssl.create_default_context()
        if bundle := host_certificates(self._package)[0]:
            context.load_verify_locations(cadata=bundle.encode("ascii", "ignore").decode())
        return context


class Authority:
    """Makes certificates for the hosts that have a secret; those for others no client would accept.

    Of it, only the key is kept. A sandbox that trusts an earlier server's certificate trusts that of this one, too, for
    the hosts that the earlier one had. The library is imported here only, as it takes 60 ms, and few have secrets.
    """

    def __init__(self, file: Path, hosts: Sequence[str]) -> None:
        from cryptography import x509

        self._key = load_key(file.expanduser())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "python-docker-mcp, in sandboxes only")])
        no_addresses = [x509.IPAddress(ipaddress.ip_network(every)) for every in ("0.0.0.0/0", "::/0")]
        limits = x509.NameConstraints([x509.DNSName(host) for host in dict.fromkeys(hosts)], no_addresses)
        self.certificate = self._signed(self._name, self._key, AUTHORITY_DAYS, {limits: True})
        self._contexts: dict[str, tuple[float, ssl.SSLContext]] = {}  # by host, with the time until which to use it

    def context(self, host: str) -> ssl.SSLContext:
        """Return how to be this host for the code."""
        until, context = self._contexts.get(host) or (0.0, None)
        if context is None or time.time() > until:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.set_alpn_protocols(["http/1.1"])
            with tempfile.TemporaryDirectory() as folder:  # ssl takes them from files only
                Path(folder, "certificate").write_text(self._certificate(host))
                context.load_cert_chain(Path(folder, "certificate"))
            self._contexts[host] = time.time() + CERTIFICATE_DAYS * 43200, context
        return context

    def _certificate(self, host: str) -> str:
        """Return a certificate for a host, and its key."""
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host[:64])])
        names = x509.SubjectAlternativeName([x509.DNSName(host)])
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return key_text(key) + self._signed(subject, key, CERTIFICATE_DAYS, {names: False, purpose: False})

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, more: Mapping[x509.ExtensionType, bool]
    ) -> str:
        """Return a certificate with more extensions, each critical or not; the authority's own if it has that name."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        public, is_own, now = key.public_key(), subject == self._name, datetime.datetime.now(datetime.UTC)
        rights = [not is_own, False, False, False, False, is_own, False, False, False]
        extensions: dict[x509.ExtensionType, bool] = {
            x509.BasicConstraints(is_own, 0 if is_own else None): True,
            x509.KeyUsage(*rights): True,
            x509.SubjectKeyIdentifier.from_public_key(public): False,
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()): False,
            **more,
        }
        new = x509.CertificateBuilder().issuer_name(self._name).subject_name(subject).public_key(public)
        new = new.serial_number(x509.random_serial_number()).not_valid_before(now - CLOCK_SKEW)
        new = new.not_valid_after(now + datetime.timedelta(days))
        for extension, is_critical in extensions.items():
            new = new.add_extension(extension, is_critical)
        return new.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def key_text(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a key as it is kept in a file."""
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()).decode()


def load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Return the authority's key, made anew if there is no such file. Raises ConfigError if it can't be used."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    said = f"The key {file}, by which sandboxes trust this server,"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # with the mode 0600
            with os.fdopen(descriptor, "w") as new:
                new.write(key_text(ec.generate_private_key(ec.SECP256R1())))
            os.replace(aside, file)
        if sys.platform != "win32" and file.stat().st_mode & 0o077:
            raise ConfigError(f"{said} is open to others: `chmod 600 {file}`.")
        key = serialization.load_pem_private_key(file.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError
        return key
    except OSError as error:
        raise ConfigError(f"{said} can't be read: {error.strerror}.") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{said} is none: remove it, and a new one is made.") from None


class Mask:
    """Replaces secrets in what a host answers by as many asterisks, also where one comes in pieces."""

    def __init__(self, values: Sequence[bytes]) -> None:
        self._values = sorted(values, key=len, reverse=True)
        self._any = re.compile(b"|".join(map(re.escape, self._values)))
        self._kept = b""  # the end of what came, as far as it may be the beginning of one

    def whole(self, data: bytes) -> bytes:
        """Return data without secrets."""
        return self._any.sub(lambda found: b"*" * len(found[0]), data)

    def piece(self, data: bytes) -> bytes:
        """Return what can be passed on now that this piece has come."""
        data = self.whole(self._kept + data)
        starts = (
            n for one in self._values for n in range(min(len(one) - 1, len(data)), 0, -1) if data.endswith(one[:n])
        )
        kept = max(starts, default=0)
        data, self._kept = data[: len(data) - kept], data[len(data) - kept :]
        return data

    def rest(self) -> bytes:
        """Return what is left at the end."""
        data, self._kept = self._kept, b""
        return data


class CredentialRoute:
    """How requests of the code's go on to a host that has a secret."""

    def __init__(
        self,
        network: Network,
        credentials: Sequence[Credential],
        path: str | None,
        who: str,
        tell: Callable[[str], None],
    ) -> None:
        self._network = network
        self._credentials = credentials
        self._host, self._port = credentials[0].host, credentials[0].port
        self._place = self._host if self._port == 443 else f"{self._host}:{self._port}"
        self._path = path  # of the first request; None if the code speaks TLS
        self._who = who  # for the log
        self._tell = tell  # has the running call tell what was refused
        self._there: anyio.abc.ByteStream | None = None
        self._client = h11.Connection(h11.CLIENT)

    async def serve(self, connection: Connection, request: h11.Request, http: h11.Connection) -> str:
        """Serve requests until the code has no more, or does nothing for long; return what became of them."""
        code: anyio.abc.ByteStream = ConnectionStream(connection)
        first: h11.Request | None = request
        if self._path is None:
            encrypted = await self._end_tls(connection, http.trailing_data[0])
            if encrypted is None:
                return "closed, as TLS did not begin"
            code, first = encrypted, None
            http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_LIMIT)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close_when_idle, connection, tasks.cancel_scope)
                while await self._serve_one(code, http, first):
                    first = None
                tasks.cancel_scope.cancel()
        except* (*GONE, h11.ProtocolError, OSError):
            pass  # one of the two has gone
        finally:
            await self._hang_up()
            with anyio.move_on_after(FAREWELL_TIMEOUT, shield=True), contextlib.suppress(*GONE, OSError):
                await code.aclose()
        return "passed"

    async def _end_tls(self, connection: Connection, first: bytes) -> anyio.abc.ByteStream | None:
        """Be the host for the code; return what is encrypted, None if it wants no such TLS."""
        await connection.send(ESTABLISHED)
        hello = await read_hello(connection, self._host, first)
        if b"\x02h2" in hello and b"\x08http/1.1" not in hello:
            self._tell(
                f"{self._host} was not reached: it has a secret, so only HTTP/1.1 is passed on, not HTTP/2 or gRPC"
            )
            return None
        authority = await self._network.credentials.authority()
        assert authority is not None
        try:
            with anyio.fail_after(CONNECT_TIMEOUT):
                return await TLSStream.wrap(
                    ConnectionStream(connection, hello), server_side=True, ssl_context=authority.context(self._host)
                )
        except ssl.SSLError:
            self._tell(UNTRUSTED.format(host=self._host))
        return None

    async def _serve_one(self, code: anyio.abc.ByteStream, http: h11.Connection, request: h11.Request | None) -> bool:
        """Serve a request, the next one if none is given; return whether another may follow it."""
        what = "a request"
        try:
            request = request or await self._next_request(code, http)
            if request is None:
                return False
            what = self._what(request)
            sent, names, mask = await self._checked(request)
            if self._there is None:
                self._there, self._client = await self._connect(), h11.Connection(h11.CLIENT)
            status = await self._exchange(sent, code, http, mask)
            traffic_log.info("network: %s, %s: %s: %s, with the secret %s", self._who, self._place, what, status, names)
        except RefusedError as error:
            status, sentence = error.args
            traffic_log.info("network: %s, %s: %s: %s", self._who, self._place, what, sentence)
            if status == 403:
                self._tell(sentence)
            if http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await code.send(refusal(status, sentence))
            return False
        if {self._client.our_state, self._client.their_state} == {h11.DONE}:
            self._client.start_next_cycle()
        else:
            await self._hang_up()
        if {http.our_state, http.their_state} != {h11.DONE}:
            return False
        http.start_next_cycle()
        return True

    def _target(self, request: h11.Request) -> str:
        return request.target.decode("latin-1") if self._path is None else self._path

    def _what(self, request: h11.Request) -> str:
        """Return a request in words, without its query."""
        return f"{request.method.decode()} {self._target(request).partition('?')[0]:.200}"

    async def _next_request(self, code: anyio.abc.ByteStream, http: h11.Connection) -> h11.Request | None:
        """Return the next request, None if there is none; hang up if the host does meanwhile. Raises RefusedError."""
        found: Any = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hear_end)
            try:
                found = await next_event(http, code)
            except h11.RemoteProtocolError as error:
                found = RefusedError(400, f"that is no request: {error}")
            tasks.cancel_scope.cancel()
        if isinstance(found, RefusedError):
            raise found
        return found if isinstance(found, h11.Request) else None

    async def _hear_end(self) -> None:
        if self._there:
            with contextlib.suppress(*GONE, OSError):
                await self._there.receive(1)
            await self._hang_up()  # whatever it says, it has not been asked

    async def _checked(self, request: h11.Request) -> tuple[h11.Request, str, Mask]:
        """Return a request as the host gets it, the names of the secrets used, and their mask. Raises RefusedError."""
        target = self._target(request)
        require_clear(request, target, {self._host, f"{self._host}:{self._port}"} if self._path is None else None)
        reasons = {one: one.why_not(request.method.decode(), target) for one in self._credentials}
        used = [one for one, reason in reasons.items() if not reason]
        if not used:
            why = ", ".join(filter(None, reasons.values()))
            raise RefusedError(403, f"{self._what(request)} at {self._place} was refused: {why}")
        fields: dict[bytes, bytes] = {b"host": self._place.encode(), b"accept-encoding": b"identity"}
        hidden: list[bytes] = []
        for one in used:
            value, parts = await one.value()
            if one.config.query:
                target = with_parameter(target, one.place, value)
            else:
                fields.setdefault(one.place.encode(), value.encode())
            hidden += parts
        stands_in = {text.encode() for one in self._credentials for text in one.config.environment.values()}
        headers = [*fields.items(), *own_fields(request, fields, stands_in)]
        sent = h11.Request(method=request.method, target=target, headers=headers)
        return sent, ", ".join(one.name for one in used), Mask(hidden)

    async def _connect(self) -> anyio.abc.ByteStream:
        """Connect to the host, whose certificate has to be in order. Raises RefusedError."""
        rule, of_hosts = self._credentials[0].rule, self._network.credentials.of_hosts
        stream, _ = await self._network.connect(self._host, self._port, rule, "https")
        try:
            with anyio.fail_after(CONNECT_TIMEOUT):
                return await TLSStream.wrap(
                    stream, hostname=self._host, ssl_context=of_hosts, standard_compatible=False
                )
        except (*GONE, OSError) as error:
            await anyio.aclose_forcefully(stream)
            why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else "TLS did not begin"
            raise RefusedError(502, f"{self._host} can't be reached: {why}") from None

    async def _hang_up(self) -> None:
        there, self._there = self._there, None
        if there:
            await anyio.aclose_forcefully(there)

    async def _exchange(
        self, request: h11.Request, code: anyio.abc.ByteStream, http: h11.Connection, mask: Mask
    ) -> str:
        """Pass a request on, and its answer back; return the answer's status. Raises RefusedError if there is none."""
        there, client, status = self._there, self._client, ""
        assert there is not None

        async def upwards() -> None:
            try:
                while not isinstance(event := await next_event(http, code), h11.EndOfMessage):
                    with contextlib.suppress(*GONE):  # it may answer, and close, before it has all of it
                        await there.send(client.send(h11.Data(data=event.data)))
                with contextlib.suppress(*GONE):
                    await there.send(client.send(h11.EndOfMessage()))
                data = await code.receive()
            except (*GONE, h11.RemoteProtocolError):
                tasks.cancel_scope.cancel()  # the code has gone
            else:
                http.receive_data(data)  # of the next request

        async with anyio.create_task_group() as tasks:
            try:
                await there.send(client.send(request))
                tasks.start_soon(upwards)
                status = await self._downwards(code, http, mask)
            except (*GONE, OSError, h11.RemoteProtocolError):
                pass  # the host has gone, or speaks something else
            tasks.cancel_scope.cancel()
        if not status and http.our_state is h11.SEND_RESPONSE:
            raise RefusedError(502, f"{self._host} did not answer as HTTP/1.1 does")
        return status or "cut"

    async def _downwards(self, code: anyio.abc.ByteStream, http: h11.Connection, mask: Mask) -> str:
        """Pass an answer on to the code, and return its status."""
        assert self._there is not None
        status = ""
        while True:
            event = await next_event(self._client, self._there)
            if isinstance(event, h11.Response):
                status = str(event.status_code)
                fields = [(name, mask.whole(value)) for name, value in event.headers if name not in OF_A_HOP]
                if self._path is not None:
                    fields.append((b"connection", b"close"))  # the next request may be for another host
                answer = h11.Response(status_code=event.status_code, headers=fields, reason=mask.whole(event.reason))
                await code.send(http.send(answer))
            elif isinstance(event, h11.Data):
                if data := mask.piece(event.data):
                    await code.send(http.send(h11.Data(data=data)))
            elif isinstance(event, h11.EndOfMessage):
                if data := mask.rest():
                    await code.send(http.send(h11.Data(data=data)))
                await code.send(http.send(h11.EndOfMessage()))
                return status
            elif not isinstance(event, h11.InformationalResponse):
                raise anyio.EndOfStream


def require_clear(request: h11.Request, target: str, hosts: Set[str] | None) -> None:
    """Raise RefusedError for a request that is understood in several ways, or can't have a credential.

    If `hosts` are given, its Host is to be one of them.
    """
    given = dict(request.headers)
    said = [value.decode("latin-1").lower() for name, value in request.headers if name == b"host"]
    if request.method in (b"TRACE", b"CONNECT"):
        raise RefusedError(405, f"{request.method.decode()} was refused: the answer could show the host's secret")
    if b"websocket" in given.get(b"upgrade", b"").lower():
        raise RefusedError(403, "a WebSocket was refused: to a host that has a secret, only HTTP is passed on")
    if not re.fullmatch('/[!"$-~]*', target) or {b"content-length", b"transfer-encoding"} <= given.keys():
        raise RefusedError(400, "that is no request: it could be understood in two ways")
    if hosts and (len(said) != 1 or said[0] not in hosts):
        raise RefusedError(400, "that is no request: its Host is not the one of the connection")
    if given.get(b"authorization", b"").startswith(b"AWS4-"):
        raise RefusedError(403, "a request was refused: code signs it (AWS, boto3), for which it would need the secret")


def with_parameter(target: str, name: str, value: str) -> str:
    """Return a request's target with this parameter in its query, in place of the code's own of that name."""
    path, _, query = target.partition("?")
    own = [(part, urllib.parse.unquote_plus(part.partition("=")[0])) for part in query.split("&") if part]
    kept = [part for part, said in own if said.partition("[")[0].strip().lower() != name.lower()]
    return f"{path}?{'&'.join([*kept, f'{name}={urllib.parse.quote_plus(value)}'])}"


def own_fields(
    request: h11.Request, replaced: Mapping[bytes, bytes], stands_in: Set[bytes]
) -> list[tuple[bytes, bytes]]:
    """Return the code's own fields of a request that go on.

    None does that is replaced (some servers take X_API_KEY for X-Api-Key), that misleads servers, or has what only
    stands in for a secret: some libraries send it in two fields.
    """
    left_out = {name.replace(b"_", b"-") for name in (*replaced, *MISLEADING)}
    return [
        (name, value)
        for name, value in passed_on(request)
        if name.replace(b"_", b"-") not in left_out and value.rpartition(b" ")[2] not in stands_in
    ]


async def next_event(http: h11.Connection, stream: anyio.abc.ByteStream) -> Any:
    """Return what comes next of a request or an answer. Raises h11.RemoteProtocolError, or one of GONE."""
    while (event := http.next_event()) is h11.NEED_DATA:
        if http.they_are_waiting_for_100_continue:
            await stream.send(http.send(h11.InformationalResponse(status_code=100, headers=[])))
        try:
            http.receive_data(await stream.receive())
        except anyio.EndOfStream:
            http.receive_data(b"")
    return event


# ── protocol ──
#
# A frame is a JSON object on a line of its own. Where it has `data`, a number, that many bytes follow the line as they
# are, because encoding what is large as JSON would cost more than everything else. In memory, `data` is those bytes.
#
# These types define the frames. The host validates every line from a sandbox with FROM_SANDBOX; the supervisor looks at
# the names of fields in what the worker sends (WORKER_FIELDS); and where the guest writes or reads a frame, the
# annotation, which is never evaluated there, has the type checker compare the two.

Count = Annotated[int, pydantic.Field(ge=0, le=1 << 62)]
Number = Annotated[int, pydantic.Field(ge=-(1 << 62), le=1 << 62)]
Seconds = Annotated[float, pydantic.Field(ge=0, le=1e12)]
SessionId = Annotated[str, pydantic.Field(pattern=f"^{SESSION_ID}$")]
SessionKey = Annotated[str, pydantic.Field(pattern=f"^(?:{USER_NAME}~)?{SESSION_ID}$")]
Data = Annotated[  # on the wire, the number of bytes that follow
    bytes, pydantic.GetPydanticSchema(lambda *_: pydantic_core.core_schema.int_schema(ge=0, le=DATA_LIMIT, strict=True))
]


Stdio = Literal["stdout", "stderr"]
StopReason = Literal["timeout", "cancelled"]


# From the host to the supervisor


class Run(TypedDict):
    """Run code, which is the data, after a frame `state` with the same id if the call has variables."""

    op: Literal["run"]
    id: str
    data: Data
    session: str | None
    final: bool  # whether the sandbox ends with the call
    timeout: float
    filename: str | None
    argv: Sequence[str]
    output_limit: int | None
    state_limit: int
    packages: NotRequired[str | None]  # folder of the packages installed for the session: the supervisor adds it


class Use(TypedDict):
    """Have the session use this folder of packages; answered by `used`, or by `unfit` as a call."""

    op: Literal["use"]
    id: str
    session: str
    packages: str


class GiveState(TypedDict):
    """Give the next call its variables: a JSON object."""

    op: Literal["state"]
    id: str
    data: Data


class Read(TypedDict):
    """Read a piece of a file in the working directory; answered by `file`."""

    op: Literal["read"]
    id: str
    path: str
    offset: int


class Write(TypedDict):
    """Write a piece of a file that the next call is given; answered by `written`. It is in its place after the last."""

    op: Literal["write"]
    id: str
    data: Data
    name: str
    offset: int
    needs: int  # bytes of this file and of those that come after it
    last: bool


class Order(TypedDict):
    """Interrupt a call; answer with a `pong`; or undo what the last call may have left, and answer `recycled`."""

    op: Literal["interrupt", "ping", "recycle"]
    id: str


class Parting(TypedDict):
    """Detach, so that a session stays; or end."""

    op: Literal["farewell", "end"]


class Pass(TypedDict):
    """Pass bytes on over a connection to the proxy, take more of them from there, or end it."""

    op: Literal["pass"]
    flow: int
    data: Data
    credit: int
    ended: bool


class Dial(TypedDict):
    """Connect to a server of the code's own, on the sandbox's loopback; bytes pass as on a connection to the proxy."""

    op: Literal["dial"]
    flow: int
    port: int


ToSupervisor = Run | Use | GiveState | Read | Write | Order | Parting | Pass | Dial


class PlugRequest(TypedDict):
    """Request of a plug for this session, or for a sandbox without one that has these settings."""

    session: str | None
    settings: str | None
    owner: str
    details: bool  # whether the status is to tell of variables and files
    authority: str  # certificate of the authority that its server's hosts with a secret have, "" if there are none


# From the supervisor to the worker


class WorkerOrder(TypedDict):
    """Go on after a display or a turn; or leave a copy of yourself, which will name this key."""

    op: Literal["proceed", "copy"]
    key: NotRequired[str]


# From the worker, which runs the user's code, to the supervisor, and on to the host


class Display(TypedDict):
    """Rich output: a JSON object of texts by MIME type."""

    kind: Literal["display"]
    id: str
    data: Data
    is_value: bool


class State(TypedDict):
    """The variables after the call: a JSON object; and why the others are not in it, by name."""

    kind: Literal["state"]
    id: str
    data: Data
    left_out: dict[str, str]


class ExceptionFields(TypedDict):
    """The exception that ended the code, see ExceptionInfo."""

    type: str
    message: str
    line: Number | None
    traceback: str
    missing: str | None


class EndOfCall(TypedDict):
    """The fields of a report that the supervisor passes on as they are. The worker leaves out what does not apply."""

    kind: Literal["done"]
    id: str
    cpu: Seconds
    memory: NotRequired[Count | None]
    value: NotRequired[str]
    value_length: NotRequired[Count]
    exit_code: NotRequired[Number]
    exception: NotRequired[ExceptionFields]
    stale: NotRequired[list[str]]


class Report(EndOfCall):
    """How the code ended."""

    status: Literal["ok", "error"]
    variables: NotRequired[dict[str, str]]  # for the supervisor


class Turn(TypedDict):
    """The code is about to write to its other stream: read the first one, and say so."""

    kind: Literal["turn"]
    id: str


class Clear(TypedDict):
    """Notice that nothing counts of what the call has shown so far."""

    kind: Literal["clear"]
    id: str


class CodeEnded(TypedDict):
    """The code has come to its end; showing its figures and variables is not its own work, and not its time."""

    kind: Literal["ended"]
    id: str


class Used(TypedDict):
    """The packages are used from now on; names the modules that had been imported in another version."""

    kind: Literal["used"]
    id: str
    stale: list[str]


FromWorker = Display | State | Turn | Clear | CodeEnded | Used | Report


# From the supervisor to the host


class Greeting(TypedDict):
    """The state of a sandbox, to the host that it is now attached to (`ready`) or only answers (`status`)."""

    kind: Literal["ready", "status"]
    session: SessionKey | None
    attached: bool
    owner: str
    unread: str | None  # id of the last call, until a host has been sent its end
    told: Count  # bytes of that call's output sent to a host
    state: Variables  # fate of the variables in the last call
    packages: str | None
    busy: bool
    ran: Seconds
    left: Seconds
    age: Seconds
    idle: Seconds
    memory: Count | None
    variables: NotRequired[dict[str, str]]  # names, with types and sizes
    files: NotRequired[tuple[Count, Count]]  # how many there are in the working directory, and their bytes


class Notice(TypedDict):
    """The supervisor lets go; the session was not used for too long; or a worker has preloaded everything."""

    kind: Literal["farewell", "expired", "prepared"]


class Note(TypedDict):
    """A remark for the log."""

    kind: Literal["note"]
    text: str


class Recycled(TypedDict):
    """The sandbox was cleaned after its last call, and whether nothing was left of that."""

    kind: Literal["recycled"]
    id: str
    clean: bool


class Answer(TypedDict):
    """A call has begun; can't begin, as its sandbox preloaded other packages; or a ping came through."""

    kind: Literal["begun", "unfit", "pong"]
    id: str


class Output(TypedDict):
    """Text that the code wrote during the call, or that what earlier calls left running wrote since."""

    kind: Literal["stdout", "stderr", "earlier"]
    id: str
    data: Data


class Gap(TypedDict):
    """Bytes of output left out here."""

    kind: Literal["omitted"]
    id: str
    bytes: Count


class Written(TypedDict):
    """A piece of a file was written, or why it can't be."""

    kind: Literal["written"]
    id: str
    problem: str | None


class Piece(TypedDict):
    """A piece of a file, or why it can't be read."""

    kind: Literal["file"]
    id: str
    data: Data
    problem: str | None
    size: Count  # of the whole file
    version: str  # changes when the file does, within a tick of the kernel's clock; "" if it did just now


EndStatus = Literal["ok", "error", "timeout", "out_of_memory", "cancelled", "died"]


class Done(EndOfCall):
    """The end of a call: the worker's report, or the supervisor's if the worker is gone."""

    status: EndStatus
    wall: Seconds
    oom_kills: Count
    state: Variables  # unless preserved, the worker that ran the code is gone
    lost_before: str | None  # why the last one was gone before this call
    behind: Count  # if it was restored: calls before this one whose work is missing
    message: NotRequired[str | None]
    files: list[tuple[str, Count]]  # made or changed since the last call's end: path and size
    files_left_out: dict[str, str]  # others: name to reason


OfCall = Answer | Output | Gap | Clear | Display | State | Done


class Passed(TypedDict):
    """The same the other way; the first with its number tells that the code has opened the connection."""

    kind: Literal["passed"]
    flow: Count
    data: Data
    credit: Count
    ended: bool


ToQuestion = Answer | Recycled | Written | Piece | Used
FromSandbox = Greeting | Notice | Note | Passed | ToQuestion | OfCall


# From the installer to the host


class InstallerProgress(TypedDict):
    """Progress of the installer's work."""

    kind: Literal["progress"]
    text: str
    step: NotRequired[Count]


class InstallerReport(TypedDict):
    """Outcome of the installer's work."""

    kind: Literal["done"]
    ok: bool
    output: NotRequired[str]
    folder: NotRequired[str]
    installed: NotRequired[list[tuple[str, str]]]
    present: NotRequired[str | None]  # version of the requested package, if the image has it


FromInstaller = InstallerProgress | InstallerReport


class ProtocolError(Exception):
    """A container sent something that our program in it never sends: nothing from it is to be trusted any more."""


async def receive(stream: BufferedByteReceiveStream, frames: pydantic.TypeAdapter[T]) -> T:
    """Read the next frame.

    Raises:
        ProtocolError: it is none of `frames`.
        anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound: the stream ended, or the line has no end.
    """
    line = await stream.receive_until(b"\n", LINE_LIMIT)
    try:
        frame = frames.validate_json(line)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ProtocolError(f"{'.'.join(map(str, problem['loc'])) or 'a frame'}: {problem['msg']}") from None
    fields: Any = frame
    if "data" in fields:
        parts: list[bytes] = []  # receive_exactly() would copy them three times
        left = fields["data"]
        while left:
            parts.append(await stream.receive(left))
            left -= len(parts[-1])
        fields["data"] = b"".join(parts)
    return frame


def decoded(data: bytes) -> str:
    """Decode a frame's text. Raises ProtocolError."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError("a frame's text is not UTF-8") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object that the worker made. Raises ValueError for anything else, for NaN and for deep nesting."""
    value = pydantic_core.from_json(data, allow_inf_nan=False)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


# ════════ guest: from here to the closing line, this module is shipped into every sandbox (see GUEST_SOURCE) ════════

# ── entry ──


def supervise(settings: str) -> None:
    """Run the guest, with its channel moved off descriptors 0 and 1, which other code uses by habit."""
    told = json.loads(settings)
    prepare_files(told)
    channel = Channel(os.dup(0), os.dup(1))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    Supervisor(told).run(channel)


def plug() -> None:
    """Pass the standard input and output of a `docker exec` to the supervisor, and stay while it uses them."""
    import array
    import os
    import socket

    request = b""
    while not request.endswith(b"\n"):  # one byte at a time: what follows is for the supervisor
        byte = os.read(0, 1)
        if not byte:
            return
        request += byte
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0python-docker-mcp")
        connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))])
        connection.recv(1)  # returns when the supervisor lets go


# ── shared by host and guest ──
#
# Python 3.8, and only the modules in GUEST_MODULES: this is used in the host, in the supervisor and in the worker.

PROTOCOL = 7  # version of the frames and the plug; raised by a change that older sandboxes would not understand
LINE_LIMIT = 1 << 20  # bytes of a frame's line; with the next, bounds what a hostile frame costs its reader
DATA_LIMIT = 4 << 20  # bytes of a frame's data
READ_SIZE = 1 << 16  # bytes of one read from a pipe
PARTS_WRITTEN = 64  # of frames, at once; the kernel takes up to 1,024
ENCODER = json.JSONEncoder(separators=(",", ":"))  # shared: json.dumps() would make one per frame
BACKLOG_LIMIT = 32 << 20  # bytes of frames kept for the next host while the session is detached
RICH_LIMIT = 24 << 20  # characters of rich output (base64 included) in one call
FRAME_COST = 512  # bytes that a frame of a call counts for besides its data; bounds how many there are
STATE_LIMIT = DATA_LIMIT  # bytes of variables passed into a call, or returned by it
STATE_DEPTH = 64
PLAIN_TYPES = {type(None), bool, str, int, float, list, tuple, dict}
CALL_LIMIT = RICH_LIMIT + STATE_LIMIT + (1 << 20)  # bytes that a call returns besides its output and report
FILES_LISTED = 1000  # of the files that a call made or changed
HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # in a name
PIECE_SIZE = 1 << 19  # bytes of a file that are read or written at once
PROXY_PORT = 3128  # on the sandbox's own loopback
SENT_AHEAD = 1 << 18  # bytes that the code may send on a connection before the host has passed them on
TAKEN_AHEAD = 1 << 21  # bytes that the host may send before the code has taken them: the pipe is slow to answer
FLOWS_OPEN = 128  # connections at once; more wait to be accepted
COPY_ADDRESS = "\0python-docker-mcp-copy"
PLUG_UID = 65533  # `docker exec` can run as this user; the code, being another without capabilities, can't

with contextlib.suppress(ImportError):  # on Windows, where only the host's part runs
    import fcntl
    import resource  # now: os.wait4() would import it in the middle of the first call


class Outbox:
    """Bytes that wait until they can be written. They are not joined: to copy a file's pieces would take longer."""

    def __init__(self) -> None:
        self.size = 0
        self.parts: deque[bytes | memoryview] = deque()

    def add(self, data: bytes) -> None:
        """Add bytes at the end."""
        if data:
            self.parts.append(data)
            self.size += len(data)

    def write(self, write: Callable[[list[bytes | memoryview]], int]) -> int:
        """Have `write` take some of the parts; return how many bytes it took. Raises what it raises."""
        written = left = write(list(itertools.islice(self.parts, PARTS_WRITTEN)))
        self.size -= written
        while self.parts and left >= len(self.parts[0]):
            left -= len(self.parts.popleft())
        if left:
            self.parts[0] = memoryview(self.parts[0])[left:]
        return written


class Channel:
    """A channel for frames: one descriptor to read from and one to write to.

    A frame is a JSON object on a line of its own. If its `data` is a number, that many raw bytes follow the line: large
    data would cost more as JSON than everything else on its way. In memory, `data` holds those bytes.

    `flush` blocks only on blocking descriptors: the worker's, which so needs no loop of its own.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer
        self.outbox = Outbox()
        self.inbox = bytearray()
        self._searched = 0
        self._head: dict[str, Any] | None = None  # of the frame whose data is being read

    def receive(self) -> Iterator[dict[str, Any]]:
        """Read once, and yield the frames that are complete. Raises EOFError, ValueError."""
        self.read()
        while (frame := self.next()) is not None:
            yield frame

    def read(self) -> None:
        """Read once. Raises EOFError if the other end is closed."""
        try:
            data = os.read(self.reader, READ_SIZE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError("the channel was closed")
        self.inbox += data

    def has_more(self) -> bool:
        """Whether there is something to receive."""
        return bool(self.inbox or select.select([self.reader], [], [], 0)[0])

    def next(self) -> dict[str, Any] | None:
        """Return the first frame that was read, None if it is not complete. Raises ValueError if it can't be one."""
        if self._head is None:
            end = self.inbox.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self.inbox)
                if self._searched > LINE_LIMIT:
                    raise ValueError(f"a frame's line is longer than {LINE_LIMIT} bytes")
                return None
            line = bytes(self.inbox[:end])
            del self.inbox[: end + 1]
            self._searched = 0
            try:
                frame = json.loads(line)
            except RecursionError:
                raise ValueError("a frame is nested too deeply") from None
            if not isinstance(frame, dict):
                raise ValueError("a frame is not an object")
            size = frame.get("data", 0)
            if type(size) is not int or not 0 <= size <= DATA_LIMIT:
                raise ValueError(f"a frame with {str(size)[:40]} bytes of data")
            self._head = frame
        frame = self._head
        if "data" in frame:
            size = frame["data"]
            if len(self.inbox) < size:
                return None
            with memoryview(self.inbox) as view:
                frame["data"] = bytes(view[:size])
            del self.inbox[:size]
        self._head = None
        return frame

    def send(self, frame: Mapping[str, Any]) -> None:
        """Queue a frame, and write as much as the descriptor takes."""
        self.queue(frame)
        self.flush()

    def queue(self, frame: Mapping[str, Any]) -> None:
        """Queue a frame, to be written together with the next ones."""
        self.outbox.add(head(frame))
        self.outbox.add(frame.get("data", b""))

    def flush(self) -> None:
        """Write until the outbox is empty or the descriptor would block."""
        try:
            while self.outbox.size:
                self.outbox.write(functools.partial(os.writev, self.writer))
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.outbox = Outbox()  # reading from the channel meets EOF, and the reader decides

    def set_blocking(self, blocking: bool) -> None:
        """Make both descriptors blocking or non-blocking."""
        for fd in {self.reader, self.writer}:
            os.set_blocking(fd, blocking)

    def close(self) -> None:
        """Close both descriptors."""
        for fd in {self.reader, self.writer}:
            os.close(fd)


def head(frame: Mapping[str, Any]) -> bytes:
    """Return the line of a frame; its data, if any, follows it."""
    fields = {**frame, "data": len(frame["data"])} if "data" in frame else frame
    return ENCODER.encode(fields).encode() + b"\n"


def tells(plain: str) -> bool:
    """Whether a value's repr tells a reader something, as one like `<… object at 0x…>` does not."""
    return bool(plain) and not (plain.startswith("<") and plain.endswith(">")) and " object at 0x" not in plain


def clip(text: str, limit: int) -> str:
    """Shorten `text` to about `limit` characters: head, tail, and between them how much was left out."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}\n[… {len(text) - limit} characters left out …]\n{text[len(text) - (limit - head) :]}"


def plain(value: Any, limit: int = STATE_LIMIT) -> Any:
    """Return `value` as JSON can hold it: a tuple as a list, a NumPy number as Python's.

    An instance of a subclass of JSON's types counts as what it holds, not as what its methods say.

    Raises:
        ValueError: JSON can't hold it, or would take more than `limit` bytes at the least.
    """
    return plain_part(value, 0, set(), [limit])


def plain_part(value: Any, depth: int, parents: set[int], room: list[int]) -> Any:
    """Return a part of what `plain` returns, `depth` deep in `parents`, and take what it needs from `room`."""
    kind = type(value)
    room[0] -= 2  # a digit and a comma
    if kind not in PLAIN_TYPES and module_name(value) == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
        kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        text = str.__str__(value)
        room[0] -= len(text)
        if room[0] < 0:
            raise ValueError(f"too large: {len(text)} characters")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("text with lone surrogates") from None
        return text
    if issubclass(kind, int):
        number = int.__int__(value)
        if number.bit_length() > 4096:
            raise ValueError(f"an integer of {number.bit_length()} bits")
        return number
    if issubclass(kind, float):
        fraction = float.__float__(value)
        if not math.isfinite(fraction):
            raise ValueError(f"{fraction!r} is not JSON")
        return fraction
    if not issubclass(kind, (list, tuple, dict)):
        raise ValueError(f"{class_name(value)} is not JSON")
    if len(value) * 2 > room[0]:  # before all of it is copied and encoded
        raise ValueError(f"too large: {len(value)} values")
    if depth == STATE_DEPTH:
        raise ValueError(f"nested more than {STATE_DEPTH} deep")
    if id(value) in parents:
        raise ValueError("contains itself")
    parents.add(id(value))
    try:
        if not issubclass(kind, dict):
            items = list.__iter__(value) if issubclass(kind, list) else tuple.__iter__(value)
            return [plain_part(item, depth + 1, parents, room) for item in items]
        for key in dict.keys(value):
            if not issubclass(type(key), str):
                raise ValueError(f"a key is {class_name(key)}, not text")
        return {
            plain_part(key, 0, set(), room): plain_part(item, depth + 1, parents, room)
            for key, item in dict.items(value)
        }
    finally:
        parents.discard(id(value))


def class_name(value: Any) -> str:
    """Return the name of a value's class, whatever its metaclass or its `__class__` says."""
    return exact(vars(type)["__name__"].__get__(type(value)))


def module_name(value: Any) -> str:
    """Return the name of the module that a value's class claims to be from."""
    return exact(vars(type)["__module__"].__get__(type(value)))


def exact(text: Any) -> str:
    """Return a text as a plain `str` that can be encoded: a subclass may lie, and lone surrogates become escapes.

    Returns "" for what is no text.
    """
    plain_text = str.__str__(text) if issubclass(type(text), str) else ""
    return plain_text if plain_text.isascii() else plain_text.encode("utf-8", "backslashreplace").decode()


def failure_of(error: BaseException) -> str:
    """Return an exception in one line: the name of its class and, if it has one, its message."""
    said = ""
    with contextlib.suppress(BaseException):  # the code's own __str__ may raise anything
        said = " ".join(exact(str(error)).split())
    return clip(f"{class_name(error)}: {said}".rstrip(": "), 300)


def plain_name(package: str) -> str:
    """Return a package's name as the index compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


@functools.lru_cache(None)
def libc() -> Any:
    """Return the C library, opened once for all forked processes."""
    return ctypes.CDLL(None, use_errno=True)


def open_inside(folder: str, path: str) -> int:
    """Open a regular file below `folder` without following a link or leaving the folder. Raises OSError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise OSError(errno.EINVAL, "not a path inside the working directory")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        last = part is parts[-1]
        kind = os.O_NONBLOCK if last else os.O_DIRECTORY  # opening a pipe of that name must not block
        try:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def passed(*descriptors: int) -> list[tuple[int, int, bytes]]:
    """Return what sendmsg() takes to pass descriptors on with a message."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]


def receive_descriptors(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """Receive a message and the descriptors that came with it."""
    message, ancillary, *_ = connection.recvmsg(1 << 15, socket.CMSG_SPACE(4 * most))
    return message, [fd for *_, data in ancillary for (fd,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])]


# ── supervisor ──

OUTBOX_LIMIT = 1 << 20  # bytes queued for a slow host before the supervisor stops reading from the worker
EARLIER_LIMIT = 1 << 16  # bytes kept of the output written while no call is running
FILES_UNLISTED = 20  # of those that are not: named, with the reason
LISTING_LIMIT = 1 << 19  # bytes of their names
PATH_LIMIT = 200  # characters of a file's path
NAME_SHOWN = 60  # of one that is not listed, of a variable's name, and of its type's
VARIABLES_TOLD = 100  # of a session
ENTRIES_SEEN = 10_000  # files and folders in the working directory; any more are not looked at
SHIPPED_CACHE = "/opt/python-docker-mcp/matplotlib"
PLUG_ADDRESS = "\0python-docker-mcp"  # abstract: in the container's network namespace, not in a file system
CERTIFICATES_FILE = "/tmp/.certificates.pem"
DIAL_TIMEOUT = 0.01  # seconds; a server on the same loopback answers at once, or has too much to do
CLOSING_WORK = 10.0  # seconds to show the figures and variables of code that has ended
COPY_DELAY = 0.05  # seconds after a call's end, in which the processes that relay the answer have the processors
UNTOUCHED_USUAL = 32 << 20  # bytes of memory that a program asks for without a use for all of it
LOOK_INTERVAL = (0.05, 0.5)  # seconds between two looks at these, while code runs and between calls
MEMORY_INTERVAL = 0.01  # seconds between two looks at what memory the running code has asked for
WAKE_PATIENCE = 5.0  # seconds for a copy to wake, on a host that is busy; less than HOST_PATIENCE
COPY_INTERVAL = 0.5  # seconds of calls without a pause after which one of them waits for a copy
STRAYS_READ = 64  # messages read while a copy is awaited
WORKER_FIELDS = {  # of each kind of frame from the worker, besides kind and id: what it has, and what it may have
    "display": ({"data", "is_value"}, set()),
    "state": ({"data", "left_out"}, set()),
    "done": (
        {"status", "cpu"},
        {"memory", "value", "value_length", "exit_code", "exception", "stale", "variables"},
    ),
    "turn": (set(), set()),
    "clear": (set(), set()),
    "ended": (set(), set()),
    "used": ({"stale"}, set()),
}


class Supervisor:
    """Process 1 of the sandbox: holds the channel to the host, and forks, watches and replaces the worker.

    It never runs the user's code, has one thread and waits without a time limit only in select(), so it answers even
    when the worker is busy, stopped, crashed or gone. With a session it outlives its host: it stays, detached, and
    another host can plug into it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.session: str | None = None
        self.call: RunningCall | None = None
        self.begun: str | None = None  # id of the last call
        self.state: Variables = "preserved"  # fate of the variables in the last call
        self.lost: str | None = None  # why the session's variables were lost while no call was running
        self.packages: str | None = None  # folder of the packages installed for the session
        self.variables: dict[str, str] = {}  # names, with types and sizes, when the last call that went well had ended
        self.question: str | None = None  # id of the request to use others, until the worker has answered it
        self.started = self.active = time.monotonic()
        self.look_due = math.inf  # when to look at the sandbox's shares next
        self.sources: dict[int, Callable[[], object]] = {}  # what to call when a descriptor is readable
        self.host = Host(settings["owner"])
        self.door = Door(self._refusal, self._enter)
        self.output = Streams(self.sources, lambda: self.call is not None, self._pass_on)
        self.worker = WorkerProcess(settings, self.sources, self.output, self.from_worker)
        self.files = Files(settings["working_dir"], settings["writable_folders"])
        self.connections = Flows(self.host.tell, self.sources)
        self.preloading = Preloading(settings["packages"], settings["preload"])

    def run(self, channel: Channel) -> None:
        """Serve until the sandbox is no longer needed."""
        allow_inspection(False)
        unfiltered = filter_system_calls()
        catch_children(self.sources, self._reap)
        self._listen()
        warnings.filterwarnings("ignore", ".*is non-interactive, and thus cannot be shown")  # show() works here
        warnings.filterwarnings("ignore", "joblib backend '.*' is not available")  # our setting, for half a core
        self._attach(channel)
        if unfiltered:
            self.host.note(f"system calls are not filtered beyond what the engine does: {unfiltered}")
        while True:
            self._turn()

    def _turn(self) -> None:
        """Write what is to be written, wait until something happens, and see to it."""
        channels = [channel for channel in (self.host.channel, self.worker.control) if channel]
        for channel in channels:
            channel.flush()
        if not self.worker.id:
            self._prepare_worker()
        is_congested = self.host.is_congested
        resting = self.connections.resting(is_congested, self.host.channel is not None)
        if is_congested:
            resting |= {self.worker.control.reader if self.worker.control else -1, *self.output.pipes.values()}
        flows = self.connections.writers()
        writers = [channel.writer for channel in channels if channel.outbox.size] + list(flows)
        readers = [fd for fd in self.sources if fd not in resting]
        before = time.monotonic()
        readable, writable, _ = select.select(readers, writers, [], self._patience())
        if is_congested and self.call:
            self.call.deadline += time.monotonic() - before  # the code is held back until the host reads
        for fd in writable:
            if fd in flows:
                self.connections.flush(flows[fd])
        for fd in readable:
            if fd in self.sources:
                self.sources[fd]()
        self._keep_time()

    def _prepare_worker(self) -> None:
        """Import a module that workers are to have, or fork the next worker if they have all."""
        if not self.preloading.left:
            self.worker.fork(self.preloading, self.session is None)
        elif problem := self.preloading.import_next():
            self.host.note(problem)

    # ── the host ──

    def _attach(self, channel: Channel) -> None:
        self.active = time.monotonic()
        self.host.channel = channel
        self.sources[channel.reader] = self._from_host
        self.host.greet(self._status("ready"))
        if self.preloading.is_told:
            self.host.tell({"kind": "prepared"})

    def _status(self, kind: Literal["ready", "status"]) -> Greeting:
        now = time.monotonic()
        return {
            "kind": kind,
            "session": self.session,
            "attached": self.host.channel is not None,
            "owner": self.host.owner,
            "unread": self.host.unread,
            "told": self.host.told,
            "state": self.state,
            "packages": self.packages,
            "busy": self.call is not None,
            "ran": now - self.call.started if self.call else 0.0,  # seconds
            "left": max(0.0, self.call.next_due() - now) + self.settings["grace"] if self.call else 0.0,
            "age": round(now - self.started, 1),
            "idle": 0.0 if self.call else round(now - self.active, 1),
            "memory": memory_in_use(),
        }

    def _from_host(self) -> None:
        channel = self.host.channel
        assert channel is not None
        orders: dict[str, Callable[[Any], object]] = {
            "run": self._start,
            "use": self._use,
            "state": self._to_worker,
            "read": lambda frame: self.host.tell(self.files.read(frame)),
            "write": lambda frame: self.host.tell(self.files.write(frame)),
            "interrupt": lambda frame: self._interrupt("cancelled", frame["id"]),
            "ping": lambda frame: self.host.tell({"id": frame["id"], "kind": "pong"}),
            "recycle": self._recycle,
            "pass": self.connections.receive,
            "dial": self.connections.dial,
            "farewell": self._part,
            "end": lambda _: os._exit(0),
        }
        try:
            for frame in channel.receive():
                orders[frame["op"]](frame)  # the host is trusted
                if self.host.channel is not channel:
                    break
        except EOFError:
            self.host.end_plugs(channel)
            self._detach(self.session is not None or self.begun is None)

    def _part(self, _: Parting) -> None:
        assert self.host.channel is not None
        self.host.channel.send({"kind": "farewell"})
        self._detach(self.session is not None)

    def _detach(self, stay: bool) -> None:
        """Detach from the host; exit if there is nothing to `stay` for, or if plugs can't be authenticated here."""
        if not stay or not peers_are_told():
            os._exit(0)
        self.connections.close_all()
        if self.host.channel:
            del self.sources[self.host.channel.reader]
        self.host.detach()
        self.active = time.monotonic()

    def _listen(self) -> None:
        self.door.listen(self.sources)
        self.worker.copy.listen()
        if self.settings["has_proxy"] and (problem := self.connections.listen()):
            self.host.note(problem)

    def _refusal(self, request: dict[str, Any]) -> Greeting | None:
        """Return the status, unless a plug may come in: there is no host, and the plug is for this sandbox.

        It is if it wants this session or, where there is none yet, a sandbox with the same settings.
        """
        wanted, ours = ("settings", self.settings["digest"]) if self.session is None else ("session", self.session)
        may_enter = not self.host.channel and request[wanted] == ours
        if may_enter:
            return None
        status = self._status("status")
        if request.get("details"):
            status["variables"], status["files"] = self.variables, self.files.count()
        return status

    def _enter(self, channel: Channel, plug: socket.socket, request: PlugRequest) -> None:
        self.host.plug, self.host.owner = plug, request["owner"]
        if request["authority"]:
            self.settings["authority"] = request["authority"]
            trust_certificates(self.settings)
        self._attach(channel)

    # ── the worker ──

    def _to_worker(self, frame: Mapping[str, Any]) -> None:
        if self.worker.control is None:
            self.worker.fork(self.preloading, self.session is None)
        assert self.worker.control is not None
        self.worker.control.send(frame)

    def _start(self, request: Run) -> None:
        self._reap()  # a worker that has just died must not be given the call
        if self.begun is None and not self.preloading.fits(self.packages):
            self.host.tell({"id": request["id"], "kind": "unfit"})
            return
        self.session = request["session"]
        request["packages"] = self.packages
        self.output.read_all()
        if earlier := self.output.take_earlier():
            self.host.tell({"id": request["id"], "kind": "earlier", "data": earlier})
        copy = self.worker.copy
        if not copy.process or time.monotonic() >= copy.asked + COPY_INTERVAL:  # rarely, in a burst of calls
            self.worker.ask_for_copy()
        self.call = RunningCall(request, self.settings["grace"])
        self.worker.begin()
        self.host.told = 0
        self._to_worker(request)
        self.host.tell({"id": request["id"], "kind": "begun"})
        self.host.unread = self.begun = self.call.id
        self.look_due = self.call.started + LOOK_INTERVAL[0]

    def _use(self, request: Use) -> None:
        """Be this session's, with these packages, and have the worker answer."""
        if self.begun is None and not self.preloading.fits(request["packages"]):
            self.host.tell({"id": request["id"], "kind": "unfit"})
            return
        self.session, self.packages, self.question = request["session"], request["packages"], request["id"]
        self.active = time.monotonic()
        self._to_worker(request)

    # ── what the worker says ──

    def from_worker(self) -> None:
        control = self.worker.control
        assert control is not None
        try:
            for frame in control.receive():
                if frame.get("kind") == "prepared" and not self.preloading.is_told:
                    self.preloading.is_told = True
                    if self.host.channel:  # another host is told as it comes
                        self.host.tell({"kind": "prepared"})
                number = frame.get("id")
                if type(number) is str and number in (self.question, self.call and self.call.id):
                    check_worker_frame(frame)
                    self._hear(frame)  # others are left over from an earlier call
        except EOFError:
            del self.sources[control.reader]  # the worker is dying; if it only closed its end, the time limit acts
        except ValueError as error:
            self._abandon(f"the code broke the protocol between worker and supervisor: {error}")

    def _hear(self, frame: Any) -> None:
        """Take note of a frame of the running call's, or of the answer to a question."""
        if frame["kind"] == "used":
            self.host.tell(frame)
            self.question = None
            self.worker.want_copy()
        elif self.call:
            if frame["kind"] != "state":
                self.output.read_all()  # output written before it goes before it
            if frame["kind"] == "done":
                self.variables = told_variables(frame.pop("variables", None))
                self.worker.cpu += frame["cpu"]
                self._conclude(frame, frame["status"], self.worker.kills.count(self.worker.copy))
                return
            self.call.hear(frame)
            if frame["kind"] in ("display", "state", "clear"):
                self.host.tell(frame)
            if frame["kind"] in ("display", "clear", "turn"):
                self.worker.let_proceed()

    def _pass_on(self, stream: Stdio, text: str) -> None:
        """Tell the host of output of the running call's, if there is a call."""
        if self.call and (text := self.call.admit(stream, text)):
            self.host.tell({"id": self.call.id, "kind": stream, "data": text.encode()})

    def _conclude(
        self,
        report: EndOfCall,
        status: EndStatus,
        kills: int,
        state: Variables = "preserved",
        message: str | None = None,
        behind: int = 0,
    ) -> None:
        """End the call, and tell the host.

        So many of its processes were killed as memory ran out; a copy that goes on does not know of the `behind` calls
        before this one.
        """
        call = self.call
        assert call is not None
        self.output.flush()
        for frame in call.rest():
            self.host.tell(frame)
        files, left_out = self.files.changed()
        done: Done = {
            **report,
            "status": call.stopped_for or status,
            "wall": time.monotonic() - call.started,
            "oom_kills": kills,
            "state": state,
            "lost_before": self.lost,
            "behind": behind,
            "message": message or call.remark(),
            "files": files,
            "files_left_out": left_out,
        }
        self.call = self.lost = None
        self.state = state
        self.worker.copy.behind += 1
        self.active = time.monotonic()
        self.host.tell(done)
        if self.session is not None:
            self.worker.want_copy()

    def _recycle(self, request: Order) -> None:
        """Undo whatever the last call may have left, check whether anything remains, and tell the host."""
        kill_all_others(self.settings["grace"])
        self.connections.close_all()
        self.worker.disconnect()
        self.output.earlier.clear()
        self.lost = self.packages = self.begun = None
        self.look_due = math.inf
        clean = self.files.empty() and not other_processes() and not system_v_objects()
        prepare_files(self.settings)
        self.host.tell({"id": request["id"], "kind": "recycled", "clean": clean})

    # ── time, interruption and death ──

    def _patience(self) -> float | None:
        """Return the seconds until something is due, or None if nothing is."""
        if not self.worker.id:
            return 0.0
        if self.call:
            due = max(0.0, min(self.call.next_due(), self.look_due) - time.monotonic())
            return min(due, MEMORY_INTERVAL) if self.worker.copy.is_heavy else due
        due = min(self._end(), self.worker.copy.due, self.look_due)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _end(self) -> float:
        """Return when the sandbox ends by itself if it stays unused."""
        if self.session is not None:
            return self.active + float(self.settings["idle_timeout"])
        return math.inf if self.host.channel else self.active + float(self.settings["adoption_time"])

    def _keep_time(self) -> None:
        now = time.monotonic()
        if now >= self.look_due:
            before = time.thread_time()
            problem = overdraft()
            cost = time.thread_time() - before  # of the CPU: on a busy host the look itself may have had to wait
            self.look_due = now + max(LOOK_INTERVAL[self.call is None], 20 * cost)
            if problem and self.worker.id:
                self._abandon(problem)
                return
        if self.call is None:
            if now >= self._end():
                if self.host.channel:  # tell the host that a call already on its way has not begun
                    self.host.channel.send({"kind": "expired"})
                os._exit(0)
            if now >= self.worker.copy.due:
                self.worker.ask_for_copy()
        elif self.worker.copy.is_heavy and self.worker.asks_for_too_much():
            self.worker.copy.lighten()
        elif now >= self.call.kill_at:
            self._abandon(None)
        elif now >= self.call.nudge:
            self.call.nudge = math.inf
            self.worker.signal()  # during os.system() Python ignores SIGINT, so only the command got the first one
        elif now >= self.call.deadline:
            self._interrupt("timeout", self.call.id)

    def _interrupt(self, reason: StopReason, call_id: str) -> None:
        if self.call and self.call.id == call_id and self.call.interrupt(reason):
            self.connections.close_all()
            self.worker.signal()

    def _abandon(self, message: str | None) -> None:
        """Kill the worker and everything it started, and conclude its call."""
        self._replace_worker(self.worker.kill(), message)

    def _reap(self) -> None:
        """Reap dead children; replace the worker if it is one of them."""
        if death := self.worker.reap():
            self._replace_worker(death, None)

    def _replace_worker(self, death: Death, message: str | None) -> None:
        """Clean up after a dead worker: kill all that it started and conclude its call; `run` forks the next one."""
        copy = self.worker.copy
        copy.admit()
        behind = copy.behind
        if behind and not self.call:
            copy.end()  # nobody would be told that it is out of date
        copy.due = math.inf
        others = len(other_processes()) - bool(copy.process)
        kill_all_others(self.settings["grace"], copy.process)
        self.output.read_all()
        self.output.flush()
        self.worker.disconnect()
        is_restored = self.worker.restore()
        if self.call:
            state: Variables = "restored" if is_restored else "lost"
            self._conclude_death(self.call, death, state, message, others, behind if is_restored else 0)
        elif is_restored:
            self.worker.want_copy()
        elif not self.worker.is_used:
            os._exit(71)  # a worker that dies before its first call would do so every time
        else:
            self.lost = message or death.manner

    def _conclude_death(
        self, call: RunningCall, death: Death, state: Variables, message: str | None, others: int, behind: int
    ) -> None:
        """Conclude the call of a worker that has died, which ran in so many processes besides."""
        kills = self.worker.kills.count(self.worker.copy)
        if kills and not call.stopped_for:
            message = memory_taken(others, self.files.held() >> 20)
        status: EndStatus = "out_of_memory" if kills else "died"
        self._conclude(death.report(call.id), status, kills, state, message, behind)


class RunningCall:
    """State of the running call, as the supervisor keeps it."""

    def __init__(self, request: Run, grace: float) -> None:
        self.id: str = request["id"]
        self.grace = grace  # seconds between interrupting the code and killing it
        self.started = time.monotonic()
        self.deadline: float = self.started + request["timeout"]
        self.nudge = self.kill_at = math.inf  # when to interrupt again, and when to kill
        self.stopped_for: StopReason | None = None  # "timeout" or "cancelled" once interrupted
        self.code_ended = False  # whether it came to its end by itself, so that only what it has made is being shown
        self.limit: int | None = request["output_limit"]
        self.clear()

    def clear(self) -> None:
        """Begin with no output."""
        self.head_left = (self.limit or 0) * 3 // 4  # bytes of output that are still passed on at once
        self.tail_left = (self.limit or 0) - self.head_left
        self.tail: deque[tuple[Stdio, bytes]] = deque()  # stream and text: the end of the output, held until the end
        self.omitted = 0  # bytes dropped between head and tail
        self.data_left = CALL_LIMIT

    def interrupt(self, reason: StopReason) -> bool:
        """Start the grace period of an interruption; return False if it has started already."""
        if self.stopped_for:
            return False
        now = time.monotonic()
        self.stopped_for, self.deadline = reason, math.inf
        self.nudge, self.kill_at = now + self.grace / 2, now + self.grace
        return True

    def end_code(self) -> None:
        """Start the time for what follows the code; that of the code itself is over."""
        if not self.stopped_for:
            self.code_ended, self.deadline = True, time.monotonic() + CLOSING_WORK

    def hear(self, frame: Any) -> None:
        """Take note of what its worker says before its end. Raises ValueError if that is more than it may."""
        if frame["kind"] == "ended":
            self.end_code()
        elif frame["kind"] == "clear":
            self.clear()
        elif "data" in frame:
            self.data_left -= len(frame["data"]) + FRAME_COST
            if self.data_left < 0:
                raise ValueError("more data than a call may return")

    def rest(self) -> Iterator[Output | Gap]:
        """Yield what is held of its output until its end."""
        if self.omitted:
            yield {"id": self.id, "kind": "omitted", "bytes": self.omitted}
        for stream, data in self.tail:
            yield {"id": self.id, "kind": stream, "data": data.decode("utf-8", "ignore").encode()}

    def remark(self) -> str | None:
        """Return what is to be said of an end that was not the code's own."""
        if self.stopped_for == "timeout" and self.code_ended:
            return "the code ended in time, but not all of its figures and variables could be shown"
        return None

    def next_due(self) -> float:
        """Return when the supervisor has to act on this call, unless it ends first."""
        return min(self.deadline, self.nudge, self.kill_at)

    def admit(self, stream: Stdio, text: str) -> str:
        """Return the part of this output to pass on at once; the rest goes to the tail and pushes older output out."""
        if self.limit is None:
            return text
        data = text.encode()
        passes = data[: self.head_left].decode("utf-8", "ignore")
        rest = data[len(passes.encode()) :]
        self.head_left = 0 if rest else self.head_left - len(data)
        if rest:
            self.tail.append((stream, rest))
            self.tail_left -= len(rest)
        while self.tail_left < 0:
            stream, oldest = self.tail.popleft()
            dropped = min(len(oldest), -self.tail_left)
            self.omitted += dropped
            self.tail_left += dropped
            if oldest[dropped:]:
                self.tail.appendleft((stream, oldest[dropped:]))
        return passes


def memory_taken(others: int, held: int) -> str | None:
    """Return what took memory besides the code itself: so many other processes, and files of so many megabytes."""
    causes = [f"it ran in {others + 1} processes"] if others else []
    if held >= 16:
        causes.append(f"its files, which are held in memory, took {held} MB of that")
    return " and ".join(causes) or None


def told_variables(said: Any) -> dict[str, str]:
    """Return what the worker says of its variables, in bounds, as the code may have forged it."""
    pairs = itertools.islice(said.items() if type(said) is dict else (), VARIABLES_TOLD)
    return {clip(name, NAME_SHOWN): clip(about, 2 * NAME_SHOWN) for name, about in pairs if type(about) is str}


def check_worker_frame(frame: dict[str, Any]) -> None:
    """Refuse a frame that the worker can't have sent, so the user's code did. The host looks at what the fields hold.

    Raises ValueError.
    """
    kind = frame.get("kind")
    if type(kind) is not str or kind not in WORKER_FIELDS:
        raise ValueError(f"a frame of kind {kind[:40]!r}" if type(kind) is str else "a frame whose kind is no text")
    needed, possible = WORKER_FIELDS[kind]
    if not needed <= frame.keys() - {"kind", "id"} <= needed | possible:
        raise ValueError(f"a frame {kind} that no worker sends")
    if kind == "done" and (frame["status"] not in ("ok", "error") or type(frame["cpu"]) is not float):
        raise ValueError("an end that no worker reports")
    for value in frame.values():
        parts = value.values() if type(value) is dict else value if type(value) is list else ()
        if any(type(part) in (dict, list) for part in parts):  # to encode it could take more stack than to parse it did
            raise ValueError("a frame is nested too deeply")
    if len(head(frame)) > LINE_LIMIT - READ_SIZE:  # the supervisor adds some fields before passing it on
        raise ValueError("a frame that is too long")


class WorkerProcess:
    """The process that runs the code, with its streams, its copy and the socket to it, as the supervisor has them."""

    def __init__(
        self,
        settings: dict[str, Any],
        sources: dict[int, Callable[[], object]],
        output: Streams,
        hear: Callable[[], object],
    ) -> None:
        self.id = 0  # 0 until it is forked, after preloading or for the first call
        self.control: Channel | None = None
        self.copy = Copy(sources)
        self.kills = OomKills()
        self.is_used = False
        self.cpu = 0.0  # CPU seconds up to its last report
        self._had = 0  # bytes of memory that it had asked for when the call began, and never touched
        self._settings = settings
        self._sources = sources  # what to call when a descriptor is readable
        self._output = output
        self._hear = hear  # what to call when there is something to receive

    def fork(self, preloading: Preloading, is_fresh: bool) -> None:
        """Fork a worker, in its own setsid() session, with /dev/null, two pipes and a socket to the supervisor only."""
        ends = self._connect()
        self.id = os.fork()
        if self.id == 0:
            try:
                become_worker((os.open(os.devnull, os.O_RDWR), *ends))
                worker = Worker(Channel(3, 3), self._settings)
                if preloading.installed and is_fresh:
                    worker.preload(preloading.modules)
                if not preloading.is_told:  # once: every frame wakes each process that relays it
                    worker.control.send({"kind": "prepared"})
                worker.serve()
            finally:
                os._exit(70)
        for fd in ends:
            os.close(fd)
        self.is_used, self.cpu = False, 0.0

    def _connect(self) -> tuple[int, int, int]:
        """Make pipes and a socket for a worker; return its ends: standard output, errors and control."""
        ours, theirs = socket.socketpair()
        fd = ours.detach()
        self.control = Channel(fd, fd)
        self.control.set_blocking(False)
        self._sources[fd] = self._hear
        return (*self._output.connect(), theirs.detach())

    def disconnect(self) -> None:
        """Close the pipes and the socket; there is no worker any more."""
        if self.control:
            self._sources.pop(self.control.reader, None)
            self.control.close()
        self._output.disconnect()
        self.id, self.control = 0, None

    def let_proceed(self) -> None:
        """Answer a worker that waits until its output is read. Raises ValueError if it asks without waiting."""
        assert self.control is not None
        if self.control.outbox.size > READ_SIZE:
            raise ValueError("more questions than answers taken")
        self.control.send({"op": "proceed"})

    def begin(self) -> None:
        """Take note that a call begins."""
        self.is_used = True
        _, self._had = own_memory(self.id)

    def asks_for_too_much(self) -> bool:
        """Whether the worker and files would fill all memory if the running code used what it has asked for."""
        touched, untouched = own_memory(self.id)
        asked = untouched - self._had
        if asked <= UNTOUCHED_USUAL:
            return False
        _, files = memory_of_files()
        return touched + asked + files > int(self._settings["memory_limit"])

    # ── its copy ──

    def want_copy(self) -> None:
        """See that there will be a copy of the worker as it is now."""
        if self.control and self._settings["restores"]:
            self.copy.due = time.monotonic() + COPY_DELAY

    def ask_for_copy(self) -> None:
        """Have the worker leave a copy of itself, if one is due; the last one ends."""
        if self.copy.due < math.inf and self.control:
            self.control.queue({"op": "copy", "key": self.copy.ask()})

    def restore(self) -> bool:
        """Have the copy, if there is one, go on in the place of the worker, which is gone; return whether it does."""
        process, connection = self.copy.process, self.copy.connection
        if connection is None:
            return False
        ends = self._connect()
        try:
            connection.settimeout(WAKE_PATIENCE)
            connection.sendmsg([b"wake"], passed(*ends))
            self.id = process if connection.recv(1) else 0
        except OSError:
            self.id = 0
        for fd in ends:
            os.close(fd)
        self.copy.end()
        if not self.id:
            self.disconnect()
        self.cpu = 0.0
        return self.id != 0

    # ── its end ──

    def signal(self) -> None:
        """Interrupt the code and all that it started, also what is stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.id, signal.SIGCONT)
            os.killpg(self.id, signal.SIGINT)

    def kill(self) -> Death:
        """Kill it, and return how it ended."""
        os.kill(self.id, signal.SIGKILL)
        _, status, usage = os.wait4(self.id, 0)
        return Death(status, usage, self.cpu)

    def reap(self) -> Death | None:
        """Reap dead children, as process 1 has to; return how the worker ended if it is one of them."""
        death = None
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self.id:
                    death = Death(status, usage, self.cpu)
                elif pid == self.copy.process:
                    if status == signal.SIGKILL:
                        self.kills.disregard_copy()
                    self.copy.end()
        return death


class Death:
    """How a worker ended, as the kernel tells it."""

    def __init__(self, status: int, usage: Any, reported: float) -> None:
        self.code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)  # a signal is negative
        self.manner = f"killed by signal {-self.code}" if self.code < 0 else f"exit status {self.code}"
        self.cpu = max(0.0, usage.ru_utime + usage.ru_stime - reported)  # seconds, of the last call
        self.memory: int = usage.ru_maxrss * 1024  # bytes, at most

    def report(self, call: str) -> EndOfCall:
        """Return what is reported of the call that was running."""
        return {"id": call, "kind": "done", "cpu": self.cpu, "exit_code": self.code, "memory": self.memory}


class Copy:
    """A sleeping copy of the session's worker, from after its last call, as the supervisor knows it.

    none ── due ── asked for (a key) ── asleep (a process) ── awake: it is the worker, and a copy of it is due
                                          └── due: calls have ended since, and it is that many calls behind
    """

    def __init__(self, sources: dict[int, Callable[[], object]]) -> None:
        self.due = math.inf  # when to ask for one
        self.asked = -math.inf  # when the last one was asked for
        self.behind = 0  # calls that have ended since
        self.key: str | None = None
        self.process = 0
        self.connection: socket.socket | None = None  # it wakes when it gets descriptors, and ends when this is closed
        self.is_heavy = False  # whether the kernel ends it before the worker when memory runs out
        self.sources = sources  # what to call when a descriptor is readable
        self.address = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # where copies are announced
        self.strays = 0  # messages that were no announcement of the copy that is awaited

    def listen(self) -> None:
        """Give the address its name."""
        self.address.bind(COPY_ADDRESS)
        self.address.setblocking(False)

    def ask(self) -> str:
        """Await a copy in place of the last one, which is killed; return the key that it has to name."""
        if self.process:
            # One that ended by itself could linger, and the kernel would kill the worker for the memory of both.
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)
        self.end()
        self.due, self.asked, self.behind, self.strays = math.inf, time.monotonic(), 0, 0
        self.key = os.urandom(16).hex()
        self.sources[self.address.fileno()] = self.admit
        return self.key

    def admit(self) -> None:
        """Accept the copy that is awaited, once it is announced. Code can write here, too: little of that is read."""
        with contextlib.suppress(BlockingIOError):
            while self.key and self.strays < STRAYS_READ:
                message, descriptors = receive_descriptors(self.address, 1)
                told = re.fullmatch(rb"([0-9a-f]{32}) ([0-9]{1,7})", message)
                if descriptors and told and told[1].decode() == self.key and int(told[2]) in other_processes():
                    self.connection, self.process = socket.socket(fileno=descriptors.pop()), int(told[2])
                    self.key, self.is_heavy = None, True
                self.strays += 1
                for fd in descriptors:
                    os.close(fd)
        if self.key is None or self.strays == STRAYS_READ:
            self.sources.pop(self.address.fileno(), None)

    def lighten(self) -> None:
        """Have the kernel end the worker before the copy when memory runs out."""
        self.is_heavy = False
        with contextlib.suppress(OSError):
            if self.connection:
                self.connection.sendmsg([b"lighten"], (), socket.MSG_DONTWAIT)

    def end(self) -> None:
        """Let the copy end, or one that comes later."""
        if self.connection:
            self.connection.close()
        self.key, self.process, self.connection, self.is_heavy = None, 0, None, False
        self.sources.pop(self.address.fileno(), None)


class Preloading:
    """Modules that process 1 imports ahead, so that workers have them at no cost.

    Packages installed for all sessions may do anything when imported: of those, each worker imports what it is to.
    """

    def __init__(self, packages: str, modules: Sequence[str]) -> None:
        self.packages = packages
        self.modules = list(modules)
        self.installed = package_folders(packages, None)  # for all sessions, when the sandbox started
        self.left = [] if self.installed else list(modules)
        self.is_told = False  # whether the host knows that a worker with these modules is ready

    def import_next(self) -> str:
        """Import one of the modules; return what is wrong with it, "" if nothing is."""
        name = self.left.pop(0)
        try:
            import_ahead(name)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            threads = len(os.listdir("/proc/self/task"))
            problem = f"it leaves {threads - 1} threads running, which a fork does not copy" if threads > 1 else ""
        if not self.left:
            gc.collect()
            gc.freeze()  # a later collection must not touch, and so copy, the pages that workers share
        return clip(f"preloading {name}: {problem}", 300) if problem else ""

    def fits(self, packages: str | None) -> bool:
        """Whether nothing was preloaded but what code with these packages is to import."""
        return not self.modules or self.installed == package_folders(self.packages, packages)


class OomKills:
    """The kernel's count of processes killed because memory ran out, as far as they were the code's."""

    def __init__(self) -> None:
        self.events = open_memory_events()
        self._seen = count_oom_kills(self.events)

    def disregard_copy(self) -> None:
        """Pass over one, if there was one: that was the copy."""
        self._seen += count_oom_kills(self.events) > self._seen

    def count(self, copy: Copy) -> int:
        """Return how many there were since the last time."""
        before, self._seen = self._seen, count_oom_kills(self.events)
        kills = self._seen - before
        if kills and copy.is_heavy:  # it goes first, and may just be ending
            copy.end()
            kills -= 1
        return kills


class Streams:
    """The standard streams of the worker, and of all that code started; what comes between two calls is kept apart."""

    def __init__(
        self,
        sources: dict[int, Callable[[], object]],
        is_in_call: Callable[[], bool],
        pass_on: Callable[[Stdio, str], None],
    ) -> None:
        self.sources = sources  # what to call when a descriptor is readable
        self.is_in_call = is_in_call
        self.pass_on = pass_on  # text of the running call
        self.earlier = bytearray()  # what came between calls
        self.pipes: dict[Stdio, int] = {}
        self._decoders: dict[Stdio, codecs.IncrementalDecoder] = {}

    def connect(self) -> tuple[int, int]:
        """Make pipes for a worker, and return its ends: standard output and errors."""
        out, err = os.pipe(), os.pipe()
        self.pipes = {"stdout": out[0], "stderr": err[0]}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in self.pipes}
        for stream, pipe in self.pipes.items():
            os.set_blocking(pipe, False)
            self.sources[pipe] = functools.partial(self._read, stream)
        return out[1], err[1]

    def disconnect(self) -> None:
        """Close the pipes."""
        for pipe in self.pipes.values():
            self.sources.pop(pipe, None)
            os.close(pipe)
        self.pipes = {}

    def read_all(self) -> None:
        """Read what is there."""
        for stream in self.pipes:
            for _ in range(32):  # bounded: a child process of the code may never stop writing
                if not self._read(stream):
                    break

    def _read(self, stream: Stdio) -> bool:
        pipe = self.pipes[stream]
        try:
            data = os.read(pipe, READ_SIZE)
        except BlockingIOError:
            return False
        if not data:
            self.sources.pop(pipe, None)
        elif self.is_in_call():
            self.pass_on(stream, self._decoders[stream].decode(data))
        else:
            self.earlier += data[: EARLIER_LIMIT - len(self.earlier)]
        return bool(data)

    def flush(self) -> None:
        """Pass on what has come of a character that is not complete."""
        for stream, decoder in self._decoders.items():
            self.pass_on(stream, decoder.decode(b"", True))

    def take_earlier(self) -> bytes:
        """Return the text that came since the last call, as UTF-8, and forget it."""
        text = self.earlier.decode("utf-8", "replace").encode()
        self.earlier.clear()
        return text


class Host:
    """The host that the sandbox is attached to or, while there is none, what is kept for the next one."""

    def __init__(self, owner: str) -> None:
        self.channel: Channel | None = None
        self.owner = owner
        self.plug: socket.socket | None = None  # through which the host came, unless it started the sandbox
        self.unread: str | None = None  # id of the last call, until a host has been sent its end
        self.told = 0  # bytes of that call's output sent to a host
        self.backlog: deque[FromSandbox] = deque()
        self.backlog_left = BACKLOG_LIMIT

    def tell(self, frame: FromSandbox) -> None:
        """Send a frame or, if there is no host, keep it for the next one."""
        if self.channel:
            self.channel.queue(frame)  # the main loop writes it, together with what follows at once
            if frame["kind"] == "done":
                self.unread = None
            elif frame["kind"] == "stdout" or frame["kind"] == "stderr":
                self.told += len(frame["data"])
        else:
            data: Any = frame.get("data", b"")
            self.backlog_left -= len(head(frame)) + len(data)  # all fields: the code may have forged them
            if self.backlog_left > 0 or frame["kind"] == "done":
                self.backlog.append(frame)

    def note(self, text: str) -> None:
        """Have something logged."""
        self.tell({"kind": "note", "text": text})

    def greet(self, greeting: Greeting) -> None:
        """Greet a new host, and send it what was kept."""
        assert self.channel is not None
        self.channel.set_blocking(False)
        self.channel.send(greeting)
        while self.backlog:
            self.tell(self.backlog.popleft())
        self.backlog_left = BACKLOG_LIMIT

    def end_plugs(self, channel: Channel) -> None:
        """Write to a host that is gone, so that its orphaned `docker run` gets EPIPE and exits.

        Again and again, as the kernel closes the descriptors of a dead host one by one: that of what we read, perhaps
        well before that of what we write.
        """
        for pause in (0.0, 0.05, 0.2):
            time.sleep(pause)
            channel.send({"kind": "farewell"})

    def detach(self) -> None:
        """Let go of the host, and of the plug through which it came."""
        if self.channel:
            self.channel.close()
        self.channel = None
        if self.plug:
            self.plug.close()
        self.plug = None

    @property
    def is_congested(self) -> bool:
        """Whether the host reads more slowly than it is told."""
        return self.channel is not None and self.channel.outbox.size > OUTBOX_LIMIT


class Door:
    """The address where other hosts plug in. Each is let in, or told the sandbox's status."""

    def __init__(
        self,
        refusal: Callable[[dict[str, Any]], Greeting | None],
        enter: Callable[[Channel, socket.socket, PlugRequest], object],
    ) -> None:
        self._refusal = refusal  # what to tell a plug that may not come in
        self._enter = enter  # over a channel, from a plug's connection, by the host that asks so

    def listen(self, sources: dict[int, Callable[[], object]]) -> None:
        """Open it."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(PLUG_ADDRESS)
        listener.listen()
        sources[listener.fileno()] = lambda: self.admit(listener)

    def admit(self, listener: socket.socket) -> None:
        """Answer a plug: take over its standard input and output as the channel, or tell it the status."""
        connection = listener.accept()[0]
        connection.settimeout(1)
        entered = False
        try:
            uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid != PLUG_UID:
                return
            message, (reader, writer) = receive_descriptors(connection, 2)
            request = json.loads(message)
            if status := self._refusal(request):
                os.write(writer, head(status))
                os.close(reader)
                os.close(writer)
                return
            self._enter(Channel(reader, writer), connection, request)
            entered = True
        except (OSError, ValueError, LookupError, TypeError, struct.error):
            pass  # the plug went away, or sent nonsense: it sees its connection close
        finally:
            if not entered:
                connection.close()


class Flow:
    """A connection of the code's to the proxy, as the supervisor has it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.credit = SENT_AHEAD  # bytes that the host will take
        self.outbox = Outbox()  # what the host has sent, and the code has not taken
        self.taken = 0  # bytes that the code has taken, and the host does not know of
        self.ended = False  # whether the host has no more


class Flows:
    """The code's connections to the proxy. The host is the proxy: here bytes pass as frames, so many as are credited.

    opened, by the first frame with its number ── passing ── ended by either side, and closed when all has passed
    """

    def __init__(self, tell: Callable[[FromSandbox], None], sources: dict[int, Callable[[], object]]) -> None:
        self.tell = tell
        self.sources = sources  # what to call when a descriptor is readable
        self.open: dict[int, Flow] = {}  # by number
        self.count = 0
        self.listener: socket.socket | None = None

    def listen(self) -> str | None:
        """Begin to accept connections; return what to note if that is impossible."""
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind(("127.0.0.1", PROXY_PORT))
        except OSError as error:
            return f"code can't reach the allowed hosts: no proxy ({error})"
        self.listener.listen(1024)  # a connection for which there is no room tries again only a second later
        self.listener.setblocking(False)
        self.sources[self.listener.fileno()] = self._admit
        return None

    def _admit(self) -> None:
        assert self.listener is not None
        with contextlib.suppress(OSError):
            connection = self.listener.accept()[0]
            self.count += 1
            self._add(self.count, connection)
            self._pass(self.count)

    def dial(self, frame: Dial) -> None:
        """Connect to a server of the code's own, and tell whether there is one."""
        connection = socket.socket()
        connection.settimeout(DIAL_TIMEOUT)
        try:
            connection.connect(("127.0.0.1", frame["port"]))
            self._add(frame["flow"], connection)
        except OSError:
            connection.close()
        self._pass(frame["flow"], ended=frame["flow"] not in self.open)

    def _add(self, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)  # else the kernel holds megabytes of each
        connection.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # else each small piece waits 40 ms for its turn
        self.open[number] = Flow(connection)
        self.sources[connection.fileno()] = lambda: self._take(number)

    def resting(self, congested: bool, attached: bool) -> set[int]:
        """Return the descriptors that are not to be read from now."""
        rests = {flow.connection.fileno() for flow in self.open.values() if congested or flow.credit <= 0}
        if self.listener and (len(self.open) >= FLOWS_OPEN or not attached):
            rests.add(self.listener.fileno())
        return rests

    def writers(self) -> dict[int, int]:
        """Return the descriptors that wait to be written to, and the numbers of their connections."""
        return {flow.connection.fileno(): number for number, flow in self.open.items() if flow.outbox.size}

    def _pass(self, number: int, data: bytes = b"", credit: int = 0, ended: bool = False) -> None:
        self.tell({"kind": "passed", "flow": number, "data": data, "credit": credit, "ended": ended})

    def _take(self, number: int) -> None:
        """Pass on what the code has sent."""
        flow = self.open[number]
        try:
            data = flow.connection.recv(min(flow.credit, READ_SIZE))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        flow.credit -= len(data)
        self._pass(number, data, ended=not data)
        if not data:
            self._close(number)

    def receive(self, frame: Pass) -> None:
        """Take what the host has sent."""
        if flow := self.open.get(frame["flow"]):
            flow.credit += frame["credit"]
            flow.outbox.add(frame["data"])
            flow.ended = flow.ended or frame["ended"]
            self.flush(frame["flow"])

    def flush(self, number: int) -> None:
        """Send to the code what it takes."""
        flow = self.open[number]
        try:
            flow.taken += flow.outbox.write(flow.connection.sendmsg) if flow.outbox.size else 0
        except BlockingIOError:
            return
        except OSError:
            self._pass(number, ended=True)
            self._close(number)
            return
        if flow.taken > TAKEN_AHEAD // 8 and not flow.ended:  # not each time: a frame wakes every process on its way
            self._pass(number, credit=flow.taken)
            flow.taken = 0
        if flow.ended and not flow.outbox.size:
            self._close(number)

    def _close(self, number: int) -> None:
        flow = self.open.pop(number)
        del self.sources[flow.connection.fileno()]
        with contextlib.suppress(OSError):
            flow.connection.recv(READ_SIZE)  # what is unread would make the kernel reset the connection
        flow.connection.close()

    def close_all(self) -> None:
        """Close all connections."""
        for number in list(self.open):
            self._pass(number, ended=True)
            self._close(number)


class Files:
    """The working directory and the other folders that code may write to, as process 1 sees them."""

    def __init__(self, home: str, others: Sequence[str]) -> None:
        self.home = home
        self.seen, _ = list_files(home)  # at the last call's end: path to time and size
        self.escaped: dict[str, str] = {}  # paths as the host knows them, of files whose names it could not show
        self.folders = {folder: attributes(folder) for folder in (home, *others)}

    def count(self) -> tuple[int, int]:
        """Return how many files there are in the working directory, and their bytes."""
        found, _ = list_files(self.home)
        return len(found), sum(size for _, size in found.values())

    def read(self, request: Read) -> Piece:
        """Return a piece of a file in the working directory."""
        try:
            fd = open_inside(self.home, self.escaped.get(request["path"], request["path"]))
            try:
                before = os.fstat(fd).st_ctime_ns
                data = os.pread(fd, PIECE_SIZE, request["offset"])
                state = os.fstat(fd)
            finally:
                os.close(fd)
            version = f"{state.st_ino} {before}" if before == state.st_ctime_ns else ""
            size, problem = state.st_size, None
        except OSError as error:
            data, size, version, problem = b"", 0, "", error.strerror or str(error)
        return {
            "id": request["id"],
            "kind": "file",
            "data": data,
            "problem": problem,
            "size": size,
            "version": version,
        }

    def write(self, request: Write) -> Written:
        """Write a piece of a file that the next call is given, at first under another name."""
        aside, place = f"{self.home}/.{request['id']}", f"{self.home}/{request['name']}"
        data, offset, problem = request["data"], request["offset"], None
        try:
            if offset == 0:
                self._make_room(request["needs"], place)
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                while data:
                    written = os.pwrite(fd, data, offset)
                    data, offset = data[written:], offset + written
            finally:
                os.close(fd)
            if request["last"]:
                os.rename(aside, place)
                state = os.stat(place, follow_symlinks=False)
                self.seen[request["name"]] = (state.st_mtime_ns, state.st_size)  # as the call has not written it
        except OSError as error:
            problem = error.strerror or str(error)
            with contextlib.suppress(OSError):
                os.unlink(aside)
        return {"id": request["id"], "kind": "written", "problem": problem}

    def _make_room(self, needed: int, place: str) -> None:
        """See that there is room for files, at the cost of the one that the first will replace. Raises OSError."""
        folder, old = os.statvfs(self.home), 0
        free = folder.f_bavail * folder.f_frsize
        with contextlib.suppress(OSError):
            old = os.stat(place, follow_symlinks=False).st_size
        if free + old < needed:
            raise OSError(errno.ENOSPC, f"there is room for {free + old} bytes, and {needed} are needed")
        if free < needed:
            os.unlink(place)

    def changed(self) -> tuple[list[tuple[str, int]], dict[str, str]]:
        """Return the files made or changed since the last time: path and size; and others: name to reason."""
        before = self.seen
        self.seen, complete = list_files(self.home)
        self.escaped = {shown: path for shown, path in self.escaped.items() if path in self.seen}
        listed: list[tuple[str, int]] = []
        left_out: dict[str, str] = {}
        room, more = LISTING_LIMIT, 0
        for path in sorted(self.seen):
            if self.seen[path] == before.get(path):
                continue
            reason = ""
            if len(path) > PATH_LIMIT:
                reason = f"its path is longer than {PATH_LIMIT} characters"
            shown = shown_path(path)
            room -= len(ENCODER.encode(shown))
            brief = shown if len(shown) <= NAME_SHOWN else f"{shown[:NAME_SHOWN]}…"
            if reason and len(left_out) < FILES_UNLISTED and brief not in left_out:
                left_out[brief] = reason
            elif reason or room < 0 or len(listed) == FILES_LISTED:
                more += 1
            else:
                listed.append((shown, self.seen[path][1]))
                if shown != path:
                    self.escaped[shown] = path
        if more:
            left_out[f"({more} more)"] = "there are too many to list"
        if not complete:
            left_out["(others)"] = f"only {ENTRIES_SEEN} files and folders are looked at"
        return listed, left_out

    def held(self) -> int:
        """Return how many bytes of memory the files take."""
        return sum(map(bytes_held, self.folders))

    def empty(self) -> bool:
        """Remove all files, and return whether nothing is left of them or of what code can leave in a folder itself."""
        for folder in self.folders:
            empty_folder(folder)
        self.seen, _ = list_files(self.home)
        is_empty = not any(os.listdir(folder) for folder in self.folders if os.path.isdir(folder))
        return is_empty and self.folders == {folder: attributes(folder) for folder in self.folders}


def list_files(home: str, endings: tuple[str, ...] = ("",)) -> tuple[dict[str, tuple[int, int]], bool]:
    """Return a folder's files, except hidden ones and bytecode: path to modification time and size.

    Only files with one of these `endings` are listed. The second value tells whether all entries were looked at.
    """
    found: dict[str, tuple[int, int]] = {}
    folders, left = [""], ENTRIES_SEEN
    while folders:
        folder = folders.pop()
        with contextlib.suppress(OSError), os.scandir(f"{home}/{folder}") as entries:
            for entry in entries:
                left -= 1
                if left < 0:
                    return found, False
                if entry.name.startswith(".") or entry.name == "__pycache__":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif entry.name.lower().endswith(endings) and entry.is_file(follow_symlinks=False):
                    state = entry.stat(follow_symlinks=False)
                    found[folder + entry.name] = (state.st_mtime_ns, state.st_size)
    return found, True


def shown_path(path: str) -> str:
    """Return a path with characters escaped that harm a terminal, reorder a line or are no text: %0A for a newline."""
    return HARMFUL.sub(lambda found: "".join(f"%{byte:02X}" for byte in os.fsencode(found[0])), path)


def bytes_held(folder: str) -> int:
    """Return how much the files of a file system that is held in memory take; 0 for one that is not there."""
    with contextlib.suppress(OSError):
        state = os.statvfs(folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize
    return 0


def empty_folder(folder: str) -> None:
    """Remove the contents of a folder, except what can't be removed."""
    import shutil  # only here: it imports modules for every kind of archive, and few sandboxes need it

    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.chmod(entry.path, 0o700)
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def attributes(folder: str) -> tuple[object, ...]:
    """Set a folder's times to now, and return what else code can leave in a folder that it has emptied."""
    try:
        os.utime(folder)
        names = os.listxattr(folder)
        about = os.stat(folder)
        return about.st_mode, about.st_uid, about.st_gid, *((name, os.getxattr(folder, name)) for name in sorted(names))
    except OSError as error:
        return (error.errno,)


def prepare_files(settings: dict[str, Any]) -> None:
    """Give Matplotlib the image's list of fonts, which takes seconds to build, and TLS the host's certificates."""
    with contextlib.suppress(OSError):
        os.makedirs(os.environ["MPLCONFIGDIR"], exist_ok=True)
        for name in os.listdir(SHIPPED_CACHE):
            os.symlink(f"{SHIPPED_CACHE}/{name}", f"{os.environ['MPLCONFIGDIR']}/{name}")
    trust_certificates(settings)


def trust_certificates(settings: dict[str, Any]) -> None:
    """Have TLS libraries trust the authority of the hosts that have a secret, besides what they trust anyway.

    That is what the image does, or the host's certificates if a setting wants so, or the image has none.
    """
    bundle, is_wanted = settings["certificates"]
    if not (bundle or settings["authority"]):
        return
    with contextlib.suppress(OSError, ImportError):
        import ssl  # only here: it takes 20 ms, and few sandboxes need it

        own = settings.setdefault("own_certificates", ssl.get_default_verify_paths().cafile)
        if own and not (bundle and is_wanted):
            if not settings["authority"]:
                return
            with open(own) as file:
                bundle = file.read()
        with open(f"{CERTIFICATES_FILE}~", "w") as file:
            file.write(f"{bundle}\n{settings['authority']}")
        os.chmod(f"{CERTIFICATES_FILE}~", 0o444)
        os.replace(f"{CERTIFICATES_FILE}~", CERTIFICATES_FILE)
        for variable in (
            "SSL_CERT_FILE",
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "GIT_SSL_CAINFO",
            "NODE_EXTRA_CA_CERTS",
        ):
            os.environ[variable] = CERTIFICATES_FILE


def catch_children(sources: dict[int, Callable[[], object]], reap: Callable[[], None]) -> None:
    """Have children reaped when one dies. A process inside can forge SIGCHLD, but that only costs a check."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wake_up() -> None:
        os.read(reader, 4096)
        reap()

    sources[reader] = wake_up


def package_folders(root: str, own: str | None) -> list[str]:
    """Return the existing folders of packages installed for a session (`own`) and for all sessions, in this order."""
    shared = None
    with contextlib.suppress(OSError):
        shared = os.readlink(f"{root}/shared")
    return [path for path in (own, shared and os.path.join(root, shared)) if path and os.path.isdir(path)]


def peers_are_told() -> bool:
    """Whether SO_PEERCRED names the peer. gVisor's (in 2022) names the caller, so no plug can be authenticated."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{PLUG_ADDRESS}-{os.urandom(8).hex()}")
    listener.listen()
    listener.settimeout(1)
    child = os.fork()
    if child == 0:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(listener.getsockname())
                connection.recv(1)
        finally:
            os._exit(0)
    try:
        with listener, listener.accept()[0] as connection:
            told = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return bool(told[0] == child)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ── walls ──
#
# What keeps the code from process 1, from its neighbours and from the host, beyond what the engine does.

SOCKET_MEMORY = 64 << 20  # bytes that may wait in the queues of a sandbox's sockets
TERMINALS = 64  # of the host's 3,072 for all containers
# System calls that exploits start from, or that take from the whole host, and the code can do without: their numbers on
# x86_64 and aarch64, and the error that code gets. Docker's own filter passes some of them, Podman's passes others, and
# gVisor has none. clone3 keeps its flags where no filter can see them; the C library falls back to clone.
NO_CALL = 0xFFFFFFFF  # where a kind of machine has no such call
REFUSED_CALLS = (
    ("io_uring_setup", 425, 425, errno.EPERM),
    ("io_uring_enter", 426, 426, errno.EPERM),
    ("io_uring_register", 427, 427, errno.EPERM),
    ("io_setup", 206, 0, errno.ENOSYS),  # its requests are counted for the whole host (fs.aio-max-nr)
    ("add_key", 248, 217, errno.EPERM),
    ("request_key", 249, 218, errno.EPERM),
    ("keyctl", 250, 219, errno.EPERM),
    ("unshare", 272, 97, errno.EPERM),
    ("setns", 308, 268, errno.EPERM),
    ("bpf", 321, 280, errno.EPERM),
    ("perf_event_open", 298, 241, errno.EPERM),
    ("userfaultfd", 323, 282, errno.EPERM),
    ("fanotify_init", 300, 262, errno.EPERM),
    ("memfd_secret", 447, 447, errno.ENOSYS),
    ("modify_ldt", 154, NO_CALL, errno.ENOSYS),
    ("ptrace", 101, 117, errno.EPERM),
    ("process_vm_readv", 310, 270, errno.EPERM),
    ("process_vm_writev", 311, 271, errno.EPERM),
    ("pidfd_getfd", 438, 438, errno.EPERM),
    ("vmsplice", 278, 75, errno.EPERM),
    ("clone3", 435, 435, errno.ENOSYS),
    ("sync", 162, 81, 0),  # does nothing, successfully: it would write what the whole host has not written yet
    ("syncfs", 306, 267, 0),
)
NOT_TO_PROCESS_1 = (  # allowed between processes of the same user; and gVisor lets any process kill process 1
    ("kill", 62, 129),
    ("tkill", 200, 130),
    ("tgkill", 234, 131),
    ("rt_sigqueueinfo", 129, 138),
    ("rt_tgsigqueueinfo", 297, 240),
    ("sched_setparam", 142, 118),
    ("sched_setscheduler", 144, 119),
    ("sched_setaffinity", 203, 122),
    ("sched_setattr", 314, 274),
)
UNIX, INET, INET6, NETLINK = 1, 2, 10, 16  # families of sockets: others, such as vsock, reach past namespaces
INET_SOCKETS = ((1, 0), (1, 6), (2, 0), (2, 17))  # kind and protocol: TCP and UDP; another may load a kernel module
NETLINK_ROUTE = 0  # the C library lists interfaces with it; the other protocols have had hole after hole
REFUSED_OPTIONS = (  # level and number
    (1, 26),  # SO_ATTACH_FILTER, and the next three: programs that run in the kernel
    (1, 50),
    (1, 51),
    (1, 52),
    (6, 31),  # TCP_ULP: another protocol on top of TCP in the kernel
    (17, 100),  # UDP_ENCAP: IPsec and L2TP
)
REFUSED_CONTROLS = (  # of ioctl()
    0x5412,  # TIOCSTI: types into a terminal
    0x5423,  # TIOCSETD, which may load a module for a kind of line, as the rest do for bridges and virtual networks
    *(0x8940, 0x8941, 0x89A0, 0x89A1, 0x89A2, 0x89A3),
    *(0x8980, 0x8981, 0x8982, 0x8983),
)
CORE_LIMIT = 4  # RLIMIT_CORE; of exactly 1 it also stops a handler of core dumps, which is the host's root: core(5)
NAMESPACE_FLAGS = 0x7E020000  # clone's flags for new namespaces of any kind
HUGE_MAPPING, HUGE_FILE = 0x40000, 0x4  # flags of mmap and memfd_create: huge pages are the host's, for its databases


def become_worker(descriptors: tuple[int, int, int, int]) -> None:
    """Cut a freshly forked worker off from the supervisor's session, signals, PR_SET_DUMPABLE and descriptors."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, fd in enumerate(descriptors):  # none of them is 0 to 2, so none is overwritten before its turn
        os.dup2(fd, target, inheritable=target < 3)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 3:
            with contextlib.suppress(OSError):
                os.close(fd)
    allow_inspection(True)
    set_oom_score(900)  # killed first when memory runs out, so that the supervisor lives to report it


def filter_system_calls() -> str | None:
    """Install `filter_program` for this process and all that it will fork; return the reason if that fails."""
    code = filter_program(os.uname().machine)
    if code is None:
        return f"their numbers are not known for {os.uname().machine}"
    prctl = libc().prctl
    steps = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(steps))
    if prctl(38, 1, 0, 0, 0) or prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP
        return os.strerror(ctypes.get_errno())
    return None


def filter_program(machine: str) -> bytes | None:
    """Return a system call filter in BPF for this kind of machine, or None if its call numbers are not known here.

    The filter refuses REFUSED_CALLS, NOT_TO_PROCESS_1 on process 1, new namespaces, sockets of other families and
    protocols than the code needs, REFUSED_OPTIONS, REFUSED_CONTROLS, huge pages, and calls in another ABI: x86_64
    kernels also take those of 32-bit programs, which are numbered differently, and those of x32, which are numbered
    from 2**30. It keeps the limit of core dumps as it is, and tells code that it was changed.
    """
    if machine not in ("x86_64", "aarch64"):
        return None
    first = machine == "x86_64"
    number, architecture, one, two, three, four = 0, 4, 16, 24, 32, 40  # offsets in the kernel's struct seccomp_data
    load, mask, equal, at_least, leave = 0x20, 0x54, 0x15, 0x35, 0x06
    allow = (leave, 0, 0, 0x7FFF0000)

    def refuse(reason: int) -> tuple[int, int, int, int]:
        return leave, 0, 0, 0x00050000 | reason

    def when(
        *conditions: tuple[int, int, int], then: list[tuple[int, int, int, int]]
    ) -> list[tuple[int, int, int, int]]:
        """Return the steps that go on with `then` if each word has this value under its mask, else after it."""
        for offset, bits, value in reversed(conditions):
            jump = (equal, 0, len(then), value)  # steps to skip if true, and if false
            then = [(load, 0, 0, offset), (mask, 0, 0, bits), jump, *then]
        return then

    every = 0xFFFFFFFF
    sockets = when((one, every, UNIX), then=[allow])
    sockets += when((one, every, NETLINK), (three, every, NETLINK_ROUTE), then=[allow])
    known = [when((two, 0xF, kind), (three, every, protocol), then=[allow]) for kind, protocol in INET_SOCKETS]
    for family in (INET, INET6):
        sockets += when((one, every, family), then=[*itertools.chain(*known), refuse(errno.EPROTONOSUPPORT)])
    sockets += [refuse(errno.EAFNOSUPPORT)]
    options = [
        when((two, every, level), (three, every, option), then=[refuse(errno.ENOPROTOOPT)])
        for level, option in REFUSED_OPTIONS
    ]
    controls = [when((two, every, control), then=[refuse(errno.EPERM)]) for control in REFUSED_CONTROLS]
    process = when((one, every, 1), then=[refuse(errno.EPERM)])
    limits = [
        *process,
        *when((three, every, 0), (three + 4, every, 0), then=[allow]),  # no new limit
        *when((two, every, CORE_LIMIT), then=[refuse(0)]),
    ]
    rules = [
        ("clone", 56, 220, [*when((one, NAMESPACE_FLAGS, 0), then=[allow]), refuse(errno.EPERM)]),
        ("socket", 41, 198, sockets),
        ("socketpair", 53, 199, sockets),
        ("setsockopt", 54, 208, [*itertools.chain(*options), allow]),
        ("ioctl", 16, 29, [*itertools.chain(*controls), allow]),
        ("setrlimit", 160, 164, [*when((one, every, CORE_LIMIT), then=[refuse(0)]), allow]),
        ("prlimit64", 302, 261, [*limits, allow]),
        ("mmap", 9, 222, [*when((four, HUGE_MAPPING, 0), then=[allow]), refuse(errno.ENOMEM)]),
        ("memfd_create", 319, 279, [*when((two, HUGE_FILE, 0), then=[allow]), refuse(errno.EINVAL)]),
        *((*call, [*process, allow]) for call in NOT_TO_PROCESS_1),
    ]
    steps = [
        (load, 0, 0, architecture),
        (equal, 1, 0, 0xC000003E if first else 0xC00000B7),
        refuse(errno.ENOSYS),
        (load, 0, 0, number),
        (at_least, 0, 1, 1 << 30),
        refuse(errno.ENOSYS),
    ]
    for _, here, there, reason in REFUSED_CALLS:
        steps += [(equal, 0, 1, here if first else there), refuse(reason)]
    for _, here, there, rule in rules:
        steps += [(equal, 0, len(rule), here if first else there), *rule]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, allow])


def kill_all_others(patience: float, spared: int = 0) -> None:
    """Kill all that process 1 may kill (not itself, nor the plug), and reap them for up to `patience` seconds.

    One process may be spared: then all are stopped first, so that none can fork while they are killed one by one.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGSTOP if spared else signal.SIGKILL)
    for pid in other_processes() if spared else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT if pid == spared else signal.SIGKILL)
    end = time.monotonic() + patience
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if spared and other_processes() == [spared]:
                    break
                time.sleep(0.001)


def other_processes() -> list[int]:
    """Return the ids of all other processes that the supervisor may kill; a plug, as another user, is not one."""
    others = []
    for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.kill(pid, 0)
            others.append(pid)
    return others


def overdraft() -> str | None:
    """Say what the sandbox's processes hold of that which all on the host share, if it is more than they may.

    Nobody else counts it: the bytes in the queues of most sockets belong to no container's memory, and thousands of
    processes may have a thousand sockets each; and the number of terminals is a limit of the whole host.
    """
    with contextlib.suppress(OSError):
        terminals = len(os.listdir("/dev/pts")) - 1  # besides `ptmx`
        if terminals > TERMINALS:
            return f"the code had {terminals} pseudo-terminals open, and a sandbox may have {TERMINALS}"
    held = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for path in ("netlink", *protocols_in_use(SOCKET_MEMORY)):
            with open(f"/proc/net/{path}") as lines:
                held += sum(bytes_queued(path, line.split(None, 5)) for line in itertools.islice(lines, 1, None))
            if held > SOCKET_MEMORY:
                return f"the code's sockets held over {SOCKET_MEMORY >> 20} MB that nobody had read"
    return None


def protocols_in_use(limit: int) -> list[str]:
    """Return the protocols whose sockets, of the whole host, hold more than `limit` bytes: to list them takes long."""
    found = []
    for line in read_kernel_file("/proc/net/sockstat").splitlines():
        name, *about = line.split()
        if name in ("TCP:", "UDP:") and int(about[about.index("mem") + 1]) * resource.getpagesize() > limit:
            found += [name[:-1].lower(), f"{name[:-1].lower()}6"]
    return found


def bytes_queued(protocol: str, fields: list[str]) -> int:
    """Return the bytes of kernel memory that a socket in a list of /proc/net holds."""
    if protocol == "netlink":
        return int(fields[4])
    sent, _, received = fields[4].partition(":")
    itself = 0 if fields[3] == "06" else 4096  # 6 is TIME_WAIT, when little is left of it
    return int(sent, 16) + int(received, 16) + itself


def system_v_objects() -> int:
    """Count the shared memory segments, semaphores and message queues, which outlive their processes."""
    count = 0
    for kind in ("shm", "sem", "msg"):
        with contextlib.suppress(OSError):
            count += read_kernel_file(f"/proc/sysvipc/{kind}").count("\n") - 1
    return count


def allow_inspection(allowed: bool) -> None:
    """Set whether other processes of the same user may see this one's memory and descriptors (PR_SET_DUMPABLE)."""
    if libc().prctl(4, int(allowed), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def set_oom_score(score: int) -> None:
    """Set how soon the kernel kills this process when memory runs out; the container starts with 500."""
    with contextlib.suppress(OSError):
        write_kernel_file("/proc/self/oom_score_adj", b"%d" % score)


@contextlib.contextmanager
def weight(size: int) -> Iterator[None]:
    """Have the kernel count `size` bytes more for this process, at next to no cost, when it looks for the heaviest one.

    One piece of memory is mapped again and again, and each mapping counts: see oom_badness() in Linux' mm/oom_kill.c.
    """
    if not size:
        yield
        return
    piece, place = max(size >> 9, 1 << 20), 0
    mmap = libc().mmap
    mmap.restype = ctypes.c_void_p
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with contextlib.suppress(OSError, AttributeError):  # no memfd_create() here: then it is lighter than it should be
        memory = os.memfd_create("weight")
        os.write(memory, bytes(piece))
        lines = read_kernel_file("/proc/self/maps").splitlines()
        ends = (int(line.split()[0].split("-")[1], 16) for line in lines)
        top = max(end for end in ends if end < 1 << 63)  # a page of the kernel's lies above that
        # PROT_NONE; MAP_PRIVATE and MAP_ANONYMOUS: a range of addresses. Linux unmaps the highest last, and may kill
        # the next process before the last 40 MB of that are free (exit_mmap() in mm/mmap.c): these are to be the last.
        place = mmap(top + (1 << 24), size, 0, 0x22, -1, 0)
        starts = range(place, place + size - piece + 1, piece)
        for start in starts:
            mmap(start, piece, 1, 0x11, memory, 0)  # PROT_READ; MAP_SHARED and MAP_FIXED
        os.close(memory)
        mapped = (ctypes.c_char * (len(starts) * piece)).from_address(place)
        memoryview(mapped)[:: 1 << 16].tobytes()  # a look at one page has the kernel map its neighbours, 64 kB in all
    try:
        yield
    finally:
        libc().munmap(ctypes.c_void_p(place), ctypes.c_size_t(size))


def open_memory_events() -> int:
    """Open the kernel's file of memory events in this container; return its descriptor, or -1 if there is none."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY)
    return -1


def count_oom_kills(events: int) -> int:
    """Return how many processes the kernel's OOM killer has killed in this container; 0 if that is not known."""
    with contextlib.suppress(OSError, IndexError):
        return int(os.pread(events, 4096, 0).partition(b"\noom_kill ")[2].split()[0])
    return 0


def own_memory(process: int | Literal["self"] = "self") -> tuple[int, int]:
    """Return the bytes of memory that a process has and no file, and those that it has asked for and not touched."""
    with contextlib.suppress(OSError, ValueError):
        _, resident, shared, _, _, data, _ = map(int, read_kernel_file(f"/proc/{process}/statm").split())
        touched, page = resident - shared, resource.getpagesize()
        return touched * page, (data - touched) * page
    return 0, 0


def memory_in_use() -> int | None:
    """Return the bytes of memory charged to the container, or None if that is not known."""
    for path in ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(read_kernel_file(path))
    return None


def memory_of_files() -> tuple[int, int]:
    """Return the bytes of memory that the container's cached files take, and files in memory; 0 if not known."""
    for path, unit in (("/sys/fs/cgroup/memory.stat", ""), ("/sys/fs/cgroup/memory/memory.stat", "total_")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            counts = dict(line.split() for line in read_kernel_file(path).splitlines())
            cached = sum(int(counts[f"{unit}{kind}_file"]) for kind in ("active", "inactive"))
            return cached, int(counts[f"{unit}shmem"])
    return 0, 0


def free_memory() -> float:
    """Return the bytes that the container may still take, besides what the kernel would give back; inf if not known."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            cached, _ = memory_of_files()
            return int(read_kernel_file(path)) - (memory_in_use() or 0) + cached
    return math.inf


def read_kernel_file(path: str) -> str:
    """Read a small file in /proc or /sys, with a third of open()'s system calls: every recycling reads several."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)


def write_kernel_file(path: str, text: bytes) -> None:
    """Write a small file in /proc or /sys."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


# ── worker ──

VALUE_LIMIT = 32_000  # characters of a value's repr
TRACEBACK_LIMIT = 16_000
MESSAGE_LIMIT = 4_000
TASKS_TIME, OLD_TASKS_TIME = 1.0, 0.05  # seconds for tasks that are not done: of this call, and of earlier ones
COPY_ROOM = 8 << 20  # bytes that have to be free to make a copy, which must not be what fills the memory


class Worker:
    """The process that runs the code: a read-eval-print loop around a real `__main__` module.

    forked ── ready ──call──> runs code ──its end──> ready, and leaves a copy ──> ...
                                  │ crash, kill, out of memory
                                  └────> gone: the copy is the worker, or else a new one, without variables
    """

    def __init__(self, control: Channel, settings: dict[str, Any]) -> None:
        self.control = control
        self.process = os.getpid()
        self.home: str = settings["working_dir"]
        self.call: str | None = None
        self.calls = 0
        self.sources = Sources(self.home)
        self.flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT  # plus those of the code's __future__ imports
        self.rich_left = RICH_LIMIT
        self.lock = threading.RLock()  # around the control channel
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        self.names = vars(main)
        self.names["__builtins__"] = builtins
        self.signals = Signals(self.note)
        self.continuity = Continuity(self)
        with contextlib.suppress(OSError):
            os.chdir(self.home)
        sys.path.insert(0, self.home)
        self.clears = False  # whether the next output takes the place of what was shown before
        self.standard = StandardStreams(self)
        self.standard.restore()
        builtins.display = self.display  # type: ignore[attr-defined]  # a new builtin, as in IPython
        builtins.input = refuse_input
        self.sources.teach_inspect()
        self.pictures = Pictures(self)
        self.pages = Pages(self.home)
        self.notebook = builtins.__notebook__ = Notebook(self)  # type: ignore[attr-defined]  # for translated code
        sys.breakpointhook = refuse_debugger
        sys.modules["sandbox_backend"] = self.pictures.backend()
        sys.meta_path[:] = [Adapter(self), *sys.meta_path, StandIn(self)]
        fit_to_share(settings["cpus"])
        if "numpy.random" in sys.modules:  # else every worker forked from here would draw the same numbers
            sys.modules["numpy.random"].seed(int.from_bytes(os.urandom(4), "little"))
        self.packages = Packages(settings["packages"])
        self.copies = CopyMaker(self, settings["memory_limit"])
        self.policy = ImportPolicy(settings["allowed_modules"], settings["blocked_modules"], self.home)
        self.policy.install()

    def preload(self, modules: list[str]) -> None:
        """Import these modules, with the packages for all sessions on the path, until a call arrives."""
        self.packages.use(None)
        for name in modules:
            if self.control.has_more():
                break
            with contextlib.suppress(Exception):  # code that imports it will get the error itself
                import_ahead(name)

    def serve(self) -> None:
        """Run one request after another until the supervisor is gone."""
        given: GiveState | None = None
        while frame := self.hear():
            if frame["op"] == "state":
                given = frame
            elif frame["op"] == "copy":
                with contextlib.suppress(Exception):  # too many processes, or what the code did to modules used here
                    self.copies.leave(frame["key"])
            elif frame["op"] == "use":
                self._use(frame)
            elif frame["op"] == "run":
                state = given["data"] if given and given["id"] == frame["id"] else None
                given = None
                try:
                    self._serve_call(frame, state)
                except BaseException as error:  # the code left a profiler, a limit or similar that breaks the worker
                    self._recover(error)

    def hear(self) -> Any:
        """Return what the supervisor asks for next, None when it is gone."""
        with contextlib.suppress(EOFError):
            while (frame := self.control.next()) is None:
                self.control.read()
            return frame
        return None

    # ── one call ──

    def _serve_call(self, request: Run, state: bytes | None) -> None:
        """Run the code and the steps after it, then report. Nothing that the code left behind may prevent that."""
        self.calls += 1
        self.call = request["id"]
        self.clears, self.rich_left = False, RICH_LIMIT
        self.signals.attempt(self.pictures.begin)
        self.signals.attempt(self.pages.begin)
        resets = reset_peak_memory()
        started = cpu_seconds()
        report: Report = {"id": request["id"], "kind": "done", "status": "ok", "cpu": 0.0}
        error = self.signals.attempt(self._run, request, state, report)
        if error and (failure := self.signals.attempt(self.sources.describe, error, report)):
            raise failure
        if os.getpid() != self.process:
            self._end_child(report)
        for purpose, step in self._steps_after(request, state is not None):
            if error := self.signals.attempt(step):
                how = "was interrupted" if type(error) is KeyboardInterrupt else f"failed: {failure_of(error)}"
                self.signals.attempt(self.note, f"{purpose} {how}")
        if not request["final"]:
            self.signals.attempt(self._tell_variables, report)
        self.signals.attempt(self.standard.flush)
        self.signals.stop_timers()
        with self.lock:
            report["cpu"] = cpu_seconds() - started
            report["memory"] = peak_memory() if resets else None
            self.control.send(report)
            self.call = None

    def _recover(self, error: BaseException) -> None:
        """Answer a call whose end the worker failed to report, and disable what is known to cause such failures."""
        if os.getpid() != self.process:
            os._exit(1)
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000))
        message = "the code left the interpreter in a state that prevents the call's outcome from being reported"
        kind = clip(class_name(error), 200)
        exception: ExceptionFields = {
            "type": kind,
            "message": message,
            "line": None,
            "traceback": f"{kind}: {message}\n",
            "missing": None,
        }
        self.signals.stop_timers()
        with self.lock:
            if self.call:
                report: Report = {"id": self.call, "kind": "done", "status": "error", "cpu": 0.0}
                self.control.send({**report, "exception": exception})
                self.call = None

    def _run(self, request: Run, state: bytes | None, report: Report) -> None:
        """Run the code with its variables, and report the value of its last expression."""
        self.signals.restore()
        name = request["filename"] or f"<call {self.calls}>"
        sys.argv = [name, *request["argv"]]
        self.standard.restore()
        self.names["__builtins__"] = builtins
        report["stale"] = self.packages.use(request["packages"])
        if not name.startswith("<"):
            self.names["__file__"] = os.path.join(self.home, name)
        if state is not None:
            self.names.update(json.loads(state.decode()))
        self.continuity.begin()
        value = self._evaluate(request["data"].decode(), name, request["final"])
        if value is not None:
            self.continuity.keep(value)
            self.continuity.context.run(self._show, value, report)

    def _show(self, value: Any, report: Report) -> None:
        """Report the value of the last expression, and show it in the forms that it has."""
        forms = self._forms(value) or {"text/plain": describe(value)}
        text = forms.pop("text/plain")
        report["value"], report["value_length"] = clip(text, VALUE_LIMIT), len(text)
        if forms:
            self.publish(forms, True)

    def _steps_after(self, request: Run, with_state: bool) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield the steps that follow the code, however it ended, each with a description for notes."""
        if request["final"]:  # as at the end of a script
            yield "waiting for threads", threading._shutdown  # type: ignore[attr-defined]
        yield "telling the end", functools.partial(self.send, "ended")
        yield "showing the figures", self.pictures.show_last_states
        if with_state:
            yield "collecting the state", functools.partial(self._send_state, request["state_limit"])
        if request["final"]:
            yield "running atexit callbacks", atexit._run_exitfuncs
        yield "showing the pictures", self.pictures.show_saved
        if elsewhere := self.pages.files_elsewhere():
            yield "naming files", functools.partial(self.note, elsewhere)

    def _tell_variables(self, report: Report) -> None:
        report["variables"] = outline(self.names)

    def _send_state(self, limit: int) -> None:
        variables, left_out = collect_state(self.names, limit)
        self.send("state", data=variables, left_out=left_out)

    def _end_child(self, report: Report) -> None:
        """Exit a process that the code forked, when it reaches the end of its script, as Python would."""
        if "exception" in report and report["exception"]["type"] != "SystemExit":
            with contextlib.suppress(BaseException):
                sys.stderr.write(report["exception"]["traceback"])
        self.signals.attempt(self.standard.flush)
        os._exit(report.get("exit_code", int(report["status"] != "ok")))

    def _use(self, request: Use) -> None:
        """Use other packages from now on, and answer which modules had been imported in another version."""
        stale: list[str] = []
        with contextlib.suppress(Exception):  # the code may have put anything into sys.path
            stale = self.packages.use(request["packages"])
        self.control.send({"id": request["id"], "kind": "used", "stale": stale})

    def _evaluate(self, given: str, filename: str, is_last: bool) -> Any:
        """Run the code; return the value of the expression it ends with, or None."""
        self.sources.enter(given, filename)
        flags = self.flags

        def parse(code: str) -> Any:
            return compile(code, filename, "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)

        code, tree, context = self.notebook.parse(given, parse)

        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not code.rstrip().endswith(";"):
            last = ast.Expression(tree.body.pop().value)
        body = compile(tree, filename, "exec", flags, dont_inherit=True)
        for feature in __future__.all_feature_names:
            self.flags |= body.co_flags & getattr(__future__, feature).compiler_flag
        steps = [body, *([compile(last, filename, "eval", self.flags, dont_inherit=True)] if last else [])]
        if code != given:
            self.sources.translate(code)
        with context:
            return self.continuity.execute(steps, is_last)

    # ── rich output ──

    def display(self, *values: Any, raw: bool = False, display_id: Any = None, **_options: Any) -> Any:
        """Show values in the result at this point, as images, HTML or other rich forms if they have any.

        With `raw`, they are forms by MIME type. Returns a handle if `display_id` is given, as IPython's does.
        """
        for value in values:
            if raw:
                self.publish(self.pages.fit(encode_forms(value)))
            elif (forms := self._forms(value)) is not None:
                self.publish({**forms, "text/plain": clip(forms["text/plain"], VALUE_LIMIT)})
        if display_id:
            return types.SimpleNamespace(display_id=display_id, display=self.display, update=self.display)
        return None

    def _forms(self, value: Any) -> dict[str, str] | None:
        """Return a value's forms, with text; or note that it is a figure that can't be drawn, and return None."""
        try:
            if is_figure(value):
                forms = self.pictures.draw(value)
            else:
                forms = picture_in(value) or self.pages.make(value) or rich_forms(value)
        except Exception as error:
            number = getattr(value, "number", "") if is_figure(value) else ""
            self.note(f"{f'figure {number}' if number else class_name(value)} could not be drawn: {failure_of(error)}")
            return None
        with contextlib.suppress(Exception):
            self.pictures.note_shown(value)
        return self.pages.fit(forms if "text/plain" in forms else {"text/plain": describe(value), **forms})

    def clear_output(self, wait: bool = False) -> None:
        """Take back what the call has shown so far: now or, to `wait`, as soon as it shows something else."""
        self.standard.flush()
        self.clears = wait
        if not wait:
            self.clear()

    def clear(self) -> None:
        """Take back what the call has shown so far."""
        self.clears, self.rich_left = False, RICH_LIMIT
        self.send("clear")

    def note(self, text: str) -> None:
        """Put a note from the worker, in brackets, into the output."""
        self.publish({"text/plain": f"[{clip(text, 500)}]"})

    def publish(self, bundle: dict[str, str], is_value: bool = False) -> None:
        if self.clears:
            self.clear()
        if self.rich_left < 0:
            return  # a note has already said so
        self.pictures.shown.update(map(hash, bundle.values()))
        data = json.dumps(bundle)
        most = min(DATA_LIMIT, self.rich_left - FRAME_COST)
        if len(data) > most:
            limit = f"{DATA_LIMIT} at a time" if most == DATA_LIMIT else f"{RICH_LIMIT} in one call"
            note = f"[rich output of {len(data)} characters left out: the limit is {limit}]"
            data = json.dumps({"text/plain": note})
        self.rich_left -= len(data) + FRAME_COST
        self.standard.flush()
        self.send("display", data=data.encode(), is_value=is_value)

    def send(self, kind: str, **fields: Any) -> None:
        """Send a frame of the running call, whole even if an interruption arrives meanwhile."""
        with self.signals.shielded(), self.lock:
            if not self.call:
                return  # from a thread that outlived its call: there is no result to put this into
            self.control.send({"id": self.call, "kind": kind, **fields})
            if kind in ("display", "turn", "clear"):
                while (answer := self.hear()) and answer["op"] != "proceed":
                    pass  # wait, so that the code's later output comes after this


class Signals:
    """When the code may be interrupted, and its own signal handlers: they run in the steps of a call, and only there.

    Elsewhere an exception from a handler would hit the worker's own bookkeeping, at any of its instructions.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._interruptible = False  # whether the step that runs, if one does, has not been interrupted
        self._shielded = False
        self._held: list[tuple[Callable[..., object], int]] = []  # what has arrived while shielded
        self._note = note
        inner: Any = sys.modules["_signal"]  # the module `signal` calls these two whenever it is called
        install, look = inner.signal, inner.getsignal
        inner.signal = lambda number, handler: self._own(install(number, self._guarded(handler)))
        inner.getsignal = lambda number: self._own(look(number))
        self.restore()

    def _guarded(self, handler: Any) -> Any:
        return functools.partial(self._admit, handler) if callable(handler) else handler

    def _own(self, handler: Any) -> Any:
        """Return the handler that was guarded."""
        is_guarded = isinstance(handler, functools.partial) and handler.func == self._admit
        return handler.args[0] if is_guarded else handler

    def _admit(self, handler: Callable[..., object], number: int, frame: types.FrameType | None) -> None:
        """Run a handler if a step of a call was interrupted; hold it back if that is shielded."""
        if self._shielded:
            if (handler, number) not in self._held:
                self._held.append((handler, number))
            return
        place = frame and frame.f_back
        while place:
            if place.f_code is Signals.attempt.__code__:
                handler(number, frame)
                return
            place = place.f_back

    def _on_interrupt(self, *_: Any) -> None:
        """Raise KeyboardInterrupt in the code, at most once per step."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Hold back signals until the end of the block."""
        if self._shielded or threading.current_thread() is not threading.main_thread():
            yield  # no signal is handled in another thread
            return
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        while self._held:
            handler, number = self._held.pop(0)
            self._admit(handler, number, sys._getframe())

    def attempt(self, step: Callable[..., object], *arguments: Any) -> BaseException | None:
        """Run a step that one interruption may end; return the interruption or error that ended it, if any."""
        try:
            self._interruptible = True
            self._run(step, *arguments)
        except BaseException as error:
            return error
        return None

    def _run(self, step: Callable[..., object], *arguments: Any) -> None:
        """Run a step in a frame below that of `attempt`, even if it is not written in Python."""
        step(*arguments)

    def restore(self) -> None:
        """Have SIGINT interrupt the code, whatever an earlier call has set."""
        signal.signal(signal.SIGINT, self._on_interrupt)

    def stop_timers(self) -> None:
        """Stop the timers that the code left running."""
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            if signal.setitimer(timer, 0)[0]:
                self.attempt(self._note, "a timer that the code left running was stopped")


class StandardStreams:
    """sys.stdin, which is empty, and sys.stdout and sys.stderr, as text streams over descriptors 1 and 2."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.real: dict[str, Stream] = {}
        self.spares = {fd: os.dup(fd) for fd in (0, 1, 2)}
        self._turn = 0  # the descriptor that Python's own streams wrote to last

    def restore(self) -> None:
        """Restore the streams, and the descriptors that the code has closed or redirected.

        A replacement that passes on to them, such as a tee to a file, stays; so does input that the code has made.
        """
        notes = []  # for when all are restored, as a note flushes them
        self._turn = 0
        for fd, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            real, stream = self.real.get(name), getattr(sys, name, None)
            if not is_same_file(fd, self.spares[fd]):
                with contextlib.suppress(OSError):
                    os.dup2(self.spares[fd], fd)
                    notes.append(f"descriptor {fd} was left closed or redirected; it is the real sys.{name} again")
            if fd == 0:
                if self.worker.calls == 0 or not is_open(stream):
                    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # stays open
            elif real is None or not is_open(real):
                buffer = Buffer(fd, self.take_turn)
                real = self.real[name] = Stream(buffer, "utf-8", "backslashreplace", line_buffering=True)
                setattr(sys, name, real)
                setattr(sys, f"__{name}__", real)
            elif stream is not real and not passes_on(stream, real):
                setattr(sys, name, real)
                is_closed = False  # a closed stream is replaced without a note
                with contextlib.suppress(BaseException):
                    is_closed = stream is None or bool(stream.closed)
                if not is_closed:
                    kind = class_name(stream)
                    notes.append(f"sys.{name} was left replaced by a {kind} object; it is the real one again")
        for note in notes:
            self.worker.note(note)

    def take_turn(self, fd: int) -> None:
        """Have the supervisor read what was written to the other descriptor: between two pipes there is no order.

        Only this process's own streams take turns: what its children write comes as it always did.
        """
        if self.worker.clears and os.getpid() == self.worker.process:
            self.worker.clear()
        if fd != self._turn and os.getpid() == self.worker.process:
            other, self._turn = self._turn, fd
            if other and has_unread(other):
                self.worker.send("turn")

    def flush(self) -> None:
        """Flush the standard streams: what the code has put in their place, and the real ones."""
        for name, real in self.real.items():
            for stream in (getattr(sys, name, real), real):
                try:
                    stream.flush()
                except KeyboardInterrupt:
                    raise
                except BaseException:  # the code may have put anything there
                    pass


class Stream(io.TextIOWrapper):
    """Standard output or errors, with an instance `__dict__` for `passes_on` to use.

    It stays open: whoever holds it, such as a handler of a log, would else complain for the rest of the session.
    """

    def close(self) -> None:
        """Flush it."""
        with contextlib.suppress(ValueError):  # it is detached
            self.flush()


class Buffer(io.BufferedWriter):
    """Buffer before descriptor 1 or 2. It takes its turn before it writes (see `StandardStreams.take_turn`).

    Below it there is no Python code, in which an interruption could keep it from learning what has been written.
    """

    def __init__(self, fd: int, take_turn: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(fd, "w", closefd=False))
        self.take_turn = take_turn
        self.has_some = False  # whether anything was written since the last flush

    def write(self, data: Any) -> int:
        """Write bytes, some of them now if there are many."""
        self.take_turn(self.fileno())
        self.has_some = True
        return super().write(data)

    def flush(self) -> None:
        """Write what there is."""
        if self.has_some:
            self.take_turn(self.fileno())
        super().flush()
        self.has_some = False


def is_open(stream: Any) -> bool:
    """Whether a stream can be used: it is neither closed nor detached from its buffer, whatever it is."""
    with contextlib.suppress(BaseException):
        return not stream.closed
    return False


def has_unread(pipe: int) -> bool:
    """Whether a pipe holds bytes that nobody has read yet; True if that can't be known."""
    try:
        return fcntl.ioctl(pipe, 0x541B, bytes(4)) != bytes(4)  # FIONREAD
    except OSError:
        return True


def is_same_file(fd: int, other: int) -> bool:
    """Whether two descriptors refer to the same file, pipe or socket; False if either is closed."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.fstat(other))
    return False


def passes_on(stream: Any, real: Stream) -> bool:
    """Whether the replacement of a standard stream ends up writing to that stream."""
    heard: list[str] = []
    vars(real)["write"] = heard.append
    try:
        stream.write("")
        return bool(heard) or is_same_file(stream.fileno(), real.fileno())
    except BaseException:  # whatever it is, it is not known to write there
        return False
    finally:
        del vars(real)["write"]


class Continuity:
    """State that lasts from call to call beside variables: one context, one event loop with its tasks, no old warnings.

    A task that code starts outside of a coroutine runs when the code has ended; one that is not done by then goes on
    whenever later code awaits something.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.context = contextvars.copy_context()
        self.loop: Any = None  # asyncio's, once the code needs one
        self.tasks: Any = weakref.WeakSet()
        self.kept: Any = None  # the value that `_` had from us
        sys.dont_write_bytecode = True  # a module written again in the same second would be taken for the old one

    def begin(self) -> None:
        """Have each warning come anew, and asyncio find the loop."""
        self.worker.names.pop("__warningregistry__", None)
        with contextlib.suppress(Exception), warnings.catch_warnings():  # the code may have emptied sys.modules
            pass  # the end of this makes all modules forget what they have warned of
        if self.loop:
            self.find_loop()

    def keep(self, value: Any) -> None:
        """Have `_` be the value, as in the interactive interpreter, unless the code has put something else there."""
        if getattr(builtins, "_", self.kept) is self.kept:
            builtins._ = self.kept = value  # type: ignore[attr-defined]

    def find_loop(self) -> Any:
        """Return the event loop, which is made if there is none, and have asyncio find it."""
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
            self.loop.set_task_factory(self._make_task)
        asyncio.set_event_loop(self.loop)
        return self.loop

    def _make_task(self, loop: Any, coroutine: Any, **options: Any) -> Any:
        task = sys.modules["asyncio"].Task(coroutine, loop=loop, **options)
        self.tasks.add(task)
        return task

    def execute(self, steps: list[types.CodeType], is_last: bool) -> Any:
        """Run one piece after another, all in the event loop if any has an await; return the last one's value."""
        earlier, awaits = set(self.tasks), any(map(is_coroutine, steps))
        if awaits:
            value = self._await(self._run_all(steps))
        else:
            value = [self.context.run(eval, step, self.worker.names) for step in steps][-1]
        self._settle(earlier, is_last and not awaits)
        return value

    async def _run_all(self, steps: list[types.CodeType]) -> Any:
        value = None
        for step in steps:
            value = eval(step, self.worker.names)
            if is_coroutine(step):
                value = await value
        if sys.hexversion < 0x30B0000:  # there a task has a context of its own
            self.context = contextvars.copy_context()
        return value

    def _await(self, coroutine: Any) -> Any:
        loop = self.find_loop()
        if sys.hexversion >= 0x30B0000:
            task = loop.create_task(coroutine, context=self.context)
        else:
            task = self.context.run(loop.create_task, coroutine)
        try:
            return loop.run_until_complete(task)
        except KeyboardInterrupt:
            if not task.done():  # else the code itself raised it, and asyncio would wait forever
                task.cancel()
                with contextlib.suppress(sys.modules["asyncio"].CancelledError):
                    loop.run_until_complete(task)
            raise

    def _settle(self, earlier: set[Any], to_the_end: bool) -> None:
        """Run tasks for a while, or to their end, as where a script only starts them; and tell which have failed."""
        asyncio = sys.modules.get("asyncio")
        if not asyncio or not self.loop or self.loop.is_closed():
            return
        due = time.monotonic() + (TASKS_TIME if set(self.tasks) - earlier else OLD_TASKS_TIME)
        while pending := [task for task in self.tasks if not task.done()]:
            left = None if to_the_end else due - time.monotonic()
            if left is not None and left <= 0:
                break
            self._await(asyncio.wait(pending, timeout=left))
        for task in list(self.tasks):
            if task.done() and not task.cancelled() and task._log_traceback:  # nobody has asked how it ended
                text = self.worker.sources.traceback_of(task.exception())
                self.worker.note(f"a task has failed: {text.strip()}")
        new = [task for task in self.tasks if not task.done() and task not in earlier]
        if new:
            tasks = f"{len(new)} tasks are not done: they go" if len(new) > 1 else "a task is not done: it goes"
            self.worker.note(f"{tasks} on when later code awaits something")


def is_coroutine(step: types.CodeType) -> bool:
    """Whether a piece of code has a top-level await."""
    return bool(step.co_flags & 0x80)  # inspect.CO_COROUTINE


class CopyMaker:
    """Leaves a sleeping copy of the worker, which goes on in its place if the code ends it."""

    def __init__(self, worker: Worker, memory_limit: int) -> None:
        self.worker = worker
        self.memory_limit = memory_limit
        self.memory = own_memory()[0]  # bytes before the first call

    def leave(self, key: str) -> None:
        """Leave a copy, if it would be a true one."""
        if self._can_be_true():
            self._fork(key)

    def _can_be_true(self) -> bool:
        """Whether a fork has all that the variables depend on, and there is memory for two that write to it."""
        if len(os.listdir("/proc/self/task")) > 1 or own_memory()[0] - self.memory > self.memory_limit // 3:
            return False
        if free_memory() < COPY_ROOM:
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return False  # it has children
        with open("/proc/self/maps", "rb") as maps:
            if re.search(rb"\n\S+ rw.s ", maps.read()):
                return False  # shared memory
        loop = {part.fileno() for part in self._parts_of_loop()}
        if loop and (
            self.worker.continuity.loop._ready
            or self.worker.continuity.loop._scheduled
            or sys.modules["asyncio"].all_tasks(self.worker.continuity.loop)
        ):
            return False
        others = set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2, 3, *self.worker.standard.spares.values(), *loop}
        for fd in others:
            with contextlib.suppress(OSError):  # it was that of the listing
                mode = os.fstat(fd).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISCHR(mode)):
                    return False  # a pipe or socket, whose other end would miss that it is closed here
        return True

    def _parts_of_loop(self) -> list[Any]:
        """Return what of asyncio's event loop has a descriptor."""
        if self.worker.continuity.loop is None or self.worker.continuity.loop.is_closed():
            return []
        return [
            self.worker.continuity.loop._selector,
            self.worker.continuity.loop._ssock,
            self.worker.continuity.loop._csock,
        ]

    def _fork(self, key: str) -> None:
        """Fork a sleeping copy of this process, as a child of process 1, which code does not notice.

        Returns in the copy, too, once it is to go on as the worker.
        """
        random = sys.modules.get("random")
        random_state = random and random.getstate()  # a fork reseeds it
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            middle = os.fork()
            if middle:
                os.waitpid(middle, 0)
                return
            try:
                ours, theirs = socket.socketpair()
                if copy := os.fork():
                    theirs.recv(1)
                    announce_copy(key, copy, theirs)  # before the worker goes on: it may crash at once
                    os._exit(0)
                theirs.close()
                self._sleep(ours)
            except BaseException:
                os._exit(1)
        finally:
            signal.signal(signal.SIGCHLD, handler)
        if random:
            random.setstate(random_state)

    def _sleep(self, supervisor: socket.socket) -> None:
        """Wait until the supervisor sends descriptors, then be the worker; end if it closes the connection."""
        os.setsid()
        allow_inspection(False)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2, 3, *self.worker.standard.spares.values()):  # the pipes are not the copy's to hold open
            os.dup2(null, fd, inheritable=fd < 3)
        os.close(null)
        loop = self._parts_of_loop()
        for part in loop:
            part.close()
        set_oom_score(1000)
        with weight(self.memory_limit if free_memory() < math.inf else 0):  # if memory runs out, the copy goes first
            supervisor.send(b"1")
            message, descriptors = receive_descriptors(supervisor, 3)
        set_oom_score(900)
        if message == b"lighten":  # what the worker has asked for is not there, with or without this copy
            _, descriptors = receive_descriptors(supervisor, 3)
        if not descriptors:
            os._exit(0)
        for target, fd in enumerate(descriptors, 1):
            os.dup2(fd, target, inheritable=target < 3)
            os.close(fd)
        for fd, spare in self.worker.standard.spares.items():
            os.dup2(fd, spare, inheritable=False)
        if loop:
            new = sys.modules["asyncio"].new_event_loop()
            vars(self.worker.continuity.loop).update(vars(new))
            new._closed = True  # its parts are the other one's now
        allow_inspection(True)
        self.worker.control = Channel(3, 3)
        self.worker.process = os.getpid()
        supervisor.send(b"1")
        supervisor.close()


def announce_copy(key: str, process: int, connection: socket.socket) -> None:
    """Tell the supervisor of a copy, and pass it its end of the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendmsg([f"{key} {process}".encode()], passed(connection.fileno()), socket.MSG_DONTWAIT, COPY_ADDRESS)


def forked_only(method: Callable[..., Any], threads: type) -> Callable[..., Any]:
    """Have a pool's method refuse what its processes can't find, as they were not forked from this one."""

    @functools.wraps(method)
    def checked(pool: Any, *arguments: Any, **options: Any) -> Any:
        inner: Any = arguments[0] if arguments else options.get("func")
        while isinstance(inner, functools.partial):
            inner = inner.func
        kind = pool._ctx.get_start_method()
        if kind != "fork" and getattr(inner, "__module__", "") == "__main__" and not isinstance(pool, threads):
            raise RuntimeError(
                f"processes started by {kind} can't find {inner.__name__}, which this code defined: "
                'use multiprocessing.get_context("fork"), or threads'
            )
        return method(pool, *arguments, **options)

    return checked


class Sources:
    """The code that the session has run, for tracebacks and for `inspect`."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.filename = ""  # of the running code
        self.codes: dict[str, str] = {}  # by file name, newest last
        self.translated: dict[str, str] = {}  # those that Python accepts only after a translation, as it accepts them

    def enter(self, code: str, filename: str) -> None:
        """Begin to run a piece of code."""
        self.filename = filename
        self.codes.pop(filename, None)
        self.codes[filename] = code
        # Until Python 3.13 the carets below a line are counted with the newline that linecache adds to the last one.
        lines = source_lines(code if code.endswith("\n") else f"{code}\n")
        linecache.cache[filename] = (len(code), None, lines, filename)

    def translate(self, code: str) -> None:
        """Note how Python accepts the running code; show it so, too, if it has other lines."""
        self.translated[self.filename] = code
        if code.count("\n") > self.codes[self.filename].count("\n") + 1:
            self.enter(code, self.filename)

    def teach_inspect(self) -> None:
        """Make `inspect` find the source of the session's classes; unaided, it finds that of functions only."""
        find_file = inspect.getfile

        def getfile(object: Any) -> str:
            if isinstance(object, type) and object.__module__ == "__main__":
                for filename, code in reversed(list(self.codes.items())):
                    if re.search(rf"^[ \t]*class[ \t]+{re.escape(object.__name__)}\b", code, re.MULTILINE):
                        return filename
            return find_file(object)

        find_source = inspect.findsource

        def findsource(object: Any) -> tuple[list[str], int]:
            filename = inspect.getfile(object)
            if filename not in self.translated:
                return find_source(object)
            given, code = linecache.cache[filename], self.translated[filename]
            linecache.cache[filename] = (len(code), None, source_lines(f"{code}\n"), filename)
            try:
                return find_source(object)  # until Python 3.12 it parses all of the file for a class
            finally:
                linecache.cache[filename] = given

        inspect.getfile, inspect.findsource = getfile, findsource

    def describe(self, error: BaseException, report: Report) -> None:
        """Enter the exception that ended the code into the call's report."""
        report["status"] = "error"
        if issubclass(type(error), SystemExit):
            code: Any = 1
            with contextlib.suppress(BaseException):  # the code's own subclass may make it anything
                code = error.code  # type: ignore[attr-defined]  # SystemExit has it
            report["exit_code"] = exit_code_of(code)
            if code is not None and not issubclass(type(code), int):
                with contextlib.suppress(Exception):  # the code's own __str__ or stream may raise
                    print(code, file=sys.stderr)
            if report["exit_code"] == 0:
                report["status"] = "ok"
                return
        try:
            message = exact(str(error))
        except BaseException as broken:
            message = f"(its str() raised {failure_of(broken)})"
        name, missing = class_name(error), None
        lines = [frame.tb_lineno for frame in self._frames(error) if frame.tb_frame.f_code.co_filename == self.filename]
        try:
            if isinstance(error, SyntaxError) and error.filename == self.filename and type(error.lineno) is int:
                lines.append(error.lineno)
            if isinstance(error, SyntaxError):
                message = exact(error.msg) or message
            if isinstance(error, ModuleNotFoundError):
                missing = clip(exact(error.name), 200) or None
            if type(error) is TypeError and lines:
                missing = self._overwritten(lines[-1])
            text = self.traceback_of(error)
        except BaseException:  # its __cause__, __notes__ or msg may be the code's own, and raise anything
            frames = [(frame.tb_frame, frame.tb_lineno) for frame in self._frames(error)]
            kept = [step for step in frames if self._is_users(step[0].f_code.co_filename)]
            text = exact("".join(traceback.StackSummary.extract(iter(kept)).format())) + f"{name}: {message}\n"
        report["exception"] = {
            "type": clip(name, 200),
            "message": clip(message, MESSAGE_LIMIT),
            "line": lines[-1] if lines else None,
            "traceback": clip(text, TRACEBACK_LIMIT),
            "missing": missing,
        }

    def _overwritten(self, number: int) -> str | None:
        """Return which of Python's own functions a line calls whose name the code has given to something else."""
        line = "".join(source_lines(self.codes[self.filename])[number - 1 : number])
        names = vars(sys.modules["__main__"])
        called = [name for name in re.findall(r"\b(\w+)\(", line) if hasattr(builtins, name) and name in names]
        return next((name for name in called if not callable(names[name])), None)

    def traceback_of(self, error: BaseException) -> str:
        """Return the traceback of an exception, with the frames of the user's own code."""
        summary = traceback.TracebackException.from_exception(error)
        self._keep_user_frames(summary)
        return exact("".join(summary.format() if summary.stack else summary.format_exception_only()))

    def _frames(self, error: BaseException) -> Iterator[types.TracebackType]:
        """Yield the entries of an exception's traceback that have a line number, outermost first."""
        frame = vars(BaseException)["__traceback__"].__get__(error)
        while frame is not None:
            if frame.tb_lineno is not None:
                yield frame
            frame = frame.tb_next

    def _keep_user_frames(self, summary: Any) -> None:
        """Reduce a traceback, and those of its causes, to the frames of the user's own code."""
        left = [summary]
        while left:  # a chain of causes may be longer than Python can recurse
            each = left.pop()
            kept = [frame for frame in each.stack or () if self._is_users(frame.filename)]
            each.stack = traceback.StackSummary.from_list(kept)
            related = [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
            left += [other for other in related if other is not None]

    def _is_users(self, filename: str) -> bool:
        return filename in self.codes or filename.startswith(self.home + "/")


def source_lines(code: str) -> list[str]:
    """Return the lines of code as Python counts them: str.splitlines() also splits at form feeds, U+2028 and others."""
    return io.StringIO(code, newline=None).readlines()


def exit_code_of(code: Any) -> int:
    """Return the exit status that Python's command line would give for SystemExit's `code`."""
    if not issubclass(type(code), int):
        return int(code is not None)
    number = int.__add__(code, 0)  # a plain int, even if it was a bool or of the code's own subclass
    return number & 0xFF if -(1 << 63) <= number < 1 << 63 else 0xFF


class Packages:
    """The folders of installed packages that code imports from."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.folders: list[str] = []
        self._had: list[str] = []  # before these

    def use(self, own: str | None) -> list[str]:
        """Make a session's packages, and those for all, importable; return the modules imported in another version."""
        folders = package_folders(self.root, own)
        added = [path for path in folders if path not in self.folders]
        if folders != self.folders:
            others = [entry for entry in sys.path if entry not in self.folders]
            site = [index for index, entry in enumerate(others) if entry.endswith("-packages")]
            at = site[0] if site else len(others)  # before the image's packages, after the standard library
            sys.path[:] = [*others[:at], *folders, *others[at:]]
            self._had, self.folders = self.folders, folders
            importlib.invalidate_caches()
            tell_children(self.root, folders)
        return sorted({name for path in added for name in self._replaced(path) if name in sys.modules})[:20]

    def _replaced(self, folder: str) -> Iterator[str]:
        """Yield the modules of the distributions in a folder that no other folder has in the same version."""
        for entry in os.listdir(folder):
            elsewhere = (os.path.exists(f"{path}/{entry}") for path in [*self._had, *sys.path] if path != folder)
            if entry.endswith(".dist-info") and not any(elsewhere):
                with contextlib.suppress(OSError), open(f"{folder}/{entry}/RECORD", encoding="utf-8") as record:
                    yield from {re.split(r"[/.,]", line)[0] for line in record}


def import_ahead(name: str) -> None:
    """Import a module before code needs it; of pyplot draw a figure, too, as the first takes several times longer."""
    module = importlib.import_module(name)
    if name == "matplotlib.pyplot":
        figure = module.figure()
        figure.subplots().set(title="T", xlabel="$x$", ylabel="y")
        figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
        module.close(figure)


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def reset_peak_memory() -> bool:
    """Reset this process's memory high-water mark; return whether the kernel allowed it."""
    try:
        write_kernel_file("/proc/self/clear_refs", b"5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Return the most bytes this process has had resident since reset_peak_memory()."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


# ── what a call returns ──

FORMS_LIMIT = 32  # of rich output for one value
IMAGE_SIDE = 2000  # pixels: some clients refuse more, or shrink it until it is illegible
IMAGE_BYTES = 500_000  # other clients refuse results of about 1 MB
NAME_LIMIT = 1000  # characters of a variable's name
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
PICTURES_SHOWN = 4  # of those that a call saved
PICTURE_LIMIT = 32 << 20  # bytes of such a picture that are read
IN_MPL_FONT = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH")  # names of characters
CJK_FONT = re.compile("CJK|wqy|SimHei|Nanum|IPAex|SansFallback", re.IGNORECASE)
PAGES_SAVED = 20  # of a call
LOOKED_AT = 500  # entries of the folder for temporary files
FILE_SUFFIXES = tuple(".csv .docx .html .json .md .mp4 .parquet .pdf .png .pptx .svg .txt .wav .xlsx .zip".split())
PAGE_LIMIT = 6_000  # characters of HTML and the like, above which they are saved and not shown
CHART_LIMIT = 48_000  # characters of an interactive figure's data, for programs
LONG_FORMS = {
    "text/html": ("page", "html"),
    "application/json": ("data", "json"),
    "image/svg+xml": ("picture", "svg"),
    "application/javascript": ("script", "js"),
}
PAGE_MAKERS = {  # by package: what its figures have, and their page
    "altair": ("to_html", lambda chart: str(chart.to_html())),
    "bokeh": (
        "sizing_mode",
        lambda plot: str(
            importlib.import_module("bokeh.embed").file_html(plot, importlib.import_module("bokeh.resources").CDN)
        ),
    ),
    "folium": ("_repr_html_", lambda chart: str(chart.get_root().render())),
    "plotly": ("to_html", lambda figure: str(figure.to_html(include_plotlyjs="cdn"))),
    "pydeck": ("to_html", lambda deck: str(deck.to_html(as_string=True))),
    "pyvis": ("generate_html", lambda network: str(network.generate_html())),
}
CHART_FORMS = {  # besides
    "altair": {
        "application/vnd.vegalite+json": lambda chart: chart.to_json(indent=None),
        "image/png": lambda chart: importlib.import_module("vl_convert").vegalite_to_png(chart.to_json()),
    },
    "plotly": {
        "application/vnd.plotly.v1+json": lambda figure: figure.to_json(),
        "image/png": lambda figure: importlib.import_module("kaleido") and figure.to_image("png"),
    },
}
RICH_FORMS = (
    ("image/png", "_repr_png_"),
    ("image/jpeg", "_repr_jpeg_"),
    ("image/svg+xml", "_repr_svg_"),
    ("text/html", "_repr_html_"),
    ("text/markdown", "_repr_markdown_"),
    ("text/latex", "_repr_latex_"),
    ("application/json", "_repr_json_"),
)


def describe(value: Any) -> str:
    """Return a value's repr or, if that raises, a substitute for it."""
    try:
        return exact(repr(value))
    except BaseException as error:  # an interruption, too: it is recorded elsewhere
        failure = failure_of(error)
    if type(value) is int and 10_000 < value.bit_length() < 10_000_000:  # more digits than Python converts to text
        number = abs(value)
        digits = int(number.bit_length() * math.log10(2))
        digits += number >= 10**digits
        last = f"{number % 10**20:020}"
        return f"{'-' * (value < 0)}{number // 10 ** (digits - 20)}…{last} (an int with {digits:,} digits)"
    return f"<{class_name(value)} object, whose repr raised {failure}>"


def rich_forms(value: Any) -> dict[str, str]:
    """Return a value's forms other than plain text, by MIME type, as its class makes them (IPython's protocol).

    Raises the error that kept one from being made, if there is no other.
    """
    forms: dict[str, Any] = {}
    failure: Exception | None = None
    if issubclass(type(value), type):
        return {}
    if is_image(value):  # Pillow itself shows some modes only
        with contextlib.suppress(Exception):
            return draw_image(value)
    for mime, method in RICH_FORMS:
        try:
            make = getattr(value, method, None)
            forms[mime] = make() if callable(make) else None
        except Exception as error:
            failure = error
    try:
        make = getattr(value, "_repr_mimebundle_", None)
        bundle = make() if callable(make) else {}
        forms.update(bundle[0] if isinstance(bundle, tuple) else bundle)
    except Exception as error:
        failure = error
    forms.pop("text/plain", None)
    rich = encode_forms(forms)
    if failure and not rich:
        raise failure
    return rich


def encode_forms(forms: Mapping[Any, Any]) -> dict[str, str]:
    """Return forms as they are sent: binary ones in base64, without those that are no text."""
    rich: dict[str, str] = {}
    for mime, form in list(forms.items())[:FORMS_LIMIT]:
        if isinstance(form, tuple) and form:
            form = form[0]  # some return (data, metadata)
        if isinstance(form, (dict, list)) and str(mime).endswith("json"):
            form = json.dumps(form, default=str)
        if isinstance(form, bytes):
            picture = image_forms(bytes(form))
            mime, form = next(iter(picture.items())) if str(mime).startswith("image/") else (mime, *picture.values())
        mime, form = exact(mime), exact(form)
        if 0 < len(mime) <= 200 and form:
            rich[mime] = form
    return rich


class Pages:
    """Interactive figures, and other forms too long for an answer: saved as files for the user, and named instead."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.left = 0  # pages that the call may still save
        self.temporary = os.environ.get("TMPDIR", "/tmp")
        self.elsewhere: dict[str, int] = {}  # files there when the call began, with the times of their last change

    def begin(self) -> None:
        """Begin a call."""
        self.left, self.elsewhere = PAGES_SAVED, self._files_elsewhere()

    def files_elsewhere(self) -> str:
        """Say which files the call wrote to the folder for temporary ones, where nobody can have them."""
        now = self._files_elsewhere()
        names = sorted(name for name in now if now[name] != self.elsewhere.get(name))
        if not names or self.home == self.temporary:
            return ""
        return f"{', '.join(names[:3])} in {self.temporary} can't be read from outside: write files to {self.home}"

    def _files_elsewhere(self) -> dict[str, int]:
        with contextlib.suppress(OSError):
            some = itertools.islice(os.scandir(self.temporary), LOOKED_AT)
            likely = [entry for entry in some if entry.name.endswith(FILE_SUFFIXES)]
            named = [entry for entry in likely if entry.is_file() and not entry.name.startswith((".", "tmp"))]
            return {entry.name: entry.stat().st_mtime_ns for entry in named}
        return {}

    def make(self, value: Any) -> dict[str, str] | None:
        """Save the page of an interactive figure; return its other forms, of text the page's name. None for others."""
        package = module_name(value).partition(".")[0]
        if package not in PAGE_MAKERS or issubclass(type(value), type):
            return None
        has: str = PAGE_MAKERS[package][0]
        make: Callable[[Any], str] = PAGE_MAKERS[package][1]
        if not hasattr(type(value), has):
            return None
        forms: dict[str, str] = {}
        others: dict[str, Callable[[Any], Any]] = CHART_FORMS.get(package, {})
        for mime, form in others.items():
            with contextlib.suppress(Exception):  # most need another package, or a browser
                data = form(value)
                if isinstance(data, bytes):
                    forms.update(image_forms(data))
                elif len(data) <= CHART_LIMIT:
                    forms[mime] = data
        saved = self._save(make(value), "figure", "html")
        return {**forms, "text/plain": f"<interactive figure of {package}: {saved}>"}

    def fit(self, forms: dict[str, str]) -> dict[str, str]:
        """Return forms without those too long for an answer; save what would have been shown."""
        is_telling = tells(forms.get("text/plain", ""))
        has_picture = any(mime in forms for mime in ("image/png", "image/jpeg", "image/gif", "image/webp"))
        for mime, (name, suffix) in LONG_FORMS.items():
            if len(forms.get(mime, "")) <= PAGE_LIMIT:
                continue
            form = forms.pop(mime)
            if not is_telling and not has_picture:
                forms["text/plain"] = f"<{suffix.upper()} of {len(form) >> 10} kB: {self._save(form, name, suffix)}>"
        return forms

    def _save(self, form: str, name: str, suffix: str) -> str:
        """Save it under a new name; say where, or why not."""
        if self.left <= 0:
            return f"not saved, as a call may save {PAGES_SAVED} of them"
        self.left -= 1
        taken = set(os.listdir(self.home))
        path = next(path for number in itertools.count(1) if (path := f"{name}-{number}.{suffix}") not in taken)
        try:
            with open(os.path.join(self.home, path), "x", encoding="utf-8", errors="replace") as file:
                file.write(form)
        except OSError as error:
            return f"not saved: {error.strerror}"
        return f"saved as {path}" + ", which a browser shows" * (suffix == "html")


class Pictures:
    """The pictures of a call, each shown once: figures, images that it displays, and files that it saves."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.fonts: tuple[tuple[str, ...], list[str]] | None = None  # more fonts, by the packages that are installed
        self.last_figure: Any = None  # the last one shown: savefig() may come after show()
        self.before: dict[str, tuple[int, int]] = {}  # the working directory's pictures, as list_files() tells them
        self.forget()

    def begin(self) -> None:
        """Begin a call: forget the pictures of the previous one, and see which files there are."""
        self.forget()
        self.before, _ = list_files(self.worker.home, PICTURE_SUFFIXES)

    def forget(self) -> None:
        """Forget the pictures of the previous call."""
        self.shown: set[Any] = set()  # marks of figures and images, hashes of what was shown, and paths
        self.saved: dict[str | int, bytes] = {}  # marks of figures and images, by path or by hash of what was saved
        self.live: list[Any] = []  # figures that were shown without blocking
        self.without_glyph: set[str] = set()  # characters that no font has

    def noting(self, save: Callable[..., Any], picture_of: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return a library's method `save` with a note of what it saves where."""

        @functools.wraps(save)
        def noted(owner: Any, *arguments: Any, **options: Any) -> Any:
            result = save(owner, *arguments, **options)
            with contextlib.suppress(Exception):
                place: Any = arguments[0] if arguments else options.get("filename", options.get("fp"))
                if isinstance(place, io.BytesIO):
                    self.saved[hash(place.getvalue())] = self._mark(picture_of(owner))
                else:
                    path = os.path.abspath(getattr(place, "name", place))
                    path = path if os.path.exists(path) else f"{path}.{options.get('format') or 'png'}"
                    self.saved[path] = self._mark(picture_of(owner))
            return result

        return noted

    def note_shown(self, value: Any) -> None:
        """Remember that a value was shown, so that the file with the same picture need not be."""
        if module_name(value).startswith(("PIL.", "matplotlib.")):
            self.shown |= {self._mark(value), os.path.abspath(getattr(value, "filename", None) or "")}

    def _mark(self, picture: Any) -> bytes:
        return vars(picture).setdefault("_sandbox_mark", os.urandom(8))  # type: ignore[no-any-return]

    def draw(self, figure: Any) -> dict[str, str]:
        """Return a Matplotlib figure as PNG, if it has anything, and close it, so that it is not shown again."""
        image = io.BytesIO()
        if is_blank(figure):
            return {}
        try:
            with without_trace():
                options = {"bbox_inches": "tight"}
                with contextlib.suppress(Exception):  # a figure of the code's own class, or one that can't be drawn
                    options = screen_frame(figure)
                figure.savefig(image, format="png", **options)
        finally:
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close(figure)
        return image_forms(image.getvalue())

    def more_fonts(self, manager: Any) -> list[str]:
        """Return fonts for Chinese, Japanese and Korean, of installed packages or the image, as Matplotlib has none."""
        folders = tuple(self.worker.packages.folders)
        if self.fonts is None or self.fonts[0] != folders:
            pattern = "*/fonts/**/*.[ot]t[fc]"
            packages = [path for folder in folders for path in glob.glob(f"{folder}/{pattern}", recursive=True)]
            found = [path for path in [*packages, *(font.fname for font in manager.ttflist)] if CJK_FONT.search(path)]
            self.fonts = (folders, sorted(found, key=lambda path: not re.search("SansCJK.*Regular", path))[:2])
        return self.fonts[1]

    def backend(self) -> types.ModuleType:
        """Return a Matplotlib backend whose `show()` puts open figures into the result; using it imports Matplotlib."""
        backend = types.ModuleType("sandbox_backend")

        def find(name: str) -> Any:
            if name != "FigureCanvas":
                raise AttributeError(name)
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            vars(backend).update(FigureCanvas=FigureCanvasAgg, show=self.show)
            return FigureCanvasAgg

        backend.__getattr__ = find  # type: ignore[method-assign]  # a module's own __getattr__: PEP 562
        return backend

    def show(self, *_: object, block: bool | None = None, **__: object) -> None:
        """Show the open figures. Where that does not block, code may go on with them: see `show_last_states`."""
        pyplot: Any = sys.modules["matplotlib.pyplot"]
        if not (pyplot.isinteractive() if block is None else not block):
            self.show_figures()
            return
        figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
        self.live += [figure for figure in figures if figure not in self.live]
        self.show_figures()

    def show_last_states(self) -> None:
        """Show the figures that the code has changed since it showed them without blocking, and those still open."""
        for figure in self.live:
            forms = self.draw(figure)
            if forms and not self.shown & set(map(hash, forms.values())):
                self.worker.publish({"text/plain": describe(figure), **forms})
        self.live.clear()
        self.show_figures()

    def show_figures(self) -> None:
        """Put every open Matplotlib figure into the result, unless nothing is drawn in it, and close it."""
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        for number in pyplot.get_fignums() if pyplot else ():
            figure = pyplot.figure(number)
            if is_blank(figure):
                pyplot.close(figure)
            else:
                self.last_figure = figure
                self.worker.display(figure)

    def show_saved(self) -> None:
        """Show the pictures that the call saved, and say which characters no font has, if there are any."""
        now, _ = list_files(self.worker.home, PICTURE_SUFFIXES)
        changed = [path for path in sorted(now, key=now.__getitem__) if now[path] != self.before.get(path)]  # by time
        inside = [f"{self.worker.home}/{path}" for path in changed]
        known = [path for path in self.saved if isinstance(path, str)]
        paths = [path for path in dict.fromkeys([*inside, *known]) if path.lower().endswith(PICTURE_SUFFIXES)]
        left, more = PICTURES_SHOWN, 0
        for path in paths:
            with contextlib.suppress(OSError):
                if {path, self.saved.get(path)} & self.shown:
                    continue
                with open(path, "rb") as file:
                    data = file.read(PICTURE_LIMIT)
                if self.saved.get(hash(data)) in self.shown:
                    continue
                data = fit_image(data) if left else data
                name = shown_path(os.path.relpath(path, self.worker.home))
                if (mime := image_type(data)) and hash(image := base64.b64encode(data).decode()) not in self.shown:
                    if not left:
                        more += 1
                        continue
                    fits = len(data) <= IMAGE_BYTES
                    left -= fits
                    self.worker.note(f"saved as {name}" + ", which is too large to be shown" * (not fits))
                    if fits:
                        self.worker.publish({"text/plain": os.path.basename(name), mime: image})
        if more:
            self.worker.note(f"{more} more pictures were saved, and are not shown")
        if self.without_glyph:
            text = clip(" ".join(sorted(self.without_glyph)), 100)
            if all(unicodedata.name(character, "").startswith(IN_MPL_FONT) for character in self.without_glyph):
                advice = f"{text}: for a font that has them install mpl-font, then run this again"
            else:
                advice = f"{text}: no font has them here"
            self.worker.note(f"boxes stand for {advice}")


@contextlib.contextmanager
def without_trace() -> Iterator[None]:
    """Keep warnings, and log records below warnings, from coming of work that the code did not ask for."""
    logging = sys.modules.get("logging")
    disabled = logging.root.manager.disable if logging else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if logging:
            logging.disable(max(disabled, logging.INFO))  # warnings, as of a font that is not there, are for the code
        try:
            yield
        finally:
            if logging:
                logging.disable(disabled)


def screen_frame(figure: Any) -> dict[str, Any]:
    """Return options for savefig() that show a figure as a screen would: in its own resolution, within IMAGE_SIDE.

    The frame is cut to what is drawn, as in a notebook, unless something is drawn so far outside that this is huge.
    """
    width, height = figure.get_size_inches()
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox().padded(0.1)
    if max(drawn.width, drawn.height) <= 3 * max(width, height):
        width, height = drawn.width, drawn.height
    else:
        drawn = None
    return {"dpi": min(figure.dpi, (IMAGE_SIDE - 2) / max(width, height)), "bbox_inches": drawn}


def is_figure(value: Any) -> bool:
    """Whether a value is a Matplotlib figure."""
    return module_name(value) == "matplotlib.figure" and hasattr(value, "savefig")


def is_blank(figure: Any) -> bool:
    """Whether a Matplotlib figure has nothing in it but its background, and axes without data, names and legends."""
    with contextlib.suppress(Exception):  # it may be of the code's own class
        others = [child for child in figure.get_children() if child not in (figure.patch, *figure.axes)]
        return not others and all(map(is_empty, figure.axes))
    return False


def is_empty(axes: Any) -> bool:
    """Whether axes are as they were made."""
    modules = sys.modules
    frame: Any = (modules["matplotlib.spines"].Spine, modules["matplotlib.axis"].Axis)
    others = [child for child in axes.get_children() if child is not axes.patch and not isinstance(child, frame)]
    texts = [child for child in others if isinstance(child, modules["matplotlib.text"].Text)]
    shown = [axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in texts)]
    return len(others) == len(texts) and not any(shown)


def image_type(data: bytes) -> str | None:
    """Return the MIME type of an image that clients can show, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def image_forms(data: bytes) -> dict[str, str]:
    """Return an image by its MIME type, in base64, scaled down if need be."""
    data = fit_image(data)
    return {image_type(data) or "image/png": base64.b64encode(data).decode("ascii")}


def picture_in(value: Any) -> dict[str, str]:
    """Return the picture that a value holds as bytes, or as text in base64."""
    data: Any = value
    if type(value) is str and (
        found := re.match(r"(?:data:image/[\w.+-]+;base64,)?(?=iVBOR|/9j/|R0lGOD|UklGR)", value)
    ):
        with contextlib.suppress(ValueError):
            data = base64.b64decode(value[found.end() :], validate=True)
    return image_forms(data) if type(data) is bytes and len(data) > 100 and image_type(data) else {}


def is_image(value: Any) -> bool:
    """Whether a value is a Pillow image."""
    return module_name(value).startswith("PIL.") and hasattr(value, "getextrema")


def draw_image(image: Any) -> dict[str, str]:
    """Return a Pillow image of any mode as clients can show it."""
    if max(image.size) > IMAGE_SIDE:
        factor = IMAGE_SIDE / max(image.size)
        image = image.resize([max(1, int(side * factor)) for side in image.size], reducing_gap=2.0)
    if image.mode[0] in "FI":  # numbers: from the lowest in black to the highest in white, unless they are grey levels
        image = image.convert("F")
        low, high = image.getextrema()
        if not (0 <= low <= high <= 255 and high > 1):
            scale = 255 / (high - low or 1)
            image = image.point(lambda level: level * scale - low * scale)
        image = image.convert("L")
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    target = io.BytesIO()
    image.save(target, "PNG")
    return image_forms(target.getvalue())


def fit_image(data: bytes) -> bytes:
    """Scale an image down, if need be, to a size every client accepts; by Pillow, which Matplotlib depends on.

    It stays as it is without Pillow, in a format that Pillow does not know, or where there is no memory to decode it.
    """
    with without_trace(), contextlib.suppress(Exception):
        from PIL import Image

        image: Any = Image.open(io.BytesIO(data))
        kind, side = image.format, max(image.size)
        # thumbnail() decodes a JPEG in the size that is needed; of others it needs all pixels, in up to 4 bytes.
        if kind != "JPEG" and image.size[0] * image.size[1] * 5 > free_memory():
            return data
        while side > IMAGE_SIDE or len(data) > IMAGE_BYTES:
            if side > IMAGE_SIDE:
                side = IMAGE_SIDE
            elif kind == "PNG" and is_opaque(image):  # of a photograph, a JPEG keeps more than fewer pixels do
                kind, image = "JPEG", image.convert("RGB")
            else:
                side = side * 3 // 4
            image.thumbnail((side, side))
            target = io.BytesIO()
            image.save(target, kind)
            data = target.getvalue()
    return data


def is_opaque(image: Any) -> bool:
    """Whether nothing shines through a Pillow image."""
    if "transparency" in image.info:
        return False
    return "A" not in image.getbands() or image.getchannel("A").getextrema()[0] == 255


def collect_state(names: dict[str, Any], limit: int = STATE_LIMIT) -> tuple[bytes, dict[str, str]]:
    """Encode the variables that JSON can hold; return the JSON, and why others are not in it (at most 100), by name.

    No more than `limit` bytes are encoded, and no more values looked at than those could hold.
    """
    kept: list[bytes] = []
    left_out: dict[str, str] = {}
    size = 2
    for key_given, value in list(names.items()):
        name = exact(key_given)
        if not name or name[0] == "_" or issubclass(type(value), (types.ModuleType, type)) or callable(value):
            continue
        try:
            if name != key_given:
                raise ValueError("its name has lone surrogates")
            if len(name) > NAME_LIMIT:
                raise ValueError(f"its name has {len(name)} characters")
            item = f"{json.dumps(plain(name))}:{json.dumps(plain(value, limit))}".encode()
            if size + len(item) + 1 > limit:
                raise ValueError(f"too large: {len(item)} bytes; all variables may come to {limit}")
            kept.append(item)
            size += len(item) + 1
        except Exception as error:  # the value is not JSON, or its own code raised
            left_out[clip(name, 100)] = failure_of(error).replace("ValueError: ", "", 1)
    return b"{%s}" % b",".join(kept), dict(list(left_out.items())[:100])


WITH_SHAPE = [("numpy", "ndarray"), *((lib, kind) for lib in ("pandas", "polars") for kind in ("DataFrame", "Series"))]


def outline(names: dict[str, Any]) -> dict[str, str]:
    """Return what there is besides modules: names, with types and sizes. No code of the values' classes runs."""
    found: dict[str, str] = {}
    for given, value in list(names.items()):
        name = exact(given)
        if name and name[0] != "_" and not issubclass(type(value), types.ModuleType) and len(found) < VARIABLES_TOLD:
            size = ""
            with contextlib.suppress(Exception):  # a library's own code, for its tables
                size = size_of(value)
            found[clip(name, NAME_SHOWN)] = f"{clip(class_name(value), NAME_SHOWN)}{size and f', {size}'}"
    return found


def size_of(value: Any) -> str:
    """Return how large a value is, if it is of a built-in type, or an array or table as the libraries make them."""
    if type(value) in (str, bytes, bytearray, list, tuple, dict, set, frozenset):
        return f"{len(value)} {'characters' if type(value) is str else 'items'}"
    for module, name in WITH_SHAPE:
        if type(value) is getattr(sys.modules.get(module), name, None):
            return " x ".join(map(str, value.shape))
    return ""


# ── code as models write it: what it expects of a notebook, and of libraries ──

FENCE = re.compile(r"\s*(```|~~~)")
PROMPT = re.compile(r"[ \t]*(?:>>>|\.\.\.|In \[\d+\]:|\.{3,}:)(?: (.*))?")
SHELL_LINE = re.compile(r"([ \t]*)(?:([\w., \t]+?)[ \t]*=[ \t]*)?(!!?)(?!=)[ \t]*(.+)")
MAGIC_LINE = re.compile(r"([ \t]*)(?:([\w., \t]+?)[ \t]*=[ \t]*)?%(\w+)[ \t]*(.*)")
CELL_MAGIC = re.compile(r"%%(\w+|!)[ \t]*(.*)")
PIP = re.compile(
    r"(?:\S*python[\d.]*\s+-m\s+|\{sys\.executable\}\s+-m\s+)?(?:pip[\d.]*|conda|mamba|uv\s+pip|uv)"
    r"\s+(install|add|list|freeze)\b((?:'[^']*'|\"[^\"]*\"|[<>]=|(?!\s\d?[<>][^=])[^;&|<>'\"])*)"
    r"(?:\d?[<>]+\s*[^\s;&|]+|\|[^;&|]*|\s)*(?:;|&&|$)(.*)",  # redirections, filters, and the rest of the line
    re.DOTALL,
)
# What is translated: a magic, to what it becomes, with {0} for its arguments as a literal; and one for all of the code,
# with {1} for the code.
LINE_MAGICS = {
    **dict.fromkeys("config gui load_ext matplotlib reload_ext unload_ext xmode".split(), "pass"),
    "autoreload": "__notebook__.worker.note('modules are not reloaded by themselves: use importlib.reload(module)')",
    **dict.fromkeys(("system", "sx"), "__notebook__.lines({0})"),
    "timeit": "__notebook__.timeit({0})",
}
CELL_MAGICS = {
    **dict.fromkeys(("!", "sh", "system", "sx"), "__notebook__.script({1}, 'sh')"),
    **dict.fromkeys(("writefile", "file"), "__notebook__.write({0}, {1})"),
    "bash": "__notebook__.script({1}, 'bash')",
    "script": "__notebook__.script({1}, {0})",
    "html": "display({{'text/html': {1}}}, raw=True)",
    "markdown": "display({{'text/markdown': {1}}}, raw=True)",
    "timeit": "__notebook__.timeit({0}, {1})",
}
NO_CONTEXT = contextlib.nullcontext()
# IPython, where it is not installed

DISPLAY_CLASSES = {
    "Code": "text/plain",
    "DisplayObject": "text/plain",
    "GeoJSON": "application/json",
    "HTML": "text/html",
    "Image": "",
    "JSON": "application/json",
    "Javascript": "application/javascript",
    "Latex": "text/latex",
    "Markdown": "text/markdown",
    "Math": "text/latex",
    "Pretty": "text/plain",
    "SVG": "image/svg+xml",
    "TextDisplayObject": "text/plain",
    **dict.fromkeys("Audio FileLink FileLinks IFrame ScribdDocument Video VimeoVideo YouTubeVideo".split(), None),
}
PAUSE_LIMIT = 0.05  # seconds that pyplot.pause() takes: it is for somebody who watches


class Notebook:
    """IPython's ways of writing code: shell lines and magics, as calls of the builtin `__notebook__`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.timing = Timing

    # Translation

    def parse(self, code: str, parse: Callable[[str], Any]) -> tuple[str, Any, Any]:
        """Return code as Python accepts it, its syntax tree, and the context to run it in.

        Code that Python accepts stays as it is. Else escaped newlines, if there are no others, become newlines; or a
        byte-order mark, a fence around the code, prompts and its indentation are taken off, and those of its lines
        translated that Python points at. Every line keeps its number.

        Raises:
            SyntaxError: Python refuses something else.
        """
        context: Any = NO_CONTEXT
        with contextlib.suppress(SyntaxError):
            return code, parse(code), context
        if "\\n" in code and "\n" not in code.strip():
            unescaped = re.sub(r"""\\([nt"'\\])""", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), code)
            with contextlib.suppress(SyntaxError):
                return unescaped, parse(unescaped), context
        lines = [line.rstrip("\n") for line in source_lines(code.lstrip("\ufeff"))]
        if FENCE.match(next(filter(str.strip, lines), "")):
            lines = inside_fences(lines)
        if PROMPT.fullmatch(next(filter(str.strip, lines), "")):
            lines = [found[1] or "" if (found := PROMPT.fullmatch(line)) else "" for line in lines]
        first = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
        indentation = re.match(r"\s*", "".join(lines[first : first + 1]))[0]  # type: ignore[index]  # it matches anything
        lines = [line[line.startswith(indentation) and len(indentation) :] for line in lines]
        if first < len(lines) and (found := CELL_MAGIC.fullmatch(lines[first])):
            context = self._translate_cell(lines, first, *found.groups())
        while True:
            text = "\n".join(lines)
            try:
                return text, parse(text), context
            except SyntaxError as error:
                if not self._translate_line(lines, (error.lineno or 0) - 1):
                    raise

    def _translate_line(self, lines: list[str], at: int) -> bool:
        """Put a call in place of a shell line or a magic; return whether the line is one."""
        line = lines[at] if 0 <= at < len(lines) else ""
        if found := SHELL_LINE.fullmatch(line):
            indentation, target, mark, command = found.groups()
            end = at + 1
            while command.endswith("\\") and end < len(lines):
                command, lines[end] = f"{command}\n{lines[end]}", ""
                end += 1
            if pip := PIP.fullmatch(command):
                call = f"__notebook__.pip{pip.groups()}"
            else:
                call = f"__notebook__.{'lines' if target or mark == '!!' else 'shell'}({command!r})"
        elif found := MAGIC_LINE.fullmatch(line):
            indentation, target, name, arguments = found.groups()
            if pip := PIP.fullmatch(f"{name} {arguments}"):
                call = f"__notebook__.pip{pip.groups()}"
            elif name == "time":
                call = timed(arguments)
            else:
                call = self._magic(LINE_MAGICS, name, line, at).format(repr(arguments))
        else:
            return False
        lines[at] = f"{indentation}{f'{target} = ' if target else ''}{call}"
        return True

    def _translate_cell(self, lines: list[str], at: int, name: str, arguments: str) -> Any:
        """Translate a magic that is for all of the code; return the context to run the code in."""
        line, lines[at] = lines[at], ""
        if name in ("time", "python", "python3", "py"):  # the code stays as it is
            return Timing() if name == "time" else NO_CONTEXT
        call = self._magic(CELL_MAGICS, name, line, at).format(repr(arguments), repr("\n".join([*lines[at + 1 :], ""])))
        lines[at:] = [call, *[""] * (len(lines) - at - 1)]
        return NO_CONTEXT

    def _magic(self, table: dict[str, str], name: str, line: str, at: int) -> str:
        """Return what a magic becomes. Raises SyntaxError if it is not in the table."""
        if name in table:
            return table[name]
        sign = "%%" if table is CELL_MAGICS else "%"
        message = f"{sign}{name} is a magic of IPython that is not available here: write it in Python"
        raise SyntaxError(message, (self.worker.sources.filename, at + 1, 1, line)) from None

    # Shell lines

    def shell(self, command: str) -> None:
        """Run a command line, with the code's variables in the places of {name} and $name."""
        self.script(expanded(command, sys._getframe(1)), "sh")

    def lines(self, command: str) -> list[str]:
        """Run a command line in the same way, and return the lines of its standard output."""
        return self._run(expanded(command, sys._getframe(1)), "sh", True).splitlines()

    def script(self, script: str, program: str) -> None:
        """Have a shell, or another program that takes scripts by `-c`, run a script; its output is the code's."""
        redirected = sys.stdout is not self.worker.standard.real["stdout"]
        if output := self._run(script, program.partition(" ")[0], redirected):
            sys.stdout.write(output)

    def _run(self, script: str, program: str, captures: bool) -> str:
        import subprocess

        if refusal := self.worker.policy.refusal("subprocess"):
            raise refusal
        self.worker.standard.flush()
        output = subprocess.PIPE if captures else None
        try:
            done = subprocess.run([program, "-c", script], stdin=subprocess.DEVNULL, stdout=output, check=False)
        except FileNotFoundError:
            if program == "bash":
                return self._run(script, "sh", captures)
            raise OSError(f"there is no {program} in this image: use Python instead") from None
        if done.returncode:
            why = ": there is no such command in this image" if done.returncode == 127 else ""
            self.worker.note(f"exit status {done.returncode}{why}")
        return (done.stdout or b"").decode(errors="replace")

    def pip(self, verb: str, arguments: str, rest: str) -> None:
        """Say which packages are there already, and run the rest of the line.

        Raises:
            ModuleNotFoundError: others are asked for, and code can't install them.
        """
        import importlib.metadata

        words = arguments.replace("'", "").replace('"', "").split()
        wanted = [word for word in words if word[0].isalnum()] if "-r" not in words else []
        there = {plain_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
        found = {word: there.get(plain_name(re.split(r"[\[<>=!~]", word)[0])) for word in wanted}
        absent = [word for word in wanted if found[word] is None or word.partition("==")[2] not in ("", found[word])]
        # Many ask for the name of the import, such as sklearn.
        absent = [word for word in absent if not (word.isidentifier() and importlib.util.find_spec(word))]
        if verb in ("list", "freeze"):
            print("\n".join(f"{package}=={version}" for package, version in sorted(there.items())))
        elif absent or not wanted:
            raise ModuleNotFoundError(
                f"code can't install packages: pip {verb} {' '.join(absent) or arguments.strip()}"
            )
        else:
            self.worker.note(f"installed already: {', '.join(wanted)}")
        if rest.strip():
            self.script(rest, "sh")

    # Magics

    def write(self, arguments: str, text: str) -> None:
        """Write a file, or append to it."""
        import shlex

        *options, path = shlex.split(arguments)
        with open(path, "a" if "-a" in options else "w", encoding="utf-8") as file:
            file.write(text)

    def timed(self, timing: Timing, value: Any) -> Any:
        """Tell how long an expression took, and return its value."""
        timing.__exit__()
        return value

    def timeit(self, arguments: str, code: str = "") -> None:
        """Print how long a statement takes, or all of the code, as IPython does."""
        import statistics
        import timeit

        options, statement = re.fullmatch(r"((?:-\S+ *(?:\d+ +)?)*)(.*)", arguments, re.DOTALL).groups()  # type: ignore[union-attr]
        given = {name: int(value) for name, value in re.findall(r"-([nr]) *(\d+)", options)}
        caller = sys._getframe(1)
        setup, statement = (statement, code) if code else ("pass", statement)
        timer = timeit.Timer(statement, setup or "pass", globals={**caller.f_globals, **caller.f_locals})
        loops = given.get("n") or timer.autorange()[0]
        each = [seconds / loops for seconds in timer.repeat(given.get("r", 7), loops)]
        spread = readable_seconds(statistics.pstdev(each))
        print(
            f"{readable_seconds(statistics.fmean(each))} ± {spread} per loop "
            f"(mean ± std. dev. of {len(each)} runs, {loops:,} loops each)"
        )


class Timing:
    """Context that tells what time passes in it."""

    def __enter__(self) -> Timing:
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        print(f"CPU time: {readable_seconds(cpu)}, wall time: {readable_seconds(wall)}")


def inside_fences(lines: list[str]) -> list[str]:
    """Return lines with all that is not between fences left empty."""
    inside = False
    kept = []
    for line in lines:
        is_fence = FENCE.match(line) is not None
        inside ^= is_fence
        kept.append(line if inside and not is_fence else "")
    return kept


def timed(statement: str) -> str:
    """Return a line that runs a statement and tells the time it took; an expression keeps its value."""
    call = f"__notebook__.timed(__notebook__.timing().__enter__(), ({statement}))"
    try:
        ast.parse(statement.strip(), mode="eval")
        ast.parse(call)  # it fails if the statement ends with a comment
    except SyntaxError:
        return f"with __notebook__.timing(): {statement}"
    return call


def expanded(command: str, caller: types.FrameType) -> str:
    """Return a command line with the caller's variables in the places of {expression} and $name, as IPython does.

    Whatever is not such an expression, or is a function, stays: it is the shell's, or awk's.
    """
    names = {**caller.f_globals, **caller.f_locals}

    def value_of(found: re.Match[str]) -> str:
        try:
            value = eval(found[1] or found[2], names)
        except Exception:
            return found[0]
        return found[0] if callable(value) else str(value)

    return re.sub(r"(?<!\$)\{([A-Za-z_][^{}]*)\}|\$([A-Za-z_]\w*)", value_of, command)


def readable_seconds(seconds: float) -> str:
    """Format a time with three digits."""
    unit, factor = next((each for each in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if seconds * each[1] >= 1), ("ns", 1e9))
    return f"{seconds * factor:.3g} {unit}"


class Shown:
    """A value that is shown as text of a MIME type, or as an image: the base of what IPython.display has."""

    mime = ""  # "" for an image, None for what can't be shown

    def __init__(self, data: Any = None, url: str | None = None, filename: Any = None, **_options: Any) -> None:
        named = filename if filename is not None else url
        if named is None and isinstance(data, str) and (self.mime == "" or data.endswith(".svg")):
            named = data
        if self.mime is None:
            data = str(data if named is None else named)[:200]
        elif named is not None and not str(named).startswith(("http:", "https:")):
            with open(named, "rb") as file:
                data = file.read()
        elif named is not None:
            data = f'<img src="{named}">' if self.mime == "" else f"{named} can't be fetched from here"
        self.data = data

    def _repr_mimebundle_(self, *_: object, **__: object) -> dict[str, Any]:
        data, mime = self.data, self.mime
        if mime is None or mime == "text/plain":
            return {}
        if mime == "application/json":
            data = json.dumps(data)
        elif mime == "":
            mime = "text/html" if isinstance(data, str) else image_type(data) or "application/octet-stream"
        elif isinstance(data, bytes):
            data = data.decode(errors="replace")
        return {mime: data}

    def __repr__(self) -> str:
        name = type(self).__name__
        texts = {None: f"[{name}: {self.data}]", "text/plain": str(self.data)}
        return texts.get(self.mime, f"<IPython.core.display.{name} object>")


class StandIn:
    """Finder of modules named IPython that have `display` and its like, if no other finder has them."""

    packages = ("IPython", "IPython.core")
    modules = (
        *packages,
        "IPython.core.display",
        "IPython.core.display_functions",
        "IPython.core.getipython",
        "IPython.display",
    )

    def __init__(self, worker: Worker) -> None:
        def display_as(mime: str) -> Callable[..., None]:
            return lambda *values, **_: worker.display(*({mime: value} for value in values), raw=True)

        kinds = {"html": "text/html", "latex": "text/latex", "markdown": "text/markdown", "svg": "image/svg+xml"}
        self.names: dict[str, Any] = {
            **{name: type(name, (Shown,), {"mime": mime}) for name, mime in DISPLAY_CLASSES.items()},
            **{f"display_{kind}": display_as(mime) for kind, mime in kinds.items()},
            "clear_output": worker.clear_output,
            "display": worker.display,
            "get_ipython": lambda: None,
            "publish_display_data": lambda data, *_, **__: worker.display(data, raw=True),
            "set_matplotlib_formats": lambda *_, **__: None,
            "update_display": worker.display,
        }

    def find_spec(self, name: str, *_: object) -> Any:
        """Find a module by its name."""
        loader: Any = self
        is_package = name in self.packages
        return importlib.machinery.ModuleSpec(name, loader, is_package=is_package) if name in self.modules else None

    def create_module(self, _spec: Any) -> None:
        """Have an ordinary module made."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Give a module its names; of the package, `display` is a module."""
        vars(module).update(self.names, __version__="9.0.0", version_info=(9, 0, 0))
        if module.__name__ == "IPython":
            vars(module)["display"] = importlib.import_module("IPython.display")


class Adapter:
    """Import hook that changes libraries: so that their pictures are shown, and that they know the sandbox's limits."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.changes: dict[str, Callable[[Any], None]] = {
            "IPython.core.display_functions": self._change_ipython,
            "asyncio": self._change_asyncio,
            "cv2": self._change_cv2,
            "tkinter": lambda module: setattr(module.Tk, "__init__", refuse_screen),
            "joblib.func_inspect": self._change_joblib,
            "PIL.Image": self._change_image,
            "PIL.ImageShow": self._change_image_show,
            "getpass": lambda module: vars(module).update(getpass=refuse_input),
            "matplotlib": self._change_matplotlib,
            "matplotlib._text_helpers": self._change_text_helpers,
            "matplotlib.backend_bases": self._change_backend_bases,
            "matplotlib.font_manager": self._change_font_manager,
            "matplotlib.pyplot": self._change_pyplot,
            "multiprocessing.context": self._change_multiprocessing,
            "multiprocessing.pool": self._change_pool,
            "pandas": self._change_pandas,
            **dict.fromkeys(("bokeh.io.showing", "plotly.io._renderers"), self._change_show),
            **dict.fromkeys(("altair.vegalite.v5.api", "altair.vegalite.v6.api"), self._change_altair),
            "bokeh.io.output": lambda module: vars(module).update(output_notebook=lambda *_, **__: None),
            "folium.folium": lambda module: setattr(module.Map, "show_in_browser", self.worker.display),
            "plotly.offline.offline": lambda module: vars(module).update(iplot=self.worker.display),
            "tqdm.notebook": self._change_tqdm,
            "pdb": lambda module: vars(module).update(set_trace=refuse_debugger),
        }
        for name in self.changes:
            if name in sys.modules:  # preloaded
                self._change(sys.modules[name])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module that is to be changed as others find it, and change it once it has run."""
        if name not in self.changes:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self._change(module)

            vars(spec.loader)["exec_module"] = exec_module
        return spec

    def _change(self, module: types.ModuleType) -> None:
        with contextlib.suppress(Exception):  # another version of it may have other names: then it stays as it is
            self.changes[module.__name__](module)

    def _change_ipython(self, module: Any) -> None:
        """Have the real IPython's `display` show what ours shows; outside its shell it would print a repr."""
        module.display = module.update_display = self.worker.display
        module.clear_output = self.worker.clear_output

    def _change_asyncio(self, module: Any) -> None:
        """Let code start tasks outside of a coroutine, as in a notebook: in the session's loop, which it finds, too."""
        create = module.create_task

        @functools.wraps(create)
        def create_task(coroutine: Any, **options: Any) -> Any:
            if module._get_running_loop() or threading.current_thread() is not threading.main_thread():
                return create(coroutine, **options)
            return self.worker.continuity.find_loop().create_task(coroutine, **options)

        module.create_task = module.tasks.create_task = create_task
        self.worker.continuity.find_loop()

    def _change_cv2(self, module: Any) -> None:
        """Show images in the result rather than in windows, and have no key pressed."""

        def imshow(_name: str, image: Any) -> None:
            self.worker.publish(image_forms(module.imencode(".png", image)[1].tobytes()))

        windows = ("destroyAllWindows", "destroyWindow", "namedWindow", "resizeWindow", "setWindowTitle")
        vars(module).update({name: lambda *_, **__: None for name in windows}, imshow=imshow, waitKey=lambda *_: -1)

    def _change_joblib(self, module: Any) -> None:
        """Find again what was cached for a function that an earlier call defined under another file name."""
        get_name = module.get_func_name

        @functools.wraps(get_name)
        def get_func_name(*arguments: Any, **options: Any) -> tuple[list[str], str]:
            modules, name = get_name(*arguments, **options)
            return [re.sub(r"<call \d+>", "call", part) for part in modules], name

        module.get_func_name = get_func_name

    def _change_image_show(self, module: Any) -> None:
        module.show = lambda image, *_, **__: self.worker.display(image) or True

    def _change_matplotlib(self, module: Any) -> None:
        """Choose the backend, whatever the code asks for: there is no other screen."""
        module.rcParams["backend"] = "module://sandbox_backend"
        module.use = lambda *_, **__: None

    def _change_font_manager(self, module: Any) -> None:
        """Draw in another font what a font lacks, if there is one, and complain of each font once."""
        find = module.FontManager._find_fonts_by_props

        @functools.wraps(find)
        def finds(manager: Any, *arguments: Any, **options: Any) -> list[str]:
            fonts = find(manager, *arguments, **options)
            return [*fonts, *(font for font in self.worker.pictures.more_fonts(manager) if font not in fonts)]

        module.FontManager._find_fonts_by_props = finds
        said: set[str] = set()

        def is_new(record: Any) -> bool:
            """Whether a complaint about a font has not been made before; Matplotlib makes it for every text."""
            count = len(said)
            said.add(record.getMessage())
            return len(said) > count

        module._log.addFilter(is_new)

    def _change_text_helpers(self, module: Any) -> None:
        """Collect characters that a font lacks; Matplotlib warns of each."""
        module.warn_on_missing_glyph = lambda codepoint, *_: self.worker.pictures.without_glyph.add(chr(codepoint))

    def _change_backend_bases(self, module: Any) -> None:
        """Note which figures are saved where, so that none is shown twice."""
        module.FigureCanvasBase.start_event_loop = refuse_screen
        save = module.FigureCanvasBase.print_figure
        module.FigureCanvasBase.print_figure = self.worker.pictures.noting(save, lambda canvas: canvas.figure)

    def _change_image(self, module: Any) -> None:
        """Note which images are saved where, likewise."""
        module.Image.save = self.worker.pictures.noting(module.Image.save, lambda image: image)

    def _change_pyplot(self, module: Any) -> None:
        """Have show() put figures into the result, whichever backend was settled before, and pause() wait for nobody.

        savefig() after show(), which closed the figure, saves that figure instead of a new and empty one.
        """
        savefig = module.savefig

        @functools.wraps(savefig)
        def saves(*arguments: Any, **options: Any) -> Any:
            last = None if module.get_fignums() else self.worker.pictures.last_figure
            return last.savefig(*arguments, **options) if last else savefig(*arguments, **options)

        module.savefig = saves
        switch_backend = module.switch_backend
        module.switch_backend = lambda *_, **__: switch_backend("module://sandbox_backend")
        module.switch_backend()  # process 1 has drawn with another one if it has preloaded pyplot
        module.pause = lambda interval: time.sleep(min(interval, PAUSE_LIMIT))

    def _change_multiprocessing(self, module: Any) -> None:
        """Start processes by fork, also where Python would not: others can't import what the code defined."""
        module._default_context._default_context = module._concrete_contexts["fork"]

    def _change_pool(self, module: Any) -> None:
        """Refuse the code's functions in a pool whose processes are not forked: they would die, again and again."""
        for name in ("apply_async", "_map_async", "imap", "imap_unordered"):
            setattr(module.Pool, name, forked_only(getattr(module.Pool, name), module.ThreadPool))

    def _change_show(self, module: Any) -> None:
        """Show a figure in the result, as there is no browser."""
        module.show = lambda figure, *_, **__: self.worker.display(figure)

    def _change_altair(self, module: Any) -> None:
        """Show a chart likewise."""
        module.TopLevelMixin.show = lambda chart, *_, **__: self.worker.display(chart)

    def _change_tqdm(self, module: Any) -> None:
        """Draw progress bars as text: there are no widgets."""
        module.tqdm = module.tqdm_notebook = module.std_tqdm
        module.trange = module.tnrange = lambda *arguments, **options: module.std_tqdm(range(*arguments), **options)

    def _change_pandas(self, module: Any) -> None:
        """Show all of a table's columns, in several parts if it is wide."""
        module.set_option("display.max_columns", 100, "display.width", 120)


def tell_children(root: str, folders: list[str]) -> None:
    """Have the Pythons that code starts find these packages where the worker does, and shells their commands.

    The lines of a `.pth` file in the user's own `site-packages` follow the standard library. PYTHONPATH precedes it.
    """
    commands = [f"{folder}/bin" for folder in folders]
    others = [entry for entry in os.environ.get("PATH", os.defpath).split(":") if not entry.startswith(f"{root}/")]
    os.environ["PATH"] = ":".join([*commands, *others])
    place = os.path.expanduser(f"~/.local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
    with contextlib.suppress(OSError):
        os.makedirs(place, exist_ok=True)
        with open(f"{place}/installed.pth", "w", encoding="utf-8") as file:
            file.writelines(f"{folder}\n" for folder in folders)


def refuse_input(_prompt: object = "", /) -> str:
    """Stand in for input(), which has no one to answer it in a sandbox."""
    raise EOFError("input() can't be answered in the sandbox; put the value into the code instead")


def refuse_screen(*_: object, **__: object) -> None:
    """Stand in for what opens a window, or waits for a key or a click."""
    raise RuntimeError("there is no screen, no keyboard and no mouse here: show a picture with display(), or save it")


def refuse_debugger(*_: object, **__: object) -> None:
    """Stand in for breakpoint(), likewise."""
    raise RuntimeError("a debugger can't be answered in the sandbox; print what you need to see")


def fit_to_share(cpus: int) -> None:
    """Make os.cpu_count() report the CPU limit, in whole processors."""
    affinity, cpus = os.sched_getaffinity, min(cpus, os.cpu_count() or 1)
    os.sched_getaffinity = lambda pid: set(sorted(affinity(pid))[:cpus])
    os.cpu_count = lambda: cpus
    if hasattr(os, "process_cpu_count"):
        os.process_cpu_count = os.cpu_count


# ── import rules ──


class ImportPolicy:
    """Rules on what the user's own code may import. A guard rail against habit, not a wall: see Security in the README.

    Libraries may import what they need: an import is the user's unless the importing module itself was imported from
    outside the working directory.
    """

    def __init__(self, allowed: list[str], blocked: list[str], home: str) -> None:
        self.allowed = set(allowed)
        self.blocked = set(blocked)
        self.home = home

    def refusal(self, name: str) -> ImportError | None:
        top = name.partition(".")[0]
        if top == "__future__":
            return None
        if top in self.blocked:
            return ImportError(f"module {top!r} may not be imported: the setting blocked_modules names it", name=top)
        if self.allowed and top not in self.allowed:
            return ImportError(
                f"module {top!r} may not be imported: the setting allowed_modules permits only "
                + ", ".join(sorted(self.allowed)),
                name=top,
            )
        return None

    def install(self) -> None:
        """Check imports when they are made."""
        if not (self.allowed or self.blocked):
            return
        real_import, real_import_module = builtins.__import__, importlib.import_module

        def guarded_import(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            caller = sys._getframe(1)
            # Extension modules pass a list, and the globals of their caller: strptime() needs _strptime.
            from_extension = isinstance(fromlist, list) and "__import__" not in caller.f_code.co_names
            if not from_extension:
                self._require(name, caller.f_globals if globals is None else globals, level)
            return real_import(name, globals, locals, fromlist, level)

        def guarded_import_module(name: str, package: str | None = None) -> Any:
            self._require(name, sys._getframe(1).f_globals, int(name.startswith(".")))
            return real_import_module(name, package)

        builtins.__import__ = guarded_import
        importlib.__import__ = guarded_import
        importlib.import_module = guarded_import_module

    def _require(self, name: str, asking: dict[str, Any], level: int) -> None:
        if level == 0 and isinstance(name, str) and self._is_users(asking):
            refusal = self.refusal(name)
            if refusal:
                raise refusal

    def _is_users(self, asking: dict[str, Any]) -> bool:
        if asking is globals():
            return False  # this program itself
        name = asking.get("__name__")
        module = sys.modules.get(name) if isinstance(name, str) else None
        if module is None or name == "__main__" or vars(module) is not asking:
            return True
        return str(asking.get("__file__") or "").startswith(self.home + "/")


# ════════ end of guest ════════


# ── engine ──

ANSWER_TIMEOUT = 8  # seconds for the engine to answer at all; with the next, less than clients wait for a call
ENGINE_TIMEOUT = 15  # seconds for an engine command that only queries
REMOVE_TIMEOUT = 30  # seconds for an engine command that removes something
PULL_TIMEOUT = 900  # seconds to pull or make an image
ERRORS_KEPT = 8192  # bytes kept of the stderr of the engine's command line


@dataclass(frozen=True)
class Engine:
    """A container engine's command line. Holds no state: it asks the engine, by label, which containers exist."""

    command: str  # path to the executable
    kind: Literal["docker", "podman"]
    version: str

    async def run(self, *arguments: str, timeout: float = ENGINE_TIMEOUT, stdin: Any = subprocess.DEVNULL) -> str:
        """Run a command to its end and return its output.

        Raises:
            EngineError: the command failed (the message quotes it), or took longer than `timeout` seconds.
        """
        code, output, errors = await run_command([self.command, *arguments], timeout, stdin)
        if code:
            raise EngineError(f"`{self.kind} {arguments[0]}` failed: {last_line(errors) or f'exit status {code}'}")
        return output

    async def require_answer(self) -> None:
        """Raise HangError if the engine does not answer; any answer will do, even an error."""
        try:
            await self.run("version", timeout=ANSWER_TIMEOUT)
        except HangError:
            raise
        except EngineError:
            pass

    async def spawn(self, *arguments: str) -> tuple[anyio.abc.Process, anyio.abc.ByteStream]:
        """Start a command; return it, and the stream to its standard input and from its standard output."""
        process = await open_command([self.command, *arguments], subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        return process, StapledByteStream(process.stdin, process.stdout)

    def sandbox_arguments(self, name: str, image: Image, config: Config, labels: Mapping[str, str]) -> list[str]:
        """Return the command that starts a sandbox; Security in the README explains what its flags prevent."""
        docker = config.docker
        environment = {
            "MPLBACKEND": "agg",
            "HOME": "/tmp",
            "TMPDIR": "/tmp",
            "MPLCONFIGDIR": "/tmp/.matplotlib",
            "LANG": "C.UTF-8",
            "USER": "sandbox",
        }
        for library in ("OPENBLAS", "OMP", "MKL", "NUMEXPR"):
            environment[f"{library}_NUM_THREADS"] = "1"  # forking needs a single thread, and half a core feeds no more
        if config.allowed_hosts:
            named = {HostRule.parse(host).name for host in config.allowed_hosts}
            address, own = f"http://127.0.0.1:{PROXY_PORT}", ",".join(sorted({"localhost", "127.0.0.1"} - named))
            for variable, value in (("http_proxy", address), ("https_proxy", address), ("no_proxy", own)):
                environment |= {variable: value, variable.upper(): value}
            environment = {
                **{k: v for one in config.secrets.values() for k, v in one.environment.items()},
                **environment,
            }
        if docker.gpus:
            environment["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"  # no graphics, video or display
        if docker.cpu_limit <= 1:  # each of joblib's processes would import everything anew, for no gain
            environment["JOBLIB_MULTIPROCESSING"] = "0"
        tmpfs = f"rw,nosuid,nodev,size={size_in_bytes(docker.disk_limit)},mode=1777"
        # The kernel counts inotify instances, queued signals, pipes and more for each user of the host, so that code of
        # one sandbox could use up what all have. But a mounted folder's permissions are given to a user that is known.
        user = NOBODY if docker.mounts else OWN_USERS[zlib.crc32(name.encode()) % len(OWN_USERS)]  # a random name
        if self.kind == "docker":  # runc before 1.2 keeps the mount point's own mode, so the owner has to grant access
            tmpfs += f",uid={user},gid={NOBODY}"  # (Podman neither knows nor needs these two)
        return [
            *self._run(name),
            f"--label={LABEL}={PROTOCOL}",
            *(f"--label={LABEL}.{key}={value}" for key, value in labels.items()),
            "--hostname=sandbox",
            *(["--network=none"] if docker.network_disabled else []),
            # Otherwise Docker copies the host's resolv.conf, which reveals a company's name servers and domains.
            *(["--dns=0.0.0.0", "--dns-search=."] if docker.network_disabled and self.kind == "docker" else []),
            *(["--read-only"] if docker.read_only else []),
            # Otherwise Podman adds writable directories without a size limit of their own to a read-only root.
            *(["--read-only-tmpfs=false"] if self.kind == "podman" else []),
            *(
                f"--tmpfs={path}:{tmpfs},{'noexec' if path == '/tmp' else 'exec'}"
                for path in dict.fromkeys(("/tmp", docker.working_dir))
            ),
            f"--workdir={docker.working_dir}",
            f"--memory={size_in_bytes(docker.memory_limit)}",
            f"--memory-swap={size_in_bytes(docker.memory_limit)}",  # memory and swap together, so no swap
            f"--cpus={docker.cpu_limit}",
            f"--pids-limit={docker.pids_limit}",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--user={user}:{NOBODY}",
            "--ipc=private",
            f"--shm-size={size_in_bytes(docker.disk_limit)}",
            "--ulimit=nofile=1024:1024",
            "--ulimit=nproc=4096:4096",  # limits nothing, but Podman drops its own default once any ulimit is given
            "--ulimit=core=1:1",  # also stops a handler of core dumps on the host: core(5)
            "--stop-timeout=1",
            "--oom-score-adj=500",
            f"--mount=type=volume,source={config.package.volume},target={PACKAGES},ro",
            *self._mounts(docker),
            *(f"--env={key}={value}" for key, value in {**dict.fromkeys(PROXIES, ""), **environment}.items()),
            *([f"--runtime={docker.runtime}"] if docker.runtime else []),
            *(self._gpus(docker.gpus) if docker.gpus else []),
            "--",
            image.name,
            *BOOTSTRAP_ARGUMENTS,
        ]

    def _gpus(self, gpus: str) -> list[str]:
        if self.kind == "docker":
            return [f'--gpus="{gpus}"']  # in quotes, as it takes commas for those between options
        return [f"--device=nvidia.com/gpu={one}" for one in gpus.removeprefix("device=").split(",")]

    def _mounts(self, docker: DockerConfig) -> list[str]:
        try:
            return [f"--mount={mount_argument(mount, docker.working_dir)}" for mount in docker.mounts]
        except ValueError as error:  # a mounted path has changed since the configuration was read
            raise EngineError(f"A sandbox can't be started: {error}.") from None

    def installer_arguments(self, name: str, image: str, package: PackageConfig) -> list[str]:
        """Return the command that starts a helper container: networked, as root, and without any of the user's code."""
        return [
            *self._run(name),
            f"--label={LABEL.replace('sandbox', 'installer')}",
            f"--mount=type=volume,source={package.volume},target={PACKAGES}",
            *([f"--network={package.network}"] if package.network else []),
            "--user=0:0",
            "--ulimit=nofile=4096:4096",
            "--ulimit=nproc=4096:4096",
            *(f"--env={variable}=" for variable in PROXIES),
            "--",
            image,
            *BOOTSTRAP_ARGUMENTS,
        ]

    def _run(self, name: str) -> list[str]:
        """Return the arguments that every container is started with."""
        return [
            "run",
            "--interactive",
            "--rm",
            "--pull=never",
            f"--name={name}",
            "--log-driver=none",
            "--entrypoint=python3",
            # To proxy signals, Podman's client also catches SIGPIPE. So it would survive the death of its reader (the
            # host), fail to write the container's reaction to that, and remove the container.
            *(["--http-proxy=false", "--sig-proxy=false"] if self.kind == "podman" else []),
        ]

    def plug_arguments(self, name: str) -> list[str]:
        """Return the command that runs `plug` in the sandbox `name`."""
        program = f"{PLUG_SOURCE}\nplug()"
        return ["exec", "--interactive", f"--user={PLUG_UID}:{PLUG_UID}", name, "python3", "-I", "-S", "-c", program]

    async def inspect(self, kind: str, name: str, template: str) -> str | None:
        """Return one fact about an image or container, or None if none has that name.

        Raises:
            EngineError: the engine does not answer, so the fact is unknown.
        """
        for _ in range(2):  # the engine may have been down for a moment
            try:
                return (await self.run(kind, "inspect", f"--format={template}", name)).strip() or None
            except HangError:
                raise
            except EngineError:
                await self.run("version")
        return None

    async def sandboxes(self, *filters: str) -> dict[str, str]:
        """Return all hosts' running or paused sandboxes that match `filters`: names and versions of the protocol."""
        states = ("--filter=status=running", "--filter=status=paused")  # by default Podman omits paused ones
        return await self._ours(*states, *filters)

    async def leftovers(self) -> dict[str, str]:
        """Return the names of sandboxes that do not run, because their host or the engine died while starting them."""
        return await self._ours("--all", "--filter=status=created", "--filter=status=exited")

    async def _ours(self, *options: str) -> dict[str, str]:
        """Return the containers with a sandbox's labels and form of name; either alone proves nothing."""
        labels = (f"--filter=label={label}" for label in (LABEL, f"{LABEL}.owner", f"{LABEL}.settings"))
        version = f'.Label "{LABEL}"' if self.kind == "docker" else f'index .Labels "{LABEL}"'
        lines = (await self.run("ps", *options, *labels, f"--format={{{{.Names}}}} {{{{{version}}}}}")).splitlines()
        found = dict(line.split(maxsplit=1) for line in lines if " " in line)
        return {name: version for name, version in found.items() if CONTAINER_NAME.fullmatch(name)}

    async def remove(self, name: str) -> None:
        """Kill and remove a container; it may be gone already."""
        for command in (("kill",), ("rm", "--force")):  # Podman's `rm --force` alone waits ten seconds for process 1
            try:
                await self.run(*command, name, timeout=REMOVE_TIMEOUT)
            except HangError:
                return
            except EngineError:
                pass


# Docker and Podman copy their proxy settings, passwords included, into containers unless these variables are set there.
PROXIES = [
    variable
    for proxy in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    for variable in (proxy, proxy.upper())
]
# The only variables passed to the engine's command line, those it needs to find its engine. Others of this process may
# hold secrets, and both Docker and Podman copy proxy settings, passwords included, into containers.
ENGINE_ENVIRONMENT = (
    "PATH HOME USER LOGNAME LANG TMPDIR TEMP TMP DOCKER_HOST DOCKER_CONTEXT DOCKER_CONFIG DOCKER_CERT_PATH "
    "DOCKER_TLS_VERIFY DOCKER_API_VERSION CONTAINER_HOST CONTAINER_SSHKEY CONTAINERS_CONF CONTAINERS_STORAGE_CONF "
    "CONTAINERS_REGISTRIES_CONF CONTAINERD_ADDRESS CONTAINERD_NAMESPACE XDG_RUNTIME_DIR XDG_CONFIG_HOME XDG_DATA_HOME "
    "DBUS_SESSION_BUS_ADDRESS SSH_AUTH_SOCK SYSTEMROOT SYSTEMDRIVE USERPROFILE APPDATA LOCALAPPDATA PROGRAMDATA "
    "PROGRAMFILES COMSPEC PATHEXT"
).split()
# Searched after PATH, as programs started from a desktop get a short PATH.
USUAL_PLACES = (
    "/usr/local/bin /usr/bin /opt/homebrew/bin /opt/local/bin /opt/podman/bin /snap/bin ~/.docker/bin ~/.orbstack/bin "
    "~/.rd/bin /Applications/Docker.app/Contents/Resources/bin C:/Progra~1/Docker/Docker/resources/bin"
).split()


async def find_engine(command: str | None = None) -> Engine:
    """Find the engine to use: `command` if given, else docker, else podman, if it answers.

    All are asked at once, so that one that hangs does not use up the caller's time.

    Raises:
        EngineError: none can be used; the message is about the first one that is installed.
    """
    names = (command,) if command else ("docker", "podman")
    paths = list(dict.fromkeys(path for name in names if (path := find_program(name))))
    answers: dict[str, Engine | EngineError] = {}
    answered = {path: anyio.Event() for path in paths}

    async def ask(path: str) -> None:
        try:
            answers[path] = await _identify(path)
        except EngineError as error:
            answers[path] = error
        answered[path].set()

    problem: EngineError | None = None
    async with open_tasks() as tasks:
        for path in paths:
            tasks.start_soon(ask, path)
        for path in paths:
            await answered[path].wait()
            answer = answers[path]
            if isinstance(answer, Engine):
                return answer
            problem = problem or answer
    if problem:
        raise problem
    if command:
        raise EngineError(
            f"docker.command is {command!r}, but there is no such program: correct or remove that setting."
        )
    raise EngineError(
        "No container engine was found: install Docker (https://docs.docker.com/get-docker) or Podman "
        "(https://podman.io), or set docker.command to the path of its command line."
    )


def find_program(name: str) -> str | None:
    """Find a program on PATH or in one of the usual places; return its absolute path."""
    places = [os.environ.get("PATH", os.defpath), *(str(Path(place).expanduser()) for place in USUAL_PLACES)]
    found = shutil.which(str(Path(name).expanduser()), path=os.pathsep.join(places))
    return os.path.abspath(found) if found else None  # commands run in another directory


async def _identify(path: str) -> Engine:
    """Ask a command line for its engine's kind and version. Raises EngineError if that engine can't be used."""
    try:
        code, output, errors = await run_command([path, "version", "--format={{json .}}"], ANSWER_TIMEOUT)
    except HangError as error:
        raise HangError(f"{path} does not answer: {error} Restart the engine it belongs to.") from None
    try:
        answer = json.loads(output)
        client, server = dict(answer["Client"]), dict(answer.get("Server") or {})
    except (ValueError, KeyError, TypeError, AttributeError):
        client, server = {}, None
    kind: Literal["docker", "podman"] = "podman" if "APIVersion" in client else "docker"
    version = str((server or client).get("Version", "")).lstrip("v")
    if code or not version or (kind == "docker" and not server):
        said = last_line(errors) or f"exit status {code}"
        if "permission denied" in errors:
            raise EngineError(
                f"{path} may not be used by this user: add the user to the group docker (`sudo usermod -aG docker "
                f"$USER`, then log in again), or use rootless Docker or Podman. It said: {said}"
            )
        raise EngineError(
            f"{path} is installed, but its engine does not answer: start Docker Desktop, or `sudo systemctl start "
            f"docker`, or see that DOCKER_HOST and `docker context` point to one that runs. It said: {said}"
        )
    oldest = {"docker": 20, "podman": 4}[kind]
    major = re.match(r"\d+", version)
    if major and int(major[0]) < oldest:
        raise EngineError(f"{path} is {kind} {version}, which is too old: version {oldest} or later is needed.")
    return Engine(path, kind, version)


CGROUP_REMEDY = (
    "A rootless engine needs cgroup version 2 for its limits, and the controllers delegated: set `Delegate=cpu cpuset "
    "io memory pids` for user@.service (https://rootlesscontaine.rs/getting-started/common/cgroup2)."
)


GPU_REMEDY = (
    "This engine has no GPU to give (docker.gpus): install NVIDIA's driver and container toolkit on its host, then run "
    "`nvidia-ctk runtime configure` for Docker or `nvidia-ctk cdi generate` for Podman; or take the setting out."
)


def path_for(program: str) -> str:
    """Return PATH for an engine's command: its helpers, such as those for credentials, may stand only beside it."""
    folders = map(os.path.dirname, (program, os.path.realpath(program)))
    return os.pathsep.join(dict.fromkeys([os.environ.get("PATH", os.defpath), *folders]))


async def open_command(command: Sequence[str], stdin: Any, stdout: Any = subprocess.PIPE) -> anyio.abc.Process:
    """Start an engine command in its own session, so that signals to this program's process group don't reach it."""
    environment = {name: os.environ[name] for name in ENGINE_ENVIRONMENT if name in os.environ}
    environment["PATH"] = path_for(command[0])
    if command[1] == "pull":  # the only command that may need a proxy itself
        environment |= {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    log.debug("starting: %s", shlex.join(clip(part, 200) for part in command))
    try:
        with anyio.CancelScope(shield=True):  # cancelling half-way would leave a process without an owner
            process = await anyio.open_process(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=tempfile.gettempdir(),  # Podman's conmon leaves a file `oom` in its working directory
                start_new_session=True,
            )
    except OSError as error:
        raise EngineError(
            f"{command[0]} can't be run: {error.strerror}. Reinstall it, or set docker.command to one that can."
        ) from error
    return process


async def run_command(
    command: Sequence[str],
    timeout: float,
    stdin: Any = subprocess.DEVNULL,
    on_line: Callable[[str], None] | None = None,
) -> tuple[int, str, str]:
    """Run an engine command to its end; return its status and the last LINE_LIMIT bytes of its output and errors."""
    started = time.monotonic()
    process = await open_command(command, stdin)
    output, errors = bytearray(), bytearray()

    async def collect(stream: anyio.abc.ByteReceiveStream, into: bytearray) -> None:
        async for data in stream:
            into += data
            del into[:-LINE_LIMIT]
            if on_line:
                on_line(last_line(into.decode("utf-8", "replace")))

    try:
        assert process.stdout is not None
        assert process.stderr is not None
        with anyio.fail_after(timeout):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(collect, process.stdout, output)
                tasks.start_soon(collect, process.stderr, errors)
            code = await process.wait()
    except TimeoutError:
        raise HangError(
            f"`{Path(command[0]).name} {command[1]}` did not end within {timeout:g} seconds: the engine hangs, or "
            "the host is overloaded."
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.aclose()
    log.debug("`%s` ended with exit status %s after %.3f s", command[1], code, time.monotonic() - started)
    return code, output.decode("utf-8", "replace"), errors.decode("utf-8", "replace")


async def wait_or_doubt(wait: Callable[[], Awaitable[T]], require: Callable[[], Awaitable[None]]) -> T:
    """Call `wait`; after DOUBT_AFTER seconds call `require`, which raises if there is no point, then `wait` again."""
    with anyio.move_on_after(DOUBT_AFTER):
        return await wait()
    await require()
    return await wait()


async def send_quietly(stream: anyio.abc.ByteSendStream, data: bytes) -> None:
    """Write to a process, ignoring that it has ended: the reader of its output notices."""
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
        await stream.send(data)


async def keep_tail(stream: anyio.abc.ByteReceiveStream, tail: bytearray) -> None:
    """Read a stream to its end, keeping its last ERRORS_KEPT bytes."""
    async for data in stream:
        tail += data
        del tail[:-ERRORS_KEPT]


def without_passwords(text: str) -> str:
    """Hide user names and passwords in the addresses of a text."""
    return re.sub(r"(://)[^/@\s\"']+@", r"\1***@", text)


def last_line(text: str) -> str:
    """Return the last non-blank line, printable, short and without passwords: engines give the reason last."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    if len(lines) > 1 and re.match(r"(See|Run) '\w+ [\w ]*--help'", lines[-1]):  # Docker's closing advice
        lines.pop()
    said = without_passwords(lines[-1]) if lines else ""
    return textwrap.shorten("".join(char if char.isprintable() else " " for char in said), 300, placeholder=" …")


# ── image ──

INSTALL_TIMEOUT = 900  # seconds to build the derived image, or to install a package
LOCK_PAUSE = 0.2  # seconds between attempts to take a lock that another program holds


@dataclass(frozen=True)
class Image:
    """Image that sandboxes are made from."""

    name: str
    id: str
    origin: str  # where it came from, in words
    problem: str | None = None  # reason the preinstalled packages are missing

    @property
    def packages(self) -> str:
        """Folder in the volume for packages installed on top of this image."""
        return f"{PACKAGES}/{self.id.rpartition(':')[2][:12]}"


async def find_image(engine: Engine, docker: DockerConfig, report: Callable[[str], None]) -> Image:
    """Find the configured image, else pull it, else (for the default image) make one from this host's own Python.

    Steps that take long are reported, one line at a time, to `report`.

    Raises:
        ImageError: the image is missing, and could not be pulled or made.
    """
    if docker.image == "host":
        return await _host_image(engine, report)
    if identity := await _image_id(engine, docker.image):
        return Image(docker.image, identity, "present")
    may_be_made = docker.image == DockerConfig.image and sys.platform == "linux"
    if may_be_made and (identity := await _image_id(engine, host_image_name())):
        log.warning(
            "%s is not here: using %s, made from this host's Python (`%s pull %s` changes that)",
            docker.image, host_image_name(), engine.kind, docker.image,
        )  # fmt: skip
        return Image(host_image_name(), identity, "made from this host's Python")
    report(f"pulling {docker.image} (once; the network decides how long that takes)")
    try:
        code, _, errors = await run_command(
            [engine.command, "pull", docker.image],
            PULL_TIMEOUT,
            on_line=lambda line: report(f"pulling {docker.image}: {line}"),
        )
        said = last_line(errors) if code else ""
    except EngineError as error:
        said = str(error)
    if not said and (identity := await _image_id(engine, docker.image)):
        log.info("pulled %s", docker.image)
        return Image(docker.image, identity, "pulled")
    if not may_be_made:
        raise ImageError(
            f"The image {docker.image} is not here and can't be pulled: {said.rstrip('.') or 'no reason given'}. "
            f"Pull or load it by hand, set docker.image to one that is here, or to `host` for this host's Python."
        )
    log.warning("%s can't be pulled (%s): making an image from this host's own Python", docker.image, said)
    return await _host_image(engine, report)


async def _image_id(engine: Engine, name: str) -> str | None:
    return await engine.inspect("image", name, "{{.Id}}")


def host_image_name() -> str:
    """Return the name of the image made from this Python, distinct for each interpreter version and path."""
    place = base64.b32encode(str(_interpreter()).encode()).decode().strip("=").lower()[-24:]
    return f"python-docker-mcp-host:{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}-{place}"


def _interpreter() -> Path:
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


async def _host_image(engine: Engine, report: Callable[[str], None]) -> Image:
    """Return an image with this host's interpreter, standard library and shared libraries, made if missing."""
    name = host_image_name()
    if sys.platform != "linux":
        raise ImageError(
            "docker.image is `host`, which works on Linux only: set it to an image such as python:3.12.2-slim."
        )
    if not (identity := await _image_id(engine, name)):
        report("making an image from this host's Python")
        reader, writer = os.pipe()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, _write_host_files, writer)
            try:
                await engine.run(
                    "import",
                    "--change=ENV PATH=/usr/local/bin:/usr/bin:/bin",
                    "-",
                    name,
                    timeout=PULL_TIMEOUT,
                    stdin=reader,
                )
                failure = None
            except EngineError as error:
                failure = error
            finally:
                os.close(reader)  # if the import failed, the writer must get EPIPE
        if failure:
            raise ImageError(
                f"An image can't be made from this host's Python: {str(failure).rstrip('.')}. Set docker.image to one "
                "that is here or can be pulled."
            ) from failure
        identity = await _image_id(engine, name)
        log.warning("made the image %s from this host's Python %s", name, sys.version.split()[0])
    return Image(name, identity or "", "made from this host's Python")


# Libraries that manylinux wheels may expect (PEP 599 and later), and stubs for former parts of glibc.
BASELINE_LIBRARIES = (
    "libpthread.so.0 libdl.so.2 librt.so.1 libutil.so.1 libresolv.so.2 libm.so.6 libnss_files.so.2 libnss_dns.so.2 "
    "libstdc++.so.6 libgcc_s.so.1 libz.so.1 libexpat.so.1"
).split()


def _write_host_files(descriptor: int) -> None:
    """Write a tar of a minimal root file system around this interpreter, then close the descriptor."""
    executable, library = _interpreter(), Path(os.__file__).parent
    shell = Path("/bin/sh").resolve()
    shared = _libraries_of(executable, shell, *library.glob("lib-dynload/*.so"))

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(entry.name).parts
        if {"test", "tests", "site-packages", "dist-packages", "idlelib", "turtledemo", "ensurepip"} & set(parts):
            return None
        if entry.name.endswith((".opt-1.pyc", ".opt-2.pyc")) or (entry.name.startswith("usr/share/zoneinfo/right")):
            return None
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return entry if entry.isfile() or entry.isdir() or entry.issym() else None

    def add_folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        tar.addfile(entry)

    def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))

    def add_link(tar: tarfile.TarFile, name: str, target: Path) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, str(target)
        tar.addfile(entry)

    with (
        contextlib.suppress(BrokenPipeError),
        open(descriptor, "wb") as pipe,
        tarfile.open(fileobj=pipe, mode="w|") as tar,
    ):
        tar.dereference = True  # a library's usual name is a link, under which the file itself must be stored
        for path in sorted({*shared, executable, Path("/etc/ld.so.cache")}):
            if path.exists():
                tar.add(path, str(path).lstrip("/"), filter=wanted)
        tar.dereference = False
        for folder in (library, Path("/usr/share/zoneinfo")):
            if folder.exists():
                tar.add(folder, str(folder).lstrip("/"), filter=wanted)
        tar.dereference = True
        tar.add(shell, "bin/sh", filter=wanted)
        for name in ("python3", "python"):
            add_link(tar, f"usr/local/bin/{name}", executable)
        add_file(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n")
        add_file(tar, "etc/group", b"root:x:0:\nnogroup:x:65534:\n")
        for name, mode in (("tmp", 0o1777), ("proc", 0o755), ("sys", 0o755), ("dev", 0o755), ("var/tmp", 0o1777)):
            add_folder(tar, name, mode)


def _libraries_of(*programs: Path) -> set[Path]:
    """Find the shared libraries that programs and extension modules need, and those that wheels may rely on."""
    ldd = subprocess.run(
        ["ldd", *map(str, programs)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout
    shared = {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", ldd, re.MULTILINE)}
    for folder in {path.parent for path in shared}:
        shared |= {folder / name for name in BASELINE_LIBRARIES if (folder / name).exists()}
    return shared


async def derive_image(engine: Engine, config: Config, report: Callable[[str], None]) -> Image:
    """Find or make the sandboxes' image: the base image plus packages, their bytecode and a font list.

    It is made by committing a helper container, which any engine can do, once per base image and list of packages;
    another program that wants it meanwhile waits. If the packages can't be installed, return the base image, with
    `problem`; if it may be for system packages, with the others all the same.

    Raises:
        ImageError: not even the base image could be found, pulled or made.
    """
    docker, package = config.docker, config.package
    if not wanted(package):
        return await find_image(engine, docker, report)
    if docker.image != "host" and (made := await _find_derived(engine, docker.image, package)):
        return made
    base = await find_image(engine, docker, report)
    if base.name != docker.image and (made := await _find_derived(engine, base.name, package)):
        return made
    name = derived_name(base.name, package)
    try:
        with anyio.fail_after(INSTALL_TIMEOUT):
            identity = await _build(engine, base, name, config, report)
    except (EngineError, TimeoutError) as error:
        if package.system:
            without = dataclasses.replace(config, package=dataclasses.replace(package, system=()))
            base = await derive_image(engine, without, report)
            if base.problem:  # whatever it is, it is not these packages
                return base
        missing = ", ".join(package.system or package.preinstalled)
        problem = f"{missing} could not be preinstalled: {str(error) or 'it took too long'}"
        log.warning("%s", problem)
        return dataclasses.replace(base, problem=problem)
    return Image(name, identity, f"derived from {base.name} ({base.origin})")


def wanted(package: PackageConfig) -> tuple[str, ...]:
    """Return all that the image is to have besides what its base image has."""
    return (*package.system, *package.preinstalled)


async def _find_derived(engine: Engine, base: str, package: PackageConfig) -> Image | None:
    """Return the image derived from a base image as it is now, or from one that is gone; None if there is none."""
    name = derived_name(base, package)
    if not (made := await _image_id(engine, name)):
        return None
    base_id = await _image_id(engine, base)
    derived_from = await engine.inspect("image", name, f'{{{{index .Config.Labels "{BASE_LABEL}"}}}}')
    return Image(name, made, "derived") if base_id in (None, derived_from) else None


def derived_name(base: str, package: PackageConfig) -> str:
    """Return the name of the image derived from a base image: a digest of its ingredients, the same on every host."""
    return f"python-docker-mcp:{ingredients(base, package, RECIPE)}"


def ingredients(base: str, package: PackageConfig, recipe: int = 0) -> str:
    """Return a digest of what an image is derived from, by one recipe or by any."""
    system = ("system", *package.system) if package.system else ()
    text = "\n".join((str(recipe), base, package.installer, *package.preinstalled, *system))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


RECIPE = 5  # increased when the same packages would yield a different image
BASE_LABEL = "python-docker-mcp.base"  # on a derived image: the id of its base image
INGREDIENTS_LABEL = "python-docker-mcp.ingredients"  # likewise: a digest of the base image's name and the packages


async def _build(engine: Engine, base: Image, name: str, config: Config, report: Callable[[str], None]) -> str:
    """Build the derived image and return its id; if another program is building it, wait for its image.

    Two images of one name would be two places for installed packages.
    """
    build = f"build-{name.rpartition(':')[2]}"
    waiting = f"waiting for another program that is preparing the image with {', '.join(wanted(config.package))}"
    async with file_lock(build, lambda: report(waiting)) as has_waited:
        if has_waited and (made := await _image_id(engine, name)):
            return made
        for attempt in itertools.count(1):
            helper = f"python-docker-mcp-{build}-{secrets.token_hex(4)}"
            try:
                await _build_once(engine, base, name, helper, config, report)
                break
            except HelperError:
                if attempt == BUILD_ATTEMPTS:
                    raise
    await _remove_older_images(engine, name, ingredients(base.name, config.package))
    return await _image_id(engine, name) or name


async def _build_once(
    engine: Engine, base: Image, name: str, helper: str, config: Config, report: Callable[[str], None]
) -> None:
    report(build_status(1, f"fetching {config.package.installer}, for {', '.join(wanted(config.package))}"))
    task = {
        "task": "build",
        "requirements": config.package.preinstalled,
        "system": config.package.system,
        "system_mirror": config.package.system_mirror,
    }
    async with helper_container(engine, helper, base.name, config.package, task, report) as outcome:
        outcome.require_success()
        report(build_status(BUILD_STEPS, "saving the image"))
        await engine.run(
            "commit",
            f"--change=LABEL {BASE_LABEL}={base.id}",
            f"--change=LABEL {INGREDIENTS_LABEL}={ingredients(base.name, config.package)}",
            helper,
            name,
            timeout=PULL_TIMEOUT,
        )
    log.info("made the image %s with %s", name, ", ".join(" ".join(item) for item in outcome.installed))


BUILD_ATTEMPTS = 3  # attempts to build the derived image; repeated only if its helper container ended too soon
BUILD_STEPS = 5  # steps shown: fetching the installer, installing, compiling, listing fonts, saving


def build_status(step: int, text: str) -> str:
    """Return a progress line for the derived image; each is self-contained, as a client may show only one of them."""
    bar = "█" * step + "░" * (BUILD_STEPS - step)
    return f"{bar} preparing the image (once; a minute or so): {text}"


@asynccontextmanager
async def file_lock(name: str, on_wait: Callable[[], None]) -> AsyncIterator[bool]:
    """Keep other programs of this user out of the same block; yield whether this program had to wait for one of them.

    The system frees the lock when its holder ends, in whatever way. Without such locks, as on Windows, or without a
    place for the file, nothing is locked.
    """
    try:
        import fcntl

        folder = CONFIG_PATH.parent.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    except (ImportError, OSError):
        yield False
        return
    has_waited = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                has_waited = True
                on_wait()
                await anyio.sleep(LOCK_PAUSE)
        yield has_waited
    finally:
        os.close(descriptor)


async def _remove_older_images(engine: Engine, name: str, digest: str) -> None:
    """Remove older images of the same ingredients, unless something uses them."""
    with contextlib.suppress(EngineError):
        current = await _image_id(engine, name)
        listed = await engine.run("images", "--no-trunc", "--quiet", f"--filter=label={INGREDIENTS_LABEL}={digest}")
        for identity in set(listed.split()):
            if current and current.rpartition(":")[2] not in identity:
                with contextlib.suppress(EngineError):
                    await engine.run("rmi", identity, timeout=REMOVE_TIMEOUT)


# ── packages ──


@dataclass(frozen=True)
class Outcome:
    """Final report of a helper container."""

    ok: bool
    output: str = ""
    folder: str | None = None
    installed: tuple[tuple[str, str], ...] = ()
    present: str | None = None  # version of the requested package, if the image has it

    def require_success(self) -> None:
        """Raise EngineError, with the relevant part of the installer's output, if the installer failed."""
        if not self.ok:
            raise EngineError(shorten_installer_output(self.output))


# A line of uv's, pip's, apt-get's or apk's that gives the reason for a failure.
REASON = re.compile(
    r"(?i)error|e: |hint:|cause:|caused by:|warning: (fetching|updating) |"
    r".*(was not found|has no |no matching|\(no such package\))"
)


def shorten_installer_output(output: str) -> str:
    """Return the lines of an installer's output that give the reason for its failure, else its last lines."""
    lines = list(dict.fromkeys(line.strip() for line in output.splitlines() if line.strip()))
    telling = [line for line in lines if REASON.match(line)]
    return without_passwords("\n".join(telling[-8:] or lines[-8:]))[:2000]


@asynccontextmanager
async def helper_container(
    engine: Engine, name: str, image: str, package: PackageConfig, task: dict[str, Any], report: Callable[[str], None]
) -> AsyncIterator[Outcome]:
    """Run an installer in a container, which stays, with its work done, until the `async with` ends.

    Raises:
        EngineError: the container could not be started, or ended without an outcome.
    """
    process, pipe = await engine.spawn(*engine.installer_arguments(name, image, package))
    errors = bytearray()
    assert process.stderr is not None

    try:
        async with open_tasks() as tasks:
            tasks.start_soon(keep_tail, process.stderr, errors)
            try:
                shipped = shipment(INSTALLER_SOURCE, "run_installer", installer_task(package, task))
                tasks.start_soon(send_quietly, pipe, shipped)
                lines = BufferedByteReceiveStream(pipe)
                step = 0
                frame = await wait_or_doubt(functools.partial(receive, lines, FROM_INSTALLER), engine.require_answer)
                while frame["kind"] != "done":
                    step, text = frame.get("step", step), last_line(frame["text"])
                    report(build_status(step, text) if step else text)
                    frame = await receive(lines, FROM_INSTALLER)
                outcome = Outcome(
                    frame["ok"],
                    frame.get("output", ""),
                    frame.get("folder"),
                    tuple(frame.get("installed", ())),
                    frame.get("present"),
                )
            except HangError:
                process.kill()  # the container can't be removed; if it ever starts, it finds no host and ends
                raise
            except (
                anyio.EndOfStream,
                anyio.IncompleteRead,
                anyio.BrokenResourceError,
                anyio.DelimiterNotFound,
            ) as error:
                with anyio.move_on_after(FAREWELL_TIMEOUT):
                    await process.wait()
                said = last_line(errors.decode("utf-8", "replace")) or f"exit status {process.returncode}"
                raise HelperError(f"The installer's container ended too soon: {said}") from error
            except ProtocolError as error:
                raise EngineError(f"The installer's container broke the protocol: {error}") from error
            yield outcome
    finally:
        with anyio.CancelScope(shield=True):
            await pipe.send_eof()  # on EOF the container's process exits, and the engine removes the container
            with anyio.move_on_after(ATTACH_TIMEOUT):
                await process.wait()
            if process.returncode is None:
                await engine.remove(name)
                process.kill()
            await process.aclose()
            await pipe.aclose()


def installer_task(package: PackageConfig, task: dict[str, Any]) -> dict[str, Any]:
    """Return the installer's task, which the helper gets on standard input so that no image keeps any of it."""
    certificates, asked_for = host_certificates(package)
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    environment = {**{name.lower(): value for name, value in proxies.items()}, **proxies}  # apt knows only the former
    if package.index_url:
        environment |= {"UV_DEFAULT_INDEX": package.index_url, "PIP_INDEX_URL": package.index_url}
    flag = "--allow-insecure-host" if package.installer == "uv" else "--trusted-host"
    return {
        **task,
        "installer": package.installer,
        "index_url": package.index_url,
        "trusted_hosts": package.trusted_hosts,
        "options": [
            *(["--only-binary=:all:"] if package.wheels_only else []),
            *(f"{flag}={host}" for host in package.trusted_hosts),
        ],
        "environment": environment,
        "certificates": certificates,
        "certificates_asked_for": asked_for,
    }


def host_certificates(package: PackageConfig) -> tuple[str, bool]:
    """Return the host's bundle of trusted certificates, and whether a setting asks for one."""
    named = package.ca_bundle or os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    usual = (
        ssl.get_default_verify_paths().cafile,
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
    )
    for path in filter(None, (named, *usual)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return Path(path).expanduser().read_text(encoding="utf-8"), bool(named)
    return "", False


# ════════ installer: from here to the closing line, shipped into helper containers with network access ════════

INSTALLER_FOLDER = "/opt/python-docker-mcp"  # in the derived image: the installer itself, and Matplotlib's font cache
PACKAGES = "/packages"  # where the volume with installed packages is mounted, in sandboxes read-only
CERTIFICATES = "/dev/shm/certificates.pem"  # in memory, so that the host's certificates never stay in an image
NOBODY = 65534
OWN_USERS = range(60706, 61184)  # ids that nobody else has: https://systemd.io/UIDS-GIDS
APK_REPOSITORIES = "/etc/apk/repositories"
LOCALES = (  # that the package locales brings as sources
    "ar_EG", "cs_CZ", "da_DK", "de_AT", "de_CH", "de_DE", "en_GB", "en_IN", "en_US", "es_ES", "es_MX", "fi_FI", "fr_CA",
    "fr_FR", "he_IL", "hi_IN", "hu_HU", "id_ID", "it_IT", "ja_JP", "ko_KR", "nl_NL", "nb_NO", "pl_PL", "pt_BR", "pt_PT",
    "ro_RO", "ru_RU", "sv_SE", "th_TH", "tr_TR", "uk_UA", "vi_VN", "zh_CN", "zh_TW",
)  # fmt: skip
UNUSED_AFTER = 30 * 86400  # seconds after which a set of packages is pruned if no installation asks for it


class InstallError(Exception):
    """The installer failed, or could not be fetched. The text is its own, where it printed any."""


def run_installer(settings: str) -> None:
    """Run the helper: build the image's content or install packages, and report the outcome in a frame `done`.

    The user's code never runs here. All other frames are progress. EOF on standard input means that the host has gone:
    the helper then exits at once, so that nothing half-made is committed or made available.
    """
    task = json.loads(settings)
    threading.Thread(target=exit_with_host, daemon=True).start()
    os.environ.update(task["environment"], HOME="/tmp", PIP_ROOT_USER_ACTION="ignore")
    os.environ.update(
        UV_LINK_MODE="copy" if task["task"] == "build" else "hardlink",
        UV_SYSTEM_PYTHON="1",
        UV_BREAK_SYSTEM_PACKAGES="1",
        PIP_BREAK_SYSTEM_PACKAGES="1",
    )
    cache = f"{PACKAGES}/.cache"
    os.environ.update(UV_CACHE_DIR=cache, PIP_CACHE_DIR=cache, UV_NO_PROGRESS="1")
    os.makedirs(cache, exist_ok=True)
    os.chmod(cache, 0o700)  # code that could open the installer's lock could hold it, and so every installation up
    work = build_content if task["task"] == "build" else add_packages
    if task["certificates"] and task["certificates_asked_for"]:
        trust(task["certificates"])
    try:
        try:
            outcome = work(task)
        except InstallError as error:
            if not task["certificates"] or "certificate" not in str(error).lower() or os.path.exists(CERTIFICATES):
                raise
            tell("progress", text="the index's certificate is not trusted: trying again with the host's certificates")
            trust(task["certificates"])
            outcome = work(task)
        tell("done", ok=True, **outcome)
    except (InstallError, OSError) as error:
        tell("done", ok=False, output=str(error)[-8000:])
    threading.Event().wait()  # the host commits or reads on, then closes standard input


def exit_with_host() -> None:
    """Exit at EOF on standard input."""
    while os.read(0, 4096):
        pass
    os._exit(0)


def tell(kind: str, **fields: Any) -> None:
    """Send a frame to the host."""
    os.write(1, json.dumps({"kind": kind, **fields}).encode() + b"\n")


def trust(certificates: str) -> None:
    """Make everything that runs from here on trust the host's certificates."""
    with open(CERTIFICATES, "w") as file:
        file.write(certificates)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"):
        os.environ[variable] = CERTIFICATES


def build_content(task: dict[str, Any]) -> dict[str, Any]:
    """Give the container the content of the derived image; the host then commits it."""
    if task["system"]:
        tell("progress", text=f"installing {', '.join(task['system'])}", step=2)
        add_system_packages(task)
    if task["requirements"]:
        command = installer_command(task)
        tell("progress", text=f"installing {', '.join(task['requirements'])}", step=2)
        run_tool([*command, "install", *task["options"], *task["requirements"]])
    tell("progress", text="compiling bytecode", step=3)
    folders = {path for path in sys.path if os.path.isdir(path)} | {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    }
    subprocess.call([sys.executable, "-m", "compileall", "-q", "-q", "-j", "0", "-x", "[/]tests?[/]", *sorted(folders)])
    if any(os.path.isdir(f"{folder}/matplotlib") for folder in folders):
        tell("progress", text="listing fonts for Matplotlib", step=4)
        environment = {**os.environ, "MPLCONFIGDIR": f"{INSTALLER_FOLDER}/matplotlib"}
        subprocess.call([sys.executable, "-c", "import matplotlib.font_manager"], env=environment)
    if os.path.exists("/etc/passwd"):  # what asks for its user's name gets one
        with open("/etc/passwd", "a") as users:
            users.writelines(f"sandbox:x:{user}:{NOBODY}:sandbox:/tmp:/bin/sh\n" for user in OWN_USERS)
    for entry in os.scandir("/tmp"):  # Podman would copy its contents into every sandbox
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    found = importlib.metadata.distributions(path=[*folders])
    return {"installed": sorted([item.metadata["Name"], item.version] for item in found)}


# Addresses in whose place a mirror is asked: it has the same folders.
DISTRIBUTORS = r"https?://((deb|security)\.debian\.org|(archive|security|ports)\.ubuntu\.com|dl-cdn\.alpinelinux\.org)"


def add_system_packages(task: dict[str, Any]) -> None:
    """Install packages of the image's distribution, from a mirror if one is named, which the image does not keep."""
    folder = tempfile.mkdtemp()
    os.makedirs(f"{folder}/parts")
    for place in glob.glob("/etc/apt/sources.list") + glob.glob("/etc/apt/sources.list.d/*") + [APK_REPOSITORIES]:
        with contextlib.suppress(OSError), open(place) as source:
            text = source.read()
            if task["system_mirror"]:
                text = re.sub(DISTRIBUTORS, task["system_mirror"].rstrip("/"), text)
            with open(f"{folder}/{'parts/' * ('.d/' in place)}{os.path.basename(place)}", "w") as copy:
                copy.write(text)
    if shutil.which("apt-get"):
        options = {
            "Dir::Etc::SourceList": f"{folder}/sources.list",
            "Dir::Etc::SourceParts": f"{folder}/parts",
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "Acquire::Retries": "2",
            **({"Acquire::https::CaInfo": CERTIFICATES} if os.path.exists(CERTIFICATES) else {}),
        }
        command = [
            "apt-get",
            "--yes",
            "--no-install-recommends",
            *(f"--option={key}={options[key]}" for key in options),
        ]
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        run_tool([*command, "update"])
        run_tool([*command, "install", *task["system"]])
        run_tool([*command, "clean"])
        shutil.rmtree("/var/lib/apt/lists", ignore_errors=True)
    elif shutil.which("apk"):
        run_tool(["apk", "add", "--no-cache", f"--repositories-file={folder}/repositories", *task["system"]])
    else:
        raise InstallError("error: the image has neither apt-get nor apk: name one that has as docker.image")
    if "locales" in task["system"] and shutil.which("localedef"):
        command = ["xargs", "-P4", "-I@", "localedef", "-i", "@", "-f", "UTF-8", "@.UTF-8"]  # each takes a second
        subprocess.run(command, input="\n".join(LOCALES).encode(), stderr=subprocess.DEVNULL, check=False)


def add_packages(task: dict[str, Any]) -> dict[str, Any]:
    """Make the set that adds one requirement to the shared set and the base, unless it exists.

    Returns its folder, what is new in it, and the version of the package that the image has, if any.
    A set is a folder whose contents never change once it has its name; `shared` is a link to the one for all sessions.
    """
    root = f"{PACKAGES}/{task['image']}"
    shared = f"{root}/shared"
    before = {**read_set(shared), **read_set(task["base"])}
    wanted = {**before, task["name"]: task["requirement"]}
    text = "\n".join(sorted(wanted.values()))
    folder = f"{root}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    had = read_manifest(task["base"] or shared)["installed"]
    if not os.path.exists(folder):
        os.makedirs(root, exist_ok=True)
        make_set(folder, wanted, installer_command(task), task)
    installed = read_manifest(folder)["installed"]
    os.utime(folder)
    if task["shared"]:
        link = f"{root}/.new-{os.urandom(8).hex()}"
        os.symlink(folder, link)
        os.replace(link, shared)
    prune_sets(root)
    try:
        present = importlib.metadata.version(task["name"])
    except importlib.metadata.PackageNotFoundError:
        present = None
    return {
        "folder": folder,
        "installed": [item for item in installed if item not in had],
        "present": present,
    }


def read_manifest(folder: str | None) -> dict[str, Any]:
    """Return what a set was asked to hold (name to requirement) and what it holds (pairs of name and version)."""
    try:
        with open(f"{folder}/.manifest.json") as file:
            manifest: dict[str, Any] = json.load(file)
            return manifest
    except OSError:
        return {"requirements": {}, "installed": []}


def read_set(folder: str | None) -> dict[str, str]:
    """Return the requirements of a set."""
    requirements: dict[str, str] = read_manifest(folder)["requirements"]
    return requirements


# Packages that open windows, and so need libraries of a desktop; the same for servers, which has the same versions.
WITHOUT_WINDOWS = {
    "opencv-python": "opencv-python-headless",
    "opencv-contrib-python": "opencv-contrib-python-headless",
}


def make_set(folder: str, wanted: dict[str, str], command: list[str], task: dict[str, Any]) -> None:
    """Install what the image lacks of `wanted` in a temporary folder, and rename that to `folder` once complete."""
    aside = f"{os.path.dirname(folder)}/.new-{os.urandom(8).hex()}"
    os.mkdir(aside, 0o700)  # until it is complete: the installer has a lock in it, too
    try:
        found = resolve(command, [*task["options"], *wanted.values()])
        missing = sorted({WITHOUT_WINDOWS.get(name, name): version for name, version in found}.items())
        if missing:
            pinned = [f"{name}=={version}" for name, version in missing]
            run_tool([*command, "install", *task["options"], "--no-deps", "--target", aside, *pinned])
            tell("progress", text="compiling bytecode")
            subprocess.call([sys.executable, "-m", "compileall", "-q", "-q", "-j", "0", aside])
        with open(f"{aside}/.manifest.json", "w") as file:
            json.dump({"requirements": wanted, "installed": missing}, file)
        os.chmod(aside, 0o755)
        try:
            os.rename(aside, folder)
        except OSError:  # another helper was quicker: its set is the same
            if not os.path.exists(folder):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def resolve(command: list[str], arguments: list[str]) -> list[list[str]]:
    """Return name and version of each package to install beyond those the image already has."""
    if "uv" in command[0]:
        output = run_tool([*command, "install", "--dry-run", *arguments])
        return [list(match) for match in re.findall(r"^ \+ (\S+)==(\S+)", output, re.MULTILINE)]
    report = f"/tmp/report-{os.getpid()}.json"
    run_tool([*command, "install", "--dry-run", "--report", report, *arguments])
    with open(report) as file:
        found = [item["metadata"] for item in json.load(file)["install"]]
    return [[item["name"], item["version"]] for item in found]


def prune_sets(root: str) -> None:
    """Remove the sets that no installation has asked for in a long time, and what dead helpers left half-made."""
    now = time.time()
    kept = os.path.realpath(f"{root}/shared")
    for place in [
        root,
        *(entry.path for entry in os.scandir(PACKAGES) if entry.is_dir() and not entry.name.startswith(".")),
    ]:
        for entry in os.scandir(place):
            age = now - entry.stat(follow_symlinks=False).st_mtime
            if entry.path != kept and entry.is_dir(follow_symlinks=False) and age > UNUSED_AFTER:
                shutil.rmtree(entry.path, ignore_errors=True)


def run_tool(command: list[str]) -> str:
    """Run the installer, sending each line as progress; return its output. Raises InstallError."""
    lines = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            tell("progress", text=line.strip()[:300])
    output = "".join(lines)
    if process.returncode:
        raise InstallError(output.strip() or f"{command[0]} ended with exit status {process.returncode}")
    return output


def installer_command(task: dict[str, Any]) -> list[str]:
    """Return the command line of uv or pip, fetching the tool unless the image or an earlier helper has it."""
    place = INSTALLER_FOLDER if task["task"] == "build" else f"{PACKAGES}/.tools"
    for folder in (INSTALLER_FOLDER, f"{PACKAGES}/.tools"):
        if task["installer"] == "uv" and os.path.exists(f"{folder}/uv"):
            return [f"{folder}/uv", "pip"]
        if task["installer"] == "pip" and os.path.exists(f"{folder}/pip.whl"):
            return [sys.executable, f"{folder}/pip.whl/pip"]
    if task["installer"] == "pip" and importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    tell("progress", text=f"fetching {task['installer']}")
    wheel = fetch_wheel(task["installer"], task)
    os.makedirs(place, exist_ok=True)
    aside = f"{place}/.new-{os.urandom(8).hex()}"
    if task["installer"] == "uv":
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
            wheel = archive.read(name)
    with open(aside, "wb") as file:
        file.write(wheel)
    os.chmod(aside, 0o755)
    os.rename(aside, f"{place}/{'uv' if task['installer'] == 'uv' else 'pip.whl'}")
    return installer_command(task)


def fetch_wheel(name: str, task: dict[str, Any]) -> bytes:
    """Fetch a project's newest wheel for this machine from the index (PEP 503), with the standard library only."""
    page = f"{(task['index_url'] or 'https://pypi.org/simple').rstrip('/')}/{name}/"
    links = re.findall(
        r'<a\s([^>]*?)href="([^"#]+)[^>]*>\s*([^<\s]+)\s*<', fetch(page, task).decode("utf-8", "replace")
    )
    libc, libc_version = platform.libc_ver()
    best: tuple[list[int], str] = ([], "")
    for before, link, file in links:
        match = re.fullmatch(rf"{name}-(\d+(?:\.\d+)*)-[\w.]+-none-([\w.]+)\.whl", file)
        if not match or "data-yanked" in before:
            continue
        for tag in match[2].split("."):
            flavour = re.fullmatch(rf"(many|musl)linux_\d+_(\d+)_{platform.machine()}", tag)
            fits = tag == "any" or (
                flavour is not None
                and (flavour[1] == "many") == (libc == "glibc")
                and (flavour[1] == "musl" or int(flavour[2]) <= int(libc_version.split(".")[1]))
            )
            version = [int(part) for part in match[1].split(".")]
            if fits and version > best[0]:
                best = (version, urllib.parse.urljoin(page, link))
    if not best[1]:
        raise InstallError(f"{page} offers no wheel of {name} for {platform.machine()} with {libc or 'this libc'}")
    return fetch(best[1], task)


def fetch(url: str, task: dict[str, Any]) -> bytes:
    """Return the content at a URL. Raises InstallError."""
    context = ssl.create_default_context()
    if urllib.parse.urlsplit(url).hostname in [host.partition(":")[0] for host in task["trusted_hosts"]]:
        context = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(url, timeout=60, context=context) as answer:
            content: bytes = answer.read()
            return content
    except OSError as error:
        raise InstallError(f"{url} can't be fetched: {getattr(error, 'reason', error)}") from error


# ════════ end of installer ════════


# ── shipping ──

GUEST_MODULES = (
    "__future__ ast atexit base64 builtins codecs contextlib contextvars ctypes errno fcntl functools gc glob "
    "importlib inspect io itertools json linecache math os re select signal socket stat struct sys threading time "
    "traceback types unicodedata warnings weakref"
).split()
INSTALLER_MODULES = (
    "contextlib glob hashlib importlib.metadata importlib.util io json os platform re shutil ssl subprocess sys "
    "sysconfig tempfile threading time urllib.parse urllib.request zipfile"
).split()


def _shipped(part: str, modules: Sequence[str]) -> str:
    """Return a marked part of this file as a standalone program: its imports, then the part at its original lines."""
    before, mark, rest = inspect.getsource(sys.modules[__name__]).partition(f"# ════════ {part}: ")
    source = (mark + rest).partition(f"# ════════ end of {part}")[0]
    imports = f"from __future__ import annotations; import {', '.join(modules)}; from collections import deque"
    return imports + "\n" * before.count("\n") + source


# Read at import, so that replacing this file under a running server can't mix old source with new.
GUEST_SOURCE = _shipped("guest", GUEST_MODULES)
INSTALLER_SOURCE = _shipped("installer", INSTALLER_MODULES)
PLUG_SOURCE = inspect.getsource(plug)
BOOTSTRAP = """
import os
def take(count):
    data = b""
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece: os._exit(0)
        data += piece
    return data
source, entry, settings = (take(int(take(8), 16)) for _ in range(3))
names = {"__name__": "sandbox_guest"}
exec(compile(source, "sandbox_runner.py", "exec"), names)
names[entry.decode()](settings.decode())
"""


BOOTSTRAP_ARGUMENTS = ("-I", "-c", BOOTSTRAP)


def shipment(source: str, entry: str, settings: Mapping[str, Any]) -> bytes:
    """Encode what BOOTSTRAP reads from standard input: the source, the function to call, and its argument."""
    parts = (source.encode(), entry.encode(), json.dumps(settings).encode())
    return b"".join(b"%08x%s" % (len(part), part) for part in parts)


STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
FROM_SANDBOX: pydantic.TypeAdapter[FromSandbox] = pydantic.TypeAdapter(
    Annotated[FromSandbox, pydantic.Field(discriminator="kind")], config=STRICT
)
FROM_INSTALLER: pydantic.TypeAdapter[FromInstaller] = pydantic.TypeAdapter(
    Annotated[FromInstaller, pydantic.Field(discriminator="kind")], config=STRICT
)


# ── configuration ──


# A size in Docker's format; in YAML it may also be a number of bytes.
Size = Annotated[str, pydantic.BeforeValidator(lambda given: str(given) if type(given) in (int, float) else given)]


@dataclass(frozen=True)
class DockerConfig:
    """Settings of the containers. Sizes are text in Docker's format: a number and b, k, m or g."""

    command: str | None = None
    image: str = "python:3.12.2-slim"
    working_dir: str = "/app"
    memory_limit: Size = "256m"
    cpu_limit: float = 0.5
    pids_limit: int = 256
    disk_limit: Size = "64m"
    output_limit: Size = "8m"
    timeout: float = 30.0
    max_timeout: float = 300.0
    network_disabled: bool = True
    network_allow: tuple[str, ...] = ()
    read_only: bool = True
    runtime: str | None = None
    gpus: str | None = None
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that no container could be created with."""
        for name, least in (("memory_limit", "32m"), ("disk_limit", "1m"), ("output_limit", "1k")):
            value = getattr(self, name)
            try:
                enough = size_in_bytes(value) >= size_in_bytes(least)
            except ValueError as error:
                raise ValueError(f"docker.{name}: {error}") from None
            if not enough:
                raise ValueError(f"docker.{name}: {value!r} is too little; the least is {least}")
        for name in ("cpu_limit", "pids_limit", "timeout", "max_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"docker.{name}: {getattr(self, name)!r} is not a number above zero")
        if self.timeout > self.max_timeout:
            most = f"docker.max_timeout ({self.max_timeout:g}) allows: raise that, too"
            raise ValueError(f"docker.timeout: {self.timeout:g} is more than {most}")
        if not re.fullmatch(r"(/[A-Za-z0-9_.-]+)+", self.working_dir) or ".." in self.working_dir:
            raise ValueError(f"docker.working_dir: {self.working_dir!r} is not an absolute path such as /app")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", self.image):
            raise ValueError(f"docker.image: {self.image!r} is not the name of an image such as python:3.12.2-slim")
        if self.runtime is not None and not re.fullmatch(r"/?[A-Za-z0-9][A-Za-z0-9._/-]*", self.runtime):
            raise ValueError(f"docker.runtime: {self.runtime!r} is not the name of a runtime such as runsc")
        if self.gpus is not None and not re.fullmatch(r"all|device=[\w:-]+(,[\w:-]+)*", self.gpus):
            raise ValueError(f"docker.gpus: {self.gpus!r} is neither all nor a list such as device=0,1")
        for mount in self.mounts:
            split_mount(mount, self.working_dir)
        for host in self.network_allow:
            try:
                HostRule.parse(host)
            except ValueError as error:
                raise ValueError(f"docker.network_allow: {error}") from None
        if self.network_allow and not self.network_disabled:
            raise ValueError("docker.network_allow: it has no meaning while docker.network_disabled is false")


@dataclass(frozen=True)
class SessionConfig:
    """Limits on sessions and their calls."""

    idle_timeout: float = 1800.0
    max: int = 64
    evict: bool = False
    max_timeout: float = 1800.0
    answer_within: float = 50.0
    restore: bool = True

    def __post_init__(self) -> None:
        """Refuse limits that are not above zero."""
        if self.max < 1:
            raise ValueError(f"session.max: {self.max!r} is not a number above zero")
        for name in ("idle_timeout", "max_timeout", "answer_within"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"session.{name}: {getattr(self, name)!r} is not a number of seconds above zero")


@dataclass(frozen=True)
class PackageConfig:
    """The installer, its sources, and the packages it preinstalls."""

    installer: Literal["uv", "pip"] = "uv"
    index_url: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    preinstalled: tuple[str, ...] = (
        *("numpy", "pandas", "scipy", "matplotlib", "scikit-learn", "sympy"),
        *("seaborn", "openpyxl", "tabulate", "jinja2", "tqdm"),
    )
    system: tuple[str, ...] = ()
    system_mirror: str | None = None
    wheels_only: bool = True
    ca_bundle: str | None = None
    network: str | None = None
    volume: str = "python-docker-mcp-packages"

    def __post_init__(self) -> None:
        """Refuse values that no installer could use."""
        for requirement in self.preinstalled:
            try:
                parse_requirement(requirement)
            except RequestError as error:
                raise ValueError(f"package.preinstalled: {str(error).rstrip('.')}") from None
        for name in self.system:
            if not re.fullmatch(r"[a-z0-9][a-z0-9+._-]*(?<!-)(=[\w.+~:-]+)?", name):
                raise ValueError(f"package.system: {name!r} is not the name of a Debian, Ubuntu or Alpine package")
        for name, value in (("index_url", self.index_url), ("system_mirror", self.system_mirror)):
            if value is not None and not re.fullmatch(r"https?://[^\s]+", value):
                raise ValueError(f"package.{name}: {value!r} is not an address (http or https)")
        for host in self.trusted_hosts:
            if not re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?", host):
                raise ValueError(f"package.trusted_hosts: {host!r} is not a host's name, with or without a port")
        for name, value in (("network", self.network), ("volume", self.volume)):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
                raise ValueError(f"package.{name}: {value!r} is not the name of a {name}")


@dataclass(frozen=True)
class FilesConfig:
    """Folders of the host that files are copied to and from."""

    output: str | None = None
    inputs: tuple[str, ...] = ()
    limit: Size = "100m"
    notebook: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what can be no folder's path, without a look at the file system."""
        try:
            size_in_bytes(self.limit)
        except ValueError as error:
            raise ValueError(f"files.limit: {error}") from None
        if (self.output or self.inputs) and sys.platform == "win32":
            raise ValueError("files.output: on Windows no files can be copied, use docker.mounts instead")
        for setting, place in self.named():
            if not Path(place).expanduser().is_absolute():
                raise ValueError(f"{setting}: {place!r} is not an absolute path, such as ~/Documents")

    def named(self) -> list[tuple[str, str]]:
        """Return each folder that a setting names: the setting, and the folder as written."""
        output = [("files.output", self.output)] if self.output else []
        return [*output, *(("files.inputs", one) for one in self.inputs)]

    def for_user(self, user: str) -> FilesConfig:
        """Return the settings with a user's name for {user}; the user's folders are made if they are not there.

        Raises OSError if they can't be.
        """
        inputs = tuple(place.replace("{user}", user) for place in self.inputs)
        own = dataclasses.replace(self, output=self.output and self.output.replace("{user}", user), inputs=inputs)
        for (_, place), (_, general) in zip(own.named(), self.named(), strict=True):
            if place != general:
                Path(place).expanduser().mkdir(parents=True, exist_ok=True)
        return own

    def folders(self) -> list[Path]:
        """Return the folders whose files a call may be given, without links in their paths."""
        return [Path(place).expanduser().resolve() for place in self.inputs]


@dataclass(frozen=True)
class HttpConfig:
    """Settings of a server for a team: its names, its users, and the limits for each of them."""

    public_url: str | None = None
    hosts: tuple[str, ...] = ()
    tokens: str = "~/.python-docker-mcp/tokens"
    sessions_per_user: int = 4
    calls_per_user: int = 2
    installs: bool = False

    def __post_init__(self) -> None:
        """Refuse an address that is none, and limits below one."""
        parts = urllib.parse.urlsplit(self.public_url or "http://host")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"http.public_url: {self.public_url!r} is not an address like https://python.example.com")
        for name in ("sessions_per_user", "calls_per_user"):
            if getattr(self, name) < 1:
                raise ValueError(f"http.{name}: {getattr(self, name)!r} is not a number above zero")


@dataclass(frozen=True)
class SecretConfig:
    """A credential that this server adds to requests of the code's to one host, without the code having it."""

    host: str
    header: str | None = None
    query: str | None = None
    command: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    users: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can't be used; the header's text is not quoted, as it may be a secret."""
        try:
            rule = HostRule.parse(self.host)
            if rule.subdomains or not rule.name or is_address(rule.name):
                raise ValueError
        except ValueError:
            raise ValueError(f"host: {self.host!r} is not the exact name of a host such as api.example.com") from None
        setting, form = ("query", "appid=${API_KEY}") if self.query else ("header", "Authorization: Bearer ${API_KEY}")
        if bool(self.header) is bool(self.query):
            raise ValueError(f"{setting}: there has to be either a header, such as {form!r}, or a query")
        name, value = self.place()
        names = VARIABLE.findall(value)
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or not value.isascii() or not value.isprintable() or not value:
            raise ValueError(f"{setting}: it is not like {form!r}")
        if self.header and name.encode() in NEVER_SECRET:
            raise ValueError(f"header: {name} is no header for a credential")
        if not names or (self.command and len(set(names)) > 1):
            what = "what the command prints" if self.command else "the value"
            raise ValueError(f"{setting}: it does not say where {what} goes: write ${{NAME}} there, as in {form!r}")
        for method in self.methods:
            if not re.fullmatch("[A-Z]+", method) or method in ("TRACE", "CONNECT"):
                raise ValueError(f"methods: {method!r} is not a method such as GET")
        for path in self.paths:
            if not re.fullmatch(r"/[^?#%\s]*", path) or UNCLEAR.search(path):
                raise ValueError(f"paths: {path!r} is not a path such as /v1/*")
        for key, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", key) or not value.isprintable():
                raise ValueError(f"env: {key!r} can't be a variable with that text")
        for user in self.users:
            if not re.fullmatch(USER_NAME, user):
                raise ValueError(f"users: {user!r} is not a user's name")

    def place(self) -> tuple[str, str]:
        """Return the name of the header, in small letters, or of the query's parameter; and what goes there."""
        if self.query:
            name, _, value = self.query.partition("=")
            return name, value
        name, _, value = (self.header or "").partition(":")
        return name.strip().lower(), value.strip()

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that code finds, so that client libraries start: by default, those of the header or query."""
        names = VARIABLE.findall(self.place()[1])
        return dict.fromkeys(names, "added-by-the-host") if self.env is None else self.env

    def is_for(self, user: str) -> bool:
        """Whether a user's code may use it; "" where there is one user."""
        return not self.users or user in self.users


@dataclass(frozen=True)
class PoolConfig:
    """Sandboxes kept ready, so that a call finds one running, with the usual modules imported."""

    enabled: bool = True
    size: int = 32
    max_age: float = 300.0
    max_concurrent_creations: int = 5
    warm: int = 2
    preload: tuple[str, ...] = ("numpy", "pandas", "matplotlib.pyplot")
    reuse: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no pool could work with."""
        for name in ("size", "max_age", "max_concurrent_creations"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"pool.{name}: {getattr(self, name)!r} is not a number above zero")
        if self.warm < 0:
            raise ValueError(f"pool.warm: {self.warm!r} is below zero")
        for module in self.preload:
            if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
                raise ValueError(f"pool.preload: {module!r} is not the name of a module")


@dataclass(frozen=True)
class Config:
    """All settings; their defaults are defined only here. `config.yaml` explains each one."""

    docker: DockerConfig = field(default_factory=DockerConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    package: PackageConfig = field(default_factory=PackageConfig)
    files: FilesConfig = field(default_factory=FilesConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    secrets: Mapping[str, SecretConfig] = field(default_factory=dict, hash=False)
    allowed_modules: tuple[str, ...] = ()
    blocked_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that contradict one another."""
        if self.docker.timeout > self.session.max_timeout:
            most = f"session.max_timeout ({self.session.max_timeout:g}) allows: raise that, too"
            raise ValueError(f"docker.timeout: {self.docker.timeout:g} is more than {most}")
        if self.secrets and not self.docker.network_disabled:
            raise ValueError("secrets: they can't be used while docker.network_disabled is false")
        for name in self.secrets:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
                raise ValueError(f"secrets: {name!r} is not a name such as openai")

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Hosts that code may reach by name, though it has no network."""
        return tuple(dict.fromkeys((*self.docker.network_allow, *(secret.host for secret in self.secrets.values()))))

    def for_user(self, user: str) -> Config:
        """Return the settings for one of several users. Raises OSError if the user's folders can't be made."""
        own = {name: secret for name, secret in self.secrets.items() if secret.is_for(user)}
        return dataclasses.replace(self, files=self.files.for_user(user), secrets=own)


CONFIG_PATH = Path("~/.python-docker-mcp/config.yaml")
ENVIRONMENT = {  # variable: the setting it overrides
    "PYTHON_DOCKER_MCP_POOL_ENABLED": "pool.enabled",
    "PYTHON_DOCKER_MCP_POOL_SIZE": "pool.size",
    "PYTHON_DOCKER_MCP_POOL_MAX_AGE": "pool.max_age",
    "PYTHON_DOCKER_MCP_MAX_CONCURRENT_CREATIONS": "pool.max_concurrent_creations",
    "PYTHON_DOCKER_MCP_MEMORY_LIMIT": "docker.memory_limit",
    "PYTHON_DOCKER_MCP_CPU_LIMIT": "docker.cpu_limit",
    "PYTHON_DOCKER_MCP_FILES_OUTPUT": "files.output",
    "PYTHON_DOCKER_MCP_FILES_INPUTS": "files.inputs",
}


def load_config(
    path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ, *, look: bool = True
) -> Config:
    """Load the configuration: defaults, overridden by the file, then by the environment.

    The file is `path`, else PYTHON_DOCKER_MCP_CONFIG, else ~/.python-docker-mcp/config.yaml (which may be missing).
    Unless it is to `look`, it leaves it to the Runner to see whether the folders that are named can be used: on a drive
    that has gone, that may take very long.

    Raises:
        ConfigError: the file can't be read or has an unknown key, or a value is invalid.
    """
    named = path or environ.get("PYTHON_DOCKER_MCP_CONFIG")
    file = config_file(path, environ)
    settings: Any = {}
    if named or file.exists():
        import yaml

        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"The configuration {file} can't be read: {error.strerror}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            place = getattr(error, "problem_mark", None)
            where = f" (line {place.line + 1})" if place else ""
            raise ConfigError(
                f"The configuration {file} is not YAML{where}: see config.yaml for an example."
            ) from error
        settings = {} if settings is None else settings
    origin = {key: variable for variable, key in ENVIRONMENT.items() if environ.get(variable)}
    if isinstance(settings, dict):
        for key, variable in origin.items():
            section, _, name = key.partition(".")
            value: Any = environ[variable]
            if key == "files.inputs":
                value = value.split(os.pathsep)
            if isinstance(settings.setdefault(section, {}) or {}, dict):
                settings[section] = {**(settings[section] or {}), name: value}
    config = _validated(settings, file, origin) if settings else Config()
    if look:
        require_paths(config, file, environ)
    return config


def require_paths(config: Config, file: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError if a file or folder that the configuration in `file` names can't be used, or should not be."""
    try:
        for mount in config.docker.mounts:
            mount_argument(mount, config.docker.working_dir)
        for setting, place in config.files.named():
            if "{user}" in place:
                continue  # looked at once a user is there
            folder = Path(place).expanduser().resolve()
            if not folder.is_dir() and (setting == "files.inputs" or folder.exists()):
                raise ValueError(f"{setting}: {place!r} is not a folder on this host")
            if reason := why_not_mounted(folder):
                raise ValueError(f"{setting}: {place!r} is refused, as {reason}: name a folder that holds only data")
        bundle = config.package.ca_bundle
        if bundle is not None and not Path(bundle).expanduser().is_file():
            raise ValueError(f"package.ca_bundle: {bundle!r} is not a file on this host")
    except ValueError as error:
        key, _, reason = str(error).partition(": ")
        variable = next((name for name, setting in ENVIRONMENT.items() if setting == key and environ.get(name)), None)
        raise ConfigError(f"{variable or (f'{key} in {file}' if file.exists() else key)}: {reason}.") from None
    refuse_to_share(file, config)


def config_file(path: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the configuration file, which may not exist."""
    return Path(path or environ.get("PYTHON_DOCKER_MCP_CONFIG") or CONFIG_PATH).expanduser()


def _validated(settings: Any, file: Path, origin: Mapping[str, str]) -> Config:
    """Make a Config from plain data; pydantic checks types, the classes check values. Raises ConfigError."""
    parts = dataclasses.fields(Config)
    sections: dict[str, Any] = {
        part.name: part.default_factory for part in parts if dataclasses.is_dataclass(part.default_factory)
    }
    for cls in (Config, SecretConfig, *sections.values()):
        setattr(cls, "__pydantic_config__", pydantic.ConfigDict(extra="forbid"))  # noqa: B010  # mypy knows no such attribute
    settings = (
        {key: value for key, value in settings.items() if value is not None} if isinstance(settings, dict) else settings
    )
    try:
        return pydantic.TypeAdapter(Config).validate_python(settings)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        where = origin.get(key) or (f"{key} in {file}" if key else file)
        if problem["type"] == "unexpected_keyword_argument":
            known = [part.name for part in parts]
            ours = (
                {".".join(map(str, problem["loc"][:2])): SecretConfig} if problem["loc"][0] == "secrets" else sections
            )
            for name, section in ours.items():
                known += [f"{name}.{item.name}" for item in dataclasses.fields(section)]
            alike = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {alike[0]}?" if alike else f"the settings are {', '.join(known)}."
            raise ConfigError(f"There is no setting {key} ({file}): {advice}") from None
        if problem["type"] == "value_error":
            key, _, reason = str(problem["ctx"]["error"]).partition(": ")
            if problem["loc"][:1] == ("secrets",):
                key = f"secrets.{problem['loc'][1]}.{key}"
            raise ConfigError(f"{origin.get(key) or f'{key} in {file}'}: {reason}.") from None
        shown = textwrap.shorten(repr(problem["input"]), 80)
        if problem["loc"][:1] == ("secrets",):
            shown = "what is there"  # not quoted: it may be a secret
        wanted = WANTED.get(problem["type"]) or f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
        raise ConfigError(f"{where}: {shown} is not accepted: {wanted}.") from None


WANTED = {  # advice on a value of the wrong type, by pydantic's error type
    "dataclass_type": "it must be keys with values, as in config.yaml",
    "tuple_type": "it must be a list, such as [one, two]",
    "bool_type": "it must be true or false",
    "bool_parsing": "it must be true or false",
    "int_type": "it must be a whole number",
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "float_parsing": "it must be a number",
    "string_type": "it must be text, in quotes if it looks like something else",
}


def parse_requirement(text: str) -> tuple[str, str]:
    """Return a distribution's normalised name (PEP 503) and the whole requirement, without spaces (PEP 508).

    A name, extras and version specifiers are accepted: nothing an installer could take for an option, path or address.

    Raises:
        RequestError: the text is anything else.
    """
    name = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    version = r"(?:===?|~=|!=|<=|>=|<|>) *[A-Za-z0-9][A-Za-z0-9.*+!_-]*"
    short = text[:201]  # matching time grows faster than the length of the text
    match = re.fullmatch(rf" *({name}) *(\[ *{name} *(?:, *{name} *)*\])? *({version}(?: *, *{version})*)? *", short)
    if not match or len(text) > 200:
        several = re.fullmatch(rf"{name}(?:[, ]+{name})+", short.strip())
        advice = (
            "ask for one package a call" if several else "give a name such as requests, pandas[excel] or pandas>=2,<3"
        )
        raise RequestError(
            f"{textwrap.shorten(repr(text), 80)} is not a package's name with extras and versions: {advice}."
        )
    return plain_name(match[1]), match[0].replace(" ", "")


@functools.cache
def size_in_bytes(size: str) -> int:
    """Convert a size such as `256m` to bytes. Raises ValueError for other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmg]?)(?:i?b)?", size.strip().lower())
    if not match:
        raise ValueError(f"{size!r} is not a size such as 256m or 1g")
    return int(float(match[1]) * {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[match[2]])


def mount_argument(mount: str, working_dir: str = DockerConfig.working_dir) -> str:
    """Return the engine's --mount argument for `HOST_PATH:CONTAINER_PATH`, read-only unless `:rw` follows.

    Raises ValueError for other text, or a mount that would undo the sandbox (see the two functions `…_paths_to_keep`).
    """
    place, target, mode = split_mount(mount, working_dir)
    source = Path(place).expanduser().resolve()  # as the engine follows links
    if not source.exists():
        raise ValueError(f"docker.mounts: {str(source)!r} does not exist on this host")
    if "," in str(source):
        raise ValueError(f"docker.mounts: {str(source)!r} has a comma, which the engine's command line can't take")
    if reason := why_not_mounted(source):
        raise ValueError(f"docker.mounts: {place!r} is refused, as {reason}: mount a folder that holds only data")
    return f"type=bind,source={source},target={target}" + ("" if mode == ":rw" else ",ro")


def split_mount(mount: str, working_dir: str = DockerConfig.working_dir) -> tuple[str, str, str | None]:
    """Split a mount into the host path as written, the container path and the mode.

    Raises ValueError for other text, or a container path that would hide what the sandbox needs.
    """
    match = re.fullmatch(r"(.+?):(/[^:,]*)(:ro|:rw)?", mount)
    if not match:
        raise ValueError(
            f"docker.mounts: {mount!r} is not HOST_PATH:CONTAINER_PATH, with :rw after it to let code write"
        )
    target = "/" + "/".join(part for part in match[2].split("/") if part not in ("", "."))
    for taken, all_of_it in container_paths_to_keep(working_dir):
        if ".." in target.split("/") or is_within(taken, target) or (all_of_it and is_within(target, taken)):
            raise ValueError(
                f"docker.mounts: {target!r} is refused, as it would hide {taken} of the container: "
                f"name a place such as {working_dir}/data or /data"
            )
    return match[1], target, match[3]


def refuse_to_share(file: Path, config: Config) -> None:
    """Raise ConfigError if the user's code could get at the configuration, which may hold passwords."""
    mounts = [("docker.mounts", split_mount(mount, config.docker.working_dir)[0]) for mount in config.docker.mounts]
    for setting, place in (*mounts, *config.files.named()):
        if is_within(file.resolve(), Path(place).expanduser().resolve()):
            raise ConfigError(f"{setting}: {place!r} is refused, as the configuration {file} is in it.")


def container_paths_to_keep(working_dir: str) -> Iterator[tuple[str, bool]]:
    """Yield each container path that no mount may hide, and whether mounts below it are refused, too."""
    for path in ("/proc", "/sys", "/dev", PACKAGES):
        yield path, True
    for path in (working_dir, "/tmp", INSTALLER_FOLDER, "/etc", "/bin", "/lib", "/lib64"):
        yield path, False
    for prefix in ("/usr", "/usr/local"):  # Python itself
        yield f"{prefix}/bin", False
        yield f"{prefix}/lib", False


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder, or below it."""
    return Path(path).is_relative_to(folder)


def why_not_mounted(source: Path) -> str | None:
    """Return why the user's code may not see this host path, or None if it may. `source` must be resolved."""
    for place, what, all_of_it in host_paths_to_keep():
        place = place.expanduser().resolve()
        if is_within(place, source):
            return f"it is {what}" if place == source else f"{what} is in it ({place})"
        if all_of_it and is_within(source, place):
            return f"it is part of {what} ({place})"
    entries = [source]
    with contextlib.suppress(OSError), os.scandir(source) as found:  # it is not a folder, or this user can't list it
        entries += [Path(entry.path) for entry in found if not (entry.is_dir() or entry.is_file(follow_symlinks=False))]
    for entry in entries:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(entry.stat().st_mode):
                return f"{entry} is a socket that a program on this host listens on"
    return None


def host_paths_to_keep() -> Iterator[tuple[Path, str, bool]]:
    """Yield each host path that must stay hidden, its description, and whether paths below it must, too."""
    yield Path("/"), "the host's root", False
    yield Path.home(), "the home directory", False
    yield Path("/etc"), "the host's configuration", False
    for system in ("/proc", "/sys", "/dev"):
        yield Path(system), "the host's kernel interface", True
    yield CONFIG_PATH.parent, "this server's own configuration", True
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    for root in (Path("/var/lib"), data):
        for engine in ("docker", "containers", "containerd"):
            yield root / engine, "the engine's own data", True
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for folder in ("/run", "/var/run", *([runtime] if runtime else []), "~/.docker/run", "~/.docker/desktop"):
        yield Path(folder), "the folder of this host's sockets", False
    for variable in ("DOCKER_HOST", "CONTAINER_HOST"):
        scheme, _, path = os.environ.get(variable, "").partition("://")
        if scheme == "unix" and path:
            yield Path(path), f"the engine's socket ({variable})", False


# ── command line ──

EXAMPLES = """\
examples:
  {program} script.py one two             run a script, with arguments
  {program} -c 'print(6 * 7)'             run a piece of code
  … | {program} -                         run what comes on standard input
  {program} --in sales.csv --out . r.py   give it a file, and get those that it writes
  {program} --mount data:/data report.py  let it read a folder, and save its plots as figure-N.png
  {program} --session work -c 'x = 1'
  {program} --session work -c 'x + 1'     the session kept x

The exit status is the code's own; 124 after a time-out, 137 out of memory, 130 interrupted, 128 + N killed by signal N,
125 if there is nothing to run it in, 2 if a setting or an argument is wrong."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script in a sandbox; end the process with the exit status that `--help` describes."""
    run_to_exit("sandbox_runner", functools.partial(_run_script, _parser().parse_args(argv)))


def run_to_exit(program: str, command: Callable[[], Awaitable[int]]) -> NoReturn:
    """Run a command and end the process with its exit status, or with the one for the error or signal that ended it."""
    clear_status = "\r\x1b[K" if sys.stderr.isatty() else ""
    set_up_logging(f"{clear_status}%(message)s", logging.INFO)
    if not log.isEnabledFor(logging.DEBUG):
        traffic_log.setLevel(logging.WARNING)  # a connection is news to whoever runs a server, not to whoever runs code
    try:
        try:
            code = anyio.run(command)
        except SignalError as error:
            code = 128 + int(error.args[0])
        except SandboxError as error:
            print(f"{clear_status}{program}: {error}", file=sys.stderr)
            code = 2 if isinstance(error, (ConfigError, RequestError)) else 125
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has gone; the exit must not write again
        code = 141
    except KeyboardInterrupt:
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: one that comes now must not change the exit status
    sys.exit(code)


class SignalError(Exception):
    """A signal has ended a command. Its argument is the signal's number."""


@asynccontextmanager
async def on_signals(heed: Callable[[int], None]) -> AsyncIterator[None]:
    """Call `heed` with the number of each SIGINT and SIGTERM that comes in the block, in place of what Python does."""

    async def watch() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                heed(number)

    async with open_tasks() as tasks:
        tasks.start_soon(watch)
        yield


@asynccontextmanager
async def runner_until_signal(config: Config, on_status: OnStatus | None = None) -> AsyncIterator[Runner]:
    """Provide a Runner; on SIGINT or SIGTERM cancel the block, and raise SignalError once the Runner has left."""
    received: list[int] = []
    scope = anyio.CancelScope()

    def heed(number: int) -> None:
        received.append(number)
        scope.cancel()

    async with on_signals(heed), open_runner(config, on_status=on_status) as runner:
        with scope:
            yield runner
    if received:
        raise SignalError(received[-1])


def set_up_logging(form: str, level: int) -> None:
    """Log to standard error, a line for each event; with PYTHON_DOCKER_MCP_DEBUG, everything."""
    debug = os.environ.get("PYTHON_DOCKER_MCP_DEBUG", "").lower() not in ("", "0", "false", "no")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(f"%(asctime)s.%(msecs)03d {form}" if debug else form, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # It warns of a child whose end subprocess.Popen noticed before asyncio did, which happens when one is killed.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    log.setLevel(logging.DEBUG if debug else level)


class OneLine(logging.Formatter):
    """Format each event as one line, without the passwords in addresses."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return without_passwords(super().formatMessage(record).replace("\n", "\\n"))


def _program() -> str:
    """Return the command that this program was started as."""
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name


def _parser() -> argparse.ArgumentParser:
    program = _program()
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [options] (FILE | - | -c CODE) [ARGUMENT …]",
        description="Run Python in a locked-down container: no network, read-only, limited memory, CPU and time.",
        epilog=EXAMPLES.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_run_arguments(parser)
    return parser


CONFIG_HELP = "settings; by default $PYTHON_DOCKER_MCP_CONFIG, else ~/.python-docker-mcp/config.yaml"


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is run")
    what.add_argument("-c", dest="code", metavar="CODE", help="run this code instead of a file")
    what.add_argument("file", nargs="?", metavar="FILE", help="a script, or - for standard input")
    what.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="for the script")
    where = parser.add_argument_group("in which sandbox")
    where.add_argument("--session", metavar="NAME", help="keep variables, imports and files under this name")
    where.add_argument(
        "--state", metavar="FILE", help="JSON object of variables to start with; written anew at the end"
    )
    where.add_argument("--timeout", type=float, metavar="SECONDS", help="how long the code may take")
    where.add_argument("--image", help="the image to use; `host` for one made from this host's Python")
    where.add_argument("--gpus", metavar="WHICH", help="GPUs that it may use: all, or device=0")
    where.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="HOST:CONTAINER[:rw]",
        help="make a folder or file visible inside",
    )
    where.add_argument(
        "--in",
        action="append",
        default=[],
        metavar="FILE",
        dest="inputs",
        help="copy a file into the working directory",
    )
    where.add_argument("--out", metavar="DIR", help="copy the files that the code writes there into this folder")
    where.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--images", metavar="DIR", help="where figures and other pictures are saved; by default the current folder"
    )
    shown.add_argument("--json", action="store_true", help="print one JSON object that holds everything, and no more")
    shown.add_argument("--version", action="version", version=__version__)


async def _run_script(options: argparse.Namespace) -> int:
    """Run code; return the exit status."""
    arguments = options.arguments
    if options.code is not None:
        code, name = options.code, "<string>"
        arguments = [*([options.file] if options.file else []), *arguments]
    elif options.file is None:
        _parser().error("a FILE, - for standard input, or -c CODE is needed")
    else:
        code, name = _read_source(options.file)
    config = _run_config(options)
    state = _read_state(Path(options.state)) if options.state else None
    screen = Screen(Path(options.images or "."))
    interrupt = anyio.Event()
    received: list[int] = []
    scope = anyio.CancelScope()
    result = None

    def heed(number: int) -> None:
        """Interrupt the code on the first Ctrl-C, so that it shows where it was; leave on the next signal."""
        received.append(number)
        if number == signal.SIGINT and runner.running and not interrupt.is_set():
            interrupt.set()
        else:
            scope.cancel()

    async with on_signals(heed), open_runner(config, on_status=show_status, notebooks=True) as runner:
        with scope:
            result = await runner.execute(
                code,
                session=options.session,
                state=state,
                timeout=options.timeout,
                on_output=None if options.json else screen.print,
                keep_output=options.json,
                interrupt=interrupt,
                filename=name,
                arguments=arguments,
                files=options.inputs,
                output=options.out,
            )
    if result is None:
        return 128 + received[-1]
    if options.json:
        for item in result.output if options.images else ():
            if isinstance(item, Rich) and picture(item.forms):
                await screen.print(item)
        engine, image = runner.launcher.engine, runner.launcher.image
        assert engine is not None
        assert image is not None
        about = {"engine": f"{engine.kind} {engine.version}", "image": dataclasses.asdict(image)}
        print(json.dumps({**result.as_dict(), **about}, indent=2))
    else:
        _print_end(result, value=not screen.has_shown_value)
    if options.state and result.variables is not None:
        _write_state(Path(options.state), result)
    return exit_status(result)


def _run_config(options: argparse.Namespace) -> Config:
    """Return the configuration, with the options that override it."""
    config = load_config(options.config)
    docker = config.docker
    try:
        for mount in options.mount:
            mount_argument(mount, docker.working_dir)
        docker = dataclasses.replace(
            docker,
            image=options.image or docker.image,
            gpus=options.gpus or docker.gpus,
            mounts=(*docker.mounts, *options.mount),
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    setting, most = ("session", config.session.max_timeout) if options.session else ("docker", docker.max_timeout)
    if options.timeout is not None and options.timeout > most:
        raise ConfigError(
            f"--timeout: {options.timeout:g} is more than {setting}.max_timeout ({most:g}): raise that, too."
        )
    config = dataclasses.replace(config, docker=docker)
    refuse_to_share(config_file(options.config), config)
    require_secrets(config)
    return config


# commands of the other program, that one may look for here
OPERATOR_COMMANDS = ("serve", "token", "doctor", "build", "install", "ps", "export", "rm")


def _read_source(file: str) -> tuple[str, str]:
    """Return the source in a file, or on standard input, and its name in tracebacks."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return importlib.util.decode_source(data), "<stdin>" if file == "-" else Path(file).name
    except OSError as error:
        meant = f" Did you mean `python-docker-mcp {file}`?" if file in OPERATOR_COMMANDS else ""
        raise RequestError(f"{file} can't be read: {error.strerror}.{meant}") from error
    except (SyntaxError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} is not Python source: {error}.") from error


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file} can't be read as JSON: {error}.") from error
    if not isinstance(state, dict):
        raise RequestError(f"{file} holds no JSON object: write {{}} into it to start with no variables.")
    return state


def _write_state(file: Path, result: Result) -> None:
    for name, reason in result.variables_left_out.items():
        _complain(f"the variable {name} is not in {file}: {reason}")
    written = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        written.write_text(json.dumps(result.variables, indent=2) + "\n", encoding="utf-8")
        written.replace(file)
    except OSError as error:
        raise RequestError(f"{file} can't be written: {error.strerror}.") from error


class Screen:
    """Print output as it comes: text to the standard streams, pictures into files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_shown_value = False  # as a picture, so that its repr would tell nothing more
        self._pictures = 0

    async def print(self, item: Text | Rich | Omitted) -> None:
        """Print a piece of output; in a thread, as a pipe without a reader must not block the event loop."""
        await anyio.to_thread.run_sync(self._print_now, item)

    def _print_now(self, item: Text | Rich | Omitted) -> None:
        if isinstance(item, Rich) and (found := picture(item.forms)):
            self._pictures += 1
            if self._pictures <= MAX_PICTURES:
                self._print_picture(*found)
            elif self._pictures == MAX_PICTURES + 1:
                _complain(f"more than {MAX_PICTURES} pictures: the others are not saved")
            self.has_shown_value |= item.is_value
            return
        stream = sys.stderr if isinstance(item, Text) and item.stream == "stderr" else sys.stdout
        stream.write(plain_text(item))
        stream.flush()

    def _print_picture(self, data: bytes, ending: str) -> None:
        try:
            _complain(f"saved {_save_picture(self.folder, data, ending)}")
        except OSError as error:
            _complain(f"a picture can't be saved in {self.folder}: {error.strerror}; --images DIR names another folder")


MAX_PICTURES = 100  # of one run: code that nobody trusts must not fill the host's disk


def picture(forms: Mapping[str, str]) -> tuple[bytes, str] | None:
    """Return the picture among a value's forms, and its file name extension; None if there is none."""
    for mime, ending in (("image/png", "png"), ("image/jpeg", "jpg"), ("image/gif", "gif"), ("image/webp", "webp")):
        if mime in forms:
            with contextlib.suppress(ValueError):
                return base64.b64decode(forms[mime], validate=True), ending
    return (forms["image/svg+xml"].encode("utf-8", "replace"), "svg") if "image/svg+xml" in forms else None


def _save_picture(folder: Path, data: bytes, ending: str) -> Path:
    """Write a picture under the first free number, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        if not any((folder / f"figure-{number}.{other}").exists() for other in ("png", "jpg", "gif", "webp", "svg")):
            with contextlib.suppress(FileExistsError), open(folder / f"figure-{number}.{ending}", "xb") as file:
                file.write(data)
                return Path(file.name)
    raise AssertionError("there are always more numbers")


def plain_text(item: Text | Rich | Omitted) -> str:
    """Return a piece of output as text."""
    if isinstance(item, Text):
        return item.text
    if isinstance(item, Omitted):
        return f"\n[… {item.bytes} bytes left out …]\n"
    return "" if item.is_value else f"{item.forms.get('text/plain', '')}\n"


def _print_end(result: Result, value: bool) -> None:
    """Print what follows the output: the value, the traceback, and what happened to the code and its session."""
    if result.value is not None and value:
        print(result.value)
    sys.stdout.flush()
    if result.exception and result.exception.type != "SystemExit":
        print(result.exception.traceback, end="", file=sys.stderr)
    notes = [f"saved {file.saved}" for file in result.files if file.saved]
    notes += [f"not saved: {path} ({reason})" for path, reason in result.files_left_out.items()]
    notes += result.refused
    notes.append(result.message or "")
    if result.exception and result.exception.missing and result.exception.type != "TypeError":
        notes.append(f"`python-docker-mcp install PACKAGE` installs what {result.exception.missing} is part of")
    if result.unread:
        print("".join(map(plain_text, result.unread.output)), end="", file=sys.stderr)
        notes.append(f"(that was the end of the session's previous call, left running: {result.unread.status})")
    if result.state == "restored":
        notes.append(f"the variables of the session {result.session} are as they were before this call")
    if result.state == "lost":
        notes.append(f"the variables of the session {result.session} are lost; its next call starts afresh")
    if result.lost_before:
        notes.append(f"the session's variables had been lost before this call ({result.lost_before})")
    for note in filter(None, notes):
        _complain(note)


def _complain(text: str) -> None:
    """Print a remark, which is not the code's output."""
    print(f"sandbox_runner: {text}", file=sys.stderr, flush=True)


def exit_status(result: Result) -> int:
    """Return the exit status for a result, as a shell would report it."""
    fixed = {"timeout": 124, "out_of_memory": 137, "cancelled": 130}
    if result.status in fixed:
        return fixed[result.status]
    if result.exit_code is None:
        return {"ok": 0, "error": 1}.get(result.status, 137)
    return result.exit_code & 0xFF if result.exit_code >= 0 else 128 - result.exit_code


def show_status(status: str) -> None:
    """Show what the program waits for: on a terminal in one line that is overwritten, otherwise a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{status[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
    elif status:
        print(status, file=sys.stderr)


if __name__ == "__main__":
    main()
