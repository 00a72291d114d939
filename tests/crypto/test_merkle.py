"""RFC 9162 trees: known roots, every proof of every small tree, and nothing else verifies."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from official import official

from edge_sdk.crypto.merkle import MerkleTree, check_inclusion, merkle_root, root_of
from edge_sdk.errors import ParameterError, PeerError

VECTORS = official("rfc9162_merkle")
LEAVES = [bytes.fromhex(leaf) for leaf in VECTORS["leaves"]]
SIZES = range(1, 71)


def leaves_of(size: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(size)]


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 9162 section 2.1.1, word for word: split at the largest power of two below n."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + recursive_root(leaves[:k]) + recursive_root(leaves[k:])).digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_certificate_transparency_tests(size):
    assert merkle_root(LEAVES[:size]).hex() == VECTORS["roots"][size - 1]


@pytest.mark.parametrize("case", VECTORS["inclusion"], ids=[case["name"] for case in VECTORS["inclusion"]])
def test_official_inclusion_proofs_are_accepted_and_their_broken_variants_refused(case):
    root, leaf = bytes.fromhex(case["root"]), bytes.fromhex(case["leaf"])
    proof = [bytes.fromhex(sibling) for sibling in case["proof"]]
    if case["valid"]:
        check_inclusion(root, case["size"], case["index"], leaf, proof)
        if case["size"] <= len(LEAVES):
            assert list(MerkleTree(LEAVES[: case["size"]]).proof(case["index"])) == proof
    else:
        with pytest.raises(PeerError, match="inclusion proof"):
            check_inclusion(root, case["size"], case["index"], leaf, proof)


@pytest.mark.parametrize("size", SIZES)
def test_the_root_is_the_recursive_definition(size):
    assert merkle_root(leaves_of(size)) == recursive_root(leaves_of(size))


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_is_proved_and_at_no_other_index(size):
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    for index, leaf in enumerate(leaves):
        proof = tree.proof(index)
        check_inclusion(tree.root, size, index, leaf, proof)
        for other in {0, index ^ 1, (index + 1) % size, size - 1, size, -1} - {index}:
            with pytest.raises(PeerError):
                check_inclusion(tree.root, size, other, leaf, proof)
        with pytest.raises(PeerError):
            check_inclusion(tree.root, size, index, leaf + b" ", proof)


@given(st.integers(1, 70), st.data())
def test_a_changed_proof_root_or_leaf_is_refused(size, data):
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    index = data.draw(st.integers(0, size - 1))
    proof = list(tree.proof(index))
    bit = data.draw(st.integers(0, 255))

    def flip(value):
        return (int.from_bytes(value, "big") ^ (1 << bit)).to_bytes(32, "big")

    broken = [[*proof, tree.root], [tree.root, *proof], [*proof, b""]]
    if proof:
        place = data.draw(st.integers(0, len(proof) - 1))
        broken += [
            [*proof[:place], flip(proof[place]), *proof[place + 1 :]],
            [*proof[:place], proof[place][:-1], *proof[place + 1 :]],
            proof[:place] + proof[place + 1 :],
            [*proof[:place], proof[place], *proof[place:]],
        ]
    for bad in broken:
        with pytest.raises(PeerError):
            check_inclusion(tree.root, size, index, leaves[index], bad)
    with pytest.raises(PeerError):
        check_inclusion(flip(tree.root), size, index, leaves[index], proof)


@given(st.integers(2, 70), st.data())
def test_a_size_that_gives_another_path_is_refused(size, data):
    # The size is authenticated with the root by whoever signed both; a proof fixes only its own path.
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    index = data.draw(st.integers(0, size - 1))
    for wrong in (index, 0, size * 2, 1 << (size - 1).bit_length() + 1):
        with pytest.raises(PeerError):
            check_inclusion(tree.root, wrong, index, leaves[index], tree.proof(index))


def test_a_node_cannot_be_passed_off_as_a_leaf():
    # The second-preimage attack on unprefixed trees: the two children's hashes as one leaf's content.
    leaves = leaves_of(4)
    tree = MerkleTree(leaves)
    children = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    upper = hashlib.sha256(b"\1" + children[2] + children[3]).digest()
    for content in (children[0] + children[1], b"\1" + children[0] + children[1]):
        with pytest.raises(PeerError):
            check_inclusion(tree.root, 2, 0, content, [upper])
        assert merkle_root([content, children[2] + children[3]]) != tree.root


@pytest.mark.parametrize("size", SIZES)
def test_a_proof_gives_the_root_of_its_own_leaf_only(size):
    leaves = leaves_of(size)
    tree = MerkleTree(leaves)
    for index, leaf in enumerate(leaves):
        assert root_of(size, index, leaf, tree.proof(index)) == tree.root
        assert root_of(size, index, leaf + b" ", tree.proof(index)) != tree.root


def test_a_proof_that_fits_no_tree_of_the_size_gives_no_root():
    tree = MerkleTree(leaves_of(5))
    for index in range(5):
        proof = tree.proof(index)
        for bad, why in (
            ([*proof, bytes(32)], "longer than the tree is high"),
            (proof[:-1], "shorter than the tree is high"),
            ([proof[0] + b" ", *proof[1:]], "a sibling of 33 bytes"),
            ([b"", *proof[1:]], "a sibling of 0 bytes"),
        ):
            with pytest.raises(PeerError, match=why):
                root_of(5, index, leaves_of(5)[index], bad)
    for index in (-1, 5):
        with pytest.raises(PeerError, match="outside a tree of 5"):
            root_of(5, index, b"", [])


def test_a_proof_longer_than_the_tree_is_high_is_refused_as_such():
    tree = MerkleTree(leaves_of(5))
    for index in range(5):
        with pytest.raises(PeerError, match="longer than the tree is high"):
            check_inclusion(tree.root, 5, index, leaves_of(5)[index], [*tree.proof(index), bytes(32)])


def test_an_empty_tree_and_an_index_outside_are_the_callers_fault():
    with pytest.raises(ParameterError, match="at least one leaf"):
        MerkleTree([])
    for index in (-1, 3):
        with pytest.raises(ParameterError, match="outside a tree of 3"):
            MerkleTree(leaves_of(3)).proof(index)


def test_the_known_answer_of_the_protocol_document():
    tree = MerkleTree([b"a", b"b", b"c"])
    assert tree.root.hex() == "36642e73c2540ab121e3a6bf9545b0a24982cd830eb13d3cd19de3ce6c021ec1"
    assert [len(tree.proof(i)) for i in range(3)] == [2, 2, 1]
