"""InstantStyle: exactly its layers, content taken out of the embedding, with other pipelines."""

from __future__ import annotations

import checkpoints
import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from image_prompts import embeds, given, picture

from styleattn.adapters import ip_adapter_from
from styleattn.methods import InstantStyle
from styleattn.processors import apply, remove
from styleattn.processors._layers import layer_weights
from styleattn.references import Reference

PROMPTS = ["a cat"]
SD15 = {
    "block_out_channels": (16, 16, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}
# The odd indices of the published files, by what InstantStyle calls the blocks.
INDICES = {
    ("sdxl", "style"): range(69, 88, 2),
    ("sdxl", "layout"): range(29, 48, 2),
    ("sd15", "style"): (13, 15, 17),
    ("sd15", "layout"): (9, 11, 31),
}
SCALES = {
    "sdxl": {"down": {"block_2": [0.0, 0.3]}, "up": {"block_0": [0.0, 0.7, 0.0]}},
    "sd15": {"down": {"block_2": 0.3}, "mid": 0.3, "up": {"block_1": 0.7}},
}


@pytest.fixture(scope="module")
def sd15():
    """The block names of the real SD1.5."""
    return tiny.sd(**SD15)


def own(pipe, state):
    cross = pipe.unet.config.cross_attention_dim
    names = images.cross_layers(pipe.unet)
    layers = [(n, pipe.unet.get_submodule(n).inner_dim, cross) for n in names]
    return ip_adapter_from(images.flat(state), layers)


def by_file(pipe, state, scale, e, run, *, negative=None, **call):
    """diffusers' own processors, given ready embeddings."""
    pipe.unet._load_ip_adapter_weights([state])
    pipe.set_ip_adapter_scale(scale)
    try:
        return run(pipe, PROMPTS, ip_adapter_image_embeds=given([e]), **call)
    finally:
        parts = getattr(pipe, "image_encoder", None), getattr(pipe, "feature_extractor", None)
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=parts[0], feature_extractor=parts[1])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_exactly_these_layers_of_the_real_models(family):
    """By the indices of the published files: 2 i + 1 in the order down, up, mid."""
    layers = [name for name, _, _ in checkpoints.unet_layers(family)]
    for knobs in ({"style": 0.7}, {"style": 0.0, "layout": 0.3}, {"style": 0.7, "layout": 0.3}):
        method = InstantStyle(**knobs)
        weights = layer_weights(method.layers, layers)
        expected = dict.fromkeys(layers, 0.0)
        for part, scale in {"style": 1.0, "layout": 0.0, **knobs}.items():
            for index in INDICES[family, part]:
                expected[layers[index // 2]] = scale
        assert weights == expected


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_dictionary_of_diffusers(request, run, distance, family):
    """The same scales in every layer, and the same pictures; through the loaded adapter too."""
    pipe = request.getfixturevalue("sdxl3" if family == "sdxl" else "sd15")
    state, scale = images.checkpoint(pipe.unet), SCALES[family]
    expected = by_file(pipe, state, scale, embeds(0), run)
    method = InstantStyle(0.7, 0.3, own(pipe, state), references=Reference(embeds=embeds(0)))
    with apply(pipe, method) as handle:
        assert distance(run(pipe, PROMPTS), expected) <= 1e-5
        touched = {r.layer for r in handle.explain().rows if r.method}
    pipe.unet._load_ip_adapter_weights([state])
    pipe.set_ip_adapter_scale(scale)
    theirs = {
        name.removesuffix(".processor")
        for name, p in pipe.unet.attn_processors.items()
        if getattr(p, "scale", [0.0])[0]
    }
    pipe.set_ip_adapter_scale(1.0)
    with apply(pipe, InstantStyle(0.7, 0.3)):
        loaded = run(pipe, PROMPTS, ip_adapter_image_embeds=given([embeds(0)]))
    pipe.unload_ip_adapter()
    assert touched == theirs
    assert distance(loaded, expected) <= 1e-5


@pytest.fixture(scope="module")
def seeing():
    """SDXL whose two encoders end in one space."""
    pipe = tiny.sdxl()
    tower = images.encoder(width=32)
    pipe.register_modules(image_encoder=tower, feature_extractor=images.extractor())
    return pipe


def looked(pipe, picture):
    pixels = pipe.feature_extractor(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        return pipe.image_encoder(pixels).image_embeds[0]


@pytest.mark.parametrize("kind", ["prompt", "embedding", "picture"])
def test_content_is_subtracted(seeing, run, distance, kind):
    """e - s c in CLIP's space, not normalised, for a prompt (the second text encoder's pooled
    output), an embedding as it is, and a picture; unconditional rows stay at no image."""
    state = images.checkpoint(seeing.unet, width=32)
    e = looked(seeing, picture(0))
    if kind == "prompt":
        content = "a bunny"
        c = seeing.encode_prompt(content, do_classifier_free_guidance=False)[2][0]
    elif kind == "embedding":
        content = c = torch.randn(32, generator=torch.Generator().manual_seed(3))
    else:
        content, c = picture(1), looked(seeing, picture(1))
    scale = {"up": {"block_0": [0.0, 0.8]}}
    expected = by_file(seeing, state, scale, e - 0.5 * c, run)
    plain = by_file(seeing, state, scale, e, run)
    assert distance(plain, expected) > 1e-3
    method = InstantStyle(
        0.8,
        adapter=own(seeing, state),
        negative_content=content,
        negative_content_scale=0.5,
        references=Reference(image=picture(0)),
    )
    with apply(seeing, method) as handle:
        assert distance(run(seeing, PROMPTS), expected) <= 1e-5
        assert len({r.layer for r in handle.explain().rows if r.method}) == 1


def test_contents_that_cannot_be_subtracted(seeing):
    def refused(match, pipe=seeing, adapter=None, **knobs):
        made = own(seeing, images.checkpoint(seeing.unet, width=32)) if adapter is None else adapter
        with pytest.raises(ValueError, match=match):
            apply(pipe, InstantStyle(1.0, adapter=made, **knobs))

    one = Reference(embeds=torch.zeros(32))
    refused("content must be .width", negative_content=torch.zeros(31), references=one)
    refused("text_encoder: .*nothing", negative_content="x", text_encoder="nothing", references=one)
    narrow = own(seeing, images.checkpoint(seeing.unet))
    refused(
        r"with projection, of width 24; there are CLIPTextModelWithProjection of width 32, CLIP",
        adapter=narrow,
        negative_content="a bunny",
        references=Reference(embeds=embeds(0)),
    )
    cross = seeing.unet.config.cross_attention_dim
    names = images.cross_layers(seeing.unet)
    layers = [(n, seeing.unet.get_submodule(n).inner_dim, cross) for n in names]
    shapes = {**checkpoints.resampler(images.HIDDEN, 128, cross, 6, 2), **checkpoints.pairs(layers)}
    refused(
        "the adapter takes 'hidden' of",
        adapter=ip_adapter_from(checkpoints.noise(shapes), layers),
        negative_content="a bunny",
        references=Reference(embeds=torch.zeros(5, images.HIDDEN)),
    )


def test_a_text_encoder_of_its_own(seeing, run, distance, tmp_path):
    """SD1.5 has no projected text: another CLIP brings it, as an object or from a folder."""
    state = images.checkpoint(seeing.unet, width=32)
    c = seeing.encode_prompt("a bunny", do_classifier_free_guidance=False)[2][0]
    seeing.text_encoder_2.save_pretrained(tmp_path)
    seeing.tokenizer_2.save_pretrained(tmp_path)
    out = []
    for given_ in (c, "a bunny", "a bunny"):
        pair = (seeing.text_encoder_2, seeing.tokenizer_2) if len(out) == 1 else str(tmp_path)
        method = InstantStyle(
            1.0,
            adapter=own(seeing, state),
            negative_content=given_,
            references=Reference(embeds=embeds(1, 32)),
            text_encoder=pair,
        )
        with apply(seeing, method):
            out.append(run(seeing, PROMPTS))
    assert distance(out[1], out[0]) <= 1e-6
    assert distance(out[2], out[0]) <= 1e-6


def test_controlnet(run, distance):
    """Its residuals and the image, together; the ControlNet sees no image."""
    pipe = tiny.sdxl_controlnet()
    control = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state, processors = images.checkpoint(pipe.unet), dict(pipe.controlnet.attn_processors)
    scale = {"up": {"block_0": [0.0, 0.9]}}
    call = {"image": control, "controlnet_conditioning_scale": 0.6}
    expected = by_file(pipe, state, scale, embeds(0), run, **call)
    method = InstantStyle(0.9, adapter=own(pipe, state), references=Reference(embeds=embeds(0)))
    with apply(pipe, method):
        assert distance(run(pipe, PROMPTS, **call), expected) <= 1e-5
        assert dict(pipe.controlnet.attn_processors) == processors


def test_inpainting(run, distance):
    from diffusers import StableDiffusionXLInpaintPipeline

    pipe = StableDiffusionXLInpaintPipeline(**tiny.sdxl_parts(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    state, g = images.checkpoint(pipe.unet), torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:] = 1
    call = {"image": torch.rand(1, 3, 32, 32, generator=g), "mask_image": mask, "strength": 1.0}
    call.update(height=32, width=32, guidance_scale=8.0)
    scale = {"up": {"block_0": [0.0, 2.0]}}

    def draw(pipe, prompts, **more):
        return run(pipe, prompts, generator=torch.Generator().manual_seed(1), **call, **more)

    expected = by_file(pipe, state, scale, embeds(0), draw)
    plain = draw(pipe, PROMPTS)
    method = InstantStyle(2.0, adapter=own(pipe, state), references=Reference(embeds=embeds(0)))
    with apply(pipe, method):
        assert distance(draw(pipe, PROMPTS), expected) <= 1e-5
    assert distance(plain, expected) > 1e-3
    assert torch.equal(draw(pipe, PROMPTS), plain)
    remove(pipe)
