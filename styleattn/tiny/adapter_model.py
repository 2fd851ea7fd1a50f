"""The parts of `tiny-flux`'s IP-Adapter: a picture encoder, and an adapter of InstantX's layout for
all blocks of the transformer.

The encoder is a SigLIP of two layers on the 8 x 8 patches of a drawing; its pooled output becomes a
few tokens, and every block attends to them next to its own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from styleattn.adapters import ImageAdapter
from styleattn.adapters._adapter import KeyValue, siglip
from styleattn.adapters.flux_ip_adapter import MlpProjection

from .drawings import CONTENTS, EDGES, PALETTES, SIZE, TEXTURES
from .flux_model import T5_WIDTH, TRANSFORMER
from .flux_sharing import projected, rotated

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

WIDTH, INNER, TOKENS = 64, 128, 8
READ = (CONTENTS, TEXTURES, PALETTES, EDGES)
"""What the heads read, in their order."""
_HEAD_DIM = TRANSFORMER["attention_head_dim"]
_CHANNELS = TRANSFORMER["num_attention_heads"] * _HEAD_DIM


def new_image_encoder() -> SiglipVisionModel:
    """A SigLIP picture encoder with two layers, for pictures [B, 3, 32, 32] in -1..1."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=4,
        )
    )


def block_names() -> list[str]:
    """The attention layers of `tiny-flux` in the order of InstantX's files."""
    double, single = TRANSFORMER["num_layers"], TRANSFORMER["num_single_layers"]
    return [
        *(f"transformer_blocks.{i}.attn" for i in range(double)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(single)),
    ]


def new_adapter() -> ImageAdapter:
    """An adapter of InstantX's layout with weights drawn at random."""
    return ImageAdapter(
        "flux-instantx",
        siglip(WIDTH, "pooled"),
        MlpProjection(WIDTH, INNER, T5_WIDTH, TOKENS),
        {name: KeyValue(_CHANNELS, T5_WIDTH, rms_dim=_HEAD_DIM) for name in block_names()},
    )


class ImagePrompts(nn.Module):
    """What is trained: pictures [B, 3, 32, 32] in -1..1 to an embedding and image tokens
    [B, M, C]; and the heads that read from the embedding what a picture shows, which make it tell
    contents and styles apart, as encoders that were trained before do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = new_image_encoder()
        self.adapter = new_adapter()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(names)) for names in READ)

    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """The encoder's pooled output [B, 64]."""
        embeds: torch.Tensor = self.encoder(pictures).pooler_output
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
    """The image tokens that all blocks attend to; None for none."""

    tokens: torch.Tensor | None = None


class ImagePromptProcessor:
    """FLUX attention with image tokens in a softmax of their own, before the output projection:

        out = Attn(Q, K, V) + Attn(Q', rms(T W_k), rms(T W_v))

    with Q' normed and not rotated: of the image in double blocks, of all tokens in single ones.
    """

    def __init__(self, shown: Shown, pair: nn.Module) -> None:
        self.shown, self.pair = shown, pair

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = projected(attn, hidden_states, encoder_hidden_states)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        output = F.scaled_dot_product_attention(
            rotated(query, image_rotary_emb), rotated(key, image_rotary_emb), value
        )
        if self.shown.tokens is not None:
            shown_key, shown_value = (
                x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
                for x in self.pair(self.shown.tokens)
            )
            added = F.scaled_dot_product_attention(query[:, :, text:], shown_key, shown_value)
            output = output + F.pad(added, (0, 0, text, 0))
        output = output.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        image = attn.to_out[1](attn.to_out[0](output[:, text:]))
        return image, attn.to_add_out(output[:, :text])


def show_pictures(transformer: Any, adapter: ImageAdapter, shown: Shown) -> None:
    """Let the attention of the transformer see `shown`; with no tokens the result is that of the
    plain transformer."""
    names = [name.removesuffix(".processor") for name in transformer.attn_processors]
    pairs = {name: adapter.pairs[adapter.names.index(name)] for name in names}
    transformer.set_attn_processor(
        {f"{name}.processor": ImagePromptProcessor(shown, pair) for name, pair in pairs.items()}
    )


def save_image_prompts(model: ImagePrompts, out: Path) -> None:
    """Write `adapter.safetensors`, named as InstantX's file and in half precision, and the encoder
    to `image_encoder/`, in single precision and named as published SigLIP models are."""
    out.mkdir(parents=True, exist_ok=True)
    adapter = model.adapter
    places = {
        name: (f"ip_adapter.{index}.to_k_ip.", f"ip_adapter.{index}.to_v_ip.")
        for index, name in enumerate(adapter.names)
    }
    names = adapter.file_names("image_proj.", places)
    tensors = {names[name]: t.half().contiguous() for name, t in adapter.state_dict().items()}
    save_file(tensors, out / "adapter.safetensors", metadata={"format": "pt"})
    folder = out / "image_encoder"
    model.encoder.save_pretrained(str(folder), safe_serialization=True)
    weights = folder / "model.safetensors"
    found = load_file(weights)
    if not any(name.startswith("vision_model.") for name in found):  # as transformers 5 saves it
        found = {f"vision_model.{name}": tensor for name, tensor in found.items()}
        save_file(found, weights, metadata={"format": "pt"})
