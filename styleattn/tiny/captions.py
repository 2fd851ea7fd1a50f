"""The words of the captions, and the captions of the training drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .drawings import CONTENTS, EDGES, PALETTES, TEXTURES, Style

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"
_ARTICLED = ("a {}", "{}", "a drawing of a {}", "a picture of a {}", "the {}")
_STYLED = ("a {}, {}", "a {} in {}", "{}, {}", "a drawing of a {}, {}", "a drawing of a {} in {}")
_FILLERS = ("a", "the", "of", "in", "drawing", "picture", "and", "on", "with", "style", ",")


def words() -> list[str]:
    """Every word the text encoders were trained on: these are one token each."""
    return [*CONTENTS, *TEXTURES, *PALETTES, *EDGES, *_FILLERS]


def caption(content: str, style: Style, rng: np.random.Generator, styled: float = 0.2) -> str:
    """A caption that names the content, and with probability `styled` the style too."""
    if rng.random() >= styled:
        return _ARTICLED[rng.integers(len(_ARTICLED))].format(content)
    named = " ".join((style.texture, style.palette, style.edge))
    return _STYLED[rng.integers(len(_STYLED))].format(content, named)


def _pairs() -> list[tuple[str, str]]:
    """Byte-pair merges, in order of rank, that make one token of every word."""
    merges: list[tuple[str, str]] = []
    for word in words():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            pieces = _merged(pieces, merge)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    return merges


def _merged(pieces: list[str], merge: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == merge:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def save_tokenizer(folder: Path) -> None:
    """Write the files of a CLIP tokenizer: single bytes, then the merges of `words`; an unknown
    word is spelt in letters.

    `tokenizer.json` is left to `CLIPTokenizer.save_pretrained`; these files load in transformers
    4.57 and later.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = _pairs()
    known = set(tokens)
    for left, right in merges:
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
    tokens += [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), encoding="utf-8"
    )
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def save_word_tokenizer(folder: Path) -> None:
    """Write the files of a T5 tokenizer: one piece for each of `words`, the letters for any other
    word. They load in transformers 4.57 and later."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [word if word == "," else f"▁{word}" for word in words()]
    letters = ["▁", *(c for c in map(chr, range(33, 127)) if c not in pieces)]
    vocabulary = [*specials, *((p, -1.0) for p in pieces), *((c, -10.0) for c in letters)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2))
    space: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": MAX_TOKENS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
