"""A run on disk: everything that decides its next step.

    folder      FOLDER/TAG: saved whole or not at all, found, checked for damage
    run_state   state.json and rng_R.json: config, place in the schedule, random state
    masks_file  masks, and values of pruned weights, in coordinates of the full parameters
    inherited   masks of another run of the same model
    portable    weights and optimizer state for another number of ranks or another backend
    foreign     weights from a sharding library's own checkpoint, read by one process
    inspect     counts of a checkpoint, compared with its header, the budgets and the schedule

Read `folder` first. Nothing here decides when to save, and no final model is written here: see `training`, `export`.
"""

from gap_ds.checkpoint.folder import candidates, damage, find, find_whole, is_masks_alone, newest, save
from gap_ds.checkpoint.inherited import inherited_budgets, read_inherited
from gap_ds.checkpoint.masks_file import kept_weights, read_masks, read_values, write_masks, write_values

__all__ = [
    "candidates",
    "damage",
    "find",
    "find_whole",
    "inherited_budgets",
    "is_masks_alone",
    "kept_weights",
    "newest",
    "read_inherited",
    "read_masks",
    "read_values",
    "save",
    "write_masks",
    "write_values",
]
