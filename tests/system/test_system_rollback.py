"""A device's directory put back to an older copy, in a running installation: the run ends before anything is spent."""

import shutil

from installation import command

from edge_sdk.__main__ import main as device_main

HELPERS = 3


def test_a_device_whose_directory_was_put_back_ends_by_itself_and_its_newest_copy_goes_on(install, tmp_path):
    it = install("--broker", "mosquitto")
    it.populate(helpers=HELPERS)
    own, old, newest = it.directory / "device0", tmp_path / "old", tmp_path / "newest"
    for name in sorted(path.name for path in it.directory.glob("device*")):
        it.run(name)
    it.add_task(rounds=20)
    it.wait("device0", "delivered")
    it.kill("device0")
    shutil.copytree(own, old)
    place = it.run("device0")
    for _ in range(2):  # a round that the copy knew of may be the first
        place = it.wait("device0", "delivered", since=place)
    it.kill("device0")
    shutil.copytree(own, newest)

    shutil.rmtree(own)
    shutil.copytree(old, own)
    ledger = (own / "ledger").read_bytes()
    it.kill("coordinator")  # what it shows is on its disk
    it.serve()
    it.run("device0")
    assert it.wait_end("device0") == 1
    assert "the ledger was rolled back" in it.log("device0")
    assert "enrol it anew" in it.log("device0")
    assert (own / "ledger").read_bytes() == ledger

    shutil.rmtree(own)
    shutil.copytree(newest, own)
    it.wait("device0", "delivered", since=it.run("device0"))
    assert command(device_main, "ledger", "--dir", str(own))[0]["entries"] > 4
