"""What a suite is: its tasks, its environment settings, its default configuration, its published scores.

A suite is plain data, and this module imports no environment. `get("atari100k").task("ms-pacman")` finds a
name in any spelling; a name that does not exist is an UnknownName that lists the nearest.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hdfast.aggregates import Aggregate, aggregate, interval
from hdfast.runtime.errors import ConfigError, suggest


class UnknownName(ConfigError, ValueError):
    """A suite, task or environment setting that does not exist; the message lists the nearest right ones."""


Measure = Literal["human-norm.", "score", "success"]


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    name: what users type.
    env_id: what envpool, or gymnasium, calls it.
    time_limit: agent steps after the reset row at which an episode is cut off; None leaves it to the environment.
    random, human: mean episode scores that stand for 0 and 1 on the human-normalised scale.
    published: for each method the final score of each of its seeds.
    """

    name: str
    env_id: str
    time_limit: int | None
    random: float | None = None
    human: float | None = None
    published: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its directory of runs: the task's, with "-" for what does not belong in a path."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.name)


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    source: which kind of environment it runs on.
    tasks: what the suite trains and reports, in this order; `others` can be asked for by name. If there are none, any
        name that gymnasium could know is a task.
    action_repeat: simulator frames per agent step, so frames = agent_steps * action_repeat.
    defaults: nested fields of `hdfast.config.Config` that differ from its own defaults.
    measure: what aggregates over its tasks are of; None where no number means the same in all of them.
    """

    name: str
    source: Literal["atari", "demo", "dmc", "gym", "metaworld"]
    tasks: tuple[Task, ...]
    action_repeat: int
    defaults: Mapping[str, Any]
    others: tuple[Task, ...] = ()
    measure: Measure | None = None

    def task(self, name: str) -> Task:
        """The task of that name; case, punctuation, a version after it and a family before it do not matter.

        Raises UnknownName, naming the suite that has it or listing the nearest.
        """
        if not self.tasks:
            if not _GYM_ID.fullmatch(name):
                raise UnknownName(f"no task {name!r} in suite {self.name}; {_GYM_NAMES}")
            return Task(name, env_id=name, time_limit=None)
        if (task := self._known().get(_key(name))) is None:
            hint = suggest(_bare(name), (task.name for task in self._known().values()))
            for suite in SUITES.values():
                if _key(name) in suite._known():
                    hint = f"; suite {suite.name} has it"
            if "," in name:
                hint = "; several are trained by python -m hdfast.sweep --tasks"
            raise UnknownName(f"no task {name!r} in suite {self.name}{hint}")
        return task

    def select(self, names: Iterable[str]) -> list[Task]:
        """The tasks of these names, each once; without names, all of the suite's. Raises UnknownName."""
        tasks = list({task.name: task for task in map(self.task, names)}.values()) or list(self.tasks)
        if not tasks:
            raise UnknownName(f"suite {self.name} needs a task; {_GYM_NAMES}")
        return tasks

    def check_env(self, **settings: str) -> None:
        """Raises UnknownName for a value of an environment's setting that this suite does not have."""
        for name, value in settings.items():
            choices = _ENV_CHOICES[self.source][name]
            if value not in choices:
                what = f"--env.{name} cannot be {value!r} in suite {self.name}"
                raise UnknownName(f"{what}{suggest(value, choices)}")

    def _known(self) -> dict[str, Task]:
        return {_key(task.name): task for task in (*self.tasks, *self.others)}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose scores on this suite are published."""
        return tuple(dict.fromkeys(method for task in self.tasks for method in task.published))

    def published(self, method: str) -> dict[str, Sequence[float]]:
        """Task name -> the method's published final scores, one for each seed; tasks without are left out."""
        return {task.name: task.published[method] for task in self.tasks if method in task.published}

    def aggregate(self, results: Mapping[str, Sequence[float]]) -> Aggregate | None:
        """Mean, median and interquartile mean of the suite's measure; None where there is none.

        results: task name -> the score of each of its runs, at least one; for the measure "success" the share of
            episodes solved.
        """
        measured = self._measured(results)
        return aggregate(measured) if measured else None

    def interval(self, results: Mapping[str, Sequence[float]]) -> tuple[Aggregate, Aggregate] | None:
        """The ends of the 95% interval of `aggregate`, see `interval`; None where it cannot be computed.

        That is the case if there is no measure, a task has a single run, or a result is not finite.
        """
        measured = self._measured(results)
        known = all(len(runs) > 1 and np.isfinite(runs).all() for runs in measured)
        return interval(measured) if measured and known else None

    def _measured(self, results: Mapping[str, Sequence[float]]) -> list[list[float]]:
        """What is aggregated of each run, for each task that has it."""
        if self.measure != "human-norm.":
            return [list(runs) for runs in results.values()] if self.measure else []
        tasks = [(self.task(name), runs) for name, runs in results.items()]
        return [
            [human_normalized(task, score) for score in runs]
            for task, runs in tasks
            if task.human is not None
        ]


def human_normalized(task: Task, score: float) -> float:
    """(score - random) / (human - random). Raises ValueError for a task that no human was measured on."""
    if task.random is None or task.human is None:
        raise ValueError(f"{task.name} has no human and random scores")
    return (score - task.random) / (task.human - task.random)


# The values that environments' settings can have, by the source of a suite.
_MUJOCO = {"source": ("auto", "envpool"), "obs": ("image", "state", "both"), "render": ("full", "fast")}
_ENV_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "atari": {"source": ("auto", "envpool", "ale"), "obs": ("image",), "render": ("full",)},
    "demo": {"source": ("auto", "envpool"), "obs": ("image",), "render": ("full",)},
    "dmc": _MUJOCO,
    "gym": {"source": ("auto",), "obs": ("auto", "image", "state", "both"), "render": ("full",)},
    "metaworld": _MUJOCO,
}
_GYM_ID = re.compile(r"(?:[A-Za-z_][\w.]*:)?(?:[A-Za-z0-9][\w:-]*/)?[A-Za-z0-9][\w.-]*")
_GYM_NAMES = "a task is what gymnasium.make takes, such as 'CarRacing-v3' or 'my_envs:Maze-v0'"


def get(name: str) -> Suite:
    """The suite of that name, in any case and punctuation. Raises UnknownName, listing the nearest."""
    if (suite := SUITES.get(_squash(name))) is None:
        raise UnknownName(f"no suite {name!r}{suggest(name, SUITES)}")
    return suite


def _bare(name: str) -> str:
    """`ALE/Pong-v5`, `atari_Pong` -> `Pong`."""
    return re.sub(r"^(ale|atari|dmc|meta-?world)[/_:-]|-v\d+$", "", name.strip(), flags=re.IGNORECASE)


def _squash(name: str) -> str:
    """Lower-case letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _key(name: str) -> str:
    return _squash(_bare(name))


def _tasks(names: Iterable[str], env_id: str, time_limit: int) -> tuple[Task, ...]:
    """Tasks whose envpool names are their own in CamelCase, put into `env_id`."""
    camel = {name: "".join(part[:1].upper() + part[1:] for part in re.split("[_-]", name)) for name in names}
    return tuple(Task(name, env_id.format(camel[name]), time_limit) for name in camel)


# Game, random, human | the final evaluations of HarmonyDream's five seeds | and of DreamerV3's, as the
# authors of HarmonyDream ran it (thuml/HarmonyDream, dreamerv3-jax/scores: at 400k frames, one decimal).
_ATARI = """
Alien            227.8  7127.7 |   879.1   981.6   683.7  894.9    1009 |  924.3  666.9   876.7  630.6   830.2
Amidar             5.8  1719.5 |   148.9   111.7   145.9  131.1   167.7 |  201.4  195.1   158.5  156.9   165.3
Assault          222.4     742 |   802.2  1541.3   684.2 1053.6   932.2 |  646.1  722.9     762  611.9   656.5
Asterix            210  8503.3 |   960.5  1262.5  1290.5  914.5  1273.5 |    958  849.5    1112  965.5   984.5
BankHeist         14.2   753.1 |   870.6  1139.9  1098.8 1101.1  1132.6 |  778.2 1038.6   693.6  879.7  1077.6
BattleZone        2360 37187.5 |   17280   14620   17580  15860   16940 |  10700  13440   10290  11960   10180
Boxing             0.1    12.1 |    74.8    80.6    83.3   74.8    84.6 |   89.6   74.2    89.8   63.2    74.8
Breakout           1.7    30.5 |    28.6    29.3    34.9  103.3    66.8 |   17.1   19.1    32.1   35.1    16.3
ChopperCommand     811  7387.8 |    1276    1156    1303    994    2819 |   1419   1435    1669   1394    1034
CrazyClimber   10780.5 35829.4 |   89392   80783   88308  77642   77570 |  79794  85517   79401  74196   75935
DemonAttack      152.1    1971 |   252.8   168.2   221.4  178.5   192.1 |  288.9  222.4   283.5  219.4   193.2
Freeway              0    29.6 |       0       0       0      0       0 |      0      0       0      0       0
Frostbite         65.2  4334.7 |   267.8  2165.7   275.6  417.6     267 | 1974.9 1839.7   263.2  274.2   341.3
Gopher           257.6  2412.5 | 13912.4 33436.2  4280.2  869.8 12715.6 | 2822.6  12667  4398.8 1175.2    3617
Hero              1027 30826.4 | 13394.5 13241.5 13461.9  13351 13440.9 |  13315  13358 13427.6 7541.8 13257.8
Jamesbond           29   302.8 |     175   269.2   572.5  331.5     237 |  287.5    281   641.5    208   172.5
Kangaroo            52    3035 |    2967    1658    5814  11798    3351 |   1120   1352     600   1464    9330
Krull             1598  2665.5 |  7914.9  8318.8  7668.9 8564.9  6300.7 |   7665 8788.5  5936.2 7380.1    8357
KungFuMaster     258.5 22736.3 |   21328   17481   20510  27623   24428 |  18343  18495   36218  25276   20435
MsPacman         307.3  6951.6 |    1879  2142.9  1315.4   1657    1409 | 1575.9 2138.5  1226.3 1610.5  1891.6
Pong             -20.7    14.6 |    19.1    19.8    19.6   17.2    17.5 |   11.4   19.6    14.3   15.1      20
PrivateEye        24.9 69571.3 |     100    5002  4079.8  393.7  5085.5 |   -200 4864.3     100  317.9     100
Qbert            163.9   13455 |  4262.5  4294.8  3619.5   3480  4005.8 | 4002.2 2612.8  2156.2   4281  1308.8
RoadRunner        11.5    7845 |   17786   17591    9439  18122   10294 |  13939  18772    9863  17085   11583
Seaquest          68.4 42054.7 |   782.4   735.4   680.2    592   536.4 |  415.6  563.6   593.6  539.8     608
UpNDown          533.4 11693.2 |  5061.5 31289.2  7615.2 4718.5  5683.7 | 5216.7 2762.7  5494.8 4655.2 10051.2
"""


def _atari_rows() -> Iterator[tuple[str, float, float, tuple[float, ...], tuple[float, ...]]]:
    for line in _ATARI.strip().splitlines():
        scale, *methods = line.split("|")
        game, random, human = scale.split()
        harmony, dreamer = (tuple(map(float, seeds.split())) for seeds in methods)
        yield game, float(random), float(human), harmony, dreamer


# DreamerV3's twenty tasks of DMC vision; the others of the DeepMind Control Suite can be asked for by name.
_DMC = """
    acrobot_swingup ball_in_cup_catch cartpole_balance cartpole_balance_sparse cartpole_swingup
    cartpole_swingup_sparse cheetah_run finger_spin finger_turn_easy finger_turn_hard hopper_hop
    hopper_stand pendulum_swingup quadruped_run quadruped_walk reacher_easy reacher_hard walker_run
    walker_stand walker_walk
"""
_DMC_OTHERS = """
    acrobot_swingup_sparse cartpole_three_poles cartpole_two_poles dog_fetch dog_run dog_stand dog_trot
    dog_walk fish_swim fish_upright humanoid_run humanoid_run_pure_state humanoid_stand humanoid_walk
    humanoid_CMU_run humanoid_CMU_stand humanoid_CMU_walk manipulator_bring_ball
    manipulator_bring_peg manipulator_insert_ball manipulator_insert_peg point_mass_easy point_mass_hard
    quadruped_escape quadruped_fetch stacker_stack_2 stacker_stack_4 swimmer_swimmer6 swimmer_swimmer15
"""
_METAWORLD = """
    assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock
    door-open door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press
    handle-press-side handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side
    pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-back plate-slide-back-side
    plate-slide-side push push-back push-wall reach reach-wall shelf-place soccer stick-pull stick-push
    sweep sweep-into window-close window-open
"""

# The settings of DeepMind Control, also used where there is no benchmark to follow.
_DMC_DEFAULTS: dict[str, Any] = {
    "size": "small",
    "agent_steps": 500_000,
    "env": {"num_envs": 4},
    "replay": {"batch": 16, "length": 64},
    "train": {"ratio": 512},
    "eval": {"every": 10_000, "episodes": 10},
}

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="atari100k",
            source="atari",
            tasks=tuple(
                Task(
                    name=game,
                    env_id=f"{game}-v5",
                    # 108,000 frames; the authors give ChopperCommand 5,400: the agent gets stuck there.
                    time_limit=1_350 if game == "ChopperCommand" else 27_000,
                    random=random,
                    human=human,
                    published={"HarmonyDream": harmony, "DreamerV3, rerun": dreamer},
                )
                for game, random, human, harmony, dreamer in _atari_rows()
            ),
            action_repeat=4,
            measure="human-norm.",
            defaults={
                "size": "small",
                "agent_steps": 100_000,
                "env": {"num_envs": 1},
                "replay": {"batch": 16, "length": 64},
                "train": {"ratio": 1024},
                "eval": {"every": 5_000, "episodes": 100},
            },
        ),
        Suite(
            name="demo",
            source="demo",
            tasks=(Task("Catch", "Catch-v0", time_limit=9),),
            others=(Task("Track", "Track", time_limit=32), Task("TrackGrey", "TrackGrey", time_limit=32)),
            action_repeat=1,
            defaults={
                "size": "tiny",
                "agent_steps": 10_000,
                "env": {"num_envs": 8},
                "replay": {"capacity": 100_000, "batch": 16, "length": 16},
                "train": {"ratio": 64, "prefill": 512},
                # An episode is ten rows, and there are minutes to learn in: a short horizon, large steps.
                "behavior": {"horizon": 10, "entropy": 0.01},
                "optimizer": {"model_lr": 3e-3, "actor_lr": 5e-4, "critic_lr": 1e-3},
                "eval": {"every": 2_000, "episodes": 100, "num_envs": 20},
                "log": {"every": 400, "video_every": 4_000},
            },
        ),
        Suite(
            name="dmc",
            source="dmc",
            tasks=_tasks(_DMC.split(), "{}-v1", time_limit=500),
            others=_tasks(_DMC_OTHERS.split(), "{}-v1", time_limit=500),
            action_repeat=2,
            measure="score",
            defaults=_DMC_DEFAULTS,
        ),
        Suite(
            name="gym",
            source="gym",
            tasks=(),
            action_repeat=1,
            defaults={**_DMC_DEFAULTS, "env": {**_DMC_DEFAULTS["env"], "obs": "auto"}},
        ),
        Suite(
            name="metaworld",
            source="metaworld",
            tasks=_tasks(_METAWORLD.split(), "MetaWorld/{}-v3", time_limit=500),
            action_repeat=1,
            measure="success",
            defaults={
                "size": "medium",
                "agent_steps": 255_000,
                "env": {"num_envs": 5},
                "replay": {"batch": 50, "length": 50},
                "train": {"ratio": 500, "prefill": 5_000},
                "loss": {"cont_gradient": False},  # `grad_heads` of the authors' configs.yaml
                "eval": {"every": 10_000, "episodes": 10},
            },
        ),
    )
}
