"""Features kept instead of rows: a method's references run through the UNet once, not in every
batch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion.files import save_tensors
from styleattn.inversion.host import device_of, fingerprint
from styleattn.references import Reference, StyleBank

from . import paused
from ._attention import FUSED, project
from ._controller import _put
from ._features import KIND, MANIFEST, PARTS, STEP, FeatureCache, file_of
from .unet import layers_of

PLACES = ("memory", "pinned")

__all__ = ["PLACES", "FeatureCache", "cache_features"]


def cache_features(
    pipe: Any,
    method: Any,
    bank: StyleBank,
    *,
    place: str | os.PathLike[str] = "memory",
    guided: bool = False,
    callback: Callable[[int, int], object] | None = None,
) -> FeatureCache:
    """Run a bank's references alone through the UNet, and keep what a method reads of them.

    Args:
        pipe: a pipeline of the Stable Diffusion 1, 2 or XL family; a style on it rests meanwhile.
        method: one that reads features (`StyleID`); its layers are kept.
        bank: of its references.
        place: "memory"; "pinned", memory from which a GPU reads without waiting; or a folder, whose
            files are read step by step. A folder that has the same cache is used as it is.
        guided: also keep what unconditional rows read, for runs with guidance.
        callback: called with (steps done, steps).

    Raises:
        TypeError: a method that reads no features.
        ValueError: a bank of another number of references; a folder with something else in it.
        RuntimeError: "pinned" without a GPU.
    """
    roles = getattr(method, "CACHED", None)
    if roles is None:
        raise TypeError(f"cache_features: {method.name} reads rows of the batch, not features")
    if len(bank.references) != len(method.ROLES):
        raise ValueError(
            f"cache_features: {method.name} needs a bank of {len(method.ROLES)} references"
            f" ({', '.join(method.ROLES)}), got {len(bank.references)}"
        )
    facts = facts_of(pipe, method, bank, guided)
    references = tuple(method.references or bank.references)
    if place in PLACES:
        if place == "pinned" and not torch.cuda.is_available():
            raise RuntimeError("cache_features: pinned memory needs a GPU")
        made = _features(pipe, method, bank, guided, callback)
        pinned = place == "pinned"
        steps = tuple({k: x.pin_memory() if pinned else x for k, x in s.items()} for s in made)
        return FeatureCache(bank.timesteps, references, facts, steps)
    folder = Path(place)
    if folder.exists():
        found = FeatureCache.load(folder)
        if dict(found.facts) != facts:
            raise ValueError(
                f"cache_features: {folder} has features of another model, method, bank, size or"
                " number of steps; delete it, or name another folder"
            )
        return replace(found, references=references)
    _write(folder, references, facts, bank, _features(pipe, method, bank, guided, callback))
    return replace(FeatureCache.load(folder), references=references)


class _Recorder:
    """A processor that notes query, key and value, and does what the one before it did."""

    def __init__(self, base: Any, note: Callable[[Tensor, Tensor, Tensor], None]):
        self.base, self.note = base, note

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        self.note(*project(attn, hidden_states, temb, isinstance(self.base, FUSED))[1:])
        out: Tensor = self.base(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out


def _features(
    pipe: Any,
    method: Any,
    bank: StyleBank,
    guided: bool,
    callback: Callable[[int, int], object] | None,
) -> Iterator[dict[str, Tensor]]:
    """The features of every timestep: one UNet call for each chunk."""
    unet, device = pipe.unet, device_of(pipe)
    layers = layers_of(unet, method)
    noted: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        def record(*parts: Tensor) -> None:
            for part, x in zip(PARTS, parts, strict=True):
                row = method.CACHED[part]
                noted.setdefault(f"{name}|{part}", []).append(x[row].cpu())

        return record

    inputs = bank.inputs.to(device, unet.dtype)
    with paused(pipe), torch.no_grad():
        for i, timestep in enumerate(bank.timesteps):
            noted.clear()
            with _recording({attn: note(name) for name, attn in layers.items()}):
                for unconditional in _chunks(guided):
                    told = _conditions(bank, unconditional, unet, device)
                    unet(inputs[:, i], timestep.to(device), **told)
            yield {name: torch.stack(parts) for name, parts in noted.items()}
            if callback is not None:
                callback(i + 1, len(bank.timesteps))


@contextmanager
def _recording(notes: Mapping[Any, Callable[[Tensor, Tensor, Tensor], None]]) -> Iterator[None]:
    before = {attn: attn.processor for attn in notes}
    try:
        for attn, note in notes.items():
            _put(attn, _Recorder(before[attn], note))
        yield
    finally:
        for attn, processor in before.items():
            _put(attn, processor)


def _conditions(
    bank: StyleBank, unconditional: bool, unet: Any, device: torch.device
) -> dict[str, Any]:
    def told(name: str) -> Tensor:
        return bank.conditions[name].to(device, unet.dtype)

    prefix = "negative_" if unconditional else ""
    added = None
    if "time_ids" in bank.conditions:
        added = {"text_embeds": told(f"{prefix}text_embeds"), "time_ids": told("time_ids")}
    return {"encoder_hidden_states": told(f"{prefix}prompt_embeds"), "added_cond_kwargs": added}


def _chunks(guided: bool) -> list[bool]:
    """The kinds of chunks that are kept: whether each is unconditional."""
    return [True, False] if guided else [False]


def facts_of(pipe: Any, method: Any, bank: StyleBank, guided: bool) -> dict[str, Any]:
    """What features depend on, the numbers of a bank without a fingerprint apart; JSON-ready."""
    return {
        "model": fingerprint(pipe.unet),
        "method": method.name,
        "layers": list(layers_of(pipe.unet, method)),
        "size": list(bank.latents.shape[2:]),
        "chunks": _chunks(guided),
        "bank": bank.fingerprint,
        "timesteps": [int(t) for t in bank.timesteps],
        "offset": bank.offset,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }


def _write(
    folder: Path,
    references: Sequence[Reference],
    facts: Mapping[str, Any],
    bank: StyleBank,
    made: Iterator[dict[str, Tensor]],
) -> None:
    """A folder that is there whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        for i, step in enumerate(made):
            save_tensors(beside / file_of(i), step, STEP, {})
        header = {**facts, "references": [r.to_dict() for r in references]}
        save_tensors(beside / MANIFEST, {"timesteps": bank.timesteps}, KIND, header)
        beside.chmod(0o755)
        os.rename(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
