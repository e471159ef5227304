"""Data parallelism: every rank holds the whole model, reads its own rows, averages the gradients.

    dL/dW = 1/N * sum_i dL_i/dW          N ranks, L_i = mean loss over the rows of rank i

Exact if all ranks have equally many rows; if not, use global_mean(). Backward starts at the last
layer, whose gradients travel in a bucket while those of earlier layers are being computed:

    backward   | layer 3 | layer 2 | layer 1 | layer 0 |
    bucket 0             [== all-reduce ==]
    bucket 1                                           [== all-reduce ==]  the wait

Cost     a rank sends 2 (N-1)/N of the gradient bytes a step (ring); only activations shrink, and
         from backward to sync() the gradients are there twice: as autograd's and in buckets.
Paper    Li et al. 2020, PyTorch Distributed, section 3.2 (arXiv 2006.15704).
Run      python ddp.py [--nproc N] [--bench]   or   torchrun --nproc-per-node N ddp.py [--bench]
Left out sparse gradients, compression, buckets reordered after step 1: see torch/nn/parallel.
"""

import argparse
import contextlib
import copy
import os
import pathlib
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn as nn


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


class DataParallel(nn.Module):
    """One process, several devices: copy the module, split inputs (B, ...) of any B, run the parts,
    join the outputs on devices[0] along dim 0 (losses: one entry per part). Gradients add up in
    module. CUDA calls return before the work is done, so a plain loop lets all GPUs compute."""

    def __init__(self, module, devices):
        super().__init__()
        self.devices = [torch.device(d) for d in devices]
        self.module = module.to(self.devices[0])

    def forward(self, *inputs):
        if len({len(x) for x in inputs}) != 1:
            raise ValueError(f"inputs have B = {[len(x) for x in inputs]}; give tensors of one B")
        devices = self.devices[:max(1, len(inputs[0]))]
        parts = zip(*(x.tensor_split(len(devices)) for x in inputs))
        # A copy's weights are w.to(): backward runs through it to w. The module itself is the first
        # replica, so BatchNorm's statistics are updated once; those of the copies are lost.
        weights = [*self.module.parameters(), *self.module.buffers()]
        replicas = [self.module] + [copy.deepcopy(
            self.module, {id(w): w.to(d, copy=True) for w in weights}) for d in devices[1:]]
        # All copies come first: a GPU would send the second part after it has done the first one.
        parts = [[x.to(d) for x in part] for d, part in zip(devices, parts)]
        outputs = [replica(*part) for replica, part in zip(replicas, parts)]
        return torch.cat([torch.atleast_1d(y).to(devices[0]) for y in outputs])


class DDP(nn.Module):
    """One process per rank. A step: loss.backward(); model.sync(); optimizer.step()
    sync() makes p.grad the mean over the ranks of `group` (None: all); None counts as 0, and stays
    None if no rank has a gradient. Every rank calls it, also one without data, and between backward
    and sync() uses the group for nothing else: full buckets are under way (overlap=False: sent in
    sync()). Freeze before wrapping, save .module. ValueError on all ranks: the models differ."""

    def __init__(self, module, group=None, bucket_mb=25, overlap=True):
        super().__init__()
        self.module, self.group, self.world_size = module, group, dist.get_world_size(group)
        self.overlap, self._accumulating = overlap, False
        self._ready, self._sent = set(), []     # until sync(): complete gradients; (buffer, work)s
        if not bucket_mb > 0 or self.world_size < 1:
            raise ValueError(f"bucket_mb={bucket_mb} must be above 0, and this rank in the group")
        if any(hasattr(p, "expert_parallel") and not hasattr(p, "replicas")
               for p in module.parameters()):
            raise ValueError("experts on several ranks (moe.py): set p.replicas of each, the group "
                             "of those that hold the same")
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        mine = [f"{bucket_mb=}"]
        mine += [f"{k} {tuple(t.shape)} {t.dtype} {t.requires_grad=} {hasattr(t, 'replicas')=}"
                 for k, t in tensors.items()]
        lists = [None] * self.world_size
        dist.all_gather_object(lists, mine, group=group)
        for rank, theirs in enumerate(lists):   # all ranks raise or none: none is left waiting
            if theirs != lists[0]:
                both = sorted(set(theirs) ^ set(lists[0]))[:2] or "their order"
                raise ValueError(f"ranks 0 and {rank} differ in {both}; build the same model")
        self.broadcast(tensors.values())
        # Reversed: about backward's order. Four buckets in a small model: one would leave last.
        params = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        params = params if self.world_size > 1 else []      # alone: no buckets, hooks or copies
        limit = min(bucket_mb * 2**20, max(2**20, sum(p.nbytes for p in params) / 4))
        position, buckets = 0, {}
        for p in params:
            kind = position // limit, p.dtype, p.device, self.group_of(p)
            buckets.setdefault(kind, []).append(p)
            position += p.nbytes
            p.register_post_accumulate_grad_hook(self._on_gradient)
        self.buckets = list(buckets.values())

    @torch.no_grad()
    def broadcast(self, tensors):
        """All ranks take the first rank's values; for BatchNorm: of .buffers(), before eval()."""
        for t in tensors:
            data = t.contiguous()               # a collective needs dense memory
            dist.broadcast(data, group=self.group_of(t), group_src=0)
            t.copy_(data)

    def group_of(self, t):
        """The ranks that hold the same: of an expert (moe.py) its attribute `replicas`."""
        return getattr(t, "replicas", self.group)

    def forward(self, *args, **kwargs):
        if self._ready:                         # else the ranks would drift apart silently
            raise RuntimeError("call model.sync() after backward, before optimizer.step()")
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        """Backward in here only adds to this rank's .grad; the next sync() averages the sum."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def _on_gradient(self, p):                  # autograd calls this when p.grad is complete
        if p in self._ready:
            raise RuntimeError("second backward before sync(): put all but the last in no_sync()")
        if self._accumulating:
            return
        self._ready.add(p)
        # Never skip a bucket: all ranks must send the same ones in the same order, used or not.
        while (self.overlap and len(self._sent) < len(self.buckets)
               and self._ready.issuperset(self.buckets[len(self._sent)])):
            self._send_next()

    @torch.no_grad()
    def _send_next(self):                       # one bucket: its gradients, then a flag for each
        bucket = self.buckets[len(self._sent)]
        # In a copy: a tensor of autograd's may be another parameter's too, or expanded from one.
        flat = bucket[0].new_empty(sum(p.numel() for p in bucket) + len(bucket))
        *parts, used = flat.split([p.numel() for p in bucket] + [len(bucket)])
        used.fill_(1)                           # not copied from a list: a GPU would be waited for
        group = self.group_of(bucket[0])
        for i, (p, part) in enumerate(zip(bucket, parts)):
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if p.grad is None:
                used[i] = 0
            # Divide once: fp16 might not hold the sum.
            torch.div(grad.reshape(-1), dist.get_world_size(group), out=part)
        self._sent.append((flat, dist.all_reduce(flat, group=group, async_op=True)))

    @torch.no_grad()
    def sync(self):
        """Wait for the averages: p.grad becomes a view of this step's own buffer."""
        while len(self._sent) < len(self.buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self.buckets, self._sent):
            work.wait()
            *grads, used = flat.split([p.numel() for p in bucket] + [len(bucket)])
            for p, grad, flag in zip(bucket, grads, used):
                if p.grad is not None or flag != 0:         # 0: no rank used p
                    p.grad = grad.view(p.shape)
        self._ready, self._sent = set(), []


def global_mean(loss_sum, count, group=None):
    """loss_sum * N / total count: averaged by DDP, its gradients are those of sum(loss) / total.
    count: this rank's rows (or tokens) in the whole step; all ranks call this, also with 0."""
    total = torch.tensor(count, device=loss_sum.device)
    dist.all_reduce(total, group=group)
    if total == 0:
        raise ValueError("count=0 on every rank; a step needs at least one row")
    return loss_sum * dist.get_world_size(group) / total


def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    if dist.get_rank() == 0 or not ok:
        print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def demo():
    rank, n = dist.get_rank(), dist.get_world_size()
    sizes = [(5, 2, 4)[r % 3] for r in range(n)]            # rows per rank, uneven on purpose
    x = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(0)).double()
    mine = x.split(sizes)[rank]

    def net(seed):                              # with a tied, a frozen and an unused parameter
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        net[2].weight, net.unused = net[0].weight, nn.Parameter(torch.zeros(3))
        net[2].bias.requires_grad_(False)
        return net

    whole, copies, model = net(0), DataParallel(net(0), ["cpu"] * 3), DDP(net(rank), bucket_mb=1e-4)
    sgd = torch.optim.SGD([p for m in (whole, copies, model) for p in m.parameters()], lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        whole(x).square().sum(1).mean().backward()          # dense reference: one process, all rows
        copies(x).square().sum(1).mean().backward()
        with model.no_sync():                   # two backwards, one synchronisation
            global_mean(model(mine[:1]).square().sum(), len(mine)).backward()
        global_mean(model(mine[1:]).square().sum(), len(mine)).backward()
        model.sync()
        sgd.step()
    for name, m in ("DataParallel in 3 parts", copies), ("DDP, unequal rows, no_sync", model):
        error = torch.stack([(p - q).abs().max() for p, q in
                             zip(m.parameters(), whole.parameters())]).max().item()
        check(error <= 1e-12, f"{name}: 3 SGD steps = one process", f"{error:.1e} (<= 1e-12)")
    here = nn.utils.parameters_to_vector(model.parameters()).detach()
    model.broadcast([first := here.clone()])
    check(torch.equal(here, first), "seeds differ, weights end bit-equal", f"{len(here)} weights")
    check(model.module.unused.grad is None, "a parameter no rank used keeps .grad None", "None")
    bench(rounds=8)


def bench(rounds):
    """Median ms of a step on one model, the ways in turn; then the figure of one backward."""
    cuda = 1 <= int(os.environ.get("LOCAL_WORLD_SIZE", 0)) <= torch.cuda.device_count()
    device, C, depth = ("cuda", 1024, 12) if cuda else ("cpu", 256, 4)
    model = lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(C, 4, 4 * C, dropout=0.0, batch_first=True), depth).to(device)
    nothing, each = lambda m: None, lambda m: [dist.all_reduce(p.grad) for p in m.parameters()]
    ways = {"torch DDP": (nn.parallel.DistributedDataParallel(model()), nothing),
            "this DDP": (DDP(model()), DDP.sync),
            "this DDP, overlap=False": (DDP(model(), overlap=False), DDP.sync),
            "a blocking all-reduce per gradient": (model(), each),
            "no averaging": (model(), nothing)}
    x, times = torch.randn(4, 16, C, device=device), {way: [] for way in ways}
    for way, (m, average) in list(ways.items()) * rounds:
        m.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        m(x).square().mean().backward()
        average(m)
        if cuda:
            torch.cuda.synchronize()            # gloo's barrier does not wait for the GPU
        dist.barrier()
        times[way].append((time.perf_counter() - start) * 1e3)
    for way in ways if dist.get_rank() == 0 else []:
        ms, base = (torch.tensor(times[k][3:]).median() for k in (way, "torch DDP"))
        print(f"{way:<36} {ms:8.1f} ms   {ms / base:.2f} x torch DDP")
    if not cuda:                                # there, completion cannot be seen from the host
        draw(ways["this DDP"][0], x)


def draw(model, x):
    """When, in one backward on rank 0, each gradient is complete and each bucket travels."""
    loss, begin, times, trips = model(x).square().mean(), time.perf_counter(), [0.0], []
    clock = lambda _: 1e3 * (time.perf_counter() - begin)

    def send():
        start = clock(model)
        DDP._send_next(model)
        trips.append((start, model._sent[-1][1].get_future().then(clock)))

    model._send_next = send
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: times.append(clock(p)))
    loss.backward()
    sent = sum(buffer.nbytes for buffer, _ in model._sent)
    model.sync()
    check(sent == sum(p.nbytes + 4 for bucket in model.buckets for p in bucket),
          f"{len(times) - 1} gradients, a flag each, in {len(trips)} all-reduces", f"{sent} bytes")
    if dist.get_rank() > 0 or not trips:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    ax = Figure(figsize=(8, 3.4), layout="constrained").subplots()
    ax.broken_barh([(a, b - a) for a, b in zip(times, times[1:])], (-0.4, 0.8), edgecolor="white")
    for i, (start, end) in enumerate(trips):
        ax.broken_barh([(start, end.wait() - start)], (i + 0.6, 0.8), color="C1")
    ax.set_yticks(range(len(trips) + 1), ["backward", *(f"bucket {i}" for i in range(len(trips)))])
    ax.set(xlabel="ms since backward began; white: one more gradient is complete",
           title="Buckets travel while backward goes on", ylim=(len(trips) + 0.6, -0.6))
    folder = pathlib.Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    ax.figure.savefig(folder / "ddp.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="data parallelism: demo, or step times in ms")
    parser.add_argument("--nproc", type=int, default=2, help="processes to start (default 2)")
    parser.add_argument("--bench", action="store_true", help="only step times, 40 rounds")
    args = parser.parse_args()
    launch(*((bench, args.nproc, 40) if args.bench else (demo, args.nproc)))
