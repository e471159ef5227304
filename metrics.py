"""Training metrics: what a run logs, which numbers compare, and what a run would need: a planner.

    nats per token   l = -1/N sum_i log p(x_i | x_<i)          N predicted tokens of the whole text
    perplexity       exp(l)            of all tokens together, never a mean of batches' perplexities
    bits per byte    l / log 2 * tokens / bytes                the one to compare between tokenizers

    mean of {2, 4} nats = 3     exp(3) = 20.1     mean(exp(2), exp(4)) = 31.0: another number,
                                                  and it changes with the batch size

    MFU   tokens/s x model FLOPs of a token / peak FLOPs: useful work, recomputation not counted
    HFU   the same with the FLOPs that ran: with everything recomputed 4/3 of MFU
          FLOPs of a token = 6 x matrix elements + 12 x layers x T x heads x head width (scores, all
          of them; heads x width is C as a rule, not in PaLM)

    python metrics.py --plan --gpus 512 --chip H100 --layers 80 --dim 8192 --heads 64 --kv-heads 8 \
                      --hidden 28672 --vocab 128256 --seq-len 8192 --batch 512
    the 12 fastest layouts of these GPUs that fit: memory of a rank, bubble, step time, MFU

    python metrics.py --trace out/trace.json      where the time of a profiled step went:
    step = compute + exposed communication + data + rest         exposed: while nothing is computed
    bus bandwidth = bytes / seconds x 2 (n-1)/n for all-reduce, (n-1)/n for all-gather, ...: what
                    the slowest link carries, to be compared with what it could

Cost     a JSON line per logged step. The clock runs only inside timing(): validation, saving and
         the first step after a pause do not slow down "tokens per second". On CUDA, read a value
         (float(loss)) before log(), so that the GPU has done what was asked of it. A profiled step
         takes longer (here, on a CPU, up to a half), so its seconds are not counted there
Paper    Jelinek et al. 1977, Perplexity; Gao et al. 2020, The Pile (bits per byte); Chowdhery et
         al. 2022, PaLM, appendix B (MFU, HFU); Korthikanti et al. 2022 (memory, times of Megatron);
         nccl-tests, PERFORMANCE.md (bus bandwidth)
Run      python metrics.py             claims, figures/metrics.png; about 15 s
Left out of plan(): context parallelism, tied weights. Without a GPU: memory in use by torch alone
"""

import argparse
import bisect
import collections
import contextlib
import dataclasses
import functools
import gzip
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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

# --- launch (the same lines in every multi-process file; test_all.py compares them) ---
def _rank(rank, fn, n, path, args):
    try:
        if path is None:                        # torchrun's: gloo for CPU, nccl for CUDA tensors
            if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        else:                                   # they meet in a file: no port to collide with
            torch.set_num_threads(1)            # n processes share the cores
            dist.init_process_group("gloo", store=dist.FileStore(path, n), rank=rank, world_size=n)
        fn(*args)
        dist.barrier()                          # leave together: gloo may abort who is still busy
        dist.destroy_process_group()
        if path is not None:                    # all is done; as Python ends, gloo's threads may
            sys.stdout.flush()                  # still hold tensors, and abort
            os._exit(0)
    except Exception:
        sys.stdout.flush()                      # what was printed, the traceback, and end at once:
        sys.excepthook(*sys.exc_info())         # to leave the group in order could wait for ranks
        os._exit(1)                             # that wait for this one


def launch(fn, n, *args):
    """Run fn(*args) in n new gloo processes, or, once a job, in those torchrun made (its n counts).
    A rank that fails prints its traceback; the others are stopped, and this raises."""
    if dist.is_torchelastic_launched():
        return _rank(None, fn, n, None, args)
    with tempfile.TemporaryDirectory() as folder:           # daemon: Ctrl-C leaves none behind
        torch.multiprocessing.spawn(_rank, (fn, n, f"{folder}/store", args), n, daemon=True)
# --- end launch ---



def scores(nats, tokens_per_byte=1.0):
    """Mean nats per token of a whole text -> what to report of it."""
    return {"val_loss": nats, "ppl": math.exp(nats) if nats < 709 else math.inf,
            "bits_per_byte": nats / math.log(2) * tokens_per_byte}


# Peak FLOP/s in bf16 (dense), bytes of memory and bytes/s from it, bytes/s to a GPU of the same
# node (8 GPUs) and of another, one direction: the makers' data sheets of the SXM modules; 400 Gb/s
# (A100: 200) of network a GPU. Last, which share of the peak all computing reaches: for A100 what
# fits Megatron's runs of 175B to 1T below, for H100 Llama 3's on 8192; for the others a guess.
# Narrow models reach less: of GPT-2's 124M no run above 41 % is known on an H100.
CHIPS = {"A100": (312e12, 80e9, 2.0e12, 300e9, 25e9, 0.65),
         "H100": (989e12, 80e9, 3.35e12, 450e9, 50e9, 0.53),
         "H200": (989e12, 141e9, 4.8e12, 450e9, 50e9, 0.53),
         "B200": (2250e12, 180e9, 7.7e12, 900e9, 50e9, 0.53)}


def peak_flops(name):
    """Of a GPU by torch.cuda.get_device_name(), in bf16; None if it is not known: no guess. Cards
    that are slower than the module of that name, and parts of a GPU, are not."""
    known = not any(kind in name for kind in ("PCIe", "NVL", "MIG"))
    return next((CHIPS[chip][0] for chip in CHIPS
                 if known and f" {chip} " in f" {name} ".replace("-", " ")), None)


def mfu(tokens_per_s, flops_per_token, peak):
    """tokens_per_s of all GPUs; peak: FLOP/s of all GPUs, in the type that multiplies."""
    return tokens_per_s * flops_per_token / peak


# ------------------------------------------------------------------ what a step spent

SIZES = {"double": 8, "long": 8, "long int": 8, "float": 4, "int": 4, "bfloat16": 2, "half": 2}
BUS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@contextlib.contextmanager
def profiled(path):
    """Run one step in it: torch.profiler's trace goes to `path` (open it in ui.perfetto.dev; None:
    nowhere, on a rank that only keeps step). In it, mark loading by record_function("data") and
    the optimizer's part by record_function("update")."""
    from torch.profiler import profile, record_function
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")         # else it reports its start and end
    with quiet_about("before the profiling started"):       # freed in it: none of the step's own
        with profile(record_shapes=True, profile_memory=True) as profiler:
            with record_function("step"):
                yield
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
    if path is not None:
        profiler.export_chrome_trace(str(path))


@contextlib.contextmanager
def quiet_about(text):
    """What is written to stderr meanwhile, also by C++, comes at the end, without lines of this."""
    with tempfile.TemporaryFile() as file:
        real = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if text not in line:
                    print(line, file=sys.stderr)


def union(spans):
    """[(begin, end), ...] -> the same without overlaps, sorted."""
    merged = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def without(spans, others):
    """Of a union what lies in none of the others."""
    left, others = [], union(others)
    ends = [end for _, end in others]
    for begin, end in spans:
        for b, e in others[bisect.bisect(ends, begin):]:
            if b >= end:
                break
            left.append((begin, b))
            begin = e
        left.append((begin, end))
    return [(begin, end) for begin, end in left if begin < end]


def seconds_of(spans):
    return sum(end - begin for begin, end in union(spans)) / 1e6        # traces hold microseconds


def collectives(trace, ranks=None):
    """-> [(kind, bytes, group's size, (begin, end))], of gloo and NCCL. bytes: what all-reduce
    sums, all-gather gives, reduce-scatter and all-to-all take. ranks: of gloo's groups; traces hold
    the sizes of NCCL's only. None: not known."""
    found = []
    for event in trace["traceEvents"]:
        name, facts, n = event.get("name", ""), event.get("args", {}), ranks
        if event.get("cat") == "kernel" and name.startswith("nccl"):
            kind, n = facts.get("Collective name", "unknown"), facts.get("Group size", ranks)
            count = max(int(facts.get(f"{way} msg nelems", 0)) for way in ("In", "Out"))
            size = count * SIZES.get(facts.get("dtype", "").lower(), 1)
        elif event.get("cat") == "user_annotation" and name.startswith("gloo:"):
            kind = name[5:]
            types = [text.removeprefix("c10::").lower() for text in facts.get("Input type", [])]
            size = sum(math.prod(shape) * SIZES.get(text, 1)
                       for shape, text in zip(facts.get("Input Dims", []), types))
            if kind == "all_gather":                        # the trace has what one rank gives
                size = size * n if n else None
        else:
            continue
        kind = kind.strip("_").removesuffix("_base").replace("allreduce", "all_reduce")
        kind = kind.replace("allgather", "all_gather")
        if kind.startswith(("alltoall", "all_to_all")):     # also NCCL's all_to_allv
            kind = "all_to_all"
        found.append((kind, size, n and int(n), (event["ts"], event["ts"] + event["dur"])))
    return found


def traffic(trace, ranks=None):
    """Of each kind of collective: calls, bytes, seconds in which one of them was under way (waiting
    for the slowest rank is in it), and bus bandwidth, bytes/s; None where the group is not known
    (bytes: of gloo's all-gather)."""
    kinds = {}
    for kind, size, n, span in collectives(trace, ranks):
        kinds.setdefault(kind, []).append((size, n, span))
    result = {}
    for kind, calls in sorted(kinds.items()):
        seconds = seconds_of(span for *_, span in calls)
        crossing = None
        if seconds and all(n for _, n, _ in calls):
            crossing = sum(size * (BUS[kind] * (n - 1) / n if kind in BUS else 1)
                           for size, n, _ in calls) / seconds
        sizes = [size for size, *_ in calls]
        result[kind] = {"calls": len(calls), "bytes": None if None in sizes else sum(sizes),
                        "seconds": seconds, "bus_bytes_per_s": crossing}
    return result


def time_split(trace):
    """Shares of a step -> {compute, exposed_communication, data, rest}, their sum is 1, and
    communication, also what is hidden behind computing. On a GPU compute is its kernels' time; on a
    CPU that of torch's operations and compiled graphs (Python between them is in the rest)."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]

    def spans(keep):
        return union((e["ts"], e["ts"] + e["dur"]) for e in events if keep(e.get("cat"), e["name"]))

    step = spans(lambda kind, name: kind == "user_annotation" and name == "step")
    data = spans(lambda kind, name: kind == "user_annotation" and name == "data")
    busy = spans(lambda kind, name: kind in ("kernel", "gpu_memcpy", "gpu_memset")
                 and not name.startswith("nccl"))
    if not busy:
        busy = without(spans(lambda kind, name: kind == "cpu_op" and name.startswith("aten::")
                             or name.startswith("## Call CompiledFxGraph")), data)
    if not events:
        raise ValueError("the trace has no event with a duration")
    if not step:                                            # somebody else's trace: all of it
        step = [(min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events))]
    outside = without([(-math.inf, math.inf)], step)
    busy = without(busy, outside)
    sending = without(union(span for *_, span in collectives(trace)), outside)
    exposed = without(sending, busy)
    loading = without(without(data, outside), busy + sending)
    whole = seconds_of(step)
    shares = {"compute": seconds_of(busy) / whole,
              "exposed_communication": seconds_of(exposed) / whole,
              "data": seconds_of(loading) / whole}
    return {**shares, "rest": 1 - sum(shares.values()),
            "communication": seconds_of(sending) / whole}


def activation_bytes(trace):
    """Most bytes at once of what a step makes and frees before its gradients are used: what forward
    keeps for backward, and what either needs for a moment. On the GPU, if there is one."""
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    device = max((e["args"]["Device Type"] for e in events), default=0)
    until = min((e["ts"] for e in trace["traceEvents"] if e.get("name") == "update"),
                default=math.inf)
    events = sorted((e for e in events if e["args"]["Device Type"] == device and e["ts"] < until),
                    key=lambda e: e["ts"])
    made, changes = {}, [0] * len(events)
    for i, event in enumerate(events):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            made[address] = i
        elif address in made:                               # else it is from before the step
            changes[made.pop(address)], changes[i] = -size, size
    return max(itertools.accumulate(changes), default=0)    # not freed: gradients, buckets


def report(trace, ranks=None):
    """All of these of one step, for Meter.log()."""
    shares = {f"{name}_share": share for name, share in time_split(trace).items()}
    return {**shares, "activation_bytes": activation_bytes(trace),
            "traffic": traffic(trace, ranks)}


def held(tensors):
    """Bytes of some tensors; a storage that several share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def memory_now():
    """Bytes: {allocated, reserved, peak} of the GPU, since the last call, by tensors, by torch for
    tensors, and at most by tensors; of a process that uses none its {peak}, since it began."""
    if torch.cuda.is_initialized():
        found = {"memory_allocated": torch.cuda.memory_allocated(),
                 "memory_reserved": torch.cuda.memory_reserved(),
                 "memory_peak": torch.cuda.max_memory_allocated()}
        torch.cuda.reset_peak_memory_stats()
        return found
    import resource                                         # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


# ------------------------------------------------------------------ what a run would need

@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder: an MLP of three matrices (gated) or two, untied. experts: in place of each MLP so
    many, `hidden` wide, of which a token visits top_k. head_dim 0: dim / heads. norm_keeps: tensors
    that a norm keeps for backward, its input and what it gives (LayerNorm, a GPU's RMSNorm); 3:
    made of single operations, as RMSNorm on a CPU. ValueError: no such model."""
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    seq_len: int
    gated: bool = True
    experts: int = 0
    top_k: int = 2
    head_dim: int = 0
    qk_norm: bool = False
    norm_keeps: int = 2

    def __post_init__(self):
        sizes = self.layers, self.dim, self.heads, self.kv_heads, self.hidden, self.seq_len
        if min(sizes) < 1 or min(self.vocab, self.experts, self.head_dim) < 0:
            raise ValueError(f"{self}: sizes must be above 0")
        if self.heads % self.kv_heads or not self.head_dim and self.dim % self.heads:
            raise ValueError(f"{self.kv_heads} key/value heads must divide {self.heads} heads, and "
                             f"these dim={self.dim} (or give head_dim)")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} of {self.experts} experts")

    def widths(self):
        """Of q (all heads), of k."""
        head = self.head_dim or self.dim // self.heads
        return self.heads * head, self.kv_heads * head

    def parts(self):
        """Elements of the matrices of a block: attention and router; an MLP or expert."""
        attention = 2 * self.dim * sum(self.widths())
        return (attention + self.dim * self.experts,
                (3 if self.gated else 2) * self.dim * self.hidden)

    def parameters(self):
        attention, mlp = self.parts()
        return (self.layers * (attention + mlp * max(1, self.experts))
                + 2 * self.vocab * self.dim)

    def flops_of(self):
        """Of a token, forward and backward: in a block, in the head."""
        attention, mlp = self.parts()
        at_work = attention + mlp * (self.top_k if self.experts else 1)
        return (6 * at_work + 12 * self.seq_len * self.widths()[0], 6 * self.vocab * self.dim)

    def flops(self):
        block, head = self.flops_of()
        return self.layers * block + head

    def activations(self, tp=1, sequence_parallel=True):
        """Numbers that a block keeps for backward, of a token, on a rank; scores by tiles (flash)
        -> of products: q, k, v, o; four of the MLP (gate, up, their parts); with experts top_k
        times those, and their inputs and outputs; of norms: what the block's two keep; with norms
        of their own q and k, but for what those norms give."""
        (q, kv), keeps = self.widths(), self.norm_keeps
        split = 2 * (q + kv) + (4 if self.gated else 2) * self.hidden * (
            self.top_k if self.experts else 1)
        whole = 2 * self.dim * self.top_k if self.experts else 0    # each rank sends all tokens
        normed = (keeps - 1) * (q + kv) if self.qk_norm else 0
        return (split / tp + whole,
                normed / tp + 2 * keeps * self.dim / (tp if sequence_parallel else 1))


@functools.cache
def cut(layers, head, n):
    """Layers of each of n chunks of a pipeline; the last has the head, too, worth so many layers.
    One each, then to who has least to do. With n = layers + 1 the embedding has a chunk for itself,
    with layers + 2 the head, too."""
    counts = [1] * n
    if n > layers:
        counts[0] = 0
    if n > layers + 1:
        counts[-1] = 0
    for _ in range(layers - sum(counts)):
        counts[min(range(n), key=lambda i: counts[i] + head * (i == n - 1))] += 1
    return counts


def plan(shape, chip, batch, dp=1, tp=1, pp=1, zero=1, microbatch=1, chunks=1, recompute=False,
         ep=1, kinds=(2, 2, 12), loss_chunk=0, sequence_parallel=True, product=None, counts=None,
         stops_early=False):
    """What a step of `batch` sequences on dp x tp x pp GPUs needs -> dict: bytes of weights,
    gradients, optimizer, activations, their sum memory, of the fullest rank; send (bytes that a
    rank sends by tp, by dp, by ep, by pp, the most of any); bubble (idle / busy, of the slowest
    rank); seconds, mfu.

    zero: 0 to 3. kinds: bytes of weights, gradients and optimizer state for a parameter; (2, 2, 12)
    is mixed precision with Adam as in the ZeRO paper, (2, 4, 12) sums gradients in fp32. Layers
    need not divide by pp x chunks: see cut(). Messages of tensor parallelism, of experts (ep ranks
    with other data) and of the pipeline are not overlapped with computing; those of data
    parallelism are hidden by the last microbatch's backward (ZeRO-2: all backwards, as it sums
    after each; ZeRO-3: everything). Then the optimizer reads and writes its state. Experts' load is
    even and their products as fast as others: measured models with experts reach less. loss_chunk:
    see loss.py. product: bytes of a number that products of matrices give: 2 under autocast, which
    computes norms in fp32, and with zero=0 copies all weights; None: both as of a weight. counts:
    layers of each chunk of the pipeline; None: by cut(). stops_early: recompute leaves out an MLP's
    last product, and its sum over tp, which backward does not need (checkpoint.py, torch's
    use_reentrant=False; not Megatron's). ValueError: what cannot be cut so."""
    peak, _, speed, near, far, efficiency = CHIPS[chip]
    autocast = product is not None and zero == 0
    product, in_norm = (product, 4) if product else (kinds[0], kinds[0])
    if min(batch, dp, tp, pp, microbatch, chunks, ep) < 1 or not 0 <= zero <= 3:
        raise ValueError("batch and layout must be 1 or more, zero 0 to 3")
    m, pieces = batch // (dp * microbatch), pp * chunks
    if m < 1 or batch % (dp * microbatch) or shape.kv_heads % tp or pieces > shape.layers + 2:
        raise ValueError(f"{batch} sequences, {shape.kv_heads} key/value heads, {shape.layers} "
                         f"layers are not cut by dp={dp} x microbatch={microbatch}, tp={tp}, "
                         f"pp={pp} x {chunks}")
    if dp % ep or max(1, shape.experts) % ep:
        raise ValueError(f"ep={ep} must divide dp={dp} and {shape.experts} experts")
    T, C = shape.seq_len, shape.dim
    attention, mlp = shape.parts()
    block = [attention / tp, mlp * max(1, shape.experts) / (tp * ep)]
    if not shape.experts:
        block = [sum(block), 0]
    replicas = dp, dp // ep                                 # of these two
    block_flops, head_flops = shape.flops_of()
    saves = stops_early and not shape.experts               # it also sends half, or none, of a sum
    again = 4 / 3 - saves * 2 * C * shape.hidden / block_flops if recompute else 1
    sums = 4 if not recompute else 6 - saves * (0.5 if sequence_parallel else 1)
    tokens = batch / dp * T                                 # a rank's
    x, summed = kinds[0] * tokens * C, product * tokens * C     # bytes of x, of what is added to it
    counts = counts or cut(shape.layers, head_flops / block_flops, pieces)
    ranks = []
    for rank in range(pp):
        layers, first, last = sum(counts[rank::pp]), rank == 0, rank == pp - 1
        mine = [layers * part for part in block]
        mine[0] += shape.vocab * C / tp * (first + last)
        weights, gradients, optimizer = (
            sum(part * size / (n if zero >= stage else 1) for part, n in zip(mine, replicas))
            for size, stage in zip(kinds, (3, 2, 1)))
        if zero == 3 and dp > 1:                # there whole: a block at work, the next one, ends
            weights += kinds[0] * (2 * sum(block) + shape.vocab * C / tp * (first + last))

        alive = (pp * chunks + pp - 1 - 2 * rank) / chunks if chunks > 1 else pp - rank
        of_products, of_norms = shape.activations(tp, sequence_parallel)
        whole = product * of_products + in_norm * of_norms
        kept = kinds[0] * C / (tp if sequence_parallel else 1) if recompute else whole
        flow, logits = microbatch * T, 0
        if last and loss_chunk:                 # three times in fp32; gradients of the head, twice
            logits = 12 * min(flow, loss_chunk) * shape.vocab + 8 * shape.vocab * C
        elif last:                              # logits, their softmax, its gradient, in fp32
            logits = 12 * flow * shape.vocab / tp
        activations = flow * layers * kept * min(alive, m) + max(
            logits, flow * whole if recompute else 0)                   # not both at once
        if autocast:                            # DDP's buckets, once those are gone; its copies
            buckets = kinds[1] * sum(mine) if dp > 1 else 0
            activations = max(activations, buckets) + product * sum(mine)

        work = tokens * (layers * block_flops * again + last * head_flops) / tp
        passes = sums * layers + last           # forward, backward, again
        by_tp = 2 * (tp - 1) / tp * (passes * summed + first * x)   # an all-reduce each
        there_and_back = 6 if recompute else 4  # to the experts and from them, forward and backward
        by_ep = there_and_back * (ep - 1) / ep * summed * layers * shape.top_k
        messages = chunks * 2 - first - last if pp > 1 else 0       # forward, backward
        by_pp = messages * x / (tp if sequence_parallel else 1)
        to_sum, to_gather = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[zero]
        by_dp = (to_sum * kinds[1] + to_gather * kinds[0]) * sum(
            (n - 1) / n * part for part, n in zip(mine, replicas))
        computing = work / (peak * efficiency)
        busy = (computing + by_tp / (near if tp <= 8 else far)
                + by_ep / (near if tp * ep <= 8 else far)
                + by_pp / (near if dp * tp * pp <= 8 else far))
        backward = 3 / 4 if recompute else 2 / 3            # of computing, with forward again
        hidden = computing * {2: backward, 3: 1}.get(zero, backward / m)
        exposed = max(0, by_dp / (near if dp * tp <= 8 else far) - hidden)
        update = sum(part / (n if zero else 1) for part, n in zip(mine, replicas)) / speed * (
            kinds[0] + kinds[1] + 2 * kinds[2])             # gradient and state read, rest written
        ranks.append({"weights": weights, "gradients": gradients, "optimizer": optimizer,
                      "activations": activations, "send": (by_tp, by_dp, by_ep, by_pp),
                      "memory": weights + gradients + optimizer + activations, "busy": busy,
                      "after": exposed + update})
    slowest = max(rank["busy"] for rank in ranks)
    idle = (sum(rank["busy"] for rank in ranks) - slowest) / (m * chunks)   # to fill and to drain
    seconds = slowest + idle + max(rank["after"] for rank in ranks)
    fullest = max(ranks, key=lambda rank: rank["memory"])
    return {**{key: fullest[key] for key in (
                "weights", "gradients", "optimizer", "activations", "memory")},
            "send": tuple(map(max, zip(*(rank["send"] for rank in ranks)))),
            "bubble": idle / slowest, "seconds": seconds,
            "mfu": mfu(batch * T / seconds, shape.flops(), peak * dp * tp * pp)}


def layouts(shape, chip, gpus, batch, room=0.9, kinds=(2, 2, 12)):
    """All layouts that fit in `room` of the memory, the fastest first -> [(layout, plan)]."""
    found = []
    spread = [ep for ep in range(1, shape.experts + 1) if shape.experts % ep == 0] or [1]
    for tp, pp, ep, microbatch, chunks, recompute, zero in itertools.product(
            (1, 2, 4, 8), range(1, shape.layers + 1), spread, (1, 2, 4, 8), (1, 2, 4, 8),
            (False, True), (1, 2, 3)):
        if gpus % (tp * pp) or zero > 1 and (pp > 1 or gpus == tp) or pp == 1 and chunks > 1:
            continue        # ZeRO-2 and 3 would send in every microbatch; alone they are stage 1
        layout = dict(dp=gpus // (tp * pp), tp=tp, pp=pp, ep=ep, zero=zero, microbatch=microbatch,
                      chunks=chunks, recompute=recompute)
        with contextlib.suppress(ValueError):
            needs = plan(shape, chip, batch, kinds=kinds, **layout)
            if needs["memory"] <= room * CHIPS[chip][1] and (chunks == 1 or batch // (
                    layout["dp"] * microbatch) % pp == 0):
                found.append((layout, needs))
    return sorted(found, key=lambda pair: pair[1]["seconds"])


class Meter:
    """The log of a run: with meter.timing() around every step, and meter.log() now and then.

    path    one JSON object per line; those of steps after `step` (of a run that was killed after
            its last checkpoint) and a torn last line are removed. None: this rank writes nothing
    step    where the run stands; steps: where it ends; tokens: of one step, over all ranks
    flops   of a token, of the model; ran: with what is computed again, None: not known
    peak    FLOP/s of all ranks together, None: not known
    before  tokens up to `step`, None: as many a step as now"""

    def __init__(self, path, step, steps, tokens, flops=None, ran=None, peak=None, before=None):
        self.path, self.first, self.steps, self.tokens = path, step, steps, tokens
        self.before = step * tokens if before is None else before
        self.flops, self.ran, self.peak = flops, ran, peak
        self.began, self.seconds, self.count = time.perf_counter(), 0.0, 0
        self.mean = math.nan
        if path is not None:
            kept = [record for record in read(path) if record["step"] <= step]
            beside = pathlib.Path(path).with_suffix(".tmp")
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(beside, path)

    @contextlib.contextmanager
    def timing(self, steps=1):
        """Around a step; steps=0: around more that belongs to the one before."""
        before = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - before
        self.count += steps

    def log(self, step, **values):
        """Write `values`, the tokens up to here, and, as means of the steps timed since the last
        call, step_ms, tokens_per_s, of the model's FLOPs tflops_per_s and mfu, hfu
        -> a line to print. Values must hold loss and grad_norm."""
        if self.count:                                      # else as before: none was timed
            self.mean, self.seconds, self.count = self.seconds / self.count, 0.0, 0
        record = {"step": step, "tokens": self.before + (step - self.first) * self.tokens, **values,
                  "step_ms": 1e3 * self.mean, "tokens_per_s": self.tokens / self.mean}
        if self.flops:
            record["tflops_per_s"] = record["tokens_per_s"] * self.flops / 1e12
        if self.flops and self.ran:
            record["hfu_over_mfu"] = self.ran / self.flops
        for name, flops in (("mfu", self.flops), ("hfu", self.ran)):
            if flops and self.peak:
                record[name] = mfu(record["tokens_per_s"], flops, self.peak)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(without_nan(record)) + "\n")
        text = (f"step {step:5}/{self.steps}  loss {values['loss']:.4f}  "
                f"norm {values['grad_norm']:5.2f}  {record['tokens_per_s']:7,.0f} tokens/s")
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if "val_loss" in values:
            text += f"  val {values['val_loss']:.4f} = {values['bits_per_byte']:.3f} bits per byte"
        left = (time.perf_counter() - self.began) / max(1, step - self.first) * (self.steps - step)
        return f"{text}  {int(left) // 60}:{int(left) % 60:02} left"

    def plot(self, path):
        """One page about the run, as a PNG: losses, speed, and of the last profiled step where its
        time and its memory went."""
        from matplotlib.figure import Figure
        records = read(self.path)
        last = [record for record in records if "compute_share" in record][-1:]
        figure = Figure(figsize=(10, 7 if last else 3.6), layout="constrained")
        axes = figure.subplots(1 + len(last), 2, squeeze=False)

        def points(key):                                                # None: it was NaN
            return [(r["step"], r[key]) for r in records if r.get(key) is not None]

        losses, speed = axes[0]
        for key, label, style in (("loss", "training batch", "C0-"),
                                  ("val_loss", "validation", "C1o-")):
            losses.plot(*zip(*points(key)), style, label=label, markersize=4)
        step, loss = (points("val_loss") or [(0, math.nan)])[-1]
        losses.set(xlabel="step", ylabel="loss (nats per predicted token)", ylim=(0, None),
                   title=f"Validation loss {loss:.3f} after {step} steps")
        losses.legend()
        speed.plot(*zip(*points("tokens_per_s")), "C2")
        used = points("mfu")
        speed.set(xlabel="step", ylabel="tokens per second", ylim=(0, None), title="Throughput" + (
            f", at the end {used[-1][1]:.1%} MFU" if used else ""))
        for record in last:
            time_bar, memory_bar = axes[1]
            shares = [(name.replace("_", " "), 100 * record[f"{name}_share"])
                      for name in ("compute", "exposed_communication", "data", "rest")]
            bars(time_bar, shares, "% of the step", "{:.0f}")
            time_bar.set(title="Time of a profiled step, on rank 0")
            sizes = [(f"{name}s".replace("optimizers", "optimizer state"),
                      record[f"{name}_bytes"] / 1e6)
                     for name in ("parameter", "gradient", "optimizer", "activation")]
            bars(memory_bar, sizes, "MB", "{:.1f}")
            memory_bar.set(title="Its memory on rank 0, at most")
        figure.savefig(path)


def bars(axes, pairs, unit, digits):
    for i, (name, value) in enumerate(pairs):
        axes.barh(name, value, color=f"C{i}")
        axes.text(value, i, " " + digits.format(value), va="center")
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.15 * max(value for _, value in pairs)))


def without_nan(value):
    """JSON has none: null."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


# Chowdhery et al. 2022, table 1; on 6144 TPU v4 of 275 TFLOP/s 238.3 thousand tokens/s, MFU 46.2 %
PALM = Shape(118, 18432, 48, 1, 73728, 256000, 2048, head_dim=256)


def llama3():
    """Grattafiori et al. 2024, table 4: {GPUs: (plan, published MFU)}. tp 8, pp 16, gradients
    summed in fp32, a step of 16.8 M tokens. 126 layers in 128 chunks, of one layer, of the
    embedding, of the head: chunks so small are our assumption."""
    shape = Shape(126, 16384, 128, 8, 53248, 128256, 8192)
    return {gpus: (plan(shape, "H100", 2048, dp=gpus // 128, tp=8, pp=16, chunks=8,
                        kinds=(2, 4, 12)), published)
            for gpus, published in ((8192, 0.43), (16384, 0.41))}


def held_out():
    """What no number was fitted to -> [(run, planned, published)]."""
    shape, batch, layout = MEGATRON["530B"][:3]
    large = layout | {"dp": 8}                              # 2240 GPUs
    found = [("Megatron 530B on 2240 A100, MFU", plan(shape, "A100", 8 * batch, **large)["mfu"],
              0.542),
             ("the same, everything recomputed", plan(
                 shape, "A100", 8 * batch, recompute=True, **large)["mfu"], 0.421)]
    needs, published = llama3()[16384]
    return [*found, ("Llama 3 405B on 16384 H100, MFU", needs["mfu"], published)]


def demo_planner():
    share = mfu(238.3e3, PALM.flops(), 6144 * 275e12)
    check(abs(share - 0.462) < 5e-4, "MFU of PaLM 540B, from its tokens per second",
          f"{share:.1%} (paper: 46.2%)")
    print(f"\n{'Megatron on A100':<18} {'GPUs':>5} {'seconds':>8} {'planned':>8} {'error':>6}   "
          f"MFU of these seconds   GB a rank: states, activations")
    errors = {}
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
        errors[name] = abs(error)
    print()
    small = errors.pop("22B")
    check(max(errors.values()) < 0.1, "fitted, by one number: seconds of 175B, 530B, 1T, worst",
          f"{max(errors.values()):.0%} off")
    needs, published = llama3()[8192]
    check(abs(needs["mfu"] - published) < 0.005, "fitted, by one number: Llama 3 on 8192 H100, MFU",
          f"{needs['mfu']:.1%} (paper: {published:.0%})")
    check(small < 0.25, "not fitted: 22B, one microbatch on 8 GPUs, seconds", f"{small:.0%} off")
    for run, planned, published in held_out():
        check(abs(planned - published) < 0.01, f"not fitted: {run}",
              f"{planned:.1%} (paper: {published:.1%})")
    one, again = (plan(MEGATRON["175B"][0], "A100", 64, tp=8, pp=8, recompute=how)
                  for how in (False, True))
    check(again["activations"] < one["activations"] / 8, "recomputation: activations, in GB",
          f"{one['activations'] / 1e9:.1f} -> {again['activations'] / 1e9:.1f}")


def count_flops(shape, again):
    """FLOPs of a sequence as torch counts them, forward and backward, without memory or numbers."""
    with torch.device("meta"):
        sizes = [(shape.dim, shape.dim)] * 4 + [(shape.hidden, shape.dim)] * 2
        weights = [[torch.empty(size, requires_grad=True) for size in [*sizes, sizes[-1][::-1]]]
                   for _ in range(shape.layers)]
        head = torch.empty(shape.vocab, shape.dim, requires_grad=True)
        x = torch.empty(1, shape.seq_len, shape.dim, requires_grad=True)

    def model(x):
        for q, k, v, o, gate, up, down in weights:
            parts = [F.linear(x, w).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
                     for w in (q, k, v)]
            mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), o)
            x = x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return F.linear(x, head)

    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        (checkpoint(model, x, use_reentrant=False) if again else model(x)).sum().backward()
    return counter.get_total_flops()


def three_ways(path):
    """On two ranks: a backward whose gradients are summed in three ways, each profiled."""
    torch.manual_seed(dist.get_rank())
    net = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(8)))
    x, params, results = torch.randn(256, 512), list(net.parameters()), {}
    for way in ("one by one", "all in one", "as each is ready"):
        works, found, hooks = [], [], []
        if way == "as each is ready":
            hooks = [p.register_post_accumulate_grad_hook(
                lambda p: works.append(dist.all_reduce(p.grad, async_op=True))) for p in params]
        for _ in range(5):
            trace = f"{path}/{dist.get_rank()}.json"
            with profiled(trace):
                net(x).square().mean().backward()
                if way == "one by one":
                    for p in params:
                        dist.all_reduce(p.grad)
                elif way == "all in one":
                    dist.all_reduce(torch.cat([p.grad.flatten() for p in params]))
                for work in works:
                    work.wait()
                with torch.profiler.record_function("update"):
                    net.zero_grad()
                    works.clear()
            found.append(report(json.loads(pathlib.Path(trace).read_text()), dist.get_world_size()))
        for hook in hooks:
            hook.remove()
        results[way] = sorted(found, key=lambda step: step["exposed_communication_share"])[2]
    if dist.get_rank() == 0:
        pathlib.Path(path, "results").write_text(json.dumps(results))


def demo_profile():
    """-> {way: report}"""
    shape = Shape(2, 64, 4, 4, 256, 300, 32)
    once, again = (count_flops(shape, how) / shape.seq_len for how in (False, True))
    check(once == shape.flops(), "model FLOPs of a token by the formula: torch counts as many",
          f"{once:,.0f}")
    check(3 * again == 4 * once, "HFU / MFU with everything computed again, counted",
          f"{again / once:.4f}")
    with tempfile.TemporaryDirectory() as folder:
        launch(three_ways, 2, folder)
        results = json.loads(pathlib.Path(folder, "results").read_text())
    print(f"\n{'8 gradients summed over 2 ranks':<32} {'calls':>5} {'MB':>6} {'GB/s':>6} "
          f"{'share of the step':>18} {'exposed':>8}")
    for way, step in results.items():
        [sent] = step["traffic"].values()
        print(f"{way:<32} {sent['calls']:>5} {sent['bytes'] / 1e6:>6.2f} "
              f"{sent['bus_bytes_per_s'] / 1e9:>6.2f} {step['communication_share']:>18.0%} "
              f"{step['exposed_communication_share']:>8.0%}")
    print()
    sent = [step["traffic"]["all_reduce"] for step in results.values()]
    check([(kind["calls"], kind["bytes"]) for kind in sent] == [
        (calls, 8 * 512 * 512 * 4) for calls in (8, 1, 8)], "calls and bytes, from the traces",
        "as called: 8, 1, 8; all of 8 x 512 x 512 x 4")
    hidden = [1 - step["exposed_communication_share"] / step["communication_share"]
              for step in results.values()]             # shares of the step are the machine's
    check(max(hidden[:2]) < 0.02 < hidden[2], "only what is sent during backward is hidden by it",
          ", ".join(f"{share:.0%}" for share in hidden) + " of the time in collectives")
    return results


def demo():
    demo_planner()
    results = demo_profile()
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
    draw(sizes, wrong, right["ppl"], results)


def draw(sizes, wrong, right, results):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes, split = figure.subplots(2, 1)
    axes.plot(sizes, wrong, "C1o-")
    axes.annotate("mean of the batches' perplexities", (sizes[1], wrong[1]), xytext=(10, 3),
                  textcoords="offset points", color="C1")
    axes.axhline(right, color="C0")
    axes.annotate(f"perplexity, exp(mean nats): {right:.1f}", (sizes[-1], 0.8 * right), ha="right",
                  va="top", color="C0")
    axes.set(xscale="log", xticks=sizes, xticklabels=sizes, ylim=(0, None), ylabel="perplexity",
             xlabel="tokens in a batch", title="A mean of perplexities depends on the batches")
    axes.minorticks_off()
    begin = [0.0] * len(results)
    for name, colour in (("compute", "C0"), ("exposed_communication", "C1"), ("rest", "0.7")):
        shares = [100 * step[f"{name}_share"] for step in results.values()]
        split.barh(list(results), shares, left=begin, color=colour)
        place = {"compute": 0, "rest": 101}.get(name, begin[0])
        split.text(place, 0 if name == "rest" else -0.5, name.split("_")[0], color=colour,
                   va="center" if name == "rest" else "bottom")
        begin = [b + share for b, share in zip(begin, shares)]
    split.invert_yaxis()
    split.set(xlabel="% of a step (two processes, two cores)", xlim=(0, 100))
    split.set_title("Gradients summed in three ways: what of it is exposed", pad=24)
    path = pathlib.Path(__file__).parent / "figures" / "metrics.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Without a flag: "
                                     "the demo. Sizes go with --plan.")
    add = parser.add_argument
    add("--plan", action="store_true", help="list the layouts of these GPUs that fit")
    add("--chip", choices=tuple(CHIPS), default="H100")
    for name, default, text in (
            ("gpus", 64, "of all nodes, 8 in each"), ("layers", 32, ""), ("dim", 4096, "width C"),
            ("heads", 32, ""), ("kv-heads", 8, "key/value heads"), ("hidden", 14336, "width inside "
            "the MLP, gated, or an expert"), ("vocab", 128256, ""), ("seq-len", 8192, "tokens"),
            ("experts", 0, "in place of every MLP"), ("top-k", 2, "experts that work for a token"),
            ("batch", 128, "sequences in a step, over all GPUs")):
        add(f"--{name}", type=int, default=default, help=f"{text or name} (default {default})")
    add("--bytes", type=int, nargs=3, default=(2, 2, 12), metavar=("W", "G", "O"), help="of a "
        "parameter: weight, gradient, optimizer state (default 2 2 12; 2 4 12: fp32 gradients)")
    add("--trace", help="what a trace of torch.profiler (.json, .json.gz) holds")
    add("--ranks", type=int, help="in that trace, of gloo's groups")
    args = parser.parse_args(argv)
    try:
        if args.trace:
            print_trace(args.trace, args.ranks)
        elif args.plan:
            print_layouts(args)
        elif argv:
            raise ValueError(f"{' '.join(argv)}: goes with --plan or --trace")
        else:
            demo()
    except (ValueError, OSError, EOFError) as error:
        parser.error(error)


def print_layouts(args):
    if min(args.gpus, args.batch) < 1:
        raise ValueError(f"--gpus {args.gpus}, --batch {args.batch}: must be 1 or more")
    if min(args.bytes) < 0:
        raise ValueError(f"--bytes {args.bytes}: must be 0 or more")
    shape = Shape(args.layers, args.dim, args.heads, args.kv_heads, args.hidden, args.vocab,
                  args.seq_len, experts=args.experts, top_k=args.top_k)
    room = CHIPS[args.chip][1]
    all_of_them = layouts(shape, args.chip, args.gpus, args.batch, math.inf, args.bytes)
    found = [pair for pair in all_of_them if pair[1]["memory"] <= 0.9 * room]
    print(f"{shape.parameters() / 1e9:.2f} G parameters: {args.layers} layers, C={args.dim}, "
          f"{args.heads} heads ({args.kv_heads} of keys), hidden {args.hidden}, vocabulary "
          f"{args.vocab}\n{args.batch} sequences of {args.seq_len} a step on {args.gpus} "
          f"{args.chip}, computing at {CHIPS[args.chip][5]:.0%} of the peak\n{len(found)} of "
          f"{len(all_of_them)} layouts fit into 90 % of {room / 1e9:.0f} GB", end="")
    if not all_of_them:
        raise ValueError(f"no dp x tp x pp of {args.gpus} GPUs cuts {args.batch} sequences, "
                         f"{args.kv_heads} key/value heads (tp: 1, 2, 4, 8) and {args.layers} "
                         f"layers: dp, a divisor of --gpus, must divide --batch, too")
    if not found:
        return print(f"; the smallest takes {min(n['memory'] for _, n in all_of_them) / 1e9:.3g} GB"
                     f" of each GPU: more GPUs, or a smaller model")
    print(f", the fastest {min(12, len(found))}:\n")
    print_plans(found[:12])
    print("\nrows: sequences of a microbatch. again: is each block computed again in backward. GB: "
          "memory\nof the fullest rank. sent: by a rank in a step, for tensor, data, expert and "
          "pipeline\nparallelism. bubble: idle / busy time of the slowest rank")


def print_plans(found):
    print(f"{'dp':>4} {'tp':>3} {'pp':>3} {'ep':>3} {'chunks':>6} {'zero':>4} {'rows':>4} "
          f"{'again':>5} {'GB':>6} {'GB sent by tp':>13} {'dp':>6} {'ep':>6} {'pp':>6} "
          f"{'bubble':>7} {'seconds':>8} {'MFU':>6}")
    for layout, needs in found:
        sent = "{:>13.3g} {:>6.3g} {:>6.3g} {:>6.3g}".format(
            *(size / 1e9 for size in needs["send"]))
        print(f"{layout['dp']:>4} {layout['tp']:>3} {layout['pp']:>3} {layout['ep']:>3} "
              f"{layout['chunks']:>6} {layout['zero']:>4} {layout['microbatch']:>4} "
              f"{'all' if layout['recompute'] else 'none':>5} {needs['memory'] / 1e9:>6.3g} {sent} "
              f"{needs['bubble']:>7.1%} {needs['seconds']:>8.3g} {needs['mfu']:>6.1%}")


def print_trace(path, ranks):
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        trace = json.load(file)
    if not isinstance(trace, dict) or not trace.get("traceEvents"):
        raise ValueError(f"{path} holds no traceEvents: is it torch.profiler's?")
    for name, share in time_split(trace).items():
        print(f"{name.replace('_', ' '):<22} {share:6.1%} of the step")
    print(f"{'made and freed, at most':<22} {activation_bytes(trace) / 1e6:.1f} MB")
    for kind, seen in traffic(trace, ranks).items():
        bandwidth, size = seen["bus_bytes_per_s"], seen["bytes"]
        print(f"{kind:<22} {seen['calls']} calls, "
              f"{'? (give --ranks)' if size is None else f'{size / 1e6:.2f}'} MB in "
              f"{1e3 * seen['seconds']:.2f} ms, bus bandwidth "
              + (f"{bandwidth / 1e9:.2f} GB/s" if bandwidth else "not known"))


if __name__ == "__main__":
    main(sys.argv[1:])
