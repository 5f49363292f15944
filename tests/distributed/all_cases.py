"""All cases, by name."""

from tests.distributed import cases, checkpoint_cases, data_parallel_cases

CASES = cases.CASES | data_parallel_cases.CASES | checkpoint_cases.CASES
