"""The options of train.py: their defaults and presets, and which of them go together.

    argv  ->  parse  ->  args, or a ValueError that names the flag, the reason and what to do

A flag has the value that is typed; else, with --resume, that of the run; else that of --preset;
else its default. --init gives the shape of the model.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys

import torch

import peft
import resume
from metrics import CHIPS, Shape, plan, print_plans
from model import Config, config_of, stage_blocks
from pp import NAMES, schedule
from sft import Bytes, tokenizer_of

EXPERTS = "experts", "top_k", "shared_experts", "expert_hidden", "moe_every", "balance"
SHAPE = ("layers", "dim", "heads", "kv_heads", "hidden", "seq_len", "mlp", "dropout", "seed",
         *EXPERTS)
LAYOUT = ("nproc", "zero", "tp", "sequence_parallel", "pp", "schedule", "chunks", "ep", "device",
          "out", "resume", "timeout", "plan", "profile_every")          # not resumed
PRESETS = {     # defaults of flags; the vocabulary: GPT-2's 50257 tokens, to a multiple of 128
    "shakespeare": dict(layers=6, dim=384, heads=6, kv_heads=6, seq_len=256, batch_size=64,
                        dropout=0.1, lr=0.06, steps=260, eval_every=50),
    "gpt2": dict(layers=12, dim=768, heads=12, kv_heads=12, seq_len=1024, vocab_size=50304,
                 batch_size=512, microbatch_size=32, loss_chunk=8192, compile=True, dtype="bf16"),
    "gpt2-medium": dict(layers=24, dim=1024, heads=16, kv_heads=16, seq_len=1024, vocab_size=50304,
                        batch_size=512, microbatch_size=16, loss_chunk=8192, compile=True,
                        dtype="bf16")}
LOW = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def compiler():
    """Where the one is that torch.compile uses on a CPU, or None."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def recompute(text):
    if text in ("none", "full", "selective"):
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: use none, full, selective, or a share from 0 to 1")


def add_flags(add):                                     # add: a parser's add_argument
    add("--data", help="text file, or *.jsonl of pairs, {\"prompt\": ..., \"completion\": ...}; "
        "default: the Python standard library's source")
    add("--objective", choices=("causal", "mlm"), default="causal", help="next or hidden bytes")
    add("--preset", choices=tuple(PRESETS), help="other defaults: shakespeare, a small model with "
        "dropout for a small text; gpt2, gpt2-medium: the sizes of these, for one large GPU")
    add("--tokenizer", help="folder with a tokenizer.json; default: that of --init, else bytes")
    add("--vocab-size", type=int, help="rows of embedding and head; default: the tokenizer's size, "
        "to a multiple of 128; bytes: 256")
    add("--init", help="start from the model of this folder, instead of at random; it gives the "
        "shape, too")
    methods = [name for name in peft.METHODS if name != "bitfit"]  # none of these has biases
    add("--peft", choices=methods, help="with --init: train only this beside it")
    add("--merge", action="store_true", help="with --peft: at the end, write a whole model/, too")
    add("--layers", type=int, default=3)
    add("--dim", type=int, default=128, help="width C of the model")
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2, help="key/value heads, a divisor of --heads")
    add("--hidden", type=int, help="width inside the MLP; default: 4 C, for swiglu 8/3 C")
    add("--seq-len", type=int, default=256, help="bytes, or tokens of --init, in a sequence")
    add("--mlp", choices=("swiglu", "gelu", "relu", "relu2"), default="swiglu")
    add("--experts", type=int, default=0, help="in place of every MLP so many; 0: the MLP")
    add("--top-k", type=int, default=2, help="experts that work for a token")
    add("--shared-experts", type=int, default=0, help="further ones, that work for all tokens")
    add("--expert-hidden", type=int, help="width inside an expert; default: those that work for a "
        "token are together as wide as the MLP")
    add("--moe-every", type=int, default=1, help="2: experts in every other block, ...")
    add("--balance", choices=("bias", "aux", "none"), default="bias", help="against a collapse on "
        "few experts: a bias on their scores, a loss, or nothing")
    add("--dropout", type=float, default=0.0)
    add("--steps", type=int, default=1000)
    add("--batch-size", type=int, default=4, help="sequences in a step, over all ranks")
    add("--microbatches", type=int, help="parts in which a rank takes its share; default: 1, "
        "with --pp as many as divide it, at most 4 a process of --pp")
    add("--microbatch-size", type=int, help="instead: as few parts as have at most so many rows")
    add("--optimizer", choices=("muon", "adamw"), help="default: muon; with --zero, "
        "--tp and --peft adamw")
    add("--lr", type=float, help="peak learning rate; default: 0.04 for muon, 0.002 for adamw, "
        "0.01 with --peft")
    add("--warmup", type=int, default=0, help="steps until the peak")
    add("--weight-decay", type=float, default=0.0, help="what is trained shrinks in a step by its "
        "learning rate times this")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no limit")
    add("--seed", type=int, default=0)
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=here, help="default: cuda, if every process has a GPU, else cpu")
    add("--dtype", choices=tuple(LOW), default="fp32", help="of matrix products; fp16 and fp8 are "
        "emulated on a CPU, bf16 only used if it has the instruction")
    add("--recompute", type=recompute, default="none", help="what backward computes again, to save "
        "memory: none, full, selective (not matmuls and attention), or the share kept, 0 to 1")
    add("--loss-chunk", type=int, default=0, help="tokens whose logits exist at once, to save "
        "memory with a large vocabulary; 0: all")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile for "
        "each block and the loss: faster steps, after a minute of compiling")
    add("--nproc", type=int, default=1, help="processes to start on this machine")
    add("--tp", type=int, default=1, help="processes that split every layer")
    add("--sequence-parallel", action="store_true", help="with --tp: norms, residual stream, too")
    add("--pp", type=int, default=1, help="processes with different layers, a pipeline")
    add("--schedule", choices=NAMES, default="1f1b", help="order of the microbatches in --pp")
    add("--chunks", type=int, help="groups of layers on a process of --pp; default: 2 for "
        "interleaved, else 1")
    add("--ep", type=int, default=1, help="processes with different data that share --experts")
    add("--zero", type=int, choices=range(4), default=0, help="ZeRO stage; 0: each holds all")
    add("--out", default="out", help="folder of the run")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=int, default=250, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints that remain, beside the best")
    add("--timeout", type=int, default=600, help="seconds that a process waits for another")
    add("--eval-every", type=int, default=250, help="steps between validations")
    add("--log-every", type=int, default=50, help="steps between log lines")
    add("--profile-every", "--profile", type=int, nargs="?", const=500, default=500, help="steps "
        "between profiled ones, from the tenth on: trace.json, and where time and memory went; 0: "
        "none")
    add("--plan", choices=tuple(CHIPS), help="do not train: print memory, traffic and time of this "
        "run, if each process had such a GPU")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """-> the flags as a namespace. ValueError: one is unknown, or they don't go together."""
    parser = Parser(description="Train a GPT on any text: a curve, a sample of what it writes, "
                    "checkpoints that survive a kill.", allow_abbrev=False)
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    preset, rate = args.preset, args.lr
    if preset:
        if args.init:
            raise ValueError("--preset goes without --init, which gives the shape")
        if args.objective != "causal" and "vocab_size" in PRESETS[preset]:
            raise ValueError(f"--preset {preset}, a vocabulary of tokens, goes with --objective "
                             f"causal")
        parser.set_defaults(**PRESETS[preset])
        args = parser.parse_args(argv)
    if args.init:                                       # None: not typed, see take_shape
        own = {"seq_len", "dropout", "seed"}
        parser.set_defaults(**{name: None for name in SHAPE if name not in own})
        args = parser.parse_args(argv)
    if args.resume:                                     # the run's own settings are the defaults
        if not resume.saved(args.out):
            raise ValueError(f"--resume: no checkpoint in {args.out}; start without --resume")
        settings = last_settings(args.out)
        if preset and preset != settings.get("preset"):
            raise ValueError(f"--resume goes without --preset: the run in {args.out} has its own")
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
    if args.chunks is None:
        args.chunks = 2 if args.schedule == "interleaved" else 1
    useless = [name for name in EXPERTS[1:] if getattr(args, name) != parser.get_default(name)]
    if useless and not args.experts and not args.init:
        raise ValueError(f"--{useless[0].replace('_', '-')} goes with --experts")
    for name in ("steps", "batch_size", "microbatches", "microbatch_size", "nproc", "tp", "pp",
                 "ep", "chunks", "keep", "save_every", "eval_every", "log_every", "timeout"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: use at least 1")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.nproc))
    if args.nproc not in (1, processes):
        raise ValueError(f"--nproc {args.nproc}: torchrun has started {processes} processes here: "
                         f"leave it out")
    enough = processes <= torch.cuda.device_count()
    args.device = args.device or ("cuda" if enough else "cpu")
    if args.device == "cuda" and not enough and not args.plan:
        raise ValueError(f"--device cuda: {processes} processes for {torch.cuda.device_count()} "
                         f"GPUs: use --nproc {torch.cuda.device_count()}, or --device cpu")
    args.optimizer = args.optimizer or (
        "adamw" if args.zero or args.tp > 1 or args.peft else "muon")
    if preset and args.optimizer != "muon" and not args.resume:
        args.lr = rate                                  # a preset's is Muon's
    for name in ("clip", "warmup", "weight_decay", "profile_every", "shared_experts", "seed"):
        if not (getattr(args, name) or 0) >= 0:             # also NaN
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 0 or more")
    refuse(args)
    return args


def refuse(args):
    """ValueError: flags that don't go together, and why. What the model itself refuses, or the
    number of processes, fails later."""
    if args.peft and (args.optimizer == "muon" or args.dtype == "fp8"):
        raise ValueError("--peft goes with --optimizer adamw, and without --dtype fp8")
    if not args.init and (args.peft or args.merge) or args.merge and not args.peft:
        raise ValueError("--peft needs --init FOLDER, and --merge needs --peft")
    if args.merge and args.peft not in ("lora", "dora", "ia3"):
        raise ValueError(f"--merge: {args.peft} is no change of weights; lora, dora and ia3 are")
    if args.weight_decay and args.peft in ("ia3", "dora"):
        raise ValueError(f"--weight-decay goes without --peft {args.peft}: scales that belong near "
                         f"1 or |W| would shrink, and the base with them")
    if args.peft in ("prompt", "p_tuning") and args.pp > 1:
        raise ValueError(f"--peft {args.peft} goes without --pp: the prompt enters and leaves the "
                         f"whole model")
    if args.data and args.data.endswith(".jsonl") and args.objective != "causal":
        raise ValueError("--data *.jsonl, pairs, goes with --objective causal")
    if args.init and (args.objective != "causal" or args.dropout):
        raise ValueError("--init goes with --objective causal, and without --dropout")
    if args.optimizer == "muon" and (args.zero or args.tp > 1):
        raise ValueError("--zero and --tp cut the matrices that Muon needs whole: drop them, or "
                         "train with --optimizer adamw")
    if args.tp > 1 and args.zero or args.sequence_parallel and args.tp == 1:
        raise ValueError("--tp goes without --zero, which is not written for parts of matrices, "
                         "and --sequence-parallel with --tp only")
    if args.pp == 1 and (args.schedule != "1f1b" or args.chunks > 1):
        raise ValueError("--schedule and --chunks go with --pp only")
    if args.dtype == "fp8" and args.schedule == "zb-h1":
        raise ValueError("--dtype fp8 goes without --schedule zb-h1: only F.linear splits its "
                         "backward; use 1f1b")
    if args.loss_chunk < 0 or args.loss_chunk and (args.tp > 1 or args.pp > 1):
        raise ValueError(f"--loss-chunk {args.loss_chunk}: tokens, at least 0; not with --tp or "
                         f"--pp, where a rank has fewer logits anyway: add --loss-chunk 0")
    if args.compile and (args.recompute == "selective" or args.schedule == "zb-h1"):
        raise ValueError("--compile goes without --recompute selective and --schedule zb-h1: they "
                         "act on single operators, which a compiled block hides")
    if args.compile and not args.plan and args.device == "cpu" and not compiler():
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or set CXX")
    if args.tokenizer and (args.init or args.objective != "causal"):
        raise ValueError("--tokenizer goes without --init, which has its own, and with --objective "
                         "causal")
    if args.vocab_size is not None and (
            args.vocab_size < 1 or args.init or args.objective != "causal"):
        raise ValueError(f"--vocab-size {args.vocab_size}: at least 1, without --init, and with "
                         f"--objective causal")
    if args.pp > 1 and args.zero > 1:
        raise ValueError("--pp goes with --zero 0 or 1: 2 and 3 send in every microbatch")


def last_settings(out):
    """Of the newest checkpoint that has readable ones."""
    for folder in reversed(resume.saved(out)):
        with contextlib.suppress(resume.Damaged):
            return resume.settings_of(folder)
    raise ValueError(f"--resume: no checkpoint in {out} has a readable manifest.json")


def tokenizer_for(args):
    folder = args.init or args.tokenizer
    tokenizer = tokenizer_of(folder) if folder else Bytes()
    if args.tokenizer and isinstance(tokenizer, Bytes):
        raise ValueError(f"--tokenizer {args.tokenizer}: no tokenizer.json there")
    return tokenizer


def vocabulary(args, tokens):
    """Rows of embedding and head: more than there are tokens, where that makes them multiples of
    128, which matmuls on a GPU like; a masked model also needs MASK."""
    if args.objective == "mlm":
        return 264                                  # bytes, MASK, padding for fp8
    size = args.vocab_size or -(-tokens // 128) * 128
    if size < tokens:
        raise ValueError(f"--vocab-size {size}: the tokenizer has {tokens} tokens")
    return size


def folder_config(folder, seq_len, tokens):
    """ValueError: no model there, or one of other tokens."""
    path = pathlib.Path(folder, "config.json")
    if not path.is_file():
        raise ValueError(f"--init {folder}: no config.json there: give a folder such as out/model")
    try:
        theirs = json.loads(path.read_text())
        config = config_of(theirs, seq_len)
    except (json.JSONDecodeError, TypeError, AttributeError) as problem:
        raise ValueError(f"--init {folder}: config.json: {problem}") from problem
    own = pathlib.Path(folder, "tokenizer.json").is_file()
    of_bytes = config.vocab_size == 256 or theirs.get("byte_level")
    if config.vocab_size < tokens or not own and not of_bytes:
        raise ValueError(f"--init {folder}: the model has {config.vocab_size} tokens, "
                         + (f"tokenizer.json {tokens}" if own else "and no tokenizer.json is there "
                            "to make them: without one it must be 256, bytes"))
    return config


def take_shape(args, config):
    """Of the model of --init. ValueError: a flag that says otherwise."""
    for name in SHAPE:
        if name not in ("seq_len", "seed"):
            has, typed = getattr(config, name), getattr(args, name)
            if typed not in (None, has):
                raise ValueError(f"--{name.replace('_', '-')} {typed}: the model of --init has "
                                 f"{has}; leave it out")
            setattr(args, name, has)


def model_config(args, tokens):
    """The Config of a model for a tokenizer of that size; with --init its folder's, and the flags
    take its shape. ValueError: it does not fit."""
    if not args.init:
        return Config(vocab_size=vocabulary(args, tokens), causal=args.objective == "causal",
                      **{name: getattr(args, name) for name in SHAPE})
    more = 16 if args.peft in ("prompt", "p_tuning") else 0         # peft.py's length
    room = folder_config(args.init, None, tokens).seq_len - more
    if args.seq_len > room:
        raise ValueError(f"--seq-len {args.seq_len}: this model reads at most {room} tokens"
                         + (f" beside the {more} of --peft {args.peft}" if more else ""))
    config = folder_config(args.init, args.seq_len + more, tokens)
    take_shape(args, config)
    return dataclasses.replace(config, seed=args.seed)


def microbatches(args, dp):
    """--microbatches, or as many as --microbatch-size asks for, or 1; in a pipeline the most that
    divide a rank's rows, up to 4 a process of it; for interleaved a multiple of --pp. ValueError:
    the batch does not split so."""
    rows, step = args.batch_size // dp, args.pp if args.schedule == "interleaved" else 1
    fits = [m for m in range(step, rows + 1, step) if rows % m == 0]
    if args.microbatch_size:
        fits = [m for m in fits if rows <= m * args.microbatch_size][:1]
    else:
        fits = [m for m in fits if m <= 4 * args.pp] if args.pp > 1 else []
    count = args.microbatches or (fits[-1] if fits else 1)
    if args.batch_size % (dp * count):
        raise ValueError(f"--batch-size {args.batch_size} does not split into {dp * count} parts, "
                         f"data-parallel ranks x microbatches: pick a multiple of {dp * count}")
    return count


def planned(args):
    """What metrics.py's planner expects of this run -> Shape, layout, plan(). ValueError: it does
    not know such models."""
    config = model_config(args, 0 if args.init else tokenizer_for(args).size)
    if args.peft or config.shared_experts or config.moe_every > 1 or config.tied:
        raise ValueError("--plan goes without --peft, --shared-experts, --moe-every, and a head "
                         "that is the embedding (tied)")
    if args.schedule not in ("1f1b", "interleaved"):
        raise ValueError(f"--plan knows --schedule 1f1b and interleaved, not {args.schedule}")
    if args.dtype not in ("bf16", "fp16") or args.recompute not in ("none", "full"):
        raise ValueError("--plan knows --dtype bf16 and fp16, --recompute none and full, not "
                         f"{args.dtype}, {args.recompute}")
    shape = Shape(config.layers, config.dim, config.heads, config.kv_heads,
                  config.expert_hidden if config.experts else config.hidden, config.vocab_size,
                  config.seq_len, config.mlp == "swiglu", config.experts, config.top_k,
                  config.head_dim, config.qk_norm)
    dp = args.nproc // (args.tp * args.pp)
    if dp * args.tp * args.pp != args.nproc:
        raise ValueError(f"--nproc {args.nproc} is no multiple of --tp {args.tp} x --pp {args.pp}")
    blocks = stage_blocks(config, args.pp * args.chunks)        # both refuse what the run would
    schedule(args.schedule, args.pp, microbatches(args, dp), args.chunks)
    for name, size in {"--vocab-size": config.vocab_size, "--hidden": shape.hidden,
                       "--seq-len": config.seq_len if args.sequence_parallel else 0}.items():
        if size % args.tp:
            raise ValueError(f"{name} {size} is no multiple of --tp {args.tp}")
    low = args.zero and LOW[args.dtype]         # the others keep weights and gradients in fp32
    rows = args.batch_size // (dp * microbatches(args, dp))
    layout = dict(dp=dp, tp=args.tp, pp=args.pp, ep=args.ep, zero=args.zero, chunks=args.chunks,
                  microbatch=rows, recompute=args.recompute == "full",
                  sequence_parallel=args.sequence_parallel)
    needs = plan(shape, args.plan, args.batch_size, kinds=(2, 2, 12) if low else (4, 4, 8),
                 loss_chunk=args.loss_chunk, product=2, counts=[len(part) for part in blocks],
                 stops_early=True, **layout)
    return shape, layout, needs


def print_plan(args):
    shape, layout, needs = planned(args)
    print(f"{shape.parameters():,} parameters in matrices, {args.nproc} x {args.plan}, a step of "
          f"{args.batch_size} x {args.seq_len} tokens, computing at {CHIPS[args.plan][5]:.0%} of "
          f"the peak of bf16; optimizer as large as AdamW's")
    print_plans([(layout, needs)])
    if needs["memory"] > 0.9 * CHIPS[args.plan][1]:
        print(f"does not fit: above 90 % of {CHIPS[args.plan][1] / 1e9:.0f} GB")
