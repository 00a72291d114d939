"""What devices send sums to the central Gaussian's answer, hides one unit as claimed, and is refused when ill-posed."""

import math
import tracemalloc
from dataclasses import astuple, replace
from decimal import Decimal, localcontext
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError
from edge_sdk.privacy import mechanism as module
from edge_sdk.privacy.mechanism import (
    CONDITIONAL_BETA,
    UNCONDITIONAL_BETA,
    Mechanism,
    MetricSums,
    clip_l2,
    decode,
    device_metrics,
    encode,
)
from edge_sdk.privacy.noise import NoiseSampler
from edge_sdk.privacy.rotation import rotate_back

SEED = bytes(range(32))
DEVICE = Mechanism("device", 40, 1.0, 0.01, 100.0, 4, 18)
EXAMPLE = Mechanism("example", 40, 1.0, 0.01, 100.0, 4, 24, metric_scale=0.5, loss_bound=3.0)


NOTHING = MetricSums(0.0, 0.0, 0.0, 0.0)


def entropy(number: int) -> bytes:
    return sha256(b"entropy %d" % number).digest()


def gaussian(length: int, key: int) -> np.ndarray:
    """(length,) numbers with variance 1, from a fixed stream."""
    words = KeyStream(bytes(32), key).words64(12 * length).reshape(12, length)
    return (words / 2.0**64).sum(axis=0) - 6


def unit_vector(length: int, key: int) -> np.ndarray:
    vector = gaussian(length, key)
    return vector / np.linalg.norm(vector)


def total(mechanism: Mechanism, encoded: list[np.ndarray]) -> np.ndarray:
    """The sum modulo 2^b, as aggregation delivers it."""
    return sum(x.astype(np.uint64) for x in encoded).astype(np.uint32) & np.uint32((1 << mechanism.modulus_bits) - 1)


def centred(mechanism: Mechanism, values: np.ndarray) -> np.ndarray:
    modulus = 1 << mechanism.modulus_bits
    return (values.astype(np.int64) + modulus // 2) % modulus - modulus // 2


def with_multiplier(mechanism: Mechanism, multiplier: float) -> Mechanism:
    return replace(mechanism, sigma=multiplier * mechanism.sensitivity_steps)


# --- the central Gaussian's error ---


@pytest.mark.parametrize("unit", ["device", "example"])
def test_a_hundred_devices_have_the_error_of_the_central_gaussian_within_two_percent(unit):
    """n = h = 100, d = 10^5, b = 18: against noise multiplier times C, what a trusted curator would add."""
    n, d = 100, 100_000
    mechanism = with_multiplier(Mechanism(unit, d, 2.0, 2.0 / 3000, 1e4, n, 18), 1.0)
    assert mechanism.wrap_probability(n, n) < 1e-9
    shared = unit_vector(d, 0)  # the worst case for the modulus: half of every vector points the same way
    own = [2.0 * clip_l2(shared + unit_vector(d, 1 + i), 1.0) for i in range(5)]
    vectors = [own[i % 5] for i in range(n)]
    true = np.sum(vectors, axis=0)
    encoded = [encode(mechanism, v, None, SEED, entropy(i)) for i, v in enumerate(vectors)]
    error = decode(mechanism, total(mechanism, encoded), SEED).vector - true
    rms = float(np.sqrt((error**2).mean()))
    assert rms == pytest.approx(mechanism.noise_multiplier * 2.0, rel=0.02)
    for direction in (shared, np.sign(true) / math.sqrt(d), np.ones(d) / math.sqrt(d), unit_vector(d, 999)):
        assert abs(error @ direction) < 5 * rms  # no bias in any direction that it might have
    assert abs((error**4).mean() / rms**4 - 3) < 5 * math.sqrt(96 / d)


@pytest.mark.parametrize("unit", ["device", "example"])
def test_over_many_rounds_the_mean_of_the_decoded_sum_is_the_sum(unit):
    """Values of a few steps, so that a rounding which favours one side would show."""
    n, d, rounds = 3, 20, 3000
    mechanism = Mechanism(unit, d, 1.0, 0.2, 5.0, n, 16)
    vectors = [0.9 * unit_vector(d, 50 + i) for i in range(n)]
    decoded = np.array(
        [
            decode(
                mechanism,
                total(mechanism, [encode(mechanism, v, None, bytes([r % 251]) * 32, entropy(n * r + i))
                                  for i, v in enumerate(vectors)]),
                bytes([r % 251]) * 32,
            ).vector
            for r in range(rounds)
        ]
    )  # fmt: skip
    error = decoded - np.sum(vectors, axis=0)
    spread = 0.2 * math.sqrt(25 + n / 4)
    assert np.abs(error.mean(axis=0)).max() < 5 * spread / math.sqrt(rounds)
    assert abs(error.mean()) < 5 * spread / math.sqrt(rounds * d)


def test_metrics_come_back_unbiased():
    n, rounds = 4, 1500
    mechanism = EXAMPLE
    metrics = [
        MetricSums(5.0, 3.0, 7.5, 4.0), NOTHING, MetricSums(31.0, 31.0, 93.0, 31.0), MetricSums(1.0, 0.0, 3.0, 0.0)
    ]  # fmt: skip
    vectors = [3.0 * unit_vector(40, i) for i in range(n)]
    seen = []
    for r in range(rounds):
        encoded = [encode(mechanism, vectors[i], metrics[i], SEED, entropy(n * r + i)) for i in range(n)]
        seen.append(decode(mechanism, total(mechanism, encoded), SEED).metrics)
    error = np.array([astuple(m) for m in seen]) - np.sum([astuple(m) for m in metrics], axis=0)
    spread = 0.01 * math.sqrt(100.0**2 + n / 4) / mechanism.metric_scale
    assert np.abs(error.mean(axis=0)).max() < 5 * spread / math.sqrt(rounds)
    assert np.allclose(error.std(axis=0), spread, rtol=0.1)


def test_each_group_of_a_partition_carries_the_whole_noise():
    """Groups of h, h + 2 and 3 h devices that send nothing but noise; two of the second group's are corrupt: silent."""
    d, h, sigma = 20_000, 5, 300.0
    mechanism = Mechanism("example", d, 1.0, 0.01, sigma, h, 20)
    nothing = np.zeros(d)
    sent = {size: [encode(mechanism, nothing, None, SEED, entropy(100 * size + i)) for i in range(size)]
            for size in (h, h + 2, 3 * h)}  # fmt: skip
    groups = {1.0: sent[h], 7 / 5: sent[h + 2], 3.0: sent[3 * h]}
    for factor, encoded in groups.items():
        variance = float((centred(mechanism, total(mechanism, encoded)).astype(float) ** 2).mean())
        assert variance == pytest.approx(factor * sigma**2, rel=5 * math.sqrt(2 / d))
    honest = sent[h + 2][2:]
    variance = float((centred(mechanism, total(mechanism, honest)).astype(float) ** 2).mean())
    assert variance == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / d))


@given(st.floats(10.0, 1e6), st.integers(2, 5000))
def test_h_shares_are_never_less_than_the_total_and_no_more_than_one_rounding_above(sigma, honest):
    if not 2.0 <= sigma / math.sqrt(honest) <= 2.0**24:
        sigma = 3.0 * math.sqrt(honest)
    share = Mechanism("device", 10, 1.0, 0.01, sigma, honest, 18).share_sigma
    assert Fraction(share) ** 2 * honest >= Fraction(sigma) ** 2
    assert Fraction(math.nextafter(share, 0)) ** 2 * honest < Fraction(sigma) ** 2


def test_a_share_that_one_unit_in_the_last_place_would_not_save():
    share = Mechanism("device", 10, 1.0, 0.01, 80663.86688899022, 2, 18).share_sigma
    assert Fraction(share) ** 2 * 2 >= Fraction(80663.86688899022) ** 2


def test_an_empty_draw_sends_its_share_of_noise():
    mechanism = Mechanism("example", 50_000, 1.0, 0.01, 400.0, 16, 20, metric_scale=0.1)
    sent = centred(mechanism, encode(mechanism, np.zeros(50_000), NOTHING, SEED, entropy(0))).astype(float)
    assert (sent**2).mean() == pytest.approx(100.0**2, rel=5 * math.sqrt(2 / 50_000))
    assert abs(sent.mean()) < 5 * 100 / math.sqrt(50_000)


def test_every_coordinate_carries_noise_the_metrics_too():
    """Before the rotation is undone, since afterwards one coordinate's noise is everybody's."""
    rounds = 2000
    sent = [encode(EXAMPLE, np.zeros(40), NOTHING, SEED, entropy(i)) for i in range(rounds)]
    variances = (centred(EXAMPLE, np.array(sent)).astype(float) ** 2).mean(axis=0)
    assert variances.shape == (44,)
    assert np.abs(variances / 50.0**2 - 1).max() < 5 * math.sqrt(2 / rounds)


@pytest.mark.parametrize("share", [3.0, 40.0])
def test_rounding_and_noise_share_no_bits(share):
    """Halves of a step round by one bit of a coin each; no noise near it in any order of reading knows that bit."""
    d = 20_000
    mechanism = Mechanism("example", d, 1.0, 0.5, share * math.sqrt(2), 2, 16)
    halves = rotate_back(np.full(d, 0.25), SEED) * (1 + 1e-9)
    noise = centred(mechanism, encode(mechanism, np.zeros(d), None, SEED, entropy(0)))
    message = centred(mechanism, encode(mechanism, halves, None, SEED, entropy(0)))
    bits = (message - noise).astype(float)
    assert set(bits) == {0.0, 1.0}
    for stride in (1, 2, 4, 8):
        for start in range(stride):
            heard = noise[start::stride].astype(float)
            assert abs(np.corrcoef(bits[: len(heard)], heard)[0, 1]) < 5 / math.sqrt(len(heard))


# --- sensitivity, on the real encoder: the same entropy twice cancels the noise ---


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.lists(finite, min_size=40, max_size=40),
    st.builds(MetricSums, st.floats(0, 1), st.floats(0, 1), st.floats(0, 3), st.floats(0, 1)),
    st.booleans(),
    st.sampled_from([0.5, 0.01, 1e-4]),
)
def test_a_devices_whole_message_is_never_longer_than_its_sensitivity(values, metrics, most, granularity):
    mechanism = Mechanism("device", 40, 1.0, granularity, 100.0, 4, 31, metric_scale=0.7, loss_bound=3.0)
    metrics = MetricSums(1.0, 1.0, 3.0, 1.0) if most else metrics
    message = encode(mechanism, np.array(values), metrics, SEED, entropy(1))
    nothing = encode(mechanism, np.zeros(40), NOTHING, SEED, entropy(1))
    difference = centred(mechanism, message.astype(np.int64) - nothing)
    assert sum(int(x) ** 2 for x in difference) <= mechanism.sensitivity_steps**2


@given(st.integers(0, 10_000), st.integers(0, 400), st.sampled_from([0.5, 0.01, 1e-4]))
def test_one_example_moves_a_sum_by_no_more_than_its_sensitivity(key, others, granularity):
    mechanism = replace(EXAMPLE, granularity=granularity, modulus_bits=31, sigma=10.0)
    base = others * unit_vector(40, key)
    before = encode(mechanism, base, MetricSums(others, others / 2, 2.5 * others, others / 3), SEED, entropy(key))
    one = base + 1.0009 * unit_vector(40, key + 1)  # what float32 may make of a gradient of norm 1
    more = MetricSums(others + 1, others / 2 + 1, 2.5 * others + 3.0, others / 3 + 1)
    after = encode(mechanism, one, more, SEED, entropy(key))
    difference = centred(mechanism, after.astype(np.int64) - before)
    assert sum(int(x) ** 2 for x in difference) <= mechanism.sensitivity_steps**2
    exact = math.sqrt(1.0009**2 + 0.25 * (3 + 9)) / granularity
    assert math.sqrt(sum(int(x) ** 2 for x in difference)) > exact - math.sqrt(44)


def test_a_devices_message_is_held_to_its_sensitivity_where_one_rounding_in_nine_would_pass_it():
    mechanism = Mechanism("device", 40, 1.0, 0.001, 100.0, 4, 31)
    nothing, unheld = np.zeros(40), 0
    for i in range(150):
        vector = unit_vector(40, 7 * i)
        seen = []
        for unit in ("device", "example"):
            own = replace(mechanism, unit=unit)
            message = encode(own, vector, None, SEED, entropy(i)).astype(np.int64)
            difference = centred(own, message - encode(own, nothing, None, SEED, entropy(i)))
            seen.append(sum(int(x) ** 2 for x in difference) <= mechanism.sensitivity_steps**2)
        assert seen[0]
        unheld += not seen[1]
    assert unheld > 5


def test_sensitivities_of_both_units_by_hand():
    device = Mechanism("device", 100, 3.0, 0.5, 100.0, 4, 18)
    assert device.sensitivity == 3.0
    assert device.beta == CONDITIONAL_BETA == pytest.approx(math.exp(-0.5))
    assert device.sensitivity_steps == pytest.approx(math.sqrt(36 + 25 + 6 + 5))
    assert device.sensitivity_steps > math.sqrt(72) * (1 + 1e-10)  # room for the rotation's rounding
    assert device.noise_multiplier == pytest.approx(100 / math.sqrt(72))
    example = Mechanism("example", 96, 3.0, 0.5, 100.0, 4, 18, metric_scale=2.0, loss_bound=4.0)
    assert example.length == 100
    assert example.sensitivity == pytest.approx(1.001 * math.sqrt(3**2 + 4 * (1 + 1 + 16 + 1)))
    assert example.beta == UNCONDITIONAL_BETA == 1e-12
    c = example.sensitivity / 0.5
    assert example.sensitivity_steps == pytest.approx(
        min(math.sqrt(c * c + 25 + math.sqrt(2 * math.log(1e12)) * (c + 5)), c + 10)
    )
    tiny = Mechanism("device", 1, 1e-90, 1e-90, 10.0, 2, 18, metric_scale=1e-95)
    assert tiny.sensitivity_steps >= 1.0  # squares of such numbers would be zero


def test_a_wide_vector_is_clipped_before_it_is_rounded_and_an_example_sum_is_not_clipped():
    long = 50.0 * unit_vector(40, 3)
    device = encode(DEVICE, long, None, SEED, entropy(0))
    clipped = encode(DEVICE, long / 50.0, None, SEED, entropy(0))
    assert np.abs(centred(DEVICE, device.astype(np.int64) - clipped)).max() <= 1
    example = replace(DEVICE, unit="example")
    sums = [decode(example, encode(example, long, None, SEED, entropy(i)), SEED).vector for i in range(200)]
    assert np.linalg.norm(np.mean(sums, axis=0)) == pytest.approx(50.0, rel=0.02)


# --- brute force: the exact distribution of a tiny real mechanism ---


class Coins:
    """In place of the rounding stream: the same word for every coin."""

    def __init__(self, word: int) -> None:
        self.word = word

    def words64(self, count: int) -> np.ndarray:
        return np.full(count, self.word, dtype="<u8")


class Silence:
    """In place of the noise sampler."""

    def sample(self, stream: object, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)


def message_distribution(monkeypatch, mechanism: Mechanism, value: float) -> np.ndarray:
    """P(message before noise) over Z_(2^b), d = 1: the real `encode`, its coin's threshold found by bisection."""
    ratios = []
    monkeypatch.setattr(module, "noise_sampler", lambda *ratio: ratios.append(ratio) or Silence())

    def rounded(coin: int) -> int | None:
        monkeypatch.setattr(module, "KeyStream", lambda key: Coins(coin << 11))
        try:
            return int(encode(mechanism, np.array([value]), None, SEED, entropy(0))[0])
        except ParameterError:  # this rounding is always drawn again: nothing else can be wrong with such a value
            return None

    first, last = rounded(0), rounded((1 << 53) - 1)
    low, high = 0, 1 << 53
    while first != last and low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if rounded(middle) == first else (low, middle)
    chances = np.zeros(1 << mechanism.modulus_bits)
    for outcome, ways in (
        (first, high if first != last else 1 << 53),
        (last, 0 if first == last else (1 << 53) - high),
    ):
        if outcome is not None:
            chances[outcome] += ways
    assert set(ratios) == {mechanism.share_sigma.as_integer_ratio()}
    return chances / chances.sum()


def noise_distribution(mechanism: Mechanism, devices: int) -> np.ndarray:
    """P(sum of the devices' noise) over Z_(2^b), from the sampler's own 128-bit table."""
    table = NoiseSampler(*mechanism.share_sigma.as_integer_ratio())._table
    assert table is not None
    edges = [0, *table.boundaries, 1 << 128]
    chances = np.array([(b - a) / 2.0**128 for a, b in pairwise(edges)])
    modulus = 1 << mechanism.modulus_bits
    one = np.zeros(modulus)
    np.add.at(one, np.arange(-table.bound, table.bound + 1) % modulus, chances)
    result = one
    for _ in range(devices - 1):
        result = wrapped_sum(result, one)
    return result


def wrapped_sum(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The distribution of a sum modulo the length; products only, so that small chances stay exact."""
    return np.array([p @ q[(k - np.arange(len(p))) % len(p)] for k in range(len(p))])


def exact_epsilon(p: np.ndarray, q: np.ndarray, delta: float) -> float:
    """The least epsilon with sum max(0, p - e^epsilon q) <= delta, both ways round."""

    def excess(epsilon: float) -> float:
        grown = math.exp(epsilon)
        return max(float(np.maximum(p - grown * q, 0).sum()), float(np.maximum(q - grown * p, 0).sum()))

    low, high = 0.0, 60.0
    if excess(0.0) <= delta:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return high


def claimed_epsilon(mechanism: Mechanism, delta: float) -> float:
    """From noise multiplier and correction alone: Gaussian RDP at many orders, to (epsilon, delta).

    RDP: Kairouz, Liu and Steinke 2021, Proposition 14. Conversion: Canonne, Kamath and Steinke 2020, Proposition 12.
    """
    if mechanism.unit == "example":
        delta -= mechanism.beta
    scale, tau, d = 1 / mechanism.noise_multiplier, mechanism.sum_correction(), mechanism.length
    best = math.inf
    for alpha in np.geomspace(1.001, 1e4, 4000):
        rdp = min(alpha / 2 * scale**2 + tau * d, alpha / 2 * (scale + tau * math.sqrt(d)) ** 2)
        best = min(best, rdp + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1))
    return best


TINY = [
    (clip, granularity, sigma, honest, n, bits)
    for clip, granularity in [(1.0, 1.0), (4.45, 1.0), (1.0, 0.13), (0.2, 1.0), (3.0, 1.5)]
    for sigma, honest, n, bits in [(2 * math.sqrt(2), 2, 2, 6), (8.0, 2, 3, 7), (5.0, 3, 3, 4)]
]


@pytest.mark.parametrize("unit", ["device", "example"])
@pytest.mark.parametrize(("clip", "granularity", "sigma", "honest", "n", "bits"), TINY)
def test_a_tiny_mechanism_leaks_no_more_than_is_claimed(monkeypatch, unit, clip, granularity, sigma, honest, n, bits):
    """d = 1, all n devices' exact output distributions; one unit there, or not. The claim is near: within a factor."""
    mechanism = Mechanism(unit, 1, clip, granularity, sigma, honest, bits)
    bystanders = noise_distribution(mechanism, n)
    for i in range(1, n):
        bystanders = wrapped_sum(bystanders, message_distribution(monkeypatch, mechanism, (-0.37) ** i * clip))
    worst = dict.fromkeys((1e-2, 1e-4, 1e-6), 0.0)
    bases = [0.0] if unit == "device" else [0.0, 0.31 * clip, -2.6 * clip]
    for base in bases:
        without = wrapped_sum(bystanders, message_distribution(monkeypatch, mechanism, base))
        for share in (1.0, -1.0, 0.4, 1000.0):
            # A device's vector is clipped by `encode`, an example by the graph, to float32's accuracy.
            value = share * clip if unit == "device" else base + max(-1.001, min(1.001, share)) * clip
            present = wrapped_sum(bystanders, message_distribution(monkeypatch, mechanism, value))
            for delta in worst:
                worst[delta] = max(worst[delta], exact_epsilon(present, without, delta))
    for delta, epsilon in worst.items():
        assert epsilon <= claimed_epsilon(mechanism, delta)
    if clip > 3 * granularity and n == honest and bits > 4:
        # Not by a wide margin: what is left is rounding, and RDP's conversion.
        assert worst[1e-6] > 0.6 * claimed_epsilon(mechanism, 1e-6)


def test_wrapping_costs_no_privacy(monkeypatch):
    """The same mechanism with a modulus far below its noise: every epsilon is smaller, none larger."""
    for delta in (1e-2, 1e-5):
        found = []
        for bits in (3, 4, 5, 7):
            mechanism = Mechanism("device", 1, 4.0, 1.0, 6.0, 2, bits)
            noise = noise_distribution(mechanism, 2)
            pair = [wrapped_sum(noise, message_distribution(monkeypatch, mechanism, value)) for value in (4.0, 0.0)]
            found.append(exact_epsilon(*pair, delta))
        assert found == sorted(found)
        assert found[0] < found[-1]


@pytest.mark.parametrize("honest", [2, 3, 7])
def test_the_correction_covers_the_exact_distance_of_a_sum_from_one_discrete_gaussian(honest):
    """Share sigma 2, h of them against one of sigma 2 sqrt(h), to 60 digits: the largest log ratio within 40."""
    mechanism = Mechanism("device", 1, 1.0, 0.1, 2.0 * math.sqrt(honest), honest, 18)
    assert mechanism.share_sigma == pytest.approx(2.0, abs=1e-12)
    with localcontext() as context:
        context.prec = 60

        def discrete(variance: Decimal, reach: int) -> list[Decimal]:
            weights = [(-Decimal(k * k) / (2 * variance)).exp() for k in range(-reach, reach + 1)]
            whole = sum(weights)
            return [w / whole for w in weights]

        reach = 60
        share = Decimal(mechanism.share_sigma) ** 2
        one = discrete(share, reach)
        added = one
        for _ in range(honest - 1):
            width = len(added) + len(one) - 1
            longer = [Decimal(0)] * width
            for i, p in enumerate(added):
                for j, q in enumerate(one):
                    longer[i + j] += p * q
            middle = width // 2
            added = longer[middle - reach : middle + reach + 1]
        single = discrete(share * honest, reach * 4)[3 * reach : 5 * reach + 1]
        centre = slice(reach - 40, reach + 41)
        largest = max(abs((p / q).ln()) for p, q in zip(added[centre], single[centre], strict=True))
    correction = mechanism.sum_correction()
    assert 0 < float(largest) <= correction
    assert correction < 1e-15  # at the least share; times 10^7 coordinates it is nothing
    assert correction == pytest.approx(
        10 * sum(math.exp(-2 * math.pi**2 * 4 * k / (k + 1)) for k in range(1, honest)), rel=1e-9
    )


# --- modulus ---


def test_wrapping_is_exact_modulo_every_power_of_two():
    full, metrics = replace(EXAMPLE, modulus_bits=31), MetricSums(7.0, 2.0, 9.0, 3.0)
    whole = encode(full, 30 * unit_vector(40, 0), metrics, SEED, entropy(5))
    for bits in range(2, 31):
        narrow = encode(replace(full, modulus_bits=bits), 30 * unit_vector(40, 0), metrics, SEED, entropy(5))
        assert np.array_equal(narrow, whole & np.uint32((1 << bits) - 1))
        assert narrow.dtype == np.uint32


@pytest.mark.parametrize("bits", [2, 8, 18, 31])
def test_decode_takes_the_representative_nearest_to_zero(bits):
    mechanism = Mechanism("device", 1, 1.0, 0.25, 10.0, 2, bits)
    half = 1 << (bits - 1)
    sign = decode(mechanism, np.array([1], dtype=np.uint32), SEED).vector[0] / 0.25
    assert abs(sign) == 1
    for residue, value in [(0, 0), (half - 1, half - 1), (half, -half), (2 * half - 1, -1)]:
        got = decode(mechanism, np.array([residue], dtype=np.uint32), SEED)
        assert got.vector[0] == sign * value * 0.25
        assert got.metrics is None
        lifted = np.array([residue + 2 * half], dtype=np.uint32)  # a sum modulo 2^32 is as good
        assert decode(mechanism, lifted, SEED).vector[0] == got.vector[0]


def test_sums_that_fit_are_decoded_whatever_wrapped_on_the_way():
    mechanism = Mechanism("example", 64, 10.0, 0.01, 60.0, 4, 12)
    vectors = [factor * unit_vector(64, 0) for factor in (100.0, -100.0, 90.0, -89.0)]  # each wraps by itself
    encoded = [encode(mechanism, v, None, SEED, entropy(i)) for i, v in enumerate(vectors)]
    error = decode(mechanism, total(mechanism, encoded), SEED).vector - np.sum(vectors, axis=0)
    assert np.abs(error).max() < 6 * 0.61


def test_wraps_are_no_more_frequent_than_the_bound():
    """Aligned vectors over many seeds; the bound is above what is seen, and says no when there is room."""
    mechanism = Mechanism("device", 64, 1.0, 0.02, 6.0, 3, 8)
    n, rounds = 3, 1500
    vector = np.zeros(64)
    vector[5] = 1.0  # every rotated coordinate has magnitude n c / 8: 18.75 of 127
    wide = replace(mechanism, modulus_bits=20)
    largest = []
    for r in range(rounds):
        seed = r.to_bytes(32, "little")
        encoded = [encode(wide, vector, None, seed, entropy(n * r + i)) for i in range(n)]
        largest.append(np.abs(centred(wide, total(wide, encoded))).max())
    for bits in (6, 7, 8):
        bound = replace(mechanism, modulus_bits=bits).wrap_probability(n)
        assert np.mean(np.array(largest) >= 2 ** (bits - 1)) <= bound
    assert replace(mechanism, modulus_bits=8).wrap_probability(n) < 1e-4
    assert replace(mechanism, modulus_bits=2).wrap_probability(n) == 1.0


def test_the_wrap_bound_by_hand():
    device = Mechanism("device", 10_000, 1.0, 1 / 60_000, 10_000.0, 10, 18)
    variance = (20 * 60_000.0) ** 2 / 4096 + 20 * (0.25 + 10_000.0**2 / 10)
    room = 2**17 - 1 - 20
    by_hand = 20_000 * math.exp(-room * room / (2 * variance))
    assert 1e-6 < by_hand < 0.1
    assert device.wrap_probability(20) == pytest.approx(by_hand, rel=1e-6)
    example = Mechanism("example", 9_996, 1.0, 0.001, 10_000.0, 10, 18, metric_scale=0.1)
    c = 1001 * math.sqrt(1 + 0.04)
    variance = (1200 * c) ** 2 / 4096 + 20 * (0.25 + 10_000.0**2 / 10)
    room = 2**17 - 1
    by_hand = 20_000 * math.exp(-room * room / (2 * variance))
    assert 1e-6 < by_hand < 0.1
    assert example.wrap_probability(20, 1200) == pytest.approx(by_hand, rel=1e-6)
    assert example.wrap_probability(20, 1200) > 1e3 * example.wrap_probability(20, 20)  # examples count, not devices
    for contributors, units in [(0, None), (20, None), (20, -1)]:
        with pytest.raises(ParameterError, match="no bound"):
            example.wrap_probability(contributors, units)


# --- determinism ---


@pytest.mark.parametrize(
    ("mechanism", "metrics", "digest"),
    [
        (DEVICE, None, "ace545dc95cba502"),
        (EXAMPLE, MetricSums(12.0, 9.0, 20.0, 7.0), "1830a115c0c1dd1a"),
        (
            Mechanism("device", 5000, 1.0, 1e-4, 2e4, 9, 24, 0.1, 2.0),
            MetricSums(1.0, 0.75, 1.5, 1.0),
            "f52afca8244dd451",
        ),
    ],
)
def test_the_same_entropy_sends_the_same_bytes(mechanism, metrics, digest):
    vector = 7 * unit_vector(mechanism.dimension, 77)
    kept = vector.copy()
    message = encode(mechanism, vector, metrics, SEED, entropy(9))
    assert sha256(message.astype("<u4").tobytes()).hexdigest()[:16] == digest
    assert np.array_equal(message, encode(mechanism, vector, metrics, SEED, entropy(9)))
    assert np.array_equal(vector, kept)


@pytest.mark.parametrize(("unit", "digest"), [("device", "031611ceabc5c863"), ("example", "0442f830bc3213e0")])
def test_long_messages_are_the_same_bytes_however_they_are_cut_for_the_work(unit, digest):
    """More coordinates than one chunk of noise, and a last piece and block that are not whole. The digests were made
    when the whole vector was worked on at once."""
    mechanism = Mechanism(unit, 70_001, 1.0, 1e-4, 2e4, 9, 24, 0.1, 2.0)
    vector = KeyStream(bytes(32)).words64(70_001) / 2.0**63 - 1.0
    message = encode(mechanism, vector, MetricSums(1.0, 0.75, 1.5, 1.0), SEED, entropy(9))
    assert sha256(message.astype("<u4").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("unit", ["device", "example"])
def test_encoding_takes_the_memory_of_two_vectors_and_two_megabytes(unit):
    mechanism = Mechanism(unit, 500_000, 1.0, 1e-4, 2e4, 9, 24)
    vector = np.full(500_000, 1e-3)
    encode(mechanism, vector, None, SEED, entropy(9))  # makes the tables, which stay
    tracemalloc.start()
    try:
        encode(mechanism, vector, None, SEED, entropy(9))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * vector.nbytes + 2_000_000  # and a chunk of noise


def test_other_entropy_and_another_seed_give_other_noise():
    zero = np.zeros(40)
    messages = [encode(DEVICE, zero, None, seed, e) for seed in (SEED, bytes(32)) for e in (entropy(0), entropy(1))]
    assert len({m.tobytes() for m in messages}) == 4
    many = replace(DEVICE, dimension=20_000)
    zero = np.zeros(20_000)
    noises = [centred(many, encode(many, zero, None, seed, e)) for seed, e in
              [(SEED, entropy(0)), (SEED, entropy(1)), (bytes(32), entropy(0))]]  # fmt: skip
    correlation = np.corrcoef(noises) - np.eye(3)
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


def test_decoding_needs_the_seed_of_encoding():
    mechanism = Mechanism("device", 64, 10.0, 0.01, 10.0, 2, 20)
    vector = 9 * unit_vector(64, 0)
    message = encode(mechanism, vector, None, SEED, entropy(0))
    assert np.allclose(decode(mechanism, message, SEED).vector, vector, atol=1.0)
    assert not np.allclose(decode(mechanism, message, bytes(32)).vector, vector, atol=1.0)


# --- clipping ---


@given(st.lists(finite, min_size=1, max_size=30), st.floats(1e-100, 1e100))
def test_clipping_never_exceeds_the_bound_and_keeps_the_direction(values, bound):
    vector = np.array(values)
    clipped = clip_l2(vector, bound)
    peak = float(np.abs(clipped).max())
    norm = peak * float(np.linalg.norm(clipped / peak)) if peak else 0.0
    assert norm <= bound * (1 + 1e-12)
    assert np.all((clipped == 0) | (np.sign(clipped) == np.sign(vector)))
    largest = float(np.abs(vector).max())
    if math.sqrt(len(values)) * largest < bound:
        assert np.array_equal(clipped, vector)
    elif largest > bound:
        assert norm >= bound * (1 - 1e-9)  # no more than it has to


@pytest.mark.parametrize(
    "vector",
    [[1.7e308, -1.7e308, 1.7e308], [5e-324, -5e-324], [1.7e308, 5e-324], [1e200] * 100, [0.0, 0.0], [1e-200, 0.0]],
)
def test_clipping_survives_the_ends_of_float64(vector):
    vector = np.array(vector)
    clipped = clip_l2(vector, 2.0)
    assert np.isfinite(clipped).all()
    if np.abs(vector).max() > 2:
        assert np.linalg.norm(clipped) == pytest.approx(2.0)
    else:
        assert np.array_equal(clipped, vector)
    assert clipped is not vector


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_that_is_not_above_zero_is_refused(bound):
    with pytest.raises(ParameterError, match="clip bound"):
        clip_l2(np.ones(3), bound)


# --- what is refused, with the name of what is wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "user"}, "unit is 'user'"),
        ({"dimension": 0}, "dimension is 0"),
        ({"dimension": math.nan}, "dimension is nan: an integer"),
        ({"dimension": 10.0}, r"dimension is 10\.0: an integer"),
        ({"clip": 0.0}, "clip is 0"),
        ({"clip": -1.0}, "clip is -1"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": math.inf}, "clip is inf"),
        ({"clip": 1e-200}, "clip is 1e-200"),
        ({"clip": 1e200}, r"clip is 1e\+200"),
        ({"clip": 5e-324}, "clip is 5e-324"),
        ({"granularity": 0.0}, "granularity is 0"),
        ({"granularity": math.nan}, "granularity is nan"),
        ({"granularity": 1e-13}, "granularity is 1e-13: too fine"),
        ({"sigma": 0.0}, "sigma is 0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"sigma": 3.99}, r"sigma = 3\.99 shared by 4 is 2 steps a device"),
        ({"sigma": 1e9}, "shared by 4"),
        ({"honest": 1}, "honest is 1"),
        ({"honest": 0}, "honest is 0"),
        ({"honest": math.nan}, "honest is nan"),
        ({"honest": 10**12}, "honest is 1000000000000"),
        ({"modulus_bits": 1}, "modulus_bits is 1"),
        ({"modulus_bits": 32}, "modulus_bits is 32"),
        ({"metric_scale": -0.1}, r"metric_scale is -0\.1"),
        ({"metric_scale": math.nan}, "metric_scale is nan"),
        ({"metric_scale": 1e-200}, "metric_scale is 1e-200"),
        ({"loss_bound": 0.0}, "loss_bound is 0"),
        ({"loss_bound": math.inf}, "loss_bound is inf"),
        ({"metric_scale": 1e90, "loss_bound": 1e90}, "too fine"),
    ],
)
def test_a_mechanism_that_cannot_hold_is_refused_by_name(change, message):
    with pytest.raises(ParameterError, match=message):
        replace(DEVICE, **change)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("unit", ["device", "example"])
@pytest.mark.parametrize("place", [0, 39])
def test_a_vector_with_a_number_that_is_none_is_refused(unit, bad, place):
    vector = np.zeros(40)
    vector[place] = bad
    with pytest.raises(ParameterError, match="NaN or infinity"):
        encode(replace(DEVICE, unit=unit), vector, None, SEED, entropy(0))


@pytest.mark.parametrize("size", [1e10, 1e15, 1.7e308])
def test_a_sum_too_large_for_its_steps_is_refused_even_where_the_rotation_would_overflow(size):
    """An infinity less an infinity is a NaN, which no comparison of the rotated vector would notice."""
    for vector in (np.full(40, size), np.full(40, -size), size * np.eye(40)[3]):
        with pytest.raises(ParameterError, match="too large for this granularity"):
            encode(replace(DEVICE, unit="example", granularity=0.001, sigma=1000.0), vector, None, SEED, entropy(0))


def test_the_largest_sum_that_is_taken_is_still_rounded_exactly():
    mechanism = replace(DEVICE, unit="example", dimension=64, granularity=0.5, modulus_bits=31)
    vector = np.zeros(64)
    vector[0] = 0.5 * (2.0**40 - 2.0**10)
    encode(mechanism, vector, None, SEED, entropy(0))
    with pytest.raises(ParameterError, match="too large"):
        encode(mechanism, vector + 0.5 * 2.0**11, None, SEED, entropy(0))


@pytest.mark.parametrize(
    "vector",
    [np.zeros(39), np.zeros(41), np.zeros(0), np.zeros((40, 1)), np.zeros(40, np.float32), np.zeros(40, np.int64)],
)
def test_a_vector_of_another_shape_or_type_is_refused(vector):
    with pytest.raises(ParameterError, match=r"the vector is float64 \(40,\)"):
        encode(DEVICE, vector, None, SEED, entropy(0))


@pytest.mark.parametrize("values", [np.zeros(44, np.uint64), np.zeros(44, np.int32), np.zeros(40, np.uint32)])
def test_a_sum_of_another_shape_or_type_is_refused(values):
    with pytest.raises(ParameterError, match=r"a sum is uint32 \(44,\)"):
        decode(EXAMPLE, values, SEED)


@pytest.mark.parametrize(
    ("unit", "metrics", "named"),
    [
        ("device", (-0.1, 0.0, 0.0, 0.0), "negative"),
        ("device", (1.0, -1e-9, 0.0, 0.0), "negative"),
        ("device", (1.0, 0.0, math.nan, 0.0), "NaN"),
        ("device", (math.inf, 0.0, 0.0, 0.0), "infinity"),
        ("device", (1.0, 0.0, 0.0, math.nan), "NaN"),
        ("device", (1.1, 0.0, 0.0, 0.0), "count"),
        ("device", (1.0, 1.1, 0.0, 0.0), "correct"),
        ("device", (1.0, 1.0, 3.1, 0.0), "loss"),
        ("device", (1.0, 1.0, 3.0, 1.1), "unclipped"),
        ("example", (5.0, 5.1, 0.0, 0.0), "correct"),
        ("example", (5.0, 5.0, 15.1, 0.0), "loss"),
        ("example", (5.0, 5.0, 15.0, 5.1), "unclipped"),
        ("example", (0.0, 0.0, 0.1, 0.0), "loss"),
        ("example", (-1.0, 0.0, 0.0, 0.0), "negative"),
    ],
)
def test_metrics_beyond_what_the_sensitivity_counts_are_refused_by_name(unit, metrics, named):
    with pytest.raises(ParameterError, match=f"metrics .*{named}"):
        encode(replace(EXAMPLE, unit=unit), np.zeros(40), MetricSums(*metrics), SEED, entropy(0))


def test_metrics_are_given_exactly_if_the_plan_has_them():
    with pytest.raises(ParameterError, match="metric_scale"):
        encode(EXAMPLE, np.zeros(40), None, SEED, entropy(0))
    with pytest.raises(ParameterError, match="metric_scale"):
        encode(DEVICE, np.zeros(40), NOTHING, SEED, entropy(0))


@pytest.fixture
def sent(monkeypatch):
    """The vectors that go into the rotation."""
    vectors = []
    monkeypatch.setattr(module, "rotate", lambda vector, seed: vectors.append(vector.copy()) or vector)
    return vectors


def test_metrics_of_one_device_are_held_to_one_unit_even_within_the_checks_slack(sent):
    """Rounding errors of averages pass the check; they do not pass into the vector."""
    device = replace(EXAMPLE, unit="device")
    encode(device, np.zeros(40), MetricSums(1 + 5e-7, 1 + 5e-7, 3 + 1e-6, 1 + 1e-7), SEED, entropy(0))
    assert sent[0][40:].tolist() == [0.5, 0.5, 1.5, 0.5]


def test_a_loss_at_its_bound_for_every_example_is_sent_although_float32_sums_pass_the_bound(sent):
    """A device that went silent there would tell of its losses."""
    losses = float(np.full(200, 2.7, np.float32).cumsum(dtype=np.float32)[-1])
    assert losses > 200 * 2.7 * (1 + 1e-6)
    encode(replace(EXAMPLE, loss_bound=2.7), np.zeros(40), MetricSums(200.0, 0.0, losses, 0.0), SEED, entropy(0))
    assert sent[0][42] == pytest.approx(0.5 * 200 * 2.7, rel=1e-12)


@given(st.floats(0, 4000), st.floats(0, 3), st.integers(0, 1000))
def test_holding_a_sum_to_its_bound_lets_one_example_change_it_by_no_more_than_before(loss, one, count):
    loss = min(loss, 3.0 * count * 1.0009)
    before = module._bounded(EXAMPLE, MetricSums(count, 0.0, loss, 0.0))
    after = module._bounded(EXAMPLE, MetricSums(count + 1, 0.0, loss + one, 0.0))
    assert -1e-9 <= after[2] - before[2] <= 3.0 + 1e-9


# --- a device's metrics ---


def test_a_devices_metrics_are_one_unit_with_means_over_its_examples():
    device = replace(EXAMPLE, unit="device")
    metrics = device_metrics(device, np.full(40, 0.1), count=50.0, correct=40.0, loss=75.0)
    assert metrics == MetricSums(count=1.0, correct=0.8, loss=1.5, unclipped=1.0)
    assert device_metrics(device, np.full(40, 0.1), 0.0, 0.0, 0.0) == NOTHING
    assert device_metrics(device, np.zeros(40), 50.0, 50.001, 0.0).correct == 1.0  # what float32 makes of fifty
    just = np.zeros(40)
    just[7] = -device.clip
    assert device_metrics(device, just, 1.0, 0.0, 0.0).unclipped == 1.0  # a vector that clipping leaves as it is


@pytest.mark.parametrize(
    ("loss", "sent_as"), [(1e9, 3.0), (math.inf, 3.0), (math.nan, 3.0), (-math.inf, 3.0), (-5.0, 0.0)]
)
def test_a_device_whose_loss_is_out_of_bounds_or_none_still_sends_within_them(loss, sent_as):
    device = replace(EXAMPLE, unit="device")
    metrics = device_metrics(device, np.zeros(40), 50.0, 40.0, loss)
    assert metrics.loss == sent_as
    encode(device, np.zeros(40), metrics, SEED, entropy(0))


@pytest.mark.parametrize("size", [1e-90, 1e-3, 1.0, 1e3, 1e90])
def test_the_unclipped_bit_says_whether_encoding_will_clip(size):
    device = Mechanism("device", 40, size, size / 100, 100.0, 4, 18, metric_scale=size)
    vector = unit_vector(40, 3)
    for factor, bit in [(0.0, 1.0), (0.999, 1.0), (1.001, 0.0), (1e80, 0.0)]:
        assert device_metrics(device, factor * size * vector, 5.0, 0.0, 0.0).unclipped == bit
        assert (np.array_equal(clip_l2(factor * size * vector, size), factor * size * vector)) == bool(bit)


@pytest.mark.parametrize(
    ("mechanism", "vector", "sums", "named"),
    [
        (EXAMPLE, np.zeros(40), (5.0, 3.0, 1.0), "unit"),
        (DEVICE, np.full(40, math.nan), (5.0, 3.0, 1.0), "NaN"),
        (DEVICE, np.full(40, math.inf), (5.0, 3.0, 1.0), "infinity"),
        (DEVICE, np.zeros(40), (-1.0, 0.0, 1.0), "number of examples"),
        (DEVICE, np.zeros(40), (math.nan, 0.0, 1.0), "number of examples"),
        (DEVICE, np.zeros(40), (math.inf, 0.0, 1.0), "number of examples"),
        (DEVICE, np.zeros(40), (5.0, 5.1, 1.0), "correct"),
        (DEVICE, np.zeros(40), (5.0, math.nan, 1.0), "correct"),
    ],
)
def test_metrics_that_no_device_can_have_are_refused(mechanism, vector, sums, named):
    with pytest.raises(ParameterError, match=named):
        device_metrics(mechanism, vector, *sums)


# --- another clip ---


@given(
    st.sampled_from(["device", "example"]), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.integers(1, 10**6),
    st.sampled_from([0.0, 0.02, 1.0]),
)  # fmt: skip
def test_a_mechanism_with_another_clip_keeps_noise_multiplier_sensitivity_in_steps_and_wrap_bound(
    unit, clip, factor, dimension, share
):
    before = Mechanism(unit, dimension, clip, clip / 3000, 9000.0, 10, 18, metric_scale=share * clip, loss_bound=3.0)
    after = before.scaled(clip * factor)
    assert after.clip == clip * factor
    assert after.sensitivity == pytest.approx(before.sensitivity * factor, rel=1e-12)
    assert after.noise_multiplier == pytest.approx(before.noise_multiplier, rel=1e-12)
    assert after.sensitivity_steps == pytest.approx(before.sensitivity_steps, rel=1e-12)
    assert after.wrap_probability(20, 400) == pytest.approx(before.wrap_probability(20, 400), rel=1e-9)
    assert (after.sigma, after.share_sigma, after.length) == (before.sigma, before.share_sigma, before.length)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, 1e-101])
def test_another_clip_that_is_none_is_refused(clip):
    with pytest.raises(ParameterError, match="clip is"):
        DEVICE.scaled(clip)


def test_short_entropy_is_refused():
    with pytest.raises(ParameterError, match="32"):
        encode(DEVICE, np.zeros(40), None, SEED, bytes(31))


def test_decoded_values_stay_out_of_logs():
    decoded = decode(DEVICE, np.zeros(40, np.uint32), SEED)
    assert "vector" not in repr(decoded)
