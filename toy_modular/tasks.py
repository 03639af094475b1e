"""The three tasks of the toy study, each as what training and measuring need of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from toy_modular import grok_probes, grokking, language, language_probes, rff_model
from toy_modular.problem import Data, Problem
from toy_modular.run_config import RunConfig

FeatureProbe = Callable[[Any, bool], Mapping[str, np.ndarray]]


class Task(NamedTuple):
    """make_problem(config), load_data(config) and make_features(config), which may give None.

    A feature probe takes parameters and whether the run ends with them, and returns the arrays of a
    record in features/.
    """

    make_problem: Callable[[RunConfig], Problem]
    load_data: Callable[[RunConfig], Data]
    make_features: Callable[[RunConfig], FeatureProbe | None]


TASKS = {
    "banded": Task(language.make_problem, language.load_data, language_probes.make_features),
    "grok": Task(grokking.make_problem, grokking.load_data, grok_probes.make_features),
    "rff": Task(rff_model.make_problem, rff_model.load_data, lambda config: None),
}
