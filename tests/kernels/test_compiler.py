"""Ops inside torch.compile and torch.jit.trace: seen through, called between graphs, or refused, never guessed at."""

import pytest
import torch
from torch import Tensor, nn

from hdfast_kernels import BackendError, Harmonizer, dispatch, layer_norm_silu, sample_index, two_hot_loss

native = pytest.mark.skipif(not dispatch.native_built(), reason="the C++ module is not built")


class Agent(nn.Module):
    """Three ops in a row, with plain PyTorch in between."""

    def __init__(self, backend: str | None):
        super().__init__()
        self.backend = backend
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1.5, 9)), nn.Parameter(torch.zeros(9))
        # With two losses the signature of the autograd.Function once confused the compiler.
        self.harmonizer = Harmonizer({"reward": {"reward": 1.0}, "size": {"size": 1.0}}, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.sin(layer_norm_silu(torch.relu(x) * 2, self.weight, self.bias, backend=self.backend))
        losses = {"reward": two_hot_loss(logits, x[:, 0], backend=self.backend), "size": logits[:, 0] ** 2}
        return self.harmonizer(losses)[0]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def breaks(counters) -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native), "reference"])
def test_a_compiled_agent_computes_the_same(backend):
    counters = pytest.importorskip("torch._dynamo.utils").counters
    agent, x = Agent(backend), torch.linspace(-2, 2, 63).view(7, 9)
    expected = agent(x)
    slopes = torch.autograd.grad(expected, list(agent.parameters()))
    compiled = torch.compile(agent, backend="eager", fullgraph=backend == "reference")
    for _ in range(3):
        found = compiled(x)
        assert torch.allclose(found, expected)
        again = torch.autograd.grad(found, list(agent.parameters()))
        assert all(torch.allclose(one, other) for one, other in zip(again, slopes, strict=True))
    with torch.no_grad():
        assert torch.allclose(compiled(x), expected)
    with torch.inference_mode():
        assert torch.allclose(compiled(x), expected)
    torch.compiler.reset()
    counters.clear()
    for _ in range(3):  # all ops are known by now
        torch.compile(agent, backend="eager")(x)
    # Of each op, one in every frame that is cut. It was dozens when the compiler looked into them.
    assert breaks(counters) == 0 if backend == "reference" else 3 <= breaks(counters) <= 9


def test_harmony_alone_does_not_break_a_graph():
    """By default: the compiler fuses it with losses of one's own. A backend that is named is called between graphs."""
    counters = pytest.importorskip("torch._dynamo.utils").counters
    harmonizer = Harmonizer({"size": {"size": 1.0}, "slope": {"slope": 0.5}})

    def total(x: Tensor) -> Tensor:
        return harmonizer({"size": x**2, "slope": x.sin() ** 2, "other": x.abs()})[0]

    x = torch.linspace(-2, 2, 63, requires_grad=True)
    learned = [x, harmonizer.log_sigma]
    slopes = torch.autograd.grad(total(x), learned)
    found = torch.autograd.grad(torch.compile(total, backend="eager", fullgraph=True)(x), learned)
    assert all(torch.allclose(one, other) for one, other in zip(found, slopes, strict=True))
    if dispatch.native_built():
        harmonizer.backend = "native"
        counters.clear()
        torch.compile(total, backend="eager")(x)
        assert breaks(counters)


@native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused():
    """It records what PyTorch is asked to do, and so would return memory that nothing has written."""
    logits, uniform = torch.randn(3, 4), torch.rand(3)
    with pytest.raises(
        BackendError, match=r"^sample_index: torch.jit.trace does not see .*; backend=.reference. can"
    ):
        torch.jit.trace(lambda one: sample_index(one, uniform, backend="native"), logits)
    traced = torch.jit.trace(lambda one: sample_index(one, uniform, backend="reference"), logits)
    assert torch.equal(traced(logits), sample_index(logits, uniform))
