"""Blocks of FLUX by kind and depth, and what was measured of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RANGE = re.compile(r"(double|single)(?: (\d+(?:\.\d+)?|\.\d+)-(\d+(?:\.\d+)?|\.\d+))?")
_BLOCK = {"double": "transformer_blocks.", "single": "single_transformer_blocks."}

# By the numbers of double and single blocks. tiny-flux: docs/flux-presets.md.
_MEASURED: dict[tuple[int, int], dict[str, list[str]]] = {(2, 4): {"style": ["double 0-0.5"]}}


def is_depth(choice: object) -> bool:
    """Whether a choice of layers names blocks of FLUX by their depth."""
    return isinstance(choice, str) and _RANGE.fullmatch(choice) is not None


def layers_at(choice: str, attention: Sequence[str]) -> list[str]:
    """The layers of FLUX in the blocks of a kind, or in part of its depth.

    Block i of n stands at (i + 1/2) / n: "single 0-0.25" is the first quarter of the single blocks,
    "double" all double blocks.

    Args:
        choice: "double" or "single", and perhaps two fractions, from the first up to the second.
        attention: the attention layers of the model, in their order.

    Raises:
        ValueError: no such blocks, or fractions that select none.
    """
    found = _RANGE.fullmatch(choice)
    kind = found[1] if found else choice
    blocks = [name for name in attention if name.startswith(_BLOCK.get(kind, "?"))]
    if found is None or not blocks:
        raise ValueError(f"layers: {choice!r} names blocks of FLUX, and the model has none of them")
    start, end = (float(found[2]), float(found[3])) if found[2] else (0.0, 1.0)
    chosen = [b for i, b in enumerate(blocks) if start <= (i + 0.5) / len(blocks) < end]
    if not 0 <= start < end <= 1 or not chosen:
        raise ValueError(
            f"layers: {choice!r} selects none of the {len(blocks)} {kind} blocks; expected two"
            " fractions of their depth, the first below the second, within 0-1"
        )
    return chosen


def measured_blocks(preset: str, attention: Sequence[str]) -> list[str]:
    """The blocks that were measured to be a preset's, on a FLUX of this shape.

    Raises:
        ValueError: nothing was measured there, or it was not found.
    """
    double, single = (
        sum(name.startswith(start) for name in attention) for start in _BLOCK.values()
    )
    found = _MEASURED.get((double, single))
    if found is None:
        raise ValueError(
            f"layers={preset!r}: no preset has been measured for a FLUX of {double} double and"
            f" {single} single blocks: give weights per block, or a fraction of their depth such"
            " as 'double 0-0.5', which is style on tiny-flux; docs/flux-presets.md says how to"
            " measure a model"
        )
    if preset not in found:
        raise ValueError(
            f"layers={preset!r}: measured on tiny-flux, and no blocks of {preset} found; there is"
            f" {', '.join(found)}"
        )
    return found[preset]
