"""Trials of a style method on the embedded models: held-out references, and what to draw in their
style."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import Reference, drawing
from .drawings import CONTENTS, STYLES

PER_REFERENCE = 4


@dataclass(frozen=True)
class Trial:
    """One reference and the contents to draw in its style, none of them the reference's own."""

    seed: int
    reference: Reference
    contents: tuple[str, ...]

    @property
    def prompts(self) -> list[str]:
        return [f"a {content}" for content in self.contents]

    @property
    def seeds(self) -> range:
        """One for each picture."""
        return range(self.seed, self.seed + len(self.contents))

    @property
    def styled_prompt(self) -> str:
        """What would draw the reference."""
        style = self.reference.style
        words = f"{style.texture} {style.palette} {style.edge}"
        return f"{self.reference.prompt}, {words}"


def trials(count: int, seed: int = 20_000) -> list[Trial]:
    """References and contents for `count` pictures, from seeds that training never saw."""
    rng = np.random.default_rng([seed, 0, 1])
    found = []
    for index in range(count // PER_REFERENCE):
        style = STYLES[rng.integers(len(STYLES))]
        content, *others = rng.permutation(CONTENTS).tolist()
        reference = Reference(drawing(content, style, seed + index), content, style)
        found.append(Trial(seed + 100 * index, reference, tuple(others[:PER_REFERENCE])))
    return found
