"""Reference rows of a UNet call: put in before it, taken out after it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from styleattn.references import Reference, StyleBank

from ._caller import Caller

PARAMETERS = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a UNet call by name."""
    return {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}


def references_in_rows(method: Any, bank: Any) -> tuple[Reference, ...]:
    """The references of a method whose references are rows: its own, the bank's, or plain ones.

    Raises:
        ValueError: references that need a bank, or a bank of another number.
    """
    own, roles = method.references, getattr(method, "ROLES", ())
    if bank is None:
        for r in own or ():
            if r.image is not None or r.latents is not None:
                raise ValueError(
                    f"{method.name}: a Reference with a picture or latents needs a bank:"
                    " styleattn.build_bank"
                )
        return own or tuple(Reference() for _ in roles or ("style",))
    if own is None and roles and len(bank.references) != len(roles):
        raise ValueError(
            f"{method.name} needs a bank of {len(roles)} references ({', '.join(roles)}), this one"
            f" has {len(bank.references)}"
        )
    if own is not None and len(own) != len(bank.references):
        raise ValueError(
            f"{method.name} has {len(own)} references, the bank {len(bank.references)}; leave them"
            " out to use the bank's"
        )
    return own or bank.references


class BankRows:
    """The references of a bank as rows of a call, and its tensors where the call needs them.

    Args:
        bank: the references.
        control_reference: whether a ControlNet acts on them (with the first image's residuals).
    """

    def __init__(self, bank: StyleBank, control_reference: bool):
        self.bank = bank
        self.control_reference = control_reference
        self.count = len(bank.references)
        self._inputs = bank.inputs
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _place(self, name: str, like: Tensor) -> Tensor:
        """A tensor of the bank where, and in the type in which, the call needs it."""
        source = self._inputs if name == "inputs" else self.bank.conditions[name]
        if torch.compiler.is_compiling():
            return source.to(like.device, like.dtype)
        key = (name, like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = source.to(like.device, like.dtype)
        return self._placed[key]


class RowMaker(BankRows):
    """Adds a bank's references as the first rows of every chunk of a UNet call."""

    def add(self, inputs: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """The arguments of the call with reference rows.

        Raises:
            ValueError: the bank does not fit the call.
        """
        inputs = dict(inputs)
        sample, text = inputs["sample"], inputs["encoder_hidden_states"]
        self._check(sample, text, inputs)
        batch, chunks = sample.shape[0], caller.chunks
        here = self._at(inputs["timestep"], sample)
        inputs["sample"] = _widen(sample, [here] * chunks)
        inputs["encoder_hidden_states"] = _widen(text, self._told("prompt_embeds", text, caller))
        for name in ("timestep", "timestep_cond", "class_labels"):
            x = inputs.get(name)
            if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch and batch > 1:
                inputs[name] = _widen(x, self._like_first(x, chunks))
        for name in ("attention_mask", "encoder_attention_mask"):
            x = inputs.get(name)
            if isinstance(x, Tensor) and x.shape[0] == batch:
                open_ = torch.ones if x.ndim == 2 else torch.zeros
                rows = open_(self.count, *x.shape[1:], dtype=x.dtype, device=x.device)
                inputs[name] = _widen(x, [rows] * chunks)
        added = inputs.get("added_cond_kwargs")
        if added is not None:
            inputs["added_cond_kwargs"] = self._added(added, caller)
        for name in RESIDUALS:
            if inputs.get(name) is not None:
                inputs[name] = self._residuals(inputs[name], batch, chunks)
        return inputs

    def _check(self, sample: Tensor, text: Tensor, inputs: Mapping[str, Any]) -> None:
        inside = tuple(self.bank.inputs.shape[2:])
        reasons = []
        if tuple(sample.shape[1:]) != inside:
            reasons.append(
                f"its latents are {list(inside)}, the call's are {list(sample.shape[1:])}"
            )
        tokens = tuple(self.bank.conditions["prompt_embeds"].shape[1:])
        if tuple(text.shape[1:]) != tokens:
            reasons.append(f"its prompts are {list(tokens)}, the call's are {list(text.shape[1:])}")
        if (inputs.get("cross_attention_kwargs") or {}).get("gligen") is not None:
            reasons.append("GLIGEN inputs have no rows for references")
        if reasons:
            raise ValueError("styleattn: the bank does not fit this call: " + "; ".join(reasons))

    def _at(self, timestep: Any, sample: Tensor) -> Tensor:
        """[R, C, h, w]: the references at the nearest timestep, looked up without leaving the
        device."""
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1)[:1].to(torch.float32)
        labels = self.bank.timesteps.to(sample.device, torch.float32)
        index = (labels - t).abs().argmin().reshape(1)
        return self._place("inputs", sample).index_select(1, index)[:, 0]

    def _told(self, name: str, like: Tensor, caller: Caller) -> list[Tensor]:
        """A condition of the references for every chunk."""
        negative = f"negative_{name}"
        return [self._place(negative if u else name, like) for u in caller.unconditional]

    def _like_first(self, x: Tensor, chunks: int) -> list[Tensor]:
        per_chunk = x.unflatten(0, (chunks, -1))
        return [per_chunk[c, :1].expand(self.count, *x.shape[1:]) for c in range(chunks)]

    def _added(self, added: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        added = dict(added)
        for name in ("text_embeds", "time_ids"):
            if name in added and name not in self.bank.conditions:
                raise ValueError(f"styleattn: the bank has no {name}, this model needs it")
        if "text_embeds" in added:
            told = self._told("text_embeds", added["text_embeds"], caller)
            added["text_embeds"] = _widen(added["text_embeds"], told)
        if "time_ids" in added:
            ids = self._place("time_ids", added["time_ids"])
            added["time_ids"] = _widen(added["time_ids"], [ids] * caller.chunks)
        if "image_embeds" in added:  # zeros are diffusers' own "no image"
            given = added["image_embeds"]
            several = isinstance(given, (list, tuple))
            wide = [
                _widen(x, [x.new_zeros(self.count, *x.shape[1:])] * caller.chunks)
                for x in (given if several else [given])
            ]
            added["image_embeds"] = wide if several else wide[0]
        return added

    def _residuals(self, residuals: Any, batch: int, chunks: int) -> Any:
        def one(x: Tensor) -> Tensor:
            if x.shape[0] != batch:
                return x
            if self.control_reference:
                return _widen(x, self._like_first(x, chunks))
            return _widen(x, [x.new_zeros(self.count, *x.shape[1:])] * chunks)

        return (
            one(residuals)
            if isinstance(residuals, Tensor)
            else type(residuals)(one(x) for x in residuals)
        )

    def strip(self, output: Any, chunks: int) -> Any:
        """The UNet's output without the reference rows."""

        def one(x: Tensor) -> Tensor:
            return x.unflatten(0, (chunks, -1))[:, self.count :].flatten(0, 1)

        if isinstance(output, Tensor):
            return one(output)
        if isinstance(output, tuple):
            return (one(output[0]), *output[1:])
        return type(output)(sample=one(output.sample))


def _widen(x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """x [chunks * n, ...] with the given rows [R, ...] in front of every chunk."""
    parts = x.unflatten(0, (len(rows), -1)).unbind(0)
    return torch.cat(
        [t for new, old in zip(rows, parts, strict=True) for t in (new.to(x.dtype), old)]
    )


def without_control(inputs: Mapping[str, Any], is_reference: Sequence[bool]) -> dict[str, Any]:
    """The call with ControlNet's residuals taken off the reference rows.

    Source: google/style-aligned, pipeline_calls.py, controlnet_call.
    """
    inputs = dict(inputs)

    def one(x: Tensor) -> Tensor:
        if x.shape[0] != len(is_reference):
            return x
        mine = torch.tensor(is_reference, device=x.device).view(-1, *(1 for _ in x.shape[1:]))
        return torch.where(mine, torch.zeros_like(x), x)

    for name in RESIDUALS:
        given = inputs.get(name)
        if given is not None:
            inputs[name] = (
                one(given) if isinstance(given, Tensor) else type(given)(one(x) for x in given)
            )
    return inputs
