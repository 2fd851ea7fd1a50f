"""apply, remove, explain: whole or not at all, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import random_pipelines as tiny
import torch
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor

import styleattn.processors as processors
from styleattn.methods import StyleAligned
from styleattn.processors import Handle, apply, explain, paused, remove
from styleattn.references import Reference, StyleBank


def footprint(model):
    """Everything a style could leave on a model."""
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for name, m in model.named_modules()
    }
    extra = {name: sorted(m.__dict__) for name, m in model.named_modules()}
    processors = {name: id(p) for name, p in model.attn_processors.items()}
    return hooks, extra, processors, list(model.state_dict())


def test_apply_and_remove_leave_no_trace(pipe, run):
    before, expected = footprint(pipe.unet), run(pipe)
    handle = apply(pipe, StyleAligned())
    assert footprint(pipe.unet) != before
    assert list(pipe.unet.state_dict()) == before[3]  # nothing of ours is saved with the model
    styled = run(pipe)
    assert not torch.equal(styled, expected)
    handle.remove()
    assert footprint(pipe.unet) == before
    assert torch.equal(run(pipe), expected)
    remove(pipe)
    handle.remove()
    assert footprint(pipe.unet) == before


def test_apply_twice_replaces(sdxl, run):
    first = apply(sdxl, StyleAligned(share_group_norm=False))
    second = apply(sdxl.unet, StyleAligned())
    assert not first.active
    assert second.active
    replaced = run(sdxl)
    first.remove()  # replaced: nothing to do
    assert second.active
    second.remove()
    with apply(sdxl, StyleAligned()):
        assert torch.equal(run(sdxl), replaced)


def test_context_manager_removes_after_errors(sdxl):
    before = footprint(sdxl.unet)
    with pytest.raises(KeyError), apply(sdxl, StyleAligned()) as handle:
        assert isinstance(handle, Handle)
        assert "style_aligned" in repr(handle)
        raise KeyError
    assert footprint(sdxl.unet) == before
    assert "removed" in repr(handle)


ZERO = {
    "nothing to do": StyleAligned(
        share_attention=False, adain_queries=False, adain_keys=False, share_group_norm=False
    ),
    "weight": StyleAligned(references=(Reference(weight=0.0),)),
    "steps": StyleAligned(steps=(0.0, 0.0)),
    "reference steps": StyleAligned(references=(Reference(steps=(0.0, 0.0, 0.0)),)),
    "layers": StyleAligned(layers={}),
    "reference layers": StyleAligned(references=(Reference(layers={"mid": 0}),)),
    "self level": StyleAligned(only_self_level=1.0, share_group_norm=False),
}


@pytest.mark.parametrize("name", ZERO)
def test_zero_strength_is_the_untouched_pipeline(sdxl, run, name):
    expected = run(sdxl)
    with apply(sdxl, ZERO[name]):
        assert torch.equal(run(sdxl), expected)


def test_outside_its_steps_a_style_changes_no_bit(sdxl, run):
    """The first steps styled, then nothing: the rest of the run is the plain pipeline's, bit for
    bit."""
    seen = {}

    def keep(pipe, step, t, tensors):
        seen[step] = tensors["latents"].clone()
        return tensors

    with apply(sdxl, StyleAligned(steps=(0.0, 0.5))):
        styled = run(sdxl, steps=4, callback_on_step_end=keep)
    middle = seen[1]
    out = middle
    sdxl.scheduler.set_timesteps(4)

    def resume(pipe, step, t, tensors):
        return {**tensors, "latents": middle.clone()} if step == 1 else tensors

    out = run(sdxl, steps=4, callback_on_step_end=resume)
    assert torch.equal(out, styled)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"adain_values": True}, {"shared_score_shift": 3.0, "shared_score_scale": 0.2}],
)
@pytest.mark.parametrize("backend", ["torch", None])
def test_reference_row_is_the_plain_pipeline(pipe, run, distance, knobs, backend):
    expected = run(pipe)
    with apply(pipe, StyleAligned(**knobs), backend=backend):
        styled = run(pipe)
    assert distance(styled[:1], expected[:1]) <= 1e-5
    assert distance(styled[1:], expected[1:]) > 1e-3


def test_layers_and_steps_choose_where_and_when(sdxl3, run, distance):
    whole = apply(sdxl3, StyleAligned())
    everywhere = run(sdxl3)
    whole.remove()
    some = StyleAligned(layers="style", steps=(0.5, 1.0))
    with apply(sdxl3, some) as handle:
        chosen = {r.layer for r in handle.explain().rows if r.method}
        part = run(sdxl3)
    assert chosen
    assert all(name.startswith("up_blocks.0.attentions.1.") for name in chosen)
    plain = run(sdxl3)
    assert 0 < distance(part, plain) < distance(everywhere, plain)


def test_methods_compose_on_separate_layers(sdxl3, run):
    down = StyleAligned(layers="down_blocks.*", share_group_norm=False)
    up = StyleAligned(layers="up_blocks.*", shared_score_shift=0.5, share_group_norm=False)
    with apply(sdxl3, down):
        only_down = run(sdxl3)
    with apply(sdxl3, down, up) as handle:
        both = run(sdxl3)
        assert handle.methods == (down, up)
    assert not torch.equal(both, only_down)
    everywhere = StyleAligned()
    for clash in ((down, down), (StyleAligned(layers="mid_block"), everywhere)):
        before = footprint(sdxl3.unet)
        with pytest.raises(ValueError, match=r"exclude each other"):
            apply(sdxl3, *clash)
        assert footprint(sdxl3.unet) == before


def bad_bank(**changes):
    told = torch.zeros(1, 77, 64)
    parts = {"prompt_embeds": told, "negative_prompt_embeds": told}
    bank = StyleBank(torch.zeros(1, 3, 4, 16, 16), torch.tensor([500, 0]), parts)
    return dataclasses.replace(bank, **changes)


BAD = {
    "no method": (lambda p: apply(p), TypeError, "at least one method"),
    "a class": (lambda p: apply(p, StyleAligned), TypeError, "the class StyleAligned"),
    "a dict": (lambda p: apply(p, {"method": "x"}), TypeError, "got a dict"),
    "backend": (lambda p: apply(p, StyleAligned(), backend="cuda"), ValueError, "one of"),
    "bank type": (lambda p: apply(p, StyleAligned(), bank="x"), TypeError, "StyleBank.load"),
    "layers": (lambda p: apply(p, StyleAligned(layers="no.*")), ValueError, "matches no"),
    "scale dict": (
        lambda p: apply(p, StyleAligned(layers={"up": {"block_0": [1]}})),
        ValueError,
        "attention modules",
    ),
    "reference layers": (
        lambda p: apply(p, StyleAligned(references=(Reference(layers="nope"),))),
        ValueError,
        "matches no attention layer",
    ),
    "picture without bank": (
        lambda p: apply(p, StyleAligned(references=(Reference(image="a.png"),))),
        ValueError,
        "needs a bank",
    ),
    "bank without pooled": (
        lambda p: apply(p, StyleAligned(), bank=bad_bank()),
        ValueError,
        "lacks text_embeds",
    ),
    "bank of other latents": (
        lambda p: apply(p, StyleAligned(), bank=bad_bank(latents=torch.zeros(1, 3, 8, 16, 16))),
        ValueError,
        "8 latent channels",
    ),
    "bank of other count": (
        lambda p: apply(p, StyleAligned(references=(Reference(), Reference())), bank=bad_bank()),
        ValueError,
        "has 2 references, the bank 1",
    ),
    "vae": (lambda p: apply(p.vae, StyleAligned()), TypeError, "AutoencoderKL; it supports UNet2D"),
    "string": (lambda p: apply("sdxl", StyleAligned()), TypeError, "cannot style a str"),
    "none": (lambda p: explain(None), TypeError, "cannot style a NoneType"),
    "remove": (lambda p: remove(p.scheduler), TypeError, "cannot style a DDIMScheduler"),
    "text encoder": (
        lambda p: apply(p.text_encoder, StyleAligned()),
        TypeError,
        "cannot style a CLIPTextModel",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("styled", [False, True])
def test_bad_input_is_refused_whole(sdxl, name, styled):
    act, kind, says = BAD[name]
    if styled:
        apply(sdxl, StyleAligned())
    before = footprint(sdxl.unet)
    with pytest.raises(kind, match=says):
        act(sdxl)
    assert footprint(sdxl.unet) == before


class Custom:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


@pytest.mark.parametrize("processor", [Custom(), AttnAddedKVProcessor()])
def test_processors_of_their_own_mind_are_refused(sdxl, processor):
    name = next(iter(sdxl.unet.attn_processors))
    attn = sdxl.unet.get_submodule(name.removesuffix(".processor"))
    original, attn.processor = attn.processor, processor
    try:
        before = footprint(sdxl.unet)
        with pytest.raises(TypeError, match=type(processor).__name__):
            apply(sdxl, StyleAligned())
        assert footprint(sdxl.unet) == before
        with apply(sdxl, StyleAligned(layers="up_blocks.*")):  # not chosen: it may stay
            assert attn.processor is processor
    finally:
        attn.processor = original


def test_a_failure_while_installing_is_rolled_back(sdxl, run, monkeypatch):
    """Without a style before, none after; with one before, that one."""

    def fail_once(*args, **kwargs):
        monkeypatch.undo()
        raise MemoryError

    plain, before = run(sdxl), footprint(sdxl.unet)
    for styled in (False, True):
        kept = apply(sdxl, StyleAligned(shared_score_shift=1.0)) if styled else None
        expected = run(sdxl)
        monkeypatch.setattr(sdxl.unet, "register_forward_pre_hook", fail_once)
        with pytest.raises(MemoryError):
            apply(sdxl, StyleAligned(layers="up_blocks.*"))
        assert kept is None or kept.active
        assert torch.equal(run(sdxl), expected)
        if kept is None:
            assert footprint(sdxl.unet) == before
            assert torch.equal(expected, plain)


def test_eager_processors_of_older_torch_keep_their_scale(sdxl, run, distance):
    sdxl.unet.set_attn_processor(AttnProcessor())
    expected = run(sdxl)
    with apply(sdxl, StyleAligned(references=(Reference(weight=1e-30),), share_group_norm=False)):
        assert distance(run(sdxl), expected) <= 1e-5
    assert all(type(p) is AttnProcessor for p in sdxl.unet.attn_processors.values())
    sdxl.unet.set_default_attn_processor()


def test_explain(sdxl):
    plain = explain(sdxl)
    assert not any(r.method for r in plain.rows)
    with apply(sdxl, StyleAligned(only_self_level=0.5), backend="torch") as handle:
        rows = {r.layer: r for r in handle.explain().rows}
        first = next(n for n, r in rows.items() if r.method and "attn1" in n)
        assert (rows[first].method, rows[first].backend) == ("style_aligned", "torch")
        assert rows[first].why == "asked for"
        assert any("not chosen" in r.why for r in rows.values())
        text = str(explain(sdxl))
    assert "UNet2DConditionModel" in text
    assert "GroupNorm" in text
    assert "cross-attention" in text


def test_copies_and_pickles_keep_their_own_style(run):
    pipe = tiny.sdxl()
    apply(pipe, StyleAligned())
    expected = run(pipe)
    for clone in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        remove(pipe)
        original, pipe.unet = pipe.unet, clone
        assert torch.equal(run(pipe), expected)
        remove(clone)
        assert not any("Style" in type(p).__name__ for p in clone.attn_processors.values())
        pipe.unet = original
        apply(pipe, StyleAligned())


def test_update_changes_numbers_only(sdxl, run):
    louder = StyleAligned(shared_score_shift=1.0)
    with apply(sdxl, louder):
        expected = run(sdxl)
    with apply(sdxl, StyleAligned()) as handle:
        handle.update(louder)
        assert torch.equal(run(sdxl), expected)
        assert handle.methods == (louder,)
        with pytest.raises(ValueError, match="numbers"):
            handle.update(StyleAligned(adain_values=True))


def test_paused_and_layout(sdxl, run):
    expected = run(sdxl)
    inputs = {
        "sample": torch.randn(4, 4, 16, 16),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(4, 77, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(4, 32), "time_ids": torch.zeros(4, 6)},
    }
    with torch.no_grad():
        plain = sdxl.unet(**inputs).sample
        with paused(sdxl):
            assert torch.equal(sdxl.unet(**inputs).sample, plain)
        with apply(sdxl, StyleAligned(steps=(0.0, 0.6))) as handle:
            with pytest.raises(RuntimeError, match="layout"):
                sdxl.unet(**inputs)
            with paused(sdxl.unet):
                assert torch.equal(run(sdxl), expected)
            with handle.paused():
                assert torch.equal(sdxl.unet(**inputs).sample, plain)
            with handle.layout(2), pytest.raises(RuntimeError, match="timesteps"):
                sdxl.unet(**inputs)
            with handle.layout(3), pytest.raises(RuntimeError, match="3 equal chunks"):
                sdxl.unet(**inputs)
            with pytest.raises(ValueError, match="chunks must be"), handle.layout(0):
                pass
            times = torch.tensor([900, 500, 100])
            with handle.layout(2, timesteps=times, references=(1,)):
                styled = sdxl.unet(**inputs).sample
            assert torch.allclose(styled[[1, 3]], plain[[1, 3]], atol=1e-5)
            assert not torch.allclose(styled[[0, 2]], plain[[0, 2]], atol=1e-3)
            with handle.layout(2, timesteps=times):
                late = sdxl.unet(**{**inputs, "timestep": 100}).sample
            with handle.paused():
                assert torch.equal(sdxl.unet(**{**inputs, "timestep": 100}).sample, late)


def test_too_few_rows_for_the_references(sdxl, run):
    two = StyleAligned(references=(Reference(), Reference()))
    with apply(sdxl, two), pytest.raises(ValueError, match="2 references at rows"):
        run(sdxl, ["only one"])


def test_hosts_are_listed():
    assert all(host.SUPPORTED for host in processors.HOSTS)
