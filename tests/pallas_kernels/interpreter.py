"""Run the Hopper kernels on a CPU: interpret mode with race detection, and lowering for sm_90. Test-only.

JAX 0.11.2's Mosaic GPU interpreter lacks what attention kernels need: wgmma with its first operand in registers,
predicates and additions of TMA copies, stores into an accumulator; and it takes addresses that TMA doesn't. `install`
adds all that to private JAX names; a new JAX version may need another patch or none. Races, which JAX only prints, are
errors from the import of this module on.

What interpret mode can't show: wgmma runs synchronously there, what it reads takes no part in the search for races, and
the two views of a row buffer are one.
"""

import functools
import inspect
import textwrap

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, race_detection_state
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import types as state_types
from jax.experimental.mosaic.gpu import utils as mosaic_utils

RACES = plgpu.InterpretGPUParams(detect_races=True)


class _Races(race_detection_state.GPURaceDetectionState):
    """Raises what JAX only notes."""

    @property
    def races_found(self):
        return False

    @races_found.setter
    def races_found(self, found):
        if found:
            raise RuntimeError("a race between threads of the kernel; it is printed above")


gpu_callbacks.GPURaceDetectionState = _Races


def lower_for_hopper(f, *shapes) -> str:
    """The lowered text of jit(f) for sm_90 with operands of these shapes; raises what Mosaic GPU refuses."""
    original, mosaic_utils._infer_arch = mosaic_utils._infer_arch, lambda: (9, 0)
    try:
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    finally:
        mosaic_utils._infer_arch = original


def _indices(transforms):
    return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))


class _Buffers:
    """Reads and writes the interpreter's memory for one operation of one thread."""

    def __init__(self, mesh_location, thread, source_info):
        self.shared = gpu_callbacks._get_shared_memory()
        self.thread = thread
        self.log = memory.GPULoggingInfo(mesh_location, thread, source_info)

    def locate(self, key, transforms=()):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        return key, self.shared.access(key, _indices(transforms))

    def read(self, key, access):
        return self.shared.get_buffer_content(key, access, self.thread, logging_info=self.log)[0]

    def write(self, key, access, value):
        self.shared.store_buffer_content(key, access, value, self.thread, logging_info=self.log)


@gpu_callbacks.fail_on_exception
def _wgmma(
    *,
    token,
    mesh_location,
    thread,
    acc,
    acc_transforms,
    a,
    a_transforms,
    a_in_memory,
    b,
    b_transforms,
    source_info=None,
):
    buffers = _Buffers(mesh_location, thread, source_info)
    a = buffers.read(*buffers.locate(a, a_transforms)) if a_in_memory else np.asarray(a)
    b = buffers.read(*buffers.locate(b, b_transforms))
    at = buffers.locate(acc, acc_transforms)
    total = buffers.read(*at)
    product = np.matmul(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32))
    buffers.write(*at, total + product.astype(total.dtype))
    return token


def _interpret_wgmma(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    empty = jax.tree.structure([])
    trees = (eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b"))
    acc_t, a_t, b_t = jax.tree.unflatten(jax.tree_util.treedef_tuple(tuple(trees)), leaves)
    a_in_memory = isinstance(eqn.invars[1].aval, state_types.AbstractRef)
    acc, acc_t = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_t)
    if a_in_memory:
        a, a_t = jaxpr_interpret.resolve_ref(eqn.invars[1].aval, a, a_t)
    b, b_t = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_t)
    call = functools.partial(_wgmma, a_in_memory=a_in_memory, source_info=eqn.source_info)
    return callback.io_callback(
        call,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc=acc,
        acc_transforms=acc_t,
        a=a,
        a_transforms=a_t,
        b=b,
        b_transforms=b_t,
    ), []


_copy_gmem_to_smem, _copy_smem_to_gmem = gpu_callbacks.copy_gmem_to_smem, gpu_callbacks.copy_smem_to_gmem


@gpu_callbacks.fail_on_exception
def _load(*, token, mesh_location, thread, src_allocation_key_as_array, src_transforms, **kw):
    """The interpreter's TMA load where the hardware makes it: elsewhere an H100 stops with an illegal instruction."""
    buffers = _Buffers(mesh_location, thread, kw["source_info"])
    key, access = buffers.locate(src_allocation_key_as_array, src_transforms)
    last, dtype = access.range[-1], buffers.shared.buffer_shape_and_dtype(key).dtype
    first = last.start if isinstance(last, slice) else last
    if first * np.dtype(dtype).itemsize % 16:
        raise ValueError(f"TMA from column {first} of {dtype}: the address must be a multiple of 16 bytes")
    where = dict(src_allocation_key_as_array=src_allocation_key_as_array, src_transforms=src_transforms)
    return _copy_gmem_to_smem(token=token, mesh_location=mesh_location, thread=thread, **where, **kw)


def _store(**kw):
    """The interpreter's TMA store with `predicate` and reduction_op="add"."""
    predicate, reduction = kw.get("predicate"), kw.get("reduction_op")
    if predicate is not None and not bool(np.asarray(predicate)):
        return kw["token"]
    kw |= {"predicate": None, "reduction_op": None}
    if reduction is None:
        return _copy_smem_to_gmem(**kw)
    assert reduction == "add", reduction
    buffers = _Buffers(kw["mesh_location"], kw["thread"], kw["source_info"])
    source = buffers.read(*buffers.locate(kw["src_allocation_key_as_array"], kw["src_transforms"]))
    key, access = buffers.locate(kw["dst_allocation_key_as_array"], kw["dst_transforms"])
    old = buffers.read(key, access)
    new = (old + source[tuple(slice(n) for n in old.shape)]).astype(old.dtype)
    shape = tuple(buffers.shared.buffer_shape_and_dtype(key).shape)
    clipped = gpu_callbacks._clip_store_to_shape(access, new, shape)
    if clipped is not None:
        buffers.write(key, *clipped)
    return kw["token"]


@gpu_callbacks.fail_on_exception
def _store_accumulator(*, token, mesh_location, thread, key, value, source_info=None):
    buffers = _Buffers(mesh_location, thread, source_info)
    buffers.write(*buffers.locate(key), np.asarray(value))
    return token


def _interpret_store_accumulator(self, eqn, token, get_invals):
    acc, value = get_invals()
    call = functools.partial(_store_accumulator, source_info=eqn.source_info)
    token = callback.io_callback(
        call,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        key=acc,
        value=value,
    )
    return token, value


@functools.cache
def install() -> None:
    """Patch the interpreter, once per process."""
    interpreter = jaxpr_interpret.JaxprInterpreter
    interpreter._interpret_wgmma_ref_p = _interpret_wgmma
    interpreter._interpret_store_accumulator = _interpret_store_accumulator
    gpu_callbacks.copy_smem_to_gmem = _store
    gpu_callbacks.copy_gmem_to_smem = _load
    # The interpreter is one match statement over primitives: add a case before its default.
    source = textwrap.dedent(inspect.getsource(interpreter.interpret))
    default = "        case _:\n"
    assert source.count(default) == 1, "the interpreter has changed: adapt this patch"
    case = (
        "        case gpu_primitives.wgmma_accumulator_store_p:\n"
        "          token, out = self._interpret_store_accumulator(eqn, token, deferred_invals)\n"
    )
    namespace: dict = {}
    exec(
        compile(source.replace(default, case + default), "<interpreter patch>", "exec"),
        jaxpr_interpret.__dict__,
        namespace,
    )
    interpreter.interpret = namespace["interpret"]
