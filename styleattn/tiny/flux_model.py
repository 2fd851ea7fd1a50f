"""The parts of `tiny-flux`: a FLUX.1 of a few million parameters for 32 x 32 drawings.

The transformer has FLUX's double and single blocks, rotary positions on three axes, the embedded
guidance scale and flow matching. A token is 4 x 4 pixels: the 2 x 2 latents of `tiny-sdxl`'s
autoencoder, packed as `FluxPipeline` packs them, so that a picture has 8 x 8 tokens of 48 channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .captions import MAX_TOKENS, save_word_tokenizer
from .drawings import CONTENTS, SIZE
from .model import FACTOR, LATENT_CHANNELS, TEXT_WIDTH, latents_of, new_text_encoder

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxAttention
    from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

GRID = SIZE // FACTOR // 2
TOKENS = GRID * GRID
CHANNELS = 4 * LATENT_CHANNELS
T5_WIDTH = 64

TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}
# The size of a bias that outweighs the rest of a query or key when attention starts.
_PLACE = 6.0
# `FluxPipeline` shifts the noise levels by exp(base_shift) for a picture of 64 tokens.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "base_image_seq_len": TOKENS,
    "base_shift": 0.7,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}


def tokens_of(pictures: torch.Tensor) -> torch.Tensor:
    """The tokens the transformer is trained on, [B, 64, 48]; pictures [B, 3, 32, 32] in -1..1."""
    return F.pixel_unshuffle(latents_of(pictures), 2).flatten(2).transpose(1, 2)


def without_means(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 64, 48] without their mean over the 16 pixels, for each colour."""
    colours = tokens.unflatten(2, (3, 16))
    return (colours - colours.mean(3, keepdim=True)).flatten(2)


def image_ids() -> torch.Tensor:
    """The positions (0, row, column) of the tokens, [64, 3]."""
    ids = torch.zeros(GRID, GRID, 3)
    ids[..., 1] = torch.arange(GRID)[:, None]
    ids[..., 2] = torch.arange(GRID)
    return ids.view(TOKENS, 3)


@torch.no_grad()
def new_transformer() -> FluxTransformer2DModel:
    """A transformer whose blocks begin as the identity: their last projections are zero, their
    scales and gates one."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**TRANSFORMER)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            width = module.in_features
            gates = (2, 5) if module.out_features == 6 * width else (2,)
            for gate in gates:
                module.bias[gate * width : (gate + 1) * width] = 1
        elif name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    _write_places(model.transformer_blocks[0].attn)
    return model


def _write_places(attn: FluxAttention) -> None:
    """Let the heads of a double block begin as a sense of place, which rotary positions give only
    as distances: the share of its attention that an image token gives to the text, which stands at
    (0, 0), varies with the token's row or column r.

    The logits are A cos(w r + p), for rows and columns each once with w = 0.22, p = 0.8, monotone
    over the picture, and once with w = 1, p = 0.
    """
    width = attn.head_dim
    _, rows, columns = TRANSFORMER["axes_dims_rope"]
    for head in range(attn.heads):
        axis, slow = head % 2, head // 2 % 2 == 0
        pair = head * width + width - columns - (rows if axis == 0 else 0) + 2 * slow
        angle = torch.tensor(0.8 if slow else 0.0)
        attn.to_q.bias[pair : pair + 2] = _PLACE * torch.stack([angle.cos(), angle.sin()])
        attn.add_k_proj.bias[pair] = _PLACE
    nn.init.normal_(attn.add_v_proj.bias)
    nn.init.normal_(attn.to_out[0].weight, std=0.1)


def new_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def new_word_tokenizer(folder: Path) -> T5Tokenizer:
    """The tokenizer of the T5 encoder, with its files written to `folder`."""
    from transformers import T5TokenizerFast

    save_word_tokenizer(folder)
    return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)


def new_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder with two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=MAX_TOKENS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


class FluxDenoiser(nn.Module):
    """Transformer and text encoders as `FluxPipeline` uses them: the pooled token of CLIP, the
    states of T5. The encoders stay as they begin, at random: they tell the words apart, and trained
    along they soon tell the transformer less."""

    def __init__(self, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text_encoder = new_text_encoder(tokenizer, projected=False)
        self.text_encoder_2 = new_t5_encoder(tokenizer_2)
        self.text_encoder.requires_grad_(False)
        self.text_encoder_2.requires_grad_(False)
        self._tell_contents_apart(tokenizer)

    @torch.no_grad()
    def _tell_contents_apart(self, tokenizer: CLIPTokenizer, deviation: float = 0.5) -> None:
        """Scale what the transformer makes of the pooled token, so that the contents begin as far
        apart from one another as the noise levels are."""
        ids = tokenizer([f"a {c}" for c in CONTENTS], padding="max_length", return_tensors="pt")
        pooled = self.text_encoder(ids.input_ids).pooler_output
        layers = self.transformer.time_text_embed.text_embedder
        layers.linear_1.weight.div_(pooled.std(0).clamp_min(1e-3))
        layers.linear_1.bias.copy_(-layers.linear_1.weight @ pooled.mean(0))
        layers.linear_2.weight.mul_(deviation / layers(pooled).std(0).mean())

    def embed(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings [B, T, C] and pooled embeddings [B, P]."""
        return self.text_encoder_2(ids_2)[0], self.text_encoder(ids).pooler_output

    def forward(
        self,
        noisy: torch.Tensor,
        levels: torch.Tensor,
        guidance: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The velocity, noise minus drawing, [B, 64, 48]; noise levels [B] in 0..1."""
        hidden, pooled = text
        arguments: dict[str, Any] = {
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(hidden.shape[1], 3),
            "return_dict": False,
        }
        return self.transformer(
            noisy,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            timestep=levels,
            guidance=guidance,
            **arguments,
        )[0]
