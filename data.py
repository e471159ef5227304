r"""Text in, batches out: bytes, epochs without replacement, and the two pre-training objectives.

    causal (GPT)    predict byte t+1 from bytes 1..t         every position is a target
    mlm (BERT)      predict the hidden bytes from the rest   15 % of the positions are targets:
                    of these 80 % are shown as [MASK], 10 % as a random byte, 10 % unchanged

    text      |offset| window 0 | window 1 | window 2 | ...        windows of T bytes, T apart
    epoch 0   windows 4 1 7 0 ...    a new order and offset every epoch, drawn from (seed, epoch)
    step s    windows number s B .. s B + B - 1, counted from the start of training; rank r of N
              takes the r-th of N equal parts of them

So a batch is a function of (seed, step) alone: any number of ranks reads the same batch, and a
resumed run goes on with the batch it would have read. Random windows, the usual shortcut, miss 1/e
of the text in one epoch's worth of reading and read other parts twice; these miss only the few
bytes that the offset cuts off.

Cost      one permutation of len(text) / T numbers per epoch; files are mapped, not loaded.
Paper     Radford et al. 2018, equation 1 (causal); Devlin et al. 2019, section 3.1 (masked)
Run       python data.py        every claim, and figures/data.png, about 5 s
Left out  tokenizers (a byte is a token: 256 symbols, nothing to train; Windows takes any array of
          tokens), next-sentence prediction, span corruption, mixing several corpora
"""

import argparse
import os
import pathlib
import sysconfig

import numpy as np
import torch

# Shape letters: B sequences, T bytes in a sequence.

MASK = 256                                  # [MASK]: the one token beyond the 256 bytes


def standard_library():
    """The running Python's own sources -> (training, validation): the last 10 % of sorted files.

    Nothing to download, and on every machine. Without generated tables, and without the packages
    that some systems do not install; still, another Python version is another text."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo",
            "ensurepip", "lib2to3", "distutils", "encodings", "pydoc_data", "__phello__"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not skip.intersection(name.split("/"))
             and not name.startswith("config-") and "_sysconfigdata" not in name]
    cut = int(len(names) * 0.9)
    train, val = (b"".join((root / name).read_bytes() for name in part)
                  for part in (names[:cut], names[cut:]))
    return np.frombuffer(train, np.uint8), np.frombuffer(val, np.uint8)


def text_file(path):
    """A file -> (training, validation): its last 10 %. Mapped: it may be larger than memory.

    ValueError if it is missing or empty."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give the path of a text file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty; give one with text in it")
    text = np.memmap(path, np.uint8, mode="r")
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


class Windows:
    """Windows of T + 1 bytes, T apart: inputs and their targets, which lie one byte further on.

    windows[n] is window n counted from the start of training, a function of (seed, n).
    shuffle=False: in the order of the text, for validation. ValueError if the text is too short."""

    def __init__(self, text, length, seed=0, shuffle=True):
        if length < 1:
            raise ValueError(f"windows of {length} bytes (or tokens): must be 1 or more")
        self.text, self.length, self.seed, self.shuffle = text, length, seed, shuffle
        # Windows per epoch. A shuffled epoch starts at an offset of up to T - 1 bytes, else at 0.
        self.count = (len(text) - (length if shuffle else 1)) // length
        if self.count < 1:
            least = 2 * length if shuffle else length + 1
            part = "" if shuffle else " to validate on (a tenth of the text)"
            raise ValueError(f"{len(text)} bytes (or tokens) of text{part} are too few for windows "
                             f"of {length}: give at least {least} or a shorter window")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        self.epoch, self.starts = None, None

    def __getitem__(self, n):                                           # -> (T + 1,) uint8
        epoch, i = divmod(n, self.count)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(self.length) if self.shuffle else 0
            order = random.permutation(self.count) if self.shuffle else np.arange(self.count)
            self.epoch, self.starts = epoch, offset + self.length * order
        return self.text[self.starts[i]:self.starts[i] + self.length + 1]

    def where(self, numbers):
        """A text that says where windows begin, for messages."""
        starts = [(self[n], int(self.starts[n % self.count]))[1] for n in numbers]
        return f"{self.length} tokens (bytes) each from {starts}"


def examples(windows, numbers, objective="causal"):                     # -> 2 x (B, T) int64
    """The windows of these numbers -> inputs, targets; a target of -100 is not counted in the loss.

    causal: the targets are the inputs, one byte further on. mlm: round(0.15 T) targets in EVERY
    row: with a varying count, the mean over ranks would not be the mean over targets. ValueError:
    another objective, or mlm of other tokens than bytes, among which MASK would be one."""
    if objective not in ("causal", "mlm") or objective == "mlm" and windows.text.dtype != np.uint8:
        raise ValueError(f"objective={objective!r} for tokens of type {windows.text.dtype}: pick "
                         f"causal, or, of bytes (uint8), mlm")
    rows = torch.from_numpy(np.stack([windows[n] for n in numbers]).astype(np.int64))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    if objective == "causal":
        return inputs, targets
    inputs, targets = inputs.clone(), torch.full_like(inputs, -100)
    for row, n in enumerate(numbers):
        random = np.random.default_rng([windows.seed, n, MASK])
        hidden = random.permutation(windows.length)[:max(1, round(0.15 * windows.length))]
        targets[row, hidden] = inputs[row, hidden]
        kind = random.random(len(hidden))                               # 0.8 / 0.1 / 0.1
        noise = torch.from_numpy(random.integers(256, size=len(hidden)))
        inputs[row, hidden[kind < 0.8]] = MASK
        inputs[row, hidden[kind >= 0.9]] = noise[kind >= 0.9]
    return inputs, targets


# ------------------------------------------------------------------ demo

def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def coverage(size, T, steps, draw):
    """Fraction of the bytes that have been a target, after each of `steps` windows from draw(n)."""
    seen, covered = np.zeros(size, bool), []
    for n in range(steps):
        start = draw(n)
        seen[start + 1:start + T + 1] = True
        covered.append(seen.mean())
    return covered


def demo():
    text, val = standard_library()
    print(f"{len(text):,} bytes of Python to train on, {len(val):,} to validate on\n")

    T = 37
    small = np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)
    windows = Windows(small, T, seed=1)
    times = np.zeros(len(small), int)
    for n in range(windows.count):
        windows[n]
        start = windows.starts[n]
        times[start + 1:start + T + 1] += 1
    missed = int((times == 0).sum())
    check(times.max() == 1 and missed < 2 * T, "an epoch reads no target twice and misses < 2 T",
          f"at most {times.max()} time, {missed} of {len(small)} bytes missed (< {2 * T})")

    def read(windows, epoch):
        return [windows[epoch * windows.count + i].tolist() for i in range(windows.count)]

    later, first = read(windows, 1), read(windows, 0)       # and with other objects, from the start
    alike = read(Windows(small, T, seed=1), 1) == later
    others = first, read(Windows(small, T, seed=2), 1)
    check(alike and later not in others, "a window is a function of (seed, n); others differ",
          f"{len(later)} windows equal when read again, not in epoch 0, nor of seed 2")

    B, step = 12, 5
    whole, _ = examples(windows, range(step * B, step * B + B))
    for ranks in (2, 3, 4):
        part = B // ranks
        parts = [examples(Windows(small, T, seed=1),
                          range(step * B + r * part, step * B + (r + 1) * part))[0]
                 for r in range(ranks)]
        check(torch.equal(torch.cat(parts), whole), f"{ranks} ranks read the batch of one process",
              "equal")
    inputs, targets = examples(windows, range(4))
    check(torch.equal(inputs[:, 1:], targets[:, :-1]), "causal: target t is input t + 1", "equal")

    T = 100
    windows = Windows(text, T, seed=0)
    original = examples(windows, range(600))[0]
    inputs, targets = examples(windows, range(600), "mlm")
    hidden = targets != -100
    counts = hidden.sum(1)
    check(counts.min() == counts.max() == 15, "mlm: every row has round(0.15 T) targets",
          f"{counts.min().item()} .. {counts.max().item()} of T = {T}")
    honest = torch.equal(targets[hidden], original[hidden])
    check(honest and torch.equal(inputs[~hidden], original[~hidden]),
          "mlm: targets are the true bytes; the other inputs are untouched", "equal")
    total = hidden.sum().item()
    masked = (inputs[hidden] == MASK).sum().item() / total
    kept = (inputs[hidden] == original[hidden]).sum().item() / total
    # Three standard errors of a fraction p in `total` draws. 1 in 256 random bytes is the true one.
    for name, got, p in (("shown as [MASK]", masked, 0.8), ("unchanged", kept, 0.1 + 0.1 / 256)):
        limit = 3 * (p * (1 - p) / total) ** 0.5
        check(abs(got - p) <= limit, f"mlm: share of the targets {name}",
              f"{got:.4f} ({p:.4f} +- {limit:.4f})")

    size, T = 100_000, 100
    windows = Windows(np.zeros(size, np.uint8), T)
    random = np.random.default_rng(0)
    steps = 3 * windows.count

    def in_epochs(n):
        windows[n]
        return windows.starts[n % windows.count]

    epochs = coverage(size, T, steps, in_epochs)
    anywhere = coverage(size, T, steps, lambda n: random.integers(size - T))
    miss_epochs, miss_random = 1 - epochs[windows.count - 1], 1 - anywhere[windows.count - 1]
    check(abs(miss_random - np.exp(-1)) < 0.03, "random windows miss 1/e of the text in one epoch",
          f"{miss_random:.3f} (0.368 +- 0.03)")
    check(miss_epochs < 0.003, "windows in epochs miss what the offset cuts off",
          f"{miss_epochs:.4f} (< 0.003)")
    draw(np.arange(1, steps + 1) / windows.count, epochs, anywhere)


def draw(x, epochs, anywhere):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, 100 * np.array(epochs), "C0")
    axes.annotate("epochs without replacement (this file)", (1, 103), color="C0")
    axes.plot(x, 100 * np.array(anywhere), "C1")
    axes.annotate("windows at random places", (3, 86), color="C1", ha="right", va="top")
    left = 100 * (1 - np.exp(-1))
    axes.axhline(left, color="0.5", lw=1, ls="--")
    axes.annotate("1 - 1/e", (3, left - 2), color="0.4", ha="right", va="top")
    axes.set(xlabel="bytes read / bytes in the text", ylabel="text read at least once (%)",
             title="Random windows leave a third of the text unread after one epoch", ylim=(0, 115))
    path = pathlib.Path(__file__).parent / "figures" / "data.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"\nfigure {path.parent.name}/{path.name}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()     # no flags
    demo()
