"""Grouped GEMMs in Gluon for compute capability 9.0: `m_grouped_kernel.py` and `wgrad_kernel.py`, and what they share."""
