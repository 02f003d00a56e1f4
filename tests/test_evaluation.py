"""Perplexity and divergence equal plain loops in float64, and hand-worked examples."""

import json
import math

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB_SIZE, random_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig

from llmquant.errors import UserError
from llmquant.eval import perplexity as perplexity_module
from llmquant.eval.body_and_head import BodyAndHead
from llmquant.eval.data import cut_windows, first_scored_token, token_windows
from llmquant.eval.divergence import (
    BLOCK_TOKENS,
    divergence,
    mean_interval,
    record_reference,
    student_975,
    token_divergence,
)
from llmquant.eval.perplexity import perplexity, summarize_losses, token_losses
from llmquant.models.skeleton import context_length


class FixedLogits(nn.Module):
    """A model that returns the same logits for every window."""

    def __init__(self, logits_LV: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits_LV)

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.logits[None]})


def random_windows(num_windows=3, seq_len=40, seed=0):
    return torch.randint(2, VOCAB_SIZE, (num_windows, seq_len), generator=torch.Generator().manual_seed(seed))


def plain_losses(logits_LV, tokens_L):
    """-log softmax of every next token, one after the other, in float64."""
    losses = []
    for position in range(len(tokens_L) - 1):
        row = logits_LV[position].double()
        losses.append((row.exp().sum().log() - row[tokens_L[position + 1]]).item())
    return losses


@pytest.mark.parametrize(
    ("model_type", "length"),
    [
        ("xlnet", math.inf),
        ("bloom", math.inf),
        ("gpt2", 1024),
        ("opt", 2048),
        ("llama", 2048),
        ("gemma3", 131_072),
        ("mpt", 2048),
        ("whisper", 448),
    ],
)
def test_context_length_is_the_bound_in_the_config_or_infinite(model_type, length):
    assert context_length(AutoConfig.for_model(model_type)) == length


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_perplexity_equals_plain_loop_in_float64(architecture):
    model = random_model(ARCHITECTURES[architecture]())
    windows_WL = random_windows()
    with torch.inference_mode():
        losses = [plain_losses(model(tokens_L[None]).logits[0], tokens_L) for tokens_L in windows_WL]
    means = [math.fsum(window) / len(window) for window in losses]
    mean = math.fsum(means) / 3
    spread = math.sqrt(sum((value - mean) ** 2 for value in means) / 2)

    measured = perplexity(model, windows_WL)
    assert measured.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert measured.standard_error == pytest.approx(math.exp(mean) * spread / math.sqrt(3), rel=1e-4)
    assert (measured.num_windows, measured.seq_len, measured.num_tokens) == (3, 40, 117)


def test_divergence_equals_plain_loop_in_float64():
    config = ARCHITECTURES["llama"]()
    reference = random_model(config, seed=0)
    model = random_model(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    windows_WL = random_windows()
    kls, agreements = [], []
    with torch.inference_mode():
        for tokens_L in windows_WL:
            p_LV = reference(tokens_L[None]).logits[0].double().softmax(-1)
            q_LV = model(tokens_L[None]).logits[0].double().softmax(-1)
            for position in range(len(tokens_L) - 1):
                p_V, q_V = p_LV[position].tolist(), q_LV[position].tolist()
                kls.append(math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(p_V, q_V, strict=True)))
                agreements.append(p_V.index(max(p_V)) == q_V.index(max(q_V)))
    kls.sort()

    measured = divergence(model, reference, windows_WL)
    assert measured.kl_mean > 1e-3
    assert 0 < measured.top1_agreement < 1
    assert measured.kl_mean == pytest.approx(math.fsum(kls) / len(kls), rel=1e-4)
    assert measured.kl_median == pytest.approx(kls[len(kls) // 2], rel=1e-3)
    assert measured.kl_p99 == pytest.approx(kls[round(0.99 * len(kls)) - 1], rel=1e-3)
    assert measured.top1_agreement == pytest.approx(sum(agreements) / len(agreements))
    assert measured.reference == perplexity(reference, windows_WL)
    assert measured.model == perplexity(model, windows_WL)
    assert json.loads(json.dumps(measured.to_dict()))["model"]["num_tokens"] == 117


def test_perplexity_of_a_uniform_guess_is_the_size_of_the_vocabulary():
    measured = perplexity(FixedLogits(torch.full((40, VOCAB_SIZE), 3.0)), random_windows())
    assert measured.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert measured.standard_error == pytest.approx(0, abs=1e-3)


def test_divergence_of_known_distributions():
    reference_TV = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.1, 0.0]]).log()
    model_TV = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    kl_T, same_T = token_divergence(reference_TV, model_TV)
    # 0.5 ln 2 - 0.25 ln 2, and 0.9 ln (9/8): the token with probability 0 adds nothing.
    assert kl_T.tolist() == pytest.approx([0.25 * math.log(2), 0.9 * math.log(9 / 8)], rel=1e-5)
    assert same_T.tolist() == [False, True]


def test_a_model_does_not_diverge_from_itself():
    model = random_model(ARCHITECTURES["llama"]())
    measured = divergence(model, model, random_windows())
    assert (measured.kl_mean, measured.kl_p99, measured.top1_agreement) == (0.0, 0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("architecture", ["llama", "cohere2"])
def test_chunks_do_not_change_the_result(architecture, chunk, monkeypatch):
    config = ARCHITECTURES[architecture]()
    model, reference, windows_WL = random_model(config, seed=1), random_model(config), random_windows()
    expected = divergence(model, reference, windows_WL)
    split = perplexity_module.ScoredWindow.chunks
    monkeypatch.setattr(perplexity_module.ScoredWindow, "chunks", lambda self: split(self, chunk))
    monkeypatch.setattr("llmquant.eval.divergence.CHUNK_POSITIONS", chunk)
    measured = divergence(model, reference, windows_WL)
    assert measured.kl_mean == pytest.approx(expected.kl_mean, rel=1e-5)
    assert measured.top1_agreement == expected.top1_agreement
    assert measured.model.mean_loss == pytest.approx(expected.model.mean_loss, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_body_and_head_give_the_logits_of_the_model_a_few_positions_at_a_time(architecture):
    model = random_model(ARCHITECTURES[architecture]())
    windows_BL = random_windows(2)
    with torch.inference_mode():
        whole_BLV = model(input_ids=windows_BL).logits
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: widths.append(out.shape[:-1].numel()))
    body_and_head = BodyAndHead(model)
    hidden_BLD = body_and_head.hidden_states(windows_BL)
    assert hidden_BLD.shape == (2, 40, 64)
    body_and_head.free_body()
    for hidden_LD, whole_LV in zip(hidden_BLD, whole_BLV, strict=True):
        logits_LV = torch.cat([body_and_head.logits(hidden_CD) for hidden_CD in hidden_LD.split(7)])
        assert torch.allclose(logits_LV, whole_LV, rtol=1e-4, atol=1e-4)
    assert max(widths) == 7


def test_a_model_whose_logits_depend_on_more_than_the_hidden_states_runs_as_a_whole():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = random_model(ARCHITECTURES["llama"]())
            self.config = self.inner.config

        def forward(self, input_ids, use_cache):
            output = self.inner.model(input_ids=input_ids, use_cache=use_cache)
            bias_LV = nn.functional.one_hot(input_ids[0], VOCAB_SIZE)
            output.logits = self.inner.lm_head(output.last_hidden_state) + bias_LV
            return output

    model = Mixed().eval()
    windows_WL = random_windows()
    with torch.inference_mode():
        losses = [plain_losses(model(tokens_L[None], False).logits[0], tokens_L) for tokens_L in windows_WL]
    assert BodyAndHead(model).hidden_states(windows_WL[:1]).shape == (1, 40, VOCAB_SIZE)
    assert perplexity(model, windows_WL).mean_loss == pytest.approx(math.fsum(map(math.fsum, losses)) / 117, rel=1e-6)


@pytest.mark.slow
def test_batch_size_does_not_change_the_result():
    config = ARCHITECTURES["llama"]()
    model, reference, windows_WL = random_model(config, seed=1), random_model(config), random_windows(5)
    expected = divergence(model, reference, windows_WL)
    measured = divergence(model, reference, windows_WL, batch_size=2)
    assert measured.kl_mean == pytest.approx(expected.kl_mean, rel=1e-5)
    assert measured.model.perplexity == pytest.approx(expected.model.perplexity, rel=1e-6)
    with pytest.raises(UserError, match="batch_size 0: must be at least 1"):
        perplexity(model, windows_WL, batch_size=0)


def test_a_recorded_reference_serves_several_models():
    config = ARCHITECTURES["llama"]()
    reference, windows_WL = random_model(config), random_windows()
    expected = [divergence(random_model(config, seed=seed), reference, windows_WL) for seed in (1, 2)]
    recorded = record_reference(reference, windows_WL)
    recorded.body_and_head.free_body()
    assert not list(reference.model.children())
    assert [divergence(random_model(config, seed=seed), recorded, windows_WL) for seed in (1, 2)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 15, 39, 40])
def test_strided_windows_score_every_token_once_from_the_longest_context(stride):
    model = random_model(ARCHITECTURES["llama"]())
    tokens_T = torch.randint(2, VOCAB_SIZE, (100,), generator=torch.Generator().manual_seed(0))
    windows_WL = cut_windows(tokens_T, 40, stride)
    losses, end = [], 1
    with torch.inference_mode():
        for begin in range(0, 100 - 40 + 1, stride):
            window_losses = plain_losses(model(tokens_T[None, begin : begin + 40]).logits[0], tokens_T[begin:][:40])
            end = max(end, begin + 1)
            losses += window_losses[end - begin - 1 :]
            end = begin + 40
    measured = perplexity(model, windows_WL, stride=stride)
    assert measured.num_tokens == len(losses)
    assert measured.mean_loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    assert (measured.num_windows, measured.stride) == (len(windows_WL), stride)


def test_first_scored_token_of_overlapping_windows():
    assert [first_scored_token(index, 8, 3) for index in (0, 1, 2)] == [1, 5, 5]
    assert [first_scored_token(index, 8, 8) for index in (0, 1)] == [1, 1]


@pytest.mark.parametrize("stride", [0, 41])
def test_stride_that_stands_still_or_skips_text_is_refused(stride):
    with pytest.raises(UserError, match=rf"stride {stride}: must lie between 1 and the window's 40 tokens"):
        cut_windows(torch.arange(100), 40, stride)


def test_loss_is_computed_in_float32_for_a_half_precision_model():
    logits_TV = (torch.randn(39, 5000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    tokens_L = torch.arange(40)
    exact = math.fsum(plain_losses(torch.cat([logits_TV, logits_TV[-1:]]), tokens_L)) / 39
    assert token_losses(logits_TV, tokens_L[1:]).mean().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_an_error_and_names_the_window(bad):
    class Breaks(FixedLogits):
        calls = 0

        def forward(self, input_ids, use_cache):
            self.calls += 1
            output = super().forward(input_ids, use_cache)
            if self.calls == 2:
                output.logits = output.logits.clone()
                output.logits[0, 5, 7] = bad
            return output

    with pytest.raises(UserError, match=r"window 1: the loss is (nan|inf).*--dtype float32"):
        perplexity(Breaks(torch.zeros(40, VOCAB_SIZE)), random_windows())


def test_infinite_divergence_is_an_error():
    logits_LV = torch.zeros(40, VOCAB_SIZE)
    never_LV = logits_LV.clone()
    never_LV[:, 0] = -math.inf
    with pytest.raises(UserError, match="KL divergence is inf"):
        divergence(FixedLogits(never_LV), FixedLogits(logits_LV), random_windows())


def test_models_with_different_vocabularies_are_refused():
    with pytest.raises(UserError, match="vocabulary of 600 against 512"):
        divergence(FixedLogits(torch.zeros(40, 600)), FixedLogits(torch.zeros(40, VOCAB_SIZE)), random_windows())


def test_one_window_has_no_standard_error():
    windows_WL = torch.zeros(1, 8, dtype=torch.int64)
    assert summarize_losses([torch.ones(7, dtype=torch.float64)], windows_WL, None, 1.0).standard_error is None


def test_on_window_is_called_after_every_window():
    seen = []
    perplexity(FixedLogits(torch.zeros(40, VOCAB_SIZE)), random_windows(), lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_windows_are_consecutive_pieces_of_the_tokenized_text():
    tokenizer = tiny_tokenizer()
    text = "for x in range(10): print(x)\n" * 40
    tokens = tokenizer(text)["input_ids"]
    windows_WL = token_windows(tokenizer, text, seq_len=32)
    assert windows_WL.shape == (len(tokens) // 32, 32)
    assert windows_WL.flatten().tolist() == tokens[: windows_WL.numel()]
    assert torch.equal(token_windows(tokenizer, text, seq_len=32, num_windows=2), windows_WL[:2])


@pytest.mark.parametrize(
    ("seq_len", "num_windows", "message"),
    [
        (32, 9, r"short\.txt: 13 tokens make 0 windows of 32, but 9 are requested"),
        (64, None, "0 windows of 64, but 1 are requested"),
        (1, None, "seq_len 1: at least 2"),
        (8, 0, "windows 0: at least 1"),
    ],
)
def test_windows_that_the_text_cannot_fill_are_refused(seq_len, num_windows, message):
    with pytest.raises(UserError, match=message):
        token_windows(tiny_tokenizer(), "a " * 12, seq_len, num_windows, source="short.txt")


@pytest.mark.model
def test_perplexity_and_divergence_of_a_real_model_equal_plain_loops(smollm2):
    """The model in bfloat16 against itself in float32: exact arithmetic must reproduce the small divergence."""
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, local_files_only=True).eval()
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows_WL = token_windows(tokenizer, topics["assignment"], seq_len=128, num_windows=2)
    losses, kls = [], []
    with torch.inference_mode():
        for tokens_L in windows_WL:
            logits_LV, other_LV = (m(tokens_L[None]).logits[0].double() for m in (reference, model))
            losses += plain_losses(logits_LV, tokens_L)
            log_p_LV, log_q_LV = logits_LV.log_softmax(-1), other_LV.log_softmax(-1)
            kls += (log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1)[:-1].tolist()
    measured = divergence(model, reference, windows_WL)
    assert measured.reference.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    assert 1e-5 < measured.kl_mean < 0.05
    assert measured.kl_mean == pytest.approx(math.fsum(kls) / len(kls), rel=1e-3)
    # The perplexity of a model with damaged weights would be far higher.
    assert 2 < measured.reference.perplexity < 40
    assert measured.reference == perplexity(reference, windows_WL)


@pytest.mark.model
def test_eval_of_a_quantized_checkpoint_against_the_original_equals_a_plain_loop(smollm2, tmp_path):
    """The loop runs transformers' own model on the dequantized weights."""
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import llmquant
    from llmquant.checkpoints.quantized import read_quantized, validate_quantized
    from llmquant.checkpoints.reader import CheckpointReader
    from llmquant.runtime.evaluate import evaluate

    recipe = llmquant.Recipe(method="rtn", spec=llmquant.QuantSpec(group_size=64))
    llmquant.quantize(smollm2, tmp_path / "small", recipe, llmquant.Options(verify=False))
    text = tmp_path / "text.txt"
    text.write_text(topics["assignment"])
    models = [
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, local_files_only=True).eval() for _ in "ab"
    ]
    reader = CheckpointReader(tmp_path / "small")
    for name, packed in validate_quantized(reader).items():
        models[1].get_submodule(name).weight.data.copy_(read_quantized(reader, packed).dequantize())
    tokens_T = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(text.read_text())["input_ids"])
    losses, kls = [], []
    with torch.inference_mode():
        for tokens_L in tokens_T[:192].view(2, 96):
            log_p_LV, log_q_LV = (model(tokens_L[None]).logits[0].double().log_softmax(-1) for model in models)
            losses += [-log_q_LV[at - 1, tokens_L[at]].item() for at in range(1, 96)]
            kls += (log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1)[:-1].tolist()
    small = str(tmp_path / "small")
    measured = evaluate([small], str(smollm2), dataset=str(text), seq_len=96, num_windows=2, dtype="float32").models[0]
    assert measured.divergence.kl_mean == pytest.approx(math.fsum(kls) / len(kls), rel=1e-4)
    assert measured.perplexity.mean_loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert 0.05 < measured.divergence.kl_mean < 2


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees_of_freedom", "quantile"), [(3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (71, 1.994)]
)
def test_quantile_of_students_t_equals_the_published_table(degrees_of_freedom, quantile):
    assert student_975(degrees_of_freedom) == pytest.approx(quantile, rel=0.01)


def test_interval_equals_a_hand_worked_example():
    values = [torch.tensor([1.0, 1.0, 3.0, 3.0]).repeat_interleave(BLOCK_TOKENS)]
    low, high = mean_interval(values)
    # The block means 1, 1, 3, 3 have mean 2 and variance 4 / 3; the standard error over 4 blocks is 1 / sqrt(3).
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(student_975(3) * 3**-0.5)
    assert mean_interval([values[0][: 3 * BLOCK_TOKENS]]) is None, "three blocks are too few"
    assert mean_interval([torch.ones(10), torch.ones(7), torch.ones(7), torch.ones(7)]) == pytest.approx((1, 1))


def test_interval_covers_the_mean_about_95_percent_of_the_time_for_correlated_tokens():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        noise = torch.randn(9, 511 + 8, generator=generator)
        windows = list(noise.unfold(1, 9, 1).sum(-1))  # each value is correlated with its eight neighbours
        low, high = mean_interval(windows)
        covered += low < 0 < high
    assert 180 <= covered <= 198
