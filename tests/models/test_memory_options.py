"""Options that trade time for memory change no number."""

import copy
import weakref

import pytest
import torch

from dpo_ref.data.packing import collate
from dpo_ref.generation.sampling import decoding_mode
from dpo_ref.models import layers
from dpo_ref.models.logps import response_logps
from tests.support.tiny import random_groups, tiny_model

LAYOUTS = [((5, (4, 7)), (12, (3, 8))), ((9, (11, 2)),), ((3, (6, 1)), (2, (2, 9)), (7, (5, 5)))]


def result(model, layout):
    model.zero_grad()
    model.train()
    logps = response_logps(model, collate(random_groups(layout)))
    logps.sums.sum().backward()
    return logps.token_logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("how", ["selective", "full", "offload"])
def test_checkpointing_changes_nothing(how):
    plain = tiny_model()
    saving = copy.deepcopy(plain)
    layers.CHECKPOINTING[how](saving)
    assert saving.is_gradient_checkpointing
    for layout in LAYOUTS:
        for ours, theirs in zip(result(saving, layout), result(plain, layout), strict=True):
            assert torch.equal(ours, theirs)


def test_selective_keeps_products_and_recomputes_the_rest():
    """Counted in the backward pass: full checkpointing runs every product of the layers again, selective none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = others = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            is_product = any(name in str(operator) for name in ("aten.mm", "aten.addmm"))
            self.products += is_product
            self.others += not is_product
            return operator(*args, **(kwargs or {}))

    counts = {}
    for how in ("off", "selective", "full"):
        model = tiny_model()
        layers.CHECKPOINTING[how](model)
        model.train()
        loss = response_logps(model, collate(random_groups(LAYOUTS[0]))).sums.sum()
        with Count() as count:
            loss.backward()
        counts[how] = count
    assert counts["selective"].products == counts["off"].products < counts["full"].products
    assert counts["off"].others < counts["selective"].others


def on_the_device(model, layout):
    """Of which layers the input is there when the forward pass has ended, and how many at most while backward goes."""
    inputs, at_once = [], []
    for layer in layers.decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda _, arguments: inputs.append(weakref.ref(arguments[0].untyped_storage()))
        )
    loss = response_logps(model.train(), collate(random_groups(layout))).sums.sum()
    after = [number for number, storage in enumerate(inputs) if storage() is not None]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: at_once.append(sum(x() is not None for x in inputs)))
    loss.backward()
    assert all(storage() is None for storage in inputs)
    return after, max(at_once)


def test_offloaded_inputs_leave_the_device():
    """But the last, of which the backward pass has need at once."""
    model, plain = tiny_model(num_hidden_layers=5), tiny_model(num_hidden_layers=5)
    layers.CHECKPOINTING["offload"](model)
    layers.CHECKPOINTING["full"](plain)
    assert on_the_device(model, LAYOUTS[0]) == ([4], 1)
    assert on_the_device(plain, LAYOUTS[0]) == ([0, 1, 2, 3, 4], 5)


def test_offloaded_inputs_come_back_one_layer_ahead(monkeypatch):
    """Streams that write down what they are asked for: a copy waits for what was computed so far, the computation for
    the copy that it needs and for no other."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name, self.events = name, 0

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            self.events += 1
            return self.events

        def wait_event(self, event):
            log.append(f"{self.name} waits for copy {event}")

    computing, beside = Stream("compute"), Stream("copies")
    monkeypatch.setattr(torch.cpu, "current_stream", lambda: computing)
    monkeypatch.setattr(layers, "_beside", lambda device: beside)
    model = tiny_model(num_hidden_layers=3)
    layers.CHECKPOINTING["offload"](model)
    loss = response_logps(model.train(), collate(random_groups(LAYOUTS[0]))).sums.sum()
    out = "copies waits for compute"
    assert log == [out, "compute waits for copy 1", out, "compute waits for copy 2", out]
    log.clear()
    loss.backward()
    third, second, first = ([out, f"compute waits for copy {number}"] for number in (3, 4, 5))
    assert log == [*third, *second, first[1]]


def test_offload_is_refused_where_the_device_has_main_memory():
    with pytest.raises(ValueError, match=r"offload has no effect on a CPU.*use model\.gradient_checkpointing=full"):
        layers.check_checkpointing("offload", torch.device("cpu"))
    layers.check_checkpointing("offload", torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo touches .grad of what is no leaf
def test_compiled_layers_change_nothing_and_compile_no_more_after_warm_up():
    plain = tiny_model()
    compiled = copy.deepcopy(plain)
    for layer in layers.decoder_layers(compiled):
        layer.compile(dynamic=True)
    for layout in LAYOUTS[:2]:
        result(compiled, layout)
    graphs = layers.graphs_compiled()
    assert graphs > 0
    for layout in LAYOUTS:
        for ours, theirs in zip(result(compiled, layout), result(plain, layout), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert layers.graphs_compiled() == graphs
    with decoding_mode(compiled):
        assert not any(module._compiled_call_impl for module in compiled.modules())
    assert any(module._compiled_call_impl for module in compiled.modules())
