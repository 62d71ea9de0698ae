"""Tables outside the model: exact against dense float64 NumPy, touched rows only, in place, and bad input."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kunlun_jax.batch import Batch
from kunlun_jax.embedding import TableState, embed, init_tables, look_up, update
from kunlun_jax.embedding.tables import CHUNK, FEW_ROWS, Plan
from kunlun_jax.jagged import Jagged
from kunlun_jax.schema import PADDING_ID, TIME_FIELDS, DenseField, EventType, FeatureSchema, SparseField, Table

B, R, P, N = 6, 4, 2, 9


def make_schema(item_rows: int = 500, width: int = 4) -> FeatureSchema:
    """Table `item` is used by set fields and two event types; `tag` has fewer rows than a batch has ids."""
    return FeatureSchema(
        tables=(Table("item", item_rows, width), Table("tag", 7, 3), Table("unused", 5, 2)),
        dense=(DenseField("age"),),
        sparse=(
            SparseField("item", "item", scope="candidate"),
            SparseField("basket", "item", max_ids=3),
            SparseField("tags", "tag", scope="candidate", max_ids=2),
        ),
        events=(
            EventType("click", 5, (SparseField("item", "item"), SparseField("tags", "tag", max_ids=3))),
            EventType("buy", 5, (SparseField("item", "item"),), (DenseField("price"),), scope="candidate"),
        ),
    )


def make_batch(schema: FeatureSchema, rng: np.random.Generator, padding: float = 0.2, size=(B, R, N)) -> Batch:
    batch, requests, capacity = size

    def ids(field, *shape):
        drawn = (rng.zipf(1.3, size=(*shape, field.max_ids)) - 1) % schema.table(field.table).rows
        return np.where(rng.random(drawn.shape) < padding, PADDING_ID, drawn).astype(np.int32)

    def sequence(event):
        values = {f.name: ids(f, P, capacity) for f in event.sparse}
        values |= {f: rng.random((P, capacity), np.float32) for f in [d.name for d in event.dense] + list(TIME_FIELDS)}
        zeros = np.zeros((P, (batch if event.scope == "candidate" else requests) // P), np.int32)
        return Jagged(values, zeros, zeros, event.max_length)

    rows = {"request": requests, "candidate": batch}
    return Batch(
        dense={f.name: rng.random(rows[f.scope], np.float32) for f in schema.dense},
        sparse={f.name: ids(f, rows[f.scope]) for f in schema.sparse},
        events={e.name: sequence(e) for e in schema.events},
        request_index=np.zeros((P, batch // P), np.int32),
        labels=np.ones((batch, 1), np.float32),
        label_mask=np.ones((batch, 1), np.float32),
        weight=np.ones(batch, np.float32),
    )


def fields_of(schema):
    """(table, how to take the field from a batch or an embedded batch), for every sparse field."""
    for f in schema.sparse:
        yield f.table, lambda batch, name=f.name: batch.sparse[name]
    for e in schema.events:
        for f in e.sparse:
            yield f.table, lambda batch, event=e.name, name=f.name: batch.events[event].values[name]


def loss_of(schema, embedded, targets):
    return sum(jnp.sum((take(embedded) - y) ** 2) for (_, take), y in zip(fields_of(schema), targets, strict=True))


def make_step(schema, **settings):
    def step(tables, batch, targets, learning_rate, ok):
        rows, plans = look_up(schema, tables, batch)
        loss, grads = jax.value_and_grad(lambda rows: loss_of(schema, embed(schema, batch, rows, plans), targets))(rows)
        return update(tables, plans, grads, learning_rate=learning_rate, ok=ok, **settings), loss

    return step


def numpy_embed(table, ids):
    real = ids != PADDING_ID
    rows = np.where(real[..., None], table[np.where(real, ids, 0)], 0)
    return rows.sum(-2) / np.maximum(real.sum(-1), 1)[..., None]


def numpy_gradient(table, ids, cotangent):
    real = ids != PADDING_ID
    share = cotangent / np.maximum(real.sum(-1), 1)[..., None]
    grad = np.zeros_like(table)
    np.add.at(grad, ids[real], np.broadcast_to(share[..., None, :], (*ids.shape, table.shape[1]))[real])
    return grad


def targets_of(schema, batch, rng):
    return [
        rng.standard_normal((*take(batch).shape[:-1], schema.table(table).width)).astype(np.float32)
        for table, take in fields_of(schema)
    ]


def test_thirty_steps_equal_dense_row_wise_adagrad_in_float64():
    schema, rng, epsilon, start = make_schema(), np.random.default_rng(), 1e-3, 0.1
    tables = init_tables(schema, key=jax.random.key(1), scale=0.5, initial_accumulator=start)
    first = {name: np.array(t.rows) for name, t in tables.items()}
    weights = {name: np.array(t.rows, np.float64) for name, t in tables.items()}
    accumulators = {name: np.full(len(w), start) for name, w in weights.items()}
    touched = {name: np.zeros(len(w), bool) for name, w in weights.items()}
    step = jax.jit(make_step(schema, epsilon=epsilon), donate_argnums=0)
    duplicates = 0
    for number in range(30):
        batch = make_batch(schema, rng)
        targets = targets_of(schema, batch, rng)
        rate = 0.1 / (1 + number)
        tables, loss = step(tables, batch, targets, jnp.float32(rate), True)
        expected, grads = 0.0, {name: np.zeros_like(w) for name, w in weights.items()}
        for (name, take), y in zip(fields_of(schema), targets, strict=True):
            ids = take(batch)
            error = numpy_embed(weights[name], ids) - y
            expected += (error**2).sum()
            grads[name] += numpy_gradient(weights[name], ids, 2 * error)
            touched[name][ids[ids != PADDING_ID]] = True
            duplicates += np.unique(ids, return_counts=True)[1].max() > 1
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for name, g in grads.items():
            accumulators[name] += (g**2).mean(-1)
            weights[name] -= rate * g / (np.sqrt(accumulators[name]) + epsilon)[:, None]
    assert duplicates > 30
    for name, table in tables.items():
        chex.assert_trees_all_close(table.rows, weights[name], atol=5e-6, custom_message=f"rows of {name}")
        chex.assert_trees_all_close(table.accumulator, accumulators[name], rtol=5e-6, custom_message=name)
        rest = ~touched[name]
        np.testing.assert_array_equal(np.asarray(table.rows)[rest], first[name][rest])
        np.testing.assert_array_equal(np.asarray(table.accumulator)[rest], np.float32(start))
    assert (~touched["item"]).sum() > 50


def test_rows_gradient_equals_autodiff_of_dense_tables():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng)
    tables = init_tables(schema, key=jax.random.key(2), scale=1.0)
    targets = targets_of(schema, batch, rng)

    def dense_loss(weights):
        total = 0.0
        for (name, take), y in zip(fields_of(schema), targets, strict=True):
            ids = take(batch)
            found = jnp.where((ids != PADDING_ID)[..., None], weights[name][jnp.where(ids == PADDING_ID, 0, ids)], 0)
            mean = found.sum(-2) / jnp.maximum((ids != PADDING_ID).sum(-1), 1)[..., None]
            total += jnp.sum((mean - y) ** 2)
        return total

    dense = jax.jit(jax.grad(dense_loss))({name: t.rows for name, t in tables.items()})
    rows, plans = look_up(schema, tables, batch)
    grads = jax.jit(jax.grad(lambda rows: loss_of(schema, embed(schema, batch, rows, plans), targets)))(rows)
    assert plans["item"].uids is not None
    assert plans["tag"].uids is None
    for name, plan in plans.items():
        uids = np.arange(len(tables[name].rows)) if plan.uids is None else np.asarray(plan.uids)
        real = uids < len(tables[name].rows)
        scattered = np.zeros(tables[name].rows.shape, np.float32)
        scattered[uids[real]] = np.asarray(grads[name])[real]
        chex.assert_trees_all_close(scattered, dense[name], rtol=1e-5, atol=1e-5, custom_message=name)
        np.testing.assert_array_equal(np.asarray(grads[name])[~real], 0)  # padding included


def test_both_plans_give_the_same_step():
    """Whether a table is taken whole depends on the batch's capacity; it must not show."""
    schema, rng = make_schema(item_rows=40), np.random.default_rng()
    batch = make_batch(schema, rng)
    targets = targets_of(schema, batch, rng)
    tables = init_tables(schema, key=jax.random.key(3), scale=1.0)
    big = make_schema(item_rows=4000)
    enlarged = {**tables, "item": TableState(*(jnp.resize(x, (4000, *x.shape[1:])) for x in tables["item"]))}
    assert look_up(schema, tables, batch)[1]["item"].uids is None
    assert look_up(big, enlarged, batch)[1]["item"].uids is not None
    whole, _ = jax.jit(make_step(schema))(tables, batch, targets, 0.1, True)
    distinct, _ = jax.jit(make_step(big))(enlarged, batch, targets, 0.1, True)
    distinct["item"] = TableState(*(x[:40] for x in distinct["item"]))
    chex.assert_trees_all_close(whole, distinct, rtol=1e-5, atol=1e-6)


def test_a_plan_lists_each_id_once_in_order_and_finds_it_again():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng)
    plan = look_up(schema, init_tables(schema, key=jax.random.key(0)), batch)[1]["item"]
    uids = np.asarray(plan.uids)
    assert (np.diff(uids) > 0).all()
    used = [take(batch) for table, take in fields_of(schema) if table == "item"]
    ids = np.unique(np.concatenate([x.ravel() for x in used]))
    np.testing.assert_array_equal(uids[uids < 500], ids[ids != PADDING_ID])
    for name, places in plan.places.items():
        given = batch.sparse[name] if name in batch.sparse else batch.events[name.split(".")[0]].values["item"]
        found = np.append(uids, PADDING_ID)[np.asarray(places)]
        np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 1])
def test_many_ids_of_few_rows_add_their_gradients_up(rows):
    """By products in several chunks, the last one not full, or by a scatter: as a sum in float64."""
    rng, width, ids = np.random.default_rng(), 3, 2 * CHUNK + 7
    schema = FeatureSchema(tables=(Table("t", rows, width),), sparse=(SparseField("f", "t"),), tasks=("click",))
    places = rng.integers(0, rows, (ids, 1)).astype(np.int32)
    places[rng.random(ids) < 0.1] = PADDING_ID
    batch = Batch(dict(), dict(f=places), dict(), np.arange(ids, dtype=np.int32)[None], *[np.ones((ids, 1))] * 3)
    weights, values = rng.normal(size=(ids, width)), rng.normal(size=(rows, width)).astype(np.float32)

    def f(values):
        read = embed(schema, batch, {"t": values}, {"t": Plan(None, {"f": jnp.asarray(places)})}).sparse["f"]
        return jnp.sum(read * weights)

    expected = np.zeros((rows, width))
    real = places[:, 0] != PADDING_ID
    np.add.at(expected, places[real, 0], weights[real])
    np.testing.assert_allclose(jax.grad(f)(jnp.asarray(values)), expected, rtol=1e-4, atol=1e-4)


def test_padding_reads_zero_and_trains_no_row():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng, padding=1.0)
    tables = init_tables(schema, key=jax.random.key(0), scale=1.0)
    before = jax.tree.map(np.array, tables)
    targets = targets_of(schema, batch, rng)
    rows, plans = look_up(schema, tables, batch)

    @jax.jit
    def embeddings_and_gradient(rows):
        def embeddings(rows):
            embedded = embed(schema, batch, rows, plans)
            return [take(embedded) for _, take in fields_of(schema)]

        found, pull = jax.vjp(embeddings, rows)
        return found, *pull(targets)

    found, grads = embeddings_and_gradient(jax.tree.map(lambda x: x + 1, rows))
    for x in (*found, *grads.values()):
        np.testing.assert_array_equal(x, 0)
    # Whatever gradient padding may get, it must not reach a row.
    for fill in (np.nan, 1.0):
        grads["item"] = jnp.full_like(grads["item"], fill)
        chex.assert_trees_all_equal(update(tables, plans, grads, learning_rate=1.0), before)


def test_a_bad_step_leaves_every_table_as_it_was():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng, padding=0.0)
    tables = init_tables(schema, key=jax.random.key(0), scale=1.0, initial_accumulator=0.2)
    before = jax.tree.map(np.array, tables)
    targets = targets_of(schema, batch, rng)
    targets[0][0], targets[2][0] = np.nan, np.inf
    step = jax.jit(make_step(schema), donate_argnums=0)
    tables, loss = step(tables, batch, targets, 0.1, False)
    assert not np.isfinite(loss)
    chex.assert_trees_all_equal(tables, before)
    tables, _ = step(tables, batch, targets, 0.1, True)
    assert not np.isfinite(tables["item"].rows).all()


def test_embedding_keeps_what_is_not_sparse():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng)
    embedded = embed(schema, batch, *look_up(schema, init_tables(schema, key=jax.random.key(0)), batch))
    assert embedded.dense is batch.dense
    assert embedded.request_index is batch.request_index
    chex.assert_shape(embedded.sparse["basket"], (R, 4))
    chex.assert_shape(embedded.sparse["tags"], (B, 3))
    for name, sequence in embedded.events.items():
        given = batch.events[name]
        assert sequence.max_length == given.max_length
        assert sequence.starts is given.starts
        assert sequence.values.keys() == given.values.keys()
        chex.assert_shape(sequence.values["item"], (P, N, 4))
    assert embedded.events["buy"].values["price"] is batch.events["buy"].values["price"]


def test_initial_tables_depend_on_key_name_and_size_only():
    schema = make_schema()
    tables = init_tables(schema, key=jax.random.key(5), scale=0.3, initial_accumulator=0.5)
    reordered = FeatureSchema(tables=(schema.tables[2], schema.tables[0], schema.tables[1]), dense=schema.dense)
    again = init_tables(reordered, key=jax.random.key(5), scale=0.3, initial_accumulator=0.5)
    chex.assert_trees_all_equal(tables, again)
    other = init_tables(schema, key=jax.random.key(6), scale=0.3)
    assert (np.asarray(tables["item"].rows) != np.asarray(other["item"].rows)).any()
    assert abs(np.std(tables["item"].rows) - 0.3) < 0.03
    np.testing.assert_array_equal(tables["item"].accumulator, 0.5)


# --- in place, whatever the size of the table ----------------------------------------------------------------------

SIZES = (10_000, 10_000_000)


def compiled_step(rows: int, step_of=make_step):
    schema, rng = make_schema(item_rows=rows), np.random.default_rng(0)
    batch = make_batch(schema, rng, size=(64, 32, 256))
    tables = jax.eval_shape(lambda key: init_tables(schema, key=key), jax.random.key(0))
    arguments = (tables, batch, targets_of(schema, batch, rng), 0.1, True)
    return jax.jit(step_of(schema), donate_argnums=0).lower(*arguments).compile()


def operations_of_size(compiled, rows: int) -> set[str]:
    """The operations of the optimised program, inside fusions too, that produce an array with `rows` rows."""
    produced = re.findall(rf"= f32\[{rows}[\],]\S* ([\w-]+)\(", compiled.as_text())
    return set(produced) - {"parameter", "get-tuple-element", "tuple", "bitcast"}


def with_selection(schema):
    """What `update`'s `ok` is there to avoid."""

    def step(tables, batch, targets, learning_rate, ok):
        new, loss = make_step(schema)(tables, batch, targets, learning_rate, True)
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, tables), loss

    return step


def with_change_as_metric(schema):
    """Uses the looked-up rows after the update only; the gradient of a linear loss doesn't need them."""

    def step(tables, batch, targets, learning_rate, ok):
        rows, plans = look_up(schema, tables, batch)

        def embeddings(rows):
            embedded = embed(schema, batch, rows, plans)
            return [take(embedded) for _, take in fields_of(schema)]

        _, pull = jax.vjp(embeddings, rows)
        new = update(tables, plans, *pull(targets), learning_rate=learning_rate, ok=ok)
        after = new["item"].rows.at[plans["item"].uids].get(mode="fill", fill_value=0)
        return new, jnp.sum((after - rows["item"]) ** 2)

    return step


def test_step_has_no_operation_of_the_tables_size_but_the_scatter():
    for step_of in (make_step, with_change_as_metric):
        temporaries = []
        for rows in SIZES:
            compiled = compiled_step(rows, step_of)
            memory = compiled.memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            assert memory.alias_size_in_bytes >= rows * 5 * 4  # rows of width 4 and the accumulator
            assert operations_of_size(compiled, rows) <= {"scatter", "fusion"}, rows  # of the scatter alone
        assert max(temporaries) - min(temporaries) < 4096, temporaries
        assert max(temporaries) < 1_000_000


def test_the_check_for_whole_table_operations_sees_one():
    compiled = compiled_step(SIZES[0], with_selection)
    assert operations_of_size(compiled, SIZES[0]) >= {"select", "copy"}
    assert compiled.memory_analysis().temp_size_in_bytes > SIZES[0] * 4 * 4


def test_a_step_writes_into_the_very_buffers():
    schema, rng = make_schema(item_rows=1_000_000), np.random.default_rng()
    tables = init_tables(schema, key=jax.random.key(0))
    step = jax.jit(make_step(schema), donate_argnums=0)
    for _ in range(2):
        batch = make_batch(schema, rng)
        before = [x.unsafe_buffer_pointer() for x in tables["item"]]
        tables, _ = step(tables, batch, targets_of(schema, batch, rng), 0.1, True)
        assert [x.unsafe_buffer_pointer() for x in tables["item"]] == before


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    schema, rng = make_schema(), np.random.default_rng()
    batch = make_batch(schema, rng)
    tables = init_tables(schema, key=jax.random.key(0))
    rows, plans = look_up(schema, tables, batch)
    return schema, batch, tables, rows, plans


def test_settings_that_make_no_sense_raise(case):
    schema, _, tables, rows, plans = case
    for bad in ({"scale": -1.0}, {"initial_accumulator": -0.5}):
        with pytest.raises(ValueError, match="need at least 0"):
            init_tables(schema, key=jax.random.key(0), **bad)
    with pytest.raises(ValueError, match=r"epsilon is 0; it must be positive"):
        update(tables, plans, rows, learning_rate=0.1, epsilon=0)


def test_tables_that_are_not_the_schemas_raise(case):
    schema, batch, tables, _, _ = case
    with pytest.raises(ValueError, match=r"missing \['tag'\], unknown \['tog'\]"):
        look_up(schema, {"item": tables["item"], "tog": tables["tag"], "unused": tables["unused"]}, batch)
    narrow = TableState(tables["item"].rows[:, :3], tables["item"].accumulator)
    with pytest.raises(ValueError, match=r"table 'item': rows \[500, 3\].*asks for \[500, 4\]"):
        look_up(schema, {**tables, "item": narrow}, batch)
    short = TableState(tables["item"].rows, tables["item"].accumulator[:9])
    with pytest.raises(ValueError, match=r"table 'item'.*accumulator \[9\]"):
        look_up(schema, {**tables, "item": short}, batch)


def test_batches_that_are_not_the_schemas_raise(case):
    schema, batch, tables, _, _ = case
    batch.sparse["basket"] = batch.sparse["basket"][:, :2]
    with pytest.raises(ValueError, match=r"field 'basket' has int32 ids of shape \[4, 2\].*int32 \[..., 3\]"):
        look_up(schema, tables, batch)
    batch.sparse["basket"] = np.zeros((R, 3), np.int64)
    with pytest.raises(ValueError, match="field 'basket' has int64"):
        look_up(schema, tables, batch)
    del batch.sparse["basket"]
    with pytest.raises(ValueError, match="lacks field 'basket'"):
        look_up(schema, tables, batch)
    batch.sparse["basket"] = np.zeros((R, 3), np.int32)
    click = batch.events["click"].values
    tags = click.pop("tags")
    with pytest.raises(ValueError, match=r"lacks field 'click\.tags'"):
        look_up(schema, tables, batch)
    click["tags"] = tags
    del batch.events["buy"]
    with pytest.raises(ValueError, match=r"lacks field 'buy\.item'"):
        look_up(schema, tables, batch)


def test_plans_rows_and_gradients_that_do_not_belong_together_raise(case):
    schema, batch, tables, rows, plans = case
    with pytest.raises(ValueError, match=r"plans lack the tables \['tag'\]"):
        embed(schema, batch, rows, {"item": plans["item"]})
    with pytest.raises(ValueError, match=r"rows lack the tables \['item'\]"):
        embed(schema, batch, {"tag": rows["tag"]}, plans)
    with pytest.raises(ValueError, match=r"gradients for \['item'\], plans for \['item', 'tag'\]"):
        update(tables, plans, {"item": rows["item"]}, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"gradient of table 'tag' is \[7, 2\], expected \[7, 3\]"):
        update(tables, plans, {**rows, "tag": rows["tag"][:, :2]}, learning_rate=0.1)
