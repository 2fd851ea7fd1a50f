"""The Q-Former of BLIP-2: learned queries and a word read an image together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-12
HEAD_DIM = 64
VOCABULARY = 30523  # BERT's, with one more word
POSITIONS = 512


class Attention(nn.Module):
    """`LN(W_o softmax(q k^T / sqrt(64)) v + x)`, with biases; names as BERT has them."""

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(dim, dim),
                "key": nn.Linear(context, dim),
                "value": nn.Linear(context, dim),
            }
        )
        self.output = _output(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            self.self[name](y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        return _residual(self.output, out, x)


def _output(inner: int, dim: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, dim), "LayerNorm": nn.LayerNorm(dim, eps=_EPS)})


def _residual(output: nn.ModuleDict, inner: Tensor, x: Tensor) -> Tensor:
    result: Tensor = output["LayerNorm"](output["dense"](inner) + x)
    return result


class Layer(nn.Module):
    """Queries and words attend to each other; the queries then read the image; queries and words
    have feed-forwards of their own."""

    def __init__(self, dim: int, context: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(dim, dim)
        self.crossattention = Attention(dim, context)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, inner)})
        self.output = _output(inner, dim)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(dim, inner)})
        self.output_query = _output(inner, dim)

    def forward(self, x: Tensor, image: Tensor, queries: int) -> Tensor:
        x = self.attention(x, x)
        query, word = x[:, :queries], x[:, queries:]
        query = self.crossattention(query, image)
        query = _residual(self.output_query, F.gelu(self.intermediate_query["dense"](query)), query)
        word = _residual(self.output, F.gelu(self.intermediate["dense"](word)), word)
        return torch.cat((query, word), dim=1)


class QFormer(nn.Module):
    """Image features [R, S, context] and one fixed word to [R, queries, dim].

    Args:
        dim: width, in heads of 64 channels.
        context: width of the image features, which pass a LayerNorm first.
        queries: the number of learned queries, and of outputs.
        inner: width of the feed-forwards.
        depth: layers, each of which reads the image.
        word: the word's tokens in BERT's uncased vocabulary.

    Source: BLIP-2 (arXiv 2301.12597), as BLIP-Diffusion uses it (arXiv 2305.14720).
    """

    word: Tensor

    def __init__(
        self, dim: int, context: int, queries: int, inner: int, depth: int, word: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, queries, dim))
        self.ln_vision = nn.LayerNorm(context)
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(VOCABULARY, dim),
                "position_embeddings": nn.Embedding(POSITIONS, dim),
                "LayerNorm": nn.LayerNorm(dim, eps=_EPS),
            }
        )
        self.layers = nn.ModuleList(Layer(dim, context, inner) for _ in range(depth))
        ids = torch.tensor(word, device="cpu")  # real, also where the weights are not yet
        self.register_buffer("word", ids, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        image = self.ln_vision(image)
        places = torch.arange(self.word.numel(), device=self.word.device)
        words = self.embeddings["word_embeddings"](self.word)
        words = (words + self.embeddings["position_embeddings"](places))[None]
        x = self.embeddings["LayerNorm"](torch.cat((self.query_tokens, words), dim=1))
        x = x.expand(image.shape[0], -1, -1)
        queries = self.query_tokens.shape[1]
        for layer in self.layers:
            x = layer(x, image, queries)
        return x[:, :queries]
