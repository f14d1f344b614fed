"""Image classifiers: ResNets built from transformers, BatchNorm for sharded training, and a count of products.

Shapes: B pictures, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import small_resnet
import torch
import torch.distributed as dist
from common import pretrained
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, PreTrainedModel, ResNetConfig, ResNetForImageClassification

_BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
_BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}

#: Settings of ResNetConfig. Version 1.5: the stride of a bottleneck is in its 3x3 convolution (ResNetConfig's default).
#: `_small`: for images of about 32 pixels. resnet20_small follows He et al., section 4.2, with 0.27 M weights.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "resnet50": {**_BOTTLENECK, "depths": [3, 4, 6, 3]},
    "resnet18": {**_BASIC, "depths": [2, 2, 2, 2]},
    "resnet50_small": {**_BOTTLENECK, "depths": [3, 4, 6, 3]},
    "resnet18_small": {**_BASIC, "depths": [2, 2, 2, 2]},
    "resnet20_small": {
        "layer_type": "basic",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [3, 3, 3],
    },
}


def build(preset: str, classes: Sequence[str]) -> PreTrainedModel:
    """Return a freshly initialised model of a preset (from torch's global random state), in training mode."""
    settings = {**PRESETS[preset], **_labels(classes)}
    if preset.endswith("_small"):
        return small_resnet.SmallResNetForImageClassification(small_resnet.SmallResNetConfig(**settings))
    return ResNetForImageClassification(ResNetConfig(**settings))


def load_pretrained(name: str, classes: Sequence[str] | None = None, **options: Any) -> Any:
    """Load a pretrained image classifier; with `classes`, give it a fresh head for them.

    Other arguments and errors as in `pretrained.load`.
    """
    if classes is not None:
        options |= {**_labels(classes), "ignore_mismatched_sizes": True}
    return pretrained.load(AutoModelForImageClassification, "an image classifier", name, **options)


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    return {"num_labels": len(classes), **names}


# --- BatchNorm --------------------------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that computes in the dtype of its running statistics, over one rank or over all.

    DeepSpeed makes weights bf16 and leaves the running statistics fp32, a mix that torch's kernels refuse. A bf16
    running mean would stop moving.

    Attributes:
        everywhere: compute the statistics of a batch over all ranks, like torch's SyncBatchNorm, which has no kernel
            for CPUs. Ranks may have unequal numbers of pictures, as with --skip-damaged.
    """

    everywhere = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W). The result has the dtype of x."""
        dtype = self.running_mean.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if self.training:
            self.num_batches_tracked.add_(1)
        if not (self.training and self.everywhere):
            return functional.batch_norm(
                x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
            )
        values = x.to(dtype)
        own = values.new_tensor([values.numel() // values.shape[1]])
        total = _sum(torch.cat([values.sum((0, 2, 3)), own]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = values - mean.view(1, -1, 1, 1)
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Sum over all ranks: of the values, and of the gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum(values: Tensor) -> Tensor:
    return _SumOverRanks.apply(values)  # type: ignore[no-any-return,no-untyped-call]


def use_own_batch_norm(model: nn.Module, everywhere: bool) -> None:
    """Replace torch's BatchNorm2d by `BatchNorm`, with the same weights and names."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                own = BatchNorm(child.num_features, child.eps, child.momentum)
                own.load_state_dict(child.state_dict())
                own.everywhere = everywhere and dist.is_initialized() and dist.get_world_size() > 1
                setattr(module, name, own)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the norms with running statistics."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def average_statistics(model: nn.Module) -> None:
    """Replace the running statistics by their mean over the ranks. Figures and exports then agree on all ranks."""
    statistics = [b for norm in batch_norms(model) for b in (norm.running_mean, norm.running_var) if b is not None]
    if not statistics or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(mean)


# --- products ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def products(model: nn.Module, size: int) -> tuple[dict[str, int], int]:
    """Return (uses of each weight, products of the model) for one picture of (size, size).

    Uses are by name of the weight tensor: output positions of a convolution; tokens, or 1, of a linear layer. Attention
    scores are not counted.
    """
    uses: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            channels = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features

            def count(_: nn.Module, __: Any, out: Tensor, name: str = name, channels: int = channels) -> None:
                uses[f"{name}.weight"] = uses.get(f"{name}.weight", 0) + out.numel() // channels

            hooks.append(module.register_forward_hook(count))
    training, parameter = model.training, next(model.parameters())
    model.eval()(torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return uses, sum(model.get_parameter(name).numel() * times for name, times in uses.items())
