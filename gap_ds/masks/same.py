"""Comparisons by identity of objects with those that were looked up before: a thousand in some microseconds.

A step asks this of all that its pieces were made from. Lists of fewer objects than are worth a call into C, and all
where there is no compiler, are compared by Python, which takes two to five times as long. Tensors are never compared by
==, which compares their elements.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gap_ds.masks import cpu

SOURCE = Path(__file__).with_name("same.c")
#: Objects from which on the loops in C are used.
COMPILED = 64
_DTYPE = attrgetter("dtype")


@functools.cache
def _loops() -> Any:
    """The loops in C, or None."""
    # They borrow references, which no other thread may free meanwhile.
    locked = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
    return cpu.compiled(SOURCE, _checked) if locked else None


def _loops_for(count: int) -> Any:
    return _loops() if count >= COMPILED else None


def same_items(found: Sequence[Any], before: list[Any]) -> bool:
    """True if a sequence holds the same objects in the same order as a list."""
    if (loops := _loops_for(len(before))) is not None and isinstance(found, list):
        return bool(loops.same_items(found, before))
    return len(found) == len(before) and all(map(is_, found, before))


def same_values(found: dict[Any, Any], keys: list[Any], before: list[Any]) -> bool:
    """True if a dict holds under each key the object that it held before."""
    if (loops := _loops_for(len(keys))) is not None:
        return bool(loops.same_values(found, keys, before))
    return all(map(is_, map(found.get, keys), before))


def same_slots(found: list[dict[Any, Any]], keys: list[Any], before: list[Any]) -> bool:
    """True if each dict holds under its key the object that it held before."""
    if (loops := _loops_for(len(keys))) is not None:
        return bool(loops.same_slots(found, keys, before))
    return all(map(is_, map(dict.get, found, keys), before))


class Places:
    """The addresses and dtypes of some tensors; it holds no tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # An address alone might have been freed, and given to a tensor of another dtype.
        self._dtypes = list(map(_DTYPE, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._table = np.array(self._addresses, np.uint64)
        self._at = self._table.ctypes.data

    def same(self, tensors: list[Tensor]) -> bool:
        """True if these tensors are where those were, and of the same dtypes."""
        if (loops := _loops_for(len(tensors))) is not None:
            return bool(loops.same_places(tensors, Tensor.data_ptr, "dtype", self._at, self._dtypes))
        return list(map(Tensor.data_ptr, tensors)) == self._addresses and list(map(_DTYPE, tensors)) == self._dtypes


def _checked(path: Path) -> Any:
    """Loads the loops; RuntimeError if they do not tell what Python tells."""
    loops = ctypes.PyDLL(str(path))
    one, pointer = ctypes.py_object, ctypes.c_void_p
    for name, arguments in {
        "same_items": [one, one],
        "same_values": [one, one, one],
        "same_slots": [one, one, one],
        "same_places": [one, one, one, pointer, one],
    }.items():
        function = getattr(loops, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    a, b = object(), object()
    tensors = [torch.zeros(2, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    places = Places(tensors)
    at = places._at
    swapped: Mapping[str, Any] = {"x": b, "y": a}
    answers = [
        loops.same_items([a, b], [a, b]) and not loops.same_items([a, b], [b, a]) and not loops.same_items([a], [a, b]),
        loops.same_values({"x": a, "y": b}, ["x", "y"], [a, b]) and not loops.same_values(swapped, ["x", "y"], [a, b]),
        not loops.same_values({"x": a}, ["x", "y"], [a, b]),
        loops.same_slots([{"x": a}, {"x": b}], ["x", "x"], [a, b]),
        not loops.same_slots([{"x": a}, {"y": b}], ["x", "x"], [a, b]),
        loops.same_places(tensors, Tensor.data_ptr, "dtype", at, [torch.float32, torch.bfloat16]),
        not loops.same_places(tensors, Tensor.data_ptr, "dtype", at, [torch.float32, torch.float16]),
        not loops.same_places(tensors[::-1], Tensor.data_ptr, "dtype", at, [torch.bfloat16, torch.float32]),
    ]
    if not all(answers):
        raise RuntimeError("comparisons by identity are wrong")
    return loops
