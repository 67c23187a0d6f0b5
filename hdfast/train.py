"""`python -m hdfast.train --suite atari100k`: trains every task of a suite in turn and prints the suite's table."""

import dataclasses
import sys

from hdfast import report, results, suites
from hdfast.config import parse
from hdfast.dry_run import describe
from hdfast.loop import run
from hdfast.runtime import entry, errors


def main() -> None:
    config = parse()
    suite, tasks = suites.get(config.suite), config.tasks
    if config.prefill_agent_steps >= config.total_agent_steps:
        steps = f"ends before learning begins, at agent step {config.prefill_agent_steps:,}"
        errors.warn(f"--agent-steps {config.agent_steps} {steps}")
    elif config.train.ratio and config.updates == 0:
        each = f"is an update every {1 / config.updates_per_step:,.0f} agent steps"
        errors.warn(f"--train.ratio {config.train.ratio:g} {each}: the run ends before the first")
    if config.dry_run:
        sys.stdout.write(describe(config) + "\n")
        return
    for seed in range(config.seed, config.seed + config.seeds):
        for task in tasks:
            run(dataclasses.replace(config, task=task.name, seed=seed, seeds=1))
    report.show(suite, results.collect(config.logdir, suite, tasks))


if __name__ == "__main__":
    entry.main(main)
