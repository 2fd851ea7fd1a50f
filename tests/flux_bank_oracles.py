"""Runs of FLUX whose first rows are pictures on their trajectories, as a loop of its own, and the
injection methods written out row by row. Shares no code with styleattn."""

from __future__ import annotations

import numpy as np
import torch
from flux_oracles import densely, turn


def attend(q, k, v, factors=None):
    """[H, L, D] x [H, M, D]: dense, the logits times a factor per key."""
    logits = q.shape[-1] ** -0.5 * (q @ k.transpose(-1, -2))
    return (logits if factors is None else logits * factors).softmax(-1) @ v


class Injection:
    """Image queries of ordinary rows under `rule(q, k, v, row, text, unconditional)` -> [H, N, D];
    all else as ever.

    `share`: of the rule's output, the rest is the row's own; a number, or [N] of the image tokens.
    """

    def __init__(self, rule, references, layers=(2, 3), share=1.0):
        self.rule, self.references, self.layers, self.share = rule, references, layers, share
        self.unconditional = False

    def __call__(self, layer, q, k, v, rotary, text):
        q, k = turn(q, rotary), turn(k, rotary)
        out = torch.stack([attend(*row) for row in zip(q, k, v, strict=True)])
        if layer not in self.layers:
            return out
        share = torch.as_tensor(self.share).reshape(1, -1, 1)
        for row in range(self.references, len(q)):
            own = out[row, :, text:].clone()
            ruled = self.rule(q, k, v, row, text, self.unconditional)
            out[row, :, text:] = share * ruled + (1 - share) * own
        return out


def swap(q, k, v, row, text, unconditional):
    """Visual Style Prompting: own text, the reference's image tokens. Rows: reference, images."""
    keys = torch.cat([k[row, :, :text], k[0, :, text:]], 1)
    values = torch.cat([v[row, :, :text], v[0, :, text:]], 1)
    return attend(q[row, :, text:], keys, values)


def style_id(gamma=0.75, temperature=1.5):
    """Rows: content, style, images."""

    def rule(q, k, v, row, text, unconditional):
        query = gamma * q[0, :, text:] + (1 - gamma) * q[row, :, text:]
        keys = torch.cat([k[row, :, :text], k[1, :, text:]], 1)
        values = torch.cat([v[row, :, :text], v[1, :, text:]], 1)
        factors = torch.ones(keys.shape[1])
        factors[text:] = temperature
        return attend(query, keys, values, factors)

    return rule


def reference_only(fidelity=0.5, weight=1.0):
    """Rows: reference, images. A weight of 2 is as if the reference were there twice."""

    def rule(q, k, v, row, text, unconditional):
        count = int(weight)
        keys = torch.cat([k[row], *[k[0, :, text:]] * count], 1)
        values = torch.cat([v[row], *[v[0, :, text:]] * count], 1)
        shared = attend(q[row, :, text:], keys, values)
        plain = attend(q[row, :, text:], k[row], v[row])
        part = fidelity if unconditional else 0.0
        return part * plain + (1 - part) * shared

    return rule


def told(pipe, prompts, each=1):
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=list(prompts), device="cpu", num_images_per_prompt=each, max_sequence_length=16
    )
    return embeds, pooled


@torch.no_grad()
def run(pipe, edit, pictures, prompts, *, steps=3, size=16, each=1, negative=None, scale=1.0):
    """Euler's loop. `pictures`: (latents [N + 1, C, h, w], prompt) of every reference; `negative`:
    the prompts of the second call of true guidance (the references' is empty)."""
    count = len(prompts) * each
    x = torch.randn(count, (size // 2) ** 2, 4, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.5)
    sigmas = pipe.scheduler.sigmas
    names = [p for _, p in pictures]
    both = [(names, prompts)] + ([([""] * len(names), negative)] if negative else [])
    sides = []
    for first, others in both:
        parts = [told(pipe, first), told(pipe, others, each)]
        sides.append([torch.cat(t) for t in zip(*parts, strict=True)])
    ids = pipe._prepare_latent_image_ids(1, size // 2, size // 2, "cpu", torch.float32)
    text = sides[0][0].shape[1]
    with densely(pipe.transformer, edit, text):
        for i in range(steps):
            rows = [pipe._pack_latents(z[i : i + 1], 1, 1, size, size) for z, _ in pictures]
            found = []
            for n, (embeds, pooled) in enumerate(sides):
                if hasattr(edit, "unconditional"):
                    edit.unconditional = bool(n)
                batch = torch.cat([*rows, x])
                out = pipe.transformer(
                    hidden_states=batch,
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    timestep=sigmas[i].expand(len(batch)),
                    guidance=torch.full((len(batch),), 3.5),
                    img_ids=ids,
                    txt_ids=torch.zeros(text, 3),
                    return_dict=False,
                )[0]
                found.append(out[len(pictures) :])
            v = found[0] if len(found) == 1 else found[1] + scale * (found[0] - found[1])
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x
