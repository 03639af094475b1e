"""The records of a study that are kept for a repository."""

import numpy as np
import pytest
from synthetic_language_study import make_study

from experiments.pack import main, pack
from experiments.study_records import ACTIVATION, GRADIENT, read_study
from models.command_line import UsageError


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "whole"
    return make_study(folder, rungs=("untied",), batches=(4, 8), seed_cells=(), trials=(0.5,))


@pytest.fixture(scope="module")
def packed(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "records"
    size = pack(read_study(study), out, rows=20)
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return out


def test_a_pack_is_read_as_the_study_is(study, packed):
    whole, kept = read_study(study), read_study(packed)
    assert [run.name for run in kept.runs] == [run.name for run in whole.runs]
    assert kept.selected == whole.selected
    assert kept.config == whole.config | ({"out": "auto"} if "out" in whole.config else {})
    for one, other in zip(kept.chosen, whole.chosen, strict=True):
        assert one.result == other.result
        assert [row.tokens for row in one.steps] == [row.tokens for row in other.steps]
        np.testing.assert_array_equal(one.val["loss"], other.val["loss"])
        for kind in (ACTIVATION, GRADIENT):
            assert one.final_site(kind) == other.final_site(kind)
            site = one.final_site(kind)
            for row, whole_row in zip(one.steps, other.steps, strict=True):
                np.testing.assert_allclose(
                    row.array(kind, site), whole_row.array(kind, site), rtol=1e-7
                )


def test_error_bars_are_kept_of_the_last_layer_only(packed):
    run = read_study(packed).chosen[0]
    assert run.steps[-1].sites(f"{ACTIVATION}_left_out") == [run.final_site()]
    assert len(run.sites(ACTIVATION)) == 5


def test_training_rows_are_thinned_and_keep_both_ends(study, packed):
    one, other = (read_study(path).chosen[0].train["step"] for path in (packed, study))
    assert len(one) == 20 < len(other)
    assert (one[0], one[-1]) == (other[0], other[-1])


def test_trials_keep_their_metrics_alone(packed):
    for run in read_study(packed).trials:
        assert len(run.val["loss"])
        assert run.steps == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "study= is missing"),
        (["study=nowhere", "out=there"], "nowhere"),
        (["study=.", "out=there", "rows=1"], "rows=1"),
    ],
)
def test_bad_words_end_in_one_line(words, said):
    with pytest.raises(UsageError, match=said):
        main(words)


def test_a_study_is_not_packed_into_itself(study):
    with pytest.raises(UsageError, match="the study itself"):
        main([f"study={study}", f"out={study}"])
