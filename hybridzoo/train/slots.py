"""Slots of one process, until checkpoint.slots is there."""

from safetensors.torch import load_file, save_file


def _names(model):
    for _, p, names in model.local_names():
        if p.trained:
            yield from names.values()


def save_slots(directory, model, slots, read):
    """As checkpoint.slots.save_slots."""
    directory.mkdir()
    tensors = {f"{n}:{s}": read(n, s).clone().contiguous() for n in _names(model) for s in slots}
    save_file(tensors, directory / "model.safetensors")


def load_slots(directory, model, slots):
    """As checkpoint.slots.load_slots."""
    tensors = load_file(directory / "model.safetensors")
    for n in _names(model):
        yield n, {s: tensors[f"{n}:{s}"] for s in slots}
