"""The UNet host: Stable Diffusion 1.x, 2.x and XL. What a style needs of the model, checked before
anything is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from styleattn.inversion.host import fingerprint
from styleattn.methods import EncoderMethod, Layer, Method
from styleattn.references import StyleBank

from ._attention import REPLACEABLE, STATE, Site
from ._caller import unwrapped
from ._companion import COMPONENT as CONTROL
from ._companion import ControlController, PairedController, concerns_control, control_of
from ._controller import OURS, Controller
from ._cross import CrossSite, Entry
from ._features import FeatureCache
from ._layers import layer_weights
from ._pictures import adapter_of
from ._prompts import Prompts, prompts_of
from ._rows import references_in_rows

SUPPORTED = "UNet2DConditionModel (pipelines of Stable Diffusion 1.x, 2.x and XL)"
COMPONENT = "unet"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TAKES = (Method, EncoderMethod)


def matches(model: object) -> bool:
    """Whether this host can style the model."""
    return isinstance(model, UNet2DConditionModel)


def self_attention_layers(model: UNet2DConditionModel) -> dict[str, Attention]:
    """The self-attention modules by path, in the order of `attn_processors`: down, up, mid."""
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    found = {name: model.get_submodule(name) for name in names if name.endswith(".attn1")}
    return {
        name: attn
        for name, attn in found.items()
        if isinstance(attn, Attention) and not attn.is_cross_attention
    }


def layers_of(model: UNet2DConditionModel, method: Method) -> dict[str, Attention]:
    """The self-attention layers that a method changes."""
    layers = self_attention_layers(model)
    weights = layer_weights(method.layers, list(layers))
    return {
        name: attn
        for i, (name, attn) in enumerate(layers.items())
        if weights[name] and method.takes(Layer(name, i, len(layers)))
    }


def cross_attention_layers(model: UNet2DConditionModel | ControlNetModel) -> dict[str, Attention]:
    """The cross-attention modules by path, in the order of `attn_processors`: down, up, mid."""
    names = [name.removesuffix(".processor") for name in model.attn_processors]
    found = {name: model.get_submodule(name) for name in names if name.endswith(".attn2")}
    return {name: attn for name, attn in found.items() if isinstance(attn, Attention)}


def plan(
    model: UNet2DConditionModel,
    methods: Sequence[Method | EncoderMethod],
    bank: StyleBank | FeatureCache | None,
    backend: str | None,
    pipe: Any,
) -> Controller:
    """Everything that will be installed; touches nothing.

    Raises:
        ValueError: layers, references or a bank that do not fit the model, or methods that meet on
            a layer.
        TypeError: attention processors that compute something of their own.
    """
    references = [
        references_in_rows(m, bank) if isinstance(m, Method) else m.references or ()
        for m in methods
    ]
    if isinstance(bank, FeatureCache):
        rowed = {m.name: list(layers_of(model, m)) for m in methods if isinstance(m, Method)}
        bank.check(fingerprint(model), rowed)
    elif bank is not None:
        _check_bank(model, bank)
    cross = cross_attention_layers(model)
    sizes = _sizes(cross)
    dtype = model.dtype if model.dtype in FLOATS else torch.float32
    encoders = {
        i: _with_adapter(m, sizes, dtype, pipe)
        for i, m in enumerate(methods)
        if isinstance(m, EncoderMethod)
    }
    prompts = Prompts(
        {i: prompts_of(m, references[i], sizes, pipe, dtype) for i, m in encoders.items()}
    )
    control = control_of(pipe, encoders.values())
    kind = Controller if control is None else PairedController
    controller = kind(methods, references, bank, backend, pipe, prompts)
    for i, method in enumerate(methods):
        if isinstance(method, Method):
            _plan_self(controller, model, i, method)
        if i in encoders:
            _plan_cross(controller, cross, i, encoders[i])
    if control is not None:
        _plan_control(controller, control, encoders, pipe)
    _check_reach(controller, encoders)
    return controller


def _sizes(layers: Mapping[str, Attention]) -> dict[str, tuple[int, int]]:
    """(heads * head_dim, width of the text) of every layer."""
    return {n: (a.inner_dim, a.cross_attention_dim) for n, a in layers.items()}


def _with_adapter(
    method: Any, sizes: Mapping[str, tuple[int, int]], dtype: torch.dtype, pipe: Any
) -> Any:
    """A method that asks where its adapters act, with its adapter read if it names a file."""
    if not hasattr(method, "reaches") or not isinstance(method.adapter, (str, os.PathLike)):
        return method
    net = unwrapped(getattr(pipe, CONTROL, None))
    further = CONTROL in getattr(method, "COMPONENTS", ()) and isinstance(net, ControlNetModel)
    control = _sizes(cross_attention_layers(net)) if further else None
    return replace(method, adapter=adapter_of(method, sizes, dtype, control))


def _plan_control(
    controller: Controller, control: ControlNetModel, encoders: Mapping[int, Any], pipe: Any
) -> None:
    """The sites of methods with adapters for the pipeline's ControlNet."""
    methods = {i: m for i, m in encoders.items() if concerns_control(m)}
    layers = cross_attention_layers(control)
    prompts = Prompts(
        {
            i: prompts_of(m, m.references, _sizes(layers), pipe, component=CONTROL)
            for i, m in methods.items()
        }
    )
    companion = ControlController(controller, prompts)
    for i, method in methods.items():
        _plan_cross(companion, layers, i, method, CONTROL)
    controller.companions = ((control, companion),)


def _check_reach(controller: Controller, encoders: Mapping[int, Any]) -> None:
    """Refuse images that would act nowhere."""
    planned = (controller, *(c for _, c in controller.companions))
    taken = {i for c in planned for _, site in c.sites for i in site.methods}
    for i, method in encoders.items():
        if i not in taken and hasattr(method, "reaches"):
            raise ValueError(
                f"{method.name}: its adapter has projections for none of the chosen layers"
            )


def _plan_self(controller: Controller, model: UNet2DConditionModel, i: int, method: Method) -> None:
    """The sites of a method on self-attention, and its norms."""
    layers = self_attention_layers(model)
    if not layers:
        raise TypeError(f"{type(model).__name__} has no self-attention layers")
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    references = controller.references[i]
    gates = layer_weights(method.layers, list(layers), norms)
    weights = [layer_weights(r.layers, list(layers), norms) for r in references]
    for index, (name, attn) in enumerate(layers.items()):
        layer = Layer(name, index, len(layers))
        mine = tuple(r.weight * w[name] for r, w in zip(references, weights, strict=True))
        if gates[name] and any(mine) and method.takes(layer):
            site = Site(controller, layer, i, gates[name], mine, _base(name, attn, REPLACEABLE))
            _add_site(controller, attn, site)
    for name, norm in norms.items() if method.shares_norm else ():
        mine = tuple(r.weight * w[name] for r, w in zip(references, weights, strict=True))
        if gates[name] and any(mine):
            if norm in controller.norms:
                raise ValueError(
                    f"two methods share the statistics of {name}; give them separate layers"
                )
            controller.norms[norm] = (name, Entry(i, gates[name], mine))


def _plan_cross(
    controller: Controller,
    layers: dict[str, Attention],
    i: int,
    method: EncoderMethod,
    component: str = COMPONENT,
) -> None:
    """The sites of a method on cross-attention: several methods may be on one layer. In further
    components of the pipeline it has all layers that its adapter has."""
    if not layers:
        raise TypeError(f"{method.name} needs cross-attention layers, and the model has none")
    references = controller.references[i]
    further = component != COMPONENT
    gates = layer_weights("all" if further else method.layers, list(layers))
    weights = [layer_weights("all" if further else r.layers, list(layers)) for r in references]
    reaches = getattr(method, "reaches", None)
    chosen = getattr(method, "negative_layers", None)
    negatives = (
        dict.fromkeys(layers, 0.0) if chosen is None else layer_weights(chosen, list(layers))
    )
    sites = {id(attn): site for attn, site in controller.sites}
    for index, (name, attn) in enumerate(layers.items()):
        layer = Layer(name, index, len(layers))
        hits = [reaches is None or reaches(layer, j, component) for j in range(len(references))]
        mine = tuple(
            r.weight * w[name] * hit for r, w, hit in zip(references, weights, hits, strict=True)
        )
        takes = any(hits) if further else method.takes_cross(layer)
        if not takes or not (gates[name] or method.adapter is None):
            continue
        base = _base(name, attn, CrossSite.replaceable)
        site = sites.get(id(attn))
        if site is None:
            site = CrossSite(controller, layer, [], base)
            controller.sites.append((attn, site))
        if isinstance(site, CrossSite):
            site.entries.append(Entry(i, gates[name], mine, bool(negatives[name])))


def _add_site(controller: Controller, attn: Attention, site: Site) -> None:
    for other, taken in controller.sites:
        if other is attn:
            names = [controller.methods[i].name for i in (*taken.methods, *site.methods)]
            raise ValueError(
                f"{site.layer.name} is taken by {' and '.join(names)}: self-attention methods"
                " exclude each other on a layer; give them separate `layers`"
            )
    controller.sites.append((attn, site))


def _base(name: str, attn: Attention, replaceable: tuple[type, ...]) -> Any:
    """The processor that a layer would have without us."""
    found: Any = attn.processor
    if type(found) in OURS:
        site = getattr(attn, STATE, None)
        found = found.base or (site.base if site is not None else None)
    if found is not None and type(found) not in replaceable:
        raise TypeError(
            f"{name} has a {type(found).__name__}, which computes something of its own; styleattn"
            f" stands in for {', '.join(t.__name__ for t in replaceable)}"
        )
    return found


def _check_bank(model: UNet2DConditionModel, bank: StyleBank) -> None:
    config: Any = model.config
    reasons = []
    if bank.latents.shape[2] != config.in_channels:
        reasons.append(
            f"it has {bank.latents.shape[2]} latent channels, the model {config.in_channels}"
        )
    width = bank.conditions["prompt_embeds"].shape[-1]
    known = config.cross_attention_dim
    if (
        config.encoder_hid_dim_type in (None, "ip_image_proj")
        and isinstance(known, int)
        and width != known
    ):
        reasons.append(f"its prompt embeddings are {width} wide, the model's {known}")
    if config.addition_embed_type == "text_time":
        lacking = [
            n
            for n in ("text_embeds", "negative_text_embeds", "time_ids")
            if n not in bank.conditions
        ]
        if lacking:
            reasons.append(f"it lacks {', '.join(lacking)}, which this model needs")
    if reasons:
        raise ValueError("the bank was made for another model: " + "; ".join(reasons))
