"""torch.compile of UNets under attention-injection methods: one graph, and the eager numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import random_pipelines as tiny
import torch
from torch._dynamo.backends.common import aot_autograd

from styleattn.methods import (
    CrossImageAttention,
    ReferenceOnly,
    StyleID,
    VisualStylePrompting,
    ZStar,
)
from styleattn.processors import apply
from styleattn.references import Reference

pytestmark = pytest.mark.slow

SCHEDULED = (Reference(weight=0.5), Reference(steps=(1.0, 0.6, 0.2)))
METHODS = {
    "style_id": StyleID(layers="all", references=SCHEDULED),
    "visual_style_prompting": VisualStylePrompting(layers="all", steps=(0.0, 0.5)),
    "z_star": ZStar(layers="all", steps=(0.3, 1.0), rearrange_style=False),
    "cross_image_attention": CrossImageAttention(layers="all", references=SCHEDULED),
    "reference_only": ReferenceOnly(steps=(1.0, 0.5, 0.2)),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_graph(run, distance, name):
    """Schedules, weights and numbers are tensors: they change without another graph."""
    pipe, method, graphs = tiny.sdxl(), METHODS[name], []
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes) > 60)
        return graph.forward

    with apply(pipe, method):
        expected = run(pipe, steps=3)
    with apply(pipe, method) as handle:
        pipe.unet.compile(fullgraph=True, backend=aot_autograd(fw_compiler=count))
        got = run(pipe, steps=3)
        assert distance(got, expected) <= 1e-5 and sum(graphs) == 1
        if method.NUMBERS:
            number = 20.0 if name == "z_star" else 0.3  # random networks attend evenly
            other = replace(method, **{method.NUMBERS[0]: number})
            handle.update(other)
            again = run(pipe, steps=3)
            pipe.unet._compiled_call_impl = None
            assert sum(graphs) == 1 and distance(again, run(pipe, steps=3)) <= 1e-5
            assert distance(again, got) > 1e-5
    torch._dynamo.reset()
