"""Ops inside torch.compile and torch.jit.trace: called between two graphs, or refused, never guessed at."""

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
