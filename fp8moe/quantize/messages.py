"""Tokens as they travel between ranks: from high precision to messages, from messages to operands, and home.

A message is a row of bytes, so that one collective carries all that belongs to a token. In FP8 its tiles of 1 x 128
have scales that are powers of two: then each value is exact in bf16, and a token operand that is made of it rounds
nothing again but what underflows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.config import ScaleFormat
from fp8moe.devices import runs_triton, runs_triton_fp8
from fp8moe.operands import BLOCK, RowOperand, TokenGroups, TokenLayout, TokenOperand, in_whole_blocks
from fp8moe.quantize import reference
from fp8moe.quantize.activations import requantize_tokens
from fp8moe.quantize.spread_rows import spread_codes
from fp8moe.rows.combine import combine_into
from fp8moe.rows.part_sums import sums_at_choices_into
from fp8moe.torch_op import torch_op

ALIGNMENT = 32
"""Bytes: of every message and of every part of it. Then a message has a multiple of 16 elements of bf16, by which the
compiler knows that kernels may move whole vectors."""


def _aligned(num_bytes: int) -> int:
    return (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True)
class MessageLayout:
    """What lies where in a message: features, their scales in FP8, then ids and weights of choices."""

    num_features: int
    """`H`."""
    num_choices: int
    """`k`; 0 for a gradient, whose choices the receiver knows."""
    in_fp8: bool
    """Whether features are e4m3, `H` up to a multiple of 128, with an fp32 scale for each 128; else they are bf16."""

    @property
    def scale_start(self) -> int:
        """Where the scales begin, and the features end; in bytes."""
        return in_whole_blocks(self.num_features) if self.in_fp8 else _aligned(2 * self.num_features)

    @property
    def ids_start(self) -> int:
        """Where the ids begin, and the scales end."""
        return self.scale_start + (_aligned(self.scale_start // BLOCK * 4) if self.in_fp8 else 0)

    @property
    def weights_start(self) -> int:
        """Where the weights begin."""
        return self.ids_start + 4 * self.num_choices

    @property
    def num_bytes(self) -> int:
        """Of a message."""
        return _aligned(self.weights_start + 4 * self.num_choices)


@dataclass(frozen=True, eq=False)
class Messages:
    """`N` messages, and views of their parts."""

    data: Tensor
    """uint8 `(N, num_bytes)`, contiguous."""
    layout: MessageLayout

    def _part(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self.data.view(dtype).narrow(1, start // dtype.itemsize, count)

    @cached_property
    def codes(self) -> Tensor:
        """e4m3 `(N, Hp)`, if they are in FP8."""
        return self._part(0, self.layout.scale_start, torch.float8_e4m3fn)

    @cached_property
    def scale(self) -> Tensor:
        """fp32 `(N, Hp/128)`, powers of two (NaN where a tile is NaN), if they are in FP8."""
        return self._part(self.layout.scale_start, self.layout.scale_start // BLOCK, torch.float32)

    @cached_property
    def values(self) -> Tensor:
        """bf16 `(N, H)`, if they are not in FP8."""
        return self._part(0, self.layout.num_features, torch.bfloat16)

    @cached_property
    def ids(self) -> Tensor:
        """int32 `(N, k)`."""
        return self._part(self.layout.ids_start, self.layout.num_choices, torch.int32)

    @cached_property
    def weights(self) -> Tensor:
        """fp32 `(N, k)`."""
        return self._part(self.layout.weights_start, self.layout.num_choices, torch.float32)


class Choices(NamedTuple):
    """What goes into the messages of each token besides its features."""

    ids: Tensor
    """Integers `(T, k)`: of all ranks' experts."""
    weights: Tensor
    """Any float dtype up to 32 bits `(T, k)`."""
    num_experts: int
    """`E`, of a rank: rank `r` has those from `r * E` on."""


def pack(
    x: Tensor, slots: Tensor, num_slots: int, in_fp8: bool, choices: Choices | None = None,
    *, all_used: bool = False, clear: bool = False,
) -> Messages:  # fmt: skip
    """Write each token into its messages, quantized once if they are in FP8.

    Args:
        x: bf16, fp16 or fp32 `(T, H)`, any strides.
        slots: int32 `(T, k)`: the messages of each token, each of at most one; -1 is none.
        num_slots: `N`, of the messages.
        in_fp8: whether features are quantized.
        choices: of the tokens. In the message that belongs to a choice, ids are numbered as on the rank of its expert,
            and are -1 for choices of other ranks.
        all_used: whether those that are sent all are of a token.
        clear: whether messages of no token hold zeros.

    Returns:
        The messages. In those of no token all ids are -1 unless `all_used`; everything else is unspecified or zeros.
    """
    layout = MessageLayout(x.shape[1], slots.shape[1] if choices else 0, in_fp8)
    ids, weights, num_experts = choices or (None, None, 0)
    return Messages(_pack(x, slots, num_slots, in_fp8, ids, weights, num_experts, all_used, clear), layout)


def _empty_messages(
    x: Tensor, slots: Tensor, num_slots: int, in_fp8: bool, ids: Tensor | None, weights: Tensor | None,
    num_experts: int, all_used: bool, clear: bool,
) -> Tensor:  # fmt: skip
    layout = MessageLayout(x.shape[1], 0 if ids is None else ids.shape[1], in_fp8)
    return torch.empty((num_slots, layout.num_bytes), dtype=torch.uint8, device=x.device)


@torch_op(fake=_empty_messages)
def _pack(
    x: Tensor, slots: Tensor, num_slots: int, in_fp8: bool, ids: Tensor | None, weights: Tensor | None,
    num_experts: int, all_used: bool, clear: bool,
) -> Tensor:  # fmt: skip
    slots = slots.contiguous()
    choices = None if ids is None or weights is None else Choices(ids.contiguous(), weights.contiguous(), num_experts)
    data = _empty_messages(x, slots, num_slots, in_fp8, ids, weights, num_experts, all_used, clear)
    if clear:
        data.zero_()
    messages = Messages(data, MessageLayout(x.shape[1], slots.shape[1] if choices else 0, in_fp8))
    if choices and not all_used:
        messages.ids.fill_(-1)
    # Of one feature in FP8, see `missing_for_sizes` of TritonGemm.
    if (runs_triton_fp8(x.device) and x.shape[1] > 1) if in_fp8 else runs_triton(x.device):
        from fp8moe.kernels.messages import PackedChoices, launch_pack

        values, scale = (messages.codes, messages.scale) if in_fp8 else (messages.values, None)
        packed = PackedChoices(*choices[:2], messages.ids, messages.weights, num_experts) if choices else None
        launch_pack(x, slots, values, scale, packed)
    else:
        pack_by_index(x, slots, messages, choices)
    return data


def pack_by_index(x: Tensor, slots: Tensor, messages: Messages, choices: Choices | None = None) -> None:
    """`pack` into `messages`, whose ids are -1, in plain PyTorch: the definition."""
    token, choice = torch.where(slots >= 0)
    slot = slots[slots >= 0].long()
    if choices:
        first = choices.ids[token, choice].long() // choices.num_experts * choices.num_experts
        ids = choices.ids[token].long() - first[:, None]
        messages.ids[slot] = ids.masked_fill((ids < 0) | (ids >= choices.num_experts), -1).int()
        messages.weights[slot] = choices.weights[token].float()
    if not messages.layout.in_fp8:
        messages.values[slot] = x[token].bfloat16()
        return
    padded = F.pad(x.float(), (0, -x.shape[1] % BLOCK))
    codes, scale = reference.quantize_tiles(padded.unflatten(1, (-1, BLOCK)), (2,), ScaleFormat.POW2)
    messages.codes.view(torch.uint8)[slot] = codes.flatten(1).view(torch.uint8)[token]
    messages.scale[slot] = scale.squeeze(2)[token]


def pack_sums(rows: Tensor | None, parts: Tensor | None, choice_row: Tensor) -> Messages:
    """The messages that carry gradients home: for each token that arrived the sum of its rows, and one number for each
    of its choices.

    Args:
        rows: `(M, H)`, as in `combine`, for the features, in bf16; None for messages without.
        parts: fp32 `(parts, M)`, as in `sums_at_choices`, for the weights of the choices; None for messages without.
            One of the two is given.
        choice_row: int32 `(N, k)`: the row of each choice, or -1.
    """
    layout = MessageLayout(0 if rows is None else rows.shape[1], 0 if parts is None else choice_row.shape[1], False)
    data = torch.empty((choice_row.shape[0], layout.num_bytes), dtype=torch.uint8, device=choice_row.device)
    messages = Messages(data, layout)
    if rows is not None:
        combine_into(messages.values, rows, choice_row)
    if parts is not None:
        sums_at_choices_into(messages.weights, parts, choice_row)
    return messages


def dequantize(messages: Messages) -> Tensor:
    """fp32 `(N, H)`: what messages in FP8 stand for, exactly."""
    return reference.dequantize_codes(messages.codes[:, : messages.layout.num_features], messages.scale)


def spread_messages(messages: Messages, groups: TokenGroups, choice_row: Tensor) -> RowOperand:
    """The row operand `(R, Hp)` of the rows that copy messages in FP8: their codes and scales as they are.

    Args:
        messages: `N`.
        groups: the plan of the rows; `row_source` numbers messages.
        choice_row: int32 `(N, k)`: the rows of each message, or -1.
    """
    return spread_codes(messages.codes, messages.scale, groups, choice_row)


def requantize_messages(
    messages: Messages, groups: TokenGroups, layout: TokenLayout, token_tile: int = BLOCK
) -> TokenOperand:
    """The token operand `(H, R)` of the rows that copy messages in FP8, with scales that are powers of two.

    It holds the values that the messages stand for, but for those that are below the normal numbers of e4m3 in their
    new tile, which round once more. So it differs from the token operand of the tokens before they travelled only where
    one of the two underflows.
    """
    codes = messages.codes[:, : messages.layout.num_features]
    return requantize_tokens(codes, messages.scale, groups, ScaleFormat.POW2, layout, token_tile)
