"""What autograd keeps, counted by the addresses of storages."""

import torch


def saved_bytes(model, run):
    """Return the bytes of distinct storages that `run()` keeps, those of the model excluded."""
    own = {item.untyped_storage().data_ptr() for item in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    # storages are held in `kept`, so no address is used twice
    return sum(storage.nbytes() for storage in kept.values())
