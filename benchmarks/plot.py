"""Figures and the README's table, from the CSV alone. Times are minima on a CPU, medians on a GPU.

speedup.svg      ours over the official formulation and over the best library, by shape
tokens.svg       cost per head against tokens
batch.svg        cost of shared attention against the batch
references.svg   cost against the number of stored references
roofline.svg     where every shape stands between the memory and the matrix product
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import Row, load

GROUPS = ("ours", "official", "library")
_COLOURS = {"ours": "#d1495b", "official": "#8d96a3", "library": "#00798c"}


def cost(row: Row) -> float:
    """Milliseconds: the minimum on a CPU, which others use too, the median on a GPU."""
    value = row.median_ms if row.device == "cuda" else row.min_ms
    if value is None:
        raise ValueError(f"{row.shape} {row.provider} has no time")
    return value


@dataclass(frozen=True)
class Line:
    """The fastest of each group on one shape in one setting; None where none ran."""

    setting: tuple[str, int, str]
    shape: Row
    ours: Row | None
    official: Row | None
    library: Row | None

    def speedup(self, group: str) -> float | None:
        """How many times faster ours is than the fastest of a group."""
        other = getattr(self, group)
        return cost(other) / cost(self.ours) if self.ours and other else None


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line per setting (clock, threads, dtype) and shape, in the order of the rows."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.status != "ok" or row.group not in GROUPS:
            continue
        best = found.setdefault((row.clock, row.threads, row.dtype, row.size, row.shape), {})
        # the official formulation is the eager one where it ran: compiling it is the reader's merit
        better = row.group not in best or cost(row) < cost(best[row.group])
        if row.provider == "official" or (better and row.provider != "official-compiled"):
            best[row.group] = row
    return [
        Line(key[:3], next(iter(best.values())), *(best.get(group) for group in GROUPS))
        for key, best in found.items()
    ]


def _rate(row: Row) -> float:
    return row.flops_exact / cost(row) / 1e6


def gemm_rate(rows: Iterable[Row], setting: tuple[str, int, str]) -> float:
    """GFLOP/s of the machine's own matrix product in a setting (0 if not measured): in the dtype or
    in fp32, whichever is faster, since not every CPU multiplies half precision."""
    clock, threads, dtype = setting
    return max(
        (
            _rate(row)
            for row in rows
            if row.shape == "limit-gemm"
            and (row.clock, row.threads) == (clock, threads)
            and row.dtype in (dtype, "float32")
        ),
        default=0.0,
    )


def table(rows: Sequence[Row]) -> str:
    """The README's table, in Markdown."""
    out = [
        "| shape | dtype | threads | ours (ms) | official (ms) | × | library (ms) | × | of GEMM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines(rows):
        if line.ours is None:
            continue
        peak = gemm_rate(rows, line.setting)
        share = f"{100 * _rate(line.ours) / peak:.0f} %" if peak else ""
        cells = [line.shape.shape, line.shape.dtype, str(line.shape.threads), _cell(line.ours)]
        for group in ("official", "library"):
            ratio = line.speedup(group)
            cells += [_cell(getattr(line, group)), f"{ratio:.2f}" if ratio else ""]
        out.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(out)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    shown = f"{cost(row):.3g}" if cost(row) < 1000 else f"{cost(row):.0f}"
    return f"{shown} ({row.provider.removeprefix('ours-')})"


def _figure(path: Path, fill: Callable[[Any], None], size: tuple[float, float] = (7, 4.5)) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    fill(figure.add_subplot())
    figure.savefig(path, metadata={"Date": None})


def _speedup(found: Sequence[Line], title: str) -> Callable[[Any], None]:
    def fill(axes: Any) -> None:
        names = [line.shape.shape for line in found]
        for offset, group in ((-0.2, "official"), (0.2, "library")):
            ratios = [line.speedup(group) or 0.0 for line in found]
            places = [i + offset for i in range(len(names))]
            axes.barh(places, ratios, 0.38, color=_COLOURS[group], label=f"over {group}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("times faster")
        axes.set_title(title)
        axes.legend()

    return fill


def _curve(
    found: Sequence[Line], label: str, title: str, x: Callable[[Row], float], per: Callable
) -> Callable[[Any], None]:
    def fill(axes: Any) -> None:
        for group in GROUPS:
            points = sorted(
                (x(row), cost(row) / per(row)) for line in found if (row := getattr(line, group))
            )
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, "o-", color=_COLOURS[group], label=group)
        axes.set(xlabel=label, ylabel="ms", title=title, xscale="log", yscale="log")
        axes.set_xticks(sorted({x(line.shape) for line in found}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.legend()

    return fill


def _roofline(rows: Sequence[Row], found: Sequence[Line], title: str) -> Callable[[Any], None]:
    def fill(axes: Any) -> None:
        peak = gemm_rate(rows, found[0].setting)
        bandwidth = max(r.bytes / cost(r) / 1e6 for r in rows if r.shape == "limit-copy")
        marks = [line.ours for line in found if line.ours]
        places = [row.flops_exact / row.bytes for row in marks]
        low, high = min([*places, 1.0]), max([*places, 1e3])
        roof = [low, peak / bandwidth, high]
        axes.plot(roof, [min(peak, bandwidth * i) for i in roof], color="black")
        for row, intensity in zip(marks, places, strict=True):
            achieved = _rate(row)
            axes.plot(intensity, achieved, "o", color=_COLOURS["ours"])
            axes.annotate(row.shape, (intensity, achieved), fontsize=5)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("FLOPs of the exact algorithm per byte of Q, K, V and output")
        axes.set_ylabel("GFLOP/s")

    return fill


def draw(source: Path, folder: Path) -> str:
    """Write the figures of a CSV, one set per clock, threads and dtype, and return its table.

    Raises:
        ValueError: there is nothing to draw.
    """
    rows = load(source)
    found = lines(rows)
    if not found:
        raise ValueError(f"{source.name} has no measured rows")
    folder.mkdir(parents=True, exist_ok=True)
    for setting in dict.fromkeys(line.setting for line in found):
        clock, threads, dtype = setting
        mine = [line for line in found if line.setting == setting]
        title = f"{source.stem}, {dtype}, {threads} threads, {clock}"
        stem = f"{dtype}-{threads}-{clock}"
        height = 1.5 + 0.28 * len(mine)
        _figure(folder / f"speedup-{stem}.svg", _speedup(mine, title), (7, height))
        plain = [
            v
            for v in mine
            if v.shape.kind == "plain" and v.shape.head_dim == 64 and not v.shape.keys
        ]
        shared = [v for v in mine if v.shape.shape.startswith("sdxl-1024-shared")]
        shared = [v for v in shared if v.shape.shift == 0.0]
        banks = [v for v in mine if v.shape.shape.startswith("sdxl-1024-references")]
        curves: list[tuple[str, list[Line], str, Callable[[Row], float], Callable]] = [
            ("tokens", plain, "tokens (ms per head)", lambda r: r.length, _heads),
            ("batch", shared, "batch of shared attention", lambda r: r.batch, _one),
            ("references", banks, "stored references", lambda r: r.references, _one),
        ]
        for name, points, label, x, per in curves:
            if len({x(line.shape) for line in points}) > 1:
                _figure(folder / f"{name}-{stem}.svg", _curve(points, label, title, x, per))
        own = [r for r in rows if (r.clock, r.threads) == (clock, threads)]
        if {"limit-gemm", "limit-copy"} <= {r.shape for r in own}:
            _figure(folder / f"roofline-{stem}.svg", _roofline(own, mine, title))
    return table(rows)


def _heads(row: Row) -> float:
    return row.batch * row.heads


def _one(row: Row) -> float:
    return 1.0
