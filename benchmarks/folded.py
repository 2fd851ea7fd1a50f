"""Shared attention folded by hand, for libraries that give back a log-sum-exp: AdaIN of the keys
goes into one query for a row's own keys and one for its reference's, and a number per query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import Case
from torch import Tensor

EPS = 1e-5


class Folded(NamedTuple):
    """tensors: query for the own keys [B], query for the reference's keys, keys and values [B], the
    terms that the logits of the targets' queries lack, the targets' reference rows, the targets."""

    tensors: tuple[Tensor, ...]
    scale: float


def fold_shared(case: Case) -> Folded:
    """The tensors of a `shared` case.

    K' = c K + e:   Q' . K' = (c Q') . K + Q' . e     Q' . K_ref as it is
    """
    p, t = case.problem, case.tensors
    half = p.batch // 2
    reference = torch.tensor([0] * half + [half] * (p.batch - half), device=case.device)
    targets = torch.tensor([b for b in range(p.batch) if b not in (0, half)], device=case.device)
    rows = reference[targets]
    query, key = (t[name].float() for name in ("query", "key"))
    stats = [
        (x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + EPS).sqrt()) for x in (query, key)
    ]
    (query_mean, query_std), (key_mean, key_std) = stats
    aligned = (query - query_mean) / query_std * query_std[reference] + query_mean[reference]
    scale = key_std[reference] / key_std
    shift = key_mean[reference] - scale * key_mean
    own = aligned * scale
    own[0], own[half] = query[0], query[half]  # references see themselves as they are
    sigma = p.head_dim**-0.5
    own_term = (aligned * shift).sum(-1)[targets] * sigma
    other_term = torch.full_like(own_term, p.shift)
    queries = (own.to(case.dtype), aligned[targets].to(case.dtype))
    rest = (t["key"], t["value"], own_term, other_term, rows, targets)
    return Folded((*queries, *rest), sigma)
