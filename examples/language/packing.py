"""Pack documents into rows of one length.

The documents lie behind each other in one stream of tokens, which is cut every `context` tokens. Rows overlap by one
token, so every token of a document except its first is predicted exactly once, whatever the length of the rows.

Shapes: R rows, T tokens of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common.cross_entropy import IGNORE
from common.sampling import PADDING
from torch import Tensor


class Packed:
    """Documents as rows of `context` tokens.

    Position ids begin at 0 with every document and every row. With `position_ids` and without an attention mask, the
    models of transformers let no token attend to another document. With `across`, positions run on to the end of the
    row, and tokens attend to the documents before theirs. In both cases the same tokens are predicted.

    Args:
        documents: token ids of each document, with its start and end tokens.
    Raises:
        ValueError: there is nothing to predict.
    """

    def __init__(self, documents: Sequence[np.ndarray], context: int, *, across: bool = False) -> None:
        self._setup(list(documents), np.array([len(ids) for ids in documents], np.int64), context, across)

    @classmethod
    def of(cls, encoded: Any, context: int, *, across: bool = False) -> Packed:
        """Return the rows of a data set made by `documents.encode`. The token ids stay on disk."""
        column = encoded.with_format("arrow").data.column("input_ids")
        chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        packed = cls.__new__(cls)
        packed._setup(chunks, np.concatenate([np.zeros(0, np.int64), *lengths]), context, across)
        return packed

    def _setup(self, chunks: list[np.ndarray], lengths: np.ndarray, context: int, across: bool) -> None:
        if context < 2:
            raise ValueError(f"a context of {context} tokens: must be at least 2. Set --context.")
        ends = np.cumsum(lengths, dtype=np.int64)
        self._chunks = chunks
        self._bounds = np.cumsum([0, *(len(chunk) for chunk in chunks)], dtype=np.int64)
        self._starts = np.unique(np.concatenate([np.zeros(1, np.int64), ends[:-1]]))
        self._total = int(ends[-1]) if len(ends) else 0
        self._context, self._across = context, across
        count = -(-max(0, self._total - 1) // context)
        # A row predicts its tokens 1 to T of the stream; starts of documents are not predicted.
        edges = np.minimum(np.arange(count + 1) * context, self._total - 1)
        #: Predicted tokens of each row, (R,).
        self.predicted = np.diff(edges) - np.diff(np.searchsorted(self._starts, edges, side="right"))
        if not self.predicted.sum():
            raise ValueError("the documents have no tokens to predict. Set --dataset.")

    def __len__(self) -> int:
        return len(self.predicted)

    def rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return `input_ids`, `position_ids` and `labels`, each (R, T). The label of a position is the next token.

        Labels without a prediction are -100. The last row is filled up to T. PADDING is a row without predictions.
        """
        parts = [self._row(number) for number in numbers]
        names = ("input_ids", "position_ids", "labels")
        return {
            name: torch.from_numpy(np.stack(found)) for name, found in zip(names, zip(*parts, strict=True), strict=True)
        }

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        width, blank = self._context, number == PADDING
        first = 0 if blank else number * width
        last = min(first + width, self._total - 1)
        tokens = self._read(first, last + 1)
        ids, positions, labels = (np.zeros(width, np.int64) for _ in range(3))
        labels[:] = IGNORE
        size = last - first
        ids[:size] = tokens[:-1]
        positions[:] = np.arange(width)
        begins = self._starts[slice(*np.searchsorted(self._starts, (first, last + 1)))] - first
        if not self._across:
            of_document = np.zeros(width, np.int64)
            of_document[begins[begins < size]] = begins[begins < size]
            if size < width:  # what fills the last row is apart from its documents
                of_document[size] = size
            positions -= np.maximum.accumulate(of_document)
        if not blank:
            labels[:size] = tokens[1:]
            labels[begins[begins > 0] - 1] = IGNORE
        return ids, positions, labels

    def _read(self, first: int, last: int) -> np.ndarray:
        """Return tokens `first` to `last` of the stream, which may lie in several chunks."""
        found = []
        for chunk in range(int(np.searchsorted(self._bounds, first, side="right")) - 1, len(self._chunks)):
            begin = int(self._bounds[chunk])
            if begin >= last:
                break
            found.append(self._chunks[chunk][max(0, first - begin) : last - begin])
        return np.concatenate(found)
