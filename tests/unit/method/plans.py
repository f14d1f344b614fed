"""Summaries of plans of model classes, and those of timm's models, which a process of its own builds.

python plans.py NAME ...    print {name: summary} of timm's models as JSON

timm needs torchvision, whose builds fit one build of torch each; its models use none of it, so a stand-in will do.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gap_ds.method import plan
from gap_ds.method.config import GaPConfig

CONFIG = GaPConfig(sparsity=0.8, partitions=2, phase_steps=1, rounds=1, finetune_steps=1)
#: Where `make env` puts timm, out of sight of transformers, which would use it.
TIMM = Path(sys.prefix) / "timm"


def summary(name: str, model: nn.Module) -> str:
    """Summary of the plan of a model, or the message with which it is refused."""
    try:
        found = plan.build(model, CONFIG)
    except ValueError as error:
        return f"refused: {error}"
    for entry in found.entries:
        matrix = entry.shape if len(entry.shape) == 2 else (entry.shape[0], entry.numel // entry.shape[0])
        assert min(matrix) > 1 and entry.shape[1] > 1, f"{name}: {entry.name} {entry.shape} is no matrix"
    return found.summary()


class _Name(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _StandIn:
    """Finds modules of torchvision in which every name is an empty class."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def timm_summaries(names: Sequence[str]) -> dict[str, str]:
    """Summaries of timm's models by name; with no name, those of the first and the last model of each family."""
    warnings.filterwarnings("ignore")
    sys.meta_path.insert(0, _StandIn())  # type: ignore[arg-type]
    sys.path.append(str(TIMM))
    timm = importlib.import_module("timm")

    def build(name: str) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name)
            return model

    families = [sorted(timm.list_models(module=module)) for module in sorted(timm.list_modules())]
    found = names or sorted({name for models in families if models for name in (models[0], models[-1])})
    return {name: summary(name, build(name)) for name in found}


if __name__ == "__main__":
    json.dump(timm_summaries(sys.argv[1:]), sys.stdout)
