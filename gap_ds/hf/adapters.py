"""Adapters of peft over a sparse base: low-rank updates that keep its zeros.

    model = get_peft_model(sparse, LoraConfig(...))
    mask_adapters(model)            # trains W + mask * BA in place of W + BA
    Trainer(model, ...).train()
    merged = merge(model)           # the base with W + mask * BA, exactly as sparse as before
    merged.model.save_pretrained("merged")

A pruned weight of the base is one that is exactly 0 beside others that are not. A base without zeros, one that is 0
everywhere, and embeddings are dense: their updates are merged whole. A copy that was trained whole in the place of a
module (modules_to_save) counts as its update. peft is not imported: its layers are used as they are given (tested with
peft 0.21).

Shapes: W and BA (out, in), or (in, out) in GPT-2's Conv1D.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger("gap_ds")

#: Values of `init_lora_weights` that write another matrix into the base, by how they begin.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Merged(NamedTuple):
    """A base with its adapters merged.

    Attributes:
        model: the model that the adapters were added to, without them.
        lost: Frobenius norm of what the zeros kept out of the update, relative to that of the whole update; all layers
            together. 0 for adapters that were masked in training.
        layers: the same of each layer, by name.
    """

    model: nn.Module
    lost: float
    layers: dict[str, float]


def mask_adapters(model: nn.Module) -> list[str]:
    """Let LoRA adapters train the masked product: a layer over a sparse weight computes W + mask * BA.

    Nothing is lost then when they are merged. Call it after the adapters were added or loaded, before training. The
    product is formed whole at every forward pass: memory for one more matrix of the size of W, and its gradient.

    Returns:
        The names of the layers that are masked now. Those over dense weights stay as they are.
    Raises:
        ValueError: there are no LoRA adapters, a layer has another variant of them (DoRA), is no linear layer, or its
            base is quantized or spread over ranks at this moment; a sparse module is trained whole (modules_to_save),
            or the adapters were initialized from the base (PiSSA), which has lost its zeros by that.

    """
    found = [(name, layer, kept(layer, name)) for name, layer in _adapted(model)]
    if copies := [name for name, *_ in _copies(model)]:
        raise ValueError(
            f"{copies[0]}: is sparse in the base and is trained whole (modules_to_save), so its zeros would be lost. "
            "List it in target_modules instead, or leave it frozen."
        )
    sparse = [(name, layer) for name, layer, mask in found if mask is not None]
    for name, layer in sparse:
        adapters = getattr(layer, "lora_A", None)
        # Those of AdaLoRA are no modules, and those of target_parameters have no forward pass of their own.
        is_lora = isinstance(adapters, nn.ModuleDict) and not hasattr(layer, "get_param")
        if not (adapters and is_lora and hasattr(layer, "lora_variant")):
            raise ValueError(
                f"{name}: has no LoRA adapter that can be masked. Use LoraConfig with target_modules, and peft 0.17 or "
                "later."
            )
        others = [layer.lora_variant[a] for a in adapters if a in layer.lora_variant]
        if other := [each for each in others if not isinstance(each, MaskedProduct)]:
            raise ValueError(
                f"{name}: its adapter is of the kind {type(other[0]).__name__}, which is no product that can be "
                "masked. Use plain LoRA (use_dora=False), or merge without masking the training."
            )
        if layer.get_base_layer().weight.dim() != 2:
            raise ValueError(
                f"{name}: is no linear layer, and only those can be masked. Set target_modules without it."
            )
    for _, layer in sparse:
        layer.lora_variant.update({adapter: MaskedProduct() for adapter in layer.lora_A})
    return [name for name, _ in sparse]


def merge(model: nn.Module) -> Merged:
    """Merge the active adapters of a peft model into its base, and keep the base's zeros.

    The update goes only where the mask keeps: W + mask * BA. The base stays exactly as sparse as it was; a warning says
    how much of the update that loses. Any kind of adapter that peft merges into a weight works.

    Raises:
        ValueError: there are no adapters, they are merged already or cannot be merged, or their base is quantized,
            spread over ranks, used twice (tied weights) or rewritten by their initialization (PiSSA). Nothing was
            changed.
    """
    unload = getattr(model, "unload", None)
    if not callable(unload):
        raise ValueError(
            f"{type(model).__name__}: is no model with adapters of peft. Pass what get_peft_model returned."
        )
    found = [(name, layer, kept(layer, name)) for name, layer in _adapted(model)]
    _check_mergeable(model, found)
    lost, whole = dict[str, float](), dict[str, float]()

    def keep_zeros(name: str, before: Tensor, weight: Tensor, mask: Tensor | None) -> None:
        update = (weight - before).float()
        whole[name] = float(update.norm())
        lost[name] = 0.0 if mask is None else float(update.masked_fill_(mask, 0.0).norm())
        if mask is not None:
            weight.masked_fill_(~mask, 0.0)

    for name, layer, mask in reversed(found):  # the layers inside of others first
        before = _base_weight(layer).data.clone()
        layer.merge()
        keep_zeros(name, before, _base_weight(layer).data, mask)
    for name, before, weight, mask in _copies(model):
        keep_zeros(name, before, weight, mask)
    of_all = _relative(math.hypot(*lost.values()), math.hypot(*whole.values()))
    if of_all:
        log.warning(
            f"merging the adapters into a sparse base loses {of_all:.1%} of the norm of their update, where the base "
            "is 0. Call gap_ds.hf.mask_adapters(model) before training, and nothing is lost."
        )
    base: nn.Module = unload()
    return Merged(base, of_all, {name: _relative(lost[name], whole[name]) for name in whole})


class MaskedProduct:
    """The variant of peft's LoRA layers whose product is 0 where the base weight is 0.

    Source of the product: "SparsePEFT" in Munoz et al., SQFT: Low-cost Model Adaptation in Low-precision Sparse
    Foundation Models, arXiv 2410.03750.
    """

    def supports_lora_conversion(self) -> bool:
        """False: the update has no low rank."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **_: Any) -> None:
        """Do nothing: A and B are initialized as without a mask."""

    @staticmethod
    def update(module: Any, adapter: str) -> Tensor:
        """Return mask * BA with its scaling, in the orientation of the base weight."""
        weight, product = module.get_base_layer().weight, module.get_delta_weight(adapter)
        if weight.shape != product.shape:
            raise ValueError(
                f"the base weight of an adapter has the shape {tuple(weight.shape)} in its forward pass, not "
                f"{tuple(product.shape)}: it is spread over ranks. Do not compile the model, or use ZeRO-2."
            )
        found: Tensor = product * (weight != 0)
        return found

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return the base layer's result and the masked update's."""
        update = cls.update(module, active_adapter)
        bias = module.lora_B[active_adapter].bias
        bias = None if bias is None else bias * module.scaling[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        return result + functional.linear(x, update.T if module.fan_in_fan_out else update, bias)

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight as a new tensor."""
        return orig_weight + cls.update(module, active_adapter).detach().to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data += cls.update(module, active_adapter).detach().to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the update."""
        without: Tensor = orig_weight.data - cls.update(module, active_adapter).detach().to(orig_weight.dtype)
        return without


def kept(layer: Any, name: str) -> Tensor | None:
    """Return the mask of a layer's base weight, True where it is kept; None if it is dense.

    Raises:
        ValueError: the weight is quantized, or not whole on this rank.
    """
    base, weight = layer.get_base_layer(), _base_weight(layer)
    if isinstance(base, nn.Embedding):
        return None
    if weight is None:
        raise ValueError(
            f"{name}: its base, of class {type(base).__name__}, has no weight to look at. Set target_modules to linear "
            "layers in a float dtype."
        )
    if hasattr(weight, "ds_id") or hasattr(weight, "to_local"):
        raise ValueError(
            f"{name}: its base weight is spread over ranks. Mask the adapters before the model is wrapped; to merge, "
            "save the adapter and load it on one process."
        )
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(f"{name}: its base weight is quantized. Load the base in a float dtype.")
    mask: Tensor = weight.detach() != 0
    return mask if 0 < int(mask.sum()) < mask.numel() else None


def _base_weight(layer: Any) -> Any:
    """Return the tensor that an adapter is merged into; None if it is not one tensor."""
    # Adapters of target_parameters name it, as that of all experts of a mixture.
    return layer.get_param() if hasattr(layer, "get_param") else getattr(layer.get_base_layer(), "weight", None)


def _copies(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the sparse weights of which a copy is trained whole (modules_to_save): name, base, copy and mask."""
    for name, wrapper in model.named_modules():
        if not hasattr(wrapper, "modules_to_save") or not hasattr(wrapper, "original_module"):
            continue
        for adapter in wrapper.active_adapters:
            for key, weight in wrapper.modules_to_save[adapter].named_parameters():
                base = wrapper.original_module.get_parameter(key).data
                mask = base != 0
                # A row without any weight is padding, as a table of words has it.
                is_sparse = mask.dim() > 1 and bool((mask.any(-1) & ~mask.all(-1)).any())
                owner = wrapper.original_module.get_submodule(key.rpartition(".")[0])
                if is_sparse and not isinstance(owner, nn.Embedding):
                    yield f"{name}.{key}", base, weight.data, mask


def _check_mergeable(model: nn.Module, found: Sequence[tuple[str, Any, Tensor | None]]) -> None:
    """Raise ValueError if a merge of any of these layers would fail, or change another one."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, layer, _ in found:
        if layer.merged:
            raise ValueError(f"{name}: is merged already. Call model.unmerge_adapter() first.")
        names = users.get(id(_base_weight(layer)), [])
        if len(names) > 1 and not hasattr(layer, "trainable_tokens_delta"):  # peft ties those itself
            raise ValueError(
                f"{name}: its base weight is that of {' and '.join(names)}, so merging would change each of them. Load "
                "the base with tie_word_embeddings=False, or leave it out of target_modules."
            )
        biases = getattr(layer, "lora_bias", None) or {}
        if any(biases.get(a) for a in layer.active_adapters) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ValueError(f"{name}: its adapter has a bias and its base has none. Set lora_bias=False.")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that peft has put around others, with their names.

    Raises:
        ValueError: there are none, or their initialization has changed the base.
    """
    for config in getattr(model, "peft_config", {}).values():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(_REWRITING):
            raise ValueError(
                f'init_lora_weights="{init}": writes another matrix into the base when adapters are added, and its '
                'zeros are lost by that. Set it to True, "gaussian" or "orthogonal".'
            )
    parts = ("get_base_layer", "merge", "merged", "active_adapters")
    found = [(name, layer) for name, layer in model.named_modules() if all(hasattr(layer, part) for part in parts)]
    if not found:
        raise ValueError(f"{type(model).__name__}: has no adapters of peft. Add them by get_peft_model first.")
    yield from found


def _relative(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
