"""Settings of every test: implicit rank promotion is an error, and nothing asks for a network."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
