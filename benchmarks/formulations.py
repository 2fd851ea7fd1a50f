"""For each kind of shape: its inputs, and three ways to write the same result.

`ours` calls the public functions, statistics included. `official` is written as the method's own
code computes it: AdaIN in passes over whole tensors, concatenated keys and values, a dense mask, an
attention call for every image prompt. `materialised` is what a library kernel needs, ready in
memory: one attention for each softmax. It shares no code with the library, so the exact result is
computed from it, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from shapes import Problem
from torch import Tensor

import styleattn
from styleattn import Affine, Branch, Segment

Tensors = dict[str, Tensor]
Output = Tensor | tuple[Tensor, Tensor]  # as the public functions declare it
GAMMA, TEMPERATURE = 0.75, 1.5  # StyleID's
PROMPT_WEIGHT = 0.6
EPS = 1e-5


@dataclass(frozen=True)
class Attention:
    """One softmax over materialised tensors: weight * softmax(scale QK^T + row_bias key_bias^T) V.

    query [B, H, L, D]; key, value [B, H, S, D]; row_bias [L] (1 if None); key_bias [S] (0 if None).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    key_bias: Tensor | None = None
    row_bias: Tensor | None = None
    weight: float = 1.0

    def bias(self, samples: Tensor | None = None) -> Tensor | None:
        """The additive mask: [1, 1, 1 or L, S]."""
        if self.key_bias is None:
            return None
        if self.row_bias is None:
            return self.key_bias[None, None, None]
        rows = self.row_bias if samples is None else self.row_bias[samples]
        return (rows[:, None] * self.key_bias)[None, None]


class Formulation(NamedTuple):
    """The inputs of a kind and its three forms."""

    inputs: Callable[[Problem, torch.Generator], Tensors]
    ours: Callable[..., Output]
    official: Callable[[Problem, Tensors], Tensor]
    materialised: Callable[[Problem, Tensors], list[Attention]]


def _features(p: Problem, generator: torch.Generator, rows: int, tokens: int) -> Tensor:
    """[rows, H, tokens, D] over [rows, tokens, H, D] memory, as projections leave it, with the
    strong channel means and uneven channel scales of real models."""
    shape = (rows, 1, p.heads, p.head_dim)
    scale = 0.5 + torch.rand(shape, generator=generator)
    mean = torch.randn(shape, generator=generator)
    x = torch.randn(rows, tokens, p.heads, p.head_dim, generator=generator)
    return (x * scale + mean).transpose(1, 2)


def _self_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    names = ("query", "key", "value")
    return {name: _features(p, generator, p.batch, p.length) for name in names}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = _self_inputs(p, generator)
    if p.keys:
        t |= {n: _features(p, generator, p.batch, p.keys[0]) for n in ("key", "value")}
    return t


def _plain_ours(p: Problem, t: Tensors, backend: str | None, precision: str = "exact") -> Output:
    branches = (Branch((Segment(t["key"], t["value"]),)),)
    return styleattn.attention(t["query"], branches, precision=precision, backend=backend)


def _plain_official(p: Problem, t: Tensors) -> Tensor:
    return _sdpa(t["query"], t["key"], t["value"])


def _plain_materialised(p: Problem, t: Tensors) -> list[Attention]:
    return [Attention(t["query"], t["key"], t["value"], p.head_dim**-0.5)]


def _reference_rows(p: Problem) -> list[int]:
    half = p.batch // 2
    return [0] * half + [half] * (p.batch - half)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + EPS).sqrt()


def _adain(x: Tensor, mean_to: Tensor, std_to: Tensor) -> Tensor:
    mean, std = _statistics(x)
    return (x - mean) / std * std_to + mean_to


def _adain_to_rows(x: Tensor, rows: list[int]) -> Tensor:
    mean, std = _statistics(x)
    return (x - mean) / std * std[rows] + mean[rows]


def _shared_ours(p: Problem, t: Tensors, backend: str | None, precision: str = "exact") -> Output:
    return styleattn.shared_attention(
        t["query"],
        t["key"],
        t["value"],
        reference_rows=_reference_rows(p),
        score_shift=p.shift,
        precision=precision,
        backend=backend,
    )


def _shared_tensors(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    rows = _reference_rows(p)
    q, k = _adain_to_rows(t["query"], rows), _adain_to_rows(t["key"], rows)
    v = t["value"]
    return q, torch.cat([k, k[rows]], -2), torch.cat([v, v[rows]], -2)


def _shared_official(p: Problem, t: Tensors) -> Tensor:
    q, k, v = _shared_tensors(p, t)
    if p.shift == 0.0:
        return _sdpa(q, k, v)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * p.head_dim**-0.5
    logits[..., p.length :] += p.shift
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


def _shared_materialised(p: Problem, t: Tensors) -> list[Attention]:
    q, k, v = _shared_tensors(p, t)
    bias = None
    if p.shift != 0.0:
        bias = torch.zeros(2 * p.length, dtype=q.dtype, device=q.device)
        bias[p.length :] = p.shift
    return [Attention(q, k, v, p.head_dim**-0.5, bias)]


def _bank_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = _self_inputs(p, generator)
    for name in ("query", "key", "value"):
        t[f"bank_{name}"] = _features(p, generator, p.references, p.length)
    for name in ("query", "key"):  # a bank stores the references' statistics, not their queries
        mean, std = _statistics(t[f"bank_{name}"])
        t[f"{name}_mean"], t[f"{name}_std"] = (x.mean(0, keepdim=True) for x in (mean, std))
    t["bank_mean"] = t["bank_key"].mean(-2)
    del t["bank_query"]
    return t


def _bank_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    def affine(name: str) -> Affine:
        own = styleattn.token_stats(t[name], backend=backend)
        mean, std = (t[f"{name}_{s}"][:, :, 0].float() for s in ("mean", "std"))
        return styleattn.adain_affine(own, type(own)(mean.expand_as(own.mean), std))

    segments = [Segment(t["key"], t["value"], key_affine=affine("key"))]
    for r in range(p.references):
        mean = t["bank_mean"][r].float().expand(p.batch, -1, -1)
        centre = Affine(torch.ones_like(mean), torch.zeros_like(mean), mean)
        rows = slice(r, r + 1)
        segments.append(Segment(t["bank_key"][rows], t["bank_value"][rows], key_affine=centre))
    branch = Branch(tuple(segments), query_affine=affine("query"))
    return styleattn.attention(t["query"], (branch,), backend=backend)


def _bank_tensors(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    q = _adain(t["query"], t["query_mean"], t["query_std"])
    k = _adain(t["key"], t["key_mean"], t["key_std"])
    keys, values = (
        [x[r : r + 1].expand(p.batch, -1, -1, -1) for r in range(p.references)]
        for x in (t["bank_key"], t["bank_value"])
    )
    return q, torch.cat([k, *keys], -2), torch.cat([t["value"], *values], -2)


def _bank_official(p: Problem, t: Tensors) -> Tensor:
    return _sdpa(*_bank_tensors(p, t))


def _bank_materialised(p: Problem, t: Tensors) -> list[Attention]:
    return [Attention(*_bank_tensors(p, t), p.head_dim**-0.5)]


def _injected_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = {n: _features(p, generator, p.batch, p.length) for n in ("query", "content")}
    return t | {n: _features(p, generator, 1, p.length) for n in ("key", "value")}


def _injected_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    return styleattn.injected_attention(
        t["query"],
        t["key"],
        t["value"],
        content_query=t["content"],
        gamma=GAMMA,
        temperature=TEMPERATURE,
        backend=backend,
    )


def _injected_tensors(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    q = GAMMA * t["content"] + (1 - GAMMA) * t["query"]
    return q, torch.cat([t["key"]] * p.batch), torch.cat([t["value"]] * p.batch)


def _injected_official(p: Problem, t: Tensors) -> Tensor:
    q, k, v = _injected_tensors(p, t)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * p.head_dim**-0.5 * TEMPERATURE
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


def _injected_materialised(p: Problem, t: Tensors) -> list[Attention]:
    return [Attention(*_injected_tensors(p, t), p.head_dim**-0.5 * TEMPERATURE)]


def _prompt_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = {"query": _features(p, generator, p.batch, p.length)}
    for i, tokens in enumerate(p.keys):
        t |= {f"{n}_{i}": _features(p, generator, p.batch, tokens) for n in ("key", "value")}
    return t


def _decoupled_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    prompts = [(t[f"key_{i}"], t[f"value_{i}"]) for i in range(1, len(p.keys))]
    return styleattn.decoupled_attention(
        t["query"], t["key_0"], t["value_0"], prompts, weights=PROMPT_WEIGHT, backend=backend
    )


def _decoupled_official(p: Problem, t: Tensors) -> Tensor:
    out = _sdpa(t["query"], t["key_0"], t["value_0"])
    for i in range(1, len(p.keys)):
        out = out + PROMPT_WEIGHT * _sdpa(t["query"], t[f"key_{i}"], t[f"value_{i}"])
    return out


def _decoupled_materialised(p: Problem, t: Tensors) -> list[Attention]:
    calls = []
    for i in range(len(p.keys)):
        weight = PROMPT_WEIGHT if i else 1.0
        key, value = t[f"key_{i}"], t[f"value_{i}"]
        calls.append(Attention(t["query"], key, value, p.head_dim**-0.5, weight=weight))
    return calls


def _biased_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = _self_inputs(p, generator)
    before, redux = p.keys[0], p.keys[0] + p.keys[1]
    t["rows"], t["columns"] = torch.ones(p.length), torch.zeros(p.length)
    t["rows"][before:redux] = 0.0
    t["columns"][before:redux] = p.shift
    t["mask"] = (t["rows"][:, None] * t["columns"])[None, None]
    return t


def _biased_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    bias = (p.shift * t["rows"]).expand(p.batch, -1)
    segments, start = [], 0
    for i, tokens in enumerate(p.keys):
        key, value = (t[n].narrow(2, start, tokens) for n in ("key", "value"))
        segments.append(Segment(key, value, logit_bias=bias if i == 1 else 0.0))
        start += tokens
    return styleattn.attention(t["query"], (Branch(tuple(segments)),), backend=backend)


def _biased_official(p: Problem, t: Tensors) -> Tensor:
    return _sdpa(t["query"], t["key"], t["value"], t["mask"])


def _biased_materialised(p: Problem, t: Tensors) -> list[Attention]:
    scale = p.head_dim**-0.5
    return [Attention(t["query"], t["key"], t["value"], scale, t["columns"], t["rows"])]


def _prompt_gate(p: Problem, like: Tensor) -> Tensor:
    """[B, 1, 1, 1]: the picture's weight, 0 in the unconditional first row."""
    gate = torch.full((p.batch, 1, 1, 1), PROMPT_WEIGHT, dtype=like.dtype, device=like.device)
    gate[0] = 0.0
    return gate


def _joint_inputs(p: Problem, generator: torch.Generator) -> Tensors:
    t = _prompt_inputs(p, generator)
    return t | {"gate": _prompt_gate(p, t["query"])}


def _joint_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    gate = t["gate"].float().expand(-1, p.heads, -1, p.head_dim)[:, :, 0]
    picture = Segment(
        t["key_1"],
        t["value_1"],
        logit_scale=t["gate"][:, 0, 0, 0],
        value_affine=Affine(gate, torch.zeros_like(gate)),
    )
    branch = Branch((Segment(t["key_0"], t["value_0"]), picture))
    return styleattn.attention(t["query"], (branch,), backend=backend)


def _joint_tensors(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    key, value = (torch.cat([t[f"{n}_0"], t["gate"] * t[f"{n}_1"]], -2) for n in ("key", "value"))
    return t["query"], key, value


def _joint_official(p: Problem, t: Tensors) -> Tensor:
    return _sdpa(*_joint_tensors(p, t))


def _joint_materialised(p: Problem, t: Tensors) -> list[Attention]:
    return [Attention(*_joint_tensors(p, t), p.head_dim**-0.5)]


def _null_ours(p: Problem, t: Tensors, backend: str | None) -> Output:
    segment = Segment(t["key_0"], t["value_0"], null_keys=p.references)
    return styleattn.attention(t["query"], (Branch((segment,)),), backend=backend)


def _null_tensors(p: Problem, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    nulls = t["key_0"].new_zeros(p.batch, p.heads, p.references, p.head_dim)
    return t["query"], torch.cat([t["key_0"], nulls], -2), torch.cat([t["value_0"], nulls], -2)


def _null_official(p: Problem, t: Tensors) -> Tensor:
    return _sdpa(*_null_tensors(p, t))


def _null_materialised(p: Problem, t: Tensors) -> list[Attention]:
    return [Attention(*_null_tensors(p, t), p.head_dim**-0.5)]


FORMULATIONS: dict[str, Formulation] = {
    "plain": Formulation(_plain_inputs, _plain_ours, _plain_official, _plain_materialised),
    "shared": Formulation(_self_inputs, _shared_ours, _shared_official, _shared_materialised),
    "bank": Formulation(_bank_inputs, _bank_ours, _bank_official, _bank_materialised),
    "injected": Formulation(
        _injected_inputs, _injected_ours, _injected_official, _injected_materialised
    ),
    "decoupled": Formulation(
        _prompt_inputs, _decoupled_ours, _decoupled_official, _decoupled_materialised
    ),
    "biased": Formulation(_biased_inputs, _biased_ours, _biased_official, _biased_materialised),
    "joint": Formulation(_joint_inputs, _joint_ours, _joint_official, _joint_materialised),
    "null": Formulation(_prompt_inputs, _null_ours, _null_official, _null_materialised),
}
