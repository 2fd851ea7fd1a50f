"""Ways to run a denoiser: as it is, under a method as its authors' code has it, and under ours.

A route is a context in which `model(**inputs)` is the step to be timed. The official ones are
written as the released code computes: AdaIN in passes over whole tensors, keys and values
concatenated, maps concatenated before GroupNorm, a dense mask over all tokens for Redux, and
diffusers' own processors for IP-Adapter. They share no code with the library.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from models import Model
from torch import Tensor
from torch.nn import functional as F

import styleattn

Route = Callable[[Any, Model, dict[str, Any]], contextlib.AbstractContextManager[dict[str, Any]]]
"""(denoiser, model, inputs) -> a context that gives the inputs of this route."""

STRENGTH = 0.5  # of Redux' picture
SCALE = 0.7  # of the IP-Adapter
WIDTH = 1280  # of its image embeddings
_KEPT: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _first(x: Tensor, halves: int) -> Tensor:
    """The first row of every half, for every row of the half."""
    rows = len(x) // halves
    return x[::rows].repeat_interleave(rows, 0)


def _adain(x: Tensor, halves: int) -> Tensor:
    mean, std = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / std * _first(std, halves) + _first(mean, halves)


class _SharedSelf:
    """StyleAligned's processor of a UNet's self-attention."""

    def __init__(self, halves: int):
        self.halves = halves

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        q, k, v = (
            f(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = _adain(q, self.halves), _adain(k, self.halves)
        k = torch.cat([k, _first(k, self.halves)], -2)
        v = torch.cat([v, _first(v, self.halves)], -2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out  # type: ignore[no-any-return]


def _concatenated(forward: Callable[[Tensor], Tensor], halves: int) -> Callable[[Tensor], Tensor]:
    def shared(x: Tensor) -> Tensor:
        height = x.shape[-2]
        return forward(torch.cat([x, _first(x, halves)], -2))[..., :height, :]

    return shared


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return (x.float() * rotary[0] + turned.float() * rotary[1]).to(x.dtype)


class _Joint:
    """FLUX's joint attention, dense: with StyleAligned on the image tokens behind their rotation,
    or with an additive mask."""

    def __init__(self, text: int, shared: bool = False, mask: Tensor | None = None):
        self.text, self.shared, self.mask = text, shared, mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            tq, tk, tv = (heads(f(encoder_hidden_states)) for f in projections)
            tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = (torch.cat(pair, 2) for pair in ((tq, q), (tk, k), (tv, v)))
        q, k = _turned(q, image_rotary_emb), _turned(k, image_rotary_emb)
        if self.shared:
            out = self._aligned(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        context, image_out = out[:, : self.text], out[:, self.text :]
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        return image_out, attn.to_add_out(context.contiguous())

    def _aligned(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The first row by itself; the others see its image tokens too."""
        text, image = slice(0, self.text), slice(self.text, None)
        q = torch.cat([q[:, :, text], _adain(q[:, :, image], 1)], 2)
        mine = _adain(k[:, :, image], 1)
        own = torch.cat([k[:, :, text], mine], 2)
        more = torch.cat([own[1:], _first(mine, 1)[1:]], 2)
        values = torch.cat([v[1:], _first(v[:, :, image], 1)[1:]], 2)
        first = F.scaled_dot_product_attention(q[:1], own[:1], v[:1])
        return torch.cat([first, F.scaled_dot_product_attention(q[1:], more, values)])


@contextlib.contextmanager
def _processors(denoiser: Any, made: dict[str, Any]) -> Iterator[None]:
    before = dict(denoiser.attn_processors)
    denoiser.set_attn_processor({**before, **made})
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)


@contextlib.contextmanager
def plain(denoiser: Any, model: Model, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The denoiser as it is."""
    yield inputs


@contextlib.contextmanager
def official_shared(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """StyleAligned."""
    if model.name == "flux":
        made = {n: _Joint(model.size[1], shared=True) for n in denoiser.attn_processors}
        with _processors(denoiser, made):
            yield inputs
        return
    names = [n for n in denoiser.attn_processors if n.endswith("attn1.processor")]
    norms = [m for m in denoiser.modules() if isinstance(m, torch.nn.GroupNorm)]
    for norm in norms:
        norm.forward = _concatenated(norm.forward, model.chunks)  # type: ignore[method-assign]
    try:
        with _processors(denoiser, {n: _SharedSelf(model.chunks) for n in names}):
            yield inputs
    finally:
        for norm in norms:
            del norm.forward


@contextlib.contextmanager
def _ours(denoiser: Any, model: Model, method: Any) -> Iterator[None]:
    with styleattn.apply(denoiser, method) as handle, handle.layout(model.chunks):
        yield


@contextlib.contextmanager
def ours_shared(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """StyleAligned."""
    with _ours(denoiser, model, styleattn.StyleAligned()):
        yield inputs


def _adapter(denoiser: Any, tokens: int) -> dict[str, Any]:
    """An IP-Adapter of random weights, as its file has them."""
    cross = denoiser.config.cross_attention_dim
    device, dtype = denoiser.device, denoiser.dtype
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5
        return made.to(dtype)

    pairs = {}
    names = [n for n in denoiser.attn_processors if n.endswith("attn2.processor")]
    for i, name in enumerate(names):
        inner = denoiser.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in "kv":
            pairs[f"{2 * i + 1}.to_{part}_ip.weight"] = draw(inner, cross)
    projection = {
        "proj.weight": draw(tokens * cross, WIDTH),
        "proj.bias": torch.zeros(tokens * cross, device=device, dtype=dtype),
        "norm.weight": torch.ones(cross, device=device, dtype=dtype),
        "norm.bias": torch.zeros(cross, device=device, dtype=dtype),
    }
    return {"image_proj": projection, "ip_adapter": pairs}


@contextlib.contextmanager
def _loaded(denoiser: Any, tokens: int) -> Iterator[None]:
    """With the adapter in it, which is made once."""
    before, kind = dict(denoiser.attn_processors), denoiser.config.encoder_hid_dim_type
    if denoiser not in _KEPT:
        denoiser._load_ip_adapter_weights([_adapter(denoiser, tokens)])
        for processor in denoiser.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [SCALE]
        _KEPT[denoiser] = (dict(denoiser.attn_processors), denoiser.encoder_hid_proj)
    processors, denoiser.encoder_hid_proj = _KEPT[denoiser]
    denoiser.set_attn_processor(dict(processors))
    denoiser.register_to_config(encoder_hid_dim_type="ip_image_proj")
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)
        denoiser.encoder_hid_proj = None
        denoiser.register_to_config(encoder_hid_dim_type=kind)


@contextlib.contextmanager
def official_prompt(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """IP-Adapter, as diffusers runs a loaded one."""
    rows = len(inputs["sample"])
    shown = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(2), device="cpu")
    shown = shown.to(denoiser.device, denoiser.dtype).repeat(rows, 1, 1)
    shown[: rows // 2] = 0
    added = {**inputs["added_cond_kwargs"], "image_embeds": [shown]}
    with _loaded(denoiser, model.size[2]):
        yield {**inputs, "added_cond_kwargs": added}


@contextlib.contextmanager
def ours_prompt(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """IP-Adapter: the same loaded one under ours."""
    with official_prompt(denoiser, model, inputs) as given:
        from styleattn.methods import IPAdapter

        with _ours(denoiser, model, IPAdapter()):
            yield given


def _picture(denoiser: Any, model: Model) -> Tensor:
    """[M, C]: the tokens of Redux' picture."""
    width = denoiser.config.joint_attention_dim
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(model.size[2], width, generator=generator, device="cpu")
    return made.to(denoiser.device, denoiser.dtype)


@contextlib.contextmanager
def official_redux(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """Redux at a strength: its tokens behind the text, and a dense mask with log s on their columns
    for all other rows."""
    picture = _picture(denoiser, model)
    text = inputs["encoder_hidden_states"]
    wide = torch.cat([text, picture.expand(len(text), -1, -1)], 1)
    places = torch.cat([inputs["txt_ids"], inputs["txt_ids"].new_zeros(len(picture), 3)])
    total = wide.shape[1] + inputs["hidden_states"].shape[1]
    mask = torch.zeros(total, total, device=denoiser.device, dtype=denoiser.dtype)
    own = slice(text.shape[1], wide.shape[1])
    mask[:, own] = torch.log(torch.tensor(STRENGTH))
    mask[own, own] = 0
    made = {n: _Joint(wide.shape[1], mask=mask[None, None]) for n in denoiser.attn_processors}
    with _processors(denoiser, made):
        yield {**inputs, "encoder_hidden_states": wide, "txt_ids": places}


@contextlib.contextmanager
def ours_redux(denoiser: Any, model: Model, inputs: Any) -> Iterator[dict[str, Any]]:
    """Redux at a strength."""
    from styleattn.methods import Redux

    reference = styleattn.Reference(embeds=_picture(denoiser, model))
    with _ours(denoiser, model, Redux(strength=STRENGTH, references=(reference,))):
        yield inputs


METHODS: dict[str, dict[str, tuple[Route, Route]]] = {
    "sdxl": {
        "style_aligned": (official_shared, ours_shared),
        "ip_adapter": (official_prompt, ours_prompt),
    },
    "flux": {
        "style_aligned": (official_shared, ours_shared),
        "redux": (official_redux, ours_redux),
    },
}
"""Per model and method: the official route and ours."""
