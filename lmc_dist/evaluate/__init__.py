"""How good a correction is: distances in weights, and what models do when asked."""
