"""The one registry of contestants: ours on every backend, the official formulation, and libraries.

    ours-<backend>      the public functions, statistics included
    official            as the method's own code writes it, in eager PyTorch
    official-compiled   the same under torch.compile
    sdpa[-cudnn]        PyTorch's attention, given everything materialised in memory
    flex                FlexAttention, compiled, likewise; biases by score_mod
    xformers, sage      likewise, where they are installed

Libraries are given transformed, concatenated keys and values for nothing: what they are charged is
the attention alone, which is less than any use of them could cost. The official formulation pays
for everything, as ours does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case
from formulations import FORMULATIONS, Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from styleattn.backends import reasons_against

Run = Callable[[], Tensor]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Provider:
    """A contestant.

    Args:
        prepare: everything that is not timed; gives the call that is.
        reasons: why it cannot run a case; empty if it can.
        group: "ours", "official" or "library".
        quantised: computes in 8 bits; its error budget starts from that format's step.
        usual: runs unless others are asked for.
    """

    name: str
    prepare: Callable[[Case], Run]
    reasons: Callable[[Case], list[str]]
    group: str
    quantised: bool = False
    usual: bool = True

    def budget(self, case: Case) -> float:
        """The error above which a result counts as wrong."""
        return case.budget + (2 / 127 if self.quantised else 0.0)


def _none(case: Case) -> list[str]:
    return []


def _ours(backend: str | None) -> Provider:
    def reasons(case: Case) -> list[str]:
        return [] if backend is None else reasons_against(backend, case.tensors["query"], ())

    def prepare(case: Case) -> Run:
        return lambda: case.ours(backend)

    usual = backend not in (None, "reference")
    return Provider(f"ours-{backend or 'auto'}", prepare, reasons, "ours", usual=usual)


def _official(case: Case) -> Run:
    return case.official


def _official_compiled(case: Case) -> Run:
    compiled = torch.compile(FORMULATIONS[case.problem.kind].official, dynamic=False)
    return lambda: compiled(case.problem, case.tensors)


def _combine(attentions: list[Attention], one: Callable[[Attention], Tensor]) -> Tensor:
    out = one(attentions[0])
    for attention in attentions[1:]:
        out = torch.add(out, one(attention), alpha=attention.weight)
    return out


def _sdpa(backend: SDPBackend | None) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        attentions = case.materialised()
        biases = {id(a): a.bias() for a in attentions}

        def one(a: Attention) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                a.query, a.key, a.value, attn_mask=biases[id(a)], scale=a.scale
            )

        def run() -> Tensor:
            if backend is None:
                return _combine(attentions, one)
            with sdpa_kernel(backend):
                return _combine(attentions, one)

        return run

    return prepare


def _cudnn_reasons(case: Case) -> list[str]:
    reasons = []
    if case.device.type != "cuda":
        reasons.append(f"cuDNN runs on cuda, not on {case.device.type}")
    if case.dtype not in HALF:
        reasons.append(f"cuDNN attention takes half precision, not {case.dtype}")
    return reasons


def _flex(case: Case) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def bound(a: Attention) -> Run:
        columns, rows = a.key_bias, a.row_bias
        if columns is None:
            return lambda: compiled(a.query, a.key, a.value, scale=a.scale)

        def score_mod(score, b, h, i, j):  # type: ignore[no-untyped-def]
            return score + (columns[j] if rows is None else rows[i] * columns[j])

        return lambda: compiled(a.query, a.key, a.value, score_mod=score_mod, scale=a.scale)

    attentions = case.materialised()
    runs = {id(a): bound(a) for a in attentions}
    return lambda: _combine(attentions, lambda a: runs[id(a)]())


def _flex_reasons(case: Case) -> list[str]:
    if case.device.type == "cpu" and "avx" not in torch.backends.cpu.get_cpu_capability().lower():
        return ["FlexAttention on a CPU needs AVX2"]
    return []


def _xformers(case: Case) -> Run:
    attend = importlib.import_module("xformers.ops").memory_efficient_attention

    def one(a: Attention) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (a.query, a.key, a.value))
        bias = a.bias()
        if bias is not None:
            bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], -1)
        return attend(q, k, v, attn_bias=bias, scale=a.scale).transpose(1, 2)

    attentions = case.materialised()
    return lambda: _combine(attentions, one)


def _guest_reasons(package: str) -> Callable[[Case], list[str]]:
    def reasons(case: Case) -> list[str]:
        found = []
        if importlib.util.find_spec(package) is None:
            found.append(f"{package} is not installed")
        if case.device.type != "cuda":
            found.append(f"{package} has no kernels for {case.device.type}")
        return found

    return reasons


def _sage(case: Case) -> Run:
    attend = importlib.import_module("sageattention").sageattn

    def one(a: Attention) -> Tensor:
        return attend(a.query, a.key, a.value, tensor_layout="HND", sm_scale=a.scale)

    attentions = case.materialised()
    return lambda: _combine(attentions, one)


def _sage_reasons(case: Case) -> list[str]:
    reasons = _guest_reasons("sageattention")(case)
    if case.dtype not in HALF:
        reasons.append(f"SageAttention takes half precision, not {case.dtype}")
    if case.problem.head_dim > 128:
        reasons.append(f"SageAttention takes head_dim <= 128, not {case.problem.head_dim}")
    if case.problem.shift != 0.0:
        reasons.append("SageAttention has no additive bias")
    return reasons


PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        *(_ours(name) for name in ("cpu", "triton", "torch", "reference", None)),
        Provider("official", _official, _none, "official"),
        Provider("official-compiled", _official_compiled, _none, "official"),
        Provider("sdpa", _sdpa(None), _none, "library"),
        Provider("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _cudnn_reasons, "library"),
        Provider("flex", _flex, _flex_reasons, "library"),
        Provider("xformers", _xformers, _guest_reasons("xformers"), "library"),
        Provider("sage", _sage, _sage_reasons, "library", quantised=True),
    )
}
