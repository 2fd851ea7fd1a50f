"""A self-attention processor for diffusers' `Attention` modules, and the steps that every processor
shares."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models import attention_processor as host
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from styleattn.methods import Layer, SelfCall

if TYPE_CHECKING:
    from ._controller import Controller

STATE = "_styleattn"
"""Attribute of an `Attention` module that holds its `Site`: outlives processors that are made
anew."""

CONTROLLER = "_styleattn_controller"
"""Attribute of a styled model that holds its `Controller`."""

SCALED = tuple(
    getattr(host, name)
    for name in ("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")
    if hasattr(host, name)
)
FUSED: tuple[type, ...] = (host.FusedAttnProcessor2_0,)
PERTURBED = tuple(
    getattr(host, name)
    for name in ("PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0")
    if hasattr(host, name)
)
PLAIN = (AttnProcessor2_0, *SCALED, *FUSED)
"""Processors that compute ordinary attention: what a style method may stand in for."""
REPLACEABLE = (*PLAIN, *PERTURBED)


@dataclass
class Site:
    """What the controller knows of one self-attention layer.

    Args:
        controller: the one that styles the model.
        layer: its name and place.
        method: which of the controller's methods takes it.
        gate: the method's weight here; weights: those of its references.
        base: the processor that would be here without us.
        note: why the layer fell back last time, or "".
    """

    controller: Controller
    layer: Layer
    method: int
    gate: float
    weights: tuple[float, ...]
    base: Any
    note: str = ""

    replaceable = REPLACEABLE

    @property
    def methods(self) -> tuple[int, ...]:
        """The position of the method here."""
        return (self.method,)

    def processor(self, base: Any) -> StyleAttnProcessor:
        """What stands in for a processor."""
        return StyleAttnProcessor(base)


class StyleAttnProcessor:
    """Self-attention under a style method; the processor it stands in for where no method is at
    work.

    Constructed without arguments (as diffusers does when an adapter is loaded or unloaded) it finds
    its state on the attention module.
    """

    def __init__(self, base: Any = None):
        self.base = base

    def __deepcopy__(self, memo: dict[int, Any]) -> StyleAttnProcessor:
        """A processor that stands in for the same one: dictionaries of processors are copied to be
        put back later."""
        return StyleAttnProcessor(memo.get(id(self.base), self.base))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        site: Site | None = getattr(attn, STATE, None)
        base = self.base or (site.base if site is not None else None) or AttnProcessor2_0()
        call = None
        if site is not None and encoder_hidden_states is None and not watched(site):
            call = site.controller.call_of(site)
        if site is None or call is None:
            return base(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        projected, query, key, value = project(attn, hidden_states, temb, isinstance(base, FUSED))
        method, rows, strengths, gate, numbers, masks = call
        if rows.chunks * rows.count != query.shape[0]:
            raise RuntimeError(
                f"{site.layer.name}: {query.shape[0]} rows, the denoiser was called with"
                f" {rows.chunks} x {rows.count}"
            )
        out = method.self_attention(
            SelfCall(
                query,
                key,
                value,
                rows,
                strengths,
                gate,
                numbers,
                tuple(site.controller.mask_bias(m, query.shape[2]) for m in masks),
                key_bias(site.layer.name, attention_mask, key),
                float(attn.scale) if isinstance(base, SCALED) else None,
                site.controller.backend,
                site.controller.features(site.layer.name, query),
            )
        )
        if isinstance(base, PERTURBED):
            out = torch.cat([out[: -rows.count], value[-rows.count :]])
        return finish(attn, out, projected, hidden_states)


def sequence(attn: Attention, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """The tokens [B, N, C] that enter a layer, after the norms that belong to it."""
    x = hidden_states
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    return x


def heads(attn: Attention, x: Tensor) -> Tensor:
    """[B, N, H * D] as [B, H, N, D]."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def project(
    attn: Attention, hidden_states: Tensor, temb: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequence that enters a self-attention layer and its query, key, value [B, H, N, D].

    Calls the projection modules and never reads their weights: LoRA, quantised and offloaded layers
    stay in use.
    """
    x = sequence(attn, hidden_states, temb)
    parts = attn.to_qkv(x).chunk(3, dim=-1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    query, key, value = (heads(attn, t) for t in parts)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return x, query, key, value


def finish(attn: Attention, out: Tensor, projected: Tensor, hidden_states: Tensor) -> Tensor:
    """Output projection, shape, residual and scale of a layer whose attention is `out` [B, H, N,
    D]."""
    x = out.transpose(1, 2).flatten(2).to(projected.dtype)
    x = attn.to_out[1](attn.to_out[0](x))
    if hidden_states.ndim == 4:
        x = x.transpose(-1, -2).reshape(hidden_states.shape)
    if attn.residual_connection:
        x = x + hidden_states
    return x / attn.rescale_output_factor


def key_bias(name: str, attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """diffusers' additive attention mask as a bias per key, [B, N].

    Raises:
        ValueError: a mask per query or per head, or of another length.
    """
    if attention_mask is None:
        return None
    batch, _, length, _ = key.shape
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, 1, length), (1, 1, length)):
        raise ValueError(
            f"{name}: attention_mask must be [{batch}, 1, {length}] (one bias per key), got"
            f" {list(shape)}; a shared"
            " self-attention cannot take it"
        )
    return attention_mask[:, 0].expand(batch, length)


def watched(site: Any) -> bool:
    """Whether someone listens for `F.scaled_dot_product_attention` (perturbed-attention guiders
    do): they must hear
    it, so the layer falls back."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    names = [type(m).__name__ for m in modes if type(m).__module__ != "torch.utils._device"]
    if not names:
        return False
    if not site.note:
        site.note = f"plain attention while {names[-1]} is active"
        if not site.controller.warned:
            site.controller.warned = True
            warnings.warn(
                f"styleattn: {names[-1]} intercepts scaled_dot_product_attention; the layers it"
                " watches run the"
                " processor they had, without the style",
                stacklevel=2,
            )
    return True


def _register_metadata() -> None:
    """Tell diffusers' layer skipping what skipping our processor returns: as for its own."""
    try:
        from diffusers.hooks import _helpers as helpers

        registry = helpers.AttentionProcessorRegistry
        registry.register(StyleAttnProcessor, registry.get(AttnProcessor2_0))
    except (
        ImportError,
        AttributeError,
        ValueError,
    ):  # diffusers < 0.35 has none; a later one may move it
        return


_register_metadata()
