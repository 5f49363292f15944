"""Recipes of FP8 beside BF16, over several seeds: do they train alike?

`python -m fp8moe experiment` trains and reports. The parts: `recipes` (what is compared), `sitting` (what trains within
a time limit), `evidence` (which kernels ran), `results` (the one file that travels), `statistics` (gaps paired by
seed), `report` and `curves` (what the reader sees), `cli` (flags).
"""
