"""Measure a shape: the correctness gate first, then every contestant that passed, interleaved."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from cases import Case
from providers import Provider
from results import Row, environment
from shapes import Problem
from timing import CLOCKS, Timing, clocks, input_sets, interleaved, summary

GEMM = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 256 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Contestant:
    """A provider on a case after the gate. `failed` says why it gets no time."""

    provider: Provider
    run: Callable[[], torch.Tensor] | None
    error: float = float("inf")
    failed: str = ""
    peak_mib: float | None = None


@dataclass
class Measured:
    """The rows of one shape, and who could not take part and why."""

    rows: list[Row] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)


def admit(provider: Provider, case: Case) -> Contestant:
    """The gate: run once, compare with fp64. Wrong results and exceptions fail."""
    try:
        run = provider.prepare(case)
        error = case.error(run())
    except Exception as problem:  # whatever a foreign kernel raises is its failure, not ours
        first = (str(problem).strip().splitlines() or [""])[0]
        return Contestant(provider, None, failed=f"{type(problem).__name__}: {first[:200]}")
    if not error <= provider.budget(case):
        failed = f"error {error:.1e} is above the budget {provider.budget(case):.1e}"
        return Contestant(provider, None, error, failed)
    return Contestant(provider, run, error, peak_mib=peak_mib(run, case.device))


def _kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", _STATUS.read_text(encoding="ascii"))
    return int(found[1]) if found else 0


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Memory one call holds at its peak beyond what was there, its result included. On a CPU it is
    the process's high-water mark, which Linux alone can reset: None elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _kib("VmRSS")
    run()
    return max(0, _kib("VmHWM") - before) / 2**10


def measure(
    problem: Problem,
    dtype: torch.dtype,
    providers: Sequence[Provider],
    *,
    device: torch.device | str = "cpu",
    wanted_clocks: Sequence[str] = (),
    rounds: int = 7,
    time_limit: float = 60.0,
) -> Measured:
    """The rows of one problem in one dtype, at PyTorch's present number of threads.

    Args:
        wanted_clocks: names of `timing.CLOCKS`; the device's usual ones if empty.
        rounds: samples of every contestant.
        time_limit: seconds after which no further round is begun, once there are five.
    """
    device = torch.device(device)
    used = clocks(device, wanted_clocks, [torch.get_num_threads()])
    sets = input_sets(device, problem.bytes_moved(dtype.itemsize))
    cases = [Case.draw(problem, dtype, device, seed) for seed in range(sets)]
    measured = Measured()
    contestants = []
    with torch.no_grad():
        for provider in providers:
            reasons = provider.reasons(cases[0])
            if reasons:
                measured.absent[provider.name] = reasons
            else:
                contestants.append(admit(provider, cases[0]))
        row = partial(_row, problem, cases[0], environment(device))
        measured.rows += [row(c, used[0], None) for c in contestants if c.run is None]
        passed = {c.provider.name: c for c in contestants if c.run is not None}
        for clock in used:
            samplers = {}
            for name, c in passed.items():
                calls = [c.run, *(c.provider.prepare(case) for case in cases[1:])]
                try:
                    samplers[name] = CLOCKS[clock](calls)  # type: ignore[arg-type]
                except RuntimeError as problem_:
                    measured.absent[f"{name} by {clock}"] = [str(problem_).splitlines()[0]]
            timings = interleaved(samplers, rounds, time_limit)
            measured.rows += [row(passed[name], clock, t) for name, t in timings.items()]
    torch.compiler.reset()  # a compiled function keeps few shapes, and one number of threads
    return measured


def _row(
    problem: Problem,
    case: Case,
    where: dict[str, str],
    c: Contestant,
    clock: str,
    timing: Timing | None,
) -> Row:
    return Row(
        size=problem.size,
        clock=clock,
        threads=torch.get_num_threads(),
        dtype=str(case.dtype).removeprefix("torch."),
        shape=problem.name,
        provider=c.provider.name,
        group=c.provider.group,
        kind=problem.kind,
        batch=problem.batch,
        heads=problem.heads,
        length=problem.length,
        head_dim=problem.head_dim,
        keys="+".join(map(str, problem.keys)),
        references=problem.references,
        shift=problem.shift,
        status="ok" if timing else f"FAILED: {c.failed}",
        median_ms=timing.median_ms if timing else None,
        min_ms=timing.min_ms if timing else None,
        spread=timing.spread if timing else None,
        rounds=timing.rounds if timing else 0,
        error=c.error,
        budget=c.provider.budget(case),
        peak_mib=c.peak_mib,
        flops_exact=problem.flops_exact,
        flops_official=problem.flops_official,
        bytes=problem.bytes_moved(case.dtype.itemsize),
        gflops=problem.flops_exact / timing.median_ms / 1e6 if timing else None,
        **where,
    )


def limits(
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    wanted_clocks: Sequence[str] = (),
    rounds: int = 7,
) -> list[Row]:
    """The machine's own limits, for the roofline: a square matrix product, and a copy in memory."""
    device = torch.device(device)
    clock = clocks(device, wanted_clocks, [torch.get_num_threads()])[0]
    n = GEMM[device.type]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    source = torch.ones(COPY_BYTES // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    moved = 3 * n * n * dtype.itemsize
    want = a[:8].double() @ b.double()
    gemm_error = float(((a @ b)[:8].double() - want).norm() / want.norm())
    copy_error = float(not torch.equal(target.copy_(source), source))
    rows = []
    for name, call, flops, traffic, error in (
        ("gemm", lambda: a @ b, 2 * n**3, moved, gemm_error),
        ("copy", lambda: target.copy_(source), 0, 2 * COPY_BYTES, copy_error),
    ):
        sampler = CLOCKS[clock]([call])
        timing = summary([sampler(i) for i in range(min(rounds, 5))])
        rows.append(_limit_row(name, clock, dtype, device, timing, n, flops, traffic, error))
    return rows


def _limit_row(
    name: str,
    clock: str,
    dtype: torch.dtype,
    device: torch.device,
    timing: Timing,
    n: int,
    flops: int,
    moved: int,
    error: float,
) -> Row:
    budget = torch.finfo(dtype).eps * n**0.5
    return Row(
        size="real" if device.type == "cuda" else "cpu",
        clock=clock,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        shape=f"limit-{name}",
        provider="torch",
        group="limit",
        kind="limit",
        batch=1,
        heads=1,
        length=n if flops else 0,
        head_dim=n if flops else 0,
        keys="",
        references=0,
        shift=0.0,
        status="ok" if error <= budget else "FAILED: the result is wrong",
        median_ms=timing.median_ms,
        min_ms=timing.min_ms,
        spread=timing.spread,
        rounds=timing.rounds,
        error=error,
        budget=budget,
        peak_mib=None,
        flops_exact=flops,
        flops_official=flops,
        bytes=moved,
        gflops=flops / timing.median_ms / 1e6,
        **environment(device),
    )
