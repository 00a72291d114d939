"""Products in Z_2^32[X]/(X^2048 + 1) equal big-integer arithmetic, and the bound that they rest on is the right one."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.crypto import ring
from edge_sdk.crypto.ring import DEGREE, MAX_NORM, ShortFactor, public_blocks
from edge_sdk.crypto.stream import KeyStream
from edge_sdk.errors import ParameterError

SLOT_BYTES = 16  # a coefficient of a product is below 2048 * 2^32 * 10^6 < 2^64: no carry between slots


def kronecker(short: np.ndarray, block: np.ndarray) -> np.ndarray:
    """short * block modulo X^2048 + 1 and 2^32, by one multiplication of Python integers for each sign of `short`."""

    def evaluate(coefficients):
        slots = np.zeros((DEGREE, 2), dtype="<u8")
        slots[:, 0] = coefficients
        return int.from_bytes(slots.tobytes(), "little")

    def coefficients(number):
        raw = np.frombuffer(number.to_bytes(2 * DEGREE * SLOT_BYTES, "little"), dtype="<u4")
        return raw[:: SLOT_BYTES // 4]

    at_block = evaluate(block)
    positive = coefficients(evaluate(np.maximum(short, 0)) * at_block)
    negative = coefficients(evaluate(np.maximum(-short, 0)) * at_block)
    full = positive - negative
    return full[:DEGREE] - full[DEGREE:]


def multiply(short: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    out = np.full_like(blocks, 0xDEADBEEF)
    ShortFactor(short).multiply_into(blocks, out)
    return out


def assert_exact(short: np.ndarray, blocks: np.ndarray) -> None:
    before = blocks.copy()
    product = multiply(short, blocks)
    assert np.array_equal(blocks, before)
    for block, result in zip(blocks, product, strict=True):
        assert np.array_equal(result, kronecker(short, block))


def random_blocks(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, (count, DEGREE), dtype=np.uint32)


def random_short(deviation: float, seed: int = 0) -> np.ndarray:
    return np.rint(np.random.default_rng(seed).normal(0, deviation, DEGREE)).astype(np.int64)


def extreme_blocks() -> np.ndarray:
    """The blocks of the largest norm, 2^31 sqrt(2048), and others whose rounding errors could line up."""
    alternating = np.where(np.arange(DEGREE) % 2, np.uint32(1 << 31), np.uint32((1 << 31) - 1))
    impulse = np.zeros(DEGREE, dtype=np.uint32)
    impulse[-1] = 1 << 31
    return np.array(
        [
            np.full(DEGREE, 1 << 31),
            np.full(DEGREE, (1 << 32) - 1),
            np.full(DEGREE, (1 << 31) - 1),
            alternating,
            np.where(np.arange(DEGREE) % 2, 1, (1 << 32) - 1),
            np.where(random_blocks(1)[0] % 2, 1 << 31, (1 << 31) - 1),
            impulse,
            np.zeros(DEGREE),
        ]
    ).astype(np.uint32)


def with_norm_around(square: int) -> np.ndarray:
    """All coefficients 5 but one, which makes the squared norm as large as it can be without passing `square`."""
    short = np.full(DEGREE, 5, dtype=np.int64)
    last = 5
    while 25 * (DEGREE - 1) + (last + 1) ** 2 <= square:
        last += 1
    short[0] = last
    return short


LARGEST_SQUARE = int(MAX_NORM**2)
SIGNS = np.where(np.arange(DEGREE) % 2, 1, -1).astype(np.int64)
JUST_BELOW = with_norm_around(LARGEST_SQUARE)
JUST_ABOVE = JUST_BELOW.copy()
JUST_ABOVE[0] += 1


def monomial(power: int, coefficient: int = 1) -> np.ndarray:
    short = np.zeros(DEGREE, dtype=np.int64)
    short[power] = coefficient
    return short


FACTORS = {
    "zero": np.zeros(DEGREE, dtype=np.int64),
    "fresh secret, deviation 4.5": random_short(4.5),
    "sum of 10^4 secrets, deviation 450": random_short(450),
    "sum of 10^6 secrets, deviation 4500": random_short(4500),
    "just below the largest norm": JUST_BELOW,
    "just below, signs alternating": JUST_BELOW * SIGNS,
    "just above the largest norm": JUST_ABOVE,
    "just above, signs alternating": JUST_ABOVE * SIGNS,
    "one coefficient below": monomial(1000, int(MAX_NORM)),
    "one coefficient above": monomial(1000, int(MAX_NORM) + 1),
    "all -5, the lowest limb": np.full(DEGREE, -5, dtype=np.int64),
    "all 10^6": np.full(DEGREE, 10**6, dtype=np.int64),
    "all -10^6": np.full(DEGREE, -(10**6), dtype=np.int64),
    "10^6 with alternating signs": SIGNS * 10**6,
    "uniform in +-10^6": np.random.default_rng(3).integers(-(10**6), 10**6 + 1, DEGREE, dtype=np.int64),
}


def test_the_reference_product_is_negacyclic():
    x, last = monomial(1), np.zeros(DEGREE, dtype=np.uint32)
    last[-1] = 7
    expected = np.zeros(DEGREE, dtype=np.uint32)
    expected[0] = (1 << 32) - 7
    assert np.array_equal(kronecker(x, last), expected)
    short, block = monomial(3, -2) + monomial(2000, 5), np.arange(DEGREE, dtype=np.uint32)
    schoolbook = [0] * DEGREE
    for i in (3, 2000):
        for j in range(DEGREE):
            term = int(short[i]) * int(block[j])
            schoolbook[(i + j) % DEGREE] += term if i + j < DEGREE else -term
    assert kronecker(short, block).tolist() == [value % (1 << 32) for value in schoolbook]


@pytest.mark.parametrize("name", FACTORS)
def test_products_are_exact_on_random_and_on_extreme_blocks(name):
    assert_exact(FACTORS[name], np.concatenate([extreme_blocks(), random_blocks(3, seed=len(name))]))


@pytest.mark.parametrize("name", ["just below the largest norm", "just above the largest norm", "all 10^6"])
def test_products_are_exact_when_every_term_of_a_coefficient_has_the_same_sign(name):
    # Coefficient 0 of the product is |a| |s|, the largest value that the bound on the error allows for.
    short = FACTORS[name]
    aligned = np.empty(DEGREE, dtype=np.int64)
    aligned[0] = 1
    aligned[1:] = -np.sign(short[:0:-1])
    block = np.where(aligned > 0, (1 << 31) - 1, 1 << 31).astype(np.uint32)
    assert_exact(short, block[None])


@given(st.dictionaries(st.integers(0, DEGREE - 1), st.integers(-(10**6), 10**6), max_size=12), st.integers(0, 2**32))
@settings(max_examples=30)
def test_products_with_sparse_factors_are_exact(coefficients, seed):
    short = np.zeros(DEGREE, dtype=np.int64)
    for place, value in coefficients.items():
        short[place] = value
    assert_exact(short, random_blocks(2, seed))


@given(st.floats(0, 2.5e5), st.integers(0, 2**32), st.sampled_from(range(len(extreme_blocks()))))
@settings(max_examples=30)
def test_products_with_dense_factors_are_exact(deviation, seed, which):
    short = np.clip(random_short(deviation, seed), -(10**6), 10**6)
    assert_exact(short, np.stack([random_blocks(1, seed)[0], extreme_blocks()[which]]))


@given(st.integers(1, DEGREE - 1))
@settings(max_examples=20)
def test_a_monomial_shifts_and_what_comes_round_changes_sign(power):
    blocks = random_blocks(2)
    shifted = np.roll(blocks, power, axis=1)
    shifted[:, :power] = -shifted[:, :power]
    assert np.array_equal(multiply(monomial(power), blocks), shifted)


def test_x_to_the_2048_is_minus_one():
    blocks = random_blocks(3)
    half = multiply(monomial(DEGREE // 2), blocks)
    assert np.array_equal(multiply(monomial(DEGREE // 2), half), -blocks)
    assert np.array_equal(multiply(monomial(1), multiply(monomial(DEGREE - 1), blocks)), -blocks)


@given(st.integers(0, 2**32), st.floats(0, 1000), st.floats(0, 1000))
@settings(max_examples=15)
def test_multiplication_is_linear_in_both_arguments(seed, first, second):
    s, t = random_short(first, seed), random_short(second, seed + 1)
    a, b = random_blocks(2, seed), random_blocks(2, seed + 1)
    assert np.array_equal(multiply(s + t, a), multiply(s, a) + multiply(t, a))
    assert np.array_equal(multiply(s, a + b), multiply(s, a) + multiply(s, b))
    assert np.array_equal(multiply(-s, a), -multiply(s, a))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 33, 50])
def test_any_number_of_blocks_gives_the_products_of_the_single_blocks(count):
    short, blocks = random_short(450), random_blocks(count)
    product = multiply(short, blocks)
    assert product.shape == (count, DEGREE)
    for i in range(count):
        assert np.array_equal(product[i : i + 1], multiply(short, blocks[i : i + 1]))


def test_the_product_may_overwrite_the_blocks():
    short, blocks = random_short(450), random_blocks(20)
    expected = multiply(short, blocks)
    ShortFactor(short).multiply_into(blocks, blocks)
    assert np.array_equal(blocks, expected)


def test_blocks_may_be_a_strided_view():
    short, wide = random_short(4.5), random_blocks(12)
    out = np.zeros_like(wide)
    ShortFactor(short).multiply_into(wide[::3], out[::3])
    assert np.array_equal(out[::3], multiply(short, wide[::3].copy()))
    assert not out[1::3].any()


@pytest.mark.parametrize(
    "factor",
    [
        np.zeros(DEGREE, dtype=np.int32),
        np.zeros(DEGREE, dtype=np.float64),
        np.zeros(DEGREE, dtype=np.uint64),
        np.zeros(DEGREE // 2, dtype=np.int64),
        np.zeros(DEGREE + 1, dtype=np.int64),
        np.zeros((1, DEGREE), dtype=np.int64),
    ],
    ids=str,
)
def test_a_factor_of_another_shape_or_type_is_refused(factor):
    with pytest.raises(ParameterError, match="a factor is int64"):
        ShortFactor(factor)


@pytest.mark.parametrize("value", [10**6 + 1, -(10**6) - 1, 2**62, np.iinfo(np.int64).min, np.iinfo(np.int64).max])
def test_a_coefficient_above_a_million_is_refused(value):
    with pytest.raises(ParameterError, match="10\\^6"):
        ShortFactor(monomial(77, value))


@pytest.mark.parametrize(
    ("blocks", "out"),
    [
        (np.zeros((2, DEGREE), np.int32), np.zeros((2, DEGREE), np.uint32)),
        (np.zeros((2, DEGREE), np.uint64), np.zeros((2, DEGREE), np.uint32)),
        (np.zeros((2, DEGREE), ">u4"), np.zeros((2, DEGREE), np.uint32)),
        (np.zeros((2, DEGREE), np.uint32), np.zeros((2, DEGREE), np.uint64)),
        (np.zeros((2, DEGREE), np.uint32), np.zeros((3, DEGREE), np.uint32)),
        (np.zeros((2, DEGREE), np.uint32), np.zeros((1, DEGREE), np.uint32)),
        (np.zeros((2, DEGREE * 2), np.uint32), np.zeros((2, DEGREE * 2), np.uint32)),
        (np.zeros(DEGREE, np.uint32), np.zeros(DEGREE, np.uint32)),
    ],
    ids=range(8),
)
def test_blocks_of_another_shape_or_type_are_refused(blocks, out):
    with pytest.raises(ParameterError, match="blocks are uint32"):
        ShortFactor(random_short(4.5)).multiply_into(blocks, out)


def test_the_largest_norm_follows_from_the_theorem():
    # Brent, Percival, Zimmermann 2007, Theorem 5.1, with 3 twists more, in decimal arithmetic.
    with localcontext() as context:
        context.prec = 60
        u = Decimal(2) ** -53
        relative = (1 + u) ** 30 * (1 + u * Decimal(5).sqrt()) ** (31 + 3) * (1 + 2 * u) ** (30 + 3) - 1
        error = Decimal(2) ** 31 * Decimal(DEGREE).sqrt() * Decimal(MAX_NORM) * relative
        assert Decimal("0.4899999") < error < Decimal("0.4900001")
        # The rounding constant needs results below 2^51.
        assert Decimal(2) ** 31 * Decimal(DEGREE).sqrt() * Decimal(MAX_NORM) < 2**51
    assert DEGREE // 2 == 2**10


def test_every_limb_is_within_the_largest_norm():
    assert ring._LIMB // 2 * DEGREE**0.5 < MAX_NORM
    assert np.linalg.norm(JUST_BELOW) <= MAX_NORM < np.linalg.norm(JUST_ABOVE)
    assert repr(ShortFactor(JUST_BELOW)) == "ShortFactor(limbs=1)"
    assert repr(ShortFactor(JUST_ABOVE)) == "ShortFactor(limbs=2)"
    assert repr(ShortFactor(monomial(0, 263))) == "ShortFactor(limbs=1)"
    assert repr(ShortFactor(monomial(0, 264))) == "ShortFactor(limbs=2)"


def test_the_twists_are_within_the_error_that_the_bound_assumes():
    # cos and sin by their series in decimal arithmetic: an error of 2u is what the theorem was used with.
    with localcontext() as context:
        context.prec = 40
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582")
        for k in range(0, DEGREE // 2, 3):
            parts, term, order, angle = [Decimal(0), Decimal(0)], Decimal(1), 0, pi * k / DEGREE
            while abs(term) > Decimal(10) ** -36 or order < 2:
                parts[order % 2] += -term if order % 4 >= 2 else term
                order += 1
                term = term * angle / order
            twist = ring._TWIST[k]
            error = ((Decimal(float(twist.real)) - parts[0]) ** 2 + (Decimal(float(twist.imag)) - parts[1]) ** 2).sqrt()
            assert error <= 2 * Decimal(2) ** -53


def test_public_blocks_are_the_stream_as_little_endian_words_and_continue():
    stream, raw = KeyStream(bytes(32)), KeyStream(bytes(32)).read(5 * DEGREE * 4).tobytes()
    blocks = np.concatenate([public_blocks(stream, 3), public_blocks(stream, 2)])
    assert blocks.dtype == np.uint32
    assert blocks.shape == (5, DEGREE)
    assert blocks.astype("<u4").tobytes() == raw


def test_a_factor_does_not_show_or_share_its_coefficients():
    short, blocks = random_short(4.5), random_blocks(1)
    factor = ShortFactor(short)
    expected = multiply(short, blocks)
    short[:] = 0
    out = np.empty_like(blocks)
    factor.multiply_into(blocks, out)
    assert np.array_equal(out, expected)
    assert repr(factor) == "ShortFactor(limbs=1)"
    with pytest.raises(ParameterError) as caught:
        ShortFactor(monomial(5, 7_654_321))
    assert "7654321" not in str(caught.value).replace("_", "")
