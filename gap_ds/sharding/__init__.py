"""Where a rank's piece of each weight lies, and how ranks talk. The only folder that uses process groups.

Read `shard.py` first: one record describes a rank's piece of a parameter, whatever library shards it. `comm.py` wraps
the few collectives that are needed, `rank_zero.py` has work that rank 0 does alone, and `mesh.py` finds boxes and
groups of DTensors. `optimizers.py` and `meanings.py` know the state of optimizers, and `moments.py` changes it with a
mask. `backends/` is the only place with private names of DeepSpeed, FSDP and fairscale: for each of them one function
returns a `Backend`, a value that everything above uses alike.

No masks and no methods live here. Above this folder only the reading of a checkpoint asks which backend it has.
"""
