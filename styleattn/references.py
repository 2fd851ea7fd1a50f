"""What a style comes from: references, their schedules over steps, and banks that keep them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Layers = str | Sequence[str] | Sequence[float] | Mapping[str, Any]
"""Which layers: "all", "style", "layout", patterns of names, diffusers' scale dictionary, or a
weight for every block of FLUX."""

Steps = Sequence[float]
"""When: (start, end) as fractions of the run, or a curve of at least three weights over it."""

_EDGE = 1e-6
_CONDITIONS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "text_embeds",
    "negative_text_embeds",
    "time_ids",
)
KIND = "styleattn.bank"
VERSION = 1


def check_steps(name: str, steps: object) -> tuple[float, ...]:
    """A schedule as a tuple: (start, end) with 0 <= start <= end <= 1, or a curve of weights >= 0.

    Raises:
        ValueError: anything else.
    """
    numbers = isinstance(steps, (list, tuple)) and all(
        isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in steps
    )
    if not numbers or len(steps) < 2:  # type: ignore[arg-type]
        raise ValueError(
            f"{name} must be (start, end) fractions or at least three weights, got {steps!r}"
        )
    values = tuple(float(s) for s in steps)  # type: ignore[attr-defined]
    if len(values) == 2 and not 0 <= values[0] <= values[1] <= 1:
        raise ValueError(f"{name} must satisfy 0 <= start <= end <= 1, got {values}")
    if any(v < 0 for v in values):
        raise ValueError(f"{name} has a negative weight: {values}")
    return values


def always(steps: Steps) -> bool:
    """Whether a schedule is 1 at every step."""
    return tuple(steps) == (0.0, 1.0) or (len(steps) > 2 and all(s == 1.0 for s in steps))


def weight_at(steps: Steps, fraction: float) -> float:
    """The weight of a schedule at a fraction of the run, 0 <= fraction < 1 (step i of n is i /
    n)."""
    if len(steps) == 2:
        return 1.0 if steps[0] <= fraction + _EDGE < steps[1] else 0.0
    return float(steps[min(int((fraction + _EDGE) * len(steps)), len(steps) - 1)])


def weight_tensor(steps: Steps, fraction: Tensor) -> Tensor:
    """`weight_at` for a 0-dim tensor, without leaving the device: a schedule that never
    retraces."""
    fraction = fraction + _EDGE
    if len(steps) == 2:
        return ((fraction >= steps[0]) & (fraction < steps[1])).to(torch.float32)
    curve = torch.tensor(list(steps), dtype=torch.float32, device=fraction.device)
    index = (fraction * len(steps)).long().clamp(0, len(steps) - 1)
    return curve.index_select(0, index.reshape(1))[0]


@dataclass(frozen=True, eq=False)
class Reference:
    """One source of style, and how much of it goes where and when.

    Args:
        image: a PIL picture or a path; needs a bank (`build_bank`), or an encoder method, which
            encodes it at `apply`.
        latents: clean latents [C, h, w] of a picture, or its `styleattn.inversion.Trajectory`;
            needs a bank.
        prompt: what the reference shows. Without image and latents a bank samples it.
        weight: w >= 0. Its keys get log w on their logits; below 1 its statistics are mixed with
            the image's own; 0 is as if it were not there.
        mask: [h, w] in [0, 1], where in the *generated* image the reference's tokens can be seen
            (log mask on the logits, resized to each layer). Statistics (AdaIN, GroupNorm) have no
            place and are not masked.
        layers: where: "all", "style", "layout", patterns, or diffusers' scale dictionary (its
            numbers multiply w).
        steps: when: (start, end) fractions of the run, or a curve of weights (they multiply w).
        embeds: an image encoder's output for the picture [...], for encoder methods, in place of
            image.
        negative: for encoder methods, what unconditional rows see in place of no image: a picture,
            a path, or embeds.
        prompts: for encoder methods, the positions of the prompts in the call that see it; None for
            all.

    Raises:
        ValueError: a weight, mask or schedule that has no meaning.
    """

    image: Any = None
    latents: Any = field(default=None, repr=False)
    prompt: str = ""
    weight: float = 1.0
    mask: Tensor | None = field(default=None, repr=False)
    layers: Layers = "all"
    steps: Steps = (0.0, 1.0)
    embeds: Tensor | None = field(default=None, repr=False)
    prompts: tuple[int, ...] | None = None
    negative: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise ValueError(
                f"Reference.weight must be a number, got a {type(self.weight).__name__}"
            )
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"Reference.weight must be finite and not negative, got {self.weight}")
        if not isinstance(self.prompt, str):
            raise ValueError(
                f"Reference.prompt must be a string, got a {type(self.prompt).__name__}"
            )
        given = [n for n in ("image", "latents", "embeds") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"Reference takes one of {', '.join(given)}, not both")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", self._checked_prompts(self.prompts))
        object.__setattr__(self, "steps", check_steps("Reference.steps", self.steps))
        if self.mask is not None:
            self._check_mask(self.mask)

    @staticmethod
    def _checked_prompts(prompts: Any) -> tuple[int, ...]:
        if isinstance(prompts, int) and not isinstance(prompts, bool):
            prompts = (prompts,)
        if not isinstance(prompts, (list, tuple)) or not all(
            isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in prompts
        ):
            raise ValueError(
                f"Reference.prompts must be positions of prompts (ints >= 0), got {prompts!r}"
            )
        return tuple(prompts)

    @staticmethod
    def _check_mask(mask: object) -> None:
        if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.numel():
            got = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"Reference.mask must be a tensor [h, w], got {got}")
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError("Reference.mask must lie in [0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data; pictures, latents and masks are not settings."""
        return {
            "prompt": self.prompt,
            "weight": float(self.weight),
            "layers": plain(self.layers),
            "steps": list(self.steps),
            **({} if self.prompts is None else {"prompts": list(self.prompts)}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reference:
        """The reverse of `to_dict`.

        Raises:
            ValueError: unknown keys.
        """
        known = ("prompt", "weight", "layers", "steps", "prompts")
        unknown = sorted(set(data) - set(known)) if isinstance(data, Mapping) else [repr(data)]
        if unknown:
            raise ValueError(
                f"Reference has no setting {', '.join(map(str, unknown))}; it has"
                f" {', '.join(known)}"
            )
        return cls(**data)


def plain(layers: Layers) -> Any:
    """A layer choice as lists and dictionaries."""
    if isinstance(layers, Mapping):
        return {str(k): plain(v) for k, v in layers.items()}
    return [plain(x) for x in layers] if isinstance(layers, (list, tuple)) else layers


@dataclass(frozen=True, eq=False)
class StyleBank:
    """References made ready once, for any number of prompts: their latents at every noise level,
    and their prompts.

    The latents are at the scale that the UNet sees, so that one bank serves every scheduler.

    Args:
        latents: [R, N + 1, C, h, w], from z_T to z_0.
        timesteps: [N], descending; latents[:, i] has the noise level of timesteps[i].
        conditions: what the denoiser is told for each reference: "prompt_embeds",
            "negative_prompt_embeds" [R, tokens, width]; for SDXL also "text_embeds",
            "negative_text_embeds" [R, width], "time_ids" [R, 6].
        references: weights, layers, steps and masks, one per row.
        offset: the first steps show the reference as it is `offset` steps later: step 0 sees
            latents[offset], step i sees latents[max(offset + 1, i)]. 0: every step sees its own
            noise level. StyleAligned transfers with 5.
        fingerprint: content address (SHA-256) of everything that went in; "" where unknown.
        metadata: further facts, JSON-ready.

    Raises:
        ValueError: parts that do not belong together; all reasons at once.

    Source: StyleAligned, arXiv 2312.02133, transfer from a real image.
    """

    latents: Tensor = field(repr=False)
    timesteps: Tensor = field(repr=False)
    conditions: Mapping[str, Tensor] = field(repr=False)
    references: tuple[Reference, ...] = (Reference(),)
    offset: int = 0
    fingerprint: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reasons = []
        count, steps = len(self.references), self.timesteps.numel()
        if self.latents.ndim != 5 or self.latents.shape[:2] != (count, steps + 1):
            reasons.append(
                f"latents are {list(self.latents.shape)}; {count} references and {steps} timesteps"
                " need"
                f" [{count}, {steps + 1}, C, h, w]"
            )
        elif not bool(torch.isfinite(self.latents).all()):
            reasons.append("latents are not finite")
        if (
            self.timesteps.ndim != 1
            or not steps
            or bool((self.timesteps.double().diff() >= 0).any())
        ):
            reasons.append("timesteps must be [N] and descend")
        if (
            isinstance(self.offset, bool)
            or not isinstance(self.offset, int)
            or not 0 <= self.offset < max(steps, 1)
        ):
            reasons.append(f"offset must be one of 0..{steps - 1}, got {self.offset!r}")
        reasons += [
            f"conditions[{name!r}] must start with {count} rows, got {list(x.shape)}"
            for name, x in self.conditions.items()
            if not x.ndim or x.shape[0] != count
        ]
        reasons += [
            f"unknown condition {name!r}" for name in self.conditions if name not in _CONDITIONS
        ]
        missing = [n for n in _CONDITIONS[:2] if n not in self.conditions]
        if missing:
            reasons.append(f"conditions lack {', '.join(missing)}")
        if reasons:
            raise ValueError("StyleBank: " + "; ".join(reasons))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.latents, self.timesteps, *self.conditions.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    @cached_property
    def inputs(self) -> Tensor:
        """[R, N, C, h, w]: what the denoiser sees of every reference at every timestep, `offset`
        applied."""
        last = self.timesteps.numel()
        shown = [
            i if not self.offset else max(self.offset + 1, i) if i else self.offset
            for i in range(last)
        ]
        return self.latents[:, shown]

    def with_offset(self, offset: int) -> StyleBank:
        """The same bank with another offset."""
        return replace(self, offset=offset)

    def with_references(self, references: Sequence[Reference]) -> StyleBank:
        """The same bank with other weights, masks, layers or steps.

        Raises:
            ValueError: another number of references.
        """
        return replace(self, references=tuple(references))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        from styleattn.inversion.files import save_tensors

        masks = {f"mask.{i}": r.mask for i, r in enumerate(self.references) if r.mask is not None}
        conditions = {f"condition.{name}": x for name, x in self.conditions.items()}
        tensors = {"latents": self.latents, "timesteps": self.timesteps, **conditions, **masks}
        metadata = {
            "version": VERSION,
            "references": [r.to_dict() for r in self.references],
            "offset": self.offset,
            "fingerprint": self.fingerprint,
            "metadata": dict(self.metadata),
        }
        save_tensors(path, tensors, KIND, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StyleBank:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            FileRefused: the file is truncated, foreign, of another version, or its parts do not fit
                (a ValueError).
        """
        from styleattn.inversion.files import FileRefused, load_tensors

        tensors, metadata = load_tensors(path, KIND)
        version = metadata.get("version")
        if version != VERSION:
            raise FileRefused(
                f"{os.fspath(path)}: bank of version {version!r}, this package reads {VERSION}"
            )
        try:
            settings: Any = metadata["references"]
            references = tuple(
                replace(Reference.from_dict(s), mask=tensors.get(f"mask.{i}"))
                for i, s in enumerate(settings)
            )
            conditions = {
                n.removeprefix("condition."): x
                for n, x in tensors.items()
                if n.startswith("condition.")
            }
            rest: dict[str, Any] = {
                name: metadata[name] for name in ("offset", "fingerprint", "metadata")
            }
            return cls(tensors["latents"], tensors["timesteps"], conditions, references, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise FileRefused(
                f"{os.fspath(path)}: the parts of the bank do not fit: {error}"
            ) from error
