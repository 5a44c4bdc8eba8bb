"""slimtune: one recipe in, a Pareto front of deployable models out.

The listing of this package reads as its sentence: recipe → space → search → trial
(prune → prepare → finetune → convert → export → measure) → front → report, export.
"""

__version__ = "0.1.0"
