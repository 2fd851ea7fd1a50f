"""Pictures that run through FLUX on their own: what they are to every layer, and the LoRA that is
at work on them alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.methods._joint import Rotary, rotated

from ._controller import _put
from ._flux_attention import _heads, _projected

Pair = tuple[Tensor, Tensor]
"""Keys and values [1 or B, H, M, D] of a picture at a layer, rotated."""


@torch.no_grad()
def recorded(
    module: Any,
    layers: Mapping[str, Any],
    picture: tuple[Tensor, Tensor],
    inputs: Mapping[str, Any],
    lora: str | None,
    backend: str | None,
    told: float | None = None,
) -> dict[str, Pair]:
    """Keys and values of a picture in every layer: the model run on it alone, without text, at the
    noise level 0.

    Args:
        module, layers: the transformer and its joint attention by name.
        picture: its tokens [M, C] and their positions [M, 3].
        inputs: the running call's; what the model is told besides (pooled prompts, guidance) is the
            same, in one row where that is the same for all.
        lora: the LoRA that is at work on it.
        told: the guidance scale that it is told; None for the call's.

    Raises:
        RuntimeError: a cache of blocks, which would take it for a step.
    """
    if getattr(module, "is_cache_enabled", False):
        raise RuntimeError(
            "styleattn: pictures that run on their own do not go with caches of blocks; call"
            " transformer.disable_cache()"
        )
    tokens, ids = picture
    hidden, pooled = inputs["hidden_states"], inputs["pooled_projections"]
    given, text = inputs.get("guidance"), inputs["encoder_hidden_states"]
    guidance = given if told is None or given is None else torch.full_like(given, told)
    alike = all(bool((x == x[:1]).all()) for x in (pooled, guidance) if x is not None)
    rows = 1 if alike else len(pooled)
    found: dict[str, Pair] = {}
    before = [(attn, attn.processor) for attn in layers.values()]
    try:
        for name, attn in layers.items():
            _put(attn, _Recorder(name, found, backend))
        # once per run: not worth a graph for every layer's recorder
        with only(module, lora), torch.compiler.set_stance("force_eager"):
            module.forward(
                hidden_states=tokens.to(hidden).expand(rows, -1, -1),
                encoder_hidden_states=text.new_zeros(rows, 0, text.shape[-1]),
                pooled_projections=pooled[:rows],
                timestep=torch.zeros(rows, device=hidden.device, dtype=hidden.dtype),
                guidance=None if guidance is None else guidance[:rows],
                img_ids=ids,
                txt_ids=ids[:0],
                return_dict=False,
            )
    finally:
        for attn, processor in before:
            _put(attn, processor)
    return found


class _Recorder:
    """Plain self-attention of a picture's tokens, which notes its keys and values."""

    def __init__(self, name: str, found: dict[str, Pair], backend: str | None):
        self.name, self.found, self.backend = name, found, backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        parts = _projected(attn, hidden_states, "to_qkv", "to_q to_k to_v")
        query, key, value = (_heads(attn, t) for t in parts)
        query = rotated(attn.norm_q(query), image_rotary_emb)
        key = rotated(attn.norm_k(key), image_rotary_emb)
        self.found[self.name] = key, value
        out = attention(query, (Branch((Segment(key, value),)),), backend=self.backend)
        assert isinstance(out, Tensor)
        flat = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return flat
        return attn.to_out[1](attn.to_out[0](flat.contiguous())), encoder_hidden_states


def tuned(model: Any, name: str) -> list[Any]:
    """The modules that have a LoRA of the name."""
    return [m for m in model.modules() if name in getattr(m, "lora_A", ())]


def without(modules: Sequence[Any], name: str) -> tuple[tuple[Any, Any], ...]:
    """Take a LoRA out of work in modules; what was at work in each."""
    found = tuple((module, module._active_adapter) for module in modules)
    for module in modules:
        module._active_adapter = [a for a in module.active_adapters if a != name]
    return found


def restore(before: Sequence[tuple[Any, Any]]) -> None:
    """Put back what `without` found."""
    for module, active in before:
        module._active_adapter = active


@contextmanager
def only(model: Any, name: str | None) -> Iterator[None]:
    """Within: the LoRA of a name is at work too."""
    modules = [] if name is None else tuned(model, name)
    before = [(m, m._active_adapter, m._disable_adapters) for m in modules]
    try:
        for module, _, disabled in before:
            others = [] if disabled else [a for a in module.active_adapters if a != name]
            module._active_adapter, module._disable_adapters = [*others, name], False
        yield
    finally:
        for module, active, disabled in before:
            module._active_adapter, module._disable_adapters = active, disabled
