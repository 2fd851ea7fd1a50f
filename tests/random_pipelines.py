"""Diffusers pipelines with random weights, a fraction of a second each: no files, no network."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PAPER = {**BETAS, "clip_sample": False, "set_alpha_to_one": False}
UNET = {
    "layers_per_block": 1,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 2,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
XL = {
    **UNET,
    "attention_head_dim": (2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "cross_attention_dim": 64,
}


def tokenizer() -> Any:
    """A byte-level CLIP tokenizer without merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(a + "</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    specials = {"bos_token": words[-2], **dict.fromkeys(("eos_token", "unk_token"), words[-1])}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: i for i, word in enumerate(words)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        text = json.dumps({**config, **specials, "pad_token": words[-1]})
        Path(folder, "tokenizer_config.json").write_text(text)
        return CLIPTokenizer.from_pretrained(folder)


def text_encoder(projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=32,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    ).eval()


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    return UNet2DConditionModel(**changes).eval()


def ddim(**changes: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{**PAPER, **changes})


def sd(scheduler: Any = None, **changes: Any) -> Any:
    """Stable Diffusion 1.5: 32 x 32 pictures, 16 x 16 latents."""
    from diffusers import StableDiffusionPipeline

    config = {**UNET, "cross_attention_dim": 32, "attention_head_dim": 2, **changes}
    pipe = StableDiffusionPipeline(
        unet=unet(**config),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        scheduler=scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_parts(scheduler: Any = None, **changes: Any) -> dict[str, Any]:
    """Every part of an SDXL pipeline: 32 x 32 pictures, 16 x 16 latents, one self-attention a
    block."""
    return {
        "unet": unet(**{**XL, **changes}),
        "vae": vae(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projected=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": scheduler or ddim(),
    }


def sdxl(scheduler: Any = None, **changes: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(**sdxl_parts(scheduler, **changes), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(**changes: Any) -> Any:
    """SDXL's, with zero convolutions that were made to speak."""
    from diffusers import ControlNetModel

    torch.manual_seed(4)
    leave_out = ("sample_size", "out_channels", "up_block_types")
    config = {key: value for key, value in {**XL, **changes}.items() if key not in leave_out}
    net = ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32)).eval()
    for name, parameter in net.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def sdxl_controlnet(scheduler: Any = None) -> Any:
    """SDXL with a ControlNet."""
    from diffusers import StableDiffusionXLControlNetPipeline

    pipe = StableDiffusionXLControlNetPipeline(
        **sdxl_parts(scheduler), controlnet=controlnet(), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
