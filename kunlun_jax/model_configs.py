"""The models' configurations: frozen dataclasses that refuse numbers which don't fit together."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

from kunlun_jax.layers.features import joined_fields, pooled_tokens
from kunlun_jax.layers.rotary import TimeSource
from kunlun_jax.layers.seed_pooling import Compression
from kunlun_jax.layers.wukong import ExpertInputs
from kunlun_jax.schema import EventType, FeatureSchema, Scope, SparseField

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
        _hidden(self, "head_hidden")
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

    @classmethod
    def gflops_6(cls) -> "KunlunConfig":
        """6 GFLOPs per sample forward on `SyntheticConfig.gflops_6`; clicks get the deepest stack, the fewer
        conversions the widest. Heads 64 wide cost more time per FLOP than heads 128 wide, but they divide 320."""
        clicked = EventConfig(width=320, head_width=64, depth=3, n_seeds=128, n_tokens=32, window=100)
        converted = dataclasses.replace(clicked, width=512, head_width=128, depth=1, n_tokens=16)
        return cls._production(clicked, converted, width=256, generated=256, experts=4, interaction_hidden=512)

    @classmethod
    def gflops_60(cls) -> "KunlunConfig":
        """60 GFLOPs per sample forward on `SyntheticConfig.gflops_60`; clicks get the widest stack, the
        fewer conversions the deepest."""
        clicked = EventConfig(width=1024, head_width=128, depth=5, n_seeds=256, n_tokens=32, window=100)
        converted = dataclasses.replace(clicked, width=384, depth=7, n_tokens=16)
        return cls._production(clicked, converted, width=512, generated=256, experts=4, interaction_hidden=256)

    @classmethod
    def gflops_180(cls) -> "KunlunConfig":
        """180 GFLOPs per sample forward on `SyntheticConfig.gflops_180`; clicks get the deepest stack."""
        clicked = EventConfig(width=1024, head_width=128, depth=9, n_seeds=256, n_tokens=64, window=100)
        converted = dataclasses.replace(clicked, depth=7, n_tokens=32)
        return cls._production(clicked, converted, width=1024, generated=512, experts=8, interaction_hidden=256)

    @classmethod
    def _production(cls, clicked: EventConfig, converted: EventConfig, *, width: int, **sizes) -> "KunlunConfig":
        """Products in bfloat16, and views as in the paper's example of a personalised stack: half the model's width,
        half the clicks' tokens and window, two thirds of their layers without one that would have nothing to do; their
        heads are those of the conversions. Every expert gets a multiple of 16 tokens: products are slower along an axis
        that isn't one of 8."""
        layers = 2 * clicked.depth // 3
        viewed = dataclasses.replace(
            clicked,
            width=width // 2,
            head_width=converted.head_width,
            depth=layers - (layers % 2 == 0),
            n_tokens=clicked.n_tokens // 2,
            window=50,
        )
        events = {"clicked": clicked, "converted": converted, "viewed": viewed}
        depth = max(event.depth for event in events.values())
        return cls(events=events, width=width, depth=depth, head_hidden=(256,), dtype="bfloat16", **sizes)

    def recipe(self) -> Iterator["KunlunConfig"]:
        """Ours [choice]: depth up to 5, odd ones, since CompSkip leaves even ones a dead layer; then d and each d_e at
        fixed D; then F and the seeds; then experts."""

        def sized(depth, wider, factor, experts):
            events = {
                name: dataclasses.replace(
                    e, depth=depth, width=e.width + wider * e.head_width, n_seeds=round(factor * e.n_seeds)
                )
                for name, e in self.events.items()
            }
            step = max((e.head_width for e in self.events.values()), default=16)
            return dataclasses.replace(
                self,
                depth=depth,
                events=events,
                width=self.width + wider * step,
                generated=round(factor * self.generated),
                experts=experts,
            )

        for depth in (1, 3, 5):
            yield sized(depth, 0, 1.0, self.experts)
        for wider in range(1, 9):
            yield sized(5, wider, 1.0, self.experts)
        for factor in (1.5, 2.0, 3.0, 4.0):
            yield sized(5, 8, factor, self.experts)
        for experts in (2 * self.experts, 4 * self.experts):
            yield sized(5, 8, 4.0, experts)

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


@dataclass(frozen=True)
class WukongConfig:
    """Wukong's sizes and switches (arXiv 2403.02545).

    Attributes:
      width: d, the one width of all tokens.
      depth: l, the number of layers.
      factorised, compressed: n_F and n_L, the tokens made by the factorisation machine and by linear compression; 0
        leaves that half out, for ablations.
      machine: "optimised" with a learned Y, "attentive" with Y made per sample, "plain" X Xᵀ.
      rank: k, the columns of Y.
      attentive_tokens: tokens that the attentive machine makes Y from.
      hidden: hidden widths of the MLP behind the machine.
      residual: whether a layer's input is added to its output, for ablations.
      dense_tokens: set tokens made of the dense features of a scope; the paper has one.
      field_embeddings: important fields and how many tokens each owns.
      field_groups: unimportant fields that share one token, each group as names joined by "+".
      head_hidden: hidden widths of the task head's MLP.
      dtype: of the products; parameters, norms and tables are float32.
    """

    width: int = 32
    depth: int = 2
    factorised: int = 8
    compressed: int = 8
    machine: Literal["optimised", "attentive", "plain"] = "optimised"
    rank: int = 8
    attentive_tokens: int = 4
    hidden: tuple[int, ...] = (128,)
    residual: bool = True
    dense_tokens: int = 1
    field_embeddings: dict[str, int] = field(default_factory=dict)
    field_groups: tuple[str, ...] = ()
    head_hidden: tuple[int, ...] = (128,)
    dtype: Dtype = "float32"

    def __post_init__(self):
        at_least_one(self, "width", "depth", "rank", "attentive_tokens", "dense_tokens")
        one_of(self)
        _hidden(self, "hidden", "head_hidden")
        if min(self.factorised, self.compressed) < 0 or self.factorised + self.compressed < 1:
            raise ValueError(
                f"factorised {self.factorised} and compressed {self.compressed}: neither may be negative, nor both be 0"
            )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(group.split("+")) for group in self.field_groups)

    def check(self, schema: FeatureSchema) -> "WukongConfig":
        """Check the fields against the schema; return self."""
        joined_fields(schema, self.field_embeddings, self.groups)
        return self

    def tokens(self, schema: FeatureSchema) -> int:
        """n of layer 0: set tokens, then the pooled sequences'."""
        joined = joined_fields(schema, self.field_embeddings, self.groups)
        sparse = len(schema.sparse) + sum(join.tokens - len(join.fields) for join in joined)
        return sparse + self.dense_tokens * len({f.scope for f in schema.dense}) + pooled_tokens(schema)

    @classmethod
    def tiny(cls, schema: FeatureSchema) -> "WukongConfig":
        return cls(width=32, depth=2, factorised=4, compressed=4, rank=4, hidden=(32,), head_hidden=(32,))

    @classmethod
    def movielens(cls) -> "WukongConfig":
        """MovieLens-100K on two CPU cores."""
        return cls()

    @classmethod
    def gflops_6(cls) -> "WukongConfig":
        """As many FLOPs as `KunlunConfig.gflops_6`, in 1.8 billion parameters: its products meet one row per sample, so
        FLOPs are parameters here, and ten times as many would fill several cards."""
        return cls(
            width=768, depth=8, factorised=256, compressed=256, rank=64, hidden=(960,), head_hidden=(256,),
            dtype="bfloat16",
        )  # fmt: skip

    def recipe(self) -> Iterator["WukongConfig"]:
        """The paper's: first l up to 4, then n_F, n_L, k and the MLP together."""
        for depth in range(1, 5):
            yield dataclasses.replace(self, depth=depth)
        for factor in _growth():
            yield dataclasses.replace(
                self,
                depth=4,
                factorised=round(factor * self.factorised),
                compressed=round(factor * self.compressed),
                rank=round(factor * self.rank),
                hidden=_scaled(self.hidden, factor),
            )


@dataclass(frozen=True)
class InterFormerConfig:
    """InterFormer's sizes and switches (arXiv 2411.09852).

    Attributes:
      width: d of set tokens and events.
      head_width: D; there are d / D heads.
      depth: the number of layers.
      n_sum: tokens of X_sum, which are the CLS tokens too.
      cls: whether X_sum is prepended to the sequences and read back as S_CLS.
      pma, recent: further tokens of a sequence's summary, 0 for none.
      gating: whether summaries are gated.
      flow: which side informs the other: "int" both, "n2s" the set side the sequences, "s2n" the reverse, "sep" neither
        before the head; "sole" is the set side alone, without sequences [choice].
      pffn: "generated" per sample from X_sum, or "shared" by all samples, which it is anyway without n2s.
      interactions: the ensemble of the interaction.
      hidden: width of the interaction's MLPs.
      cross_depth, cross_rank: layers and rank of the cross network.
      dense_tokens: set tokens made of the dense features of a scope.
      head_hidden: hidden widths of the task head's MLP.
      dtype: of the products; parameters, norms and tables are float32.
      implementation: of the sequence operators; None takes the fastest that supports the call.
    """

    width: int = 32
    head_width: int = 16
    depth: int = 2
    n_sum: int = 4
    cls: bool = True
    pma: int = 2
    recent: int = 2
    gating: bool = True
    flow: Literal["int", "n2s", "s2n", "sep", "sole"] = "int"
    pffn: Literal["generated", "shared"] = "generated"
    interactions: tuple[Literal["dot", "cross"], ...] = ("dot", "cross")
    hidden: int = 64
    cross_depth: int = 2
    cross_rank: int = 16
    dense_tokens: int = 1
    head_hidden: tuple[int, ...] = (128,)
    dtype: Dtype = "float32"
    implementation: str | None = None

    def __post_init__(self):
        at_least_one(
            self, "width", "head_width", "depth", "n_sum", "hidden", "cross_depth", "cross_rank", "dense_tokens"
        )
        one_of(self)
        _hidden(self, "head_hidden")
        if self.width % self.head_width or self.head_width % 2:
            raise ValueError(f"width {self.width} must divide into heads of an even head_width, got {self.head_width}")
        if min(self.pma, self.recent) < 0 or not self.summary_tokens:
            raise ValueError(
                f"cls {self.cls}, pma {self.pma} and recent {self.recent} leave {self.summary_tokens} summary tokens; "
                f"none may be negative and at least one is needed"
            )
        if self.tells_sequences and not self.cls and self.pffn == "shared":
            raise ValueError(
                f'flow {self.flow!r} lets the set side inform the sequences, but cls is off and pffn is "shared"; turn '
                f'one on, or use flow "s2n" or "sep"'
            )
        if unknown := sorted(set(self.interactions) - {"dot", "cross"}):
            raise ValueError(f"interactions: {unknown} unknown; choose from ['cross', 'dot']")

    @property
    def tells_sequences(self) -> bool:
        return self.flow in ("int", "n2s")

    @property
    def tells_set(self) -> bool:
        return self.flow in ("int", "s2n")

    @property
    def generates(self) -> bool:
        """Whether every sample has a PFFN of its own."""
        return self.tells_sequences and self.pffn == "generated"

    @property
    def cls_tokens(self) -> int:
        return self.n_sum if self.cls else 0

    @property
    def summary_tokens(self) -> int:
        """Tokens of one sequence's summary."""
        return self.cls_tokens + self.pma + self.recent

    def check(self, schema: FeatureSchema) -> "InterFormerConfig":
        """Check the flow against the schema; return self.

        Raises:
          ValueError: the schema has no event types while `flow` wants sequences.
        """
        if not schema.events and self.flow != "sole":
            raise ValueError(f'events: the schema has none, InterFormer needs them in flow {self.flow!r}; use "sole"')
        return self

    def set_tokens(self, schema: FeatureSchema) -> int:
        return len(schema.sparse) + self.dense_tokens * len({f.scope for f in schema.dense})

    @classmethod
    def tiny(cls, schema: FeatureSchema) -> "InterFormerConfig":
        return cls(width=16, head_width=8, hidden=32, cross_rank=8, head_hidden=(32,))

    @classmethod
    def movielens(cls) -> "InterFormerConfig":
        """MovieLens-100K on two CPU cores; narrow, as full attention takes what Kunlun spends on width."""
        return cls(width=16, head_width=8, depth=3)

    @classmethod
    def gflops_6(cls) -> "InterFormerConfig":
        """As many FLOPs as `KunlunConfig.gflops_6`; narrow, since full attention takes most of them."""
        return cls._production(width=128, head_width=64, depth=3, hidden=512, cross_rank=128)

    @classmethod
    def gflops_60(cls) -> "InterFormerConfig":
        """As many FLOPs as `KunlunConfig.gflops_60`."""
        return cls._production(width=512, head_width=128, depth=4, hidden=256, cross_rank=64)

    @classmethod
    def gflops_180(cls) -> "InterFormerConfig":
        """As many FLOPs as `KunlunConfig.gflops_180`, within 5 %."""
        return cls._production(width=960, head_width=64, depth=4, hidden=256, cross_rank=64)

    @classmethod
    def _production(cls, **sizes) -> "InterFormerConfig":
        return cls(n_sum=32, head_hidden=(256,), dtype="bfloat16", **sizes)

    def recipe(self) -> Iterator["InterFormerConfig"]:
        """Ours [choice]: depth up to 3, then d and heads together with the MLPs, whose width closes the gaps."""
        first = self.width // self.head_width
        for depth, heads in [(1, first), (2, first), *((3, heads) for heads in range(first, 65))]:
            for factor in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0):
                share = factor * heads / first
                yield dataclasses.replace(
                    self,
                    depth=depth,
                    width=heads * self.head_width,
                    hidden=round(share * self.hidden),
                    cross_rank=round(share * self.cross_rank),
                )


@dataclass(frozen=True)
class DINConfig:
    """DIN's sizes (arXiv 1706.06978).

    Attributes:
      width: d of set tokens and events.
      attention_hidden: hidden widths of the activation unit.
      hidden: hidden widths of the MLP behind the pooling.
      dense_tokens: set tokens made of the dense features of a scope.
      dtype: of the products; parameters, norms and tables are float32.
    """

    width: int = 32
    attention_hidden: tuple[int, ...] = (40,)
    hidden: tuple[int, ...] = (200, 80)
    dense_tokens: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self):
        at_least_one(self, "width", "dense_tokens")
        one_of(self)
        _hidden(self, "attention_hidden", "hidden")

    def check(self, schema: FeatureSchema) -> "DINConfig":
        """Check that there is a history to attend to; return self.

        Raises:
          ValueError: the schema has no event types, or one shares no table with the set features.
        """
        if not schema.events:
            raise ValueError("events: the schema has none, and DIN needs sequences to attend to")
        for event in schema.events:
            if not matched_fields(schema, event):
                raise ValueError(
                    f"events {event.name!r}: none of its fields shares a table with a set feature, DIN has no target; "
                    f"let a candidate's field use one of the tables {sorted({f.table for f in event.sparse})}"
                )
        return self

    def set_tokens(self, schema: FeatureSchema) -> int:
        return len(schema.sparse) + self.dense_tokens * len({f.scope for f in schema.dense})

    def matched_width(self, schema: FeatureSchema, event: EventType) -> int:
        return sum(schema.table(own.table).width for own, _ in matched_fields(schema, event))

    @classmethod
    def tiny(cls, schema: FeatureSchema) -> "DINConfig":
        return cls(attention_hidden=(16,), hidden=(32, 16))

    @classmethod
    def movielens(cls) -> "DINConfig":
        """MovieLens-100K on two CPU cores."""
        return cls()

    def recipe(self) -> Iterator["DINConfig"]:
        """Ours [choice]: all hidden widths together."""
        for factor in _growth(0.125):
            yield dataclasses.replace(
                self, attention_hidden=_scaled(self.attention_hidden, factor), hidden=_scaled(self.hidden, factor)
            )


@dataclass(frozen=True)
class DCNv2Config:
    """DCNv2's sizes (arXiv 2008.13535), cross network and MLP side by side.

    Attributes:
      width: d of each token before they are flattened.
      cross_depth, cross_rank: layers of the cross network and the rank of their weights; rank 0 keeps them whole.
      hidden: widths of the deep network, all activated.
      dense_tokens: set tokens made of the dense features of a scope.
      dtype: of the products; parameters, norms and tables are float32.
    """

    width: int = 32
    cross_depth: int = 3
    cross_rank: int = 32
    hidden: tuple[int, ...] = (256, 128)
    dense_tokens: int = 1
    dtype: Dtype = "float32"

    def __post_init__(self):
        at_least_one(self, "width", "cross_depth", "dense_tokens")
        one_of(self)
        _hidden(self, "hidden")
        if self.cross_rank < 0:
            raise ValueError(f"cross_rank: must not be negative, got {self.cross_rank}; 0 keeps the weights whole")
        if not self.hidden:
            raise ValueError("hidden: the deep network needs at least one width, got ()")

    def check(self, schema: FeatureSchema) -> "DCNv2Config":
        """Nothing of the schema can fail; return self."""
        return self

    def tokens(self, schema: FeatureSchema) -> int:
        sets = len(schema.sparse) + self.dense_tokens * len({f.scope for f in schema.dense})
        return sets + pooled_tokens(schema)

    @classmethod
    def tiny(cls, schema: FeatureSchema) -> "DCNv2Config":
        return cls(cross_depth=2, cross_rank=8, hidden=(32, 16))

    @classmethod
    def movielens(cls) -> "DCNv2Config":
        """MovieLens-100K on two CPU cores."""
        return cls()

    def recipe(self) -> Iterator["DCNv2Config"]:
        """Ours [choice]: the cross network's rank and the deep network's widths together."""
        for factor in _growth(0.125):
            yield dataclasses.replace(
                self, cross_rank=round(factor * self.cross_rank), hidden=_scaled(self.hidden, factor)
            )


ModelConfig = KunlunConfig | WukongConfig | InterFormerConfig | DINConfig | DCNv2Config


def matched_fields(schema: FeatureSchema, event: EventType) -> list[tuple[SparseField, SparseField]]:
    """An event's fields whose table a set feature uses too, each with that feature, the candidate's by preference."""
    pairs = []
    for own in event.sparse:
        theirs = [f for f in schema.sparse if f.table == own.table]
        theirs.sort(key=lambda f: (f.scope != "candidate", f.name != own.name))
        if theirs:
            pairs.append((own, theirs[0]))
    return pairs


def _growth(start: float = 1.125) -> Iterator[float]:
    """Factors that grow by an eighth of their last power of two, up to 64."""
    factor = start
    while factor < 64:
        yield factor
        factor += 2 ** np.floor(np.log2(factor)) / 8


def _scaled(widths: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(max(1, round(factor * width)) for width in widths)


def _hidden(config, *names: str) -> None:
    for name in names:
        if min(getattr(config, name), default=1) < 1:
            raise ValueError(f"{name}: every width must be at least 1, got {getattr(config, name)}")
