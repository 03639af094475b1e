"""What a person sees: numbers in few characters, and lines where there is no terminal."""

import pytest

from experiments.progress import Display, format_rate, format_seconds, format_tokens


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.4, "0"), (999, "999"), (4_100, "4.1k"), (512_000, "512k"), (1_234_000, "1.23M")],
)
def test_rates(rate, text):
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(0, "0"), (999, "999"), (10_240, "10.24k"), (1_230_000, "1.23M"), (31.5e9, "31.50B")],
)
def test_tokens(tokens, text):
    assert format_tokens(tokens) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def train_row(step, loss, blocks=None):
    tokens = (step + 1) * 256
    return {"kind": "train", "step": step, "tokens": tokens, "loss": loss, "window_blocks": blocks}


def test_without_a_terminal_there_are_few_lines_each_whole(capsys):
    with Display(num_steps=100, start=0, flops_at=pytest.fail, peak=None) as display:
        display.note("[bold] is not markup here")
        for step in range(50):
            display.train(train_row(step, 3.0), 1e4 if step else None)
        display.validation({"step": 50, "tokens": 12_800, "loss": 2.5, "seconds": 0.3})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[bold] is not markup here"
    assert lines[1].startswith("step 1/100  256 tokens  loss 3.000  val -  - tok/s  ETA ")
    assert lines[1].endswith("MFU -")
    assert lines[2] == "step 50/100  12.80k tokens  val loss 2.5000  (0.3 s)"
    assert len(lines) == 3


def test_utilisation_is_shown_where_the_peak_is_known(capsys):
    with Display(num_steps=2, start=0, flops_at={None: 1e6}.get, peak=1e12) as display:
        display.validation({"step": 0, "tokens": 0, "loss": 4.0, "seconds": 0.3})
        display.train(train_row(0, 3.0), 5e5)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "val 4.000  500k tok/s" in line
    assert line.endswith("MFU 50.0%")


def test_utilisation_is_that_of_the_window_of_the_step():
    asked = []

    def flops_at(blocks):
        asked.append(blocks)
        return 1e6 * blocks

    display = Display(num_steps=9, start=0, flops_at=flops_at, peak=1e12)
    for step, blocks in enumerate((0.5, 0.5, 14.0, 14.0)):
        text = display._describe(train_row(step, 3.0, blocks), 5e4)
        assert text.endswith(f"MFU {5 * blocks:.1f}%")
    assert asked == [0.5, 14.0]
