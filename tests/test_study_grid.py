"""Which members a study has, which rates it tries, and how a search decides; nothing is trained."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.study.grid import parse_member, resolve_study
from experiments.study.halving import Trial, _outside, _select, rank_key, search, survivors
from experiments.study.outcome import Outcome
from experiments.study.pool import Failed
from experiments.study.presets import PRESETS
from experiments.study.rates import transferred
from experiments.study_records import Cell
from models.command_line import UsageError
from models.ladder import RUNGS

PUBLISHED = (0.5, 0.70710678, 1.0, 1.41421356, 2.0)
LAWS = ("sqrt", "linear")


def trial(lr_scale, reason="paused", tokens=100, val_loss=5.0, crossing=float("nan")):
    return Trial(lr_scale, f"run-{lr_scale}", Outcome(reason, tokens, val_loss), crossing)


@pytest.mark.parametrize(("ratio", "count"), [(1, 5), (2, 6), (0.5, 6), (4, 7), (0.25, 7)])
def test_as_many_candidates_as_published(ratio, count):
    assert len(transferred("flexwin", int(8 * ratio), LAWS, PUBLISHED)) == count


def test_an_eighth_of_the_reference_batch_has_eight_candidates():
    found = transferred("flexwin", 1, LAWS, PUBLISHED)
    assert len(found) == 8
    np.testing.assert_allclose([found[0], found[-1]], [1 / 16, 2 / 8**0.5], rtol=1e-5)


def test_a_rung_of_short_rows_has_a_reference_of_its_own():
    assert transferred("untied", 1, LAWS, (1.0,)) == [1.0]
    assert transferred("untied", 4, LAWS, (1.0,)) == [2.0, 4.0]
    assert transferred("baseline", 8, LAWS, (1.0,)) == [1.0]


def test_the_laptop_preset_is_what_the_study_promises():
    study = resolve_study(["preset=laptop"])
    cells = study.cells
    assert len({cell.rung for cell in cells}) == 6
    assert len({cell.batch for cell in cells}) == 4
    assert len(cells) == 24
    assert sorted(len(study.seeds(cell)) for cell in cells) == [1] * 23 + [3]
    targets = {study.target(cell) for cell in cells}
    assert len(targets) == 1
    assert None not in targets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_or_names_the_command(name):
    preset = PRESETS[name]
    if preset.elsewhere:
        with pytest.raises(UsageError, match="python -m"):
            resolve_study([f"preset={name}"])
        return
    assert resolve_study([f"preset={name}"]).members


def test_figures_of_the_whole_ladder_ask_for_all_of_it():
    rungs = {cell.rung for cell in resolve_study(["preset=fig8"]).cells}
    assert rungs == set(RUNGS)


def test_typed_keys_win_over_the_preset():
    study = resolve_study(["rungs=untied", "batches=4", "seeds=0,1", "more=", "target_loss=5.5"])
    assert [member.name for member in study.members] == ["untied-d12-b4-s0", "untied-d12-b4-s1"]
    assert study.target(Cell("untied", "d12", 4)) == 5.5


def test_a_run_is_named_by_everything_that_decides_it():
    study = resolve_study(["rungs=untied", "batches=4"])
    other = resolve_study(["rungs=untied", "batches=4", "val_every=4096"])
    cell = Cell("untied", "d12", 4)
    names = {
        study.run_name(cell, 0, 1.0),
        study.run_name(cell, 1, 1.0),
        study.run_name(cell, 0, 2.0),
        other.run_name(cell, 0, 1.0),
    }
    assert len(names) == 4
    assert study.run_name(cell, 0, 1.0) in names


def test_bases_move_the_candidates_of_their_rung():
    words = ["rungs=muon,untied", "batches=4", "transfer=sqrt", "factors=1", "lr_base=muon:3"]
    study = resolve_study(words)
    assert study.candidates(Cell("muon", "d12", 4)) == [6.0]
    assert study.candidates(Cell("untied", "d12", 4)) == [2.0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rungs=muom", "rungs=muom"),
        ("tiers=d13", "tiers=d13"),
        ("batches=0", "batches"),
        ("preset=figure1", "preset=figure1"),
        ("preset=fig5", "window_counts"),
        ("more=flexwin-b16", "more=flexwin-b16"),
        ("more=flexwim-d12-b16-s1", "more=flexwim-d12-b16-s1"),
        ("lr_base=muon", "lr_base=muon"),
        ("lr_base=muon:-1", "lr_base=muon:-1"),
        ("lr_base=muon:x", "lr_base=muon:x"),
        ("lr=0", "lr=0"),
        ("eta=1", "eta=1"),
        ("rung_tokens=5,3", "rung_tokens"),
        ("window=200,90", "window"),
        ("workers=0", "workers=0"),
        ("rung=muon", "give rungs="),
        ("batch=4", "give batches="),
        ("seed=4", "give seeds="),
        ("optim.lr_scale=2", "the study sets it itself"),
        ("size.n_head=5", "size.n_"),
        ("wokers=2", "workers"),
        ("prune=beta", "prune=beta"),
        ("keep=0", "keep=0"),
    ],
)
def test_bad_words_end_in_one_line(word, said):
    with pytest.raises(UsageError, match=said) as caught:
        resolve_study([word])
    assert "\n" not in str(caught.value)


def test_a_member_is_read_back_from_its_name():
    member = parse_member("flexwin-d36-b16-s2")
    assert member.name == "flexwin-d36-b16-s2"
    assert member.cell == Cell("flexwin", "d36", 16)


def test_trials_are_ranked_target_first_and_diverged_last():
    ranked = [
        trial(1.0, "target", crossing=90.0),
        trial(2.0, "target", crossing=95.0),
        trial(3.0, val_loss=4.0),
        trial(4.0, val_loss=6.0),
        trial(5.0, "diverged", tokens=80, val_loss=float("inf")),
        trial(6.0, "diverged", tokens=20, val_loss=float("inf")),
    ]
    assert sorted(reversed(ranked), key=rank_key) == ranked


@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=9, unique=True), st.integers(2, 4))
def test_as_many_survive_as_one_in_eta_and_they_are_the_best(losses, eta):
    trials = [trial(float(i), val_loss=loss) for i, loss in enumerate(losses)]
    kept = survivors(trials, eta)
    assert len(kept) == max(1, len(losses) // eta)
    worst_kept = max(losses[int(i)] for i in kept)
    assert worst_kept <= min([loss for i, loss in enumerate(losses) if i not in kept] or [9.0])


def test_an_edge_asks_for_the_next_rate_and_the_middle_for_none():
    by_loss = lambda *losses: {  # noqa: E731
        rate: trial(rate, val_loss=loss) for rate, loss in zip((1.0, 2.0, 4.0), losses, strict=True)
    }
    assert _outside(by_loss(5.0, 4.0, 3.0)) == 8.0
    assert _outside(by_loss(3.0, 4.0, 5.0)) == 0.5
    assert _outside(by_loss(4.0, 3.0, 5.0)) is None


def test_a_diverged_trial_is_not_chosen_beside_a_finite_one_that_came_less_far():
    trials = (
        trial(1.0, tokens=50, val_loss=5.2),
        trial(2.0, "diverged", tokens=90, val_loss=float("inf")),
        trial(4.0, "diverged", tokens=70, val_loss=float("inf")),
    )
    assert _select({own.lr_scale: own for own in trials}).lr_scale == 1.0
    assert _select({own.lr_scale: own for own in trials[1:]}).lr_scale == 2.0


def test_a_cell_with_a_broken_trial_waits_and_the_others_are_decided(tmp_path):
    study = resolve_study(["rungs=untied", "batches=4,8", "more="])
    four, eight = study.cells
    tried = []

    def train(tasks, what):
        tried.extend((task.words["batch"], task.until) for task in tasks)
        losses = {task.folder.name: float(task.words["optim.lr_scale"]) for task in tasks}
        ends = {name: Outcome("paused", 65536, loss) for name, loss in losses.items()}
        if what == "rung 1":
            broken = next(task for task in tasks if task.words["batch"] == "8")
            ends[broken.folder.name] = Failed("exit code 1: disk full")
        return ends

    found = search(study, [four, eight], tmp_path, train)
    assert list(found) == [four]
    assert len(found[four].trials) == 5  # three, and two more below since the least is best
    assert tried.count(("8", 65536)) == 3


def test_rungs_whose_targets_differ_are_refused():
    with pytest.raises(UsageError, match=r"betterwin 3\.3.*flexwin 3\.2|flexwin 3\.2.*3\.3"):
        resolve_study(["preset=M1", "rungs=flexwin,betterwin", "more=", "target_loss=published"])
    assert resolve_study(["preset=M1"]).target_loss == 3.3


def test_a_rate_is_the_same_in_words_and_records():
    study = resolve_study(["rungs=untied", "batches=4", "lr=0.333333333333"])
    (rate,) = study.candidates(study.cells[0])
    assert float(study.run_words(study.cells[0], 0, rate)["optim.lr_scale"]) == rate


def test_the_command_names_each_folder_and_pause(tmp_path):
    from experiments.study.halving import make_task

    study = resolve_study(["rungs=untied", "batches=4"])
    task = make_task(study, Cell("untied", "d12", 4), 0, 2.0, tmp_path, until=4096)
    command = task.command()
    assert f"out={tmp_path / task.folder.name}" in command
    assert "pause_tokens=4096" in command
    assert "optim.lr_scale=2" in command
    assert not task.is_done()
    assert isinstance(task.folder, Path)
