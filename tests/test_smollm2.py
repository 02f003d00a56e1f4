"""The small real model that scripts/smollm2.py makes is complete and behaves as published."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.model


def test_checkpoint_has_bfloat16_weights_and_the_tied_embedding_once(smollm2):
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert len(names) == 272
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_tokenizer_splits_digits_and_decodes_to_the_same_text(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "In 2024:\n\n   17 geese"
    # Digits are split off first, so all white space before 17 is one token.
    assert tokenizer.tokenize(text) == ["In", "Ġ", "2", "0", "2", "4", ":", "ĊĊĠĠĠ", "1", "7", "Ġgeese"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192


def test_chat_answers_a_question_and_ends(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, local_files_only=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
