"""Combinations of keys below `data` that do not fit together, or of which one has no effect; see `checks.py`."""

from collections.abc import Callable, Iterator

from llmtrain.config.faults import suggestion
from llmtrain.config.fields import fields_of
from llmtrain.config.method_checks import SAMPLING
from llmtrain.config.plain import Finding
from llmtrain.config.schema import CleaningConfig
from llmtrain.config.token_paths import PACKED_SUFFIXES, file_kinds, names_token_files
from llmtrain.config.view import View, finding, no_effect

CLEANING = {
    "c4": ("c4_min_words_per_line", "c4_min_sentences"),
    "decontaminate": ("decontaminate_ngram",),
    "near_duplicates": ("near_similarity",),
}


def sampled_pairs(view: View) -> Iterator[Finding]:
    """Pairs are eaten by the reward model and by DPO."""
    if view.command == "sft" or (view.command == "align" and view["method.name"] in SAMPLING):
        yield from no_effect(view, "data.sampled_pairs", "only reward and align method=dpo train on pairs")


def packing(view: View) -> Iterator[Finding]:
    """Conversations are packed; pairs and prompts stand alone."""
    if view.command in ("reward", "align"):
        yield from no_effect(view, "data.packing", f"{view.command} trains on rows of their own; only sft packs them")


def sources(view: View) -> Iterator[Finding]:
    """A mixture has something in it, and says how much of each source in one way."""
    named = view["data.sources"]
    if not named:
        yield finding("needs at least one source: data.sources.NAME.path=...", "data.sources")
        return
    weights = {name: source["weight"] for name, source in named.items() if source["weight"] is not None}
    epochs = [name for name, source in named.items() if source["epochs"] is not None]
    if view["data.temperature"] is not None:
        why = "has no effect: data.temperature shares out by size; leave one of them away"
        for key in (*(f"{name}.weight" for name in weights), *(f"{name}.epochs" for name in epochs)):
            yield finding(why, f"data.sources.{key}", "data.temperature")
    elif epochs:
        for name in named:
            if name in weights:
                yield finding(f"say how much in one way: {epochs[0]} has `epochs`", f"data.sources.{name}.weight")
            elif name not in epochs:
                yield finding(f"needs `epochs`, as {epochs[0]} has", f"data.sources.{name}")
    elif len(weights) == len(named) and not any(weights.values()):
        yield finding("all weights are 0: nothing to train on", "data.sources")
    if all(source["max_epochs"] is None for source in named.values()):
        yield from no_effect(view, "data.when_exhausted", "no source has max_epochs")


def streaming(view: View) -> Iterator[Finding]:
    """A stream's size is not known, it is read in one order, and its tokenizer cannot be trained on all of it."""
    if not view["data.streaming"]:
        return
    key = "data.streaming"
    if view.command == "prepare":
        yield finding("has no effect: prepare makes what streaming does without", key)
        return
    if view["data.temperature"] is not None:
        yield finding("needs the sizes of the sources, which a stream does not tell", "data.temperature", key)
    for name, source in view["data.sources"].items():
        for option in ("epochs", "max_epochs"):
            if source[option] is not None:
                yield finding(
                    "needs the source's size, which a stream does not tell", f"data.sources.{name}.{option}", key
                )
        if names_token_files(str(source["path"])):
            yield finding("token files are encoded already, and are not streamed", f"data.sources.{name}.path", key)
        own = source["cleaning"]
        if own and (own["exact_duplicates"] or own["near_duplicates"]):
            yield finding("duplicates are found in prepared text only", f"data.sources.{name}.cleaning", key)
    for option in ("exact_duplicates", "near_duplicates"):
        yield from no_effect(view, f"data.cleaning.{option}", "duplicates are found in prepared text only", key)
    if view["data.sequences"] == "documents":
        yield finding("whole documents are packed from prepared text only", "data.sequences", key)
    if view["train.epochs"] is not None:
        yield finding("a stream has no known end; say train.steps or train.tokens", "train.epochs", key)
    if view["tokenizer.path"] is None and view["model.init_from"] is None:
        yield finding("streaming needs a tokenizer that is there: tokenizer.path=FOLDER", "tokenizer.path", key)


def cleaning(view: View) -> Iterator[Finding]:
    """Each rule of cleaning has its own options."""
    own = [f"data.sources.{name}.cleaning" for name, source in view["data.sources"].items() if source.get("cleaning")]
    for key in ("data.cleaning", *own):
        for switch, options in CLEANING.items():
            if not view[f"{key}.{switch}"]:
                for option in options:
                    yield from no_effect(view, f"{key}.{option}", f"{key}.{switch} is not set")
        if "phone" not in view[f"{key}.mask_pii"]:
            yield from no_effect(view, f"{key}.phone_region", f"{key}.mask_pii does not name phone")


def token_files(view: View) -> Iterator[Finding]:
    """Token files are read as they are, with the tokenizer that they were made with."""
    if view.command not in ("pretrain", "prepare"):
        return
    sources = view["data.sources"]
    encoded = [name for name, source in sources.items() if names_token_files(source["path"])]
    for name, source in sources.items():
        yield from _one_kind(f"data.sources.{name}", source["path"], source["validation_path"])
        if name not in encoded:
            why = "the path names no token files (.npy, .bin)"
            yield from no_effect(view, f"data.sources.{name}.token_dtype", why, f"data.sources.{name}.path")
    for key in (f"data.sources.{name}" for name in encoded):
        for option in ("text_column", "max_documents", "cleaning", "name"):
            yield from no_effect(view, f"{key}.{option}", "token files are read as they are", f"{key}.path")
    if encoded and len(encoded) == len(sources):
        for option in ("on_error", *(f"cleaning.{name}" for name in fields_of(CleaningConfig))):
            yield from no_effect(view, f"data.{option}", "all sources are token files, which are read as they are")
    keys = ["tokenizer.path", *(["model.init_from"] if view.command == "pretrain" else [])]
    if encoded and all(view[key] is None for key in keys):
        why = "token files hold the ids of a tokenizer that was there before them: name it"
        yield finding(f"needs a value: {why}", "tokenizer.path", f"data.sources.{encoded[0]}.path")


def _one_kind(key: str, path: str, validation_path: str | None) -> Iterator[Finding]:
    """A source is text or token files on this machine, and so is what is held out of it."""
    kinds = file_kinds(path)
    if len(kinds) > 1:
        yield finding(f"{path} holds text and token files: name one kind, as in {path}/*.bin", f"{key}.path")
    elif kinds == {"tokens"} and ("://" in path or path.endswith(PACKED_SUFFIXES)):
        yield finding(f"{path}: token files are memory-mapped: unpack them on this machine", f"{key}.path")
    if validation_path is not None and names_token_files(validation_path) != (kinds == {"tokens"}):
        problem = "token files and text: both paths of a source name the same kind"
        yield finding(problem, f"{key}.validation_path", f"{key}.path")


def conversations_only(view: View) -> Iterator[Finding]:
    """Only conversations have turns to choose from and to divide between."""
    if view.command == "sft":
        return
    yield from no_effect(view, "data.loss_on", "only sft learns conversations; here the last answer is judged")
    if view["data.too_long"] == "split":
        yield finding("only conversations (sft) can be divided; use drop or cut", "data.too_long")


def row_sources(view: View) -> Iterator[Finding]:
    """Columns, roles and templates are for rows that are read, and templates word all that the stage needs."""
    trains_on_pairs = view.command == "reward" or (view.command == "align" and view["method.name"] == "dpo")
    needed = ("completion",) if view.command == "sft" else ("chosen", "rejected") if trains_on_pairs else ()
    view["data.too_long"]  # rows, not text
    for name, source in view["data.sources"].items():
        key, templates = f"data.sources.{name}", source["templates"]
        generated = str(source["path"]).startswith("embedded:")
        for option in ("columns", "roles", "templates"):
            if source[option] and generated:
                yield finding(f"has no effect: {source['path']} is generated", f"{key}.{option}", f"{key}.path")
            elif source[option] and templates and option != "templates":
                why = "has no effect: the templates read the row's columns themselves"
                yield finding(why, f"{key}.{option}", f"{key}.templates")
        for number, template in enumerate(templates):
            missing = [each for each in needed if template.get(each) is None]
            if missing:
                yield finding(f"template {number} needs `{missing[0]}` for {view.command}", f"{key}.templates")


def phases(view: View) -> Iterator[Finding]:
    """Phases come one after another and weigh sources that there are."""
    before = 0.0
    for number, phase in enumerate(view["data.phases"]):
        key, weights = f"data.phases.{number}", phase["weights"]
        if phase["start"] <= before:
            yield finding(f"phase {number} begins at {phase['start']}, not after the one before", "data.phases")
        before = phase["start"]
        unknown = [name for name in weights if name not in view["data.sources"]]
        if unknown:
            meant = suggestion(unknown[0], view["data.sources"])
            yield finding(f"{key}.weights: no source {unknown[0]!r}{meant}", "data.phases")
        if not any(weights.values()) or min(weights.values()) < 0:
            yield finding(f"{key}.weights: needs numbers >= 0, one of them larger", "data.phases")


DATA_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    sampled_pairs,
    packing,
    sources,
    streaming,
    cleaning,
    token_files,
    conversations_only,
    row_sources,
    phases,
)
