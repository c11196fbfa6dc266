"""Who generates, and whether it computes what training computes."""
