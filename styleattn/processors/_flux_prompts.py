"""Image prompts on FLUX: adapters of methods, what they add to a layer, and how much of the loaded
ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from styleattn.adapters import load_flux_ip_adapter
from styleattn.attention import attention
from styleattn.branch import Branch
from styleattn.methods import CrossCall, ImagePrompt
from styleattn.methods._base import Number, off
from styleattn.methods._images import Images
from styleattn.methods._joint import Tokens
from styleattn.references import Reference

from ._pictures import kept_adapter
from ._prompts import Prompt, prompts_of, rows_of

if TYPE_CHECKING:
    from ._flux_attention import JointSite
    from ._flux_controller import FluxController

INSIDE = {"flux-xlabs": False, "flux-instantx": True}
"""By the make of an adapter: whether it adds to the attention before the output projection (of all
tokens in single blocks), or to the image after the double block's MLP."""

_SHARDED = (
    "image prompts do not go with tensor parallelism, which splits a layer's heads over devices"
    " (what they add is not split); use one device a model, or Redux, whose pictures are tokens"
)


def flux_prompts_of(
    method: Any, references: Sequence[Reference], model: Any, pipe: Any, layers: Mapping[str, Any]
) -> tuple[Prompt | None, ...]:
    """The prompts of a method's references, with its adapter read from its file.

    Raises:
        ValueError: an adapter of another host, or references that do not go with it.
        FileNotFoundError: no such file.
    """
    adapter = method.adapter
    if isinstance(adapter, (str, os.PathLike)):
        config, width = model.config, model.inner_dim
        sizes = tuple((name, width, config.joint_attention_dim) for name in layers)
        more = {"head_dim": config.attention_head_dim, "dtype": model.dtype}
        adapter = kept_adapter(
            method,
            (sizes, *more.values()),
            lambda path: load_flux_ip_adapter(path, sizes, **more),
        )
    kind = getattr(adapter, "kind", None)
    if adapter is not None and kind not in INSIDE:
        raise ValueError(
            f"{method.name}: on FLUX adapters are {' or '.join(INSIDE)}, this one is {kind!r}"
        )
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "tensor_parallel_config", None) is not None:
        raise ValueError(f"{method.name}: {_SHARDED}")
    return prompts_of(replace(method, adapter=adapter), references, {}, pipe)


def loaded_weight(
    controller: FluxController, site: JointSite, tokens: Mapping[str, Tokens]
) -> Number:
    """Factor on the images of adapters that diffusers has loaded."""
    weight: Number = 1.0
    for method, call, _ in _calls(controller, site, tokens, ("image",)):
        if method.adapter is None:
            weight = weight * method.cross_parts(call).loaded_weight
    return weight


def added_images(
    controller: FluxController,
    site: JointSite,
    tokens: Mapping[str, Tokens],
    names: Sequence[str],
    inside: bool,
) -> Tensor | None:
    """What the images of methods add to the queries of some runs, [B, H, N, D]; None if nothing.

    out = sum_i w_i Attn(Q before rotation, K_i, V_i)
    """
    branches: list[Branch] = []
    query = None
    for method, call, kind in _calls(controller, site, tokens, names):
        if method.adapter is not None and INSIDE[kind] is inside:
            query = call.query
            branches += method.cross_parts(call).branches
    if query is None or not branches:
        return None
    out = attention(query, tuple(branches), backend=controller.backend)
    assert isinstance(out, Tensor)
    return out


def _calls(
    controller: FluxController,
    site: JointSite,
    tokens: Mapping[str, Tokens],
    names: Sequence[str],
) -> Iterator[tuple[Any, CrossCall, str]]:
    """What every method with images is asked, and the make of its adapter."""
    now = controller.running()
    for entry in site.entries:
        method = controller.methods[entry.method]
        if not isinstance(method, Images):
            continue
        gate, strengths = controller.strengths(entry, now)
        prompts = controller.prompts.of.get(entry.method, ())
        if method.adapter is not None and off(gate):
            continue
        queries = [tokens[name].query for name in names]
        query = queries[0] if len(queries) == 1 else torch.cat(queries, 2)
        text, found, kind = tokens["text"], [], ""
        for index, prompt in enumerate(prompts):
            if prompt is None or off(strengths[index]):
                continue
            kind = prompt.adapter.kind
            key, value = _key_value(site, prompt, query)
            rows = torch.tensor(rows_of(prompt.reference, now, entry.negative))
            mask = _mask(controller, prompt.reference.mask, tokens, names)
            found.append(ImagePrompt(key, value, rows, strengths[index], mask, index))
        if found or method.adapter is None:
            numbers = controller.numbers_of(entry.method)
            shown = tuple(found)
            yield (
                method,
                CrossCall(
                    site.layer, query, text.key, text.value, None, shown, now.rows, gate, numbers
                ),
                kind,
            )


def not_sharded(site: JointSite, key: Tensor, query: Tensor) -> None:
    """Refuse images at a layer that has some of its heads only.

    Raises:
        RuntimeError: it has.
    """
    if key.shape[1] != query.shape[1]:
        raise RuntimeError(
            f"{site.layer.name}: {key.shape[1]} heads of an image for {query.shape[1]} of its own;"
            f" {_SHARDED}"
        )


def _key_value(site: JointSite, prompt: Prompt, like: Tensor) -> tuple[Tensor, Tensor]:
    """[2, H, M, D]: keys and values of an image without and with its content, made once."""
    key = (id(prompt), like.device, like.dtype)
    if key not in site.kept:
        with torch.no_grad():
            pair = prompt.adapter.key_value(site.layer.name, prompt.tokens)
        made = [t.to(like).unflatten(-1, (-1, like.shape[-1])).transpose(1, 2) for t in pair]
        not_sharded(site, made[0], like)
        if torch.compiler.is_compiling():
            return made[0], made[1]
        site.kept[key] = (*made, prompt)
    found = site.kept[key]
    return found[0], found[1]


def _mask(
    controller: FluxController,
    mask: Tensor | None,
    tokens: Mapping[str, Tokens],
    names: Sequence[str],
) -> Tensor | None:
    """A mask for the queries of some runs: the image's tokens by their place, text by the mean,
    pictures in context not at all."""
    if mask is None:
        return None
    share = controller.share(mask, tokens["image"].value.device)
    parts = []
    for name in names:
        length = tokens[name].value.shape[2]
        none = share.new_zeros(1) if name == "reference" else share.mean().reshape(1)
        parts.append(share if name == "image" else none.expand(length))
    return torch.cat(parts)
