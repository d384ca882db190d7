"""One script for each sentence on speed or memory in the README: `python -m bench.claims.NAME [--check]`."""
