"""`lora-converter merge`: the tools that need no training job."""

import argparse
import sys

import torch

from lora_converter.merge import merge_directories

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. A user's mistake ends in its message and exit code 1, without a traceback."""
    parser = argparse.ArgumentParser(prog="lora-converter", description="Low-rank adapters outside a training job.")
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="base + PEFT adapter -> merged Hugging Face directory")
    merge.add_argument("--base", required=True, help="Hugging Face directory of the base, safetensors")
    merge.add_argument("--adapter", required=True, help="PEFT directory")
    merge.add_argument("--output", required=True, help="directory to make; must not exist")
    merge.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base's own)")
    options = parser.parse_args(arguments)
    try:
        count = merge_directories(options.base, options.adapter, options.output, dtype=DTYPES.get(options.dtype))
    except (ValueError, OSError) as e:
        print(f"lora-converter: {e}", file=sys.stderr)
        return 1
    print(f"Merged {count} adapted linears of {options.adapter} into {options.base}: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
