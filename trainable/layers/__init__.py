"""Norms and MLPs of a block, whose outputs are quantised for what reads them."""
