"""Which samples to train on, said in one expression: `width >= 512 and not "sketch" in captions`.

Names of columns are compared with numbers, strings or lists of them by ==, !=, <, <=, >, >=, in and not in; comparisons
are joined by and, or, not and brackets. `"text" in name` and `"text" in captions` ask whether the name, or any caption,
contains that text. What is true or not, such as `duplicate`, is said alone. Python's parser reads the expression;
nothing of it is ever run.
"""

import ast
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kcache.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

Column: TypeAlias = "np.ndarray | pyarrow.Array"
"""One value per sample: numbers, or as Arrow has them strings or lists of strings."""

_COMPARISONS: Mapping[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
"""Their names in numpy and in Arrow, which orders strings as Python does: bytes of UTF-8 sort as code points do."""
_TEXTS, _NUMBERS = ("id", "name", "captions"), ("width", "height", "weight", "repeats")


def sample_numbers(samples: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """The numbers (n,) int64 that somebody has chosen of `count` samples; raises IndexError for what is none of them.

    Such is a mask, too, which would be taken for the samples 0 and 1.
    """
    given = np.asarray(samples)
    if given.size and given.dtype.kind not in "iu":
        raise IndexError(f"samples are given as {given.dtype}; expected their numbers: of a mask np.flatnonzero(mask)")
    numbers = given.astype(np.int64, copy=False)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < count):
        raise IndexError(f"samples {numbers.min()} to {numbers.max()} asked of a cache of {count} samples")
    return numbers


def columns_named(expression: str) -> set[str]:
    """The columns of the samples' list that `expression` speaks of; raises ConfigError for what is no expression."""
    names = {node.id for node in ast.walk(_parsed(_line(expression))) if isinstance(node, ast.Name)}
    return names & {*_TEXTS, *_NUMBERS} | {"captions" for name in names & {"n_captions"}}


def columns_of(part: "pyarrow.Table") -> dict[str, Callable[[], Column]]:
    """What an expression may name of some samples, in one piece."""
    columns: dict[str, Callable[[], Column]] = {name: partial(_whole, part, name) for name in _TEXTS}
    columns |= {name: lambda name=name: _whole(part, name).to_numpy() for name in _NUMBERS}  # type: ignore[misc]
    return columns | {"n_captions": lambda: np.diff(_bounds(_whole(part, "captions")))}


def numbered(
    parts: "Iterable[pyarrow.Table]", selected: np.ndarray | None
) -> "Iterator[tuple[np.ndarray, pyarrow.Table]]":
    """Those samples of all, which come in `parts`, that are `selected` (n,), and their places in that, (k,) int64."""
    end, order = 0, None if selected is None else np.argsort(selected, kind="stable")
    for part in parts:
        start, end = end, end + len(part)
        if selected is None or order is None:
            yield np.arange(start, end), part
        else:
            first, last = np.searchsorted(selected, (start, end), sorter=order)
            places = order[first:last]
            yield places, part.take(selected[places] - start)


def _whole(part: "pyarrow.Table", name: str) -> Any:
    import pyarrow as pa

    return pa.concat_arrays(part[name].chunks) if part[name].num_chunks else pa.array([], part[name].type)


def _bounds(lists: Any) -> np.ndarray:
    """Where each list begins among the values of all, and the last ends: (n + 1,) int64."""
    return np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64)


def matching_samples(expression: str, columns: Mapping[str, Callable[[], Column]]) -> np.ndarray:
    """Numbers of the samples for which `expression` holds, ascending (n,) int64.

    `columns` gives the functions that read the columns: only those are called that the expression names. Raises
    ConfigError, with the position, for what is not understood, for an unknown column and for values that do not fit
    the column.
    """
    line = _line(expression)
    tree = _parsed(line)
    try:
        return np.flatnonzero(_Reading(line, columns).truth(tree.body))
    except RecursionError as error:
        raise _unreadable(line, "it is nested too deeply") from error


def _line(expression: str) -> str:
    return expression.replace("\n", " ").strip()


def _parsed(line: str) -> ast.Expression:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(line, mode="eval")
    except SyntaxError as error:
        raise _unreadable(line, f"{error.msg} at position {error.offset or 0}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _unreadable(line, str(error) or "it is nested too deeply") from error


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
        if isinstance(node, ast.Name) and _is_truth(column := self._column(node)):
            return column
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
            if isinstance(column, np.ndarray) != isinstance(other, np.ndarray):
                raise self._error(right, f"a column of the same kind as {left.id}")
            return _compared(compare, column, other)
        if isinstance(right, ast.Name):
            column = self._plain_column(right)
            return _compared(compare, self._value(left, column), column)
        column = self._plain_column(left)
        return _compared(compare, column, self._value(right, column))

    def _contains(self, left: ast.expr, right: ast.Name) -> np.ndarray:
        column = self._column(right)
        if isinstance(column, np.ndarray):
            raise self._error(right, "a column of text")
        if not (isinstance(left, ast.Constant) and isinstance(left.value, str)):
            raise self._error(left, "a string")
        text = self._encodable(left, left.value)
        if not _is_list(column):
            return _contain(column, text)
        # A list of captions contains a text where any of them does.
        found = np.concatenate([[0], np.cumsum(_contain(column.flatten(), text))])
        return np.diff(found[_bounds(column)]) > 0

    def _among(self, left: ast.expr, right: ast.expr) -> np.ndarray:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            raise self._error(right, "a column of text, or a list of values")
        column = self._plain_column(left)
        values = [self._value(each, column) for each in right.elts]
        if isinstance(column, np.ndarray):
            return np.isin(column, values) if values else np.zeros(len(column), np.bool_)
        return _among_texts(column, values)

    def _plain_column(self, node: ast.expr) -> Column:
        """A column of strings or numbers."""
        column = self._column(node)
        if _is_list(column):
            raise self._error(node, "a column of single values; of lists ask whether one has a text: 'cat' in captions")
        if _is_truth(column):
            raise self._error(node, f"a column of numbers or text; say {node.id} alone, or not {node.id}")  # type: ignore[attr-defined]
        return column

    def _column(self, node: ast.expr) -> Column:
        if not isinstance(node, ast.Name):
            raise self._error(node, f"the name of a column ({', '.join(self._columns)})")
        if node.id not in self._columns:
            raise self._error(node, f"one of the columns {', '.join(self._columns)}")
        return self._columns[node.id]()

    def _value(self, node: ast.expr, column: Column) -> str | int | float:
        """A constant that can be compared with the values of `column`."""
        inner = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
        value = inner.value if isinstance(inner, ast.Constant) else None
        numeric = isinstance(column, np.ndarray)
        if isinstance(value, bool) or not isinstance(value, (int, float) if numeric else str):
            raise self._error(node, "a number" if numeric else "a string in quotes")
        if isinstance(value, str):
            return self._encodable(inner, value)
        # Beyond 64 bits only the order counts, and infinity has it.
        number = float("inf") if isinstance(value, int) and value >= 1 << 63 else value
        if isinstance(column, np.ndarray) and column.dtype == np.float32:  # 0.1 is what a weight of 0.1 was rounded to
            number = float(np.float32(min(number, float(np.finfo(np.float32).max))))
        return number if inner is node else -number

    def _encodable(self, node: ast.expr, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._error(node, "a string that can be written in UTF-8") from error
        return text

    def _error(self, node: ast.expr, expected: str) -> ConfigError:
        position = len(self._expression.encode()[: node.col_offset].decode()) + 1
        found = ast.get_source_segment(self._expression, node) or type(node).__name__
        return ConfigError(
            f"{self._expression[:200]!a} cannot be read: {found[:60]!a} at position {position}; expected {expected}"
        )


def _compared(name: str, left: Any, right: Any) -> np.ndarray:
    """What the comparison of that name says of numbers, or of texts in Arrow's columns, (N,) bool."""
    if any(isinstance(side, np.ndarray) for side in (left, right)):
        return getattr(np, name)(left, right)
    import pyarrow.compute as pc

    return getattr(pc, name)(left, right).to_numpy(zero_copy_only=False)


def _contain(texts: Any, text: str) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.match_substring(texts, text).to_numpy(zero_copy_only=False)


def _among_texts(column: Any, texts: list[Any]) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.is_in(column, pa.array(texts, pa.string())).to_numpy(zero_copy_only=False)


def _is_truth(column: Any) -> bool:
    return isinstance(column, np.ndarray) and column.dtype == np.bool_


def _is_list(column: Any) -> bool:
    return not isinstance(column, np.ndarray) and column.type.num_fields > 0
