"""Train an image classifier sparse by grow-and-prune, export it, and report its accuracy.

    deepspeed examples/vision/train.py --gap-config configs/gap/resnet50_cyclic_90_erk.json \\
        --deepspeed_config configs/ds/zero1.json --dataset FOLDER --output-dir runs/resnet50

torchrun and plain python start it as well; without --deepspeed_config it trains with PyTorch alone. `main` is the
recipe, from top to bottom. Signals act as in the translation example: a checkpoint after the step, status 130 or 143.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import average
import classifier
import images
import numpy as np
import scoring
from common import arguments, distillation, run, runtime, sampling, sharding, training
from transformers import AutoImageProcessor
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from gap_ds import GaPConfig, GaPEngine, export
from gap_ds.method.schedule import Phase

log = logging.getLogger("vision")

#: Mean and deviation of ImageNet's pictures, per channel, of values in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class Arguments(arguments.RunArguments):
    """Train a sparse image classifier by grow-and-prune."""

    dataset: str | None = HfArg(default=None, help="folder, parquet file or hub name; default: drawn pictures")
    image_column: str = HfArg(default="image", help="of parquet files and hub datasets")
    label_column: str = HfArg(default="label", help="of parquet files and hub datasets")
    validation_split: str = HfArg(default="validation", help="split of the accuracy between epochs")
    test_split: str | None = HfArg(default=None, help="split to score; default: the validation split, as for ImageNet")
    skip_damaged: bool = HfArg(default=False, help="leave out pictures that cannot be decoded, and count them")

    preset: Literal["resnet50", "resnet18", "resnet50_small", "resnet18_small", "resnet20_small"] = HfArg(
        default="resnet50", help="fresh model; _small: for images of about 32 pixels"
    )
    sync_batchnorm: bool = HfArg(default=False, help="BatchNorm over the batch of all ranks instead of each one's")
    channels_last: bool = HfArg(
        default=False, help="memory format of the activations; faster convolutions on most GPUs"
    )

    image_size: int = HfArg(default=224, help="pixels of a side, in training and evaluation")
    crop_part: float = HfArg(default=0.875, help="part of the shorter side that evaluation keeps; 1 for small images")
    smallest_crop: float = HfArg(default=0.08, help="part of the area that a training crop has at least")
    jitter: float = HfArg(default=0.0, help="of brightness, contrast and saturation in training, as 0.4; 0: none")
    workers: int | None = HfArg(default=None, help="decoding processes of a rank; default: its cores less one, up to 8")

    batch_size: int = HfArg(default=256, help="pictures of an optimizer step, over all ranks and micro-batches")
    lr: float = HfArg(default=0.256, help="peak learning rate")
    lr_schedule: Literal["cosine", "step", "linear"] = HfArg(default="cosine", help="after the warm-up")
    momentum: float = HfArg(default=0.875, help="of SGD")
    weight_decay: float = HfArg(default=3.05e-5, help="of all weights but norms and biases")
    mixup: float = HfArg(default=0.2, help="alpha of the beta distribution of mixing weights; 0: no mixing")
    ema: float = HfArg(default=0.0, help="decay of a moving average of the weights to export, as 0.9999; 0: none")
    statistics_batches: int = HfArg(default=20, help="batches for BatchNorm's statistics; 0: keep the running ones")
    validate_every: int = HfArg(default=1, help="epochs between accuracies of the validation split; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.check_at_least(
            self,
            {"image_size": 1, "workers": 0, "batch_size": 1, "jitter": 0, "mixup": 0, "weight_decay": 0}
            | {"statistics_batches": 0, "validate_every": 0},
        )
        arguments.check_fraction(self, ["momentum", "ema"])
        for name in ("crop_part", "smallest_crop"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value}: must lie in (0, 1]. Set --{name.replace('_', '-')}.")
        if self.jitter >= 1:
            raise ValueError(f"jitter={self.jitter}: must lie in [0, 1). Set --jitter.")


# Arguments that a resumed run must keep. The engine compares plan and schedule itself.
FIXED = (
    *"model_name sync_batchnorm image_size smallest_crop jitter batch_size lr lr_schedule warmup_steps".split(),
    *"momentum weight_decay label_smoothing mixup ema statistics_batches validate_every seed bf16".split(),
    *distillation.ARGUMENTS,
)


def step(step: int, warmup: int, length: int) -> float:
    """Learning rate divided by 10 after 1/3, 2/3 and 8/9 of the steps: epochs 30, 60 and 80 of 90.

    >>> [step(s, 5, 90) for s in (29, 30, 60, 80)]
    [1.0, 0.1, 0.01, 0.001]
    """
    return float(round(0.1 ** sum(9 * step >= part * length for part in (3, 6, 8)), 3))


LR_SCHEDULES = {"cosine": run.cosine, "step": step, "linear": run.linear}


def main(args: Arguments) -> int:
    """Train, export and score; return the exit status."""
    gap = run.gap_config(args)
    check_average(args, gap)
    deepspeed = run.deepspeed_config(args, batch_flag="--batch-size")
    of_all_workers = (*FIXED, "preset", "dataset", "dataset_config", "train_split", "limit")
    args, worker = run.gap_worker(args, gap, of_all_workers, "examples/vision/train.py")
    device = runtime.start_processes(args.seed, args.threads, deepspeed=deepspeed is not None)
    folder, resumed = run.prepare_folder(args)

    # Data: pictures by number, and batches that are the same for any number of ranks.
    with runtime.first_rank_first():
        train, validation, test = load_splits(args)
    ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
    batches = sampling.Batches(len(train), args.batch_size, accumulation=args.accumulation, seed=args.seed, **ranks)

    # Model, optimizer and learning rate of the paper's code, and the engine around them.
    model, processor = build_model(args, train.classes)
    uses, dense = classifier.products(model, args.image_size)
    undecayed = {name for name, weight in model.named_parameters() if weight.dim() < 2}
    classifier.use_own_batch_norm(model, everywhere=args.sync_batchnorm)
    if deepspeed is None:
        default = "ddp" if runtime.world_size() > 1 else "none"
        model = sharding.wrap(model.to(device), args.backend or default, device)
    optimizer = torch.optim.SGD(run.groups(model, undecayed, args.weight_decay), lr=args.lr, momentum=args.momentum)
    shape = LR_SCHEDULES[args.lr_schedule]
    state = average.STATE if args.ema else None
    engine = run.build_engine(args, gap, worker, deepspeed, model, optimizer, batches.steps_per_epoch, shape, state)
    averages = average.MovingAverage(engine.optimizer, args.ema) if args.ema else None
    # Dropout must differ between ranks, and between the workers of parallel GaP.
    runtime.seed_everything(args.seed + 1 + runtime.rank() + (runtime.world_size() * worker.index if worker else 0))

    # Training, from the newest checkpoint if there is one.
    state = run.begin(args, FIXED, rows=len(train))
    if resumed:
        state = run.resume(engine, folder, state, args.seed)
    first_step, started = engine.applied_steps, time.perf_counter()
    taught = distillation.load(args, classifier.load_pretrained, device, deepspeed)
    task = Vision(args, device, processor, train, batches, validation, taught)
    pictures, stopped = training.train(args, engine, folder, state, task)
    if stopped:
        return training.say_stopped(engine, stopped)
    seconds = time.perf_counter() - started

    figures = run.figures(args, engine, seconds, first_step) | flops(engine, uses, dense)
    if worker is not None and worker.index > 0:  # worker 0 fine-tunes the merged model and scores it
        return run.end_worker(worker.index, engine, folder, figures)

    # The final sparse model, scored as exported; the ranks share the pictures.
    with averages.in_place_of_weights() if averages else nullcontext():
        engine.export(folder / "model", tokenizer=processor, overwrite=True)
    figures |= {"pictures_per_second": round(pictures / seconds, 1), "density_at_end": engine.stats()["density"]}
    del engine, optimizer, model, averages
    exported = classifier.load_pretrained(str(folder / "model"), trust_remote_code=args.trust_remote_code).to(device)
    if args.ema and args.statistics_batches:  # the exported statistics belong to the weights, not to their averages
        task.recompute_statistics(exported, lambda pixels: exported(pixel_values=pixels).logits, epoch=0)
        if runtime.rank() == 0:
            export.save_pretrained(exported, folder / "model")
    scored = time.perf_counter()
    scores = task.score(exported.eval(), test)
    if runtime.rank() == 0:
        results = {
            **scores,
            **json.loads((folder / "model" / "gap.json").read_text(encoding="utf-8")),
            **figures,
            "score_seconds": round(time.perf_counter() - scored, 1),
            "steps_per_epoch": batches.steps_per_epoch,
            "skipped": sorted(task.skipped),
            "device": str(device.type),
        }
        print(f"{results['signature']}\ntop-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %")
        print(folder / "results.json")
        run.write_results(folder, results)
    runtime.end_processes()
    return 0


class Vision:
    """Task of the training loop: label-smoothed cross entropy of mixed pictures, and the distances to a teacher."""

    unit = "pictures"

    def __init__(
        self,
        args: Arguments,
        device: torch.device,
        processor: Any,
        train: images.Source,
        batches: sampling.Batches,
        validation: images.Source | None,
        taught: distillation.Distillation | None = None,
    ) -> None:
        self._args, self._device, self._batches, self._taught = args, device, batches, taught
        self._train, self._validation = train, validation
        self.steps_per_epoch = batches.steps_per_epoch
        self._mean, self._deviation = (
            torch.tensor(values, device=device) for values in (processor.image_mean, processor.image_std)
        )
        self._autocast = torch.autocast(device.type, torch.bfloat16) if args.bf16 else nullcontext()
        self._workers = workers(device) if args.workers is None else args.workers
        self._evaluation = images.Evaluation(args.image_size, args.crop_part)
        self._loader = self._load(train, images.Training(args.image_size, args.smallest_crop, args.jitter))
        self._stream: Iterator[dict[str, Any]] | None = None
        self._skipped_unchanged: set[str] = set()

    @property
    def skipped(self) -> set[str]:
        """Messages of the pictures that this rank left out, with --skip-damaged."""
        return self._loader.skipped | self._skipped_unchanged

    def batches(self, epoch: int, start: int) -> Iterator[tuple[int, Sequence[dict[str, Any]]]]:
        """Yield steps with their pictures. The workers read ahead, also across epochs."""
        if self._stream is None:
            self._stream = self._loader(self._batches.micro_batches(epoch, start))
        alpha, ranks = self._args.mixup, runtime.world_size()
        for number in range(start, self.steps_per_epoch):
            micro_batches = list(itertools.islice(self._stream, self._args.accumulation))
            shares = np.ones(ranks * len(micro_batches))  # of the step's micro-batches, however the ranks share them
            if alpha:
                shares = np.random.default_rng((self._args.seed, 2, epoch, number)).beta(alpha, alpha, len(shares))
            for batch, share in zip(micro_batches, shares[runtime.rank() :: ranks], strict=True):
                batch["mix"] = float(share)
            yield self._args.batch_size, micro_batches

    def loss(self, engine: GaPEngine, batch: dict[str, Any], units: int, phase: Phase) -> torch.Tensor:
        """Return the mean cross entropy in nats. Picture i is mixed with the i-th from the end of its batch.

        Source of mixup: Zhang et al., arXiv 1710.09412.
        """
        share, labels = batch["mix"], batch["labels"].to(self._device)
        pixels = self._pixels(batch["pictures"])
        pixels = pixels if share == 1.0 else share * pixels + (1 - share) * pixels.flip(0)
        taught = self._taught if self._taught is not None and self._taught.in_phase(phase) else None
        options = taught.outputs if taught else {}
        found = self._output(engine, pixels, **options)
        logits = found.logits.float()
        smoothing = self._args.label_smoothing
        loss = share * functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        if share != 1.0:
            loss = loss + (1 - share) * functional.cross_entropy(logits, labels.flip(0), label_smoothing=smoothing)
        if taught:
            wanted = self._output(taught.teacher, pixels, **options)
            loss = taught.loss(loss, found, wanted, states={"hidden_states": None})
        return loss

    def after_step(self, engine: GaPEngine) -> None:
        """Average BatchNorm's statistics over the ranks."""
        classifier.average_statistics(engine.module)

    def validate(self, engine: GaPEngine, epoch: int) -> dict[str, float]:
        """Return the accuracy on the validation split; after a change of masks also with the running statistics."""
        due = self._args.validate_every and (engine.finished or (epoch + 1) % self._args.validate_every == 0)
        held_out, figures = self._validation if due else None, dict[str, float]()
        if self._args.statistics_batches and (held_out is not None or engine.finished):
            if held_out is not None and self._masks_changed(engine):
                figures["top1_running_statistics"] = self.score(engine, held_out)["top1"]
            self.recompute_statistics(engine.module, lambda pixels: self._forward(engine, pixels), epoch)
        return {} if held_out is None else {**self.score(engine, held_out), **figures}

    def _masks_changed(self, engine: GaPEngine) -> bool:
        """Return True if a mask changed within the last epoch. Follows from the schedule, also in a resumed run."""
        now = engine.applied_steps
        before, phase = max(0, now - self.steps_per_epoch), engine.phase
        return engine.schedule.phase_at(before) is not phase or any(before < at <= now for at in phase.updates)

    def score(self, model: Any, source: images.Source) -> dict[str, float]:
        """Return the figures of a model, or of the engine, on a split."""
        ranks = {"world_size": runtime.world_size(), "rank": runtime.rank()}
        keys = sampling.evaluation_batches(len(source), max(1, self._args.batch_size // ranks["world_size"]), **ranks)
        loader = self._load(source, self._evaluation)
        scores = scoring.score(lambda pictures: self._forward(model, self._pixels(pictures)), loader(keys))
        self._skipped_unchanged |= loader.skipped
        return scores

    def recompute_statistics(self, model: nn.Module, forward: scoring.Forward, epoch: int) -> None:
        """Recompute BatchNorm's statistics of a model from training pictures, resized as in evaluation.

        Objects are larger in the crops of training than in the whole pictures of evaluation.
        Source: Touvron et al., "Fixing the train-test resolution discrepancy", arXiv 1906.06423.
        """
        keys = itertools.islice(self._batches.micro_batches(epoch), self._args.statistics_batches)
        loader = self._load(self._train, self._evaluation)
        scoring.recompute_statistics(model, lambda pictures: forward(self._pixels(pictures)), loader(keys))
        self._skipped_unchanged |= loader.skipped

    def _load(self, source: images.Source, change: images.Training | images.Evaluation) -> images.Loader:
        return images.Loader(source, change, self._args.seed, self._workers, self._args.skip_damaged)

    def _pixels(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = images.normalise(pictures.to(self._device, non_blocking=True), self._mean, self._deviation)
        # Convolutions keep the format of their input. Weights stay contiguous: shards and masks flatten them.
        wanted = torch.channels_last if self._args.channels_last else torch.contiguous_format
        return pixels.contiguous(memory_format=wanted)

    def _forward(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K) in fp32."""
        return self._output(model, pixels).logits.float()

    def _output(self, model: Any, pixels: torch.Tensor, **options: Any) -> Any:
        """Return the output of a model, the engine or a teacher. Pixels take the dtype of the weights, as in bf16."""
        module = getattr(model, "module", model)
        with self._autocast:
            return model(pixel_values=pixels.to(next(module.parameters()).dtype), **options)


def check_average(args: Arguments, gap: GaPConfig) -> None:
    """Raise ValueError if the moving average would be lost."""
    if args.ema and gap.optimizer_state == "reset":
        raise ValueError(
            '--ema: lies in the optimizer\'s state, which optimizer_state="reset" clears. Remove one of the two.'
        )


def load_splits(args: Arguments) -> tuple[images.Source, images.Source | None, images.Source]:
    """Return training, validation (None if unused) and test pictures, with one list of classes."""

    def load(split: str) -> images.Source:
        return images.load(
            args.dataset,
            split,
            config=args.dataset_config,
            image_column=args.image_column,
            label_column=args.label_column,
            limit=args.limit,
        )

    train = load(args.train_split)
    validation = load(args.validation_split) if args.validate_every or not args.test_split else None
    test = load(args.test_split) if args.test_split else validation
    assert test is not None
    for source in (validation, test):
        if source is not None:
            same_classes(train, source)
    return train, validation, test


def same_classes(train: images.Source, other: images.Source) -> None:
    """Raise ValueError if another split has a class that the training split does not have."""
    if unknown := [name for name in other.classes if name not in train.classes]:
        raise ValueError(
            f"{other.name(0)}: its split has a class {unknown[0]!r} that the training split does not have "
            f"({len(train.classes)} classes). Set --dataset or the splits."
        )
    if other.classes != train.classes[: len(other.classes)]:
        raise ValueError(
            f"{other.name(0)}: its split lacks {sorted(set(train.classes) - set(other.classes))[0]!r} and numbers the "
            "classes differently. Complete it."
        )


def build_model(args: Arguments, classes: Sequence[str]) -> tuple[nn.Module, Any]:
    """Return the model and its image processor: size, crop, mean and deviation."""
    mean, deviation = IMAGENET
    if args.model_name:
        model = classifier.load_pretrained(args.model_name, classes, trust_remote_code=args.trust_remote_code)
        try:
            known = AutoImageProcessor.from_pretrained(args.model_name, trust_remote_code=args.trust_remote_code)
            mean, deviation = known.image_mean or mean, known.image_std or deviation
        except (OSError, ValueError, AttributeError) as error:
            log.info("%s: has no mean and deviation; using those of ImageNet (%s)", args.model_name, error)
    else:
        model = classifier.build(args.preset, classes)
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": args.image_size},
        crop_pct=args.crop_part,
        resample=2,  # bilinear
        image_mean=list(mean),
        image_std=list(deviation),
    )
    return model, processor


def flops(engine: GaPEngine, uses: dict[str, int], dense: int) -> dict[str, float]:
    """Return FLOPs relative to the dense network, of convolutions and linear layers at the run's image size.

    `inference_flops` is that of the final model. `training_flops` is that of the run, forward and backward alike. It
    replaces the engine's figure, which counts every weight once, although early stages use their weights more often.
    """
    plan = engine.plan
    keep, numel = [0] * plan.kappa, [0] * plan.kappa
    for entry in plan.entries:
        keep[entry.partition] += entry.keep * uses[entry.name]
        numel[entry.partition] += entry.numel * uses[entry.name]
    pruned_in_training = sum(numel) * (1 - engine.schedule.mean_density(keep, numel, engine.applied_steps))
    return {
        "inference_flops": 1 - (sum(numel) - sum(keep)) / dense,
        "training_flops": 1 - pruned_in_training / dense,
        "dense_inference_gflops": 2 * dense / 1e9,
    }


def workers(device: torch.device) -> int:
    """Return the number of decoding processes of a rank: its share of the cores less one, at most 8."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return max(0, min(8, len(os.sched_getaffinity(0)) // here - 1)) if device.type == "cuda" else 0


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Parse the command line. ValueError for a mistake in it."""
    return arguments.parse(Arguments, argv)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runtime.run(lambda: main(parse()))
