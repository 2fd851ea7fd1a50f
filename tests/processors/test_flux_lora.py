"""Every method on FLUX next to a LoRA: what it gives where the LoRA is part of the weights."""

from __future__ import annotations

import checkpoints
import pytest
import random_flux
import torch
from peft import LoraConfig
from random_flux import TOKENS, relative
from safetensors.torch import save_file

from styleattn.adapters import load_pulid
from styleattn.methods import METHODS
from styleattn.processors import apply
from styleattn.processors.bank import build_bank
from styleattn.references import Reference

torch.set_num_threads(1)
ON_FLUX = [name for name, method in METHODS.items() if "FLUX" in method.facts.hosts]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj_out"]
TARGETS += ["x_embedder", "context_embedder", "proj_mlp", "ff.net.2", "norm.linear"]
CLEAN = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(4))
PICTURE = Reference(latents=CLEAN[0], weight=2.0)
TOLD = {"num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_file(checkpoints.noise(checkpoints.xlabs(2, 32, 32, 32, 4)), folder / "xlabs.safetensors")
    widths = {"face": 10, "vision": 12, "dim": 24, "queries": 6, "out": 20, "image": 32, "heads": 2}
    save_file(checkpoints.noise(checkpoints.pulid(2, **widths)), folder / "pulid.safetensors")
    return folder


def made(name, files):
    """A method, and how many references it reads as rows of the batch."""
    shown = {
        "adapter": files / "xlabs.safetensors",
        "references": (Reference(embeds=torch.linspace(-2, 2, 32), negative=torch.zeros(32)),),
    }
    knobs = {
        "redux": {"references": (Reference(embeds=TOKENS, weight=3.0),)},
        "uso": {"references": (Reference(embeds=4 * TOKENS, weight=3.0),)},
        "ip_adapter": shown,
        "instant_style": {**shown, "blocks": {"transformer_blocks.1": 3.0}},
        "in_context": {"references": (PICTURE,)},
        "omini_control": {"references": (PICTURE,)},
        "easy_control": {"references": (PICTURE,)},
        "fill_diptych": {"b_to_a": 5.0},
    }
    if name == "pulid_flux":
        adapter = load_pulid(files / "pulid.safetensors", double=2, single=2)
        identity = (Reference(embeds=torch.randn(6, 20)),)
        return METHODS[name](adapter=adapter, references=identity, id_weight=3.0), 0
    rows = {"style_id": 2, "visual_style_prompting": 1, "reference_only": 1}
    rows |= {"style_aligned": 1, "aligned_gen": 1}
    return METHODS[name](**knobs.get(name, {})), rows.get(name, 0)


def draw(pipe, method, rows):
    """The method's pictures, its bank made with the LoRA too."""
    references = [Reference(latents=z) for z in CLEAN[:rows]]
    bank = build_bank(pipe, references, method, **TOLD) if rows else None
    with apply(pipe, method, bank=bank):
        run = random_flux.paint if "Fill" in type(pipe).__name__ else random_flux.run
        return run(pipe, steps=2)


@pytest.mark.parametrize("name", ON_FLUX)
def test_it_is_the_method_on_the_merged_weights(files, name):
    build = random_flux.fill if name == "fill_diptych" else random_flux.flux
    method, rows = made(name, files)
    without = draw(build(), method, rows)
    torch.manual_seed(1)
    pipe = build()
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS)
    pipe.transformer.add_adapter(config)
    found = draw(pipe, method, rows)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    assert not any("lora" in n for n, _ in pipe.transformer.named_modules())
    merged = draw(pipe, method, rows)
    assert relative(found, merged) <= 1e-5
    assert relative(found, without) > 1e-3
