"""Training metrics: what a run logs, and numbers for how good a model is that can be compared.

    nats per token   l = -1/N sum_i log p(x_i | x_<i)          N predicted tokens of the whole text
    perplexity       exp(l)            of all tokens together, never a mean of batches' perplexities
    bits per byte    l / log 2 * tokens / bytes                the one to compare between tokenizers

    mean of {2, 4} nats = 3     exp(3) = 20.1     mean(exp(2), exp(4)) = 31.0: another number,
                                                  and it changes with the batch size

Cost     a JSON line per logged step. The clock runs only inside timing(): validation, saving and
         the first step after a pause do not slow down "tokens per second". On CUDA, read a value
         (float(loss)) before log(), so that the GPU has done what was asked of it.
Paper    Jelinek et al. 1977, Perplexity; Gao et al. 2020, The Pile (bits per byte)
Run      python metrics.py             claims, figures/metrics.png; a few seconds
Left out model FLOPs utilisation, memory, communication share
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import sysconfig
import tempfile
import time


def scores(nats, tokens_per_byte=1.0):
    """Mean nats per token of a whole text -> what to report of it."""
    return {"val_loss": nats, "ppl": math.exp(nats),
            "bits_per_byte": nats / math.log(2) * tokens_per_byte}


class Meter:
    """The log of a run: with meter.timing() around every step, and meter.log() now and then.

    path    one JSON object per line; those of steps after `step` (of a run that was killed after
            its last checkpoint) and a torn last line are removed. None: this rank writes nothing
    step    where the run stands; steps: where it ends; tokens: of one step, over all ranks"""

    def __init__(self, path, step, steps, tokens):
        self.path, self.first, self.steps, self.tokens = path, step, steps, tokens
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
        if self.path is not None:
            with open(self.path, "a") as file:
                known = {key: value if math.isfinite(value) else None       # JSON has no NaN
                         for key, value in record.items()}
                file.write(json.dumps(known) + "\n")
        text = (f"step {step:5}/{self.steps}  loss {values['loss']:.4f}  "
                f"norm {values['grad_norm']:5.2f}  {record['tokens_per_s']:7,.0f} tokens/s")
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


def demo():
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


if __name__ == "__main__":
    demo()
