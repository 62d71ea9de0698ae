"""Kunlun (arXiv 2602.10016), a click-prediction architecture with predictable scaling laws, in JAX and Flax NNX."""

from kunlun_jax.batch import Batch, EmbeddedBatch, check_batch
from kunlun_jax.checkpoint import Checkpoints
from kunlun_jax.config import EventConfig, KunlunConfig, TrainConfig
from kunlun_jax.embedding import embed, init_tables, look_up, update
from kunlun_jax.embedding.placement import plan_tables
from kunlun_jax.jagged import Jagged
from kunlun_jax.mesh_learner import MeshLearner
from kunlun_jax.metrics import Evaluation
from kunlun_jax.model_configs import DCNv2Config, DINConfig, InterFormerConfig, WukongConfig
from kunlun_jax.models import DIN, DCNv2, InterFormer, Kunlun, Wukong
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.schema import DenseField, EventType, FeatureSchema, SparseField, Table
from kunlun_jax.sharding import ParallelConfig, make_mesh
from kunlun_jax.training import Learner, TrainState, fit

__all__ = [
    "DIN",
    "Batch",
    "Checkpoints",
    "DCNv2",
    "DCNv2Config",
    "DINConfig",
    "DenseField",
    "EmbeddedBatch",
    "Evaluation",
    "EventConfig",
    "EventType",
    "FeatureSchema",
    "InterFormer",
    "InterFormerConfig",
    "Jagged",
    "Kunlun",
    "KunlunConfig",
    "Learner",
    "MeshLearner",
    "OptimizerConfig",
    "ParallelConfig",
    "SparseField",
    "Table",
    "TrainConfig",
    "TrainState",
    "Wukong",
    "WukongConfig",
    "check_batch",
    "embed",
    "fit",
    "init_tables",
    "look_up",
    "make_mesh",
    "plan_tables",
    "update",
]
