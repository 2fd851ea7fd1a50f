"""The IP-Adapter of `tiny-sdxl`: a CLIP, and an adapter of h94's layout for all cross-attention
layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from styleattn.adapters import ImageAdapter
from styleattn.adapters._adapter import HostLayer, KeyValue, checkpoint_order, clip, indexed
from styleattn.adapters.ip_adapter import ImageProjection

from .adapter_model import TOWER, WIDTH, Batch, Host, ImagePrompts, Shown
from .model import TEXT_WIDTH, Denoiser, latents_of, new_unet
from .train import clean_loss
from .train_flux import encoded

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

TOKENS, CONTEXT = 4, 2 * TEXT_WIDTH


def new_image_encoder() -> CLIPVisionModelWithProjection:
    """A CLIP picture encoder with two layers, for pictures [B, 3, 32, 32]."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER, projection_dim=WIDTH))


def host_layers() -> list[HostLayer]:
    """The cross-attention layers of `tiny-sdxl` in the order of published files."""
    with torch.device("meta"):
        unet = new_unet()
    return checkpoint_order(
        [
            (name, module.to_k.out_features, module.to_k.in_features)
            for name, module in unet.named_modules()
            if name.endswith(".attn2")
        ]
    )


def new_adapter() -> ImageAdapter:
    """An adapter of h94's layout with weights drawn at random."""
    return ImageAdapter(
        "base",
        clip(WIDTH, "embeds", "zeros"),
        ImageProjection(WIDTH, CONTEXT, TOKENS),
        {layer.name: KeyValue(layer.inner, layer.context) for layer in host_layers()},
    )


class ImagePromptProcessor:
    """Cross-attention with image tokens in a softmax of their own, before the output projection:

    out = Attn(Q, K, V) + Attn(Q, T W_k, T W_v)
    """

    def __init__(self, shown: Shown, pair: nn.Module) -> None:
        self.shown, self.pair = shown, pair

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        pairs = [(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))]
        if self.shown.tokens is not None:
            pairs.append(self.pair(self.shown.tokens))
        output = torch.stack(
            [F.scaled_dot_product_attention(query, heads(k), heads(v)) for k, v in pairs]
        ).sum(0)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return projected


class SdxlHost(Host):
    """`tiny-sdxl`, shown pictures in all cross-attention layers."""

    model = "tiny-sdxl"

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser(self.pipe.tokenizer)
        for part in ("unet", "text_encoder", "text_encoder_2"):
            setattr(self.denoiser, part, getattr(self.pipe, part))
        nn.Module.to(self.denoiser, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.alphas = self.pipe.scheduler.alphas_cumprod

    @staticmethod
    def new_prompts() -> ImagePrompts:
        return ImagePrompts(new_image_encoder(), new_adapter())

    @staticmethod
    def places(adapter: ImageAdapter) -> dict[str, tuple[str, str]]:
        return indexed(host_layers(), "ip_adapter.")

    def begin(self, prompts: ImagePrompts) -> None:
        """The image projections begin as those of the text, as IP-Adapter's authors let them."""
        unet, adapter = self.pipe.unet, prompts.adapter
        processors = dict(unet.attn_processors)
        for (name, pair), projection in zip(adapter.layers.items(), adapter.pairs, strict=True):
            attn = unet.get_submodule(name)
            for ours, theirs in zip(pair, (attn.to_k, attn.to_v), strict=True):
                ours.load_state_dict(theirs.state_dict())
            processors[f"{name}.processor"] = ImagePromptProcessor(self.shown, projection)
        unet.set_attn_processor(processors)

    def loss(self, batch: Batch, detail: float) -> torch.Tensor:
        """Of the clean latents, as `tiny-sdxl` itself is trained."""
        times = (batch.levels * 1000).long()
        latents = latents_of(batch.drawn)
        alphas = self.alphas[times][:, None, None, None]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * batch.noise.view_as(latents)
        return clean_loss(self.clean(noisy, times, batch) - latents, alphas, detail)

    def clean(self, noisy: torch.Tensor, times: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The clean latents [B, 12, 16, 16], of noisy ones."""
        ids = encoded(self.pipe.tokenizer, batch.prompts)
        keep = torch.tensor([float(prompt != "") for prompt in batch.prompts])
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        clean: torch.Tensor = self.denoiser(noisy, times, ids, keep)
        return clean
