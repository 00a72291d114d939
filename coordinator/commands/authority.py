"""`authority`: the steps of a fleet authority whose key lives apart, here and where the key is."""

from __future__ import annotations

import argparse
import os
import time

from coordinator.commands.directory import open_store
from coordinator.commands.output import print_object, print_result, say


def init(options: argparse.Namespace) -> int:
    """Make the authority's key, and its settings beside it."""
    from coordinator.authority import init_key, settings_path

    key = init_key(options.out).public_key.hex()
    if options.json:
        print_object({"authority": key, "key": str(options.out), "settings": str(settings_path(options.out))})
    else:
        print(key)
        say(f"what it decides is in {settings_path(options.out)}; coordinators take it by `init --authority {key}`")
    return 0


def roster(options: argparse.Namespace) -> int:
    """On the coordinator: write who is enrolled."""
    from coordinator.authority import write_roster
    from coordinator.serving import Directory
    from coordinator.task import load

    directory = Directory.open(options.dir)
    store = open_store(options)
    try:
        with store.reading() as rows:
            groups = [load(row)[1].groups for row in rows.tasks() if row.state not in ("done", "removed")]
        body = write_roster(
            options.out, store, directory.identity, directory.authority_key, directory.config.fleet, groups
        )
    finally:
        store.close()
    print_result(options, {"out": str(options.out), "devices": len(body.devices), "helpers": len(body.helpers)})
    return 0


def epoch(options: argparse.Namespace) -> int:
    """Where the key is: freeze that roster, then draw, and sign."""
    from coordinator.authority import make_epoch

    drawn = make_epoch(options.key, options.roster, options.out, time.time(), os.urandom)
    print_result(
        options,
        {
            "out": str(options.out), "number": drawn.number, "devices": drawn.devices, "members": drawn.members,
            "added": list(drawn.added), "removed": list(drawn.removed),
        },
    )  # fmt: skip
    return 0


def install(options: argparse.Namespace) -> int:
    """On the coordinator: put a signed epoch in force."""
    from coordinator.authority import install_epoch
    from coordinator.serving import Directory

    directory = Directory.open(options.dir)
    store = open_store(options)
    try:
        row = install_epoch(store, options.epoch, directory.authority_key, directory.identity.public_key, time.time())
    finally:
        store.close()
    print_result(options, {"number": row.number, "devices": len(row.roster)})
    return 0
