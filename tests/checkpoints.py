"""The layouts of published checkpoints, written out: names and shapes, filled with noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def noise(
    shapes: Mapping[str, Sequence[int]], seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """A tensor per name; norms near one, the rest small enough that no layer saturates."""
    if device == "meta":
        return {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        x = torch.randn(*shape, generator=generator) * (0.5 / shape[-1] ** 0.5)
        made[name] = x + 1 if len(shape) == 1 and name.endswith("weight") else x
    return made


def nested(tensors: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Any]:
    """{"image_proj": {...}, "ip_adapter": {...}} of flat names, as .bin files have it."""
    return {
        part: {
            k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part + ".")
        }
        for part in parts
    }


def base(clip: int, cross: int, tokens: int = 4) -> Shapes:
    return {
        "image_proj.proj.weight": (tokens * cross, clip),
        "image_proj.proj.bias": (tokens * cross,),
        "image_proj.norm.weight": (cross,),
        "image_proj.norm.bias": (cross,),
    }


def full_face(clip: int, cross: int) -> Shapes:
    shapes = {"0.weight": (clip, clip), "0.bias": (clip,), "2.weight": (cross, clip)}
    shapes.update({"2.bias": (cross,), "3.weight": (cross,), "3.bias": (cross,)})
    return {f"image_proj.proj.{name}": shape for name, shape in shapes.items()}


def attention_and_mlp(dim: int, inner: int, mult: int = 4) -> Shapes:
    """One layer of a resampler."""
    return {
        "0.norm1.weight": (dim,),
        "0.norm1.bias": (dim,),
        "0.norm2.weight": (dim,),
        "0.norm2.bias": (dim,),
        "0.to_q.weight": (inner, dim),
        "0.to_kv.weight": (2 * inner, dim),
        "0.to_out.weight": (dim, inner),
        "1.0.weight": (dim,),
        "1.0.bias": (dim,),
        "1.1.weight": (mult * dim, dim),
        "1.3.weight": (dim, mult * dim),
    }


def resampler(
    embed: int, dim: int, out: int, queries: int, heads: int, prefix: str = "image_proj."
) -> Shapes:
    shapes: Shapes = {
        "latents": (1, queries, dim),
        "proj_in.weight": (dim, embed),
        "proj_in.bias": (dim,),
        "proj_out.weight": (out, dim),
        "proj_out.bias": (out,),
        "norm_out.weight": (out,),
        "norm_out.bias": (out,),
    }
    for i in range(4):
        layer = attention_and_mlp(dim, heads * 64)
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    return {prefix + name: shape for name, shape in shapes.items()}


def pairs(layers: Sequence[tuple[str, int, int]], prefix: str = "ip_adapter.") -> Shapes:
    """to_k_ip and to_v_ip of layers in the order of the file: 1, 3, 5, ..."""
    return {
        f"{prefix}{2 * i + 1}.to_{x}_ip.weight": (inner, cross)
        for i, (_, inner, cross) in enumerate(layers)
        for x in "kv"
    }


def unet_layers(family: str) -> list[tuple[str, int, int]]:
    """attn2 of SD1.5 or SDXL: path, width, width of the text; down, up, mid."""
    if family == "sdxl":
        spec = [("down", 1, 2, 2, 640), ("down", 2, 2, 10, 1280), ("up", 0, 3, 10, 1280)]
        spec += [("up", 1, 3, 2, 640)]
        cross, mid = 2048, 10
    else:
        spec = [("down", b, 2, 1, w) for b, w in enumerate((320, 640, 1280))]
        spec += [("up", b, 3, 1, w) for b, w in zip((1, 2, 3), (1280, 640, 320), strict=True)]
        cross, mid = 768, 1
    found = [
        (f"{side}_blocks.{b}.attentions.{a}.transformer_blocks.{t}.attn2", width, cross)
        for side, b, modules, depth, width in spec
        for a in range(modules)
        for t in range(depth)
    ]
    name = "mid_block.attentions.0.transformer_blocks.{}.attn2"
    return found + [(name.format(t), 1280, cross) for t in range(mid)]
