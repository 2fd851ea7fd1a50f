"""Tuning: which backend and which tile are fastest for a call. Prints the diff to the table that
`backend=None` consults; nothing is written, and no call of the library ever does this by itself.

    styleattn bench --tune --shapes 'sdxl-*-shared-b4' --dtype bfloat16

A candidate that does not compile, or whose result is outside the error budget, is out. The two-call
form of the `torch` backend takes part: where it wins, the row says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Case
from shapes import Problem
from timing import CLOCKS, clocks, input_sets, interleaved

from styleattn import measured
from styleattn.backends import arch_of, load
from styleattn.measured import Choice, Key

TABLE = Path(measured.__file__)
START = "TABLE: dict[Key, Choice] = {"
TILES = tuple(
    (m, n, warps, stages)
    for m, warps in ((64, 4), (128, 4), (128, 8))
    for n in (32, 64, 128)
    for stages in (1, 2, 3)
)
SMALL = ((64, 32, 1, 1), (32, 32, 1, 1))  # for the interpreter, which knows no speed


@dataclass(frozen=True)
class Found:
    """What tuning found for one key: the choice, its milliseconds, and those of the others."""

    key: Key
    choice: Choice
    milliseconds: float
    others: dict[Choice, float]


@contextmanager
def chosen(key: Key, choice: Choice | None) -> Iterator[None]:
    """With a row of the table in force; None: without one."""
    before = dict(measured.TABLE)
    measured.TABLE.pop(key, None)
    if choice is not None:
        measured.TABLE[key] = choice
    try:
        yield
    finally:
        measured.TABLE.clear()
        measured.TABLE.update(before)


def key_of(problem: Problem, dtype: torch.dtype, arch: str) -> Key:
    """The row of the table that a problem's call looks up."""
    longest = max(problem.keys, default=problem.length)
    rows = problem.batch * problem.heads
    return measured.key_of(arch, dtype, problem.head_dim, problem.length, longest, rows)


def candidates(arch: str) -> list[Choice]:
    """Every choice that is tried, the static one first (a tile of None); on a CPU the compiled
    kernels against the library's."""
    compiled = load("cpu")
    if compiled.available()[0] and arch in compiled.isas():
        return [Choice("cpu"), Choice("torch")]
    tiles = SMALL if arch == "interpreter" else TILES
    return [Choice("triton"), Choice("torch"), *(Choice("triton", t) for t in tiles)]


def tune(
    problem: Problem, dtype: torch.dtype, device: torch.device, rounds: int, seconds: float
) -> Found | None:
    """The fastest choice for a problem; None where the kernels cannot run it."""
    sets = input_sets(device, problem.bytes_moved(dtype.itemsize))
    cases = [Case.draw(problem, dtype, device, seed) for seed in range(sets)]
    arch = arch_of(cases[0].tensors["query"])
    if arch is None:
        return None
    key = key_of(problem, dtype, arch)
    clock = CLOCKS[clocks(device)[-1]]
    samplers, names = {}, {}
    with torch.no_grad():
        for i, choice in enumerate(candidates(arch)):
            with chosen(key, choice):
                try:
                    if not cases[0].error(cases[0].ours(choice.backend)) <= cases[0].budget:
                        continue
                    calls = [lambda c=c, b=choice.backend: c.ours(b) for c in cases]
                    sampler = clock(calls)  # a graph is captured here, under the choice
                except Exception as problem_:  # too many registers, too much shared memory
                    print(f"  {choice}: {str(problem_).splitlines()[0][:80]}", flush=True)
                    continue
            samplers[str(i)], names[str(i)] = _under(key, choice, sampler), choice
        timings = interleaved(samplers, rounds, seconds)
    times = {names[i]: t.median_ms for i, t in timings.items()}
    if not times:
        return None
    best = min(times, key=lambda c: times[c])
    return Found(key, best, times[best], times)


def _under(key: Key, choice: Choice, sampler):  # type: ignore[no-untyped-def]
    def sample(done: int) -> float:
        with chosen(key, choice):
            return float(sampler(done))

    return sample


def diff(found: Sequence[Found]) -> str:
    """The change of the table's file that takes over what was found."""
    text = TABLE.read_text(encoding="utf-8")
    rows = dict(measured.TABLE) | {f.key: f.choice for f in found}
    head, _, rest = text.partition(START)
    tail = rest.partition("}\n")[2]
    lines = []
    for key in sorted(rows):
        choice = rows[key]
        shown = f'Choice("{choice.backend}"' + (f", {choice.tile})" if choice.tile else ")")
        arguments = ", ".join(f'"{x}"' if isinstance(x, str) else str(x) for x in key)
        lines.append(f"    Key({arguments}): {shown},\n")
    new = head + START + ("\n" + "".join(lines) if lines else "") + "}\n" + tail
    name = "styleattn/measured.py"
    changed = difflib.unified_diff(
        text.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}"
    )
    return "".join(changed)


def report(
    problems: Sequence[tuple[torch.dtype, Problem]],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> list[Found]:
    """Tune problems one by one; print each choice and, at the end, the diff."""
    found = []
    for dtype, problem in problems:
        result = tune(problem, dtype, device, rounds, seconds)
        if result is None:
            print(f"{problem.name}: the kernels cannot run it here", flush=True)
            continue
        found.append(result)
        times = {c.backend: t for c, t in result.others.items() if c.tile is None}
        shown = [f"{name} {t:.4f} ms" for name, t in times.items()]
        print(
            f"{problem.name}: {result.choice.backend} {result.choice.tile or ''} "
            f"{result.milliseconds:.4f} ms ({', '.join(shown)})",
            flush=True,
        )
    print("\n" + (diff(found) or "the table stays as it is"), flush=True)
    return found
