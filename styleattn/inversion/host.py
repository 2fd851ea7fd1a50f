"""What DDIM needs from a diffusers pipeline with a UNet: latents, prompt embeddings, schedule,
noise function.

Duck-typed: nothing here imports diffusers. Works for pipelines of the Stable Diffusion 1, 2 and XL
families.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .ddim import PREDICTION_TYPES, Epsilon, to_epsilon

Picture = str | os.PathLike[str] | Image.Image


class HostUnsupported(TypeError):
    """A pipeline that DDIM cannot run on: names every reason."""


@dataclass(frozen=True)
class Prompts:
    """Prompt embeddings: [n, tokens, width] and, for SDXL, pooled [n, width]; the negatives
    likewise."""

    embeds: Tensor
    negative_embeds: Tensor
    pooled: Tensor | None = None
    negative_pooled: Tensor | None = None

    def __getitem__(self, rows: slice) -> Prompts:
        parts = (self.embeds, self.negative_embeds, self.pooled, self.negative_pooled)
        return Prompts(*(None if x is None else x[rows] for x in parts))  # type: ignore[arg-type]

    def arguments(self, guided: bool = True) -> dict[str, Tensor]:
        """The keyword arguments that hand these embeddings to a pipeline call."""
        named = {"prompt_embeds": self.embeds, "pooled_prompt_embeds": self.pooled}
        if guided:
            named["negative_prompt_embeds"] = self.negative_embeds
            named["negative_pooled_prompt_embeds"] = self.negative_pooled
        return {name: x for name, x in named.items() if x is not None}


@dataclass(frozen=True)
class Schedule:
    """ᾱ of every training timestep, ᾱ of the data, and what the network predicts."""

    alphas_cumprod: tuple[float, ...]
    final_alpha: float
    prediction_type: str


def check_host(pipe: Any, call: str) -> None:
    """Refuse a pipeline that lacks what DDIM on a UNet needs.

    Raises:
        HostUnsupported: with every reason.
    """
    reasons = [
        f"it has no {part}"
        for part in ("unet", "vae", "scheduler", "encode_prompt")
        if getattr(pipe, part, None) is None
    ]
    if not reasons:
        config = pipe.unet.config
        if getattr(pipe.scheduler, "alphas_cumprod", None) is None:
            reasons.append(
                f"its {type(pipe.scheduler).__name__} has no alphas_cumprod (a flow model?)"
            )
        kind = _prediction_type(pipe.scheduler)
        if kind not in PREDICTION_TYPES:
            reasons.append(f"its scheduler predicts {kind!r}, not one of {PREDICTION_TYPES}")
        channels = pipe.vae.config.latent_channels
        if config.in_channels != channels:
            reasons.append(f"its unet takes {config.in_channels} channels, its vae has {channels}")
        if getattr(config, "time_cond_proj_dim", None) is not None:
            reasons.append(
                "its unet is distilled for an embedded guidance scale (time_cond_proj_dim)"
            )
    if reasons:
        raise HostUnsupported(f"{call}: cannot use a {type(pipe).__name__}: " + "; ".join(reasons))


def _prediction_type(scheduler: Any) -> str:
    return str(getattr(scheduler.config, "prediction_type", "epsilon"))


def schedule_of(pipe: Any) -> Schedule:
    """The noise schedule of the pipeline's scheduler, as numbers."""
    scheduler = pipe.scheduler
    alphas = tuple(float(a) for a in scheduler.alphas_cumprod.double().cpu())
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return Schedule(alphas, final, _prediction_type(scheduler))


def timesteps_of(pipe: Any, num_inference_steps: int) -> list[int]:
    """The descending timesteps that the pipeline's own scheduler visits, rounded to integers, each
    once.

    The pipeline's scheduler itself is left as it is.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    found = {round(float(t)) for t in scheduler.timesteps}
    return sorted(found, reverse=True)


def vae_scale(pipe: Any) -> int:
    """Pixels per latent along one side."""
    return int(getattr(pipe, "vae_scale_factor", 8))


def default_size(pipe: Any) -> tuple[int, int]:
    """Height and width in pixels that the pipeline makes when nobody asks for another size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * vae_scale(pipe), width * vae_scale(pipe)


def read_picture(picture: Picture) -> Image.Image:
    """Open a picture as RGB, upright, transparency on white.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture, or not a whole one.
    """
    if isinstance(picture, Image.Image):
        image = picture
    else:
        name = os.fspath(picture)
        try:
            with Image.open(name) as opened:
                opened.load()
                image = opened
        except FileNotFoundError:
            raise FileNotFoundError(f"no such picture: {name}") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {name} as a picture: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def encode_picture(pipe: Any, picture: Picture, height: int, width: int) -> Tensor:
    """The clean latents of a picture: the VAE's posterior mean in fp32, shifted and scaled as the
    denoiser takes it.

    The picture is cropped centrally to the wanted aspect and resized (Lanczos).

    Returns:
        [C, height / s, width / s] fp32 on the CPU, s pixels per latent.
    """
    image = ImageOps.fit(read_picture(picture), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)[
        None
    ]
    with in_fp32(pipe.vae) as vae, torch.no_grad():
        latents = vae.encode(pixels.to(device_of(pipe))).latent_dist.mean
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(
            shape
        )
    return ((latents - shift_factor(vae)) * vae.config.scaling_factor)[0].float().cpu()


def shift_factor(vae: Any) -> float:
    """What is taken off the VAE's latents before they are scaled: 0 but for flow models."""
    return float(getattr(vae.config, "shift_factor", None) or 0.0)


@contextlib.contextmanager
def in_fp32(module: Any) -> Iterator[Any]:
    """The module in fp32, and afterwards in the dtype that it came in."""
    dtype = module.dtype
    if dtype == torch.float32:
        yield module
        return
    module.to(torch.float32)
    try:
        yield module
    finally:
        module.to(dtype)


def device_of(pipe: Any) -> torch.device:
    """Where the pipeline computes (offloading included)."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def encode_prompts(pipe: Any, prompts: Sequence[str], negative: str | None = None) -> Prompts:
    """Embed prompts one by one, so that no prompt's numbers depend on its neighbours.

    Args:
        pipe: a Stable Diffusion 1, 2 or XL pipeline.
        prompts: at least one.
        negative: the negative prompt; None is the empty prompt, which is all zeros where an SDXL
            pipeline says ``force_zeros_for_empty_prompt``.
    """
    if not prompts:
        raise ValueError("encode_prompts: no prompts")
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            out = pipe.encode_prompt(
                prompt=prompt,
                device=device_of(pipe),
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=negative,
            )
            rows.append(tuple(out) if len(out) == 4 else (out[0], out[1], None, None))
    columns = list(zip(*rows, strict=True))
    return Prompts(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]


def time_ids(pipe: Any, height: int, width: int) -> Tensor:
    """SDXL's micro-conditioning [1, 6]: original size, no crop, target size, all (height,
    width)."""
    return torch.tensor(
        [[height, width, 0, 0, height, width]], device=device_of(pipe), dtype=pipe.unet.dtype
    )


def noise_function(
    pipe: Any, prompts: Prompts, guidance_scale: float, height: int, width: int
) -> Epsilon:
    """ε(x, t) of the pipeline's UNet under classifier-free guidance, rows ``[uncond, cond]``, one
    call.

    ε = ε_uncond + guidance_scale·(ε_cond - ε_uncond) on the network's raw output, then converted at
    the level of the label t. At ``guidance_scale`` 1 the unconditional row is not computed.

    Returns:
        a function of x [n, C, h, w] fp32 and an integer timestep; n must be the number of prompts.
    """
    unet, schedule = pipe.unet, schedule_of(pipe)
    guided = guidance_scale != 1.0
    halves = [prompts.negative_embeds, prompts.embeds] if guided else [prompts.embeds]
    embeds = torch.cat(halves).to(unet.dtype)
    added: dict[str, Tensor] | None = None
    if prompts.pooled is not None:
        pooled = [prompts.negative_pooled, prompts.pooled] if guided else [prompts.pooled]
        ids = time_ids(pipe, height, width).expand(embeds.shape[0], -1)
        added = {"text_embeds": torch.cat(pooled).to(unet.dtype), "time_ids": ids}  # type: ignore[arg-type]

    def epsilon(x: Tensor, timestep: int) -> Tensor:
        model_input = torch.cat([x, x] if guided else [x]).to(unet.dtype)
        with torch.no_grad():
            output = unet(
                model_input,
                torch.tensor(timestep, device=x.device),
                encoder_hidden_states=embeds,
                added_cond_kwargs=added,
                return_dict=False,
            )[0].float()
        if guided:
            uncond, cond = output.chunk(2)
            output = uncond + guidance_scale * (cond - uncond)
        return to_epsilon(output, x, schedule.alphas_cumprod[timestep], schedule.prediction_type)

    return epsilon


def fingerprint(module: torch.nn.Module) -> str:
    """A short name for a network: SHA-256 over its class and, of every parameter and buffer, name,
    shape and 64 values.

    Cheap (no full read of the weights), the same on every device, and different after fine-tuning
    or with a LoRA loaded. Weights that sequential offloading keeps on the meta device count by name
    and shape only.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() and not flat.is_meta:
            stride = max(1, flat.numel() // 64)
            digest.update(flat[::stride][:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:32]


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents [n, C, h, w] of the UNet as its VAE decodes them; differentiable."""
    config = vae.config
    latents = latents.float() / config.scaling_factor + shift_factor(vae)
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return latents
    mean, std = (latents.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    return latents * std + mean


def decode_latents(pipe: Any, latents: Tensor) -> list[Image.Image]:
    """The pictures of clean latents [n, C, h, w], decoded one by one in fp32: the reverse of
    :func:`encode_picture`."""
    latents = unscaled(pipe.vae, latents)
    pictures = []
    with in_fp32(pipe.vae) as vae, torch.no_grad():
        for row in latents.split(1):
            pixels = vae.decode(row.to(device_of(pipe)), return_dict=False)[0][0]
            scaled = ((pixels + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
            pictures.append(Image.fromarray(scaled.permute(1, 2, 0).numpy()))
    return pictures
