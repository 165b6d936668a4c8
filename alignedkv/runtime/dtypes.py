"""What torch calls the dtypes that kernels know by name."""

from __future__ import annotations

import torch

#: NumPy and CUDA see these as unsigned; torch has few operators for its own unsigned types.
TORCH_DTYPES = {
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint32": torch.int32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
#: torch dtypes of models that the kernels take, by their name in a `DecodeSpec`.
DTYPE_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
