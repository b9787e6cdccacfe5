"""What the ranks of the parallel tests run: a stack of every kind, laid out over them somehow."""

import errno
import os
import signal
import socket
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from hybridzoo.checkpoint import io, load, open_source, save, spread, transfer
from hybridzoo.checkpoint.crew import Crew
from hybridzoo.checkpoint.layout import load_into
from hybridzoo.checkpoint.slots import load_slots, save_slots
from hybridzoo.checkpoint.transfer import OpenFile
from hybridzoo.checkpoint.writer import Writer
from hybridzoo.config import HybridConfig
from hybridzoo.errors import CheckpointError
from hybridzoo.layers.init import seeded
from hybridzoo.model import HybridLM
from hybridzoo.parallel import groups

LAYOUTS = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "dp2": {},
    "tp4": {"tp": 4},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-ep2": {"tp": 2, "ep": 2},
    "pp2-ep2": {"pp": 2, "ep": 2},
    "ep2-dp2": {"ep": 2},
}
WORLDS = {name: 4 if name.count("2") == 2 or "4" in name else 2 for name in LAYOUTS}

OPTIONS = {
    "d_model": 16,
    # not divisible: ranks hold different numbers of rows
    "vocab_size": 23,
    "pattern": "M W S E A F G E W F",
    "layers": {
        "M": {"kind": "mamba1", "d_inner": 24, "in_proj_bias": True},
        "S": {"kind": "mamba2", "d_state": 4, "head_dim": 4, "n_groups": 1},
        "G": {"kind": "mamba2", "d_state": 4, "head_dim": 4, "n_groups": 4},
        "A": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "qkv_bias": True},
        "F": {"kind": "mlp", "d_ff": 12, "bias": True},
        "E": {
            "kind": "moe",
            "d_ff": 8,
            "n_experts": 6,
            "top_k": 2,
            "shared_d_ff": 12,
            "correction_bias": True,
        },
        "W": {"shared": "tail"},
    },
    "shared": {"tail": {"kind": "mlp", "d_ff": 8}},
    "tie_embeddings": False,
}


def make_config(**change):
    return HybridConfig.from_dict(OPTIONS | change)


@torch.no_grad()
def make_model(dtype=torch.float32, **change):
    """One process's model in which no two elements are alike."""
    model = HybridLM(make_config(**change), dtype=dtype, init=False)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=seeded(3, name)))
    return model


@cache
def axes(layout):
    return groups.init(**LAYOUTS[layout])


def stage_of(parallel, config):
    n, pp = len(config.places), parallel.pp
    return range(n * pp.rank // pp.world, n * (pp.rank + 1) // pp.world)


def opened(layout, directory, **options):
    """This rank's part of a checkpoint."""
    parallel = axes(layout)
    stage = stage_of(parallel, open_source(directory).config)
    return load(directory, parallel=parallel, stage=stage, **options)


def parts_of(model, full):
    """Name in this rank's model -> what of the whole parameters, by name, belongs there."""
    found, tp, ep = {}, model.parallel.tp, model.parallel.ep
    for name, p, names in model.local_names():
        tensor = full[name]
        if p.experts:
            # experts in a row, the first ones on the first rank
            tensor = tensor.chunk(ep.world)[ep.rank]
        shards = p.cut.shard(next(iter(names)), tensor, tp.world, tp.rank)
        found |= {names[piece]: shard for piece, shard in shards.items()}
    return found


def loads_and_saves(_, layout, source, full, target, options):
    """Loads, compares with the parameters in full, and saves again."""
    model = opened(layout, source)
    wanted = parts_of(model, full)
    assert wanted.keys() == {n for n, _ in model.named_parameters()}
    for name, want in wanted.items():
        assert torch.equal(model.get_parameter(name), want), name
    save(model, target, **options)


def counts_reads(_, layout, source):
    """Bytes read for the parameters, and bytes of the parameters."""
    parallel, read = axes(layout), []
    opened_source = open_source(source)
    config = opened_source.config
    dtype = opened_source.main_dtype()
    stage = stage_of(parallel, config)
    model = HybridLM(config, parallel=parallel, stage=stage, dtype=dtype, init=False)

    def counted(own):
        def call(self, offset, memory):
            read.append(len(memory))
            own(self, offset, memory)

        return call

    # rows of small models are shorter than what is worth a read of its own
    with replaced(OpenFile, "read", counted), replaced(transfer, "_SHORT_RUN", lambda own: 0):
        load_into(model, opened_source)
    return sum(read), sum(p.nbytes for p in model.parameters())


def counts_writes(_, layout, source, target):
    """(offset, length) of every write."""
    model, written = opened(layout, source), []

    def counted(own):
        def pwrite(fd, data, at):
            written.append((os.readlink(f"/proc/self/fd/{fd}"), at, len(data)))
            return own(fd, data, at)

        return pwrite

    with replaced(os, "pwrite", counted):
        save(model, target)
    return written


@contextmanager
def replaced(owner, name, change):
    """Replaces a function, by what `change` makes of it, for a while."""
    own = getattr(owner, name)
    setattr(owner, name, change(own))
    try:
        yield
    finally:
        setattr(owner, name, own)


def save_that_fails(parallel, layout, source, target, rank, function):
    """What save says where a function of the system fails on one rank; the time it took."""
    model = opened(layout, source)

    def failing(own):
        def fail(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return fail if parallel.tp.rank == rank else own

    start = time.monotonic()
    with replaced(os, function, failing):
        try:
            save(model, target)
        except CheckpointError as error:
            return str(error), time.monotonic() - start
    return "", 0


def save_that_is_killed(parallel, layout, source, target, rank, function, count):
    """A rank dies at its count-th call of a function."""
    model = opened(layout, source)
    calls = 0

    def deadly(own):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == count and parallel.tp.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **options)

        return call

    with replaced(os, function, deadly):
        save(model, target, max_shard_bytes=9000)


def save_with_a_slow_rank(parallel, layout, source, target, rank):
    """The files as this rank sees them while it still writes, and right after its save."""
    model, before = opened(layout, source), []

    def slow(own):
        def put(self, piece):
            if parallel.tp.rank == rank and piece.name == "head.weight":
                time.sleep(0.7)
                before.extend(path.name for path in Path(target).iterdir())
            own(self, piece)

        return put

    with replaced(Writer, "put", slow):
        save(model, target)
    return before, contents(target)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def save_with_other_copies(parallel, layout, source, target, rank, name):
    """What save says where a rank's copy of a parameter has another last bit."""
    model = opened(layout, source)
    found = {n: local for n, _, names in model.local_names() for local in names.values()}
    if parallel.tp.rank == rank:
        with torch.no_grad():
            flat = model.get_parameter(found[name]).view(-1).view(torch.int32)
            flat[-1] ^= 1
    try:
        save(model, target)
    except CheckpointError as error:
        return str(error)
    return ""


def partitioned(model, axis):
    """As ZeRO-3 has it: each data-parallel rank holds a part; `weights` puts them together."""
    parts = {}
    for name, p in model.named_parameters():
        flat = torch.zeros(-(-p.numel() // axis.world) * axis.world, dtype=p.dtype)
        flat[: p.numel()] = p.detach().view(-1)
        parts[name] = flat.chunk(axis.world)[axis.rank].clone(), p.shape
        p.data = torch.empty(0, dtype=p.dtype)

    @contextmanager
    def weights(name):
        mine, shape = parts[name]
        whole = torch.empty(mine.numel() * axis.world, dtype=mine.dtype)
        dist.all_gather_into_tensor(whole, mine, group=axis.group)
        yield whole[: shape.numel()].view(shape)

    return weights


def saves_partitioned(parallel, layout, source, target, failing):
    """Saves under ZeRO-3; a rank's disk may be full."""
    model = opened(layout, source)
    weights = partitioned(model, model.parallel.dp)

    def full(own):
        def pwrite(*args):
            raise OSError(errno.ENOSPC, "full")

        return pwrite if parallel.tp.rank == failing else own

    with replaced(os, "pwrite", full):
        try:
            save(model, target, weights=weights)
        except CheckpointError as error:
            return str(error)
    return ""


def said(action):
    """The error's sentence, or nothing."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def save_in_layout(_, layout, source, target, name):
    model = opened(layout, source)
    return said(lambda: save(model, target, layout=name))


def shares_evenly(_, layout, source, target):
    """Bytes that this rank writes where no box is too small to be shared."""
    with replaced(spread, "_SHARE_BYTES", lambda own: 1):
        return sum(n for _, _, n in counts_writes(_, layout, source, target))


def saves_a_part(_, layout, source, target):
    """Both ranks of a pipeline are its first stage."""
    parallel = axes(layout)
    model = load(source, parallel=parallel, stage=range(5))
    return said(lambda: save(model, target))


def saves_another_dtype(parallel, layout, source, target):
    model = opened(layout, source)
    if parallel.tp.rank == 1:
        model.norm.double()
    return said(lambda: save(model, target))


def measures_memory(_, layout, source, target):
    """By how much a save makes this rank's memory grow at most, and the bytes it holds."""
    model = opened(layout, source)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    save(model, target)
    return status("VmHWM") - before, sum(p.nbytes for p in model.parameters())


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def slots_of(model):
    """A moment as a trainer has it: of the parameter's shape here, the same whatever the ranks."""

    def read(name, slot):
        scale = {"exp_avg": 0.5, "exp_avg_sq": -2.0}[slot]
        return model.get_parameter(name).detach().float() * scale

    return read


SLOTS = ("exp_avg", "exp_avg_sq")


def saves_slots(_, layout, source, target, failing=None):
    model = opened(layout, source)

    def full(own):
        def pwrite(*args):
            raise OSError(errno.ENOSPC, "full")

        return pwrite if dist.get_rank() == failing else own

    with replaced(os, "pwrite", full):
        return said(lambda: save_slots(target, model, SLOTS, slots_of(model)))


def loads_slots(_, layout, source, directory):
    """Compares with the model of this layout; how many there are, and bytes read."""
    model = opened(layout, source)
    read, names = slots_of(model), []
    for name, values in load_slots(directory, model, SLOTS):
        names.append(name)
        assert values.keys() == set(SLOTS)
        for slot, tensor in values.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, read(name, slot)), (name, slot)
    trained = [v for _, p, names in model.local_names() if p.trained for v in names.values()]
    assert names == trained
    return len(names)


def phase_that_fails(parallel, error):
    """What a phase says where rank 1 fails; after an interrupt, that and no waiting."""
    crew = Crew.of(parallel)
    try:
        with crew.phase():
            if parallel.tp.rank == 1:
                raise error
    except KeyboardInterrupt:
        with crew.phase():
            return "KeyboardInterrupt"
    except CheckpointError as found:
        return str(found)
    return ""


def saves_from_hosts(parallel, directory, hosts, nfs):
    """Whether each weights file was opened to write through, of ranks on so many hosts."""
    found = set()

    def noted(known):
        def opened(path, flags, *args):
            if str(path).endswith(".safetensors") and flags & os.O_WRONLY:
                found.add(flags & os.O_DSYNC == os.O_DSYNC)
            return known(path, flags, *args)

        return opened

    with (
        replaced(os, "open", noted),
        replaced(socket, "gethostname", lambda _: lambda: f"host-{dist.get_rank() % hosts}"),
        replaced(io, "is_on_nfs", lambda _: lambda directory: nfs),
    ):
        save(HybridLM(make_config(), parallel=parallel), directory)
    return found


def saves_elsewhere(parallel, directory):
    """Each rank to a directory of its own, as where hosts share no disk."""
    model = HybridLM(make_config(), parallel=parallel)
    return said(lambda: save(model, directory / str(parallel.tp.rank)))
