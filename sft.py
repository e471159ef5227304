r"""Supervised fine-tuning: prompts and completions, in the model's tokens, loss on the completion.

              1 7 3 > 3 7 1 end pad pad             inputs: a pair, padded to T tokens
              -  -  - 3 7 1 end  -   -              targets, one further on: - does not count
              prompt  completion

    loss = - sum over the batch's counted targets of log p(target | all before it)
           / how many of them the batch has

A batch's targets are spread unevenly over ranks and microbatches. The mean of their mean losses is
another number, in which tokens of short completions count more, and it changes with the layout.
Weigh each part's mean by its targets / the average part's. (transformers did not, in gradient
accumulation, until its pull request 34191 of October 2024.)

A tokenizer works on characters, so tokens(prompt) + tokens(completion) need not be
tokens(prompt + completion). What a pair means is the latter; its completion begins where the tokens
of prompt alone and of both differ. A token across the seam is the completion's: let white space
begin a completion, not end a prompt.

Cost      rows as long as T whatever they hold; tokens in memory, 4 bytes each for a text
Paper     Ouyang et al. 2022, section 3.5 (SFT). Shi et al. 2024: with long prompts or few pairs
          the loss on the prompt, too, can help; it is not offered here
Run       python sft.py         every claim, and figures/sft.png, about 5 s
Left out  chat templates (write their text into the prompts), several pairs in one row (packing),
          training a tokenizer
"""

import argparse
import json
import os
import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# Shape letters: B pairs, T tokens of a row, V tokens there are, C width.


class Bytes:
    """The tokenizer of a byte model. Byte 0, which none may hold, ends a completion."""

    end, size = 0, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", "replace")

    def encode_file(self, data):            # the bytes of a file -> its tokens
        return data


class Tokenizer:
    """A model's own, of its folder: tokenizer.json, run by Hugging Face's tokenizers.

    ImportError: without that package. ValueError: the files are damaged, or nothing says which
    token ends a text."""

    def __init__(self, folder):
        try:
            import tokenizers
        except ImportError as missing:
            raise ImportError("tokenizer.json needs a package: pip install tokenizers") from missing
        folder = pathlib.Path(folder)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            self.end = self._end(folder)
        except Exception as problem:        # tokenizers raises no narrower one
            raise ValueError(f"the tokenizer in {folder}: {problem}") from problem
        self.model.no_truncation()          # a file may ask for these, and lose or add tokens
        self.model.no_padding()
        self.size = 1 + max(self.end, *self.model.get_vocab().values())
        self.begin = self._begin()

    def _end(self, folder):                 # some have several: the first
        for path in (folder / "tokenizer_config.json", folder / "config.json"):
            known = json.loads(path.read_text()) if path.is_file() else {}
            word, number = known.get("eos_token"), known.get("eos_token_id")
            if word:
                number = self.model.token_to_id(word["content"] if isinstance(word, dict) else word)
            number = (number or [None])[0] if isinstance(number, list) else number
            if number is not None:
                return number
        raise ValueError("neither eos_token in tokenizer_config.json nor eos_token_id in "
                         "config.json says what ends a text")

    def _begin(self):                       # what is put before a text, any that it can write
        for token in sorted(self.model.get_vocab().values()):
            text = self.model.decode([token])
            plain = self.model.encode(text, add_special_tokens=False).ids
            whole = self.model.encode(text).ids
            for i in range(len(whole) if plain else 0):
                if whole[i:i + len(plain)] == plain:
                    return whole[:i]
        return []

    def encode(self, text):
        """With what the tokenizer puts before a text (such as BOS), once; without an end."""
        tokens = self.model.encode(text, add_special_tokens=False).ids
        return tokens if tokens[:len(self.begin)] == self.begin else self.begin + tokens

    def decode(self, tokens):
        return self.model.decode(list(tokens))

    def encode_file(self, data):            # the bytes of a file -> its tokens, (n,) uint32
        """In pieces of some 1 MB, cut at line ends: some tokenizers put a space before each. Bytes
        that are no UTF-8 become U+FFFD."""
        text, tokens, start = bytes(data).decode("utf-8", "replace"), [np.zeros(0, np.uint32)], 0
        while start < len(text):
            end = text.find("\n", start + 1_000_000) + 1 or len(text)
            piece = self.model.encode(text[start:end], add_special_tokens=False)
            tokens.append(np.array(piece.ids, np.uint32))
            start = end
        return np.concatenate(tokens)


def split_pair(prompt, completion, tokenizer):
    """Strings -> tokens of the prompt; of the completion and its end; bytes of these two (an end
    counts as one). A token with letters of both is the completion's, with all its bytes."""
    whole, alone = tokenizer.encode(prompt + completion), tokenizer.encode(prompt)
    cut = len(os.path.commonprefix([alone, whole]))
    size = len(completion.encode()) + 1
    if cut < len(alone):
        text = tokenizer.model.encode(prompt + completion, add_special_tokens=False)
        i = cut - (len(whole) - len(text))                  # of the first that differs; where it
        before = text.offsets[i - 1][1] if i > 0 else 0     # begins, some leave out its space
        size += len(prompt[min(before, text.offsets[i][0]):].encode())
    return whole[:cut], [*whole[cut:], tokenizer.end], size


def pairs_file(path, tokenizer):
    """JSON lines {"prompt": ..., "completion": ...} -> (training, validation: its last 10 %), two
    lists for Pairs. ValueError: a line that is no such object, no prompt, fewer than 2 pairs.
    """
    pairs = []
    with open(path, "rb") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    for number, line in lines:
        try:
            entry = json.loads(line)
            pairs.append(split_pair(entry["prompt"], entry["completion"], tokenizer))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ValueError(f"{path}, line {number}: not an object with two strings, prompt and "
                             f"completion ({problem!r})") from problem
        if isinstance(tokenizer, Bytes) and tokenizer.end in pairs[-1][1][:-1]:
            raise ValueError(f"{path}, line {number}: the completion holds byte 0, which ends it: "
                             f"leave it out")
        if not pairs[-1][0]:
            raise ValueError(f"{path}, line {number}: the prompt has no token of its own: it is "
                             f"empty, or one token with the completion; let that begin with a "
                             f"space")
    if len(pairs) < 2:
        raise ValueError(f"{path}: {len(pairs)} pairs, but 2 is the least to train and validate on")
    cut = min(int(0.9 * len(pairs)), len(pairs) - 1)
    return pairs[:cut], pairs[cut:]


def tokenizer_of(folder):
    return Tokenizer(folder) if pathlib.Path(folder, "tokenizer.json").is_file() else Bytes()


class Pairs:
    """Rows of T + 1 tokens from a list of split_pair()s.

    Row n is counted from the start of training, a function of (seed, n): each epoch of `count` rows
    has an order of its own; shuffle=False: as given. left_out: how many do not fit, and are not
    there. ValueError if none fits."""

    def __init__(self, pairs, length, seed=0, shuffle=True):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.pairs = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= length + 1]
        self.count, self.left_out = len(self.pairs), len(pairs) - len(self.pairs)
        if not self.count:
            raise ValueError(f"none of {len(pairs)} pairs fits in rows of {length} tokens: pick "
                             f"longer rows")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be 0 or more")
        targets, size = (sum(counts) for counts in zip(
            *((len(completion), size) for _, completion, size in self.pairs)))
        self.tokens_per_byte = targets / size                   # of completions
        self.epoch, self.order = None, np.arange(self.count)

    def __getitem__(self, n):               # -> the pair, without padding
        epoch, i = divmod(n, self.count)
        if self.shuffle and epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return self.pairs[self.order[i]]

    def where(self, numbers):
        """A text that says which pairs these are, for messages."""
        return f"the pairs beginning with {[self[n][0][:8] for n in numbers]}"

    def targets(self, numbers):
        """How many targets these rows have together."""
        return sum(len(self[n][1]) for n in numbers)

    def examples(self, numbers):            # -> inputs, targets, 2 x (B, T) int64
        """Inputs are padded with token 0, targets with -100, which cross-entropy does not count;
        so are those that belong to a prompt."""
        rows = torch.zeros(len(numbers), self.length + 1, dtype=torch.long)
        counts = torch.zeros(len(numbers), self.length + 1, dtype=torch.bool)
        for row, count, n in zip(rows, counts, numbers):
            prompt, completion, _ = self[n]
            start, end = len(prompt), len(prompt) + len(completion)
            row[:end] = torch.tensor([*prompt, *completion])
            count[start:end] = True
        return rows[:, :-1], rows[:, 1:].where(counts[:, 1:], -100)


# ------------------------------------------------------------------ demo

def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


class Net(nn.Module):
    """A small causal Transformer: tokens (B, T) -> logits (B, T, 256)."""

    def __init__(self, C=64, T=36):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, C), nn.Parameter(0.1 * torch.randn(T, C))
        layer = nn.TransformerEncoderLayer(C, 4, 2 * C, dropout=0.0, batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(C, 256)

    def forward(self, tokens):
        T = tokens.shape[1]
        mask = torch.full((T, T), -torch.inf, dtype=self.position.dtype).triu(1)
        x = self.embed(tokens) + self.position[:T]
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def loss_of(model, inputs, targets):        # mean over the counted targets
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)


def tasks(n, random):
    """Random letters, to be written backwards after <; after > only the last one."""
    pairs = []
    for _ in range(n):
        letters = "".join(random.choice(list("abcdefgh"), random.integers(2, 17)))
        pairs.append((letters + "<", letters[::-1]) if random.random() < 0.5 else
                     (letters + ">", letters[-1]))
    return [split_pair(*pair, Bytes()) for pair in pairs]


PARTS = (1, 2, 4, 8, 16, 32, 64)


def demo_claims(pairs):
    inputs, targets = pairs.examples([0])
    prompt, completion, _ = pairs[0]
    first, n = len(prompt) - 1, len(completion)
    counted = targets[0] != -100
    right = targets[0, first:first + n].tolist() == completion and counted.sum() == n
    check(right and completion[-1] == Bytes.end, "targets are the completion and its end, no more",
          f"{n} of {pairs.length} count, from {chr(inputs[0, first])!r} on")

    torch.manual_seed(0)
    model = Net().double()
    inputs, targets = pairs.examples(range(6))
    loss = loss_of(model, inputs, targets)
    want = torch.autograd.grad(loss, list(model.parameters()))
    rows, total = pairs.targets(range(6)), 0.0
    for n in range(6):                      # each alone, without padding
        tokens = torch.tensor([[*pairs[n][0], *pairs[n][1]]])
        size = len(pairs[n][1])
        logits = model(tokens[:, :-1])[0, -size:]
        total = total + F.cross_entropy(logits, tokens[0, -size:], reduction="sum")
    got = torch.autograd.grad(total / rows, list(model.parameters()))
    error = torch.stack([(a - b).abs().max() for a, b in zip(got, want)]).max().item()
    check(error < 1e-12, "padding changes nothing: gradients = rows alone, unpadded",
          f"{error:.0e} (< 1e-12)")


def gradients(model, pairs, parts, weighted):
    """Of as many equal parts of 64 rows, each with its mean loss, as ranks or microbatches would.

    -> mean loss, gradient as one vector."""
    loss, size = 0.0, 64 // parts
    mean = pairs.targets(range(64)) / parts
    for i in range(parts):
        rows = range(i * size, (i + 1) * size)
        weight = pairs.targets(rows) / mean if weighted else 1.0
        loss = loss + weight * loss_of(model, *pairs.examples(rows)) / parts
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([grad.flatten() for grad in grads])


def demo(steps=100):
    pairs = Pairs(tasks(4000, np.random.default_rng(0)), 36)
    demo_claims(pairs)
    torch.manual_seed(0)
    model = Net()
    adamw = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for step in range(steps):
        loss_of(model, *pairs.examples(range(32 * step, 32 * step + 32))).backward()
        adamw.step()
        adamw.zero_grad()
    model.double()
    want, whole = gradients(model, pairs, 1, False)
    print("\n64 pairs in equal parts: loss, and how far the gradient is from the batch's\n"
          "parts    mean of means    weighted by targets")
    errors = {}
    for parts in PARTS:
        rows = [gradients(model, pairs, parts, weighted) for weighted in (False, True)]
        errors[parts] = [((grad - whole).norm() / whole.norm()).item() for _, grad in rows]
        losses = [loss for loss, _ in rows]
        print(f"{parts:5}    {losses[0]:.4f} {errors[parts][0]:7.1%}   {losses[1]:.4f} "
              f"{errors[parts][1]:.0e}")
    print()
    plain, weighted = zip(*errors.values())
    check(max(weighted) < 1e-12 < 0.05 < plain[-1],
          "weighted: the batch's gradient in any number of parts",
          f"{max(weighted):.0e} off, mean of means {plain[-1]:.0%} with {PARTS[-1]}")
    draw(plain)


def draw(plain):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(PARTS, 100 * np.array(plain), "C1o-")
    axes.annotate("mean of the parts' means", (8, 12), color="C1", ha="right")
    axes.plot(PARTS, 0 * np.array(plain), "C0o-")
    axes.annotate("weighted by targets (this file)", (64, 3), color="C0", ha="right")
    axes.set(xscale="log", xlabel="ranks x microbatches that share 64 pairs", xticks=PARTS,
             ylabel="distance from the batch's\ngradient (% of its norm)",
             title="A mean of means is another gradient, and changes with the layout")
    axes.set_xticklabels(PARTS)
    axes.minorticks_off()
    path = pathlib.Path(__file__).parent / "figures" / "sft.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"\nfigure {path.parent.name}/{path.name}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()     # no flags
    demo()
