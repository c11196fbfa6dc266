"""Questions, and what an answer is worth."""
