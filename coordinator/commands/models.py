"""`model` and `report`: what came of a task."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from coordinator.commands.directory import open_store
from coordinator.commands.output import named_metrics, print_object, print_result
from edge_sdk.errors import ParameterError

if TYPE_CHECKING:
    from coordinator.rows import ModelRow, TaskRow
    from coordinator.store import Store


def list_(options: argparse.Namespace) -> int:
    """Print a task's models with their lineage."""
    from coordinator.task import Planned

    store = open_store(options)
    try:
        row, models = _models(store, options.task)
    finally:
        store.close()
    loss = Planned.decode(row.plan).loss
    for model in models:
        if options.json:
            print_object(
                {
                    "task": model.task,
                    "model": model.number,
                    "parameters": model.parameters.hex(),
                    "parent": model.parent.hex() if model.parent is not None else None,
                    "cohort_planned": model.cohort,
                    "set_hash": model.set_hash.hex() if model.set_hash is not None else None,
                    "metrics": dict(model.metrics),
                    "loss": loss,
                    "clip": model.clip,
                    "published_s": model.published_s,
                }
            )
        else:
            shown = ", ".join(named_metrics(model.metrics, loss))
            print(f"{model.number}: {model.parameters.hex()[:16]} {shown}")
    return 0


def _models(store: Store, task: str) -> tuple[TaskRow, list[ModelRow]]:
    with store.reading() as rows:
        row = rows.task(task)
        if row is None:
            raise ParameterError(f"there is no task {task!r}")
        return row, rows.models(task)


def export(options: argparse.Namespace) -> int:
    """Write a model's shared parameters, and the task's bundle if it is asked for."""
    import io

    import numpy as np

    from edge_sdk.files import write_whole

    if options.out.suffix not in (".npy", ".f32"):
        raise ParameterError(f"--out {options.out}: .npy, or .f32 for the bare little-endian numbers")
    store = open_store(options)
    try:
        row, found = _models(store, options.task)
        models = {model.number: model for model in found}
        number = max(models) if options.number is None else options.number
        if number not in models:
            raise ParameterError(f"task {options.task} has no model {number}: 0 to {max(models)}")
        content = store.blob(models[number].parameters)
        if options.bundle is not None:
            write_whole(options.bundle, store.blob(row.bundle_file), mode=0o644)
    finally:
        store.close()
    if options.out.suffix == ".npy":
        file = io.BytesIO()
        np.save(file, np.frombuffer(content, dtype="<f4"), allow_pickle=False)
        write_whole(options.out, file.getvalue(), mode=0o644)
    else:
        write_whole(options.out, content, mode=0o644)
    said = {
        "task": options.task,
        "model": number,
        "parameters": models[number].parameters.hex(),
        "out": str(options.out),
    }
    print_result(options, said)
    return 0


def report(options: argparse.Namespace) -> int:
    """Print one page about a task, in Markdown."""
    from coordinator.report import collect, markdown
    from coordinator.serving import Directory

    directory = Directory.open(options.dir)
    store = open_store(options)
    try:
        page = markdown(collect(store, options.task, directory.authority_key, directory.assumptions, time.time()))
    finally:
        store.close()
    if options.json:
        print_object({"task": options.task, "markdown": page})
    else:
        print(page, end="")
    return 0
