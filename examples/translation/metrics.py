"""BLEU and chrF of translations by sacreBLEU, and the zeros of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from torch import nn

METRICS = ("bleu", "bleu_uncased", "chrf")


@dataclass(frozen=True)
class Scores:
    """Corpus scores in percent, None for a metric that was not requested, with the signature of each."""

    bleu: float | None
    bleu_uncased: float | None
    chrf: float | None
    signatures: dict[str, str]
    sentences: int

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        names = {"bleu": "BLEU", "bleu_uncased": "BLEU uncased", "chrf": "chrF"}
        return "\n".join(f"{names[m]:12} {getattr(self, m):6.2f}  {how}" for m, how in self.signatures.items())


class Scorer:
    """Scores any number of systems against the same references, which are tokenised and counted once.

    Args:
        references: one text per sentence, or a list of such lists, one for each set of references. None stands for a
            missing reference.
        metrics: some of METRICS. chrF takes most of the time.
    """

    def __init__(self, references: Sequence[Any], metrics: Sequence[str] = METRICS) -> None:
        sets = [references] if len(references) == 0 or isinstance(references[0], str) else references
        self.sentences = len(sets[0])
        if self.sentences == 0 or any(len(texts) != self.sentences for texts in sets):
            raise ValueError(
                f"references of {', '.join(str(len(texts)) for texts in sets)} lines: must be equally many,"
                " and at least one, in every set. Set --references."
            )
        unknown = sorted(set(metrics) - set(METRICS))
        if unknown or not metrics:
            raise ValueError(f"metrics={list(metrics)}: must be of {', '.join(METRICS)}. Set --metrics.")
        make: dict[str, Callable[[], BLEU | CHRF]] = {
            "bleu": lambda: BLEU(references=sets),
            "bleu_uncased": lambda: BLEU(references=sets, lowercase=True),
            "chrf": lambda: CHRF(references=sets),
        }
        self.metrics = {name: make[name]() for name in METRICS if name in metrics}

    def __call__(self, hypotheses: Sequence[str]) -> Scores:
        if len(hypotheses) != self.sentences:
            raise ValueError(
                f"hypotheses of {len(hypotheses)} lines: must be {self.sentences}, as the references have."
                " Set --hypotheses or --references."
            )
        values: dict[str, float] = {}
        signatures: dict[str, str] = {}
        for name, metric in self.metrics.items():
            result = metric.corpus_score(hypotheses, None)
            values[name] = result.score
            signatures[name] = f"{result.name}|{metric.get_signature()}"  # complete only after scoring
        return Scores(
            bleu=values.get("bleu"),
            bleu_uncased=values.get("bleu_uncased"),
            chrf=values.get("chrf"),
            signatures=signatures,
            sentences=self.sentences,
        )


def score(hypotheses: Sequence[str], references: Sequence[Any], metrics: Sequence[str] = METRICS) -> Scores:
    """Score one system. Arguments as in `Scorer`.

    >>> round(score(["ein Hund schläft hier"], ["Ein Hund schläft hier"]).bleu_uncased, 2)
    100.0
    """
    return Scorer(references, metrics)(hypotheses)


def count_zeros(model: nn.Module) -> dict[str, dict[str, float]]:
    """Count weights that are exactly zero, in the entries (matrices inside the repeated blocks) and in the whole model.

    A tied weight counts once. Embeddings, norms and biases are not entries.
    """
    names = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if any(part.isdigit() for part in prefix.split(".")) and not isinstance(module, nn.Embedding)
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() >= 2
    }
    counts = {}
    for group, wanted in (("entries", names), ("model", None)):
        weights = [weight for name, weight in model.named_parameters() if wanted is None or name in wanted]
        numel = sum(weight.numel() for weight in weights)
        zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
        counts[group] = {"zeros": zeros, "numel": numel, "sparsity": zeros / numel if numel else 0.0}
    return counts
