"""The MCP server as clients and models meet it: its results, in memory, over standard streams, on real engines."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.abc
import mcp_types as types
import pydantic
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from conftest import PATIENCE, ROOT, FakeEngine, connected, text_of
from hypothesis import given
from hypothesis import strategies as st
from mcp import Client, StdioServerParameters
from mcp.shared.exceptions import MCPError
from package_index import Index, fill
from real_engines import remove_volume

import python_docker_mcp
import sandbox_runner
from python_docker_mcp import (
    IMAGE_LIMIT,
    OUTPUT_BUDGET,
    STATE_BUDGET,
    Shelf,
    answers_to,
    as_shown,
    describe,
    hint_on,
    hint_on_installation,
    instructions,
    main,
    measure,
    new_session_id,
    package_meant,
    render,
    render_installation,
    telling_form,
)
from sandbox_runner import (
    Config,
    DockerConfig,
    ExceptionInfo,
    FileInfo,
    Installation,
    Omitted,
    PackageConfig,
    PoolConfig,
    Result,
    Rich,
    SessionConfig,
    Text,
)

pytestmark = pytest.mark.anyio

ERAS = ["legacy", "auto"]  # a handshake by `initialize`; `server/discover`, as of 2026-07-28
TOOLS = ["execute-transient", "execute-persistent", "install-package", "list-sessions", "cleanup-session"]
FACTORIAL = """
def factorial(n):
    return 1 if n == 0 else n * factorial(n - 1)

print(factorial(5))
"""


def kinds(result: types.CallToolResult) -> list[str]:
    """What sorts of blocks a result has."""
    return [block.type for block in result.content]


# ── what a result looks like ──


@pytest.mark.parametrize(
    ("output", "value", "text"),
    [
        ((), None, "(no output)"),
        ((Text("stdout", "one\ntwo\n"),), "42", "one\ntwo\n\nValue: 42"),
        ((Text("stdout", "a\n"), Omitted(123), Text("stdout", "z\n")), None, "a\n\n[… 123 bytes left out …]\nz"),
    ],
)
def test_what_a_call_printed_and_its_value_come_as_one_text(
    output: tuple[Text | Rich | Omitted, ...], value: str | None, text: str
) -> None:
    result = render(Result("ok", output=output, value=value))
    assert (kinds(result), text_of(result), result.is_error) == (["text"], text, False)


def test_standard_error_is_marked_as_such_and_kept_in_order() -> None:
    output = (Text("stdout", "a\n"), Text("stderr", "careful"), Text("stdout", "b\n"))
    result = render(Result("ok", output=output))
    assert text_of(result) == "a\n[stderr]\ncareful\n[stdout]\nb"
    assert result.structured_content["stdout"] == "a\nb\n"
    assert result.structured_content["stderr"] == "careful"


def advice_on(
    kind: str, message: str, *, missing: str | None = None, code: str = "", config: Config | None = None, **more: Any
) -> str | None:
    """The hint on an exception."""
    error = ExceptionInfo(kind, message, 1, "", missing)
    return hint_on(Result("error", exception=error, **more), code, config or Config())


INSTALL = "Install it with install-package, package_name"


@pytest.mark.parametrize(
    ("missing", "code", "hint"),
    [
        ("bs4", "", f'bs4 is not installed; its package is called beautifulsoup4. {INSTALL} "beautifulsoup4".'),
        ("rich.text", "", f'rich is not installed. {INSTALL} "rich".'),
        ("tkinter", "", "tkinter belongs to Python's standard library, but"),
        ("IPython", "", f'IPython is not installed. {INSTALL} "IPython".'),
        ("pip", "import pip", "pip does not work in code here: call install-package, with one package a call."),
        ("google.colab", "", "google.colab exists only in Google Colab: leave it out."),
        ("google", "from google.colab import drive", "google.colab exists only in Google Colab: leave it out."),
        ("google", "import google.protobuf as pb", "google.protobuf is not installed; its package is called protobuf."),
        (
            "google.cloud",
            "from google.cloud.storage import Client",
            f'google.cloud.storage is not installed. {INSTALL} "google-cloud-storage".',
        ),
    ],
)
def test_a_module_that_is_missing_has_a_hint_with_the_call_that_installs_it(missing: str, code: str, hint: str) -> None:
    assert (advice_on("ModuleNotFoundError", "", missing=missing, code=code) or "").startswith(hint)


PANDAS_3 = "Use pip, conda, or your preferred package management tool to install the"
NO_ENGINE = (
    "Unable to find a usable engine; tried using: 'pyarrow', 'fastparquet'.\n"
    "A suitable version of pyarrow or fastparquet is required for parquet support.\n"
    "Trying to import the above resulted in these errors:\n"
)


NEEDED = [  # what an ImportError says, and the package that it is about
    # as pandas 2.3.3 says it
    ("Missing optional dependency 'tabulate'.  Use pip or conda to install tabulate.", "tabulate"),
    ("Missing optional dependency 'pytables'.  Use pip or conda to install pytables.", "tables"),
    ("Missing optional dependency 'Jinja2'. DataFrame.style requires jinja2.", "Jinja2"),
    ("Missing optional dependency 'pyarrow.orc'.  Use pip or conda to install pyarrow.orc.", "pyarrow"),
    (
        (
            "Missing optional dependency 'xlrd'. Install xlrd >= 2.0.1 for xls Excel support "
            "Use pip or conda to install xlrd."
        ),
        "xlrd",
    ),
    (f"{NO_ENGINE} - Missing optional dependency 'pyarrow'. pyarrow is required for parquet support.", "pyarrow"),
    ("Using URI string without sqlalchemy installed.", "sqlalchemy"),
    # as pandas 3.1.1 says it
    (f"`Import tabulate` failed.  {PANDAS_3} tabulate package.", "tabulate"),
    (f"`Import lxml` failed.  {PANDAS_3} lxml package.", "lxml"),
    (f"`Import python-calamine` failed.  {PANDAS_3} python-calamine package.", "python-calamine"),
    (f"`Import pytables` failed.  {PANDAS_3} pytables package.", "tables"),
    (f"`Import pyarrow.orc` failed.  {PANDAS_3} pyarrow.orc package.", "pyarrow"),
    (f"`Import scipy` failed. cubic interpolation requires SciPy. {PANDAS_3} scipy package.", "scipy"),
    (f"{NO_ENGINE} - `Import pyarrow` failed. pyarrow is required", "pyarrow"),
    ("Using a URI string requires 'sqlalchemy' version '2.0.42' or newer.", "sqlalchemy"),
    ("pyarrow>=16.0.0 is required for ArrowDtype", "pyarrow"),
    # as both do
    ("lxml not found, please install or use the etree parser.", "lxml"),
    (
        (
            "'numexpr' is not installed or an unsupported version. Cannot use engine='numexpr' for query/eval "
            "if 'numexpr' is not installed"
        ),
        "numexpr",
    ),
    ('matplotlib is required for plotting when the default backend "matplotlib" is selected.', "matplotlib"),
    # others
    ("html5lib not found, please install it", "html5lib"),
    ("Please install openpyxl", "openpyxl"),
    ("Foo needs bar. Please install the bar package.", "bar"),
    ("pip3 install --upgrade nbformat.", "nbformat"),
]


@pytest.mark.parametrize(
    ("kind", "message", "package"),
    [
        *(("ImportError", *row) for row in NEEDED),
        ("AttributeError", "The '.style' accessor requires jinja2", "jinja2"),
        (
            "ValueError",
            (
                "Could not find plotting backend 'plotly'. Ensure that you've installed the package providing the "
                "'plotly' entrypoint, or that the package has a top-level `.plot` method."
            ),
            "plotly",
        ),
        ("RuntimeError", "You can install it with `pip install -q -U transformers[torch]`.", "transformers[torch]"),
        ("ValueError", "Run: conda install -c conda-forge 'ruamel.yaml>=0.17'.", "ruamel.yaml>=0.17"),
    ],
)
def test_a_package_that_another_one_needs_has_a_hint_with_the_call_that_installs_it(
    kind: str, message: str, package: str
) -> None:
    wanted = f'Another package is needed: call install-package with package_name "{package}", then run this again.'
    assert advice_on(kind, message) == wanted


@pytest.mark.parametrize(
    ("kind", "message", "code", "calls"),
    [
        (
            "CalledProcessError",
            "Command '['/usr/bin/python3', '-m', 'pip', 'install', '-q', 'x']' returned non-zero exit status 1.",
            "",
            'call install-package with package_name "x"',
        ),
        (
            "CalledProcessError",
            "Command 'pip install x y[a,b]' returned non-zero exit status 127.",
            "",
            'call install-package for each of them: package_name "x", package_name "y[a,b]"',
        ),
        (
            "CalledProcessError",
            "Command '['pip', 'install', '-r', 'needed.txt']' returned non-zero exit status 1.",
            "",
            "call install-package, with one package a call",
        ),
        (
            "FileNotFoundError",
            "[Errno 2] No such file or directory: 'pip'",
            "subprocess.run(['pip', 'install', 'x'])",
            'call install-package with package_name "x"',
        ),
    ],
)
def test_pip_in_code_has_a_hint_with_the_call_to_make_instead(kind: str, message: str, code: str, calls: str) -> None:
    assert advice_on(kind, message, code=code) == f"pip does not work in code here: {calls}."


@pytest.mark.parametrize(
    ("text", "code", "calls"),
    [
        ("/usr/bin/python3: No module named pip\n", "os.system('pip install -U x')", 'with package_name "x"'),
        ("sh: 1: pip: not found\n", "os.system(\"pip install 'x>=2'\")", 'with package_name "x>=2"'),
        ("sh: pip3: command not found\n", "os.system(f'pip3 install {name}')", ", with one package a call"),
        ("ERROR: No matching distribution found for x\n", "run(['pip', 'install', name])", ", with one package a call"),
        ("No module named pipeline\n", "", None),
        ("a pip: found", "", None),
    ],
)
def test_pip_in_code_that_did_not_mind_has_the_same_hint(text: str, code: str, calls: str | None) -> None:
    advice = hint_on(Result("ok", output=(Text("stderr", text),)), code, Config())
    assert advice == (
        calls and f"pip does not work in code here: call install-package{' ' * calls.startswith('with')}{calls}."
    )
    assert hint_on(Result("ok", output=(Text("stdout", text), Omitted(1))), code, Config()) is None


def test_a_builtin_that_the_code_has_overwritten_is_named() -> None:
    advice = advice_on("TypeError", "'int' object is not callable", missing="sum")
    assert advice == "The code has put something else in the place of Python's own sum: `del sum` brings it back."


@pytest.mark.parametrize(
    ("code", "host"),
    [
        ("sns.load_dataset('tips')", "raw.githubusercontent.com"),
        ("fetch_california_housing()", "ndownloader.figshare.com"),
        ("fetch_openml('mnist_784')", "api.openml.org"),
        ("AutoModel.from_pretrained('x')", "huggingface.co"),
        ("requests.get('https://example.com')", None),
    ],
)
def test_data_that_a_library_loads_by_itself_are_told_with_their_host(code: str, host: str | None) -> None:
    advice = advice_on("URLError", "<urlopen error [Errno -3] Temporary failure in name resolution>", code=code) or ""
    assert (f"docker.network_allow: [{host}]" in advice) == (host is not None)
    assert "no network" in advice


def test_system_packages_in_shell_lines_have_a_hint_if_there_are_none() -> None:
    said = (Text("stderr", "sh: 1: apt-get: not found"),)
    assert "package.system" in (hint_on(Result("ok", output=said), "!apt-get install -y graphviz", Config()) or "")
    assert hint_on(Result("ok", output=said), "print('apt')", Config()) is None


def test_a_program_that_code_calls_itself_may_be_any() -> None:
    error = ExceptionInfo("FileNotFoundError", "[Errno 2] No such file or directory: 'units'", 1, "")
    for code, told in (("import subprocess; subprocess.run(['units'])", True), ("open('units')", False)):
        assert ("[units])" in (hint_on(Result("error", exception=error), code, Config()) or "")) == told


VISIBLE = Config(DockerConfig(mounts=(f"{ROOT / 'tests'}:/data", f"{ROOT / 'tests' / 'tools'}:/out:rw")))


@pytest.mark.parametrize(
    ("kind", "message", "words"),
    [
        (
            "ImportError",
            "libGL.so.1: cannot open shared object file: No such file or directory",
            'install-package with package_name "opencv-python-headless"',
        ),
        (
            "ImportError",
            "libpango-1.0.so.0: cannot open shared object file: No such file or directory",
            "(package.system: [libpango-1.0-0])",
        ),
        (
            "OSError",
            "libgomp.so.1: cannot open shared object file: No such file or directory",
            "(package.system: [libgomp1])",
        ),
        ("OSError", 'no library called "libcairo-2" was found', "(package.system: [libcairo2])"),
        (
            "FileNotFoundError",
            "[Errno 2] No such file or directory: 'apt-get'",
            "System packages can't be added from code",
        ),
        ("FileNotFoundError", "[Errno 2] No such file or directory: 'ffprobe'", "(package.system: [ffmpeg])"),
        ("FileNotFoundError", "[Errno 2] No such file or directory: 'data'", None),
        ("RuntimeError", "\n\nKaleido requires Google Chrome to be installed.", "(package.system: [chromium])"),
        ("TesseractNotFoundError", "tesseract is not installed or it's not in your PATH.", "[tesseract-ocr])"),
        ("PDFInfoNotInstalledError", "Unable to get page count. Is poppler installed", "[poppler-utils])"),
        ("JavaNotFoundError", "`java` command is not found from this", "(package.system: [default-jre-headless])"),
        ("OSError", "No pandoc was found: either install pandoc", "(package.system: [pandoc])"),
        ("RuntimeError", "Failed to process string with tex because latex could not be found", "cm-super, dvipng])"),
        ("ImportError", "Failed to initialize: Bad git executable.", "(package.system: [git])"),
        ("NoSuchDriverException", "Message: Unable to obtain driver for chrome;", "[chromium, chromium-driver])"),
        ("Error", "unsupported locale setting", "format numbers and dates in Python, such as f'{x:,.2f}'"),
        ("OSError", "cannot open resource", "ImageFont.load_default(size=20)"),
        ("KeyError", "'DISPLAY'", "There is no screen here"),
        ("TclError", "no display name and no $DISPLAY environment variable", "There is no screen here"),
        ("TypeError", "'int' object is not callable", None),
        ("ImportError", "import of os is not allowed", None),
        ("ValueError", "unknown file extension: .mp4", "There is no ffmpeg in this image: save the animation as a GIF"),
        ("RuntimeError", "Requested MovieWriter (ffmpeg) not available", "There is no ffmpeg in this image"),
        (
            "SSLCertVerificationError",
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch, certificate is not valid",
            "That server's certificate is for another name",
        ),
        (
            "SSLCertVerificationError",
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate",
            "of an authority unknown here",
        ),
        ("NameError", "name '__file__' is not defined", "the working directory is /app;"),
        ("NameError", "name 'get_ipython' is not defined", "This is plain Python, not IPython"),
        ("NameError", "name 'x' is not defined", None),
        ("BdbQuit", "", "Nobody can answer a debugger"),
        ("EOFError", "EOF when reading a line", "Nobody can answer a prompt"),
        ("EOFError", "input() can't be answered in the sandbox; put the value into the code instead", None),
        ("EOFError", "Ran out of input", None),
        ("RuntimeError", "breakpoint() can't be answered in the sandbox", None),
        ("MemoryError", "", "docker.memory_limit"),
        ("_ArrayMemoryError", "Unable to allocate 7.28 TiB for an array", "docker.memory_limit"),
        ("BrokenProcessPool", "A process in the process pool was terminated abruptly", 'get_context("fork")'),
        ("SyntaxError", "invalid syntax", None),
        ("RecursionError", "maximum recursion depth exceeded", None),
        ("KeyboardInterrupt", "", None),
        ("CalledProcessError", "Command 'pipeline' returned non-zero exit status 1.", None),
    ],
)
def test_a_failure_with_a_usual_cause_has_a_hint(kind: str, message: str, words: str | None) -> None:
    advice = advice_on(kind, message)
    assert words in advice if words and advice else advice is words


@pytest.mark.parametrize(
    ("path", "config", "words"),
    [
        (
            "/mnt/data/sales.csv",
            Config(),
            "Code sees only its own working directory /app: pass the data in the code or",
        ),
        ("C:\\Users\\x\\a.csv", Config(), "have the operator name a folder to take files from (files.inputs)"),
        ("~/a.csv", Config(), "Code sees only its own working directory"),
        ("/home/me/a.csv", VISIBLE, "code sees only what is in /data, /out: name the file by its path there"),
        ("/data/a.csv", VISIBLE, None),
        ("/app/a.csv", Config(), None),
        ("/tmp/a.csv", Config(), None),
        ("/usr/bin/ffmpeg", Config(), None),
        ("a.csv", Config(), "a.csv is not in the working directory (each call starts without any)"),
    ],
)
def test_a_file_outside_of_what_code_sees_has_a_hint(path: str, config: Config, words: str | None) -> None:
    others = [f"{path} not found."] if path != "a.csv" else []
    for message in (str(FileNotFoundError(2, "No such file or directory", path)), *others):
        advice = advice_on("FileNotFoundError", message, config=config)
        assert words in advice if words and advice else advice is words


def test_only_where_a_call_has_a_state_it_is_named_as_a_way_for_data() -> None:
    message = "[Errno 2] No such file or directory: '/mnt/x'"
    assert "`state`" in (advice_on("FileNotFoundError", message) or "")
    assert "`state`" not in (advice_on("FileNotFoundError", message, session="s") or "`state`")


def test_a_mounted_folder_that_the_sandbox_may_not_use_has_a_hint() -> None:
    words = "has no permission for this in /out: write to /app"
    assert words in (advice_on("PermissionError", "[Errno 13] Permission denied: '/out/x'", config=VISIBLE) or "")
    assert advice_on("PermissionError", "[Errno 13] Permission denied: '/home/me/x'", config=VISIBLE) is None


@pytest.mark.parametrize(
    ("message", "docker", "words"),
    [
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", {}, "no network (docker.network_disabled)"),
        ("host x ssl:default [Temporary failure in name resolution]", {}, "no network (docker.network_disabled)"),
        ("[Errno 101] Network is unreachable", {}, "no network (docker.network_disabled)"),
        ("[Errno 101] Network is unreachable", {"network_disabled": False}, None),
        ("[Errno 30] Read-only file system: '/etc/x'", {}, "Only /app and /tmp can be written to"),
        ("[Errno 30] Read-only file system: '/data/x'", {"read_only": False}, None),
        ("[Errno 28] No space left on device", {"disk_limit": "3m"}, "Files may take 3m"),
        ("[Errno 2] No such file or directory: 'x'", {}, None),
    ],
)
def test_code_that_runs_against_a_wall_is_told_which(message: str, docker: dict[str, Any], words: str | None) -> None:
    advice = advice_on("OSError", message, config=Config(DockerConfig(**docker)))
    assert words in advice if words and advice else advice is words


def test_limits_that_were_met_have_a_hint_and_what_the_image_lacks_is_said() -> None:
    assert "docker.memory_limit" in (hint_on(Result("out_of_memory"), "", Config()) or "")
    assert "`timeout`" in (hint_on(Result("timeout"), "", Config()) or "")
    missing = Result("error", exception=ExceptionInfo("ModuleNotFoundError", "", 1, "", "numpy"))
    assert (hint_on(missing, "", Config(), "numpy could not be preinstalled: no index") or "").endswith(
        'package_name "numpy". (numpy could not be preinstalled: no index)'
    )


@pytest.mark.parametrize(
    "message",
    ["pip install " + "-a " * 1300, "pip install" + " -c" * 1300, "-" * 4000, "pip install " * 300, "/" * 4000],
)
def test_no_message_is_expensive_to_find_a_hint_for(message: str) -> None:
    started = time.monotonic()
    for kind in ("ImportError", "CalledProcessError", "FileNotFoundError", "PermissionError"):
        advice_on(kind, message)
    assert time.monotonic() - started < PATIENCE / 10


def test_an_installation_has_a_hint_where_something_is_to_be_known() -> None:
    assert hint_on_installation(Installation("polars", True, "Installed polars 1.0")) is None
    assert hint_on_installation(Installation("nonesuch", False, "nonesuch could not be installed")) is None
    for installation, words in (
        (Installation("x", False, "", needs_build=True), "set package.wheels_only: false"),
        (Installation("x", True, "", stale=("x",)), "x had been imported before, in another version"),
    ):
        assert words in (hint_on_installation(installation) or "")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("requests", "requests"),
        (" pandas[excel] >= 2, < 3 ", "pandas[excel]>=2,<3"),
        ("`requests`", "requests"),
        ("pip install requests", "requests"),
        ("`pip install requests`", "requests"),
        ("!pip install -q requests", "requests"),
        ("%pip install requests --upgrade", "requests"),
        ("python -m pip install requests", "requests"),
        ("!{sys.executable} -m pip install requests", "requests"),
        ("uv pip install requests", "requests"),
        ("pip3 install -U 'requests>=2'", "requests>=2"),
        ("uv add requests", "requests"),
        ("conda install -y requests", "requests"),
        ("pip", "pip"),
    ],
)
def test_a_command_that_installs_one_package_is_taken_for_the_package(asked: str, meant: str) -> None:
    assert package_meant(asked) == (meant, None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("pip install numpy pandas", "'numpy pandas' is not a package's name with extras and versions: ask for one"),
        ("pip install -r needed.txt", "'pip install -r needed.txt' is not a package's name"),
        (
            "pip install -i https://x.y requests",
            "'pip install -i https://x.y requests' is not a package's name: another",
        ),
        ("pip install torch --index-url https://x.y", "'pip install torch --index-url https://x.y' is not a package's"),
        ("pip install --pre requests", "'pip install --pre requests' is not a package's name"),
        ("pip install -q", "'' is not a package's name"),
    ],
)
def test_a_command_that_installs_anything_else_is_refused(asked: str, words: str) -> None:
    with pytest.raises(sandbox_runner.RequestError, match=f"^{re.escape(words)}"):
        package_meant(asked)


@pytest.mark.parametrize(
    ("asked", "meant", "name"),
    [
        ("sklearn", "scikit-learn", "sklearn"),
        ("pip install sklearn==1.5", "scikit-learn==1.5", "sklearn"),
        ("pil", "Pillow", "pil"),
        ("CV2>=4,<5", "opencv-python-headless>=4,<5", "CV2"),
        ("docx[x]", "python-docx[x]", "docx"),
        ("google.protobuf", "protobuf", "google.protobuf"),
        ("rest-framework", "djangorestframework", "rest-framework"),
        ("psycopg", "psycopg[binary]", "psycopg"),
        ("psycopg[c]", "psycopg[c]", None),
        ("beautifulsoup4", "beautifulsoup4", None),
        ("zope.interface", "zope.interface", None),
    ],
)
def test_the_name_of_an_import_is_taken_for_its_package_and_that_is_said(
    asked: str, meant: str, name: str | None
) -> None:
    note = name and f"{name} is the name of the import; the package is called {meant.partition('=')[0].rstrip('>')}."
    requirement, said = package_meant(asked)
    assert requirement == meant
    assert said == (note.replace("python-docx[x]", "python-docx") if note else None)
    rendered = text_of(render_installation(Installation("x", True, "Installed x 1"), None, said))
    assert rendered == "Installed x 1." + (f"\n\nNote: {said}" if said else "")


def test_a_module_is_taken_for_its_package() -> None:
    said = "sklearn.linear_model is a module of the package scikit-learn."
    assert package_meant("sklearn.linear_model") == ("scikit-learn", said)
    assert package_meant("matplotlib.pyplot==3.9")[0] == "matplotlib==3.9"


def test_every_package_in_the_table_is_a_requirement() -> None:
    for package in python_docker_mcp.DISTRIBUTIONS.values():
        assert package_meant(package)[0].startswith(package.split("[")[0])


@pytest.mark.parametrize(
    ("tool", "arguments", "field", "value"),
    [
        ("execute-transient", {"code": "1", "state": '{"x": [1]}'}, "state", {"x": [1]}),
        ("execute-transient", {"code": "1", "timeout": "60"}, "timeout", 60),
        ("execute-persistent", {"code": "1", "timeout": " 1.5 "}, "timeout", 1.5),
        ("execute-persistent", {"code": "1", "session_id": ""}, "session_id", None),
        ("execute-persistent", {"code": "", "interrupt": "true"}, "interrupt", True),
        ("execute-persistent", {"code": "", "interrupt": "false"}, "interrupt", False),
        ("install-package", {"package_name": "x", "session_id": " "}, "session_id", None),
    ],
)
def test_an_argument_that_came_as_text_is_taken_for_what_it_means(
    tool: str, arguments: dict[str, Any], field: str, value: Any
) -> None:
    taken = getattr(python_docker_mcp.parse(tool, arguments), field)
    assert taken == value
    assert type(taken) is (float if field == "timeout" else type(value))


@pytest.mark.parametrize(
    ("parameter", "text", "wanted"),
    [
        *[("state", text, 'an object such as {"x": 1}') for text in ("", "[1]", "null", "{'x': 1}", '{"x": NaN}')],
        ("state", '{"x":' * 9999, 'an object such as {"x": 1}'),
        *[("timeout", text, "a number") for text in ("", "inf", "nan", "1e400", "0x10", "1_000", "-1", "9" * 400, "٣")],
        *[("interrupt", text, "true or false") for text in ("", "yes", "1")],
    ],
)
def test_a_text_of_more_meanings_or_none_is_refused(parameter: str, text: str, wanted: str) -> None:
    tool = "execute-transient" if parameter == "state" else "execute-persistent"
    with pytest.raises(sandbox_runner.RequestError, match=f"^{parameter} must be {re.escape(wanted)}, not text.$"):
        python_docker_mcp.parse(tool, {"code": "1", parameter: text})


def test_an_error_is_told_first_with_its_line_and_then_its_traceback() -> None:
    error = ExceptionInfo("ValueError", "no\nreally", 3, "Traceback …\nValueError: no\nreally\n")
    result = render(Result("error", output=(Text("stdout", "before\n"),), exception=error), hint="Do better.")
    assert text_of(result) == (
        "Failed on line 3: ValueError: no\n\nbefore\n\nTraceback …\nValueError: no\nreally\n\nHint: Do better."
    )
    assert result.is_error
    assert result.structured_content["error"]["line"] == 3


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result("timeout", message="the code did not end", session="s", state="preserved"), "Timed out: the code did"),
        (Result("out_of_memory", message="too much"), "Out of memory: too much."),
        (Result("died", message="killed by SIGSEGV"), "Crashed: killed by SIGSEGV."),
        (Result("cancelled"), "Cancelled: the code was stopped."),
        (Result("error", exit_code=3, exception=ExceptionInfo("SystemExit", "3", 1, "…")), "exited with status 3."),
    ],
)
def test_whatever_is_not_ok_is_an_error_and_says_what_happened(result: Result, words: str) -> None:
    rendered = render(result)
    assert rendered.is_error
    assert words in text_of(rendered)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result("timeout", session="s", state="preserved"), "Session: s (its variables are kept)"),
        (Result("timeout", session="s", state="preserved", is_new=True), "Session: s (new: there was no"),
        (Result("died", session="s", state="lost"), "Session: s (its variables, functions and imports are lost"),
        (Result("died", session="s", state="restored"), "Session: s (restored: its variables are as they were before"),
        (Result("ok", session="s", state="preserved"), "Session: s"),
    ],
)
def test_what_became_of_a_sessions_variables_is_said(result: Result, words: str) -> None:
    rendered = render(result)
    assert text_of(rendered).splitlines()[-1].startswith(words)
    assert rendered.structured_content["session_state"] == result.state


def test_an_id_that_was_made_up_is_told_with_what_to_do_with_it() -> None:
    result = render(Result("ok", session="bera-supa-varo", state="preserved"), new_session=True)
    assert 'pass session_id "bera-supa-varo"' in text_of(result)
    assert result.structured_content["session_id"] == "bera-supa-varo"


def test_what_happened_between_two_calls_is_told_before_the_output() -> None:
    unread = Result("ok", output=(Text("stdout", "late\n"),), value="7")
    now = (Text("stdout", "now\n"),)
    result = render(Result("ok", output=now, lost_before="killed", unread=unread, earlier="tick\n", session="s"))
    places = [text_of(result).index(words) for words in ("had been lost", "late\n\nValue: 7", "tick", "now")]
    assert places == sorted(places)


def test_long_output_keeps_head_and_tail_and_says_how_much_is_missing_and_where_it_is() -> None:
    lines = "".join(f"line {number}\n" for number in range(20_000))
    result = render(Result("ok", output=(Text("stdout", lines),), session="s"), kept="session://s/output/1")
    text = text_of(result)
    assert text.startswith("line 0\n")
    assert "line 19999\n" in text
    assert f"[… {len(lines) - OUTPUT_BUDGET} characters left out …]" in text
    assert "session://s/output/1" in text
    assert len(text) < OUTPUT_BUDGET + 1000
    assert len(result.structured_content["stdout"]) < OUTPUT_BUDGET + 100


def test_notes_on_images_that_are_left_out_count_towards_the_limit_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docker_mcp, "RESULT_LIMIT", 1500)
    image = types.ImageContent(data="A" * 2000, mime_type="image/png")
    for images, has_data in (1, True), (10, False):
        result = python_docker_mcp.answer(["text", image] * images, {"value": "x" * 700})
        assert text_of(result).count("[image of") == images
        assert (result.structured_content is not None) == has_data


def test_a_gap_across_pieces_keeps_the_images_between_them() -> None:
    output = (Text("stdout", "a" * 40_000), Rich({"image/png": picture(8, 8)}), Text("stderr", "b" * 40_000))
    result = render(Result("ok", output=output))
    assert kinds(result) == ["text", "image", "text"]
    assert text_of(result).count("left out") == 1


def picture(width: int, height: int) -> str:
    """The beginning of a PNG file, in base64: enough to tell its size."""
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)).decode()


def test_images_stand_where_they_appeared_and_nothing_replaces_them() -> None:
    output = (
        Text("stdout", "one\n"),
        Rich({"text/plain": "<Figure>", "image/png": picture(640, 480)}),
        Text("stdout", "two\n"),
        Rich({"image/png": picture(8, 8)}, is_value=True),
    )
    result = render(Result("ok", output=output, value="<Figure>"))
    assert kinds(result) == ["text", "image", "text", "image"]
    assert text_of(result) == "one\ntwo"
    assert result.structured_content is None  # clients show it instead of the content, and images would be lost


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (picture(2001, 10), "2001 x 10 pixels left out"),
        (base64.b64encode(b"no image").decode(), "not an image"),
        ("!", "not an image"),
        (base64.b64encode(b"\xff\xd8\xff").decode(), "not an image"),
    ],
)
def test_an_image_that_would_break_the_clients_conversation_is_replaced_by_a_note(data: str, words: str) -> None:
    result = render(Result("ok", output=(Rich({"image/png": data}),)))
    assert kinds(result) == ["text"]
    assert words in text_of(result)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (base64.b64decode(picture(3, 5)), ("image/png", 3, 5)),
        (b"GIF89a" + struct.pack("<HH", 3, 5), ("image/gif", 3, 5)),
        (
            b"\xff\xd8\xff\xe0\0\4ab\xff\xc4\0\3c\xff\xc2\0\x0b\x08" + struct.pack(">HH", 5, 3) + bytes(9),
            ("image/jpeg", 3, 5),
        ),
        (b"RIFF....WEBPVP8X" + bytes(8) + b"\2\0\0\4\0\0", ("image/webp", 3, 5)),
        (b"RIFF....WEBPVP8L" + bytes(4) + b"\x2f" + struct.pack("<I", 2 | 4 << 14), ("image/webp", 3, 5)),
        (b"RIFF....WEBPVP8 " + bytes(10) + struct.pack("<HH", 3, 5), ("image/webp", 3, 5)),
    ],
)
def test_an_images_true_type_and_size_are_read_from_its_data(data: bytes, expected: tuple[str, int, int]) -> None:
    assert measure(data) == expected


def test_the_type_of_an_image_is_what_it_is_not_what_it_claims() -> None:
    result = render(Result("ok", output=(Rich({"image/jpeg": picture(8, 8)}),)))
    assert isinstance(result.content[0], types.ImageContent)
    assert result.content[0].mime_type == "image/png"


def test_no_more_images_than_a_conversation_bears() -> None:
    result = render(Result("ok", output=tuple(Rich({"image/png": picture(8, 8 + each)}) for each in range(25))))
    half = IMAGE_LIMIT // 2
    assert kinds(result) == ["image"] * half + ["text"] + ["image"] * half, (
        "the first and the last ones are told most by"
    )
    assert text_of(result) == f"[5 images left out: a result holds at most {IMAGE_LIMIT}]"
    last = result.content[-1]
    assert isinstance(last, types.ImageContent)
    assert last.data == picture(8, 8 + 24)


def test_a_picture_in_base64_is_shown_as_a_picture() -> None:
    data = base64.b64encode(base64.b64decode(picture(80, 80)) + bytes(100)).decode()
    text = f"before data:image/png;base64,{data} after\n{data}\n"
    result = render(Result("ok", output=(Text("stdout", text),)))
    assert kinds(result) == ["text", "image", "text", "image"]
    assert text_of(result).split() == ["before", "after"]
    broken = f"data:image/png;base64,iVBORw0KGgo{'A' * 400}"
    assert text_of(render(Result("ok", output=(Text("stdout", broken),)))) == (
        "[image/png left out: its data are not an image]"
    )


def test_an_interactive_figures_data_are_for_programs_only() -> None:
    forms = {
        "text/plain": "<figure>",
        "application/vnd.plotly.v1+json": '{"data": [1]}',
        "application/vnd.vegalite": "{",
    }
    result = render(Result("ok", output=(Rich(forms),)))
    assert text_of(result) == "<figure>"
    assert result.structured_content
    assert result.structured_content["charts"] == [
        {"mime_type": "application/vnd.plotly.v1+json", "data": {"data": [1]}}
    ]


def test_moves_of_the_cursor_cost_no_more_than_their_text() -> None:
    down = "\x1b[999B" * 20_000
    assert len(text_of(render(Result("ok", output=(Text("stdout", f"a{down}b"),))))) < 3000
    far = f"a\x1b[{'9' * 5000}Ab\x1b[A"
    assert text_of(render(Result("ok", output=(Text("stdout", far),)))) == "ab"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("out: 0\r\n in: 0\r in: 1\x1b[A\rout: 1\n in: 2\x1b[A\rout: 2\n\n", "out: 2\n in: 2"),
        ("out: 1\n in: 5\r      \r\x1b[Aout: 2", "out: 2"),
        ("12345\r\x1b[Kab", "ab"),
        ("one\ntwo\x1b[2A\x1b[Jthree", "onethree"),
        ("x" * 5000 + "\x1b[99B\x1b[A" + "y", "x" * 2000),
    ],
)
def test_what_moves_the_cursor_is_shown_as_a_terminal_has_it_in_the_end(written: str, shown: str) -> None:
    assert text_of(render(Result("ok", output=(Text("stderr", written),)))) == f"[stderr]\n{shown}"


def test_a_result_stays_below_a_megabyte_whatever_it_holds() -> None:
    heavy = base64.b64encode(base64.b64decode(picture(100, 100)) + os.urandom(400_000)).decode()
    error = ExceptionInfo("E", "\x01" * 4000, 1, "\x01" * 16_000)
    result = Result(
        "error",
        output=(Text("stdout", "\x01" * 100_000), Rich({"image/png": heavy}), Rich({"image/png": heavy})),
        value="\x01" * 32_000,
        exception=error,
        variables={str(number): "😀" * 10_000 for number in range(50)},
        files=tuple(FileInfo(f"{number}", 1) for number in range(100)),
        contents={str(number): b'"' * 60_000 for number in range(4)},
    )
    for rendered in (render(result), render(dataclasses.replace(result, output=(), contents={}))):
        assert len(rendered.model_dump_json()) < 1_000_000


def test_what_the_wire_can_not_carry_is_replaced() -> None:
    result = render(Result("ok", output=(Text("stdout", "a\ud800b"),), value="\udfff", variables={"x": "\ud800"}))
    result.model_dump_json().encode()
    assert "a?b" in text_of(result)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("\r50%\r" + " " * 20 + "\rdone\n", "done\n"),
        ("\r" + " " * 20 + "\r", ""),
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r20%\r30%\ndone\n", "30%\ndone\n"),
        ("10%\r20%\r", "20%"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
    ],
)
def test_text_is_shown_as_a_terminal_would_leave_it(written: str, shown: str) -> None:
    assert as_shown(written) == shown


@pytest.mark.parametrize("text", ["a", "\r", "a\r", "\x1b[", "\x1b]", "\x1b[0"])
def test_no_output_is_expensive_to_show(text: str) -> None:
    """In quadratic time this would take hours."""
    assert len(as_shown(text * 1_000_000)) <= len(text) * 1_000_000


@pytest.mark.parametrize(
    ("forms", "shown"),
    [
        ({"text/plain": "   a\n0  1", "text/html": "<table>"}, "   a\n0  1"),
        ({"text/plain": "<H object at 0x7f>", "text/html": "<b>hi</b>"}, "<b>hi</b>"),
        ({"text/plain": "<M object>", "text/html": "<b>", "text/markdown": "# hi"}, "# hi"),
        ({"text/plain": "<thing>"}, "<thing>"),
    ],
)
def test_of_a_values_forms_the_telling_one_is_shown(forms: Mapping[str, str], shown: str) -> None:
    assert telling_form(forms) == shown
    result = render(Result("ok", output=(Rich(forms, is_value=True),), value=forms["text/plain"]))
    assert result.structured_content["value"] == shown


def test_the_state_comes_back_as_json_and_as_data() -> None:
    left_out = {"f": "set is not JSON"}
    result = render(Result("ok", variables={"x": None, "y": [1, "é"]}, variables_left_out=left_out))
    assert 'State: {"x": null, "y": [1, "é"]}' in text_of(result)
    assert "Not in the state: f (set is not JSON)" in text_of(result)
    assert result.structured_content["state"] == {"x": None, "y": [1, "é"]}


def test_of_a_state_that_is_too_large_the_small_variables_come_and_the_large_are_named() -> None:
    result = render(Result("ok", variables={"big": "x" * STATE_BUDGET, "small": 1}))
    assert result.structured_content["state"] == {"small": 1}
    assert "big (100.0 kB of JSON)" in text_of(result)


def test_a_sessions_files_are_named_and_linked() -> None:
    result = render(Result("ok", session="s", state="preserved", files=(FileInfo("out/a b.csv", 1234),)))
    assert "session://s/files/PATH: out/a b.csv (1.2 kB)" in text_of(result)
    (link,) = [block for block in result.content if isinstance(block, types.ResourceLink)]
    assert (link.uri, link.mime_type, link.size) == ("session://s/files/out/a%20b.csv", "text/csv", 1234)
    assert result.structured_content["files"][0]["uri"] == link.uri


def test_a_transient_calls_small_files_come_with_the_result_and_of_the_others_it_is_said_that_they_are_gone() -> None:
    files = (FileInfo("a.txt", 2), FileInfo("b.bin", 3), FileInfo("big.bin", 10**6))
    result = render(Result("ok", files=files, contents={"a.txt": b"hi", "b.bin": b"\0\1\2"}))
    resources = [block.resource for block in result.content if isinstance(block, types.EmbeddedResource)]
    assert [type(resource).__name__ for resource in resources] == ["TextResourceContents", "BlobResourceContents"]
    assert "big.bin (1.0 MB). To keep files, use execute-persistent." in text_of(result)
    assert result.structured_content is None


def test_an_installation_tells_what_is_there_now_or_why_it_is_not() -> None:
    done = render_installation(Installation("polars", True, "Installed x 1.0: can be imported", (("x", "1.0"),)), "s")
    assert text_of(done) == "Installed x 1.0: can be imported."
    assert done.structured_content["installed"] == [{"name": "x", "version": "1.0"}]
    assert done.structured_content["session_id"] == "s"
    failed = render_installation(Installation("yaml", False, "yaml could not be installed", (), "error: no yaml"), None)
    assert failed.is_error
    assert text_of(failed) == "yaml could not be installed.\n\nerror: no yaml"


def test_kept_output_is_bounded_for_a_session_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docker_mcp, "OUTPUT_KEPT", 100_000)
    monkeypatch.setattr(python_docker_mcp, "OUTPUT_KEPT_ALL", 150_000)
    shelf = Shelf()

    def keep(session: str) -> str | None:
        return shelf.add(Result("ok", output=(Text("stdout", "x" * 60_000),), session=session), ())

    first, second = keep("a"), keep("a")
    assert list(shelf.outputs) == [second]
    assert [keep("b"), keep("c")] == list(shelf.outputs)[-2:]
    assert first not in shelf.outputs
    assert second not in shelf.outputs
    shelf.clear("b")
    assert {session for session, _ in shelf.outputs.values()} == {"c"}


def test_files_are_remembered_of_sessions_that_live_and_of_each_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docker_mcp, "FILES_REMEMBERED", 2)
    shelf = Shelf()
    for number in range(3):
        shelf.add(Result("ok", files=(FileInfo(f"{number}", 1), FileInfo("same", number)), session="a"), {"a", "b"})
    assert list(shelf.files["a"].values()) == [FileInfo("2", 1), FileInfo("same", 2)]
    shelf.add(Result("ok", files=(FileInfo("x", 1),), session="b"), {"b"})
    assert list(shelf.files) == ["b"]


def test_ids_that_are_made_up_are_fit_for_use_and_differ() -> None:
    made = {new_session_id() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"[a-z]{4}(-[a-z]{4}){2}", name) for name in made)


# ── what is offered ──


KEYWORDS = {"type", "description", "pattern", "minimum", "maximum", "exclusiveMinimum", "default"}
KEYWORDS |= {"additionalProperties"}


def test_each_tool_has_exactly_the_parameters_of_the_contract() -> None:
    schemas = {name: describe(tool, Config()).input_schema for name, tool in python_docker_mcp.TOOLS.items()}
    assert list(schemas) == TOOLS
    assert [(list(schema["properties"]), schema.get("required")) for schema in schemas.values()] == [
        (["code", "state", "timeout"], ["code"]),
        (["code", "session_id", "timeout", "interrupt"], ["code"]),
        (["package_name", "session_id"], ["package_name"]),
        ([], None),
        (["session_id"], ["session_id"]),
    ]
    for schema in schemas.values():
        assert set(schema) | {"required"} == {"type", "properties", "required", "additionalProperties"}
        assert schema["additionalProperties"] is False
        for about in schema["properties"].values():
            assert isinstance(about["type"], str)
            assert about["description"]
            assert set(about) <= KEYWORDS
    types_shown = {name: about["type"] for schema in schemas.values() for name, about in schema["properties"].items()}
    assert types_shown == {
        "code": "string",
        "state": "object",
        "timeout": "number",
        "session_id": "string",
        "interrupt": "boolean",
        "package_name": "string",
    }


def test_descriptions_tell_the_limits_that_are_configured() -> None:
    docker = DockerConfig(memory_limit="1g", timeout=12, max_timeout=99, network_disabled=False)
    config = Config(docker=docker, allowed_modules=("math",), blocked_modules=("os",))
    tool = describe(python_docker_mcp.TOOLS["execute-transient"], config)
    for words in ("12 seconds (up to 99", "1g of memory", "network allowed", "only math", "may not import os"):
        assert words in str(tool.description)
        assert words in instructions(config)
    assert tool.input_schema["properties"]["timeout"]["maximum"] == 99
    assert tool.annotations is not None
    assert tool.annotations.open_world_hint


# ── in memory ──


@pytest.fixture
def config(docker: FakeEngine, tmp_path: Path) -> Config:
    """Settings for the fake engine, with a working directory that exists."""
    work = tmp_path / "work"
    work.mkdir()
    return Config(
        docker=DockerConfig(command=docker.command, working_dir=str(work)),
        package=PackageConfig(preinstalled=()),
        pool=PoolConfig(enabled=False),
    )


@pytest.mark.parametrize("era", ERAS)
async def test_a_client_of_either_era_is_told_what_there_is(config: Config, era: str) -> None:
    async with connected(config, era) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == TOOLS
        assert all(tool.description and tool.icons and tool.annotations and not tool.output_schema for tool in tools)
        assert all(name in str(client.instructions) for name in TOOLS)
        assert client.server_info
        assert client.server_info.name == "python-docker-mcp"
        assert client.server_info.version == sandbox_runner.__version__
        templates = (await client.list_resource_templates()).resource_templates
        assert [template.uri_template.partition("{?")[0] for template in templates] == [
            "session://{session_id}/files/{+path}",
            "session://{session_id}/output/{number}",
        ]


@pytest.mark.slow
@pytest.mark.parametrize("era", ERAS)
async def test_a_client_of_either_era_runs_code_with_state_and_in_sessions(config: Config, era: str) -> None:
    async with connected(config, era) as client:
        once = await client.call_tool("execute-transient", {"code": f"x += 1\n{FACTORIAL}", "state": {"x": 41}})
        assert text_of(once) == '120\n\nState: {"x": 42}'
        first = await client.call_tool("execute-persistent", {"code": "def add(a, b):\n    return a + b"})
        session = first.structured_content["session_id"]
        second = await client.call_tool("execute-persistent", {"code": "add(2, 3)", "session_id": session})
        assert text_of(second) == f"Value: 5\n\nSession: {session}"
        ended = await client.call_tool("cleanup-session", {"session_id": session})
        assert not ended.is_error
        again = await client.call_tool("cleanup-session", {"session_id": session})
        assert again.is_error
        assert text_of(again).startswith(f"There is no session '{session}'")


@pytest.mark.slow
@pytest.mark.parametrize("era", ERAS)
async def test_a_conversation_that_begins_anew_finds_its_sessions(config: Config, era: str) -> None:
    hostile = """
class Hostile:
    def __repr__(self): raise SystemExit
    __len__ = __sizeof__ = __str__ = __repr__
    __class__ = property(__repr__)
    def __getattribute__(self, name): raise SystemExit
import math
table, text, number, hostile, _hidden = [1, 2], 'abc', 1.5, Hostile(), 1
open('made.csv', 'w').write('x' * 2000)
"""
    async with connected(config, era) as client:
        assert text_of(await client.call_tool("list-sessions", {})) == "There are no sessions."
        await client.call_tool("execute-persistent", {"code": hostile, "session_id": "study"})
        await client.call_tool("execute-persistent", {"code": "1", "session_id": "empty"})
        listed = await client.call_tool("list-sessions", {})
        first, empty, study = text_of(listed).splitlines()
        assert first == "There are 2 sessions:"
        assert re.fullmatch(r"- empty: idle for \d+ s, begun \d+ s ago; .*no variables", empty)
        variables = "Hostile (type), table (list, 2 items), text (str, 3 characters), number (float), hostile (Hostile)"
        assert re.fullmatch(r"- study: idle for .*; 1 file \(2\.0 kB\); variables " + re.escape(variables), study), (
            study
        )
        known = {one["session_id"]: one for one in listed.structured_content["sessions"]}
        assert known["study"]["variables"]["table"] == "list, 2 items"
        assert (known["study"]["state"], known["study"]["files"], known["study"]["files_size"]) == ("idle", 1, 2000)
    async with connected(config, era) as client:
        assert "- study: idle for " in text_of(await client.call_tool("list-sessions", {}))
        assert "Value: [1, 2]" in text_of(
            await client.call_tool("execute-persistent", {"code": "table", "session_id": "study"})
        )
        for name in ("study", "empty"):
            await client.call_tool("cleanup-session", {"session_id": name})


async def test_a_transient_call_tells_its_variables_unasked_as_long_as_they_are_few(config: Config) -> None:
    async with connected(config) as client:
        result = await client.call_tool("execute-transient", {"code": "x = 1\ny = 'y' * 9999\nz = {1}"})
        assert text_of(result) == '(no output)\n\nState: {"x": 1}\n\nNot in the state: y (too large: 9999 characters)'


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("execute-transient", {}, "execute-transient needs the parameter code: Python source code."),
    ("execute-transient", {"cod": "1"}, "execute-transient has no parameter 'cod': did you mean code?"),
    ("execute-persistent", {"code": "1", "sesion_id": "x"}, "has no parameter 'sesion_id': did you mean session_id?"),
    (
        "execute-transient",
        {"code": "1", "session_id": "x"},
        "code, state, timeout, files. Did you mean execute-persistent?",
    ),
    ("execute-transient", {"code": "1", "zzz": 1}, "'zzz': its parameters are code, state, timeout, files."),
    ("execute-transient", {"code": 1}, "code must be text, not a number."),
    ("execute-transient", {"code": " \n"}, "code is empty; pass this: Python source code."),
    ("execute-transient", {"code": "#" * 300_000}, "The code is 300000 bytes long; the limit is 262144."),
    ("execute-transient", {"code": "1", "state": "x"}, 'state must be an object such as {"x": 1}, not text.'),
    (
        "execute-transient",
        {"code": "1", "state": {"a b": 1}},
        "'a b' can't be the name of a variable: use an identifier",
    ),
    ("execute-transient", {"code": "1", "timeout": "5 s"}, "timeout must be a number, not text."),
    ("execute-transient", {"code": "1", "timeout": 0}, "timeout is 0: it must be a number of seconds above 0."),
    ("execute-transient", {"code": "1", "timeout": 301}, "A timeout of 301 seconds is more than the 300 allowed"),
    ("execute-persistent", {"code": "1", "timeout": 1801}, "A timeout of 1801 seconds is more than the 1800 allowed"),
    ("execute-persistent", {"code": ""}, "code is empty; pass Python source code, or the session_id of running code"),
    ("execute-persistent", {"code": "1", "interrupt": True, "session_id": "x"}, "interrupt goes with empty code:"),
    ("execute-persistent", {"code": "1", "interrupt": 1}, "interrupt must be true or false, not a number."),
    ("execute-persistent", {"code": "1", "session_id": "a b"}, "'a b' can't be a session_id: use 1 to 128 letters"),
    ("execute-persistent", {"code": "1", "session_id": "x" * 129}, "can't be a session_id"),
    ("install-package", {"package_name": "-r x"}, "'-r x' is not a package's name"),
    ("install-package", {"package_name": ["x"]}, "package_name must be text, not an array."),
    ("cleanup-session", {"session_id": ""}, "'' can't be a session_id"),
]


async def test_what_is_wrong_with_an_argument_is_said_in_the_result_and_nothing_is_started(
    config: Config, docker: FakeEngine
) -> None:
    async with connected(config) as client:
        for tool, arguments, words in BAD:
            result = await client.call_tool(tool, arguments)
            assert result.is_error
            assert words in text_of(result)
    assert not docker.log("run")


@pytest.mark.slow
async def test_a_client_comes_back_for_code_that_takes_long_and_can_stop_it(config: Config) -> None:
    impatient = dataclasses.replace(config, session=dataclasses.replace(config.session, answer_within=0.3))
    forever = "import time\nprint('begun')\nx = 5\nwhile True: time.sleep(0.01)"
    async with connected(impatient) as client:
        first = await client.call_tool("execute-persistent", {"code": forever, "session_id": "s", "timeout": 1000})
        assert not first.is_error
        assert first.structured_content["status"] == "running"
        said = "Still running: the call has not ended after 0 seconds. Call execute-persistent with this session_id and"
        assert text_of(first).startswith(said)
        written = text_of(first)
        while "begun" not in written:
            wait = await client.call_tool("execute-persistent", {"code": "", "session_id": "s"})
            assert wait.structured_content["status"] == "running"
            written += text_of(wait)
        stopped = await client.call_tool("execute-persistent", {"code": "", "session_id": "s", "interrupt": True})
        assert stopped.is_error
        assert text_of(stopped).startswith("Cancelled: the code was stopped.")
        assert text_of(stopped).endswith("its variables are kept)")
        after = await client.call_tool("execute-persistent", {"code": "x", "session_id": "s"})
        while after.structured_content["status"] == "running":
            after = await client.call_tool("execute-persistent", {"code": "", "session_id": "s"})
        assert text_of(after) == "Value: 5\n\nSession: s"
        await client.call_tool("cleanup-session", {"session_id": "s"})


async def test_null_for_what_may_be_left_out_is_as_if_it_were(config: Config) -> None:
    async with connected(config) as client:
        arguments: dict[str, Any] = {"code": "1", "session_id": None, "timeout": None}
        assert not (await client.call_tool("execute-persistent", arguments)).is_error


async def test_a_tool_that_does_not_exist_is_a_protocol_error_that_names_those_that_do(config: Config) -> None:
    async with connected(config) as client:
        with pytest.raises(MCPError, match="There is no tool 'execute': the tools are execute-transient, "):
            await client.call_tool("execute", {})


async def test_without_an_engine_the_server_is_there_says_so_and_works_as_soon_as_it_is(
    config: Config, docker: FakeEngine
) -> None:
    docker.script(version={"exit": 1, "stderr": "Cannot connect to the Docker daemon"})
    async with connected(config) as client:
        assert (await client.list_tools()).tools
        failed = await client.call_tool("execute-transient", {"code": "1"})
        assert failed.is_error
        assert "its engine does not answer: start Docker Desktop" in text_of(failed)
        docker.script(version={})
        assert text_of(await client.call_tool("execute-transient", {"code": "1"})) == "Value: 1"


class Listener:
    """Takes progress notifications, and lets a test wait for one."""

    def __init__(self) -> None:
        self.counts: list[float] = []
        self.messages: list[str] = []
        self._news = anyio.Event()

    async def __call__(self, progress: float, total: float | None, message: str | None) -> None:  # noqa: ARG002
        """Take one."""
        self.counts.append(progress)
        self.messages.append(message or "")
        self._news.set()
        self._news = anyio.Event()

    async def wait_for(self, words: str) -> None:
        """Return as soon as there was one with these words."""
        while not any(words in message for message in self.messages):
            await self._news.wait()


async def start(
    tasks: anyio.abc.TaskGroup, client: Client, tool: str, listener: Listener, **arguments: Any
) -> anyio.CancelScope:
    """Make a call in the background; cancelling the scope cancels it."""
    scope = anyio.CancelScope()

    async def call() -> None:
        with scope:
            await client.call_tool(tool, arguments, progress_callback=listener)

    tasks.start_soon(call)
    return scope


async def test_a_call_that_waits_for_an_image_tells_what_it_waits_for(config: Config, docker: FakeEngine) -> None:
    docker.script(pull={"hang": True})
    config = dataclasses.replace(config, docker=dataclasses.replace(config.docker, image="elsewhere:1"))
    async with connected(config) as client, anyio.create_task_group() as tasks:
        listener = Listener()
        call = await start(tasks, client, "execute-transient", listener, code="1")
        await listener.wait_for("pulling elsewhere:1 (once; ")
        call.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("era", ERAS)
async def test_progress_tells_the_latest_output_and_cancelling_keeps_the_sessions_variables(
    config: Config, era: str
) -> None:
    async with connected(config, era) as client, anyio.create_task_group() as tasks:
        listener = Listener()
        code = "import time\nx = 7\nprint('step one')\nprint('step two', end='', flush=True)\ntime.sleep(100)"
        call = await start(tasks, client, "execute-persistent", listener, code=code, session_id="s")
        await listener.wait_for("step two")
        call.cancel()
        assert text_of(await client.call_tool("execute-persistent", {"code": "x", "session_id": "s"})).startswith(
            "Value: 7"
        )
        assert listener.counts == sorted(set(listener.counts))


@pytest.mark.slow
async def test_a_silent_call_is_kept_alive_by_notifications(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docker_mcp, "KEEP_ALIVE", 0.1)
    async with connected(config) as client, anyio.create_task_group() as tasks:
        listener = Listener()
        call = await start(tasks, client, "execute-transient", listener, code="import time; time.sleep(100)")
        await listener.wait_for("1 seconds")
        call.cancel()


async def test_calls_run_side_by_side(config: Config) -> None:
    """The first waits for what the second writes."""
    code = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('went')"
    async with connected(config) as client, anyio.create_task_group() as tasks:
        results: list[str] = []

        async def wait() -> None:
            results.append(text_of(await client.call_tool("execute-transient", {"code": code})))

        tasks.start_soon(wait)
        await client.call_tool("execute-transient", {"code": "open('go', 'w').close()"})
    assert results[0].startswith("went")


async def test_a_sessions_files_are_read_as_resources(config: Config) -> None:
    async with connected(config) as client:
        code = "open('a b.csv', 'w').write('1,2'); open('x.bin', 'wb').write(b'\\0\\1\\2\\3'); None"
        result = await client.call_tool("execute-persistent", {"code": code, "session_id": "s"})
        links = [block.uri for block in result.content if isinstance(block, types.ResourceLink)]
        assert links == ["session://s/files/a%20b.csv", "session://s/files/x.bin"]
        assert [item.uri for item in (await client.list_resources()).resources] == links
        (text,) = (await client.read_resource(links[0])).contents
        assert isinstance(text, types.TextResourceContents)
        assert (text.text, text.mime_type) == ("1,2", "text/csv")
        (part,) = (await client.read_resource(f"{links[1]}?offset=1&length=2")).contents
        assert isinstance(part, types.BlobResourceContents)
        assert base64.b64decode(part.blob) == b"\1\2"
        await client.call_tool("cleanup-session", {"session_id": "s"})
        assert not (await client.list_resources()).resources
        with pytest.raises(MCPError, match="There is no session"):
            await client.read_resource(links[0])


@pytest.mark.slow
async def test_output_that_is_too_long_is_kept_and_read_in_ranges(config: Config) -> None:
    async with connected(config) as client:
        code = "for number in range(99_999): print(f'{number:05}')"
        result = await client.call_tool("execute-persistent", {"code": code, "session_id": "s"})
        (address,) = re.findall(r"session://s/output/\d+", text_of(result))
        (part,) = (await client.read_resource(f"{address}?offset=300000&length=12")).contents
        assert isinstance(part, types.TextResourceContents)
        assert part.text == "50000\n50001\n"
        with pytest.raises(MCPError, match=r"has 599994 characters, too much for one answer: .*\?offset=0&length="):
            await client.read_resource(address)
        await client.call_tool("cleanup-session", {"session_id": "s"})
        with pytest.raises(MCPError, match="is not kept any more"):
            await client.read_resource(address)


UNREADABLE = [
    ("file:///etc/passwd", "Only session://SESSION_ID/files/PATH"),
    ("session://s", "Only session://SESSION_ID/files/PATH"),
    ("session://s/else/x", "Only session://SESSION_ID/files/PATH"),
    ("session://s/files/x?length=0", "A length of 0 can't be read"),
    ("session://s/files/x?length=999999999", "ask for 1 to"),
    ("session://s/files/x?offset=-1", "A range is"),
    ("session://s/files/x?from=1", "A range is"),
    ("session://s/output/1", "is not kept any more"),
    ("session://s/files/nothing.txt", "nothing.txt"),
    ("session://s/files/../../etc/passwd", "can't be read"),
    ("session://s/files/%2Fetc/passwd", "can't be read"),
    ("session://nobody/files/x", "There is no session 'nobody'"),
]


async def test_addresses_that_can_not_be_read_are_refused_with_the_reason(config: Config) -> None:
    async with connected(config) as client:
        await client.call_tool("execute-persistent", {"code": "1", "session_id": "s"})
        for uri, words in UNREADABLE:
            with pytest.raises(MCPError, match=re.escape(words)):
                await client.read_resource(uri)


# ── over standard streams ──


def environment(config: Config, folder: Path) -> dict[str, str]:
    """The environment of a server that is to have this configuration."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
    return {**os.environ, "PYTHON_DOCKER_MCP_CONFIG": str(file)}


def stdio(config: Config, folder: Path) -> Client:
    """The SDK's client of a server in a process of its own."""
    arguments = ["-m", "python_docker_mcp"]
    return Client(
        StdioServerParameters(command=sys.executable, args=arguments, env=environment(config, folder), cwd=ROOT)
    )


class RawClient:
    """Speaks lines with a server, and takes nothing for granted."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdout is not None
        self.process = process
        self._lines = BufferedByteReceiveStream(process.stdout)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: Config,
        folder: Path,
        version: str = "2025-11-25",
        log: IO[str] | None = None,
        name: str = "raw",
    ) -> AsyncIterator[RawClient]:
        """A client that has shaken hands."""
        command = [sys.executable, str(ROOT / "python_docker_mcp.py")]
        async with await anyio.open_process(command, env=environment(config, folder), stderr=log) as process:
            with anyio.fail_after(PATIENCE):
                client = cls(process)
                about = {"name": name, "version": "1"}
                await client.send(
                    id=0,
                    method="initialize",
                    params={"protocolVersion": version, "capabilities": {}, "clientInfo": about},
                )
                assert (await client.receive(id=0))["result"]["protocolVersion"] == version
                await client.send(method="notifications/initialized")
                yield client
                if process.returncode is None:
                    process.kill()

    async def write(self, line: str) -> None:
        """Write a line as it is."""
        assert self.process.stdin is not None
        await self.process.stdin.send(line.encode() + b"\n")

    async def send(self, **message: Any) -> None:
        """Send a message."""
        await self.write(json.dumps({"jsonrpc": "2.0", **message}))

    async def call(self, call_id: int, tool: str, **arguments: Any) -> None:
        """Ask for a tool call."""
        meta = {"progressToken": call_id}
        await self.send(id=call_id, method="tools/call", params={"name": tool, "arguments": arguments, "_meta": meta})

    async def receive(self, **wanted: Any) -> dict[str, Any]:
        """The next message that has these fields; all that comes before must be a message too."""
        while True:
            message = json.loads(await self._lines.receive_until(b"\n", 1 << 20))
            assert message["jsonrpc"] == "2.0"
            if all(message.get(key) == value for key, value in wanted.items()):
                return dict(message)

    async def result(self, call_id: int) -> Any:
        """The result of a call."""
        return (await self.receive(id=call_id))["result"]

    async def progress(self, words: str) -> None:
        """Wait for a notification of progress with these words."""
        while words not in (await self.receive(method="notifications/progress"))["params"].get("message", ""):
            pass

    async def leave(self, how: signal.Signals | None) -> int:
        """Close the server's input, or send a signal; the exit status."""
        if how is None:
            assert self.process.stdin is not None
            await self.process.stdin.aclose()
        else:
            self.process.send_signal(how)
        return await self.process.wait()


@pytest.mark.slow
def test_the_servers_imports_are_not_searched_for_garbage_but_what_comes_after_them_is() -> None:
    told = "gc.isenabled(), gc.get_freeze_count(), gc.get_stats()[0]['collections']"
    code = f"import gc, python_docker_mcp; print({told})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    enabled, frozen, collections = done.stdout.split()
    assert enabled == "True"
    assert int(frozen) > 50_000
    assert int(collections) < 60  # three times as many with it


@pytest.mark.slow
async def test_a_client_over_standard_streams_has_its_conversation(config: Config, tmp_path: Path) -> None:
    with anyio.fail_after(PATIENCE):
        async with stdio(config, tmp_path) as client:
            listener = Listener()
            code = "import time\nprint('hello', flush=True)\ntime.sleep(0.5)"
            result = await client.call_tool("execute-transient", {"code": code}, progress_callback=listener)
            assert text_of(result) == "hello"
            assert "hello" in listener.messages


@pytest.mark.slow
async def test_nothing_but_messages_comes_over_the_wire_and_broken_lines_do_no_harm(
    config: Config, tmp_path: Path
) -> None:
    async with RawClient.open(config, tmp_path) as client:
        await client.write("this is not JSON")
        await client.write('{"jsonrpc": "2.0", "id": 5, "method": "no/such"}')
        assert (await client.receive(id=5))["error"]["code"] == types.METHOD_NOT_FOUND
        await client.call(1, "execute-transient", code="import os; os.write(1, b'raw\\n'); 'x\\u2028y'")
        assert (await client.result(1))["content"][0]["text"] == "raw\n\nValue: 'x\\u2028y'"
        assert await client.leave(None) == 0


CALL = '{"name": "execute-transient", "arguments": {"code": %s}}'
REFUSED: list[tuple[str, list[Any]]] = [  # lines that are no messages, and the ids of what is to be answered
    ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": %s}' % (CALL % '"\\ud83d"'), [1]),
    ('{"jsonrpc": "2.0", "method": "tools/call", "params": %s, "id": "two"}' % (CALL % '"\\udc00 \\ud800"'), ["two"]),
    ('{"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": ', [3]),
    ('{"params": {"arguments": {"id": 99, "x": [}, "name": "x"}, "id": 4, "jsonrpc": "2.0"}', [4]),
    ('{"id": 5, "method": "tools/list"}', [5]),
    ('{"jsonrpc": "1.0", "id": 6, "method": "tools/list"}', [6]),
    ('{"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": []}', [7]),
    ('{"jsonrpc": "2.0", "id": 8, "method": 8}', [8]),
    ('{"jsonrpc": "2.0", "id": 9, "method": "tools/list", "params": %s}' % ('{"a":' * 300 + "1" + "}" * 300), [9]),
    ('[{"jsonrpc": "2.0", "id": 10, "method": "ping"}, {"jsonrpc": "2.0", "id": 11, "method": "ping"}]', [10, 11]),
    ("nonsense", [None]),
    ("\ufeff[", [None]),
    ("5", [None]),
    ("", []),
    ("  ", []),
    ('{"method": "notifications/cancelled", "params": 5}', []),
    ('{"id": 12, "result": "\\ud800"}', []),
]


@pytest.mark.parametrize(("line", "ids"), REFUSED)
def test_a_line_that_the_sdk_would_drop_is_answered_with_what_is_wrong(line: str, ids: list[Any]) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    answers = list(answers_to(line, caught.value))
    assert [answer["id"] for answer in answers] == ids
    for answer in answers:
        assert re.fullmatch(r"The message was refused: .+\. Send it again, corrected\.", answer["error"]["message"])
        assert answer["error"]["code"] in (types.PARSE_ERROR, types.INVALID_REQUEST)
        types.jsonrpc_message_adapter.validate_json(json.dumps(answer))


@given(st.text(max_size=50) | st.text('{}[]":,0123456789idmethodparams\\ud8 ', max_size=50))
def test_no_line_is_too_odd_to_be_answered(line: str) -> None:
    for answer in answers_to(line, ValueError("why")):
        json.dumps(answer).encode()


@pytest.mark.slow
async def test_every_request_over_the_wire_gets_an_answer(config: Config, tmp_path: Path) -> None:
    async with RawClient.open(config, tmp_path) as client:
        for line, ids in REFUSED:
            await client.write(line)
            for number in ids:
                assert "error" in await client.receive(id=number)
        await client.call(100, "execute-transient", code="6 * 7")
        assert (await client.result(100))["content"][0]["text"] == "Value: 42"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version", "links"),
    [
        ("codex-mcp-client", "2025-11-25", 0),
        ("Codex", "2025-11-25", 0),
        ("of the first protocol", "2024-11-05", 0),
        ("claude-ai", "2025-11-25", 1),
    ],
)
async def test_clients_that_break_on_links_get_none_and_read_the_names_nevertheless(
    config: Config, tmp_path: Path, name: str, version: str, links: int
) -> None:
    async with RawClient.open(config, tmp_path, version, name=name) as client:
        await client.call(1, "execute-persistent", code="open('a.csv', 'w').close()", session_id="s")
        blocks = (await client.result(1))["content"]
        assert [block["type"] for block in blocks] == ["text"] + ["resource_link"] * links
        assert "a.csv" in blocks[0]["text"]


@pytest.mark.slow
async def test_the_log_follows_a_call_through_a_line_for_each_event_without_what_is_secret(
    config: Config, docker: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_DOCKER_MCP_DEBUG", "1")
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        async with RawClient.open(config, tmp_path, log=log) as client:
            await client.call(1, "execute-persistent", code="secret = 'in\\nthe code'", session_id="followed")
            await client.result(1)
            await client.call(2, "execute-transient", code="1", state={"key": "in the state"})
            await client.result(2)
            assert await client.leave(None) == 0
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} python-docker-mcp: ", line) for line in lines), lines
    (call,) = (line for line in lines if " of followed in the container " in line)
    container = call.rpartition(" ")[2]
    number = call.partition(": call ")[2].partition(" ")[0]
    assert any(f"call {number} ended: ok after 0." in line for line in lines)
    assert any(re.search(rf"starting: {docker.command} rename .* {container}$", line) for line in lines)
    assert any(re.search(r"`rename` ended with exit status 0 after \d", line) for line in lines)
    assert not any("in the state" in line or "the code" in line for line in lines)


@pytest.mark.slow
async def test_the_log_has_news_only_and_no_passwords_of_addresses(
    config: Config, docker: FakeEngine, tmp_path: Path
) -> None:
    docker.script(images=[], pull={"exit": 1, "stderr": "no answer from http://me:secret@proxy:1/ nor user@host\n"})
    config = dataclasses.replace(config, docker=dataclasses.replace(config.docker, image="elsewhere:1"))
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        async with RawClient.open(config, tmp_path, log=log) as client:
            await client.call(1, "execute-transient", code="1")
            (block,) = (await client.result(1))["content"]
            assert "can't be pulled: no answer from http://***@proxy:1/ nor user@host" in block["text"]
            assert await client.leave(None) == 0
    told = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert list(dict.fromkeys(told)) == [  # more than once: the pool, too, tries to have the image
        "python-docker-mcp: pulling elsewhere:1 (once; the network decides how long that takes)",
        "python-docker-mcp: pulling elsewhere:1: no answer from http://***@proxy:1/ nor user@host",
    ]


LEAVINGS = [(None, 0), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 128 + signal.SIGINT)]


async def leave_in_the_middle_and_come_back(
    config: Config, folder: Path, session: str, how: signal.Signals | None, status: int
) -> None:
    """End a server while code runs with and without a session; the next one finds the session's variables."""
    code = "import time\nprint('started', flush=True)\ntime.sleep(100)"
    async with RawClient.open(config, folder) as client:
        await client.call(1, "execute-persistent", code="x = 5", session_id=session)
        await client.result(1)
        await client.call(2, "execute-transient", code=code)
        await client.progress("started")
        await client.call(3, "execute-persistent", code=code, session_id=session)
        await client.progress("started")
        assert await client.leave(how) == status
    async with connected(config) as later:
        result = await later.call_tool("execute-persistent", {"code": "x", "session_id": session})
        assert "Value: 5" in text_of(result)
        assert not (await later.call_tool("cleanup-session", {"session_id": session})).is_error


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), LEAVINGS)
async def test_a_server_that_ends_in_the_middle_of_calls_leaves_nothing_but_sessions(
    config: Config, docker: FakeEngine, tmp_path: Path, how: signal.Signals | None, status: int
) -> None:
    await leave_in_the_middle_and_come_back(config, tmp_path, "s", how, status)
    with anyio.fail_after(PATIENCE):
        while docker.containers():
            await anyio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "words"),
    [("--version", sandbox_runner.__version__), ("--help", "--config FILE"), ("-h", "clients start")],
)
def test_the_program_tells_its_version_and_its_options(
    option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([option])
    assert exit_.value.code == 0
    assert words in capsys.readouterr().out


def test_a_bad_configuration_is_one_sentence_and_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("docker: {imagee: x}")
    monkeypatch.setenv("PYTHON_DOCKER_MCP_CONFIG", str(file))
    for arguments in ([], ["--config", str(file)]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        said = capsys.readouterr()
        assert not said.out
        assert re.fullmatch(r"python-docker-mcp: There is no setting docker.imagee .* did you mean .*\n", said.err)


# ── on real engines ──


@pytest.fixture
def real(engine_command: str) -> Config:
    """Settings for a real engine: an image from this host, and sessions that soon end by themselves."""
    return Config(
        docker=DockerConfig(command=engine_command, image="host", timeout=50),
        package=PackageConfig(preinstalled=()),
        session=SessionConfig(idle_timeout=120),
    )


@pytest.mark.engine
@pytest.mark.in_turns
async def test_a_package_is_installed_for_a_session_that_does_not_exist_yet(
    real: Config, engine_command: str, tmp_path: Path
) -> None:
    index = Index()
    fill(index)
    volume = f"python-docker-mcp-test-{secrets.token_hex(4)}"
    package = PackageConfig(preinstalled=(), index_url=index.url, network="host", volume=volume)
    try:
        async with stdio(dataclasses.replace(real, package=package), tmp_path) as client:
            arguments = {"package_name": "alpha", "session_id": "my_math_session"}
            installed = await client.call_tool("install-package", arguments)
            assert not installed.is_error
            assert "Installed alpha 2.0" in text_of(installed)
            code = "import alpha\nprint(alpha.__version__)"
            used = await client.call_tool("execute-persistent", {"code": code, "session_id": "my_math_session"})
            assert text_of(used) == "2.0\n\nSession: my_math_session"
            assert not (await client.call_tool("cleanup-session", {"session_id": "my_math_session"})).is_error
            missing = await client.call_tool("install-package", {"package_name": "nosuch"})
            assert missing.is_error
            assert "nosuch could not be installed" in text_of(missing)
    finally:
        index.close()
        remove_volume(engine_command, volume)


@pytest.mark.engine
@pytest.mark.in_turns
async def test_a_plot_comes_back_as_an_image(real: Config, session: str, tmp_path: Path) -> None:
    """With the image that users have, which is made once for each engine."""
    usual = dataclasses.replace(real, package=PackageConfig(), docker=dataclasses.replace(real.docker, timeout=60))
    code = "import matplotlib.pyplot as plt\nprint('a')\nplt.plot([1, 3, 2], color='red', lw=9)\nplt.show()\nprint('b')"
    async with stdio(usual, tmp_path) as client:
        result = await client.call_tool("execute-persistent", {"code": code, "session_id": session})
        assert kinds(result) == ["text", "image", "text"], text_of(result)
        assert result.structured_content is None
        image = result.content[1]
        assert isinstance(image, types.ImageContent)
        mime, width, height = measure(base64.b64decode(image.data))
        assert mime == image.mime_type == "image/png"
        assert 300 < width < 2000
        assert 200 < height < 2000
        look = (
            "import base64, io\nfrom PIL import Image\n"
            f"picture = Image.open(io.BytesIO(base64.b64decode({image.data!r}))).convert('RGB')\n"
            "sum(count for count, color in picture.getcolors(1 << 24) if color == (255, 0, 0)) > 1000"
        )
        seen = await client.call_tool("execute-persistent", {"code": look, "session_id": session})
        assert "Value: True" in text_of(seen)
        await client.call_tool("cleanup-session", {"session_id": session})


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.parametrize(("how", "status"), LEAVINGS)
async def test_a_session_outlives_its_server(
    real: Config, session: str, tmp_path: Path, how: signal.Signals | None, status: int
) -> None:
    await leave_in_the_middle_and_come_back(real, tmp_path, session, how, status)


@pytest.mark.engine
@pytest.mark.in_turns
async def test_a_cancelled_call_keeps_the_sessions_variables_and_files(
    real: Config, session: str, tmp_path: Path
) -> None:
    code = "import time\nx = 7\nopen('kept.txt', 'w').write('still')\nprint('started', flush=True)\ntime.sleep(100)"
    async with stdio(real, tmp_path) as client:
        async with anyio.create_task_group() as tasks:
            listener = Listener()
            call = await start(tasks, client, "execute-persistent", listener, code=code, session_id=session)
            await listener.wait_for("started")
            call.cancel()
        result = await client.call_tool("execute-persistent", {"code": "x", "session_id": session})
        assert "Value: 7" in text_of(result)
        (contents,) = (await client.read_resource(f"session://{session}/files/kept.txt")).contents
        assert isinstance(contents, types.TextResourceContents)
        assert contents.text == "still"
        await client.call_tool("cleanup-session", {"session_id": session})


@pytest.mark.engine
@pytest.mark.in_turns
def test_the_official_inspector_lists_the_tools_and_calls_one(real: Config, tmp_path: Path) -> None:
    npx = shutil.which("npx")
    if not npx:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("npx is not here")
    variables = environment(real, tmp_path)
    package = ["-p", "node@22", "-p", "@modelcontextprotocol/inspector@2.12.0"]
    passed = [
        f"{name}={variables[name]}" for name in ("PYTHON_DOCKER_MCP_CONFIG", "CONTAINERS_CONF") if name in variables
    ]
    options = [option for variable in passed for option in ("-e", variable)]
    server = [sys.executable, str(ROOT / "python_docker_mcp.py")]

    def inspect(*arguments: str) -> tuple[int, Any]:
        command = [npx, "-y", *package, "--", "mcp-inspector", "--cli", *options, *server, "--method", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables, check=False)
        return done.returncode, json.loads(done.stdout)

    def call(code: str) -> tuple[int, str]:
        arguments = json.dumps({"code": code})
        status, result = inspect("tools/call", "--tool-name", "execute-transient", "--tool-args-json", arguments)
        return status, result["content"][0]["text"]

    with (Path(tempfile.gettempdir()) / "python-docker-mcp-tests-npx").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # npx fetches into a cache that two must not fill at once
        status, listed = inspect("tools/list")
    assert (status, [tool["name"] for tool in listed["tools"]]) == (0, TOOLS)
    assert call("print(6 * 7)") == (0, "42")
    status, text = call("1/0")
    assert (status, text.partition("\n")[0]) == (5, "Failed on line 1: ZeroDivisionError: division by zero")


async def test_a_progress_notification_that_fails_is_its_calls_business(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: python_docker_mcp.Progress) -> None:
        raise RuntimeError("the client has gone mad")

    monkeypatch.setattr(python_docker_mcp, "PROGRESS_INTERVAL", 0.01)
    monkeypatch.setattr(python_docker_mcp.Progress, "report", fail)
    async with connected(config) as client:
        for _ in range(2):
            result = await client.call_tool("execute-transient", {"code": "import time; time.sleep(0.1); 6 * 7"})
            assert text_of(result).startswith("Value: 42")


async def test_resources_are_listed_in_pages(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docker_mcp, "RESOURCES_LISTED", 4)
    async with connected(config) as client:
        code = "for n in range(10): open(f'{n}.txt', 'w').close()"
        await client.call_tool("execute-persistent", {"code": code, "session_id": "s"})
        listed = await client.list_resources()
        names = [resource.name for resource in listed.resources]
        while listed.next_cursor:
            listed = await client.list_resources(cursor=listed.next_cursor)
            assert len(listed.resources) <= 4
            names += [resource.name for resource in listed.resources]
        assert sorted(names) == [f"{n}.txt" for n in range(10)]
        with pytest.raises(MCPError, match="'x' is no cursor of this list"):
            await client.list_resources(cursor="x")
        await client.call_tool("cleanup-session", {"session_id": "s"})
        assert (await client.list_resources()).resources == []
