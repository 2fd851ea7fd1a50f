"""What the IP-Adapters of the embedded models share: a picture encoder, an adapter, and what is
trained of them.

The encoder has two layers on the 8 x 8 patches of a drawing; its pooled output becomes a few
tokens, and attention layers of a model that stays as it is attend to them next to what they attend
to anyway.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from styleattn.adapters import ImageAdapter

from . import load
from .drawings import CONTENTS, EDGES, PALETTES, SIZE, TEXTURES

WIDTH = 64
READ = (CONTENTS, TEXTURES, PALETTES, EDGES)
"""What the heads read, in their order."""
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 4,
}
"""The encoder's configuration."""


class ImagePrompts(nn.Module):
    """What is trained: pictures [B, 3, 32, 32] in -1..1 to an embedding and image tokens
    [B, M, C]; and the heads that read from the embedding what a picture shows, which make it tell
    contents and styles apart, as encoders that were trained before do."""

    def __init__(self, encoder: nn.Module, adapter: ImageAdapter) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in READ)

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """The encoder's output [B, 64] that the adapter takes."""
        about = self.adapter.encoder
        mean, std = (torch.tensor(x)[:, None, None] for x in (about.mean, about.std))
        seen = self.encoder(((pictures + 1) / 2 - mean) / std)
        embeds: torch.Tensor = seen.image_embeds if about.output == "embeds" else seen.pooler_output
        return embeds

    def tokens(self, embeds: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The tokens; where `seen` [B] is 0, those of no picture, an embedding of zeros."""
        return self.adapter.tokens(embeds * seen[:, None])

    def misread(self, embeds: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of what the heads read, summed over them; classes [B, heads]."""
        losses = [
            F.cross_entropy(head(embeds), truth)
            for head, truth in zip(self.heads, classes.T, strict=True)
        ]
        return torch.stack(losses).sum()


@dataclass
class Shown:
    """The image tokens that the model attends to; None for none."""

    tokens: torch.Tensor | None = None


@dataclass
class Batch:
    """Drawings [B, 3, 32, 32] in -1..1, noise [B, 3072], noise levels 0..1, prompts; the pictures
    shown, their classes [B, 4] in the order of `READ`, and which rows see theirs."""

    drawn: torch.Tensor
    noise: torch.Tensor
    levels: torch.Tensor
    prompts: list[str]
    pictures: torch.Tensor
    classes: torch.Tensor
    seen: torch.Tensor


class Host(ABC):
    """An embedded model, as it is in the package, that is shown pictures."""

    model: ClassVar[str]

    def __init__(self) -> None:
        self.pipe = load(self.model)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.shown = Shown()

    @staticmethod
    @abstractmethod
    def new_prompts() -> ImagePrompts:
        """What is to be trained, with weights drawn at random."""

    @staticmethod
    @abstractmethod
    def places(adapter: ImageAdapter) -> dict[str, tuple[str, str]]:
        """The prefixes of the key and the value projection of every layer in a published file."""

    @abstractmethod
    def begin(self, prompts: ImagePrompts) -> None:
        """Let the model see `shown` by way of the adapter; with no tokens the result is that of
        the plain model. Called once, before weights that were saved are read."""

    @abstractmethod
    def loss(self, batch: Batch, detail: float) -> torch.Tensor:
        """The error of what the model makes of the noisy drawings, and `detail` times that of its
        fine structure alone."""

    def compile(self) -> None:
        """Run the model's blocks through `torch.compile`.

        Raises:
            ValueError: not for this model.
        """
        raise ValueError(f"{self.model} is not trained compiled")


def save_image_prompts(model: ImagePrompts, places: dict[str, tuple[str, str]], out: Path) -> None:
    """Write `adapter.safetensors`, named as published files are and in half precision, and the
    encoder to `image_encoder/`, in single precision and named as published models are."""
    out.mkdir(parents=True, exist_ok=True)
    names = model.adapter.file_names("image_proj.", places)
    tensors = {names[name]: t.half().contiguous() for name, t in model.adapter.state_dict().items()}
    save_file(tensors, out / "adapter.safetensors", metadata={"format": "pt"})
    folder = out / "image_encoder"
    encoder: Any = model.encoder
    encoder.save_pretrained(str(folder), safe_serialization=True)
    weights = folder / "model.safetensors"
    found = load_file(weights)
    if not any(name.startswith("vision_model.") for name in found):  # as transformers 5 saves it
        outside = ("visual_projection.",)
        found = {
            name if name.startswith(outside) else f"vision_model.{name}": tensor
            for name, tensor in found.items()
        }
        save_file(found, weights, metadata={"format": "pt"})
