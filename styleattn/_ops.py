"""Custom ops: schemas, exact fakes (strides too), autograd. The one boundary between Python and
every backend.

A call travels as `query`, the tensors it holds in a fixed order, and two lists that say which are
there: one op, whatever the
number of branches and segments, opaque to torch.compile. The backend is chosen before the boundary
and named in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from styleattn import backends
from styleattn._watch import unseen
from styleattn.branch import Affine, Branch, Segment
from styleattn.errors import describe, invalid
from styleattn.lse import refined

_AFFINE = ("scale", "shift", "center")
_BRANCH = (
    ("query", False),
    ("query_affine", True),
    ("content_query", False),
    ("gamma", None),
    ("weight", None),
)
_SEGMENT = (
    ("key", False),
    ("value", False),
    ("rows", False),
    ("key_affine", True),
    ("value_affine", True),
    ("logit_scale", None),
    ("logit_bias", None),
    ("key_bias", False),
    ("own_key", False),
    ("own_value", False),
    ("kv_blend", None),
)
"""Fields in travelling order: True an affine, False a tensor or None, None a number or a tensor."""

Path = tuple[Any, ...]
"""Where a tensor of a call sits: (branch, segment or None, field, part of an affine or None)."""


def _walk(branches: Sequence[Branch]) -> list[tuple[Path, Any]]:
    """Every slot of a call with its value, in travelling order."""
    slots: list[tuple[Path, Any]] = []
    for g, branch in enumerate(branches):
        for i, node in [(None, branch), *enumerate(branch.segments)]:
            for field, is_affine in _BRANCH if i is None else _SEGMENT:
                value = getattr(node, field)
                parts = _AFFINE if is_affine else (None,)
                for part in parts:
                    slots.append(
                        (
                            (g, i, field, part),
                            value if part is None or value is None else getattr(value, part),
                        )
                    )
    return slots


def pack(branches: Sequence[Branch]) -> tuple[list[Tensor], list[int], list[float]]:
    """A normalised call as (tensors, layout, numbers)."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    layout = [len(branches)]
    for branch in branches:
        layout.append(len(branch.segments))
        layout.extend(s.null_keys for s in branch.segments)
    for _, value in _walk(branches):
        if isinstance(value, Tensor):
            layout.append(1)
            tensors.append(value)
        elif value is None:
            layout.append(0)
        else:
            layout.append(2)
            numbers.append(value)
    return tensors, layout, numbers


def unpack(
    tensors: Sequence[Any], layout: Sequence[int], numbers: Sequence[float]
) -> tuple[Branch, ...]:
    """The call that `pack` packed; `tensors` may hold anything that stands in for them (such as
    gradients)."""
    flags, floats, items = iter(layout), iter(numbers), iter(tensors)
    counts = []
    for _ in range(next(flags)):
        n = next(flags)
        counts.append([next(flags) for _ in range(n)])

    def slot() -> Any:
        kind = next(flags)
        return next(items) if kind == 1 else next(floats) if kind == 2 else None

    def node(fields: Sequence[tuple[str, bool | None]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for field, is_affine in fields:
            if is_affine:
                parts = [slot() for _ in _AFFINE]
                values[field] = None if parts[0] is None else Affine(*parts)
            else:
                values[field] = slot()
        return values

    branches = []
    for nulls in counts:
        own = node(_BRANCH)
        segments = tuple(Segment(**node(_SEGMENT), null_keys=n) for n in nulls)
        branches.append(Branch(segments, **own))
    return tuple(branches)


def _blhd(query: Tensor) -> Tensor:
    """An uninitialised output in the layout all backends promise: [B, H, L, D] over BLHD memory."""
    b, h, n, d = query.shape
    return torch.empty(b, n, h, d, dtype=query.dtype, device=query.device).transpose(1, 2)


@torch.library.custom_op("styleattn::attention", mutates_args=())
def attention_op(
    query: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    numbers: Sequence[float],
    softmax_scale: float,
    backend: str,
    call: str,
    exact_lse: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, L, D] and lse [G, B, H, L] of a packed call; `backend` "" chooses, `call` names it
    in errors; `exact_lse`: somebody reads the lse, so give back what folding took from it;
    `fast`: INT8 products of queries and keys."""
    branches = unpack(tensors, layout, numbers)
    return _compute(query, branches, softmax_scale, backend or None, call, exact_lse, fast)


def _compute(
    query: Tensor,
    branches: tuple[Branch, ...],
    softmax_scale: float,
    backend: str | None,
    call: str,
    exact_lse: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """A normalised call on the backend that runs it."""
    name = backends.resolve(call, query, branches, backend, fast)
    if query.shape[0] == 0:
        return _blhd(query), _empty_lse(query, len(branches))
    _check_rows(call, branches)
    with backends.without_autocast(query.device.type):
        forward = backends.load(name).attention_forward
        if fast:
            found: tuple[Tensor, Tensor] = forward(query, branches, softmax_scale, fast=True)
            return found
        out, lse = forward(query, branches, softmax_scale)
        if exact_lse and backends.rounds_queries(name, query):
            lse = refined(forward, query, branches, softmax_scale, lse)
        return out, lse


def _check_rows(call: str, branches: Sequence[Branch]) -> None:
    """Refuse row maps on the host that point outside their keys: a compiled call is checked only
    here."""
    for g, branch in enumerate(branches):
        for i, s in enumerate(branch.segments):
            if s.rows is None or s.rows.device.type != "cpu":
                continue
            bad = [r for r in s.rows.tolist() if not -1 <= r < s.key.shape[0]]
            if bad:
                reason = (
                    f"branches[{g}].segments[{i}].rows has {bad}, rows are -1..{len(s.key) - 1}"
                )
                raise invalid(call, [reason], f"key {describe(s.key)}")


def _empty_lse(query: Tensor, branches: int) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((branches, *query.shape[:-1]), dtype=dtype)


@attention_op.register_fake
def _attention_fake(
    query: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    numbers: Sequence[float],
    softmax_scale: float,
    backend: str,
    call: str,
    exact_lse: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    return _blhd(query), _empty_lse(query, layout[0])


@torch.library.custom_op("styleattn::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    numbers: Sequence[float],
    softmax_scale: float,
    lse: Tensor,
    needed: Sequence[int],
) -> list[Tensor]:
    """Gradients of the query and of every tensor of a packed call; empty where `needed` is 0."""
    from styleattn.gradients import attention_gradients

    branches = unpack(tensors, layout, numbers)
    with backends.without_autocast(query.device.type):
        query_grad, grads = attention_gradients(
            grad_out, grad_lse, query, branches, softmax_scale, lse
        )
    paths = [path for path, value in _walk(branches) if isinstance(value, Tensor)]
    found = [query_grad, *(grads.get(path) for path in paths)]
    results = []
    for need, grad, like in zip(needed, found, (query, *tensors), strict=True):
        if not need:
            results.append(like.new_empty(0))
        else:
            results.append(
                torch.zeros_like(like, memory_format=torch.contiguous_format)
                if grad is None
                else _dense(grad, like)
            )
    return results


def _dense(grad: Tensor, like: Tensor) -> Tensor:
    grad = grad.to(like.dtype).contiguous()
    return grad.clone() if grad.data_ptr() == like.data_ptr() else grad


@attention_backward_op.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tensors: Sequence[Tensor],
    layout: Sequence[int],
    numbers: Sequence[float],
    softmax_scale: float,
    lse: Tensor,
    needed: Sequence[int],
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for need, x in zip(needed, (query, *tensors), strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, tensors, layout, numbers, softmax_scale, *_ = inputs
    ctx.save_for_backward(query, *tensors, output[1])
    ctx.call = (list(layout), list(numbers), softmax_scale)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    query, *tensors, lse = ctx.saved_tensors
    layout, numbers, softmax_scale = ctx.call
    needed = [int(x.is_floating_point()) for x in (query, *tensors)]
    grads = attention_backward_op(
        grad_out, grad_lse, query, tensors, layout, numbers, softmax_scale, lse, needed
    )
    found = [g if need else None for g, need in zip(grads, needed, strict=True)]
    no_numbers: list[Tensor] = []  # to autograd an empty list is one of tensors
    return found[0], found[1:], None, None if numbers else no_numbers, *(None for _ in range(5))


attention_op.register_autograd(_backward, setup_context=_setup_context)


def _tensors(branches: Sequence[Branch]) -> list[Tensor]:
    """The tensors of a call, in any order."""
    nodes = (*branches, *(s for branch in branches for s in branch.segments))
    values = [value for node in nodes for value in vars(node).values()]
    parts = [part for x in values if type(x) is Affine for part in vars(x).values()]
    return [x for x in (*values, *parts) if isinstance(x, Tensor)]


def attention(
    query: Tensor,
    branches: tuple[Branch, ...],
    softmax_scale: float,
    backend: str | None,
    call: str,
    exact_lse: bool = False,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """A normalised call through the op boundary, where there is somebody on the other side of it.

    Args:
        exact_lse: the caller reads the lse: in half precision it costs folded branches one more
            pass.
        fast: INT8 products of queries and keys, which have no gradients.

    Raises:
        RuntimeError: forward-mode differentiation, which the op does not have.
        Unsupported: gradients of a fast call.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and unseen([query, *_tensors(branches)]):  # tracers need not read the latter
        return _compute(query, branches, softmax_scale, backend, call, exact_lse, fast)
    tensors, layout, numbers = pack(branches)
    if fast and torch.is_grad_enabled():
        backends.refuse_gradients(call, query, branches, [query, *tensors])
    if not compiling and forward_ad._current_level >= 0:
        dual = [x for x in (query, *tensors) if forward_ad.unpack_dual(x).tangent is not None]
        if dual:
            raise RuntimeError(f"{call}: no forward-mode differentiation, only reverse mode")
    return attention_op(
        query, tensors, layout, numbers, softmax_scale, backend or "", call, exact_lse, fast
    )


@torch.library.custom_op("styleattn::token_stats", mutates_args=())
def token_stats_op(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """mean and sqrt(unbiased variance + eps) over the tokens of [B, H, N, D], each [B, H, D] in
    fp32."""
    return _compute_stats(x, eps, backend or None)


def _compute_stats(x: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    module = backends.load_stats(backends.resolve_stats("token_stats", x, backend))
    with backends.without_autocast(x.device.type):
        found: tuple[Tensor, Tensor] = module.token_stats_forward(x, eps)
        return found


@token_stats_op.register_fake
def _token_stats_fake(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, h, _, d = x.shape
    return x.new_empty((b, h, d), dtype=dtype), x.new_empty((b, h, d), dtype=dtype)


def _stats_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _stats_backward(ctx: Any, grad_mean: Tensor, grad_std: Tensor) -> tuple[Any, ...]:
    """dx = dmean / N + dstd * (x - mean) / ((N - 1) * std)."""
    x, mean, std = ctx.saved_tensors
    n = x.shape[-2]
    slope = (grad_std / (std * max(n - 1, 1))).unsqueeze(-2)
    grad = (grad_mean / n).unsqueeze(-2) + slope * (x.to(mean.dtype) - mean.unsqueeze(-2))
    return grad.to(x.dtype), None, None


token_stats_op.register_autograd(_stats_backward, setup_context=_stats_setup)


def token_stats(x: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    """Checked token statistics through the op boundary, as `attention` goes through it."""
    if unseen([x]):
        return _compute_stats(x, eps, backend)
    return token_stats_op(x, eps, backend or "")


def adain(x: Tensor, rows: Tensor, eps: float, backend: str | None) -> tuple[Tensor, ...] | None:
    """Scale, shift, own means and aimed-at means of AdaIN to `rows` in one go, [B, H, D] each; None
    where the backend has no kernel for it, or somebody watches."""
    if not unseen([x, rows]):
        return None
    module = backends.load_stats(backends.resolve_stats("token_stats", x, backend))
    fused = getattr(module, "adain_forward", None)
    return None if fused is None else fused(x, rows, eps)


OPS: tuple[Callable[..., Any], ...] = (attention_op, attention_backward_op, token_stats_op)
