"""OminiControl on FLUX against its branches written out: text, image and every picture with a
stream, a modulation and projections of its own, under one softmax."""

from __future__ import annotations

import contextlib

import pytest
import random_flux
import torch
from flux_oracles import tokens_at, turn
from peft import LoraConfig
from random_flux import relative, run
from torch._dynamo.testing import CompileCounter

from styleattn.methods import EasyControl, InContext, OminiControl, Redux
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
PROMPTS, T, N = ("a toy train", "a cat"), 16, 64
A, B = (
    torch.randn(1, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((6, 8), (8, 8))
)
LEFT = (torch.arange(8) < 4).float().expand(8, 8).contiguous()
CFG = {"negative_prompt": ["ugly", "grey"], "true_cfg_scale": 2.0}
SINGLE = [f"single_transformer_blocks.{i}.proj_out" for i in range(2)]
TUNED = ["x_embedder", "norm1.linear", "norm.linear", "to_q", "to_k", "to_v", "to_out.0"]
TUNED += ["ff.net.2", "proj_mlp", *SINGLE]


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


def heads(attn, x, names):
    q, k, v = (getattr(attn, n)(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for n in names)
    return q, k, v


def mixed(streams, bias):
    """The streams' outputs: [(q, k, v)] in the order text, image, pictures."""
    q, k, v = (torch.cat(part, 2) for part in zip(*streams, strict=True))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out.split([s[0].shape[2] for s in streams], 1)


def double(block, streams, bias, rotary, under):
    """`under(i)`: what holds while stream i is projected."""
    made, told = [], []
    for i, (x, temb) in enumerate(streams):
        with under(i):
            x, *numbers = (block.norm1 if i else block.norm1_context)(x, emb=temb)
            names = ("to_q", "to_k", "to_v") if i else ("add_q_proj", "add_k_proj", "add_v_proj")
            q, k, v = heads(block.attn, x, names)
        norms = ("norm_q", "norm_k") if i else ("norm_added_q", "norm_added_k")
        q, k = (getattr(block.attn, n)(y) for n, y in zip(norms, (q, k), strict=True))
        made.append((turn(q, rotary[i]), turn(k, rotary[i]), v))
        told.append(numbers)
    found = []
    for i, out in enumerate(mixed(made, bias)):
        (x, temb), (gate, shift, scale, gate_mlp) = streams[i], told[i]
        with under(i):
            x = x + gate[:, None] * (block.attn.to_out[0] if i else block.attn.to_add_out)(out)
            y = (block.norm2 if i else block.norm2_context)(x) * (1 + scale[:, None])
            x = x + gate_mlp[:, None] * (block.ff if i else block.ff_context)(y + shift[:, None])
        found.append((x, temb))
    return found


def single(block, streams, bias, rotary, under):
    made, told = [], []
    for i, (x, temb) in enumerate(streams):
        with under(i):
            x, gate = block.norm(x, emb=temb)
            q, k, v = heads(block.attn, x, ("to_q", "to_k", "to_v"))
            told.append((gate, block.act_mlp(block.proj_mlp(x))))
        q, k = turn(block.attn.norm_q(q), rotary[i]), turn(block.attn.norm_k(k), rotary[i])
        made.append((q, k, v))
    found = []
    for i, out in enumerate(mixed(made, bias)):
        gate, mlp = told[i]
        with under(i):
            x = streams[i][0] + gate[:, None] * block.proj_out(torch.cat([out, mlp], 2))
        found.append((x, streams[i][1]))
    return found


def biases(count, s, masks, lengths):
    """log s between text, image and pictures; pictures do not see each other."""
    total = T + N + sum(lengths)
    bias = torch.zeros(total, total)
    bias[T + N :, T + N :] = -torch.inf
    start = T + N
    for i in range(count):
        here = slice(start, start + lengths[i])
        mask = torch.ones(N) if masks[i] is None else masks[i].flatten()
        bias[here, here] = 0.0
        bias[:T, here] = (s["text_strength"] * mask.mean()).log()
        bias[T : T + N, here] = (s["strength"] * mask).log()[:, None]
        bias[here, :T] = torch.tensor(s["sees_text"]).log()
        bias[here, T : T + N] = torch.tensor(s["sees_image"]).log()
        start += lengths[i]
    return bias


ONE = dict.fromkeys(("strength", "text_strength", "sees_image", "sees_text"), 1.0)


@contextlib.contextmanager
def written_out(pipe, pictures, strengths=ONE, masks=(None, None), guidance=1.0, lora=None):
    model = pipe.transformer

    @contextlib.contextmanager
    def under(i):
        if lora is None:
            yield
            return
        model.enable_adapters() if i > 1 else model.disable_adapters()
        yield

    def forward(**x):
        rows = len(x["hidden_states"])
        pooled, level = x["pooled_projections"], x["timestep"] * 1000
        temb = model.time_text_embed(level, x["guidance"] * 1000, pooled)
        own = x["guidance"] if guidance is None else torch.full((rows,), guidance)
        clean = model.time_text_embed(torch.zeros(rows), own * 1000, pooled)
        streams = [(model.context_embedder(x["encoder_hidden_states"]), temb)]
        rotary = [model.pos_embed(x["txt_ids"]), model.pos_embed(x["img_ids"])]
        with under(1):
            streams.append((model.x_embedder(x["hidden_states"]), temb))
        for i, (cells, ids) in enumerate(pictures, 2):
            with under(i):
                streams.append((model.x_embedder(cells.expand(rows, -1, -1)), clean))
            rotary.append(model.pos_embed(ids))
        bias = biases(len(pictures), strengths, masks, [cells.shape[1] for cells, _ in pictures])
        for block in model.transformer_blocks:
            streams = double(block, streams, bias, rotary, under)
        for block in model.single_transformer_blocks:
            streams = single(block, streams, bias, rotary, under)
        with under(1):
            return (model.proj_out(model.norm_out(streams[1][0], temb)),)

    model.forward = forward
    try:
        with torch.no_grad():
            yield
    finally:
        del model.forward


@pytest.mark.parametrize("guided", [{}, CFG], ids=["plain", "guided"])
def test_a_picture_that_looks_back(pipe, guided):
    with written_out(pipe, [tokens_at(A, (0, -4))]):
        expected = run(pipe, PROMPTS, **guided)
    method = OminiControl(references=Reference(latents=A), offset=(0, -4))
    with apply(pipe, method):
        got = run(pipe, PROMPTS, **guided)
    assert relative(got, expected) <= 1e-5
    for other in (EasyControl, InContext):  # who do not look back, or are not clean
        with apply(pipe, other(references=Reference(latents=A))):
            assert relative(run(pipe, PROMPTS, **guided), expected) > 1e-3


def test_two_pictures_with_strengths_and_a_mask(pipe):
    s = {"strength": 0.7, "text_strength": 0.5, "sees_image": 0.6, "sees_text": 2.0}
    shown = [tokens_at(A, (0, 0)), tokens_at(B, (0, 0))]
    with written_out(pipe, shown, s, (None, LEFT), guidance=None):
        expected = run(pipe, PROMPTS)
    references = (Reference(latents=A), Reference(latents=B, mask=LEFT))
    with apply(pipe, OminiControl(references=references, guidance=None, **s)):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_two_pictures_do_not_see_each_other(pipe):
    with written_out(pipe, [tokens_at(A, (0, 0)), tokens_at(B, (0, 0))]):
        expected = run(pipe, PROMPTS)
    references = (Reference(latents=A), Reference(latents=B))
    with apply(pipe, OminiControl(references=references)):
        assert relative(run(pipe, PROMPTS), expected) <= 1e-5


def test_a_lora_for_the_pictures_alone():
    pipe = random_flux.flux()
    plain = run(pipe, PROMPTS)
    torch.manual_seed(2)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=TUNED)
    pipe.transformer.add_adapter(config, adapter_name="pictures")
    with written_out(pipe, [tokens_at(A, (0, 0))], lora="pictures"):
        expected = run(pipe, PROMPTS)
    pipe.transformer.enable_adapters()
    everywhere = run(pipe, PROMPTS)
    with apply(pipe, OminiControl(references=Reference(latents=A), lora="pictures")) as handle:
        got = run(pipe, PROMPTS)
        with handle.paused():
            assert torch.equal(run(pipe, PROMPTS), everywhere)
        assert torch.equal(run(pipe, PROMPTS), got)
    assert relative(got, expected) <= 1e-5
    assert torch.equal(run(pipe, PROMPTS), everywhere)
    assert relative(everywhere, plain) > 1e-3
    with apply(pipe, OminiControl(references=Reference(latents=A))):  # then it is for all
        assert relative(run(pipe, PROMPTS), got) > 1e-3


def test_steps_and_no_weight(pipe):
    plain = run(pipe, PROMPTS, steps=2)
    for off in (Reference(latents=A, weight=0.0), Reference(latents=A, steps=(0.0, 0.0))):
        with apply(pipe, OminiControl(references=off)):
            assert torch.equal(run(pipe, PROMPTS, steps=2), plain)
    with apply(
        pipe, OminiControl(references=Reference(latents=A), strength=0.0, text_strength=0.0)
    ):
        assert relative(run(pipe, PROMPTS, steps=2), plain) <= 1e-5
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_next_to_redux(pipe):
    redux = Redux(references=(Reference(embeds=random_flux.TOKENS, weight=0.6),))
    omini = OminiControl(references=Reference(latents=A))
    with apply(pipe, redux, omini):
        first = run(pipe, PROMPTS)
    with apply(pipe, omini, redux):
        assert relative(run(pipe, PROMPTS), first) <= 1e-5
    with apply(pipe, omini):
        assert relative(run(pipe, PROMPTS), first) > 1e-3


def test_the_guidance_of_pictures_that_run_apart(pipe):
    """OminiControl2's are told 1, EasyControl's what the call is told."""
    with apply(pipe, EasyControl(references=Reference(latents=A))):
        theirs = run(pipe, PROMPTS, guidance_scale=1.0)
    with apply(pipe, EasyControl(references=Reference(latents=A), guidance=1.0)):
        assert relative(run(pipe, PROMPTS, guidance_scale=1.0), theirs) <= 1e-6
        told = run(pipe, PROMPTS, guidance_scale=9.0)
    with apply(pipe, EasyControl(references=Reference(latents=A))):
        assert relative(run(pipe, PROMPTS, guidance_scale=9.0), told) > 1e-5


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"positions": "diagonal"}, "say the offset"),
        ({"offset": 3.0}, r"must be \(down, right\)"),
        ({"lora": 1}, "the name of a LoRA"),
        ({"sees_text": -1.0}, "must not be negative"),
        ({"sees_text": -1.0, "offset": 3.0}, r"not be negative.*must be \(down, right\)"),
    ],
)
def test_bad_knobs(bad, words):
    with pytest.raises(ValueError, match=words):
        OminiControl(references=Reference(latents=A), **bad)


def test_what_does_not_go_together_is_refused_whole(pipe):
    before = random_flux.processors(pipe)
    with pytest.raises(ValueError, match=r"needs a picture or latents; \[0\] have none"):
        apply(pipe, OminiControl())
    with pytest.raises(ValueError, match="no LoRA 'x'"):
        apply(pipe, OminiControl(references=Reference(latents=A), lora="x"))
    assert random_flux.processors(pipe) == before


@pytest.mark.slow
def test_compiled_blocks():
    """One graph per kind of block."""
    pipe, counter = random_flux.flux(num_layers=1, num_single_layers=1), CompileCounter()
    torch._dynamo.reset()
    with apply(pipe, OminiControl(references=Reference(latents=A))):
        expected = run(pipe, PROMPTS, steps=2)
        for name in ("transformer_blocks", "single_transformer_blocks"):
            getattr(pipe.transformer, name)[0].compile(fullgraph=True, backend=counter)
        assert relative(run(pipe, PROMPTS, steps=2), expected) <= 1e-5
    assert counter.frame_count <= 2
