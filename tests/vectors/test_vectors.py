"""The code is held to every case of the JSON beside this file, those that must be refused included.

Nothing here is taken from the generator: another implementation needs no more than these files to be held to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from kyber_py.ml_kem import ML_KEM_768

from edge_sdk import errors
from edge_sdk.crypto import masks, ring, sealing, shamir
from edge_sdk.crypto.gaussian import GaussianTable, gaussian_table
from edge_sdk.crypto.hashing import content_hash, derive_key, frame, tagged_hash
from edge_sdk.crypto.identity import Identity, check_signature
from edge_sdk.crypto.merkle import MerkleTree, check_inclusion, merkle_root
from edge_sdk.crypto.stream import KeyStream, uniform_residues
from edge_sdk.protocol import aggregator, authority, contributor, member, messages, plan
from edge_sdk.protocol.anchors import Anchors
from edge_sdk.protocol.messages import Delivery, Header, Message, Signed, Ticket, encode, message_hash, wrap
from edge_sdk.protocol.rounds import Round, prekey_public, share_context, split_shares

HERE = Path(__file__).parent
FILES = {path.stem: json.loads(path.read_text("ascii")) for path in sorted(HERE.glob("*.json"))}
KINDS = {
    kind.__name__.lower(): kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message
}

Case = dict[str, Any]
unhex = bytes.fromhex


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def all_cases(*files: str) -> Any:
    cases = [(file, case) for file in files for case in FILES[file]["cases"]]
    return pytest.mark.parametrize(
        ("file", "case"),
        cases,
        ids=[f"{case['operation']}-{case['name']}".replace(" ", "_") for _, case in cases],
    )


def hold(case: Case, run: Any) -> None:
    """Run a case: as it is written, or refused with the error and the reason that it names."""
    if case["success"]:
        run()
        return
    with pytest.raises(getattr(errors, case["error"])) as caught:
        run()
    assert case["reason"] in str(caught.value)


def signed(given: Case) -> Signed:
    return Signed(unhex(given["body"]), unhex(given["signature"]))


def expect_edges(case: Case, blocks: Any) -> None:
    flat = blocks.reshape(-1)
    assert flat[:8].tolist() == case["first"]
    assert flat[-8:].tolist() == case["last"]
    assert flat.size == case["count"]
    assert sha256(flat.astype("<u4").tobytes()) == case["sha256_of_u32"]


def test_every_file_states_cases_that_succeed_and_cases_that_must_be_refused():
    for name, content in FILES.items():
        cases = content.get("cases") or content["steps"]
        assert any(case["success"] for case in cases), name
        if name != "round_helpers":
            assert any(not case["success"] for case in cases), name
        assert all("step" in case and "reason" in case for case in cases if not case["success"]), name


def test_the_files_stay_readable():
    sizes = {path.name: path.stat().st_size for path in HERE.glob("*.json")}
    assert max(sizes.values()) < 150 << 10
    assert sum(sizes.values()) < 600 << 10


def test_the_generator_writes_the_same_bytes_again(tmp_path):
    import make_vectors

    make_vectors.main([str(tmp_path)])
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in HERE.glob("*.json")}


# --- Cryptography --------------------------------------------------------------------------------------------------


@all_cases("hashing")
def test_hashing(file, case):
    def run():
        match case["operation"]:
            case "frame":
                assert frame(case["label"], *map(unhex, case["parts"])).hex() == case["result"]
            case "tagged_hash":
                assert tagged_hash(case["label"], *map(unhex, case["parts"])).hex() == case["result"]
            case "derive_key":
                parts = map(unhex, case["parts"])
                derived = derive_key(unhex(case["secret"]), case["label"], *parts, length=case["length"])
                assert derived.hex() == case["result"]
            case "content_hash":
                assert content_hash(unhex(case["content"])).hex() == case["result"]
            case operation:
                pytest.fail(operation)

    hold(case, run)


@all_cases("stream")
def test_stream(file, case):
    key = unhex(case["key"])

    def run():
        match case["operation"]:
            case "read":
                stream = KeyStream(key, int(case["index"]))
                assert [stream.read(count).tobytes().hex() for count in case["counts"]] == case["result"]
            case "words":
                assert KeyStream(key).words16(8).tolist() == case["words16"]
                assert [f"{word:016x}" for word in KeyStream(key).words64(4).tolist()] == case["words64"]
            case "residues":
                values = uniform_residues(KeyStream(key), case["modulus"], case["count"])
                assert values.size == case["count"]
                assert values[:16].tolist() == case["first"]
                assert values[-4:].tolist() == case["last"]
                assert sha256(values.astype("<u2").tobytes()) == case["sha256_of_u16"]
            case operation:
                pytest.fail(operation)

    hold(case, run)


@all_cases("gaussian")
def test_gaussian(file, case):
    def run():
        match case["operation"]:
            case "table":
                table = GaussianTable(case["numerator"], case["denominator"])
                assert table.bound == case["bound"]
                assert [f"{boundary:032x}" for boundary in table.boundaries] == case["boundaries"]
                assert sha256(table.table.tobytes()) == case["sha256_of_i8_table"]
                assert int((table.table == -128).sum()) == case["undecided_prefixes"]
            case "settle":
                value = int(case["uniform"], 16)
                parts = (value >> 112, value >> 64 & (1 << 48) - 1, value & (1 << 64) - 1)
                assert gaussian_table(9, 2).settle(*parts) == case["result"]
            case "sample":
                stream = KeyStream(unhex(case["key"]))
                samples = gaussian_table(9, 2).sample(stream, case["count"])
                assert samples[:64].tolist() == case["first"]
                assert sha256(samples.tobytes()) == case["sha256_of_i8"]
                assert stream.read(8).tobytes().hex() == case["next_stream_bytes"]
            case operation:
                pytest.fail(operation)

    hold(case, run)


@all_cases("masks")
def test_masks(file, case):
    def message_of(party):
        return ring.public_blocks(KeyStream(unhex(party["message_key"])), case["blocks"]) & np.uint32(
            case["message_and"]
        )

    def masked(party):
        message, entropy, tid = message_of(party), unhex(party["entropy"]), unhex(case["tid"])
        secret = masks.expand_secret(entropy, tid)
        masks.add_mask(message, secret, entropy, tid)
        return message, secret

    def run():
        match case["operation"]:
            case "public":
                # Masking zero with a secret of zero and no errors leaves zero, so `a` shows through the secret 1:
                # removing a mask of secret 1 from zero gives -a.
                blocks = np.zeros((case["blocks"], ring.DEGREE), dtype=np.uint32)
                one = np.zeros(ring.DEGREE, dtype=np.int64)
                one[0] = 1
                masks.remove_mask(blocks, one, unhex(case["tid"]))
                expect_edges(case, np.uint32(0) - blocks)
            case "product":
                factor = np.zeros(ring.DEGREE, dtype=np.int64)
                for position, value in case["factor"].items():
                    factor[int(position)] = value
                block = ring.public_blocks(KeyStream(unhex(case["block_key"])), 1)
                out = np.empty_like(block)
                ring.ShortFactor(factor).multiply_into(block, out)
                expect_edges(case, out)
            case "mask":
                message, secret = masked(case)
                assert secret[:32].tolist() == case["secret_first"]
                assert sha256(secret.astype("<i1").tobytes()) == case["secret_sha256_of_i8"]
                expect_edges(case, message)
            case "unmask":
                pairs = [masked(party) for party in case["parties"]]
                total = sum(message for message, _ in pairs)
                masks.remove_mask(total, sum(secret for _, secret in pairs), unhex(case["tid"]))
                expect_edges(case, total)
                error = (total - sum(map(message_of, case["parties"]))).view(np.int32)
                assert int(np.abs(error).max()) == case["largest_error"]
            case operation:
                pytest.fail(operation)

    hold(case, run)


@all_cases("shamir")
def test_shamir(file, case):
    def run():
        if case["operation"] == "lagrange":
            weights = shamir.lagrange(case["sources"], case["target"], int(case["modulus"]))
            assert [str(weight) for weight in weights] == case["result"]
            return
        scheme = shamir.PackedShamir(case["members"], case["corrupt"], case["packing"])
        if case["operation"] == "share":
            secrets = np.array(case["secrets"], dtype=np.int64)
            assert scheme.share(secrets, KeyStream(unhex(case["key"]))).tolist() == case["shares"]
            return

        def small(secrets):
            return bool(np.abs(secrets).max() <= case["limit"])

        answers = {int(n): np.array(value, dtype=np.int64) for n, value in case["answers"].items()}
        found = next((c for c in scheme.candidates(answers, small) if small(c[0])), None)
        if found is None:
            assert case.get("reason") == "no candidate is short"
            return
        assert case["success"]
        assert found[0].tolist() == case["result"]
        assert sorted(found[1]) == case["disagreeing"]

    if case.get("error") == "none":
        run()
    else:
        hold(case, run)


def fixed_coins(coins: Iterator[str]) -> sealing.Encapsulate:
    return lambda public: ML_KEM_768._encaps_internal(public, unhex(next(coins)))


@all_cases("sealing")
def test_sealing(file, case):
    base = next((other for other in FILES[file]["cases"] if other["name"] == case.get("like")), {})
    case = {**base, **case}
    context = [unhex(part) for part in case["context"]]

    def run():
        if case["operation"] == "open":
            prekey = sealing.Prekey(unhex(case["prekey_seed"]))
            opened = prekey.open(unhex(case["sender_key"]), unhex(case["sealed"]), *context)
            assert opened.hex() == case["plaintext"]
            return
        encapsulate = fixed_coins(iter([case["coins"]])) if "coins" in case else sealing.encapsulate
        sealer = sealing.Sealer(unhex(case["sender_seed"]), encapsulate)
        public = sealing.PrekeyPublic(unhex(case["prekey_x25519"]), unhex(case["prekey_mlkem"]))
        sealed = sealer.seal(public, unhex(case["plaintext"]), *context)
        assert sealing.Prekey(unhex(case["prekey_seed"])).public == public
        assert sealer.public_key.hex() == case["sender_key"]
        assert sealed.hex() == case["sealed"]

    hold(case, run)


@all_cases("identity")
def test_identity(file, case):
    body, signature, key = unhex(case["body"]), unhex(case["signature"]), unhex(case["public_key"])
    if case["operation"] == "sign":
        identity = Identity(unhex(case["seed"]))
        assert identity.public_key == key
        assert identity.sign(case["label"], body) == signature
    hold(case, lambda: check_signature(key, case["label"], body, signature))


@all_cases("merkle")
def test_merkle(file, case):
    if case["operation"] == "tree":
        leaves = [unhex(leaf) for leaf in case["leaves"]]
        tree = MerkleTree(leaves)
        assert tree.root.hex() == case["root"]
        for i, leaf in enumerate(leaves):
            assert [h.hex() for h in tree.proof(i)] == case["proofs"][i]
            check_inclusion(tree.root, len(leaves), i, leaf, tree.proof(i))
        return
    proof = [unhex(h) for h in case["proof"]]
    hold(
        case,
        lambda: check_inclusion(unhex(case["root"]), case["size"], case["index"], unhex(case["content"]), proof),
    )


@all_cases("plan")
def test_plan(file, case):
    def run():
        match case["operation"]:
            case "thresholds":
                t = plan.thresholds(case["committee"], case["members"], case["roster"], case["corrupt_devices"])
                for name in ("corrupt", "packing", "quorum", "answers", "may_be_absent", "polynomials"):
                    assert getattr(t, name) == case[name], name
            case "delta_bits":
                assert plan.delta_bits(case["n_max"]) == case["result"]
            case "corrupt_in_group":
                found = plan.corrupt_in_group(case["roster"], case["corrupt_devices"], case["groups"])
                assert found == case["result"]
            case "layout":
                layout = plan.Layout(case["dimension"], case["delta_bits"])
                for name in ("modulus_bits", "blocks", "masked_bytes"):
                    assert getattr(layout, name) == case[name], name
                assert case["integer_i"] == "77777 i - 500"
                coded = layout.encode(np.arange(case["dimension"], dtype=np.int64) * 77_777 - 500)
                assert sha256(coded.astype("<u4").tobytes()) == case["sha256_of_u32"]
            case "from_bytes":
                plan.Layout(case["dimension"], case["delta_bits"]).from_bytes(bytes(case["bytes"]))
            case operation:
                pytest.fail(operation)

    hold(case, run)


# --- Messages, epochs, tickets, one contribution -------------------------------------------------------------------


def fields_json(value: object) -> Any:
    if isinstance(value, Message):
        return {name: fields_json(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple):
        return [fields_json(item) for item in value]
    return value


@all_cases("messages")
def test_messages(file, case):
    def run():
        if case["operation"] == "unwrap":
            messages.unwrap(unhex(case["wire"]))
            return
        kind, data = KINDS[case["kind"]], unhex(case["encoded"])
        message = messages.decode(kind, data)
        assert fields_json(message) == case["fields"]
        assert encode(message) == data
        assert message_hash(kind, data).hex() == case["hash"]
        if "author_key" in case:
            statement = Signed(data, unhex(case["signature"]))
            assert messages.verify(kind, unhex(case["author_key"]), statement) == message
            assert sha256(wrap(kind, statement)) == case["wire_sha256"]
        elif "wire_sha256" in case:
            assert sha256(wrap(kind, message)) == case["wire_sha256"]

    hold(case, run)


def test_every_kind_of_message_has_a_vector():
    named = {case["kind"] for case in FILES["messages"]["cases"] if case["success"]}
    assert named == set(KINDS) - {"member", "grouping"}  # those two are shown inside the epoch
    assert any(case.get("kind") == "grouping" for case in FILES["messages"]["cases"])


def expect_epoch(fleet: Case) -> authority.FleetEpoch:
    """Every number that follows from a signed epoch."""
    epoch = authority.FleetEpoch(unhex(fleet["authority_key"]), signed(fleet["epoch"]))
    assert epoch.id.hex() == fleet["epoch_id"]
    assert epoch.beacon.hex() == fleet["beacon"]
    assert [entry.index for entry in epoch.members] == fleet["committee_indices"]
    assert {str(g): c for g, c in epoch.corrupt_in_group.items()} == fleet["corrupt_in_group"]
    for groups in epoch.corrupt_in_group:
        expected = [rank % groups for rank in fleet["group_ranks"]]
        assert [epoch.group_of(i, groups) for i in range(len(fleet["roster"]))] == expected
    for name, value in fleet["thresholds"].items():
        assert getattr(epoch.thresholds, name) == value, name
    roster = authority.Roster([unhex(key) for key in fleet["roster"]])
    assert roster.root.hex() == fleet["roster_root"]
    return epoch


def expect_authority(fleet: Case, coordinator: bytes, helpers: list[bytes]) -> None:
    """The authority's part: freeze the roster, draw the beacon, sign."""
    fleet_authority = Identity(unhex(fleet["authority_seed"]))
    roster = authority.Roster([unhex(key) for key in reversed(fleet["roster"])])
    frozen = authority.freeze(
        fleet_authority,
        roster,
        coordinator=coordinator,
        corrupt_devices=fleet["corrupt_devices"],
        committee=fleet["committee"],
        committee_size=fleet["committee_size"],
        expires_s=fleet["expires_s"],
        helpers=helpers,
    )
    assert frozen == signed(fleet["frozen"])
    entropy = unhex(fleet["beacon_entropy"])
    drawn = authority.draw(fleet_authority, frozen, roster, entropy, fleet["group_counts"])
    assert drawn == signed(fleet["epoch"])


@all_cases("epoch")
def test_epoch(file, case):
    def run():
        if case["operation"] == "epoch":
            authority.FleetEpoch(unhex(case["authority_key"]), signed(case["epoch"]))
            return
        expect_epoch(case)
        expect_authority(case, unhex(case["coordinator_key"]), [unhex(key) for key in case["helper_keys"]])

    hold(case, run)


@all_cases("ticket")
def test_ticket(file, case):
    content = FILES[file]
    epoch = authority.FleetEpoch(unhex(content["authority_key"]), signed(content["epoch"]))

    def ticket_of(given):
        return signed({**given, "body": given["body"].replace("{offers}", content["offers"])})

    def run():
        if case["operation"] == "terms":
            round_ = Round(epoch, ticket_of(content["cases"][0]["ticket"]))
            last, given = case["last"], case["terms"]
            terms = contributor.Terms(unhex(given["bundle"]), given["min_honest"], given["min_noise_multiplier"])
            idle = contributor.Idle(last["task"], last["round"], unhex(last["tid"]))
            idle.on_ticket(round_, terms, case["now_s"])
            return
        round_ = Round(epoch, ticket_of(case["ticket"]))
        assert round_.tid.hex() == case["tid"]
        assert round_.min_group == case["min_group"]
        assert round_.share_bytes == case["share_bytes"]
        assert round_.layout.delta_bits == case["layout"]["delta_bits"]
        assert round_.layout.blocks == case["layout"]["blocks"]
        assert {**fields_json(round_.ticket), "prekeys": []} == case["fields"]

    hold(case, run)


@all_cases("anchors")
def test_anchors(file, case):
    anchors = before = Anchors()
    for shown in case["shown"]:
        head = messages.Anchor(shown["entries"], bytes([shown["link"]] * 32))
        key, zero = bytes([shown["key"]] * 32), bytes(32)
        header = Header(zero, 3, key, [], 0, zero, zero, zero, head)
        before, anchors = anchors, anchors.shown(shown["task"], shown["round"], [header])
    hold(case, lambda: before.check(shown["task"], shown["round"], header))
    kept = [
        {"key": key[0], "task": task, "round": at.round, "entries": at.anchor.entries, "link": at.anchor.link[0]}
        for key, heads in sorted(anchors.newest.items())
        for task, at in sorted(heads.items())
    ]
    assert kept == case["newest"]
    assert sorted(key[0] for key in anchors.forked) == case["forked"]


def ledger_of(given: Case) -> messages.Anchor:
    return messages.Anchor(given["ledger"]["entries"], unhex(given["ledger"]["link"]))


@all_cases("contribution")
def test_contribution(file, case):
    content = FILES[file]
    valid = content["cases"][0]
    epoch = authority.FleetEpoch(unhex(content["authority_key"]), signed(content["epoch"]))
    round_ = Round(epoch, signed(valid["ticket"]))
    identity = Identity(unhex(valid["seed"]))
    device = contributor.Enrolled(identity, valid["index"], tuple(map(unhex, valid["enrolment"])))
    entropy, integers = unhex(case["entropy"]), np.array(case["integers"], dtype=np.int64)
    training = contributor.Idle("vectors").on_ticket(round_, contributor.Terms(unhex(content["bundle"])), 0)

    def run():
        encapsulate = fixed_coins(iter(valid["coins"]))
        sent = training.contribute(integers, device, ledger_of(valid), entropy, encapsulate, case.get("now_s", 1))
        assert sent.contribution.header == signed(case["header"])
        assert sent.contribution.masked.hex() == case["masked"]
        assert sent.contribution.shares.hex() == case["shares"]
        assert sent.contribution.size == case["size"]

    hold(case, run)
    if not case["success"]:
        return
    assert round_.tid.hex() == case["tid"]
    message = round_.layout.encode(np.array(case["integers"]))
    key = Identity(unhex(case["seed"])).public_key
    entropy = contributor.contribution_seed(entropy, round_.tid, key, message)
    assert entropy.hex() == case["contribution_seed"]
    secret = masks.expand_secret(entropy, round_.tid)
    assert secret[:64].tolist() == case["secret_first"]
    assert sha256(secret.astype("<i1").tobytes()) == case["secret_sha256_of_i8"]
    sharing_key = derive_key(entropy, "sharing", round_.tid)
    assert sharing_key.hex() == case["sharing_key"]
    assert derive_key(entropy, "sealing key", round_.tid).hex() == case["sealing_key_seed"]
    rows = round_.thresholds.sharing.share(secret, KeyStream(sharing_key))
    for row, expected in zip(rows, case["share_values"], strict=True):
        assert row[:8].tolist() == expected["first"]
        assert sha256(row.astype("<u2").tobytes()) == expected["sha256_of_u16"]
    header = messages.decode(Header, unhex(case["header"]["body"]))
    assert fields_json(header) == case["header_fields"]
    assert content_hash(unhex(case["masked"])) == header.masked
    size, shares = round_.share_bytes, unhex(case["shares"])
    assert merkle_root([shares[i : i + size] for i in range(0, len(shares), size)]) == header.shares
    for number, expected in enumerate(case["share_contexts"], start=1):
        context = share_context(round_.tid, header.sender, header.key, number, header.masked)
        assert [part.hex() for part in context] == expected


# --- Rounds --------------------------------------------------------------------------------------------------------


class Replay:
    """One round's file, played step by step from its seeds."""

    def __init__(self, content: Case) -> None:
        self.content, fleet = content, content["fleet"]
        self.epoch = expect_epoch(fleet)
        self.coordinator = Identity(unhex(fleet["coordinator_seed"]))
        helpers = [Identity(unhex(seed)).public_key for seed in fleet["helper_seeds"]]
        expect_authority(fleet, self.coordinator.public_key, helpers)
        self.identities = [Identity(unhex(seed)) for seed in fleet["member_seeds"]]
        self.members = []
        for identity, prekey in zip(self.identities, content["prekeys"], strict=True):
            seed, key = unhex(prekey["seed"]), unhex(fleet["authority_key"])
            state, offer = member.offer_prekey(member.MemberState(), identity, key, seed, prekey["expires_s"])
            assert sha256(offer.body) == prekey["offer_sha256"]
            assert offer.signature.hex() == prekey["signature"]
            self.members.append(state)
        self.round = Round(self.epoch, signed(content["ticket"]))
        assert self.round.tid.hex() == content["tid"]
        assert self.round.min_group == content["min_group"]
        assert self.round.layout.delta_bits == content["layout"]["delta_bits"]
        assert self.round.layout.blocks == content["layout"]["blocks"]
        self.terms = contributor.Terms(unhex(content["bundle"]))
        self.devices: list[contributor.State] = [contributor.Idle(content["task"]) for _ in content["devices"]]
        self.state: aggregator.State = aggregator.Collecting(self.round)
        self.sent: dict[int, contributor.Contribution] = {}
        self.replies: list[bytes | None] = []

    def bytes_of(self, message: Case) -> bytes:
        match message:
            case {"hex": data}:
                return unhex(data)
            case {"reply_of": step}:
                assert self.replies[step] is not None
                return self.replies[step]
            case {"ticket": True}:
                return wrap(Ticket, self.round.signed)
            case {"delivery": items}:
                listed = []
                for device, number in items:
                    sent = self.sent[device]
                    shares = split_shares(self.round, messages.decode(Header, sent.header.body), sent.shares)
                    listed.append((sent.header, shares[number - 1] if number else None))
                return wrap(Delivery, Delivery(self.round.tid, listed))
        raise AssertionError(message)

    def play(self, step: Case) -> None:
        before = (list(self.devices), list(self.members), self.state)
        reply = None

        def run() -> None:
            nonlocal reply
            reply = getattr(self, step["operation"])(step, *step["party"].partition(" ")[::2])

        if step["operation"] == "open" and not step["success"]:
            self.open_fails(step)
        else:
            hold(step, run)
        self.replies.append(reply)
        if not step["success"]:
            assert before == (self.devices, self.members, self.state)
            assert all(old is new for old, new in zip(before[1], self.members, strict=True))
            return
        assert self.state_of(*step["party"].partition(" ")[::2]) == step["state"]
        expected = step.get("reply")
        if expected is None:
            assert reply is None
        elif "hex" in expected:
            assert reply.hex() == expected["hex"]
        else:
            assert (len(reply), sha256(reply)) == (expected["bytes"], expected["sha256"])

    def state_of(self, role: str, number: str) -> str:
        if role == "device":
            return type(self.devices[int(number)]).__name__
        if role == "member":
            return type(self.members[int(number) - 1].sessions[self.round.tid]).__name__
        return aggregator.phase(self.state)

    def message(self, step: Case, role: str, number: str) -> bytes | None:
        data = self.bytes_of(step["message"])
        assert sha256(data) == step["message_sha256"]
        if role == "device":
            i = int(number)
            self.devices[i] = contributor.step(self.devices[i], data, self.epoch, self.terms, step["now_s"])
            return None
        if role == "member":
            i = int(number) - 1
            after, reply = member.step(self.members[i], data, self.epoch, self.identities[i], step["now_s"])
            self.members[i] = after
            return reply
        self.state = aggregator.step(self.state, data)
        return None

    def contribute(self, step: Case, role: str, number: str) -> None:
        i = int(number)
        given = self.content["devices"][i]
        identity = Identity(unhex(self.content["fleet"]["device_seeds"][i]))
        device = contributor.Enrolled(identity, given["index"], tuple(map(unhex, given["enrolment"])))
        training = self.devices[i]
        assert isinstance(training, contributor.Training)
        integers = np.array(given["integers"], dtype=np.int64)
        coins = fixed_coins(iter(given["coins"]))
        sent = training.contribute(integers, device, ledger_of(given), unhex(given["entropy"]), coins, step["now_s"])
        contribution = self.deal_badly(step, sent.contribution, identity, given)
        assert contribution.header == signed(step["header"])
        assert sha256(contribution.masked) == step["masked_sha256"]
        assert sha256(contribution.shares) == step["shares_sha256"]
        assert messages.decode(Header, contribution.header.body).group == given["group"]
        self.devices[i] = contributor.Sent(self.round, sent.sender, contribution)
        self.sent[i] = contribution

    def deal_badly(
        self, step: Case, contribution: contributor.Contribution, identity: Identity, given: Case
    ) -> contributor.Contribution:
        """What a dealer changes in its contribution before it signs it, if the step says so."""
        header = messages.decode(Header, contribution.header.body)
        shares, size = bytearray(contribution.shares), self.round.share_bytes
        if step["flip_share_of"]:
            shares[size * step["flip_share_of"] - 1] ^= 1
        if step["values_of"]:
            number, value = step["values_of"]
            message = self.round.layout.encode(np.array(given["integers"], dtype=np.int64))
            own = contributor.contribution_seed(unhex(given["entropy"]), self.round.tid, header.key, message)
            sealing_seed = derive_key(own, "sealing key", self.round.tid)
            sealer = sealing.Sealer(sealing_seed, fixed_coins(iter(given["coins"][number - 1 :])))
            context = share_context(self.round.tid, header.sender, header.key, number, header.masked)
            plaintext = value.to_bytes(2, "little") * self.round.thresholds.polynomials
            resealed = sealer.seal(prekey_public(self.round.prekeys[number - 1]), plaintext, *context)
            shares[size * (number - 1) : size * number] = resealed
        root = merkle_root([bytes(shares[i : i + size]) for i in range(0, len(shares), size)])
        header = msgspec.structs.replace(
            header, shares=root, sealing_key=unhex(step["sealing_key"]) if step["sealing_key"] else header.sealing_key
        )
        return contributor.Contribution(messages.sign(identity, header), contribution.masked, bytes(shares))

    def accept(self, step: Case, role: str, number: str) -> bytes:
        masked, shares = self.sent[step["masked_of"]].masked, self.sent[step["shares_of"]].shares
        if step["flip"] == "masked":
            masked = bytes([masked[0] ^ 1]) + masked[1:]
        elif step["flip"] == "shares":
            shares = bytes([shares[0] ^ 1]) + shares[1:]
        elif step["flip"] == "longer masked":
            masked += b"\0"
        elif step["flip"] == "longer shares":
            shares += b"\0"
        contribution = contributor.Contribution(signed(step["header"]), masked, shares)
        accepted = aggregator.accept(self.state, contribution, self.coordinator, step["now_s"])
        self.state = accepted.state
        return accepted.receipt

    def seal(self, step: Case, role: str, number: str) -> bytes:
        assert isinstance(self.state, aggregator.Collecting)
        self.state = aggregator.seal(self.state, self.coordinator, step["now_s"])
        assert isinstance(self.state, aggregator.Sealed)
        return wrap(messages.Seal, self.state.seal)

    def certificate(self, step: Case, role: str, number: str) -> bytes:
        assert isinstance(self.state, aggregator.Certified)
        return wrap(messages.Certificate, self.state.certificate)

    def opened(self, step: Case) -> aggregator.Done:
        assert isinstance(self.state, aggregator.Certified)
        by_index = {given["index"]: i for i, given in enumerate(self.content["devices"])}
        sums = {
            group: aggregator.sum_masked(self.round, (self.sent[by_index[sender]].masked for sender in senders))
            for group, senders in enumerate(self.state.groups)
        }
        if step["add"]:
            group, coefficient, value = step["add"]
            sums[group].reshape(-1)[coefficient] += np.uint32(value)
        done = aggregator.open_round(self.state, sums, self.coordinator, final=True)
        assert isinstance(done, aggregator.Done)
        return done

    def open_fails(self, step: Case) -> None:
        """The group that something was added to has no sum, for the reason given; every other group has its own."""
        done = self.opened(step)
        garbled = step["add"][0]
        assert step["reason"] in done.reasons[garbled]
        assert garbled not in done.sums
        assert set(done.sums) == set(range(self.round.groups)) - {garbled}

    def open(self, step: Case, role: str, number: str) -> bytes:
        done = self.opened(step)
        for group, expected in enumerate(step["groups"]):
            result = done.sums[group]
            assert result.contributors == expected["contributors"]
            assert result.values.tolist() == expected["values"]
            assert result.signed(self.round.layout.modulus_bits).tolist() == expected["signed"]
            assert sorted(result.disagreeing) == expected["disagreeing"]
            assert expected["reason"] is None
            self.expect_exact(group, expected)
        self.state = done
        return wrap(messages.Transcript, done.transcript)

    def expect_exact(self, group: int, expected: Case) -> None:
        """The file's own sum is that of its contributors' integers."""
        inputs = [
            given["integers"] for i, given in enumerate(self.content["devices"])
            if i in self.sent and given["group"] == group and given["index"] in self.state.groups[group]
        ]  # fmt: skip
        assert len(inputs) == expected["contributors"]
        assert np.sum(np.array(inputs), axis=0).tolist() == expected["signed"]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("round_")])
def test_a_round_goes_as_written_and_refuses_what_it_must(name):
    content = FILES[name]
    replay = Replay(content)
    for step in content["steps"]:
        replay.play(step)
    assert isinstance(replay.state, aggregator.Done)
