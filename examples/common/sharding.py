"""Wrap a model in one of PyTorch's or fairscale's sharding libraries. DeepSpeed makes its engine itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gap_ds.method.entries import find_blocks
from gap_ds.method.plan import clean_name


def wrap(model: nn.Module, backend: str, device: torch.device) -> nn.Module:
    """Return the model inside a sharding library over all ranks, each repeated block a separate unit.

    Build the optimizer afterwards, from the wrapped model's parameters. The weights stay fp32.

    Raises:
        ValueError: the backend needs several processes or a GPU and there is none.
    """
    if backend == "none":
        return model
    if not dist.is_initialized():
        raise ValueError(f'backend="{backend}": needs processes. Start by torchrun, or set --backend none.')
    if backend == "ddp":
        # A recipe with changing buffers (BatchNorm) synchronises them itself, on every backend in the same way.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return {"fsdp1": _fsdp1, "fsdp2": _fsdp2, "fairscale": _fairscale}[backend](model, device)


def _blocks(model: nn.Module) -> list[nn.Module]:
    modules = {clean_name(name): module for name, module in model.named_modules()}
    names = find_blocks(modules, {clean_name(name): tuple(p.shape) for name, p in model.named_parameters()})
    return [modules[name] for name in names]


def _fsdp2(model: nn.Module, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _fsdp1(model: nn.Module, device: torch.device) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(block) for block in _blocks(model)})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def _fairscale(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise ValueError('backend="fairscale": fairscale uses CUDA streams and needs a GPU. Set another --backend.')
    from fairscale.nn import auto_wrap, enable_wrap
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    blocks = {type(block) for block in _blocks(model)}

    def is_block(module: nn.Module, recurse: bool, **_: Any) -> bool:
        return recurse or type(module) in blocks

    with enable_wrap(wrapper_cls=FullyShardedDataParallel, auto_wrap_policy=is_block):
        return FullyShardedDataParallel(auto_wrap(model))
