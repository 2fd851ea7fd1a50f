"""The parts of `tiny-sdxl`: a Stable Diffusion XL of a few million parameters for 32 x 32 drawings.

The UNet has the three levels, the block names and the conditioning of Stable Diffusion XL; it works
on 12 channels at 16 x 16, the 2 x 2 pixels of three colours laid side by side, and predicts the
clean latent (`prediction_type="sample"`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .captions import MAX_TOKENS, save_tokenizer
from .drawings import SIZE

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS, LATENT_SIZE, FACTOR = 12, SIZE // 2, 2
# Makes the latents of the drawings have a standard deviation of about one.
SCALING_FACTOR = 1.5625
TEXT_WIDTH = 32
TIME_IDS = (float(SIZE), float(SIZE), 0.0, 0.0, float(SIZE), float(SIZE))

UNET = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 80, 80),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 2, 2),  # SDXL's field of this name holds the number of heads
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "prediction_type": "sample",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}


def latents_of(pictures: torch.Tensor) -> torch.Tensor:
    """The latents the UNet is trained on: `SCALING_FACTOR` times the 2 x 2 pixels side by side;
    pictures [B, 3, 32, 32] in -1..1."""
    return F.pixel_unshuffle(pictures, FACTOR) * SCALING_FACTOR


def pictures_of(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `latents_of`, not clipped."""
    return F.pixel_shuffle(latents / SCALING_FACTOR, FACTOR)


def new_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def new_scheduler() -> DDIMScheduler:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER)


def new_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer, with its files written to `folder`."""
    from transformers import CLIPTokenizer

    save_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def new_text_encoder(tokenizer: CLIPTokenizer, projected: bool) -> CLIPTextModel:
    """A CLIP text encoder with two layers: with a projection of the pooled token, like SDXL's
    second one, or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


class Denoiser(torch.nn.Module):
    """UNet and text encoders as they are trained: token ids and noisy latents in, clean latents
    out.

    The text goes in as `StableDiffusionXLPipeline` hands it over: the last hidden states but one of
    both encoders side by side, the projected token of the second as the pooled embedding, and zeros
    for an empty prompt.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = new_unet()
        self.text_encoder = new_text_encoder(tokenizer, projected=False)
        self.text_encoder_2 = new_text_encoder(tokenizer, projected=True)

    def embed(self, ids: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings [B, T, C] and pooled embeddings [B, P]; zeros in the rows where `keep`
        is 0."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return hidden * keep[:, None, None], second.text_embeds * keep[:, None]

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        hidden, pooled = self.embed(ids, keep)
        added: dict[str, Any] = {
            "text_embeds": pooled,
            "time_ids": noisy.new_tensor([TIME_IDS] * len(noisy)),
        }
        return self.unet(
            noisy, times, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]
