"""Both programs' command lines, as real child processes with the fake engine first on their PATH."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, FakeEngine, wait_until

import python_docker_mcp
import sandbox_runner
from sandbox_runner import Result, exit_status

pytestmark = pytest.mark.slow
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ON = "print('on', flush=True)\n"
STUBBORN = (
    f"import signal, time\nsignal.signal(signal.SIGINT, lambda *_: print('no'))\n{ON}while True: time.sleep(0.01)"
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Says = Callable[..., str]


def program(*arguments: str) -> list[str]:
    """The command that runs a script or, with one of its words first, an operator's command.

    As a module, which Python keeps compiled: a file that is run it would compile each time.
    """
    module = python_docker_mcp if arguments[:1] and arguments[0] in python_docker_mcp.COMMANDS else sandbox_runner
    return [sys.executable, "-m", module.__name__, *arguments]


@pytest.fixture
def home(docker: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home and current folder, with a configuration for the fake engine."""
    (tmp_path / "work").mkdir()
    (tmp_path / ".python-docker-mcp").mkdir()
    settings = {
        "docker": {"command": docker.command, "working_dir": str(tmp_path / "work")},
        "session": {"idle_timeout": 60},
        "package": {"preinstalled": []},
        "pool": {"enabled": False},
    }
    (tmp_path / ".python-docker-mcp/config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home: Path) -> Run:
    """Runs the command line to its end, in the home."""

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            program(*arguments), input=stdin, capture_output=True, text=True, check=False, timeout=30, cwd=home
        )

    return run


@contextmanager
def started(*arguments: str, stdout: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """The command line, running."""
    command = program(*arguments)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


# ── what is run, and what is shown ──


def test_a_script_runs_with_its_arguments_and_shows_output_value_and_nothing_else(
    run: Run, home: Path, docker: FakeEngine
) -> None:
    (home / "script.py").write_text(
        "import sys\nprint(sys.argv)\nprint('err', file=sys.stderr)\n6 * 7", encoding="utf-8"
    )
    done = run("script.py", "--json", "two")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['script.py', '--json', 'two']\n42\n", "err\n")
    wait_until(lambda: not docker.containers())


def test_standard_input_is_run_as_a_script(run: Run) -> None:
    done = run("-", "one", stdin="import sys\nprint(sys.argv, 'é')")
    assert (done.returncode, done.stdout) == (0, "['<stdin>', 'one'] é\n")


def test_a_failure_shows_the_traceback_and_a_hint(run: Run) -> None:
    done = run("-c", "def f():\n    import bs4\nf()")
    assert done.returncode == 1
    assert done.stderr.startswith('Traceback (most recent call last):\n  File "<string>", line 3, in <module>\n')
    assert done.stderr.endswith(
        "ModuleNotFoundError: No module named 'bs4'\n"
        "sandbox_runner: `python-docker-mcp install PACKAGE` installs what bs4 is part of\n"
    )


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (Result("ok"), 0),
        (Result("ok", exit_code=0), 0),
        (Result("error"), 1),
        (Result("error", exit_code=3), 3),
        (Result("error", exit_code=256 + 7), 7),
        (Result("timeout", exit_code=-9), 124),
        (Result("out_of_memory", exit_code=-9), 137),
        (Result("cancelled"), 130),
        (Result("died"), 137),
        (Result("died", exit_code=-11), 139),
        (Result("died", exit_code=5), 5),
    ],
)
def test_the_exit_status_is_what_a_shell_would_have_it(result: Result, status: int) -> None:
    assert exit_status(result) == status


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["-c", "import sys; sys.exit(3)"], 3, ""),
        (["-c", "while True: pass", "--timeout", "0.2"], 124, "the code did not end within 0.2 seconds"),
        (["-c", "import os; os.kill(os.getpid(), 11)"], 139, "was killed by SIGSEGV"),
        (["nowhere.py"], 2, "nowhere.py can't be read: No such file or directory."),
        (["-c", "1", "--timeout", "-1"], 2, "A timeout of -1.0 seconds can't be"),
        (["-c", "1", "--timeout", "400"], 2, "--timeout: 400 is more than docker.max_timeout (300): raise that, too."),
        (["-c", "1", "--session", "s", "--timeout", "2000"], 2, "2000 is more than session.max_timeout (1800)"),
        (["-c", "1", "--config", "nowhere.yaml"], 2, "nowhere.yaml can't be read"),
        (["-c", "1", "--mount", "nowhere:/x"], 2, "does not exist on this host"),
        (["-c", "1", "--mount", "~:/x"], 2, "'~' is refused, as it is the home directory"),
        (["-c", "1", "--image", "none/such"], 125, "manifest unknown. Pull or load it by hand, set docker.image to"),
        ([], 2, "a FILE, - for standard input, or -c CODE is needed"),
    ],
)
def test_the_exit_status_tells_what_happened(run: Run, arguments: list[str], status: int, says: str) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert says in done.stderr
    assert 'sandbox_runner.py", line' not in done.stderr


def test_the_configuration_in_use_can_not_be_mounted(run: Run, home: Path) -> None:
    (home / "work/settings.yaml").touch()
    done = run("-c", "1", "--mount", "work:/x", "--config", "work/settings.yaml")
    assert (done.returncode, done.stderr) == (
        2,
        "sandbox_runner: docker.mounts: 'work' is refused, as the configuration work/settings.yaml is in it.\n",
    )


def test_an_engine_that_is_down_is_status_125_and_one_sentence(run: Run, docker: FakeEngine) -> None:
    docker.script(version={"exit": 1, "stderr": "Cannot connect to the Docker daemon.\n"})
    done = run("-c", "1")
    assert done.returncode == 125
    assert done.stderr.startswith(f"sandbox_runner: {docker.command} is installed, but its engine does not answer")
    assert done.stderr.count("\n") == 1


def test_output_appears_while_the_code_runs(home: Path) -> None:
    with started(
        "-c", f"{ON}import os, time\nwhile not os.path.exists('go'): time.sleep(0.002)\nprint('off')"
    ) as child:
        assert child.stdout
        assert child.stdout.readline() == "on\n"
        (home / "work/go").touch()
        assert child.stdout.read() == "off\n"
        assert child.wait(20) == 0


# ── state, sessions, JSON ──


def test_state_is_kept_in_a_file_with_a_note_on_what_can_not_be(run: Run, home: Path) -> None:
    (home / "state.json").write_text('{"x": [1]}', encoding="utf-8")
    done = run("--state", "state.json", "-c", "x.append(2); y = {3}")
    assert json.loads((home / "state.json").read_text(encoding="utf-8")) == {"x": [1, 2]}
    assert done.stderr == "sandbox_runner: the variable y is not in state.json: set is not JSON\n"
    assert [file.name for file in home.glob("state*")] == ["state.json"]


def test_a_state_file_that_is_none_is_left_alone(run: Run, home: Path) -> None:
    (home / "state.json").write_text("[1]", encoding="utf-8")
    done = run("--state", "state.json", "-c", "x = 1")
    assert (done.returncode, done.stderr.count("holds no JSON object")) == (2, 1)
    assert (home / "state.json").read_text(encoding="utf-8") == "[1]"


def test_a_session_works_across_invocations_is_listed_and_removed(run: Run, docker: FakeEngine) -> None:
    run("--session", "work", "-c", "x = 41")
    assert run("--session", "work", "-c", "x + 1").stdout == "42\n"
    (listed,) = json.loads(run("ps", "--json").stdout)
    assert (listed["session"], listed["attached"], listed["busy"]) == ("work", False, False)
    head, row = run("ps").stdout.splitlines()
    assert head.split() == ["SESSION", "STATE", "OWNER", "AGE", "IDLE", "MEMORY", "CONTAINER"]
    assert row.split()[:3] == ["work", "idle", "-"]
    assert run("rm", "work").returncode == 0
    wait_until(lambda: docker.containers() == [])  # it ended by a plug: no client of its own was waited for
    done = run("rm", "work")
    assert done.returncode == 1
    assert done.stderr == "python-docker-mcp: there is no session 'work': `ps` lists those there are\n"


def test_json_holds_everything_and_nothing_else_is_printed(run: Run) -> None:
    done = run("--json", "-c", "print('out')\nimport nothing")
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert (told["status"], told["stdout"], told["exception"]["line"]) == ("error", "out\n", 2)
    assert told["output"] == [{"stream": "stdout", "text": "out\n"}]
    assert told["engine"] == "docker 20.10.24"
    assert (told["image"]["name"], told["image"]["origin"]) == ("python:3.12.2-slim", "present")


# ── pictures ──


@pytest.fixture
def drawing(home: Path) -> str:
    """A script that shows a picture, and ends in another one."""
    (home / "drawing.py").write_text(
        f"class Picture:\n    def _repr_png_(self): return bytes.fromhex({PNG.hex()!r})\n"
        "    def __repr__(self): return '<Picture>'\n"
        "display(Picture())\nprint('between')\nPicture()",
        encoding="utf-8",
    )
    return "drawing.py"


def test_pictures_are_saved_under_the_first_free_numbers_and_told_beside_the_output(
    run: Run, home: Path, drawing: str
) -> None:
    (home / "figure-1.jpg").write_text("mine", encoding="utf-8")
    done = run(drawing)
    assert done.stdout == "between\n"
    assert done.stderr == "sandbox_runner: saved figure-2.png\nsandbox_runner: saved figure-3.png\n"
    assert (home / "figure-2.png").read_bytes() == (home / "figure-3.png").read_bytes() == PNG
    assert (home / "figure-1.jpg").read_text(encoding="utf-8") == "mine"


def test_pictures_are_saved_where_it_is_said_and_with_json_only_there(run: Run, home: Path, drawing: str) -> None:
    assert run("--images", "new/plots", drawing).stderr.count("saved new/plots/figure-") == 2
    assert len(list((home / "new/plots").iterdir())) == 2
    told = json.loads(run("--json", drawing).stdout)
    assert ["image/png" in item["forms"] for item in told["output"] if "forms" in item] == [True, True]
    assert list(home.glob("figure-*")) == []
    assert json.loads(run("--json", "--images", "more", drawing).stdout)["status"] == "ok"
    assert len(list((home / "more").iterdir())) == 2


def test_a_folder_that_can_not_be_written_costs_the_pictures_and_nothing_else(
    run: Run, home: Path, drawing: str
) -> None:
    (home / "taken").touch()
    done = run("--images", "taken", drawing)
    assert (done.returncode, done.stdout) == (0, "between\n")
    assert "sandbox_runner: a picture can't be saved in taken: File exists; --images DIR names another" in done.stderr


def test_only_so_many_pictures_are_saved_and_what_is_no_picture_is_not(run: Run, home: Path) -> None:
    most = sandbox_runner.MAX_PICTURES
    done = run(
        "-c",
        "class Shown:\n    def __init__(self, **forms): self.forms = forms\n"
        "    def __repr__(self): return 'broken'\n"
        "    def _repr_mimebundle_(self, **_): return {'text/plain': 'broken', **self.forms}\n"
        "display(Shown(**{'image/png': '?'}))\n"
        f"for _ in range({most + 2}): display(Shown(**{{'image/svg+xml': '<svg/>'}}))",
    )
    assert len(list(home.glob("figure-*"))) == len(list(home.glob("figure-*.svg"))) == most
    assert done.stdout == "broken\n"
    said = [line for line in done.stderr.splitlines() if "saved figure-" not in line]
    assert said == [f"sandbox_runner: more than {most} pictures: the others are not saved"]


# ── on a terminal ──


def on_terminal(*arguments: str) -> str:
    """What the command line shows on a terminal, to its end."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(program(*arguments), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # what a terminal says when nobody writes to it any more
            while data := os.read(ours, 65536):
                shown += data
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.usefixtures("home")
def test_on_a_terminal_what_is_waited_for_takes_one_line_that_is_gone_in_the_end(docker: FakeEngine) -> None:
    docker.script(images=[])
    shown = on_terminal("-c", "print('done')")
    assert "\r\x1b[Kpulling python:3.12.2-slim" in shown
    assert shown.endswith("\r\x1b[Kdone\n")


# ── help ──


@pytest.fixture
def says(
    home: Path,  # noqa: ARG001  # it holds the settings
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Says]:
    """What a program says until it ends, run in this process."""
    monkeypatch.setattr(sandbox_runner, "set_up_logging", lambda *_: None)
    monkeypatch.setattr(sandbox_runner.traffic_log, "setLevel", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["sandbox_runner.py"])

    def says(module: Any, *arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            module.main(arguments)
        assert end.value.code in (0, 2)
        return "".join(capsys.readouterr())

    handler = signal.getsignal(signal.SIGINT)
    yield says
    signal.signal(signal.SIGINT, handler)  # a program that ends ignores it


@pytest.mark.parametrize("module", [sandbox_runner, python_docker_mcp])
def test_the_help_has_examples_that_the_program_takes(says: Says, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1")))
    monkeypatch.setenv("PYTHON_DOCKER_MCP_CONFIG", "nowhere.yaml")  # this or the script is what it then looks for
    examples = says(module, "--help").partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) > 4
    for example in examples:
        words = shlex.split(re.split(r"   |; ", example.strip())[0])
        words = words[2:] if words[0] == "…" else words  # what is piped into it
        name = ["python", "sandbox_runner.py"] if module is sandbox_runner else ["python-docker-mcp"]
        assert words[: len(name)] == name
        assert "can't be read: No such file or directory." in says(module, *words[len(name) :]), example


def test_help_tells_the_exit_statuses(says: Says) -> None:
    assert "124 after a time-out, 137 out of memory, 130 interrupted" in says(sandbox_runner, "--help")


def test_the_configuration_may_be_named_on_either_side_of_the_command(says: Says) -> None:
    for arguments in (["--config", "nowhere.yaml", "ps"], ["ps", "--config", "nowhere.yaml"]):
        assert "nowhere.yaml can't be read: No such file or directory." in says(python_docker_mcp, *arguments)


def test_an_operators_command_is_not_just_a_file_that_is_missing(run: Run) -> None:
    said = subprocess.run(
        [sys.executable, str(sandbox_runner.__file__), "doctor"], capture_output=True, text=True, check=False
    )
    assert (said.returncode, "Did you mean `python-docker-mcp doctor`?" in said.stderr) == (2, True)
    assert set(sandbox_runner.OPERATOR_COMMANDS) == set(python_docker_mcp.COMMANDS)
    assert "Did you mean" not in run("nowhere.py").stderr


def test_packages_are_installed_and_images_made_by_a_command(run: Run, docker: FakeEngine) -> None:
    assert run("build").stdout == "python:3.12.2-slim\n"
    refused = run("install", "no such=thing")
    assert (refused.returncode, refused.stderr.startswith("python-docker-mcp: ")) == (2, True)
    docker.script(version={"exit": 1, "stderr": "Cannot connect to the Docker daemon.\n"})
    for command in ("build", "ps"):
        done = run(command)
        assert (done.returncode, done.stderr.count("\n")) == (125, 1)
        assert "its engine does not answer" in done.stderr


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3_720, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_times_are_said_in_their_two_largest_units(seconds: float, said: str) -> None:
    assert python_docker_mcp.duration(seconds) == said


# ── signals and pipes ──


@pytest.mark.usefixtures("home")
def test_ctrl_c_interrupts_the_code_which_says_where_it_was(docker: FakeEngine) -> None:
    with started("-c", f"{ON}import time\ntime.sleep(60)") as child:
        assert child.stdout
        assert child.stdout.readline() == "on\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert child.stderr
        said = child.stderr.read()
        assert re.match(r'Traceback \(most recent call last\):\n  File "<string>", line [123], in <module>\n', said)
        assert "KeyboardInterrupt" in said
    wait_until(lambda: not docker.containers())


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_and_nothing_stays_behind(docker: FakeEngine, second: signal.Signals) -> None:
    with started("-c", STUBBORN) as child:
        assert child.stdout
        assert child.stdout.readline() == "on\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "no\n"
        child.send_signal(second)
        assert child.wait(20) == 128 + second
    wait_until(lambda: not docker.containers())


@pytest.mark.usefixtures("home")
def test_ctrl_c_ends_a_command_without_a_word(docker: FakeEngine) -> None:
    docker.script(ps={"hang": True})
    with started("ps") as child:
        wait_until(lambda: docker.log("ps") != [])
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert child.stderr
        assert child.stderr.read() == ""


@pytest.mark.usefixtures("home")
def test_nothing_stays_behind_when_the_command_line_is_killed(docker: FakeEngine) -> None:
    with started("-c", f"{ON}while True: pass") as child:
        assert child.stdout
        assert child.stdout.readline() == "on\n"
        child.kill()
    wait_until(lambda: not docker.containers())


@pytest.mark.usefixtures("home")
def test_a_reader_that_goes_away_ends_it_quietly(docker: FakeEngine) -> None:
    with started("-c", "while True: print('x' * 1000)") as child:
        assert child.stdout
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(20) == 141
        assert child.stderr
        assert child.stderr.read() == ""
    wait_until(lambda: not docker.containers())


@pytest.mark.usefixtures("home")
def test_the_environment_names_the_configuration(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_DOCKER_MCP_CPU_LIMIT", "half")
    done = run("-c", "1")
    assert (done.returncode, "PYTHON_DOCKER_MCP_CPU_LIMIT: 'half' is not accepted" in done.stderr) == (2, True)


def test_a_script_is_told_of_refused_connections_at_its_end_and_of_no_others(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def execute(*_: object, **__: object) -> Result:
        return Result("ok", refused=("example.com was refused: why",))

    monkeypatch.setattr(sandbox_runner.Runner, "execute", execute)
    assert says(sandbox_runner, "-c", "1") == "sandbox_runner: example.com was refused: why\n"
    code = (
        "import sandbox_runner as library\nasync def command():\n    library.traffic_log.info('passed')\n"
        "    library.traffic_log.warning('failed')\n    library.log.info('made')\n    return 3\n"
        "library.run_to_exit('', command)"
    )
    for debug, said in (("", "failed\nmade\n"), ("1", "passed\nfailed\nmade\n")):
        environment = {**os.environ, "PYTHON_DOCKER_MCP_DEBUG": debug}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, re.sub(r"(?m)^[\d:.]+ ", "", done.stderr)) == (3, said)
