"""`WeightCache`: a weight quantized once for as long as it does not change, for forward and dgrad."""

import itertools
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8moe.config import ScaleFormat
from fp8moe.operands import BLOCK, WeightOperand
from fp8moe.quantize import quantize_weight_into
from fp8moe.torch_op import returns_nothing, torch_op


class WeightCache:
    """The FP8 operands of one weight, kept between forward, backward and microbatches until the weight changes.

        cache = fp8moe.WeightCache(w)  # w (E, N, K)
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, weight_cache=cache)

    Without it a weight is quantized in every forward and once more in every backward. The cache costs 2 bytes for each
    element of the weight, from its construction on. Where `KernelPreference.AUTO` takes BF16, it is not used; AUTO
    counts on it to be fresh, as it is in every microbatch of a step but the first.

    It sees that a weight has changed by any step of a `torch.optim.Optimizer` (fused ones too), by writes that PyTorch
    counts (`w.copy_`, `load_state_dict`), and by other memory or layout (`p.data = other`). Nothing can see writes past
    PyTorch's version counter: `p.data.copy_(...)`, flat buffers, replays of CUDA graphs, optimizers of another kind.
    **After those call `invalidate()`**, or training goes on with the old weights.

    CUDA graphs: a graph captured while the cache was fresh reads the cache's memory, and its replays run no Python. So
    from then on every optimizer step quantizes the weight again at once, into the same memory. Where the weight is
    written after `step()` returns, or otherwise, call `refresh()` before the replay. A graph captured while the cache
    was stale quantizes in each of its replays.

    In compiled code a forward counts as a write to the cache: with a second forward before the first backward, autograd
    refuses that backward.

    A deep copy or an unpickled cache is of the copied weight and shares nothing with the original. Use the cache on one
    CUDA stream: it does not make another wait for what it writes.

    Args:
        weight: bf16, fp16 or fp32 `(E, N, K)`, any strides, `N` and `K` multiples of 128: the parameter, or a view of
            it. A parameter stored `(E, K, N)` is passed as `p.transpose(-2, -1)`.

    Raises:
        TypeError: `weight` is not a tensor.
        ValueError: it is not 3D, or its last dimensions are not multiples of 128.
    """

    _find_root: Callable[[], Tensor]
    _view: "_View | None"
    _fresh_for: Hashable
    """The state that was quantized last; None if there is nothing."""
    _scale_format: ScaleFormat | None
    """In which it was."""

    def __init__(self, weight: Tensor) -> None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight is a {type(weight).__name__}; it must be a torch.Tensor")
        # Versions and addresses are asked of what owns the memory: `p.data = other` leaves older views behind.
        root = weight if weight._base is None else weight._base
        self._find_root = partial(_itself, root)
        self._view = None if weight is root else _View(root, weight)
        self._set_up()
        self.allocate()

    @classmethod
    def of_parameter(cls, module: nn.Module, name: str) -> "WeightCache":
        """Of whatever tensor `(E, N, K)` is the attribute `name` of `module` when it is used."""
        cache = cls.__new__(cls)
        cache._find_root = _Attribute(module, name)
        cache._view = None
        cache._set_up()
        cache.allocate()
        return cache

    @property
    def weight(self) -> Tensor:
        """What is cached, `(E, N, K)`, as it is now, detached."""
        root = self._find_root().detach()
        return root if self._view is None else self._view.of(root)

    def invalidate(self) -> None:
        """Quantize again at the next use: for writes that nothing can see, see above."""
        self._fresh_for = None

    def refresh(self) -> None:
        """Quantize now, if the cache was ever used: before the replay of a CUDA graph whose weight was written."""
        if self._scale_format is not None:
            self.allocate()
            self._quantize(self.weight, self._scale_format, self._forward_data, self._dgrad_data, self._scale)

    def allocate(self) -> None:
        """Make room for the weight as it is now, unless there is: for code that is about to be compiled or captured."""
        self._make_room(self.weight)

    def operands(self, w: Tensor, scale_format: ScaleFormat) -> tuple[WeightOperand, WeightOperand]:
        """The operands of forward and dgrad, quantized now if the weight has changed.

        Args:
            w: the weight `(E, N, K)`, without gradient.
            scale_format: as in `FP8Config`.

        Raises:
            ValueError: `w` is not the memory of the weight. Raised when it runs, also in compiled code.
        """
        self._make_room(w)
        forward_data, dgrad_data, scale = self._forward_data, self._dgrad_data, self._scale
        _refresh_cached_weight(w, forward_data, dgrad_data, scale, self._handle, scale_format.value)
        return WeightOperand(forward_data, scale), WeightOperand(dgrad_data, scale.transpose(1, 2))

    def _set_up(self) -> None:
        self._fresh_for = self._scale_format = None
        self._is_in_a_graph = False
        self._forward_data = self._dgrad_data = self._scale = torch.empty(0)
        number = next(_numbers)
        # A tensor, because a number would be a constant of compiled code: one compilation for each cache.
        self._handle = torch.tensor(number, device="cpu")
        _caches[number] = self
        _watch_optimizers()

    def _make_room(self, w: Tensor) -> None:
        if self._forward_data.shape == w.shape and self._forward_data.device == w.device:
            return
        num_experts, n, k = _checked_shape(w)
        self._forward_data = torch.empty((num_experts, n, k), dtype=torch.float8_e4m3fn, device=w.device)
        self._dgrad_data = torch.empty((num_experts, k, n), dtype=torch.float8_e4m3fn, device=w.device)
        self._scale = torch.empty((num_experts, n // BLOCK, k // BLOCK), dtype=torch.float32, device=w.device)

    def _ensure_fresh(
        self, w: Tensor, forward_data: Tensor, dgrad_data: Tensor, scale: Tensor, scale_format: ScaleFormat
    ) -> None:
        """Quantize `w` into the three others, unless they hold it already."""
        weight = self.weight
        if _memory(w) != _memory(weight):
            raise ValueError(
                f"weight_cache is of a weight {_describe(weight)}, and b is the transpose of one {_describe(w)}: they "
                "must be the same memory; pass b=w.transpose(-2, -1) for weight_cache=WeightCache(w)"
            )
        if self._fresh_for is None or self._fresh_for != self._state(scale_format):
            self._quantize(w, scale_format, forward_data, dgrad_data, scale)
        elif _is_being_captured(w):
            self._is_in_a_graph = True

    def _quantize(
        self, w: Tensor, scale_format: ScaleFormat, forward_data: Tensor, dgrad_data: Tensor, scale: Tensor
    ) -> None:
        quantize_weight_into(w, scale_format, scale, forward_data, dgrad_data)
        # Kernels write past the version counters, by which autograd refuses a backward through what has changed.
        torch.autograd.graph.increment_version((forward_data, dgrad_data, scale))
        self._scale_format = scale_format
        self._fresh_for = None if _is_being_captured(w) else self._state(scale_format)  # captured, nothing has run

    def _state(self, scale_format: ScaleFormat) -> Hashable:
        """Changes whenever what was quantized is no longer the weight, as far as anybody can see."""
        root = self._find_root()
        version = None if root.is_inference() else root._version
        # An address is not enough: what `p.data = other` frees, the allocator may hand out for the next `other`.
        storage = StorageWeakRef(root.untyped_storage())
        return (storage, _memory(root), version, scale_format, _optimizer_steps)

    def __getstate__(self) -> dict[str, Any]:
        return {"_find_root": self._find_root, "_view": self._view}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()  # room is made at the first use: a module that is being copied has no parameters yet


class _Attribute:
    """Whatever an attribute of a module is when it is asked for. The module holds the cache, so it is held weakly."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = ref(module), name

    def __call__(self) -> Tensor:
        module = self.module()
        if module is None:
            raise RuntimeError(f"the module whose {self.name} this WeightCache was of is gone: make a new WeightCache")
        return getattr(module, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attribute, (self.module(), self.name)


class _View:
    """Where a view lies in the memory of its root."""

    def __init__(self, root: Tensor, view: Tensor) -> None:
        self.root_layout = (root.shape, root.stride())
        self.shape, self.strides = view.shape, view.stride()
        self.offset = view.storage_offset() - root.storage_offset()

    def of(self, root: Tensor) -> Tensor:
        """The view."""
        if (root.shape, root.stride()) != self.root_layout:
            raise ValueError(
                f"the parameter of weight_cache has become {tuple(root.shape)} with strides {root.stride()}, it was "
                f"{tuple(self.root_layout[0])} with strides {self.root_layout[1]}: make a new WeightCache"
            )
        return root.as_strided(self.shape, self.strides, root.storage_offset() + self.offset)


_caches: "WeakValueDictionary[int, WeightCache]" = WeakValueDictionary()
_numbers = itertools.count()
_optimizer_steps = 0
_optimizers_are_watched = False


@torch_op(fake=returns_nothing, mutates_args=("forward_data", "dgrad_data", "scale"))
def _refresh_cached_weight(
    w: Tensor, forward_data: Tensor, dgrad_data: Tensor, scale: Tensor, handle: Tensor, scale_format: str
) -> None:
    # Whether to quantize is decided here, when it runs: compiled code has no other host code. It must write to the
    # tensors passed in, which a compiler may have copied, rather than to the cache's own.
    cache = _caches[int(handle)]
    cache._ensure_fresh(w, forward_data, dgrad_data, scale, ScaleFormat(scale_format))


def _watch_optimizers() -> None:
    global _optimizers_are_watched
    if not _optimizers_are_watched:
        register_optimizer_step_post_hook(_after_optimizer_step)
        _optimizers_are_watched = True


@torch.compiler.disable
def _after_optimizer_step(*_: object) -> None:
    """Fused optimizers leave no trace in a tensor's version. What replays read is quantized at once."""
    global _optimizer_steps
    for cache in list(_caches.values()):
        if cache._is_in_a_graph:
            cache.refresh()
    # Only now, so that they count as stale elsewhere: the optimizer's owner may have yet to copy the weights back.
    _optimizer_steps += 1


def _itself(x: Tensor) -> Tensor:
    return x


def _is_being_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _memory(x: Tensor) -> Hashable:
    """Where the elements lie. The stride of a dimension of one element says nothing."""
    strides = tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    return (x.data_ptr(), x.shape, strides, x.dtype, x.device)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} with strides {x.stride()}, {x.dtype}, at {x.data_ptr():#x} on {x.device}"


def _checked_shape(weight: Tensor) -> torch.Size:
    if weight.dim() != 3 or weight.shape[1] % BLOCK != 0 or weight.shape[2] % BLOCK != 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be 3D, (E, N, K), N and K multiples of {BLOCK}"
        )
    return weight.shape
