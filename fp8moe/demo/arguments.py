"""Types of command-line arguments."""

import argparse
from collections.abc import Callable, Collection


def names_among(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Of names, comma-separated, each once."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse
