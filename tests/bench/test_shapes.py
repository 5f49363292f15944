"""Shapes are read and checked; rows are spread as they should be, the same way each time."""

import pytest
import torch

from fp8moe.bench.layer.task import LAYER
from fp8moe.bench.product.task import PRODUCT
from fp8moe.bench.shapes import Balance, Shape, draw_group_sizes, draw_topk, layer_shape, product_shape, with_name
from fp8moe.bench.task import Task
from tests.bench.support import LAYER_SHAPE

SHAPE = product_shape(8192, 256, 128, 16)
FINE_GRAINED = PRODUCT.shapes_on_cuda[-1]
MANY = layer_shape(4096, 2, 128, 128, 16)


@pytest.mark.parametrize("balance", PRODUCT.balances)
@pytest.mark.parametrize("shape", [*PRODUCT.shapes_on_cuda, *PRODUCT.shapes_on_cpu, SHAPE], ids=str)
def test_groups_hold_every_row(shape: Shape, balance: Balance) -> None:
    sizes = draw_group_sizes(shape, balance, seed=3)
    assert len(sizes) == shape["E"]
    assert sum(sizes) == shape["M"]
    assert min(sizes) >= 0
    assert draw_group_sizes(shape, balance, seed=3) == sizes
    if balance is Balance.SKEWED:
        assert all(size % 128 == 0 for size in sizes)


def test_even_groups_are_equal() -> None:
    assert draw_group_sizes(SHAPE, Balance.EVEN, seed=0) == [512] * 16


@pytest.mark.parametrize("balance", [Balance.SKEWED, Balance.RAGGED])
def test_popular_experts_get_several_times_what_others_get(balance: Balance) -> None:
    sizes = draw_group_sizes(FINE_GRAINED, balance, seed=0)
    assert max(sizes) > 2 * sum(sizes) / len(sizes)
    assert sizes != draw_group_sizes(FINE_GRAINED, balance, seed=1)


def test_ragged_groups_are_unaligned_and_now_and_then_empty() -> None:
    assert sum(size % 128 != 0 for size in draw_group_sizes(SHAPE, Balance.RAGGED, seed=0)) > SHAPE["E"] / 2
    draws = [draw_group_sizes(SHAPE, Balance.RAGGED, seed) for seed in range(20)]
    empty = [sizes.count(0) for sizes in draws]
    assert 0 < sum(empty) < 20 * SHAPE["E"] / 4
    assert any(count == 0 for count in empty)


def test_a_single_expert_gets_everything() -> None:
    assert [draw_group_sizes(product_shape(77, 128, 128, 1), Balance.RAGGED, seed) for seed in range(40)] == [[77]] * 40


@pytest.mark.parametrize("m", [1, 100, 129, 600])
def test_rows_that_do_not_divide_are_spread_all_the_same(m: int) -> None:
    shape = product_shape(m, 128, 128, 4)
    even, skewed = (draw_group_sizes(shape, balance, seed=0) for balance in (Balance.EVEN, Balance.SKEWED))
    assert sum(even) == sum(skewed) == m
    assert max(even) - min(even) <= 1
    assert sum(size % 128 != 0 for size in skewed) <= 1
    assert min(skewed) >= 0


@pytest.mark.parametrize("balance", LAYER.balances)
@pytest.mark.parametrize(
    "shape", [*LAYER.shapes_on_cuda, *LAYER.shapes_on_cpu, LAYER_SHAPE, layer_shape(5, 3, 128, 128, 3)], ids=str
)
def test_a_token_chooses_different_experts(shape: Shape, balance: Balance) -> None:
    ids, weights = draw_topk(shape, balance, seed=3)
    assert ids.shape == weights.shape == (shape["T"], shape["k"])
    ordered = ids.sort(1).values
    assert (ordered.diff(dim=1) > 0).all()
    assert ((ids >= 0) & (ids < shape["E"])).all()
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(shape["T"]))
    assert torch.equal(ids, draw_topk(shape, balance, seed=3)[0])


def test_uniform_experts_are_equally_popular_and_skewed_ones_are_not() -> None:
    def shares(balance: Balance, seed: int) -> torch.Tensor:
        return torch.bincount(draw_topk(MANY, balance, seed)[0].flatten(), minlength=16) / (4096 * 2 / 16)

    assert (shares(Balance.UNIFORM, 0) - 1).abs().max() < 0.2
    skewed = shares(Balance.SKEWED, 0)
    assert skewed.max() > 3 * skewed.min()
    assert not torch.equal(skewed, shares(Balance.SKEWED, 1))


def test_a_shape_is_read_with_its_name() -> None:
    assert PRODUCT.parse("32768,4096,7168,8") == PRODUCT.shapes_on_cuda[0]
    assert PRODUCT.parse("32768,4096,7168,8").title == "DeepSeek-V3 gate-up (32768,4096,7168,8)"
    assert PRODUCT.parse("300,256,128,2") == product_shape(300, 256, 128, 2)
    assert LAYER.parse("8192,8,2048,768,128") == LAYER.shapes_on_cuda[2]
    assert LAYER.parse("300,3,248,104,5") == layer_shape(300, 3, 248, 104, 5)


def test_shapes_are_found_by_a_part_of_their_names() -> None:
    mixtral, megatrons = with_name("mixtral", LAYER.shapes_on_cuda)
    assert (mixtral["T"], megatrons["T"]) == (8192, 4096)
    with pytest.raises(ValueError, match="--only 'llama' is in no name of a default shape; they are 'like"):
        with_name("llama", LAYER.shapes_on_cuda)


def test_a_layer_has_the_weights_of_both_products() -> None:
    assert LAYER.op_size(layer_shape(300, 3, 256, 128, 5)).weights == 5 * 3 * 256 * 128
    assert PRODUCT.op_size(product_shape(900, 256, 128, 5)).weights == 5 * 256 * 128


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (PRODUCT, "1,2,3", r"shape is '1,2,3'; it must be integers M,N,K,E, such as 32768,4096,7168,8"),
        (PRODUCT, "a,128,128,1", r"shape is 'a,128,128,1'"),
        (PRODUCT, "0,128,128,1", r"M of shape 0,128,128,1 is 0; it must be positive"),
        (PRODUCT, "128,128,128,-1", r"E of shape 128,128,128,-1 is -1; it must be positive"),
        (
            PRODUCT,
            "128,100,128,1",
            r"N of shape 128,100,128,1 is 100; it must be a multiple of 8: PyTorch's",
        ),
        (LAYER, "8,1,128,60,2", r"I of shape 8,1,128,60,2 is 60; it must be a multiple of 8"),
        (LAYER, "1,2,3,4", r"shape is '1,2,3,4'; it must be integers T,k,H,I,E, such as 8192,4,7168,2048,8"),
        (LAYER, "8,3,128,128,2", r"k of shape 8,3,128,128,2 is 3; it must be at most E, 2"),
    ],
)
def test_a_shape_that_cannot_be(task: Task, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.parse(text)
