"""The autoencoder of `tiny-sdxl`: an ordinary `AutoencoderKL` whose latents are the 2 x 2 pixels of
three colours side by side.

The encoder is not trained: its weights are written down here so that it computes exactly that, but
for the rounding of its norms (below 0.1 of a level of 0..255). The decoder is trained: `python -m
styleattn.tiny.vae --out DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .drawings import CONTENTS, SIZE, STYLES, draw
from .model import FACTOR, LATENT_CHANNELS, SCALING_FACTOR
from .optim import Muon

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_GROUPS = 4
# In a norm group, constants of this size make the deviation nearly independent of the data, so
# that the norm is nearly linear.
_ANCHOR = 64.0
# SiLU is the identity, within 2e-6, that far above zero.
_OFFSET = 16.0


def _silence(block: nn.Module) -> None:
    """Make the residual blocks in `block` pass their input on."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in block.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)


def _clear(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


def _linear_norm(norm: nn.GroupNorm, group: int, data: int, anchors: int) -> None:
    """Let the channels of a group (data, then one of zeros, then `anchors` constants of both signs)
    come out as data + offset."""
    width = norm.num_channels // norm.num_groups
    start = group * width
    norm.weight.data[start : start + data + 1] = _ANCHOR * (anchors / width) ** 0.5
    norm.bias.data[start : start + data + 1] = _OFFSET


@torch.no_grad()
def _write_encoder(vae: AutoencoderKL) -> None:
    """Write the weights of the pixel-unshuffling encoder."""
    encoder = vae.encoder
    _silence(encoder)
    down, wide = (
        encoder.down_blocks[0].downsamplers[0].conv,
        encoder.down_blocks[1].resnets[0].conv_shortcut,
    )
    for conv in (encoder.conv_in, down, wide, encoder.conv_out):
        _clear(conv)
    width = wide.out_channels // _GROUPS
    per_group, anchors = LATENT_CHANNELS // _GROUPS, 4
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
    for channel in range(LATENT_CHANNELS):
        colour, (y, x) = channel // 4, divmod(channel % 4, FACTOR)
        down.weight[channel, colour, y, x] = 1
        group, place = divmod(channel, per_group)
        wide.weight[group * width + place, channel] = 1
        encoder.conv_out.weight[channel, group * width + place, 1, 1] = 1
        encoder.conv_out.weight[channel, group * width + per_group, 1, 1] = -1
    for group in range(_GROUPS):
        first = group * width + per_group + 1
        wide.bias[first : first + anchors] = _ANCHOR * torch.tensor([1.0, -1.0, 1.0, -1.0])
        _linear_norm(encoder.conv_norm_out, group, per_group, anchors)
    encoder.conv_out.bias[LATENT_CHANNELS:] = -30.0  # the posterior has no spread


@torch.no_grad()
def _start_decoder(vae: AutoencoderKL) -> None:
    """Let the decoder begin as the mean colour of each 2 x 2 pixels, in the first norm group; the
    rest of it is left to training."""
    decoder = vae.decoder
    _silence(decoder)
    up = decoder.up_blocks[0].upsamplers[0].conv
    narrow = decoder.up_blocks[1].resnets[0].conv_shortcut
    data, anchors = 3, 2
    nn.init.zeros_(decoder.conv_in.weight[:LATENT_CHANNELS])
    for conv in (up, narrow):
        nn.init.zeros_(conv.weight[: data + 1 + anchors])
        nn.init.zeros_(conv.bias[: data + 1 + anchors])
    nn.init.zeros_(decoder.conv_in.bias[:LATENT_CHANNELS])
    nn.init.zeros_(decoder.conv_out.weight)
    nn.init.zeros_(decoder.conv_out.bias)
    for channel in range(LATENT_CHANNELS):
        decoder.conv_in.weight[channel, channel, 1, 1] = 1
        up.weight[channel // 4, channel, 1, 1] = 0.25
    for colour in range(3):
        narrow.weight[colour, colour] = 1
        decoder.conv_out.weight[colour, colour, 1, 1] = 1
        decoder.conv_out.weight[colour, data, 1, 1] = -1
    narrow.bias[data + 1 : data + 1 + anchors] = _ANCHOR * torch.tensor([1.0, -1.0])
    _linear_norm(decoder.conv_norm_out, 0, data, anchors)


def new_vae() -> AutoencoderKL:
    """The autoencoder with the written encoder and a decoder to be trained."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=_GROUPS,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        scaling_factor=SCALING_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    _write_encoder(vae)
    _start_decoder(vae)
    return vae


def train(folder: Path, seed: int = 0, steps: int = 1500, batch: int = 16) -> AutoencoderKL:
    """Train the decoder on latents of drawings with a little noise, and save the autoencoder to
    `folder` every 100 steps."""
    torch.manual_seed(seed)
    vae = new_vae()
    vae.encoder.requires_grad_(False)
    matrices = [p for n, p in vae.decoder.named_parameters() if p.ndim > 1 and "conv_out" not in n]
    others = [p for n, p in vae.decoder.named_parameters() if p.ndim <= 1 or "conv_out" in n]
    optimizers = [Muon(matrices, lr=0.005), torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, 1.5 * (1 - step / steps)))
        for o in optimizers
    ]
    rng, generator = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed)
    for step in range(steps):
        arrays = [
            draw(CONTENTS[rng.integers(len(CONTENTS))], STYLES[rng.integers(len(STYLES))], rng)
            for _ in range(batch)
        ]
        pictures = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = F.pixel_unshuffle(pictures, FACTOR)
        strength = 0.06 * torch.rand(batch, 1, 1, 1, generator=generator)
        error = (
            vae.decode(latents + strength * torch.randn(latents.shape, generator=generator)).sample
            - pictures
        )
        (error.square().mean() + 0.05 * error.abs().mean()).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{steps}"
                f"  rms error {127.5 * error.square().mean().sqrt().item():.2f} levels",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == steps:
            vae.save_pretrained(folder)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m styleattn.tiny.vae",
        description="Train the decoder of tiny-sdxl's autoencoder.",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    values = parser.parse_args()
    torch.set_num_threads(1)
    train(values.out, values.seed, values.steps)


if __name__ == "__main__":
    main()
