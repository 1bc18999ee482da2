"""Code and calls as models write them, on real Docker and real Podman, with real libraries: what a model reads.

Each row stands for its kind. The kinds come from public bug reports of similar products.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from mcp_types import ImageContent, TextContent

from python_docker_mcp import hint_on, render
from sandbox_runner import (
    Config,
    DockerConfig,
    ImageError,
    PackageConfig,
    PoolConfig,
    Result,
    Rich,
    Runner,
    open_runner,
)

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

NEWEST = "localhost/python-docker-mcp-tests:3.14"  # made by engines.sh


@pytest.fixture(scope="module")
async def runner(engine_command: str) -> AsyncIterator[Runner]:
    """A runner with the image that users have.

    It uses a sandbox again, as a new one for each row takes a second; `test_ways.py` shows that code finds the same.
    """
    config = Config(docker=DockerConfig(command=engine_command, image="host"), pool=PoolConfig(reuse=True))
    async with open_runner(config, warm=True) as runner:
        yield runner


class Read:
    """What a model reads of a call's result: the text, and how many pictures there are."""

    def __init__(self, result: Result, code: str, runner: Runner) -> None:
        blocks = render(result, hint=hint_on(result, code, runner.config)).content
        self.text = "\n\n".join(block.text for block in blocks if isinstance(block, TextContent))
        self.pictures = sum(isinstance(block, ImageContent) for block in blocks)


async def read(runner: Runner, code: str) -> Read:
    """Run code, and render what came of it."""
    return Read(await runner.execute(code), code, runner)


PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.title('t')\n"
IMAGE = "import numpy as np\nfrom PIL import Image\nx = (np.add.outer(range(500), range(600)) % 256).astype('uint8')\n"
BUFFER = f"{PLOT}import io\nb = io.BytesIO()\nplt.savefig(b)\n"
ARRAY = "import numpy as np, pandas as pd\ndf = pd.DataFrame(np.arange(72).reshape(3, 24)).add_prefix('column_')\n"

PICTURES = [  # code, pictures, what its text has, and what not
    (
        f"{PLOT}plt.show()\nplt.savefig('p.png')\nimport os\nos.path.getsize('p.png') > 9000",
        1,
        "Value: True",
        "saved as",
    ),
    ("import matplotlib.pyplot as plt\nplt.figure()\nplt.show()\nplt.figure()", 0, "with 0 Axes", "image"),
    ("from PIL import Image\nImage.new('RGB', (60, 40), 'red').show()", 1, "", "Value"),
    (f"{PLOT}plt.savefig('chart.png')\nplt.close()", 1, "[saved as chart.png]", "Value"),
    (f"{PLOT}plt.savefig('/tmp/chart.png')\nplt.close()", 1, "[saved as ../tmp/chart.png]", "Value"),
    (f"{PLOT}plt.savefig('chart.png')\nNone", 1, "Files written: chart.png", "saved as"),
    (
        "from PIL import Image\nim = Image.new('RGB', (9, 9))\nim.save('x.png')\nim.save('x.jpg')\nim",
        1,
        "x.jpg",
        "saved as",
    ),
    ("from PIL import Image\nImage.new('RGB', (9, 9)).save('x.webp')", 1, "[saved as x.webp]", "Value"),
    (f"{PLOT}plt.savefig('c.png')\nplt.close()\nfrom PIL import Image\nImage.open('c.png')", 1, "c.png", "saved as"),
    (f"import matplotlib\nmatplotlib.use('TkAgg')\n{PLOT}plt.show()\nprint('after')", 1, "after", "Warning"),
    (PLOT.replace("'t'", "'売上 매출 销售'"), 1, "boxes stand for 上 售 売 销 매 출: for a font", "Glyph"),
    ("import matplotlib.pyplot as plt\nplt.rcParams['font.sans-serif'] = ['SimHei']\n" + PLOT, 1, "SimHei", "image"),
    ("import plotly.express", 0, 'install-package, package_name "plotly"', ""),
    (f"{PLOT}plt.savefig('trend')\nplt.show()", 1, "trend.png", "saved as"),
    (f"{PLOT}with open('p.png', 'wb') as file: plt.savefig(file)\nNone", 1, "p.png", "saved as"),
    (f"{BUFFER}plt.show()\nx = open('b.png', 'wb').write(b.getvalue())", 1, "b.png", "saved as"),
    (f"{BUFFER}plt.close()\nimport base64\nprint(base64.b64encode(b.getvalue()))", 1, "", "iVBOR"),
    (f"{BUFFER}plt.close()\nb.getvalue()", 1, "", "Value"),
    (PLOT.replace("'t'", "'\u0e2a'"), 1, "no font has them here", "mpl-font"),
    (f"{PLOT}plt.waitforbuttonpress()", 1, "there is no screen, no keyboard", "Timed out"),
    (f"{IMAGE}Image.fromarray(x.astype('float32') / 255)", 1, "", "Value"),
    (f"{IMAGE}Image.fromarray(x.astype('uint16') * 257)", 1, "", "Value"),
    (f"{IMAGE}Image.fromarray(x).convert('CMYK')", 1, "", "Value"),
    (f"{IMAGE}Image.fromarray(np.dstack([x.repeat(3, 0).repeat(3, 1)] * 3))", 1, "", "Value"),
    ("for number in range(24):\n    display(number)\n" + PLOT, 1, "23", "left out"),
    ("import seaborn as sns\nsns.histplot([1, 2, 2, 3])", 1, "Value: <Axes", "install"),
    (f"{ARRAY}print(df)", 0, "column_23", "..."),
    (f"{ARRAY}df.describe()", 0, "column_23", "..."),
]


@pytest.mark.in_turns
@pytest.mark.parametrize(("code", "pictures", "there", "absent"), PICTURES)
async def test_pictures_and_tables_are_seen_whole_and_once(
    runner: Runner, code: str, pictures: int, there: str, absent: str
) -> None:
    seen = await read(runner, code)
    assert (seen.pictures, there in seen.text, absent != "" and absent in seen.text) == (pictures, True, False), (
        seen.text
    )
    assert seen.text.count("findfont") <= 1


LEARNING_CURVE = """
from sklearn.datasets import load_digits
from sklearn.model_selection import learning_curve
from sklearn.naive_bayes import GaussianNB
[part.shape for part in learning_curve(GaussianNB(), *load_digits(return_X_y=True), n_jobs=4)]
"""
SPAWN = """
import multiprocessing
def f(x): return x
multiprocessing.get_context('spawn').Pool(2).map(f, [1])
"""
TOO_MUCH = """
import multiprocessing, time
for _ in range(3): multiprocessing.Process(target=time.sleep, args=[60]).start()
x = bytearray(400_000_000)
"""
PIP = "import subprocess, sys\nsubprocess.check_call([sys.executable, '-m', 'pip', 'install', 'nonesuch'])"
IPYTHON = "from IPython.display import display, HTML, Markdown, Image, clear_output\n"

CODE = [  # code, and what its text has
    ("!echo $((40 + 2))", "42"),
    ("!pip install -q pandas && echo 42", "[installed already: pandas]"),
    ("!pip install nonesuch", 'call install-package with package_name "nonesuch".'),
    ("%pip install nonesuch 'other>=2'", 'package_name "nonesuch", package_name "other>=2".'),
    (PIP, 'call install-package with package_name "nonesuch".'),
    ("import os\nos.system('pip install nonesuch')", 'call install-package with package_name "nonesuch".'),
    (f"{IPYTHON}display(HTML('<b>42</b>'))", "<b>42</b>"),
    ("from IPython.display import Audio\nAudio('a.mp3')", "Value: [Audio: a.mp3]"),
    (f"from IPython import get_ipython\nprint(get_ipython())\n{PLOT}", "None\n"),
    ("get_ipython().system('ls')", "This is plain Python, not IPython"),
    ("len?", "SyntaxError: invalid syntax"),
    ("from google.colab import drive", "google.colab exists only in Google Colab"),
    ("__file__", "There is no file: the working directory is /app"),
    ("import pandas as pd\nprint(pd.DataFrame({'a': [1]}).to_markdown())", "|  0 |   1 |"),
    ("import pandas as pd\npd.DataFrame({'a': [1]}).to_excel('a.xlsx')\npd.read_excel('a.xlsx').size", "Value: 2"),
    ("import tqdm\nfor _ in tqdm.tqdm(range(3)): pass", "100%"),
    ("import tkinter\ntkinter.Tk()", "there is no screen, no keyboard and no mouse here"),
    ("sum = 3\nprint(sum([1, 2]))", "`del sum` brings it back"),
    ("import seaborn as sns\nsns.load_dataset('tips')", "docker.network_allow: [raw.githubusercontent.com]"),
    ("from PIL import ImageFont\nImageFont.truetype('arial.ttf', 20)", "ImageFont.load_default(size=20)"),
    ("import numpy as np\nawait __import__('asyncio').sleep(0)\nnp.set_printoptions(2)\nnp.array([1/3])", "[0.33]"),
    ("import pandas as pd\npd.DataFrame({'a': [1]}).to_parquet('x')", 'package_name "pyarrow"'),
    ("import pandas as pd\npd.DataFrame({'a': [1]}).style.highlight_max()", "<style"),
    ("import io, pandas as pd\npd.read_html(io.StringIO('<table><tr><td>1</table>'))", 'package_name "lxml"'),
    ("import pandas as pd\npd.read_csv('/mnt/data/sales.csv')", "Code sees only its own working directory /app"),
    (SPAWN, "processes started by spawn can't find f"),
    (LEARNING_CURVE, "Value: [(5,), (5, 5), (5, 5)]"),
    (TOO_MUCH, "(256m); it ran in 4 processes."),
]


@pytest.mark.in_turns
@pytest.mark.parametrize(("code", "there"), CODE)
async def test_code_runs_as_models_write_it_or_says_what_to_do(runner: Runner, code: str, there: str) -> None:
    seen = await read(runner, code)
    assert there in seen.text


async def test_a_figure_of_an_earlier_call_can_still_be_saved(runner: Runner, session: str) -> None:
    shown = await runner.execute(PLOT, session=session)
    assert [list(item.forms) for item in shown.output if isinstance(item, Rich)] == [["text/plain", "image/png"]]
    saved = await runner.execute("plt.savefig('later.png')", session=session)
    assert saved.files[0].size > 9000
    await runner.close_session(session)


async def test_the_newest_python_starts_processes_as_others_do(engine_command: str) -> None:
    docker = DockerConfig(command=engine_command, image=NEWEST)
    config = Config(docker=docker, package=PackageConfig(preinstalled=()))
    code = (
        "import multiprocessing, sys\nfrom concurrent.futures import ProcessPoolExecutor\ndef f(x): return x + 2\n"
        "with multiprocessing.Pool(2) as pool: print(pool.map(f, [40]))\n"
        "with ProcessPoolExecutor(2) as pool: print(list(pool.map(f, [40])))\n"
        "%time sys.version_info[:2] >= (3, 14)"
    )
    async with open_runner(config) as runner:
        try:
            seen = await read(runner, code)
        except ImageError:
            pytest.skip("tests/engines.sh could not make the image")
    assert "[42]\n[42]\n" in seen.text
    assert "Value: True" in seen.text
