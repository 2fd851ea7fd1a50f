"""What recipes have to know of a pipeline's family: its denoiser, its sizes, and how prompts and
guidance enter its call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from styleattn.inversion.flow_host import MAX_TOKENS, flow_levels, flow_size
from styleattn.inversion.host import (
    HostUnsupported,
    check_host,
    default_size,
    device_of,
    encode_prompts,
    timesteps_of,
)
from styleattn.inversion.invert import check_run

HOSTS = ("unet", "flux")
"""Stable Diffusion 1, 2 and XL; FLUX.1."""


def host_of(pipe: Any, call: str = "styleattn") -> str:
    """The family of a pipeline.

    Raises:
        HostUnsupported: a pipeline of another family; says what it lacks.
    """
    model = getattr(pipe, "transformer", None)
    model = getattr(model, "_orig_mod", model)  # compiled
    if type(model).__name__ == "FluxTransformer2DModel":
        return "flux"
    check_host(pipe, call)
    return "unet"


def denoiser(pipe: Any) -> Any:
    """The network that a style is at work on."""
    return pipe.transformer if host_of(pipe) == "flux" else pipe.unet


def size_of(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """The size in pixels of pictures of a wanted size; None is the pipeline's own."""
    if host_of(pipe) == "flux":
        return flow_size(pipe, height, width)
    own = default_size(pipe)
    return (own[0] if height is None else height, own[1] if width is None else width)


def levels(pipe: Any, sampling: Any) -> Sequence[float]:
    """The noise levels of a run: timesteps, on FLUX shares of noise."""
    steps = sampling.num_inference_steps
    if host_of(pipe) == "flux":
        return flow_levels(pipe, steps, *size_of(pipe, sampling.height, sampling.width))
    return timesteps_of(pipe, steps)


def max_tokens(pipe: Any) -> int:
    """How many tokens T5 gives a FLUX: schnell was trained with half of dev's, another model with
    what its tokenizer says."""
    most = MAX_TOKENS if pipe.transformer.config.guidance_embeds else MAX_TOKENS // 2
    return min(most, int(pipe.tokenizer_2.model_max_length))


def check_sampling(pipe: Any, sampling: Any, pipeline: str = "FluxPipeline") -> None:
    """Refuse a run that a pipeline cannot make as it is asked for.

    Args:
        pipeline: the class that is wanted on FLUX.

    Raises:
        ValueError: steps, sizes or guidance without meaning for it; every reason for FLUX.
        HostUnsupported: on FLUX a pipeline of another class.
    """
    steps, height, width = sampling.num_inference_steps, sampling.height, sampling.width
    if host_of(pipe) == "unet":
        check_run(pipe, steps, height, width)
        _check_true_guidance(pipe, sampling)
        return
    if type(pipe).__name__ != pipeline:
        raise HostUnsupported(f"the method draws with a {pipeline}, not a {type(pipe).__name__}")
    most = int(pipe.scheduler.config.num_train_timesteps)
    reasons = []
    if not 1 <= steps <= most:
        reasons.append(f"num_inference_steps must lie in 1..{most}, got {steps}")
    try:
        size_of(pipe, height, width)
    except ValueError as error:
        reasons.append(str(error))
    _check_true_guidance(pipe, sampling)
    if sampling.negative_prompt is not None and sampling.true_guidance <= 1:
        reasons.append("a negative prompt acts on FLUX under a true guidance above 1")
    if sampling.guidance_scale and not pipe.transformer.config.guidance_embeds:
        reasons.append("this model was distilled without a guidance scale: guidance must be 0")
    if reasons:
        raise ValueError("; ".join(reasons))


def _check_true_guidance(pipe: Any, sampling: Any) -> None:
    """Refuse FLUX's second call where a pipeline has none."""
    known = inspect.signature(type(pipe).__call__).parameters
    if sampling.true_guidance != 1.0 and "true_cfg_scale" not in known:
        raise ValueError(f"a {type(pipe).__name__} has no true guidance next to its own")


def call_arguments(pipe: Any, prompts: Sequence[str], sampling: Any) -> dict[str, Any]:
    """Prompts and guidance as the pipeline's call takes them; every prompt is embedded alone.

    Raises:
        ValueError: true guidance for a pipeline that has none.
    """
    _check_true_guidance(pipe, sampling)
    if host_of(pipe) == "unet":
        embeds = encode_prompts(pipe, prompts, sampling.negative_prompt)
        return {**embeds.arguments(), "guidance_scale": sampling.guidance_scale}
    found = _flux_words(pipe, prompts)
    found["guidance_scale"] = sampling.guidance_scale
    if "true_cfg_scale" in inspect.signature(type(pipe).__call__).parameters:  # Fill has none
        found["true_cfg_scale"] = sampling.true_guidance
    if sampling.true_guidance > 1:
        negative = _flux_words(pipe, [sampling.negative_prompt or ""])
        found |= {
            f"negative_{name}": x.repeat_interleave(len(prompts), 0) for name, x in negative.items()
        }
    return found


def _flux_words(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Embeddings of prompts."""
    length = max_tokens(pipe)
    with torch.no_grad():
        rows = [
            pipe.encode_prompt(p, None, device=device_of(pipe), max_sequence_length=length)[:2]
            for p in prompts
        ]
    embeds, pooled = (torch.cat(x) for x in zip(*rows, strict=True))
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
