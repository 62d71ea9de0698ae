"""Eight simulated CPU devices for the sharding tests, and a small random batch for everything else."""

import os

os.environ.setdefault("NPROC", "16")  # on few cores, simulated devices otherwise abort at a rendezvous timeout

import jax

jax.config.update("jax_num_cpu_devices", 8)
