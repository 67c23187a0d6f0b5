"""The parts of a run, and whole runs, beside the same with `reference`: `-k "update and small"` selects some.

Groups: update, observe (world-model loss and gradients), imagine, act, replay (sample, append), environments, loop;
robots that are drawn (`-k robots`) are among the environments.
B16 x T64, H15, images of 64 x 64; GFLOP are those of the definition, whatever a backend does. On CUDA also Triton,
update and act as one captured graph, and a graph with halves of two updates side by side. A large update takes minutes
on a CPU: there it is marked `slow`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.agent import ROW, Bench, Run, backend, config_of, gflop, random_row, threads_of_a_run
from bench.conftest import DEVICE
from hdfast import envs
from hdfast.replay import Replay
from hdfast.runtime.device import resolve_precision
from hdfast.runtime.errors import MissingLibraryError

CUDA = DEVICE.type == "cuda"
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
BEST = str(resolve_precision("auto", DEVICE)).removeprefix("torch.")
ROUNDS = {"tiny": 5, "small": 3, "medium": 1, "large": 1}
SIZES = ["tiny", "small", "medium", pytest.param("large", marks=() if CUDA else pytest.mark.slow)]
BACKENDS = ("default", "triton") if CUDA else ("default",)
GRAPHS = ("graph", "triton-graph") if CUDA else ()  # with the default backends, and with Triton
OVERLAPS = ("overlap", "triton-overlap") if CUDA else ()  # the same, halves of two updates side by side
APPENDS, ENV_STEPS, ROBOT_STEPS = 100, 200, 10


def on(name: str | None, run: Run) -> Run:
    """`run` with every op on one backend; None and "default" leave the choice to the ops."""

    def there() -> None:
        with backend(None if name == "default" else name):
            run()

    return there


@pytest.fixture(scope="module")
def benches() -> Callable[[str, str], Bench]:
    """Benches by size and precision, each made once: parts change nothing but its parameters."""
    return functools.cache(
        lambda size, precision: Bench(config_of(size), DEVICE, resolve_precision(precision, DEVICE))
    )


@pytest.fixture
def part(compare, benches, benchmark) -> Callable[..., None]:
    """Times a part of a bench (`of` makes it from a bench) beside the same with `reference`."""

    def timed(
        name: str,
        size: str,
        precision: str,
        implementation: str,
        of: Callable[[Bench], Run],
        work: float | None = None,
        rounds: int | None = None,
        **info: Any,
    ) -> None:
        bench = benches(size, precision)
        graph = implementation in (*GRAPHS, *OVERLAPS)
        name_of_backend = (
            implementation.removesuffix("graph").removesuffix("overlap").removesuffix("-") or "default"
        )
        # A captured graph keeps a bench of its own.
        own = Bench(bench.config, DEVICE, bench.dtype) if graph else bench
        benchmark.group = f"{name} {size} {SHORT[precision]}"
        with threads_of_a_run(bench.config, DEVICE):
            compare(
                on(name_of_backend, of(own)),
                on("reference", of(bench)),
                implementation=implementation,
                against="reference",
                default=implementation == "default",
                gflop=work or gflop(bench.config, name, DEVICE),
                dtype=bench.dtype,
                rounds=rounds or (50 if CUDA else ROUNDS[size]),
                warmups=6 if graph else 1,
                size=size,
                precision=precision,
                **info,
            )

    return timed


@pytest.mark.parametrize("implementation", [*BACKENDS, *GRAPHS, *OVERLAPS])
@pytest.mark.parametrize("precision", SHORT)
@pytest.mark.parametrize("size", SIZES)
def test_update(part, size, precision, implementation):
    graph = Bench.graph if implementation in GRAPHS else Bench.update
    part("update", size, precision, implementation, Bench.overlap if implementation in OVERLAPS else graph)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("precision", [BEST])
@pytest.mark.parametrize("size", SIZES)
def test_observe(part, size, precision, implementation):
    part("observe", size, precision, implementation, Bench.observe)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("precision", [BEST])
@pytest.mark.parametrize("size", SIZES)
def test_imagine(part, size, precision, implementation):
    part("imagine", size, precision, implementation, Bench.imagine)


@pytest.mark.parametrize("implementation", [*BACKENDS, *GRAPHS])
@pytest.mark.parametrize("precision", [BEST if CUDA else "float32"])  # the policy acts in float32 on a CPU
@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large"])
@pytest.mark.parametrize("num_envs", [1, 8])
def test_act(part, size, precision, implementation, num_envs):
    part(
        f"act {num_envs}",
        size,
        precision,
        implementation,
        lambda bench: bench.act(num_envs, graph=implementation in GRAPHS),
        work=num_envs * gflop(config_of(size), "act", DEVICE),
        count=num_envs,
        rounds=50,
    )


@pytest.mark.parametrize("implementation", BACKENDS)
def test_replay_sample(compare, benches, benchmark, implementation):
    bench = benches("tiny", BEST)
    batch = bench.sample()
    benchmark.group = "replay sample B16 T64"
    compare(
        on(implementation, bench.sample),
        on("reference", bench.sample),
        implementation=implementation,
        against="reference",
        default=implementation == "default",
        nbytes=2 * sum(value.nbytes for value in batch.values()),
        count=batch["reward"].numel(),
    )


@pytest.mark.parametrize("log", ["memory", "log"])
@pytest.mark.parametrize("num_envs", [1, 8])
def test_replay_append(compare, benchmark, num_envs, log, tmp_path):
    """Adds a row of every environment to the ring, and with `log` to the log on disk."""
    directory = tmp_path if log == "log" else None
    replay = Replay(ROW, num_envs=num_envs, capacity=2_000 * num_envs, device=DEVICE, directory=directory)
    rng = np.random.default_rng(0)
    rows = [random_row(rng, t, num_envs) for t in range(APPENDS)]

    def append() -> None:
        for one in rows:
            replay.add(one)

    benchmark.group = f"replay append {num_envs}"
    compare(
        append,
        implementation=log,
        default=True,
        nbytes=2 * sum(value.nbytes for one in rows for value in one.values()),
        count=num_envs * APPENDS,
    )
    replay.close()


@pytest.mark.parametrize(
    ("suite", "task", "source", "num_envs"),
    [
        ("atari100k", "Pong", "envpool", 1),
        ("atari100k", "Pong", "envpool", 8),
        ("atari100k", "Pong", "ale", 1),
        ("atari100k", "Pong", "ale", 8),
        ("demo", "Catch", "auto", 8),
    ],
)
def test_environments(compare, benchmark, suite, task, source, num_envs):
    """Steps with random actions; `per s` counts the steps of all environments."""
    try:
        env = envs.make(suite, task, num_envs=num_envs, seed=0, source=source)
    except MissingLibraryError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)

    def play() -> None:
        for _ in range(ENV_STEPS):
            env.send(env.actions.sample(rng, num_envs))
            env.recv()

    with env:
        env.reset()
        benchmark.group = f"environments {task} {num_envs}"
        compare(play, implementation=source, default=source != "ale", count=num_envs * ENV_STEPS)


@pytest.mark.parametrize("render", ["full", "fast"])
@pytest.mark.parametrize(("suite", "task"), [("dmc", "walker-walk"), ("metaworld", "button-press")])
def test_robots(compare, benchmark, suite, task, render):
    """An agent step of one robot that is drawn; without a GPU OpenGL draws on the CPU."""
    try:
        env = envs.make(suite, task, num_envs=1, seed=0, render=render)
    except MissingLibraryError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)

    def play() -> None:
        for _ in range(ROBOT_STEPS):
            env.step(env.actions.sample(rng, 1))

    with env:
        env.reset()
        benchmark.group = f"environments {task} 1"
        compare(play, implementation=f"envpool {render}", default=render == "full", count=ROBOT_STEPS)


@pytest.mark.parametrize(
    ("suite", "task", "prefill", "warmup", "agent_steps", "rounds"),
    [
        pytest.param("demo", "Catch", 512, 800, 160, 5, id="demo-tiny"),
        pytest.param("atari100k", "Pong", 16, 82, 2, 2, id="atari100k-small"),
    ],
)
def test_loop(compare, benchmark, tmp_path, suite, task, prefill, warmup, agent_steps, rounds):
    """Whole runs, a few agent steps at a time; `per s` counts agent steps."""
    running = pytest.importorskip("bench.running", reason="a run needs more packages", exc_type=ImportError)
    names = (None, "reference")
    configs = [(running.config_of(suite, task, tmp_path / str(name), prefill), name) for name in names]
    config = configs[0][0]
    flops = {}
    if suite == "atari100k":  # its images and actions are like those of a bench
        per_step = gflop(config, "update", DEVICE) * config.updates_per_step + gflop(config, "act", DEVICE)
        flops = {"gflop": agent_steps * per_step, "dtype": resolve_precision(config.precision, DEVICE)}
    try:
        with threads_of_a_run(config, DEVICE), running.sessions(configs) as (default, reference):
            default(warmup)
            reference(warmup)
            benchmark.group = f"loop {suite} {task} {config.size}"
            compare(
                lambda: default(agent_steps),
                lambda: reference(agent_steps),
                implementation="default",
                against="reference",
                default=True,
                count=agent_steps,
                rounds=20 if CUDA else rounds,
                warmups=0,
                **flops,
            )
    except MissingLibraryError as error:
        pytest.skip(str(error))
