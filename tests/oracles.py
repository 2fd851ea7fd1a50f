"""Formulas written out from the papers and from the definition, sharing no code with styleattn."""

import math

import numpy as np
import torch


def at(x, b, i):
    if not isinstance(x, torch.Tensor):
        return float(x)
    return float(x) if x.ndim == 0 else float(x[b]) if x.ndim == 1 else float(x[b, i])


def mapped(x, affine, b, h):
    if affine is None:
        return x
    return affine.scale[b, h].double().numpy() * x + affine.shift[b, h].double().numpy()


def definition(query, branches, scale=None):
    """The operation as nested loops over rows, heads and queries in numpy fp64: out and lse."""
    q0 = query.double().numpy()
    b_, h_, l_, d_ = q0.shape
    scale = d_**-0.5 if scale is None else scale
    out = np.zeros(q0.shape)
    lse = np.full((len(branches), b_, h_, l_), -np.inf)
    for g, branch in enumerate(branches):
        for b in range(b_):
            for h in range(h_):
                for i in range(l_):
                    q = (query if branch.query is None else branch.query)[b, h, i].double().numpy()
                    q = mapped(q, branch.query_affine, b, h)
                    if branch.content_query is not None:
                        gamma = at(branch.gamma, b, i)
                        q = gamma * branch.content_query[b, h, i].double().numpy() + (1 - gamma) * q
                    logits, values = [], []
                    for s in branch.segments:
                        r = (
                            b
                            if s.rows is None and s.key.shape[0] > 1
                            else 0
                            if s.rows is None
                            else int(s.rows[b])
                        )
                        for j in range(s.key.shape[2] if r >= 0 else 0):
                            k, v = (x[r, h, j].double().numpy() for x in (s.key, s.value))
                            if s.own_key is not None:
                                lam = at(s.kv_blend, b, i)
                                k = lam * k + (1 - lam) * s.own_key[b, h, j].double().numpy()
                                v = lam * v + (1 - lam) * s.own_value[b, h, j].double().numpy()
                            k, v = mapped(k, s.key_affine, b, h), mapped(v, s.value_affine, b, h)
                            bias = at(s.logit_bias, b, i)
                            if s.key_bias is not None:
                                bias += float(
                                    s.key_bias[j]
                                    if s.key_bias.ndim == 1
                                    else s.key_bias[min(r, len(s.key_bias) - 1), j]
                                )
                            if bias > -np.inf:
                                logits.append(at(s.logit_scale, b, i) * scale * float(q @ k) + bias)
                                values.append(v)
                        logits += [0.0] * s.null_keys
                        values += [np.zeros(d_)] * s.null_keys
                    if logits:
                        x = np.array(logits)
                        p = np.exp(x - x.max())
                        lse[g, b, h, i] = x.max() + math.log(p.sum())
                        out[b, h, i] += at(branch.weight, b, i) * (p / p.sum()) @ np.stack(values)
    return torch.from_numpy(out), torch.from_numpy(lse)


def _first_of_half(x, scale=1.0):
    """The first row of each half for every row; the rows that are not first get it scaled."""
    half = x.shape[0] // 2
    parts = []
    for start in (0, half):
        ref = x[start : start + 1]
        parts += [ref] + [ref * scale] * (half - 1)
    return torch.cat(parts)


def _match_statistics(x, eps=1e-5):
    mean, std = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + eps).sqrt()
    return (x - mean) / std * _first_of_half(std) + _first_of_half(mean)


def official_style_aligned(q, k, v, *, adain=(True, True, False), score_scale=1.0, score_shift=0.0):
    """StyleAligned as its authors formulate it, in the inputs' dtype: AdaIN passes, concatenated K
    and V, einsum for a shift."""
    q, k, v = (
        _match_statistics(x) if wanted else x for x, wanted in zip((q, k, v), adain, strict=True)
    )
    n = k.shape[-2]
    k = torch.cat([k, _first_of_half(k, score_scale)], -2)
    v = torch.cat([v, _first_of_half(v)], -2)
    if score_shift == 0.0:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits[..., n:] += score_shift
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v)


def official_lse(q, k, *, adain=(True, True), score_scale=1.0, score_shift=0.0):
    """The log-sum-exp of the official joint softmax."""
    q, k = (_match_statistics(x) if wanted else x for x, wanted in zip((q, k), adain, strict=True))
    n = k.shape[-2]
    logits = (
        q
        @ torch.cat([k, _first_of_half(k, score_scale)], -2).transpose(-1, -2)
        * q.shape[-1] ** -0.5
    )
    logits[..., n:] += score_shift
    return logits.logsumexp(-1)


def official_style_id(q, k, v, q_content, gamma, temperature):
    """StyleID: query blend, temperature on the logits, the style's K and V."""
    q = gamma * q_content + (1 - gamma) * q
    return (temperature * q.shape[-1] ** -0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v


def official_ip_adapter(q, k, v, prompts, weights, masks):
    """IP-Adapter: one attention for the text and one for every image prompt, added."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q, k, v)
    for (ki, vi), w, m in zip(prompts, weights, masks, strict=True):
        part = sdpa(q, ki, vi)
        out = out + w * (part if m is None else part * m[..., None])
    return out
