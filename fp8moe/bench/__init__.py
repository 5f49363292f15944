"""Speed, memory and accuracy of the grouped product, or of the whole MoE layer, beside BF16 on the same tensors in the
same run.

`python -m fp8moe bench` runs it. What is measured is a `task`, described twice: `product.task` and `layer.task`, each
with what is measured by itself (`kernels`). The rest knows no difference: `shapes` and `problem` (the tensors),
`variants` and `peers` (who computes), `guard` (who computes wrongly), `timing`, `graphs` and `memory` (how it is
measured), `ceilings` (how fast a kernel could be), `measure` (from tensors to `figures`), `record` (the JSON), `tables`
and `chart` (what the reader sees), `cli` (the flags). `tune` is a command of its own, and `model`, whole models, has
measurements and tables of its own.
"""
