"""Operands on their way from who makes them to the product that takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from fp8moe.operands import RowOperand, TokenOperand


@dataclass
class Operands:
    """`(M, D)` quantized, handed over: who takes an operand out drops it with its last use."""

    rows: RowOperand | Callable[[], RowOperand] | None = None
    """`(R, D)`, or what makes it when it is taken."""
    tokens: TokenOperand | Callable[[], TokenOperand] | None = None
    """`(D, R)`, likewise."""

    def take_rows(self) -> RowOperand:
        """The rows, which must be there."""
        rows, self.rows = self.rows, None
        return rows() if callable(rows) else cast(RowOperand, rows)

    def take_tokens(self) -> TokenOperand:
        """The tokens, which must be there."""
        tokens, self.tokens = self.tokens, None
        return tokens() if callable(tokens) else cast(TokenOperand, tokens)
