"""Joint attention written out densely: one score matrix per layer, with what a method adds to keys,
values and biases. Shares no code with styleattn."""

from __future__ import annotations

import contextlib

import torch


def turn(x, rotary):
    """Rotary positions as complex numbers: a pair of neighbouring channels times e^(i angle)."""
    cos, sin = (t[..., ::2].to(x.dtype) for t in rotary)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def to_statistics_of(x, rows, eps=1e-5):
    """Every row with the token statistics of another row; rows[b] == b: as it is."""
    mean, std = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + eps).sqrt()
    other = (x - mean) / std * std[rows] + mean[rows]
    keep = torch.tensor([r == b for b, r in enumerate(rows)])
    return torch.where(keep[:, None, None, None], x, other)


def tokens_at(latents, offset=(0, 0)):
    """The tokens [1, M, 4 C] of a picture's latents [C, h, w], and their places [M, 3]."""
    channels, height, width = latents.shape
    cells = latents.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    rows = torch.arange(height // 2).repeat_interleave(width // 2) + offset[0]
    columns = torch.arange(width // 2).repeat(height // 2) + offset[1]
    places = torch.stack([torch.zeros_like(rows), rows, columns], 1)
    return cells.reshape(1, -1, 4 * channels), places.float()


class Dense:
    """A processor: `edit(layer, q, k, v, rotary, text)` gives rotated q [B, H, L, D], k, v
    [B, H, M, D] and a bias [B, 1 or H, L, M], or the output [B, H, L, D] itself; q, k, v come
    unrotated, text tokens first."""

    def __init__(self, layer, edit, text):
        self.layer, self.edit, self.text = layer, edit, text

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        text = encoder_hidden_states
        if text is not None:
            tq, tk, tv = (
                heads(f(text)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = torch.cat([tq, q], 2), torch.cat([tk, k], 2), torch.cat([tv, v], 2)
        count = self.text if text is None else text.shape[1]
        found = self.edit(self.layer, q, k, v, image_rotary_emb, count)
        if isinstance(found, tuple):
            q, k, v, bias = found
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
            found = logits.softmax(-1) @ v
        out = found.transpose(1, 2).flatten(2)
        if text is None:
            return out
        return attn.to_out[0](out[:, count:]), attn.to_add_out(out[:, :count])


@contextlib.contextmanager
def densely(transformer, edit, text):
    """The transformer with dense processors; `text` is the length of the text stream."""
    before = transformer.attn_processors
    made = {n: Dense(i, edit, text) for i, n in enumerate(before)}
    transformer.set_attn_processor(dict(made))
    try:
        yield
    finally:
        transformer.set_attn_processor(dict(before))


def style_aligned(
    queries=True,
    keys=True,
    values=False,
    share=True,
    scale=1.0,
    shift=0.0,
    full=False,
    layers=None,
    reference=0,
    weight=1.0,
    mask=None,
):
    """StyleAligned on the image tokens of joint attention, after their rotation; one reference row.

    Keys and values of the reference's image tokens stand behind the row's own; they are what the
    row's text and image queries see besides. `mask` [N]: the share that each image token sees.
    """

    def edit(layer, q, k, v, rotary, text):
        q, k = turn(q, rotary), turn(k, rotary)
        batch, _, length, _ = q.shape
        rows = [reference] * batch
        bias = torch.zeros(batch, 1, length, length)
        if layers is not None and layer not in layers:
            return q, k, v, bias
        image = slice(text, None)

        def aligned(x):
            x = x.clone()
            x[:, :, image] = to_statistics_of(x[:, :, image], rows)
            return x

        if full:
            others = []
            for b in range(batch):
                bias = torch.cat([bias, bias.new_zeros(batch, 1, length, length - text)], -1)
                bias[b, ..., -(length - text) :] = -torch.inf
                others.append(b)
            k = torch.cat(
                [k, *(k[b : b + 1, :, image].expand(batch, -1, -1, -1) for b in others)], 2
            )
            v = torch.cat(
                [v, *(v[b : b + 1, :, image].expand(batch, -1, -1, -1) for b in others)], 2
            )
            return q, k, v, bias
        q = aligned(q) if queries else q
        k = aligned(k) if keys else k
        v = aligned(v) if values else v
        if not share:
            return q, k, v, bias
        more = torch.full((batch, 1, length, length - text), shift + torch.tensor(weight).log())
        if mask is not None:
            more[:, :, :text] += mask.mean().log()
            more[:, :, text:] += mask.log()[:, None]
        more[reference] = -torch.inf
        theirs = k[rows][:, :, image] * scale
        return (
            q,
            torch.cat([k, theirs], 2),
            torch.cat([v, v[rows][:, :, image]], 2),
            torch.cat([bias, more], -1),
        )

    return edit


def angles(ids, axes=(4, 4, 8), theta=10000.0):
    """cos and sin [N, D] of positions [N, 3], in float64."""
    parts = []
    for axis, dim in enumerate(axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(ids[:, axis : axis + 1].double() * frequency)
    angle = torch.cat(parts, 1).repeat_interleave(2, 1)
    return angle.cos(), angle.sin()


def aligned_gen(
    grid, queries=True, keys=True, offset=(0, 1), scale=1.1, layers=(2, 3), reference=0
):
    """AlignedGen on a grid of image tokens: AdaIN before the rotation, the reference's keys moved.

    `scale`: a number, or a function of the number of the layer call.
    """
    calls = []

    def edit(layer, q, k, v, rotary, text):
        batch, _, length, _ = q.shape
        number = scale(len(calls)) if callable(scale) else scale
        calls.append(layer)
        bias = torch.zeros(batch, 1, length, length)
        if layer not in layers:
            return turn(q, rotary), turn(k, rotary), v, bias
        rows = [reference] * batch
        image = slice(text, None)
        theirs = k[rows][:, :, image]
        q, k = q.clone(), k.clone()
        if queries:
            q[:, :, image] = to_statistics_of(q[:, :, image], rows)
        if keys:
            k[:, :, image] = to_statistics_of(k[:, :, image], rows)
        ids = torch.zeros(*grid, 3)
        ids[..., 1] = torch.arange(grid[0])[:, None] + offset[0] * grid[0]
        ids[..., 2] = torch.arange(grid[1])[None] + offset[1] * grid[1]
        theirs = turn(theirs, angles(ids.flatten(0, 1))) * number
        more = torch.zeros(batch, 1, length, length - text)
        more[reference] = -torch.inf
        return (
            turn(q, rotary),
            torch.cat([turn(k, rotary), theirs], 2),
            torch.cat([v, v[rows][:, :, image]], 2),
            torch.cat([bias, more], -1),
        )

    return edit
