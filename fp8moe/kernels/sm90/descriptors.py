"""TMA descriptors, made on the host: what the kernels copy between global and shared memory, tile by tile."""

from collections.abc import Sequence

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp8moe.operands import BLOCK, TMA_ALIGNMENT

_OUTPUT_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_PIECE = [64, 128]

# Fixed by the shapes of the tiles; finding them takes longer than all else here.
_OPERAND_LAYOUT = gl.NVMMASharedLayout.get_default_for([128, BLOCK], gl.float8e4nv)
_SCALE_LAYOUT = gl.NVMMASharedLayout.get_default_for([128], gl.float32)
_OUTPUT_LAYOUTS = {
    dtype: gl.NVMMASharedLayout.get_default_for(_PIECE, element) for dtype, element in _OUTPUT_TYPES.items()
}


def operand_tiles(data: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows and one scale block of e4m3 `(D, L)`, row-major; zeros outside."""
    return _descriptor(data, data.shape, data.stride(), [rows, BLOCK], _OPERAND_LAYOUT)


def scale_tiles(scale: Tensor, length: int) -> TensorDescriptor:
    """Runs of `length` scales of fp32 `(L/128, D)`, contiguous, addressed as one row; zeros outside."""
    return _descriptor(scale, [scale.numel()], [1], [length], _SCALE_LAYOUT)


def has_rows_for_tma(out: Tensor) -> bool:
    """Whether every row of a contiguous output starts where TMA can write."""
    return out.shape[-1] * out.element_size() % TMA_ALIGNMENT == 0


def output_pieces(out: Tensor) -> TensorDescriptor:
    """Pieces of 64 x 128 of a contiguous bf16, fp16 or fp32 output, as a matrix of its last dimension; it must have
    `has_rows_for_tma`. What lies past its columns is clipped."""
    columns = out.shape[-1]
    shape = [out.numel() // columns, columns]
    return _descriptor(out, shape, [columns, 1], _PIECE, _OUTPUT_LAYOUTS[out.dtype])


def _descriptor(
    base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: list[int], layout: gl.NVMMASharedLayout
) -> TensorDescriptor:
    """A descriptor that is not checked yet: its checks cost more host time than a launch, and `launch` makes them
    before the first of each kind."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = base, shape, strides
    descriptor.block_shape, descriptor.layout = block_shape, layout
    descriptor.padding, descriptor.round_f32_to_tf32 = "zero", False
    return descriptor
