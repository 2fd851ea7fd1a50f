"""The tables of times in README.md and docs/cpu.md, from a CSV alone.

python benchmarks/pages.py     # writes both; a test holds the pages to the CSV
"""

from __future__ import annotations

from pathlib import Path

from cpu_gate import PAGE, ROOT, write
from plot import table
from results import RESULTS, Row, load

SOURCE = RESULTS / "amd-epyc-zen3-2c.csv"
MARK = "<!-- table: benchmarks/pages.py -->"
HEADLINES = (
    "sdxl-4096",
    "sdxl-1024-shared-b4",
    "sdxl-1024-shared-b4-shift",
    "sd15-4096-injected",
    "sdxl-4096-ip-16",
    "sdxl-4096-csgo",
)


def pages() -> dict[Path, str]:
    """Each page with its table."""
    rows = load(SOURCE)
    limits = [row for row in rows if row.kind == "limit"]

    def of(names: tuple[str, ...] | None) -> str:
        found: list[Row] = [r for r in rows if r.kind != "limit"]
        if names is not None:
            found = [r for n in names for r in found if r.shape == n and r.threads == 1]
        order = {"float32": 0, "bfloat16": 1, "float16": 2}
        found.sort(key=lambda r: (r.threads, order[r.dtype]))
        return table([*limits, *found])

    return {ROOT / "README.md": of(HEADLINES), PAGE: of(None)}


def main() -> int:
    """Write both pages."""
    for page, text in pages().items():
        write(page, text, MARK)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
