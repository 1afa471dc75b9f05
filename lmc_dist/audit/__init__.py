"""The audit: a hash-chained log of what was done, its digests, and what is checked of it (docs/audit.md)."""
