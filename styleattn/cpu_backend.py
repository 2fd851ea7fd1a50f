"""The `cpu` backend: the compiled kernels of csrc/, loaded when they are first asked for.

A missing extension is no error: `available` says why, and `unsupported_reasons` repeats it.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from styleattn.branch import Affine, Branch, Segment

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
_NAMESPACE = "styleattn_cpu"


@functools.cache
def _load() -> str:
    """Load styleattn/_C*.so once; the reason why it is absent, or an empty string."""
    found = sorted(Path(__file__).parent.glob("_C.*so"))
    if not found:
        return (
            "compiled extension styleattn._C not found: "
            "styleattn was installed without a C++ compiler or without torch"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"compiled extension {found[0].name} does not load: {error}"
    return ""


def available() -> tuple[bool, str]:
    """Whether the compiled kernels can run here, and if not, why."""
    reason = _load()
    return not reason, reason


def isas() -> tuple[str, ...]:
    """The instruction sets that were compiled in and that this CPU can run, best first.

    Raises:
        RuntimeError: if the compiled extension is absent.
    """
    reason = _load()
    if reason:
        raise RuntimeError(reason)
    return tuple(getattr(torch.ops, _NAMESPACE).isas().split(","))


def isa() -> str:
    """The instruction set that a call uses unless another one is asked for."""
    return isas()[0]


def unsupported_reasons(query: Tensor, branches: tuple[Branch, ...]) -> list[str]:
    """Every reason why the compiled kernels cannot run this call; empty if they can."""
    reasons = []
    if _load():
        reasons.append(_load())
    if query.device.type != "cpu":
        reasons.append(f"query is on {query.device}")
    if query.dtype not in _DTYPES:
        reasons.append(f"takes float32, float16 and bfloat16, query is {query.dtype}")
    return reasons


class _Flat:
    """A call as tensors, integers and numbers, in the order in which csrc/ops.cpp reads them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.spec: list[int] = []
        self.numbers: list[float] = []

    def tensor(self, x: Tensor | None) -> None:
        if x is None:
            self.spec.append(-1)
            return
        self.spec.append(len(self.tensors))
        self.tensors.append(x)

    def number(self, x: float | Tensor) -> None:
        if isinstance(x, Tensor):
            self.tensor(x)
            return
        self.spec.append(-2 - len(self.numbers))
        finite = max(-_FLOAT32_MAX, min(x, _FLOAT32_MAX))  # the kernels compute in fp32
        self.numbers.append(x if math.isinf(x) else finite)

    def affine(self, a: Affine | None, *, centered: bool = False) -> None:
        parts = (None, None, None) if a is None else (a.scale, a.shift, a.center)
        for part in parts if centered else parts[:2]:
            self.tensor(None if part is None else part.contiguous())

    def segment(self, s: Segment) -> None:
        for x in (s.key, s.value, s.own_key, s.own_value):
            self.tensor(x)
        self.number(s.kv_blend)
        self.tensor(None if s.rows is None else s.rows.to("cpu", torch.int64).contiguous())
        self.tensor(s.key_bias)
        self.spec.append(s.null_keys)
        self.affine(s.key_affine, centered=True)
        self.affine(s.value_affine)
        self.number(s.logit_scale)
        self.number(s.logit_bias)

    def branch(self, b: Branch) -> None:
        self.tensor(b.query)
        self.tensor(b.content_query)
        self.affine(b.query_affine)
        self.number(b.gamma)
        self.number(b.weight)
        self.spec.append(len(b.segments))
        for s in b.segments:
            self.segment(s)


def run(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float, *, isa: str = ""
) -> tuple[Tensor, Tensor, int]:
    """`attention_forward` with a chosen instruction set; and how many (key row, head) were packed.

    Args:
        isa: one of `isas()`; empty: the best.

    Raises:
        RuntimeError: if the compiled extension is absent or this CPU cannot run the instructions.
    """
    reason = _load()
    if reason:
        raise RuntimeError(reason)
    flat = _Flat()
    flat.spec.append(len(branches))
    for b in branches:
        flat.branch(b)
    op = getattr(torch.ops, _NAMESPACE).attention
    return op(query.detach(), flat.tensors, flat.spec, flat.numbers, softmax_scale, isa)


def attention_forward(
    query: Tensor, branches: tuple[Branch, ...], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The whole operation, accumulated in fp32: out [B, H, L, D] in the query's dtype, stored BLHD;
    lse [G, B, H, L] in fp32.

    Raises:
        RuntimeError: if the compiled extension is absent.
    """
    out, lse, _ = run(query, branches, softmax_scale)
    return out, lse


def token_stats_forward(x: Tensor, eps: float, *, isa: str = "") -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps) over the tokens of [B, H, N, D], in fp32, two passes.

    Raises:
        RuntimeError: if the compiled extension is absent.
    """
    reason = _load()
    if reason:
        raise RuntimeError(reason)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return getattr(torch.ops, _NAMESPACE).token_stats(x.detach(), eps, isa)
