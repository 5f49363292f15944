"""Grouped GEMMs in Gluon for compute capability 9.0: a kernel for either kind of group, and what they share."""
