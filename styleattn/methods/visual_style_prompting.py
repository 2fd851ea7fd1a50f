"""Visual Style Prompting: late layers read the reference's keys and values in place of their
own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._base import SelfCall
from ._facts import Facts
from ._injection import Injection, attend, injected, share_of
from ._joint import JointCall, Parts
from ._joint_injection import swapped


@dataclass(frozen=True, kw_only=True)
class VisualStylePrompting(Injection):
    """Visual Style Prompting with Swapping Self-Attention.

        out = softmax( sigma * Q K_ref^T ) V_ref

    The keys and values are the reference's at the same step, the queries the image's own. The
    official code also raises the guidance in the first three steps and calibrates the reference's
    predicted data; a bank of latents at every noise level needs neither.

    On FLUX the image's tokens read the text and the reference's image tokens, rotated to the places
    where those are in the reference; the text reads the image's own.

    Args:
        layers: as `Injection`; "late" is `up_blocks.1` of SDXL, six layers, the paper's; of FLUX
            the single blocks.
        steps, references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Jeong et al., Visual Style Prompting with Swapping Self-Attention, arXiv 2402.12974.
    """

    name: ClassVar[str] = "visual_style_prompting"
    facts: ClassVar[Facts] = Facts(
        paper="Visual Style Prompting with Swapping Self-Attention, arXiv 2402.12974",
        modality="text, image",
        route="inversion, attention",
        hosts="SD 1.x, SD 2.x, SDXL, FLUX.1",
        needs="prompts, a reference picture",
    )

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        return attend(call, [(share_of(call, 0), (injected(call, 0),))])

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the reference's image tokens in place of the image's."""
        self._check(call)
        return swapped(call, parts, 0)
