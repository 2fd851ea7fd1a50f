"""What a 32 x 32 picture shows and in which style: the measure of stylization on the embedded
models.

Texture and palette are read with plain statistics of the pixels; content and edge with a small
classifier trained on drawings (`styleattn.tiny.classifier`). Both are validated on drawings that
were not used to make them (`validate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .drawings import (
    CONTENTS,
    EDGES,
    PALETTE_COLOURS,
    SIZE,
    STYLES,
    TEXTURE_MAPS,
    TEXTURES,
    Style,
    draw,
)

CELL = 4
# A cell counts as textured above this standard deviation of its colours (levels of 0..255), and
# speaks for a texture only if the
# texture explains this share of its variance.
_FLAT_DEVIATION = 6.0
_EXPLAINED = 0.7
# A palette is recognised only if the pixels lie, on average, within this distance (levels) of its
# colours.
_PALETTE_DISTANCE = 40.0


@dataclass(frozen=True)
class Reading:
    """What is seen in one picture; `texture` and `palette` are None where none is clearly there."""

    content: str
    texture: str | None
    palette: str | None
    edge: str

    def matches(self, style: Style | Reading) -> bool:
        """Whether texture and palette are those of the style."""
        return (
            self.texture is not None
            and self.palette is not None
            and (self.texture, self.palette) == (style.texture, style.palette)
        )


def as_array(picture: Any) -> np.ndarray:
    """A PIL picture or an array as uint8 [32, 32, 3].

    Raises:
        ValueError: any other size; the statistics belong to drawings of this size.
    """
    if hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    if array.shape != (SIZE, SIZE, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"measure: a picture must be uint8 [{SIZE}, {SIZE}, 3] (RGB), "
            f"got {array.dtype} {list(array.shape)}"
        )
    return array


def _cells(array: np.ndarray) -> np.ndarray:
    """[S, S, C] -> [cells, 16, C]."""
    count = SIZE // CELL
    return (
        array.reshape(count, CELL, count, CELL, -1)
        .transpose(0, 2, 1, 3, 4)
        .reshape(count * count, CELL * CELL, -1)
    )


_PATTERNS = {name: _cells(TEXTURE_MAPS[name])[0, :, 0] for name in TEXTURES if name != "plain"}


def texture_shares(picture: Any) -> dict[str, float]:
    """The share of the 4 x 4 cells that show each texture; cells with another structure, such as an
    outline, show none.

    A flat cell shows `plain`. Any other cell shows the texture whose 0/1 pattern p explains most of
    the variance of its colours c, `|<p - mean(p), c - mean(c)>|^2 / (|p - mean(p)|^2 |c -
    mean(c)|^2)`, if that is above 0.7.
    """
    cells = _cells(as_array(picture).astype(np.float32))
    deviations = cells - cells.mean(1, keepdims=True)
    energy = np.square(deviations).sum((1, 2))
    flat = energy < _FLAT_DEVIATION**2 * deviations.shape[1] * deviations.shape[2]
    explained = np.empty((len(_PATTERNS), len(cells)))
    for row, pattern in enumerate(_PATTERNS.values()):
        pattern = pattern - pattern.mean()
        projected = np.einsum("p,npc->nc", pattern, deviations)
        explained[row] = (
            np.square(projected).sum(1) / np.square(pattern).sum() / np.maximum(energy, 1e-6)
        )
    best = np.where(explained.max(0) > _EXPLAINED, explained.argmax(0), -1)
    shares = {name: float(np.mean(~flat & (best == row))) for row, name in enumerate(_PATTERNS)}
    return {"plain": float(np.mean(flat)), **shares}


def read_texture(picture: Any) -> str | None:
    """The texture most cells show, or None if it has less than a fifth of the cells or less than
    twice as many as any other."""
    shares = texture_shares(picture)
    first, second, *_ = sorted(shares, key=lambda name: -shares[name])
    return first if shares[first] >= 0.2 and shares[first] >= 2 * shares[second] else None


def palette_distances(picture: Any) -> dict[str, float]:
    """The mean distance (levels, RGB) of the pixels from the colours of each palette, the farthest
    quarter of the pixels left out."""
    pixels = as_array(picture).astype(np.float32).reshape(-1, 3)
    found = {}
    for name, palette in PALETTE_COLOURS.items():
        colours = np.array(
            [*palette.ground, *palette.figure, palette.ink, palette.glow], np.float32
        )
        nearest = np.sqrt(np.square(pixels[:, None] - colours).sum(-1)).min(1)
        found[name] = float(np.sort(nearest)[: len(nearest) * 3 // 4].mean())
    return found


def read_palette(picture: Any) -> str | None:
    """The palette whose colours are nearest, or None if none is within 40 levels."""
    distances = palette_distances(picture)
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= _PALETTE_DISTANCE else None


def read(pictures: Sequence[Any]) -> list[Reading]:
    """Read content and style of pictures (PIL or uint8 [32, 32, 3])."""
    from .classifier import classify

    arrays = [as_array(picture) for picture in pictures]
    if not arrays:
        return []
    contents, edges = classify(np.stack(arrays))
    return [
        Reading(CONTENTS[content], read_texture(array), read_palette(array), EDGES[edge])
        for array, content, edge in zip(arrays, contents, edges, strict=True)
    ]


@dataclass(frozen=True)
class Score:
    """Shares, 0..1, over `count` pictures.

    `style_match`: texture and palette are those of the reference. `content_accuracy`: the content
    is that of the prompt. `leakage`: the content is that of the reference, over the pictures whose
    prompt names another one; `leakage_chance`: the same share if wrong contents were spread evenly
    over the classes.
    """

    count: int
    style_match: float
    texture_match: float
    palette_match: float
    edge_match: float
    content_accuracy: float
    leakage: float
    leakage_chance: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def score(
    pictures: Sequence[Any],
    prompted: Sequence[str],
    styles: Sequence[Style | Reading],
    reference_contents: Sequence[str],
) -> Score:
    """Score pictures made for the contents `prompted` in the styles of references that show
    `reference_contents`, all of one length.

    Raises:
        ValueError: the lengths differ, or there is no picture.
    """
    lengths = {len(pictures), len(prompted), len(styles), len(reference_contents)}
    if len(lengths) != 1 or not pictures:
        raise ValueError(
            "score: expected as many pictures as prompts, styles and reference contents, "
            f"got {sorted(lengths)}"
        )
    seen = read(pictures)
    right = [reading.content == content for reading, content in zip(seen, prompted, strict=True)]
    others = [(r, c) for r, p, c in zip(seen, prompted, reference_contents, strict=True) if p != c]
    wrong = (
        np.mean(
            [
                r.content != p
                for r, p, c in zip(seen, prompted, reference_contents, strict=True)
                if p != c
            ]
        )
        if others
        else 0.0
    )

    def share(field: str) -> float:
        return float(
            np.mean(
                [getattr(r, field) == getattr(s, field) for r, s in zip(seen, styles, strict=True)]
            )
        )

    return Score(
        count=len(seen),
        style_match=float(np.mean([r.matches(s) for r, s in zip(seen, styles, strict=True)])),
        texture_match=share("texture"),
        palette_match=share("palette"),
        edge_match=share("edge"),
        content_accuracy=float(np.mean(right)),
        leakage=float(np.mean([r.content == c for r, c in others])) if others else 0.0,
        leakage_chance=float(wrong) / (len(CONTENTS) - 1),
    )


def validate(count: int = 1000, seed: int = 9) -> dict[str, float]:
    """How often texture, palette, edge, content and whole style (texture and palette) of held-out
    drawings are read rightly."""
    rng = np.random.default_rng([seed, 2])
    contents = [CONTENTS[i] for i in rng.integers(len(CONTENTS), size=count)]
    styles = [STYLES[i] for i in rng.integers(len(STYLES), size=count)]
    found = score(
        [draw(c, s, rng) for c, s in zip(contents, styles, strict=True)], contents, styles, contents
    ).as_dict()
    names = {
        "style_match": "style",
        "texture_match": "texture",
        "palette_match": "palette",
        "edge_match": "edge",
        "content_accuracy": "content",
    }
    return {"count": count, **{short: found[name] for name, short in names.items()}}
