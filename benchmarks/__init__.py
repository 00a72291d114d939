"""What things cost, measured: each a script with `--json`."""
