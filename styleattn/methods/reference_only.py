"""Reference-only: every image also looks at a noised reference picture; nothing is inverted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.references import Layers

from ._base import Number, SelfCall, log, off
from ._facts import Facts
from ._injection import Injection, serving
from ._joint import JointCall, Parts, seen_by
from ._joint_injection import per_row, theirs


@dataclass(frozen=True, kw_only=True)
class ReferenceOnly(Injection):
    """ControlNet's reference-only mode.

        shared = softmax( sigma * Q [ K ; K_ref ]^T ) [ V ; V_ref ]
        out = shared;  unconditional rows: fidelity * Attn(Q, K, V) + (1 - fidelity) * shared

    The reference is shown at every step with fresh noise of that step's level. It runs along as a
    row of the batch under its own prompt; the extension runs a separate pass under the image's.
    Its weight w adds log w to its logits.

    On FLUX the image's tokens read the reference's image tokens, rotated to the places where those
    are in the reference; the text reads the image's own. Unconditional rows are those of true CFG's
    second call.

    Args:
        style_fidelity: 0 shares in the unconditional rows too, 1 keeps them apart: guidance then
            pushes towards the reference.
        layers: as `Injection`; all by default.
        steps, references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: ControlNet's reference-only preprocessor (sd-webui-controlnet, discussion 1236), and
        diffusers' community pipeline stable_diffusion_reference.
    """

    style_fidelity: float = 0.5
    layers: Layers = "all"

    name: ClassVar[str] = "reference_only"
    NUMBERS: ClassVar[tuple[str, ...]] = ("style_fidelity",)
    facts: ClassVar[Facts] = Facts(
        paper="ControlNet reference-only (sd-webui-controlnet, discussion 1236)",
        modality="text, image",
        route="attention",
        hosts="SD 1.x, SD 2.x, SDXL, FLUX.1",
        needs="prompts, a reference picture",
    )

    def _reasons(self) -> list[str]:
        reason = self._number("style_fidelity", 0, 1)
        return [reason] if reason else []

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        layout, rows = call.rows, serving(call, 0)
        bias, mask = log(call.strengths[0]), call.masks[0]
        seen: Number = bias if mask is None else (bias + mask).expand(len(rows), -1)
        theirs = Segment(call.key, call.value, rows=rows, logit_bias=seen, key_bias=call.key_bias)
        mine = Segment(call.key, call.value, key_bias=call.key_bias)
        apart = [
            u and r not in layout.references
            for u in layout.unconditional or (False,) * layout.chunks
            for r in range(layout.count)
        ]
        fidelity = call.numbers["style_fidelity"]
        branches = [Branch((mine, theirs))]
        if any(apart) and not off(fidelity):
            device = call.query.device
            kept = torch.where(torch.tensor(apart, device=device), fidelity, 0.0).to(torch.float32)
            alone = [b if is_apart else -1 for b, is_apart in enumerate(apart)]
            segment = Segment(
                call.key, call.value, rows=torch.tensor(alone), key_bias=call.key_bias
            )
            branches = [Branch((mine, theirs), weight=1 - kept), Branch((segment,), weight=kept)]
        out = attention(
            call.query, tuple(branches), softmax_scale=call.softmax_scale, backend=call.backend
        )
        assert isinstance(out, Tensor)
        return out

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the reference's image tokens for those of the image."""
        self._check(call)
        image, fidelity = parts["image"], call.numbers["style_fidelity"]
        seen = replace(theirs(call, image, 0), logit_bias=seen_by(call, 0, "image"))
        part = image.with_segments({self.name: seen})
        if any(call.rows.unconditional) and not off(fidelity):
            part = replace(part, share=per_row(call, 1 - fidelity, 1.0), rest=image)
        return {**parts, "image": part}
