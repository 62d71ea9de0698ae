"""Eight simulated CPU devices for the sharding tests, and compilers that don't take their time."""

import os
import shutil

os.environ.setdefault("NPROC", "16")  # on few cores, simulated devices otherwise abort at a rendezvous timeout
if shutil.which("nvidia-smi") is None:
    # Programs here are compiled more often than run: without LLVM's expensive passes a fifth of the time is saved.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
else:
    # Only references are products of XLA's, and tuning those would take longer than the tests.
    quick = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

import jax

jax.config.update("jax_num_cpu_devices", 8)
