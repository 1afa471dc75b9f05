"""How good a correction is."""
