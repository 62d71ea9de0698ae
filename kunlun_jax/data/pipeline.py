"""Batches in a deterministic order and with a restorable position, prepared in threads: a thin layer over grain.

grain moves numbers of batches, not samples: shuffling is one permutation per epoch and `Samples.batch` gathers whole
batches, so the cost per sample is that of NumPy. Copying releases no lock that Python holds for long; one thread is
enough to overlap the host's work with the device's.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from kunlun_jax.batch import Batch, check_batch
from kunlun_jax.data.samples import FILLER, Samples
from kunlun_jax.jagged import CAPACITY_FRACTIONS


class IndexBatches:
    """Random access to the sample indices [B] of every batch of a run, the last of each epoch ended with FILLER."""

    def __init__(self, samples: int, *, batch_size: int, epochs: int, shuffle: bool, seed: int):
        self._samples, self._batch_size, self._epochs, self._shuffle = samples, batch_size, epochs, shuffle
        self._seed = seed
        self.batches_per_epoch = -(-samples // batch_size)
        # Threads may stand on both sides of an epoch's end.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self._epochs * self.batches_per_epoch

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(int(index), self.batches_per_epoch)
        first = place * self._batch_size
        indices = self._order(epoch)[first : first + self._batch_size]
        return np.pad(indices, (0, self._batch_size - len(indices)), constant_values=FILLER)

    def _draw_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._samples)
        return np.random.default_rng((self._seed, epoch)).permutation(self._samples)


def loader(
    samples: Samples,
    *,
    batch_size: int,
    shards: int = 1,
    own: Sequence[int] | None = None,
    epochs: int = 1,
    shuffle: bool,
    seed: int = 0,
    capacity_fractions: Sequence[float] = CAPACITY_FRACTIONS,
    threads: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator[Batch]:
    """An iterator over checked batches of constant size, with `get_state` and `set_state` for its position.

    No sample is dropped: the last batch of an epoch is filled up with samples of weight 0. The order depends on
    `seed`, the epoch and the number of samples alone; a saved position counts batches, so it means the same only under
    the same settings.

    Args:
      batch_size: samples per batch, over all shards.
      own: the shards that this process feeds; None is all. Every process counts whole batches, so positions agree.
      shuffle: a new order for each epoch; False keeps the order of the samples, for streams.
      capacity_fractions: shares of the full number of events per batch for which programs are compiled.
      threads: threads that prepare batches ahead.
      prefetch: batches prepared ahead, at least one per thread.

    Raises:
      ValueError: a setting is out of range, or `batch_size` is no multiple of `shards`.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("shards", shards, 1),
        ("epochs", epochs, 1),
        ("seed", seed, 0),
        ("threads", threads, 1),
        ("prefetch", prefetch, threads),
    ):
        if value < least:
            raise ValueError(f"loader: {name} is {value}; need at least {least}")
    if batch_size % shards:
        raise ValueError(f"loader: batch_size {batch_size} is no multiple of {shards} shards")
    indices = IndexBatches(len(samples), batch_size=batch_size, epochs=epochs, shuffle=shuffle, seed=seed)
    return iter(
        grain.MapDataset.source(indices)
        .map(
            lambda index: check_batch(
                samples.batch(index, shards=shards, own=own, capacity_fractions=capacity_fractions),
                samples.schema,
                whole=own is None,
            )
        )
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )


class Placed:
    """Iterates over (batch, `place(batch)`), placed by a thread that stays up to `ahead` batches in front.

    The next batches are copied to the device while a step runs. An error is raised at its batch's place. Nothing is
    read before the first batch is asked for. Whoever stops before the end calls `close`, which lets go of what lies
    ahead.

    `get_state` gives the position behind the batch returned last, where `batches` know theirs.
    """

    def __init__(self, batches: Iterator[Batch], place: Callable[[Batch], Any], *, ahead: int = 2):
        self._batches, self._place = batches, place
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._position: Any = None

    def __iter__(self) -> "Placed":
        return self

    def __next__(self) -> tuple[Batch, Any]:
        if self._stop.is_set():
            raise StopIteration
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        batch, placed, position, error = self._ready.get()
        if error is not None:
            self._put((None, None, None, error))  # and so from now on
            raise error
        self._position = position
        return batch, placed

    def get_state(self) -> Any:
        return _position(self._batches) if self._thread is None else self._position

    def close(self) -> None:
        self._stop.set()
        self._ready = queue.Queue()

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            for batch in self._batches:
                self._put((batch, self._place(batch), _position(self._batches), None))
                if self._stop.is_set():
                    return
            self._put((None, None, None, StopIteration()))
        except BaseException as error:
            self._put((None, None, None, error))


def _position(batches) -> Any:
    return batches.get_state() if hasattr(batches, "get_state") else None
