"""The one registry of shapes: what the supported models and methods ask of the operation.

Every shape has a real size, for GPUs, and a CPU size with fewer rows and heads (never another head
dimension, and the same tokens wherever a second per call allows it). Tests use a tiny size.

Kinds: `plain` (self- or cross-attention), `shared` (StyleAligned, rows [reference, targets] in both
halves of classifier-free guidance), `bank` (StyleAligned, every row a target of several stored
references), `injected` (StyleID), `decoupled` (IP-Adapter, CSGO: text and image prompts, each with
a softmax of its own), `biased` (FLUX Redux: log s on the Redux columns of the other rows), `joint`
(DEADiff: text and picture in one softmax; the unconditional row has zeroed tokens) and `null`
(DEADiff's other layers: zeroed tokens in every row).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

KINDS = ("plain", "shared", "bank", "injected", "decoupled", "biased", "joint", "null")
SIZES = ("real", "cpu", "tiny")
LOG2 = math.log(2.0)


@dataclass(frozen=True)
class Problem:
    """One concrete call: what `Shape.at` returns.

    Args:
        batch, heads, length, head_dim: of the query.
        keys: tokens of the keys where they are not the query's own: of the text and of every image
            prompt (`decoupled`, `joint`), of the runs of the joint sequence (`biased`).
        references: stored references (`bank`), halves with a reference each (`shared`), null keys
            (`null`).
        shift: on the reference's logits (`shared`), log s (`biased`).
    """

    name: str
    kind: str
    batch: int
    heads: int
    length: int
    head_dim: int
    keys: tuple[int, ...]
    references: int
    shift: float
    size: str

    @property
    def key_tokens(self) -> int:
        """Keys that a target's query sees, null keys not counted."""
        own = sum(self.keys) or self.length
        if self.kind in ("shared", "bank"):
            own += self.length * (1 if self.kind == "shared" else self.references)
        return own

    @property
    def _per_score(self) -> int:
        """Two multiply-adds of head_dim channels for every score of every head."""
        return 4 * self.heads * self.head_dim

    @property
    def flops_exact(self) -> int:
        """Floating point operations of the two products in the exact algorithm: a reference row
        sees its own keys once, null keys cost nothing."""
        scores = self.batch * self.length * self.key_tokens
        if self.kind == "shared":
            scores -= self.references * self.length * self.length
        return self._per_score * scores

    @property
    def flops_official(self) -> int:
        """The same of the official formulation: references see their keys twice, null keys are
        multiplied."""
        keys = self.key_tokens + (self.references if self.kind == "null" else 0)
        return self._per_score * self.batch * self.length * keys

    def bytes_moved(self, itemsize: int) -> int:
        """Bytes of query, keys, values and output, each once."""
        rows = {"injected": 1}.get(self.kind, self.batch)
        tokens = 2 * self.batch * self.length + 2 * rows * (sum(self.keys) or self.length)
        if self.kind == "bank":
            tokens += 2 * self.references * self.length
        if self.kind == "injected":
            tokens += self.batch * self.length  # the content's query
        return tokens * self.heads * self.head_dim * itemsize


@dataclass(frozen=True)
class Shape:
    """A named shape: (batch, heads, length) for each size. See `Problem` for the rest."""

    name: str
    kind: str
    head_dim: int
    real: tuple[int, int, int]
    cpu: tuple[int, int, int]
    keys: tuple[int, ...] = ()
    references: int = 0
    shift: float = 0.0

    def at(self, size: str) -> Problem:
        """The shape at one of `SIZES`.

        Raises:
            ValueError: no such size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        batch, heads, length = self.real if size == "real" else self.cpu
        problem = Problem(
            self.name,
            self.kind,
            batch,
            heads,
            length,
            self.head_dim,
            self.keys,
            self.references,
            self.shift,
            size,
        )
        return problem if size != "tiny" else _tiny(problem)


def _tiny(p: Problem) -> Problem:
    """The same structure with 4 rows at most, two heads and a few odd tokens."""
    batch = min(p.batch, 4)
    if p.kind == "biased":
        return replace(p, batch=1, heads=2, length=24, keys=(5, 7, 12))
    keys = tuple(min(k, 9 - 2 * i) for i, k in enumerate(p.keys))
    return replace(p, batch=batch, heads=2, length=21, keys=keys)


def _plain() -> list[Shape]:
    shapes = [
        Shape("sdxl-4096", "plain", 64, (2, 10, 4096), (1, 2, 4096)),
        Shape("sdxl-1024", "plain", 64, (2, 20, 1024), (1, 8, 1024)),
        Shape("sd15-4096", "plain", 40, (2, 8, 4096), (1, 2, 4096)),
        Shape("sd15-1024", "plain", 80, (2, 8, 1024), (1, 8, 1024)),
        Shape("sd15-256", "plain", 160, (2, 8, 256), (2, 8, 256)),
        Shape("sd2-4096", "plain", 64, (2, 5, 4096), (1, 1, 4096)),
        Shape("sd2-1024", "plain", 64, (2, 10, 1024), (1, 4, 1024)),
        Shape("sd2-256", "plain", 64, (2, 20, 256), (2, 20, 256)),
        Shape("flux-4608", "plain", 128, (1, 24, 4608), (1, 1, 4608)),
        Shape("sdxl-4096-text", "plain", 64, (2, 10, 4096), (2, 10, 4096), keys=(77,)),
        Shape("flux-pulid", "plain", 128, (1, 16, 4096), (1, 16, 4096), keys=(32,)),
    ]
    for n in (512, 2048, 8192):  # with 1024 and 4096 above: cost against tokens
        heads = max(1, 8192 // n)
        shapes.append(Shape(f"tokens-{n}", "plain", 64, (2, 20, n), (1, min(heads, 8), n)))
    return shapes


def _shared() -> list[Shape]:
    def shape(name: str, d: int, batch: int, heads: int, n: int, cpu: int, shift: float) -> Shape:
        size, small = (batch, heads, n), (batch, cpu, n)
        return Shape(name, "shared", d, size, small, references=2, shift=shift)

    shapes = []
    for suffix, shift in (("", 0.0), ("-shift", LOG2)):
        for batch in (4, 8):
            shapes += [
                shape(f"sdxl-4096-shared-b{batch}{suffix}", 64, batch, 10, 4096, 1, shift),
                shape(f"sdxl-1024-shared-b{batch}{suffix}", 64, batch, 20, 1024, 4, shift),
            ]
        shapes += [
            shape(f"sd15-4096-shared-b4{suffix}", 40, 4, 8, 4096, 1, shift),
            shape(f"sd15-1024-shared-b4{suffix}", 80, 4, 8, 1024, 4, shift),
            shape(f"sd15-256-shared-b4{suffix}", 160, 4, 8, 256, 8, shift),
        ]
    for batch in (2, 16):  # with 4 and 8 above: cost against batch
        shapes.append(shape(f"sdxl-1024-shared-b{batch}", 64, batch, 20, 1024, 4, 0.0))
    shapes.append(shape("flux-4608-shared-b4", 128, 4, 24, 4608, 1, 0.0))
    return shapes


def _banks() -> list[Shape]:
    shapes = []
    for count in (1, 2, 3, 4):
        for n, heads, cpu in ((4096, 10, 1), (1024, 20, 4)):
            name = f"sdxl-{n}-references-{count}"
            shapes.append(Shape(name, "bank", 64, (2, heads, n), (2, cpu, n), references=count))
    return shapes


def _short_keys() -> list[Shape]:
    def shape(name: str, *keys: int, n: int = 4096, heads: int = 10) -> Shape:
        return Shape(name, "decoupled", 64, (2, heads, n), (2, heads, n), keys=keys)

    sd15 = (2, 8, 4096)
    return [
        shape("sdxl-4096-ip-4", 77, 4),
        shape("sdxl-4096-ip-16", 77, 16),
        shape("sdxl-1024-ip-4", 77, 4, n=1024, heads=20),
        shape("sdxl-1024-ip-16", 77, 16, n=1024, heads=20),
        shape("sdxl-4096-ip-4x2", 77, 4, 4),
        shape("sdxl-4096-ip-4x3", 77, 4, 4, 4),
        shape("sdxl-4096-csgo", 77, 4, 32),
        shape("sdxl-1024-csgo", 77, 4, 32, n=1024, heads=20),
        Shape("sd15-4096-deadiff", "joint", 40, sd15, sd15, keys=(77, 16)),
        Shape("sd15-4096-deadiff-null", "null", 40, sd15, sd15, keys=(77,), references=16),
    ]


def _others() -> list[Shape]:
    redux = (512, 729, 4096)
    return [
        Shape("sd15-4096-injected", "injected", 40, (2, 8, 4096), (2, 1, 4096)),
        Shape("sd15-1024-injected", "injected", 80, (2, 8, 1024), (2, 4, 1024)),
        Shape(
            "flux-redux-5337",
            "biased",
            128,
            (1, 24, 5337),
            (1, 1, 5337),
            keys=redux,
            shift=math.log(0.5),
        ),
    ]


SHAPES: dict[str, Shape] = {
    s.name: s for s in (*_plain(), *_shared(), *_banks(), *_short_keys(), *_others())
}
