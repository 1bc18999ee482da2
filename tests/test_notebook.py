"""A session as a notebook: what is in it, that it costs no call, and what becomes of it."""
# ruff: noqa: ASYNC240  # files that are looked at when nothing else goes on

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import anyio
import nbformat
import pytest

import python_docker_mcp
import sandbox_runner
from sandbox_runner import (
    Config,
    DockerConfig,
    ExceptionInfo,
    FilesConfig,
    NotebookPlace,
    Omitted,
    Result,
    Rich,
    Text,
    extended,
    open_runner,
    outputs_of,
)

pytestmark = pytest.mark.anyio

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where notebooks are kept that are not beside their files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".python-docker-mcp/notebooks"


def opened(file: Path) -> Any:
    """A notebook, which has to be a valid one."""
    notebook = nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert notebook.metadata.language_info.file_extension == ".py", "else nbconvert makes a .txt of it"
    return notebook


def valid(cells: list[str]) -> list[Any]:
    """Cells, which have to be valid ones."""
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [json.loads(cell) for cell in cells]}
    nbformat.validate(nbformat.from_dict(notebook))  # type: ignore[no-untyped-call]
    return [json.loads(cell) for cell in cells]


def test_all_that_a_call_shows_is_in_its_cell() -> None:
    error = ExceptionInfo("ValueError", "no", 2, "Traceback (most recent call last):\n  File x\nValueError: no\n")
    shown = (
        Text("stdout", "a\n"),
        Text("stderr", "b\n"),
        Omitted(7),
        Rich({"text/plain": "<Figure>", "image/png": PNG}),
        Rich({"text/plain": "chart", "application/vnd.vegalite.v5+json": '{"mark": "bar"}', "application/json": "["}),
    )
    cells = extended([], "x", Result("error", output=shown, exception=error))
    cells = extended(cells, "y", Result("ok", value="42"))
    cells = extended(cells, "z", Result("timeout", message="the code did not end within 2 seconds"))
    first, second, third = valid(cells)
    kinds = [output["output_type"] for output in first["outputs"]]
    assert kinds == ["stream", "stream", "stream", "display_data", "display_data", "error"]
    assert first["outputs"][4]["data"]["application/vnd.vegalite.v5+json"] == {"mark": "bar"}
    assert second["outputs"][0]["data"] == {"text/plain": "42"}
    assert (first["execution_count"], second["execution_count"]) == (1, 2)
    assert third["outputs"][0]["text"] == "[the code did not end within 2 seconds]\n"
    assert len({cell["id"] for cell in (first, second, third)}) == 3


def test_a_value_has_its_text_for_readers_that_show_no_html() -> None:
    table = Rich({"text/html": "<table>"}, is_value=True)
    (shown,) = outputs_of(Result("ok", output=(table,), value="   a\n0  1"))
    assert shown["data"] == {"text/plain": "   a\n0  1", "text/html": "<table>"}


@pytest.mark.parametrize("code", ["```python\nx = 1\n```", "\n~~~\nx = 1\n~~~\n", "x = 1"])
def test_code_stands_there_without_its_fences(code: str) -> None:
    assert [cell["source"] for cell in valid(extended([], code, Result("ok")))] == ["x = 1"]


def test_it_says_where_variables_were_lost() -> None:
    cells = extended([], "x = 1", Result("died", message="the code ended its own process", state="lost"))
    cells = extended(cells, "x", Result("error", lost_before="killed by signal 9"))
    told = [[output["text"] for output in cell["outputs"]] for cell in valid(cells)]
    assert told == [
        ["[the code ended its own process]\n", "[the session's variables are lost]\n"],
        ["[the session's variables had been lost: killed by signal 9]\n"],
    ]


def test_what_is_waited_for_goes_to_the_cell_that_it_is_of() -> None:
    cells = extended([], "slow()", Result("running", output=(Text("stdout", "1"),)))
    cells = extended(cells, "", Result("running"))
    cells = extended(cells, " ", Result("ok", output=(Text("stdout", "2"),)))
    (cell,) = valid(cells)
    assert [output["text"] for output in cell["outputs"]] == ["1", "2"]
    assert extended([], "", Result("ok")) == []
    cells = extended(cells, "next()", Result("ok", unread=Result("ok", output=(Text("stdout", "3"),)), value="4"))
    assert [len(cell["outputs"]) for cell in valid(cells)] == [2, 2]


def test_a_notebook_is_bounded_and_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_runner, "NOTEBOOK_LIMIT", 5000)
    cells: list[str] = []
    for number in range(40):
        cells = extended(cells, f"call_{number}()", Result("ok", value="x" * 500))
        assert sum(map(len, cells)) <= 5000
    shown = valid(cells)
    assert shown[-1]["outputs"][0]["data"]["text/plain"] == "x" * 500
    assert "left out" in shown[0]["outputs"][0]["text"]
    assert shown[-1]["execution_count"] > len(shown) // 2


def test_a_session_that_began_anew_is_told() -> None:
    cells = extended([], "x = 1", Result("ok", is_new=True))
    cells = extended(cells, "x", Result("error", is_new=True))
    assert [cell["cell_type"] for cell in valid(cells)] == ["code", "markdown", "code"]


def test_output_that_is_no_text_or_json_costs_nothing() -> None:
    assert outputs_of(Result("ok", output=(Rich({"application/json": "[" * 100_000}),)))


async def test_calls_in_sessions_are_written_and_go_on_with_the_next_program(settings: Config, home: Path) -> None:
    async with open_runner(settings, notebooks=True) as runner:
        await runner.execute("x = 20", session="study")
        await runner.execute("print(x)\nx + 1", session="study")
        await runner.execute("transient = 1")
    async with open_runner(settings, notebooks=True) as runner:
        await runner.execute("x * 2", session="study")
        await runner.close_session("study")
    assert [file.name for file in home.iterdir()] == ["study.ipynb"]
    assert home.stat().st_mode & 0o777 == 0o700
    cells = opened(home / "study.ipynb").cells
    assert [cell.source for cell in cells] == ["x = 20", "print(x)\nx + 1", "x * 2"]
    assert cells[1].outputs[0].text == "20\n"
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.source, names)  # it can be run again from top to bottom
    assert names["x"] == 20
    async with open_runner(settings) as runner:
        await runner.execute("x = 1", session="unseen")
        await runner.close_session("unseen")
    assert not (home / "unseen.ipynb").exists()


async def test_nothing_is_kept_if_that_is_wanted(settings: Config, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = dataclasses.replace(settings, files=FilesConfig(output=str(output), notebook=False))
    async with open_runner(settings, notebooks=True) as runner:
        await runner.execute("open('made.csv', 'w').write('x')", session="study")
        await runner.close_session("study")
    assert not home.exists()
    assert [file.name for file in (output / "study").iterdir()] == ["made.csv"]


def test_export_tells_that_nothing_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("files: {notebook: false}")
    with pytest.raises(SystemExit) as ended:
        python_docker_mcp.main(["export", "study", "--config", str(file)])
    assert ended.value.code == 1
    assert "nothing is kept of a session 'study': files.notebook is false" in capsys.readouterr().err


async def test_it_is_beside_the_files_if_that_is_wanted_and_no_link_is_followed(
    settings: Config, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = FilesConfig(output=str(tmp_path / "out"), notebook=True)
    settings = dataclasses.replace(settings, files=files)
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"cells": [{"a": "secret"}]}))
    (tmp_path / "out/linked").mkdir(parents=True)
    (tmp_path / "out/linked/session.ipynb").symlink_to(secret)
    (tmp_path / "out/odd").mkdir()
    (tmp_path / "out/odd/session.ipynb").write_text("[1, 2")
    (tmp_path / "out/folder/session.ipynb").mkdir(parents=True)
    async with open_runner(settings, notebooks=True) as runner:
        for name in ("study", "linked", "odd", "folder"):
            assert (await runner.execute("open('made.csv', 'w').write('x')", session=name)).status == "ok"
            await runner.close_session(name)
    for name in ("study", "linked", "odd"):
        assert len(opened(tmp_path / "out" / name / "session.ipynb").cells) == 1
    assert (tmp_path / "out/study/made.csv").exists()
    assert json.loads(secret.read_text()) == {"cells": [{"a": "secret"}]}
    assert not (tmp_path / "out/linked/session.ipynb").is_symlink()
    assert "out/folder/session.ipynb can't be written" in caplog.text
    assert not home.exists()


async def test_a_call_does_not_wait_for_its_notebook(
    settings: Config, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, goes_on = anyio.Event(), anyio.Event()
    write = sandbox_runner.Notebooks.write

    async def slow(self: Any) -> None:
        await goes_on.wait()
        await write(self)

    monkeypatch.setattr(sandbox_runner.Notebooks, "write", slow)
    async with open_runner(settings, notebooks=True) as runner:
        for number in range(3):
            assert (await runner.execute(str(number), session="study")).value == str(number)
        await runner.close_session("study")
        told.set()
        assert not home.exists()
        goes_on.set()
    assert len(opened(home / "study.ipynb").cells) == 3


async def test_the_oldest_are_removed_when_there_are_many(
    settings: Config, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_runner, "NOTEBOOKS_KEPT", 2)
    async with open_runner(settings, notebooks=True) as runner:
        for name in ("a", "b", "a", "c"):
            await runner.execute("1", session=name)
            await runner.notebooks.write()  # type: ignore[union-attr]
            await anyio.sleep(0.02)
        for name in ("a", "b", "c"):
            await runner.close_session(name)
    assert sorted(file.name for file in home.iterdir()) == ["a.ipynb", "c.ipynb"]


@pytest.mark.usefixtures("home")
def test_each_user_has_notebooks_of_their_own() -> None:
    config = FilesConfig()
    places = {NotebookPlace.find(config, user, name).name for user in ("", "alice", "bob") for name in ("a", ".a")}
    assert len(places) == 6
    assert not [name for name in places if name.startswith(".")]


@pytest.mark.slow
async def test_export_saves_it(settings: Config, home: Path, tmp_path: Path) -> None:
    async with open_runner(settings, notebooks=True) as runner:
        await runner.execute("6 * 7", session="study")
        await runner.close_session("study")
    assert (home / "study.ipynb").exists()

    async def export(*arguments: str) -> tuple[int, str, str]:
        line = [sys.executable, str(python_docker_mcp.__file__), "export", *arguments]
        ended = await anyio.run_process(line, check=False, cwd=tmp_path)
        return ended.returncode, ended.stdout.decode(), ended.stderr.decode()

    assert await export("study") == (0, "study.ipynb\n", "")
    assert opened(tmp_path / "study.ipynb").cells[0].outputs[0].data["text/plain"] == "42"
    assert await export("study", "kept/as.ipynb") == (0, "kept/as.ipynb\n", "")
    assert await export("studi") == (1, "", "python-docker-mcp: nothing is kept of a session 'studi'\n")
    (tmp_path / "file").touch()
    status, _, said = await export("study", "file/x.ipynb")
    assert (status, "file/x.ipynb can't be written" in said) == (1, True)


PLOT = "import matplotlib.pyplot as plt\nprint('drawn')\nplt.plot([1, 3, 2]);"


@pytest.mark.engine
@pytest.mark.in_turns
async def test_a_real_session_with_pictures_errors_and_a_crash(engine_command: str, home: Path, session: str) -> None:
    config = Config(docker=DockerConfig(command=engine_command, image="host"))
    async with open_runner(config, warm=True, notebooks=True) as runner:
        for code in (PLOT, "1 / 0", "import os\nos._exit(3)"):
            await runner.execute(code, session=session)
        running = await runner.execute("import time\ntime.sleep(1)\n'late'", session=session, answer_within=0.1)
        assert running.status == "running"
        await runner.execute("", session=session)
    async with open_runner(config, notebooks=True) as runner:
        await runner.execute("plt.gcf()", session=session)
        await runner.close_session(session)
    cells = opened(home / f"{session}.ipynb").cells
    shown = [
        [output.get("ename") or list(output.get("data", {})) or output.text for output in cell.outputs]
        for cell in cells
    ]
    assert shown[0][0] == "drawn\n"
    assert "image/png" in shown[0][1]
    assert shown[1] == ["ZeroDivisionError"]
    assert "exit status 3" in shown[2][0]
    assert cells[3].outputs[0].data["text/plain"] == "'late'"
    assert len(cells) == 5
