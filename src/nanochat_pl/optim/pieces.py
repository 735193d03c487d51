"""Elements of a parameter that stay together where it is cut into the shards of several processes."""

from __future__ import annotations

# Elements: a multiple of every vector's length. Vectorised kernels treat what is left after the last full vector in
# other instructions, with another rounding; so each element is treated as it is in the whole parameter.
ALIGNMENT = 64
# The CPU sums squares in a few running float32 sums: 3e-3 off after 5e7 elements, 2e-7 where each piece has its own.
PIECE_OF_NORM = 2**15


def adamw_quantum(numel: int) -> int:
    """Elements of a parameter of AdamW that stay together: of a small one so few that 16 processes have some, of a
    large one a piece of the norm."""
    return min(max(ALIGNMENT, 1 << max((numel // 16).bit_length() - 1, 0)), PIECE_OF_NORM)
