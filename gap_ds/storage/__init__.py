"""Files: one writer and one reader of safetensors, one of JSON, one way to replace a file or a folder, one hash.

    errors       errors and untrusted names as text
    atomic       write aside, flush, rename: a file or a folder is whole or absent; SHA-256
    json         read against a pydantic model, write
    safetensors  header, tensor-by-tensor writer, untrusted reader

Read `atomic` first. Nothing here knows a mask, a plan, a rank or a run: those files are in `checkpoint`, `export` and
`parallel`, which also decide what a file holds.
"""
