"""precision="fast": who takes it, who refuses it, and why."""

from __future__ import annotations

import pytest
import torch

import styleattn
from styleattn import Branch, Segment
from styleattn.backends import Unsupported
from styleattn.testing import features, relative_error


def tensors(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    return [features(g, (2, 1, 70, 16), dtype) for _ in range(3)]


def attend(q, k, v, **options):
    return styleattn.attention(q, (Branch((Segment(k, v),)),), precision="fast", **options)


def test_never_the_default():
    q, k, v = tensors()
    branches = (Branch((Segment(k, v),)),)
    plain = styleattn.attention(q, branches, backend="reference")
    assert torch.equal(
        plain, styleattn.attention(q, branches, backend="reference", precision="exact")
    )
    fast = attend(q, k, v, backend="reference")
    assert 0 < relative_error(fast, plain) < 0.05


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_backends_say_why_not(backend):
    if backend not in styleattn.backends():
        pytest.skip("not built")
    with pytest.raises(Unsupported, match="triton and reference only"):
        attend(*tensors(), backend=backend)
    with pytest.raises(Unsupported) as refused:
        attend(*tensors(torch.float32), backend=backend)
    assert "triton and reference only" in str(refused.value)
    assert "float16 and bfloat16, not torch.float32" in str(refused.value)


def test_the_specification_is_no_silent_choice():
    """Without a GPU nothing is fast: the call is refused, and says what computes it."""
    with pytest.raises(Unsupported) as refused:
        attend(*tensors(), backend=None)
    for part in ("cpu: precision='fast'", "torch: precision='fast'", "backend='reference'"):
        assert part in str(refused.value)


def test_unknown_precision():
    with pytest.raises(ValueError, match="'exact' or 'fast', got 'int8'"):
        styleattn.shared_attention(*tensors(), reference_rows=[0, 0], precision="int8")


def test_gradients_are_refused():
    q, k, v = tensors()
    q.requires_grad_()
    with pytest.raises(Unsupported, match="no gradients"):
        attend(q, k, v, backend="reference")
    with torch.no_grad():
        assert torch.isfinite(attend(q, k, v, backend="reference")).all()


def test_compiled():
    q, k, v = tensors()

    def call():
        return attend(q, k, v, backend="reference")

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(), call())
