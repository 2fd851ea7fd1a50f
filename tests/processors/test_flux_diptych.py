"""FLUX.1 Fill on a canvas of two panels, against the stock transformer with a dense mask and its
tokens in raster order."""

from __future__ import annotations

import itertools
import math
import pickle
from types import SimpleNamespace

import checkpoints
import pytest
import random_flux
import torch
from PIL import Image
from random_flux import relative
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from styleattn.inversion import HostUnsupported
from styleattn.methods import FillDiptych, IPAdapter, PuLIDFLUX, Redux, StyleAligned
from styleattn.processors import apply
from styleattn.processors._flux_panels import PanelOrder
from styleattn.references import Reference

torch.set_num_threads(1)
T, M = 16, 9
PROMPTS = ["a cat", "a house"]
STRENGTHS = ("a_to_b", "b_to_a", "a_to_redux", "b_to_redux", "redux_to_a", "redux_to_b")
ALL = dict(zip(STRENGTHS, (0.0, 2.0, 0.5, 3.0, 0.3, 1.7), strict=True))
TOKENS = torch.randn(M, 32, generator=torch.Generator().manual_seed(1))
PICTURE = Image.effect_noise((32, 16), 60).convert("RGB")


@pytest.fixture(scope="module")
def pipe():
    return random_flux.fill()


def paint(pipe, size=(16, 32), prompt_embeds=None, **arguments):
    """A call over three steps, latents out; the right half is painted."""
    height, width = size
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    prompts = {"prompt": PROMPTS} if prompt_embeds is None else {"prompt_embeds": prompt_embeds}
    return pipe(
        **{"image": PICTURE.resize((width, height)), "mask_image": mask, **prompts, **arguments},
        height=height,
        width=width,
        max_sequence_length=T,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def dense(strengths, grid=(8, 16), cells=8, axis=1, redux=1.0, mask=None, steps=1.0):
    """log s between the groups of tokens, [S, S], in raster order."""
    count = grid[0] * grid[1]
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 2)
    second = place[:, axis] >= cells
    image = torch.arange(T + M, T + M + count)
    groups = {"a": image[~second], "b": image[second], "redux": torch.arange(T, T + M)}
    bias = torch.zeros(T + M + count, T + M + count)
    for name, s in strengths.items():
        rows, columns = (groups[g] for g in name.split("_to_"))
        bias[rows[:, None], columns[None]] += steps * math.log(s) if s else -math.inf
    others = torch.cat([torch.arange(T), image])
    bias[others[:, None], groups["redux"][None]] += math.log(redux)
    if mask is not None:
        bias[:T, T : T + M] += mask.mean().log()
        bias[T + M :, T : T + M] += mask.flatten().log()[:, None]
    return bias


def stock(pipe, bias, **arguments):
    """The stock pipeline with the picture's tokens behind the prompt's, and a dense bias."""
    text, pooled, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=T)
    both = torch.cat([text, TOKENS.expand(len(PROMPTS), -1, -1)], 1)
    more = {"joint_attention_kwargs": {"attention_mask": bias}}
    return paint(pipe, prompt_embeds=both, pooled_prompt_embeds=pooled, **more, **arguments)


def redux(weight=1.0, **more):
    return Redux(references=(Reference(embeds=TOKENS, weight=weight, **more),))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_strength_is_a_bias_between_segments(pipe, strength):
    expected = stock(pipe, dense({strength: 2.5}))
    assert relative(expected, stock(pipe, dense({}))) > 1e-3
    with apply(pipe, redux(), FillDiptych(**{strength: 2.5})):
        assert relative(paint(pipe), expected) <= 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_all_at_once_in_either_order(pipe, backend):
    """Also a strength of 0, and Redux' own; which method comes first is all one."""
    expected = stock(pipe, dense(ALL, redux=0.7))
    for methods in ((redux(0.7), FillDiptych(**ALL)), (FillDiptych(**ALL), redux(0.7))):
        with apply(pipe, *methods, backend=backend):
            assert relative(paint(pipe), expected) <= 1e-5


@pytest.mark.parametrize(
    ("arrangement", "split", "size", "grid", "cells", "axis"),
    [
        ("stacked", 0.5, (32, 16), (16, 8), 8, 0),
        ("side_by_side", 0.3, (6, 34), (3, 17), 5, 1),
        ("stacked", 0.2, (10, 14), (5, 7), 1, 0),
    ],
)
def test_arrangements_and_odd_grids(pipe, arrangement, split, size, grid, cells, axis):
    expected = stock(pipe, dense(ALL, grid, cells, axis), size=size)
    with apply(pipe, redux(), FillDiptych(arrangement=arrangement, split=split, **ALL)):
        assert relative(paint(pipe, size), expected) <= 1e-5


def test_every_layer_by_itself(pipe):
    """The output of each attention module in the first call, back in raster order."""
    kept = {"stock": [], "ours": []}

    def watch(which):
        def hook(module, args, output):
            kept[which].append(output)

        layers = [m.attn for m in pipe.transformer.transformer_blocks]
        layers += [m.attn for m in pipe.transformer.single_transformer_blocks]
        return [layer.register_forward_hook(hook) for layer in layers]

    hooks = watch("stock")
    stock(pipe, dense(ALL))
    [hook.remove() for hook in hooks]
    with apply(pipe, redux(), FillDiptych(**ALL)):
        hooks = watch("ours")
        paint(pipe)
        [hook.remove() for hook in hooks]
    columns = torch.arange(128) % 16
    order = torch.cat([torch.where(columns < 8)[0], torch.where(columns >= 8)[0]])
    for i in range(4):
        theirs, ours = kept["stock"][i], kept["ours"][i]
        if isinstance(theirs, tuple):
            assert relative(ours[1], theirs[1]) <= 1e-5
            theirs, ours = theirs[0][:, order], ours[0]
        else:
            theirs = torch.cat([theirs[:, : T + M], theirs[:, T + M :][:, order]], 1)
        assert relative(ours, theirs) <= 1e-5


def test_without_biases_it_is_the_very_pipeline(pipe):
    """Bit for bit where every strength is 1; the order alone changes nothing but rounding."""
    plain = paint(pipe)
    with apply(pipe, FillDiptych()):
        assert torch.equal(paint(pipe), plain)
    with apply(pipe, FillDiptych(a_to_b=3.0, steps=(0.0, 0.0))):
        assert relative(paint(pipe), plain) <= 1e-5
    with apply(pipe, redux()):
        shown = paint(pipe)
    with apply(pipe, redux(), FillDiptych()):
        assert torch.equal(paint(pipe), shown)
    assert torch.equal(paint(pipe), plain)


def test_layers_and_schedules(pipe):
    """Half of the layers; a curve of weights: the bias times the weight; a range of steps."""
    bias, nothing = dense({"b_to_a": 4.0}), dense({})
    calls = []

    def hide(module, args, kwargs):
        return args, {**kwargs, "attention_mask": nothing}

    layers = [m.attn for m in pipe.transformer.single_transformer_blocks]
    hooks = [a.register_forward_pre_hook(hide, with_kwargs=True) for a in layers]
    expected = stock(pipe, bias)
    [hook.remove() for hook in hooks]
    with apply(pipe, redux(), FillDiptych(b_to_a=4.0, layers="transformer_blocks")):
        assert relative(paint(pipe), expected) <= 1e-5
    plain, weights = pipe.transformer.forward, (0.5, 0.0, 1.0)

    def by_step(**inputs):
        now = dense({"b_to_a": 4.0}, steps=weights[len(calls)])
        calls.append(1)
        return plain(**{**inputs, "joint_attention_kwargs": {"attention_mask": now}})

    pipe.transformer.forward = by_step
    try:
        expected = stock(pipe, bias)
    finally:
        del pipe.transformer.forward
    with apply(pipe, redux(), FillDiptych(b_to_a=4.0, steps=weights)):
        assert relative(paint(pipe), expected) <= 1e-5


def test_strengths_change_in_place(pipe):
    with apply(pipe, redux(), FillDiptych(b_to_a=2.0)) as handle:
        for s in (5.0, 1.0, 0.5):
            handle.update(FillDiptych(b_to_a=s))
            got = paint(pipe)
            with handle.paused():
                expected = stock(pipe, dense({"b_to_a": s}))
            assert relative(got, expected) <= 1e-5
        with pytest.raises(ValueError, match="numbers"):
            handle.update(FillDiptych(split=0.25))


def test_masks_find_their_tokens(pipe):
    """Redux in panel B alone, by a mask of the canvas: where its tokens are, not where they lie."""
    mask = torch.zeros(8, 16)
    mask[:, 8:] = 1.0
    mask[2, 3] = 0.25
    expected = stock(pipe, dense({"b_to_a": 2.0}, mask=mask))
    with apply(pipe, redux(mask=mask), FillDiptych(b_to_a=2.0)):
        assert relative(paint(pipe), expected) <= 1e-5


def test_next_to_a_method_on_the_images(pipe):
    """StyleAligned parts no image and comes first: with the order alone it is what it was."""
    with apply(pipe, StyleAligned()):
        expected = paint(pipe)
    with apply(pipe, FillDiptych(a_to_redux=2.0), StyleAligned()):
        assert relative(paint(pipe), expected) <= 1e-5
    with apply(pipe, FillDiptych(b_to_a=2.0), StyleAligned()):
        assert relative(paint(pipe), expected) > 1e-4


def test_next_to_images_and_identities_in_panel_b(pipe, tmp_path):
    """Masks of the canvas keep an IP-Adapter and PuLID to panel B, in whatever order its tokens
    are."""
    mask = torch.zeros(8, 16)
    mask[:, 8:] = 1.0
    save_file(
        checkpoints.noise(checkpoints.xlabs(2, 32, 32, 32, 4)), tmp_path / "xlabs.safetensors"
    )
    widths = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "heads": 2}
    tensors = checkpoints.noise(checkpoints.pulid(2, **widths, image=32))
    save_file(tensors, tmp_path / "pulid.safetensors")
    image = Reference(embeds=torch.randn(32), negative=torch.zeros(32), mask=mask)
    shown = IPAdapter(adapter=tmp_path / "xlabs.safetensors", references=image)
    known = Reference(embeds=torch.randn(6, 20), mask=mask)
    pulid = PuLIDFLUX(adapter=tmp_path / "pulid.safetensors", references=known)
    plain = paint(pipe)
    for method in (shown, pulid):
        with apply(pipe, method):
            expected = paint(pipe)
        assert relative(expected, plain) > 1e-4
        with apply(pipe, method, FillDiptych(a_to_redux=2.0)):
            assert relative(paint(pipe), expected) <= 1e-5


@pytest.mark.slow
def test_compiled_blocks():
    """One graph per kind of block over the steps of a curve and over strengths that change in
    place."""
    torch._dynamo.reset()
    blocks = {"num_layers": 1, "num_single_layers": 1}
    model = random_flux.transformer(in_channels=20, out_channels=8, **blocks)
    levels, counter = torch.tensor([1000.0, 800.0, 500.0, 200.0]), CompileCounter()
    inputs = random_flux.inputs() | {"hidden_states": torch.randn(1, 12, 20)}

    def calls():
        with torch.no_grad():
            return [model(**inputs | {"timestep": x[None] / 1000}).sample for x in levels]

    knobs = {"steps": [0.9, 0.6, 0.3, 0.1]}
    shown = Redux(references=(Reference(embeds=torch.randn(4, 32)),))
    with (
        apply(model, shown, FillDiptych(b_to_a=3.0, **knobs)) as handle,
        handle.layout(1, timesteps=levels),
    ):
        expected = [calls()]
        handle.update(FillDiptych(b_to_a=0.5, a_to_redux=2.0, **knobs))
        expected.append(calls())
        for name in ("transformer_blocks", "single_transformer_blocks"):
            getattr(model, name)[0].compile(fullgraph=True, backend=counter)
        handle.update(FillDiptych(b_to_a=3.0, **knobs))
        got = [calls()]
        handle.update(FillDiptych(b_to_a=0.5, a_to_redux=2.0, **knobs))
        got.append(calls())
    for mine, theirs in zip(got, expected, strict=True):
        assert all(relative(a, b) <= 1e-5 for a, b in zip(mine, theirs, strict=True))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def arranged(method, grid=(3, 5), **more):
    ids = torch.zeros(*grid, 3)
    ids[..., 1] += torch.arange(grid[0])[:, None]
    ids[..., 2] += torch.arange(grid[1])
    count = grid[0] * grid[1]
    inputs = {
        "hidden_states": torch.randn(2, count, 4),
        "img_ids": ids.flatten(0, 1),
        "controlnet_block_samples": [torch.randn(2, count, 8)],
        "joint_attention_kwargs": {"attention_mask": torch.arange(4.0 + count)[None], "scale": 1.0},
        **more,
    }
    return inputs, *PanelOrder([method]).arrange([method], inputs, count)


def test_the_order_and_back_is_exact():
    method = FillDiptych(b_to_a=2.0, split=0.4)
    inputs, given, panels = arranged(method)
    assert panels.first == 6
    assert given["img_ids"][:6, 2].max() == 1 and given["img_ids"][6:, 2].min() == 2
    for output in ((given["hidden_states"], "x"), SimpleNamespace(sample=given["hidden_states"])):
        back = panels.restored(output)
        back = back[0] if isinstance(back, tuple) else back.sample
        assert torch.equal(back, inputs["hidden_states"])
    for name in ("hidden_states", "img_ids"):
        dim = 0 if name == "img_ids" else 1
        assert torch.equal(given[name].index_select(dim, panels.inverse), inputs[name])
    (residual,), (before,) = (x["controlnet_block_samples"] for x in (given, inputs))
    assert torch.equal(residual.index_select(1, panels.inverse), before)
    mask = given["joint_attention_kwargs"]["attention_mask"][0]
    assert torch.equal(mask[:4], torch.arange(4.0))
    assert torch.equal(mask[4:].index_select(0, panels.inverse), 4 + torch.arange(15.0))
    assert pickle.loads(pickle.dumps(PanelOrder([method]))).method == 0


def test_stacked_panels_stay_where_they_are():
    inputs, given, panels = arranged(FillDiptych(b_to_a=2.0, arrangement="stacked", split=0.6))
    assert panels.first == 10 and panels.order is None and panels.restored("x") == "x"
    assert given["hidden_states"] is inputs["hidden_states"]


def peak(model, **inputs):
    """Bytes that a call of the transformer holds at most, beside what was there."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.no_grad(), torch.profiler.profile(activities=[cpu], profile_memory=True) as seen:
        model(**inputs)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


def test_biases_take_no_memory():
    """A call of 2304 image tokens: nothing as large as a matrix of all tokens by all tokens, where
    the eager backend, which makes its scores, needs more."""
    model = random_flux.transformer(in_channels=20, out_channels=8)
    inputs = random_flux.inputs(grid=(48, 48)) | {"hidden_states": torch.randn(1, 2304, 20)}
    matrix = 4 * (48 * 48 + 7) ** 2
    plain, found = peak(model, **inputs), {}
    for backend in ("torch", None, "reference"):
        with (
            apply(model, FillDiptych(b_to_a=2.0, a_to_b=0.0), backend=backend) as handle,
            handle.layout(1),
        ):
            found[backend] = peak(model, **inputs) - plain
    assert found["torch"] < matrix / 8 and found[None] < matrix / 8
    assert found["reference"] > matrix


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"a_to_b": -1.0, "b_to_a": -2.0}, "a_to_b.*b_to_a"),
        ({"b_to_a": math.inf}, "finite"),
        ({"split": 1.0, "arrangement": "diagonal"}, "split.*arrangement"),
        ({"references": (Reference(),)}, "panel A"),
    ],
)
def test_bad_knobs(bad, reason):
    with pytest.raises(ValueError, match=f"FillDiptych: .*{reason}"):
        FillDiptych(**bad)


def test_plain_data_and_back():
    method = FillDiptych(b_to_a=2.0, split=0.25, arrangement="stacked", steps=(0.0, 0.5))
    assert FillDiptych.from_dict(method.to_dict()) == method


def test_what_does_not_fill_is_refused_whole(pipe):
    from diffusers import FluxControlPipeline

    dev = random_flux.flux()
    depth = FluxControlPipeline(**random_flux.parts(in_channels=8, out_channels=4))
    cases = ((dev, "a FluxPipeline takes no masks; .*4 channels"), (depth, "latents and a picture"))
    for host, reason in cases:
        before = dict(host.transformer.attn_processors)
        with pytest.raises(HostUnsupported, match=f"needs FLUX.1 Fill.*{reason}"):
            apply(host, FillDiptych(b_to_a=2.0))
        assert all(p is before[n] for n, p in host.transformer.attn_processors.items())
    with pytest.raises(ValueError, match="apply one of them"):
        apply(pipe, FillDiptych(), FillDiptych(b_to_a=2.0))
    with (
        apply(pipe, FillDiptych(b_to_a=2.0, split=0.01)),
        pytest.raises(ValueError, match="without any"),
    ):
        paint(pipe)
    with apply(pipe.transformer, FillDiptych(b_to_a=2.0)):
        pass


def test_depth_and_canny_with_redux():
    """FluxControlPipeline: a control picture on the channels, Redux in the text."""
    from diffusers import FluxControlPipeline

    control = FluxControlPipeline(**random_flux.parts(in_channels=8, out_channels=4))
    control.set_progress_bar_config(disable=True)
    text, pooled, _ = control.encode_prompt(PROMPTS, None, max_sequence_length=T)

    def go(**arguments):
        return control(
            control_image=PICTURE.resize((16, 16)),
            height=16,
            width=16,
            max_sequence_length=T,
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **arguments,
        ).images

    bias = dense({}, (8, 8), redux=0.4)
    more = {"joint_attention_kwargs": {"attention_mask": bias}, "pooled_prompt_embeds": pooled}
    both = torch.cat([text, TOKENS.expand(2, -1, -1)], 1)
    expected = go(prompt_embeds=both, **more)
    with apply(control, redux(0.4)):
        assert relative(go(prompt=PROMPTS), expected) <= 1e-5
    assert relative(go(prompt=PROMPTS), expected) > 1e-3
