"""`lora-converter merge | export | inspect | combine | plan | chat-data`: the tools that need no training job."""

import argparse
import logging
import sys
from pathlib import Path

import torch

from lora_converter.combine import combine, describe, parse_term, subtracted
from lora_converter.hf.peft_directory import PeftAdapter, is_peft_directory, load_peft, save_peft
from lora_converter.inspect import describe_adapter, describe_model
from lora_converter.merge import merge_directories
from lora_converter.titans.chosen import host_module

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. A user's mistake ends in its message and exit code 1, without a traceback."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if others and not hasattr(options, "host_options"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.host_options = others
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lora_converter").setLevel(logging.INFO)
    try:
        print(options.run(options))
    except (ValueError, OSError) as e:
        print(f"lora-converter: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-converter", description="Low-rank adapters outside a training job.")
    commands = parser.add_subparsers(dest="command", required=True)

    merge = commands.add_parser("merge", help="base + PEFT adapter -> merged Hugging Face directory")
    merge.add_argument("--base", required=True, help="Hugging Face directory of the base, safetensors")
    merge.add_argument("--adapter", required=True, help="PEFT directory")
    merge.add_argument("--output", required=True, help="directory to make; must not exist")
    merge.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base's own)")
    _add_base_as(merge, "the weights that the training had packed are merged as they were there")
    merge.set_defaults(run=_merge)

    export = commands.add_parser("export", help="step folder of a LoRA run -> PEFT directory")
    export.add_argument("--checkpoint", required=True, help="step folder, e.g. outputs/checkpoint/step-100")
    export.add_argument("--output", required=True, help="directory to make; must not exist")
    export.add_argument(
        "--base",
        default="",
        help="the adapter's base, to be recorded; read for DoRA and new tokens (default: the run's)",
    )
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the adapter (default: float32)")
    _add_import(export)
    export.set_defaults(run=_export)

    inspect = commands.add_parser("inspect", help="what an adapter or a merged model holds")
    inspect.add_argument("path", help="PEFT directory, step folder of a LoRA run, or merged directory")
    inspect.add_argument("--base", help="Hugging Face directory of the base: shows the size of each update beside it")
    _add_base_as(inspect, "shows beside each update what packing changed, of an adapter that does not record it")
    _add_import(inspect)
    inspect.set_defaults(run=_inspect)

    several = commands.add_parser("combine", help="several PEFT adapters -> one, the weighted sum of their updates")
    several.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="PEFT directory, e.g. my_adapter:0.7")
    several.add_argument("--output", required=True, help="directory to make; must not exist")
    several.add_argument(
        "--subtract", action="store_true", help="the first minus all the others, each times its weight"
    )
    several.add_argument(
        "--rank", type=int, help="at most, by SVD; its error is printed (default: exact, ranks add up)"
    )
    several.add_argument("--dtype", choices=DTYPES, help="of the result (default: the widest of the adapters')")
    several.add_argument("--base", help="Hugging Face directory of the base, unquantized; asked for where it is needed")
    several.add_argument("--accept-other-base", action="store_true", help="although the adapters name different bases")
    several.set_defaults(run=_combine)

    plan = commands.add_parser("plan", help="what a step of a job takes on each GPU, without one")
    plan.add_argument("config", help="TOML file of the job; torchtitan's options may follow, and win over it")
    plan.add_argument("--gpus", type=int, help="of the whole job (default: as many as its layout asks for)")
    plan.add_argument("--memory", type=float, default=80.0, help="of one GPU, GiB (default: 80)")
    plan.set_defaults(run=_plan, host_options=[])

    chat = commands.add_parser("chat-data", help="tokenises a job's conversations and shows what is trained")
    chat.add_argument("config", help="TOML file of the job")
    chat.add_argument("options", nargs=argparse.REMAINDER, help="torchtitan's options, which win over the file")
    chat.set_defaults(run=_chat_data)
    return parser


def _add_base_as(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--base-as", default="", metavar="FORMAT", help=f"nf4: {what}")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--import",
        dest="custom_import",
        default="",
        metavar="MODULE",
        help="module that registers the model, for a step folder (default: the run's experimental.custom_import)",
    )


def _merge(options: argparse.Namespace) -> str:
    count = merge_directories(
        options.base, options.adapter, options.output, dtype=DTYPES.get(options.dtype), base_as=options.base_as
    )
    return f"Merged {count} adapted modules of {options.adapter} into {options.base}: {options.output}"


def _export(options: argparse.Namespace) -> str:
    adapter = _read_step(options.checkpoint, options.custom_import, base=options.base)
    from lora_converter.run.export import tokenizer_of  # torchtitan's imports, as above

    save_peft(
        adapter, options.output, dtype=DTYPES[options.dtype], beside=tokenizer_of(options.checkpoint, options.base)
    )
    return f"Wrote {len(adapter.factors)} adapted modules as a PEFT directory: {options.output}"


def _inspect(options: argparse.Namespace) -> str:
    if is_peft_directory(options.path):
        return describe_adapter(load_peft(options.path), base=options.base, base_as=options.base_as)
    if any(Path(options.path).glob("*.safetensors")):
        return describe_model(options.path, base=options.base)
    adapter = _read_step(options.path, options.custom_import, base=options.base or "")
    return describe_adapter(adapter, base=options.base, base_as=options.base_as)


def _combine(options: argparse.Namespace) -> str:
    terms = [parse_term(text) for text in options.adapters]
    combined = combine(
        subtracted(terms) if options.subtract else terms,
        options.output,
        rank=options.rank,
        dtype=DTYPES.get(options.dtype),
        base=options.base,
        accept_other_base=options.accept_other_base,
    )
    text = describe(combined, per_module=options.rank is not None)
    return f"{text}\nCombined {len(terms)} adapters into a PEFT directory: {options.output}"


def _plan(options: argparse.Namespace) -> str:
    sys.path.insert(0, "")  # modules that the job imports, as under torchrun -m
    plan_job = host_module("plan", "`lora-converter plan`").plan_job
    logging.disable(logging.CRITICAL)  # torchtitan's and torch's log of a job that is built many times
    try:
        return str(plan_job(options.config, options.host_options, gpus=options.gpus, memory=options.memory))
    finally:
        logging.disable(logging.NOTSET)


def _chat_data(options: argparse.Namespace) -> str:
    show = host_module("chat_show", "`lora-converter chat-data`").show_chat_data
    return str(show(["--job.config_file", options.config, *options.options]))


def _read_step(path: str, custom_import: str, *, base: str = "") -> PeftAdapter:
    if custom_import:
        sys.path.insert(0, "")  # modules of the folder that the user stands in, as under torchrun -m
    from lora_converter.titans import cpu

    cpu.prepare()  # before torchtitan
    from lora_converter.run.peft_io import read_step_as_peft

    model_on_meta = host_module("models", "A step folder").model_on_meta
    return read_step_as_peft(path, model_on_meta, base=base, custom_import=custom_import)


if __name__ == "__main__":
    sys.exit(main())
