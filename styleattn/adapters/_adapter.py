"""What every image adapter is to a host: tokens of an encoded image, and their keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from styleattn.errors import describe, invalid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Blank = Literal["zeros", "null", "grey", "black"]
_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.attentions\.(\d+)\.(.+)")
_ORDER = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}


@dataclass(frozen=True)
class Encoder:
    """The picture encoder that an adapter was trained with, and what of its output it takes.

    Args:
        tower: the vision tower, as its authors print it.
        width: channels of the output that the adapter takes.
        output: "embeds" is the projected embedding [R, width]; "pooled" the pooler's output
            [R, width]; "hidden" the tokens [R, S, width] of `layer` before the last norm; "last"
            the tokens after it; "levels" several hidden states [R, L, S, width].
        layer: which of the tower's hidden states "hidden" means, as an index into them; for
            "levels" all of them.
        image_size: pixels of the square input.
        mean, std: of the normalisation per colour channel, of pixels in [0, 1].
        crop: resize the shorter side and crop the centre; False resizes both sides.
        blank: what stands for no image in unconditional rows: "zeros" is an encoder output of
            zeros, "null" the same but with tokens of zero (so that, without biases, its keys have
            the logit 0 and the value 0), "grey" the output for pixels that are zero after the
            normalisation, "black" the output for a black picture.
    """

    tower: str
    width: int
    output: Literal["embeds", "pooled", "hidden", "last", "levels"]
    layer: int | tuple[int, ...] | None = None
    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    crop: bool = True
    blank: Blank = "zeros"

    @property
    def sequence(self) -> bool:
        """Whether the output is a sequence of tokens."""
        return self.output in ("hidden", "last")


def clip(
    width: int, output: Literal["embeds", "hidden"], blank: Blank, *, crop: bool = True
) -> Encoder:
    """The CLIP tower whose projected embedding, or last hidden state but one, has this width."""
    towers = {
        "embeds": {768: "CLIP ViT-L/14", 1024: "CLIP ViT-H/14", 1280: "CLIP ViT-bigG/14"},
        "hidden": {1024: "CLIP ViT-L/14", 1280: "CLIP ViT-H/14", 1664: "CLIP ViT-bigG/14"},
    }
    tower = towers[output].get(width, f"CLIP of width {width}")
    layer = -2 if output == "hidden" else None
    return Encoder(tower, width, output, layer, crop=crop, blank=blank)


def siglip(width: int, output: Literal["pooled", "last"]) -> Encoder:
    """SigLIP so400m/14 at 384 pixels, pictures resized without a crop to [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    tower = "SigLIP so400m/14-384"
    return Encoder(tower, width, output, None, 384, half, half, crop=False)


class HostLayer(NamedTuple):
    """An attention layer of a host: the module's path, the width heads * D of its keys, and the
    width of what they are projected from."""

    name: str
    inner: int
    context: int


def checkpoint_order(layers: Sequence[HostLayer | tuple[str, int, int]]) -> list[HostLayer]:
    """The cross-attention layers of a UNet in the order of the indices of published files.

    Files count the processors down, up, mid (the order of registration, not of execution), self-
    and cross-attention in turn: the cross-attention layer i of this order has the index 2 i + 1.

    Raises:
        ValueError: names that are not a UNet's.
    """
    found = [HostLayer(name.removesuffix(".processor"), *sizes) for name, *sizes in layers]
    strange = [layer.name for layer in found if not _BLOCK.fullmatch(layer.name)]
    if strange or not found:
        raise ValueError(
            f"no layers of a UNet: {', '.join(strange[:4])} of {len(found)}; expected names like "
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
        )
    return sorted(found, key=lambda layer: _position(layer.name))


def _position(name: str) -> tuple[int, ...]:
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no layer of a UNet")
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+", name)]
    return (_ORDER[match[1]], *numbers)


def indexed(host: Sequence[HostLayer], prefix: str, suffix: str = "") -> dict[str, tuple[str, str]]:
    """The prefixes that files of IP-Adapters give to the projections of all layers of a host in
    `checkpoint_order`: ``ip_adapter.7.to_k_ip.`` for the fourth."""
    return {
        layer.name: (
            f"{prefix}{2 * index + 1}.to_k_ip{suffix}.",
            f"{prefix}{2 * index + 1}.to_v_ip{suffix}.",
        )
        for index, layer in enumerate(host)
    }


class KeyValue(nn.Module):
    """Keys and values of image tokens at one layer: `K = T W_k (+ b_k)`, `V = T W_v (+ b_v)`.

    Args:
        inner, context: widths of the keys and of the tokens.
        bias: whether the projections have one.
        rms_dim: normalise K and V over runs of that many channels (the heads), without a weight,
            `x / sqrt(mean(x^2) + 1e-5)`; None does not.
    """

    def __init__(
        self, inner: int, context: int, *, bias: bool = False, rms_dim: int | None = None
    ) -> None:
        super().__init__()
        self.key = nn.Linear(context, inner, bias=bias)
        self.value = nn.Linear(context, inner, bias=bias)
        self.rms_dim = rms_dim

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(self.key(tokens)), self._norm(self.value(tokens))

    def _norm(self, x: Tensor) -> Tensor:
        if self.rms_dim is None:
            return x
        heads = x.unflatten(-1, (-1, self.rms_dim)).float()
        return F.rms_norm(heads, (self.rms_dim,), eps=1e-5).flatten(-2).to(x.dtype)


class ImageAdapter(nn.Module):
    """A projector of encoder outputs to image tokens, and the projections of the tokens to keys
    and values at the layers of one host. The weights are frozen.

    Args:
        kind: what it is called in a message or a table ("base", "plus", ...).
        encoder: what makes its inputs.
        projector: [R, width] or [R, S, width] to tokens [R, M, C].
        pairs: the projections by module path of the layer.
    """

    blank: Tensor | None

    def __init__(
        self, kind: str, encoder: Encoder, projector: nn.Module, pairs: Mapping[str, KeyValue]
    ) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = encoder
        self.projector = projector
        self.names = tuple(pairs)
        self.pairs = nn.ModuleList(pairs.values())
        self.register_buffer("blank", None, persistent=False)

    @property
    def layers(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The key and the value projection of every layer, by its module path."""
        pairs = zip(self.names, self.pairs, strict=True)
        return {name: (pair.key, pair.value) for name, pair in pairs if isinstance(pair, KeyValue)}

    def tokens(self, embeds: Tensor) -> Tensor:
        """Image tokens [R, M, C] of encoder outputs, in the dtype of the weights.

        Args:
            embeds: [R, width], or [R, S, width] where `encoder.sequence`.

        Raises:
            Invalid: another shape.
        """
        self._check("tokens", embeds)
        dtype = next(self.projector.parameters()).dtype
        tokens: Tensor = self.projector(embeds.to(dtype))
        if self.encoder.blank == "null":
            tokens = tokens * embeds.flatten(1).any(1)[:, None, None]
        return tokens

    def negative(self, embeds: Tensor) -> Tensor:
        """The encoder output that stands for no image in unconditional rows, shaped like `embeds`.

        Zeros where `encoder.blank` is "zeros" (its tokens are not zero: the projector has a bias)
        or "null" (its tokens are). Else the encoder must have seen the blank picture once, its
        output being kept as `adapter.blank` ([S, width] or [1, S, width]; [width] for embeddings).

        Raises:
            Invalid: another shape; or `adapter.blank` is needed and unset, or does not fit.
        """
        self._check("negative", embeds)
        if self.encoder.blank in ("zeros", "null"):
            return torch.zeros_like(embeds)
        one = embeds.shape[1:]
        if self.blank is None or self.blank.shape not in (one, (1, *one)):
            pixels = {
                "grey": "a pixel tensor that is zero after the normalisation (the mean grey)",
                "black": "a black picture",
            }[self.encoder.blank]
            needed = (
                f"a {self.kind} adapter needs adapter.blank {list(one)}: the {self._output()} of "
                f"{self.encoder.tower} for {pixels}"
            )
            inputs = f"embeds {describe(embeds)}, adapter.blank {describe(self.blank)}"
            raise invalid("negative", [needed], inputs)
        return self.blank.to(embeds).expand_as(embeds)

    def key_value(self, layer: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, M, heads * D] of image tokens at a layer, heads not yet split.

        Raises:
            KeyError: the adapter has no projections for the layer.
        """
        name = layer.removesuffix(".processor")
        if name not in self.names:
            raise KeyError(f"the {self.kind} adapter has no projections for {layer}")
        key, value = self.pairs[self.names.index(name)](tokens)
        return key, value

    def file_names(
        self, projector: str, pairs: Mapping[str, tuple[str, str]], prefix: str = ""
    ) -> dict[str, str]:
        """What a file calls the weights, by the names of `state_dict`.

        Args:
            projector: the prefix of the projector in the file.
            pairs: the prefixes of the key and the value projection in the file, by layer.
            prefix: of the names of `state_dict`, for an adapter that is part of a module.
        """
        names = {k: projector + k.removeprefix("projector.") for k in self.state_dict()}
        for index, layer in enumerate(self.names):
            for kind, place in zip(("key", "value"), pairs[layer], strict=True):
                for leaf in ("weight", "bias"):
                    name = f"pairs.{index}.{kind}.{leaf}"
                    if name in names:
                        names[name] = f"{place}{leaf}"
        return {prefix + k: v for k, v in names.items()}

    def _output(self) -> str:
        index = f"hidden_states[{self.encoder.layer}]"
        return {
            "embeds": "projected embedding",
            "pooled": "pooled output",
            "hidden": index,
            "last": "last hidden state",
        }[self.encoder.output]

    def _check(self, call: str, embeds: Tensor) -> None:
        wanted = "[R, S, width]" if self.encoder.sequence else "[R, width]"
        if embeds.dim() != len(wanted.split(",")) or embeds.shape[-1] != self.encoder.width:
            reason = (
                f"a {self.kind} adapter takes the {self._output()} of {self.encoder.tower}, "
                f"{wanted} with width {self.encoder.width}"
            )
            raise invalid(call, [reason], f"embeds {describe(embeds)}")
