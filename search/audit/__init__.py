"""What is wrong in somebody else's noise run: files are read, rules look, findings come out."""
