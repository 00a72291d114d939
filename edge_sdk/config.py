"""What a device has to offer: `device.toml`, written by its owner. What is allowed with it, policy.toml says.

In full, with the values that hold where a line is left out:

    broker = "mqtts://host:8883"    # instead of the one that the device was told when it joined
    threads = 1                     # of one training step
    serve = true                    # be a committee member when the epoch says so
    spare_prekeys = 24              # offered ahead, one for each ticket that it serves
    max_download_mb = 64            # of one bundle or one model

    [tasks.keywords]                # a task's name, as the operator tells it
    examples = "examples.npz"       # arrays "y" and by the names of the model's inputs; or "module:function",
                                    # called for each round, which gives them; both relative to this directory
    bundle = "<hash in hex>"        # train this bundle and no other of the same publisher; any if left out
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from edge_sdk.errors import ParameterError
from edge_sdk.files import read_text, reason

TaskName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*\Z")]
HexHash = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class TaskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task that this device has examples for."""

    examples: Annotated[str, Meta(min_length=1)]
    bundle: HexHash | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module's docstring."""

    broker: str | None = None
    threads: Annotated[int, Meta(ge=1, le=64)] = 1
    serve: bool = True
    spare_prekeys: Annotated[int, Meta(ge=1, le=64)] = 24
    max_download_mb: Annotated[int, Meta(ge=1, le=512)] = 64
    tasks: Mapping[TaskName, TaskConfig] = {}

    @classmethod
    def read(cls, directory: Path) -> Config:
        """The directory's device.toml, or what holds without one. Raises ParameterError that names the line."""
        path = directory / "device.toml"
        try:
            return msgspec.toml.decode(read_text(path), type=cls)
        except FileNotFoundError:
            return cls()
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            raise ParameterError(f"{path}: {reason(error)}") from error


def examples_source(directory: Path, given: str) -> Callable[[], Any]:
    """A call that gives a task's examples, as `examples` in device.toml names them. Nothing is loaded before it.

    Raises ParameterError if it can be neither a file of arrays nor "module:function"; the call raises it too.
    """
    if given.endswith(".npz"):
        return lambda: _load_arrays(directory / given)
    module, _, function = given.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise ParameterError(f'device.toml: examples = "{given}" is neither a file.npz nor module:function')
    return lambda: _load_function(directory, module, function)()


def _load_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle, and advise to load that
                raise ParameterError(f"{path} is no .npz file, or not a whole one: numpy.savez makes one")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:  # a pickle could run anything
                return {name: _one_array(path, file, name) for name in file.files}
    except ParameterError:
        raise  # which is a ValueError too
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ParameterError(f"{path}: {reason(error)}") from error


def _one_array(path: Path, file: Mapping[str, np.ndarray[Any, Any]], name: str) -> np.ndarray[Any, Any]:
    try:
        return file[name]
    except ValueError as error:
        raise ParameterError(f"{path}: {name!r} is no array of numbers: {reason(error)}") from error


def _load_function(directory: Path, module: str, function: str) -> Callable[[], Any]:
    place = str(directory.resolve())
    if place not in sys.path:
        sys.path.append(place)  # at the end: it replaces no installed module
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ParameterError(f"device.toml: {module}:{function}: {error}") from error
    if not callable(found):
        raise ParameterError(f"device.toml: {module}:{function} is not a function")
    return found  # type: ignore[no-any-return]
