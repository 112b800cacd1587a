"""Which samples to train on, said in one expression: `width >= 512 and not "sketch" in captions`.

Names of columns are compared with numbers, strings or lists of them by ==, !=, <, <=, >, >=, in and not in; comparisons
are joined by and, or, not and brackets. `"text" in name` and `"text" in captions` ask whether the name, or any caption,
contains that text. Python's parser reads the expression; nothing of it is ever run.
"""

import ast
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kcache.errors import ConfigError

Column = Sequence[str] | Sequence[Sequence[str]] | np.ndarray
"""One value per sample: strings, lists of strings, or numbers."""

_COMPARISONS: Mapping[type[ast.cmpop], Any] = {
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}


def matching_samples(expression: str, columns: Mapping[str, Callable[[], Column]]) -> np.ndarray:
    """Numbers of the samples for which `expression` holds, ascending (n,) int64.

    `columns` gives the functions that read the columns: only those are called that the expression names. Raises
    ConfigError, with the position, for what is not understood, for an unknown column and for values that do not fit
    the column.
    """
    line = expression.replace("\n", " ").strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(line, mode="eval")
    except SyntaxError as error:
        raise _unreadable(line, f"{error.msg} at position {error.offset or 0}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _unreadable(line, str(error) or "it is nested too deeply") from error
    try:
        return np.flatnonzero(_Reading(line, columns).truth(tree.body))
    except RecursionError as error:
        raise _unreadable(line, "it is nested too deeply") from error


def _unreadable(line: str, reason: str) -> ConfigError:
    return ConfigError(f"{line[:200]!a} cannot be read: {reason}; expected e.g. width >= 512 and height >= 512")


class _Reading:
    """An expression and the columns that it speaks of."""

    def __init__(self, expression: str, columns: Mapping[str, Callable[[], Column]]) -> None:
        self._expression = expression
        self._columns = columns

    def truth(self, node: ast.expr) -> np.ndarray:
        """Whether `node` holds, per sample (N,) bool."""
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce([self.truth(part) for part in node.values])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.truth(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return np.logical_and.reduce([self._compare(left, op, right) for left, op, right in pairs])
        raise self._error(node, "a comparison of a column")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> np.ndarray:
        if isinstance(op, ast.In | ast.NotIn):
            found = self._contains(left, right) if isinstance(right, ast.Name) else self._among(left, right)
            return found if isinstance(op, ast.In) else ~found
        compare = _COMPARISONS.get(type(op))
        if compare is None:
            raise self._error(left, "==, !=, <, <=, >, >=, in or not in")
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):
            column, other = self._plain_column(left), self._plain_column(right)
            if column.dtype.kind != other.dtype.kind:
                raise self._error(right, f"a column of the same kind as {left.id}")
            return compare(column, other)
        if isinstance(right, ast.Name):
            column = self._plain_column(right)
            return compare(self._value(left, column), column)
        column = self._plain_column(left)
        return compare(column, self._value(right, column))

    def _contains(self, left: ast.expr, right: ast.Name) -> np.ndarray:
        column = self._column(right)
        if isinstance(column, np.ndarray):
            raise self._error(right, "a column of text")
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            raise self._error(left, "a string")
        # A list of captions contains a text where any of them does.
        texts = ((value,) if isinstance(value, str) else value for value in column)
        return np.array([any(left.value in text for text in each) for each in texts], np.bool_)

    def _among(self, left: ast.expr, right: ast.expr) -> np.ndarray:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            raise self._error(right, "a column of text, or a list of values")
        column = self._plain_column(left)
        values = [self._value(each, column) for each in right.elts]
        return np.isin(column, values) if values else np.zeros(len(column), np.bool_)

    def _plain_column(self, node: ast.expr) -> np.ndarray:
        """A column of strings or numbers as an array (N,)."""
        column = self._column(node)
        if isinstance(column, np.ndarray):
            return column
        if not all(isinstance(value, str) for value in column):
            raise self._error(node, "a column of single values; of lists ask whether one has a text: 'cat' in captions")
        return np.array(column, np.object_)

    def _column(self, node: ast.expr) -> Column:
        if not isinstance(node, ast.Name):
            raise self._error(node, f"the name of a column ({', '.join(self._columns)})")
        if node.id not in self._columns:
            raise self._error(node, f"one of the columns {', '.join(self._columns)}")
        return self._columns[node.id]()

    def _value(self, node: ast.expr, column: np.ndarray) -> str | int | float:
        """A constant that can be compared with the values of `column`."""
        inner = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        numeric = column.dtype.kind in "iuf"
        if isinstance(value, bool) or not isinstance(value, (int, float) if numeric else str):
            raise self._error(node, "a number" if numeric else "a string in quotes")
        if isinstance(value, str):
            return value
        # Beyond 64 bits only the order counts, and infinity has it.
        number = float("inf") if isinstance(value, int) and value >= 1 << 63 else value
        return number if inner is node else -number

    def _error(self, node: ast.expr, expected: str) -> ConfigError:
        position = len(self._expression.encode()[: node.col_offset].decode()) + 1
        found = ast.get_source_segment(self._expression, node) or type(node).__name__
        return ConfigError(
            f"{self._expression[:200]!a} cannot be read: {found[:60]!a} at position {position}; expected {expected}"
        )
