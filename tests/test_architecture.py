"""The house's rules, held by reading the source: who may import whom, and how large things grow.

A rule is a function from source files to complaints. Each is run twice: over the tree, where it
must stay silent, and over a few lines that break it, where it must speak.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room -> the rooms it may import. A room is a module of styleattn, or a folder of modules; it may
# always import itself.
_OP = {"branch", "errors"}
_BACKENDS = {"reference", "torch_backend", "cpu_backend", "kernels"}
_CORE = _OP | {"attention", "backends", "statistics"}
_HOSTS = _CORE | {"methods", "norms", "references", "adapters", "inversion", "processors"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "branch": {"errors"},
    "measured": set(),
    **dict.fromkeys(_BACKENDS, _OP | {"measured"}),
    "backends": _OP | _BACKENDS | {"measured"},
    "gradients": _OP,
    "lse": _OP,
    "_watch": set(),
    "_ops": _OP | _BACKENDS | {"_watch", "backends", "gradients", "lse"},
    "statistics": _OP | {"_ops", "backends"},
    "_norm_ops": _OP | _BACKENDS | {"_watch", "backends"},
    "norms": _OP | {"_norm_ops", "backends", "statistics"},
    "_maps": set(),
    "_checks": _OP,
    "attention": _OP | {"_checks", "_maps", "_ops", "backends", "statistics"},
    "testing": _CORE | {"reference"},
    "references": _CORE | {"inversion"},
    "methods": _CORE | {"_maps", "norms", "references"},
    "adapters": _CORE | {"inversion"},  # the error of refused files
    "processors": _HOSTS,
    "inversion": _CORE,
    "tiny": _HOSTS,
    "pipelines": _HOSTS | {"tiny", "styleattn"},
    "cli": _HOSTS | {"tiny", "pipelines", "testing", "styleattn"},
    "__main__": {"cli"},
    "styleattn": _HOSTS,  # the package's __init__
}
# Third parties that not every user has: where they may be imported at module level, and where
# inside functions only.
GUESTS: dict[str, tuple[set[str], set[str]]] = {
    "triton": ({"kernels"}, {"backends", "cli"}),
    "diffusers": ({"processors"}, {"inversion", "pipelines", "tiny", "cli"}),
    "transformers": ({"processors"}, {"inversion", "pipelines", "tiny", "cli"}),
    "accelerate": (set(), {"processors"}),
    "peft": (set(), {"processors"}),
    "kernels": (
        set(),
        set(),
    ),  # Hugging Face's package: never ours to import, and never our folder's name
}
FILE_LINES = {"styleattn": 400, "benchmarks": 400, "kernels": 500, "csrc": 500, "tests": 500}
FUNCTION_LINES = {"styleattn": 60, "benchmarks": 60, "kernels": 150, "tests": 60}


@dataclass(frozen=True)
class Import:
    target: str  # dotted and absolute: styleattn.kernels.attention
    line: int
    lazy: bool  # inside a function
    typing: bool  # under `if TYPE_CHECKING`

    @property
    def room(self) -> str | None:
        """The room of styleattn that is imported, None for a third party."""
        parts = self.target.split(".")
        if parts[0] != "styleattn":
            return None
        return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "styleattn"


@dataclass(frozen=True)
class Source:
    path: str  # relative to the repository, with slashes
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def top(self) -> str:
        return self.path.split("/")[0]

    @property
    def room(self) -> str:
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] == "kernels":
            return "kernels"
        return "styleattn" if parts[1] == "__init__" else parts[1]

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, lazy=False, typing=False))

    def _package(self, level: int) -> list[str]:
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] == "kernels":
            parts = ["styleattn", *parts]
        return parts[: len(parts) - level]

    def _imports(self, node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(a.name, child.lineno, lazy, typing) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = self._package(child.level) if child.level else []
                module = [*base, *(child.module.split(".") if child.module else [])]
                # `from styleattn import x` names a room where x is one, else the package
                names = [f"{'.'.join(module)}.{a.name}" for a in child.names]
                targets = names if module == ["styleattn"] else [".".join(module)]
                yield from (Import(target, child.lineno, lazy, typing) for target in targets)
            elif isinstance(child, ast.Call) and _name(child.func) in (
                "import_module",
                "__import__",
            ):
                if child.args and isinstance(child.args[0], ast.Constant):
                    yield Import(str(child.args[0].value), child.lineno, lazy, typing)
                yield from self._imports(child, lazy, typing)
            else:
                yield from self._imports(
                    child,
                    lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
                    typing or (isinstance(child, ast.If) and _name(child.test) == "TYPE_CHECKING"),
                )


def _name(node: ast.AST) -> str:
    """The last part of a dotted name: ``import_module`` of ``importlib.import_module``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _library(sources: Iterable[Source]) -> list[Source]:
    return [s for s in sources if s.top in ("styleattn", "kernels") and s.path.endswith(".py")]


def imports_run_one_way(sources: Iterable[Source]) -> Iterator[str]:
    """cli, pipelines -> processors -> methods -> attention -> _ops; backends never meet."""
    for source in _library(sources):
        if source.room not in ROOMS:
            yield f"{source.path}: no such room in tests/test_architecture.py"
            continue
        allowed = ROOMS[source.room] | {source.room}
        for found in source.imports:
            if found.room is not None and found.room not in allowed:
                yield f"{source.path}:{found.line}: {source.room} must not import {found.target}"


def kernels_are_imported_lazily(sources: Iterable[Source]) -> Iterator[str]:
    """kernels/ imports triton, so whoever imports it does so inside a function."""
    for source in _library(sources):
        for found in source.imports:
            if found.room == "kernels" != source.room and not (found.lazy or found.typing):
                yield f"{source.path}:{found.line}: {found.target} at module level"


def guests_stay_in_their_rooms(sources: Iterable[Source]) -> Iterator[str]:
    """diffusers and transformers live in processors, triton in kernels; elsewhere in functions."""
    for source in _library(sources):
        for found in source.imports:
            at_top, in_functions = GUESTS.get(found.target.split(".")[0], (None, None))
            if at_top is None or found.typing or source.room in at_top:
                continue
            if not (found.lazy and source.room in in_functions):
                yield f"{source.path}:{found.line}: {found.target} in {source.room}"


def only_backends_reads_the_environment(sources: Iterable[Source]) -> Iterator[str]:
    """One environment variable, STYLEATTN_BACKEND, read in one file."""
    for source in _library(sources):
        for node in ast.walk(source.tree):
            if (
                _name(node) in ("environ", "environb", "getenv", "putenv")
                and source.room != "backends"
            ):
                yield f"{source.path}:{node.lineno}: {_name(node)}"


def users_get_exceptions(sources: Iterable[Source]) -> Iterator[str]:
    """`assert` vanishes under -O: the library raises. (`assert isinstance` only narrows a type.)"""
    for source in _library(sources):
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Assert) or source.room == "testing":
                continue
            if not (isinstance(node.test, ast.Call) and _name(node.test.func) == "isinstance"):
                yield f"{source.path}:{node.lineno}: assert"


def files_stay_small(sources: Iterable[Source]) -> Iterator[str]:
    """A file is one thing."""
    for source in sources:
        lines = source.text.count("\n") + (not source.text.endswith("\n"))
        if lines > FILE_LINES[source.top]:
            yield f"{source.path}: {lines} lines, limit {FILE_LINES[source.top]}"


def functions_stay_small(sources: Iterable[Source]) -> Iterator[str]:
    """A function fits a screen, its docstring not counted."""
    for source in sources:
        if not source.path.endswith(".py"):
            continue
        for node in ast.walk(source.tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > FUNCTION_LINES[source.top]:
                yield (
                    f"{source.path}:{node.lineno}: {node.name} has {lines} lines, "
                    f"limit {FUNCTION_LINES[source.top]}"
                )


def nothing_names_a_machine(sources: Iterable[Source]) -> Iterator[str]:
    """No absolute path of somebody's machine."""
    for source in sources:
        for number, line in enumerate(source.text.splitlines(), 1):
            if f"{ROOT}/" in line or re.search(r"[\"'](/home|/root|/Users)/", line):
                yield f"{source.path}:{number}: {line.strip()}"


Rule = Callable[[Iterable[Source]], Iterator[str]]
# Each rule with sources that break it: (path, text).
RULES: list[tuple[Rule, list[tuple[str, str]]]] = [
    (
        imports_run_one_way,
        [
            ("styleattn/branch.py", "from styleattn.attention import attention"),
            (
                "styleattn/torch_backend.py",
                "def f():\n    from .reference import attention_forward",
            ),
            ("styleattn/reference.py", "import styleattn.cpu_backend"),
            ("styleattn/methods/style_id.py", "from ..processors import unet"),
            ("styleattn/methods/style_id.py", "from styleattn import apply"),
            (
                "styleattn/attention.py",
                "import importlib\nimportlib.import_module('styleattn.cli')",
            ),
            ("kernels/attention.py", "from ..reference import attention_forward"),
            ("styleattn/attic/old.py", ""),
        ],
    ),
    (
        kernels_are_imported_lazily,
        [
            ("styleattn/backends.py", "from .kernels.attention import attention_forward"),
            (
                "styleattn/_ops.py",
                "try:\n    import styleattn.kernels.stats\nexcept ImportError:\n    pass",
            ),
        ],
    ),
    (
        guests_stay_in_their_rooms,
        [
            ("styleattn/cli.py", "import diffusers"),
            (
                "styleattn/methods/style_aligned.py",
                "def f():\n    from diffusers.models import unets",
            ),
            ("styleattn/attention.py", "import triton.language as tl"),
            ("styleattn/processors/unet.py", "from kernels import get_kernel"),
        ],
    ),
    (
        only_backends_reads_the_environment,
        [
            ("styleattn/cli.py", "import os\nHOME = os.environ['HOME']"),
            ("kernels/configs.py", "from os import getenv\nDEBUG = getenv('DEBUG')"),
        ],
    ),
    (users_get_exceptions, [("styleattn/attention.py", "def f(x):\n    assert x")]),
    (
        files_stay_small,
        [
            ("styleattn/cli.py", "\n" * 401),
            ("kernels/attention.py", "\n" * 501),
            ("csrc/attention.cpp", "\n" * 501),
        ],
    ),
    (
        functions_stay_small,
        [
            ("styleattn/cli.py", "def f():\n" + "    print()\n" * 60),
            ("kernels/attention.py", "def f():\n    '''Doc.'''\n" + "    print()\n" * 150),
        ],
    ),
    (nothing_names_a_machine, [("benchmarks/run.py", f'OUT = "{ROOT}/results"')]),
]
_IDS = [rule.__name__ for rule, _ in RULES]


@pytest.fixture(scope="module")
def tree() -> list[Source]:
    """Every source file of the repository."""
    paths = (
        path
        for top in FILE_LINES
        for path in sorted((ROOT / top).rglob("*"))
        if path.suffix in (".py", ".cpp", ".h", ".cu") and "__pycache__" not in path.parts
    )
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
        if not path.relative_to(ROOT).as_posix().startswith("styleattn/kernels/")  # the link
    ]


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=_IDS)
def test_rule(rule: Rule, tree: list[Source]) -> None:
    assert tree
    complaints = list(rule(tree))
    assert not complaints, "\n".join([rule.__doc__ or "", *complaints])


@pytest.mark.parametrize(("rule", "broken"), RULES, ids=_IDS)
def test_rule_can_fail(rule: Rule, broken: list[tuple[str, str]]) -> None:
    for path, text in broken:
        assert list(rule([Source(path, text)])), f"{rule.__name__} is silent about {path}: {text!r}"


def test_rules_accept_what_is_meant() -> None:
    sources = [
        Source(
            "styleattn/_ops.py", "def f():\n    from .kernels.attention import attention_forward"
        ),
        Source("styleattn/processors/unet.py", "from diffusers.models import attention_processor"),
        Source(
            "styleattn/cli.py", "def f():\n    import diffusers\n    from styleattn import apply"
        ),
        Source(
            "styleattn/methods/a.py", "from styleattn import attention\nfrom ..branch import Branch"
        ),
        Source(
            "kernels/stats.py",
            "import triton\nfrom .primitives import load\nfrom ..branch import Branch",
        ),
        Source(
            "styleattn/tiny/a.py",
            "if TYPE_CHECKING:\n    from diffusers import UNet2DConditionModel",
        ),
        Source(
            "styleattn/attention.py", f"def f():\n    '''{'x' * 9}{chr(10) * 99}'''\n    return 1"
        ),
    ]
    for rule, _ in RULES:
        assert not list(rule(sources)), rule.__name__


_IMPORT_PROBE = """
import os, sys
import torch

def forbidden(*args, **kwargs):
    raise RuntimeError("a device was queried at import")

for name in ("is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, forbidden)

asked = []
read = type(os.environ).__getitem__
def recording(self, key):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("os", "_collections_abc"):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").partition(".")[0] == "styleattn":
        asked.append(key)
    return read(self, key)
type(os.environ).__getitem__ = recording

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "diffusers", "transformers", "accelerate", "peft"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Blocked())

import styleattn
for name in ("Affine", "Branch", "Segment", "attention", "backends", "merge", "shared_attention"):
    getattr(styleattn, name)
heavy = [name for name in ("triton", "diffusers", "transformers") if name in sys.modules]
print(heavy, sorted(set(asked) - {"STYLEATTN_BACKEND"}))
"""


def test_import_is_light() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT_PROBE], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[] []"
