"""The gate of csrc/ without the CPUs that it is for: each instruction set compiled, and its inner
loops read: accumulators stay in registers, the products are exactly those of the tile, and a model
of the ports says how many cycles a score takes.

    python benchmarks/cpu_gate.py [--write]     # the table; --write puts it into docs/cpu.md
    python benchmarks/cpu_gate.py --object X.o  # the inner loops of any object file

A prediction counts inner loops alone, as if all operands were in the first cache: what a kernel
does around them (packing, rows, maxima's ends) comes on top.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cpu.md"
START, END = "<!-- table: benchmarks/cpu_gate.py -->", "<!-- end -->"
ISAS = {"avx2": ("DotSingle", 8, 1), "avx512": ("DotSingle", 16, 1)}
ISAS["avx512_bf16"], ISAS["amx_bf16"] = ("DotBf16", 16, 2), ("DotTiles", 16, 2)
"""Per instruction set: its dot product, lanes of a vector, elements of a pair."""
TILE, TILE_PRODUCT, TILE_LOAD = 16, 16, 8
"""AMX: rows, columns and pairs of a tile; cycles of a product on Sapphire Rapids, by Intel's
manual, and of a load, two cache lines a cycle. llvm-mca has no numbers for them."""
MODEL = "icelake-server"
"""llvm-mca's: two ports for products of any width, as in Zen 5 and the larger Intel cores. Its own
models of Zen give every product two turns of a port, which no Zen does."""
LIMITS = {"avx2": (24, 20), "avx512": (38, 16), "avx512_bf16": (38, 16), "amx_bf16": (13, 16)}
"""Per instruction set: instructions of the widest micro-tile's loop, of the softmax per vector."""
TOLERANCE = 1.1  # between compilers
ROWS = {"avx2": {1: {6, 12}, 2: {6}}}
ROWS["avx512"] = ROWS["avx512_bf16"] = {1: {6, 12}, 2: {6, 12}, 3: {6}, 4: {6}}
ROWS["amx_bf16"] = {1: {1}, 2: {1}, 3: {1}}
"""The tiles there must be: rows for each number of vectors; with AMX, products for each of the
blocks of 16 rows."""
HEAD_DIMS = (40, 64, 80, 128, 160)
BLOCK_KEYS = 128
COMPILE = ("-std=c++17", "-O3", "-fno-math-errno", "-w", "-c")
_PANEL = re.compile(r"styleattn::(\w+)::panel_rows<styleattn::\w+::(\w+), (\d+)>")
_BLOCKS = re.compile(r"styleattn::amx_bf16::amx_panel<(\d)>")
_SOFTMAX = re.compile(r"styleattn::(\w+)::Tile<styleattn::\w+::(\w+)>::attend")
_DOTS = ("vfmadd", "vdpbf16ps", "tdpbf16ps")

Code = list[tuple[int, str]]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: where it is, and its instructions."""

    function: str
    text: tuple[str, ...]

    def count(self, *parts: str) -> int:
        """Instructions that begin with any of the parts."""
        return sum(line.startswith(parts) for line in self.text)

    @property
    def dots(self) -> int:
        """Vector products."""
        return self.count(*_DOTS)

    @property
    def tiles(self) -> int:
        """Loads of AMX tiles."""
        return self.count("tileload")

    @property
    def spills(self) -> int:
        """Instructions that touch the stack."""
        return sum("(%rsp" in line or "(%rbp" in line for line in self.text)


@dataclass(frozen=True)
class Micro:
    """The inner loop of a micro-tile of `vectors` vectors (AMX: blocks of rows): per turn `dots`
    products."""

    isa: str
    dot: str
    vectors: int
    loop: Loop

    @property
    def rows(self) -> float:
        """Rows of the tile; whole unless products are missing or too many."""
        return self.loop.dots / self.vectors


def missing() -> str:
    """Why the gate cannot run here; empty if it can."""
    tools = [name for name in ("g++", "objdump") if shutil.which(name) is None]
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip()
    if machine != "x86_64":
        return f"x86-64 only, this is {machine}"
    return f"no {' and no '.join(tools)}" if tools else ""


def compiled(isa: str, folder: Path, source: Path = ROOT / "csrc") -> Path:
    """The object file of an instruction set."""
    target = folder / f"{isa}.o"
    command = ["g++", *COMPILE, str(source / f"isa_{isa}.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def functions(binary: Path) -> dict[str, Code]:
    """(address, instruction) of every function of an object file or library."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Code] = {}
    code: Code = []
    for line in text.splitlines():
        if name := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            code = found.setdefault(name[1], [])
        elif "\t" in line:
            address, _, instruction = line.partition("\t")
            code.append((int(address.strip().rstrip(":"), 16), instruction.strip()))
    return found


def innermost_loops(name: str, code: Code) -> Iterator[Loop]:
    """Every run that ends in a jump back to its start, without other jumps."""
    at = {address: i for i, (address, _) in enumerate(code)}
    text = [instruction for _, instruction in code]
    for end, instruction in enumerate(text):
        operation, *target = instruction.split()
        if not operation.startswith("j") or not target:
            continue
        try:
            start = at.get(int(target[0], 16), end)
        except ValueError:  # a computed jump
            continue
        if start < end and not any(i.startswith(("j", "ret", "call")) for i in text[start:end]):
            yield Loop(name, tuple(text[start : end + 1]))


def loops(binary: Path) -> list[Loop]:
    """The innermost loops of a binary that hold vector products."""
    every = (innermost_loops(name, code) for name, code in functions(binary).items())
    return [loop for some in every for loop in some if loop.dots >= (1 if loop.tiles else 4)]


def micro_tiles(found: list[Loop]) -> list[Micro]:
    """The micro-tiles among loops."""
    named = [(_PANEL.search(loop.function), loop) for loop in found]
    blocks = [(_BLOCKS.search(loop.function), loop) for loop in found]
    return [Micro(m[1], m[2], int(m[3]), loop) for m, loop in named if m] + [
        Micro("amx_bf16", "DotTiles", int(m[1]), loop) for m, loop in blocks if m
    ]


def exponentials(found: list[Loop], dot: str) -> Loop:
    """The loop that turns scores without a bias into probabilities: the shortest that rounds."""
    mine = [
        loop
        for loop in found
        if (m := _SOFTMAX.search(loop.function)) and m[2] == dot
        if loop.count("vround", "vreduce") == 1
    ]
    return min(mine, key=lambda loop: (len(loop.text), -loop.dots))


def violations(isa: str, found: list[Loop]) -> list[str]:
    """Everything that is wrong with the inner loops of an instruction set."""
    dot = ISAS[isa][0]
    tiles = [m for m in micro_tiles(found) if m.dot == dot]
    wrong = []
    rows = {v: {m.rows for m in tiles if m.vectors == v} for v in {m.vectors for m in tiles}}
    if rows != ROWS[isa]:  # a tile is missing, or its products are not rows times vectors
        wrong.append(f"tiles (vectors: rows) are {rows}, not {ROWS[isa]}")
    softmax = exponentials(found, dot)
    wrong += [
        f"{loop.spills} on the stack in {loop.function[:80]}"
        for loop in (*(m.loop for m in tiles), softmax)
        if loop.spills
    ]
    wrong += [
        f"{m.loop.tiles} loads for {m.loop.dots} products of tiles"
        for m in tiles
        if m.loop.tiles != (m.vectors + 1 if isa == "amx_bf16" else 0)
    ]
    most = max(ROWS[isa])
    widest = max((len(m.loop.text) for m in tiles if m.vectors == most), default=0)
    for what, count, limit in zip(
        ("micro-tile", "softmax"), (widest, len(softmax.text)), LIMITS[isa], strict=True
    ):
        if count > TOLERANCE * limit:
            wrong.append(f"{count} instructions in the loop of the {what}, {limit} are known to do")
    return wrong


def cycles(loop: Loop, cpu: str = MODEL) -> float:
    """Cycles per turn by llvm-mca's model of a CPU; of AMX by its rates alone."""
    if loop.tiles:
        return float(max(loop.dots * TILE_PRODUCT, loop.tiles * TILE_LOAD))
    text = [re.sub(r"^(j\w+)\s.*", r"\1 0", re.split(r"[#<]", line)[0]) for line in loop.text]
    command = ["llvm-mca", f"-mcpu={cpu}", "-mattr=+avx512bf16", "-iterations=300"]
    done = subprocess.run(
        command, input="\n".join(text), check=True, capture_output=True, text=True
    )
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if total is None:
        raise RuntimeError(f"llvm-mca says nothing of {loop.function}")
    return int(total[1]) / 300


def _panels(vectors: int, widest: int) -> list[int]:
    """As csrc/gemm.h cuts vectors into panels."""
    count = -(-vectors // widest)
    return [vectors // count + (p < vectors % count) for p in range(count)]


def predict(isa: str, head_dim: int, found: list[Loop]) -> tuple[float, float]:
    """(cycles per score, share of the peak of the products) of the inner loops, for a full block.

    The peak is two products per cycle, of AMX one in 16, none of them on padding.
    """
    dot, width, pair = ISAS[isa]
    every = [m for m in micro_tiles(found) if m.dot == dot]
    if isa == "amx_bf16":
        widest = max(every, key=lambda m: m.vectors)
        turn = {1: cycles(widest.loop) / (widest.vectors * TILE)}
        depth, peak = pair * TILE, 2 * TILE * TILE * pair * TILE / TILE_PRODUCT
    else:
        turn = {m.vectors: cycles(m.loop) / m.rows for m in every if m.rows >= 6}
        depth, peak = pair, 2 * 2 * width * pair
    keys = sum(turn[v] for v in _panels(BLOCK_KEYS // width, max(turn)))  # per row and turn
    values = sum(turn[v] for v in _panels(-(-head_dim // width), max(turn)))
    products = (keys * -(-head_dim // depth) + values * (BLOCK_KEYS // depth)) / BLOCK_KEYS
    softmax = (cycles(exponentials(found, dot)) + 1) / width  # and a maximum per vector
    total = products + softmax
    return total, 4 * head_dim / peak / total


def table() -> str:
    """The predictions, in Markdown."""
    out = ["| instruction set | micro-tile | instructions for products | softmax, instructions |"]
    out[0] += "".join(f" d = {d} |" for d in HEAD_DIMS)
    out.append("|" + "---|" * (4 + len(HEAD_DIMS)))
    with tempfile.TemporaryDirectory() as folder:
        for isa, (dot, width, _) in ISAS.items():
            found = loops(compiled(isa, Path(folder)))
            widest = max(
                (m for m in micro_tiles(found) if m.dot == dot), key=lambda m: (m.vectors, m.rows)
            )
            cells = [f"`{isa}`", f"{widest.rows:.0f} × {widest.vectors * width}"]
            if isa == "amx_bf16":
                cells = [f"`{isa}` (computed)", f"{widest.vectors * TILE} × {TILE}"]
            cells.append(f"{len(widest.loop.text)} for {widest.loop.dots}")
            cells.append(f"{len(exponentials(found, dot).text)} for {width}")
            for d in HEAD_DIMS:
                total, share = predict(isa, d, found)
                cells.append(f"{total:.2f} ({100 * share:.0f} %)")
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def write(page: Path, text: str, mark: str = START) -> None:
    """Put a table into a page, between a mark and the end."""
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{mark}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """The command line: 0 done, 1 the gate is shut, 2 a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/cpu.md")
    parser.add_argument("--object", type=Path, help="read this file's inner loops instead")
    options = parser.parse_args()
    if problem := missing() or ("" if shutil.which("llvm-mca") else "no llvm-mca"):
        print(problem)
        return 2
    if options.object:
        for loop in loops(options.object):
            print(
                f"{cycles(loop):7.2f} cycles  {len(loop.text):3} instructions  {loop.dots:3} "
                f"products  {loop.spills} on the stack  {loop.function[:60]}"
            )
        return 0
    found = table()
    print(found)
    if options.write:
        write(PAGE, found)
    with tempfile.TemporaryDirectory() as folder:
        wrong = [w for isa in ISAS for w in violations(isa, loops(compiled(isa, Path(folder))))]
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
