"""Launch configurations: a frozen table per architecture. Tuning is a diff to this file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton


@dataclass(frozen=True)
class Tile:
    """How one program is cut: query rows, keys per step, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def low_width(head_dim):
    """The width of the first chunk of a head dimension (a power of two >= 16).

    A head dimension is held as one padded chunk, or as two where that is less:
    40 = 32 + 16 (8 of them used), 80 = 64 + 16, 160 = 128 + 32.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    low = padded // 2
    split = low >= 16 and max(16, 1 << (head_dim - low - 1).bit_length()) < low
    return low if split else padded


@triton.constexpr_function
def high_width(head_dim):
    """The width of the second chunk, 0 where there is none."""
    low = low_width(head_dim)
    return max(16, 1 << (head_dim - low - 1).bit_length()) if low < head_dim else 0


# Classes of head dimensions: the first limit that the widths do not exceed.
_WIDTHS = (64, 96, 128, 192, 256)

_NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100")
_FP32 = (
    Tile(32, 32, 4, 1),
    Tile(32, 32, 8, 1),
    Tile(32, 32, 8, 1),
    Tile(32, 16, 8, 1),
    Tile(32, 16, 8, 1),
)

# (architecture, bytes per element) -> one Tile per width class. The sm_90 rows at 64 and 128 are
# those whose loop overlaps the softmax with the products of the next step; fp32 runs on the
# ordinary cores (exact), with small tiles.
TILES: dict[tuple[str, int], tuple[Tile, Tile, Tile, Tile, Tile]] = {
    ("sm_80", 2): (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 2),
        Tile(64, 64, 8, 2),
    ),
    ("sm_89", 2): (
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 32, 8, 1),
        Tile(128, 32, 8, 2),
        Tile(64, 64, 8, 1),
    ),
    ("sm_90", 2): (
        Tile(128, 128, 8, 3),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
    ),
    ("sm_100", 2): (
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(64, 64, 8, 2),
    ),
    ("gfx942", 2): (
        Tile(128, 64, 4, 1),
        Tile(128, 32, 4, 1),
        Tile(128, 32, 4, 1),
        Tile(128, 32, 4, 1),
        Tile(128, 32, 4, 1),
    ),
    **dict.fromkeys(((arch, 4) for arch in _NVIDIA), _FP32),
    ("gfx942", 4): (
        Tile(32, 32, 4, 1),
        Tile(32, 32, 4, 1),
        Tile(32, 32, 4, 1),
        Tile(32, 16, 4, 1),
        Tile(32, 16, 4, 1),
    ),
    ("interpreter", 2): (Tile(64, 32, 1, 1),) * 5,
    ("interpreter", 4): (Tile(64, 32, 1, 1),) * 5,
}

# Architectures on which bfloat16 does without a running maximum, and the fewest keys of a segment
# for which finding their reach pays. Half precision with 5 bits of exponent has no room for it.
BOUNDED = {"sm_90": 512, "interpreter": 1}


def is_parked(arch: str, head_dim: int) -> bool:
    """Whether a folded query goes through memory: see `primitives.park_tile`."""
    return arch in ("sm_90", "interpreter") or (arch in ("sm_80", "sm_89") and head_dim > 128)


def is_bounded(arch: str, head_dim: int) -> bool:
    """Whether a kernel of bfloat16 has the loop without a running maximum: where both loops fit the
    registers."""
    return arch == "interpreter" or (arch in BOUNDED and head_dim in (40, 64, 80, 128, 160))


# Architectures on which INT8 products of queries and keys save time, and at which head dimensions
# (None: all of them). Elsewhere the conversion to fp32 costs what the products save.
_INT8: dict[str, tuple[int, ...] | None] = {
    "sm_80": (40, 64, 80, 128),
    "sm_89": (40, 64, 80, 128),
    "sm_90": (64, 128),
    "interpreter": None,
}


def is_quantised(arch: str, head_dim: int) -> bool:
    """Whether `precision="fast"` multiplies INT8 on an architecture of the table."""
    dims = _INT8.get(arch, ())
    return dims is None or head_dim in dims


ARCHITECTURES = (*_NVIDIA, "gfx942")


def cuda_arch(major: int, minor: int) -> str | None:
    """The table's name for a CUDA compute capability, None below sm_80."""
    if major < 8:
        return None
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    if major == 9:
        return "sm_90"
    return (
        "sm_100" if major in (10, 11) else "sm_89"
    )  # sm_12x has the shared memory and the tensor cores of sm_89


def hip_arch(name: str) -> str | None:
    """The table's name for an AMD architecture (CDNA), None for others."""
    return "gfx942" if name.split(":")[0] in ("gfx90a", "gfx942", "gfx950") else None


def attention_tile(
    arch: str,
    head_dim: int,
    itemsize: int,
    length: int,
    longest: int,
    *,
    heavy: bool = False,
    crowded: bool = False,
    running: bool = False,
) -> Tile:
    """The launch configuration of the attention kernel.

    Args:
        arch: a name of ARCHITECTURES, or "interpreter".
        head_dim, itemsize: of the inputs.
        length: number of queries; longest: number of keys of the longest segment.
        heavy: the kernel needs room in registers: a second accumulator, or a bias per key.
        crowded: it needs more: a second accumulator during a long loop.
        running: no softmax does without a running maximum.
    """
    width = low_width(head_dim) + high_width(head_dim)
    tile = TILES[arch, itemsize][next(i for i, limit in enumerate(_WIDTHS) if width <= limit)]
    if heavy and itemsize == 2:
        tile = replace(tile, stages=min(tile.stages, 2))
    chunks = arch == "sm_90" and high_width(head_dim) > 0
    if (crowded or (heavy and (chunks or arch == "sm_100"))) and tile.block_n > 64:
        tile = replace(tile, block_n=64, stages=min(tile.stages, 2))
    if heavy and arch == "sm_80" and head_dim > 96:
        tile = replace(tile, block_n=min(tile.block_n, 32))
    if heavy and arch == "sm_89":  # its registers hold no step in flight next to a key bias
        tile = replace(tile, stages=1)
    if running and chunks:
        tile = replace(tile, stages=min(tile.stages, 2))
    if length <= 64 and tile.block_m == 128:
        tile = replace(tile, block_m=64, warps=4)
    if longest <= 32 and tile.block_n > 32:  # a few image tokens: one small step
        tile = replace(tile, block_n=32)
    return tile


def decoupled_tile(arch: str, head_dim: int, itemsize: int, keys: int) -> Tile:
    """The launch configuration of the one-tile kernel: all keys of all branches are one step."""
    columns = max(16, next_power_of_2(keys))
    if arch == "interpreter":
        return Tile(64, columns, 1, 1)
    width = low_width(head_dim) + high_width(head_dim)
    if itemsize == 4:
        return Tile(32, columns, 4, 1)
    return Tile(64, columns, 4, 1) if width > 128 or arch == "gfx942" else Tile(128, columns, 8, 1)
