"""Encoder methods from the files of their adapters, on whole tiny UNets."""

from __future__ import annotations

import checkpoints
import encoder_oracles as papers
import pytest
import random_pipelines as tiny
import torch
from image_prompts import HIDDEN, checkpoint, encoder, picture

from styleattn.adapters import (
    load_csgo,
    load_deadiff,
    load_ip_adapter,
    load_pulid_sdxl,
    load_styleshot,
)
from styleattn.methods import (
    CSGO,
    DEADiff,
    IPAdapter,
    PuLIDSDXL,
    RBModulation,
    StyleShot,
    StyleStudio,
)
from styleattn.pipelines.csgo import MODES, csgo_pictures, fitted
from styleattn.pipelines.sampling import Sampling
from styleattn.processors import apply
from styleattn.processors.unet import cross_attention_layers
from styleattn.references import Reference

V1 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
}
LDM = checkpoints.LDM_BLOCKS


def layers_of(model):
    return [
        (n, a.inner_dim, a.cross_attention_dim) for n, a in cross_attention_layers(model).items()
    ]


def write(shapes, folder):
    torch.save(checkpoints.noise(shapes), folder / "adapter.bin")
    return folder / "adapter.bin"


@pytest.fixture(scope="module")
def controlled():
    pipe = tiny.sdxl_controlnet()
    pipe.image_encoder = encoder()
    return pipe


@pytest.fixture(scope="module")
def sd15():
    """The block names of Stable Diffusion 1.5; text as wide as a head of the Q-Former."""
    return tiny.sdxl(**V1)


def csgo_file(pipe, folder):
    """What the published file has: the UNet's decoder, the ControlNet's encoder."""
    unet, control = layers_of(pipe.unet), layers_of(pipe.controlnet)
    shapes = checkpoints.csgo(unet, HIDDEN, 64, (4, 8))
    shapes = {k: v for k, v in shapes.items() if not k.startswith("controlnet_")}
    for name, inner, cross in control:
        for x in "kv" if name.startswith("down_blocks") else ():
            place = f"controlnet_adapter_modules.{name}.processor.to_{x}_ip.weight"
            shapes[place] = (inner, cross)
    return write(shapes, folder)


def test_csgo_from_its_file_acts_in_both_components(controlled, run, distance, tmp_path):
    """As published the content reaches no layer of the UNet; the ControlNet has the style."""
    path = csgo_file(controlled, tmp_path)
    unet, control = layers_of(controlled.unet), layers_of(controlled.controlnet)
    loaded = load_csgo(path, unet, control_layers=control)
    seen = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    references = (Reference(embeds=torch.zeros(9, HIDDEN)), Reference(embeds=seen))

    def rule(adapter):
        def layer(name, query, text):
            if name not in adapter.names:
                return papers.decoupled(query, text)
            pair = torch.stack([torch.zeros_like(seen), seen])
            tokens = adapter.tokens(pair)[[0, 1]]
            return papers.decoupled(
                query, text, (*papers.pair(adapter, name, tokens, query.shape[1]), 0.9)
            )

        return layer

    options = {"guidance_scale": 5.0, "image": torch.rand(1, 3, 32, 32)}
    with (
        torch.no_grad(),
        papers.written_out(controlled.unet, rule(loaded.style)),
        papers.written_out(controlled.controlnet, rule(loaded.control)),
    ):
        expected = run(controlled, ["a cat"], **options)
    plain = run(controlled, ["a cat"], **options)
    with apply(controlled, CSGO(adapter=str(path), style_scale=0.9, references=references)) as h:
        got = run(controlled, ["a cat"], **options)
        h.update(CSGO(adapter=str(path), style_scale=0.0, references=references))
        assert distance(run(controlled, ["a cat"], **options), plain) <= 1e-5
    assert distance(got, expected) <= 1e-5
    assert distance(got, plain) > 1e-3


@pytest.mark.parametrize("mode", [None, *MODES])
def test_csgo_modes(controlled, distance, tmp_path, mode):
    """The picture that the ControlNet sees, its strength, and the size are the mode's."""
    heard = {}

    def listen(module, args, kwargs):
        heard.update(kwargs, sample=args[0])

    hook = controlled.controlnet.register_forward_pre_hook(listen, with_kwargs=True)
    content = None if mode == "text" else picture(1, (48, 30))
    sampling = Sampling(num_inference_steps=1, guidance_scale=1.0)
    method = CSGO(adapter=csgo_file(controlled, tmp_path))
    images = csgo_pictures(
        controlled, method, picture(0), ["a", "b"], [0, 1], sampling, content=content, mode=mode
    )
    hook.remove()
    assert heard["conditioning_scale"] == MODES[mode or "image"]
    size = (32, 32) if mode == "text" else (32, 16)
    assert len(images) == 2 and images[0].size == size
    shown = heard["controlnet_cond"]
    assert shown.shape[-2:] == size[::-1] and bool(shown.any()) is (mode != "text")


def test_csgo_recipe_refuses(controlled, tmp_path):
    method = CSGO(adapter=csgo_file(controlled, tmp_path))
    for mode, content, message in (
        ("image", None, "'image' needs a content picture"),
        ("text", picture(1), "'text' needs no content"),
        ("sketch", picture(1), "must be one of image, edit, text"),
    ):
        with pytest.raises(ValueError, match=message):
            csgo_pictures(controlled, method, picture(0), ["a"], [0], content=content, mode=mode)
    with pytest.raises(ValueError, match="the style needs a picture"):
        csgo_pictures(controlled, method, Reference(embeds=torch.ones(3)), ["a"], [0])


def test_csgo_sizes():
    assert fitted((512, 768), 1024) == (672, 1024)
    assert fitted((3000, 1000), 1024) == (1024, 336)
    assert fitted((640, 640), 1024) == (1024, 1024)


def deadiff_file(pipe, folder, queries=3):
    shapes = checkpoints.deadiff(64, 12, queries, 24)
    ours = {name: inner for name, inner, _ in layers_of(pipe.unet)}
    for theirs, path in LDM.items():
        inner = ours[f"{path}.transformer_blocks.0.attn2"]
        stem = f"model.diffusion_model.{theirs}.transformer_blocks.0.attn2."
        shapes |= {f"{stem}i_to_{x}.weight": (inner, 64) for x in "kv"}
    torch.save({"state_dict": checkpoints.noise(shapes)}, folder / "deadiff.ckpt")
    return folder / "deadiff.ckpt"


def test_deadiff_from_its_file(sd15, run, distance, tmp_path):
    """No image has tokens of zero: null keys in unconditional rows."""
    path = deadiff_file(sd15, tmp_path)
    loaded = load_deadiff(path, layers_of(sd15.unet))
    seen = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        tokens = loaded.style.tokens(seen[None])
    tokens = torch.cat([torch.zeros_like(tokens), tokens])

    def rule(name, query, text):
        if name not in loaded.style.names:
            empty = torch.zeros(2, query.shape[1], 3, query.shape[3])
            return papers.deadiff(query, text, (empty, empty), 1.0)
        image = papers.pair(loaded.style, name, tokens, query.shape[1])
        return papers.deadiff(query, text, image, 1.0)

    with torch.no_grad(), papers.written_out(sd15.unet, rule):
        expected = run(sd15, ["a cat"], guidance_scale=5.0)
    method = DEADiff(adapter=path, queries=3, references=Reference(embeds=seen))
    with apply(sd15, method):
        assert distance(run(sd15, ["a cat"], guidance_scale=5.0), expected) <= 1e-5


FILES = {
    "style_shot": (
        StyleShot,
        lambda layers: checkpoints.styleshot(layers, 8),
        load_styleshot,
        (3, 8),
    ),
    "pulid": (
        PuLIDSDXL,
        lambda layers: {**checkpoints.pulid_v1(6, 5, 4, 64), **checkpoints.pulid_pairs(layers)},
        load_pulid_sdxl,
        (10, 64),
    ),
    "style_studio": (
        StyleStudio,
        lambda layers: checkpoints.csgo(layers, 8, 64, (4, 8)),
        lambda path, layers: load_csgo(path, layers).style,
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_adapter(sdxl, run, tmp_path, name):
    kind, shapes, load, size = FILES[name]
    layers = layers_of(sdxl.unet)
    path = write(shapes(layers), tmp_path)
    seen = Reference(embeds=torch.randn(size, generator=torch.Generator().manual_seed(1)))
    plain = run(sdxl, ["a cat"])
    outs = []
    for adapter in (path, load(path, layers)):
        with apply(sdxl, kind(adapter=adapter, references=seen)):
            outs.append(run(sdxl, ["a cat"]))
    assert torch.equal(*outs) and not torch.equal(outs[0], plain)


def test_rb_modulation_takes_an_ip_adapter_for_both_roles(sdxl, run, distance, tmp_path):
    torch.save(checkpoint(sdxl.unet), tmp_path / "ip.bin")
    loaded = load_ip_adapter(tmp_path / "ip.bin", layers_of(sdxl.unet))
    content, style = (torch.randn(24, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def image(name, query, embeds):
        tokens = loaded.tokens(torch.stack([torch.zeros_like(embeds), embeds]))
        return papers.pair(loaded, name, tokens, query.shape[1])

    def rule(name, query, text):
        return papers.aggregated(
            query, text, image(name, query, style), image(name, query, content)
        )

    with torch.no_grad(), papers.written_out(sdxl.unet, rule):
        expected = run(sdxl, ["a cat"], guidance_scale=5.0)
    references = (Reference(embeds=content), Reference(embeds=style))
    with apply(sdxl, RBModulation(adapter=tmp_path / "ip.bin", references=references)):
        assert distance(run(sdxl, ["a cat"], guidance_scale=5.0), expected) <= 1e-5


def test_a_missing_file_is_named_and_nothing_is_touched(sdxl, tmp_path):
    before = dict(sdxl.unet.attn_processors)
    with pytest.raises(FileNotFoundError, match="csgo: no such adapter file"):
        apply(sdxl, CSGO(adapter=tmp_path / "x.bin", references=Reference(embeds=torch.ones(3, 4))))
    assert all(sdxl.unet.attn_processors[k] is v for k, v in before.items())


@pytest.mark.parametrize("given", ["state dict", "module"])
def test_what_is_no_adapter_is_refused(sdxl, given):
    """diffusers' `load_ip_adapter` takes state dicts; ours have a loader."""
    adapter = checkpoint(sdxl.unet) if given == "state dict" else torch.nn.Linear(2, 2)
    before = dict(sdxl.unet.attn_processors)
    kind = type(adapter).__name__
    for method in (IPAdapter, StyleStudio):
        with pytest.raises(
            ValueError, match=f"{method.name}: adapter must be a file .*got a {kind}"
        ):
            apply(sdxl, method(adapter=adapter, references=Reference(embeds=torch.ones(24))))
    with pytest.raises(ValueError, match=f"csgo: its adapter, a {kind}, lacks one"):
        apply(sdxl, CSGO(adapter=adapter, references=Reference(embeds=torch.ones(3, 4))))
    assert all(sdxl.unet.attn_processors[k] is v for k, v in before.items())
