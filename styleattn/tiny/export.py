"""Write the model directory from a training run: `python -m styleattn.tiny.export RUN VAE --out
DIR`."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from .captions import save_tokenizer
from .model import Denoiser, new_scheduler, new_tokenizer


def averaged(run: Path, tokenizer_folder: Path) -> tuple[Denoiser, dict[str, object]]:
    """The model of a run with its averaged weights, and the record of the run (`steps`, `seconds`,
    `history`)."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    model = Denoiser(new_tokenizer(tokenizer_folder))
    weights = model.state_dict()
    weights.update({name: state["model"][name] for name in weights})
    weights.update(state["mean"])
    model.load_state_dict(weights)
    record = {
        "steps": state["step"],
        "seconds": round(state["seconds"]),
        "history": json.loads(state["history"]),
    }
    return model.eval(), record


def export(run: Path, vae: Path, out: Path) -> None:
    """Save the pipeline with UNet and autoencoder in half precision, and `training.json` next to
    it; `out` is replaced only when all is written."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    with tempfile.TemporaryDirectory() as scratch:
        model, record = averaged(run, Path(scratch))
        model.unet.set_default_attn_processor()
        tokenizer = new_tokenizer(Path(scratch))
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
        fresh = out.with_name(out.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        # The text encoders stay in single precision: transformers would load half precision as it
        # is, diffusers would not, and a plain `from_pretrained` would give a mixed pipeline.
        pipe.unet.half()
        pipe.vae.half()
        pipe.save_pretrained(str(fresh), safe_serialization=True)
    for folder in ("tokenizer", "tokenizer_2"):
        save_tokenizer(fresh / folder)  # vocabulary and merges, which transformers 4 reads
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
    parser.add_argument("run", type=Path, help="folder of styleattn.tiny.train")
    parser.add_argument("vae", type=Path, help="folder of styleattn.tiny.vae")
    parser.add_argument("--out", type=Path, required=True)
    values = parser.parse_args()
    export(values.run, values.vae, values.out)


if __name__ == "__main__":
    main()
