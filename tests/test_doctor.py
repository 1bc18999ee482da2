"""The doctor: what it makes of what it sees, that it sees missing walls, and that real engines' walls hold."""

from __future__ import annotations

import builtins
import dataclasses
import dis
import json
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FakeEngine

import sandbox_runner
from sandbox_runner import (
    ENGINE_CHECKS,
    PROBE_MODULES,
    PROBE_SOURCE,
    SANDBOX_CHECKS,
    Config,
    DockerConfig,
    Engine,
    Examination,
    ExceptionInfo,
    Finding,
    Image,
    Omitted,
    PackageConfig,
    Result,
    Text,
    _print_findings,
    component_version,
    examine,
    import_name,
    judge,
    open_runner,
    print_table,
    runc_problem,
    version_in,
)

CHECKS = dict((*ENGINE_CHECKS, *SANDBOX_CHECKS))
LOOK: dict[str, Any] = {  # what the probe sees in a sandbox in which all is well
    "status": dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0000000000000000"),
    "no_new_privs": 1,
    "seccomp": 2,
    "status_of_1": {"NoNewPrivs": "1", "Seccomp": "2"},
    "users": [65534] * 6,
    "user_map": ["0", "100000", "65536"],
    "environment": {"HOME": "/tmp", "HTTP_PROXY": ""},
    "cgroups": {"memory": "268435456", "swap": "0", "cpu": "50000 100000", "pids": "256"},
    "cgroup_version": 2,
    "host_swap": "1000",
    "cpus": 2,
    "creating": {"/": "EROFS", "/packages": "EROFS"},
    "writable": ["/tmp", "/app", "/dev/shm"],
    "devices": [],
    "networks": ["lo"],
    "connecting": "ENETUNREACH",
    "resolving": "gaierror",
    "process_1": {"mem": "EACCES", "fd": "EACCES", "ptrace": "EPERM"},
    "system_calls": {"io_uring": "ENOSYS", "vsock": "EPERM"},
    "files": 1020,
    "becoming_root": "EPERM",
    "changing_root": "EPERM",
    "making_a_device": "EPERM",
}
RUNSC = {"DefaultRuntime": "runsc", "Runtimes": {"runsc": {"runtimeArgs": ["--ignore-cgroups"]}}}


def telling(seen: Any) -> Result:
    """An attempt that told this."""
    return Result("ok", variables={"seen": seen})


def examination(
    results: dict[str, Result] | None = None, docker: dict[str, Any] | None = None, **facts: Any
) -> Examination:
    """One in which all is well, but for what is given; what the probe sees may be given by its name."""
    look = {name: facts.pop(name, value) for name, value in LOOK.items()}
    well = {
        "look": telling(look),
        "cpu": telling(0.5),
        "processes": telling([254, "EAGAIN"]),
        "disk": telling({"/tmp": [64 << 20, "ENOSPC"], "/app": [None, "ENOSPC"]}),
        "output": Result("ok", (Text("stdout", "x" * 1000), Omitted(9 << 20))),
        "interrupt": Result("timeout", state="preserved"),
        "memory": Result("out_of_memory"),
        "kill": Result("ok"),
        "stubborn": Result("timeout"),
        "imports": telling({"numpy": None}),
    }
    facts.setdefault("version", {"Server": {"Components": [{"Name": "runc", "Version": "1.3.3"}]}})
    facts.setdefault("info", {"DefaultRuntime": "runc", "CgroupVersion": "2", "CgroupDriver": "systemd"})
    facts.setdefault("image", Image("image", "sha256:1", "derived"))
    config = Config(DockerConfig(**(docker or {})))
    return Examination(config, Engine("/bin/docker", "docker", "28.0.0"), results={**well, **(results or {})}, **facts)


def verdict(check: str, **facts: Any) -> Finding:
    """What a check finds in an examination."""
    return judge(check, CHECKS[check], examination(**facts))


# ── the judgement ──


@pytest.mark.parametrize("check", CHECKS)
def test_where_all_is_well_every_check_says_so_and_has_no_remedy(check: str) -> None:
    finding = verdict(check)
    assert (finding.verdict, finding.remedy) == ("ok", ""), finding
    assert finding.seen


@pytest.mark.parametrize(
    ("check", "expected", "facts"),
    [
        ("engine", "warning", {"version": {"Server": {"Components": [{"Name": "Podman Engine"}]}}}),
        ("runtime", "warning", {"info": {}}),
        ("runtime", "warning", {"version": {"Server": {"Components": [{"Name": "runc", "Version": "1.1.5+ds1"}]}}}),
        ("image", "warning", {"is_hosts": True}),
        (
            "image",
            "failed",
            {"image": Image("image", "sha256:1", "pulled", "numpy could not be preinstalled: no index")},
        ),
        ("start-up", "warning", {"start": 30.0}),
        (
            "imports",
            "failed",
            {"results": {"imports": telling({"numpy": "ModuleNotFoundError: No module named 'numpy'"})}},
        ),
        ("imports", "failed", {"results": {"imports": Result("out_of_memory")}}),
        ("imports", "warning", {"results": {"imports": Result("timeout")}}),
        ("package volume", "failed", {"creating": {"/": "EROFS", "/packages": "EACCES"}}),
        ("memory", "failed", {"results": {"memory": telling(335544320)}}),
        ("memory", "failed", {"docker": {"memory_limit": "4g"}, "results": {"memory": telling(1 << 30)}}),
        ("swap", "failed", {"cgroups": {**LOOK["cgroups"], "swap": "max"}}),
        ("swap", "failed", {"cgroups": {**LOOK["cgroups"], "swap": ""}, "info": {"SwapLimit": False}}),
        ("CPU", "failed", {"results": {"cpu": telling(0.95)}}),
        ("CPU", "failed", {"cgroups": {**LOOK["cgroups"], "cpu": "-1 100000"}}),
        ("CPU", "warning", {"cgroups": {**LOOK["cgroups"], "cpu": ""}, "results": {"cpu": telling(0.1)}}),
        ("processes", "failed", {"results": {"processes": telling([306, None])}}),
        ("processes", "failed", {"results": {"processes": telling([256, "EAGAIN"])}}),
        ("processes", "failed", {"docker": {"pids_limit": 9000}, "results": {"processes": telling([2000, None])}}),
        ("disk", "failed", {"results": {"disk": telling({"/tmp": [66 << 20, None]})}}),
        ("disk", "failed", {"results": {"disk": telling({"/tmp": [90 << 20, "ENOSPC"]})}}),
        ("disk", "failed", {"results": {"disk": Result("out_of_memory")}}),
        ("open files", "failed", {"files": 5000}),
        ("output", "failed", {"results": {"output": Result("ok", (Text("stdout", "x" * (9 << 20)),))}}),
        ("output", "failed", {"results": {"output": Result("died")}}),
        ("time-out", "failed", {"results": {"interrupt": Result("timeout", state="lost")}}),
        ("time-out", "failed", {"results": {"interrupt": Result("ok", state="preserved")}}),
        ("kill", "failed", {"results": {"stubborn": Result("ok")}}),
        ("file system", "failed", {"creating": {"/": "EACCES"}}),
        ("file system", "failed", {"writable": ["/tmp", "/run"]}),
        ("file system", "failed", {"writable": ["/tmp", "/var/tmp"], "docker": {"read_only": False}}),
        ("file system", "warning", {"creating": {"/": "EACCES"}, "docker": {"read_only": False}}),
        ("network", "failed", {"networks": ["lo", "eth0"]}),
        ("network", "failed", {"connecting": None}),
        ("network", "failed", {"resolving": None}),
        ("network", "warning", {"networks": ["lo", "eth0"], "docker": {"network_disabled": False}}),
        ("user", "failed", {"users": [65534, 0, 65534]}),
        ("user", "failed", {"becoming_root": None}),
        ("capabilities", "failed", {"status": {"CapEff": "0000000000000000", "CapBnd": "00000000a80425fb"}}),
        ("capabilities", "failed", {"status": {}}),
        ("capabilities", "failed", {"changing_root": None}),
        ("privileges", "failed", {"no_new_privs": 0}),
        ("system calls", "failed", {"seccomp": 0}),
        ("system calls", "failed", {"status_of_1": {"Seccomp": "0"}}),
        ("privileges", "failed", {"status_of_1": {"NoNewPrivs": "0"}}),
        ("system calls", "warning", {"system_calls": {"io_uring": None}}),
        ("system calls", "warning", {"system_calls": {"io_uring": "EFAULT"}}),
        ("devices", "failed", {"devices": ["/dev/sda"]}),
        ("process 1", "failed", {"process_1": {"mem": None}}),
        ("process 1", "failed", {"results": {"kill": Result("died")}}),
        ("environment", "failed", {"environment": {"https_proxy": "http://user:secret@proxy"}}),
        ("cgroups", "warning", {"info": {"CgroupVersion": "1"}}),
        ("cgroups", "warning", {"info": {"host": {"cgroupVersion": "v1"}}}),
        ("user namespace", "warning", {"user_map": ["0", "0", "4294967295"]}),
    ],
)
def test_what_is_not_well_is_said_with_a_remedy(check: str, expected: str, facts: dict[str, Any]) -> None:
    finding = verdict(check, **facts)
    assert finding.verdict == expected, finding
    assert finding.seen
    assert finding.remedy.endswith((".", ")."))


@pytest.mark.parametrize(
    ("check", "facts"),
    [
        ("memory", {"docker": {"memory_limit": "4g"}, "results": {"memory": telling(1 << 30)},
                    "cgroups": {"memory": str(4 << 30)}}),
        ("memory", {"results": {"memory": Result("died")}}),
        ("memory", {"results": {"memory": Result("error", exception=ExceptionInfo("MemoryError", "", 1, ""))}}),
        ("swap", {"cgroups": {"swap": str(256 << 20)}}),
        ("swap", {"cgroups": {"swap": ""}, "host_swap": "0"}),
        ("CPU", {"docker": {"cpu_limit": 2.0}, "results": {"cpu": telling(2.0)}}),
        ("CPU", {"results": {"cpu": telling(0.05)}}),
        ("processes", {"docker": {"pids_limit": 9000}, "results": {"processes": telling([2000, None])},
                       "cgroups": {"pids": "9000"}}),
        ("file system", {"writable": ["/out"], "docker": {"mounts": ("/usr/share:/out:rw",)}}),
        ("image", {"is_hosts": True, "docker": {"image": "host"}}),
        ("runtime", {"docker": {"runtime": "runsc"}, "version": {}}),
        ("user namespace", {"user_map": ["0", "0", "4294967295"], "info": {"OperatingSystem": "Docker Desktop"}}),
        ("devices", {"devices": ["/dev/net/tun"], "info": RUNSC}),
    ],
)  # fmt: skip
def test_what_only_looks_unwell_is_well(check: str, facts: dict[str, Any]) -> None:
    assert verdict(check, **facts).verdict == "ok"


def test_the_hosts_own_variables_are_found_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("PYTHON_VERSION", "3.12.2")
    inside = {"API_KEY": "secret", "PYTHON_VERSION": "3.12.2"}
    finding = verdict("environment", environment=inside, variables=("PYTHON_VERSION=3.12.2",))
    assert (finding.verdict, finding.seen) == ("failed", "from the host: API_KEY")


def test_limits_that_gvisor_ignores_are_failures_and_the_remedy_is_its_setting() -> None:
    for check, result in (("memory", telling(335544320)), ("CPU", telling(0.9)), ("processes", telling([306, None]))):
        name = {"CPU": "cpu"}.get(check, check)
        finding = verdict(check, info=RUNSC, results={name: result}, cgroups={"memory": "", "cpu": "", "pids": ""})
        assert finding.verdict == "failed"
        assert "remove --ignore-cgroups from the runtimeArgs of runsc" in finding.remedy


def test_what_gvisor_lets_code_do_to_process_1_is_a_warning_that_says_what_it_means() -> None:
    finding = verdict("process 1", info=RUNSC, process_1={"fd": None}, results={"kill": Result("died")})
    assert (finding.verdict, finding.seen) == ("warning", "code gets at its fd, kill")
    assert "Don't trust what a session says" in finding.remedy


def test_limits_of_a_rootless_engine_need_delegation() -> None:
    finding = verdict("CPU", info={"SecurityOptions": ["name=rootless"]}, results={"cpu": telling(1.0)})
    assert finding.verdict == "failed"
    assert "Delegate=cpu" in finding.remedy


@pytest.mark.parametrize("look", [{}, [], None, "text", {**LOOK, "networks": 5, "cgroups": None, "files": "many"}])
def test_whatever_a_sandbox_tells_the_doctor_ends_with_a_finding(look: Any) -> None:
    for check in CHECKS:
        nonsense = {"look": telling(look), "cpu": telling("x"), "disk": telling([1]), "processes": telling(None)}
        assert verdict(check, results=nonsense).verdict in ("ok", "warning", "failed")
    for check in ("network", "open files", "disk", "CPU", "processes"):
        assert verdict(check, results=nonsense).verdict == "failed"


def test_what_a_sandbox_tells_can_do_nothing_to_a_terminal() -> None:
    finding = verdict("devices", devices=["/dev/\x1b[2Jx\n\x07" + "y" * 10_000])
    assert finding.verdict == "failed"
    assert finding.seen.isprintable()
    assert len(finding.seen) <= 1000


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("1.0.0-rc93", "CVE-2024-21626 CVE-2025"),
        ("1.1.5+ds1", "CVE-2024-21626 CVE-2025"),
        ("1.1.11", "CVE-2024-21626 CVE-2025"),
        ("1.1.12", "CVE-2025"),
        ("1.2.0-rc.1", "CVE-2025"),
        ("1.2.7", "CVE-2025"),
        ("1.2.8", ""),
        ("1.3.0-rc.2", "CVE-2025"),
        ("1.3.2", "CVE-2025"),
        ("1.3.3", ""),
        ("1.3.10", ""),
        ("1.4.0-rc.2", "CVE-2025"),
        ("1.4.0-rc.3", ""),
        ("1.4.0", ""),
        ("2.0.0", ""),
        ("", ""),
        ("unknown", ""),
    ],
)
def test_versions_of_runc_with_known_ways_out_are_known(version: str, problem: str) -> None:
    found = runc_problem(version) or ""
    assert [known in found for known in ("CVE-2024-21626", "CVE-2025")] == [
        known in problem for known in ("CVE-2024-21626", "CVE-2025")
    ]


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1\n", "1.1.5+ds1"),
        ("crun version 1.8\ncommit: x", "1.8"),
        ("runsc version release-20250101.0\n", "20250101.0"),
        ("no such thing", ""),
    ],
)
def test_a_version_is_found_in_what_a_program_says(said: str, version: str) -> None:
    assert version_in(said) == version


@pytest.mark.parametrize("answer", [None, [], {}, {"Server": None}, {"Server": {"Components": [{}]}}])
def test_an_engine_that_tells_no_components_has_no_version_of_runc(answer: Any) -> None:
    assert component_version(answer, "runc") == ""


def test_the_name_that_is_imported_is_known_for_what_is_preinstalled() -> None:
    names = [import_name(requirement) for requirement in (*PackageConfig().preinstalled, "pillow>=1", "pandas[excel]")]
    assert names == ["numpy", "pandas", "scipy", "matplotlib", "sklearn", "sympy", "PIL", "pandas"]


def test_the_probe_refers_to_nothing_but_itself_and_what_it_imports() -> None:
    module = compile(PROBE_SOURCE, "probe", "exec", dont_inherit=True)
    defined = {*PROBE_MODULES, *names_stored(module), *vars(builtins)}
    for code in code_objects(module):
        used = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        assert not used - defined, code.co_qualname
    assert set(PROBE_MODULES) <= sys.stdlib_module_names


def names_stored(code: types.CodeType) -> set[str]:
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_NAME"}


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


# ── the table ──


def test_a_table_has_columns_of_the_same_width(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [("long", "ok"), ("x", "")])
    assert capsys.readouterr().out == "A     B\nlong  ok\nx\n"


def test_a_remedy_that_several_checks_have_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("a", "failed", "x", "Do it."), Finding("b", "ok", "y"), Finding("c", "warning", "z", "Do it.")]
    _print_findings(findings)
    assert capsys.readouterr().out == (
        "CHECK  VERDICT  SEEN\na      failed   x\nb      ok       y\nc      warning  z\n\na, c: Do it.\n"
    )


# ── the command, on an engine that keeps no limit ──


@pytest.fixture
def doctor(docker: FakeEngine, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `doctor`, with limits so low that passing them harms nobody."""
    (tmp_path / "work").mkdir()
    (tmp_path / ".python-docker-mcp").mkdir()
    settings = {
        "docker": {
            "command": docker.command,
            "working_dir": str(tmp_path / "work"),
            "memory_limit": "32m",
            "cpu_limit": 0.01,
            "pids_limit": 20,
            "disk_limit": "1m",
            "output_limit": "100k",
        },
        "package": {"preinstalled": []},
        "blocked_modules": ["os"],
    }
    (tmp_path / ".python-docker-mcp/config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def doctor(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(sandbox_runner.__file__), "doctor", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return doctor


Doctor = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_where_nothing_is_limited_the_doctor_sees_it_and_leaves_nothing_behind(
    doctor: Doctor, docker: FakeEngine
) -> None:
    done = doctor("--json")
    told = json.loads(done.stdout)
    verdicts = {check["check"]: check["verdict"] for check in told["checks"]}
    assert list(verdicts) == list(CHECKS)
    assert done.returncode == 1
    assert {name for name, said in verdicts.items() if said == "failed"} >= set(UNLIMITED), told
    assert told["count"] == {said: list(verdicts.values()).count(said) for said in ("ok", "warning", "failed")}
    assert [verdicts[name] for name in ("engine", "output", "kill", "network", "user")] == ["ok"] * 5
    assert all(bool(check["remedy"]) == (check["verdict"] != "ok") for check in told["checks"])
    assert not docker.containers()


UNLIMITED = ("memory", "CPU", "processes", "disk", "capabilities", "package volume")


def test_without_an_engine_that_is_the_finding(doctor: Doctor, docker: FakeEngine) -> None:
    docker.script(version={"exit": 1, "stderr": "Cannot connect to the Docker daemon.\n"})
    done = doctor()
    assert done.returncode == 125
    assert "engine  failed   none that can be used" in done.stdout
    assert "is installed, but its engine does not answer" in " ".join(done.stdout.split())


def test_without_an_image_that_is_the_finding(doctor: Doctor, docker: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(f"docker: {{command: {docker.command}, image: none/such}}\npackage: {{preinstalled: []}}")
    done = doctor("--json", "--config", str(file))
    assert done.returncode == 125
    _, finding = json.loads(done.stdout)["checks"]
    assert (finding["check"], finding["verdict"]) == ("image", "failed")
    assert "The image none/such is not here and can't be pulled" in finding["remedy"]


def test_if_no_sandbox_starts_that_is_the_last_finding(doctor: Doctor, docker: FakeEngine) -> None:
    docker.script(run={"exit": 125, "stderr": "docker: unknown or invalid runtime name: x.\n"}, info={"stdout": "[1]"})
    done = doctor("--json")
    assert done.returncode == 125
    findings = json.loads(done.stdout)["checks"]
    assert [finding["check"] for finding in findings] == ["engine", "runtime", "image", "start-up"]
    assert "unknown or invalid runtime name: x." in findings[-1]["remedy"]


@pytest.mark.slow
@pytest.mark.usefixtures("doctor")
def test_ctrl_c_ends_the_doctor_and_leaves_nothing_behind(docker: FakeEngine) -> None:
    command = [sys.executable, str(sandbox_runner.__file__), "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        assert child.stderr.readline().startswith("trying")
        while not docker.containers():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert "Traceback" not in child.stderr.read()
    assert not docker.containers()


def test_a_wrong_setting_is_status_2(doctor: Doctor) -> None:
    assert doctor("--config", "nowhere.yaml").returncode == 2


@pytest.mark.anyio
async def test_a_server_warns_once_of_a_runc_with_known_ways_out(
    docker: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    components = [{"Name": "runc", "Version": "1.1.5"}]
    server = {"Version": "20.10.24", "Components": components}
    docker.script(version={"stdout": json.dumps({"Client": {"ApiVersion": "1.41"}, "Server": server})})
    for runtime, warnings in ((None, 1), ("runsc", 0)):
        caplog.clear()
        config = Config(DockerConfig(command=docker.command, runtime=runtime))
        async with open_runner(config) as runner:
            await runner._tidy()
            assert sum("runc 1.1.5 has known ways out" in line for line in caplog.messages) == warnings


# ── on real engines ──


@pytest.mark.engine
def test_on_a_real_engine_everything_holds(config: Config, tmp_path: Path) -> None:
    settings = tmp_path / "config.yaml"
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, str(sandbox_runner.__file__), "doctor", "--json", "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    verdicts = {check["check"]: check["verdict"] for check in told["checks"]}
    assert list(verdicts) == list(CHECKS)
    assert {name for name, said in verdicts.items() if said == "failed"} == set(), told
    assert {verdicts[name] for name in set(SABOTAGED.values())} == {"ok"}, told


SABOTAGED = {  # flags that are left out, and the check that must see it
    "--memory": "memory",
    "--cpus": "CPU",
    "--pids-limit": "processes",
    "--cap-drop": "capabilities",
    "--network": "network",
    "--read-only": "file system",
    "--tmpfs": "disk",
    "--mount": "package volume",
}


@pytest.mark.engine
@pytest.mark.anyio
async def test_the_doctor_sees_each_flag_that_is_missing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments_of = Engine.sandbox_arguments

    def sabotaged(self: Engine, *arguments: Any) -> list[str]:
        kept = ["run", "--env=DOCTOR_PROXY=http://proxy.invalid"]
        for argument in arguments_of(self, *arguments)[1:]:
            if argument.startswith("--tmpfs"):  # these two stay, without what limits them
                kept.append(re.sub("size=[0-9]+", "size=200m", argument))
            elif argument.startswith("--mount"):
                kept.append(argument.removesuffix(",ro"))
            elif not argument.startswith(tuple(SABOTAGED)):
                kept.append(argument)
        return kept

    monkeypatch.setattr(Engine, "sandbox_arguments", sabotaged)
    docker = dataclasses.replace(config.docker, pids_limit=60, memory_limit="128m", disk_limit="16m", cpu_limit=0.01)
    findings = {finding.check: finding for finding in await examine(dataclasses.replace(config, docker=docker))}
    failed = {name for name, finding in findings.items() if finding.verdict == "failed"}
    assert failed >= {*SABOTAGED.values(), "environment"}, findings
