"""Files that come in and go out: on the fake engine, on real ones, and without any."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import string
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import mcp_types as types
import pytest
from conftest import WAIT_FOR_GO, FakeEngine, Hears, connected, go, text_of, until
from hypothesis import given
from hypothesis import strategies as st
from real_engines import CommandLine, run

import python_docker_mcp
import sandbox_runner
from python_docker_mcp import CHECKS, Patient, attempt, hint_on, judge, render
from sandbox_runner import (
    Config,
    ConfigError,
    DockerConfig,
    ExceptionInfo,
    FileInfo,
    Files,
    FilesConfig,
    InputFile,
    OutputFolder,
    RequestError,
    Result,
    Runner,
    open_runner,
    require_paths,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder that the sandbox's files are saved in."""
    return tmp_path / "out"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with files that calls may be given; a link in it leads out of it, to a secret."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "a.csv").write_text("x\n1\n")
    (folder / "more/b.csv").write_text("y\n2\n")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "latest.csv").symlink_to("more/b.csv")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def with_files(settings: Config, out: Path, data: Path) -> Config:
    """Settings for the fake engine, with folders for files."""
    return dataclasses.replace(settings, files=FilesConfig(str(out), (str(data),), "1m"))


@pytest.fixture
async def runner(with_files: Config) -> AsyncIterator[Runner]:
    """A runner on the fake engine that saves files."""
    with anyio.fail_after(60):
        async with open_runner(with_files) as opened:
            yield opened


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder: the content of each file, None for what is no file; links are not followed."""
    found: dict[str, bytes | None] = {}
    for parent, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_dir():
                is_file = stat.S_ISREG(path.lstat().st_mode)
                found[str(path.relative_to(folder))] = path.read_bytes() if is_file else None
    return found


# ── out ──


@pytest.mark.slow
async def test_what_a_call_writes_is_saved_under_its_session_and_the_result_says_where(
    runner: Runner, out: Path
) -> None:
    code = (
        "import os\nos.makedirs('x/y')\nopen('x/y/a.txt', 'w').write('one')\nopen('é ü.bin', 'wb').write(bytes(70_000))"
    )
    result = await runner.execute(code, session="s")
    assert tree(out) == {"s/x/y/a.txt": b"one", "s/é ü.bin": bytes(70_000)}
    assert result.files == (
        FileInfo("x/y/a.txt", 3, str(out / "s/x/y/a.txt")),
        FileInfo("é ü.bin", 70_000, str(out / "s/é ü.bin")),
    )
    assert (result.files_left_out, result.contents) == ({}, {})


async def test_only_what_has_changed_is_saved_again(runner: Runner, out: Path) -> None:
    await runner.execute("open('a', 'w').write('1'); open('b', 'w').write('1')", session="s")
    (out / "s/b").write_text("the user's")
    (out / "s/a").unlink()
    result = await runner.execute("open('a', 'w').write('2')", session="s")
    assert [file.path for file in result.files] == ["a"]
    assert tree(out) == {"s/a": b"2", "s/b": b"the user's"}
    assert (await runner.execute("1", session="s")).files == ()


@pytest.mark.slow
async def test_a_call_without_session_has_a_folder_of_its_own_named_by_time(runner: Runner, out: Path) -> None:
    for _ in range(2):
        result = await runner.execute("open('a', 'w').write('1')")
        assert (result.files[0].saved or "").startswith(f"{out}/20")
        assert result.contents == {}, "it is saved, and so need not go through the result"
    await runner.execute("1")
    assert list(tree(out).values()) == [b"1", b"1"]
    assert len(os.listdir(out)) == 2, "a call that writes nothing needs no folder"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("1 / 0", "error"),
        ("os._exit(3)", "died"),
        ("os.kill(os.getpid(), 11)", "died"),
        ("while True: pass", "timeout"),
        ("import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass", "timeout"),
    ],
)
@pytest.mark.parametrize("session", ["s", None])
async def test_however_a_call_ends_its_files_are_saved(
    runner: Runner, out: Path, end: str, status: str, session: str | None
) -> None:
    result = await runner.execute(f"import os; open('a', 'w').write('1')\n{end}", session=session, timeout=1)
    assert (result.status, [file.path for file in result.files]) == (status, ["a"])
    assert list(tree(out).values()) == [b"1"]


async def test_saved_files_are_no_programs_and_as_private_as_the_user_wants(runner: Runner, out: Path) -> None:
    before = os.umask(0o027)
    try:
        await runner.execute("import os; open('a', 'w').close(); os.chmod('a', 0o4777)", session="s")
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "s/a").stat().st_mode) == 0o640


async def test_what_is_no_ordinary_file_is_neither_followed_nor_made(runner: Runner, out: Path, tmp_path: Path) -> None:
    code = (
        f"import os, socket\nos.symlink({str(tmp_path / 'secret.txt')!r}, 'link'); os.symlink('/', 'root')\n"
        "os.mkfifo('pipe')\n"
        "socket.socket(socket.AF_UNIX).bind('socket'); os.mkdir('empty'); open('.hidden', 'w').close()\n"
        "open('a', 'w').write('1'); os.link('a', 'b')"
    )
    (tmp_path / "secret.txt").write_text("secret")
    result = await runner.execute(code, session="s")
    assert (result.status, tree(out)) == ("ok", {"s/a": b"1", "s/b": b"1"})


async def test_ordinary_names_are_kept_and_only_what_could_do_harm_in_others_is_escaped(
    runner: Runner, out: Path
) -> None:
    ordinary = ["Bild\u202f12.30\u202fPM.png", "a\u00a0b.txt", "売上\u3000六月.csv", "👩\u200d🔬.md", "ok"]
    code = f"for name in ('a\\nb', b'\\xff', 'x' * 210, '\\u202eexe.txt', *{ordinary}): open(name, 'w').write('1')"
    result = await runner.execute(code, session="s")
    escaped = ["a%0Ab", "%FF", "%E2%80%AEexe.txt"]
    assert tree(out) == {f"s/{name}": b"1" for name in (*ordinary, *escaped)}
    assert result.files_left_out == {f"{'x' * 60}…": "its path is longer than 200 characters"}
    assert await runner.read_file("s", "a%0Ab") == b"1"


@pytest.mark.slow
async def test_more_files_than_can_be_listed_are_counted(runner: Runner, out: Path) -> None:
    result = await runner.execute("for n in range(1100): open(f'{n:04}', 'w').close()", session="s")
    assert (len(result.files), result.files_left_out) == (1000, {"(100 more)": "there are too many to list"})
    assert len(tree(out)) == 1000
    assert "Files left out: (100 more) (there are too many to list)" in str(render(result).content)


@pytest.mark.slow
async def test_a_tree_without_end_costs_the_supervisor_no_more_than_a_look_at_some_of_it(runner: Runner) -> None:
    code = "import os\nfor n in range(11_000): os.mkdir(f'{n}')\nopen('a', 'w').close()"
    result = await runner.execute(code, session="s")
    assert result.files_left_out == {"(others)": "only 10000 files and folders are looked at"}


PLANTED: list[tuple[str, Callable[[Path, Path], object], str | None]] = [
    ("the session's folder is a link", lambda out, secret: (out / "s").symlink_to(secret.parent), "Not a directory"),
    ("the session's folder is a file", lambda out, _: (out / "s").touch(), "Not a directory"),
    ("the file is a folder", lambda out, _: (out / "s/secret.txt").mkdir(parents=True), "Is a directory"),
    ("the file is a link", lambda out, secret: at(out).symlink_to(secret), None),
    ("the file is a hard link", lambda out, secret: os.link(secret, at(out)), None),
    ("the file is a pipe", lambda out, _: os.mkfifo(at(out)), None),
]


def at(out: Path) -> Path:
    """Where the file of the test below is saved, in a folder that is there."""
    (out / "s").mkdir()
    return out / "s/secret.txt"


@pytest.mark.parametrize(("plant", "told"), [row[1:] for row in PLANTED], ids=[row[0] for row in PLANTED])
async def test_what_was_planted_on_the_host_leads_nowhere(
    runner: Runner, out: Path, tmp_path: Path, plant: Callable[[Path, Path], object], told: str | None
) -> None:
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere/secret.txt"
    secret.write_text("secret")
    os.mkdir(out)
    plant(out, secret)
    result = await runner.execute("open('secret.txt', 'w').write('mine')", session="s")
    assert secret.read_text() == "secret"
    assert os.listdir(secret.parent) == ["secret.txt"]
    if told:
        assert result.files_left_out == {"secret.txt": told}
        assert result.files[0].saved is None
    else:
        assert tree(out) == {"s/secret.txt": b"mine"}
        assert not (out / "s/secret.txt").is_symlink()


@pytest.mark.parametrize("session", [".", "..", "...", ".ssh"])
async def test_a_session_of_dots_stays_inside(runner: Runner, out: Path, session: str) -> None:
    await runner.execute("open('a', 'w').write('1')", session=session)
    assert tree(out) == {f"session{session}/a": b"1"}
    assert set(os.listdir(out.parent)) <= {"out", "data", "work", "secret.txt"}


async def test_what_exceeds_the_limit_is_told_and_the_rest_is_saved(runner: Runner, out: Path) -> None:
    code = "for name, size in (('a', 400_000), ('b', 700_000), ('c', 600_000)): open(name, 'wb').write(bytes(size))"
    result = await runner.execute(code, session="s")
    assert {path: len(content or b"") for path, content in tree(out).items()} == {"s/a": 400_000, "s/c": 600_000}
    assert result.files_left_out == {"b": "its 700000 bytes are more than files.limit has left for this call"}


@pytest.mark.slow
async def test_a_file_that_is_changed_while_it_is_read_is_saved_or_told(runner: Runner, out: Path) -> None:
    """The writer replaces all bytes of 300 kB again and again."""
    writer = (
        "import os, time\nif os.fork() == 0:\n    file = open('f', 'wb', buffering=0)\n    n = 0\n    while True:\n"
        "        n += 1; os.pwrite(file.fileno(), bytes([n % 256]) * 300_000, 0); time.sleep(n % 7 / 1000)\n"
        "while not os.path.exists('f') or os.path.getsize('f') < 300_000: time.sleep(0.001)"
    )
    outcomes = set()
    for call in range(8):
        result = await runner.execute(writer if call == 0 else "1", session="s")
        saved = [file.saved for file in result.files if file.path == "f"]
        outcomes.add(bool(saved and saved[0]))
        if saved and saved[0]:
            assert (out / "s/f").stat().st_size == 300_000
        elif saved:
            assert result.files_left_out == {"f": "it was being changed while it was read"}
    assert outcomes


async def test_a_folder_that_can_not_be_written_is_told_and_the_file_is_still_in_the_session(
    runner: Runner, out: Path
) -> None:
    await runner.execute("1", session="s")  # the folder is looked at before the first call
    (out.parent / "out").write_text("no folder any more")
    result = await runner.execute("open('a', 'w').write('1')", session="s")
    assert result.files_left_out == {"a": "File exists"}
    assert await runner.read_file("s", "a") == b"1"


async def test_a_host_that_does_not_tell_names_apart_overwrites_nothing(
    runner: Runner, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, where `stat` finds a file by another spelling, which the folder does not list."""
    (out / "s").mkdir(parents=True)
    (out / "s/report.csv").write_text("the user's")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda place: [name.replace("report", "Report") for name in listed(place)])
    result = await runner.execute("open('report.csv', 'w').write('1')", session="s")
    assert result.files_left_out == {"report.csv": "this host does not tell its name from that of another file"}
    assert (out / "s/report.csv").read_text() == "the user's"


async def test_files_of_a_call_that_goes_on_are_saved_at_its_end_and_those_of_a_cancelled_one_with_the_next(
    runner: Runner, with_files: Config, out: Path
) -> None:
    await runner.execute("0", session="s")
    code = f"open('a', 'w').write('1')\n{WAIT_FOR_GO}open('b', 'w').write('2')"
    result = await runner.execute(code, session="s", answer_within=0.1)
    assert (result.status, tree(out)) == ("running", {})
    go(with_files)
    result = await runner.execute("", session="s")
    assert (result.status, tree(out)) == ("ok", {"s/a": b"1", "s/b": b"2", "s/go": b""})
    hears = Hears()
    async with anyio.create_task_group() as tasks:
        endless = "open('c', 'w').write('3'); print('on', flush=True)\nwhile True: pass"
        tasks.start_soon(lambda: runner.execute(endless, session="s", on_output=hears))
        await hears.first.wait()
        tasks.cancel_scope.cancel()
    result = await runner.execute("1", session="s")
    assert (result.value, tree(out)["s/c"]) == ("1", b"3")


@pytest.mark.slow
async def test_a_call_that_no_host_waited_for_has_its_files_saved_by_the_next_host(
    with_files: Config, out: Path
) -> None:
    async with open_runner(with_files) as runner:
        await runner.execute("0", session="s")
        result = await runner.execute(f"{WAIT_FOR_GO}open('a', 'w').write('1')", session="s", answer_within=0.1)
        assert result.status == "running"
    go(with_files)
    async with open_runner(with_files) as runner:
        with anyio.fail_after(20):
            result = await runner.execute("2", session="s")
        assert result.unread is not None
        assert [file.path for file in result.unread.files] == ["a", "go"]
    assert tree(out)["s/a"] == b"1"


@pytest.mark.slow
async def test_small_files_come_with_the_result_where_nothing_is_saved_and_the_sandbox_ends(settings: Config) -> None:
    async with open_runner(settings) as runner:
        result = await runner.execute("open('a', 'wb').write(b'hi'); open('b', 'wb').write(bytes(70_000))")
        assert (result.contents, [file.saved for file in result.files]) == ({"a": b"hi"}, [None, None])
        assert (await runner.execute("open('a', 'w').close()", session="s")).contents == {}


async def test_a_call_can_name_the_folder_and_then_gets_its_files_right_there(runner: Runner, tmp_path: Path) -> None:
    result = await runner.execute("open('a', 'w').write('1')", output=tmp_path / "mine/own")
    assert (result.files[0].saved, tree(tmp_path / "mine")) == (str(tmp_path / "mine/own/a"), {"own/a": b"1"})


# ── in ──


def test_what_is_asked_for_is_found_in_the_folders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = [data / "more", data]
    assert InputFile.find("a.csv", folders) == InputFile("a.csv", data, "a.csv", 4)
    assert InputFile.find("~/data/a.csv", folders) == InputFile("a.csv", data, "a.csv", 4)
    assert InputFile.find(str(data / "more/../a.csv"), folders) == InputFile("a.csv", data, "a.csv", 4)
    assert InputFile.find("b.csv", folders) == InputFile("b.csv", data / "more", "b.csv", 4)
    assert InputFile.find("latest.csv", folders) == InputFile("latest.csv", data / "more", "b.csv", 4)
    assert InputFile.find(tmp_path / "secret.txt").name == "secret.txt", "who embeds this decides alone"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("../secret.txt", "'../secret.txt' is not in DATA: only files in there may be used (files.inputs)."),
        ("TMP/secret.txt", "'TMP/secret.txt' is not in DATA: only files in there may be used (files.inputs)."),
        ("TMP/nothing", "'TMP/nothing' is not in DATA: only files in there may be used (files.inputs)."),
        ("/etc/passwd", "'/etc/passwd' is not in DATA: only files in there may be used (files.inputs)."),
        ("link.txt", "'link.txt' is a link that leads out of DATA: only files in there may be used (files.inputs)."),
        ("more", "'more' is a folder: name the files in it."),
        ("", "'' is a folder: name the files in it."),
        (".", "'.' is a folder: name the files in it."),
        ("pipe", "'pipe' can't be read: not a regular file."),
        ("b.csv", "There is no file 'b.csv' on the host: did you mean a.csv?"),
        ("nothing/of/that/sort", "There is no file 'nothing/of/that/sort' on the host."),
        ("a.csv/b", "'a.csv/b' can't be read: Not a directory."),
        ("a\0b", "'a\\x00b' can't be the path of a file: embedded null byte."),
        ("~nobody-of-this-name/x", "'~nobody-of-this-name/x' can't be the path of a file: Could not determine home"),
        ("x" * 300, "can't be read: File name too long."),
    ],
)
def test_what_may_not_be_had_is_refused_in_a_sentence(data: Path, tmp_path: Path, asked: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        InputFile.find(asked.replace("TMP", str(tmp_path)), [data])
    said = str(caught.value).replace(str(data), "DATA").replace(str(tmp_path), "TMP")
    assert says in said
    assert said.count("\n") == 0


def test_a_file_without_permission_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sandbox_runner, "open_inside", refuse)
    with pytest.raises(RequestError, match=r"^'a.csv' can't be read: Permission denied.$"):
        InputFile.find("a.csv", [data])


def test_a_folder_that_becomes_a_link_after_it_was_looked_at_is_not_followed(data: Path, tmp_path: Path) -> None:
    file = InputFile.find("more/b.csv", [data])
    (data / "more/b.csv").rename(tmp_path / "b.csv")
    (data / "more").rmdir()
    (data / "more").symlink_to(tmp_path)
    with pytest.raises(OSError, match="Not a directory"):
        file.open()


@pytest.mark.slow
async def test_files_lie_there_when_the_code_starts_and_do_not_count_as_its_own(
    runner: Runner, data: Path, out: Path
) -> None:
    given_files = [data / "a.csv", data / "latest.csv"]
    for session in ("s", None):
        result = await runner.execute(
            "import os; sorted(os.listdir()), open('a.csv').read()", session=session, files=given_files
        )
        assert (result.value, result.files) == ("(['a.csv', 'latest.csv'], 'x\\n1\\n')", ())
    (data / "a.csv").write_text("new")
    result = await runner.execute("open('a.csv').read()", session="s", files=given_files)
    assert (result.value, result.files, tree(out)) == ("'new'", (), {})
    result = await runner.execute("open('a.csv', 'a').write('er')", session="s")
    assert (result.files[0].path, tree(out)) == ("a.csv", {"s/a.csv": b"newer"})


async def test_a_file_that_does_not_get_in_is_told_and_the_session_has_lost_nothing(
    runner: Runner, data: Path, docker: FakeEngine
) -> None:
    (data / "same").mkdir()
    (data / "same/a.csv").touch()
    (data / "big").write_bytes(bytes(1 << 21))

    async def refusal(*names: str) -> str:
        with pytest.raises(RequestError) as caught:
            await runner.execute("y = 1", session="s", files=[data / name for name in names])
        return str(caught.value)

    assert (
        await refusal("a.csv", "same/a.csv")
        == "Two of the files are called a.csv: pass them in two calls, or rename one."
    )
    assert await refusal("big") == "The files come to 2097152 bytes, which is more than files.limit (1m) lets in."
    assert not docker.log("run"), "nothing was started for it"
    await runner.execute("import os; x = 1; os.mkdir('a.csv')", session="s")
    assert await refusal("a.csv") == "The file a.csv can't be put into the sandbox: Is a directory."
    result = await runner.execute("x, 'y' in globals(), os.listdir()", session="s")
    assert result.value == "(1, False, ['a.csv'])"


async def test_a_file_that_was_changed_since_is_told(runner: Runner, data: Path) -> None:
    file = InputFile.find(data / "a.csv")
    (data / "a.csv").write_text("longer than before")
    with pytest.raises(RequestError, match=r"^The file a\.csv was changed while it was read: try again\.$"):
        await runner.execute("1", files=[file])
    (data / "a.csv").unlink()
    with pytest.raises(RequestError, match=r"^The file a\.csv can't be read any more: No such file"):
        await runner.execute("1", files=[file])


@pytest.mark.slow
async def test_files_get_into_whichever_sandbox_the_call_gets_into(
    runner: Runner, data: Path, docker: FakeEngine
) -> None:
    await runner.execute("x = 1", session="s")
    docker.run("kill", docker.containers()[0])
    await until(lambda: not docker.containers())
    result = await runner.execute("open('a.csv').read()", session="s", files=[data / "a.csv"])
    assert (result.value, result.lost_before) == ("'x\\n1\\n'", "its container ended")


async def test_an_empty_file_and_one_of_many_pieces_get_in_and_out_whole(
    with_files: Config, data: Path, out: Path
) -> None:
    content = os.urandom(3 << 20)
    (data / "large").write_bytes(content)
    (data / "empty").touch()
    config = dataclasses.replace(with_files, files=dataclasses.replace(with_files.files, limit="10m"))
    async with open_runner(config) as runner:
        code = "import os; [os.rename(name, name + '2') for name in os.listdir()]"
        result = await runner.execute(code, files=[data / "large", data / "empty"], output=out)
    assert result.status == "ok"
    assert tree(out) == {"large2": content, "empty2": b""}


def test_a_working_directory_without_room_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 0, 0, 10, 0, 0, 0, 0, 255)))
    files = Files(str(tmp_path), ())
    request: Any = {"id": "q", "name": "a", "data": b"0123456789abc", "offset": 0, "needs": 14, "last": True}
    assert files.write(request)["problem"] == "there is room for 13 bytes, and 14 are needed"
    assert tree(tmp_path) == {"a": b"old"}
    request["needs"] = 13
    assert files.write(request)["problem"] is None
    assert tree(tmp_path) == {"a": b"0123456789abc"}


# ── the settings ──


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output": "results"}, "files.output: 'results' is not an absolute path, such as ~/Documents"),
        ({"output": "/etc/passwd"}, "files.output: '/etc/passwd' is not a folder on this host"),
        ({"output": "~"}, "files.output: '~' is refused, as it is the home directory: name a folder that holds only"),
        ({"output": "/"}, "files.output: '/' is refused, as it is the host's root"),
        ({"inputs": ("/nowhere",)}, "files.inputs: '/nowhere' is not a folder on this host"),
        ({"inputs": ("/proc",)}, "files.inputs: '/proc' is refused, as it is the host's kernel interface"),
        ({"inputs": ("data",)}, "files.inputs: 'data' is not an absolute path"),
        ({"limit": "much"}, "files.limit: 'much' is not a size such as 256m or 1g"),
    ],
)
def test_folders_that_no_file_should_come_from_or_go_to_are_refused(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises((ValueError, ConfigError)) as caught:
        require_paths(Config(files=FilesConfig(**fields)), tmp_path / "none.yaml", {})
    assert str(caught.value).startswith(says)


async def test_a_call_is_refused_whose_folders_can_not_be_used_also_where_nobody_looked_before(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_runner(dataclasses.replace(settings, files=FilesConfig(inputs=("/proc",)))) as runner:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"files\.inputs: '/proc' is refused"):
                await runner.execute("1")
    (tmp_path / "data").mkdir()
    hangs = threading.Event()
    monkeypatch.setattr(sandbox_runner, "why_not_mounted", lambda _: hangs.wait(20))
    monkeypatch.setattr(sandbox_runner, "LOOK_TIMEOUT", 0.05)
    with_data = dataclasses.replace(settings, files=FilesConfig(inputs=(str(tmp_path / "data"),)))
    async with open_runner(with_data) as runner:
        with pytest.raises(ConfigError, match=r"did not answer within 0\.05 seconds .*/data\): is one on a drive that"):
            await runner.execute("1")
        hangs.set()


async def test_neither_the_handshake_nor_the_list_of_tools_waits_for_a_folder(
    with_files: Config, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(python_docker_mcp, "what_can_be_given", lambda _: hangs.wait(20))
    monkeypatch.setattr(python_docker_mcp, "LOOK_PATIENCE", 0.05)
    async with connected(with_files) as client:
        assert f"They are taken from {data}." in (client.instructions or "")
        tools = {tool.name: tool.input_schema["properties"] for tool in (await client.list_tools()).tools}
        assert tools["execute-transient"]["files"]["description"].endswith(f"They are taken from {data}.")
        hangs.set()


# ── as a client sees it ──


async def test_the_parameter_is_there_only_if_there_are_folders(
    settings: Config, with_files: Config, data: Path
) -> None:
    async with connected(settings) as client:
        for tool in (await client.list_tools()).tools:
            assert "files" not in tool.input_schema["properties"]
        result = await client.call_tool("execute-transient", {"code": "1", "files": ["a.csv"]})
        assert text_of(result).startswith(
            "No files can be given here: the operator has named no folder to take them from"
        )
    async with connected(with_files) as client:
        tools = {tool.name: tool.input_schema["properties"] for tool in (await client.list_tools()).tools}
        for name in ("execute-transient", "execute-persistent"):
            assert tools[name]["files"]["description"].endswith(f"They are taken from {data}, which has a.csv.")
            assert tools[name]["files"]["items"] == {"type": "string"}
        assert f"They are taken from {data}." in (client.instructions or "")
        assert f"is saved for the user in {data.parent}/out" in (client.instructions or "")


@pytest.mark.parametrize("asked", [["a.csv"], "a.csv", '["a.csv"]'])
async def test_a_model_gets_files_in_and_reads_where_the_user_has_them(
    with_files: Config, out: Path, asked: Any
) -> None:
    code = "open('sum.txt', 'w').write(open('a.csv').read() * 2)"
    async with connected(with_files) as client:
        result = await client.call_tool("execute-persistent", {"code": code, "session_id": "s", "files": asked})
        assert f"Saved for the user as {out}/s/sum.txt (8 bytes)" in text_of(result)
        assert result.structured_content["files"][0]["saved_as"] == f"{out}/s/sum.txt"
        several = "for name in 'bc': open(name, 'w').write('1')"
        result = await client.call_tool("execute-persistent", {"code": several, "session_id": "s"})
        assert f"Saved for the user:\n{out}/s/b (1 bytes)\n{out}/s/c (1 bytes)" in text_of(result)


async def test_what_is_wrong_with_files_is_said_and_a_path_on_the_host_gets_a_hint(
    with_files: Config, data: Path
) -> None:
    async with connected(with_files) as client:
        for files, words in (
            ([5], 'files must be a list of paths such as ["sales.csv"], not a number.'),
            ({"a": 1}, 'files must be a list of paths such as ["sales.csv"], not an object.'),
            (["b.csv"], "There is no file 'b.csv' on the host: did you mean a.csv?"),
        ):
            result = await client.call_tool("execute-transient", {"code": "1", "files": files})
            assert (result.is_error, text_of(result)) == (True, words)
        result = await client.call_tool("execute-persistent", {"code": "", "session_id": "s", "files": ["a.csv"]})
        assert text_of(result) == "files goes with code that uses them: pass both in the next call."
        result = await client.call_tool("execute-transient", {"code": "open('a.csv')"})
        assert "Hint: Pass \"a.csv\" in `files`, and open it as 'a.csv'" in text_of(result)
    for path, words in ((str(data / "a.csv"), "open it as 'a.csv'"), ("/home/me/x", f"They are taken from {data}")):
        error = ExceptionInfo("FileNotFoundError", f"[Errno 2] No such file or directory: {path!r}", 1, "")
        assert words in (hint_on(Result("error", exception=error), "", with_files) or "")


def test_reasons_and_places_are_told_in_words() -> None:
    files = (FileInfo("a", 1, "/out/a"), FileInfo("b", 2_000_000))
    said = render(Result("ok", files=files, files_left_out={"b": "it was being changed while it was read"}))
    (block,) = said.content
    assert isinstance(block, types.TextContent)
    assert "Saved for the user as /out/a (1 bytes)" in block.text
    assert "Files left out: b (it was being changed while it was read)" in block.text


# ── whatever the names ──

parts = st.text(st.sampled_from([*string.printable, "é", "\u202e", "\udcff", ".", "/"]), max_size=12) | st.sampled_from(
    ["..", ".", "a", "A", "~", "link", "x" * 254, "con", "a:b"]
)


@contextlib.contextmanager
def walled() -> Iterator[tuple[Path, Path]]:
    """A folder, and one in it that is the only place where anything may be written."""
    with tempfile.TemporaryDirectory() as place:
        inside = Path(place).resolve() / "inside"
        inside.mkdir()
        (inside / "link").symlink_to("..")
        yield inside.parent, inside


@given(st.lists(parts, min_size=1, max_size=4).map("/".join), st.sampled_from(["", "s", "session.."]))
def test_no_name_leads_out_of_the_output_folder(path: str, inner: str) -> None:
    with walled() as (outside, inside):
        try:
            file = OutputFolder(inside, inner).open(path)
            try:
                file.write(b"x")
                file.keep()
            finally:
                file.close()
        except (OSError, ValueError, UnicodeEncodeError):
            pass
        else:
            assert b"x" in tree(inside).values()
        assert os.listdir(outside) == ["inside"]
        assert not [name for name in tree(inside) if "python-docker-mcp" in name], "nothing is left half written"


@pytest.mark.slow
@given(st.lists(parts, max_size=5).map("/".join))
def test_no_name_gets_at_a_file_outside_of_the_input_folders(asked: str) -> None:
    with walled() as (outside, inside):
        (outside / "secret").write_text("secret")
        (inside / "a").write_text("a")
        with contextlib.suppress(RequestError):
            descriptor = InputFile.find(asked, [inside]).open()
            assert os.read(descriptor, 10) == b"a"
            os.close(descriptor)


@pytest.mark.slow
@given(st.lists(st.lists(parts, min_size=1, max_size=3).map("/".join), max_size=6))
def test_whatever_a_tree_has_is_listed_or_told_and_what_is_listed_can_be_read(paths: list[str]) -> None:
    with walled() as (_, inside):
        files = Files(str(inside), ())
        for path in paths:
            with contextlib.suppress(OSError, ValueError):
                place = inside / path.lstrip("/")
                if ".." not in place.parts and "link" not in place.parts:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(b"x")
        listed, left_out = files.changed()
        visible = {
            name
            for name in tree(inside)
            if not any(part.startswith(".") for part in name.split("/")) and name != "link"
        }
        more = next((int(name[1:-6]) - 1 for name in left_out if re.fullmatch(r"\(\d+ more\)", name)), 0)
        assert len(listed) + len(left_out) + more == len(visible)
        for path, size in listed:
            request: Any = {"id": "q", "path": path, "offset": 0}
            piece = files.read(request)
            assert (piece["problem"], piece["data"], size) == (None, b"x", 1)


# ── on real engines ──


@pytest.mark.engine
async def test_fifty_megabytes_go_in_and_out_and_other_calls_are_served_meanwhile(
    config: Config, session: str, tmp_path: Path
) -> None:
    content = os.urandom(50 << 20)
    (tmp_path / "large").write_bytes(content)
    served = 0
    async with open_runner(config) as runner:
        await runner.execute("1", session=session)
        done = anyio.Event()

        async def serve() -> None:
            nonlocal served
            while not done.is_set():
                assert (await runner.execute("6 * 7", session=session)).value == "42"
                served += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            code = "import os; os.rename('large', 'back')"
            result = await runner.execute(code, files=[tmp_path / "large"], output=tmp_path / "out")
            done.set()
        await runner.close_session(session)
    assert (result.status, result.files_left_out) == ("ok", {})
    assert (tmp_path / "out/back").read_bytes() == content
    assert served > 5


@pytest.mark.engine
async def test_files_go_out_whatever_becomes_of_the_code_and_come_in_again(
    config: Config, session: str, tmp_path: Path
) -> None:
    files = FilesConfig(str(tmp_path / "out"), (str(tmp_path),))
    async with open_runner(dataclasses.replace(config, files=files)) as runner:
        result = await runner.execute("import os; open('é', 'w').write('1'); os._exit(1)", session=session)
        assert (result.status, tree(tmp_path / "out")) == ("died", {f"{session}/é": b"1"})
        result = await runner.execute("open('é').read()", files=[tmp_path / "out" / session / "é"])
        assert (result.value, result.files) == ("'1'", ())
        big = "open('b', 'wb').write(bytes(40 << 20))"
        result = await runner.execute(big, session=session, timeout=60)
        (tmp_path / "c").write_bytes(bytes(40 << 20))
        with pytest.raises(RequestError, match="The file c can't be put into the sandbox: there is room for"):
            await runner.execute("1", session=session, files=[tmp_path / "c"])
        (tmp_path / "b").write_bytes(bytes(60 << 20))
        result = await runner.execute("import os; os.path.getsize('b')", session=session, files=[tmp_path / "b"])
        assert result.value == str(60 << 20), "it takes the place of the one that has its name"
        await runner.close_session(session)


@pytest.mark.engine
async def test_a_script_gets_its_files_and_leaves_its_own(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("1\n2\n")
    code = "open('out.txt', 'w').write(open('in.csv').read() * 2)"
    given_file, saved = str(tmp_path / "in.csv"), str(tmp_path / "out")
    status, _, errors = await run(command_line, "--in", given_file, "--out", saved, "-c", code)
    assert (status, tree(tmp_path / "out")) == (0, {"out.txt": b"1\n2\n1\n2\n"})
    assert errors.strip().endswith(f"sandbox_runner: saved {tmp_path}/out/out.txt")


@pytest.mark.engine
async def test_a_folder_that_code_can_not_use_is_told_by_its_own_words(config: Config, tmp_path: Path) -> None:
    for name, mode in (("private", 0o700), ("read", 0o755), ("write", 0o777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    mounts = [f"{tmp_path}/private:/p", f"{tmp_path}/read:/r:rw", f"{tmp_path}/write:/w:rw"]
    os.chmod(tmp_path, 0o755)
    docker: DockerConfig = dataclasses.replace(config.docker, mounts=tuple(mounts))
    (check,) = [check for check in CHECKS if check.name == "mounts"]
    async with open_runner(dataclasses.replace(config, docker=docker)) as runner:
        patient = Patient(runner.config, *await runner.launcher.prepare())
        finding = judge(check, patient, await attempt(check, runner, None))
    assert (finding.verdict, finding.seen) == ("warning", "/p can't be read; /r can't be written")
    assert f"chmod o+w {tmp_path}/read" in finding.remedy
