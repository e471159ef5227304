r"""Checkpoints that survive: written beside, named when complete, checked before they are trusted.

    save   copy -> in a thread:      training goes on meanwhile
           out/step_0000200.tmp/     every rank writes its part; rank 0 notes the crc32 of each file
           rename: step_0000200/     one atomic system call: a checkpoint is complete or not there
           step_0000100/ ...         older ones go, but for the last `keep` and the best
    load   newest complete folder -> compare facts -> compare crc32 -> read into the given tensors
           a damaged one is renamed, and the one before it read

Without these parts: a kill while the only checkpoint is being overwritten loses the run; a flipped
bit in a weight loads as another weight; another model's checkpoint fails with a list of shapes, or
not at all; and an index that is a pickle runs any code its author likes. To resume bit for bit, a
run must save all that its next step depends on: weights and optimizer state. Data and dropout masks
should be functions of (seed, step); then the step is all they need.

Cost      bytes on disk = bytes of the tensors (fp32: 12 a parameter with AdamW) and a small index;
          while saving, keep + 2 checkpoints lie on the disk. Every file is read twice on load. A
          save stops the run for the copy (memory: the state once more), not for the disk
Paper     none; the format is torch.distributed.checkpoint's: one file per rank and an index, so
          that another number of ranks can read it
Run       python resume.py        kills 60 saves, damages 40 files, figures/resume.png; about 12 s
Left out  power failures (the rename is not forced to the disk), object stores (they have no atomic
          rename). torch.distributed.checkpoint.async_save has such a thread, too; ours also checks
          and renames in it
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import shutil
import tempfile
import time
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


class TensorsOnly(pickle.Unpickler):
    """Reads the index; refuses every name that an index of tensors does not need: no code runs."""

    NEEDED = {"Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
              "ChunkStorageMetadata", "MetadataIndex", "_StorageInfo", "StorageMeta", "Size",
              "PosixPath", "_get_layout"}

    def find_class(self, module, name):
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in self.NEEDED or module.split(".")[0] not in ("torch", "pathlib"):
            raise pickle.UnpicklingError(f"its index asks for {module}.{name}")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """torch's reader, but for the index; the tensors themselves torch reads with weights_only."""

    def read_metadata(self, *args, **kwargs):
        with open(pathlib.Path(self.path, ".metadata"), "rb") as file:
            metadata = TensorsOnly(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Damaged(ValueError):
    """A checkpoint that is not what was saved: the one before it may do."""


def saved(root):
    """The complete checkpoints under `root`, oldest first."""
    steps = {path: path.name.removeprefix("step_") for path in pathlib.Path(root).glob("step_*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda p: int(steps[p]))


def settings_of(folder):
    """The settings that save() was given. Damaged (a ValueError) if they cannot be read."""
    return _manifest(folder)["settings"]


def best(root):
    """The checkpoint that was saved with the lowest score, or None."""
    scores = []
    for folder in saved(root):
        with contextlib.suppress(Damaged):
            scores.append((_manifest(folder)["score"], folder))
    scores = [pair for pair in scores if pair[0] is not None and math.isfinite(pair[0])]
    return min(scores, default=(None, None))[1]


def save(root, step, tensors, facts, settings=None, keep=2, score=None, group=None):
    """Write root/step_<step>; every rank calls it.

    tensors: {name: tensor}, all the state there is. facts: {name: value}, what another run must
    share to read it. settings: for settings_of(), anything JSON holds. keep: how many of the newest
    remain, at least 1, beside the one of the lowest score. group: a process group of all ranks.
    OSError, on all ranks, if it cannot be written; what was there before remains."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least 1 checkpoint must remain")
    folder = pathlib.Path(root, f"step_{step:07d}")
    beside = folder.with_suffix(".tmp")

    def begin():
        for left_by_a_kill in pathlib.Path(root).glob("step_*.tmp"):
            shutil.rmtree(left_by_a_kill)
        if folder.exists():
            raise FileExistsError(f"{folder} exists: nothing is overwritten")
        beside.mkdir(parents=True)

    def finish():
        files = {path.name: _crc32(path) for path in sorted(beside.iterdir())}
        _write_manifest(beside, {"facts": facts, "settings": settings, "score": score,
                                 "crc32": files})
        os.replace(beside, folder)                              # atomic: from here on it exists
        for old in set(saved(root)[:-keep]) - {best(root)}:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # never half deleted and named

    _on_first_rank(begin, group)
    try:
        # Without copying ahead: that makes CUDA start, even for tensors on the CPU, and a thread
        # starts it on the first GPU, whichever is this rank's.
        writer = dcp.FileSystemWriter(beside, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=group,
                 no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as problem:         # of any rank, on all
        raise OSError(f"{beside}: {_last_line(problem)}") from problem
    _on_first_rank(finish, group)


class Saver:
    """save() in the background: the run goes on while a thread writes a copy of the tensors.

    All ranks make one and call it alike. The copy takes as much CPU memory as the state. timeout:
    a timedelta, how long a rank's thread waits for another's."""

    def __init__(self, root, keep=2, timeout=None):
        self.root, self.keep, self.pending = root, keep, None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        # Its own: collectives of two threads must not meet in one group.
        self.group = (dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized()
                      else None)

    def save(self, step, tensors, facts, settings=None, score=None):
        """As save(), but returns at once, unless the one before is still being written; OSError of
        that one."""
        self.wait()
        copies = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        self.pending = self.thread.submit(save, self.root, step, copies, facts, settings, self.keep,
                                          score, self.group)

    def wait(self):
        """Until all is written; OSError if it could not be."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def load_last(root, tensors, facts):
    """load() of the newest checkpoint, or, if that is damaged, of the newest that is not -> its
    step, its settings, and a text: what was wrong, "" if nothing. The damaged ones are renamed:
    damaged_step_... ValueError, and nothing is renamed, if none is left."""
    problems = {}
    for folder in reversed(saved(root)):
        try:
            step = load(folder, tensors, facts)
        except Damaged as problem:
            problems[folder] = str(problem)
            continue

        def rename():
            for damaged in problems:
                aside = damaged.with_name(f"damaged_{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)

        _on_first_rank(rename)
        return step, settings_of(folder), "; ".join(problems.values())
    raise ValueError("; ".join(problems.values()) or f"no checkpoint in {root}")


def load(folder, tensors, facts):
    """Read a checkpoint into `tensors`, in place -> its step. All ranks call it, however many.

    ValueError, before anything is changed, if its facts are not `facts`; Damaged, if a file is not
    what was saved. What else goes wrong says nothing about the checkpoint."""
    def check():
        manifest, here = _manifest(folder), json.loads(json.dumps(facts))       # lists for tuples
        for name in here | manifest["facts"]:
            was, now = manifest["facts"].get(name), here.get(name)
            if was != now:
                raise ValueError(f"{folder} was saved with {name} = {was}, this run has {now}: "
                                 f"give it the same, or start anew elsewhere")
        for name, crc32 in manifest["crc32"].items():
            path = pathlib.Path(folder, name)
            if not path.is_file() or _crc32(path) != crc32:
                raise Damaged(f"{path} is {'damaged' if path.is_file() else 'missing'}")
        try:
            SafeReader(folder).read_metadata()                  # refused here, before torch looks
        except Exception as problem:
            raise Damaged(f"{folder} cannot be read: {_last_line(problem)}") from problem

    _on_first_rank(check)
    try:
        dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as problem:
        raise ValueError(f"{folder} cannot be read: {_last_line(problem)}") from problem
    return int(pathlib.Path(folder).name.split("_")[1])


def _write_manifest(folder, content):
    whole = {"manifest": content, "crc32": zlib.crc32(json.dumps(content).encode())}
    pathlib.Path(folder, "manifest.json").write_text(json.dumps(whole, indent=1))


def _manifest(folder):
    try:
        whole = json.loads(pathlib.Path(folder, "manifest.json").read_text())
        content = whole["manifest"]
        if zlib.crc32(json.dumps(content).encode()) != whole["crc32"]:
            raise ValueError("it is damaged")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as problem:
        raise Damaged(f"{folder} has no readable manifest.json: {problem}") from problem
    return content


def _crc32(path):
    crc32 = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            crc32 = zlib.crc32(part, crc32)
    return f"{crc32:08x}"


def _last_line(problem):
    return (str(problem).strip() or repr(problem)).splitlines()[-1]


def _on_first_rank(work, group=None):
    """Rank 0 does it, the others wait. What it raises raises on all."""
    problem = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            work()
        except Exception as caught:
            problem = [caught]
    if dist.is_initialized():
        dist.broadcast_object_list(problem, group=group)
    if problem[0]:
        raise problem[0]


# ------------------------------------------------------------------ demo

def check(ok, claim, measured):
    """Print one claim with what was measured; stop with exit code 1 if it does not hold."""
    print(f"{'ok  ' if ok else 'FAIL'} {claim:<64} {measured}")
    if not ok:
        raise AssertionError(f"claim does not hold: {claim}: {measured}")


def state(step, size=300_000):
    """Stands for a run's tensors at a step: every number is the step."""
    return {"model.w": torch.full((size,), float(step)),
            "optimizer.w.momentum": torch.full((size,), -float(step))}


def kill_saves(root, kills):
    """Save again and again, each time in a process that is killed -> [(moment, 0 = old, 1 = new)].

    A moment is a fraction of the time that an undisturbed save takes, process start included."""
    context = multiprocessing.get_context("fork")               # each child is ready at once
    save(root, 0, state(0), {})
    began = time.perf_counter()
    child = context.Process(target=save, args=(root, 1, state(1), {}))
    child.start()
    child.join()
    usual = time.perf_counter() - began
    results, newest = [], 1
    for i in range(kills):
        step, moment = newest + 1, 1.5 * i / kills
        child = context.Process(target=save, args=(root, step, state(step), {}))
        child.start()
        time.sleep(moment * usual)
        child.kill()
        child.join()
        found = state(-1)
        got = load(saved(root)[-1], found, {})
        whole = all((t.abs() == got).all() for t in found.values())
        if got not in (newest, step) or not whole:
            raise AssertionError(f"killed at {moment:.2f}: found step {got} with {found}")
        results.append((moment, got - newest))
        newest = got
    return results


class Harm:
    """A pickle of this creates the file `path`: it stands for any code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def demo():
    random.seed(0)

    # dcp warns whenever there is only one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        results = kill_saves(root / "kills", 60)
        finished = sum(kind for _, kind in results)
        check(0 < finished < 60, "a save killed at any moment leaves the old or the new checkpoint",
              f"{len(results)} kills: {60 - finished} x old, {finished} x new, 0 x neither")

        torch.manual_seed(0)
        tensors = {"model.w": torch.randn(300, 200), "optimizer.w.step": torch.tensor(7.0)}
        save(root / "run", 7, tensors, {"dim": 200}, settings={"lr": 0.02})
        got = {name: torch.zeros_like(t) for name, t in tensors.items()}
        step = load(saved(root / "run")[-1], got, {"dim": 200})
        check(step == 7 and all(torch.equal(got[name], tensors[name]) for name in tensors),
              "what is loaded equals what was saved", "bit for bit")

        noticed, plain = 0, 0
        for _ in range(40):
            broken = root / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(root / "run" / "step_0000007", broken / "step_0000007")
            target = broken / "step_0000007" / "__0_0.distcp"
            data = bytearray(target.read_bytes())
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            target.write_bytes(data)
            noticed += refuses(broken, tensors, {"dim": 200})
            try:
                dcp.load(dict(got), checkpoint_id=target.parent, no_dist=True)
            except (Exception, dcp.api.CheckpointException):
                plain += 1
        check(noticed == 40, "one flipped bit is noticed",
              f"{noticed} of 40 (by torch.distributed.checkpoint alone: {plain})")
        for step, score in ((8, 1.5), (9, 2.0), (10, 1.7), (11, 1.8)):
            save(root / "run", step, tensors, {"dim": 200}, score=score)
        names = [int(path.name[5:]) for path in saved(root / "run")]
        check(names == [8, 10, 11], "the last two remain, and the one of the lowest loss",
              f"of steps 7 to 11: {names}")
        target = saved(root / "run")[-1] / "__0_0.distcp"
        target.write_bytes(target.read_bytes()[:1000])
        step, _, problem = load_last(root / "run", got, {"dim": 200})
        check(step == 10 and "damaged" in problem, "a truncated file: the one before is read",
              f"step {step}: {problem.split('/')[-1]}")

        large = state(1, 12_000_000)                            # 96 MB
        saver, times, there = Saver(root / "large"), {}, []
        for name, work in (("stall", lambda: saver.save(1, large, {})), ("rest", saver.wait)):
            began = time.perf_counter()
            work()
            times[name] = 1e3 * (time.perf_counter() - began)
            there.append(len(saved(root / "large")))
        check(there == [0, 1], "96 MB saved in the background: the run stops",
              f"{times['stall']:.0f} ms of {times['stall'] + times['rest']:.0f}")
        check(refuses(root / "run", got, {"dim": 256}), "another model's checkpoint is refused",
              "dim 200, not 256")

        trap = root / "run" / "step_0000010"
        harm = root / "harm"
        (trap / ".metadata").write_bytes(pickle.dumps(Harm(str(harm))))
        manifest = _manifest(trap)
        manifest["crc32"][".metadata"] = _crc32(trap / ".metadata")     # an attacker would, too
        _write_manifest(trap, manifest)
        refused = refuses(root / "run", got, {"dim": 200}) and not harm.exists()
        pickle.loads((trap / ".metadata").read_bytes())         # what torch's own reader does
        check(refused and harm.exists(), "code hidden in the index is refused",
              "not run (a plain pickle.load ran it)")

        print("\nbytes per parameter, fp32    weights   optimizer   on disk (1 M parameters)")
        w = torch.nn.Parameter(torch.randn(1000, 1000))
        w.grad = torch.randn_like(w)
        for name, optimizer in (("SGD", torch.optim.SGD([w])), ("AdamW", torch.optim.AdamW([w]))):
            optimizer.step()
            entries = {f"optimizer.{key}": t for key, t in optimizer.state[w].items()}
            save(root / name, 1, {"w": w.detach(), **entries}, {})
            size = sum(path.stat().st_size for path in saved(root / name)[0].iterdir()) / w.numel()
            held = sum(t.nbytes for t in entries.values()) / w.numel()
            print(f"{name:<28} {4:>7} {held:>11.0f} {size:>7.2f}")
    draw(results)


def refuses(root, tensors, facts):
    try:
        load(saved(root)[-1], {name: t.clone() for name, t in tensors.items()}, facts)
    except ValueError:
        return True
    return False


def draw(results):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("skipped: figure (pip install matplotlib)")
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for kind in (0, 1):
        moments = [100 * moment for moment, found in results if found == kind]
        axes.plot(moments, [kind] * len(moments), "C0o", markersize=5)
    axes.set(xlabel="moment of the kill (% of an undisturbed save)", ylim=(-0.5, 1.5),
             yticks=[0, 1], title="A save killed at any moment leaves a complete checkpoint")
    axes.set_yticklabels(["found: the old one", "found: the new one"])
    path = pathlib.Path(__file__).parent / "figures" / "resume.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    print(f"\nfigure {path.parent.name}/{path.name}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()     # no flags
    demo()
