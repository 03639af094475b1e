"""The records of a toy study that are kept for a repository."""

import numpy as np
import pytest
from synthetic_study import make_study

from models.command_line import UsageError
from toy_modular.figures import FigureConfig, run_figures
from toy_modular.pack import main, pack
from toy_modular.records import LAST, SPECTRUM, read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whole"
    return make_study(folder, batches=(32, 64, 128), seeds=(0,), groups=4)


@pytest.fixture(scope="module")
def packed(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "records"
    assert pack(read_study(study), out) > 0
    return out


def test_figures_of_a_pack_say_what_those_of_the_study_say(study, packed, tmp_path):
    said = []
    for name, folder in (("whole", study), ("packed", packed)):
        config = FigureConfig(study=str(folder), out=str(tmp_path / name))
        said.append(run_figures(config, lambda text: None))
    assert len(said[0]) > 5
    for one, other in zip(*said, strict=True):
        assert (one.figure, one.claim, one.verdict) == (other.figure, other.claim, other.verdict)
        np.testing.assert_allclose(one.statistic, other.statistic, rtol=1e-4, atol=1e-6)


def test_only_the_last_position_is_kept(packed):
    for run in read_study(packed).runs:
        for row in run.spectra:
            assert row.names == {f"{SPECTRUM}/{LAST}", f"{SPECTRUM}_left_out/{LAST}"}


def test_bands_that_were_not_probed_are_named(study, tmp_path):
    with pytest.raises(UsageError, match="band 5:7 was not probed"):
        main([f"study={study}", f"out={tmp_path / 'out'}", "bands=5:7"])


@pytest.mark.parametrize(("words", "said"), [([], "study="), (["study=x", "out=y"], "x: no such")])
def test_bad_words_end_in_one_line(words, said):
    with pytest.raises(UsageError, match=said):
        main(words)


def test_a_study_is_not_packed_into_itself(study):
    with pytest.raises(UsageError, match="the study itself"):
        main([f"study={study}", f"out={study}"])
