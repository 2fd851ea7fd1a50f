"""Image prompts of a styled UNet: their tokens, which rows see them, and those that the host
brings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor

from styleattn.methods import CrossCall, EncoderMethod, ImagePrompt
from styleattn.methods._base import off
from styleattn.references import Reference

from ._caller import Caller

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

    def __init__(self, of: Mapping[int, Sequence[Prompt]]):
        self.of = {i: tuple(prompts) for i, prompts in of.items()}
        self.sources: list[Any] = []
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": [], "_chosen": {}}

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
            if off(gate):
                continue
            found = []
            for index, prompt in enumerate(self.of.get(entry.method, ())):
                if off(strengths[index]):
                    continue
                keys, values = site.key_value(prompt, query, query.shape[1])
                rows = torch.tensor(_rows(prompt.reference, now))
                mask = _mask(prompt.reference.mask, query)
                found.append(ImagePrompt(keys, values, rows, strengths[index], mask, index))
            numbers = controller.numbers_of(entry.method)
            yield (
                method,
                CrossCall(
                    site.layer, query, key, value, key_bias, tuple(found), now.rows, gate, numbers
                ),
            )

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
) -> tuple[Prompt, ...]:
    """The prompts of a method's references; none where its images come with the pipeline's call.

    Args:
        sizes: cross-attention layers of the model in order, with (heads * head_dim, width of the
            text).

    Raises:
        ValueError: references without a picture or embeddings, or an adapter without references.
    """
    adapter: Any = method.adapter
    if adapter is None:
        if references:
            raise ValueError(
                f"{method.name} has references but no adapter to make their tokens; without one the"
                " images are those of the pipeline's call (`ip_adapter_image=`)"
            )
        return ()
    if not references:
        raise ValueError(f"{method.name} has an adapter but no references to show it")
    found = []
    for reference in references:
        if reference.embeds is None:
            raise ValueError(
                f"{method.name}: a reference of an encoder method needs `embeds`, the image"
                " encoder's output"
            )
        embeds = reference.embeds[None]
        with torch.no_grad():
            tokens = adapter.tokens(torch.cat([adapter.negative(embeds), embeds]))
        found.append(Prompt(adapter, tokens, reference))
    return tuple(found)


def _rows(reference: Reference, now: Now) -> list[int]:
    """For every row of the call, the row of a prompt's tokens that it sees."""
    rows, found = now.rows, []
    for chunk in range(rows.chunks):
        nothing = bool(rows.unconditional) and rows.unconditional[chunk]
        for row in range(rows.count):
            prompt = (row - now.added) // now.each
            seen = row >= now.added and (reference.prompts is None or prompt in reference.prompts)
            found.append((0 if nothing else 1) if seen else -1)
    return found


def _mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask on a layer's grid, [N], resized as diffusers resizes it."""
    if mask is None:
        return None
    small = IPAdapterMaskProcessor.downsample(mask[None].float(), 1, query.shape[2], 1)
    return small[0, :, 0].to(query.device)
