"""Gluon's names that move between Triton releases (3.6 to 3.9), settled in one place."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = getattr(gluon, "aggregate", None) or core._aggregate
"""Makes a class of several device values one argument."""

cp_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Copy from pointers in global memory to shared memory by `cp.async`; completes as part of a group."""

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""TMA copy of one tile from global to shared memory; completes on an mbarrier."""

tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
"""TMA copy of one tile from shared to global memory, clipped at the edges of the tensor."""
