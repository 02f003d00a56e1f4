"""The tiny models and their tokenizer are good enough to test with."""

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_model_predictions_depend_on_the_tokens(tiny_model, architecture):
    folder = tiny_model(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokens_BL = torch.randint(2, VOCAB_SIZE, (1, 100), generator=torch.Generator().manual_seed(0))
    other_BL = tokens_BL.clone()
    other_BL[0, 50] = (other_BL[0, 50] + 1) % VOCAB_SIZE
    with torch.inference_mode():
        logits, other = model(tokens_BL).logits, model(other_BL).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(logits[:, :50], other[:, :50])
    assert (logits[:, 50:] - other[:, 50:]).abs().amax(-1).min() > 1e-4
    assert AutoTokenizer.from_pretrained(folder).get_chat_template()


def test_tiny_tokenizer_round_trips_any_text():
    tokenizer = tiny_tokenizer()
    text = "def f(x):\n\treturn x ** 2  # père, 山\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
