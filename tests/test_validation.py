"""Bad input raises before anything is computed, names what is wrong, and loses nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8moe
from fp8moe import FP8Config, KernelPreference
from fp8moe.autograd.validate import check_topk
from fp8moe.rows.groups import plan_groups
from fp8moe.rows.routing import Routing
from tests.measures import assert_same_bits


def arguments() -> dict[str, Any]:
    return {
        "a": torch.randn(300, 256, dtype=torch.bfloat16),
        "b": torch.randn(3, 256, 128, dtype=torch.bfloat16),
        "offs": torch.tensor([100, 200, 300], dtype=torch.int32),
    }


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a not a tensor": ({"a": [[1.0]]}, TypeError, r"a is a list; it must be a torch\.Tensor"),
    "offs not a tensor": ({"offs": [100, 200, 300]}, TypeError, r"offs is a list"),
    "a of rank 3": ({"a": torch.randn(1, 300, 256)}, ValueError, r"a has shape \(1, 300, 256\); it must be 2D"),
    "b of rank 2": ({"b": torch.randn(256, 128)}, ValueError, r"b has shape \(256, 128\); it must be 3D"),
    "a in fp64": ({"a": torch.randn(300, 256).double()}, TypeError, r"a has dtype torch\.float64; it must be one of"),
    "b in int8": ({"b": torch.ones(3, 256, 128, dtype=torch.int8)}, TypeError, r"b has dtype torch\.int8"),
    "b not transposed": ({"b": torch.randn(3, 128, 256)}, ValueError, r"pass.*w\.transpose\(-2, -1\)"),
    "K zero": (
        {"a": torch.randn(300, 0), "b": torch.randn(3, 0, 128)},
        ValueError,
        r"K .* is 0; there must be at least one feature",
    ),
    "N zero": ({"b": torch.randn(3, 256, 0)}, ValueError, r"N .* is 0; there must be at least one feature"),
    "no experts": (
        {"b": torch.randn(0, 256, 128), "offs": torch.zeros(0, dtype=torch.int32)},
        ValueError,
        r"at least one group",
    ),
    "offs in int64": ({"offs": torch.tensor([1, 2, 3])}, TypeError, r"offs has dtype torch\.int64.*torch\.int32"),
    "offs too short": ({"offs": torch.tensor([1, 2], dtype=torch.int32)}, ValueError, r"offs has shape \(2,\).*\(3,\)"),
    "offs of rank 2": ({"offs": torch.ones(3, 1, dtype=torch.int32)}, ValueError, r"offs has shape \(3, 1\)"),
    "b on another device": ({"b": torch.empty(3, 256, 128, device="meta")}, ValueError, r"b is on meta and a on cpu"),
    "unsupported device": (
        {key: value.to("meta") for key, value in arguments().items()},
        ValueError,
        r"a is on meta; the device must be one of cpu, cuda",
    ),
    "a sparse": ({"a": torch.eye(256).to_sparse()}, ValueError, r"a has layout torch\.sparse_coo.*a\.to_dense\(\)"),
    "config a string": ({"config": "auto"}, TypeError, r"config is 'auto'; it must be an FP8Config"),
    "no such backend here": (
        {"config": FP8Config(kernel_preference=KernelPreference.TRITON)},
        fp8moe.BackendUnavailableError,
        r"KernelPreference\.TRITON cannot compute forward on cpu: .*Fix: ",
    ),
    "offs past the rows": (
        {"offs": torch.tensor([100, 200, 301], dtype=torch.int32), "config": FP8Config(debug=True)},
        ValueError,
        r"offs must not decrease and must lie in 0\.\.300 .* it is \[100, 200, 301\]",
    ),
    "offs decreasing": (
        {"offs": torch.tensor([200, 100, 300], dtype=torch.int32), "config": FP8Config(debug=True)},
        ValueError,
        r"offs must not decrease",
    ),
    "offs negative": (
        {"offs": torch.tensor([-1, 100, 300], dtype=torch.int32), "config": FP8Config(debug=True)},
        ValueError,
        r"offs must not decrease and must lie in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_inputs_stay_as_they_were(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, error, message = BAD[case]
    inputs = {**arguments(), **changes}
    copies = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    started: list[str] = []
    monkeypatch.setattr("fp8moe.autograd.grouped_mm.plan_groups", lambda *args: started.append("plan"))
    with pytest.raises(error, match=f"(?s){message}"):
        fp8moe.grouped_mm(**inputs)
    assert not started
    for name, copy in copies.items():
        if copy.device.type != "meta" and copy.layout is torch.strided:
            assert_same_bits(inputs[name], copy)


def test_good_input_passes_with_every_check_on() -> None:
    fp8moe.grouped_mm(**arguments(), config=FP8Config(debug=True))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kernel_preference", "deepgemm", "FP8Config.kernel_preference is 'deepgemm'; it must be a KernelPreference"),
        ("scale_format", KernelPreference.AUTO, "FP8Config.scale_format is .*; it must be a ScaleFormat"),
        ("allow_bf16", 1, "FP8Config.allow_bf16 is 1; it must be a bool"),
        ("debug", None, "FP8Config.debug is None; it must be a bool"),
        ("wgrad_token_tile", 256.0, "FP8Config.wgrad_token_tile is 256.0; it must be an int or None"),
        ("wgrad_token_tile", "256", "FP8Config.wgrad_token_tile is '256'; it must be an int or None"),
    ],
)
def test_config_refuses_other_types(field: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FP8Config(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [0, 64, 300, 1024, True])
def test_config_refuses_other_token_tiles(tile: int) -> None:
    with pytest.raises(
        ValueError, match=rf"FP8Config.wgrad_token_tile is {tile}; it must be one of \(128, 256, 512\), or None"
    ):
        FP8Config(wgrad_token_tile=tile)


def test_config_is_frozen_and_hashable() -> None:
    assert FP8Config() == FP8Config()
    assert len({FP8Config(), FP8Config(debug=True), FP8Config()}) == 2
    with pytest.raises(AttributeError):
        FP8Config().debug = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("topk_ids", "error", "message"),
    [
        ([[0, 1]], TypeError, r"topk_ids is a list; it must be a torch\.Tensor"),
        (torch.ones(3, 2), TypeError, r"topk_ids has dtype torch\.float32; it must be an integer dtype"),
        (torch.ones(3, 2, dtype=torch.bool), TypeError, r"topk_ids has dtype torch\.bool"),
        (torch.ones(3).long(), ValueError, r"topk_ids has shape \(3,\); it must be \(T, k\)"),
        (torch.ones(3, 0).long(), ValueError, r"topk_ids has shape \(3, 0\); .* at least one choice"),
    ],
    ids=["no tensor", "floats", "bools", "1D", "no choice"],
)
def test_topk_ids_that_are_no_choices_are_refused(topk_ids: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_topk(topk_ids, num_experts=4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_topk_ids_may_name_no_expert(dtype: torch.dtype) -> None:
    check_topk(torch.full((3, 2), 77, dtype=dtype), num_experts=4)
    check_topk(torch.empty(0, 2, dtype=dtype), num_experts=4)


def test_more_rows_than_int32_has_numbers_are_refused_when_it_runs() -> None:
    too_many = torch.zeros(1, dtype=torch.uint8).expand(2**28, 8)
    with pytest.raises(ValueError, match=r"2147483648 rows in 4 groups; .* at most 2147483647: split the batch"):
        Routing.from_topk(too_many, 4)
    with pytest.raises(ValueError, match=r"2147483640 rows in 5 groups"):
        plan_groups(torch.zeros(5, dtype=torch.int32), 2147483640)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it does itself
def test_distributed_tensors_and_transforms_are_told_what_to_do() -> None:
    class Sharded(Tensor):
        """As `torch.distributed.tensor.DTensor`, which needs a process group."""

        def to_local(self) -> Tensor:
            return self.as_subclass(Tensor)

    inputs = arguments()
    for name in ("a", "b", "offs"):
        sharded = inputs[name].as_subclass(Sharded)
        with pytest.raises(TypeError, match=rf"{name} is a Sharded; it must be a plain tensor: pass {name}\.to_local"):
            fp8moe.grouped_mm(**{**inputs, name: sharded})
    hidden, ids, weights = torch.randn(4, 128), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    w_gate_up, w_down = torch.randn(2, 256, 128), torch.randn(2, 128, 128)
    with pytest.raises(TypeError, match=r"w_gate_up is a Sharded"):
        fp8moe.moe_forward(hidden, ids, weights, w_gate_up.as_subclass(Sharded), w_down)
    with pytest.raises(TypeError, match=r"main_grad is a Sharded"):
        fp8moe.grouped_mm(**inputs, main_grad=torch.zeros(inputs["b"].shape).as_subclass(Sharded))
    with pytest.raises(TypeError, match=r"weight is a Sharded"):
        fp8moe.WeightCache(w_down.as_subclass(Sharded))
    with pytest.raises(TypeError, match=r"x is a Sharded"):
        fp8moe.swiglu_quantize(hidden.as_subclass(Sharded))
    with pytest.raises(TypeError, match=r"hidden is within a transform of torch\.func, such as vmap"):
        torch.func.vmap(lambda x: fp8moe.moe_forward(x, ids, weights, w_gate_up, w_down))(hidden[None])
