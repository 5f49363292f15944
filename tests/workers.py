"""Print the options with which pytest uses all processors: `python -m tests.workers`. None where xdist is missing."""

import importlib.util
import os

MAX_WORKERS = 8  # each holds torch in memory, and on a GPU a context and a share of its memory


def options(processors: int, has_xdist: bool) -> str:
    """Of a machine with that many processors."""
    workers = min(processors, MAX_WORKERS)
    return f"-n {workers} --dist worksteal" if has_xdist and workers > 1 else ""


if __name__ == "__main__":
    print(options(os.cpu_count() or 1, importlib.util.find_spec("xdist") is not None))
