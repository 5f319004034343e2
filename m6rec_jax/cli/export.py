"""`m6rec export`: the weights of a run for other programs."""

from __future__ import annotations

from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser


def export(argv: list[str]) -> None:
    """Write the weights as safetensors or as a Llama folder."""
    parser = Parser(
        prog="m6rec export",
        usage="m6rec export --run RUN --format safetensors|llama --out FOLDER [--step best|latest|N] [--dtype float32|bfloat16]",
        description="Write the weights of a run for other programs: all parameters by name, or a folder that Hugging Face\n"
        "transformers opens as a LlamaForCausalLM, with the item codes as further rows of its vocabulary.\n\n"
        "example:\n  m6rec export --run runs/shop --format llama --out exported/shop",
    )  # fmt: skip
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote")
    add("--format", required=True, choices=["safetensors", "llama"], help="every parameter by its path, or a Llama")
    add("--out", required=True, metavar="FOLDER", help="the folder to make")
    add("--step", default="best", metavar="STEP", help="best, latest, or the number of a checkpoint")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="how numbers are stored")
    options = parser.parse(argv)
    out = folder_to_write("--out", options.out)
    from m6rec_jax.recommend.export import export as write

    step, files = write(options.run, out, options.format, step=options.step, dtype=options.dtype)
    note(f"wrote {out}: step {step} as {options.format}, {options.dtype}; {', '.join(files)}")
