"""Blocks of FLUX by kind and depth, and what was measured of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RANGE = re.compile(r"(double|single)(?: (\d+(?:\.\d+)?|\.\d+)-(\d+(?:\.\d+)?|\.\d+))?")
_BLOCK = {"double": "transformer_blocks.", "single": "single_transformer_blocks."}


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
