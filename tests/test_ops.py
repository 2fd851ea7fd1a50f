"""The op boundary: what travels through it, and what comes back."""

import pytest
import torch

import styleattn
from styleattn import Branch, Segment

BACKENDS = [
    row.name
    for row in styleattn.backends()
    if row.available and row.name in ("reference", "torch", "cpu")
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_call_without_a_python_number(backend):
    """Every number of the call a tensor: the list of numbers that travels is empty."""
    g = torch.Generator().manual_seed(0)
    q, content, k, v, own_k, own_v = (torch.randn(2, 1, 3, 8, generator=g) for _ in range(6))
    scale, bias, blend, weight, gamma = (torch.rand(2, generator=g) for _ in range(5))
    leaves = [q, content, k, v, own_k, own_v, scale, bias, blend, weight, gamma]

    def gradients(name, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        q, content, k, v, own_k, own_v, scale, bias, blend, weight, gamma = inputs
        segment = Segment(
            k,
            v,
            logit_scale=scale,
            logit_bias=bias,
            own_key=own_k,
            own_value=own_v,
            kv_blend=blend,
        )
        branch = Branch((segment,), weight=weight, content_query=content, gamma=gamma)
        out = styleattn.attention(q, [branch], backend=name)
        return torch.autograd.grad(out.square().sum(), inputs)

    expected = gradients("reference", torch.float64)
    for found, right in zip(gradients(backend, torch.float32), expected, strict=True):
        assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-5)
