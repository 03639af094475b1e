"""The eighteen figures of arXiv 2605.05683: where each is drawn, and what it shows.

A figure is a function draw_N(figure, study, options) -> claims in a module of this package, whose
constant INCHES gives its size; modules are imported when they are drawn. Figures 4 and 11 are the
toy's and are drawn by its own command.
"""

from typing import NamedTuple


class Place(NamedTuple):
    """Module and function that draw a figure, and its subject."""

    module: str
    function: str
    subject: str


TOY = {4: ("4a", "4b"), 11: ("11a", "11b", "11c")}
"""Figures of the toy by the names of its own command."""

_PLACES = {
    1: ("operational", "spectra of batches, early alpha, and two kinds of gain"),
    2: ("prediction", "early alpha, and tokens to the target"),
    3: ("tricks", "taxonomy of the ladder's transitions"),
    4: ("toy", "toy: alpha and efficiency, and Fourier features"),
    5: ("data_windows", "spectra of two samples of the corpus"),
    6: ("matrices", "gradient spectra of four matrices"),
    7: ("optimizers", "Muon against Adam"),
    8: ("prediction_curves", "order of the batches by alpha, over training"),
    9: ("seeds", "seeds, against batches"),
    10: ("prediction", "early alpha of every layer, and tokens to the target"),
    11: ("toy", "toy: matched loss, and feature learning"),
    12: ("curves", "loss curves of all families"),
    13: ("atlas", "spectral atlas, baseline to untied"),
    14: ("atlas", "spectral atlas, valuemix to betterwin"),
    15: ("atlas", "spectral atlas, sparsev to attnscale"),
    16: ("atlas", "spectral atlas of the deep tiers"),
    17: ("weights", "weight spectra"),
    18: ("phases", "RankMe over training"),
}
FIGURES = {
    number: Place(module, f"draw_{number}", subject)
    for number, (module, subject) in _PLACES.items()
}
