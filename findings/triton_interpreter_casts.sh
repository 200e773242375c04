#!/usr/bin/env bash
# triton 3.8.0's interpreter (TRITON_INTERPRET=1) casts float32 down in another way than a GPU does, and says nothing. On a GPU
# a cast rounds to nearest, ties to even, unless the kernel asks for another mode. Seen in the interpreter, beside torch 2.14.1:
#   float32 -> bfloat16     the lower bits are cut off: 1.0117 becomes 1.0078, not 1.0156; 3.4e38 stays finite; 1e-40 becomes
#                           4.4e-39, as numbers below 2^-126 lose their place
#   float32 -> float8e4nv   ties go up: 1.0625 becomes 1.125, not 1; past 448 it wraps: 465 becomes 480 and 1000 becomes 256
#   float32 -> float8e5     ties go up; 61440 becomes 65536, not infinity; numbers below 2^-14 become 0
# float32 -> float16 agrees. So a kernel's numbers in the interpreter are no evidence for those of bfloat16 or float8.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install triton==3.8.0 torch==2.14.1 numpy==2.3.5
cat >"$dir/casts.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_ptr, y_ptr, TO: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(TO).to(tl.float32))


def both(name, to, dtype, values):
    x, y = torch.tensor(values), torch.full((4,), -1.0)
    cast[(1,)](x, y, to)
    expected = x.to(dtype).float()
    print(f"{name}\n  of          {x.tolist()}\n  interpreter {y.tolist()}\n  torch       {expected.tolist()}")
    return y, expected


seen, torchs = both("bfloat16", tl.bfloat16, torch.bfloat16, [1.01171875, -1.01171875, 3.4e38, 1e-40])
assert seen[:2].tolist() == [1.0078125, -1.0078125] and torchs[:2].tolist() == [1.015625, -1.015625]
assert seen[2].isfinite() and torchs[2].isinf()
assert seen[3] > 4e-39 and torchs[3] < 1e-40

seen, torchs = both("float8e4nv", tl.float8e4nv, torch.float8_e4m3fn, [1.0625, 1.1875, 465.0, 1000.0])
assert seen.tolist() == [1.125, 1.25, 480.0, 256.0] and torchs[:2].tolist() == [1.0, 1.25]

seen, torchs = both("float8e5", tl.float8e5, torch.float8_e5m2, [1.125, 1.375, 61440.0, 1e-5])
assert seen.tolist() == [1.25, 1.5, 65536.0, 0.0]
assert torchs[:2].tolist() == [1.0, 1.5] and torchs[2].isinf() and torchs[3] > 0

seen, torchs = both("float16", tl.float16, torch.float16, [1.00048828125, 65519.0, 6e-8, 1.00146484375])
assert torch.equal(seen, torchs)
PY
TRITON_INTERPRET=1 "$dir/venv/bin/python" -W ignore "$dir/casts.py"
