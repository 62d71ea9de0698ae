"""DCNv2 (arXiv 2008.13535): a cross network and an MLP side by side on all set features. A classic for orientation."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch
from kunlun_jax.layers.cross import CrossNetwork
from kunlun_jax.layers.features import PooledEvents, SetTokens
from kunlun_jax.layers.mlp import MLP, linear
from kunlun_jax.model_configs import DCNv2Config
from kunlun_jax.schema import FeatureSchema


class DCNv2(nnx.Module):
    """EmbeddedBatch → logits [B, tasks], float32: Linear([Cross(x) || MLP(x)]) of the flattened tokens x.

    Behaviour sequences enter pooled, as for Wukong.
    """

    def __init__(self, config: DCNv2Config, schema: FeatureSchema, *, rngs: nnx.Rngs):
        config.check(schema)
        self.config = config
        common = {"dtype": config.dtype, "rngs": rngs}
        self.set_tokens = SetTokens(schema, config.width, dense_tokens=config.dense_tokens, **common)
        self.pooled = PooledEvents(schema, config.width, **common)
        inputs = config.tokens(schema) * config.width
        self.cross = CrossNetwork(inputs, config.cross_depth, rank=config.cross_rank, **common)
        *hidden, last = config.hidden
        self.deep = MLP(inputs, hidden, last, **common)
        self.head = linear(inputs + last, len(schema.tasks), **common)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B tasks"]:
        x, pooled = self.set_tokens(batch), self.pooled(batch)
        x = x if pooled is None else jnp.concatenate([x, pooled], axis=1)
        x = x.reshape(x.shape[0], -1).astype(self.config.dtype)
        both = jnp.concatenate([self.cross(x), nnx.silu(self.deep(x))], axis=-1)
        return self.head(both).astype(jnp.float32)
