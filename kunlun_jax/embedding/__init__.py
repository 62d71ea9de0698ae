"""Embedding tables, outside the model: `look_up` and `embed` before it, `update` after its gradients."""

from kunlun_jax.embedding.adagrad import update
from kunlun_jax.embedding.tables import Plan, TableState, embed, init_tables, look_up

__all__ = ["Plan", "TableState", "embed", "init_tables", "look_up", "update"]
