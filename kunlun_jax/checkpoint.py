"""Checkpoints: what a run needs to go on, with the schema and the configuration it was made under.

A checkpoint holds the training state (any tree of arrays: parameters, optimiser state, tables, random keys), the
position in the data, the schema, a configuration and a few facts of the caller's choice. The arrays are stored by path
("tables/item/rows"), each whole and independent of where it lay, and are restored wherever the target says, so that
another device or mesh may read them. Several processes write their parts side by side, into one directory that all see.

Writing goes through orbax: in the background, into a temporary directory that gets its final name when all is written.
So an interrupted save leaves nothing under the name of a step, and a damaged step was damaged later.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from kunlun_jax import processes
from kunlun_jax.schema import FeatureSchema

_STATE, _DESCRIPTION = "state", "description"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that orbax has not finished writing
_ARGS = ocp.args


class CheckpointError(Exception):
    """A checkpoint could not be written, or is damaged. The message names directory and step and says what to do."""


class Description(NamedTuple):
    """All of a checkpoint but its arrays."""

    step: int
    schema: FeatureSchema
    config: dict[str, Any]
    data_states: list[Any]  # per process
    meta: dict[str, Any]
    arrays: dict[str, list]  # per path [shape, dtype]


class Restored(NamedTuple):
    step: int
    state: PyTree
    data_state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, `directory`/step, of which the last `keep` remain.

    Use it as a context manager, or call `close`, so that the last save ends and its errors are seen.

    Raises:
      ValueError: `keep` is below 1, or `config` is not JSON.
      NotADirectoryError: `directory` is a file.
    """

    def __init__(
        self, directory: str | Path, *, schema: FeatureSchema, config: Mapping[str, Any] | None = None, keep: int = 2
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must remain")
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"checkpoint directory {self.directory} is a file; name another")
        self._schema = schema
        self._config = _as_json("config", dict(config or {}))
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not processes.failed_exchange(error):  # to close waits for the others
            self.close()

    def steps(self) -> list[int]:
        """All steps on disk, ascending, damaged ones too. A save still under way is not among them."""
        return _steps(self.directory)

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, data_state: Any = None, *, meta: Mapping[str, Any] | None = None) -> None:
        """Save in the background. `state` may be donated to the next step as soon as this returns.

        Args:
          state: a tree of arrays (random keys too).
          data_state: JSON, or an iterator whose `get_state` gives it. It is read before this returns. Each process
            gives its own.
          meta: JSON facts to find again, a metric for instance.

        Raises:
          ValueError: a checkpoint of this or a later step exists; an entry is not JSON; a leaf is no array or has a
            dtype that JAX would not give back.
          CheckpointError: this save, or the one before it, could not be written.
          jax.errors.JaxRuntimeError, ValueError: not the disk but a device failed, or another process ended in the
            midst of it (`processes.failed_exchange`).
        """
        self.wait()
        if (latest := self.latest_step()) is not None and step <= latest:
            raise ValueError(
                f"step {step} can't be saved: {self.directory} already holds step {latest}. Resume from that, delete "
                f"{self.directory / str(latest)}, or use another directory"
            )
        if hasattr(data_state, "get_state"):
            data_state = data_state.get_state()
        arrays = {path: _plain(path, leaf) for path, leaf in _by_path(state).items()}
        description = {
            "schema": json.loads(self._schema.to_json()),
            "config": self._config,
            "data_states": processes.gather(_as_json("data_state", data_state)),
            "meta": _as_json("meta", dict(meta or {})),
            "arrays": {path: _facts(x) for path, x in arrays.items()},
        }
        args = {_STATE: _ARGS.StandardSave(arrays), _DESCRIPTION: _ARGS.JsonSave(description)}
        self._remove_unfinished()
        self._saving = step
        with self._written():
            # force: which steps to save is the caller's decision; orbax may silently skip one otherwise.
            self._manager.save(step, args=_ARGS.Composite(**args), force=True)

    def wait(self) -> None:
        """Wait for a save under way.

        Raises:
          CheckpointError: it could not be written.
          jax.errors.JaxRuntimeError, ValueError: as `save`.
        """
        with self._written():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._saving = None

    def close(self) -> None:
        """`wait`, then release the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, target_state: PyTree, step: int | None = None) -> Restored:
        """Restore a step, the latest unless given. A damaged latest step is an error and not passed over.

        Args:
          target_state: a tree like the one saved, of arrays or of jax.ShapeDtypeStruct. An entry with a sharding is
            restored there, one without on the first device. Entries "tables/<name>/..." may be padded to other lengths
            than the saved ones, beyond the table's own rows.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: its schema differs, its arrays don't fit the target (each is named), or it holds the positions of
            another number of processes, which differ.
          CheckpointError: it is damaged.
        """
        self.wait()
        found = describe(self.directory, step)
        where = f"checkpoint {self.directory / str(found.step)}"
        self._schema.check_same(found.schema, what=where)
        wanted = {path: _target(x) for path, x in _by_path(target_state).items()}
        rows = {f"tables/{table.name}/": table.rows for table in self._schema.tables}
        _check_fits(found.arrays, wanted, where, rows)
        data_state = _own_state(found.data_states, where)
        try:
            # Not strict: what fits may differ in the padding of tables, which is then cut off or filled with zeros.
            args = _ARGS.Composite(**{_STATE: _ARGS.StandardRestore(wanted, strict=False)})
            arrays = self._manager.restore(found.step, args=args)[_STATE]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the device's fault, not the file's
        except Exception as error:
            raise _damaged(self.directory, found.step, _STATE, error) from error
        leaves = [_as_target(arrays[path], x) for path, x in _by_path(target_state).items()]
        state = jax.tree.unflatten(jax.tree.structure(target_state), leaves)
        return Restored(found.step, state, data_state, found.meta)

    def _remove_unfinished(self) -> None:
        """What killed or failed saves have left takes up room that the next one may need."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"*{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Tell what stops a save: the disk's errors as ours, a device's and those of other processes as they are."""
        try:
            yield
        except Exception as error:  # whatever its threads raise, orbax passes on
            if isinstance(error, jax.errors.JaxRuntimeError) or processes.failed_exchange(error):
                raise
            step, self._saving = self._saving, None
            self._remove_unfinished()
            raise CheckpointError(
                f"step {step} could not be saved in {self.directory}: {_reason(error)}. Earlier checkpoints are "
                f"intact: {self.steps() or 'none'}. Make room or name another directory, then resume"
            ) from error


def describe(directory: str | Path, step: int | None = None) -> Description:
    """A checkpoint's schema, configuration and facts, without its arrays: what is needed to build the restore target.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointError: it is damaged.
    """
    directory = Path(directory).absolute()
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; there are {steps}")
    try:
        raw = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(directory / str(step) / _DESCRIPTION)
        schema = FeatureSchema.from_json(json.dumps(raw["schema"]))
        return Description(step, schema, raw["config"], raw["data_states"], raw["meta"], raw["arrays"])
    except Exception as error:
        raise _damaged(directory, step, _DESCRIPTION, error) from error


def _steps(directory: Path) -> list[int]:
    """orbax's temporary directories have other names."""
    if not directory.is_dir():
        return []
    return sorted(int(x.name) for x in directory.iterdir() if x.is_dir() and x.name.isdecimal())


def _by_path(tree: PyTree) -> dict[str, Any]:
    entries = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in entries}
    if len(found) != len(entries):
        raise ValueError("two leaves of the state have the same path; keys must not contain '/'")
    return found


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(path: str, leaf: Any) -> jax.Array | np.ndarray:
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(f"state {path!r} is of type {type(leaf).__name__}; make it an array")
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(f"state {path!r} is {leaf.dtype}, which JAX would cut; convert it, or store it in `meta`")
    return leaf


def _target(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if _is_key(x):
        x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _as_target(array: jax.Array, target: Any) -> jax.Array:
    if not _is_key(target):
        return array
    kind = []  # of a key's ShapeDtypeStruct, which key_impl itself does not take
    jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(target.shape, target.dtype))
    return jax.random.wrap_key_data(array, impl=kind[0])


def _facts(x: Any) -> list:
    return [list(x.shape), str(x.dtype)]


def _check_fits(
    stored: Mapping[str, list],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    where: str,
    table_rows: Mapping[str, int],
) -> None:
    problems = [f"{path}: not in the checkpoint" for path in sorted(wanted.keys() - stored.keys())]
    problems += [f"{path}: only in the checkpoint" for path in sorted(stored.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & stored.keys()):
        (there, there_dtype), (here, here_dtype) = stored[path], _facts(wanted[path])
        rows = next((n for prefix, n in table_rows.items() if path.startswith(prefix)), None)
        both = there[:1] + here[:1]
        padded = rows is not None and both and min(both) >= rows and there[1:] == here[1:]
        if there_dtype != here_dtype or (there != here and not padded):
            problems.append(f"{path}: {there_dtype} {there} in the checkpoint, {here_dtype} {here} wanted")
    if problems:
        raise ValueError(f"{where} does not fit the state to restore:\n  " + "\n  ".join(problems))


def _own_state(states: list[Any], where: str) -> Any:
    """This process's position in the data; where all agree, that of any number of processes."""
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    if any(state != states[0] for state in states):
        raise ValueError(
            f"{where} holds the positions of {len(states)} processes in the data, which differ; it can't be continued "
            f"by {jax.process_count()}. Use {len(states)} processes"
        )
    return states[0]


def _as_json(what: str, value: Any) -> Any:
    """A copy, so that nobody changes it while it is being written."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be JSON to be stored in a checkpoint: {error}") from error


def _damaged(directory: Path, step: int, item: str, error: Exception) -> CheckpointError:
    earlier = [s for s in _steps(directory) if s != step and _readable(directory, s)]
    advice = f"Delete it to resume from step {earlier[-1]}, or restore that by number" if earlier else "Start afresh"
    return CheckpointError(
        f"checkpoint {directory / str(step)} is damaged: its {item} can't be read ({_reason(error)}). "
        f"Other checkpoints: {earlier or 'none'}. {advice}"
    )


def _readable(directory: Path, step: int) -> bool:
    parts = (directory / str(step) / _STATE / "manifest.ocdbt", directory / str(step) / _DESCRIPTION / "metadata")
    return all(p.is_file() and p.stat().st_size for p in parts)


def _reason(error: BaseException) -> str:
    """The innermost cause, where the operating system's own words are; its middle left out if long."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return text if len(text) < 400 else f"{text[:100]} … {text[-280:]}"
