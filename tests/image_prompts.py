"""Image prompts written out: checkpoints as bare tensors, and cross-attention with them as its
formula, row by row. Shares no code with styleattn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

WIDTH = 24  # of the image embeddings
HIDDEN = 32  # of the encoder's tokens


def cross_layers(unet: Any) -> list[str]:
    """In the order in which diffusers counts its processors."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [name for name in names if name.endswith("attn2")]


def checkpoint(unet: Any, seed: int = 0, width: int = WIDTH, tokens: int = 4) -> dict[str, Any]:
    """A base IP-Adapter as `.bin` files have it."""
    g = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim
    pairs = {}
    for i, name in enumerate(cross_layers(unet)):
        inner = unet.get_submodule(name).to_k.out_features
        for part in "kv":
            made = torch.randn(inner, cross, generator=g) / cross**0.5
            pairs[f"{2 * i + 1}.to_{part}_ip.weight"] = 1.5 * made
    projection = {
        "proj.weight": torch.randn(tokens * cross, width, generator=g) / width**0.5,
        "proj.bias": 0.3 * torch.randn(tokens * cross, generator=g),
        "norm.weight": 1 + 0.1 * torch.randn(cross, generator=g),
        "norm.bias": 0.1 * torch.randn(cross, generator=g),
    }
    return {"image_proj": projection, "ip_adapter": pairs}


def flat(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The same under the names of `.safetensors` files."""
    return {f"{part}.{name}": x for part, inside in state.items() for name, x in inside.items()}


def embeds(seed: int, width: int = WIDTH) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(100 + seed))


def given(*images: Sequence[Tensor], guided: bool = True) -> list[Tensor]:
    """`ip_adapter_image_embeds`: for every adapter its images, one prompt; zeros first."""
    stacked = [torch.stack(list(each))[None] for each in images]
    return [torch.cat([torch.zeros_like(x), x]) if guided else x for x in stacked]


def encoder(seed: int = 5, width: int = WIDTH) -> Any:
    """A CLIP vision tower of random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=width,
    )
    return CLIPVisionModelWithProjection(config).eval()


def extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def picture(seed: int = 0, size: tuple[int, int] = (48, 36)) -> Image.Image:
    g = torch.Generator().manual_seed(seed)
    small = (torch.rand(4, 5, 3, generator=g) * 255).byte().numpy()
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@dataclass
class Shown:
    """Images in one softmax.

    Args:
        state: the checkpoint.
        rows: for every row of the UNet call, its embeddings; none where the row sees no image.
        weight: a number, or a function without arguments that gives it.
        mask: [h, w], or None.
        layers: factors by prefix of the layer's name; None is 1 everywhere.
    """

    state: Mapping[str, Any]
    rows: Sequence[Sequence[Tensor]]
    weight: float | Callable[[], float] = 1.0
    mask: Tensor | None = None
    layers: Mapping[str, float] | None = None

    def factor(self, layer: str) -> float:
        weight = self.weight() if callable(self.weight) else self.weight
        if self.layers is None:
            return weight
        return weight * next((f for p, f in self.layers.items() if layer.startswith(p + ".")), 0.0)

    def tokens(self, row: int) -> Tensor | None:
        p, found = self.state["image_proj"], []
        for e in self.rows[row]:
            x = (p["proj.weight"] @ e + p["proj.bias"]).reshape(-1, p["norm.weight"].numel())
            mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
            found.append((x - mean) / (var + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"])
        return torch.cat(found) if found else None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H, N, D] x [H, M, D]: dense."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def small(mask: Tensor, tokens: int) -> Tensor:
    """A mask on the square grid of a layer."""
    side = round(tokens**0.5)
    return F.interpolate(mask[None, None].float(), (side, side), mode="bicubic").flatten()


class Written:
    """A cross-attention processor: the text, and after it every image prompt."""

    def __init__(self, index: int, name: str, shown: Sequence[Shown]):
        self.index, self.name, self.shown = index, name, shown

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        x, text, residual = hidden_states, encoder_hidden_states, hidden_states

        def split(y):
            return y.reshape(y.shape[0], attn.heads, -1).permute(1, 0, 2)

        out = []
        for row in range(x.shape[0]):
            q = split(attn.to_q(x[row]))
            total = attend(q, split(attn.to_k(text[row])), split(attn.to_v(text[row])))
            for shown in self.shown:
                tokens, factor = shown.tokens(row), shown.factor(self.name)
                if tokens is None or factor == 0:
                    continue
                pairs = shown.state["ip_adapter"]
                key, value = (
                    split(tokens @ pairs[f"{2 * self.index + 1}.to_{p}_ip.weight"].T) for p in "kv"
                )
                part = factor * attend(q, key, value)
                if shown.mask is not None:
                    part = part * small(shown.mask, q.shape[1])[None, :, None]
                total = total + part
            out.append(total.permute(1, 0, 2).flatten(1))
        y = attn.to_out[0](torch.stack(out))
        if attn.residual_connection:
            y = y + residual
        return y / attn.rescale_output_factor


@contextlib.contextmanager
def written(unet: Any, shown: Sequence[Shown]) -> Any:
    """Within: every cross-attention layer is the formula."""
    before = []
    for i, name in enumerate(cross_layers(unet)):
        attn = unet.get_submodule(name)
        before.append((attn, attn.processor))
        attn.processor = Written(i, name, shown)
    try:
        yield
    finally:
        for attn, processor in before:
            attn.processor = processor
