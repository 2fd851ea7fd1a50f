"""Which layers: presets, name patterns, and diffusers' scale dictionary."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from styleattn.methods.weight_types import WEIGHT_TYPES, weight_type
from styleattn.references import Layers

from ._depth import is_depth, layers_at, measured_blocks

PRESETS = ("all", "style", "layout", "late", "style_id")
_XL = {"style": ["up_blocks.0.attentions.1"], "layout": ["down_blocks.2.attentions.1"]}
_V1 = {
    "style": ["up_blocks.1.*"],
    "layout": ["down_blocks.2.*", "mid_block.*"],
}
_GROUP = re.compile(r"((?:down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)(?:\.|$)")


def layer_weights(
    layers: Layers, attention: Sequence[str], others: Iterable[str] = ()
) -> dict[str, float]:
    """The weight of every module under a choice of layers.

    Args:
        layers: "all"; "style" or "layout" (the blocks that InstantStyle found in SDXL, and its
            experimental ones in SD1.5); "late" (the decoder's blocks with attention but the
            deepest: `up_blocks.2` and `.3` of SD1.5, `up_blocks.1` of SDXL) or "style_id" (the
            same, on SDXL without its first attention module), on FLUX both are the single blocks; a
            name, a prefix or an fnmatch pattern of names, or several; or diffusers' scale
            dictionary ({"down": {"block_2": [0, 1]}, "mid": 1, "up": ...}; what it does not name is
            0); on FLUX one number for every double block (single ones get 0) or for every block, or
            blocks by kind and depth ("double", "single 0-0.25": `layers_at`); a weight type such as
            "ease in" (`styleattn.methods.WEIGHT_TYPES`); or a dictionary of any of these choices to
            weights ({"style": 1, "layout": 0.5}), which add up.
        attention: the paths of the attention layers. Every pattern must hit one of them.
        others: further module paths to weigh by the same rule.

    Raises:
        ValueError: a choice that selects nothing, or does not fit the model; says what there is.
    """
    others = tuple(others)
    names = [*attention, *others]
    if isinstance(layers, str) and layers == "all":
        return dict.fromkeys(names, 1.0)
    if isinstance(layers, str) and layers in PRESETS:
        return layer_weights(_preset(layers, attention), attention, others)
    if isinstance(layers, str) and layers in WEIGHT_TYPES:
        return weight_type(layers, names)
    if isinstance(layers, Mapping):
        if layers and not set(layers) & {"down", "mid", "up"}:
            return _weighted(layers, attention, others)
        return _from_scale_dict(layers, attention, names)
    patterns = [layers] if isinstance(layers, str) else layers
    double = [name for name in attention if name.startswith("transformer_blocks.")]
    if double and isinstance(patterns, (list, tuple)) and _numbers(patterns):
        return {**dict.fromkeys(names, 0.0), **_each(patterns, double, attention)}
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f"layers must be one of {', '.join(PRESETS)}, a pattern, a list of patterns or a scale"
            " dictionary,"
            f" got {layers!r}"
        )
    patterns = [
        name for p in patterns for name in (layers_at(p, attention) if is_depth(p) else (p,))
    ]
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in attention):
            raise ValueError(
                f"layers: {pattern!r} matches no attention layer; {_what_there_is(attention)}"
            )
    return {name: float(any(_matches(p, name) for p in patterns)) for name in names}


def _weighted(
    layers: Mapping[str, Any], attention: Sequence[str], others: Iterable[str]
) -> dict[str, float]:
    total = dict.fromkeys((*attention, *others), 0.0)
    for choice, scale in layers.items():
        _check_scale(repr(choice), scale)
        if scale == 0:
            continue
        known = choice in PRESETS or choice in WEIGHT_TYPES or is_depth(choice)
        if not known and not any(_matches(str(choice), name) for name in attention):
            raise ValueError(
                f"layers: unknown part {choice!r}, the parts are down, mid and up; nor is it a"
                f" preset or the pattern of a layer; {_what_there_is(attention)}"
            )
        for name, weight in layer_weights(choice, attention, others).items():
            total[name] += scale * weight
    return total


def _numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )


def _each(
    weights: Sequence[float], double: Sequence[str], attention: Sequence[str]
) -> dict[str, float]:
    """One weight for every double block of FLUX, or for every block."""
    for weight in weights:
        _check_scale("a block", weight)
    for chosen in (double, attention):
        if len(chosen) == len(weights):
            return dict(zip(chosen, map(float, weights), strict=True))
    raise ValueError(
        f"layers: {len(weights)} weights for the {len(double)} double blocks of the model, or for"
        f" all its {len(attention)}"
    )


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _what_there_is(attention: Sequence[str]) -> str:
    groups = list(dict.fromkeys(m.group(0).rstrip(".") for m in map(_GROUP.match, attention) if m))
    return "there are " + ", ".join(groups or attention)


def _late(name: str, attention: Sequence[str]) -> list[str]:
    """The decoder's blocks with attention but the deepest; all there is where there is one. Of FLUX
    the single blocks."""
    if any(layer.startswith("single_transformer_blocks.") for layer in attention):
        return ["single_transformer_blocks"]
    found = [m for m in map(_GROUP.match, attention) if m and m.group(1).startswith("up_blocks")]
    blocks = sorted({int(m.group(2)) for m in found})
    if not blocks:
        raise ValueError(f"layers={name!r} needs a decoder with attention")
    chosen = blocks[1:] or blocks
    modules = sorted(
        {(int(m.group(2)), int(m.group(3))) for m in found if int(m.group(2)) in chosen}
    )
    if name == "style_id" and blocks[0] == 0 and len(modules) > 1:
        modules = [(b, a) for b, a in modules if a]
    return [f"up_blocks.{b}.attentions.{a}" for b, a in modules]


def _preset(name: str, attention: Sequence[str]) -> Layers:
    if name in ("late", "style_id"):
        return _late(name, attention)
    if any(layer.startswith("up_blocks.0.attentions.1.") for layer in attention):
        return _XL[name]
    if any(layer.startswith("up_blocks.1.attentions.") for layer in attention):
        wanted = _V1[name]
        return [p for p in wanted if any(_matches(p, layer) for layer in attention)] or wanted
    if any(layer.startswith("single_transformer_blocks.") for layer in attention):
        return measured_blocks(name, attention)
    raise ValueError(
        f"layers={name!r} is known for SDXL and SD1.5 UNets; {_what_there_is(attention)}"
    )


def _from_scale_dict(
    layers: Mapping[str, Any], attention: Sequence[str], names: Sequence[str]
) -> dict[str, float]:
    groups: dict[str, dict[int, int]] = {"down": {}, "mid": {}, "up": {}}
    for match in filter(None, map(_GROUP.match, attention)):
        part = match.group(1).split("_")[0]
        block = int(match.group(2) or 0)
        groups[part][block] = max(groups[part].get(block, 0), int(match.group(3)) + 1)
    prefixes: dict[str, float] = {}
    for part, blocks in layers.items():
        if part not in groups:
            raise ValueError(f"layers: unknown part {part!r}, the parts are down, mid and up")
        if part == "mid":
            prefixes.update(_block("mid_block", blocks, groups["mid"].get(0, 0), attention))
            continue
        if not isinstance(blocks, Mapping):
            blocks = {f"block_{b}": blocks for b in groups[part]}
        for block, scales in blocks.items():
            found = re.fullmatch(r"block_(\d+)", str(block))
            count = groups[part].get(int(found.group(1)), 0) if found else 0
            if not found or not count:
                have = ", ".join(f"block_{b}" for b in sorted(groups[part]))
                raise ValueError(
                    f"layers: {part!r} has no {block!r} with attention; it has {have or 'none'}"
                )
            prefixes.update(_block(f"{part}_blocks.{found.group(1)}", scales, count, attention))
    return {
        name: next((s for prefix, s in prefixes.items() if name.startswith(prefix + ".")), 0.0)
        for name in names
    }


def _block(prefix: str, scales: Any, count: int, attention: Sequence[str]) -> dict[str, float]:
    if not count:
        raise ValueError(f"layers: {prefix} has no attention; {_what_there_is(attention)}")
    values = scales if isinstance(scales, (list, tuple)) else [scales] * count
    if len(values) != count:
        raise ValueError(
            f"layers: {prefix} has {count} attention modules, got {len(values)} scales"
        )
    for value in values:
        _check_scale(prefix, value)
    return {f"{prefix}.attentions.{i}": float(v) for i, v in enumerate(values)}


def _check_scale(where: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"layers: {where} has {value!r} where a scale >= 0 belongs")
