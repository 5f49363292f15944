"""The activation of experts that compute in BF16, and its gradients: one pass each, quantized by nobody."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8moe.devices import runs_triton
from fp8moe.gate import Gate
from fp8moe.quantize.gated import activation, gradients
from fp8moe.torch_op import torch_op


def gate_and_up(parts: Sequence[Tensor], gate: Gate, interleaved: bool) -> tuple[Tensor | None, Tensor]:
    """Views `(M, I)` of the gate (None where there is none) and of up.

    Args:
        parts: the gate and up, `(M, I)` each; or one tensor `(M, 2I)` of both, without a gate `(M, I)`.
        gate: of the expert.
        interleaved: whether one tensor has the features of both by turns.
    """
    if len(parts) == 2:
        return parts[0], parts[1]
    (both,) = parts
    if not gate.has_gate:
        return None, both
    if interleaved:
        return both[:, 0::2], both[:, 1::2]
    half = both.shape[1] // 2
    return both[:, :half], both[:, half:]


def gated_by_definition(
    parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str, interleaved: bool
) -> Tensor:
    """`gated_in_bf16` in plain PyTorch: the definition."""
    of = Gate.of_code(gate)
    first, up = gate_and_up(parts, of, interleaved)
    act = activation(of, None if first is None else first.float(), up.float())  # of unread rows too
    if weights is not None:
        act = act * _at_rows(weights, choice_row)[:, None]
    return act.bfloat16()


def gradients_by_definition(
    d_act: Tensor, parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str,
    interleaved: bool, zero_unused: bool,
) -> list[Tensor]:  # fmt: skip
    """`gated_in_bf16_backward` in plain PyTorch: the definition."""
    of = Gate.of_code(gate)
    first, up = gate_and_up(parts, of, interleaved)
    first, up = None if first is None else first.float(), up.float()
    made = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    d_act = d_act.float()
    weighted = d_act if weights is None else d_act * _at_rows(weights, choice_row)[:, None]
    targets = gate_and_up(made, of, interleaved)
    for target, values in zip(targets, gradients(of, weighted, first, up), strict=True):
        if target is not None and values is not None:
            target.copy_(values)
    if zero_unused and choice_row is not None:
        used = torch.zeros(d_act.shape[0], dtype=torch.bool, device=d_act.device)
        used[choice_row[choice_row >= 0].long()] = True
        for part in made:
            part.masked_fill_(~used[:, None], 0.0)
    if weights is not None:
        sums = (d_act * activation(of, first, up)).sum(1)
        made.append(sums if choice_row is None else torch.where(choice_row < 0, 0, sums[choice_row.clamp(min=0)]))
    return made


def _at_rows(weights: Tensor, choice_row: Tensor | None) -> Tensor:
    """fp32 `(M,)`."""
    if choice_row is None:
        return weights.float()
    live = choice_row >= 0
    return weights.new_zeros(weights.numel(), dtype=torch.float32).index_put_(
        (choice_row[live].long(),), weights[live].float()
    )


def _empty_activation(
    parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str, interleaved: bool
) -> Tensor:
    features = parts[0].shape[1]
    if len(parts) == 1 and Gate.of_code(gate).has_gate:
        features = features // 2
    return parts[0].new_empty((parts[0].shape[0], features), dtype=torch.bfloat16)


@torch_op(fake=_empty_activation)
def gated_in_bf16(
    parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str, interleaved: bool
) -> Tensor:
    """The activation of gate and up, times a weight, computed in fp32 and rounded once.

    Args:
        parts: as in `gate_and_up`, any float dtype.
        weights: any float dtype `(M,)`, or with a `choice_row` `(T, k)`: of each choice.
        choice_row: int32 `(T, k)`: the row of each choice, as in `Routing`; -1 for none. Other rows are not read, and
            their activation is unspecified. None: every row is one.
        gate: `Gate.code`.
        interleaved: as in `gate_and_up`.

    Returns:
        bf16 `(M, I)`.
    """
    if not runs_triton(parts[0].device):
        return gated_by_definition(parts, weights, choice_row, gate, interleaved)
    from fp8moe.kernels.gated_in_bf16 import launch_gated

    act = _empty_activation(parts, weights, choice_row, gate, interleaved)
    parts = [part.contiguous() for part in parts]
    launch_gated(parts, _contiguous(weights), _contiguous(choice_row), act, gate, interleaved)
    return act


def _empty_gradients(
    d_act: Tensor, parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str,
    interleaved: bool, zero_unused: bool,
) -> list[Tensor]:  # fmt: skip
    made = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    return made if weights is None else [*made, torch.empty_like(weights, dtype=torch.float32)]


@torch_op(fake=_empty_gradients)
def gated_in_bf16_backward(
    d_act: Tensor, parts: Sequence[Tensor], weights: Tensor | None, choice_row: Tensor | None, gate: str,
    interleaved: bool, zero_unused: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of what `gated_in_bf16` takes.

    Args:
        d_act: bf16 `(M, I)`, any strides.
        parts, weights, choice_row, gate, interleaved: as in `gated_in_bf16`.
        zero_unused: whether the gradients of rows of no choice are zeros, or unspecified.

    Returns:
        Those of `parts` in their dtypes, then, if there are weights, fp32, theirs; zero for a choice without a row.
    """
    if not runs_triton(d_act.device):
        return gradients_by_definition(d_act, parts, weights, choice_row, gate, interleaved, zero_unused)
    from fp8moe.kernels.gated_in_bf16 import launch_gated_backward

    made = _empty_gradients(d_act, parts, weights, choice_row, gate, interleaved, zero_unused)
    d_parts = made[: len(parts)]
    if zero_unused and choice_row is not None:
        for part in d_parts:
            part.zero_()
    parts = [part.contiguous() for part in parts]
    launch_gated_backward(
        d_act.contiguous(), parts, _contiguous(weights), _contiguous(choice_row), d_parts,
        None if weights is None else made[-1], gate, interleaved,
    )  # fmt: skip
    return made


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
