"""Results of a comparison that never ran, with known differences."""

import numpy as np

from echelon.compare.recipe import MethodEntry, Recipe
from echelon.compare.statistics import summarise

TEXT = {"prompt": "It was <b>late</b> & dark.", "reference": " Nobody came."}


def rigged(columns, *, seeds=1, higher=True, failed=(), units=60, costs=None, equivalence=0.01, draws=2000, single=()):
    """A summary of methods whose per-unit values are given: label -> (seeds, units) array."""
    labels = [*columns, *failed]
    recipe = Recipe("generate", [MethodEntry(label, {}, label) for label in labels], metrics=["score"], seeds=list(range(seeds)),
                    baseline=labels[0], equivalence=equivalence, budget={"max_new_tokens": 64})  # fmt: skip
    results, arrays = [], {}
    for label in labels:
        for seed in range(seeds):
            key = f"{label}-{seed}"
            values = np.atleast_2d(columns[label])[seed] if label in columns else np.zeros(units)
            arrays[key] = values
            ok = label in columns
            results.append({
                "schema": 1,
                "run": {"key": key, "label": label, "method": label, "knobs": {}, "seed": seed, "status": "finished" if ok else "failed",
                        "error": None if ok else "ran <out> of memory", "task": "generate"},
                "quality": {"score": {"value": float(values.mean()), "unit": "points", "higher_is_better": higher, "n": len(values), "note": "made up"},
                            "mauve": {"value": 0.5, "unit": "MAUVE", "higher_is_better": True, "n": 1, "note": "one number"}} if ok else {},
                "cost": {"seconds_per_prompt": (costs or {}).get(label, 1.0), "scorer_calls_per_prompt": 0.0, "wall_s": 2.0} if ok else {},
                "budget": {"unit": "new tokens per prompt", "allowed": 64, "used": 60} if ok else {}, "curves": {},
                "identity": {"scale": "7.3 M parameters, 60 prompts", "packages": {"torch": "2.13.0"}, "cpu": "a processor"},
            })  # fmt: skip
    summary = summarise(results, lambda result, metric: arrays[result["run"]["key"]] if metric == "score" else None, recipe, draws=draws)
    summary.unit, summary.cost_axis = "prompt", "seconds_per_prompt"
    for i in range(3):
        texts = {label: f" <script>alert({i})</script> by {label}." for label in columns}
        summary.texts[f"unit {i}"] = {**TEXT, "texts": texts}
    return summary
