"""`GaPPlugin`: a model trained sparse, or kept sparse, by axolotl.

    plugins:
      - gap_ds.hf.axolotl.GaPPlugin
    gap: cyclic_80

`gap` is what `GaPCallback` takes: the name of a shipped config, a file, or the settings themselves. Importing this file
needs axolotl; nothing else in gap_ds imports it (tested with axolotl 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from gap_ds.hf.callback import GaPCallback
from gap_ds.method.config import GaPConfig


class GaPArguments(BaseModel):
    """The part of axolotl's config that the plugin adds.

    Attributes:
        gap: name of a shipped config, path of a JSON or YAML file, or a mapping of settings.
    """

    gap: str | dict[str, Any]

    @field_validator("gap")
    @classmethod
    def _valid(cls, gap: str | dict[str, Any]) -> str | dict[str, Any]:
        GaPConfig.load(gap)
        return gap


class GaPPlugin(BasePlugin):  # type: ignore[misc]
    """Gives axolotl's trainer a `GaPCallback` with the config under `gap`."""

    def get_input_args(self) -> str:
        """Return the path of the class of settings, which axolotl adds to its own."""
        return f"{GaPArguments.__module__}.{GaPArguments.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[GaPCallback]:
        """Return the callback."""
        # axolotl's mappings answer any name, also those of settings that are not given.
        return [GaPCallback(dict(cfg.gap) if isinstance(cfg.gap, Mapping) else cfg.gap)]
