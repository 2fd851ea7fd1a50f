"""Clocks: the wall for CPUs, events and graph replay for CUDA. All contestants are interleaved.

A contestant is a list of calls, one for each of several equal sets of inputs, used in turn: on a
GPU a call must not find its own inputs in the cache only because it has just used them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]
SAMPLE_SECONDS = 5e-3
"""A wall-clock sample repeats a call until it lasts about this long."""
FLUSH_BYTES = 256 << 20
"""Zeroed before every call of the cold clock: larger than any GPU's L2."""
GRAPH_CALLS = 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over some rounds; spread is the interquartile range over the
    median."""

    median_ms: float
    min_ms: float
    spread: float
    rounds: int


def summary(milliseconds: Sequence[float]) -> Timing:
    """The timing of one contestant from its samples."""
    median = statistics.median(milliseconds)
    low, _, high = (
        statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else (median,) * 3
    )
    return Timing(median, min(milliseconds), (high - low) / median, len(milliseconds))


def interleaved(
    samplers: Mapping[str, Callable[[int], float]], rounds: int, time_limit: float = math.inf
) -> dict[str, Timing]:
    """Sample every contestant once per round, in rotating order.

    Args:
        samplers: take the round, give milliseconds per call.
        time_limit: seconds after which no round is begun, once there are five.
    """
    order = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in order}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - start > time_limit:
            break
        for name in order:
            taken[name].append(samplers[name](done))
        order = order[1:] + order[:1]
    return {name: summary(samples) for name, samples in taken.items() if samples}


def _host(calls: Calls, now: Callable[[], float]) -> Callable[[int], float]:
    """A sampler by a clock of the CPU, of a call that the gate has warmed up; repeats a short
    one."""
    start = now()
    calls[0]()
    once = now() - start
    repeats = max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(once, 1e-5))))

    def sample(done: int) -> float:
        call = calls[done % len(calls)]
        begin = now()
        for _ in range(repeats):
            call()
        return 1e3 * (now() - begin) / repeats

    return sample


def wall(calls: Calls) -> Callable[[int], float]:
    """A sampler by the wall clock."""
    return _host(calls, time.perf_counter)


def cpu_time(calls: Calls) -> Callable[[int], float]:
    """A sampler by the processor time of this process: for one thread on a machine that others
    use too, whose turns the wall clock would count."""
    return _host(calls, time.process_time)


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def events(calls: Calls) -> Callable[[int], float]:
    """A sampler by CUDA events with a cold L2: what one call costs between other layers. Where the
    kernels are shorter than their launches, it is the launches that are measured."""
    flush = _flush()
    for call in (*calls, *calls):
        call()
    torch.cuda.synchronize()

    def sample(done: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        calls[done % len(calls)]()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)

    return sample


def graph(calls: Calls, repeats: int = GRAPH_CALLS) -> Callable[[int], float]:
    """A sampler by replay of a CUDA graph of some calls over all sets of inputs: the kernels alone,
    without launches.

    Raises:
        RuntimeError: a call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, *calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(repeats):
            calls[i % len(calls)]()
    captured.replay()
    torch.cuda.synchronize()

    def sample(_: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        captured.replay()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / repeats

    return sample


CLOCKS: dict[str, Callable[[Calls], Callable[[int], float]]] = {
    "wall": wall,
    "cpu-time": cpu_time,
    "events": events,
    "graph": graph,
}


def clocks(
    device: torch.device, wanted: Sequence[str] = (), threads: Sequence[int] = (1,)
) -> tuple[str, ...]:
    """The clocks of a device: those wanted, else the usual ones.

    Raises:
        ValueError: a clock that cannot time the device, or cannot time several threads.
    """
    for clock in wanted:
        if (clock in ("events", "graph")) != (device.type == "cuda"):
            raise ValueError(f"the clock {clock!r} cannot time {device.type}")
        if clock == "cpu-time" and max(threads) > 1:
            raise ValueError("the clock 'cpu-time' adds up threads: one thread only")
    return tuple(wanted) or (("events", "graph") if device.type == "cuda" else ("wall",))


def input_sets(device: torch.device, bytes_moved: int) -> int:
    """How many sets of inputs outgrow the cache of the device."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(8, math.ceil(3 * cache / bytes_moved)))
