import os
import stat

import msgspec
import pytest

from coordinator import authority as module
from coordinator.authority import (
    EpochFile,
    LocalAuthority,
    RemoteAuthority,
    RosterFile,
    frozen_of,
    init_key,
    install_epoch,
    make_epoch,
    settings_path,
    sign_epoch,
    state_path,
    write_roster,
)
from coordinator.config import AuthorityTable
from coordinator.rows import EpochRow
from coordinator.store import Store
from edge_sdk.crypto.identity import Identity
from edge_sdk.errors import ParameterError, PeerError
from edge_sdk.protocol import messages
from edge_sdk.protocol.authority import FIRST, FleetEpoch, Roster, beacon
from edge_sdk.protocol.messages import Epoch, Signed

NOW = 1_800_000_000
AUTHORITY, COORDINATOR = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
DEVICES = [Identity(bytes([100 + i]) * 32).public_key for i in range(8)]
HELPERS = [Identity(bytes([200 + i]) * 32).public_key for i in range(3)]


def local(**settings):
    return LocalAuthority(AUTHORITY, AuthorityTable(**settings), COORDINATOR.public_key, os.urandom)


def row_of(signed, devices):
    epoch = FleetEpoch(AUTHORITY.public_key, signed)
    return EpochRow(epoch.number, epoch.id, messages.encode(signed), Roster(devices).keys, float(NOW))


# Beside the coordinator


def test_an_epoch_is_over_the_roster_that_was_asked_for_and_expires_as_configured():
    epoch = FleetEpoch(AUTHORITY.public_key, local(epoch_days=2.0).next_epoch(DEVICES, [], [1], None, NOW))
    assert epoch.frozen.roster_root == Roster(DEVICES).root
    assert epoch.frozen.coordinator == COORDINATOR.public_key
    assert (epoch.number, epoch.frozen.previous, epoch.frozen.expires_s) == (1, FIRST, NOW + 2 * 86_400)
    assert [member.key for member in epoch.members] == sorted(DEVICES)


def test_epochs_are_a_chain_and_every_beacon_is_fresh():
    first = row_of(local().next_epoch(DEVICES, [], [1], None, NOW), DEVICES)
    second = FleetEpoch(AUTHORITY.public_key, local().next_epoch(DEVICES[:-1], [], [1], first, NOW))
    assert (second.number, second.frozen.previous) == (2, first.id)
    again = FleetEpoch(AUTHORITY.public_key, local().next_epoch(DEVICES[:-1], [], [1], first, NOW))
    assert second.beacon != again.beacon


def test_helpers_serve_exactly_where_the_committee_is_helpers():
    epoch = FleetEpoch(AUTHORITY.public_key, local(committee="helpers").next_epoch(DEVICES, HELPERS, [1], None, NOW))
    assert [member.key for member in epoch.members] == sorted(HELPERS)
    epoch = FleetEpoch(AUTHORITY.public_key, local().next_epoch(DEVICES, HELPERS, [1], None, NOW))
    assert not set(HELPERS) & {member.key for member in epoch.members}


@pytest.mark.parametrize(
    ("settings", "devices", "helpers", "reason"),
    [
        ({}, DEVICES[:3], [], "enrol 4"),
        ({"committee": "helpers"}, DEVICES, [], "helpers"),
        ({"committee": "helpers"}, DEVICES, HELPERS[:2], "at least 3"),
        ({"committee": "drawn", "committee_size": 30}, DEVICES, [], "cannot draw 30"),
        ({"corrupt_devices": 8}, DEVICES, [], "corrupt_devices"),
    ],
)
def test_a_roster_without_a_safe_committee_is_an_error_with_what_would_do(settings, devices, helpers, reason):
    with pytest.raises(ParameterError, match=reason):
        local(**settings).next_epoch(devices, helpers, [1], None, NOW)


def test_group_counts_that_the_roster_is_too_small_for_are_left_out_unless_a_task_asks():
    authority = local(group_counts=(1, 2, 16))
    epoch = FleetEpoch(AUTHORITY.public_key, authority.next_epoch(DEVICES, [], [1], None, NOW))
    assert set(epoch.corrupt_in_group) == {1, 2}
    epoch = FleetEpoch(AUTHORITY.public_key, authority.next_epoch(DEVICES, [], [4], None, NOW))
    assert set(epoch.corrupt_in_group) == {1, 2, 4}
    with pytest.raises(ParameterError, match="groups"):
        authority.next_epoch(DEVICES, [], [16], None, NOW)


def test_entropy_is_drawn_after_the_frozen_roster_was_published_and_not_before():
    order = []

    def entropy(count):
        order.append("entropy")
        return os.urandom(count)

    sign_epoch(
        AUTHORITY, AuthorityTable(), coordinator=COORDINATOR.public_key, devices=DEVICES, helpers=[], groups=[1],
        number=1, previous=FIRST, now_s=NOW, entropy=entropy, published=lambda frozen: order.append("published"),
    )  # fmt: skip
    assert order == ["published", "entropy"]


def test_a_remote_authority_signs_nothing():
    assert RemoteAuthority(AUTHORITY.public_key).next_epoch(DEVICES, [], [1], None, NOW) is None


# Apart


class Apart:
    def __init__(self, directory):
        self.here, self.there = directory / "coordinator", directory / "authority"
        self.there.mkdir()
        self.store = Store(self.here)
        self.key = self.there / "fleet.key"
        self.authority = init_key(self.key)
        self.enrol(DEVICES)

    def enrol(self, keys, role="device"):
        with self.store.transaction() as rows:
            for key in keys:
                rows.add_device(key, role, [], NOW)

    def roster(self, groups=(1,), coordinator=COORDINATOR):
        path = self.there / "roster.json"
        write_roster(path, self.store, coordinator, self.authority.public_key, "test", groups)
        return path

    def epoch(self, path=None, entropy=os.urandom):
        path = path or self.roster()
        return make_epoch(self.key, path, self.there / "epoch.json", NOW, entropy)

    def install(self, path=None, coordinator=COORDINATOR, now_s=NOW):
        return install_epoch(
            self.store, path or self.there / "epoch.json", self.authority.public_key, coordinator.public_key, now_s
        )

    @property
    def installed(self):
        with self.store.reading() as rows:
            return rows.newest_epoch()


@pytest.fixture
def apart(tmp_path):
    apart = Apart(tmp_path)
    yield apart
    apart.store.close()


def edited(path, kind, **changes):
    file = msgspec.json.decode(path.read_bytes(), type=kind)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(file, **changes)))
    return path


def test_files_carry_an_epoch_from_roster_to_force_and_the_next_one_chains(apart):
    drawn = apart.epoch()
    assert (drawn.number, drawn.devices, drawn.members, len(drawn.added), drawn.removed) == (1, 8, 8, 8, ())
    first = apart.install()
    assert apart.installed == first
    with apart.store.transaction() as rows:
        rows.revoke(DEVICES[0], NOW)
    drawn = apart.epoch()
    assert (drawn.number, drawn.added, drawn.removed) == (2, (), (DEVICES[0].hex(),))
    second = apart.install()
    assert FleetEpoch(apart.authority.public_key, messages.decode(Signed, second.signed)).frozen.previous == first.id
    assert DEVICES[0] not in second.roster


def test_the_key_is_its_owner_s_alone_and_is_never_replaced(apart):
    assert stat.S_IMODE(apart.key.stat().st_mode) == 0o600
    with pytest.raises(ParameterError, match="never replaced"):
        init_key(apart.key)


def test_the_frozen_roster_is_on_disk_before_the_beacon_is_drawn(apart):
    seen = []

    def entropy(count):
        seen.append(frozen_of(apart.there / "epoch.json.frozen", apart.authority.public_key))
        assert not (apart.there / "epoch.json").exists()
        return bytes(count)

    apart.epoch(entropy=entropy)
    signed = messages.decode(Signed, apart.install().signed)
    epoch = messages.decode(Epoch, signed.body)
    assert seen == [epoch.frozen]
    assert FleetEpoch(apart.authority.public_key, signed).beacon == beacon(seen[0], bytes(32))


def test_the_authority_decides_by_its_own_settings(apart):
    text = "\ufeff" + settings_path(apart.key).read_text()  # as some editors begin a file
    settings_path(apart.key).write_text(text.replace("corrupt_devices = 1", "corrupt_devices = 2"), encoding="utf-8")
    apart.epoch()
    signed = messages.decode(Signed, apart.install().signed)
    assert FleetEpoch(apart.authority.public_key, signed).frozen.corrupt_devices == 2
    settings_path(apart.key).write_text(text.replace("corrupt_devices = 1", "corrupt_devices = 0"))
    with pytest.raises(ParameterError, match=r"fleet\.key\.toml, line \d+: corrupt_devices"):
        apart.epoch()


@pytest.mark.parametrize("change", ["devices", "helpers", "groups", "epoch", "coordinator"])
def test_a_roster_file_that_the_coordinator_did_not_sign_is_refused(apart, change):
    path = apart.roster()
    body = msgspec.json.decode(path.read_bytes(), type=RosterFile).roster
    value = {
        "devices": body.devices[1:], "helpers": [HELPERS[0].hex()], "groups": [1, 2], "epoch": b"x",
        "coordinator": AUTHORITY.public_key.hex(),
    }[change]  # fmt: skip
    edited(path, RosterFile, roster=msgspec.structs.replace(body, **{change: value}))
    with pytest.raises(PeerError, match="signature"):
        apart.epoch(path)
    assert not state_path(apart.key).exists()


def test_a_roster_for_another_authority_or_of_another_coordinator_is_refused(apart):
    path = apart.there / "other.json"
    write_roster(path, apart.store, COORDINATOR, AUTHORITY.public_key, "test", [1])
    with pytest.raises(PeerError, match="not for this one"):
        apart.epoch(path)
    apart.epoch()
    with pytest.raises(PeerError, match="another coordinator needs another authority"):
        apart.epoch(apart.roster(coordinator=AUTHORITY))


def test_a_crash_before_the_epoch_leaves_skips_its_number_and_never_signs_it_twice(apart, monkeypatch):
    real = module.write_whole

    def dies(path, data, **options):
        if path.name == "epoch.json":
            raise KeyboardInterrupt
        real(path, data, **options)

    monkeypatch.setattr(module, "write_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        apart.epoch()
    monkeypatch.undo()
    assert apart.epoch().number == 2
    assert apart.install().number == 2


def test_an_authority_whose_state_is_older_than_its_own_epoch_goes_on_from_that(apart):
    apart.epoch()
    before = state_path(apart.key).read_bytes()
    apart.install()
    apart.epoch()
    second = apart.install()
    state_path(apart.key).write_bytes(before)  # put back from a backup
    assert apart.epoch().number == 3
    third = FleetEpoch(apart.authority.public_key, messages.decode(Signed, apart.install().signed))
    assert third.frozen.previous == second.id


def test_an_epoch_of_another_coordinator_or_key_is_not_installed(apart):
    apart.epoch()
    with pytest.raises(PeerError, match="which is not this one"):
        apart.install(coordinator=AUTHORITY)
    with pytest.raises(PeerError, match="signature"):
        install_epoch(apart.store, apart.there / "epoch.json", AUTHORITY.public_key, COORDINATOR.public_key, NOW)
    assert apart.installed is None


def test_an_epoch_with_another_list_of_devices_is_not_installed(apart):
    apart.epoch()
    keys = [key.hex() for key in sorted(DEVICES)]
    for devices in (keys[1:], [*keys[1:], HELPERS[0].hex()]):
        with pytest.raises(PeerError, match="not those of the signed roster"):
            apart.install(edited(apart.there / "epoch.json", EpochFile, devices=devices))
    assert apart.installed is None


def test_an_epoch_of_devices_that_never_enrolled_here_is_not_installed(apart, tmp_path):
    apart.epoch()
    other = Store(tmp_path / "other")
    with pytest.raises(PeerError, match="8 devices were never enrolled here"):
        install_epoch(other, apart.there / "epoch.json", apart.authority.public_key, COORDINATOR.public_key, NOW)
    other.close()


def test_an_old_epoch_is_not_put_back_and_an_expired_one_not_installed(apart):
    apart.epoch()
    old = (apart.there / "epoch.json").read_bytes()
    first = apart.install()
    assert apart.install() == first, "the same again changes nothing"
    apart.epoch()
    apart.install()
    (apart.there / "epoch.json").write_bytes(old)
    with pytest.raises(ParameterError, match="not newer"):
        apart.install()
    apart.epoch()
    with pytest.raises(PeerError, match="expired"):
        apart.install(now_s=NOW + 31 * 86_400)
    assert apart.installed.number == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[" * 5000, b'{"version":1,"epoch":"!!","devices":[]}'])
def test_a_file_that_is_something_else_is_named(apart, content):
    path = apart.there / "junk"
    path.write_bytes(content)
    with pytest.raises((ParameterError, PeerError), match="junk"):
        apart.install(path)
    with pytest.raises(ParameterError, match="junk"):
        apart.epoch(path)


def test_a_missing_file_is_named(apart):
    with pytest.raises(ParameterError, match="nowhere"):
        apart.install(apart.there / "nowhere")
    with pytest.raises(ParameterError, match="missing"):
        make_epoch(apart.there / "nokey", apart.roster(), apart.there / "out", NOW, os.urandom)
