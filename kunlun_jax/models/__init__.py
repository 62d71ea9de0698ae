"""The models, one file each, all of them `EmbeddedBatch → logits`; and the one table of their names."""

from typing import Any, NamedTuple

from flax import nnx

from kunlun_jax.model_configs import DCNv2Config, DINConfig, InterFormerConfig, KunlunConfig, ModelConfig, WukongConfig
from kunlun_jax.models.dcnv2 import DCNv2
from kunlun_jax.models.din import DIN
from kunlun_jax.models.interformer import InterFormer
from kunlun_jax.models.kunlun import Kunlun
from kunlun_jax.models.wukong import Wukong
from kunlun_jax.schema import FeatureSchema


class Model(NamedTuple):
    title: str
    config: Any
    module: Any


MODELS = {
    "kunlun": Model("Kunlun", KunlunConfig, Kunlun),
    "interformer": Model("InterFormer", InterFormerConfig, InterFormer),
    "wukong": Model("Wukong", WukongConfig, Wukong),
    "din": Model("DIN", DINConfig, DIN),
    "dcnv2": Model("DCNv2", DCNv2Config, DCNv2),
}


def named(name: str) -> Model:
    """The entry of a model.

    Raises:
      ValueError: no model has that name.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; there are {sorted(MODELS)}")
    return MODELS[name]


def name_of(config: ModelConfig) -> str:
    """The name of the model that a config configures."""
    return next(name for name, model in MODELS.items() if type(config) is model.config)


def build(config: ModelConfig, schema: FeatureSchema, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a config, with fresh parameters."""
    return MODELS[name_of(config)].module(config, schema, rngs=rngs)
