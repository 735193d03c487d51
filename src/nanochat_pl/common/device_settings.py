"""What settings say of devices, in types that need no torch: :mod:`nanochat_pl.common.device` has what they mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

ComputeDType = Literal["float32", "bfloat16", "float16"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]  # gpu is Lightning's word
Devices = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]  # how many
