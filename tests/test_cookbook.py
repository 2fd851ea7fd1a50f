"""Every snippet of the cookbook runs, on random pipelines and files of the published layouts."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import image_prompts as images
import pytest
import random_flux
import random_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from styleattn.adapters import save_identity

torch.set_num_threads(1)
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cookbook.md").read_text(encoding="utf-8")
SNIPPETS = dict(
    re.findall(r"^## (.+?)$.*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
)


def test_all_snippets_are_found() -> None:
    assert len(SNIPPETS) == PAGE.count("```python") >= 12


def layers_of(unet):
    cross = unet.config.cross_attention_dim
    return [(n, unet.get_submodule(n).inner_dim, cross) for n in images.cross_layers(unet)]


@pytest.fixture(scope="module")
def pipes():
    """A pipeline of each class that a snippet names."""
    made = {
        "StableDiffusionPipeline": tiny.sd(),
        "StableDiffusionXLPipeline": tiny.sdxl(),
        "StableDiffusionXLControlNetPipeline": tiny.sdxl_controlnet(),
        "FluxPipeline": random_flux.flux(),
        "FluxFillPipeline": random_flux.fill(),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "transformer"):
            pipe.default_sample_size = 16
    return made


@pytest.fixture(scope="module")
def place(pipes, tmp_path_factory):
    """Every file that a snippet names."""
    folder = tmp_path_factory.mktemp("place")
    for i, name in enumerate(("a", "b")):
        images.picture(i, (32, 32)).save(folder / f"{name}.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    images.encoder(width=32).save_pretrained(folder / "image_encoder")
    images.extractor().save_pretrained(folder / "image_encoder")
    tiny.text_encoder(projected=True).save_pretrained(folder / "clip_text_encoder")
    tiny.tokenizer().save_pretrained(folder / "clip_text_encoder")
    random_flux.siglip(num_hidden_layers=20).save_pretrained(folder / "siglip")  # USO's levels
    uso = checkpoints.noise(checkpoints.uso(32, 16, 3, 32))
    save_file(uso, folder / "projector.safetensors")
    unet = pipes["StableDiffusionXLPipeline"].unet
    ip = images.flat(images.checkpoint(unet, width=32))
    save_file(ip, folder / "ip-adapter_sdxl_vit-h.safetensors")
    csgo = checkpoints.csgo(layers_of(unet), images.HIDDEN, 64, (4, 8))
    torch.save(checkpoints.noise(csgo), folder / "csgo.bin")
    redux = {"redux_up.weight": (96, 32), "redux_up.bias": (96,)}
    redux |= {"redux_down.weight": (32, 96), "redux_down.bias": (32,)}
    save_file(checkpoints.noise(redux), folder / "flux1-redux-dev.safetensors")
    widths = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32}
    pulid = checkpoints.noise(checkpoints.pulid(2, **widths, heads=2))
    save_file(pulid, folder / "pulid_flux_v0.9.1.safetensors")
    face, vision = torch.randn(1, 10), [torch.randn(1, 7, 12) for _ in range(5)]
    save_identity(folder / "ann.safetensors", face, vision)
    lora = {}
    for name, module in unet.named_modules():
        if name.endswith(".to_q"):
            out, into = module.weight.shape
            lora[f"unet.{name}.lora_A.weight"] = torch.randn(2, into)
            lora[f"unet.{name}.lora_B.weight"] = torch.randn(out, 2)
    save_file(lora, folder / "style.safetensors")
    return folder


@pytest.mark.parametrize("title", SNIPPETS)
def test_snippets_run(pipes, place, monkeypatch, title):
    monkeypatch.chdir(place)
    code = SNIPPETS[title]
    pipe = pipes[code.splitlines()[0].removeprefix("# pipe: ")]
    model = getattr(pipe, "transformer", None) or pipe.unet
    before = dict(model.attn_processors)
    names = {"pipe": pipe, "__name__": "__main__"}
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
    exec(code.replace("longest=768", "longest=16"), names)
    made = names.get("images") or [names["image"]]
    assert all(isinstance(picture, Image.Image) for picture in made)
    assert all(before[name] is found for name, found in model.attn_processors.items())
