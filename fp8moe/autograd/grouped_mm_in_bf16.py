"""The product in BF16, which AUTO takes where FP8 does not pay: PyTorch's own, with PyTorch's own gradients.

What PyTorch's `grouped_mm` takes as it is goes straight to it: a product of a few microseconds is mostly host time, and
an autograd function in Python would double it. What it leaves open is mended by hooks of its node. All else (other
dtypes and strides, a `main_grad`, a trace) goes through `_BF16GroupedMM`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.autograd.gradient_of_b import gradient_of_b, needs_db, or_nothing
from fp8moe.autograd.main_grad import with_main_grad
from fp8moe.autograd.once import differentiable_once, without_gradient
from fp8moe.gemm.bf16 import (
    are_taken_as_they_are,
    is_taken_as_it_is,
    k_grouped_add_bf16,
    k_grouped_bf16,
    m_grouped_bf16,
)
from fp8moe.rows.unused_rows import zero_unused_rows_
from fp8moe.torch_op import is_traced

OPERATION = "fp8moe.grouped_mm"


def grouped_mm_in_bf16(
    a: Tensor, b: Tensor, ends: Tensor, main_grad: Tensor | None, out_dtype: torch.dtype, *, zero_unused: bool
) -> Tensor:  # fmt: skip
    """`grouped_mm` of arguments that are checked, with the same promises.

    Args:
        a, b, main_grad: as in `grouped_mm`.
        ends: int32 `(E,)`, non-decreasing, at most `M`; not checked.
        out_dtype: of the result.
        zero_unused: whether rows from `ends[-1]` on are zeros in the result and in the gradient of `a`. Else they are
            unspecified, as nobody reads them, or there are none.
    """
    if main_grad is None and out_dtype is torch.bfloat16 and not is_traced(a, b) and are_taken_as_they_are(a, b):
        return _by_pytorch(a, b, ends, zero_unused)
    return _BF16GroupedMM.apply(a, with_main_grad(b, main_grad), ends, out_dtype, main_grad, zero_unused)


def _by_pytorch(a: Tensor, b: Tensor, ends: Tensor, zero_unused: bool) -> Tensor:
    out = F.grouped_mm(a, b, offs=ends)
    node: Any = out.grad_fn
    if node is not None:
        node.register_prehook(_as_pytorch_takes_it)
    if zero_unused:
        zero_unused_rows_(out.detach(), ends)  # unseen by autograd: the node does not know the values of its output
        if node is not None:
            node.register_hook(partial(_with_zeros, ends))
    return out


def _as_pytorch_takes_it(grads: Sequence[Tensor | None]) -> tuple[Tensor] | None:
    """Before PyTorch's backward: it refuses expanded gradients."""
    (dout,) = grads
    if dout is None or is_taken_as_it_is(dout):
        return None
    return (dout.clone(memory_format=torch.contiguous_format),)


def _with_zeros(ends: Tensor, grads: tuple[Tensor | None, ...], _: object) -> tuple[Tensor | None, ...] | None:
    """After PyTorch's backward: the gradient of `a` is new, and nobody else has it yet."""
    da = grads[0]
    if da is not None:
        zero_unused_rows_(da.detach(), ends)
    return without_gradient(OPERATION, grads) if torch.is_grad_enabled() else None


class _BF16GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, ends: Tensor, out_dtype: torch.dtype, main_grad: Tensor | None,
        zero_unused: bool,
    ) -> Tensor:  # fmt: skip
        needs_da, needs_wgrad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_wgrad else None, b if needs_da else None, ends)
        ctx.a_dtype, ctx.b_dtype = a.dtype, b.dtype
        ctx.b_is_contiguous, ctx.zero_unused = b.is_contiguous(), zero_unused
        ctx.main_grad = main_grad
        return m_grouped_bf16(a, b, ends, out_dtype, zero_unused)

    @staticmethod
    @differentiable_once(OPERATION)
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        a, b, ends = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = m_grouped_bf16(dout, b.transpose(1, 2), ends, ctx.a_dtype, ctx.zero_unused)
        if needs_db(ctx):
            db = gradient_of_b(
                a, dout, ctx.b_is_contiguous, ctx.main_grad,
                product=lambda lhs, rhs: k_grouped_bf16(lhs, rhs, ends, ctx.b_dtype),
                add=lambda lhs, rhs, into: k_grouped_add_bf16(lhs, rhs, ends, into),
            )  # fmt: skip
        return da, or_nothing(ctx, db), None, None, None, None
