"""What the commands are made of: data, the training loop and its records, metrics."""
