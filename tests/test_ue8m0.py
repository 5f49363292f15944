"""Packed UE8M0 scales: every exponent, every place in a word, and what is refused."""

import re

import pytest
import torch

from fp8moe import pack_ue8m0, unpack_ue8m0
from tests.measures import assert_same_bits

EVERY_SCALE = torch.tensor([2.0**e for e in range(-127, 128)] + [torch.nan])  # the bytes 0 to 255


def test_every_exponent_survives_in_every_place() -> None:
    for place in range(4):
        scale = torch.ones(256, 4)
        scale[:, place] = EVERY_SCALE
        packed = pack_ue8m0(scale)
        assert packed.dtype == torch.int32
        assert packed.shape == (256, 1)
        # Little-endian: the place of a group is the place of its byte. The other three hold 2**0, the byte 127.
        bytes_ = packed.view(torch.uint8)
        assert bytes_[:, place].tolist() == list(range(256))
        assert (bytes_[:, [other for other in range(4) if other != place]] == 127).all()
        assert_same_bits(unpack_ue8m0(packed, 4), scale)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 8, 11])
def test_ragged_rows_end_in_zeros(num_groups: int) -> None:
    scale = EVERY_SCALE[torch.randint(1, 255, (3, 5, num_groups))]
    packed = pack_ue8m0(scale)
    words = -(-num_groups // 4)
    assert packed.shape == (3, 5, words)
    assert (packed.view(torch.uint8)[..., num_groups:] == 0).all()
    assert_same_bits(unpack_ue8m0(packed, num_groups), scale)
    strided = packed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same_bits(unpack_ue8m0(strided, num_groups), scale)


def test_no_rows_and_no_groups() -> None:
    assert pack_ue8m0(torch.empty(0, 6)).shape == (0, 2)
    assert pack_ue8m0(torch.empty(3, 0)).shape == (3, 0)
    assert unpack_ue8m0(torch.empty(3, 0, dtype=torch.int32), 0).shape == (3, 0)


@pytest.mark.parametrize("value", [3.0, -2.0, 0.0, torch.inf, 2.0**-128, 1.0000001])
def test_what_is_no_power_of_two_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=re.escape("every value must be a power of two or NaN")):
        pack_ue8m0(torch.tensor([1.0, value]))


def test_wrong_types_and_sizes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"scale is a list; it must be a torch\.Tensor"):
        pack_ue8m0([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scale has dtype torch\.float64; it must be torch\.float32"):
        pack_ue8m0(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale has no dimension"):
        pack_ue8m0(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"packed has dtype torch\.int64; it must be torch\.int32"):
        unpack_ue8m0(torch.ones(4, dtype=torch.int64), 16)
    for num_groups in (0, 4, 9):
        with pytest.raises(ValueError, match=f"num_groups is {num_groups} .* must be 5 to 8"):
            unpack_ue8m0(torch.ones(3, 2, dtype=torch.int32), num_groups)
