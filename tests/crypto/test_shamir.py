"""Packed sharing: a threshold reconstructs, fewer say nothing, sums are sums, wrong answers are decoded or checked."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from official import official

from edge_sdk.crypto.shamir import MAX_SUBSETS, PRIME, PackedShamir, error_positions, lagrange
from edge_sdk.crypto.stream import KeyStream, uniform_residues
from edge_sdk.errors import ParameterError

FROST = official("rfc9591_frost_shamir")["cases"]
HALF = PRIME // 2


class Chosen:
    """A stream whose 16-bit words are the given residues, then zeros."""

    def __init__(self, residues):
        self.residues = np.asarray(residues, dtype="<u2").reshape(-1)

    def words16(self, count):
        assert count >= self.residues.size
        return np.concatenate([self.residues, np.zeros(count - self.residues.size, dtype="<u2")])


def stream_of(seed: int) -> KeyStream:
    return KeyStream(seed.to_bytes(32, "little"))


def secrets_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-HALF, HALF + 1, count, dtype=np.int64)


def interpolate(points: list[int], values: list[int], x: int) -> int:
    """The value at x of the polynomial through the points, by divided differences (Newton), modulo PRIME."""
    coefficients = [value % PRIME for value in values]
    for order in range(1, len(points)):
        for i in range(len(points) - 1, order - 1, -1):
            inverse = pow(points[i] - points[i - order], -1, PRIME)
            coefficients[i] = (coefficients[i] - coefficients[i - 1]) * inverse % PRIME
    result = 0
    for coefficient, point in zip(reversed(coefficients), reversed(points), strict=True):
        result = (result * (x - point) + coefficient) % PRIME
    return result


def rank(matrix: np.ndarray) -> int:
    rows, found = [[int(v) % PRIME for v in row] for row in matrix], 0
    for column in range(matrix.shape[1]):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        inverse = pow(rows[found][column], -1, PRIME)
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] * inverse
            rows[i] = [(a - factor * b) % PRIME for a, b in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def anything(_secrets: np.ndarray) -> bool:
    return True


def nothing(_secrets: np.ndarray) -> bool:
    return False


@st.composite
def schemes(draw, largest=24, extra=0):
    """(scheme, generator seed): corrupt + packing + extra <= members."""
    corrupt, packing = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    members = draw(st.integers(corrupt + packing + extra, largest))
    return PackedShamir(members, corrupt, packing), draw(st.integers(0, 2**32))


def some_answers(shares: np.ndarray, count: int, seed: int) -> dict[int, np.ndarray]:
    chosen = np.random.default_rng(seed).permutation(len(shares))[:count]
    return {int(i) + 1: shares[i].copy() for i in chosen}


@pytest.mark.parametrize("case", FROST, ids=[case["suite"] for case in FROST])
def test_lagrange_reconstructs_the_secrets_of_rfc_9591(case):
    order = int(case["order"], 16)
    secret, coefficient, *shares = (
        int.from_bytes(bytes.fromhex(value), case["byte_order"])
        for value in (case["secret"], case["coefficient"], *case["shares"].values())
    )
    for pair in combinations((1, 2, 3), case["threshold"]):
        values = [shares[i - 1] for i in pair]
        at_zero = lagrange(pair, 0, order)
        assert sum(w * v for w, v in zip(at_zero, values, strict=True)) % order == secret
        third = 6 - sum(pair)
        onwards = lagrange(pair, third, order)
        assert sum(w * v for w, v in zip(onwards, values, strict=True)) % order == shares[third - 1]
    assert (secret + coefficient) % order == shares[0]


@given(st.sets(st.integers(-50, 300), min_size=1, max_size=12), st.integers(-400, 400), st.data())
def test_lagrange_evaluates_every_polynomial_of_its_degree(points, target, data):
    coefficients = data.draw(st.lists(st.integers(0, PRIME - 1), min_size=len(points), max_size=len(points)))

    def value(x):
        return sum(c * x**k for k, c in enumerate(coefficients)) % PRIME

    weights = lagrange(sorted(points), target)
    assert sum(w * value(x) for w, x in zip(weights, sorted(points), strict=True)) % PRIME == value(target)


@pytest.mark.parametrize("points", [(1, 1), (0, PRIME), (-1, PRIME - 1), (3, 5, 3)])
def test_points_that_agree_modulo_the_prime_are_refused(points):
    with pytest.raises(ParameterError, match="not distinct"):
        lagrange(points, 7)


@given(schemes(), st.integers(1, 5))
def test_shares_lie_on_polynomials_whose_values_at_0_and_below_are_the_secrets(drawn, polynomials):
    scheme, seed = drawn
    secrets = secrets_of(scheme.packing * polynomials, seed)
    shares = scheme.share(secrets, stream_of(seed))
    assert shares.shape == (scheme.members, polynomials)
    assert shares.dtype == np.int64
    assert shares.min() >= 0
    assert shares.max() < PRIME
    points = [-slot for slot in range(scheme.packing)] + list(range(1, scheme.corrupt + 1))
    for column in range(polynomials):
        packed = secrets[column * scheme.packing : (column + 1) * scheme.packing]
        known = [int(v) for v in packed] + [int(v) for v in shares[: scheme.corrupt, column]]
        for member in range(1, scheme.members + 1):
            assert shares[member - 1, column] == interpolate(points, known, member)


@given(schemes(), st.integers(1, 20), st.data())
def test_any_threshold_of_answers_gives_the_secrets(drawn, polynomials, data):
    scheme, seed = drawn
    secrets = secrets_of(scheme.packing * polynomials, seed)
    shares = scheme.share(secrets, stream_of(seed))
    count = data.draw(st.integers(scheme.threshold, scheme.members))
    found = list(scheme.candidates(some_answers(shares, count, seed), nothing))
    assert len(found) == 1
    assert np.array_equal(found[0][0], secrets)
    assert found[0][1] == frozenset()


def test_every_threshold_subset_of_a_small_committee_gives_the_secrets():
    scheme, secrets = PackedShamir(7, 2, 2), secrets_of(6)
    shares = scheme.share(secrets, stream_of(1))
    for subset in combinations(range(1, 8), scheme.threshold):
        ((opened, disagree),) = scheme.candidates({n: shares[n - 1] for n in subset}, anything)
        assert np.array_equal(opened, secrets)
        assert not disagree


def test_the_largest_committee_works():
    scheme, secrets = PackedShamir(256, 80, 4), secrets_of(8)
    shares = scheme.share(secrets, stream_of(1))
    opened, disagree = next(scheme.candidates({n: shares[n - 1] for n in range(173, 257)}, nothing))
    assert np.array_equal(opened, secrets)
    assert not disagree


@given(schemes(), st.integers(1, 8), st.integers(2, 6))
def test_sums_of_shares_are_shares_of_the_sums(drawn, polynomials, senders):
    scheme, seed = drawn
    rows = [secrets_of(scheme.packing * polynomials, seed + i) // senders for i in range(senders)]
    total = sum(scheme.share(row, stream_of(seed + i)) for i, row in enumerate(rows)) % PRIME
    opened, disagree = next(scheme.candidates(some_answers(total, scheme.threshold, seed), nothing))
    assert np.array_equal(opened, sum(rows))
    assert not disagree


def test_secrets_come_back_centred_modulo_the_prime():
    secrets = np.array([0, 1, -1, HALF, -HALF, HALF + 1, -HALF - 1, PRIME, -PRIME, 10**12], dtype=np.int64)
    expected = [0, 1, -1, HALF, -HALF, -HALF, HALF, 0, 0, (10**12 + HALF) % PRIME - HALF]
    shares = PackedShamir(3, 1, 1).share(secrets, stream_of(0))
    opened, _ = next(PackedShamir(3, 1, 1).candidates({2: shares[1], 3: shares[2]}, nothing))
    assert opened.tolist() == expected


@pytest.mark.parametrize(("corrupt", "packing"), [(1, 1), (3, 2)])
def test_the_first_members_shares_are_the_streams_residues(corrupt, packing):
    shares = PackedShamir(9, corrupt, packing).share(secrets_of(packing * 50), stream_of(9))
    assert np.array_equal(shares[:corrupt].reshape(-1), uniform_residues(stream_of(9), PRIME, corrupt * 50))
    other = PackedShamir(9, corrupt, packing).share(secrets_of(packing * 50, 1), stream_of(9))
    assert np.array_equal(shares[:corrupt], other[:corrupt])
    assert not np.array_equal(shares[corrupt:], other[corrupt:])


def test_one_share_takes_every_value_once_over_all_randomness_whatever_the_secret():
    # Exact count: one polynomial for each of the 65521 possible coins.
    scheme = PackedShamir(4, 1, 1)
    for secret in (0, 1, -17, HALF):
        shares = scheme.share(np.full(PRIME, secret, dtype=np.int64), Chosen(np.arange(PRIME)))
        for row in shares:
            assert np.array_equal(np.sort(row), np.arange(PRIME))


@pytest.mark.parametrize(
    ("members", "corrupt", "packing"), [(5, 1, 1), (5, 2, 1), (7, 2, 1), (7, 3, 2), (6, 2, 3), (8, 4, 1), (9, 3, 3)]
)
def test_any_corrupt_shares_are_uniform_and_independent_of_the_secrets(members, corrupt, packing):
    # Shares = A secrets + B coins. Coins are uniform, so c shares are uniform whatever the secrets are if and only if
    # their c rows of B are invertible. A and B are read off the code itself, one unit vector at a time.
    scheme = PackedShamir(members, corrupt, packing)
    nobody = np.zeros(packing, dtype=np.int64)
    coins = np.hstack([scheme.share(nobody, Chosen(row)) for row in np.eye(corrupt, dtype=int)])
    for coalition in combinations(range(members), corrupt):
        assert rank(coins[list(coalition)]) == corrupt
    secrets, random = secrets_of(packing), secrets_of(corrupt, 1) % PRIME
    of_secrets = np.hstack([scheme.share(row, Chosen([0] * corrupt)) for row in np.eye(packing, dtype=np.int64)])
    assert np.array_equal(
        scheme.share(secrets, Chosen(random)).reshape(-1), (of_secrets @ (secrets % PRIME) + coins @ random) % PRIME
    )
    # One member more does learn something, and a threshold everything: the figure is tight.
    both = np.hstack([of_secrets, coins])
    for coalition in combinations(range(members), corrupt + 1):
        assert rank(coins[list(coalition)]) == corrupt
        assert rank(both[list(coalition)]) == corrupt + 1


@st.composite
def attacked(draw, beyond=False):
    """Answers of which some are wrong: (scheme, secrets, answers, wrong members), at most the bound, or more."""
    scheme, seed = draw(schemes(15 if beyond else 24, extra=2))
    polynomials = draw(st.integers(1, 12))
    count = draw(st.integers(scheme.threshold + 2, scheme.members))
    secrets = secrets_of(scheme.packing * polynomials, seed)
    answers = some_answers(scheme.share(secrets, stream_of(seed)), count, seed)
    capacity = (count - scheme.threshold) // 2
    liars = draw(st.integers(capacity + 1, count - scheme.threshold) if beyond else st.integers(0, capacity))
    wrong = draw(st.permutations(sorted(answers)))[:liars]
    for liar in wrong:
        columns = draw(st.sets(st.integers(0, polynomials - 1), min_size=1, max_size=polynomials))
        for column in columns:
            answers[liar][column] = (answers[liar][column] + draw(st.integers(1, PRIME - 1))) % PRIME
    return scheme, secrets, answers, frozenset(wrong)


@given(attacked())
@settings(max_examples=150)
def test_up_to_the_bound_wrong_members_are_decoded_and_named_whichever_columns_they_changed(case):
    scheme, secrets, answers, wrong = case
    before = {n: answer.copy() for n, answer in answers.items()}
    opened, disagree = next(scheme.candidates(answers, nothing))
    assert np.array_equal(opened, secrets)
    assert disagree == wrong
    assert all(np.array_equal(answers[n], before[n]) for n in answers)


@given(attacked(beyond=True))
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
def test_beyond_the_bound_the_truth_is_among_the_candidates_and_none_but_the_first_is_unchecked(case):
    scheme, secrets, answers, wrong = case
    assume(comb(len(answers), scheme.threshold) <= 300)
    checked = []

    def plausible(sample):
        checked.append(sample.copy())
        return True

    found = list(scheme.candidates(answers, plausible))
    assert any(np.array_equal(opened, secrets) and disagree == wrong for opened, disagree in found)
    assert len({disagree for _, disagree in found}) == len(found)
    # Each disagreement is exact: the members outside it do lie on the candidate's polynomials.
    for opened, disagree in found:
        agreeing = [n for n in sorted(answers) if n not in disagree]
        assert len(agreeing) >= scheme.threshold
        columns = opened.reshape(-1, scheme.packing)
        for n in agreeing[scheme.threshold :]:
            values = [int(answers[m][0]) for m in agreeing[: scheme.threshold]]
            assert interpolate(agreeing[: scheme.threshold], values, n) == answers[n][0]
        assert interpolate(
            agreeing[: scheme.threshold], [int(answers[m][0]) for m in agreeing[: scheme.threshold]], 0
        ) == (columns[0, 0] % PRIME)
    unchecked = [opened for opened, _ in found if not any(np.array_equal(opened[: len(s)], s) for s in checked)]
    assert len(unchecked) <= 1
    # Without a plausible subset only a codeword within the bound is ever offered, and the truth is not one here.
    capacity = (len(answers) - scheme.threshold) // 2
    for opened, disagree in scheme.candidates(answers, nothing):
        assert len(disagree) <= capacity
        assert not np.array_equal(opened, secrets)


def test_liars_beyond_the_bound_can_be_first_but_the_truth_follows():
    # Five answers, threshold 3, two liars who put members 1 and 2 on their own polynomial: four of five agree on it.
    scheme, secrets = PackedShamir(5, 2, 1), secrets_of(4)
    shares = scheme.share(secrets, stream_of(3))
    lie = {n: shares[n - 1].copy() for n in range(1, 6)}
    for column in range(4):
        values = [int(shares[0, column]), int(shares[1, column]), int(shares[2, column]) ^ 1]
        for n in (4, 5):
            lie[n][column] = interpolate([1, 2, 3], values, n)
    found = list(scheme.candidates(lie, anything))
    assert not np.array_equal(found[0][0], secrets)
    assert found[0][1] == {3}
    assert [disagree for opened, disagree in found if np.array_equal(opened, secrets)] == [{4, 5}]


def test_a_subset_is_judged_by_its_first_eight_polynomials_and_only_then_by_all_its_secrets():
    scheme, secrets = PackedShamir(4, 1, 2), secrets_of(40)
    shares = scheme.share(secrets, stream_of(3))
    answers = {n: shares[n - 1].copy() for n in range(1, 5)}
    answers[4][0] ^= 1
    seen = []

    def plausible(sample):
        seen.append(sample.copy())
        return np.array_equal(sample, secrets[: len(sample)])

    found = list(scheme.candidates(answers, plausible))
    assert [len(sample) for sample in seen] == [16, 40, 16, 16, 16]  # {1, 2, 3} is right, those with 4 are not
    assert len(found) == 1
    assert np.array_equal(found[0][0], secrets)
    assert found[0][1] == {4}


def test_a_subset_that_is_wrong_only_after_the_eighth_polynomial_is_no_candidate():
    """A dealer knows which secrets are looked at first."""
    scheme, secrets = PackedShamir(4, 1, 2), secrets_of(40)
    shares = scheme.share(secrets, stream_of(3))
    answers = {n: shares[n - 1].copy() for n in range(1, 5)}
    answers[4][8] ^= 1
    found = list(scheme.candidates(answers, lambda sample: np.array_equal(sample, secrets[: len(sample)])))
    assert [disagree for _, disagree in found] == [{4}]


def test_no_more_than_the_stated_number_of_subsets_is_tried():
    scheme = PackedShamir(16, 7, 1)
    shares = scheme.share(secrets_of(1), stream_of(1))
    answers = {n: (shares[n - 1] + n**9) % PRIME for n in range(1, 17)}  # C(16, 8) = 12870 subsets
    tried = []
    assert list(scheme.candidates(answers, lambda sample: bool(tried.append(1)))) == []
    assert len(tried) == MAX_SUBSETS


def test_all_subsets_are_tried_in_lexicographic_order_where_they_are_few():
    scheme = PackedShamir(6, 2, 1)
    shares = scheme.share(secrets_of(1), stream_of(1))
    answers = {n: (shares[n - 1] + 1000 * n**4) % PRIME for n in range(1, 7)}
    seen = []
    list(scheme.candidates(answers, lambda sample: bool(seen.append(int(sample[0])))))
    expected = []
    for subset in combinations(range(1, 7), 3):
        value = interpolate(list(subset), [int(answers[n][0]) for n in subset], 0)
        expected.append((value + HALF) % PRIME - HALF)
    assert seen == expected


def test_many_subsets_are_drawn_by_the_answers_and_not_by_the_liars_places():
    """A fixed order would hold one member in its first 4,096 subsets: that one liar could stop every opening."""
    scheme = PackedShamir(30, 15, 8)
    secrets = np.arange(16) - 8
    answers = {n: row.copy() for n, row in enumerate(scheme.share(secrets, stream_of(1)), start=1)}
    for liars in ((1, 2, 3, 4), (27, 28, 29, 30), (2, 9, 17, 30)):
        wrong = {n: (row + 5 * n) % PRIME if n in liars else row for n, row in answers.items()}
        found = list(scheme.candidates(wrong, lambda sample: bool(np.abs(sample).max() < 100)))
        assert any(np.array_equal(candidate, secrets) for candidate, _ in found)
    subsets = [list(scheme._subsets(sorted(a), a)) for a in (answers, answers, wrong)]
    assert subsets[0] == subsets[1] != subsets[2]
    assert all(len(set(subset)) == scheme.threshold for subset in subsets[0])


def test_no_candidate_is_repeated():
    scheme, secrets = PackedShamir(8, 2, 1), secrets_of(3)
    answers = {n: row.copy() for n, row in enumerate(scheme.share(secrets, stream_of(1)), start=1)}
    answers[8][1] ^= 5
    found = list(scheme.candidates(answers, anything))
    assert len({disagree for _, disagree in found}) == len(found)


def brute_force_positions(points: list[int], values: list[int], bound: int, errors: int) -> list[int] | None:
    for subset in combinations(range(len(points)), bound):
        at, of = [points[i] for i in subset], [values[i] for i in subset]
        wrong = [i for i, x in enumerate(points) if interpolate(at, of, x) != values[i]]
        if len(wrong) <= errors:
            return wrong
    return None


@given(st.data())
@settings(max_examples=200)
def test_error_positions_agrees_with_brute_force(data):
    bound = data.draw(st.integers(1, 4))
    errors = data.draw(st.integers(0, 3))
    count = bound + 2 * errors + data.draw(st.integers(0, 2))
    points = sorted(data.draw(st.sets(st.integers(1, 20), min_size=count, max_size=count)))
    coefficients = data.draw(st.lists(st.integers(0, PRIME - 1), min_size=bound, max_size=bound))
    values = [sum(c * x**k for k, c in enumerate(coefficients)) % PRIME for x in points]
    for place in data.draw(st.sets(st.integers(0, count - 1), max_size=errors + 2)):
        values[place] = (values[place] + data.draw(st.integers(1, 5))) % PRIME
    assert error_positions(points, values, bound, errors) == brute_force_positions(points, values, bound, errors)


def test_error_positions_agrees_with_brute_force_on_every_small_word():
    # Every word over {0, 1, 2} at five points, constants with two errors and lines with one.
    points = [1, 2, 3, 4, 5]
    for values in product(range(3), repeat=5):
        for bound, errors in ((1, 2), (2, 1), (3, 1), (5, 0), (4, 0)):
            expected = brute_force_positions(points, list(values), bound, errors)
            assert error_positions(points, list(values), bound, errors) == expected


@pytest.mark.parametrize(
    ("members", "corrupt", "packing"), [(5, 0, 1), (5, 1, 0), (5, -1, 3), (5, 3, 3), (1, 1, 1), (257, 1, 1), (0, 0, 0)]
)
def test_a_scheme_without_privacy_or_without_enough_members_is_refused(members, corrupt, packing):
    with pytest.raises(ParameterError, match="no sharing with"):
        PackedShamir(members, corrupt, packing)


@pytest.mark.parametrize("shape", [(5,), (2, 2), ()])
def test_secrets_that_do_not_fill_polynomials_are_refused_unseen(shape):
    with pytest.raises(ParameterError, match="do not fill polynomials of 2") as caught:
        PackedShamir(5, 1, 2).share(np.full(shape, 31337, dtype=np.int64), stream_of(0))
    assert "31337" not in str(caught.value)


def test_fewer_answers_than_the_threshold_are_refused():
    scheme = PackedShamir(5, 2, 1)
    shares = scheme.share(np.full(3, 31337, dtype=np.int64), stream_of(0))
    with pytest.raises(ParameterError, match="2 answers, 3 needed") as caught:
        list(scheme.candidates({1: shares[0], 4: shares[3]}, anything))
    assert not any(str(value) in str(caught.value) for value in (31337, *shares[0].tolist()))


def test_the_known_answer_of_the_protocol_document():
    shares = PackedShamir(6, 2, 2).share(np.array([1, -1, 2, 3]), KeyStream(bytes(range(32))))
    expected = [(64825, 32043), (50649, 27161), (10214, 47433), (61782, 23894), (61531, 18621), (62202, 28170)]
    assert [tuple(row) for row in shares.tolist()] == expected
