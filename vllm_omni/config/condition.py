"""When an edge is taken: a small expression over the meta of its source's payload.

Knows names, constants and comparisons, no stage and no request. Read by a parser and walked; nothing of it is run.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.errors import ConfigError, StageError
from vllm_omni.utils.checks import brief, is_finite

MAX_CHARS = 500
MAX_DEPTH = 16
EXPECTED = "names, constants, comparisons (== != < <= > >= in, not in), and, or, not and parentheses"

_MISSPELT = {"true": "True", "false": "False", "null": "None", "none": "None"}
_MEMBERSHIP = (ast.In, ast.NotIn)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, whole: item in whole,
    ast.NotIn: lambda item, whole: item not in whole,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """An expression in Python's syntax, with its meaning: `sound`, `not (n > 3)`, `finish_reason in ['stop']`.

    A name is a key of the meta, None where that is missing. The right side of `in` may be a list. text: the expression
    in one spelling, whatever blanks and quotes it was written with; equal texts are equal conditions.
    """

    text: str
    tree: ast.expr = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition that a config spells; ConfigError, without the key, for anything else."""
        if len(text) > MAX_CHARS:
            raise ConfigError(f"got {len(text)} characters, expected at most {MAX_CHARS}; let a stage work it out")
        tree = _parsed(text.strip())
        _check(tree, text.strip(), MAX_DEPTH)
        condition = cls(ast.unparse(tree), tree)
        if not condition.names:
            raise ConfigError(f"got {brief(text)}, which reads no key of the meta; leave `when` out, or name a key")
        return condition

    @property
    def names(self) -> frozenset[str]:
        """The keys of the meta that it reads."""
        return frozenset(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name))

    def holds(self, meta: Mapping[str, Any]) -> bool:
        """Whether it is true of this meta; StageError where values cannot be compared, as None < 3."""
        try:
            return bool(_value(self.tree, meta))
        except Exception as error:  # the values are a stage's, which may be of any type
            raise StageError(
                f"when '{self}' cannot be decided: {error}; a missing key is None, so test for it first, as in "
                "'n and n > 3'"
            ) from error

    def __str__(self) -> str:
        return self.text


def _parsed(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '1or x' and such make the parser warn of Python's future
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise ConfigError(f"got {brief(text)}, which cannot be read ({reason}), expected {EXPECTED}") from None


def _check(node: ast.expr, text: str, depth: int) -> None:
    if depth == 0:
        raise ConfigError(f"got {brief(text)}, expected at most {MAX_DEPTH} levels")
    if isinstance(node, ast.Name) and node.id in _MISSPELT:
        raise ConfigError(f"got {node.id!r}, a name that no meta has; write {_MISSPELT[node.id]}")
    operands = _operands(node)
    if operands is None:
        raise ConfigError(f"got {brief(ast.get_source_segment(text, node) or text)}, expected {EXPECTED}")
    for operand in operands:
        _check(operand, text, depth - 1)


def _operands(node: ast.expr) -> Sequence[ast.expr] | None:
    """What a node joins; None for syntax that conditions do not have."""
    match node:
        case ast.Name():
            return ()
        case ast.Constant(value=value):
            return () if value is None or isinstance(value, str) or _is_number(value) else None
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)):
            return () if _is_number(value) else None
        case ast.UnaryOp(op=ast.Not()):
            return (node.operand,)
        case ast.BoolOp():
            return node.values
        case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
            operands = [node.left]
            for op, right in zip(node.ops, node.comparators, strict=True):
                operands += _choices(op, right)
            return operands
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and is_finite(value)


def _choices(op: ast.cmpop, right: ast.expr) -> list[ast.expr]:
    """What stands right of a comparison; lists stand nowhere else, as `a, b` alone would always be true."""
    if isinstance(op, _MEMBERSHIP) and isinstance(right, ast.List | ast.Tuple):
        return right.elts
    return [right]


def _value(node: ast.expr, meta: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return meta.get(name)
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, meta) for item in items]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, meta)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, meta)
        case ast.BoolOp():
            return _joined(node, meta)
        case ast.Compare():
            return _compared(node, meta)
    raise AssertionError(f"{ast.dump(node)} was let in")


def _joined(node: ast.BoolOp, meta: Mapping[str, Any]) -> Any:
    """The first value that decides, as in Python; what stands behind it is not looked at."""
    value = None
    for operand in node.values:
        value = _value(operand, meta)
        if bool(value) != isinstance(node.op, ast.And):
            return value
    return value


def _compared(node: ast.Compare, meta: Mapping[str, Any]) -> bool:
    left = _value(node.left, meta)
    for op, operand in zip(node.ops, node.comparators, strict=True):
        right = _value(operand, meta)
        if not _COMPARISONS[type(op)](left, right):
            return False
        left = right
    return True
