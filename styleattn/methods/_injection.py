"""What the methods that put another image's features into self-attention have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.references import Layers, Reference, Steps

from ._base import Layer, NormCall, Number, SelfCall, Settings
from ._joint import JointCall

Share = Number
"""How much of an output is injected: a number, a 0-dim tensor, or [N] per query."""


@dataclass(frozen=True, kw_only=True)
class Injection(Settings):
    """Base of methods whose images read features of reference rows; those rows stay as they are.

    Args:
        layers: which layers: "all", "late", "style_id", "style", "layout", patterns, or diffusers'
            scale dictionary. A number there blends: 0.5 is half the method's output, half the
            layer's own.
        steps: when: (start, end) fractions of the run, or a curve of such shares.
        references: weights, layers, steps and masks, one for each of `ROLES`; None for plain ones,
            or for the bank's.
    """

    layers: Layers = "late"
    steps: Steps = (0.0, 1.0)
    references: tuple[Reference, ...] | None = None

    ROLES: ClassVar[tuple[str, ...]] = ("style",)
    NUMBERS: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        reasons = [*self._reasons(), *self._plain_steps()]
        whole, references = self._plain_references(), self.references
        if not whole or (references is not None and len(references) != len(self.ROLES)):
            reasons.append(
                f"references must be {len(self.ROLES)} Reference ({', '.join(self.ROLES)}), or None"
            )
        self._refuse(reasons)

    def _reasons(self) -> list[str]:
        """What is wrong with the method's own knobs."""
        return []

    def _number(self, knob: str, low: float = -float("inf"), high: float = float("inf")) -> str:
        """What is wrong with a number that must lie in [low, high]; "" if nothing."""
        value = getattr(self, knob)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            return f"{knob} must be a finite number, got {value!r}"
        if not low <= value <= high:
            return f"{knob} must lie in [{low:g}, {high:g}], got {value}"
        return ""

    @property
    def shares_norm(self) -> bool:
        """No GroupNorm is concerned."""
        return False

    @property
    def control_reference(self) -> bool:
        """A ControlNet does not act on the reference rows."""
        return False

    def takes(self, layer: Layer) -> bool:
        """Every chosen layer."""
        return True

    def group_norm(self, call: NormCall) -> Tensor:
        """The norm as it is."""
        return call.output

    def _check(self, call: SelfCall | JointCall) -> None:
        """As many references as the method has roles."""
        if len(call.strengths) != len(self.ROLES):
            raise ValueError(
                f"{type(self).__name__} works with {len(self.ROLES)} references"
                f" ({', '.join(self.ROLES)}), got {len(call.strengths)}"
            )


def serving(call: SelfCall, reference: int) -> Tensor:
    """int [B]: for every row the row of the reference in its chunk; -1 for reference rows."""
    return torch.tensor(call.rows.serving(reference))


def of_reference(x: Tensor, call: SelfCall, reference: int) -> Tensor:
    """x [B, ...] with every row replaced by the reference's of its chunk; reference rows as they
    are."""
    pairs = enumerate(call.rows.serving(reference))
    index = torch.tensor([b if row < 0 else row for b, row in pairs], device=x.device)
    return x.index_select(0, index)


def injected(call: SelfCall, reference: int, *, logit_scale: Number = 1.0) -> Segment:
    """The keys and values of a reference, for the rows that are none."""
    return Segment(
        call.key,
        call.value,
        rows=serving(call, reference),
        logit_scale=logit_scale,
        key_bias=call.key_bias,
    )


def own(call: SelfCall, *, references: bool) -> Segment:
    """The rows' own keys and values: of the reference rows only, or of all others only."""
    mine = call.rows.is_reference()
    rows = [b if is_one == references else -1 for b, is_one in enumerate(mine)]
    return Segment(call.key, call.value, rows=torch.tensor(rows), key_bias=call.key_bias)


def share_of(call: SelfCall, reference: int) -> Share:
    """The strength of a reference, times its mask."""
    strength, mask = call.strengths[reference], call.masks[reference]
    return strength if mask is None else strength * torch.exp(mask)


def whole(share: Share) -> bool:
    """Whether a share is known to be 1."""
    return not isinstance(share, Tensor) and share == 1.0


def per_row(call: SelfCall, share: Share, references: float) -> Tensor:
    """[B] or [B, N]: the share for ordinary rows, another number for reference rows."""
    return call.rows.numbers(share, references, call.query.device)


def attend(
    call: SelfCall,
    parts: Sequence[tuple[Share, tuple[Segment, ...]]],
    *,
    content_query: Tensor | None = None,
    gamma: Number = 0.0,
) -> Tensor:
    """The weighted sum of attentions, the rest to 1 the row's own; reference rows attend as ever.

        out = sum_p share_p * Attn(Q', segments_p) + (1 - sum_p share_p) * Attn(Q, own)

    Args:
        parts: shares and segments; the segments are absent (rows -1) for reference rows.
        content_query, gamma: of Q' = gamma * content_query + (1 - gamma) * Q; gamma is a number or
            [B].
    """
    plain = own(call, references=True)
    branches, rest = [], 1.0
    alone = len(parts) == 1 and whole(parts[0][0])
    for i, (share, segments) in enumerate(parts):
        first = i == 0
        weight: Number = 1.0 if alone else per_row(call, share, 1.0 if first else 0.0)
        branches.append(
            Branch(
                (*segments, *((plain,) if first else ())),
                weight=weight,
                content_query=content_query,
                gamma=gamma if content_query is not None else 0.0,
            )
        )
        rest = rest - share  # type: ignore[assignment]
    if not alone:
        branches.append(Branch((own(call, references=False),), weight=per_row(call, rest, 0.0)))
    out = attention(
        call.query, tuple(branches), softmax_scale=call.softmax_scale, backend=call.backend
    )
    assert isinstance(out, Tensor)
    return out
