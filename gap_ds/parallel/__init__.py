"""Parallel GaP (P-GaP): K jobs, each training one dense partition, that exchange partitions at the end of a round.

Read `exchange` first: publish, wait, read. It calls `items` (the content of a file), `records` (run.json, start.json,
manifests), `reading`, `transport` (folders and URLs), `identity` (which run is it?) and `worker` (`ParallelWorker`,
which you pass to the engine). `launch` starts the jobs on one machine.

    EXCHANGE/run.json, start.json            the run that the folder belongs to, and its first weights, as fingerprints
    EXCHANGE/round_R/worker_I.safetensors    partition I as worker I has pruned it, and the tensors in no partition
    EXCHANGE/round_R/worker_I.json           manifest: size and SHA-256 of that file; written last

A file has 8 + header + sum over entries (ceil(numel / 8) + 4 * kept) + 4 * other weights bytes. It is written tensor by
tensor; a rank reads only the bytes of its pieces, so none ever holds a full model. Files are untrusted: a header must
be exactly the expected one, nothing is unpickled, and no name in a file becomes a path.

Nothing here knows the training loop, the schedule or the optimizer; only `exchange` and `identity.of_weights` call
collectives.
N weights of a piece or parameter, E entries, K workers (one per partition), R ranks of a job.
"""

from gap_ds.parallel.exchange import Exchange
from gap_ds.parallel.items import Item, Received, items_of
from gap_ds.parallel.worker import ParallelWorker

__all__ = ["Exchange", "Item", "ParallelWorker", "Received", "items_of"]
