"""The perceiver attention of image adapters, and the Resampler built of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._files import Tensors, size

HEAD_DIM = 64
DEPTH = 4
FF_MULT = 4


class PerceiverAttention(nn.Module):
    """Latents x read a context c: `softmax(q k^T / sqrt(D)) v W_o` with `q = W_q LN2(x)`.

    `[k, v] = W_kv LN1(c)`, or `W_kv [LN1(c); LN2(x)]` where the latents read themselves too. No
    projection has a bias. The softmax is fp32.

    Args:
        dim: width of the latents [R, M, dim] and of the result.
        context: width of the context [R, S, context].
        heads, head_dim: of the attention.
        own_keys: whether the latents are keys too; their width is then the context's.
    """

    def __init__(
        self, dim: int, context: int, heads: int, head_dim: int = HEAD_DIM, own_keys: bool = True
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.own_keys = heads, own_keys
        self.norm1 = nn.LayerNorm(context)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(context, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        context, latents = self.norm1(context), self.norm2(latents)
        source = torch.cat((context, latents), dim=-2) if self.own_keys else context
        key, value = (self.split(x) for x in self.to_kv(source).chunk(2, dim=-1))
        out = F.scaled_dot_product_attention(self.split(self.to_q(latents)), key, value)
        result: Tensor = self.to_out(out.transpose(1, 2).flatten(-2))
        return result

    def split(self, x: Tensor) -> Tensor:
        """[R, S, heads * D] to [R, heads, S, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def feed_forward(dim: int, mult: int = FF_MULT) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear; no biases in the Linears."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class Resampler(nn.Module):
    """Learned latents read the image: [R, S, embed] to tokens [R, M, out].

    `x = x + attention(W_in e, x)`, `x = x + feed_forward(x)`, four times; then `LN(W_out x)`.

    Args:
        embed: width of the encoder's tokens.
        dim: width of the latents.
        out: width of the tokens.
        queries: M, the number of latents.
        heads: of 64 channels each.

    Source: IP-Adapter (arXiv 2308.06721), the "plus" models; after Flamingo's resampler.
    """

    def __init__(self, embed: int, dim: int, out: int, queries: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_in = nn.Linear(embed, dim)
        self.proj_out = nn.Linear(dim, out)
        self.norm_out = nn.LayerNorm(out)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim, heads), feed_forward(dim)])
            for _ in range(DEPTH)
        )

    def forward(self, embeds: Tensor) -> Tensor:
        context = self.proj_in(embeds)
        latents = self.latents.expand(embeds.shape[0], -1, -1)
        for layer in self.layers:
            attend, mix = layer.children()
            latents = latents + attend(context, latents)
            latents = latents + mix(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


def resampler_of(
    tensors: Tensors, out: int, *, embed: int, dim: int, queries: int, heads: int
) -> Resampler:
    """A Resampler of the sizes that a file has, without weights.

    Args:
        tensors: the projector's part of the file.
        out: width of the tokens, which the host gives.
        embed, dim, queries, heads: the published sizes, for those that the file does not tell.
    """
    inner = size(
        tensors, heads * HEAD_DIM, *((f"layers.{i}.0.to_q.weight", 0) for i in range(DEPTH))
    )
    width = (("latents", 2), ("proj_in.weight", 0), ("proj_in.bias", 0), ("proj_out.weight", 1))
    with torch.device("meta"):
        return Resampler(
            embed=size(tensors, embed, ("proj_in.weight", 1)),
            dim=size(tensors, dim, *width),
            out=out,
            queries=size(tensors, queries, ("latents", 1)),
            heads=max(1, inner // HEAD_DIM),
        )
