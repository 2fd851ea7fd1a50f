"""Prompts to embeddings in CLIP's space of images and texts."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def text_embedding(method: Any, prompt: str, pipe: Any, width: int | None) -> Tensor:
    """The projected embedding [width] of a prompt, not normalised.

    Args:
        method: for its `text_encoder` ((model, tokenizer), or a folder with both), and for
            messages.
        pipe: the pipeline, whose text encoders are tried; or None.
        width: of the image embeddings; None takes the first that has a projection.

    Raises:
        ValueError: no text encoder of that width; says which there are.
    """
    pairs = _pairs(method, pipe)
    for model, tokenizer in pairs:
        found = _width(model)
        if found is not None and width in (None, found):
            return _encode(model, tokenizer, prompt, pipe)
    there = ", ".join(f"{type(m).__name__} of width {_width(m)}" for m, _ in pairs) or "none"
    raise ValueError(
        f"{method.name}: the prompt of negative_content needs the text half of the images' CLIP,"
        f" with projection, of width {width}; there are {there}: give the method"
        " `text_encoder` ((model, tokenizer) or their folder), or negative_content as an embedding"
    )


def _pairs(method: Any, pipe: Any) -> list[tuple[Any, Any]]:
    given = getattr(method, "text_encoder", None)
    if isinstance(given, (str, os.PathLike)):
        return [_read(os.path.realpath(given), method.name)]
    if given is not None:
        return [given]
    names = (("text_encoder_2", "tokenizer_2"), ("text_encoder", "tokenizer"))
    pairs = [tuple(getattr(pipe, name, None) for name in pair) for pair in names]
    return [(model, tokenizer) for model, tokenizer in pairs if model is not None]


def _read(folder: str, name: str) -> tuple[Any, Any]:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    try:
        model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True)
        return model.eval(), CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: text_encoder: {folder}: {error}") from error


def _width(model: Any) -> int | None:
    """Of the projected embedding; None without a projection."""
    has = getattr(model, "text_projection", None) is not None
    return int(model.config.projection_dim) if has else None


def _encode(model: Any, tokenizer: Any, prompt: str, pipe: Any) -> Tensor:
    ids = tokenizer(
        prompt,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    weight = next(model.parameters())
    device = getattr(pipe, "_execution_device", None) if weight.is_meta else weight.device
    with torch.no_grad():
        embeds: Tensor = model(ids.to(device)).text_embeds[0]
    return embeds.float().cpu()
