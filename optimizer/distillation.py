"""Learning back: a student network is brought nearer to its teacher, on inputs alone.

    learnt = distil(student, teacher, samples, select, plan, progress)
    learnt.artifact                       # the student with other weights; the very student where nothing was gained
    learnt.before, learnt.after           # loss on `select`, against the teacher

Both are ONNX graphs and run as differentiable torch modules (`perwatt.interpreter`), so neither needs source code. What is
learnt is the teacher's outputs: by the Kullback-Leibler divergence at a temperature for logits (Hinton, Vinyals and Dean,
"Distilling the knowledge in a neural network", 2015), by the squared error relative to the teacher's variance for all else;
and, on the way there, the values of the residual stream that the student still has (`distillation_stream`).
Batch normalization that was folded away is put back while it learns (`distillation_norms`); pictures are shifted, mirrored where
the teacher does not mind, and mixed (`distillation_inputs`); the weights with the least loss on `select` are kept, those that it
started with among them.

Steps go by a one-cycle schedule over the time that there is, or over a fixed number of steps, which makes it repeatable.
State is written aside every half minute; the same call goes on where one was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from perwatt.artifact import Artifact, Step
from perwatt.batching import apart
from perwatt.data import Samples
from perwatt.distillation_answers import Answers, error, spread
from perwatt.distillation_inputs import Drawn, augmentation
from perwatt.distillation_norms import fold_norms, put_norms, reestimate, with_biases
from perwatt.distillation_stream import hints, with_outputs
from perwatt.distillation_weights import learnt_names
from perwatt.errors import BackendError
from perwatt.interpreter import Interpreter, Unsupported
from perwatt.interpreter_values import from_numpy
from perwatt.signature import rows

CHECKPOINT_S = 30.0
KEPT = "but what was learnt is kept: the same command goes on with it"
JUDGED = 16
"""How often the student is judged while it learns."""
WARM = 0.1
"""Share of the steps in which the learning rate rises."""
MASKED = 0.25
"""A weight with more zeros than that is sparse, and stays so."""
SPARSE = ("prune-weights", "prune-n-of-m")
"""Passes whose zeros stay, however few they are."""
STATE = ("kept", "done", "spent", "first", "best", "best_step", "judged", "agreed", "agrees")
"""What is kept beside network, optimizer and the state of the generators."""
TOKENS = ("Attention", "LayerNormalization", "RMSNormalization")
"""What tells a transformer, as a Softmax does that does not end the network."""
JUDGED_ON, JUDGED_BYTES = 1024, 256 << 20
"""Samples to select by, at most, and what the teacher's answers to them may take."""
MEASURED_ON = 1024
"""Samples that statistics of normalizations are found on."""
ASTRAY = 3
"""Steps in a row without a finite loss after which it begins again at the best weights, at half the rate."""
FORGOTTEN_S = 14 * 86400
"""What was half learnt so long ago nobody goes on with."""


@dataclass(frozen=True)
class Plan:
    """`seconds` or, where given, `steps` of `batch` items. `learning_rate`: None for what suits the network. `labels`: how much
    the cross entropy with labels counts beside the teacher, where there are any; `mix`: the share of pictures that are mixed
    with others; `hints`: how many values of the residual stream count together as much as the outputs."""

    seconds: float = 300.0
    steps: int | None = None
    batch: int = 64
    learning_rate: float | None = None
    temperature: float = 4.0
    labels: float = 0.1
    augment: str = "auto"
    mix: float = 0.5
    hints: int = 6
    norms: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Learnt:
    """`before` and `after`: loss on the samples to select by; `agreement`: the share of them that the student answered as the
    teacher does, before and after, None where answers are no scores; `step`: the one whose weights were kept, 0 for none."""

    artifact: Artifact
    before: float
    after: float
    agreement: tuple[float, float] | None
    steps: int
    step: int
    seconds: float
    notes: tuple[str, ...]


def distil(
    student: Artifact, teacher: Artifact, samples: Samples, select: Samples, plan: Plan, progress: Callable[[str], None],
    folder: Path | None = None, step: Step | None = None,
) -> Learnt:  # fmt: skip
    """Raises BackendError where torch has no such operator. `folder`: where state is kept while it learns."""
    torch.manual_seed(plan.seed)
    try:
        work = _Work(student, teacher, samples, select, plan)
    except Unsupported as error:
        raise BackendError(f"learning runs in torch, and {error}") from error
    return work.done_with(folder, step or Step("distil"), lambda words: progress(f"recover: {words}"))


class _Work:
    """Two networks, and how far the one has come."""

    def __init__(self, student: Artifact, teacher: Artifact, samples: Samples, select: Samples, plan: Plan) -> None:
        self.entered = time.monotonic()
        self.plan, self.source = plan, student
        self.student = with_biases(student) if plan.norms else student
        self.answers, self.hints = (
            len(student.signature.outputs),
            hints(self.student, teacher, next(select.batches(2)), plan.hints),
        )
        self.network = self._module(with_outputs(self.student, self.hints))
        self.teacher = self._module(with_outputs(teacher, self.hints)).eval()
        _check_batches(student, self.teacher, select)
        self.samples = samples
        self.generator = np.random.default_rng(plan.seed)
        self.augment, self.notes = augmentation(plan.augment, plan.mix, self.teacher, samples)
        self.half = _bfloat16_pays()
        learnt = learnt_names(self.student.model)
        self.weights = {
            name: weight
            for name, weight in self.network.weights.items()
            if name in learnt and weight.dtype == torch.float32 and weight.numel() > 1
        }
        if not self.weights:
            raise BackendError("the network has no weights to learn in float32")
        for weight in self.weights.values():
            weight.requires_grad_(True)
        masked = 0.0 if any(step.name in SPARSE for step in student.steps) else MASKED
        self.masks = {
            name: weight != 0
            for name, weight in self.weights.items()
            if weight.ndim > 1 and float((weight == 0).float().mean()) > masked
        }
        self.transformer = _is_transformer(student)
        self.norms = [] if self.transformer or not plan.norms else put_norms(self.network, self._some(), self.answers)
        self.optimizer = self._optimizer()
        self.select = self._few(select)
        self.targets = [self._run(self.teacher, batch) for batch in self.select.batches(plan.batch)]
        self.outcome = Answers(
            [one.name for one in student.signature.outputs], self.targets, plan.temperature, plan.labels
        )
        self.spreads = self._spreads()
        self.done, self.spent = 0, 0.0
        self.astray, self.slower = 0, 1.0
        self.stream = self._stream()
        self.best_step, self.kept = 0, self._state()
        self.last_kept, self.loss = time.monotonic(), math.nan
        self._first_judged()

    def _first_judged(self) -> None:
        self.first, self.agreed = self.on_select()
        if not math.isfinite(self.first):
            raise BackendError("it answers with NaN or infinity as it is, from which nothing can be learnt")
        self.best, self.agrees = self.first, self.agreed

    # Learning ---------------------------------------------------------------------------------------------------------

    def done_with(self, folder: Path | None, step: Step, progress: Callable[[str], None]) -> Learnt:
        """Learn until time or steps are used up. What is learnt is kept in `folder` where that is cut short, and gone on
        with."""
        path = None if folder is None else folder / f"{self.digest()}.pt"
        # What comes before the first step takes its share of the time, too.
        self.spent += time.monotonic() - self.entered
        self.resume(path)
        try:
            while not self.over():
                self.learn()
                if self.due() and not self.over():
                    self.judge()
                    progress(self.words())
                if time.monotonic() - self.last_kept > CHECKPOINT_S:
                    self.keep(path)
            self.judge()
        except KeyboardInterrupt:
            self.keep(path)
            raise KeyboardInterrupt(f"{KEPT} ({self.done} steps)" if path is not None else "") from None
        except SystemExit:
            self.keep(path)
            raise
        progress(self.words())
        made = self.finished(step)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            _sweep(path.parent)
        return made

    def learn(self) -> None:
        """One step."""
        start = time.monotonic()
        # Items of a shape that is rare are few: they are learnt from together with others.
        calls, items = list[Any](), 0
        while items < self.plan.batch:
            calls.append(next(self.stream))
            items += calls[-1][2]
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = 0.0
        for feeds, labels, count in calls:
            with torch.no_grad():
                wanted = self._outputs(self.teacher, feeds)
            loss = self._loss(self._outputs(self.network, feeds), wanted, labels) * (count / items)
            loss.backward()
            self.loss += float(loss.detach())
        moved = [w for group in self.optimizer.param_groups for w in group["params"]]
        length = float(nn.utils.clip_grad_norm_(moved, 5.0))
        if math.isfinite(self.loss) and math.isfinite(length):
            self.astray = 0
            self.optimizer.step()
        else:
            self._went_astray()
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.weights[name].mul_(mask)
        self.done += 1
        self.spent += time.monotonic() - start

    def _went_astray(self) -> None:
        """No step without a finite loss; after several, back to the best weights, at half the rate."""
        self.astray += 1
        if self.astray == ASTRAY:
            self.astray, self.slower = 0, self.slower / 2
            self._load(self.kept)
            self.optimizer = self._optimizer()

    def judge(self) -> None:
        """Keep these weights where they are the best so far."""
        start = time.monotonic()
        if self.norms and self.over():
            reestimate(self.network, self.norms, self._some())
        loss, agrees = self.on_select()
        if loss < self.best:
            self.best, self.agrees, self.best_step, self.kept = loss, agrees, self.done, self._state()
        self.spent += time.monotonic() - start

    def on_select(self) -> tuple[float, float | None]:
        """Loss against the teacher, without labels, and the share of items that both answer alike; None where answers are no
        scores."""
        self.network.eval()
        total, same = 0.0, 0
        with torch.no_grad():
            for batch, wanted in zip(self.select.batches(self.plan.batch), self.targets, strict=True):
                found = self._run(self.network, batch)
                total += float(self.outcome.distance(found, wanted)) * rows(batch)
                same += self.outcome.alike(found, wanted)
        count = len(self.select)
        return total / count, None if self.outcome.scores is None else same / count

    def over(self) -> bool:
        """Whether time or steps are used up."""
        if self.plan.steps is not None:
            return self.done >= self.plan.steps
        return self.spent >= self.plan.seconds

    def due(self) -> bool:
        """Whether it is time to judge."""
        if self.plan.steps is not None:
            return self.done % max(1, self.plan.steps // JUDGED) == 0
        return int(self.share() * JUDGED) > int(self.judged * JUDGED)

    def share(self) -> float:
        """How much of the plan is done."""
        if self.plan.steps is not None:
            return self.done / max(1, self.plan.steps)
        return min(1.0, self.spent / self.plan.seconds)

    def words(self) -> str:
        """`loss 0.12, 0.10 on held-out samples (0.53 at first), 2:10 left`."""
        left = self.spent / max(self.share(), 1e-9) - self.spent
        self.judged = self.share()
        return (
            f"{int(left) // 60}:{int(left) % 60:02d} left, step {self.done}, loss {self.loss:.3f}, "
            f"held out {self.best:.3f} (at first {self.first:.3f})"
        )

    def finished(self, step: Step) -> Learnt:
        """The student with the best weights."""
        self._load(self.kept)
        notes = (
            *self.notes,
            *([f"{len(self.hints)} values of the residual stream learnt besides"] if self.hints else []),
            *([f"{len(self.norms)} normalizations put back to learn"] if self.norms else []),
        )
        told = (*self.figures(), notes)
        if self.best_step == 0:
            return Learnt(self.source, *told)
        fold_norms(self.network, self.norms)
        return Learnt(self.network.write_back(self.student, step), *told)

    def figures(self) -> tuple[float, float, tuple[float, float] | None, int, int, float]:
        """What `Learnt` tells of how it went."""
        agreement = None if self.agreed is None or self.agrees is None else (self.agreed, self.agrees)
        return self.first, self.best, agreement, self.done, self.best_step, self.spent

    judged = 0.0

    # Parts ------------------------------------------------------------------------------------------------------------

    def _module(self, model: Any) -> Any:
        """With weights of convolutions as oneDNN reads them: a third less time for each step."""
        made = Interpreter(model)
        for weight in made.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return made

    def _loss(self, found: Sequence[Any], wanted: Sequence[Any], labels: Any) -> Any:
        """Of the answers, and of what the two networks have in common on the way."""
        loss = self.outcome.distance(found[: self.answers], wanted[: self.answers], labels)
        if not self.hints:
            return loss
        pairs = zip(found[self.answers :], wanted[self.answers :], self.spreads, strict=True)
        return loss + sum(error(mine.float(), theirs.float(), far) for mine, theirs, far in pairs) / len(self.hints)

    def _few(self, select: Samples) -> Samples:
        """Samples to judge by: not so many that judging takes longer than learning, or that answers fill the memory."""
        one = next(select.batches(self.plan.batch))
        size = sum(answer.nbytes for answer in self._run(self.teacher, one)) / rows(one)
        return select.take(max(self.plan.batch, min(JUDGED_ON, int(JUDGED_BYTES / max(size, 1)))), self.plan.seed)

    def _spreads(self) -> list[float]:
        """By how much each value of the residual stream varies."""
        if not self.hints:
            return []
        with torch.no_grad():
            found = self._outputs(self.teacher, self._feeds(next(self.select.batches(self.plan.batch))))
        return [spread([one.float()]) for one in found[self.answers :]]

    def _optimizer(self) -> Any:
        weights = {id(w): w for w in self.weights.values()}
        bent = [w for w in weights.values() if w.ndim > 1]
        flat = [w for w in weights.values() if w.ndim <= 1]
        for norm in self.norms:
            flat += [norm.module.weight, norm.module.bias]
        groups = [
            {"params": bent, "weight_decay": 5e-4, "scale": 1.0},
            {"params": flat, "weight_decay": 0.0, "scale": 1.0},
        ]
        if self.transformer:
            return torch.optim.AdamW([{**g, "weight_decay": 0.01 * bool(g["weight_decay"])} for g in groups], lr=1e-4)
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)

    def _rate(self) -> float:
        usual = 5e-5 if self.transformer else 0.005 if self.norms else 0.002
        peak = (self.plan.learning_rate or usual) * self.slower
        share = self.share()
        if share < WARM:
            return peak * (0.1 + 0.9 * share / WARM)
        return peak * 0.5 * (1 + math.cos(math.pi * (share - WARM) / (1 - WARM)))

    def _stream(self) -> Iterator[tuple[list[Any], Any, int]]:
        """What is fed, labels or None, and the number of items."""
        drawn = Drawn(self.samples, self.plan.batch, self.generator)
        while True:
            for batch, labels in drawn.epoch():
                batch, labels = self.augment(batch, labels, self.generator)
                named = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels))
                yield self._feeds(batch), named, rows(batch)

    def _some(self) -> Iterator[list[Any]]:
        """Samples as they are, for statistics."""
        for batch in self.samples.take(MEASURED_ON, self.plan.seed).batches(self.plan.batch):
            yield self._feeds(batch)

    def _feeds(self, batch: Any) -> list[Any]:
        found = [from_numpy(batch[name], torch.device("cpu")) for name in self.network.inputs]
        return [one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one for one in found]

    def _run(self, network: Any, batch: Any) -> Any:
        """What it answers."""
        with torch.no_grad():
            return self._outputs(network, self._feeds(batch))[: self.answers]

    def _outputs(self, network: Any, feeds: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            return network(*feeds)

    # State ------------------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """Of all that decides what is learnt; the time that there is for it is another each time."""
        plan = asdict(replace(self.plan, seconds=0.0))
        parts = [self.source.digest(), self.teacher_digest(), self.samples.digest(), self.select.digest(), plan]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def teacher_digest(self) -> str:
        """Of the teacher's weights."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.teacher.weights.items()):
            sha.update(name.encode() + weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _state(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state)

    def keep(self, path: Path | None) -> None:
        """Write the state down. Where that can't be done, learning goes on without."""
        if path is None or not self.done:
            return
        self.last_kept = time.monotonic()
        try:
            self._write(path)
        except OSError as error:
            words = f"what is half learnt can't be kept: {path.parent}: {error.strerror}"
            self.notes += [] if words in self.notes else [words]

    def _write(self, path: Path) -> None:
        """Aside, and renamed."""
        held = {
            "network": self._state(), "optimizer": self.optimizer.state_dict(), "torch": torch.get_rng_state(),
            "numpy": json.dumps(self.generator.bit_generator.state), **{name: getattr(self, name) for name in STATE},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with open(aside, "wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def resume(self, path: Path | None) -> None:
        """Go on where the same work was stopped; a file that can't be read is as none."""
        if path is None or not path.exists():
            return
        try:
            held = torch.load(path, weights_only=True)
            known = {name: held[name] for name in STATE}
            drawn = json.loads(held["numpy"])
            self._load(held["network"])
            self.optimizer.load_state_dict(held["optimizer"])
            torch.set_rng_state(held["torch"])
            self.generator.bit_generator.state = drawn
        except Exception:
            self._load(self.kept)
            self.optimizer = self._optimizer()
            path.unlink(missing_ok=True)
            return
        for name, value in known.items():
            setattr(self, name, value)
        # There may be more time now than there was then.
        self.judged = min(self.judged, self.share())
        self.notes.append(f"went on at step {self.done}, where it had been stopped")


def _check_batches(student: Artifact, teacher: Any, select: Samples) -> None:
    """Raises BackendError where the graph fixes its batch and does not treat items apart."""
    batch = student.signature.batch
    if isinstance(batch, int) and not apart(teacher.run, *itertools.islice(itertools.cycle(select.batches(batch)), 2)):
        raise BackendError(
            f"the model fixes its batch at {batch} and answers others differently",
            fix="export it with a dynamic batch axis",
        )


def _is_transformer(artifact: Artifact) -> bool:
    """Whether it learns as transformers do: it has what they have, and most of its weights are not in convolutions."""
    inside = [
        node for node in artifact.model.graph if node.op_type == "Softmax" and not node.outputs[0].is_graph_output()
    ]
    if not inside and not any(kind in TOKENS for kind in artifact.operator_counts()):
        return False
    sizes = {
        kinds: sum(
            value.const_value.size
            for node in artifact.model.graph if node.op_type in kinds
            for value in node.inputs if value is not None and value.const_value is not None
        )
        for kinds in (("Conv",), ("MatMul", "Gemm"))
    }  # fmt: skip
    return sizes[("MatMul", "Gemm")] >= sizes[("Conv",)]


def _sweep(folder: Path) -> None:
    """Remove what was half learnt long ago."""
    for file in folder.glob("*.pt*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > FORGOTTEN_S:
                file.unlink()


def _bfloat16_pays() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware; elsewhere it is emulated, and slow."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask is not None and ask() for ask in known)
