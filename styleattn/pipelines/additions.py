"""What a user adds to a model: LoRAs and words of textual inversion, by diffusers' own loaders."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from styleattn.adapters._files import read_tensors

_PARTS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_2", "tokenizer_2"),
}
"""The encoders that a file of textual inversion names."""


class AdditionRefused(ValueError):
    """A LoRA or a textual inversion that a model cannot take; one line says why."""


@dataclass(frozen=True)
class Lora:
    """A LoRA and its weight."""

    file: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:weight``.

        Raises:
            AdditionRefused: a weight that is not finite.
        """
        file, colon, weight = text.rpartition(":")
        try:
            found = cls(file, float(weight)) if colon and file else cls(text)
        except ValueError:  # a colon of the path
            found = cls(text)
        if not math.isfinite(found.weight):
            raise AdditionRefused(f"LoRA {text}: the weight must be finite")
        return found

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {"file": self.file, "weight": self.weight, "sha256": file_digest(self.file)}


@dataclass(frozen=True)
class Word:
    """A file of textual inversion and the word that stands for it in prompts."""

    file: str
    word: str

    @classmethod
    def parse(cls, text: str) -> Word:
        """``FILE:word``.

        Raises:
            AdditionRefused: no word.
        """
        file, _, word = text.rpartition(":")
        if not file or not word.strip() or any(c in word for c in "/\\ "):
            raise AdditionRefused(f"textual inversion takes FILE:word, got {text!r}")
        return cls(file, word)

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {"file": self.file, "word": self.word, "sha256": file_digest(self.file)}


def add_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load LoRAs and set their weights; nothing is downloaded.

    Raises:
        FileNotFoundError: no such file.
        AdditionRefused: a file that is no LoRA, or fits nothing in the model; or no peft.
    """
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        path = _file(lora.file)
        with _refused(f"LoRA {lora.file}"), _warnings():
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True
            )
            if not any(name in found for found in pipe.get_list_adapters().values()):
                raise ValueError(f"nothing in it fits a {type(pipe).__name__}")
    if names:
        pipe.set_adapters(names, [lora.weight for lora in loras])


def add_words(pipe: Any, words: Sequence[Word]) -> None:
    """Teach the text encoders words; a file with several encoders' embeddings goes to each.

    Raises:
        FileNotFoundError: no such file.
        AdditionRefused: a file of another model, or a word that there is already.
    """
    for word in words:
        path = _file(word.file)
        with _refused(f"textual inversion {word.file}"):
            tensors = read_tensors(path)
            if set(tensors) & set(_PARTS):
                given = [(x, *_PARTS[part]) for part, x in tensors.items()]
            elif len(tensors) == 1:
                given = [(x, *_PARTS["clip_l"]) for x in tensors.values()]
            else:
                raise ValueError(f"one tensor, or some of {', '.join(_PARTS)}, belong in it")
            for x, encoder, tokenizer in given:
                pipe.load_textual_inversion(
                    x,
                    token=word.word,
                    text_encoder=getattr(pipe, encoder),
                    tokenizer=getattr(pipe, tokenizer),
                )


def file_digest(path: Any) -> str | None:
    """A name for what is in a file, or in a folder's files; None for what is no path."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    place = Path(path)
    files = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    facts = [(file.resolve(), file.stat()) for file in files]
    return _digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in facts))


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 over files, read once for a size and time of change."""
    total = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                total.update(part)
    return total.hexdigest()


def _file(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {name}")
    return path.resolve()


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Within: whatever three libraries raise becomes one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise AdditionRefused(f"cannot load {what}: {text[:300]}") from error


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Within: diffusers says which keys it leaves out, even where the rest of loading is hushed."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        yield
    finally:
        logging.set_verbosity(level)
