"""What a checkpoint costs the training loop, side by side with every peer: `python -m benchmarks`."""
