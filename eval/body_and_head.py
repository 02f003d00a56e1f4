"""Run the body and the head of a causal language model separately: the body on whole windows, the head on chunks.

The logits of a window are the largest tensor of an evaluation (32,768 positions x 128k tokens of vocabulary x 2 bytes =
8 GiB), and a stored reference would consist mostly of logits. The hidden states in front of the head are some hundred
times smaller. So the body runs on whole windows, and its hidden states are kept. The model's own forward pass then
turns them into logits chunk by chunk, including all steps after the head (scales, soft caps). During that pass, the
body returns the given hidden states instead of running.

A run on two tokens finds the body. The body is the first module that the model calls, provided that it returns hidden
states and that the model computes the same logits from them again. A model without such a body runs as a whole, and its
logits take the place of the hidden states.

Letters: B windows of a batch, L tokens of a window, D hidden size, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.hooks import hooked


class BodyAndHead:
    """A causal language model whose body and head run separately."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        """device: the device that the model runs on; None for the device of its first parameter."""
        self.model = model
        self.device = next(model.parameters()).device if device is None else device
        self.seconds = 0.0
        """Wall time that body and head have taken so far."""
        self._is_searched = False
        """Whether `find_body` has run."""
        self._body: nn.Module | None = None
        self._output: type[Any] | None = None
        """Class of the body's output."""

    def hidden_states(self, tokens_BL: Tensor) -> Tensor:
        """Run the body on int64 tokens [B, L]. Return the input of the head, [B, L, D] in the model's dtype."""
        tokens_BL = tokens_BL.to(self.device)
        self.find_body(tokens_BL)
        start = perf_counter()
        if self._body is None:
            hidden_BLD = self.model(input_ids=tokens_BL, use_cache=False).logits
        else:
            caught: list[Tensor] = []

            def catch_hidden_states(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
                caught.append(output.last_hidden_state)
                # The logits are not used. With several windows, torch would copy the head's weight for each.
                return self._body_output(output.last_hidden_state[:1, :1])

            with hooked([(self._body, catch_hidden_states)]):
                self.model(input_ids=tokens_BL, use_cache=False)
            hidden_BLD = caught[0]
        self._add_seconds_since(start)
        return hidden_BLD

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the logits [C, V] of hidden states, in the model's dtype. Row c predicts token c + 1."""
        hidden_CD = hidden_CD.to(self.device)
        if self._body is None:
            return hidden_CD
        start = perf_counter()
        logits_CV = self._run_head(hidden_CD)
        self._add_seconds_since(start)
        return logits_CV

    def free_body(self) -> None:
        """Free the memory of the body; afterwards only `logits` works."""
        if self._body is not None:
            self._body._modules.clear()

    def find_body(self, tokens_BL: Tensor) -> None:
        """Find the body by a run on the first two tokens. `hidden_states` calls this method too."""
        if self._is_searched or not any(True for _ in self.model.children()):
            return
        self._is_searched, tokens_BL = True, tokens_BL[:1, :2].to(self.device)
        called: list[nn.Module] = []
        outputs: dict[nn.Module, Any] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            called.append(module)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            outputs[module] = output

        inside = [module for module in self.model.modules() if module is not self.model]
        with (
            hooked([(module, before) for module in inside], before=True),
            hooked([(module, after) for module in inside]),
        ):
            logits_LV = self.model(input_ids=tokens_BL, use_cache=False).logits[0]
        output = outputs[called[0]] if called else None
        hidden_BLD = getattr(output, "last_hidden_state", None)
        if isinstance(hidden_BLD, Tensor) and hidden_BLD.shape[:-1] == tokens_BL.shape:
            self._body, self._output = called[0], type(output)
            if not torch.allclose(self._run_head(hidden_BLD[0]), logits_LV, rtol=1e-2, equal_nan=True):
                self._body = None

    def _run_head(self, hidden_CD: Tensor) -> Tensor:
        """Run the model with a body that returns the given hidden states."""
        assert self._body is not None
        output = self._body_output(hidden_CD[None])
        # An attribute of the instance hides the class's method until it is deleted.
        self._body.forward = lambda *args, **kwargs: output
        try:
            tokens_BC = torch.zeros(1, len(hidden_CD), dtype=torch.int64, device=self.device)
            return self.model(input_ids=tokens_BC, use_cache=False).logits[0]
        finally:
            del self._body.forward

    def _body_output(self, hidden_BLD: Tensor) -> Any:
        assert self._output is not None
        return self._output(last_hidden_state=hidden_BLD)

    def _add_seconds_since(self, start: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += perf_counter() - start
