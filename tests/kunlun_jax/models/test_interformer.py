"""InterFormer by hand and against float64: gating, PFFN, summaries, CLS tokens, and who informs whom."""

import dataclasses
from unittest import mock

import jax.numpy as jnp
import numpy as np
import plain
import pytest
from batches import random_embedded, random_sequence, small_schema
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.model_configs import InterFormerConfig
from kunlun_jax.models.interformer import (
    Gating,
    GeneratedFFN,
    Interaction,
    InterFormer,
    SequenceSummary,
    SetSummary,
    SharedFFN,
)

SCHEMA = small_schema(scope="candidate", max_length=5)
CONFIG = InterFormerConfig(
    width=4, head_width=2, depth=2, n_sum=2, pma=1, recent=2, hidden=5, cross_rank=3, head_hidden=(),
    implementation="reference",
)  # fmt: skip
LENGTHS = [3, 0, 1, 4]
RNG = np.random.default_rng(0)


def made(kind, *arguments):
    return plain.build(lambda: kind(*arguments, rngs=nnx.Rngs(0)), np.random.default_rng(1))


def gated(module, x):
    return x / (1 + np.exp(-plain.mlp(module.mlp, x)))


def test_gating_by_hand():
    module = Gating(1, dtype="float32", rngs=nnx.Rngs(0))
    first, last = module.mlp.layers
    for layer, weight, bias in ((first, 2.0, 1.0), (last, 3.0, -1.0)):
        layer.kernel[...], layer.bias[...] = jnp.full((1, 1), weight), jnp.full(1, bias)
    hidden = 2 * 0.5 + 1  # SiLU(2) = 2 σ(2)
    score = 3 * hidden / (1 + np.exp(-hidden)) - 1
    np.testing.assert_allclose(plain.run(module, np.array([[[0.5]]])), [[[0.5 / (1 + np.exp(-score))]]], rtol=1e-5)


def test_generated_pffn_is_its_definition():
    """S + LN(S) X_sumᵀ W, the [d, d] matrix of each sample written out."""
    module = made(GeneratedFFN, CONFIG)
    sequence, x_sum = random_sequence(RNG, LENGTHS, 4), RNG.normal(size=(4, 2, 4))
    out = unpack(plain.run(module, sequence, x_sum))
    for b, s in enumerate(unpack(sequence)):
        generated = x_sum[b].T @ plain.array(module.weight)
        np.testing.assert_allclose(out[b], s + plain.layer_norm(module.norm, s) @ generated, rtol=1e-3, atol=1e-4)


def test_shared_pffn_is_one_matrix():
    module, sequence = made(SharedFFN, CONFIG), random_sequence(RNG, LENGTHS, 4)
    out = unpack(module(sequence, None))
    for b, s in enumerate(unpack(sequence)):
        expected = s + plain.layer_norm(module.norm, s) @ plain.array(module.linear.kernel)
        np.testing.assert_allclose(out[b], expected, rtol=1e-3, atol=1e-4)


def test_set_summary_mixes_tokens_then_gates():
    module, x = made(SetSummary, CONFIG, 6), RNG.normal(size=(3, 6, 4))
    mixed = plain.mlp(module.mix, x.transpose(0, 2, 1)).transpose(0, 2, 1)
    np.testing.assert_allclose(plain.run(module, x), gated(module.gate, mixed), rtol=1e-3, atol=1e-4)


def test_sequence_summary_takes_cls_pma_and_the_latest_events():
    """Two CLS tokens come first; a sample with fewer than two events has zeros in their places."""
    module = made(SequenceSummary, CONFIG)
    sequence = random_sequence(RNG, [n + 2 for n in LENGTHS], 4)
    out = np.asarray(module(sequence))
    for b, s in enumerate(unpack(sequence)):
        pma = module.pma
        k, v = np.split(s @ plain.array(pma.key_value.kernel), 2, axis=-1)
        q = plain.layer_norm(pma.norm, plain.array(pma.seeds)) @ plain.array(pma.query.kernel)
        pooled = plain.attention(q, k, v, 2) @ plain.array(pma.output.kernel)
        recent = np.concatenate([np.zeros((2, 4)), s[2:]])[-2:]
        expected = gated(module.gate, np.concatenate([s[:2], pooled, recent]))
        np.testing.assert_allclose(out[b], expected, rtol=1e-3, atol=1e-4)


def test_interaction_is_an_ensemble_of_dot_products_and_cross_network():
    module, z = made(Interaction, CONFIG, 5, 3), RNG.normal(size=(2, 5, 4))
    out = np.asarray(plain.run(module, z))
    for b, tokens in enumerate(z):
        rows, columns = np.triu_indices(5, k=1)
        pairs = (tokens @ tokens.T)[rows, columns] / 2
        ensemble = tokens + plain.mlp(module.dot, pairs).reshape(5, 4)
        first = x = tokens.reshape(-1)
        for down, up in zip(module.cross.down, module.cross.up, strict=True):
            x = first * plain.linear(up, plain.linear(down, x)) + x
        normed = plain.layer_norm(module.norm, ensemble + x.reshape(5, 4))
        expected = plain.mlp(module.mlp, plain.array(module.tokens) @ normed)
        np.testing.assert_allclose(out[b], expected, rtol=5e-3, atol=5e-3)


def spied(config, batch):
    """The model's logits, the set summaries and the sequence summaries with what they were made of, in order."""
    sets, sequences = [], []
    of_set, of_sequence = SetSummary.__call__, SequenceSummary.__call__

    def note_set(self, x):
        sets.append(of_set(self, x))
        return sets[-1]

    def note_sequence(self, sequence):
        sequences.append((sequence, of_sequence(self, sequence)))
        return sequences[-1][1]

    model = plain.build(lambda: InterFormer(config, SCHEMA, rngs=nnx.Rngs(0)), np.random.default_rng(2))
    with (
        mock.patch.object(SetSummary, "__call__", note_set),
        mock.patch.object(SequenceSummary, "__call__", note_sequence),
    ):
        model(batch)
    return sets, sequences


def test_cls_tokens_are_added_once_and_are_the_first_set_summary():
    batch = random_embedded(SCHEMA, np.random.default_rng(0), lengths=LENGTHS)
    sets, sequences = spied(dataclasses.replace(CONFIG, depth=3), batch)
    assert len(sets) == 4  # one per layer and the head's
    assert len(sequences) == 4 * 2
    for sequence, _ in sequences:
        np.testing.assert_array_equal(sequence.lengths[0], np.array(LENGTHS) + 2)
    for sequence, _ in sequences[:2]:  # before layer 1 has changed anything
        for b, tokens in enumerate(unpack(sequence)):
            np.testing.assert_allclose(tokens[:2], sets[0][b], rtol=1e-6)


@pytest.mark.parametrize(
    ("flow", "set_reaches_sequence", "sequence_reaches_set"),
    [("int", True, True), ("n2s", True, False), ("s2n", False, True), ("sep", False, False), ("sole", None, False)],
)
def test_information_flows_as_the_switch_says(flow, set_reaches_sequence, sequence_reaches_set):
    batch = random_embedded(SCHEMA, np.random.default_rng(0), lengths=LENGTHS)
    config = dataclasses.replace(CONFIG, flow=flow, depth=1)
    model = plain.build(lambda: InterFormer(config, SCHEMA, rngs=nnx.Rngs(0)), np.random.default_rng(2))

    def summaries(price, seconds):
        dense = {**batch.dense, "price": price}
        view = batch.events["view"].with_values({**batch.events["view"].values, "seconds": seconds})
        changed = dataclasses.replace(batch, dense=dense, events={**batch.events, "view": view})
        last = {}
        of_set, of_sequence = SetSummary.__call__, SequenceSummary.__call__

        def note(name, function):
            def call(self, x):
                last[name] = function(self, x)
                return last[name]

            return call

        with (
            mock.patch.object(SetSummary, "__call__", note("set", of_set)),
            mock.patch.object(SequenceSummary, "__call__", note("sequence", of_sequence)),
        ):
            model(changed)
        return last["set"], last.get("sequence")

    def moves(before, after):
        return None if before is None else bool(jnp.abs(before - after).max() > 1e-6)

    price, seconds = batch.dense["price"], batch.events["view"].values["seconds"]
    before = summaries(price, seconds)
    assert moves(before[1], summaries(price + 1, seconds)[1]) == set_reaches_sequence
    assert moves(before[0], summaries(price, seconds + 1)[0]) == sequence_reaches_set


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flow": "both"}, "^flow: 'both' is unknown; choose from"),
        ({"pffn": "naive"}, "^pffn: 'naive' is unknown"),
        ({"interactions": ("dot", "fm")}, r"interactions: \['fm'\] unknown"),
        ({"cls": False, "pma": 0, "recent": 0}, "leave 0 summary tokens"),
        ({"recent": -1}, "recent -1"),
        ({"cls": False, "pffn": "shared"}, "flow 'int' lets the set side inform the sequences, but cls is off"),
        ({"width": 6, "head_width": 4}, "width 6 must divide into heads of an even head_width, got 4"),
        ({"n_sum": 0}, "^n_sum: must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
