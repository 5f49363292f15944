"""One sitting of an experiment: train what is missing, as far as the time allows, and keep all that is known.

<output>/results.json       the runs that came to their end: all that must travel to the next machine
<output>/runs/<name>/       a run that has not, with its checkpoint: the next sitting on this machine continues it
<output>/runs/trunk-seed<N> what the branches of a seed go on from, as long as one of them is missing
<output>/lock               held by the process that sits
"""

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import fp8moe
from fp8moe import FP8Config, explain
from fp8moe.demo.data import Corpus
from fp8moe.demo.experiment.evidence import Evidence, observe
from fp8moe.demo.experiment.recipes import RECIPES
from fp8moe.demo.experiment.results import Environment, Result, Results, load, save
from fp8moe.demo.loop import Stop, steps
from fp8moe.demo.runs import Run, replacing
from fp8moe.demo.settings import Precision, RunConfig
from fp8moe.demo.training import StepRecord, Trainer, resolve_device

_OBSERVED_STEP = 5
"""Counted from 0, after the trunk: everything is compiled by then."""
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
class _StopAt:
    """Asks to stop at a step, or when the clock does."""

    trainer: Trainer
    step: int
    clock: Stop

    @property
    def requested(self) -> bool:
        return self.trainer.step >= self.step or self.clock.requested


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
        only_whole: begin no run that takes longer than there is time, going by the slowest of this sitting.

    Returns:
        Whether every run has a result now.

    Raises:
        ValueError: `output` has a run of the same name with other settings, or another process trains there.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / "lock", timeout=0):
            return _sit(plan, corpus, output, clock, only_whole)
    except Timeout:
        raise ValueError(
            f"another process trains in {output}: pass another --output, and give both files of results to report"
        ) from None


def _sit(plan: Plan, corpus: Corpus, output: Path, clock: Clock, only_whole: bool) -> bool:
    results = load(output / "results.json")
    missing = []
    for name, recipe, config in plan.runs():
        if name not in results:
            missing.append((name, recipe, config))
        elif (results[name]["config"], results[name]["data_sha256"]) != (_comparable(config), corpus.sha256):
            raise ValueError(f"{output} has a run {name} with other settings or data: pass another --output")
    runs = output / "runs"
    _tidy(runs, plan, results, missing)
    pace = 0.0  # seconds a step, of the slowest run
    while missing and not clock.requested:
        name, recipe, config = missing[0]
        left = _steps_left(runs, name, recipe, config)
        if only_whole and _ROOM * pace * left > clock.left:
            print(f"{clock.left:.0f} s are left, and a run takes {pace * left:.0f}: the rest is for another sitting")
            break
        began = time.monotonic()
        result = _train(name, recipe, plan.base, config, corpus, runs, clock)
        if result is None:
            break
        if not result["diverged"]:
            pace = max(pace, (time.monotonic() - began) / max(left, 1))
        results[name] = result
        save(output / "results.json", results)
        missing.pop(0)
        _tidy(runs, plan, results, missing)
    print(f"{len(results)} runs have results; {len(missing)} of this plan are missing", flush=True)
    return not missing


def _tidy(runs: Path, plan: Plan, results: Results, missing: Sequence[tuple[str, str, RunConfig]]) -> None:
    """Remove what nobody will go on from: of runs that have results, and trunks without a missing branch."""
    for name, _, _ in plan.runs():
        if name in results:
            shutil.rmtree(runs / name, ignore_errors=True)
    for seed in _seeds_of_branches(plan.runs()) - _seeds_of_branches(missing):
        shutil.rmtree(runs / _trunk_name(seed), ignore_errors=True)


def _seeds_of_branches(runs: Sequence[tuple[str, str, RunConfig]]) -> set[int]:
    return {config.seed for _, recipe, config in runs if RECIPES[recipe].branched}


def _steps_left(runs: Path, name: str, recipe: str, config: RunConfig) -> int:
    """Of a run, and of its trunk; more than there are if it was killed."""
    taken = _Notes.load(runs / name).steps
    if taken is None and RECIPES[recipe].branched:
        taken = _Notes.load(runs / _trunk_name(config.seed)).steps
    return config.steps - (taken or 0)


def _train(
    name: str, recipe: str, base: RunConfig, config: RunConfig, corpus: Corpus, runs: Path, clock: Clock
) -> Result | None:
    """Train a run to its end, and before it the trunk that it goes on from; None if the clock stopped it before."""
    run = _opened(runs, name, config, corpus)
    trunk_steps = RECIPES[recipe].trunk_steps(config)
    if RECIPES[recipe].branched and not _branch(run, recipe, base, trunk_steps, corpus, runs, clock):
        return None
    notes = _advance(run, corpus, clock, config.steps, trunk_steps + _OBSERVED_STEP)
    if not notes.ended_at(config.steps):
        return None
    device = resolve_device(config.device)
    tokens = config.batch_size // config.microbatches * config.seq_len
    layer = (tokens, config.top_k, config.hidden, config.intermediate, config.experts)
    explained = explain(device, FP8Config(), layer=layer)
    return {
        "recipe": recipe,
        "baseline": RECIPES[recipe].baseline,
        "seed": config.seed,
        "config": _comparable(config),
        "data_sha256": corpus.sha256,
        "unit": corpus.unit,
        "environment": _environment(device),
        "auto": "; ".join(dict.fromkeys(map(str, explained.selected.values()))),
        "diverged": notes.diverged,
        "peak_memory": notes.peak_memory,
        "evidence": notes.evidence,
        "steps": run.records(_precision(run)),
        "trunk_steps": trunk_steps,
    }


def _branch(run: Run, recipe: str, base: RunConfig, trunk_steps: int, corpus: Corpus, runs: Path, clock: Clock) -> bool:
    """Put the records and the checkpoint of the trunk into the run, unless it has begun; False if the clock stopped
    the trunk before."""
    precision = _precision(run)
    if run.file(precision, "checkpoint.pt").exists():
        return True
    seed = run.config.seed
    trunk = _opened(runs, _trunk_name(seed), RECIPES[RECIPES[recipe].baseline or recipe].config(base, seed), corpus)
    notes = _advance(trunk, corpus, clock, trunk_steps)
    if not notes.ended_at(trunk_steps):
        return False
    shutil.copyfile(trunk.file("bf16", "metrics.jsonl"), run.file(precision, "metrics.jsonl"))
    if notes.diverged:
        notes.save(run.path)
    else:  # it is replaced when the next one is saved, never written to
        os.link(trunk.file("bf16", "checkpoint.pt"), run.file(precision, "checkpoint.pt"))
    return True


def _advance(run: Run, corpus: Corpus, clock: Clock, until: int, observed: int | None = None) -> "_Notes":
    """Train a run from where it stands until it has taken so many steps, or the clock stops it.

    Args:
        observed: the step, counted from 0, whose kernels are noted; the last one if there are fewer; None for none.
    """
    name, precision = run.path.name, _precision(run)
    notes = _Notes.load(run.path)
    if notes.ended_at(until):
        return notes
    device = resolve_device(run.config.device)
    if device.type == "cuda":
        gc.collect()  # the run before, as large as this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(run.config, precision, corpus)

    def take() -> StepRecord:
        if observed is None or notes.evidence is not None or trainer.step < min(observed, until - 1):
            return trainer.train_step()
        record, notes.evidence = observe(trainer.train_step)
        seen = notes.evidence
        print(f"{name}: a step has {seen['fp8_gemms']} FP8 GEMMs and {seen['bf16_gemms']} in BF16", flush=True)
        return record

    began = time.monotonic()
    try:
        for record in steps(run, trainer, _StopAt(trainer, until, clock), take, keep_last=False):
            if "val_loss" in record or record["step"] == 1:
                print(
                    f"{name} {record['step']}/{until}  loss {record['loss']:.4f}  "
                    f"held-out {record.get('val_loss', float('nan')):.4f}  gradient {record['grad_norm']:.3f}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s  {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    except FloatingPointError as error:
        notes.diverged = str(error)
        print(f"{name} diverged: {error}", flush=True)
    if device.type == "cuda":
        notes.peak_memory = max(notes.peak_memory, torch.cuda.max_memory_allocated(device))
    notes.steps = trainer.step
    notes.save(run.path)
    if not notes.ended_at(until):
        print(f"{name} stopped after {trainer.step} of {until} steps", flush=True)
    return notes


@dataclass
class _Notes:
    """What is known of a run beside its steps; kept when it stops."""

    evidence: Evidence | None = None
    diverged: str | None = None
    peak_memory: int = 0
    steps: int | None = None
    """Taken when it stopped last; its checkpoint, unless it came to its end, is of then."""

    @classmethod
    def load(cls, run: Path) -> "_Notes":
        """From the folder of a run."""
        file = run / "notes.json"
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def save(self, run: Path) -> None:
        """Likewise."""
        with replacing(run / "notes.json") as stream:
            stream.write(json.dumps(asdict(self)).encode())

    def ended_at(self, step: int) -> bool:
        """Whether there is nothing to do until that step."""
        return self.steps == step or self.diverged is not None


def _trunk_name(seed: int) -> str:
    return f"trunk-seed{seed}"


def _precision(run: Run) -> Precision:
    """A recipe has one."""
    return run.config.precisions[0]


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
