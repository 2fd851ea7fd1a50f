"""Whole runs of tiny pipelines against the authors' own processors, pipelines and samplers.

Nothing is downloaded: each test wants a checkout of the official repository, named by an
environment variable, and is skipped without it.

    OFFICIAL_INSTANT_STYLE=... OFFICIAL_STYLE_STUDIO=... OFFICIAL_VSP=... OFFICIAL_MASACTRL=... \\
        OFFICIAL_BELM=... OFFICIAL_DIFFUSERS=... \\
        python -m pytest tests/external/test_whole_runs.py -s
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_prompts as images
import pytest
import random_pipelines as tiny
import torch
from torch import Tensor

from styleattn.adapters import ip_adapter_from
from styleattn.inversion import belm_invert, belm_sample, ddim, noised
from styleattn.methods import (
    InstantStyle,
    MutualAttention,
    ReferenceOnly,
    StyleStudio,
    StyleStudioTeacher,
    VisualStylePrompting,
)
from styleattn.processors import apply
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

STEPS = 3
XL = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "layers_per_block": 2,
}
"""The block names of SDXL."""
V1 = {
    "block_out_channels": (16, 16, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
}
"""The block names of SD1.5."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules that the official file imports and does not use here."""

    def put(name: str, **names: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    return put


def official(variable: str, *parts: str) -> Any:
    """A module of a checkout, by its file."""
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout")
    path = Path(root, *parts)
    name = f"official_{variable.lower()}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(pipe: Any, prompts: list[str] | None, **call: Any) -> Tensor:
    rows = len(prompts) if prompts else len(call["prompt_embeds"])
    noise = torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    found: Tensor = pipe(prompts, latents=noise, **options, **call).images
    return found


def close(ours: Tensor, theirs: Tensor, plain: Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"relative error {error:.1e}")
    assert error <= 1e-5
    assert float((theirs - plain).norm() / plain.norm()) > 1e-3  # the style is visible


def long_prompts(
    pipe: Any, prompts: list[str], state: Any, seen: list[Tensor], negative_prompt: Any = None
) -> dict[str, Any]:
    """Embeddings of prompts with image tokens behind them, as the official code makes them."""
    told, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompts, negative_prompt=negative_prompt, do_classifier_free_guidance=True
    )
    rows = images.Shown(state, [[x] for x in seen])
    tokens = torch.stack([rows.tokens(i) for i in range(len(seen))])  # type: ignore[arg-type, misc]
    half = len(prompts)
    return {
        "prompt_embeds": torch.cat([told, tokens[half:]], dim=1),
        "negative_prompt_embeds": torch.cat([negative, tokens[:half]], dim=1),
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def official_processors(pipe: Any, state: Any, cross: Any, own: Any) -> None:
    """Put official processors in: `cross(name, width, text)` with the weights of the file."""
    text, found = pipe.unet.config.cross_attention_dim, {}
    for index, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn1.processor"):
            found[name] = own()
            continue
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        found[name] = made = cross(name, width, text)
        for part in ("to_k_ip", "to_v_ip"):
            weight = state["ip_adapter"][f"{index}.{part}.weight"]
            getattr(made, part).weight.data.copy_(weight)
    pipe.unet.set_attn_processor(found)


def adapter_of(pipe: Any, state: Any) -> Any:
    cross = pipe.unet.config.cross_attention_dim
    names = images.cross_layers(pipe.unet)
    layers = [(n, pipe.unet.get_submodule(n).inner_dim, cross) for n in names]
    return ip_adapter_from(images.flat(state), layers)


TARGETS = {
    "style": (["up_blocks.0.attentions.1"], {}),
    "layout": (["down_blocks.2.attentions.1"], {"style": 0.0, "layout": 1.0}),
    "both": (["up_blocks.0.attentions.1", "down_blocks.2.attentions.1"], {"layout": 1.0}),
}


@pytest.mark.parametrize("choice", TARGETS)
def test_instant_style(choice: str) -> None:
    """Official processors, chosen by the substrings of their names; a content is subtracted."""
    module = official("OFFICIAL_INSTANT_STYLE", "ip_adapter", "attention_processor.py")
    targets, knobs = TARGETS[choice]
    pipe = tiny.sdxl(**XL)
    state, prompts = images.checkpoint(pipe.unet), ["a cat", "a house"]
    picture, content = images.embeds(0), images.embeds(1)
    method = InstantStyle(
        **knobs,
        adapter=adapter_of(pipe, state),
        negative_content=content,
        negative_content_scale=0.7,
        references=Reference(embeds=picture),
    )
    plain = run(pipe, prompts)
    with apply(pipe, method):
        ours = run(pipe, prompts)

    def cross(name: str, width: int, text: int) -> Any:
        skip = not any(target in name for target in targets)
        return module.IPAttnProcessor2_0(width, text, scale=1.0, num_tokens=4, skip=skip)

    seen = [torch.zeros_like(picture)] * 2 + [picture - 0.7 * content] * 2
    call = long_prompts(pipe, prompts, state, seen)
    official_processors(pipe, state, cross, module.AttnProcessor2_0)
    close(ours, run(pipe, None, **call), plain)


@pytest.mark.parametrize("fused", [0, 2], ids=["alone", "with its teacher"])
def test_style_studio(fused: int) -> None:
    """Four rows: the teacher without style, and the picture."""
    module = official("OFFICIAL_STYLE_STUDIO", "ip_adapter", "attention_processor.py")
    pipe = tiny.sdxl(**XL)
    state, picture = images.checkpoint(pipe.unet), images.embeds(0)
    prompts = ["a cat", "a cat"]
    shown = Reference(embeds=picture, prompts=(1,))
    methods: list[Any] = [StyleStudio(adapter=adapter_of(pipe, state), references=shown)]
    if fused:
        methods.append(StyleStudioTeacher(steps=(0.0, fused / STEPS)))
    spoken = ["bad", "bad"]  # a text of zeros has no statistics: NaN in the official code
    plain = run(pipe, prompts, negative_prompt=spoken)
    with apply(pipe, *methods):
        ours = run(pipe, prompts, negative_prompt=spoken)

    def cross(name: str, width: int, text: int) -> Any:
        return module.IPAttnProcessor2_0_cross_modal(
            width, text, num_tokens=4, adainIP=True, num_inference_step=STEPS
        )

    def own() -> Any:
        return module.AttnProcessor2_0_hijack(
            fuSAttn=bool(fused), end_fusion=fused, num_inference_step=STEPS
        )

    seen = [torch.zeros_like(picture)] * 2 + [picture] * 2
    call = long_prompts(pipe, prompts, state, seen, spoken)
    official_processors(pipe, state, cross, own)
    close(ours[1:], run(pipe, None, **call)[1:], plain[1:])


def test_visual_style_prompting(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt's keys and values in the layers of the paper."""
    import transformers

    stub("kornia")
    stub("kornia.morphology", dilation=None)
    stub("torchvision")
    stub("torchvision.transforms")
    monkeypatch.setattr(transformers, "CLIPFeatureExtractor", None, raising=False)
    name = "official_official_vsp_inverted_ve_pipeline"
    stub(name)  # its dataclasses look themselves up
    module = official("OFFICIAL_VSP", "pipelines", "inverted_ve_pipeline.py")
    pipe, prompts = tiny.sdxl(**XL), ["a toy train", "a cat", "a house"]
    plain = run(pipe, prompts)
    with apply(pipe, VisualStylePrompting()):
        ours = run(pipe, prompts)
    found = dict(pipe.unet.attn_processors)
    for layer in found:
        if layer.startswith("up_blocks.1.") and ".attn1." in layer:
            found[layer] = module.CrossFrameAttnProcessor(activate_step_indices=[[0, 49]])
    pipe.unet.set_attn_processor(found)
    close(ours, run(pipe, prompts), plain)


def test_mutual_attention() -> None:
    """Layers 10 to 15 of sixteen, from the second step on."""
    module = official("OFFICIAL_MASACTRL", "masactrl", "masactrl_processor.py")
    pipe, prompts = tiny.sd(**V1), ["a toy train", "a cat"]
    plain = run(pipe, prompts)
    with apply(pipe, MutualAttention(steps=(1 / STEPS, 1.0))):
        ours = run(pipe, prompts)
    theirs = module.MasaCtrlProcessor(start_step=1, total_steps=STEPS)
    # The diffusers it was written for took a scale in every projection.
    theirs.attn_forward = lambda *given: type(theirs).attn_forward(theirs, *given[:5])
    pipe.unet.set_attn_processor(theirs)
    close(ours, run(pipe, prompts), plain)


def test_reference_only() -> None:
    """The reference under the picture's prompt: a row of the batch is a pass of its own."""
    parts = ("examples", "community", "stable_diffusion_reference.py")
    module = official("OFFICIAL_DIFFUSERS", *parts)
    pipe = tiny.sd(scheduler=tiny.ddim(steps_offset=1))
    clean = torch.randn(1, 4, 16, 16)
    shown = noised(pipe, clean, "a cat", seed=3, num_inference_steps=STEPS)
    method = ReferenceOnly(style_fidelity=0.4)
    bank = build_bank(pipe, Reference(latents=shown), method, num_inference_steps=STEPS)
    plain = run(pipe, ["a cat"])
    with apply(pipe, method, bank=bank):
        ours = run(pipe, ["a cat"])
    theirs = module.StableDiffusionReferencePipeline(
        **{k: v for k, v in pipe.components.items() if k != "image_encoder"},
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.prepare_ref_latents = lambda *_: clean
    expected = run(
        theirs, ["a cat"], ref_image=torch.zeros(1, 3, 32, 32), style_fidelity=0.4,
        reference_adain=False, generator=torch.Generator().manual_seed(3), height=32, width=32,
    )  # fmt: skip
    close(ours, expected, plain)


class Levels:
    """alphas_cumprod whose numbers stay in fp64, whatever they are cast to."""

    def __init__(self, alphas: Tensor) -> None:
        self.alphas = alphas.double()

    def __getitem__(self, t: Any) -> Any:
        return types.SimpleNamespace(to=lambda _: self.alphas[int(t)])


def test_belm(stub: Any) -> None:
    """Both directions, the official arithmetic and the network in fp64 (in fp32 the official code
    is off by 1e-4, from 1 - alpha). Inverting, leaps grow, and with them what is rounded: it is
    compared by its first leap, sampling over all steps. The clean picture is shown to the network
    as step 1 there, as step 0 here."""
    stub("samplers")
    stub("samplers.test_sd15", to_pil=None)
    module = official("OFFICIAL_BELM", "samplers", "BELM.py")
    pipe = tiny.sd(scheduler=tiny.ddim(set_alpha_to_one=True, steps_offset=1))
    pipe.unet.double()
    pipe.text_encoder.double()
    clean = torch.randn(1, 4, 16, 16)
    told, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    labels: list[int] = []

    def unet(x: Tensor, t: Any, **call: Any) -> Any:
        labels.append(0 if isinstance(t, int) else int(t))
        return pipe.unet(x, labels[-1], **call)

    def theirs(steps: int) -> Any:
        pipe.scheduler.set_timesteps(steps)
        return types.SimpleNamespace(
            _encode_prompt=lambda *_: torch.cat([negative, told]),
            unet=unet,
            scheduler=types.SimpleNamespace(
                set_timesteps=lambda *_, **__: None,
                alphas_cumprod=Levels(pipe.scheduler.alphas_cumprod),
                timesteps=pipe.scheduler.timesteps,
            ),
        )

    def settings(steps: int) -> dict[str, Any]:
        asked = {"prompt": "a cat", "negative_prompt": "", "seed": 0, "guidance_scale": 2.0}
        return {**asked, "num_inference_steps": steps, "width": 32, "height": 32}

    for steps in (2, 5):
        ours = belm_invert(pipe, clean, "a cat", num_inference_steps=steps, guidance_scale=2.0)
        if steps == 2:
            given = {"latent": clean.double()}
            expected = module.latent_to_intermediate(theirs(2), settings(2), **given)
            pairs = list(zip((ours.latents[:1], ours.latents[1:2]), expected, strict=True))
            assert labels[0] == 0
    noisiest, second = ours.latents[:2].double().split(1)
    pair = {"intermediate": noisiest, "intermediate_second": second}
    back = module.intermediate_to_latent(theirs(5), settings(5), **pair)
    for found, expected in (*pairs, (belm_sample(pipe, ours), back)):
        error = ddim.relative_error(found, expected)
        print(f"relative error {error:.1e}")
        assert error <= 1e-5
