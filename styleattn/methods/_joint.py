"""What a method is to a host with joint attention: text, image and more under one softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from styleattn.attention import attention
from styleattn.branch import Affine, Branch, Segment
from styleattn.norms import rms_norm_rotary
from styleattn.references import Reference

from ._base import Described, Layer, Number, Rows, Settings, log

Rotary = tuple[Tensor, Tensor]
"""cos and sin [N, D] of every token, the two channels of a pair side by side and alike."""


@dataclass(frozen=True)
class QKNorm:
    """The RMSNorm that projected queries or keys still wait for: it runs together with what follows
    it (AdaIN, the rotation), in one pass of a kernel."""

    weight: Tensor | None
    eps: float
    backend: str | None


@dataclass(frozen=True)
class Features:
    """Queries or keys of a run, [B, H, N, D]: normalised, or with the norm still to come."""

    x: Tensor
    norm: QKNorm | None = None

    def normalised(self) -> Tensor:
        """Before the rotation."""
        return self.x if self.norm is None else self.rotated(None)

    def rotated(self, rotary: Rotary | None, affine: Affine | None = None) -> Tensor:
        """Behind the norm, a map and the rotation; rounded once behind the map."""
        if self.norm is not None:
            norm = self.norm
            return rms_norm_rotary(
                self.x,
                norm.weight,
                eps=norm.eps,
                rotary=rotary,
                before=affine,
                backend=norm.backend,
            )
        if affine is None:
            return rotated(self.x, rotary)
        wide = self.x.to(affine.scale.dtype)
        y = torch.addcmul(affine.shift[:, :, None], wide, affine.scale[:, :, None])
        return rotated(y, rotary).to(self.x.dtype)


@dataclass(frozen=True)
class Tokens:
    """A run of tokens of a joint attention layer.

    Args:
        name: "text", "image", "reference" (a picture in context), or the name of a run that a
            method added.
        queries, keys: [B, H, N, D], not yet rotated.
        value: [B, H, N, D].
        rotary: their positions, or None.
        key_bias: [N] or [B, N] additive on the logits of the keys, or None.
    """

    name: str
    queries: Features
    keys: Features
    value: Tensor
    rotary: Rotary | None = None
    key_bias: Tensor | None = None

    @property
    def query(self) -> Tensor:
        """[B, H, N, D], normalised, not yet rotated."""
        return self.queries.normalised()

    @property
    def key(self) -> Tensor:
        """[B, H, N, D], normalised, not yet rotated."""
        return self.keys.normalised()


@dataclass(frozen=True)
class Part:
    """The queries of one run of tokens and the keys that they see, in one softmax.

    Args:
        query: [B, H, N, D], rotated.
        segments: by the name of the run that they are.
        query_affine: folded map of the queries.
        share: of the output that this is: a number, [B] or [B, N].
        rest: what the other 1 - share of the output is: the same queries, or others in their
            places, and what they see.
    """

    query: Tensor
    segments: Mapping[str, Segment]
    query_affine: Affine | None = None
    share: Number = 1.0
    rest: Part | None = None

    def changed(self, name: str, **changes: Any) -> Part:
        """The same with a segment changed, in the rest too."""
        segment = replace(self.segments[name], **changes)
        rest = None if self.rest is None else self.rest.changed(name, **changes)
        return replace(self, segments={**self.segments, name: segment}, rest=rest)

    def with_segments(self, more: Mapping[str, Segment]) -> Part:
        """The same with further segments, in the rest too."""
        rest = None if self.rest is None else self.rest.with_segments(more)
        return replace(self, segments={**self.segments, **more}, rest=rest)


Parts = Mapping[str, Part]
"""A layer's whole attention: its parts by the name of their run, in the order of the sequence."""


@dataclass(frozen=True)
class JointCall:
    """One call of a joint attention layer, as one method sees it.

    Args:
        layer: its name and place among the joint attention layers.
        tokens: the runs by name, in the order of the sequence.
        rows: what the rows are.
        strengths: effective weight of every reference here and now: a number, or a 0-dim tensor
            under a compiler.
        gate: the method's own weight here and now, without those of the references.
        numbers: the method's `NUMBERS`, as numbers or 0-dim tensors.
        masks: per reference [N], the share of it that each image token may see, or None.
        runs: per reference the name of the run that carries it, or None for one that is a row.
        serves: per reference the rows [B] of its run (-1: the row does not see it), or None.
        time: noise level of the step, 1 to 0.
        rotary_at: the positions of the image tokens, moved down and right by so many heights and
            widths of the image.
        backend: a name, or None for the best that can run.
        panels: tokens of the image's first panel, where those of each panel lie together.
        pictures: per reference that is a picture in context, what it is to the layer.
    """

    layer: Layer
    tokens: Mapping[str, Tokens]
    rows: Rows
    strengths: tuple[Number, ...]
    gate: Number
    numbers: Mapping[str, Number]
    masks: tuple[Tensor | None, ...]
    runs: tuple[str | None, ...] = ()
    serves: tuple[Tensor | None, ...] = ()
    time: Number = 1.0
    rotary_at: Callable[[tuple[float, float]], Rotary | None] = lambda offset: None
    backend: str | None = None
    panels: int | None = None
    pictures: tuple[Any, ...] = ()


@runtime_checkable
class JointMethod(Described, Protocol):
    """What a host asks of a method on joint attention."""

    def takes(self, layer: Layer) -> bool:
        """Whether the method changes the layer."""
        ...

    def joint_attention(self, call: JointCall, parts: Parts) -> Parts:
        """The layer's attention with the method in it; methods work on it in turn."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, with the method's name."""
        ...


@runtime_checkable
class ContextMethod(JointMethod, Protocol):
    """A joint method whose references are tokens next to the text, not rows of the batch."""

    @property
    def embedded(self) -> bool:
        """Whether the tokens have the model's own width: they enter behind its text embedder."""
        ...

    def context(self, embeds: Tensor) -> Tensor:
        """The tokens [P, M, C] of a reference's embeddings: made once."""
        ...

    def weighed(self, tokens: Tensor, strength: Number) -> Tensor:
        """The tokens as they enter the model at a strength."""
        ...


@runtime_checkable
class PanelMethod(JointMethod, Protocol):
    """A joint method without references that sees the image as two panels. It comes last in a
    layer, because it parts the image's keys in two segments."""

    @property
    def idle(self) -> bool:
        """Whether it leaves the model as it is."""
        ...

    def in_second(self, places: Tensor) -> Tensor:
        """[N] bool: whether the image tokens at rows and columns [N, 2] are in the second panel."""
        ...


@dataclass(frozen=True, kw_only=True)
class JointSettings(Settings):
    """Base of frozen dataclasses for joint attention, with the fields `layers`, `steps` and
    `references`."""

    references: tuple[Reference, ...] | None = None

    def _check(self, *numbers: str) -> list[str]:
        """Put steps and references into their plain form; everything that is wrong with them and
        with the numbers."""
        reasons = [*self._wrong_numbers(*numbers), *self._plain_steps()]
        if not self._plain_references() or self.references == ():
            reasons.append("references must be a non-empty tuple of Reference, or None")
        return reasons


def rotated(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotary positions: every pair of channels turned by its angle.

        y_2i = x_2i cos - x_2i+1 sin        y_2i+1 = x_2i+1 cos + x_2i sin

    Args:
        x: [B, H, N, D]; computed in fp32 (fp64 stays), returned in its dtype.

    Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34; the pairs are neighbours, as in FLUX.
    """
    if rotary is None:
        return x
    cos, sin = rotary
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)


def plain_parts(tokens: Mapping[str, Tokens]) -> dict[str, Part]:
    """A layer as the model has it: every token sees every token."""
    segments = {
        name: Segment(t.keys.rotated(t.rotary), t.value, key_bias=t.key_bias)
        for name, t in tokens.items()
    }
    return {name: Part(t.queries.rotated(t.rotary), segments) for name, t in tokens.items()}


def attend(parts: Parts, backend: str | None) -> Tensor:
    """The layer's output [B, H, sum N, D]: one call of the operation for neighbours that differ in
    biases only."""
    runs: list[list[Part]] = []
    for part in parts.values():
        if runs and _together(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    outs: list[Tensor] = []
    for run in runs:
        first, rest = run[0], run[0].rest
        query = first.query if len(run) == 1 else torch.cat([p.query for p in run], 2)
        branches = [Branch(_joined(run), first.share, query_affine=first.query_affine)]
        if rest is not None:
            seen = tuple(rest.segments.values())
            mine = None if rest.query is query else rest.query
            branches.append(Branch(seen, 1 - first.share, mine, rest.query_affine))
        out = attention(query, tuple(branches), backend=backend)
        assert isinstance(out, Tensor)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _together(a: Part, b: Part) -> bool:
    """Whether two parts see the same keys, but for biases."""
    if any(p.query_affine is not None or p.rest is not None for p in (a, b)):
        return False
    if [*a.segments] != [*b.segments]:
        return False
    return all(_alike(a.segments[n], b.segments[n]) for n in a.segments)


def _alike(a: Segment, b: Segment) -> bool:
    names = ("key", "value", "rows", "key_affine", "value_affine", "key_bias", "logit_scale")
    pairs = [(getattr(a, n), getattr(b, n)) for n in names]
    return all(x is y or (isinstance(x, float) and x == y) for x, y in pairs)


def _joined(run: Sequence[Part]) -> tuple[Segment, ...]:
    """The segments that the queries of all parts see together."""
    found = []
    for name, segment in run[0].segments.items():
        biases = [p.segments[name].logit_bias for p in run]
        if not all(_same(b, biases[0]) for b in biases):
            wide = [per_query(b, p.query) for b, p in zip(biases, run, strict=True)]
            segment = replace(segment, logit_bias=torch.cat(wide, 1))
        found.append(segment)
    return tuple(found)


def _same(a: Number, b: Number) -> bool:
    """Whether one bias does for the queries of both, as far as is known without looking."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b and isinstance(a, Tensor) and a.ndim < 2
    return a == b


def per_query(bias: Number, query: Tensor) -> Tensor:
    """A bias as [B, N]."""
    if isinstance(bias, Tensor):
        wide = bias.to(query.device, torch.float32)
    else:  # filled in on the device: a CUDA graph cannot capture a copy from the host
        wide = torch.full((), bias, dtype=torch.float32, device=query.device)
    return (wide[:, None] if wide.ndim == 1 else wide).expand(query.shape[0], query.shape[2])


def seen_by(call: JointCall, reference: int, part: str, strength: Number | None = None) -> Number:
    """log of what the queries of a run see of a reference: its strength, times its mask.

    An image token has its own share of the mask, any other token, which has no place, the mean.
    """
    strength = log(call.strengths[reference] if strength is None else strength)
    mask = call.masks[reference]
    if mask is None:
        return strength
    share = torch.log(mask if part == "image" else mask.mean().reshape(1))
    value = call.tokens[part].value
    return (strength + share).expand(value.shape[0], value.shape[2])
