"""Training metrics: what a run logs, which numbers compare, and what a run would need: a planner.

    nats per token   l = -1/N sum_i log p(x_i | x_<i)          N predicted tokens of the whole text
    perplexity       exp(l)            of all tokens together, never a mean of batches' perplexities
    bits per byte    l / log 2 * tokens / bytes                the one to compare between tokenizers

    mean of {2, 4} nats = 3     exp(3) = 20.1     mean(exp(2), exp(4)) = 31.0: another number,
                                                  and it changes with the batch size

    MFU   tokens/s x model FLOPs of a token / peak FLOPs: useful work, recomputation not counted
    HFU   the same with the FLOPs that ran: with everything recomputed 4/3 of MFU
          FLOPs of a token = 6 x matrix elements + 12 x layers x T x C (scores, all of them)

    python metrics.py --plan --gpus 512 --chip H100 --layers 80 --dim 8192 --heads 64 --kv-heads 8 \
                      --hidden 28672 --vocab 128256 --seq-len 8192 --batch 512
    every layout dp x tp x pp of these GPUs that fits: memory of a rank, bubble, step time, MFU

Cost     a JSON line per logged step. The clock runs only inside timing(): validation, saving and
         the first step after a pause do not slow down "tokens per second". On CUDA, read a value
         (float(loss)) before log(), so that the GPU has done what was asked of it.
Paper    Jelinek et al. 1977, Perplexity; Gao et al. 2020, The Pile (bits per byte); Chowdhery et
         al. 2022, PaLM, appendix B (MFU, HFU); Korthikanti et al. 2022 (memory, times of Megatron)
Run      python metrics.py             claims, figures/metrics.png; a few seconds
Left out communication measured in a run; of plan(): experts, context parallelism, tied weights
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import sys
import sysconfig
import tempfile
import time


def scores(nats, tokens_per_byte=1.0):
    """Mean nats per token of a whole text -> what to report of it."""
    return {"val_loss": nats, "ppl": math.exp(nats),
            "bits_per_byte": nats / math.log(2) * tokens_per_byte}


# Peak FLOP/s in bf16 (dense), bytes of memory, bytes/s to a GPU of the same node (8 GPUs) and of
# another, one direction: the makers' data sheets; 400 Gb/s (A100: 200 Gb/s) of network a GPU.
CHIPS = {"A100": (312e12, 80e9, 300e9, 25e9), "H100": (989e12, 80e9, 450e9, 50e9),
         "H200": (989e12, 141e9, 450e9, 50e9), "B200": (2250e12, 180e9, 900e9, 50e9)}


def peak_flops(name):
    """Of a GPU by torch.cuda.get_device_name(), in bf16; None if it is not known: no guess."""
    return next((CHIPS[chip][0] for chip in CHIPS if f" {chip} " in f" {name} ".replace("-", " ")
                 and "PCIe" not in name), None)


def mfu(tokens_per_s, flops_per_token, peak):
    """tokens_per_s of all GPUs; peak: FLOP/s of all GPUs, in the type that multiplies."""
    return tokens_per_s * flops_per_token / peak


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder: heads of dim / heads, an MLP of three matrices (gated) or two, untied."""
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    seq_len: int
    gated: bool = True

    def block(self):
        """Elements of the matrices of a block."""
        attention = 2 * self.dim * self.dim * (1 + self.kv_heads / self.heads)
        return round(attention) + (3 if self.gated else 2) * self.dim * self.hidden

    def parameters(self):
        return self.layers * self.block() + 2 * self.vocab * self.dim

    def flops(self):
        """Of a token, forward and backward."""
        matrices = self.layers * self.block() + self.vocab * self.dim
        return 6 * matrices + 12 * self.layers * self.seq_len * self.dim

    def activations(self, tp=1, sequence_parallel=True):
        """Numbers that a block keeps for backward, of a token, on a rank; scores by tiles (flash):
        inputs of norms and matrices, twice; q, k, v, o; four of the MLP (gate, up, their parts)."""
        wide, kv = self.dim, self.dim * self.kv_heads // self.heads
        split = 2 * wide + 2 * kv + (4 if self.gated else 2) * self.hidden
        return split / tp + 6 * wide / (tp if sequence_parallel else 1)


def plan(shape, chip, batch, dp=1, tp=1, pp=1, zero=1, microbatch=1, chunks=1, recompute=False,
         kinds=(2, 2, 12), efficiency=0.62):
    """What a step of `batch` sequences on dp x tp x pp GPUs needs, of the fullest rank, the first
    stage -> dict: bytes of weights, gradients, optimizer, activations, memory; send (bytes by tp,
    by dp); bubble (idle / busy); seconds, mfu.

    zero: 0 to 3. kinds: bytes of weights, gradients and optimizer state for a parameter, mixed
    precision with Adam. efficiency: of all computing; 0.62 fits Megatron's runs below. Tensor
    parallelism, with its sequence parallelism, is not overlapped; data parallelism is, with one
    microbatch's backward (ZeRO-3: with all). ValueError: what cannot be cut so."""
    peak, _, near, far = CHIPS[chip]
    m, layers = batch // (dp * microbatch), shape.layers / pp
    if m < 1 or batch % (dp * microbatch) or shape.heads % tp or shape.layers % (pp * chunks):
        raise ValueError(f"{batch} sequences, {shape.heads} heads, {shape.layers} layers are not "
                         f"cut by dp={dp} x microbatch={microbatch}, tp={tp}, pp={pp} x {chunks}")
    T, C = shape.seq_len, shape.dim
    ends = shape.vocab * C * (2 if pp == 1 else 1) / tp
    mine = layers * shape.block() / tp + ends
    shared = [dp if zero >= stage else 1 for stage in (3, 2, 1)]
    weights, gradients, optimizer = (mine * size / n for size, n in zip(kinds, shared))
    if zero == 3:                               # a block is there whole while it works
        weights += kinds[0] * shape.block() / tp

    kept = C / tp if recompute else shape.activations(tp)
    waiting = min(pp, m) * (1 + (pp - 1) / (pp * chunks) if chunks > 1 else 1)
    width = kinds[0] * microbatch * T
    activations = width * (layers * kept * waiting + (shape.activations(tp) if recompute else 0))
    if pp == 1:                                 # logits, and in fp32 their softmax
        activations += microbatch * T * shape.vocab / tp * (kinds[0] + 4)

    work = batch / dp * T * shape.flops() / (tp * pp) * (4 / 3 if recompute else 1)
    busy = work / (peak * efficiency)
    passes = 12 if recompute else 8             # an all-reduce is 2: forward, backward, again
    by_tp = passes * (tp - 1) / tp * batch / dp * T * C * layers * kinds[0]
    by_dp = (3 if zero == 3 else 2) * (dp - 1) / dp * mine * kinds[1] * (m if zero == 3 else 1)
    sending = by_dp / (near if dp * tp <= 8 else far)
    hidden = busy if zero == 3 else 2 / 3 * busy / m
    bubble = (pp - 1) / (chunks * m)
    seconds = (busy + by_tp / (near if tp <= 8 else far)) * (1 + bubble) + max(0, sending - hidden)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer,
            "activations": activations, "memory": weights + gradients + optimizer + activations,
            "send": (by_tp, by_dp), "bubble": bubble, "seconds": seconds,
            "mfu": mfu(batch * T / seconds, shape.flops(), peak * dp * tp * pp)}


def layouts(shape, chip, gpus, batch, room=0.9):
    """All layouts that fit in `room` of the memory, the fastest first -> [(layout, plan)]."""
    found = []
    for tp, pp, microbatch, chunks, recompute, zero in itertools.product(
            (1, 2, 4, 8), range(1, shape.layers + 1), (1, 2, 4, 8), (1, 2, 4), (False, True),
            (1, 2, 3)):
        if gpus % (tp * pp) or pp > 1 and zero > 1 or pp == 1 and chunks > 1:
            continue
        layout = dict(dp=gpus // (tp * pp), tp=tp, pp=pp, zero=zero, microbatch=microbatch,
                      chunks=chunks, recompute=recompute)
        with contextlib.suppress(ValueError):
            needs = plan(shape, chip, batch, **layout)
            if needs["memory"] <= room * CHIPS[chip][1] and (chunks == 1 or batch // (
                    layout["dp"] * microbatch) % pp == 0):
                found.append((layout, needs))
    return sorted(found, key=lambda pair: pair[1]["seconds"])


class Meter:
    """The log of a run: with meter.timing() around every step, and meter.log() now and then.

    path    one JSON object per line; those of steps after `step` (of a run that was killed after
            its last checkpoint) and a torn last line are removed. None: this rank writes nothing
    step    where the run stands; steps: where it ends; tokens: of one step, over all ranks
    flops   of a token; peak: FLOP/s of all ranks together, None: not known"""

    def __init__(self, path, step, steps, tokens, flops=None, peak=None):
        self.path, self.first, self.steps, self.tokens = path, step, steps, tokens
        self.flops, self.peak = flops, peak
        self.began, self.seconds, self.count = time.perf_counter(), 0.0, 0
        if path is not None:
            kept = [record for record in read(path) if record["step"] <= step]
            beside = pathlib.Path(path).with_suffix(".tmp")
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(beside, path)

    @contextlib.contextmanager
    def timing(self):
        before = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - before
        self.count += 1

    def log(self, step, **values):
        """Write `values`, the tokens up to here, and, as means since the last call, step_ms and
        tokens_per_s
        -> a line to print. Values must hold loss and grad_norm."""
        seconds, self.seconds, self.count = self.seconds / self.count, 0.0, 0
        record = {"step": step, "tokens": step * self.tokens, **values, "step_ms": 1e3 * seconds,
                  "tokens_per_s": self.tokens / seconds}
        if self.flops:
            record["tflops_per_s"] = self.tokens / seconds * self.flops / 1e12
        if self.flops and self.peak:
            record["mfu"] = mfu(self.tokens / seconds, self.flops, self.peak)
        if self.path is not None:
            with open(self.path, "a") as file:
                known = {key: value if math.isfinite(value) else None       # JSON has no NaN
                         for key, value in record.items()}
                file.write(json.dumps(known) + "\n")
        text = (f"step {step:5}/{self.steps}  loss {values['loss']:.4f}  "
                f"norm {values['grad_norm']:5.2f}  {record['tokens_per_s']:7,.0f} tokens/s")
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if "val_loss" in values:
            text += f"  val {values['val_loss']:.4f} = {values['bits_per_byte']:.3f} bits per byte"
        left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
        return f"{text}  {int(left) // 60}:{int(left) % 60:02} left"

    def plot(self, path):
        """The curves of loss and validation loss, in nats per token, as a PNG."""
        from matplotlib.figure import Figure
        records = read(self.path)
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        for key, label, style in (("loss", "training batch", "-"),
                                  ("val_loss", "validation", "o-")):
            points = [(record["step"], record[key]) for record in records
                      if record.get(key) is not None]                   # None: it was NaN
            axes.plot(*zip(*points), style, label=label, markersize=4)
        step, loss = points[-1] if points else (0, math.nan)
        axes.set(xlabel="step", ylabel="loss (nats per predicted token)", ylim=(0, None),
                 title=f"Validation loss {loss:.3f} nats per token after {step} steps")
        axes.legend()
        axes.figure.savefig(path, dpi=120)


def read(path):
    """The records of a log, without a last line that a kill has torn."""
    path = pathlib.Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


# ------------------------------------------------------------------ demo

def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def surprise(text, width):
    """Nats of each token (of `width` bytes) under a model that knows the tokens' frequencies."""
    tokens = [text[i:i + width] for i in range(0, len(text) - width + 1, width)]
    counts = collections.Counter(tokens)
    return [-math.log(counts[token] / len(tokens)) for token in tokens]


def mean_of_perplexities(nats, size):
    batches = [nats[i:i + size] for i in range(0, len(nats), size)]
    return sum(math.exp(sum(batch) / len(batch)) for batch in batches) / len(batches)


# Korthikanti et al. 2022, tables 3 and 5, A100: shape, sequences a step, layout; seconds a step
# with sequence parallelism and selective recomputation, MFU. (Chunks: interleaved stages.)
MEGATRON = {
    "22B": (Shape(48, 6144, 64, 64, 24576, 51200, 2048, False), 4, dict(tp=8, microbatch=4),
            1.10, 0.415),
    "175B": (Shape(96, 12288, 96, 96, 49152, 51200, 2048, False), 64,
             dict(tp=8, pp=8, chunks=3), 13.75, 0.514),
    "530B": (Shape(105, 20480, 128, 128, 81920, 51200, 2048, False), 280,
             dict(tp=8, pp=35, chunks=3), 37.83, 0.560),
    "1T": (Shape(128, 25600, 160, 160, 102400, 51200, 2048, False), 512,
           dict(tp=8, pp=64), 71.49, 0.563)}


def demo_planner():
    # PaLM appendix B: 6144 TPU v4 of 275 TFLOP/s; 118 layers, 48 heads of 256, sequences of 2048.
    palm = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    share = mfu(238.3e3, palm, 6144 * 275e12)
    check(abs(share - 0.462) < 5e-4, "MFU of PaLM 540B, from its tokens per second",
          f"{share:.1%} (paper: 46.2%)")
    print(f"\n{'Megatron on A100':<18} {'GPUs':>5} {'seconds':>8} {'planned':>8} {'error':>6}   "
          f"MFU of these seconds   GB a rank: states, activations")
    worst = 0.0
    for name, (shape, batch, layout, seconds, published) in MEGATRON.items():
        needs = plan(shape, "A100", batch, **layout)
        gpus = layout["tp"] * layout.get("pp", 1)
        got = mfu(batch * shape.seq_len / seconds, shape.flops(), gpus * CHIPS["A100"][0])
        error = needs["seconds"] / seconds - 1
        states = needs["memory"] - needs["activations"]
        print(f"{name:<18} {gpus:>5} {seconds:>8.2f} {needs['seconds']:>8.2f} {error:>6.1%}   "
              f"{got:.1%} (paper: {published:.1%})     {states / 1e9:.0f}, "
              f"{needs['activations'] / 1e9:.0f}")
        if abs(got - published) > 2e-3:
            raise AssertionError(f"{name}: MFU {got:.4f}, not {published}")
        worst = max(worst, abs(error))
    print()
    check(worst < 0.25, "planned seconds against published ones, worst of four",
          f"{worst:.0%} off")
    one, again = (plan(MEGATRON["175B"][0], "A100", 64, tp=8, pp=8, recompute=how)
                  for how in (False, True))
    check(again["activations"] < one["activations"] / 8, "recomputation: activations, in GB",
          f"{one['activations'] / 1e9:.1f} -> {again['activations'] / 1e9:.1f}")


def demo():
    demo_planner()
    source = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    nats = surprise(source, 1)
    right = scores(sum(nats) / len(nats))
    for size in (7, 100, 1001):                             # sums over batches, divided once
        batches = [nats[i:i + size] for i in range(0, len(nats), size)]
        total, count = sum(map(sum, batches)), sum(map(len, batches))
        same = scores(total / count)
        check(abs(same["ppl"] / right["ppl"] - 1) < 1e-9,
              f"perplexity of {len(nats):,} bytes, summed over batches of {size}",
              f"{same['ppl']:.4f}, of all at once {right['ppl']:.4f}")
    sizes = [2 ** k for k in range(0, 15, 2)]
    wrong = [mean_of_perplexities(nats, size) for size in sizes]
    check(wrong[0] > 2 * right["ppl"], "a mean of batches' perplexities is another number",
          f"{wrong[0]:.1f} in batches of 1, {wrong[2]:.1f} of {sizes[2]}")

    random.seed(0)
    noise = bytes(random.randrange(4) for _ in range(200_000))      # 2 bits a byte, by construction
    for width in (1, 2):
        pairs = surprise(noise, width)
        score = scores(sum(pairs) / len(pairs), 1 / width)
        check(abs(score["bits_per_byte"] - 2) < 1e-3 and abs(score["ppl"] / 4 ** width - 1) < 1e-2,
              f"random bytes of four kinds, tokens of {width}: 2 bits per byte",
              f"{score['bits_per_byte']:.4f}, though the perplexity is {score['ppl']:.2f}")

    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "metrics.jsonl")
        meter = Meter(log, 0, 10, tokens=1000)
        for step in range(1, 7):
            with meter.timing():
                time.sleep(0.02)
            time.sleep(0.05)                                # a validation: it must not count
            if step % 2 == 0:
                meter.log(step, loss=1.0, grad_norm=0.1)
        with open(log, "a") as file:
            file.write('{"step": 8, "lo')                   # killed while writing
        milliseconds = min(record["step_ms"] for record in read(log))
        check(20 <= milliseconds < 45, "steps of 20 ms, pauses of 50 ms: a step takes",
              f"{milliseconds:.1f} ms")
        Meter(log, 4, 10, tokens=1000)                      # resumed from a checkpoint of step 4
        steps = [record["step"] for record in read(log)]
        check(steps == [2, 4] and log.read_text().endswith("}\n"),
              "resumed at step 4, the log has the steps up to there", f"{steps}")
    draw(sizes, wrong, right["ppl"])


def draw(sizes, wrong, right):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    axes = Figure(figsize=(7, 3.2), layout="constrained").subplots()
    axes.plot(sizes, wrong, "o-", color="C1", label="mean of the batches' perplexities")
    axes.axhline(right, color="C0", label=f"perplexity: exp(mean nats) = {right:.1f}")
    axes.set(xscale="log", xticks=sizes, xticklabels=sizes, ylim=(0, None), ylabel="perplexity",
             xlabel="tokens in a batch",
             title="A mean of perplexities depends on the size of the batches")
    axes.minorticks_off()
    axes.legend()
    path = pathlib.Path(__file__).parent / "figures" / "metrics.png"
    path.parent.mkdir(exist_ok=True)
    axes.figure.savefig(path, dpi=100)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="list the layouts that fit")
    parser.add_argument("--chip", choices=tuple(CHIPS), default="H100")
    for name, default in (("gpus", 64), ("layers", 32), ("dim", 4096), ("heads", 32),
                          ("kv-heads", 8), ("hidden", 14336), ("vocab", 128256),
                          ("seq-len", 8192), ("batch", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    if not args.plan:
        return demo()
    shape = Shape(args.layers, args.dim, args.heads, args.kv_heads, args.hidden, args.vocab,
                  args.seq_len)
    found = layouts(shape, args.chip, args.gpus, args.batch)
    print(f"{shape.parameters() / 1e9:.2f} G parameters, {args.batch} sequences of {args.seq_len} "
          f"a step on {args.gpus} {args.chip}: {len(found)} layouts fit\n"
          f"{'dp':>4} {'tp':>3} {'pp':>3} {'chunks':>6} {'zero':>4} {'rows':>4} {'again':>5} "
          f"{'GB':>6} {'bubble':>7} {'seconds':>8} {'MFU':>6}")
    for layout, needs in found[:12]:
        print(f"{layout['dp']:>4} {layout['tp']:>3} {layout['pp']:>3} {layout['chunks']:>6} "
              f"{layout['zero']:>4} {layout['microbatch']:>4} "
              f"{'all' if layout['recompute'] else 'none':>5} {needs['memory'] / 1e9:>6.1f} "
              f"{needs['bubble']:>7.1%} {needs['seconds']:>8.2f} {needs['mfu']:>6.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
