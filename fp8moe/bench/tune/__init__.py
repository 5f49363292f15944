"""The cost model of this GPU, by which AUTO chooses between FP8 and BF16.

`python -m fp8moe tune` runs it: `grid` (the shapes), `measure` (their times), `fit` (the coefficients), `loss`
(AUTO beside eager PyTorch), `report` (what
the reader sees), `cli` (the flags, and the file).
"""
