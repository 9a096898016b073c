"""Our own layout: our names, and the architecture as it stands, for what Transformers has no layout for."""

from dataclasses import asdict

from llmtrain.config.schema import ModelConfig
from llmtrain.models.layouts.table import Fields, Layout, look_up

NOTE = "Transformers has no layout for this combination of parts: only llmtrain reads this folder."


class OwnLayout(Layout):
    """All keys of ours in a block of config.json."""

    def write_fields(self, config: ModelConfig) -> Fields:
        model = {**asdict(config), "init_from": None, "adapter_from": None, "published_vocab_size": None}
        return {"note": NOTE, "llmtrain": {"model": model}}

    def read_fields(self, theirs: Fields) -> tuple[Fields, list[str]]:
        found = look_up(theirs, "llmtrain.model", None)
        return (found, []) if isinstance(found, dict) else ({}, ["a config.json without llmtrain.model"])

    def expresses(self, config: ModelConfig) -> bool:
        return True


OWN = OwnLayout(
    model_type="llmtrain", language_class="LanguageModel", scalar_class="ScalarModel", rules=(), parts=()
)  # fmt: skip
