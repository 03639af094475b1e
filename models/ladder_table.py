"""What `python -m models.ladder` prints: all rungs at a glance, or every key of one of them.

Learning rates are the ladder's own data. A key that no rung has set has its default, and those of
the optimizer are shown by `python -m experiments.train --help`, because models do not know optim.
"""

from collections.abc import Iterable
from typing import Any

from models.command_line import leaves
from models.config import TIERS, ArchConfig, SizeConfig
from models.ladder import LADDERS, rung_layers, rung_values
from models.rung import Rung
from models.type_words import as_typed

PAPER_VOCAB, PAPER_EOT = 50_304, 50_256
PLAIN_WIDTH = 100  # columns where the output is no terminal, a README for instance
GROUPS = ("embed", "head", "matrix", "scalar")


def fields_of(cls: type, section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of one section, `arch` or `size`, as arguments of its class."""
    names = {f"{section}.{name}": name for name in leaves(cls)}
    return {names[key]: value for key, value in values.items() if key in names}


def parameter_shapes(rung: str, tier: str, ladder: str = "published") -> dict:
    """The parameter tree of a rung at the published size of a tier, as shapes; nothing is made."""
    import jax

    from models.gpt import GPT, init_params

    values = TIERS[tier] | rung_values(rung, ladder) | {"size.vocab_size": PAPER_VOCAB}
    # two tokens are enough to find all parameters, and trace twice as fast as a block of 128
    values |= {"size.block": 2, "size.eot_token": PAPER_EOT}
    arch = ArchConfig(**fields_of(ArchConfig, "arch", values))
    size = SizeConfig(**fields_of(SizeConfig, "size", values))
    return jax.eval_shape(lambda: init_params(GPT(arch, size), 0))


def count_parameters(shapes: dict) -> int:
    """Number of parameters, a tied matrix once."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def groups_present(shapes: dict) -> tuple[str, ...]:
    """The optimizer groups (ladder spec 5.3) that have a parameter in this tree."""
    import jax

    blocks = [branch for name, branch in shapes.items() if name.startswith("h_")]
    small = any(leaf.ndim < 2 for leaf in jax.tree.leaves(blocks)) or "skip_weights" in shapes
    there = {"embed": True, "head": "lm_head" in shapes, "matrix": True, "scalar": small}
    return tuple(group for group in GROUPS if there[group])


def short(value: Any) -> str:
    """A value as it is typed on a command line, numbers in few digits."""
    if isinstance(value, list | tuple):
        return ",".join(map(short, value))
    return f"{value:g}" if isinstance(value, float) else as_typed(value)


def riders(rung: Rung) -> str:
    """The keys of a diff that came along with its first, the named change, section by section."""
    sections: dict[str, list[str]] = {}
    for key, value in list(rung.diff.items())[1:]:
        section, dot, name = key.partition(".")
        sections.setdefault(section if dot else "", []).append(f"{name or key}={short(value)}")
    return "\n".join(
        f"{name}: {', '.join(words)}" if name else ", ".join(words)
        for name, words in sections.items()
    )


def rates(rung: Rung, ladder: str, present: Iterable[str]) -> list[str]:
    """The rule of the matrices, then every group's learning rate: "default" where no rung set it,
    "-" where the group is empty."""
    values = rung_values(rung.name, ladder)
    found = [short(values.get("optim.matrices", "adam"))]
    for group in GROUPS:
        rate = short(values.get(f"optim.{group}_lr", "default"))
        found.append(rate if group in present else "-")
    return found


def print_ladder(ladder: str) -> None:
    """Three tables: the diffs, and what they come to in parameters and in learning rates.

    The diffs are there at once; counting traces every rung at every tier, which takes a while.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rungs = LADDERS[ladder]
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)

    def show(table):
        table.box, table.title_justify = box.ROUNDED, "left"
        console.print(table)

    diffs = Table("rung", "change", "riders", title="Diffs, each over the rung above")
    for rung in rungs:
        name = rung.name if rung.over is None else f"{rung.name} (over {rung.over})"
        diffs.add_row(name, rung.change, riders(rung), end_section=rung is not rungs[-1])
    show(diffs)
    counts = Table(title="Parameters")
    for name in ("rung", *TIERS):
        counts.add_column(name, justify="left" if name == "rung" else "right", no_wrap=True)
    groups = Table("rung", "matrices", *GROUPS, title="Learning rates of the optimizer groups")
    with console.status("counting parameters"):
        for rung in rungs:
            shapes = [parameter_shapes(rung.name, tier, ladder) for tier in TIERS]
            counts.add_row(rung.name, *(f"{count_parameters(each):,}" for each in shapes))
            groups.add_row(rung.name, *rates(rung, ladder, groups_present(shapes[0])))
    show(counts)
    show(groups)
    print("default: see python -m experiments.train --help rung=baseline; -: an empty group")


def print_rung(rung: str, tier: str, ladder: str) -> None:
    """One line a key: its value, and the layer that set it."""
    classes = {"arch": ArchConfig, "size": SizeConfig}
    values = {
        f"{section}.{name}": (leaf.default, "default")
        for section, cls in classes.items()
        for name, leaf in leaves(cls).items()
    }
    values |= {key: (value, f"tier={tier}") for key, value in TIERS[tier].items()}
    for layer in rung_layers(rung, ladder):
        values |= {key: (value, layer.name) for key, value in layer.values.items()}
    sections = [*classes, "optim"]
    for section in (*sections, None):
        for key, (value, origin) in values.items():
            head = key.partition(".")[0]
            if section == (head if head in sections else None):
                print(f"{key}={short(value)}".ljust(36) + origin)
    print(f"keys not listed have their defaults: python -m experiments.train --help rung={rung}")
