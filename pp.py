r"""Pipeline parallelism: each rank holds a few layers; microbatches flow through the ranks.

    rank 0  F0F1F2        B0--F3B1--  B2--  B3--    F: forward, B--: backward, twice as long;
    rank 1    F0F1    B0--F2B1--F3B2--  B3--        the number is the microbatch's. Between them:
    rank 2      F0B0--F1B1--F2B2--F3B3--            the bubble. (1F1B, 3 ranks, 4 microbatches)

A schedule is data: for each rank the list of its Ops, in order. One simulator gives its times, one
interpreter (Pipeline) runs it on real processes, and the same chart shows both. A backward can be
split: B gives the gradient of the input, for which another rank waits, W that of the weights, for
which nobody does: zb-h1 fills the bubble with W.

Cost     p ranks, m microbatches, v chunks on a rank; f, b, w: time of F, B, W of a rank's layers

         schedule      idle time of a rank    idle share, f = b = w    microbatches alive on rank i
         naive         m (p-1) (f+b+w)        (p-1) / p                1
         gpipe         (p-1) (f+b+w)          (p-1) / (m+p-1)          m
         1f1b          (p-1) (f+b+w)          (p-1) / (m+p-1)          p-i
         interleaved   (p-1) (f+b+w) / v      (p-1) / (m v+p-1)        p + (p-1-2i) / v
         zb-h1         (p-1) (f+b-w)          (p-1) / (3m+p-1)         p

         for zb-h1 if m >= p, w <= f, w <= b; at most m (m v chunks) are alive. gpipe with chunks
         idles like interleaved (m >= p, else more), keeps all m, and m need not be a multiple of p.
         A microbatch carries its activation, rows x T x C, over each of the p v - 1 boundaries
         between stages (p > 1), and as much back.
Paper    Huang et al. 2019, GPipe (arXiv 1811.06965); Narayanan et al. 2021, section 2.2 (1F1B,
         interleaved; arXiv 2104.04473); Qi et al. 2023, Zero Bubble, section 2 (arXiv 2401.10241)
Run      python pp.py [--nproc N]     or     torchrun --nproc-per-node N pp.py         N: 1 to 4
         python pp.py --schedule zb-h1 --stages 4 --microbatches 8     prints and draws any schedule
         python pp.py --bench --nproc 2                   step times beside torch's own schedules
Left out schedules whose chunks turn round at the last rank (ZB-V, DualPipeV), several tensors from
         stage to stage, an optimizer that steps before all have finished: see torch's schedules.py
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time
import zlib

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# p ranks, m microbatches, v chunks. Stage s of the p v stages is chunk s // p of rank s % p.
Op = collections.namedtuple("Op", "kind microbatch chunk", defaults=(0,))   # kind: F, B or W
NAMES = "naive", "gpipe", "1f1b", "interleaved", "zb-h1"


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


def schedule(name, stages, microbatches, chunks=1):
    """-> for each of `stages` ranks the list of its Ops. A B without a W of its own does both.
    chunks: stages on a rank (interleaved; gpipe, naive). ValueError: a combination without a rule.
    """
    p, m, v = stages, microbatches, chunks
    if name not in NAMES:
        raise ValueError(f"schedule {name!r}: pick one of {', '.join(NAMES)}")
    if min(p, m, v) < 1:
        raise ValueError(f"stages={p}, microbatches={m}, chunks={v}: all must be at least 1")
    if v == 1 and name == "interleaved" or v > 1 and name in ("1f1b", "zb-h1"):
        raise ValueError(f"{name} with chunks={v}: interleaved needs at least 2, 1f1b and zb-h1 1")
    if name == "interleaved" and m % p:
        raise ValueError(f"interleaved goes in rounds of one microbatch per rank: {m} microbatches "
                         f"over {p} ranks; pick a multiple of {p}")
    return [_ops_of(name, rank, p, m, v) for rank in range(p)]


def _ops_of(name, rank, p, m, v):
    halves = [("F", c) for c in range(v)] + [("B", c) for c in reversed(range(v))]
    if name == "naive":
        return [Op(kind, i, chunk) for i in range(m) for kind, chunk in halves]
    if name == "gpipe":                         # with chunks: breadth first (Lamy-Poirier 2022)
        return [Op(kind, i, chunk) for kind, chunk in halves for i in range(m)]
    # In rounds: p microbatches through chunk 0, the same through chunk 1, ..., then the next p.
    order = [(i // (p * v) * p + i % p, i // p % v) for i in range(m * v)]
    forwards = [Op("F", microbatch, chunk) for microbatch, chunk in order]
    backwards = [Op("B", microbatch, v - 1 - chunk) for microbatch, chunk in order]
    # Before the first B: a forward for each rank behind; with chunks two, and v - 1 rounds more.
    ahead = p - 1 - rank if v == 1 else 2 * (p - 1 - rank) + (v - 1) * p
    ops = forwards[:ahead]
    for i, backward in enumerate(backwards):
        ops += forwards[ahead + i:ahead + i + 1] + [backward]
        if name == "zb-h1" and i >= rank:       # W comes `rank` microbatches later: p stay alive
            ops.append(Op("W", i - rank))
    if name == "zb-h1":
        ops += [Op("W", i) for i in range(max(0, m - rank), m)]
    return ops


def needs(kind, microbatch, stage, last):
    """The (kind, microbatch, stage) whose result an op waits for; None: for none."""
    if kind == "F":
        return ("F", microbatch, stage - 1) if stage > 0 else None
    if kind == "B" and stage < last:
        return "B", microbatch, stage + 1
    return "F" if kind == "B" else "B", microbatch, stage


@dataclasses.dataclass
class Timeline:
    """spans: for each rank its [(op, start, end)], simulated or measured -> what they amount to.
    messages, if simulated: [(start of its op, source rank, target rank, whose result)], sorted."""
    spans: list
    messages: list = ()

    @property
    def makespan(self):
        return (max(end for rank in self.spans for _, _, end in rank)
                - min(start for rank in self.spans for _, start, _ in rank))

    @property
    def bubble(self):
        """The share of all ranks' time, first start to last end, in which they compute nothing."""
        busy = sum(end - start for rank in self.spans for _, start, end in rank)
        return 1 - busy / (len(self.spans) * self.makespan)

    @property
    def peak_live(self):
        """For each rank the most (microbatch, chunk)s after F and before their last B or W."""
        peaks = []
        for rank in self.spans:
            last = {(op.microbatch, op.chunk): i for i, (op, _, _) in enumerate(rank)}
            live, peak = 0, 0
            for i, (op, _, _) in enumerate(rank):
                live += op.kind == "F"
                peak = max(peak, live)
                live -= last[op.microbatch, op.chunk] == i
            peaks.append(peak)
        return peaks


def simulate(schedule, f=1, b=1, w=1):
    """Each op starts when its rank is free and what it needs is there; messages take no time.

    f, b, w: time of an op F, B, W, a number or a list with one for each stage; a B without a W of
    its own takes b + w. -> Timeline. ValueError: a deadlock, with the ops that wait for ever."""
    p, chunks = len(schedule), 1 + max(op.chunk for ops in schedule for op in ops)
    cost = {kind: x if isinstance(x, list) else [x] * (p * chunks)
            for kind, x in (("F", f), ("B", b), ("W", w))}
    times, spans, messages, moved = {}, [[] for _ in range(p)], [], True
    while moved:
        moved = False
        for rank, ops in enumerate(schedule):
            split = {op[1:] for op in ops if op.kind == "W"}
            for op in ops[len(spans[rank]):]:
                stage = op.chunk * p + rank
                need = needs(op.kind, op.microbatch, stage, p * chunks - 1)
                if need is not None and need not in times:
                    break
                began, ended = times.get(need, (0, 0))
                start = max(ended, spans[rank][-1][2] if spans[rank] else 0)
                whole = op.kind == "B" and op[1:] not in split
                end = start + cost[op.kind][stage] + (cost["W"][stage] if whole else 0)
                if need is not None and need[2] % p != rank:
                    messages.append((began, need[2] % p, rank, need))
                times[op.kind, op.microbatch, stage] = start, end
                spans[rank].append((op, start, end))
                moved = True
    stuck = [f"rank {rank} before {label(ops[len(spans[rank])])}"
             for rank, ops in enumerate(schedule) if len(spans[rank]) < len(ops)]
    if stuck:
        raise ValueError(f"deadlock: {', '.join(stuck)}; each waits for an op that never comes")
    return Timeline(spans, sorted(messages))


def validate(schedule):
    """ValueError unless every rank does, once for each microbatch and chunk, F, then B, then at
    most one W, the same microbatches and chunks on all ranks, and no op waits for ever."""
    pairs = {(op.microbatch, op.chunk) for ops in schedule for op in ops}
    for rank, ops in enumerate(schedule):
        done = collections.defaultdict(str)
        for op in ops:
            done[op.microbatch, op.chunk] += op.kind
        for microbatch, chunk in sorted(pairs):
            if done[microbatch, chunk] not in ("FB", "FBW"):
                raise ValueError(f"rank {rank} does {done[microbatch, chunk] or 'nothing'} for "
                                 f"microbatch {microbatch} of chunk {chunk}; the order is F, B, W")
    if not pairs or pairs != {(i, c) for i in range(1 + max(i for i, _ in pairs))
                              for c in range(1 + max(c for _, c in pairs))}:
        raise ValueError(f"microbatches and chunks are {sorted(pairs)}: number both from 0, no gap")
    simulate(schedule)


def label(op):
    return f"{op.kind}{op.microbatch}" + "'" * op.chunk


def chart(timeline):
    """The timeline as text, a line per rank; an op of chunk 1 has one prime, of chunk 2 two."""
    unit = min(end - start for rank in timeline.spans for _, start, end in rank)
    width = max(len(label(op)) for rank in timeline.spans for op, _, _ in rank)
    lines = []
    for rank, spans in enumerate(timeline.spans):
        line = f"rank {rank}  "
        for op, start, end in spans:
            line = line.ljust(8 + width * round(start / unit))
            line += label(op).ljust(width * round((end - start) / unit), "-")
        lines.append(line)
    return "\n".join(lines)


def actions_of(schedule, rank):
    """What one rank does, in order: its Ops and its messages, (source, target, whose result): the
    start of a send or of a receive. All ranks start messages in one order, that in which the ops
    they come from start in simulated time. None depends on a later one, so ranks cannot wait for
    each other, however little the transport buffers. A receive starts one message ahead of its use,
    if that order allows."""
    ops, actions, done, started = schedule[rank], [], set(), 0
    last = len(schedule) * (1 + max(op.chunk for op in ops)) - 1
    messages = [message[1:] for message in simulate(schedule).messages if rank in message[1:3]]
    turn = {key: i for i, (_, _, key) in enumerate(messages)}
    incoming = {key for source, _, key in messages if source != rank}

    def start(key):                             # and all before, up to one not computed yet
        nonlocal started
        while started <= turn.get(key, -1):
            source, _, now = messages[started]
            if source == rank and now not in done:
                return
            actions.append(messages[started])
            started += 1

    places = [(op.kind, op.microbatch, op.chunk * len(schedule) + rank) for op in ops]
    awaited = [needs(*place, last) for place in places]
    for i, (op, place) in enumerate(zip(ops, places)):
        for key in [key for key in awaited[i:] if key in incoming][:2]:
            start(key)
        actions.append(op)
        done.add(place)
        start(place)
    return actions


@contextlib.contextmanager
def as_they_come(x):
    """No autocast, torch's or one made of a torch function mode: a region around step() is not for
    the backward of a layer that was outside of one."""
    with torch.autocast(x.device.type, enabled=False), torch._C.DisableTorchFunction():
        yield


class DeferredLinear(torch.autograd.Function):
    """F.linear whose backward gives dL/dx and leaves dL/dW to whoever holds `defer.pending`.
    leaves: weight and bias, in a tuple, where autograd does not see them: their hooks would else
    be called now, with None. anchor: asks for a backward where x does not."""

    @staticmethod
    def forward(ctx, x, anchor, leaves, defer):
        ctx.save_for_backward(x, leaves[0])
        ctx.leaves, ctx.defer = leaves, defer   # what is recomputed of leaves[0] is only an alias
        return F.linear(x, *leaves)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        ctx.defer.pending.append((*ctx.leaves, x, dy))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        with as_they_come(dy):
            return dy @ weight.to(dy.dtype), None, None, None       # to: forward under autocast


class Defer(TorchFunctionMode):
    """While it is active, each F.linear of parameters (nn.Linear, too) is a DeferredLinear; other
    operations keep their whole backward: norms, embeddings, tp.py's column layers."""

    def __init__(self):
        super().__init__()
        self.pending, self.anchor = [], torch.empty(0, requires_grad=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and torch.is_grad_enabled():
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, x, weight, bias=None):
        trained = [t.is_leaf and t.requires_grad for t in (weight, bias) if t is not None]
        if not all(trained):
            return F.linear(x, weight, bias)
        x = x.to((x.new_empty(0, 1) @ x.new_empty(1, 0)).dtype)     # under autocast a lower one
        return DeferredLinear.apply(x, self.anchor, (weight, bias), self)

    @staticmethod
    def finish(pending):
        """Add dL/dW = dy^T x (and the bias's) to .grad, as backward would: hooks are called."""
        leaves, grads = [], []
        while pending:                          # popped: x and dy are freed one after the other
            weight, bias, x, dy = pending.pop()
            x, dy = (t.reshape(-1, t.shape[-1]) for t in (x.to(dy.dtype), dy))      # (rows, ...)
            leaves.append(weight)
            with as_they_come(dy):
                grads.append((dy.mT @ x).to(weight.dtype))
            if bias is not None:
                leaves.append(bias)
                grads.append(dy.sum(0).to(bias.dtype))
        torch.autograd.backward(leaves, grads)


class Pipeline:
    """loss = pipeline.step(inputs, targets), on all ranks; then each has its stages' gradients.

    stages: this rank's modules, of chunk 0, 1, ...: stage chunk * p + rank of the model, one tensor
    in, one out. schedule: from schedule(). loss_fn(output, target) -> mean loss of a microbatch.
    group: the p ranks (None: all). A parameter with an attribute `tied`, a name, is one weight with
    the one of that name on other ranks: their gradients are summed. With data parallelism on top:
    step() inside no_sync(), then sync(). ValueError, on all ranks: what does not fit, found here or
    in the first pass over inputs of a shape that is new to all. A stage must not change its input
    in place; after a change of dtype, or of what is trained, make a new Pipeline.
    log: of the last pass, [(op, start, end)] in seconds of the host's clock (CUDA computes later:
    for it, let a _compute of your own synchronize before and after); what lies between is waiting
    and messages. peak_live: most microbatches alive, each chunk counts."""

    def __init__(self, stages, schedule, loss_fn, group=None):
        self.modules = [stages] if isinstance(stages, nn.Module) else list(stages)
        self.group, self.loss_fn, self.log, self.peak_live = group, loss_fn, [], 0
        self.rank, self.p = dist.get_rank(group), dist.get_world_size(group)
        ops = [op for ops in schedule for op in ops]
        self.m, self.v = (1 + max((op[i] for op in ops), default=0) for i in (1, 2))
        self.last, self.defer, self.shapes = self.p * self.v - 1, Defer(), {}
        marked = [p for p in self.parameters() if hasattr(p, "tied") and p.requires_grad]
        tied = {p.tied: p for p in marked}
        facts = {name: (p.shape, zlib.crc32(p.detach().cpu().flatten().view(torch.uint8).numpy()))
                 for name, p in tied.items()}
        everyone = self._gather((schedule, len(self.modules), facts, len(marked) > len(tied)))
        for rank, (theirs, modules, _, twice) in enumerate(everyone):
            if len(schedule) != self.p or modules != self.v or theirs != schedule:
                raise ValueError(f"a schedule for {len(schedule)} ranks with {self.v} chunks each; "
                                 f"there are {self.p} ranks, and rank {rank} has {modules} stages "
                                 f"{'and another schedule' if theirs != schedule else ''}: give "
                                 f"all ranks one schedule, and a stage for each chunk")
            if twice:
                raise ValueError(f"rank {rank} has two parameters tied by one name: make them one")
        validate(schedule)
        self.tied = []                          # (parameter, the ranks that hold it)
        names = sorted({name for _, _, theirs, _ in everyone for name in theirs})
        for name in names:
            holders = [rank for rank in range(self.p) if name in everyone[rank][2]]
            if len({everyone[rank][2][name] for rank in holders}) > 1:
                raise ValueError(f"the tied weight {name!r} differs between ranks {holders}: start "
                                 f"from equal values")
            if self.rank in holders:
                self.tied.append((tied[name], holders))
        forwards = [[op for op in ops if op.kind == "F"] for ops in schedule]
        self.actions = [actions_of(ops, self.rank) for ops in (forwards, schedule)]
        self.split = {op[1:] for op in schedule[self.rank] if op.kind == "W"}

    def parameters(self):
        """Those of this rank, each once."""
        return list(dict.fromkeys(p for module in self.modules for p in module.parameters()))

    def _gather(self, fact):
        everyone = [None] * self.p
        dist.all_gather_object(everyone, fact, group=self.group)
        return everyone

    def step(self, inputs, targets):
        """Forward and backward: adds the gradients of the microbatches' mean loss to .grad -> that
        loss. inputs, targets: (rows, ...), on all ranks the same; rows: a multiple of microbatches.
        """
        self._shapes(inputs, targets)           # whoever is refused has lost nothing
        before = [(p, p.grad) for p, _ in self.tied]
        for p, _ in before:
            p.grad = None
        loss = self._run(inputs, targets, backward=True)
        self._sum_tied()
        for p, grad in before:
            if grad is not None:
                p.grad += grad
        return loss

    @torch.no_grad()
    def evaluate(self, inputs, targets):
        """-> the mean loss, forward only."""
        return self._run(inputs, targets, backward=False)

    def counted(self):
        """The parameters of this rank, without tied ones that count on an earlier rank."""
        elsewhere = {p for p, holders in self.tied if self.rank != holders[0]}
        return [p for p in self.parameters() if p not in elsewhere]

    @torch.no_grad()
    def grad_norm(self, mine=None):
        """2-norm of the gradient of the whole model, on all ranks; a tied weight counts once. mine:
        the norm of counted() on this rank, where .grad is not all of it (tensor parallelism)."""
        if mine is None:
            mine = nn.utils.get_total_norm([p.grad for p in self.counted() if p.grad is not None])
        square = mine.to(self.loss.device, torch.float64) ** 2
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    @torch.no_grad()
    def _shapes(self, inputs, targets):
        """What each stage returns, [(shape, dtype), ...]: found once for each kind of inputs. The
        stages, one after the other, see a microbatch, all but the first one of zeros."""
        probe = torch.empty(0, 1, device=inputs.device)     # under autocast it gives a lower type
        kind = inputs.shape, targets.shape, inputs.dtype, (probe @ probe.T).dtype
        if kind in self.shapes:
            return self.shapes[kind]
        everyone = self._gather((len(inputs), len(targets)))
        for rank, (rows, others) in enumerate(everyone):
            if rows == 0 or rows % self.m or rows != others or rows != everyone[0][0]:
                raise ValueError(f"rank {rank} has {rows} rows of inputs, {others} of targets: "
                                 f"give all ranks the same, a multiple of {self.m} microbatches")
        x, y, found = inputs[:len(inputs) // self.m], targets[:len(inputs) // self.m], []
        for stage in range(self.last + 1):
            reply = [self._try(stage, x, y) if stage % self.p == self.rank else None]
            dist.broadcast_object_list(reply, group=self.group, group_src=stage % self.p)
            if isinstance(reply[0], str):
                raise ValueError(reply[0])
            found += reply
            x = inputs.new_zeros(reply[0][0], dtype=reply[0][1])
        self.shapes[kind] = found
        return found

    def _try(self, stage, x, y):
        """-> (shape, dtype) of what the stage returns, of the last one's loss; or the problem."""
        module = self.modules[stage // self.p]
        modes = {m: m.training for m in module.modules()}
        try:
            module.eval()                       # uses no random numbers, changes no statistics
            out = module(x)
            if isinstance(out, torch.Tensor) and stage == self.last:
                out = self.loss_fn(out, y)
        except Exception as error:
            return f"stage {stage} fails: {type(error).__name__}: {error}"
        finally:
            for m, mode in modes.items():
                m.training = mode
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return f"stage {stage} returns {out!r:.80}: return one tensor of floating-point numbers"
        if stage == self.last and out.dim() > 0:
            return f"loss_fn returns shape {tuple(out.shape)}: return the mean, one number"
        return out.shape, out.dtype

    def _run(self, inputs, targets, backward):
        shapes = self._shapes(inputs, targets)
        self.rows = list(zip(inputs.chunk(self.m), targets.chunk(self.m)))
        self.live, self.pending, self.peak_live, self.log = {}, {}, 0, []
        self.loss = inputs.new_zeros((), dtype=torch.promote_types(shapes[-1][1], torch.float32))
        results, arriving, sending = {}, {}, collections.deque()
        for action in self.actions[backward]:
            if not isinstance(action, Op):
                source, target, key = action
                if source == self.rank:
                    tensor = results.pop(key).contiguous()
                    work = dist.isend(tensor, group=self.group, group_dst=target)
                    sending.append((tensor, work))
                else:
                    shape, dtype = shapes[key[2] - (key[0] == "B")]
                    buffer = inputs.new_empty(shape, dtype=dtype)
                    arriving[key] = buffer, dist.irecv(buffer, group=self.group, group_src=source)
                continue
            stage = action.chunk * self.p + self.rank
            key = needs(action.kind, action.microbatch, stage, self.last)
            arrived = results.pop(key, None) if action.kind != "W" else None
            while len(sending) > 4:             # to free what is sent; no deadlock, see actions_of
                sending.popleft()[1].wait()
            if key in arriving:
                arrived, work = arriving.pop(key)
                work.wait()
                work = None                     # it would hold on to the buffer
            start = time.perf_counter()
            result = self._compute(action, stage, arrived, backward)
            self.log.append((action, start, time.perf_counter()))
            if result is not None:              # for another rank, or the next stage is here
                results[action.kind, action.microbatch, stage] = result
            self.peak_live = max(self.peak_live, len(self.live) + len(self.pending))
        for _, work in sending:
            work.wait()
        dist.broadcast(self.loss, group=self.group, group_src=self.last % self.p)
        return self.loss

    def _compute(self, op, stage, arrived, backward):
        """One op -> what the next stage (F) or the one before (B) gets, or None."""
        key = op.microbatch, op.chunk
        deferring = self.defer if key in self.split and backward else contextlib.nullcontext()
        if op.kind == "F":
            x, y = self.rows[op.microbatch]
            x = x if stage == 0 else arrived.requires_grad_(backward)
            with deferring:
                out = self.modules[op.chunk](x)
            if stage == self.last:
                out = self.loss_fn(out, y) / self.m         # the mean over microbatches: once, here
                self.loss += out.detach()
            if backward:                        # of the output only its place in the graph is kept
                edge = torch.autograd.graph.get_gradient_edge(out) if out.requires_grad else None
                self.live[key] = x, edge
            return None if stage == self.last else out.detach()
        if op.kind == "W":
            return Defer.finish(self.pending.pop(key))
        x, edge = self.live.pop(key)            # from here on its activations can be freed
        if key in self.split:
            self.defer.pending = self.pending[key] = []
        if edge is not None:
            with deferring:                     # so that recomputed layers are deferred, too
                torch.autograd.backward([edge], None if stage == self.last else [arrived])
        if stage > 0:
            return torch.zeros_like(x) if x.grad is None else x.grad

    @torch.no_grad()
    def _sum_tied(self):
        """Each holder of a tied weight sends its gradient to the others, and adds in rank order."""
        for p, holders in self.tied:
            mine = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            parts = {rank: torch.empty_like(mine) for rank in holders if rank != self.rank}
            ops = [dist.P2POp(send, t, group=self.group, group_peer=rank)
                   for rank, part in parts.items()
                   for send, t in ((dist.isend, mine), (dist.irecv, part))]
            for work in dist.batch_isend_irecv(ops) if ops else []:
                work.wait()
            p.grad = sum(parts.get(rank, mine) for rank in holders)


# ------------------------------------------------------------------ demo

def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    if dist.get_rank() == 0 or not ok:
        print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


class Block(nn.Module):
    """Pre-norm causal attention and MLP, (B, T, C) -> (B, T, C)."""

    def __init__(self, C, H):
        super().__init__()
        self.norm1, self.norm2, self.H = nn.LayerNorm(C), nn.LayerNorm(C), H
        self.qkv, self.o = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.H, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def gpt(V, C, H, blocks, tied=True):
    """Embedding, blocks, norm and head in one nn.Sequential; the same on all ranks."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(V, C), *(Block(C, H) for _ in range(blocks)),
                           nn.LayerNorm(C), nn.Linear(C, V, bias=False))
    if tied:
        layers[0].weight = layers[-1].weight
        layers[0].weight.tied = "embedding"
    return layers


def stages_of(layers, chunks):
    """This rank's stages: equally many layers each, as far as possible."""
    p, rank = dist.get_world_size(), dist.get_rank()
    n = p * chunks
    if n > len(layers):
        raise ValueError(f"{p} ranks x {chunks} chunks for {len(layers)} layers: use fewer")
    return [layers[len(layers) * s // n:len(layers) * (s + 1) // n] for s in range(rank, n, p)]


def mean_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def chunks_of(name):
    return 2 if name == "interleaved" else 1


def formula(name, p, m, v):
    """-> idle share of a rank's time for f = b = w; most microbatches alive on a rank, in chunks.
    """
    idle = {"naive": 3 * m * (p - 1), "zb-h1": p - 1}.get(name, 3 * (p - 1) / v)
    alive = {"naive": lambda i: 1, "gpipe": lambda i: m, "1f1b": lambda i: p - i,
             "interleaved": lambda i: p * v + p - 1 - 2 * i, "zb-h1": lambda i: p}[name]
    return idle / (idle + 3 * m), [min(m * v, alive(i)) for i in range(p)]


class Slow(Pipeline):
    """Each op also sleeps, in place of work that p processors would do: two cores cannot do it at
    once. Processes, messages and waiting are real."""

    seconds = 0.03

    def _compute(self, op, stage, arrived, backward):
        whole = op.kind == "B" and op[1:] not in self.split
        time.sleep(self.seconds / self.v * (2 if whole else 1))
        return super()._compute(op, stage, arrived, backward)


def measured(pipeline):
    """-> the Timeline of its last pass on all ranks, whose clock is one machine's."""
    return Timeline(pipeline._gather(pipeline.log))


def rehearse(name, seconds, inputs, targets):
    """-> the shortest of several passes, their number, the idle share simulated with its times,
    the most microbatches alive on each rank.
    """
    p, m, v = dist.get_world_size(), len(inputs), chunks_of(name)
    ops = schedule(name, p, m, v)
    pipeline, logs = Slow(stages_of(gpt(11, 8, 2, 6), v), ops, mean_loss), []
    pipeline.seconds = seconds
    pipeline.evaluate(inputs, targets)                      # the first messages open connections
    (least, most), near = ((1, 2) if name == "naive" else (3, 5)), False
    while len(logs) < least or not near and len(logs) < most:   # other work disturbs some passes
        pipeline.step(inputs, targets)
        logs.append(measured(pipeline))
        log = min(logs, key=lambda log: log.makespan)
        expected = calibrated(log, ops).bubble
        near = close(log.bubble, expected)
    return log, len(logs), expected, pipeline._gather(pipeline.peak_live)


def close(idle, expected):
    """Messages take time, too, which no simulation of the ops alone knows."""
    return abs(idle - expected) <= max(0.1 * expected, 0.02)


def calibrated(log, schedule):
    """The schedule, simulated with the median times that each stage really took."""
    times, p = collections.defaultdict(list), len(log.spans)
    for rank, spans in enumerate(log.spans):
        for op, start, end in spans:
            times[op.kind, op.chunk * p + rank].append(end - start)
    stages = range(1 + max(stage for _, stage in times))
    return simulate(schedule, *([statistics.median(times[kind, s] or [0]) for s in stages]
                                for kind in "FBW"))


def demo():
    p, V, C, T, m = dist.get_world_size(), 11, 8, 5, 8
    if p > 4:
        raise ValueError(f"{p} ranks: the demo's 9 layers make stages for 1 to 4")
    m = m if m % p == 0 else 2 * p
    tokens = torch.randint(V, (24, T + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole, flops, panels = gpt(V, C, 2, 6).double(), {}, {}
    want = mean_loss(whole(inputs), targets)                # dense reference: all rows at once
    want.backward()
    for name in NAMES:
        v, errors = chunks_of(name), []
        for count in (p, m) if name == "interleaved" else (1, 3, m):
            layers = gpt(V, C, 2, 6).double()
            pipeline = Pipeline(stages_of(layers, v), schedule(name, p, count, v), mean_loss)
            with FlopCounterMode(display=False) as flops[name]:
                errors.append((pipeline.step(inputs, targets) - want).abs().item())
            here = set(pipeline.parameters())               # None: an error, too
            errors += [(a.grad - b.grad).abs().max().item() for a, b in
                       zip(layers.parameters(), whole.parameters()) if a in here]
        error = torch.tensor(errors).max().item()           # NaN, if one is
        check(error <= 1e-12, f"{name}: loss, gradients = the unsplit model's, m = ... {m}",
              f"{error:.1e} (<= 1e-12)")
    count = [flops[name].get_total_flops() for name in ("1f1b", "zb-h1")]
    check(count[0] == count[1], "B and W apart need the FLOPs of B and W together",
          f"{count[1]:,} of {count[0]:,}")
    if dist.get_rank() == 0:
        print(f"\n{p} ranks, {m} microbatches, ops that sleep: idle share of the ranks' time, and "
              f"most microbatches\nalive on each rank (each chunk counts)\n")
    for seconds in (0.03, 0.1):             # longer ops where a busy machine delays the messages
        runs = {name: rehearse(name, seconds, inputs[:m], targets[:m]) for name in NAMES}
        if all(close(log.bubble, expected) for log, _, expected, _ in runs.values()):
            break
    for name, (log, tries, expected, peak) in runs.items():
        v = chunks_of(name)
        ideal = simulate(schedule(name, p, m, v), 1 / v, 1 / v, 1 / v)
        idle, alive = formula(name, p, m, v)
        check(abs(ideal.bubble - idle) < 1e-12, f"{name}: idle share, simulated = formula",
              f"{ideal.bubble:.3f} = {idle:.3f}")
        check(ideal.peak_live == peak == alive, "    alive: simulated = run = formula", alive)
        check(close(log.bubble, expected),
              f"    idle, shortest of {tries} runs = simulated with its median times",
              f"{log.bubble:.3f} = {expected:.3f} (10 % or 0.02)")
        panels[name] = ideal, log
    if dist.get_rank() > 0:
        return
    for name in ("1f1b", "zb-h1"):
        print(f"\n{name}\n{chart(panels[name][0])}")
    runs = [(f"{name}: {log.bubble:.1%} idle, simulated {ideal.bubble:.1%}", log)
            for name, (ideal, log) in panels.items() if name != "naive"]    # three times as long
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    draw(runs, "seconds", folder / "pp.png")


def draw(panels, unit, path):
    """Timelines below each other. panels: (title, Timeline) of equally many ranks."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    ranks = len(panels[0][1].spans)
    figure = Figure(figsize=(8, 0.8 + (0.6 + 0.25 * ranks) * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    colors, seen = {"F": "C0", "B": "C1", "W": "C2"}, set()
    for axes, (title, timeline) in zip(grid, panels):
        begin = min(spans[0][1] for spans in timeline.spans)
        for rank, spans in enumerate(timeline.spans):
            for op, start, end in spans:
                axes.broken_barh([(start - begin, end - start)], (rank - 0.4, 0.8), linewidth=0.5,
                                 color=colors[op.kind], edgecolor="white",
                                 alpha=1 - 0.4 * (op.chunk % 2))
                axes.annotate(op.microbatch, ((start + end) / 2 - begin, rank), fontsize=8,
                              color="white", ha="center", va="center")
                seen |= {op.kind, op.chunk}
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=10)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set(title=title)
    grid[-1].set(xlabel=f"time ({unit})", xlim=(0, None))
    for what, text in (("F", "forward"), ("B", "backward (zb-h1: of the input)"),
                       ("W", "backward of weights"), (1, "paler: every second chunk")):
        if what in seen:
            grid[0].barh(0, 0, color=colors.get(what, "0.7"), label=text)
    figure.legend(loc="outside lower center", ncols=4, fontsize=10, frameon=False,
                  handlelength=0.8, columnspacing=1)
    figure.savefig(path)


def bench(rounds):
    """Median ms of a step of one GPT, torch's schedule and ours in turn, with equal gradients."""
    from torch.distributed import pipelining
    cuda = 1 <= int(os.environ.get("LOCAL_WORLD_SIZE", 0)) <= torch.cuda.device_count()
    device, C, T = ("cuda", 1024, 512) if cuda else ("cpu", 128, 64)
    p, rank, V, blocks = dist.get_world_size(), dist.get_rank(), 256, 14
    m = 4 * p
    tokens = torch.randint(V, (2 * m, T + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    kinds = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B,
             "interleaved": pipelining.ScheduleInterleaved1F1B,
             "zb-h1": pipelining.ScheduleInterleavedZeroBubble}
    for name in kinds:
        v, times = chunks_of(name), {"torch": [], "ours": []}
        models = {who: stages_of(gpt(V, C, 4, blocks, tied=False).to(device), v) for who in times}
        stages = [pipelining.PipelineStage(module, i * p + rank, p * v, torch.device(device))
                  for i, module in enumerate(models["torch"])]
        several = name in ("interleaved", "zb-h1")          # those take a list of stages
        theirs = kinds[name](stages if several else stages[0], m, mean_loss)
        ours = Pipeline(models["ours"], schedule(name, p, m, v), mean_loss)
        steps = {"torch": lambda: theirs.step(*[inputs] * (rank == 0), target=targets),
                 "ours": lambda: ours.step(inputs, targets)}
        for who in list(steps) * rounds:
            for module in models[who]:
                module.zero_grad()
            dist.barrier()
            begin = time.perf_counter()
            steps[who]()
            if cuda:
                torch.cuda.synchronize()        # gloo's barrier does not wait for the GPU
            dist.barrier()
            times[who].append((time.perf_counter() - begin) * 1e3)
        gap = torch.stack([(a.grad - b.grad).abs().max() for a, b in zip(
            *([w for module in models[who] for w in module.parameters()] for who in models))]).max()
        gap = torch.tensor(ours._gather(gap.item())).max().item()
        base, ms = (statistics.median(times[who][3:]) for who in times)
        log = measured(ours)
        check(gap < 1e-5, f"{name}: gradients = torch's", f"{gap:.0e} (< 1e-5)")
        if rank == 0:
            expected = calibrated(log, schedule(name, p, m, v)).bubble
            idle = "" if cuda else f"   idle {log.bubble:.3f}, simulated {expected:.3f}"
            print(f"     torch {base:.1f} ms   ours {ms:.1f} ms   {ms / base:.2f} x torch{idle}")


def show(name, p, m, v):
    """Print and draw the schedule; nothing is run."""
    timeline = simulate(schedule(name, p, m, v), 1 / v, 1 / v, 1 / v)
    print(chart(timeline))
    print(f"{timeline.bubble:.1%} idle; makespan {timeline.makespan:g} forwards of a rank; "
          f"microbatches (of a chunk) alive {timeline.peak_live}")
    path = f"{name}-{p}x{m}.png"
    draw([(f"{name}: {timeline.bubble:.1%} idle", timeline)], "one forward of a rank = 1", path)
    print(f"drawn in {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="pipeline parallelism: demo, step times, charts")
    parser.add_argument("--nproc", type=int, default=4, help="processes to start (default 4)")
    parser.add_argument("--bench", action="store_true", help="only step times, 25 rounds")
    parser.add_argument("--schedule", choices=NAMES, help="print and draw this one, run nothing")
    parser.add_argument("--stages", type=int, default=4, help="ranks of --schedule (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="of --schedule (default 8)")
    parser.add_argument("--chunks", type=int, help="of a rank; default: 2 for interleaved, else 1")
    args = parser.parse_args()
    if args.bench:
        launch(bench, args.nproc, 25)
    elif args.schedule:
        try:
            show(args.schedule, args.stages, args.microbatches,
                 args.chunks or chunks_of(args.schedule))
        except ValueError as problem:
            parser.error(str(problem))
    else:
        launch(demo, args.nproc)
