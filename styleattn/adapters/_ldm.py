"""Names of a UNet's weights: those of the latent-diffusion code, in those of diffusers."""

from __future__ import annotations

import re

_ENDS = {
    "input_blocks.0.0.": "conv_in.",
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}
_RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")


def diffusers_name(name: str, layers_per_block: int = 2) -> str:
    """``input_blocks.4.1.proj_in.weight`` is ``down_blocks.1.attentions.0.proj_in.weight``.

    A name that no UNet has comes back as it is.

    Args:
        name: as the latent-diffusion code has it, without ``model.diffusion_model.``.
        layers_per_block: resnets of each down block; up blocks have one more.
    """
    for old, new in _ENDS.items():
        if name.startswith(old):
            return new + _inner(name.removeprefix(old))
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    side, part, leaf = match[1], int(match[3]), match[4]
    index = int(match[2]) - (side == "input")
    block, layer = divmod(index, layers_per_block + 1)
    stem = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if leaf.startswith("op."):
        return f"{stem}.downsamplers.0.conv.{leaf.removeprefix('op.')}"
    if side == "output" and leaf.startswith("conv."):
        return f"{stem}.upsamplers.0.{leaf}"
    return f"{stem}.{'attentions' if part else 'resnets'}.{layer}.{_inner(leaf)}"


def _inner(leaf: str) -> str:
    for old, new in _RESNET.items():
        if leaf.startswith(old):
            return new + leaf.removeprefix(old)
    return leaf
