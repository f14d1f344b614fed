"""One rank's reading of the workers' files: the check of a whole file, and single pieces. No collectives here."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gap_ds.masks import bitmask, codec
from gap_ds.parallel.items import Item, accept, budgets, is_averaged, layout
from gap_ds.parallel.records import Manifest, Records
from gap_ds.parallel.transport import Folder
from gap_ds.storage import safetensors
from gap_ds.storage.errors import error_text, summarize_error

log = logging.getLogger("gap_ds")

#: Bytes of a header beyond the expected ones that are still read, for the error message.
_SLACK = 1 << 16
#: Bytes read at a time.
_CHUNK = 1 << 24
#: Seconds before a file that differs from its manifest is read again.
_AGAIN = 1.0


@dataclass(frozen=True)
class Source:
    """A verified file: its path in the folder, and the bytes (begin, end) of each tensor in it."""

    path: str
    where: dict[str, tuple[int, int]]


class Reader:
    """Reads the files of a round, and counts the bytes.

    Args:
        records: names the files in messages.
    """

    def __init__(self, folder: Folder, records: Records) -> None:
        self._folder, self._records = folder, records
        #: Bytes that this rank has read.
        self.bytes = 0

    # -- a whole file ----------------------------------------------------------------------------------------------

    def verify(self, path: str, items: Sequence[Item], metadata: dict[str, str], manifest: Manifest) -> Source:
        """Read a whole file and compare it with its manifest. A file that differs is read a second time.

        Args:
            items: all tensors that the file must hold; `metadata`: of its header.
        Raises:
            ValueError: the file is damaged, or does not hold exactly these items.
        """
        try:
            return self._verify(path, items, metadata, manifest)
        except (OSError, ValueError) as error:
            log.warning(f"{self._sentence(path, error)}; reading it once more")
        time.sleep(_AGAIN)
        self._folder.refresh()
        try:
            return self._verify(path, items, metadata, manifest)
        except (OSError, ValueError) as error:
            worker = manifest.worker
            raise ValueError(
                f"{self._sentence(path, error)}. To have worker {worker} write it again, delete its manifest "
                f"(worker_{worker}.json) and start that worker again from its checkpoint."
            ) from error

    def _verify(self, path: str, items: Sequence[Item], metadata: dict[str, str], manifest: Manifest) -> Source:
        size = self._folder.size(path)
        if size != manifest.bytes:
            raise ValueError(f"has {size} bytes instead of the {manifest.bytes} of its manifest")
        # Only shared budgets can change the header, so its size is bounded.
        expected = safetensors.header_bytes(safetensors.header_table(layout(items, budgets(items)), metadata))
        first = self._fetch(path, 0, min(8, size))
        start = 8 + safetensors.header_length(first, size, len(expected) + _SLACK)
        text = self._fetch(path, 8, start)
        where = safetensors.offsets(accept(text, size - start, items, metadata))
        digest = hashlib.sha256(first + text)
        for begin in range(start, size, _CHUNK):
            digest.update(self._fetch(path, begin, min(begin + _CHUNK, size)))
        if digest.hexdigest() != manifest.sha256:
            raise ValueError("its SHA-256 is not that of its manifest: it is damaged")
        return Source(path, {name: (start + begin, start + end) for name, (begin, end) in where.items()})

    def _sentence(self, path: str, error: Exception) -> str:
        shown = f"{self._records.path(path)}: "
        return shown + error_text(error).removeprefix(shown)

    # -- pieces ----------------------------------------------------------------------------------------------------

    def masks(self, source: Source, entries: Sequence[Item]) -> dict[str, Tensor]:
        """Return the mask bits of this rank's pieces, cut out of the bytes that cover them."""
        found = {}
        for item in entries:
            first = item.box.start // 8
            covering = self._mask_bytes(source, item, first, max(first, bitmask.nbytes(item.box.end)))
            found[item.name] = bitmask.cut(covering, item.box, first)
        return found

    def _mask_bytes(self, source: Source, item: Item, lo: int, hi: int) -> Tensor:
        """Bytes lo to hi of an entry's mask."""
        begin = source.where[f"{item.name}.mask"][0]
        return safetensors.decode(self._fetch(source.path, begin + lo, begin + hi), torch.uint8)

    def check_masks(self, source: Source, kept: dict[str, int]) -> None:
        """Check that the masks keep as many weights as the file has values; else weights would go to wrong places.

        Args:
            kept: number of kept weights in the mask of each entry, summed over all ranks.
        """
        for name, found in kept.items():
            begin, end = source.where[f"{name}.values"]
            if found != (end - begin) // 4:
                raise ValueError(
                    f"{self._records.path(source.path)}: the mask of {name} keeps {found} weights, and there are "
                    f"{(end - begin) // 4}: it is damaged, or the pieces of the ranks do not make up the parameter"
                )

    def weights(self, source: Source, item: Item, bits: Tensor, before: int | None) -> Tensor:
        """Return this rank's piece of an entry, in fp32.

        Args:
            bits: mask of the piece.
            before: number of kept weights of the entry that come before the piece; None if the pieces are not ranges.
        """
        n, first = bitmask.count(bits), source.where[f"{item.name}.values"][0]
        places = None
        if before is None and n:
            kept = item.box.indices()[bitmask.unpack(bits, item.box.numel)]
            places = bitmask.count_before(self._mask_bytes(source, item, 0, bitmask.nbytes(item.box.total)), kept)
            before, n = int(places[0]), int(places[-1]) + 1 - int(places[0])
        begin = first + 4 * (before or 0)
        values = safetensors.decode(self._fetch(source.path, begin, begin + 4 * n), torch.float32)
        if places is not None:
            values = values[places - places[0]]
        return codec.spread(values, bits, item.box.numel)

    def whole(self, source: Source, item: Item) -> Tensor:
        """Return this rank's piece of a tensor without a mask."""
        width = item.dtype.itemsize
        begin = source.where[item.name][0]
        lo, hi = begin + width * item.box.start, begin + width * item.box.end
        covering = safetensors.decode(self._fetch(source.path, lo, hi), item.dtype)
        return covering if item.box.is_range else covering[item.box.indices() - item.box.start]

    def unpartitioned(self, sources: Sequence[Source], item: Item, rule: str) -> Tensor:
        """Return this rank's piece of a tensor in no partition: the mean over the workers, or the value of worker 0.

        The sum is in fp64, in the order of the workers, and rounded once: it is the same on every worker bit for bit,
        and the mean of equal values is that value.
        """
        first = self.whole(sources[0], item)
        if not is_averaged(item, rule):
            return first
        total = first.double()
        for source in sources[1:]:
            total += self.whole(source, item)
        return (total / len(sources)).to(item.dtype)

    def _fetch(self, path: str, begin: int, end: int) -> bytes:
        """Return exactly the bytes [begin, end) of a file."""
        if begin == end:
            return b""
        try:
            data = self._folder.read(path, begin, end)
        except OSError as error:
            raise ValueError(f"{self._records.path(path)}: cannot be read ({summarize_error(error)})") from error
        if len(data) != end - begin:
            raise ValueError(
                f"{self._records.path(path)}: is truncated: {len(data)} bytes at {begin} instead of {end - begin}"
            )
        self.bytes += len(data)
        return data
