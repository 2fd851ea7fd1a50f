"""RB-Modulation's attention feature aggregation: the mean of attentions over sets of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

from styleattn.branch import Branch, Segment

from ._base import log as log_of
from ._cross import CrossCall, CrossParts, ImagePrompt
from ._driven import ImageDriven, of_seeing, weight_of
from ._facts import Facts


@dataclass(frozen=True, kw_only=True)
class RBModulation(ImageDriven):
    """RB-Modulation's attention feature aggregation (AFA), on SDXL.

        A(S) = Attn(Q, keys and values of the tokens in S)
        out = (1 - scale) A(text) + scale * mean of A(text), A(style), A(text, style)
        with a content picture: of A(text), A(text, content), A(text, style),
                                A(text, content, style)

    The style's tokens are their mean, repeated: what is left of a picture is its manner. With a
    content picture the sets are those of the released code. The weight of the style multiplies
    `scale`; that of the content is log w on the logits of its keys. The paper's other half, the
    optimal control of the latents, is no attention and not part of this.

    Args:
        scale: how much of the mean replaces the text's attention; 1 is the paper.
        adapter: such as IP-Adapter's, or its file; or has `style` and `content`, one for each.
        references: content and style, or style alone; the content without a mask.
        layers, steps, image_encoder: as `ImageDriven`.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Rout et al., RB-Modulation, ICLR 2025, arXiv 2405.17401, sec. 4.2;
        google/RB-Modulation, utils.py, Attention2D.
    """

    scale: float = 1.0

    name: ClassVar[str] = "rb_modulation"
    ROLES: ClassVar[tuple[str, ...]] = ("content", "style")
    facts: ClassVar[Facts] = Facts(
        paper="RB-Modulation, ICLR 2025, arXiv 2405.17401 (attention feature aggregation)",
        modality="text, image",
        route="encoder, attention",
        needs="prompts, a style picture, weights of an image adapter such as IP-Adapter's",
        weights="none of its own",
    )

    def adapter_of(self, index: int, component: str = "unet") -> Any:
        """The role's adapter, or the one for all."""
        if component == "unet" and not hasattr(self.adapter, "style"):
            return self.adapter
        return super().adapter_of(index, component)

    def cross_parts(self, call: CrossCall) -> CrossParts:
        """The sets beside the text's own, and the text's share."""
        found = {self.roles[p.index]: p for p in call.prompts}
        style, content = found.get("style"), found.get("content")
        if style is None:
            return CrossParts()
        text = Segment(call.key, call.value, key_bias=call.key_bias)
        manner = self._mean(style)
        if content is None:
            sets = [(manner,), (text, manner)]
        else:
            picture = Segment(
                content.key, content.value, rows=content.rows, logit_bias=log_of(content.weight)
            )
            sets = [(text, picture), (text, manner), (text, picture, manner)]
        weight = of_seeing(style, weight_of(style, call.numbers["scale"], call), call)
        if weight.ndim == 1:
            weight = weight[:, None].expand(-1, call.query.shape[2])
        share = weight / (len(sets) + 1)
        return CrossParts(
            branches=tuple(Branch(segments, weight=share) for segments in sets),
            text_weight=1.0 - weight + share,
        )

    def _mean(self, prompt: ImagePrompt) -> Segment:
        """One key that counts as many times as the image has tokens."""
        key, value = (
            x.float().mean(2, keepdim=True).to(x.dtype) for x in (prompt.key, prompt.value)
        )
        return Segment(key, value, rows=prompt.rows, logit_bias=log(prompt.key.shape[2]))
