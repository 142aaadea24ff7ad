"""A network run layer after layer, with the weights of one of its layers in memory at a time.

The network is a skeleton: its parameters lie on torch's meta device and take no memory. `listen` records how it calls
each of its layers; from then on a layer is a function of hidden states alone, and `answer` says what the network makes
of those that the last one leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diablo_export.errors import ExportError
from diablo_export.trainer.data import Encoded
from diablo_export.trainer.distillation import HARD, inputs, optimise, unpadded
from diablo_export.trainer.grid import State, coded_layers, set_state

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Batch:
    """Sequences that go through the layers together.

    Attributes:
        inputs: what the network is called with, its attention_mask (rows, length) among it.
        calls: what each layer is called with beside hidden states.
        hidden: (rows, length, width) by state: where the sequences have come to.
    """

    inputs: dict[str, Tensor]
    calls: list[Call]
    hidden: dict[State, Tensor]


class _Standin(nn.Module):
    """In a layer's place: keeps what it is called with, and gives `answer`, or else its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a part of the network for now, nor are its parameters
        self.answer: Tensor | None = None
        self.seen: Tensor | None = None
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        """What the network reads from its layers, such as their kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """(rows, length, width) → the same."""
        self.seen, self.call = hidden, (arguments, named)
        return hidden if self.answer is None else self.answer


def layers_path(network: nn.Module, names: Collection[str]) -> str:
    """The module path of the list of layers that most of these modules lie in.

    Raises:
        ExportError: they lie in none.
    """
    lists = [path for path, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    held = {path: sum(name.startswith(f"{path}.") for name in names) for path in lists}
    best = max(lists, key=lambda path: (held[path], -len(path)), default="")
    if not held.get(best):
        raise ExportError("the model has no list of layers that hold the adapted modules, to take one after the other")
    return best


class Layers:
    """The layers of a skeleton, taken out of it.

    Attributes:
        layers: as they were in it, without weights.
    """

    def __init__(self, network: Any, path: str) -> None:
        """Put stand-ins where the layers at `path` are."""
        self._network = network
        self._places: Any = network.get_submodule(path)
        self.layers: list[nn.Module] = list(self._places)
        self._standins = [_Standin(layer) for layer in self.layers]
        for index, standin in enumerate(self._standins):
            self._places[index] = standin

    def put_back(self) -> None:
        """Give the network its layers again."""
        for index, layer in enumerate(self.layers):
            self._places[index] = layer

    @torch.no_grad()
    def listen(self, items: Sequence[Encoded], pad: int, states: Collection[State]) -> Batch:
        """Record what the layers are called with; what lies outside of them must hold its weights.

        Args:
            items: token sequences that are to be run together.
            pad: the id that fills short ones up.
            states: those that the sequences are to be followed in.
        """
        given = inputs(self._network, items, pad)
        self._network(**given, use_cache=False)
        first = self._standins[0].seen
        assert first is not None
        return Batch(given, [standin.call for standin in self._standins], dict.fromkeys(states, first))

    def run(self, index: int, layer: nn.Module, batch: Batch, state: State) -> Tensor:
        """What a layer with its weights makes of a batch's hidden states, (rows, length, width).

        Raises:
            ExportError: it gives more than that.
        """
        set_state(layer, state)
        arguments, named = batch.calls[index]
        answer = layer(batch.hidden[state], *arguments, **named)
        if not isinstance(answer, Tensor):
            raise ExportError(f"{type(layer).__name__} gives more than hidden states; it cannot be run on its own")
        return answer

    def distil(
        self,
        index: int,
        layer: nn.Module,
        batches: Sequence[Batch],
        *,
        steps: int,
        lr: float = 0.05,
        hard: float = HARD,
        seed: int = 0,
    ) -> list[float]:
        """Train the latents of one layer on what it gives beside its float blocks; then pass the batches on.

        The layer reads what the merged layers before it give, and is to give what it gave after unmerged ones: errors
        of the layers before are mended by it, as far as they can be.

        Args:
            index: of the layer.
            layer: with its weights; its grid layers begun.
            batches: with hidden states of branch and grid.
            steps: of Adam.
            lr, hard: as `distillation.distil`'s.
            seed: of the order of batches.

        Returns:
            The loss of each step: the squared error, as a share of the outputs' squares, mean over tokens.
        """
        with torch.no_grad():
            for batch in batches:
                batch.hidden["branch"] = self.run(index, layer, batch, "branch")
        order = np.random.default_rng([seed, index]).integers(0, len(batches), steps)

        def loss(step: int) -> Tensor:
            batch = batches[order[step]]
            wanted, mask = batch.hidden["branch"], batch.inputs["attention_mask"].bool()
            apart = (self.run(index, layer, batch, "grid") - wanted).square().sum(-1)
            shares: Tensor = apart / wanted.square().sum(-1).clamp_min(1e-12)
            return shares[mask].mean()

        trained = [one for one in coded_layers(layer) if one.latent is not None]
        losses = optimise(trained, loss, steps=steps, lr=lr, hard=hard) if trained else []
        with torch.no_grad():
            for batch in batches:
                batch.hidden["grid"] = self.run(index, layer, batch, "grid")
        return losses

    @torch.no_grad()
    def answer(self, batch: Batch, state: State) -> Tensor:
        """Logits of a batch that has passed the last layer, as `distillation.logits` gives them."""
        set_state(self._network, state)
        self._standins[-1].answer = batch.hidden[state]
        output: Tensor = self._network(**batch.inputs).logits
        self._standins[-1].answer = None
        return unpadded(output, batch.inputs["attention_mask"])
