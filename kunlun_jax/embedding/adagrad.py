"""Row-wise AdaGrad on the rows that a batch touched.

    v_r ← v_r + mean_j g_rj²;   w_r ← w_r − η g_r / (sqrt(v_r) + ε)

with g_r the sum over all uses of row r in the batch, so that duplicates take one step, and one v per row instead of one
per weight.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kunlun_jax.embedding.tables import Plan, TableState

DISTINCT: dict[str, Any] = {"unique_indices": True, "indices_are_sorted": True}  # what XLA may assume of a plan's uids


def update(
    tables: Mapping[str, TableState],
    plans: Mapping[str, Plan],
    grads: Mapping[str, Float[Array, "n width"]],
    *,
    learning_rate: ArrayLike,
    epsilon: float = 1e-8,
    ok: ArrayLike = True,
) -> dict[str, TableState]:
    """One step on the looked-up rows. In place if the caller's jit donates `tables`.

    Args:
      plans: what `look_up` returned.
      grads: per table, the gradient with respect to the looked-up rows.
      learning_rate: a number or a traced scalar, so that it may follow a schedule.
      epsilon: positive: it keeps rows without a gradient in place while their accumulator is still 0.
      ok: a scalar; false leaves every table bit for bit as it is, whatever the gradients hold.

    Tables that no field uses are returned unchanged.

    Raises:
      ValueError: a gradient is missing, belongs to no plan or has the wrong shape; `epsilon` is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"update: epsilon is {epsilon}; it must be positive")
    if grads.keys() != plans.keys() or not plans.keys() <= tables.keys():
        raise ValueError(
            f"update: gradients for {sorted(grads)}, plans for {sorted(plans)}, tables {sorted(tables)}; "
            f"gradients and plans must name the same tables"
        )
    updated = dict(tables)
    for name, plan in plans.items():
        (table_rows, width), grad = tables[name].rows.shape, grads[name]
        expected = (table_rows if plan.uids is None else plan.uids.size, width)
        if grad.shape != expected:
            raise ValueError(f"update: the gradient of table {name!r} is {list(grad.shape)}, expected {list(expected)}")
        if plan.uids is None:
            updated[name] = step_all_rows(tables[name], grad, learning_rate, epsilon, jnp.asarray(ok))
        else:
            uids = existing_if(jnp.asarray(ok), plan.uids, table_rows)
            updated[name] = step_rows(tables[name], uids, grad, learning_rate, epsilon)
    return updated


def step_all_rows(table: TableState, grad: Float[Array, "V width"], learning_rate, epsilon, ok) -> TableState:
    """A step on a table no larger than the batch's ids; a row that none of them names has gradient 0 and stays."""
    grad = jnp.where(ok, grad, 0)
    accumulator = table.accumulator + jnp.mean(grad * grad, axis=-1)
    step = learning_rate * grad / (jnp.sqrt(accumulator) + epsilon)[:, None]
    return TableState(table.rows - step, accumulator)


def step_rows(
    table: TableState, uids: Int[Array, "n"], grad: Float[Array, "n width"], learning_rate, epsilon, c: float = 1.0
) -> TableState:
    """A step on the rows `uids`, which are as in `Plan`; the accumulator is divided by `c` under the root."""
    change, accumulator = row_changes(table, uids, grad, learning_rate, epsilon, c)
    # Set, not added: so the writing waits for the reading of what it overwrites, and nothing is copied.
    return TableState(
        table.rows.at[uids].add(change.rows, mode="drop", **DISTINCT),
        table.accumulator.at[uids].set(accumulator, mode="drop", **DISTINCT),
    )


def existing_if(ok, uids: Int[Array, "n"], table_rows: int) -> Int[Array, "n"]:
    """The ids, or, of a skipped step, ids beyond the table: choosing between old and new tables would copy them."""
    return jnp.where(ok, uids, table_rows + jnp.arange(uids.size, dtype=jnp.int32))


def row_changes(
    table: TableState, uids: Int[Array, "n"], grad: Float[Array, "n width"], learning_rate, epsilon, c: float
) -> tuple[TableState, Float[Array, "n"]]:
    """What a step adds to the rows `uids` [n, width] and to their accumulators [n], and the accumulators after it."""
    added = jnp.mean(grad * grad, axis=-1)
    accumulator = table.accumulator.at[uids].get(mode="fill", fill_value=0, **DISTINCT) + added
    return TableState(-learning_rate * grad / (jnp.sqrt(accumulator / c) + epsilon)[:, None], added), accumulator
