"""How often a run is saved, and how far back it can begin again."""

from types import SimpleNamespace

from hdfast import session
from hdfast.replay import log
from tests.loop_cases import (
    one_thread,  # noqa: F401
    path_of,
    saved,
    script,
    tiny,
    train,
)


def test_a_run_is_saved_whenever_so_many_seconds_have_passed_since_the_last_time(tmp_path, monkeypatch):
    """The clock moves by a second with every step of the environments."""
    made, found, save = script(monkeypatch), [], session.Session._save
    clock = SimpleNamespace(monotonic=lambda: float(sum(len(env.sent) for env in made["train"])))

    def spied(self):
        found.append(self.agent_steps)
        save(self)

    monkeypatch.setattr(session, "time", clock)
    monkeypatch.setattr(session.Session, "_save", spied)
    train(tiny(tmp_path, train={"ratio": 0.0}, checkpoint={"seconds": 7}))
    assert found == [14, 28, 40, 40]  # the last before and after the evaluation


def test_a_run_goes_on_from_any_checkpoint_that_it_was_told_to_keep(tmp_path, monkeypatch):
    """Replay still has on disk what the oldest of them needs, though the ring has gone round since."""
    script(monkeypatch)
    monkeypatch.setattr(log, "CHUNK_BYTES", 1)  # a file for every save, so that any can be deleted
    settings = {"replay": {"capacity": 16}, "train": {"ratio": 0.0}}
    config = tiny(tmp_path, **settings, checkpoint={"seconds": 0, "keep": 8})
    train(config)
    oldest, *newer = sorted((path_of(config) / "checkpoints").iterdir())
    assert len(newer) == 7
    (path_of(config) / "finished.json").unlink()
    for path in newer:
        path.unlink()
    assert saved(config).meta["agent_steps"] == int(oldest.stem) == 26
    train(config)
    assert saved(config).meta["agent_steps"] == 40
