"""Encoder methods written out from their papers, sharing no code with styleattn; and adapters with
random weights."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F


class Adapter:
    """Random tokens and projections for the layers of a model: [R, 8] to tokens [R, M, C].

    No image has tokens that are not zero, as where a projector has a bias.
    """

    def __init__(self, model, tokens=3, seed=0, only=("",)):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=0.4):
            return torch.randn(shape, generator=generator) * scale

        self.count = tokens
        layers = {
            name.removesuffix(".processor"): model.get_submodule(name.removesuffix(".processor"))
            for name in model.attn_processors
            if ".attn2." in name and name.startswith(tuple(only))
        }
        self.names = tuple(layers)
        self.width = model.config.cross_attention_dim
        self.weight, self.bias = draw(tokens * self.width, 8), draw(tokens * self.width)
        self.pairs = {
            name: (draw(attn.inner_dim, self.width), draw(attn.inner_dim, self.width))
            for name, attn in layers.items()
        }

    def tokens(self, embeds):
        weight, bias = self.weight.to(embeds), self.bias.to(embeds)
        return F.linear(embeds, weight, bias).unflatten(-1, (self.count, self.width))

    def negative(self, embeds):
        return torch.zeros_like(embeds)

    def key_value(self, layer, tokens):
        key, value = self.pairs[layer]
        return F.linear(tokens, key.to(tokens)), F.linear(tokens, value.to(tokens))

    def seen(self, embeds, unconditional):
        """[B, M, C]: what every row sees; the tokens of no image in unconditional ones."""
        blank = self.tokens(torch.zeros_like(embeds)[None])
        shown = self.tokens(embeds[None])
        return torch.cat([blank if u else shown for u in unconditional])


class Roles:
    """Adapters by role."""

    def __init__(self, **adapters):
        self.__dict__.update(adapters)


def embedding(seed):
    return torch.randn(8, generator=torch.Generator().manual_seed(100 + seed))


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_attention(query, key, value, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(query @ key.transpose(-1, -2) * scale, -1) @ value


def joined(*tensors):
    return torch.cat(tensors, 2)


def deadiff(query, text, image, w):
    """One softmax over the text and 16 (here: M) image tokens; w on keys and values alike."""
    (key, value), (ik, iv) = text, image
    return softmax_attention(query, joined(key, w * ik), joined(value, w * iv))


def decoupled(query, text, *images):
    """Every image (key, value, weight) in a softmax of its own."""
    out = softmax_attention(query, *text)
    for key, value, weight in images:
        out = out + weight * softmax_attention(query, key, value)
    return out


def cross_modal_adain(query, text, style):
    """Mean and unbiased standard deviation over the tokens, no epsilon; the style is not added."""
    t, s = softmax_attention(query, *text), softmax_attention(query, *style)
    normal = (t - t.mean(2, keepdim=True)) / t.std(2, keepdim=True)
    return normal * s.std(2, keepdim=True) + s.mean(2, keepdim=True)


def pulid(query, text, identity, zeros, ortho, scale):
    """Null keys are the projections of zero embeddings; sums run over the query tokens."""
    key, value = (F.pad(x, (0, 0, 0, zeros)) for x in identity)
    h, o = softmax_attention(query, *text), softmax_attention(query, key, value)
    along = (h * o).sum(2, keepdim=True) / (h * h).sum(2, keepdim=True) * h
    if ortho == "v1":
        o = o - along
    if ortho == "v2":
        seen = torch.softmax(query @ key.transpose(-1, -2), -1).mean(1)[:, :, :5].sum(-1)
        o = o + (seen[:, None, :, None] - 1) * along
    return h + scale * o


def aggregated(query, text, style, content=None):
    """The style's tokens replaced by their mean, as many times; the mean of the attentions."""
    style = tuple(x.mean(2, keepdim=True).expand_as(x) for x in style)
    sets = [(text,), (style,), (text, style)]
    if content is not None:
        sets = [(text,), (text, content), (text, style), (text, content, style)]
    outs = [softmax_attention(query, *map(joined, *s)) for s in sets]
    return sum(outs) / len(outs)


class CrossOracle:
    """An attention processor around a formula on query, (key, value) of the text and the layer.

    Args:
        rule: (name of the layer, query, (key, value)) to the output, all [B, H, N, D].
    """

    def __init__(self, name, rule):
        self.name, self.rule = name, rule

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = split(attn.to_q(hidden_states), attn.heads)
        text = split(attn.to_k(context), attn.heads), split(attn.to_v(context), attn.heads)
        out = self.rule(self.name, query, text).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@contextmanager
def written_out(model, rule, kind=".attn2."):
    """Within: the layers of a model compute a formula."""
    before = dict(model.attn_processors)
    names = {k: k.removesuffix(".processor") for k in before}
    model.set_attn_processor(
        {k: CrossOracle(names[k], rule) if kind in k else before[k] for k in before}
    )
    try:
        yield
    finally:
        model.set_attn_processor(before)


def pair(adapter, layer, tokens, heads):
    """Keys and values [B, H, M, D] of tokens at a layer."""
    return tuple(split(x, heads) for x in adapter.key_value(layer, tokens))


def masked(weight, query):
    """A mask on the grid of a layer whose tokens form a square."""
    side = math.isqrt(query.shape[2])
    return F.interpolate(weight[None, None], (side, side), mode="bicubic").flatten()[:, None]
