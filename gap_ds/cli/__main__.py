"""`python -m gap_ds.cli`, where the script `gap-ds` is not on the path."""

from gap_ds.cli import main

main()
