"""Sharded checkpoints as torch writes them."""

import torch
from transformers import GenerationConfig

RANKS = 2


def write_distributed(model, folder):
    import torch.distributed.checkpoint as dcp

    optimizer = {f"state.{name}.exp_avg": torch.ones_like(p) for name, p in model.named_parameters()}
    content = {"app": {"model": model.state_dict(), "optimizers": optimizer}, "step": 3}
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(folder)


def write_ranks(model, folder, world=RANKS):
    """Each rank's file by itself, in a group that only claims to have the others."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir()
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (world,))
            state = {}
            for name, x in model.state_dict().items():
                parts = x.chunk(world)
                layout = [Shard(0)] if x.ndim > 1 else [Replicate()]
                part = parts[rank].clone() if x.ndim > 1 else x
                state[name] = DTensor.from_local(part, mesh, layout, run_check=False, shape=x.shape, stride=x.stride())
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    model.config.save_pretrained(folder / "huggingface")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder / "huggingface")
