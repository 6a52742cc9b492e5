"""`tune.py pack` and `tune.py unpack`: a sparse checkpoint without its zeros, and with them again."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from atp_tune.cli.best import BestOptions
from atp_tune.cli.commands.apply import write
from atp_tune.cli.options import option, wrong
from atp_tune.cli.terminal import console, working

GROUP = 32  # as in packed.modeling_atp_sparse, which imports torch
Out = Annotated[Path, option("DIR", "The new folder.")]


class ValueFormat(StrEnum):
    """Number formats of the nonzero values."""

    same = "same"
    bf16 = "bf16"
    int8 = "int8"


def pack(
    out: Out,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Sparse checkpoint, as `apply` writes it.")
    ] = None,
    values: Annotated[
        ValueFormat, typer.Option(help="Number format of the nonzero weights; same: as in DIR, and exact.")
    ] = ValueFormat.same,
    group_size: Annotated[
        int | None,
        option("N", "Columns that share a scale of int8 (a multiple of 32); default: all."),
    ] = None,
    *,
    options: BestOptions,
) -> None:
    """Pack a sparse checkpoint: smaller on disk and in memory, loaded by transformers.

    A packed matrix keeps its nonzero weights and one bit for each weight: at 70 % zeros in bfloat16, 0.36 of its bytes.
    `import atp_tune` or `trust_remote_code=True` lets `from_pretrained` load the folder; `unpack` restores DIR byte for
    byte. With `--values bf16` or `int8` the weights are rounded, and perplexity on the test text is measured before and
    after. Of a study with `bits`, `apply --packed` stores the bits; DIR has only the floats that they give. With
    `--study` the best of a study is pruned and packed in one go, as `apply --study NAME --packed` does.

    Example: `python tune.py pack smol-sparse --out smol-packed`

    Example: `python tune.py pack smol-sparse --out smol-int8 --values int8 --group-size 64`

    Example: `python tune.py pack --study smol --out smol-packed`
    """
    if group_size is not None and values != ValueFormat.int8:
        raise wrong("--group-size", "only with --values int8")
    if group_size is not None and (group_size < GROUP or group_size % GROUP):
        raise wrong("--group-size", f"must be a multiple of {GROUP}")
    options.check("DIR", folder, storage=options.storage)
    from atp_tune.paths import check_free

    if folder is None:
        if values != ValueFormat.same:
            raise wrong("--values", "takes a folder: first apply --study NAME --out DIR")
        check_free(out)
        write(options.best(), out, packed=True)
        return
    from atp_tune.sparse.packing import pack_folder

    with working() as watch:
        done = pack_folder(folder, out, values.value, group_size, options.device or "auto", watch)
    kinds = [f"{done.linears} linears"] if done.linears else []
    kinds += [f"{done.stored} other matrices (in memory they are dense)"] if done.stored else []
    share = done.packed_bytes / done.dense_bytes
    console.print(f"packed folder: {out}")
    console.print(f"packed: {' and '.join(kinds)}, {share:.3f} of their bytes")
    console.print(f"weights on disk: {done.before / 1e6:,.1f} MB before, {done.after / 1e6:,.1f} MB now")
    if done.rounding is not None:
        before, after = done.rounding
        console.print(f"perplexity on the test {done.data}: {before} before rounding, {after} after")
    console.print(f'load it: import atp_tune, then {done.auto}.from_pretrained("{out}"); or trust_remote_code=True')
    from atp_tune.sparse.provenance import ABOUT

    if bits := _rounded(folder):
        floats = f"its weights are rounded to {bits:g} bits, and floats here; to store the bits:"
        console.print(f"{floats} python tune.py apply --config {folder / ABOUT} --out DIR --packed")


def _rounded(folder: Path) -> float | None:
    """The bits of the weights of a folder that `apply` wrote, if they are rounded."""
    from atp_tune.sparse.provenance import origin

    made = origin(folder)
    return None if made is None or made.config.bits is None else made.config.bits.target


def unpack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Packed folder, as `pack` writes it.")], out: Out
) -> None:
    """Unpack a packed folder to the sparse checkpoint that it was made from, and check the SHA-256 of each weight file.

    Example: `python tune.py unpack smol-packed --out smol-sparse`
    """
    from atp_tune.checkpoints.unpacking import unpack_folder
    from atp_tune.paths import check_free

    with working():
        check_free(out)
        unpack_folder(folder, out)
    console.print(f"sparse checkpoint: {out}")
