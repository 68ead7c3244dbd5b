"""Label Studio's brush masks: run lengths of RGBA bytes in a bit stream, written and read without the RGBA picture.

Stream, most significant bit first: 32 bits number of values (W * H * 4) | 5 bits word size - 1 | 4 x 4 bits run
size - 1 | blocks of: 1 bit is-run, 2 bits which run size, that many bits count - 1, then one word (run) or count words
(literals) | zeros to a full byte. The mask is the alpha channel, every fourth value.

Source: thi.ng rle-pack; byte for byte what label_studio_sdk.converter.brush writes for a mask of 0 and 255.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loop.errors import LabelError
from loop.types import BoolArray, UInt8Array

_WORD_BITS = 8
_RUN_BITS = (3, 4, 8, 16)
_HEADER_BITS = 53
_LONGEST = 1 << _RUN_BITS[-1]


def encode_brush(mask: BoolArray) -> list[int]:
    """The bytes of `value.rle` for one mask: 255 in all four channels inside, 0 outside.

    Args:
        mask: (H, W) bool, H * W >= 1.

    Returns:
        Integers 0..255. The SDK pads by 1 to 8 bits, so a full zero byte follows an aligned stream; kept.
    """
    flat = mask.reshape(-1)
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = 4 * np.diff(ends, prepend=0)
    values = 255 * flat[ends - 1].astype(np.int64)
    # A run above 65536 is written as full ones and a rest of 1..65536, the rest in the longest form too.
    full = (lengths - 1) // _LONGEST
    rests = lengths - full * _LONGEST
    which = np.where(full > 0, 3, np.searchsorted([8, 16, 256], lengths, side="left"))
    sizes = np.array(_RUN_BITS)[which]
    codes = _run(which, sizes, rests, values)
    widths = 3 + sizes + _WORD_BITS
    if full.any():
        long_codes = _run(3, _RUN_BITS[3], _LONGEST, values)
        before = np.repeat(np.arange(len(lengths)), full)
        codes = np.insert(codes, before, long_codes[before])
        widths = np.insert(widths, before, 3 + _RUN_BITS[3] + _WORD_BITS)
    owner = np.repeat(np.arange(len(codes)), widths)
    place = np.cumsum(widths)[owner] - 1 - np.arange(len(owner))
    bits = np.concatenate([_header(4 * flat.size), (codes[owner] >> place & 1).astype(np.uint8)])
    padding = np.zeros(8 - bits.size % 8, np.uint8)
    stream: list[int] = np.packbits(np.concatenate([bits, padding])).tolist()
    return stream


def decode_brush(rle: Sequence[int], width: int, height: int) -> UInt8Array:
    """The alpha channel of a brush region: (height, width) uint8, 0 = not painted.

    Strokes painted in the browser have soft edges: take alpha >= 128 as the mask.

    Args:
        rle: `value.rle` of the region, integers 0..255.
        width: `original_width` of the region, px.
        height: `original_height` of the region, px.

    Raises:
        LabelError: the stream is not Label Studio's, is cut off, or belongs to a picture of another size.
    """
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise LabelError(f"brush run lengths must be a list of integers 0..255: {error}") from error
    reader = _Bits(data)
    n_values = reader.take(32)
    word_bits = reader.take(5) + 1
    run_bits = [reader.take(4) + 1 for _ in range(4)]
    if n_values != 4 * width * height or word_bits != _WORD_BITS:
        raise LabelError(
            f"brush region holds {n_values} values of {word_bits} bits; expected {4 * width * height} of 8 for an image"
            f" of {width} x {height} px: the region is damaged or belongs to another image"
        )
    alpha = np.zeros(width * height, np.uint8)
    i = 0
    while i < n_values:
        is_run = reader.take(1)
        count = reader.take(run_bits[reader.take(2)]) + 1
        if i + count > n_values:
            raise LabelError(f"brush run lengths reach {i + count} values of {n_values}: the region is damaged")
        first, last = i // 4, (i + count) // 4  # alpha is value 3, 7, 11, ...: so many lie before i and i + count
        if is_run:
            alpha[first:last] = reader.take(_WORD_BITS)
        else:
            alpha[first:last] = reader.words(count)[(3 - i) % 4 :: 4]
        i += count
    return alpha.reshape(height, width)


class _Bits:
    """Reads a stream bit by bit from the front; past its end it raises LabelError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, n: int) -> int:
        """The next n <= 32 bits as an unsigned number."""
        start = self._advance(n)
        chunk = self._data[start >> 3 : (start + n + 7) >> 3]
        return int.from_bytes(chunk, "big") >> (8 * len(chunk) - (start & 7) - n) & ((1 << n) - 1)

    def words(self, n: int) -> UInt8Array:
        """The next n bytes, wherever in a byte they start."""
        start = self._advance(8 * n)
        window = np.frombuffer(self._data, np.uint8)[start >> 3 : (start + 8 * n + 7) >> 3]
        return np.packbits(np.unpackbits(window)[start & 7 : (start & 7) + 8 * n])

    def _advance(self, n: int) -> int:
        start, self._at = self._at, self._at + n
        if self._at > 8 * len(self._data):
            raise LabelError(f"brush run lengths end after {len(self._data)} bytes in the middle of the mask")
        return start


def _header(n_values: int) -> UInt8Array:
    number = n_values
    for size, bits in ((_WORD_BITS, 5), *((run, 4) for run in _RUN_BITS)):
        number = number << bits | size - 1
    return np.array([number >> (_HEADER_BITS - 1 - k) & 1 for k in range(_HEADER_BITS)], np.uint8)


def _run(
    which: npt.NDArray[np.int64] | int,
    sizes: npt.NDArray[np.int64] | int,
    counts: npt.NDArray[np.int64] | int,
    values: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Each run as one number of 3 + size + 8 bits: is-run and which size, count - 1, value."""
    return ((4 | which) << sizes | counts - 1) << _WORD_BITS | values
