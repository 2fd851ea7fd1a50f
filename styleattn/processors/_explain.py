"""What runs where, and why: a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from styleattn.backends import PREFERENCE, reasons_against, resolve

from ._attention import CONTROLLER, STATE


@dataclass(frozen=True)
class LayerReport:
    """One row: a layer, the method on it ("" for none), its processor, the backend, and why it is
    so."""

    layer: str
    method: str
    processor: str
    backend: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """Every attention layer of a model, and its shared norms. `rows` for programs, `str` for
    people."""

    model: str
    rows: tuple[LayerReport, ...]

    def __str__(self) -> str:
        head = ("layer", "method", "processor", "backend", "why")
        lines = [head, *((r.layer, r.method, r.processor, r.backend, r.why) for r in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        styled = sum(bool(r.method) for r in self.rows)
        return f"{self.model}: {styled} of {len(self.rows)} layers styled\n{table}"


def explanation(model: Any) -> Explanation:
    """The table of one denoiser."""
    controller = model.__dict__.get(CONTROLLER)
    rows = []
    further = () if controller is None else controller.companions
    for part, owner in ((model, controller), *further):
        prefix = "" if part is model else "controlnet."
        for key in part.attn_processors:
            name = key.removesuffix(".processor")
            rows.append(_attention_row(prefix + name, part.get_submodule(name), owner))
    for _, place in getattr(controller, "places", ()):
        weight, heads = place.part.to_q.weight, place.part.heads
        backend, why = _backend_of(weight, heads, weight.shape[0] // heads, controller.backend)
        title = controller.methods[place.entry.method].name
        rows.append(LayerReport(place.layer.name, title, "block hook", backend, why))
    norms = {} if controller is None else controller.norms
    for norm_name, entry in norms.values():
        title = controller.methods[entry.method].name
        rows.append(
            LayerReport(
                norm_name, title, "GroupNorm", "torch", "statistics shared with the references"
            )
        )
    return Explanation(type(model).__name__, tuple(rows))


def _attention_row(name: str, attn: Any, controller: Any) -> LayerReport:
    processor = type(attn.processor).__name__
    site = getattr(attn, STATE, None)
    if site is None:
        cross = getattr(attn, "is_cross_attention", None)
        kind = {None: "joint attention", True: "cross-attention"}.get(cross, "self-attention")
        why = kind if controller is None else f"{kind}, not chosen by any method"
        return LayerReport(name, "", processor, "", why)
    method = " + ".join(controller.methods[i].name for i in site.methods)
    if type(attn.processor) not in controller.ours:
        return LayerReport(
            name,
            "",
            processor,
            "",
            site.note or f"replaced by {processor}; the next call puts it back",
        )
    backend, why = _backend(attn, controller.backend)
    if _without_images(site, controller):
        why = "no adapter is loaded in the pipeline and the method has none: nothing is added"
    return LayerReport(name, method, processor, backend, site.note or why)


def _without_images(site: Any, controller: Any) -> bool:
    """Whether all that a layer would show are images of an adapter that is not loaded."""
    own = ((controller.methods[i], controller.references[i]) for i in site.methods)
    idle = all(getattr(m, "adapter", m) is None and not shown for m, shown in own)
    return idle and not isinstance(site.base, controller.loaded)


def _backend(attn: Any, asked: str | None) -> tuple[str, str]:
    """The backend that will run a layer, and why it is that one."""
    weight = next(attn.parameters(), None)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return (
            asked or "by device",
            "parameters are offloaded or quantised" if asked is None else "asked for",
        )
    width = (attn.inner_dim if hasattr(attn, "inner_dim") else weight.shape[0]) // attn.heads
    return _backend_of(weight, attn.heads, width, asked)


def _backend_of(weight: Tensor, heads: int, width: int, asked: str | None) -> tuple[str, str]:
    """The same for heads of a width, by the weights that make them."""
    dtype = weight.dtype if weight.element_size() > 1 else torch.float32
    probe = torch.empty(1, heads, 16, width, device=weight.device, dtype=dtype)
    try:
        chosen = resolve("explain", probe, (), asked)
    except ValueError as error:
        return asked or "none", str(error)
    against = [
        f"{name}: {'; '.join(reasons)}"
        for name in PREFERENCE.get(probe.device.type, ())
        if name != chosen and (reasons := reasons_against(name, probe, ()))
    ]
    return chosen, "asked for" if asked else "; ".join(against) or "the first that can run"
