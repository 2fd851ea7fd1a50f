"""The IP-Adapter of `tiny-flux`: a SigLIP, and an adapter of InstantX's layout for all blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from styleattn.adapters import ImageAdapter
from styleattn.adapters._adapter import KeyValue, siglip
from styleattn.adapters.flux_ip_adapter import MlpProjection

from .adapter_model import TOWER, WIDTH, Batch, Host, ImagePrompts, Shown
from .flux_model import T5_WIDTH, TRANSFORMER, image_ids, tokens_of, without_means
from .flux_sharing import projected, rotated
from .train_flux import compile_blocks, encoded

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

INNER, TOKENS = 128, 8
GUIDANCE = 3.0
"""The embedded guidance scale that the model is told."""
_HEAD_DIM = TRANSFORMER["attention_head_dim"]
_CHANNELS = TRANSFORMER["num_attention_heads"] * _HEAD_DIM


def new_image_encoder() -> SiglipVisionModel:
    """A SigLIP picture encoder with two layers, for pictures [B, 3, 32, 32]."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**TOWER))


def block_names() -> list[str]:
    """The attention layers of `tiny-flux` in the order of InstantX's files."""
    double, single = TRANSFORMER["num_layers"], TRANSFORMER["num_single_layers"]
    return [
        *(f"transformer_blocks.{i}.attn" for i in range(double)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(single)),
    ]


def new_adapter() -> ImageAdapter:
    """An adapter of InstantX's layout with weights drawn at random."""
    return ImageAdapter(
        "flux-instantx",
        siglip(WIDTH, "pooled"),
        MlpProjection(WIDTH, INNER, T5_WIDTH, TOKENS),
        {name: KeyValue(_CHANNELS, T5_WIDTH, rms_dim=_HEAD_DIM) for name in block_names()},
    )


class ImagePromptProcessor:
    """FLUX attention with image tokens in a softmax of their own, before the output projection:

        out = Attn(Q, K, V) + Attn(Q', rms(T W_k), rms(T W_v))

    with Q' normed and not rotated: of the image in double blocks, of all tokens in single ones.
    """

    def __init__(self, shown: Shown, pair: nn.Module) -> None:
        self.shown, self.pair = shown, pair

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = projected(attn, hidden_states, encoder_hidden_states)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        output = F.scaled_dot_product_attention(
            rotated(query, image_rotary_emb), rotated(key, image_rotary_emb), value
        )
        if self.shown.tokens is not None:
            shown_key, shown_value = (
                x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
                for x in self.pair(self.shown.tokens)
            )
            added = F.scaled_dot_product_attention(query[:, :, text:], shown_key, shown_value)
            output = output + F.pad(added, (0, 0, text, 0))
        output = output.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        image = attn.to_out[1](attn.to_out[0](output[:, text:]))
        return image, attn.to_add_out(output[:, :text])


class FluxHost(Host):
    """`tiny-flux`, shown pictures in all blocks."""

    model = "tiny-flux"

    @staticmethod
    def new_prompts() -> ImagePrompts:
        return ImagePrompts(new_image_encoder(), new_adapter())

    @staticmethod
    def places(adapter: ImageAdapter) -> dict[str, tuple[str, str]]:
        return {
            name: (f"ip_adapter.{index}.to_k_ip.", f"ip_adapter.{index}.to_v_ip.")
            for index, name in enumerate(adapter.names)
        }

    def begin(self, prompts: ImagePrompts) -> None:
        adapter, transformer = prompts.adapter, self.pipe.transformer
        names = [name.removesuffix(".processor") for name in transformer.attn_processors]
        pairs = {name: adapter.pairs[adapter.names.index(name)] for name in names}
        transformer.set_attn_processor(
            {f"{n}.processor": ImagePromptProcessor(self.shown, pair) for n, pair in pairs.items()}
        )

    def loss(self, batch: Batch, detail: float) -> torch.Tensor:
        """Of the velocity; fine structure is what differs within the 4 x 4 pixels of a token."""
        levels = batch.levels[:, None, None]
        tokens = tokens_of(batch.drawn)
        noise = batch.noise.view_as(tokens)
        error = self.velocity((1 - levels) * tokens + levels * noise, batch) - (noise - tokens)
        loss = error.square().mean()
        if detail:
            loss = loss + detail * without_means(error).square().mean()
        return loss

    def velocity(self, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[B, 64, 48], of noisy tokens."""
        pipe = self.pipe
        with torch.no_grad():
            hidden = pipe.text_encoder_2(encoded(pipe.tokenizer_2, batch.prompts))[0]
            pooled = pipe.text_encoder(encoded(pipe.tokenizer, batch.prompts)).pooler_output
        velocity: torch.Tensor = pipe.transformer(
            noisy,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=batch.levels,
            guidance=torch.full_like(batch.levels, GUIDANCE),
            img_ids=image_ids(),
            txt_ids=torch.zeros(hidden.shape[1], 3),
            return_dict=False,
        )[0]
        return velocity

    def compile(self) -> None:
        compile_blocks(self.pipe.transformer)
