"""One rank of a test: ``python rank_worker.py JOBS.json``, with torchrun's variables in the environment.

Each job is ``[kind, arguments]``; all are done by the ranks together, one after the other.
"""

import json
import sys
from pathlib import Path

from falcon_unlearn import pipeline, suite_scores
from falcon_unlearn.attack import attack, attack_request
from falcon_unlearn.evaluate import evaluate, evaluation_request
from falcon_unlearn.pipeline import run_recipe, select_layers_of
from falcon_unlearn.ranks import ALONE, started_together
from falcon_unlearn.recipe import recipe_from


def do(kind, arguments, ranks=ALONE):
    if kind in {"run", "train"}:
        if kind == "train":  # the patch and the log are enough
            pipeline.write_report = pipeline.write_card = lambda *_, **__: None
        run_recipe(recipe_from(arguments), ranks=ranks)
    elif kind == "layers":
        select_layers_of(recipe_from(arguments), ranks=ranks)
    elif kind == "evaluate":
        evaluate(evaluation_request(**arguments), ranks=ranks)
    else:
        attack(attack_request(**arguments), ranks=ranks)


if __name__ == "__main__":
    suite_scores._UNITS_PER_CHUNK = 2
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with started_together({"jobs": jobs}, "cpu") as together:
        for each in jobs:
            do(*each, ranks=together)
