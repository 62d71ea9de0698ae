"""The models' configurations: frozen dataclasses that refuse numbers which don't fit together."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from kunlun_jax.layers.rotary import TimeSource
from kunlun_jax.layers.seed_pooling import Compression
from kunlun_jax.layers.wukong import ExpertInputs
from kunlun_jax.schema import FeatureSchema, Scope

Activation = Literal["identity", "relu", "relu2", "leaky_relu", "gelu", "gelu_tanh", "silu", "hardswish"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class EventConfig:
    """One event type's own sequence stack: event-level personalisation.

    Attributes:
      width: d_e.
      head_width: D; there are d_e / D heads.
      depth: L_e, the sequence layers; past them the last summary stays in use.
      n_seeds: learnable queries of the seed pooling; the paper asks for more seeds than tokens.
      n_tokens: tokens that summarise the sequence.
      window: w, the self-attention reaches w events to both sides; None is full attention.
    """

    width: int = 64
    head_width: int = 32
    depth: int = 3
    n_seeds: int = 32
    n_tokens: int = 8
    window: int | None = 32

    def __post_init__(self):
        at_least_one(self, "width", "head_width", "depth", "n_seeds", "n_tokens")
        if self.width % self.head_width or self.head_width % 2:
            raise ValueError(
                f"events: width {self.width} must divide into heads of an even head_width, got {self.head_width}"
            )
        if self.window is not None and self.window < 0:
            raise ValueError(
                f"events: window is {self.window}; give a number of events ≥ 0, or none for full attention"
            )


@dataclass(frozen=True)
class KunlunConfig:
    """Kunlun's sizes and switches. Every field that the paper leaves open has our default [choice].

    Attributes:
      width: d of the set side.
      depth: L, the number of layers.
      events: one entry per event type of the schema.
      generated: F, the generated keys per sample, which is the hidden width of the personalised FFN.
      activation: of the GDPA, one name or one per head.
      tau: what GDPA scores are divided by: the event type's "maxlen" as in the paper, or "one" as in Meta's kernels.
      weight_inputs: which set features feed the weight generation. "request" leaves the candidate out, so that all
        candidates of a request share the sequence side; "all" makes the sequence side look for the candidate.
      dense_tokens: set tokens made of the dense features of a scope.
      experts, expert_inputs: the mixture of Wukong experts and whether tokens are dealt over them.
      interaction_rank, interaction_hidden: k and the MLP width of each expert's factorisation machine.
      kron_rank: k of SumKronLinear.
      head_hidden: hidden widths of the task head's MLP.
      rotary_time: the time that enters the rotary angles.
      comp_skip: even layers run GDPA-PFFN and seed pooling, odd layers only the self-attention.
      pffn, pooling, compression: the blocks that ablations exchange.
      dtype: of the products; parameters, norms and tables are float32.
      implementation: of the sequence operators; None takes the fastest that supports the call.
    """

    events: dict[str, EventConfig] = field(default_factory=dict)
    width: int = 64
    depth: int = 3
    generated: int = 32
    activation: Activation | tuple[Activation, ...] = "gelu_tanh"
    tau: Literal["maxlen", "one"] = "maxlen"
    weight_inputs: Literal["all", "request"] = "all"
    dense_tokens: int = 1
    experts: int = 2
    expert_inputs: ExpertInputs = "sliced"
    interaction_rank: int = 8
    interaction_hidden: int = 128
    kron_rank: int = 8
    head_hidden: tuple[int, ...] = (128,)
    rotary_time: TimeSource = "gap"
    comp_skip: bool = True
    pffn: Literal["gdpa", "naive"] = "gdpa"
    pooling: Literal["hsp", "pma"] = "hsp"
    compression: Compression = "sum_kron"
    dtype: Dtype = "float32"
    implementation: str | None = None

    def __post_init__(self):
        at_least_one(
            self,
            "width",
            "depth",
            "generated",
            "dense_tokens",
            "experts",
            "interaction_rank",
            "interaction_hidden",
            "kron_rank",
        )
        one_of(self)
        if min(self.head_hidden, default=1) < 1:
            raise ValueError(f"head_hidden: every width must be at least 1, got {self.head_hidden}")
        for name, event in self.events.items():
            heads = event.width // event.head_width
            if isinstance(self.activation, tuple) and len(self.activation) != heads:
                raise ValueError(f"activation: {len(self.activation)} names for the {heads} heads of events {name!r}")
            if event.depth > self.depth:
                raise ValueError(f"events {name!r}: depth {event.depth} exceeds the model's depth {self.depth}")
            if self.pooling == "hsp" and event.n_seeds <= event.n_tokens:
                raise ValueError(
                    f"events {name!r}: n_seeds {event.n_seeds} must exceed n_tokens {event.n_tokens} (over-complete)"
                )

    def check(self, schema: FeatureSchema) -> "KunlunConfig":
        """Check the sizes against the schema; return self.

        Raises:
          ValueError: the event types differ by name, or tokens don't divide over the experts.
        """
        wanted, given = {e.name for e in schema.events}, set(self.events)
        if wanted != given:
            raise ValueError(f"events: the schema has {sorted(wanted)}, the config configures {sorted(given)}")
        if self.weight_inputs == "request" and not self.set_tokens(schema, "request"):
            raise ValueError('weight_inputs: "request" needs request-scope fields, and the schema has none')
        n = self.set_tokens(schema)
        for what, tokens in (("set tokens", n), ("set and summary tokens", n + self.summary_tokens)):
            if self.expert_inputs == "sliced" and tokens % self.experts:
                raise ValueError(
                    f"experts: {tokens} {what} don't divide over {self.experts} experts; change experts, dense_tokens "
                    f"({self.dense_tokens}) or the event types' n_tokens"
                )
        return self

    def set_tokens(self, schema: FeatureSchema, *scopes: Scope) -> int:
        """n: one token per sparse field, `dense_tokens` for the dense fields of each scope."""
        scopes = scopes or get_args(Scope)
        sparse = sum(f.scope in scopes for f in schema.sparse)
        return sparse + self.dense_tokens * len({f.scope for f in schema.dense if f.scope in scopes})

    @property
    def summary_tokens(self) -> int:
        return sum(event.n_tokens for event in self.events.values())

    def runs_pffn(self, layer: int) -> bool:
        """Whether layer `layer` runs GDPA-PFFN and seed pooling; the others reuse the cached summary."""
        return not self.comp_skip or layer % 2 == 0

    def runs_attention(self, layer: int, event: EventConfig) -> bool:
        """Whether the layer runs this event type's self-attention.

        Seed pooling taps before the attention, so the attention of a stack's last layer would feed nothing: it is
        left out, and under CompSkip a stack of even depth ends in a layer that does nothing at all.
        """
        return (not self.comp_skip or layer % 2 == 1) and layer + 1 < event.depth

    def dead_layers(self) -> list[str]:
        """Event types whose last layer has nothing to compute, so that the user can be told."""
        return [name for name, e in self.events.items() if self.comp_skip and e.depth % 2 == 0]

    @classmethod
    def tiny(cls, schema: FeatureSchema) -> "KunlunConfig":
        """For tests: every mechanism at the smallest size."""
        event = EventConfig(width=32, head_width=16, depth=3, n_seeds=8, n_tokens=4, window=8)
        n = len(schema.sparse)
        return cls(
            events={e.name: event for e in schema.events},
            width=32,
            depth=3,
            generated=16,
            dense_tokens=2 - n % 2 if schema.dense else 1,
            interaction_rank=4,
            interaction_hidden=32,
            kron_rank=2,
            head_hidden=(32,),
        )

    @classmethod
    def movielens(cls) -> "KunlunConfig":
        """MovieLens-100K on two CPU cores; sizes chosen on the validation part."""
        event = EventConfig(width=32, head_width=16, depth=3, n_seeds=16, n_tokens=4, window=32)
        return cls(events={"liked": event, "disliked": event}, width=32, generated=16, tau="one")

    def uniform_events(self) -> "KunlunConfig":
        """Ablation of event-level personalisation: every event type gets the largest size in use."""
        if not self.events:
            return self
        sizes = list(self.events.values())
        windows = [e.window for e in sizes]
        largest = EventConfig(
            **{
                f.name: max(getattr(e, f.name) for e in sizes)
                for f in dataclasses.fields(EventConfig)
                if f.name != "window"
            },
            window=None if None in windows else max(w for w in windows if w is not None),
        )
        return dataclasses.replace(self, events=dict.fromkeys(self.events, largest))


def at_least_one(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(config, name)}")


def one_of(config) -> None:
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name}: {getattr(config, name)!r} is unknown; choose from {get_args(hint)}")
