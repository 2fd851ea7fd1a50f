"""StyleAligned: shared self-attention, AdaIN of queries and keys, shared GroupNorm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from styleattn._maps import on_device
from styleattn.attention import attention, shared_attention
from styleattn.branch import Branch, Segment
from styleattn.norms import shared_group_norm
from styleattn.references import Layers, Reference, Steps
from styleattn.statistics import TokenStats

from ._adain import adain, centred
from ._base import Layer, NormCall, Number, SelfCall, Settings, log, off
from ._facts import Facts
from ._joint import JointCall, Parts, seen_by

_FLAGS = (
    "share_group_norm",
    "share_layer_norm",
    "share_attention",
    "adain_queries",
    "adain_keys",
    "adain_values",
    "full_attention_share",
    "control_reference",
)


@dataclass(frozen=True)
class StyleAligned(Settings):
    """Style Aligned Image Generation: every image attends to a reference image in the same batch.

        Q' = AdaIN(Q, Q_ref)    K' = AdaIN(K, K_ref)
        out = softmax( σ [ Q'K'ᵀ , scale·Q'K_refᵀ + shift ] ) [ V ; V_ref ]

    With several references their keys and values stand side by side, each with log w on its logits;
    the statistics that AdaIN and GroupNorm aim at are the references' means weighted by w (and,
    where the weights sum to less than 1, the image's own for the rest).

    Args:
        share_group_norm: GroupNorm statistics over image and references together.
        share_layer_norm: accepted; LayerNorm is per token, so sharing it changes nothing.
        share_attention: attend to the references' tokens; False leaves AdaIN.
        adain_queries, adain_keys, adain_values: AdaIN to the reference's token statistics.
        full_attention_share: every image attends to all images of its half, without AdaIN, scale
            and shift; this changes the reference too.
        shared_score_scale: multiplies the reference's logits; 0.5 for over-famous references.
        shared_score_shift: added to them; log 2 for transfer from a picture.
        only_self_level: share of the layers left alone, 0 none, 1 all; quantised as in `self_only`.
        layers: which layers: "all", "style", "layout", patterns, or diffusers' scale dictionary.
        steps: when: (start, end) fractions of the run, or a curve of weights.
        control_reference: whether a ControlNet acts on the reference row too. False takes its
            residuals off that row. A reference that comes from a bank has no control picture: True
            gives it the residuals of the first image.
        references: weights, layers, steps and masks of the references; None for one plain
            reference, or for the bank's.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Hertz et al., Style Aligned Image Generation via Shared Attention, arXiv 2312.02133.
    """

    share_group_norm: bool = True
    share_layer_norm: bool = True
    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    full_attention_share: bool = False
    shared_score_scale: float = 1.0
    shared_score_shift: float = 0.0
    only_self_level: float = 0.0
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)
    control_reference: bool = False
    references: tuple[Reference, ...] | None = None

    name: ClassVar[str] = "style_aligned"
    NUMBERS: ClassVar[tuple[str, ...]] = ("shared_score_scale", "shared_score_shift")
    facts: ClassVar[Facts] = Facts(
        paper="Style Aligned Image Generation via Shared Attention, CVPR 2024, arXiv 2312.02133",
        modality="text, image",
        route="inversion, attention",
        hosts="SD 1.x, SD 2.x, SDXL, FLUX.1",
        needs="prompts; a reference picture, or a prompt to make it from",
    )

    def __post_init__(self) -> None:
        reasons = self._wrong_flags(*_FLAGS)
        for knob in (*self.NUMBERS, "only_self_level"):
            value = getattr(self, knob)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                reasons.append(f"{knob} must be a number, got {value!r}")
            elif knob == "only_self_level" and not 0 <= value <= 1:
                reasons.append(f"only_self_level must be in [0, 1], got {value}")
            elif math.isinf(value) and (knob != "shared_score_shift" or value > 0):
                reasons.append(f"{knob} must be finite, got {value}")
        reasons += self._plain_steps()
        whole, references = self._plain_references(single=False), self.references
        if references is not None and (not isinstance(references, tuple) or not references):
            reasons.append("references must be a non-empty tuple of Reference, or None")
        elif not whole:
            reasons.append("references must all be Reference")
        self._refuse(reasons)

    @property
    def shares_norm(self) -> bool:
        """Whether GroupNorm modules are concerned."""
        return self.share_group_norm

    def takes(self, layer: Layer) -> bool:
        """Whether the layer is changed: not left alone by `only_self_level`, and something to
        do."""
        adain = self.adain_queries or self.adain_keys or self.adain_values
        return (adain or self.share_attention or self.full_attention_share) and not self.self_only(
            layer
        )

    def self_only(self, layer: Layer) -> bool:
        """Whether `only_self_level` leaves a layer alone.

        For 0 < L <= 0.5: every p-th layer, p = total // int(L * total); above 0.5 the complement of
        the set for 1 - L. A level (or its complement) below one layer is 0 (or 1).

        Source: google/style-aligned, sa_handler.py.
        """
        level = self.only_self_level
        if level > 0.5:
            return not _every(1 - level, layer)
        return _every(level, layer)

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        if self.full_attention_share:
            return self._full(call)
        ordinary = len(call.strengths) == 1 and self.share_attention and call.key_bias is None
        if ordinary and call.masks[0] is None and _is_one(call.strengths[0]):
            return self._single(call)
        return self._several(call)

    def _single(self, call: SelfCall) -> Tensor:
        """One reference at full weight: the official operation."""
        own = range(len(call.query))
        rows = [i if r < 0 else r for i, r in zip(own, call.rows.serving(0), strict=True)]
        out = shared_attention(
            call.query,
            call.key,
            call.value,
            reference_rows=torch.tensor(rows),
            adain_queries=self.adain_queries,
            adain_keys=self.adain_keys,
            adain_values=self.adain_values,
            score_scale=call.numbers["shared_score_scale"],
            score_shift=call.numbers["shared_score_shift"],
            softmax_scale=call.softmax_scale,
            backend=call.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def _several(self, call: SelfCall) -> Tensor:
        """Any number of references, weights, masks and key biases."""
        query_affine, _ = adain(self.adain_queries, call.query, call)
        key_affine, key_stats = adain(self.adain_keys, call.key, call)
        value_affine, _ = adain(self.adain_values, call.value, call)
        own = Segment(
            call.key,
            call.value,
            key_affine=key_affine,
            value_affine=value_affine,
            key_bias=call.key_bias,
        )
        segments = [own]
        for r, strength in enumerate(call.strengths if self.share_attention else ()):
            if off(strength):
                continue
            rows = torch.tensor(call.rows.serving(r))
            centre = centred(key_stats, rows, call.key)
            bias = call.numbers["shared_score_shift"] + log(strength)
            mask = call.masks[r]
            segments.append(
                Segment(
                    call.key,
                    call.value,
                    rows=rows,
                    key_affine=centre,
                    logit_scale=call.numbers["shared_score_scale"],
                    logit_bias=bias if mask is None else (bias + mask).expand(len(rows), -1),
                    key_bias=call.key_bias,
                )
            )
        return _attend(call, Branch(tuple(segments), query_affine=query_affine))

    def _full(self, call: SelfCall) -> Tensor:
        """Every row of a chunk attends to all rows of the chunk."""
        count, chunks = call.rows.count, call.rows.chunks
        of_reference = dict(
            zip(call.rows.references, range(len(call.rows.references)), strict=True)
        )
        segments = []
        for s in range(count):
            r = of_reference.get(s)
            strength = call.gate if r is None else call.strengths[r]
            own = [i == s for _ in range(chunks) for i in range(count)]
            bias: Number = 0.0
            if not _is_one(strength):
                mine = torch.tensor(own, device=call.query.device)
                bias = torch.where(
                    mine, 0.0, torch.as_tensor(log(strength), device=call.query.device)
                )
            mask = None if r is None else call.masks[r]
            if mask is not None:
                seen = torch.where(torch.tensor(own, device=mask.device)[:, None], 0.0, mask)
                bias = bias[:, None] + seen if isinstance(bias, Tensor) else bias + seen
            rows = torch.tensor([c * count + s for c in range(chunks) for _ in range(count)])
            segments.append(
                Segment(call.key, call.value, rows=rows, logit_bias=bias, key_bias=call.key_bias)
            )
        return _attend(call, Branch(tuple(segments)))

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The same among the image tokens of joint attention, after their rotation: every token of
        a row, text too, sees the image tokens of the row's references. Text keeps its own
        statistics."""
        image = parts["image"]
        own = image.segments["image"]
        if self.full_attention_share:
            return {
                name: part.with_segments(self._whole_batch(call, own, name))
                for name, part in parts.items()
            }
        query_affine, _ = adain(self.adain_queries, image.query, call)
        key_affine, key_stats = adain(self.adain_keys, own.key, call)
        value_affine, _ = adain(self.adain_values, own.value, call)
        changed = {}
        for name, part in parts.items():
            part = part.changed("image", key_affine=key_affine, value_affine=value_affine)
            changed[name] = part.with_segments(
                self._shared(call, own, key_stats, name) if self.share_attention else {}
            )
        changed["image"] = replace(changed["image"], query_affine=query_affine)
        return changed

    def _shared(
        self, call: JointCall, own: Segment, stats: TokenStats | None, part: str
    ) -> dict[str, Segment]:
        """The references' image tokens, as the queries of a run see them."""
        found = {}
        for r, strength in enumerate(call.strengths):
            if off(strength):
                continue
            rows = torch.tensor(call.rows.serving(r))
            found[f"{self.name} {r}"] = Segment(
                own.key,
                own.value,
                rows=rows,
                key_affine=centred(stats, rows, own.key),
                logit_scale=call.numbers["shared_score_scale"],
                logit_bias=call.numbers["shared_score_shift"] + seen_by(call, r, part),
                key_bias=own.key_bias,
            )
        return found

    def _whole_batch(self, call: JointCall, own: Segment, part: str) -> dict[str, Segment]:
        """The image tokens of every other row, for every row."""
        count = call.rows.count
        of_reference = {row: r for r, row in enumerate(call.rows.references)}
        found = {}
        for s in range(count):
            r = of_reference.get(s)
            bias = log(call.gate) if r is None else seen_by(call, r, part)
            rows = torch.tensor([-1 if b == s else s for b in range(count)])
            found[f"{self.name} row {s}"] = Segment(
                own.key, own.value, rows=rows, logit_bias=bias, key_bias=own.key_bias
            )
        return found

    def group_norm(self, call: NormCall) -> Tensor:
        """GroupNorm with statistics over the image and its references together.

            mean = Σ w_i m_i / Σ w_i,  var = Σ w_i (v_i + (m_i - mean)²) / Σ w_i,  own w = 1

        which is what normalising the concatenated maps gives, without concatenating them (biased
        variances; computed in fp32). Reference rows keep their own output, bit for bit.
        """
        references = [
            (on_device(call.rows.serving(r), call.x.device).clamp(min=0), strength)
            for r, strength in enumerate(call.strengths)
            if not off(strength)
        ]
        return shared_group_norm(
            call.x,
            call.groups,
            references,
            call.weight,
            call.bias,
            eps=call.eps,
            kept=call.output,
            keep=on_device(call.rows.is_reference(), call.x.device),
            backend=call.backend,
        )


def _every(level: float, layer: Layer) -> bool:
    """Whether a layer is in the evenly spaced set of the given level."""
    count = int(level * layer.total)
    return count > 0 and layer.index % (layer.total // count) == 0


def _is_one(strength: Number) -> bool:
    return not isinstance(strength, Tensor) and strength == 1.0


def _attend(call: SelfCall, branch: Branch) -> Tensor:
    out = attention(call.query, (branch,), softmax_scale=call.softmax_scale, backend=call.backend)
    assert isinstance(out, Tensor)
    return out
