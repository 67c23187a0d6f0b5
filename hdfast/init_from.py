"""--init-from: a new run begins with the parameters of another run."""

from pathlib import Path

from hdfast.agent.learner import Learner
from hdfast.config import Config
from hdfast.runtime import checkpoint
from hdfast.runtime.rundir import difference, filled, newest, read

_SIZES = ("rssm", "network")  # sections of the config that set the shapes of parameters


def checkpoint_for(config: Config) -> checkpoint.Checkpoint | None:
    """The newest checkpoint of the run that a new run begins with; None if it begins with its own parameters.

    Raises: as `rundir.newest`.
    """
    return None if config.init_from is None else newest(Path(config.init_from).expanduser())


def load_parameters(learner: Learner, start: checkpoint.Checkpoint, config: Config) -> None:
    """Gives the learner the parameters of `start`. Raises: CheckpointError if the models differ in size."""
    with checkpoint.fitting(start.path, _other_sizes(config)):
        learner.load_parameters(start.part("learner."))


def _other_sizes(config: Config) -> list[str]:
    """Where the other run's model has other sizes than this one's, as lines of `difference`."""
    theirs = filled(read(Path(config.init_from).expanduser()).config, Config().to_dict())
    sides = ({name: side[name] for name in _SIZES} for side in (theirs, config.to_dict()))
    return difference(*sides, ignore=("rssm.unimix",))
