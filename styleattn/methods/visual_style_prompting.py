"""Visual Style Prompting: late layers read the reference's keys and values in place of their
own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._base import SelfCall
from ._facts import Facts
from ._injection import Injection, attend, injected, share_of


@dataclass(frozen=True, kw_only=True)
class VisualStylePrompting(Injection):
    """Visual Style Prompting with Swapping Self-Attention.

        out = softmax( sigma * Q K_ref^T ) V_ref

    The keys and values are the reference's at the same step, the queries the image's own. The
    official code also raises the guidance in the first three steps and calibrates the reference's
    predicted data; a bank of latents at every noise level needs neither.

    Args:
        layers: as `Injection`; "late" is `up_blocks.1` of SDXL, six layers, the paper's.
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
        needs="prompts, a reference picture",
    )

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        return attend(call, [(share_of(call, 0), (injected(call, 0),))])
