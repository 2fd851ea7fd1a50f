"""What a method is to a host: which layers it takes, and what it does with their tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from styleattn.references import Layers, Reference, Steps, check_steps, plain

Number = float | Tensor
M = TypeVar("M", bound="Settings")


@dataclass(frozen=True)
class Layer:
    """A self-attention layer of a host.

    Args:
        name: the module's path in the model.
        index, total: its position among all self-attention layers, in the host's order.
    """

    name: str
    index: int
    total: int


@dataclass(frozen=True)
class Rows:
    """The rows of one denoiser call: chunks of classifier-free guidance, each with its references.

    Args:
        chunks: 1 without guidance, 2 for [uncond, cond], 3 with a perturbed chunk.
        count: rows per chunk.
        references: the rows of each chunk that are references, in order.
        unconditional: per chunk, whether it is the unconditional one.
    """

    chunks: int
    count: int
    references: tuple[int, ...]
    unconditional: tuple[bool, ...] = ()

    @property
    def targets(self) -> int:
        """Rows per chunk that are not references."""
        return self.count - len(self.references)

    def serving(self, reference: int) -> list[int]:
        """For every row, the row of the given reference in its chunk; -1 for rows that are
        references."""
        row = self.references[reference]
        chunk_of = [(c, r) for c in range(self.chunks) for r in range(self.count)]
        return [-1 if r in self.references else c * self.count + row for c, r in chunk_of]

    def is_reference(self) -> list[bool]:
        """For every row, whether it is a reference."""
        return [r in self.references for _ in range(self.chunks) for r in range(self.count)]

    def numbers(self, mine: Number, references: float, device: torch.device) -> Tensor:
        """[B], or [B, N] of one [N] for every token: a number for ordinary rows, another for
        reference rows."""
        value = torch.as_tensor(mine, dtype=torch.float32, device=device)
        is_reference = torch.tensor(self.is_reference(), device=device)
        if value.ndim:
            return torch.where(is_reference[:, None], references, value[None])
        return torch.where(is_reference, references, value)


@dataclass(frozen=True)
class Features:
    """What a layer reads of references that were kept: [chunks, H, N, D] each, and `rows` [B], the
    chunk of every row of the call."""

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor


@dataclass(frozen=True)
class SelfCall:
    """One call of a self-attention layer.

    Args:
        query, key, value: [B, H, N, D].
        rows: what the rows are.
        strengths: effective weight of every reference here and now: a number, or a 0-dim tensor
            under a compiler.
        gate: the method's own weight here and now, without those of the references.
        numbers: the method's `NUMBERS`, as numbers or 0-dim tensors.
        masks: per reference [N], log of the share of its tokens that a query may see, or None.
        key_bias: [B, N] additive on the logits of the keys, or None.
        softmax_scale: None for D ** -0.5.
        backend: a name, or None for the best that can run.
        features: of references that are no rows of the call.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rows: Rows
    strengths: tuple[Number, ...]
    gate: Number
    numbers: Mapping[str, Number]
    masks: tuple[Tensor | None, ...]
    key_bias: Tensor | None = None
    softmax_scale: float | None = None
    backend: str | None = None
    features: Features | None = None


@dataclass(frozen=True)
class NormCall:
    """One call of a GroupNorm: its input [B, C, ...], its own output, its parameters, who is who,
    and the backend (None for the best that can run)."""

    x: Tensor
    output: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rows: Rows
    strengths: tuple[Number, ...]
    backend: str | None = None


class Described(Protocol):
    """What a host asks of every method: where and when it is at work, and what it refers to."""

    name: ClassVar[str]
    NUMBERS: ClassVar[tuple[str, ...]]

    @property
    def layers(self) -> Layers: ...
    @property
    def steps(self) -> Steps: ...
    @property
    def references(self) -> tuple[Reference, ...] | None: ...


@runtime_checkable
class Method(Described, Protocol):
    """What a host asks of a method on self-attention."""

    @property
    def shares_norm(self) -> bool: ...
    @property
    def control_reference(self) -> bool: ...
    def takes(self, layer: Layer) -> bool:
        """Whether the method changes the layer."""
        ...

    def self_attention(self, call: SelfCall) -> Tensor:
        """The layer's output [B, H, N, D]."""
        ...

    def group_norm(self, call: NormCall) -> Tensor:
        """The norm's output, like its input."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, with the method's name."""
        ...


class Settings:
    """Checks and plain-data forms of a frozen dataclass of a method's knobs."""

    name: ClassVar[str]
    steps: Steps
    references: tuple[Reference, ...] | None

    def _wrong_numbers(self, *knobs: str) -> list[str]:
        """What is wrong with knobs that must be finite numbers."""
        reasons = []
        for knob in knobs:
            value = getattr(self, knob)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                reasons.append(f"{knob} must be a number, got {value!r}")
            elif not math.isfinite(value):
                reasons.append(f"{knob} must be finite, got {value}")
        return reasons

    def _wrong_flags(self, *knobs: str) -> list[str]:
        """What is wrong with knobs that must be True or False."""
        values = {knob: getattr(self, knob) for knob in knobs}
        return [
            f"{knob} must be True or False, got {value!r}"
            for knob, value in values.items()
            if not isinstance(value, bool)
        ]

    def _plain_steps(self) -> list[str]:
        """Put the steps into a tuple; what is wrong with them."""
        try:
            object.__setattr__(self, "steps", check_steps("steps", self.steps))
        except ValueError as error:
            return [str(error)]
        return []

    def _plain_references(self, single: bool = True) -> bool:
        """Put a list of references (or a single one, where that may be) into a tuple; whether they
        are None or a tuple of `Reference`."""
        references: Any = self.references
        if isinstance(references, list):
            references = tuple(references)
        elif single and isinstance(references, Reference):
            references = (references,)
        object.__setattr__(self, "references", references)
        return references is None or (
            isinstance(references, tuple) and all(isinstance(r, Reference) for r in references)
        )

    def _refuse(self, reasons: Sequence[str]) -> None:
        """Raise a ValueError that gives all reasons, where there are any."""
        if reasons:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(reasons))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data: {"method": name, knob: value}."""
        data: dict[str, Any] = {"method": self.name}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, tuple) and value and isinstance(value[0], Reference):
                value = [r.to_dict() for r in value]
            data[f.name] = plain(value)
        return data

    @classmethod
    def from_dict(cls: type[M], data: Mapping[str, Any]) -> M:
        """The reverse of `to_dict`; missing knobs take their defaults.

        Raises:
            ValueError: unknown knobs, all of them at once, or settings of another method.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f"{cls.__name__}.from_dict needs a mapping, got a {type(data).__name__}"
            )
        values = dict(data)
        method = values.pop("method", cls.name)
        if method != cls.name:
            raise ValueError(
                f"{cls.__name__} reads settings of {cls.name!r}, these are of {method!r}"
            )
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(str(k) for k in values if k not in known)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no knob {', '.join(unknown)}; it has {', '.join(known)}"
            )
        if values.get("references") is not None:
            values["references"] = tuple(
                r if isinstance(r, Reference) else Reference.from_dict(r)
                for r in values["references"]
            )
        return cls(**values)

    def to_yaml(self) -> str:
        """`to_dict` as YAML."""
        return _yaml().safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls: type[M], text: str) -> M:
        """`from_dict` of a YAML document.

        Raises:
            ValueError: not YAML, or not settings of this method.
        """
        yaml = _yaml()
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{cls.__name__}.from_yaml: {error}") from error
        return cls.from_dict({} if data is None else data)

    def changed(self) -> dict[str, Any]:
        """The knobs that differ from their defaults."""
        found = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                found[f.name] = value
        return found


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML settings need the package PyYAML: pip install pyyaml") from error
    return yaml


def off(strength: Number) -> bool:
    """Whether a strength is known to be zero."""
    return not isinstance(strength, Tensor) and strength == 0.0


def log(strength: Number) -> Number:
    """log of a strength; -inf for 0."""
    if isinstance(strength, Tensor):
        return torch.log(strength)
    return math.log(strength) if strength else -math.inf


def without_numbers(method: Any) -> tuple[dict[str, Any], list[int]]:
    """The settings of a method but its numbers; what is no setting (masks, pictures, embeddings,
    adapters, encoders) by identity."""
    settings = {k: v for k, v in method.to_dict().items() if k not in method.NUMBERS}
    parts = ("mask", "image", "latents", "embeds", "negative")
    things = [getattr(r, part) for r in method.references or () for part in parts]
    things += [
        getattr(method, part, None)
        for part in ("adapter", "image_encoder", "text_encoder", "negative_content")
    ]
    return settings, [id(thing) for thing in things if not isinstance(thing, str)]
