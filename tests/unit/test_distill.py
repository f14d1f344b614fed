"""Distances to a teacher against loops over positions; padding, dtypes, gradients and mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gap_ds import distill

KEPT = torch.tensor([[True, True, False], [True, False, False]])


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values of a student, which have a gradient, and of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def softmax(row: Tensor, temperature: float) -> list[float]:
    """Softmax in double precision, by plain arithmetic."""
    powers = [math.exp(x / temperature) for x in row.double().tolist()]
    return [power / sum(powers) for power in powers]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 times sum p log (p / q) of two rows of logits."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", (1.0, 2.0, 0.5))
def test_logits(temperature: float) -> None:
    student, teacher = pair(2, 3, 5)
    found = distill.logit_distance(student, teacher, KEPT, temperature=temperature, denominator=7)
    positions = KEPT.nonzero().tolist()
    rows = [(student[b, t].detach(), teacher[b, t]) for b, t in positions]
    assert found.item() == pytest.approx(sum(divergence(s, t, temperature) for s, t in rows) / 7, rel=1e-5)
    found.backward()
    for (b, t), (s, wanted) in zip(positions, rows, strict=True):  # T (q - p) / 7
        slope = [q - p for q, p in zip(softmax(s, temperature), softmax(wanted, temperature), strict=True)]
        assert student.grad is not None
        assert student.grad[b, t].tolist() == pytest.approx([temperature * x / 7 for x in slope], abs=1e-6)
    assert student.grad is not None and not student.grad[~KEPT].any()


def test_logits_of_pictures_are_averaged_over_the_batch() -> None:
    student, teacher = pair(4, 5)
    rows = [divergence(student[i].detach(), teacher[i], 1.0) for i in range(4)]
    assert distill.logit_distance(student, teacher).item() == pytest.approx(sum(rows) / 4, rel=1e-5)


def test_hidden_states() -> None:
    layers = [pair(2, 3, 4, seed=seed) for seed in (1, 2)]
    found = distill.hidden_distance([s for s, _ in layers], [t for _, t in layers], KEPT)
    expected = 0.0
    for s, t in layers:
        values = [(s[b, i].tolist(), t[b, i].tolist()) for b, i in KEPT.nonzero().tolist()]
        apart = sum((x - y) ** 2 for row, target in values for x, y in zip(row, target, strict=True))
        expected += apart / sum(y**2 for _, target in values for y in target)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    for s, _ in layers:
        assert s.grad is not None and s.grad[KEPT].all() and not s.grad[~KEPT].any()


def test_hidden_states_of_pictures_keep_their_channels() -> None:
    student, teacher = pair(2, 3, 4, 4)
    expected = (student - teacher).square().mean() / teacher.square().mean()
    assert distill.hidden_distance([student], [teacher]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_size_of_a_layer_does_not_matter_and_a_teacher_of_zeros_adds_nothing() -> None:
    student, teacher = pair(2, 3, 4)
    alone = distill.hidden_distance([student], [teacher])
    assert distill.hidden_distance([1000 * student], [1000 * teacher]).item() == pytest.approx(alone.item(), rel=1e-5)
    with_zeros = distill.hidden_distance([student, student], [teacher, torch.zeros_like(teacher)])
    assert with_zeros.item() == alone.item()
    with_zeros.backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("nothing", (math.nan, math.inf, -1e30))
def test_padding_is_ignored(nothing: float) -> None:
    """Also in the gradient, and whatever lies there."""

    def both(student: Tensor, teacher: Tensor) -> Tensor:
        logits = distill.logit_distance(student, teacher, KEPT, temperature=2.0)
        return logits + distill.hidden_distance([student], [teacher], KEPT)

    clean, teacher = pair(2, 3, 4)
    both(clean, teacher).backward()
    dirty = clean.detach().masked_fill(~KEPT[..., None], nothing).requires_grad_()
    found = both(dirty, teacher.masked_fill(~KEPT[..., None], nothing))
    assert found.item() == both(clean, teacher).item()
    found.backward()
    assert clean.grad is not None and dirty.grad is not None and torch.equal(clean.grad, dirty.grad)


def test_tokens_that_are_ruled_out_add_nothing() -> None:
    student, teacher = pair(2, 3, 5)
    out = torch.tensor([False, False, True, False, True])
    for ruled in (teacher.masked_fill(out, -torch.inf), student.detach().masked_fill(out, -torch.inf)):
        loss = distill.logit_distance(student.masked_fill(out, -torch.inf), ruled)
        wanted = distill.logit_distance(student[..., ~out], ruled[..., ~out])
        assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all() and not gradient[..., out].any()


class Waiting(TorchDispatchMode):
    """Counts operations whose results are as large as a device says, for which the host waits."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        flags = name == "index" and any(at is not None and at.dtype == torch.bool for at in args[1])
        self.count += flags or name in ("nonzero", "_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_for_the_number_of_kept_positions() -> None:
    """However many layers there are."""
    layers = [pair(2, 3, 4, seed=seed) for seed in range(3)]
    with Waiting() as waiting:
        distill.hidden_distance([s for s, _ in layers], [t for _, t in layers], KEPT)
        distill.logit_distance(*layers[0], KEPT)
    assert waiting.count == 2


def test_a_batch_without_a_kept_position_is_0() -> None:
    student, teacher = pair(2, 3, 4)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = distill.logit_distance(student, teacher, nothing) + distill.hidden_distance([student], [teacher], nothing)
    total.backward()
    assert total.item() == 0.0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
def test_16_bit_values_are_computed_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    """A student in 16 bits, whose squares overflow in fp16, and a teacher in fp32."""
    student, teacher = pair(2, 3, 4)
    student = (300 * student.detach()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = [
            distill.logit_distance(student, teacher, KEPT, temperature=3.0),
            distill.hidden_distance([student], [teacher], KEPT),
        ]
    whole = student.detach().float()
    expected = [
        distill.logit_distance(whole, teacher, KEPT, temperature=3.0),
        distill.hidden_distance([whole], [teacher], KEPT),
    ]
    assert [x.dtype for x in found] == [torch.float32, torch.float32]
    assert [x.item() for x in found] == [x.item() for x in expected]
    torch.stack(found).sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype and student.grad.isfinite().all()


def test_a_teacher_has_no_gradients_and_no_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    teacher = distill.Teacher(model)
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(teacher(x), model[0](x)) and not teacher(x).requires_grad
    assert all(p.requires_grad for p in model.parameters())


A, B = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
MISTAKES: dict[str, tuple[Any, str]] = {
    "temperature": (lambda: distill.logit_distance(A, A, temperature=0), r"temperature=0: must be above 0"),
    "infinite": (lambda: distill.logit_distance(A, A, temperature=math.inf), r"temperature=inf: .* finite"),
    "one row": (lambda: distill.logit_distance(A[0, 0], A[0, 0]), r"logits of shape \(4,\): must have positions"),
    "vocabulary": (
        lambda: distill.logit_distance(A, B),
        r"logits of shape \(2, 3, 4\), of the teacher \(2, 3, 5\): .* padded, pass logits\[..., :size\] of both",
    ),
    "one tensor": (lambda: distill.hidden_distance(A, [A]), r"given as one tensor: must be a list"),
    "labels": (lambda: distill.logit_distance(A, A, KEPT.long()), r"torch.int64: must be bool of the positions"),
    "kept": (lambda: distill.hidden_distance([A], [A], KEPT[:1]), r"kept of shape \(1, 3\)"),
    "deeper": (lambda: distill.hidden_distance([A], [A], KEPT[None, None, None]), r"kept of shape \(1, 1, 1, 2, 3\)"),
    "none": (lambda: distill.hidden_distance([], []), r"of 0 layers, of the teacher 0: .* Set output_hidden_states"),
    "layers": (lambda: distill.hidden_distance([A, A], [A]), r"of 2 layers, of the teacher 1: must be equal"),
    "width": (lambda: distill.hidden_distance([A, A], [A, B]), r"hidden states of shape \(2, 3, 4\), of the teacher"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()
