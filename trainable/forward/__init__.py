"""One forward pass for training, sampling and evaluation."""
