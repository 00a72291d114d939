"""The main job: a fleet of real processes trains on real data. `python -m examples.demo`, or `make demo`."""
