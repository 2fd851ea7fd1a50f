"""Everything that a GPU is wanted for, in one command and ten minutes: build, tests, benchmark,
tuning, whole steps, the table.

    python benchmarks/gpu.py                        all stages, each in its box of time
    python benchmarks/gpu.py --stages build tests   some of them
    python benchmarks/gpu.py --out DIR              logs, rows and the summary go there
    python benchmarks/gpu.py --dry-run              the same on a CPU, under Triton's interpreter

Every stage is a process that is ended when its box is used up; what it has saved until then stays:
rows are written shape by shape, the summary behind every stage. Stages do not depend on each other.
The first one compiles a kernel and compares it with fp64 in a few seconds: where that fails, the
rest would be of no use, and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
SHAPES = (
    "sdxl-4096-shared-b4",
    "sdxl-1024-shared-b4",
    "sdxl-4096",
    "flux-4608",
    "sdxl-4096-shared-b4-shift",
    "sdxl-4096-ip-16",
    "flux-redux-5337",
    "sdxl-1024-shared-b8",
    "sdxl-1024-shared-b16",
    "sdxl-4096-shared-b8",
)
PEERS = (
    "ours-triton",
    "ours-fast",
    "ours-torch",
    "official",
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-efficient",
    "fa3",
    "fa4",
    "sage",
)
CHECKED = (
    ("sdxl-1024-shared-b2", "ours-triton"),
    ("sdxl-1024-ip-4", "ours-triton"),
    ("sdxl-1024-shared-b2", "ours-fast"),
)
COMPILED = ("ours-triton", "official-compiled", "flex", "flex-merged")  # minutes a shape


@dataclass(frozen=True)
class Stage:
    """A part of the run: a script (or pytest) with arguments, and the seconds that it may take."""

    name: str
    seconds: float
    script: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        if self.script == "pytest":
            return [sys.executable, "-m", "pytest", *self.arguments]
        return [sys.executable, str(HERE / self.script), *self.arguments]


def stages(out: Path, minutes: float) -> list[Stage]:
    """The stages on a GPU; their boxes share the minutes."""
    rows, steps = str(out / "rows.csv"), str(out / "steps.csv")
    unit = 6.0 * minutes  # a tenth of the time, in seconds
    half = ("--dtype", "bfloat16")
    kept = (*half, "--rounds", "7", "--output", rows)
    bench = ("--shapes", *SHAPES, "--providers", *PEERS, "--seconds", "3", *kept)
    slow = ("--shapes", *SHAPES[:3], "--providers", *COMPILED, "--no-limits", *kept)
    tune = ("--tune", "--shapes", *SHAPES[:4], *half, "--seconds", "3", "--rounds", "5")
    sdxl = ("--models", "sdxl", "--batch", "4", "1", "8", "16", "--seconds", f"{1.2 * unit:.0f}")
    flux = ("--models", "flux", "--batch", "2", "1", "4", "--seconds", f"{0.7 * unit:.0f}")
    gpu_tests = ("-q", "-x", "-m", "gpu", "--import-mode=importlib", "tests/kernels/test_gpu.py")
    return [
        Stage("build", 0.6 * unit, "gpu.py", ("--check", "cuda")),
        Stage("tests", 1.2 * unit, "pytest", gpu_tests),
        Stage("benchmark", 1.9 * unit, "run.py", bench),
        Stage("sdxl", 1.5 * unit, "end_to_end.py", (*sdxl, "--output", steps)),
        Stage("flux", 1.0 * unit, "end_to_end.py", (*flux, "--output", steps)),
        Stage("tuning", 1.7 * unit, "run.py", tune),
        Stage("compiled", 1.8 * unit, "run.py", slow),
        Stage("table", 0.3 * unit, "gpu.py", ("--table", rows, steps)),
    ]


def dry_stages(out: Path) -> list[Stage]:
    """The same stages on a CPU: the interpreter, tiny shapes."""
    rows, steps = str(out / "rows.csv"), str(out / "steps.csv")
    tiny = ("--size", "tiny", "--device", "cpu", "--dtype", "float32", "--threads", "1")
    one = (*tiny, "--shapes", "sdxl-1024-shared-b2", "--rounds", "1", "--seconds", "0")
    few = ("--providers", "ours-triton", "official")
    test = "tests/kernels/test_attention.py::test_empty_batch"
    step = ("--tiny", "--batch", "2", "--models", "flux", "--rounds", "1", "--output", steps)
    return [
        Stage("build", 60, "gpu.py", ("--check", "cpu")),
        Stage("tests", 60, "pytest", ("-q", "--import-mode=importlib", test)),
        Stage("benchmark", 60, "run.py", (*one, *few, "--no-limits", "--output", rows)),
        Stage("flux", 60, "end_to_end.py", step),
        Stage("tuning", 60, "run.py", (*one, "--tune")),
        Stage("table", 60, "gpu.py", ("--table", rows, steps)),
    ]


def check(device: str) -> int:
    """What is here, and one call of each kernel against fp64. 0: the kernels are right."""
    import torch
    from cases import Case
    from providers import PROVIDERS
    from results import isa, machine
    from shapes import SHAPES as KNOWN

    import styleattn

    where = torch.device(device)
    print(f"{machine(where)} {isa(where)} torch {torch.__version__}\n{styleattn.backends()}")
    wrong = 0
    for name, provider in CHECKED:
        start = time.perf_counter()
        # the interpreter multiplies bfloat16 wrongly
        half = torch.float16 if device == "cpu" else torch.bfloat16
        dtype = half if device != "cpu" or provider == "ours-fast" else torch.float32
        case = Case.draw(KNOWN[name].at("tiny" if device == "cpu" else "real"), dtype, where)
        error = case.error(PROVIDERS[provider].prepare(case)())
        budget = PROVIDERS[provider].budget(case)
        wrong += not error <= budget
        taken = time.perf_counter() - start
        told = f"error {error:.1e}, budget {budget:.1e}, {taken:.1f} s"
        print(f"{name} {provider}: {told}", flush=True)
    return int(wrong > 0)


def table(rows: Path, steps: Path) -> int:
    """What was measured: ours against every peer, and the tax of every method."""
    from plot import cost
    from results import StepRow, load

    found = [r for r in load(rows) if r.status == "ok" and r.group != "limit"]
    for key in dict.fromkeys((r.shape, r.dtype, r.clock) for r in found):
        mine = sorted((r for r in found if (r.shape, r.dtype, r.clock) == key), key=cost)
        ours = min((cost(r) for r in mine if r.group == "ours"), default=None)
        print(f"\n{' '.join(key)}")
        for r in mine:
            ratio = "" if ours is None else f"  {cost(r) / ours:6.2f} x ours"
            flops = "" if r.gflops is None else f"  {r.gflops / 1e3:7.1f} TFLOP/s"
            print(f"  {r.provider:<18} {1e3 * cost(r):10.1f} us{flops}{ratio}  error {r.error:.1e}")
    for row in load(rows):
        if row.status != "ok":
            print(f"  {row.shape} {row.provider}: {row.status}")
    print()
    for s in load(steps, StepRow):
        name = f"{s.model} batch {s.batch} {s.mode} {s.method or '-'} {s.route}"
        took = s.status if s.median_ms is None else f"{s.median_ms:.2f} ms, tax {s.tax or 0:.3f}"
        print(f"  {name}: {took}")
    return 0


def _inside(stage: Stage) -> int:
    """A stage in this process, as a script is run."""
    if stage.script == "pytest":
        import pytest

        return int(pytest.main(list(stage.arguments)))
    before = sys.argv
    sys.argv = [str(HERE / stage.script), *stage.arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def _process(stage: Stage, log: Path) -> int | None:
    """The exit status of a stage in a process of its own; None: its time was up."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    with log.open("w", encoding="utf-8") as file:
        told = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment}
        try:
            done = subprocess.run(stage.command, timeout=stage.seconds, **told)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            return None
    return int(done.returncode)


def run(todo: Sequence[Stage], out: Path, inside: bool) -> dict[str, Any]:
    """All stages; the summary is written behind each of them."""
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    for stage in todo:
        start, log = time.monotonic(), out / f"{stage.name}.log"
        print(f"\n== {stage.name}, at most {stage.seconds:.0f} s", flush=True)
        code = _inside(stage) if inside else _process(stage, log)
        state = "out of time" if code is None else "ok" if code == 0 else f"exit {code}"
        summary[stage.name] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
        (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        if not inside:
            print(log.read_text(encoding="utf-8", errors="replace")[-6000:])
        print(f"== {stage.name}: {state}, {summary[stage.name]['seconds']} s", flush=True)
        if stage.name == "build" and code != 0:
            break
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every stage went well or used up its time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "out" / "gpu", help="logs, rows, summary")
    add("--stages", nargs="+", metavar="NAME", help="only these")
    add("--minutes", type=float, default=9.5, help="for all stages together")
    add("--dry-run", action="store_true", help="on a CPU, under Triton's interpreter")
    add("--check", choices=("cpu", "cuda"), help=argparse.SUPPRESS)
    add("--table", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.check:
        return check(options.check)
    if options.table:
        return table(*options.table)
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    todo = dry_stages(options.out) if options.dry_run else stages(options.out, options.minutes)
    names = [stage.name for stage in todo]
    unknown = set(options.stages or ()) - set(names)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    todo = [stage for stage in todo if stage.name in (options.stages or names)]
    summary = run(todo, options.out.resolve(), options.dry_run)
    return int(any(s["state"].startswith("exit") for s in summary.values()))


if __name__ == "__main__":
    raise SystemExit(main())
