"""How parameters and vectors lie across ranks."""
