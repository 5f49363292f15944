"""`python -m fp8moe bench --distributed`: expert parallelism and FSDP2 on several ranks; `scaling` plans for more."""
