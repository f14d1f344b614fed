"""A Triton kernel that applies masks on a GPU, with one launch for all pieces. `bitmask` has the same in PyTorch.

Importing this module requires triton, which comes with the CUDA builds of torch. P pieces of N weights each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Weights per program, a multiple of 8.
_BLOCK = 4096

_WORD = {2: tl.int16, 4: tl.int32, 8: tl.int64}


# Not specialised, so that one compilation serves every number of pieces. Triton evaluates the annotations, so they must
# be names that it knows.
@triton.jit(do_not_specialize=["pieces", "halvings"])  # type: ignore[untyped-decorator]
def _store_zeros(
    table: tl.tensor, pieces: tl.tensor, halvings: tl.tensor, word: tl.constexpr, block: tl.constexpr
) -> None:
    # Binary search for the piece of this program: the last one whose first program is not after this one.
    program = tl.program_id(0)
    lowest = 0
    highest = pieces - 1
    for _ in range(halvings):
        middle = (lowest + highest + 1) // 2
        reached = tl.load(table + 4 * middle + 3) <= program
        lowest = tl.where(reached, middle, lowest)
        highest = tl.where(reached, highest, middle - 1)
    row = table + 4 * lowest
    start = (program - tl.load(row + 3)) * block
    words = tl.load(row).to(tl.pointer_type(word)) + start
    bits = tl.load(row + 1).to(tl.pointer_type(tl.uint8)) + start // 8
    left = tl.load(row + 2) - start

    at = tl.arange(0, block)
    byte = tl.load(bits + at // 8, mask=at < left, other=255)
    pruned = ((byte >> (at % 8).to(tl.uint8)) & 1) == 0
    # Kept weights are neither read nor written.
    tl.store(words + at, tl.zeros([block], word), mask=pruned)


def zero_pruned_all(pieces: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """Return a call that sets the words (N,) of these pieces to 0 where their bit is 0. It holds no tensors of them.

    It is valid for as long as words and bits stay where they are: the table of their places is sent to the device here,
    and each call is one launch on the current stream, which copies nothing and does not wait for the device. `bitmask`
    defines the layout of the bits.

    Args:
        pieces: words with their masks, on one device and of one word size.
    """
    rows, programs = [], 0
    for words, bits in pieces:
        if words.numel():
            rows.append((words.data_ptr(), bits.data_ptr(), words.numel(), programs))
            programs += triton.cdiv(words.numel(), _BLOCK)
    if not rows:
        return lambda: None
    device, word = pieces[0][0].device, _WORD[pieces[0][0].element_size()]
    # Columns: address of the words, address of the bits, number of weights, first program. A copy from pinned memory
    # does not wait for work queued on the device.
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    halvings = (len(rows) - 1).bit_length()

    def run() -> None:
        # Triton launches on the current device, not on that of its arguments.
        with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
            _store_zeros[(programs,)](table, len(rows), halvings, word=word, block=_BLOCK)

    return run
