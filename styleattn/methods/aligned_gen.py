"""AlignedGen: image tokens see those of a reference at positions beside the image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from styleattn.branch import Segment
from styleattn.references import Layers, Steps

from ._adain import adain
from ._base import Layer, Number, off
from ._facts import Facts
from ._joint import Features, JointCall, JointSettings, Parts, Tokens, seen_by

_FLAGS = ("adain_queries", "adain_keys", "control_reference")


@dataclass(frozen=True, kw_only=True)
class AlignedGen(JointSettings):
    """AlignedGen: style alignment for joint attention, with the reference beside the image.

        Q' = R AdaIN(Q, Q_ref)    K' = R AdaIN(K, K_ref)    on image tokens, R: their rotation
        out = softmax( σ [ Q K_textᵀ , Q' K'ᵀ , λ Q' (R_moved K_ref)ᵀ ] ) [ V_text ; V ; V_ref ]
        λ = shared_score_scale · (t / 1000) ^ time_power

    The reference's tokens stand where a picture beside the generated one would, so that no query
    finds a reference token at its own position. Statistics are those before the rotation.

    Args:
        adain_queries, adain_keys: AdaIN to the reference's token statistics.
        offset: (down, right), in heights and widths of the image, by which the reference's tokens
            are moved; (0, 0) leaves them on the image's.
        shared_score_scale: λ; multiplies the reference's logits.
        time_power: how λ falls with the noise level t: 0 is constant, 2 the paper's curve (with a
            scale of 1).
        layers: which layers; in the paper the single blocks.
        steps: when: (start, end) fractions of the run, or a curve of weights.
        control_reference: whether a ControlNet acts on the reference row too.
        references: weights, layers, steps and masks of the references; None for one plain one.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Zhang et al., AlignedGen: Aligning Style Across Generated Images, arXiv 2509.17088.
    """

    adain_queries: bool = True
    adain_keys: bool = True
    offset: tuple[float, float] = (0.0, 1.0)
    shared_score_scale: float = 1.1
    time_power: float = 0.0
    layers: Layers = "single_transformer_blocks"
    steps: Steps = (0.0, 1.0)
    control_reference: bool = False

    name: ClassVar[str] = "aligned_gen"
    NUMBERS: ClassVar[tuple[str, ...]] = ("shared_score_scale",)
    facts: ClassVar[Facts] = Facts(
        paper="AlignedGen: Aligning Style Across Generated Images, arXiv 2509.17088",
        modality="text",
        route="attention",
        hosts="FLUX.1",
        needs="prompts, of which the first makes the reference",
    )

    def __post_init__(self) -> None:
        reasons = self._check("shared_score_scale", "time_power")
        reasons += self._wrong_flags(*_FLAGS)
        offset: Any = self.offset
        if not isinstance(offset, (list, tuple)) or len(offset) != 2:
            reasons.append(f"offset must be (down, right), got {offset!r}")
        else:
            object.__setattr__(self, "offset", tuple(float(x) for x in offset))
        self._refuse(reasons)

    def takes(self, layer: Layer) -> bool:
        """Every chosen layer."""
        return True

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the reference's image tokens in it."""
        tokens = call.tokens["image"]
        query = self._aligned(self.adain_queries, tokens.queries, tokens, call)
        key = self._aligned(self.adain_keys, tokens.keys, tokens, call)
        moved = tokens.keys.rotated(call.rotary_at(self.offset))
        scale: Number = call.numbers["shared_score_scale"]
        if self.time_power:
            scale = scale * call.time**self.time_power
        changed = {}
        for name, part in parts.items():
            part = part.changed("image", key=key)
            changed[name] = part.with_segments(self._shared(call, tokens, moved, scale, name))
        changed["image"] = replace(changed["image"], query=query)
        return changed

    def _aligned(self, wanted: bool, x: Features, tokens: Tokens, call: JointCall) -> Tensor:
        """AdaIN, then the rotation."""
        affine = adain(wanted, x.normalised(), call)[0] if wanted else None
        return x.rotated(tokens.rotary, affine)

    def _shared(
        self, call: JointCall, tokens: Tokens, moved: Tensor, scale: Number, part: str
    ) -> dict[str, Segment]:
        """The references' image tokens, as the queries of a run see them."""
        return {
            f"{self.name} {r}": Segment(
                moved,
                tokens.value,
                rows=torch.tensor(call.rows.serving(r)),
                logit_scale=scale,
                logit_bias=seen_by(call, r, part),
                key_bias=tokens.key_bias,
            )
            for r, strength in enumerate(call.strengths)
            if not off(strength)
        }
