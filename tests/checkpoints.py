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


def csgo(
    layers: Sequence[tuple[str, int, int]], embed: int, dim: int, tokens: tuple[int, int] = (4, 32)
) -> Shapes:
    """csgo_4_32.bin: projectors, the up blocks of the UNet, the down blocks of the ControlNet."""
    shapes = resampler(embed, dim, layers[0][2], tokens[0], 12, "content_image_proj.")
    shapes |= resampler(embed, dim, layers[0][2], tokens[1], 12, "style_image_proj.")
    for i, (name, inner, cross) in enumerate(layers):
        for x in "kv":
            if name.startswith("up_blocks"):
                shapes[f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight"] = (inner, cross)
            if name.startswith("down_blocks"):
                place = f"controlnet_adapter_modules.{name}.processor.to_{x}_ip.weight"
                shapes[place] = (inner, cross)
    return shapes


def styleshot(layers: Sequence[tuple[str, int, int]], embed: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(3):
        one = base(embed, layers[0][2], 2)
        stem = f"style_image_proj_modules.{i}."
        shapes |= {stem + k.removeprefix("image_proj."): v for k, v in one.items()}
    return {**shapes, **pairs(layers, "adapter_modules.")}


def _bert_attention(stem: str, dim: int, context: int) -> Shapes:
    shapes: Shapes = {}
    for name, width in (("query", dim), ("key", context), ("value", context)):
        shapes[f"{stem}self.{name}.weight"] = (dim, width)
        shapes[f"{stem}self.{name}.bias"] = (dim,)
    return {**shapes, **_bert_output(f"{stem}output.", dim, dim)}


def _bert_output(stem: str, dim: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{stem}dense.weight": (dim, inner), f"{stem}dense.bias": (dim,)}
    return {**shapes, f"{stem}LayerNorm.weight": (dim,), f"{stem}LayerNorm.bias": (dim,)}


def qformer(dim: int, context: int, queries: int, inner: int, depth: int = 12) -> Shapes:
    """The part of a BLIP-2 checkpoint that DEADiff uses, under LAVIS' names."""
    bert = "Qformer.bert."
    shapes: Shapes = {
        "query_tokens": (1, queries, dim),
        "ln_vision.weight": (context,),
        "ln_vision.bias": (context,),
        f"{bert}embeddings.word_embeddings.weight": (30523, dim),
        f"{bert}embeddings.position_embeddings.weight": (512, dim),
        f"{bert}embeddings.LayerNorm.weight": (dim,),
        f"{bert}embeddings.LayerNorm.bias": (dim,),
    }
    for i in range(depth):
        stem = f"{bert}encoder.layer.{i}."
        shapes |= _bert_attention(f"{stem}attention.", dim, dim)
        shapes |= _bert_attention(f"{stem}crossattention.", dim, context)
        for suffix in ("", "_query"):
            shapes[f"{stem}intermediate{suffix}.dense.weight"] = (inner, dim)
            shapes[f"{stem}intermediate{suffix}.dense.bias"] = (inner,)
            shapes |= _bert_output(f"{stem}output{suffix}.", dim, inner)
    return shapes


def deadiff(dim: int, context: int, queries: int, inner: int) -> Shapes:
    """The Q-Formers and projectors of deadiff_v1.ckpt, with some of what belongs to training."""
    shapes: Shapes = {}
    for kind in ("style", "content"):
        own = qformer(dim, context, queries, inner)
        shapes |= {f"{kind}_blip.{k}": v for k, v in own.items()}
        shapes[f"{kind}_blip.visual_encoder.conv1.weight"] = (8, 3, 2, 2)
        shapes[f"{kind}_blip.Qformer.cls.predictions.bias"] = (30523,)
        shapes[f"{kind}_blip.itm_head.weight"] = (2, dim)
        stem = f"{kind}_proj_layer."
        shapes |= {f"{stem}dense1.weight": (inner, dim), f"{stem}dense1.bias": (inner,)}
        shapes |= {f"{stem}dense2.weight": (dim, inner), f"{stem}dense2.bias": (dim,)}
        shapes |= {f"{stem}LayerNorm.weight": (dim,), f"{stem}LayerNorm.bias": (dim,)}
    return {**shapes, "betas": (1000,), "first_stage_model.conv.weight": (2, 2)}


LDM_BLOCKS = {  # where the latent-diffusion code has the attention modules of SD1.5
    **{f"input_blocks.{i}.1": f"down_blocks.{i // 3}.attentions.{a}"
       for i, a in ((1, 0), (2, 1), (4, 0), (5, 1), (7, 0), (8, 1))},
    "middle_block.1": "mid_block.attentions.0",
    **{f"output_blocks.{i}.1": f"up_blocks.{i // 3}.attentions.{i % 3}" for i in range(3, 12)},
}  # fmt: skip


def xlabs(blocks: int, clip: int, inner: int, out: int, tokens: int) -> Shapes:
    one = base(clip, out, tokens)
    shapes = {f"ip_adapter_proj_model.{k.removeprefix('image_proj.')}": v for k, v in one.items()}
    for i in range(blocks):
        for x in "kv":
            stem = f"double_blocks.{i}.processor.ip_adapter_double_stream_{x}_proj."
            shapes |= {f"{stem}weight": (inner, out), f"{stem}bias": (inner,)}
    return shapes


def instantx(blocks: int, embed: int, inner: int, out: int, tokens: int) -> Shapes:
    shapes: Shapes = {
        "image_proj.proj.0.weight": (2 * embed, embed),
        "image_proj.proj.0.bias": (2 * embed,),
        "image_proj.proj.2.weight": (tokens * out, 2 * embed),
        "image_proj.proj.2.bias": (tokens * out,),
        "image_proj.norm.weight": (out,),
        "image_proj.norm.bias": (out,),
    }
    pair = {f"ip_adapter.{i}.to_{x}_ip.weight": (inner, out) for i in range(blocks) for x in "kv"}
    return {**shapes, **pair}


def uso(embed: int, grid: int, tokens: int, out: int) -> Shapes:
    """USO's projector of style pictures."""
    found: Shapes = {}
    for level in ("high", "mid", "low"):
        stem = f"feature_embedder.{level}_"
        found |= {f"{stem}embedding_linear.0.weight": (tokens, grid)}
        found |= {f"{stem}embedding_linear.0.bias": (tokens,)}
        found |= {f"{stem}layer_norm.weight": (embed,), f"{stem}layer_norm.bias": (embed,)}
        found |= {f"{stem}projection.weight": (out, embed), f"{stem}projection.bias": (out,)}
    return found


def _three_linears(stem: str, into: int, width: int, out: int) -> Shapes:
    shapes: Shapes = {}
    for i, (a, b) in {0: (into, width), 3: (width, width), 6: (width, out)}.items():
        shapes |= {f"{stem}{i}.weight": (b, a), f"{stem}{i}.bias": (b,)}
    for i in (1, 4):
        shapes |= {f"{stem}{i}.weight": (width,), f"{stem}{i}.bias": (width,)}
    return shapes


def idformer(
    face: int, vision: int, dim: int, queries: int, out: int, heads: int, prefix: str
) -> Shapes:
    shapes: Shapes = {"latents": (1, queries, dim), "proj_out": (dim, out)}
    for i in range(10):
        layer = attention_and_mlp(dim, heads * 64)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    for i in range(5):
        shapes |= _three_linears(f"mapping_{i}.", vision, vision, dim)
    shapes |= _three_linears("id_embedding_mapping.", face, vision, 5 * dim)
    return {prefix + k: v for k, v in shapes.items()}


def pulid(
    count: int, face: int, vision: int, dim: int, queries: int, out: int, image: int, heads: int
) -> Shapes:
    """pulid_flux_v0.9.x; `heads` of 64 in the encoder, and of 128 in the cross-attentions."""
    shapes = idformer(face, vision, dim, queries, out, heads, "pulid_encoder.")
    for i in range(count):
        stem = f"pulid_ca.{i}."
        for name, width in (("norm1", out), ("norm2", image)):
            shapes |= {f"{stem}{name}.weight": (width,), f"{stem}{name}.bias": (width,)}
        shapes[f"{stem}to_q.weight"] = (heads * 128, image)
        shapes[f"{stem}to_kv.weight"] = (2 * heads * 128, out)
        shapes[f"{stem}to_out.weight"] = (image, heads * 128)
    return shapes


def csd(width: int, patch: int, positions: int, out: int, depth: int = 24) -> Shapes:
    """The model_state_dict of CSD's checkpoint.pth."""
    shapes: Shapes = {"last_layer_style": (width, out), "last_layer_content": (width, out)}
    b = "backbone."
    shapes |= {f"{b}class_embedding": (width,), f"{b}positional_embedding": (positions, width)}
    shapes[f"{b}conv1.weight"] = (width, 3, patch, patch)
    norms = [f"{b}ln_pre", f"{b}ln_post"]
    for i in range(depth):
        stem = f"{b}transformer.resblocks.{i}."
        shapes |= {f"{stem}attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{stem}attn.in_proj_bias": (3 * width,)}
        for name, o, into in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{stem}{name}.weight": (o, into), f"{stem}{name}.bias": (o,)}
        norms += [f"{stem}ln_1", f"{stem}ln_2"]
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def pulid_v1(face: int, vision: int, inner: int, out: int) -> Shapes:
    """The encoder of pulid_v1.bin."""
    shapes = _three_linears("id_adapter.body.", face, inner, 5 * out)
    for i in range(5):
        shapes |= _three_linears(f"id_adapter.mapping_{i}.", vision, vision, out)
        shapes |= _three_linears(f"id_adapter.mapping_patch_{i}.", vision, vision, out)
    return shapes


def pulid_pairs(layers: Sequence[tuple[str, int, int]]) -> Shapes:
    return {
        f"id_adapter_attn_layers.{2 * i + 1}.id_to_{x}.weight": (inner, cross)
        for i, (_, inner, cross) in enumerate(layers)
        for x in "kv"
    }


def style_aware(widths: tuple[int, int, int], out: int, depth: int = 32) -> Shapes:
    """style_aware_encoder.bin, with the part of CLIP that it does not use."""
    a, b, c = widths
    clip = "image_encoder.vision_model."
    shapes: Shapes = {
        f"{clip}embeddings.class_embedding": (c,),
        f"{clip}embeddings.patch_embedding.weight": (c, 3, 14, 14),
        f"{clip}embeddings.position_embedding.weight": (257, c),
        "image_encoder.visual_projection.weight": (out, c),
        "position_embedding.weight": (59, c),
        **{f"style_embeddings.{i}": (c,) for i in range(3)},
    }
    norms = [f"{clip}pre_layrnorm", f"{clip}post_layernorm"]
    for i in range(depth):
        stem = f"{clip}encoder.layers.{i}."
        for name, o, into in (("mlp.fc1", 4 * c, c), ("mlp.fc2", c, 4 * c)):
            shapes |= {f"{stem}{name}.weight": (o, into), f"{stem}{name}.bias": (o,)}
        for name in ("q", "k", "v", "out"):
            shapes |= {f"{stem}self_attn.{name}_proj.weight": (c, c)}
            shapes |= {f"{stem}self_attn.{name}_proj.bias": (c,)}
        norms += [f"{stem}layer_norm1", f"{stem}layer_norm2"]
    for name in norms:
        shapes |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    stages = {0: [(a, a), (a, b), (b, b), (b, b), (b, c), (c, c)]}
    stages |= {1: [(a, a), (a, b), (b, b), (b, c), (c, c)], 2: [(a, a), (a, b), (b, c), (c, c)]}
    for net, body in stages.items():
        convs = {
            "conv_in": (a, 192, 3),
            **{f"body.{i}.block1": (o, o, 3) for i, (_, o) in enumerate(body)},
        }
        convs |= {f"body.{i}.block2": (o, o, 1) for i, (_, o) in enumerate(body)}
        convs |= {f"body.{i}.in_conv": (o, n, 1) for i, (n, o) in enumerate(body) if n != o}
        for name, (o, n, k) in convs.items():
            shapes |= {f"cnn.{net}.{name}.weight": (o, n, k, k), f"cnn.{net}.{name}.bias": (o,)}
        shapes |= {f"cnn.{net}.adapter.weight": (c, c), f"cnn.{net}.adapter.bias": (c,)}
    return shapes
