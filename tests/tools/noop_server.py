"""The least MCP server that the SDK makes, with one tool that does nothing: what any server costs."""

from __future__ import annotations

from typing import Any

import anyio
import mcp_types as types
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server

Context = ServerRequestContext[dict[str, Any]]


async def list_tools(_: Context, __: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    """The one tool there is."""
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    return types.ListToolsResult(tools=[types.Tool(name="noop", description="Does nothing", input_schema=schema)])


async def call_tool(_: Context, __: types.CallToolRequestParams) -> types.CallToolResult:
    """Nothing."""
    return types.CallToolResult(content=[types.TextContent(text="done")])


async def serve() -> None:
    """Serve on standard input and output until they close."""
    server: Server[dict[str, Any]] = Server("noop", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (reader, writer):
        await server.run(reader, writer, server.create_initialization_options())


if __name__ == "__main__":
    anyio.run(serve)
