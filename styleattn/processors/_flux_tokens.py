"""Tokens that methods put next to the text of a FLUX call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from styleattn.methods import Rows
from styleattn.methods._base import Number, off
from styleattn.references import Reference

from ._flux_rows import without_prompts

if TYPE_CHECKING:
    from ._flux_controller import FluxController, FluxNow

Names = tuple[tuple[str | None, ...], ...]
Embedded = tuple[tuple[int, Tensor], ...]


def with_tokens(
    controller: FluxController,
    inputs: dict[str, Any],
    lengths: dict[str, int],
    schedule: tuple[tuple[Number, ...], tuple[tuple[Number, ...], ...]],
    rows: Rows,
    shape: tuple[int, int],
) -> tuple[dict[str, Any], Names, Embedded]:
    """A call with the tokens of context methods behind the text: of references that can be seen at
    this step, and not in the unconditional call.

    Args:
        lengths: of the runs so far; those of the tokens are added.
        schedule: gates and weights at this step.
        shape: rows that a bank added, and images per prompt.

    Returns:
        the call, per method and reference the name of its run, and the tokens that enter behind the
        text embedder (zeros keep their places until then).
    """
    if any(getattr(m, "zero_prompt", False) for m in controller.methods):
        inputs = inputs if rows.unconditional[0] else without_prompts(inputs, shape[0])
    text, ids = inputs["encoder_hidden_states"], inputs["txt_ids"]
    more, runs, embedded, length = [], [], [], text.shape[1]
    for i, contexts in enumerate(controller.contexts):
        method, references = controller.methods[i], controller.references[i]
        names: list[str | None] = [None] * len(references)
        for r, tokens in enumerate(contexts):
            weight = _weight(references[r], schedule[0][i], schedule[1][i][r])
            if rows.unconditional[0] or off(weight):
                continue
            found = method.weighed(tokens.to(text.device, text.dtype), weight)
            found = _spread(found, rows.count, shape, method.name)
            if method.embedded:
                embedded.append((length, found))
                found = text.new_zeros(*found.shape[:2], text.shape[-1])
            more.append(found)
            length += found.shape[1]
            names[r] = f"{method.name} {i}.{r}"
            lengths[names[r]] = found.shape[1]  # type: ignore[index]
        runs.append(tuple(names))
    if not more:
        return inputs, tuple(runs), ()
    further = ids.new_zeros(*ids.shape[:-2], sum(m.shape[1] for m in more), ids.shape[-1])
    told = {
        "encoder_hidden_states": torch.cat([text, *more], 1),
        "txt_ids": torch.cat([ids, further], -2),
    }
    return {**inputs, **told}, tuple(runs), tuple(embedded)


def _weight(reference: Reference, gate: Number, weight: Number) -> Number:
    """How strongly a reference's tokens enter; 0 for not at all."""
    if off(gate) or off(weight) or off(reference.weight):
        return 0.0
    return reference.weight * gate * weight


def put_in(text: Tensor, embedded: Embedded) -> Tensor | None:
    """The embedded text [B, N, C] with tokens [B, M, C] in their places; None without any."""
    if not embedded:
        return None
    for start, tokens in embedded:
        behind = text[:, start + tokens.shape[1] :]
        text = torch.cat([text[:, :start], tokens.to(text), behind], 1)
    return text


def served(reference: Reference, now: FluxNow) -> Tensor | None:
    """The rows of a reference's run, one for every row of the call; -1 where it is not seen, as by
    a bank's references. None: every row sees its own."""
    prompts, found = reference.prompts, []
    if prompts is None and not now.added:
        return None
    for b in range(now.rows.count):
        prompt = (b - now.added) // now.each
        seen = prompt >= 0 and (prompts is None or prompt in prompts)
        found.append(b if seen else -1)
    return torch.tensor(found)


def _spread(tokens: Tensor, batch: int, shape: tuple[int, int], name: str) -> Tensor:
    """[B, M, C]: tokens of one picture, or of one per prompt, for every row; the rows that a bank
    added, which do not see them, carry the first.

    Raises:
        ValueError: another number of pictures.
    """
    added, each = shape
    if tokens.shape[0] == 1:
        return tokens.expand(batch, -1, -1)
    if tokens.shape[0] * each != batch - added:
        raise ValueError(
            f"{name}: embeddings of {tokens.shape[0]} pictures for {(batch - added) // each}"
            " prompts; give one picture, or one per prompt"
        )
    first = tokens[:1].expand(added, -1, -1)
    return torch.cat([first, tokens.repeat_interleave(each, 0)])
