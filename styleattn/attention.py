"""The public operation and its instances: shared, injected and decoupled attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from styleattn import _ops, backends
from styleattn._checks import (
    Number,
    as_rows,
    check_precision,
    like_reasons,
    mask_reasons,
    masked,
    number_reasons,
    reference_reasons,
)
from styleattn._maps import on_device
from styleattn.branch import Affine, Branch, Segment, check_query, normalize
from styleattn.errors import describe, invalid
from styleattn.statistics import adain_to_rows, eps_reasons


def attention(
    query: Tensor,
    branches: Sequence[Branch],
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over branches of segments: one softmax per branch, branches added with weights.

        out[b,h,i] = sum_g w_g(b,i) * softmax over the keys of g (logit) . V'
        logit = alpha_s sigma <Q', K'> + beta_s + keybias_s
        Q' = gamma Q_content + (1 - gamma)(a_q Q + b_q)      K' = a_k K + b_k      V' = a_v V + b_v

    K and V are read where they are: affines are folded, row maps and segments need no copy and no
        concatenation.

    Args:
        query: [B, H, L, D] fp32, fp16 or bf16 (fp64 with backend="reference"); any strides with a
            contiguous last dim.
        branches: at least one `Branch`; see there, and `Segment`, for shapes. A query that loses
            every key of a branch gets zero from it, and an LSE of -inf.
        softmax_scale: sigma; D ** -0.5 if None.
        return_lse: also return the log-sum-exp of every branch, [branches, B, H, L] fp32, natural
            logarithm. Within 1e-5 in fp32 (relative above 1), within 1e-3 in half precision; there
            a branch with a folded query (an affine, a blend, a scale per row) costs one more pass
            over its keys, which a call without it does not pay.
        precision: "fast" multiplies queries and keys as INT8 where that saves time (backend
            "triton" on sm_80 and sm_89, and on sm_90 at head dimensions 64 and 128; computed as
            "exact" elsewhere, and for segments that blend or bias their keys). Half precision
            only, no gradients. With q = a_k Q', c the mean of the segment's keys, scales per query
            and per 128 keys, the logits of query i move by at most

                eps_i = |alpha| sigma / 254
                        * max_j (max |q_i| |k_j - c|_1 + m |q_i|_1 + D m max |q_i| / 254)

            (m is max |k - c| over j's 128 keys), so its LSE by eps_i and its output by
            (exp(2 eps_i) - 1) sum_j p_ij |V'_j|, beside what "exact" loses. Errors of both signs
            cancel: the logits' root mean square error is alpha sigma / (127 sqrt(12)) times
            sqrt(max |q_i|^2 |k_j - c|_2^2 + max |k - c|^2 |q_i|_2^2). "exact" never does this.
        backend: "reference", "torch", "cpu", "triton", or None for the first that can run the call
            on the query's device.

    Returns:
        out [B, H, L, D] in the query's dtype (over memory laid out [B, L, H, D]), or (out, lse).
        Softmax, statistics and sums are computed in fp32. Gradients are exact with every backend.

    Raises:
        Invalid: the call has no meaning; all reasons at once.
        Unsupported: the backend asked for cannot run it; all reasons at once.

    Source: of INT8 products with centred keys: Zhang et al., SageAttention, arXiv 2410.02367.
    """
    return _run("attention", query, branches, softmax_scale, return_lse, backend, precision)


def _run(
    call: str,
    query: Tensor,
    branches: Sequence[Branch],
    softmax_scale: float | None,
    return_lse: bool,
    backend: str | None,
    precision: str = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    backends.check_name(call, backend)
    check_precision(call, precision)
    normal, scale = normalize(call, query, branches, softmax_scale)
    out, lse = _ops.attention(query, normal, scale, backend, call, return_lse, precision == "fast")
    return (out, lse) if return_lse else out


def shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    reference_rows: Tensor | Sequence[int],
    adain_queries: bool = True,
    adain_keys: bool = True,
    adain_values: bool = False,
    score_scale: Number = 1.0,
    score_shift: Number = 0.0,
    eps: float = 1e-5,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """StyleAligned's shared attention: every row attends to its own tokens and to those of its
    reference row, in one softmax.

        out = softmax( sigma [ Q'K'^T , score_scale Q'K_ref^T + score_shift ] ) [ V' ; V_ref ],   X'
        = AdaIN(X, X_ref)

    A reference row (its reference is itself) equals plain self-attention under every option, and is
    computed as such.

    Args:
        query, key, value: [B, H, N, D].
        reference_rows: int [B], for each row the row that is its reference; -1: none (plain
            self-attention). On the CPU it is read without a device synchronisation, and checked.
        adain_queries, adain_keys, adain_values: AdaIN to the reference's statistics over tokens
            (unbiased variance, eps inside the root), folded.
        score_scale: multiplies the reference's keys, except for reference rows; scalar or [B].
        score_shift: added to the reference's logits; scalar or [B]; log 2 for transfer from a
            picture. -inf removes the sharing.
        return_lse: also the log-sum-exp [1, B, H, N] of the official formulation (a reference row
            counts its keys twice).
        precision: "exact" or "fast": see `attention`.

    Raises:
        Invalid, Unsupported: as `attention`.

    Source: Hertz et al., Style Aligned Image Generation via Shared Attention, arXiv 2312.02133, eq.
        3 and sec. 3.2.
    """
    check_query("shared_attention", query)
    rows = as_rows(reference_rows)
    reasons = reference_reasons(rows, query) + like_reasons(query, key=key, value=value)
    reasons += eps_reasons(eps)
    reasons += number_reasons("score_scale", score_scale, query)
    reasons += number_reasons("score_shift", score_shift, query)
    if reasons:
        raise invalid("shared_attention", reasons, f"query {describe(query)}")
    own = torch.arange(len(rows), dtype=rows.dtype, device=rows.device)
    plain = (rows == own) | (rows < 0)
    on = on_device(rows, query.device)

    def adain(wanted: bool, x: Tensor) -> tuple[Affine | None, Tensor | None]:
        return adain_to_rows(x, on, eps=eps, backend=backend) if wanted else (None, None)

    query_affine, _ = adain(adain_queries, query)
    key_affine, key_mean = adain(adain_keys, key)
    value_affine, _ = adain(adain_values, value)
    reference_map = None
    if key_mean is not None and query.dtype in (torch.float16, torch.bfloat16):
        reference_map = Affine(torch.ones_like(key_mean), torch.zeros_like(key_mean), key_mean)
    segments = (
        Segment(key, value, key_affine=key_affine, value_affine=value_affine),
        Segment(
            key,
            value,
            rows=torch.where(plain, -1, rows),
            key_affine=reference_map,
            logit_scale=score_scale,
            logit_bias=score_shift,
        ),
    )
    call, branches = "shared_attention", (Branch(segments, query_affine=query_affine),)
    result = _run(call, query, branches, softmax_scale, return_lse, backend, precision)
    if not return_lse:
        return result
    return result[0], _counted_twice(result[1], rows == own, score_shift)


def _counted_twice(lse: Tensor, rows: Tensor, shift: Number) -> Tensor:
    """The log-sum-exp of rows that see their keys once more, with a shift on the logits."""
    shift = torch.as_tensor(shift, dtype=lse.dtype, device=lse.device).expand(len(rows))
    more = torch.where(on_device(rows, lse.device), torch.nn.functional.softplus(shift), 0.0)
    return lse + more[None, :, None, None]


def injected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    content_query: Tensor | None = None,
    gamma: Number = 0.75,
    temperature: Number = 1.5,
    own_key: Tensor | None = None,
    own_value: Tensor | None = None,
    kv_blend: Number = 1.0,
    rows: Tensor | Sequence[int] | None = None,
    key_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """StyleID's attention injection: the style's keys and values, part of the content's query, a
    temperature.

        out = softmax( temperature sigma Q' K^T ) V,   Q' = gamma Q_content + (1 - gamma) Q
        K = kv_blend K_style + (1 - kv_blend) K_own, V likewise

    Args:
        query: [B, H, L, D], of the stylised row.
        key, value: [R, H, S, D], the style's; S may differ from L.
        content_query: [B, H, L, D] or [1, H, L, D]; None leaves the query as it is (and gamma
            unused).
        gamma, temperature, kv_blend: scalar or [B]. The paper: 0.75, 1.5, 1.
        own_key, own_value: [B, H, S, D], needed when kv_blend < 1.
        rows: int [B], the style row that serves each query row; needed unless R is 1 or B.
        precision: "exact" or "fast": see `attention`.

    Raises:
        Invalid, Unsupported: as `attention`.

    Source: Chung et al., Style Injection in Diffusion, CVPR 2024, arXiv 2312.09008, eq. 5-7.
    """
    check_query("injected_attention", query)
    if (
        isinstance(content_query, Tensor)
        and content_query.ndim == 4
        and content_query.shape[0] == 1
    ):
        content_query = content_query.expand(query.shape[0], -1, -1, -1)
    reasons = number_reasons("gamma", gamma, query)
    if reasons:
        raise invalid("injected_attention", reasons, f"query {describe(query)}")
    segment = Segment(
        key,
        value,
        rows=as_rows(rows),
        logit_scale=temperature,
        key_bias=key_bias,
        own_key=own_key,
        own_value=own_value,
        kv_blend=kv_blend,
    )
    share = 0.0 if content_query is None else gamma
    branch = Branch((segment,), content_query=content_query, gamma=share)
    call = "injected_attention"
    return _run(call, query, (branch,), softmax_scale, return_lse, backend, precision)


def decoupled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_prompts: Sequence[tuple[Tensor, Tensor]],
    *,
    weights: Number | Sequence[Number],
    masks: Sequence[Tensor | None] | None = None,
    key_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decoupled cross-attention (IP-Adapter, CSGO): text and every image prompt, each with its own
    softmax, in one call.

        out = Attn(Q, K, V) + sum_n weight_n mask_n Attn(Q, K_n, V_n)

    Args:
        query: [B, H, L, D]. key, value: [R, H, S, D], the text's.
        image_prompts: pairs (key, value), each [R_n, H, S_n, D].
        weights: one number for all, or one per prompt; each a scalar, [B] or [B, L].
        masks: one per prompt or None; [L], [1, L] or [B, L], multiplying its weight (they may leave
            [0, 1]).
        key_bias: [S] or [R, S], additive on the text's logits; -inf masks padding.

    Raises:
        Invalid, Unsupported: as `attention`.

    Source: Ye et al., IP-Adapter, arXiv 2308.06721, eq. 5.
    """
    check_query("decoupled_attention", query)
    batch, _, length, _ = query.shape
    prompts = list(image_prompts) if isinstance(image_prompts, (list, tuple)) else []
    many = isinstance(weights, (list, tuple))
    per_prompt: list[Any] = list(weights) if many else [weights] * len(prompts)  # type: ignore[arg-type]
    per_mask: list[Any] = list(masks) if isinstance(masks, (list, tuple)) else [None] * len(prompts)
    reasons = [
        f"{name} must be a sequence, got {describe(x)}"
        for name, x in (("image_prompts", image_prompts), ("masks", masks))
        if not isinstance(x, (list, tuple)) and not (x is None and name == "masks")
    ]
    reasons += [
        f"{name} must have one entry per image prompt ({len(prompts)}), got {len(entries)}"
        for name, entries in (("weights", per_prompt), ("masks", per_mask))
        if len(entries) != len(prompts)
    ]
    reasons += [
        f"image_prompts[{n}] must be a pair (key, value)"
        for n, pair in enumerate(prompts)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2
    ]
    for n, mask in enumerate(per_mask):
        reasons += mask_reasons(n, mask, query)
    for n, (weight, mask) in enumerate(zip(per_prompt, per_mask, strict=False)):
        if mask is not None:
            reasons += number_reasons(f"weights[{n}]", weight, query, per_query=True)
    if reasons:
        raise invalid("decoupled_attention", reasons, f"query {describe(query)}")
    branches = [Branch((Segment(key, value, key_bias=key_bias),))]
    for (k, v), weight, mask in zip(prompts, per_prompt, per_mask, strict=True):
        branches.append(Branch((Segment(k, v),), weight=masked(weight, mask, batch, length)))
    return _run("decoupled_attention", query, branches, softmax_scale, return_lse, backend)
