"""Other people's frameworks: each module needs its framework installed, and nothing in fp8moe imports it."""
