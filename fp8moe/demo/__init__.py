"""A small MoE language model trained with `fp8moe`: the library in use, and FP8 beside BF16 on the same data.

`python -m fp8moe train` runs it. The parts: `settings` (what a run is), `data` (bytes in, batches out), `model` and
`experts` (the network), `training` (one step), `runs` (what lies on disk), `session` (the loop), `interrupt` (Ctrl-C),
`report` and `plot` (what the reader sees), `cli` and `command` (flags in, a run out), `evaluate` (the checkpoints of a
run with quantized experts).
"""
