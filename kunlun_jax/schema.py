"""The feature schema: one description that the data, the tables and the models bind to by name, never by position.

A `FeatureSchema` lists the dense and sparse set features, the event types with their fields, the embedding tables and
the tasks. It is stored in every checkpoint and compared at every boundary.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Scope = Literal["request", "candidate"]
OutOfRange = Literal["error", "hash", "out_of_vocabulary"]

# On the host, -1 pads the ids of a multi-hot field. On the device the padding id is larger than any table, because
# JAX wraps negative indices to the last rows and would train them.
HOST_PADDING_ID = -1
PADDING_ID = np.iinfo(np.int32).max

# Every event carries its time under these names, in seconds as float32 made from int64 on the host: the gap to the
# sample's previous event of the type (0 for its first), and the age, the gap to the request.
TIME_FIELDS = ("gap", "age")


@dataclass(frozen=True)
class Table:
    """An embedding table of `rows` × `width`. Fields may share it."""

    name: str
    rows: int
    width: int


@dataclass(frozen=True)
class DenseField:
    """A real number per request or per candidate (set features), or per event."""

    name: str
    scope: Scope = "request"


@dataclass(frozen=True)
class SparseField:
    """One id, or up to `max_ids` ids whose embeddings are averaged.

    `out_of_range` says what happens to an id that the table has no row for: "error"; "hash" maps it onto some row of
    the table; "out_of_vocabulary" maps it to the table's last row, which is then reserved.
    """

    name: str
    table: str
    scope: Scope = "request"
    max_ids: int = 1
    out_of_range: OutOfRange = "error"


@dataclass(frozen=True)
class EventType:
    """A behaviour sequence, oldest event first, at most `max_length` events long (the latest are kept)."""

    name: str
    max_length: int
    sparse: tuple[SparseField, ...] = ()
    dense: tuple[DenseField, ...] = ()
    scope: Scope = "request"


@dataclass(frozen=True)
class FeatureSchema:
    """What a data set offers and a model consumes.

    `group` names the sparse field (usually the user) within whose values gAUC ranks.

    Raises:
      ValueError: a name is used twice, reserved, empty or holds '.' or '/'; a field names no table; a size is not
        positive; a choice is unknown.
    """

    tables: tuple[Table, ...]
    dense: tuple[DenseField, ...] = ()
    sparse: tuple[SparseField, ...] = ()
    events: tuple[EventType, ...] = ()
    tasks: tuple[str, ...] = ("click",)
    group: str | None = None

    def __post_init__(self):
        _check_names("tables", (t.name for t in self.tables))
        _check_names("set features", (f.name for f in self.dense + self.sparse))
        _check_names("event types", (e.name for e in self.events))
        _check_names("tasks", self.tasks)
        if not self.tasks:
            raise ValueError("schema: tasks is empty; name at least one")
        if not self.dense and not self.sparse:
            raise ValueError("schema: no set features; give at least one dense or sparse field")
        for table in self.tables:
            if table.rows < 1 or table.rows > PADDING_ID // 2 or table.width < 1:
                raise ValueError(
                    f"schema: table {table.name!r} has {table.rows} rows of width {table.width}; "
                    f"rows must lie in [1, 2^30), width must be at least 1"
                )
        for event in self.events:
            names = [f.name for f in event.sparse + event.dense]
            _check_names(f"fields of event type {event.name!r}", [*names, *TIME_FIELDS])
            if not names:
                raise ValueError(f"schema: event type {event.name!r} has no fields")
            if event.max_length < 1:
                raise ValueError(
                    f"schema: event type {event.name!r} has max_length {event.max_length}; need at least 1"
                )
        tables = {t.name for t in self.tables}
        for field in self.sparse + tuple(f for e in self.events for f in e.sparse):
            if field.table not in tables:
                raise ValueError(
                    f"schema: field {field.name!r} names table {field.table!r}; there are {sorted(tables)}"
                )
            if field.max_ids < 1:
                raise ValueError(f"schema: field {field.name!r} has max_ids {field.max_ids}; need at least 1")
            if field.out_of_range not in get_args(OutOfRange):
                raise ValueError(
                    f"schema: field {field.name!r} has out_of_range {field.out_of_range!r}; "
                    f"choose from {get_args(OutOfRange)}"
                )
        fields: tuple[DenseField | SparseField | EventType, ...] = self.dense + self.sparse + self.events
        for field in fields:
            if field.scope not in get_args(Scope):
                raise ValueError(f"schema: {field.name!r} has scope {field.scope!r}; choose from {get_args(Scope)}")
        if self.group is not None and self.group not in {f.name for f in self.sparse}:
            raise ValueError(
                f"schema: group {self.group!r} is no sparse field; there are {[f.name for f in self.sparse]}"
            )

    def table(self, name: str) -> Table:
        for table in self.tables:
            if table.name == name:
                return table
        raise ValueError(f"schema: no table {name!r}; there are {[t.name for t in self.tables]}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "FeatureSchema":
        raw = json.loads(text)
        return cls(
            tables=tuple(Table(**t) for t in raw["tables"]),
            dense=tuple(DenseField(**f) for f in raw["dense"]),
            sparse=tuple(SparseField(**f) for f in raw["sparse"]),
            events=tuple(
                EventType(
                    **{
                        **e,
                        "sparse": tuple(SparseField(**f) for f in e["sparse"]),
                        "dense": tuple(DenseField(**f) for f in e["dense"]),
                    }
                )
                for e in raw["events"]
            ),
            tasks=tuple(raw["tasks"]),
            group=raw["group"],
        )

    def check_same(self, other: "FeatureSchema", *, what: str) -> None:
        """Raise a ValueError that lists every entry in which `other` (found in `what`) differs from this schema."""
        differences = []
        for part in dataclasses.fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine == theirs:
                continue
            if part.name in ("tasks", "group"):
                differences.append(f"{part.name}: here {mine}, there {theirs}")
                continue
            here, there = ({entry.name: entry for entry in entries} for entries in (mine, theirs))
            for name in sorted(here.keys() | there.keys()):
                if here.get(name) != there.get(name):
                    differences.append(f"{part.name} {name!r}: here {here.get(name)}, there {there.get(name)}")
            if here == there:
                differences.append(f"{part.name}: same entries in another order")
        if differences:
            raise ValueError(f"the schema of {what} differs from the one in use:\n  " + "\n  ".join(differences))


def bind_ids(field: SparseField, table: Table, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Turn a field's raw ids, int64 with -1 as padding, into int32 row numbers of its table.

    Returns the row numbers, with PADDING_ID for padding, and how many ids were hashed or sent to the
    out-of-vocabulary row. This happens on the host, since JAX would cut 64-bit ids to 32 bits in silence.

    Raises:
      ValueError: an id is below -1, or beyond the table while the field's `out_of_range` is "error".
      TypeError: ids are not integers.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"field {field.name!r}: ids must be integers, got {ids.dtype}")
    if ids.dtype == np.uint64:
        raise TypeError(f"field {field.name!r}: ids must fit int64, got uint64; hash them into int64 first")
    ids = ids.astype(np.int64)
    if (low := ids.min(initial=0)) < HOST_PADDING_ID:
        raise ValueError(f"field {field.name!r}: id {low} is negative; ids count from 0, {HOST_PADDING_ID} is padding")
    rows = table.rows - 1 if field.out_of_range == "out_of_vocabulary" else table.rows
    beyond = ids >= rows
    count = int(beyond.sum())
    if count and field.out_of_range == "error":
        raise ValueError(
            f"field {field.name!r}: id {ids.max()} is beyond table {table.name!r} of {table.rows} rows; enlarge the "
            f'table, or set out_of_range="hash" or "out_of_vocabulary" on the field'
        )
    if count:
        replacement = table.rows - 1 if field.out_of_range == "out_of_vocabulary" else _mix(ids) % table.rows
        ids = np.where(beyond, replacement, ids)
    return np.where(ids == HOST_PADDING_ID, PADDING_ID, ids).astype(np.int32), count


def _mix(ids: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers whose low bits depend on all bits (SplitMix64's finaliser); non-negative int64."""
    x = ids.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _check_names(what: str, names: Iterable[str]) -> None:
    counts = Counter(names)
    # "." joins an event type with its field, "/" the parts of a path within a checkpoint.
    if bad := [name for name in counts if not name or "." in name or "/" in name]:
        raise ValueError(f"schema: {what} are named {bad}; a name must not be empty and not contain '.' or '/'")
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"schema: {what} use a name twice, or one that is reserved: {repeated}")
