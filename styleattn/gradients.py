"""Exact gradients of the operation for every backend: the probabilities recomputed from the saved
LSE and brought to a sum of one, a block of queries at a time.

With P = exp(logit - lse), o = P V', G = w dO and D = <G, o> - dlse:
    dV' = P^T G        dlogit = P * (G V'^T - D)        dQ' = alpha sigma dlogit K'        dK' =
    alpha sigma dlogit^T Q'
and the chain through affines, blends, row maps and numbers. Memory: one block of logits, at most
`BLOCK_ELEMENTS`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from styleattn.branch import Affine, Branch, Segment

BLOCK_ELEMENTS = 1 << 24
NEG_INF = float("-inf")


def _rows(x: float | Tensor) -> Any:
    """A number against [B, H, L, S]: [B] as [B, 1, 1, 1], [B, L] as [B, 1, L, 1]."""
    if not isinstance(x, Tensor):
        return x
    return x[:, None, None, None] if x.ndim == 1 else x[:, None, :, None]


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0.0


class _Affine:
    """y = scale * x + shift with the gradients of its parts."""

    def __init__(self, affine: Affine | None):
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        a = self.affine
        return x if a is None else a.scale[:, :, None] * x + a.shift[:, :, None]

    def backward(
        self, grad: Tensor, x: Tensor, grads: dict[Any, Tensor], path: tuple[Any, ...]
    ) -> Tensor:
        if self.affine is None:
            return grad
        for part, value in (("scale", (grad * x).sum(2)), ("shift", grad.sum(2))):
            grads[(*path, part)] = value
        return self.affine.scale[:, :, None] * grad


class _Keys:
    """The keys or values of one segment: gathered, blended, mapped, with the way back."""

    def __init__(self, s: Segment, which: str, batch: int, dtype: torch.dtype):
        self.segment, self.which, self.batch = s, which, batch
        self.source: Tensor = getattr(s, which)
        self.own: Tensor | None = getattr(s, f"own_{which}")
        self.map = _Affine(getattr(s, f"{which}_affine"))
        self.rows = None if s.rows is None else s.rows.to(self.source.device)
        self.removed = self._removed()
        self.picked = self._kept(self._gather(self.source).to(dtype))
        self.lam = _rows(s.kv_blend)
        self.mixed = self.picked
        if self.own is not None:
            self.mixed = self.lam * self.picked + (1 - self.lam) * self._kept(self.own.to(dtype))
        self.value = self._kept(self.map.forward(self.mixed))
        self.grad = torch.zeros_like(self.value)

    def _removed(self) -> Tensor | None:
        """[B or 1, 1, S or 1, 1]: keys that a row does not see at all; they must not spread NaN."""
        s, gone = self.segment, []
        if isinstance(s.logit_bias, Tensor) and s.logit_bias.ndim == 1:
            gone.append((s.logit_bias == NEG_INF).reshape(-1, 1, 1, 1))
        if self.rows is not None:
            gone.append((self.rows < 0).reshape(-1, 1, 1, 1))
        if s.key_bias is not None:
            full = s.key_bias if s.key_bias.ndim == 2 else s.key_bias[None]
            full = full[:, None, :, None]
            gone.append((full if len(full) == 1 else self._gather(full)) == NEG_INF)
        return None if not gone else functools.reduce(torch.logical_or, gone)

    def _kept(self, x: Tensor) -> Tensor:
        return x if self.removed is None else x.masked_fill(self.removed, 0.0)

    def _gather(self, x: Tensor) -> Tensor:
        if self.rows is None:
            return x.expand(self.batch, *x.shape[1:])
        live = (self.rows >= 0).reshape(-1, 1, 1, 1)
        return torch.where(
            live,
            x.index_select(0, self.rows.clamp(min=0)),
            torch.zeros((), dtype=x.dtype, device=x.device),
        )

    def finish(self, g: int, i: int, grads: dict[Any, Tensor]) -> None:
        grad = self.map.backward(self.grad, self.mixed, grads, (g, i, f"{self.which}_affine"))
        if self.own is not None:
            grads[(g, i, f"own_{self.which}", None)] = (1 - self.lam) * grad
            if isinstance(self.segment.kv_blend, Tensor):
                blend = (grad * (self.picked - self._kept(self.own.to(grad.dtype)))).sum((1, 2, 3))
                path = (g, i, "kv_blend", None)
                grads[path] = grads[path] + blend if path in grads else blend
            grad = self.lam * grad
        if self.rows is None:
            result = grad if self.source.shape[0] == self.batch else grad.sum(0, keepdim=True)
        else:
            live = (self.rows >= 0).reshape(-1, 1, 1, 1)
            result = grad.new_zeros(self.source.shape).index_add(
                0, self.rows.clamp(min=0), torch.where(live, grad, 0.0)
            )
        grads[(g, i, self.which, None)] = result


class _SegmentGrad:
    """One segment: block by block its logits, then the gradients that its block of dlogit gives."""

    def __init__(self, s: Segment, g: int, i: int, query: Tensor, dtype: torch.dtype, scale: float):
        self.s, self.g, self.i, self.scale = s, g, i, scale
        batch, _, length, _ = query.shape
        self.k, self.v = (_Keys(s, which, batch, dtype) for which in ("key", "value"))
        self.alpha = _rows(s.logit_scale)
        self.key_bias: Tensor | None = None
        if s.key_bias is not None:
            full = s.key_bias if s.key_bias.ndim == 2 else s.key_bias[None]
            self.key_bias = (
                self.k._gather(full[:, None, None]) if full.shape[0] > 1 else full[:, None, None]
            )
            self.key_bias_grad = s.key_bias.new_zeros(batch, s.key_bias.shape[-1])
        self.scale_grad = query.new_zeros(batch, dtype=dtype)
        self.bias_grad = query.new_zeros(batch, length, dtype=dtype)

    def bias(self, block: slice) -> Any:
        beta = self.s.logit_bias
        beta = _rows(beta[:, block] if isinstance(beta, Tensor) and beta.ndim == 2 else beta)
        if self.key_bias is not None:
            beta = beta + self.key_bias
        if self.k.rows is not None:
            beta = torch.where((self.k.rows < 0).reshape(-1, 1, 1, 1), NEG_INF, self._tensor(beta))
        return beta

    def _tensor(self, x: Any) -> Tensor:
        like = self.k.value
        return torch.as_tensor(x, dtype=like.dtype, device=like.device)

    def probabilities(self, q: Tensor, block: slice, lse: Tensor) -> tuple[Tensor, Tensor]:
        """P and the logits without alpha, [B, H, l, S]."""
        raw = self.scale * (q @ self.k.value.transpose(-1, -2))
        beta = self._tensor(self.bias(block))
        logits = torch.where(beta == NEG_INF, NEG_INF, self.alpha * raw + beta)
        lse = torch.where(lse == NEG_INF, 0.0, lse).unsqueeze(-1)
        return torch.exp(logits - lse), raw

    def accumulate(
        self, q: Tensor, block: slice, p: Tensor, raw: Tensor, upstream: Tensor, delta: Tensor
    ) -> Tensor:
        """Add the block's gradients; returns its dQ'."""
        self.v.grad += p.transpose(-1, -2) @ upstream
        d = p * (upstream @ self.v.value.transpose(-1, -2) - delta.unsqueeze(-1))
        self.scale_grad += (d * raw).sum((1, 2, 3))
        self.bias_grad[:, block] += d.sum((1, 3))
        if self.key_bias is not None:
            self.key_bias_grad += d.sum((1, 2))
        d = d * (self.alpha * self.scale)
        self.k.grad += d.transpose(-1, -2) @ q
        return d @ self.k.value

    def finish(self, grads: dict[Any, Tensor]) -> None:
        s, g, i = self.s, self.g, self.i
        for keys in (self.k, self.v):
            keys.finish(g, i, grads)
        if isinstance(s.logit_scale, Tensor):
            grads[(g, i, "logit_scale", None)] = self.scale_grad
        if isinstance(s.logit_bias, Tensor):
            grads[(g, i, "logit_bias", None)] = (
                self.bias_grad if s.logit_bias.ndim == 2 else self.bias_grad.sum(1)
            )
        if s.key_bias is not None:
            grad = self.key_bias_grad
            if s.key_bias.ndim == 1:
                grad = grad.sum(0)
            elif s.key_bias.shape[0] == 1:
                grad = grad.sum(0, keepdim=True)
            elif self.k.rows is not None:
                grad = grad.new_zeros(s.key_bias.shape).index_add(0, self.k.rows.clamp(min=0), grad)
            grads[(g, i, "key_bias", None)] = grad


def _normalise(branch: Branch, probabilities: list[Tensor], lse: Tensor) -> None:
    """Make the probabilities of all segments [B, H, l, S], with those of null keys, add up to 1, in
    place: a backend that rounds its queries has the log-sum-exp of other logits."""
    nulls = sum(s.null_keys for s in branch.segments)
    total = torch.zeros_like(lse) if not nulls else nulls * torch.exp(-lse)
    for p in probabilities:
        total = total + p.sum(-1)
    share = torch.where(total == 0.0, 0.0, 1.0 / total).unsqueeze(-1)
    for p in probabilities:
        p *= share


def _branch_gradients(
    g: int,
    branch: Branch,
    query: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    lse: Tensor,
    scale: float,
    grads: dict[Any, Tensor],
) -> Tensor:
    """Gradients of one branch into `grads`; returns that of the call's query."""
    dtype = lse.dtype
    if _is_zero(branch.weight) and not grad_lse.any():
        return torch.zeros(query.shape, dtype=dtype, device=query.device)
    base = (query if branch.query is None else branch.query).to(dtype)
    query_map = _Affine(branch.query_affine)
    plain = query_map.forward(base)
    gamma = _rows(branch.gamma)
    content = None if branch.content_query is None else branch.content_query.to(dtype)
    q = plain if content is None else gamma * content + (1 - gamma) * plain
    segments = [
        _SegmentGrad(s, g, i, q, dtype, scale)
        for i, s in enumerate(branch.segments)
        if isinstance(s.logit_bias, Tensor) or s.logit_bias != NEG_INF
    ]
    q_grad = torch.empty_like(q)
    weight = _rows(branch.weight)
    weight_grad = q.new_zeros(q.shape[0], q.shape[2])
    keys = sum(s.k.value.shape[2] for s in segments)
    step = max(1, BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, q.shape[2], step):
        block = slice(start, start + step)
        qb, dout = q[:, :, block], grad_out[:, :, block].to(dtype)
        w = weight[:, :, block] if isinstance(weight, Tensor) and weight.shape[2] > 1 else weight
        upstream = w * dout
        parts = [s.probabilities(qb, block, lse[:, :, block]) for s in segments]
        _normalise(branch, [p for p, _ in parts], lse[:, :, block])
        out = sum(p @ s.v.value for s, (p, _) in zip(segments, parts, strict=True))
        weight_grad[:, block] = (dout * out).sum((1, 3))
        delta = (upstream * out).sum(-1) - grad_lse[:, :, block]
        q_grad[:, :, block] = sum(
            s.accumulate(qb, block, p, raw, upstream, delta)
            for s, (p, raw) in zip(segments, parts, strict=True)
        )
    for s in segments:
        s.finish(grads)
    if isinstance(branch.weight, Tensor):
        grads[(g, None, "weight", None)] = (
            weight_grad if branch.weight.ndim == 2 else weight_grad.sum(1)
        )
    if content is not None:
        grads[(g, None, "content_query", None)] = gamma * q_grad
        if isinstance(branch.gamma, Tensor):
            grads[(g, None, "gamma", None)] = (q_grad * (content - plain)).sum((1, 2, 3))
        q_grad = (1 - gamma) * q_grad
    q_grad = query_map.backward(q_grad, base, grads, (g, None, "query_affine"))
    if branch.query is not None:
        grads[(g, None, "query", None)] = q_grad
        return torch.zeros_like(q_grad)
    return q_grad


def attention_gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    branches: tuple[Branch, ...],
    softmax_scale: float,
    lse: Tensor,
) -> tuple[Tensor, dict[Any, Tensor]]:
    """Gradients of the query, and of the call's tensors by (branch, segment or None, field, affine
    part or None)."""
    grads: dict[Any, Tensor] = {}
    total = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
    if query.shape[0]:
        for g, branch in enumerate(branches):
            total += _branch_gradients(
                g, branch, query, grad_out, grad_lse[g], lse[g], softmax_scale, grads
            )
    return total, grads
