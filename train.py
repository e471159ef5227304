"""Train a GPT on any text: a curve, a sample of what it writes, checkpoints that survive a kill.

    step: batch(seed, step) -> forward, backward -> average over ranks -> clip -> optimizers
    python train.py                     a byte-level GPT on the Python standard library's own source
    python train.py --data my.txt       on your file: its last 10 % are the validation text
    python train.py --nproc 2           on 2 processes; or: torchrun --nproc-per-node 2 train.py
    python train.py --nproc 2 --zero 3  the same, but a rank holds half the weights (see zero.py)
    python train.py --nproc 2 --tp 2    2 processes split every layer (see tp.py)
    python train.py --nproc 2 --pp 2    2 processes hold different layers (see pp.py)
    python train.py --dtype bf16        multiply in 16 bits, where the hardware can (see amp.py)
    python train.py --recompute full    keep less for backward, compute it again (checkpoint.py)
    python train.py --experts 8         more weights, the same work for a token (see moe.py)
    python train.py --init out/model --peft lora --data my.txt --out tuned      fine-tune (peft.py)
    python train.py --init out/model --data pairs.jsonl --out tuned     prompts, completions: sft.py
    python train.py --resume            go on from the last checkpoint, with the run's own settings
    python train.py --objective mlm     masked (BERT) instead of causal (GPT) language modelling
    python train.py --preset gpt2       a larger model, for a GPU: GPT-2's sizes, compiled, in bf16

--out (default out/) receives metrics.jsonl, loss.png, sample.txt, the best and the last two
checkpoints, and at the end model/, a folder that transformers reads, or with --peft adapter/, one
that peft reads. A batch is a function of (seed, step), dropout's masks of the rank, too: on a CPU a
resumed run repeats the uninterrupted one bit for bit, and any number of processes sees the same
data. On SIGTERM it saves and ends; under torchrun --max-restarts, when a process dies, all go on
from the last checkpoint.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

import peft
import resume
from amp import DynamicLossScaler, autocast, bf16_is_native, convert_to_float8
from data import MASK, Windows, examples, standard_library, text_file
from ddp import DDP
from metrics import Meter, held, memory_now, peak_flops, profiled, report, scores
from model import GPT, TOKENIZER, hf_name
from muon import Muon
from options import (EXPERTS, LAYOUT, LOW, last_settings, microbatches, model_config, parse,
                     print_plan, tokenizer_for)
from pp import Pipeline, schedule
from sft import Bytes, Pairs, pairs_file
from tp import cuts, grad_norm, part_like, sum_replicated_grads, tp_size, unshard
from zero import Zero, held as held_by_zero


def group_along(dim, shape, timeout):
    """All ranks make them: of the groups along one dimension of (pp, dp, tp), say, this rank's."""
    ranks = torch.arange(dist.get_world_size()).view(shape).movedim(dim, -1)
    return dist.new_subgroups_by_enumeration(ranks.reshape(-1, shape[dim]).tolist(),
                                             datetime.timedelta(seconds=timeout))[0]


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def adamw_settings(args):
    return dict(betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)


def build_optimizers(model, args):
    """-> [(optimizer, its peak learning rate), ...], and the line that says which trains what."""
    settings = adamw_settings(args)
    lr = {"muon": 0.04, "adamw": 0.01 if args.peft else 0.002}[args.optimizer]
    lr = lr if args.lr is None else args.lr
    if args.optimizer == "adamw":
        why = ": Muon needs matrices whole on a rank" if args.zero or args.tp > 1 else ""
        trained = [p for p in model.parameters() if p.requires_grad]
        what = f"the {args.peft}, {sum(p.numel() for p in trained):,} numbers" if args.peft else (
            f"all tensors{why}")
        return [(torch.optim.AdamW(trained, lr, **settings), lr)], f"AdamW (lr {lr:g}) for {what}"
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    muon = Muon(matrices, lr, ns_steps=4, weight_decay=args.weight_decay, stacks=True)
    adamw = torch.optim.AdamW(others, lr / 5, **settings)
    where = "the blocks, whole on every rank" if args.pp == 1 else "the blocks on rank 0"
    return [(muon, lr), (adamw, lr / 5)], (
        f"Muon (lr {lr:g}) for the {len(matrices)} matrices of {where}; "
        f"AdamW (lr {lr / 5:g}) for the other {len(others)} tensors")


class Trainer:
    """One run. Bad input fails while it is made (ValueError); then call .train() and .finish()."""

    def __init__(self, args):
        self.args, self.out = args, pathlib.Path(args.out)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world % (args.tp * args.pp):
            raise ValueError(f"--tp {args.tp} times --pp {args.pp} does not divide {self.world} "
                             f"processes: see --nproc")
        self.dp = self.world // (args.tp * args.pp)
        self.dp_rank, pp_rank = self.rank // args.tp % self.dp, self.rank // (args.tp * self.dp)
        self.microbatches = microbatches(args, self.dp)
        parts = self.dp * self.microbatches
        if args.dtype == "fp8" and args.batch_size // parts * args.seq_len % 16:
            raise ValueError(f"--dtype fp8: {args.batch_size // parts} sequences of {args.seq_len} "
                             f"bytes at a time: their product must be a multiple of 16")
        self.log = self.out / "metrics.jsonl"
        if not self.out.name:
            raise ValueError(f"--out {self.out}: a run needs a folder of its own, name one")
        on_all_ranks(self.check_folder)
        self.tokenizer = on_all_ranks(tokenizer_for, args)
        for given in (args.init, args.tokenizer, args.data) if not args.resume else ():
            if given and self.out.resolve() in pathlib.Path(given).resolve().parents:
                raise ValueError(f"{given} lies in --out {args.out}, which is moved aside: name "
                                 f"another --out")
        data = on_all_ranks(self.read_data)
        config = on_all_ranks(model_config, args, self.tokenizer.size)
        if self.dp % args.ep or args.ep > 1 and not args.experts:
            raise ValueError(f"--ep {args.ep}: experts are spread over ranks with other data: use "
                             f"a divisor of {self.dp}, --nproc / (tp pp), and --experts")
        if config.tied and args.pp > 1 and args.zero:
            raise ValueError("--pp with --zero: not for a model whose head is its embedding "
                             "(tied): use --zero 0")
        shape = {key: value for key, value in dataclasses.asdict(config).items()
                 if key != "head_dim" and (args.experts or key not in EXPERTS)}
        if args.init:
            shape |= {"init": on_all_ranks(folder_crc32, args.init), "peft": args.peft}
        self.facts = {**shape, "optimizer": args.optimizer, "data": data}
        flags = {name: value for name, value in vars(args).items()
                 if name not in ("data", "init", "tokenizer", "out")}       # paths, of machines
        on_all_ranks(lambda: None, same=flags | self.facts)
        self.dp_group, self.pp_group, self.tp_group = dist.group.WORLD, None, None
        if args.tp > 1 or args.pp > 1:
            shape = args.pp, self.dp, args.tp
            self.pp_group, self.dp_group, self.tp_group = (
                group_along(dim, shape, args.timeout) for dim in range(3))
        ep_group = None
        if args.ep > 1:                             # dp = replicas of an expert x ep
            shape = args.pp, self.dp // args.ep, args.ep, args.tp
            replicas, ep_group = (group_along(dim, shape, args.timeout) for dim in (1, 2))
        dist.barrier()      # all are connected: a rank that finds a problem may leave from here on
        n = args.pp * args.chunks
        mine = range(pp_rank, n, args.pp)
        layout = dict(tp_group=self.tp_group, sequence_parallel=args.sequence_parallel,
                      stages=(mine, n), ep_group=ep_group,
                      data_group=self.dp_group if self.dp > 1 else None)
        measured = isinstance(args.recompute, float)    # a share of what blocks keep there
        device = "cpu" if args.zero and not measured else args.device       # from there ZeRO cuts
        self.model = on_all_ranks(lambda: (
            GPT.from_pretrained(args.init, config.seq_len, **layout) if args.init else
            GPT(config, **layout)).to(device))
        for p in self.model.parameters():
            if hasattr(p, "expert_parallel"):
                p.replicas = replicas
        low = LOW[args.dtype]
        if low == torch.bfloat16 and not bf16_is_native(args.device):
            say(f"note   no bf16 instruction on this {args.device}: what would be bf16 is fp32")
            low = None
        self.region = contextlib.nullcontext
        if low:                         # the same, but torch.compile sees through torch's alone
            self.region = functools.partial(*[torch.autocast, args.device] if args.compile else
                                            [autocast], low)
        if args.dtype == "fp8":
            convert_to_float8(self.model, skip=("head", "*.router"))
        if args.peft:
            peft.adapt(self.model, args.peft, seed=args.seed)
        self.model.loss_chunk = args.loss_chunk
        with self.region():
            self.model.set_recompute(args.recompute, args.batch_size // parts)
        self.eager = contextlib.nullcontext
        if args.compile:
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            self.model.compile_parts()
            self.eager = functools.partial(torch.compiler.set_stance, "force_eager")
        self.scaler = DynamicLossScaler() if args.dtype == "fp16" else None
        self.optimizers, trained_by = build_optimizers(self.model, args)
        self.zero = self.pipeline = None
        if args.pp > 1:
            def loss_of(logits, targets):
                return self.model.loss_of(logits, targets, self.tp_group)

            def loss_to_step(logits, targets):
                return loss_of(logits, targets) * (self.scale * self.weight(targets))
            stages = [self.model.stage(i, n) for i in mine]
            ops = schedule(args.schedule, args.pp, self.microbatches, args.chunks)
            self.pipeline = Pipeline(stages, ops, loss_to_step, self.pp_group)
            whole = schedule("naive", args.pp, 1, args.chunks)          # for any number of rows
            self.evaluation = Pipeline(stages, whole, loss_of, self.pp_group)
        self.resumed, self.rows_before = 0, 0           # at that step so many rows had been read
        if args.zero:                                   # whole, with AdamW's state: too much for a
            self.model.cpu()                            # GPU that holds a part of both
        if args.dtype == "fp16" and not args.resume:    # a checkpoint may come before a good step
            self.make_state()
        self.step = self.load() if args.resume else 0
        if self.step > args.steps:
            raise ValueError(f"--steps {args.steps}: the checkpoint in {self.out} is of step "
                             f"{self.step}: give at least that")
        if args.zero:
            state, [(_, peak)] = self.tensors(), self.optimizers
            self.zero = Zero(self.model, args.zero, torch.optim.AdamW, self.dp_group, low,
                             device=args.device, lr=peak, **adamw_settings(args))
            self.zero.load_full_state_dict(self.parts(state))
            self.optimizers = [(self.zero.optimizer, peak)]
        self.parallel = self.zero or DDP(self.model, self.dp_group)
        patience = datetime.timedelta(seconds=args.timeout)
        self.watch = dist.new_group(backend="gloo", timeout=patience)   # to ask who is alive
        self.saver, self.stop = resume.Saver(self.out, args.keep, patience), False
        self.first_bad = torch.zeros((), device=args.device)    # step without a finite gradient
        dist.barrier()                              # from here on no rank has bad input
        on_all_ranks(self.begin_folder)
        self.meter = Meter(self.log if self.rank == 0 else None, self.step, args.steps,
                           args.batch_size * args.seq_len, *self.flops(), self.peak(),
                           self.rows_before * args.seq_len)
        count, at_work = self.count_parameters()
        say(f"model  {count:,.0f} parameters: {args.layers} layers, C={args.dim}, H={args.heads}, "
            f"T={args.seq_len}; {self.world} x {args.device}")
        if args.experts:
            all_work = dataclasses.replace(config, top_k=args.experts).flops()
            say(f"moe    {args.top_k} of {args.experts} experts, {config.expert_hidden} wide, work "
                f"for a token: {at_work:,.0f} parameters, {config.flops() / 1e6:.3g} of "
                f"{all_work / 1e6:.3g} MFLOPs")
        say(f"data   {self.data_line}")
        say(f"optim  {trained_by}")
        if self.model.recompute:
            say(f"memory backward computes blocks {sorted(self.model.recompute)} again: "
                f"{args.recompute}")
        if low or args.dtype == "fp8":
            rest = ", residual stream and frozen weights in 16 bits" if args.zero and low else ""
            say(f"dtype  matrix products in {args.dtype}{rest}, optimizer and checkpoints in fp32")

    def read_data(self):
        """Make the training and validation windows, or pairs -> what identifies the text."""
        args = self.args
        if args.data and args.data.endswith(".jsonl"):
            both, make, unit = pairs_file(args.data, self.tokenizer), Pairs, "pairs"
            facts = f"{len(both[0])} pairs with crc32 {zlib.crc32(repr(both[0]).encode()):08x}"
        else:
            texts = text_file(args.data) if args.data else standard_library()
            both = [self.tokenizer.encode_file(text) for text in texts]
            make, unit = Windows, "bytes" if isinstance(self.tokenizer, Bytes) else "tokens"
            facts = f"{len(both[0])} {unit} with crc32 {zlib.crc32(both[0]):08x}"
        self.windows = make(both[0], args.seq_len, args.seed)
        self.val_windows = make(both[1], args.seq_len, args.seed, shuffle=False)
        self.data_line = f"{len(both[0]):,} {unit} to learn from, {len(both[1]):,} to validate on"
        if make is Pairs:
            self.tokens_per_byte = self.val_windows.tokens_per_byte
            self.prompt = self.val_windows.pairs[0][0]
            self.data_line += (f"; of these {self.windows.left_out} and "
                               f"{self.val_windows.left_out} are too long for --seq-len, left out")
        else:
            self.tokens_per_byte = len(both[1]) / len(texts[1])
            self.prompt = self.tokenizer.encode("\n" if args.data else "\ndef ")
        return facts

    def check_folder(self):
        taken = self.out.is_file() or self.out.is_dir() and any(self.out.iterdir())
        if taken and not self.log.exists():
            raise ValueError(f"--out {self.out} holds something that is no run: name another")

    def begin_folder(self):
        """Rank 0 moves an earlier run aside: nothing is overwritten. Another may have begun since
        this one was started."""
        if self.rank > 0:
            return
        claim(self.out)
        if self.log.exists() and not self.args.resume:
            numbered = (self.out.with_name(f"{self.out.name}.{i}") for i in itertools.count(1))
            aside = next(path for path in numbered if not path.exists())
            os.replace(self.out, aside)
            say(f"kept   the earlier run in {self.out} as {aside}")
        self.out.mkdir(parents=True, exist_ok=True)
        claim(self.out)

    def count_parameters(self):
        """-> all of the model, however it is cut; those that work for one token."""
        total, at_work = 0, 0
        for name, p in self.model.named_parameters():
            size = p.numel() * math.prod(tp_size(group) for _, group in cuts(p, self.tp_group))
            if name == "head.weight" and self.model.config.tied:
                continue                            # the last stage's copy of the embedding
            total += size
            routed = name.endswith(("mlp.gate_up", "mlp.down"))
            at_work += size * self.args.top_k // self.args.experts if routed else size
        return [count * self.args.pp / self.world for count in self.sum_over_ranks(total, at_work)]

    def flops(self):
        """-> of a token: the model's; those that run, with what backward computes again, as torch
        counts them on a model without memory. None: it can't, for experts, nor we for --peft, where
        frozen weights need no gradient."""
        config, blocks = self.model.config, [None] * self.world
        dist.all_gather_object(blocks, self.model.recompute)
        blocks = {i: how for some in blocks for i, how in some.items()}
        if self.args.peft:
            return None, None
        if not blocks or self.args.experts:
            return config.flops(), None if blocks else config.flops()
        with torch.device("meta"):
            model, tokens = GPT(config), torch.zeros(1, config.seq_len, dtype=torch.long)
            model.recompute = blocks
            with FlopCounterMode(display=False) as counter:
                model(tokens, tokens)[1].backward()
        return config.flops(), counter.get_total_flops() / config.seq_len

    def peak(self):
        """FLOP/s of all ranks together in the type that multiplies, or None if it is not known: no
        MFU then."""
        name = torch.cuda.get_device_name() if self.args.device == "cuda" else self.args.device
        fp8 = None if "A100" in name else 2                 # times bf16's; an A100 has none
        peak, times = peak_flops(name), {"bf16": 1, "fp16": 1, "fp8": fp8}.get(self.args.dtype)
        return times and peak and times * peak * self.world

    def tensors(self):
        """What a checkpoint holds of this rank, by names and shapes that no layout changes. What is
        put together for it goes to the CPU, one tensor after the other: a GPU holds its parts."""
        state, whole = self.zero.full_state_dict() if self.zero else dict(self.entries()), {}
        for name, t in state.items():
            full = unshard(self.owner(name), self.tp_group, t) if t.dim() else t
            whole[name] = t if full is t else full.cpu()
        return whole

    def parts(self, state):
        """The reverse of tensors(): what this rank holds of each."""
        return {name: part_like(self.owner(name), t, self.tp_group) if t.dim() else t
                for name, t in state.items()}

    def entries(self):
        """Names, and tensors of this rank: parameters, biases of experts, the optimizers' state."""
        mine = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        names = {t: name for name, t in mine}
        if self.model.config.tied:                  # of a last stage: the embedding's, too
            names = {t: "embed.weight" if name == "head.weight" else name
                     for t, name in names.items()}
        yield from ((f"model.{name}", t.detach()) for t, name in names.items())
        for optimizer, _ in self.optimizers:
            for p, entries in optimizer.state.items():
                yield from ((f"optimizer.{names[p]}.{key}", t) for key, t in entries.items())

    def owner(self, entry):
        """The parameter that an entry is of, or is cut like."""
        kind, name = entry.split(".", 1)
        name = name.rpartition(".")[0] if kind == "optimizer" else name
        if name == "embed.weight" and not hasattr(self.model, "embed"):
            name = "head.weight"                    # tied
        found = self.model.get_submodule(name.rpartition(".")[0])
        return getattr(found, name.rpartition(".")[2])

    def make_state(self):
        """The optimizers' state tensors, by a step of size 0; then all of it is 0, too."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        for optimizer, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            optimizer.zero_grad()
            for t in (t for entries in optimizer.state.values() for t in entries.values()):
                t.zero_()

    def load(self):
        """Read the last checkpoint into model and optimizers, in place -> its step."""
        self.make_state()
        state = self.tensors()
        step, settings, problem = resume.load_last(self.out, state, self.facts)
        if problem:
            say(f"note   {problem}; going on from step {step}")
        if self.scaler and settings.get("scaler"):
            self.scaler.load_state_dict(settings["scaler"])
        mine = self.parts(state)
        for name, t in self.entries():
            t.copy_(mine[name])
        self.resumed, self.rows_before = step, settings.get("rows", step * self.args.batch_size)
        return step

    def first_row(self):
        """Number of the first row of the step's batch, from the start of training."""
        return self.rows_before + (self.step - self.resumed) * self.args.batch_size

    def sum_over_ranks(self, *values):
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max_over_ranks(self, value):
        most = torch.tensor(float(value))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    @torch.no_grad()
    def evaluate(self, most=None):
        """Mean nats per target over all validation windows, or about `most` evenly spaced ones."""
        self.model.eval()
        step = max(1, self.val_windows.count // most) if most else 1
        numbers, nats, targets = range(0, self.val_windows.count, step), 0.0, 0
        # Of small models 32 rows at a time, of large ones as many as training takes: their logits.
        small = 2**26 // (self.args.seq_len * self.model.config.vocab_size)
        trained = self.args.batch_size // (self.dp * self.microbatches)
        at_once = self.dp * min(32, max(small, trained))
        for i in range(0, len(numbers), at_once):
            part = numbers[i:i + at_once]
            mine = list(part[self.dp_rank::self.dp])
            rows = [*mine, numbers[0]][:-(-len(part) // self.dp)]       # as many on all ranks
            x, y = self.examples(self.val_windows, rows)
            y = torch.cat([y[:len(mine)], torch.full_like(y[len(mine):], -100)])
            x, y = self.to_device(x, y)
            with self.region(), self.eager():       # other numbers of rows would be other graphs
                loss = self.evaluation.evaluate(x, y) if self.pipeline else self.model(x, y)[1]
            predicted = (y != -100).sum().item()
            if predicted:
                nats, targets = nats + loss.item() * predicted, targets + predicted
        self.model.train()
        nats, targets = self.sum_over_ranks(nats, targets)
        return nats / targets

    def examples(self, windows, numbers):
        with record_function("data"):
            if isinstance(windows, Pairs):
                return windows.examples(numbers)
            return examples(windows, numbers, self.args.objective)

    def to_device(self, *tensors):
        """To a GPU from pinned memory: Python goes on, and does not wait until it has copied."""
        if self.args.device == "cuda":              # elsewhere the source might be gone too early
            return [t.contiguous().pin_memory().to("cuda", non_blocking=True) for t in tensors]
        return [t.to(self.args.device) for t in tensors]

    def weight(self, targets):
        """Of a part's mean loss: its number of targets / that of an average part of the step."""
        if not isinstance(self.windows, Pairs):
            return 1.0                              # all have as many
        step = range(self.first_row(), self.first_row() + self.args.batch_size)
        mean = self.windows.targets(step) / (self.dp * self.microbatches)
        return (targets != -100).sum().item() / mean

    @property
    def scale(self):
        """What the loss is multiplied by before backward; the optimizer sees none of it."""
        return self.scaler.get_scale() if self.scaler else 1.0

    def backward(self):
        """Gradients of the step's batch, mean over microbatches and ranks -> this rank's loss."""
        args, total = self.args, 0.0
        holder = self.rank if args.sequence_parallel else self.rank // args.tp  # of dropout masks
        torch.manual_seed(zlib.crc32(f"{args.seed} {self.step} {holder}".encode()))
        self.model.set_loss_scale(self.scale / self.microbatches)
        rows = args.batch_size // self.dp
        begin = self.first_row() + self.dp_rank * rows
        if self.pipeline:
            x, y = self.examples(self.windows, range(begin, begin + rows))
            with self.parallel.no_sync():
                total = self.pipeline.step(*self.to_device(x, y))
        size = rows // self.microbatches
        for i in range(0 if self.pipeline else self.microbatches):
            part = range(begin + i * size, begin + (i + 1) * size)
            x, y = self.examples(self.windows, part)
            last = i == self.microbatches - 1
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                loss = self.parallel(*self.to_device(x, y))[1]
                loss = loss / self.microbatches * (self.scale * self.weight(y))
                loss.backward()
            total = total + loss.detach()
        self.parallel.sync()
        if args.sequence_parallel:
            sum_replicated_grads(self.model, self.tp_group)
        return total / self.scale

    def update(self):
        """Clip, set the learning rate (linear warm-up times linear decay to zero), step -> norm."""
        clip, params = self.args.clip or math.inf, list(self.model.parameters())
        counted = self.pipeline.counted() if self.pipeline else params
        whole = self.pipeline.grad_norm if self.pipeline else lambda norm: norm
        if self.zero:
            norm = self.zero.clip_grad_norm_(clip, self.scale, whole)
            if self.scaler:
                self.scaler.judge(self.zero, norm.isfinite())
        else:
            for optimizer, _ in self.optimizers if self.scaler else []:
                self.scaler.unscale_(optimizer)
            norm = whole(grad_norm(counted, self.tp_group))
            torch.nn.utils.clip_grads_with_norm_(params, clip, norm)
        warm = min(1, (self.step + 1) / max(1, self.args.warmup))
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * (1 - self.step / self.args.steps)
        for steps in [self.zero] if self.zero else [optimizer for optimizer, _ in self.optimizers]:
            self.scaler.step(steps) if self.scaler else steps.step()
            steps.zero_grad()
        try:
            if self.scaler:
                self.scaler.update()
        except FloatingPointError as problem:       # on all ranks
            self.give_up(f"step {self.step + 1}: {problem}")
        self.step += 1
        bad = ~norm.isfinite() & (self.first_bad == 0)
        self.first_bad += self.step * bad           # no waiting for the GPU in every step
        skipped = self.scaler and not norm.isfinite()
        self.busiest = self.model.balance_experts(self.dp_group, 0.0 if skipped else 0.003)
        return norm

    def train(self):
        """Step until --steps, or until self.stop on some rank; every so often a log line, a
        validation, a checkpoint. -> Did it get to --steps?"""
        args, stopping, spent, parent = self.args, False, {}, os.getppid()
        begin = min(9, args.profile_every - 1)              # of profiling: the tenth step, ...
        trace = self.out / "trace.json" if self.rank == 0 else None
        while self.step < args.steps and not stopping:
            look = args.profile_every and self.step % args.profile_every == begin
            with profiled(trace) if look else self.meter.timing():
                with self.region():
                    loss = self.backward()
                if look:
                    spent = self.memory_split()
                with record_function("update"):
                    norm = self.update()
                log, check, keep = (self.step % every == 0 or self.step == args.steps
                                    for every in (args.log_every, args.eval_every, args.save_every))
                soon = args.profile_every and self.step % args.profile_every == begin
                if log or check or keep or soon:
                    norm = float(norm)      # waits for a GPU here: its time is that of the steps
            if look and self.rank == 0:
                widest = max(self.dp, args.tp, args.pp)     # else groups are of several sizes
                try:
                    spent |= report(json.loads(trace.read_text()),
                                    self.world if widest == self.world and args.ep == 1 else None)
                except Exception as problem:            # no reason to end a run
                    say(f"note   step {self.step}: no profile: {problem!r}")
            if dist.is_torchelastic_launched() and os.getppid() != parent:
                self.stop = True                        # the launcher is gone: nobody would stop it
            with contextlib.nullcontext() if look else self.meter.timing(0):    # for the slowest
                stopping = bool(self.max_over_ranks(self.stop) if self.world > 1 else self.stop)
            keep = keep or stopping
            if not (log or check or keep):
                continue
            loss, norm = self.sum_over_ranks(float(loss))[0] / self.world, float(norm)
            self.stop_at_nan(loss, norm)
            values = {"loss": loss, "grad_norm": norm,
                      "lr": self.optimizers[0][0].param_groups[0]["lr"]}
            if self.scaler:
                values["loss_scale"] = self.scale
            if args.experts:
                values["busiest"] = self.max_over_ranks(self.busiest)
            if log:
                values, spent = values | memory_now() | spent, {}
            if check:
                score = nats = self.evaluate(100)
                if self.step == args.steps:
                    nats = self.evaluate()
                values |= scores(nats, self.tokens_per_byte)
            line = self.meter.log(self.step, **values)
            if keep:
                settings = {key: value for key, value in vars(args).items() if key not in LAYOUT}
                settings["scaler"] = self.scaler and self.scaler.state_dict()
                settings |= {"job": job(), "stopped": os.getppid() if stopping else None,
                             "rows": self.first_row()}
                state = self.tensors()
                if self.max_over_ranks(not all(t.isfinite().all() for t in state.values())):
                    self.give_up(f"weights or optimizer state are not finite after step "
                                 f"{self.step}, and not saved: lower --lr")
                self.saver.save(self.step, state, self.facts, settings, score if check else None)
            say(line)
        self.saver.wait()
        return self.step == args.steps

    def memory_split(self):
        """Bytes of this rank, between backward and update."""
        if self.zero:
            sizes = held_by_zero(self.zero)
        else:
            params = list(self.model.parameters())
            states = [t for optimizer, _ in self.optimizers for entries in optimizer.state.values()
                      for t in entries.values()]
            sizes = [held(params), held([p.grad for p in params if p.grad is not None]),
                     held(states)]
        return dict(zip(("parameter_bytes", "gradient_bytes", "optimizer_bytes"), sizes))

    def stop_at_nan(self, loss, norm):
        """Loss and norm are the same on all ranks. A scaler skips such steps, and knows an end."""
        first = int(self.first_bad)
        if self.scaler or math.isfinite(loss) and first == 0:
            return
        step = first or self.step
        begin = self.first_row() - (self.step - step + 1) * self.args.batch_size
        where = self.windows.where(range(begin, begin + min(8, self.args.batch_size)))
        self.give_up(f"loss {loss}, gradient norm {norm} at step {self.step}: first not finite in "
                     f"step {step}, whose batch begins with {where}: lower --lr, or look at that "
                     f"text; the checkpoints are from before")

    def give_up(self, why):
        """All ranks call it. What is being saved was good."""
        self.saver.wait()
        raise SystemExit(f"error: {why}")

    def who_is_missing(self):
        """After a time-out: which ranks do not answer."""
        try:
            dist.monitored_barrier(self.watch, datetime.timedelta(seconds=5), wait_all_ranks=True)
        except RuntimeError as who:
            return str(who).strip().splitlines()[-1]
        return "all ranks answer now"

    def finish(self):
        """A sample of what the model writes, the curve, and proof that all ranks hold one model."""
        state, crc32 = self.tensors(), 0
        if self.pipeline:                           # what the other stages hold
            parts = [None] * self.args.pp
            mine = {name: t.cpu() for name, t in state.items() if name.startswith("model.")}
            dist.all_gather_object(parts, mine, group=self.pp_group)
            state = {name: t for part in parts for name, t in part.items()}
        whole = GPT(self.model.config)                                  # whatever the layout
        if self.args.peft:
            peft.adapt(whole, self.args.peft, seed=self.args.seed)
        for name, t in itertools.chain(whole.named_parameters(), whole.named_buffers()):
            t.data.copy_(state[f"model.{name}"])
            crc32 = zlib.crc32(t.detach().numpy().tobytes(), crc32)
        drifted = self.sum_over_ranks(crc32) != [crc32 * self.world]
        if self.rank == 0:
            device = self.args.device
            if device == "cuda":                    # it may be too much beside what is there
                torch.cuda.empty_cache()
                free, _ = torch.cuda.mem_get_info()
                device = device if free > 1.2 * held(whole.parameters()) else "cpu"
            self.export(whole)                      # first: on a CPU a sample may take long
            self.sample(whole.to(device).eval())
            try:
                self.meter.plot(self.out / "loss.png")
            except ImportError:
                say("note   no loss.png: pip install matplotlib")
        if drifted:
            dist.barrier()                          # rank 0 has written what it holds
            raise RuntimeError(f"the ranks hold different weights, rank {self.rank} {crc32:08x}")
        say(f"weights crc32 {crc32:08x} on {self.world} rank(s); the run is in {self.out}/")

    def export(self, model):
        """The folders that transformers and peft read, where they know such a model."""
        try:
            if self.args.peft:
                with self.replaced("adapter") as folder:
                    peft.save_adapter(model, folder, rename=hf_name)
            if self.args.merge:
                peft.merge(model)
            if self.args.merge or not self.args.peft:
                pairs = isinstance(self.windows, Pairs) and isinstance(self.tokenizer, Bytes)
                more = {"eos_token_id": self.tokenizer.end} if pairs or self.args.tokenizer else {}
                if isinstance(self.tokenizer, Bytes) and model.config.vocab_size != 256:
                    more["byte_level"] = True                               # for folder_config()
                with self.replaced("model") as folder:
                    model.save_pretrained(folder, copy_from=self.args.init, **more)
                    for name in TOKENIZER if self.args.tokenizer else ():
                        if pathlib.Path(self.args.tokenizer, name).is_file():
                            shutil.copy(pathlib.Path(self.args.tokenizer, name), folder)
        except Exception as reason:                 # also safetensors' own: the run itself is done
            say(f"note   no folder to share: {reason}")

    @contextlib.contextmanager
    def replaced(self, name):
        """Save into the folder that this gives; then it takes the place of an earlier end's."""
        new = self.out / f"{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        yield new
        shutil.rmtree(self.out / name, ignore_errors=True)
        os.replace(new, self.out / name)

    @torch.no_grad()
    def sample(self, model):
        """causal: 500 new tokens, of pairs a completion of the first validation prompt. mlm: the
        first validation window, its hidden bytes filled in."""
        device = next(model.parameters()).device
        if self.args.objective == "causal":
            torch.manual_seed(self.args.seed)
            prompt = torch.tensor([self.prompt or [self.tokenizer.end]], device=device)
            prompted = self.args.peft in ("prompt", "p_tuning")     # it takes some of seq_len
            short = prompted or isinstance(self.windows, Pairs)
            new = max(1, self.args.seq_len - prompt.shape[1]) if short else 500
            tokens = model.generate(prompt, new, 0.8, use_cache=not prompted)
        else:
            tokens = examples(self.val_windows, [0], "mlm")[0].to(device)
            tokens = tokens.where(tokens != MASK, model(tokens)[0][..., :MASK].argmax(-1))
        tokens = [token for token in tokens[0].tolist() if token < self.tokenizer.size]
        if isinstance(self.windows, Pairs) and self.tokenizer.end in tokens[len(self.prompt):]:
            tokens = tokens[:tokens.index(self.tokenizer.end, len(self.prompt))]
        text = self.tokenizer.decode(tokens)
        (self.out / "sample.txt").write_text(text, encoding="utf-8")
        say(f"{' a sample of what it writes ':-^80}\n{text.strip()}\n{'':-^80}")


def folder_crc32(folder):
    crc32 = 0
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        crc32 = zlib.crc32(path.read_bytes(), crc32)
    return f"{crc32:08x}"


def on_all_ranks(task, *given, same=None):
    """task(*given), and what it gives. ValueError on all ranks, if one has a problem with it, or
    another `same`, a dict of these keys, than rank 0."""
    result = problem = None
    try:
        result = task(*given)
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, (problem, same))
    problems = [problem for problem, _ in every]
    for rank, problem in enumerate(problems):
        if problem:
            raise ValueError(f"rank {rank}: {problem}" if None in problems else problem)
    first = every[0][1]
    for rank, (_, other) in enumerate(every):
        if other != first:
            names = [name for name in first if other[name] != first[name]]
            raise ValueError(f"rank {rank} has other data, flags, or another model, than rank 0: " +
                             ", ".join(f"{n} = {other[n]}, not {first[n]}" for n in names))
    return result


CLAIMED = []                                        # the descriptor of the folder that is locked


def claim(out):
    """Rank 0 locks the folder of a run, if it is there, until its process ends, or claims another.
    ValueError: another process has locked it."""
    if dist.get_rank() > 0 or not os.path.isdir(out) or any(
            os.path.samestat(os.fstat(folder), os.stat(out)) for folder in CLAIMED):
        return
    import fcntl                                    # not on Windows
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ValueError(f"--out {out}: a run is going on there: wait for it, stop it, or name "
                         f"another --out") from None
    except OSError:                                 # a file system without locks
        pass
    while CLAIMED:
        os.close(CLAIMED.pop())
    CLAIMED.append(folder)


def fail(message):
    if not dist.is_torchelastic_launched() or os.environ["LOCAL_RANK"] == "0":    # once a machine
        print(f"error: {message}", file=sys.stderr, flush=True)
    leave(2)


def job():
    """What torchrun calls the job, the same after it has restarted the processes."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} {os.getppid()}" if name == "none" else name


def restarted(args):
    """Has torchrun started this job's processes again, and has it left a checkpoint? As rank 0 sees
    it; any rank may be on a machine that is new in the job. The first time an earlier run's folder,
    which is not moved aside yet, gets a mark: another job may have had the same name."""
    times = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    dist.all_reduce(times, dist.ReduceOp.MAX)

    def seen():
        mark = pathlib.Path(args.out, "before_the_job")
        if dist.get_rank() > 0 or not resume.saved(args.out):
            return False
        if times == 0 and not args.resume:
            mark.write_text(job())
        elif times == 0:
            mark.unlink(missing_ok=True)
        elif not mark.exists() or mark.read_text() != job():
            with contextlib.suppress(ValueError):
                return last_settings(args.out).get("job") == job()
        return False

    again = [on_all_ranks(seen)]
    dist.broadcast_object_list(again)
    return again[0]


def start_ranks(args, argv):
    """What typing torchrun would do: this program again, in args.nproc processes."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)       # the ranks report
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.nproc)))
    try:
        with tempfile.TemporaryDirectory() as folder:           # torch's own it would leave behind
            here = LaunchConfig(run_id="train", min_nodes=1, max_nodes=1, nproc_per_node=args.nproc,
                                rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                                logs_specs=DefaultLogsSpecs(folder))
            elastic_launch(here, sys.executable)(__file__, *argv)
    except ChildFailedError as failed:
        sys.exit(max(1, *(failure.exitcode for failure in failed.failures.values())))
    except SignalException:                         # which the ranks have got, too
        last = resume.saved(args.out)[-1:]
        done = last and (last_settings(args.out).get("stopped") == os.getpid() or
                         last[0].name == f"step_{args.steps:07d}")
        sys.exit(0 if done else 1)


def main(argv):
    try:
        args = parse(argv)
        if args.plan:
            return print_plan(args)
        if args.device == "cpu":
            keep_memory()
            if args.compile:
                multiply_by_onednn()
        if dist.is_torchelastic_launched():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=args.timeout))
        elif args.nproc > 1:
            return start_ranks(args, argv)
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            if args.dtype != "fp32":                    # then Muon's products may be TF32, too
                torch.set_float32_matmul_precision("high")
        on_all_ranks(claim, args.out)                   # also later, where it is a new folder
        if dist.is_torchelastic_launched() and restarted(args):
            args = parse([*argv, "--resume"])
        trainer = Trainer(args)
    except (ValueError, OSError, ImportError) as problem:
        if not dist.is_torchelastic_launched():
            end_group()
        fail(problem)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop", True))
    try:
        if trainer.train():
            trainer.finish()
        else:
            say(f"stopped by SIGTERM: step {trainer.step} is saved; go on with --resume")
        dist.barrier()                                  # gloo may abort whom others leave behind
    except SystemExit as ended:
        leave(ended.code if dist.get_rank() == 0 else 1)        # said once: all ranks give up
    except Exception as problem:
        if "imed out" in str(problem):
            leave(f"error: rank {dist.get_rank()} waited {args.timeout} s for others, in step "
                  f"{trainer.step + 1}: {trainer.who_is_missing()}")
        if isinstance(problem, OSError):
            leave(f"error: cannot write: {problem}. " + (
                "The last checkpoint is whole: make room, and go on with --resume"
                if resume.saved(args.out) else "No checkpoint is there yet: make room, and start "
                "again"))
        traceback.print_exc()
        leave(1)
    dist.destroy_process_group()
    leave(0)


def keep_memory():
    """Let freed memory stay with the process. glibc gives megabytes back to the system at once, and
    the next tensor pays a page fault for every 4 KB: on a CPU up to 15 % of a run. The price: the
    process keeps the most that it ever had."""
    with contextlib.suppress(AttributeError):           # macOS and musl do not have it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)                                 # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)                                  # M_MMAP_MAX: no block of its own


@torch.library.custom_op("train::mm_by_onednn", mutates_args=())
def mm_by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@mm_by_onednn.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


def multiply_by_onednn():
    """On AMD's processors with AVX-512: have torch.compile call oneDNN for products of float32
    matrices. torch itself calls MKL, which seems to use no AVX-512 there: on Zen 5 it has less
    than half of oneDNN's speed (README, Measured). Products in a batch, or with a bias, stay."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    amd = has.get("avx512_f") and has.get("cpu_name", "").startswith("AMD")
    if not amd or not torch.backends.mkldnn.is_available():         # torch's name for oneDNN
        return
    from torch._inductor import config, custom_graph_pass

    class ByOneDNN(custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
                product = node.meta["val"]
                if product.device.type == "cpu" and product.dtype == torch.float32:
                    node.target = torch.ops.train.mm_by_onednn.default

        def uuid(self):                             # what compiled code in torch's cache depends on
            return "train.mm_by_onednn 1"
    config.post_grad_custom_post_pass = ByOneDNN()


def end_group():
    """Ends gloo's threads, too."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code):
    """End, at once under torchrun: a thread that saves may wait for a rank that is gone, and gloo's
    threads may hold tensors as Python ends, and abort. A text is printed, and ends with 1."""
    if not dist.is_torchelastic_launched():
        atexit.register(end_group)                  # called once the thread that saves has ended
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")        # a sample may hold what this terminal cannot
    main(sys.argv[1:])
