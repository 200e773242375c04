#!/usr/bin/env bash
# jax 0.11.2 beside jax-triton 0.4.1: XLA makes one thunk of a contiguous slice of 256 bytes or more and the Triton kernel that reads
# it, and hands the kernel an address inside the sliced array (dynamic-slice fusion, on by default). jax-triton compiles kernels for
# addresses that are multiples of 16 bytes, so that a call like double(x[1:65]) below stops on a GPU, when it is run, with
#   INVALID_ARGUMENT: Parameter 0 (...) is not divisible by 16.
# as x[1:65] begins 4 bytes into x. An optimization_barrier around the slice makes it an array of its own. Shown without a GPU:
# XLA compiles for a CUDA device that is only described.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.11.2 jax-triton==0.4.1 triton==3.8.0
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
cat >"$dir/slices.py" <<'PY'
import re

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax.experimental import topologies

GPU = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 149000000000 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 2 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
devices = topologies.get_topology_desc(platform="cuda", topology_name="h200", topology="1x1x1", target_config=GPU).devices
here = jax.sharding.SingleDeviceSharding(devices[0])


@triton.jit
def double_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


def double(x):
    return jax_triton.triton_call(x, kernel=double_kernel, out_type=x, grid=1, N=64, compute_capability=90)


def slices_in_thunks_of_kernels(f):
    x = jax.ShapeDtypeStruct((129,), jnp.float32, sharding=here)
    text = jax.jit(f).trace(x).lower(lowering_platforms=("cuda",)).compile().as_text()
    computations = re.split(r"\n\n", text)
    return [re.findall(r"slice=\{\[\d+:\d+\]\}", one) for one in computations if "triton_kernel_call" in one]


print("double(x[1:65]):", found := slices_in_thunks_of_kernels(lambda x: double(x[1:65])))
assert found[0] == ["slice={[1:65]}"], "XLA copies the slice now"
print("behind a barrier:", found := slices_in_thunks_of_kernels(lambda x: double(jax.lax.optimization_barrier(x[1:65]))))
assert not any(found), "a barrier does not help"
PY
JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 "$dir/venv/bin/python" -W ignore "$dir/slices.py"
