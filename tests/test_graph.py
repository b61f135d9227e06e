"""What is particular to the ggml backend: its graphs, their memory, and what crosses between backends."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import toy
from toy.models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("kernels")

CONFIGS = {name: row.small for name, row in ARCHITECTURES.items() if row.reads_text}
SPELLINGS = ["cpu", "cpu-native"]
B = 4


def realize(model, device, backend="ggml", keep_gradients=False, **options):
    config = CONFIGS[model]
    recipe = toy.recipes.FromScratch(backend=backend, device=device)
    options = toy.RecipeOptions(**{"t_seq": config.context_length, "t_batch": B, "seed": 3, **options})
    return recipe.realize(config, options, keep_gradients=keep_gradients)


def batches(model, n):
    config, rng = CONFIGS[model], np.random.default_rng(5)
    text = np.cumsum(rng.integers(1, 4, 5000)) % config.vocab_size  # a sequence with something to learn
    for _ in range(n):
        starts = rng.integers(0, len(text) - config.context_length - 1, B)
        windows = np.stack([text[s : s + config.context_length + 1] for s in starts])
        yield windows[:, :-1], windows[:, 1:]


def train(recipe, data, first=0):
    adamw = recipe.adamw(lr=2e-3)
    return [recipe.step(x, None, y, adamw.hp_for_step(k), k == 0) for k, (x, y) in enumerate(data, first)]


@pytest.fixture(params=CONFIGS, ids=str)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def numpy_curves():
    return {model: train(realize(model, "cpu", backend="numpy"), batches(model, 200)) for model in CONFIGS}


@pytest.mark.parametrize("device", SPELLINGS)
@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
def test_200_steps_are_numpys_and_the_same_twice(model, device, clip, numpy_curves):
    expected = (
        numpy_curves[model]
        if clip is None
        else train(realize(model, "cpu", "numpy", grad_clip=clip), batches(model, 60))
    )
    n = len(expected)
    found = train(realize(model, device, grad_clip=clip), batches(model, n))
    assert expected[0] - expected[-1] > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-3)
    again = train(realize(model, device, grad_clip=clip), batches(model, 40))
    assert again == found[:40]


@pytest.mark.parametrize("device", SPELLINGS)
def test_updating_at_once_or_at_the_end_is_the_same(model, device):
    at_once = realize(model, device)
    at_the_end = realize(model, device, keep_gradients=True)
    assert train(at_once, batches(model, 5)) == train(at_the_end, batches(model, 5))
    a, b = at_once.parameters(), at_the_end.parameters()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert abs(at_once.grad_norm - at_the_end.grad_norm) <= 1e-6 * at_the_end.grad_norm


def test_small_results_are_kept_and_large_ones_computed_again_to_the_same_bits(model, monkeypatch):
    from toy.ops.graph import cpu

    n_nodes, losses, parameters = [], [], []
    for limit in (cpu.WORTH_COMPUTING_AGAIN, 0):
        monkeypatch.setattr(cpu, "WORTH_COMPUTING_AGAIN", limit)
        recipe = realize(model, "cpu")
        n_nodes.append(len(recipe.explain().nodes))
        losses.append(train(recipe, batches(model, 5)))
        parameters.append(recipe.parameters())
    assert n_nodes[0] < n_nodes[1]
    assert losses[0] == losses[1]
    assert all(np.array_equal(array, parameters[1][name]) for name, array in parameters[0].items())


def test_gradients_that_were_not_kept_say_how(model):
    with pytest.raises(RuntimeError, match="keep_gradients=True"):
        realize(model, "cpu").gradients()


@pytest.mark.parametrize("labels", ["integers", "dense"])
@pytest.mark.parametrize("options", [{}, {"grad_clip": 1.0}, {"weight_dtype": "f16"}], ids=["plain", "clip", "f16"])
def test_every_native_node_is_one_that_metal_runs(model, options, labels):
    import ggml_bridge

    recipe = realize(model, "cpu-native", **options)
    assert ggml_bridge.metal_unsupported(recipe.engine._training(labels).graph) == []
    assert ggml_bridge.cuda_unsupported(recipe.engine._training(labels).graph) == []
    for kind in (None, labels):
        assert ggml_bridge.metal_unsupported(recipe.engine._forward(kind).graph) == []
        assert ggml_bridge.cuda_unsupported(recipe.engine._forward(kind).graph) == []


def test_the_metal_check_notices(model):
    import ggml_bridge

    assert ggml_bridge.metal_unsupported(realize(model, "cpu").engine._training("integers").graph)


@pytest.mark.parametrize("device", SPELLINGS)
def test_explain(model, device):
    explanation = realize(model, device).explain()
    assert explanation.splits == 1 and set(explanation.bytes) == {"weights", "graph", "metadata"}
    kinds = explanation.counts()
    assert ("CUSTOM" in kinds) == (device == "cpu") and ("MUL_MAT" in kinds) == (device == "cpu-native")
    assert str(len(explanation.nodes)) in str(explanation)


def test_gradients_share_memory_when_they_are_not_kept():
    config = toy.GPT2Config(vocab_size=50, d_model=128, n_heads=4, d_ff=512, n_layers=6, context_length=8)
    graph_bytes = {}
    for keep in (False, True):
        recipe = toy.recipes.FromScratch(backend="ggml", device="cpu")
        recipe.realize(config, toy.RecipeOptions(t_seq=8), keep_gradients=keep)
        graph_bytes[keep] = recipe.explain().bytes["graph"]
    gradient_bytes = 4 * recipe.n_parameters
    assert graph_bytes[True] > gradient_bytes > 2 * graph_bytes[False]


@pytest.mark.parametrize("other", ["numpy", "cython"])
@pytest.mark.parametrize("device", SPELLINGS)
def test_a_run_goes_on_on_another_backend(model, device, other):
    data = list(batches(model, 20))
    straight = train(realize(model, "cpu", other), data)
    for first, second in ((("ggml", device), (other, "cpu")), ((other, "cpu"), ("ggml", device))):
        a, b = realize(model, first[1], first[0]), realize(model, second[1], second[0])
        losses = train(a, data[:10])
        b.load_parameters(a.parameters())
        b.load_optimizer_state(a.optimizer_state())
        losses += train(b, data[10:], first=10)
        np.testing.assert_allclose(losses, straight, atol=1e-4)


@pytest.mark.parametrize("device", SPELLINGS)
def test_two_recipes_take_turns(device):
    data = list(batches("gpt2", 6))
    alone = train(realize("gpt2", device), data)
    a, b = realize("gpt2", device), realize("transformer", device)
    adamw_a, adamw_b = a.adamw(lr=2e-3), b.adamw(lr=2e-3)
    found = []
    for k, (x, y) in enumerate(data):
        found.append(a.step(x, None, y, adamw_a.hp_for_step(k), k == 0))
        b.step(x, None, y, adamw_b.hp_for_step(k), k == 0)
        a.evaluate(x, y)
        a.logits(x)
    assert found == alone


def test_rope_tables_are_computed_once_a_graph(monkeypatch):
    from toy.ops.graph import cpu

    computed = []
    tables = cpu.rope_tables
    monkeypatch.setattr(cpu, "rope_tables", lambda *key: computed.append(key) or tables(*key))
    sizes = {"vocab_size": 11, "d_model": 16, "n_heads": 2, "d_ff": 12, "n_layers": 3, "context_length": 40}
    config = toy.LlamaConfig(**sizes, n_kv_heads=1, rope_base=5000.0)
    recipe = toy.recipes.FromScratch("ggml", "cpu").realize(config, toy.RecipeOptions(t_seq=6))
    assert computed == [(40, 8, 5000.0)]  # not once for q and once for k in every layer
    constants = [array for _, array in recipe.engine._training("integers").ops.feeds if isinstance(array, np.ndarray)]
    assert constants == []  # they are in the graph's memory, not here as well
    recipe.logits(np.arange(6))
    assert computed == [(40, 8, 5000.0)] * 2  # a graph of its own


class CountedUploads:
    """Stands for a tensor of a feed and counts what is uploaded to it."""

    def __init__(self, tensor):
        self.tensor, self.n = tensor, 0

    def upload(self, value):
        self.tensor.upload(value)
        self.n += 1


@pytest.mark.parametrize("device", SPELLINGS)
def test_positions_that_do_not_change_are_uploaded_once(model, device):
    recipe = realize(model, device)
    recorded = recipe.engine._training("integers")
    named = {}
    for i, (tensor, function) in enumerate(recorded.feeds):
        named[tensor.name or i] = counted = CountedUploads(tensor)
        recorded.feeds[i] = (counted, function)
    assert {"positions", "token_ids", "labels"} <= named.keys()
    train(recipe, batches(model, 4))
    assert {name: named[name].n for name in ("positions", "token_ids", "labels")} == {
        "positions": 1, "token_ids": 4, "labels": 4,
    }  # fmt: skip


@pytest.mark.parametrize("device", SPELLINGS)
def test_positions_that_change_are_uploaded(model, device):
    (x, y), *_ = batches(model, 1)
    straight, backwards = np.arange(x.shape[1]), np.arange(x.shape[1])[::-1]
    ours, numpys = realize(model, device), realize(model, "cpu", "numpy")
    adamw, row = ours.adamw(lr=2e-3), []
    for recipe in (ours, numpys):
        given = straight.copy()
        losses = [recipe.step(x, given, y, adamw.hp_for_step(0), True)]
        given[:] = backwards  # the caller's own array, reused
        losses += [recipe.step(x, given, y, adamw.hp_for_step(k), False) for k in (1, 2)]
        losses += [recipe.step(x, None, y, adamw.hp_for_step(3), False)]
        with pytest.raises(ValueError, match="positions"):
            recipe.step(x, straight + x.shape[1], y, adamw.hp_for_step(4), False)
        losses += [recipe.step(x, straight, y, adamw.hp_for_step(4), False)]
        row.append(losses)
    np.testing.assert_allclose(*row, atol=1e-4)
    assert abs(row[0][2] - row[0][3]) > 1e-3  # the order counts


@pytest.mark.parametrize("device", SPELLINGS)
def test_a_caller_may_fill_the_same_arrays_again(model, device):
    """What was uploaded last is compared with the next values: it must not be the caller's own array."""
    data = list(batches(model, 4))
    expected = train(realize(model, device), data)
    recipe = realize(model, device)
    adamw = recipe.adamw(lr=2e-3)
    x, y = (np.ascontiguousarray(array, np.int64) for array in data[0])
    losses = []
    for k, (inputs, labels) in enumerate(data):
        x[:], y[:] = inputs, labels
        losses.append(recipe.step(x, None, y, adamw.hp_for_step(k), k == 0))
    assert losses == expected


def test_closed_engines_raise():
    recipe = realize("gpt2", "cpu")
    recipe.close()
    recipe.close()
    with pytest.raises(RuntimeError, match="closed"):
        train(recipe, batches("gpt2", 1))


def test_a_device_that_is_not_there_lists_those_that_are():
    with pytest.raises(toy.BackendUnavailableError, match="'CPU'"):
        toy.recipes.FromScratch(backend="ggml", device="no-such-device")


def test_the_graph_written_head_by_head_gives_the_engines_curve():
    path = Path(__file__).parent.parent / "examples" / "gpt2_by_session.py"
    spec = importlib.util.spec_from_file_location("gpt2_by_session", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    engine = toy.engines.GPT2SeqEngine(backend="ggml", device="cpu").realize(65, 32, 4, 64, 2, 16, seed=1)
    by_hand = example.GPT2(example.Config(65, 32, 4, 64, 2, 16), engine.parameters(), n_threads=1)
    adamw = engine.adamw(lr=3e-3)
    ids = np.random.default_rng(2).integers(0, 65, 17)
    losses = []
    for k in range(60):
        row = adamw.hp_for_step(k)
        losses.append((engine.step(ids[:-1], None, ids[1:], row, k == 0), by_hand.step(ids[:-1], ids[1:], row, k == 0)))
    by_hand.close()
    expected, found = np.array(losses).T
    assert expected[-1] < 1.0
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_table_of_a_graph_names_the_kernels(kernels):
    config = toy.GPT2Config(11, d_model=8, n_heads=2, d_ff=12, n_layers=1, context_length=6)
    recipe = toy.recipes.FromScratch("ggml", "cpu").realize(config, toy.RecipeOptions(t_seq=6))
    explanation = recipe.explain()
    names = [node.name for node in explanation.nodes if node.op == "CUSTOM"]
    kernels_used = {name.rsplit(" ", 1)[0] for name in names}
    assert {"embedding", "layer_norm", "linear", "attention_backward", "gelu_backward", "adamw"} <= kernels_used
    assert len(set(names)) == len(names)
    assert "linear 1" in str(explanation)
