"""Slow float64 references of the optimizers, written as torch's loops over (out, in) weights."""

import numpy as np


def newton_schulz(u, steps):
    """Orthogonalise one torch weight (out, in) by the quintic iteration of ladder spec 5.1."""
    x = np.asarray(u, np.float64)
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ (a @ x))
    return x.T if transposed else x


def singular_value_map(values, steps):
    """Iterate the scalar polynomial that Newton-Schulz applies to each singular value."""
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


class Muon:
    """Nesterov momentum in the sum form and a Newton-Schulz step, over (out, in) weights."""

    def __init__(self, weights, steps):
        self.weights = [np.array(w, np.float64) for w in weights]
        self.buffers = [np.zeros_like(w) for w in self.weights]
        self.steps = steps

    def step(self, grads, lr, mu):
        for index, grad in enumerate(grads):
            grad = np.asarray(grad, np.float64)
            self.buffers[index] = mu * self.buffers[index] + grad
            o = newton_schulz(grad + mu * self.buffers[index], self.steps)
            fan_out, fan_in = o.shape
            self.weights[index] = self.weights[index] - lr * max(1, fan_out / fan_in) ** 0.5 * o


class AdamW:
    """torch.optim.AdamW over a list of parameters, each with its own betas, decay and rate."""

    def __init__(self, params, betas, eps, decays):
        self.params = [np.array(p, np.float64) for p in params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]
        self.betas, self.eps, self.decays = betas, eps, decays
        self.t = 0

    def step(self, grads, lrs):
        self.t += 1
        for index, (grad, lr) in enumerate(zip(grads, lrs, strict=True)):
            grad = np.asarray(grad, np.float64)
            b1, b2 = self.betas[index]
            p = self.params[index] * (1 - lr * self.decays[index])
            self.m[index] = b1 * self.m[index] + (1 - b1) * grad
            self.v[index] = b2 * self.v[index] + (1 - b2) * grad * grad
            denominator = np.sqrt(self.v[index] / (1 - b2**self.t)) + self.eps
            self.params[index] = p - lr * (self.m[index] / (1 - b1**self.t)) / denominator


def clip_gradients(grads, max_norm):
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_."""
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return [np.asarray(g, np.float64) * factor for g in grads]
