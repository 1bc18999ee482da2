"""Code whose values, exceptions, names and files are hostile or just odd, for tests of what it costs its session."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PRELUDE = """
import os, sys
class Text(str):
    def __len__(self): return -5
    def __str__(self): raise ValueError("no text")
    def isascii(self): return True
    def encode(self, *_): raise SystemExit(7)
def make(base, methods):
    kind = type("X", (base,), methods)
    try:
        return kind()
    except Exception:
        return kind.__new__(kind)
def fall(error):
    raise error
"""

RESULTS = (
    "1 / 0|None|5|-1|True|'x'|b'x'|'\\ud800'|'a\\u2028b'|[]|()|{}|object()|type|self|iter([])|(1, 2, 3)|10 ** 5000|"
    "float('nan')|Text('t')|'x' * 50_000|b'\\x89PNG\\r\\n\\x1a\\n'|sys.exit(3)|fall(KeyboardInterrupt())|"
    "fall(GeneratorExit())|fall(RecursionError())|fall(Exception())|{'a': 1}|{5: 'x'}|{'image/png': b'no'}|"
    "({'text/html': Text('x')}, 1)"
).split("|")
SPECIAL = (
    "repr str len eq hash bool iter format index int float getattr getattribute class reduce del sizeof dir traceback "
    "cause context suppress_context notes"
).split()
METHODS = [f"__{name}__" for name in SPECIAL]
METHODS += (
    "_repr_html_ _repr_png_ _repr_jpeg_ _repr_mimebundle_ _repr_latex_ args code name msg text lineno offset filename "
    "exceptions isascii bit_length items keys startswith ndim item"
).split()
BASES = (
    "object str int float list dict tuple Text Exception SystemExit ModuleNotFoundError SyntaxError KeyError "
    "BaseException KeyboardInterrupt UnicodeDecodeError OSError StopIteration ImportError"
).split()


@st.composite
def objects(draw: st.DrawFn) -> str:
    """An expression whose value is of a class with methods, or properties, of its own."""
    methods = []
    for name in draw(st.lists(st.sampled_from(METHODS), max_size=4, unique=True)):
        result = draw(st.sampled_from(RESULTS))
        method = f"lambda self=None, *_, **__: {result}"
        kind = draw(st.sampled_from(["method", "method", "property", "value"]))
        form = {"method": method, "property": f"property({method})", "value": f"(lambda self: {result})"}[kind]
        methods.append(f"{name!r}: {form}")
    return f"make({draw(st.sampled_from(BASES))}, {{{', '.join(methods)}}})"


values = objects() | st.sampled_from([result for result in RESULTS if result != "self"])
ENDS = [
    "{}",
    "display({})",
    "[{}]",
    "sys.exit({})",
    "fall({})",
    "fall(ValueError({}))",
    "fall(SystemExit({}, {}))",
    "fall(ModuleNotFoundError('m', name={}))",
    "fall(SyntaxError('m', ({}, {}, {}, {})))",
    "fall(SyntaxError({}, ('<call 1>', {}, 1, 'x')))",
    "e = ValueError(); e.__notes__ = {}; raise e",
    "e = ValueError(); e.args = {}; raise e",
    "e = KeyError(); e.__cause__ = {}; raise e",
    "e = KeyError(); e.__context__ = {}; raise e",
    "e = OSError(); e.errno = {}; e.filename = {}; raise e",
    "e = None\nfor _ in range(3000):\n    n = ValueError()\n    n.__context__ = e\n    e = n\nraise e",
    "e = ValueError('x' * 100_000); raise e",
    "type('N' * 100_000, (Exception,), {{}})\nraise type('N' * 100_000, (Exception,), {{}})()",
    "raise type(sys)('m').x",
    "odd = {}; odd_list = [{}]; odd_key = {{'a': {}}}",
    "globals()['\\ud800'] = globals()[5] = globals()[('a',)] = {}",
    "globals()['n' * 2_000_000] = 'x' * 100_000",
    "globals()[Text('text')] = {}",
    "open('\\udcff', 'w').close(); open('new\\nline', 'w').close(); open('d\\u2028', 'w').write('x')",
    "os.makedirs('d' * 200 + '/' + 'e' * 200, exist_ok=True); os.path.exists('p') or os.mkfifo('p')",
    "os.path.lexists('l') or os.symlink('/nowhere', 'l')",
    "__builtins__ = {}",
    "sys.stdout = {}; sys.stderr = {}",
    "print(1, end=''); del sys.stdout, sys.stderr",
    "sys.displayhook = sys.excepthook = sys.unraisablehook = {}",
    "import warnings; warnings.showwarning = {}; warnings.warn('x')",
    "sys.path.insert(0, {}); sys.argv = {}; sys.modules['odd'] = {}",
    "sys.setrecursionlimit(40 + len(__import__('traceback').extract_stack()))",
    "sys.settrace(lambda *_: {})",
    "sys.setprofile(lambda *_: {})",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "import threading; threading.excepthook = {}; threading.Thread(target=lambda: 1 / 0).start()",
    "import atexit; atexit.register(lambda: {})",
    "import asyncio\nasync def late(): return {}\nawait late()",
    "import asyncio\nasyncio.get_running_loop",
    "x = {}\ndel x",
    "try:\n    1 / 0\nexcept Exception as e:\n    raise {} from e",
    "exec('raise {}')",
    "'(' * 300",
    "0x" + "f" * 50_000,
    "\n".join(["("] * 150 + ["1"] + [")"] * 150),
    "# \x0c\n\x0c1 +",
    "x = 'a\u2028b'; 1 / 0",
]


@st.composite
def odd_codes(draw: st.DrawFn) -> str:
    """Code, most of it in one call with others of its kind."""
    end = draw(st.sampled_from(ENDS))
    parts = end.split("{}")
    code = "".join(part + (draw(values) if place < len(parts) - 1 else "") for place, part in enumerate(parts))
    return PRELUDE + code.replace("{{", "{").replace("}}", "}")


def collect(number: int) -> list[str]:
    """So many pieces of such code."""
    codes: list[str] = []

    @settings(max_examples=number, database=None, suppress_health_check=list(HealthCheck))
    @given(odd_codes())
    def take(code: str) -> None:
        codes.append(code)

    take()
    return codes
