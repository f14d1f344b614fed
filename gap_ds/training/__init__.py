"""The training loop: joins method (what is kept), sharding (where it lies) and masks (the bits).

Read `engine.py` first, then `boundary.py` (what happens between two phases) and `mask_state.py` (this rank's masks;
`selector.py` selects new ones). `updates.py` is what each step does, by the lists of `piece_lists.py` and the looks of
`watched.py`.
`build.py` makes a `Run` once, downward; `saving.py` stores and restores one. `consistency.py` checks that ranks agree;
`learning_rate.py` and `optimizer_state.py` hold what training changes besides weights. Optional parts are observers
(`observer.py`): `history.py` records masks for reports, `exchanging.py` is a worker of parallel GaP.

No file formats live here (checkpoint, export, parallel), no private names of sharding libraries (sharding/backends),
and no rule of a method (method). Only `hf`, `report` and `cli` may import this folder.
"""
