"""What a layer costs, official against ours: operations that launch something, and bytes that they
read and write. Counted while real layers of SDXL run; `--write` puts the table into docs/cost.md.

    python benchmarks/layer_cost.py [--write]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cost.md"
START, END = "<!-- table: benchmarks/layer_cost.py -->", "<!-- end -->"
SHAPES = {"4096 tokens, 10 heads": (4096, 10), "1024 tokens, 20 heads": (1024, 20)}
TEXT, WIDTH, HEAD, TOKENS = 77, 2048, 64, 4
OURS = "styleattn::attention"
FREE = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view", "lift_fresh")


@dataclass
class Cost:
    """Of one call of a layer.

    Args:
        attentions: softmaxes that were asked for by themselves.
        launches: operations that are no views and no allocations; ours counts once.
        moved: bytes that they read and write, each tensor once per operation.
    """

    attentions: int = 0
    launches: int = 0
    moved: int = 0


class Counting(TorchDispatchMode):
    """Counts what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE:
            return out
        self.cost.launches += 1
        self.cost.attentions += "scaled_dot_product" in name or func._schema.name == OURS
        self.cost.moved += sum(_bytes(t) for t in tree_leaves((args, kwargs, out)))
        return out


def _bytes(x: Any) -> int:
    """Of the elements that a tensor has in memory: what is broadcast counts once."""
    if not isinstance(x, Tensor):
        return 0
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def counted(call: Callable[[], object]) -> Cost:
    """The cost of a call in the middle of a run: what is made once has been made."""
    with torch.no_grad():
        call()
        with Counting() as mode:
            call()
    return mode.cost


def cross_layer(tokens: int, heads: int, adapters: int, images: int, masked: bool) -> list[Cost]:
    """Cross-attention with loaded IP-Adapters: diffusers' processor, and the one of styleattn."""
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    inner = heads * HEAD
    attn = Attention(inner, WIDTH, heads=heads, dim_head=HEAD).eval()
    x, text = torch.randn(2, tokens, inner), torch.randn(2, TEXT, WIDTH)
    shown = [torch.randn(2, images, TOKENS, WIDTH) for _ in range(adapters)]
    base = IPAdapterAttnProcessor2_0(inner, WIDTH, (TOKENS,) * adapters, 0.7)
    side = round(tokens**0.5)
    masks = [torch.ones(1, images, side, side)] * adapters if masked else None
    arguments: dict[str, Any] = {"encoder_hidden_states": (text, shown)}
    if masks is not None:
        arguments["ip_adapter_masks"] = masks
    costs = []
    with at_work(attn, base, shown) as styled:
        for processor in (base, styled):
            costs.append(counted(lambda p=processor: p(attn, x, **arguments)))  # type: ignore[misc]
    return costs


@contextmanager
def at_work(attn: Any, base: Any, shown: list[Tensor]) -> Iterator[Any]:
    """The processor of a layer as `apply` leaves it, within a call of its UNet."""
    from styleattn.methods import IPAdapter, Layer, Rows
    from styleattn.processors._attention import STATE
    from styleattn.processors._controller import Controller, Now
    from styleattn.processors._cross import CrossSite, Entry
    from styleattn.processors._prompts import Prompts

    prompts = Prompts({})
    prompts.sources = list(shown)
    controller = Controller([IPAdapter()], [()], None, None, None, prompts)
    site = CrossSite(controller, Layer("attn2", 0, 1), [Entry(0, 1.0, ())], base)
    controller.now = Now(Rows(2, 1, ()), (1.0,), ((),), (1, 1))
    setattr(attn, STATE, site)
    try:
        yield site.processor(base)
    finally:
        delattr(attn, STATE)


def shared_layer(tokens: int, heads: int, rows: int) -> list[Cost]:
    """StyleAligned between the projections: AdaIN passes and concatenations as its authors have
    them, and the operation. `rows` per half, the first one the reference."""
    from styleattn import shared_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(2 * rows, heads, tokens, HEAD) for _ in range(3))
    reference = [0] * rows + [rows] * rows

    def adain(y: Tensor) -> Tensor:
        mean, std = y.mean(-2, keepdim=True), (y.var(-2, keepdim=True) + 1e-5).sqrt()
        return (y - mean) / std * std[reference] + mean[reference]

    def official() -> Tensor:
        query, key = adain(q), adain(k)
        keys = torch.cat([key, key[reference]], -2)
        values = torch.cat([v, v[reference]], -2)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    return [
        counted(official),
        counted(lambda: shared_attention(q, k, v, reference_rows=torch.tensor(reference))),
    ]


def injected_layer(tokens: int, heads: int, rows: int) -> list[Cost]:
    """StyleID between the projections: its authors blend and sharpen the query and copy the style's
    keys and values to every row; and the operation."""
    from styleattn import injected_attention

    torch.manual_seed(0)
    q, content = (torch.randn(rows, heads, tokens, HEAD) for _ in range(2))
    k, v = (torch.randn(1, heads, tokens, HEAD) for _ in range(2))

    def official() -> Tensor:
        query = (0.75 * content + 0.25 * q) * 1.5
        keys, values = (torch.cat([x] * rows) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    return [counted(official), counted(lambda: injected_attention(q, k, v, content_query=content))]


def rows() -> Iterator[tuple[str, str, list[Cost]]]:
    """Every case: what it is, the layer, and the costs."""
    cases = {
        "IP-Adapter, 1 image": (1, 1, False),
        "IP-Adapter, 4 images": (1, 4, False),
        "InstantStyle-Plus, content and style": (2, 1, False),
        "IP-Adapter, 3 adapters": (3, 1, False),
        "IP-Adapter, 2 images with masks": (1, 2, True),
    }
    for name, case in cases.items():
        for layer, (tokens, heads) in SHAPES.items():
            yield name, layer, cross_layer(tokens, heads, *case)
    layer = "1024 tokens, 20 heads"
    yield "StyleAligned, 2 pictures", layer, shared_layer(*SHAPES[layer], 2)
    yield "StyleID, 2 pictures", layer, injected_layer(*SHAPES[layer], 2)


def table() -> str:
    """As Markdown."""
    lines = [
        "| method | layer | attention calls | launches | MB moved |",
        "|---|---|---|---|---|",
    ]
    for name, layer, (official, ours) in rows():
        pairs = [
            f"{official.attentions} → {ours.attentions}",
            f"{official.launches} → {ours.launches}",
            f"{official.moved / 1e6:.1f} → {ours.moved / 1e6:.1f}",
        ]
        lines.append(f"| {name} | {layer} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/cost.md")
    made = table()
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
