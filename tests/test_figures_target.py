"""A target asked for that the records cannot answer."""

import pytest
from synthetic_language_study import make_study

from experiments.figures.__main__ import main
from experiments.figures.options import Options, check_target
from experiments.study_records import read_study
from models.command_line import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("study") / "s"
    return make_study(made, rungs=("muon",), seed_cells=(), trials=(), kernels=(), kinds=())


def test_a_target_below_that_at_which_runs_stopped_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UsageError) as raised:
        main([f"study={folder}", "fig=12", f"out={tmp_path / 'o'}", "target=4.2"])
    said = str(raised.value)
    assert said == (
        "target=4.2: 4 of 4 runs stopped below loss 4.5 and never came so low; "
        "give target=4.5 or more"
    )
    assert not (tmp_path / "o").exists()


def test_a_target_that_every_run_came_to_is_taken(folder, tmp_path):
    study = read_study(folder)
    for target in (None, 4.5, 5.0):
        check_target(study, Options(target=target))
    lowest = max(run.val["loss"].min() for run in study.chosen)
    check_target(study, Options(target=lowest + 1e-9))  # they overshoot their own by a little
    assert main([f"study={folder}", "fig=12", f"out={tmp_path / 'o'}", "target=5"]) == 0
