"""torch.compile of a styled FLUX transformer: no new graph for another step, weight or strength."""

from __future__ import annotations

import pytest
import random_flux
import torch
from random_flux import relative
from torch._dynamo.testing import CompileCounter

from styleattn.methods import AlignedGen, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.references import Reference

torch.set_num_threads(1)
LEVELS = torch.tensor([1000.0, 800.0, 500.0, 200.0])
CURVE = [1.0, 0.6, 0.3, 0.1]
REDUX = Redux(references=(Reference(embeds=torch.randn(4, 32), steps=CURVE),))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small():
    return random_flux.transformer(num_layers=1, num_single_layers=1)


def call(model, level):
    x = random_flux.inputs(batch=2)
    x["timestep"] = (level / 1000).expand(2)
    with torch.no_grad():
        return model(**x, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [StyleAligned(steps=CURVE), AlignedGen(steps=CURVE, time_power=2.0), REDUX],
    ids=lambda m: m.name,
)
def test_blocks(method):
    """compile_repeated_blocks: one graph per kind of block over the steps of a curve, of which the
    first is a plain 1 and may have its own."""
    model, counter = small(), CompileCounter()
    with apply(model, method) as handle, handle.layout(1, timesteps=LEVELS):
        expected = [call(model, level) for level in LEVELS]
        for name in ("transformer_blocks", "single_transformer_blocks"):
            getattr(model, name)[0].compile(fullgraph=True, backend=counter)
        got = [call(model, level) for level in LEVELS]
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-5
    assert counter.frame_count <= 4


class Counter:
    """A backend that counts graphs as large as a transformer (a hook's own little graph aside)."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += len(graph.graph.nodes) > 60
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"steps": CURVE}], ids=["always", "curve"])
def test_the_whole_transformer(knobs):
    """One graph over the steps of a schedule, and over strengths that change in place."""
    model, counter = small(), Counter()
    with apply(model, StyleAligned(**knobs)) as handle, handle.layout(1, timesteps=LEVELS):
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for shift in (0.0, 0.5):
            handle.update(StyleAligned(shared_score_shift=shift, **knobs))
            for level in LEVELS[:3]:
                expected = call(model, level)
                assert relative(call(compiled, level), expected) <= 1e-5
    assert counter.graphs == 1


@pytest.mark.slow
def test_tokens_of_methods():
    """Which of true guidance's two calls runs is not to be seen from inside one graph: there the
    tokens are refused; with a graph break before the transformer they are there."""
    model = small()
    method = Redux(references=(Reference(embeds=torch.randn(4, 32)),))
    with apply(model, method):
        expected = call(model, LEVELS[0])
        assert relative(call(torch.compile(model, backend="eager"), LEVELS[0]), expected) <= 1e-5
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"(?s)true CFG|exception"):
            call(whole, LEVELS[0])
