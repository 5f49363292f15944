"""The grouped GEMMs: one module a backend, `base.py` their common protocol, `select.py` the choice between them."""
