"""Which FLUX transformer a bank was made with."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPE = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "guidance_embeds",
)
"""What of a model's configuration tells one from another."""
_EMBEDDERS = ("x_embedder", "context_embedder", "proj_out")
_VALUES = 64
_NEAR = 0.01
"""Far more than a change of dtype makes (2^-9 in bfloat16)."""


def network_facts(model: Any) -> dict[str, Any]:
    """A model's shape and a few of its numbers, JSON-ready.

    The numbers are weights of norms and biases of embedders: those stay what they are under LoRA,
    fused projections, quantised linears and casts. None where offloading keeps them elsewhere.
    """
    known = torch.cat([*_numbers(model), torch.zeros(0)])
    values = None
    if bool(torch.isfinite(known).all()) and known.numel() and not _on_disk(model):
        stride = max(1, known.numel() // _VALUES)
        chosen = known[::stride][:_VALUES].numpy().astype("<f4")
        values = base64.b64encode(chosen.tobytes()).decode()
    config = {name: getattr(model.config, name) for name in SHAPE}
    return {"config": config, "values": values}


def against_network(model: Any, told: Mapping[str, Any]) -> list[str]:
    """Why what was made with one model is not for another; [] for what a file does not tell."""
    mine, theirs = network_facts(model), dict(told.get("config") or {})
    reasons = [
        f"it was made with {name} {value!r}, this model has {mine['config'][name]!r}"
        for name, value in theirs.items()
        if name in SHAPE and mine["config"][name] != value
    ]
    if reasons or None in (mine["values"], told.get("values")):
        return reasons
    a, b = (np.frombuffer(base64.b64decode(x), "<f4") for x in (mine["values"], told["values"]))
    if a.shape != b.shape or np.linalg.norm(a - b) > _NEAR * np.linalg.norm(b):
        reasons.append("it was made with other weights")
    return reasons


def _on_disk(model: Any) -> bool:
    """Whether diffusers offloads to files: parameters then hold uninitialised memory."""
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        group = getattr(hooks.get("group_offloading"), "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            return True
    return False


def _numbers(model: Any) -> Iterator[Tensor]:
    """Those that every host of the model leaves alone, in fp32 on the CPU; NaN for absent ones."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    found = [norm.weight for b in blocks for norm in (b.attn.norm_q, b.attn.norm_k)]
    for name in _EMBEDDERS:
        module = getattr(model, name)
        found.append(getattr(module, "base_layer", module).bias)
    for x in found:
        if x is not None:
            kept = not x.is_meta and x.is_floating_point() and x.element_size() > 1  # fp8 is cast
            yield x.detach().float().cpu().flatten() if kept else torch.full((1,), torch.nan)
