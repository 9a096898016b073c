"""Conversations and preference pairs → ids and loss masks.

The text is cut where the assistant begins and stops speaking, and the pieces are encoded one by one. So no token
reaches across a border: the ids of a prompt are exactly the first ids of the conversation that goes on from it, a
model is asked at the very place it was trained on, and the mask needs no look at characters. For templates with
special tokens at the borders (nearly all) this gives the same ids as encoding the whole text.
"""

from collections.abc import Sequence

from llmtrain.data.templates import Message
from llmtrain.data.tokenizers import Tokenizer

# Ids of a row, and whether each is to be predicted: true on what the assistant says, its end token included.
Row = tuple[list[int], list[bool]]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of `messages` up to where the assistant's next turn begins."""
    return _encode(tokenizer, messages, add_generation_prompt=True)[0]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Row:
    """Ids of `messages`, and which of them the assistant says: its ends of turns too, so that it learns to stop."""
    return _encode(tokenizer, messages)


def encode_pair(tokenizer: Tokenizer, prompt: Sequence[Message], chosen: str, rejected: str) -> tuple[Row, Row]:
    """The two ways in which `prompt` goes on; only the last turn is in the masks."""
    chosen_row, rejected_row = (
        _encode(tokenizer, [*prompt, {"role": "assistant", "content": answer}], last_answer_only=True)
        for answer in (chosen, rejected)
    )
    return chosen_row, rejected_row


def _encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    last_answer_only: bool = False,
) -> Row:
    segments, spoken = tokenizer.template.render(messages, add_generation_prompt).segments()
    if last_answer_only:  # the last segment is what follows the last answer
        spoken = [number == len(spoken) - 2 for number in range(len(spoken))]
    ids: list[int] = []
    mask: list[bool] = []
    for piece, answer in zip(tokenizer.encode_rendered(segments), spoken, strict=True):
        ids += piece
        mask += [answer] * (_spoken_length(piece, tokenizer) if answer else len(piece))
        mask += [False] * (len(ids) - len(mask))
    return ids, mask


def _spoken_length(answer: list[int], tokenizer: Tokenizer) -> int:
    """The answer's length up to its end token: templates without marks count a line break after it to the turn."""
    ends = [i for i, token in enumerate(answer) if token in tokenizer.stop_ids]
    return ends[-1] + 1 if ends else len(answer)
