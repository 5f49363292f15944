"""`explain`: what will run on a device, and why."""

from dataclasses import dataclass

import torch

from fp8moe.config import FP8Config, KernelPreference, check_config
from fp8moe.devices import compute_capability
from fp8moe.gemm.base import BackendUnavailableError, Gemm, Missing
from fp8moe.gemm.cost import Cost, CostModel, Costs, OpSize
from fp8moe.gemm.select import BACKENDS, FP8_PAYS_UP_TO, Selected, fp8_pays, select_for_device, sizes_decide
from fp8moe.gemm.tuning import DecidingModel, deciding_model


@dataclass(frozen=True)
class Prediction:
    """How long forward and backward of an op take in eager code, in microseconds."""

    what: str
    costs: Costs
    size: OpSize
    cached: bool
    """Whether every weight has a `WeightCache`."""

    @property
    def bf16_us(self) -> float:
        """In BF16."""
        return self.costs.bf16.predict_us(self.size)

    @property
    def fp8_us(self) -> float:
        """In FP8."""
        return self.costs.fp8_with(self.cached).predict_us(self.size)

    @property
    def fp8_pays(self) -> bool:
        """Whether AUTO takes FP8."""
        return fp8_pays(self.costs, self.size, self.cached)

    def __str__(self) -> str:
        bf16, fp8 = self._time(self.costs.bf16), self._time(self.costs.fp8_with(self.cached))
        return f"{self.what}, forward and backward: BF16 {bf16}, FP8 {fp8}"

    def _time(self, cost: Cost) -> str:
        device_us = cost.predict_device_us(self.size)
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
    selected: dict[Gemm, Selected]
    """Empty if an explicit preference cannot be met: the op then raises `BackendUnavailableError`."""
    lacks: dict[KernelPreference, tuple[Missing, ...]]
    """For each backend, all that keeps it from computing one of the GEMMs here; empty if it can compute them all."""

    def __str__(self) -> str:
        lines = [f"fp8moe on {self.device}, KernelPreference.{self.config.kernel_preference.name}"]
        if self.selected:
            lines += [f"  {gemm.value:<8} {selected}" for gemm, selected in self.selected.items()]
        else:
            lines.append("  cannot run: an explicit preference never falls back")
        if self.decider is not None:
            lines.append(f"cost model: {self.decider}")
        if self.prediction is not None:
            lines.append(f"  {self.prediction}")
        lines.append("backends")
        for preference, lacks in self.lacks.items():
            lines.append(f"  {preference.name:<9}{'usable' if not lacks else 'not usable'}")
            lines += [f"    - {missing}" for missing in lacks]
        return "\n".join(lines)


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
    decider = prediction = None
    if sizes_decide(config, device) and selected[Gemm.FORWARD].backend is not None:
        decider = deciding_model(device)
        prediction = _predict(decider.model, shape, layer, weight_cache)
    if prediction is not None and not prediction.fp8_pays:
        reason = f"FP8 is not predicted to take {1 - FP8_PAYS_UP_TO:.0%} less time for these sizes"
        selected = dict.fromkeys(Gemm, Selected(None, reason))
    lacks = {
        preference: tuple(dict.fromkeys(missing for gemm in Gemm for missing in backend.missing(gemm, device)))
        for preference, backend in BACKENDS.items()
    }
    return Explanation(_describe(device), config, decider, prediction, selected, lacks)


def _predict(
    model: CostModel,
    shape: tuple[int, int, int, int] | None,
    layer: tuple[int, int, int, int, int] | None,
    cached: bool,
) -> Prediction | None:
    if layer is not None:
        tokens, experts_per_token, *features = layer
        what, size = f"layer (T, k, H, I, E) = {layer}", OpSize.of_layer(tokens * experts_per_token, *features)
    elif shape is not None:
        what, size = f"grouped_mm (M, N, K, E) = {shape}", OpSize.of_product(*shape)
    else:
        return None
    what += ", weights cached" if cached else ""
    return Prediction(what, model.costs(layer is not None), size, cached)


def _describe(device: torch.device) -> str:
    capability = compute_capability(device)
    if capability is None:
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]})"
