"""One sitting of an experiment: train what is missing, as far as the time allows, and keep all that is known.

<output>/results.json       the runs that came to their end: all that must travel to the next machine
<output>/runs/<name>/       a run that has not, with its checkpoint: the next sitting on this machine continues it
"""

import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fp8moe
from fp8moe import FP8Config, explain
from fp8moe.demo.data import Corpus
from fp8moe.demo.experiment.evidence import Evidence, observe
from fp8moe.demo.experiment.recipes import RECIPES
from fp8moe.demo.experiment.results import Environment, Result, load, save
from fp8moe.demo.loop import Stop, steps
from fp8moe.demo.runs import Run
from fp8moe.demo.settings import RunConfig
from fp8moe.demo.training import StepRecord, Trainer

_OBSERVED_STEP = 5
"""Counted from 0: everything is compiled by then."""
_ROOM = 1.15
"""Recipes differ in speed."""


@dataclass(frozen=True)
class Clock:
    """Asks to stop when the time is up, or when a signal does."""

    signals: Stop
    seconds: float
    started: float

    @property
    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    @property
    def requested(self) -> bool:
        return self.signals.requested or self.left <= 0


@dataclass(frozen=True)
class Plan:
    """What an experiment trains."""

    base: RunConfig
    recipes: Sequence[str]
    seeds: Sequence[int]

    def runs(self) -> list[tuple[str, str, RunConfig]]:
        """Name, recipe and settings of each run, seed by seed: so that pairs are complete early."""
        return [
            (f"{recipe}-seed{seed}", recipe, RECIPES[recipe].config(self.base, seed))
            for seed in self.seeds
            for recipe in self.recipes
        ]


def sit(plan: Plan, corpus: Corpus, output: Path, clock: Clock, only_whole: bool) -> bool:
    """Train the runs of the plan that have no result yet.

    Args:
        only_whole: begin no run that takes longer than there is time, going by the last of this sitting.

    Returns:
        Whether every run has a result now.

    Raises:
        ValueError: `output` has a run of the same name with other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = load(output / "results.json")
    missing = []
    for name, recipe, config in plan.runs():
        if name not in results:
            missing.append((name, recipe, config))
        elif (results[name]["config"], results[name]["data_sha256"]) != (_comparable(config), corpus.sha256):
            raise ValueError(f"{output} has a run {name} with other settings or data: pass another --output")
    last = 0.0
    while missing and not clock.requested:
        if only_whole and _ROOM * last > clock.left:
            print(f"{clock.left:.0f} s are left, and the last run took {last:.0f}: the rest is for another sitting")
            break
        name, recipe, config = missing[0]
        began = time.monotonic()
        result = _train(name, recipe, config, corpus, output / "runs", clock)
        if result is None:
            break
        last = time.monotonic() - began
        results[name] = result
        save(output / "results.json", results)
        shutil.rmtree(output / "runs" / name)
        missing.pop(0)
    print(f"{len(results)} runs have results; {len(missing)} of this plan are missing", flush=True)
    return not missing


def _train(name: str, recipe: str, config: RunConfig, corpus: Corpus, runs: Path, clock: Clock) -> Result | None:
    """Train a run to its end; None if the clock stopped it before."""
    run = _opened(runs, name, config, corpus)
    precision = config.precisions[0]
    notes = _Notes.load(run.path / "notes.json")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gc.collect()  # the run before, as large as this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, precision, corpus)

    def take() -> StepRecord:
        if notes.evidence is not None or trainer.step < min(_OBSERVED_STEP, config.steps - 1):
            return trainer.train_step()
        record, notes.evidence = observe(trainer.train_step)
        seen = notes.evidence
        print(f"{name}: a step has {seen['fp8_gemms']} FP8 GEMMs and {seen['bf16_gemms']} in BF16", flush=True)
        return record

    began = time.monotonic()
    try:
        for record in steps(run, trainer, clock, take, keep_last=False):
            if "val_loss" in record or record["step"] == 1:
                print(
                    f"{name} {record['step']}/{config.steps}  loss {record['loss']:.4f}  "
                    f"held-out {record.get('val_loss', float('nan')):.4f}  gradient {record['grad_norm']:.3f}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s  {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    except FloatingPointError as error:
        notes.diverged = str(error)
        print(f"{name} diverged: {error}", flush=True)
    if on_gpu:
        notes.peak_memory = max(notes.peak_memory, torch.cuda.max_memory_allocated())
    notes.save(run.path / "notes.json")
    if not (trainer.done or notes.diverged):
        print(f"{name} stopped after {trainer.step} of {config.steps} steps", flush=True)
        return None
    tokens = config.batch_size // config.microbatches * config.seq_len
    layer = (tokens, config.top_k, config.hidden, config.intermediate, config.experts)
    explained = explain(trainer.device, FP8Config(), layer=layer)
    return {
        "recipe": recipe,
        "baseline": RECIPES[recipe].baseline,
        "seed": config.seed,
        "config": _comparable(config),
        "data_sha256": corpus.sha256,
        "unit": corpus.unit,
        "environment": _environment(trainer.device),
        "auto": "; ".join(dict.fromkeys(map(str, explained.selected.values()))),
        "diverged": notes.diverged,
        "peak_memory": notes.peak_memory,
        "evidence": notes.evidence,
        "steps": run.records(precision),
    }


@dataclass
class _Notes:
    """What is known of a run beside its steps; kept when it stops."""

    evidence: Evidence | None = None
    diverged: str | None = None
    peak_memory: int = 0

    @classmethod
    def load(cls, file: Path) -> "_Notes":
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


def _opened(runs: Path, name: str, config: RunConfig, corpus: Corpus) -> Run:
    if not (runs / name / "config.json").exists():
        shutil.rmtree(runs / name, ignore_errors=True)
        return Run.create(runs, name, config, corpus.sha256)
    run = Run.open(runs, name)
    if (_comparable(run.config), run.data_sha256) != (_comparable(config), corpus.sha256):
        raise ValueError(f"{run.path} is a run with other settings or data: remove it, or pass another --output")
    return run


def _comparable(config: RunConfig) -> dict[str, Any]:
    """What decides the losses; the corpus may lie elsewhere on another machine."""
    return {name: value for name, value in asdict(config).items() if name != "data"}


def _environment(device: torch.device) -> Environment:
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "triton": triton_version, "fp8moe": fp8moe.__version__}
