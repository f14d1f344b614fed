"""A ResNet for small images: the first convolution is 3x3 with stride 1, and no pooling follows it.

Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2. Any `ResNetConfig`
defines the stages. An exported model contains this file: load it with `from_pretrained(..., trust_remote_code=True)`,
or import this module first.
"""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification


class SmallResNetConfig(ResNetConfig):
    """Stages of a ResNet for images of about 32 pixels."""

    model_type = "small_resnet"


class SmallResNetForImageClassification(ResNetForImageClassification):
    """Logits from pixel values (B, 3, H, W); the names of all weights are those of ResNetForImageClassification."""

    config_class = SmallResNetConfig

    def __init__(self, config: SmallResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
        self.post_init()


AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig)
AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification)
SmallResNetConfig.register_for_auto_class()
SmallResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
