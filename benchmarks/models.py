"""SDXL's UNet and FLUX's transformer from their published configurations, with random weights built
on the device: nothing is downloaded. `tiny` ones have the same structure with small numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # diffusers' name for the number of heads
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNET_TINY: dict[str, Any] = {
    **UNET,
    "sample_size": 8,
    "block_out_channels": (16, 32, 64),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "norm_num_groups": 8,
}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TRANSFORMER_TINY: dict[str, Any] = {
    **TRANSFORMER,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
SHARPER = 3.0
"""Queries and keys of random layers give nearly uniform attention; times this they do not."""


@dataclass(frozen=True)
class Model:
    """A denoiser of published size.

    Args:
        chunks: how many rows an image has: 2 with classifier-free guidance.
        build: makes it, in the default dtype and on the default device.
        inputs: its arguments for a number of images.
        size: side of the latents (FLUX: in tokens), text tokens, picture tokens.
    """

    name: str
    chunks: int
    build: Callable[[], Any]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]
    size: tuple[int, int, int]


def _draw(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return made.to(torch.get_default_device(), torch.get_default_dtype())

    return draw


def _unet_inputs(config: dict[str, Any], text: int) -> Callable[..., dict[str, Any]]:
    def inputs(images: int, generator: torch.Generator) -> dict[str, Any]:
        draw, side, rows = _draw(generator), config["sample_size"], 2 * images
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= 6 * config["addition_time_embed_dim"]
        times = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]])
        return {
            "sample": draw(images, 4, side, side).repeat(2, 1, 1, 1),
            "timestep": torch.full((), 500.0),
            "encoder_hidden_states": draw(rows, text, config["cross_attention_dim"]),
            "added_cond_kwargs": {
                "text_embeds": draw(rows, pooled),
                "time_ids": times.repeat(rows, 1),
            },
        }

    return inputs


def _transformer_inputs(config: dict[str, Any], side: int, text: int) -> Callable[..., Any]:
    def inputs(images: int, generator: torch.Generator) -> dict[str, Any]:
        draw = _draw(generator)
        places = torch.zeros(side, side, 3)
        places[..., 1] += torch.arange(side)[:, None]
        places[..., 2] += torch.arange(side)[None]
        return {
            "hidden_states": draw(images, side * side, config["in_channels"]),
            "encoder_hidden_states": draw(images, text, config["joint_attention_dim"]),
            "pooled_projections": draw(images, config["pooled_projection_dim"]),
            "timestep": torch.full((images,), 0.7),
            "img_ids": places.flatten(0, 1),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((images,), 3.5),
        }

    return inputs


def _unet(config: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import UNet2DConditionModel

        return _sharper(UNet2DConditionModel(**config))

    return build


def _transformer(config: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import FluxTransformer2DModel

        return _sharper(FluxTransformer2DModel(**config))

    return build


def _sharper(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "norm_q.weight", "norm_k.weight")):
            parameter.data.mul_(SHARPER)
    return model.eval().requires_grad_(False)


def models(tiny: bool) -> dict[str, Model]:
    """Both models, at their published size or with small numbers."""
    unet = UNET_TINY if tiny else UNET
    transformer = TRANSFORMER_TINY if tiny else TRANSFORMER
    side, text, picture = (4, 6, 9) if tiny else (64, 512, 729)
    words = 7 if tiny else 77
    latent = unet["sample_size"]
    return {
        "sdxl": Model("sdxl", 2, _unet(unet), _unet_inputs(unet, words), (latent, words, 4)),
        "flux": Model(
            "flux",
            1,
            _transformer(transformer),
            _transformer_inputs(transformer, side, text),
            (side, text, picture),
        ),
    }
