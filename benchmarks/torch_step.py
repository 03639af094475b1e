"""The training step of the PyTorch twin: clip, Muon and Adam (ladder spec 5 and 9).

The usual PyTorch of its kind: bfloat16 autocast on CUDA over float32 master weights, a fused Adam,
and one Newton-Schulz iteration a matrix.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from optim.config import OptimConfig

NS_COEFFICIENTS, NS_EPSILON = (3.4445, -4.7750, 2.0315), 1e-7


def group_of(name: str, ndim: int) -> str:
    """The optimizer group of a parameter by its published name (ladder spec 5.3)."""
    if name.startswith("transformer.h."):
        return "matrix" if ndim == 2 else "scalar"
    if name == "skip_weights":
        return "scalar"
    return "head" if name == "lm_head.weight" else "embed"


def newton_schulz(u, steps: int, dtype):
    """The orthogonalised u (out, in) of ladder spec 5.1, in float32."""
    linear, cubic, quintic = NS_COEFFICIENTS
    x = u.to(dtype).float()
    x = (x / (x.norm() + NS_EPSILON)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x3 = gram @ x
        x5 = gram @ x3
        x = (linear * x.float() + cubic * x3.float() + quintic * x5.float()).to(dtype)
    return (x.T if tall else x).float()


class Muon:
    """Nesterov momentum in sum form, orthogonalised (ladder spec 5.1)."""

    def __init__(self, params: list[nn.Parameter], optim: OptimConfig, iterate: Callable):
        self.params, self.iterate, self.steps = params, iterate, optim.ns_steps
        self.dtype = getattr(torch, optim.ns_dtype)
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, rate: float, momentum: float) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer.mul_(momentum).add_(p.grad)
            direction = self.iterate(p.grad.add(buffer, alpha=momentum), self.steps, self.dtype)
            p.add_(direction, alpha=-rate * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


class Trainer:
    """A model with its optimizers; `step` is one whole update.

    model: (tokens, targets, window) to a mean loss, its parameters under published names. rates:
    0-based step to lr_embed, lr_head, lr_matrix, lr_scalar and momentum, as
    `optim.groups.learning_rates`. compile: model and Newton-Schulz iteration under torch.compile.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, rates: Callable, compile: bool):
        self.model, self.optim, self.rates, self.count = model, optim, rates, 0
        self.loss = torch.compile(model, dynamic=False) if compile else model
        groups: dict[str, list] = {}
        for name, p in model.named_parameters():
            groups.setdefault(group_of(name, p.ndim), []).append(p)
        self.muon = None
        if optim.matrices == "muon":
            iterate = torch.compile(newton_schulz, dynamic=False) if compile else newton_schulz
            self.muon = Muon(groups.pop("matrix"), optim, iterate)
        self.adam = torch.optim.Adam(
            [
                {"params": params, "betas": getattr(optim, f"{group}_betas"), "group": group}
                for group, params in groups.items()
            ],
            lr=0.0,
            eps=optim.eps,
            fused=True,
        )

    def step(self, batches: Mapping[str, torch.Tensor]) -> float:
        """One update from tokens (micro-batches, B, T + 1) and, where given, window (.., B).

        Returns the mean loss before the update.
        """
        loss = self.gradients(batches)
        if self.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        rates = self.rates(self.count)
        if self.muon is not None:
            self.muon.step(rates["lr_matrix"], rates["momentum"])
        for group in self.adam.param_groups:
            group["lr"] = float(rates[f"lr_{group['group']}"])
        self.adam.step()
        self.count += 1
        return loss

    def gradients(self, batches: Mapping[str, torch.Tensor]) -> float:
        """Leaves the gradients of the mean over micro-batches in the parameters; the mean loss."""
        self.model.zero_grad(set_to_none=True)
        tokens, windows = batches["tokens"], batches.get("window")
        total = 0.0
        for i, rows in enumerate(tokens):
            window = None if windows is None else windows[i]
            inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
                loss = self.loss(inputs, targets, window)
            loss.backward()
            total = total + loss.detach()
        if len(tokens) > 1:
            # afterwards, since a smaller loss would leave less of its gradient in float8
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_div_(grads, len(tokens))
        return float(total) / len(tokens)
