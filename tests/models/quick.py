"""Compiling with less care: the same program in a quarter of the time, for models run once."""

from __future__ import annotations

import functools

import jax

# Half of the time would be LLVM's optimiser.
QUICKLY: dict[str, int | bool] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):
    # Half of the rest; later compilers have no such choice.
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
quick_jit = functools.partial(jax.jit, compiler_options=QUICKLY)
