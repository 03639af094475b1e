"""Features of the walks' model in the bands that a run names: what features/ holds."""

def make_features(config):
    return None
