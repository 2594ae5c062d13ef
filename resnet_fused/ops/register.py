# SPDX-License-Identifier: BSD-3-Clause
"""Gives the library's ops their fake kernels and their backward by recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused import _extension

Function = Callable[..., Tensor]


def register(op: str, reference: Function, fake: Function) -> None:
    """Register ``fake`` and the autograd formula of ``resnet_fused::op``; nothing to do without the
    library.

    Args:
        op: name of the op.
        reference: differentiable PyTorch code that takes the dispatcher's arguments.
        fake: returns an empty tensor like the kernel's result and raises what the kernel raises.
    """
    if not _extension.available():
        return
    torch.library.register_fake(f"resnet_fused::{op}")(fake)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the reference at the saved inputs; differentiable again."""
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if t else a for t, a in zip(ctx.is_tensor, ctx.others, strict=True)]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need and ctx.is_tensor[i]]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not create_graph:
                for i in wanted:
                    args[i] = args[i].detach().requires_grad_()
            y = reference(*args)
            grads = torch.autograd.grad(
                y, [args[i] for i in wanted], grad, create_graph=create_graph, allow_unused=True
            )
        result: list[Tensor | None] = [None] * len(args)
        for i, g in zip(wanted, grads, strict=True):
            result[i] = g
        return tuple(result)

    torch.library.register_autograd(f"resnet_fused::{op}", backward, setup_context=setup_context)
