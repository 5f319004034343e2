"""Which items may be shown, in words: `category == 'Skin Care' and price < 20` over the columns of items.parquet.

    either  = both { "or" both }
    both    = no { "and" no }
    no      = "not" no | compare
    compare = term [ ("==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "not" "in") term ]
    term    = column | 'text' | number | "true" | "false" | "[" [ value { "," value } ] "]" | "(" either ")"
            | "contains" "(" column "," 'text' ")"

The sentence is read by hand and becomes a polars expression; nothing of it is ever run as code. A missing value makes a
comparison false; `!=` and `not in` are the opposites of `==` and `in`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import polars as pl

from m6rec_jax.data.features import NUMBER_PREFIX
from m6rec_jax.errors import InputError

NAMES = {"category": "categories", "attribute": "attributes"}  # one of the values of a list: what people write
DEEPEST = 50  # brackets and nots inside each other
AROUND = 40  # characters shown on both sides of a mistake

NUMBER, TEXT, LIST, TRUTH, VALUES = "a number", "a text", "a list", "true or false", "values in brackets"
ORDERS = {"<": pl.Expr.lt, "<=": pl.Expr.le, ">": pl.Expr.gt, ">=": pl.Expr.ge}
TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
WORDS = ("and", "or", "not", "in", "true", "false")

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w))
    |(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |`(?P<quoted>[^`]+)`
    |(?P<name>[^\W\d]\w*)
    |(?P<sign>==|!=|<=|>=|[<>()\[\],])
    |(?P<end>$))""",
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    kind: str
    value: str
    at: int


@dataclass(frozen=True)
class Term:
    """A part of the sentence: `expr` of a column or of a finished comparison, or the `value` of a literal."""

    kind: str
    at: int
    name: str
    expr: pl.Expr | None = None
    value: Any = None


def item_columns(items: pl.DataFrame) -> dict[str, tuple[str, str]]:
    """What a filter may name: each name with its column of items.parquet and the kind of its values.

    `category` and `attribute` stand for the lists of them, `price` for `num_price`, unless a column is called so.
    """
    kinds = {
        name: TEXT if kind == pl.String else TRUTH if kind == pl.Boolean else NUMBER if kind.is_numeric() else LIST
        for name, kind in items.schema.items()
        if kind in (pl.String, pl.Boolean, pl.List(pl.String)) or kind.is_numeric()
    }
    found = {name: (name, kind) for name, kind in kinds.items()}
    for name, column in NAMES.items():
        if column in kinds:
            found.setdefault(name, (column, kinds[column]))
    for column, kind in kinds.items():
        if column.startswith(NUMBER_PREFIX):
            found.setdefault(column.removeprefix(NUMBER_PREFIX), (column, kind))
    return found


def named(columns: dict[str, tuple[str, str]]) -> str:
    """The columns by their short names, for a message: no column twice."""
    short = {column: name for name, (column, _) in columns.items() if name != column}
    return ", ".join(sorted(short.get(name, name) for name, (column, _) in columns.items() if name == column))


def filter_mask(items: pl.DataFrame, sentence: str, origin: str = "filter") -> np.ndarray:
    """Which items a filter allows: bool `[C]`.

    Raises InputError, one line that gives the character and shows the place by ^, when it is malformed, names an
    unknown column (the known ones are listed) or compares what cannot be compared. `origin` begins the message.
    """
    expr = _Reader(sentence, item_columns(items), origin).read()
    return items.select(expr.fill_null(False).alias("allowed"))["allowed"].to_numpy().astype(bool)


class _Reader:
    """Recursive descent over the tokens; each method reads one line of the grammar above."""

    def __init__(self, sentence: str, columns: dict[str, tuple[str, str]], origin: str) -> None:
        self.sentence, self.columns, self.origin = sentence, columns, origin
        self.tokens = self._tokens()
        self.next, self.depth = 0, 0

    def read(self) -> pl.Expr:
        if self.now.kind == "end":
            raise InputError(f"{self.origin}: empty; write a condition such as \"category == 'Skin Care' and price < 20\"")  # fmt: skip
        expr = self._either()
        if self.now.kind != "end":
            self._stop(self.now.at, f"{self.now.value} is not expected here; join conditions by `and` or `or`")
        return expr

    # -- tokens ------------------------------------------------------------------------------------------------

    def _tokens(self) -> list[Token]:
        found, at = [], 0
        while not found or found[-1].kind != "end":
            match = _TOKEN.match(self.sentence, at)
            if match is None:
                at += len(self.sentence[at:]) - len(self.sentence[at:].lstrip())
                self._stop(at, _strange(self.sentence[at:]))
            kind = str(match.lastgroup)
            start = match.start(kind) - (kind == "quoted")
            value = match[kind]
            kind = "sign" if kind == "name" and value.lower() in WORDS else kind
            found.append(Token(kind, value.lower() if kind == "sign" else value, start))
            at = match.end()
        return found

    @property
    def now(self) -> Token:
        return self.tokens[self.next]

    def _takes(self, *signs: str) -> bool:
        """Whether these signs come next; then they are read."""
        coming = self.tokens[self.next : self.next + len(signs)]
        if [t.value for t in coming if t.kind == "sign"] != list(signs):
            return False
        self.next += len(signs)
        return True

    def _needs(self, sign: str, why: str) -> None:
        if not self._takes(sign):
            self._stop(self.now.at, f"{sign} is missing {why}")

    def _stop(self, at: int, why: str) -> NoReturn:
        before, after = self.sentence[:at], self.sentence[at:]
        before = before if len(before) <= AROUND else "..." + before[-AROUND:]
        after = after if len(after) <= AROUND else after[:AROUND] + "..."
        shown = "".join(" " if c.isspace() else c for c in f"{before}^{after}")  # a message is one line
        raise InputError(f"{self.origin}, character {at + 1}: {why}: {shown}")

    # -- grammar -----------------------------------------------------------------------------------------------

    def _either(self) -> pl.Expr:
        found = [self._both()]
        while self._takes("or"):
            found.append(self._both())
        return pl.any_horizontal(found)

    def _both(self) -> pl.Expr:
        found = [self._no()]
        while self._takes("and"):
            found.append(self._no())
        return pl.all_horizontal(found)

    def _no(self) -> pl.Expr:
        at = self.now.at
        if not self._takes("not"):
            return self._compare()
        self._deeper(at)
        expr = ~self._no()
        self.depth -= 1
        return expr

    def _compare(self) -> pl.Expr:
        left = self._term()
        at = self.now.at
        operator = "not in" if self._takes("not", "in") else self.now.value
        if operator in ("==", "!=", "in", *ORDERS) and self.now.kind == "sign":
            self.next += 1
        elif operator != "not in":
            if left.expr is None or left.kind != TRUTH:
                self._stop(at, f"a comparison is missing after {left.name}, such as == or <")
            return left.expr
        return self._compared(left, operator, self._term(), at)

    def _deeper(self, at: int) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            self._stop(at, f"more than {DEEPEST} brackets and nots inside each other; write it flatter")

    def _term(self) -> Term:
        token = self.now
        self.next += 1
        if token.kind == "number":
            return Term(NUMBER, token.at, token.value, value=float(token.value))
        if token.kind == "text":
            return Term(TEXT, token.at, token.value, value=re.sub(r"\\(.)", r"\1", token.value[1:-1], flags=re.DOTALL))
        if token.kind in ("name", "quoted"):
            if token.value == "contains" and token.kind == "name" and self._takes("("):
                return self._contains(token)
            return self._column(token)
        if token.kind == "sign" and token.value in ("true", "false"):
            return Term(TRUTH, token.at, token.value, value=token.value == "true")
        if token.kind == "sign" and token.value == "[":
            return self._values(token)
        if token.kind == "sign" and token.value == "(":
            self._deeper(token.at)
            expr = self._either()
            self._needs(")", f"to close the ( of character {token.at + 1}")
            self.depth -= 1
            return Term(TRUTH, token.at, "the condition in brackets", expr)
        self._stop(token.at, "a column or a value is missing")

    def _column(self, token: Token) -> Term:
        if token.value not in self.columns:
            self._stop(token.at, f"unknown item column {token.value}; there are {named(self.columns)} (text goes in quotes)")  # fmt: skip
        column, kind = self.columns[token.value]
        return Term(kind, token.at, token.value, pl.col(column))

    def _values(self, opened: Token) -> Term:
        found: list[Term] = []
        self._deeper(opened.at)
        while not self._takes("]"):
            if found:
                self._needs(",", "between the values in brackets")
            term = self._term()
            if term.kind not in (NUMBER, TEXT) or term.expr is not None:
                self._stop(term.at, "only numbers and texts stand between [ and ]")
            if found and term.kind != found[0].kind:
                self._stop(term.at, f"{term.name} is {term.kind} and {found[0].name} {found[0].kind}")
            found.append(term)
        self.depth -= 1
        name = self.sentence[opened.at : self.tokens[self.next - 1].at + 1]
        return Term(VALUES, opened.at, name, value=found)

    def _contains(self, token: Token) -> Term:
        self._deeper(token.at)
        column = self._term()
        if column.kind not in (TEXT, LIST) or column.expr is None:
            self._stop(column.at, f"contains looks into a column of text, and {column.name} is {column.kind}")
        self._needs(",", "between the column and the text of contains")
        part = self._term()
        if part.kind != TEXT or part.expr is not None:
            self._stop(part.at, f"contains looks for a text in quotes, and {part.name} is none")
        self._needs(")", "to close contains")
        self.depth -= 1
        lies_in = lambda x: x.str.to_lowercase().str.contains(part.value.lower(), literal=True)  # noqa: E731
        expr = lies_in(column.expr) if column.kind == TEXT else column.expr.list.eval(lies_in(pl.element())).list.any()
        return Term(TRUTH, token.at, "contains(...)", expr.fill_null(False))

    # -- comparisons -------------------------------------------------------------------------------------------

    def _compared(self, left: Term, operator: str, right: Term, at: int) -> pl.Expr:
        """`left operator right`, never null."""
        if operator in ("in", "not in"):
            found = self._within(left, right, at)
            return found if operator == "in" else ~found
        if left.expr is None:  # 20 > price
            left, operator, right = right, TURNED[operator], left
        if left.expr is None:
            self._stop(at, f"neither {right.name} nor {left.name} is an item column")
        if LIST in (left.kind, right.kind):
            if right.kind == LIST:
                left, right = right, left
            if operator not in ("==", "!="):
                self._stop(at, f"{left.name} is a list, which {operator} does not order; ==, !=, in and not in look for a value in it")  # fmt: skip
            found = self._one_of(left, [right])
            return found if operator == "==" else ~found
        if left.kind != right.kind:
            self._stop(right.at if right.expr is None else at, f"{left.name} is {left.kind} and {right.name} is {right.kind}")  # fmt: skip
        if operator in ORDERS:
            if left.kind != NUMBER:
                self._stop(at, f"{operator} orders numbers, and {left.name} is {left.kind}")
            return ORDERS[operator](_cells(left), _cells(right)).fill_null(False)
        equal = (_cells(left) == _cells(right)).fill_null(False)
        return equal if operator == "==" else ~equal

    def _within(self, left: Term, right: Term, at: int) -> pl.Expr:
        """Whether a column has one of the values, or the value is in a column of lists."""
        if right.kind == LIST:
            return self._one_of(right, [left])
        if right.kind != VALUES:
            self._stop(right.at, f"in needs values such as ['a', 'b'] or a column of lists, and {right.name} is {right.kind}")  # fmt: skip
        if left.expr is None:
            self._stop(left.at, f"{left.name} is no item column")
        return self._one_of(left, right.value)

    def _one_of(self, column: Term, values: Sequence[Term]) -> pl.Expr:
        wanted = TEXT if column.kind == LIST else column.kind
        for value in values:
            if value.kind != wanted or value.expr is not None:
                self._stop(value.at, f"{column.name} is {column.kind}{' of texts' if column.kind == LIST else ''}, and {value.name} is {'no value' if value.expr is not None else value.kind}")  # fmt: skip
        cells, among = _cells(column), [value.value for value in values]
        if not among:
            return pl.repeat(False, pl.len(), dtype=pl.Boolean)
        found = cells.list.eval(pl.element().is_in(among)).list.any() if column.kind == LIST else cells.is_in(among)
        return found.fill_null(False)


def _cells(term: Term) -> pl.Expr:
    if term.expr is None:
        return pl.lit(term.value)
    return term.expr.cast(pl.Float64).fill_nan(None) if term.kind == NUMBER else term.expr


def _strange(rest: str) -> str:
    if rest[0] in "'\"`":
        return f"the {rest[0]} that opens here is never closed"
    hints = {"=": "write == to compare", "&": "write `and`", "|": "write `or`", "!": "write != or `not`"}
    return (
        f"{rest[0]} means nothing here; {hints.get(rest[0], 'texts go in quotes, columns with odd names in backticks')}"
    )
