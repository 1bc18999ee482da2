"""Hostile code, on real Docker and real Podman: one line an attack, with what it would do if nothing held it.

`ATTACKS` is the table. Each row is tried twice: once in a sandbox as it is, where it must come to `held`; and once in a
sandbox without the row's `defence`, a piece of the engine's command line or of the guest, where it must come to
something else (on the engines where nothing else holds it, which the row names). So none passes for a wrong reason.

Attacks that need more than one call follow the table: on the channel, on later calls, on time, memory and the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from conftest import why_unusable

import sandbox_runner
from sandbox_runner import (
    Config,
    DockerConfig,
    Engine,
    Image,
    PackageConfig,
    PoolConfig,
    RequestError,
    Runner,
    SessionConfig,
    Text,
    open_runner,
)

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

PATIENCE = 200  # seconds until what would wait for ever has failed; the machine may be busy with other things


# ── the table ──


@dataclass(frozen=True)
class Defence:
    """A piece of the guest, or of a flag for the engine (all flags that start with it, if nothing takes its place)."""

    piece: str
    instead: str = ""

    def __str__(self) -> str:
        return self.piece.strip()


FILTER = Defence("unfiltered = filter_system_calls()", "unfiltered = None")
HIDING = Defence("allow_inspection(False)\n        unfiltered", "unfiltered")
SLEEPING = Defence("allow_inspection(False)\n        null", "null")
CLOSING = Defence("\n        if fd > 3:", "\n        if False:")
PLUG_UID_CHECK = Defence("if uid != PLUG_UID:", "if False:")
BOTH = ("docker", "podman")


@dataclass(frozen=True)
class Attack:
    """A line of the table."""

    does: str
    otherwise: str  # what would come of it without the defence
    code: str  # ends with an expression; see PRELUDE for what it may use
    held: str  # the value that shows that it came to nothing
    defence: Defence
    alone: Sequence[str] = BOTH  # the engines on which nothing else holds it
    gvisor: bool = True  # whether that value is to be seen under gVisor, too (that of 2022, with --ignore-cgroups)


PRELUDE = """
import ctypes, errno, os, platform, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def system_call(x86_64, aarch64, *arguments):
    number = aarch64 if platform.machine() == "aarch64" else x86_64
    ctypes.set_errno(0)
    arguments = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "done"

def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    return "done"

def in_child(action):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(action()).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    os.waitpid(child, 0)
    return said

def status(field):
    return dict(line.rstrip().split(":\\t", 1) for line in open("/proc/self/status"))[field]

def into_the_copy():
    copy = max(int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid()))
    for _ in range(100):  # it may still be falling asleep
        said = [attempt(open, f"/proc/{copy}/mem", "r+b"), attempt(os.listdir, f"/proc/{copy}/fd")]
        if "done" not in said: break
        time.sleep(0.02)
    return said

buffer = ctypes.create_string_buffer(4096)
"""

ATTACKS = [
    # ── process 1, which holds the channel ──
    Attack(
        "looks for descriptors that it was not meant to have",
        "the supervisor's ends of pipes and sockets would be among them",
        "[fd for fd in range(1024) if attempt(os.fstat, fd) == 'done']",
        "[0, 1, 2, 3, 4, 5, 6]",  # the standard ones, the line to the supervisor, and spares of the former
        CLOSING,
    ),
    Attack(
        "reads the secrets of process 1",
        "ids of later calls could be read, and so their results forged",
        "{attempt(open, f'/proc/1/{name}', 'rb') for name in ('mem', 'environ', 'maps', 'auxv', 'pagemap')}",
        "{'EACCES'}",
        HIDING,
        gvisor=False,
    ),
    Attack(
        "writes into the memory of process 1",
        "the supervisor would run code of the attacker's",
        "attempt(open, '/proc/1/mem', 'r+b')",
        "'EACCES'",
        HIDING,
    ),
    Attack(
        "opens the descriptors of process 1",
        "any message could be sent to the host in the supervisor's name",
        "attempt(os.listdir, '/proc/1/fd'), {attempt(os.open, f'/proc/1/fd/{n}', os.O_RDWR) for n in range(16)}",
        "('EACCES', {'EACCES'})",
        HIDING,
        gvisor=False,
    ),
    Attack(
        "looks into the sleeping copy of the worker",
        "it could be changed, or its connection to process 1 used, while it sleeps",
        "into_the_copy()",
        "['EACCES', 'EACCES']",
        SLEEPING,
        gvisor=False,
    ),
    Attack(
        "makes process 1 the first victim of the out-of-memory killer",
        "a call that needs too much memory would end the sandbox, and nobody would say why",
        "attempt(lambda: open('/proc/1/oom_score_adj', 'w').write('1000'))",
        "'EACCES'",
        HIDING,
    ),
    Attack(
        "takes a descriptor out of process 1",
        "the channel to the host would be the attacker's",
        "system_call(438, 438, os.pidfd_open(1), 0, 0)",
        "'EPERM'",
        FILTER,
        alone=(),  # process 1 is hidden as well
        gvisor=False,
    ),
    Attack(
        "traces process 1",
        "the supervisor would do what the attacker likes",
        "[system_call(101, 117, request, 1, 0, 0) for request in (16, 0x4206)]",
        "['EPERM', 'EPERM']",
        FILTER,
        alone=(),  # process 1 is hidden as well
    ),
    Attack(
        "kills, stops and confuses process 1",
        "under gVisor it would be dead; elsewhere the kernel protects it, but not from every signal",
        "kill, tgkill, queue = (62, 129), (234, 131), (129, 138)\n"
        "numbers = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, 64)\n"
        "{system_call(*kill, 1, n) for n in numbers} | {system_call(*tgkill, 1, 1, n) for n in numbers}",
        "{'EPERM'}",
        FILTER,
    ),
    Attack(
        "takes process 1 its open files, memory or processor time by a limit",
        "the supervisor would fail at the next thing it does, and the sandbox be gone",
        "limits = struct.pack('QQ', 1 << 40, 1 << 40)\nsystem_call(302, 261, 1, resource.RLIMIT_AS, limits, 0)",
        "'EPERM'",
        FILTER,
    ),
    Attack(
        "gives process 1 a turn only when nobody else wants one",
        "code that keeps the processor busy would not be stopped at its time-out",
        "attempt(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0)), "
        "attempt(os.sched_setaffinity, 1, os.sched_getaffinity(0))",
        "('EPERM', 'EPERM')",
        FILTER,
    ),
    Attack(
        "plugs itself in as if it were a new host",
        "the attacker would be told the results, and could send calls in the user's name",
        "import array, json\n"
        "reader, writer = os.pipe()\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "connection.connect('\\0python-docker-mcp')\n"
        "request = json.dumps({'session': 'x', 'owner': 'me'}).encode()\n"
        "rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [reader, writer]))\n"
        "attempt(connection.sendmsg, [request], [rights])\n"
        "attempt(connection.recv, 1)\n"
        "os.set_blocking(reader, False)\n"
        "try:\n"
        "    said = os.read(reader, 20)\n"
        "except BlockingIOError:\n"
        "    said = b''\n"
        "said",
        "b''",
        PLUG_UID_CHECK,
    ),
    Attack(
        "becomes the user that plugs are run as, or root",
        "the supervisor would take it for the host, the kernel for the administrator",
        "attempt(os.setuid, 65533), attempt(os.setresuid, 0, 0, 0), attempt(os.setgroups, [0]), os.getuid() > 60000",
        "('EPERM', 'EPERM', 'EPERM', True)",
        Defence("--user"),
    ),
    # ── privileges ──
    Attack(
        "has capabilities",
        "each is a part of what root may do on the host",
        "{status(name) for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')}, "
        "os.getresgid(), set(os.getgroups()) - {65534}",
        "({'0000000000000000'}, (65534, 65534, 65534), set())",
        Defence("--cap-drop"),
        gvisor=False,
    ),
    Attack(
        "gains privileges by a program with the setuid bit",
        "one such program in the image, and the code is root",
        "status('NoNewPrivs')",
        "'1'",
        Defence("--security-opt"),
        alone=(),  # the guest sets the same for itself
        gvisor=False,
    ),
    Attack(
        "mounts, changes its root, makes device files, sets the host's name, opens raw sockets",
        "each is a step to the host or its network",
        "[system_call(165, 40, b'none', b'/tmp', b'tmpfs', 0, 0), attempt(os.chroot, '/tmp'), "
        "attempt(os.mknod, '/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0)), attempt(socket.sethostname, 'x'), "
        "attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)]",
        "['EPERM', 'EPERM', 'EPERM', 'EPERM', 'EPROTONOSUPPORT']",
        Defence("--cap-drop"),
        alone=(),  # an unprivileged user has none of its capabilities in effect
        gvisor=False,
    ),
    # ── system calls: what the engines let through differs, what the guest refuses does not ──
    Attack(
        "opens an io_uring",
        "the part of the kernel with the most holes in recent years would be in reach",
        "system_call(425, 425, 1, buffer)",
        "'EPERM'",
        FILTER,
        alone=("docker",),
    ),
    Attack(
        "makes a user namespace of its own",
        "as root of it, it could reach the parts of the kernel that only root may use",
        "in_child(lambda: [system_call(272, 97, 0x10000000), system_call(56, 220, 0x10000011, 0, 0, 0, 0)])",
        "\"['EPERM', 'EPERM']\"",
        FILTER,
        alone=("podman",),
    ),
    Attack(
        "makes a namespace by clone3, which hides its flags from every filter",
        "the same",
        "system_call(435, 435, buffer, 64)",
        "'ENOSYS'",
        FILTER,
        alone=("podman",),
    ),
    Attack(
        "enters another namespace",
        "a descriptor that leaks in some day would be a way out",
        "system_call(308, 268, os.open('/proc/self/ns/net', os.O_RDONLY), 0)",
        "'EPERM'",
        FILTER,
        alone=(),  # needs CAP_SYS_ADMIN, too
    ),
    Attack(
        "uses the kernel's key rings",
        "they are not in any namespace: keys of others with the same uid could be seen",
        "system_call(250, 219, 0, -3, 0), system_call(248, 217, b'user', b'x', b'y', 1, -3)",
        "('EPERM', 'EPERM')",
        FILTER,
        alone=("podman",),
    ),
    Attack(
        "traces a process, or reads its memory",
        "it could change what another program of the code's own user does",
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(60)\n"
        "found = system_call(101, 117, 0x4206, child, 0, 0), system_call(310, 270, child, 0, 0, 0, 0, 0)\n"
        "os.kill(child, 9)\n"
        "os.waitpid(child, 0)\n"
        "found",
        "('EPERM', 'EPERM')",
        FILTER,
    ),
    Attack(
        "uses bpf, performance counters, page faults of its own",
        "each has been the start of exploits",
        "system_call(321, 280, 0, buffer, 120), system_call(298, 241, buffer, 0, -1, -1, 0), system_call(323, 282, 1)",
        "('EPERM', 'EPERM', 'EPERM')",
        FILTER,
        alone=(),  # both engines refuse them already
    ),
    Attack(
        "talks to the hypervisor: a vsock is in no network namespace",
        "in a virtual machine, services of the host would be in reach although there is no network",
        "attempt(socket.socket, 40, socket.SOCK_STREAM)",
        "'EAFNOSUPPORT'",
        FILTER,
    ),
    Attack(
        "opens sockets of rare families: packet, the kernel's cryptography, Bluetooth, TIPC",
        "old code in the kernel that nobody here needs",
        "{attempt(socket.socket, family, kind) for family in (17, 31, 38, 30, 4, 9) for kind in (1, 2, 3, 5)}",
        "{'EAFNOSUPPORT'}",
        FILTER,
    ),
    Attack(
        "talks to parts of the kernel by netlink: packet filters, transformations, audit, devices, cryptography",
        "more old code in the kernel, with a hole or more each year",
        "{attempt(socket.socket, 16, kind, protocol) for kind in (2, 3) for protocol in range(1, 23)}, "
        "attempt(socket.socket, 16, 3, 0)",
        "({'EAFNOSUPPORT'}, 'done')",
        FILTER,
    ),
    Attack(
        "maps its memory into a pipe",
        "pages that are not its own have been written to this way",
        "reader, writer = os.pipe()\n"
        "system_call(278, 75, writer, struct.pack('QQ', ctypes.addressof(buffer), 4096), 1, 0)",
        "'EPERM'",
        FILTER,
        alone=("docker",),
    ),
    Attack(
        "makes system calls by numbers that filters do not look at (x32)",
        "what is refused under one number would be had under the other",
        "'ENOSYS' if platform.machine() == 'aarch64' else system_call(425 | 1 << 30, 0, 1, buffer)",
        "'ENOSYS'",
        FILTER,
        alone=(),  # this machine's kernel may have no x32
    ),
    # ── files ──
    Attack(
        "writes where it should not",
        "it could leave something for later, or fill the host's disk",
        "def writable(top):\n"
        "    for folder, folders, files in os.walk(top):\n"
        "        if folder == '/':\n"
        "            folders[:] = set(folders) - {'proc', 'sys'}\n"
        "        for path in [folder, *(os.path.join(folder, name) for name in files)]:\n"
        "            kind = stat.S_IFMT(os.stat(path).st_mode) if os.path.exists(path) else None\n"
        "            if kind in (stat.S_IFREG, stat.S_IFDIR) and os.access(path, os.W_OK):\n"
        "                folders.clear()\n"
        "                yield path\n"
        "sorted(set(writable('/')) - {'/dev/mqueue'})",
        "['/app', '/dev/shm', '/tmp']",
        Defence("--read-only-tmpfs=false"),
        alone=("podman",),
    ),
    Attack(
        "writes into the root file system",
        "the same, if a file there is writable for everybody",
        "os.statvfs('/').f_flag & os.ST_RDONLY, os.statvfs('/packages').f_flag & os.ST_RDONLY",
        "(1, 1)",
        Defence("--read-only"),
        gvisor=False,
    ),
    Attack(
        "runs programs from /tmp, or has devices and setuid programs in what it can write to",
        "the usual place to drop them",
        "[os.statvfs(path).f_flag & (os.ST_NOSUID | os.ST_NODEV) for path in ('/tmp', '/app', '/dev/shm')], "
        "os.statvfs('/tmp').f_flag & os.ST_NOEXEC",
        "([6, 6, 6], 8)",
        Defence("rw,nosuid,nodev", "rw,suid,dev"),
        gvisor=False,
    ),
    Attack(
        "fills the places where it may write",
        "the host's disk or memory would be full",
        "def fill(folder):\n"
        "    path, written = folder + '/file', 0\n"
        "    try:\n"
        "        with open(path, 'wb', buffering=0) as file:\n"
        "            while written < 100 << 20:\n"
        "                written += file.write(bytes(1 << 20))\n"
        "    except OSError as error:\n"
        "        return written, errno.errorcode[error.errno]\n"
        "    finally:\n"
        "        if os.path.exists(path):\n"
        "            os.unlink(path)\n"
        "{fill(folder) for folder in ('/tmp', '/app', '/dev/shm')}",
        repr({(64 << 20, "ENOSPC")}),
        Defence(f"={64 << 20}", f"={128 << 20}"),
    ),
    Attack(
        "uses a device",
        "disks, kernel memory, graphics cards",
        "sorted((os.major(s.st_rdev), os.minor(s.st_rdev)) for s in map(os.stat, "
        "(f'/dev/{name}' for name in os.listdir('/dev'))) if stat.S_ISBLK(s.st_mode) or stat.S_ISCHR(s.st_mode) "
        "and (os.major(s.st_rdev), os.minor(s.st_rdev)) not in "
        "((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)))",  # null, zero, full, random, urandom, tty, ptmx
        "[]",
        Defence("--device"),
        alone=(),  # the engines give none unless asked to
        gvisor=False,
    ),
    Attack(
        "changes the kernel's settings",
        "they are the host's",
        "{attempt(open, path, 'w') for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/panic_on_oom', "
        "'/proc/sysrq-trigger', '/sys/fs/cgroup/cgroup.procs', '/sys/kernel/mm/ksm/run')} "
        "<= {'EROFS', 'EACCES', 'ENOENT'}",
        "True",
        Defence("--user"),
        alone=(),  # they are read-only, too
    ),
    # ── the host ──
    Attack(
        "looks for an engine's socket",
        "whoever can talk to the engine is root on the host",
        "[os.path.join(folder, name) for folder, _, names in os.walk('/') if not folder.startswith('/proc') "
        "for name in names if stat.S_ISSOCK(os.lstat(os.path.join(folder, name)).st_mode)]",
        "[]",
        Defence("--mount"),
        alone=(),  # nothing mounts it: configured mounts of it are refused
    ),
    Attack(
        "looks for the host's environment",
        "API keys of the server",
        "sorted(set(os.environ) - {'PATH', 'HOSTNAME', 'TERM', 'container', 'HOME', 'TMPDIR', 'LANG', 'USER', "
        "'MPLBACKEND', 'MPLCONFIGDIR', 'JOBLIB_MULTIPROCESSING'} "
        "- {name for name in os.environ if name.endswith('_NUM_THREADS')} "
        "- {name for name in os.environ if name.lower().endswith('_proxy') and not os.environ[name]})",
        "[]",
        Defence("--env"),
        alone=(),  # of the variables of this process the engines copy only those of proxies
    ),
    Attack(
        "looks for the name of the host, and of its name servers",
        "a company's domains and machines",
        "socket.gethostname(), [line for line in (open('/etc/resolv.conf') if os.path.exists('/etc/resolv.conf') "
        "else []) if not line.startswith('nameserver 0.0.0.0') and line.strip()]",
        "('sandbox', [])",
        Defence("--hostname"),
    ),
    Attack(
        "sees processes of the host or of other containers",
        "it could send them signals, and read what they are doing",
        "max(int(name) for name in os.listdir('/proc') if name.isdigit()) < 10_000 and "
        "os.path.basename(os.readlink('/proc/self/exe')).startswith('python') and "
        "b'take(count)' in open('/proc/1/cmdline', 'rb').read()",
        "True",
        Defence("--pid"),
        alone=(),  # the engines' default
    ),
    # ── network ──
    Attack(
        "uses the network: by address, the engine's own, by name",
        "data could leave, and machines inside the firewall be reached",
        "interfaces = [line.split(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]]\n"
        "addresses = ('1.1.1.1', 53), ('172.17.0.1', 80), ('2606:4700:4700::1111', 53)\n"
        "came_through = 'done' in [attempt(socket.create_connection, address, 5) for address in addresses]\n"
        "sorted(set(interfaces) - {'lo'}), came_through, attempt(socket.getaddrinfo, 'example.com', 80) == 'done'",
        "([], False, False)",
        Defence("--network=none"),
    ),
    # ── limits ──
    Attack(
        "forks until nothing goes any more",
        "the host's table of processes would be full",
        "pids = []\n"
        "try:\n"
        "    while len(pids) < 600:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            time.sleep(60)\n"
        "        pids.append(pid)\n"
        "except BlockingIOError:\n"
        "    pass\n"
        "for pid in pids:\n"
        "    os.kill(pid, 9)\n"
        "    os.waitpid(pid, 0)\n"
        "200 < len(pids) < 256",
        "True",
        Defence("--pids-limit"),
        gvisor=False,
    ),
    Attack(
        "opens files until nothing goes any more",
        "the host's table of open files would be full",
        "files = []\n"
        "try:\n"
        "    while len(files) < 5000:\n"
        "        files.append(os.dup(1))\n"
        "except OSError as error:\n"
        "    reason = errno.errorcode[error.errno]\n"
        "for fd in files:\n"
        "    os.close(fd)\n"
        "resource.getrlimit(resource.RLIMIT_NOFILE), len(files) <= 1020",
        "((1024, 1024), True)",
        Defence("nofile=1024:1024", "nofile=4096:4096"),
    ),
    Attack(
        "leaves core files",
        "the memory of a crashed process would be on the host's disk",
        "resource.getrlimit(resource.RLIMIT_CORE)",
        "(1, 1)",
        Defence("--ulimit=core"),
    ),
    Attack(
        "takes more processor time than its part",
        "other work on the host would crawl",
        "def text(*paths):\n"
        "    return next(open(path).read() for path in paths if os.path.exists(path))\n"
        "quota = text('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_quota_us').split()[0]\n"
        "period = text('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_period_us').split()[-1]\n"
        "int(quota.replace('max', '-1')) / int(period)",
        "0.5",
        Defence("--cpus"),
        gvisor=False,
    ),
    Attack(
        "goes on in swap when its memory is full",
        "a sandbox would have twice the memory, and the host would grind",
        "def limit(*paths):\n"
        "    return next((open(path).read().strip() for path in paths if os.path.exists(path)), None)\n"
        "limit('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'), "
        "limit('/sys/fs/cgroup/memory.swap.max', '/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes') in "
        "('0', str(256 << 20), None)",
        repr((str(256 << 20), True)),
        Defence("--memory-swap"),
        gvisor=False,
    ),
]


# ── helpers ──


def fixed(config: Config) -> Config:
    """Settings for a sandbox that is started when it is needed, and whose session does not outlive a test by long."""
    pool = PoolConfig(warm=0)
    return dataclasses.replace(
        config, session=SessionConfig(idle_timeout=300), package=PackageConfig(preinstalled=()), pool=pool
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less time between an interruption and the kill, of which there are many here."""
    monkeypatch.setattr(sandbox_runner, "INTERRUPT_GRACE", 0.4)


@pytest.fixture
async def runner(config: Config, session: str) -> AsyncIterator[Runner]:
    """A runner; the session of the test is closed after it."""
    async with run_closed(config, session) as runner:
        yield runner


@asynccontextmanager
async def run_closed(config: Config, session: str) -> AsyncIterator[Runner]:
    """A runner whose session is closed in the end; nothing in it takes for ever."""
    with anyio.fail_after(PATIENCE):
        async with open_runner(fixed(config)) as runner:
            try:
                yield runner
            finally:
                await runner.close_session(session)


async def evaluate(runner: Runner, code: str, session: str | None = None) -> str:
    """The value of code that has to end well."""
    result = await runner.execute(code, session=session, timeout=PATIENCE)
    assert (result.status, result.exception) == ("ok", None), result
    assert result.value is not None
    return result.value


# ── the table, tried ──


async def test_every_attack_of_the_table_comes_to_nothing(runner: Runner, session: str) -> None:
    attacks = [attack for attack in ATTACKS if attack.gvisor or not runner.config.docker.runtime]
    assert await what_comes_through(attacks, runner, session) == {}


async def what_comes_through(attacks: Sequence[Attack], runner: Runner, session: str) -> dict[str, object]:
    """The attacks that do not come to nothing, all in one session: what one of them breaks, the next ones would see."""
    came_through: dict[str, object] = {}
    await evaluate(runner, "1 + 1", session)
    for attack in attacks:
        result = await runner.execute(PRELUDE + attack.code, session=session, timeout=PATIENCE)
        if result.value != attack.held or result.lost_before:
            came_through[attack.does] = result.value or result
    assert await evaluate(runner, "1 + 1", session) == "2"
    return came_through


DEFENCES = list(dict.fromkeys(attack.defence for attack in ATTACKS if attack.alone))


@pytest.mark.parametrize("defence", DEFENCES, ids=str)
async def test_without_its_defence_an_attack_succeeds(
    config: Config, session: str, engine_command: str, defence: Defence, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = [attack for attack in ATTACKS if attack.defence == defence and engine_command in attack.alone]
    remove(defence, monkeypatch)
    held = []
    async with run_closed(config, session) as runner:
        await evaluate(runner, "1 + 1", session)
        for attack in attacks:
            result = await runner.execute(PRELUDE + attack.code, session=session, timeout=PATIENCE)
            if result.value == attack.held:
                held.append(attack.does)
    assert held == []


def remove(defence: Defence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sandboxes started without a defence."""
    if defence.piece in sandbox_runner.GUEST_SOURCE:
        assert sandbox_runner.GUEST_SOURCE.count(defence.piece) == 1
        weak = sandbox_runner.GUEST_SOURCE.replace(defence.piece, defence.instead)
        monkeypatch.setattr(sandbox_runner, "GUEST_SOURCE", weak)
        return
    complete = Engine.sandbox_arguments

    def without(engine: Engine, name: str, image: Image, config: Config, labels: Mapping[str, str]) -> list[str]:
        flags = complete(engine, name, image, config, labels)
        if not defence.instead:
            return [flag for flag in flags if not flag.startswith(defence.piece)]
        return [flag.replace(defence.piece, defence.instead) for flag in flags]

    monkeypatch.setattr(Engine, "sandbox_arguments", without)


# ── neighbours ──


@dataclass(frozen=True)
class Taking:
    """What one sandbox takes of what all on the host share, and how a neighbour notices."""

    takes: str
    code: str
    noticed: str  # by code in a sandbox of another server, whose value is `unharmed` if it does not notice
    unharmed: str
    defence: Defence


TAKINGS = [
    Taking(
        "inotify instances, of which a user has 128",
        "[libc.inotify_init() for _ in range(200)][-1]",
        "libc.inotify_init() > 0 or os.strerror(ctypes.get_errno())",
        "True",
        Defence("OWN_USERS", "NOBODY"),
    ),
    Taking(
        "signals that wait, and timers with them, of which a user has as many as a process may have",
        "timer, taken = ctypes.c_void_p(), 0\n"
        "while libc.timer_create(0, None, ctypes.byref(timer)) == 0: taken += 1\n"
        "taken > 9",
        "libc.timer_create(0, None, ctypes.byref(ctypes.c_void_p()))",
        "0",
        Defence("OWN_USERS", "NOBODY"),
    ),
]
FILLINGS = {  # by kind of socket, code that has the kernel hold memory that it counts for no container
    "udp": (
        "sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)\n"
        "sink.bind(('127.0.0.1', 0))\n"
        "for _ in range(8): sink.sendto(bytes(60000), socket.MSG_DONTWAIT, sink.getsockname())\n"
        "held.append(sink)"
    ),
    "tcp": (
        "held.append((socket.create_connection(listener.getsockname()), listener.accept()))\n"
        "held[-1][0].setblocking(False)\n"
        "attempt(lambda: [held[-1][0].send(bytes(1 << 20)) for _ in range(99)])"
    ),
    "tcp that nobody accepts": (
        "for _ in range(40): socket.create_connection(listener.getsockname())\n"
        "listener = socket.create_server(('127.0.0.1', 0), backlog=1000)\n"
        "held.append(listener)"
    ),
    "netlink": (
        "held.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))\n"
        "question = struct.pack('IHHIIBxHiII', 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0)\n"
        "attempt(lambda: [held[-1].send(question, socket.MSG_DONTWAIT) for _ in range(400)])"
    ),
}
FILL = """
held, listener = [], socket.create_server(('127.0.0.1', 0), backlog=1000)
deadline = time.monotonic() + SECONDS
while time.monotonic() < deadline and len(held) < 450:
    BODY
time.sleep(SECONDS)
"""


def filling(kind: str, seconds: int) -> str:
    """Code that fills sockets for so long at most, and then waits as long: the next look may be due in seconds."""
    return PRELUDE + FILL.replace("BODY", FILLINGS[kind].replace("\n", "\n    ")).replace("SECONDS", str(seconds))


COUNTING = Defence("if problem and self.worker.id:", "if False:")


@pytest.mark.parametrize("is_defended", [True, False])
async def test_code_that_opens_many_terminals_of_which_all_containers_have_3072_is_stopped(
    config: Config, session: str, is_defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_defended:
        remove(Defence("terminals > TERMINALS", "terminals > 1 << 20"), monkeypatch)
    code = "import os, time\nheld = [os.openpty() for _ in range(40)]\nlen(held)"
    async with run_closed(config, session) as runner:
        assert (await runner.execute(f"{code}; time.sleep(1)", session=session)).status == "ok", "40 are few"
        result = await runner.execute(f"more = held[:]\n{code}\ntime.sleep(2)", session=session)
        assert result.status == ("died" if is_defended else "ok")
        if is_defended:
            assert result.message
            number = int(result.message.split()[3])  # so many, when the supervisor looked
            assert result.message == f"the code had {number} pseudo-terminals open, and a sandbox may have 64"
            assert 64 < number <= 80


@pytest.mark.in_turns
@pytest.mark.parametrize("kind", FILLINGS)
@pytest.mark.parametrize("is_between", [False, True], ids=["in a call", "between two calls"])
async def test_code_whose_sockets_hold_much_of_the_kernels_memory_is_stopped(
    runner: Runner, session: str, kind: str, is_between: bool
) -> None:
    code = filling(kind, 30)
    if not is_between:
        result = await runner.execute(code, session=session)
        assert (result.status, result.message) == ("died", "the code's sockets held over 64 MB that nobody had read")
        assert await evaluate(runner, "1 + 1", session) == "2"
        return
    later = f"import threading\nthreading.Thread(target=exec, args=({code!r}, {{}})).start()"
    assert (await runner.execute(later, session=session)).status == "ok"
    with anyio.fail_after(PATIENCE):
        while not (result := await runner.execute("1 + 1", session=session)).lost_before:
            if result.status != "ok":  # it met a call, though there is hardly time for that
                break
            await anyio.sleep(1)
    assert (result.lost_before or result.message) == "the code's sockets held over 64 MB that nobody had read"


@pytest.mark.in_turns
@pytest.mark.parametrize("kind", FILLINGS)
async def test_without_the_count_of_sockets_memory_such_code_goes_on(
    config: Config, session: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(COUNTING, monkeypatch)
    async with run_closed(config, session) as runner:
        assert (await runner.execute(filling(kind, 1), session=session)).status == "ok"


@pytest.mark.parametrize("taking", TAKINGS, ids=lambda taking: taking.takes)
@pytest.mark.parametrize("is_defended", [True, False])
async def test_a_neighbour_does_not_notice_what_a_sandbox_takes(
    config: Config, session: str, taking: Taking, is_defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_defended:
        monkeypatch.setattr(sandbox_runner, taking.defence.piece, (sandbox_runner.NOBODY,))
    config = dataclasses.replace(config, docker=dataclasses.replace(config.docker, timeout=PATIENCE))
    async with run_closed(config, session) as runner, open_runner(fixed(config)) as neighbour:
        await evaluate(neighbour, "1", f"{session}-b")
        taken = await runner.execute(PRELUDE + taking.code, session=session)
        assert taken.status == "ok", taken
        seen = await evaluate(neighbour, PRELUDE + taking.noticed, f"{session}-b")
        await neighbour.close_session(f"{session}-b")
    assert (seen == taking.unharmed) == is_defended, seen


# ── the channel between worker and supervisor ──

# Descriptor 3 is the worker's line to the supervisor: code can use it, as it can all of its own process.
FORGE = """
import json, os, sys
def forge(call_id, data=None, **fields):
    frame = {"id": call_id, "kind": "done", "status": "ok", "value": "forged", **fields}
    if data is not None: frame["data"] = len(data)
    os.write(3, json.dumps(frame).encode() + b"\\n" + (data or b""))
def find_worker():
    frame = sys._getframe()
    while "call" not in getattr(frame.f_locals.get("self"), "__dict__", {}):
        frame = frame.f_back
    return frame.f_locals["self"]
worker = find_worker()
mine = worker.call
"""


@pytest.mark.in_turns
async def test_forged_frames_of_other_calls_change_nothing(runner: Runner, session: str) -> None:
    """Otherwise: a thread that an earlier call left could answer for every later one."""
    code = FORGE + "for call_id in ('', 'x', None, 5, [], '0' * 16): forge(call_id)\n6 * 7"
    assert await evaluate(runner, code, session) == "42"
    code = """
import threading, time
stop = forged = 0
def spam():
    global forged
    while worker.call in (mine, None):
        time.sleep(0.01)
    while not stop:
        forge(mine)
        forged += 1
threading.Thread(target=spam).start()
6 * 7
"""
    assert await evaluate(runner, FORGE + code, session) == "42"
    for number in range(20):  # each while the thread sends forged ends of the first call
        code = f"seen = forged\nwhile forged == seen: time.sleep(0.001)\n{number}"
        assert await evaluate(runner, code, session) == str(number)
    await evaluate(runner, "stop = True\n0", session)


async def test_frames_on_the_standard_streams_are_just_output(runner: Runner) -> None:
    """Otherwise: a print would be enough to forge a result."""
    frame = json.dumps({"id": "", "kind": "done", "status": "ok", "value": "forged"})
    code = f"import os\nos.write(1, {frame!r}.encode() + b'\\n')\nos.write(2, b'{{}}')\nos.write(0, b'{{}}')\n6 * 7"
    result = await runner.execute(code)
    assert (result.stdout, result.stderr, result.value) == (f"{frame}\n", "{}", "42")


@pytest.mark.in_turns
async def test_a_frame_that_no_worker_sends_ends_the_call_and_not_the_session(runner: Runner, session: str) -> None:
    """Otherwise: one such frame would stop the supervisor, fill its memory, or deceive the host."""
    attacks = [
        "os.write(3, b'nonsense' + bytes([10]))",
        "os.write(3, b'[1]' + bytes([10]))",
        "while True: os.write(3, b'x' * 65536)",
        "os.write(3, b'[' * 900000 + bytes([10]))",
        "os.write(3, b'1' * 900000 + bytes([10]))",
        "os.write(3, bytes([255, 10]))",
        "os.write(3, b'{\"data\": 4194305}' + bytes([10]))",
        "forge(mine, kind='ready')",
        "forge(mine, kind=['done'])",
        "forge(mine, status='splendid')",
        "forge(mine, status='timeout')",
        "forge(mine, status={})",
        "forge(mine, cpu=0.0, exception={'type': []})",
        "forge(mine, message='all is well')",
        "forge(mine, cpu=10 ** 400)",
        "forge(mine, cpu=0.0, value=json.loads('[' * 200 + ']' * 200))",
        (
            "text = json.dumps({'id': mine, 'kind': 'done', 'status': 'ok', 'cpu': 0.0, 'value': 0})[:-2]\n"
            "os.write(3, (text + '[' * 987 + ']' * 987 + '}').encode() + bytes([10]))"
        ),
        "forge(mine, kind='display', data=b'x')",
        "while True: forge(mine, kind='content', path='x', data=b'x' * 65536)",
    ]
    await evaluate(runner, "1", session)
    for attack in attacks:
        code = f"{FORGE}import time\nkept = 1\n{attack}\ntime.sleep(60)"
        result = await runner.execute(code, session=session)
        assert (result.status, result.state) == ("died", "restored"), attack
        assert result.message
        assert await evaluate(runner, "'kept' in globals()", session) == "False"
    for attack in ("memory=1e999", "exception={}", "exit_code=True"):
        await evaluate(runner, "kept = 1; 1", session)
        code = f"{FORGE}forge(mine, cpu=0.0, {attack})\nimport time\ntime.sleep(60)"
        result = await runner.execute(code, session=session)
        assert (result.status, result.state) == ("died", "lost"), attack
        assert "what no supervisor sends" in str(result.message)
        assert (await runner.execute("'kept' in globals()", session=session)).value == "False"


@pytest.mark.in_turns
async def test_a_worker_that_lets_go_of_its_descriptors_is_told_of_and_replaced(runner: Runner, session: str) -> None:
    """Otherwise: nobody would ever answer, neither to this call nor to later ones."""
    await evaluate(runner, "1", session)
    for code, status in (("os.closerange(0, 100)", "died"), ("os.close(3)\nwhile True: pass", "timeout")):
        result = await runner.execute(f"import os\n{code}", session=session, timeout=0.5 if status == "timeout" else 30)
        assert (result.status, result.state) == (status, "restored")
        assert await evaluate(runner, "6 * 7", session) == "42"


# ── later calls ──


@pytest.mark.in_turns
async def test_what_a_daemon_says_between_two_calls_is_not_told_as_the_next_ones_output(
    runner: Runner, session: str
) -> None:
    """Otherwise: an earlier call could put words into the mouth of a later one."""
    daemon = """
import ctypes, os, time
open("trigger", "w").close()
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
libc.inotify_add_watch(watch, b"trigger", 0x20)  # IN_OPEN
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.read(watch, 1000)
        print("late", flush=True)
        open("said", "w").write("x")
        time.sleep(60)
    os._exit(0)
print("mine")
"""
    assert (await runner.execute(daemon, session=session)).stdout == "mine\n"
    await runner.read_file(session, "trigger")  # by the supervisor, while no call is running
    while not await said(runner, session):
        await anyio.sleep(0.01)
    result = await runner.execute("print('yours')", session=session)
    assert (result.earlier, result.stdout) == ("late\n", "yours\n")


async def said(runner: Runner, session: str) -> bytes:
    """What is in the file `said`, which may not be there yet."""
    with contextlib.suppress(RequestError):
        return await runner.read_file(session, "said")
    return b""


@pytest.mark.in_turns
async def test_nothing_of_a_call_that_was_given_up_survives_it(config: Config, session: str) -> None:
    """Otherwise: what does not stop at its time-out would go on for as long as the session lives."""
    # Without restoring, as the copy for that is a process, too, and looks like one that has survived.
    settings = dataclasses.replace(config, session=SessionConfig(restore=False))
    bomb = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError: pass
"""
    code = """
import os
others = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid()}
for process in list(others)[:3]:
    try:
        print(open(f"/proc/{process}/stat").read()[:60])
    except OSError:
        pass
print(len(others), "others")
"""
    async with open_runner(settings) as runner:
        result = await runner.execute(bomb, session=session, timeout=0.5)
        assert (result.status, result.state) == ("timeout", "lost")
        said = ""
        with anyio.move_on_after(60):
            while said != "0 others":  # hundreds that were killed take a while to be gone
                said = (await runner.execute(code, session=session)).stdout.strip()
        assert said == "0 others"
        await runner.close_session(session)


POISON = """
import atexit, builtins, json, os, signal, sys, threading, time
def lie(*_, **__):
    return '{"status": "ok"}'
"""


@pytest.mark.in_turns
@pytest.mark.parametrize("restore", [False, True])
async def test_whatever_code_does_to_its_interpreter_what_is_said_of_the_call_is_true(
    config: Config, session: str, restore: bool
) -> None:
    """Otherwise: a call that hangs, ends its process or loses the variables could be told as one that went well."""
    attacks = [  # poison, what the next call does, how both have to be told, whether the variables are still there
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "while True: pass", "ok timeout", True),
        ("signal.signal = signal.pthread_sigmask = lie", "time.sleep(60)", "ok timeout", True),
        ("time.monotonic = time.time = time.sleep = lie", "while True: pass", "ok timeout", True),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))", "while True: pass", "ok timeout", False),
        ("pass", "os.kill(os.getpid(), signal.SIGSTOP)", "ok timeout", True),
        ("sys.settrace(lie); sys.setprofile(lie)", "os._exit(0)", "error died", False),
        ("json.JSONEncoder.encode = lie", "1", "timeout ok", False),
        ("json.loads = lie", "1", "ok died", False),
        ("os.write = lambda fd, data: len(data)", "1", "ok ok", True),
        ("os.writev = lambda fd, parts: sum(map(len, parts))", "1", "timeout ok", False),
        ("builtins.compile = builtins.exec = builtins.isinstance = None", "1", "died ok", False),
        ("os.getpid = lambda: 1", "1", "died ok", False),
        ("sys.modules.clear()", "os._exit(1)", "ok died", False),
        ("sys.setrecursionlimit(60); sys.stdout = sys.stderr = None", "os.abort()", "ok died", False),
    ]
    settings = dataclasses.replace(fixed(config), session=SessionConfig(idle_timeout=300, restore=restore))
    async with open_runner(settings) as runner:
        for change, then, statuses, kept in attacks:
            await evaluate(runner, "kept = 1\n0", session)
            times = [0.5 if status == "timeout" else 10 for status in statuses.split()]  # the host may be busy
            first = await runner.execute(f"{POISON}{change}", session=session, timeout=times[0])
            second = await runner.execute(then, session=session, timeout=times[1])
            are_kept = "lost" not in (first.state, second.state) and second.lost_before is None
            if not restore:
                assert (f"{first.status} {second.status}", are_kept) == (statuses, kept), (change, first, second)
            assert await evaluate(runner, "'kept' in globals()", session) == str(are_kept), (change, first, second)
            await runner.close_session(session)


@pytest.mark.in_turns
async def test_hooks_at_the_end_of_a_script_can_neither_hang_it_nor_change_its_result(runner: Runner) -> None:
    """Otherwise: a transient call would never end, or end as it likes."""
    hooks = "import atexit, threading, time\natexit.register(time.sleep, 60)\n1"
    assert (await runner.execute(hooks, timeout=0.5)).status == "timeout"
    result = await runner.execute(f"{FORGE}import atexit\natexit.register(forge, 'x')\n6 * 7")
    assert (result.status, result.value) == ("ok", "42")


# ── floods, and bounds on the host ──


def reset_peak() -> None:
    """Have the kernel forget how much memory this process has needed so far."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The most bytes of memory that this process has needed since."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


@pytest.mark.in_turns
@pytest.mark.parametrize(
    "flood",
    [
        "while True: os.write(1, b'x' * 65536)",
        "while True: os.write(1, b'x')",
        "while True: os.write(1, b'x'); os.write(2, b'x'); time.sleep(0)",
        "threading.Thread(target=lambda: [os.write(1, b'x' * 65536) for _ in iter(int, 1)], daemon=True).start()",
        "while True: forge('x', value='x' * 900_000)",
        "while True: forge(mine, kind='state', data=b'{}', left_out={'x' * 100_000: 'y'})",
        "while True: display('x' * 100_000)",
    ],
)
async def test_a_flood_costs_the_host_no_more_than_its_limits(runner: Runner, session: str, flood: str) -> None:
    """Otherwise: the server would grow until it is killed, with all its sessions."""
    await evaluate(runner, "1", session)
    reset_peak()
    before = peak_memory()
    result = await runner.execute(f"{FORGE}import threading, time\n{flood}", session=session, timeout=1)
    assert sum(len(item.text) for item in result.output if isinstance(item, Text)) <= 8 << 20
    assert peak_memory() - before < 150 << 20
    assert await evaluate(runner, "6 * 7") == "42"


# ── memory ──


async def test_files_count_as_memory_and_the_session_goes_on(runner: Runner, session: str) -> None:
    """Otherwise: three full folders would be memory that nobody counts.

    Some 100 MB are left, which no code fills before the supervisor has looked at what it has asked for.
    """
    code = "\n".join(f"open('{folder}/x', 'wb').write(bytes(40 << 20))" for folder in ("/tmp", "/app", "/dev/shm"))
    await evaluate(runner, f"{code}\n1", session)
    result = await runner.execute("x = bytearray(b'x') * (200 << 20)", session=session)
    assert (result.status, result.state) == ("out_of_memory", "restored")
    assert await evaluate(runner, "6 * 7", session) == "42"


async def test_many_processes_that_need_much_memory_together_are_stopped(runner: Runner, session: str) -> None:
    """Otherwise: a limit for each process would be none for all."""
    code = """
import os, time
children = []
for _ in range(8):
    children.append(os.fork())
    if children[-1] == 0:
        kept = bytearray(b'x') * (50 << 20)
        time.sleep(60)
while children:
    _, status = os.waitpid(-1, 0)
    if os.WIFSIGNALED(status): break
os.WTERMSIG(status)
"""
    result = await runner.execute(code, session=session)
    assert (result.status, result.value) == ("ok", "9") or result.status == "out_of_memory"
    assert result.oom_kills > 0
    assert await evaluate(runner, "6 * 7", session) == "42"


# ── gVisor ──


@pytest.fixture
def gvisor() -> Config:
    """Settings for Docker with the runtime runsc."""
    if problem := why_unusable("docker"):
        pytest.skip(problem)
    command = ["docker", "info", "--format={{json .Runtimes}}"]
    if "runsc" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        pytest.skip("Docker here has no runtime runsc: `sh tests/engines.sh test` says why, or sets it up")
    return Config(docker=DockerConfig(command="docker", image="host", runtime="runsc"))


async def test_under_gvisor_sessions_work_and_what_does_not_need_the_hosts_kernel_holds(
    gvisor: Config, session: str
) -> None:
    async with run_closed(gvisor, session) as runner:
        assert await what_comes_through([attack for attack in ATTACKS if attack.gvisor], runner, session) == {}
        assert await evaluate(runner, "kept = 41\nkept + 1", session) == "42"
        result = await runner.execute("import time\ntime.sleep(60)", session=session, timeout=0.5)
        assert (result.status, result.state) == ("timeout", "preserved")
        result = await runner.execute("import os\nos.fork()\nos._exit(3)", session=session)
        assert (result.status, result.exit_code, result.state) == ("died", 3, "lost")
        assert await evaluate(runner, "'kept' in globals()", session) == "False"


async def test_under_gvisor_a_session_ends_with_its_host_as_no_plug_could_be_told_from_the_code(
    gvisor: Config, session: str
) -> None:
    """Otherwise: nobody could use the session, nor its name, until it has not been used for a long time."""
    async with run_closed(gvisor, session) as runner:
        async with open_runner(fixed(gvisor)) as first:
            await first.execute("kept = 1", session=session)
        assert await evaluate(runner, "'kept' in globals()", session) == "False"


# ── what does not hold, and is not said to ──


async def test_the_import_policy_is_a_guard_rail_that_can_be_climbed_over(config: Config, session: str) -> None:
    """It keeps honest programs on their path. What holds the others is the container: see SECURITY.md."""
    async with run_closed(dataclasses.replace(config, blocked_modules=("os",)), session) as runner:
        result = await runner.execute("import os", session=session)
        assert result.exception is not None
        assert result.exception.type == "ImportError"
        assert int(await evaluate(runner, "import random\nrandom._os.getuid()", session)) > 60_000
