"""Gradients where a backend saw a query that was rounded."""

import pytest
import torch

import styleattn
from styleattn import Affine, Branch, Segment
from styleattn.testing import features, relative_error

BACKENDS = [
    row.name for row in styleattn.backends() if row.available and row.name in ("torch", "cpu")
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_folded_half_queries_are_exact(backend, dtype):
    """The log-sum-exp of a call that does not return it is that of the rounded query; gradients are
    those of the query as it was."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (features(g, (2, 2, 33, 64), dtype, means=4.0) for _ in range(3))
    affine = Affine(0.5 + torch.rand(2, 2, 64, generator=g), torch.randn(2, 2, 64, generator=g))
    upstream = torch.randn(q.shape, generator=g).to(dtype)

    def gradients(name, wide):
        leaves = [x.to(wide).requires_grad_() for x in (q, k, v)]
        segment = Segment(leaves[1], leaves[2], null_keys=3)
        branch = Branch((segment,), query_affine=affine)
        out = styleattn.attention(leaves[0], [branch], backend=name)
        return torch.autograd.grad(out, leaves, upstream.to(wide))

    expected = gradients("reference", torch.float64)
    for found, right in zip(gradients(backend, dtype), expected, strict=True):
        assert relative_error(found, right) < 4 * torch.finfo(dtype).eps
