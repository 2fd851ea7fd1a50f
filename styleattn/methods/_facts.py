"""What a person wants to know before choosing a method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """A method at a glance.

    Args:
        paper: title or short name, and where to find it.
        modality: what drives it: "text", "image", or both.
        route: "encoder", "inversion" or "attention", and combinations.
        shots: "zero-shot" where nothing is trained for a style, "few-shot" otherwise.
        hosts: the models it runs on here.
        needs: what the user has to bring.
        weights: weights of its own and their licence; "none" where it has none.
    """

    paper: str
    modality: str
    route: str
    needs: str
    weights: str = "none"
    shots: str = "zero-shot"
    hosts: str = "SD 1.x, SD 2.x, SDXL"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)
