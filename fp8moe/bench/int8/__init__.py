"""`python -m fp8moe bench --int8`: quantized experts against other ways to compute them, and against BF16 and FP8."""
