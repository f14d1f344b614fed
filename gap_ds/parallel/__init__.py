"""The exchange of parallel GaP: once per round each worker gives its pruned partition away and takes the others'.

    EXCHANGE/run.json                        which run the folder belongs to: signature, plan, tensors, workers, `run`
    EXCHANGE/start.json                      the weights that its workers began with, as a fingerprint
    EXCHANGE/round_R/worker_I.safetensors    partition I as worker I trained and pruned it, and the shared tensors
    EXCHANGE/round_R/worker_I.json           manifest: size and SHA-256 of that file; written last, so the file is whole

EXCHANGE is a folder that all workers reach, or a URL that fsspec knows (s3://..., gs://..., sftp://...). A worker is an
ordinary job of any number of ranks, on any backend. The compact form holds, of a pruned entry, the bits of its mask and
the kept weights alone; everything else whole. So a file has exactly

    8 + header + sum over entries of (ceil(numel / 8) + 4 * kept) + 4 * other weights     bytes

Files are written one tensor at a time and read shard-wise: a rank reads the bytes that cover its own pieces, and none
ever holds a full model. Nothing that is read is unpickled, and no name in a file becomes a path: a header is accepted
only if it is the one that the plan expects, which also bounds what is allocated for it.

    worker.py    ParallelWorker and Exchange: publish, wait, read
    identity.py  what the workers of a run have alike, and what differs in another run
    file.py      what is in a file, and what is accepted as one; pure functions
    folder.py    local folders and URLs
    ranks.py     work of one rank that all wait for

N weights of a piece or parameter, E entries, K workers (one per partition), R ranks of a job.
"""

from gap_ds.parallel.exchange import Exchange
from gap_ds.parallel.items import Item, Received, items_of
from gap_ds.parallel.worker import ParallelWorker

__all__ = ["Exchange", "Item", "ParallelWorker", "Received", "items_of"]
