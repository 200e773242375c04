"""Programs that JAX has compiled, kept on disk for the next start of a command."""

import os

import jax

from jmoe.ops.launch.kernel_cache import user_cache_directory


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on for this process; what the user has set of it stands.

    For commands alone: a program that imports jmoe sets JAX's options itself.
    """
    if jax.config.jax_compilation_cache_dir is None:
        directory = user_cache_directory() / "programs"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:  # of which JAX would warn at each start
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A model's start is many small programs too.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY" not in os.environ:
        # Programs that a mesh's Auto axes split are found again: what they are made of stands in them, and no address.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
