"""StyleID: the style's keys and values under a query that keeps the content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from styleattn.branch import Segment
from styleattn.references import Layers

from ._base import Number, SelfCall
from ._facts import Facts
from ._injection import Injection, attend, injected, of_reference, per_row, share_of, whole
from ._joint import JointCall, Parts
from ._joint_injection import kept_query, swapped
from ._joint_injection import share_of as joint_share

COMPAT = ("", "paper-code")


@dataclass(frozen=True, kw_only=True)
class StyleID(Injection):
    """Style Injection in Diffusion: the structure of one picture, the texture of another.

        Q' = gamma * Q_content + (1 - gamma) * Q
        out = softmax( T * sigma * Q' K_style^T ) V_style

    Two references, content and style, run along as rows of the batch: nothing is cached, unless
    `apply` gets their features (`styleattn.processors.features.cache_features`) as its bank. The
    weight of the content multiplies gamma, that of the style the share of the injected output.

    On FLUX this is done among image tokens: their queries are mixed, and read the text and, with
    the temperature, the style's image tokens, rotated to the places where those are in the style's
    picture. The text reads the image's own.

    Args:
        gamma: how much of the content's query is kept; 0.3 for a strong style.
        temperature: T, sharpens the attention.
        compat: "paper-code" asks the recipe for the authors' schedule: the noisiest step is
            skipped, so that the starting latents are noisier than the label they are shown with.
            "" keeps labels and noise levels together. The attention is the same.
        style_statistics: how much of the statistics that the recipe gives to the starting noise are
            the style's; the rest are the content's own. 1 is StyleID, less is AttenST's
            content-aware AdaIN.
        layers: as `Injection`; "style_id" is the paper's choice for SD 1.x (`up_blocks.2` and
            `up_blocks.3`) and AttenST's for SDXL (`up_blocks.1.attentions.1` and `.2`); of FLUX it
            is the single blocks.
        steps, references: as `Injection`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Chung et al., Style Injection in Diffusion, CVPR 2024, arXiv 2312.09008, eq. 5-7.
    """

    gamma: float = 0.75
    temperature: float = 1.5
    compat: str = ""
    style_statistics: float = 1.0
    layers: Layers = "style_id"

    CACHED: ClassVar[Mapping[str, int]] = {"query": 0, "key": 1, "value": 1}
    """Which reference each feature is of, where features are kept."""
    name: ClassVar[str] = "style_id"
    NUMBERS: ClassVar[tuple[str, ...]] = ("gamma", "temperature")
    ROLES: ClassVar[tuple[str, ...]] = ("content", "style")
    facts: ClassVar[Facts] = Facts(
        paper="Style Injection in Diffusion, CVPR 2024, arXiv 2312.09008",
        modality="image",
        route="inversion, attention",
        hosts="SD 1.x, SD 2.x, SDXL, FLUX.1",
        needs="a content picture, a style picture",
    )

    def _reasons(self) -> list[str]:
        found = [self._number("gamma", 0, 1), self._number("temperature")]
        found.append(self._number("style_statistics", 0, 1))
        if self.compat not in COMPAT:
            found.append(f"compat must be one of {COMPAT}, got {self.compat!r}")
        return [reason for reason in found if reason]

    @property
    def labels(self) -> str | None:
        """The labels of the inversion that `compat` asks for; None for whatever the recipe has."""
        return "style_id" if self.compat else None

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        self._check(call)
        kept = call.features
        if kept is None:
            content = of_reference(call.query, call, 0)
            segment = injected(call, 1, logit_scale=call.numbers["temperature"])
        else:
            content = kept.query.index_select(0, kept.rows.to(kept.query.device))
            segment = Segment(
                kept.key, kept.value, rows=kept.rows, logit_scale=call.numbers["temperature"]
            )
        keep = call.numbers["gamma"] * share_of(call, 0)
        gamma: Number = keep
        if isinstance(keep, Tensor) and keep.ndim:  # a mask: every query has a share of its own
            mixed = torch.lerp(call.query, content, keep[:, None].to(content.dtype))
            content, gamma = mixed, 1.0
        share = share_of(call, 1)
        if whole(share) and not isinstance(gamma, Tensor) and gamma == 0.0:
            return attend(call, [(share, (segment,))])
        return attend(
            call, [(share, (segment,))], content_query=content, gamma=per_row(call, gamma, 0.0)
        )

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the style's image tokens under a query of the content."""
        self._check(call)
        keep: Number = call.numbers["gamma"] * joint_share(call, 0)
        query = kept_query(call, parts["image"], 0, keep)
        return swapped(call, parts, 1, logit_scale=call.numbers["temperature"], query=query)
