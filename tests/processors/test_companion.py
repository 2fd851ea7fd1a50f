"""A ControlNet that is styled with its UNet: what can go wrong between the two."""

from __future__ import annotations

import copy

import encoder_oracles as papers
import pytest
import random_pipelines as tiny
import torch

from styleattn.methods import CSGO, StyleAligned, StyleShot
from styleattn.processors import _companion, apply, explain, remove
from styleattn.references import Reference

PICTURE = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pipe():
    return tiny.sdxl_controlnet()


@pytest.fixture(autouse=True)
def nothing_left(pipe):
    yield
    remove(pipe)


@pytest.fixture
def method(pipe):
    roles = papers.Roles(
        style=papers.Adapter(pipe.unet, 6, 1, ["up_blocks"]),
        control=papers.Adapter(pipe.controlnet, 6, 2, ["down_blocks"]),
    )
    return CSGO(adapter=roles, references=Reference(embeds=papers.embedding(0)))


def processors(pipe):
    return {**pipe.unet.attn_processors, **{("c", k): v for k, v in _control(pipe).items()}}


def _control(pipe):
    return pipe.controlnet.attn_processors


def untouched(pipe, before):
    same = all(processors(pipe)[k] is v for k, v in before.items())
    models = (pipe.unet, pipe.controlnet)
    hooks = [h for m in models for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    left = [m for m in models if "_styleattn_controller" in m.__dict__]
    return same and not hooks and not left


def test_a_failure_in_the_controlnet_gives_back_the_unet(pipe, method, monkeypatch):
    before = processors(pipe)

    def fail(self, model):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(_companion.ControlController, "install", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        apply(pipe, method)
    assert untouched(pipe, before)


def test_a_failure_gives_back_the_style_before(pipe, run, method, monkeypatch):
    shot = StyleShot(adapter=method.adapter.style, references=method.references)
    apply(pipe, shot)
    during = processors(pipe)
    styled = run(pipe, ["a cat"], image=PICTURE, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(_companion.ControlController, "install", lambda self, model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apply(pipe, method)
    assert {k: type(v) for k, v in processors(pipe).items()} == {
        k: type(v) for k, v in during.items()
    }
    assert torch.equal(run(pipe, ["a cat"], image=PICTURE, steps=1), styled)


def test_applying_again_replaces_both(pipe, run, method):
    before = processors(pipe)
    plain = run(pipe, ["a cat"], image=PICTURE)
    with apply(pipe, method):
        once = run(pipe, ["a cat"], image=PICTURE)
    apply(pipe, StyleShot(adapter=method.adapter.style, references=method.references))
    apply(pipe, method)
    apply(pipe, method)
    assert torch.equal(run(pipe, ["a cat"], image=PICTURE), once)
    apply(pipe, StyleAligned())  # has nothing for the ControlNet
    assert all(_control(pipe)[k[1]] is v for k, v in before.items() if isinstance(k, tuple))
    remove(pipe)
    assert untouched(pipe, before)
    assert torch.equal(run(pipe, ["a cat"], image=PICTURE), plain)


def test_a_copy_of_the_unet_is_not_the_pipelines(pipe, method):
    with apply(pipe, method):
        other = copy.deepcopy(pipe.unet)
    remove(other)
    assert "_styleattn_controller" not in other.__dict__
    with apply(pipe, method):
        remove(copy.deepcopy(pipe.unet))
        assert "controlnet.down_blocks" in str(explain(pipe))


def test_calls_outside_a_pipeline_need_a_layout(pipe, method):
    told = {
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "controlnet_cond": PICTURE.expand(2, -1, -1, -1),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)},
    }
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad(), apply(pipe, method) as handle:
        with pytest.raises(RuntimeError, match="ControlNet was called outside a diffusers pipe"):
            pipe.controlnet(x, 1, **told)
        with handle.layout(chunks=2):
            styled = pipe.controlnet(x, 1, **told).mid_block_res_sample
        with handle.paused():
            plain = pipe.controlnet(x, 1, **told).mid_block_res_sample
        odd = pytest.raises(RuntimeError, match="3 rows of the ControlNet is not 2 equal chunks")
        with odd, handle.layout(chunks=2):
            pipe.controlnet(torch.randn(3, 4, 16, 16), 1, **told)
    assert not torch.equal(styled, plain)


def test_several_controlnets_are_refused(pipe, method):
    from diffusers import MultiControlNetModel

    before = processors(pipe)
    net = pipe.controlnet
    pipe.controlnet = MultiControlNetModel([net, net])
    try:
        with pytest.raises(TypeError, match="one ControlNetModel, the pipeline has a MultiControl"):
            apply(pipe, method)
    finally:
        pipe.controlnet = net
    assert untouched(pipe, before)


def test_a_bare_unet_has_no_controlnet(pipe, method):
    with apply(pipe.unet, method):
        assert "controlnet" not in str(explain(pipe.unet))
