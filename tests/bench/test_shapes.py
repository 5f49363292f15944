"""Shapes are read and checked; routings are spread as they say, the same way each time."""

import pytest

from fp8moe.bench.shapes import CPU_SHAPES, CUDA_SHAPES, Routing, Shape, group_sizes

SHAPE = Shape(8192, 256, 128, 16)


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("shape", [*CUDA_SHAPES, *CPU_SHAPES, SHAPE], ids=str)
def test_groups_hold_every_row(shape: Shape, routing: Routing) -> None:
    sizes = group_sizes(shape, routing, seed=3)
    assert len(sizes) == shape.e
    assert sum(sizes) == shape.m
    assert min(sizes) >= 0
    assert group_sizes(shape, routing, seed=3) == sizes
    if routing is not Routing.RAGGED:
        assert all(size % 128 == 0 for size in sizes)


def test_even_groups_are_equal() -> None:
    assert group_sizes(SHAPE, Routing.EVEN, seed=0) == [512] * 16


@pytest.mark.parametrize("routing", [Routing.SKEWED, Routing.RAGGED])
def test_popular_experts_get_several_times_what_others_get(routing: Routing) -> None:
    sizes = group_sizes(CUDA_SHAPES[-1], routing, seed=0)
    assert max(sizes) > 2 * sum(sizes) / len(sizes)
    assert sizes != group_sizes(CUDA_SHAPES[-1], routing, seed=1)


def test_ragged_groups_are_unaligned_and_now_and_then_empty() -> None:
    assert sum(size % 128 != 0 for size in group_sizes(SHAPE, Routing.RAGGED, seed=0)) > SHAPE.e / 2
    draws = [group_sizes(SHAPE, Routing.RAGGED, seed) for seed in range(20)]
    empty = [sizes.count(0) for sizes in draws]
    assert 0 < sum(empty) < 20 * SHAPE.e / 4
    assert any(count == 0 for count in empty)


def test_a_single_expert_gets_everything() -> None:
    assert [group_sizes(Shape(77, 128, 128, 1), Routing.RAGGED, seed) for seed in range(40)] == [[77]] * 40


@pytest.mark.parametrize(
    ("routing", "message"),
    [(Routing.EVEN, r"M of shape 640,128,128,2 is 640; .* even .* 128 E = 256"), (Routing.SKEWED, None)],
)
def test_even_groups_need_rows_for_all(routing: Routing, message: str | None) -> None:
    shape = Shape(640, 128, 128, 2)
    if message is None:
        assert sum(group_sizes(shape, routing, seed=0)) == 640
    else:
        with pytest.raises(ValueError, match=message):
            group_sizes(shape, routing, seed=0)


def test_skewed_groups_need_aligned_rows() -> None:
    with pytest.raises(ValueError, match=r"M of shape 600,128,128,2 is 600; .* skewed .* multiple of 128"):
        group_sizes(Shape(600, 128, 128, 2), Routing.SKEWED, seed=0)


def test_a_shape_is_read_with_its_name() -> None:
    assert Shape.parse("32768,4096,7168,8") == CUDA_SHAPES[0]
    assert Shape.parse("32768,4096,7168,8").title == "DeepSeek-V3 gate-up (32768,4096,7168,8)"
    assert Shape.parse("300,256,128,2") == Shape(300, 256, 128, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", r"shape is '1,2,3'; it must be integers M,N,K,E, such as"),
        ("a,128,128,1", r"shape is 'a,128,128,1'"),
        ("0,128,128,1", r"M of shape 0,128,128,1 is 0; it must be positive"),
        ("128,128,128,-1", r"E of shape 128,128,128,-1 is -1; it must be positive"),
        ("128,100,128,1", r"N of shape 128,100,128,1 is 100; it must be a multiple of 128"),
        ("128,128,100,1", r"K of shape 128,128,100,1 is 100; it must be a multiple of 128"),
    ],
)
def test_a_shape_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape.parse(text)
