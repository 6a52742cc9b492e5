"""`tune.py evaluate`, `generate`, `chat`, `classify` and `speedup`: what a sparse model can do, and how fast."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from atp_tune.cli.options import BestOptions, Permissions, checked_prompts, wrong
from atp_tune.cli.terminal import as_json, echo, markdown, quiet, working
from atp_tune.errors import UserError, is_text, printable
from atp_tune.events import Event, Message, Place, TrialStarted, ignore_events

if TYPE_CHECKING:
    from atp_tune.config.best import Config
    from atp_tune.config.study import Study
    from atp_tune.folders.comparing import Which
    from atp_tune.metrics import Speed
    from atp_tune.run.generation import Answer, ChatMessage, ChatOptions, Speaker


def evaluate(
    model: Path | None = None,
    *,
    config: Path | None = None,
    tasks: str = "zero-shot",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 8,
    device: str | None = None,
    storage: str | None = None,
    json: bool = False,
    may: Permissions,
) -> None:
    """Score models on tasks of lm-eval (`pip install -e '.[eval]'`): zero-shot accuracy with its standard error.

    The scores are stored in the configuration and in its study; the report shows them. As with lm-eval itself, code in
    a folder of tasks runs. `zero-shot` is boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa,
    with data from the hub; `scripts/offline-tasks DIR` makes tasks that need no network. An image classifier is scored
    on its test images: top-1 and top-5 accuracy.

    Example: `python tune.py evaluate smol-sparse --tasks boolq,piqa --limit 100`

    Example: `python tune.py evaluate --config studies/smol.best.json`

    Options:
        model DIR|FILE.gguf: Folder of a single model, or a .gguf file, as `apply` writes them.
        config FILE: Configuration whose dense, uniform and best models are compared in memory.
        tasks LIST: Tasks or groups of lm-eval, FOLDER/ or FILE.yaml, with commas; zero-shot: the seven of the papers.
        limit 1..: Use only the first so many items of each task.
        num_fewshot K 0..: Few-shot examples; default: 0.
        batch 1..: Batch size in sequences.
        storage URL: Storage that holds the study; default: NAME.db beside the configuration.
    """
    if (config is None) == (model is None):
        raise wrong("--config", "give either DIR or --config FILE")
    if model is not None and storage is not None:
        raise wrong("--storage", "only with --config")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    from atp_tune.config.best import read_config
    from atp_tune.report import formats
    from atp_tune.results.results import attach, check

    path, read = config or Path(), config and read_config(config)
    with working(json) as watch:
        if read:
            check(path, read, storage)
        from atp_tune.folders import comparing

        place = Place(path.parent / read.folder if read else Path(), device or "auto", vars(may), watch)
        options = comparing.TaskOptions(names, limit, num_fewshot, batch)
        result = (
            comparing.evaluate(read, options, place)
            if read
            else comparing.evaluate_folder(model or Path(), options, place)
        )
        stores = attach(path, read, "zero_shot", result, storage) if read else []
    if json:
        echo(as_json(result))
        return
    scores = formats.zero_shot(result)
    echo(markdown(scores.head, scores.rows))
    echo(f"\n{formats.zero_shot_note(result)}", style="dim")
    if read:
        echo(f"stored in {' and on '.join(stores) or f'no place: {config} is of another trial by now'}")


# --- `tune.py generate`: shows what dense, uniform and best make of prompts.


def generate(
    *,
    config: Path | None = None,
    prompt: list[str] | None = None,
    tokens: int = 48,
    set_: list[str] | None = None,
    json: bool = False,
    options: BestOptions,
) -> None:
    """Continue prompts by the dense model, by uniform and by the best configuration, pruned in memory.

    Texts are greedy and without a chat template, so that they differ by the weights alone; `chat` uses the template.
    With --prompt these prompts alone are continued, and nothing is stored. Without, the texts of three fixed prompts
    and of the study's own are stored in the configuration and in its study, as a run does at its end; summary, report
    and model card show them.

    Example: `python tune.py generate --config studies/smol.best.json --prompt "The moon is"`

    Options:
        tokens 1..4096: Tokens of each continuation, at most.
    """
    options.check("--config FILE", config, set=set_)
    prompts = checked_prompts(prompt)
    from atp_tune.cli.tables import show_continuations
    from atp_tune.metrics import PROMPTS
    from atp_tune.results.results import attach, check

    with working(json) as watch:
        best = options.best(config, set_)
        usual = (*PROMPTS, *(best.file.study.continuations.prompts if best.file else ()))
        where = best.path, best.config
        if not prompts:
            check(*where, best.storage)
        result = best.made(watch).generate(prompts or usual, tokens=tokens)
        stores = [] if prompts else attach(*where, "continuations", result, best.storage)
    if json:
        echo(as_json(result))
        return
    show_continuations(result)
    if not prompts:
        echo(f"stored in {' and on '.join(stores) or f'no place: {best.path} is of another trial by now'}")


# --- `tune.py classify`: what a sparse image classifier, and its dense model, see in pictures.


def classify(
    places: list[Path],
    *,
    config: Path | None = None,
    both: bool = False,
    device: str | None = None,
    json: bool = False,
    may: Permissions,
) -> None:
    """Name what is in pictures, by a sparse image classifier: its five most probable classes.

    The dense model of `--both` is the one that the configuration, or the folder's atp_tune.json, names.

    Example: `python tune.py classify vit-sparse photo.jpg --both`

    Options:
        places DIR FILE: Folder of an image classifier, as `apply` writes it, and pictures: .png, .jpg…
        config FILE: In the place of DIR: a configuration, pruned to in memory.
        both: Also the dense model's answers, beside the sparse model's.
    """
    source, files = (config, places) if config else (places[0], places[1:])
    if config is None and not source.is_dir():
        raise wrong("DIR", f"there is no folder {source}; give one before the pictures")
    if not files:
        raise wrong("FILE...", "give pictures after the folder")
    if config is not None and not config.is_file():
        raise wrong("--config", f"there is no file {config}")
    from atp_tune.folders.comparing import classify

    with working(json) as watch:
        results = classify(files, source, both, Place(Path(), device or "auto", vars(may), watch))
    if json:
        echo(as_json(results))
        return
    rows = []
    for one in results:
        answers = {"": one.classes} if one.dense is None else {"dense": one.dense, "sparse": one.classes}
        for name, guesses in answers.items():
            side = [name] if name else []
            rows.append([_cell(one.file), *side, *(_cell(f"{g.name} {g.probability:.1%}") for g in guesses)])
    model = [] if results[0].dense is None else ["model"]
    echo(markdown(["picture", *model, *map(str, range(1, len(results[0].classes) + 1))], rows))


def _cell(text: str) -> str:
    """A name of a file or a class, which a stranger may have given, as it is."""
    return printable(text).replace("|", "\\|")


# --- `tune.py speedup`: measures size and speed of a sparse model.

NO_GAIN = (
    "Zeros in a dense file make nothing smaller or faster by themselves: the file keeps its bytes, and torch "
    "multiplies by each 0. `tune.py pack DIR --out DIR2` writes the folder without them."
)


TOKENS = 128  # of the prompt, by default, as the help says
STRAY = 0.01  # largest share of zeros of a dense or slim model


Engine = Literal["packed", "torch", "semi-structured"]


def speedup(
    model: Path | None = None,
    *,
    config: Path | None = None,
    engine: Engine | None = None,
    runs: int = 5,
    tokens: int | None = None,
    batch: int = 1,
    options: BestOptions,
) -> None:
    """Measure file size and tokens, or images, per second of a sparse model against the dense one, on this machine.

    Zeros in a dense file make nothing smaller or faster by themselves: a smaller file needs compression, and a faster
    model needs an engine that skips zeros. The numbers are stored in the configuration and in its study.
    docs/speedup.md says what to expect.

    With `--study` each point of a front that has no speed yet, or the best of a study at one sparsity, is pruned,
    measured and removed again; the front's table then has a column of tokens, or images, per second.

    Example: `python tune.py speedup smol-sparse`

    Example: `python tune.py speedup --config studies/smol.best.json`

    Example: `python tune.py speedup --study smol-front`

    Options:
        model DIR: Sparse checkpoint, as `apply` writes it.
        config FILE: Configuration; the sparse model is written to the cache.
        engine ENGINE: packed (the default on a CPU), torch or semi-structured (2:4 on an NVIDIA GPU); torch is always
            measured.
        runs 1..: Measurements of each model; dense and sparse take turns.
        tokens 4..: Length of a language model's prompt in tokens, by default 128.
        batch 1..: Texts or images at once; rates are of all together, and are not stored.
    """
    if sum(given is not None for given in (config, model, options.study)) != 1:
        raise wrong("--config", "give one of DIR, --config FILE and --study NAME")
    if batch > 1 and options.study is not None:
        raise wrong("--batch", "not with --study, whose points are compared at one")
    from atp_tune.cli.tables import show_summary
    from atp_tune.config.best import read_config
    from atp_tune.config.data import CLASSES
    from atp_tune.plan import percent

    with working() as watch:
        from atp_tune.folders.speed import Workload, about, check, default_engine, find_pair, measure, passing_pair
        from atp_tune.results import results
        from atp_tune.results.status import best_config
        from atp_tune.results.summary import summarise

        # What is measured, and what computes it.
        device = options.device or "auto"
        if options.study is not None:
            stored, file, path = options.stored()
            spec: Study | Config = file.study
        else:
            path = about(model) if model is not None else config or Path()
            spec = read = read_config(path)
        if spec.score == CLASSES and tokens is not None:
            raise UserError(
                "--tokens: an image classifier has no prompt; leave it out, --batch N takes N images at once"
            )
        backend = engine or default_engine(device, spec.prune.pattern)
        check(backend, spec.prune.pattern, device)
        task = Workload(tokens=tokens or TOKENS, runs=runs, batch=batch)
        if options.study is None:
            results.check(path, read, options.storage)
            pair = find_pair(read, model, Place(path.parent / read.folder, device, options.allowed, watch))
            speed = measure(pair, backend, task, device, watch)
            stores = results.attach(path, read, "speed", speed, options.storage) if batch == 1 else []
        else:
            # The points that have no speed yet, each stored at once.
            summary = summarise(stored)
            trials = summary.goal.timed(summary)
            for count, trial in enumerate(trials, 1):
                read = best_config(file, stored, path, trial.number)
                watch(
                    Message(f"{count} of {len(trials)}: trial {trial.number}, {percent(read.sparsity.target)} sparsity")
                )
                dense = trial.user_attrs.get("packed_bytes") == summary.dense_bytes is not None  # nothing is packed
                with passing_pair(read, Place(path.parent / read.folder, device, options.allowed, watch)) as pair:
                    speed = measure(pair, "torch" if dense and backend == "packed" else backend, task, device, watch)
                results.attach(path, read, "speed", speed, file.storage_url)
    if options.study is not None:
        show_summary(summarise(stored), file)
        return
    _show(speed)
    echo(
        f"stored in {', '.join(stores)}"
        if stores
        else f"not stored: only rates of one {read.calibration.words.one} at a time are"
    )


def _show(speed: "Speed") -> None:
    """Prints bytes, zeros and rates as Markdown tables."""
    sizes = speed.sizes
    files = [("uncompressed", sizes.dense, sizes.sparse)]
    if sizes.dense_zstd is not None and sizes.sparse_zstd is not None:
        files.append(("compressed with zstd", sizes.dense_zstd, sizes.sparse_zstd))
    has_zeros = max(speed.zeros.values(), default=0.0) > STRAY
    if sizes.packed is not None and has_zeros:
        files.append(("packed", sizes.dense, sizes.packed))
    for table in (
        markdown(
            ("weight files", "dense", "with zeros" if has_zeros else "slim", "smaller"),
            (
                (name, f"{dense / 1e6:.1f} MB", f"{sparse / 1e6:.1f} MB", f"{dense / sparse:.2f}×")
                for name, dense, sparse in files
            ),
        ),
        markdown(("linear", "zeros"), ((kind, f"{share:.2%}") for kind, share in speed.zeros.items())),
        rates_table(speed),
    ):
        echo(table, "\n", sep="")
    for line in speed_lines(speed):
        echo(line, style="dim")
    if has_zeros:
        echo(NO_GAIN)


def speed_lines(speed: "Speed") -> Iterator[str]:
    """The measurements: a line for all engines, and a line for each."""
    row = speed.engines[0]
    what = "classify: an image" if row.batch == 1 else f"classify: {row.batch} images at once"
    if row.tokens:
        texts = "a prompt" if row.batch == 1 else f"{row.batch} prompts at once, each"
        what = f"prefill: {texts} of {row.tokens} tokens; decode: the {row.steps} tokens after it, one at a time"
    runs = len(next(iter(row.rates.values())).dense)
    yield (
        f"{speed.unit} per second, median (lowest to highest) of {runs} runs in which dense and sparse took turns; "
        f"{what}"
    )
    for one in speed.engines:
        exact = "" if one.logits is None else f"; logits are transformers' within {one.logits:.0e} of the largest"
        yield f"{one.name}: version {one.version} on {one.where}{exact}"


def rates_table(speed: "Speed") -> str:
    """A row for each engine and phase: rates of dense and sparse, sparse / dense, sparse / torch's best dense."""
    from atp_tune.metrics import spread

    rows = []
    for row in speed.engines:
        for phase, rates in row.rates.items():
            both = (spread(values, ".1f") for values in (rates.dense, rates.sparse))
            rows.append(
                (row.name, phase, *both, f"{spread(rates.ratios, '.2f')}×", f"{speed.over_torch(row, phase):.2f}×")
            )
    return markdown(("engine", "phase", "dense", "sparse", "sparse / dense", "sparse / torch's best dense"), rows)


# --- `tune.py chat`: talks with a sparse model, and with its dense model.
#
# In a terminal: lines that a person types, commands among them, and answers as they come.

Shown = Literal["sparse", "dense", "uniform", "both"]
SIDES: "dict[Shown, tuple[Which, ...]]" = {
    "sparse": ("sparse",), "dense": ("dense",), "uniform": ("uniform",), "both": ("dense", "sparse"),
}  # fmt: skip
PLAIN = "the tokenizer has no chat template: each line is continued as text, on its own"
HELP = """\
/dense    the dense model answers
/uniform  the model with as many zeros, the same share in each block, answers
/sparse   the sparse model answers
/both     both answer the same conversation, which goes on with the sparse model's answer
/reset    forget the conversation
/quit     end, as Ctrl-D; Ctrl-C stops an answer"""


class ChatSession:
    """A conversation with one model, or with both; they see the same messages."""

    def __init__(self, speaker: "Callable[[Which], Speaker]", options: "ChatOptions", system: str | None) -> None:
        """`speaker` loads a model; UserError if `system` is given and the sparse model has no chat template."""
        self._speaker = speaker
        self._options = options
        self._system: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self._shown: Shown = "sparse"
        self.has_template = speaker("sparse").has_template
        if system and not self.has_template:
            raise UserError("--system: the tokenizer has no chat template, so there is no place for it; leave it out")

    def talk(self) -> None:
        """Answers lines from the terminal until its end."""
        with suppress(ImportError):
            import readline  # noqa: F401  (edits lines and recalls earlier ones)

        echo("/dense, /uniform, /sparse or /both choose who answers; /help has more; Ctrl-D ends", style="dim")
        if not self.has_template:
            echo(PLAIN, style="dim")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                echo()
                return
            except KeyboardInterrupt:
                echo("\n/quit or Ctrl-D ends", style="dim")
                continue
            if line == "/quit":
                return
            try:
                self._reply(line) if line and not line.startswith("/") else self._obey(line)
            except UserError as error:
                echo(f"error: {error}")

    def answer(self, side: "Which", text: str, is_stopped: Callable[[], bool]) -> "Answer":
        """Prints the answer to a message as it comes, and nothing else."""
        answer = self._speaker(side).answer(
            [*self._messages, {"role": "user", "content": text}], self._options, partial(echo, end=""), is_stopped
        )
        echo()
        return answer

    def _obey(self, line: str) -> None:
        """Obeys a command; does nothing for an empty line."""
        if line == "/reset":
            self._messages = list(self._system)
            echo("a new conversation", style="dim")
        elif line == "/help":
            echo(HELP)
        elif (shown := line.removeprefix("/")) in SIDES:
            for side in SIDES[shown]:
                self._speaker(side)  # loaded now, not while a person waits for an answer
            self._shown = shown
            echo("both models answer" if shown == "both" else f"the {shown} model answers", style="dim")
        elif line:
            echo(f"{line}: is no command; /help lists them")

    def _reply(self, text: str) -> None:
        """Answers a message by each model that is shown; the last answer stays in the conversation."""
        if not is_text(text):
            raise UserError("the message is not UTF-8 text; write it again")
        answer = None
        with stoppable() as is_stopped:
            for side in SIDES[self._shown]:
                if is_stopped():
                    break
                if self._shown == "both":
                    echo(f"{side}:", style="bold")
                answer = self.answer(side, text, is_stopped)
                if answer.ended_by == "length":
                    echo("(cut off: no token is left; see --max-new-tokens and /reset)", style="dim")
                if answer.ended_by == "person":
                    echo("(stopped)", style="dim")
        content = answer.text if answer else ""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]


def as_message(given: bytes) -> str:
    """The message in a program's input; UserError if it is not UTF-8 text, or empty."""
    try:
        text = given.decode()
    except UnicodeDecodeError:
        raise UserError("the message is not UTF-8 text; write it in UTF-8") from None
    if not text.strip():
        raise UserError('the message is empty; for example: echo "Hello" | python tune.py chat DIR')
    return text.strip()


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt.

    A model thus ends its answer between two tokens, and is ready for the next.
    """
    presses = 0

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def chat(
    model: Path | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    system: str | None = None,
    options: BestOptions,
) -> None:
    """Talk with a sparse model in the terminal: `/dense` and `/uniform` show what the dense and the uniform answer.

    With `--study` the best of a study is pruned and packed in memory; a trained one is written as a folder into the
    cache, which is removed at the end.

    The tokenizer's chat template is used; without one, each line is continued as text. `/help` lists the commands.
    Through a pipe, the whole input is one message, and only its answer is printed.

    Example: `python tune.py chat --study smol`

    Example: `python tune.py chat smol-sparse`

    Example: `echo "Why is the sky blue?" | python tune.py chat studies/smol.best.json`

    Options:
        model DIR|FILE: Sparse folder, .gguf file, or a configuration, to which is pruned in memory.
        max_new_tokens N 1..: Tokens of an answer, at most.
        temperature 0..100: 0 takes the likeliest token; more draws at random.
        system TEXT: System message, for a chat template.
    """
    options.check("DIR|FILE", model, storage=options.storage)
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.cli.display import Display
    from atp_tune.folders.comparing import CHAT, BothModels
    from atp_tune.run.generation import ChatOptions
    from atp_tune.utils.cache import cache_dir, temporary_folder

    def show(event: Event) -> None:
        if isinstance(event, Message):
            echo(event.text, style="dim")
        elif isinstance(event, TrialStarted):
            echo(f"{event.title} {event.plan or ''}".rstrip(), style="dim")

    # Whether a person types and reads; else the input is one message, and only its answer is printed.
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    source, where, allowed = model, options.device or "auto", options.allowed
    try:
        with quiet(), ExitStack() as stack:
            if source is None:
                best = options.best()
                folder = stack.enter_context(temporary_folder(cache_dir("recovered") / "model"))
                where, allowed = best.device, best.allowed
                if best.config.is_trained:  # which are weights of a folder
                    source = folder / "trained"
                    with Display() as display:
                        best.made(display if is_terminal else ignore_events).save(source)
                else:
                    source = folder / "best.json"
                    best.made(ignore_events).write(source)
            models = BothModels(source, CHAT, Place(source, where, allowed, show if is_terminal else ignore_events))
            message = "" if is_terminal else as_message(sys.stdin.buffer.read())
            with models, oom_as_user_error("chat"):
                session = ChatSession(models.speaker, ChatOptions(max_new_tokens, temperature), system)
                session.talk() if is_terminal else session.answer("sparse", message, lambda: False)
    except KeyboardInterrupt:
        sys.exit(130)
