"""Pictures in the sequence at the noise level 0, under a LoRA of their own: the last tokens of the
image's stream are modulated and projected in their own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._flux_apart import only, tuned

_TEXT = ("add_", "_context", "context_")
"""What stands in the names of modules that only text goes through."""


class Clean:
    """Hooks on a transformer's norms, and on the layers that a LoRA tunes.

    Args:
        guidance: that is told for the pictures; None for the call's.
        lora: the LoRA that is at work on them alone, or None.
    """

    def __init__(self, guidance: float | None, lora: str | None):
        self.guidance, self.lora = guidance, lora
        self.told: Tensor | None = None
        self.count = 0

    def install(self, model: Any) -> list[Any]:
        """Hook the model; the handles."""
        handles = [
            norm.register_forward_hook(self.modulated, with_kwargs=True)
            for norm in (
                *(block.norm1 for block in model.transformer_blocks),
                *(block.norm for block in model.single_transformer_blocks),
            )
        ]
        if self.lora is not None:
            text = {m for n, m in model.named_modules() if any(word in n for word in _TEXT)}
            mine = [m for m in tuned(model, self.lora) if m not in text]
            handles += [m.register_forward_hook(self.projected) for m in mine]
        return handles

    def begin(self, model: Any, inputs: Mapping[str, Any], spans: Sequence[Any]) -> None:
        """What the pictures of a call are told: the level 0, a guidance, the prompts' vector."""
        self.count = sum(s.stop - s.start for s in spans)
        if not self.count:
            self.told = None
            return
        pooled, guidance = inputs["pooled_projections"], inputs.get("guidance")
        like = inputs["hidden_states"]
        told = [torch.zeros(len(like), device=like.device, dtype=like.dtype)]
        if guidance is not None:
            scale = guidance if self.guidance is None else torch.full_like(guidance, self.guidance)
            told.append(scale.to(like.dtype) * 1000)
        self.told = model.time_text_embed(*told, pooled)

    def end(self) -> None:
        """No call is running."""
        self.told, self.count = None, 0

    def modulated(self, norm: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of an adaptive norm: the pictures' tokens by what they are told, and its
        shifts, scales and gates per token."""
        if self.told is None:
            return None
        x = args[0] if args else kwargs["x"]
        with only(norm, self.lora):
            mine = norm.forward(x[:, -self.count :], emb=self.told)
        rest = x.shape[1] - self.count
        both = zip(output[1:], mine[1:], strict=True)
        numbers = (_PerToken(a, b, rest, self.count) for a, b in both)
        return torch.cat([output[0][:, :rest], mine[0]], 1), *numbers

    def projected(self, layer: Any, args: Any, output: Tensor) -> Any:
        """Forward hook of a layer that the LoRA tunes."""
        x = args[0]
        if self.told is None or x.ndim != 3:
            return None
        with only(layer, self.lora):
            mine = layer.forward(x[:, -self.count :])
        return torch.cat([output[:, : -self.count], mine], 1)


class _PerToken:
    """Numbers [B, C] of an adaptive norm, others for the last tokens: what a block makes of them by
    `unsqueeze(1)` or `[:, None]` is [B, N, C]."""

    def __init__(self, own: Tensor, last: Tensor, rest: int, count: int):
        self._parts = ((own, rest), (last, count))

    def unsqueeze(self, dim: int) -> Tensor:
        return torch.cat([x[:, None].expand(-1, n, -1) for x, n in self._parts], 1)

    def __getitem__(self, index: Any) -> Tensor:
        return self.unsqueeze(1)
