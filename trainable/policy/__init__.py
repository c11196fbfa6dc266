"""The model under study: where it comes from, what is wrapped, by which names it is spoken of."""
