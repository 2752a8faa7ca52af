"""`lora.base_format` on torchtitan: the packing of a model before it gets adapters."""

from collections import Counter

import torch.nn as nn
from torchtitan.tools.logging import logger

from lora_converter.experts import ExpertClasses
from lora_converter.figures import short
from lora_converter.hf.naming import StateDictAdapter
from lora_converter.hf.quantized import packed_parts, quantization_everywhere
from lora_converter.packed_formats import FORMATS
from lora_converter.packing import Packing, pack_model, packable
from lora_converter.run.job import AS_RELEASED, Job
from lora_converter.trained import modules_with_parameters, select_trained


def check_base_is_loaded(job: Job) -> None:
    """Refuses to train on packed weights that nothing has been read into.

    Raises:
        ValueError: The job reads no base.
    """
    if job.config.base_format:
        raise ValueError(
            f"lora.base_format = {job.config.base_format!r}, but nothing is loaded with checkpoint.enable = false. Set "
            "it to true, and checkpoint.initial_load_path to a pretrained base."
        )


def pack_base(model: nn.Module, job: Job, adapter: StateDictAdapter | None, expert_classes: ExpertClasses) -> None:
    """Packs the weights of a model on the meta device, before it gets adapters, as `lora.base_format` says.

    What its Hugging Face folder has packed in a way that fits keeps that, to be read without rounding it again.

    Raises:
        ValueError: The folder is quantized in a way that is not read, or not at all where its format is to be kept.
    """
    form, base = job.config.base_format, job.base
    option = f"lora.base_format = {form!r}"
    shapes = packable(model, expert_classes)
    trained = select_trained(modules_with_parameters(model), job.config.train_also, strict=False)
    if dense := [name for name in shapes if name.rpartition(".")[0] in trained]:
        logger.info(f"LoRA: not packed, since lora.train_also names them: {', '.join(dense)}.")
        shapes = {name: shape for name, shape in shapes.items() if name not in dense}
    stored: dict[str, str] = {}
    if (
        base is not None
        and base.format == "hf"
        and adapter is not None
        and (folder := quantization_everywhere(base.path))
    ):
        found = {name: packed_parts(adapter, name, shape, folder.formats) for name, shape in shapes.items()}
        stored = {name: folder.formats[parts[0].name] for name, parts in found.items() if parts}
    if form == AS_RELEASED:
        if base is None:
            raise ValueError(
                f'{option} depends on the folder of the base, and none is read here, as in every plan. Set "nf4", or '
                "in a job checkpoint.enable = true and checkpoint.initial_load_path."
            )
        if not stored:
            raise ValueError(
                f"{option}: {base.path} has no weights that are packed in a way that can be kept (bitsandbytes NF4, "
                'MXFP4, fp8 in blocks). Set it to "nf4" to pack them, or leave it out.'
            )
        formats = stored
    else:
        # One format, though what the folder has not packed needs no absmaxes in fp32: experts have one, and adapters
        # know their base by it.
        own = sorted({kept for kept in stored.values() if kept.startswith(form)})
        formats = dict.fromkeys(shapes, own[-1] if own else form)
    logger.info(_describe(pack_model(model, formats, expert_classes=expert_classes)))
    if base is not None and "nf4-fp32" in formats.values():
        logger.info(
            f"LoRA: bf16 does not hold the absmaxes of {base.path}, so they are kept in fp32, as they are there."
        )


def _describe(done: Packing) -> str:
    counts = Counter(done.packed.values())
    packed = " and ".join(
        f"{count} weights packed as {form} ({_bits(form):.3g} bits each)" for form, count in counts.items()
    )
    left = ", ".join(f"{name} ({columns} columns)" for name, columns in done.left.items())
    return f"LoRA: {packed or 'no weight packed'}, {short(done.saved)} bytes less than in bf16." + (
        f" Not packed, since their columns, or those of their experts' other weights, are no whole number of blocks: "
        f"{left}."
        if left
        else ""
    )


def _bits(form: str) -> float:
    return 8 * FORMATS[form].block_bytes / FORMATS[form].block
