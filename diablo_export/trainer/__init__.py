"""Training of blocks in torch."""
