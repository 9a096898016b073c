"""`llmtrain generate`: print what a model answers; the text alone goes to standard output."""

import sys

import torch

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import GenerateConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.conversations import encode_prompt
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.generation.sampler import generate
from llmtrain.stages import handover, starts


def run(config: GenerateConfig) -> None:
    """Answer the prompt `samples` times."""
    text = _standard_input() if config.prompt == "-" else config.prompt
    folder, chat = _model(config)
    tokenizer = load_tokenizer(handover.model_folder(folder))
    model = starts.load_policy(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    if chat:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    elif model.config.architecture == "encoder_decoder":  # as in span corruption; sentinels mean themselves
        prompt = [*tokenizer.encode_rendered([text])[0], tokenizer.eos_id]
    else:
        prompt = tokenizer.encode(text) or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    answers = generate(
        model, [prompt] * config.samples, max_new_tokens=config.max_new_tokens, stop_tokens=set(tokenizer.stop_ids),
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        seeds=[derive_seed(config.seed, "generate", row) for row in range(config.samples)],
        start_token=tokenizer.pad_id,
    )  # fmt: skip
    for answer in answers:
        print(tokenizer.decode(answer))


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from None


def _model(config: GenerateConfig) -> tuple[str, bool]:
    """The run, checkpoint or model folder, and whether it is asked as in a conversation."""
    root = config.model
    if root is None:
        found = handover.newest_finished(config.runs_dir, ("align", "sft", "pretrain"))
        if found is None:
            raise ConfigError(
                f"model: no finished run in {config.runs_dir}. Train one first, or name a folder: model=FOLDER."
            )
        print(f"model: taking the newest finished run, {found}", file=sys.stderr)
        root = str(found)
    stage = handover.stage_of(root)
    if stage == "reward":
        raise ConfigError(f"model: {root} is a reward model: it scores answers and writes none. Name another folder.")
    return root, config.chat if config.chat is not None else stage in ("sft", "align")
