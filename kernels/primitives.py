"""Small device functions that every attention kernel of this package is built from.

Shapes in comments: M query rows and N keys of one tile, D channels. A head dimension is held as one
or two *chunks* (a tuple of tensors): 40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32, where the last may
be padded with zeros; see `configs.low_width`. Logits live in log2 units: exp2(x * log2(e)) is one
multiply-add and one special-function instruction per element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .configs import high_width, low_width

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNREACHABLE = tl.constexpr(2.0**126)  # a running maximum under which every exponential is exactly 0
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FARTHEST = tl.constexpr(1e38)  # a finite bias beyond this would leave fp32 in log2 units
HALF_ROOM = tl.constexpr(
    16384.0
)  # a folded fp16 query row above this is scaled down, so that it never overflows


@triton.jit
def number_at(number, b):
    """The scalar of batch row b."""
    if number.pointer is None:
        return number.value
    else:
        return tl.load(number.pointer + b * number.stride_b)


@triton.jit
def number_rows(number, b, rows, mask):
    """[M]: the number for the query rows of a tile."""
    if number.stride_l is None:
        return tl.zeros_like(rows).to(tl.float32) + number_at(number, b)
    else:
        return tl.load(
            number.pointer + b * number.stride_b + rows * number.stride_l, mask=mask, other=0.0
        )


@triton.jit
def within_range(bias):
    """A bias whose finite values stay finite in log2 units."""
    bias = tl.where((bias < -FARTHEST) & (bias > -float("inf")), -FARTHEST, bias)
    return tl.where((bias > FARTHEST) & (bias < float("inf")), FARTHEST, bias)


@triton.jit
def token_pointer(x, b, h, start):
    """Pointer to token `start` of (b, h); 64-bit before any stride."""
    offset = b * x.stride_b + h * x.stride_h + tl.cast(start, tl.int64) * x.stride_n
    if x.aligned is not None:
        offset = tl.multiple_of(offset, 8)
    return x.pointer + offset


@triton.jit
def token_offsets(x, n):
    """[N]: offsets of the tokens n from `token_pointer`."""
    offsets = n * x.stride_n
    if x.aligned is not None:
        offsets = tl.multiple_of(offsets, 8)
    return offsets


@triton.jit
def load_chunk(pointer, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[N, WIDTH]: channels FIRST.. of tokens; zero where not valid (None: all are) and beyond D."""
    d = FIRST + tl.arange(0, WIDTH)
    at = pointer + offsets[:, None] + d[None, :]
    if FIRST + WIDTH > D:
        if valid is None:
            return tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    else:
        if valid is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=valid[:, None], other=0.0)


@triton.jit
def load_tile(x, b, h, start, n, valid, D: tl.constexpr, PART: tl.constexpr = 0):
    """The chunks ([N, D1],) or ([N, D1], [N, D2]) of the tokens start + n of (b, h); PART: 1 or 2
    for that one alone."""
    at = token_pointer(x, b, h, start)
    offsets = token_offsets(x, n)
    if PART == 2:
        return (load_chunk(at, offsets, valid, low_width(D), high_width(D), D),)
    else:
        low = load_chunk(at, offsets, valid, 0, low_width(D), D)
        if PART == 1 or high_width(D) == 0:
            return (low,)
        else:
            return (low, load_chunk(at, offsets, valid, low_width(D), high_width(D), D))


@triton.jit
def zero_tile(BLOCK_M: tl.constexpr, D: tl.constexpr):
    """Accumulator chunks of zeros."""
    low = tl.zeros([BLOCK_M, low_width(D)], tl.float32)
    if high_width(D) == 0:
        return (low,)
    else:
        return (low, tl.zeros([BLOCK_M, high_width(D)], tl.float32))


@triton.jit
def dot_qk(q, k):
    """[M, N] fp32: q k^T over all chunks."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
    if len(q) == 2:
        s = tl.dot(q[1], tl.trans(k[1]), s, input_precision="ieee")
    return s


@triton.jit
def dot_low(q, k):
    """[M, N] fp32: q k^T over the first chunk; k: that chunk."""
    return tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")


@triton.jit
def dot_high(s, q, k):
    """[M, N] fp32: s + q k^T over the second chunk; k: that chunk."""
    return tl.dot(q[1], tl.trans(k[0]), s, input_precision="ieee")


@triton.jit
def settled(acc):
    """The same chunks, as something that is used: the compiler waits for their products here and
    not in the next turn of a loop. Costs no instruction."""
    if INTERPRETED:
        return acc
    elif len(acc) == 1:
        return (_used(acc[0]),)
    else:
        return (acc[0], _used(acc[1]))


@triton.jit
def _used(x):
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def dot_pv(p, v, acc):
    """acc + p v, chunk by chunk."""
    p = p.to(v[0].dtype)
    low = tl.dot(p, v[0], acc[0], input_precision="ieee")
    if len(acc) == 1:
        return (low,)
    else:
        return (low, tl.dot(p, v[1], acc[1], input_precision="ieee"))


@triton.jit
def scale_rows(acc, factor):
    """acc * factor[M] per row."""
    low = acc[0] * factor[:, None]
    if len(acc) == 1:
        return (low,)
    else:
        return (low, acc[1] * factor[:, None])


@triton.jit
def add_tiles(a, b):
    """a + b, chunk by chunk."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def squares(q):
    """[M]: the squared norms of the rows of a tile."""
    low = q[0].to(tl.float32)
    total = tl.sum(low * low, 1)
    if len(q) == 2:
        high = q[1].to(tl.float32)
        total += tl.sum(high * high, 1)
    return total


@triton.jit
def along(q, k):
    """[M]: the products of the rows of a tile with one key, chunks [1, D]."""
    total = tl.sum(q[0].to(tl.float32) * k[0].to(tl.float32), 1)
    if len(q) == 2:
        total += tl.sum(q[1].to(tl.float32) * k[1].to(tl.float32), 1)
    return total


@triton.jit
def load_map(pointer, at, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[WIDTH] coefficients of a map, zero beyond D; `at` = (b * H + h) * D.

    Volatile: a second reading at a segment boundary must not be merged with the first, or its
    registers would live across the loop.
    """
    d = FIRST + tl.arange(0, WIDTH)
    return tl.load(pointer + at + d, mask=d < D, other=0.0, volatile=True)


@triton.jit
def load_query(x, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[M, WIDTH] fp32 of a query tensor at a place, read again at every boundary (volatile)."""
    b, h, _, start, m, valid = place
    d = FIRST + tl.arange(0, WIDTH)
    at = token_pointer(x, b, h, start) + token_offsets(x, m)[:, None] + d[None, :]
    seen = valid[:, None] & (d < D)[None, :]
    return tl.load(at, mask=seen, other=0.0, volatile=True).to(tl.float32)


@triton.jit
def effective_query(branch, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[M, WIDTH] fp32: gamma * content + (1 - gamma) * (scale * Q + shift)."""
    q = load_query(branch.query, place, FIRST, WIDTH, D)
    if branch.query_map.scale is not None:
        q = q * load_map(branch.query_map.scale, place[2] * D, FIRST, WIDTH, D)[None, :]
        q += load_map(branch.query_map.shift, place[2] * D, FIRST, WIDTH, D)[None, :]
    if branch.content.pointer is not None:
        gamma = number_at(branch.gamma, place[0])
        q = gamma * load_query(branch.content, place, FIRST, WIDTH, D) + (1.0 - gamma) * q
    return q


@triton.jit
def fold_chunk(branch, segment, place, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """([M, WIDTH] fp32: Q' times the key scale; [M]: Q' . key shift)."""
    q = effective_query(branch, place, FIRST, WIDTH, D)
    if segment.key_map.scale is None:
        return q, tl.zeros_like(tl.sum(q, 1))
    else:
        shift = load_map(segment.key_map.shift, place[2] * D, FIRST, WIDTH, D)
        scale = load_map(segment.key_map.scale, place[2] * D, FIRST, WIDTH, D)
        return q * scale[None, :], tl.sum(q * shift[None, :], 1)


@triton.jit
def round_chunk(
    folded, room, center, at, FIRST: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr
):
    """(folded / room [M] rounded to DTYPE, [M]: (folded - room * rounded) . center)."""
    if room is None:
        rounded = folded.to(DTYPE)
        lost = folded - rounded.to(tl.float32)
    else:
        rounded = (folded / room[:, None]).to(DTYPE)
        lost = folded - rounded.to(tl.float32) * room[:, None]
    if center is None:
        return rounded, tl.zeros_like(tl.sum(folded, 1))
    else:
        mean = load_map(center, at, FIRST, folded.shape[1], D)
        return rounded, tl.sum(lost * mean[None, :], 1)


@triton.jit
def _peak(folded):
    """[M]: the largest magnitude of a row over what an fp16 query may hold; at least 1."""
    return tl.maximum(tl.max(tl.abs(folded), 1) / HALF_ROOM, 1.0)


@triton.jit
def _folded_tile(branch, segment, place, scale, D: tl.constexpr):
    """(q chunks in the input dtype, scale [M] for what their rows were divided by, term [M])."""
    DTYPE: tl.constexpr = branch.query.pointer.dtype.element_ty
    center = None
    if segment.key_map.scale is not None:
        center = segment.key_map.center
    room = None
    low, term = fold_chunk(branch, segment, place, 0, low_width(D), D)
    if DTYPE.is_fp16():
        room = _peak(low)
    if high_width(D) == 0:
        low, lost = round_chunk(low, room, center, place[2] * D, 0, D, DTYPE)
        q = (low,)
    else:
        high, more = fold_chunk(branch, segment, place, low_width(D), high_width(D), D)
        if DTYPE.is_fp16():
            room = tl.maximum(room, _peak(high))
        low, lost = round_chunk(low, room, center, place[2] * D, 0, D, DTYPE)
        high, also = round_chunk(high, room, center, place[2] * D, low_width(D), D, DTYPE)
        term += more + also
        q = (low, high)
    if room is not None:
        scale *= room
    return q, scale, term + lost


@triton.jit
def fold_query(branch, segment, place, factor, D: tl.constexpr):
    """The query tile of one segment, with everything that folds into it.

    place: (b, h, b * H + h, first row, rows [M], valid [M]).
    factor: softmax scale * logit scale * log2(e), a scalar of this program.
    -> (q chunks in the input dtype, scale [M] >= 0, term [M]), where
    logit in log2 units = scale * (q . key) + term.
    The term is computed from the ROUNDED query, so that with a center the rounding error of q
    multiplies centred keys only.
    """
    b, h, _, start, m, valid = place
    scale = tl.zeros_like(m).to(tl.float32) + tl.abs(factor)
    if (
        segment.key_map.scale is None
        and branch.query_map.scale is None
        and branch.content.pointer is None
    ):
        q = load_tile(branch.query, b, h, start, m, valid, D)
        term = tl.zeros_like(scale)
    else:
        q, scale, term = _folded_tile(branch, segment, place, scale, D)
        term *= factor
    if segment.signed is not None:
        q = flip_tile(q, factor)
    if branch.park.pointer is not None:
        q = park_tile(branch.park, place, q, D)
    return q, scale, term


@triton.jit
def park_tile(x, place, q, D: tl.constexpr):
    """The same chunks, from memory: what is computed is multiplied from registers, what is loaded
    from shared memory, and registers are what a loop on sm_90 runs out of. `x`: the rows of the
    output that this program will write."""
    b, h, _, start, m, valid = place
    at = token_pointer(x, b, h, start)
    tl.debug_barrier()
    store_tile(at, x.stride_n, m, valid, q, D)
    tl.debug_barrier()
    low = load_parked(at, x.stride_n, m, valid, 0, low_width(D), D)
    if high_width(D) == 0:
        return (low,)
    else:
        return (low, load_parked(at, x.stride_n, m, valid, low_width(D), high_width(D), D))


@triton.jit
def load_parked(
    pointer, stride_n, m, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    """[M, WIDTH]: what `store_chunk` wrote, zero elsewhere."""
    d = FIRST + tl.arange(0, WIDTH)
    seen = valid[:, None] & (d < D)[None, :]
    return tl.load(
        pointer + m[:, None] * stride_n + d[None, :], mask=seen, other=0.0, volatile=True
    )


@triton.jit
def load_sums(pointer, place, D: tl.constexpr):
    """The chunks of a tile of [B, H, L, D] fp32 that this program stored and may store again."""
    _, _, _, _, m, valid = place
    tl.debug_barrier()
    low = load_parked(pointer, D, m, valid, 0, low_width(D), D)
    if high_width(D) == 0:
        sums = (low,)
    else:
        sums = (low, load_parked(pointer, D, m, valid, low_width(D), high_width(D), D))
    tl.debug_barrier()
    return sums


@triton.jit
def flip_tile(q, factor):
    """-q where the factor is negative: the running maximum needs a scale >= 0; a sign is exact."""
    sign = tl.where(factor < 0, -1.0, 1.0)
    low = (q[0].to(tl.float32) * sign).to(q[0].dtype)
    if len(q) == 1:
        return (low,)
    else:
        return (low, (q[1].to(tl.float32) * sign).to(q[1].dtype))


@triton.jit
def map_values(acc, total, value_map, at, D: tl.constexpr):
    """acc * scale + total * shift: sum p (a v + b) = a (sum p v) + b (sum p), once per segment."""
    low = acc[0] * load_map(value_map.scale, at, 0, low_width(D), D)[None, :]
    low += total[:, None] * load_map(value_map.shift, at, 0, low_width(D), D)[None, :]
    if high_width(D) == 0:
        return (low,)
    else:
        high = acc[1] * load_map(value_map.scale, at, low_width(D), high_width(D), D)[None, :]
        high += (
            total[:, None] * load_map(value_map.shift, at, low_width(D), high_width(D), D)[None, :]
        )
        return (low, high)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, D: tl.constexpr):
    """(accumulator, sum [M], maximum [M]) of a softmax that has seen no key."""
    none = tl.zeros([BLOCK_M], tl.float32)
    return zero_tile(BLOCK_M, D), none, none - float("inf")


@triton.jit
def merge_states(one, two):
    """Two partial softmaxes as one. What is called their maxima may be any numbers within the range
    of the exponentials: which of them counts for more, the sums say."""
    new = tl.maximum(one[2] + tl.math.log2(one[1]), two[2] + tl.math.log2(two[1]))
    safe = tl.where(new == -float("inf"), 0.0, new)
    decay, decay2 = tl.math.exp2(one[2] - safe), tl.math.exp2(two[2] - safe)
    acc = add_tiles(scale_rows(one[0], decay), scale_rows(two[0], decay2))
    return acc, one[1] * decay + two[1] * decay2, new


@triton.jit
def finish(total, top, null_keys):
    """(natural-log LSE [M], factor [M] that normalises); null keys have logit and value 0."""
    factor = tl.full(top.shape, 1.0, tl.float32)
    if null_keys is not None:
        new = tl.maximum(top, 0.0)
        factor = tl.math.exp2(top - new)
        total = total * factor + null_keys * tl.math.exp2(-new)
        top = new
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    lse = tl.where(none, -float("inf"), (top + tl.math.log2(total)) * LN2)
    return lse, tl.where(none, 0.0, factor / total)


@triton.jit
def store_chunk(pointer, stride_n, m, valid, x, FIRST: tl.constexpr, D: tl.constexpr):
    """Write [M, WIDTH] as channels FIRST.. of rows m."""
    d = FIRST + tl.arange(0, x.shape[1])
    at = pointer + m[:, None] * stride_n + d[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def store_tile(pointer, stride_n, m, valid, acc, D: tl.constexpr):
    """Write the chunks as rows m, nothing beyond D and nothing where not valid."""
    store_chunk(pointer, stride_n, m, valid, acc[0], 0, D)
    if high_width(D) > 0:
        store_chunk(pointer, stride_n, m, valid, acc[1], low_width(D), D)
