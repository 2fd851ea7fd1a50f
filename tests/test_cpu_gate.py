"""The inner loops of csrc/ as they are compiled: for instruction sets this CPU may not have."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from styleattn import cpu_backend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cpu_gate  # noqa: E402

pytestmark = pytest.mark.skipif(bool(cpu_gate.missing()), reason=cpu_gate.missing() or "it can run")


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """The inner loops of each instruction set."""
    folder = tmp_path_factory.mktemp("objects")
    return {isa: cpu_gate.loops(cpu_gate.compiled(isa, folder)) for isa in cpu_gate.ISAS}


@pytest.mark.parametrize("isa", cpu_gate.ISAS)
def test_accumulators_stay_in_registers_and_products_are_those_of_the_tile(loops, isa):
    assert cpu_gate.violations(isa, loops[isa]) == []


@pytest.mark.parametrize(
    ("isa", "before", "after", "why"),
    [
        ("avx512", "vectors <= 2 ? 12 : 6", "12", "on the stack"),  # 48 sums in 32 registers
        ("avx512", "tile_vectors = 4", "tile_vectors = 3", "tiles"),
        ("amx_bf16", "_tile_dpbf16ps(1, 4, 5);", "", "tiles"),
        ("amx_bf16", "_tile_loadd(5, b, ldb);", "", "loads for"),
    ],
)
def test_the_gate_notices_a_spoilt_kernel(tmp_path, isa, before, after, why):
    source = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = source / ("gemm_amx.h" if isa == "amx_bf16" else "vec_avx512.h")
    text = header.read_text(encoding="utf-8")
    assert text.count(before) == 1
    header.write_text(text.replace(before, after), encoding="utf-8")
    found = cpu_gate.loops(cpu_gate.compiled(isa, tmp_path, source))
    assert any(why in wrong for wrong in cpu_gate.violations(isa, found))


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="no llvm-mca")
def test_predictions(loops):
    """Products bound the loops: the ports leave them at most 2 % of a turn, and at d = 128 nine
    tenths of the peak is theirs."""
    for isa, (dot, _, pair) in cpu_gate.ISAS.items():
        if isa == "amx_bf16":
            continue
        widest = [
            m for m in cpu_gate.micro_tiles(loops[isa]) if m.vectors == max(cpu_gate.ROWS[isa])
        ]
        for tile in widest:
            if tile.dot == dot:
                assert cpu_gate.cycles(tile.loop) <= 1.02 * tile.loop.dots / 2
        shares = [cpu_gate.predict(isa, d, loops[isa])[1] for d in (64, 128)]
        assert 0.75 < shares[0] < shares[1] < 1 and shares[1] > (0.85 if pair == 2 else 0.9)


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="no llvm-mca")
@pytest.mark.parametrize("head_dim", cpu_gate.HEAD_DIMS)
def test_tiles_leave_the_softmax_as_the_larger_part(loops, head_dim):
    """The products of 16 x 16 scores, counted from the operation: 16 cycles each."""
    steps = -(-head_dim // 32) + -(-head_dim // 16) / 2
    total, share = cpu_gate.predict("amx_bf16", head_dim, loops["amx_bf16"])
    softmax = total - 16 * steps / 256
    assert 0.5 < softmax < 0.6
    assert share == pytest.approx(4 * head_dim / 1024 / total)
    assert total < cpu_gate.predict("avx512_bf16", head_dim, loops["avx512_bf16"])[0] / 2


def test_the_installed_library_holds_every_instruction_set():
    """One build runs everywhere."""
    if not cpu_backend.available()[0]:
        pytest.skip(cpu_backend.available()[1])
    library = next(Path(cpu_backend.__file__).parent.glob("_C.*so"))
    found = cpu_gate.loops(library)
    for instruction, register, wanted in [
        ("vdpbf16ps", "zmm", 24),
        ("vfmadd", "zmm", 24),
        ("vfmadd", "ymm", 12),
        ("tdpbf16ps", "tmm", 3),
    ]:
        work = [sum(instruction in i and register in i for i in loop.text) for loop in found]
        assert max(work) == wanted
