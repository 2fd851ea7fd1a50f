"""Every method on UNets next to what a few pictures taught: a style LoRA, a B-LoRA, a word of
textual inversion, a DreamBooth checkpoint. In fp64, where AdaIN and projections magnify nothing."""

from __future__ import annotations

import encoder_oracles as papers
import pytest
import random_pipelines as tiny
import torch
from peft import LoraConfig

from styleattn.methods import METHODS
from styleattn.pipelines import load_model
from styleattn.processors import apply
from styleattn.references import Reference

ON_UNETS = [name for name, method in METHODS.items() if "SD" in method.facts.hosts]
STYLE, CONTENT = (Reference(embeds=papers.embedding(i)) for i in (0, 1))
PROMPTS = ["a toy train", "a cat", "a house"]
PARTS = r"\.(to_q|to_k|to_v|to_out\.0)"
WHERE = {"lora": rf".*{PARTS}", "b_lora": rf"up_blocks\.0\.attentions\.1\..*{PARTS}"}
"""The layers of a style LoRA, and of the style's half of a B-LoRA."""


def made(name, pipe):
    """A method; its references are embeddings, or the first prompts of the call."""
    kind = METHODS[name]
    if not hasattr(kind, "adapter"):
        return kind()
    style, content = papers.Adapter(pipe.unet, 16, 1), papers.Adapter(pipe.unet, 16, 2)
    both = {"csgo", "instant_style_plus"}
    adapters = {"csgo": papers.Roles(style=style, content=content)}
    adapters |= {"deadiff": papers.Roles(style=style)}
    shown = (CONTENT, STYLE) if name in both else (STYLE,)
    return kind(adapter=adapters.get(name, style), references=shown)


def wide(pipe):
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.to(torch.float64)
    return pipe


def draw(run, pipe, name, **call):
    """The pictures of a method; Z-STAR has one of them beside the style."""
    rows = 2 if name == "z_star" else 3
    told = {key: x[:rows] for key, x in call.items()} or {"prompts": PROMPTS[:rows]}
    noise = run.noise(pipe, rows)
    with apply(pipe, made(name, pipe)):
        if "prompts" in told:
            return run(pipe, told["prompts"], noise=noise, negative_prompt=["blur"] * rows)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe(latents=noise, **options, **told).images


@pytest.fixture(scope="module")
def pipe():
    return wide(tiny.sdxl())


@pytest.mark.parametrize("kind", WHERE)
@pytest.mark.parametrize("name", ON_UNETS)
def test_a_lora_is_the_method_on_the_merged_weights(run, distance, name, kind):
    pipe = wide(tiny.sdxl())
    without = draw(run, pipe, name)
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=WHERE[kind]))
    pipe.unet.to(torch.float64)
    found = draw(run, pipe, name)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    assert not any("lora" in n for n, _ in pipe.unet.named_modules())
    assert distance(draw(run, pipe, name), found) <= 1e-5
    assert distance(found, without) > 1e-3


@pytest.fixture(scope="module")
def spoken():
    """A pipeline that knows a new word, and the embeddings of prompts with it."""
    pipe, g = wide(tiny.sdxl()), torch.Generator().manual_seed(0)
    pairs = (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)
    for encoder, tokenizer in pairs:
        word = torch.randn(2, 32, generator=g)
        named = {"text_encoder": encoder, "tokenizer": tokenizer}
        pipe.load_textual_inversion(word, token="<style>", **named)
        encoder.to(torch.float64)
    prompts = [f"{prompt}, <style>" for prompt in PROMPTS]
    told = pipe.encode_prompt(prompts, negative_prompt=["blur"] * 3)
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return pipe, prompts, dict(zip(names, told, strict=True))


@pytest.mark.parametrize("name", ON_UNETS)
def test_a_word_of_textual_inversion(pipe, spoken, run, distance, name):
    """The prompts with the word are what their embeddings are to a pipeline without it."""
    knows, prompts, told = spoken
    found = draw(run, knows, name, prompts=prompts)
    assert distance(found, draw(run, pipe, name, **told)) <= 1e-5
    assert distance(found, draw(run, pipe, name)) > 1e-4


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model whose UNet and text encoder were trained further, and its folder."""
    pipe = tiny.sdxl()
    torch.manual_seed(2)
    for part in (pipe.unet, pipe.text_encoder):
        for parameter in part.parameters():
            parameter.data += 0.2 * parameter.data.std(correction=0) * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("dreambooth")
    pipe.save_pretrained(folder)
    return wide(pipe), wide(load_model(str(folder), device="cpu"))


@pytest.mark.parametrize("name", ON_UNETS)
def test_a_dreambooth_checkpoint(pipe, taught, run, distance, name):
    """A folder of a whole pipeline, loaded as the command line does."""
    here, loaded = taught
    found = draw(run, loaded, name)
    assert distance(found, draw(run, here, name)) <= 1e-5
    assert distance(found, draw(run, pipe, name)) > 1e-3
