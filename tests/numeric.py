"""What the op tests share: bfloat16 in NumPy, error measures, awkward places for an array.

Nothing here calls the code under test. bfloat16 travels as uint16, as in `_core.ops`.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NAN_BITS = np.uint16(0x7FC0)
PROT_NONE = 0


# --- bfloat16 -------------------------------------------------------------------------------------


def widen(array: Array) -> Array:
    """The float64 values of an array of float32 or of bfloat16 bits."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def to_bfloat16(values: npt.ArrayLike) -> Array:
    """The bits of the nearest bfloat16, ties to even, worked out as arithmetic in float64.

    Eight significant bits; below 2^-126 the distance between neighbours stays 2^-133.
    """
    x = np.asarray(values, dtype=np.float64)
    _, exponent = np.frexp(x)
    quantum = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.where(np.isfinite(x), np.rint(x / quantum) * quantum, x)
        bits = rounded.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(x), NAN_BITS, bits >> 16).astype(np.uint16)


def cast(values: npt.ArrayLike, dtype: str) -> Array:
    """What an op takes for values of this dtype."""
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, dtype=np.float32)


def poison(shape: tuple[int, ...], dtype: str) -> Array:
    """An array of NaN."""
    if dtype == "bfloat16":
        return np.full(shape, NAN_BITS, dtype=np.uint16)
    return np.full(shape, np.nan, dtype=np.float32)


# --- Errors ---------------------------------------------------------------------------------------


def relative_error(got: Array, want: Array, scale: npt.ArrayLike | None = None) -> float:
    """max |got - want| / scale, where scale is max |want| unless given; infinite for a NaN."""
    values = widen(got)
    assert values.shape == want.shape
    if scale is None:
        scale = np.abs(want).max()
    error = float((np.abs(values - want) / scale).max())
    return float("inf") if np.isnan(error) else error


def same_bits(a: Array, b: Array) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- float32 arithmetic, one rounding at a time ---------------------------------------------------


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values with a single rounding.

    The product is exact in float64. Their sum is rounded to odd there, which leaves enough bits for
    the second rounding, to float32, to come out as if it were the only one.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product  # Knuth's two-sum: total + error is the exact sum
    error = (product - (total - back)) + (addend - back)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & is_even, odd, total).astype(np.float32)


def multiply_then_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values, rounded after each."""
    total: Array = a.astype(np.float32) * b.astype(np.float32) + c.astype(np.float32)
    return total


def tree_sum(lanes: Array) -> Array:
    """The lanes of the last axis, halved until one is left: lane i takes lane i + n/2."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return np.asarray(lanes[..., 0])


# --- Places ---------------------------------------------------------------------------------------


def misaligned(array: Array, offset: int | None = None) -> Array:
    """A copy so many bytes behind a cache line's begin, or one element; all around it is NaN."""
    around = NAN_BITS if array.dtype == np.uint16 else np.nan
    room = np.full(array.size + 64, around, dtype=array.dtype)
    size = array.itemsize
    behind = size if offset is None else offset
    start = next(i for i in range(64) if (room.ctypes.data + i * size) % 64 == behind)
    copy = room[start : start + array.size].reshape(array.shape)
    copy[...] = array
    return copy


def in_wider_rows(array: Array, margin: int = 3) -> Array:
    """A copy that is a slice of the columns of a wider matrix; all around it is NaN."""
    rows, cols = array.shape
    dtype = "bfloat16" if array.dtype == np.uint16 else "float32"
    wide = poison((rows, cols + 2 * margin), dtype)
    wide[:, margin : margin + cols] = array
    return wide[:, margin : margin + cols]


class Guarded:
    """Copies an array to the end, or start, of memory whose neighbour page kills who reads it."""

    def __init__(self, array: Array, end: bool = True) -> None:
        page, size = mmap.PAGESIZE, array.nbytes
        inside = -(-size // page) * page
        self._memory = mmap.mmap(-1, inside + 2 * page)  # pages: forbidden, inside, forbidden
        buffer = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
        self._base = ctypes.addressof(buffer)
        start = page + (inside - size if end else 0)
        flat = np.frombuffer(self._memory, dtype=array.dtype, count=array.size, offset=start)
        self.array = flat.reshape(array.shape)
        self.array[...] = array
        self._forbid(0)
        self._forbid(page + inside)

    def _forbid(self, offset: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self._base + offset)
        if libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
