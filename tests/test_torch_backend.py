"""The torch backend's own business: large calls in parts, and what the library does not do."""

import math

import pytest
import torch

from styleattn import reference, torch_backend
from styleattn.branch import Affine, Branch, Segment, normalize
from styleattn.testing import BranchSpec, CallSpec, SegmentSpec

EVERYTHING = (
    BranchSpec(
        segments=(
            SegmentSpec(5, "holes", "kvc", "row", "query", "row", 2, "row"),
            SegmentSpec(4, "one", "", "float", "row", "shared"),
        ),
        weight="query",
        own_query=True,
        query_affine=True,
        content="row",
    ),
    BranchSpec(segments=(SegmentSpec(3, "mapped", "kv"),), weight="row"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_few_heads_at_a_time_change_nothing(dtype, monkeypatch):
    query, call, scale = CallSpec(3, 5, 7, 16, EVERYTHING, dtype, strided=True).build()
    call, scale = normalize("test", query, call, scale)
    whole = torch_backend.attention_forward(query, call, scale)
    some, parts = torch_backend._some, []
    monkeypatch.setattr(
        torch_backend, "_some", lambda q, *rest: parts.append(q.shape[1]) or some(q, *rest)
    )
    monkeypatch.setattr(torch_backend, "_PART", 4 * 3 * 7 * 16)
    out, lse = torch_backend.attention_forward(query, call, scale)
    assert parts == [1] * 5
    assert torch.equal(out, whole[0]) and out.stride() == whole[0].stride()
    assert torch.equal(lse, whole[1])


def plain(dtype):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(1, 1, n, 16, generator=g).to(dtype) for n in (9, 40, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_infinite_logits_are_not_zeros(dtype):
    """The library's half-precision kernels answer a logit of +inf with an output of 0."""
    query, key, value = plain(dtype)
    key[0, 0, 31, 2] = math.inf
    call, scale = normalize("test", query, (Branch((Segment(key, value),)),), None)
    out, lse = torch_backend.attention_forward(query, call, scale)
    want, _ = reference.attention_forward(query, call, scale)
    assert want.isnan().any() and torch.equal(out.isnan(), want.isnan())
    assert not lse.isfinite()[out.isnan().any(-1)[None]].any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_library_never_sees_a_negative_scale(sign, monkeypatch):
    """On GPUs it takes the largest product for that with the largest logit."""
    query, key, value = plain(torch.float32)
    library, scales = torch_backend._aten._scaled_dot_product_flash_attention_for_cpu, []

    class Watched:
        def _scaled_dot_product_flash_attention_for_cpu(self, *args, scale, **options):
            scales.append(scale)
            return library(*args, scale=scale, **options)

    monkeypatch.setattr(torch_backend, "_aten", Watched())
    segment = Segment(key, value, logit_scale=sign)
    call, scale = normalize("test", query, (Branch((segment,)),), -0.5)
    out, _ = torch_backend.attention_forward(query, call, scale)
    assert scales == [0.5]
    assert torch.allclose(out, reference.attention_forward(query, call, scale)[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blended", [False, True])
def test_masked_keys_have_no_part_in_the_center_of_a_fold(blended, dtype):
    """What rounding takes from a folded query is given back by the mean of the keys that count."""
    g = torch.Generator().manual_seed(0)
    query, key, other = (torch.randn(2, 1, n, 16, generator=g).to(dtype) for n in (9, 40, 40))
    key, other = key + 3, other - 3
    mask = torch.zeros(2, 40)
    mask[:, 25:] = float("-inf")
    fold = Affine(0.5 + torch.rand(2, 1, 16, generator=g), torch.randn(2, 1, 16, generator=g))

    def run(hidden):
        hiding = torch.where((mask == 0)[:, None, :, None], key, hidden).to(dtype)
        own = {"own_key": hiding, "own_value": key, "kv_blend": 0.5} if blended else {}
        segments = (Segment(hiding, key, key_bias=mask, **own), Segment(other, other))
        call = normalize("test", query, (Branch(segments, query_affine=fold),), None)
        return torch_backend.attention_forward(query, *call)

    for hidden in (1e4, math.nan):
        for found, right in zip(run(hidden), run(0.0), strict=True):
            assert torch.equal(found, right)
