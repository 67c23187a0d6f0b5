"""Which backend runs, what decides it, and what errors say."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import hdfast_kernels
from hdfast_kernels import BackendError, backends_available, dispatch, layer_norm_silu

CPU = torch.empty(0)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)


@pytest.fixture
def toy(monkeypatch):
    """An op with three backends that return their names, and an empty table."""
    monkeypatch.setattr(dispatch, "_ops", {})
    monkeypatch.setattr(dispatch, "_DEFAULTS", {"cpu": {"toy": "native"}, "cuda": {}})
    monkeypatch.setattr(dispatch, "native_built", lambda: True)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: False)
    dispatch.register("toy", reference=lambda: "reference", triton=lambda: "triton")
    dispatch.register("toy", native=lambda: "native")
    return "toy"


def test_the_table_decides_where_nobody_else_does(toy):
    assert dispatch.resolve(toy, None, CPU)() == "native"
    assert dispatch.resolve(toy, None, torch.empty(0, device="meta"))() == "reference"
    assert dispatch.resolve(toy, None, CPU.double())() == "reference"  # only the definition supports float64


def test_triton_runs_on_the_device_of_the_tensor(toy, monkeypatch):
    """Triton itself launches on the current device, whatever its arguments."""
    current, run_on = [0], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    dispatch.register(toy, triton=lambda: run_on.append(current[0]))
    for index in (1, 0):
        tensor = SimpleNamespace(
            is_cuda=True,
            device=torch.device("cuda", index),
            dtype=torch.float32,
            is_floating_point=lambda: True,
        )
        dispatch.resolve(toy, "triton", tensor)()
    assert run_on == [1, 0]
    assert current == [0]


def seen_of(run: Callable[[], object]) -> list[tuple[str, int]]:
    """Name and scope of what PyTorch's profiler sees of ours."""
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("hdfast phase"):
        run()
    return [(event.name, event.scope) for event in found.events() if event.name.startswith("hdfast")]


def test_a_profiler_sees_an_op_of_ours_as_one_of_pytorchs(toy, monkeypatch):
    """To a mere range it would count no kernel that Triton launches there."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")  # as `profile.measure`: it is read once in a process
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    scope = torch._C._profiler.RecordScope
    phase, op = ("hdfast phase", scope.USER_SCOPE.value), ("hdfast::toy", scope.FUNCTION.value)
    for backend in ("triton", "native"):
        assert seen_of(lambda backend=backend: dispatch.resolve(toy, backend, CPU)()) == [phase, op]
    assert seen_of(dispatch.resolve(toy, "reference", CPU)) == [phase], "it is made of PyTorch's"
    run = dispatch.resolve(toy, "triton", CPU)
    assert run is dispatch.implementation(toy, "triton"), "while none looks"
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(ZeroDivisionError):
        dispatch.recorded("fails", lambda: 1 // 0)()


def test_an_op_that_the_table_does_not_name_runs_its_reference(toy):
    dispatch.use("cpu", {})
    assert dispatch.resolve_name(toy, None, CPU) == "reference"


def test_a_table_replaces_what_was_there_and_gives_it_back(toy):
    before = dispatch.use("cpu", {"toy": "reference"})
    assert before == {"toy": "native"}
    assert dispatch.resolve_name(toy, None, CPU) == "reference"
    assert dispatch.use("cpu", before) == {"toy": "reference"}
    assert dispatch.resolve_name(toy, None, CPU) == "native"


def test_no_table_is_the_one_that_was_measured():
    measured = dict(dispatch.CPU_DEFAULT)
    before = dispatch.use("cpu", {})
    try:
        assert measured == dispatch.CPU_DEFAULT, "and nothing changes it"
        assert dispatch.use("cpu", None) == {}
        assert dispatch.defaults("cpu") == measured
    finally:
        dispatch.use("cpu", before)


@pytest.mark.parametrize(
    ("device", "table", "says"),
    [
        ("cpu", {"toi": "native"}, "toi: there is no such op; the ops are toy"),
        (
            "cpu",
            {"toy": "nativ"},
            f"toy: there is no such backend; choose one of {', '.join(dispatch.BACKENDS)}",
        ),
        ("mps", {}, "there are no backends for mps, only for cpu and cuda"),
    ],
)
def test_a_table_that_cannot_be_changes_nothing(toy, device, table, says):
    with pytest.raises(BackendError, match=f"^{says}$"):
        dispatch.use(device, table)
    assert dispatch.resolve_name(toy, None, CPU) == "native"


def test_the_defaults_of_a_device_that_is_none():
    with pytest.raises(BackendError, match=r"^there are no backends for mps, only for cpu and cuda$"):
        dispatch.defaults("mps")


def test_the_environment_goes_before_the_table_and_the_caller_before_both(toy, monkeypatch):
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    assert dispatch.resolve_name(toy, None, CPU) == "reference"
    assert dispatch.resolve_name(toy, "native", CPU) == "native"
    monkeypatch.setenv("HDFAST_BACKEND", "")
    assert dispatch.resolve_name(toy, None, CPU) == "native"


def test_the_environment_leaves_an_op_that_has_no_such_backend_to_the_table(toy, monkeypatch):
    """HDFAST_BACKEND=triton is for whole runs, some of whose ops need no kernel of their own."""
    dispatch.register("plain", reference=lambda: "reference", native=lambda: "native")
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    monkeypatch.setenv("HDFAST_BACKEND", "triton")
    assert dispatch.resolve_name("toy", None, CPU) == "triton"
    assert dispatch.resolve_name("plain", None, CPU) == "reference"
    with pytest.raises(BackendError, match="plain has no triton implementation; it has reference, native"):
        dispatch.resolve_name("plain", "triton", CPU)
    monkeypatch.setenv("HDFAST_BACKEND", "tritn")
    with pytest.raises(BackendError, match="HDFAST_BACKEND=tritn cannot run: there is no such backend"):
        dispatch.resolve_name("plain", None, CPU)


@pytest.mark.parametrize("forced", ["native", "triton"])
def test_the_environment_does_not_decide_where_only_shapes_are_computed(toy, monkeypatch, forced):
    monkeypatch.setenv("HDFAST_BACKEND", forced)
    assert dispatch.resolve_name(toy, None, torch.empty(0, device="meta")) == "reference"


def test_a_wish_that_cannot_be_met_is_an_error_and_not_another_backend(toy, monkeypatch):
    cases = [
        ("numpy", CPU, "toy: backend=numpy cannot run: there is no such backend; choose one of reference"),
        ("triton", CPU, "move it to a GPU or set TRITON_INTERPRET=1"),
        ("native", torch.empty(0, device="meta"), "the tensor is on meta, native runs on the CPU"),
        ("native", CPU.double(), r'takes float32, bfloat16, got float64; .*backend="reference"'),
    ]
    for wish, tensor, message in cases:
        with pytest.raises(BackendError, match=message):
            dispatch.resolve(toy, wish, tensor)
    monkeypatch.setenv("HDFAST_BACKEND", "triton")
    with pytest.raises(BackendError, match="toy: HDFAST_BACKEND=triton cannot run"):
        dispatch.resolve(toy, None, CPU)


def test_what_is_missing_is_named_with_the_command_that_mends_it(toy, monkeypatch):
    monkeypatch.setattr(dispatch, "native_built", lambda: False)
    with pytest.raises(BackendError, match=r"the default backend native cannot run: .*`pip install -e \.`"):
        dispatch.resolve(toy, None, CPU)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.raises(BackendError, match=r"triton is not installed; .*`pip install triton`"):
        dispatch.resolve(toy, "triton", CPU)


def test_triton_takes_cpu_tensors_under_its_interpreter(toy, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    assert dispatch.resolve(toy, "triton", CPU)() == "triton"
    assert backends_available(toy, CPU) == ("reference", "triton", "native")
    assert backends_available(toy, CPU.double()) == ("reference",)


def test_an_op_without_that_backend_or_without_a_name(toy):
    dispatch.register("plain", reference=lambda: "reference")
    with pytest.raises(BackendError, match="plain has no native implementation; it has reference"):
        dispatch.resolve("plain", "native", CPU)
    with pytest.raises(BackendError, match="there is no such op; the ops are plain, toy"):
        dispatch.resolve("palin", None, CPU)
    with pytest.raises(BackendError, match="there is no such op; the ops are plain, toy"):
        backends_available("palin", CPU)


def test_dtypes_none_takes_all(toy):
    dispatch.register("bytes", native=lambda: "native", dtypes=None)
    assert dispatch.resolve_name("bytes", "native", torch.empty(0, dtype=torch.uint8)) == "native"


def test_a_second_call_adds_to_an_op_and_does_not_change_its_dtypes(toy):
    with pytest.raises(BackendError, match=r"^toy: registered with dtypes=\(.*\), now with None$"):
        dispatch.register(toy, fused=lambda: "fused", dtypes=None)
    assert dispatch.backends_registered(toy) == ("reference", "triton", "native")
    assert dispatch.resolve_name(toy, None, CPU.double()) == "reference"


def test_an_implementation_of_no_backend_is_refused(toy):
    with pytest.raises(
        BackendError, match=r"^toi: there is no backend nativ; choose one of reference, triton"
    ):
        dispatch.register("toi", nativ=lambda: "native")
    assert dispatch.ops() == (toy,)


def test_an_implementation_is_replaced_until_the_end_of_the_block(toy):
    with dispatch.replaced(toy, "fused", lambda: "other"), dispatch.replaced(toy, "native", lambda: "faulty"):
        assert [dispatch.resolve(toy, name, CPU)() for name in ("fused", None)] == ["other", "faulty"]
    assert dispatch.resolve(toy, None, CPU)() == "native"
    assert dispatch.backends_registered(toy) == ("reference", "triton", "native")
    for op, backend, says in (("toi", "native", "no such op"), (toy, "nativ", "no such backend")):
        with (
            pytest.raises(BackendError, match=f"^{op}: there is {says}"),
            dispatch.replaced(op, backend, print),
        ):
            pass


def test_the_first_of_some_backends_is_that_which_an_op_has_or_can_run(toy):
    dispatch.register("plain", reference=lambda: "reference")
    assert dispatch.first_of(("fused", "triton", "native")) == {toy: "triton"}
    assert dispatch.first_of(("triton", "reference", "native")) == {toy: "triton", "plain": "reference"}
    assert dispatch.first_of(("triton", "native"), CPU) == {toy: "native"}
    assert dispatch.first_of(("triton", "native"), CPU.double()) == {}


def test_every_default_is_an_implementation_that_exists():
    for table in (dispatch.CPU_DEFAULT, dispatch.CUDA_DEFAULT):
        for op, name in table.items():
            assert name in dispatch.backends_registered(op), op


def test_every_op_has_a_reference_and_is_public():
    assert set(dispatch.ops()) <= set(hdfast_kernels.__all__)
    assert all("reference" in dispatch.backends_registered(op) for op in dispatch.ops())


def test_public_names_are_functions_whatever_was_imported_first():
    assert callable(hdfast_kernels.layer_norm_silu)
    assert hdfast_kernels.layer_norm_silu is layer_norm_silu


def run(code: str) -> None:
    kernels = Path(hdfast_kernels.__file__).parents[1]
    path = os.pathsep.join([str(kernels), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_without_triton_the_other_backends_work():
    run("""
import sys
sys.modules["triton"] = None  # what the import system says of a package that is not there
import importlib.util, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import hdfast_kernels as k
x, w, b = torch.randn(3, 8, requires_grad=True), torch.ones(8), torch.zeros(8)
for backend in ("reference", "native"):
    k.layer_norm_silu(x, w, b, backend=backend).sum().backward()
try:
    k.layer_norm_silu(x, w, b, backend="triton")
except k.BackendError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("no error")
from hdfast_kernels._triton import triton
@triton.jit
def kernel(x): ...
try:
    kernel[(1,)](x)
except ModuleNotFoundError as error:
    assert error.name == "triton"
else:
    raise AssertionError("a kernel that does not exist was launched")
""")


def test_without_the_cpp_module_the_reference_works_and_the_default_says_what_to_do():
    run("""
import sys
sys.modules["hdfast_kernels._native"] = None
import importlib.util, os, torch
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.endswith("._native") else real(name, *rest)
import hdfast_kernels as k
x, w, b = torch.randn(3, 8), torch.ones(8), torch.zeros(8)
os.environ.pop("HDFAST_BACKEND", None)
k.layer_norm_silu(x, w, b, backend="reference")
for attempt in (lambda: k.layer_norm_silu(x, w, b), lambda: k.native.module()):
    try:
        attempt()
    except k.BackendError as error:
        assert "`pip install -e .`" in str(error), error
    else:
        raise AssertionError("no error")
""")
