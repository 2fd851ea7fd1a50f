"""Features that were kept in place of rows: what a method reads of its references, by layer and
timestep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion.files import FileRefused, load_tensors
from styleattn.methods._base import Features
from styleattn.references import Reference, StyleBank

from ._caller import Caller
from ._rows import RowMaker

KIND, STEP = "styleattn.features", "styleattn.features-step"
MANIFEST = "features.safetensors"
PARTS = ("query", "key", "value")
Step = Mapping[str, Tensor]


@dataclass(frozen=True)
class FeatureCache:
    """What a method reads of its references at every layer and timestep, made once by
    `cache_features` and given to `apply` as its bank: the references take no rows of the batch.

    Eager only: a compiled model works with rows.

    Args:
        timesteps: [N], descending.
        references: weights, layers, steps and masks, as the bank's.
        facts: what it was made of: "model", "method", "layers", "size", "chunks" (whether the first
            of two is the unconditional one), "bank".
        steps: for every timestep the features [chunks, H, N, D] by "layer|part"; or the folder that
            has them.

    Source: Chung et al., StyleID, arXiv 2312.09008, whose code keeps features.
    """

    timesteps: Tensor = field(repr=False)
    references: tuple[Reference, ...]
    facts: Mapping[str, Any]
    steps: tuple[Step, ...] | Path = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        count = len(self.timesteps)
        if isinstance(self.steps, Path):
            return sum((self.steps / file_of(i)).stat().st_size for i in range(count))
        return sum(x.numel() * x.element_size() for step in self.steps for x in step.values())

    def step(self, index: int) -> Step:
        """The features of a timestep, where they are kept.

        Raises:
            FileNotFoundError, FileRefused: a file of a folder is gone or damaged.
        """
        if isinstance(self.steps, Path):
            return load_tensors(self.steps / file_of(index), STEP)[0]
        return self.steps[index]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FeatureCache:
        """The cache in a folder of `cache_features`; features are read step by step, when needed.
        Masks of references are not in it: `cache_features` or the method bring them.

        Raises:
            FileNotFoundError: there is none, or steps are missing.
            FileRefused: it is damaged or foreign.
        """
        path = Path(folder)
        tensors, facts = load_tensors(path / MANIFEST, KIND)
        given: Any = facts.pop("references", None)
        if not isinstance(given, list) or "timesteps" not in tensors:
            raise FileRefused(f"{path} is no cache of features")
        timesteps = tensors["timesteps"]
        gone = [n for n in map(file_of, range(len(timesteps))) if not (path / n).is_file()]
        if gone:
            raise FileNotFoundError(f"{path}: the cache lacks {', '.join(gone)}")
        return cls(timesteps, tuple(Reference.from_dict(r) for r in given), facts, path)

    def check(self, network: str, layers: Mapping[str, Sequence[str]]) -> None:
        """Refuse a model or methods that it was not made for.

        Args:
            network: the model's fingerprint.
            layers: those of every method, by its name.

        Raises:
            ValueError: all reasons at once.
        """
        reasons = []
        if self.facts["model"] != network:
            reasons.append("they are of another model, or of other weights of this one")
        for name, chosen in layers.items():
            lacking = [n for n in chosen if n not in self.facts["layers"]]
            if name != self.facts["method"]:
                reasons.append(f"they are for {self.facts['method']}, not {name}")
            elif lacking:
                reasons.append(f"{', '.join(lacking[:3])} of {len(chosen)} layers have none")
        if reasons:
            raise ValueError("the features do not fit: " + "; ".join(reasons))


class FeatureRows:
    """Stands where a bank's rows would be added: adds none, and knows which features a call reads.

    Args:
        cache: the features.
    """

    count = 0

    def __init__(self, cache: FeatureCache):
        self.cache = cache
        self.labels = [float(t) for t in cache.timesteps]
        self._chunks: list[int] = []
        self._each = 0
        self._index = -1
        self._step: Step = {}

    def add(self, inputs: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """The arguments as they are.

        Raises:
            ValueError: a call that the features do not fit; all reasons at once.
            RuntimeError: under a compiler.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError("styleattn: features that are kept need an eager model; use a bank")
        facts, sample = self.cache.facts, inputs["sample"]
        reasons = []
        size = list(sample.shape[1:])
        if size != facts["size"]:
            reasons.append(f"latents are {size}, they were {facts['size']}")
        timestep = float(torch.as_tensor(inputs["timestep"]).reshape(-1)[0])
        near = min(range(len(self.labels)), key=lambda i: abs(self.labels[i] - timestep))
        if abs(self.labels[near] - timestep) > 0.5:
            reasons.append(
                f"there are none of timestep {timestep:g}; they were made for a run of"
                f" {len(self.labels)} steps"
            )
        kept = list(facts["chunks"])
        if any(chunk not in kept for chunk in caller.unconditional):
            reasons.append("unconditional rows have none: make them with guided=True")
        if reasons:
            raise ValueError("styleattn: the features do not fit this call: " + "; ".join(reasons))
        if near != self._index:
            self._index, self._step = near, self.cache.step(near)
        self._chunks = [kept.index(chunk) for chunk in caller.unconditional]
        self._each = sample.shape[0] // caller.chunks
        return dict(inputs)

    def strip(self, output: Any, chunks: int) -> Any:
        """The UNet's output as it is."""
        return output

    def features(self, layer: str, like: Tensor) -> Features:
        """What a layer reads, where its query is; and for every row its chunk there."""
        parts = {
            part: self._step[f"{layer}|{part}"].to(like.device, like.dtype, non_blocking=True)
            for part in PARTS
        }
        rows = [chunk for chunk in self._chunks for _ in range(self._each)]
        return Features(**parts, rows=torch.tensor(rows))


def maker(bank: StyleBank | FeatureCache, control_reference: bool) -> RowMaker | FeatureRows:
    """What brings the references of a bank into a call."""
    if isinstance(bank, FeatureCache):
        return FeatureRows(bank)
    return RowMaker(bank, control_reference)


def file_of(index: int) -> str:
    """The file of a timestep."""
    return f"step-{index:04d}.safetensors"
