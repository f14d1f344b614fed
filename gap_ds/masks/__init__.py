"""Masks of weights: one bit a weight, and the exact selection of the kept ones.

    bitmask    packs, counts and applies masks; read it first
    box        which elements of a tensor a rank has: the only geometry
    selection  exact top-k over shards, for all budgets of a boundary at once
    groups     the same for N:M patterns and blocks
    passes     what it does to a chunk of weights: loops in C, else PyTorch
    tally      its counts on an accelerator
    packing    kept values of a piece, packed in the order of the bits
    codec      bits and kept values of a tensor in a file
    legality   checks that weights or masks follow a pattern
    local      the part of a tensor that lies on this rank
    same       comparisons by identity, of what a step works on with what it was (same.c)
    cpu, cpu.c loops in C for CPUs, compiled once and kept in the user's cache
    triton     the kernels for GPUs

Everything works on local pieces. torch.distributed, plans and schedules do not belong here: a selection gets the sum
over the ranks as an argument.
"""
