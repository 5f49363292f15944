"""Weight gradients added to a caller's buffer, by each backend that a GPU can have."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import FP8Config
from tests.generators import offsets
from tests.gpu.support import emulation_of, no_synchronization, poison_free_memory, problem
from tests.measures import assert_same_bits, sqnr, worst_row_sqnr
from tests.test_grouped_mm import RAGGED, GroupedMM

pytestmark = pytest.mark.gpu


def adding_to(main_grad: Tensor, config: FP8Config) -> GroupedMM:
    return lambda a, w, offs: fp8moe.grouped_mm(
        a, w.transpose(-2, -1), offs, config=config, main_grad=main_grad.transpose(-2, -1)
    )


@pytest.mark.parametrize("stored", ["E,N,K", "E,K,N"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "at any address"])
@pytest.mark.parametrize(
    ("sizes", "n", "token_tile"),
    [(RAGGED, 384, None), (RAGGED, 384, 128), ([200, 0, 300], 384, 256), ([0, 1, 900], 512, 512)],
    ids=str,
)
def test_accumulates_into_main_grad(
    config: FP8Config, sizes: list[int], n: int, token_tile: int | None, stored: str, offset: int
) -> None:
    config = replace(config, wgrad_token_tile=token_tile)
    a, w, offs, dout = problem(sizes, n)
    a, w = a.requires_grad_(), w.requires_grad_()
    start = torch.randn(w.numel() + 4, device="cuda")[offset : offset + w.numel()]
    start = start.view(w.shape) if stored == "E,N,K" else start.view(len(sizes), 256, n).transpose(1, 2)
    expected = start.clone()
    before = start.clone()
    for computing, main_grad in ((config, start), (emulation_of(config), expected)):
        version = main_grad._version
        for _ in range(2):
            poison_free_memory()
            adding_to(main_grad, computing)(a, w, offs).backward(dout)
        assert main_grad._version > version
    assert w.grad is None
    assert sqnr(start - before, expected - before) >= 45
    assert worst_row_sqnr((start - before)[-1], (expected - before)[-1]) >= 35
    assert_same_bits(start[sizes.index(0)], before[sizes.index(0)])


def test_main_grad_never_synchronizes_and_replays_in_a_graph(config: FP8Config) -> None:
    a, w, offs, dout = problem([100] * 5)
    a, w = a.requires_grad_(), w.requires_grad_()
    main_grad = torch.zeros(w.shape, device="cuda")

    def step() -> None:
        adding_to(main_grad, config)(a, w, offs).backward(dout)

    step()  # compile
    with no_synchronization():
        step()
    a.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adding_to(main_grad, config)(a, w, offs).backward(dout)
    for sizes in ([500, 0, 0, 0, 0], [1, 127, 128, 129, 115]):
        offs.copy_(offsets(sizes))
        main_grad.zero_()
        graph.replay()
        graph.replay()
        expected = torch.zeros_like(main_grad)
        for _ in range(2):
            adding_to(expected, config)(a.detach(), w, offs).backward(dout)
        assert_same_bits(main_grad, expected)
        assert expected.square().sum() > 0
