"""Cross-Image Attention: the structure of one picture painted with the appearance of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._base import Number, SelfCall, off
from ._facts import Facts
from ._injection import Injection, attend, injected, own, share_of

_QUERIES = 1024
"""Queries whose probabilities are held at a time where contrast needs them written out."""


@dataclass(frozen=True, kw_only=True)
class CrossImageAttention(Injection):
    """Cross-Image Attention for Zero-Shot Appearance Transfer.

        P = softmax( sigma * Q K_app^T )
        P' = clip( contrast * (P - 1/M) + 1/M, 0, 1 )        out = P' V_app

    Two references, structure and appearance. Where the structure is at work (weight s) its keys
    and values take the place of the appearance's: s * struct + (1 - s) * app. The official code
    does so at every fifth step of the first 40 %: `structure_steps` is that schedule. The contrast
    is no attention (its weights do not sum to 1 and are clipped), so with a contrast other than 1
    the images' rows are computed apart, some queries at a time, in fp32.

    Args:
        contrast: 1.67 in the paper; 1 is plain attention.
        layers: as `Injection`. The paper takes the decoder's layers of 32 x 32 tokens in steps
            10-70 and of 64 x 64 in steps 10-90 of 100: two of these methods, one for each.
        steps: as `Injection`.
        references: structure and appearance; the structure's `steps` say when it is used.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Alaluf et al., Cross-Image Attention for Zero-Shot Appearance Transfer, SIGGRAPH 2024,
        arXiv 2311.03335.
    """

    contrast: float = 1.67

    name: ClassVar[str] = "cross_image_attention"
    ROLES: ClassVar[tuple[str, ...]] = ("structure", "appearance")
    NUMBERS: ClassVar[tuple[str, ...]] = ("contrast",)
    facts: ClassVar[Facts] = Facts(
        paper="Cross-Image Attention for Zero-Shot Appearance Transfer, arXiv 2311.03335",
        modality="image",
        route="inversion, attention",
        needs="a content picture (structure), a style picture (appearance)",
    )

    def _reasons(self) -> list[str]:
        reason = self._number("contrast", 0)
        return [reason] if reason else []

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        structure, appearance = share_of(call, 0), share_of(call, 1)
        rest = (1 - structure) * appearance
        shares = [(s, r) for s, r in ((structure, 0), (rest, 1)) if not off(s)]
        contrast = call.numbers["contrast"]
        if not isinstance(contrast, Tensor) and contrast == 1.0:
            return attend(call, [(s, (injected(call, r),)) for s, r in shares])
        plain = attend(call, [(1.0, (own(call, references=False),))])
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32))
        out = wide
        for share, reference in shares:
            out = out + _wide(share) * (self._contrasted(call, wide, reference, contrast) - wide)
        return out.to(plain.dtype)

    @staticmethod
    def _contrasted(call: SelfCall, plain: Tensor, reference: int, contrast: Number) -> Tensor:
        """The images' rows under a reference's keys, contrasted; reference rows as they are."""
        pairs = enumerate(call.rows.serving(reference))
        rows = [_one_row(call, b, row, contrast) if row >= 0 else plain[b] for b, row in pairs]
        return torch.stack(rows)


def _wide(share: Number) -> Number:
    """A share per query as [N, 1]."""
    return share[:, None] if isinstance(share, Tensor) and share.ndim else share


def _one_row(call: SelfCall, b: int, row: int, contrast: Number) -> Tensor:
    """[H, N, D]: the contrasted attention of row b to the keys of another row."""
    math = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(math) for x in (call.query[b], call.key[row], call.value[row]))
    scale = query.shape[-1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    bias = 0.0 if call.key_bias is None else call.key_bias[row].to(math)
    even = 1.0 / key.shape[-2]
    parts = []
    for part in query.split(_QUERIES, dim=-2):
        shares = torch.softmax(scale * (part @ key.transpose(-1, -2)) + bias, dim=-1)
        parts.append(torch.clamp(contrast * (shares - even) + even, 0, 1) @ value)
    return torch.cat(parts, dim=-2)


def structure_steps(num_inference_steps: int) -> tuple[float, ...]:
    """When the structure's own keys and values are used: every fifth step of the first 40 %.

    A curve for `Reference.steps`, one weight a step.

    Raises:
        ValueError: fewer than three steps.
    """
    if num_inference_steps < 3:
        raise ValueError(f"a schedule needs at least three steps, got {num_inference_steps}")
    last = 0.4 * num_inference_steps
    return tuple(float(i % 5 == 0 and i < last) for i in range(num_inference_steps))
