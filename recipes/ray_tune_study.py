"""A recipe's trials inside a Tuner: `python recipes/ray_tune_study.py RECIPE [key.path=value …]`."""

import sys

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from orchestrator.launch.ray_tune import Searcher, trainable
from orchestrator.recipe import load_recipe

recipe = load_recipe(sys.argv[1], sys.argv[2:])
quality = recipe.task.quality
tuner = tune.Tuner(
    trainable(recipe, num_rungs=4),
    tune_config=tune.TuneConfig(
        metric=quality,
        mode="max" if recipe.sign(quality) > 0 else "min",
        num_samples=-1,  # all that the searcher has
        search_alg=Searcher(recipe),
        scheduler=ASHAScheduler(max_t=4, reduction_factor=2),
    ),
)
best = tuner.fit().get_best_result()
print(best.config, best.metrics)
