"""What the benchmark measures against computes the same product."""

import pytest
import torch

from fp8moe.bench.int8.kernels.other_ways import launch_other_ways
from fp8moe.int8 import quantize_rows_int8, quantize_weight
from fp8moe.int8.grouped_mm import grouped_mm_by_loop
from fp8moe.int8.groups import tiles_by_bucketize
from fp8moe.kernels.int8.platform import Tile, platform_of
from tests.generators import offsets


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_computes_the_same(device: torch.device, swiglu: bool, bits: int, in_loop: bool, rank_one: bool) -> None:
    torch.manual_seed(0)
    tokens, w = torch.randn(9, 64, device=device), torch.randn(2, 48, 64, device=device)
    weight, offs = quantize_weight(w, bits, 32), offsets([3, 17], device)
    source = torch.randint(9, (17,), dtype=torch.int32, device=device)
    row_weights = None if swiglu else torch.rand(17, device=device)
    codes, scale = quantize_rows_int8(tokens, 32 if in_loop else None)
    a, data = tokens if in_loop else codes, weight.data
    if rank_one:
        a, data = a.t().contiguous(), data.transpose(1, 2).contiguous()
    out = torch.full((17, 24 if swiglu else 48), torch.nan, device=device)
    launch_other_ways(
        a, None if in_loop else scale, source, data, weight.scale, tiles_by_bucketize(offs, 17, 16), row_weights, out,
        block_rows=16, swiglu=swiglu, rank_one=rank_one, tile=Tile(16, 2, 32, 4, 2), platform=platform_of(device),
    )  # fmt: skip
    expected = grouped_mm_by_loop(
        codes, scale, weight.data, weight.scale, offs, 32, 32 if in_loop else None, swiglu, False, source, row_weights,
        torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
