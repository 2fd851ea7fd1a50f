"""IP-Adapter against diffusers' own processors and against the formula written out: adapters of our
own and loaded ones, layer by layer and through whole UNets."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from image_prompts import Shown, embeds, given, written

from styleattn.adapters import ip_adapter_from
from styleattn.methods import IPAdapter, StyleAligned
from styleattn.processors import _cross, apply, remove
from styleattn.references import Reference

PROMPTS = ["a cat"]
STYLE = "up_blocks.0.attentions.1"


def load(pipe, *states):
    pipe.unet._load_ip_adapter_weights(list(states))


@contextlib.contextmanager
def loaded(pipe, states, scales):
    """Within: diffusers' own IP-Adapters."""
    load(pipe, *states)
    pipe.set_ip_adapter_scale(scales)
    try:
        yield
    finally:
        pipe.unload_ip_adapter()


def own(pipe, state):
    """The same checkpoint as an adapter of ours."""
    layers = [
        (name, pipe.unet.get_submodule(name).inner_dim, pipe.unet.config.cross_attention_dim)
        for name in images.cross_layers(pipe.unet)
    ]
    return ip_adapter_from(images.flat(state), layers)


def halves(size=32):
    left = torch.zeros(size, size)
    left[:, : size // 2] = 1
    return left, 1 - left


def seen(prompts, chunks=2):
    """Rows of a guided call: zeros for the unconditional ones."""
    nothing = [[torch.zeros_like(e) for e in row] for row in prompts]
    return [*nothing, *prompts] if chunks == 2 else prompts


def test_whole_unet(pipe, run, distance):
    """Two adapters of our own, one of them on some layers: diffusers' loaded ones and the
    formula, over all steps; and the same through the loaded ones."""
    states = images.checkpoint(pipe.unet, 0), images.checkpoint(pipe.unet, 1)
    plain = run(pipe, PROMPTS, steps=3)
    before = dict(pipe.unet.attn_processors)
    methods = (
        IPAdapter(0.7, own(pipe, states[0]), references=Reference(embeds=embeds(0))),
        IPAdapter(0.4, own(pipe, states[1]), layers=STYLE, references=Reference(embeds=embeds(1))),
    )
    with apply(pipe, *methods) as handle:
        ours = run(pipe, PROMPTS, steps=3)
        report = [r for r in handle.explain().rows if r.method]
    assert {r.method for r in report} == {"ip_adapter", "ip_adapter + ip_adapter"}
    assert torch.equal(run(pipe, PROMPTS, steps=3), plain)
    assert all(before[name] is p for name, p in pipe.unet.attn_processors.items())
    shown = [
        Shown(states[0], seen([[embeds(0)]]), 0.7),
        Shown(states[1], seen([[embeds(1)]]), 0.4, layers={STYLE: 1.0}),
    ]
    with written(pipe.unet, shown):
        formula = run(pipe, PROMPTS, steps=3)
    with loaded(pipe, states, [0.7, {"up": {"block_0": [0.0, 0.4]}}]):
        call = {"ip_adapter_image_embeds": given([embeds(0)], [embeds(1)])}
        theirs = run(pipe, PROMPTS, steps=3, **call)
        processors = dict(pipe.unet.attn_processors)
        with apply(pipe, IPAdapter()):
            through = run(pipe, PROMPTS, steps=3, **call)
        assert all(processors[name] is p for name, p in pipe.unet.attn_processors.items())
        assert torch.equal(run(pipe, PROMPTS, steps=3, **call), theirs)
    assert distance(formula, theirs) <= 1e-5
    assert distance(ours, theirs) <= 1e-5
    assert distance(through, theirs) <= 1e-5
    assert distance(ours, formula) <= 1e-5
    assert distance(plain, theirs) > 1e-2


@pytest.mark.parametrize("kind", ["own", "loaded"])
def test_every_layer(sdxl, run, distance, kind):
    """What enters each layer, through diffusers' processor: the same output."""
    state = images.checkpoint(sdxl.unet, 0)
    calls = {}

    def note(name):
        def hook(attn, args, kwargs, output):
            calls[name] = (args[0], kwargs, output)

        return hook

    names = images.cross_layers(sdxl.unet)
    with contextlib.ExitStack() as stack:
        method = IPAdapter(0.7, own(sdxl, state), references=Reference(embeds=embeds(0)))
        extra = {}
        if kind == "loaded":
            stack.enter_context(loaded(sdxl, [state], 0.7))
            method, extra = IPAdapter(), {"ip_adapter_image_embeds": given([embeds(0)])}
        with apply(sdxl, method):
            layers = [sdxl.unet.get_submodule(n) for n in names]
            hooks = [
                layer.register_forward_hook(note(n), with_kwargs=True)
                for n, layer in zip(names, layers, strict=True)
            ]
            run(sdxl, PROMPTS, steps=1, **extra)
            for hook in hooks:
                hook.remove()
    assert list(calls) and set(calls) == set(names)
    shown = Shown(state, seen([[embeds(0)]]), 0.7)
    for i, name in enumerate(names):
        attn, (x, kwargs, output) = sdxl.unet.get_submodule(name), calls[name]
        text = kwargs["encoder_hidden_states"]
        text = text[0] if isinstance(text, tuple) else text
        theirs = IPAdapterAttnProcessor2_0(attn.inner_dim, attn.cross_attention_dim, (4,), 0.7)
        for part, projections in (("k", theirs.to_k_ip), ("v", theirs.to_v_ip)):
            weight = state["ip_adapter"][f"{2 * i + 1}.to_{part}_ip.weight"]
            projections[0].load_state_dict({"weight": weight})
        tokens = torch.stack([shown.tokens(0), shown.tokens(1)])[:, None]
        with torch.no_grad():
            assert distance(output, theirs(attn, x, (text, [tokens]))) <= 1e-5
            assert distance(output, images.Written(i, name, [shown])(attn, x, text)) <= 1e-5


class Counted:
    """Calls of the operation, and of an adapter's projections, by layer."""

    def __init__(self, monkeypatch):
        self.attention, self.branches = 0, []
        inside = _cross.attention

        def counting(query, branches, **rest):
            self.attention += 1
            self.branches.append(len(branches))
            return inside(query, branches, **rest)

        monkeypatch.setattr(_cross, "attention", counting)


def test_one_call_per_layer_and_keys_made_once(sdxl, run, monkeypatch):
    """Three images of two adapters: a call per layer and step; K and V once for all steps, runs and
    prompts."""
    made = []
    adapters = [own(sdxl, images.checkpoint(sdxl.unet, s)) for s in (0, 1)]
    for adapter in adapters:
        for pair in adapter.pairs:
            pair.register_forward_hook(lambda *a: made.append(1))
    count = Counted(monkeypatch)
    layers = len(images.cross_layers(sdxl.unet))
    two = (Reference(embeds=embeds(0)), Reference(embeds=embeds(1), weight=0.5))
    methods = (
        IPAdapter(0.7, adapters[0], references=two),
        IPAdapter(0.4, adapters[1], references=Reference(embeds=embeds(2))),
    )
    with apply(sdxl, *methods):
        run(sdxl, PROMPTS, steps=3)
        assert count.attention == 3 * layers
        assert set(count.branches) == {4}  # the text and three images
        assert len(made) == 3 * layers
        run(sdxl, ["a dog", "a ship"], steps=2)
        assert count.attention == 5 * layers
        assert len(made) == 3 * layers


def test_loaded_keys_are_made_once_per_run(sdxl, run, monkeypatch):
    made, count = [], Counted(monkeypatch)
    layers = len(images.cross_layers(sdxl.unet))
    states = [images.checkpoint(sdxl.unet, s) for s in (0, 1)]
    call = {"ip_adapter_image_embeds": given([embeds(0)], [embeds(1)])}
    with loaded(sdxl, states, [0.7, 0.4]):
        for name in images.cross_layers(sdxl.unet):
            for projection in sdxl.unet.get_submodule(name).processor.to_k_ip:
                projection.register_forward_hook(lambda *a: made.append(1))
        run(sdxl, PROMPTS, steps=3, **call)
        theirs, made[:] = len(made), []
        with apply(sdxl, IPAdapter()):
            run(sdxl, PROMPTS, steps=3, **call)
            assert (theirs, len(made)) == (3 * 2 * layers, 2 * layers)
            assert count.attention == 3 * layers


def test_new_weights_make_new_keys(sdxl, run):
    """The same embeddings with another adapter loaded in place of the first."""
    call = {"ip_adapter_image_embeds": given([embeds(0)])}
    with loaded(sdxl, [images.checkpoint(sdxl.unet, 1)], 1.0), apply(sdxl, IPAdapter()):
        expected = run(sdxl, PROMPTS, **call)
    with apply(sdxl, IPAdapter()):
        with loaded(sdxl, [images.checkpoint(sdxl.unet, 0)], 1.0):
            other = run(sdxl, PROMPTS, **call)
        with loaded(sdxl, [images.checkpoint(sdxl.unet, 1)], 1.0):
            assert torch.equal(run(sdxl, PROMPTS, **call), expected)
    assert not torch.equal(other, expected)


@pytest.mark.filterwarnings("error:styleattn")
def test_loading_before_and_after(run, distance):
    """`apply` may come first; unloading leaves the plain model, without a word."""
    pipe = tiny.sdxl()
    state, call = images.checkpoint(pipe.unet), {"ip_adapter_image_embeds": given([embeds(0)])}
    plain = run(pipe, PROMPTS)
    with loaded(pipe, [state], 0.8):
        theirs = run(pipe, PROMPTS, **call)
    handle = apply(pipe, IPAdapter())
    assert torch.equal(run(pipe, PROMPTS), plain)
    assert {r.why for r in handle.explain().rows if r.method} == {
        "no adapter is loaded in the pipeline and the method has none: nothing is added"
    }
    with loaded(pipe, [state], 0.8):
        assert distance(run(pipe, PROMPTS, **call), theirs) <= 1e-5
        assert not any("nothing is added" in r.why for r in handle.explain().rows)
        kinds = {type(pipe.unet.get_submodule(n).processor) for n in images.cross_layers(pipe.unet)}
        assert kinds == {_cross.StyleIPAdapterProcessor}
    assert torch.equal(run(pipe, PROMPTS), plain)
    remove(pipe)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


FORMS = {
    "number": (0.6, False),
    "list": ([0.6, 0.3], False),
    "dictionary": ({"up": {"block_0": [0.0, 0.9]}}, False),
    "dictionaries": ([{"down": 0.4, "mid": 0.2}, {"up": {"block_0": [0.7, 0.9]}}], False),
    "mixed": ([0.5, {"mid": 1.0}], False),
    "zero": ([0.0, 0.5], False),
    "nested": ([[0.7, 0.2], [0.5, 0.0]], True),
    "masks": ([0.7, 0.4], True),
}


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_every_form(sdxl, run, distance, form):
    """`set_ip_adapter_scale` while the style is on, one to two images per adapter, with and without
    masks."""
    scale, masked = FORMS[form]
    states = [images.checkpoint(sdxl.unet, s) for s in (0, 1)]
    single = form in ("number", "dictionary")
    sets = [[embeds(0), embeds(1)], [embeds(2), embeds(3)]][: 1 if single else 2]
    call = {"ip_adapter_image_embeds": given(*sets)}
    if masked:
        masks = torch.stack(halves())[None]
        call["cross_attention_kwargs"] = {"ip_adapter_masks": [masks, masks.flip(1)]}
    with loaded(sdxl, states[: len(sets)], 1.0 if single else [1.0, 1.0]):
        with apply(sdxl, IPAdapter()):
            sdxl.set_ip_adapter_scale(scale)
            ours = run(sdxl, PROMPTS, **call)
        theirs = run(sdxl, PROMPTS, **call)
    assert distance(ours, theirs) <= 1e-5


def test_scale_layers_and_steps_weigh_loaded_images(sdxl, run, distance):
    """An `IPAdapter` without an adapter multiplies what `set_ip_adapter_scale` has set."""
    state, call = images.checkpoint(sdxl.unet), {"ip_adapter_image_embeds": given([embeds(0)])}

    def second_half_off(pipe, step, t, kwargs):
        pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 0.3]}} if step < 1 else 0.0)
        return kwargs

    with loaded(sdxl, [state], {"up": {"block_0": [0.0, 0.3]}}):
        theirs = run(sdxl, PROMPTS, steps=4, callback_on_step_end=second_half_off, **call)
        sdxl.set_ip_adapter_scale(0.6)
        with apply(sdxl, IPAdapter(0.5, layers=STYLE, steps=(0.0, 0.5))):
            assert distance(run(sdxl, PROMPTS, steps=4, **call), theirs) <= 1e-5


def test_an_update_changes_numbers_only(sdxl, run):
    """Another scale at once; another image, adapter or mask needs another `apply`."""
    state = images.checkpoint(sdxl.unet)
    adapter, shown = own(sdxl, state), Reference(embeds=embeds(0))
    method = IPAdapter(0.8, adapter, references=shown)
    with apply(sdxl, replace(method, scale=0.2)):
        expected = run(sdxl, PROMPTS)
    with apply(sdxl, method) as handle:
        for other in (
            replace(method, references=Reference(embeds=embeds(1))),
            replace(method, references=Reference(embeds=shown.embeds, negative=embeds(1))),
            replace(method, adapter=own(sdxl, state)),
        ):
            with pytest.raises(ValueError, match="changes numbers of an applied method only"):
                handle.update(other)
        handle.update(replace(method, scale=0.2))
        assert torch.equal(run(sdxl, PROMPTS), expected)


def test_several_images_share_a_softmax(sdxl, run, distance):
    state = images.checkpoint(sdxl.unet)
    both = tuple(Reference(embeds=embeds(s)) for s in (0, 1))
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=both)):
        ours = run(sdxl, PROMPTS)
    call = {"ip_adapter_image_embeds": given([embeds(0), embeds(1)])}
    with loaded(sdxl, [state], 0.8):
        assert distance(ours, run(sdxl, PROMPTS, **call)) <= 1e-5
    unequal = (both[0], Reference(embeds=embeds(1), weight=0.5))
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=unequal)):
        ours = run(sdxl, PROMPTS)
    shown = [Shown(state, seen([[embeds(s)]]), w) for s, w in ((0, 0.8), (1, 0.4))]
    with written(sdxl.unet, shown):
        assert distance(ours, run(sdxl, PROMPTS)) <= 1e-5


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("kind", ["own", "loaded"])
def test_an_image_for_each_prompt(sdxl, run, distance, kind, each):
    """Where diffusers mixes them: every prompt sees its own image, as in a call of its own."""
    state, prompts = images.checkpoint(sdxl.unet), ["a cat", "a ship"]
    noise = run.noise(sdxl, 2 * each)
    expected = []
    with loaded(sdxl, [state], 0.8):
        for i, prompt in enumerate(prompts):
            call = {"ip_adapter_image_embeds": given([embeds(i)])}
            rows = noise[i * each : (i + 1) * each]
            call["num_images_per_prompt"] = each
            expected.append(run(sdxl, [prompt], noise=rows, **call))
        if kind == "loaded":
            e = torch.stack([embeds(0), embeds(1)])[:, None]
            call = {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(e), e])]}
            with apply(sdxl, IPAdapter()):
                both = run(sdxl, prompts, noise=noise, num_images_per_prompt=each, **call)
    if kind == "own":
        references = tuple(Reference(embeds=embeds(i), prompts=(i,)) for i in (0, 1))
        with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=references)):
            both = run(sdxl, prompts, noise=noise, num_images_per_prompt=each)
    assert distance(both, torch.cat(expected)) <= 1e-5


def test_embeddings_that_fit_no_prompts_are_refused(sdxl, run):
    call = {"ip_adapter_image_embeds": [torch.zeros(6, 1, images.WIDTH)]}
    with (
        loaded(sdxl, [images.checkpoint(sdxl.unet)], 0.8),
        apply(sdxl, IPAdapter()),
        pytest.raises(ValueError, match="24 image embeddings of IP-Adapter 0 for 2 prompts"),
    ):
        run(sdxl, ["a", "b"], **call, num_images_per_prompt=2)


def test_weights_by_row(sdxl, run, distance):
    """One image, another weight for each prompt, none for the last."""
    state = images.checkpoint(sdxl.unet)
    references = tuple(
        Reference(embeds=embeds(0), prompts=i, weight=w) for i, w in enumerate((0.3, 0.9))
    )
    noise = run.noise(sdxl, 3)
    with apply(sdxl, IPAdapter(1.0, own(sdxl, state), references=references)):
        ours = run(sdxl, ["a", "b", "c"], noise=noise)
    for i, w in enumerate((0.3, 0.9, 0.0)):
        with written(sdxl.unet, [Shown(state, seen([[embeds(0)]]), w)]):
            expected = run(sdxl, ["abc"[i]], noise=noise[i : i + 1])
        assert distance(ours[i : i + 1], expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:The aspect ratio")
@pytest.mark.parametrize("size", [32, (48, 32)], ids=["square", "other aspect"])
def test_masks(sdxl, run, distance, size):
    """Resized as diffusers resizes them; each image its own softmax."""
    state = images.checkpoint(sdxl.unet)
    masks = (
        halves()
        if size == 32
        else tuple(
            torch.rand(size, generator=torch.Generator().manual_seed(s)).round() for s in (0, 1)
        )
    )
    references = [Reference(embeds=embeds(i), mask=m) for i, m in enumerate(masks)]
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=references)):
        ours = run(sdxl, PROMPTS)
    call = {"ip_adapter_image_embeds": given([embeds(0), embeds(1)])}
    call["cross_attention_kwargs"] = {"ip_adapter_masks": [torch.stack(masks)[None]]}
    with loaded(sdxl, [state], 0.8):
        assert distance(ours, run(sdxl, PROMPTS, **call)) <= 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_steps_and_curves(sdxl, run, distance, guidance_scale):
    """An image for the first half, another with a curve, against scales set after every step."""
    state = images.checkpoint(sdxl.unet)
    curve = (1.0, 0.5, 0.0, 0.25)
    references = (
        Reference(embeds=embeds(0), steps=(0.0, 0.5)),
        Reference(embeds=embeds(1), steps=curve),
    )
    scales = [[1.0, 1.0], [1.0, 0.5], [0.0, 0.0], [0.0, 0.25]]

    def advance(pipe, step, t, kwargs):
        pipe.set_ip_adapter_scale([0.8 * s for s in scales[min(step + 1, 3)]])
        return kwargs

    extra = {"steps": 4, "guidance_scale": guidance_scale}
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=references)):
        ours = run(sdxl, PROMPTS, **extra)
    extra["ip_adapter_image_embeds"] = given([embeds(0)], [embeds(1)], guided=guidance_scale > 1)
    with loaded(sdxl, [state, state], [0.8, 0.8]):
        theirs = run(sdxl, PROMPTS, callback_on_step_end=advance, **extra)
    assert distance(ours, theirs) <= 1e-5


def test_an_image_as_negative(sdxl, run, distance):
    """What unconditional rows see in place of no image."""
    state = images.checkpoint(sdxl.unet)
    reference = Reference(embeds=embeds(0), negative=embeds(1))
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=reference)):
        ours = run(sdxl, PROMPTS)
    call = {"ip_adapter_image_embeds": [torch.stack([embeds(1), embeds(0)])[:, None]]}
    with loaded(sdxl, [state], 0.8):
        assert distance(ours, run(sdxl, PROMPTS, **call)) <= 1e-5


def test_layers_where_the_image_is_the_negative(sdxl3, run, distance):
    """Style transfer, precise: in the layout's layers the unconditional rows see the image, and no
    others."""
    state = images.checkpoint(sdxl3.unet)
    method = IPAdapter(
        0.8,
        own(sdxl3, state),
        layers="style transfer precise",
        negative_layers="composition",
        references=Reference(embeds=embeds(0)),
    )
    with apply(sdxl3, method):
        ours = run(sdxl3, PROMPTS)
    e, layout = embeds(0), "down_blocks.2.attentions.1"
    shown = [
        Shown(state, [[torch.zeros_like(e)], [e]], 0.8, layers={STYLE: 1.0}),
        Shown(state, [[e], []], 0.8, layers={layout: 1.0}),
    ]
    with written(sdxl3.unet, shown):
        assert distance(ours, run(sdxl3, PROMPTS)) <= 1e-5


def test_with_style_aligned(sdxl, run, distance):
    """Self-attention and cross-attention do not meet; the reference row sees the image unless told
    otherwise."""
    import official_style_aligned as official

    state, prompts = images.checkpoint(sdxl.unet), ["a toy train", "a cat"]
    with apply(
        sdxl,
        StyleAligned(),
        IPAdapter(0.8, own(sdxl, state), references=Reference(embeds=embeds(0), prompts=(1,))),
    ):
        ours = run(sdxl, prompts)
    rows = [[], [torch.zeros_like(embeds(0))], [], [embeds(0)]]
    with official.styled(sdxl.unet, official.Args()), written(sdxl.unet, [Shown(state, rows, 0.8)]):
        assert distance(ours, run(sdxl, prompts)) <= 1e-5


def test_an_image_that_no_prompt_sees(sdxl, run):
    """Prompts are counted from 0, however many images each has."""
    state, mine = images.checkpoint(sdxl.unet), Reference(embeds=embeds(0), prompts=(2, 3))
    said = r"references\[0\] of ip_adapter is for prompts \(2, 3\), .* and the call has 2"
    with apply(sdxl, IPAdapter(0.8, own(sdxl, state), references=mine)), pytest.warns(match=said):
        run(sdxl, ["a", "b"], steps=1, num_images_per_prompt=2)


@pytest.mark.parametrize("kind", ["own", "loaded"])
def test_rows_of_a_bank_see_no_image(sdxl, run, distance, kind):
    """The bank's reference runs as it was made; the images have their own, prompts counted without
    it."""
    from styleattn.processors.bank import build_bank

    state, style = images.checkpoint(sdxl.unet), StyleAligned()
    bank = build_bank(sdxl, Reference(prompt="a toy train"), style, num_inference_steps=2)
    noise = run.noise(sdxl, 2)
    with contextlib.ExitStack() as stack:
        extra = {}
        method = IPAdapter(0.8, own(sdxl, state), references=Reference(embeds=embeds(0)))
        if kind == "loaded":
            stack.enter_context(loaded(sdxl, [state], 0.8))
            method, extra = IPAdapter(), {"ip_adapter_image_embeds": given([embeds(0)])}
        with apply(sdxl, style, method, bank=bank):
            ours = run(sdxl, ["a cat", "a ship"], noise=noise, **extra)
    nothing = torch.zeros_like(embeds(0))
    rows = [[], [nothing], [nothing], [], [embeds(0)], [embeds(0)]]
    with apply(sdxl, style, bank=bank), written(sdxl.unet, [Shown(state, rows, 0.8)]):
        assert distance(ours, run(sdxl, ["a cat", "a ship"], noise=noise)) <= 1e-5
