"""Model FLOPs by formula, per sample and module, and the MFU that follows from them.

Only matrix products count, 2 per multiply-add. Events count at their given lengths, never capacity or padding; a window
counts the keys really in it, so that events near the ends of a sequence count less; what a switch skips counts 0, and
so does work done once per batch whatever its size (the query projection of the shared seeds), since its share of a
sample vanishes. Embedding look-ups are no products. Training is three times the forward pass, and recomputation does
not count.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from kunlun_jax.layers.features import event_inputs
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.schema import EventType, FeatureSchema, Scope

Lengths = float | Int[np.ndarray, "sequences"] | Float[np.ndarray, "sequences"] | Sequence[float]

TRAINING_FACTOR = 3  # forward, and twice that for the gradients of both operands of every product
PEAK_FLOPS = {"H100": 989e12}  # FLOP/s of dense bfloat16 products; the SXM card


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
    if set(lengths) != set(config.events):
        raise ValueError(f"lengths: given for {sorted(lengths)}, the config has event types {sorted(config.events)}")
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
        "set_tokens": sum(share[scope] * _set_tokens(config, schema, scope) for scope in share),
        "interaction": config.depth * _wukong(config, n + config.summary_tokens, n),
        "head": _mlp(n * config.width, *config.head_hidden, len(schema.tasks)),
    }
    for event in schema.events:
        of_type = np.atleast_1d(np.asarray(lengths[event.name], np.float64))
        if not of_type.size or not (of_type.min() >= 0 and of_type.max() <= event.max_length):
            raise ValueError(
                f"lengths {event.name!r}: need numbers in [0, {event.max_length}], got {of_type.size} numbers in "
                f"[{of_type.min(initial=np.inf)}, {of_type.max(initial=-np.inf)}]"
            )
        modules = _sequence_stack(config, schema, event, of_type)
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


def _set_tokens(config: KunlunConfig, schema: FeatureSchema, scope: Scope) -> float:
    dense = sum(field.scope == scope for field in schema.dense)
    widths = [schema.table(field.table).width for field in schema.sparse if field.scope == scope]
    mlp = _mlp(dense, 2 * config.width, config.dense_tokens * config.width) if dense else 0.0
    return mlp + sum(_mlp(width, config.width) for width in widths if width != config.width)


def _wukong(config: KunlunConfig, inputs: int, outputs: int) -> float:
    """One layer's experts: linear compression, residual projection, factorisation machine and its MLP."""
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
    inputs = event_inputs(schema, event)
    generation, pffn = _generation_and_pffn(config, schema, d)
    return {
        "event_tokens": mean * (_mlp(inputs, d, inputs) + _mlp(inputs, d, d)),
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
