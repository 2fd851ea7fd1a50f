"""torch.compile of a styled UNet: one graph over steps and scales, and the eager numbers."""

from __future__ import annotations

import dataclasses

import pytest
import random_pipelines as tiny
import torch
from torch._dynamo.backends.common import aot_autograd

from styleattn.methods import StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference, StyleBank

CURVE = (1.0, 0.6, 0.3, 0.1)
METHODS = {
    "range": StyleAligned(steps=(0.0, 0.5)),
    "curve": StyleAligned(references=(Reference(weight=0.8, steps=CURVE),), share_group_norm=False),
}


@pytest.fixture(scope="module")
def compiled_pipe():
    return tiny.sdxl(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=(2,),
        transformer_layers_per_block=(1,),
    )


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """An aot_eager backend that counts graphs as large as a UNet (a hook's own little graph
    aside)."""

    def __init__(self):
        self.graphs = 0
        self.backend = aot_autograd(fw_compiler=self.compile)

    def compile(self, graph, inputs):
        self.graphs += len(graph.graph.nodes) > 60
        return graph.forward


def compile_in_place(pipe, counter):
    pipe.unet.compile(fullgraph=True, backend=counter.backend)
    return lambda: setattr(pipe.unet, "_compiled_call_impl", None)


def compile_wrapped(pipe, counter):
    plain = pipe.unet
    pipe.unet = torch.compile(plain, fullgraph=True, backend=counter.backend)
    return lambda: setattr(pipe, "unet", plain)


@pytest.mark.slow
def test_one_graph_over_steps_and_scales(compiled_pipe, run, distance):
    method = METHODS["curve"]
    louder = dataclasses.replace(method, shared_score_shift=0.7, shared_score_scale=0.9)
    counter = Counter()
    with apply(compiled_pipe, method) as handle:
        expected = run(compiled_pipe, steps=4)
        undo = compile_wrapped(compiled_pipe, counter)
        try:
            got = run(compiled_pipe, steps=4)
            handle.update(louder)
            second = run(compiled_pipe, steps=4)
        finally:
            undo()
        assert counter.graphs == 1
        assert distance(got, expected) <= 1e-5
        assert distance(second, run(compiled_pipe, steps=4)) <= 1e-5
    assert distance(second, expected) > 1e-6


@pytest.mark.slow
def test_apply_after_compiling_in_place(compiled_pipe, run, distance):
    """The other order, and the other way to compile, than above."""
    counter = Counter()
    with apply(compiled_pipe, METHODS["range"]):
        expected = run(compiled_pipe)
    undo = compile_in_place(compiled_pipe, counter)
    try:
        with apply(compiled_pipe, METHODS["range"]):
            assert distance(run(compiled_pipe), expected) <= 1e-5
        assert counter.graphs == 1
    finally:
        undo()


@pytest.mark.slow
def test_bank_rows_are_traced(compiled_pipe, run, distance):
    torch.manual_seed(0)
    width = {"prompt_embeds": (77, 64), "text_embeds": (32,)}
    conditions = {
        f"{sign}{name}": torch.randn(1, *shape)
        for name, shape in width.items()
        for sign in ("", "negative_")
    }
    conditions["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    bank = StyleBank(torch.randn(1, 5, 4, 16, 16), torch.tensor([750, 500, 250, 0]), conditions)
    counter = Counter()
    with apply(compiled_pipe, StyleAligned(), bank=bank):
        expected = run(compiled_pipe, steps=4)
        undo = compile_wrapped(compiled_pipe, counter)
        try:
            assert distance(run(compiled_pipe, steps=4), expected) <= 1e-5
        finally:
            undo()
    assert counter.graphs == 1


def test_a_bare_compiled_unet_says_what_is_missing(compiled_pipe, run):
    counter = Counter()
    with apply(compiled_pipe.unet, StyleAligned()):
        undo = compile_wrapped(compiled_pipe, counter)
        try:
            with pytest.raises(Exception, match="layout"):
                run(compiled_pipe)
        finally:
            undo()
