"""Side-by-side measurements and full replicates; they write their results to docs/."""
