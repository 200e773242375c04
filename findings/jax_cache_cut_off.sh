#!/usr/bin/env bash
# jax 0.11.2 and 0.12.0.1: a file of the persistent compilation cache that was cut off, as by a process that ended while it wrote,
# is never replaced. JAX writes such files in place, warns at each later start that the entry cannot be read, compiles anew, and
# leaves the file as it is, because there is one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
for version in 0.11.2 0.12.0.1; do
  "$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install "jax==$version"
  DIR=$dir/$version "$dir/venv/bin/python" - <<'PY'
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", os.environ["DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jnp.arange(3.0)


def start():
    """As a new process: what it warns of."""
    jax.clear_caches()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        jax.jit(lambda x: 2 * x + 1)(x)
    return [str(warning.message) for warning in said if "compilation cache" in str(warning.message)]


assert start() == []
(file,) = pathlib.Path(os.environ["DIR"]).glob("jit__lambda*-cache")
file.write_bytes(file.read_bytes()[:-20])
cut = file.read_bytes()
for number in (1, 2):
    (message,) = start()
    print(f"jax {jax.__version__}, start {number}: {message[:100]}")
    assert file.read_bytes() == cut
PY
done
