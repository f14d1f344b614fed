"""Presets: four sizes of the paper's Transformer, a pre-norm encoder-decoder.

They are sizes of transformers' M2M100: layer norms before the blocks, sinusoidal positions, and one embedding shared
by encoder, decoder and output. `big`, with a vocabulary of 33,712, is the Transformer-big of the GaP paper
(Ma et al., arXiv 2106.09857, section 4): 176.2 M weights in the q/k/v/out/fc1/fc2 matrices, 34.5 M in the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Joint vocabulary of the paper's translation models, in BPE units, rounded up to a multiple of 16.
VOCAB_SIZE = 33_712


@dataclass(frozen=True)
class Preset:
    """Size of an encoder-decoder: widths, attention heads, and layers on each side."""

    d_model: int
    ffn: int
    heads: int
    encoder_layers: int
    decoder_layers: int

    @property
    def prunable(self) -> int:
        """Weights in the q/k/v/out/fc1/fc2 matrices.

        >>> PRESETS["tiny"].prunable, PRESETS["big"].prunable
        (917504, 176160768)
        """
        attention, feed_forward = 4 * self.d_model**2, 2 * self.d_model * self.ffn
        return self.encoder_layers * (attention + feed_forward) + self.decoder_layers * (2 * attention + feed_forward)

    def m2m100(self) -> dict[str, int]:
        """The size as keyword arguments of `transformers.M2M100Config`."""
        return {
            "d_model": self.d_model,
            "encoder_layers": self.encoder_layers,
            "decoder_layers": self.decoder_layers,
            "encoder_ffn_dim": self.ffn,
            "decoder_ffn_dim": self.ffn,
            "encoder_attention_heads": self.heads,
            "decoder_attention_heads": self.heads,
        }


PRESETS: dict[str, Preset] = {
    "tiny": Preset(d_model=128, ffn=512, heads=4, encoder_layers=2, decoder_layers=2),
    "small": Preset(d_model=256, ffn=1024, heads=4, encoder_layers=3, decoder_layers=3),
    "base": Preset(d_model=512, ffn=2048, heads=8, encoder_layers=6, decoder_layers=6),
    "big": Preset(d_model=1024, ffn=4096, heads=16, encoder_layers=6, decoder_layers=6),
}
