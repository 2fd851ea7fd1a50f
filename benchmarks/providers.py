"""The one registry of contestants: ours on every backend, the official formulation, and libraries.

    ours-<backend>      the public functions, statistics included
    ours-fast           the same with precision="fast", where our kernels run
    official            as the method's own code writes it, in eager PyTorch
    official-compiled   the same under torch.compile
    sdpa[-KERNEL]       PyTorch's attention, given everything materialised in memory
    flex                FlexAttention, compiled and tuned, likewise; biases by score_mod
    flex-merged         the same in two calls with our algebra, merged by their log-sum-exp
    fa2, fa3, fa4       Dao-AILab's kernels, likewise, where they are installed
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
from typing import Any

import torch
from cases import Case
from folded import fold_shared
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
        group: "ours", "fast", "official" or "library".
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


def _fast(case: Case) -> Run:
    ours = FORMULATIONS[case.problem.kind].ours
    return lambda: ours(case.problem, case.tensors, "triton", precision="fast")


def _fast_reasons(case: Case) -> list[str]:
    reasons = reasons_against("triton", case.tensors["query"], ())
    if case.problem.kind not in ("plain", "shared"):
        reasons.append("keys are few, or biased")
    if case.dtype not in HALF:
        reasons.append(f"precision='fast' takes half precision, not {case.dtype}")
    return reasons


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


def _kernel_reasons(name: str, masks: bool = True) -> Callable[[Case], list[str]]:
    """Why one of PyTorch's own CUDA kernels cannot run a case."""

    def reasons(case: Case) -> list[str]:
        found = []
        if case.device.type != "cuda":
            found.append(f"{name} runs on cuda, not on {case.device.type}")
        if case.dtype not in HALF:
            found.append(f"{name} attention takes half precision, not {case.dtype}")
        if not masks and case.problem.shift != 0.0:
            found.append(f"{name} attention takes no mask")
        return found

    return reasons


def _tuned(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """Compiled, on a GPU with every configuration tried."""
    mode = "max-autotune-no-cudagraphs" if case.device.type == "cuda" else None
    return torch.compile(function, dynamic=False, mode=mode)  # type: ignore[no-any-return]


def _flex(case: Case) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = _tuned(flex_attention, case)

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


def _flex_merged(case: Case) -> Run:
    """FlexAttention's strongest form of shared attention, by our algebra: AdaIN of the keys folded
    into two queries, own and reference keys each by a call of their own, merged by their LSE. The
    folds are given for nothing."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    folded = fold_shared(case)

    def both(q_own, q_ref, key, value, own_term, ref_term, rows, targets):  # type: ignore[no-untyped-def]
        aux = AuxRequest(lse=True)
        one, first = flex_attention(q_own, key, value, scale=folded.scale, return_aux=aux)
        k, v = key[rows], value[rows]
        two, second = flex_attention(q_ref, k, v, scale=folded.scale, return_aux=aux)
        share = torch.sigmoid((second.lse + ref_term) - (first.lse[targets] + own_term))
        mixed = torch.lerp(one[targets].float(), two.float(), share[..., None])
        return one.index_copy(0, targets, mixed.to(one.dtype))

    compiled = _tuned(both, case)
    return lambda: compiled(*folded.tensors)


def _flex_merged_reasons(case: Case) -> list[str]:
    reasons = [] if case.problem.kind == "shared" else ["only for shared attention"]
    if case.device.type != "cuda":
        reasons.append("FlexAttention gives no log-sum-exp on a CPU")
    return reasons


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


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _guest_reasons(package: str) -> Callable[[Case], list[str]]:
    def reasons(case: Case) -> list[str]:
        found = []
        if not _installed(package):
            found.append(f"{package} is not installed")
        if case.device.type != "cuda":
            found.append(f"{package} has no kernels for {case.device.type}")
        return found

    return reasons


def _flash(module: str) -> Callable[[Case], Run]:
    """Dao-AILab's kernels: [B, N, H, D], no bias."""

    def prepare(case: Case) -> Run:
        attend = importlib.import_module(module).flash_attn_func

        def one(a: Attention) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (a.query, a.key, a.value))
            out = attend(q, k, v, softmax_scale=a.scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        attentions = case.materialised()
        return lambda: _combine(attentions, one)

    return prepare


def _flash_reasons(module: str) -> Callable[[Case], list[str]]:
    def reasons(case: Case) -> list[str]:
        found = _guest_reasons(module)(case)
        if case.dtype not in HALF:
            found.append(f"{module} takes half precision, not {case.dtype}")
        if case.problem.shift != 0.0:
            found.append(f"{module} is not given biases")
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
        Provider("ours-fast", _fast, _fast_reasons, "fast", quantised=True, usual=False),
        Provider("official", _official, _none, "official"),
        Provider("official-compiled", _official_compiled, _none, "official"),
        Provider("sdpa", _sdpa(None), _none, "library"),
        *(
            Provider(f"sdpa-{name.lower()}", _sdpa(kernel), _kernel_reasons(name, masks), "library")
            for name, kernel, masks in (
                ("cuDNN", SDPBackend.CUDNN_ATTENTION, True),
                ("flash", SDPBackend.FLASH_ATTENTION, False),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION, True),
            )
        ),
        Provider("flex", _flex, _flex_reasons, "library"),
        Provider("flex-merged", _flex_merged, _flex_merged_reasons, "library"),
        *(
            Provider(name, _flash(module), _flash_reasons(module), "library")
            for name, module in (
                ("fa2", "flash_attn"),
                ("fa3", "flash_attn_interface"),
                ("fa4", "flash_attn.cute"),
            )
        ),
        Provider("xformers", _xformers, _guest_reasons("xformers"), "library"),
        Provider("sage", _sage, _sage_reasons, "library", quantised=True),
    )
}
