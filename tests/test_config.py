"""Layers and their precedence, the ladder as data, and the folder of a run as its configuration."""

import ast
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench import parse_bench
from experiments.config import RunConfig, probed_layers
from experiments.resolve import (
    ALIASES,
    PROFILES,
    describe_layers,
    from_flat,
    help_text,
    parse_command,
    resolve,
    resolve_somewhere,
    run_name,
)
from models import ladder, ladder_table
from models.clean_ladder import GROUPS
from models.command_line import UsageError, flatten, leaves
from models.config import TIERS, ArchConfig, SizeConfig
from models.ladder import DEFAULT_RUNG, LADDERS, RUNGS, rung_values, rungs_up_to

KNOWN = leaves(RunConfig)


def resolved(*argv: str, auto: str = "laptop") -> RunConfig:
    return resolve(parse_command(list(argv)), auto)[0]


# The ladder


@pytest.mark.parametrize("ladder_name", LADDERS)
def test_every_diff_is_known_and_changes_something(ladder_name):
    names = [rung.name for rung in LADDERS[ladder_name]]
    assert len(set(names)) == len(names)
    for rung in LADDERS[ladder_name]:
        assert rung.diff or rung.name == "baseline"
        *below, itself = rungs_up_to(rung.name, ladder_name)
        assert itself is rung
        values = {key: leaf.default for key, leaf in KNOWN.items()}
        for other in below:
            values |= other.diff
        for key, value in rung.diff.items():
            assert key in KNOWN, f"{rung.name}: {key}"
            assert values[key] != value, f"{rung.name}: {key} had that value already"


def test_the_published_ladder_is_whole():
    sixteen = (
        "baseline rope muon untied valuemix unet fixedwin flexwin vte betterwin sparsev truncrope "
        "softcap fp8head lswa attnscale"
    )
    assert RUNGS[:16] == tuple(sixteen.split())  # more may stand above them
    assert "lswa_adam" in RUNGS
    assert DEFAULT_RUNG == "attnscale"
    below = [rung.name for rung in rungs_up_to("lswa_adam")]
    assert below[-2:] == ["lswa", "lswa_adam"]
    assert "attnscale" not in below


@pytest.mark.parametrize("name", LADDERS)
def test_an_appended_rung_is_laid_over_the_top(monkeypatch, name):
    rungs, controls = {
        "published": (ladder.LADDER, ladder.CONTROLS),
        "clean": (ladder.CLEAN_LADDER, ladder.CLEAN_CONTROLS),
    }[name]
    assert all(control.over for control in controls)
    added = ladder.Rung("mycap", "logits capped at 20", {"arch.softcap": 20.0})
    monkeypatch.setitem(LADDERS, name, (*rungs, added, *controls))
    assert rung_values("mycap", name) == rung_values("attnscale", name) | added.diff
    assert [rung.name for rung in rungs_up_to("lswa_adam", name)][-2:] == ["lswa", "lswa_adam"]


def test_a_clean_rung_changes_one_key_or_one_declared_group():
    first, *others = LADDERS["clean"]
    assert first.name == "baseline"
    for rung in others:
        keys = set(rung.diff)
        assert len(keys) == 1 or keys in [set(group) for group in GROUPS.values()], rung.name


def test_a_clean_rung_keeps_what_the_first_one_chose():
    constant = (
        *("arch.init", "arch.zero_proj", "arch.norm_eps", "arch.rope_table", "arch.rope_sign"),
        *("optim.schedule", "optim.num_steps", "optim.warmdown", "optim.embed_betas"),
        *("optim.momentum", "optim.momentum_start", "optim.clip", "published_target"),
    )
    for rung in LADDERS["clean"][1:]:
        assert not set(rung.diff) & set(constant), rung.name
    rules = {rung.diff["arch.window"] for rung in LADDERS["clean"] if "arch.window" in rung.diff}
    ramps = {rung.diff.get("arch.window_ramp") for rung in LADDERS["clean"]} - {None}
    assert len(rules) == len(ramps) == 1


def test_both_ladders_end_in_one_architecture():
    ends = [flatten(resolved(f"ladder={name}", "rung=attnscale").arch) for name in LADDERS]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("cls", "name"), [(ArchConfig, "arch"), (SizeConfig, "size")])
def test_every_field_is_read_in_models(cls, name):
    """No option without an effect: each field is read as an attribute of `arch` or `size`."""
    read = set()
    for path in Path(ladder.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(name):
                read.add(node.attr)
    # rows are cut and ramps are timed by experiments.config and experiments.schedule
    # and mlp_ratio is read as mlp_width
    assert leaves(cls).keys() - read <= {"long_row", "row", "window_steps", "mlp_ratio"}


@pytest.mark.parametrize(
    ("rung", "count"),
    [
        ("baseline", 124_354_560),
        ("rope", 123_577_344),
        ("muon", 123_568_128),
        ("untied", 162_201_600),
        ("valuemix", 162_201_636),
        ("unet", 162_201_642),
        ("fixedwin", 162_201_642),
        ("flexwin", 162_201_642),
        ("vte", 625_803_306),
        ("betterwin", 394_002_474),
        *((rung, 275_742_772) for rung in ("sparsev", "truncrope", "softcap", "fp8head")),
        *((rung, 275_742_772) for rung in ("lswa", "attnscale", "lswa_adam")),
    ],
)
def test_published_parameter_counts(rung, count):
    shapes = ladder_table.parameter_shapes(rung, "d12")
    assert ladder_table.count_parameters(shapes) == count
    import jax

    from optim.groups import group_labels

    present = set(jax.tree.leaves(group_labels(shapes)))
    assert set(ladder_table.groups_present(shapes)) == present


# Millions of parameters of the larger tiers (ladder spec 10), to the digits given there.
LARGER = {
    "d24": {"flexwin": 405.0, "vte": 1641, "betterwin": 1023, "sparsev": 555.4, "attnscale": 555.4},
    "d36": {"flexwin": 836.6, "vte": 3155, "betterwin": 1996, "sparsev": 1023, "attnscale": 1023},
    "d48": {"flexwin": 1636, "vte": 5499, "betterwin": 3567, "sparsev": 1867, "attnscale": 1867},
}


@pytest.mark.parametrize(("tier", "rung"), [(t, r) for t, rungs in LARGER.items() for r in rungs])
def test_parameter_counts_of_the_larger_tiers(tier, rung):
    count = ladder_table.count_parameters(ladder_table.parameter_shapes(rung, tier)) / 1e6
    assert float(f"{count:.4g}") == LARGER[tier][rung]


@pytest.mark.parametrize("name", LADDERS)
def test_ladder_command_prints_every_rung(name, capsys, monkeypatch):
    monkeypatch.setattr(ladder_table, "TIERS", {"d12": TIERS["d12"]})
    assert ladder.main([f"ladder={name}"]) == 0
    table = capsys.readouterr().out
    for rung in LADDERS[name]:
        assert sum(line.startswith(f"│ {rung.name} ") for line in table.splitlines()) == 3
    assert "162,201,600" in table
    assert max(map(len, table.splitlines())) <= ladder_table.PLAIN_WIDTH


@pytest.mark.parametrize(("rung", "tier"), list(itertools.product(RUNGS, TIERS)))
def test_ladder_command_prints_every_key_of_a_rung(rung, tier, capsys):
    assert ladder.main([f"rung={rung}", f"tier={tier}"]) == 0
    shown = dict(line.split()[0].split("=") for line in capsys.readouterr().out.splitlines()[:-1])
    config = resolved(f"rung={rung}", f"tier={tier}", "profile=paper")
    flat = flatten(config)
    sections = {key for key in flat if key.startswith(("arch.", "size."))}
    assert shown.keys() >= sections | rung_values(rung).keys()
    for key, text in shown.items():
        if key not in ("size.vocab_size", "size.eot_token"):
            assert text == ladder_table.short(flat[key]), key


def test_ladder_command_names_the_layer_of_every_key(capsys):
    assert ladder.main(["tier=d24", "rung=muon"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["size.n_layer=24", "tier=d24"] in lines
    assert ["size.block=128", "default"] in lines
    assert ["arch.qk_norm=true", "rung=rope"] in lines
    assert ["arch.proj_bias=false", "rung=muon"] in lines
    assert ["optim.num_steps=50000", "rung=rope"] in lines


# Layers


@pytest.mark.parametrize(
    ("tier", "profile", "rung"), list(itertools.product(TIERS, PROFILES, RUNGS))
)
def test_every_tier_profile_and_rung_resolves(tier, profile, rung):
    config = resolved(f"tier={tier}", f"profile={profile}", f"rung={rung}")
    flat = flatten(config)
    assert (config.tier, config.profile, config.rung) == (tier, profile, rung)
    for key, value in rung_values(rung).items():
        assert flat[key] == (list(value) if isinstance(value, tuple) else value)
    size = config.size
    assert (size.n_layer, size.n_head) == (
        TIERS[tier]["size.n_layer"],
        TIERS[tier]["size.n_head"],
    )
    assert size.n_embd * (8 if profile == "laptop" else 1) == TIERS[tier]["size.n_embd"]
    assert config.target_loss == (config.published_target if profile == "paper" else None)
    assert from_flat(json.loads(json.dumps(flat))) == config


def test_defaults_are_the_published_d12():
    assert flatten(RunConfig()).items() >= TIERS["d12"].items()


WORDS = ("tier=d24", "profile=laptop", "rung=muon", "optim.matrix_lr=0.5", "accumulate=2")


@pytest.mark.parametrize("order", list(itertools.permutations(WORDS))[::12])
def test_precedence_does_not_depend_on_the_order_typed(order):
    config, origin = resolve(parse_command(list(order)), "paper")
    assert config == resolve(parse_command(list(WORDS)), "paper")[0]
    assert config.size.n_embd == 128  # the profile's eighth over the tier's 1024
    assert config.optim.matrix_lr == 0.5  # typed over the rung's
    assert config.optim.embed_lr == 0.0036  # the rung's over the default
    assert config.accumulate == 2  # typed over the profile's
    expected = {
        "size.n_layer": "tier=d24",
        "size.n_embd": "profile=laptop",
        "optim.embed_lr": "rung=muon",
        "optim.matrix_lr": "typed",
        "accumulate": "typed",
    }
    assert expected.items() <= origin.items()


def test_auto_profile_is_what_the_machine_says():
    assert resolved(auto="paper").profile == "paper"
    assert resolved(auto="laptop") == resolved("profile=laptop")
    assert resolved("profile=paper", auto="laptop").profile == "paper"


@pytest.mark.parametrize(
    "words",
    [
        "probes.gradient_windows=256",
        "data.val_tokens=5242880",
        "rung=muon accumulate=64",
        "max_tokens=none",
    ],
)
def test_words_for_a_large_accelerator_pass_the_early_look(words):
    typed = parse_command(words.split())
    with pytest.raises(UsageError):
        resolve(typed, "laptop")
    assert resolve_somewhere(typed) == resolve(typed, "paper")
    assert "profile=paper" in help_text("usage", typed)
    parse_bench([*words.split(), "rungs=muon"])


@pytest.mark.parametrize("words", ["batch=0", "profile=laptop max_tokens=none"])
def test_words_that_fit_no_profile_are_refused_early(words):
    typed = parse_command(words.split())
    with pytest.raises(UsageError) as early:
        resolve_somewhere(typed)
    with pytest.raises(UsageError) as late:
        resolve(typed, "laptop")
    assert str(early.value) == str(late.value)


def test_aliases_stand_for_keys_that_exist():
    assert set(ALIASES.values()) <= set(KNOWN)
    assert not set(ALIASES) & set(KNOWN)
    config = resolved("probes=weight", "probe_data=batch", "measure_every=5", "data=corpus")
    assert (config.probes.names, config.probes.data) == (("weight",), "batch")
    assert (config.probes.every, config.data.source) == (5, "corpus")


def test_target_loss_is_the_rungs_unless_typed():
    assert resolved("rung=muon", "profile=paper").target_loss == 3.3
    assert resolved("rung=rope", "profile=paper").target_loss == 3.2
    assert resolved("target_loss=none", "profile=paper").target_loss is None
    assert resolved("target_loss=4", "profile=laptop").target_loss == 4.0


def test_layers_are_described_by_what_they_changed():
    config, origin = resolve(parse_command(["rung=muon", "seed=3"]), "laptop")
    lines = describe_layers(config, origin)
    assert [line.split(":")[0] for line in lines] == ["profile=laptop", "rung=muon", "typed"]
    assert lines[-1] == "typed: seed=3"
    assert "optim.embed_lr=0.0036" in lines[1]


def test_help_shows_the_values_of_the_command():
    page = help_text("usage", {"rung": "muon", "seed": "7"})
    assert all(f"  {key}=" in page for key in KNOWN)
    assert "  seed=7 " in page
    assert "  optim.matrices=muon " in page


# What is stored

typed = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "batch": st.sampled_from([1, 2, 4, 8, 16]),
        "optim.embed_lr": st.floats(1e-6, 10),
        "optim.embed_betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        "probes.layers": st.none() | st.lists(st.integers(0, 11)).map(tuple),
        "probes.names": st.sampled_from([(), ("weight",), ("activation", "gradient")]),
        "target_loss": st.none() | st.floats(0.1, 10),
        "rung": st.sampled_from(RUNGS),
        "tier": st.sampled_from(sorted(TIERS)),
    },
)


@settings(max_examples=40)
@given(typed)
def test_a_configuration_survives_its_file(values):
    words = [
        f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in values.items()
    ]
    config = resolved(*words)
    again = from_flat(json.loads(json.dumps(flatten(config), allow_nan=False)))
    assert again == config
    assert run_name(again) == run_name(config)
    for key, value in values.items():
        stored = flatten(config)[key]
        assert (tuple(stored) if isinstance(stored, list) else stored) == value


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"sede": 1}, "stored configuration has the unknown key sede=1"),
        ({"seed": "1"}, "Expected 'seed' to be int, got str"),
        ({"size.n_head": 5}, "size.n_head=5 does not divide size.n_embd=768"),
        ({"probes.names": ["all"]}, "probes.names=all: choose among"),
    ],
)
def test_a_damaged_stored_configuration_is_refused(flat, said):
    with pytest.raises(UsageError, match=f"^{said}"):
        from_flat(flat)


def test_run_names_are_stable_and_tell_runs_apart():
    config = resolved("profile=laptop", "rung=untied")
    name = run_name(config)
    assert name == run_name(resolved("rung=untied", "profile=laptop"))
    assert name.startswith("untied-d12-laptop-b8-s0-")
    assert len(name.rpartition("-")[2]) == 8
    assert name == run_name(resolved("rung=untied", "out=/x", "resume=never"))
    for free in ("remat=true", "attention=dense", "fsdp=true", "pause_tokens=1e6"):
        assert name == run_name(resolved("rung=untied", free)), free
    others = ("seed=1", "optim.matrix_lr=0.03", "data=corpus", "probes=", "tier=d24")
    names = {run_name(resolved("rung=untied", word)) for word in others}
    assert len(names | {name}) == len(others) + 1


@pytest.mark.parametrize(
    ("tier", "layers"),
    [
        ("d12", (0, 3, 6, 9, 11)),
        ("d24", (0, 6, 12, 17, 23)),
        ("d36", (0, 9, 18, 26, 35)),
        ("d48", (0, 12, 24, 35, 47)),
    ],
)
def test_probed_layers_are_the_published_ones(tier, layers):
    assert probed_layers(resolved(f"tier={tier}")) == layers
    assert probed_layers(resolved(f"tier={tier}", "probes.layers=2,1")) == (2, 1)


def test_few_layers_are_probed_once_each():
    assert probed_layers(resolved("rung=untied", "size.n_layer=1")) == (0,)
    assert probed_layers(resolved("rung=untied", "size.n_layer=3")) == (0, 1, 2)
