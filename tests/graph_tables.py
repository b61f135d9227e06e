"""Ops of any table on numpy arrays: computed at once, or recorded in a graph that runs in the memory that training uses."""

import importlib

import numpy as np

TABLES = ["reference", "accelerated", "graph-cpu", "graph-native"]
GRAPH_TABLES = TABLES[2:]


def on_table(table, record, arrays, parameters=(), integers=None, n_threads=1, look=None):
    """The results of record(ops, a, grads), a dict of arrays.

    a: dict of the names in `arrays` (float) and `integers` ({role: (array, limit)}) to what the table's ops take.
    parameters: those of the arrays that are trained; grads: dict of their names to what collects their gradients, which
    are results, too. look: a function of the graph, called before it runs.
    """
    integers = integers or {}
    if not table.startswith("graph"):
        ops = importlib.import_module(f"toy.ops.{table}")
        a = {name: array.astype(np.float32) for name, array in arrays.items()}
        grads = {name: np.zeros_like(a[name]) for name in parameters}
        results = record(ops, a | {role: array for role, (array, _) in integers.items()}, grads)
        return {name: np.asarray(result) for name, result in results.items()} | grads
    import ggml_bridge
    from toy.ops import graph as graph_ops

    class_ = graph_ops.CpuGraphOps if table == "graph-cpu" else graph_ops.NativeGraphOps
    with ggml_bridge.Backend("cpu", n_threads) as backend:
        graph = backend.graph()
        weights = {name: backend.persistent(arrays[name].shape, name=name) for name in parameters}
        slots = {name: graph_ops.Slot(name, weight) for name, weight in weights.items()}
        ops = class_(graph, {id(slot.parameter): slot for slot in slots.values()})
        inputs = {name: ops.constant(array) for name, array in arrays.items() if name not in parameters}
        # computed, as activations are: their memory is used again as soon as nothing reads them any more
        a = weights | {name: graph.scale(tensor, 1.0) for name, tensor in inputs.items()}
        for role, (array, limit) in integers.items():
            if array.dtype.kind == "f":
                a[role] = ops.feed(array.shape, "f32", lambda fed, role=role: fed[role])
            else:
                a[role] = ops.integers(role, len(array), limit)
        results = record(ops, a, slots)
        results |= {name: slot.tensor for name, slot in slots.items() if slot.tensor is not None}
        kept = {name: graph.output(tensor) for name, tensor in results.items()}
        graph.allocate()
        if table == "graph-native":
            assert ggml_bridge.metal_unsupported(graph) == []
            assert ggml_bridge.cuda_unsupported(graph) == []
        for name, weight in weights.items():
            weight.upload(arrays[name])
        fed = {role: array for role, (array, _) in integers.items()}
        for tensor, value in ops.feeds:
            tensor.upload(value(fed) if callable(value) else value)
        if look is not None:
            look(graph)
        ops.compute()
        return {name: tensor.download() for name, tensor in kept.items()}


def settings_of(case):
    """The settings of a `gradcheck.Case` -> (those that are integers or labels, as `on_table` takes them, the others)."""
    limits = {"token_ids": lambda: len(case.inputs["table"]), "positions": lambda: 1 + case.settings["positions"].max()}
    limits["labels"] = lambda: case.inputs["logits"].shape[1]
    arrays = {name: (value, limits[name]()) for name, value in case.settings.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in case.settings.items() if name not in arrays}


def run_case(table, case, cotangent, arrange=lambda ops, matrix: matrix, uses=1, frozen=(), **options):
    """-> {"(output)": ..., input: gradient} of a case on a table, as `gradcheck.forward` and `backward` give them.

    arrange: makes another tensor of the same numbers of every activation. uses: how often the op is recorded, forward and
    backward, with the same parameters. frozen: parameters whose gradient is not asked for.
    """
    integers, settings = settings_of(case)
    trained = [name for name in case.parameters if name not in frozen]
    activations = [name for name in case.inputs if name not in case.parameters]
    is_loss = np.ndim(cotangent) == 0
    arrays = case.inputs if is_loss else case.inputs | {"(cotangent)": cotangent}

    def record(ops, a, grads):
        arguments = {name: arrange(ops, a[name]) for name in activations} | {name: a[name] for name in case.parameters}
        arguments |= {name: a[name] for name in integers}
        outs = [getattr(ops, case.op)(**arguments, **settings) for _ in range(uses)]
        op_backward = getattr(ops, f"{case.op}_backward")
        for _, cache in reversed(outs):
            if is_loss:
                d = op_backward(cache)
                returned = (ops.scale(ops.finish_gradient(d) if table in GRAPH_TABLES else d, cotangent),)
            else:
                d_out = arrange(ops, a["(cotangent)"])
                returned = op_backward(d_out, cache, *(grads.get(name) for name in case.parameters))
                returned = returned if isinstance(returned, tuple) else (returned,)
        return {"(output)": outs[0][0]} | dict(zip(activations, returned))

    found = on_table(table, record, arrays, trained, integers, **options)
    if is_loss and table in GRAPH_TABLES:
        found["(output)"] = found["(output)"][0]  # of the CPU table's two numbers
    return found
