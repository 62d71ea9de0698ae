"""Clicks drawn from a known model: planted effects, known probabilities, hence a known best possible NE.

The logit of a sample is

    bias + price_weight · price + brand[b] + mean of tag[...] over the candidate's tags     (main effects)
    + set_set · A[segment, category]                                                        (set × set)
    + set_sequence · (1 if the category occurs among the clicked events, else -1)           (set × sequence)
    + decay · (2 tanh(Σ over viewed events of the category of 2^(-age / half_life)) - 1)    (time decay)

so the last two terms need the history, and the last one needs its times. Conversions, where there are any, and noise
fields have no effect: they are there to be ignored, and to give the stream a production model's shape. Every input of
the logit survives binding: brands without a row of their own share one effect, as they share the out-of-vocabulary row,
and the user, whose id is hashed, has none. What a perfect model could reach is therefore reachable.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kunlun_jax.data.samples import Events, Samples
from kunlun_jax.jagged import span_index
from kunlun_jax.schema import HOST_PADDING_ID, DenseField, EventType, FeatureSchema, SparseField, Table

START = 1_700_000_000  # seconds; far beyond what float32 resolves, as real times are
FAVOURITES = 3  # categories that the events of one sample come from


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and strengths. Ages and `half_life` in seconds, lengths in events.

    Attributes:
      fill: mean length over `max_length`; lengths spread over all of [0, max_length] unless it is 1.
      known_brands: brands with a row of their own, out of `brands`.
      user_rows: rows that `users` ids are hashed onto.
      conversions: max_length of a third event type "converted"; 0 leaves it out.
      set_noise: sparse set fields without effect, each with `noise_rows` rows of its own in one table.
      event_noise: sparse fields without effect of every event, which share a table of `item_rows` rows.
      item_width: columns of the item table, which events' noise fields share; None is `width`.
      event_numbers: dense fields of every event; 0 is the dwell time of clicks alone, which has no effect either.
      mean_gap: between successive events, and between the last one and the request.
      set_set, set_sequence, decay: strengths in logits of the three planted effects.

    Raises:
      ValueError: a size is not positive, or numbers don't fit together.
    """

    train: int = 8_000
    validation: int = 1_000
    test: int = 1_000
    seed: int = 0
    max_length: int = 50
    fill: float = 0.5
    segments: int = 6
    categories: int = 10
    brands: int = 40
    known_brands: int = 20
    tags: int = 15
    max_tags: int = 3
    users: int = 1_000_000
    user_rows: int = 1_000
    conversions: int = 0
    set_noise: int = 0
    noise_rows: int = 1_000
    event_noise: int = 0
    item_rows: int = 10_000
    item_width: int | None = None
    event_numbers: int = 0
    mean_gap: float = 3_600.0
    half_life: float = 14_400.0
    bias: float = -0.5
    price_weight: float = 0.5
    main: float = 0.3
    set_set: float = 1.0
    set_sequence: float = 1.0
    decay: float = 1.0
    width: int = 8

    def __post_init__(self):
        for name in ("train", "validation", "test", "max_length", "segments", "categories", "brands", "known_brands",
                     "tags", "max_tags", "users", "user_rows", "noise_rows", "item_rows", "width"):  # fmt: skip
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"SyntheticConfig: {name} is {value}; need at least 1")
        if self.item_width is not None and self.item_width < 1:
            raise ValueError(f"SyntheticConfig: item_width is {self.item_width}; need at least 1, or None")
        for name in ("seed", "conversions", "set_noise", "event_noise", "event_numbers"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"SyntheticConfig: {name} is {value}; need at least 0")
        if not 0 < self.fill <= 1:
            raise ValueError(f"SyntheticConfig: fill is {self.fill}; need 0 < fill ≤ 1")
        for name in ("mean_gap", "half_life"):
            if not 0 < (value := getattr(self, name)) < np.inf:
                raise ValueError(f"SyntheticConfig: {name} is {value}; need a positive number of seconds")
        for name in ("bias", "price_weight", "main", "set_set", "set_sequence", "decay"):
            if not np.isfinite(value := getattr(self, name)):
                raise ValueError(f"SyntheticConfig: {name} is {value}; need a finite number of logits")
        if self.known_brands > self.brands:
            raise ValueError(f"SyntheticConfig: known_brands {self.known_brands} exceeds brands {self.brands}")
        if self.max_tags > self.tags:
            raise ValueError(f"SyntheticConfig: max_tags {self.max_tags} exceeds tags {self.tags}")

    @classmethod
    def gflops_6(cls, **changes: Any) -> "SyntheticConfig":
        """The stream of the model presets of that size: 128 set tokens, 1000, 250 and 1000 events at most."""
        return cls._production(set_tokens=128, conversions=250, **changes)

    @classmethod
    def gflops_60(cls, **changes: Any) -> "SyntheticConfig":
        """256 set tokens, 1000, 500 and 1000 events at most."""
        return cls._production(set_tokens=256, conversions=500, **changes)

    gflops_180 = gflops_60  # the same stream, a larger model

    @classmethod
    def _production(cls, *, set_tokens: int, **changes: Any) -> "SyntheticConfig":
        # Six tokens are the fields with an effect. 64 + 2 × 60 embedding columns, 5 numbers, 2 times and a recency make
        # 192 inputs per event, a multiple of 64, for the kernel of the events' MLPs.
        sizes = dict(max_length=1000, set_noise=set_tokens - 6, event_noise=2, event_numbers=5, width=64, item_width=60)
        rows = dict(user_rows=100_000, noise_rows=10_000, item_rows=1_000_000)
        return cls(**{**sizes, **rows, **changes})

    @property
    def max_lengths(self) -> dict[str, int]:
        """Of the event types, by name."""
        lengths = {"clicked": self.max_length, "converted": self.conversions, "viewed": self.max_length}
        return {name: length for name, length in lengths.items() if length}

    def numbers(self, event: str) -> list[str]:
        """Names of an event type's dense fields."""
        first = ["dwell"] if event == "clicked" else ["number_0"][: self.event_numbers]
        return first + [f"number_{i}" for i in range(1, self.event_numbers)]


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Generated data; the dictionaries are keyed by "train", "validation" and "test".

    Attributes:
      logits: the true logit of every sample.
      best_ne: the expected NE of the true probabilities: the mean entropy of the part's labels over the entropy of the
        training part's observed click rate. A finite part scatters around it.
      effects: the drawn weights: "brand" [known_brands + 1], "tag" [tags], "segment_category" [segments, categories].
    """

    samples: dict[str, Samples]
    logits: dict[str, Float[np.ndarray, "n"]]
    best_ne: dict[str, float]
    effects: dict[str, np.ndarray]


def generate(config: SyntheticConfig = SyntheticConfig()) -> Synthetic:
    """Draw all parts; the same config gives the same data.

    Raises:
      ValueError: the training part is so small that all of its labels agree.
    """
    root, *of_parts = np.random.SeedSequence(config.seed).spawn(4)
    rng = np.random.default_rng(root)
    effects = {
        "brand": config.main * rng.standard_normal(config.known_brands + 1),
        "tag": config.main * rng.standard_normal(config.tags),
        "segment_category": rng.standard_normal((config.segments, config.categories)),
    }
    schema = make_schema(config)
    samples, logits = {}, {}
    sizes = {"train": config.train, "validation": config.validation, "test": config.test}
    for (part, size), entropy in zip(sizes.items(), of_parts, strict=True):
        samples[part], logits[part] = _draw(config, schema, effects, size, np.random.default_rng(entropy))
    rate = samples["train"].base_rates()["click"]
    if rate in (0, 1):
        raise ValueError(f"generate: all {config.train} training labels are {rate:.0f}, so NE is undefined; draw more")
    base = _entropy(np.log(rate / (1 - rate)))
    best = {part: float(_entropy(values).mean() / base) for part, values in logits.items()}
    return Synthetic(samples, logits, best, effects)


def make_schema(config: SyntheticConfig) -> FeatureSchema:
    rows = {
        "user": config.user_rows, "segment": config.segments, "category": config.categories,
        "brand": config.known_brands + 1, "tag": config.tags,
        "noise": config.set_noise * config.noise_rows, "item": config.item_rows * bool(config.event_noise),
    }  # fmt: skip
    widths = {"item": config.item_width or config.width}
    of_events = (
        SparseField("category", "category"), *(SparseField(f"noise_{i}", "item") for i in range(config.event_noise))
    )  # fmt: skip
    return FeatureSchema(
        tables=tuple(Table(name, count, widths.get(name, config.width)) for name, count in rows.items() if count),
        dense=(DenseField("price", scope="candidate"),),
        sparse=(
            SparseField("user", "user", out_of_range="hash"),
            SparseField("segment", "segment"),
            SparseField("category", "category", scope="candidate"),
            SparseField("brand", "brand", scope="candidate", out_of_range="out_of_vocabulary"),
            SparseField("tags", "tag", scope="candidate", max_ids=config.max_tags),
            *(SparseField(f"noise_{i}", "noise") for i in range(config.set_noise)),
        ),
        events=tuple(
            EventType(name, length, sparse=of_events, dense=tuple(map(DenseField, config.numbers(name))))
            for name, length in config.max_lengths.items()
        ),
        tasks=("click",),
        group="user",
    )


def _draw(config, schema, effects, size: int, rng: np.random.Generator) -> tuple[Samples, np.ndarray]:
    segment = rng.integers(config.segments, size=size)
    brand = rng.integers(config.brands, size=size)
    price = rng.standard_normal(size)
    request_time = START + rng.integers(30 * 86_400, size=size)
    # The first max_tags of a random order of the tags, some struck out, never the first.
    tags = np.argsort(rng.random((size, config.tags)), axis=1)[:, : config.max_tags]
    tags[:, 1:][rng.random((size, config.max_tags - 1)) < 0.5] = HOST_PADDING_ID

    favourites = {name: rng.integers(config.categories, size=(size, FAVOURITES)) for name in ("clicked", "viewed")}
    # Candidates that resemble the history half of the time, so that both outcomes of a match are common.
    pool = np.concatenate([favourites["clicked"], favourites["viewed"]], axis=1)
    pool = np.concatenate([pool, rng.integers(config.categories, size=pool.shape)], axis=1)
    category = pool[np.arange(size), rng.integers(pool.shape[1], size=size)]

    events, ages, owners = {}, {}, {}
    for name, choices in favourites.items():
        drawn = _draw_events(config, config.max_length, choices, request_time, rng)
        events[name], ages[name], owners[name] = drawn
    matches = {name: e.columns["category"] == category[owners[name]] for name, e in events.items()}
    clicked = np.bincount(owners["clicked"], matches["clicked"], size) > 0
    recent = np.bincount(owners["viewed"], matches["viewed"] * np.exp2(-ages["viewed"] / config.half_life), size)

    real = tags != HOST_PADDING_ID
    logits = (
        config.bias
        + config.price_weight * price
        + effects["brand"][np.minimum(brand, config.known_brands)]
        + (effects["tag"][tags] * real).sum(axis=1) / real.sum(axis=1)
        + config.set_set * effects["segment_category"][segment, category]
        + config.set_sequence * np.where(clicked, 1, -1)
        + config.decay * (2 * np.tanh(recent) - 1)
    )
    dwell = rng.exponential(size=len(ages["clicked"]))
    events["clicked"] = replace(events["clicked"], columns={**events["clicked"].columns, "dwell": dwell})
    if config.conversions:
        choices = rng.integers(config.categories, size=(size, FAVOURITES))
        events["converted"], *_ = _draw_events(config, config.conversions, choices, request_time, rng)
    events = {name: _with_noise(config, name, e, rng) for name, e in events.items()}
    noise = rng.integers(config.noise_rows, size=(config.set_noise, size))
    samples = Samples.bind(
        schema,
        dense={"price": price},
        sparse={
            "user": rng.integers(config.users, size=size),
            "segment": segment,
            "category": category,
            "brand": brand,
            "tags": tags,
            **{f"noise_{i}": ids + i * config.noise_rows for i, ids in enumerate(noise)},
        },
        events=events,
        request_time=request_time,
        labels=rng.random(size) < 1 / (1 + np.exp(-logits)),
    )
    return samples, logits


def _draw_events(
    config: SyntheticConfig,
    max_length: int,
    choices: Int[np.ndarray, "n favourites"],
    request_time: Int[np.ndarray, "n"],
    rng,
) -> tuple[Events, np.ndarray, np.ndarray]:
    """Events of one type, their ages in seconds, and the sample that each belongs to."""
    size = len(choices)
    share = np.ones(size) if config.fill == 1 else rng.beta(2 * config.fill, 2 - 2 * config.fill, size)
    lengths = np.rint(share * max_length).astype(np.int64)
    stop = np.cumsum(lengths)
    start = stop - lengths
    owner = np.repeat(np.arange(size), lengths)
    # The gap after each event; an event's age is the sum of its own gap and of all later ones.
    gap = 1 + rng.exponential(config.mean_gap, len(owner)).astype(np.int64)
    until = np.concatenate([[0], np.cumsum(gap)])
    age = until[stop][owner] - until[span_index(start, lengths)]
    category = choices[owner, rng.integers(FAVOURITES, size=len(owner))]
    return Events({"category": category}, request_time[owner] - age, start, stop), age, owner


def _with_noise(config: SyntheticConfig, name: str, events: Events, rng) -> Events:
    columns, count = dict(events.columns), len(events.time)
    columns |= {f"noise_{i}": rng.integers(config.item_rows, size=count) for i in range(config.event_noise)}
    missing = [number for number in config.numbers(name) if number not in columns]
    columns |= {number: rng.standard_normal(count, np.float32) for number in missing}
    return replace(events, columns=columns)


def _entropy(logits):
    """The entropy in nats of a label with these logits."""
    return np.logaddexp(0, logits) - logits / (1 + np.exp(-logits))
