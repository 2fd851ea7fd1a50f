"""StyleAligned as its authors formulate it, for whole diffusers UNets: AdaIN passes, concatenated
keys, full logits, concatenated
maps under GroupNorm. Shares no code with styleattn; written from the paper and from the
specification of the released code."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass
class Args:
    share_group_norm: bool = True
    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    full_attention_share: bool = False
    shared_score_scale: float = 1.0
    shared_score_shift: float = 0.0
    only_self_level: float = 0.0


def first_of_half(x, halves, scale=1.0):
    """The first row of every half, once per row of the half; all but the first scaled."""
    parts = []
    for half in x.chunk(halves):
        parts += [half[0], *(half[0] * scale for _ in range(len(half) - 1))]
    return torch.stack(parts)


def adain(x, halves):
    """x [B, H, N, D] to the statistics over N of its half's first row."""

    def stats(y):
        return y.mean(dim=-2, keepdim=True), (y.var(dim=-2, keepdim=True) + 1e-5).sqrt()

    mean, std = stats(x)
    mean_r, std_r = stats(first_of_half(x, halves))
    return (x - mean) / std * std_r + mean_r


class Processor:
    """Replaces every processor of a self-attention layer."""

    def __init__(self, args, halves):
        self.args, self.halves = args, halves

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        args, residual, shape = self.args, hidden_states, hidden_states.shape
        x = hidden_states
        if args.full_attention_share:
            x = x.reshape(self.halves, -1, shape[-1])
        q, k, v = (
            f(x).unflatten(-1, (attn.heads, -1)).permute(0, 2, 1, 3)
            for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        tokens = k.shape[-2]
        if not args.full_attention_share:
            q = adain(q, self.halves) if args.adain_queries else q
            k = adain(k, self.halves) if args.adain_keys else k
            v = adain(v, self.halves) if args.adain_values else v
            if args.share_attention:
                k = torch.cat([k, first_of_half(k, self.halves, args.shared_score_scale)], dim=-2)
                v = torch.cat([v, first_of_half(v, self.halves)], dim=-2)
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        if args.share_attention and not args.full_attention_share:
            logits[..., tokens:] += args.shared_score_shift
        out = torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v)
        out = out.permute(0, 2, 1, 3).flatten(2).reshape(shape)
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


def self_only(level, total):
    """The layers that `only_self_level` leaves alone."""
    if level == 0:
        return set()
    if level == 1:
        return set(range(total))
    below = level if level <= 0.5 else 1 - level
    count = int(below * total)
    chosen = {i for i in range(total) if count and i % (total // count) == 0}
    return chosen if level <= 0.5 else set(range(total)) - chosen


@contextlib.contextmanager
def styled(unet, args, halves=2):
    """The UNet under the official formulation; as before afterwards."""
    names = [n for n in unet.attn_processors if n.endswith("attn1.processor")]
    plain = self_only(args.only_self_level, len(names))
    before, forwards = [], []
    for i, name in enumerate(names):
        attn = unet.get_submodule(name.removesuffix(".processor"))
        before.append((attn, attn.processor))
        if i not in plain:
            attn.processor = Processor(args, halves)
    for norm in unet.modules():
        if args.share_group_norm and isinstance(norm, torch.nn.GroupNorm):
            forwards.append(norm)
            norm.forward = _concatenated(norm.forward, halves)
    try:
        yield unet
    finally:
        for attn, processor in before:
            attn.processor = processor
        for norm in forwards:
            del norm.forward


def _concatenated(forward, halves):
    def shared(x):
        height = x.shape[-2]
        return forward(torch.cat([x, first_of_half(x, halves)], dim=-2))[..., :height, :]

    return shared
