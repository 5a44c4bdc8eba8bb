"""What `slimtune doctor` asks of a Ray cluster: its nodes, and whether a recipe finds its place there."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from orchestrator.doctor import Survey, marks_in
from orchestrator.launch.ray_cluster import Cluster
from orchestrator.launch.ray_gangs import RayGangs
from orchestrator.launch.ray_nodes import survey
from orchestrator.recipe import Recipe
from orchestrator.trial import BadInput


def survey_and_room(recipe: Recipe | None, address: str | None) -> tuple[Survey, list[str]]:
    """What the nodes say, and what the recipe wants in vain. Raises `BadInput` for no cluster."""
    if recipe is None:
        cluster = Cluster(address)
        try:
            return survey(cluster.nodes(), None), []
        finally:
            cluster.leave()
    with closing(RayGangs(recipe, Path(recipe.output_dir), examines=False)) as gangs:
        with marks_in(recipe.output_dir, recipe.storage) as folder:
            found = survey(gangs.cluster.nodes(), folder)
        problems: list[str] = []
        try:
            _ = gangs.shapes
            gangs.facts()
        except BadInput as error:
            problems = error.problems
        return found, problems
