"""One window for a study's tests: the one it declares, wherever none is asked for."""

import json

import pytest
from synthetic_language_study import make_study

from experiments.figures.__main__ import Task, run_task
from experiments.figures.options import Options, resolved
from experiments.forecast import ForecastConfig
from experiments.pruning import retrospective
from experiments.rank_windows import check_window, window_of
from experiments.study.grid import StudyConfig, resolve_study
from experiments.study_records import read_study

SMALL = {"rungs": ("muon",), "seed_cells": (), "trials": (), "kernels": ()}


def declared(folder, window):
    config = json.loads((folder / "config.json").read_text()) | {"window": window}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A study that declares ranks 40-90."""
    return declared(make_study(tmp_path_factory.mktemp("study") / "s", **SMALL), [40, 90])


@pytest.fixture(scope="module")
def tiers(tmp_path_factory):
    made = {}
    for names in (("d12", "d36"), ("d36",), ("d24",)):
        folder = tmp_path_factory.mktemp("tiers") / "s"
        made[names] = read_study(make_study(folder, tiers=names, **(SMALL | {"kinds": ()})))
    return made


def test_figures_test_the_window_that_the_study_declares(other, tmp_path):
    for fig in (2, 8):
        task = Task(study=str(other), fig=fig, out=str(tmp_path / "o"))
        own = run_task(task, Options(), lambda line: None).claims[0]
        asked = run_task(task, Options(window=(90, 200)), lambda line: None).claims[0]
        assert (own.window, asked.window) == ("2-6", "6-12")  # at width 48
    assert resolved(read_study(other), Options()).window == (40, 90)
    assert resolved(read_study(other), Options(window=(10, 40))).window == (10, 40)


def test_hindsight_takes_the_declared_window_too(other):
    study = read_study(other)
    assert retrospective(study, 1) == retrospective(study, 1, window=(40, 90))


def test_deeper_tiers_have_their_own_window_beside_d12_alone(tiers):
    both = tiers["d12", "d36"]
    assert window_of(both, tier="d12") == window_of(both) == (90, 200)
    assert window_of(both, tier="d36") == (200, 400)
    assert window_of(both, (10, 40), "d12") == (10, 40)
    assert window_of(both, (10, 40), "d36") == (200, 400)
    for name in ("d36", "d24"):
        alone = tiers[name,]
        assert window_of(alone, tier=name) == (90, 200)  # what it declares
        assert window_of(alone, (300, 400), name) == (300, 400)
        alone.config.pop("window")
        assert window_of(alone, tier=name) == (200, 400)


@pytest.mark.parametrize("window", [(90, 91), (0, 5), (200, 90)])
def test_one_rule_says_what_a_window_is(window, other, tmp_path):
    said = f"window={window[0]},{window[1]}: give FIRST,LAST, 3 ranks or more"
    for make in (check_window, lambda w: Options(window=w), lambda w: ForecastConfig(window=w),
                 lambda w: StudyConfig(window=w)):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            make(window)
    with pytest.raises(ValueError, match=said):
        resolve_study([f"window={window[0]},{window[1]}", f"out={tmp_path}"])
    bad = declared(make_study(tmp_path / "bad", **(SMALL | {"kinds": ()})), list(window))
    with pytest.raises(ValueError, match=f"study={bad}: {said}"):
        window_of(read_study(bad))
