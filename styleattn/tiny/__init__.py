"""`tiny-sdxl` and `tiny-flux`, a Stable Diffusion XL and a FLUX.1 of a few megabytes that ship in
this package, their drawings and their measure.

The models draw the things of `CONTENTS` in the styles of `STYLES`, 32 x 32 pixels, and nothing
else. They need no network and no GPU. Importing this module loads neither diffusers nor
transformers; `load` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .drawings import CONTENTS, EDGES, PALETTES, SIZE, STYLES, TEXTURES, Style, draw, style_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ADAPTERS",
    "CONTENTS",
    "EDGES",
    "MODELS",
    "PALETTES",
    "SIZE",
    "STYLES",
    "TEXTURES",
    "Reference",
    "Style",
    "adapter_path",
    "draw",
    "drawing",
    "load",
    "path",
    "prompts",
    "references",
    "style_of",
]

MODELS = ("tiny-sdxl", "tiny-flux")
ADAPTERS = ("tiny-flux",)
"""The models that have an image adapter."""
# Drawings for training come from generators seeded [seed, step]; these have a third number and so
# are never among them.
_HELD_OUT = 1_000_003
_REFERENCES = (
    ("house", "checker ocean inked"),
    ("heart", "rows candy bare"),
    ("boat", "diagonal ember glowing"),
    ("star", "dots forest inked"),
    ("tree", "columns desert glowing"),
    ("moon", "plain mono inked"),
)


@dataclass(frozen=True)
class Reference:
    """A picture to take a style from: what it shows, in which style, and the prompt that names its
    content."""

    image: Image
    content: str
    style: Style

    @property
    def prompt(self) -> str:
        return f"a {self.content}"

    @property
    def name(self) -> str:
        """Content and style in words, "house, checker ocean inked"."""
        return f"{self.content}, {self.style.texture} {self.style.palette} {self.style.edge}"


def path(name: str = "tiny-sdxl") -> Path:
    """The directory of an embedded model, as `DiffusionPipeline.from_pretrained` takes it.

    Raises:
        ValueError: there is no model of this name.
        FileNotFoundError: the installed package lacks the weights.
    """
    if name not in MODELS:
        raise ValueError(f"styleattn.tiny has no model {name!r}; it has {', '.join(MODELS)}")
    found = Path(__file__).resolve().parent / "weights" / name
    if not (found / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the weights of {name} are missing from this installation: {found}"
        )
    return found


def adapter_path(name: str = "tiny-flux") -> Path:
    """The folder of an embedded model's IP-Adapter: `adapter.safetensors`, and its picture encoder
    in `image_encoder/`.

    Raises:
        ValueError: the model has none.
        FileNotFoundError: the installed package lacks the weights.
    """
    if name not in ADAPTERS:
        raise ValueError(f"styleattn.tiny has no adapter for {name!r}, only for {ADAPTERS[0]}")
    found = Path(__file__).resolve().parent / "weights" / f"{name}-ip-adapter"
    if not (found / "adapter.safetensors").is_file():
        raise FileNotFoundError(f"the adapter of {name} is missing from this installation: {found}")
    return found


def load(name: str = "tiny-sdxl", dtype: torch.dtype = torch.float32) -> Any:
    """Load an embedded model from the package, a `StableDiffusionXLPipeline` or a `FluxPipeline`;
    nothing is looked up on the network.

    `tiny-flux` draws at 32 x 32 unless it is told otherwise; its T5 wants `max_sequence_length=16`.

    Args:
        dtype: the weights are stored in fp16; CPUs want float32.

    Raises:
        ValueError: there is no model of this name.
        FileNotFoundError: the installed package lacks the weights.
    """
    import diffusers

    flux = name == "tiny-flux"
    options = {} if flux else {"add_watermarker": False}
    kind = diffusers.FluxPipeline if flux else diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(
        str(path(name)), local_files_only=True, use_safetensors=True, **options
    )
    if flux:
        pipe.default_sample_size = SIZE // pipe.vae_scale_factor  # FluxPipeline assumes 128
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)


def drawing(content: str, style: Style | str, seed: int = 0) -> Image:
    """A drawing that was not trained on, as a 32 x 32 picture; `style` is a `Style` or its words,
    "checker ocean inked".

    Raises:
        ValueError: the content or a word of the style is not known.
    """
    from PIL import Image

    return Image.fromarray(draw(content, style, np.random.default_rng([seed, 0, _HELD_OUT])))


def references() -> list[Reference]:
    """A handful of reference pictures in styles that differ in texture and palette."""
    return [
        Reference(drawing(content, words, seed), content, style_of(words))
        for seed, (content, words) in enumerate(_REFERENCES)
    ]


def prompts() -> list[str]:
    """One prompt for each content."""
    return [f"a {content}" for content in CONTENTS]
