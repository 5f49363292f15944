"""Speed, memory and accuracy of the grouped products, beside BF16 and torchao, on the same tensors in the same run.

`python -m fp8moe bench` runs it. The parts: `shapes` (what is multiplied), `problem` (its tensors), `variants` and
`peers` (who multiplies), `guard` (who multiplies wrongly), `timing`, `graphs` and `memory` (how it is measured),
`floor` (how fast it could be), `ops` and `kernels` (one row of a table each), `session` (a problem from tensors to
figures), `record` (the JSON), `tables` and `chart` (what the reader sees), `cli` (the flags).
"""
