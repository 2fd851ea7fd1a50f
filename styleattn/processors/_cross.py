"""Cross-attention processors for diffusers' `Attention`: text and all images in one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from diffusers.models import attention_processor as host
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Branch, Segment
from styleattn.methods import Layer
from styleattn.methods._base import Number, off

from ._attention import FUSED, PLAIN, SCALED, STATE, finish, heads, key_bias, sequence, watched
from ._prompts import Prompt, on_grid

if TYPE_CHECKING:
    from ._controller import Controller

S = TypeVar("S", bound="SharesLoaded")

LOADED = tuple(
    getattr(host, name)
    for name in (
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
    )
    if hasattr(host, name)
)
"""Processors of adapters that diffusers loaded: their images are taken into our call."""


@dataclass
class Entry:
    """One method on one cross-attention layer: its position, its gate, its references' weights, and
    whether its images are negatives there."""

    method: int
    gate: float
    weights: tuple[float, ...]
    negative: bool = False


@dataclass
class CrossSite:
    """What the controller knows of one cross-attention layer.

    Args:
        controller: the one that styles the model.
        layer: its name and place among the cross-attention layers.
        entries: the methods that add to it, in order.
        base: the processor that would be here without us.
        note: why the layer fell back last time, or "".
    """

    controller: Controller
    layer: Layer
    entries: list[Entry]
    base: Any
    note: str = ""
    kept: dict[Any, Any] = field(default_factory=dict)

    replaceable = (*PLAIN, *LOADED)

    @property
    def methods(self) -> tuple[int, ...]:
        """The positions of the methods here."""
        return tuple(e.method for e in self.entries)

    def awake(self, entry: Entry, gate: Number) -> bool:
        """Whether a method has something to do here: show its images, or weigh those of loaded
        adapters."""
        if self.controller.methods[entry.method].adapter is None:
            return isinstance(self.base, LOADED)
        return not off(gate)

    def processor(self, base: Any) -> Any:
        """What stands in for a processor."""
        return (
            StyleIPAdapterProcessor(base) if isinstance(base, LOADED) else StyleCrossProcessor(base)
        )

    def key_value(self, prompt: Prompt, like: Tensor, heads_: int) -> tuple[Tensor, Tensor]:
        """[2, H, M, D]: keys and values of an image without and with its content, made once."""
        key = (id(prompt), like.device, like.dtype)
        if key not in self.kept:
            with torch.no_grad():
                pair = prompt.adapter.key_value(self.layer.name, prompt.tokens)
            made = tuple(
                t.to(like.device, like.dtype).unflatten(-1, (heads_, -1)).transpose(1, 2)
                for t in pair
            )
            if torch.compiler.is_compiling():
                return made[0], made[1]
            self.kept[key] = (*made, prompt)
        found = self.kept[key]
        return found[0], found[1]

    def loaded_key_value(
        self, projections: Any, index: int, tokens: Tensor, attn: Attention
    ) -> tuple[Tensor, Tensor]:
        """[B, H, M, D]: keys and values of a loaded adapter's tokens, made once per image: the host
        makes the tokens anew at every step, from embeddings that stay the same."""
        source = self.controller.prompts.source(index)
        found = self.kept.get(("loaded", index))
        if found is not None and source is not None:
            same = found[0] is source and found[1] is projections and found[2] == source._version
            like = (tokens.shape[0], tokens.dtype, tokens.device)
            if same and (found[3].shape[0], found[3].dtype, found[3].device) == like:
                return found[3], found[4]
        flat = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        key = heads(attn, projections.to_k_ip[index](flat))
        value = heads(attn, projections.to_v_ip[index](flat))
        if not (torch.compiler.is_compiling() or source is None or key.requires_grad):
            self.kept["loaded", index] = (source, projections, source._version, key, value)
        return key, value

    def mask_weight(self, mask: Tensor, index: int, image: int, query: Tensor) -> Tensor:
        """[N]: the mask [1, images, h, w] of loaded adapter `index` on this layer's grid, made
        once."""
        key = ("mask", index, image, query.shape[2], query.device)
        found = self.kept.get(key)
        if found is None or found[0] is not mask or found[1] != mask._version:
            found = (mask, mask._version, on_grid(mask[0, image], query.shape[2]).to(query.device))
            if not torch.compiler.is_compiling():
                self.kept[key] = found
        weight: Tensor = found[2]
        return weight


class StyleCrossProcessor:
    """Cross-attention with images; the processor it stands in for where no method is at work.

    Constructed without arguments it finds its state on the attention module.
    """

    def __init__(self, base: Any = None):
        self.base = base

    def __deepcopy__(self, memo: dict[int, Any]) -> StyleCrossProcessor:
        return StyleCrossProcessor(memo.get(id(self.base), self.base))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        site: CrossSite | None = getattr(attn, STATE, None)
        base = self.base or (site.base if site is not None else None) or AttnProcessor2_0()
        if site is None or encoder_hidden_states is None or not _at_work(site):
            return base(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return _cross(
            site, base, attn, hidden_states, encoder_hidden_states, None, attention_mask, temb
        )


class SharesLoaded:
    """A module that stands in for a processor of loaded IP-Adapters: projections and scales are
    those of that processor, not copies.

    Named before diffusers' class, which makes projections of its own.
    """

    SHARED: ClassVar[tuple[str, ...]] = (
        "to_k_ip",
        "to_v_ip",
        "hidden_size",
        "cross_attention_dim",
    )

    base: Any

    def __init__(self, base: Any = None):
        torch.nn.Module.__init__(cast(torch.nn.Module, self))
        object.__setattr__(self, "base", base)
        if base is not None:
            for name in self.SHARED:
                setattr(self, name, getattr(base, name))

    @property
    def scale(self) -> Any:
        """Of the processor it stands in for."""
        return self.base.scale

    @scale.setter
    def scale(self, value: Any) -> None:
        self.base.scale = value

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        return type(self)(memo.get(id(self.base), self.base))


class StyleIPAdapterProcessor(SharesLoaded, IPAdapterAttnProcessor2_0):
    """The same where diffusers has loaded IP-Adapters: theirs and ours in one call.

    A subclass, because `set_ip_adapter_scale` asks for one.
    """

    SHARED = (*SharesLoaded.SHARED, "num_tokens")

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        site: CrossSite | None = getattr(attn, STATE, None)
        if site is None or not isinstance(encoder_hidden_states, tuple) or not _at_work(site):
            return self.base(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                temb,
                scale,
                ip_adapter_masks,
            )
        text, images = encoder_hidden_states
        loaded = _Loaded(self.base, images, ip_adapter_masks)
        return _cross(site, self.base, attn, hidden_states, text, loaded, attention_mask, temb)


OURS = (StyleCrossProcessor, StyleIPAdapterProcessor)


@dataclass(frozen=True)
class _Loaded:
    """The images of adapters that diffusers loaded, as they arrive at a layer."""

    processor: Any
    images: Any
    masks: Any

    def branches(
        self, site: CrossSite, attn: Attention, query: Tensor, factor: Number
    ) -> list[Branch]:
        """One softmax per adapter; with masks one per image. All weights times the factor.

        Raises:
            ValueError: masks that do not fit the adapters and images.
        """
        masks = self._masks()
        now = site.controller.now
        rows = None if now is None else site.controller.prompts.seen(now, query)
        found = []
        for index, (tokens, scale) in enumerate(
            zip(self.images, self.processor.scale, strict=True)
        ):
            scales = scale if isinstance(scale, list) else [scale]
            if all(off(s) for s in scales):
                continue
            key, value = site.loaded_key_value(self.processor, index, tokens, attn)
            key, value = key.to(query.dtype), value.to(query.dtype)
            mask = masks[index]
            if mask is None:
                if len(scales) != 1:
                    raise ValueError(
                        f"{site.layer.name}: {len(scales)} scales for the images of IP-Adapter"
                        f" {index}, and no masks: images without masks share one scale"
                    )
                found.append(Branch((Segment(key, value, rows=rows),), weight=scales[0] * factor))
                continue
            count = tokens.shape[1]
            if mask.ndim != 4 or mask.shape[1] != count or len(scales) not in (1, count):
                raise ValueError(
                    f"{site.layer.name}: IP-Adapter {index} has {count} images, masks"
                    f" {list(mask.shape)} and {len(scales)} scales; masks must be [1, images, h, w]"
                )
            for i in range(count):
                part = slice(i * key.shape[2] // count, (i + 1) * key.shape[2] // count)
                segment = Segment(key[:, :, part], value[:, :, part], rows=rows)
                strength = factor * scales[i % len(scales)]
                weight = site.mask_weight(mask, index, i, query) * strength
                found.append(Branch((segment,), weight=weight.expand(query.shape[0], -1)))
        return found

    def _masks(self) -> list[Any]:
        given, count = self.masks, len(self.processor.scale)
        if given is None:
            return [None] * count
        masks = given if isinstance(given, list) else list(given.unsqueeze(1))
        if len(masks) != count or len(self.images) != count:
            raise ValueError(
                f"ip_adapter_masks: {len(masks)} masks for {count} IP-Adapters and"
                f" {len(self.images)} sets of images"
            )
        return masks


def _at_work(site: CrossSite) -> bool:
    return site.controller.working(site) and not watched(site)


def project_cross(
    attn: Attention, hidden_states: Tensor, text: Tensor, temb: Tensor | None, fused: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequence that enters a cross-attention layer, its query, and the text's key and value
    [B, H, S, D]; through the projection modules."""
    x = sequence(attn, hidden_states, temb)
    query = heads(attn, attn.to_q(x))
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    pair = attn.to_kv(text).chunk(2, dim=-1) if fused else (attn.to_k(text), attn.to_v(text))
    key, value = (heads(attn, t) for t in pair)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return x, query, key, value


def _cross(
    site: CrossSite,
    base: Any,
    attn: Attention,
    hidden_states: Tensor,
    text: Tensor,
    loaded: _Loaded | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
) -> Tensor:
    """One call of the operation for the text, the loaded adapters and every method here; further
    ones where a method asks for outputs apart."""
    x, query, key, value = project_cross(attn, hidden_states, text, temb, isinstance(base, FUSED))
    bias = key_bias(site.layer.name, attention_mask, key)
    segments = [Segment(key, value, key_bias=bias)]
    branches: list[Branch] = []
    text_weight: Number = 1.0
    loaded_weight: Number = 1.0
    afters = []
    for method, call in site.controller.cross_calls(site, query, key, value, bias):
        parts = method.cross_parts(call)
        afters += [(parts.after, parts.apart)] if parts.after is not None else []
        segments += parts.segments
        branches += parts.branches
        text_weight = text_weight * parts.text_weight
        loaded_weight = loaded_weight * parts.loaded_weight
    if loaded is not None and not off(loaded_weight):
        branches = [*loaded.branches(site, attn, query, loaded_weight), *branches]

    def run(*which: Branch) -> Tensor:
        scale = float(attn.scale) if isinstance(base, SCALED) else None
        out = attention(query, which, softmax_scale=scale, backend=site.controller.backend)
        assert isinstance(out, Tensor)
        return out

    words = Branch(tuple(segments), weight=text_weight)
    if not afters:
        return finish(attn, run(words, *branches), x, hidden_states)
    out = run(words)
    for after, apart in afters:
        out = after(out, tuple(run(branch) for branch in apart))
    return finish(attn, out + run(*branches) if branches else out, x, hidden_states)
