"""The part of `scripts/interop/interop.py` that runs inside the environment of another tool.

    PYTHON interop_tools.py REQUESTS.json FOLDER

The script imports torch, safetensors and the tool, but never llmquant. Each request has a `name`, a `task` (a key of
TASKS), the `folder` of a checkpoint and a `prompt` (token ids). `…_write` tasks also have `out` (the folder to write),
`format`, `grid` (bits, group_size, symmetric, …) and `texts` (token ids to calibrate with).

The answer is `FOLDER/<name>.safetensors`. It holds those of these tensors that the task returns: `dense.<linear>`, the
weight [N, K] as the tool's own code applies or dequantizes it; `logits` [L, V] of the prompt in float32; `greedy` [T],
the tokens that the tool generates after the prompt; and `top1`, see `vllm_read`. A request that fails leaves
`FOLDER/<name>.error` instead, with the first line of the tool's error message.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
# On two cores, GPTQModel needs more workers than its default. Without dynamo, it does not spend minutes compiling.
os.environ |= {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}

import torch
from safetensors.torch import load_file, save_file

NEW_TOKENS = 16

Answer = dict[str, torch.Tensor]
Request = dict[str, Any]


def packed_linears(folder: str) -> list[str]:
    """Return the names of the packed linears of a checkpoint."""
    names = [name for shard in sorted(Path(folder).glob("*.safetensors")) for name in load_file(shard)]
    return [name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".weight_packed"))]


@torch.inference_mode()
def observe(model: Any, request: Request, folder: str) -> Answer:
    """Return the answer of a torch model: its linears applied to one-hot rows, its logits and its greedy tokens."""
    answer: Answer = {}
    tokens = torch.tensor([request["prompt"]])
    logits = model(input_ids=tokens).logits[0]
    for name in packed_linears(folder):
        linear = model.get_submodule(name)
        one_hot = torch.eye(linear.in_features, dtype=logits.dtype)
        bias = getattr(linear, "bias", None)
        answer[f"dense.{name}"] = (linear(one_hot) - (0 if bias is None else bias)).T.contiguous()
    generated = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    return answer | {"logits": logits.float(), "greedy": generated[0, tokens.shape[1] :]}


# --- compressed-tensors, alone and as part of transformers -----------------------------------------------------------


def transformers_read(request: Request) -> Answer:
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    folder = request["folder"]
    method = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    # Use GPTQModel's kernel in plain torch. The kernels that it would choose compile for minutes and round more.
    plain: dict[str, Callable[[], dict[str, Any]]] = {
        "gptq": lambda: {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")},
        "awq": lambda: {"quantization_config": AwqConfig(bits=4, backend="torch_awq")},  # type: ignore[arg-type]
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **plain.get(method, dict)())
    return observe(model.eval(), request, folder)


def compressed_tensors_read(request: Request) -> Answer:
    """Decompress each linear with the scheme that config.json gives it, without a model."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = Path(request["folder"])
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = QuantizationConfig.model_validate(config).config_groups
    tensors = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
    answer = {}
    for name in packed_linears(request["folder"]):
        state = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
        scheme = next(s for s in schemes.values() if name in s.targets or "Linear" in s.targets)
        answer[f"dense.{name}"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].contiguous()
    return answer


def weight_scheme(grid: dict[str, Any]) -> dict[str, Any]:
    """Return the `weights` of a config group."""
    per_channel = grid["group_size"] == -1
    return {
        "num_bits": grid["bits"],
        "type": "int",
        "symmetric": grid["symmetric"],
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else grid["group_size"],
        **({"actorder": grid["actorder"]} if "actorder" in grid else {}),
    }


def compressed_tensors_write(request: Request) -> Answer:
    """Compute ranges and pack with the code of compressed-tensors, and save as llm-compressor does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto").eval()
    group = {"targets": ["Linear"], "weights": weight_scheme(request["grid"])}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        size = scheme.weights.group_size or module.weight.shape[1]
        grouped = module.weight.detach().unflatten(1, (-1, size))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(request["out"])
    compressor.update_config(request["out"])
    return compressed_tensors_read(request | {"folder": request["out"]})


# --- llm-compressor --------------------------------------------------------------------------------------------------


def llmcompressor_write(request: Request) -> Answer:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto")
    grid = dict(request["grid"])
    rounding = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[grid.pop("method")]
    group = {"targets": ["Linear"], "weights": weight_scheme(grid)}
    texts = request["texts"]
    data = Dataset.from_dict({"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts]})
    oneshot(
        model=model,
        recipe=rounding(config_groups={"group_0": group}, ignore=["lm_head"]),
        dataset=data,
        num_calibration_samples=len(texts),
        max_seq_length=len(texts[0]),
    )
    model.save_pretrained(request["out"], save_compressed=True)
    return transformers_read(request | {"folder": request["out"]})


# --- GPTQModel -------------------------------------------------------------------------------------------------------


def gptqmodel_read(request: Request) -> Answer:
    from gptqmodel import BACKEND, GPTQModel

    folder = Path(request["folder"])
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    # By default, GPTQModel computes in bfloat16 if the processor can, and rounds float16 scales to it.
    tensors = load_file(next(folder.glob("*.safetensors")))
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.endswith(".scales"))
    loaded = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=dtype)
    return observe(loaded.model, request, request["folder"])


def gptqmodel_write(request: Request) -> Answer:
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig

    grid = request["grid"]
    config = QuantizeConfig(
        bits=grid["bits"],
        group_size=grid["group_size"],
        sym=grid["symmetric"],
        desc_act=grid.get("desc_act", False),
        method=METHOD.AWQ if request["format"] == "awq" else METHOD.GPTQ,
        format=FORMAT.GEMM if request["format"] == "awq" else FORMAT(request["format"]),
        act_group_aware=False,
        **({"dynamic": grid["dynamic"]} if "dynamic" in grid else {}),
    )
    model = GPTQModel.load(request["folder"], config, device="cpu", dtype=torch.float16)
    model.quantize([{"input_ids": text, "attention_mask": [1] * len(text)} for text in request["texts"]], batch_size=1)
    model.save(request["out"])
    return gptqmodel_read(request | {"folder": request["out"]})


# --- AutoRound -------------------------------------------------------------------------------------------------------


def autoround_write(request: Request) -> Answer:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    grid = request["grid"]
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto")
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request["folder"]),
        bits=grid["bits"],
        group_size=grid["group_size"],
        sym=grid["symmetric"],
        iters=grid["iters"],
        nsamples=len(request["texts"]),
        seqlen=len(request["texts"][0]),
        batch_size=4,
        dataset=[torch.tensor([text]) for text in request["texts"]],
        enable_torch_compile=False,
        device_map="cpu",
    )
    # AutoRound writes each format into a folder of its own. The folder "fake" holds the dequantized weights.
    rounding.quantize_and_save(request["out"], format=f"auto_{request['format']},fake")
    (written,) = [path.parent for path in Path(request["out"]).glob("*/*/config.json") if path.parent.name != "fake"]
    dense = load_file(written.parent / "fake" / "model.safetensors")
    answer = {f"dense.{name}": dense[f"{name}.weight"] for name in packed_linears(str(written))}
    for path in written.iterdir():
        path.rename(Path(request["out"]) / path.name)
    return answer


# --- AutoAWQ ---------------------------------------------------------------------------------------------------------


def autoawq_write(request: Request) -> Answer:
    from awq import AutoAWQForCausalLM
    from transformers import PreTrainedTokenizerFast

    grid = request["grid"]
    model = AutoAWQForCausalLM.from_pretrained(request["folder"], device_map="cpu", torch_dtype=torch.float16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(request["folder"]) / "tokenizer.json"))
    model.quantize(
        tokenizer,
        quant_config={"w_bit": 4, "q_group_size": grid["group_size"], "zero_point": True, "version": "GEMM"},
        calib_data=request["texts"],
        max_calib_samples=len(request["texts"]),
        max_calib_seq_len=len(request["texts"][0]),
    )
    model.save_quantized(request["out"])
    return observe(model.model, request, request["out"])


# --- vLLM ------------------------------------------------------------------------------------------------------------


def vllm_read(request: Request) -> Answer:
    """Return `greedy` and `top1` [L-1], the most likely token after each prefix of the prompt."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(request["folder"], enforce_eager=True, max_model_len=512, max_num_seqs=1, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=1)
    (result,) = engine.generate([{"prompt_token_ids": request["prompt"]}], sampling)
    best = [min(ranked, key=lambda token: ranked[token].rank) for ranked in result.prompt_logprobs[1:]]
    return {"top1": torch.tensor(best), "greedy": torch.tensor(result.outputs[0].token_ids)}


TASKS: dict[str, Callable[[Request], Answer]] = {
    function.__name__: function
    for function in (
        transformers_read,
        compressed_tensors_read,
        compressed_tensors_write,
        llmcompressor_write,
        gptqmodel_read,
        gptqmodel_write,
        autoround_write,
        autoawq_write,
        vllm_read,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    requests, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for request in requests:
        print(f"=== {request['name']}", flush=True)
        try:
            save_file(TASKS[request["task"]](request), answers / f"{request['name']}.safetensors")
        except Exception as error:  # any error of the tool becomes a row of the table
            traceback.print_exc()
            message = str(error).strip().splitlines() or [""]
            (answers / f"{request['name']}.error").write_text(f"{type(error).__name__}: {message[0]}")


if __name__ == "__main__":
    main()
