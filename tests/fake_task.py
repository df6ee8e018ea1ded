"""A bake-off that takes no time: methods are named by what happens to them."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from echelon.compare.task import Outcome, Quality


class FakeTask:
    kind = ""
    unit = "item"
    cost_axis = "seconds_per_item"
    primary = "score"
    reference = ""

    def command(self, recipe, method, knobs):
        return ["fake", method]

    def check(self, recipe):
        pass

    def sources(self, recipe):
        return []

    def prepare(self, recipe):
        return recipe.data

    def describe(self, context):
        return "no model, 40 items"

    def run(self, context, entry, seed):
        if context.get("log"):
            with open(context["log"], "a") as file:
                file.write(f"{entry.label} {seed}\n")
        if entry.name == "raises":
            raise RuntimeError("no such thing\nas a second line")
        if entry.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if entry.name == "exits":
            os._exit(3)
        if entry.name == "hangs":
            time.sleep(60)
        if entry.name == "fails_once" and not Path(context["flag"]).exists():
            Path(context["flag"]).touch()
            raise ValueError("not today")
        time.sleep(context.get("seconds", 0))
        values = np.random.default_rng([seed, len(entry.name)]).normal(entry.knobs.get("mean", 0.0), 1, 40)
        if entry.name == "nan":
            values[7] = np.nan
        samples = [{"unit": str(i), "prompt": f"prompt {i}", "reference": "human", "text": f"{entry.label} {v:.3f}"} for i, v in enumerate(values)]
        return Outcome(
            {"score": Quality(float(np.nanmean(values)), "points", True, values), "loss": Quality(1.0, "nats", False)},
            {"seconds_per_item": 0.01}, {"unit": "items", "allowed": 40, "used": 40}, samples,
        )  # fmt: skip

    def timing(self, context, entry):
        return 0.001 * (1 + entry.knobs.get("mean", 0.0))
