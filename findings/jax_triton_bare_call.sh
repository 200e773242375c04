#!/usr/bin/env bash
# jax-triton 0.4.1 beside jax 0.12.0.1: a triton_call directly under jax.jit fails when it is lowered, as JAX 0.12 gives rules for
# dead code a third argument, which inputs are live, and jax-triton's rule takes two. Registering a rule of three cures it. Calls
# that a primitive's own lowering makes do not meet the rule. No GPU is needed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.12.0.1 jax-triton==0.4.1 triton==3.9.0
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps jax-cuda13-plugin==0.12.0.1
cat >"$dir/bare_call.py" <<'PY'
import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax.interpreters import partial_eval


@triton.jit
def double_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


def double(x):
    return jax_triton.triton_call(x, kernel=double_kernel, out_type=x, grid=1, N=16, compute_capability=90)


def lowered():
    x = jax.ShapeDtypeStruct((16,), jnp.float32)
    return jax.jit(lambda x: double(x)).trace(x).lower(lowering_platforms=("cuda",)).as_text()


try:
    lowered()
except TypeError as error:
    print(f"as it is: {error}")
    assert "takes 2 positional arguments but 3 were given" in str(error)
else:
    raise SystemExit("it lowers")
call = jax_triton.triton_lib.triton_kernel_call_p
partial_eval.dce_rules[call] = lambda used, live, equation: ([True] * len(equation.invars), equation)
assert "triton_kernel_call" in lowered()
print("with a rule of three arguments: it lowers")
PY
"$dir/venv/bin/python" -W ignore "$dir/bare_call.py"
