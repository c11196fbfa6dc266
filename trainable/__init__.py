"""One trial: GRPO with 4-bit linear layers and noise in the rollouts, and what it proves about itself."""
