#!/usr/bin/env bash
# safetensors 0.8.0 beside ml_dtypes 0.5.4: once ml_dtypes is imported safetensors' numpy face reads BF16, but not F8_E8M0, the
# dtype of MXFP4's scales in some checkpoints, which ml_dtypes has as well: it asks numpy itself for the name and raises
# AttributeError: module 'numpy' has no attribute 'float8_e8m0fnu'. F4 ends the same way (float4_e2m1fn_x2). What can be done is
# to read the file's bytes by the header's data_offsets.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip --quiet --disable-pip-version-check install safetensors==0.8.0 ml_dtypes==0.5.4 numpy==2.3.5
"$dir/venv/bin/python" - "$dir" <<'PY'
import json
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

file = Path(sys.argv[1]) / "tensor.safetensors"


def read(dtype, data, values):
    header = json.dumps({"x": {"dtype": dtype, "shape": [values], "data_offsets": [0, len(data)]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    try:
        with safe_open(file, framework="np") as tensors:
            return tensors.get_tensor("x")
    except AttributeError as error:
        return str(error)


two = read("BF16", bytes([0x80, 0x3F, 0x00, 0x40]), 2)
print("BF16   ", two, two.dtype)
assert two.dtype == ml_dtypes.bfloat16 and two.tolist() == [1, 2]
for dtype, name, data in (("F8_E8M0", "float8_e8m0fnu", bytes([126, 127])), ("F4", "float4_e2m1fn_x2", bytes([0x21]))):
    found = read(dtype, data, 2)
    print(f"{dtype:7}", found)
    assert found == f"module 'numpy' has no attribute '{name}'"
print("ml_dtypes reads the same bytes as", np.frombuffer(bytes([126, 127]), ml_dtypes.float8_e8m0fnu))
PY
