"""A trajectory: the latents of one picture at every noise level that a sampler visits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .files import FileRefused, load_tensors, save_tensors

KIND = "styleattn.trajectory"
VERSION = 1
METHODS = (
    *("ddim", "sample", "renoise", "belm", "noised"),
    *("euler", "rf_solver", "rf_inversion"),
)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Latents from noise to data, at the scale that the denoiser sees: x = √ᾱ·x0 + √(1-ᾱ)·ε,
    whatever the scheduler; of a flow model x = (1-s)·x0 + s·ε.

    Args:
        latents: [N + 1, C, h, w] fp32 on the CPU; ``latents[0]`` is z_T, ``latents[N]`` the clean
            z_0.
        timesteps: [N] int64, descending; ``latents[i]`` has the noise level of ``timesteps[i]``.
            Of a flow model fp64, 1000·s.
        alphas: [N + 1] fp64, ᾱ of every latent; of a flow model 1-s.
        prompt: what the picture shows, as told to the model.
        guidance_scale: of classifier-free guidance along the trajectory.
        height, width: of the picture, in pixels.
        labels: "paper", "consistent" or "style_id"
            (:func:`styleattn.inversion.ddim.inversion_plan`); "flow" of a flow model.
        method: "ddim", "renoise" or "belm", inverted from a picture, on a flow model "euler",
            "rf_solver" or "rf_inversion"; "noised", a picture under fresh noise of every level; or
            "sample", sampled from noise and recorded.
        fingerprint: of the denoiser that made it (:func:`styleattn.inversion.fingerprint`).
        round_trip_error: ‖z_0' - z_0‖ / ‖z_0‖ after sampling back from z_T, where it was measured.

    Raises:
        ValueError: shapes or values that do not belong together.
    """

    latents: Tensor = field(repr=False)
    timesteps: Tensor = field(repr=False)
    alphas: Tensor = field(repr=False)
    prompt: str
    guidance_scale: float
    height: int
    width: int
    labels: str = "paper"
    method: str = "ddim"
    fingerprint: str = ""
    round_trip_error: float | None = None

    def __post_init__(self) -> None:
        reasons = []
        count = self.timesteps.numel()
        if self.latents.ndim != 4 or self.latents.shape[0] != count + 1:
            reasons.append(
                f"latents are {list(self.latents.shape)}, "
                f"{count} timesteps need [{count + 1}, C, h, w]"
            )
        elif not bool(torch.isfinite(self.latents).all()):
            reasons.append("latents are not finite")
        if self.timesteps.ndim != 1 or count == 0 or bool((self.timesteps.diff() >= 0).any()):
            reasons.append("timesteps must be [N] and descend")
        if self.alphas.shape != (count + 1,):
            reasons.append(f"alphas must be [{count + 1}], got {list(self.alphas.shape)}")
        if self.method not in METHODS:
            reasons.append(f"method must be one of {METHODS}, got {self.method!r}")
        if reasons:
            raise ValueError("Trajectory: " + "; ".join(reasons))

    def __len__(self) -> int:
        """The number of steps, N."""
        return self.timesteps.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the latents."""
        return self.latents.numel() * self.latents.element_size()

    def step_of(self, timestep: float) -> int:
        """The index of the timestep nearest to ``timestep`` (of two, the noisier one)."""
        return int((self.timesteps.double() - float(timestep)).abs().argmin())

    def reference_index(self, step: int, offset: int = 0) -> int:
        """Which latent stands in for the reference when the sampler is at ``step``.

        0 <= step: index(0) = offset, index(i) = max(offset + 1, i). With offset 0 every latent has
        the noise level of its step; StyleAligned's transfer uses 5, so that the reference is
        cleaner than its label in the first six steps.

        Source: StyleAligned (arXiv 2312.02133), transfer from a real picture.
        """
        if offset == 0:
            return min(step, len(self))
        return min(offset if step == 0 else max(offset + 1, step), len(self))

    def reference_table(self, train_timesteps: int = 1000, offset: int = 0) -> Tensor:
        """:meth:`reference_index` for every training timestep: int64 [train_timesteps], to be
        looked up with a tensor."""
        indices = [self.reference_index(self.step_of(t), offset) for t in range(train_timesteps)]
        return torch.tensor(indices, dtype=torch.int64)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and everything else as JSON-ready values: what :meth:`from_parts` takes."""
        names = ("latents", "timesteps", "alphas")
        tensors = {name: getattr(self, name) for name in names}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in names}
        return tensors, {"version": VERSION, **rest}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Trajectory:
        """Rebuild a trajectory from :meth:`to_parts`.

        Raises:
            FileRefused: another version, missing parts, or parts that do not belong together.
        """
        rest: dict[str, Any] = dict(metadata)
        version = rest.pop("version", None)
        if version != VERSION:
            raise FileRefused(
                f"trajectory of version {version!r}, this package reads version {VERSION}"
            )
        try:
            return cls(**{**tensors, **rest})
        except (TypeError, ValueError, AttributeError) as error:
            raise FileRefused(f"the parts of the trajectory do not fit: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: whole or not at all."""
        tensors, metadata = self.to_parts()
        save_tensors(path, tensors, KIND, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: there is no such file.
            FileRefused: the file is truncated, foreign, or of another version.
        """
        tensors, metadata = load_tensors(path, KIND)
        try:
            return cls.from_parts(tensors, metadata)
        except FileRefused as error:
            raise FileRefused(f"{os.fspath(path)}: {error}") from error

    def with_round_trip_error(self, error: float) -> Trajectory:
        """The same trajectory with its round-trip error noted."""
        return replace(self, round_trip_error=error)

    def summary(self) -> dict[str, Any]:
        """What a person wants to know, JSON-ready."""
        _, rest = self.to_parts()
        return {
            **rest,
            "steps": len(self),
            "shape": list(self.latents.shape),
            "nbytes": self.nbytes,
        }
