"""Peak memory of shared attention with a score shift, and of a segment with a bias per query:
linear in the number of tokens, and close to plain attention's."""

import subprocess
import sys

import pytest

import styleattn

SCRIPT = """
import resource, sys
import torch
import styleattn
from styleattn.branch import Branch, Segment

kind, _, biased = sys.argv[1].partition(" ")
tokens = int(sys.argv[2])
q, k, v = (torch.randn(4, tokens, 10, 64).transpose(1, 2) for _ in range(3))
rows = torch.tensor([0, 0, 2, 2])


def call(q, k, v):
    if kind == "plain":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if biased:
        half = q.shape[2] // 2
        bias = torch.randn(q.shape[0], q.shape[2])
        seen = Segment(k[:, :, :half], v[:, :, :half], logit_bias=bias)
        others = Segment(k[:, :, half:], v[:, :, half:])
        return styleattn.attention(q, (Branch((seen, others)),), backend=kind)
    return styleattn.shared_attention(q, k, v, reference_rows=rows, score_shift=0.6931,
    backend=kind)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


call(*(x[:, :, :64] for x in (q, k, v)))
before = peak()
out = call(q, k, v)
print(4 * q.numel() * q.element_size(), peak() - before - out.numel() * out.element_size())
"""


def measured(kind, tokens):
    """(bytes of query, key, value and output, further bytes at the peak) in a process of its
    own."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(tokens)],
        capture_output=True,
        text=True,
        check=True,
    )
    tensors, more = (int(x) for x in run.stdout.split())
    return tensors, max(more, 0)


cpu = pytest.mark.skipif("cpu" not in styleattn.backends(), reason="needs the compiled extension")
KINDS = [kind + more for more in ("", " bias") for kind in ("torch", "cpu")]
KINDS = [pytest.param(k, marks=cpu) if "cpu" in k else k for k in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [k for k in KINDS if k != "torch bias"])  # two calls, merged
def test_peak_is_that_of_plain_attention(backend):
    tensors, plain = measured("plain", 4096)
    _, ours = measured(backend, 4096)
    assert tensors + ours <= 1.3 * (tensors + plain)
    logits = 4 * 10 * 4096 * 4096 * 4
    assert tensors + ours < logits / 10


@pytest.mark.parametrize("backend", KINDS)
def test_peak_is_linear_in_tokens(backend):
    (small_tensors, small), (tensors, more) = measured(backend, 512), measured(backend, 2048)
    assert tensors == 4 * small_tensors
    assert more <= 6 * small + 16 * 2**20
