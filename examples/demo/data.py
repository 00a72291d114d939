"""Real data, held out once, and dealt to devices so that no two see the same mixture of classes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_sdk.crypto.hashing import tagged_hash
from edge_sdk.errors import ParameterError
from edge_sdk.training.sampling import shuffle

Name = Literal["digits", "fashion-mnist"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

FASHION_MNIST_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


@dataclass(frozen=True)
class Part:
    """Examples. x: float32 (n, 1, height, width) in [0, 1].  y: int64 (n,)."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: NDArray[np.int64]) -> Part:
        """These rows, in this order."""
        return Part(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Data:
    """One data set.  train: to be dealt to devices.  held_out: no device sees it."""

    train: Part
    held_out: Part


def load(name: Name) -> Data:
    """The data set. Raises ParameterError on another name, OSError if it can be had nowhere."""
    loaders: dict[str, Callable[[], Data]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
    if name not in loaders:
        raise ParameterError(f"there is no data set {name!r}: {' or '.join(loaders)}")
    return loaders[name]()


def deal(part: Part, devices: int, classes_each: int = 4) -> list[Part]:
    """`part` in as many parts as there are devices, each with few classes.

    The examples are sorted by class, cut into devices x classes_each shards of one size, and each device is dealt
    classes_each of them (McMahan et al. 2017, arXiv:1602.05629, section 3). The same at every call.
    """
    seed = tagged_hash("demo", b"shards")
    mixed = shuffle(len(part), tagged_hash("demo", b"order"))
    by_class = mixed[np.argsort(part.y[mixed], kind="stable")]
    shards = np.array_split(by_class, devices * classes_each)
    dealt = shuffle(len(shards), seed)
    return [
        part.take(np.sort(np.concatenate([shards[i] for i in dealt[device::devices]]))) for device in range(devices)
    ]


def _digits() -> Data:
    """1,797 digits of 8 x 8 pixels (scikit-learn's, from the UCI repository). Every fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = Part((images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64))
    order = shuffle(len(whole), tagged_hash("demo", b"held out"))
    cut = len(whole) // 5
    return Data(whole.take(order[cut:]), whole.take(order[:cut]))


def _fashion_mnist() -> Data:
    """70,000 pictures of clothes, 28 x 28 (Xiao et al. 2017, arXiv:1708.07747), with the authors' test set."""
    train = Part(_images("train-images-idx3-ubyte.gz"), _labels("train-labels-idx1-ubyte.gz"))
    return Data(train, Part(_images("t10k-images-idx3-ubyte.gz"), _labels("t10k-labels-idx1-ubyte.gz")))


def _images(name: str) -> NDArray[np.float32]:
    content = _idx(name)
    count, height, width = (int.from_bytes(content[i : i + 4], "big") for i in (4, 8, 12))
    pixels = np.frombuffer(content, np.uint8, offset=16).reshape(count, 1, height, width)
    return pixels.astype(np.float32) / np.float32(255)


def _labels(name: str) -> NDArray[np.int64]:
    return np.frombuffer(_idx(name), np.uint8, offset=8).astype(np.int64)


def _idx(name: str) -> bytes:
    """An idx file's bytes: Debian's, packed or not, or downloaded and checked."""
    for path in (DEBIAN_FASHION_MNIST / name, DEBIAN_FASHION_MNIST / name.removesuffix(".gz")):
        if path.is_file():
            content = path.read_bytes()
            return gzip.decompress(content) if path.suffix == ".gz" else content
    import pooch

    found = pooch.retrieve(FASHION_MNIST_URL + name, "sha256:" + FASHION_MNIST_SHA256[name], progressbar=True)
    return gzip.decompress(Path(found).read_bytes())
