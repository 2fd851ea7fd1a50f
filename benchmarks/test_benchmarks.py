"""`pytest benchmarks`: a few shapes under pytest-benchmark, each checked against fp64 before it is
timed. One group per shape and dtype; `run.py` measures everything, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from measure import admit
from providers import PROVIDERS
from shapes import SHAPES

NAMES = (
    "sdxl-1024",
    "sd15-256",
    "sdxl-1024-shared-b4",
    "sd15-256-shared-b4-shift",
    "sdxl-1024-ip-4",
    "sd15-4096-deadiff-null",
)
CONTESTANTS = ("ours-cpu", "ours-triton", "ours-torch", "official", "sdpa")
ON_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", NAMES)
@pytest.mark.parametrize("provider", CONTESTANTS)
def test_speed(benchmark: Any, shape: str, provider: str, dtype: torch.dtype) -> None:
    """One contestant on one shape; a wrong result fails, an absent contestant is skipped."""
    problem = SHAPES[shape].at("real" if ON_GPU else "cpu")
    case = Case.draw(problem, dtype, "cuda" if ON_GPU else "cpu")
    reasons = PROVIDERS[provider].reasons(case)
    if reasons:
        pytest.skip("; ".join(reasons))
    with torch.no_grad():
        contestant = admit(PROVIDERS[provider], case)
        assert contestant.run is not None, contestant.failed
        benchmark.group = f"{shape} {dtype}"
        benchmark.extra_info.update(error=contestant.error, flops=problem.flops_exact)
        benchmark.pedantic(_synchronous(contestant.run), rounds=5, warmup_rounds=1)


def _synchronous(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The call and, on a GPU, the wait for it: pytest-benchmark looks at the wall clock."""

    def call() -> None:
        run()
        if ON_GPU:
            torch.cuda.synchronize()

    return call
