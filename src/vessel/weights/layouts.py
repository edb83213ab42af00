"""Names of the layouts and dtypes of an export; this module imports nothing, so that options are checked at once."""

from __future__ import annotations

EXPORT_LAYOUTS = ("sa2va", "native", "adapter")
EXPORT_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # option of the command: name in torch
