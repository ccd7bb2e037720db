"""Trains a student against layers and logits of its teacher: hooks in, losses by name out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdistill import _validate
from fastdistill.hint import hint_loss
from fastdistill.hint.api import check_settings

Distance = Callable[..., Tensor]


@dataclass(frozen=True)
class Hint:
    """One pair of layers, and how far apart they are.

    Attributes:
        student: name of a layer of the student, as `named_modules()` gives it.
        teacher: name of a layer of the teacher.
        weight: of this loss in the sum.
        distance: a word that `fastdistill.hint_loss` knows ("mse", "l1", "smooth_l1", "cosine"),
            or a function of the two captured tensors to a scalar, such as
            `fastdistill.hint.attention_kl`. It is called as distance(student, teacher), with
            mask=... where `Distiller` gets a `hint_mask`.
        widths: (D_s, D_t): a regressor of D_s to D_t features (weight and bias) is trained with
            the student, as in FitNets. None: no regressor, the widths must agree. For a word only.
        feature_norm: as in `fastdistill.hint_loss`. For a word only.
        channel_dim: as in `fastdistill.hint_loss`: 1 for feature maps [N, C, H, W].
        select: picks the tensor out of a layer's output. None: the output itself, or the first
            tensor of a tuple, list or mapping.
        name: of this loss in the result. None: "student -> teacher".

    Raises:
        TypeError, ValueError: a value of another type, or one that `hint_loss` would refuse.
    """

    student: str
    teacher: str
    weight: float = 1.0
    distance: str | Distance = "mse"
    widths: tuple[int, int] | None = None
    feature_norm: str | tuple[str | None, str | None] | None = None
    channel_dim: int = -1
    select: Callable[[Any], Tensor] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for key in ("student", "teacher"):
            if not isinstance(getattr(self, key), str):
                raise TypeError(f"{key}: expected a layer's name, got {getattr(self, key)!r}")
        _validate.number("weight", self.weight)
        _validate.integer("channel_dim", self.channel_dim)
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise TypeError(f"name: expected a text or None, got {self.name!r}")
        _check_function("select", self.select)
        if callable(self.distance):
            if self.widths is not None or self.feature_norm is not None or self.channel_dim != -1:
                raise ValueError(
                    "distance: expected a word with widths, feature_norm or channel_dim, "
                    "got a function"
                )
            _check_function("distance", self.distance)
        elif not isinstance(self.distance, str):
            raise TypeError(f"distance: expected a str or a function, got {self.distance!r}")
        else:
            check_settings(self.distance, self.feature_norm)
        if self.widths is not None:
            widths = self.widths
            good = isinstance(widths, Sequence) and len(widths) == 2
            if not good or any(type(n) is not int or n < 1 for n in widths):
                raise ValueError(f"widths: expected (D_s, D_t), two ints > 0, got {widths!r}")

    @property
    def label(self) -> str:
        """The name of the loss."""
        return f"{self.student} -> {self.teacher}" if self.name is None else self.name


class Losses(dict[str, Tensor]):
    """Weighted losses by name; what is to be minimised is their sum, `total`."""

    @property
    def total(self) -> Tensor:
        """The sum of all, a scalar."""
        terms = list(self.values())
        return sum(terms[1:], start=terms[0])


class Distilled(NamedTuple):
    """What a `Distiller` returns: the student's own output, and the losses."""

    output: Any
    losses: Losses


class Distiller(nn.Module):
    """A student under training: runs it and its teacher, and compares logits and layers.

    ::

        distiller = Distiller(student, teacher, logits=KDLoss(temperature=2.0),
                              hints=[Hint("encoder.layer.1", "encoder.layer.3")])
        optimizer = AdamW(distiller.parameters())        # student and regressors
        output, losses = distiller(**batch)
        losses.total.backward()

    The teacher runs in evaluation mode and without gradient. It is no submodule: `parameters()`,
    `state_dict()` and DistributedDataParallel see the student and the regressors only (and what a
    loss of yours may hold), but `.to(device)` moves it too. Layers are read by forward hooks that
    exist while a forward pass runs, so the models stay as they are.

    Args:
        student: any module.
        teacher: any module; its parameters' `requires_grad` is cleared. The student may share
            those that are frozen already, and no others.
        logits: called as logits(student_logits, teacher_logits, ...), such as a
            `fastdistill.nn.KDLoss`; with labels if there is no `task`, with `mask` where given.
        hints: pairs of layers; see `Hint`.
        task: called as task(student_logits, labels), such as `torch.nn.CrossEntropyLoss()`.
        logits_weight: of the loss `logits` in the sum.
        task_weight: of the loss `task` in the sum.
        logits_of: picks the logits out of a model's output. None: the output itself if it is a
            tensor, else its `logits` (attribute or key), else its first entry.

    Raises:
        TypeError, ValueError: a layer that a model does not have (the near ones are named), two
            losses of one name, nothing to compute, an argument of another type, a student that
            would be frozen with its teacher.
    """

    student: nn.Module
    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        logits: Distance | None = None,
        hints: Iterable[Hint] = (),
        task: Distance | None = None,
        logits_weight: float = 1.0,
        task_weight: float = 1.0,
        logits_of: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}")
        for name, function in (("logits", logits), ("task", task), ("logits_of", logits_of)):
            _check_function(name, function)
        if isinstance(hints, Hint):
            raise TypeError("hints: expected a list of Hint objects, got a single Hint")
        self.hints = tuple(hints)
        for hint in self.hints:
            if not isinstance(hint, Hint):
                raise TypeError(f"hints: expected Hint objects, got {type(hint).__name__}")
        if logits is None and task is None and not self.hints:
            raise ValueError("Distiller: expected at least one of logits, hints and task")
        for hint in self.hints:
            _check_layer("student", student, hint.student)
            _check_layer("teacher", teacher, hint.teacher)
        names = [hint.label for hint in self.hints]
        for name in names:
            if name in ("logits", "task") or names.count(name) > 1:
                raise ValueError(f"hints: expected another name than {name!r}, which is taken")
        self.student = student
        self.teacher = teacher
        self.logits, self.task = logits, task
        self.logits_weight = _validate.number("logits_weight", logits_weight)
        self.task_weight = _validate.number("task_weight", task_weight)
        self.logits_of = logits_of
        start = next((x for x in student.parameters() if x.is_floating_point()), torch.empty(0))
        self.regressors = nn.ModuleDict(
            {
                str(i): nn.Linear(*hint.widths, device=start.device, dtype=start.dtype)
                for i, hint in enumerate(self.hints)
                if hint.widths is not None
            }
        )

    def forward(
        self,
        *inputs: Any,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        hint_mask: Tensor | None = None,
        teacher_inputs: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Distilled:
        """Run both models on the same inputs.

        Args:
            inputs: of both models, by position.
            labels: for `task`, or without one for `logits`; the models do not get them.
            mask: bool, for `logits`: the rows of the logits that count.
            hint_mask: bool, for all hints: the rows (tokens, positions) that count.
                None of the three is taken by a distiller without a loss that it is for.
            teacher_inputs: further keywords for the teacher, or other values for it.
            keywords: of both models.

        Returns:
            (output, losses): the student's output, and the weighted losses "logits", "task" and
            those of the hints by their names.

        Raises:
            TypeError, ValueError: `task` without labels; labels or a mask that nothing would read;
                a layer's output without tensor; shapes that differ.
            RuntimeError: a named layer did not run, or more than once; what it returned was changed
                in place since, or is cut off from the layer's own parameters.
        """
        self._check_inputs(labels, mask, hint_mask, teacher_inputs)
        theirs = keywords if teacher_inputs is None else {**keywords, **teacher_inputs}
        self.teacher.eval()  # whatever anyone did to it since
        with (
            torch.no_grad(),
            _captured("teacher", self.teacher, [h.teacher for h in self.hints]) as wanted,
        ):
            teacher_output = self.teacher(*inputs, **theirs)
        with _captured("student", self.student, [h.student for h in self.hints]) as found:
            output = self.student(*inputs, **keywords)

        losses = Losses()
        if self.logits is not None or self.task is not None:
            student_logits = self._logits(output)
        if self.logits is not None:
            given: dict[str, Any] = {} if mask is None else {"mask": mask}
            if labels is not None and self.task is None:
                given["labels"] = labels
            value = self.logits(student_logits, self._logits(teacher_output), **given)
            losses["logits"] = self.logits_weight * _scalar("logits", value)
        if self.task is not None:
            value = self.task(student_logits, labels)
            losses["task"] = self.task_weight * _scalar("task", value)
        for i, hint in enumerate(self.hints):
            ours, teachers = (
                outputs[layer].tensor(hint)
                for outputs, layer in ((found, hint.student), (wanted, hint.teacher))
            )
            self._check_trains(hint, ours)
            value = self._compare(i, hint, ours, teachers, hint_mask)
            losses[hint.label] = hint.weight * _scalar(hint.label, value)
        return Distilled(output, losses)

    def _check_inputs(
        self,
        labels: object,
        mask: object,
        hint_mask: object,
        teacher_inputs: object,
    ) -> None:
        """Refuse what is missing, and what would be passed over in silence."""
        if self.task is not None and labels is None:
            raise ValueError("labels: expected a tensor for the task's loss, got None")
        reads = {
            "labels": (labels, self.task is not None or self.logits is not None),
            "mask": (mask, self.logits is not None),
            "hint_mask": (hint_mask, bool(self.hints)),
        }
        for name, (value, read) in reads.items():
            if value is not None and not read:
                losses = {"labels": "logits or task", "mask": "logits", "hint_mask": "hints"}[name]
                raise ValueError(
                    f"{name}: expected None in a Distiller without {losses}, where nothing reads "
                    f"it, got {type(value).__name__}"
                )
        for name, value in (("mask", mask), ("hint_mask", hint_mask)):
            if value is not None and _validate.tensor(name, value).dtype is not torch.bool:
                got = _validate.tensor(name, value).dtype
                raise TypeError(f"{name}: expected dtype torch.bool (True keeps), got {got}")
        if teacher_inputs is not None and not isinstance(teacher_inputs, Mapping):
            raise TypeError(
                "teacher_inputs: expected a mapping of keywords, got "
                f"{type(teacher_inputs).__name__}"
            )

    def _check_trains(self, hint: Hint, ours: Tensor) -> None:
        """Refuse a hint whose gradient ends before it reaches the layer's own parameters."""
        if ours.requires_grad or not (torch.is_grad_enabled() and self.training):
            return
        layer = self.student.get_submodule(hint.student)
        if any(x.requires_grad for x in layer.parameters()):
            raise RuntimeError(
                f"the student's layer {hint.student!r} returned a tensor without gradient, though "
                f"its parameters require one: the hint {hint.label!r} would train nothing. Is it "
                "detached, or inside torch.utils.checkpoint with use_reentrant=True?"
            )

    def _compare(
        self, i: int, hint: Hint, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> Tensor:
        if not isinstance(hint.distance, str):
            given = {} if mask is None else {"mask": mask}
            return hint.distance(student, teacher, **given)
        weight = bias = None
        if hint.widths is not None:
            regressor = self.regressors[str(i)]
            assert isinstance(regressor, nn.Linear)
            weight, bias = regressor.weight, regressor.bias
        try:
            return hint_loss(
                student,
                teacher,
                proj_weight=weight,
                proj_bias=bias,
                distance=hint.distance,
                mask=mask,
                feature_norm=hint.feature_norm,
                channel_dim=hint.channel_dim,
            )
        except ValueError as error:
            what = f"the hint {hint.label!r}"
            if hint.widths is None and student.shape != teacher.shape:
                raise ValueError(
                    f"{what}: expected layers of one shape, got {list(student.shape)} and "
                    f"{list(teacher.shape)}; where only their widths differ, give "
                    "widths=(D_s, D_t) for a regressor between them"
                ) from error
            raise ValueError(f"{what}: {error}") from error

    def _logits(self, output: Any) -> Tensor:
        if self.logits_of is not None:
            return self.logits_of(output)
        if isinstance(output, Tensor):
            return output
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, Mapping):
            logits = output.get("logits")
        if logits is None and isinstance(output, (tuple, list)) and output:
            logits = output[0]
        if not isinstance(logits, Tensor):
            raise ValueError(
                "logits: expected a tensor, or an output with logits, got "
                f"{type(output).__name__}; say with logits_of where they are"
            )
        return logits

    def __setattr__(self, name: str, value: Any) -> None:
        """A teacher is frozen, and no submodule: see above."""
        if name != "teacher":
            super().__setattr__(name, value)
            return
        _check_shared(self.student, value)
        self.__dict__["teacher"] = value.requires_grad_(False).eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        """`.to()`, `.cuda()`, `.half()` and the like reach the teacher too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)
        return self


def feature_shapes(whose: str, model: nn.Module, layer: str, *inputs: Any) -> torch.Size:
    """Shape of what a layer returns for these inputs; the model is left in its mode."""
    was = model.training
    try:
        with torch.no_grad(), _captured(whose, model.eval(), [layer]) as found:
            model(*inputs)
    finally:
        model.train(was)
    return found[layer].tensor(Hint(layer, layer)).shape


class _Captured(NamedTuple):
    """What a layer returned, and how often its tensors had been written to by then."""

    whose: str
    layer: str
    output: Any
    versions: dict[int, int]  # by id: all of them live as long as `output`

    def tensor(self, hint: Hint) -> Tensor:
        """The tensor that a hint compares."""
        value = _tensor(self.output, hint, self.layer)
        if self.versions.get(id(value), _version(value)) != _version(value):
            raise RuntimeError(
                f"what the {self.whose}'s layer {self.layer!r} returned was changed in place "
                "afterwards, so that its own output is lost; make the next layer work out of place "
                "(nn.ReLU(inplace=False)), or name that one"
            )
        return value


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for x in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(x)


@contextmanager
def _captured(
    whose: str, model: nn.Module, layers: Sequence[str]
) -> Iterator[dict[str, _Captured]]:
    """Name of each layer -> its output, of the forward pass that runs inside."""
    outputs: dict[str, _Captured] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in outputs:
                raise RuntimeError(
                    f"the {whose}'s layer {name!r} ran twice in one forward pass; name one that "
                    "runs once"
                )
            versions = {id(x): _version(x) for x in _tensors(output)}
            outputs[name] = _Captured(whose, name, output, versions)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep(name))
        for name in dict.fromkeys(layers)
    ]
    try:
        yield outputs
        for name in layers:
            if name not in outputs:
                raise RuntimeError(f"the {whose}'s layer {name!r} did not run in the forward pass")
    finally:
        for handle in handles:
            handle.remove()


def _check_function(name: str, value: object) -> None:
    if value is not None and (isinstance(value, type) or not callable(value)):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected a function or a module, got {got}")


def _check_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse parameters that training needs and freezing the teacher would take out of it."""
    theirs = {id(x): name for name, x in teacher.named_parameters() if x.requires_grad}
    for name, x in student.named_parameters():
        if id(x) in theirs:
            raise ValueError(
                f"teacher: expected parameters of its own; its {theirs[id(x)]!r} is the student's "
                f"{name!r} too, which would be frozen (copy it, or freeze it yourself)"
            )


def _check_layer(whose: str, model: nn.Module, name: str) -> None:
    """Refuse the name of a layer that is not there, with the near ones."""
    known = [known for known, _ in model.named_modules(remove_duplicate=False) if known]
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    # the end of a name is what one remembers: "layer.1" for "bert.encoder.layer.1"
    near += [k for k in known if k.endswith(f".{name}") and k not in near][:3]
    near = near or [k for k in known if "." not in k][:8]
    raise ValueError(f"hints: the {whose} has no layer {name!r}; near ones: {', '.join(near)}")


def _tensor(output: Any, hint: Hint, layer: str) -> Tensor:
    """The tensor that a hint compares, of a layer's output."""
    value = output
    if hint.select is not None:
        value = hint.select(output)
    elif isinstance(output, (tuple, list, Mapping)):
        entries = output.values() if isinstance(output, Mapping) else output
        value = next((x for x in entries if isinstance(x, Tensor)), output)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the hint {hint.label!r}: expected a tensor from the layer {layer!r}, "
            f"got {type(value).__name__}; say with select which one is meant"
        )
    return value


def _scalar(name: str, value: object) -> Tensor:
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        value = value[0]  # KDLoss(return_parts=True) and the like: the loss comes first
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss {name!r}: expected a scalar tensor, got {got}")
    return value
