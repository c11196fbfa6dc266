"""A trial in its folder: what is written there and what is read."""
