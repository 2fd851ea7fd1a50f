"""The fused norms against formulas in fp64, and their gradients against autograd's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from styleattn import _norm_ops
from styleattn.branch import Affine
from styleattn.errors import Invalid
from styleattn.kernels.norms import RUN, TOKENS, group_norm_forward, rotary_forward
from styleattn.norms import rms_norm_rotary, shared_group_norm
from styleattn.testing import features, relative_error

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-6


def generator():
    return torch.Generator().manual_seed(0)


def close(got, want, dtype=torch.float32):
    """Within one rounding of the exact result."""
    rounding = 1e-6 if dtype == torch.float32 else 1.01 * relative_error(want.to(dtype), want)
    assert got.shape == want.shape and relative_error(got, want) <= rounding


def angles(tokens, dim):
    turns = 6 * torch.rand(tokens, dim // 2, generator=generator())
    return turns.cos().repeat_interleave(2, 1), turns.sin().repeat_interleave(2, 1)


def affine(x, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (x.shape[0], x.shape[1], x.shape[3])
    return Affine(torch.rand(shape, generator=g) + 0.5, torch.randn(shape, generator=g))


def written_out(x, weight, rotary=None, before=None, after=None):
    """In fp64, pair by pair."""
    y = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(EPS).sqrt()
    y = y if weight is None else y * weight.double()
    if before is not None:
        y = y * before.scale.double()[:, :, None] + before.shift.double()[:, :, None]
    if rotary is not None:
        turned = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        phase = torch.complex(*(t.double()[:, ::2] for t in rotary))
        y = torch.view_as_real(turned * phase).flatten(-2)
    if after is not None:
        y = y * after.scale.double()[:, :, None] + after.shift.double()[:, :, None]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "tokens", "dim", "parts"),
    [
        (1, 1, 8, "r"),
        (3, TOKENS + 1, 40, "wbra"),
        (5, TOKENS, 64, "wr"),
        (2, 5, 128, "wb"),
        (2, 3, 7, "a"),
    ],
)
def test_rotary(heads, tokens, dim, parts, dtype):
    x = features(generator(), (2, heads, tokens, dim), dtype, strided=True)
    weight = torch.rand(dim, generator=generator()).to(dtype) + 0.5 if "w" in parts else None
    rotary = angles(tokens, dim) if "r" in parts else None
    before, after = (affine(x, i) if "ba"[i] in parts else None for i in range(2))
    got = rms_norm_rotary(
        x, weight, eps=EPS, rotary=rotary, before=before, after=after, backend="triton"
    )
    assert got.dtype == dtype and got.stride(2) == heads * dim
    close(got, written_out(x, weight, rotary, before, after), dtype)


def test_the_formula_takes_fp64():
    x = features(generator(), (1, 2, 5, 16), torch.float64)
    weight, map_, rotary = torch.rand(16).double(), affine(x, 0), angles(5, 16)
    got = rms_norm_rotary(x, weight, eps=EPS, rotary=rotary, before=map_, after=map_)
    want = written_out(x, weight, rotary, map_, map_)
    assert got.dtype == torch.float64 and relative_error(got, want) < 1e-14


def test_a_map_does_not_commute_with_the_rotation():
    x = features(generator(), (1, 1, 5, 16))
    map_, rotary = affine(x, 0), angles(5, 16)
    one, two = (
        rms_norm_rotary(x, eps=EPS, rotary=rotary, backend="triton", **{side: map_})
        for side in ("before", "after")
    )
    assert relative_error(one, two.double()) > 1e-2


def test_gradients_of_rotary():
    x = features(generator(), (2, 2, 5, 8)).requires_grad_()
    weight = torch.rand(8, generator=generator()).requires_grad_()
    maps = [affine(x, i) for i in range(2)]
    leaves = [x, weight, *(t.requires_grad_() for m in maps for t in (m.scale, m.shift))]
    rotary, seed = angles(5, 8), torch.randn(2, 2, 5, 8, generator=generator())

    def grads(backend):
        y = rms_norm_rotary(
            x, weight, eps=EPS, rotary=rotary, before=maps[0], after=maps[1], backend=backend
        )
        return torch.autograd.grad((y * seed).sum(), leaves)

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        assert relative_error(got, want.double()) < 1e-5


def maps_of(shape, dtype=torch.float32, last=False):
    """[B, C, H, W] with strong means; channels last in memory if so."""
    g = generator()
    x = torch.randn(shape, generator=g) + 5 * torch.randn(*shape[:2], 1, 1, generator=g)
    return x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def concatenated(x, groups, references, weight, bias, eps):
    """Each row normalised with its references, whole weights only: one GroupNorm over the
    concatenation, in fp64."""
    rows = []
    for b in range(len(x)):
        together = [x[b], *(x[r[b]] for r, w in references for _ in range(int(w)))]
        wide = torch.cat([t.double().flatten(1) for t in together], 1)[None]
        y = F.group_norm(wide, groups, weight.double(), bias.double(), eps)
        rows.append(y[0, :, : x[b].flatten(1).shape[1]].view(x.shape[1:]))
    return torch.stack(rows)


REFERENCES = [(torch.tensor([0, 0, 2, 2]), 2.0), (torch.tensor([1, 0, 1, 0]), 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_group_norm(dtype, last):
    x = maps_of((4, 12, 5, 7), dtype, last)
    weight, bias = (torch.randn(12, generator=generator()).to(dtype) for _ in range(2))
    got = shared_group_norm(x, 4, REFERENCES, weight, bias, backend="triton")
    assert got.dtype == dtype and got.stride() == x.stride()
    close(got, concatenated(x, 4, REFERENCES, weight, bias, 1e-5), dtype)


def test_group_norm_over_several_runs():
    x = maps_of((2, 2, 3, RUN // 2), torch.float32)
    one = torch.ones(2)
    got = shared_group_norm(x, 1, [(torch.tensor([0, 0]), 1.0)], one, one, backend="triton")
    close(got, concatenated(x, 1, [(torch.tensor([0, 0]), 1.0)], one, one, 1e-5))


def test_kept_rows_weights_in_tensors_and_silu():
    x = maps_of((4, 8, 3, 5))
    references = [(torch.tensor([0, 0, 2, 2]), torch.tensor(0.3))]
    keep = torch.tensor([True, False, True, False])
    old = F.group_norm(x, 4).to(memory_format=torch.channels_last)  # of other strides than x
    calls = {"kept": old, "keep": keep}
    got = shared_group_norm(x, 4, references, backend="triton", **calls)
    assert torch.equal(got[keep], old[keep])
    want = shared_group_norm(x.double(), 4, references, kept=old.double(), keep=keep)
    close(got, want)
    close(shared_group_norm(x, 4, references, silu=True, backend="triton", **calls), F.silu(want))


def test_no_reference_is_group_norm():
    x = maps_of((2, 6, 4, 4))
    close(shared_group_norm(x, 3, [], backend="triton"), F.group_norm(x.double(), 3))


@pytest.mark.parametrize("silu", [False, True])
def test_gradients_of_group_norm(silu):
    x = maps_of((4, 8, 2, 3)).requires_grad_()
    weight, bias = (torch.randn(8, generator=generator()).requires_grad_() for _ in range(2))
    old = maps_of((4, 8, 2, 3)).requires_grad_()
    keep, seed = torch.tensor([True, False, False, False]), torch.randn(4, 8, 2, 3)
    references = [(torch.tensor([0, 0, 0, 2]), 0.7), (torch.tensor([1, 1, 1, 1]), 1.5)]

    def grads(backend):
        y = shared_group_norm(
            x, 4, references, weight, bias, silu=silu, kept=old, keep=keep, backend=backend
        )
        return torch.autograd.grad((y * seed).sum(), (x, weight, bias, old))

    for got, want in zip(grads("triton"), grads("reference"), strict=True):
        assert relative_error(got, want.double()) < 1e-5


def test_ops_are_well_formed():
    """Schemas, fakes and autograd registration agree with what the ops do."""
    x = features(generator(), (1, 2, 3, 8)).requires_grad_()
    ops = torch.ops.styleattn
    cos, sin = angles(3, 8)
    torch.library.opcheck(ops.rms_norm_rotary, (x, None, cos, sin, [], [], EPS, "triton"))
    image = maps_of((2, 4, 2, 3)).requires_grad_()
    rows, weights = [torch.tensor([0, 0])], torch.ones(1)
    rest = (None, None, 1e-5, False, None, None, "triton")
    torch.library.opcheck(ops.shared_group_norm, (image, 2, rows, weights, *rest))


def test_nan_stays_where_it_is_read():
    x = maps_of((3, 4, 2, 3))
    x[2] = math.nan
    got = shared_group_norm(x, 2, [(torch.tensor([0, 0, 0]), 1.0)], backend="triton")
    assert got[:2].isfinite().all() and got[2].isnan().all()
    tokens = features(generator(), (1, 1, 3, 8))
    tokens[0, 0, 1] = math.nan
    out = rms_norm_rotary(tokens, eps=EPS, backend="triton")
    assert out[0, 0, ::2].isfinite().all() and out[0, 0, 1].isnan().all()


def test_refusals():
    x = features(generator(), (1, 2, 3, 8))
    with pytest.raises(Invalid) as problem:
        rms_norm_rotary(x, torch.ones(4), eps=EPS, rotary=angles(4, 8), before=affine(x[:, :1], 0))
    for part in ("weight must be", "rotary must be", "before must be"):
        assert part in str(problem.value)
    with pytest.raises(Invalid, match="4 groups"):
        shared_group_norm(torch.ones(1, 6, 2), 4, [])
    with pytest.raises(Invalid, match="kept and keep"):
        shared_group_norm(torch.ones(1, 6, 2), 3, [], kept=torch.ones(1, 6, 2))
    wide = x.double()
    with pytest.raises(ValueError, match="float64"):
        rotary_forward(wide, None, EPS, None, None, None)
    with pytest.raises(ValueError, match="float64"):
        group_norm_forward(wide, 2, [], None, None, None, 1e-5, False, None, None, x.dtype)


def test_empty_batches():
    assert rotary_forward(torch.empty(0, 2, 3, 8), None, EPS, None, None, None).shape[0] == 0
    rest = (None, None, None, 1e-5, False, None, None, torch.float32)
    assert group_norm_forward(torch.empty(0, 4, 3), 2, [], *rest).shape == (0, 4, 3)


def test_a_compiler_sees_one_graph():
    """Nothing of the choice between kernel and formula breaks a graph."""
    x, image = features(generator(), (1, 2, 3, 8)), maps_of((2, 4, 2, 3))
    rotary, rows = angles(3, 8), [(torch.tensor([0, 0]), torch.tensor(0.5))]

    def both(x, image, backend):
        y = rms_norm_rotary(x, eps=EPS, rotary=rotary, backend=backend)
        return y, shared_group_norm(image, 2, rows, backend=backend)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for backend in ("triton", None):
        for got, want in zip(compiled(x, image, backend), both(x, image, backend), strict=True):
            assert torch.equal(got, want)


def test_nobody_watching_no_op(monkeypatch):
    """Eager calls reach the kernels around the dispatcher; autograd and profilers see an op."""
    x = features(generator(), (2, 2, 9, 8))
    image = x.reshape(2, 16, 9)
    rows = [(torch.tensor([0, 0]), 1.0)]

    def run(x, image):
        turned = rms_norm_rotary(x, eps=EPS, rotary=angles(9, 8), backend="triton")
        return turned, shared_group_norm(image, 4, rows, backend="triton")

    with torch.profiler.profile() as profile:
        watched = run(x, image)
    seen = {event.key for event in profile.key_averages()}
    assert {"styleattn::rms_norm_rotary", "styleattn::shared_group_norm"} <= seen
    assert all(y.requires_grad for y in run(x.clone().requires_grad_(), image.requires_grad_()))
    monkeypatch.setattr(_norm_ops, "rotary_op", None)
    monkeypatch.setattr(_norm_ops, "group_norm_op", None)
    with torch.no_grad():
        direct = run(x, image.detach())
    assert all(torch.equal(a, b) for a, b in zip(direct, watched, strict=True))
