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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import FakeEngine, code_objects, wait_until

import python_docker_mcp
import sandbox_runner
from python_docker_mcp import (
    CHECKS,
    PROBE_MODULES,
    Finding,
    Patient,
    examine,
    import_name,
    judge,
    probe_source,
    within_trial,
)
from sandbox_runner import (
    Config,
    DockerConfig,
    Engine,
    ExceptionInfo,
    Image,
    Result,
)

NO_RIGHTS = {**dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)}
OWN, FIRST = {**NO_RIGHTS, "NoNewPrivs": "1", "Seccomp": "2"}, {"NoNewPrivs": "1", "Seccomp": "2"}
REFUSED = {"setuid": "EPERM", "chroot": "EPERM"}
WELL: dict[str, Any] = {  # by check, the values of its expression in a sandbox in which all is well, or its result
    "imports": 6,
    "memory": Result("out_of_memory"),
    "CPU": 0.5,
    "processes": [254, "EAGAIN"],
    "disk": [["/tmp", 64 << 20, "ENOSPC"], ["/app", 64 << 20, "ENOSPC"]],
    "file system": ["EROFS", "EROFS", ["/tmp", "/app", "/dev/shm"]],
    "mounts": [],
    "network": [["lo"], "ENETUNREACH", "gaierror"],
    "root": [[65534] * 6, OWN, FIRST, REFUSED],
    "system calls": [OWN, FIRST, []],
    "neighbours": [60706, 32],
    "GPUs": [[], "libcuda.so.1: cannot open shared object file", 0],
    "secrets": [("api", "api.example.com", 404, "Not Found")],
    "process 1": [],
    "environment": [],
}
REFUSES, GOES_ON = "HTTP/1.1 403 a.example was refused", "HTTP/1.1 200 Connection established"
RUNSC = {"DefaultRuntime": "runsc", "Runtimes": {"runsc": {"runtimeArgs": ["--ignore-cgroups"]}}}


def verdict(name: str, seen: Any = None, docker: dict[str, Any] | None = None, **facts: Any) -> Finding:
    """What a check finds if its expression has the value `seen`, or its call that result; by default, all is well."""
    facts.setdefault("version", {"Server": {"Components": [{"Name": "runc", "Version": "1.3.3"}]}})
    facts.setdefault("info", {"DefaultRuntime": "runc", "CgroupVersion": "2"})
    facts.setdefault("image", Image("image", "sha256:1", "derived"))
    patient = Patient(Config(DockerConfig(**(docker or {}))), Engine("/bin/docker", "docker", "28.0.0"), **facts)
    (check,) = [check for check in CHECKS if check.name == name]
    seen = WELL.get(name) if seen is None else seen
    return judge(check, patient, seen if isinstance(seen, Result) else Result("ok", variables={"seen": seen}))


# ── the judgement ──


def test_gpus_that_cuda_finds_are_well() -> None:
    assert verdict("GPUs", [["nvidia0"], 0, 1], {"gpus": "device=0"}).verdict == "ok"


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
def test_where_all_is_well_every_check_says_so_and_has_no_remedy(check: str) -> None:
    finding = verdict(check)
    assert (finding.verdict, finding.remedy) == ("ok", ""), finding
    assert finding.seen


@pytest.mark.parametrize(
    ("check", "expected", "seen", "facts"),
    [
        (
            "GPUs",
            "failed",
            [["nvidia0"], "libcuda.so.1: cannot open shared object file", 0],
            {"docker": {"gpus": "all"}},
        ),
        ("GPUs", "failed", [["nvidia0"], 100, 0], {"docker": {"gpus": "all"}}),
        ("GPUs", "failed", [["nvidia0"], 0, 1], {}),
        ("secrets", "warning", [("api", "api.example.com", 401, "Unauthorized")], {}),
        ("secrets", "warning", [("api", "api.example.com", 0, "timed out")], {}),
        ("secrets", "warning", [("api", "api.example.com", 502, "api.example.com can't be reached: …")], {}),
        ("engine", "warning", None, {"version": {"Server": {"Components": [{"Name": "Podman Engine"}]}}}),
        ("runtime", "warning", None, {"info": {}}),
        ("image", "warning", None, {"is_hosts": True}),
        ("image", "failed", None, {"image": Image("image", "sha256:1", "pulled", "numpy could not be preinstalled")}),
        ("imports", "failed", Result("error", exception=ExceptionInfo("ImportError", "No numpy", 1, "")), {}),
        ("imports", "failed", Result("out_of_memory"), {}),
        ("imports", "failed", Result("timeout"), {}),
        ("memory", "failed", 335544320, {}),
        ("CPU", "failed", 0.95, {}),
        ("processes", "failed", [306, None], {}),
        ("processes", "failed", [256, "EAGAIN"], {}),
        ("disk", "failed", [["/tmp", 66 << 20, None]], {}),
        ("disk", "failed", [["/tmp", 90 << 20, "ENOSPC"]], {}),
        ("disk", "failed", Result("out_of_memory"), {}),
        ("file system", "failed", ["EACCES", "EROFS", ["/tmp"]], {}),
        ("file system", "failed", ["EROFS", "EACCES", ["/tmp"]], {}),
        ("file system", "failed", ["EROFS", "EROFS", ["/tmp", "/run"]], {}),
        ("file system", "failed", ["EROFS", "EROFS", ["/var/tmp"]], {"docker": {"read_only": False}}),
        ("file system", "warning", ["EACCES", "EROFS", ["/tmp"]], {"docker": {"read_only": False}}),
        ("mounts", "warning", [[False, False, None]], {"docker": {"mounts": ("/usr/share:/x",)}}),
        ("mounts", "warning", [[True, False, 0]], {"docker": {"mounts": ("/usr/share:/x",)}}),
        ("mounts", "warning", [[True, False, 9]], {"docker": {"mounts": ("/usr/share:/x:rw",)}}),
        ("mounts", "failed", [], {"docker": {"mounts": ("/usr/share:/x",)}}),
        ("network", "failed", [["lo", "eth0"], None, None], {}),
        ("network", "failed", [["lo"], None, "gaierror"], {}),
        ("network", "failed", [["lo"], "ENETUNREACH", None], {}),
        ("network", "warning", [["lo", "eth0"], None, None], {"docker": {"network_disabled": False}}),
        ("allowed hosts", "failed", [[REFUSES, GOES_ON], [GOES_ON]], {"docker": {"network_allow": ("a.example",)}}),
        ("allowed hosts", "warning", [[REFUSES, REFUSES], [REFUSES]], {"docker": {"network_allow": ("a.example",)}}),
        ("allowed hosts", "failed", [], {"docker": {"network_allow": ("a.example",)}}),
        ("root", "failed", [[65534, 0, 65534], OWN, FIRST, REFUSED], {}),
        ("root", "failed", [[65534], OWN, FIRST, {**REFUSED, "setuid": None}], {}),
        ("root", "failed", [[65534], OWN, FIRST, {**REFUSED, "chroot": None}], {}),
        ("root", "failed", [[65534], {**OWN, "CapBnd": "00000000a80425fb"}, FIRST, REFUSED], {}),
        ("root", "failed", [[65534], {}, FIRST, REFUSED], {}),
        ("root", "failed", [[65534], {**OWN, "NoNewPrivs": "0"}, FIRST, REFUSED], {}),
        ("root", "failed", [[65534], OWN, {"NoNewPrivs": "0"}, REFUSED], {}),
        ("neighbours", "warning", [60706, 3], {}),
        ("neighbours", "failed", [], {}),
        ("system calls", "failed", [{**OWN, "Seccomp": "0"}, FIRST, []], {}),
        ("system calls", "failed", [OWN, {"Seccomp": "0"}, []], {}),
        ("system calls", "warning", [OWN, FIRST, ["io_uring"]], {}),
        ("process 1", "failed", ["mem"], {}),
        ("process 1", "failed", Result("died"), {}),
        ("environment", "failed", ["https_proxy"], {}),
    ],
)
def test_what_is_not_well_is_said_with_a_remedy(check: str, expected: str, seen: Any, facts: dict[str, Any]) -> None:
    finding = verdict(check, seen, **facts)
    assert finding.verdict == expected, finding
    assert finding.seen
    assert finding.remedy.endswith((".", ").", "preinstalled"))


@pytest.mark.parametrize(
    ("check", "seen", "facts"),
    [
        ("memory", Result("died"), {}),
        ("memory", Result("error", exception=ExceptionInfo("MemoryError", "", 1, "")), {}),
        ("CPU", 0.05, {}),
        ("file system", ["EROFS", "EROFS", ["/out"]], {"docker": {"mounts": ("/usr/share:/out:rw",)}}),
        ("image", None, {"is_hosts": True, "docker": {"image": "host"}}),
        ("runtime", None, {"docker": {"runtime": "runsc"}, "version": {}}),
        ("runtime", None, {"info": {"host": {"ociRuntime": {"name": "crun", "version": "crun version 1.8"}}}}),
        ("imports", 0, {}),
    ],
)
def test_what_only_looks_unwell_is_well(check: str, seen: Any, facts: dict[str, Any]) -> None:
    assert verdict(check, seen, **facts).verdict == "ok"


TOO_LITTLE: tuple[Any, ...] = (Result("out_of_memory"), {}, "failed", "^Raise docker.memory_limit: ")
IGNORED: tuple[Any, ...] = ({"info": RUNSC}, "failed", "remove --ignore-cgroups from the runtimeArgs of runsc")


@pytest.mark.parametrize(
    ("check", "seen", "facts", "expected", "remedy"),
    [
        ("imports", *TOO_LITTLE),
        ("processes", *TOO_LITTLE),
        ("disk", *TOO_LITTLE),
        ("memory", 335544320, *IGNORED),
        ("CPU", 0.9, *IGNORED),
        ("processes", [306, None], *IGNORED),
        ("process 1", ["fd", "kill"], {"info": RUNSC}, "warning", "Don't trust what a session says"),
        ("CPU", 1.0, {"info": {"SecurityOptions": ["name=rootless"]}}, "failed", "Delegate=cpu"),
    ],
)
def test_the_remedy_is_that_of_the_cause(
    check: str, seen: Any, facts: dict[str, Any], expected: str, remedy: str
) -> None:
    finding = verdict(check, seen, **facts)
    assert finding.verdict == expected
    assert re.search(remedy, finding.remedy), finding


def test_what_gvisor_lets_code_do_is_said() -> None:
    assert verdict("process 1", ["fd", "kill"], info=RUNSC).seen == "code gets at its fd, kill"
    assert verdict("system calls", [{}, {}, ["io_uring"]], info=RUNSC).verdict == "ok"


@pytest.mark.parametrize("seen", [{}, [], "text", 5, [None] * 4, [[]] * 3, {"a": 1}])
def test_whatever_a_sandbox_tells_the_doctor_ends_with_a_finding(seen: Any) -> None:
    for check in CHECKS:
        assert verdict(check.name, seen).verdict in ("ok", "warning", "failed")
    for name in ("network", "disk", "CPU", "processes", "root", "system calls"):
        if not (name == "disk" and seen in ({}, [])) and not (name == "CPU" and seen == 5):
            assert verdict(name, seen).verdict == "failed", name


def test_limits_are_lowered_to_what_can_be_tried_and_never_raised() -> None:
    huge = DockerConfig(memory_limit="64g", disk_limit="32g", pids_limit=9000, cpu_limit=16.0)
    tried = within_trial(huge)
    assert (tried.memory_limit, tried.disk_limit) == (str(512 << 20), str(64 << 20))
    assert (tried.pids_limit, tried.cpu_limit) == (500, 0.5)
    small = DockerConfig(memory_limit="64m", disk_limit="1m", pids_limit=20, cpu_limit=0.1)
    tried = within_trial(small)
    assert (tried.memory_limit, tried.disk_limit) == (str(64 << 20), str(1 << 20))
    assert (tried.pids_limit, tried.cpu_limit) == (20, 0.1)


def test_what_a_sandbox_tells_can_do_nothing_to_a_terminal() -> None:
    finding = verdict("environment", ["\x1b[2Jx\n\x07" + "y" * 10_000])
    assert finding.verdict == "failed"
    assert finding.seen.isprintable()
    assert len(finding.seen) <= 1000


def test_the_name_that_is_imported_is_known_for_what_is_preinstalled() -> None:
    names = [
        import_name(requirement) for requirement in ("numpy", "scikit-learn", "sympy", "pillow>=1", "pandas[excel]")
    ]
    assert names == ["numpy", "sklearn", "sympy", "PIL", "pandas"]


def test_the_probe_refers_to_nothing_but_itself_and_what_it_imports() -> None:
    module = compile(probe_source(), "probe", "exec", dont_inherit=True)
    defined = {*names_stored(module), *vars(builtins)}
    for code in code_objects(module):
        used = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        assert not used - defined, code.co_qualname
    assert set(PROBE_MODULES.split(", ")) <= sys.stdlib_module_names


def names_stored(code: types.CodeType) -> set[str]:
    return {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_NAME"}


# ── the command, on an engine that keeps no limit ──


Doctor = Callable[..., "subprocess.CompletedProcess[str]"]
DoctorHere = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(docker: FakeEngine, tmp_path: Path) -> Doctor:
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
        command = [sys.executable, str(python_docker_mcp.__file__), "doctor", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return doctor


@pytest.fixture
def doctor_here(
    doctor: Doctor,  # noqa: ARG001  # it writes the settings
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> DoctorHere:
    """Runs `doctor` in this process, which saves a second each time: its exit status and what it prints."""
    monkeypatch.setattr(sandbox_runner, "set_up_logging", lambda *_: None)

    def doctor_here(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            python_docker_mcp.main(["doctor", *options])
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().out

    return doctor_here


@pytest.mark.slow
def test_where_nothing_is_limited_the_doctor_sees_it_and_leaves_nothing_behind(
    doctor: Doctor, docker: FakeEngine
) -> None:
    done = doctor("--json")
    told = json.loads(done.stdout)
    verdicts = {check["check"]: check["verdict"] for check in told["checks"]}
    assert list(verdicts) == [check.name for check in CHECKS]
    assert done.returncode == 1
    assert {name for name, said in verdicts.items() if said == "failed"} >= set(UNLIMITED), told
    assert told["count"] == {said: list(verdicts.values()).count(said) for said in ("ok", "warning", "failed")}
    assert [verdicts[name] for name in ("engine", "network")] == ["ok"] * 2
    assert all(bool(check["remedy"]) == (check["verdict"] != "ok") for check in told["checks"])
    assert not docker.containers()


def test_findings_are_a_table_and_a_remedy_that_several_checks_have_is_shown_once(
    doctor_here: DoctorHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def examine(_: Config) -> list[Finding]:
        remedied = [Finding("a", "failed", "x", "Do it."), Finding("c", "warning", "", "Do it.")]
        return [Finding("longer", "ok", "y"), *remedied]

    monkeypatch.setattr(python_docker_mcp, "examine", examine)
    assert doctor_here()[1].partition("\n\nchecked in ")[0] == (
        "CHECK   VERDICT  SEEN\nlonger  ok       y\na       failed   x\nc       warning\n\na, c: Do it."
    )


UNLIMITED = ("memory", "CPU", "processes", "disk", "file system")


def test_without_an_engine_that_is_the_finding(doctor_here: DoctorHere, docker: FakeEngine) -> None:
    docker.script(version={"exit": 1, "stderr": "Cannot connect to the Docker daemon.\n"})
    status, printed = doctor_here()
    assert status == 125
    assert "engine  failed   there is none that can be used" in printed
    assert "is installed, but its engine does not answer" in " ".join(printed.split())


def test_without_an_image_that_is_the_finding(doctor_here: DoctorHere, docker: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(f"docker: {{command: {docker.command}, image: none/such}}\npackage: {{preinstalled: []}}")
    status, printed = doctor_here("--json", "--config", str(file))
    assert status == 125
    (finding,) = json.loads(printed)["checks"]
    assert (finding["check"], finding["verdict"]) == ("image", "failed")
    assert "The image none/such is not here and can't be pulled" in finding["remedy"]


def test_if_no_sandbox_starts_that_is_the_last_finding(doctor_here: DoctorHere, docker: FakeEngine) -> None:
    docker.script(run={"exit": 125, "stderr": "docker: unknown or invalid runtime name: x.\n"}, info={"stdout": "[1]"})
    status, printed = doctor_here("--json")
    assert status == 125
    findings = json.loads(printed)["checks"]
    assert [finding["check"] for finding in findings] == ["engine", "runtime", "image", "start-up"]
    assert "unknown or invalid runtime name: x." in findings[-1]["remedy"]


@pytest.mark.slow
@pytest.mark.usefixtures("doctor")
def test_ctrl_c_ends_the_doctor_and_leaves_nothing_behind(docker: FakeEngine) -> None:
    command = [sys.executable, str(python_docker_mcp.__file__), "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        assert child.stderr.readline().startswith("trying")
        while not docker.containers():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert "Traceback" not in child.stderr.read()
    wait_until(lambda: not docker.containers())


def test_a_wrong_setting_is_status_2(doctor_here: DoctorHere) -> None:
    assert doctor_here("--config", "nowhere.yaml") == (2, "")


# ── on real engines ──


@pytest.mark.engine
def test_on_a_real_engine_everything_holds(config: Config, tmp_path: Path) -> None:
    settings = tmp_path / "config.yaml"
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, str(python_docker_mcp.__file__), "doctor", "--json", "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    verdicts = {check["check"]: check["verdict"] for check in told["checks"]}
    assert list(verdicts) == [check.name for check in CHECKS]
    assert {name for name, said in verdicts.items() if said == "failed"} == set(), told
    assert {verdicts[name] for name in set(SABOTAGED.values())} == {"ok"}, told


SABOTAGED = {  # flags that are left out, and the check that must see it
    "--memory": "memory",
    "--cpus": "CPU",
    "--pids-limit": "processes",
    "--cap-drop": "root",
    "--network": "network",
    "--read-only": "file system",
    "--tmpfs": "disk",
    "--mount": "file system",
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
