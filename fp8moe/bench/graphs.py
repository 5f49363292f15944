"""CUDA graphs: what a region takes once its launches cost nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fp8moe.bench.timing import Region, Stages


def captured(region: Region) -> Region:
    """Capture a region that has run before; the result replays it.

    Raises:
        RuntimeError: the region reads the device on the host, or cannot be captured for another reason.
    """
    _check_that_it_never_waits(region)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture runs on another stream, whose memory pool and handles need warming too
        region()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        region()
    return graph.replay


@contextmanager
def replaying(region: Region) -> Iterator[Stages]:
    """To time a region as a CUDA graph replays it; the graph and its memory are gone afterwards.

    Raises:
        RuntimeError: as `captured`.
    """
    region()
    yield (captured(region),)


def _check_that_it_never_waits(region: Region) -> None:
    """Look first: a capture that fails at a host read leaves the allocator and the generators in capture mode."""
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        region()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
