"""Environments as users write them; importing this module registers them with gymnasium.

`tests.gym_envs:Count-v0` and the others are tasks of the suite gym.
"""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Count(gymnasium.Env):
    """Every pixel is the episode's age, the reward is the age plus action / 100; ends at age `length`, if given."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 (gymnasium's own way)

    def __init__(
        self,
        observation: spaces.Space | None = None,
        action: spaces.Space | None = None,
        length: int | None = 5,
        render_mode: str | None = None,
    ) -> None:
        self.observation_space = observation or spaces.Box(0, 255, (16, 16, 3), np.uint8)
        # Not `or`, which would ask a space for its length, or warn.
        self.action_space = spaces.Discrete(3) if action is None else action
        self.length, self.render_mode, self.age = length, render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.age = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.age += 1
        reward = self.age + float(np.asarray(action).flat[0]) / 100
        return self.observe(), reward, self.age == self.length, False, {}

    def observe(self, space: spaces.Space | None = None) -> Any:
        space = space or self.observation_space
        if isinstance(space, spaces.Dict):
            return {key: self.observe(part) for key, part in space.items()}
        if isinstance(space, Sentence | spaces.Sequence):
            return ()
        return self.age if isinstance(space, spaces.Discrete) else np.full(space.shape, self.age, space.dtype)

    def render(self) -> np.ndarray:
        return np.full((40, 60, 3), 10 * self.age, np.uint8)


class Pictured(Count):
    """Observes `picture(16, 16, C)`, channels first if `first`, scaled to 0 to `white`."""

    def __init__(self, observation: spaces.Box, *, first: bool = False, white: float = 255) -> None:
        super().__init__(observation)
        self.first, self.white = first, white

    def observe(self, space: spaces.Space | None = None) -> np.ndarray:
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        image = picture(16, 16, shape[0] if self.first else shape[2])
        return (np.moveaxis(image, -1, 0) if self.first else image).astype(dtype) * dtype.type(
            self.white / 255
        )


class Sentence(spaces.Space):
    """A kind of space of somebody's own, like minigrid's missions: it does not say whether it has a fixed length."""

    def contains(self, x: Any) -> bool:
        return True


class Many(gymnasium.vector.VectorEnv):
    """A vector environment."""


class Broken(Count):
    """At age 3 it raises, dies or waits, depending on the action (0, 1, 2)."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.age == 2:
            if action == 0:
                raise ZeroDivisionError("at the third step")
            if action == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)
        return super().step(action)


class Hangs(Count):
    """Never returns from its constructor, its step at age 2, or `close`, as `where` says."""

    def __init__(self, where: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.where = where
        self.hang("init")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.age == 2:
            self.hang("step")
        return super().step(action)

    def close(self) -> None:
        self.hang("close")

    def hang(self, where: str) -> None:
        if where == self.where:
            sys.stderr.write(f"hangs in {where}\n")
            sys.stderr.flush()
        while where == self.where:
            pass


class Blind(Count):
    """Needs a package to render."""

    def render(self) -> np.ndarray:
        raise gymnasium.error.DependencyNotInstalled('no brush, run `pip install "brush"`')


class Undrawable(Count):
    """Declares that it can be rendered, but cannot."""

    def render(self) -> np.ndarray:
        raise NotImplementedError


class Masked(Count):
    """Observes how many signals are blocked."""

    def observe(self, space: spaces.Space | None = None) -> Any:
        return np.full(1, len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), np.float32)


class Growing(Count):
    """Its rendered images grow."""

    def render(self) -> np.ndarray:
        return np.full((40 + self.age, 60, 3), 10 * self.age, np.uint8)


class Wrong(Count):
    """Does something wrong at age 2, or when it is made or closed; `how` says what."""

    def __init__(self, how: str, **settings: Any) -> None:
        arm = {"arm": box(2, high=9)} if how in ("nan", "long") else {}
        arm |= {"arm": spaces.Discrete(3, start=-1)} if how == "count" else {}
        super().__init__(spaces.Dict({"image": pixels(8, 8, 3), **arm}), **settings)
        self.how = how
        if how == "init":
            raise ValueError("no such map")
        if how == "apart" and multiprocessing.parent_process():
            raise OSError("the port is in use")
        if how == "needs":
            import no_such_package_at_all  # noqa: F401

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, *rest = super().step(action)
        if self.age == 2:
            match self.how:
                case "nan":
                    obs["arm"][1] = np.nan
                case "long":
                    obs["arm"] = np.zeros(3, np.float32)
                case "count":
                    obs["arm"] = np.int64(-2)
                case "float":
                    obs["image"] = np.zeros((8, 8, 3))
                case "short":
                    obs["image"] = obs["image"][:4]
                case "reward":
                    reward = float("nan")
                case "odd":
                    warnings.warn("the joints\nare odd", stacklevel=2)
                    raise RuntimeError("very odd")
                case "none":
                    reward = None
                case "exit":
                    raise SystemExit(3)
        return obs, reward, *rest

    def close(self) -> None:
        if self.how == "close":
            raise RuntimeError("still in use")


class Solved(Count):
    """Tells success in `info` in the way `tell`; every second episode succeeds, in its row of age 2."""

    def __init__(self, tell: str = "success", **settings: Any) -> None:
        super().__init__(**settings)
        self.tell, self.episode, self.solved = tell, 0, False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.solved = self.episode + 1, False
        return super().reset(seed=seed)[0], {"success": True}  # belongs to no episode

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        *row, info = super().step(action)
        now = self.age == 2 and self.episode % 2 == 0
        self.solved |= now
        if self.tell == "success":
            info = {"success": np.float64(now / 2), "is_success": True}
        elif self.tell == "at the end":
            info = {"is_success": self.solved if row[2] else self.age == 1}  # of which only the end counts
        elif self.tell == "when it does" and now:
            info = {"success": np.array([True])}
        elif self.tell == "in its own way":
            info = {"success": "maybe", "ragged": np.zeros(self.age)}
        return *row, info


def clipped(action: spaces.Box, outside: Any = gymnasium.wrappers.RecordEpisodeStatistics) -> gymnasium.Env:
    """Wrapped as in CleanRL: actions are clipped, and the wrappers outside have no action space of their own."""
    return outside(gymnasium.wrappers.ClipAction(Count(action=action)))


def doubled(env: gymnasium.Env) -> gymnasium.Env:
    """Doubles actions, which remain unbounded."""
    return gymnasium.wrappers.TransformAction(env, lambda action: 2 * action, None)


class Skip(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Takes two steps of the environment in one."""

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        super().step(action)
        return super().step(action)


def limited() -> gymnasium.Env:
    """Has a time limit that was not registered."""
    return gymnasium.wrappers.TimeLimit(Count(length=None), 4)


class Seeded(Count):
    """The reward of every step is drawn at random."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, float(self.np_random.integers(1000)), *rest


def box(*shape: int, dtype: Any = np.float32, low: float = -1, high: float = 1) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


def pixels(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def picture(*shape: int) -> np.ndarray:
    """Bytes that count up, in this shape."""
    return (np.arange(np.prod(shape)) % 256).astype(np.uint8).reshape(shape)


def unit(*shape: int, high: float = 1, dtype: Any = np.float32) -> spaces.Box:
    return box(*shape, low=0, high=high, dtype=dtype)


PICTURES = {  # how `Pictured` shows its picture
    "Planes": {"observation": pixels(3, 16, 16), "first": True},
    "Plane": {"observation": pixels(1, 16, 16), "first": True},
    "Unit": {"observation": unit(16, 16, 3), "white": 1},
    "UnitPlane": {"observation": unit(1, 16, 16, dtype=np.float64), "first": True, "white": 1},
    "Float": {"observation": unit(16, 16, 1, high=255)},
    "FloatPlanes": {"observation": unit(3, 16, 16, high=255, dtype=np.float64), "first": True},
    "Bright": {"observation": unit(16, 16, 3), "white": 255},
    "Nan": {"observation": unit(16, 16, 3, high=255), "white": np.nan},
}

GOALS = spaces.Dict(
    {"image": pixels(30, 24, 3), "depth": pixels(64, 64, 1), "arm": box(2, 2), "goal": spaces.Discrete(7)}
)

NAMES = {  # name of the environment -> name of the vector that it observes beside "image"
    **{
        f"Named{i}": name
        for i, name in enumerate(("keys", "training", "type", "to", "t 1-a_b", "a/b", "a.b"))
    },
    **{f"Misnamed{i}": name for i, name in enumerate(("", "../../x", "new\nline", 7))},
    **{f"Lost{name.title()}": name for name in ("dyn", "rep", "cont")},
}

WRONG = (
    "init",
    "apart",
    "needs",
    "nan",
    "long",
    "count",
    "float",
    "short",
    "reward",
    "none",
    "odd",
    "exit",
    "close",
)

for name, kind, settings in (
    ("Count", Count, {}),
    ("Broken", Broken, {}),
    ("Seeded", Seeded, {}),
    *((f"Hangs{where.title()}", Hangs, {"where": where}) for where in ("init", "step", "close")),
    *((f"Wrong{how.title()}", Wrong, {"how": how}) for how in WRONG),
    ("Solved", Solved, {}),
    ("SolvedAtTheEnd", Solved, {"tell": "at the end"}),
    ("SolvedNow", Solved, {"tell": "when it does"}),
    ("SolvedItsWay", Solved, {"tell": "in its own way"}),
    ("Tall", Count, {"observation": pixels(90, 40, 3)}),
    ("Grey", Count, {"observation": pixels(16, 16)}),
    ("Goals", Count, {"observation": GOALS}),
    ("Blind", Blind, {"observation": box(3, high=9)}),
    ("Undrawable", Undrawable, {"observation": box(3, high=9)}),
    ("Masked", Masked, {"observation": box(1, high=99)}),
    ("Growing", Growing, {"observation": box(3, high=9)}),
    ("Drawn", Count, {"observation": box(3, high=9)}),
    ("Undrawn", Count, {"observation": box(3, high=9)}),
    ("UndrawnFrames", Count, {"observation": box(4, 8, 8, 3, high=9)}),
    ("Stacked", Count, {"observation": pixels(4, 84, 84)}),
    ("Float", Count, {"observation": box(8, 8, 3)}),
    (
        "List",
        Count,
        {"observation": spaces.Dict({"image": pixels(8, 8, 3), "list": spaces.Sequence(box(2))})},
    ),
    (
        "Sentence",
        Count,
        {"observation": spaces.Dict({"image": pixels(8, 8, 3), "task": Sentence(), "way": box(2, high=9)})},
    ),
    ("SentenceAlone", Count, {"observation": spaces.Dict({"task": Sentence()})}),
    ("Cells", Count, {"observation": pixels(7, 7, 3)}),
    ("StackedLast", Count, {"observation": pixels(84, 84, 12)}),
    ("StackedBeside", Count, {"observation": spaces.Dict({"eyes": pixels(4, 84, 84), "arm": box(2)})}),
    ("Empty", Count, {"observation": box(0)}),
    ("EmptyPart", Count, {"observation": spaces.Dict({"arm": box(2), "hand": box(2, 0)})}),
    ("EmptyWithin", Count, {"observation": spaces.Dict({"hand": spaces.Dict({"tip": box(0)})})}),
    ("EmptyImage", Count, {"observation": pixels(0, 8, 3)}),
    ("Taken", Count, {"observation": spaces.Dict({"reward": pixels(8, 8, 3)})}),
    ("TakenStarts", Count, {"observation": spaces.Dict({"starts": box(2), "hand": box(3)})}),
    *(
        (name, Count, {"observation": spaces.Dict({"image": pixels(8, 8, 3), key: box(2, high=9)})})
        for name, key in NAMES.items()
    ),
    ("LostImage", Count, {"observation": spaces.Dict({"camera": pixels(8, 8, 3), "image": box(2)})}),
    ("ClimbingImage", Count, {"observation": spaces.Dict({"../../x": pixels(8, 8, 3)})}),
    ("Frames", Count, {"observation": box(4, 8, 8, 3, high=9)}),
    ("Planar", Count, {"observation": pixels(3, 84, 84)}),
    *((f"Picture{name}", Pictured, settings) for name, settings in PICTURES.items()),
    ("Unsure", Count, {"observation": box(8, 8, 3, low=0, high=2)}),
    ("Twice", Count, {"observation": spaces.Dict({"a/b": box(2), "a-b": box(2)})}),
    ("Many", Many, {}),
    ("Still", Count, {"action": box(2, low=0, high=0)}),
    ("Bodiless", Count, {"action": box(0)}),
    ("HalfStill", Count, {"action": spaces.Box(np.float32([0, -1]), np.float32([0, 1]))}),
    ("Arm", Count, {"action": spaces.Box(np.float32([[-2, 0]]), np.float32([[2, 10]]))}),
    ("From5", Count, {"action": spaces.Discrete(3, start=5)}),
    ("From9", Count, {"action": spaces.Discrete(4, start=9)}),
    ("Multi", Count, {"action": spaces.MultiDiscrete([2, 3], start=[4, -1])}),
    ("MultiTable", Count, {"action": spaces.MultiDiscrete([[2, 1], [2, 2]])}),
    ("Switches", Count, {"action": spaces.MultiBinary(3)}),
    ("MultiMost", Count, {"action": spaces.MultiDiscrete([32, 32])}),
    ("MultiMany", Count, {"action": spaces.MultiDiscrete([[5, 5], [41, 1]])}),
    ("ManySwitches", Count, {"action": spaces.MultiBinary(11)}),
    ("Words", Count, {"action": spaces.Text(5)}),
    ("Whole", Count, {"action": box(2, dtype=np.int32)}),
    ("Unbounded", Count, {"action": box(2, low=-np.inf, high=np.inf)}),
    ("Clipped", clipped, {"action": spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))}),
    ("ClippedTwice", clipped, {"action": box(2, low=-3, high=3), "outside": gymnasium.wrappers.ClipAction}),
    ("ClippedHalf", clipped, {"action": box(2, low=0, high=np.inf)}),
    ("ClippedDoubled", clipped, {"action": box(2), "outside": doubled}),
):
    gymnasium.register(f"{name}-v0", kind, kwargs=settings, max_episode_steps=1000)
gymnasium.register("Limited-v0", Count, max_episode_steps=3)
gymnasium.register("Endless-v0", Count, kwargs={"length": None})
gymnasium.register("ManyAlone-v0", vector_entry_point=Many)
gymnasium.register("LimitedInside-v0", limited)
gymnasium.register(
    "Skipping-v0",
    Count,
    kwargs={"length": None},
    max_episode_steps=6,
    additional_wrappers=(Skip.wrapper_spec(),),
)
for _name in ("Undrawn", "UndrawnFrames"):
    gymnasium.registry[f"{_name}-v0"].entry_point = type(_name, (Count,), {"metadata": {"render_modes": []}})
