"""IP-Adapter: images as prompts, in a softmax of their own next to the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from styleattn.references import Layers, Reference, Steps

from ._facts import Facts
from ._images import Images


@dataclass(frozen=True)
class IPAdapter(Images):
    """IP-Adapter: Text Compatible Image Prompt Adapter.

        out = Attn(Q, K_text, V_text) + scale · Σ_i w_i · Attn(Q, W_k T_i, W_v T_i)

    Images that share weight, layers, steps and prompts and have no mask share one softmax, as their
    tokens side by side do; an image with a mask, or with a weight of its own, has its own.

    Args:
        scale: of all images; 0 is the model without them.
        adapter: what makes tokens and keys (`styleattn.adapters`), or its file, or a folder with
            one such file. None: the adapters that diffusers' `load_ip_adapter` has put into the
            pipeline, before or after `apply`, with the images of the pipeline's call; `scale`,
            `layers` and `steps` multiply the scales of `set_ip_adapter_scale`.
        layers: which cross-attention layers: "all", "style", "layout", patterns, diffusers' scale
            dictionary, or a weight type such as "ease in" (`styleattn.methods.WEIGHT_TYPES`).
        steps: when: (start, end) fractions of the run, or a curve of weights.
        references: the images, each with its weight, mask, layers, steps and prompts.
        negative_layers: layers in which the images are negatives: the unconditional rows see them,
            and the others do not. Weight types whose names end in "precise" go with it: "style
            transfer precise" with "composition", "composition precise" with "strong style
            transfer".
        image_encoder: what encodes the references' pictures, or its folder; None for the
            pipeline's.

    Raises:
        ValueError: a knob that has no meaning; all reasons at once.

    Source: Ye et al., IP-Adapter, arXiv 2308.06721; weight types: ComfyUI_IPAdapter_plus.
    """

    scale: float = 1.0
    adapter: Any = None
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)
    references: tuple[Reference, ...] | None = None
    negative_layers: Layers | None = None
    image_encoder: Any = None

    name: ClassVar[str] = "ip_adapter"
    NUMBERS: ClassVar[tuple[str, ...]] = ("scale",)
    facts: ClassVar[Facts] = Facts(
        paper="IP-Adapter: Text Compatible Image Prompt Adapter, arXiv 2308.06721",
        modality="text, image",
        route="encoder",
        hosts="SD 1.x, SD 2.x, SDXL, FLUX.1",
        needs="prompts, a picture, adapter weights, a CLIP image encoder",
        weights="h94/IP-Adapter, Apache-2.0",
    )

    def __post_init__(self) -> None:
        reasons = self._check("scale")
        if self.adapter is None and self.negative_layers is not None:
            reasons.append("negative_layers needs an adapter of its own")
        self._refuse(reasons)
