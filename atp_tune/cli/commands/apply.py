"""`tune.py apply`: writes the sparse checkpoint of a configuration, and uploads it if asked to."""

import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atp_tune.cli.options import Best, BestOptions, DType, UsageError, wrong
from atp_tune.cli.terminal import console, markdown, working
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.measures import Estimate

TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def apply(
    *,
    config: Path | None = None,
    out: Path | None = None,
    packed: bool = False,
    slim: bool = False,
    verify: Path | None = None,
    push: str | None = None,
    recover: bool = True,
    dtype: DType = None,
    private: bool = False,
    options: BestOptions,
) -> None:
    """Prune the dense checkpoint to a configuration, save it as a Hugging Face folder, and measure its perplexity.

    `--packed` makes the folder smaller, and faster on a CPU: docs/speedup.md. Weights that were rounded to few bits are
    stored in so many bits: docs/bits.md. `--slim` makes the folder of pruned channels smaller and usually faster:
    docs/channels.md.

    If the study had `recover`, the kept weights are trained as it says; what its run has trained is taken from the
    cache. `--no-recover` leaves them as they were pruned: docs/finetune.md.

    The folder's weights are in the number format of the dense model's files, or of a .gguf file in that of the study,
    bfloat16 or float32. `--dtype` takes another; trained weights stay in the files' format.

    `--push` checks login and permission before it prunes. If the upload is cut off, the same command resumes it.

    `--verify DIR` compares all files with their SHA-256 in `atp_tune.json` (exit code 2 if one differs), and lists what
    differs between this machine and the one that wrote them.

    Example: `python tune.py apply --study smol --out smol-sparse`

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`

    Example: `python tune.py apply --verify smol-sparse`

    Options:
        packed: Write no zeros, and rounded weights in their number of bits.
        slim: Write the folder without the channels that `pattern = "channels"` prunes.
        verify DIR: Only check whether the files of a sparse checkpoint are as they were written.
        push ORG/NAME: Also upload the folder to this model repository on the hub.
        recover: Train the kept weights, where the configuration says so.
    """
    if verify is not None:
        if (config, options.study, out, push) != (None, None, None, None) or packed or slim:
            said = "goes without --config, --study, --out, --packed, --slim and --push"
            raise wrong("--verify", said)
        _verify(verify)
        return
    options.check("--config FILE", config, storage=options.storage)
    if out is None:
        raise UsageError("Missing option '--out'.")
    if slim and packed:
        raise wrong("--slim", "a slim model has no zeros to pack; give one of both")
    if private and push is None:
        raise wrong("--private", "only with --push ORG/NAME")
    best = options.best(config)
    found = best.config
    if dtype is not None and recover and found.is_trained:
        raise wrong("--dtype", "trained weights stay in the format of the files; leave it out")
    if not recover:
        found = found.model_copy(update={"recovered": None})
        best = replace(best, config=found)
    if push is not None:
        from atp_tune.sparse.publishing import check_folder, check_permission, is_made_from

        check_permission(push, private)
        if dtype is None and is_made_from(out, found, packed, slim):
            check_folder(out)
            console.print(f"sparse checkpoint: {out} was written before, from this configuration")
            upload(out, push, private)
            return
    write(best, out, packed, slim, dtype)
    if push is not None:
        upload(out, push, private)


def write(best: Best, out: Path, packed: bool = False, slim: bool = False, dtype: str | None = None) -> None:
    """Writes the folder of a configuration, and prints what it has come to."""
    from atp_tune.checkpoints.files import is_slim
    from atp_tune.sparse.provenance import ABOUT
    from atp_tune.sparse.publishing import compared
    from atp_tune.spec.config import read_config

    with working() as watch:
        measured = best.made(watch).save(out, packed=packed, slim=slim, dtype=dtype)
    found = best.config
    promised = found.final("test") or (found.final("validation") if found.is_trained else None)
    show(measured, promised, out, packed and found.quantize is not None)
    if packed or is_slim(out):
        console.print("transformers loads it after `import atp_tune`, or with trust_remote_code=True")
    if not found.is_trained and (said := compared(found, read_config(out / ABOUT).manifest)):
        console.print(said)


def _verify(folder: Path) -> None:
    """Prints that a folder's files are as they were written, and what differs here from where they were."""
    from atp_tune.sparse.publishing import verify

    found = verify(folder)
    console.print(f"{folder}: all {found.files} files are as they were written, {found.weights} of them with weights")
    if found.more:
        console.print(f"not of the checkpoint: {', '.join(found.more)}")
    console.print(f"written on {found.made.processor}, {found.made.device or 'unknown device'}")
    if not found.differences:
        console.print("versions and CPU instructions are the same here")
        return
    from rich.markup import escape

    rows = [[printable(escape(cell)) for cell in astuple(row)] for row in found.differences]
    console.print("what differs here, if the checkpoint is made again or computed with:")
    console.print(markdown(("", "there", "here", "effect"), rows))


def show(measured: "Estimate", promised: "Estimate | None", out: Path, codes: bool = False) -> None:
    """Prints where the sparse checkpoint is, and whether its perplexity is the configuration's."""
    console.print(f"sparse checkpoint: {out}")
    if promised is None:
        console.print(f"perplexity on the test text: {measured} (the configuration has none yet)")
        return
    change = measured.value / promised.value - 1
    console.print(f"perplexity on the test text: {measured}, the configuration says {promised} ({change:+.3%})")
    if abs(change) > TOLERANCE:
        why = "scales of 16 bits, " if codes else ""
        warning = f"warning: they differ by more than 0.1 %; {why}another device, number format or number of threads?"
        console.print(warning, style="yellow")


# --- `tune.py pack` and `tune.py unpack`: a sparse checkpoint without its zeros, and with them again.

GROUP = 32  # as in packed.modeling_atp_sparse, which imports torch


def pack(
    folder: Path | None = None,
    *,
    out: Path,
    values: Literal["same", "bf16", "int8"] = "same",
    group_size: int | None = None,
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

    Options:
        folder DIR: Sparse checkpoint, as `apply` writes it.
        out DIR: The new folder.
        values: Number format of the nonzero weights; same: as in DIR, and exact.
        group_size N: Columns that share a scale of int8 (a multiple of 32); default: all.
    """
    if group_size is not None and values != "int8":
        raise wrong("--group-size", "only with --values int8")
    if group_size is not None and (group_size < GROUP or group_size % GROUP):
        raise wrong("--group-size", f"must be a multiple of {GROUP}")
    options.check("DIR", folder, storage=options.storage)
    from atp_tune.utils.paths import check_free

    if folder is None:
        if values != "same":
            raise wrong("--values", "takes a folder: first apply --study NAME --out DIR")
        check_free(out)
        write(options.best(), out, packed=True)
        return
    from atp_tune.sparse.packing import pack_folder

    with working() as watch:
        done = pack_folder(folder, out, values, group_size, options.device or "auto", watch)
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


def unpack(folder: Path, *, out: Path) -> None:
    """Unpack a packed folder to the sparse checkpoint that it was made from, and check the SHA-256 of each weight file.

    Example: `python tune.py unpack smol-packed --out smol-sparse`

    Options:
        folder DIR: Packed folder, as `pack` writes it.
        out DIR: The new folder.
    """
    from atp_tune.checkpoints.convert import unpack_folder
    from atp_tune.utils.paths import check_free

    with working():
        check_free(out)
        unpack_folder(folder, out)
    console.print(f"sparse checkpoint: {out}")


# --- `tune.py push`: uploads a sparse checkpoint to the Hugging Face hub.


def push(words: list[str], *, private: bool = False, options: BestOptions) -> None:
    """Upload a sparse checkpoint with its model card to the Hugging Face hub.

    It uses the login of `hf auth login`. The same command resumes an upload that was cut off. With `--study` the best
    of a study is pruned, and uploaded from a folder that is removed in the end.

    Example: `python tune.py push smol-sparse ORG/NAME`

    Example: `python tune.py push --study smol ORG/NAME`

    Options:
        words [DIR] ORG/NAME: Sparse checkpoint, as `apply` writes it, and a model repository on the hub; made if
            missing.
    """
    from atp_tune.sparse.publishing import check_folder, check_permission

    *folders, name = words
    folder = folders[0] if folders else None
    options.check("DIR", folder, storage=options.storage)
    if len(folders) > 1:
        raise wrong("DIR ORG/NAME", f"got {len(words)} words, and takes DIR ORG/NAME")
    if folders:
        check_folder(Path(folders[0]))
        check_permission(name, private)
        upload(Path(folders[0]), name, private)
        return

    best = options.best()
    with working() as watch:
        address = best.made(watch).push(name, private=private)
    console.print(f"uploaded: {address}")


def upload(folder: Path, name: str, private: bool) -> None:
    """Uploads a checked folder, if it is as it was written, and prints where it is."""
    from atp_tune.cli.terminal import interruptible
    from atp_tune.sparse import publishing
    from atp_tune.sparse.publishing import verify

    verify(folder)

    console.print(f"uploading {folder} to {name}")
    with interruptible():
        try:
            address = publishing.upload(folder, name, private)
        except KeyboardInterrupt:
            console.print(f"stopped: resume with: python tune.py push {folder} {name}{' --private' if private else ''}")
            sys.exit(130)
    console.print(f"uploaded: {address}")
