"""What InstantStyle-Plus' guidance by CSD holds in memory on SDXL at full size: bytes of the
weights, and the most that is alive besides during one step. Counted with tensors that have shapes
and no data, so on any machine; `--write` puts the table into docs/cost.md.

    python benchmarks/guidance_memory.py [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost.md"
START, END = "<!-- table: benchmarks/guidance_memory.py -->", "<!-- end of it -->"
SIZES = (1024, 768)
GIB = 2**30
UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025,
}  # fmt: skip
TOWER = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
         "num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024}  # fmt: skip
TEXTS = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
)


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make within, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _place(x) not in given | self.sizes.keys():
                storage = x.untyped_storage()
                self.sizes[_place(x)] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, _place(x))
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


def _place(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def peak(call: Callable[[], object], *modes: Any) -> int:
    """The most bytes that are alive at once of what a call makes."""
    gc.collect()
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        alive = stack.enter_context(Alive())
        call()
    return alive.peak


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bytes(*models: torch.nn.Module) -> int:
    tensors = (t for m in models for t in (*m.parameters(), *m.buffers()))
    return sum(t.numel() * t.element_size() for t in tensors)


def _pair(name: str, module: Any) -> int:
    """Bytes of an adapter's projections for a layer: nothing where it is no cross-attention."""
    return 2 * _bytes(module.to_k) if name.endswith("attn2") else 0


class Models:
    """SDXL, a ControlNet and CSD by their shapes: fp16; VAE and CSD fp32, as they compute."""

    def __init__(self) -> None:
        from diffusers import (
            AutoencoderKL,
            ControlNetModel,
            DDIMScheduler,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )
        from transformers import (
            CLIPTextConfig,
            CLIPTextModel,
            CLIPVisionConfig,
            CLIPVisionModelWithProjection,
        )

        from styleattn.adapters.csd import CSD, VisionTower

        self.mode = FakeTensorMode()
        control = {k: v for k, v in UNET.items() if k not in ("sample_size", "up_block_types")}
        with self.mode, _default(torch.float16):
            self.unet = UNet2DConditionModel(**UNET)
            controlnet = ControlNetModel(**control)
            vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER))
            texts = [CLIPTextModel(CLIPTextConfig(**text)) for text in TEXTS]
        with self.mode:
            self.vae = AutoencoderKL(**VAE)
            self.csd = CSD(VisionTower(1024, 14, 257), 1024, 768)
            self.aim = torch.randn(768)
        self.weights = {
            "UNet": _bytes(self.unet),
            "ControlNet": _bytes(controlnet),
            "IP-Adapter": sum(_pair(name, m) for name, m in self.unet.named_modules()),
            "CSD and VAE, fp32": _bytes(self.csd, self.vae),
            "text and image encoders": _bytes(vision, *texts),
        }
        self.pipe = StableDiffusionXLPipeline(
            vae=self.vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
            unet=self.unet, scheduler=DDIMScheduler(), add_watermarker=False,
        )  # fmt: skip

    def step(self, size: int) -> int:
        """The peak of the guidance in one step: through the VAE and CSD, then through the UNet."""
        from styleattn.pipelines.style_guidance import Aim, guidance, lean

        side = size // 8
        with self.mode:
            half = {"dtype": torch.float16}
            inputs = {
                "sample": torch.randn(1, 4, side, side, **half),
                "timestep": 500,
                "encoder_hidden_states": torch.randn(1, 77, 2048, **half),
                "added_cond_kwargs": {
                    "text_embeds": torch.randn(1, 1280, **half),
                    "time_ids": torch.randn(1, 6, **half),
                },
            }
            output = torch.randn(1, 4, side, side, **half)
        aim = Aim(self.csd, self.aim, self.aim, 1.0, 1.0)
        with lean(self.pipe, aim):
            return peak(lambda: guidance(self.pipe, aim, inputs, output, 0.3), self.mode)

    def one_graph(self, size: int) -> int:
        """The peak where the graph of all three networks is kept, as autograd does it by itself."""
        from styleattn.pipelines.style_guidance import Aim, blended, frozen

        side = size // 8
        aim = Aim(self.csd, self.aim, self.aim, 1.0, 1.0)

        def call() -> Any:
            half = {"dtype": torch.float16}
            x = torch.randn(1, 4, side, side).requires_grad_()
            added = {
                "text_embeds": torch.randn(1, 1280, **half),
                "time_ids": torch.randn(1, 6, **half),
            }
            text = torch.randn(1, 77, 2048, **half)
            found = self.unet(x.half(), 500, text, added_cond_kwargs=added).sample
            pixels = self.vae.decode(blended(x, found.float(), 0.3) / 0.13).sample
            return torch.autograd.grad(aim.loss((pixels + 1) / 2), x)

        with frozen(self.unet, self.vae, self.csd):
            return peak(call, self.mode)


def table() -> str:
    models = Models()
    lines = ["| weights | GiB |", "|---|---|"]
    lines += [f"| {name} | {n / GIB:.1f} |" for name, n in models.weights.items()]
    total = sum(models.weights.values())
    lines += [f"| together | {total / GIB:.1f} |", ""]
    lines += ["| GiB in one step | one graph | ours | ours and all weights |"]
    lines += ["|---|---|---|---|"]
    for size in SIZES:
        ours, graph = models.step(size), models.one_graph(size)
        numbers = (graph, ours, total + ours)
        cells = " | ".join(f"{n / GIB:.1f}" for n in numbers)
        lines.append(f"| {size} x {size} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/cost.md")
    made = table()
    print(made)
    if parser.parse_args().write:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        text = f"{before}{START}\n\n{made}\n\n{END}{rest.split(END, 1)[1]}"
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
