"""The ring: what is sampled, with which probability, from where."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hdfast.envs import ArraySpec
from hdfast.replay import Replay, ReplayError, ring
from tests.recorder import Recording
from tests.without_native import definitions_on_the_host  # noqa: F401

FLAGS = ("is_first", "is_last", "is_terminal")
SPECS = {
    "image": ArraySpec((4, 3, 3), np.uint8),
    "state": ArraySpec((3,), np.float32),
    "where": ArraySpec((2,), np.int64),  # environment, agent step
    "action": ArraySpec((), np.int32),
    "reward": ArraySpec((), np.float32),
    **{key: ArraySpec((), np.bool_) for key in FLAGS},
}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PLACES = ["device", "host"]


def make_row(agent_step: int, num_envs: int) -> dict[str, np.ndarray]:
    """The row that all environments return at this agent step, always the same one."""
    rng = np.random.default_rng(agent_step)
    return {
        "image": rng.integers(256, size=(num_envs, 4, 3, 3), dtype=np.uint8),
        "state": rng.normal(size=(num_envs, 3)).astype(np.float32),
        "where": np.stack([np.arange(num_envs), np.full(num_envs, agent_step)], axis=1),
        "action": rng.integers(9, size=num_envs, dtype=np.int32),
        "reward": rng.normal(size=num_envs).astype(np.float32),
        **{key: rng.random(num_envs) < 0.2 for key in FLAGS},
    }


def filled(steps: int, *, num_envs: int = 3, ring: int = 10, **kwargs) -> Replay:
    replay = Replay(SPECS, num_envs=num_envs, capacity=num_envs * ring, **kwargs)
    for agent_step in range(steps):
        replay.add(make_row(agent_step, num_envs))
    return replay


def sample(replay: Replay, batch: int, length: int) -> dict[str, torch.Tensor]:
    replay.stage(batch, length)
    return {key: rows.cpu().clone() for key, rows in replay.sample(batch, length).items()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("num_envs", "ring", "steps"), [(1, 7, 5), (1, 7, 7), (3, 10, 24), (2, 8, 16), (4, 5, 103)]
)
def test_windows_hold_the_rows_that_were_added(num_envs, ring, steps, device, place):
    replay = filled(steps, num_envs=num_envs, ring=ring, device=device, place=place)
    for length in (1, 4, min(steps, ring)):
        batch = sample(replay, 32, length)
        env, first_step = batch["where"][0].unbind(-1)  # (B,)
        assert (first_step >= steps - ring).all()
        assert (first_step + length <= steps).all(), "crosses the write head"
        assert torch.equal(batch["starts"], env * ring + first_step % ring)
        for t in range(length):
            for b in range(32):
                row = make_row(int(first_step[b]) + t, num_envs)
                for key, array in row.items():
                    expected = True if key == "is_first" and t == 0 else array[int(env[b])]
                    np.testing.assert_array_equal(batch[key][t, b].numpy(), expected, err_msg=key)
        assert {key: rows.dtype for key, rows in batch.items() if key in SPECS} == replay._layout.torch_dtypes
    replay.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [8, 10, 13, 29])
def test_every_valid_window_is_equally_likely(steps, device):
    replay = filled(steps, num_envs=3, ring=10, device=device, seed=1)
    length, draws = 4, 30_000
    starts = replay.sample(draws, length)["starts"].cpu()
    first_steps = range(max(steps - 10, 0), steps - length + 1)
    valid = [env * 10 + step % 10 for env in range(3) for step in first_steps]
    counts = torch.bincount(starts, minlength=30)
    assert counts.sum() == counts[valid].sum(), "windows that are not valid"
    expected = draws / len(valid)
    chi_square = ((counts[valid] - expected) ** 2 / expected).sum().item()
    freedom = len(valid) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_is_first_is_set_on_a_copy():
    replay = filled(6, num_envs=1)
    before = replay._storage["is_first"].clone()
    assert sample(replay, 64, 2)["is_first"][0].all()
    assert torch.equal(replay._storage["is_first"][:6], before[:6])
    assert not before[:6].all()


@pytest.mark.parametrize("place", PLACES)
def test_gather_returns_the_sampled_windows_again(place):
    replay = filled(24, place=place)
    batch = sample(replay, 16, 5)
    again = replay.gather(batch["starts"], 5)
    assert batch.keys() == again.keys() == SPECS.keys() | {"starts"}
    for key, rows in batch.items():
        assert torch.equal(rows, again[key]), key
    again["image"].zero_()  # a batch has memory of its own
    assert torch.equal(replay.gather(batch["starts"], 5)["image"], batch["image"])
    replay.close()


def test_the_seed_decides_the_windows():
    a, b, c = filled(24, seed=3), filled(24, seed=3), filled(24, seed=4)
    drawn = [torch.stack([sample(replay, 8, 4)["starts"] for _ in range(5)]) for replay in (a, b, c)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_a_recorded_sample_follows_the_ring(monkeypatch):
    """Recorded with 6 rows in the ring and replayed after it has wrapped around: nothing may be frozen."""
    monkeypatch.setenv("HDFAST_BACKEND", "reference")
    recorded, eager = filled(6, seed=7), filled(6, seed=7)
    batch = {}
    recording = Recording(lambda: batch.update(recorded.sample(50, 4)), recorded.generators)
    eager.sample(50, 4)
    for agent_step in range(6, 40):
        for replay in (recorded, eager):
            replay.add(make_row(agent_step, 3))
        recording.replay()
        expected = eager.sample(50, 4)
        for key, rows in expected.items():
            assert torch.equal(batch[key], rows), (agent_step, key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_sample_follows_the_ring():
    captured, eager = (filled(6, seed=7, device="cuda") for _ in range(2))
    captured.sample(50, 4), eager.sample(50, 4)  # so that lazy allocations happen now
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(captured.generator)
    with torch.cuda.graph(graph):
        batch = captured.sample(50, 4)
    for agent_step in range(6, 40):
        for replay in (captured, eager):
            replay.add(make_row(agent_step, 3))
        graph.replay()
        expected = eager.sample(50, 4)
        for key, rows in expected.items():
            assert torch.equal(batch[key], rows), (agent_step, key)


@pytest.mark.parametrize("device", DEVICES)
def test_prefetched_batches_stay_in_place_and_are_whole(device):
    """A batch that is being fetched still gets rows that `add` is about to overwrite."""
    replay = filled(10, num_envs=2, ring=10, device=device, place="host")
    replay.stage(64, 4)
    addresses = {key: rows.data_ptr() for key, rows in replay.sample(64, 4).items()}
    for agent_step in range(10, 60):
        replay.add(make_row(agent_step, 2))
        replay.stage(64, 4)
        batch = replay.sample(64, 4)
        assert {key: rows.data_ptr() for key, rows in batch.items()} == addresses
        steps = batch["where"][..., 1].cpu()
        assert torch.equal(steps[1:], steps[:-1] + 1)
        assert steps.min() >= agent_step - 10
        assert steps.max() <= agent_step
    replay.close()


def test_prefetch_is_uniform_and_serves_several_shapes():
    replay = filled(13, num_envs=3, ring=10, place="host", seed=2)
    counts = torch.zeros(30)
    for _ in range(40):
        counts += torch.bincount(sample(replay, 500, 4)["starts"], minlength=30)
        assert sample(replay, 3, 9)["reward"].shape == (9, 3)
    counts = counts[[env * 10 + step % 10 for env in range(3) for step in range(3, 10)]]
    assert counts.sum() == 20_000
    assert ((counts - 20_000 / 21) ** 2).sum() / (20_000 / 21) < 20 + 4 * 40**0.5
    replay.close()


def test_host_sample_needs_stage():
    replay = filled(13, place="host")
    with pytest.raises(RuntimeError, match=re.escape("call stage(8, 4) before sample")):
        replay.sample(8, 4)


def test_place_is_chosen_by_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert ring._place(torch.device("cuda"), 500) == "device"
    assert ring._place(torch.device("cuda"), 501) == "host"
    assert ring._place(torch.device("cpu"), 10**15) == "device"


def test_describe_names_rows_bytes_and_place():
    replay = Replay(SPECS, num_envs=4, capacity=1_000_003)
    row = 36 + 12 + 16 + 4 + 4 + 3
    assert replay.nbytes == 1_000_000 * row
    assert replay.describe() == "replay: room for 1,000,000 rows, 0.07 GB on cpu"
    assert replay.ring == 250_000
    replay = Replay(SPECS, num_envs=4, capacity=100, place="host")
    assert replay.describe() == "replay: room for 100 rows, 0.00 GB on cpu, batches prefetched to cpu"


def test_ready_counts_rows_per_environment_up_to_the_ring():
    replay = filled(3, num_envs=2, ring=5)
    assert [replay.ready(length) for length in (0, 1, 3, 4)] == [False, True, True, False]
    with pytest.raises(ValueError, match="no window of 4 rows, there are 3 per environment"):
        replay.sample(1, 4)
    with pytest.raises(ValueError, match="no window of 4 rows"):
        filled(3, num_envs=2, ring=5, place="host").stage(1, 4)
    for agent_step in range(3, 9):
        replay.add(make_row(agent_step, 2))
    assert replay.rows_added == 9
    assert replay.ready(5)
    assert not replay.ready(6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"image": np.zeros((3, 4, 3), np.uint8)},
            ValueError,
            '"image" has shape (3, 4, 3), expected (3, 4, 3, 3)',
        ),
        (
            {"reward": np.zeros(3)},
            TypeError,
            '"reward" has dtype float64, expected float32',
        ),
        ({"reward": [0.0] * 3}, TypeError, '"reward" is a list, expected a numpy array'),
        ({"action": np.zeros((3, 1), np.int32)}, ValueError, '"action" has shape (3, 1), expected (3,)'),
        ({"extra": np.zeros(3)}, ValueError, "missing keys [], unknown keys ['extra']"),
        ({"state": None}, ValueError, "missing keys ['state'], unknown keys []"),
    ],
)
def test_wrong_rows_are_refused_in_one_line_and_not_added(change, error, message):
    replay = filled(2)
    row = {key: array for key, array in (make_row(2, 3) | change).items() if array is not None}
    with pytest.raises(error, match=re.escape(message)) as caught:
        replay.add(row)
    assert "\n" not in str(caught.value)
    assert replay.rows_added == 2


@pytest.mark.parametrize(
    ("specs", "kwargs", "message"),
    [
        ({}, {"capacity": 2}, "capacity 2 is no row for each of 3 environments"),
        ({}, {"num_envs": 0}, "capacity 30 is no row for each of 0 environments"),
        ({"action": None}, {}, 'replay needs the key "action"'),
        ({"is_last": None}, {}, 'replay needs the key "is_last", a bool scalar; got None'),
        ({"reward": ArraySpec((), np.float64)}, {}, 'replay needs the key "reward", a float32 scalar'),
        ({"name": ArraySpec((), np.dtype("U3"))}, {}, 'replay key "name": torch does not store <U3'),
        ({"starts": ArraySpec((2,), np.float32)}, {}, 'replay cannot have a key "starts"'),
    ],
)
def test_impossible_replays_are_refused(specs, kwargs, message):
    specs = {key: spec for key, spec in (SPECS | specs).items() if spec is not None}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Replay(specs, **({"num_envs": 3, "capacity": 30} | kwargs))


def test_rows_may_be_strided_and_are_copied():
    replay = Replay(SPECS, num_envs=3, capacity=30)
    row = make_row(0, 3)
    strided = {key: np.repeat(array, 2, axis=0)[::2] for key, array in row.items()}
    replay.add(strided)
    for array in strided.values():
        array[...] = 0
    np.testing.assert_array_equal(replay._storage["image"][::10].numpy(), row["image"])


def test_without_a_directory_rows_cannot_come_back():
    state = filled(4).state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    with pytest.raises(ReplayError, match="has 4 rows, and there is no log"):
        filled(0).load_state_dict(state)
    filled(0).load_state_dict(filled(0).state_dict())


def test_allocation_costs_no_memory_and_adding_none_beyond_the_ring():
    """In a fresh process: 3 GB of ring at start, then thousands of rows through a full ring with its log."""
    program = """
import gc, sys, tempfile, pathlib
import tests_path
from test_replay_ring import ArraySpec, Replay, SPECS, make_row, np, filled
def resident():
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
start = resident()
big = Replay(SPECS | {"image": ArraySpec((64, 64, 3), np.uint8)}, num_envs=2, capacity=250_000)
assert big.nbytes > 3e9
allocated = resident() - start
with tempfile.TemporaryDirectory() as directory:
    replay = Replay(SPECS, num_envs=3, capacity=300, directory=pathlib.Path(directory))
    rows = [make_row(k, 3) for k in range(50)]
    def run(steps):
        for k in range(steps):
            replay.add(rows[k % 50])
            if k % 100 == 0:
                replay.sample(4, 16), replay.state_dict() if replay.ready(16) else None
    for k in range(16):
        replay.add(rows[k])
    run(3000)
    start = resident()
    run(12000)
    print(allocated, resident() - start)
""".replace("import tests_path", f"sys.path.insert(0, {str(Path(__file__).parent)!r})")
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    allocated, grown = map(int, output.split())
    assert allocated < 16 << 20
    assert grown < 4 << 20
