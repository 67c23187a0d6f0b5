"""What an environment of one's own raises, as one line."""

import contextlib
import importlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import gymnasium

from hdfast.runtime.errors import EnvError, HdfastError, MissingLibraryError

# Modules that environments import -> the distribution that has them, where that has another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "mujoco_py": "mujoco-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@contextlib.contextmanager
def env_errors(name: str) -> Iterator[None]:
    """Turns what environment `name` raises in the block into one line, with its own frames as details.

    Raises: EnvError; MissingLibraryError where it imports a missing package. An HdfastError, which is one line already,
    passes.
    """
    try:
        yield
    except HdfastError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingLibraryError(str(error), where=name) from error
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            if package not in sys.modules:  # else a part of it, perhaps the user's own, is misnamed
                hint = f"pip install {_DISTRIBUTIONS.get(package, package)}"
                raise MissingLibraryError(f"{name} needs {error.name}", hint=hint) from error
        raise raised(error, name) from error


def raised(
    error: BaseException, name: str, hint: str = "", *, kind: type[HdfastError] = EnvError
) -> HdfastError:
    """One line about what environment `name` raised."""
    ours = (
        *(Path(module.__path__[0]) for module in (gymnasium, importlib)),
        Path(__file__).parents[1],
    )
    frames = [
        f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")
        and not any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]
    what = ": ".join(filter(None, (type(error).__name__, str(error).strip())))
    return kind(f"it raised {what}", where=name, hint=hint, details=frames)
