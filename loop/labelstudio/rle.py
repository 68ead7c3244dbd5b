"""Label Studio's brush masks: run lengths of RGBA bytes in a bit stream, written and read without the RGBA picture.

Stream, most significant bit first: 32 bits number of values (W * H * 4) | 5 bits word size - 1 | 4 x 4 bits run
size - 1 | blocks of: 1 bit is-run, 2 bits which run size, that many bits count - 1, then one word (run) or count words
(literals) | zeros to a full byte. The mask is the alpha channel, every fourth value.

Neither way touches the frame: cost and memory grow with the cells' boxes and the number of blocks. Reading is in two
steps, for all regions of an image at once: from block to block in Python, one look-up each, as where a block begins
follows from the one before it; and whatever else the blocks say with numpy.

Source: thi.ng rle-pack; byte for byte what label_studio_sdk.converter.brush writes for a mask of 0 and 255.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loop.errors import LabelError, ShapeError
from loop.rings import Crop
from loop.types import BoolArray

_WORD_BITS = 8
_RUN_BITS = np.array([3, 4, 8, 16])
_UP_TO = np.array([8, 16, 256])  # the longest run of each size but the last
_LONGEST = 1 << 16
_HEADER_BITS = 53
_WINDOW = 5  # bytes that hold any run wherever in the first byte it starts
_PAD = bytes(8)  # between streams: zeros are a literal, at which the way from run to run ends
_KIND_BITS = 3  # is-run and which run size
_LOOK_BITS = 8 + _KIND_BITS - 1  # hold the kinds of the blocks that begin at each bit of a byte

Int64Array = npt.NDArray[np.int64]
Decoded = Crop | LabelError | None


class _Blocks(NamedTuple):
    """The blocks of several streams, in order; each stream begins with an empty one that stands for its header.

    Attributes:
        stops: (B,) the bit of the joined data behind each block.
        begins, ends: (B,) first value of the picture and the one behind the last, four a pixel; int64 like all others.
        heads: (B,) bits before the first word.
        runs: (B,) bool, False = literals or header.
        painted: (B,) bool, whether the first word is alpha 128 or more.
        firsts: (R + 1,) where each stream's blocks begin, and their number.
    """

    stops: Int64Array
    begins: Int64Array
    ends: Int64Array
    heads: Int64Array
    runs: BoolArray
    painted: BoolArray
    firsts: Int64Array


class _Stretches(NamedTuple):
    """Painted stretches of several pictures, by picture and place; two may touch, none is empty. (S,) int64 each."""

    pictures: Int64Array
    begins: Int64Array  # first pixel
    ends: Int64Array  # the one behind the last


def encode_brush(
    mask: BoolArray, shape: tuple[int, int] | None = None, corner_xy: tuple[int, int] = (0, 0)
) -> list[int]:
    """The bytes of `value.rle` for one mask: 255 in all four channels inside, 0 outside.

    Args:
        mask: (h, w) bool, h * w >= 1, a part of the image; the rest is not painted.
        shape: (H, W) of the image, px; None = the mask is the whole image.
        corner_xy: x and y of the mask's first pixel in the image, px.

    Returns:
        Integers 0..255. The SDK pads by 1 to 8 bits, so a full zero byte follows an aligned stream; kept.

    Raises:
        ShapeError: the mask reaches out of the image.
    """
    height, width = mask.shape if shape is None else shape
    (h, w), (x0, y0) = mask.shape, corner_xy
    if not (0 <= x0 <= width - w and 0 <= y0 <= height - h):
        raise ShapeError(f"a mask of {w} x {h} px at {corner_xy} reaches out of an image of {width} x {height} px")
    bounds = np.concatenate([[0], _turns(mask, width) + y0 * width + x0, [height * width]])
    lengths = 4 * np.diff(bounds)
    values = 255 * (np.arange(len(lengths)) & 1)
    kept = lengths > 0  # the first and the last run are empty where a corner of the image is painted
    return _pack(4 * height * width, lengths[kept], values[kept])


def decode_brush(rle: Sequence[int], shape: tuple[int, int]) -> Crop | None:
    """The mask of one brush region; see `decode_brushes`.

    Raises:
        LabelError: the stream is not Label Studio's, is cut off, or belongs to a picture of another size.
    """
    (found,) = decode_brushes([rle], shape)
    if isinstance(found, LabelError):
        raise found
    return found


def decode_brushes(rles: Sequence[Sequence[int]], shape: tuple[int, int]) -> list[Decoded]:
    """The masks of an image's brush regions, each cut to its box; faster than one by one.

    A pixel is painted from alpha 128 on: strokes drawn in the browser have soft edges.

    Args:
        rles: `value.rle` of each region, integers 0..255.
        shape: (H, W) of the image, px.

    Returns:
        For each region its mask, None where nothing is painted, or what is wrong with it: the stream is not Label
        Studio's, is cut off, or belongs to a picture of another size. The masks share memory.
    """
    found: list[Decoded] = [None] * len(rles)
    alike: dict[int, list[int]] = {}  # by the four run sizes, which are the same in all that Label Studio writes
    streams: dict[int, bytes] = {}
    for i, rle in enumerate(rles):
        try:
            streams[i], sizes = _checked(rle, shape)
        except LabelError as error:
            found[i] = error
        else:
            alike.setdefault(sizes, []).append(i)
    for sizes, places in alike.items():
        for i, pixels in zip(places, _read([streams[i] for i in places], sizes, shape), strict=True):
            found[i] = pixels
    return found


def _turns(mask: BoolArray, width: int) -> Int64Array:
    """Where painted and unpainted pixels meet, row by row in an image `width` px wide, from the mask's first pixel."""
    if mask.shape[1] == width:  # a run goes on in the next row where it ends at one side and begins at the other
        mask = mask.reshape(1, -1)
    h, w = mask.shape
    padded = np.zeros((h, w + 2), np.bool_)
    padded[:, 1:-1] = mask
    rows, columns = np.divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), w + 1)
    turns: Int64Array = rows * width + columns
    return turns


def _pack(n_values: int, lengths: Int64Array, values: Int64Array) -> list[int]:
    """The stream of runs, lengths >= 1; one above 65536 is written as full ones and a rest, all in the longest form."""
    full = (lengths - 1) // _LONGEST
    last = np.cumsum(full + 1) - 1
    counts = np.full(last[-1] + 1, _LONGEST)
    counts[last] = lengths - full * _LONGEST
    which = np.repeat(np.searchsorted(_UP_TO, lengths), full + 1)
    sizes = _RUN_BITS[which]
    codes = ((4 | which) << sizes | counts - 1) << _WORD_BITS | np.repeat(values, full + 1)
    widths = 3 + sizes + _WORD_BITS
    ends = _HEADER_BITS + np.cumsum(widths)
    begins = ends - widths
    # Each code lies in a window of whole bytes; no two share a bit, so that adding the windows up joins them.
    windows = codes << (8 * _WINDOW - widths - (begins & 7))
    parts = windows.astype(">i8").view(np.uint8).reshape(-1, 8)[:, -_WINDOW:]
    places = (begins >> 3)[:, None] + np.arange(_WINDOW)
    size = int(ends[-1]) // 8 + 1
    stream = np.bincount(places.ravel(), parts.ravel(), size)[:size].astype(np.uint8)
    stream[:7] |= np.frombuffer(_header(n_values), np.uint8)
    numbers: list[int] = stream.tolist()
    return numbers


def _header(n_values: int) -> bytes:
    number = n_values << 5 | _WORD_BITS - 1
    for size in _RUN_BITS.tolist():
        number = number << 4 | size - 1
    return (number << 3).to_bytes(7, "big")


def _checked(rle: Sequence[int], shape: tuple[int, int]) -> tuple[bytes, int]:
    """The stream, with the 16 bits of its header that say the run sizes; LabelError where it is none of this image."""
    if not isinstance(rle, Sequence):  # of a number, bytes would make that many zeros
        raise LabelError(f"brush run lengths must be a list of integers 0..255, not {type(rle).__name__}")
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise LabelError(f"brush run lengths must be a list of integers 0..255: {error}") from error
    height, width = shape
    if len(data) * 8 < _HEADER_BITS:
        raise LabelError(f"brush run lengths end after {len(data)} bytes, before the mask begins")
    header = int.from_bytes(data[:7], "big") >> 3
    n_values, word_bits = header >> 21, (header >> 16 & 31) + 1
    if n_values != 4 * width * height or word_bits != _WORD_BITS:
        raise LabelError(
            f"brush region holds {n_values} values of {word_bits} bits; expected {4 * width * height} of 8 for an image"
            f" of {width} x {height} px: the region is damaged or belongs to another image"
        )
    return data, header & 0xFFFF


def _read(streams: Sequence[bytes], sizes: int, shape: tuple[int, int]) -> list[Decoded]:
    """The pixels of streams with the same run sizes."""
    run_bits = [(sizes >> 4 * k & 15) + 1 for k in (3, 2, 1, 0)]
    data = _PAD.join([*streams, b""])
    limits = np.cumsum([8 * (len(stream) + len(_PAD)) for stream in streams]) - 8 * len(_PAD)
    blocks = _blocks(data, limits, run_bits)
    errors = _drop(blocks, limits, [len(stream) for stream in streams], 4 * shape[0] * shape[1])
    crops = _crops(_stretches(data, blocks), shape[1])
    return [errors.get(k, crops.get(k)) for k in range(len(streams))]


@lru_cache(maxsize=8)
def _widths(run_bits: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """For each 10 bits, eight bytes: the bits of the run that begins at the first, second, ... bit; 0 = a literal."""
    of_kind = np.array([0] * 4 + [_KIND_BITS + size + _WORD_BITS for size in run_bits], np.uint8)
    looks = np.arange(1 << _LOOK_BITS)
    kinds = np.stack([looks >> 7 - bit & 7 for bit in range(8)], axis=1)
    return of_kind[kinds].view(np.uint64)[:, 0]


def _walk(data: bytes, limits: Sequence[int], run_bits: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """From block to block: the bits of each, 0 for a header or literals; the bits of those; where headers stand."""
    byte = np.frombuffer(data, np.uint8).astype(np.uint16)
    byte[:-1] = byte[:-1] << 2 | byte[1:] >> 6
    widths = _widths(tuple(run_bits)).take(byte).tobytes()
    steps: list[int] = []
    others: list[int] = []
    firsts: list[int] = []
    at = begin = 0
    for limit in limits:
        firsts.append(len(steps))
        steps.append(0)
        others.append(begin + _HEADER_BITS - at)
        at = begin + _HEADER_BITS
        while True:
            while width := widths[at]:
                steps.append(width)
                at += width
            window = int.from_bytes(data[at >> 3 : (at >> 3) + 4], "big") >> 8 - (at & 7)  # 24 bits
            size = run_bits[window >> 21 & 3]
            width = _KIND_BITS + size + _WORD_BITS * ((window >> 21 - size & (1 << size) - 1) + 1)
            if at + width > limit:  # cut off, or what fills the last byte
                break
            steps.append(0)
            others.append(width)
            at += width
        begin = limit + 8 * len(_PAD)
    return steps, others, firsts


def _blocks(data: bytes, limits: Int64Array, run_bits: Sequence[int]) -> _Blocks:
    """All blocks of streams that end at `limits`, bits; a run at the end of one may reach past it."""
    steps, others, starts = _walk(data, limits.tolist(), run_bits)
    firsts = np.array([*starts, len(steps)])
    bits = np.frombuffer(bytes(steps), np.uint8)
    runs, widths = bits > 0, bits.astype(np.int64)
    widths[~runs] = others
    stops = np.cumsum(widths)
    at = stops - widths
    windows: npt.NDArray[np.uint64] = np.ndarray(len(data) - 7, ">u8", data, strides=(1,))
    window = windows[at >> 3].astype(np.uint64) << (at & 7).astype(np.uint64)
    sizes = np.array(run_bits, np.uint64).take((window >> 61 & 3).astype(np.int64))
    window <<= _KIND_BITS
    counts = (window >> 64 - sizes).astype(np.int64) + 1
    counts[firsts[:-1]] = 0
    ends = np.cumsum(counts)
    ends -= np.repeat(ends[firsts[:-1]], np.diff(firsts))
    painted = (window << sizes).view(np.int64) < 0
    return _Blocks(stops, ends - counts, ends, sizes.astype(np.int64) + _KIND_BITS, runs, painted, firsts)


def _drop(blocks: _Blocks, limits: Int64Array, sizes: Sequence[int], n_values: int) -> dict[int, LabelError]:
    """What is wrong with damaged streams; in place, their blocks and those that follow a picture become headers."""
    lasts = blocks.firsts[1:] - 1
    cut = blocks.stops[lasts] > limits
    errors = {}
    for k in np.flatnonzero(cut | (blocks.ends[lasts] != n_values)).tolist():
        first, last = blocks.firsts[k], blocks.firsts[k + 1]
        ends = blocks.ends[first : last - cut[k]]
        needed = int(np.searchsorted(ends, n_values))
        if needed == len(ends):
            errors[k] = LabelError(f"brush run lengths end after {sizes[k]} bytes in the middle of the mask")
        elif (reached := ends[needed]) > n_values:
            errors[k] = LabelError(f"brush run lengths reach {reached} values of {n_values}: the region is damaged")
        unused = slice(first if k in errors else first + needed + 1, last)
        blocks.runs[unused] = False
        blocks.ends[unused] = blocks.begins[unused]
    return errors


def _stretches(data: bytes, blocks: _Blocks) -> _Stretches:
    """What the blocks paint."""
    at = np.flatnonzero(blocks.runs & blocks.painted)
    begins, ends = blocks.begins[at] >> 2, blocks.ends[at] >> 2  # alpha is value 3, 7, 11, ...
    some = begins < ends
    at, begins, ends = at[some], begins[some], ends[some]
    literals = np.flatnonzero(~blocks.runs & (blocks.begins < blocks.ends))
    if literals.size:
        which, pixels = _literal_pixels(data, blocks, literals)
        at, begins, ends = (np.concatenate(pair) for pair in ((at, which), (begins, pixels), (ends, pixels + 1)))
        order = np.argsort(at, kind="stable")
        at, begins, ends = at[order], begins[order], ends[order]
    return _Stretches(np.searchsorted(blocks.firsts, at, "right") - 1, begins, ends)


def _literal_pixels(data: bytes, blocks: _Blocks, literals: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Block and pixel of each painted pixel whose alpha is a literal of the blocks `literals`."""
    begins, ends = blocks.begins[literals], blocks.ends[literals]
    pixels, counts = begins >> 2, (ends >> 2) - (begins >> 2)
    words = blocks.stops[literals] - _WORD_BITS * (ends - (4 * pixels + 3))  # the bit where the first alpha lies
    which = np.repeat(np.arange(len(literals)), counts)
    steps = np.arange(len(which)) - (np.cumsum(counts) - counts)[which]
    at = words[which] + 4 * _WORD_BITS * steps
    painted = np.frombuffer(data, np.uint8)[at >> 3] << (at & 7) & 128 > 0  # the first bit of alpha 128 and more
    return literals[which[painted]], (pixels[which] + steps)[painted]


def _crops(stretches: _Stretches, width: int) -> dict[int, Crop]:
    """The painted pixels of each picture `width` px wide, cut to their box; none for a picture without any."""
    pictures, begins, ends = stretches
    if not pictures.size:
        return {}
    firsts = np.flatnonzero(np.diff(pictures, prepend=-1))
    lasts = np.append(firsts[1:], len(pictures)) - 1
    rows, columns = np.divmod(begins, width)
    last_rows, last_columns = np.divmod(ends - 1, width)
    top, bottom = rows[firsts], last_rows[lasts] + 1
    x0, x1 = np.minimum.reduceat(columns, firsts), np.maximum.reduceat(last_columns, firsts) + 1
    wraps = np.bitwise_or.reduceat(rows != last_rows, firsts)  # into the next row: it touches both sides of the image
    x0, x1 = np.where(wraps, 0, x0), np.where(wraps, width, x1)
    bounds = np.concatenate([[0], np.cumsum((bottom - top) * (x1 - x0))])
    # Where the picture's pixel (row, column) lies among those of all crops: row * step + column + shift.
    step, shift = x1 - x0, bounds[:-1] - top * (x1 - x0) - x0
    many = lasts - firsts + 1
    steps, shifts = np.repeat(step, many), np.repeat(shift, many)
    turns = np.zeros(2 * len(begins) + 2, np.int64)  # from unpainted to painted and back
    turns[1:-1:2] = rows * steps + columns + shifts
    turns[2:-1:2] = last_rows * steps + last_columns + shifts + 1
    turns[-1] = bounds[-1]
    flat = np.repeat(np.arange(len(turns) - 1) & 1 > 0, np.diff(turns))
    boxes = zip(*(side.tolist() for side in (x0, top, x1, bottom)), strict=True)
    parts = itertools.pairwise(bounds.tolist())
    return {
        picture: Crop(box, flat[begin:end].reshape(box[3] - box[1], -1))
        for picture, box, (begin, end) in zip(pictures[firsts].tolist(), boxes, parts, strict=True)
    }
