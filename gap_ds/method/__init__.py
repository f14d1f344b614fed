"""Which weights are kept, and when: pure functions of a config, shapes and step numbers.

Here live the config (fields.py: its settings; config.py: how they go together; config_file.py: its files), the entries
and budgets of a model (plan.py, partitions.py, distribution.py, pattern.py; entries.py, blocks.py, matrices.py and
names.py choose the entries), the phases of a run (phases.py, schedule.py), and the methods (rules.py: updates and the
record of a method; methods.py: the shipped records). Ranks, files of weights and optimizers do not belong here: every
function gives the same result on every rank, with any sharding, and after every restart. No other folder of gap_ds is
imported.

Read config.py first, then methods.py with the doctest at its top, then schedule.py and plan.py.
"""
