"""Parameters of a norm, wherever offloading keeps them."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_parameters(norm: torch.nn.Module, x: Tensor) -> tuple[Tensor | None, float] | None:
    """Weight and eps of an RMSNorm over the last dim of x that is nothing but that; None if it has
    to be called: another module, hooks (offloading), a weight elsewhere or of another dtype."""
    if type(norm) is not torch.nn.RMSNorm or norm.normalized_shape != x.shape[-1:]:
        return None
    hooks = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    weight = norm.weight
    strange = weight is not None and (weight.device != x.device or weight.dtype != x.dtype)
    if hooks or strange or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return weight, torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def parameters(norm: torch.nn.GroupNorm, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a GroupNorm, wherever offloading keeps them.

    Sequential offloading leaves placeholders outside the module's own forward; then the module is
    asked: on the input (1, -1) per channel, mean 0 and variance 1, it answers bias ± weight /
    sqrt(1 + eps).
    """
    weight, bias = norm.weight, norm.bias
    if weight is not None and weight.is_meta:
        probe = torch.tensor([1.0, -1.0], dtype=like.dtype, device=like.device)
        up, down = norm.forward(probe.expand(1, norm.num_channels, 2))[0].double().unbind(-1)
        return (up - down) * (0.5 * (1 + norm.eps) ** 0.5), (up + down) * 0.5
    return tuple(None if p is None else p.to(like.device) for p in (weight, bias))  # type: ignore[return-value]
