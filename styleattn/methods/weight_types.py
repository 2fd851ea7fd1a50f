"""How strong an image is from module to module: the curves of ComfyUI's IP-Adapter nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

_MODULE = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)(?:\.|$)")
_EXECUTED = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
_LOW, _SPAN = 0.05, 0.95

Place = tuple[int, int, int]
"""The part (0 down, 1 mid, 2 up), the block and the attention module: sorted, the order of
execution."""


def _curve(shape: Callable[[float], float]) -> Callable[[int, int, Place], float]:
    return lambda t, total, place: _LOW + _SPAN * shape(t / total)


def _parts(down: float, mid: float, up: float) -> Callable[[int, int, Place], float]:
    return lambda t, total, place: (down, mid, up)[place[0]]


_CURVES: Mapping[str, Callable[[int, int, Place], float]] = {
    "linear": lambda t, total, place: 1.0,
    "ease in": _curve(lambda x: 1 - x),
    "ease out": _curve(lambda x: x),
    "ease in-out": _curve(lambda x: 1 - abs(2 * x - 1)),
    "reverse in-out": _curve(lambda x: abs(2 * x - 1)),
    "weak input": _parts(0.2, 1.0, 1.0),
    "weak middle": _parts(1.0, 0.2, 1.0),
    "weak output": _parts(1.0, 1.0, 0.2),
    "strong middle": _parts(0.2, 1.0, 0.2),
}

_XL, _V1 = 11, 16  # attention modules
# Modules in the order of execution. SD1.5's composition is shared by two modules, the first with a
# quarter of the weight.
_COMPOSITION: Mapping[int, Mapping[int, float]] = {_XL: {3: 1.0}, _V1: {4: 0.25, 5: 1.0}}
_STYLE: Mapping[int, Mapping[int, float]] = {
    _XL: {6: 1.0},
    _V1: dict.fromkeys((0, 1, 2, 3, *range(9, 16)), 1.0),
}


def _tables(total: int) -> Mapping[str, Mapping[int, float]]:
    composition, style = _COMPOSITION[total], _STYLE[total]
    both = {**style, **composition}
    rest = {t: 1.0 for t in range(total) if t not in composition}
    faint = dict.fromkeys(range(total), 0.1)
    return {
        "style transfer": style,
        "composition": composition,
        "strong style transfer": rest,
        "style and composition": both,
        "style transfer precise": both,
        "composition precise": {**faint, **both},
    }


WEIGHT_TYPES = (*_CURVES, *_tables(_XL))
"""The names that `layers` takes in addition to its own presets."""


def weight_type(name: str, layers: Sequence[str]) -> dict[str, float]:
    """The weight of every module under a weight type; 0 for what is in no attention module.

    t counts the L attention modules in the order of execution (down, mid, up):

        ease in 0.05 + 0.95 (1 - t/L),  ease out 0.05 + 0.95 t/L,  ease in-out 0.05 + 0.95 (1 - d),
        reverse in-out 0.05 + 0.95 d,  d = |2 t/L - 1|

    Types of style and composition are known for the 11 modules of SDXL and the 16 of SD1.5; both
    halves have the weight 1.

    Args:
        layers: the paths of all attention layers of the model, in any order; others may follow.

    Raises:
        ValueError: a model without that type.

    Source: ComfyUI_IPAdapter_plus, the tables.
    """
    places = {layer: _place(layer) for layer in layers}
    modules = sorted({place for place in places.values() if place is not None})
    total = len(modules)
    if not modules:
        raise ValueError(f"layers={name!r} is a weight type of UNets; this model is none")
    if name in _CURVES:
        curve = _CURVES[name]
        weights = {m: curve(t, total, m) for t, m in enumerate(modules)}
    elif total in _COMPOSITION:
        table = _tables(total)[name]
        weights = {m: table.get(t, 0.0) for t, m in enumerate(modules)}
    else:
        raise ValueError(
            f"layers={name!r} is known for the {_XL} attention modules of SDXL and the {_V1} of"
            f" SD1.5; this model has {total}"
        )
    return {layer: 0.0 if m is None else weights[m] for layer, m in places.items()}


def _place(layer: str) -> Place | None:
    found = _MODULE.match(layer)
    if found is None:
        return None
    return _EXECUTED[found.group(1)], int(found.group(2) or 0), int(found.group(3))
