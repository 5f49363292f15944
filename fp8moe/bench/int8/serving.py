"""A small model that reads a prompt and goes on with it: prefill and decode, each a CUDA graph."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8moe.bench.guard import check
from fp8moe.bench.int8.layers import LayerProblem, other_layer
from fp8moe.bench.int8.sections import IN_LOOP_TILES, Bench
from fp8moe.int8 import QuantizedExperts, int8_moe_forward, quantize_experts

LAYERS, VOCABULARY, HEAD = 4, 32_000, 128
PROMPT, STEPS = 1600, 512
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Served:
    """What one way of computing the experts took."""

    way: str
    load_s: float
    """To quantize the experts of all layers."""
    prefill_ms: float
    decode_ms: float
    """All steps."""
    tokens_per_s: float
    """Of the decoding."""
    expert_bytes: int
    peak_bytes: int | None


class Model:
    """Blocks of attention with a cache, and of experts; random weights. One sequence."""

    def __init__(self, problem: LayerProblem, positions: int, vocabulary: int, layers: int) -> None:
        _, self.k, h, _, e = problem.shape.sizes
        device, dtype = problem.device, torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=dtype) * sizes[-1] ** -0.5

        self.embedding, self.head = normal(vocabulary, h) * h**0.5, normal(vocabulary, h)
        self.qkv, self.out = ([normal(width, h) for _ in range(layers)] for width in (3 * h, h))
        self.router = [normal(e, h) for _ in range(layers)]
        self.heads = max(h // HEAD, 1)
        shape = (layers, 2, 1, self.heads, positions, h // self.heads)
        self.cache = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.arange(positions, device=device)

    def __call__(self, tokens: Tensor, start: Tensor, experts: list[Experts]) -> Tensor:
        """The token that follows `tokens` `(S,)`, the first of which is at position `start` `(1,)`."""
        x = self.embedding[tokens]
        own = start + torch.arange(tokens.shape[0], device=tokens.device)
        visible = self.positions[None, :] <= own[:, None]
        for layer, compute in enumerate(experts):
            normed = F.rms_norm(x, x.shape[-1:])
            qkv = (normed @ self.qkv[layer].t()).view(-1, 3, self.heads, x.shape[1] // self.heads)
            q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
            cached_k, cached_v = self.cache[layer]
            cached_k.index_copy_(2, own, k)
            cached_v.index_copy_(2, own, v)
            mixed = F.scaled_dot_product_attention(q, cached_k, cached_v, attn_mask=visible)
            x = x + mixed[0].transpose(0, 1).flatten(1) @ self.out[layer].t()
            normed = F.rms_norm(x, x.shape[-1:])
            weights, ids = (normed @ self.router[layer].t()).float().softmax(1).topk(self.k)
            x = x + compute(normed, ids, weights)
        return (F.rms_norm(x[-1:], x.shape[-1:]) @ self.head.t()).argmax(1)


def serve(bench: Bench) -> tuple[list[Served], str]:
    """Each way, and one line of JSON."""
    gpu = bench.on_gpu
    problem = bench.shape(PROMPT, 8, 2048, 512, 256)
    layers, vocabulary, prompt, steps = (LAYERS, VOCABULARY, PROMPT, STEPS) if gpu else (2, 64, 6, 3)
    model = Model(problem, prompt + steps, vocabulary, layers)
    tokens = torch.arange(prompt, device=bench.device) * 7919 % vocabulary
    results = [_plain(bench, problem, model, layers, tokens, steps)]
    for bits in (8, 4):
        weights = _weights_of(problem)
        start = _now(bench)
        made = [quantize_experts(*weights, bits, 128, activation_tiles=IN_LOOP_TILES) for _ in range(layers)]
        load = _now(bench) - start
        del weights  # who serves quantized experts keeps no others
        for in_loop in (True, False) if gpu else (False,):
            ways = [_way(problem, experts, in_loop) for experts in made]
            name = f"INT{bits}, rows quantized {'in the loop' if in_loop else 'before'}"
            size = sum(experts.nbytes for experts in made)
            results.append(_served(bench, name, model, ways, tokens, steps, load, size))
        del made, ways
    line = {
        "what": "serving", "device": torch.cuda.get_device_name(bench.device) if gpu else "CPU", "layers": layers,
        "shape": str(problem.shape), "prompt": prompt, "steps": steps, "ways": [asdict(each) for each in results],
    }  # fmt: skip
    return results, json.dumps(line)


def _plain(
    bench: Bench, problem: LayerProblem, model: Model, layers: int, tokens: Tensor, steps: int
) -> Served:  # fmt: skip
    """With BF16 weights, a copy for each layer."""
    compile_ = torch.compile(fullgraph=True, dynamic=False) if bench.on_gpu else (lambda function: function)
    bf16 = problem.bf16_experts(compile_)
    copies = [_weights_of(problem) for _ in range(layers)]
    experts: list[Experts] = [lambda *given, w=copy: bf16(*given, *w) for copy in copies]
    size = sum(weight.nbytes for copy in copies for weight in copy)
    return _served(bench, "BF16 grouped_mm", model, experts, tokens, steps, 0.0, size)


def _weights_of(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Made anew: a problem keeps its own, and those would count in the peak."""
    return LayerProblem(problem.shape, problem.device).weights


def _way(problem: LayerProblem, experts: QuantizedExperts, in_loop: bool) -> Experts:
    def compute(hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        if in_loop:
            return other_layer(problem.with_these(hidden, topk_ids, topk_weights), experts, in_loop=True)()
        return int8_moe_forward(hidden, topk_ids, topk_weights, experts)

    return compute


def _served(
    bench: Bench, way: str, model: Model, experts: list[Experts], tokens: Tensor, steps: int, load_s: float,
    expert_bytes: int,
) -> Served:  # fmt: skip
    prompt = tokens.shape[0]
    position = torch.zeros(1, dtype=torch.int64, device=bench.device)
    token = torch.zeros(1, dtype=torch.int64, device=bench.device)

    def prefill() -> None:
        position.zero_()
        token.copy_(model(tokens, position, experts))
        position.fill_(prompt)

    def decode() -> None:
        token.copy_(model(token, position, experts))
        position.add_(1)

    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    prefill, decode = (_graphed(step) if bench.on_gpu else step for step in (prefill, decode))
    times: list[tuple[float, float]] = []
    for _ in range(3):
        start = _now(bench)
        prefill()
        middle = _now(bench)
        for _ in range(steps):
            decode()
        times.append((middle - start, _now(bench) - middle))
    prefill_s, decode_s = (sorted(each)[1] for each in zip(*times, strict=True))
    check(way, position.float(), torch.full_like(position, prompt + steps).float())
    peak = torch.cuda.max_memory_allocated(bench.device) if bench.on_gpu else None
    return Served(way, load_s, prefill_s * 1e3, decode_s * 1e3, steps / decode_s, expert_bytes, peak)


def _graphed(step: Callable[[], None]) -> Callable[[], None]:
    """Its replay."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _now(bench: Bench) -> float:
    if bench.on_gpu:
        torch.cuda.synchronize(bench.device)
    return time.perf_counter()
