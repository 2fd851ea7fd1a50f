"""Panels of a canvas within the FLUX transformer: their tokens side by side, and back in place
behind it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion import HostUnsupported
from styleattn.methods._joint import PanelMethod

from ._flux_rows import RESIDUALS


@dataclass(frozen=True)
class Panels:
    """The order of the image tokens within the transformer. FLUX knows them by their positions, not
    by their order, so that nothing but rounding changes.

    Args:
        first: tokens of the first panel.
        order: [N] where each token stood, or None where they stay as they are.
        inverse: [N] the way back.
    """

    first: int
    order: Tensor | None = None
    inverse: Tensor | None = None

    def arranged(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A transformer call with its image tokens in order, with all that belongs to them:
        positions, ControlNet residuals, and a mask of the keys."""
        order, changed = self.order, dict(inputs)
        if order is None:
            return changed
        for name, dim in (("hidden_states", 1), ("img_ids", -2)):
            changed[name] = inputs[name].index_select(dim, order)
        for name in RESIDUALS:
            if inputs.get(name) is not None:
                given = inputs[name]
                changed[name] = type(given)(x.index_select(1, order) for x in given)
        kwargs = inputs.get("joint_attention_kwargs") or {}
        if kwargs.get("attention_mask") is not None:
            mask = _masked(kwargs["attention_mask"], order)
            changed["joint_attention_kwargs"] = {**kwargs, "attention_mask": mask}
        return changed

    def restored(self, output: Any) -> Any:
        """The transformer's output with its tokens as they came."""
        if self.inverse is None:
            return output
        if isinstance(output, tuple):
            return (output[0].index_select(1, self.inverse), *output[1:])
        return type(output)(sample=output.sample.index_select(1, self.inverse))


def _masked(mask: Tensor, order: Tensor) -> Tensor:
    """A mask [.., S] of the keys, or [.., S, S], whose last places are those of the image."""
    before = torch.arange(mask.shape[-1] - order.shape[0], device=order.device)
    whole = torch.cat([before, before.shape[0] + order]).to(mask.device)
    if mask.ndim > 1 and mask.shape[-2] == mask.shape[-1]:
        mask = mask.index_select(-2, whole)
    return mask.index_select(-1, whole)


class PanelOrder:
    """Which method parts the image, and the order it needs, made once for the positions of a run.

    The order does not depend on the step: what caches keep of one step fits the next.

    Args:
        methods: of the controller.
    """

    def __init__(self, methods: Sequence[Any]):
        parting = [i for i, m in enumerate(methods) if isinstance(m, PanelMethod)]
        self.method = parting[0] if parting else None
        self._known: tuple[Any, int, Panels] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def last(self, entries: Sequence[Any]) -> Sequence[Any]:
        """The methods of a layer, the one that parts the image behind all others."""
        if self.method is None:
            return entries
        return sorted(entries, key=lambda entry: entry.method == self.method)

    def arrange(
        self, methods: Sequence[Any], inputs: dict[str, Any], made: int
    ) -> tuple[dict[str, Any], Panels | None]:
        """A transformer call with the tokens of each panel together, where a method needs that.

        Args:
            inputs: of the call. made: image tokens that are generated; further ones stay behind.

        Raises:
            RuntimeError: within a compiled transformer.
        """
        method = None if self.method is None else methods[self.method]
        if method is None or method.idle:
            return inputs, None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"styleattn: within a compiled transformer the panels of {method.name} are"
                " unknown; compile its blocks (compile_repeated_blocks)"
            )
        ids = inputs["img_ids"]
        if self._known is None or self._known[0]() is not ids or self._known[1] != ids._version:
            panels = _panels(method, ids[0] if ids.ndim == 3 else ids, made)
            self._known = (weakref.ref(ids), ids._version, panels)
        panels = self._known[2]
        return panels.arranged(inputs), panels


def _panels(method: PanelMethod, ids: Tensor, made: int) -> Panels:
    second = method.in_second(ids[:made, 1:].long())
    first = int((~second).sum())
    if not bool(second[:first].any()):  # as it is in rows under rows
        return Panels(first)
    order = torch.argsort(second.to(torch.uint8), stable=True)
    order = torch.cat([order, torch.arange(made, ids.shape[0], device=order.device)])
    return Panels(first, order, torch.argsort(order))


def check_panels(methods: Sequence[Any], model: Any, pipe: Any) -> None:
    """Find out before anything is touched that a method cannot part this model's image.

    Raises:
        HostUnsupported: a model that does not fill; with every reason.
        ValueError: several such methods.
    """
    parting = [m for m in methods if isinstance(m, PanelMethod)]
    if len(parting) > 1:
        names = " and ".join(m.name for m in parting)
        raise ValueError(f"{names} part the image's tokens, each its own way; apply one of them")
    reasons = against_filling(model, pipe) if parting else []
    if reasons:
        raise HostUnsupported(f"{parting[0].name} needs FLUX.1 Fill: {'; '.join(reasons)}")


def against_filling(model: Any, pipe: Any = None) -> list[str]:
    """Why a FLUX transformer, or the pipeline around it, does not paint into a masked picture."""
    reasons = []
    if pipe is not None and "mask_image" not in inspect.signature(type(pipe).__call__).parameters:
        reasons.append(f"a {type(pipe).__name__} takes no masks")
    config = getattr(model, "config", None)
    channels = getattr(config, "in_channels", 0)
    latents = getattr(config, "out_channels", None) or channels
    if channels <= 2 * latents:
        what = "latents and a picture" if channels == 2 * latents else "latents"
        reasons.append(f"its transformer has {channels} channels, for {what} without a mask")
    return reasons
