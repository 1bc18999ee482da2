"""Makes the README's picture: a real conversation with the server, over standard streams, drawn in a sandbox.

    python -m tests.tools.picture docker

The question is made up; the calls, the results and the plot in them are what the server answered.
"""

import base64
import inspect
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import mcp_types as types
import yaml
from mcp import Client, StdioServerParameters

ROOT = Path(__file__).parents[2]
QUESTION = "In /data is four years of Seattle's weather. When is it wet there, and when is it warm?"
STEPS = [
    """\
import pandas as pd

days = pd.read_csv("/data/seattle-weather.csv", parse_dates=["date"])
days[["precipitation", "temp_max", "temp_min"]].describe().round(1).loc[["mean", "min", "max"]]""",
    """\
months = days.groupby(days["date"].dt.month)
rain = months["precipitation"].sum() / 4

axes = rain.plot.bar(color="lightsteelblue", figsize=(8, 3.2), rot=0)
axes.set_ylabel("rain, mm a month")
warmth = axes.twinx()
warmth.plot(months["temp_max"].mean().values, color="firebrick", marker="o")
warmth.set_ylabel("mean daily high, °C")
axes.set_title("Seattle, 2012 to 2015")
f"wettest: {list(rain.nlargest(3).index)}, driest: {list(rain.nsmallest(3).index)}\"""",
]


async def converse(client: Client) -> list[tuple[str, str, str]]:
    """The conversation: who speaks, whether it is text, code or an image, and what it is."""
    told = [("you", "text", QUESTION)]
    session: dict[str, str] = {}
    for step in STEPS:
        result = await client.call_tool("execute-persistent", {"code": step, **session})
        assert not result.is_error, result
        about = f', session_id="{session["session_id"]}"' if session else ""
        told.append((f"agent  →  execute-persistent(code{about})", "code", step))
        speaker = "result"
        for block in result.content:
            if isinstance(block, types.ImageContent):
                told.append((speaker, "image", block.data))
            elif isinstance(block, types.TextContent):
                told.append((speaker, "text", block.text))
                session = session or {"session_id": block.text.partition("Session: ")[2].partition(" ")[0]}
            speaker = ""
    await client.call_tool("cleanup-session", session)
    return told


def draw(conversation: list[list[str]]) -> Any:
    """The conversation as an image. Runs in a sandbox, with the Pillow and the fonts that Matplotlib brings."""
    import base64
    import io
    import keyword
    import tokenize

    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    width, margin, pad, line = 1480, 24, 20, 30
    small, mono = (
        ImageFont.truetype(font_manager.findfont(family), size)
        for family, size in (("DejaVu Sans", 22), ("DejaVu Sans Mono", 23))
    )
    page = Image.new("RGB", (width, 4000), "#ffffff")
    pen = ImageDraw.Draw(page)
    y = margin

    def colour_of(token: tokenize.TokenInfo) -> str:
        if token.type == tokenize.STRING:
            return "#0a7d36"
        if token.type == tokenize.NUMBER:
            return "#9a4f00"
        return "#8250df" if keyword.iskeyword(token.string) else "#1f2328"

    def write_code(source: str, top: int) -> None:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.string.strip():
                x = margin + pad + pen.textlength(" " * token.start[1], mono)
                pen.text((x, top + (token.start[0] - 1) * line), token.string, colour_of(token), mono)

    for speaker, kind, content in conversation:
        if speaker:
            pen.text((margin + 4, y), speaker, "#59636e", small)
            y += 36
        if kind == "image":
            plot = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
            size = (width - 2 * margin, plot.height * (width - 2 * margin) // plot.width)
            plot = plot.resize(size, Image.Resampling.LANCZOS)
            page.paste(plot, (margin, y))
            y += plot.height + 28
            continue
        lines = content.splitlines()
        height = len(lines) * line + 2 * pad - 4
        fill = {"you": "#ddf4ff", "result": "#f6f8fa", "": "#f6f8fa"}.get(speaker, "#fff8e5")
        pen.rounded_rectangle((margin, y, width - margin, y + height), 14, fill)
        if kind == "code":
            write_code(content, y + pad)
        else:
            for number, text in enumerate(lines):
                pen.text((margin + pad, y + pad + number * line), text, "#1f2328", mono)
        y += height + 28
    return page.crop((0, 0, width, y + margin - 28))


async def main(engine: str) -> None:
    """Hold the conversation, draw it, and write the picture."""
    settings = {
        "docker": {"command": engine, "mounts": [f"{ROOT}/tests/data:/data"], "timeout": 60, "memory_limit": "512m"}
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        arguments = ["-m", "python_docker_mcp", "--config", str(file)]
        async with Client(StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT)) as client:
            conversation = await converse(client)
            code = f"from typing import Any\n{inspect.getsource(draw)}\ndisplay(draw(conversation))"
            result = await client.call_tool(
                "execute-transient", {"code": code, "state": {"conversation": conversation}}
            )
    pictures = [block.data for block in result.content if isinstance(block, types.ImageContent)]
    assert pictures, result
    (ROOT / ".github/conversation.png").write_bytes(base64.b64decode(pictures[0]))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
