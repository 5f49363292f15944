"""From times to coefficients."""

import statistics
from collections.abc import Sequence
from itertools import combinations

import torch

from fp8moe.bench.tune.measure import Sample
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize

ROUNDING = 1e-12
"""A smaller difference between sums of squared relative errors says nothing."""


def fit_model(samples: Sequence[Sample], device: str, measured: str) -> CostModel:
    """The model of what was measured.

    Args:
        samples: of products and of layers, the host's time of some of each.
        device: the name of the device.
        measured: what the model says of its origin.
    """
    product, layer = (_fit_costs([sample for sample in samples if sample.layer is layer]) for layer in (False, True))
    return CostModel(device, measured, product, layer)


def fit_cost(works: Sequence[OpSize], times_us: Sequence[float], host_us: float = 0.0) -> Cost:
    """The device's coefficients, none negative, with the least sum of squared relative errors, to four digits.

    With so few coefficients the best is found among all sets of those that are not 0: the solution of least squares
    for each, if it has nothing negative. Of those that are as good it is the smallest.
    """
    times = torch.tensor(times_us, dtype=torch.float64)
    features = torch.tensor([(1, *work) for work in works], dtype=torch.float64) / times[:, None]
    unit = features.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    features, ones = features / unit, torch.ones(len(times), 1, dtype=torch.float64)
    best, least_error = torch.zeros(4, dtype=torch.float64), torch.inf
    for size in range(1, 5):
        for columns in map(list, combinations(range(4), size)):
            solution = torch.linalg.lstsq(features[:, columns], ones, driver="gelsd").solution
            error = float((features[:, columns] @ solution - ones).square().sum())
            if (solution >= 0).all() and error < least_error - ROUNDING:
                least_error = error
                best = torch.zeros_like(best).index_copy_(0, torch.tensor(columns), solution[:, 0])
    return Cost(*(float(f"{coefficient:.4g}") for coefficient in [*(best / unit).tolist(), host_us]))


def _fit_costs(samples: Sequence[Sample]) -> Costs:
    works = [sample.work for sample in samples]
    launched = [sample.host_us for sample in samples if sample.host_us is not None]
    bf16_host_us, fp8_host_us, fp8_cached_host_us = map(statistics.median, zip(*launched, strict=True))
    return Costs(
        bf16=fit_cost(works, [sample.bf16_us for sample in samples], bf16_host_us),
        fp8=fit_cost(works, [sample.fp8_us for sample in samples], fp8_host_us),
        fp8_cached=fit_cost(works, [sample.fp8_cached_us for sample in samples], fp8_cached_host_us),
    )
