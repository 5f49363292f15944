"""An extension of Griffe, which reads docstrings for the site: `a, b: text` documents two parameters."""

import re
from typing import Any

from griffe import Extension, Object

SEVERAL_NAMES = re.compile(r"^( +)(\w+(?:, \w+)+): (.+(?:\n\1 +.+)*)", re.MULTILINE)


class SeveralNames(Extension):
    """Gives each name of an entry that has several its own copy of it, which is what Griffe's parser knows."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SEVERAL_NAMES.sub(one_by_one, obj.docstring.value)


def one_by_one(entry: re.Match[str]) -> str:
    indent, names, text = entry.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))
