"""PuLID on FLUX next to other methods, pipelines, caches, offloading and the compiler: always
behind the block, and before a ControlNet's residual."""

from __future__ import annotations

import copy

import checkpoints
import pulid_oracle
import pytest
import random_flux
import torch
from random_flux import EACH, load_ip_adapter, run
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from styleattn.adapters import load_pulid
from styleattn.methods import (
    IPAdapter,
    PuLIDFLUX,
    Redux,
    StyleAligned,
    StyleID,
    VisualStylePrompting,
)
from styleattn.processors import apply, remove
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

torch.set_num_threads(1)
PROMPTS = ("a toy train", "a cat")
WIDTHS = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32, "heads": 2}
TENSORS = checkpoints.noise(checkpoints.pulid(4, **WIDTHS))
ANN = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
WIDE = ANN.expand(2, -1, -1)
TOKENS = torch.randn(9, 32, generator=torch.Generator().manual_seed(5))
REDUX = Redux(references=(Reference(embeds=TOKENS, weight=0.6),))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("pulid") / "pulid_flux.safetensors"
    save_file(TENSORS, path)
    return load_pulid(path, double=3, single=5)


@pytest.fixture
def pulid(adapter):
    return PuLIDFLUX(adapter=adapter, references=(Reference(embeds=ANN, weight=0.8),))


@pytest.fixture
def pipe():
    return random_flux.flux(num_layers=3, num_single_layers=5)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def shown(call, inputs):
    return [(WIDE, 0.8)]


def expected(pipe, *methods, people=shown, **arguments):
    """PuLID's forward around the blocks that other methods have changed."""
    handle = apply(pipe, *methods) if methods else None
    with pulid_oracle.instead(pipe, TENSORS, people), torch.no_grad():
        out = run(pipe, PROMPTS, **arguments)
    if handle is not None:
        handle.remove()
    return out


@pytest.mark.parametrize("methods", [[REDUX], [StyleAligned(shared_score_shift=0.3)]])
def test_with_tokens_and_with_rows(pipe, pulid, methods):
    """Redux makes the text longer; StyleAligned shares rows: what is read is the same."""
    theirs = expected(pipe, *methods)
    assert relative(theirs, expected(pipe)) > 1e-3
    for order in ([*methods, pulid], [pulid, *methods]):
        with apply(pipe, *order):
            assert relative(run(pipe, PROMPTS), theirs) <= 1e-5


def test_behind_the_adapters_that_diffusers_loads(pipe, pulid):
    """An IP-Adapter adds behind the block's MLP: the identity is read after it."""
    load_ip_adapter(pipe)
    images = {"ip_adapter_image_embeds": [EACH[:1]]}
    images["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 32)]
    theirs = expected(pipe, **images)
    with apply(pipe, pulid):
        assert relative(run(pipe, PROMPTS, **images), theirs) <= 1e-5


def test_with_a_bank_whose_references_see_nobody(pipe, pulid):
    """The bank's rows are drawn as they are without an identity; the others read it."""
    clean = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    told = {"num_inference_steps": 3, "max_sequence_length": 16}
    references = [Reference(latents=x) for x in clean]
    for method, count in ((StyleAligned(), 1), (VisualStylePrompting(), 1), (StyleID(), 2)):
        bank = build_bank(pipe, references[:count], method, **told)

        def only_the_others(call, inputs, count=count):
            share = torch.full((count + 2, 1, 1), 0.8)
            share[:count] = 0.0
            return [(ANN.expand(count + 2, -1, -1), share)]

        with apply(pipe, method, bank=bank):
            alone = run(pipe, PROMPTS)
            with pulid_oracle.instead(pipe, TENSORS, only_the_others), torch.no_grad():
                theirs = run(pipe, PROMPTS)
        assert relative(theirs, alone) > 1e-3
        for order in ([method, pulid], [pulid, method]):
            with apply(pipe, *order, bank=bank):
                assert relative(run(pipe, PROMPTS), theirs) <= 1e-5


def test_behind_adapters_of_methods_and_next_to_redux(pipe, pulid, tmp_path):
    """XLabs' after the MLP, InstantX' within the attention, Redux next to the text: the identity is
    read behind all of them, in whatever order they are given."""
    files = {"xlabs": checkpoints.xlabs(3, 32, 32, 32, 4)}
    files["instantx"] = checkpoints.instantx(8, 24, 32, 32, 5)
    shown = []
    for width, (name, shapes) in zip((32, 24), files.items(), strict=True):
        save_file(checkpoints.noise(shapes), tmp_path / f"{name}.safetensors")
        seen = Reference(embeds=torch.linspace(-1, 2, width), negative=torch.zeros(width))
        shown.append(IPAdapter(adapter=tmp_path / f"{name}.safetensors", references=(seen,)))
    theirs = expected(pipe, *shown, REDUX)
    for order in ([*shown, REDUX, pulid], [pulid, REDUX, *shown[::-1]]):
        with apply(pipe, *order):
            assert relative(run(pipe, PROMPTS), theirs) <= 1e-5


def test_before_a_controlnets_residual(pipe, pulid):
    x = random_flux.inputs(batch=2)
    residuals = [[torch.randn(2, 12, 32) for _ in range(n)] for n in (2, 3)]
    names = ("controlnet_block_samples", "controlnet_single_block_samples")
    named = dict(zip(names, residuals, strict=True))
    with torch.no_grad():
        theirs = pulid_oracle.forward(pipe.transformer, TENSORS, shown(0, x), x, residuals)
        with apply(pipe, pulid):
            ours = pipe.transformer(**x, **named, return_dict=False)[0]
    assert relative(ours, theirs) <= 1e-5


def test_pictures_in_context_are_left_alone(pipe, pulid):
    x = random_flux.inputs(batch=2)
    context = x["img_ids"].clone()
    context[:, 0] = 1
    x["img_ids"] = torch.cat([x["img_ids"], context])
    x["hidden_states"] = torch.cat([x["hidden_states"], torch.randn(2, 12, 4)], 1)
    only = torch.tensor([0.8] * 12 + [0.0] * 12)[:, None]
    with torch.no_grad():
        theirs = pulid_oracle.forward(pipe.transformer, TENSORS, [(WIDE, only)], x)
        with apply(pipe, pulid):
            assert relative(pipe.transformer(**x, return_dict=False)[0], theirs) <= 1e-5


def test_on_fills_canvas_a_mask_keeps_the_given_half(adapter):
    from PIL import Image

    pipe = random_flux.fill()
    pipe.transformer = random_flux.transformer(
        num_layers=3, num_single_layers=5, in_channels=20, out_channels=8
    )
    right = torch.zeros(4, 4)
    right[:, 2:] = 1.0
    given = {"image": Image.effect_noise((32, 32), 60).convert("RGB"), "strength": 1.0}
    given["mask_image"] = Image.new("L", (32, 32), 255)

    def go():
        generator = torch.Generator().manual_seed(0)
        sizes = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2}
        return pipe(
            list(PROMPTS), **given, **sizes, generator=generator, output_type="latent"
        ).images

    weights = right.repeat_interleave(4, 0).repeat_interleave(4, 1).flatten()[:, None]
    with pulid_oracle.instead(pipe, TENSORS, lambda call, x: [(WIDE, weights)]), torch.no_grad():
        theirs = go()
    method = PuLIDFLUX(adapter=adapter, references=(Reference(embeds=ANN, mask=right),))
    with apply(pipe, method):
        assert relative(go(), theirs) <= 1e-5
    assert relative(go(), theirs) > 1e-3


def test_block_caches_of_diffusers(pulid):
    """Where a cache answers for the blocks, what was read is in its answer, once."""
    from diffusers import FirstBlockCacheConfig

    pipe = random_flux.flux(num_layers=3, num_single_layers=6)
    calls = []
    theirs = {}
    for threshold in (1e9, 0.0):
        with apply(pipe, pulid) as handle:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            hook = pipe.transformer.single_transformer_blocks[1].attn.register_forward_hook(
                lambda *_: calls.append(1)
            )
            theirs[threshold] = run(pipe, PROMPTS, steps=3)
            hook.remove()
            pipe.transformer.disable_cache()
            if threshold == 0.0:
                assert relative(theirs[threshold], run(pipe, PROMPTS, steps=3)) <= 1e-5
            handle.remove()
    assert len(calls) == 1 + 3  # the first step computes, the others are answered
    assert relative(theirs[1e9], cached(pipe)) <= 1e-5


def cached(pipe):
    """The first step's residual of all blocks but the first on the first block of every step, with
    the identity read behind the first block of that step alone."""
    model, kept = pipe.transformer, []

    def replaced(**inputs):
        head = model.transformer_blocks[0]
        ends = []
        if not kept:
            first = head.register_forward_hook(lambda m, a, o: ends.append(o))
            out = pulid_oracle.forward(model, TENSORS, shown(0, inputs), inputs, ends=ends)
            first.remove()
            kept.append(ends[-1] - ends[0][1])
            return (out,)
        found = []
        hook = head.register_forward_hook(lambda m, a, k, o: found.append((k, o)), with_kwargs=True)
        pulid_oracle.forward(model, TENSORS, [], inputs)
        hook.remove()
        kwargs, (_, image) = found[0]
        return (model.proj_out(model.norm_out(image + kept[0], kwargs["temb"])),)

    model.forward = replaced
    try:
        with torch.no_grad():
            return run(pipe, PROMPTS, steps=3)
    finally:
        del model.forward


def test_offloading_and_casting(pipe, pulid):
    from accelerate import cpu_offload

    with apply(pipe, pulid):
        ours = run(pipe, PROMPTS)
        cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert relative(run(pipe, PROMPTS), ours) <= 1e-5
    grouped = random_flux.flux(num_layers=3, num_single_layers=5)
    grouped.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with apply(grouped, pulid):
        assert relative(run(grouped, PROMPTS), ours) <= 1e-5


def test_other_precisions_and_copies(pipe, pulid, adapter):
    """The weights follow the image tokens; the adapter itself stays as it was."""
    x = random_flux.inputs(batch=2)
    with torch.no_grad(), apply(pipe, pulid):
        whole = pipe.transformer(**x, return_dict=False)[0]
        other = copy.deepcopy(pipe.transformer).to(torch.float64)
        wide = {k: v.double() for k, v in x.items()}
        assert relative(other(**wide, return_dict=False)[0], whole.double()) <= 1e-5
        half = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
        low = {k: v if "ids" in k else v.bfloat16() for k, v in x.items()}
        ours = half(**low, return_dict=False)[0].float()
        remove(half)
        plain = half(**low, return_dict=False)[0].float()
        assert (ours - whole).norm() < 0.5 * (plain - whole).norm()
        assert torch.equal(pipe.transformer(**x, return_dict=False)[0], whole)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    remove(other)
    assert not any(m._forward_hooks for m in other.modules())


@pytest.mark.slow
def test_compiled_blocks(pipe, pulid):
    """Blocks share graphs, whichever identity attention stands behind them: two for double blocks,
    and for single blocks two times those that diffusers' strides make."""
    torch._dynamo.reset()
    x = random_flux.inputs(batch=2)
    with torch.no_grad(), apply(pipe, pulid):
        plain = pipe.transformer(**x, return_dict=False)[0]
        counter = CompileCounter()
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(pipe.transformer, kind):
                block.compile(fullgraph=True, backend=counter)
        for _ in range(2):
            assert relative(pipe.transformer(**x, return_dict=False)[0], plain) <= 1e-5
        assert counter.frame_count <= 6
        remove(pipe)
    torch._dynamo.reset()
