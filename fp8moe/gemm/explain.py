"""`explain`: what will run on a device, and why."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fp8moe.config import FP8Config, KernelPreference, check_config
from fp8moe.devices import compute_capability
from fp8moe.gemm.base import BackendUnavailableError, Gemm, Missing
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize, OpSizes
from fp8moe.gemm.select import (
    BACKENDS,
    FP8_PAYS_UP_TO,
    Selected,
    fp8_pays,
    missing_for_sizes,
    select_for_device,
    sizes_decide,
    token_tile_for,
)
from fp8moe.gemm.tuning import DecidingModel, deciding_model
from fp8moe.operands import BLOCK, in_whole_blocks


@dataclass(frozen=True)
class Prediction:
    """How long forward and backward of an op take in eager code, in microseconds."""

    what: str
    costs: Costs
    sizes: OpSizes
    cached: bool
    """Whether every weight has a `WeightCache`."""
    kept: bool = False
    """Whether backward takes what forward kept of the weights (`FP8Config.keep_quantized_weights`)."""

    @property
    def bf16_us(self) -> float:
        """In BF16."""
        return self.costs.bf16.predict_us(self.sizes.exact)

    @property
    def fp8_us(self) -> float:
        """In FP8."""
        return self.costs.fp8_with(self.cached, self.kept).predict_us(self.sizes.padded)

    @property
    def fp8_pays(self) -> bool:
        """Whether AUTO takes FP8."""
        return fp8_pays(self.costs, self.sizes.exact, self.cached, self.sizes.padded, kept=self.kept)

    def __str__(self) -> str:
        bf16 = self._time(self.costs.bf16, self.sizes.exact)
        fp8 = self._time(self.costs.fp8_with(self.cached, self.kept), self.sizes.padded)
        return f"{self.what}, forward and backward: BF16 {bf16}, FP8 {fp8}"

    def _time(self, cost: Cost, size: OpSize) -> str:
        device_us = cost.predict_device_us(size)
        if device_us < cost.host:
            return f"{cost.host:.0f} us (for the host to launch it; the device takes {device_us:.0f} us)"
        return f"{device_us:.0f} us"


@dataclass(frozen=True)
class Explanation:
    """What an `FP8Config` means on a device; `print` it."""

    device: str
    config: FP8Config
    decider: DecidingModel | None
    """The cost model that decides between FP8 and BF16; None where sizes decide nothing."""
    prediction: Prediction | None
    """What that model predicts; None if no sizes were given."""
    padding: str | None
    """What FP8 pays for sizes that are no multiples of 128; None if it pays nothing, or no sizes were given."""
    selected: dict[Gemm, Selected]
    """Empty if an explicit preference cannot be met: the op then raises `BackendUnavailableError`."""
    lacks: dict[KernelPreference, tuple[Missing, ...]]
    """For each backend, all that keeps it from computing one of the GEMMs here; empty if it can compute them all."""

    def __str__(self) -> str:
        lines = [f"fp8moe on {self.device}, KernelPreference.{self.config.kernel_preference.name}"]
        if self.selected:
            lines += [f"  {gemm.value:<8} {selected}" for gemm, selected in self.selected.items()]
            lines += self._token_tiles()
        else:
            lines.append("  cannot run: an explicit preference never falls back")
        if self.decider is not None:
            lines.append(f"cost model: {self.decider}")
        if self.prediction is not None:
            lines.append(f"  {self.prediction}")
        if self.padding is not None:
            lines.append(f"sizes: {self.padding}")
        lines.append("backends")
        for preference, lacks in self.lacks.items():
            lines.append(f"  {preference.name:<9}{'usable' if not lacks else 'not usable'}")
            lines += [f"    - {missing}" for missing in lacks]
        return "\n".join(lines)

    def _token_tiles(self) -> list[str]:
        """How many tokens share a scale in wgrad, where that is in FP8."""
        wgrad = self.selected[Gemm.WGRAD].backend
        if wgrad is None:
            return []
        stored, transposed = (token_tile_for(self.config, wgrad, on_the_right=right) for right in (True, False))
        lines = [f"           tiles of {stored} tokens of the activations"]
        if stored != transposed:
            lines[0] += " where the gradient is made (E, N, K):"
            lines.append(f"           weights stored so, pairs, main_grads; else of {transposed}")
        return lines


def explain(
    device: torch.device | str | None = None,
    config: FP8Config | None = None,
    shape: tuple[int, int, int, int] | None = None,
    *,
    layer: tuple[int, int, int, int, int] | None = None,
    weight_cache: bool = False,
) -> Explanation:
    """What will run on `device`, and why; also what each backend that cannot run lacks.

    Args:
        device: defaults to the current CUDA device if there is one, else the CPU.
        config: defaults to `FP8Config()`.
        shape: `(M, N, K, E)` of a `grouped_mm`.
        layer: `(T, k, H, I, E)` of a `moe_forward`. For a `swiglu_experts` give its number of rows as `T` and 1 as `k`.
            Without `shape` and `layer` the explanation is of sizes for which FP8 pays.
        weight_cache: whether every weight has a `WeightCache`.

    Raises:
        TypeError: `config` is not an `FP8Config`.
        ValueError: `device` is not a CPU or CUDA device, `shape` and `layer` are both given, or the file that
            `python -m fp8moe tune` wrote cannot be read.
    """
    config = FP8Config() if config is None else config
    check_config(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu or cuda")
    if shape is not None and layer is not None:
        raise ValueError(f"shape is {shape} and layer is {layer}; give one of them: one op is explained at a time")
    try:
        selected = select_for_device(config, device)
    except BackendUnavailableError:
        selected = {}
    op = _op_of(shape, layer)
    decider = prediction = None
    if sizes_decide(config, device) and selected[Gemm.FORWARD].backend is not None:
        decider = deciding_model(device)
        prediction = None if op is None else _predict(decider.model, op, weight_cache, config.keep_quantized_weights)
    if prediction is not None and not prediction.fp8_pays:
        reason = f"FP8 is not predicted to take {1 - FP8_PAYS_UP_TO:.0%} less time for these sizes"
        selected = dict.fromkeys(Gemm, Selected(None, reason))
    elif op is not None:
        selected = _for_sizes(selected, op.sizes, config)
    lacks = {
        preference: tuple(dict.fromkeys(missing for gemm in Gemm for missing in backend.missing(gemm, device)))
        + (() if op is None else missing_for_sizes([preference] * len(Gemm), op.sizes))
        for preference, backend in BACKENDS.items()
    }
    return Explanation(
        _describe(device), config, decider, prediction, None if op is None else _padding(op), selected, lacks
    )


class _Op(NamedTuple):
    what: str
    sizes: OpSizes
    features: tuple[int, ...]
    """Those that FP8 pads."""
    is_layer: bool


def _op_of(shape: tuple[int, int, int, int] | None, layer: tuple[int, int, int, int, int] | None) -> _Op | None:
    if layer is not None:
        tokens, experts_per_token, h, i, num_experts = layer
        sizes = OpSizes.of_layer(tokens * experts_per_token, h, i, num_experts)
        return _Op(f"layer (T, k, H, I, E) = {layer}", sizes, (h, i), True)
    if shape is not None:
        m, n, k, num_experts = shape
        return _Op(f"grouped_mm (M, N, K, E) = {shape}", OpSizes.of_product(m, n, k, num_experts), (n, k), False)
    return None


def _predict(model: CostModel, op: _Op, cached: bool, kept: bool) -> Prediction:
    what = op.what + (", weights cached" if cached else ", weights kept" if kept else "")
    return Prediction(what, model.costs(op.is_layer), op.sizes, cached, kept)


def _padding(op: _Op) -> str | None:
    padded = {size: in_whole_blocks(size) for size in op.features if size % BLOCK != 0}
    if not padded:
        return None
    exact, with_padding = op.sizes.exact.multiply_adds, op.sizes.padded.multiply_adds
    sizes = " and ".join(f"{size} to {block_size}" for size, block_size in padded.items())
    more = f", which adds {with_padding / exact - 1:.1%} to the products" if exact else ""
    return f"FP8 pads {sizes}{more}"


def _for_sizes(selected: dict[Gemm, Selected], sizes: OpSizes, config: FP8Config) -> dict[Gemm, Selected]:
    """What is left of it for an op of these sizes."""
    missing = missing_for_sizes([selected[gemm].backend for gemm in Gemm], sizes) if selected else ()
    if not missing:
        return selected
    if config.kernel_preference is not KernelPreference.AUTO:
        return {}
    instead = None if config.allow_bf16 else KernelPreference.EMULATED
    return dict.fromkeys(Gemm, Selected(instead, missing[0].reason))


def _describe(device: torch.device) -> str:
    capability = compute_capability(device)
    if capability is None:
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]})"
