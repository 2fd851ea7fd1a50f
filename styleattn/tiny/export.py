"""Write the model directory from a training run: `python -m styleattn.tiny.export RUN VAE --out
DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .adapter_model import save_image_prompts
from .captions import save_tokenizer, save_word_tokenizer
from .flux_model import FluxDenoiser, new_flow_scheduler, new_word_tokenizer
from .model import Denoiser, new_scheduler, new_tokenizer
from .train_adapter import HOSTS

Record = dict[str, object]
ADAPTERS = {f"{name}-ip-adapter": host for name, host in HOSTS.items()}


def use_averaged(model: nn.Module, run: Path) -> Record:
    """Give the model the averaged weights of a run; returns the record of the run (`steps`,
    `seconds`, `history`)."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    weights = model.state_dict()
    weights.update({name: state["model"][name] for name in weights})
    weights.update(state["mean"])
    model.load_state_dict(weights)
    model.eval()
    return {
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "history": json.loads(state["history"]),
    }


def sdxl_pipeline(run: Path, vae: Path, scratch: Path) -> tuple[Any, Record]:
    """The pipeline of a run of `tiny-sdxl`, and its record."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    tokenizer = new_tokenizer(scratch)
    model = Denoiser(tokenizer)
    record = use_averaged(model, run)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(str(vae), local_files_only=True),
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.unet.half()
    return pipe, record


def flux_pipeline(run: Path, vae: Path, scratch: Path) -> tuple[Any, Record]:
    """The pipeline of a run of `tiny-flux`, and its record."""
    from diffusers import AutoencoderKL, FluxPipeline

    tokenizer, tokenizer_2 = new_tokenizer(scratch / "1"), new_word_tokenizer(scratch / "2")
    model = FluxDenoiser(tokenizer, tokenizer_2)
    record = use_averaged(model, run)
    autoencoder = AutoencoderKL.from_pretrained(str(vae), local_files_only=True)
    autoencoder.register_to_config(shift_factor=0.0)  # FluxPipeline adds it to the latents
    pipe = FluxPipeline(
        scheduler=new_flow_scheduler(),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=model.transformer,
    )
    pipe.transformer.half()
    return pipe, record


def _name_text_model(weights: Path) -> None:
    """Name CLIP's tensors as published checkpoints do, which every transformers reads; transformers
    5 saves them without the prefix."""
    tensors = load_file(weights)
    if not any(name.startswith("text_model.") for name in tensors):
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        save_file(tensors, weights, metadata={"format": "pt"})


def _name_t5_tokenizer(index: Path) -> None:
    """transformers 5 calls the fast tokenizer T5Tokenizer, a name that is another class before;
    T5TokenizerFast is known to all."""
    found = json.loads(index.read_text(encoding="utf-8"))
    found["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def export(run: Path, vae: Path, out: Path, model: str = "tiny-sdxl") -> None:
    """Save the pipeline with denoiser and autoencoder in half precision, and `training.json` next
    to it; `out` is replaced only when all is written.

    The text encoders stay in single precision: transformers would load half precision as it is,
    diffusers would not, and a plain `from_pretrained` would give a mixed pipeline.
    """
    flux = model == "tiny-flux"
    with tempfile.TemporaryDirectory() as scratch:
        pipe, record = (flux_pipeline if flux else sdxl_pipeline)(run, vae, Path(scratch))
        fresh = out.with_name(out.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        pipe.vae.half()
        pipe.save_pretrained(str(fresh), safe_serialization=True)
    _name_text_model(fresh / "text_encoder" / "model.safetensors")
    save_tokenizer(fresh / "tokenizer")  # vocabulary and merges, which transformers 4 reads
    if flux:
        save_word_tokenizer(fresh / "tokenizer_2")
        _name_t5_tokenizer(fresh / "model_index.json")
    else:
        save_tokenizer(fresh / "tokenizer_2")
    (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if (out / "MODEL_CARD.md").exists():
        shutil.copy(out / "MODEL_CARD.md", fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def export_adapter(run: Path, out: Path, name: str) -> None:
    """Save the image adapter (one of `ADAPTERS`) of a run of `styleattn.tiny.train_adapter`, its
    encoder, and `training.json`; `out` is replaced only when all is written."""
    host = ADAPTERS[name]
    model = host.new_prompts()
    record = use_averaged(model, run)
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_image_prompts(model, host.places(model.adapter), fresh)
    (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if (out / "MODEL_CARD.md").exists():
        shutil.copy(out / "MODEL_CARD.md", fresh)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m styleattn.tiny.export",
        description="Write a model directory from a training run.",
    )
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument(
        "vae", type=Path, nargs="?", help="folder of styleattn.tiny.vae; an adapter has none"
    )
    parser.add_argument("--out", type=Path, required=True)
    models = ("tiny-sdxl", "tiny-flux", *ADAPTERS)
    parser.add_argument("--model", choices=models, default="tiny-sdxl")
    values = parser.parse_args()
    adapter = values.model in ADAPTERS
    if (values.vae is None) != adapter:
        parser.error("models need the folder of a vae, adapters take none")
    if adapter:
        export_adapter(values.run, values.out, values.model)
    else:
        export(values.run, values.vae, values.out, values.model)


if __name__ == "__main__":
    main()
