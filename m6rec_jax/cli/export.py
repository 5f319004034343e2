"""`m6rec export`: the weights of a run for other programs."""

from __future__ import annotations

from m6rec_jax.cli.outputs import file_to_write, folder_to_write
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser


def export(argv: list[str]) -> None:
    """Write the weights as safetensors, as a Llama folder, or as one file for small devices."""
    parser = Parser(
        prog="m6rec export",
        usage="m6rec export --run RUN --format safetensors|llama|edge --out FOLDER|FILE [--step best|latest|N] [--dtype float32|bfloat16]",
        description="Write the weights of a run for other programs: all parameters by name, or a folder that Hugging Face\n"
        "transformers opens as a LlamaForCausalLM, with the item codes as further rows of its vocabulary, or one file of int8\n"
        "that NumPy alone runs (docs/edge.md).\n\n"
        "example:\n  m6rec export --run runs/shop --format llama --out exported/shop",
    )  # fmt: skip
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote")
    add(
        "--format",
        required=True,
        choices=["safetensors", "llama", "edge"],
        metavar="FORMAT",
        help="safetensors, every parameter by its path; llama; or edge, a file for small devices",
    )
    add("--out", required=True, metavar="FOLDER|FILE", help="the folder to make; of edge, the file")
    add("--step", default="best", metavar="STEP", help="best, latest, or the number of a checkpoint")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="how numbers are stored; of edge as int8")
    options = parser.parse(argv)
    out = (file_to_write if options.format == "edge" else folder_to_write)("--out", options.out)
    from m6rec_jax.recommend.export import export as write

    step, files = write(options.run, out, options.format, step=options.step, dtype=options.dtype)
    note(
        f"wrote {out}: step {step} as {options.format}, {'int8' if options.format == 'edge' else options.dtype}; {', '.join(files)}"
    )
