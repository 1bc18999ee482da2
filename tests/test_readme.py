"""The README as it stands: every block that a reader would copy is run, and every answer that it shows is compared.

Nothing of the README is written here again. What differs from host to host in an answer, such as a number, is compared
by its form; sessions have names of the test's own, as somebody's session may be called "work". Links, the tables of
settings and the messages that the README explains are looked at in test_packaging.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import pty
import re
import secrets
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
import yaml
from conftest import ROOT, text_of, wait_until
from mcp import Client, StdioServerParameters
from pytest_subprocess import FakeProcess
from real_engines import PATIENCE, remove_volume

from python_docker_mcp import TOOLS
from sandbox_runner import ENVIRONMENT, DockerConfig, load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
NEWEST = "localhost/python-docker-mcp-tests:3.14"  # made by engines.sh
HOME = "/home/me"  # the reader's, in what the README shows
SERVER = "uvx python-docker-mcp"  # how the README starts it


class Block(NamedTuple):
    """A fenced block: the chapter that it is in, its language and its text."""

    chapter: str
    language: str
    text: str


def all_blocks() -> Iterator[Block]:
    """Every block of the README."""
    chapter = ""
    for title, language, text in re.findall(r"^## ([^\n]*)$|^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        chapter = title or chapter
        if not title:
            yield Block(chapter, language, text)


def blocks(language: str, chapter: str | None = None) -> list[str]:
    """The texts of the blocks in a language, of one chapter or of all."""
    found = [block.text for block in all_blocks() if block.language == language and chapter in (None, block.chapter)]
    assert found, f"the README has no block of {language or 'plain text'} in {chapter or 'any chapter'}"
    return found


def resembles(said: str, shown: str, numbers: str = r"\d+(?:\.\d+)*") -> bool:
    """Whether this was said in the form that is shown: `…` is anything, what `numbers` matches any of its matches."""
    parts = re.split(rf"({numbers}|…)", shown)
    forms = [
        re.escape(part) if not index % 2 else "(?s:.*)" if part == "…" else f"(?:{numbers})"
        for index, part in enumerate(parts)
    ]
    return re.fullmatch("".join(forms), said) is not None


@pytest.fixture
def configuration(engine_command: str) -> Iterator[dict[str, Any]]:
    """The default settings, but for the engine, an image that needs no registry, and packages of the test's own."""
    volume = f"python-docker-mcp-test-{secrets.token_hex(4)}"
    yield {"docker": {"command": engine_command, "image": "host"}, "package": {"volume": volume}}
    users = [engine_command, "ps", "--all", "--quiet", f"--filter=volume={volume}"]
    wait_until(lambda: not subprocess.run(users, capture_output=True, check=True).stdout)
    remove_volume(engine_command, volume)


def environment(configuration: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The variables of a program that is to have this configuration, and no setting of this host's."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(dict(configuration)), encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if key not in ENVIRONMENT and not key.startswith("PYTHON")}
    return kept | {"PYTHON_DOCKER_MCP_CONFIG": str(file)}


# ── calls of an agent, as in "Tools" and "Files" ──


class Shown(NamedTuple):
    """A call that the README shows, and its answer."""

    tool: str
    arguments: dict[str, Any]
    answer: str


def conversation(text: str) -> list[Shown]:
    """The calls in a block: each begins at the margin, and what is indented below it is its answer."""
    calls = []
    for piece in re.split(r"\n(?=\S)", text):
        line, _, answer = piece.partition("\n")
        tool, _, arguments = line.partition("(")
        assert tool in TOOLS, line
        call = ast.parse(f"call({arguments}", mode="eval").body
        assert isinstance(call, ast.Call)
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        calls.append(Shown(tool, given, textwrap.dedent(answer).strip()))
    return calls


class Agent:
    """Makes the calls that are shown, in sessions of its own."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.names: dict[str, str] = {}

    async def call(self, tool: str, **arguments: Any) -> str:
        """An answer, as text; `session_id` is the name that the README has for the session."""
        if name := arguments.get("session_id"):
            arguments["session_id"] = self.names.setdefault(name, f"{name}-{secrets.token_hex(4)}")
        return text_of(await self.client.call_tool(tool, arguments)).strip()

    async def repeat(self, shown: Shown, numbers: str = r"\d+(?:\.\d+){2,}", **paths: str) -> None:
        """Make a call and compare its answer, in which `numbers`, by default versions, may be others."""
        said = await self.call(shown.tool, **shown.arguments)
        form = r'Session: (\S+) \(new; pass session_id "\1" to go on in it\)'
        if drawn := re.search(form, shown.answer):
            here = re.search(form, said)
            assert here, said
            self.names[drawn[1]] = here[1]
        wanted = shown.answer
        for name, ours in self.names.items():
            wanted = re.sub(rf"(?<![\w-]){name}(?![\w-])", ours, wanted)
        for path, ours in paths.items():
            wanted = wanted.replace(path, ours)
        assert resembles(said, wanted, numbers), f"shown:\n{wanted}\n\nsaid:\n{said}"


@asynccontextmanager
async def an_agent(variables: dict[str, str]) -> AsyncIterator[Agent]:
    """An agent with a server in a process of its own; its sessions end with it."""
    arguments = ["-m", "python_docker_mcp"]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=variables, cwd=ROOT)
    with anyio.fail_after(4 * PATIENCE):  # the image may have to be made
        async with Client(server) as client:
            agent = Agent(client)
            try:
                yield agent
            finally:
                for name in agent.names.values():
                    await client.call_tool("cleanup-session", {"session_id": name})


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_what_an_agent_sees_is_word_for_word_what_the_readme_shows(
    configuration: dict[str, Any], engine_command: str, tmp_path: Path
) -> None:
    """On a new Python, whose tracebacks look as those of the default image."""
    if (await anyio.run_process([engine_command, "image", "inspect", NEWEST], check=False)).returncode:
        pytest.skip(f"{NEWEST} is not here")
    configuration["docker"]["image"] = NEWEST
    (transcript,) = (text for text in blocks("", "Tools"))
    async with an_agent(environment(configuration, tmp_path)) as agent:
        for shown in conversation(transcript):
            assert shown.answer, shown
            await agent.repeat(shown)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_files_go_in_and_out_as_the_readme_shows(configuration: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    for folder in ("Documents", "Downloads"):
        (home / folder).mkdir(parents=True)
    (home / "Downloads/sales.csv").write_text("month,sold\n1,31\n2,28\n", encoding="utf-8")
    (settings,) = blocks("yaml", "Files")
    variables = environment(configuration | yaml.safe_load(settings), tmp_path) | {"HOME": str(home)}
    (out, *more), (given,) = map(conversation, blocks("", "Files"))
    assert not more
    async with an_agent(variables) as agent:
        made = "import pandas as pd\ntable = pd.DataFrame({'month': range(1, 13)})"
        await agent.call("install-package", package_name="openpyxl", session_id=out.arguments["session_id"])
        await agent.call("execute-persistent", code=made, session_id=out.arguments["session_id"])
        await agent.repeat(out, numbers=r"\d+(?:\.\d+)? kB", **{HOME: str(home)})
        said = await agent.call(given.tool, **given.arguments)
        assert re.search(r"^mean +1\.5\d* +29\.5\d*$", said, re.MULTILINE), said
        (saved,) = (home / "Documents/python").rglob("*.xlsx")
        assert saved.parent.name == agent.names[out.arguments["session_id"]]


# ── a shell, as in "From the command line", and a program, as in "From Python" ──


@pytest.fixture(scope="module")
def environment_bin(tmp_path_factory: pytest.TempPathFactory, processes: FakeProcess) -> Path:
    """The programs of a virtual environment made by the README's own line, once for all processes of the tests."""
    processes.allow_unregistered(True)  # whichever test was the last before: this one may start anything
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "python-docker-mcp"
    (install,) = blocks("sh", "From the command line")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "VIRTUAL_ENV"))}
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            copy_of_the_project(folder)
            run(install, folder, {**kept, "PATH": f"{sys.base_prefix}/bin:{kept['PATH']}"})
            (folder / "done").touch()
    return folder / ".venv/bin"


def copy_of_the_project(folder: Path) -> Path:
    """Make what somebody has who has cloned the project."""
    left = shutil.ignore_patterns(
        ".git", ".venv", ".engines", ".*_cache", ".hypothesis", "__pycache__", "build", "dist"
    )
    shutil.copytree(ROOT, folder, ignore=left, dirs_exist_ok=True)
    return folder


def run(command: str, folder: Path, variables: Mapping[str, str]) -> str:
    """What a terminal shows of a command that succeeds; without what was shown for a while and overwritten."""
    ours, theirs = pty.openpty()
    seen = bytearray()
    with subprocess.Popen(
        ["timeout", str(4 * PATIENCE), "sh", "-ec", command],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO: the command has ended
            while piece := os.read(ours, 65536):
                seen += piece
        os.close(ours)
    said = re.sub(r"[^\n]*\r\x1b\[K", "", seen.decode().replace("\r\n", "\n"))
    assert process.returncode == 0, f"{command}\n{said}"
    return said


class Shell(NamedTuple):
    """Runs commands in a folder."""

    folder: Path
    variables: dict[str, str]

    def __call__(self, command: str) -> str:
        return run(command, self.folder, self.variables)


@pytest.fixture
def shell(environment_bin: Path, configuration: dict[str, Any], tmp_path: Path) -> Shell:
    """A shell in a checkout, with the environment of the README, and an engine called docker that pulls nothing."""
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    engine = shutil.which(configuration["docker"]["command"])
    docker.write_text(f'#!/bin/sh\n[ "$1" != pull ] || exit 1\nexec {engine} "$@"\n', encoding="utf-8")
    docker.chmod(0o755)
    variables = environment(configuration, tmp_path)
    variables["PATH"] = os.pathsep.join([str(environment_bin), str(docker.parent), variables["PATH"]])
    shell = Shell(copy_of_the_project(tmp_path / "checkout"), variables)
    shell("python-docker-mcp build")  # the first start shows more
    return shell


def typed(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console, and what it shows of each."""
    for piece in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command = re.match(r".*\n(?:> .*\n)*", piece)
        assert command
        yield command[0].replace("\n> ", "\n").strip(), piece[command.end() :]


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a table, by what stands first in them."""
    rows = [re.split(r"  +", line.rstrip()) for line in table.splitlines() if line.strip()]
    return {row[0]: row for row in rows}


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.slow
def test_the_command_line_answers_as_the_readme_shows(shell: Shell) -> None:
    console, doctor = blocks("console", "From the command line")
    name = f"work-{secrets.token_hex(4)}"
    try:
        for command, shown in typed(re.sub(r"\bwork\b", name, console)):
            said = shell(command)
            if command.endswith(" ps"):  # shows what all others on this engine have, too
                ours, wanted = cells(said), cells(shown)
                for row in ("SESSION", name):
                    pairs = zip_longest(ours[row], wanted[row], fillvalue="")
                    assert all(resembles(is_, form, r"(?<=-)[0-9a-f]{24}|\d+") for is_, form in pairs), said
            else:
                assert resembles(said, shown, numbers="(?!)"), f"$ {command}\nshown:\n{shown}\nsaid:\n{said}"
    finally:
        shell(f"python-docker-mcp rm {name} || true")

    ((command, shown),) = typed(doctor)
    said_of, shown_of = cells(shell(command.replace(SERVER, "python-docker-mcp"))), cells(shown)
    for check, cell in shown_of.items():
        if check in ("engine", "runtime"):  # what they see is the host's
            assert said_of[check][1] in ("ok", "warning"), said_of
        elif check != "…":
            assert resembles(" ".join(said_of[check]), " ".join(cell)), said_of[check]


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.slow
def test_the_program_that_embeds_a_runner_prints_what_its_comments_say(shell: Shell) -> None:
    (snippet,) = blocks("python", "From Python")
    name = f"work-{secrets.token_hex(4)}"
    (shell.folder / "embedded.py").write_text(snippet.replace('"work"', f'"{name}"'), encoding="utf-8")
    try:
        shell("python embedded.py >printed")  # the log, on standard error, may tell of the image
    finally:
        shell(f"python-docker-mcp rm {name}")
    assert (shell.folder / "printed").read_text().splitlines() == re.findall(
        r"print\(.*\)  # (.*)$", snippet, re.MULTILINE
    )


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.slow
def test_an_image_is_carried_over_in_a_file(shell: Shell, configuration: dict[str, Any], tmp_path: Path) -> None:
    configuration["package"]["preinstalled"] = []  # the file would be large
    environment(configuration, tmp_path)
    (commands,) = blocks("sh", "Offline and behind a proxy")
    for command in commands.splitlines():
        said = shell(command)
    (shell.folder / "image.tar").unlink()
    assert "python-docker-mcp" in said


# ── settings of clients and of the server ──


def servers() -> list[dict[str, Any]]:
    """Each server that a client is told to start."""
    files = [json.loads(text) for text in blocks("json", "Install")] + [tomllib.loads(text) for text in blocks("toml")]
    found = [next(iter(file.values())) for file in files]
    assert all(list(each) == ["python-docker"] or list(each) == ["python-docker-mcp"] for each in found), found
    return [next(iter(each.values())) for each in found]


def test_every_client_is_told_to_start_this_server() -> None:
    for server in servers():
        command = " ".join([server["command"], *server["args"]])
        assert re.match(rf"{SERVER}$|{SERVER} --config |uv --directory /\S+ run python-docker-mcp$", command), command
    for command in blocks("sh", "Install"):
        assert command.strip().endswith(f" {SERVER}")
    assert 'python-docker-mcp = "python_docker_mcp:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_setting_that_the_readme_writes_out_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("Documents", "Downloads"):
        (tmp_path / folder).mkdir()
    for number, text in enumerate(blocks("yaml")):
        (tmp_path / f"{number}.yaml").write_text(text, encoding="utf-8")
        config = load_config(tmp_path / f"{number}.yaml", {})
        assert config != load_config(None, {}), text
    for server in servers():
        variables = {key: value.replace(HOME, str(tmp_path)) for key, value in server.get("env", {}).items()}
        assert variables.keys() <= ENVIRONMENT.keys()
        assert (load_config(None, variables) != load_config(None, {})) == bool(variables)


def test_every_target_of_make_that_the_readme_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [line for text in blocks("sh", "Try it") + blocks("sh", "Development") for line in text.splitlines()]
    for command in commands:
        made = re.match(r"make (\w+)  +# ", command)
        assert made, command
        assert re.search(rf"^{made[1]}: .*## ", makefile, re.MULTILINE), command


def test_no_block_of_the_readme_is_left_out() -> None:
    seen = {
        ("Tools", ""), ("Files", ""), ("Files", "yaml"), ("Network", "yaml"), ("Secrets", "yaml"), ("Files", "json"),
        ("The first start", "yaml"),
        ("Install", "json"),
        ("Install", "toml"), ("Install", "sh"), ("From the command line", "sh"), ("From the command line", "console"),
        ("A server for a team", "sh"), ("A server for a team", "json"), ("A server for a team", "ini"),
        ("A server for a team", "nginx"), ("A server for a team", "haproxy"),
        ("From Python", "python"), ("Offline and behind a proxy", "sh"), ("Try it", "sh"), ("Development", "sh"),
    }  # fmt: skip
    pictures = {("", ""), ("The first start", "")}  # a drawing, and a log of what takes a registry
    assert {(block.chapter, block.language) for block in all_blocks()} == seen | pictures
    assert DockerConfig.image in README
