"""Test-wide conditions: no network, few threads, poisoned memory, reproducible random examples."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# processes that share the cores have one thread each, and so do the programs that they start
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined

torch.set_num_threads(min(2, torch.get_num_threads()))

_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=50, derandomize=True, **_COMMON)
settings.register_profile("fuzz", max_examples=10_000, print_blob=True, **_COMMON)
settings.load_profile("default")

with torch.device("meta"):
    torch.empty(0)  # torch remembers which functions obey this: before they are poisoned below

_POISONED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _poisoned(allocate):
    """``allocate`` whose floating-point result holds NaN until it is written."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype in _POISONED:
            tensor.detach().fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN, so that an output element nobody wrote fails its test."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
