"""Features of the walks' model in the bands that a run names: what features/ holds."""

from functools import lru_cache
from typing import Any

import numpy as np

from toy_modular.bands import band_arrays, band_walks, make_band_probe, parse_band
from toy_modular.edits import edit_array, edit_effects
from toy_modular.language import make_model
from toy_modular.run_config import RunConfig


@lru_cache(maxsize=32)
def make_features(config: RunConfig):
    """probe(params, last) -> arrays by kind and band (`bands.band_arrays`); None without bands.

    With `last` also what keeping and dropping the key modes does to the loss, the numbers of
    `edit_names.EDIT_NAMES`.
    """
    if not config.measure.bands:
        return None
    model = make_model(config)
    bands = [parse_band(text, config.banded) for text in config.measure.bands]
    walks = [band_walks(c, o, config.banded, config.measure.walks) for c, o in bands]
    probes = [make_band_probe(model, band) for band in walks]

    def measure(params: Any, last: bool) -> dict[str, np.ndarray]:
        embedding, arrays = np.asarray(params["wte"]["embedding"]), {}
        for band, probe in zip(walks, probes, strict=True):
            seen = probe(params)
            found = band_arrays(seen["h"], seen["losses"], band, embedding)
            if last:
                found["edits"] = edit_array(edit_effects(model, params, band))
            arrays |= {f"{kind}/{band.c}_{band.o}": value for kind, value in found.items()}
        return arrays

    return measure
