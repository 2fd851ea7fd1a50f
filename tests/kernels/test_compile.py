"""The kernels compile for GPUs that are not here, fit them, and keep their form in machine code."""

from __future__ import annotations

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

SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KB
HEADLINE = ["shared sm_90 64 bfloat16", "shared sm_80 64 bfloat16", "shared gfx942 64 bfloat16"]
QUICK = [
    *HEADLINE,
    "shared sm_90 128 bfloat16",
    "decoupled sm_90 64 bfloat16",
    "stats sm_90 64 bfloat16",
]
REST = [
    "shared sm_89 64 bfloat16",
    "shared sm_100 64 bfloat16",
    "shared sm_90 40 bfloat16",
    "shared sm_90 80 bfloat16",
    "shared-values sm_90 64 float16 1000",
    "plain sm_90 64 bfloat16 1",
    "joint sm_90 64 float16 1000",
    "injected sm_90 64 bfloat16",
    "cross sm_90 64 bfloat16",
    *(f"plain {arch} {dim} bfloat16" for arch in ARCHITECTURES for dim in (128, 256)),
    *(f"plain {arch} 160 bfloat16" for arch in ("sm_80", "sm_90", "gfx942")),
    *(f"decoupled {arch} 64 float16" for arch in ARCHITECTURES if arch != "sm_90"),
    *(f"stats {arch} 64 float16" for arch in ARCHITECTURES if arch != "sm_90"),
    "plain sm_80 64 float32",
    "plain sm_90 128 float32",
    "plain gfx942 64 float32",
]  # fmt: skip


@functools.cache
def compiled(cases):
    """The facts of some cases, compiled in one process where Triton is no interpreter."""
    script = Path(__file__).with_name("cross_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, script, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    return {fact["case"]: fact["launches"] for fact in facts}


def check_fits(case, launch):
    """Shared memory and registers fit; half precision runs on the matrix units, without spills."""
    kind, arch, _, dtype, *_ = case.split()
    assert launch["shared"] <= SHARED_MEMORY[arch] * 1024, case
    assert launch["registers"] <= (512 if arch == "gfx942" else 255), case
    assert launch.get("spilled", 0) == 0, case
    if kind != "stats" and dtype != "float32":
        assert launch["products"] > 0, case
        assert all(loop["spills"] == 0 for loop in launch["loops"]), (case, launch)


@pytest.mark.parametrize("case", QUICK)
def test_launches_fit(case):
    for launch in compiled(tuple(QUICK))[case]:
        check_fits(case, launch)


@pytest.mark.slow
@pytest.mark.parametrize("case", REST)
def test_every_row_of_the_table_fits(case):
    for launch in compiled(tuple(REST))[case]:
        check_fits(case, launch)


@pytest.mark.parametrize(("head_dim", "ceiling"), [(64, 8.0), (128, 12.0)])
def test_the_softmax_overlaps_the_products_in_every_loop(head_dim, ceiling):
    """Own and reference segment alike: the exponentials of a step run while the products of the
    next are under way, and the folds cost no instruction in the loop."""
    (launch,) = compiled(tuple(QUICK))[f"shared sm_90 {head_dim} bfloat16"]
    assert len(launch["loops"]) == 2
    elements = launch["BLOCK_M"] * launch["BLOCK_N"] / (32 * launch["num_warps"])
    for loop in launch["loops"]:
        assert loop["overlap"] >= 0.5 * loop["exponentials"], loop
        assert loop["instructions"] / elements <= ceiling, loop


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
