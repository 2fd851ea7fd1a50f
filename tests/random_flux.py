"""FLUX pipelines and their encoders with random weights, a fraction of a second each: no files, no
network."""

from __future__ import annotations

import string
from typing import Any

import torch
from PIL import Image
from random_pipelines import text_encoder, tokenizer

HEADS, HEAD_DIM, TEXT = 2, 16, 32
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def t5_tokenizer() -> Any:
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    fast = Tokenizer(models.Unigram([*pieces, *((c, -3.0) for c in letters)], unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(5)
    config = T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def siglip(**changes: Any) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(6)
    return SiglipVisionModel(SiglipVisionConfig(**{**VISION, **changes})).eval()


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(7)
    config = CLIPVisionConfig(**VISION, projection_dim=32)
    return CLIPVisionModelWithProjection(config).eval()


def vae(channels: int = 1) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(8)
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def transformer(**changes: Any) -> Any:
    """Two double and two single blocks whose gates and norms speak."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(9)
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
        **changes,
    }
    model = FluxTransformer2DModel(**config).eval()
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
        elif "attn." in name and name.endswith("weight"):
            parameter.data.mul_(3.0)
    return model


def parts(**changes: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {
        "transformer": transformer(**changes),
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
    }


def flux(**changes: Any) -> Any:
    """FLUX.1 dev: 16 x 16 pictures of 8 x 8 tokens."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline(**parts(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill() -> Any:
    """FLUX.1 Fill: 20 channels = latents, masked picture, mask."""
    from diffusers import FluxFillPipeline

    given = {**parts(in_channels=20, out_channels=8), "vae": vae(2)}
    pipe = FluxFillPipeline(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kontext(of: Any = None) -> Any:
    """FLUX.1 Kontext, with the parts of a pipeline or its own."""
    from diffusers import FluxKontextPipeline

    given = parts() if of is None else {name: of.components[name] for name in parts()}
    pipe = FluxKontextPipeline(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = ("a toy train", "a cat", "a house on a hill")


def run(
    pipe: Any, prompts: Any = PROMPTS, *, steps: int = 3, size: int = 16, **arguments: Any
) -> Any:
    """A pipeline call with fixed noise and 16 text tokens, latents out."""
    count = len(arguments["prompt_embeds"]) if prompts is None else len(prompts)
    count *= arguments.get("num_images_per_prompt", 1)
    noise = torch.randn(count, (size // 2) ** 2, 4, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompts if prompts is None else list(prompts),
        latents=noise,
        height=size,
        width=size,
        max_sequence_length=16,
        num_inference_steps=steps,
        output_type="latent",
        **arguments,
    ).images


def paint(pipe: Any, prompts: Any = PROMPTS, *, steps: int = 3) -> Any:
    """A call of a pipeline that fills, latents out; the right half of the picture is painted."""
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (8, 0, 16, 16))
    return pipe(
        list(prompts),
        image=PICTURE.resize((16, 16)),
        mask_image=mask,
        height=16,
        width=16,
        max_sequence_length=16,
        num_inference_steps=steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def inputs(batch: int = 1, text: int = 7, grid: tuple[int, int] = (3, 4), seed: int = 0) -> Any:
    """Arguments of a transformer call."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    ids = torch.zeros(*grid, 3)
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])[None]
    return {
        "hidden_states": random(batch, grid[0] * grid[1], 4),
        "encoder_hidden_states": random(batch, text, TEXT),
        "pooled_projections": random(batch, 32),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def ip_adapter(transformer: Any, seed: int = 0) -> Any:
    """XLabs' adapter as diffusers reads it."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for i in range(len(transformer.transformer_blocks)):
        for part in ("k", "v"):
            layers[f"{i}.to_{part}_ip.weight"] = torch.randn(32, 32, generator=g) / 6
            layers[f"{i}.to_{part}_ip.bias"] = torch.randn(32, generator=g) / 6
    projection = {
        "proj.weight": torch.randn(4 * 32, 32, generator=g) / 6,
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapter(pipe: Any, seeds: tuple[int, ...] = (0,)) -> None:
    pipe.load_ip_adapter(
        [ip_adapter(pipe.transformer, seed) for seed in seeds],
        subfolder=[""] * len(seeds),
        weight_name=[""] * len(seeds),
        image_encoder_pretrained_model_name_or_path=None,
    )


EACH = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(2))
"""Embeddings of a picture per prompt."""

TOKENS = torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
"""Redux tokens of a picture."""

PICTURE = Image.effect_noise((32, 32), 60).convert("RGB")


def relative(a: Any, b: Any) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def processors(pipe: Any) -> dict[str, Any]:
    """A copy of what stands on the layers now."""
    return dict(pipe.transformer.attn_processors)
