"""The life of sandboxes, whatever dies: random stories checked against a model, and some of them on real engines.

The model runs several hosts on one fake engine, in random order makes calls and breaks things, and knows of every
session what has to be in it. Time passes by jumps of a clock that hosts and guests share, so nothing waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import anyio
import anyio.abc
import hypothesis
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from conftest import PATIENCE, WAIT_FOR_GO, FakeEngine, Hears, client, go, leave_without_a_word, until
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from real_engines import WAIT, CommandLine, Engine, eventually, host_processes, prune_at_once, run

import sandbox_runner
from sandbox_runner import (
    LABEL,
    Config,
    DockerConfig,
    EngineError,
    PackageConfig,
    PoolConfig,
    Result,
    Runner,
    SandboxError,
    SandboxInfo,
    SessionConfig,
    SessionError,
    Stage,
    open_runner,
    session_container,
)

T = TypeVar("T")


# ── a model of it, on the fake engine ──

IDLE_TIMEOUT = 1000.0
MOST = 1  # sessions of one host
SLOTS, NAMES = (0, 1, 2), ("a", "b")  # few, so that what happens happens to the same ones
JUMPS = (100, 500, 1100)  # seconds: beyond ADOPTION_TIME, beyond pool.max_age, beyond IDLE_TIMEOUT
FOR_EVER = 1e7  # seconds; what a call may take, until the end of the story
DOWN = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"


class Clock:
    """Stands in for the module `time`, on both sides of the pipe: a file tells how far it is ahead."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.ahead = 0.0
        self.jump(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def mark(self, session: str) -> Path:
        """The file that is there as long as a session's supervisor has no host."""
        return self.file.with_name(f"{self.file.name}-{session}")

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead += seconds
        written = self.file.with_suffix(".new")
        written.write_text(str(self.ahead), encoding="utf-8")
        written.replace(self.file)

    def rule_over(self, guest_source: str) -> str:
        """The guest with this clock, at which it looks often enough to notice a jump; it shows who is left alone."""
        mark = f"open(f'{self.file}-{{self.session}}', 'w').close()"
        unmark = f"os.path.exists(f'{self.file}-{{self.session}}') and os.unlink(f'{self.file}-{{self.session}}')"
        for old, new in (
            ("time.monotonic()", f"(time.monotonic() + float(open({str(self.file)!r}).read()))"),
            ("[], self._patience())", "[], 0 if self._patience() == 0 else 0.01)"),
            ("        self.host.channel = channel\n", f"        self.host.channel = channel\n        {unmark}\n"),
            ("        self.host.detach()\n", f"        self.host.detach()\n        {mark}\n"),
        ):
            assert old in guest_source
            guest_source = guest_source.replace(old, new)
        return guest_source


@dataclass
class World:
    """Where a story takes place."""

    portal: BlockingPortal  # to the event loop that all hosts run in
    engine: FakeEngine
    config: Config
    clock: Clock
    calls: int = 0  # so far

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any, **keywords: Any) -> T:
        """Run this in the event loop."""

        async def bounded() -> T:
            with anyio.fail_after(PATIENCE):
                return await function(*arguments, **keywords)

        return self.portal.call(bounded)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what other processes do; the condition either is false or fails until then."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if condition() is not False:
                    return
            except AssertionError:
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def clients(self) -> list[int]:
        """The process ids of the engine's command lines: no other children has this process."""
        found: list[int] = []
        for file in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread may end while we look
                found += map(int, file.read_text(encoding="ascii").split())
        return found

    def let_go(self, token: str) -> None:
        """Let the code of a call come to its end."""
        Path(self.config.docker.working_dir, token).touch()


class Host:
    """A program that uses the runner: here a task, which can leave or, as for all that others see, be killed."""

    def __init__(self, world: World, warm: bool) -> None:
        self.world = world
        self.warm = warm
        self._end = world.call(self._event)
        self._life: Future[None]
        self.runner: Runner
        self._life, self.runner = world.portal.start_task(self._live)

    async def _event(self) -> anyio.Event:
        return anyio.Event()

    async def _live(self, *, task_status: anyio.abc.TaskStatus[Runner]) -> None:
        async with open_runner(self.world.config, warm=self.warm) as runner:
            task_status.started(runner)
            await self._end.wait()

    def execute(self, code: str, **keywords: Any) -> Result:
        """A call."""
        return self.world.call(self.runner.execute, code, timeout=FOR_EVER, **keywords)

    def end(self, *, killed: bool) -> None:
        """Leave, with or without farewell."""

        async def say_nothing() -> None:
            pass

        if killed:
            self.runner.leave = say_nothing  # type: ignore[method-assign]
        self.world.portal.call(self._end.set)
        self._life.result(PATIENCE)

    def held(self) -> list[str]:
        """The containers that it is connected to."""
        return [sandbox.name for sandbox in self.runner.held() if not sandbox.gone.is_set()]

    def client(self, session: str) -> int:
        """The process id of the engine's command line behind a session."""
        sandbox = self.runner.sessions[session].sandbox
        assert sandbox
        return int(sandbox.client.pid)


@dataclass
class Known:
    """What has to be true of a session."""

    name: str
    alive: bool = False  # whether there is a container
    n: int = 0  # its variable of this name
    holder: int | None = None  # slot of the host that is connected to it
    running: str | None = None  # token of the call that goes on
    touched: float = 0.0  # when it was used last
    used: dict[int, int] = field(default_factory=dict)  # slot: which step used it last
    knows: set[int] = field(default_factory=set)  # slots of the hosts that have used it
    must_tell: set[int] = field(default_factory=set)  # slots whose next result has to say that variables were lost
    may_tell: set[int] = field(default_factory=set)

    @property
    def container(self) -> str:
        return session_container(self.name)

    def dies(self, *, told: int | None = None) -> None:
        """Its container has ended, and the host in slot `told` knows already."""
        self.must_tell = self.knows - {told}
        self.alive, self.n, self.holder, self.running, self.knows = False, 0, None, None, set()


def counting(token: str) -> str:
    """Code that counts its session's calls, and says its own name."""
    return f"n = globals().get('n', 0) + 1\nprint({token!r})\n"


def waiting(token: str) -> str:
    """The same, but it goes on until it is let go."""
    wait = f"import os, time\nwhile not os.path.exists({token!r}): time.sleep(0.002)\n"
    return f"{counting(token)}{wait}print({'end of ' + token!r})\nn"


class Life(RuleBasedStateMachine):
    """A story. Each rule is an event, and checks what it must come to."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.hosts: dict[int, Host] = {}
        self.sessions = {name: Known(name) for name in NAMES}
        self.unused: set[str] = set()  # containers that killed hosts have left, and nobody has taken over
        self.down = False

    # ── what it is made of ──

    def host(self, slot: int) -> Host:
        """The host in this slot; a new one if there is none."""
        if slot not in self.hosts:
            self.hosts[slot] = Host(self.world, warm=slot == 0)
            if slot == 0 and not self.down:
                self.world.until(self.pools_are_settled)
                self.unused.clear()  # it has adopted them, or ended those that are too old
        return self.hosts[slot]

    def token(self) -> str:
        """What one call prints, and no other."""
        self.world.calls += 1
        return f"call-{self.world.calls}"

    def is_reachable(self, slot: int, known: Known) -> bool:
        """Whether a call of this host can go through: without the engine only where it is connected."""
        return not self.down or (known.alive and known.holder == slot)

    def is_elsewhere(self, slot: int, known: Known) -> bool:
        return known.alive and known.holder not in (None, slot)

    def refused(self, host: Host, slot: int, known: Known) -> bool:
        """Check what a call says that can't be made; False if it can."""
        if not self.is_reachable(slot, known):
            with pytest.raises(SandboxError):
                host.execute("1", session=known.name)
            return True
        if self.is_elsewhere(slot, known):
            with pytest.raises(SessionError, match="is being used by another program"):
                host.execute("1", session=known.name)
            return True
        if known.alive:
            return False
        there = [one for one in self.sessions.values() if one.alive and one.holder == slot]
        idle = [one for one in there if not one.running]
        if len(there) >= MOST and not idle:
            with pytest.raises(SessionError, match="sessions already"):
                host.execute("1", session=known.name)
            known.may_tell |= known.must_tell
            return True
        if len(there) >= MOST:
            min(idle, key=lambda one: one.used[slot]).dies()
        return False

    def begins(self, slot: int, known: Known) -> None:
        """A call is being made."""
        if not known.alive:
            self.world.clock.mark(known.name).unlink(missing_ok=True)
            known.alive, known.n = True, 0
            known.may_tell |= known.must_tell
            known.must_tell &= {slot}
        known.n += 1
        self.uses(slot, known)

    def uses(self, slot: int, known: Known) -> None:
        known.holder = slot
        known.knows.add(slot)
        known.used[slot] = self.world.calls
        known.touched = self.world.clock.ahead

    def check(self, result: Result, slot: int, known: Known, token: str) -> None:
        """The result of a call that counted must be its own, of this session, and true about its variables."""
        said = f"{result}, of {known}"
        assert (result.status, result.stdout, result.state) == ("ok", f"{token}\n", "preserved"), said
        assert result.value == str(known.n), said
        self.check_told(result, slot, known, said)

    def check_told(self, result: Result, slot: int, known: Known, said: str) -> None:
        """The result must tell of a loss before it, and of nothing else."""
        is_told = result.lost_before or (result.unread and result.unread.state == "lost")
        assert not (slot in known.must_tell and not is_told), said
        assert not (result.lost_before and slot not in known.must_tell | known.may_tell), said
        known.must_tell.discard(slot)
        known.may_tell.discard(slot)

    def check_end(self, result: Result | None, known: Known, status: str = "ok") -> None:
        """The result of a call that went on, told to whoever waited for it or came after it."""
        said = f"{result}, of {known}"
        assert result, said
        token = known.running
        assert result.status == status, said
        assert result.state == "preserved", said
        if status == "ok":
            assert result.stdout in (f"end of {token}\n", f"{token}\nend of {token}\n"), said
            assert result.value == str(known.n), said
        known.running = None

    # ── calls ──

    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def call(self, slot: int, name: str) -> None:
        host, known, token = self.host(slot), self.sessions[name], self.token()
        if self.refused(host, slot, known):
            return
        if known.running:
            self.world.let_go(known.running)
        result = host.execute(f"{counting(token)}n", session=name)
        if known.running:
            self.check_end(result.unread, known)
        else:
            assert result.unread is None or result.unread.state == "lost"
        self.begins(slot, known)
        self.check(result, slot, known, token)

    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def crash(self, slot: int, name: str) -> None:
        host, known = self.host(slot), self.sessions[name]
        if known.running or self.refused(host, slot, known):
            return
        has_copy = known.alive and known.n > 0
        result = host.execute("n = globals().get('n', 0) + 100\nimport os; os._exit(3)", session=name)
        said = f"{result}, of {known}"
        assert (result.status, result.state) == ("died", "restored" if has_copy else "lost"), said
        self.begins(slot, known)
        known.n -= 1 + result.behind  # on a machine with much to do, the copy may be of an earlier call
        self.check_told(result, slot, known, said)

    @rule(slot=st.sampled_from(SLOTS))
    def call_without_session(self, slot: int) -> None:
        host, token = self.host(slot), self.token()
        code = f"{counting(token)}n"
        if self.down:
            with contextlib.suppress(SandboxError):  # a warm one may be left
                assert host.execute(code).value == "1"
            return
        result = host.execute(code)
        assert (result.status, result.value, result.stdout) == ("ok", "1", f"{token}\n")

    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def begin(self, slot: int, name: str) -> None:
        host, known, token = self.host(slot), self.sessions[name], self.token()
        if known.running or self.refused(host, slot, known):
            return
        result = host.execute(waiting(token), session=name, answer_within=0.01)
        seen = result.stdout
        while token not in seen:
            assert result.status == "running", result
            result = host.execute("", session=name, answer_within=0.05)
            seen += result.stdout
        assert (result.status, seen) == ("running", f"{token}\n")
        self.begins(slot, known)
        known.running = token
        known.may_tell |= known.must_tell & {slot}  # its end tells that, wherever that will be told
        known.must_tell.discard(slot)

    @precondition(lambda self: any(known.running for known in self.sessions.values()))
    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES), interrupt=st.booleans())
    def wait(self, slot: int, name: str, interrupt: bool) -> None:
        host, known = self.host(slot), self.sessions[name]
        if not known.running or self.refused(host, slot, known):
            return
        still = host.execute("", session=name, answer_within=0)
        assert (still.status, still.value) == ("running", None), still
        self.uses(slot, known)
        if interrupt:
            stop = self.world.call(host._event)
            self.world.portal.call(stop.set)
            self.check_end(host.execute("", session=name, interrupt=stop), known, "cancelled")
        else:
            self.world.let_go(known.running)
            self.check_end(host.execute("", session=name), known)
        self.uses(slot, known)

    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def cancel_a_call(self, slot: int, name: str) -> None:
        host, known, token = self.host(slot), self.sessions[name], self.token()
        if known.running or self.refused(host, slot, known):
            return

        async def call() -> bool:
            with anyio.CancelScope() as scope:

                async def on_output(_: object) -> None:
                    scope.cancel()

                await host.runner.execute(waiting(token), session=name, timeout=FOR_EVER, on_output=on_output)
            return scope.cancelled_caught

        assert self.world.call(call)
        self.begins(slot, known)
        sandbox = host.runner.sessions[name].sandbox
        assert sandbox
        self.world.until(lambda: sandbox.call is None or sandbox.call.ended.is_set())

    # ── what happens to hosts ──

    @precondition(lambda self: self.hosts)
    @rule(slot=st.sampled_from(SLOTS), killed=st.booleans())
    def leave(self, slot: int, killed: bool) -> None:
        if not (host := self.hosts.pop(slot, None)):
            return
        if killed:
            self.unused |= {sandbox.name for sandbox in host.runner.pool.ready if not sandbox.gone.is_set()}
        host.end(killed=killed)
        self.forget(slot)

    def forget(self, slot: int) -> None:
        for known in self.sessions.values():
            known.knows.discard(slot)
            known.must_tell.discard(slot)
            known.may_tell.discard(slot)
            if known.holder == slot:
                self.is_left_alone(known)

    def is_left_alone(self, known: Known) -> None:
        known.holder = None
        known.touched = self.world.clock.ahead
        self.world.until(self.world.clock.mark(known.name).exists)

    @precondition(lambda self: not self.down)
    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def close(self, slot: int, name: str) -> None:
        host, known = self.host(slot), self.sessions[name]
        if self.is_elsewhere(slot, known):
            with pytest.raises(SessionError, match="is being used by another program"):
                self.world.call(host.runner.close_session, name)
            return
        assert self.world.call(host.runner.close_session, name) == known.alive
        if known.alive:
            known.dies(told=slot)
        known.must_tell.discard(slot)

    @precondition(lambda self: not self.down)
    @rule(slot=st.sampled_from(SLOTS))
    def look(self, slot: int) -> None:
        infos = {
            info.session: info
            for info in self.world.call(self.host(slot).runner.launcher.list_sandboxes)
            if info.session
        }
        alive = {known.name for known in self.sessions.values() if known.alive}
        assert set(infos) == alive
        for name in alive:
            assert infos[name].attached == (self.sessions[name].holder is not None), infos
            assert infos[name].busy == (self.sessions[name].running is not None), infos

    # ── what happens to containers, command lines, the engine and time ──

    @precondition(lambda self: not self.down and any(known.alive for known in self.sessions.values()))
    @rule(name=st.sampled_from(NAMES), verb=st.sampled_from(["kill", "rm"]))
    def lose_container(self, name: str, verb: str) -> None:
        known = self.sessions[name]
        if known.alive:
            self.world.engine.run(verb, known.container)
            self.ends(known)

    def ends(self, known: Known) -> None:
        """The container of a session has ended: if somebody waited for a call in it, he is told so."""
        holder = known.holder
        if known.running and holder is not None:
            result = self.hosts[holder].execute("", session=known.name)
            assert (result.status, result.state) == ("died", "lost"), result
            known.dies(told=holder)
            return
        self.is_noticed(known)

    def is_noticed(self, known: Known) -> None:
        """A container has ended, and its host has noticed: a call that came before that would die with it."""
        holder = known.holder
        known.dies()
        if holder is not None:
            self.world.until(lambda: known.container not in self.hosts[holder].held())

    @precondition(lambda self: not self.down)
    @rule(slot=st.sampled_from(SLOTS))
    def lose_unused_container(self, slot: int) -> None:
        host = self.hosts.get(slot)
        if host and host.runner.pool.ready:
            self.world.engine.run("kill", host.runner.pool.ready[0].name)
            self.world.until(self.pools_are_settled)

    @precondition(lambda self: not self.down and any(known.alive for known in self.sessions.values()))
    @rule(name=st.sampled_from(NAMES), is_used_then=st.booleans())
    def lose_client(self, name: str, is_used_then: bool) -> None:
        known = self.sessions[name]
        if not known.alive or known.holder is None:
            return
        holder, runner = known.holder, self.hosts[known.holder].runner
        cut = runner.sessions[name].sandbox
        os.kill(self.hosts[known.holder].client(name), signal.SIGKILL)
        assert cut
        self.world.until(cut.gone.is_set)
        if known.running:  # the next call comes back to it
            still = self.hosts[holder].execute("", session=name, answer_within=0)
            assert (still.status, still.stdout) == ("running", ""), still
            assert runner.sessions[name].sandbox is not cut
        else:
            self.is_left_alone(known)
        if is_used_then:
            self.call(holder, name)

    @precondition(lambda self: not self.down)
    @rule(slot=st.sampled_from(SLOTS), name=st.sampled_from(NAMES))
    def pause_container(self, slot: int, name: str) -> None:
        host, known = self.host(slot), self.sessions[name]
        if not known.alive or known.running or self.is_elsewhere(slot, known):
            return
        self.world.engine.run("pause", known.container)
        if known.holder is None:
            with pytest.raises(SessionError, match="paused"):
                host.execute("1", session=name)
            self.world.engine.run("unpause", known.container)
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox_runner, "INTERRUPT_GRACE", 0.1)
            patch.setattr(sandbox_runner, "HOST_PATIENCE", 0.1)
            result = self.world.call(host.runner.execute, "1", session=name, timeout=0.1)
        assert (result.status, result.state) == ("timeout", "lost")
        known.dies()

    @precondition(lambda self: not self.down)
    @rule(clients_die=st.booleans())
    def engine_goes(self, clients_die: bool) -> None:
        self.down = True
        self.world.engine.script(down=DOWN)
        if not clients_die:
            return
        for host in self.hosts.values():
            self.unused |= {sandbox.name for sandbox in host.runner.pool.ready}
        held = [known for known in self.sessions.values() if known.alive and known.holder is not None]
        self.world.until(self.clients_are_dead)
        for known in held:
            assert known.holder is not None
            if known.running:
                with pytest.raises(EngineError, match=r"`docker ps` failed|its engine does not answer"):
                    self.hosts[known.holder].execute("", session=known.name)
            self.is_left_alone(known)

    def clients_are_dead(self) -> None:
        for pid in self.world.clients():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        held = {slot: host.held() for slot, host in self.hosts.items() if host.held()}
        assert not held, held

    @precondition(lambda self: self.down)
    @rule(containers_die=st.booleans())
    def engine_comes(self, containers_die: bool) -> None:
        self.down = False
        self.world.engine.script(down=None)
        if containers_die:
            for name in self.world.engine.containers():
                with contextlib.suppress(Exception):
                    self.world.engine.run("kill", name)
            for known in self.sessions.values():
                if known.alive:
                    self.ends(known)
        self.world.until(self.pools_are_settled)

    @rule(seconds=st.sampled_from(JUMPS))
    def time_passes(self, seconds: int) -> None:
        clock = self.world.clock
        clock.jump(seconds)
        for known in self.sessions.values():
            if known.alive and not known.running and clock.ahead - known.touched >= IDLE_TIMEOUT:
                self.is_noticed(known)

    # ── what is always true ──

    def pools_are_settled(self) -> None:
        there = self.world.engine.containers()
        for slot, host in self.hosts.items():
            pool = host.runner.pool
            assert all(sandbox.name in there for sandbox in pool.ready), f"host {slot}: {pool.ready}"
            kept = pool.config.warm if host.warm and pool.is_used else 0
            assert len(pool.ready) >= kept, f"host {slot}: {pool.ready}"

    @invariant()
    def counts_of_the_pools_are_true(self) -> None:
        def check() -> None:
            for slot, host in self.hosts.items():
                pool = host.runner.pool
                sessions = [session.sandbox for session in host.runner.sessions.values()]
                held = [sandbox for sandbox in host.runner.held() if sandbox not in sessions]
                assert pool.count == len(held) <= pool.config.size, f"host {slot}: {pool.count}, {held}"

        self.world.until(check)

    @invariant()
    def each_call_is_where_its_stage_says(self) -> None:
        def check() -> None:
            for host in self.hosts.values():
                for session in host.runner.sessions.values():
                    sandbox, call = session.sandbox, session.call
                    is_there = sandbox is not None and not sandbox.gone.is_set() and sandbox.call is call
                    assert not call or is_there or not call.is_placed, (session.name, sandbox, call.stage)
                    assert not call or call.ended.is_set() == (call.stage is Stage.ENDED), (session.name, call.stage)

        self.world.until(check)

    @invariant()
    def no_container_has_two_owners(self) -> None:
        def check() -> None:
            held = [name for host in self.hosts.values() for name in host.held()]
            assert len(held) == len(set(held)), held

        self.world.until(check)

    @invariant()
    def every_container_is_known_to_somebody(self) -> None:
        def check() -> None:
            there = set(self.world.engine.containers())
            self.unused &= there
            held = {name for host in self.hosts.values() for name in host.held()}
            alive = {known.container for known in self.sessions.values() if known.alive}
            ready = {sandbox.name for host in self.hosts.values() for sandbox in host.runner.pool.ready}
            assert alive <= there, f"gone: {alive - there}"
            assert there <= alive | ready | self.unused, f"leaked: {there - alive - ready - self.unused}"
            assert {known.container for known in self.sessions.values() if known.holder is not None} <= held

        self.world.until(check)

    @invariant()
    def no_client_is_left_over(self) -> None:
        if not self.down:
            self.world.until(lambda: len(self.world.clients()) <= sum(len(host.held()) for host in self.hosts.values()))

    def all_have_gone(self) -> bool:
        self.world.clock.jump(2 * FOR_EVER)  # again and again: after its call's end a session waits for somebody
        return not self.world.engine.containers()

    def teardown(self) -> None:
        """All hosts go, and after the time that was promised everything has gone."""
        self.world.engine.script(down=None)
        for number, slot in enumerate(list(self.hosts)):
            self.hosts.pop(slot).end(killed=number % 2 == 0)
        self.world.until(self.all_have_gone)
        self.world.until(lambda: not self.world.clients())


@pytest.fixture
def world(docker: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "work").mkdir()
    clock = Clock(tmp_path / "clock")
    monkeypatch.setattr(sandbox_runner, "time", clock)
    monkeypatch.setattr(sandbox_runner, "GUEST_SOURCE", clock.rule_over(sandbox_runner.GUEST_SOURCE))
    monkeypatch.setattr(sandbox_runner, "POOL_RETRY_LIMIT", 0.2)
    monkeypatch.setattr(sandbox_runner, "CLOSING_TIME", 0.1)
    config = Config(
        docker=DockerConfig(command=docker.command, working_dir=str(tmp_path / "work")),
        session=SessionConfig(idle_timeout=IDLE_TIMEOUT, max=MOST, evict=True),
        package=PackageConfig(preinstalled=()),
        pool=PoolConfig(size=4, warm=1),
    )
    with start_blocking_portal() as portal:
        yield World(portal, docker, config, clock)


def tell(world: World, stories: int, steps: int, derandomize: bool = False) -> None:
    """Check this many random stories of this many events."""
    run_state_machine_as_test(
        cast(Any, functools.partial(Life, world)),  # a factory will do
        settings=hypothesis.settings(
            max_examples=stories,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],  # each story takes seconds: too long to seek the shortest that fails
            derandomize=derandomize,
        ),
    )


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_left_behind(world: World) -> None:
    tell(world, 2, 10, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("_part", range(2))  # side by side: it is the longest test
def test_nothing_is_lost_and_nothing_left_behind_in_any_story(world: World, _part: int) -> None:
    tell(world, 3, 40)


# ── single things that the stories have found, or meet too seldom ──


@pytest.mark.slow
def test_a_session_whose_waiting_end_another_server_has_collected_counts_as_used(world: World) -> None:
    first = Host(world, warm=False)
    first.execute("x = 1", session="s")
    first.execute(waiting("go"), session="s", answer_within=0)
    first.end(killed=False)
    world.let_go("go")
    second = Host(world, warm=False)

    def infos() -> list[SandboxInfo]:
        return world.call(second.runner.launcher.list_sandboxes)

    world.until(lambda: not infos()[0].busy)
    world.clock.jump(0.6 * IDLE_TIMEOUT)
    assert second.execute("", session="s").status == "ok"
    world.clock.jump(0.6 * IDLE_TIMEOUT)
    assert infos()
    assert infos(), "it has looked at the clock since the first answer"
    assert second.execute("x", session="s").value == "1"
    second.end(killed=False)


def is_another(runner: Runner, cut: sandbox_runner.Sandbox | None) -> bool:
    """Whether the session `s` is connected again."""
    return runner.sessions["s"].sandbox not in (cut, None)


def has_ended(runner: Runner) -> bool:
    """Whether a runner has noticed that its connection to the session `s` has ended."""
    sandbox = runner.sessions["s"].sandbox
    return sandbox is not None and sandbox.gone.is_set()


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_call_whose_connection_is_cut_twice_still_has_its_result(settings: Config) -> None:
    results: list[Result] = []
    hears = Hears()

    async def call(runner: Runner) -> None:
        results.append(await runner.execute(f"{WAIT_FOR_GO}print('off')\n7", session="s", on_output=hears))

    async with open_runner(settings) as runner:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, runner)
            await hears.first.wait()
            for _ in range(2):
                cut = runner.sessions["s"].sandbox
                os.kill(client(runner, "s"), signal.SIGKILL)
                await until(functools.partial(is_another, runner, cut))
            go(settings)
        await runner.close_session("s")
    assert [(result.status, result.value, result.state) for result in results] == [("ok", "7", "preserved")]


@pytest.mark.slow
@pytest.mark.anyio
async def test_while_nobody_knows_whether_a_session_is_there_it_is_not_called_lost(
    docker: FakeEngine, settings: Config
) -> None:
    async with open_runner(settings) as runner:
        await runner.execute("x = 1", session="s")
        docker.script(down=DOWN)
        os.kill(client(runner, "s"), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineError, match="Cannot connect to the Docker daemon"):
                await runner.execute("x", session="s")
            with pytest.raises(EngineError, match="Cannot connect to the Docker daemon"):
                await runner.close_session("s")
        docker.script(down=None)
        result = await runner.execute("x", session="s")
        assert (result.value, result.lost_before) == ("1", None)
        await runner.close_session("s")


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_host_that_may_not_end_a_session_which_it_has_used_still_tells_when_that_is_lost(
    settings: Config,
) -> None:
    async with open_runner(settings) as first, open_runner(settings) as second:
        await first.execute("x = 1", session="s")
        os.kill(client(first, "s"), signal.SIGKILL)
        await until(lambda: has_ended(first))
        await second.execute("x = 2", session="s")
        with pytest.raises(SessionError, match="is being used by another program"):
            await first.close_session("s")
        await second.close_session("s")
        result = await first.execute("'x' in globals()", session="s")
        assert (result.value, result.lost_before) == ("False", "its container ended")
        await first.close_session("s")


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_loss_of_a_session_is_told_even_if_the_next_call_is_cancelled_and_its_connection_cut(
    docker: FakeEngine, settings: Config
) -> None:
    async with open_runner(settings) as runner:
        await runner.execute("x = 1", session="s")
        docker.run("kill", session_container("s"))
        await until(lambda: has_ended(runner))
        hears = Hears()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: runner.execute(WAIT_FOR_GO, session="s", on_output=hears))
            await hears.first.wait()
            tasks.cancel_scope.cancel()
        os.kill(client(runner, "s"), signal.SIGKILL)
        await until(lambda: has_ended(runner))
        result = await runner.execute("'x' in globals()", session="s")
        assert (result.value, result.lost_before) == ("False", "its container ended")
        await runner.close_session("s")


@pytest.mark.anyio
async def test_a_session_that_is_ended_while_its_container_is_being_made_never_begins(
    docker: FakeEngine, settings: Config
) -> None:
    ended: list[str] = []

    async def call(runner: Runner) -> None:
        with pytest.raises(SessionError, match="The session 's' was ended before the call could begin"):
            await runner.execute("1", session="s")
        ended.append("call")

    async with open_runner(settings) as runner, anyio.create_task_group() as tasks:
        docker.script(run={"hang": True})
        tasks.start_soon(call, runner)
        await until(lambda: bool(docker.log("run")))
        assert await runner.close_session("s")
        await until(lambda: ended == ["call"])
        docker.script(run={})
        assert (await runner.execute("2", session="s")).value == "2"
        assert await runner.close_session("s")
        assert docker.containers() == []


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_session_whose_first_call_was_cancelled_at_the_last_moment_is_found_by_the_next_host(
    docker: FakeEngine, settings: Config
) -> None:
    async with open_runner(settings) as first:
        docker.script(rename={"hang": True})
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: first.execute("x = 1", session="s"))
                await until(lambda: bool(docker.log("rename")))
                scope.cancel()
        docker.script(rename={})
        await first.execute("x = 2", session="s")
    async with open_runner(settings) as second:
        assert (await second.execute("x", session="s")).value == "2"
        await second.close_session("s")
    await until(lambda: docker.containers() == [])


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_session_whose_host_was_killed_before_its_first_call_does_not_block_its_name(
    docker: FakeEngine, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "leave", leave_without_a_word)
        async with open_runner(settings) as first:
            await first.sessions["s"].create(lambda _: None)
    assert docker.containers() == [session_container("s")]
    async with open_runner(settings) as second:
        assert (await second.execute("6 * 7", session="s")).value == "42"
        await second.close_session("s")
    await until(lambda: docker.containers() == [])


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("waits", [True, False])
async def test_who_adopts_a_sandbox_learns_that_it_is_prepared(
    settings: Config, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    settings = dataclasses.replace(settings, pool=PoolConfig(warm=1, size=1))
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "leave", leave_without_a_word)
        async with open_runner(settings, warm=True) as first:
            await until(lambda: bool(first.pool.ready))
            (left,) = first.pool.ready
            if waits:
                await left.prepared.wait()
    async with open_runner(settings, warm=True) as second:
        await until(lambda: bool(second.pool.ready))
        (adopted,) = second.pool.ready
        assert adopted.name == left.name
        await until(adopted.prepared.is_set)


@pytest.mark.slow
@pytest.mark.anyio
async def test_looking_for_a_session_that_is_given_up_does_not_keep_it_from_others(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = anyio.Event(), sandbox_runner.Sandbox.write

    async def sends(self: sandbox_runner.Sandbox, data: bytes) -> None:
        await send(self, data)
        sent.set()

    async with open_runner(settings) as first:
        await first.execute("x = 1", session="s")
    monkeypatch.setattr(sandbox_runner.Sandbox, "write", sends)
    async with open_runner(settings) as second, open_runner(settings) as third:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: second.execute("x = 2", session="s"))
                await sent.wait()
                scope.cancel()
        await second.leave()
        assert (await third.execute("x", session="s")).value == "1"
        await third.close_session("s")


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_pool_whose_engine_refuses_says_so_and_fills_itself_again_within_its_size(
    docker: FakeEngine, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "POOL_RETRY_LIMIT", 0.2)
    docker.script(run={"exit": 125, "stderr": "write /var/lib/docker: no space left on device\n"})
    config = dataclasses.replace(settings, pool=PoolConfig(size=1, warm=1))
    hears = Hears()
    async with open_runner(config, warm=True) as runner, anyio.create_task_group() as tasks:
        await until(lambda: len(docker.log("run")) > 1)
        with pytest.raises(EngineError, match=r"A sandbox could not be started: .*no space left on device"):
            await runner.execute("1")
        assert runner.pool.count <= 1
        docker.script(run={})
        tasks.start_soon(lambda: runner.execute(WAIT_FOR_GO, on_output=hears))
        await hears.first.wait()
        await until(lambda: runner.pool.count == 1)
        assert (runner.pool.count, len(docker.containers())) == (1, 1)
        go(settings)
        await until(lambda: len(runner.pool.ready) == 1)


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_image_that_has_gone_is_looked_for_anew(docker: FakeEngine, settings: Config) -> None:
    async with open_runner(settings) as runner:
        await runner.execute("1")
        docker.script(images=[], run={"exit": 125, "stderr": "docker: Error: No such image.\n"})
        with pytest.raises(EngineError, match=r"A sandbox could not be started: docker: Error: No such image\."):
            await runner.execute("1")
        docker.script(images=[sandbox_runner.host_image_name()], run={})
        assert (await runner.execute("6 * 7")).value == "42"
        assert runner.launcher.image
        assert runner.launcher.image.name == sandbox_runner.host_image_name()


@pytest.mark.anyio
async def test_an_engine_that_stops_answering_is_not_taken_for_one_without_the_image(docker: FakeEngine) -> None:
    docker.script(image_inspect={"exit": 1, "stderr": DOWN})
    engine = await sandbox_runner.find_engine(docker.command)
    docker.script(version={"exit": 1, "stderr": DOWN})
    with pytest.raises(EngineError, match="Cannot connect to the Docker daemon"):
        await engine.inspect("image", DockerConfig.image, "{{.Id}}")


@pytest.mark.anyio
async def test_a_container_of_somebody_elses_that_has_our_label_or_name_is_not_taken_for_ours(
    docker: FakeEngine, settings: Config
) -> None:
    async with open_runner(settings) as runner:
        await runner.execute("1", session="s")
        assert runner.launcher.engine
        with anyio.fail_after(20):
            assert list(await runner.launcher.engine.sandboxes()) == [session_container("s")]
        docker.run("rename", session_container("s"), "own-name")
        assert await runner.launcher.engine.sandboxes() == {}
        docker.run("rename", "own-name", session_container("s"))
        await runner.close_session("s")


# ── on real engines ──

HOST = """
import anyio, sandbox_runner
from sandbox_runner import *

async def main():
    async with open_runner({config!r}, warm=True) as runner:
        if session := {session!r}:
            await runner.execute("x = 'kept'", session=session + "-idle")
            answer = await runner.execute({busy!r}, session=session + "-busy", timeout=299, answer_within=0)
            while "begun" not in answer.stdout:
                answer = await runner.execute("", session=session + "-busy", answer_within=0.05)
        while not runner.pool.ready:
            await anyio.sleep(0.01)
        print(runner.pool.ready[0].name, flush=True)
        await anyio.sleep_forever()

sandbox_runner.ADOPTION_TIME = {wait}
anyio.run(main)
"""


@pytest.fixture
def brief(config: Config) -> Config:
    """Settings for a real engine: one sandbox is kept ready, and what is forgotten ends in some minutes.

    They are no other test's, which might adopt sandboxes of this one.
    """
    soon = SessionConfig(idle_timeout=300 + int.from_bytes(os.urandom(2)) / 1000)
    return dataclasses.replace(config, session=soon, pool=PoolConfig(size=4, warm=1))


@asynccontextmanager
async def host(config: Config, session: str | None, wait: int) -> AsyncIterator[tuple[anyio.abc.Process, str]]:
    """A program, with an idle and a busy session if it has any; and the name of the container that it keeps ready."""
    busy = f"print('begun', flush=True)\n{WAIT}x = 'kept'\n'unread'"
    program = HOST.format(config=config, session=session, busy=busy, wait=wait)
    environment = {**os.environ, "PYTHONPATH": str(Path(sandbox_runner.__file__).parent)}
    async with await anyio.open_process([sys.executable, "-c", program], env=environment, stderr=None) as process:
        assert process.stdout
        with anyio.fail_after(2 * PATIENCE):
            name = (await process.stdout.receive()).decode().strip()
        try:
            yield process, name
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def ready(runner: Runner) -> str:
    """The name of the container that it keeps ready."""
    with anyio.fail_after(PATIENCE):
        while not runner.pool.ready:
            await anyio.sleep(0.01)
    return runner.pool.ready[0].name


async def is_left_alone(runner: Runner, name: str) -> bool:
    """Whether a sandbox has noticed that its host is dead."""
    return any(info.name == name and not info.attached for info in await runner.launcher.list_sandboxes())


@pytest.mark.engine
@pytest.mark.anyio
async def test_what_a_killed_host_had_is_found_by_the_next_and_others_keep_their_own(
    brief: Config, session: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "ADOPTION_TIME", 299)
    async with open_runner(brief, warm=True) as other:  # it is there all the time
        await other.execute("x = 'other'", session=session)
        others = await ready(other)
        async with host(brief, session, 299) as (first, unused), host(brief, None, 1) as (second, odd):
            for process in (first, second):
                process.kill()
                await process.wait()
        await eventually(lambda: is_left_alone(other, unused))
        async with open_runner(brief, warm=True) as runner:
            await ready(runner)  # the host may have kept more than one: then all of them are taken over
            assert unused in [sandbox.name for sandbox in runner.pool.ready]
            result = await runner.execute("x", session=f"{session}-idle")
            assert (result.value, result.state, result.lost_before) == ("'kept'", "preserved", None)
            await engine.let_go(session_container(f"{session}-busy"))
            result = await runner.execute("x", session=f"{session}-busy")
            assert result.unread
            assert (result.unread.status, result.unread.value) == ("ok", "'unread'")
            assert (result.value, result.state, result.lost_before) == ("'kept'", "preserved", None)
            for name in ("idle", "busy"):
                assert await runner.close_session(f"{session}-{name}")
            await eventually(lambda: engine.is_gone(odd))  # it was not as ours would be, and nobody else came for it
        assert await ready(other) == others
        assert (await other.execute("x", session=session)).value == "'other'"
        await other.close_session(session)
    await eventually(lambda: engine.is_gone(unused))


@pytest.mark.engine
@pytest.mark.anyio
async def test_the_sessions_of_a_host_that_was_killed_with_output_unread_can_be_used(
    brief: Config, session: str, engine: Engine
) -> None:
    async with host(brief, session, 1) as (process, _):
        process.send_signal(signal.SIGSTOP)
        await engine.let_go(session_container(f"{session}-busy"))
        await anyio.sleep(1)  # what that writes comes as far as the host, which does not read it
        process.kill()
        await process.wait()
    async with open_runner(brief) as runner:
        with anyio.fail_after(PATIENCE):
            assert (await runner.execute("x", session=f"{session}-busy")).value == "'kept'"
        for name in ("idle", "busy"):
            assert await runner.close_session(f"{session}-{name}")


@pytest.mark.engine
@pytest.mark.anyio
async def test_containers_that_only_look_like_ours_are_left_alone(
    brief: Config, session: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_be_pruned = prune_at_once(monkeypatch)
    monkeypatch.setattr(sandbox_runner, "ATTACH_TIMEOUT", 1)
    token = os.urandom(8).hex()
    async with open_runner(brief, warm=True) as runner:
        await ready(runner)
        assert runner.launcher.image
        labels = [f"--label={LABEL}=1", f"--label={LABEL}.owner={runner.launcher.owner}", f"--label={LABEL}.settings=1"]
        foreign = {session_container(session): [], f"python-docker-mcp-{token}": labels[:1], f"own-{token}": labels}
        never_run = {f"python-docker-mcp-{token[::-1]}": labels[:1], f"never-run-{token}": labels}
        to_be_pruned |= {*foreign, *never_run}
        program = [
            "--network=none",
            "--entrypoint=python3",
            runner.launcher.image.name,
            "-c",
            "import time; time.sleep(600)",
        ]
        try:
            for name, options in foreign.items():
                await engine("run", "--detach", f"--name={name}", *options, *program)
            for name, options in never_run.items():
                await engine("create", f"--name={name}", *options, *program)
            await runner.launcher.prune()
            assert not {info.name for info in await runner.launcher.list_sandboxes()} & {*foreign, *never_run}
            assert not await runner.close_session(session)
            with pytest.raises(EngineError, match="name"):  # which is taken: that much has to be said
                await runner.execute("1", session=session)
            for name in foreign:
                about = await engine.inspect(name)
                assert (about["State"]["Status"], about["ExecIDs"] or []) == ("running", []), name
            for name in never_run:
                assert (await engine.inspect(name))["State"]["Status"] == "created"
        finally:
            await engine("rm", "--force", "--time=0" * (engine.command == "podman") or "--force", *foreign, *never_run)


@pytest.mark.engine
@pytest.mark.anyio
async def test_a_session_that_is_paused_is_listed_as_not_answering_and_is_not_lost(
    brief: Config, session: str, engine: Engine, command_line: CommandLine
) -> None:
    name = session_container(session)
    async with open_runner(brief) as runner:
        await runner.execute("x = 1", session=session)
        (row,) = [row for row in (await run(command_line, "ps"))[1].splitlines() if name in row]
        assert row.split()[:6] == [session, "idle,", "in", "use", "pid", str(os.getpid())]
    await engine("pause", name)
    try:
        (row,) = [row for row in (await run(command_line, "ps"))[1].splitlines() if name in row]
        assert "  does not answer  " in row
        async with open_runner(brief) as runner:
            with pytest.raises(SessionError, match=f"its container {name} does not answer .paused.: unpause it"):
                await runner.execute("x", session=session)
    finally:
        await engine("unpause", name)
    async with open_runner(brief) as runner:
        (info,) = [info for info in await runner.launcher.list_sandboxes() if info.name == name]
        assert (info.session, info.answers, info.attached) == (session, True, False)
        assert (await runner.execute("x", session=session)).value == "1"
        await runner.close_session(session)


# ── a daemon that dies ──


def mounts() -> list[str]:
    """Where something is mounted."""
    return [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]


def command_line_of(process: int) -> list[str]:
    """The arguments of a process, if it is there."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    return []


class Daemon:
    """A Docker daemon of the test's own, beside the one that others use."""

    def __init__(self, program: str, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix://{folder}/socket"
        self._command = [
            *("unshare", "--net"),  # without a bridge it removes docker0, which must not be the other daemon's
            program,
            f"--data-root={folder}/data",
            f"--exec-root={folder}/exec",
            f"--pidfile={folder}/pid",
            f"--host={self.address}",
            "--containerd-namespace=test",  # where the machine has a containerd, that is everybody's
            "--containerd-plugins-namespace=test-plugins",
            "--bridge=none",
            "--iptables=false",
            "--ip-masq=false",
        ]
        self._process: anyio.abc.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it answers. Raises EngineError."""
        for left in ("pid", "exec/containerd/containerd.pid"):  # of one that was killed: it would be taken for alive
            (self.folder / left).unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = await anyio.open_process(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        with anyio.move_on_after(PATIENCE):
            while self._process.returncode is None:
                version = ["docker", f"--host={self.address}", "version"]
                if (await anyio.run_process(version, check=False)).returncode == 0:
                    return
                await anyio.sleep(0.1)
        said = sandbox_runner.last_line((self.folder / "log").read_text(encoding="utf-8", errors="replace"))
        raise EngineError(said)

    async def stop(self, number: signal.Signals) -> None:
        """Send it a signal, and wait for its end."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            await self._process.wait()
        with contextlib.suppress(OSError, ValueError):
            containerd = int((self.folder / "exec/containerd/containerd.pid").read_text())
            while "containerd" in os.readlink(f"/proc/{containerd}/exe"):  # it follows, if the daemon started it
                os.kill(containerd, signal.SIGTERM)
                await anyio.sleep(0.01)

    async def clean_up(self) -> None:
        """Leave neither processes nor mounts of it behind."""
        await self.stop(signal.SIGTERM)
        for pid, parent, line in [*host_processes()]:  # what a test left that failed while the daemon was down
            if any(argument.startswith(str(self.folder)) for argument in (*line, *command_line_of(parent))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for place in reversed(mounts()):
            if place.startswith(f"{self.folder}/"):
                await anyio.run_process(["umount", "--lazy", place], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
async def daemon(engine_command: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    """A daemon, which the engine's command line talks to during the test."""
    if engine_command != "docker":
        pytest.skip("there is no daemon that could die")
    program = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.geteuid() != 0 or not program:
        pytest.skip("a second dockerd needs root" if program else "there is no dockerd on this machine")
    daemon = Daemon(program, Path(tempfile.mkdtemp(prefix="dockerd-")))  # short: a socket's path has 107 bytes
    try:
        try:
            await daemon.start()
        except EngineError as error:
            pytest.skip(f"no second dockerd can be run here: {error}")
        monkeypatch.setenv("DOCKER_HOST", daemon.address)
        yield daemon
    finally:
        with anyio.CancelScope(shield=True):
            await daemon.clean_up()


class Spied:
    """Counts the engine's commands, and the pauses between attempts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        self.pauses: list[float] = []
        self._open, self._sleep = sandbox_runner.open_command, anyio.sleep
        monkeypatch.setattr(sandbox_runner, "open_command", self._count_command)
        monkeypatch.setattr(anyio, "sleep", self._count_pause)

    async def _count_command(self, command: Any, *streams: Any) -> anyio.abc.Process:
        self.commands.append(command[1])
        return await self._open(command, *streams)

    async def _count_pause(self, delay: float) -> None:
        if delay >= 1:  # the pool's; others wait for something that is about to be
            self.pauses.append(delay)
        await self._sleep(delay)


@pytest.mark.engine
@pytest.mark.anyio
async def test_a_daemon_that_dies_is_noticed_at_once_and_all_works_again_when_it_is_back(
    daemon: Daemon, brief: Config, session: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Result | SandboxError] = []
    begun = anyio.Event()

    async def call(runner: Runner) -> None:
        async def on_output(_: object) -> None:
            begun.set()

        try:
            code = f"print('begun', flush=True)\n{WAIT}"
            outcomes.append(await runner.execute(code, session=session, on_output=on_output))
        except SandboxError as error:
            outcomes.append(error)

    async with open_runner(brief, warm=True) as runner, anyio.create_task_group() as tasks:
        for number in (signal.SIGKILL, signal.SIGTERM):
            await runner.execute("x = 1", session=session)
            kept = runner.pool.ready[0] if await ready(runner) else None
            begun = anyio.Event()
            tasks.start_soon(call, runner)
            await begun.wait()
            with monkeypatch.context() as patch:
                spied = Spied(patch)
                await daemon.stop(number)
                with anyio.fail_after(PATIENCE):
                    assert kept
                    await kept.gone.wait()
                    while not outcomes or len(spied.pauses) < 2:
                        await anyio.sleep(0.01)
                with pytest.raises(EngineError, match="Cannot connect to the Docker daemon"):
                    await runner.execute("1")
                assert len(spied.commands) < 5 * (len(spied.pauses) + 2), spied.commands
            outcome = outcomes.pop()
            if isinstance(outcome, Result):
                assert (outcome.status, outcome.state) == ("died", "lost"), outcome
            else:
                assert "Cannot connect to the Docker daemon" in str(outcome)
            await daemon.start()
            assert await ready(runner) != kept.name
            result = await runner.execute("'x' in globals()", session=session)
            assert (result.value, bool(result.lost_before)) == ("False", isinstance(outcome, EngineError)), result
            assert (await runner.execute("6 * 7")).value == "42"
        await runner.close_session(session)

    async def nothing_is_left() -> bool:
        return not (await engine("ps", "--all", "--quiet")).strip()

    await eventually(nothing_is_left)
