"""ZeRO: data parallelism in which N ranks share what otherwise each of them holds whole.

Bytes that each parameter costs a rank, Adam in mixed precision (bf16 weight and gradient; in fp32
the weight that is stepped and two moments), and what a rank sends in a step, for Psi parameters:

    stage              weights   gradients   optimizer   sent, times (N - 1) / N
    0  nothing cut        2          2          12       2 Psi: an all-reduce
    1  optimizer cut      2          2          12 / N   2 Psi
    2  + gradients        2          2 / N      12 / N   2 Psi, and Psi per further microbatch
    3  + weights          2 / N      2 / N      12 / N   3 Psi per microbatch

An all-reduce is a reduce-scatter and an all-gather. ZeRO steps in between, and sends no more:

    rank 0  gradients [a b c] -.                .-> mean a -> step a -.              .-> [a b c]
    rank 1  gradients [a b c] --reduce-scatter----> mean b -> step b --- all-gather ---> [a b c]
    rank 2  gradients [a b c] -'                '-> mean c -> step c -'              '-> [a b c]

Pure fp32 costs 4 + 4 + 8 bytes: stages 1 and 2 then save at most 2x and 4x, not 4x and 8x.

Cost     the table, and while backward sends them three copies of one block's gradients; stage 3
         also holds, whole, the one or two blocks that are computing, and what is in no block, such
         as embedding and head. A parameter without gradient, or blocks that run in another order
         than they stand in the module, hold back those behind them until sync(): all correct, but
         whole. The reduce-scatter is an all-to-all, summed in float32: between machines of g ranks
         each it sends up to g times as much as a ring. Under autocast all blocks' cast weights
         remain for backward: give compute_dtype instead
Paper    Rajbhandari et al. 2020, ZeRO, sections 5 and 7 (arXiv 1910.02054)
Run      python zero.py [--nproc N] [--bench]   or   torchrun --nproc-per-node N zero.py [--bench]
Left out parameter groups, cut frozen parameters, cut activations (ZeRO-R), ranks that run different
         blocks or, in stage 3, use other parameters, or do so in two forwards before two backwards;
         parameters that other blocks read directly; microbatches' gradients added up in more than
         compute_dtype
"""

import argparse
import contextlib
import functools
import os
import pathlib
import sys
import tempfile
import time
import zlib
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)    # before torch 2.13
# These step every element by itself: a part of a tensor steps as it would in the whole.
ELEMENTWISE = ("Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD").split()


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


class Unit:
    """The trained parameters of one block, laid end to end and padded to N parts of `size`.

    full    (N size,)  the weights that compute: every p.data is a view. Stage 3: freed after use
    shard   (size,)    this rank's part of them
    master  (size,)    what the optimizer steps: the shard in float32, or the shard itself
    grad    (size,)    this rank's part of the mean gradient, None before there is one
    In stage 0 a rank's part is all: (N size,)."""

    def __init__(self, params, stage, group, compute_dtype, offload, device):
        self.params, self.stage, self.group = params, stage, group
        self.world, rank = dist.get_world_size(group), dist.get_rank(group)
        self.count = sum(p.numel() for p in params)
        self.size = -(-self.count // self.world)            # rounded up: 7 elements, 3 ranks: 3
        self.kept = slice(rank * self.size, (rank + 1) * self.size) if stage else slice(None)
        exact = self.lay_out([p.detach() for p in params])
        if compute_dtype is not None:
            exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
        self.full = exact.to(device, compute_dtype or exact.dtype)
        for p, view in zip(params, self.views(self.full)):
            p.data = view
        self.shard = self.full[self.kept].clone() if stage == 3 else self.full[self.kept]
        master = self.shard
        if self.full.dtype != exact.dtype or offload:
            master = exact[self.kept].to("cpu" if offload else device, copy=True)
        self.master, self.grad = nn.Parameter(master), None
        self.ready, self.gathering, self.sending = set(), None, None
        self.free()

    def lay_out(self, tensors):                 # one per parameter -> (N size,)
        padding = tensors[0].new_zeros(self.world * self.size - self.count)
        return torch.cat([*(t.flatten() for t in tensors), padding])

    def views(self, flat):                      # (N size,) -> one per parameter
        parts = flat[:self.count].split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def gather(self):
        """Start to fill `full` with the shards of all ranks; wait() before it is used."""
        memory = self.full.untyped_storage()
        if self.stage == 3 and memory.size() > 0:
            return                              # it is there, or on its way
        if self.stage > 0:
            if memory.size() == 0:              # else it would be copied to a new place
                memory.resize_(self.full.nbytes)
            self.gathering = all_gather(self.full, self.shard, group=self.group, async_op=True)

    def wait(self):
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def free(self):
        self.wait()
        if self.stage == 3:
            self.full.untyped_storage().resize_(0)

    def reduce(self):
        """Start the reduce-scatter: each rank receives everybody's gradients of its own part."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.sent = self.lay_out(grads)
        self.received = torch.empty_like(self.sent)
        self.sending = dist.all_to_all_single(self.received, self.sent, group=self.group,
                                              async_op=True)
        self.ready = set()                      # parameters whose gradient is complete
        for p in self.params:
            p.grad = None

    def finish(self):
        """Sum what arrived, in float32: fp16 could overflow, and would round N - 1 times."""
        if self.sending is None:
            return
        self.sending.wait()
        wide = torch.promote_types(self.full.dtype, torch.float32)
        mean = self.received.view(self.world, self.size).sum(0, dtype=wide).div_(self.world)
        mean = mean.to(self.full.dtype)
        if self.stage == 0:                     # the second half of an all-reduce
            mean = self.whole(mean)
        self.grad = mean if self.grad is None else self.grad + mean
        self.sending = self.sent = self.received = None

    def whole(self, part):                      # each rank's (size,) -> (N size,)
        whole = torch.empty_like(self.full, dtype=part.dtype)
        all_gather(whole, part.to(whole.device), group=self.group)
        return whole

    def publish(self):
        """The master has changed: bring it into the weights that compute; wait() before use."""
        self.free()
        if self.shard.data_ptr() != self.master.data_ptr():
            self.shard.copy_(self.master.detach())
        if self.stage < 3:
            self.gather()


def blocks_of(module, prefix=""):
    """Names of the items of the outermost ModuleLists and Sequentials: as a rule, the layers."""
    lists, names = (nn.ModuleList, nn.ModuleDict, nn.Sequential), []
    for name, child in module.named_children():
        if isinstance(module, lists) and not isinstance(child, lists):
            names.append(prefix + name)
        else:
            names += blocks_of(child, f"{prefix}{name}.")
    return names


def in_backward():                              # also while a checkpointed block is recomputed
    return torch._C._current_graph_task_id() != -1


class Zero(nn.Module):
    """A step: loss.backward(); model.clip_grad_norm_(1.0); model.step(); model.zero_grad()

    The gradients are means over the ranks of `group` (None: all), which use the same parameters.
    compute_dtype: of weights, gradients and floating inputs (None: as they are). device: where it
    computes (None: where the module is); from a module on the CPU each rank brings there what it
    keeps, block by block. offload: what the optimizer needs lives on the CPU, and is stepped there.
    A missing gradient counts as 0. Frozen parameters stay whole, in compute_dtype. Learning rates:
    .optimizer.param_groups. Weights: .full_state_dict(). Every rank runs a backward, if only of
    0 * output. A parameter with an attribute `replicas`, some ranks of the group, is shared by
    those alone: the others hold other experts (moe.py), and say so of theirs. ValueError, on all
    ranks: what problem_of() and refuse() find."""

    def __init__(self, module, stage, optimizer_cls, group=None, compute_dtype=None, offload=False,
                 device=None, **optimizer_kwargs):
        super().__init__()
        if dist.get_rank(group) < 0:
            raise ValueError("this rank is in no group that would train it: give it one it is in")
        problem = problem_of(module, stage, optimizer_cls, optimizer_kwargs, compute_dtype)
        refuse(problem, module, stage, group)
        self.module, self.stage, self.group, self.dtype = module, stage, group, compute_dtype
        blocks, owner, units = blocks_of(module), {}, {}
        device = torch.device(device or next(iter(module.parameters())).device)
        for name, p in module.named_parameters(remove_duplicate=False):
            block = next((b for b in blocks if name.startswith(f"{b}.")), "")
            owner[p] = block if owner.get(p, block) == block else ""    # "": in no block, or in two
        self.names = {p: name for name, p in module.named_parameters()}
        self.trained = {p for p in owner if p.requires_grad}
        for p in owner:
            if p not in self.trained and p.is_floating_point():
                p.data = p.data.to(device, compute_dtype or p.dtype)
        for block in [*blocks, ""]:
            alike = {}                          # by the ranks that hold the same, see refuse()
            for p in owner:
                if owner[p] == block and p in self.trained:
                    alike.setdefault(getattr(p, "replicas", group), []).append(p)
            for ranks, params in alike.items():
                cut = stage if dist.get_world_size(ranks) > 1 else 0    # else nothing is to cut
                units[block, ranks] = Unit(params, cut, ranks, compute_dtype, offload, device)
        module.to(device)                       # buffers
        self.units = list(units.values())
        in_blocks = [unit for (block, _), unit in units.items() if block]
        self.order = in_blocks[::-1] + self.units[len(in_blocks):]      # about that of backward
        self.optimizer = optimizer_cls([unit.master for unit in self.units], **optimizer_kwargs)
        self.in_flight, self.next, self.factor, self.accumulating = self.units[0], 0, None, False
        for i, ((block, _), unit) in enumerate(units.items()):
            for p in unit.params:
                p.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, unit))
            if unit.stage == 3:
                where = module.get_submodule(block)
                where.register_forward_pre_hook(functools.partial(self._before, i))
                where.register_forward_hook(functools.partial(self._after, i))

    def forward(self, *args, **kwargs):
        def cast(x):
            return x.to(self.dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        if self.stage >= 2:                     # no whole gradients are left from a microbatch, as
            self.sync()                         # of a block that did not use all its parameters
        if self.dtype is not None:
            args, kwargs = tree_map(cast, (args, kwargs))
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def _before(self, i, *_):
        """Stage 3, when unit i is needed: have it whole, and the next one on its way."""
        self.units[i].gather()
        self.units[i].wait()
        ahead = i - 1 if in_backward() else i + 1
        if 0 <= ahead < len(self.units):
            self.units[ahead].gather()

    def _after(self, i, module, args, output):
        """Stage 3, after a forward: free unit i until `output` receives its gradient."""
        if in_backward():
            return
        for t in tree_leaves(output):
            if torch.is_tensor(t) and t.requires_grad:
                t.register_hook(functools.partial(self._before, i))
        self.units[i].free()

    @contextlib.contextmanager
    def no_sync(self):
        """For every backward of a step but the last: stages 0 and 1 then send nothing. 2 and 3 do,
        as they have no room for whole gradients."""
        before, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = before

    def _on_gradient(self, unit, p):            # autograd calls this when p.grad is complete
        if self.accumulating and self.stage < 2:
            return
        unit.ready.add(p)
        while len(self.order[self.next].ready) == len(self.order[self.next].params):
            self._reduce_next()                 # in one order: all ranks must send the same

    @torch.no_grad()
    def _reduce_next(self):
        self.in_flight.finish()                 # one unit at a time: never all gradients at once
        self.in_flight = self.order[self.next]
        self.in_flight.reduce()
        self.in_flight.free()
        self.next = (self.next + 1) % len(self.order)

    @torch.no_grad()
    def sync(self):
        """Complete the mean gradients. clip_grad_norm_ and step begin with it."""
        while self.next > 0 or any(p.grad is not None for p in self.trained):
            self._reduce_next()                 # also units that backward did not reach
        self.in_flight.finish()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm, loss_scale=1.0, whole=None):
        """-> norm of the whole gradient / loss_scale; step() then uses it, at most max_norm long.
        loss_scale: what the loss was multiplied by (fp16). The norm is not finite: no step().
        whole: makes the norm of this model that of a larger one, of which this is a stage (pp.py).
        """
        self.sync()
        total = torch.zeros((), dtype=torch.float64, device=self.units[0].full.device)
        for unit in self.units:
            if unit.grad is not None:           # cut: each rank has another part, else the same
                total += unit.grad.double().square().sum() / (1 if unit.stage else unit.world)
        dist.all_reduce(total, group=self.group)
        norm = total.sqrt() if whole is None else whole(total.sqrt())
        norm = norm / loss_scale
        self.factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale       # no waiting
        return norm

    @torch.no_grad()
    def step(self):
        self.sync()
        for unit in self.units:                 # one by one: one gradient in float32 at a time
            if unit.grad is not None:
                grad = unit.grad.to(unit.master)
                if self.factor is not None:
                    grad = grad * self.factor.to(grad.device)
                unit.master.grad = grad
                self.optimizer.step()           # it skips parameters without gradient
                unit.master.grad = None
                unit.publish()
        for unit in self.units:
            unit.wait()

    @torch.no_grad()
    def zero_grad(self):
        """All ranks call it: what a backward has sent that leads to no step is awaited here."""
        self.sync()
        self.factor = None
        for unit in self.units:
            unit.grad = None
        for p in self.trained:
            p.grad = None

    def state_dict(self, *args, **kwargs):
        raise RuntimeError("a rank holds parts: use full_state_dict() and load_full_state_dict()")

    load_state_dict = state_dict

    def untrained(self):                        # frozen parameters, and the buffers there are now
        named = [*self.names.items(), *((t, name) for name, t in self.module.named_buffers())]
        return {f"model.{name}": t for t, name in named if t not in self.trained}

    @torch.no_grad()
    def full_state_dict(self):
        """-> {"model.<name>": tensor, "optimizer.<name>.<key>": tensor}: whole, in full precision,
        on the CPU of every rank, whatever the stage and the number of ranks. All ranks call it."""
        state = self.untrained()
        for unit in self.units:
            for key, t in {"": unit.master, **self.optimizer.state[unit.master]}.items():
                whole = (t if t.dim() == 0 or unit.stage == 0 else unit.whole(t)).cpu()
                parts = [t] * len(unit.params) if t.dim() == 0 else unit.views(whole)
                for p, part in zip(unit.params, parts):
                    state[self._entry(p, key)] = part
        return {name: t.detach().cpu().clone() for name, t in state.items()}

    def _entry(self, p, key):                   # the name of its weight (key "") or optimizer state
        return f"optimizer.{self.names[p]}.{key}" if key else f"model.{self.names[p]}"

    @torch.no_grad()
    def load_full_state_dict(self, state):
        """Take what full_state_dict() gave, in any stage and on any number of ranks; without
        "optimizer." entries: the weights. All ranks call it, with the same. ValueError, before
        anything changes: a name or a shape that is not this model's. The optimizer must be of the
        class that it was."""
        keys = {name.rpartition(".")[2] for name in state if name.startswith("optimizer.")}
        keys = sorted(keys)                     # one order on all ranks
        wanted = {name: t.shape for name, t in self.untrained().items()}
        wanted |= {self._entry(p, ""): p.shape for p in self.trained}
        wanted |= {self._entry(p, key): p.shape for p in self.trained for key in keys}
        for name in wanted | state:
            here, there = wanted.get(name), state[name].shape if name in state else None
            number = there == () and name.startswith("optimizer.")          # such as Adam's step
            if here is None or here != there and not number:
                raise ValueError(f"{name} has shape {here} in the model, {there} in the state; "
                                 f"build the model that the state is of")
        for name, t in self.untrained().items():
            t.copy_(state[name])
        optimizer = self.optimizer.state_dict()
        for i, unit in enumerate(self.units):
            def mine(key):                      # a copy of this rank's part: nothing of the state
                parts = [state[self._entry(p, key)] for p in unit.params]
                part = parts[0] if parts[0].dim() == 0 else unit.lay_out(parts)[unit.kept]
                return part.clone()
            unit.master.copy_(mine(""))
            unit.publish()
            if keys:
                optimizer["state"][i] = {key: mine(key) for key in keys}
        self.optimizer.load_state_dict(optimizer)
        for unit in self.units:
            unit.wait()


def problem_of(module, stage, optimizer_cls, optimizer_kwargs, compute_dtype):
    """What stands against Zero(...) on this rank, or None."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if stage not in (0, 1, 2, 3):
        return f"stage={stage}: pick 0, 1, 2 or 3"
    if compute_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        return f"compute_dtype={compute_dtype}: pick torch.bfloat16, float16, float32 or None"
    if len({(p.dtype, p.device) for p in trained}) != 1 or any(p.dim() == 0 for p in trained):
        return "give it parameters to train, of one dtype, on one device, none of shape () but (1,)"
    if any(p._post_accumulate_grad_hooks for p in trained) or any(
            isinstance(m, nn.parallel.DistributedDataParallel) for m in module.modules()):
        return "the module is wrapped already: give the one inside"
    if any(hasattr(p, "expert_parallel") and not hasattr(p, "replicas") for p in trained):
        return "experts on several ranks (moe.py): set p.replicas, the group that holds the same"
    try:
        kind = type(optimizer_cls([torch.zeros(1, requires_grad=True)], **optimizer_kwargs))
    except (TypeError, ValueError) as error:
        return f"{optimizer_cls.__name__}: {error}"
    if kind not in [getattr(torch.optim, name) for name in ELEMENTWISE]:
        return (f"{kind.__name__} may look at whole matrices, but a rank has only parts: pick one "
                f"of {', '.join(ELEMENTWISE)}; or replicate (DDP)")


def refuse(problem, module, stage, group):
    """ValueError on all ranks or on none: one that raised alone would leave the others waiting."""
    facts, weights = [f"{stage=}"], {group: []}
    for name, p in module.named_parameters():
        crc32 = zlib.crc32(p.detach().cpu().flatten().view(torch.uint8).numpy())
        shared = hasattr(p, "replicas")         # else the ranks would not meet in the next rounds
        facts.append(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad=} {shared=}")
        weights.setdefault(getattr(p, "replicas", group), []).append(f"{name} {crc32=}")
    rounds = [(group, facts), *weights.items(), (group, [])]    # the last tells all what one found
    for ranks, mine in rounds:
        everyone = [None] * dist.get_world_size(ranks)
        dist.all_gather_object(everyone, (problem, mine), group=ranks)
        for rank, (theirs, other) in enumerate(everyone):
            if other != everyone[0][1]:
                both = sorted(set(other) ^ set(everyone[0][1]))[:2] or "their order"
                theirs = theirs or f"ranks 0 and {rank} differ in {both}: build one model, " \
                                   f"from one seed"
            problem = problem or theirs
        if problem and mine is facts:           # all of the group have seen the same
            break
    if problem:
        raise ValueError(problem)


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    if dist.get_rank() == 0 or not ok:
        print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def net():
    """Sizes that do not divide evenly; a tied, a frozen and a one-element parameter; float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.PReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    net[4].weight = net[2].weight
    net[2].bias.requires_grad_(False)
    return net.double()


def held(model):
    """-> this rank's bytes of weights, gradients, optimizer state; each storage counts once."""
    units, seen, sizes = model.units, set(), []
    weights = [t for unit in units for t in (unit.full, unit.shard)]
    gradients = [unit.grad for unit in units] + [p.grad for p in model.trained]
    gradients += [t for unit in units if unit.sending for t in (unit.sent, unit.received)]
    state = [t for p in (unit.master for unit in units)
             for t in (p, *model.optimizer.state[p].values())]
    for tensors in (weights, gradients, state):
        storages = [t.untyped_storage() for t in tensors if t is not None]
        new = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in seen}
        sizes.append(sum(new.values()))
        seen |= set(new)
    return sizes


def account(stage, compute_dtype):
    """Per parameter: bytes of weights, gradients, optimizer state between two microbatches; the
    most when a gradient of a backward is complete; values sent in a step of one microbatch."""
    n, psi, peaks, sent = dist.get_world_size(), 8 * 127 * 128, [], []
    model = Zero(nn.Sequential(*(nn.Linear(127, 127) for _ in range(8))), stage, torch.optim.AdamW,
                 compute_dtype=compute_dtype)
    x = torch.ones(4, 127)

    def counted(collective):                    # N parts arrive, one of them this rank's own
        def call(output, *args, **kwargs):
            sent.append(output.numel() * (n - 1) / n / psi)
            return collective(output, *args, **kwargs)
        return call

    with mock.patch.dict(globals(), all_gather=counted(all_gather)), mock.patch.object(
            dist, "all_to_all_single", counted(dist.all_to_all_single)):
        model(x).sum().backward()
        model.step()
        model.zero_grad()
    for p in model.trained:
        p.register_post_accumulate_grad_hook(lambda p: peaks.append(sum(held(model)) / psi))
    with model.no_sync():
        model(x).sum().backward()
    if stage >= 2:
        model.sync()                            # what is still on its way arrives
    sizes = [size / psi for size in held(model)]
    model(x).sum().backward()
    return sizes, max(peaks), sum(sent)


def demo():
    rank, n = dist.get_rank(), dist.get_world_size()
    x = torch.randn(4 * n, 7, generator=torch.Generator().manual_seed(1)).double()
    for optimizer_cls in (torch.optim.SGD, torch.optim.AdamW):
        whole = net()                           # dense reference: one process, all rows
        optimizer = optimizer_cls(whole.parameters(), lr=0.1)
        models = [Zero(net(), stage, optimizer_cls, lr=0.1) for stage in range(4)]
        for _ in range(3):
            whole(x).square().sum(1).mean().backward()
            nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            for model in models:
                first, second = x.chunk(n)[rank].chunk(2)   # two microbatches
                with model.no_sync():
                    (model(first).square().sum(1).mean() / 2).backward()
                (model(second).square().sum(1).mean() / 2).backward()
                model.clip_grad_norm_(0.5)
                model.step()
                model.zero_grad()
        states = [model.full_state_dict() for model in models]
        error = torch.stack([(state[f"model.{name}"] - p).abs().max() for state in states
                             for name, p in whole.named_parameters()]).max().item()
        check(error <= 1e-12, f"stages 0-3: 3 clipped {optimizer_cls.__name__} steps = one process",
              f"{error:.1e} (<= 1e-12)")
    again = Zero(net(), 1, torch.optim.AdamW, lr=0.1)
    again.load_full_state_dict(states[3])
    same = [torch.equal(t, states[3][name]) for name, t in again.full_state_dict().items()]
    check(all(same), "stage 1 goes on from what stage 3 saved", f"{len(same)} tensors, bit-equal")

    if rank == 0:
        print(f"\nAdamW on {n} ranks. Bytes a parameter between two microbatches: weights + "
              f"gradients +\noptimizer state; values sent; at worst, when a gradient is complete\n")
    table = {}
    for name, dtype, kinds in (("mixed bf16", torch.bfloat16, (2, 2, 12)),
                               ("pure fp32", None, (4, 4, 8))):
        for stage in range(4):
            sizes, worst, sent = account(stage, dtype)
            cut = stage >= 3, stage >= 2, stage >= 1
            theory = sum(kind / n if c else kind for kind, c in zip(kinds, cut))
            payload = (3 if stage == 3 else 2) * (n - 1) / n
            off = max(abs(sum(sizes) / theory - 1), abs(sent - payload) / max(payload, 1))
            measured = " + ".join(f"{size:.2f}" for size in sizes)
            check(off <= 0.02, f"{name}, stage {stage}: {theory:.2f} bytes, {payload:.2f} Psi (2%)",
                  f"{measured}; {sent:.2f} Psi; {worst:.1f}")
            table[name, stage] = sizes, theory
    if rank == 0:
        draw(table, n)


def draw(table, n):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    panels = dict(zip(("mixed bf16", "pure fp32"), figure.subplots(1, 2, sharey=True)))
    for (name, stage), (sizes, theory) in table.items():
        axes, parts = panels[name], ("weights", "gradients", "optimizer\nstate")
        for i, size in enumerate(sizes):
            axes.bar(stage, size, bottom=sum(sizes[:i]), color=f"C{i}")
            if stage == 0:
                axes.annotate(parts[i], (stage, sum(sizes[:i]) + size / 2), ha="center",
                              va="center", color="white", fontsize=10)
        axes.plot([stage - 0.48, stage + 0.48], [theory] * 2, "k--", lw=1)
        axes.annotate(f"{sum(sizes):.1f}", (stage, theory + 0.3), ha="center")
        axes.set(xlabel="ZeRO stage", xticks=range(4), ylim=(0, 18), title=name)
    panels["mixed bf16"].set_ylabel(f"bytes per parameter on each of {n} ranks")
    panels["pure fp32"].annotate("bars: measured\ndashed: formula", (3.4, 14), ha="right")
    figure.suptitle("Each stage cuts one more part")
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "zero.png")


def bench(rounds):
    """Median ms of a step of AdamW, torch's own ways and ours in turn."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    cuda = 1 <= int(os.environ.get("LOCAL_WORLD_SIZE", 0)) <= torch.cuda.device_count()
    device, C, depth = ("cuda", 1024, 12) if cuda else ("cpu", 256, 4)
    adamw, x, ways = torch.optim.AdamW, torch.randn(4, 16, C, device=device), {}

    def model():
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(C, 4, 4 * C, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(block, depth).to(device)

    ddp = nn.parallel.DistributedDataParallel(model(), gradient_as_bucket_view=True)
    ways["torch ZeroRedundancyOptimizer"] = ddp, ZeroRedundancyOptimizer(
        ddp.parameters(), adamw, parameters_as_bucket_view=True, lr=1e-4)
    fsdp = model()
    for module in [*fsdp.layers, fsdp]:
        fully_shard(module)
    ways["torch FSDP2"] = fsdp, adamw(fsdp.parameters(), lr=1e-4)
    for stage in (1, 2, 3):
        ways[f"stage {stage}"] = (Zero(model(), stage, adamw, lr=1e-4),) * 2
    times = {way: [] for way in ways}
    for way, (m, optimizer) in list(ways.items()) * rounds:
        dist.barrier()
        start = time.perf_counter()
        m(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()            # gloo's barrier does not wait for the GPU
        dist.barrier()
        times[way].append((time.perf_counter() - start) * 1e3)
    for way in ways if dist.get_rank() == 0 else []:
        theirs = "torch FSDP2" if "3" in way or "FSDP" in way else "torch ZeroRedundancyOptimizer"
        ms, base = (torch.tensor(times[k][3:]).median() for k in (way, theirs))
        print(f"{way:<30} {ms:8.1f} ms   {ms / base:.2f} x {theirs}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ZeRO: demo, or step times in ms")
    parser.add_argument("--nproc", type=int, default=4, help="processes to start (default 4)")
    parser.add_argument("--bench", action="store_true", help="only step times, 25 rounds")
    args = parser.parse_args()
    launch(*((bench, args.nproc, 25) if args.bench else (demo, args.nproc)))
