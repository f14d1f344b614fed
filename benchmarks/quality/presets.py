"""Tasks and budgets of the tables, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Example:
    """A training script, and the figures that a table takes from its results."""

    script: str
    #: Arguments that change a result, in the order of the set-up line.
    matter: tuple[str, ...]
    #: Scores that a record takes from results.json, with their titles. The first one ranks.
    scores: Mapping[str, str]
    #: Other figures of a record: name -> path of keys in results.json.
    figures: Mapping[str, tuple[str, ...]]
    axis: str  # label of the plot's y axis
    entries: str  # a sentence on the prunable weights
    digits: int = 1  # of the scores in a table

    @property
    def score(self) -> str:
        """Name of the score that ranks."""
        return next(iter(self.scores))


TRANSLATION = Example(
    "examples/translation/train.py",
    matter=tuple(
        "preset vocab_size dropout source_lang target_lang train_split validation_split test_split limit max_length "
        "batch_tokens accumulation lr lr_schedule warmup_steps label_smoothing bf16 beams length_penalty".split()
    ),
    scores={"bleu": "BLEU", "bleu_uncased": "BLEU, uncased", "chrf": "chrF"},
    figures={"score_seconds": ("score_seconds",), "bleu_signature": ("signatures", "bleu")},
    axis="BLEU (0 to 100)",
    entries="Sparsity is that of the prunable matrices; embeddings stay dense.",
)

VISION = Example(
    "examples/vision/train.py",
    matter=tuple(
        "preset train_split validation_split test_split limit image_size crop_part smallest_crop jitter channels_last "
        "sync_batchnorm batch_size accumulation lr lr_schedule warmup_steps momentum weight_decay label_smoothing "
        "mixup ema statistics_batches bf16".split()
    ),
    scores={"top1": "top-1", "top5": "top-5"},
    figures={"score_seconds": ("score_seconds",), "inference_flops": ("inference_flops",)},
    axis="top-1 accuracy (%)",
    entries="Sparsity is that of the convolutions inside the blocks; with ERK the first convolution and the classifier "
    "are entries as well.",
)

LANGUAGE = Example(
    "examples/language/train.py",
    matter=tuple(
        "preset vocab_size dropout text_column train_split validation_split test_split limit context across_documents "
        "batch_size accumulation lr lr_schedule warmup_steps weight_decay label_smoothing bf16".split()
    ),
    scores={"perplexity": "perplexity", "bits_per_byte": "bits per byte"},
    figures={"score_seconds": ("score_seconds",), "tokens": ("tokens",)},
    axis="perplexity (lower is better)",
    entries="Sparsity is that of the prunable matrices; embeddings stay dense.",
    digits=2,
)

EXAMPLES = (TRANSLATION, VISION, LANGUAGE)


@dataclass(frozen=True)
class Preset:
    """One task, one budget, and the rows that are compared on it."""

    name: str
    about: str
    epochs: float
    #: Data sets, as folders of DATA; none: the shipped corpus. Several are joined for training; the last one has the
    #: validation and test rows.
    parts: tuple[str, ...]
    #: Names of rows.py. --rows runs others.
    rows: tuple[str, ...]
    #: Arguments of the example that differ from its defaults.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: Other test splits of these data sets.
    also_score: tuple[str, ...] = ()
    example: Example = TRANSLATION
    #: Additional settings of a row's GaP config on this task, by the row's name.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sparsities: tuple[float, ...] = (0.8, 0.9)
    seeds: tuple[int, ...] | None = None  # None: the seeds of each row
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = 1  # CPU threads of a run
    jobs: int = 1

    @property
    def dataset(self) -> str:
        """Name of the data set's folder."""
        return "+".join(self.parts) or "generated"


# On a machine of 2 cores, two at a time, a run takes 8 to 9 minutes, and the 109 of the table 8 hours.
CPU = Preset(
    "cpu",
    about="English to German on Multi30k (29,000 sentence pairs), preset tiny, 8 epochs; no dropout, because a model "
    "this small underfits",
    epochs=8,
    parts=("wmt16_multi30k",),
    arguments={"preset": "tiny", "test_split": "test_2016_flickr", "dropout": 0.0, "bf16": True},
    rows=(
        *("dense", "cyclic_3", "cyclic_3_dense_first", "static", "gradual", "rigl", "acdc", "one_shot"),
        *("dsd", "cyclic_2", "cyclic_3_random_order", "parallel_3"),
        *("granet", "cyclic_3_rising", "cyclic_2_rising_grown_kept", "cyclic_2_rising_gentle", "parallel_3_rising"),
        *("gradual_longer", "cyclic_2_rising_longer"),
        *("gradual_scaled", "granet_scaled", "cyclic_2_rising_scaled", "cyclic_2_rising_kept_scaled"),
        "cyclic_3_scaled",
    ),
    sparsities=(0.8, 0.9, 0.95),
    jobs=2,
)

# Three times the budget. Without dropout the validation loss is lowest before epoch 12 and then rises.
# A run takes about half an hour, two at a time on 2 cores.
CPU_LONG = replace(
    CPU,
    name="cpu_long",
    about="English to German on Multi30k (29,000 sentence pairs), preset tiny, 24 epochs instead of 8, and dropout, "
    "without which the model overfits",
    epochs=24,
    arguments={**CPU.arguments, "dropout": 0.2},
    rows=("gradual", "cyclic_3_dense_first", "cyclic_3_gradual_first", "dense", "cyclic_3_restart"),
    sparsities=(0.9,),
    seeds=(0,),
)

# Whether a comparison depends on the learning rate, which is 2e-3 in `cpu`.
CPU_LOW_LR, CPU_HIGH_LR = (
    replace(
        CPU,
        name=f"cpu_{name}_lr",
        about=f"the task and budget of `cpu` with a learning rate of {rate:g} instead of 0.002",
        arguments={**CPU.arguments, "lr": rate},
        rows=("cyclic_2_rising_scaled", "gradual", "dense", "gradual_scaled"),
        sparsities=(0.9,),
        seeds=(0,),
    )
    for name, rate in (("low", 1e-3), ("high", 4e-3))
)

# A run of tiny takes about a quarter of an hour on a core. The learning rate is the best of those tried in `cpu`.
TATOEBA = Preset(
    "tatoeba",
    about="English to German on Tatoeba, Multi30k and the news tests (217,658 sentence pairs), preset tiny, 3 epochs; "
    "loss and first score on Tatoeba's validation and test sets, which are of short everyday sentences",
    epochs=3,
    parts=("wmt16_multi30k", "wmt_newstest_en_de", "tatoeba_eng_deu"),
    arguments={**CPU.arguments, "test_split": "test", "lr": 4e-3},
    also_score=("test_newstest2014",),
    rows=("dense", "cyclic_2_rising_scaled", "gradual", "gradual_scaled", "granet"),
    sparsities=(0.9,),
    seeds=(0, 1),
    jobs=2,
)
TATOEBA_SMALL = replace(
    TATOEBA,
    name="tatoeba_small",
    about=TATOEBA.about.replace("tiny", "small"),
    arguments={**TATOEBA.arguments, "preset": "small"},
)

# Estimated, not measured, for one large GPU: about 2.9 M padded tokens an epoch are 240 steps of about 60 ms, bound by
# kernel launches. 8 epochs take 2 minutes alone and about 4 beside three other runs. With tokenizer, encoding and
# scoring a run takes 5 to 6 minutes, the 13 runs at 4 a time 20 to 25. Hence fewer rows than `cpu` and one seed.
GPU = Preset(
    "gpu",
    about="English to German on Tatoeba, Multi30k and the news tests (217,658 sentence pairs), preset base, 8 epochs; "
    "scored on newstest2014, and far below results of models trained on all of WMT14",
    epochs=8,
    parts=("tatoeba_eng_deu", "wmt16_multi30k", "wmt_newstest_en_de"),
    arguments={
        "preset": "base",
        "test_split": "test_newstest2014",
        "vocab_size": 16000,
        "batch_tokens": 12288,
        "lr": 1e-3,
        "warmup_steps": 400,
        "bf16": True,
    },
    rows=("dense", "cyclic_3", "static_continuous", "gradual", "rigl", "acdc", "one_shot"),
    seeds=(0,),
    device="cuda",
    threads=None,
    jobs=4,
)

# For `make bench-gpu`. Estimated: 75 steps an epoch, and 1 to 2 minutes for the three runs side by side.
GPU_SHORT = Preset(
    "gpu_short",
    about="a check of training on a GPU: preset base on the generated corpus, 4 epochs",
    epochs=4,
    parts=(),
    arguments={
        "preset": "base",
        "vocab_size": 2000,
        "batch_tokens": 4096,
        "lr": 5e-4,
        "warmup_steps": 60,
        "dropout": 0.0,
        "beams": 1,
        "bf16": True,
    },
    rows=("dense", "gradual", "cyclic_2_rising_scaled"),
    sparsities=(0.9,),
    seeds=(0,),
    device="cuda",
    threads=None,
    jobs=3,
)

SMOKE = Preset(
    "smoke",
    about="a check of the machinery on 60 generated sentences: its BLEU means nothing",
    epochs=8,
    parts=(),
    arguments={
        "preset": "tiny",
        "limit": 60,
        "vocab_size": 400,
        "batch_tokens": 256,
        "warmup_steps": 20,
        "beams": 1,
        "bf16": True,
    },
    rows=("dense", "cyclic_3", "gradual", "rigl"),
    sparsities=(0.8,),
    seeds=(0,),
)

# Under ERK all convolutions and the classifier are entries, as in the comparisons of RigL and the paper.
_ALL_LAYERS = {"include": ["embedder.embedder", "classifier"]}
_OF_ERK = (
    *("cyclic_2_rising_scaled_erk", "gradual_erk", "gradual_scaled_erk", "granet_erk", "rigl_erk", "one_shot_erk"),
    "cyclic_3_erk",
)

# A run takes 5 to 7 minutes on a core, and the 17 of a seed 100.
VISION_CPU = Preset(
    "vision_cpu",
    about="EuroSAT (21,600 satellite pictures of 32 pixels for training, 5,400 for the score, 10 classes), ResNet-20 "
    "for small images (0.27 M weights), 6 epochs",
    epochs=6,
    parts=("eurosat_rgb32",),
    example=VISION,
    arguments={
        "preset": "resnet20_small",
        "validation_split": "test",
        "image_size": 32,
        "crop_part": 1.0,
        "smallest_crop": 0.5,
        "channels_last": True,
        "batch_size": 128,
        "warmup_steps": 100,
        "weight_decay": 1e-4,
        "mixup": 0.0,
        "bf16": True,
    },
    rows=("dense", *_OF_ERK, "cyclic_3"),
    settings=dict.fromkeys(_OF_ERK, _ALL_LAYERS),
    seeds=(0, 1, 2),
)

# On a core with bf16 instructions a run takes 7 to 11 minutes, and the 21 of a seed 3 hours.
LANGUAGE_CPU = Preset(
    "language_cpu",
    about="English sentences of Tatoeba (100,000, each a document), a GPT-2 of 10.0 M weights (2.6 M of them the "
    "embedding), 1 epoch",
    epochs=1,
    parts=("tatoeba_eng_deu",),
    example=LANGUAGE,
    arguments={
        "preset": "gpt2_10m",
        "text_column": "translation.en",
        "limit": 100_000,
        "context": 128,
        "batch_size": 16,
        "warmup_steps": 50,
        "bf16": True,
    },
    rows=(
        *("dense", "dense_pretrained", "gradual", "granet", "gradual_scaled", "gradual_2of4"),
        *(
            f"{name}{kind}"
            for kind in ("", "_pretrained", "_taught", "_pretrained_taught")
            for name in ("cyclic_2_rising_scaled", "cyclic_2_rising_scaled_2of4")
        ),
    ),
    seeds=(0, 1),
    jobs=2,
)

_ALL = (CPU, CPU_LONG, CPU_LOW_LR, CPU_HIGH_LR, TATOEBA, TATOEBA_SMALL, GPU, GPU_SHORT, SMOKE, VISION_CPU, LANGUAGE_CPU)
PRESETS = {preset.name: preset for preset in _ALL}
