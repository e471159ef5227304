"""The loss of a large vocabulary without its logits: a few tokens at a time, gradients at once.

    z = W x    loss = mean over tokens of  log sum_v exp(z_v) - z_target    dz = softmax(z) - onehot

    x        (N, C)   +- tokens 0 ..   -> z (chunk, V) -> dz -> their dx, dW += dz' x -> freed
    targets  (N,)     +- the next      -> z (chunk, V) -> dz -> their dx, dW += dz' x -> freed
                      +- ...              backward: dx and dW times the gradient of the loss

The logits of N = 16 x 1024 tokens and V = 50304 are 1.6 GB in bf16, as much again for their
gradient; in fp32, which the sum over V wants, twice that. Yet dz needs nothing but z: the loss
comes last, so all that backward brings to it is one number, a factor. So each chunk is done with
before the next begins: forward makes the gradients, too, and backward multiplies them.

The factor 1 / N of a mean waits for backward. dz / N is about 1e-9 for most of 50304 entries, which
fp16 holds as 0; and a loss scale, which is there to prevent that, also comes from above the loss.
(In fp16 a chunk's dz' x is a sum over its tokens, and must stay below 65504: chunks of thousands.)

Cost     FLOPs: those of logits, 6 N V C with the backward. Memory: dx (N C) and dW (V C, in fp32),
         twice in backward (of 16 bits up to five times), and three times a chunk's logits in fp32,
         instead of three times N V. dW is read and written once a chunk, 8 V C bytes: small chunks
         cost time
Paper    Hsu et al. 2024, Liger Kernel (FusedLinearCrossEntropy: these chunks, but 1 / N in dz);
         Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models (further: logits
         never leave the chip)
Run      python loss.py            claims and figures/loss.png, about 8 s
         python loss.py --bench    time and memory beside whole logits and torch's own
Left out label smoothing, second derivatives, biases, a vocabulary split over ranks (tp.py: a rank
         has few logits there)
"""

import argparse
import math
import pathlib

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

# Shape letters: N tokens, C width, V vocabulary.


def nats_and_dz(z, targets, ignore_index):
    """Logits z (n, V), targets (n,) -> the sum of their losses, float32 or wider, and its gradient
    dz (n, V) in z's type. A target of ignore_index counts in neither."""
    counted = (targets != ignore_index).unsqueeze(-1)
    label = targets.unsqueeze(-1).where(counted, 0)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))    # sums over V in 16 bits lose
    log_sum = wide.logsumexp(-1, keepdim=True)
    nats = (log_sum - wide.gather(-1, label)).where(counted, 0).sum()
    dz = (wide - log_sum.where(counted, math.inf)).exp_()       # exp(-inf): 0 where none counts
    if torch.compiler.is_compiling():           # one pass over V; a scatter would make it three
        dz = dz - (torch.arange(z.shape[-1], device=z.device) == label.where(counted, -1)).to(dz)
    else:                                       # in place: no matrix of V columns more
        dz.scatter_add_(-1, label, -counted.to(dz.dtype))
    return nats, dz.to(z.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Forward makes the gradients of the SUM of losses; the mean's 1 / N comes in backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, ignore_index, per_chunk):
        want_dx, want_dw = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight.dtype, torch.float32)
        dx = torch.empty_like(x) if want_dx else None
        dw = torch.zeros_like(weight, dtype=wide) if want_dw else None
        nats = torch.zeros((), dtype=wide, device=x.device)
        for i in range(0, len(x), chunk):
            part = x[i:i + chunk]
            z = F.linear(part, weight)                          # (chunk, V): the only logits
            some, dz = per_chunk(z, targets[i:i + chunk], ignore_index)
            nats = nats + some
            if want_dx:
                dx[i:i + chunk] = dz @ weight
            if want_dw:
                dw += dz.mT @ part
        ctx.dtypes = x.dtype, weight.dtype
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(dx, dw, count)
        return nats / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        dx, dw, count = ctx.saved_tensors
        g = g / count.clamp(min=1)              # no target: zeros, as F.cross_entropy
        dx, dw = (d if d is None else (d.to(g.dtype) * g).to(dtype)     # a GPU rounds g to d's
                  for d, dtype in zip((dx, dw), ctx.dtypes))
        return dx, dw, None, None, None, None


def chunked_cross_entropy(x, weight, targets, chunk=1024, ignore_index=-100, per_chunk=nats_and_dz):
    """x (..., C), weight (V, C), targets (...) -> mean nats over the targets that count.

    Equals F.cross_entropy(x @ weight.T, targets), gradients of x and weight too, but holds logits
    of `chunk` tokens only. Under autocast the products are in its type, the rest in float32.
    per_chunk: nats_and_dz, or torch.compile of it: fewer kernels, less traffic.
    ValueError: shapes that do not fit, chunk below 1. No target counts: NaN, as F.cross_entropy."""
    if x.shape[:-1] != targets.shape or x.shape[-1:] != weight.shape[1:] or weight.dim() != 2:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)}: pass x (..., C), weight (V, C), targets (...)")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: use at least 1 token")
    if not torch.is_grad_enabled():             # needs_input_grad does not know
        x, weight = x.detach(), weight.detach()
    return ChunkedCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), chunk,
                                     ignore_index, per_chunk)


def whole(x, weight, targets):
    """What is usually written: all logits, then the loss in float32."""
    z = F.linear(x, weight)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


class Peak(TorchDispatchMode):
    """Most bytes that the tensors which operators made while the mode was on held at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in args if torch.is_tensor(t)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in old:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def inputs(N, C, V, **options):                 # -> x, weight, targets
    x = torch.randn(N, C, requires_grad=True, **options)
    weight = torch.randn(V, C, **options).mul(C ** -0.5).requires_grad_()
    return x, weight, torch.randint(V, (N,), device=x.device)


def demo_equal():
    for name, N, chunk in (("chunks of 1", 60, 1), ("of 7, which do not divide 60", 60, 7),
                           ("one chunk", 60, 1000)):
        x, weight, targets = inputs(N, 16, 50, dtype=torch.float64)
        targets[::9] = -100                     # do not count
        results = []
        for loss in whole(x, weight, targets), chunked_cross_entropy(x, weight, targets, chunk):
            results.append([loss, *torch.autograd.grad(3 * loss, (x, weight))])
        error = torch.stack([(a - b).abs().max() for a, b in zip(*results)]).max().item()
        check(error <= 1e-13, f"loss, dx, dW = whole logits, float64: {name}", f"{error:.0e}")
    counts = []
    for way in whole, lambda *args: chunked_cross_entropy(*args, 100):
        with FlopCounterMode(display=False) as counter:
            way(*inputs(1000, 32, 500)).backward()
        counts.append(counter.get_total_flops())
    check(counts[0] == counts[1] == 6 * 1000 * 32 * 500, "FLOPs: those of whole logits, 6 N V C",
          f"{counts[1]:,} = {counts[0]:,}")


def demo_fp16():
    """What the factor 1 / N does to dz, if it comes before the products in fp16."""
    x, weight, targets = inputs(256, 64, 50304)
    _, dz = nats_and_dz(F.linear(x, weight).detach(), targets, -100)
    lost = [(part.half() == 0).double().mean().item() for part in (dz / 16384, dz)]
    check(lost[0] > 0.9 and lost[1] < 0.01, "entries of dz that fp16 takes for 0: with 1 / 16384, "
          "without", f"{lost[0]:.0%}, {lost[1]:.1%}")
    x, weight, targets = inputs(16384, 16, 512)
    grads = []
    for low in (False, True):                   # as with a loss scale; the products in fp16
        with torch.autocast("cpu", torch.float16, enabled=low):
            loss = 1024 * chunked_cross_entropy(x, weight, targets, 4096)
        grads.append(torch.autograd.grad(loss, (x, weight)))
    error = torch.stack([(a - b).norm() / b.norm() for b, a in zip(*grads)]).max().item()
    check(error < 0.01, "dx, dW of the mean over 16384 tokens, fp16 against fp32", f"{error:.1e}")


def demo_memory():
    """-> vocabularies, {way: MB at the peak of forward and backward}."""
    sizes, ways = (1024, 4096, 16384, 65536), {"whole logits": whole}
    ways["chunks of 128 tokens"] = lambda *args: chunked_cross_entropy(*args, 128)
    peaks = {name: [] for name in ways}
    print("\npeak of forward and backward, 2048 tokens, C = 32, float32, in MB")
    for V in sizes:
        x, weight, targets = inputs(2048, 32, V)
        for name, way in ways.items():
            with Peak() as peak:
                way(x, weight, targets).backward()
            x.grad = weight.grad = None
            peaks[name].append(peak.bytes / 1e6)
        print(f"     V = {V:<8}", *(f"{name} {mb[-1]:8.1f}   " for name, mb in peaks.items()))
    ratio = peaks["whole logits"][-1] / peaks["chunks of 128 tokens"][-1]
    check(ratio > 5, "V = 65536: whole logits need times as much", f"x {ratio:.1f}")
    return sizes, peaks


def draw(sizes, peaks):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, mb), color in zip(peaks.items(), ("C1", "C0")):
        axes.loglog(sizes, mb, "o-", base=2, color=color)
        axes.annotate(name, (sizes[2], mb[2]), xytext=(-8, 12), textcoords="offset points",
                      color=color, ha="right")
    axes.set(xlabel="vocabulary V", ylabel="peak memory (MB)",
             title="The loss of 2048 tokens, with and without their logits")
    axes.set_xticks(sizes, sizes)
    ticks = [2 ** n for n in range(1, 12, 2)]
    axes.set_yticks(ticks, ticks)
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "loss.png")


def demo():
    torch.manual_seed(0)
    demo_equal()
    demo_fp16()
    draw(*demo_memory())


def bench():
    """Median ms of forward and backward, and the peak; bf16 products on a GPU, float32 on a CPU,
    where the peak of compiled code is not counted: a dispatch mode makes it run uncompiled."""
    cuda = torch.cuda.is_available()
    options = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    N, C, V, chunk = (32768, 768, 50304, 4096) if cuda else (2048, 128, 50304, 256)
    fast = torch.compile(nats_and_dz)
    ways = {"whole logits": whole, "whole logits, compiled": torch.compile(whole),
            "chunks": lambda *args: chunked_cross_entropy(*args, chunk),
            "chunks, compiled": lambda *args: chunked_cross_entropy(*args, chunk, per_chunk=fast)}
    if hasattr(F, "linear_cross_entropy"):                      # torch 2.13
        chunks = torch.nn.LinearCrossEntropyOptions()
        ways["torch's, chunked"] = lambda *args: F.linear_cross_entropy(*args, options=chunks)
    x, weight, targets = inputs(N, C, V, **options)
    for name, way in ways.items():
        def run():
            way(x, weight, targets).backward()
            x.grad = weight.grad = None
        run()                                                   # compiles and warms up
        ms = 1e3 * Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=2).median
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.1f} MB"
        elif "compiled" in name:
            peak = "not counted"
        else:
            with Peak() as memory:
                run()
            peak = f"{memory.bytes / 1e6:.1f} MB"
        print(f"{name:<24} {ms:9.2f} ms   peak {peak}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", action="store_true", help="ms and peak of forward and backward")
    bench() if parser.parse_args().bench else demo()
