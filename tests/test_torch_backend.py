"""The torch backend's own business: large calls on the CPU go through a few heads at a time."""

import pytest
import torch

from styleattn import torch_backend
from styleattn.branch import normalize
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
