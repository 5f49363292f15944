"""FSDP2 that gathers expert weights in FP8: `gather_in_fp8`.

FSDP asks the local tensor of a sharded parameter for what it is to gather (`fsdp_pre_all_gather`), and for what becomes
of it (`fsdp_post_all_gather`). The tensor stays a plain one, which only carries these two functions: optimizers and
checkpoints see nothing of them.

Shapes: a parameter `(E, N, K)`, or `(E, K, N)` if it is stored transposed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8moe.autograd.grouped_mm import DEFAULT_CONFIG
from fp8moe.autograd.main_grad import parameters_of_fsdp
from fp8moe.checks import FLOAT_DTYPES
from fp8moe.config import FP8Config, check_config
from fp8moe.gate import SWIGLU, Gate
from fp8moe.modules import SwiGLUExperts
from fp8moe.operands import BLOCK, in_whole_blocks
from fp8moe.quantize.gathered import GatheredCodes, GatheredPair, GatheredWeight, WeightForm
from fp8moe.quantize.reference import quantize_with_amax
from fp8moe.quantize.weight_cache import WeightCache
from fp8moe.quantize.weight_source import WeightSource
from fp8moe.quantize.weights import Split, quantize_weight_into


def gather_in_fp8(
    module: nn.Module,
    gate_up: str | tuple[str, str] | None = None,
    down: str | None = None,
    *,
    config: FP8Config = DEFAULT_CONFIG,
    gate: Gate | None = None,
    interleaved: bool = False,
    stored_transposed: bool = False,
) -> int:
    """Let FSDP2 gather expert weights as FP8 codes and scales, which are half of the bytes.

        fully_shard(layer); fully_shard(model)
        gather_in_fp8(model)

    Call it once, after `fully_shard` and before the first forward; on the meta device or after the weights are there,
    as you please. Each rank quantizes its shard when it changes (as `WeightCache` does, which costs 2 bytes an element
    of the shard), codes and scales travel, and the experts compute with what arrives: in FP8, whatever
    `KernelPreference.AUTO` would take, and with the bits of the whole weight quantized at once. Sharded parameters stay
    plain tensors in high precision. What FSDP gathers has no values in high precision: whatever else reads it raises.

    Args:
        module: without names, every `SwiGLUExperts` within; with names, the experts module that has these parameters.
        gate_up: the name of `w_gate_up`, or the names of `w_gate` and `w_up`, as `swiglu_experts` is called with them.
        down: the name of `w_down`.
        config, gate, interleaved: with names: as `swiglu_experts` is called with them.
        stored_transposed: with names: whether the parameters are `(E, H, 2I)` and `(E, I, H)`.

    Returns:
        how many parameters travel in FP8 now.

    Raises:
        TypeError: an argument is not of its type, or a parameter is no float `(E, N, K)`.
        ValueError: FSDP2 does not shard a parameter, or has gathered it already; it is offloaded to CPUs, or resharded
            to a smaller mesh; or a sharded dimension other than the experts is not of whole blocks of 128.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; it must be a torch.nn.Module")
    if (gate_up is None) is not (down is None):
        raise TypeError("gate_up and down are names that are given both, or neither")
    sharded = dict(_sharded_parameters())
    if gate_up is None or down is None:
        shards = [
            shard
            for experts in module.modules()
            if isinstance(experts, SwiGLUExperts)
            for shard in (
                _Shard(sharded, experts, "w_gate_up", WeightForm(experts.config.scale_format, Split.HALVES)),
                _Shard(sharded, experts, "w_down", WeightForm(experts.config.scale_format)),
            )
        ]
        if not shards:
            raise ValueError("module has no SwiGLUExperts: pass the names of the weights, gate_up and down")
    else:
        shards = _of_names(sharded, module, gate_up, down, config, gate, interleaved, stored_transposed)
    for shard in shards:
        shard.take_over()
    return len(shards)


def _of_names(
    sharded: dict[tuple[int, str], Any], module: nn.Module, gate_up: str | tuple[str, str], down: str,
    config: FP8Config, gate: Gate | None, interleaved: bool, stored_transposed: bool,
) -> list["_Shard"]:  # fmt: skip
    check_config(config)
    gate = SWIGLU if gate is None else gate
    if not isinstance(gate, Gate):
        raise TypeError(f"gate is {gate!r}; it must be a fp8moe.Gate, such as Gate.swiglu()")
    is_pair = not isinstance(gate_up, str)
    split = Split.INTERLEAVED if interleaved else Split.HALVES
    form = WeightForm(config.scale_format, split if gate.has_gate and not is_pair else Split.WHOLE, stored_transposed)
    names = (gate_up,) if isinstance(gate_up, str) else gate_up
    parts = [_Shard(sharded, module, name, form) for name in names]
    if is_pair:
        pair = GatheredPair([part.source for part in parts])
        for part in parts:
            part.pair = pair
    return [*parts, _Shard(sharded, module, down, WeightForm(config.scale_format, Split.WHOLE, stored_transposed))]


def _sharded_parameters() -> Iterator[tuple[tuple[int, str], Any]]:
    """Modules by their `id`, names of parameters, and the `FSDPParam` and `FSDPParamGroup` of each."""
    for parameter, group in parameters_of_fsdp():
        info = parameter._module_info
        modules, names = (info.module, *info.shared_modules), (info.param_name, *info.shared_param_names)
        for module, name in zip(modules, names, strict=True):
            yield (id(module), name), (parameter, group)


class _Shard:
    """What a rank stores of a weight, and how FSDP is to gather it."""

    def __init__(self, sharded: dict[tuple[int, str], Any], module: nn.Module, name: str, form: WeightForm) -> None:
        full_name = f"{type(module).__name__}.{name}"
        if (id(module), name) not in sharded:
            raise ValueError(f"{full_name} is not sharded by FSDP2: call fully_shard first, then gather_in_fp8")
        self.parameter, group = sharded[id(module), name]
        self.form, self.name = form, full_name
        self.source: GatheredCodes = GatheredCodes(form)
        self.pair: GatheredPair | None = None
        self.dim: int = self.parameter.fsdp_placement.dim
        self._cache: WeightCache | None = None
        self._part: tuple[Tensor, Tensor] | None = None
        """Of a shard of all experts: what `_quantize_part` has made."""
        self._check(group)

    def _check(self, group: Any) -> None:
        parameter, shape = self.parameter, tuple(self.parameter._orig_size)
        if parameter.sharded_param.dtype not in FLOAT_DTYPES or len(shape) != 3:
            raise TypeError(f"{self.name} is {parameter.sharded_param.dtype} {shape}; it must be a float (E, N, K)")
        if _has_functions(parameter._sharded_local_tensor):
            raise ValueError(f"{self.name} is gathered in its own way already: call gather_in_fp8 once")
        if hasattr(parameter, "_unsharded_param"):
            raise ValueError(f"{self.name} has been gathered in high precision: call gather_in_fp8 before any forward")
        if parameter.offload_to_cpu:
            raise ValueError(
                f"{self.name} is offloaded to the CPU, which gather_in_fp8 does not serve: leave it on GPUs"
            )
        if group._use_post_forward_mesh:
            raise ValueError(
                f"{self.name} is resharded to a smaller mesh after forward, which gather_in_fp8 does not serve: pass "
                "reshard_after_forward=True or False"
            )
        if not hasattr(parameter.mesh_info, "shard_process_group"):
            raise ValueError(f"{self.name} is replicated, not sharded: there is nothing to gather")
        if self.dim:
            n, k = shape[:0:-1] if self.form.stored_transposed else shape[1:]
            if n % (BLOCK if self.form.split is Split.WHOLE else 2 * BLOCK) or k % BLOCK:
                raise ValueError(
                    f"{self.name} {shape} is sharded in its dimension {self.dim}: the others must be multiples of 128, "
                    "gate and up each. Shard the experts, dimension 0"
                )
            if self.form.split is Split.INTERLEAVED:
                raise ValueError(
                    f"{self.name} is interleaved and sharded in its dimension {self.dim}; shard the experts, 0"
                )

    def take_over(self) -> None:
        """From now on FSDP asks this shard."""
        reset = self.parameter.reset_sharded_param

        def reset_and_attach() -> None:
            reset()
            self._attach()

        # FSDP calls it wherever the local tensor may have become another one (`to_empty`, `load_state_dict`).
        self.parameter.reset_sharded_param = reset_and_attach
        self._attach()

    def _attach(self) -> None:
        local = self.parameter._sharded_local_tensor
        if _has_functions(local):
            return
        local.fsdp_pre_all_gather = _Carried(self._pre_all_gather)
        local.fsdp_post_all_gather = _Carried(self._post_all_gather)
        self.parameter._init_extensions()
        self._cache = self._part = None

    # FSDP passes more to a function of five parameters, and then wants all that is gathered in the shape of the shard.
    def _pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], tuple[bool, Tensor]]:
        """What is gathered, as bytes; and for which product the codes are, and the scales of this rank."""
        local = self.parameter._sharded_local_tensor.detach()
        in_backward = torch._C._current_graph_task_id() != -1
        if self.dim:
            if self._part is None or not in_backward:
                self._part = self._quantize_part(local)
            codes, scale = self._part
            return (codes.view(torch.uint8),), (self.form.stored_transposed, scale)
        codes, scale = self._quantize_experts(local, in_backward)
        most = self.parameter.padded_sharded_param_size[0]
        return (_as_bytes(codes, most), _as_bytes(scale, most)), (in_backward, scale)

    def _quantize_experts(self, local: Tensor, in_backward: bool) -> tuple[Tensor, Tensor]:
        """Of a shard of whole experts: its codes, in backward those of dgrad, and its scales."""
        weight = local.transpose(1, 2) if self.form.stored_transposed else local
        if self._cache is None:
            self._cache = WeightCache(weight)
        used = self._cache._uses
        operand = self._cache.operand(
            weight, self.form.scale_format, for_dgrad=in_backward, since=used if in_backward and used else -1,
            split=self.form.split,
        )  # fmt: skip
        return operand.data, operand.scale.transpose(1, 2) if in_backward else operand.scale

    def _quantize_part(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Of a shard of all experts, with the maxima over all ranks of blocks that lie on several: its codes, in the
        order of the parameter, and the scales of the whole weight."""
        dim, info = self.dim, self.parameter.mesh_info
        length = local.shape[dim]
        start = info.shard_mesh_rank * length
        before, first = start % BLOCK, start // BLOCK
        padded, count = local, in_whole_blocks(before + length) // BLOCK
        if before or length % BLOCK:
            shape = list(local.shape)
            shape[dim] = count * BLOCK
            padded = local.new_zeros(shape)
            padded.narrow(dim, before, length).copy_(local)
        num_experts, *sizes = self.parameter._orig_size
        amax = torch.zeros(num_experts, *(size // BLOCK for size in sizes), device=local.device)
        here = amax.narrow(dim, first, count)
        here.copy_(_in_blocks(padded).abs().amax((2, 4)))
        # As integers: these are not negative, so their order is that of their bits, and NaN is the largest.
        dist.all_reduce(amax.view(torch.int32), dist.ReduceOp.MAX, group=info.shard_process_group)
        # The padding of a block that other ranks have a part of gets its maximum.
        if before:
            padded.select(dim, 0)[:, ::BLOCK] = here.select(dim, 0).to(padded.dtype)
        if (before + length) % BLOCK:
            padded.select(dim, -1)[:, ::BLOCK] = here.select(dim, -1).to(padded.dtype)
        codes = torch.empty(padded.shape, dtype=torch.float8_e4m3fn, device=local.device)
        scale = torch.empty((num_experts, *(size // BLOCK for size in padded.shape[1:])), device=local.device)
        quantize_weight_into(padded, self.form.scale_format, scale, codes, None)
        _, scale = quantize_with_amax(amax, amax, self.form.scale_format)  # of the whole weight
        return (
            codes.view(torch.uint8).narrow(dim, before, length).contiguous().view(codes.dtype),
            scale.transpose(1, 2).contiguous() if self.form.stored_transposed else scale,
        )

    def _post_all_gather(
        self, gathered: Sequence[Tensor], said: tuple[bool, Tensor], dtype: torch.dtype, *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:  # fmt: skip
        """The gathered weight, the first time; later its memory has been filled again. `said` is what
        `_pre_all_gather` says of it."""
        for_dgrad, scale = said
        num_experts, *sizes = self.parameter._orig_size
        n, k = sizes[::-1] if self.form.stored_transposed else sizes
        n, k = self.form.split.padded(n), in_whole_blocks(k)
        of_experts = (k, n) if for_dgrad else (n, k)
        codes = gathered[0].view(torch.float8_e4m3fn).view(-1, *of_experts)[:num_experts]
        if len(gathered) > 1:
            scale = gathered[1].view(torch.float32).view(-1, n // BLOCK, k // BLOCK)[:num_experts]
        elif scale.is_cuda:
            # This rank's are all there are: features are sharded, or there is one rank. They were made on FSDP's
            # stream, whose next tensors must not take their memory while the experts read it.
            scale.record_stream(torch.cuda.current_stream(scale.device))
        self.source.hold(codes, scale, for_dgrad=for_dgrad)
        if out is not None:
            return None
        shape, stride = self.parameter._orig_size, self.parameter._contiguous_orig_stride
        sources: tuple[WeightSource, ...] = (self.source,) if self.pair is None else (self.source, self.pair)
        weight = GatheredWeight(
            codes, self.source.handle, None if self.pair is None else self.pair.handle, shape, stride, dtype,
            not self.form.stored_transposed, sources,
        )  # fmt: skip
        return weight, ()  # all memory is FSDP's


class _Carried:
    """A function that a tensor carries. Copies of the tensor, in memory and in files, carry None."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _has_functions(local: Tensor) -> bool:
    """Whether FSDP asks functions of this tensor what it is to gather. (Copies have attributes of None.)"""
    return getattr(local, "fsdp_pre_all_gather", None) is not None


def _as_bytes(x: Tensor, length: int) -> Tensor:
    """The bytes of `x`, and zeros up to this length of its first dimension."""
    data = x.view(torch.uint8)
    return data if len(x) == length else torch.cat([data, data.new_zeros(length - len(x), *data.shape[1:])])


def _in_blocks(w: Tensor) -> Tensor:
    """`(E, N/128, 128, K/128, 128)`."""
    num_experts, n, k = w.shape
    return w.view(num_experts, n // BLOCK, BLOCK, k // BLOCK, BLOCK)
