"""Configuration: defaults, the file, the environment, and one clear sentence for everything that can't be."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from sandbox_runner import (
    ENVIRONMENT,
    Config,
    ConfigError,
    DockerConfig,
    FilesConfig,
    HttpConfig,
    PackageConfig,
    PoolConfig,
    SessionConfig,
    load_config,
    mount_argument,
    size_in_bytes,
)

EXAMPLE = ROOT / "config.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the configuration is."""
    return tmp_path / "config.yaml"


def load(file: Path, text: str, **environ: str) -> Config:
    file.write_text(text, encoding="utf-8")
    return load_config(file, environ)


def refusal(file: Path, text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, text, **environ)
    return str(caught.value)


# ── where it comes from ──


def test_without_file_and_environment_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(environ={}) == Config()


def test_the_defaults_are_those_that_the_brief_names() -> None:
    assert dataclasses.asdict(Config())["docker"].items() >= {
        "image": "python:3.12.2-slim", "working_dir": "/app", "memory_limit": "256m", "cpu_limit": 0.5,
        "timeout": 30.0, "network_disabled": True, "read_only": True,
    }.items()  # fmt: skip
    assert Config().package.installer == "uv"
    assert (Config().package.index_url, Config().package.trusted_hosts) == (None, ())
    assert (Config().allowed_modules, Config().blocked_modules) == ((), ())
    pool = Config().pool
    assert (pool.enabled, pool.size, pool.max_age, pool.max_concurrent_creations) == (True, 32, 300.0, 5)


def test_the_file_in_the_home_is_read_if_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".python-docker-mcp").mkdir()
    (tmp_path / ".python-docker-mcp/config.yaml").write_text("docker: {timeout: 5}")
    assert load_config(environ={}).docker.timeout == 5


def test_the_environment_names_a_file_and_an_argument_wins_over_it(tmp_path: Path) -> None:
    for name, timeout in (("one", 1), ("two", 2)):
        (tmp_path / name).write_text(f"docker: {{timeout: {timeout}}}")
    environ = {"PYTHON_DOCKER_MCP_CONFIG": str(tmp_path / "one")}
    assert load_config(environ=environ).docker.timeout == 1
    assert load_config(tmp_path / "two", environ).docker.timeout == 2


@pytest.mark.parametrize("text", ["", "# nothing", "docker:", "docker: {}\npool:\nallowed_modules:"])
def test_what_the_file_leaves_empty_has_its_default(file: Path, text: str) -> None:
    assert load(file, text) == Config()


def test_the_example_that_people_copy_means_what_it_says(file: Path) -> None:
    config = load(
        file,
        "allowed_modules: [math, datetime, random, json, re, collections]\n"
        "blocked_modules: [os, sys, subprocess, shutil, pathlib]\n"
        "docker: {image: 'python:3.11', network_disabled: false, mounts: ['/usr/share:/host']}",
    )
    assert config.allowed_modules == ("math", "datetime", "random", "json", "re", "collections")
    assert config.blocked_modules == ("os", "sys", "subprocess", "shutil", "pathlib")
    assert config.docker == DockerConfig(image="python:3.11", network_disabled=False, mounts=("/usr/share:/host",))


SAMPLES = {  # for each variable: text, and the value that it stands for
    "PYTHON_DOCKER_MCP_POOL_ENABLED": ("false", False),
    "PYTHON_DOCKER_MCP_POOL_SIZE": ("7", 7),
    "PYTHON_DOCKER_MCP_POOL_MAX_AGE": ("12.5", 12.5),
    "PYTHON_DOCKER_MCP_MAX_CONCURRENT_CREATIONS": ("3", 3),
    "PYTHON_DOCKER_MCP_MEMORY_LIMIT": ("1g", "1g"),
    "PYTHON_DOCKER_MCP_CPU_LIMIT": ("2", 2.0),
    "PYTHON_DOCKER_MCP_FILES_OUTPUT": ("/srv/results", "/srv/results"),
    "PYTHON_DOCKER_MCP_FILES_INPUTS": (f"/usr/share{os.pathsep}/usr/lib", ("/usr/share", "/usr/lib")),
}


def test_there_is_a_sample_of_each_variable() -> None:
    assert set(SAMPLES) == set(ENVIRONMENT)


@pytest.mark.parametrize("variable", SAMPLES)
def test_a_variable_wins_over_the_file_and_changes_nothing_else(file: Path, variable: str) -> None:
    text, value = SAMPLES[variable]
    section, _, name = ENVIRONMENT[variable].partition(".")
    changed = dataclasses.replace(getattr(Config(), section), **{name: value})
    for content in ("", f"{section}:", f"{section}: {{{name}: 32}}"):
        assert load(file, content, **{variable: text}) == dataclasses.replace(Config(), **{section: changed})


def test_an_empty_variable_is_as_one_that_is_not_set(file: Path) -> None:
    assert load(file, "docker: {memory_limit: 1g}", **dict.fromkeys(ENVIRONMENT, "")).docker.memory_limit == "1g"


# ── what is refused ──


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("docker: {imgae: x}", "There is no setting docker.imgae (FILE): did you mean docker.image?"),
        ("docker: {timout: 3}", "There is no setting docker.timout (FILE): did you mean docker.timeout?"),
        ("alowed_modules: [math]", "There is no setting alowed_modules (FILE): did you mean allowed_modules?"),
        ("package: {instaler: pip}", "There is no setting package.instaler (FILE): did you mean package.installer?"),
        ("docker: {timeout: soon}", "docker.timeout in FILE: 'soon' is not accepted: it must be a number."),
        ("docker: {timeout: 0}", "docker.timeout in FILE: 0.0 is not a number above zero."),
        ("docker: {timeout: .inf}", "docker.timeout in FILE: inf is not a number above zero."),
        ("docker: {timeout: .nan}", "docker.timeout in FILE: nan is not a number above zero."),
        ("docker: {cpu_limit: -1}", "docker.cpu_limit in FILE: -1.0 is not a number above zero."),
        ("docker: {memory_limit: lots}", "docker.memory_limit in FILE: 'lots' is not a size such as 256m or 1g."),
        ("docker: {memory_limit: 1m}", "docker.memory_limit in FILE: '1m' is too little; the least is 32m."),
        ("docker: {disk_limit: 1k}", "docker.disk_limit in FILE: '1k' is too little; the least is 1m."),
        (
            "docker: {timeout: 400}",
            "docker.timeout in FILE: 400 is more than docker.max_timeout (300) allows: raise that",
        ),
        (
            "session: {max_timeout: 9}",
            "docker.timeout in FILE: 30 is more than session.max_timeout (9) allows: raise that",
        ),
        ("docker: {memory_limit: 1024}", "docker.memory_limit in FILE: '1024' is too little; the least is 32m."),
        ("docker: {working_dir: app}", "docker.working_dir in FILE: 'app' is not an absolute path such as /app."),
        ("docker: {working_dir: /a/../b}", "docker.working_dir in FILE: '/a/../b' is not an absolute path"),
        ("docker: {image: --rm}", "docker.image in FILE: '--rm' is not the name of an image"),
        ("docker: {image: ''}", "docker.image in FILE: '' is not the name of an image"),
        ("docker: {gpus: 2}", "docker.gpus in FILE: 2 is not accepted: it must be text"),
        ("docker: {gpus: '2'}", "docker.gpus in FILE: '2' is neither all nor a list such as device=0,1."),
        ("docker: {gpus: 'device=0 1'}", "docker.gpus in FILE: 'device=0 1' is neither all nor a list"),
        ("docker: {runtime: --x}", "docker.runtime in FILE: '--x' is not the name of a runtime such as runsc."),
        ("docker: {mounts: [data]}", "docker.mounts in FILE: 'data' is not HOST_PATH:CONTAINER_PATH"),
        ("docker: {mounts: ['/nowhere:/x']}", "docker.mounts in FILE: '/nowhere' does not exist on this host."),
        ("docker: {mounts: /x}", "docker.mounts in FILE: '/x' is not accepted: it must be a list, such as [one, two]."),
        (
            "docker: {read_only: perhaps}",
            "docker.read_only in FILE: 'perhaps' is not accepted: it must be true or false.",
        ),
        ("docker: [1]", "docker in FILE: [1] is not accepted: it must be keys with values, as in config.yaml."),
        (
            "allowed_modules: math",
            "allowed_modules in FILE: 'math' is not accepted: it must be a list, such as [one, two].",
        ),
        (
            "allowed_modules: [1]",
            "allowed_modules.0 in FILE: 1 is not accepted: it must be text, in quotes if it looks like something else.",
        ),
        ("session: {idle_timeout: 0}", "session.idle_timeout in FILE: 0.0 is not a number of seconds above zero."),
        ("package: {installer: conda}", "package.installer in FILE: 'conda' is not accepted: input should be 'uv' or"),
        ("package: {index_url: pypi}", "package.index_url in FILE: 'pypi' is not an address (http or https)"),
        ("package: {trusted_hosts: [a b]}", "package.trusted_hosts in FILE: 'a b' is not a host's name"),
        ("package: {preinstalled: [-r x]}", "package.preinstalled in FILE: '-r x' is not a package's name"),
        ("package: {ca_bundle: /nowhere}", "package.ca_bundle in FILE: '/nowhere' is not a file on this host."),
        ("pool: {size: 0}", "pool.size in FILE: 0 is not a number above zero."),
        ("pool: {size: 1.5}", "pool.size in FILE: 1.5 is not accepted: it must be a whole number."),
        ("pool: {warm: -1}", "pool.warm in FILE: -1 is below zero."),
        ("pool: {preload: ['a b']}", "pool.preload in FILE: 'a b' is not the name of a module."),
        ("- a\n- b", "FILE: ['a', 'b'] is not accepted"),
        ("just text", "FILE: 'just text' is not accepted"),
        ("docker: {image: x", "The configuration FILE is not YAML (line 1): see config.yaml for an example."),
        ("a: 1\nb: [\n", "The configuration FILE is not YAML (line 3): see config.yaml for an example."),
        ("1: 2", "1 in FILE: 1 is not accepted: keys should be strings."),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_that_names_key_and_place(file: Path, text: str, says: str) -> None:
    message = refusal(file, text)
    assert message.startswith(says.replace("FILE", str(file)))
    assert message.endswith((".", "?"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "PYTHON_DOCKER_MCP_CPU_LIMIT",
            "half",
            "PYTHON_DOCKER_MCP_CPU_LIMIT: 'half' is not accepted: it must be a number.",
        ),
        ("PYTHON_DOCKER_MCP_CPU_LIMIT", "0", "PYTHON_DOCKER_MCP_CPU_LIMIT: 0.0 is not a number above zero."),
        (
            "PYTHON_DOCKER_MCP_POOL_SIZE",
            "many",
            "PYTHON_DOCKER_MCP_POOL_SIZE: 'many' is not accepted: it must be a whole number.",
        ),
        ("PYTHON_DOCKER_MCP_POOL_ENABLED", "maybe", "PYTHON_DOCKER_MCP_POOL_ENABLED: 'maybe' is not accepted"),
    ],
)
def test_a_wrong_variable_is_named_as_the_place(file: Path, variable: str, value: str, says: str) -> None:
    assert refusal(file, "", **{variable: value}).startswith(says)


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml can't be read: No such file or directory\.$"):
        load_config(tmp_path / "nowhere.yaml", {})


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file, {})


def test_long_values_are_cut_in_the_message(file: Path) -> None:
    assert len(refusal(file, f"docker: {{timeout: {'x' * 10_000}}}")) < 400


# ── values ──


@pytest.mark.parametrize(
    ("size", "value"),
    [("0", 0), ("12", 12), ("12b", 12), ("2k", 2048), ("256m", 256 << 20), ("1.5G", 3 << 29), ("1 GiB", 1 << 30)],
)
def test_sizes_are_read_as_docker_reads_them(size: str, value: int) -> None:
    assert size_in_bytes(size) == value


@pytest.mark.parametrize("size", ["", "m", "-1m", "1t", "1e3", "1,5m"])
def test_other_text_is_no_size(size: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 256m or 1g"):
        size_in_bytes(size)


def test_mounts_are_read_only_unless_said_otherwise(tmp_path: Path) -> None:
    assert mount_argument(f"{tmp_path}:/data") == f"type=bind,source={tmp_path},target=/data,ro"
    assert mount_argument(f"{tmp_path}:/data:ro") == f"type=bind,source={tmp_path},target=/data,ro"
    assert mount_argument(f"{tmp_path}:/data:rw") == f"type=bind,source={tmp_path},target=/data"


def test_a_mount_starts_from_the_home_or_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("~/data", "data", "./data"):
        assert mount_argument(f"{source}:/x").startswith(f"type=bind,source={tmp_path}/")


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home with the places in it that no mount may show."""
    for folder in ("data", ".python-docker-mcp", ".local/share/docker/volumes/x", "run"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".python-docker-mcp/config.yaml").touch()
    (tmp_path / "sockets").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path / "sockets")  # as the path of a socket must be short
        listener.bind("engine.sock")
    (tmp_path / "data/link").symlink_to("../sockets")
    (tmp_path / "data/home").symlink_to("..")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/away/podman.sock")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/", "it is the host's root"),
        ("/.", "it is the host's root"),
        ("/proc/..", "it is the host's root"),
        ("~", "it is the home directory"),
        ("~/data/home", "it is the home directory"),
        ("~/..", "the home directory is in it"),
        ("/etc", "it is the host's configuration"),
        ("/proc", "it is the host's kernel interface"),
        ("/proc/self", "it is part of the host's kernel interface (/proc)"),
        ("/sys/kernel", "it is part of the host's kernel interface (/sys)"),
        ("/dev/null", "it is part of the host's kernel interface (/dev)"),
        ("/run", "it is the folder of this host's sockets"),
        ("~/run", "it is the folder of this host's sockets"),
        ("/var", "is in it (/var/lib/docker)"),
        ("~/.local", "the engine's own data is in it"),
        ("~/.local/share/docker/volumes/x", "it is part of the engine's own data"),
        ("~/.python-docker-mcp", "it is this server's own configuration"),
        ("~/.python-docker-mcp/config.yaml", "it is part of this server's own configuration"),
        ("~/sockets/engine.sock", "engine.sock is a socket"),
        ("~/sockets", "engine.sock is a socket"),
        ("~/data/link", "engine.sock is a socket"),
        ("~/data/link/engine.sock", "engine.sock is a socket"),
    ],
)
def test_a_place_of_the_host_that_would_undo_the_sandbox_is_not_mounted(home: Path, source: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        mount_argument(f"{source}:/x")
    assert str(caught.value).startswith(f"docker.mounts: {source!r} is refused, as ")
    assert mount_argument("~/data:/x").startswith(f"type=bind,source={home}/data,")


def test_where_docker_host_says_that_the_engine_listens_is_not_mounted(home: Path) -> None:
    (home / "away").mkdir()
    with pytest.raises(ValueError, match=r"the engine's socket \(DOCKER_HOST\) is in it"):
        mount_argument("~/away:/x")


def test_the_configuration_in_use_is_not_mounted_wherever_it_is(home: Path) -> None:
    file = home / "data/settings.yaml"
    for source in ("~/data", "~/data/settings.yaml"):
        message = refusal(file, f"docker: {{mounts: ['{source}:/x']}}")
        assert message == f"docker.mounts: {source!r} is refused, as the configuration {file} is in it."
    assert load(home / "run/settings.yaml", "docker: {mounts: ['~/data:/x']}").docker.mounts


@pytest.mark.parametrize(
    ("target", "hides"),
    [
        ("/", "/proc"),
        ("//", "/proc"),
        ("/proc/1", "/proc"),
        ("/sys", "/sys"),
        ("/dev/shm", "/dev"),
        ("/packages/x", "/packages"),
        ("/tmp", "/tmp"),
        ("/./code/", "/code/dir"),
        ("/code/dir", "/code/dir"),
        ("/usr", "/usr/bin"),
        ("/usr/local/lib", "/usr/local/lib"),
        ("/opt", "/opt/python-docker-mcp"),
        ("/data/../proc", "/proc"),
    ],
)
def test_a_mount_hides_nothing_that_the_sandbox_needs(tmp_path: Path, target: str, hides: str) -> None:
    with pytest.raises(ValueError, match=rf"docker.mounts: '.*' is refused, as it would hide {hides} of the container"):
        DockerConfig(working_dir="/code/dir", mounts=(f"{tmp_path}:{target}",))


@pytest.mark.parametrize("target", ["/data", "/code/dir/data", "/tmp/data", "/usr/share/fonts", "/code/other", "/tmpx"])
def test_a_mount_may_be_anywhere_else(tmp_path: Path, target: str) -> None:
    assert mount_argument(f"{tmp_path}:{target}", "/code/dir").endswith(f",target={target},ro")


def test_a_mount_with_a_comma_is_refused_for_the_command_line_can_not_take_it(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    with pytest.raises(ValueError, match="has a comma"):
        mount_argument(f"{tmp_path}/a,b:/x")


# ── config.yaml ──


def plain(value: Any) -> Any:
    """As YAML has it: lists for tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def test_the_example_shows_every_key_in_order_with_its_default() -> None:
    shown = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    defaults = plain(dataclasses.asdict(Config()))
    assert shown == defaults
    assert [list(section) for section in shown.values() if isinstance(section, dict)] == [
        list(section) for section in defaults.values() if isinstance(section, dict)
    ]


def test_the_example_is_a_configuration_that_changes_nothing() -> None:
    assert load_config(EXAMPLE, {}) == Config()


def test_the_example_says_of_every_key_what_it_means() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    keys = [index for index, line in enumerate(lines) if re.match(r"\s*[a-z_]+:", line)]
    sections = [
        item.name for item in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(Config(), item.name))
    ]
    settings = [DockerConfig, SessionConfig, PackageConfig, FilesConfig, PoolConfig, HttpConfig]
    assert len(sections) == len(settings)
    assert len(keys) == len(dataclasses.fields(Config)) + sum(len(dataclasses.fields(item)) for item in settings)
    for index in keys:
        assert re.search(r"  # \S.*\S$", lines[index]), lines[index]


def test_the_example_names_every_variable_at_the_key_it_wins_over() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for variable, key in ENVIRONMENT.items():
        name = key.partition(".")[2]
        assert any(line.strip().startswith(f"{name}:") and variable in line for line in lines), variable
