"""Trains the student: hidden states, attention and sentence embeddings like the teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.distill import engine, store
from fastdistill.distill.directory import Directory
from fastdistill.distill.distiller import Distiller, Hint
from fastdistill.distill.errors import JobError
from fastdistill.distill.listener import Listener
from fastdistill.distill.snapshot import Curve, Snapshot
from fastdistill.distill.students import student_from_teacher
from fastdistill.distill.text import encoder, measures
from fastdistill.distill.text.config import TextConfig
from fastdistill.distill.text.encoder import Teacher
from fastdistill.distill.text.sentences import Corpus
from fastdistill.hint import attention_kl

STUDENT = "student"
FILES = (f"{STUDENT}.safetensors",)
GROUP = 16  # batches that are sorted by length together: little padding, still a random order


def choose_layers(config: TextConfig, teacher: Teacher) -> tuple[int, ...]:
    """The layers that the student starts from.

    Raises:
        JobError: one that the teacher does not have.
    """
    layers = config.layers or tuple(range(0, teacher.layers, 2))
    if layers[-1] >= teacher.layers:
        raise JobError(
            "A setting cannot be used.",
            f"layers: {layers[-1]} asked for; the teacher has the layers 0 to "
            f"{teacher.layers - 1}.",
            "Correct it on the command line or in the configuration file.",
        )
    return layers


def cut(teacher: Teacher, layers: tuple[int, ...]) -> Any:
    """The student at its start: those layers, without dropout, its embeddings not trained.

    Without dropout, as the teacher's own outputs have none, and as attention after dropout could
    not be compared. The embeddings stay the teacher's: half of the parameters need no optimiser,
    and a step takes a third less time, for figures that do not differ.
    """
    student = student_from_teacher(teacher.model, layers)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    student.embeddings.requires_grad_(False)
    return student


def hints(config: TextConfig, teacher: Teacher, layers: tuple[int, ...]) -> list[Hint]:
    """What is compared. Layer i of the student stands for the teacher's layers from the one that
    it starts from to the one before the next one's, and is compared with the last of these.
    """
    last = teacher.layers - 1
    found = []
    for i, theirs in enumerate([*(layer - 1 for layer in layers[1:]), last]):
        ours, wanted = f"{teacher.stack}.{i}", f"{teacher.stack}.{theirs}"
        if config.hidden_weight:
            found.append(Hint(ours, wanted, config.hidden_weight, name=f"hidden {i}"))
        if config.attention_weight:
            found.append(
                Hint(
                    f"{ours}.attention.self",
                    f"{wanted}.attention.self",
                    config.attention_weight,
                    attention_kl,
                    select=itemgetter(1),
                    name=f"attention {i}",
                )
            )
    ours, wanted = f"{teacher.stack}.{len(layers) - 1}", f"{teacher.stack}.{last}"
    return [*found, Hint(ours, wanted, config.pooled_weight, pooled_cosine, name="pooled")]


def pooled_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine of the sentence embeddings, mean over the sentences [B, L, D]."""
    ours, theirs = encoder.pooled(student, mask), encoder.pooled(teacher, mask)
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()


class Training:
    """One training of one student, from where a kill left it.

    Args:
        config: all settings.
        directory: where checkpoints are kept.
        run: id of the job; checkpoints of others are ignored.
        corpus: the sentences.
        teacher: the teacher.
        listener: is told of each epoch.
    """

    def __init__(
        self,
        config: TextConfig,
        directory: Directory,
        run: str,
        corpus: Corpus,
        teacher: Teacher,
        listener: Listener,
    ) -> None:
        self.config = config
        self.path = directory.checkpoints / FILES[0]
        self.run_id = run
        self.teacher = teacher
        self.listener = listener
        self.device = next(teacher.model.parameters()).device
        self.padding = int(teacher.tokenizer.pad_token_id)
        self.layers = choose_layers(config, teacher)
        self.held_out = encoder.tokens(teacher.tokenizer, corpus.held_out, config.max_tokens)
        self.sentences = self._drawn(corpus.train)
        self.wanted = self.similarities(teacher.model)
        self.student = cut(teacher, self.layers)
        self.before = self.similarities(self.student)

    def similarities(self, model: nn.Module) -> Tensor:
        """Of the held-out sentences, [N, N]."""
        return measures.similarities(encoder.embed(model, self.held_out, self.padding))

    def train(self) -> Curve:
        """Train the student, or load it where it is finished; one entry per epoch."""
        config = self.config
        snapshot = Snapshot(self.path.with_suffix(".training.safetensors"), self.run_id)

        def after_epoch(curve: Curve) -> None:
            self.listener.progress(STUDENT, config.epochs, curve)

        curve = self._finished()
        if curve is None:
            distiller = Distiller(
                self.student, self.teacher.model, hints=hints(config, self.teacher, self.layers)
            )
            sums = {name: torch.zeros((), device=self.device) for name in _kinds(distiller)}

            def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
                ids, mask = (x.to(self.device) for x in batch)
                _, losses = distiller(
                    input_ids=ids, attention_mask=mask.long(), output_attentions=True,
                    hint_mask=mask,
                )  # fmt: skip
                for name, value in losses.items():
                    sums[name.partition(" ")[0]] += value.detach()
                return losses.total

            def measure(model: nn.Module) -> dict[str, float]:
                now = self.similarities(model)
                terms = {name: float(value) / self.steps for name, value in sums.items()}
                for value in sums.values():
                    value.zero_()
                return {
                    "correlation": measures.correlation(now, self.wanted),
                    "overlap": measures.overlap(now, self.wanted),
                    **terms,
                }

            recipe = engine.Recipe(config.epochs, self.batch, config.learning_rate, config.seed)
            curve = engine.loop(
                self.student, self._batches, loss, recipe, self.steps,
                snapshot=snapshot, measure=measure, after_epoch=after_epoch,
            )  # fmt: skip
            about = {
                "kind": "sentence encoder",
                "run": self.run_id,
                "teacher": self.teacher.name,
                "layers": list(self.layers),
                "curve": curve,
            }
            store.save(self.path, self.student.state_dict(), about)
        else:
            after_epoch(curve)
        snapshot.remove()
        return curve

    @property
    def batch(self) -> int:
        """Sentences per step."""
        return min(self.config.batch_size, self.config.epoch_size)

    @property
    def steps(self) -> int:
        """Per epoch; an incomplete last batch is left out."""
        return self.config.epoch_size // self.batch

    def _drawn(self, sentences: list[str]) -> list[Tensor]:
        """The sentences of the whole training in their order, as token ids."""
        generator = torch.Generator().manual_seed(self.config.seed)
        count = self.config.epochs * self.config.epoch_size
        drawn = engine._draw(torch.arange(len(sentences)), count, generator).tolist()
        different = sorted(set(drawn))
        ids = encoder.tokens(
            self.teacher.tokenizer, [sentences[i] for i in different], self.config.max_tokens
        )
        of = dict(zip(different, ids, strict=True))
        return [of[i] for i in drawn]

    def _batches(self, generator: torch.Generator, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        start = epochs * self.config.epoch_size
        drawn = self.sentences[start : start + self.steps * self.batch]
        batches = []
        for first in range(0, len(drawn), GROUP * self.batch):
            group = sorted(drawn[first : first + GROUP * self.batch], key=len)
            batches += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield encoder.pad(batches[i], self.padding)

    def _finished(self) -> Curve | None:
        """Load the finished student of this job; its curve, or None if there is none."""
        if not self.path.exists():
            return None
        tensors, about = store.load(self.path)
        if about.get("run") != self.run_id:
            return None
        self.student.load_state_dict(tensors)
        curve: Curve = about["curve"]
        return curve


def _kinds(distiller: Distiller) -> list[str]:
    """ "hidden", "attention", "pooled": the first words of the names of the hints."""
    return list(dict.fromkeys(hint.label.partition(" ")[0] for hint in distiller.hints))
