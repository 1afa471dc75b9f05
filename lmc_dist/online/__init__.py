"""Deletion while training runs: a queue of requests, corrections at step boundaries, one ledger (docs/online.md)."""
