"""The small classifier of content and edge: `python -m styleattn.tiny.classifier` trains it in a
minute or two on one core.

It sees drawings blurred, noisy, recoloured and shifted, so that it also reads generated pictures,
which are less clean.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .drawings import CONTENTS, EDGES, STYLES, draw

WEIGHTS = Path(__file__).parent / "weights" / "classifier.safetensors"


class Classifier(nn.Module):
    """Four convolutions and two linear heads; pictures [B, 3, 32, 32] in -1..1 to logits of content
    and edge."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.GELU()]

        self.trunk = nn.Sequential(
            *stage(3, width, 1),
            *stage(width, 2 * width, 2),
            *stage(2 * width, 2 * width, 1),
            *stage(2 * width, 3 * width, 2),
            *stage(3 * width, 3 * width, 2),
        )
        self.content = nn.Linear(3 * width * 16, len(CONTENTS))
        self.edge = nn.Linear(3 * width * 16, len(EDGES))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(pictures).flatten(1)
        return self.content(features), self.edge(features)


def as_batch(arrays: np.ndarray) -> torch.Tensor:
    """uint8 [B, 32, 32, 3] to [B, 3, 32, 32] in -1..1."""
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _disturbed(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures shifted, recoloured, blurred and with noise, each by a random amount."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count = len(pictures)
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    shifts = torch.randint(0, 5, (count, 2), generator=generator).tolist()
    pictures = torch.stack(
        [p[:, y : y + 32, x : x + 32] for p, (y, x) in zip(padded, shifts, strict=True)]
    )
    gains = uniform(0.8, 1.2, count, 3, 1, 1)
    pictures = pictures * gains + uniform(-0.15, 0.15, count, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(blurred, uniform(-0.4, 0.7, count, 1, 1, 1))
    noise = torch.randn(pictures.shape, generator=generator)
    return pictures + noise * uniform(0, 0.2, count, 1, 1, 1)


def train(seed: int = 0, steps: int = 800, batch: int = 64) -> Classifier:
    """A classifier trained on `steps * batch` drawings, a function of the seed alone."""
    torch.manual_seed(seed)
    model = Classifier()
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    for step in range(steps):
        contents, styles = (
            rng.integers(len(CONTENTS), size=batch),
            rng.integers(len(STYLES), size=batch),
        )
        arrays = np.stack(
            [draw(CONTENTS[c], STYLES[s], rng) for c, s in zip(contents, styles, strict=True)]
        )
        edges = torch.tensor([EDGES.index(STYLES[s].edge) for s in styles])
        pictures = _disturbed(as_batch(arrays), generator).contiguous(
            memory_format=torch.channels_last
        )
        content, edge = model(pictures)
        loss = F.cross_entropy(content, torch.from_numpy(contents)) + F.cross_entropy(edge, edges)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    return model.eval()


@cache
def _shipped() -> Classifier:
    from safetensors.torch import load_file

    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def classify(arrays: np.ndarray) -> tuple[list[int], list[int]]:
    """The classes of content and edge of pictures uint8 [B, 32, 32, 3], by the classifier in the
    package."""
    found: tuple[list[int], list[int]] = ([], [])
    for start in range(0, len(arrays), 64):
        for classes, logits in zip(
            found, _shipped()(as_batch(arrays[start : start + 64])), strict=True
        ):
            classes.extend(logits.argmax(1).tolist())
    return found


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(
        prog="python -m styleattn.tiny.classifier",
        description="Train the classifier of the measure.",
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    values = parser.parse_args()
    torch.set_num_threads(1)
    model = train(values.seed, values.steps)
    values.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()},
        values.out,
    )
    print(f"{values.out}: {values.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
