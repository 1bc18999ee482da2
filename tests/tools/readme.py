"""Writes the README's tables of settings, from the code's defaults and from what config.yaml says of each key.

`make docs` runs it; a test tells when that is due.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from sandbox_runner import ENVIRONMENT, Config

ROOT = Path(__file__).parents[2]
START = "<!-- settings: written by `make docs`, from the code and from config.yaml -->\n"
END = "<!-- end of the settings -->\n"


def meanings() -> dict[str, str]:
    """What config.yaml says of each setting and section, by name."""
    found: dict[str, str] = {}
    section = ""
    for line in (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)([a-z_]+):.*?  # (.*)", line):
            indent, key, meaning = match.groups()
            section = section if indent else key
            found[f"{section}.{key}" if indent else key] = meaning
    return found


def as_yaml(value: Any) -> str:
    """A default as one would write it into the file."""
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def row(key: str, value: Any, meaning: str) -> str:
    """A line of a table."""
    variable = next((name for name, setting in ENVIRONMENT.items() if setting == key), None)
    meaning = meaning.replace(f" ({variable})", "").replace("|", r"\|")
    wins = f"; `{variable}` wins over it" if variable else ""
    return f"| `{key}` | `{as_yaml(value)}` | {meaning}{wins} |"


def settings() -> str:
    """The tables."""
    said = meanings()
    head = "| key | default | meaning |\n|---|---|---|"
    tables, rest = [], []
    for item in dataclasses.fields(Config):
        value = getattr(Config(), item.name)
        if dataclasses.is_dataclass(value):
            keys = [f"{item.name}.{part.name}" for part in dataclasses.fields(value)]
            rows = [row(key, getattr(value, key.partition(".")[2]), said[key]) for key in keys]
            tables.append(f"**`{item.name}`**: {said[item.name]}\n\n{head}\n" + "\n".join(rows))
        else:
            rest.append(row(item.name, value, said[item.name]))
    tables.append("**Secrets and import rules**\n\n" + "\n".join([head, *rest]))
    return "\n" + "\n\n".join(tables) + "\n\n"


def updated(readme: str) -> str:
    """The README with tables that are true."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    assert start, f"the README lacks the line {START}"
    assert end, f"the README lacks the line {END}"
    return before + start + settings() + end + after


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
