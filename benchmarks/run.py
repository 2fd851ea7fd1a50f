"""The microbenchmarks: every contestant on every shape, checked, interleaved, and kept as CSV rows.

styleattn bench --shapes 'sdxl-*' --dtype bfloat16 --threads 1
styleattn bench --list
styleattn bench --compare HEAD~1 --shapes sdxl-1024
styleattn bench --plot out
styleattn bench --tune --shapes 'sdxl-*' --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from measure import Measured, limits, measure
from providers import PROVIDERS, Provider
from results import RESULTS, Row, machine, save
from shapes import SHAPES, SIZES, Problem, Shape
from timing import CLOCKS, clocks

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What to measure, in which order."""

    shapes: tuple[Shape, ...]
    providers: tuple[Provider, ...]
    dtypes: tuple[torch.dtype, ...]
    threads: tuple[int, ...]
    size: str
    device: torch.device
    rounds: int = 7
    seconds: float = 60.0
    clocks: tuple[str, ...] = ()
    limits: bool = True

    def problems(self) -> Iterator[tuple[int, torch.dtype, Problem]]:
        """Every (threads, dtype, problem)."""
        for threads in self.threads:
            for dtype in self.dtypes:
                for shape in self.shapes:
                    yield threads, dtype, shape.at(self.size)


def matching(patterns: Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """The names that match any pattern, in the order of the names.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"no {what} matches {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def run(plan: Plan, output: Path | None, report: bool = True) -> list[Row]:
    """Measure a plan; rows are saved shape by shape, so an interrupted run keeps what it has."""
    rows: list[Row] = []
    for threads in plan.threads if plan.limits else ():
        torch.set_num_threads(threads)
        for dtype in plan.dtypes:
            rows += limits(dtype, plan.device, plan.clocks, plan.rounds)
    if output:
        save(output, rows)
    told: dict[str, list[str]] = {}
    for threads, dtype, problem in plan.problems():
        torch.set_num_threads(threads)
        measured = measure(
            problem,
            dtype,
            plan.providers,
            device=plan.device,
            wanted_clocks=plan.clocks,
            rounds=plan.rounds,
            time_limit=plan.seconds,
        )
        if output:
            save(output, measured.rows)
        if report:
            _report(problem, dtype, threads, measured, told)
        rows += measured.rows
    return rows


def _report(
    problem: Problem,
    dtype: torch.dtype,
    threads: int,
    measured: Measured,
    told: dict[str, list[str]],
) -> None:
    p = problem
    print(
        f"\n{p.name} ({p.size}: batch {p.batch}, heads {p.heads}, tokens {p.length}, "
        f"head_dim {p.head_dim}), {str(dtype).removeprefix('torch.')}, {threads} threads"
    )
    for row in measured.rows:
        times = row.status
        if row.median_ms is not None:
            times = f"{row.median_ms:10.3f} ms  min {row.min_ms:10.3f}"
            times += f"  ±{100 * (row.spread or 0):3.0f} %  {row.gflops:8.1f} GFLOP/s"
        print(f"  {row.provider:<18} {row.clock:<7} error {row.error:.1e}  {times}")
    for name, reasons in measured.absent.items():
        if told.get(name) != reasons:
            print(f"  {name:<18} absent: {'; '.join(reasons)}")
            told[name] = reasons
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="styleattn bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["*"], metavar="PATTERN", help="names, with wildcards")
    add("--providers", nargs="+", metavar="PATTERN", help="names, with wildcards")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--threads", nargs="+", type=int, help="of PyTorch; default: its own choice")
    add("--size", choices=SIZES, help="default: real on a GPU, cpu on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--clock", nargs="+", choices=list(CLOCKS), help="default: wall; events and graph on CUDA")
    add("--rounds", type=int, default=7, help="samples of each contestant")
    add("--seconds", type=float, default=60.0, help="per shape, once there are 5 rounds")
    add("--output", type=Path, help="the CSV; default: benchmarks/results/<machine>.csv")
    add("--no-limits", action="store_true", help="without the machine's product and copy")
    add("--no-save", action="store_true", help="print only")
    add("--list", action="store_true", help="shapes and contestants")
    add("--compare", metavar="REV", help="this tree against another commit, interleaved")
    add("--tune", action="store_true", help="find the fastest choices; prints the table's diff")
    add("--plot", type=Path, metavar="DIR", help="figures and the table, from the CSV alone")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    device = torch.device(options.device)
    usual = [name for name, provider in PROVIDERS.items() if provider.usual]
    chosen = usual
    if options.providers:
        chosen = matching(options.providers, PROVIDERS, "provider")
    clocks(device, options.clock or (), options.threads or [torch.get_num_threads()])
    return Plan(
        shapes=tuple(SHAPES[n] for n in matching(options.shapes, SHAPES, "shape")),
        providers=tuple(PROVIDERS[n] for n in chosen),
        dtypes=tuple(getattr(torch, name) for name in options.dtype),
        threads=tuple(options.threads or [torch.get_num_threads()]),
        size=options.size or ("real" if device.type == "cuda" else "cpu"),
        device=device,
        rounds=options.rounds,
        seconds=options.seconds,
        clocks=tuple(options.clock or ()),
        limits=not options.no_limits,
    )


def _list() -> None:
    for shape in SHAPES.values():
        p = shape.at("real")
        print(
            f"{shape.name:<30} {p.kind:<10} batch {p.batch:>2}  heads {p.heads:>2}  "
            f"tokens {p.length:>4}  keys {'+'.join(map(str, p.keys)) or p.key_tokens:>12}  "
            f"head_dim {p.head_dim:>3}  {p.flops_exact / 1e9:8.1f} GFLOP"
        )
    print("\n" + "\n".join(f"{p.name:<20} {p.group}" for p in PROVIDERS.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks' command line: 0 done, 1 a contestant of ours failed or became slower."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        _list()
        return 0
    try:
        plan = _plan(options)
    except (ValueError, RuntimeError) as problem:
        parser.error(str(problem))
    output = options.output or RESULTS / f"{machine(plan.device)}.csv"
    if options.plot:
        from plot import draw

        try:
            print(draw(output, options.plot))
        except ValueError as problem:
            parser.error(str(problem))
        return 0
    if options.tune:
        from tune import report

        todo = [(dtype, problem) for _, dtype, problem in plan.problems()]
        return int(not report(todo, plan.device, plan.rounds, plan.seconds))
    if options.compare:
        from compare import Failed, compare

        try:
            return int(compare(options.compare, plan) > 0)
        except Failed as problem:
            parser.error(str(problem))
    rows = run(plan, None if options.no_save else output)
    return int(any(row.group == "ours" and row.status != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
