"""Two commits against each other: a process each, taking turns on the same inputs.

The other commit is checked out into a temporary worktree and its extension built there. Both
processes run this folder's benchmarks; only the package they import differs. Run as a script, this
file is such a process: a request per line on stdin, an answer per line on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import Case
from providers import PROVIDERS
from results import ROOT
from shapes import SHAPES
from timing import CLOCKS, clocks, summary

if TYPE_CHECKING:
    from run import Plan

THRESHOLD = 0.05
"""A contestant that became slower by more is flagged."""


class Failed(RuntimeError):
    """A step of the comparison that did not work, with the tool's last words."""


def _do(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])}: {(done.stderr or done.stdout).strip()[-500:]}")


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A worktree of a commit, its extension built in place, removed afterwards.

    Raises:
        Failed: no such commit, or its extension does not build.
    """
    with tempfile.TemporaryDirectory(prefix="styleattn-") as folder:
        tree = Path(folder) / "tree"
        _do(["git", "worktree", "add", "--detach", str(tree), revision], ROOT)
        try:
            if any(tree.glob("csrc/*.cpp")):
                _do([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
            yield tree
        finally:
            _do(["git", "worktree", "remove", "--force", str(tree)], ROOT)


class Worker:
    """A process that measures one tree's package."""

    def __init__(self, tree: Path, threads: int):
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,
        )
        loaded = self.ask()["package"]
        if Path(loaded).resolve().parent != (tree / "styleattn").resolve():
            raise Failed(f"the worker imported {loaded}, not the package of its tree")

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request (none: read the greeting) and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        if request:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed("a worker died")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def compare(revision: str, plan: Plan, threshold: float = THRESHOLD) -> int:
    """Print, for every shape and backend, the time of this tree over that of another commit.

    Returns:
        how many became slower by more than the threshold, or wrong.

    Raises:
        Failed: the other commit cannot be measured.
    """
    slower = 0
    names = [p.name for p in plan.providers if p.group == "ours"]
    head = f"{'shape':<30} {'dtype':<9} {'contestant':<14} {revision[:12]:>12}"
    print(f"{head} {'this tree':>12}  ratio")
    with checkout(revision) as tree:
        for threads in plan.threads:
            pair = [Worker(tree, threads), Worker(ROOT, threads)]
            try:
                for dtype in plan.dtypes:
                    for shape in plan.shapes:
                        for name in names:
                            call = {
                                "shape": shape.name,
                                "size": plan.size,
                                "dtype": str(dtype).removeprefix("torch."),
                                "provider": name,
                                "device": str(plan.device),
                                "clock": (plan.clocks or clocks(plan.device))[0],
                            }
                            slower += _pair(pair, call, plan.rounds, threshold)
            finally:
                for worker in pair:
                    worker.close()
    return slower


def _pair(pair: list[Worker], call: dict[str, str], rounds: int, threshold: float) -> bool:
    """Measure one call in both processes; whether this tree's is slower or wrong."""
    label = f"{call['shape']:<30} {call['dtype']:<9} {call['provider']:<14}"
    ready = [worker.ask(prepare=call) for worker in pair]
    problems = [answer["problem"] for answer in ready]
    if any(problems):
        which = [
            f"{side}: {problem}"
            for side, problem in zip(("before", "now"), problems, strict=True)
            if problem
        ]
        print(f"{label} {'; '.join(which)}")
        return bool(problems[1]) and not problems[0]
    samples: list[list[float]] = [[], []]
    for done in range(rounds):
        for side in (0, 1) if done % 2 else (1, 0):
            samples[side].append(pair[side].ask(sample=done)["ms"])
    before, now = (summary(s) for s in samples)
    ratio, least = now.median_ms / before.median_ms, now.min_ms / before.min_ms
    flagged = min(ratio, least) > 1 + threshold
    print(
        f"{label} {before.median_ms:9.3f} ms {now.median_ms:9.3f} ms  {ratio:5.2f}"
        f" (of minima {least:.2f}){'  SLOWER' if flagged else ''}",
        flush=True,
    )
    return flagged


def _prepared(call: dict[str, str]) -> Callable[[int], float]:
    """A sampler of a call that passed the gate.

    Raises:
        ValueError: it cannot run, or its result is wrong.
    """
    provider, device = PROVIDERS[call["provider"]], torch.device(call["device"])
    problem = SHAPES[call["shape"]].at(call["size"])
    case = Case.draw(problem, getattr(torch, call["dtype"]), device)
    reasons = provider.reasons(case)
    if reasons:
        raise ValueError("; ".join(reasons))
    run = provider.prepare(case)
    error = case.error(run())
    if not error <= provider.budget(case):
        raise ValueError(f"error {error:.1e} is above the budget {provider.budget(case):.1e}")
    return CLOCKS[call["clock"]]([run])


def serve() -> None:
    """Answer requests until stdin ends."""
    import styleattn

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(json.dumps({"package": styleattn.__file__}), flush=True)
    sampler = None
    with torch.no_grad():
        for line in sys.stdin:
            request = json.loads(line)
            answer: dict[str, Any] = {"problem": ""}
            if "prepare" in request:
                try:
                    sampler = _prepared(request["prepare"])
                except Exception as problem:  # an older commit may fail in any way
                    answer["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0]
            elif sampler is not None:
                answer["ms"] = sampler(request["sample"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
