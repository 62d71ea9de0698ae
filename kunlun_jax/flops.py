"""Model FLOPs by formula, per sample and module, and the MFU that follows from them.

Only matrix products count, 2 per multiply-add. Events count at their given lengths, never capacity or padding; a window
counts the keys really in it, so that events near the ends of a sequence count less; what a switch skips counts 0, and
so does work done once per batch whatever its size (the query projection of the shared seeds), since its share of a
sample vanishes. Embedding look-ups are no products. Training is three times the forward pass, and recomputation does
not count.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from kunlun_jax.layers.features import event_inputs, joined_fields, pooled_numbers
from kunlun_jax.model_configs import (
    DCNv2Config,
    DINConfig,
    EventConfig,
    InterFormerConfig,
    KunlunConfig,
    ModelConfig,
    WukongConfig,
)
from kunlun_jax.schema import EventType, FeatureSchema, Scope

Lengths = float | Int[np.ndarray, "sequences"] | Float[np.ndarray, "sequences"] | Sequence[float]

TRAINING_FACTOR = 3  # forward, and twice that for the gradients of both operands of every product
PEAK_FLOPS = {"H100": 989e12}  # FLOP/s of dense bfloat16 products; the SXM card


def model_flops(
    config: ModelConfig, schema: FeatureSchema, lengths: Mapping[str, Lengths], *, candidates: float = 1.0
) -> dict[str, float]:
    """Forward FLOPs of one sample of any model by module; the values add up to the model's.

    Every model's keys are "set_tokens", "interaction" and "head", and for each event type those of its sequence side,
    which begin with its name. Arguments and errors as in `kunlun_flops`; only Kunlun counts `candidates` above 1.
    """
    if isinstance(config, KunlunConfig):
        return kunlun_flops(config, schema, lengths, candidates=candidates)
    if candidates != 1:
        raise ValueError(
            f"candidates: only Kunlun's count knows shared requests, got {candidates} for {type(config).__name__}"
        )
    config.check(schema)
    of_types = _checked_lengths(lengths, schema)
    if isinstance(config, WukongConfig):
        counts = _wukong_model(config, schema)
    elif isinstance(config, InterFormerConfig):
        counts = _interformer(config, schema, of_types)
    elif isinstance(config, DINConfig):
        counts = _din(config, schema, of_types)
    else:
        counts = _dcnv2(config, schema)
    return {module: float(flops) for module, flops in counts.items()}


def scale_to(
    config: ModelConfig,
    schema: FeatureSchema,
    lengths: Mapping[str, Lengths],
    target: float,
    *,
    tolerance: float = 0.05,
) -> ModelConfig:
    """The size along the model's declared `recipe` whose forward FLOPs per sample are nearest to `target`.

    Raises:
      ValueError: no size comes within `tolerance`; the message names the nearest and both ends of the recipe.
    """
    if not target > 0:
        raise ValueError(f"target: must be positive, got {target}")
    sizes = [(total(model_flops(size, schema, lengths)), size) for size in _fitting(config, schema)]
    if not sizes:
        raise ValueError(f"{type(config).__name__}: no size of the recipe fits the schema; change experts or n_tokens")
    flops, nearest = min(sizes, key=lambda size: abs(np.log(size[0] / target)))
    if abs(flops / target - 1) > tolerance:
        low, high = (end(count for count, _ in sizes) for end in (min, max))
        raise ValueError(
            f"{type(config).__name__}: no size of the recipe has {target:.4g} FLOPs per sample within {tolerance:.0%}; "
            f"the nearest has {flops:.4g}, the recipe spans {low:.4g} to {high:.4g}. Change the target or the config "
            f"that the recipe starts from"
        )
    return nearest


def _fitting(config: ModelConfig, schema: FeatureSchema) -> Iterator[ModelConfig]:
    """The recipe's sizes that fit the schema: token counts may not divide over more experts."""
    for size in config.recipe():
        try:
            yield size.check(schema)
        except ValueError:
            continue


def kunlun_flops(
    config: KunlunConfig, schema: FeatureSchema, lengths: Mapping[str, Lengths], *, candidates: float = 1.0
) -> dict[str, float]:
    """Forward FLOPs of one sample by module; the values add up to the model's.

    Keys of the set side are "set_tokens", "interaction" and "head"; those of the sequence side begin with their event
    type: "click/event_tokens", "/weight_generation", "/pffn", "/seed_projections", "/seed_scores", "/compression",
    "/attention_projections", "/attention_scores". Layers are summed up. A module that no layer runs counts 0.

    Args:
      lengths: per event type the lengths of a data set's sequences, over which the mean is taken, or one number: every
        sequence then counts as that long, which for windows is not the mean over lengths that differ.
      candidates: samples per request. What belongs to the request, its set tokens and stored sequences, is computed
        once for all of them and counts by that share.

    Raises:
      ValueError: lengths miss an event type, name an unknown one, are empty, negative or above its maximum;
        fewer candidates than 1, or more where `weight_inputs="all"` ties stored sequences to one sample.
    """
    config.check(schema)
    of_types = _checked_lengths(lengths, schema)
    if candidates < 1:
        raise ValueError(f"candidates: must be at least 1 per request, got {candidates}")
    if candidates > 1 and schema.events and config.weight_inputs == "all":
        raise ValueError(
            f'candidates: {candidates} per request, but weight_inputs="all" gives every sample a sequence side of its '
            f'own; use weight_inputs="request" or candidates=1'
        )
    share: dict[Scope, float] = {"request": 1 / candidates, "candidate": 1.0}
    n = config.set_tokens(schema)
    counts = {
        "set_tokens": sum(
            share[scope] * _set_tokens(schema, config.width, config.dense_tokens, scope) for scope in share
        ),
        "interaction": config.depth * _wukong(config, n + config.summary_tokens, n),
        "head": _mlp(n * config.width, *config.head_hidden, len(schema.tasks)),
    }
    for event in schema.events:
        modules = _sequence_stack(config, schema, event, of_types[event.name])
        counts |= {f"{event.name}/{module}": share[event.scope] * flops for module, flops in modules.items()}
    return {module: float(flops) for module, flops in counts.items()}


def total(flops: Mapping[str, float]) -> float:
    """Forward FLOPs per sample of the whole model."""
    return sum(flops.values())


def training_flops(flops: Mapping[str, float]) -> float:
    """FLOPs per sample of a training step."""
    return TRAINING_FACTOR * total(flops)


def sequence_share(flops: Mapping[str, float]) -> float:
    """The share of the FLOPs spent on the sequence side, in [0, 1]."""
    return sum(value for module, value in flops.items() if "/" in module) / total(flops)


def mfu(samples_per_second: float, training_flops_per_sample: float, peak: float) -> float:
    """Model FLOPs utilisation: achieved model FLOP/s over the device's `peak` FLOP/s, of as many devices as ran.

    Raises:
      ValueError: an argument is not positive.
    """
    arguments = {
        "samples_per_second": samples_per_second, "training_flops_per_sample": training_flops_per_sample, "peak": peak
    }  # fmt: skip
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"mfu: {name} must be positive, got {value}")
    return samples_per_second * training_flops_per_sample / peak


def keys_in_window(lengths: Float[np.ndarray, "sequences"], window: int | None) -> Float[np.ndarray, "sequences"]:
    """Pairs of a query and a key at most `window` events apart in sequences of these lengths; None: all pairs."""
    reach = np.maximum(lengths - 1, 0)
    reach = reach if window is None else np.minimum(window, reach)
    return lengths * (2 * reach + 1) - reach * (reach + 1)


def _mlp(*widths: int) -> float:
    """FLOPs of a chain of linear maps per row."""
    return sum(2.0 * a * b for a, b in itertools.pairwise(widths))


def _checked_lengths(lengths: Mapping[str, Lengths], schema: FeatureSchema) -> dict[str, np.ndarray]:
    names = [event.name for event in schema.events]
    if set(lengths) != set(names):
        raise ValueError(f"lengths: given for {sorted(lengths)}, the schema has event types {sorted(names)}")
    of_types = {name: np.atleast_1d(np.asarray(lengths[name], np.float64)) for name in names}
    for event in schema.events:
        given = of_types[event.name]
        if not given.size or not (given.min() >= 0 and given.max() <= event.max_length):
            raise ValueError(
                f"lengths {event.name!r}: need numbers in [0, {event.max_length}], got {given.size} numbers in "
                f"[{given.min(initial=np.inf)}, {given.max(initial=-np.inf)}]"
            )
    return of_types


def _set_tokens(schema: FeatureSchema, d: int, dense_tokens: int, *scopes: Scope, joined=()) -> float:
    scopes = scopes or get_args(Scope)
    taken = {name for join in joined for name in join.fields}
    widths = [schema.table(f.table).width for f in schema.sparse if f.scope in scopes and f.name not in taken]
    dense = [sum(field.scope == scope for field in schema.dense) for scope in scopes]
    mlps = sum(_mlp(count, 2 * d, dense_tokens * d) for count in dense if count)
    joins = sum(_mlp(join.inputs, join.tokens * d) for join in joined if join.inputs != join.tokens * d)
    return mlps + joins + sum(_mlp(width, d) for width in widths if width != d)


def _pooled_events(schema: FeatureSchema, d: int) -> float:
    """Sequences as set features: sums over events are no products, so lengths don't matter."""
    count = 0.0
    for event in schema.events:
        widths = [schema.table(field.table).width for field in event.sparse]
        count += _mlp(pooled_numbers(event), 2 * d, d) + sum(_mlp(width, d) for width in widths if width != d)
    return count


def _event_tokens(schema: FeatureSchema, event: EventType, d: int) -> float:
    """One event's MaskNet."""
    inputs = event_inputs(schema, event)
    return _mlp(inputs, d, inputs) + _mlp(inputs, d, d)


def _wukong_model(config: WukongConfig, schema: FeatureSchema) -> dict[str, float]:
    joined = joined_fields(schema, config.field_embeddings, config.groups)
    d, outputs = config.width, config.factorised + config.compressed
    tokens = [config.tokens(schema)] + [outputs] * config.depth
    return {
        "set_tokens": _set_tokens(schema, d, config.dense_tokens, joined=joined) + _pooled_events(schema, d),
        "interaction": sum(_wukong_layer(config, n) for n in tokens[:-1]),
        "head": _mlp(tokens[-1] * d, *config.head_hidden, len(schema.tasks)),
    }


def _wukong_layer(config: WukongConfig, n: int) -> float:
    d, k = config.width, n if config.machine == "plain" else config.rank
    count = 2.0 * config.compressed * n * d
    if config.residual and n != config.factorised + config.compressed:
        count += 2.0 * (config.factorised + config.compressed) * n * d
    if not config.factorised:
        return count
    count += 2.0 * n * n * d if config.machine == "plain" else 2 * 2.0 * n * k * d
    if config.machine == "attentive":
        flat = config.attentive_tokens * d
        count += 2.0 * config.attentive_tokens * n * d + _mlp(flat, flat, n * k)
    return count + _mlp(n * k, *config.hidden, config.factorised * d)


def _interformer(config: InterFormerConfig, schema: FeatureSchema, lengths) -> dict[str, float]:
    """CLS tokens are part of a sequence and count; the head's summary of the set counts with the head."""
    n, d = config.set_tokens(schema), config.width
    events = schema.events if config.flow != "sole" else ()
    gate = _mlp(d, d, d) if config.gating else 0.0
    set_summary = d * _mlp(n, n, config.n_sum) + config.n_sum * gate
    told = config.summary_tokens * len(events)
    summaries = config.depth if config.generates else int(config.tells_sequences and config.cls)
    counts = {
        "set_tokens": _set_tokens(schema, d, config.dense_tokens),
        "interaction": config.depth * _interaction(config, n + told * config.tells_set, n) + summaries * set_summary,
        "head": set_summary + _mlp((config.n_sum + told) * d, *config.head_hidden, len(schema.tasks)),
    }
    for event in events:
        longer = lengths[event.name] + config.cls_tokens
        mean, pairs = longer.mean(), keys_in_window(longer, None).mean()
        pooled = mean * _mlp(d, 2 * d) + config.pma * (_mlp(d, d) + 2 * 2.0 * mean * d) if config.pma else 0.0
        summary = config.summary_tokens * gate + pooled
        ffn = 2 * 2.0 * config.n_sum * d if config.generates else _mlp(d, d)
        counts |= {
            f"{event.name}/event_tokens": lengths[event.name].mean() * _event_tokens(schema, event, d),
            f"{event.name}/summary": (1 + config.depth * config.tells_set) * summary,
            f"{event.name}/pffn": config.depth * mean * ffn,
            f"{event.name}/attention_projections": config.depth * mean * (_mlp(d, 3 * d) + _mlp(d, d)),
            f"{event.name}/attention_scores": config.depth * 2 * 2.0 * pairs * d,
        }
    return counts


def _interaction(config: InterFormerConfig, m: int, n: int) -> float:
    """InterFormer's ensemble on m tokens, and the way back to n."""
    d = config.width
    count = 2.0 * n * m * d + n * _mlp(d, config.hidden, d)
    if "dot" in config.interactions:
        count += 2.0 * m * m * d + _mlp(m * (m - 1) // 2, config.hidden, m * d)
    if "cross" in config.interactions:
        count += _cross(m * d, config.cross_depth, config.cross_rank)
    return count


def _cross(width: int, depth: int, rank: int) -> float:
    return depth * (_mlp(width, rank, width) if rank else _mlp(width, width))


def _din(config: DINConfig, schema: FeatureSchema, lengths) -> dict[str, float]:
    d, tokens = config.width, config.set_tokens(schema) + len(schema.events)
    counts = {
        "set_tokens": _set_tokens(schema, d, config.dense_tokens),
        "interaction": 0.0,
        "head": _mlp(tokens * d, *config.hidden, len(schema.tasks)),
    }
    for event in schema.events:
        mean, inputs = lengths[event.name].mean(), 4 * config.matched_width(schema, event) + d
        counts |= {
            f"{event.name}/event_tokens": mean * _event_tokens(schema, event, d),
            f"{event.name}/target_attention": mean * _mlp(inputs, *config.attention_hidden, 1),
        }
    return counts


def _dcnv2(config: DCNv2Config, schema: FeatureSchema) -> dict[str, float]:
    d, inputs = config.width, config.tokens(schema) * config.width
    return {
        "set_tokens": _set_tokens(schema, d, config.dense_tokens) + _pooled_events(schema, d),
        "interaction": _cross(inputs, config.cross_depth, config.cross_rank) + _mlp(inputs, *config.hidden),
        "head": _mlp(inputs + config.hidden[-1], len(schema.tasks)),
    }


def _wukong(config: KunlunConfig, inputs: int, outputs: int) -> float:
    """One layer's experts: linear compression, residual projection, factorisation machine X (XᵀY) and its MLP.

    As the paper writes them: the layer makes one product of the first two, and of few tokens X Xᵀ first.
    """
    n = inputs // config.experts if config.expert_inputs == "sliced" else inputs
    m = outputs // config.experts
    n_f = (m + 1) // 2
    token_maps = 2.0 * (m - n_f + m) * n * config.width
    machine = 2 * 2.0 * n * config.width * config.interaction_rank
    return config.experts * (
        token_maps + machine + _mlp(n * config.interaction_rank, config.interaction_hidden, n_f * config.width)
    )


def _sequence_stack(config: KunlunConfig, schema: FeatureSchema, event: EventType, lengths) -> dict[str, float]:
    """One stored sequence's FLOPs by module, over the layers of its event type, mean over `lengths`."""
    size = config.events[event.name]
    mean, pairs = lengths.mean(), keys_in_window(lengths, size.window).mean()
    pffns = sum(config.runs_pffn(layer) for layer in range(size.depth))
    attentions = sum(config.runs_attention(layer, size) for layer in range(size.depth))
    d = size.width
    seeds = size.n_seeds if config.pooling == "hsp" else size.n_tokens
    generation, pffn = _generation_and_pffn(config, schema, d)
    return {
        "event_tokens": mean * _event_tokens(schema, event, d),
        "weight_generation": pffns * generation,
        "pffn": pffns * mean * pffn,
        "seed_projections": pffns * (mean * _mlp(d, 2 * d) + seeds * _mlp(d, d)),
        "seed_scores": pffns * 2 * 2.0 * seeds * mean * d,
        "compression": pffns * _compression(config, size),
        "attention_projections": attentions * mean * (_mlp(d, 3 * d) + _mlp(d, d)),
        "attention_scores": attentions * 2 * 2.0 * pairs * d,
    }


def _generation_and_pffn(config: KunlunConfig, schema: FeatureSchema, d: int) -> tuple[float, float]:
    """One layer's weight generation per sequence, and its PFFN per event."""
    n = config.set_tokens(schema, "request") if config.weight_inputs == "request" else config.set_tokens(schema)
    f = config.generated
    summary = 2.0 * f * n * config.width + f * _mlp(config.width, d, d)
    if config.pffn == "gdpa":
        return summary + f * _mlp(d, 2 * d), 2 * 2.0 * f * d
    return summary + 2.0 * f * d * d, _mlp(d, d)


def _compression(config: KunlunConfig, size: EventConfig) -> float:
    """From seeds to tokens, and from the event type's width to the model's."""
    seeds, tokens, d = size.n_seeds, size.n_tokens, size.width
    project = tokens * _mlp(d, config.width)
    if config.pooling == "pma":
        return project
    if config.compression == "dense":
        return project + _mlp(seeds * d, tokens * d)
    return project + config.kron_rank * (2.0 * seeds * tokens * d + tokens * _mlp(d, d))
