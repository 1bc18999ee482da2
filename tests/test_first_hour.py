"""A stranger's first hour: the program as clients start it, the settings that everybody has, the code that models send.

Only the engine, the image (made from this host's Python, as no registry may be within reach) and the package volume are
set; the folders for files are named as the README says. What comes back is compared word for word, but for blanks at
the ends of lines. With KEEP_PICTURES=/a/folder some pictures are kept there, to be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import mcp_types as types
import pytest
from conftest import ROOT
from mcp import Client, StdioServerParameters
from real_engines import Engine, eventually

pytestmark = [pytest.mark.engine, pytest.mark.in_turns, pytest.mark.anyio]

MODULE = [sys.executable, "-m", "python_docker_mcp"]
SCRIPT = [str(Path(sys.executable).with_name("python-docker-mcp"))]
PATIENCE = 240  # seconds; a conversation that takes longer will not end
KEPT = {"a loop of plots", "an animation by ion and pause", "a heatmap", "3D", "scatter_matrix"}

# Each piece: its name (and the call, if it is not the session's next code), the code, and after `->` what comes back.
# [picture] is one that has not come before, [picture again] one that has; pictures in a row stand on one line. <<…>> is
# a pattern. The line that names the session ends every answer in it, and is left out.

SESSION = r"""
== the data
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

df = pd.DataFrame({
    'city': ['Oslo', 'Rome', 'Bern', 'Oslo', 'Rome', 'Bern'],
    'year': [2023, 2023, 2023, 2024, 2024, 2024],
    'rain': [763.0, 799.5, 1059.0, 802.1, 640.2, 1021.4],
    'sun': [1668, 2473, 1682, 1701, 2502, 1744],
})
print(df.shape)
df.head(3)
->
(6, 4)

Value:
   city  year    rain   sun
0  Oslo  2023   763.0  1668
1  Rome  2023   799.5  2473
2  Bern  2023  1059.0  1682

== a loop of plots
for city, part in df.groupby('city'):
    print(city)
    plt.plot(part['year'], part['rain'], marker='o')
    plt.title(city)
    plt.show()
->
Bern

[picture]

Oslo

[picture]

Rome

[picture]

== figures of df.plot that are shown at the end
for column in ['rain', 'sun']:
    df.plot(x='city', y=column, kind='bar', title=column)
->
[picture] [picture]

== an animation by ion and pause
plt.ion()
fig, ax = plt.subplots()
for i in range(4):
    ax.clear()
    ax.bar(range(5), np.arange(5) * i)
    ax.set_title(f'step {i}')
    plt.pause(0.05)
plt.ioff()
plt.show()
->
[picture]

== its last state
fig, ax = plt.subplots()
ax.bar(range(5), np.arange(5) * 3)
ax.set_title('step 3')
plt.show()
->
[picture again]

== savefig and show
plt.figure(figsize=(6, 4))
plt.plot([1, 4, 9], label='squares')
plt.legend()
plt.savefig('squares.png', dpi=150, bbox_inches='tight')
plt.show()
->
[picture]

Files written, readable as resources session://<<[a-z-]+>>/files/PATH: squares.png (<<\d\d\.\d>> kB)

[link squares.png]

== clear_output in a loop
from IPython.display import clear_output
losses = []
for epoch in range(3):
    losses.append(1 / (epoch + 1))
    clear_output(wait=True)
    plt.plot(losses, 'r-')
    plt.title(f'epoch {epoch}')
    plt.show()
    print(f'epoch {epoch}: {losses[-1]:.3f}')
->
[picture]

epoch 2: 0.333

== a style and a histogram
plt.style.use('ggplot')
values = np.random.default_rng(1).normal(size=1000)
counts, edges, _ = plt.hist(values, bins=20, edgecolor='white')
plt.show()
plt.style.use('default')
int(counts.sum())
->
[picture]

Value: 1000

== a heatmap
corr = df[['year', 'rain', 'sun']].corr()
fig, ax = plt.subplots()
im = ax.imshow(corr, cmap='coolwarm', vmin=-1, vmax=1)
fig.colorbar(im)
ax.set_xticks(range(3), corr.columns)
ax.set_yticks(range(3), corr.columns)
for i in range(3):
    for j in range(3):
        ax.text(j, i, f'{corr.iloc[i, j]:.2f}', ha='center')
plt.show()
print(corr.round(2))
->
[picture]

      year  rain   sun
year  1.00 -0.18  0.06
rain -0.18  1.00 -0.60
sun   0.06 -0.60  1.00

== 3D
from mpl_toolkits.mplot3d import Axes3D
fig = plt.figure()
ax = fig.add_subplot(111, projection='3d')
X, Y = np.meshgrid(np.linspace(-3, 3, 30), np.linspace(-3, 3, 30))
ax.plot_surface(X, Y, np.sin(X) * np.cos(Y), cmap='viridis')
plt.show()
->
[picture]

== a boxplot by column
df.boxplot(column='rain', by='city')
->
[picture]

Value: <Axes: title={'center': 'rain'}, xlabel='city'>

== scatter_matrix
from pandas.plotting import scatter_matrix
scatter_matrix(df[['rain', 'sun']], figsize=(6, 6))
plt.show()
->
[picture]

== a time series
ts = pd.Series(np.arange(90.0) % 7, index=pd.date_range('2024-01-01', periods=90))
ax = ts.rolling(7).mean().plot(label='week')
ts.plot(ax=ax, alpha=0.4)
ax.legend()
print(ts.resample('MS').sum())
->
2024-01-01    87.0
2024-02-01    87.0
2024-03-01    93.0
Freq: MS, dtype: float64

[picture]

== groupby
df.groupby('city').agg({'rain': 'mean', 'sun': ['min', 'max']})
->
Value:
         rain   sun
         mean   min   max
city
Bern  1040.20  1682  1744
Oslo   782.55  1668  1701
Rome   719.85  2473  2502

== merge
countries = pd.DataFrame({'city': ['Oslo', 'Rome'], 'country': ['Norway', 'Italy']})
merged = df.merge(countries, on='city', how='left')
print(merged[['city', 'year', 'country']])
int(merged['country'].isna().sum())
->
   city  year country
0  Oslo  2023  Norway
1  Rome  2023   Italy
2  Bern  2023     NaN
3  Oslo  2024  Norway
4  Rome  2024   Italy
5  Bern  2024     NaN

Value: 2

== logging beside print
import logging
logging.basicConfig(level=logging.INFO, format='%(levelname)s:%(message)s')
print('loading')
logging.info('6 rows')
print('cleaning')
logging.warning('none dropped')
print('done')
->
loading
[stderr]
INFO:6 rows
[stdout]
cleaning
[stderr]
WARNING:none dropped
[stdout]
done

== a plot while logging is on
logging.getLogger().setLevel(logging.DEBUG)
plt.plot(df['sun'], '--')
plt.show()
logging.getLogger().setLevel(logging.WARNING)
->
[picture]

== multiprocessing
from multiprocessing import Pool

def square(n):
    return n * n

if __name__ == '__main__':
    with Pool(4) as pool:
        print(pool.map(square, range(8)))
->
[0, 1, 4, 9, 16, 25, 36, 49]

== scikit-learn
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

X, y = load_iris(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
model = LogisticRegression(max_iter=1000).fit(X_train, y_train)
print(f'{model.score(X_test, y_test):.2f}')
model
->
0.97

Value: LogisticRegression(max_iter=1000)

== SymPy
import sympy as sp
x = sp.symbols('x')
print(sp.solve(x**2 - 5*x + 6, x))
sp.integrate(sp.sin(x) * sp.exp(x), x)
->
[2, 3]

Value: exp(x)*sin(x)/2 - exp(x)*cos(x)/2

== an error
total = df['rain'].sum()
print(total)
average = total / len(df)
average / 'days'
->
Failed on line 4: <<.*TypeError>>: <<[^\n]+>>

5085.2

Traceback (most recent call last):
  File "<call <<\d+>>>", line 4, in <module>
    average / 'days'
    ~~~~~~~~^~~~~~~~
<<.*TypeError>>: <<[^\n]+>>

== the state after it
round(float(average), 2), plt.get_fignums(), square(12), model.n_features_in_
->
Value: (847.53, [], 144, 4)

== a package that is not there
import networkx as nx
->
Failed on line 1: ModuleNotFoundError: No module named 'networkx'

Traceback (most recent call last):
  File "<call <<\d+>>>", line 1, in <module>
    import networkx as nx
ModuleNotFoundError: No module named 'networkx'

Hint: <<[^\n]*install-package[^\n]*"networkx"[^\n]*>>

== cleanup-session {}
->
The session <<[a-z-]+>> has ended, and its container is removed.
"""

TRANSIENT = r"""
== factorial, as execute-transient {}
def factorial(n):
    return 1 if n == 0 else n * factorial(n - 1)

print(factorial(5))
->
120

== a state, as execute-transient {"state": {"rows": [[1, 2], [3, 4]]}}
rows.append([5, 6])
total = sum(map(sum, rows))
->
(no output)

State: {"rows": [[1, 2], [3, 4], [5, 6]], "total": 21}

== a loop of plots in a fresh sandbox, as execute-transient {}
import matplotlib.pyplot as plt
for n in range(4):
    plt.plot([n, 1, n])
    plt.title(f'plot {n}')
    plt.show()
->
[picture] [picture] [picture] [picture]

State: {"n": 3}

== plots of two kinds, as execute-transient {}
import matplotlib.pyplot as plt
import pandas as pd
df = pd.DataFrame({'a': [1, 2, 3], 'b': [3, 1, 2]})
for name in df.columns:
    df[name].plot(kind='bar', title=name)
    plt.show()
plt.plot(df['b'], df['a'])
plt.show()
->
[picture] [picture] [picture]

State: {"name": "b"}

== install-package {"package_name": "humanize"}
->
Installed humanize <<[\d.]+>>: can be imported in <<[^\n]+>>.

== a package for all, as execute-transient {}
import humanize
humanize.intword(123456789)
->
Value: '123.5 million'

== a loop of plots after an installation, as execute-transient {}
import matplotlib.pyplot as plt
for n in range(3):
    plt.bar([1, 2, 3], [n, 1, n + 1])
    plt.show()
->
[picture] [picture] [picture]

State: {"n": 2}
"""

FILES = r"""
== a CSV file, as execute-persistent {"files": ["sales.csv"]}
import pandas as pd
df = pd.read_csv('sales.csv', parse_dates=['day'])
print(df.dtypes['day'].kind, len(df))
df.groupby('item')['price'].sum()
->
M 3

Value:
item
pear    7.5
plum    3.0
Name: price, dtype: float64

== install-package {"package_name": "xlsxwriter"}
->
Installed <<[^\n]*xlsxwriter [\d.]+[^\n]*>>: can be imported in the session <<[a-z-]+>>.

== Excel
summary = df.pivot_table(index='item', values='price', aggfunc='sum')
summary.to_excel('summary.xlsx')
pd.read_excel('summary.xlsx')
->
Value:
   item  price
0  pear    7.5
1  plum    3.0

Saved for the user as <<OUTPUT/[a-z-]+>>/summary.xlsx (<<[45]\.\d>> kB)

[link summary.xlsx]

== JSON and a picture that is saved
import json, matplotlib.pyplot as plt
summary['price'].plot(kind='barh')
plt.savefig('summary.png')
plt.show()
with open('summary.json', 'w') as f:
    json.dump(summary['price'].to_dict(), f)
->
[picture]

Saved for the user:
<<OUTPUT/[a-z-]+>>/summary.json (26 bytes)
<<OUTPUT/[a-z-]+>>/summary.png (<<\d\d?\.\d>> kB)

[link summary.json]

[link summary.png]

== a file that is not there, as execute-transient {"files": ["other.csv"]}
import pandas as pd
pd.read_csv('other.csv')
->
There is no file 'other.csv' on the host.

== cleanup-session {}
->
The session <<[a-z-]+>> has ended, and its container is removed.

== a CSV file for one call, as execute-transient {"files": ["sales.csv"]}
import csv
with open('sales.csv') as file:
    print(sum(float(row['price']) for row in csv.DictReader(file)))
->
10.5
"""


@dataclass(frozen=True)
class Piece:
    """A call of a tool, and what comes back."""

    name: str
    tool: str
    arguments: dict[str, Any]
    text: str

    @property
    def fails(self) -> bool:
        """Whether what comes back is an error."""
        return self.text.startswith(("Failed", "There is no file"))

    def is_answered_by(self, text: str) -> bool:
        """Whether all of a text is what comes back."""
        words = re.split(r"<<(.*?)>>", self.text)
        pattern = "".join(word if place % 2 else re.escape(word) for place, word in enumerate(words))
        return re.fullmatch(pattern, text) is not None


def pieces(conversation: str) -> Iterator[Piece]:
    """Read a conversation."""
    for piece in re.split(r"^== ", conversation, flags=re.MULTILINE)[1:]:
        head, _, rest = piece.partition("\n")
        code, _, text = rest.rpartition("->\n") if rest.startswith("->") else rest.partition("\n->\n")
        call = re.fullmatch(r"(?:(.+), as )?([a-z-]+) ({.*})", head)
        name, tool, arguments = call.groups() if call else (head, "execute-persistent", "{}")
        yield Piece(name or tool, tool, json.loads(arguments) | ({"code": code} if code else {}), text.strip("\n"))


class Conversation:
    """What a client has: a server, a session as soon as there is one, and the pictures so far."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.session: str | None = None
        self.pictures: set[str] = set()
        self.wrong: list[str] = []

    async def go_through(self, conversation: str) -> None:
        """Make all calls, and note what is not as it should be."""
        for piece in pieces(conversation):
            await self.make(piece)

    async def make(self, piece: Piece) -> None:
        """Make a call; all but those of execute-transient are for the session, if there is one."""
        named = {"session_id": self.session} if self.session and piece.tool != "execute-transient" else {}
        result = await self.client.call_tool(piece.tool, piece.arguments | named)
        text = "\n\n".join(self.read(block, piece) for block in result.content)
        text = re.sub(" +$", "", re.sub(r"(?<=e])\n\n(?=\[pic)", " ", text), flags=re.MULTILINE)
        if piece.tool == "execute-persistent":
            text = self.without_session(text)
        if not piece.is_answered_by(text) or result.is_error != piece.fails:
            self.wrong.append(f"{piece.name}: came back\n{text}\n… instead of\n{piece.text}")

    def read(self, block: types.ContentBlock, piece: Piece) -> str:
        """What there is to read of a block of a result."""
        if isinstance(block, types.TextContent):
            return block.text
        if isinstance(block, types.ResourceLink):
            return f"[link {block.name}]"
        if not isinstance(block, types.ImageContent) or block.mime_type != "image/png":
            return f"[{block.type}]"
        if block.data in self.pictures:
            return "[picture again]"
        self.pictures.add(block.data)
        if piece.name in KEPT and (folder := os.environ.get("KEEP_PICTURES")):
            file = Path(folder) / f"{piece.name.replace(' ', '-')}-{len(self.pictures)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(block.data))
        return "[picture]"

    def without_session(self, text: str) -> str:
        """Leave out the line that names the session, which has to be there; the first one tells its id."""
        if self.session is None and (new := re.search(r'\n\nSession: (\S+) \(new; pass session_id "\1" to go', text)):
            self.session = new[1]
        line = rf'\n\nSession: {self.session}( \(new; pass session_id "{self.session}" to go on in it\))?(?=\n\n\[|$)'
        left, count = re.subn(line, "", text)
        return left if count == 1 else f"{text}\n(the session {self.session} is not named once)"


@dataclass(frozen=True)
class Newcomer:
    """Somebody who has installed the program for one engine, and sets nothing else."""

    engine: Engine
    volume: str
    home: Path

    @asynccontextmanager
    async def starts(self, command: list[str], mode: str = "auto", **variables: str) -> AsyncIterator[Conversation]:
        """Start the server as a client does, and talk with it; in the end say what was wrong."""
        settings = {"docker": {"command": self.engine.command, "image": "host"}, "package": {"volume": self.volume}}
        file = self.home / "config.yaml"
        file.write_text(json.dumps(settings))
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON_DOCKER_MCP_")}
        program = StdioServerParameters(
            command=command[0], args=[*command[1:], "--config", str(file)], env=kept | variables, cwd=ROOT
        )
        with anyio.fail_after(PATIENCE):
            async with Client(program, mode=mode) as client:
                conversation = Conversation(client)
                yield conversation
        assert not conversation.wrong, "\n\n".join(["", *conversation.wrong])

    async def containers(self) -> list[str]:
        """The ids of this newcomer's containers."""
        return (await self.engine("ps", "--all", "--quiet", f"--filter=volume={self.volume}")).split()

    async def warm_sandboxes(self, used: set[str]) -> set[str]:
        """Two more that have imported what they are to import: process 1 and its worker wait for something."""

        async def find() -> set[str]:
            try:
                found = await self.engine("inspect", "--format={{.Id}} {{.State.Pid}}", *await self.containers())
                pids = dict(line.split() for line in found.splitlines())
                ready = {name for name, pid in pids.items() if name not in used and is_at_rest(int(pid))}
            except (subprocess.CalledProcessError, OSError):  # there is none, or one ended meanwhile
                return set()
            return ready if len(ready) == 2 else set()

        return await eventually(find)

    async def is_gone(self) -> bool:
        """Remove what is left; whether nothing is."""
        for arguments in (["rm", "--force", *await self.containers()], ["volume", "rm", "--force", self.volume]):
            done = await anyio.run_process([self.engine.command, *arguments], check=False)
        return done.returncode == 0


def is_at_rest(pid: int) -> bool:
    """Whether a process has a child, and both sleep."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    states = [Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2][0] for each in (pid, *children)]
    return bool(children) and {*states} == {"S"}


@pytest.fixture
async def newcomer(engine: Engine, tmp_path: Path) -> AsyncIterator[Newcomer]:
    """A newcomer, of whom nothing is left afterwards."""
    newcomer = Newcomer(engine, f"python-docker-mcp-test-hour-{secrets.token_hex(4)}", tmp_path)
    yield newcomer
    await eventually(newcomer.is_gone)


async def test_a_conversation_in_a_session_that_begins_a_minute_after_the_start(newcomer: Newcomer) -> None:
    async with newcomer.starts(MODULE) as conversation:
        assert conversation.client.protocol_version == "2026-07-28"
        await newcomer.warm_sandboxes(set())
        await conversation.go_through(SESSION)


async def test_a_conversation_in_a_session_that_begins_at_once(newcomer: Newcomer) -> None:
    async with newcomer.starts(SCRIPT, "legacy") as conversation:
        assert conversation.client.protocol_version == "2025-11-25"
        await conversation.go_through(SESSION)


async def test_calls_without_a_session_each_in_a_warm_sandbox(newcomer: Newcomer) -> None:
    async with newcomer.starts(MODULE) as conversation:
        used: set[str] = set()
        for number, piece in enumerate(pieces(TRANSIENT)):
            if number % 2 == 0:
                used |= await newcomer.warm_sandboxes(used)  # two, for two calls
            await conversation.make(piece)


async def test_files_reach_the_code_and_the_user(newcomer: Newcomer) -> None:
    inputs, output = newcomer.home / "inputs", newcomer.home / "output"
    inputs.mkdir()
    (inputs / "sales.csv").write_text("day,item,price\n2024-01-01,pear,2.5\n2024-01-02,plum,3\n2024-01-02,pear,5\n")
    folders = {"PYTHON_DOCKER_MCP_FILES_INPUTS": str(inputs), "PYTHON_DOCKER_MCP_FILES_OUTPUT": str(output)}
    async with newcomer.starts(MODULE, **folders) as conversation:
        await conversation.go_through(FILES.replace("OUTPUT", re.escape(str(output))))
    (folder,) = output.iterdir()
    assert {file.name for file in folder.iterdir()} == {"summary.xlsx", "summary.json", "summary.png"}
    assert json.loads((folder / "summary.json").read_text()) == {"pear": 7.5, "plum": 3.0}
    with zipfile.ZipFile(folder / "summary.xlsx") as book:
        assert b"<v>7.5</v>" in book.read("xl/worksheets/sheet1.xml")
