"""`python -m fp8moe doctor | train | evaluate | experiment | bench | tune`."""

import argparse
import sys
from collections.abc import Sequence

from fp8moe import doctor
from fp8moe.bench import cli as bench
from fp8moe.bench.tune import cli as tune
from fp8moe.demo import cli as train
from fp8moe.demo import evaluate
from fp8moe.demo.experiment import cli as experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fp8moe", description="Mixture-of-Experts training in FP8.")
    commands = parser.add_subparsers(dest="command", required=True)

    about = "what is installed, what will run on each device and why, and whether it computes correctly"
    commands.add_parser("doctor", help=about, description=about).set_defaults(run=lambda arguments: doctor.run())

    about = "train a small Mixture-of-Experts language model on text, in FP8 and in BF16, and compare the losses"
    parser_train = commands.add_parser("train", help=about, description=about)
    train.add_arguments(parser_train)
    parser_train.set_defaults(run=train.run)

    about = "the held-out loss of what `train` trained, with INT8 and INT4 experts beside BF16 and FP8"
    parser_evaluate = commands.add_parser("evaluate", help=about, description=about)
    evaluate.add_arguments(parser_evaluate)
    parser_evaluate.set_defaults(run=evaluate.run)

    about = "FP8 recipes beside BF16, with several seeds: do they train alike?"
    experiment.add_arguments(commands.add_parser("experiment", help=about, description=about))

    about = "measure grouped_mm, or a whole MoE layer, and the parts against BF16 on the same tensors"
    parser_bench = commands.add_parser("bench", help=about, description=about)
    bench.add_arguments(parser_bench)
    parser_bench.set_defaults(run=bench.run)

    about = "measure when FP8 is faster than BF16 on this GPU, for AUTO to choose by"
    parser_tune = commands.add_parser("tune", help=about, description=about)
    tune.add_arguments(parser_tune)
    parser_tune.set_defaults(run=tune.run)

    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
