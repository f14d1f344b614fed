"""The training loop: joins method (what is kept), sharding (where it lies) and masks (the bits).

Read `engine.py` first, then `boundary.py` (what happens between two phases) and `mask_state.py` (this rank's masks;
`selector.py` selects new ones). `updates.py` is what each step does, by the lists of `piece_lists.py` and the looks of
`watched.py`. `build.py` makes a `Run` (`run.py`) once, after `checks.py` has found nothing that does not go together;
`initialize.py` builds a DeepSpeed engine too; `saving.py` stores and restores a run. `consistency.py` checks that ranks
agree, `structure.py` that the model is still the one that was planned. `learning_rate.py`, `step_sizes.py`,
`regrowth.py` and `last_values.py` are settings of the config beside the masks; `copies.py` masks a copy of the model.
Optional parts are observers (`observer.py`): `history.py` and `boundary_losses.py` record masks and losses for reports,
`exchanging.py` is a worker of parallel GaP.

No file formats live here (checkpoint, export, parallel), no private names of sharding libraries (sharding/backends),
and no rule of a method (method). Only `hf`, `report` and `cli` may import this folder.
"""
