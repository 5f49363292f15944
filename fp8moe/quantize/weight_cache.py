"""`WeightCache`: a weight quantized once for as long as it does not change, for forward and dgrad."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8moe.checks import check_tensors
from fp8moe.config import ScaleFormat
from fp8moe.devices import is_being_captured
from fp8moe.operands import BLOCK, WeightOperand, in_whole_blocks
from fp8moe.quantize.fingerprint import find_changes, num_chunks
from fp8moe.quantize.weight_source import WeightSource
from fp8moe.quantize.weights import Split, quantize_weight_into


class WeightCache(WeightSource):
    """The FP8 operands of one weight, kept between forward, backward and microbatches until the weight changes.

        cache = fp8moe.WeightCache(w)  # w (E, N, K)
        out = fp8moe.grouped_mm(a, w.transpose(-2, -1), offs, weight_cache=cache)

    Without it a weight is quantized in every forward and once more in every backward. The cache costs 2 bytes for each
    element of the weight, from its first use on. Where `KernelPreference.AUTO` takes BF16, it is not used; AUTO counts
    on it to be fresh, as it is in every microbatch of a step but the first.

    Every forward asks whether the weight has changed. Three kinds of change are seen with certainty: a step of any
    `torch.optim.Optimizer` (fused ones too), a write that PyTorch counts (`w.copy_`, `load_state_dict`), other memory
    or layout (`p.data = other`). Any other write (`p.data.copy_`, a collective, NumPy, a replayed CUDA graph) is seen
    by its effect: the GPU compares a hash of 1/256 of the elements, and quantizes the weight again if it differs. A
    write that changes `n` elements in random places is missed with probability `(255/256)**n`: 1000 elements 2%, 5000
    3e-9. So one case is left for `invalidate()`: few elements written past PyTorch's counter, as by an optimizer of
    another kind whose BF16 update rounds to nothing for most elements.

    CUDA graphs: use the cache once before capturing. The question is part of the graph: replays see optimizer steps
    with certainty, and any other write by its effect. A graph captured while the cache was stale quantizes in each
    replay. Keep to one scale format: the host does not see which one a replay leaves behind.

    A deep copy or an unpickled cache is of the copied weight and shares nothing with the original. Keep the cache for
    as long as the weight: autograd does not hold it. Use it on one CUDA stream: it does not make another wait for what
    it writes.

    Args:
        weight: bf16, fp16 or fp32 `(E, N, K)`, any size and strides: the parameter, or a view of it. A parameter stored
            `(E, K, N)` is passed as `p.transpose(-2, -1)`.

    Raises:
        TypeError: `weight` is not a plain tensor.
        ValueError: it is not 3D.
    """

    _find_root: Callable[[], Tensor]
    """Whatever owns the memory. Versions and addresses are asked of it: `p.data = other` leaves older views behind, and
    a view within compiled code has no base and no meaningful version."""
    _view: "_View | None"
    _is_captured: bool
    """Whether a CUDA graph has the question, and so may change the operands unseen by the host."""
    _quantized: Hashable
    """The state that the operands hold, as far as the host can see; None if they hold nothing."""
    _quantized_after: int
    """The optimizer steps that the host had seen then."""
    _known: Tensor | None
    """The fingerprint, see `find_changes`; None before the first use."""
    _operands: tuple[Tensor, ...]
    """What has changed, forward and dgrad codes, their scales."""

    def __init__(self, weight: Tensor) -> None:
        check_tensors({"weight": weight})
        _check_shape(weight)
        root = weight if weight._base is None else weight._base
        self._find_root = partial(_itself, root)
        self._view = None if weight is root else _View(root, weight)
        self._set_up()

    @classmethod
    def of_parameter(cls, module: nn.Module, name: str) -> "WeightCache":
        """Of whatever tensor `(E, N, K)` is the attribute `name` of `module` when it is used."""
        cache = cls.__new__(cls)
        cache._find_root = _Attribute(module, name)
        cache._view = None
        cache._set_up()
        return cache

    def invalidate(self) -> None:
        """Quantize again at the next use, or replay: for writes that nobody can see, see above."""
        if self._known is not None:
            self._known[:, 1] -= 1  # another step than any that will come

    def operand(
        self, w: Tensor, scale_format: ScaleFormat, *, for_dgrad: bool, since: int = -1, split: Split = Split.WHOLE
    ) -> WeightOperand:
        """The operand of forward or dgrad, made now if the weight has changed. No operator: for use within operators.

        Args:
            w: the weight `(E, N, K)`, without gradient.
            scale_format: as in `FP8Config`.
            for_dgrad: which of the two.
            since: of `handle_after_use`: where nobody has used the cache since, it holds what forward took.
            split: into which parts `w` is divided; always the same for one cache.

        Raises:
            ValueError: `w` is not the memory of the weight.
            RuntimeError: a CUDA graph is being captured, and the cache has never been used.
        """
        root = self._find_root().detach()
        weight = root if self._view is None else self._view.of(root)
        if _memory(w) != _memory(weight):
            raise ValueError(
                f"weight_cache is of a weight {_describe(weight)}, and b is the transpose of one {_describe(w)}: they "
                "must be the same memory; pass b=w.transpose(-2, -1) for weight_cache=WeightCache(w)"
            )
        known, changed, forward_data, dgrad_data, scale = self._memory_for(w, split)
        if w.numel() > 0 and (since != self._uses or self._is_captured):
            self._uses += 1
            state, capturing = self._state(scale_format, split), is_being_captured(w)
            must = self._quantized != state
            # A graph counts the steps by itself. Elsewhere the plain kernel is a tenth faster than the one that asks.
            if not capturing:
                must |= self._quantized_after != _host_steps
            self._quantized = None
            find_changes(w, _steps(w.device), known, changed, force=must)
            asks = capturing or not must
            changed_or_none = changed if asks else None
            quantize_weight_into(w, scale_format, scale, forward_data, dgrad_data, changed_or_none, split=split)
            self._is_captured |= capturing
            if not (must and capturing):  # captured, nothing has run
                self._quantized = state
                self._quantized_after = self._quantized_after if capturing else _host_steps
        return WeightOperand(dgrad_data, scale.transpose(1, 2)) if for_dgrad else WeightOperand(forward_data, scale)

    def _set_up(self) -> None:
        self._register()
        self._is_captured, self._quantized_after = False, -1
        self._quantized = self._known = None
        self._operands = ()
        _watch_optimizers()

    def _memory_for(self, w: Tensor, split: Split) -> tuple[Tensor, ...]:
        """`known` and `changed` of the fingerprint, forward and dgrad codes and their scales for `w`."""
        num_experts, n, k = w.shape[0], split.padded(w.shape[1]), in_whole_blocks(w.shape[2])
        if self._known is None or self._operands[1].shape != (num_experts, n, k) or self._known.device != w.device:
            if is_being_captured(w):
                raise RuntimeError(
                    "this WeightCache is used for the first time while a CUDA graph is captured; run the captured code "
                    "once before, so that the cache's memory does not belong to the graph"
                )
            with torch.inference_mode(False):  # who uses it next may be training
                self._quantized = self._known = None  # and stays so if memory runs out
                self._operands = ()
                _steps(w.device)
                self._operands = (
                    torch.empty(num_chunks(w), dtype=torch.int32, device=w.device),
                    torch.empty((num_experts, n, k), dtype=torch.float8_e4m3fn, device=w.device),
                    torch.empty((num_experts, k, n), dtype=torch.float8_e4m3fn, device=w.device),
                    torch.empty((num_experts, n // BLOCK, k // BLOCK), dtype=torch.float32, device=w.device),
                )
                self._known = torch.zeros((num_chunks(w), 2), dtype=torch.int32, device=w.device)
        return self._known, *self._operands

    def _state(self, scale_format: ScaleFormat, split: Split) -> Hashable:
        """Changes with every write that PyTorch counts, and with other memory."""
        root = self._find_root()
        version = None if root.is_inference() else root._version
        # An address is not enough: what `p.data = other` frees, the allocator may hand out for the next `other`.
        return (StorageWeakRef(root.untyped_storage()), _memory(root), version, scale_format, split)

    def __getstate__(self) -> dict[str, Any]:
        return {"_find_root": self._find_root, "_view": self._view}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()


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


_steps_of_device: dict[torch.device, Tensor] = {}
_host_steps = 0
"""The same, as far as the host knows: it sees no step that a replayed graph takes."""
_optimizers_are_watched = False


def _steps(device: torch.device) -> Tensor:
    """int32 `(1,)` on `device`: how many optimizer steps this process has taken, for all caches."""
    if device not in _steps_of_device:
        _steps_of_device[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _steps_of_device[device]


def _watch_optimizers() -> None:
    global _optimizers_are_watched
    if not _optimizers_are_watched:
        register_optimizer_step_post_hook(_after_optimizer_step)
        _optimizers_are_watched = True


@torch.compiler.disable
def _after_optimizer_step(*_: object) -> None:
    """Fused optimizers leave no trace in a tensor's version, and a step may change few elements of a weight in BF16. On
    the device, so that a graph that contains the step counts it in each replay."""
    global _host_steps
    _host_steps += 1
    with torch.no_grad():
        for steps in _steps_of_device.values():
            steps += 1


def _itself(x: Tensor) -> Tensor:
    return x


def _memory(x: Tensor) -> Hashable:
    """Where the elements lie. The stride of a dimension of one element says nothing."""
    strides = tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    return (x.data_ptr(), x.shape, strides, x.dtype, x.device)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} with strides {x.stride()}, {x.dtype}, at {x.data_ptr():#x} on {x.device}"


def _check_shape(weight: Tensor) -> None:
    if weight.dim() != 3:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be 3D, (E, N, K)")
