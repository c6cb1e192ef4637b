# SPDX-License-Identifier: MIT
"""Optimisers: SGD with momentum, Adam, AdamW and Muon, with two learning-rate schedules and the choice of what decays.

All follow one pattern: keep running averages of the gradient, turn them into an update, subtract it.

    SGD     b <- mu b + g                                     Polyak 1964; Sutskever et al. 2013 for Nesterov's form
            W <- W - lr b,   Nesterov: W <- W - lr (g + mu b)
    Adam    m <- b1 m + (1 - b1) g                            Kingma & Ba 2014, arXiv 1412.6980, algorithm 1
            v <- b2 v + (1 - b2) g^2
            W <- W - lr m^ / (sqrt(v^) + eps),   m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)
    AdamW   W <- (1 - lr decay) W, then Adam's update         Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2
    Muon    M <- mu M + (1 - mu) G,  N = mu M + (1 - mu) G    Jordan et al. 2024, kellerjordan.github.io/posts/muon
            W <- (1 - lr decay) W - lr 0.2 sqrt(max(out, in)) orthogonalise(N)     scale: Liu et al. 2025, 2502.16982

Departures. AdamW's decay is multiplied by the learning rate, as everywhere today (the paper multiplies by the schedule
alone). Muon averages the gradients, where the original sums them: orthogonalise() forgets the factor 1 - mu.
Muon's original scale is sqrt(max(1, out/in)), and needs a learning rate of its own, about 0.02. We take the later one:
an orthogonal (out, in) matrix has entries of root mean square 1/sqrt(max(out, in)), so that the factor makes it 0.2
(0.17 with singular values from five rounds), near AdamW's. One learning rate, decay and schedule then serve both kinds
of group, and one optimiser object, hence one checkpoint, holds both.

A loop over the parameters, not torch._foreach_*: on a CPU the arithmetic costs more than the calls, and the loop keeps
one temporary alive instead of one for every parameter. The state has the keys and shapes of torch.optim's, so where
the step's share matters, torch.optim.AdamW(groups, fused=True) is 2 to 3 times faster and can take over in mid-run.

    optimizer = AdamW(decay_groups(model, weight_decay=0.1), betas=(0.9, 0.95))  # or Muon(muon_groups(model, 0.1))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * cosine_schedule(step, total=2000, warmup=100)

Letters: g, G a gradient; W a weight (out, in); t the number of steps of that one parameter, from 1.
"""

import math
import numbers

import torch
from torch import Tensor, nn, optim

# PyTorch's class without the wrappers whose first call imports torch._dynamo, half as long as importing torch itself.
_WRAPPED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_Optimizer = type("_Optimizer", (optim.Optimizer,), {f: getattr(optim.Optimizer, f).__wrapped__ for f in _WRAPPED})


def _check(name: str, group: dict) -> None:
    """Refuses, in one line, settings that would silently diverge, and parameters that these formulas do not serve."""
    limits = {"lr": math.inf, "eps": math.inf, "weight_decay": math.inf, "momentum": 1, "betas": 1}
    for key in (key for key in limits if key in group):
        value, pair = group[key], key == "betas"
        parts = list(value) if pair and isinstance(value, (tuple, list)) else [value]
        if len(parts) != 1 + pair or not all(isinstance(x, numbers.Real) and 0 <= x < limits[key] for x in parts):
            wanted = "a pair of numbers" if pair else "a number"
            raise ValueError(f"{name}: {key} must be {wanted} in [0, {limits[key]}), got {value!r}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"{name}: parameters must be real floating point, got {p.dtype} of shape {tuple(p.shape)}")


def _with_grad(name: str, group: dict) -> list[Tensor]:
    """The parameters of the group that have a gradient; one without keeps its value, averages and step count."""
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        if p.grad.layout != torch.strided:
            raise ValueError(f"{name}: gradients must be dense, got {p.grad.layout} for shape {tuple(p.shape)}")
    return params


class SGD(_Optimizer):
    """Gradient descent with momentum. `nesterov` takes the gradient's step from where momentum is about to carry us.

    weight_decay is an L2 penalty in the gradient, as in torch.optim.SGD (without momentum the same as decoupled decay).
    State of a parameter: "momentum_buffer" (its shape and dtype), only with momentum.
    ValueError for a setting out of range or a sparse gradient; TypeError for integer or complex parameters.
    """

    def __init__(self, params, lr=1e-2, momentum=0.0, nesterov=False, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay))

    def add_param_group(self, group):
        super().add_param_group(group)
        _check("SGD", self.param_groups[-1])
        if self.param_groups[-1]["nesterov"] and not self.param_groups[-1]["momentum"]:
            raise ValueError("SGD: nesterov=True needs momentum > 0, got momentum=0")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in _with_grad("SGD", group):
                update = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                if group["momentum"]:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                    update = update.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
                p.add_(update, alpha=-group["lr"])
        return loss


def _adam(p: Tensor, state: dict, group: dict, decoupled: bool) -> None:
    """One step of Adam (L2 penalty in the gradient) or AdamW (decoupled decay) for one parameter, in place."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    beta1, beta2 = group["betas"]
    # A plain number: on a GPU a tensor would have to be read back. int() also takes the tensor that torch.optim keeps.
    # It counts this parameter's own steps: the bias correction of one without a gradient must stand still.
    t = state["step"] = int(state["step"]) + 1
    grad = p.grad
    if decoupled:
        p.mul_(1 - group["lr"] * group["weight_decay"])
    elif group["weight_decay"]:
        grad = grad.add(p, alpha=group["weight_decay"])
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # eps is added after the bias correction: added before it, it would weigh 30 times more at t = 1 (beta2 = 0.999).
    denominator = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
    p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**t))


class Adam(_Optimizer):
    """Adam. weight_decay is an L2 penalty in the gradient, hence divided by sqrt(v^) as well: see AdamW.

    State of a parameter: "step" (int), "exp_avg" and "exp_avg_sq" (its shape and dtype; so keep trained weights in
    float32: in bfloat16 0.999 v rounds back to v, which then never decays).
    ValueError for a setting out of range or a sparse gradient; TypeError for integer or complex parameters.
    """

    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, group):
        super().add_param_group(group)
        _check(type(self).__name__, self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in _with_grad(type(self).__name__, group):
                _adam(p, self.state[p], group, self.decoupled)
        return loss


class AdamW(Adam):
    """Adam with decoupled weight decay: every weight shrinks by the factor 1 - lr * weight_decay at every step.

    As an L2 penalty, decay would be divided by sqrt(v^): the weights with the largest gradients would decay the least.
    """

    decoupled = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr, betas, eps, weight_decay)


def orthogonalise(G: Tensor) -> Tensor:
    """U V^T of G = U S V^T, roughly: singular values become numbers between 0.68 and 1.21 instead of 1.

    Five rounds of X <- a X + (b A + c A^2) X with A = X X^T (Newton-Schulz, of degree 5) apply the odd polynomial
    a s + b s^3 + c s^5 to each singular value s and leave U and V alone. The coefficients are Jordan's: they trade
    convergence to 1 for a slope of 3.4 at 0, so that values down to 0.002 of the norm of G arrive within 5 rounds.
    Smaller ones are lifted 485 times, and zero stays zero.

    G: (out, in), any float dtype; returns the same shape, in float32 (float64 for float64, bfloat16 on a GPU, where
    tensor cores make it cheap; on a CPU without them it is the slower one).
    """
    X = G.bfloat16() if G.is_cuda else G.to(torch.promote_types(G.dtype, torch.float32))
    tall = G.shape[0] > G.shape[1]
    X = X.T if tall else X  # (min, max), so that X X^T is the smaller of the two Gram matrices
    X = X / X.norm().clamp(min=1e-7)  # the Frobenius norm bounds the largest singular value, which must not exceed 1
    for _ in range(5):
        A = X @ X.T  # (min, min)
        X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)  # (min, max)
    return X.T if tall else X  # (out, in)


class Muon(_Optimizer):
    """Muon for the matrices of the hidden layers, AdamW for all else, in one object: use it with `muon_groups`.

    A group with use_muon=True holds matrices (out, in); one with use_muon=False is AdamW's, with its betas and eps.
    Why: the update of a matrix has a few large singular values; made orthogonal it moves all directions alike. That
    holds for a matrix that maps features to features. The rows of an embedding are looked up, not multiplied. A fused
    (3 C, C) projection is made orthogonal as a whole; three separate matrices would be served better.

    State: "momentum_buffer", or as Adam. ValueError for a setting out of range, a sparse gradient, or a parameter that
    is not a matrix in a group with use_muon=True; TypeError for integer or complex parameters.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, use_muon=True):
        defaults = dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, use_muon=use_muon)
        super().__init__(params, defaults)

    def add_param_group(self, group):
        super().add_param_group(group)
        _check("Muon", self.param_groups[-1])
        for p in self.param_groups[-1]["params"]:
            if self.param_groups[-1]["use_muon"] and p.ndim != 2:
                raise ValueError(f"Muon: use_muon=True needs matrices (see muon_groups), got shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in _with_grad("Muon", group):
                state = self.state[p]
                if not group["use_muon"]:
                    _adam(p, state, group, decoupled=True)
                    continue
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                M = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(M, group["momentum"]))  # Nesterov's form
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
        return loss


def _split(model: nn.Module) -> tuple[list, list]:
    """(name, parameter) of what decays and of what does not, in the model's order; only what requires a gradient."""
    # Found by module, not by name: a tied embedding may carry the head's name, and a norm's gain may be a matrix.
    exempt = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Norm" in type(module).__name__
        for p in module.parameters(recurse=False)
    }
    decayed, rest = [], []
    for name, p in model.named_parameters():  # names a tied parameter once
        if p.requires_grad:
            (rest if p.ndim < 2 or id(p) in exempt or name.endswith("bias") else decayed).append((name, p))
    if not decayed and not rest:
        raise ValueError(f"model: {type(model).__name__} has no parameter that requires a gradient")
    return decayed, rest


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, for any optimiser here or in torch.optim: the weights of linear and other maps decay, the rest not.

    Not decayed: biases and gains of norms, which are few, and which decay would pull to 0 where neutral is 1 for a
    gain; and embeddings, with a tied head. A row whose token is absent from the batch has no gradient but would decay,
    so that rare tokens fade for being rare; and small embeddings make for large gradients below the first norm (OLMo 2,
    arXiv 2501.00656). A tied parameter appears once. An empty group is left out. ValueError if nothing is trainable.
    """
    decayed, rest = _split(model)
    groups = ((decayed, weight_decay), (rest, 0.0))
    return [{"params": [p for _, p in named], "weight_decay": decay} for named, decay in groups if named]


def muon_groups(model: nn.Module, weight_decay: float, heads=("lm_head", "head", "classifier")) -> list[dict]:
    """`decay_groups` for Muon, with the hidden layers' matrices in a group of their own; the others are AdamW's.

    heads: names of output layers, as parts of the dotted name. A head maps features to classes, whose rows are as
    separate as an embedding's: it stays with AdamW (Jordan et al. 2024).
    """
    decayed, rest = _split(model)
    hidden = [p for name, p in decayed if p.ndim == 2 and not set(heads) & set(name.split("."))]
    others = [p for name, p in decayed if p.ndim != 2 or set(heads) & set(name.split("."))]
    groups = ((hidden, weight_decay, True), (others, weight_decay, False), ([p for _, p in rest], 0.0, False))
    return [{"params": ps, "weight_decay": decay, "use_muon": muon} for ps, decay, muon in groups if ps]


def cosine_schedule(step: int, total: int, warmup: int, floor: float = 0.1) -> float:
    """Factor of the peak learning rate at `step` = 0 ... total - 1: a linear rise, then half a cosine down to `floor`.

    The first step is already 1/(warmup + 1) of the peak, not 0, which would waste a batch. Past `total` it stays at
    `floor` (SGDR: Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5, without restarts). ValueError out of range.
    """
    if step < 0 or not 0 <= warmup <= total or not 0 <= floor <= 1:
        wanted = "step >= 0, 0 <= warmup <= total and 0 <= floor <= 1"
        raise ValueError(f"cosine_schedule: wanted {wanted}, got {step=}, {total=}, {warmup=}, {floor=}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step >= total:
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def transformer_schedule(step: int, d_model: int, warmup: int) -> float:
    """Learning rate of "Attention Is All You Need" (Vaswani et al. 2017, arXiv 1706.03762, eq. 3) at `step` = 0, 1, ...

    d_model^-1/2 min(s^-1/2, s warmup^-3/2) with s = step + 1, for the paper counts from 1: a linear rise to
    1/sqrt(d_model warmup), then 1/sqrt(s). Made for Adam with betas=(0.9, 0.98), eps=1e-9. ValueError out of range.
    """
    if step < 0 or d_model < 1 or warmup < 1:
        raise ValueError(f"transformer_schedule: {step=}, {d_model=}, {warmup=} must be at least 0, 1 and 1")
    return d_model**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup**-1.5)


def _demo() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("1. A bowl 1,000 times steeper one way than another: the part of the loss left after 300 steps")
    n, kappa, root = 20, 1000.0, math.sqrt(1000.0)
    curvature, axes = torch.logspace(0, 3, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    rotated = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    for name, make in (  # the textbook's best settings for a quadratic; Adam's by trial
        ("SGD", lambda p: SGD(p, lr=2 / (kappa + 1))),
        ("SGD, momentum", lambda p: SGD(p, lr=4 / (root + 1) ** 2, momentum=((root - 1) / (root + 1)) ** 2)),
        ("SGD, Nesterov", lambda p: SGD(p, lr=1 / kappa, momentum=(root - 1) / (root + 1), nesterov=True)),
        ("Adam", lambda p: Adam(p, lr=0.05)),
    ):
        left = []
        for basis in (axes, rotated):
            H = basis * curvature @ basis.T
            optimizer = make([x := nn.Parameter(basis @ (2 / (n * curvature)).sqrt())])  # 1/n of the loss each way
            for _ in range(300):
                x.grad = H @ x.detach()
                optimizer.step()
            left.append(0.5 * (x @ H @ x).item())
        print(f"   {name:14}{left[0]:8.1e} along the axes, {left[1]:8.1e} rotated")
    print("2. Decay 0.1 of two weights 1 with gradients of +-1 and +-100, after 1,000 steps of 1e-3; e^-0.1 is 0.905")
    for make in (AdamW, Adam):
        optimizer = make([w := nn.Parameter(torch.ones(2))], weight_decay=0.1)
        for i in range(1000):
            w.grad = torch.tensor([1.0, 100.0]) * (-1) ** i
            optimizer.step()
        print(f"   {make.__name__:14}{w[0].item():.3f} and {w[1].item():.3f}")
    mix, teacher, scale = torch.linalg.qr(torch.randn(32, 32))[0], torch.randn(32, 8) / 32**0.5, 1 / torch.arange(1, 33)

    def batch(n):
        z = torch.randn(n, 32)
        return z * scale / scale.square().mean().sqrt() @ mix, torch.sin(2 * z @ teacher)

    print(f"3. Inputs of unequal scale, 32 -> 64 -> 64 -> 8, 300 steps; guessing 0 costs {batch(9999)[1].var():.3f}")
    for name, rates, make in (
        ("SGD, momentum", (0.1, 0.3, 1.0), lambda model: SGD(decay_groups(model, 0.0), momentum=0.9)),
        ("AdamW", (0.01, 0.03, 0.1), lambda model: AdamW(decay_groups(model, 0.01), betas=(0.9, 0.95))),
        ("Muon", (0.01, 0.03, 0.1), lambda model: Muon(muon_groups(model, 0.01, heads=("4",)))),
    ):
        errors = []
        for lr in rates:
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
            optimizer = make(model)
            for step in range(300):
                for group in optimizer.param_groups:
                    group["lr"] = lr * cosine_schedule(step, total=300, warmup=10)
                x, y = batch(128)
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
            x, y = batch(2048)
            errors.append(f"{(model(x) - y).square().mean().item():.3f} (lr {lr})")
        print(f"   {name:14}{'  '.join(errors)}")


if __name__ == "__main__":
    _demo()
