"""The embedded models: ordinary pipelines that load from the package and draw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from styleattn import tiny
from styleattn.tiny import model

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = tiny.load()
    found.set_progress_bar_config(disable=True)
    return found


def generated(pipe: Any, prompts: list[str], seed: int = 0) -> list[Any]:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=4).images


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_weights_are_small_half_precision_safetensors(name: str) -> None:
    from safetensors import safe_open

    folder = tiny.path(name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12 * MEGABYTE
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 4
    for file in weights:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            kinds = {tensors.get_slice(name).get_dtype() for name in names}
        assert kinds <= ({"F32", "I64"} if "text_encoder" in file.parent.name else {"F16"})
        if file.parent.name == "text_encoder":  # what transformers 4 and 5 both read
            assert all(tensor.startswith("text_model.") for tensor in names)
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".py")]


def test_the_unet_has_the_blocks_of_stable_diffusion_xl(pipe: Any) -> None:
    config = pipe.unet.config
    assert (
        config.down_block_types
        == [
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ]
        or tuple(config.down_block_types) == model.UNET["down_block_types"]
    )
    assert tuple(config.up_block_types) == model.UNET["up_block_types"]
    assert config.layers_per_block == 2 and config.addition_embed_type == "text_time"
    names = {name.rsplit(".attentions", 1)[0] for name in pipe.unet.attn_processors}
    assert names == {
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    }


def test_the_second_model_is_a_flux_of_the_same_size() -> None:
    found = tiny.load("tiny-flux")
    found.set_progress_bar_config(disable=True)
    parts = {name: type(part).__name__ for name, part in found.components.items()}
    assert parts["transformer"] == "FluxTransformer2DModel" and type(found).__name__ == (
        "FluxPipeline"
    )
    config = found.transformer.config
    assert config.guidance_embeds and config.num_layers and config.num_single_layers
    assert {p.dtype for p in found.transformer.parameters()} == {torch.float32}
    pictures = [
        found(
            "a star",
            num_inference_steps=2,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        for _ in range(2)
    ]
    assert pictures[0].size == (32, 32) and pictures[0].tobytes() == pictures[1].tobytes()
    assert tiny.load("tiny-flux", torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_seed_gives_the_same_pictures(pipe: Any) -> None:
    first = generated(pipe, ["a star", "a boat"])
    again = generated(pipe, ["a star", "a boat"])
    assert [p.size for p in first] == [(32, 32)] * 2
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert first[0].tobytes() != generated(pipe, ["a star"], seed=7)[0].tobytes()


@pytest.mark.parametrize("content", tiny.CONTENTS)
def test_the_autoencoder_gives_drawings_back(pipe: Any, content: str) -> None:
    for seed, style in enumerate(tiny.STYLES[::17]):
        picture = np.asarray(tiny.drawing(content, style, seed))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels).latent_dist
            scaled = posterior.mode() * pipe.vae.config.scaling_factor
            torch.testing.assert_close(scaled, model.latents_of(pixels), atol=2e-3, rtol=0)
            back = pipe.vae.decode(posterior.mode()).sample
        assert (back - pixels).square().mean().sqrt() * 127.5 < 5, "levels"


def test_an_empty_prompt_means_zeros(pipe: Any) -> None:
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        "a star", do_classifier_free_guidance=True
    )
    assert not negative.any() and not negative_pooled.any()
    assert embeds.shape == (1, 16, 64) and pooled.shape == (1, 32)
    assert embeds.abs().max() > 0 and pooled.abs().max() > 0


def test_it_saves_and_loads_as_any_pipeline(pipe: Any, tmp_path: Path) -> None:
    """In a process that knows diffusers only, without the network."""
    pipe.save_pretrained(str(tmp_path / "copy"))
    code = (
        "import sys, torch, diffusers; torch.set_num_threads(1)\n"
        "for folder in sys.argv[1:]:\n"
        "    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)\n"
        "    assert not [m for m in sys.modules if m.startswith('styleattn')]\n"
        "    flux = {'height': 32, 'width': 32, 'max_sequence_length': 16}\n"
        "    more = flux if type(pipe).__name__ == 'FluxPipeline' else {}\n"
        "    picture = pipe('a star', num_inference_steps=2, output_type='np', **more).images\n"
        "    assert picture.shape == (1, 32, 32, 3), picture.shape\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    folders = [str(tmp_path / "copy"), *(str(tiny.path(name)) for name in tiny.MODELS)]
    command = [sys.executable, "-c", code, *folders]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=240)


def test_importing_it_is_light() -> None:
    code = (
        "import sys, styleattn.tiny\n"
        "heavy = {'diffusers', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "styleattn.tiny.references(), styleattn.tiny.prompts(), styleattn.tiny.path()\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_card_and_the_record_tell_the_same(name: str) -> None:
    folder = tiny.path(name)
    record = json.loads((folder / "training.json").read_text())
    card = (folder / "MODEL_CARD.md").read_text()
    assert str(record["steps"]) in card.replace(",", "")
    for heading in ("Data", "Training", "Measured", "Limits"):
        assert f"## {heading}" in card
