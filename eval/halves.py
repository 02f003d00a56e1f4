"""A causal language model in two halves: hidden states of whole windows, then logits of a few positions at a time.

The logits of a window are the largest tensor of an evaluation (32,768 positions x 128k tokens of vocabulary x 2 bytes =
8 GiB), and most of what is kept of a reference would be logits. The hidden states in front of the head are some hundred
times smaller. So the body runs on whole windows, and the model's own forward turns hidden states into logits, chunk by
chunk, with whatever it does behind the head (scales, soft caps): for that time the body is stood in for by the states.

Which module is the body is seen by running two tokens: the first module that the model calls, if it gives hidden
states, and if what the model makes of them again is what it made of them before. A model without such a body is taken
as a whole: its hidden states are then its logits.

Letters: B windows side by side, L tokens of a window, D hidden size, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn


class Halves:
    """A model, its body and what stands behind it, and how long they took."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device if device is None else device
        self.seconds = 0.0
        """Wall time of both halves so far."""
        self._is_known = False
        self._body: nn.Module | None = None
        self._output: type[Any] | None = None

    def hidden(self, tokens_BL: Tensor) -> Tensor:
        """[B, L, D] in the model's dtype on its device, from int64 [B, L]: what the head will see."""
        tokens_BL = tokens_BL.to(self.device)
        self.find_body(tokens_BL)
        start = perf_counter()
        if self._body is None:
            hidden_BLD = self.model(input_ids=tokens_BL, use_cache=False).logits
        else:
            caught: list[Any] = []
            handle = self._body.register_forward_hook(lambda module, args, output: self._caught(output, caught))
            try:
                self.model(input_ids=tokens_BL, use_cache=False)
            finally:
                handle.remove()
            hidden_BLD = caught[0]
        self._count(start)
        return hidden_BLD

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] in the model's dtype: row c predicts the token after that position."""
        hidden_CD = hidden_CD.to(self.device)
        if self._body is None:
            return hidden_CD
        start = perf_counter()
        logits_CV = self._behind_body(hidden_CD)
        self._count(start)
        return logits_CV

    def forget_body(self) -> None:
        """Give back the memory of the body; afterwards only `logits` works."""
        if self._body is not None:
            self._body._modules.clear()

    def find_body(self, tokens_BL: Tensor) -> None:
        """Run the first two tokens to see which module is the body; `hidden` does so when it is first called."""
        if self._is_known or not any(True for _ in self.model.children()):
            return
        self._is_known, tokens_BL = True, tokens_BL[:1, :2].to(self.device)
        entered: list[nn.Module] = []
        outputs: dict[nn.Module, Any] = {}
        handles = []
        for module in self.model.modules():
            if module is not self.model:
                handles.append(module.register_forward_pre_hook(lambda module, args: entered.append(module)))
                handles.append(module.register_forward_hook(lambda module, args, out: outputs.update({module: out})))
        try:
            logits_LV = self.model(input_ids=tokens_BL, use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        output = outputs[entered[0]] if entered else None
        hidden_BLD = getattr(output, "last_hidden_state", None)
        if isinstance(hidden_BLD, Tensor) and hidden_BLD.shape[:-1] == tokens_BL.shape:
            self._body, self._output = entered[0], type(output)
            if not torch.allclose(self._behind_body(hidden_BLD[0]), logits_LV, rtol=1e-2, equal_nan=True):
                self._body = None

    def _behind_body(self, hidden_CD: Tensor) -> Tensor:
        assert self._body is not None and self._output is not None
        output = self._output(last_hidden_state=hidden_CD[None])
        # An attribute of the instance hides the class's method until it is deleted.
        self._body.forward = lambda *args, **kwargs: output
        try:
            tokens_BC = torch.zeros(1, len(hidden_CD), dtype=torch.int64, device=self.device)
            return self.model(input_ids=tokens_BC, use_cache=False).logits[0]
        finally:
            del self._body.forward

    def _caught(self, output: Any, caught: list[Any]) -> Any:
        """Keep the hidden states; the head sees one position in this pass, because it has to see something. Only of one
        window: torch would copy the head's weight for each of several."""
        assert self._output is not None
        caught.append(output.last_hidden_state)
        return self._output(last_hidden_state=output.last_hidden_state[:1, :1])

    def _count(self, start: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += perf_counter() - start
