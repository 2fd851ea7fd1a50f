"""The compiled kernels against the specification in fp64: every instruction set this CPU has, and
AVX-512 by emulation where it has not; what is packed, what threads may change, what NaN may reach.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from strategies import calls

from styleattn import cpu_backend
from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.lse import refined
from styleattn.testing import (
    BranchSpec,
    CallSpec,
    SegmentSpec,
    assert_within_error_budget,
    exact,
    features,
    relative_error,
)

pytestmark = pytest.mark.skipif(
    not cpu_backend.available()[0], reason=cpu_backend.available()[1] or "available"
)

ROOT = Path(__file__).resolve().parents[1]
NATIVE = cpu_backend.isas() if cpu_backend.available()[0] else ()
EMULATED = ("amx_bf16", "avx512_bf16", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEG_INF = float("-inf")


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """csrc/ compiled with tests/csrc/emulated_avx512.h in place of the intrinsics; ops in a
    namespace of their own."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch_root = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-math-errno", "-w"]
    command += [f"-I{ROOT / 'tests' / 'csrc'}", f"-I{torch_root / 'include'}"]
    command += [f"-I{sysconfig.get_path('include')}", f"-L{torch_root / 'lib'}"]
    command += ["-DSTYLEATTN_EMULATE_AVX512", "-DSTYLEATTN_OPS=styleattn_emulated"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    command += [*map(str, sorted((ROOT / "csrc").glob("*.cpp"))), "-ltorch_cpu", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    torch.ops.load_library(str(library))
    return "styleattn_emulated"


@pytest.fixture(params=[*NATIVE, *(f"emulated-{name}" for name in EMULATED)])
def isa(request, monkeypatch):
    """The name of an instruction set, with `cpu_backend` made to reach it."""
    name = request.param
    if name.startswith("emulated-"):
        name = name.removeprefix("emulated-")
        if name in NATIVE:
            pytest.skip("this CPU has it")
        monkeypatch.setattr(cpu_backend, "_NAMESPACE", request.getfixturevalue("emulated_library"))
    return name


def run(query, branches, isa, softmax_scale=None):
    """(out, lse, counters), with the log-sum-exp that `attention` gives: where the dot products are
    of bfloat16 the folded queries are rounded, and it is made good afterwards."""
    normal, scale = normalize("test", query, tuple(branches), softmax_scale)
    out, lse, counters = cpu_backend.run(query, normal, scale, isa=isa)
    if "bf16" in isa and query.dtype == torch.bfloat16:
        lse = refined(
            lambda q, b, scale: cpu_backend.run(q, b, scale, isa=isa)[:2], query, normal, scale, lse
        )
    return out, lse, counters


SHAPES = [  # length, keys, head_dim: every tail of every vector width, more than one block
    (1, 1, 1),
    (49, 129, 8),
    (63, 257, 40),
    (5, 77, 72),
    (130, 300, 80),
    (12, 17, 33),
    (50, 128, 160),
    (3, 1000, 256),
    (2, 5, 300),
]
FEATURES = BranchSpec(
    segments=(
        SegmentSpec(affines="kvc", logit_bias="query", logit_scale="row"),
        SegmentSpec(key_rows="holes", key_bias="mask", null_keys=3, affines="v"),
        SegmentSpec(key_rows="one", blend="row", logit_bias="inf"),
    ),
    weight="query",
    query_affine=True,
    content="row",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_against_the_specification(isa, kind, shape, dtype):
    length, keys, dim = shape
    branch = BranchSpec() if kind == "plain" else FEATURES
    branch = replace(branch, segments=tuple(replace(s, keys=keys) for s in branch.segments))
    spec = CallSpec(
        batch=3,
        heads=2,
        length=length,
        head_dim=dim,
        branches=(branch, replace(branch, weight="row")),
        dtype=dtype,
        strided=keys % 2 == 1,
    )
    query, branches, scale = spec.build()
    out, lse, _ = run(query, branches, isa, scale)
    assert out.stride() == (length * 2 * dim, dim, 2 * dim, 1)
    assert lse.shape == (2, 3, 2, length) and lse.dtype == torch.float32 and lse.is_contiguous()
    assert_within_error_budget(out, lse, query, branches, scale)


@settings(suppress_health_check=list(HealthCheck))
@given(spec=calls)
def test_any_combination(isa, spec):
    query, branches, scale = spec.build()
    out, lse, _ = run(query, branches, isa, scale)
    assert_within_error_budget(out, lse, query, branches, scale)


def test_negative_and_zero_logit_scale(isa):
    q, k, v = (features(torch.Generator().manual_seed(1), (2, 2, 20, 16)) for _ in range(3))
    alpha = torch.tensor([-0.7, 0.0])
    for dtype in DTYPES:
        branches = [Branch((Segment(k.to(dtype), v.to(dtype), logit_scale=alpha),))]
        out, lse, _ = run(q.to(dtype), branches, isa)
        assert_within_error_budget(out, lse, q.to(dtype), branches)


def test_strong_channel_means_cost_half_precision_nothing(isa):
    """Keys with means ten times their spread: a rounded folded query meets centred keys only."""
    g = torch.Generator().manual_seed(2)
    spec = CallSpec(
        batch=2,
        length=40,
        head_dim=64,
        means=10.0,
        dtype=torch.bfloat16,
        branches=(BranchSpec(segments=(SegmentSpec(keys=90),), query_affine=True),),
    )
    query, (branch,), _ = spec.build()
    key = branch.segments[0].key
    scale = 0.5 + torch.rand(2, 2, 64, generator=g)
    shift = -scale * key.float().mean(2)  # normalised keys: the means cancel
    affine = replace(branch.query_affine, scale=scale, shift=shift)
    branches = [replace(branch, segments=(replace(branch.segments[0], key_affine=affine),))]
    out, _, _ = run(query, branches, isa)
    want, _ = exact(query, branches)
    assert relative_error(out, want) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(isa, dtype):
    q, k, v = (features(torch.Generator().manual_seed(3), (3, 2, 60, 24), dtype) for _ in range(3))
    clean, clean_lse, _ = run(q, [Branch((Segment(k, v),))], isa)
    for x in (q, k, v):
        before = x[1].clone()
        x[1, 0, 7] = float("nan")
        out, lse, _ = run(q, [Branch((Segment(k, v),))], isa)
        assert out[1, 0].isnan().any()
        for row, head in [(0, 0), (0, 1), (1, 1), (2, 0)]:
            assert torch.equal(out[row, head], clean[row, head])
            assert torch.equal(lse[0, row, head], clean_lse[0, row, head])
        x[1] = before
    q[1, 0, 7] = float("nan")
    out, _, _ = run(q, [Branch((Segment(k, v),))], isa)
    assert out[1, 0, 7].isnan().all()
    assert torch.equal(out[1, 0, :7], clean[1, 0, :7])
    assert torch.equal(out[1, 0, 8:], clean[1, 0, 8:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_may_hold_anything(isa, dtype):
    q, k, v = (features(torch.Generator().manual_seed(4), (2, 1, 30, 16), dtype) for _ in range(3))
    want, want_lse, _ = run(q, [Branch((Segment(k[:, :, :25], v[:, :, :25]),))], isa)
    mask = torch.zeros(30).index_fill(0, torch.arange(25, 30), NEG_INF)
    k[:, :, 25:], v[:, :, 25:] = float("nan"), float("inf")
    out, lse, _ = run(q, [Branch((Segment(k, v, key_bias=mask),))], isa)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(lse, want_lse)
    gone = Segment(k, v, rows=torch.tensor([-1, -1]))
    out, lse, _ = run(q, [Branch((gone,))], isa)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == NEG_INF).all()
    out, lse, _ = run(q, [Branch((replace(gone, null_keys=2),))], isa)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 2.0).log())


@pytest.mark.parametrize("kind", ["float", "row", "query", "keys"])
def test_a_finite_bias_removes_nothing(isa, kind):
    """The lowest finite number, which many masks hold, leaves the keys where they are."""
    g = torch.Generator().manual_seed(0)
    lowest = torch.finfo(torch.float32).min
    query, key = features(g, (2, 1, 5, 16)), features(g, (2, 1, 33, 16))
    shape = {"row": (2,), "query": (2, 5), "keys": (33,)}.get(kind)
    bias = lowest if shape is None else torch.full(shape, lowest)
    option = {"key_bias" if kind == "keys" else "logit_bias": bias}
    out, lse, _ = run(query, [Branch((Segment(key, torch.ones_like(key), **option),))], isa)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert lse.isfinite().all()


def test_an_infinite_query_sees_its_keys(isa):
    """Where a folded term of the logits is -inf, they are not those of a removed segment."""
    g = torch.Generator().manual_seed(0)
    query, key = features(g, (1, 1, 5, 16)), features(g, (1, 1, 33, 16), means=0.0)
    query[0, 0, 2, 3] = float("inf")
    fold = Affine(torch.ones(1, 1, 16), -torch.ones(1, 1, 16))
    out, lse, _ = run(query, [Branch((Segment(key, key, key_affine=fold),))], isa)
    rows = torch.tensor([False, False, True, False, False])
    assert torch.equal(out.isnan().all(-1)[0, 0], rows) and torch.equal(lse.isnan()[0, 0, 0], rows)


def test_python_zero_weight_adds_exactly_nothing(isa):
    q, k, v = (features(torch.Generator().manual_seed(5), (1, 1, 9, 8)) for _ in range(3))
    plain, lse, _ = run(q, [Branch((Segment(k, v),))], isa)
    both, lses, _ = run(
        q, [Branch((Segment(k, v),)), Branch((Segment(k, v * float("nan")),), weight=0.0)], isa
    )
    assert torch.equal(both, plain)
    assert torch.equal(lses[1], lse[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(isa, dtype):
    g = torch.Generator().manual_seed(6)
    q, k, v = (features(g, (4, 3, 150, 40), dtype) for _ in range(3))
    rows = torch.tensor([0, 0, 2, 2])
    branches = [Branch((Segment(k, v), Segment(k, v, rows=rows, logit_bias=0.3)))]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(
                (run(q, branches, isa), cpu_backend.token_stats_forward(k, 1e-5, isa=isa))
            )
    finally:
        torch.set_num_threads(before)
    (out, lse, packs), stats = results[0]
    for (other, other_lse, other_packs), other_stats in results[1:]:
        assert torch.equal(out, other) and torch.equal(lse, other_lse) and packs == other_packs
        assert all(torch.equal(a, b) for a, b in zip(stats, other_stats, strict=True))


def test_keys_are_packed_once():
    """One pack per (used key row, head), however many rows, segments and branches read it."""
    q = features(torch.Generator().manual_seed(7), (17, 2, 8, 16))
    k, v = q[:1], q[1:2]
    assert run(q, [Branch((Segment(k, v),))], "")[2] == 2
    shared = Segment(q, q, rows=torch.zeros(17, dtype=torch.int64))
    assert run(q, [Branch((shared,))], "")[2] == 2
    assert run(q, [Branch((Segment(q, q), shared))], "")[2] == 17 * 2
    assert run(q, [Branch((Segment(q, q),)), Branch((shared,))], "")[2] == 17 * 2
    holes = torch.full((17,), -1).index_fill(0, torch.tensor([3]), 5)
    assert run(q, [Branch((Segment(q, q, rows=holes),))], "")[2] == 2


def test_statistics(isa):
    g = torch.Generator().manual_seed(8)
    shapes = [(1, 40, False), (2, 7, True), (257, 40, True), (4096, 64, False), (130, 256, True)]
    for n, d, strided in shapes:
        for dtype in DTYPES:
            x = features(g, (2, 3, n, d), dtype, means=3.0, strided=strided)
            mean, std = cpu_backend.token_stats_forward(x, 1e-5, isa=isa)
            y = x.double()
            variance = y.var(2) if n > 1 else torch.zeros(2, 3, d).double()
            torch.testing.assert_close(mean.double(), y.mean(2), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(std.double(), (variance + 1e-5).sqrt(), rtol=2e-6, atol=1e-6)
    far = 1000 + 0.01 * torch.randn(1, 1, 1000, 16, generator=g)
    std = cpu_backend.token_stats_forward(far, 0.0, isa=isa)[1].double()
    torch.testing.assert_close(std, far.double().std(2), rtol=1e-4, atol=0)
    huge = torch.full((1, 1, 64, 8), 60000.0, dtype=torch.float16)
    mean, std = cpu_backend.token_stats_forward(huge, 1e-5, isa=isa)
    assert (mean == 60000).all() and torch.allclose(std, torch.tensor(1e-5).sqrt())


def test_memory_that_nobody_wrote_is_not_read():
    """Every allocation of the process is filled with bytes that overflow in all three types."""
    code = """
import torch
from styleattn.testing import BranchSpec, CallSpec, SegmentSpec, assert_within_error_budget
from styleattn import cpu_backend
from styleattn.branch import normalize
segments = tuple(
    SegmentSpec(keys=33, affines="kvc", key_bias=b, null_keys=n) for b, n in (("", 2), ("mask", 0))
)
for dtype in (torch.float32, torch.bfloat16):
    for dim in (8, 33, 40):
        spec = CallSpec(length=13, head_dim=dim, dtype=dtype, branches=(BranchSpec(segments),) * 2)
        query, branches, scale = spec.build()
        for isa in cpu_backend.isas():
            out, lse, _ = cpu_backend.run(query, *normalize("t", query, branches, scale), isa=isa)
            assert_within_error_budget(out, lse, query, branches, scale)
            assert torch.isfinite(lse).all()
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for byte in ("1", "128"):  # glibc fills with the complement: 0xfe.., 0x7f..
        env["MALLOC_PERTURB_"] = byte
        subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tool, emulated",
    [("sanitizers", False), ("sanitizers", True), ("valgrind", False), ("allocations", True)],
)
def test_no_undefined_behaviour(tmp_path, tool, emulated):
    """The kernels without torch, on exactly sized memory, under ASan and UBSan, or valgrind; and
    the number of tiles changes no number of allocations."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or (tool == "valgrind" and shutil.which("valgrind") is None):
        pytest.skip(f"no {'C++ compiler' if compiler is None else tool}")
    if tool == "valgrind" and not emulated and any("avx512" in name for name in NATIVE):
        pytest.skip("valgrind does not know AVX-512")
    sources = ["drive.cpp", "isa.cpp", *(f.name for f in (ROOT / "csrc").glob("isa_*.cpp"))]
    program, ours = tmp_path / "harness", ROOT / "tests" / "csrc"
    command = [compiler, "-std=c++17", "-O1", "-g", "-w", f"-I{ours / 'serial'}", f"-I{ours}"]
    command += [f"-I{ROOT / 'csrc'}", *(["-DSTYLEATTN_EMULATE_AVX512"] if emulated else [])]
    if tool == "sanitizers":
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += [str(ours / "harness.cpp"), *(str(ROOT / "csrc" / name) for name in sources)]
    if tool == "allocations":
        command += ["-DCOUNT_ALLOCATIONS"]
    subprocess.run([*command, "-o", str(program)], check=True)
    checker = ["valgrind", "-q", "--error-exitcode=9"] if tool == "valgrind" else []
    done = subprocess.run([*checker, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if tool == "allocations":
        assert re.search(r"^avx512_bf16: [1-9]\d* allocations", done.stdout, re.MULTILINE)


def test_bad_calls_raise():
    q = torch.zeros(2, 1, 4, 8)
    op = torch.ops.styleattn_cpu.attention
    with pytest.raises(RuntimeError, match="ends early"):
        op(q, [], [1], [], 1.0, "")
    with pytest.raises(RuntimeError, match="instruction set 'sse9'"):
        run(q, [Branch((Segment(q, q),))], "sse9")
    with pytest.raises(RuntimeError, match=r"rows 0\.\.0"):
        segment = Segment(q[:1], q[:1], rows=torch.tensor([0, 1]))
        cpu_backend.run(q, (Branch((segment,)),), 1.0)
    with pytest.raises(RuntimeError, match="wrong shape"):
        cpu_backend.run(q, (Branch((Segment(q, q[:, :, :3]),)),), 1.0)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        cpu_backend.run(q.double(), (Branch((Segment(q.double(), q.double()),)),), 1.0)


def test_reasons():
    assert cpu_backend.unsupported_reasons(torch.zeros(1, 1, 1, 8), ()) == []
    elsewhere = torch.zeros(1, 1, 1, 8, dtype=torch.float64, device="meta")
    reasons = cpu_backend.unsupported_reasons(elsewhere, ())
    assert len(reasons) == 2 and "meta" in reasons[0] and "float64" in reasons[1]


@pytest.mark.parametrize("broken", [False, True])
def test_a_missing_extension_is_a_reason(monkeypatch, tmp_path, broken):
    monkeypatch.setattr(cpu_backend, "__file__", str(tmp_path / "cpu_backend.py"))
    if broken:
        (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    cpu_backend._load.cache_clear()
    try:
        possible, reason = cpu_backend.available()
        assert not possible
        assert ("does not load" if broken else "styleattn._C not found") in reason
        assert cpu_backend.unsupported_reasons(torch.zeros(1, 1, 1, 8), ()) == [reason]
        with pytest.raises(RuntimeError):
            cpu_backend.isas()
        with pytest.raises(RuntimeError):
            cpu_backend.token_stats_forward(torch.zeros(1, 1, 1, 8), 0.0)
    finally:
        cpu_backend._load.cache_clear()


def test_speed(capsys):
    """Prints, does not judge: one thread, CPU time, minima, against PyTorch's flash attention."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for dtype in DTYPES[:2]:
            q, k, v = (torch.randn(1, 2, 512, 64).to(dtype) for _ in range(3))
            normal, scale = normalize("speed", q, (Branch((Segment(k, v),)),), None)
            times = {}
            for name, call in {
                "ours": lambda: cpu_backend.attention_forward(q, normal, scale),  # noqa: B023
                "flash": lambda: flash(q, k, v),  # noqa: B023
            }.items():
                for _ in range(8):
                    start = time.thread_time()
                    call()
                    times[name] = min(times.get(name, 1e9), time.thread_time() - start)
            rows.append(f"{dtype}: {times['flash'] / times['ours']:.2f}x flash")
    finally:
        torch.set_num_threads(before)
    with capsys.disabled():
        print(f"\n  cpu backend, {cpu_backend.isa()}, L=S=512, d=64: {'; '.join(rows)}")
