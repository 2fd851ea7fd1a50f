"""Styles on FLUX transformers: on and off without a trace, every way to call, every pipeline."""

from __future__ import annotations

import copy

import pytest
import random_flux
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
)
from PIL import Image
from random_flux import PICTURE, PROMPTS, TOKENS, processors, relative, run

from styleattn.methods import Redux, StyleAligned, ZStar
from styleattn.processors import apply, explain, remove
from styleattn.processors._flux_attention import FluxStyleIPAdapterProcessor, FluxStyleProcessor
from styleattn.references import Reference

torch.set_num_threads(1)
STYLE = StyleAligned(shared_score_shift=0.3)
REDUX = Redux(references=(Reference(embeds=TOKENS, weight=0.6),))


@pytest.fixture(scope="module")
def shared():
    return random_flux.flux()


@pytest.fixture
def pipe():
    return random_flux.flux()


# Coming and going


@pytest.mark.parametrize("method", [STYLE, REDUX], ids=lambda m: m.name)
def test_nothing_remains(pipe, method):
    """The very processors, no hooks, no attributes, the same bits."""
    before, names = processors(pipe), set(vars(pipe.transformer))
    plain, attn = run(pipe), pipe.transformer.transformer_blocks[0].attn
    attributes = set(vars(attn))
    handle = apply(pipe, method)
    styled = run(pipe)
    assert handle.active and relative(styled[1:], plain[1:]) > 1e-3
    with handle.paused():
        assert torch.equal(run(pipe), plain)
    apply(pipe, method)
    assert not handle.active
    assert torch.equal(run(pipe), styled)  # a second apply replaces, it does not add
    remove(pipe)
    after = processors(pipe)
    assert all(after[n] is p for n, p in before.items())
    assert set(vars(pipe.transformer)) - names <= {"_diffusers_hook"}  # the pipeline's own
    assert set(vars(attn)) == attributes
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    assert torch.equal(run(pipe), plain)


def test_weights_and_files_know_nothing_of_the_style(pipe, tmp_path):
    keys = list(pipe.transformer.state_dict())
    with apply(pipe, STYLE):
        assert list(pipe.transformer.state_dict()) == keys
        pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path)
    assert {type(p) for p in again.attn_processors.values()} == {FluxAttnProcessor}


def test_explain(pipe):
    assert "joint attention" in str(explain(pipe))
    with apply(pipe, StyleAligned(layers="transformer_blocks.1"), REDUX) as handle:
        rows = {r.layer: r for r in handle.explain().rows}
    assert rows["transformer_blocks.1.attn"].method == "style_aligned + redux"
    assert rows["transformer_blocks.0.attn"].method == "redux"
    assert rows["transformer_blocks.1.attn"].backend in ("cpu", "torch")


def test_what_does_not_fit_is_refused_whole(pipe):
    before = processors(pipe)
    refused = [
        (TypeError, "z_star does not work on a FluxTransformer2DModel", ZStar(), None),
        (ValueError, "matches no attention layer", StyleAligned(layers="up_blocks"), None),
        (ValueError, "no preset has been measured", StyleAligned(layers="style"), None),
        (ValueError, "needs a bank", StyleAligned(references=(Reference(image="a.png"),)), None),
    ]
    for error, words, method, bank in refused:
        with pytest.raises(error, match=words):
            apply(pipe, method, bank=bank)
    pipe.transformer.transformer_blocks[1].attn.processor = Foreign()
    with pytest.raises(TypeError, match="computes something of its own"):
        apply(pipe, STYLE)
    pipe.transformer.transformer_blocks[1].attn.processor = before[
        "transformer_blocks.1.attn.processor"
    ]
    assert processors(pipe) == before


class Foreign:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *rest):
        return hidden_states, encoder_hidden_states


def test_a_foreign_processor_set_later_is_left_alone(pipe):
    with apply(pipe, STYLE) as handle:
        attn = pipe.transformer.transformer_blocks[1].attn
        attn.set_processor(Foreign())
        with pytest.warns(UserWarning, match="got a Foreign"):
            run(pipe)
        assert [r.method for r in handle.explain().rows].count("") == 1
    assert type(attn.processor) is Foreign


def test_processors_that_are_copied_and_put_back(pipe):
    with apply(pipe, STYLE):
        styled = run(pipe)
        kept = copy.deepcopy(pipe.transformer.attn_processors)
        pipe.transformer.set_attn_processor(FluxAttnProcessor())
        pipe.transformer.set_attn_processor(kept)
        assert torch.equal(run(pipe), styled)


def test_one_row_and_weight_zero_are_the_very_model(shared):
    expected = run(shared, PROMPTS[:1])
    with apply(shared, StyleAligned()):
        assert torch.equal(run(shared, PROMPTS[:1]), expected)


# Calls and pipelines


def test_images_per_prompt(shared):
    """Row 0 is the reference; the other images of its prompt are ordinary rows."""
    with apply(shared, STYLE):
        twice = run(shared, PROMPTS[:2], num_images_per_prompt=2)
        flat = run(shared, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]])
    assert relative(twice, flat) <= 1e-5


def test_references_of_several_prompts_with_several_images(shared):
    two = StyleAligned(references=(Reference(weight=0.5), Reference(weight=0.5)))
    with apply(shared, two) as handle:
        got = run(shared, num_images_per_prompt=2)
        with handle.layout(1, references=(0, 2)):
            named = run(shared, [p for p in PROMPTS for _ in (0, 1)])
    assert relative(got, named) <= 1e-5
    with apply(shared, two), pytest.raises(ValueError, match="2 references"):
        run(shared, PROMPTS[:1])


def test_calls_outside_a_pipeline(shared):
    x = random_flux.inputs(batch=3)
    curve = StyleAligned(steps=(0.0, 0.5))

    def call():
        with torch.no_grad():
            return shared.transformer(**x, return_dict=False)[0]

    plain = call()
    with apply(shared.transformer, STYLE):
        assert relative(call()[1:], plain[1:]) > 1e-3  # no guidance layout to know on FLUX
    with apply(shared.transformer, curve) as handle:
        with pytest.raises(RuntimeError, match="timesteps"):
            call()
        for levels, styled in (([1000.0, 700.0, 300.0, 100.0], True), ([1000.0, 700.0], False)):
            with handle.layout(1, timesteps=torch.tensor(levels)):
                assert (relative(call()[1:], plain[1:]) > 1e-3) is styled


def test_noise_levels_in_half_precision_find_their_step(shared):
    """bfloat16 rounds 995 / 1000; the step is the nearest of the scheduler's."""
    levels = torch.tensor([1000.0, 996.1, 991.9, 987.4, 500.0])
    x = random_flux.inputs(batch=2)
    steps = []
    with apply(shared.transformer, StyleAligned(steps=(0.0, 0.6))) as handle:
        controller = handle._controller
        original = controller._schedule
        controller._schedule = lambda level, caller: (
            steps.append(float(level)) or original(level, caller)
        )
        with handle.layout(1, timesteps=levels), torch.no_grad():
            for level in levels:
                x["timestep"] = (level.expand(2).to(torch.bfloat16) / 1000).float()
                shared.transformer(**x)
    assert steps == levels.tolist()


def test_models_without_guidance_embedding():
    pipe = random_flux.flux(guidance_embeds=False)
    plain = run(pipe)
    with apply(pipe, STYLE):
        assert relative(run(pipe)[1:], plain[1:]) > 1e-3


def test_attention_masks(shared):
    """A mask per key hides text tokens from styled layers too; one per query is refused."""
    x = random_flux.inputs(batch=2)
    short = {
        **x,
        "encoder_hidden_states": x["encoder_hidden_states"][:, :4],
        "txt_ids": x["txt_ids"][:4],
    }
    seen = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    seen[..., 4:7] = False

    def call(inputs, mask=None):
        kwargs = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask}}
        with torch.no_grad():
            return shared.transformer(**inputs, **kwargs, return_dict=False)[0]

    with apply(shared.transformer, STYLE):
        assert relative(call(x, seen), call(short)) <= 1e-5
        with pytest.raises(ValueError, match="per query"):
            call(x, torch.zeros(19, 19))


@pytest.mark.parametrize("control_reference", [False, True])
def test_controlnet_residuals(shared, control_reference):
    """They are taken off the reference row, unless it is wished."""
    x = random_flux.inputs(batch=3)
    residuals = {
        "controlnet_block_samples": [torch.randn(3, 12, 32) for _ in range(2)],
        "controlnet_single_block_samples": (torch.randn(3, 12, 32),),
    }
    without = {
        name: type(given)(torch.cat([torch.zeros_like(t[:1]), t[1:]]) for t in given)
        for name, given in residuals.items()
    }

    def call(more):
        with torch.no_grad():
            return shared.transformer(**x, **more, return_dict=False)[0]

    method = StyleAligned(control_reference=control_reference)
    with apply(shared.transformer, method):
        got = call(residuals)
        cleared = call(without)
    assert torch.equal(got, cleared) is not control_reference
    if not control_reference:
        assert relative(got[:1], call({})[:1]) <= 1e-5


def test_from_pipe_shares_the_style(pipe):
    from diffusers import FluxImg2ImgPipeline

    other = FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": list(PROMPTS),
        "image": [PICTURE.resize((16, 16))] * 3,
        "height": 16,
        "width": 16,
        "max_sequence_length": 16,
        "num_inference_steps": 3,
        "output_type": "latent",
    }

    def go():
        return other(**arguments, generator=torch.Generator().manual_seed(0)).images

    plain = go()
    with apply(pipe, STYLE):
        assert relative(go()[1:], plain[1:]) > 1e-3
    assert torch.equal(go(), plain)


def test_fill():
    """Fill has channels more and no adapter mixin; styles work on its attention all the same."""
    pipe = random_flux.fill()
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))

    def go():
        return pipe(
            list(PROMPTS),
            image=PICTURE,
            mask_image=mask,
            height=32,
            width=32,
            max_sequence_length=16,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    plain = go()
    for method in (STYLE, REDUX):
        with apply(pipe, method):
            assert relative(go()[1:], plain[1:]) > 1e-3
    assert torch.equal(go(), plain)


def test_kontext_and_control():
    """A picture in context, and one on the channels (depth, canny): the reference is as it was, the
    other rows are styled."""
    from diffusers import FluxControlPipeline, FluxKontextPipeline

    kontext = FluxKontextPipeline(**random_flux.parts())
    control = FluxControlPipeline(**random_flux.parts(in_channels=8, out_channels=4))
    given = {kontext: {"image": PICTURE.resize((16, 16)), "_auto_resize": False, "max_area": 256}}
    given[control] = {"control_image": PICTURE.resize((16, 16))}
    for pipe, picture in given.items():
        pipe.set_progress_bar_config(disable=True)

        def go(pipe=pipe, picture=picture):
            return pipe(
                prompt=list(PROMPTS),
                **picture,
                height=16,
                width=16,
                max_sequence_length=16,
                num_inference_steps=2,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images

        plain = go()
        with apply(pipe, STYLE):
            styled = go()
        assert relative(styled[0], plain[0]) <= 1e-5
        assert relative(styled[1:], plain[1:]) > 1e-3
        with apply(pipe, REDUX):
            assert relative(go(), plain) > 1e-3
        assert torch.equal(go(), plain)


def test_pictures_in_context_are_not_shared(shared):
    """Kontext puts a picture behind the image tokens: it is no style reference, and sees none of
    the rows' statistics."""
    x = random_flux.inputs(batch=2, grid=(3, 4))
    context = x["img_ids"].clone()
    context[:, 0] = 1
    x["img_ids"] = torch.cat([x["img_ids"], context])
    more = torch.randn(2, 12, 4)
    x["hidden_states"] = torch.cat([x["hidden_states"], more], 1)
    seen = []

    class Watching(StyleAligned):
        def joint_attention(self, call, parts):
            seen.append({n: t.query.shape[2] for n, t in call.tokens.items()})
            return super().joint_attention(call, parts)

    with apply(shared.transformer, Watching()), torch.no_grad():
        shared.transformer(**x)
    assert seen == [{"text": 7, "image": 12, "reference": 12}] * 4


def test_layer_skipping_knows_our_processors():
    from diffusers.hooks._helpers import AttentionProcessorRegistry as registry

    plain = registry.get(FluxAttnProcessor)
    for ours in (FluxStyleProcessor, FluxStyleIPAdapterProcessor):
        assert registry.get(ours).skip_processor_output_fn is plain.skip_processor_output_fn


def test_guiders_that_listen_for_attention_are_heard(shared):
    """Perturbed guidance intercepts F.scaled_dot_product_attention: the plain layer runs."""
    from torch.overrides import TorchFunctionMode

    class Listener(TorchFunctionMode):
        heard = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Listener.heard += function is torch.nn.functional.scaled_dot_product_attention
            return function(*args, **(kwargs or {}))

    x = random_flux.inputs(batch=2)
    with torch.no_grad():
        plain = shared.transformer(**x, return_dict=False)[0]
        with (
            apply(shared.transformer, STYLE),
            pytest.warns(UserWarning, match="Listener"),
            Listener(),
        ):
            assert torch.equal(shared.transformer(**x, return_dict=False)[0], plain)
    assert Listener.heard == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """No further from fp32 than twice what the plain model is."""
    model = random_flux.transformer()
    x = random_flux.inputs(batch=3)

    def call():
        kept = ("timestep", "guidance", "img_ids", "txt_ids")
        given = {n: t if n in kept else t.to(model.dtype) for n, t in x.items()}
        with torch.no_grad():
            return model(**given, return_dict=False)[0].float()

    with apply(model, STYLE):
        plain, styled = None, call()
    plain = call()
    model.to(dtype)
    limit = 2 * relative(call(), plain)
    with apply(model, STYLE):
        assert relative(call(), styled) <= limit
