"""What breaks attention processors in diffusers, one test each: adapters, slicing, fusing, LoRA,
offload, guiders, shared models."""

from __future__ import annotations

import copy
import warnings

import pytest
import random_pipelines as tiny
import torch
from diffusers import StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from styleattn.methods import StyleAligned
from styleattn.processors import apply, remove
from styleattn.processors._attention import StyleAttnProcessor
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

STYLE = StyleAligned(shared_score_shift=0.3)


@pytest.fixture
def pipe():
    return tiny.sdxl()


def selfs(pipe):
    return {n: p for n, p in pipe.unet.attn_processors.items() if n.endswith("attn1.processor")}


def ip_adapter(unet, width=64, tokens=4):
    g = torch.Generator().manual_seed(0)
    layers = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    adapter = {}
    for i, name in enumerate(layers):
        out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):
            adapter[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(out, 64, generator=g) / 8
    projection = {
        "proj.weight": torch.randn(tokens * 64, width, generator=g) / 8,
        "proj.bias": torch.zeros(tokens * 64),
        "norm.weight": torch.ones(64),
        "norm.bias": torch.zeros(64),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def load_ip_adapter(pipe):
    pipe.load_ip_adapter(
        ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None
    )


def image_embeds(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.zeros(1, 1, 64), torch.randn(1, 1, 64, generator=g)])]


def test_ip_adapter_before_or_after(pipe, run):
    """Both orders give the same pictures, both keep the adapter, and unloading it keeps the
    style."""
    expected = run(pipe)
    with apply(pipe, STYLE):
        styled = run(pipe)
    load_ip_adapter(pipe)
    adapter_only = run(pipe, ip_adapter_image_embeds=image_embeds())
    with apply(pipe, STYLE):
        before = run(pipe, ip_adapter_image_embeds=image_embeds())
        kinds = [type(p) for n, p in pipe.unet.attn_processors.items() if "attn2" in n]
        assert set(kinds) == {IPAdapterAttnProcessor2_0}
    pipe.unload_ip_adapter()
    apply(pipe, STYLE)
    load_ip_adapter(pipe)
    after = run(pipe, ip_adapter_image_embeds=image_embeds())
    assert torch.equal(before, after)
    assert not torch.equal(before, adapter_only)
    assert not torch.equal(before, styled)
    pipe.set_ip_adapter_scale({"up": {"block_0": [0.0, 1.0]}})
    assert not torch.equal(run(pipe, ip_adapter_image_embeds=image_embeds()), after)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe), styled)
    remove(pipe)
    assert torch.equal(run(pipe), expected)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_processors_that_are_copied_and_put_back(pipe, run):
    originals = selfs(pipe)
    with apply(pipe, STYLE):
        expected = run(pipe)
        copied = copy.deepcopy(pipe.unet.attn_processors)
        pipe.unet.set_attn_processor(copied)
        assert torch.equal(run(pipe), expected)
    assert all(selfs(pipe)[name] is processor for name, processor in originals.items())


def test_ip_adapter_with_a_bank(pipe, run, distance):
    """The reference has no image prompt; the images keep theirs."""
    bank = build_bank(pipe, Reference(prompt="a toy train"), STYLE, num_inference_steps=2)
    load_ip_adapter(pipe)
    with apply(pipe, STYLE, bank=bank):
        out = [
            run(pipe, ["a cat", "a ship"], ip_adapter_image_embeds=image_embeds(s)) for s in (0, 1)
        ]
        single = run(
            pipe,
            ["a ship"],
            noise=run.noise(pipe, 2)[1:],
            ip_adapter_image_embeds=image_embeds(1),
        )
    assert distance(out[0], out[1]) > 1e-3
    assert distance(single, out[1][1:]) <= 1e-5


def test_remove_gives_back_the_objects_an_adapter_made_anew(pipe):
    originals = selfs(pipe)
    apply(pipe, STYLE)
    load_ip_adapter(pipe)
    remove(pipe)
    assert all(selfs(pipe)[name] is processor for name, processor in originals.items())


def test_attention_slicing_keeps_the_style_and_warns_once(pipe, run, distance):
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.enable_attention_slicing(1)
        with pytest.warns(UserWarning, match="SlicedAttnProcessor") as caught:
            sliced = run(pipe)
        assert len([w for w in caught if "styleattn" in str(w.message)]) == 1
        assert distance(sliced, expected) <= 1e-5
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {SlicedAttnProcessor}
    with apply(pipe, STYLE):
        assert distance(run(pipe), expected) <= 1e-5
        pipe.disable_attention_slicing()
        with pytest.warns(UserWarning, match="AttnProcessor2_0"):
            assert distance(run(pipe), expected) <= 1e-5
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize("order", ["apply, fuse", "fuse, apply"])
def test_fused_projections(pipe, run, distance, order):
    originals = selfs(pipe)
    with apply(pipe, STYLE):
        expected = run(pipe)
    for step in order.split(", "):
        if step == "apply":
            handle = apply(pipe, STYLE)
        else:
            pipe.fuse_qkv_projections(vae=False)
    calls = []
    attn = pipe.unet.get_submodule(next(iter(originals)).removesuffix(".processor"))
    hook = attn.to_qkv.register_forward_hook(lambda *a: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert distance(run(pipe), expected) <= 1e-5
    hook.remove()
    assert calls
    assert isinstance(attn.processor.base, FusedAttnProcessor2_0)
    pipe.unfuse_qkv_projections(vae=False)
    handle_is_on = order.startswith("apply")
    if not handle_is_on:
        handle.remove()
        handle = apply(pipe, STYLE)
    assert distance(run(pipe), expected) <= 1e-5
    handle.remove()
    assert all(selfs(pipe)[name] is processor for name, processor in originals.items())


def test_fused_while_styled_unfused_after(pipe, run):
    expected = run(pipe)
    with apply(pipe, STYLE):
        pipe.fuse_qkv_projections(vae=False)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    pipe.unfuse_qkv_projections(vae=False)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(run(pipe), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_and_off_is_seen(pipe, run, distance, order):
    from peft import LoraConfig

    if order == "before":
        handle = apply(pipe, STYLE)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
    )
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    if order == "after":
        handle = apply(pipe, STYLE)
    on = run(pipe)
    pipe.unet.disable_adapters()
    off = run(pipe)
    assert distance(on, off) > 1e-3
    pipe.unet.enable_adapters()
    assert torch.equal(run(pipe), on)
    handle.remove()
    pipe.unet.disable_adapters()
    with apply(pipe, STYLE):
        assert torch.equal(run(pipe), off)


def test_layerwise_casting(pipe, run, distance):
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.unet.enable_layerwise_casting(
            storage_dtype=torch.bfloat16, compute_dtype=torch.float32
        )
        assert distance(run(pipe), expected) < 0.1


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offload(pipe, run, distance, order):
    from accelerate import cpu_offload

    with apply(pipe, STYLE):
        expected = run(pipe)
    if order == "before":
        handle = apply(pipe, STYLE)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"), offload_buffers=False)
    if order == "after":
        handle = apply(pipe, STYLE)
    norm = pipe.unet.conv_norm_out
    assert norm.weight.is_meta
    assert distance(run(pipe), expected) <= 1e-5
    assert "by device" in {r.backend for r in handle.explain().rows}
    handle.remove()


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offload(pipe, run, distance, level):
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.unet.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            **blocks,
        )
        assert distance(run(pipe), expected) <= 1e-5


def test_pipelines_from_pipe_share_the_style(pipe, run, distance):
    """Two pipelines, one UNet: the layout is that of the pipeline that is running."""
    other = StableDiffusionXLPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with apply(pipe, STYLE):
        guided, unguided = run(pipe), run(pipe, guidance_scale=1.0)
        assert torch.equal(run(other), guided)
        assert torch.equal(run(other, guidance_scale=1.0), unguided)
        assert torch.equal(run(pipe), guided)
    assert not torch.equal(run(other), guided)
    with apply(pipe.unet, STYLE):  # bound to the model: the pipeline need not be named
        assert torch.equal(run(other), guided)


def test_save_and_load(pipe, run, tmp_path):
    expected = run(pipe)
    with apply(pipe, STYLE):
        styled = run(pipe)
        pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), expected)
    with apply(loaded, STYLE):
        assert torch.equal(run(loaded), styled)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_odd_batches_and_images_per_prompt(pipe, run, distance, guidance_scale):
    """Each row depends on the reference and itself only: any batch gives what the pairs give."""
    prompts = ["a toy train", "a cat"]
    noise = run.noise(pipe, 6)
    with apply(pipe, STYLE):
        out = run(
            pipe, prompts, noise=noise, num_images_per_prompt=3, guidance_scale=guidance_scale
        )
        for row in (1, 2, 5):
            pair = run(
                pipe,
                [prompts[0], prompts[row // 3]],
                noise=noise[[0, row]],
                guidance_scale=guidance_scale,
            )
            assert distance(out[[0, row]], pair) <= 1e-5
        odd = run(
            pipe, [*prompts, prompts[1]], noise=noise[[0, 3, 5]], guidance_scale=guidance_scale
        )
        assert distance(odd, out[[0, 3, 5]]) <= 1e-5


def test_several_references_with_images_per_prompt(pipe, run, distance):
    """The first image of each of the first prompts is a reference."""
    two = StyleAligned(references=(Reference(weight=0.6), Reference(weight=0.4)))
    noise = run.noise(pipe, 6)
    with apply(pipe, two):
        out = run(pipe, ["a", "b", "c"], noise=noise, num_images_per_prompt=2)
        single = run(pipe, ["a", "b", "c"], noise=noise[[0, 2, 5]])
    assert distance(out[[0, 2, 5]], single) <= 1e-5


def test_a_single_row_is_the_plain_pipeline(pipe, run):
    expected = run(pipe, ["a"])
    with apply(pipe, STYLE):
        assert torch.equal(run(pipe, ["a"]), expected)


def modular(pipe, guider):
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts = {
        n: getattr(pipe, n)
        for n in (
            "unet",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
        )
    }
    modular = StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**parts, guider=guider)
    modular.set_progress_bar_config(disable=True)
    return modular


def modular_run(pipe, noise):
    return pipe(
        prompt=["a toy train", "a cat", "a house"],
        latents=noise.clone(),
        num_inference_steps=2,
        height=32,
        width=32,
        output="latents",
    )


def test_sequential_guiders(pipe, run, distance):
    """Modular pipelines call the UNet once per condition: the same pictures as one batched call."""
    from diffusers import ClassifierFreeGuidance

    other = modular(pipe, ClassifierFreeGuidance(guidance_scale=5.0))
    noise = run.noise(pipe, 3)
    with apply(pipe, STYLE):
        expected = run(pipe, ["a toy train", "a cat", "a house"], noise=noise)
        assert distance(modular_run(other, noise), expected) <= 5e-5


def test_guiders_that_listen_for_attention_are_heard(pipe, run):
    from diffusers import LayerSkipConfig, PerturbedAttentionGuidance

    skip = LayerSkipConfig(
        indices=[0],
        fqn="mid_block.attentions.0.transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    other = modular(
        pipe,
        PerturbedAttentionGuidance(
            guidance_scale=5.0,
            perturbed_guidance_scale=4.0,
            perturbed_guidance_config=skip,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
        ),
    )
    noise = run.noise(pipe, 3)
    with apply(pipe, STYLE) as handle:
        with pytest.warns(UserWarning, match="AttentionScoreSkipFunctionMode"):
            modular_run(other, noise)
        notes = {r.layer: r.why for r in handle.explain().rows}
        heard = [n for n, why in notes.items() if "AttentionScoreSkipFunctionMode" in why]
        assert heard
        assert all(n.startswith("mid_block") for n in heard)


def test_layer_skipping_knows_our_processor():
    from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

    assert Registry.get(StyleAttnProcessor) is Registry.get(AttnProcessor2_0)


def test_perturbed_attention_pipelines(run, distance):
    """Three chunks, and processors that are swapped inside the call: with next to no
    perturbed guidance the pictures are those of plain guidance."""
    pipe = tiny.sdxl()
    pag = StableDiffusionXLPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])
    pag.set_progress_bar_config(disable=True)
    plain = run(pag, pag_scale=2.0)
    with apply(pipe, STYLE):
        expected = run(pipe)
        assert distance(run(pag, pag_scale=1e-9), expected) <= 1e-5
        perturbed = run(pag, pag_scale=2.0)
        assert distance(perturbed, expected) > 1e-4
        assert distance(perturbed[:1], plain[:1]) <= 1e-5  # the reference is the plain pipeline's
        assert distance(perturbed[1:], plain[1:]) > 1e-3
        assert distance(run(pag, pag_scale=2.0, guidance_scale=1.0)[:1], expected[:1]) > 1e-4
        assert all(type(p) is StyleAttnProcessor for p in selfs(pipe).values())


def test_a_foreign_processor_set_later_is_left_alone(pipe, run):
    class Foreign(AttnProcessor2_0):
        pass

    with apply(pipe, STYLE) as handle:
        name = next(iter(selfs(pipe)))
        foreign = Foreign()
        pipe.unet.get_submodule(name.removesuffix(".processor")).processor = foreign
        with pytest.warns(UserWarning, match="keeps it, unstyled"):
            run(pipe)
        run(pipe)
        row = next(r for r in handle.explain().rows if f"{r.layer}.processor" == name)
        assert (row.method, row.processor) == ("", "Foreign")
    assert selfs(pipe)[name] is foreign


@pytest.mark.parametrize("control_reference", [False, True])
def test_controlnet(run, distance, control_reference):
    """Residuals on the reference row or not; the ControlNet's own processors stay its own."""
    pipe = tiny.sdxl_controlnet()
    g = torch.Generator().manual_seed(0)
    control = torch.rand(3, 3, 32, 32, generator=g)
    method = StyleAligned(control_reference=control_reference)
    processors = dict(pipe.controlnet.attn_processors)
    plain = StableDiffusionXLPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    free, steered = run(plain), run(pipe, image=control)
    with apply(pipe, method):
        out = run(pipe, image=control)
    expected = steered if control_reference else free
    assert distance(out[:1], expected[:1]) <= 1e-5
    assert distance(out[1:], steered[1:]) > 1e-3
    assert dict(pipe.controlnet.attn_processors) == processors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(pipe, run, distance, dtype):
    with apply(pipe, STYLE):
        expected = run(pipe)
        pipe.to(dtype)
        out = run(pipe)
    assert out.dtype == dtype
    assert distance(out.float(), expected) <= (1e-5 if dtype is torch.float32 else 0.2)


def test_attention_masks(pipe):
    """The UNet's mask over keys reaches a layer of the same length; others are refused, clearly."""
    from styleattn.processors._attention import key_bias

    key = torch.zeros(4, 2, 9, 8)
    mask = torch.zeros(4, 1, 9)
    assert key_bias("layer", mask, key).shape == (4, 9)
    assert key_bias("layer", None, key) is None
    for bad in (torch.zeros(4, 9, 9), torch.zeros(4, 1, 8), torch.zeros(8, 1, 9)):
        with pytest.raises(ValueError, match="layer: attention_mask must be"):
            key_bias("layer", bad, key)
