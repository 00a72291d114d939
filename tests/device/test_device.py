"""A device over a hub in memory, with a coordinator that is played by the protocol's own code, in a clock of its own."""

from __future__ import annotations

from scripted import World


def test_one_wake_up_contributes_and_leaves(tmp_path):
    world = World(tmp_path)
    device = world.device(world.directory())
    world.ticket()
    report = device.run_once(60)
    print(report)
    print(world.faults)
    assert report.reason == "done"
    assert len(world.taken) == 1
