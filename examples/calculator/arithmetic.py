"""The calculator: evaluates an arithmetic expression without running anything else."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

MAX_CHARACTERS = 64
LARGEST = 10**12

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class CalculatorError(ValueError):
    """The expression is not plain arithmetic, or its value is out of range."""


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and brackets; whole numbers without a point.

    Raises CalculatorError for anything else, for more than 64 characters, and for values above 1e12.
    """
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"longer than {MAX_CHARACTERS} characters")
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise CalculatorError(str(error)) from error
    if abs(value) > LARGEST:
        raise CalculatorError("value out of range")
    return str(int(value)) if value == int(value) else str(round(value, 6))


def _evaluate(node: ast.expr) -> float:
    match node:
        # A bool is an int to Python, not to a calculator.
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left), _evaluate(right))
    raise CalculatorError(f"not arithmetic: {type(node).__name__}")
