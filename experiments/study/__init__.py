"""The study: a declared grid of training runs, their learning rates, and what became of them."""
