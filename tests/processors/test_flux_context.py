"""Pictures in context on FLUX, in the sequence or on their own, against dense attention and a
forward written out, over whole runs."""

from __future__ import annotations

import contextlib

import pytest
import random_flux
import torch
from flux_oracles import densely, tokens_at, turn
from PIL import Image
from random_flux import relative, run

from styleattn.methods import METHODS, EasyControl, InContext, Redux
from styleattn.processors import apply
from styleattn.processors._flux_context import fitted
from styleattn.references import Reference

torch.set_num_threads(1)
T, N = 16, 64
PROMPTS = ("a toy train", "a cat")
CFG = {"true_cfg_scale": 3.0, "negative_prompt": ["ugly", "dark"]}
A, B = (torch.randn(1, *s, generator=torch.Generator().manual_seed(7)) for s in ((6, 8), (4, 4)))
LEFT = torch.zeros(8, 8)
LEFT[:, :3] = 1.0
LEFT[5, 6] = 0.25


@pytest.fixture(scope="module")
def pipe():
    return random_flux.flux()


@contextlib.contextmanager
def beside(pipe, pictures):
    """The stock transformer with pictures (tokens, positions) behind the image's tokens."""
    model = pipe.transformer
    plain = model.forward

    def longer(**inputs):
        hidden, length = inputs["hidden_states"], inputs["hidden_states"].shape[1]
        more = [x.expand(len(hidden), -1, -1) for x, _ in pictures]
        inputs["hidden_states"] = torch.cat([hidden, *more], 1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], *(ids for _, ids in pictures)])
        return (plain(**inputs)[0][:, :length],)

    model.forward = longer
    try:
        yield
    finally:
        del model.forward


def biased(table):
    """Stock joint attention with a bias [L, L]."""
    return lambda layer, q, k, v, rotary, text: (turn(q, rotary), turn(k, rotary), v, table)


def table(lengths, image=1.0, text=1.0, sees_image=1.0, sees_text=1.0, weights=None, masks=None):
    """Strengths as a dense bias, tokens in the order text, image, pictures."""
    first = T + N
    bias = torch.zeros(first + sum(lengths), first + sum(lengths))
    bias[first:, T:first] = torch.tensor(sees_image).log()
    bias[first:, :T] = torch.tensor(sees_text).log()
    start = first
    for i, length in enumerate(lengths):
        columns = slice(start, start + length)
        weight = 1.0 if weights is None else weights[i]
        mask = torch.ones(N) if masks is None or masks[i] is None else masks[i].flatten()
        bias[T:first, columns] = (mask * weight * image).log()[:, None]
        bias[:T, columns] = (mask.mean() * weight * text).log()
        start += length
    return bias


def kontext(pipe, **arguments):
    made = random_flux.kontext(pipe)
    sizes = {"height": 16, "width": 16, "_auto_resize": False, "max_area": 256}
    picture = Image.effect_noise((16, 16), 60).convert("RGB")
    return (
        made,
        lambda: (
            made(
                prompt=list(PROMPTS),
                image=picture,
                **sizes,
                max_sequence_length=T,
                num_inference_steps=3,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
                **arguments,
            ).images
        ),
    )


def test_the_picture_of_kontext_under_strengths(pipe):
    """Over all steps and both calls of true guidance."""
    knobs = {"strength": 0.3, "text_strength": 2.0, "sees_image": 0.5, "sees_text": 0.7}
    made, go = kontext(pipe, **CFG)
    bias = table([N], 0.3, 2.0, 0.5, 0.7, weights=[0.8], masks=[LEFT])
    with densely(pipe.transformer, biased(bias), T):
        theirs = go()
    plain = go()
    shown = Reference(weight=0.8, mask=LEFT)
    with apply(made, InContext(references=shown, **knobs)) as handle:
        assert relative(go(), theirs) <= 1e-5
        handle.update(InContext(references=shown))
        fainter = go()
    assert relative(theirs, plain) > 1e-2
    with densely(pipe.transformer, biased(table([N], weights=[0.8], masks=[LEFT])), T):
        assert relative(fainter, go()) <= 1e-5
    with apply(made, InContext()):
        assert torch.equal(go(), plain)


def test_a_picture_that_is_not_seen(pipe):
    """A strength of 0 towards image and text is the model without the picture."""
    noise = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(0))
    made, go = kontext(pipe, latents=noise, guidance_scale=3.5)
    alone = run(pipe, PROMPTS, guidance_scale=3.5)
    with apply(made, InContext(strength=0.0, text_strength=0.0)):
        assert relative(go(), alone) <= 1e-5
    assert relative(go(), alone) > 1e-3


@pytest.mark.parametrize("positions", ["index", "diagonal"])
def test_pictures_of_ones_own(pipe, positions):
    """In any FLUX pipeline, with weights, a mask and strengths."""
    (a, here), (b, there) = tokens_at(A), tokens_at(B)
    if positions == "index":
        offsets = [[1.0, 0, 0], [2.0, 0, 0]]
    else:
        offsets = [[0, 8.0, 8.0], [0, 11.0, 12.0]]
    moved = [ids + torch.tensor(o) for ids, o in zip((here, there), offsets, strict=True)]
    pictures = [(a, moved[0]), (b, moved[1])]
    with beside(pipe, pictures):
        plain = run(pipe, PROMPTS)
        bias = table([12, 4], 0.5, 0.5, weights=[1.0, 0.6], masks=[None, LEFT])
        with densely(pipe.transformer, biased(bias), T):
            theirs = run(pipe, PROMPTS)
    references = (Reference(latents=A), Reference(latents=B))
    with apply(pipe, InContext(references=references, positions=positions)):
        assert relative(run(pipe, PROMPTS), plain) <= 1e-5
    references = (Reference(latents=A), Reference(latents=B, weight=0.6, mask=LEFT))
    knobs = {"positions": positions, "strength": 0.5, "text_strength": 0.5}
    with apply(pipe, InContext(references=references, **knobs)):
        assert relative(run(pipe, PROMPTS), theirs) <= 1e-5
    assert relative(plain, run(pipe, PROMPTS)) > 1e-3


def test_pictures_come_and_go_with_the_steps(pipe):
    plain = run(pipe, PROMPTS, steps=4)
    never = Reference(latents=A, steps=(0.0, 0.0))
    with apply(pipe, InContext(references=never)):
        assert torch.equal(run(pipe, PROMPTS, steps=4), plain)
    picture = tokens_at(A)
    moved = (picture[0], picture[1] + torch.tensor([1.0, 0, 0]))
    calls = []
    model = pipe.transformer
    stock = model.forward

    def by_step(**inputs):
        calls.append(1)
        if len(calls) > 2:
            return stock(**inputs)
        inputs["hidden_states"] = torch.cat(
            [inputs["hidden_states"], moved[0].expand(2, -1, -1)], 1
        )
        inputs["img_ids"] = torch.cat([inputs["img_ids"], moved[1]])
        return (stock(**inputs)[0][:, :N],)

    model.forward = by_step
    theirs = run(pipe, PROMPTS, steps=4)
    del model.forward
    with apply(pipe, InContext(references=Reference(latents=A), steps=(0.0, 0.5))):
        assert relative(run(pipe, PROMPTS, steps=4), theirs) <= 1e-5


def test_a_picture_is_encoded_by_the_pipeline(pipe):
    from styleattn.inversion import encode_picture

    picture = Image.effect_noise((9, 13), 60).convert("RGB")
    latents = encode_picture(pipe, picture, 12, 8)
    with apply(pipe, InContext(references=Reference(latents=latents))):
        theirs = run(pipe, PROMPTS)
    with apply(pipe, InContext(references=Reference(image=picture))):
        assert torch.equal(run(pipe, PROMPTS), theirs)
    assert fitted(13, 9, 2) == (12, 8)
    assert fitted(1200, 2400, 16) == (720, 1440)
    assert fitted(5, 900, 16) == (16, 896)


# Pictures on their own


def split(attn, x, names="to_q to_k to_v", norms=("norm_q", "norm_k")):
    q, k, v = (getattr(attn, n)(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
               for n in names.split())  # fmt: skip
    return getattr(attn, norms[0])(q), getattr(attn, norms[1])(k), v


def soft(q, k, v, bias=None):
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def double_alone(block, x, temb, rotary):
    """A double block for a picture without text: its tokens, and its keys and values."""
    normed, gate, shift, scale, gate_mlp = block.norm1(x, emb=temb)
    q, k, v = split(block.attn, normed)
    q, k = turn(q, rotary), turn(k, rotary)
    x = x + gate[:, None] * block.attn.to_out[0](soft(q, k, v))
    normed = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
    return x + gate_mlp[:, None] * block.ff(normed), (k, v)


def single_alone(block, x, temb, rotary):
    normed, gate = block.norm(x, emb=temb)
    q, k, v = split(block.attn, normed)
    q, k = turn(q, rotary), turn(k, rotary)
    both = torch.cat([soft(q, k, v), block.act_mlp(block.proj_mlp(normed))], 2)
    return x + gate[:, None] * block.proj_out(both), (k, v)


@contextlib.contextmanager
def branch(pipe, pictures, strengths, masks=None, hidden=lambda call: False):
    """Every step: the pictures run anew at the level 0, the image and the text see their keys."""
    model, calls = pipe.transformer, []
    stock = model.forward

    def forward(**inputs):
        calls.append(1)
        if hidden(len(calls) - 1):
            return stock(**inputs)
        found, count = [], len(inputs["hidden_states"])
        none = torch.zeros(count)
        temb = model.time_text_embed(none, inputs["guidance"] * 1000, inputs["pooled_projections"])
        for cells, ids in pictures:
            x, rotary, pairs = (
                model.x_embedder(cells.expand(count, -1, -1)),
                model.pos_embed(ids),
                [],
            )
            for block in model.transformer_blocks:
                x, pair = double_alone(block, x, temb, rotary)
                pairs.append(pair)
            for block in model.single_transformer_blocks:
                x, pair = single_alone(block, x, temb, rotary)
                pairs.append(pair)
            found.append(pairs)

        def edit(layer, q, k, v, rotary, text):
            q, k = turn(q, rotary), turn(k, rotary)
            bias = torch.zeros(q.shape[2], k.shape[2])
            for i, pairs in enumerate(found):
                mask = torch.ones(N) if masks is None else masks[i].flatten()
                seen = torch.cat([mask.mean().expand(T), mask]) * strengths[i]
                more = seen.log()[:, None].expand(-1, pairs[layer][0].shape[2])
                k, v = torch.cat([k, pairs[layer][0]], 2), torch.cat([v, pairs[layer][1]], 2)
                bias = torch.cat([bias, more], 1)
            return q, k, v, bias

        with densely(model, edit, T):
            return stock(**inputs)

    model.forward = forward
    try:
        with torch.no_grad():
            yield
    finally:
        del model.forward


def test_a_branch_of_its_own_is_the_formula(pipe):
    (a, here), (b, there) = tokens_at(A), tokens_at(B)
    moved = [(x, ids + torch.tensor([0, 64.0, 0])) for x, ids in ((a, here), (b, there))]
    plain = run(pipe, PROMPTS, **CFG)
    with branch(pipe, moved, [0.7, 0.35], masks=[torch.ones(8, 8), LEFT]):
        theirs = run(pipe, PROMPTS, **CFG)
    references = (Reference(latents=A), Reference(latents=B, weight=0.5, mask=LEFT))
    with apply(pipe, EasyControl(references=references, strength=0.7)):
        ours = run(pipe, PROMPTS, **CFG)
        assert relative(run(pipe, PROMPTS, **CFG), ours) <= 1e-6
    assert relative(ours, theirs) <= 1e-5
    assert relative(ours, plain) > 1e-2
    assert torch.equal(run(pipe, PROMPTS, **CFG), plain)
    with branch(pipe, [(a, here)], [1.0], hidden=lambda call: call < 2):
        theirs = run(pipe, PROMPTS, steps=4)
    late = EasyControl(references=Reference(latents=A), offset=(0, 0), steps=(0.5, 1.0))
    with apply(pipe, late):
        assert relative(run(pipe, PROMPTS, steps=4), theirs) <= 1e-5


def test_what_is_kept_is_what_would_be_made(pipe):
    """One pass for a call of guidance, and again for the next run."""
    passes = []
    hook = pipe.transformer.x_embedder.register_forward_hook(
        lambda m, a, o: passes.append(a[0].shape[1])
    )
    found = []
    for cache in (True, False):
        with apply(pipe, EasyControl(references=Reference(latents=A), cache=cache)):
            passes.clear()
            found.append(run(pipe, PROMPTS, steps=4, **CFG))
            assert passes.count(N) == 8
            assert passes.count(12) == (2 if cache else 8)
            if cache:
                run(pipe, PROMPTS, steps=4, **CFG)
                assert passes.count(12) == 4
    hook.remove()
    assert relative(found[0], found[1]) <= 1e-6


def test_a_lora_for_the_pictures_alone():
    """At work on the pictures, and not on the image; afterwards as it was."""
    from peft import LoraConfig

    pipe = random_flux.flux()
    method = EasyControl(references=Reference(latents=A))
    with apply(pipe, method):
        without = run(pipe, PROMPTS)
    plain = run(pipe, PROMPTS)
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipe.transformer.add_adapter(config, adapter_name="style")
    everywhere = run(pipe, PROMPTS)
    own = EasyControl(references=Reference(latents=A), lora="style")
    with apply(pipe, own) as handle:
        ours = run(pipe, PROMPTS)
        unseen = EasyControl(references=Reference(latents=A), lora="style", strength=0.0)
        handle.update(unseen)
        assert relative(run(pipe, PROMPTS), plain) <= 1e-5
        with handle.paused():
            assert torch.equal(run(pipe, PROMPTS), everywhere)
        assert relative(run(pipe, PROMPTS), plain) <= 1e-5
    assert torch.equal(run(pipe, PROMPTS), everywhere)
    assert relative(ours, without) > 1e-3
    pipe.transformer.disable_adapters()
    with apply(pipe, own):
        assert relative(run(pipe, PROMPTS), ours) <= 1e-5
    assert relative(run(pipe, PROMPTS), plain) <= 1e-5
    with pytest.raises(ValueError, match="no LoRA 'other' is loaded; there are style"):
        apply(pipe, EasyControl(references=Reference(latents=A), lora="other"))


@pytest.mark.parametrize("method", [InContext, EasyControl], ids=lambda m: m.name)
def test_next_to_tokens_of_redux(pipe, method):
    """Redux' tokens stand with the text: a picture of no strength leaves them as they are."""
    redux = Redux(references=Reference(embeds=torch.randn(9, 32), weight=0.6))
    with apply(pipe, redux):
        theirs = run(pipe, PROMPTS)
    nothing = {"strength": 0.0}
    nothing |= {"text_strength": 0.0} if method is InContext else {}
    for order in (0, 1):
        both = [redux, method(references=Reference(latents=A), **nothing)]
        with apply(pipe, *(both[::-1] if order else both)):
            assert relative(run(pipe, PROMPTS), theirs) <= 1e-5
    with apply(pipe, redux, method(references=Reference(latents=A))):
        assert relative(run(pipe, PROMPTS), theirs) > 1e-3


def test_what_does_not_go_together_is_refused_whole(pipe):
    before = dict(pipe.transformer.attn_processors)
    one = Reference(latents=A)
    refused = [
        ([EasyControl()], "every reference needs a picture"),
        ([InContext(references=(one, Reference()))], "every reference needs a picture"),
        ([InContext(references=one), EasyControl(references=one)], "exclude each other"),
        ([InContext(references=Reference(latents=torch.ones(2, 4, 4)))], "8 channels, one of the"),
    ]
    for methods, reason in refused:
        with pytest.raises(ValueError, match=reason):
            apply(pipe, *methods)
    assert dict(pipe.transformer.attn_processors) == before
    with pytest.raises(ValueError, match="needs a VAE, and there is no pipeline"):
        apply(pipe.transformer, InContext(references=Reference(image="a.png")))
    with apply(pipe, InContext()), pytest.raises(ValueError, match="the call brings none"):
        run(pipe, PROMPTS)
    with pytest.raises(ValueError, match=r"strength must.*; positions must be one of"):
        InContext(strength=float("nan"), positions="up")
    with pytest.raises(ValueError, match=r"latents must be \[C, h, w\], h and w even"):
        EasyControl(references=Reference(latents=torch.ones(1, 3, 4)))
    for method in (InContext(strength=0.5), EasyControl(offset=(0, 32), lora="x")):
        assert METHODS[method.name].from_dict(method.to_dict()) == method


@pytest.mark.slow
@pytest.mark.parametrize("method", [InContext, EasyControl], ids=lambda m: m.name)
def test_compiled_blocks(method):
    """Blocks of a kind share graphs, whose number the steps do not raise."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = random_flux.transformer(num_layers=3, num_single_layers=3), CompileCounter()
    levels = torch.tensor([1000.0, 800.0, 500.0])
    shown = Reference(latents=A, weight=0.7, mask=LEFT[:3, :4])
    x = random_flux.inputs(batch=2)

    def go():
        found = []
        with handle.layout(1, timesteps=levels), torch.no_grad():
            for level in levels:
                x["timestep"] = (level / 1000).expand(2)
                found.append(model(**x, return_dict=False)[0])
        return torch.stack(found)

    with apply(model, method(references=shown, strength=0.6)) as handle:
        plain = go()
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(model, kind):
                block.compile(fullgraph=True, backend=counter)
        assert relative(go(), plain) <= 1e-5
        seen = counter.frame_count
        assert relative(go(), plain) <= 1e-5
        assert counter.frame_count == seen <= 8
    torch._dynamo.reset()
