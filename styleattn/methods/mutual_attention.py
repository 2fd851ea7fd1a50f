"""MasaCtrl: an image keeps the appearance of a source picture while its layout follows a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from styleattn.references import Steps

from ._base import SelfCall
from ._facts import Facts
from ._injection import Injection, attend, injected, share_of


@dataclass(frozen=True, kw_only=True)
class MutualAttention(Injection):
    """MasaCtrl's mutual self-attention control.

        out = softmax( sigma * Q K_source^T ) V_source

    from the fourth of fifty steps on, so that the prompt can settle the layout first. The variant
    with foreground and background masks of the source is not here; a mask of the `Reference` says
    where in the image the source is read.

    Args:
        layers: as `Injection`; "late" is the paper's on SD 1.x (from the tenth layer on).
        steps, references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Cao et al., MasaCtrl, ICCV 2023, arXiv 2304.08465, eq. 2 and algorithm 1.
    """

    steps: Steps = (0.08, 1.0)

    name: ClassVar[str] = "mutual_attention"
    ROLES: ClassVar[tuple[str, ...]] = ("source",)
    facts: ClassVar[Facts] = Facts(
        paper="MasaCtrl: Tuning-Free Mutual Self-Attention Control, ICCV 2023, arXiv 2304.08465",
        modality="text, image",
        route="inversion, attention",
        needs="a source picture, prompts",
    )

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        return attend(call, [(share_of(call, 0), (injected(call, 0),))])
