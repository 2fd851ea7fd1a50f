"""The FLUX.1 host: joint attention of double and single blocks. What a style needs of the model,
checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from styleattn.adapters import load_redux, load_uso
from styleattn.methods import Layer
from styleattn.methods._blocks import BlockMethod
from styleattn.methods._images import Images
from styleattn.methods._joint import ContextMethod, JointMethod, PanelMethod
from styleattn.methods._shown import PictureMethod
from styleattn.references import Reference, StyleBank

from ._attention import STATE
from ._cross import Entry
from ._flux_attention import OURS, REPLACEABLE, FluxStyleProcessor, JointSite
from ._flux_blocks import block_places, with_identity
from ._flux_context import PictureController, picture_method, pictures_of
from ._flux_controller import FluxController, reads_rows
from ._flux_network import against_network
from ._flux_panels import check_panels
from ._flux_prompts import flux_prompts_of
from ._layers import layer_weights
from ._pictures import Eye, check_adapter, kept_adapter
from ._prompts import Prompts
from ._rows import references_in_rows

SUPPORTED = "FluxTransformer2DModel (pipelines of FLUX.1)"
COMPONENT = "transformer"
LOADERS = {"redux": load_redux, "uso": load_uso}
"""What reads the adapter file of a method with tokens next to the text."""
TAKES = (JointMethod, Images, BlockMethod)


def matches(model: object) -> bool:
    """Whether this host can style the model."""
    return isinstance(model, FluxTransformer2DModel)


def joint_attention_layers(model: FluxTransformer2DModel) -> dict[str, FluxAttention]:
    """The joint attention modules by path: double blocks, then single blocks.

    Raises:
        TypeError: attention modules of another library, whose inside is not diffusers'.
    """
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    found = {name: model.get_submodule(name) for name in names}
    others = [attn for attn in found.values() if not isinstance(attn, FluxAttention)]
    if others or not found:
        kinds = ", ".join(sorted({type(attn).__name__ for attn in others})) or "none of diffusers'"
        raise TypeError(
            f"styleattn cannot style this {type(model).__name__}: {len(others)} of its {len(found)}"
            f" attention layers are {kinds}, not FluxAttention"
        )
    return {name: attn for name, attn in found.items() if isinstance(attn, FluxAttention)}


def plan(
    model: FluxTransformer2DModel,
    methods: Sequence[Any],
    bank: StyleBank | None,
    backend: str | None,
    pipe: Any,
) -> FluxController:
    """Everything that will be installed; touches nothing.

    Raises:
        ValueError: layers, references or a bank that do not fit the model, or methods that exclude
            each other on a layer.
        TypeError: attention processors that compute something of their own.
    """
    if bank is not None:
        _check_bank(model, bank, methods)
    check_panels(methods, model, pipe)
    references = [_references(m, bank) for m in methods]
    contexts = [_contexts(m, r, model, pipe) for m, r in zip(methods, references, strict=True)]
    layers = joint_attention_layers(model)
    prompts = {
        i: flux_prompts_of(m, references[i], model, pipe, layers)
        for i, m in enumerate(methods)
        if isinstance(m, Images)
    }
    pictured = picture_method(methods, model)
    kind = FluxController if pictured is None else PictureController
    controller = kind(methods, references, contexts, bank, backend, pipe, Prompts(prompts))
    if pictured is not None and isinstance(controller, PictureController):
        pictures = pictures_of(methods[pictured], references[pictured], model, pipe)
        controller.begin(pictured, pictures, layers)
    controller.places = block_places(controller, model)
    for i, method in enumerate(methods):
        if isinstance(method, BlockMethod):
            continue
        gates = layer_weights(method.layers, list(layers))
        weights = [layer_weights(r.layers, list(layers)) for r in references[i]]
        reaches = _reaches(method, prompts.get(i, ()), layers)
        for index, (name, attn) in enumerate(layers.items()):
            layer = Layer(name, index, len(layers))
            mine = tuple(r.weight * w[name] for r, w in zip(references[i], weights, strict=True))
            gate = gates[name] if reaches(layer, gates[name], any(mine)) else None
            if gate is not None:
                _add(controller, layer, attn, Entry(i, gate, mine, _negative(method, name, layers)))
    return controller


def _reaches(method: Any, prompts: Sequence[Any], layers: Mapping[str, Any]) -> Any:
    """Whether a method has something to do on a layer: (layer, its gate, any weight) -> bool."""
    if isinstance(method, ContextMethod) or (
        isinstance(method, PictureMethod) and not method.apart
    ):
        # tokens in the sequence: layers that are not chosen ignore them, by a gate of 0
        return lambda layer, gate, weight: method.takes(layer)
    if isinstance(method, PanelMethod):
        return lambda layer, gate, weight: bool(gate and method.takes(layer))
    if not isinstance(method, Images):
        return lambda layer, gate, weight: bool(gate and weight and method.takes(layer))
    if method.adapter is None:
        return lambda layer, gate, weight: layer.name.startswith("transformer_blocks.")
    known = set(prompts[0].adapter.names)
    return lambda layer, gate, weight: bool(gate and weight and layer.name in known)


def _negative(method: Any, name: str, layers: Mapping[str, Any]) -> bool:
    """Whether a layer shows a method's images to unconditional calls only."""
    chosen = getattr(method, "negative_layers", None)
    return chosen is not None and bool(layer_weights(chosen, list(layers))[name])


def _add(controller: FluxController, layer: Layer, attn: FluxAttention, entry: Entry) -> None:
    """A method on a layer: any number whose references are tokens, at most one whose references
    are rows."""
    site: Any = next((s for a, s in controller.sites if a is attn), None)
    if site is None:
        site = JointSite(controller, layer, [], _base(layer.name, attn))
        controller.sites.append((attn, site))
    if controller.in_rows(entry.method):
        others = [e.method for e in site.entries if controller.in_rows(e.method)]
        if others:
            names = [controller.methods[i].name for i in (*others, entry.method)]
            raise ValueError(
                f"{layer.name} is taken by {' and '.join(names)}: methods that read other images of"
                " the batch exclude each other on a layer; give them separate `layers`"
            )
    site.entries.append(entry)


def _base(name: str, attn: Any) -> Any:
    """The processor that a layer would have without us."""
    found: Any = attn.processor
    if type(found) in OURS:
        site = getattr(attn, STATE, None)
        found = found.base or (site.base if site is not None else FluxAttnProcessor())
    if type(found) not in REPLACEABLE:
        raise TypeError(
            f"{name} has a {type(found).__name__}, which computes something of its own; styleattn"
            f" stands in for {', '.join(t.__name__ for t in REPLACEABLE)}"
        )
    return found


def _references(method: Any, bank: StyleBank | None) -> tuple[Reference, ...]:
    """The references of a method: its own, the bank's, or plain ones."""
    own: tuple[Reference, ...] | None = method.references
    if isinstance(method, (Images, PanelMethod)):
        return own or ()
    if isinstance(method, BlockMethod):
        return with_identity(method)
    if isinstance(method, PictureMethod):
        return own or (Reference(),)
    if isinstance(method, ContextMethod):
        if not own or any(r.embeds is None and r.image is None for r in own):
            raise ValueError(f"{method.name} needs references, each with a picture or embeds")
        return own
    if any(r.embeds is not None for r in own or ()):
        raise ValueError(
            f"{method.name} reads other images of the batch; a Reference with embeds is not for it"
        )
    return references_in_rows(method, bank)


def _check_bank(model: FluxTransformer2DModel, bank: StyleBank, methods: Sequence[Any]) -> None:
    config: Any = model.config
    reasons = []
    if any(labels != "flow" for labels in bank.metadata.get("labels", ())):
        reasons.append("its latents are those of a diffusion model, not of a flow")
    channels = 4 * bank.latents.shape[2]
    if channels != config.in_channels:
        reasons.append(
            f"its packed latents have {channels} channels, the model {config.in_channels}"
        )
    for name, known in (
        ("prompt_embeds", config.joint_attention_dim),
        ("text_embeds", config.pooled_projection_dim),
    ):
        told = bank.conditions.get(name)
        if told is None or f"negative_{name}" not in bank.conditions:
            reasons.append(f"it lacks {name} or negative_{name}, which this model needs")
        elif told.shape[-1] != known:
            reasons.append(f"its {name} are {told.shape[-1]} wide, the model's {known}")
    reasons += against_network(model, bank.metadata.get("network") or {}) if not reasons else []
    if reasons:
        raise ValueError("the bank was made for another model: " + "; ".join(reasons))
    if not any(map(reads_rows, methods)):
        names = ", ".join(m.name for m in methods)
        raise ValueError(
            f"{names}: nothing here reads other images of the batch, so a bank is of no use"
        )


def _contexts(
    method: Any, references: Sequence[Reference], model: FluxTransformer2DModel, pipe: Any
) -> tuple[Tensor, ...]:
    """The tokens of every reference of a context method."""
    if not isinstance(method, ContextMethod):
        return ()
    config: Any = model.config
    adapter: Any = getattr(method, "adapter", None)
    if isinstance(adapter, (str, os.PathLike)):
        dtype = model.dtype
        read = LOADERS[method.name]
        adapter = kept_adapter(method, (dtype,), lambda path: read(path, dtype=dtype))
    if adapter is not None:
        check_adapter(method.name, adapter)
    found = []
    for r in references:
        tokens = method.context(_embeds(method, adapter, r, pipe))
        width = model.inner_dim if method.embedded else config.joint_attention_dim
        if tokens.shape[-1] != width:
            whose = "embedded prompts" if method.embedded else "prompts"
            raise ValueError(
                f"{method.name}: embeds are {tokens.shape[-1]} wide, the model's {whose} {width}"
            )
        found.append(tokens)
    return tuple(found)


def _embeds(method: Any, adapter: Any, reference: Reference, pipe: Any) -> Tensor:
    """[M, C] or [P, M, C]: given, or what an adapter makes of the encoder's output."""
    if adapter is None:
        given: Any = reference.embeds
        return given
    seen = Eye(method, adapter, pipe).embeds(reference)
    weight = next(adapter.parameters())
    with torch.no_grad():
        one = seen.ndim == (3 if adapter.encoder.output == "levels" else 2)
        tokens: Tensor = adapter.tokens((seen[None] if one else seen).to(weight.device))
    return tokens


def _register_metadata() -> None:
    """Tell diffusers' layer skipping what skipping our processor returns: as for its own."""
    try:
        from diffusers.hooks import _helpers as helpers

        registry = helpers.AttentionProcessorRegistry
        for ours in OURS:
            registry.register(ours, registry.get(FluxAttnProcessor))
    except (ImportError, AttributeError, ValueError):  # a later diffusers may move it
        return


_register_metadata()

__all__ = ["FluxStyleProcessor", "joint_attention_layers", "matches", "plan"]
