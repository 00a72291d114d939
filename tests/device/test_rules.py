"""The owner's rules: read when they are asked for, again when the file changes, never while a round uses them."""

import numpy as np
import pytest
from scripted import World

from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.privacy.ledger_entry import LedgerDamaged
from edge_sdk.rules import RulesFile, read_policy
from edge_sdk.store import Store


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def rules(world):
    path, owner = world.directory(), world.identities[0].public_key
    store = Store(path, owner, world.authority.public_key)
    rules = RulesFile(path, owner, store)
    yield rules
    rules.close()
    store.close()


def test_a_file_that_was_changed_is_read_again_with_a_ledger_of_its_own(world, rules):
    before = rules.read()
    assert rules.read() is before
    world.write_policy(world.path / "device0", min_honest=37)
    after = rules.read()
    assert (before.policy.min_honest, after.policy.min_honest) == (2, 37)
    assert after.ledger is not before.ledger


def test_a_policy_may_begin_with_the_mark_that_some_editors_put_in_front(world):
    path = world.directory() / "policy.toml"
    text = path.read_text()
    before = read_policy(path.parent)
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read_policy(path.parent) == before
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ParameterError, match=r"policy\.toml: not UTF-8 .*: save it as UTF-8"):
        read_policy(path.parent)


def test_rules_in_use_stay_whatever_becomes_of_the_file(world, rules):
    before = rules.read()
    with rules.in_use():
        world.write_policy(world.path / "device0", min_honest=37)
        assert rules.read() is before
    assert rules.read().policy.min_honest == 37


def test_a_round_that_fails_leaves_the_rules_free(world, rules):
    rules.read()
    with pytest.raises(PeerError), rules.in_use():
        raise PeerError("the graph misbehaves")
    world.write_policy(world.path / "device0", min_honest=37)
    assert rules.read().policy.min_honest == 37


def test_a_longer_ledger_that_was_shown_once_is_missed_by_each_reading_after_it(world, rules):
    round_ = world.ticket()
    world.contribute_as(round_, 0, np.zeros(round_.ticket.dimension, dtype=np.uint64))
    (contribution,) = world.taken.values()
    with pytest.raises(LedgerDamaged, match="rolled back: 0 entries, but 1 were anchored"):
        rules.hold_against(contribution.header)
    for _ in range(2):
        with pytest.raises(LedgerDamaged, match="rolled back"):
            rules.read()
        rules.close()


def test_nothing_is_opened_before_it_is_asked_for(tmp_path, world):
    store = Store(world.directory(), world.identities[0].public_key, world.authority.public_key)
    nowhere = RulesFile(tmp_path / "nowhere", world.identities[0].public_key, store)
    assert nowhere.stamp == ()
    nowhere.close()
    with pytest.raises(ParameterError, match=r"policy\.toml"):
        nowhere.read()
    store.close()
