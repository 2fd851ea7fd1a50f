"""Joint attention processors for diffusers' `FluxAttention`: double and single blocks, with and
without loaded IP-Adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor
from torch.nn import functional as F

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.methods import Layer
from styleattn.methods._base import Number, off
from styleattn.methods._joint import Features, QKNorm, Rotary, Tokens, attend, plain_parts
from styleattn.norms import fused

from ._attention import STATE, watched
from ._cross import Entry, SharesLoaded
from ._flux_prompts import added_images, loaded_weight, not_sharded
from ._norms import rms_parameters
from .dispatch import per_key

if TYPE_CHECKING:
    from ._flux_controller import FluxController

REPLACEABLE: tuple[type, ...] = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
"""Processors that compute FLUX's own attention: what a style may stand in for."""


@dataclass
class JointSite:
    """What the controller knows of one joint attention layer.

    Args:
        controller: the one that styles the model.
        layer: its name and place among the joint attention layers.
        entries: the methods that work on it, in order.
        base: the processor that would be here without us.
        note: why the layer fell back last time, or "".
    """

    controller: FluxController
    layer: Layer
    entries: list[Entry]
    base: Any
    note: str = ""
    kept: dict[Any, Any] = field(default_factory=dict)

    replaceable = REPLACEABLE

    @property
    def methods(self) -> tuple[int, ...]:
        """The positions of the methods here."""
        return tuple(e.method for e in self.entries)

    def processor(self, base: Any) -> Any:
        """What stands in for a processor."""
        loaded = isinstance(base, FluxIPAdapterAttnProcessor)
        return FluxStyleIPAdapterProcessor(base) if loaded else FluxStyleProcessor(base)


class _Chosen:
    """What diffusers writes on processors belongs to the one that it would write on without us."""

    base: Any

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.base, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self._stood_in_for()._attention_backend = value

    def _stood_in_for(self) -> Any:
        if self.base is None:
            self.base = FluxAttnProcessor()
        return self.base

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.base, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self._stood_in_for()._parallel_config = value


class FluxStyleProcessor(_Chosen, FluxAttnProcessor):
    """Joint attention under methods; the processor it stands in for where none is at work.

    Constructed without arguments (as diffusers does when an adapter is loaded or unloaded) it finds
    its state on the attention module.
    """

    def __init__(self, base: Any = None):
        self.base = base

    def __deepcopy__(self, memo: dict[int, Any]) -> FluxStyleProcessor:
        return FluxStyleProcessor(memo.get(id(self.base), self.base))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        site: JointSite | None = getattr(attn, STATE, None)
        if site is None or not at_work(site):
            base = self.base or (site.base if site is not None else None) or FluxAttnProcessor()
            return base(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        tokens = runs_of(
            site, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return joint(site, attn, tokens, encoder_hidden_states)


class FluxStyleIPAdapterProcessor(_Chosen, SharesLoaded, FluxIPAdapterAttnProcessor):
    """The same where diffusers has loaded IP-Adapters; here their masks are honoured.

    A subclass, because diffusers asks for one.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        ip_hidden_states: Sequence[Tensor] | None = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        site: JointSite | None = getattr(attn, STATE, None)
        text, works = encoder_hidden_states, site is not None and at_work(site)
        if text is None or ip_hidden_states is None:
            raise ValueError(
                "an IP-Adapter is loaded, so the call needs ip_adapter_image (or"
                " ip_adapter_image_embeds)"
            )
        if site is None or not (works or (ip_adapter_masks is not None and site.controller.now)):
            return self.base(
                attn, hidden_states, text, attention_mask, image_rotary_emb, ip_hidden_states
            )
        tokens = runs_of(site, attn, hidden_states, text, attention_mask, image_rotary_emb)
        image, context, *more = joint(site, attn, tokens, text)
        added = image_prompts(site, self.base, attn, tokens, ip_hidden_states, ip_adapter_masks)
        added = torch.zeros_like(image) if added is None else added.to(image.dtype)
        return image, context, sum(more, added)


OURS = (FluxStyleProcessor, FluxStyleIPAdapterProcessor)


def at_work(site: JointSite) -> bool:
    """Whether a method works on the layer now; if not it is left as it was, bit for bit."""
    if not site.controller.works(site) or watched(site):
        return False
    parallel = getattr(site.base, "_parallel_config", None)
    if parallel is not None:
        raise RuntimeError(
            f"{site.layer.name}: context parallelism splits the tokens that a style has to see"
            " together; disable it, or the style (handle.paused())"
        )
    return True


def runs_of(
    site: JointSite,
    attn: Any,
    hidden_states: Tensor,
    text: Tensor | None,
    attention_mask: Tensor | None,
    rotary: Rotary | None,
) -> dict[str, Tokens]:
    """The layer's tokens by run: normalised queries, keys and values, positions, biases.

    Calls the projection modules and never reads their weights: LoRA, quantised and offloaded layers
    stay in use. The number of heads is what the projections give: fewer where they are sharded.
    """
    backend = site.controller.backend
    image = [_heads(attn, t) for t in _projected(attn, hidden_states, "to_qkv", "to_q to_k to_v")]
    streams = [_normed((attn.norm_q, attn.norm_k), image, backend)]
    if text is not None:
        names = "add_q_proj add_k_proj add_v_proj"
        added = [_heads(attn, t) for t in _projected(attn, text, "to_added_qkv", names)]
        norms = (attn.norm_added_q, attn.norm_added_k)
        streams = [_normed(norms, added, backend), *streams]
    lengths = site.controller.runs()
    total = sum(s.value.shape[2] for s in streams)
    if sum(lengths.values()) != total:
        raise RuntimeError(
            f"{site.layer.name}: {total} tokens, the denoiser was called with"
            f" {' + '.join(f'{n} {name}' for name, n in lengths.items())}"
        )
    bias = _bias(site, attention_mask, streams[0].value, total)
    found, start, offset, queue = {}, 0, 0, list(streams)
    for name, length in lengths.items():
        stream = queue[0]
        here = slice(start, start + length)
        place = None if rotary is None else (rotary[0][here], rotary[1][here])
        mine = None if bias is None else bias[..., here]
        part = slice(offset, offset + length)
        query, key = (replace(f, x=f.x[:, :, part]) for f in (stream.queries, stream.keys))
        found[name] = Tokens(name, query, key, stream.value[:, :, part], place, mine)
        start, offset = start + length, offset + length
        if offset == stream.value.shape[2] and len(queue) > 1:
            queue.pop(0)
            offset = 0
    return found


class _Stream(NamedTuple):
    """What one set of projections makes: all image tokens, or all text tokens."""

    queries: Features
    keys: Features
    value: Tensor


def _normed(norms: tuple[Any, Any], projected: Sequence[Tensor], backend: str | None) -> _Stream:
    """Normalised by the modules; where kernels compute, by the pass that rotates."""

    def features(norm: Any, x: Tensor) -> Features:
        parts = rms_parameters(norm, x) if fused(x, backend) else None
        return Features(norm(x)) if parts is None else Features(x, QKNorm(*parts, backend))

    query, key, value = projected
    return _Stream(features(norms[0], query), features(norms[1], key), value)


def _projected(attn: Any, x: Tensor, fused: str, names: str) -> Sequence[Tensor]:
    if attn.fused_projections and hasattr(attn, fused):
        parts: Sequence[Tensor] = getattr(attn, fused)(x).chunk(3, dim=-1)
        return parts
    return [getattr(attn, name)(x) for name in names.split()]


def _heads(attn: Any, x: Tensor) -> Tensor:
    """[B, N, H * D] as [B, H, N, D]; the head count follows from the width."""
    return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)


def _bias(site: JointSite, mask: Tensor | None, query: Tensor, total: int) -> Tensor | None:
    """The host's attention mask as a bias per key, [N] or [B, N].

    Raises:
        ValueError: a mask per query or head.
    """
    like = query[:, :, :1].expand(-1, -1, total, -1)
    bias, reasons = per_key(mask, like, like)
    if reasons:
        raise ValueError(f"{site.layer.name}: attention_mask: " + "; ".join(reasons))
    return bias


def joint(site: JointSite, attn: Any, tokens: Mapping[str, Tokens], text: Tensor | None) -> Any:
    """The layer's output: (image, text) of a double block and, where there is any, what images add
    after its MLP; one sequence of a single block."""
    controller = site.controller
    parts: Mapping[str, Any] = plain_parts(tokens)
    for method, call in controller.joint_calls(site, tokens):
        parts = method.joint_attention(call, parts)
    out = attend(parts, controller.backend)
    if text is None:
        added = added_images(controller, site, tokens, list(tokens), inside=True)
        return _flat(out if added is None else out + added)
    length = text.shape[1]
    context, image = out[:, :, :length], out[:, :, length:]
    names = [name for name in ("image", "reference") if name in tokens]
    added = added_images(controller, site, tokens, names, inside=True)
    image = _flat(image if added is None else image + added)
    image = attn.to_out[1](attn.to_out[0](image.contiguous()))
    found = (image, attn.to_add_out(_flat(context).contiguous()))
    added = added_images(controller, site, tokens, names, inside=False)
    return found if added is None else (*found, _flat(added).to(image.dtype))


def _flat(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def image_prompts(
    site: JointSite,
    processor: Any,
    attn: Any,
    tokens: Mapping[str, Tokens],
    images: Sequence[Tensor],
    masks: Any,
) -> Tensor | None:
    """What loaded IP-Adapters add to the image tokens [B, N, H * D]; None if nothing.

        out = sum_n scale_n mask_n Attn(Q before rotation, K_n, V_n)

    Raises:
        ValueError: masks that do not fit the adapters.

    Source: XLabs-AI/x-flux, double-stream IP-Adapter processors.
    """
    given = _masks(masks, len(processor.scale))
    if len(images) != len(processor.scale):
        raise ValueError(f"{len(images)} image prompts for {len(processor.scale)} IP-Adapters")
    streams = [tokens[name] for name in ("image", "reference") if name in tokens]
    own = [t.query for t in streams]
    query = own[0] if len(own) == 1 else torch.cat(own, 2)
    branches, factor = [], loaded_weight(site.controller, site, tokens)
    for n, (image, scale, mask) in enumerate(zip(images, processor.scale, given, strict=True)):
        if off(scale) or off(factor):
            continue
        key = _heads(attn, processor.to_k_ip[n](image).flatten(1, -2)).to(query.dtype)
        value = _heads(attn, processor.to_v_ip[n](image).flatten(1, -2)).to(query.dtype)
        not_sharded(site, key, query)
        weight: Number = scale * factor
        if mask is not None:
            share = site.controller.share(mask, query.device)
            share = F.pad(
                share, (0, query.shape[2] - share.shape[0])
            )  # none for a picture in context
            weight = (share * weight).expand(query.shape[0], -1)
        branches.append(Branch((Segment(key, value),), weight))
    if not branches:
        return None
    out = attention(query, tuple(branches), backend=site.controller.backend)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)


def _masks(masks: Any, count: int) -> list[Tensor | None]:
    """One mask [h, w] per adapter, or none.

    Raises:
        ValueError: anything else than one picture's mask per adapter.
    """
    if masks is None:
        return [None] * count
    found: list[Any] = list(masks)
    if len(found) != count:
        raise ValueError(f"{len(found)} ip_adapter_masks for {count} IP-Adapters")
    for mask in found:
        if not isinstance(mask, Tensor) or mask.ndim < 2 or mask[..., 0, 0].numel() != 1:
            got = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"ip_adapter_masks must be one mask [1, h, w] per adapter, got {got}")
    return [mask.reshape(mask.shape[-2:]) for mask in found]
