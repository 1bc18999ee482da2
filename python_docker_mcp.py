"""The MCP server: four tools with which an agent runs Python in locked-down containers, over standard input and output.

From top to bottom: the tools, each a model of its arguments that makes one call to the Runner; the rendering of results
as content for a model; the server, which listens, reports progress and remembers what results pointed at; and the
program around it. `sandbox_runner` covers what happens to the code itself.

The habits of clients shape the results. Some clients show the model `structuredContent` instead of the content, and so
lose images, or the order of the text: so each of the two says everything, and `structuredContent` is left out as soon
as a result holds anything binary. Results near a megabyte are refused, and so are images of more than 2000 pixels a
side; long results crowd out the conversation: so text is cut in the middle, with a note on where the rest is, and
whatever does not fit is named. Clients give up on calls that last a minute: so a call in a session is answered before
that, and its code goes on.

The handshake waits for nothing: the server finds the engine and makes the image while the client goes on.
"""

from __future__ import annotations

import gc

gc.disable()  # during the imports: their objects stay, and looking for garbage among them took 7 % of the start

import argparse
import asyncio
import base64
import binascii
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import hmac
import inspect
import itertools
import json
import logging
import mimetypes
import os
import re
import secrets
import shutil
import signal
import socket
import struct
import sys
import tempfile
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import anyio
import mcp_types as types
import pydantic
import pydantic_core
import uvicorn
from anyio.streams.memory import MemoryObjectSendStream
from mcp.server import Server, ServerRequestContext
from mcp.server.auth.middleware import auth_context
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.session import ServerSession
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from pydantic.json_schema import GenerateJsonSchema, SkipJsonSchema
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sandbox_runner import (
    BASE_LABEL,
    CGROUP_REMEDY,
    CONFIG_HELP,
    GPU_REMEDY,
    HARMFUL,
    IMAGE_SIDE,
    NOBODY,
    PACKAGES,
    PROXY_PORT,
    SESSION_ID,
    USER_NAME,
    WRITABLE_FOLDERS,
    Config,
    ConfigError,
    DockerConfig,
    Engine,
    EngineError,
    ExceptionInfo,
    FileInfo,
    FilesConfig,
    Image,
    ImageError,
    InputFile,
    Installation,
    NotebookPlace,
    Omitted,
    OutputFolder,
    RequestError,
    Result,
    Rich,
    Runner,
    SandboxError,
    SandboxInfo,
    SessionConfig,
    SessionId,
    Text,
    __version__,
    clip,
    host_image_name,
    image_type,
    is_within,
    load_config,
    log,
    on_signals,
    open_runner,
    open_tasks,
    parse_requirement,
    plain_name,
    plain_text,
    require_secrets,
    run_to_exit,
    runner_until_signal,
    set_up_logging,
    show_status,
    shown_path,
    size_in_bytes,
    split_key,
    split_mount,
    tells,
)

gc.freeze()  # later collections skip those objects too
gc.enable()

__all__ = ["make_server", "main"]

T = TypeVar("T")

# Limits on one result. Claude Code warns at 10 000 tokens, Claude Desktop refuses results near a megabyte, and the
# model's API refuses images of more than 2000 pixels a side, and more than a hundred of them in a conversation.
OUTPUT_BUDGET = 30_000  # characters of what the code wrote and displayed
VALUE_BUDGET = 10_000  # characters of the last expression's value, of a traceback, of an installer's output
STATE_BUDGET = 100_000  # bytes of JSON for the variables that come back, if the caller passed `state`
STATE_UNASKED = 4_000  # the same, if the caller did not
RESULT_LIMIT = 900_000  # bytes of the whole result as JSON
IMAGE_LIMIT = 20  # images
DOWNLOADS_NAMED = 10  # addresses of files in a result
FILES_NAMED = 30  # files named in a result, or in a tool's description
FILES_LOOKED_AT = 1000  # entries of a folder, to see whether it has so few
LOOK_PATIENCE = 1.0  # seconds for such a look: what it adds is not worth more

# Limits on what is kept and read for results that could not hold everything.
OUTPUT_KEPT = 16 << 20  # characters of output, per session
OUTPUT_KEPT_ALL = 64 << 20  # characters of output, over all sessions
FILES_REMEMBERED = 1000  # files of one session that are listed as resources
RESOURCES_LISTED = 100  # resources in one answer; more have to be asked for with a cursor
VARIABLES_SHOWN = 30  # of a session in a list
RESOURCE_LIMIT = 384 << 10  # bytes, or characters, of a resource in one answer; JSON may double that

PROGRESS_INTERVAL = 0.1  # seconds between two progress notifications
REPORT_TIMEOUT = 1.0  # seconds for a client to take one
KEEP_ALIVE = 5.0  # seconds without news after which one is sent anyway: clients give up on silent calls

LINKS_SINCE = "2025-06-18"  # protocol version; clients of older ones refuse a result that holds a resource_link
NO_LINKS = ("codex",)  # parts of names of clients that still refuse it: github.com/openai/codex/issues/33404 and /41280


# ── tools ──

PICTURE = """
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" fill="none" stroke-linecap="round" stroke-linejoin="round">
<rect x="2" y="7" width="28" height="22" rx="3" fill="#1d63ed"/>
<path d="M2 13h28M11 7v6M21 7v6" stroke="#fff" stroke-width="1.5"/>
<path d="m8 18 4 3.5L8 25m7 0h8" stroke="#ffd43b" stroke-width="2.5"/>
</svg>
"""
ICON = types.Icon(
    src=f"data:image/svg+xml;base64,{base64.b64encode(PICTURE.encode()).decode()}",
    mime_type="image/svg+xml",
    sizes=["any"],
)


def without_default(schema: dict[str, Any]) -> None:
    """Drop `"default": null` from a parameter's schema, whose type has no null; the server still accepts null."""
    del schema["default"]


def in_text(meaning: Callable[[str], Any]) -> pydantic.BeforeValidator:
    """Return a validator that takes a text for what it means; `meaning` returns the text itself if that is unclear."""
    return pydantic.BeforeValidator(lambda given: meaning(given) if isinstance(given, str) else given)


def object_in(text: str) -> Any:
    """Return the JSON object that a text is, or else the text."""
    with contextlib.suppress(ValueError):
        found = pydantic_core.from_json(text.encode(), allow_inf_nan=False)
        return found if isinstance(found, dict) else text
    return text


def list_in(text: str) -> Any:
    """Return the list that a text is as JSON, or else one of the text alone; None if it is empty."""
    with contextlib.suppress(ValueError):
        found = pydantic_core.from_json(text.encode())
        return found if isinstance(found, list) else [text]
    return [text] if text.strip() else None


def number_in(text: str) -> float | str:
    """Return the number that a text is in plain digits, or else the text."""
    return float(text) if re.fullmatch(r"\s*[0-9]{1,15}(\.[0-9]{1,15})?\s*", text) else text


Code = Annotated[
    str,
    pydantic.Field(
        pattern=r"\S",
        description="Python source code. print() what you want to see, or end with an expression; top-level await "
        "works.",
    ),
]
OptionalSessionId = Annotated[SessionId | SkipJsonSchema[None], in_text(lambda text: text if text.strip() else None)]
Seconds = Annotated[float, pydantic.Field(gt=0)]
Timeout = Annotated[
    Seconds | SkipJsonSchema[None],
    in_text(number_in),
    pydantic.Field(json_schema_extra=without_default, description="Seconds the code may take."),
]


Files = Annotated[
    list[str] | SkipJsonSchema[None],
    in_text(list_in),
    pydantic.Field(
        json_schema_extra=without_default,
        description="Files of the user's to copy into the working directory before the code runs, which opens them by "
        "their base names.",
    ),
]


class Tool(pydantic.BaseModel):
    """Arguments of one call. Each subclass is a tool, and its fields are the parameters that clients see."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    runs_code: ClassVar[bool] = False
    keeps_sessions: ClassVar[bool] = False
    destructive: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False
    read_only: ClassVar[bool] = False

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:
        """Make the call. Raises SandboxError."""
        raise NotImplementedError


class ExecuteTransient(Tool):
    """Runs code in a container of its own."""

    name = "execute-transient"
    title = "Run Python once"
    description = (
        "Run Python code in a fresh container that is thrown away afterwards. Returns what the code printed, the value "
        "of an expression at its end, and every Matplotlib figure as an image. Nothing is kept for later calls, except "
        "what you pass on as `state`. For work in several steps use execute-persistent."
    )
    runs_code = True

    code: Code
    state: Annotated[dict[str, Any] | SkipJsonSchema[None], in_text(object_in)] = pydantic.Field(
        default=None,
        json_schema_extra=without_default,
        description='Variables the code starts with, as JSON values by name: {"x": 1, "rows": [[1, 2], [3, 4]]}. '
        "The result has the state afterwards: the code's top-level variables, as far as JSON can hold them.",
    )
    timeout: Timeout = None
    files: Files = None

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:
        """Run the code, and return its small files with the result: they can't be read later."""
        result = await service.runner.execute(
            self.code,
            files=await permitted(self.files, service.runner.config.files),
            state=self.state or {},
            state_limit=STATE_UNASKED if self.state is None else None,
            timeout=seconds(self.timeout, service.runner.config.docker.max_timeout),
            on_output=progress.on_output,
            on_status=progress.on_status,
        )
        return render(
            result,
            hint=await service.hint_on(result, self.code),
            state_budget=STATE_UNASKED if self.state is None else STATE_BUDGET,
        )


class ExecutePersistent(Tool):
    """Runs code in a session's container."""

    name = "execute-persistent"
    title = "Run Python in a session"
    description = (
        "Run Python code in a session, where variables, functions, imports and files stay for the next call. Leave "
        "session_id out to start a session, then pass the session_id that the result names to go on in it. Returns "
        "what the code printed, the value of an expression at its end, and every Matplotlib figure as an image. After "
        "a time-out or a crash the result says whether the session's variables were kept, restored to what they were "
        "before the call, or lost. Code that takes long goes on after the call was answered: the result then says that "
        "it is running, and a call with the same session_id and empty code waits for the rest."
    )
    runs_code = True
    keeps_sessions = True

    code: str = pydantic.Field(
        description="Python source code. print() what you want to see, or end with an expression; top-level await "
        'works. Empty ("") to wait for code that is still running in the session.',
    )
    session_id: OptionalSessionId = pydantic.Field(
        default=None,
        json_schema_extra=without_default,
        description="The session to go on in, or a name of your own for a new one (letters, digits, dots, dashes, "
        "underscores). Left out: a new session, whose id the result tells.",
    )
    timeout: Timeout = None
    files: Files = None
    interrupt: Annotated[
        bool | SkipJsonSchema[None], in_text(lambda text: {"true": True, "false": False}.get(text, text))
    ] = pydantic.Field(
        default=None,
        json_schema_extra=without_default,
        description="true, with empty code: stop the code that is still running, instead of waiting for it.",
    )

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:
        """Run the code, and remember the output and the files that the result only points at."""
        waits = not self.code.strip()
        if waits and not self.session_id:
            raise RequestError("code is empty; pass Python source code, or the session_id of running code to wait for.")
        if self.interrupt and not waits:
            raise RequestError("interrupt goes with empty code: stop first what is running, then run other code.")
        if self.files and waits:
            raise RequestError("files goes with code that uses them: pass both in the next call.")
        session = self.session_id or new_session_id()
        stop = anyio.Event()
        if self.interrupt:
            stop.set()
        config = service.runner.config.session
        result = await service.runner.execute(
            self.code,
            files=await permitted(self.files, service.runner.config.files),
            session=session,
            timeout=seconds(self.timeout, config.max_timeout),
            on_output=progress.on_output,
            on_status=progress.on_status,
            interrupt=stop if self.interrupt else None,
            answer_within=config.answer_within,
        )
        return render(
            result,
            new_session=self.session_id is None,
            kept=service.shelf.add(result, service.runner.living()),
            hint=await service.hint_on(result, self.code),
            address=service.address,
        )


class InstallPackage(Tool):
    """Installs a package for one session, or for all later executions."""

    name = "install-package"
    title = "Install a Python package"
    description = (
        "Install a package from the package index, so that code can import it: pip inside the code does not work. With "
        "session_id it is there for that session at once (variables are kept; a session that does not exist yet is "
        "created); without, for every execution from now on."
    )
    idempotent = True

    package_name: str = pydantic.Field(
        pattern=r"\S",
        description="One requirement as pip takes it: a name as on PyPI, if need be with extras and versions, such as "
        "polars, beautifulsoup4, httpx[http2] or networkx>=3.2,<4.",
    )
    session_id: OptionalSessionId = pydantic.Field(
        default=None,
        json_schema_extra=without_default,
        description="The session that needs the package. Left out: it is installed for every execution from now on.",
    )

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:  # inherited
        """Install the package, and report the outcome."""
        module = self.package_name.strip()
        if module.partition(".")[0] in sys.stdlib_module_names and module not in DISTRIBUTIONS:
            message = f"{module} is part of Python: import it, nothing has to be installed"
            return render_installation(Installation(module, True, message, ()), self.session_id)
        if not (self.session_id or service.installs_for_all):
            raise RequestError(
                "On this server packages are installed for a session: pass the session_id that needs it. For everybody "
                "the operator adds packages (package.preinstalled)."
            )
        requirement, note = package_meant(self.package_name)
        installation = await service.runner.install(requirement, session=self.session_id, on_status=progress.on_status)
        return render_installation(installation, self.session_id, note)


class CleanupSession(Tool):
    """Ends a session."""

    name = "cleanup-session"
    title = "End a session"
    description = (
        "End a session: its container is removed, with all its variables, files and packages. Use it when the work in "
        "a session is done."
    )
    destructive = True
    idempotent = True

    session_id: SessionId = pydantic.Field(description="The session to end.")

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:  # noqa: ARG002  # inherited
        """End the session, and forget its outputs and files."""
        existed = await service.runner.close_session(self.session_id)
        service.shelf.clear(self.session_id)
        if not existed:
            raise RequestError(
                f"There is no session {self.session_id!r}, so there is nothing to clean up: "
                "it has ended already, or never existed."
            )
        words = f"The session {self.session_id} has ended, and its container is removed."
        return answer([words], {"status": "ok", "session_id": self.session_id, "message": words})


class ListSessions(Tool):
    """Lists the sessions that there are."""

    name = "list-sessions"
    title = "List sessions"
    description = (
        "List the sessions that there are, also those of earlier conversations, with their variables and files. Pass "
        "the session_id of one to execute-persistent to go on in it."
    )
    read_only = True
    idempotent = True

    async def call(self, service: Service, progress: Progress) -> types.CallToolResult:  # noqa: ARG002  # inherited
        """Ask all sandboxes of the user's."""
        own = service.runner.launcher.owner
        sessions = [session_fields(info, own) for info in await service.runner.list_sessions()]
        count = "There is one session:" if len(sessions) == 1 else f"There are {len(sessions) or 'no'} sessions"
        words = [f"{count}{':' if len(sessions) > 1 else '.' * (not sessions)}", *map(session_line, sessions)]
        return answer(["\n".join(words)], {"status": "ok", "sessions": sessions})


TOOLS: dict[str, type[Tool]] = {
    tool.name: tool for tool in (ExecuteTransient, ExecutePersistent, InstallPackage, ListSessions, CleanupSession)
}


def session_fields(info: SandboxInfo, own: str) -> dict[str, Any]:
    """Return what a program is told of a session."""
    elsewhere = info.attached and info.owner != own
    return {
        "session_id": info.session,
        "state": "used by another program" if elsewhere else "running" if info.busy else "idle",
        "age": round(info.age),
        "idle": round(info.idle),
        "memory": info.memory,
        "files": info.files[0],
        "files_size": info.files[1],
        "variables": {shown_path(name): shown_path(about) for name, about in info.variables.items()},
    }


def session_line(fields: Mapping[str, Any]) -> str:
    """Say what a model should know of a session."""
    variables = [f"{name} ({about})" for name, about in fields["variables"].items()]
    more = f" and {len(variables) - VARIABLES_SHOWN} more" if len(variables) > VARIABLES_SHOWN else ""
    state = f"idle for {duration(fields['idle'])}" if fields["state"] == "idle" else fields["state"]
    parts = [
        f"{state}, begun {duration(fields['age'])} ago",
        f"{readable_size(fields['memory'])} of memory" if fields["memory"] else "",
        f"{fields['files']} file{'s' * (fields['files'] > 1)} ({readable_size(fields['files_size'])})"
        if fields["files"]
        else "",
        f"variables {', '.join(variables[:VARIABLES_SHOWN])}{more}" if variables else "no variables",
    ]
    return f"- {fields['session_id']}: {'; '.join(filter(None, parts))}"


class ParameterSchema(GenerateJsonSchema):
    """JSON schema without titles, which only repeat the parameters' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  # pydantic's signature
        """Return False, for every field."""
        return False


def describe(tool: type[Tool], config: Config, given: str = "") -> types.Tool:
    """Describe a tool for `tools/list`; `given` says which files it can be given."""
    schema = tool.model_json_schema(schema_generator=ParameterSchema)
    schema = {key: value for key, value in schema.items() if key not in ("title", "description")}
    most = config.session.max_timeout if tool.keeps_sessions else config.docker.max_timeout
    if tool.runs_code:
        schema["properties"]["timeout"].update(default=config.docker.timeout, maximum=most)
        if config.files.inputs:
            schema["properties"]["files"]["description"] += f" {given}".rstrip()
        else:
            del schema["properties"]["files"]
    remark = limits(config, most) if tool.runs_code else preinstalled(config) if tool is InstallPackage else ""
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=f"{tool.description} {remark}".rstrip(),
        input_schema=schema,
        icons=[ICON],
        annotations=types.ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.read_only,
            destructive_hint=tool.destructive,
            idempotent_hint=tool.idempotent,
            open_world_hint=has_network(config) if tool.runs_code else tool is InstallPackage,
        ),
        # Claude Code puts longer results into a file, and shows the model the file's name.
        _meta={"anthropic/maxResultSizeChars": 2 * STATE_BUDGET} if tool.runs_code else None,
    )


def limits(config: Config, most: float) -> str:
    """Say what code may do and use."""
    docker = config.docker
    span = f"{docker.timeout:g} seconds (up to {most:g} with `timeout`)"
    room = f"{docker.memory_limit} of memory, {docker.cpu_limit:g} CPU cores, {docker.disk_limit} of files in"
    words = [f"Limits: {span}, {room} {docker.working_dir}, {what_is_reached(config)}."]
    if config.allowed_modules:
        words.append(f"Code may import only {', '.join(config.allowed_modules)}.")
    if config.blocked_modules:
        words.append(f"Code may not import {', '.join(config.blocked_modules)}.")
    return " ".join(words)


def what_can_be_given(config: Config) -> str:
    """Name the folders whose files a call may be given, and the files in them if there are few."""
    names: list[str] = []
    for folder in config.files.folders():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found = itertools.islice(entries, FILES_LOOKED_AT)
            files = [entry.name for entry in found if entry.is_file(follow_symlinks=False)]
            names += [name for name in files if not HARMFUL.search(name) and not name.startswith(".")]
    few = f", which has {', '.join(sorted(names))}" if 0 < len(names) <= FILES_NAMED else ""
    return f"They are taken from {' or '.join(config.files.inputs)}{few}."


async def looked_up(function: Callable[[], T], instead: T) -> T:
    """Call a function that looks at the host's folders in a thread; return something else if that takes too long."""
    with anyio.move_on_after(LOOK_PATIENCE):
        return await anyio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
    return instead


async def permitted(files: Sequence[str] | None, config: FilesConfig) -> list[InputFile]:
    """Return the files that a call is to be given. Raises RequestError for those that it may not have."""
    if not files:
        return []
    if not config.inputs:
        raise RequestError(
            "No files can be given here: the operator has named no folder to take them from (files.inputs). Put the "
            "data into the code instead."
        )

    def find_all() -> list[InputFile]:
        folders = config.folders()
        return [InputFile.find(file, folders) for file in files]

    return await anyio.to_thread.run_sync(find_all)


def has_network(config: Config) -> bool:
    """Whether code can reach anything at all."""
    return bool(config.allowed_hosts) or not config.docker.network_disabled


def what_is_reached(config: Config) -> str:
    """Say what code can reach over the network, and where it needs no credential."""
    if not config.allowed_hosts:
        return "no network" if config.docker.network_disabled else "network allowed"
    known = ", ".join(dict.fromkeys(secret.host for secret in config.secrets.values()))
    words = f" (to {known} with a credential that is added outside: give any text where a key is asked for)"
    return f"no network but HTTP and HTTPS to {', '.join(config.allowed_hosts)}{words if known else ''}"


def preinstalled(config: Config) -> str:
    """Say which packages need no installation."""
    names = ", ".join(config.package.preinstalled)
    return f"Installed already: {names}." if names else "Only the standard library is installed already."


def instructions(config: Config) -> str:
    """Tell a model what it should know before it uses the tools."""
    return f"""\
Runs Python in locked-down containers.
- One piece of code that needs nothing from before: execute-transient.
- Work in steps: execute-persistent. Leave session_id out in the first call, and pass the one that it returns in the \
next: variables, functions, imports and files are still there. A session ends after \
{config.session.idle_timeout / 60:g} minutes without a call; end it with cleanup-session when \
you are done. To find those of earlier conversations: list-sessions.
- {preinstalled(config)} Anything else: install-package first, then import it.
- You see what the code prints, and the value of an expression at its end. Matplotlib figures come back as images \
without savefig() or show(), and display(x) shows other images and rich values.
- Files that a session writes into its working directory {config.docker.working_dir} are resources: \
session://SESSION_ID/files/PATH.{files_in_and_out(config)}
- Long work: execute-persistent with a `timeout` of up to {config.session.max_timeout:g} seconds. A call is answered \
after {config.session.answer_within:g} seconds in any case, and its code goes on: call again with the same session_id \
and empty code to wait for the rest, or with interrupt to stop it.
- {limits(config, config.docker.max_timeout)}"""


def files_in_and_out(config: Config) -> str:
    """Say how files come to the user, and from the user, if they do."""
    words = ""
    if config.files.output:
        words += (
            f"\n- What code writes there is saved for the user in {config.files.output}; the result says under which "
            "paths. Tell the user those; there is no need to print what is in the files."
        )
    if config.files.inputs:
        words += (
            "\n- Files of the user's: name them in `files`, and open them by their base names. They are taken from "
            f"{' or '.join(config.files.inputs)}."
        )
    return words


def parse(name: str, arguments: Mapping[str, Any]) -> Tool:
    """Validate a call. Raises MCPError if there is no such tool, RequestError with a sentence on the first problem."""
    tool = TOOLS.get(name)
    if tool is None:
        raise MCPError(types.INVALID_PARAMS, f"There is no tool {clip(name, 100)!r}: the tools are {', '.join(TOOLS)}.")
    try:
        return tool.model_validate(arguments)
    except pydantic.ValidationError as error:
        # Report an unknown parameter first: it is often a misspelling of a required one that is missing.
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        if not problem["loc"]:
            raise RequestError(f"{tool.name}: the name of a parameter has lone surrogates; leave them out.") from None
        raise RequestError(refusal(tool, str(problem["loc"][0]), problem["type"], problem["input"])) from None


def refusal(tool: type[Tool], parameter: str, problem: str, given: Any) -> str:
    """Say why an argument is refused, and what to pass instead."""
    if problem == "extra_forbidden":
        return f"{tool.name} has no parameter {clip(parameter, 100)!r}: {suggestion(tool, parameter)}"
    about = str(tool.model_fields[parameter].description).partition(". ")[0].rstrip(".")
    if problem == "missing":
        return f"{tool.name} needs the parameter {parameter}: {about}."
    if problem == "string_pattern_mismatch" and parameter == "session_id":
        return (
            f"{clip(given, 60)!r} can't be a session_id: use 1 to 128 letters, digits, dots, dashes and underscores, "
            "or leave it out."
        )
    if problem == "string_pattern_mismatch":
        return f"{parameter} is empty; pass this: {about}."
    if problem == "greater_than":
        return f"{parameter} is {given!r}: it must be a number of seconds above 0."
    wanted = {"state": 'an object such as {"x": 1}', "timeout": "a number", "interrupt": "true or false"}
    wanted["files"] = 'a list of paths such as ["sales.csv"]'
    kind = {dict: "an object", list: "an array", str: "text", bool: "a boolean", type(None): "null"}.get(type(given))
    return f"{parameter} must be {wanted.get(parameter, 'text')}, not {kind or 'a number'}."


def suggestion(tool: type[Tool], parameter: str) -> str:
    """Suggest what the caller meant by a parameter that does not exist."""
    if alike := difflib.get_close_matches(parameter, tool.model_fields, 1):
        return f"did you mean {alike[0]}?"
    known = f"its parameters are {', '.join(tool.model_fields)}."
    other = ExecutePersistent if tool is ExecuteTransient else ExecuteTransient
    meant = tool.runs_code and difflib.get_close_matches(parameter, other.model_fields, 1)
    return f"{known} Did you mean {other.name}?" if meant else known


def seconds(asked: float | None, most: float) -> float | None:
    """Return a call's timeout. Raises RequestError if it exceeds the limit."""
    if asked is not None and asked > most:
        raise RequestError(
            f"A timeout of {asked:g} seconds is more than the {most:g} allowed here: ask for less, and do long work in "
            "steps, in a session."
        )
    return asked


INSTALL_COMMAND = re.compile(
    r"[!%$]?\s*(?:(?:python[\d.]*|py|\{?sys\.executable\}?)\s+-m\s+)?"
    r"(?:(?:uv\s+)?pip[\d.]*\s+install|uv\s+add|(?:conda|mamba)\s+install)\s+"
)
QUOTES = "'\"`"
NEEDLESS_OPTIONS = frozenset(
    "-q -qq -U -y --quiet --upgrade --user --yes --system --no-cache-dir --break-system-packages".split()
)


def package_meant(asked: str) -> tuple[str, str | None]:
    """Return the requirement that a text asks for, be it a whole command, and a note if it named an import instead.

    Raises:
        RequestError: it is none, or more than one.
    """
    text = asked.strip().strip(QUOTES)
    if command := INSTALL_COMMAND.match(text):
        words = [word.strip(QUOTES) for word in text[command.end() :].split() if word not in NEEDLESS_OPTIONS]
        if not any(word.startswith("-") for word in words):  # other options change what would be installed
            text = " ".join(words)
    if re.search(r"\s(-i|-f|--(extra-)?index-url|--find-links)\b", text):
        raise RequestError(
            f"{textwrap.shorten(repr(text), 80)} is not a package's name: another index is for the operator to name "
            "(package.index_url); ask for the package by its name alone."
        )
    name, requirement = parse_requirement(text)
    known = {plain_name(module): package for module, package in DISTRIBUTIONS.items()}
    package = known.get(name)
    written, rest = re.findall(r"^([\w.-]+)(.*)", requirement)[0]
    top = written.partition(".")[0]
    if not package and top != written and (top in DISTRIBUTIONS or top in WELL_KNOWN):
        package = DISTRIBUTIONS.get(top, top)
        return package + rest, f"{written} is a module of the package {package}."
    if not package or (rest and not re.fullmatch(r"[\w.-]+", package)):
        return requirement, None  # the package brings extras or versions of its own
    return package + rest, f"{written} is the name of the import; the package is called {package}."


def new_session_id() -> str:
    """Return a random id of 37 bits that is easy to copy: three short words without a meaning."""
    word = ("bdfghklmnprstv", "aeiou") * 2
    return "-".join("".join(map(secrets.choice, word)) for _ in range(3))


# ── rendering ──


@dataclass(frozen=True)
class OutputPiece:
    """Something that the code wrote or displayed: text, or an image."""

    kind: Literal["stdout", "stderr", "display"]
    content: str | types.ImageContent


# A picture in base64, by the first bytes of PNG, JPEG, GIF and WebP; often as an address of the kind `data:`.
BASE64_PICTURE = re.compile(
    r"(?:data:image/[\w.+-]{1,20};base64,)?((?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{50,}={0,2})"
)
CURSOR_MOVE = re.compile(r"\x1b\[\d*[ABJK]")
TERMINAL_TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b")
SCREEN_LINES, SCREEN_COLUMNS = 1000, 2000

Section = str | types.ImageContent | types.EmbeddedResource | types.ResourceLink
# Where a user far away gets a session's file or, for an empty path, puts one: by session and path; None if nowhere.
Address = Callable[[str, str], str | None]


def render(
    result: Result,
    *,
    new_session: bool = False,
    kept: str | None = None,
    hint: str | None = None,
    state_budget: int = STATE_BUDGET,
    address: Address = lambda *_: None,
) -> types.CallToolResult:
    """Render a result for a model.

    Args:
        result: the result, from the Runner.
        new_session: whether the server chose the session's id, for this call.
        kept: address of the resource that has the whole output, if the output is too long for a result.
        hint: what to do about a failure, see `hint_on`.
        state_budget: bytes of JSON for the variables.
        address: tells where a user far away gets files, and puts them.
    """
    pieces = within(output_pieces(result), OUTPUT_BUDGET)
    variables, missing = state_within(result, state_budget)
    background, notes = list(before(result)), list(notes_on(result, kept, hint))
    sections: list[Section] = [
        *background,
        *headline(result),
        *(labelled(pieces) or silence(result)),
        *value_section(result),
        *traceback_section(result),
        *files_section(result),
        *downloads_section(result, address),
        *state_section(variables, missing, asked=state_budget == STATE_BUDGET),
        *notes,
        *session_section(result, new_session),
        *upload_section(result, new_session, address),
        *attachments(result),
    ]
    structured = {
        "status": result.status,
        **{stream: text_of(pieces, stream) for stream in ("stdout", "stderr", "display")},
        "value": shown_value(result),
        "charts": charts(result),
        "error": error_fields(result),
        "message": result.message,
        "state": variables,
        "not_in_state": missing,
        "files": [file_fields(result, file, address) for file in result.files[:FILES_NAMED]],
        "files_left_out": files_left_out(result),
        "notes": background + notes,
        "session_id": result.session,
        "session_state": result.state,
        "seconds": round(result.wall, 3),
    }
    return answer(sections, structured, is_error=result.status not in ("ok", "running"))


def answer(sections: Sequence[Section], structured: Mapping[str, Any], is_error: bool = False) -> types.CallToolResult:
    """Build a result within clients' limits: texts joined into blocks, and the same as data, without empty fields."""
    blocks = fit(join(sections))
    words = encodable(compact({key: value for key, value in structured.items() if value not in (None, "", [])}))
    plain = all(isinstance(block, (types.TextContent, types.ResourceLink)) for block in blocks)
    fits = plain and sum(map(size_of, blocks)) + len(words.encode()) <= RESULT_LIMIT
    return types.CallToolResult(
        content=blocks,
        structured_content=json.loads(words) if fits else None,
        is_error=is_error,
    )


def failure(message: str) -> types.CallToolResult:
    """Return the result of a call that could not be made."""
    return answer([message], {"status": "failed", "message": message}, is_error=True)


# Output, in order


def output_pieces(result: Result) -> list[OutputPiece]:
    """Return everything that the code wrote and displayed, in order."""
    pieces: list[OutputPiece] = []
    for item in result.output:
        if isinstance(item, Text):
            pieces += with_pictures(item.stream, as_shown(item.text))
        elif isinstance(item, Omitted):
            pieces.append(OutputPiece("stdout", f"\n[… {item.bytes} bytes left out …]\n"))
        elif picture := image(item.forms):
            pieces.append(OutputPiece("display", picture))
        elif not item.is_value:
            pieces.append(OutputPiece("display", f"{as_shown(telling_form(item.forms))}\n"))
    return pieces


def with_pictures(stream: Literal["stdout", "stderr"], text: str) -> Iterator[OutputPiece]:
    """Split text at the pictures in it, which are written in base64."""
    end = 0
    for found in BASE64_PICTURE.finditer(text):
        if picture := image({"image/png": found[1]}):
            yield OutputPiece(stream, text[end : found.start()])
            yield OutputPiece("display", picture)
            end = found.end()
    yield OutputPiece(stream, text[end:])


def text_of(pieces: Sequence[OutputPiece], kind: str) -> str:
    """Return the text of all pieces of one kind."""
    return "".join(piece.content for piece in pieces if piece.kind == kind and isinstance(piece.content, str))


def as_shown(text: str) -> str:
    """Return text as a terminal would leave it: no colours, only a progress bar's last state. In linear time."""
    if CURSOR_MOVE.search(text):
        text = on_screen(text)
    if "\x1b" in text:
        text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(\x07|\x1b\\)|[@-Z\\^_])", "", text)
    if "\r" in text:
        lines = (line.rstrip("\r").rpartition("\r") for line in text.split("\n"))
        text = "\n".join(last.rstrip() if found else last for _, found, last in lines)  # blanks wiped what was there
    return text


def on_screen(text: str) -> str:
    """Return the lines that a terminal has at the end of text which moves its cursor, as do bars below bars."""
    lines, row, column = [""], 0, 0
    for token in TERMINAL_TOKEN.finditer(text):
        number, move = int((token[1] or "1")[:4]), token[2]  # Python refuses to parse thousands of digits
        if move == "A":
            row = max(0, row - number)
        elif move == "B":
            row = max(row, min(row + number, SCREEN_LINES))  # else a short text could ask for lines without end
        elif move == "K":
            lines[row] = lines[row][:column] if token[1] in (None, "", "0") else ""
        elif move == "J":
            del lines[row + 1 :]
            lines[row] = lines[row][:column]
        elif token[0] == "\n":
            row, column = row + 1, 0
        elif token[0] == "\r":
            column = 0
        elif not move and (written := token[0][: SCREEN_COLUMNS - column]):
            lines[row] = lines[row].ljust(column)[:column] + written + lines[row][column + len(written) :]
            column += len(written)
        lines += [""] * (row + 1 - len(lines))
    return "\n".join(line.rstrip() for line in lines)


def telling_form(forms: Mapping[str, str], plain: str = "") -> str:
    """Return the form of a value that tells a reader most: its repr, unless that is like `<… object at 0x…>`."""
    plain = plain or forms.get("text/plain", "")
    if tells(plain):
        return plain
    mimes = ("text/markdown", "text/latex", "application/json", "text/html", "image/svg+xml")
    return next((forms[mime] for mime in mimes if mime in forms), plain)


def within(pieces: Sequence[OutputPiece], budget: int) -> list[OutputPiece]:
    """Cut the pieces' text to `budget` characters, out of the middle; all images stay."""
    total = sum(len(piece.content) for piece in pieces if isinstance(piece.content, str))
    if total <= budget:
        return list(pieces)
    gap_start, gap_end = budget * 2 // 3, total - (budget - budget * 2 // 3)
    gap = f"\n[… {gap_end - gap_start} characters left out …]\n"
    kept: list[OutputPiece] = []
    start = 0
    for piece in pieces:
        if isinstance(piece.content, str):
            end = start + len(piece.content)
            head, tail = piece.content[: max(0, gap_start - start)], piece.content[max(0, gap_end - start) :]
            mark = gap if start <= gap_start < end else ""
            kept.append(OutputPiece(piece.kind, f"{head}{mark}{tail}" if end > gap_start else piece.content))
            start = end
        else:
            kept.append(piece)
    return [piece for piece in kept if piece.content]


def labelled(pieces: Sequence[OutputPiece]) -> list[Section]:
    """Turn output into sections, labelled where the stream changes; it starts as standard output."""
    sections: list[Section] = []
    text, stream = "", "stdout"
    for piece in pieces:
        if not isinstance(piece.content, str):
            sections += [text.rstrip(), piece.content]
            text = ""
            continue
        if piece.kind not in ("display", stream):
            stream = piece.kind
            text = f"{with_newline(text)}[{stream}]\n"
        text = (with_newline(text) if piece.kind == "display" else text) + piece.content
    return [section for section in (*sections, text.rstrip()) if section]


def with_newline(text: str) -> str:
    """End a text with a newline, unless it is empty."""
    return text if not text or text.endswith("\n") else f"{text}\n"


def image(forms: Mapping[str, str]) -> types.ImageContent | str | None:
    """Return the image among a value's forms, or a note on why it is left out; None if there is none."""
    for mime in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        if mime in forms:
            try:
                kind, width, height = measure(base64.b64decode(forms[mime], validate=True))
            except (binascii.Error, ValueError, struct.error, IndexError):
                return f"[{mime} left out: its data are not an image]\n"
            if max(width, height) > IMAGE_SIDE:
                return f"[image of {width} x {height} pixels left out: at most {IMAGE_SIDE} a side can be shown]\n"
            return types.ImageContent(data=forms[mime], mime_type=kind)
    return None


def measure(data: bytes) -> tuple[str, int, int]:
    """Return an image's true MIME type, width and height. Raises ValueError or struct.error if it is not an image.

    An image that the client's model can't read may cost the client the whole conversation.
    """
    kind = image_type(data)
    if kind == "image/png":
        return kind, *struct.unpack(">II", data[16:24])
    if kind == "image/gif":
        return kind, *struct.unpack("<HH", data[6:10])
    if kind == "image/jpeg":
        return kind, *measure_jpeg(data)
    if kind == "image/webp":
        return kind, *measure_webp(data)
    raise ValueError("not an image that clients can show")


def measure_jpeg(data: bytes) -> tuple[int, int]:
    """Return width and height, which are in the frame header, after any number of other segments."""
    place = 2
    while True:
        marker, length = struct.unpack(">HH", data[place : place + 4])
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return width, height
        if not 0xFF01 < marker < 0xFFFF:
            raise ValueError("not a JPEG")
        place += 2 + length


def measure_webp(data: bytes) -> tuple[int, int]:
    """Return width and height, which each of the three kinds keeps in a different place."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


# The sections


def before(result: Result) -> Iterator[str]:
    """Report what happened between the session's previous call and this one."""
    if result.lost_before:
        yield (
            f"Note: the session's variables had been lost before this call ({result.lost_before}), "
            "so it started with none."
        )
    if result.unread:
        blocks = render(result.unread).content
        text = "\n\n".join(block.text for block in blocks if isinstance(block, types.TextContent))
        yield f"The session's previous call, left running, ended so:\n{clip(text, VALUE_BUDGET)}\n(end of that)"
    if result.earlier:
        text = clip(as_shown(result.earlier), VALUE_BUDGET).rstrip()
        yield f"Written since the previous call, by what that left running:\n{text}\n(end of that)"


def headline(result: Result) -> Iterator[str]:
    """Say what went wrong, or that the code is still running."""
    error = result.exception
    if result.status == "error" and error and error.type != "SystemExit":
        where = f" on line {error.line}" if error.line else ""
        said = clip(error.message.strip().partition("\n")[0], 300)
        yield f"Failed{where}: {error.type}{f': {said}' if said else ''}"
    elif result.status == "error":
        yield f"Failed: the code exited with status {result.exit_code}."
    elif result.status == "running":
        yield (
            f"Still running: {result.message}. Call execute-persistent with this session_id and empty code to wait for "
            "more, with interrupt to stop it."
        )
    elif result.status != "ok":
        label = {"timeout": "Timed out", "out_of_memory": "Out of memory", "cancelled": "Cancelled"}.get(result.status)
        yield f"{label or 'Crashed'}: {result.message or 'the code was stopped'}."


def silence(result: Result) -> Iterator[str]:
    """Say so if a call succeeded with nothing to show: silence might be taken for a fault."""
    if result.status == "ok" and shown_value(result) is None:
        yield "(no output)"


def shown_value(result: Result) -> str | None:
    """Return the last expression's value as text; None if there is none, or if it is shown as an image."""
    value = result.value
    for item in result.output:
        if isinstance(item, Rich) and item.is_value and value is not None:
            value = None if isinstance(image(item.forms), types.ImageContent) else telling_form(item.forms, value)
    return None if value is None else clip(as_shown(value), VALUE_BUDGET)


def charts(result: Result) -> list[dict[str, Any]]:
    """Return the data of interactive figures, for programs that can draw them."""
    forms = [form for item in result.output if isinstance(item, Rich) for form in item.forms.items()]
    found = []
    for mime, form in forms:
        if mime.startswith(("application/vnd.plotly", "application/vnd.vegalite")):
            with contextlib.suppress(ValueError):  # the code may have made up the form
                found.append({"mime_type": mime, "data": json.loads(form)})
    return found


def value_section(result: Result) -> Iterator[str]:
    """Show the value of the last expression."""
    if (value := shown_value(result)) is not None:
        yield f"Value:\n{value}" if "\n" in value else f"Value: {value}"


def traceback_section(result: Result) -> Iterator[str]:
    """Show where the exception came from, if that is more than the headline says."""
    if result.exception and result.exception.type != "SystemExit":
        yield clip(result.exception.traceback.rstrip(), VALUE_BUDGET)


def error_fields(result: Result) -> dict[str, Any] | None:
    """Return the exception as structured data."""
    if (error := result.exception) is None:
        return None
    return {
        "type": error.type,
        "message": error.message,
        "line": error.line,
        "traceback": clip(error.traceback, VALUE_BUDGET),
    }


def notes_on(result: Result, kept: str | None, hint: str | None) -> Iterator[str]:
    """Say what the caller should know or do."""
    if kept:
        yield f"All of the output is kept as the resource {kept}; add ?offset=20000&length=10000 to read a part of it."
    for sentence in result.refused:
        yield f"Note: {sentence}."
    if result.oom_kills and result.status != "out_of_memory":
        yield "Note: a process that the code started was killed because memory ran out."
    if result.stale and result.session:
        yield (
            f"Note: this session had imported {', '.join(result.stale)} before another version was installed, and goes "
            "on with what it has: a fresh session has the other version."
        )
    if result.status == "ok" and result.message:
        yield f"Note: {result.message}."
    if hint:
        yield f"Hint: {hint}"


def session_section(result: Result, new_session: bool) -> Iterator[str]:
    """Name the session, and say what became of its variables."""
    if result.session is None:
        return
    words = f"Session: {result.session}"
    if result.state == "lost":
        words += " (its variables, functions and imports are lost: the next call starts without them)"
    elif result.state == "restored":
        when = f"this call and the {result.behind} before it" if result.behind else "this call"
        words += f" (restored: its variables are as they were before {when}; files are as the code left them)"
    elif new_session:
        words += f' (new; pass session_id "{result.session}" to go on in it)'
    else:
        remarks = ["new: there was no session of this name"] if result.is_new else []
        remarks += ["its variables are kept"] if result.status not in ("ok", "error", "running") else []
        words += f" ({'; '.join(remarks)})" if remarks else ""
    yield words


def state_within(result: Result, budget: int) -> tuple[Mapping[str, Any] | None, str]:
    """Return the variables to send back, the smallest if not all fit; and in words, which are missing and why."""
    if result.variables is None:
        return None, ""
    sizes = {name: len(compact({name: value}).encode("utf-8", "replace")) for name, value in result.variables.items()}
    room, fitting = budget, set()
    for name in sorted(sizes, key=sizes.__getitem__):
        room -= sizes[name]
        if room >= 0:
            fitting.add(name)
    missing = {name: f"{readable_size(size)} of JSON" for name, size in sizes.items() if name not in fitting}
    asked = budget == STATE_BUDGET
    missing |= {name: why for name, why in result.variables_left_out.items() if asked or why.startswith("too large")}
    kept = {name: value for name, value in result.variables.items() if name in fitting}
    return kept, clip("; ".join(f"{name} ({reason})" for name, reason in missing.items()), 2000)


def state_section(variables: Mapping[str, Any] | None, missing: str, *, asked: bool) -> Iterator[str]:
    """Show the variables; mention that there are none only if the caller works with them."""
    if variables or (asked and variables is not None):
        yield f"State: {compact(variables)}"
    if missing:
        yield f"Not in the state: {missing}"


def compact(value: Any) -> str:
    """Return a value as JSON in one line."""
    return json.dumps(value, ensure_ascii=False)


def readable_size(size: int) -> str:
    """Format a number of bytes for a reader."""
    for unit, limit in (("MB", 1_000_000), ("kB", 1000)):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size} bytes"


def files_section(result: Result) -> Iterator[str]:
    """List the files that the call wrote, and say where they are."""
    saved = [file for file in result.files if file.saved]
    others = [file for file in result.files if not file.saved]
    gone = [file for file in others if not result.session and file.path not in result.contents]
    there = [file for file in others if file not in gone]
    if len(saved) == 1:
        yield f"Saved for the user as {saved[0].saved} ({readable_size(saved[0].size)})"
    elif saved:
        lines = [f"{file.saved} ({readable_size(file.size)})" for file in saved[:FILES_NAMED]]
        more = [f"and {len(saved) - FILES_NAMED} more"] if len(saved) > FILES_NAMED else []
        yield "\n".join(["Saved for the user:", *lines, *more])
    if there:
        where = f", readable as resources session://{result.session}/files/PATH" if result.session else ""
        yield f"Files written{where}: {listing(there)}"
    if gone:
        yield (
            f"Files written, too large to return, and gone with the container: {listing(gone)}. To keep files, use "
            "execute-persistent."
        )
    if missing := files_left_out(result):
        yield f"Files left out: {missing}"


def downloads_section(result: Result, address: Address) -> Iterator[str]:
    """Name the addresses by which a user far away gets the files, if there are such addresses."""
    files = result.files[:DOWNLOADS_NAMED] if result.session else ()
    if places := list(filter(None, (address(str(result.session), file.path) for file in files))):
        more = f"\n({len(result.files) - len(files)} more are not named)" if len(result.files) > len(files) else ""
        yield "\n".join(["For the user to download, within an hour:", *places]) + more


def upload_section(result: Result, new_session: bool, address: Address) -> Iterator[str]:
    """Say once, with a new session, how a user far away sends files into it; and again if one was missing."""
    is_missing = result.exception is not None and result.exception.type == "FileNotFoundError"
    if result.session and (new_session or result.is_new or is_missing) and (place := address(result.session, "")):
        yield f"To send a file of the user's into the session, within an hour: curl -T FILE '{place}'"


def files_left_out(result: Result) -> str:
    """Return which files are not listed, or not saved, and why."""
    return clip("; ".join(f"{path} ({reason})" for path, reason in result.files_left_out.items()), 2000)


def attachments(result: Result) -> Iterator[Section]:
    """Attach links to a session's files, or the small files of a transient call themselves."""
    for file in result.files[: FILES_NAMED if result.session else 0]:
        yield link(str(result.session), file)
    for path, data in result.contents.items():
        yield types.EmbeddedResource(resource=resource(f"sandbox:///{urllib.parse.quote(path)}", data))


def listing(files: Sequence[FileInfo]) -> str:
    """List files by name and size."""
    words = [f"{file.path} ({readable_size(file.size)})" for file in files[:FILES_NAMED]]
    return ", ".join(words) + (f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else "")


def file_fields(result: Result, file: FileInfo, address: Address) -> dict[str, Any]:
    """Describe a file as structured data."""
    about: dict[str, Any] = {"path": file.path, "size": file.size, "type": media_type(file.path)}
    about |= {"saved_as": file.saved} if file.saved else {}
    if not result.session:
        return about
    where = address(result.session, file.path)
    about |= {"download": where} if where else {}
    return about | {"uri": session_uri(result.session, "files", file.path)}


def link(session: str, file: FileInfo) -> types.ResourceLink:
    """Return a link for reading a session's file."""
    return types.ResourceLink(
        name=file.path,
        uri=session_uri(session, "files", file.path),
        mime_type=media_type(file.path),
        size=file.size,
    )


def media_type(path: str) -> str:
    """Guess the MIME type from a file's name."""
    return mimetypes.guess_type(path)[0] or "application/octet-stream"


def session_uri(session: str, kind: Literal["files", "output"], rest: str) -> str:
    """Return the address of something that is kept for a session."""
    return f"session://{session}/{kind}/{urllib.parse.quote(rest)}"


def resource(uri: str, data: bytes) -> types.TextResourceContents | types.BlobResourceContents:
    """Return bytes as a text resource if they are text, else as a blob."""
    mime = mimetypes.guess_type(urllib.parse.urlsplit(uri).path)[0]
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode()
        if not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text):
            return types.TextResourceContents(uri=uri, mime_type=mime or "text/plain", text=text)
    blob = base64.b64encode(data).decode()
    return types.BlobResourceContents(uri=uri, mime_type=mime or "application/octet-stream", blob=blob)


def render_installation(
    installation: Installation, session: str | None, note: str | None = None
) -> types.CallToolResult:
    """Render an installation for a model; `note` is on what was asked for."""
    output = clip(as_shown(installation.output), VALUE_BUDGET).strip()
    hint = hint_on_installation(installation)
    structured = {
        "status": "ok" if installation.ok else "error",
        "message": installation.message,
        "installed": [{"name": name, "version": version} for name, version in installation.installed],
        "output": output,
        "note": note,
        "hint": hint,
        "session_id": session,
        "seconds": round(installation.seconds, 3),
    }
    sections = (f"{installation.message}.", output, note and f"Note: {note}", hint and f"Hint: {hint}")
    return answer([section for section in sections if section], structured, is_error=not installation.ok)


# The whole result


def join(sections: Sequence[Section]) -> Iterator[types.ContentBlock]:
    """Turn sections into blocks; neighbouring texts become one."""
    for is_text, group in itertools.groupby(sections, lambda section: isinstance(section, str)):
        if is_text:
            yield types.TextContent(text=encodable("\n\n".join(map(str, group))))
        else:
            yield from (section for section in group if not isinstance(section, str))


def encodable(text: str) -> str:
    """Replace lone surrogates, which UTF-8 can't carry."""
    return text.encode("utf-8", "replace").decode()


def size_of(block: types.ContentBlock) -> int:
    """Count the characters that a block takes on the wire."""
    return len(block.model_dump_json())


def fit(blocks: Iterator[types.ContentBlock]) -> list[types.ContentBlock]:
    """Return the blocks, with notes in place of the images and files for which there is no room.

    If there are too many images, the first and the last ones stay: how it began, and what came of it.
    """
    sized = [(block, size_of(block)) for block in blocks]
    room = RESULT_LIMIT - sum(size for block, size in sized if isinstance(block, types.TextContent))
    images = [place for place, (block, _) in enumerate(sized) if isinstance(block, types.ImageContent)]
    outermost = [images[each // 2 if each % 2 == 0 else -1 - each // 2] for each in range(len(images))]
    others = [place for place, (block, _) in enumerate(sized) if block.type not in ("text", "image")]
    kept = {place for place, (block, _) in enumerate(sized) if block.type == "text"}
    for place in [*outermost[:IMAGE_LIMIT], *others]:
        if sized[place][1] <= room:
            room -= sized[place][1]
            kept.add(place)
    left_out = set(images) - kept
    fitting: list[types.ContentBlock] = []
    for is_left_out, group in itertools.groupby(range(len(sized)), left_out.__contains__):
        places = list(group)
        if is_left_out:
            count = f"{len(places)} images" if len(places) > 1 else f"image of {readable_size(sized[places[0]][1])}"
            why = f"a result holds at most {IMAGE_LIMIT}" if len(images) > IMAGE_LIMIT else "a result has room for less"
            fitting.append(types.TextContent(text=f"[{count} left out: {why}]"))
            continue
        for place in places:
            block = sized[place][0]
            if place in kept:
                fitting.append(block)
            elif isinstance(block, types.EmbeddedResource):
                fitting.append(types.TextContent(text=f"[{block.resource.uri} left out: a result has room for less]"))
    return fitting


# ── hints ──
#
# What a model reads about a failure besides the facts: the next step. The table HINTS has one for each kind; the
# functions before it make those that depend on the message, the code or the configuration.

# Names that people import or ask for, whose distribution is called otherwise.
DISTRIBUTIONS = {
    "attr": "attrs", "barcode": "python-barcode", "Bio": "biopython", "bs4": "beautifulsoup4", "cairo": "pycairo",
    "community": "python-louvain", "Crypto": "pycryptodome", "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil", "decouple": "python-decouple", "discord": "discord.py", "docx": "python-docx",
    "dotenv": "python-dotenv", "faiss": "faiss-cpu", "fitz": "PyMuPDF", "gi": "PyGObject", "git": "GitPython",
    "google.generativeai": "google-generativeai", "google.protobuf": "protobuf", "jwt": "PyJWT", "ldap": "python-ldap",
    "magic": "python-magic", "mpl_toolkits": "matplotlib", "mpl_toolkits.basemap": "basemap",
    "mysql": "mysql-connector-python", "MySQLdb": "mysqlclient", "nacl": "PyNaCl", "nmap": "python-nmap",
    "odf": "odfpy", "OpenGL": "PyOpenGL", "OpenSSL": "pyOpenSSL", "osgeo": "GDAL", "PIL": "Pillow",
    "pkg_resources": "setuptools<82", "pptx": "python-pptx", "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary", "pwn": "pwntools", "pylab": "matplotlib", "pytables": "tables",
    "rest_framework": "djangorestframework", "ruamel": "ruamel.yaml", "serial": "pyserial", "shapefile": "pyshp",
    "skimage": "scikit-image", "sklearn": "scikit-learn", "slugify": "python-slugify",
    "snowflake": "snowflake-connector-python", "speech_recognition": "SpeechRecognition", "stdnum": "python-stdnum",
    "tabula": "tabula-py", "talib": "TA-Lib", "telegram": "python-telegram-bot", "umap": "umap-learn", "usb": "pyusb",
    "win32api": "pywin32", "wx": "wxPython", "Xlib": "python-xlib", "yaml": "PyYAML", "zmq": "pyzmq",
}  # fmt: skip

WELL_KNOWN = ("matplotlib", "nltk", "numpy", "pandas", "plotly", "requests", "scipy", "seaborn", "statsmodels", "sympy")
SYSTEM_PACKAGES = {  # Debian's, by the library that they have
    "libEGL": "libegl1", "libGL": "libgl1", "libMagickWand": "libmagickwand-6.q16-6", "libcairo": "libcairo2",
    "libglib-2": "libglib2.0-0", "libgobject-2": "libglib2.0-0", "libgomp": "libgomp1", "libgthread-2": "libglib2.0-0",
    "libmagic": "libmagic1", "libpango-1": "libpango-1.0-0", "libpangocairo-1": "libpangocairo-1.0-0",
    "libportaudio": "libportaudio2", "libsndfile": "libsndfile1", "libtcl8": "tk", "libtk8": "tk",
    "libusb-1": "libusb-1.0-0", "libxcb": "libxcb1", "libzbar": "libzbar0",
}  # fmt: skip
DATA_HOSTS = {  # of what libraries load by themselves: what asks for it, and where it comes from
    r"load_dataset\(": "raw.githubusercontent.com",
    r"nltk": "raw.githubusercontent.com",
    r"fetch_openml\(": "api.openml.org",
    r"fetch_\w+\(": "ndownloader.figshare.com",
    r"from_pretrained\(|huggingface": "huggingface.co",
    r"torchvision\.datasets|tensorflow_datasets|keras\.datasets": "storage.googleapis.com",
    r"yfinance|yf\.": "query1.finance.yahoo.com",
}

PROGRAMS = {  # the packages of Debian's that they are in
    "Chrome": "chromium", "chrome": "chromium, chromium-driver", "ffmpeg": "ffmpeg", "ffprobe": "ffmpeg",
    "gs": "ghostscript", "java": "default-jre-headless", "latex": "texlive-latex-extra, cm-super, dvipng",
    "node": "nodejs", "pdfinfo": "poppler-utils", "pdftoppm": "poppler-utils", "pdftotext": "poppler-utils",
    "poppler": "poppler-utils", "soffice": "libreoffice", "tesseract": "tesseract-ocr",
}  # fmt: skip
NO_PROGRAM = (  # in the words of the packages that need one
    r"requires Google (Chrome)|^(tesseract) is not installed|Is (poppler) installed|`(java)` command is not found|"
    r"No (pandoc) was found|(latex) could not be found|Bad (git) executable|obtain driver for (chrome)"
)

# Hints that are too long for a row.
NO_GRAPHICS = (
    "opencv-python needs a graphics library that this image lacks: call install-package with package_name "
    '"opencv-python-headless".'
)
NO_COMMAND = (
    "System packages can't be added from code: do without, use a Python package for it, or have the operator name them "
    "in package.system."
)
NO_LOCALE = (
    "This image has only the locales C.UTF-8 and POSIX: format numbers and dates in Python, such as f'{{x:,.2f}}', or "
    'by the package babel (install-package, package_name "babel"). The operator can add others (package.system: '
    "[locales])."
)
NO_FONT = (
    "There is no such font here: use ImageFont.load_default(size=20), or Matplotlib's own, by "
    "matplotlib.font_manager.findfont('DejaVu Sans')."
)
NO_FFMPEG = (
    "There is no ffmpeg in this image: save the animation as a GIF, by anim.save('name.gif', writer='pillow'), or have "
    "the operator add it (package.system: [ffmpeg])."
)
NO_POOL = (
    "The pool's processes could not run the code, or memory ran out: use mp_context=multiprocessing.get_context("
    '"fork"), or threads.'
)
NO_GRAPHVIZ = (
    "Graphviz's own program dot is not in this image: draw the graph with networkx (nx.draw), or have the operator add "
    "it (package.system: [graphviz])."
)
NO_SCREEN = "There is no screen here: draw with Matplotlib or Pillow, and show it with display(), or save it."
NO_FILE = "There is no file: the working directory is {docker.working_dir}; use paths relative to it."
NO_IPYTHON = "This is plain Python, not IPython: leave it out. Shell lines (!ls) and figures work without it."
DISK_FULL = "Files may take {docker.disk_limit}: remove some, or have the operator raise docker.disk_limit."
WRONG_NAME = (
    "That server's certificate is for another name than the one asked for: use the name that it is for. A name that "
    "leads to an address in this network is reached if docker.network_allow lists both."
)
UNKNOWN_AUTHORITY = (
    "That server's certificate is of an authority unknown here: the operator can name a bundle that has it "
    "(package.ca_bundle), for sandboxes started after that."
)
OUT_OF_MEMORY = "Work on less data at a time, or have the operator raise docker.memory_limit."
SYSTEM_FOLDERS = ("/bin", "/dev", "/etc", "/lib", "/opt", "/proc", "/run", "/sys", "/usr", "/var")  # the image's own

# What stands between the words of a command, in a text for a shell or in a list of texts.
_GAP = r"""(?:\s+['"]?|['"]\s*,\s*['"])"""
PIP_INSTALL = re.compile(rf"""\bpip[\d.]*{_GAP}install((?:{_GAP}[^\s'";|&()]+)+)""")
PIP_FAILED = re.compile(r"No module named pip\b|\bpip[\d.]*: (?:command )?not found|No matching distribution found for")
REQUIREMENT = r"\w[\w-]*(?:\.[\w-]+)*(?:\[[\w,-]+\])?(?:[<>=!~]=[\w.]*\w)?"
RELATIVE = r"""['"]((?![/~]|[A-Za-z]:)[^'"]*\.\w{1,8})['"]"""  # with a suffix: another may be a command
PATH = r"""((?:[/~]|[A-Za-z]:[\\/])[^'"]*)"""  # one that is not relative


@dataclass(frozen=True)
class Failure:
    """An exception of the code's, with what a hint on it may draw on."""

    error: ExceptionInfo
    code: str
    config: Config
    in_session: bool
    lacking: str | None  # why the image has not all packages


Words = str | Callable[[re.Match[str], Failure], str | None]


def hint_on(result: Result, code: str, config: Config, lacking: str | None = None) -> str | None:
    """Return what to do about a failure that has a usual cause; `lacking` says why the image has not all packages."""
    if result.status == "out_of_memory":
        return OUT_OF_MEMORY
    if result.status == "timeout":
        return "Allow it more time with `timeout`, or do less in one call."
    if (error := result.exception) is None:
        if result.status == "ok" and any(map(is_from_pip, result.output)):
            return hint_on_pip(code)
        is_system = re.search(r"\b(apt|apt-get|apk|yum|dnf|brew)\s+(-\S+\s+)*(install|add|update)\b", code)
        said = [item.text for item in result.output if isinstance(item, Text) and item.stream == "stderr"]
        return (
            NO_COMMAND if is_system and re.search(r"not found|ermission denied|are you root", "".join(said)) else None
        )
    failure = Failure(error, code, config, result.session is not None, lacking)
    for kind, message, words in HINTS:
        if re.fullmatch(kind, error.type) and (found := re.search(message, error.message)):
            if isinstance(words, str):
                return words.format(*found.groups(), docker=config.docker)
            if advice := words(found, failure):
                return advice
    return None


def is_from_pip(item: Text | Rich | Omitted) -> bool:
    """Whether this output tells that pip could not install something."""
    if not isinstance(item, Text) or item.stream != "stderr":
        return False
    return ("pip" in item.text or "No matching" in item.text) and bool(PIP_FAILED.search(item.text))


def hint_on_pip(command: str) -> str:
    """Return what to do instead of running pip, for the packages that a command line, or code with one, asks for."""
    found = PIP_INSTALL.search(command)
    words = re.findall(r"""[^\s'"]+""", re.sub(r"""['"]\s*,\s*['"]""", " ", found[1])) if found else []
    names = [word for word in words if re.fullmatch(r"\w[\w.\[\],<>=!~-]*", word)]
    asked = calls_to_install(names) if names and "-r" not in words else "call install-package, with one package a call"
    return f"pip does not work in code here: {asked}."


def calls_to_install(packages: Sequence[str]) -> str:
    """Say which calls install these packages."""
    each = ", ".join(f'package_name "{name}"' for name in packages)
    return f"call install-package {'with' if len(packages) == 1 else 'for each of them:'} {each}"


def hint_on_missing(_: re.Match[str], failure: Failure) -> str | None:
    """Return where a module that could not be imported comes from."""
    module = failure.error.missing
    if not module:
        return None
    if module in ("google", "google.cloud") and (found := re.search(r"\bgoogle\.(?:cloud\.)?\w+", failure.code)):
        module = found[0]  # the exception names but the namespace
    top = module.partition(".")[0]
    if module.startswith("google.colab"):
        folder = failure.config.docker.working_dir
        return (
            f"google.colab exists only in Google Colab: leave it out. Files go through the working directory {folder}."
        )
    if top == "pip":
        return hint_on_pip(failure.code)
    if top in sys.stdlib_module_names:
        return (
            f"{top} belongs to Python's standard library, but this image was built without it: do without it, or "
            "have the operator set docker.image to one that has it."
        )
    package = DISTRIBUTIONS.get(module) or DISTRIBUTIONS.get(top)
    called = f"; its package is called {package}" if package else ""
    if top == "google":
        top = module
    package = package or top.replace(".", "-")
    reason = f" ({failure.lacking})" if failure.lacking else ""
    return f'{top} is not installed{called}. Install it with install-package, package_name "{package}".{reason}'


def hint_on_optional(found: re.Match[str], _: Failure) -> str:
    """Return how to install a package that another one needs for this."""
    package = DISTRIBUTIONS.get(found[1], found[1])
    return f'Another package is needed: call install-package with package_name "{package}", then run this again.'


def hint_on_library(found: re.Match[str], _: Failure) -> str:
    """Return which system package a library is in, and who can add it."""
    package = next((name for library, name in SYSTEM_PACKAGES.items() if found[1].startswith(library)), None)
    return (
        f"The system library {found[1]} is missing, and can't be added from code: have the operator add Debian's "
        f"package for it (package.system: [{package or '…'}])."
    )


def hint_on_program(found: re.Match[str], failure: Failure) -> str | None:
    """Return which system package a program is in that was to be run, and who can add it."""
    name = next(filter(None, found.groups()))
    if name not in PROGRAMS and failure.error.type == "FileNotFoundError" and "subprocess" not in failure.code:
        return None  # it may be a file's name
    package = PROGRAMS.get(name, name)
    return f"{name} is not in this image: have the operator add Debian's package for it (package.system: [{package}])."


def hint_on_overwritten(_: re.Match[str], failure: Failure) -> str | None:
    """Return how to have a builtin back whose name the code has given to something else."""
    name = failure.error.missing
    return name and f"The code has put something else in the place of Python's own {name}: `del {name}` brings it back."


def hint_on_relative(found: re.Match[str], failure: Failure) -> str:
    """Return how files come into the working directory, where one is missing."""
    what_is_there = "os.listdir() tells what is there" if failure.in_session else "each call starts without any"
    taken = (
        f"Name files of the user's in `files`. {what_can_be_given(failure.config)}"
        if failure.config.files.inputs
        else "Write it first, or have the operator name a folder to take files from (files.inputs)."
    )
    return f"{found[1]} is not in the working directory ({what_is_there}). {taken}"


def hint_on_network(_: re.Match[str], failure: Failure) -> str | None:
    """Return how data gets in without a network, if there is none."""
    if not failure.config.docker.network_disabled:
        return None
    if failure.config.allowed_hosts:
        return (
            f"Code here has {what_is_reached(failure.config)} (docker.network_allow), by the proxy that the "
            "variables http_proxy and https_proxy name: use what respects them, such as urllib, pandas, requests, "
            "httpx, or aiohttp.ClientSession(trust_env=True)."
        )
    for asks, host in DATA_HOSTS.items():
        if re.search(asks, failure.code):
            return (
                f"Code here has no network, and these data are loaded from {host}: use others, such as those of "
                f"sklearn.datasets.load_iris(), or have the operator allow that host (docker.network_allow: [{host}])."
            )
    return "Code here has no network (docker.network_disabled): put the data into the code, or " + (
        "pass a file with it in `files`."
        if failure.config.files.inputs
        else "have the operator name a folder to take files from (files.inputs)."
    )


def hint_on_port(found: re.Match[str], failure: Failure) -> str | None:
    """Return how a server of the host's is reached, if code looked for it in its own sandbox."""
    named = f"localhost:{found[1]}" in failure.config.docker.network_allow
    return hint_on_network(found, failure) if named else None


def hint_on_read_only(_: re.Match[str], failure: Failure) -> str | None:
    """Return what can be written to, if not everything can."""
    docker = failure.config.docker
    return f"Only {docker.working_dir} and /tmp can be written to (docker.read_only)." if docker.read_only else None


def hint_on_path(found: re.Match[str], failure: Failure) -> str | None:
    """Return which folders code sees, if a file was looked for outside of them."""
    docker = failure.config.docker
    mounted = [split_mount(mount)[1] for mount in docker.mounts]
    known = (docker.working_dir, *WRITABLE_FOLDERS, *SYSTEM_FOLDERS, *mounted)
    if any(is_within(found[1], folder) for folder in known):
        return None
    if mounted:
        return f"Of the host, code sees only what is in {', '.join(mounted)}: name the file by its path there."
    if failure.config.files.inputs:
        taken = what_can_be_given(failure.config)
        return f"Code sees only its own working directory. Name files of the user's in `files`. {taken}"
    return (
        f"Code sees only its own working directory {docker.working_dir}: pass the data in the code"
        f"{'' if failure.in_session else ' or as `state`'}, or have the operator name a folder to take files from "
        "(files.inputs)."
    )


def hint_on_input(found: re.Match[str], failure: Failure) -> str | None:
    """Return how to get at a file that is on the host, in one of the folders whose files a call may be given."""
    with contextlib.suppress(RequestError):
        if failure.config.files.inputs:
            file = InputFile.find(found[1], failure.config.files.folders())
            return f'Pass "{found[1]}" in `files`, and open it as {file.name!r}: code sees no folders of the host.'
    return None


def hint_on_permission(found: re.Match[str], failure: Failure) -> str | None:
    """Return what to do where a mounted folder's permissions are in the way."""
    docker = failure.config.docker
    for folder in (split_mount(mount)[1] for mount in docker.mounts):
        if is_within(found[1], folder):
            saved = ", from where it is saved for the user" if failure.config.files.output else ""
            return (
                f"The sandbox's user has no permission for this in {folder}: write to "
                f"{docker.working_dir}{saved}, or have the operator chmod the folder on the host."
            )
    return None


# Each row: the exception's type, what its message matches, and the hint, in which {0} is the match's first group. A
# function may still find that its row does not fit, and return None. The first row that fits wins.
HINTS: tuple[tuple[str, str, Words], ...] = (
    (r"(?!TypeError).*", r"", hint_on_missing),
    (r"ModuleNotFoundError", r"^code can't install packages: ", lambda found, _: hint_on_pip(found.string)),
    # packages that others need: pandas 2 and 3 in their words, then what libraries say in general
    (r".*", r"Unable to find a usable engine; tried using: '([\w-]+)", hint_on_optional),
    (r".*", r"Missing optional dependency '([\w-]+)", hint_on_optional),
    (r".*", r"`Import ([\w-]+)[\w.-]*` failed", hint_on_optional),
    (r".*", r"Could not find plotting backend '([\w-]+)", hint_on_optional),
    (r".*", r"accessor requires ([\w-]+)", hint_on_optional),
    (r"CalledProcessError", r"\bpip[\d.]*['\", ]+install", lambda found, _: hint_on_pip(found.string)),
    (r"FileNotFoundError", r"directory: '(?:\S*/)?pip[\d.]*'", lambda _, failure: hint_on_pip(failure.code)),
    (r".*", rf"\b(?:pip[\d.]*|conda)\s+install\s+(?:-c\s+\w\S*\s+|-\S+\s+)*['\"`]?({REQUIREMENT})", hint_on_optional),
    (r"ImportError", r"^'?([\w-]+)'? (?:not found, please install|is not installed)", hint_on_optional),
    (r"ImportError", r"^([\w-]+)(?:[<>=!~]+[\w.]+)? is required for", hint_on_optional),
    (r"ImportError", r"\brequires '([\w-]+)' version", hint_on_optional),
    (r"ImportError", r"\bwithout ([\w-]+) installed", hint_on_optional),
    (r"ImportError", r"(?i)\bplease,? install (?:the )?['`\"]?(?!it\b|or\b|the\b|a\b|an\b)([\w-]+)", hint_on_optional),
    # what this image and plain Python lack
    (r"ImportError", r"^lib(?:GL|gthread|glib)\b.* cannot open shared object file", NO_GRAPHICS),
    (r".*", r"\b(lib[\w.+-]+)\.so\S*: cannot open shared object file", hint_on_library),
    (
        r".*",
        r"(?:cannot load library|no library called|could not find|find library) '?\"?(lib[\w+-]+)",
        hint_on_library,
    ),
    (r"FileNotFoundError", r"directory: '(?:sudo|apt|apt-get|apk|brew|yum|dnf|conda)'", NO_COMMAND),
    (r".*", NO_PROGRAM, hint_on_program),
    (r"FileNotFoundError", r"directory: '([a-z][\w+-]*)'$", hint_on_program),
    (r"Error", r"unsupported locale setting", NO_LOCALE),
    (r"OSError", r"^cannot open resource", NO_FONT),
    (r"\w*", r"DISPLAY|[Nn]o display name|cannot connect to (?:X server|display)", NO_SCREEN),
    (r"LookupError", r"NLTK Downloader", hint_on_network),
    (r"\w*ExecutableNotFound\w*|InvocationException", r"[Gg]raph[Vv]iz|\bdot\b", NO_GRAPHVIZ),
    (r"TypeError", r"object is not callable", hint_on_overwritten),
    (
        r".*",
        r"unknown file extension: \.(?:mp4|avi|mov|mkv|webm)|MovieWriter \(?'?ffmpeg'?\)? (?:not |un)avail",
        NO_FFMPEG,
    ),
    (r"NameError", r"name '__file__'", NO_FILE),
    (r"NameError", r"name 'get_ipython'", NO_IPYTHON),
    # nobody is there
    (r"BdbQuit", r"", "Nobody can answer a debugger here: print() what you need to see."),
    (r"EOFError", r"EOF when reading a line", "Nobody can answer a prompt here: put the value into the code."),
    # the walls: by error number, as exceptions' types vary
    (r".*", r"\[Errno (?:-2|-3|101)\]|Temporary failure in name resolution", hint_on_network),
    (r".*", r"(?i)hostname mismatch|ip address mismatch|certificate is not valid for", WRONG_NAME),
    (r".*", r"CERTIFICATE_VERIFY_FAILED", UNKNOWN_AUTHORITY),
    (r".*", r"\('(?:127\.0\.0\.1|::1)', (\d+)", hint_on_port),
    (r".*", r"\[Errno 30\]", hint_on_read_only),
    (r".*", r"\[Errno 28\]", DISK_FULL),
    (r"FileNotFoundError", r"No such file or directory: ['\"]?([^'\"]+)", hint_on_input),
    (r"FileNotFoundError", rf"No such file or directory: ['\"]?{PATH}", hint_on_path),
    (r"FileNotFoundError", rf"^{PATH} not found", hint_on_path),
    (r"FileNotFoundError", rf"No such file or directory: {RELATIVE}", hint_on_relative),
    (r"PermissionError", rf"\[Errno 13\][^'\"]*['\"]{PATH}", hint_on_permission),
    (r"(?:_Array)?MemoryError", r"", OUT_OF_MEMORY),
    (r"BrokenProcessPool", r"", NO_POOL),
)


def hint_on_installation(installation: Installation) -> str | None:
    """Return what to do about an installation that failed, or that an import came before."""
    if installation.stale:
        return (
            f"{', '.join(installation.stale)} had been imported before, in another version, which this session goes on "
            "using: for the new one start a fresh session, and install it there first (cleanup-session ends this one)."
        )
    if installation.needs_build:
        return "Something has no wheel for this Python. To have it built from source, set package.wheels_only: false."
    return None


# ── server ──


class Shelf:
    """Things that results pointed at, kept for reading: outputs that were too long, and lists of sessions' files."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most or OUTPUT_KEPT_ALL  # characters of output, over all sessions
        self.outputs: dict[str, tuple[str, list[str]]] = {}  # by address: session, and text in pieces; oldest first
        self.files: dict[str, dict[str, FileInfo]] = {}  # by session and path
        self._numbers = itertools.count(1)

    def add(self, result: Result, alive: Container[str]) -> str | None:
        """Remember a session's files and, if too long for a result, its output; return the output's address.

        Files of sessions that are not `alive` any more are forgotten, and of each session all but the latest ones.
        """
        assert result.session is not None
        files = self.files.setdefault(result.session, {})
        for file in result.files:
            files.pop(file.path, None)
            files[file.path] = file  # at the end: what is oldest is forgotten first
        self.files[result.session] = dict(list(files.items())[-FILES_REMEMBERED:])
        self.files = {session: files for session, files in self.files.items() if session in alive}
        pieces = [piece.content for piece in output_pieces(result) if isinstance(piece.content, str)]
        size = sum(map(len, pieces))
        if size <= OUTPUT_BUDGET:
            return None
        if size > (most := min(OUTPUT_KEPT, self.most)):
            pieces = ["".join(pieces)[:most]]
        address = session_uri(result.session, "output", str(next(self._numbers)))
        self.outputs[address] = (result.session, pieces)
        self._drop_oldest(result.session, OUTPUT_KEPT)
        self._drop_oldest(None, self.most)
        return address

    def _drop_oldest(self, session: str | None, limit: int) -> None:
        sizes = {key: sum(map(len, text)) for key, (owner, text) in self.outputs.items() if session in (None, owner)}
        total = sum(sizes.values())
        for address, size in sizes.items():
            if total > limit:
                del self.outputs[address]
                total -= size

    def clear(self, session: str) -> None:
        """Forget a session."""
        self.files.pop(session, None)
        self.outputs = {key: value for key, value in self.outputs.items() if value[0] != session}


@dataclass(frozen=True)
class Service:
    """The runner and the shelf that a caller may use, as long as the server runs."""

    runner: Runner
    shelf: Shelf = field(default_factory=Shelf)
    reporter: Reporter = field(default_factory=lambda: Reporter())
    installs_for_all: bool = True

    @contextlib.asynccontextmanager
    async def turn(self, tool: Tool, progress: Progress, version: str) -> AsyncIterator[None]:  # noqa: ARG002
        """Wait until the caller may make a call, by this version of the protocol, in the block. Raises RequestError."""
        yield  # for one user: at once

    async def told(self, tool: Tool, result: types.CallToolResult) -> types.CallToolResult:  # noqa: ARG002
        """Return the result with what else the caller should be told."""
        return result

    def address(self, session: str, path: str) -> str | None:  # noqa: ARG002  # a user on this host needs none
        """Return where a user far away gets a session's file or, for an empty path, puts one; None if nowhere."""
        return None

    async def hint_on(self, result: Result, code: str) -> str | None:
        """Return what to do about a failure of this runner's."""
        image, config = self.runner.launcher.image, self.runner.config
        lacking = image.problem if image else None
        if config.files.inputs and result.exception:  # a hint may look for a file there
            hint = await looked_up(lambda: hint_on(result, code, config, lacking), None)
        else:
            hint = hint_on(result, code, config, lacking)
        if hint and "install-package" in hint and not self.installs_for_all:
            hint += " On this server that is for one session: pass its session_id, and run the code there."
        return hint


FindService = Callable[[], Service]  # returns what the caller of the running request may use
Context = ServerRequestContext[FindService]


def make_server(runner: Runner, team: Team | None = None) -> Server[FindService]:
    """Return a server that runs code with `runner`, for one user or for a team, ready to be given a connection."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Server[FindService]) -> AsyncIterator[FindService]:
        service = Service(runner)
        async with open_tasks() as tasks:
            tasks.start_soon((team or service).reporter.run)
            yield team.caller if team else lambda: service

    everybodys = dataclasses.replace(runner.config, secrets={}) if team else runner.config
    return Server(
        "python-docker-mcp",
        version=__version__,
        title="Python in Docker",
        description="Runs Python in locked-down containers",
        instructions=instructions(everybodys),
        icons=[ICON],
        lifespan=lifespan,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        on_list_resources=list_resources,
        on_list_resource_templates=list_resource_templates,
        on_read_resource=read_resource,
    )


async def list_tools(context: Context, _: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    """List the tools, always in the same order."""
    service = context.lifespan_context()
    config = service.runner.config
    folders = f"They are taken from {' or '.join(config.files.inputs)}."
    given = await looked_up(lambda: what_can_be_given(config), folders) if config.files.inputs else ""
    tools = [describe(tool, config, given) for tool in TOOLS.values()]
    if not service.installs_for_all:
        tool = next(tool for tool in tools if tool.name == InstallPackage.name)
        tool.description = f"{tool.description} On this server only with session_id."
    return types.ListToolsResult(tools=tools)


async def call_tool(context: Context, params: types.CallToolRequestParams) -> types.CallToolResult:
    """Make a call; report a SandboxError in the result, where the model sees it."""
    try:
        service = context.lifespan_context()
        tool = parse(params.name, params.arguments or {})
        progress = Progress(context.session)
        with service.reporter.follow(progress):
            async with service.turn(tool, progress, context.protocol_version):
                result = await tool.call(service, progress)
            result = await service.told(tool, result)
    except SandboxError as error:
        return failure(str(error))
    if not takes_links(context):
        result.content = [block for block in result.content if not isinstance(block, types.ResourceLink)]
    return result


def takes_links(context: Context) -> bool:
    """Return whether a client accepts a result with links. The text of the result names their targets, too."""
    client = context.session.client_params
    if client is None:  # over HTTP, in the handshake's era, no request says which client it is from
        return False
    name = client.client_info.name.lower()
    return context.protocol_version >= LINKS_SINCE and not any(part in name for part in NO_LINKS)


class Progress:
    """Tells a client how its call is getting on: the latest output, what it waits for, or just that it is alive."""

    def __init__(self, session: ServerSession) -> None:
        self._session = session
        self._status = ""
        self._text = ""
        self._started = self._said_at = time.monotonic()
        self._said = ""
        self._count = itertools.count(1)

    async def on_output(self, item: Text | Rich | Omitted) -> None:
        """Remember a piece of output for the next report."""
        self._text = f"{self._text}{plain_text(item)}"[-1000:]

    def on_status(self, status: str) -> None:
        """Note what the call waits for."""
        self._status = status

    async def report(self) -> None:
        """Notify a client that asked for progress, if there is news or has been none for KEEP_ALIVE seconds."""
        message, now = self._latest(), time.monotonic()
        if now - self._started >= PROGRESS_INTERVAL and (message != self._said or now - self._said_at >= KEEP_ALIVE):
            self._said, self._said_at = message, now
            text = message or f"{now - self._started:.0f} seconds"
            await self._session.report_progress(next(self._count), message=text)

    def _latest(self) -> str:
        lines = as_shown(self._text).strip().splitlines()
        return encodable(lines[-1][-200:]) if lines else self._status


class Reporter:
    """Reports on all running calls from one task: a task per call would be a good part of a short call's cost."""

    def __init__(self) -> None:
        self._calls: set[Progress] = set()
        self._begun = anyio.Event()

    @contextlib.contextmanager
    def follow(self, call: Progress) -> Iterator[None]:
        """Report on a call during the block."""
        self._calls.add(call)
        self._begun.set()
        try:
            yield
        finally:
            self._calls.discard(call)

    async def run(self) -> None:
        """Report until cancelled; this costs nothing while there are no calls."""
        while True:
            await self._begun.wait()
            self._begun = anyio.Event()
            while self._calls:
                await anyio.sleep(PROGRESS_INTERVAL)
                for call in list(self._calls):
                    if call in self._calls:  # it may have ended during the report on another one
                        await self._report(call)

    async def _report(self, call: Progress) -> None:
        """Report on one call; if that fails, on that call no more: it is no reason to end the server."""
        try:
            with anyio.move_on_after(REPORT_TIMEOUT):  # a client that does not read may not hold up the others' reports
                await call.report()
        except Exception as error:
            log.debug("a progress notification failed: %r", error)
            self._calls.discard(call)


async def list_resources(context: Context, params: types.PaginatedRequestParams | None) -> types.ListResourcesResult:
    """List the outputs that are still kept, and the files that results pointed at, a page at a time."""
    service = context.lifespan_context()
    shelf, alive = service.shelf, service.runner.living()
    cursor = (params.cursor if params else None) or "0"
    if not re.fullmatch(r"[0-9]{1,9}", cursor):
        raise MCPError(types.INVALID_PARAMS, f"{clip(cursor, 100)!r} is no cursor of this list: begin without one.")
    outputs = [
        types.Resource(name=address, uri=address, mime_type="text/plain", description=f"Output in session {session}")
        for address, (session, _) in shelf.outputs.items()
    ]
    shown = [(session, file) for session in shelf.files if session in alive for file in shelf.files[session].values()]
    links = [link(session, file) for session, file in shown]
    files = [types.Resource(name=item.name, uri=item.uri, mime_type=item.mime_type, size=item.size) for item in links]
    resources, end = outputs + files, int(cursor) + RESOURCES_LISTED
    return types.ListResourcesResult(
        resources=resources[int(cursor) : end], next_cursor=str(end) if end < len(resources) else None
    )


async def list_resource_templates(
    _: Context, __: types.PaginatedRequestParams | None
) -> types.ListResourceTemplatesResult:
    """List the kinds of address that can be read."""
    files = types.ResourceTemplate(
        name="session-file",
        title="File of a session",
        uri_template="session://{session_id}/files/{+path}{?offset,length}",
        description="A file in a session's working directory; with offset and length (in bytes) a part of it.",
    )
    outputs = types.ResourceTemplate(
        name="session-output",
        title="Output of a session",
        uri_template="session://{session_id}/output/{number}{?offset,length}",
        description="All of an output that was too long for a result; with offset and length (in characters) a part.",
        mime_type="text/plain",
    )
    return types.ListResourceTemplatesResult(resource_templates=[files, outputs])


async def read_resource(context: Context, params: types.ReadResourceRequestParams) -> types.ReadResourceResult:
    """Read a session's file, or an output that is kept."""
    service = context.lifespan_context()
    try:
        address, session, kind, rest, offset, length = parse_address(params.uri)
        if kind == "output":
            if address not in service.shelf.outputs:
                raise RequestError(f"{address} is not kept any more: run the code again, and print less.")
            text = "".join(service.shelf.outputs[address][1])
            part = cut(text[offset:], length, f"{address} has {len(text)} characters")
            contents: Any = types.TextResourceContents(uri=params.uri, mime_type="text/plain", text=part)
        else:
            data = await service.runner.read_file(session, rest, offset, (length or RESOURCE_LIMIT) + 1)
            contents = resource(params.uri, cut(data, length, f"{rest} is larger than {RESOURCE_LIMIT} bytes"))
    except SandboxError as error:
        raise MCPError(types.INVALID_PARAMS, str(error), {"uri": params.uri}) from error
    return types.ReadResourceResult(contents=[contents])


def parse_address(uri: str) -> tuple[str, str, str, str, int, int | None]:
    """Split an address into itself without a range, session, kind, path, offset and length. Raises RequestError."""
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError:  # brackets that hold no IPv6 address
        parts = urllib.parse.urlsplit("")
    match = re.fullmatch(r"/(files|output)/(.+)", parts.path, re.DOTALL)
    if parts.scheme != "session" or not match:
        raise RequestError(
            "Only session://SESSION_ID/files/PATH and session://SESSION_ID/output/NUMBER can be read here."
        )
    given = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    if set(given) - {"offset", "length"} or not all(re.fullmatch(r"\d{1,15}", value) for value in given.values()):
        raise RequestError("A range is ?offset=NUMBER&length=NUMBER, both from 0.")
    length = int(given["length"]) if "length" in given else None
    if length is not None and not 0 < length <= RESOURCE_LIMIT:
        raise RequestError(f"A length of {length} can't be read at once: ask for 1 to {RESOURCE_LIMIT}.")
    session, rest = urllib.parse.unquote(parts.netloc), urllib.parse.unquote(match[2])
    if not re.fullmatch(SESSION_ID, session):
        raise RequestError(
            f"There is no session {clip(session, 100)!r}: it has ended, with its files, or never existed."
        )
    address = session_uri(session, "output" if match[1] == "output" else "files", rest)
    return address, session, match[1], rest, int(given.get("offset", 0)), length


def cut(data: Any, length: int | None, size: str) -> Any:
    """Cut data to the length asked for; without one, return all of it. Raises RequestError if that is too much."""
    if length is None and len(data) > RESOURCE_LIMIT:
        raise RequestError(f"{size}, too much for one answer: read parts of it with ?offset=0&length={RESOURCE_LIMIT}.")
    return data if length is None else data[:length]


# ── a server for a team ──
#
# Streamable HTTP, by the SDK's own application in uvicorn. Everything that one user could do to another's is decided in
# one place: a request's token names the user, and its handlers get that user's Service and no other. Nothing of the
# protocol is kept between requests, so a client goes on after a restart of the server without noticing.

PATH = "/mcp"
BODY_LIMIT = 8 << 20  # bytes of a request: code, or state of up to 4 MB, as JSON may write it
CONNECTIONS = 1000  # open connections and requests, above which new ones are answered with 503
LINK_TIME = 3600  # seconds for which the address of a file holds
DRAIN_TIME = 10.0  # seconds that transient calls get to their end when the server is stopped
CALLS_WAITING = 100  # calls of one user that wait for their turn
RESULTS_UNTOLD = 4  # results kept for one user because their connections were lost
OUTPUT_KEPT_EACH = 8 << 20  # characters of output kept for one user
TOKEN_PREFIX = "pdmcp_"  # by which a scanner for leaked secrets can know one
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOCAL = "local"  # the one user of a server without a file of tokens


class Tokens:
    """The users of a server, each with the hash of a token, in a file that is read again whenever it has changed."""

    def __init__(self, file: str) -> None:
        self.file = Path(file).expanduser()
        self._seen: tuple[int, int, int] | None = None
        self._users: dict[str, str] = {}  # by hash

    @staticmethod
    def new() -> str:
        """Return a new token, of 256 random bits."""
        return TOKEN_PREFIX + secrets.token_urlsafe(32)

    def users(self) -> dict[str, str]:
        """Return the users by the hashes of their tokens. Raises ConfigError if the file can't be used."""
        try:
            state = self.file.stat()
            seen: tuple[int, int, int] | None = (state.st_ino, state.st_size, state.st_mtime_ns)
            if seen == self._seen:
                return self._users
            if state.st_mode & 0o022:
                raise ConfigError(f"The file of tokens {self.file} can be written by others: `chmod 600 {self.file}`.")
            lines = [line.split() for line in self.file.read_text("utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            lines, seen = [], None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The file of tokens {self.file} can't be read: {error}.") from None
        for line in lines:
            if len(line) != 2 or not re.fullmatch(USER_NAME, line[0]) or not re.fullmatch("[0-9a-f]{64}", line[1]):
                raise ConfigError(f"The file of tokens {self.file} has a line that is not NAME and SHA-256.")
        self._seen, self._users = seen, {digest: name for name, digest in lines}
        return self._users

    def known(self) -> dict[str, str]:
        """Return the users as `users` does; none, with a line in the log, if the file can't be used."""
        try:
            return self.users()
        except ConfigError as error:
            log.warning("%s", error)
            return {}

    def user(self, token: str) -> str | None:
        """Return whose token this is; None if it is nobody's."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
        return next((name for each, name in self.known().items() if hmac.compare_digest(each, digest)), None)

    def write(self, users: Mapping[str, str]) -> None:
        """Replace the file, which only its owner may read."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{name} {digest}\n" for digest, name in users.items())
        descriptor, aside = tempfile.mkstemp(dir=self.file.parent, prefix=f".{self.file.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, self.file)


class MadeUpToken(Tokens):
    """One token for whoever has started the server on their own machine, who is told it."""

    def __init__(self) -> None:
        super().__init__(os.devnull)
        self.token = self.new()

    def users(self) -> dict[str, str]:
        """Return the one user."""
        return {hashlib.sha256(self.token.encode()).hexdigest(): LOCAL}


@dataclass(frozen=True, kw_only=True)
class Member(Service):
    """The service for one user of a team, with sessions, outputs, turns and addresses of files of their own."""

    user: str
    team: Team
    turns: anyio.Semaphore
    untold: dict[str, types.CallToolResult] = field(default_factory=dict)  # by session

    @contextlib.asynccontextmanager
    async def turn(self, tool: Tool, progress: Progress, version: str) -> AsyncIterator[None]:
        """Wait until few enough of the user's calls run. Raises RequestError if that takes too long.

        From 2026-07-28 on, to lose the connection is to cancel the call; before, it says nothing of what is wanted.
        """
        only_waits = isinstance(tool, ExecutePersistent) and not tool.code.strip()
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.team.under_way(shield=version in HANDSHAKE_PROTOCOL_VERSIONS))
            if not (only_waits or isinstance(tool, CleanupSession)):
                progress.on_status("waiting for other calls of yours to end")
                await stack.enter_async_context(self.own_turn())
                progress.on_status("")
            yield
        session = getattr(tool, "session_id", None) or "none"
        log.info("%s: %s, session %s: %.1f s", self.user, tool.name, session, time.monotonic() - started)

    async def told(self, tool: Tool, result: types.CallToolResult) -> types.CallToolResult:
        """Keep the result for the session's next caller if this one's connection is lost; tell what was kept so."""
        session = getattr(tool, "session_id", None)
        if session and (kept := self.untold.pop(session, None)):
            before = types.TextContent(text="The session's previous call, whose connection was lost, ended so:")
            after = types.TextContent(text="(end of that)")
            result.content = [before, *kept.content, after, *result.content]
            result.structured_content = None
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            if session:
                self.untold[session] = result
                for oldest in list(self.untold)[:-RESULTS_UNTOLD]:
                    del self.untold[oldest]
            raise
        return result

    @contextlib.asynccontextmanager
    async def own_turn(self) -> AsyncIterator[None]:
        """Take one of the user's turns for the block. Raises RequestError if none becomes free."""
        full = (
            f"{self.runner.config.http.calls_per_user} calls of yours are running, which is the most at once "
            "(http.calls_per_user): wait for one of them to end, then call again."
        )
        if self.turns.statistics().tasks_waiting >= CALLS_WAITING:
            raise RequestError(full)
        try:
            with anyio.fail_after(self.runner.config.session.answer_within):
                await self.turns.acquire()
        except TimeoutError:
            raise RequestError(full) from None
        try:
            yield
        finally:
            self.turns.release()

    def address(self, session: str, path: str) -> str:
        """Return where the user gets a session's file or, for an empty path, puts one."""
        until = int(time.time()) + LINK_TIME
        proof = self.team.proof("GET" if path else "PUT", self.user, session, path, until)
        return f"{self.team.address}/files/{self.user}/{session}/{until}/{proof}/{urllib.parse.quote(path)}"


class Team:
    """The users of a server over HTTP. It signs the addresses of their files, and knows the calls under way."""

    def __init__(self, runner: Runner, tokens: Tokens | None, address: str) -> None:
        self.runner = runner
        self.tokens = tokens  # None: whoever asks is the one user
        self.address = address
        self.reporter = Reporter()
        self.is_draining = False
        self._members: dict[str, Member] = {}
        self._key = secrets.token_bytes(32)  # so the addresses of files end with the server
        self._calls: set[anyio.CancelScope] = set()

    def member(self, user: str) -> Member:
        """Return what a user may use. Raises ConfigError if the user's folders can't be made."""
        if user not in self._members:
            http = self.runner.config.http
            try:
                runner = self.runner.for_user(user, http.sessions_per_user)
            except OSError as error:
                raise ConfigError(
                    f"The folders of {user} (files.inputs, files.output) can't be made: {error}."
                ) from None
            turns = anyio.Semaphore(http.calls_per_user)
            shelf = Shelf(OUTPUT_KEPT_EACH)
            self._members[user] = Member(runner, shelf, self.reporter, http.installs, user=user, team=self, turns=turns)
        return self._members[user]

    def caller(self) -> Member:
        """Return what the user may use whose request is being answered."""
        token = auth_context.get_access_token()
        assert token or self.tokens is None
        return self.member(token.client_id if token else LOCAL)

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return who has this token, as the SDK asks it."""
        user = self.tokens.user(token) if self.tokens else None
        return AccessToken(token="", client_id=user, scopes=[]) if user else None

    @contextlib.asynccontextmanager
    async def under_way(self, shield: bool) -> AsyncIterator[None]:
        """Count the call that is made in the block. Raises SandboxError if the server ends before the call."""
        with anyio.CancelScope(shield=shield) as scope:
            self._calls.add(scope)
            try:
                yield
            finally:
                self._calls.discard(scope)
        if scope.cancelled_caught:
            raise SandboxError("The server was restarted before the call came to its end: call again.")

    async def drain(self) -> None:
        """Have calls in sessions answered now, whose code goes on; give the others some time, then end them."""
        self.is_draining = True
        log.info("stopping: calls in sessions are answered now, others have %g seconds", DRAIN_TIME)
        with anyio.move_on_after(DRAIN_TIME):
            looks = 0  # at which there was no call: one may still be on its way
            while looks < 5:
                await self.runner.sessions.hand_over()
                await anyio.sleep(0.1)
                looks = 0 if self._calls else looks + 1
        for scope in list(self._calls):
            scope.cancel()

    # ── addresses besides the protocol's ──

    def proof(self, method: str, user: str, session: str, path: str, until: int) -> str:
        """Return what shows that an address was made here, for this method and until this time."""
        signed = "\0".join((method, user, session, path, str(until)))
        return hmac.new(self._key, signed.encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:40]

    async def health(self, _: Request) -> Response:
        """Answer whether calls can be made here, from what is known: no engine is asked."""
        failure = self.runner.launcher.failure
        problem = "stopping" if self.is_draining else str(failure) if failure else ""
        return PlainTextResponse(f"{problem or 'ok'}\n", 503 if problem else 200)

    async def files(self, request: Request) -> Response:
        """Answer with a session's file, or put one there: for whoever has an address that was signed here."""
        user, session, until, proof, path = request.path_params.values()
        method = "PUT" if request.method == "PUT" else "GET"
        expected = self.proof(method, user, session, "" if method == "PUT" else path, until)
        if not hmac.compare_digest(expected.encode(), proof.encode()):
            return PlainTextResponse("This address was not made by the server that runs now.\n", 403)
        if time.time() > until or (self.tokens and user not in self.tokens.known().values()):
            return PlainTextResponse("This address does not hold any more: ask for the file again.\n", 410)
        try:
            return await (self._put if method == "PUT" else self._get)(self.member(user), session, path, request)
        except SandboxError as error:
            return PlainTextResponse(f"{error}\n", 404 if method == "GET" else 409)

    async def _get(self, member: Member, session: str, path: str, _: Request) -> Response:
        first = await member.runner.read_file(session, path, 0, RESOURCE_LIMIT)

        async def pieces() -> AsyncIterator[bytes]:
            piece, offset = first, 0
            while piece:
                yield piece
                offset += len(piece)
                full = len(piece) == RESOURCE_LIMIT
                piece = await member.runner.read_file(session, path, offset, RESOURCE_LIMIT) if full else b""

        name = urllib.parse.quote(os.path.basename(path), errors="replace")
        headers = {
            "Content-Disposition": f"attachment; filename*=UTF-8''{name}",  # never shown as a page of this server's
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox",
            "Cache-Control": "private, no-store",
        }
        return StreamingResponse(pieces(), headers=headers, media_type=media_type(path))

    async def _put(self, member: Member, session: str, path: str, request: Request) -> Response:
        if not path or "/" in path or path.startswith(".") or len(path.encode("utf-8", "replace")) > 255:
            return PlainTextResponse("The address has to end with the name of the file: curl -T FILE adds it.\n", 400)
        most = size_in_bytes(member.runner.config.files.limit)
        size = 0
        async with member.own_turn():
            with tempfile.TemporaryDirectory(prefix="python-docker-mcp-") as folder:
                async with await anyio.open_file(f"{folder}/file", "wb") as file:
                    async for piece in request.stream():
                        size += len(piece)
                        if size > most:
                            return PlainTextResponse(f"The file has more than {most} bytes (files.limit).\n", 413)
                        await file.write(piece)
                await member.runner.write_file(session, InputFile(path, Path(folder), "file", size))
        return PlainTextResponse(f"{path} is in the working directory of the session {session}.\n", 201)


def make_app(team: Team, hosts: Sequence[str], origins: Sequence[str]) -> ASGIApp:
    """Return the ASGI application of a team's server, which answers requests for these hosts, from these origins."""
    server = make_server(team.runner, team)
    schemas = {name: tool.model_json_schema() for name, tool in TOOLS.items()}
    server.get_tool_input_schema = schemas.get  # else the SDK would list the tools for each call
    with_tokens: Any = {
        "token_verifier": team,
        # Without an address of this server's, no metadata of OAuth are published: beside them, Claude Code ignores the
        # token that it was given (github.com/anthropics/claude-code/issues/59467).
        "auth": AuthSettings(issuer_url=pydantic.AnyHttpUrl(team.address), resource_server_url=None),
    }
    app = server.streamable_http_app(
        streamable_http_path=PATH,
        stateless_http=True,
        max_request_body_size=BODY_LIMIT,
        transport_security=TransportSecuritySettings(allowed_hosts=list(hosts), allowed_origins=list(origins)),
        custom_starlette_routes=[
            Route("/health", team.health),
            Route("/files/{user}/{session}/{until:int}/{proof}/{path:path}", team.files, methods=["GET", "PUT"]),
        ],
        **(with_tokens if team.tokens else {}),
    )

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] == f"{PATH}/":
                scope = {**scope, "path": PATH}  # to redirect a client would send it past the proxy's TLS
            if found := why_refused(scope, hosts):
                status, problem = found
                allowed = {"Allow": "POST"} if status == 405 else {}
                await PlainTextResponse(f"{problem}\n", status, allowed)(scope, receive, send)
                return
        await app(scope, receive, send)

    return checked


def why_refused(scope: Scope, hosts: Sequence[str]) -> tuple[int, str] | None:
    """Return why a request is refused before anything of it is read, with the status."""
    fields: list[tuple[bytes, bytes]] = scope["headers"]
    if sum(name == b"authorization" for name, _ in fields) > 1:
        return 400, "There are two Authorization headers: send one."
    if re.search(rb"(^|&)[^=&]*token=|" + TOKEN_PREFIX.encode(), scope["query_string"]):
        return 400, "A token in an address ends up in logs: send it as the header `Authorization: Bearer TOKEN`."
    if scope["path"] != PATH and not scope["path"].startswith(("/files/", "/health")):
        return 404, f"There is nothing at {scope['path']!r} here: the endpoint is {PATH}."
    host = dict(fields).get(b"host", b"").decode("latin-1")
    if scope["path"] == PATH and not {host, re.sub(r":\d+$", ":*", host)} & set(hosts):
        log.warning("refused a request for the host %r: see http.public_url and http.hosts", host[:200])
        return 421, f"This server is not asked by the name {host!r}: its operator can add that (http.hosts)."
    if scope["path"] == PATH and scope["method"] == "GET":  # clients of the handshake's era ask for a stream
        return 405, "This server sends nothing unasked."
    return None


def listen(address: str) -> tuple[socket.socket, str, int, bool]:
    """Return a listening socket, its host and port, and whether it is one that systemd passes and keeps open.

    Raises ConfigError if there can be none.
    """
    found = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):)?(\d{1,5})", address)
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"--http: {address!r} is not HOST:PORT, such as 127.0.0.1:8700.")
    host, port = (found[1] or "127.0.0.1").strip("[]"), int(found[2])
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS"):
        door = socket.socket(fileno=3)  # see sd_listen_fds(3): it stays open while the server is restarted
        door.set_inheritable(False)
        if door.family in (socket.AF_INET, socket.AF_INET6):
            host, port = door.getsockname()[:2]
        return door, host, port, True
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        door = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"--http: {address} can't be listened on: {error.strerror or error}.") from None
    return door, host, door.getsockname()[1], False


def allow_open_files() -> None:
    """Raise the limit on open files, as far as that is allowed: a usual one is less than CONNECTIONS take."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def team_of(runner: Runner, host: str, port: int, with_tokens: bool) -> tuple[Team, ASGIApp]:
    """Return a team, and its application. Raises ConfigError if it would let in people whom it should not."""
    config = runner.config
    http, tokens = config.http, Tokens(config.http.tokens)
    is_loopback = host in LOOPBACK or host.startswith("127.")
    has_users = bool(tokens.users())
    if not is_loopback and not (with_tokens and has_users):
        raise ConfigError(
            f"--http: {host} can be reached from other machines, and there is no token: make one for each user with "
            "`python-docker-mcp token add NAME`, or listen on 127.0.0.1."
        )
    if not is_loopback and not (http.public_url or http.hosts):
        raise ConfigError(
            f"--http: {host} can be reached from other machines: say by which name (http.public_url, http.hosts), or "
            "listen on 127.0.0.1. Web pages could otherwise use the server by a name of their own."
        )
    if not with_tokens and (http.public_url or http.hosts):
        raise ConfigError("--no-token: the server has a public name (http.public_url, http.hosts), so it needs tokens.")
    if with_tokens and has_users:
        for setting, place in config.files.named():
            if "{user}" not in place:
                raise ConfigError(
                    f"{setting}: {place!r} would be everybody's: write {{user}} where a user's name goes, as in "
                    "/srv/python/{user}."
                )
        if config.pool.reuse:
            raise ConfigError("pool.reuse: one user's code would run where another's ran before: set it to false.")
    elif with_tokens:
        tokens = MadeUpToken()
    if config.secrets and not (with_tokens and has_users):
        raise ConfigError("secrets: over HTTP they belong to users who have a token, and there is none.")
    for name, secret in config.secrets.items():
        if not secret.users:
            raise ConfigError(f"secrets.{name}: say whose it is (users: [alice]), as several people use this server.")
    shown = f"[{host}]" if ":" in host else host
    address = (http.public_url or f"http://{shown}:{port}").rstrip("/")
    hosts = [*http.hosts, urllib.parse.urlsplit(address).netloc.rpartition("@")[2]]
    if is_loopback:
        hosts += [name + end for name in ("127.0.0.1", "localhost", "[::1]") for end in ("", ":*")]
    origins = [f"{scheme}://{name}" for scheme in ("http", "https") for name in hosts]
    team = Team(runner, tokens if with_tokens else None, address)
    if isinstance(tokens, MadeUpToken):
        log.info("the token, made up for this run: %s", tokens.token)
    log.info("serving %s%s", address, PATH)
    return team, make_app(team, hosts, origins)


async def serve_http(config: Config, file: str | None, address: str, with_tokens: bool) -> int:
    """Serve over HTTP until a signal; a second one ends it at once. Raises ConfigError if it should not be started."""
    door, host, port, stays_open = listen(address)
    allow_open_files()
    async with open_runner(config, warm=True, file=file, notebooks=True) as runner, open_tasks() as tasks:
        team, app = team_of(runner, host, port, with_tokens)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of proxies that ask for WebSockets
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            limit_concurrency=CONNECTIONS,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than proxies keep theirs, or they would use one that is just being closed
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(settings)
        vars(server)["capture_signals"] = contextlib.nullcontext  # signals are heeded here

        async def stop() -> None:
            for place in server.servers[0].sockets if stays_open else ():
                # Requests from now on wait for the next server. To close the listener would reset the connections that
                # asyncio has accepted, but not yet given to it (Server._attach).
                asyncio.get_running_loop().remove_reader(place)
            await team.drain()
            server.should_exit = True

        def heed(_: int) -> None:
            if team.is_draining:
                server.should_exit = server.force_exit = True
            tasks.start_soon(stop)

        async with on_signals(heed):
            await server.serve(sockets=[door])
    return 0


# ── doctor ──
#
# Find out whether the walls hold by running into them: each check evaluates an expression, made of the probe's
# functions, in a sandbox that is started and called like any other, and judges what came back.

# Ceilings for what is tried, so that an examination harms no host whose limits are high, or do not hold.
TRIED_MEMORY = 512 << 20  # bytes
TRIED_DISK = 64 << 20  # bytes in one folder; they count as memory, so a quarter of that at most
TRIED_PROCESSES = 500
TRIED_CPU = 0.5  # cores


# The probe: functions that run in the sandbox, with these modules.
PROBE_MODULES = "ctypes, errno, importlib, os, socket, time"


def refused_with(action: Callable[..., object], *arguments: Any) -> str | None:
    """Return the name of the error with which the kernel refuses an action; None if it permits it."""
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return None


def rights(process: str) -> dict[str, str]:
    """Return what the kernel says of a process's rights: its capabilities, NoNewPrivs and Seccomp."""
    with open(f"/proc/{process}/status") as file:
        fields = dict(line.strip().partition(":\t")[::2] for line in file)
    return {name: value for name, value in fields.items() if name.startswith(("Cap", "NoNewPrivs", "Seccomp"))}


def create_in(folder: str) -> str | None:
    """Return the error with which the kernel refuses a new folder in `folder`."""
    path = f"{folder}/python-docker-mcp-doctor"
    reason = refused_with(os.mkdir, path)
    if reason is None:
        os.rmdir(path)
    return reason


def writable_mounts() -> list[str]:
    """Return the mounted folders and files that code may write to, apart from the kernel's own."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split()[4].replace("\\040", " ") for line in file]
    mounts = [path for path in mounts if path.split("/")[1] not in ("proc", "sys")]
    return [path for path in mounts if (os.path.isdir(path) or os.path.isfile(path)) and os.access(path, os.W_OK)]


def network() -> list[Any]:
    """Return the interfaces and, if there is none but the loopback, how connecting and name resolution fail."""
    names = [name for _, name in socket.if_nameindex()]
    if names not in ([], ["lo"]):  # that tells enough; a connection might wait long for its answer
        return [names, None, None]
    connecting = refused_with(socket.create_connection, ("1.1.1.1", 53), 2)
    return [names, connecting, refused_with(socket.gethostbyname, "example.com")]


def answers_of_proxy(port: int, targets: list[str]) -> list[str]:
    """Return the first line of the proxy's answer to the request for a tunnel to each target."""
    lines = []
    for target in targets:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.settimeout(40)
            connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
            lines.append(connection.recv(1000).decode("latin-1").partition("\r\n")[0])
    return lines


def answer_with_secret(name: str, host: str, method: str, path: str) -> tuple[str, str, int, str]:
    """Return a secret's name and host, and the status of an answer from there, or 0, and the reason for it."""
    import urllib.request  # only here: it takes 40 ms

    try:
        request = urllib.request.Request(f"https://{host}{path}", method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return name, host, answer.status, answer.reason
    except OSError as error:
        return name, host, getattr(error, "code", 0), str(getattr(error, "reason", error))


def gpus() -> tuple[list[str], int | str, int]:
    """Return the devices of GPUs, CUDA's error (0 if there is none), and how many its driver finds."""
    devices = sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        return devices, error, count.value
    except (OSError, AttributeError) as problem:
        return devices, str(problem), 0


def open_parts_of_process_1() -> list[str]:
    """Return the parts of process 1 that code can look into; last of all, try to kill it."""
    libc = ctypes.CDLL(None)
    parts = [name for name in ("mem", "environ", "maps") if not refused_with(os.open, f"/proc/1/{name}", os.O_RDONLY)]
    parts += [] if refused_with(os.listdir, "/proc/1/fd") else ["fd"]
    if libc.ptrace(16, 1, 0, 0) == 0:  # PTRACE_ATTACH
        parts.append("ptrace")
        libc.ptrace(17, 1, 0, 0)  # PTRACE_DETACH
    return parts if refused_with(os.kill, 1, 9) else [*parts, "kill"]


def open_system_calls() -> list[str]:
    """Return the parts of the kernel that code can use, no ordinary program needs, and many escapes started from."""
    libc = ctypes.CDLL(None, use_errno=True)
    refused = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EAFNOSUPPORT)
    calls: dict[str, tuple[int, ...]] = {"io_uring": (425, 1, 0)}
    if os.uname().machine in ("x86_64", "aarch64"):
        calls["keyrings"] = ({"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 0)
    found = [name for name, call in calls.items() if libc.syscall(*call) >= 0 or ctypes.get_errno() not in refused]
    child = os.fork()
    if child == 0:
        os._exit(ctypes.get_errno() if libc.unshare(0x10000000) else 0)  # CLONE_NEWUSER
    if os.waitpid(child, 0)[1] >> 8 not in refused:
        found.append("user namespaces")
    return found if refused_with(lambda: socket.socket(40, socket.SOCK_STREAM).close()) else [*found, "vsock"]


def inotify_instances(most: int) -> int:
    """Return how many instances of inotify, of at most `most`, code can have at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken = [fd for fd in (libc.inotify_init() for _ in range(most)) if fd >= 0]
    for fd in taken:
        os.close(fd)
    return len(taken)


def spend_cpu(processes: int, seconds: float) -> float:
    """Return how many cores `processes` processes get if each wants one."""
    started = time.monotonic()
    children = []
    for _ in range(processes):
        children.append(os.fork())
        if not children[-1]:
            while time.monotonic() < started + seconds:
                pass
            os._exit(0)
    used = [os.wait4(child, 0)[2] for child in children]
    return sum(usage.ru_utime + usage.ru_stime for usage in used) / (time.monotonic() - started)


def fork_all(most: int) -> list[Any]:
    """Fork until the kernel refuses, at most `most` times; return how many children there were, and the error."""
    children: list[int] = []
    reason = None
    while reason is None and len(children) < most:
        try:
            children.append(os.fork())
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, "?")
        if children and not children[-1]:
            time.sleep(60)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return [len(children), reason]


def fill(folder: str, most: int) -> list[Any]:
    """Write to a folder until it is full, at most `most` bytes; return its name, how many there were, and the error."""
    path = f"{folder}/python-docker-mcp-doctor"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    reason, written = None, 0
    while reason is None and written < most:
        reason = refused_with(os.write, descriptor, bytes(1 << 20))
        written = os.fstat(descriptor).st_size
    os.unlink(path)
    os.close(descriptor)
    return [folder, written, reason]


def hold_memory(size: int) -> int:
    """Hold `size` bytes of memory at once."""
    return sum(map(len, [b"x" * (1 << 20) for _ in range(size >> 20)]))


def look_at(places: list[str]) -> list[Any]:
    """Return of each path whether code can read it and write to it, and how many entries it sees there."""
    seen = []
    for place in places:
        is_folder = os.path.isdir(place)
        can_read = os.access(place, os.R_OK | (os.X_OK if is_folder else 0))
        entries = len(os.listdir(place)) if is_folder and can_read else None
        seen.append([can_read, os.access(place, os.W_OK), entries])
    return seen


PROBE: tuple[Callable[..., Any], ...] = (
    look_at, refused_with, rights, create_in, writable_mounts, network, answers_of_proxy, open_parts_of_process_1,
    open_system_calls,
    inotify_instances,
    spend_cpu, fork_all, fill, hold_memory, answer_with_secret, gpus,
)  # fmt: skip


def probe_source() -> str:
    """Return the source of the probe, whose annotations are not evaluated in the sandbox."""
    return "\n".join(["from __future__ import annotations", f"import {PROBE_MODULES}", *map(inspect.getsource, PROBE)])


# The judges

Verdict = Literal["ok", "warning", "failed"]
Judgement = tuple[Verdict | bool, str] | tuple[Verdict | bool, str, str]  # with what was seen, and a remedy
REPORT = "Report it, with the output of `python-docker-mcp doctor --json`."
BUSY = "See what else this host is doing, and try again."


@dataclass(frozen=True)
class Patient:
    """The engine and the image under examination, as the engine describes them."""

    config: Config  # with limits that are safe to try
    engine: Engine
    image: Image
    version: Mapping[str, Any] = field(default_factory=dict)  # printed by the engine's command `version`
    info: Mapping[str, Any] = field(default_factory=dict)  # and by `info`
    is_hosts: bool = False  # whether the image is made from this host's Python

    @property
    def runtime(self) -> tuple[str, str]:
        """Name and version of the OCI runtime; "" for what the engine does not tell."""
        podman = (self.info.get("host") or {}).get("ociRuntime") or {}
        name = str(self.config.docker.runtime or podman.get("name") or self.info.get("DefaultRuntime") or "")
        if name and name == podman.get("name"):
            found = re.search(r"\d+\.\d+[^\s,]*", str(podman.get("version")))
            return name, found[0] if found else ""
        parts = (self.version.get("Server") or {}).get("Components") or []
        return name, next((str(part.get("Version")) for part in parts if part.get("Name") == name), "")

    @property
    def runtime_details(self) -> Mapping[str, Any]:
        """How Docker was told to start that runtime."""
        return (self.info.get("Runtimes") or {}).get(self.runtime[0]) or {}

    @property
    def is_gvisor(self) -> bool:
        """Whether sandboxes have gVisor's kernel, and not the host's."""
        return "runsc" in f"{self.runtime[0]} {self.runtime_details.get('path')}"

    @property
    def is_rootless(self) -> bool:
        """Whether the engine runs without root's rights."""
        podman = ((self.info.get("host") or {}).get("security") or {}).get("rootless")
        return bool(podman) or "name=rootless" in (self.info.get("SecurityOptions") or [])


def judge_engine(patient: Patient, *_: Any) -> Judgement:
    """Which engine it is, and whether the command line is its own."""
    engine = patient.engine
    client = str((patient.version.get("Client") or {}).get("Version") or "").lstrip("v")
    other = f", command line {client}" if client not in ("", engine.version) else ""
    cgroups = (patient.info.get("host") or {}).get("cgroupVersion") or patient.info.get("CgroupVersion") or "?"
    root = "rootless" if patient.is_rootless else "rootful"
    seen = (
        f"{engine.kind} {engine.version}{other} ({engine.command}), {root}, cgroup version {str(cgroups).lstrip('v')}"
    )
    parts = (patient.version.get("Server") or {}).get("Components") or []
    if engine.kind == "docker" and any("podman" in str(part.get("Name")).lower() for part in parts):
        return "warning", f"{seen}, talking to Podman", "Set docker.command to podman: the two need different flags."
    return "ok", seen


def judge_runtime(patient: Patient, *_: Any) -> Judgement:
    """Which program starts the containers, and its version: distributions mend holes without raising that."""
    name, version = patient.runtime
    if not name:
        remedy = f"See what `{patient.engine.kind} info` says; it should name a runtime such as runc."
        return "warning", "the engine does not say which", remedy
    if patient.is_gvisor:
        return "ok", f"{name} {version}".strip() + ": gVisor, whose kernel stands between the code and the host's"
    return "ok", f"{name} {version}".strip()


def judge_image(patient: Patient, *_: Any) -> Judgement:
    """Which image the sandboxes are made from."""
    image, wanted = patient.image, patient.config.docker.image
    seen = f"{image.name}, from " + ("this host's Python" if patient.is_hosts else wanted)
    build = "`python-docker-mcp build`"
    if image.problem:
        return "failed", seen, f"{image.problem}. Try {build}, and set package.index_url if this host has a mirror."
    if patient.is_hosts and wanted != "host":
        remedy = f"Pull or load {wanted}, then {build}; or set docker.image to `host` if that is what you want."
        return "warning", f"{seen}, in place of {wanted}", remedy
    return "ok", seen


def judge_memory(patient: Patient, result: Result, seen: Any) -> Judgement:
    """Whether a process that takes more than the limit, in memory and swap, is ended."""
    limit = megabytes(patient.config.docker.memory_limit)
    if result.status in ("out_of_memory", "died") or (result.exception and result.exception.type == "MemoryError"):
        return "ok", f"a process that took more than {limit} was ended"
    return "failed", f"a process could take {megabytes(seen)}; the limit is {limit}, memory and swap together"


def judge_disk(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether the folders that code may write to fill up."""
    limit = patient.config.docker.disk_limit
    most = size_in_bytes(limit) + (1 << 20)
    if endless := [folder for folder, size, reason in seen if reason != "ENOSPC" or size > most]:
        return "failed", f"{', '.join(endless)} took more than {megabytes(limit)}"
    return "ok", f"{', '.join(folder for folder, *_ in seen)} are full at {megabytes(limit)} each"


def judge_file_system(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether code can write to nothing but its own folders, and can't change what others import."""
    docker, (root, packages, mounts) = patient.config.docker, seen
    given = [docker.working_dir, *WRITABLE_FOLDERS]
    given += [split_mount(mount)[1] for mount in docker.mounts if mount.endswith(":rw")]
    if others := sorted({*mounts, *([] if packages == "EROFS" else [PACKAGES])} - set(given)):
        return "failed", f"{', '.join(others)} can be written"
    places = ", ".join(path for path in given if path in mounts)
    if not docker.read_only:
        seen = f"not read-only, by configuration (docker.read_only: false); {places} can be written"
        return "warning", seen, "Set docker.read_only to true."
    return ("ok", f"read-only but for {places}") if root == "EROFS" else ("failed", "the root is not read-only")


def judge_mounts(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether code can use the folders of the host that are made visible to it."""
    said, remedies = [], []
    for mount, (can_read, can_write, entries) in zip(patient.config.docker.mounts, seen, strict=True):
        place, target, mode = split_mount(mount)
        here = 0
        with contextlib.suppress(OSError):
            here = len(os.listdir(os.path.expanduser(place)))
        if not can_read:
            said.append(f"{target} can't be read")
            remedies.append(UNREADABLE.format(place))
        elif entries == 0 and here:
            said.append(f"{target} is empty, though {place} is not")
            remedies.append(ELSEWHERE)
        elif mode == ":rw" and not can_write:
            said.append(f"{target} can't be written")
            remedies.append(UNWRITABLE.format(place))
    if said:
        return "warning", "; ".join(said), " ".join(dict.fromkeys(remedies))
    shown = [split_mount(mount)[1] for mount in patient.config.docker.mounts]
    return "ok", ", ".join(shown) or "of the host, code sees nothing"


UNREADABLE = (
    "Let the sandbox's user (uid 65534) into {0}: `chmod -R o+rX {0}`, or where SELinux is in force `chcon -R -t "
    "container_file_t {0}`; or name the folder in files.inputs, which needs neither."
)
UNWRITABLE = (
    "Let the sandbox's user (uid 65534) write to {0}: `chmod o+w {0}`; or name the folder in files.output, which needs "
    "no such thing."
)
ELSEWHERE = (
    "The engine runs on another machine, or in a virtual one that does not share this folder: share it, or name it in "
    "files.inputs, which works anywhere."
)


def judge_network(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether there is nothing to reach."""
    names, connecting, resolving = seen
    shown = ", ".join(names) or "none"
    if not patient.config.docker.network_disabled:
        remedy = "Set docker.network_disabled to true, unless code has to reach the network."
        return "warning", f"open, by configuration (docker.network_disabled: false): {shown}", remedy
    if names in ([], ["lo"]) and connecting and resolving:
        return "ok", f"no interface but {shown}; connecting fails ({connecting}), so does resolving a name"
    return "failed", f"there is one: {shown}"


def judge_hosts(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether the proxy lets code reach the hosts that are allowed, and no other."""
    if not patient.config.allowed_hosts:
        return "ok", "no host is allowed (docker.network_allow)"
    forbidden, allowed = seen
    if passed := [line for line in forbidden if " 200 " in line]:
        return "failed", f"a host that is not allowed can be reached ({passed[0]})", REPORT
    about = ", by this server's own proxy, which resolves the names" if urllib.request.getproxies() else ""
    if failed := [line for line in allowed if " 200 " not in line]:
        return "warning", failed[0].partition(" ")[2], "See that this host itself can reach it."
    seen = f"{', '.join(patient.config.allowed_hosts)}{about}; others, addresses and metadata services are refused"
    return "ok", seen


def judge_gpus(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether code can use the GPUs that it may, and no others."""
    (devices, error, count), asked = seen, patient.config.docker.gpus
    if not asked:
        return not devices, f"there are {', '.join(devices)}" if devices else "code may use none (docker.gpus)", REPORT
    if error == 0 and count:
        return "ok", f"{count}, by CUDA's driver ({asked})"
    return "failed", f"none that CUDA's driver can use: {error}; devices: {', '.join(devices) or 'none'}", GPU_REMEDY


def judge_secrets(_: Patient, __: Result, seen: Any) -> Judgement:
    """Whether each host that has a secret answers, and takes the credential for good."""
    told = "; ".join(f"{name}: {host} answers {status or ''} {reason}" for name, host, status, reason in seen)
    if any(status in (0, 502) or "was refused: " in reason for _, _, status, reason in seen):
        return "warning", told, "See that this host itself can reach it, and that its certificate is in order."
    if any(status in (401, 403) for _, _, status, _ in seen):
        return "warning", told, "The credential was not accepted there, or not for the path that was tried."
    return "ok", told or "no host has one (secrets)"


def judge_root(_: Patient, __: Result, seen: Any) -> Judgement:
    """Whether the code has none of root's powers, and can't gain any."""
    users, own, first, refused = seen  # process 1 is as the engine made it; gVisor tells nothing of it
    powers = ["an id of 0"] if 0 in users else []
    powers += [f"{name} {value}" for name, value in own.items() if name.startswith("Cap") and int(value, 16)]
    powers += [name for name, reason in refused.items() if not reason]
    if {own["NoNewPrivs"], first.get("NoNewPrivs", "1")} != {"1"}:
        powers.append("rights gained by programs such as sudo")
    if powers:
        return "failed", ", ".join(powers)
    return "ok", f"no power of root's: the user is {users[0]}; {' and '.join(refused)} are refused"


def judge_system_calls(patient: Patient, _: Result, seen: Any) -> Judgement:
    """Whether the kernel's rarer parts are out of reach."""
    own, first, calls = seen
    if patient.is_gvisor:
        return "ok", "answered by gVisor's kernel, not by the host's"
    if (own["Seccomp"], first.get("Seccomp")) != ("2", "2"):  # of process 1, that is the engine's filter
        remedy = "Have the engine use its default seccomp profile; it may have been built or set up without."
        return "failed", "not filtered by the engine (seccomp)", remedy
    if calls:
        remedy = "Update the engine; where that does not help, give it a stricter seccomp profile."
        return "warning", f"filtered (seccomp), but these are open: {', '.join(calls)}", remedy
    return "ok", "filtered (seccomp); io_uring, keyrings, user namespaces and vsock are refused"


def judge_neighbours(_: Patient, __: Result, seen: Any) -> Judgement:
    """Whether there is enough for every sandbox of what the kernel counts by user."""
    user, taken = seen
    shared = (
        ", which all sandboxes with docker.mounts share" if user == NOBODY else ", which was drawn for this sandbox"
    )
    if taken < INOTIFY_WANTED:
        remedy = "Raise the limit: `sysctl fs.inotify.max_user_instances=1024`; and see which other program takes them."
        return "warning", f"of uid {user}{shared}, only {taken} inotify instances are left", remedy
    return "ok", f"its limits are those of uid {user}{shared}"


INOTIFY_WANTED = 32  # what a program that watches files needs, and some more


def judge_process_1(patient: Patient, result: Result, seen: Any) -> Judgement:
    """Whether code can neither look into nor end the process that speaks for the sandbox."""
    parts = ", ".join(seen if result.status == "ok" else ["kill"])
    if parts and patient.is_gvisor:
        remedy = (
            "gVisor does not keep processes of one user apart: hostile code can speak for its sandbox, perhaps end it. "
            "Don't trust what a session says after such code ran in it; other sandboxes are not concerned."
        )
        return "warning", f"code gets at its {parts}", remedy
    return (
        ("failed", f"code gets at its {parts}", REPORT) if parts else ("ok", "can't be read, traced or killed by code")
    )


@dataclass(frozen=True)
class Check:
    """One promise about sandboxes, and how to find out whether it is kept."""

    name: str
    expression: str  # evaluated in the sandbox, with values from the configuration in the place of {names}
    judge: Callable[[Patient, Result, Any], Judgement]  # of the call's result, and the expression's value
    flag: str = ""  # by which the engine is told to keep it
    timeout: float = 60.0  # seconds


CHECKS = (
    Check("engine", "", judge_engine),
    Check("runtime", "", judge_runtime),
    Check("image", "", judge_image),
    Check("imports", "len([importlib.import_module(name) for name in {modules}])", lambda patient, result, _: (
        result.status == "ok",
        ", ".join(patient.config.package.preinstalled) + ("" if result.status == "ok" else f": {why_not(result)}"),
        BUSY if result.status == "timeout" else patient.image.problem or "Run `python-docker-mcp build`.",
    ), timeout=120),
    Check("memory", "hold_memory({docker.memory_limit} * 5 // 4)", judge_memory, "--memory and --memory-swap"),
    Check("CPU", "spend_cpu(2, 0.6)", lambda patient, _, cores: (
        cores <= patient.config.docker.cpu_limit * 1.3 + 0.05,
        f"of {patient.config.docker.cpu_limit:g} cores, processes that want more got {cores:.2f}",
    ), "--cpus"),
    Check("processes", "fork_all({docker.pids_limit} + 50)", lambda patient, _, seen: (
        seen[1] == "EAGAIN" and seen[0] < patient.config.docker.pids_limit,
        f"{seen[0]} children, then {seen[1] or 'no end'}; the limit is {patient.config.docker.pids_limit} in all",
    ), "--pids-limit"),
    Check("disk", "[fill(folder, {docker.disk_limit} + (2 << 20)) for folder in {folders}]", judge_disk,
          "--tmpfs and --shm-size"),
    Check("file system", "(create_in('/'), create_in({packages}), writable_mounts())", judge_file_system,
          "--read-only, --tmpfs and --mount=…,ro"),
    Check("mounts", "look_at({mounts})", judge_mounts),
    Check("network", "network()", judge_network, "--network=none"),
    Check("allowed hosts", "[answers_of_proxy({port}, targets) for targets in {targets}]", judge_hosts),
    Check("GPUs", "gpus()", judge_gpus, "--gpus, or Podman's --device"),
    Check("secrets", "[answer_with_secret(*one) for one in {asked}]", judge_secrets, timeout=120),
    Check("root", "([*os.getresuid(), *os.getresgid(), *os.getgroups()], rights('self'), rights('1'), "
          "{{'setuid': refused_with(os.setuid, 0), 'chroot': refused_with(os.chroot, '/')}})",
          judge_root, "--user, --cap-drop=ALL and --security-opt=no-new-privileges"),
    Check("system calls", "(rights('self'), rights('1'), open_system_calls())", judge_system_calls),
    Check("neighbours", f"(os.getuid(), inotify_instances({INOTIFY_WANTED}))", judge_neighbours),
    Check("process 1", "open_parts_of_process_1()", judge_process_1),
    Check("environment", "[name for name in os.environ if name.lower().endswith('_proxy') and os.environ[name] and "
          "not ({hosts} and name.lower() in ('http_proxy', 'https_proxy', 'no_proxy'))]",
          lambda _, __, proxies: (not proxies, ", ".join(proxies) or "no proxies",
          "See the engine's settings for containers (Docker: ~/.docker/config.json, Podman: containers.conf).")),
)  # fmt: skip


def judge(check: Check, patient: Patient, result: Result) -> Finding:
    """Judge the result of an attempt. What can't be seen to hold counts as failed."""
    remedy = ["Look at what the other checks say, then try again; if it stays, report it."]
    try:
        judgement, seen, *advice = check.judge(patient, result, (result.variables or {}).get("seen"))
        verdict: Verdict = judgement if isinstance(judgement, str) else "ok" if judgement else "failed"
        remedy = [""] if verdict == "ok" else advice or [unkept(patient, check.flag)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # what a sandbox says is not to be believed
        verdict, seen = "failed", f"the probe's answer makes no sense ({type(error).__name__}: {error})"
        if result.status != "ok":
            seen = f"the attempt ended with {result.status} ({why_not(result)})"
    if result.status == "out_of_memory" and verdict != "ok":
        limit = megabytes(patient.config.docker.memory_limit)
        remedy = [f"Raise docker.memory_limit: {limit} are not enough for what was tried."]
    return Finding(check.name, verdict, one_line(seen), one_line(remedy[0]))


def why_not(result: Result) -> str:
    """Return what kept an attempt from its end."""
    return result.exception.message if result.exception else result.message or result.status


def unkept(patient: Patient, flag: str) -> str:
    """Return what to do if the engine was given a flag and does not keep to it."""
    by_cgroup = flag in ("--memory and --memory-swap", "--cpus", "--pids-limit")
    if by_cgroup and "--ignore-cgroups" in (patient.runtime_details.get("runtimeArgs") or []):
        return (
            "As gVisor is set up here these limits have no effect: remove --ignore-cgroups from the runtimeArgs of "
            f"{patient.runtime[0]} in /etc/docker/daemon.json, and restart Docker."
        )
    if by_cgroup and patient.is_rootless:
        return CGROUP_REMEDY
    if patient.is_gvisor:
        return f"This gVisor does not keep to {flag}: update it, and see https://gvisor.dev/docs for what it supports."
    return (
        f"The engine was given {flag} and does not keep to it: look for warnings in `{patient.engine.kind} info`, "
        "update it, and until then run no code on it that you don't trust."
    )


def one_line(text: str) -> str:
    """Return text that may have come from a sandbox, fit to be shown on a terminal."""
    return textwrap.shorten("".join(char if char.isprintable() else " " for char in text), 1000, placeholder=" …")


def megabytes(size: str | float) -> str:
    """Return a size as people read it."""
    return f"{(size_in_bytes(size) if isinstance(size, str) else size) / (1 << 20):.4g} MB"


# The examination


@dataclass(frozen=True)
class Finding:
    """The doctor's word on one check."""

    check: str
    verdict: Verdict
    seen: str
    remedy: str = ""


async def examine(config: Config) -> list[Finding]:
    """Try what is promised of a sandbox, in one with the configured limits, and judge what came of it.

    Where there is no engine, no image or no sandbox to be had, that is the last finding.
    """
    soon = SessionConfig(idle_timeout=60)  # for a session whose program is killed
    config = dataclasses.replace(config, session=soon, docker=within_trial(config.docker))
    config = dataclasses.replace(config, allowed_modules=(), blocked_modules=())  # no wall, and in the probe's way
    everybodys = {name: dataclasses.replace(secret, users=()) for name, secret in config.secrets.items()}
    config = dataclasses.replace(config, secrets=everybodys)
    session = f"doctor-{secrets.token_hex(8)}"
    findings: list[Finding] = []
    async with runner_until_signal(config, show_status) as runner:
        try:
            where = "engine"
            await runner.launcher.find_engine()
            where = "image"
            patient = await describe_engine(config, *await runner.launcher.prepare())
            findings = [judge(check, patient, Result("ok")) for check in CHECKS[:3]]
            where = "start-up"
            await runner.execute("0", session=session)
            show_status("trying limits and walls, which takes some seconds")
            for check in CHECKS[3:]:
                findings.append(judge(check, patient, await attempt(check, runner, session)))
        except SandboxError as error:
            findings.append(Finding(where, "failed", "there is none that can be used", one_line(str(error))))
        finally:
            show_status("")
            with anyio.CancelScope(shield=True), contextlib.suppress(SandboxError):
                await runner.close_session(session)
    return findings


def within_trial(docker: DockerConfig) -> DockerConfig:
    """Lower limits to what can be tried: whether the engine keeps to one does not depend on its value."""
    memory = min(size_in_bytes(docker.memory_limit), TRIED_MEMORY)
    return dataclasses.replace(
        docker,
        memory_limit=str(memory),
        disk_limit=str(min(size_in_bytes(docker.disk_limit), TRIED_DISK, memory // 4)),
        pids_limit=min(docker.pids_limit, TRIED_PROCESSES),
        cpu_limit=min(docker.cpu_limit, TRIED_CPU),
    )


async def describe_engine(config: Config, engine: Engine, image: Image) -> Patient:
    """Ask the engine about itself, its runtime and the image."""

    async def ask(command: str) -> dict[str, Any]:
        with contextlib.suppress(EngineError, ValueError, RecursionError):
            answer = json.loads(await engine.run(command, "--format={{json .}}"))
            return answer if isinstance(answer, dict) else {}
        return {}

    base = await engine.inspect("image", image.name, f'{{{{index .Config.Labels "{BASE_LABEL}"}}}}')
    hosts = await engine.inspect("image", host_image_name(), "{{.Id}}")
    is_hosts = hosts is not None and hosts in (base, image.id)
    return Patient(config, engine, image, await ask("version"), await ask("info"), is_hosts)


async def attempt(check: Check, runner: Runner, session: str | None) -> Result:
    """Evaluate a check's expression in the session's sandbox, or in a fresh one."""
    if not check.expression:
        return Result("ok")
    names = {
        "docker": runner.config.docker,
        "modules": [import_name(requirement) for requirement in runner.config.package.preinstalled],
        "folders": [*dict.fromkeys(("/tmp", runner.config.docker.working_dir, "/dev/shm"))],
        "packages": repr(PACKAGES),
        "port": PROXY_PORT,
        "targets": proxy_targets(runner.config),
        "hosts": runner.config.allowed_hosts,
        "asked": what_secrets_are_asked(runner.config),
        "mounts": [split_mount(mount)[1] for mount in runner.config.docker.mounts],
    }
    code = f"{probe_source()}\nseen = {check.expression.format(**names)}"
    try:
        return await runner.execute(code, session=session, state={}, timeout=check.timeout)
    except SandboxError as error:
        return Result("died", message=str(error))


def proxy_targets(config: Config) -> list[list[str]]:
    """Return what to ask the proxy for: places that are not allowed, and one that is, if a host is named."""
    if not config.allowed_hosts:
        return []
    forbidden = {"169.254.169.254:80", "not-allowed.invalid:443"} - set(config.allowed_hosts)
    named = [host for host in config.docker.network_allow if "*" not in host][:1]
    return [sorted(forbidden), [host if re.search(r":\d+$", host) else f"{host}:443" for host in named]]


def what_secrets_are_asked(config: Config) -> list[tuple[str, str, str, str]]:
    """Return for each secret its name, its host, and a request that it is for."""
    asked = []
    for name, secret in config.secrets.items():
        method = "GET" if not secret.methods or "GET" in secret.methods else secret.methods[0]
        path = secret.paths[0].replace("*", "") if secret.paths else "/"
        asked.append((name, secret.host, method, path))
    return asked


def import_name(requirement: str) -> str:
    """Return the module to import of a distribution."""
    name = re.split(r"[\[<>=!~]", parse_requirement(requirement)[1])[0]
    known = {distribution.lower(): module for module, distribution in DISTRIBUTIONS.items()} | {
        "matplotlib": "matplotlib"
    }
    return known.get(name.lower(), name.replace("-", "_"))


# ── program ──

EXAMPLES = """\
examples:
  python-docker-mcp                               serve; a client does that
  python-docker-mcp serve --http 127.0.0.1:8700   serve over HTTP, also for several users
  python-docker-mcp token add alice               make a user's token, and print it; `token list`, `token remove alice`
  python-docker-mcp doctor                        try whether engine, image, limits and isolation are as they should be
  python-docker-mcp build                         make the image ahead of the first call, and print its name
  python-docker-mcp install 'polars>=1,<2'        install a package for every sandbox; --session NAME for one session
  python-docker-mcp ps                            list the sandboxes on this host
  python-docker-mcp export work                   save what a session did as the notebook work.ipynb
  python-docker-mcp rm work                       end a session, with all that it keeps

The exit status is 0 if all went well, 1 if a check failed, a package could not be installed or a session was not there,
125 if there is no engine, image or sandbox to be had, 2 if a setting or an argument is wrong."""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve on standard input and output until the client or a signal ends it; or run an operator's command."""
    options = _parser().parse_args(argv)
    if options.command and not (options.command is _serve_http and options.http is None):
        run_to_exit("python-docker-mcp", functools.partial(options.command, options))
    set_up_logging("python-docker-mcp: %(message)s", logging.INFO)
    try:
        config = load_config(options.config, look=False)  # nothing that may take long comes before the handshake
        require_secrets(config)
    except ConfigError as error:
        print(f"python-docker-mcp: {error}", file=sys.stderr)
        sys.exit(2)
    anyio.run(_serve, config, options.config)
    sys.stderr.flush()
    os._exit(0)  # a thread may still wait for a folder on a drive that has gone


def _parser() -> argparse.ArgumentParser:
    form: Any = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python-docker-mcp",
        description="An MCP server that runs Python in locked-down containers. It speaks MCP on standard input and "
        "output:\nclients start it. Its commands are for the people who look after it.",
        epilog=EXAMPLES,
        **form,
    )
    parser.set_defaults(command=None, config=None)
    parser.add_argument("--version", action="version", version=f"python-docker-mcp {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (command, about) in COMMANDS.items():
        one = commands.add_parser(name, help=about, description=about, **form)
        one.set_defaults(command=command)
        if name == "install":
            one.add_argument("requirement", metavar="PACKAGE", help="such as requests or 'pandas[excel]>=2,<3'")
            one.add_argument("--session", metavar="NAME", help="only for this session")
        if name == "export":
            one.add_argument("name", metavar="NAME", help="a session, also one that has ended")
            one.add_argument("file", nargs="?", metavar="FILE", help="the notebook; by default NAME.ipynb")
        if name == "rm":
            one.add_argument("sessions", nargs="+", metavar="NAME", help="a session; `ps` lists them")
        if name == "serve":
            one.add_argument(
                "--http", metavar="HOST:PORT", help="over HTTP, at /mcp; else on standard input and output"
            )
            one.add_argument("--no-token", action="store_true", help="for whoever asks, which has to be on this host")
        if name == "token":
            one.add_argument("action", choices=("add", "list", "remove"))
            one.add_argument("user", nargs="?", help="letters, digits, and . _ @ - after the first")
        if name in ("doctor", "ps"):
            one.add_argument("--json", action="store_true", help="print JSON")
    for one in (parser, *commands.choices.values()):
        # No default here: the one of a command would win over what was given ahead of it.
        one.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
    return parser


async def _doctor(options: argparse.Namespace) -> int:
    """Print the findings of an examination; exit status 1 if one of them is a failure."""
    started = time.monotonic()
    config = load_config(options.config)
    require_secrets(config)
    findings = await examine(config)
    seconds = time.monotonic() - started
    count = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in get_args(Verdict)}
    if options.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"checks": checks, "count": count, "seconds": round(seconds, 1)}, indent=2))
    else:
        _print_findings(findings)
        told = f"{count['ok']} ok, {count['warning']} with a warning, {count['failed']} failed"
        print(f"\nchecked in {seconds:.1f} s: {told}")
    if findings[-1].check != CHECKS[-1].name:
        return 125
    return 1 if count["failed"] else 0


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print a table, then what to do about what is not well in it."""
    print_table(("CHECK", "VERDICT", "SEEN"), [(one.check, one.verdict, one.seen) for one in findings])
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for remedy in dict.fromkeys(one.remedy for one in findings if one.remedy):
        about = ", ".join(one.check for one in findings if one.remedy == remedy)
        print()
        print(textwrap.fill(f"{about}: {remedy}", width, subsequent_indent="  ", break_on_hyphens=False))


async def _build(options: argparse.Namespace) -> int:
    """Make the image ahead of time, and print its name."""
    async with runner_until_signal(load_config(options.config), show_status) as runner:
        _, image = await runner.launcher.prepare()
    if image.problem:
        why = image.problem.rstrip(".")
        raise ImageError(f"{why}. See package.index_url, package.network and package.ca_bundle in the configuration.")
    print(image.name)
    return 0


async def _install(options: argparse.Namespace) -> int:
    """Install a package for a session, or for every later execution."""
    async with runner_until_signal(load_config(options.config), show_status) as runner:
        requirement, note = package_meant(options.requirement)
        installation = await runner.install(requirement, session=options.session)
    stream = sys.stdout if installation.ok else sys.stderr
    for text in filter(None, (installation.message, installation.output, note, hint_on_installation(installation))):
        print(text, file=stream)
    return 0 if installation.ok else 1


async def _list(options: argparse.Namespace) -> int:
    """Print the sandboxes on this engine."""
    async with runner_until_signal(load_config(options.config)) as runner:
        sandboxes = await runner.launcher.list_sandboxes()
    if options.json:
        print(json.dumps([dataclasses.asdict(sandbox) for sandbox in sandboxes], indent=2))
        return 0
    rows = []
    for info in sandboxes:
        if not info.answers:
            state = "does not answer" if info.is_known else "of another version"
            rows.append(("?", state, "?", "?", "?", "?", info.name))
            continue
        state = ("busy" if info.busy else "idle") + (", in use" if info.attached else "")
        owner = f"pid {info.owner.rpartition('-')[2]}" if info.attached else "-"
        memory = f"{info.memory / 1048576:.0f} MB" if info.memory else "?"
        rows.append((info.session or "-", state, owner, duration(info.age), duration(info.idle), memory, info.name))
    print_table(("SESSION", "STATE", "OWNER", "AGE", "IDLE", "MEMORY", "CONTAINER"), rows)
    return 0


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, in columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    for length, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} {seconds % length // smaller:.0f} {part}"
    return f"{seconds:.0f} s"


async def _serve_http(options: argparse.Namespace) -> int:
    """Serve over HTTP until a signal."""
    config = load_config(options.config)
    require_secrets(config)
    return await serve_http(config, options.config, options.http, not options.no_token)


async def _token(options: argparse.Namespace) -> int:
    """Add a user, whose token is printed and kept nowhere; or list or remove them; exit status 1 if that fails."""
    tokens = Tokens(load_config(options.config).http.tokens)
    users, user = dict(tokens.users()), options.user
    if options.action == "list":
        print("".join(f"{name}\n" for name in sorted(users.values())), end="")
        return 0
    if not user or not re.fullmatch(USER_NAME, user):
        raise RequestError(
            f"{user or ''!r} can't be a user's name: use 1 to 64 lower-case letters and digits, and . _ @ - after the "
            "first."
        )
    if (user in users.values()) == (options.action == "add"):
        there = (
            "has a token already: remove that first" if user in users.values() else "is no user: `token list` has all"
        )
        print(f"python-docker-mcp: {user} {there}", file=sys.stderr)
        return 1
    if options.action == "remove":
        tokens.write({digest: name for digest, name in users.items() if name != user})
        return 0
    token = tokens.new()
    tokens.write({**users, hashlib.sha256(token.encode()).hexdigest(): user})
    print(token)
    return 0


async def _remove(options: argparse.Namespace) -> int:
    """End sessions; exit status 1 if one of them was not there."""
    missing = 0
    async with runner_until_signal(load_config(options.config)) as runner:
        for name in options.sessions:
            user, session = split_key(name)
            if not await (runner.for_user(user, 1) if user else runner).close_session(session):
                missing = 1
                print(f"python-docker-mcp: there is no session {name!r}: `ps` lists those there are", file=sys.stderr)
    return missing


async def _export(options: argparse.Namespace) -> int:
    """Save the notebook of a session; exit status 1 if there is none."""
    user, session = split_key(options.name)
    files = load_config(options.config).files
    place = NotebookPlace.find(files.for_user(user) if user else files, user, session)
    if not (cells := place.read()):
        why = ": files.notebook is false" if files.notebook is False else ""
        print(f"python-docker-mcp: nothing is kept of a session {options.name!r}{why}", file=sys.stderr)
        return 1
    target = Path(options.file or f"{options.name}.ipynb")
    try:
        NotebookPlace(OutputFolder(target.parent), target.name).write(cells)
    except OSError as error:
        print(f"python-docker-mcp: {target} can't be written: {error.strerror}", file=sys.stderr)
        return 1
    print(target)
    return 0


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Awaitable[int]], str]] = {
    "serve": (_serve_http, "Serve, on standard input and output, or over HTTP."),
    "token": (_token, "Add, list and remove the users of a server over HTTP, each with a token."),
    "doctor": (_doctor, "Try whether engine, image, limits and isolation are as they should be."),
    "build": (_build, "Make the image ahead of the first call, and print its name."),
    "install": (_install, "Install a package for the sandboxes, or for one session."),
    "ps": (_list, "List the sandboxes on this host."),
    "export": (_export, "Save what a session did as a notebook."),
    "rm": (_remove, "End sessions, with all that they keep."),
}


class Inbox(anyio.AsyncFile[str]):
    """Standard input without the lines that the SDK can't parse: it drops them, and the client would wait for ever.

    The inbox answers each such line itself, with the request's id if that can be read. The rest of this process finds
    nothing on descriptor 0.
    """

    outbox: MemoryObjectSendStream[SessionMessage]

    def __init__(self) -> None:
        descriptor = os.dup(sys.stdin.fileno())
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), sys.stdin.fileno())
        super().__init__(os.fdopen(descriptor, encoding="utf-8", errors="replace", closefd=False))

    async def __aiter__(self) -> AsyncIterator[str]:
        async for line in super().__aiter__():
            try:
                types.jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValueError as error:
                for answer in answers_to(line, error):
                    await self.outbox.send(SessionMessage(types.JSONRPCError.model_validate(answer)))
            else:
                yield line


def answers_to(line: str, error: ValueError) -> Iterator[dict[str, Any]]:
    """Yield the errors that answer a line that is not a JSON-RPC 2.0 message, one for each request in it."""
    said = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else str(error)
    code, reason = types.PARSE_ERROR, clip(encodable(said), 200)
    try:
        found = json.loads(line)
        if "surrogate" not in reason:  # lone surrogates, which Python's parser accepts
            code, reason = types.INVALID_REQUEST, 'it is not a request such as {"jsonrpc": "2.0", "id": 1, "method": …}'
    except (ValueError, RecursionError):
        near = re.match(rf"\s*{{[^{{\[]*?{REQUEST_ID}", line) or re.search(
            rf"[}}\]][^}}\]]*?{REQUEST_ID}[^}}\]]*}}\s*$", line
        )
        found = {"id": json.loads(near[1])} if near else {"id": None} if line.strip() else []
    for request in found if isinstance(found, list) else [found]:
        fields = request if isinstance(request, dict) else {}
        is_notification = "method" in fields and "id" not in fields
        if is_notification or {"result", "error"} & set(fields):
            continue  # no client waits for an answer to these
        number = fields.get("id")
        yield {
            "jsonrpc": "2.0",
            "id": number if type(number) in (str, int) else None,
            "error": {"code": code, "message": f"The message was refused: {reason}. Send it again, corrected."},
        }


REQUEST_ID = r'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,18})'  # the id, in a line that is not JSON


async def _serve(config: Config, file: str | None = None) -> None:
    received: list[int] = []
    inbox = Inbox()
    try:
        async with stdio_server(inbox) as (reader, writer):
            inbox.outbox = writer
            # A signal cancels `tasks`, not the runner: calls still need the runner to interrupt their code.
            open_one = open_runner(config, warm=True, file=file, notebooks=True)
            async with open_one as runner, open_tasks() as tasks:
                if sys.platform != "win32":  # on Windows, EOF is the only orderly end
                    tasks.start_soon(_watch_signals, tasks.cancel_scope, received)
                server = make_server(runner)
                await server.run(reader, writer, server.create_initialization_options())
            if received:
                # Leaving the block would wait for standard input, which the client may keep open.
                sys.stderr.flush()
                os._exit(128 + received[0])
    except* ConnectionError:
        log.debug("the client has gone")


async def _watch_signals(scope: anyio.CancelScope, received: list[int]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            received.append(number)
            scope.cancel()


if __name__ == "__main__":
    main()
