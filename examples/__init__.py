"""Models to start from, one round step by step, and the demo."""
