"""Export: a PyTorch model becomes a bundle that a device can train."""
