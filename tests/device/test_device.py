"""A device over a hub in memory, in a clock of its own; the coordinator is played by the protocol's own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import EXAMPLES, EXPIRES_S, OPEN_S, TASK, World, seed
from training import tiny_models as tiny

from edge_sdk import contributing, events
from edge_sdk.bundle import Tensor, write_bundle
from edge_sdk.checkup import doctor, ledger_summary
from edge_sdk.crypto.identity import Identity
from edge_sdk.device import CallbackFailed, Device
from edge_sdk.errors import ParameterError, PeerError, TransportError
from edge_sdk.ledger import Ledger
from edge_sdk.privacy.ledger_entry import LedgerDamaged
from edge_sdk.protocol import aggregator
from edge_sdk.protocol.messages import Abort, Header, Signed, decode, encode, message_hash, sign, wrap
from edge_sdk.rules import read_policy
from edge_sdk.store import read_outcomes
from edge_sdk.transport.memory import MemoryHub, chance
from edge_sdk.transport.wire import (
    BlobRef,
    Chunk,
    Gone,
    Hello,
    Leaving,
    Letter,
    Pull,
    Refusal,
    Upload,
    Welcome,
    encode_frame,
)


class Encoded:
    """What `encode` was given and gave, for a device whose noise nobody can guess."""

    def __init__(self, monkeypatch) -> None:
        self.vectors: list[np.ndarray] = []
        self.metrics: list = []
        self.integers: list[np.ndarray] = []
        inner = contributing.encode

        def recording(mechanism, vector, metrics, public_seed, entropy):
            self.vectors.append(vector.copy())
            self.metrics.append(metrics)
            self.integers.append(inner(mechanism, vector, metrics, public_seed, entropy))
            return self.integers[-1]

        monkeypatch.setattr(contributing, "encode", recording)


@pytest.fixture
def encoded(monkeypatch):
    return Encoded(monkeypatch)


def kinds(report) -> list[str]:
    return [event.name for event in report.events]


def reasons(report, kind) -> list[str]:
    return [event.reason for event in report.events if isinstance(event, kind)]


class TestOneRound:
    def test_one_wake_up_fetches_trains_delivers_and_leaves(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory())
        world.ticket()
        report = device.run_once(60)
        assert report.reason == "done"
        assert kinds(report) == [
            "online", "fetching", "fetching", "welcomed", "updated", "training", "contributed", "delivered",
        ]  # fmt: skip
        assert len(world.taken) == 1
        assert world.faults == []
        world.turn()
        assert isinstance(world.heard[-1][1], Leaving)
        assert report.seconds < 5

    @pytest.mark.parametrize("unit", ["example", "device"])
    def test_the_opened_sum_is_that_of_what_devices_encoded(self, tmp_path, encoded, unit):
        world = World(tmp_path, unit=unit)
        round_ = world.ticket()
        for number in range(3):
            device = world.device(world.directory(number), number, tiny.examples(10 + number, seed=number))
            assert device.run_once(60).reason == "done"
        done = world.finish(round_)
        assert isinstance(done, aggregator.Done)
        expected = sum(integers.astype(np.uint64) for integers in encoded.integers)
        assert len(encoded.integers) == 3
        assert (done.sums[0].values == expected % (1 << round_.layout.modulus_bits)).all()

    def test_unit_example_sends_the_clipped_sum_over_the_secret_draw(self, tmp_path, encoded, monkeypatch):
        world = World(tmp_path)
        drawn = []
        inner = contributing.poisson_sample
        monkeypatch.setattr(contributing, "poisson_sample", lambda *given: drawn.append(inner(*given)) or drawn[-1])
        world.ticket()
        world.device(world.directory()).run_once(60)
        x, y = EXAMPLES
        gw, gb, losses, right = tiny.gradients(world.bundle.parameters(), x[drawn[0]], y[drawn[0]])
        flat = np.concatenate([gw.reshape(len(gw), -1), gb], axis=1)
        norms = np.linalg.norm(flat, axis=1)
        expected = (flat * np.minimum(1, 1.0 / norms)[:, None]).sum(0)
        assert 0 < len(drawn[0]) < len(x)
        np.testing.assert_allclose(encoded.vectors[0], expected, rtol=1e-5, atol=1e-5)
        found = encoded.metrics[0]
        assert (found.count, found.correct, found.unclipped) == (len(norms), right.sum(), (norms <= 1.0).sum())
        assert found.loss == pytest.approx(np.minimum(losses, 5.0).sum(), rel=1e-5)

    def test_an_empty_draw_and_an_empty_data_set_still_send_noise(self, tmp_path, encoded):
        for unit in ("example", "device"):
            path = tmp_path / unit
            path.mkdir()
            world = World(path, unit=unit)
            world.ticket()
            report = world.device(world.directory(), examples=[]).run_once(60)
            assert report.count(events.Delivered) == 1
            assert not encoded.vectors[-1].any()
            found = encoded.metrics[-1]
            assert (found.count, found.correct, found.loss, found.unclipped) == (0, 0, 0, 0)
            assert encoded.integers[-1].any()

    @pytest.mark.parametrize("unit", ["example", "device"])
    def test_bad_examples_are_said_to_their_owner_and_to_nobody_else(self, tmp_path, encoded, unit):
        x, y = EXAMPLES
        some, none = x.copy(), np.full_like(x, np.nan)
        some[[3, 5]] = np.inf
        passes = 1 if unit == "example" else 2
        bad = "examples drawn have values that are not finite, and count nothing"
        said, heard = [], []
        for number, examples in enumerate([(x, y), (some, y), (none, y), []]):
            path = tmp_path / str(number)
            path.mkdir()
            world = World(path, unit=unit, noise={"example_rate": 1.0})
            world.ticket()
            report = world.device(world.directory(), examples=examples).run_once(60)
            assert report.count(events.Delivered) == 1
            said.append(reasons(report, events.Warned))
            heard.append([(type(frame), len(encode_frame(frame))) for _, frame in world.heard])
        assert said == [
            [],
            [f"tiny: {2 * passes} of {24 * passes} {bad}"],
            [f"tiny: {24 * passes} of {24 * passes} {bad}: noise alone is sent"],
            ["tiny: there are no examples: noise alone is sent"],
        ]
        assert [vector.any() for vector in encoded.vectors] == [True, True, False, False]
        assert heard[1:] == heard[:1] * 3

    def test_a_devices_weight_is_applied_before_the_clip(self, tmp_path, encoded):
        deltas = []
        for cap in (0, 48):
            path = tmp_path / str(cap)
            path.mkdir()
            world = World(path, unit="device", work={"weight_cap": cap})
            world.ticket()
            device = world.device(world.directory(), entropy=counted_entropy())
            assert device.run_once(60).count(events.Delivered) == 1
            deltas.append(encoded.vectors[-1])
        np.testing.assert_allclose(deltas[1], deltas[0] * (24 / 48), rtol=1e-6)
        assert np.linalg.norm(deltas[0]) > 0

    def test_training_that_diverges_sends_noise_and_not_silence(self, tmp_path, encoded):
        world = World(tmp_path, unit="device", work={"learning_rate": 9e29, "proximal": 9e29})
        world.ticket()
        report = world.device(world.directory()).run_once(60)
        assert report.count(events.Delivered) == 1
        assert not encoded.vectors[0].any()
        assert encoded.metrics[0].loss == 5.0
        assert "tiny: training diverged: noise alone is sent" in reasons(report, events.Warned)

    def test_a_plan_without_metrics_has_no_coordinates_for_them(self, tmp_path, encoded):
        world = World(tmp_path, noise={"metric_scale": 0.0})
        world.ticket()
        assert world.device(world.directory()).run_once(60).count(events.Delivered) == 1
        assert encoded.metrics == [None]
        assert len(encoded.integers[0]) == world.bundle.dimension

    def test_a_coin_that_says_no_is_tossed_once_and_nothing_is_sent(self, tmp_path):
        world = World(tmp_path, noise={"device_rate": 1e-9})
        path = world.directory()
        world.ticket()
        assert kinds(world.device(path).run_once(60)).count("sat-out") == 1
        assert kinds(world.device(path).run_once(60)).count("sat-out") == 0
        assert world.heard_of(Upload) == []
        summary = ledger_summary(path)
        assert (summary.lifetime.rounds_entered, summary.lifetime.rounds_sent) == (1, 0)

    def test_local_parameters_stay_here_and_carry_on(self, tmp_path):
        world = World(tmp_path, unit="device", work={"learning_rate": 0.5})
        path = world.directory()
        device = world.device(path)
        device.register(TASK, EXAMPLES)
        x = EXAMPLES[0][:5]
        world.ticket(0)
        device.run_once(60)
        first = device.predict(TASK, x)
        world.ticket(1)
        device.run_once(60)
        second = device.predict(TASK, x)
        assert len(world.taken) == 2
        assert np.abs(first - second).max() > 1e-3  # the shared ones did not change: it is the head
        assert not np.array_equal(first, tiny_scores(world, x))

    def test_the_first_frame_of_a_contribution_leaves_after_the_charge(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        charged = []

        def before_send(frame: bytes) -> None:
            charged.append((frame[:8], ledger_summary(path).lifetime.rounds_sent))

        world.before_send = before_send
        world.ticket()
        world.device(path).run_once(60)
        uploads = [sent for head, sent in charged if b"upload" in head]
        assert uploads == [1]


def counted_entropy():
    """The same "entropy" in every run."""
    numbers = iter(range(1 << 30))
    return lambda count: seed(next(numbers), "entropy").ljust(count, b"*")[:count]


def tiny_scores(world: World, x: np.ndarray) -> np.ndarray:
    return tiny.numpy_scores(world.bundle.parameters(), x)[1].astype(np.float32)


class TestRetries:
    @settings(max_examples=15)
    @given(st.integers(0, 1 << 30))
    def test_on_any_network_the_same_contribution_arrives_once(self, tmp_path_factory, number):
        world = World(tmp_path_factory.mktemp("world"))
        entropy = number.to_bytes(8, "little")
        world.hub = MemoryHub(chance(entropy, drop=0.2, duplicate=0.1, hold=0.1))
        round_ = world.ticket()
        report = world.device(world.directory()).run_once(900)
        assert report.reason == "done", report
        assert report.count(events.Delivered) == 1
        assert world.faults == []
        assert len({message_hash(Header, upload.header.body) for upload in world.heard_of(Upload)}) == 1
        assert len(world.rounds[round_.tid].entries) == 1

    def test_without_a_receipt_it_asks_again_with_growing_delays(self, tmp_path):
        world = World(tmp_path, receipts=False)
        device = world.device(world.directory())
        world.ticket()
        times = []
        world.before_send = lambda frame: times.append(world.time.now_s) if b"upload" in frame[:8] else None
        report = device.run_once(800)
        assert report.reason == "time is up"
        gaps = np.diff(times)
        assert 5 < len(times) < 15
        assert gaps.max() < 400
        assert gaps[3] > 2 * gaps[0]
        assert len({upload.header.body for upload in world.heard_of(Upload)}) == 1

    def test_when_the_link_comes_back_it_offers_at_once(self, tmp_path):
        world = World(tmp_path, receipts=False)
        world.ticket()
        times = []

        def before_send(frame):
            if b"upload" in frame[:8]:
                times.append(world.time.now_s)
                if len(times) == 3:  # the next one by itself would be some 20 s later
                    world.hub.restart_broker()

        world.before_send = before_send
        world.device(world.directory()).run_once(120)
        gaps = np.diff(times)
        assert gaps[1] > 5
        assert gaps[2] < 3

    def test_the_next_wake_up_sends_the_same_bytes(self, tmp_path):
        world = World(tmp_path, receipts=False)
        path = world.directory()
        world.ticket()
        assert world.device(path).run_once(30).reason == "time is up"
        first = world.heard_of(Upload)[0]
        assert world.device(path).run_once(30).reason == "time is up"
        world.receipts = True
        assert world.device(path).run_once(30).reason == "done"
        assert {encode(upload.header) for upload in world.heard_of(Upload)} == {encode(first.header)}
        assert {upload.blob for upload in world.heard_of(Upload)} == {first.blob}
        assert ledger_summary(path).lifetime.rounds_sent == 1
        assert list((path / "outbox").iterdir()) == []

    def test_a_round_that_ended_without_a_receipt_is_given_up(self, tmp_path):
        world = World(tmp_path, receipts=False)
        path = world.directory()
        world.ticket()
        report = world.device(path).run_once(EXPIRES_S + 500)
        assert reasons(report, events.Dropped) == ["the round ended without a receipt"]
        assert report.reason == "done"
        assert ledger_summary(path).lifetime.rounds_sent == 1  # it was charged, and stays so

    def test_a_final_refusal_ends_it_and_another_does_not(self, tmp_path):
        world = World(tmp_path, mute={Upload})
        path = world.directory()
        device = world.device(path)
        world.ticket()
        key = world.identities[0].public_key
        answers = iter([False, False, True])

        def before_send(frame: bytes) -> None:
            if b"upload" in frame[:8]:
                header = msgspec.msgpack.decode(frame)[1][0]
                world.send(key, Refusal(message_hash(Header, header), "no room", next(answers)))

        world.before_send = before_send
        report = device.run_once(300)
        assert reasons(report, events.Dropped) == ["the coordinator refused it: no room"]
        assert len(world.heard_of(Upload)) == 3
        # a refusal of something else changes nothing
        world.send(key, Refusal(bytes(32), "who knows", True))
        assert device.run_once(10).reason == "done"

    def test_a_broker_that_restarts_costs_time_and_nothing_else(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory())
        world.ticket()
        restarts = iter([True] * 4)

        def before_send(frame: bytes) -> None:
            bulk = any(name in frame[:8] for name in (b"chunk", b"pull", b"upload"))
            if bulk and next(restarts, False):
                world.hub.restart_broker()

        world.before_send = before_send
        report = device.run_once(600)
        assert report.reason == "done"
        assert next(restarts, None) is None
        assert report.count(events.Offline) >= 2
        assert len(world.taken) == 1


class TestWakeUps:
    def test_without_a_broker_it_leaves_in_time(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.hub.stop_broker()
        world.ticket()
        report = world.device(path, connect=lambda: Silent(world)).run_once(60)
        assert report.reason == "no connection"
        assert 60 <= report.seconds < 62

    def test_a_coordinator_that_says_nothing_is_left_in_time(self, tmp_path):
        world = World(tmp_path, mute={Hello})
        world.ticket()
        report = world.device(world.directory()).run_once(60)
        assert report.reason == "time is up"
        assert 60 <= report.seconds < 62
        assert 3 < len(world.heard_of(Hello)) < 10

    def test_with_nothing_due_it_is_gone_after_the_lingering(self, tmp_path):
        world = World(tmp_path)
        report = world.device(world.directory()).run_once(60, linger_s=1.0)
        assert report.reason == "done"
        assert report.seconds < 2

    def test_time_that_is_up_ends_training_and_the_round_is_entered_again(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        slow = SlowExamples(world, seconds=50.0)
        world.ticket()
        report = world.device(path, examples=slow).run_once(60)
        assert report.reason == "time is up"
        assert report.count(events.Contributed) == 0
        assert world.heard_of(Upload) == []
        assert world.device(path).run_once(60).count(events.Delivered) == 1
        assert ledger_summary(path).lifetime.rounds_entered == 1  # the first coin stood

    def test_stop_ends_a_service_that_says_goodbye(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory(), on_event=lambda event: event.name == "delivered" and device.stop())
        world.ticket()
        device.run()
        world.turn()
        assert len(world.taken) == 1
        assert isinstance(world.heard[-1][1], Leaving)

    def test_stop_ends_one_run_and_no_other(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory(), on_event=lambda event: event.name == "delivered" and device.stop())
        device.stop()
        assert [device.run_once(60).reason for _ in range(2)] == ["stopped", "done"]
        device.stop()
        device.run()
        world.ticket(0)
        device.run()
        assert len(world.taken) == 1
        assert device.run_once(60).reason == "done"
        world.ticket(1)
        assert device.run_once(60).reason == "stopped"
        assert len(world.taken) == 2

    def test_a_service_takes_round_after_round_as_they_open(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        key = world.identities[0].public_key
        rounds = iter(range(1, 4))

        def hook(event: events.Event) -> None:
            if isinstance(event, events.Delivered):
                number = next(rounds, None)
                if number is None:
                    device.stop()
                    return
                world.parameters = world.parameters + np.float32(0.01)
                world.model_round = number
                world.ticket(number)
                world.send(key, world.welcome(key))

        device = world.device(path, on_event=hook)
        world.ticket(0)
        device.run()
        assert len(world.taken) == 4
        names = {blob.name for blob in (path / "blobs").iterdir()}
        assert len(names) == 2  # the bundle and the newest parameters: older ones are gone

    def test_conditions_put_training_off_and_interrupt_it(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.ticket()
        report = world.device(path, conditions=lambda: "not charging").run_once(60)
        assert report.reason == "done"
        assert reasons(report, events.Waiting) == ["not charging"]
        assert world.heard_of(Upload) == []
        answers = iter([None, None, "too warm", "too warm"])
        report = world.device(path, conditions=lambda: next(answers, None)).run_once(60)
        assert "too warm" in reasons(report, events.Waiting)
        assert report.count(events.Training) == 2
        assert report.count(events.Delivered) == 1


class Silent:
    """A link that never comes up."""

    def __init__(self, world: World) -> None:
        self._world = world

    def send(self, frame: bytes) -> None:
        """Lost."""

    def receive(self, timeout_s: float) -> None:
        self._world.time.now_s += max(timeout_s, 1e-3)

    def close(self) -> None:
        """Nothing to close."""


class SlowExamples:
    """Examples that take time to read."""

    def __init__(self, world: World, seconds: float, hook=lambda: None) -> None:
        self._world, self._seconds, self._hook = world, seconds, hook

    def __len__(self) -> int:
        return len(EXAMPLES[1])

    def fetch(self, indices):
        self._world.time.now_s += self._seconds
        self._hook()
        return [EXAMPLES[0][indices]], EXAMPLES[1][indices]


class TestRefusals:
    @pytest.mark.parametrize(
        ("policy", "reason"),
        [
            ({"min_honest": 3}, "cohort of 2 honest"),
            ({"min_noise": 4.0}, "floor"),
            ({"task": "another"}, "not among those"),
            ({"operator": "ab" * 32}, "operator"),
            ({"authority": "ab" * 32}, "fleet authority"),
            ({"epsilon": 0.01}, "budget"),
            ({"protects": "device"}, "protects no whole device"),
        ],
    )
    def test_what_the_policy_or_a_budget_refuses_is_said_and_costs_nothing(self, tmp_path, policy, reason):
        world = World(tmp_path)
        path = world.directory(**policy)
        world.ticket()
        report = world.device(path).run_once(60)
        assert report.reason == "done"
        assert len(reasons(report, events.Refused)) == 1
        assert reason in reasons(report, events.Refused)[0]
        assert reason in read_outcomes(path)[TASK].reason
        assert world.heard_of(Upload) == []
        assert ledger_summary(path).entries == 0

    def test_a_refused_ticket_is_looked_at_again_when_the_policy_changes(self, tmp_path):
        world = World(tmp_path)
        path = world.directory(min_noise=4.0)
        key = world.identities[0].public_key
        seen = []

        def hook(event: events.Event) -> None:
            seen.append(event.name)
            if isinstance(event, events.Refused):
                for _ in range(3):
                    world.send(key, world.welcome(key))  # the same again is no reason to look
                world.write_policy(path, min_noise=0.5)

        world.ticket()
        report = world.device(path, on_event=hook).run_once(60)
        assert seen.count("refused") == 1
        assert report.count(events.Delivered) == 1

    def test_rounds_go_on_until_the_budget_is_spent(self, tmp_path):
        world = World(tmp_path)
        path = world.directory(epsilon=2.5)
        delivered = 0
        for number in range(20):
            world.ticket(number)
            report = world.device(path).run_once(60)
            delivered += report.count(events.Delivered)
            if report.count(events.Refused):
                assert "budget" in reasons(report, events.Refused)[0]
                break
        assert 1 < delivered < 19
        lifetime = ledger_summary(path).lifetime
        assert lifetime.coordinator.epsilon <= 2.5
        assert lifetime.readers.epsilon <= 2.5
        assert lifetime.rounds_sent == delivered

    def test_a_second_ticket_for_the_same_round_is_refused(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.ticket(0)
        assert world.device(path).run_once(60).count(events.Delivered) == 1
        world.ticket(0, to_helpers=False, n_max=3)
        report = world.device(path).run_once(60)
        assert "the same round again" in reasons(report, events.Refused)[0]
        assert len(world.taken) == 1

    def test_a_ticket_that_another_key_signed_is_refused(self, tmp_path):
        world = World(tmp_path)
        round_ = world.ticket()
        world.tickets[TASK] = Signed(round_.signed.body, Identity(seed("stranger")).sign("ticket", round_.signed.body))
        report = world.device(world.directory()).run_once(60)
        assert "signature" in reasons(report, events.Refused)[0]
        assert world.heard_of(Upload) == []

    def test_an_epoch_of_another_coordinator_is_dropped(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.coordinator = Identity(seed("usurper"))
        world.new_epoch(2)
        report = world.device(path).run_once(60)
        assert "not the one that this device was enrolled with" in reasons(report, events.Warned)[0]
        assert report.reason == "done"

    def test_a_model_that_another_key_signed_is_dropped(self, tmp_path):
        world = World(tmp_path)
        device, key = world.device(world.directory()), world.identities[0].public_key
        model = decode(Signed, world.state_of().model)
        forged = encode(Signed(model.body, bytes(64)))
        world.mute = {Hello}
        world.before_send = lambda frame: (
            world.send(key, world.welcome(key, tasks=[world.state_of(model=forged)])) if b"hello" in frame[:8] else None
        )
        report = device.run_once(60)
        assert "model" in reasons(report, events.Warned)[0]
        with pytest.raises(ParameterError, match="no model"):
            device.predict(TASK, EXAMPLES[0])

    def test_a_bundle_of_another_publisher_never_runs(self, tmp_path):
        world = World(tmp_path)
        manifest = tiny.draft("example")
        parameters = tiny.initial_parameters(manifest)
        world.bundle_bytes = write_bundle(manifest, tiny.graphs(manifest), parameters, Identity(seed("stranger")))
        world.ticket()
        report = world.device(world.directory()).run_once(60)
        assert "not by the publisher" in reasons(report, events.Refused)[0]
        assert report.count(events.Training) == 0
        assert report.reason == "done"

    def test_a_bundle_that_is_not_the_registered_one_is_refused(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory(), examples=None)
        device.register(TASK, EXAMPLES, bundle=bytes(32))
        world.ticket()
        assert "not the one registered" in reasons(device.run_once(60), events.Refused)[0]

    def test_parameters_that_are_not_the_signed_ones_are_refused(self, tmp_path):
        world = World(tmp_path)
        other = world.serve((world.parameters + 1).astype("<f4").tobytes())
        state_of = world.state_of
        world.state_of = lambda *given, **changes: state_of(*given, **{"parameters": other, **changes})
        world.ticket()
        report = world.device(world.directory()).run_once(60)
        assert "not those of hash" in reasons(report, events.Refused)[0]
        assert world.heard_of(Upload) == []

    def test_a_ticket_of_another_dimension_or_unit_is_refused_before_it_trains(self, tmp_path):
        for changes, reason in (({"dimension": 23}, "dimension"), ({"bundle": bytes(32)}, "does not offer")):
            path = tmp_path / reason.replace(" ", "")
            path.mkdir()
            world = World(path)
            world.ticket(0, **changes)
            report = world.device(world.directory()).run_once(60)
            assert reason in reasons(report, events.Refused)[0]
            assert report.count(events.Training) == 0

    def test_a_blob_that_is_too_large_or_not_there_is_refused(self, tmp_path):
        for ref, reason in (
            (BlobRef(bytes(32), 1 << 30), "this device takes"),
            (BlobRef(bytes(32), 99), "does not have"),
        ):
            path = tmp_path / reason.replace(" ", "")
            path.mkdir()
            world = World(path)
            state_of = world.state_of
            world.state_of = lambda *a, _ref=ref, _inner=state_of, **c: _inner(*a, **{"bundle": _ref, **c})
            world.ticket()
            report = world.device(world.directory()).run_once(60)
            assert report.reason == "done"
            assert reason in reasons(report, events.Refused)[0]

    @pytest.mark.parametrize(
        ("examples", "reason"),
        [
            (lambda: 1 / 0, "ZeroDivisionError"),
            ((EXAMPLES[0], EXAMPLES[1][:-1]), "rows"),
            ({"y": EXAMPLES[1]}, "no array 'x'"),
            ((EXAMPLES[0].astype(np.float64), EXAMPLES[1]), "float64"),
            ((EXAMPLES[0], EXAMPLES[1] + 1000), "is not in"),
        ],
    )
    def test_examples_that_are_wrong_are_named_and_nothing_is_sent(self, tmp_path, examples, reason):
        world = World(tmp_path, noise={"example_rate": 1.0})
        world.ticket()
        report = world.device(world.directory(), examples=examples).run_once(60)
        assert reason in reasons(report, events.Refused)[0]
        assert world.heard_of(Upload) == []

    @pytest.mark.parametrize("form", ["mapping", "callable", "pairs"])
    def test_examples_may_be_given_in_several_forms(self, tmp_path, form):
        x, y = EXAMPLES
        forms = {
            "mapping": {"x": x, "y": y}, "callable": lambda: (x, y), "pairs": lambda: zip(x, y, strict=True),
        }  # fmt: skip
        world = World(tmp_path, noise={"example_rate": 1.0})
        world.ticket()
        assert world.device(world.directory(), examples=forms[form]).run_once(60).count(events.Delivered) == 1

    @pytest.mark.parametrize(
        ("task", "examples", "bundle", "word"),
        [
            (TASK, None, None, r"examples are \(inputs, labels\).* not NoneType"),
            (TASK, "data.npz", None, "not str"),
            (TASK, Path("data.npz"), None, "not .*Path"),
            (TASK, 3, None, "not int"),
            (TASK, zip(*EXAMPLES, strict=True), None, "to one round only"),
            ("Tiny Task", EXAMPLES, None, "'Tiny Task' is no task's name"),
            (None, EXAMPLES, None, "None is no task's name"),
            (TASK, EXAMPLES, "ab" * 32, "hash is 32 bytes"),
            (TASK, EXAMPLES, bytes(31), "hash is 32 bytes"),
        ],
    )
    def test_what_cannot_be_registered_is_refused_at_once(self, tmp_path, task, examples, bundle, word):
        device = Device(tmp_path)
        with pytest.raises(ParameterError, match=word):
            device.register(task, examples, bundle=bundle)

    def test_a_spent_budget_between_coin_and_send_drops_the_contribution(self, tmp_path, monkeypatch):
        world = World(tmp_path)
        path = world.directory()
        world.ticket()
        with monkeypatch.context() as patch:
            patch.setattr(contributing.Contributing, "charge", lambda *given: (_ for _ in ()).throw(OSError("disk")))
            report = world.device(path).run_once(20)
        assert report.count(events.Contributed) == 0
        assert world.heard_of(Upload) == []
        world.write_policy(path, epsilon=0.01)  # the owner thinks again
        report = world.device(path).run_once(60)
        assert "budget" in reasons(report, events.Dropped)[0]
        assert world.heard_of(Upload) == []


X, Y = tiny.examples(6)
C = np.arange(12, dtype=np.float32).reshape(6, 2)
ONE = tiny.draft()
TWO = tiny.draft(inputs=(*ONE.inputs, Tensor("c", (2,), "float32", None)))


class TestForms:
    @pytest.mark.parametrize(
        "given",
        [
            ((X, C), Y), ([X, C], Y), [[X, C], Y], [(X, C), Y], {"x": X, "c": C, "y": Y}, lambda: ([X, C], list(Y)),
            list(zip(zip(X, C, strict=True), Y, strict=True)), lambda: zip(zip(X, C, strict=True), Y, strict=True),
        ],
    )  # fmt: skip
    def test_a_model_with_several_inputs_has_any_of_them(self, given):
        examples = contributing.examples_of(given, TWO)
        inputs, labels = examples.fetch(np.array([4, 1]))
        assert len(examples) == 6
        for found, expected in zip((*inputs, labels), (X, C, Y), strict=True):
            assert (found.dtype, found.tolist()) == (expected.dtype, expected[[4, 1]].tolist())

    @pytest.mark.parametrize(
        "given",
        [(X, Y), [X, Y], ([X], Y), (list(X), list(Y)), {"x": list(X), "y": list(Y)}, list(zip(X, Y, strict=True))],
    )
    def test_a_model_with_one_input_has_any_of_them(self, given):
        (x,), y = contributing.examples_of(given, ONE).fetch(np.array([4, 1]))
        assert (x.dtype, x.tolist()) == (np.float32, X[[4, 1]].tolist())
        assert y.tolist() == Y[[4, 1]].tolist()

    def test_two_pairs_in_a_list_are_pairs(self):
        pairs = [[[x, c], y] for x, c, y in zip(X[:2], C[:2], Y[:2], strict=True)]
        (x, _), y = contributing.examples_of(pairs, TWO).fetch(np.array([1]))
        assert (x.tolist(), y.tolist()) == (X[[1]].tolist(), Y[[1]].tolist())

    @pytest.mark.parametrize("given", [X, [X.tolist(), Y.tolist()], lambda: None, [1, 2, 3], [(X[0], Y[0], 1)]])
    def test_what_has_no_form_is_told_which_there_are(self, given):
        with pytest.raises(ParameterError, match=r"examples are \(inputs, labels\)"):
            contributing.examples_of(given, ONE)

    def test_a_pair_with_an_input_too_few_is_named(self):
        with pytest.raises(ParameterError, match="an example has 1 inputs, the model 2"):
            contributing.examples_of([((X[0],), Y[0])], TWO)

    def test_none_at_all_have_the_shapes_of_all_inputs(self):
        examples = contributing.examples_of([], TWO)
        assert len(examples) == 0
        inputs, labels = examples.fetch(np.arange(0))
        assert [array.shape for array in (*inputs, labels)] == [(0, 5), (0, 2), (0,)]


class TestAborts:
    def test_an_abort_ends_a_contribution_on_its_way(self, tmp_path):
        world = World(tmp_path, receipts=False)
        path = world.directory()
        key = world.identities[0].public_key
        round_ = world.ticket()
        notice = wrap(Abort, sign(world.coordinator, Abort(round_.tid, "too few")))

        def hook(event: events.Event) -> None:
            if isinstance(event, events.Contributed):
                forged = wrap(Abort, Signed(sign(world.coordinator, Abort(round_.tid, "x")).body, bytes(64)))
                world.send(key, Letter(forged))
                world.send(key, Letter(notice))

        report = world.device(path, on_event=hook).run_once(60)
        assert reasons(report, events.Dropped) == ["the coordinator aborted the round"]
        assert len([reason for reason in reasons(report, events.Warned) if "signature" in reason]) == 1
        assert list((path / "outbox").iterdir()) == []

    def test_an_abort_while_it_trains_ends_the_training(self, tmp_path):
        world = World(tmp_path)
        key = world.identities[0].public_key
        round_ = world.ticket()
        notice = wrap(Abort, sign(world.coordinator, Abort(round_.tid, "too few")))
        slow = SlowExamples(world, 1.0, hook=lambda: world.send(key, Letter(notice)))
        report = world.device(world.directory(), examples=slow).run_once(60)
        assert reasons(report, events.Dropped) == ["training was stopped after 1 batches"]
        assert world.heard_of(Upload) == []

    def test_a_round_that_closes_while_it_trains_is_given_up(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.ticket()
        report = world.device(path, examples=SlowExamples(world, OPEN_S)).run_once(2 * OPEN_S)
        assert report.count(events.Dropped) == 1
        assert world.heard_of(Upload) == []
        assert read_outcomes(path)[TASK].what == "dropped"


class TestHostileFrames:
    def test_a_ticket_that_nobody_signed_is_refused_before_anything_in_it_is_read(self, tmp_path):
        world = World(tmp_path)
        world.ticket()
        inner = world.welcome

        def tampered(key, **changes):
            """As a broker can, that holds nobody's key."""
            welcome = inner(key, **changes)
            states = []
            for state in welcome.tasks:
                signed = decode(Signed, state.ticket)
                body = msgspec.msgpack.decode(signed.body)
                body[11][0] = "`$[99]"
                forged = Signed(msgspec.msgpack.encode(body), signed.signature)
                states.append(msgspec.structs.replace(state, ticket=encode(forged)))
            return msgspec.structs.replace(welcome, tasks=states)

        world.welcome = tampered
        report = world.device(world.directory()).run_once(60)
        assert [reason for reason in reasons(report, events.Refused) if "signature" in reason]
        assert world.heard_of(Upload) == []

    @pytest.mark.parametrize("size", [1 << 30, 99])
    def test_a_newer_model_that_cannot_be_had_does_not_end_the_device_while_it_trains(self, tmp_path, size):
        world = World(tmp_path)
        key = world.identities[0].public_key
        world.ticket()

        def newer():
            world.parameters, world.model_round = world.parameters + 1, 1
            world.send(key, world.welcome(key, tasks=[world.state_of(parameters=BlobRef(bytes(32), size))]))

        report = world.device(world.directory(), examples=SlowExamples(world, 1.0, hook=newer)).run_once(60)
        assert (report.count(events.Contributed), report.count(events.Delivered)) == (1, 1)

    def test_a_flood_while_it_trains_does_not_keep_it_from_training(self, tmp_path):
        world, flood, ended = World(tmp_path), [], []
        path = world.directory()
        identity = world.identities[0]
        world.ticket()

        class Flooded:
            """A link on which there is always another frame."""

            def __init__(self):
                self._link = world.connect(identity)
                self.send, self.close = self._link.send, self._link.close

            def receive(self, timeout_s):
                if flood and not ended:
                    flood.append(1)
                    assert len(flood) < 10_000, "it reads and reads"
                    return b"no frame"
                return self._link.receive(timeout_s)

        def hear(event):
            if isinstance(event, events.Contributed):
                ended.append(event)

        slow = SlowExamples(world, 1.0, hook=lambda: flood.append(1))
        world.device(path, examples=slow, connect=Flooded, on_event=hear).run_once(60)
        assert len(ended) == 1
        assert len(flood) > 256

    @settings(max_examples=25)
    @given(st.lists(st.binary(max_size=200), max_size=5), st.integers(0, 7), st.binary(max_size=64))
    def test_garbage_changes_nothing(self, tmp_path_factory, junk, kind, tail):
        world = World(tmp_path_factory.mktemp("world"), receipts=False)
        path = world.directory()
        key = world.identities[0].public_key
        device = world.device(path)
        world.ticket()
        device.run_once(20)
        before = stored_rows(path)
        frames = [
            encode_frame(frame)
            for frame in (
                Letter(tail), Gone(bytes(32)), Pull(bytes(32), [0, 5]), Chunk(bytes(32), 3, tail or b"x", []),
                Refusal(bytes(32), "x", True), Letter(BlobRef(bytes(32), 1 << 20)), Letter(BlobRef(bytes(32), 1 << 29)),
                Welcome(0, tail, None, []),
            )
        ]  # fmt: skip
        world.mute = {Hello, Upload, Pull}
        sent = [*junk, frames[kind], frames[kind][:-1], frames[kind] + b"x"]

        def hook(event: events.Event) -> None:
            if isinstance(event, events.Online):
                for data in sent:
                    world.hub.send(key.hex(), data)

        report = world.device(path, on_event=hook).run_once(20)
        assert report.reason == "time is up"
        assert stored_rows(path) == before

    def test_a_pull_outside_the_blob_is_dropped(self, tmp_path):
        world = World(tmp_path, receipts=False)
        device, key = world.device(world.directory()), world.identities[0].public_key
        world.ticket()

        def before_send(frame: bytes) -> None:
            if b"upload" in frame[:8]:
                blob = msgspec.msgpack.decode(frame)[2][0]
                world.send(key, Pull(blob, [0, 7]))

        world.before_send = before_send
        report = device.run_once(20)
        assert any("outside a blob" in reason for reason in reasons(report, events.Warned))

    def test_a_blob_that_nobody_asked_for_is_answered_with_gone(self, tmp_path):
        world = World(tmp_path)
        key = world.identities[0].public_key
        world.before_send = lambda frame: world.send(key, Pull(bytes(32), [0])) if b"hello" in frame[:8] else None
        world.device(world.directory()).run_once(20)
        assert world.heard_of(Gone) == [Gone(bytes(32))]

    def test_a_wrong_clock_is_warned_of(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory(), clock=None)  # the machine's own, years away from the script's
        device = world.device(
            tmp_path / "device0", clock=replace(world.time.clock, time_s=lambda: world.time.now_s - 7200)
        )
        report = device.run_once(20)
        assert any("-7200 s" in reason for reason in reasons(report, events.Warned))


def stored_rows(path: Path) -> list:
    import sqlite3

    database = sqlite3.connect(f"file:{path / 'state.db'}?mode=ro", uri=True)
    tables = ("device", "epoch", "position", "contribution", "local", "model", "prekey", "newest", "session", "shown")
    rows = [database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables]  # noqa: S608
    database.close()
    files = [(file.name, file.read_bytes()) for file in sorted((path / "outbox").iterdir())]
    return [rows, files, (path / "ledger").read_bytes()]


class TestPredict:
    def test_the_newest_model_answers_offline(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        device = world.device(path)
        x = EXAMPLES[0][:7]
        with pytest.raises(ParameterError, match="no model"):
            device.predict(TASK, x)
        device.run_once(60)
        np.testing.assert_allclose(device.predict(TASK, x), tiny_scores(world, x), rtol=1e-4, atol=1e-4)
        world.parameters = world.parameters + np.float32(0.5)
        world.model_round = 1
        device.run_once(60)
        first = device.predict(TASK, x)
        assert np.abs(first - tiny_scores(world, x)).max() > 0.1
        assert np.array_equal(world.device(path, connect=lambda: Silent(world)).predict(TASK, x), first)

    def test_lists_are_arrays_too_and_what_is_none_is_named(self, tmp_path):
        world = World(tmp_path)
        device = world.device(world.directory())
        device.run_once(60)
        x = EXAMPLES[0][:7]
        assert np.array_equal(device.predict(TASK, x.tolist()), device.predict(TASK, x))
        whole = np.arange(10).reshape(2, 5)
        assert np.array_equal(device.predict(TASK, whole.tolist()), device.predict(TASK, whole.astype(np.float32)))
        for wrong, word in (
            (whole, "float32"), (x.astype(np.float64), "float32"), (x[0], "float32"), (x[0].tolist(), "float32"),
            (3.0, "same number of rows"), (None, "same number of rows"), ([[1.0], [1.0, 2.0]], "inhomogeneous"),
            ("digits", "same number of rows"), ([None] * 7, "float32"), ([["a"] * 5], "float32"),
        ):  # fmt: skip
            with pytest.raises(ParameterError, match=word):
                device.predict(TASK, wrong)
        for inputs in ((), (x, x)):
            with pytest.raises(ParameterError, match="predict takes 1 arrays"):
                device.predict(TASK, *inputs)

    def test_a_coin_says_nothing_about_what_is_downloaded(self, tmp_path):
        """A device that sits out fetches the model too: the coordinator would see its coin otherwise."""
        pulls = []
        for rate in (1.0, 1e-9):
            path = tmp_path / str(rate)
            path.mkdir()
            world = World(path, noise={"device_rate": rate})
            world.ticket()
            world.device(world.directory()).run_once(60)
            pulls.append(world.heard_of(Pull))
        assert pulls[0] == pulls[1] != []


class TestSecrets:
    def test_no_entropy_of_a_contribution_is_left_in_any_file(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        drawn: list[bytes] = []

        def entropy(count: int) -> bytes:
            drawn.append(seed("entropy", len(drawn)).ljust(count, b"*")[:count])
            return drawn[-1]

        world.ticket()
        assert world.device(path, entropy=entropy).run_once(60).count(events.Delivered) == 1
        secrets = [value for value in drawn if len(value) == 32]
        content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
        assert len(secrets) >= 4
        assert not any(secret in content for secret in secrets)

    def test_everything_that_is_made_is_the_owners_alone(self, tmp_path):
        world = World(tmp_path)
        path = world.directory()
        world.ticket()
        world.device(path).run_once(60)
        given_by_the_test = {"enrolment.json", "policy.toml", "identity.key", "ledger"}
        for file in path.rglob("*"):
            if file.name not in given_by_the_test:
                assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize("rolled_back_to", ["before the round", "the day it was made", "another life of the same key"])
def test_a_ledger_that_forgot_a_round_which_the_state_knows_is_not_used(tmp_path, rolled_back_to):
    world = World(tmp_path)
    path = world.directory()
    made = (path / "ledger").read_bytes()
    world.ticket(0)
    world.device(path).run_once(60)
    before = (path / "ledger").read_bytes()
    world.ticket(1)
    world.device(path).run_once(60)
    newest = (path / "ledger").read_bytes()
    assert len(world.taken) == 2
    (path / "ledger").write_bytes(made if rolled_back_to == "the day it was made" else before)
    if rolled_back_to == "another life of the same key":  # as long as the one that was lost, and other rounds in it
        policy = read_policy(path)
        owner = Identity((path / "identity.key").read_bytes()).public_key
        with Ledger(path / "ledger", owner, policy.protects, policy.lifetime) as ledger:
            drawn = next(iter(ledger.account.draws.values()))
            for number in (7, 8):
                ledger.draw("other", number, bytes([number]) * 32, drawn.operator, drawn.release, bytes(32), 0)
    sent = len(world.heard_of(Upload))
    world.ticket(2)
    for way in ("run", "run_once"):
        with pytest.raises(LedgerDamaged, match="rolled back or replaced: it knows nothing of round 1 of tiny"):
            getattr(world.device(path), way)()
    assert len(world.heard_of(Upload)) == sent
    finding = next(finding for finding in doctor(path) if finding.check == "ledger")
    assert (finding.ok, "round 1 of tiny" in finding.detail) == (False, True)
    (path / "ledger").write_bytes(newest)  # its owner found the newest copy: nothing was lost
    assert world.device(path).run_once(60).count(events.Delivered) == 1


def test_a_waiting_contribution_does_not_leave_beside_a_ledger_that_was_rolled_back(tmp_path):
    world = World(tmp_path, mute={Upload})
    path = world.directory()
    world.ticket(0)
    made = (path / "ledger").read_bytes()
    world.device(path).run_once(30)
    (path / "ledger").write_bytes(made)
    before = len(world.heard_of(Upload))
    assert before >= 1
    with pytest.raises(LedgerDamaged, match="rolled back or replaced"):
        world.device(path).run_once(30)
    assert len(world.heard_of(Upload)) == before


@pytest.mark.parametrize("damage", [lambda ledger: ledger.unlink(), lambda ledger: ledger.write_bytes(b"x" * 1024)])
def test_a_damaged_ledger_ends_the_run_at_once(tmp_path, damage):
    world = World(tmp_path)
    path = world.directory()
    damage(path / "ledger")
    with pytest.raises(LedgerDamaged):
        world.device(path).run_once(30)
    assert world.heard == []


def test_a_policy_that_cannot_be_read_is_read_again_when_it_was_mended(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    (path / "policy.toml").write_text("protects = 3")
    report = world.device(path).run_once(30)
    assert any("policy.toml" in event.reason for event in report.events if hasattr(event, "reason"))
    world.write_policy(path)
    assert world.device(path).run_once(30).count(events.Delivered) == 1


def raising_at(at: int, error: Exception):
    """An on_event that raises at the `at`th event, from 1, and what it heard."""
    heard: list[events.Event] = []

    def on_event(event: events.Event) -> None:
        heard.append(event)
        if len(heard) == at:
            raise error

    return on_event, heard


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), TransportError("mine"), PeerError("mine"), KeyError(1)])
@pytest.mark.parametrize("way", ["run", "run_once"])
def test_what_on_event_raises_comes_out_as_the_callbacks_at_any_event(tmp_path, error, way):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    for at in range(1, 6):
        on_event, heard = raising_at(at, error)
        with pytest.raises(CallbackFailed, match=f"on_event: {type(error).__name__}") as caught:
            getattr(world.device(path, on_event=on_event), way)()
        assert caught.value.__cause__ is error
        assert len(heard) == at  # it is not called again
    report = world.device(path).run_once(60)
    assert report.reason == "done"
    lifetime = ledger_summary(path).lifetime
    assert (lifetime.rounds_entered, lifetime.rounds_sent, len(world.taken)) == (1, 1, 1)


def test_conditions_that_raise_are_not_taken_for_the_disk(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()

    def conditions() -> str | None:
        raise FileNotFoundError(2, "no such sensor")

    with pytest.raises(CallbackFailed, match=r"conditions: FileNotFoundError: .*no such sensor"):
        world.device(path, conditions=conditions).run_once(60)
    assert world.heard_of(Upload) == []
    assert read_outcomes(path) == {}  # the round was not refused: it is entered when the sensor is back
    world.device(path).run_once(60)
    assert len(world.taken) == 1


def test_conditions_that_raise_between_two_batches_end_the_training_and_the_run(tmp_path):
    world = World(tmp_path)
    path = world.directory()
    world.ticket()
    asked = []

    def conditions() -> str | None:
        asked.append(None)
        if len(asked) == 2:
            raise OSError("the gauge is stuck")
        return None

    with pytest.raises(CallbackFailed, match="the gauge is stuck"):
        world.device(path, conditions=conditions).run_once(60)
    assert len(asked) == 2
    assert world.heard_of(Upload) == []
    world.device(path).run_once(60)
    assert len(world.taken) == 1
