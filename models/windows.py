"""How far back attention sees at a step of training (ladder spec 5.3): pure integers.

A window is given in tokens everywhere, as data of the compiled step, so that its growth never
compiles anything anew. Lengths are in mask blocks and therefore the same in every profile; a ramp
begins at half a block and would end half a block short of a whole number.
"""

from models.config import ArchConfig, SizeConfig


def widest_window(arch: ArchConfig, size: SizeConfig, long_window: bool = True) -> int | None:
    """The largest window of a long or a short layer in tokens; None: all of the row."""
    if arch.window == "none":
        return None
    return layer_window(arch, size, arch.window_blocks * size.block, long_window)


def window_at(arch: ArchConfig, size: SizeConfig, step: int, window_steps: int) -> int | None:
    """The window in tokens at a 0-based step of a ramp of `window_steps`; None: no window at all.

    With f = step / window_steps, at most 1, and b tokens a block, to W = arch.window_blocks:
    half_blocks: the half blocks in (1/2 + (W - 1/2) f) b, rounded down; floor: its whole blocks, at
    least 1; ceil: the whole blocks in (W - 1/2) f b, rounded up, at least 1.
    """
    if arch.window == "none":
        return None
    widest = arch.window_blocks
    if arch.window_ramp == "none" or step >= window_steps:
        return widest * size.block
    # in whole numbers: half blocks times steps of the ramp
    grown = (2 * widest - 1) * step
    if arch.window_ramp == "half_blocks":
        return (grown // window_steps + 1) * size.block // 2
    if arch.window_ramp == "floor":
        blocks = (grown + window_steps) // (2 * window_steps)
    else:
        blocks = -(-grown // (2 * window_steps))
    return max(1, blocks) * size.block


def layer_window(arch: ArchConfig, size: SizeConfig, window, long_window: bool):
    """The window of one layer, an int or an integer array, from the step's.

    A short layer has half the blocks, rounded down, at least 1 (ladder spec 3.4).
    """
    if window is None or long_window or not arch.long_short:
        return window
    blocks = window // size.block // 2
    return (blocks + (blocks == 0)) * size.block
