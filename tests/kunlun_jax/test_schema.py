"""The schema: every check, the JSON round trip, the comparison by entry, and the binding of ids."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kunlun_jax.schema import (
    PADDING_ID,
    DenseField,
    EventType,
    FeatureSchema,
    SparseField,
    Table,
    bind_ids,
)

GOOD = FeatureSchema(
    tables=(Table("user", 11, 8), Table("item", 13, 4)),
    dense=(DenseField("age"), DenseField("price", "candidate")),
    sparse=(SparseField("user", "user"), SparseField("item", "item", "candidate", 3, "hash")),
    events=(EventType("click", 9, (SparseField("item", "item"),), (DenseField("seconds"),), "candidate"),),
    tasks=("click", "buy"),
    group="user",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": (*GOOD.tables, Table("item", 5, 2))}, r"tables use a name twice.*\['item'\]"),
        ({"dense": (*GOOD.dense, DenseField("item"))}, r"set features use a name twice.*\['item'\]"),
        ({"events": GOOD.events * 2}, r"event types use a name twice.*\['click'\]"),
        ({"tasks": ("click", "click")}, r"tasks use a name twice"),
        ({"tasks": ()}, "tasks is empty"),
        ({"dense": (), "sparse": (), "group": None}, "no set features"),
        ({"tables": (*GOOD.tables, Table("t", 0, 4))}, r"table 't' has 0 rows of width 4"),
        ({"tables": (*GOOD.tables, Table("t", 2**30, 4))}, r"table 't' has 1073741824 rows.*\[1, 2\^30\)"),
        ({"tables": (*GOOD.tables, Table("t", 4, 0))}, r"table 't' has 4 rows of width 0"),
        ({"tables": (*GOOD.tables, Table("", 4, 1))}, r"tables are named \[''\]"),
        ({"dense": (DenseField("click.item"),)}, r"set features are named \['click.item'\]"),
        ({"tables": (*GOOD.tables, Table("a/b", 4, 1))}, r"tables are named \['a/b'\]"),
        ({"events": (EventType("e", 3, (SparseField("i", "item"),), (DenseField("i"),)),)}, r"of event type 'e'.*'i'"),
        ({"events": (EventType("e", 3, (), (DenseField("gap"),)),)}, r"event type 'e'.*reserved: \['gap'\]"),
        ({"events": (EventType("e", 3),)}, r"event type 'e' has no fields"),
        ({"events": (EventType("e", 0, (), (DenseField("x"),)),)}, r"event type 'e' has max_length 0"),
        ({"events": (EventType("e", 3, (SparseField("i", "shop"),)),)}, r"'i' names table 'shop'; there are"),
        ({"sparse": (SparseField("user", "users"),)}, r"'user' names table 'users'"),
        ({"sparse": (SparseField("user", "user", max_ids=0),)}, r"'user' has max_ids 0"),
        ({"sparse": (SparseField("user", "user", out_of_range="drop"),)}, r"'user' has out_of_range 'drop'; choose"),
        ({"sparse": (SparseField("user", "user", "sample"),)}, r"'user' has scope 'sample'; choose from"),
        ({"dense": (DenseField("age", "all"),)}, r"'age' has scope 'all'"),
        ({"events": (replace(GOOD.events[0], scope="both"),)}, r"'click' has scope 'both'"),
        ({"group": "age"}, r"group 'age' is no sparse field; there are \['user', 'item'\]"),
    ],
)
def test_each_check_trips(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change)


def test_the_largest_table_is_allowed_and_tables_are_found_by_name():
    assert replace(GOOD, tables=(*GOOD.tables, Table("t", 2**30 - 1, 1))).table("t").rows == 2**30 - 1
    with pytest.raises(ValueError, match=r"no table 'shop'; there are \['user', 'item'\]"):
        GOOD.table("shop")


def test_json_gives_the_same_schema_back():
    assert FeatureSchema.from_json(GOOD.to_json()) == GOOD
    assert json.loads(GOOD.to_json())["sparse"][1]["out_of_range"] == "hash"
    with pytest.raises(TypeError, match="colour"):
        FeatureSchema.from_json(GOOD.to_json().replace('"max_length"', '"colour": 1, "max_length"'))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"tables": (Table("user", 12, 8), GOOD.tables[1])}, ["tables 'user'", "rows=11", "rows=12"]),
        ({"dense": GOOD.dense[:1]}, ["dense 'price'", "there None"]),
        ({"sparse": (*GOOD.sparse, SparseField("shop", "item"))}, ["sparse 'shop': here None"]),
        ({"events": (replace(GOOD.events[0], max_length=8),)}, ["events 'click'", "max_length=9", "max_length=8"]),
        ({"tasks": ("buy", "click")}, ["tasks: here ('click', 'buy'), there ('buy', 'click')"]),
        ({"group": None}, ["group: here user, there None"]),
        ({"dense": GOOD.dense[::-1]}, ["dense: same entries in another order"]),
        ({"group": "item", "tasks": ("click",)}, ["tasks:", "group:"]),
    ],
)
def test_every_difference_is_named(change, parts):
    GOOD.check_same(FeatureSchema.from_json(GOOD.to_json()), what="a copy")
    with pytest.raises(ValueError, match="the schema of checkpoint 7 differs from the one in use") as caught:
        GOOD.check_same(replace(GOOD, **change), what="checkpoint 7")
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).count("\n") == len(change)


# --- binding ids ---------------------------------------------------------------------------------------------------

TABLE = Table("item", 50, 4)


@example([48, 49, 50, -1, 0, 2**63 - 1], False)
@example([48, 49, 50, -1, 0, 2**63 - 1], True)
@given(st.lists(st.integers(-1, 2**63 - 1) | st.integers(-1, 60), max_size=30), st.booleans())
def test_bound_ids_are_rows_or_padding(raw, hashed):
    field = SparseField("item", "item", out_of_range="hash" if hashed else "out_of_vocabulary")
    ids = np.array(raw, np.int64)
    rows, count = bind_ids(field, TABLE, ids)
    kept = (ids >= 0) & (ids < (50 if hashed else 49))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[kept], ids[kept])
    np.testing.assert_array_equal(rows == PADDING_ID, ids == -1)
    beyond = ~kept & (ids != -1)
    assert count == beyond.sum()
    assert (rows[beyond] < 50).all() if hashed else (rows[beyond] == 49).all()
    assert (rows >= 0).all()


def test_hashing_spreads_neighbours_and_strides_evenly():
    field = SparseField("item", "item", out_of_range="hash")
    for ids in (np.arange(10**6, 10**6 + 50_000), np.arange(10**12, 10**12 + 50_000 * 64, 64)):
        share = np.bincount(bind_ids(field, TABLE, ids)[0], minlength=50) / 50_000
        assert abs(share - 1 / 50).max() < 0.005


def test_hashing_is_the_same_in_every_run():
    """Rows of a trained table mean something only under the same hash."""
    field = SparseField("item", "item", out_of_range="hash")
    rows, _ = bind_ids(field, Table("item", 1000, 4), np.array([1000, 123_456_789, 2**62]))
    np.testing.assert_array_equal(rows, [275, 792, 762])


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32])
def test_every_integer_type_binds(dtype):
    ids = np.array([[0, 3], [49, 7]], dtype)
    rows, count = bind_ids(SparseField("item", "item", max_ids=2), TABLE, ids)
    np.testing.assert_array_equal(rows, ids)
    assert count == 0


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.array([1.0]), TypeError, "field 'item': ids must be integers, got float64"),
        (np.array([True]), TypeError, "ids must be integers, got bool"),
        (np.array([1], np.uint64), TypeError, "ids must fit int64, got uint64"),
        (np.array([3, -2]), ValueError, "field 'item': id -2 is negative"),
        (np.array([3, 50]), ValueError, r"field 'item': id 50 is beyond table 'item' of 50 rows; enlarge"),
    ],
)
def test_ids_that_are_none_raise(ids, error, message):
    with pytest.raises(error, match=message):
        bind_ids(SparseField("item", "item"), TABLE, ids)
