"""One step of SDXL (2.6 B) and FLUX (12 B) at full size with random weights: plain, official, ours.

    python benchmarks/end_to_end.py                                     all, on a GPU
    python benchmarks/end_to_end.py --models sdxl --batch 4 --modes eager graph
    python benchmarks/end_to_end.py --tiny                              the same path, on a CPU

A step is one call of the denoiser; its batch counts images (SDXL runs two rows for each). With
StyleAligned the first image is the reference. `tax` is the time of a step under a method over that
of the plain one. Before anything is timed ours is compared with the official route on the same
inputs; the budget is measured too: BUDGET times what another attention kernel changes in the
plain model. Modes: `eager`; `compile` (diffusers' repeated blocks, compiled); `graph` (replay of a
CUDA graph of the eager step). Contestants take turns in `eager` and `graph`; under `compile` they
come one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import peak_mib
from models import Model, models
from results import RESULTS, StepRow, environment, machine, save
from routes import METHODS, Route, plain
from timing import Timing, events, graph, interleaved, wall
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCHES = (1, 2, 4, 8, 16)
MODES = ("eager", "compile", "graph")
BUDGET = 8.0
ROUTES = ("official", "ours")


@dataclass(frozen=True)
class Contestant:
    """A method by a route, or the plain model."""

    method: str
    route: str
    enter: Route


@dataclass(frozen=True)
class Setting:
    """A model with its inputs, on a device."""

    model: Model
    denoiser: Any
    inputs: dict[str, Any]
    batch: int
    device: torch.device

    @contextlib.contextmanager
    def step(self, contestant: Contestant) -> Iterator[Callable[[], Tensor]]:
        """The step of a contestant."""
        with torch.no_grad(), contestant.enter(self.denoiser, self.model, self.inputs) as given:
            yield lambda: self.denoiser(**given, return_dict=False)[0]

    def result(self, contestant: Contestant) -> Tensor:
        """One result, in fp64."""
        with self.step(contestant) as step:
            return step().double()


def contestants(model: Model, methods: Sequence[str], batch: int) -> list[Contestant]:
    """The plain model and both routes of every method; StyleAligned needs two images."""
    found = [Contestant("", "plain", plain)]
    for method, pair in METHODS[model.name].items():
        if method in methods and (batch > 1 or method != "style_aligned"):
            found += [Contestant(method, r, e) for r, e in zip(ROUTES, pair, strict=True)]
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error, root mean square."""
    return float((a - b).norm() / b.norm())


def checked(setting: Setting, chosen: Sequence[Contestant]) -> dict[str, tuple[float, float, str]]:
    """Per method: the error of ours against the official route, its budget, and what is wrong."""
    base = setting.result(chosen[0])
    with sdpa_kernel(SDPBackend.MATH):
        noise = distance(setting.result(chosen[0]), base)
    budget = BUDGET * max(noise, torch.finfo(setting.denoiser.dtype).eps)
    found = {}
    for official, ours in zip(chosen[1::2], chosen[2::2], strict=True):
        theirs, mine = setting.result(official), setting.result(ours)
        error, wrong = distance(mine, theirs), ""
        if not error <= budget:
            wrong = f"error {error:.1e} is above the budget {budget:.1e}"
        elif distance(theirs, base) <= error:
            wrong = "the style is not to be seen"
        found[ours.method] = (error, budget, wrong)
    return found


def _eager(setting: Setting, contestant: Contestant) -> Callable[[int], float]:
    """A sampler that puts the contestant in, warms it up, times one step and takes it out."""

    def sample(done: int) -> float:
        with setting.step(contestant) as step:
            step()
            if setting.device.type != "cuda":
                start = time.perf_counter()
                step()
                return 1e3 * (time.perf_counter() - start)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            torch.cuda.synchronize()
            return first.elapsed_time(last)

    return sample


def _graph(setting: Setting, contestant: Contestant) -> Callable[[int], float]:
    if setting.device.type != "cuda":
        raise RuntimeError(f"no graphs on {setting.device.type}")
    with setting.step(contestant) as step:
        return graph([step], repeats=1)


def _compiled(setting: Setting, contestant: Contestant, rounds: int) -> Timing:
    """The timing of a contestant alone, its repeated blocks compiled."""
    clock = events if setting.device.type == "cuda" else wall
    with setting.step(contestant) as step:
        setting.denoiser.compile_repeated_blocks()
        try:
            step()
            return interleaved({"": clock([step])}, rounds)[""]
        finally:
            for module in setting.denoiser.modules():
                module._compiled_call_impl = None
            torch.compiler.reset()


def timed(
    setting: Setting, chosen: Sequence[Contestant], mode: str, rounds: int, deadline: float
) -> tuple[dict[Contestant, Timing], dict[Contestant, str]]:
    """The timings of a mode, and why some have none."""
    failed: dict[Contestant, str] = {}
    samplers: dict[str, Callable[[int], float]] = {}
    timings: dict[Contestant, Timing] = {}
    for i, contestant in enumerate(chosen):
        if time.monotonic() > deadline:
            failed[contestant] = "out of time"
            continue
        try:
            if mode == "compile":
                timings[contestant] = _compiled(setting, contestant, rounds)
            else:
                make = _eager if mode == "eager" else _graph
                samplers[str(i)] = make(setting, contestant)
        except Exception as problem:  # memory, capture, a compiler: a result, not an end
            first = (str(problem).strip().splitlines() or [""])[0]
            failed[contestant] = f"{type(problem).__name__}: {first[:160]}"
    left = max(0.0, deadline - time.monotonic())
    for name, timing in interleaved(samplers, rounds, left).items():
        timings[chosen[int(name)]] = timing
    return timings, failed


def rows_of(
    setting: Setting,
    chosen: Sequence[Contestant],
    modes: Sequence[str],
    rounds: int,
    deadline: float,
    size: str,
) -> Iterator[list[StepRow]]:
    """The rows of one model and batch, mode by mode, behind the comparison."""
    errors = checked(setting, chosen)
    for method, (error, budget, wrong) in errors.items():
        print(f"  {method}: ours against official {error:.1e} (budget {budget:.1e}) {wrong}")
    right = [c for c in chosen if c.route != "ours" or not errors[c.method][2]]
    peaks = {}
    for contestant in right:
        with setting.step(contestant) as step:
            step()
            peaks[contestant] = peak_mib(step, setting.device)
    where = environment(setting.device)
    parameters = sum(p.numel() for p in setting.denoiser.parameters())
    dtype = str(setting.denoiser.dtype).removeprefix("torch.")
    for mode in modes:
        timings, failed = timed(setting, right, mode, rounds, deadline)
        base = timings.get(chosen[0])
        rows = []
        for c in chosen:
            t, (error, budget, wrong) = timings.get(c), errors.get(c.method, (0.0, 0.0, ""))
            why = failed.get(c, wrong if c.route == "ours" else "")
            rows.append(
                StepRow(
                    size=size,
                    mode=mode,
                    threads=torch.get_num_threads(),
                    dtype=dtype,
                    model=setting.model.name,
                    method=c.method,
                    route=c.route,
                    batch=setting.batch,
                    status="ok" if t else f"FAILED: {why}",
                    median_ms=t and t.median_ms,
                    min_ms=t and t.min_ms,
                    spread=t and t.spread,
                    rounds=t.rounds if t else 0,
                    tax=t.median_ms / base.median_ms if t and base else None,
                    error=error if c.route == "ours" else None,
                    budget=budget if c.route == "ours" else None,
                    peak_mib=peaks.get(c),
                    parameters=parameters,
                    **where,
                )
            )
        yield rows


def report(rows: Sequence[StepRow]) -> None:
    for row in rows:
        name = f"{row.model} batch {row.batch:>2} {row.mode:<7} {row.method:<13} {row.route:<8}"
        if row.median_ms is None:
            print(f"  {name} {row.status}", flush=True)
            continue
        peak = "" if row.peak_mib is None else f"  peak {row.peak_mib:9.1f} MiB"
        tax = "" if row.tax is None else f"  tax {row.tax:5.3f}"
        print(f"  {name} {row.median_ms:10.3f} ms{tax}{peak}", flush=True)


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within: what is made without a word about it is made there, in that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def run(options: argparse.Namespace, output: Path | None) -> list[StepRow]:
    """Measure what the options say; rows are saved mode by mode."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    deadline = time.monotonic() + options.seconds
    found: list[StepRow] = []
    for model in models(options.tiny).values():
        if model.name not in options.models or time.monotonic() > deadline:
            continue
        torch.manual_seed(0)
        with made_on(device, dtype):
            denoiser = model.build()
        for batch in options.batch:
            if time.monotonic() > deadline:
                break
            with made_on(device, dtype):
                inputs = model.inputs(batch, torch.Generator().manual_seed(batch))
            chosen = contestants(model, options.methods, batch)
            setting = Setting(model, denoiser, inputs, batch, device)
            size = "tiny" if options.tiny else "real"
            print(f"\n{model.name}, batch {batch}, {options.dtype}", flush=True)
            try:
                modes = (options.modes, options.rounds, deadline, size)
                for rows in rows_of(setting, chosen, *modes):
                    report(rows)
                    found += rows
                    if output:
                        save(output, rows, StepRow)
            except torch.OutOfMemoryError as problem:
                print(f"  no memory: {str(problem).splitlines()[0]}", flush=True)
        del denoiser
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def parser() -> argparse.ArgumentParser:
    """Its command line."""
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    names = sorted({name for methods in METHODS.values() for name in methods})
    add("--models", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--methods", nargs="+", default=names, choices=names)
    add("--batch", nargs="+", type=int, help="images; default: 1 to 16, with --tiny 1 and 2")
    add("--modes", nargs="+", choices=MODES, help="default: eager; and graph on a GPU")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--device", default="cuda" if gpu else "cpu")
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=3600.0, help="after which nothing new is begun")
    add("--tiny", action="store_true", help="the same structure with small numbers")
    add("--output", type=Path, help="the CSV; default: benchmarks/results/<machine>-steps.csv")
    add("--no-save", action="store_true", help="print only; --tiny never saves by itself")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: ours differs from the official route, or failed."""
    options = parser().parse_args(arguments)
    gpu = torch.device(options.device).type == "cuda"
    options.batch = options.batch or ((1, 2) if options.tiny else BATCHES)
    options.modes = options.modes or (("eager", "graph") if gpu else ("eager",))
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    output = options.output
    if output is None and not (options.no_save or options.tiny):
        output = RESULTS / f"{machine(torch.device(options.device))}-steps.csv"
    rows = run(options, None if options.no_save else output)
    wrong = [row for row in rows if row.route == "ours" and row.status != "ok"]
    return int(any("out of time" not in row.status for row in wrong))


if __name__ == "__main__":
    raise SystemExit(main())
