"""Speed, memory and accuracy of the grouped product, or of the whole MoE layer, beside BF16 on the same tensors in the
same run.

`python -m fp8moe bench` runs it. What is measured is a `task`: `op_task`, one product, or `layer.task`, one layer. It
brings its parts: `shapes`, `problem` (the tensors; `op_problem`), `variants` and `peers` (who computes), `floor` (how
fast it could be), `kernels` (what is measured by itself); for layers they are in `layer`. The rest is the same for
both: `guard` (who computes wrongly), `timing`, `graphs` and `memory` (how it is measured), `ops` (one variant),
`session` (a problem from tensors to figures), `record` (the JSON), `tables` and `chart` (what the reader sees), `cli`
(the flags). `tune` is a command of its own.
"""
