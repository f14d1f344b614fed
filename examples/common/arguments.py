"""Command-line arguments shared by the examples: backend, folders, checkpoints, processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar, get_args

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from gap_ds.method.phases import Kind

Parsed = TypeVar("Parsed")


@dataclass
class RunArguments:
    """Arguments of every example. An example adds those of its data and models, each with a default."""

    gap_config: str = HfArg(help="GaP config, JSON or YAML (configs/gap)")
    output_dir: str = HfArg(help="folder of the run: checkpoints, metrics, results, the exported model")
    deepspeed_config: str | None = HfArg(default=None, help="DeepSpeed config (configs/ds); default: PyTorch alone")
    backend: Literal["deepspeed", "fsdp2", "fsdp1", "fairscale", "ddp", "none"] | None = HfArg(
        default=None, help="sharding library; default: deepspeed with its config, else ddp, or none on one process"
    )
    dense: bool = HfArg(default=False, help="train the same model as long, without sparsity")
    gap_worker: int | None = HfArg(default=None, help="number of this worker of parallel GaP (gap-ds parallel sets it)")
    exchange: str | None = HfArg(default=None, help="exchange folder or URL of parallel GaP; default: in --output-dir")
    exchange_timeout: float = HfArg(default=7200.0, help="seconds to wait for the other workers at the end of a round")

    dataset_config: str | None = HfArg(default=None, help="configuration of a hub dataset")
    train_split: str = HfArg(default="train", help="split to train on")
    limit: int | None = HfArg(default=None, help="use the first N rows of every split only")
    model_name: str | None = HfArg(default=None, help="pretrained model to make sparse instead: folder or hub name")
    trust_remote_code: bool = HfArg(default=False, help="run code that comes with the pretrained model")

    accumulation: int = HfArg(default=1, help="micro-batches of a rank in an optimizer step")
    lr: float = HfArg(default=2e-3, help="peak learning rate")
    warmup_steps: int = HfArg(default=200, help="linear warm-up, in optimizer steps")
    label_smoothing: float = HfArg(default=0.1, help="of the training loss")
    gradient_clipping: float = HfArg(default=0.0, help="norm to clip gradients at, 0: off; of DeepSpeed in its config")
    seed: int = HfArg(default=0, help="of weights, batches and dropout; the GaP config has a separate seed for masks")
    bf16: bool = HfArg(default=False, help="autocast to bf16; with DeepSpeed its config decides")

    teacher: str | None = HfArg(default=None, help="exported dense model to learn from; same sizes as this one")
    teacher_phases: list[str] = field(
        default_factory=lambda: ["finetune"], metadata={"help": "phases with the teacher: dense, explore, finetune"}
    )
    distillation: float = HfArg(default=0.5, help="weight of the teacher's logits in the loss, in place of the labels")
    temperature: float = HfArg(default=1.0, help="of the logits of teacher and student in their distance")
    hidden_distillation: float = HfArg(default=0.0, help="weight of the distance of hidden states; 0: none")

    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --output-dir, if there is one")
    overwrite: bool = HfArg(default=False, help="delete the run in --output-dir first")
    save_every: int | None = HfArg(default=None, help="optimizer steps between checkpoints; default: an epoch")
    keep_checkpoints: int = HfArg(default=2, help="checkpoints to keep in the folder; --resume skips a damaged one")
    portable: bool = HfArg(default=False, help="let --resume continue with another number of ranks or another backend")
    log_every: int = HfArg(default=50, help="optimizer steps between lines of metrics.jsonl")
    tensorboard: bool = HfArg(default=False, help="also write TensorBoard files")
    threads: int | None = HfArg(default=None, help="CPU threads of each process")
    local_rank: int = field(default=-1, metadata={"help": "set by launchers, ignored: LOCAL_RANK is read instead"})

    def __post_init__(self) -> None:
        check_at_least(
            self,
            {"gap_worker": 0, "exchange_timeout": 0, "limit": 1, "accumulation": 1, "threads": 1}
            | {"keep_checkpoints": 1, "save_every": 1, "log_every": 1, "warmup_steps": 0, "seed": 0}
            | {"hidden_distillation": 0, "gradient_clipping": 0},
        )
        check_fraction(self, ["label_smoothing", "distillation"])
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be above 0. Set --temperature.")
        if unknown := sorted(set(self.teacher_phases) - set(get_args(Kind))):
            raise ValueError(
                f"teacher_phases={unknown[0]!r}: must be of {', '.join(get_args(Kind))}. Set --teacher-phases."
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: must be above 0. Set --lr.")
        if self.resume and self.overwrite:
            raise ValueError(
                "--resume and --overwrite: the first continues the run in --output-dir, the second deletes it. Set one."
            )
        if (self.backend == "deepspeed") > (self.deepspeed_config is not None):
            raise ValueError('backend="deepspeed": needs a config. Set --deepspeed_config (configs/ds).')
        if self.deepspeed_config and self.backend not in (None, "deepspeed"):
            raise ValueError(f'--deepspeed_config: has no effect with backend="{self.backend}". Remove one of the two.')
        for name in ("bf16", "gradient_clipping"):
            if getattr(self, name) and self.deepspeed_config:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f'{flag}: has no effect with --deepspeed_config. Set "{name}" in that file instead.')


def check_at_least(args: Any, lowest: Mapping[str, float]) -> None:
    """Raise ValueError for an argument below its lowest value. None is accepted."""
    for name, bound in lowest.items():
        if (value := getattr(args, name)) is not None and not value >= bound:
            raise ValueError(f"{name}={value}: must be at least {bound}. Set --{name.replace('_', '-')}.")


def check_fraction(args: Any, names: Iterable[str]) -> None:
    """Raise ValueError for an argument outside [0, 1)."""
    for name in names:
        if not 0 <= (value := getattr(args, name)) < 1:
            raise ValueError(f"{name}={value}: must lie in [0, 1). Set --{name.replace('_', '-')}.")


def parse(kind: type[Parsed], argv: Sequence[str] | None = None) -> Parsed:
    """Parse the command line. ValueError for a mistake in it."""
    parsed: tuple[Parsed, ...] = Parser(kind).parse_args_into_dataclasses(args=argv)
    return parsed[0]


class Parser(HfArgumentParser):
    """Raises ValueError with one line for a mistake, instead of printing all options on every rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help lists all arguments.")
