"""The attention-injection methods written out from their papers as processors of their own, sharing
no code with styleattn; rows of every chunk are [references..., images...]."""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F


def softmax_attention(q, k, v, temperature=1.0):
    """[H, N, D] x [H, M, D]: dense."""
    logits = temperature * q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2))
    return logits.softmax(-1) @ v


def style_id(gamma=0.75, temperature=1.5):
    """Rows: content, style, images."""

    def rule(q, k, v, row, start, uncond):
        if row < 2:
            return softmax_attention(q[start + row], k[start + row], v[start + row])
        blended = gamma * q[start] + (1 - gamma) * q[start + row]
        return softmax_attention(blended, k[start + 1], v[start + 1], temperature)

    return rule


def swap(q, k, v, row, start, uncond):
    """Rows: reference, images. Visual Style Prompting and MasaCtrl: the reference's K and V."""
    return softmax_attention(q[start + row], k[start], v[start])


def z_star(style=1.2, content=1.5):
    """Rows: style, one image. Both look at both, in a joint softmax with scaled cross logits."""

    def rule(q, k, v, row, start, uncond):
        mine, other = start + row, start + 1 - row
        factor = content if row == 0 else style
        logits = (
            torch.cat([factor * (q[mine] @ k[other].mT), q[mine] @ k[mine].mT], -1)
            * q.shape[-1] ** -0.5
        )
        return logits.softmax(-1) @ torch.cat([v[other], v[mine]], -2)

    return rule


def cross_image(contrast=1.67, structure=False):
    """Rows: structure, appearance, images."""

    def rule(q, k, v, row, start, uncond):
        if row < 2:
            return softmax_attention(q[start + row], k[start + row], v[start + row])
        there = start if structure else start + 1
        p = (q[start + row] @ k[there].mT * q.shape[-1] ** -0.5).softmax(-1)
        mean = p.mean(-1, keepdim=True)
        return ((p - mean) * contrast + mean).clip(0, 1) @ v[there]

    return rule


def reference_only(fidelity=0.5):
    """Rows: reference, images."""

    def rule(q, k, v, row, start, uncond):
        here = start + row
        own = softmax_attention(q[here], k[here], v[here])
        if row == 0:
            return own
        joint_k, joint_v = (torch.cat([x[here], x[start]], -2) for x in (k, v))
        joint = softmax_attention(q[here], joint_k, joint_v)
        return fidelity * own + (1 - fidelity) * joint if uncond else joint

    return rule


class Processor:
    """Plain attention whose rows are computed one by one by a rule."""

    def __init__(self, rule, chunks):
        self.rule, self.chunks = rule, chunks

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        residual, x = hidden_states, hidden_states
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            layer(x).reshape(*x.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        count = x.shape[0] // self.chunks
        out = [
            self.rule(q, k, v, row, chunk * count, self.chunks > 1 and chunk == 0)
            for chunk in range(self.chunks)
            for row in range(count)
        ]
        y = attn.to_out[0](torch.stack(out).permute(0, 2, 1, 3).flatten(2))
        if residual.ndim == 4:
            y = y.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            y = y + residual
        return y / attn.rescale_output_factor


@contextlib.contextmanager
def styled(unet, rules, chunks=2):
    """Within: the layers whose names start with a key of `rules` follow its rule."""
    before, count = dict(unet.attn_processors), 0
    after = dict(before)
    for name in before:
        for prefix, rule in rules.items():
            if name.startswith(prefix) and ".attn1." in name:
                after[name], count = Processor(rule, chunks), count + 1
    if not count:
        raise ValueError(f"no layer starts with any of {list(rules)}")
    unet.set_attn_processor(after)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def adain(x, style, axes=(2, 3)):
    """Latents [n, C, h, w] with the channel statistics of others."""
    mean, std = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
    return (x - mean) / std * style.std(axes, keepdim=True) + style.mean(axes, keepdim=True)


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)
