"""The tasks of the toy study as data: every knob of their laws, readable without importing jax.

The defaults are the published ones (toy spec section 1), and the classic ones for GrokConfig.
"""

from math import inf
from typing import Literal

import chz


def is_prime(c: int) -> bool:
    """Tells whether a modulus is prime."""
    return c > 1 and all(c % divisor for divisor in range(2, int(c**0.5) + 1))


def _check_counts(config, names: tuple[str, ...], least: int) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: give at least {least}")


def _check_finite(config, names: tuple[str, ...]) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < inf:
            raise ValueError(f"{name}={getattr(config, name)}: give a finite number from 0 on")


def _check_freedom(name: str, value: float | None, otherwise: str) -> None:
    if value is not None and not 2 < value < inf:
        raise ValueError(
            f"{name}={value}: unit variance needs more than 2 degrees of freedom; "
            f"give a finite number above 2, or {otherwise}"
        )


@chz.chz
class BandedConfig:
    """Modular walks in bands [o, o + c) of a vocabulary (toy spec 1.1)."""

    vocab_size: int = chz.field(default=1024, doc="tokens 0 to vocab_size - 1")
    seq_len: int = chz.field(default=64, doc="targets in a sequence, which has one token more")
    c_min: int = chz.field(default=5, doc="least modulus; the greatest is vocab_size")
    zipf_c: float = chz.field(default=1.3, doc="P(c) falls as c to this power")
    zipf_o: float = chz.field(default=1.2, doc="P(o) falls as o + 1 to this power")
    min_step_frac: float = chz.field(default=0.125, doc="least step as a share of the modulus")
    non_coprime: float = chz.field(
        default=0.3, doc="chance that a step becomes a multiple of a divisor of its modulus"
    )
    mix_min: int = chz.field(default=1, doc="fewest walks averaged in a sequence")
    mix_max: int = chz.field(default=1, doc="most walks averaged in a sequence")
    component_weight_pareto_alpha: float | None = chz.field(
        default=None, doc="weights are 1 + Lomax(this); none: equal weights"
    )
    token_noise_std: float = chz.field(default=0.0, doc="noise on tokens before rounding")
    token_noise_df: float | None = chz.field(
        default=3.0, doc="Student degrees of freedom of that noise; none: normal"
    )
    train: int = chz.field(default=32_000, doc="training sequences")
    val: int = chz.field(default=2048, doc="validation sequences")
    test: int = chz.field(default=4096, doc="test sequences")

    @chz.validate
    def _ranges(self):
        # a modulus of 1 has no step
        _check_counts(self, ("vocab_size", "c_min"), 2)
        _check_counts(self, ("seq_len", "mix_min", "train", "val", "test"), 1)
        _check_finite(self, ("zipf_c", "zipf_o", "token_noise_std"))
        if self.c_min > self.vocab_size:
            raise ValueError(
                f"c_min={self.c_min} is above vocab_size={self.vocab_size}; "
                f"lower c_min, or raise vocab_size"
            )
        if self.mix_max < self.mix_min:
            raise ValueError(
                f"mix_max={self.mix_max} is below mix_min={self.mix_min}; give at least mix_min"
            )
        if not 0 <= self.min_step_frac < 1:
            raise ValueError(
                f"min_step_frac={self.min_step_frac}: give a share from 0 to below 1; "
                f"steps are smaller than the modulus"
            )
        if not 0 <= self.non_coprime <= 1:
            raise ValueError(f"non_coprime={self.non_coprime}: give a probability, 0 to 1")
        alpha = self.component_weight_pareto_alpha
        if alpha is not None and not 0 < alpha < inf:
            raise ValueError(
                f"component_weight_pareto_alpha={alpha}: give a positive finite number, or none"
            )
        _check_freedom("token_noise_df", self.token_noise_df, "none for normal noise")


@chz.chz
class GrokConfig:
    """One operation on all pairs of residues, part of them held out (arXiv 2201.02177)."""

    p: int = chz.field(default=97, doc="modulus; numbers are tokens 0 to p - 1, '=' is token p")
    operation: Literal["add", "subtract", "multiply"] = chz.field(
        default="add", doc="what is done to a pair modulo p"
    )
    train_fraction: float = chz.field(default=0.3, doc="share of the p^2 pairs trained on")

    @property
    def vocab_size(self) -> int:
        return self.p + 1

    @property
    def train(self) -> int:
        """Number of training pairs, rounded down."""
        return int(self.train_fraction * self.p**2)

    @chz.validate
    def _ranges(self):
        _check_counts(self, ("p",), 2)
        if self.operation == "multiply" and not is_prime(self.p):
            raise ValueError(
                f"p={self.p} with operation=multiply: give a prime p, such as 97; the modes are "
                f"those of its group of numbers 1 to p - 1"
            )
        if not 0 < self.train_fraction < 1 or not 0 < self.train < self.p**2:
            raise ValueError(
                f"train_fraction={self.train_fraction} of {self.p**2} pairs: give a share between "
                f"0 and 1 that leaves at least one pair to train on and one to validate"
            )


@chz.chz
class RffConfig:
    """Regression on random Fourier features averaged over a sequence (toy spec 1.2)."""

    track: Literal["A", "B"] = chz.field(
        default="A", doc="model: A a transformer on the features, B linear in their mean"
    )
    input_dim: int = chz.field(default=8, doc="width of a latent vector")
    seq_len: int = chz.field(default=16, doc="latent vectors in a sequence")
    num_features: int = chz.field(default=512, doc="random Fourier features of the teacher")
    sigma: float = chz.field(default=1.0, doc="standard deviation of the frequencies")
    beta: float = chz.field(default=1.5, doc="teacher coefficients fall as rank to this power")
    latent: Literal["gaussian", "uniform", "student_t"] = chz.field(
        default="gaussian", doc="law of each latent coordinate, at unit variance"
    )
    student_df: float = chz.field(default=3.0, doc="degrees of freedom of student_t latents")
    gamma: float = chz.field(
        default=0.0, doc="variances of the coordinates fall as rank to this power; 0: isotropic"
    )
    noise_std: float = chz.field(default=0.02, doc="noise on targets")
    train: int = chz.field(default=32_000, doc="training sequences")
    val: int = chz.field(default=2048, doc="validation sequences")
    test: int = chz.field(default=4096, doc="test sequences")

    @chz.validate
    def _ranges(self):
        _check_counts(
            self, ("input_dim", "seq_len", "num_features", "train", "val", "test"), least=1
        )
        _check_finite(self, ("sigma", "beta", "gamma", "noise_std"))
        _check_freedom("student_df", self.student_df, "choose another latent")
