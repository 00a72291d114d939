"""Training with onnxruntime against the same mathematics in numpy, float64, and against graphs that misbehave."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx")
from onnx import helper
from training import tiny_models as tiny

from edge_sdk.bundle import Bundle, Tensor, predict_inputs, predict_outputs, train_inputs, train_outputs, write_bundle
from edge_sdk.errors import ParameterError, PeerError, RoundAborted
from edge_sdk.training import steps
from edge_sdk.training.examples import ArrayExamples, FetchedExamples
from edge_sdk.training.onnx import OnnxEngine, OnnxTrainer
from edge_sdk.training.sampling import poisson_sample, shuffled_batches
from edge_sdk.training.steps import GraphTrainer

ENTROPY = bytes(range(32))
KEY = tiny.PUBLISHER.public_key
SIZE = 22
X, Y = tiny.examples(SIZE)
EXAMPLES = ArrayExamples(X, Y)
LOSS_BOUND = 1.5
BOUNDS = {"clip": 1.0, "loss_bound": LOSS_BOUND}


@cache
def bundle(unit: str = "example", **options) -> Bundle:
    return Bundle.read(tiny.bundle_bytes(unit, **options), KEY)


def trainer(unit: str = "example", **options) -> OnnxTrainer:
    return OnnxTrainer(bundle(unit, **options))


def clipped_sums(parameters, indices, clip, loss_bound=LOSS_BOUND, x=X, y=Y):
    """(shared vector, head, metrics) of the sum of clipped gradients, in float64."""
    good = np.isfinite(x[indices]).all(1)
    kept = np.asarray(indices, dtype=int)[good]
    gw, gb, losses, right = tiny.gradients(parameters, x[kept], y[kept])
    norms = np.sqrt((gw**2).sum((1, 2)) + (gb**2).sum(1))
    scale = np.minimum(1, clip / norms)
    shared = np.concatenate([(gw * scale[:, None, None]).sum(0).ravel(), (gb * scale[:, None]).sum(0)])
    metrics = np.clip(losses, 0, loss_bound).sum(), right.sum(), len(kept), (norms > clip).sum(), (~good).sum()
    return shared, gb.sum(0), metrics


def as_tuple(metrics):
    return metrics.loss, metrics.correct, metrics.count, metrics.clipped, metrics.invalid


def assert_close(found, expected, tolerance=2e-6):
    assert np.linalg.norm(found - expected) <= tolerance * max(1e-3, float(np.linalg.norm(expected)))


# Unit "example".


@given(
    st.lists(st.integers(0, SIZE - 1), unique=True),
    st.sampled_from([1e-4, 0.3, 2.0, 1e4]),
    st.sampled_from([1e-3, 0.7, 1.5, 1e4]),
    st.sampled_from([None, 1, 3, 9, SIZE, 1000]),
)
def test_the_clipped_sum_is_that_of_every_drawn_example_whatever_their_number(indices, clip, loss_bound, window):
    """From none to five and a half batches, never truncated, in windows of any width."""
    model = shared_trainer()
    drawn = np.array(indices, dtype=np.int64)
    found = model.clipped_sum(EXAMPLES, drawn, clip=clip, loss_bound=loss_bound, window=window)
    shared, _, metrics = clipped_sums(bundle().parameters(), indices, clip, loss_bound)
    assert found.gradient.shape == (bundle().dimension,)
    assert_close(found.gradient, shared)
    assert as_tuple(found.metrics) == pytest.approx(metrics, rel=1e-5)


@cache
def shared_trainer() -> OnnxTrainer:
    return trainer()


def test_an_empty_draw_is_zeros_and_runs_nothing():
    found = shared_trainer().clipped_sum(EXAMPLES, poisson_sample(SIZE, 0, ENTROPY), **BOUNDS)
    assert not found.gradient.any()
    assert found.gradient.shape == (18,)
    assert as_tuple(found.metrics) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_example_that_is_not_finite_is_counted_and_contributes_nothing(value):
    x = X.copy()
    x[[3, 7, 8], [0, 4, 2]] = value
    indices = np.arange(11)
    found = shared_trainer().clipped_sum(ArrayExamples(x, Y), indices, clip=0.5, loss_bound=LOSS_BOUND)
    clean = shared_trainer().clipped_sum(EXAMPLES, np.setdiff1d(indices, [3, 7, 8]), clip=0.5, loss_bound=LOSS_BOUND)
    assert_close(found.gradient, clean.gradient)
    assert found.metrics.invalid == 3
    assert found.metrics.count == clean.metrics.count == 8


def test_rows_left_over_from_an_earlier_batch_never_reach_a_padded_one():
    """The batch before is full of infinity; the padding after it must be zeros."""
    x = X.copy()
    x[:4] = np.inf
    model = trainer()
    model.clipped_sum(ArrayExamples(x, Y), np.arange(4), **BOUNDS)
    found = model.clipped_sum(EXAMPLES, np.array([9]), **BOUNDS)
    assert_close(found.gradient, clipped_sums(bundle().parameters(), [9], 1.0)[0])
    assert found.metrics.invalid == 0


class Recording:
    """An engine that notes what its training graph gave at every run: the bits of the shared gradients."""

    def __init__(self):
        self.engine, self.sums = OnnxEngine(bundle(), threads=1), []

    def load(self, name):
        self.graph = self.engine.load(name)
        return self

    def bind(self, inputs, outputs):
        run = self.graph.bind(inputs, outputs)

        def noted():
            run()
            self.sums.append(b"".join(outputs[f"grad.{name}"].tobytes() for name in ("w", "b")))

        return noted


@pytest.mark.parametrize("present", [0, 7, 12, 21])
def test_one_example_more_changes_no_bit_of_another_windows_sums(present):
    """Cut one after the other, the example would shift every later one into another row or chunk."""
    window, sums = 6, []
    for indices in (np.setdiff1d(np.arange(SIZE), [present]), np.arange(SIZE)):
        engine = Recording()
        GraphTrainer(bundle(), engine).clipped_sum(EXAMPLES, indices, window=window, **BOUNDS)
        assert len(engine.sums) == 7  # windows of 6, 6, 6 and 4 in batches of 4, with or without one
        sums.append(engine.sums)
    place = present // window
    own = slice(2 * place, 2 * place + 2)
    without, among = (one[: own.start] + one[own.stop :] for one in sums)
    assert without == among
    assert sums[0][own] != sums[1][own]


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.integers(1, SIZE))
def test_a_windows_float32_sums_stay_within_their_worst_case(seed, length, window):
    """Against every example run alone, where nothing is added up: n B 2^-24 clips for a window of n."""
    x = np.random.default_rng(seed).normal(size=X.shape).astype(np.float32) * np.float32(length)
    mine, whole = ArrayExamples(x, Y), np.arange(min(window, SIZE))
    together = shared_trainer().clipped_sum(mine, whole, window=window, **BOUNDS).gradient
    alone = sum(shared_trainer().clipped_sum(mine, whole[[i]], **BOUNDS).gradient for i in range(len(whole)))
    assert np.linalg.norm(together - alone) <= len(whole) * tiny.BATCH * 2.0**-24 * BOUNDS["clip"]


def test_the_order_of_the_indices_does_not_matter():
    shuffled = np.random.default_rng(3).permutation(SIZE)
    found = shared_trainer().clipped_sum(EXAMPLES, shuffled, window=9, **BOUNDS)
    wanted = shared_trainer().clipped_sum(EXAMPLES, np.arange(SIZE), window=9, **BOUNDS)
    assert np.array_equal(found.gradient, wanted.gradient)


def test_a_window_below_one_is_refused():
    with pytest.raises(ParameterError, match="windows of 0"):
        shared_trainer().clipped_sum(EXAMPLES, np.arange(3), window=0, **BOUNDS)


def test_the_result_depends_on_the_draw_alone_not_on_what_ran_before():
    model = trainer()
    once = model.clipped_sum(EXAMPLES, np.arange(10), **BOUNDS)
    model.clipped_sum(EXAMPLES, np.arange(10, 22), clip=0.1, loss_bound=LOSS_BOUND)
    model.predict(X)
    assert np.array_equal(model.clipped_sum(EXAMPLES, np.arange(10), **BOUNDS).gradient, once.gradient)


def test_gradients_are_taken_at_the_loaded_parameters():
    model = trainer()
    vector = np.linspace(-1, 1, 18, dtype=np.float32)
    model.load_shared(vector)
    vector_before = vector.copy()
    parameters = {**bundle().parameters(), **bundle().unflatten(vector)}
    found = model.clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS)
    assert_close(found.gradient, clipped_sums(parameters, range(SIZE), 1.0)[0])
    assert np.array_equal(model.shared(), vector_before)


def test_local_parameters_take_one_step_along_their_mean_gradient():
    model = trainer()
    before = model.local()["head"]
    found = model.clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS, local_lr=0.5)
    _, head, metrics = clipped_sums(bundle().parameters(), range(SIZE), 1.0)
    assert_close(model.local()["head"], before - 0.5 * head / metrics[2])
    assert np.array_equal(model.shared(), bundle().flatten(bundle().parameters()))
    fresh = trainer().clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS)
    assert np.array_equal(found.gradient, fresh.gradient)  # the step comes after


def test_without_a_local_rate_local_parameters_stay():
    model = trainer()
    before = model.local()["head"]
    model.clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS)
    assert np.array_equal(model.local()["head"], before)


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (np.array([0, 5, 0]), "drawn twice"),
        (np.array([SIZE]), "not in"),
        (np.array([-1]), "not in"),
        (np.array([0.0]), "int64"),
        (np.array([[0]]), "int64"),
        (np.array([0], dtype=np.int32), "int64"),
    ],
)
def test_a_draw_that_would_break_the_sensitivity_is_refused(indices, match):
    with pytest.raises(ParameterError, match=match):
        shared_trainer().clipped_sum(EXAMPLES, indices, **BOUNDS)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e39, 1e-46])
def test_a_clip_or_rate_that_is_no_positive_float32_is_refused(value):
    with pytest.raises(ParameterError, match="clip = "):
        shared_trainer().clipped_sum(EXAMPLES, np.arange(2), clip=value, loss_bound=LOSS_BOUND)
    with pytest.raises(ParameterError, match="loss_bound = "):
        shared_trainer().clipped_sum(EXAMPLES, np.arange(2), clip=1.0, loss_bound=value)
    with pytest.raises(ParameterError, match="lr = "):
        trainer("device").train(EXAMPLES, lr=value, entropy=ENTROPY, epochs=1)


def test_a_loss_bound_whose_sum_over_a_batch_would_overflow_is_refused():
    with pytest.raises(ParameterError, match=r"loss_bound = 1e\+38: the sum over a batch"):
        shared_trainer().clipped_sum(EXAMPLES, np.arange(2), clip=1.0, loss_bound=1e38)


def test_the_loss_bound_does_not_change_the_gradient():
    tight, loose = (
        shared_trainer().clipped_sum(EXAMPLES, np.arange(SIZE), clip=1.0, loss_bound=bound) for bound in (1e-6, 1e6)
    )
    assert np.array_equal(tight.gradient, loose.gradient)
    assert tight.metrics.loss == pytest.approx(1e-6 * SIZE)


# Unit "device".


def sgd(parameters, batches, lr, mu=0.0):
    """Plain SGD with FedProx's term in float64: the parameters afterwards, and the loss summed along the way."""
    p = {name: np.asarray(value, dtype=np.float64).copy() for name, value in parameters.items()}
    anchor = {name: value.copy() for name, value in p.items()}
    total = 0.0
    for indices in batches:
        gw, gb, losses, _ = tiny.gradients(p, X[indices], Y[indices])
        total += losses.sum()
        means = {"w": gw.mean(0), "b": gb.mean(0), "head": gb.mean(0)}
        for name, mean in means.items():
            p[name] -= lr * (mean + mu * (p[name] - anchor[name]))
    return p, total


@pytest.mark.parametrize(("proximal", "mu"), [(False, 0.0), (True, 0.0), (True, 0.7)])
@pytest.mark.parametrize("length", [{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 4}, {"steps": 15}])
def test_training_is_sgd_over_the_shuffled_batches(proximal, mu, length):
    """An odd and an even number of steps: the two buffers take turns."""
    model = trainer("device", proximal=proximal)
    update = model.train(EXAMPLES, lr=0.2, mu=mu, entropy=ENTROPY, **length)
    batches = list(shuffled_batches(SIZE, tiny.BATCH, ENTROPY, **length))
    initial = bundle("device").parameters()
    expected, loss = sgd(initial, batches, 0.2, mu)
    flat = np.concatenate([expected["w"].ravel(), expected["b"]])
    assert update.delta.dtype == np.float32
    assert_close(update.delta, flat - bundle("device").flatten(initial), 1e-5)
    assert_close(model.shared(), flat, 1e-5)
    assert_close(model.local()["head"], expected["head"], 1e-5)
    assert update.steps == len(batches)
    assert update.metrics.loss == pytest.approx(loss, rel=1e-4)
    assert update.metrics.count == sum(map(len, batches))
    assert not update.diverged


def test_a_second_training_starts_where_the_first_ended():
    model = trainer("device")
    first = model.train(EXAMPLES, lr=0.1, entropy=ENTROPY, steps=3)
    start = model.shared()
    second = model.train(EXAMPLES, lr=0.1, entropy=ENTROPY, steps=2)
    assert first.delta.any()
    assert np.array_equal(second.delta, model.shared() - start)


def test_frozen_parameters_and_buffers_never_change():
    model = trainer("device")
    before = model.predict(X)
    initial = bundle("device").parameters()
    model.train(EXAMPLES, lr=0.5, entropy=ENTROPY, epochs=2)
    model.load_shared(bundle("device").flatten(initial))
    model.load_local({"head": initial["head"]})
    assert np.array_equal(model.predict(X), before)


def test_a_step_moves_no_buffer_and_binds_nothing_anew(monkeypatch):
    """Parameters stay in place: the arrays that the trainer holds are the same ones after training."""
    model = trainer("device")
    addresses = [side.ctypes.data for side in model._sides]
    monkeypatch.setattr(steps.GraphTrainer, "_bind_training", lambda *arguments: pytest.fail("bound again"))
    model.train(EXAMPLES, lr=0.1, entropy=ENTROPY, epochs=2)
    assert [side.ctypes.data for side in model._sides] == addresses


def test_training_that_diverges_sends_zeros_and_keeps_the_parameters():
    model = trainer("device")
    start, head = model.shared(), model.local()["head"]
    with np.errstate(all="ignore"):
        update = model.train(EXAMPLES, lr=3e38, entropy=ENTROPY, steps=3)
    assert update.diverged
    assert not update.delta.any()
    assert np.array_equal(model.shared(), start)
    assert np.array_equal(model.local()["head"], head)


def test_mu_needs_a_bundle_with_the_proximal_term():
    for unit_trainer, mu in [(trainer("device"), 0.1), (trainer("device", proximal=True), -0.1)]:
        with pytest.raises(ParameterError, match="mu = "):
            unit_trainer.train(EXAMPLES, lr=0.1, mu=mu, entropy=ENTROPY, epochs=1)
    with pytest.raises(ParameterError, match="mu = nan"):
        trainer("device", proximal=True).train(EXAMPLES, lr=0.1, mu=float("nan"), entropy=ENTROPY, epochs=1)


def test_a_bundle_trains_its_own_unit_only():
    with pytest.raises(ParameterError, match="for unit example, not device"):
        shared_trainer().train(EXAMPLES, lr=0.1, entropy=ENTROPY, epochs=1)
    with pytest.raises(ParameterError, match="for unit device, not example"):
        trainer("device").clipped_sum(EXAMPLES, np.arange(2), **BOUNDS)


# Stopping and failing leave the parameters from before.


def stop_at(call: int):
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) > call

    return should_stop


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_training_that_is_stopped_leaves_the_parameters_from_before(batches):
    model = trainer("device")
    start, head = model.shared(), model.local()["head"]
    with pytest.raises(RoundAborted, match=f"after {batches} batches"):
        model.train(EXAMPLES, lr=0.1, entropy=ENTROPY, epochs=1, should_stop=stop_at(batches))
    assert np.array_equal(model.shared(), start)
    assert np.array_equal(model.local()["head"], head)
    with pytest.raises(RoundAborted, match=f"after {batches} batches"):
        shared_trainer().clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS, should_stop=stop_at(batches))


@pytest.mark.parametrize("label", [-1, tiny.CLASSES, 1 << 40])
def test_a_label_out_of_range_is_named_and_changes_nothing(label):
    y = Y.copy()
    y[5] = label
    model = trainer("device")
    start = model.shared()
    with pytest.raises(ParameterError, match=rf"'y': {label} is not in \[0, 3\)"):
        model.train(ArrayExamples(X, y), lr=0.1, entropy=ENTROPY, epochs=1)
    assert np.array_equal(model.shared(), start)


@pytest.mark.parametrize(
    ("inputs", "labels", "match"),
    [
        (X.astype(np.float64), Y, "'x' is float32"),
        (X[:, :4], Y, "'x' is float32"),
        (X[:, :, None], Y, "'x' is float32"),
        (X, Y.astype(np.int32), "'y' is int64"),
        (X, Y[:, None], "'y' is int64"),
        ([X, X], Y, "2 inputs for a model of 1"),
    ],
)
def test_examples_of_another_shape_or_dtype_are_named(inputs, labels, match):
    with pytest.raises(ParameterError, match=match):
        shared_trainer().clipped_sum(ArrayExamples(inputs, labels), np.arange(3), **BOUNDS)


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ParameterError, match="rows"):
        ArrayExamples(X, Y[:-1])


def test_fetched_examples_train_like_arrays():
    asked = []

    def fetch(indices):
        asked.append(len(indices))
        return [X[indices]], Y[indices]

    found = shared_trainer().clipped_sum(FetchedExamples(SIZE, fetch), np.arange(10), **BOUNDS)
    assert np.array_equal(found.gradient, shared_trainer().clipped_sum(EXAMPLES, np.arange(10), **BOUNDS).gradient)
    assert asked == [4, 4, 2]


def test_a_fetch_that_gives_too_few_rows_is_refused():
    short = FetchedExamples(SIZE, lambda indices: ([X[indices[:-1]]], Y[indices]))
    with pytest.raises(ParameterError, match="'x': 3 rows for 4 examples"):
        shared_trainer().clipped_sum(short, np.arange(4), **BOUNDS)


# Loading and predicting.


@pytest.mark.parametrize("unit", ["example", "device"])
@pytest.mark.parametrize("size", [0, 1, 4, 9])
def test_predict_takes_any_number_of_examples(unit, size):
    model = trainer(unit)
    if unit == "device":
        model.train(EXAMPLES, lr=0.1, entropy=ENTROPY, steps=1)  # the odd side
    parameters = {**bundle(unit).parameters(), **bundle(unit).unflatten(model.shared()), **model.local()}
    found = model.predict(X[:size])
    assert found.shape == (size, tiny.CLASSES)
    assert np.allclose(found, tiny.numpy_scores(parameters, X[:size])[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arrays", [(), (X, X), (X[:, :2],), (X.astype(np.float64),)])
def test_predict_refuses_other_inputs(arrays):
    with pytest.raises(ParameterError):
        shared_trainer().predict(*arrays)


def test_load_shared_copies_and_refuses_what_is_no_model():
    model = trainer()
    vector = np.ones(18, np.float32)
    model.load_shared(vector)
    vector[:] = 5
    assert np.array_equal(model.shared(), np.ones(18, np.float32))
    for wrong in (np.ones(17, np.float32), np.ones(18), np.ones((18, 1), np.float32)):
        with pytest.raises(ParameterError, match="shared vector"):
            model.load_shared(wrong)
    vector[7] = np.nan
    with pytest.raises(PeerError, match="element 7 is not finite"):
        model.load_shared(vector)
    assert np.array_equal(model.shared(), np.ones(18, np.float32))


def test_load_local_takes_all_local_parameters_or_none():
    model = trainer()
    before = model.local()["head"]
    for wrong, match in [
        ({}, "'head' is missing"),
        ({"w": before, "head": before}, "'w' is not a local parameter"),
        ({"head": before[:2]}, "'head' is float32"),
        ({"head": np.full(3, np.nan, np.float32)}, "not finite"),
    ]:
        with pytest.raises(ParameterError, match=match):
            model.load_local(wrong)
    assert np.array_equal(model.local()["head"], before)
    model.load_local({"head": before + 1})
    assert np.array_equal(model.local()["head"], before + 1)


@pytest.mark.parametrize("threads", [0, -1])
def test_a_trainer_needs_a_thread(threads):
    with pytest.raises(ParameterError, match="threads"):
        OnnxTrainer(bundle(), threads=threads)


def test_two_threads_give_the_same_sum():
    two = OnnxTrainer(bundle(), threads=2).clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS)
    assert_close(two.gradient, shared_trainer().clipped_sum(EXAMPLES, np.arange(SIZE), **BOUNDS).gradient)


# Graphs that pass the bundle's check and still misbehave.


def misbehaving(changed: dict[str, str], nodes=()) -> OnnxTrainer:
    """The example graph with some of its outputs taken from other values than the honest ones."""
    manifest = tiny.draft()
    honest = tiny.per_example() + tiny.clipping()
    honest += tiny.weighted_gradients("weights", ("grad.w", "grad.b"), "local_grad.head")
    for node in honest:
        for index, name in enumerate(node.output):
            if name in changed:
                node.output[index] = f"honest.{name}"
    honest += list(nodes)
    honest += [helper.make_node("Identity", [source], [name]) for name, source in changed.items()]
    graph = tiny.model(honest, train_inputs(manifest), train_outputs(manifest), tiny.CONSTANTS)
    files = {"train.onnx": graph, "predict.onnx": tiny.predict_graph(manifest)}
    return OnnxTrainer(
        Bundle.read(write_bundle(manifest, files, tiny.initial_parameters(manifest), tiny.PUBLISHER), KEY)
    )


@pytest.mark.parametrize(
    ("changed", "nodes", "match"),
    [
        ({"grad.w": "w"}, (), "does not clip"),
        ({"grad.b": "not_a_number"}, [helper.make_node("Div", ["zero", "zero"], ["not_a_number_1"]),
                                      helper.make_node("Add", ["not_a_number_1", "b"], ["not_a_number"])], "not clip"),
        ({"loss": "clip"}, (), "does not clip: losses"),
        ({"loss": "below_0"}, [helper.make_node("Neg", ["honest.loss"], ["below_0"])], "does not clip: losses"),
        ({"count": "clip"}, (), "do not add up"),
        ({"invalid": "clip"}, (), "do not add up"),
        ({"correct": "clip"}, (), "do not add up"),
        ({"clipped": "clip"}, (), "do not add up"),
    ],
)  # fmt: skip
def test_a_graph_that_breaks_its_contract_is_caught(changed, nodes, match):
    clip = 1e-3 if match in ("does not clip", "not clip") else 77.5
    with pytest.raises(PeerError, match=match):
        misbehaving(changed, nodes).clipped_sum(EXAMPLES, np.arange(3), clip=clip, loss_bound=LOSS_BOUND)


def test_a_graph_that_counts_padding_is_caught():
    with pytest.raises(PeerError, match="do not add up"):
        misbehaving({"count": "batch"}, [helper.make_node("Add", ["honest.count", "one"], ["batch"])]).clipped_sum(
            EXAMPLES, np.arange(3), **BOUNDS
        )


def test_a_graph_that_onnxruntime_cannot_load_is_the_publishers_fault():
    manifest = tiny.draft()
    wrong = [helper.make_node("MatMul", ["x", "x"], ["product"])]  # (4, 5) by (4, 5)
    wrong += [helper.make_node("Identity", ["product"], [t.name]) for t in train_outputs(manifest)]
    files = {
        "train.onnx": tiny.model(wrong, train_inputs(manifest), train_outputs(manifest)),
        "predict.onnx": tiny.predict_graph(manifest),
    }
    data = write_bundle(manifest, files, tiny.initial_parameters(manifest), tiny.PUBLISHER)
    with pytest.raises(PeerError, match=r"train\.onnx: onnxruntime does not load it"):
        OnnxTrainer(Bundle.read(data, KEY))


def test_a_graph_that_fails_on_a_batch_is_the_publishers_fault():
    manifest = tiny.draft(inputs=(Tensor("x", (1,), "int64", None),), output=Tensor("output", (1, 1), "float32", None))
    predict = [helper.make_node("Gather", ["scale", "x"], ["rows"]), helper.make_node("Identity", ["b"], ["unused"])]
    predict.append(helper.make_node("Unsqueeze", ["rows", "axis"], ["output"]))
    trained = [("w", "grad.w"), ("head", "local_grad.head"), ("b", "grad.b")]
    outputs = [helper.make_node("Identity", [source], [name]) for source, name in trained]
    outputs += [helper.make_node("Identity", ["clip"], [t.name]) for t in train_outputs(manifest)[-5:]]
    files = {
        "train.onnx": tiny.model(outputs, train_inputs(manifest), train_outputs(manifest)),
        "predict.onnx": tiny.model(
            predict, predict_inputs(manifest), predict_outputs(manifest), [("axis", np.array([2]))]
        ),
    }
    data = write_bundle(manifest, files, tiny.initial_parameters(manifest), tiny.PUBLISHER)
    model = OnnxTrainer(Bundle.read(data, KEY))
    assert model.predict(np.zeros((2, 1), np.int64)).shape == (2, 1, 1)
    with pytest.raises(PeerError, match=r"predict\.onnx fails on a batch"):
        model.predict(np.array([[7]], np.int64))
