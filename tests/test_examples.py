"""The examples, run as their readers run them: as programs of their own, on real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import sandbox_runner

pytestmark = [pytest.mark.engine, pytest.mark.in_turns]
EXAMPLES = ROOT / "tests/examples"


def run(folder: Path, engine_command: str, *command: str | Path, packages: list[str] | None) -> str:
    """What a program prints with settings for the engine; with what is preinstalled, unless that is given."""
    settings = {"docker": {"command": engine_command, "image": "host", "timeout": 120}, "pool": {"enabled": False}}
    if packages is not None:
        settings["package"] = {"preinstalled": packages}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    environ = {**os.environ, "PYTHON_DOCKER_MCP_CONFIG": str(folder / "config.yaml")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_analysis_with_a_plot(tmp_path: Path, engine_command: str) -> None:
    mount = f"--mount={ROOT / 'tests/data'}:/data"
    said = run(tmp_path, engine_command, sandbox_runner.__file__, mount, EXAMPLES / "weather_plot.py", packages=None)
    assert "  14.2  26.0   12.0\n" in said
    assert (tmp_path / "figure-1.png").read_bytes().startswith(b"\x89PNG")


def test_data_analysis_by_the_standard_library(tmp_path: Path, engine_command: str) -> None:
    mount = f"--mount={ROOT / 'tests/data'}:/data"
    said = run(tmp_path, engine_command, sandbox_runner.__file__, mount, EXAMPLES / "weather.py", packages=[])
    assert said.endswith("{'days': 1461, 'mean °C': 12.3, 'rain, mm a year': 1107, 'wet days a year': 126}\n"), said


def test_work_in_steps(tmp_path: Path, engine_command: str) -> None:
    said = run(tmp_path, engine_command, EXAMPLES / "session.py", packages=[])
    assert "\n[3.14, 12.57, 28.27]\n" in said
    assert said.endswith(
        "TypeError on line 1, state preserved\n>>> radii.append(4)\n... round(area(radii[-1]), 2)\n50.27\n"
    )


def test_a_package_for_a_session(tmp_path: Path, engine_command: str) -> None:
    missing, installed, value = run(tmp_path, engine_command, EXAMPLES / "packages.py", packages=[]).splitlines()
    assert missing == "humanize is missing"
    assert "can be imported in the session" in installed
    assert value == "['12 Bytes', '3.4 kB', '5.6 MB']"


def test_a_batch_of_transient_calls(tmp_path: Path, engine_command: str) -> None:
    assert run(tmp_path, engine_command, EXAMPLES / "batch.py", packages=[]).splitlines() == [
        "ada: right",
        "bob: wrong: AssertionError: an even number of numbers",
        "eve: wrong: the code did not end within 2 seconds",
        "joe: wrong: SyntaxError: expected ':'",
    ]
