"""Index arithmetic and cost formulas as sympy expressions, and their text as Triton code.

A kernel generator writes an index once, with every stride as a symbol or number, and `code` prints what is left of it
after simplification: `0 * row` disappears, `t // 8` disappears where `t < 8`, constants are folded. Only integer
expressions of +, *, // and % are handled.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.printing.str import StrPrinter

Expression = sympy.Expr | int


def symbol(name: str) -> sympy.Symbol:
    """Returns a non-negative integer symbol; `name` is a variable of the generated source or a letter of a formula."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def quotient(numerator: Expression, denominator: Expression) -> sympy.Expr:
    """Returns floor(numerator / denominator) of non-negative integers."""
    return sympy.floor(sympy.Integer(1) * numerator / denominator)


def remainder(numerator: Expression, denominator: Expression) -> sympy.Expr:
    """Returns numerator mod denominator of non-negative integers."""
    return sympy.Mod(numerator, denominator)


def blocks(size: Expression, block: Expression) -> sympy.Expr:
    """Returns ceil(size / block)."""
    return sympy.ceiling(sympy.Integer(1) * size / block)


def bounded(expression: Expression, limits: Mapping[sympy.Symbol, int]) -> sympy.Expr:
    """Drops the quotients and remainders that the ranges of the symbols make trivial.

    Args:
        expression: an index.
        limits: symbol -> its exclusive upper limit; every symbol is at least 0.
    """
    expression = sympy.sympify(expression)

    def largest(term: sympy.Expr) -> sympy.Expr | None:
        if not term.free_symbols <= set(limits):
            return None
        return term.subs({s: limits[s] - 1 for s in term.free_symbols})

    def floor_rule(argument: sympy.Expr) -> sympy.Expr:
        top = largest(argument)
        return sympy.Integer(0) if top is not None and top < 1 else sympy.floor(argument)

    def mod_rule(value: sympy.Expr, modulus: sympy.Expr) -> sympy.Expr:
        top = largest(value)
        return value if top is not None and top < modulus else sympy.Mod(value, modulus)

    return expression.replace(sympy.floor, floor_rule).replace(sympy.Mod, mod_rule)


class _TritonPrinter(StrPrinter):
    def _print_floor(self, expression: sympy.floor) -> str:
        numerator, denominator = expression.args[0].as_numer_denom()
        top = self._print(numerator)
        return f"({top if numerator.is_Atom else f'({top})'} // {self._print(denominator)})"

    def _print_Mod(self, expression: sympy.Mod) -> str:
        value, modulus = expression.args
        top = self._print(value)
        return f"({top if value.is_Atom else f'({top})'} % {self._print(modulus)})"


def code(expression: Expression, limits: Mapping[sympy.Symbol, int] | None = None) -> str:
    """Prints an index as Triton source, simplified (see `bounded`)."""
    return _TritonPrinter({"order": "lex"}).doprint(bounded(sympy.expand(expression), limits or {}))
