# SPDX-License-Identifier: MIT
"""Losses as a sum and a count, and cross-entropy over a large vocabulary without ever holding all its logits.

With z the logits of one row, y its true class, V classes, and softmax over the last axis:

    cross-entropy   -ln p_y = ln sum_v exp(z_v) - z_y,   p = softmax(z)
    smoothed        -sum_v q_v ln p_v,   q = (1 - eps) onehot(y) + eps / V Szegedy et al. 2015, 1512.00567, section 7
    its gradient    dz = p - q;   with z = W x + b:   dx = W^T dz,   dW = sum dz x^T,   db = sum dz
    focal           -alpha_y (1 - p_y)^gamma ln p_y                        Lin et al. 2017, 1708.02002, equation 5
    InfoNCE         -ln softmax_j(cos(q_i, k_j) / temperature)_{j = i}     van den Oord et al. 2018, 1807.03748, eq. 4

Every function returns (loss_sum, n_terms): whoever trains adds both up over microbatches and ranks and divides once, so
that the way a batch is split cannot change its gradient. linear_cross_entropy takes the rows in chunks. Given a chunk's
logits its gradients follow at once, so the forward pass computes them too, in the same memory, and logits are formed
once only; the backward pass multiplies by the incoming number (as Hsu et al. 2024, "Liger Kernel", 2410.10989, do).

Departures: focal is over a softmax, where the paper has one sigmoid per class; for two classes with logits (0, z) they
are the same. InfoNCE compares by the cosine, as SimCLR (2002.05709) and CLIP (2103.00020) do, where the paper has a
bilinear form. Its negatives are the other rows of the batch: alone among these, it does change with the split.

    loss, count = linear_cross_entropy(hidden, head.weight, targets)      # hidden (N, C), weight (V, C), targets (N,)
    (loss / count).backward()
    loss, count = cross_entropy(logits, targets, label_smoothing=0.1)     # logits (N, V)

Letters: N rows, n of them counted, C channels, V classes, R rows in a chunk.
Every loss is in nats, in float32 or wider, whatever the inputs are; every count is a 0-dim int64 tensor.
"""

import math
import time

import torch
import torch.nn.functional as F

_CHUNK = 512  # rows: with fewer the products slow down, with more they gain nothing and the logits take more memory


def cross_entropy(logits, targets, *, label_smoothing=0.0, ignore_index=-100):
    """Cross-entropy summed over the rows that count, and their number: logits (N, V), targets int64 (N,).

    A row whose target is ignore_index has no part: its gradient is zero, whatever its logits hold. With no row left the
    sum is 0. Raises ValueError for wrong shapes and for a target that is no class. Source: 1512.00567, section 7.
    """
    _check_logits(logits)
    _check_smoothing(label_smoothing)
    kept = _counted_rows(targets, *logits.shape, ignore_index)
    z = _shifted(logits[kept])  # (n, V)
    expected = z.gather(1, targets[kept, None]).squeeze(1)  # (n,): sum_v q_v z_v
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing * z.mean(1)
    return (z.exp().sum(1).log() - expected).sum(), _count(kept)


def linear_cross_entropy(x, weight, targets, bias=None, *, label_smoothing=0.0, ignore_index=-100, chunk=None):
    """cross_entropy(x W^T + b, targets) without the (N, V) logits: x (N, C), weight (V, C), targets (N,), bias (V,).

    Gradients are exact. They are computed in the forward pass, for whichever of x, weight and bias need one and only
    where gradients are enabled. A row whose target is ignore_index has no part and costs no product.

    Beyond the gradients this holds chunk x V logits (chunk: 512 rows by default) and, in the backward pass, the
    gradients once more. Products are in the inputs' dtype or autocast's; the softmax and all sums over rows in float32
    or wider. Raises ValueError for wrong shapes or dtypes and for a target that is no class, RuntimeError when the
    backward pass is asked for a graph of itself (create_graph). Source: 2410.10989.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)}, {x.dtype}: wanted floats (rows, channels)")
    if weight.dim() != 2 or weight.size(1) != x.size(1):
        raise ValueError(f"weight of shape {tuple(weight.shape)}: wanted (classes, {x.size(1)}), as x has channels")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {tuple(bias.shape)}: wanted ({len(weight)},), one number per class")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk = {chunk!r}: wanted a whole number of rows, at least 1")
    _check_smoothing(label_smoothing)
    tensors = [x, weight] if bias is None else [x, weight, bias]
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in [t.dtype for t in tensors]:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif any(t.dtype != dtype for t in tensors):
        raise ValueError(f"x, weight and bias of {', '.join(str(t.dtype) for t in tensors)}: wanted one dtype")
    kept = _counted_rows(targets, len(x), len(weight), ignore_index)
    # Asked here: inside the function gradients are always off, and under no_grad its needs_input_grad still says True.
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    settings = float(label_smoothing), chunk or _CHUNK, dtype, wanted
    return _LinearCrossEntropy.apply(x, weight, bias, targets, kept, *settings), _count(kept)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum, and beside it the gradients. kept: the rows that count; dtype: that of products."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, kept, eps, chunk, dtype, wanted):
        (N, C), V, n = x.shape, len(weight), len(kept)
        wide = torch.promote_types(dtype, torch.float32)
        W, b = weight.to(dtype), None if bias is None else bias.to(dtype)  # themselves, unless autocast differs
        dx = x.new_zeros(N, C) if wanted[0] else None
        dW = x.new_zeros(V, C, dtype=wide) if wanted[1] else None
        db = x.new_zeros(V, dtype=wide) if wanted[2] else None
        total = x.new_zeros((), dtype=wide)
        pieces = max(1, math.ceil(n / chunk))
        # One buffer for all: pages that are new to the process cost more time than the softmax itself.
        buffer = x.new_empty(math.ceil(n / pieces), V, dtype=dtype)  # (R, V)
        for rows in kept.tensor_split(pieces):
            x_rows, z = x[rows].to(dtype), buffer[: len(rows)]  # (R, C), (R, V)
            torch.mm(x_rows, W.t(), out=z) if b is None else torch.addmm(b, x_rows, W.t(), out=z)  # (R,C) x (V,C)
            z = z.to(wide)
            z -= z.amax(1, keepdim=True)
            at = torch.arange(len(rows), device=x.device), targets[rows]  # each row's own class
            expected = (1 - eps) * z[at]  # (R,): sum_v q_v z_v
            if eps:
                expected += eps * z.mean(1)
            s = z.exp_().sum(1)  # (R,)
            total += (s.log() - expected).sum()
            if not any(wanted):
                continue
            z /= s[:, None]  # p
            z[at] -= 1 - eps
            if eps:
                z -= eps / V  # p - q
            if db is not None:
                db += z.sum(0)  # (V,)
            z = z.to(dtype)
            if dx is not None:
                dx[rows] = (z @ W).to(x.dtype)  # (R,V) x (V,C) -> (R,C)
            if dW is not None and dtype == wide:
                dW.addmm_(z.t(), x_rows)  # (V,R) x (R,C) -> (V,C)
            elif dW is not None:
                dW += z.t() @ x_rows  # (V, C): added in float32, or many chunks would lose digits
        ctx.save_for_backward(dx, dW, db)
        ctx.dtypes = [x.dtype, weight.dtype, None if bias is None else bias.dtype]
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # a second derivative would silently be zero
            raise RuntimeError("create_graph=True: first derivatives only here, wanted cross_entropy of the logits")
        # Not in place: with retain_graph=True this is called again. And rounded last: a sum may overflow float16.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if d is None else (d * grad).to(dtype) for d, dtype in pairs), *[None] * 6


def focal(logits, targets, gamma=2.0, alpha=None, ignore_index=-100):
    """Focal loss summed over the rows that count, and their number: logits (N, V), targets int64 (N,).

    gamma = 0 is cross-entropy; the larger, the less a row counts that is already right. alpha: None, or a tensor (V,),
    one weight per class. (The paper divides by the number of rows that are not background.) Raises ValueError as
    cross_entropy does, and for a negative gamma or an alpha that is no such tensor. Source: 1708.02002, equation 5.
    """
    _check_logits(logits)
    if not gamma >= 0:
        raise ValueError(f"gamma = {gamma!r}: wanted a number of at least 0")
    if alpha is not None and (not isinstance(alpha, torch.Tensor) or alpha.shape != logits.shape[1:]):
        got = f"of shape {tuple(alpha.shape)}" if isinstance(alpha, torch.Tensor) else f"= {alpha!r:.60}"
        raise ValueError(f"alpha {got}: wanted a tensor of shape ({logits.size(1)},), one weight per class")
    kept = _counted_rows(targets, *logits.shape, ignore_index)
    z, y = _shifted(logits[kept]), targets[kept]  # (n, V), (n,)
    ln_p = z.gather(1, y[:, None]).squeeze(1) - z.exp().sum(1).log()  # (n,)
    # 1 - p_y without cancellation; above 0, because the derivative of 0^gamma is infinite for gamma < 1.
    miss = -torch.expm1(ln_p).clamp_max(-torch.finfo(z.dtype).tiny)
    loss = -(miss**gamma) * ln_p
    if alpha is not None:
        loss = loss * alpha.to(loss.dtype)[y]
    return loss.sum(), _count(kept)


def info_nce(queries, keys, temperature=0.07, symmetric=False):
    """InfoNCE: each query, (N, C), must find its own key, the same row of (N, C), among all N; a sum and a count.

    Compared by the cosine, so lengths do not matter. symmetric: keys look for their queries too, as in CLIP: 2 N terms.
    ln N minus the mean is a lower bound on the mutual information, in nats. Compute it on whole batches: the other rows
    are the negatives. Raises ValueError for shapes, or a temperature not above 0. Source: 1807.03748, equation 4.
    """
    if queries.dim() != 2 or queries.shape != keys.shape:
        raise ValueError(f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}: wanted one shape (rows, channels)")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature!r}: wanted a number above 0")
    wide, N = torch.promote_types(queries.dtype, torch.float32), len(queries)
    with torch.autocast(queries.device.type, enabled=False):  # a cosine has three digits in bfloat16
        q, k = F.normalize(queries.to(wide), dim=1), F.normalize(keys.to(wide), dim=1)  # (N, C)
        z = q @ k.t() / temperature  # (N,C) x (N,C) -> (N,N): row i holds query i against every key
    own = torch.arange(N, device=z.device)  # (N,)
    if not N:
        return z.sum(), own.sum()  # a row of no keys has no largest cosine
    total, count = cross_entropy(z, own)
    if symmetric:
        back, more = cross_entropy(z.t(), own)
        total, count = total + back, count + more
    return total, count


def mse(prediction, target, mask=None):
    """Squared error summed over the numbers that count, and how many they are; prediction and target of one shape.

    mask: None, or boolean (True: counts) of a shape that broadcasts to theirs; what it hides may be NaN. In nats: up to
    a constant, this is -ln of a Gaussian density of variance 1/2. Raises ValueError when the shapes differ: broadcast
    against each other, (N,) and (N, 1) would silently make N x N differences.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"target of shape {tuple(target.shape)}: wanted that of prediction, {tuple(prediction.shape)}")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = prediction.to(wide) - target.to(wide)
    if mask is None:
        return difference.square().sum(), torch.tensor(prediction.numel(), device=prediction.device)
    try:
        counted = mask.expand(prediction.shape)
    except RuntimeError:
        counted = None
    if counted is None or mask.dtype != torch.bool:
        wanted = f"boolean, broadcasting to {tuple(prediction.shape)}"
        raise ValueError(f"mask of shape {tuple(mask.shape)}, {mask.dtype}: wanted {wanted}")
    difference = difference.where(counted, 0)  # not times the mask: 0 times NaN is NaN
    return difference.square().sum(), counted.sum()


def _shifted(z):
    """z (n, V) in float32 or wider, less each row's largest: exp cannot overflow, and no loss or gradient changes."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z - z.detach().amax(1, keepdim=True)


def _counted_rows(targets, rows, classes, ignore_index):
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets of shape {tuple(targets.shape)}, {targets.dtype}: wanted int64 of shape ({rows},)")
    kept = (targets != ignore_index).nonzero().squeeze(1)  # (n,)
    wrong = [y for y in (targets[kept].aminmax() if len(kept) else ()) if not 0 <= y < classes]
    if wrong:
        raise ValueError(f"targets hold {wrong[0]}: wanted 0 to {classes - 1}, or {ignore_index} for rows not to count")
    return kept


def _count(kept):
    return torch.tensor(len(kept), device=kept.device)


def _check_logits(logits):
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits of shape {tuple(logits.shape)}, {logits.dtype}: wanted floats (rows, classes)")


def _check_smoothing(label_smoothing):
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing = {label_smoothing!r}: wanted a number from 0 to 1")


def _demo():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logits, second = torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([1])
    print(f"p = (0.2, 0.3, 0.5), the second is true: {cross_entropy(logits, second)[0]:.4f} nats, that is -ln 0.3")
    print(f"smoothed by 0.1: {cross_entropy(logits, second, label_smoothing=0.1)[0]:.4f}")

    N, V, C = 1024, 20_000, 64
    x, W, y = torch.randn(N, C).requires_grad_(), (torch.randn(V, C) / 4).requires_grad_(), torch.randint(V, (N,))
    print(f"\n{N} rows, {V} classes, forward and backward:")
    for rows in (N, 512, 128):
        start = time.perf_counter()
        if rows == N:
            total = F.cross_entropy(x @ W.t(), y, reduction="sum")
        else:
            total, _ = linear_cross_entropy(x, W, y, chunk=rows)
        dx, dW = torch.autograd.grad(total / N, (x, W))
        took = time.perf_counter() - start
        if rows == N:
            first = dW
        apart, megabytes = (dW - first).norm() / first.norm(), rows * V * 4 / 1e6
        print(f"  {rows:4d} rows at a time, {megabytes:4.0f} MB of logits: {total / N:.5f} nats", end="")
        print(f" in {took:.2f} s, gradient {apart:.0e} from the first")

    logits, y = torch.randn(8, 5), torch.tensor([0, 1, 2, 3, 4, 0, -100, -100])
    (a, m), (b, n), (both, count) = (cross_entropy(logits[i], y[i]) for i in (slice(5), slice(5, 8), slice(8)))
    print(f"\n8 rows, 6 counted: {both / count:.4f} nats. Split in 5 + 3, where 5 and 1 count:", end=" ")
    print(f"sums over counts {(a + b) / (m + n):.4f}, mean of means {(a / m + b / n) / 2:.4f}")

    easy, hard, y = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log(), torch.tensor([0])
    for gamma in (0.0, 2.0):
        ratio = focal(hard, y, gamma)[0] / focal(easy, y, gamma)[0]
        print(f"focal, gamma {gamma:.0f}: a row with p = 0.1 costs {ratio:6.1f} times one with p = 0.9")

    keys = torch.randn(256, 32)
    for noise in (0.3, 1.0, 3.0):
        loss, count = info_nce(keys + noise * torch.randn(256, 32), keys, symmetric=True)
        bound, truth = math.log(256) - loss / count, 16 * math.log(1 + noise**-2)
        print(f"InfoNCE, noise {noise}: {loss / count:.3f} nats, so at least {bound:.3f} shared; in truth {truth:.3f}")


if __name__ == "__main__":
    _demo()
