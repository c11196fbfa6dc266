"""What a person sees: the command line, the live table, pictures."""
