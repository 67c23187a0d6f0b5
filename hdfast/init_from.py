"""--init-from: a new run begins with the parameters of another run."""

from pathlib import Path

from hdfast.agent.learner import Learner
from hdfast.config import Config, with_defaults
from hdfast.runtime import checkpoint
from hdfast.runtime.errors import RunError, warn
from hdfast.runtime.record import chosen, difference, read

# What sets the shapes of parameters.
_SIZES = ("learner", "rssm", "network", "env.obs", "env.image_size", "suite", "task")
_HINT = "--init-from needs a run with the same observations, actions and sizes"


def checkpoint_for(config: Config) -> checkpoint.Checkpoint | None:
    """What a new run begins with; None if with parameters of its own. Raises: as `record.chosen`."""
    return None if config.init_from is None else chosen(config.init_from)


def load_parameters(learner: Learner, start: checkpoint.Checkpoint, config: Config) -> None:
    """Gives the learner the parameters of `start`; warns of modules that only a learner of one's own has.

    Raises: CheckpointError if the models differ in size.
    """
    with checkpoint.fitting(start.path, _otherwise(start.run, config), hint=_HINT):
        alone = learner.load_shared_parameters(start.part("learner."))
    if alone:
        warn(f"{start.path} has no {', '.join(alone)}: the new run begins with values of its own")


def _otherwise(run: Path, config: Config) -> list[str]:
    """Where another run may have another model, as lines of `difference`; none for a checkpoint without a run."""
    try:
        theirs = with_defaults(read(run).config)
    except RunError:  # none, or that of something else: the checkpoint may have been copied there
        return []
    lines = difference(theirs, config.to_dict(), ignore=("rssm.unimix",))
    return [
        line for line in lines if line.startswith(tuple(f"{name}{end}" for name in _SIZES for end in ".:"))
    ]
