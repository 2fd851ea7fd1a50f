"""Who watches a call: whether it has to go through the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def unseen(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody would see that an eager call went through an op: no tracer, profiler,
    transform or dispatch mode, plain tensors only, and nothing to differentiate. Dispatch costs
    three times what checking a call does."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )
