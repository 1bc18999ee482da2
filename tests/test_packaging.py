"""What is published: files that agree with each other, and a wheel and a source distribution that lack nothing."""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import urllib.parse
import zipfile
from pathlib import Path

import pytest
import readme
from conftest import ROOT
from pytest_subprocess import FakeProcess

import python_docker_mcp
import sandbox_runner
from sandbox_runner import DockerConfig, __version__

MODULES = ["python_docker_mcp", "sandbox_runner"]
IN_THE_SANDBOX = {"matplotlib", "PIL"}  # imported there, where the image has them


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command's end, without the variables that would lead a Python back to this project."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# ── files that agree ──


def test_all_files_name_the_same_version() -> None:
    server, manifest = json.loads(read("server.json")), json.loads(read("manifest.json"))
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert {
        "pyproject.toml": tomllib.loads(read("pyproject.toml"))["project"]["version"],
        "server.json": server["version"],
        "server.json, package": server["packages"][0]["version"],
        "manifest.json": manifest["version"],
        "CHANGELOG.md": newest[1],
    } == dict.fromkeys(
        ["pyproject.toml", "server.json", "server.json, package", "manifest.json", "CHANGELOG.md"], __version__
    )


def test_the_readme_shows_every_setting_as_it_is() -> None:
    assert read("README.md") == readme.updated(read("README.md")), "run `make docs`, which writes the tables anew"


def test_every_file_and_heading_that_the_readme_links_to_is_there() -> None:
    text = read("README.md")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((?!https?:|vscode:|cursor:)([^)]+)\)|src=\"(?!https?:)([^\"]+)\"", text):
        link = "".join(target)
        assert (link[1:] in headings) if link.startswith("#") else (ROOT / link).exists(), link


def test_every_message_in_the_readme_is_one_that_the_program_has() -> None:
    table = read("README.md").partition("## Troubleshooting")[2].partition("##")[0]
    messages = [
        message for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for message in row.strip("`").split("`, `")
    ]
    assert len(messages) > 10
    source = re.sub(r"\"\n\s*f?\"", "", read("sandbox_runner.py") + read("python_docker_mcp.py"))
    source = re.sub(r"\{[^{}]*\}", "…", source).replace("\\", "")
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message


def test_one_click_installs_what_the_readme_writes_out() -> None:
    links = re.findall(r"\]\((https://(?:insiders.vscode.dev|cursor.com)/[^)]+)\)", read("README.md"))
    vscode, cursor = (urllib.parse.parse_qs(urllib.parse.urlsplit(link).query) for link in links)
    wanted = {"command": "uvx", "args": ["python-docker-mcp"]}
    address, _, settings = vscode["url"][0].partition("?")
    assert address == "vscode:mcp/install"
    assert json.loads(urllib.parse.unquote(settings)) == {"name": "python-docker", **wanted}
    assert (cursor["name"], json.loads(base64.b64decode(cursor["config"][0]))) == (["python-docker"], wanted)


def test_the_registry_finds_the_name_that_it_checks_in_the_readme_that_pypi_shows() -> None:
    project, server = tomllib.loads(read("pyproject.toml"))["project"], json.loads(read("server.json"))
    assert f"<!-- mcp-name: {server['name']} -->" in read(project["readme"])
    assert [package["identifier"] for package in server["packages"]] == [project["name"]]
    assert f"{project['name']} = " in read("pyproject.toml").partition("[project.scripts]")[2]  # what `uvx` runs


def test_the_registry_entry_keeps_to_the_registrys_limits() -> None:
    # https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json
    server = json.loads(read("server.json"))
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", server["name"])
    assert 1 <= len(server["description"]) <= 100
    assert 1 <= len(server["title"]) <= 100


def test_what_the_registry_and_the_desktop_bundle_offer_to_set_has_the_defaults_of_the_code() -> None:
    defaults = {"memory_limit": DockerConfig.memory_limit, "cpu_limit": DockerConfig.cpu_limit}
    manifest = json.loads(read("manifest.json"))
    # A bundle's variable without default would reach the server as "${user_config.output}"; empty, it is as if not set.
    folders = {"files_output": "", "files_inputs": ""}
    options = {name: option["default"] for name, option in manifest["user_config"].items()}
    assert options == {name.removeprefix("files_"): value for name, value in (defaults | folders).items()}
    variables = json.loads(read("server.json"))["packages"][0]["environmentVariables"]
    offered = {item["name"].removeprefix("PYTHON_DOCKER_MCP_").lower(): item.get("default") for item in variables}
    shown = {name: str(value) for name, value in defaults.items()} | dict.fromkeys(folders)
    assert offered == {"config": None, **shown}
    assert set(manifest["server"]["mcp_config"]["env"]) < {item["name"] for item in variables}


def test_the_desktop_bundle_names_the_tools_there_are_and_a_file_that_is_there() -> None:
    manifest = json.loads(read("manifest.json"))
    assert [tool["name"] for tool in manifest["tools"]] == list(python_docker_mcp.TOOLS)
    assert (ROOT / manifest["server"]["entry_point"]).is_file()
    assert manifest["server"]["mcp_config"]["args"][-1] == manifest["server"]["entry_point"]


# ── what is built ──


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it; what it depends on is lent from the one that runs this."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(str(Path(pytest.__file__).parents[1]), encoding="utf-8")
    return python


@pytest.mark.slow
def test_the_wheel_holds_the_modules_their_stubs_and_the_metadata(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert sorted(names) == sorted(
            [f"{module}{end}" for module in MODULES for end in (".py", "-stubs/__init__.pyi")]
        )
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "mcp-name: " in archive.read(metadata).decode()
        for module in MODULES:
            assert archive.read(f"{module}-stubs/__init__.pyi") == archive.read(f"{module}.py")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only Git knows which files are the project's")
def test_the_source_distribution_holds_every_file_of_the_project(built: Path, tripwire: FakeProcess) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tripwire.pass_command(["git", "ls-files"])
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    assert [name for name in tracked if name not in packed and not name.startswith(".ci/")] == []


@pytest.mark.slow
def test_both_programs_start_from_an_environment_that_has_only_the_wheel(installed: Path, tmp_path: Path) -> None:
    for command, name in (
        ([installed.with_name("python-docker-mcp")], "python-docker-mcp "),
        (["-m", "python_docker_mcp"], "python-docker-mcp "),
        (["-m", "sandbox_runner"], ""),
    ):
        assert run(installed, "-P", *command, "--version", cwd=tmp_path).stdout == f"{name}{__version__}\n"
    where = run(installed, "-P", "-c", "import sandbox_runner; print(sandbox_runner.__file__)", cwd=tmp_path).stdout
    assert where.startswith(str(installed.parents[1]))


@pytest.mark.slow
def test_a_type_checker_knows_the_types_of_the_installed_modules(
    installed: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    (tmp_path / "user.py").write_text(
        "from python_docker_mcp import make_server\n"
        "from sandbox_runner import open_runner\n"
        "async def main() -> None:\n"
        "    async with open_runner() as runner:\n"
        "        reveal_type((await runner.execute('1')).value)\n"
        "        reveal_type(make_server(runner))\n"
        "        await runner.execute(1)  # type: ignore[arg-type]\n",
        encoding="utf-8",
    )
    kept = pytestconfig.cache.mkdir("mypy") if pytestconfig.cache else tmp_path  # what others' modules have for types
    checked = run(
        sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", kept,
        "--python-executable", installed, "user.py", cwd=tmp_path,
    )  # fmt: skip
    assert 'Revealed type is "str | None"' in checked.stdout
    assert 'Server[def () -> python_docker_mcp.Service]"' in checked.stdout


@pytest.mark.slow
def test_the_tests_run_from_an_unpacked_source_distribution(built: Path, tmp_path: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_config.py", cwd=folder)
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_what_is_imported_is_declared() -> None:
    declared = {
        re.split(r"[<>=; ]", line)[0] for line in tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    }
    distributions = importlib.metadata.packages_distributions()
    for module in (sandbox_runner, python_docker_mcp):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported = {name.partition(".")[0] for name in names} - {"sandbox_runner", *IN_THE_SANDBOX}
        foreign = imported - set(sys.stdlib_module_names)
        assert {sandbox_runner.plain_name(distributions[name][0]) for name in foreign} <= declared
