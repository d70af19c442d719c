"""Operators of the interpreter that run along a sequence: RNN, GRU, LSTM.

The steps are unrolled, so that they compile and differentiate whatever the activations are; what doesn't depend on the
step before (the product of the inputs and their weights) is computed for all steps at once. A long sequence therefore
makes a large compiled graph.

A sequence shorter than the batch's longest keeps its state beyond its end and outputs 0 there. That holds in both
directions: in reverse, the steps beyond the end come first and leave the initial state as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from perwatt.interpreter_operators import operator

Activation = Callable[[torch.Tensor], torch.Tensor]
Step = Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
"""From the inputs' share of one step's gates and the state (hidden first) to the next state."""

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "affine": lambda x, alpha, beta: alpha * x + beta,
    "leakyrelu": lambda x, alpha: functional.leaky_relu(x, alpha),
    "thresholdedrelu": lambda x, alpha: torch.where(x >= alpha, x, torch.zeros_like(x)),
    "scaledtanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "hardsigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "elu": lambda x, alpha: functional.elu(x, alpha),
    "softsign": functional.softsign,
    "softplus": functional.softplus,
}
CONSTANTS: dict[str, tuple[float, ...]] = {
    "affine": (1.0, 0.0), "leakyrelu": (0.01,), "thresholdedrelu": (1.0,), "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5), "elu": (1.0,),
}  # fmt: skip
"""Alpha, or alpha and beta, of the functions that have them, where the model gives none."""


@operator("RNN", since=7)
def rnn(
    x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: Any = None, sequence_lens: Any = None, initial_h: Any = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    named = _activations(activations, activation_alpha, activation_beta, ("Tanh",), w.shape[0], clip)

    def make(way: int) -> tuple[torch.Tensor | None, Step]:
        (f,), weight = named[way], r[way]

        def step(given: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (f(given + functional.linear(state[0], weight)),)

        return _bias_sum(b, way), step

    return _run(x, w, r, sequence_lens, (initial_h,), make, direction, layout)


@operator("GRU", since=7)
def gru(
    x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: Any = None, sequence_lens: Any = None, initial_h: Any = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    named = _activations(activations, activation_alpha, activation_beta, ("Sigmoid", "Tanh"), w.shape[0], clip)
    size = r.shape[-1]

    def make(way: int) -> tuple[torch.Tensor | None, Step]:
        bias, recurrent = (None, None) if b is None else b[way].chunk(2)
        return bias, _gru_step(named[way], r[way].split([2 * size, size]), recurrent, bool(linear_before_reset))

    return _run(x, w, r, sequence_lens, (initial_h,), make, direction, layout)


def _gru_step(named: Sequence[Activation], weights: Sequence[torch.Tensor], bias: Any, reset_last: bool) -> Step:
    """`weights` and `bias` in the order z, r | h; `reset_last` is linear_before_reset."""
    (f, g), (of_gates, of_hidden) = named, weights
    size = of_hidden.shape[0]
    gate_bias, hidden_bias = (None, None) if bias is None else bias.split([2 * size, size])

    def step(given: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (hidden,) = state
        for_gates, for_hidden = given.split([2 * size, size], -1)
        update, reset = f(for_gates + functional.linear(hidden, of_gates, gate_bias)).chunk(2, -1)
        if reset_last:
            recurrent = reset * functional.linear(hidden, of_hidden, hidden_bias)
        else:
            recurrent = functional.linear(reset * hidden, of_hidden, hidden_bias)
        return ((1 - update) * g(for_hidden + recurrent) + update * hidden,)

    return step


@operator("LSTM", since=7)
def lstm(
    x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: Any = None, sequence_lens: Any = None, initial_h: Any = None,
    initial_c: Any = None, p: Any = None,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int = 0,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> tuple[Any, ...]:  # fmt: skip
    usual = ("Sigmoid", "Tanh", "Tanh")
    named = _activations(activations, activation_alpha, activation_beta, usual, w.shape[0], clip)

    def make(way: int) -> tuple[torch.Tensor | None, Step]:
        peepholes = None if p is None else p[way].chunk(3)
        return _bias_sum(b, way), _lstm_step(named[way], r[way], peepholes, bool(input_forget))

    return _run(x, w, r, sequence_lens, (initial_h, initial_c), make, direction, layout)


def _lstm_step(named: Sequence[Activation], weight: torch.Tensor, peepholes: Any, coupled: bool) -> Step:
    """Gates in the order i, o, f, c; peepholes i, o, f. `coupled` is input_forget: what is not let in is kept."""
    f, g, h = named

    def step(given: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, cell = state
        let_in, let_out, keep, new = (given + functional.linear(hidden, weight)).chunk(4, -1)
        if peepholes is not None:
            let_in, keep = let_in + peepholes[0] * cell, keep + peepholes[2] * cell
        let_in = f(let_in)
        keep = 1 - let_in if coupled else f(keep)
        cell = keep * cell + let_in * g(new)
        if peepholes is not None:
            let_out = let_out + peepholes[1] * cell  # of the new cell, unlike the others
        return f(let_out) * h(cell), cell

    return step


def _bias_sum(b: Any, way: int) -> torch.Tensor | None:
    """The biases of inputs and of state, which only ever occur as a sum."""
    if b is None:
        return None
    of_inputs, of_state = b[way].chunk(2)
    total: torch.Tensor = of_inputs + of_state
    return total


def _activations(
    names: Sequence[str],
    alphas: Sequence[float],
    betas: Sequence[float],
    usual: Sequence[str],
    ways: int,
    clip: float | None,
) -> list[list[Activation]]:
    """The functions of each direction. Only functions that have an alpha or a beta take one from the lists."""
    left = list(alphas), list(betas)
    made = []
    for position, name in enumerate(one.lower() for one in (names or list(usual) * ways)):
        constants = [given.pop(0) if given else own for own, given in zip(CONSTANTS.get(name, ()), left, strict=False)]
        # LSTM's h, the only third one, gets the cell as it is: what ONNX Runtime does, though ONNX's text would clip it.
        clip_here = None if position % len(usual) == 2 else clip
        made.append(_activation(FUNCTIONS[name], constants, clip_here))
    return [made[way * len(usual) : (way + 1) * len(usual)] for way in range(ways)]


def _activation(function: Callable[..., torch.Tensor], constants: Sequence[float], clip: float | None) -> Activation:
    def apply(x: torch.Tensor) -> torch.Tensor:
        return function(x.clamp(-clip, clip) if clip else x, *constants)

    return apply


def _run(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    lengths: Any,
    initial: Sequence[Any],
    make: Callable[[int], tuple[torch.Tensor | None, Step]],
    direction: str,
    layout: int,
) -> tuple[torch.Tensor, ...]:
    """All directions: every step's hidden state, then each last state. `layout` 1 has the batch before the time."""
    x = x.transpose(0, 1) if layout else x
    steps, batch = x.shape[0], x.shape[1]
    inside = None if lengths is None else [(lengths > at).unsqueeze(-1) for at in range(steps)]
    sequences, lasts = [], []
    for way in range(w.shape[0]):
        bias, step = make(way)
        given = functional.linear(x, w[way], bias)
        state = tuple(
            x.new_zeros(batch, r.shape[-1]) if one is None else (one[:, way] if layout else one[way]) for one in initial
        )
        backward = direction == "reverse" or way == 1
        found, state = _along(given, state, step, inside, backward)
        sequences.append(found)
        lasts.append(state)
    every = torch.stack(sequences, 1)
    last = [torch.stack(states, 1 if layout else 0) for states in zip(*lasts, strict=True)]
    return (every.permute(2, 0, 1, 3) if layout else every, *last)


def _along(
    given: torch.Tensor, state: tuple[torch.Tensor, ...], step: Step, inside: Any, backward: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One direction: the hidden state at each step, in the order of time, and the state at the end."""
    count = given.shape[0]
    found: list[Any] = [None] * count
    for at in reversed(range(count)) if backward else range(count):
        after = step(given[at], state)
        found[at] = after[0]
        if inside is not None:
            found[at] = torch.where(inside[at], after[0], torch.zeros_like(after[0]))
            after = tuple(torch.where(inside[at], new, old) for new, old in zip(after, state, strict=True))
        state = after
    return (torch.stack(found) if count else given.new_zeros(0, *state[0].shape)), state
