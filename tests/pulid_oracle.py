"""PuLID-FLUX written out: FLUX's forward, block by block, with the identity read between blocks.
Shares no code with styleattn."""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F


def read(tensors, index, identity, image):
    """What the image tokens [B, N, C] read of identity tokens [B, M, E]: LayerNorms, heads of 128
    channels, the scale split over queries and keys, no biases."""
    w = {k.removeprefix(f"pulid_ca.{index}."): v for k, v in tensors.items()}
    x = F.layer_norm(image, image.shape[-1:], w["norm2.weight"], w["norm2.bias"])
    c = F.layer_norm(identity, identity.shape[-1:], w["norm1.weight"], w["norm1.bias"])
    q = x @ w["to_q.weight"].T
    k, v = (c @ w["to_kv.weight"].T).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (-1, 128)).transpose(1, 2) for t in (q, k, v))
    scores = (q * 128**-0.25) @ (k * 128**-0.25).transpose(2, 3)
    mixed = scores.double().softmax(-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2) @ w["to_out.weight"].T


def forward(model, tensors, people, inputs, residuals=(None, None), ends=None):
    """FLUX with PuLID: `people` are (identity tokens [B, M, E], weight [B, N, 1] or number); the
    image tokens behind the last block are appended to `ends`."""
    guidance = inputs.get("guidance")
    time, pooled = inputs["timestep"] * 1000, inputs["pooled_projections"]
    steps = (time,) if guidance is None else (time, guidance * 1000)
    temb = model.time_text_embed(*steps, pooled)
    image = model.x_embedder(inputs["hidden_states"])
    text = model.context_embedder(inputs["encoder_hidden_states"])
    rotary = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    extra = dict(inputs.get("joint_attention_kwargs") or {})
    if "ip_adapter_image_embeds" in extra:
        extra["ip_hidden_states"] = model.encoder_hid_proj(extra.pop("ip_adapter_image_embeds"))
    ca = 0
    for kind, every in (("transformer_blocks", 2), ("single_transformer_blocks", 4)):
        blocks = getattr(model, kind)
        added = residuals[kind != "transformer_blocks"]
        for i, block in enumerate(blocks):
            kwargs = extra if kind == "transformer_blocks" else {}
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=rotary,
                joint_attention_kwargs=kwargs,
            )
            if i % every == 0:
                known = [(tokens, weight) for tokens, weight in people if tokens is not None]
                found = [weight * read(tensors, ca, tokens, image) for tokens, weight in known]
                image = image + sum(found) if found else image
                ca += 1
            if added is not None:
                image = image + added[i // -(-len(blocks) // len(added))]
    if ends is not None:
        ends.append(image)
    return model.proj_out(model.norm_out(image, temb))


@contextlib.contextmanager
def instead(pipe, tensors, people):
    """The pipeline with PuLID's forward; `people(call, inputs)` says who is shown at a call."""
    model, calls = pipe.transformer, []

    def replaced(**inputs):
        out = forward(model, tensors, people(len(calls), inputs), inputs)
        calls.append(1)
        return (out,)

    model.forward = replaced
    try:
        yield calls
    finally:
        del model.forward
