"""What a deletion will cost, before it is run: facts, hardware, memory, seconds, strategies (docs/scaling.md)."""
