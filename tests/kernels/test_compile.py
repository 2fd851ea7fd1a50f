"""The kernels compile for GPUs that are not here, fit them, and keep their form in machine code."""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from styleattn.kernels.configs import (
    ARCHITECTURES,
    TILES,
    attention_tile,
    cuda_arch,
    decoupled_tile,
    high_width,
    hip_arch,
    low_width,
)

GATE = Path(__file__).resolve().parents[2] / "benchmarks" / "static_gate.py"
HEADLINE = ["shared sm_90 64 bfloat16", "shared sm_80 64 bfloat16", "shared gfx942 64 bfloat16"]
QUICK = [
    *HEADLINE,
    "shared sm_90 128 bfloat16",
    "shared-int8 sm_90 64 bfloat16",
    "plain sm_90 64 bfloat16",
    "plain sm_90 128 bfloat16",
    "quantise sm_90 64 bfloat16",
    "decoupled sm_90 64 float16",
    "stats sm_90 64 bfloat16",
    "reach sm_90 128 bfloat16",
    "rotary sm_90 128 bfloat16",
    "group-norm sm_90 320 bfloat16 16384",
]


def gate(*arguments):
    """The gate in a process where Triton is no interpreter: what it says of each case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(GATE), "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-4000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@functools.cache
def quick():
    return gate("--processes", "1", *QUICK)


@pytest.mark.parametrize("case", QUICK)
def test_the_gate_passes(case):
    assert quick()[case]["faults"] == []


@pytest.mark.slow
def test_the_gate_passes_for_every_launch():
    """Every launch configuration that can be chosen, on every architecture."""
    found = gate()
    assert {case.split()[1] for case in found} == set(ARCHITECTURES)
    assert {case: line["faults"] for case, line in found.items() if line["faults"]} == {}


def test_the_stored_baseline_knows_the_cases():
    stored = json.loads((GATE.parent / "results" / "static-gate.json").read_text())["cases"]
    assert set(QUICK) <= set(stored)
    assert all(loops for case in HEADLINE for loops in stored[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "head_dim", "reason"),
    [
        ("warps", 64, "spills in a hot loop"),
        ("twice", 64, "a turn has the products of 1.5 steps"),
        ("unrotated", 64, "of the exponentials overlap"),
        ("unsettled", 80, "a turn waits 13 times for products"),
    ],
)
def test_the_gate_refuses_a_spoiled_kernel(spoil, head_dim, reason):
    (line,) = gate("--spoil", spoil, f"plain sm_90 {head_dim} bfloat16").values()
    assert any(reason in fault for fault in line["faults"]), line["faults"]


@pytest.mark.parametrize(("head_dim", "ceiling", "beyond"), [(64, 6.3, 9.0), (128, 8.0, 16.0)])
def test_the_softmax_overlaps_the_products_in_every_loop(head_dim, ceiling, beyond):
    """Own and reference segment alike, with a running maximum and without: the exponentials of a
    step run while products are under way; the folds cost no instruction in the loop. `beyond`: for
    logits out of bounds, at half a step."""
    (launch,) = quick()[f"shared sm_90 {head_dim} bfloat16"]["facts"]
    (plain,) = quick()[f"plain sm_90 {head_dim} bfloat16"]["facts"]
    assert len(launch["measures"]) == 4 and len(plain["measures"]) == 2
    for (cost, overlap), most in zip(launch["measures"], (ceiling, beyond) * 2, strict=True):
        assert overlap >= 0.5 and cost <= most
    for cost, _ in launch["measures"][::2]:
        assert cost <= 1.03 * plain["measures"][0][0]


def test_int8_multiplies_int8():
    (launch,) = quick()["shared-int8 sm_90 64 bfloat16"]["facts"]
    assert launch["integer"] and launch["steps"] == [1.0] * 4
    assert all(cost <= 6.6 for cost, _ in launch["measures"][::2])


def test_rows_with_most_work_first_keep_the_multiprocessors_busy():
    found = subprocess.run(
        [sys.executable, str(GATE.parent / "waves.py")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    launched = [float(line.split()[-1]) for line in found]
    assert len(launched) == 6 and min(launched) >= 0.88
    assert all(
        float(line.split()[-4].rstrip(",")) <= n for line, n in zip(found, launched, strict=True)
    )


def test_head_dimensions_are_held_in_narrow_chunks():
    held = {d: (low_width(d), high_width(d)) for d in range(1, 257)}
    assert held[40] == (32, 16) and held[80] == (64, 16) and held[160] == (128, 32)
    assert held[64] == (64, 0) and held[8] == (16, 0) and held[100] == (128, 0)
    for d, (low, high) in held.items():
        padded = max(16, 1 << (d - 1).bit_length())
        assert d <= low + high <= padded and low & (low - 1) == 0 and high in (0, 16, 32, 64)


def test_table_covers_everything():
    assert {arch for arch, _ in TILES} == {*ARCHITECTURES, "interpreter"}
    for arch, itemsize in TILES:
        for dim in (8, 40, 64, 80, 128, 160, 192, 256):
            for length in (1, 64, 65, 4096):
                tile = attention_tile(arch, dim, itemsize, length, 4096, heavy=dim < 100)
                assert tile.block_n >= 16 and tile.block_m >= 16
                assert length > 64 or tile.block_m <= 64
            assert attention_tile(arch, dim, itemsize, 4096, 20).block_n <= 32
            assert decoupled_tile(arch, dim, itemsize, 81).block_n == 128
            assert decoupled_tile(arch, dim, itemsize, 5).block_n == 16


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_89")],
)  # fmt: skip
def test_cuda_architectures(capability, arch):
    assert cuda_arch(*capability) == arch


def test_amd_architectures():
    assert hip_arch("gfx942:sramecc+:xnack-") == hip_arch("gfx90a") == "gfx942"
    assert hip_arch("gfx1100") is None


MAPS = {"query_map", "key_map", "value_map", "before", "after"}
TENSORS = {"content", "own_key", "own_value", "park", "reach", "quantised"}
TUPLES = {*MAPS, *TENSORS, "blend", "weight", "gamma", "segments", "branches"}


def test_kernels_ask_tuples_for_a_field():
    """Triton 3.6 neither compares a tuple that holds a None nor finds its length, and functions
    return no None."""
    for path in (GATE.parents[1] / "kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            marks = map(ast.unparse, getattr(function, "decorator_list", ()))
            if "triton.jit" not in marks:
                continue
            for node in ast.walk(function):
                asked = None
                if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
                    asked = node.left
                elif isinstance(node, ast.Call) and ast.unparse(node.func) == "len":
                    asked = node.args[0]
                elif isinstance(node, ast.Return) and isinstance(node.value, ast.Constant):
                    assert node.value.value is not None, (path.name, function.name)
                if isinstance(asked, (ast.Attribute, ast.Name)):
                    name = getattr(asked, "attr", getattr(asked, "id", None))
                    weight = name == "weight" and isinstance(
                        asked, ast.Name
                    )  # of a norm: a pointer
                    assert name not in TUPLES or weight, (path.name, function.name, name)
