"""Muon: an optimizer whose step moves a weight matrix about equally far in every direction.

    m <- mu m + (1 - mu) g                          g gradient, mu momentum
    W <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) orth(mu m + (1 - mu) g)

    U diag(9, 1, 0.1) V'  -->  x <- a x + b xx'x + c xx'xx'x  -->  U diag(0.70, 0.75, 0.77) V'
    one direction dominates    Newton-Schulz, 5 times, on x / |x|   all move about equally far

orth(U S V') = U V' is the nearest semi-orthogonal matrix. The polynomial comes close to it with
matrix products alone: it keeps U and V and acts on each singular value by itself. Jordan's a, b, c
raise small ones fast (x 3.4445 per step) instead of converging: values oscillate around 1, within
[0.68, 1.21]. Those below 0.0015 of the matrix's Frobenius norm |x| may end lower.

For the matrices between embedding and head only. Norms and biases are vectors; embedding and
head are 2-D, but Jordan's post reports that they, too, do better with AdamW (by experiment).

Cost     2 steps (2 r^2 c + r^3) FLOPs per r x c matrix, r <= c, on every rank, against 6 r c tokens
         for forward + backward; state 4 bytes per parameter (AdamW 8); temporarily a few copies
Paper    Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, Muon is Scalable
         for LLM Training, arXiv 2502.16982 (weight decay, Distributed Muon)
Run      python muon.py            claims, a small comparison, figures/muon.png, about 15 s
         python muon.py --bench    time of a step against torch.optim.Muon
Left out matrices split over ranks (orth of a part is not a part of orth: gather first), bfloat16
         iteration (faster for large matrices where the hardware has it), convolutions
"""

import argparse
import pathlib
import statistics
import sysconfig
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# Shape letters: N matrices of one shape, r rows and c columns (nn.Linear: outputs and inputs).

COEFFICIENTS = 3.4445, -4.7750, 2.0315         # a, b, c of Jordan et al. 2024


def orthogonal(x, steps=5):                    # (N, r, c) -> (N, r, c)
    """About U V' of each matrix U S V'; float64, or float32 for every other type.
    A Frobenius norm below 1e-7 counts as 1e-7: a zero matrix stays zero, without NaN."""
    if x.dim() != 3:
        raise ValueError(f"x of shape {tuple(x.shape)} must be (N, r, c); one matrix: x[None]")
    a, b, c = COEFFICIENTS
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tall = x.shape[1] > x.shape[2]
    if tall:                                   # xx' is then c x c instead of r x r; same result
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)     # singular values <= 1: else inf
    # Autocast, torch's or one made of a torch function mode, would make the products bf16.
    with torch.autocast(x.device.type, enabled=False), torch._C.DisableTorchFunction():
        for _ in range(steps):
            gram = x @ x.mT                                                  # (N, r, r)
            powers = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)        # b xx' + c (xx')^2
            x = torch.baddbmm(x, powers, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's rule in float32, all matrices of one shape in one batched iteration.

    Why not torch's own: its bfloat16 magnifies differences in rounding, such as between 1 and N
    processes, and moves W along directions that the gradient lacks (see the demo); CPUs without
    bfloat16 instructions emulate it. Where they exist, torch's may be faster (--bench).
    params  2-D tensors or groups of them, whole on this rank; those without .grad are skipped
    stacks  also take (..., r, c): a stack of matrices, such as experts. Not so a convolution's
            kernel: hence the switch. An expert without tokens goes on by its momentum: a step is as
            long as ever until that is 0, which AdamW's steps reach sooner
    lr      length of a step along each direction, times sqrt(r / c) if r > c: for inputs in random
            directions the outputs then change by about lr times the inputs' RMS, whatever r and c
    State: "momentum", one tensor like the parameter.
    ValueError: parameter no matrix, lr or weight_decay < 0, momentum outside [0, 1), ns_steps < 1.
    """

    def __init__(self, params, lr=0.02, momentum=0.9, ns_steps=5, weight_decay=0.0, stacks=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps,
                                      weight_decay=weight_decay, stacks=stacks))

    def add_param_group(self, param_group):    # the constructor calls this for every group
        super().add_param_group(param_group)
        group = self.param_groups.pop()        # back only when it is valid
        for p in group["params"]:
            if p.dim() < 2 or p.dim() > 2 and not group["stacks"]:
                raise ValueError(f"parameter of shape {tuple(p.shape)}: Muon needs 2-D matrices; "
                                 "give this one to AdamW")
        for name in "lr", "weight_decay":
            if not group[name] >= 0:
                raise ValueError(f"{name}={group[name]} must be 0 or more")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']} must be in [0, 1), such as 0.9")
        if group["ns_steps"] < 1:
            raise ValueError(f"ns_steps={group['ns_steps']} must be 1 or more, such as 5")
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns closure(), if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches = {}
            for p in group["params"]:
                if p.grad is not None:
                    batches.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for params in batches.values():
                self._update(params, group)
        return loss

    def _update(self, params, group):          # params: N of one shape, dtype and device
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        average = [self.state[p]["momentum"] for p in params]
        # Jordan's m <- mu m + g is this one over 1 - mu, a factor that orth removes.
        torch._foreach_lerp_(average, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, average, group["momentum"])       # Nesterov
        stack = torch.stack(ahead)
        r, c = stack.shape[-2:]
        update = orthogonal(stack.view(-1, r, c), group["ns_steps"]).view(stack.shape)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update), alpha=-group["lr"] * max(1, r / c) ** 0.5)


def orthogonal_reference(x):                   # (N, r, c) -> (N, r, c), float64
    """The definition: all singular values replaced by 1."""
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)
    return U @ V


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def movement(cls, gradients, **settings):
    """How far `cls` moves weights of 0.1. gradients: per step a list with one for each weight."""
    params = [nn.Parameter(torch.full_like(g, 0.1)) for g in gradients[0]]
    optimizer = cls(params, **settings)
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() - 0.1 for p in params]


def difference(xs, ys):                        # |x - y| / |y|, the largest of the pairs
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(xs, ys)]).max().item()


def demo_math():
    torch.manual_seed(0)
    shapes = (128, 128), (312, 128), (128, 312)
    square, wide = torch.randn(3, 128, 128), torch.randn(3, 128, 312)
    U, S, V = torch.linalg.svd(wide, full_matrices=False)
    ill = U @ torch.logspace(0, -2, 128).diag() @ V                      # condition number 100
    for name, x in ("random 128 x 312", wide), ("condition 100", ill), ("random 128 x 128", square):
        o, want = orthogonal(x), orthogonal_reference(x)
        values = torch.linalg.svdvals(o)
        low = (values < 0.68).float().mean().item()
        check(values.max() <= 1.21 and low <= 0.03, f"{name}: singular values, share below 0.68",
              f"{values.min():.2f} to {values.max():.2f} (<= 1.21), {low:.1%} (<= 3%)")
        cosine = F.cosine_similarity(o.flatten(1), want.flatten(1)).min().item()
        check(cosine >= 0.97, f"{name}: cosine with U V' of the SVD", f"{cosine:.3f} (>= 0.97)")
    xs = [torch.randn(2, *shape) for shape in shapes]
    error = difference([orthogonal(x.mT) for x in xs], [orthogonal(x).mT for x in xs])
    check(error <= 1e-4, "orthogonal(x') = orthogonal(x)': square, tall, wide",
          f"{error:.0e} (<= 1e-4)")

    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(5)]
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    error = difference(*(movement(cls, gradients, **settings) for cls in (Muon, torch.optim.Muon)))
    check(error <= 0.03, "5 steps = torch.optim.Muon's up to bfloat16", f"{error:.3f} (<= 0.03)")
    once = dict(lr=1, momentum=0, weight_decay=0)
    still = movement(Muon, [[torch.zeros(128, 312)]], **once)[0].abs().max().item()
    check(still == 0, "a zero gradient moves nothing", f"{still:g} (0)")
    thin, full = torch.randn(128, 5) @ torch.randn(5, 312), torch.randn(128, 312)      # rank 5, 128
    nudged = full * (1 + 1e-6 * torch.randn(128, 312))
    null, drift = [], []
    for cls in Muon, torch.optim.Muon:
        x, y, z = (movement(cls, [[g]], **once)[0] for g in (thin, full, nudged))
        null.append(torch.linalg.svdvals(x)[5].item())
        drift.append(difference([z], [y]))
    check(null[0] <= 1e-3, "gradient of rank 5: longest step outside its 5 directions",
          f"{null[0]:.0e} (<= 1e-3), torch's {null[1]:.2f}")
    check(drift[0] <= 1e-4, "gradient rounded differently (1e-6): change of the update",
          f"{drift[0]:.0e} (<= 1e-4), torch's {drift[1]:.0e}")


def learn(data, held_out, lr, with_muon):      # data, held_out: (windows, 17) bytes
    """Predict a byte from 16 before it, 150 steps. -> held-out loss, AdamW, last hidden matrix."""
    torch.manual_seed(0)
    layers = [nn.Embedding(256, 16), nn.Flatten()]
    for inputs in 256, 128, 128:
        layers += [nn.Linear(inputs, 128, bias=False), nn.GELU(), nn.RMSNorm(128)]
    model = nn.Sequential(*layers, nn.Linear(128, 256))
    hidden = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    if with_muon:
        optimizers = [torch.optim.AdamW(others, lr=4e-3, weight_decay=0), Muon(hidden, lr=lr)]
    else:
        optimizers = [torch.optim.AdamW(others + hidden, lr=lr, weight_decay=0)]
    decay = [torch.optim.lr_scheduler.LinearLR(o, 1, 1 / 150, 149) for o in optimizers]
    for _ in range(150):
        batch = data[torch.randint(len(data), (256,))]
        model.zero_grad()
        F.cross_entropy(model(batch[:, :16]), batch[:, 16]).backward()
        for each in optimizers + decay:
            each.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(held_out[:, :16]), held_out[:, 16]).item()
    return loss, optimizers[0], hidden[-1]


def demo_learning():
    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data, held_out = (torch.tensor(list(b"".join(f.read_bytes() for f in half))).unfold(0, 17, 1)
                      for half in (files[1::2], files[::2]))
    print("\nnats per held-out byte of Python's library: tiny network, 150 steps, one seed")
    best = {}
    for name, rates in ("AdamW", (2e-3, 6e-3, 18e-3)), ("Muon", (0.015, 0.05, 0.15)):
        runs = [learn(data, held_out[::len(held_out) // 8192], lr, name == "Muon") for lr in rates]
        print(f"     {name:<6}", *(f"  lr {lr:g}: {run[0]:.3f}" for lr, run in zip(rates, runs)))
        best[name] = min(runs, key=lambda run: run[0])
    gain = best["AdamW"][0] - best["Muon"][0]
    check(gain >= 0.05, "Muon (AdamW for the rest) is ahead, each at its best lr",
          f"{gain:.3f} nats (>= 0.05)")
    _, adamw, weight = best["AdamW"]
    return adamw.state[weight]


def draw(state):
    """The momentum of one trained matrix, and the directions of the steps made from it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    momentum, rms = state["exp_avg"], state["exp_avg_sq"].sqrt() + 1e-8
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, color, place, x in (
            ("Muon: orthogonal(momentum)", "C0", (30, 1.1), orthogonal(momentum[None])[0]),
            ("AdamW: momentum / RMS of each entry", "C1", (50, 0.08), momentum / rms),
            ("SGD: the momentum", "C2", (8, 0.01), momentum)):
        values = torch.linalg.svdvals(x)
        axes.plot(range(1, len(values) + 1), values / values[0], color)
        axes.annotate(name, place, color=color)
    axes.set(yscale="log", ylim=(1e-3, 2), xlabel="direction (index of the singular value)",
             ylabel="step along it, relative to the longest",
             title="One step of one matrix: Muon moves most directions about equally")
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "muon.png")


def demo():
    demo_math()
    draw(demo_learning())
    print("\none matrix, one step: tokens per rank   GFLOPs: forward + backward    Muon    ratio")
    for r, c, tokens in (128, 312, 768), (768, 3072, 65536), (4096, 4096, 65536):
        work, muon = 6 * r * c * tokens / 1e9, 2 * 5 * (2 * r * r * c + r ** 3) / 1e9
        print(f"     {r:5} x {c:<5}{tokens:21}{work:29,.1f}{muon:8,.1f}{muon / work:9.1%}")
    print("bytes of state per float32 parameter: Muon 4, AdamW 8")


def bench():
    """step() in alternation with torch.optim.Muon's: medians of 9, after 2 of warm-up."""
    for device in ["cpu", "cuda"][:1 + torch.cuda.is_available()]:
        for shapes in [(128, 128)] * 16 + [(312, 128)] * 8 + [(128, 312)] * 4, [(512, 512)] * 2:
            params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizers, times = [Muon(params), torch.optim.Muon(params)], ([], [])
            for _ in range(11):
                for optimizer, row in zip(optimizers, times):
                    start = time.perf_counter()
                    optimizer.step()
                    params[-1].sum().item()    # on CUDA: wait until the step is done
                    row.append(1e3 * (time.perf_counter() - start))
            ours, theirs = (statistics.median(row[2:]) for row in times)
            print(f"{device}, {len(shapes):2} matrices from {shapes[0]}: this file {ours:.2f} ms, "
                  f"torch.optim.Muon {theirs:.2f} ms, torch / this file {theirs / ours:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Muon: claims and figure, or timing")
    parser.add_argument("--bench", action="store_true", help="milliseconds of a step, median of 9")
    if parser.parse_args().bench:
        bench()
    else:
        demo()
