"""Image prompts of a styled UNet: their tokens, which rows see them, and those that the host
brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor

from styleattn.methods import CrossCall, EncoderMethod, ImagePrompt
from styleattn.methods._base import off
from styleattn.references import Reference

from ._caller import Caller
from ._pictures import Eye, adapter_of, check_adapter

if TYPE_CHECKING:
    from ._controller import Controller, Now
    from ._cross import CrossSite


@dataclass(frozen=True, eq=False)
class Prompt:
    """One reference of an encoder method, ready for any layer.

    Args:
        adapter: what makes its keys and values.
        tokens: [2, M, C]: row 0 without an image, row 1 with it.
        reference: weights, mask and prompts of the reference.
    """

    adapter: Any
    tokens: Tensor
    reference: Reference


class Prompts:
    """The image prompts of a controller's encoder methods.

    Args:
        of: per method (by position in the controller), its prompts; row methods have none.
    """

    def __init__(self, of: Mapping[int, Sequence[Prompt | None]]):
        self.of = {i: tuple(prompts) for i, prompts in of.items()}
        self.sources: list[Any] = []
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": [], "_chosen": {}, "_kept": {}}

    def calls(
        self,
        controller: Controller,
        now: Now,
        site: CrossSite,
        text: tuple[Tensor, Tensor, Tensor, Tensor | None],
    ) -> Iterator[tuple[EncoderMethod, CrossCall]]:
        """What every method of a layer is asked, those at rest left out."""
        query, key, value, key_bias = text
        for entry in site.entries:
            method: Any = controller.methods[entry.method]
            gate, strengths = controller.strengths(entry, now)
            if off(gate) and method.adapter is not None:
                continue
            found = []
            for index, prompt in enumerate(self.of.get(entry.method, ())):
                if prompt is None or off(strengths[index]):
                    continue
                keys, values = site.key_value(prompt, query, query.shape[1])
                rows = self._rows(prompt.reference, now, query, entry.negative)
                mask = self._mask(prompt.reference.mask, query)
                found.append(ImagePrompt(keys, values, rows, strengths[index], mask, index))
            numbers = controller.numbers_of(entry.method)
            yield (
                method,
                CrossCall(
                    site.layer, query, key, value, key_bias, tuple(found), now.rows, gate, numbers
                ),
            )

    def seen(self, now: Now, query: Tensor) -> Tensor | None:
        """int [B]: every row its own images, and none for the rows of a bank; None where there is
        no bank."""
        if not now.added:
            return None
        count = now.rows.count
        key = (now.rows, now.added, query.device)
        return self._once(
            key, lambda: [-1 if r % count < now.added else r for r in range(query.shape[0])], query
        )

    def _rows(self, reference: Reference, now: Now, query: Tensor, negative: bool) -> Tensor:
        key = (reference.prompts, now.rows, now.added, now.each, query.device, negative)
        return self._once(key, lambda: rows_of(reference, now, negative), query)

    def _mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        if mask is None:
            return None
        key = (id(mask), query.shape[2], query.device)
        return self._once(key, lambda: on_grid(mask, query.shape[2]), query)

    def _once(self, key: Any, make: Callable[[], Any], query: Tensor) -> Tensor:
        """A small tensor on the query's device, made once; a constant under a compiler."""
        found = self._kept.get(key)
        if found is None:
            found = torch.as_tensor(make()).to(query.device)
            if not torch.compiler.is_compiling():
                self._kept[key] = found
        return found

    def source(self, index: int) -> Tensor | None:
        """The embeddings that the host brought for one of its adapters in this call."""
        return self.sources[index] if index < len(self.sources) else None

    def take(self, inputs: dict[str, Any], caller: Caller, count: int) -> dict[str, Any]:
        """Note the embeddings that the host brings, and give every prompt its own where it brings
        one per prompt.

        diffusers repeats a batch of embeddings as a whole for every row, [p0, p1, p0, p1, ..]; the
        rows of one chunk need [p0, p0, .., p1, p1, ..].

        Raises:
            ValueError: a number of embeddings that fits no prompts.
        """
        added = inputs.get("added_cond_kwargs") or {}
        given = added.get("image_embeds")
        self.sources = list(given) if isinstance(given, (list, tuple)) else []
        if not self.sources:
            return inputs
        chosen = [self._choose(i, x, caller, count) for i, x in enumerate(self.sources)]
        return {**inputs, "added_cond_kwargs": {**added, "image_embeds": chosen}}

    def _choose(self, index: int, embeds: Tensor, caller: Caller, count: int) -> Tensor:
        chunks = caller.chunks
        if embeds.shape[0] == chunks * count:
            return embeds
        prompts = count // caller.images_per_prompt
        if embeds.shape[0] != chunks * prompts * count:
            raise ValueError(
                f"styleattn: {embeds.shape[0]} image embeddings of IP-Adapter {index} for"
                f" {prompts} prompts, {caller.images_per_prompt} images each and {chunks} chunks of"
                " guidance; give one embedding for all prompts or one per prompt"
            )
        kept = self._chosen.get(index)
        if kept is None or kept[0] is not embeds:
            rows = [r // caller.images_per_prompt for r in range(count)]
            kept = (embeds, embeds.unflatten(0, (chunks, -1))[:, rows].flatten(0, 1))
            self._chosen[index] = kept
        return kept[1]


def prompts_of(
    method: EncoderMethod,
    references: Sequence[Reference],
    sizes: Mapping[str, tuple[int, int]],
    pipe: Any,
    dtype: torch.dtype = torch.float32,
    component: str = "unet",
) -> tuple[Prompt | None, ...]:
    """The prompts of a method's references; none where its images come with the pipeline's call.

    Args:
        sizes: cross-attention layers of the model in order, with (heads * head_dim, width of the
            text).
        dtype: of an adapter that is read from a file.
        component: of the pipeline; references without an adapter for it have the prompt None.

    Raises:
        ValueError: references without a picture or embeddings, an adapter without references, or
            pictures without an encoder.
        FileNotFoundError: no such adapter, picture or encoder.
    """
    own = getattr(method, "adapter_of", None)
    if own is not None and (method.adapter is None or not references):
        raise ValueError(f"{method.name} needs an adapter, and references to show it")
    if method.adapter is None:
        if references:
            raise ValueError(
                f"{method.name} has references but no adapter to make their tokens; without one the"
                " images are those of the pipeline's call (`ip_adapter_image=`)"
            )
        return ()
    if not references:
        raise ValueError(f"{method.name} has an adapter but no references to show it")
    adapter = adapter_of(method, sizes, dtype)
    found: list[Prompt | None] = []
    for index, reference in enumerate(references):
        if own is not None:
            adapter = own(index, component)
        if adapter is None and component != "unet":
            found.append(None)
            continue
        if adapter is None:
            kind = type(method.adapter).__name__
            raise ValueError(
                f"{method.name}: its adapter, a {kind}, lacks one for reference {index}"
            )
        check_adapter(method.name, adapter, ("tokens", "negative", "key_value"))
        eye = Eye(method, adapter, pipe)
        embeds = eye.embeds(reference)
        pair = torch.stack([eye.negative(reference, embeds), embeds])
        with torch.no_grad():
            tokens = adapter.tokens(_beside(adapter, pair))
        found.append(Prompt(adapter, tokens, reference))
    return tuple(found)


def _beside(adapter: Any, x: Tensor) -> Tensor:
    """x where the adapter's weights are."""
    weight = next(adapter.parameters(), None) if isinstance(adapter, torch.nn.Module) else None
    return x if weight is None else x.to(weight.device)


def rows_of(reference: Reference, now: Now, negative: bool) -> list[int]:
    """For every row of the call, the row of a prompt's tokens that it sees: unconditional rows the
    one without the image, others the one with it. As a negative the image is seen by unconditional
    rows and by no others; without unconditional rows by none."""
    rows, found = now.rows, []
    for chunk in range(rows.chunks):
        nothing = bool(rows.unconditional) and rows.unconditional[chunk]
        shown = (1 if nothing else -1) if negative else (0 if nothing else 1)
        for row in range(rows.count):
            prompt = (row - now.added) // now.each
            seen = row >= now.added and (reference.prompts is None or prompt in reference.prompts)
            found.append(shown if seen else -1)
    return found


def on_grid(mask: Tensor, tokens: int) -> Tensor:
    """A mask [h, w] on a layer's grid, [N], resized as diffusers resizes it (bicubic: it may leave
    [0, 1])."""
    return IPAdapterMaskProcessor.downsample(mask[None].float(), 1, tokens, 1)[0, :, 0]
