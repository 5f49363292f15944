"""Models of torchtitan whose experts an override of fp8moe computes, against torchtitan's own experts."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import fp8moe
from fp8moe import FP8Config, KernelPreference, ScaleFormat
from fp8moe.quantize import reference
from tests.measures import assert_same_bits, sqnr

pytest.importorskip("torchtitan")
titan = pytest.importorskip("fp8moe.integrations.torchtitan", exc_type=ImportError)

import torchtitan.distributed.parallel_dims as parallel_dims  # noqa: E402
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.manager import ConfigManager  # noqa: E402
from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.distributed.compile import apply_compile  # noqa: E402
from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models import deepseek_v3, gpt_oss, qwen3  # noqa: E402
from torchtitan.models.common import CosSinRoPE, config_utils  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts  # noqa: E402
from torchtitan.models.common.token_dispatcher import TorchAOTokenDispatcher  # noqa: E402
from torchtitan.models.qwen3.parallelize import parallelize_qwen3  # noqa: E402
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config  # noqa: E402
from torchtitan.protocols.module import Module  # noqa: E402

EXPERTS, EXPERT_PARALLEL, GROUPED_MM, SELECTIVE_AC = (
    f"fp8moe.integrations.torchtitan.{name}" for name in ("experts", "expert_parallel", "grouped_mm", "selective_ac")
)
H, E, K, VOCABULARY, LENGTH = 256, 8, 2, 64, 32
LEARNING_RATE = 5e-4

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # torchtitan's router asks for fp32
]


def initial(std: float = 0.02) -> Any:
    return lambda weight: nn.init.normal_(weight, std=std)


def moe_config(intermediate_size: int = 128, hidden_size: int = H) -> Any:
    """Of a layer whose dispatcher can also send rows to other ranks."""
    init = initial()
    return config_utils.make_moe_config(
        num_experts=E,
        router=config_utils.make_router_config(
            dim=hidden_size,
            num_experts=E,
            gate_param_init={"weight": initial(0.2)},
            top_k=K,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=config_utils.make_routed_experts_config(
            dim=hidden_size,
            hidden_dim=intermediate_size,
            num_experts=E,
            top_k=K,
            param_init={"w1_EFD": init, "w2_EDF": init, "w3_EFD": init},
            comm_backend="standard",
        ),
    )


def model_config(**sizes: int) -> Any:
    """torchtitan's debug model of Qwen3, with two layers, narrow attention and small experts."""
    config = qwen3.qwen3_configs["debugmodel_moe"](attn_backend="flex")
    config.layers = qwen3._build_qwen3_moe_layers(
        n_layers=2, dim=H, n_heads=2, n_kv_heads=2, head_dim=32, moe_hidden_dim=128, num_experts=E, top_k=K,
        attn_backend="flex", moe_comm_backend="standard", rope=CosSinRoPE.Config(dim=32, max_seq_len=LENGTH),
    )  # fmt: skip
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.moe = moe_config(**sizes)
    config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = VOCABULARY
    return config


def overridden(config: Any, *imports: Any) -> Any:
    apply_overrides(OverrideConfig(imports=list(imports)), config)
    return config


def build(*imports: Any, seed: int = 0, config: Any = None) -> Any:
    """A small model, the same parameters with every override."""
    model = overridden(model_config() if config is None else config, *imports).build()
    torch.manual_seed(seed)
    model.init_states(buffer_device=torch.device("cpu"))
    return model.train()


def build_experts(*imports: Any, **sizes: int) -> Any:
    """The experts of a layer with its dispatcher."""
    module = overridden(moe_config(**sizes), *imports).routed_experts.build()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.08)
    return module


def loss_of(model: Any, seed: int, rows: int = 4) -> Tensor:
    """Of predicting sequences that count up from a random token in steps of one to three."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, most, (rows, 1), generator=generator) for most in (VOCABULARY, 4))
    positions = torch.arange(LENGTH)
    tokens = (start + step * positions) % VOCABULARY
    logits = model(tokens, positions.expand(rows, -1))
    if isinstance(logits, DTensor):  # tensor parallelism shards the vocabulary
        logits = logits.full_tensor()
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def losses(model: Any, steps: int) -> list[float]:
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), []
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@cache
def losses_of_torchtitans_own(seed: int) -> list[float]:
    return losses(build(seed=seed), 20)


def checkpointed(model: Any, policy: Any) -> Any:
    if policy is not None:
        policy.build(dump_folder="").apply(model)
    return model


def compiled(model: Any) -> Any:
    """Each layer, as torchtitan does it."""
    apply_compile(
        model,
        compile_config=CompileConfig(enable=True, backend="aot_eager"),
        parallel_dims=SimpleNamespace(tp_enabled=False),
    )
    return model


def selective(*imports: str) -> Any:
    """The configuration of selective checkpointing, as overrides make it."""
    return overridden(SimpleRoot(activation_checkpoint=SelectiveAC.Config()), *imports).activation_checkpoint


class Root(Module):
    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        activation_checkpoint: SelectiveAC.Config


SimpleRoot = Root.Config


@pytest.fixture(autouse=True)
def _no_class_has_been_warned_of() -> Iterator[None]:
    titan._warned.clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class GroupedGemms(TorchDispatchMode):
    """How many grouped GEMMs run that are M-grouped: with each row's own expert."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "m_grouped" in str(func)
        return func(*args, **(kwargs or {}))


def routed(tokens: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden `(1, T, H)`, scores and ids `(1, T, K)`, and how many tokens each expert has; the last one has none."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, tokens, H, generator=generator, requires_grad=True)
    scores, ids = torch.randn(1, tokens, E - 1, generator=generator).softmax(-1).topk(K)
    return hidden, scores.requires_grad_(), ids, torch.bincount(ids.flatten(), minlength=E)


def run(module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of hidden, scores and parameters."""
    out = module(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, (*inputs[:2], *module.parameters()), dout.to(out.dtype))]


class TestWhatItComputes:
    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    def test_equals_torchtitans_experts(self, override: str) -> None:
        actual, expected = (run(build_experts(*imports), routed()) for imports in ([override], []))
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert sqnr(ours, theirs) >= 21.5
        assert all((gradient[-1] == 0).all() for gradient in actual[3:])  # of the expert without tokens

    def test_is_swiglu_experts(self) -> None:
        experts = build_experts(EXPERTS).inner_experts
        rows, counts = torch.randn(40, H), torch.tensor([7, 0, 20, 1, 0, 2, 10, 0])
        expected = fp8moe.swiglu_experts(
            rows, (experts.w1_EFD, experts.w3_EFD), experts.w2_EDF, counts.cumsum(0, dtype=torch.int32)
        )
        assert_same_bits(experts(rows, counts), expected)

    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
    def test_rows_that_a_dispatcher_leaves_as_room(self, override: str, dtype: torch.dtype) -> None:
        experts = build_experts(override).inner_experts
        rows = torch.randn(40, H)
        counts = torch.tensor([7, 0, 3, 1, 0, 2, 10, 0], dtype=dtype)
        expected = experts(rows[:23], counts)
        rows[23:] = torch.nan
        rows.requires_grad_()
        out = experts(rows, counts)
        assert_same_bits(out[:23], expected)
        assert (out[23:] == 0).all()
        (gradient,) = torch.autograd.grad(out.square().sum(), rows)
        assert (gradient[:23] != 0).any()
        assert (gradient[23:] == 0).all()

    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    def test_autocast(self, override: str) -> None:
        experts, reference = build_experts(override), build_experts()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, expected = experts(*routed()), reference(*routed())
        assert out.dtype == expected.dtype
        assert sqnr(out, expected) >= 21.5

    def test_options(self) -> None:
        options = {"scale_format": "pow2", "wgrad_token_tile": 256, "kernel_preference": "emulated"}
        for name in (EXPERTS, GROUPED_MM):
            config = overridden(moe_config(), (name, options))
            expected = FP8Config(
                scale_format=ScaleFormat.POW2, wgrad_token_tile=256, kernel_preference=KernelPreference.EMULATED
            )
            assert config.routed_experts.inner_experts.build().fp8_config == expected
            json.dumps(config.routed_experts.inner_experts.fp8_options)  # torchtitan writes its configuration to a file
        plain, pow2 = (build_experts(override)(*routed()) for override in (EXPERTS, (EXPERTS, options)))
        assert (plain != pow2).any()

    def test_torchtitans_command_line(self) -> None:
        options = f'{EXPERTS}={{"wgrad_token_tile": 256, "strict": true}}'
        command = ["--module", "qwen3", "--config", "qwen3_moe_debug", "--override.imports", options, SELECTIVE_AC]
        config = ConfigManager().parse_args(command)
        apply_overrides(config.override, config)
        assert isinstance(config.activation_checkpoint, titan.FP8SelectiveAC.Config)
        for layer in config.model_spec.model.layers:
            experts = layer.moe.routed_experts.inner_experts
            assert isinstance(experts, titan.FP8GroupedExperts.Config)
            assert experts.strict
            assert experts.fp8_options == {"wgrad_token_tile": 256}

    def test_options_that_do_not_exist(self) -> None:
        with pytest.raises(TypeError, match="scale is no option of this override; it takes strict, kernel_preference"):
            build_experts((EXPERTS, {"scale": "pow2"}))
        with pytest.raises(TypeError, match=r"scale_format is 'pow3'; it must be a ScaleFormat"):
            build_experts((GROUPED_MM, {"scale_format": "pow3"}))


class TestModels:
    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    def test_train_like_torchtitans_own(self, override: str) -> None:
        """Weights that are changed by 2% at first, as FP8 rounds them, move torchtitan's own losses as much."""
        gaps = []
        for seed in range(3):
            fp8, own = losses(build(override, seed=seed), 20), losses_of_torchtitans_own(seed)
            assert fp8 != own
            assert fp8 == pytest.approx(own, rel=0.05)
            assert fp8[-1] < 0.5 * fp8[0]
            gaps.append(sum(fp8[-5:]) / sum(own[-5:]) - 1)
        assert abs(sum(gaps) / 3) < 0.015

    def test_parameters_and_checkpoints_are_as_they_were(self) -> None:
        own, fp8 = build(), build(EXPERTS)
        assert own.state_dict().keys() == fp8.state_dict().keys()
        for (name, weight), other in zip(own.named_parameters(), fp8.parameters(), strict=True):
            assert type(weight) is type(other), name
            assert_same_bits(other, weight)

    def test_deepseek(self) -> None:
        """Shared experts, sigmoid scores, a bias of the router."""
        config = deepseek_v3.deepseekv3_configs["debugmodel"](attn_backend="flex", moe_comm_backend="standard")
        layer = config.layers[1]
        experts = layer.moe.routed_experts.inner_experts
        layer.moe.routed_experts.inner_experts = GroupedExperts.Config(
            dim=experts.dim, hidden_dim=256, num_experts=experts.num_experts, param_init=experts.param_init
        )
        hidden = torch.randn(1, 40, experts.dim)
        results = []
        for imports in ([], [EXPERTS]):
            moe = overridden(layer.moe, *imports).build()
            torch.manual_seed(0)
            moe.init_states(buffer_device=torch.device("cpu"))
            for parameter in moe.routed_experts.parameters():
                nn.init.normal_(parameter, std=0.05)
            results.append(moe(hidden))
        assert type(moe.routed_experts.inner_experts) is titan.FP8GroupedExperts
        assert sqnr(results[1], results[0]) >= 22

    @pytest.mark.usefixtures("one_rank")
    def test_fsdp(self) -> None:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
        plain, sharded = build(EXPERTS), build(EXPERTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about one rank
            for layer in sharded.layers.values():
                dist.fsdp.fully_shard(layer, mesh=mesh)
            dist.fsdp.fully_shard(sharded, mesh=mesh)
            assert titan.report(sharded, tokens=64).experts == titan.report(plain, tokens=64).experts
            assert losses(sharded, 3) == losses(plain, 3)


POLICIES = {
    "none": lambda: None,
    "full": lambda: FullAC.Config(),
    "selective": lambda: selective(),
    "selective_ac": lambda: selective(SELECTIVE_AC),
}


@pytest.mark.filterwarnings("ignore")  # Dynamo warns of what it does itself
class TestActivationCheckpointing:
    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    @pytest.mark.parametrize(("policy", "again"), [("none", 0), ("full", 1), ("selective", 1), ("selective_ac", 0)])
    def test_how_often_the_grouped_gemms_run(self, override: str, policy: str, again: int) -> None:
        """Forward and dgrad of two layers: two products each as one operation, three by themselves."""
        model = checkpointed(build(override), POLICIES[policy]())
        with GroupedGemms() as gemms:
            loss_of(model, 0).backward()
        products = {EXPERTS: 2, GROUPED_MM: 3}[override]
        assert gemms.count == 2 * products * (2 + again)

    @pytest.mark.parametrize("policy", ["full", "selective", "selective_ac"])
    def test_changes_no_bit(self, policy: str) -> None:
        plain, other = build(EXPERTS), checkpointed(build(EXPERTS), POLICIES[policy]())
        for model in (plain, other):
            loss_of(model, 0).backward()
        for expected, actual in zip(plain.parameters(), other.parameters(), strict=True):
            assert (expected.grad != 0).any()
            assert_same_bits(actual.grad, expected.grad)

    @pytest.mark.parametrize(
        ("override", "policy", "count"), [(EXPERTS, "none", 8), (EXPERTS, "selective_ac", 8), (GROUPED_MM, "full", 18)]
    )
    def test_compiled_layers(self, override: str, policy: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        dequantize_rows, calls = reference.dequantize_rows, []

        def recorded(*args: Any) -> Tensor:  # once in each M-grouped GEMM
            calls.append(args)
            return dequantize_rows(*args)

        eager, model = build(override), compiled(checkpointed(build(override), POLICIES[policy]()))
        loss_of(eager, 0).backward()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "dequantize_rows", recorded)
            loss_of(model, 0).backward()
        assert len(calls) == count
        for expected, actual in zip(eager.parameters(), model.parameters(), strict=True):
            assert sqnr(actual.grad, expected.grad) >= 40

    def test_torchtitans_own_grouped_gemms_are_saved_too(self) -> None:
        assert torch.ops.aten._grouped_mm.default in selective(SELECTIVE_AC).build().get_save_ops()

    def test_every_grouped_gemm_of_a_forward_is_saved(self) -> None:
        names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fp8moe::")}
        grouped = {name.removeprefix("fp8moe::") for name in names if "m_grouped" in name}
        assert len(grouped) >= 5
        assert {getattr(torch.ops.fp8moe, name).default for name in grouped} < titan.GROUPED_GEMMS


@dataclass
class Case:
    config: Any
    override: str
    words: str


def gpt_oss_experts(hidden_size: int = H, intermediate_size: int = 128) -> Any:
    return gpt_oss.moe.GptOssGroupedExperts.Config(dim=hidden_size, hidden_dim=intermediate_size, num_experts=E)


class Float8Experts(GroupedExperts):
    """As a converter of torchtitan makes it."""

    __module__ = "torchtitan.components.quantization.float8"

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass


class OwnProducts(GroupedExperts):
    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        raise NotImplementedError


SIZES = {"dim": H, "hidden_dim": 128, "num_experts": E}
REFUSED = {
    "another computation": Case(gpt_oss_experts(), EXPERTS, r"in its own way; .*torchtitan\.grouped_mm replaces"),
    "a converter": Case(Float8Experts.Config(**SIZES), GROUPED_MM, "a converter of torchtitan quantizes these"),
    "products of its own": Case(OwnProducts.Config(**SIZES), GROUPED_MM, "grouped products of its own"),
}


class TestWhatItRefuses:
    @pytest.mark.parametrize("case", REFUSED)
    def test_says_why_and_leaves_it_to_torchtitan(self, case: str) -> None:
        config, override, words = REFUSED[case].config, REFUSED[case].override, REFUSED[case].words
        layer = moe_config().routed_experts
        layer.inner_experts = config
        kind = type(config)._owner.__name__
        with pytest.warns(UserWarning, match=f"cannot compute {kind}, torch._grouped_mm does: .*{words}"):
            overridden(layer, override)
        assert layer.inner_experts is config
        overridden(layer, override)  # warns once for each class: a warning is an error here
        with pytest.raises(ValueError, match=f"cannot compute {kind}: .*{words}"):
            overridden(layer, (override, {"strict": True}))

    @pytest.mark.parametrize("override", [EXPERTS, GROUPED_MM])
    def test_sizes_that_only_a_rank_knows(self, override: str) -> None:
        """As tensor parallelism shards `I`: any size is computed."""
        layer, own = build_experts(override), build_experts()
        for module in (layer, own):
            experts = module.inner_experts
            experts.w1_EFD, experts.w3_EFD = (nn.Parameter(w[:, :96]) for w in (experts.w1_EFD, experts.w3_EFD))
            experts.w2_EDF = nn.Parameter(experts.w2_EDF[:, :, :96].contiguous())
        (entry,) = titan.report(layer).experts
        assert entry.runs == "fp8moe in FP8"
        assert 20 <= sqnr(layer(*routed()), own(*routed())) < 60

    def test_the_products_of_other_experts(self) -> None:
        """gpt-oss: biases and clamped gates, which torchtitan computes around the products."""
        results = []
        rows, counts = torch.randn(40, H, requires_grad=True), torch.tensor([7, 0, 20, 1, 0, 2, 10, 0])
        for imports in ([], [GROUPED_MM]):
            layer = moe_config().routed_experts
            layer.inner_experts = gpt_oss_experts()
            experts = overridden(layer, *imports).inner_experts.build()
            torch.manual_seed(0)
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=0.08)
            out = experts(rows, counts)
            results.append([out, *torch.autograd.grad(out.square().sum(), (rows, *experts.parameters()))])
        assert type(experts).__name__ == "FP8GroupedMMGptOssGroupedExperts"
        for theirs, ours in zip(*results, strict=True):
            assert 15 <= sqnr(ours, theirs) < 60
        assert titan.report(experts).experts[0].runs == "fp8moe in FP8"


class TestExpertParallel:
    def test_without_ranks_to_share_them_it_is_the_experts(self) -> None:
        actual, expected = (run(build_experts(override), routed()) for override in (EXPERT_PARALLEL, EXPERTS))
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same_bits(ours, theirs)

    def test_options(self) -> None:
        config = overridden(moe_config(), (EXPERT_PARALLEL, {"dispatch": "bf16", "wgrad_token_tile": 256}))
        layer = config.routed_experts
        assert layer.dispatch == "bf16"
        assert layer.build().inner_experts.fp8_config == FP8Config(wgrad_token_tile=256)
        with pytest.raises(ValueError, match="dispatch is 'fp4'; it must be one of fp8, bf16"):
            overridden(moe_config(), (EXPERT_PARALLEL, {"dispatch": "fp4"}))
        with pytest.raises(TypeError, match="scale is no option of this override"):
            overridden(moe_config(), (EXPERT_PARALLEL, {"scale": "pow2"}))

    def test_parameters_and_checkpoints_are_as_they_were(self) -> None:
        assert build().state_dict().keys() == build(EXPERT_PARALLEL).state_dict().keys()

    def test_what_it_refuses(self) -> None:
        others, dispatchers = moe_config(), moe_config()
        others.routed_experts.inner_experts = gpt_oss_experts()
        its = dispatchers.routed_experts.token_dispatcher
        dispatchers.routed_experts.token_dispatcher = TorchAOTokenDispatcher.Config(
            num_experts=its.num_experts, top_k=its.top_k, pad_multiple=128
        )
        for config, words in (
            (others, "in its own way"),
            (dispatchers, "its tokens travel by TorchAOTokenDispatcher: choose the standard comm_backend"),
        ):
            before = config.routed_experts
            with pytest.warns(UserWarning, match=f"torch._grouped_mm does: .*{words}"):
                overridden(config, EXPERT_PARALLEL)
            assert config.routed_experts is before
            with pytest.raises(ValueError, match=words):
                overridden(config, (EXPERT_PARALLEL, {"strict": True}))

    def test_it_takes_the_place_of_experts(self) -> None:
        with pytest.raises(ValueError, match="claims 'routed_experts', an ancestor of"):
            overridden(moe_config(), EXPERTS, EXPERT_PARALLEL)


class TestReport:
    def test_lists_all_experts(self) -> None:
        report = titan.report(build(EXPERTS), tokens=8192)
        names = [f"layers.{layer}.moe.routed_experts.inner_experts" for layer in (0, 1)]
        assert [entry.name for entry in report.experts] == names
        header, row = str(report).splitlines()
        assert header.split() == ["experts", "class", "runs", "why"]
        assert row.startswith(f"{names[0]} and 1 more  FP8GroupedExperts  fp8moe in FP8  EMULATED: ")

    def test_names_are_those_of_checkpoints(self) -> None:
        plain, other = build(EXPERTS), checkpointed(build(EXPERTS), FullAC.Config())
        assert titan.report(plain) == titan.report(other)

    def test_asks_about_the_sizes_of_the_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def explain(*args: Any, layer: Any = None) -> Any:
            asked.append(args[2] if layer is None else layer)
            return fp8moe.explain(*args, layer=layer)

        monkeypatch.setattr(titan, "explain", explain)
        titan.report(build_experts(EXPERTS), tokens=100)
        titan.report(build_experts(GROUPED_MM).inner_experts, tokens=10, experts_per_token=3)
        assert asked == [(200, 1, H, 128, E), (30, 128, H, E), (30, H, 128, E), (30, 128, H, E)]

    def test_needs_to_know_how_many_experts_a_token_has(self) -> None:
        with pytest.raises(ValueError, match="pass experts_per_token"):
            titan.report(build_experts(EXPERTS).inner_experts, tokens=100)

    def test_experts_that_nothing_replaces(self) -> None:
        (entry,) = titan.report(build_experts()).experts
        assert entry.runs == "torch._grouped_mm"
        assert "--override.imports fp8moe.integrations.torchtitan.experts" in entry.why

    def test_a_preference_that_cannot_be_met(self) -> None:
        (entry,) = titan.report(build_experts((EXPERTS, {"kernel_preference": "deepgemm"}))).experts
        assert entry.runs == "nothing: it raises"

    def test_a_model_without_memory(self) -> None:
        config = overridden(model_config(), EXPERTS)
        with torch.device("meta"):
            report = titan.report(config.build())
        assert len(report.experts) == 2
        assert report.experts[0].runs.startswith("fp8moe")

    def test_no_experts(self) -> None:
        assert str(titan.report(nn.Linear(2, 2))).startswith("no experts found")


def test_expert_parallelism(tmp_path: Path) -> None:
    """Two ranks with half of the experts each, against one with all."""
    spawn(_one_of_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)


def _one_of_two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    set_spmd_backend("partial_dtensor")
    torch._dynamo.config.capture_scalar_outputs = True  # as torchtitan: the rows of a rank are counted in its graph
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for override in (EXPERTS, GROUPED_MM):
        compare_layer_of_two_ranks(rank, override)
    for dispatch, decibels in (("fp8", 45), ("bf16", 26)):  # in BF16, fp32 tokens are rounded twice
        compare_layer_of_two_ranks(rank, EXPERT_PARALLEL, {"dispatch": dispatch, "scale_format": "pow2"}, decibels)
    pow2 = {"scale_format": "pow2"}
    compare_model_of_two_ranks(rank, EXPERTS, dp_shard=2, ep=2)
    compare_model_of_two_ranks(rank, EXPERTS, tp=2)
    compare_model_of_two_ranks(rank, EXPERT_PARALLEL, pow2, decibels=24, dp_shard=2, ep=2)
    compare_model_of_two_ranks(rank, EXPERT_PARALLEL, pow2, decibels=24, tp=2, ep=2)
    dist.destroy_process_group()


class FoldedScores(nn.Module):
    """All experts of a layer as `expert_parallel` computes them: scores are folded into what is quantized."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor, _: Tensor) -> Tensor:
        tokens = (part.flatten(0, 1) for part in (x, ids, scores))
        config = FP8Config(scale_format=ScaleFormat.POW2)
        return fp8moe.moe_forward(*tokens, *self.experts.weights, config=config).view_as(x)


def compare_layer_of_two_ranks(
    rank: int, override: str, options: dict[str, str] | None = None, decibels: float = 60
) -> None:
    """Eager and compiled."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    whole, shared = build_experts(override), build_experts((override, options or {}))
    if override == EXPERT_PARALLEL:
        assert isinstance(shared, titan.FP8RoutedExperts)
        whole = FoldedScores(whole.inner_experts)
    for name, weight in list(shared.inner_experts.named_parameters()):
        setattr(shared.inner_experts, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    shared.token_dispatcher.wire_meshes(ep_mesh=mesh)
    expected = [run(whole, routed(tokens, seed)) for seed, tokens in enumerate((50, 30))]
    weight_gradients = [sum(gradients) for gradients in zip(*(results[3:] for results in expected), strict=True)]
    in_graphs = [torch.compile(shared, fullgraph=True, backend="aot_eager")] if override == EXPERTS else []
    for call in (shared, *in_graphs):
        actual: list[Any] = run(call, routed((50, 30)[rank], rank))
        for ours, theirs in zip(actual[:3], expected[rank][:3], strict=True):
            assert sqnr(ours, theirs) >= decibels, override
        for gradient, total in zip(actual[3:], weight_gradients, strict=True):
            # Tokens of both ranks share scales.
            assert sqnr(gradient.full_tensor(), total) >= min(25, decibels), override
    (entry,) = titan.report(shared, tokens=64).experts
    assert entry.runs == "fp8moe in FP8"
    travel = f"; tokens travel to their ranks in {(options or {}).get('dispatch', '').upper()}"
    assert entry.why.endswith(travel) == (override == EXPERT_PARALLEL)
    assert titan._local_shape(shared.inner_experts.w2_EDF) == (E // 2, H, 128)


def compare_model_of_two_ranks(
    rank: int,
    override: str,
    options: dict[str, str] | None = None,
    decibels: float = 25,
    dp_shard: int = 1,
    tp: int = 1,
    ep: int = 1,
) -> None:
    """As torchtitan makes it, with selective activation checkpointing. Ranks of tensor parallelism share a batch."""
    parallel_dims.device_type = "cpu"
    dims = ParallelDims(
        dp_replicate=1, dp_shard=dp_shard, cp=1, tp=tp, pp=1, ep=ep, world_size=2, spmd_backend="partial_dtensor"
    )
    config = model_config(intermediate_size=256)
    set_qwen3_sharding_config(config, enable_sp=tp > 1, enable_ep=ep > 1)
    with torch.device("meta"):
        model = overridden(config, (override, options or {})).build()
    parallelize_qwen3(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="float32"),
        parallelism=ParallelismConfig(
            expert_parallel_degree=ep, tensor_parallel_degree=tp, spmd_backend="partial_dtensor"
        ),
        compile_config=CompileConfig(),
        ac_config=selective(SELECTIVE_AC),
        dump_folder="",
    )
    model.to_empty(device="cpu")
    model.init_states(buffer_device=torch.device("cpu"))
    whole = build(EXPERTS, config=model_config(intermediate_size=256))
    if override == EXPERT_PARALLEL:
        for layer in whole.layers.values():
            layer.moe.routed_experts.forward = FoldedScores(layer.moe.routed_experts.inner_experts).forward
    weights = dict(whole.named_parameters())
    for name, sharded in model.named_parameters():
        weight = weights[name.replace("_checkpoint_wrapped_module.", "")].detach()
        local = distribute_tensor(weight, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()
        sharded.to_local().detach().copy_(local)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    of_rank, of_whole = (titan.report(module, tokens=64).experts for module in (model, whole))
    assert [(entry.name, entry.runs) for entry in of_rank] == [(entry.name, entry.runs) for entry in of_whole]

    own = rank if dp_shard > 1 else 0
    with GroupedGemms() as gemms:
        loss = loss_of(model, own)
        loss.backward()
    assert gemms.count == 8  # as without checkpointing
    losses = [loss_of(whole, seed) for seed in range(dp_shard)]
    assert loss.item() == pytest.approx(losses[own].item(), rel=1e-5 if override == EXPERTS else 1e-3)
    torch.stack(losses).sum().backward()  # torchtitan adds the gradients of the ranks
    for (name, expected), actual in zip(whole.named_parameters(), model.parameters(), strict=True):
        found = sqnr(actual.grad.full_tensor(), expected.grad)
        assert found >= decibels, (name, found)  # tokens of both ranks share scales
