"""The table of what was measured, on a CPU: it chooses the backend, and tuning finds its rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from styleattn import cpu_backend, measured
from styleattn.branch import Branch, Segment
from styleattn.measured import Choice

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tune  # noqa: E402
from shapes import SHAPES  # noqa: E402

backends = importlib.import_module("styleattn.backends")  # the package's attribute is a function

pytestmark = pytest.mark.skipif(
    not cpu_backend.available()[0], reason=cpu_backend.available()[1] or "available"
)


@pytest.fixture
def native(monkeypatch):
    """The CPU as it is, whether or not Triton's interpreter is on in this process."""
    monkeypatch.setattr(backends, "_missing", lambda name: "absent" if name == "triton" else None)
    before = dict(measured.TABLE)
    measured.TABLE.clear()
    yield measured.TABLE
    measured.TABLE.clear()
    measured.TABLE.update(before)


def test_the_table_knows_a_cpu_by_its_instruction_set(native):
    x = torch.zeros(1, 2, 70, 16)
    branches = (Branch((Segment(x, x),)),)
    key = measured.key_of(cpu_backend.isa(), x.dtype, 16, 70, 70, 2)
    assert backends.resolve("test", x, branches, None) == "cpu"
    native[key] = Choice("torch")
    assert backends.resolve("test", x, branches, None) == "torch"
    assert backends.resolve("test", x, branches, "cpu") == "cpu"
    half = (Branch((Segment(x.half(), x.half()),)),)
    assert backends.resolve("test", x.half(), half, None) == "cpu"  # another dtype, no row
    native[key] = Choice("triton")  # which is not here: the device's order stands
    assert backends.resolve("test", x, branches, None) == "cpu"


def test_tuning_compares_the_compiled_kernels_with_the_library(native, capsys):
    problem = SHAPES["sd15-256"].at("tiny")
    (found,) = tune.report([(torch.float32, problem)], torch.device("cpu"), 2, 0.0)
    assert found.key.arch == cpu_backend.isa()
    assert set(found.others) == {Choice("cpu"), Choice("torch")}
    assert found.milliseconds == min(found.others.values())
    told = capsys.readouterr().out
    assert f'+    Key("{cpu_backend.isa()}", "float32", 160' in told and not native
