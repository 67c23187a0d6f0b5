"""--init-from: a new run begins with the parameters of another run."""

from pathlib import Path

from hdfast.agent.learner import Learner
from hdfast.config import Config
from hdfast.runtime import checkpoint
from hdfast.runtime.rundir import chosen, difference, filled, read

_SIZES = ("rssm", "network")  # sections of the config that set the shapes of parameters


def checkpoint_for(config: Config) -> checkpoint.Checkpoint | None:
    """What a new run begins with; None if with parameters of its own. Raises: as `rundir.chosen`."""
    return None if config.init_from is None else chosen(config.init_from)


def load_parameters(learner: Learner, start: checkpoint.Checkpoint, config: Config) -> None:
    """Gives the learner the parameters of `start`. Raises: CheckpointError if the models differ in size."""
    with checkpoint.fitting(start.path, _other_sizes(start.run, config)):
        learner.load_parameters(start.part("learner."))


def _other_sizes(run: Path, config: Config) -> list[str]:
    """Where the model of another run has other sizes, as lines of `difference`; none for a checkpoint without a run."""
    if not (run / "config.json").exists():
        return []
    theirs = filled(read(run).config, Config().to_dict())
    before, after = ({name: side[name] for name in _SIZES} for side in (theirs, config.to_dict()))
    return difference(before, after, ignore=("rssm.unimix",))
