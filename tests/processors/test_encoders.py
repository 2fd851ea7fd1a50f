"""Encoder methods on whole tiny UNets over all steps, against the written-out processors."""

from __future__ import annotations

import encoder_oracles as papers
import pytest
import random_pipelines as tiny
import torch

from styleattn.methods import (
    CSGO,
    DEADiff,
    PuLIDSDXL,
    RBModulation,
    StyleShot,
    StyleStudio,
    StyleStudioTeacher,
)
from styleattn.processors import apply, explain, paused, remove
from styleattn.references import Reference

REFERENCE = Reference(embeds=papers.embedding(0))
CONTENT = Reference(embeds=papers.embedding(1))
V1 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def sd15():
    """Four levels: the sixteen cross-attention layers of Stable Diffusion 1.5."""
    return tiny.sd(**V1)


@pytest.fixture(scope="module")
def exact():
    """SDXL in fp64: AdaIN divides by the text's deviation, and a rounding of 1e-7 in fp32 grows
    beyond 1e-5 in either implementation (the oracle's own error against fp64 is 2e-5)."""
    pipe = tiny.sdxl()
    pipe.unet.to(torch.float64)
    pipe.text_encoder.to(torch.float64)
    pipe.text_encoder_2.to(torch.float64)
    return pipe


@pytest.fixture(scope="module")
def controlled():
    return tiny.sdxl_controlnet()


@pytest.fixture(autouse=True)
def nothing_left(request):
    yield
    for name in ("sd15", "exact", "controlled"):
        if name in request.fixturenames:
            remove(request.getfixturevalue(name))


def unconditional(batch, guided):
    return [guided and row < batch // 2 for row in range(batch)]


def shows(adapter, reference, layer, query, guided):
    """Keys and values of an image for every row of a call."""
    told = unconditional(query.shape[0], guided)
    tokens = adapter.seen(reference.embeds.to(query.dtype), told)
    return papers.pair(adapter, layer, tokens, query.shape[1])


def case(name, unet, guided):
    """(the method, the rule of a layer)."""
    style, content = papers.Adapter(unet, 6, 1), papers.Adapter(unet, 4, 2)
    roles = papers.Roles(style=style, content=content)

    def s(layer, query):
        return shows(style, REFERENCE, layer, query, guided)

    def c(layer, query):
        return shows(content, CONTENT, layer, query, guided)

    one = {"adapter": style, "references": REFERENCE}
    two = {"adapter": roles, "references": (CONTENT, REFERENCE)}
    return {
        "style_shot": (
            StyleShot(scale=0.7, **one),
            lambda x, q, t: papers.decoupled(q, t, (*s(x, q), 0.7)),
        ),
        "style_studio": (
            StyleStudio(**one),
            lambda x, q, t: papers.cross_modal_adain(q, t, s(x, q)),
        ),
        "pulid": (PuLIDSDXL(**one), lambda x, q, t: papers.pulid(q, t, s(x, q), 8, "v2", 0.8)),
        "pulid-style": (
            PuLIDSDXL(num_zero=16, ortho="v1", **one),
            lambda x, q, t: papers.pulid(q, t, s(x, q), 16, "v1", 0.8),
        ),
        "rb_modulation": (
            RBModulation(**one | {"adapter": roles}),
            lambda x, q, t: papers.aggregated(q, t, s(x, q)),
        ),
        "rb_modulation-content": (
            RBModulation(**two),
            lambda x, q, t: papers.aggregated(q, t, s(x, q), c(x, q)),
        ),
        "csgo": (
            CSGO(content_scale=0.5, style_scale=1.2, **two),
            lambda x, q, t: papers.decoupled(q, t, (*c(x, q), 0.5), (*s(x, q), 1.2)),
        ),
    }[name]


CASES = (
    "style_shot",
    "style_studio",
    "pulid",
    "pulid-style",
    "rb_modulation",
    "rb_modulation-content",
    "csgo",
)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", CASES)
def test_whole_unet(sdxl, exact, run, distance, name, guidance):
    sdxl = exact if name == "style_studio" else sdxl
    method, rule = case(name, sdxl.unet, guidance > 1)
    options = {"guidance_scale": guidance, "negative_prompt": ["blur"] * 2}
    plain = run(sdxl, ["a cat", "a dog"], **options)
    with papers.written_out(sdxl.unet, rule):
        expected = run(sdxl, ["a cat", "a dog"], **options)
    with apply(sdxl, method):
        got = run(sdxl, ["a cat", "a dog"], **options)
    assert distance(got, expected) <= 1e-5
    assert distance(got, plain) > 1e-3  # the image is visible
    assert torch.equal(run(sdxl, ["a cat", "a dog"], **options), plain)


@pytest.mark.parametrize("name", ["style_studio", "pulid", "pulid-style"])
def test_text_of_zeros_has_no_statistics_and_no_direction(sdxl, run, name):
    """Without a negative prompt SDXL's unconditional text is zeros; the formulas divide by it."""
    method, rule = case(name, sdxl.unet, True)
    with papers.written_out(sdxl.unet, rule):
        assert run(sdxl, ["a cat"], steps=1, guidance_scale=5.0).isnan().all()
    with apply(sdxl, method):
        assert run(sdxl, ["a cat"], steps=1, guidance_scale=5.0).isfinite().all()


@pytest.mark.parametrize("subject", [("style",), ("content",), ("style", "content")])
def test_deadiff(sd15, run, distance, subject):
    """Each layer sees its own subject, or sixteen zero tokens; unconditional rows only those."""
    every = {"style": papers.Adapter(sd15.unet, 16, 1), "content": papers.Adapter(sd15.unet, 16, 2)}
    references = {"style": REFERENCE, "content": CONTENT}
    at = ("down_blocks.2", "mid_block", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")

    def rule(layer, query, text):
        mine = "content" if layer.startswith(at) else "style"
        image = shows(every[mine], references[mine], layer, query, True)
        seen = torch.tensor([not u for u in unconditional(query.shape[0], True)])
        on = (seen & (mine in subject))[:, None, None, None]
        return papers.deadiff(query, text, tuple(x * on for x in image), 0.8)

    plain = run(sd15, ["a cat"], guidance_scale=5.0)
    with papers.written_out(sd15.unet, rule):
        expected = run(sd15, ["a cat"], guidance_scale=5.0)
    adapter = papers.Roles(**{name: every[name] for name in subject})
    chosen = tuple(references[name] for name in subject)
    method = DEADiff(img_weight=0.8, subject=subject, adapter=adapter, references=chosen)
    with apply(sd15, method):
        assert str(explain(sd15)).count("  deadiff  ") == 16
        got = run(sd15, ["a cat"], guidance_scale=5.0)
    assert distance(got, expected) <= 1e-5
    assert distance(got, plain) > 1e-3
    assert torch.equal(run(sd15, ["a cat"], guidance_scale=5.0), plain)


def test_deadiff_at_weight_zero_is_the_diluted_model_and_outside_its_steps_the_plain_one(
    sd15, run, distance
):
    adapter = papers.Roles(style=papers.Adapter(sd15.unet, 16, 1))
    plain = run(sd15, ["a cat"], guidance_scale=5.0)
    with apply(sd15, DEADiff(img_weight=0.0, adapter=adapter, references=REFERENCE)):
        zero = run(sd15, ["a cat"], guidance_scale=5.0)
    absent = Reference(embeds=papers.embedding(0), weight=0.0)
    with apply(sd15, DEADiff(adapter=adapter, references=absent)):
        assert distance(run(sd15, ["a cat"], guidance_scale=5.0), zero) <= 1e-5
    assert distance(zero, plain) > 1e-3
    with apply(sd15, DEADiff(steps=(1.0, 1.0), adapter=adapter, references=REFERENCE)):
        assert torch.equal(run(sd15, ["a cat"], guidance_scale=5.0), plain)


ZERO = {
    "style_shot": {"scale": 0.0},
    "style_studio": {"scale": 0.0},
    "pulid": {"id_scale": 0.0},
    "rb_modulation": {"scale": 0.0},
    "csgo": {"content_scale": 0.0, "style_scale": 0.0},
}


@pytest.mark.parametrize("name", ZERO)
def test_zero_is_the_plain_model(sdxl, run, distance, name):
    method, _ = case(name, sdxl.unet, True)
    settings = {**method.__dict__, **ZERO[name]}
    plain = run(sdxl, ["a cat"], guidance_scale=5.0)
    with apply(sdxl, type(method)(**settings)):
        assert distance(run(sdxl, ["a cat"], guidance_scale=5.0), plain) <= 1e-5
    with apply(sdxl, type(method)(**{**method.__dict__, "steps": (1.0, 1.0)})):
        assert torch.equal(run(sdxl, ["a cat"], guidance_scale=5.0), plain)


def test_numbers_change_without_a_new_plan(sdxl, run, distance):
    method, _ = case("pulid", sdxl.unet, True)
    settings = {**method.__dict__, "id_scale": 0.3}
    with apply(sdxl, PuLIDSDXL(**settings)):
        expected = run(sdxl, ["a cat"])
    with apply(sdxl, method) as handle:
        handle.update(PuLIDSDXL(**settings))
        assert torch.equal(run(sdxl, ["a cat"]), expected)


def test_methods_add_up_on_a_layer(exact, run, distance):
    """AdaIN and the ID act on the text's output; what others add is added to it as it is."""
    shot, _ = case("style_shot", exact.unet, True)
    studio, _ = case("style_studio", exact.unet, True)
    style = shot.adapter

    def rule(layer, query, text):
        image = shows(style, REFERENCE, layer, query, True)
        mixed = papers.cross_modal_adain(query, text, image)
        return mixed + 0.7 * papers.softmax_attention(query, *image)

    options = {"guidance_scale": 5.0, "negative_prompt": "blur"}
    with papers.written_out(exact.unet, rule):
        expected = run(exact, ["a cat"], **options)
    for methods in ((shot, studio), (studio, shot)):
        with apply(exact, *methods):
            assert distance(run(exact, ["a cat"], **options), expected) <= 1e-5


def test_teacher_gives_queries_and_keys_and_has_no_style(exact, run, distance):
    """Two rows of the same text and noise: the first is the teacher, for 2 of 4 steps."""
    studio, _ = case("style_studio", exact.unet, True)
    mine = Reference(embeds=papers.embedding(0), prompts=(1,))
    student = StyleStudio(adapter=studio.adapter, references=mine)
    noise = run.noise(exact, 1).expand(2, -1, -1, -1)
    calls = {"count": 0}

    def cross(layer, query, text):
        image = shows(studio.adapter, REFERENCE, layer, query, True)
        styled = papers.cross_modal_adain(query, text, image)
        styled[[0, 2]] = papers.softmax_attention(query, *text)[[0, 2]]
        return styled

    def alone(layer, query, pair):
        key, value = pair
        step = calls["count"] // len(own)
        calls["count"] += 1
        if step < 2:
            query, key = (x[[0, 0, 2, 2]] for x in (query, key))
        return papers.softmax_attention(query, key, value)

    own = [name for name in exact.unet.attn_processors if ".attn1." in name]
    options = {"steps": 4, "noise": noise, "guidance_scale": 5.0, "negative_prompt": ["x", "x"]}
    plain = run(exact, ["a cat", "a cat"], **options)
    written = papers.written_out(exact.unet, alone, ".attn1.")
    with papers.written_out(exact.unet, cross), written:
        expected = run(exact, ["a cat", "a cat"], **options)
    with apply(exact, student, StyleStudioTeacher(steps=(0.0, 0.5))):
        got = run(exact, ["a cat", "a cat"], **options)
    assert distance(got, expected) <= 1e-5
    assert distance(got[:1], plain[:1]) <= 1e-5
    assert distance(got[1:], plain[1:]) > 1e-3
    with apply(exact, student):
        assert distance(got, run(exact, ["a cat", "a cat"], **options)) > 1e-3


def picture(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((1, 3, 32, 32), generator=generator)


def roles_with_control(pipe):
    """Style at the decoder, content at the encoder, and the style at the ControlNet's encoder."""
    return papers.Roles(
        style=papers.Adapter(pipe.unet, 6, 1, ["up_blocks"]),
        content=papers.Adapter(pipe.unet, 4, 2, ["down_blocks"]),
        control=papers.Adapter(pipe.controlnet, 6, 1, ["down_blocks"]),
    )


def csgo_rule(adapters, guided, scales=(1.0, 1.0)):
    def rule(layer, query, text):
        images = []
        if "content" in adapters and layer in adapters["content"].names:
            images.append((*shows(adapters["content"], CONTENT, layer, query, guided), scales[0]))
        if layer in adapters["style"].names:
            images.append((*shows(adapters["style"], REFERENCE, layer, query, guided), scales[1]))
        return papers.decoupled(query, text, *images)

    return rule


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}], ids=str)
@pytest.mark.parametrize("compat", ["", "released"])
def test_csgo_acts_in_the_controlnet(controlled, run, distance, compat, options):
    """In guess mode the ControlNet has no unconditional rows."""
    roles = roles_with_control(controlled)
    options = {"guidance_scale": 5.0, "image": picture(), **options}
    guided = options["guidance_scale"] > 1
    unet = {"style": roles.style} | ({"content": roles.content} if not compat else {})
    inside = csgo_rule({"style": roles.control}, guided and "guess_mode" not in options)
    plain = run(controlled, ["a cat"], **options)
    with papers.written_out(controlled.unet, csgo_rule(unet, guided)):
        without = run(controlled, ["a cat"], **options)
        with papers.written_out(controlled.controlnet, inside):
            expected = run(controlled, ["a cat"], **options)
    method = CSGO(adapter=roles, references=(CONTENT, REFERENCE), compat=compat)
    with apply(controlled, method) as handle:
        got = run(controlled, ["a cat"], **options)
        assert "controlnet.down_blocks.1.attentions.0" in str(handle.explain())
        with handle.paused():
            assert torch.equal(run(controlled, ["a cat"], **options), plain)
    assert distance(got, expected) <= 1e-5
    assert distance(got, without) > 1e-3  # the ControlNet's adapters matter
    assert torch.equal(run(controlled, ["a cat"], **options), plain)


def test_csgo_content_scale_has_no_effect_as_released(controlled, run):
    roles = roles_with_control(controlled)
    images = {"adapter": roles, "references": (CONTENT, REFERENCE)}
    for compat, same in (("released", True), ("", False)):
        outs = []
        for scale in (0.0, 2.0):
            with apply(controlled, CSGO(content_scale=scale, compat=compat, **images)):
                outs.append(run(controlled, ["a cat"], image=picture(), steps=1))
        assert torch.equal(*outs) is same


def test_both_components_or_none(controlled, run):
    """A ControlNet that is taken: nothing is changed anywhere."""
    roles = roles_with_control(controlled)
    method = CSGO(adapter=roles, references=(CONTENT, REFERENCE))
    unet, control = controlled.unet, controlled.controlnet
    before = dict(unet.attn_processors), dict(control.attn_processors)
    other = tiny.sdxl_controlnet()
    other.controlnet = control
    theirs = CSGO(adapter=roles_with_control(other), references=(CONTENT, REFERENCE))
    with apply(controlled, method):
        during = dict(control.attn_processors)
        with pytest.raises(ValueError, match="styled through another UNet"):
            apply(other, theirs)
        assert not hasattr(other.unet, "_styleattn_controller")
        assert dict(control.attn_processors) == during != before[1]
    after = dict(unet.attn_processors), dict(control.attn_processors)
    assert all(a[k] is v for a, b in zip(after, before, strict=True) for k, v in b.items())
    assert not control._forward_hooks and not control._forward_pre_hooks
    with apply(other, theirs):  # free again
        assert dict(control.attn_processors) != before[1]
    with apply(controlled, method), paused(controlled):
        pass


def test_numbers_reach_the_controlnet(controlled, run, distance):
    roles = roles_with_control(controlled)
    images = {"adapter": roles, "references": (CONTENT, REFERENCE)}
    weak = CSGO(style_scale=0.2, **images)
    with apply(controlled, weak):
        expected = run(controlled, ["a cat"], image=picture())
    with apply(controlled, CSGO(**images)) as handle:
        handle.update(weak)
        assert torch.equal(run(controlled, ["a cat"], image=picture()), expected)


REFUSED = {
    "needs an adapter, and references": lambda unet: StyleShot(references=REFERENCE),
    "needs an adapter, and references to show it": lambda unet: StyleShot(
        adapter=papers.Adapter(unet)
    ),
    "lacks one for reference 0": lambda unet: CSGO(
        adapter=papers.Roles(style=papers.Adapter(unet)), references=(CONTENT, REFERENCE)
    ),
    "none of the chosen layers": lambda unet: StyleShot(
        adapter=papers.Adapter(unet, only=["up_blocks"]),
        references=REFERENCE,
        layers="down_blocks.*",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_images_that_could_not_act_are_refused(sdxl, message):
    before = dict(sdxl.unet.attn_processors)
    with pytest.raises(ValueError, match=message):
        apply(sdxl, REFUSED[message](sdxl.unet))
    assert all(sdxl.unet.attn_processors[k] is v for k, v in before.items())


class Counted(papers.Adapter):
    """Counts its projections."""

    calls = 0

    def key_value(self, layer, tokens):
        self.calls += 1
        return super().key_value(layer, tokens)


@pytest.mark.parametrize(
    ("kind", "each"),
    [(CSGO, 1), (RBModulation, 1), (StyleShot, 1), (StyleStudio, 2), (PuLIDSDXL, 3)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_calls_of_the_operation_and_projections_over_the_steps(sdxl, run, monkeypatch, kind, each):
    """One call a layer for the text and all images; further ones only for outputs apart. Keys and
    values of images are made once."""
    from styleattn.processors import _cross

    found = []
    inner = _cross.attention

    def counted(*args, **kwargs):
        found.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(_cross, "attention", counted)
    adapters = Counted(sdxl.unet, 6, 1), Counted(sdxl.unet, 6, 2)
    roles = papers.Roles(content=adapters[0], style=adapters[1])
    two = kind in (CSGO, RBModulation)
    adapter, references = (roles, (CONTENT, REFERENCE)) if two else (adapters[1], REFERENCE)
    with apply(sdxl, kind(adapter=adapter, references=references)):
        run(sdxl, ["a cat"], steps=3)
    layers = len(adapters[1].names)
    assert len(found) == 3 * layers * each
    assert [a.calls for a in adapters] == [layers if two else 0, layers]


def test_images_of_single_prompts_and_steps(sdxl, run, distance):
    """Each image of a batch is what it is alone; a schedule is one of the run."""
    adapter = papers.Adapter(sdxl.unet, 6, 1)
    mine = [Reference(embeds=papers.embedding(i), prompts=(i,)) for i in (0, 1)]
    noise = run.noise(sdxl, 3)
    options = {"guidance_scale": 5.0, "negative_prompt": ["blur"] * 3, "steps": 4}
    method = PuLIDSDXL(adapter=adapter, references=mine, steps=(0.0, 0.5))
    with apply(sdxl, method):
        got = run(sdxl, ["a cat"] * 3, noise=noise, **options)
    plain = run(sdxl, ["a cat"] * 3, noise=noise, **options)
    assert distance(got[2], plain[2]) <= 1e-5
    for i in (0, 1):
        alone = Reference(embeds=papers.embedding(i))
        method = PuLIDSDXL(adapter=adapter, references=alone, steps=(1.0, 0.0, 1.0, 1.0))
        with apply(sdxl, method):
            other = run(
                sdxl, ["a cat"], noise=noise[i : i + 1], **{**options, "negative_prompt": "blur"}
            )
        assert distance(other[0], got[i]) > 1e-3
        with apply(sdxl, PuLIDSDXL(adapter=adapter, references=alone, steps=(0.0, 0.5))):
            same = run(
                sdxl, ["a cat"], noise=noise[i : i + 1], **{**options, "negative_prompt": "blur"}
            )
        assert distance(same[0], got[i]) <= 1e-5


def test_steps_hold_in_the_controlnet_too(controlled, run, distance):
    roles = roles_with_control(controlled)
    images = {"adapter": roles, "references": (CONTENT, REFERENCE)}
    options = {"image": picture(), "steps": 3}
    plain = run(controlled, ["a cat"], **options)
    with apply(controlled, CSGO(steps=(1.0, 1.0), **images)):
        assert torch.equal(run(controlled, ["a cat"], **options), plain)
    with apply(controlled, CSGO(steps=(0.0, 0.3), **images)):
        half = run(controlled, ["a cat"], **options)
    with apply(controlled, CSGO(**images)):
        assert distance(run(controlled, ["a cat"], **options), half) > 1e-3
    assert distance(half, plain) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pulid", "style_studio", "rb_modulation-content", "csgo"])
def test_compiles_in_one_graph(sdxl, run, distance, name):
    method, _ = case(name, sdxl.unet, True)
    options = {"guidance_scale": 5.0, "negative_prompt": "blur"}
    torch._dynamo.reset()
    with apply(sdxl, method):
        expected = run(sdxl, ["a cat"], **options)
        sdxl.unet.compile(fullgraph=True, backend="aot_eager")
        try:
            got = run(sdxl, ["a cat"], **options)
        finally:
            sdxl.unet._compiled_call_impl = None
            torch._dynamo.reset()
    assert distance(got, expected) <= 1e-5
