"""Rows of a FLUX call: a bank's references put in before it and taken out after it, ControlNet and
image embeddings by row."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from styleattn.inversion.flow_host import image_ids, packed
from styleattn.references import StyleBank

from ._caller import Caller
from ._rows import BankRows

RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples")
_NEAR = 0.5
"""How far a run's noise level may be from the bank's, of 1000."""


class FluxRowMaker(BankRows):
    """Adds a bank's references as the first rows of a FLUX call, and takes them out again.

    They are told their own prompts (in the unconditional call of true CFG the bank's negative one)
    and, with the other rows, the call's guidance scale. Adapters that diffusers has loaded show
    them no picture: zeros for its embeddings.
    """

    def __init__(self, bank: StyleBank, control_reference: bool):
        super().__init__(bank, control_reference)
        inputs = bank.inputs
        # packed, [R, N, S, 4C]
        self._inputs = packed(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        self._passed: list[Any] = [None, None]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}, "_passed": [None, None]}

    def add(self, inputs: Mapping[str, Any], caller: Caller, level: Any) -> dict[str, Any]:
        """The arguments of the call with reference rows.

        Args:
            level: the noise level, 0 to 1000.

        Raises:
            ValueError: the bank does not fit the call; all reasons at once.
        """
        inputs = dict(inputs)
        image = inputs["hidden_states"]
        self._check(inputs, caller)
        batch, negative = image.shape[0], "negative_" if caller.unconditional[0] else ""
        inputs["hidden_states"] = torch.cat([self._at(level, image), image])
        for name, told in (
            ("encoder_hidden_states", "prompt_embeds"),
            ("pooled_projections", "text_embeds"),
        ):
            x = inputs[name]
            inputs[name] = torch.cat([self._place(negative + told, x), x])
        for name in ("timestep", "guidance"):
            x = inputs.get(name)
            if isinstance(x, Tensor) and x.ndim and x.shape[0] == batch:
                inputs[name] = torch.cat([x[:1].expand(self.count, *x.shape[1:]), x])
        for name in RESIDUALS:
            given = inputs.get(name)
            if given is not None:
                inputs[name] = type(given)(self._residual(x, batch) for x in given)
        kwargs = inputs.get("joint_attention_kwargs") or {}
        pictures = kwargs.get("ip_adapter_image_embeds")
        if pictures is not None:
            wide = [torch.cat([x.new_zeros(self.count, *x.shape[1:]), x]) for x in pictures]
            inputs["joint_attention_kwargs"] = {**kwargs, "ip_adapter_image_embeds": wide}
        return inputs

    def _residual(self, x: Tensor, batch: int) -> Tensor:
        if x.shape[0] != batch:
            return x
        first = x[:1].expand(self.count, *x.shape[1:])
        return torch.cat([first if self.control_reference else torch.zeros_like(first), x])

    def _check(self, inputs: Mapping[str, Any], caller: Caller) -> None:
        image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        height, width = self.bank.latents.shape[3:]
        reasons = []
        if image.shape[1] != height // 2 * (width // 2):
            reasons.append(
                f"its pictures have {height // 2} x {width // 2} tokens, the call's image"
                f" {image.shape[1]}"
            )
        elif not self._same(0, inputs["img_ids"], self._places):
            reasons.append(
                f"the call's image tokens are not those of a picture of {height // 2} x"
                f" {width // 2}"
            )
        tokens = self.bank.conditions["prompt_embeds"].shape[1]
        if text.shape[1] != tokens:
            reasons.append(
                f"its prompts have {tokens} tokens, the call's {text.shape[1]}"
                " (max_sequence_length)"
            )
        if caller.timesteps is not None and not self._same(1, caller.timesteps, self._levels):
            known = self.bank.timesteps
            reasons.append(
                f"its {len(known)} noise levels ({float(known[0]):.1f} to {float(known[-1]):.1f})"
                " are not those of this run: use its number of steps, size and scheduler"
            )
        if reasons:
            raise ValueError("styleattn: the bank does not fit this call: " + "; ".join(reasons))

    def _same(self, index: int, x: Tensor, passes: Any) -> bool:
        """Whether a tensor of the call passes: looked at once, because looking waits for the
        device."""
        if torch.compiler.is_compiling():
            return True
        known = self._passed[index]
        if known is None or known[0]() is not x or known[1] != x._version:
            if not passes(x):
                return False
            self._passed[index] = (weakref.ref(x), x._version)
        return True

    def _places(self, ids: Tensor) -> bool:
        flat = (ids[0] if ids.ndim == 3 else ids).float()
        height, width = self.bank.latents.shape[3:]
        return torch.equal(flat, image_ids(height, width, flat.device))

    def _levels(self, timesteps: Tensor) -> bool:
        known = self.bank.timesteps.to(timesteps.device, torch.float32)
        gaps = (timesteps.float()[:, None] - known).abs().amin(1)
        return bool((gaps <= _NEAR).all())

    def _at(self, level: Any, image: Tensor) -> Tensor:
        """[R, S, 4C]: the references at the nearest noise level, looked up without leaving the
        device."""
        t = torch.as_tensor(level, device=image.device).reshape(1).to(torch.float32)
        known = self.bank.timesteps.to(image.device, torch.float32)
        index = (known - t).abs().argmin().reshape(1)
        return self._place("inputs", image).index_select(1, index)[:, 0]

    def strip(self, output: Any) -> Any:
        """The transformer's output without the reference rows."""
        if isinstance(output, Tensor):
            return output[self.count :]
        if isinstance(output, tuple):
            return (output[0][self.count :], *output[1:])
        return type(output)(sample=output.sample[self.count :])


def images_of_prompts(inputs: dict[str, Any], batch: int, each: int) -> dict[str, Any]:
    """The call with every prompt's own image embeddings, where an adapter gets one per prompt.

    diffusers repeats a batch of embeddings as a whole for every row, [p0, p1, p0, p1, ..], and then
    shows every row all of them; the rows need [p0, .., p1, ..].

    Raises:
        ValueError: a number of embeddings that fits no prompts.
    """
    kwargs = inputs.get("joint_attention_kwargs") or {}
    given = kwargs.get("ip_adapter_image_embeds")
    if not isinstance(given, (list, tuple)) or all(x.shape[0] == batch for x in given):
        return inputs
    chosen = []
    for n, x in enumerate(given):
        prompts, rest = divmod(x.shape[0], batch)
        if x.shape[0] != batch and (rest or prompts * each != batch):
            raise ValueError(
                f"styleattn: {x.shape[0]} image embeddings of IP-Adapter {n} for {batch} rows; give"
                " one for all prompts or one per prompt"
            )
        chosen.append(x if x.shape[0] == batch else x[:prompts].repeat_interleave(each, 0))
    return {**inputs, "joint_attention_kwargs": {**kwargs, "ip_adapter_image_embeds": chosen}}


def without_prompts(inputs: dict[str, Any], added: int) -> dict[str, Any]:
    """The call with zeros for what it is told in words, but for the rows that a bank added."""
    names = ("encoder_hidden_states", "pooled_projections")
    told = {n: torch.cat([inputs[n][:added], torch.zeros_like(inputs[n][added:])]) for n in names}
    return {**inputs, **told}


def without_control(
    inputs: dict[str, Any], references: Sequence[int], batch: int
) -> dict[str, Any]:
    """The call with ControlNet's residuals taken off the reference rows."""
    inputs = dict(inputs)
    for name in RESIDUALS:
        given = inputs.get(name)
        if given is None:
            continue
        mine = torch.tensor([b in references for b in range(batch)], device=given[0].device)
        inputs[name] = type(given)(
            x.masked_fill(mine[:, None, None], 0.0) if x.shape[0] == batch else x for x in given
        )
    return inputs
