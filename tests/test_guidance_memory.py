"""The count behind docs/cost.md's numbers on InstantStyle-Plus: bytes that are alive at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "guidance_memory.py"
_spec = importlib.util.spec_from_file_location("guidance_memory", _PATH)
assert _spec is not None
assert _spec.loader is not None
memory = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory)

N = 1000


def chain(count, drop=True):
    """Tensors of 4000 bytes, each made of the one before."""
    x = torch.ones(N)
    kept = [x]
    for _ in range(count):
        x = x + 1
        if not drop:
            kept.append(x)
    return x


@pytest.mark.parametrize(("drop", "expected"), [(True, 3), (False, 6)])
def test_what_is_dropped_no_longer_counts(drop, expected):
    """The first, the one before and the one that is made; or all."""
    assert memory.peak(lambda: chain(5, drop)) == expected * 4 * N


def test_views_and_what_is_written_in_place_are_nothing_new():
    def call():
        x = torch.ones(N)
        x.add_(1)
        return x.view(10, 100)[2:].t()

    assert memory.peak(call) == 4 * N


@pytest.mark.parametrize("again", [False, True])
def test_tensors_without_data_count_as_tensors_with(again):
    """Forward and backward of some layers, kept or computed again."""

    def call():
        layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU()) for _ in range(6)]
        x = torch.ones(50, 64, requires_grad=True)
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if again else layer(y)
        return torch.autograd.grad(y.sum(), x)

    assert memory.peak(call, FakeTensorMode()) == memory.peak(call)


@pytest.mark.slow
def test_the_page_is_what_the_script_counts_and_24_gb_are_enough():
    made = memory.table()
    assert made in memory.PAGE.read_text(encoding="utf-8")
    largest = [line.split("|")[-2] for line in made.splitlines() if line.startswith("| 1024")]
    assert float(largest[0]) < 24e9 / memory.GIB - 1.5  # room for the context and workspaces
