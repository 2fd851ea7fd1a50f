"""A deterministic generator of small drawings whose content and style are known.

A drawing is 32 x 32 RGB. Its *content* is one of `CONTENTS`: a shape, or a small scene with a strip
of ground or water. Its *style* is a texture, a palette and an edge treatment: the texture covers
background and object alike, the background in the two ground colours of the palette and the object
in its two figure colours, and the edge is a line around the object (or none).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

SIZE = 32
_OVERSAMPLING = 4

CONTENTS = ("star", "ring", "cross", "heart", "moon", "house", "tree", "boat")
TEXTURES = ("plain", "rows", "columns", "diagonal", "checker", "dots")
EDGES = ("bare", "inked", "glowing")
PALETTES = ("ember", "ocean", "forest", "candy", "mono", "desert")


@dataclass(frozen=True)
class Palette:
    """Five RGB colours (0..255): two of the ground, two of the figure, and the lines of the `inked`
    and `glowing` edges."""

    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    figure: tuple[tuple[int, int, int], tuple[int, int, int]]
    ink: tuple[int, int, int]
    glow: tuple[int, int, int]


PALETTE_COLOURS = {
    "ember": Palette(
        ((110, 20, 35), (55, 5, 20)), ((255, 170, 30), (235, 100, 20)), (20, 0, 5), (255, 240, 190)
    ),
    "ocean": Palette(
        ((30, 90, 190), (10, 45, 125)),
        ((130, 235, 240), (60, 185, 210)),
        (0, 10, 50),
        (240, 255, 255),
    ),
    "forest": Palette(
        ((40, 110, 50), (15, 65, 35)),
        ((225, 235, 110), (165, 200, 60)),
        (5, 30, 10),
        (255, 255, 225),
    ),
    "candy": Palette(
        ((255, 190, 220), (245, 140, 190)),
        ((160, 40, 170), (100, 15, 125)),
        (50, 0, 65),
        (255, 250, 255),
    ),
    "mono": Palette(
        ((235, 235, 235), (180, 180, 180)), ((95, 95, 95), (40, 40, 40)), (0, 0, 0), (255, 255, 255)
    ),
    "desert": Palette(
        ((245, 215, 150), (220, 175, 100)),
        ((30, 140, 140), (10, 90, 100)),
        (70, 30, 10),
        (255, 250, 230),
    ),
}


@dataclass(frozen=True)
class Style:
    """What a drawing looks like, whatever it shows."""

    texture: str
    palette: str
    edge: str = "bare"

    def __post_init__(self) -> None:
        for value, known, field in (
            (self.texture, TEXTURES, "texture"),
            (self.palette, PALETTES, "palette"),
            (self.edge, EDGES, "edge"),
        ):
            if value not in known:
                raise ValueError(f"Style: {field} {value!r} is not one of {', '.join(known)}")


STYLES = tuple(Style(*names) for names in product(TEXTURES, PALETTES, EDGES))


def style_of(name: Style | str) -> Style:
    """A style from its words, "checker ocean inked" (the edge may be left out), or the style
    itself."""
    if isinstance(name, Style):
        return name
    words = name.replace(",", " ").split()
    if not 2 <= len(words) <= 3:
        raise ValueError(
            f"style {name!r}: expected 'texture palette [edge]', for example 'checker ocean inked'"
        )
    return Style(*words)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    fold = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fold) % (2 * fold) - fold)
    px, py = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    ax, ay = 1.1, 0.0
    bx, by = 0.48 * np.cos(fold), 0.48 * np.sin(fold)
    return (bx - ax) * (py - ay) - (by - ay) * (px - ax) > 0


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    u, v = x * 1.2, -y * 1.2 + 0.1
    return (u * u + v * v - 1) ** 3 - u * u * v**3 < 0


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y + 0.2) > 0.82)


def _house(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    body = (np.abs(x) < 0.72) & (y > -0.15)
    roof = (y > -1.05) & (y <= -0.15) & (np.abs(x) < (y + 1.05) * 1.15)
    door = (np.abs(x) < 0.24) & (y > 0.25)
    return ((body | roof) & ~door) | (y > 0.9)


def _tree(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    crown = np.hypot(x, y + 0.4) < 0.66
    trunk = (np.abs(x) < 0.17) & (y > 0)
    return crown | trunk | (y > 0.9)


def _boat(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    hull = (y > 0.25) & (y < 0.7) & (np.abs(x) < 1.05 - (y - 0.25) * 0.9)
    mast = (np.abs(x + 0.1) < 0.09) & (y > -1.05) & (y < 0.3)
    sail = (x > 0.1) & (y < 0.1) & (y > -1.0) & (x < 0.1 + (y + 1.0) * 0.75)
    return hull | mast | sail | (y > 0.88)


_SHAPES = {
    "star": _star,
    "ring": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.52),
    "cross": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) < 0.34) & (np.maximum(np.abs(x), np.abs(y)) < 1)
    ),
    "heart": _heart,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "boat": _boat,
}


def _grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask and all within `radius` cells of it, along both axes."""
    for axis in (0, 1):
        padded = np.pad(
            mask, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge"
        )
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        mask = np.asarray(windows.any(-1))
    return mask


def _cover(mask: np.ndarray) -> np.ndarray:
    """How much of each pixel a mask on the finer grid covers, [SIZE, SIZE, 1] in 0..1."""
    step = _OVERSAMPLING
    return mask.reshape(SIZE, step, SIZE, step).mean((1, 3), dtype=np.float32)[..., None]


def _texture(name: str) -> np.ndarray:
    """Which of the two colours each pixel has, [SIZE, SIZE, 1] in {0, 1}; every texture repeats
    after 4 pixels."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    first = {
        "plain": np.ones_like(x, bool),
        "rows": y % 4 < 2,
        "columns": x % 4 < 2,
        "diagonal": (x + y) % 4 < 2,
        "checker": (x // 2 + y // 2) % 2 == 0,
        "dots": ~((x % 4 // 2 == 1) & (y % 4 // 2 == 1)),
    }[name]
    return first[..., None].astype(np.float32)


TEXTURE_MAPS = {name: _texture(name) for name in TEXTURES}
_FINE = (np.arange(SIZE * _OVERSAMPLING, dtype=np.float32) + 0.5) / _OVERSAMPLING


def draw(content: str, style: Style | str, rng: np.random.Generator) -> np.ndarray:
    """One drawing, uint8 [32, 32, 3]; `rng` moves and scales the object and varies the colours by a
    few levels.

    Raises:
        ValueError: the content or a word of the style is not known.
    """
    if content not in _SHAPES:
        raise ValueError(f"draw: content {content!r} is not one of {', '.join(CONTENTS)}")
    style = style_of(style)
    radius = rng.uniform(10.5, 12.5)
    centre_x, centre_y = 16 + rng.uniform(-2, 2, 2)
    x, y = np.meshgrid((_FINE - centre_x) / radius, (_FINE - centre_y) / radius)
    mask = _SHAPES[content](x, y)
    palette = PALETTE_COLOURS[style.palette]
    colours = np.array(
        [*palette.ground, *palette.figure, palette.ink, palette.glow], np.float32
    ) + rng.uniform(-5, 5, (6, 3))
    first = TEXTURE_MAPS[style.texture]
    ground = first * colours[0] + (1 - first) * colours[1]
    figure = first * colours[2] + (1 - first) * colours[3]
    covered = _cover(mask)
    picture = ground * (1 - covered) + figure * covered
    if style.edge != "bare":
        line = _cover(_grow(mask, 5) & ~mask)
        picture = picture * (1 - line) + colours[4 if style.edge == "inked" else 5] * line
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
