"""The configuration of a whole training, and configurations as JSON. The models' own are in model_configs.py."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kunlun_jax.data.synthetic import SyntheticConfig
from kunlun_jax.data.synthetic import make_schema as make_synthetic_schema
from kunlun_jax.jagged import CAPACITY_FRACTIONS
from kunlun_jax.model_configs import EventConfig, KunlunConfig, ModelConfig, at_least_one
from kunlun_jax.models import named
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.sharding import ParallelConfig

__all__ = ["EventConfig", "KunlunConfig", "TrainConfig", "from_dict", "to_dict"]


@dataclass(frozen=True)
class TrainConfig:
    """A whole training: data, model, optimiser, order. With the code's version it determines the result.

    Attributes:
      data: which data set.
      data_directory: where MovieLens' files are, or are put.
      synthetic: settings of the generator, for data "synthetic".
      batch_size: samples per step.
      epochs: passes over the training part.
      shuffle: a new order each epoch; False keeps time order.
      embedding_dropout: rate at which whole embedding fields are dropped in training: over several epochs the rows
        that a model has seen most would otherwise be learnt by heart.
      seed: of the initial parameters, the order and the dropout.
      capacity_fractions: shares of batch_size · max_length events for which a program is compiled.
      loader_threads: threads that prepare batches ahead of the device.
      log_every, save_every: steps between lines in the log, and between checkpoints.
      parallel: how the training is spread over devices.
    """

    model: ModelConfig
    data: Literal["movielens", "synthetic"] = "movielens"
    data_directory: Path = Path("data/ml-100k")
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 1000
    epochs: int = 2
    shuffle: bool = False
    embedding_dropout: float = 0.0
    seed: int = 0
    capacity_fractions: tuple[float, ...] = CAPACITY_FRACTIONS
    loader_threads: int = 1
    log_every: int = 10
    save_every: int = 40
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self):
        at_least_one(self, "batch_size", "epochs", "loader_threads", "log_every", "save_every")
        if self.seed < 0:
            raise ValueError(f"seed: must not be negative, got {self.seed}")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout: must be at least 0 and below 1, got {self.embedding_dropout}")

    @classmethod
    def movielens(cls, model: str = "kunlun") -> "TrainConfig":
        """MovieLens-100K in time order.

        Raises:
          ValueError: no model has this name.
        """
        return cls(
            model=named(model).config.movielens(),
            optimizer=OptimizerConfig(learning_rate=2e-3),
            batch_size=500,
            capacity_fractions=(0.25, 0.5, 1.0),
        )

    @classmethod
    def synthetic_stream(cls, model: str = "kunlun") -> "TrainConfig":
        """The generated stream, whose best possible NE is known.

        Raises:
          ValueError: no model has this name.
        """
        synthetic = SyntheticConfig(train=40_000, validation=4_000, test=4_000)
        return cls(
            model=named(model).config.tiny(make_synthetic_schema(synthetic)),
            data="synthetic",
            synthetic=synthetic,
            # Fresh rows of the size of the other tokens: products of small rows learn slowly.
            optimizer=OptimizerConfig(learning_rate=3e-3, table_learning_rate=0.2, table_scale=0.5),
            batch_size=250,
            capacity_fractions=(0.5, 0.75, 1.0),
        )

    @classmethod
    def gflops_6(cls, model: str = "kunlun") -> "TrainConfig":
        """The preset of 6 GFLOPs per sample on its stream, whose best possible NE is known, for one GPU. One epoch:
        in a second one it knows the samples by heart.

        Raises:
          ValueError: the model has no preset of that size.
        """
        config = named(model).config
        if not hasattr(config, "gflops_6"):
            raise ValueError(f"model {model!r} has no preset of 6 GFLOPs per sample; kunlun, interformer, wukong have")
        return cls(
            model=config.gflops_6(),
            data="synthetic",
            synthetic=SyntheticConfig.gflops_6(train=102_400, validation=4_096, test=4_096),
            optimizer=OptimizerConfig(learning_rate=1e-3, table_learning_rate=0.2, table_scale=0.5),
            batch_size=512,
            epochs=1,
            capacity_fractions=(0.5625, 1.0),
            loader_threads=8,
            save_every=100,
        )


def to_dict(config: Any) -> Any:
    """A config as JSON-able values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(kind: Any, values: Any, *, where: str = "config") -> Any:
    """The inverse of `to_dict` for a config class `kind`; absent fields take their defaults.

    Raises:
      ValueError: a field is unknown, or a value has another type than its field; the message names it.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        if not isinstance(values, dict) or (unknown := sorted(values.keys() - hints.keys())):
            found = unknown if isinstance(values, dict) else values
            raise ValueError(f"{where}: {found} unknown; there are {sorted(hints)}")
        return kind(**{name: from_dict(hints[name], v, where=f"{where}.{name}") for name, v in values.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(values, dict):
        return {key: from_dict(arguments[1], v, where=f"{where}.{key}") for key, v in values.items()}
    if origin is tuple and isinstance(values, list):
        return tuple(from_dict(arguments[0], v, where=where) for v in values)
    if origin in (Union, UnionType):
        if isinstance(values, dict) and (configs := [o for o in arguments if dataclasses.is_dataclass(o)]):
            # The class that knows most of the fields and has the fewest others: an error then names what is wrong.
            names = [{f.name for f in dataclasses.fields(o)} for o in configs]
            known = [(-len(values.keys() & n), len(n)) for n in names]
            return from_dict(configs[known.index(min(known))], values, where=where)
        for option in arguments:
            try:
                return from_dict(option, values, where=where)
            except ValueError:
                continue
    if origin is Literal and values in arguments:
        return values
    if kind is Path and isinstance(values, str):
        return Path(values)
    if kind is float and type(values) is int:
        return float(values)
    if origin is None and kind is not Path and type(values) is kind:
        return values
    raise ValueError(f"{where}: {values!r} is not {getattr(kind, '__name__', kind)}")
